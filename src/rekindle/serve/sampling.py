"""From logits to the next token, for one request.

The order is the field's: grammar mask, bias and penalties, temperature, top-k, top-p, min-p, then a draw from the
request's own random generator, so that a seed gives the same answer whatever else runs beside it.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

from rekindle.serve.request import Sampling

Vector = npt.NDArray[np.float32]


class Sampler:
    """Chooses the tokens of one answer; remembers them for the penalties."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._counts: Counter[int] = Counter()
        self._biased = bool(sampling.logit_bias or sampling.presence_penalty or sampling.frequency_penalty)

    def choose(self, logits: Vector) -> int:
        """The next token. `logits` [vocab_size] is not changed; -inf marks tokens that may not be chosen."""
        if self._biased:
            logits = self._adjust(logits)
        token = int(logits.argmax()) if self._sampling.temperature == 0 else self._draw(logits)
        if self._biased:
            self._counts[token] += 1
        return token

    def _adjust(self, logits: Vector) -> Vector:
        logits = logits.copy()
        for token, bias in self._sampling.logit_bias.items():
            if 0 <= token < len(logits):
                logits[token] += bias
        for token, count in self._counts.items():
            logits[token] -= self._sampling.presence_penalty + self._sampling.frequency_penalty * count
        return logits

    def _draw(self, logits: Vector) -> int:
        kept = self._top_k(logits)
        scaled = (logits[kept] if kept is not None else logits).astype(np.float64) / self._sampling.temperature
        weights = np.exp(scaled - scaled.max())
        self._cut(weights)
        sums = np.cumsum(weights)
        index = min(int(np.searchsorted(sums, self._random.random() * sums[-1], side="right")), len(sums) - 1)
        return int(kept[index]) if kept is not None else index

    def _top_k(self, logits: Vector) -> npt.NDArray[np.intp] | None:
        count = self._sampling.top_k
        if not 0 < count < len(logits):
            return None
        return np.argpartition(logits, len(logits) - count)[-count:]

    def _cut(self, weights: npt.NDArray[np.float64]) -> None:
        """Zero what top-p and min-p leave out; at least one token stays."""
        least = self._sampling.min_p  # the greatest weight is 1
        if self._sampling.top_p < 1:
            ordered = np.sort(weights)[::-1]
            sums = np.cumsum(ordered)
            last = int(np.searchsorted(sums, self._sampling.top_p * sums[-1]))
            least = max(least, float(ordered[min(last, len(ordered) - 1)]))
        weights[weights < least] = 0.0


def log_softmax(logits: Vector) -> Vector:
    """Natural logs of probabilities, [vocab_size]."""
    shifted = logits - logits.max()
    result: Vector = shifted - np.log(np.exp(shifted).sum(dtype=np.float64)).astype(np.float32)
    return result
