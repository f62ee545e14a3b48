"""From the memory tier into a real engine: placing a prompt's blocks, beside memcpy of the same bytes.

**The physics.** Each byte of KV is read from its payload and written to its cell once, which is what memcpy does. An engine
must also find cells and know which rows are whose, for every layer of every block; that shows with small blocks.
"""

from __future__ import annotations

import numpy as np

from rekindle.engine.llama import LlamaEngine
from rekindle.engine.protocol import Payload, Work
from rekindle.kv.store import Store
from rekindle.lab.machine import usable_cores
from rekindle.lab.store_arms import BLOCK_TOKENS, Arm, Comparison, compare
from rekindle.model.gguf import GgufModel
from rekindle.model.source import locate
from rekindle.tokens import as_tokens

_SPARE_CELLS = 256


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
        engine.place_all(current[0], [Payload(b.tokens, b.position, b.payload, fingerprint) for b in blocks])

    arms = [
        Arm("memcpy", lambda: np.copyto(target, source)),
        Arm("match, place all blocks", restore, ours=True, prepare=renew),
    ]
    size = num_bytes // num_blocks
    what = f"engine restore: {name}"
    comparison = compare(what, num_bytes, arms, rounds=rounds, note=f"{num_blocks} blocks of {size:,} bytes")
    assert engine.length(current[0]) == num_tokens
    return comparison
