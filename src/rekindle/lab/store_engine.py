"""From the memory tier into a real engine: placing a prompt's blocks, beside memcpy of the same bytes.

**The physics.** Each byte of KV is read from its payload and written to its cell once, which is what memcpy does. But a
block's rows of a layer lie together, those of two layers do not: so it is many copies of some kilobytes, each to another
place, which first fetch what they are about to write over, while one large memcpy writes past the processor's caches. Both
are measured. An engine must also find cells and know which rows are whose, for every layer of every block. How much that
takes shows the same KV as one payload, which is about one call of llama.cpp.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rekindle.engine.llama import LlamaEngine
from rekindle.engine.protocol import Work
from rekindle.kv.store import Store
from rekindle.lab.machine import usable_cores
from rekindle.lab.store_arms import BLOCK_TOKENS, Arm, Comparison, compare
from rekindle.model.gguf import GgufModel
from rekindle.model.source import locate
from rekindle.serve.run import payload_of
from rekindle.tokens import as_tokens

_SPARE_CELLS = 256

Bytes = npt.NDArray[np.uint8]


def engine_arms(model: str, num_blocks: int, rounds: int) -> Comparison:
    """Computes a prompt of so many blocks once; then its blocks are matched and placed. Raises ModelError."""
    file = GgufModel(locate(model))
    num_tokens = num_blocks * BLOCK_TOKENS
    engine = LlamaEngine(file, num_cells=num_tokens + _SPARE_CELLS, threads=usable_cores())
    try:
        return _measure(engine, file.name, num_blocks, rounds)
    finally:
        engine.shutdown()
        file.close()


def _measure(engine: LlamaEngine, name: str, num_blocks: int, rounds: int) -> Comparison:
    num_tokens, fingerprint = num_blocks * BLOCK_TOKENS, engine.spec.fingerprint
    tokens = as_tokens(np.random.default_rng(1).integers(3, engine.spec.vocab_size, num_tokens))
    seq = engine.open()
    engine.forward([Work(seq, tokens, logits=False)])
    starts = range(0, num_tokens, BLOCK_TOKENS)
    payloads = {start: engine.export(seq, start, start + BLOCK_TOKENS).data for start in starts}
    whole = engine.export(seq, 0, num_tokens)
    num_bytes = sum(map(len, payloads.values()))
    store = Store(engine.spec.fingerprint, max_bytes=2 * num_bytes + (1 << 30), block_tokens=BLOCK_TOKENS)
    store.put(tokens, payloads)
    source = np.ones(num_bytes, np.uint8)
    target = np.ones(num_bytes, np.uint8)
    current = [seq]

    def renew() -> None:
        engine.close(current.pop())
        current.append(engine.open())

    def restore() -> None:
        blocks = store.match(tokens).blocks
        engine.place_all(current[0], [payload_of(block, fingerprint) for block in blocks])

    pieces = _pieces(source, num_blocks, 2 * engine.spec.num_layers)
    rows = _rows(target, num_blocks, 2 * engine.spec.num_layers)

    def copy_pieces() -> None:
        for piece, row in zip(pieces, rows, strict=True):
            np.copyto(row, piece)

    arms = [
        Arm("memcpy", lambda: np.copyto(target, source)),
        Arm("memcpy of a layer's rows at a time", copy_pieces),
        Arm("the same as one payload", lambda: engine.place(current[0], whole, 0), prepare=renew),
        Arm("match, place all blocks", restore, ours=True, prepare=renew),
    ]
    size = num_bytes // num_blocks
    what = f"engine restore: {name}"
    comparison = compare(what, num_bytes, arms, rounds=rounds, note=f"{num_blocks} blocks of {size:,} bytes")
    assert engine.length(current[0]) == num_tokens
    return comparison


def _pieces(data: Bytes, num_blocks: int, num_rows: int) -> list[Bytes]:
    """As payloads have them: block by block, each with a piece of every row."""
    size = len(data) // (num_blocks * num_rows)
    return [data[index * size : (index + 1) * size] for index in range(num_blocks * num_rows)]


def _rows(data: Bytes, num_blocks: int, num_rows: int) -> list[Bytes]:
    """Where they go, in the same order: row by row, each with a piece of every block."""
    size = len(data) // (num_blocks * num_rows)
    starts = [(row * num_blocks + block) * size for block in range(num_blocks) for row in range(num_rows)]
    return [data[start : start + size] for start in starts]
