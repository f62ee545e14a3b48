"""Which cells hold a sequence's tokens, group by group of the layers (`groups.py`), and from where on.

All groups hold all tokens, until somebody gives up going back (`release`). Then groups whose layers see a window hold
what the window sees from there on, and the sequence can be forked, truncated and extended at the lengths that remain:

    tokens       0 ················· floor ················ length
    full         ■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■■
    windowed                         ■■■■■■■■■■■■■■■■■■■■■■■■
    may end                                      |‹ reach ··|       reach = floor + window - 1

A token takes a cell in every group, so what users count as one cell is as many as there are groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rekindle.engine.protocol import SequenceId
from rekindle.engine.sequences import FreeCells, SequenceTable
from rekindle.engine.torch.gaps import Gaps
from rekindle.engine.torch.groups import Groups
from rekindle.errors import BadRange, ContextFull, EngineError
from rekindle.tokens import Tokens

Cells = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Keys:
    """Cells of one group, for a sequence's tokens from some position on."""

    cells: Cells
    first: int = 0  # position of the first

    def between(self, start: int, stop: int) -> Keys:
        """Of the tokens [start, stop), as far as there are any."""
        start = max(start, self.first)
        return Keys(self.cells[start - self.first : max(stop - self.first, 0)], start)


class CellTable(SequenceTable):
    """The same book-keeping as its parent's, whose rows hold tokens only: each group has a table for its cells."""

    def __init__(self, num_cells: int, ids: Sequence[SequenceId], groups: Groups) -> None:
        super().__init__(num_cells, ids, FreeCells(0))
        self._groups = groups
        self._free = Gaps(num_cells * groups.count)
        self._parts = [SequenceTable(num_cells * groups.count, ids, self._free) for _ in range(groups.count)]
        self._floors: dict[SequenceId, int] = {}  # of the groups with a window

    @property
    def num_free_cells(self) -> int:
        return len(self._free) // self._groups.count

    def keys(self, seq: SequenceId, start: int = 0, stop: int | None = None) -> tuple[Keys, ...]:
        """What each group holds of the tokens [start, stop)."""
        end = self.length(seq) if stop is None else stop
        found = []
        for part, first in self._held(seq):
            begin = max(start, first)
            cells = part.cells(seq)[begin - first : max(end - first, 0)]
            found.append(Keys(np.array(cells, dtype=np.int64), begin))
        return tuple(found)

    def floor(self, seq: SequenceId) -> int:
        """Position of the first token that all groups hold."""
        self.row(seq)  # which refuses a sequence that is not open
        return self._floors[seq]

    def reach(self, seq: SequenceId) -> int:
        """The least length at which the sequence can go on, but for 0."""
        return self._reach(self.floor(seq))

    def _reach(self, floor: int) -> int:
        return floor + self._groups.window - 1 if floor else 0

    def open(self) -> SequenceId:
        seq = super().open()
        for part in self._parts:
            same = part.open()
            assert same == seq
        self._floors[seq] = 0
        return seq

    def close(self, seq: SequenceId) -> None:
        super().close(seq)
        for part in self._parts:
            part.close(seq)
        del self._floors[seq]

    def fork(self, seq: SequenceId, length: int) -> SequenceId:
        self.check_range(seq, 0, length)
        self.check_reach(seq, length)
        new = super().open()
        self.row(new).tokens.extend(self.row(seq).tokens[:length])
        for part, first in self._held(seq):
            same = part.fork(seq, max(0, length - first))
            assert same == new
        self._floors[new] = self._floors[seq] if length else 0
        return new

    def append(self, seq: SequenceId, tokens: Tokens, lacks: int = 0) -> list[int]:
        """As the parent's, but returns no cells. Groups with a window get none for the first `lacks` tokens, and those
        that they have for tokens before are of no use then.
        """
        self.check_room(len(tokens))
        length = self.length(seq)
        self.row(seq).tokens.frombytes(tokens.tobytes())
        for group, part in enumerate(self._parts):
            missing = lacks if self._groups.is_windowed(group) else 0
            if missing:
                part.truncate(seq, 0)
            part.append(seq, tokens[missing:])
        if lacks and self._groups.window:
            self._floors[seq] = length + lacks
        return []

    def release(self, seq: SequenceId, length: int) -> None:
        """Give up what only going back below `length` needs."""
        self.check_range(seq, 0, length)
        floor, old = length - self._groups.window + 1, self._floors[seq]
        if not self._groups.window or floor <= old:
            return
        self._floors[seq] = floor
        for part in self._windowed():
            part.cut(seq, 0, floor - old)

    def num_releasable(self, seq: SequenceId, length: int) -> int:
        """Cells that `release` would free, rounded down."""
        floor, old = min(length, self.length(seq)) - self._groups.window + 1, self.floor(seq)
        if not self._groups.window or floor <= old:
            return 0
        return sum(_num_own(part, seq, floor - old) for part in self._windowed()) // self._groups.count

    def truncate(self, seq: SequenceId, length: int) -> None:
        self.check_range(seq, 0, length)
        if length < self.length(seq):
            self.check_reach(seq, length)
        for part, first in self._held(seq):
            part.truncate(seq, max(0, min(length - first, part.length(seq))))
        del self.row(seq).tokens[length:]
        if not length:
            self._floors[seq] = 0

    def cut(self, seq: SequenceId, start: int, stop: int) -> None:
        for part, first in self._held(seq):
            part.cut(seq, max(0, start - first), max(0, stop - first))
        del self.row(seq).tokens[start:stop]
        self._floors[seq] = _floor_after(self._floors[seq], start, stop)

    def renew(self, seq: SequenceId, start: int, stop: int) -> list[int]:
        """As the parent's, but returns no cells."""
        for part, first in self._held(seq):
            part.renew(seq, max(0, start - first), max(0, stop - first))
        return []

    def num_held(self, seqs: Iterable[SequenceId]) -> int:
        """Cells that any of these sequences sees, rounded up."""
        wanted = list(seqs)
        return -(-sum(part.num_held(wanted) for part in self._parts) // self._groups.count)

    def num_own(self, seq: SequenceId) -> int:
        """Cells that only this sequence sees, rounded down."""
        return sum(part.num_own(seq) for part in self._parts) // self._groups.count

    def check_cut(self, seq: SequenceId, start: int, stop: int) -> None:
        """Whether a hole can be cut and what follows it moved. Raises BadRange, EngineError, ContextFull."""
        self.check_range(seq, start, stop)
        length = self.length(seq) - (stop - start)
        if self._reach(_floor_after(self._floors[seq], start, stop)) > length:
            raise EngineError(
                f"[{start}, {stop}) cannot be cut out of sequence {seq}: what a window of {self._groups.window} tokens "
                f"would see before it was released, up to token {self._floors[seq]}"
            )
        needed = 0
        for part, first in self._held(seq):
            hole, end = (max(0, start - first), max(0, stop - first)), part.length(seq)
            freed = hole[1] - hole[0] - part.num_shared(seq, *hole)
            needed += part.num_shared(seq, hole[1], end) - freed
        if needed > len(self._free):
            raise ContextFull(f"{needed} cells of a group are needed, {len(self._free)} are free")

    def check_reach(self, seq: SequenceId, length: int) -> None:
        """Raises BadRange if the sequence can't go on at this length any more."""
        if 0 < length < self.reach(seq):
            raise BadRange(
                f"sequence {seq} was released: it can go on from token {self.reach(seq)} or from its beginning, "
                f"not from token {length}"
            )

    def check_integrity(self) -> None:
        held = np.zeros(self.num_cells * self._groups.count, dtype=np.int64)
        for part in self._parts:
            references = np.zeros_like(held)
            for seq in self._rows:
                cells = np.array(part.cells(seq), dtype=np.int64)
                assert len(np.unique(cells)) == len(cells), "a sequence holds a cell twice"
                references[cells] += 1
            assert (references == np.array(part._references)).all()
            held += references > 0
        assert held.max(initial=0) <= 1, "a cell in two groups"
        assert sorted(self._free) == np.flatnonzero(held == 0).tolist()
        assert sorted([*self._free_ids, *self._rows]) == sorted(self.ids)
        for seq, row in self._rows.items():
            assert all(first + part.length(seq) == len(row.tokens) for part, first in self._held(seq))

    def check_room(self, count: int) -> None:
        if count > self.num_free_cells:
            raise ContextFull(f"{count} cells are needed, {self.num_free_cells} of {self.num_cells} are free")

    def _held(self, seq: SequenceId) -> Iterator[tuple[SequenceTable, int]]:
        """Each group's table, and the position of the first token that it holds."""
        floor = self.floor(seq)
        for group, part in enumerate(self._parts):
            yield part, floor if self._groups.is_windowed(group) else 0

    def _windowed(self) -> list[SequenceTable]:
        return self._parts[self._groups.count - self._groups.num_windowed :]


def _num_own(part: SequenceTable, seq: SequenceId, stop: int) -> int:
    """How many of its first cells only this sequence sees."""
    cells = np.array(part.cells(seq)[:stop], dtype=np.intp)
    return int((np.frombuffer(part._references, dtype=np.intc)[cells] == 1).sum())


def _floor_after(floor: int, start: int, stop: int) -> int:
    """Where the floor stands after a cut."""
    return floor if floor <= start else start if floor < stop else floor - (stop - start)
