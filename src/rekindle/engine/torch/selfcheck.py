"""A last look before an engine serves: does it compute what the model computes on its own?

A survey can't know what it does not know: a layer that carries something from token to token past its attention, a mask of
a special kind. So a few short texts of noise are read in two steps by the engine, side by side in one batch, and in one
piece by the model with its own attention, and the logits are compared. Half of the texts have to agree, because in a
mixture of experts a rounding can send a token to another expert.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rekindle.engine.protocol import Engine, Work
from rekindle.engine.torch.borrow import Borrowed
from rekindle.errors import ModelError

_NUM_TEXTS = 4
_LENGTH = 16  # tokens of each text
# Largest difference beside the logits' own spread. What rounding makes stays ten times below.
_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2}
_TOLERANCE_16_BIT = 0.2


def check_against_model(engine: Engine, model: Any, borrowed: Borrowed) -> None:
    """Raises ModelError if logits differ. Leaves no sequence behind. A pool too small for the texts is not checked."""
    length = min(_LENGTH, engine.num_cells // _NUM_TEXTS)
    if length < 2 or engine.num_free_sequences < _NUM_TEXTS:
        return
    texts = np.random.default_rng(0).integers(0, engine.spec.vocab_size, (_NUM_TEXTS, length)).astype(np.int32)
    ids = torch.from_numpy(texts).long().to(model.device)
    with torch.inference_mode(), borrowed.pinned():
        expected = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    seqs = [engine.open() for _ in texts]
    half = length // 2
    engine.forward([Work(seq, text[:half], logits=False) for seq, text in zip(seqs, texts, strict=True)])
    logits = engine.forward([Work(seq, text[half:]) for seq, text in zip(seqs, texts, strict=True)])
    errors = [_error(logits[seq], row) for seq, row in zip(seqs, expected.float().cpu().numpy(), strict=True)]
    for seq in seqs:
        engine.close(seq)
    error = float(np.median(errors))
    if not error < _TOLERANCE.get(expected.dtype, _TOLERANCE_16_BIT):
        raise ModelError(
            f"the torch engine can't serve {engine.spec.name}: its logits differ from the model's own by {error:.1%} of "
            "their spread; something in it passes from token to token that is not attention as the engine knows it"
        )


def _error(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other - other.mean()))
