"""Idle sequences that stay in the engine for the next request, and their way to the store.

A finished request leaves its sequence here. The next prompt that begins alike forks it, at any token. When there is
nothing else to do, residents are saved to the store, block by block; when cells or sequences run out, some leave.

Who leaves first is who is worth least:

    value = own tokens * effort / (1 + age)

Own tokens are those that no other sequence in the engine holds: only these would have to be put back, and only their cells
become free. The effort is 1 for one that is saved already, and 2 for one that still has to be saved on the spot. The age is
the number of sequences that were used or came since it was used. Where cells are wanted it is the value per cell that
counts, so that a large one is not spared for its size; one that would free no cell then stays until the last.

Before a sequence leaves for lack of cells it may be enough that it gives up going back: where layers of the model see a
window only, what has left it is freed, and the sequence can go on, or be forked near its end. What a prompt that
turns off earlier needs is in the store by then.

A sequence may be held by somebody who goes on with it all the time, such as a live session. Each holder has one; the next
takes its place. Those that are held leave after all others, and what follows a cut in one is private: its KV is not what
reading its tokens would give, so it gets a salt that nobody else has.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rekindle.engine.protocol import Engine, SequenceId
from rekindle.errors import EngineError
from rekindle.kv.store import Store
from rekindle.reuse import plan
from rekindle.serve.observe import Observer
from rekindle.serve.request import Cut, Hold
from rekindle.serve.sampling import Vector
from rekindle.serve.slide import slide
from rekindle.tokens import Tokens, common_length

_log = logging.getLogger(__name__)
MAX_ASIDE = 4  # sequences whose chunks are still to be compared with themselves on their own
PIECE_BLOCKS = 4  # store blocks that are saved at once in idle time: a few milliseconds, so that who comes hardly waits
MAX_MARKS = 4  # logits kept per resident; each is as large as the vocabulary


def patient() -> bool:
    """Nobody is in a hurry."""
    return False


@dataclass(eq=False)
class Resident:
    """One idle sequence."""

    seq: SequenceId
    tokens: Tokens
    salt: bytes
    marks: dict[int, Vector]  # sequence length -> logits after it
    used: int  # when, in uses of any resident
    saved: bool = False  # all of it is in the store
    spare: bool = False  # worth nothing
    holder: str | None = None  # who goes on with it
    passing: bool = False  # about to change: saved only if it has to leave
    looked_to: int = 0  # tokens that were looked through so far while it is saved in pieces
    private: bool = False  # nobody may share it, and it is never saved: its KV is not what reading its tokens gives


class Residents:
    """The idle sequences of one engine."""

    def __init__(self, engine: Engine, store: Store, *, max_residents: int, observer: Observer | None = None) -> None:
        self._engine = engine
        self._store = store
        self._max = max_residents
        self._observer = observer or Observer()
        self._all: list[Resident] = []
        self._uses = 0

    def __len__(self) -> int:
        return sum(not resident.private for resident in self._all)

    @property
    def num_tokens(self) -> int:
        return sum(len(resident.tokens) for resident in self._all if not resident.private)

    @property
    def seqs(self) -> list[SequenceId]:
        return [resident.seq for resident in self._all]

    def views(self, salt: bytes) -> list[plan.Resident]:
        """What a tenant's plan may fork."""
        return [
            plan.Resident(r.seq, r.tokens, frozenset(r.marks), self._engine.reach(r.seq))
            for r in self._all
            if r.salt == salt and not r.private
        ]

    def touch(self, seq: SequenceId) -> Resident | None:
        """Mark as just used; None if it is none of these."""
        resident = next((each for each in self._all if each.seq == seq), None)
        if resident is not None:
            resident.used = self._use()
        return resident

    def _use(self) -> int:
        self._uses += 1
        return self._uses

    def add(
        self,
        seq: SequenceId,
        salt: bytes,
        marks: dict[int, Vector],
        *,
        spare: bool = False,
        hold: Hold | None = None,
    ) -> None:
        """Take over a sequence. Residents that are a beginning of it are ended, their logits kept.

        A spare one is the first to leave the engine. One that is held takes the place of the holder's last one; those
        of other holders stay in any case.
        """
        new = Resident(seq, self._engine.tokens(seq), salt, dict(marks), self._use(), spare=spare)
        if hold is not None:
            new.holder, new.passing = hold.name, hold.passing
        mine = [r for r in self._all if not r.private and r.holder in (None, new.holder)]
        for old in [r for r in mine if r.salt == salt and _begins(r.tokens, new.tokens)]:
            new.marks |= {length: logits for length, logits in old.marks.items() if length not in new.marks}
            same = len(old.tokens) == len(new.tokens) and set(marks) <= set(old.marks)
            new.saved = new.saved or (old.saved and same)
            self._end(old)
        for old in [r for r in self._all if hold is not None and r.holder == hold.name]:
            self._end(old)
        for length in sorted(new.marks)[:-MAX_MARKS]:
            del new.marks[length]
        self._all.append(new)
        while len(self._all) > self._max:
            self.evict(for_cells=False)

    def set_aside(self, seq: SequenceId) -> Resident:
        """Take over a sequence for whoever asks, until it is released or has to leave, as the first of all."""
        aside = [resident for resident in self._all if resident.private]
        if len(aside) >= MAX_ASIDE:
            self._end(aside[0])
        new = Resident(seq, self._engine.tokens(seq), b"", {}, self._use(), saved=True, private=True)
        self._all.append(new)
        return new

    def has(self, resident: Resident) -> bool:
        """Whether it is still here; its sequence may be somebody else's by now."""
        return any(each is resident for each in self._all)

    def release(self, resident: Resident) -> None:
        """End what was set aside, if it is still here."""
        if self.has(resident):
            self._end(resident)

    def evict(self, keep: Iterable[SequenceId] = (), *, for_cells: bool = True) -> bool:
        """Save the one that is worth least to the store and end it. False if there is none but those to keep."""
        kept = set(keep)
        leaving = [resident for resident in self._all if resident.seq not in kept]
        if not leaving:
            return False
        aside = next((resident for resident in leaving if resident.private), None)
        if aside is not None:
            self._end(aside)
            return True
        leaving = [resident for resident in leaving if resident.holder is None] or leaving
        victim = min(leaving, key=self._value_per_cell if for_cells else self._value)
        self._save_or_log(victim)
        self.leave(victim)
        return True

    def give_up_one(self) -> bool:
        """Have the one that was used longest ago give up going back, saved before. False if none would free a block.

        Those that are held or set aside may yet be cut or looked into, and keep all that they have.
        """
        for resident in sorted(self._all, key=lambda each: each.used):
            is_free = resident.holder is None and not resident.private
            if is_free and self.give_up(resident.seq, resident.salt, resident.marks):
                return True
        return False

    def give_up(self, seq: SequenceId, salt: bytes | None, marks: dict[int, Vector]) -> bool:
        """Save this sequence, unless its salt is None, and free what only going back by more than a block needs.

        False, and nothing happens, if that is less than a block.
        """
        size = self._store.block_tokens
        length = max(0, self._engine.length(seq) - size)  # so that the block which is not full yet will be whole
        if self._engine.num_releasable(seq, length) < size:
            return False
        if salt is not None:
            self._save_or_log(Resident(seq, self._engine.tokens(seq), salt, dict(marks), self._uses))
        self._engine.release(seq, length)
        return True

    def _value(self, resident: Resident) -> float:
        return self._odds(resident) * self._engine.num_own(resident.seq)

    def _value_per_cell(self, resident: Resident) -> float:
        return self._odds(resident) if self._engine.num_own(resident.seq) else math.inf

    def _odds(self, resident: Resident) -> float:
        effort = 0 if resident.spare else 1 if resident.saved else 2
        return effort / (1 + self._uses - resident.used)

    def save(self, seq: SequenceId) -> None:
        """Save this one now, if it is still here; it stays."""
        for resident in [each for each in self._all if each.seq == seq]:
            self._save_or_log(resident)

    def save_one(self, hurried: Callable[[], bool] = patient) -> bool:
        """Save a piece of one resident that is not in the store yet; it stays. False if there is none."""
        unsaved = next((each for each in self._all if not each.saved and not each.passing), None)
        if unsaved is not None:
            self.save_piece(unsaved, hurried)
        return unsaved is not None

    def save_piece(self, resident: Resident, hurried: Callable[[], bool] = patient) -> None:
        """Save some blocks more of it, fewer if it is `hurried` meanwhile; it stays, and at last it is saved."""
        tokens, salt = resident.tokens, resident.salt
        missing = [start for start in self._store.missing(tokens, salt) if start >= resident.looked_to]
        blocks: dict[int, memoryview] = {}
        try:
            for start in missing[:PIECE_BLOCKS]:
                blocks |= self._export(resident, [start])
                resident.looked_to = start + self._store.block_tokens
                if hurried():
                    break
        except EngineError as error:
            _log.warning("a resident sequence could not be saved: %s", error)
            resident.saved = True
            return
        if blocks:
            self._store.put(tokens, blocks, salt=salt)
        if not missing or (resident.looked_to > missing[-1] and not hurried()):
            self._save_or_log(resident)  # its tails

    def idle(self) -> list[Resident]:
        """Those that nobody holds, and that anybody may go on with."""
        return [each for each in self._all if each.holder is None and not each.private]

    def leave(self, resident: Resident) -> None:
        """End one that is in the store."""
        self._end(resident)
        self._observer.evicted(len(resident.tokens))

    def cut(self, holder: str, cut: Cut, salt: bytes) -> None:
        """Make a hole in what somebody holds, and let it go on under another salt; nothing if it is not here.

        Where the engine can't, it stays as it is, and whoever looks for its KV under the new salt finds none.
        """
        for held in [each for each in self._all if each.holder == holder and each.salt == cut.salt]:
            self._save_or_log(held)  # as it is now: what slides often is placed anew from that
            try:
                slid = slide(self._engine, self._store, held.seq, cut)
            except EngineError as error:
                _log.warning("a live sequence could not slide and is computed again: %s", error)
                return
            held.tokens, held.salt = self._engine.tokens(held.seq), salt
            held.saved, held.looked_to = False, 0
            held.marks = {length: logits for length, logits in held.marks.items() if length <= cut.start}
            self._observer.slid(slid)

    def let_go(self, holder: str) -> None:
        """Nobody goes on with this for now: it is saved when there is time, and leaves like any other."""
        for held in [each for each in self._all if each.holder == holder]:
            held.holder, held.passing = None, False

    def clear(self) -> None:
        """End all without saving."""
        for resident in list(self._all):
            self._end(resident)

    def _end(self, resident: Resident) -> None:
        self._all.remove(resident)
        self._engine.close(resident.seq)

    def _save_or_log(self, resident: Resident) -> None:
        """What cannot be saved is computed again one day; no request fails for it."""
        try:
            self._save(resident)
        except EngineError as error:
            _log.warning("a resident sequence could not be saved: %s", error)
        resident.saved = True

    def _save(self, resident: Resident) -> None:
        size, tokens, seq = self._store.block_tokens, resident.tokens, resident.seq
        missing = self._store.missing(tokens, resident.salt)
        if resident.saved and not missing:  # the store may have lost some since
            return
        tails = []
        for length, logits in sorted(resident.marks.items()):
            tail = self._engine.export(seq, length - length % size, length)
            if not tail.lacks:
                tails.append((length, tail.data, logits))
        self._store.put(tokens, self._export(resident, missing), salt=resident.salt, tails=tails)

    def _export(self, resident: Resident, starts: Iterable[int]) -> dict[int, memoryview]:
        """The blocks that begin there, but for those of which a part was given up."""
        size = self._store.block_tokens
        blocks = {start: self._engine.export(resident.seq, start, start + size) for start in starts}
        return {start: block.data for start, block in blocks.items() if not block.lacks}


def _begins(one: Tokens, other: Tokens) -> bool:
    return len(one) <= len(other) and common_length(one, other) == len(one)
