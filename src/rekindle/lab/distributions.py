"""How far two distributions of the next token are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float64]


def divergence(expected: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> Rows:
    """KL of the found distribution from the expected one, in nats: of logits [..., vocabulary] an array [...]."""
    one, other = _log_softmax(expected), _log_softmax(found)
    result: Rows = (np.exp(one) * (one - other)).sum(axis=-1)
    return result


def _log_softmax(logits: npt.NDArray[Any]) -> Rows:
    shifted: Rows = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
