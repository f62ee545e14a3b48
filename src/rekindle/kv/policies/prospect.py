"""Our default: the block goes whose place in the store promises least.

What a block promises is learned from the load itself (`forecast.py`) by age, by how often it was used, by whether a request
ended with it, and by how much less it is used than its predecessor (a head shared by many chains, or one of its branches).
It is weighed by what computing the block costs per byte. A new block that promises less than all stored ones is the next
victim at once: so admission is decided by the same rule as eviction.

Segments (`segments.py`) lie in cells by kind, cost density and bucket of age; those that may be evicted from are in a
dictionary per cell, and a heap knows the cell of least worth. Time is the volume that was asked for. As it passes,
segments move from bucket to bucket through one queue per bucket; a ghost that reaches the last one is dropped. So a use or
a bucket passed costs a few dictionary operations per segment, not per block, and a victim costs O(log cells).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Container, Sequence
from math import log2
from typing import ClassVar

from rekindle.kv.policies.forecast import Forecast, uses_group
from rekindle.kv.policies.segments import Segment, common_length, split
from rekindle.kv.policy import K, Policy

_GHOSTS_PER_BLOCK, _MIN_GHOSTS = 4, 65_536  # how many evicted keys are remembered
_FIRST_LESSON, _LESSON, _LESSON_GROWTH = 64, 512, 1.3  # uses of segments between two lessons, at first and later
_MOST_BRANCHED = 3  # octaves between the uses of a block and its predecessor's
_NO_PREDECESSOR = 4


class Prospect(Policy[K]):
    """Adapts by itself; there is nothing to set."""

    name: ClassVar[str] = "prospect"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._root: Segment[K] = Segment(None, [], 1, 0.0, 0)
        self._num_stored = 0
        self._num_ghosts = 0
        self._now = 0.0
        self._forecast = Forecast(capacity)
        self._queues: list[deque[tuple[float, Segment[K]]]] = [
            deque() for _ in self._forecast.starts[1:]
        ]  # oldest first
        self._rows: dict[tuple[int, int], int] = {}  # (kind, density) -> row
        self._cells: list[list[OrderedDict[Segment[K], None]]] = []  # [row][bucket] evictable, the longest there first
        self._worth: list[list[float]] = []  # [row][bucket]
        self._heap: list[
            tuple[float, int, int]
        ] = []  # (worth, row, bucket) of each cell that isn't empty, and of others
        self._aside: dict[Segment[K], None] = {}  # taken from their cells because they end in a pinned block
        self._uses = 0  # of segments, since the last lesson
        self._lesson = float(_FIRST_LESSON)
        self._row(0, 0)  # where segments are that were not placed yet

    def __len__(self) -> int:
        return self._num_stored

    @property
    def num_remembered(self) -> int:
        """Keys that are held: of stored blocks and of ghosts."""
        return self._num_stored + self._num_ghosts

    def hit(self, chain: Sequence[K]) -> None:
        self._let_time_pass()
        path, length = self._walk(list(chain))
        assert length == len(chain)
        for segment in path:
            self._now += segment.size * len(segment.keys)
        for segment in path:
            self._use(segment)

    def insert(self, chain: Sequence[K], sizes: Sequence[int], costs: Sequence[float]) -> None:
        self._let_time_pass()
        keys = list(chain)
        path, known = self._walk(keys)
        ghosts = [segment for segment in path if segment.stored < len(segment.keys)]
        self._now += sum(segment.size * len(segment.keys) for segment in ghosts) + sum(sizes[known:])
        for segment in ghosts:
            self._use(segment)
            self._restore(segment)
        parent = path[-1] if path else self._root
        stop = len(keys)
        for start, end in ((known, max(known, stop - 1)), (max(known, stop - 1), stop)):  # the last is one of its own
            if start < end:
                segment = _segment(parent, keys[start:end], sizes[start:end], costs[start:end])
                segment.is_last = end == stop
                self._append(parent, segment)
                parent = segment
        if self._uses >= self._lesson:
            self._learn()
        self._limit_ghosts()

    def remove(self, chain: Sequence[K]) -> None:
        path, _ = self._walk(list(chain))
        self._shorten(path[-1])

    def evict(self, pinned: Container[K] = ()) -> K | None:
        if self._aside:
            self._try_again(next(iter(self._aside)))
        victim = self._least(pinned)
        if victim is None:  # nothing but what was set aside, and some of that may be free by now
            for segment in list(self._aside):
                self._try_again(segment)
            victim = self._least(pinned)
        return None if victim is None else self._shorten(victim)

    # -- the tree -----------------------------------------------------------------------------------------------------

    def _walk(self, chain: list[K]) -> tuple[list[Segment[K]], int]:
        """The segments that make up the longest known beginning of a chain, and its length; splits the last if need be."""
        path: list[Segment[K]] = []
        segment, length = self._root, 0
        while length < len(chain):
            following = segment.following.get(chain[length])
            if following is None:
                break
            common = common_length(following.keys, chain, length)
            if common < len(following.keys):
                following = self._split(following, common)
            path.append(following)
            segment = following
            length += common
        return path, length

    def _split(self, segment: Segment[K], length: int) -> Segment[K]:
        """The new head is on no queue until it is placed, which every caller does or leaves to the next use."""
        self._leave_cell(segment)
        head = split(segment, length)
        head.kind, head.row, head.placed, head.bucket = segment.kind, segment.row, segment.placed, segment.bucket
        self._enter_cell(segment)
        self._enter_cell(head)
        return head

    def _append(self, parent: Segment[K], segment: Segment[K]) -> None:
        """New blocks are stored."""
        parent.following[segment.keys[0]] = segment
        parent.is_last = False
        self._leave_cell(parent)
        parent.followers += 1
        self._num_stored += segment.stored
        self._place(segment)

    def _restore(self, segment: Segment[K]) -> None:
        """Ghosts are stored again."""
        ghosts = len(segment.keys) - segment.stored
        assert segment.parent is not None
        if not segment.stored:
            self._leave_cell(segment.parent)
            segment.parent.followers += 1
        segment.stored = len(segment.keys)
        self._num_stored += ghosts
        self._num_ghosts -= ghosts
        self._enter_cell(segment)

    def _shorten(self, segment: Segment[K]) -> K:
        """The one place where a block stops being stored."""
        segment.stored -= 1
        self._num_stored -= 1
        self._num_ghosts += 1
        key = segment.keys[segment.stored]
        if not segment.stored:
            self._cells[segment.row][segment.bucket].pop(segment, None)
            self._aside.pop(segment, None)
            parent = segment.parent
            assert parent is not None
            parent.followers -= 1
            self._enter_cell(parent)
        if not segment.queued:
            self._drop_ghosts(segment)
        return key

    def _drop_ghosts(self, segment: Segment[K]) -> None:
        """Forget the ghosts at the end of a segment that has outlived its last queue, and the segment if all are."""
        while not segment.queued and not segment.following and segment.parent is not None:
            self._num_ghosts -= len(segment.keys) - segment.stored
            if segment.stored:
                del segment.keys[segment.stored :]
                return
            del segment.parent.following[segment.keys[0]]
            segment = segment.parent

    # -- time ---------------------------------------------------------------------------------------------------------

    def _use(self, segment: Segment[K]) -> None:
        self._forecast.used[segment.kind][segment.bucket] += len(segment.keys)
        segment.uses += 1
        self._place(segment)

    def _place(self, segment: Segment[K]) -> None:
        """File a segment as just used."""
        self._leave_cell(segment)
        segment.kind = kind = self._forecast.kind(_traits(segment))
        segment.row = self._row(kind, segment.density)
        segment.placed = self._now
        segment.bucket = 0
        segment.queued = True
        self._queues[0].append((self._now, segment))
        self._uses += 1
        self._enter_cell(segment)

    def _let_time_pass(self) -> None:
        """Move segments on that have outgrown their buckets."""
        starts, passed = self._forecast.starts, self._forecast.passed
        for bucket, queue in enumerate(self._queues):
            before = self._now - starts[bucket + 1]
            while queue and queue[0][0] <= before:
                entry = queue.popleft()
                placed, segment = entry
                if segment.placed != placed or segment.bucket != bucket:
                    continue  # used since
                passed[segment.kind][bucket] += len(segment.keys)
                cell = self._cells[segment.row][bucket]
                segment.bucket = bucket + 1
                if segment in cell:
                    del cell[segment]
                    self._enter_cell(segment)
                if bucket + 1 < len(self._queues):
                    self._queues[bucket + 1].append(entry)
                else:
                    segment.queued = False
                    self._drop_ghosts(segment)

    def _limit_ghosts(self) -> None:
        limit = _GHOSTS_PER_BLOCK * self._num_stored + _MIN_GHOSTS
        if self._num_ghosts <= limit:
            return
        for bucket in range(len(self._queues) - 1, -1, -1):
            queue = self._queues[bucket]
            while self._num_ghosts > limit and queue:
                placed, segment = queue.popleft()
                if segment.placed == placed and segment.bucket == bucket:
                    segment.queued = False
                    self._drop_ghosts(segment)

    # -- worth --------------------------------------------------------------------------------------------------------

    def _learn(self) -> None:
        self._forecast.learn(self._uses)
        self._uses = 0
        self._lesson = min(self._lesson * _LESSON_GROWTH, _LESSON)
        for (kind, density), row in self._rows.items():
            self._worth[row] = _weighed(self._forecast.worth[kind], density)
        cells = enumerate(self._cells)
        self._heap = [
            (self._worth[row][bucket], row, bucket) for row, line in cells for bucket, cell in enumerate(line) if cell
        ]
        heapq.heapify(self._heap)

    def _row(self, kind: int, density: int) -> int:
        row = self._rows.get((kind, density))
        if row is None:
            self._rows[kind, density] = row = len(self._cells)
            self._cells.append([OrderedDict() for _ in self._forecast.starts])
            self._worth.append(_weighed(self._forecast.worth[kind], density))
        return row

    def _enter_cell(self, segment: Segment[K]) -> None:
        """File a segment as evictable, if it is."""
        if segment.stored and not segment.followers and segment.parent is not None:
            row, bucket = segment.row, segment.bucket
            cell = self._cells[row][bucket]
            if not cell:
                heapq.heappush(self._heap, (self._worth[row][bucket], row, bucket))
            cell[segment] = None

    def _leave_cell(self, segment: Segment[K]) -> None:
        if segment.stored and not segment.followers and segment.parent is not None:
            self._cells[segment.row][segment.bucket].pop(segment, None)

    def _least(self, pinned: Container[K]) -> Segment[K] | None:
        """The segment to evict from; sets those aside that end in a pinned block."""
        while self._heap:
            _, row, bucket = self._heap[0]
            cell = self._cells[row][bucket]
            for segment in cell:
                if segment.keys[segment.stored - 1] not in pinned:
                    return segment
                break
            else:
                heapq.heappop(self._heap)
                continue
            del cell[segment]
            self._aside[segment] = None
        return None

    def _try_again(self, segment: Segment[K]) -> None:
        del self._aside[segment]
        self._enter_cell(segment)

    def check_integrity(self) -> None:
        stored = ghosts = 0
        open_ends = set()
        segments = list(self._root.following.values())
        for segment in segments:
            parent = segment.parent
            assert parent is not None and parent.following[segment.keys[0]] is segment
            assert 0 <= segment.stored <= len(segment.keys)
            if segment.stored:
                assert parent.parent is None or parent.stored == len(parent.keys), "a block without its predecessor"
            assert segment.followers == sum(each.stored > 0 for each in segment.following.values())
            stored += segment.stored
            ghosts += len(segment.keys) - segment.stored
            if segment.is_tail:
                open_ends.add(segment)
                here = segment in self._cells[segment.row][segment.bucket]
                assert here or segment in self._aside, "a tail that can't be found"
            segments.extend(segment.following.values())
        assert (stored, ghosts) == (self._num_stored, self._num_ghosts)
        filed = [segment for line in self._cells for cell in line for segment in cell]
        assert len(filed) == len(set(filed)) and set(filed) <= open_ends
        known = {(row, bucket) for _, row, bucket in self._heap}
        assert all((s.row, s.bucket) in known for s in filed)


def _segment(parent: Segment[K], keys: list[K], sizes: Sequence[int], costs: Sequence[float]) -> Segment[K]:
    """A new segment of stored blocks."""
    total = max(1, sum(sizes))
    density = round(2 * log2(max(sum(costs), 1e-12) / total))
    return Segment(parent, keys, len(keys), total / len(keys), density)


def _traits(segment: Segment[K]) -> tuple[int, int, int]:
    """What the forecast may know of a segment."""
    uses = segment.uses
    parent = segment.parent
    assert parent is not None
    branched = _NO_PREDECESSOR
    if parent.parent is not None:
        branched = min(parent.uses.bit_length() - uses.bit_length(), _MOST_BRANCHED)
    return uses_group(uses), int(segment.is_last), 2 * branched + (uses == 1)


def _weighed(worth: list[float], density: int) -> list[float]:
    factor = 2.0 ** (density / 2)
    return [each * factor for each in worth]
