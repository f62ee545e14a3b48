"""From logits to the next token, for one request.

The order is the field's: grammar mask, bias and penalties, temperature, top-k, top-p, min-p, then a draw from the
request's own random generator, so that a seed gives the same answer whatever else runs beside it.

Vocabularies have up to 260,000 tokens, and each step chooses one for every answer. What costs is to sort, to add up and to
raise e to the power of so many numbers, so each is done for as few as the result allows. Requests are taken one by one: a
row of that size fills the machine's vector units alone, and stacking rows was measured to gain nothing.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
from numpy.random import default_rng  # here, because numpy loads it late: the first request would wait for it

from rekindle.serve.request import Sampling

Vector = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]
_BLOCK = 256
_COLD = 1e-5  # temperatures below are as good as 0, and too small to divide by


class Sampler:
    """Chooses the tokens of one answer; remembers them for the penalties."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = default_rng(sampling.seed)
        self._counts: Counter[int] = Counter()
        self._biased = bool(sampling.logit_bias or sampling.presence_penalty or sampling.frequency_penalty)

    def choose(self, logits: Vector) -> int:
        """The next token. `logits` [vocab_size] is not changed; -inf marks tokens that may not be chosen."""
        if self._biased:
            logits = self._adjust(logits)
        token = int(logits.argmax()) if self._sampling.temperature < _COLD else self._draw(logits)
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
        kept = largest(logits, self._sampling.top_k) if 0 < self._sampling.top_k < len(logits) else None
        values = logits if kept is None else logits[kept]
        weights = np.exp((values - values.max()) / np.float32(self._sampling.temperature))
        inside = self._inside(weights)
        if inside is not None:
            weights, kept = weights[inside], inside if kept is None else kept[inside]
        index = _pick(weights, self._random.random())
        return index if kept is None else int(kept[index])

    def _inside(self, weights: Vector) -> Indices | None:
        """What top-p and min-p leave, at least one; None if that is all. The greatest weight is 1."""
        least = self._sampling.min_p
        if self._sampling.top_p < 1:
            least = max(least, _nucleus_edge(weights, self._sampling.top_p))
        return np.flatnonzero(weights >= least) if least > 0 else None


def largest(values: Vector, count: int) -> Indices:
    """Where the `count` greatest values are, in no order.

    A block whose greatest value is below the count-th greatest of all blocks' has none of them; so only few are looked at.
    """
    if count * _BLOCK > len(values):
        return np.argpartition(values, len(values) - count)[-count:]
    peaks = np.maximum.reduceat(values, np.arange(0, len(values), _BLOCK))
    edge = np.partition(peaks, len(peaks) - count)[-count]
    near = np.flatnonzero(values >= edge)
    return near[np.argpartition(values[near], len(near) - count)[-count:]]


def _nucleus_edge(weights: Vector, share: float) -> float:
    """The least weight among the fewest, greatest ones that have this share of all. Only the heavy ones are sorted."""
    wanted = share * float(weights.sum(dtype=np.float64))
    for edge in (1e-2, 1e-4, 0.0):
        heavy = weights[weights >= edge]
        if edge == 0.0 or float(heavy.sum(dtype=np.float64)) >= wanted:
            break
    ordered = np.sort(heavy)[::-1]
    last = int(np.searchsorted(np.cumsum(ordered, dtype=np.float64), wanted))
    return float(ordered[min(last, len(ordered) - 1)])


def _pick(weights: Vector, chance: float) -> int:
    """An index, drawn by weight; `chance` is uniform in [0, 1). First among blocks, then inside one."""
    starts = np.arange(0, len(weights), _BLOCK)
    sums = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = chance * sums[-1]
    block = min(int(np.searchsorted(sums, target, side="right")), len(sums) - 1)
    inside = np.cumsum(weights[starts[block] : starts[block] + _BLOCK], dtype=np.float64)
    rest = target - (sums[block - 1] if block else 0.0)
    return int(starts[block]) + min(int(np.searchsorted(inside, rest, side="right")), len(inside) - 1)


def log_softmax(logits: Vector) -> Vector:
    """Natural logs of probabilities, [vocab_size]."""
    shifted = logits - logits.max()
    result: Vector = shifted - np.log(np.exp(shifted).sum(dtype=np.float64)).astype(np.float32)
    return result
