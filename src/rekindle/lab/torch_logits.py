"""How far the torch engine's logits are from transformers' own: `python -m rekindle.lab.torch_logits`.

For each architecture, a tiny model with random weights in float32 whose logits have a standard deviation of 3. What is
compared are largest differences over the vocabulary. The first two columns compare with transformers; the other two compare
two ways of the engine that must agree, because all that is computed is the same.

- **forward**: a prompt read in three uneven pieces, beside another sequence, against one forward pass of the model.
- **generate**: whether greedy decoding, one token at a time, gives the tokens of `generate` with its own cache.
- **placed**: a chunk computed at position 0 and placed at another, against the chunk computed there seeing only itself.
- **recomputed**: chunks placed out of context and then recomputed entirely, against a plain read of the whole.

The physics: float32 has 24 bits, so sums of a few hundred products in another order differ by about 1e-6 of their size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from rekindle.engine.protocol import Work
from rekindle.engine.torch.engine import TorchEngine
from rekindle.lab.torch_models import TINY, tiny_model
from rekindle.tokens import Tokens, as_tokens

PROMPT_TOKENS = 200  # longer than every sliding window and than phi3's short range
DECODED_TOKENS = 24
_AWAY = 75  # where chunks are placed


@dataclass(frozen=True)
class Comparison:
    """Largest differences of logits."""

    name: str
    spread: float  # standard deviation of the logits
    forward: float
    same_tokens: bool  # greedy decoding gives generate's tokens
    placed: float
    recomputed: float


def compare(name: str, dtype: torch.dtype = torch.float32) -> Comparison:
    """Compare a tiny model of this architecture. Raises InvalidRequest for an unknown name."""
    model = tiny_model(name, dtype)
    engine = TorchEngine(model, num_cells=768, max_sequences=8)
    prompt = _noise(1, PROMPT_TOKENS, engine)
    with torch.inference_mode():
        ids = torch.from_numpy(prompt).long()[None]
        expected = model(input_ids=ids, use_cache=False).logits[0].float().numpy()
        generated = model.generate(ids, max_new_tokens=DECODED_TOKENS, do_sample=False, eos_token_id=None)[0]
    seq, logits = _read_in_pieces(engine, prompt)
    forward = float(np.abs(logits - expected[-1]).max())
    decoded = _decode(engine, seq, logits)
    engine.close(seq)
    return Comparison(
        name=name,
        spread=float(expected.std()),
        forward=forward,
        same_tokens=decoded == generated[PROMPT_TOKENS:].tolist(),
        placed=_placed(engine),
        recomputed=_recomputed(engine),
    )


def print_comparisons(comparisons: Iterable[Comparison], console: Console) -> None:
    """A table for people, then one line of JSON."""
    comparisons = list(comparisons)
    table = Table(title="Largest differences of logits, float32", title_justify="left")
    table.add_column("")
    for heading in ("logits' spread", "forward", "generate", "placed", "recomputed"):
        table.add_column(heading, justify="right")
    for each in comparisons:
        same = "same tokens" if each.same_tokens else "other tokens"
        table.add_row(
            each.name, f"{each.spread:.2f}", f"{each.forward:.1e}", same, f"{each.placed:.1e}", f"{each.recomputed:.1e}"
        )
    console.print(table)
    summary = {"experiment": "torch logits", "models": [asdict(each) for each in comparisons]}
    console.print(json.dumps(summary), soft_wrap=True, markup=False, highlight=False)


def _read_in_pieces(engine: TorchEngine, prompt: Tokens) -> tuple[int, Any]:
    """A new sequence with the prompt, and the logits after it; another sequence is read and decoded beside it."""
    seq, other = engine.open(), engine.open()
    engine.forward([Work(other, _noise(2, 30, engine)), Work(seq, prompt[:70])])
    engine.forward([Work(seq, prompt[70:71]), Work(other, _noise(3, 1, engine))])
    logits = engine.forward([Work(other, _noise(4, 5, engine)), Work(seq, prompt[71:])])[seq].copy()
    engine.close(other)
    return seq, logits


def _decode(engine: TorchEngine, seq: int, logits: Any) -> list[int]:
    tokens = [int(logits.argmax())]
    while len(tokens) < DECODED_TOKENS:
        tokens.append(int(engine.forward([Work(seq, as_tokens(tokens[-1:]))])[seq].argmax()))
    return tokens


def _placed(engine: TorchEngine) -> float:
    before, chunk, probe = (_noise(seed, count, engine) for seed, count in ((5, _AWAY), (6, 48), (7, 1)))
    alone, placed, hidden = engine.open(), engine.open(), engine.open()
    engine.forward([Work(alone, chunk), Work(placed, before), Work(hidden, before)])
    engine.place(placed, engine.export(alone, 0, len(chunk)), _AWAY)
    engine.compute_blind(hidden, chunk)
    logits = engine.forward([Work(placed, probe), Work(hidden, probe)])
    difference = float(np.abs(logits[placed] - logits[hidden]).max())
    for seq in (alone, placed, hidden):
        engine.close(seq)
    return difference


def _recomputed(engine: TorchEngine) -> float:
    head, chunk, probe = (_noise(seed, count, engine) for seed, count in ((8, 20), (9, 60), (7, 1)))
    alone, mended, plain = engine.open(), engine.open(), engine.open()
    engine.forward([Work(alone, chunk), Work(mended, head), Work(plain, np.concatenate([head, chunk, chunk]))])
    payload = engine.export(alone, 0, len(chunk))
    for position in (20, 80):
        engine.place(mended, payload, position)
    engine.recompute(mended, [(20, 80), (80, 140)])
    logits = engine.forward([Work(mended, probe), Work(plain, probe)])
    difference = float(np.abs(logits[mended] - logits[plain]).max())
    for seq in (alone, mended, plain):
        engine.close(seq)
    return difference


def _noise(seed: int, count: int, engine: TorchEngine) -> Tokens:
    return np.random.default_rng(seed).integers(10, engine.spec.vocab_size, count).astype(np.int32)


if __name__ == "__main__":
    print_comparisons((compare(name) for name in TINY), Console())
