"""Which sequence holds which cells: the book-keeping that every engine shares.

A sequence is a list of tokens and, beside it, a list of cell numbers. `fork` shares cells by counting references, so cells
in use are counted once however many sequences see them. Here all checks are made, before an engine changes anything.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rekindle.engine.protocol import KV, Engine, Payload, Range, SequenceId
from rekindle.errors import BadRange, ContextFull, EngineError, UnknownSequence
from rekindle.model.spec import ModelSpec
from rekindle.tokens import Tokens


class FreeCells:
    """The cells that nobody holds, handed out in any order. An engine that profits from neighbours brings its own kind."""

    def __init__(self, num_cells: int) -> None:
        self._cells = list(range(num_cells - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._cells)

    def __iter__(self) -> Iterator[int]:
        return iter(self._cells)

    def take(self, count: int, after: int | None) -> list[int]:
        """Hand out `count` cells, of which there must be as many; `after` is the cell that they will follow."""
        start = len(self._cells) - count
        taken = self._cells[start:]
        del self._cells[start:]
        taken.reverse()
        return taken

    def give(self, cells: Sequence[int]) -> None:
        """Take cells back."""
        self._cells.extend(cells)


@dataclass
class _Row:
    tokens: array[int] = field(default_factory=lambda: array("i"))
    cells: array[int] = field(default_factory=lambda: array("i"))


class SequenceTable:
    """Open sequences over a fixed number of cells. Every method checks, then changes."""

    def __init__(self, num_cells: int, ids: Sequence[SequenceId], free: FreeCells | None = None) -> None:
        self.num_cells = num_cells
        self.ids = tuple(ids)
        self._free_ids = list(reversed(self.ids))
        self._free_cells = FreeCells(num_cells) if free is None else free
        self._references = array("i", [0] * num_cells)
        self._counts = np.frombuffer(self._references, np.intc)  # the same, for many cells at once
        self._rows: dict[SequenceId, _Row] = {}

    @property
    def num_free_cells(self) -> int:
        return len(self._free_cells)

    @property
    def num_free_sequences(self) -> int:
        return len(self._free_ids)

    def row(self, seq: SequenceId) -> _Row:
        try:
            return self._rows[seq]
        except KeyError:
            raise UnknownSequence(f"sequence {seq} is not open") from None

    def is_open(self, seq: SequenceId) -> bool:
        return seq in self._rows

    def length(self, seq: SequenceId) -> int:
        return len(self.row(seq).tokens)

    def tokens(self, seq: SequenceId) -> Tokens:
        return np.array(self.row(seq).tokens, dtype=np.int32)

    def cells(self, seq: SequenceId) -> array[int]:
        return self.row(seq).cells

    def open(self) -> SequenceId:
        if not self._free_ids:
            raise ContextFull(f"all {len(self.ids)} sequences of the engine are open; close one first")
        seq = self._free_ids.pop()
        self._rows[seq] = _Row()
        return seq

    def close(self, seq: SequenceId) -> None:
        self._release(self.row(seq).cells)
        del self._rows[seq]
        self._free_ids.append(seq)

    def fork(self, seq: SequenceId, length: int) -> SequenceId:
        row = self.row(seq)
        self.check_range(seq, 0, length)
        new = self.open()
        self._rows[new] = _Row(row.tokens[:length], row.cells[:length])
        self._counts[np.frombuffer(self._rows[new].cells, np.intc)] += 1
        return new

    def append(self, seq: SequenceId, tokens: Tokens) -> list[int]:
        """Take cells for tokens at the end; returns them. Raises ContextFull."""
        row = self.row(seq)
        cells = self._take(len(tokens), row.cells[-1] if row.cells else None)
        row.tokens.frombytes(tokens.tobytes())
        row.cells.extend(cells)
        return cells

    def truncate(self, seq: SequenceId, length: int) -> None:
        row = self.row(seq)
        self.check_range(seq, 0, length)
        self._release(row.cells[length:])
        del row.tokens[length:], row.cells[length:]

    def cut(self, seq: SequenceId, start: int, stop: int) -> None:
        """Remove [start, stop); the cells of what follows stay the same."""
        row = self.row(seq)
        self.check_range(seq, start, stop)
        self._release(row.cells[start:stop])
        del row.tokens[start:stop], row.cells[start:stop]

    def renew(self, seq: SequenceId, start: int, stop: int) -> list[int]:
        """Give [start, stop) cells of its own, new where they are shared; returns them. Raises ContextFull."""
        row = self.row(seq)
        self.check_range(seq, start, stop)
        shared = [index for index in range(start, stop) if self._references[row.cells[index]] > 1]
        for index, cell in zip(shared, self._take(len(shared)), strict=True):
            self._references[row.cells[index]] -= 1
            row.cells[index] = cell
        return row.cells[start:stop].tolist()

    def num_held(self, seqs: Iterable[SequenceId]) -> int:
        """Cells that any of these sequences sees."""
        return len(set().union(*(self.row(seq).cells for seq in seqs)))

    def num_own(self, seq: SequenceId) -> int:
        """Cells that only this sequence sees."""
        return int((self._counts[np.frombuffer(self.row(seq).cells, np.intc)] == 1).sum())

    def num_shared(self, seq: SequenceId, start: int, stop: int) -> int:
        """How many cells of a range other sequences see too."""
        return int((self._counts[np.frombuffer(self.row(seq).cells[start:stop], np.intc)] > 1).sum())

    def check_range(self, seq: SequenceId, start: int, stop: int) -> None:
        length = self.length(seq)
        if not 0 <= start <= stop <= length:
            raise BadRange(f"[{start}, {stop}) is not a range of sequence {seq}, which has {length} tokens")

    def check_ranges(self, seq: SequenceId, ranges: Sequence[Range]) -> None:
        end = 0
        for start, stop in ranges:
            self.check_range(seq, start, stop)
            if start < end:
                raise BadRange(f"ranges must ascend without overlap, got {list(ranges)}")
            end = stop

    def check_room(self, count: int) -> None:
        if count > len(self._free_cells):
            raise ContextFull(f"{count} cells are needed, {len(self._free_cells)} of {self.num_cells} are free")

    def check_integrity(self) -> None:
        seen: Counter[int] = Counter()
        for row in self._rows.values():
            assert len(row.tokens) == len(row.cells)
            assert len(set(row.cells)) == len(row.cells), "a sequence holds a cell twice"
            seen.update(row.cells)
        assert all(self._references[cell] == seen[cell] for cell in range(self.num_cells))
        assert sorted([*self._free_cells, *seen]) == list(range(self.num_cells))
        assert sorted([*self._free_ids, *self._rows]) == sorted(self.ids)

    def _take(self, count: int, after: int | None = None) -> list[int]:
        self.check_room(count)
        cells = self._free_cells.take(count, after)
        for cell in cells:
            self._references[cell] = 1
        return cells

    def _release(self, cells: array[int]) -> None:
        held = np.frombuffer(cells, np.intc)
        self._counts[held] -= 1
        self._free_cells.give(held[self._counts[held] == 0].tolist())


class BookKeeping:
    """What every engine answers from its table; the meaning of each method is in `Engine`."""

    reads_idle_cells = False
    turns_all_cells = False
    places_between = False
    num_computed: int
    num_probed = 0  # tokens of probes, once for each layer
    spec: ModelSpec
    _table: SequenceTable

    def open(self) -> SequenceId:
        return self._table.open()

    def release(self, seq: SequenceId, length: int) -> None:
        """Of cells that hold all layers of a token nothing is given up."""
        self._table.check_range(seq, 0, length)

    def reach(self, seq: SequenceId) -> int:
        self._table.row(seq)
        return 0

    def num_releasable(self, seq: SequenceId, length: int) -> int:
        self._table.row(seq)
        return 0

    def place_all(self: Engine, seq: SequenceId, payloads: Iterable[Payload], *, until: int = 0) -> None:
        length = self.length(seq)
        try:
            for payload in payloads:
                self.place(seq, payload, self.length(seq), until=until)
        except EngineError:
            self.truncate(seq, length)
            raise

    def probe(self, seq: SequenceId, tokens: Tokens, layer: int) -> None:
        raise self._cannot_look()

    def refreshed(
        self,
        seq: SequenceId,
        payload: Payload,
        position: int,
        layer: int,
        kv: KV,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> tuple[Payload, npt.NDArray[np.float32]]:
        raise self._cannot_look()

    def attention(self, seq: SequenceId, tokens: Tokens) -> npt.NDArray[np.float32]:
        raise self._cannot_look()

    def _cannot_look(self) -> EngineError:
        return EngineError(f"this engine does not look into the layers of {self.spec.name}")

    @property
    def num_token_layers(self) -> int:
        return self.num_computed * self.spec.num_layers + self.num_probed

    def tokens(self, seq: SequenceId) -> Tokens:
        return self._table.tokens(seq)

    def length(self, seq: SequenceId) -> int:
        return self._table.length(seq)

    @property
    def num_cells(self) -> int:
        return self._table.num_cells

    @property
    def num_free_cells(self) -> int:
        return self._table.num_free_cells

    def num_own(self, seq: SequenceId) -> int:
        return self._table.num_own(seq)

    def num_held(self, seqs: Iterable[SequenceId]) -> int:
        return self._table.num_held(seqs)

    @property
    def num_free_sequences(self) -> int:
        return self._table.num_free_sequences
