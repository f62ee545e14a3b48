"""What stored blocks promise: learned chances of reuse by age and kind, and what a place in the store earns by them.

**The law that is learned.** A block's kind is how often it was used and a few traits more. Of each kind it is counted how
many blocks reached an age (in geometric buckets of volume asked for since the last use), and how many of them were used
there. The chance of reuse in a bucket is

    chance(kind, age) = base(number of uses, age) × product of one factor per trait

Base and factors are fitted in turns. All are drawn towards what is known of the larger group while observations are few,
and observations fade, so the law follows the load. Ghosts count like stored blocks: what is seen doesn't depend on what
is kept.

**What it is worth.** A block may be kept as long as one likes, until it is used or given up. Its worth is the best rate,
over all such plans, of uses per volume that passes: Gittins' index. It sees that a conversation seldom goes on within
seconds, often after a minute and hardly ever after an hour, and that of blocks in a loop the oldest comes next. With a
chance that falls with age it orders blocks of one kind as LRU does. (Beckmann's LHD, NSDI'18, ranks by a similar density.)
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Traits = tuple[int, ...]

_USES = [2, 3, 4, 6] + [10 * 2**octave for octave in range(12)]  # where the groups of equally often used blocks begin
_TYPICAL_USES = [1.0, 2.0, 3.0, 4.5] + [7.0 * 2**octave for octave in range(13)]
_PRIOR_SHARE = 0.42  # of blocks are used again, and of those used n times n / (n + 2.5), before anything was seen
_PRIOR_UNUSED = 2.5
_GENERAL_BLOCKS, _GROUP_BLOCKS, _FACTOR_BLOCKS = 100, 200, 300  # observations that outweigh what was thought before
_HALF_LIFE = 8_192  # uses of segments after which an observation counts half
_SMOOTHINGS = 5  # of counts over buckets; fewer, and noise at old ages misleads
_ROUNDS = 3  # of fitting base and factors in turns
_LARGEST_CHANCE = 0.95


def uses_group(uses: int) -> int:
    """Index of the group of blocks that were used about as often."""
    return bisect_right(_USES, uses)


def age_buckets(capacity: int) -> list[float]:
    """Where each bucket of age begins: a sixteenth of the capacity to four times it in quarter octaves, then coarser."""
    young = [capacity / 256 * 2**step for step in range(4)]
    middle = [capacity / 16 * 2 ** (step / 4) for step in range(24)]
    old = [capacity * 4 * 2 ** (step / 2) for step in range(5)]
    return [0.0, *young, *middle, *old]


class Forecast:
    """Counts, and the worth that follows from them at each `learn`."""

    def __init__(self, capacity: int) -> None:
        self.starts = age_buckets(capacity)
        self.used: list[list[float]] = []  # [kind][bucket] blocks used at this age
        self.passed: list[list[float]] = []  # [kind][bucket] blocks that left this bucket unused
        self.worth: list[list[float]] = []  # [kind][bucket] uses per volume, at best
        self._kinds: dict[Traits, int] = {}
        self._traits: list[Traits] = []
        starts = np.array(self.starts)
        self._widths = np.append(np.diff(starts), starts[-1])
        self._prior = 0.3 * self._widths / (capacity + 2 * starts + self._widths)  # falls with age
        for group in range(len(_TYPICAL_USES)):
            self._add((group,))  # of no trait: what is thought of a kind that was never seen
        self.learn(0)

    def kind(self, traits: Traits) -> int:
        """Index of a kind: the uses' group, then as many traits as any other kind has."""
        kind = self._kinds.get(traits)
        if kind is None:
            kind = self._add(traits)
            self.worth.append(self.worth[traits[0]])
        return kind

    def learn(self, uses: int) -> None:
        """Fit anew; `uses` of segments were counted since the last time."""
        used, passed = np.array(self.used), np.array(self.passed)
        self.worth = self._worth(self._chances(_smooth(used), _smooth(passed))).tolist()
        fade = 0.5 ** (uses / _HALF_LIFE)
        self.used, self.passed = (used * fade).tolist(), (passed * fade).tolist()

    def _add(self, traits: Traits) -> int:
        self._kinds[traits] = kind = len(self._traits)
        self._traits.append(traits)
        self.used.append([0.0] * len(self.starts))
        self.passed.append([0.0] * len(self.starts))
        return kind

    def _chances(self, used: Floats, passed: Floats) -> Floats:
        """[kind, bucket] of being used before the bucket ends."""
        seen = used + passed
        general = (used.sum(0) + _GENERAL_BLOCKS * self._prior) / (seen.sum(0) + _GENERAL_BLOCKS)
        group = np.array([traits[0] for traits in self._traits], dtype=np.intp)
        factor = np.ones(len(group))
        for _ in range(_ROUNDS):
            base = _base(general, used, seen * factor[:, None], group)[group]
            for values in self._columns():
                foreseen = (base * seen).sum(1) * factor
                count = np.bincount(values, used.sum(1)) + _FACTOR_BLOCKS
                factor *= (count / (np.bincount(values, foreseen) + _FACTOR_BLOCKS))[values]
        return np.minimum(base * factor[:, None], _LARGEST_CHANCE)

    def _columns(self) -> list[npt.NDArray[np.intp]]:
        """Of each trait, which of its values each kind has, as small numbers."""
        width = max(len(traits) for traits in self._traits)
        columns = []
        for trait in range(1, width):
            numbers: dict[int, int] = {}
            values = [traits[trait] if trait < len(traits) else -1 for traits in self._traits]
            columns.append(np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.intp))
        return columns

    def _worth(self, chances: Floats) -> Floats:
        """[kind, bucket] best rate of uses over volume, of all plans to keep a block up to some bucket's end."""
        worth = np.empty_like(chances)
        kept = 1 - chances
        volume = self._widths * (1 - chances / 2)  # a use comes halfway, on average
        ones = np.ones((len(chances), 1))
        for bucket in range(chances.shape[1]):
            reached = np.cumprod(np.hstack([ones, kept[:, bucket:-1]]), axis=1)
            uses = np.cumsum(reached * chances[:, bucket:], axis=1)
            worth[:, bucket] = (uses / np.cumsum(reached * volume[:, bucket:], axis=1)).max(1)
        return worth


def _base(general: Floats, used: Floats, seen: Floats, group: npt.NDArray[np.intp]) -> Floats:
    """[uses group, bucket] chance of reuse, each group drawn towards the one before, and the first towards all blocks."""
    group_used, group_seen = np.zeros((2, len(_TYPICAL_USES), len(general)))
    np.add.at(group_used, group, used)
    np.add.at(group_seen, group, seen)
    base = np.empty_like(group_used)
    like, before = general, _PRIOR_SHARE
    for index, uses in enumerate(_TYPICAL_USES):
        share = uses / (uses + _PRIOR_UNUSED)  # a rule of succession
        like = like * (share / before)
        base[index] = like = (group_used[index] + _GROUP_BLOCKS * like) / (group_seen[index] + _GROUP_BLOCKS)
        before = share
    return base


def _smooth(counts: Floats) -> Floats:
    """Spread over neighbouring buckets, about half an octave of age; but not from or to the first and last."""
    for _ in range(_SMOOTHINGS):
        spread = counts.copy()
        spread[:, 2:-2] = (counts[:, 1:-3] + 2 * counts[:, 2:-2] + counts[:, 3:-1]) / 4
        counts = spread
    return counts
