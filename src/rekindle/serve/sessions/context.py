"""What was said in one context of a session, as the tokens it was read and generated in.

    head | turn | turn | ... | open turn | draft

The head never goes. A turn is a user's words, the beginning of an answer, the answer's own tokens and its end. The open
turn has a user's words and waits for its answer or is being answered. The draft is what is just being said. Nothing of this
is tokenised again but the draft, which has to be: the tokens of a word depend on its end, and the draft has none yet.

When the window is full, whole turns go, oldest first, and so many of them that it will be a while until the next time: down
to `retention` of the window. The KV of those that follow slides down with them. It is then no longer what reading the
remaining tokens would give, for they were read with the others before them, so it goes on under a salt of its own.

Each slide rotates keys that were rotated before, and each rotation rounds them. So it is noted in which sequence, under
which salt, a turn stood when it was read: there the store has its KV as it was then, and when turns have slid often they
are placed anew from that, rotated once.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Self

import numpy as np

from rekindle.serve.request import Cut, Origin
from rekindle.serve.sessions.script import Message, Script
from rekindle.tokens import Tokens, as_tokens

_PRIVATE_BYTES = 16
_EVERYTHING = 1 << 30  # tokens: more than any context has


@dataclass(eq=False)
class Turn:
    """One user message and its answer."""

    number: int  # from 1; stays the same when earlier ones go
    user: str
    said: Tokens  # the user's words and the beginning of the answer
    text: str = ""  # of the answer
    answer: list[int] = field(default_factory=list)
    slides: int = 0  # how often its keys were rotated since they were computed
    origin: Origin | None = None  # where it was stored before it slid, or as soon as it was in whole blocks
    origin_slides: int = 0  # how often they were rotated there

    @property
    def as_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "user": self.user,
            "said": self.said.tolist(),
            "text": self.text,
            "answer": self.answer,
            "slides": self.slides,
        }

    @classmethod
    def of(cls, given: dict[str, Any]) -> Self:
        return cls(**given | {"said": as_tokens(given["said"])})

    def read_anew(self) -> Self:
        """The same, when it is read once more, after other tokens: where it stood before is of no interest then."""
        return replace(self, slides=0, origin=None, origin_slides=0)

    def shorten(self, characters: int, tokens: int | None, piece: Callable[[int], bytes]) -> None:
        """Keep what was heard of the answer: whole tokens, no character torn, at most so many of either."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        text, kept, kept_text = "", 0, ""
        for number, token in enumerate(self.answer[:tokens], 1):
            text += utf8.decode(piece(token))
            if len(text) > characters:
                break
            if not utf8.getstate()[0]:
                kept, kept_text = number, text
        self.answer, self.text = self.answer[:kept], kept_text


@dataclass(frozen=True)
class Exchange:
    """A user's words and what they were answered, from wherever."""

    user: str
    text: str
    answer: tuple[int, ...] | None = None  # the answer's tokens; None: its text is tokenised


@dataclass(eq=False)
class Context:
    """A head and what was said after it."""

    name: str
    head: tuple[Message, ...]
    script: Script
    base_salt: bytes  # of its owner
    salt: bytes  # of its KV: the owner's, until the window has slid
    turns: list[Turn] = field(default_factory=list)
    open: Turn | None = None
    draft: str = ""
    forgotten: int = 0  # turns that the window has lost
    cut: Cut | None = None  # to be made in the held sequence before it is used

    @classmethod
    def new(cls, name: str, head: tuple[Message, ...], script: Script, salt: bytes) -> Self:
        return cls(name, head, script, salt, salt)

    # As tokens.

    def turn_tokens(self, turn: Turn) -> Tokens:
        return np.concatenate([turn.said, as_tokens(turn.answer), self.script.closing])

    @property
    def tokens(self) -> Tokens:
        """All but the draft."""
        opened = [] if self.open is None else [self.open.said, as_tokens(self.open.answer)]
        return np.concatenate([self.script.opening, *map(self.turn_tokens, self.turns), *opened])

    @property
    def draft_tokens(self) -> Tokens:
        return self.script.draft(self.draft, is_first=self._is_first)

    def _num_tokens(self, turn: Turn) -> int:
        return len(turn.said) + len(turn.answer) + len(self.script.closing)

    @property
    def num_tokens(self) -> int:
        opened = 0 if self.open is None else len(self.open.said) + len(self.open.answer)
        return len(self.script.opening) + sum(map(self._num_tokens, self.turns)) + opened

    @property
    def _is_first(self) -> bool:
        return not self.turns and not self.forgotten

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat messages, without head and draft."""

        def pair(turn: Turn) -> Iterator[dict[str, str]]:
            yield {"role": "user", "content": turn.user}
            yield {"role": "assistant", "content": turn.text}

        said = [message for turn in self.turns for message in pair(turn)]
        return said if self.open is None else [*said, {"role": "user", "content": self.open.user}]

    # What is said.

    def said(self, words: str) -> Tokens:
        """The tokens of a user's whole words, at this place. Raises InvalidRequest."""
        return self.script.said(words, is_first=self._is_first)

    def begin(self, words: str, said: Tokens) -> Turn:
        """Open a turn; the draft is over."""
        number = self.forgotten + len(self.turns) + 1
        self.open, self.draft = Turn(number, words, said), ""
        return self.open

    def end(self) -> None:
        """The open turn is answered."""
        assert self.open is not None
        self.turns.append(self.open)
        self.open = None

    def amend(self, exchanges: Sequence[Exchange], pending: str | None) -> None:
        """These were the turns all along, behind those that are forgotten. What is as before stays as it is.

        Raises InvalidRequest for words that are none.
        """
        before, self.turns, self.open, is_as_before = self.turns, [], None, True
        for index, exchange in enumerate(exchanges):
            old = before[index] if index < len(before) else None
            if old is None or not self._is_same(old, exchange):
                is_as_before = False
                self.turns.append(self._turn(exchange))
            else:
                self.turns.append(old if is_as_before else old.read_anew())
        if pending is not None:
            self.open = self._turn(Exchange(pending, "", ()))

    def _turn(self, exchange: Exchange) -> Turn:
        tokens = exchange.answer
        answer = self.script.answered(exchange.text).tolist() if tokens is None else list(tokens)
        number = self.forgotten + len(self.turns) + 1
        return Turn(number, exchange.user, self.said(exchange.user), exchange.text, answer)

    def _is_same(self, turn: Turn, exchange: Exchange) -> bool:
        if (turn.user, turn.text) != (exchange.user, exchange.text):
            return False
        return exchange.answer in (None, tuple(turn.answer)) and np.array_equal(turn.said, self.said(turn.user))

    # What goes.

    def oldest(self, num_tokens: int) -> list[Turn]:
        """As few whole turns from the beginning as have so many tokens; all, if that is too few."""
        found, have = [], 0
        for turn in self.turns:
            if have >= num_tokens:
                break
            found.append(turn)
            have += self._num_tokens(turn)
        return found

    def length_of(self, turns: list[Turn]) -> int:
        return sum(map(self._num_tokens, turns))

    def forget(self, turns: list[Turn]) -> None:
        """Lose these turns, the oldest; what follows is read again."""
        self._lose(turns)
        self._read_anew()

    def slide(self, turns: list[Turn], *, most_slides: int, block_tokens: int) -> None:
        """Lose these turns, the oldest; what follows slides, or is placed anew where it would slide too often."""
        start, count = len(self.script.opening), self.length_of(turns)
        if self.cut is None:  # what waits to be cut was never read as it stands now, and is stored nowhere
            self._note_origins(block_tokens)
        self._lose(turns)
        is_due = self.cut is not None and bool(self.cut.anew)
        placed = self._placeable() if is_due or any(turn.slides >= most_slides for turn in self.turns) else []
        for turn in self.turns:
            turn.slides = 1 + (turn.origin_slides if turn in placed else turn.slides)
        anew = tuple(turn.origin for turn in placed if turn.origin is not None)
        self._cut(start, count, self.base_salt + os.urandom(_PRIVATE_BYTES), anew)

    def clear(self) -> None:
        """Go back to the head, whose KV is what reading it gives, however often the rest has slid."""
        self.turns, self.open, self.draft, self.forgotten = [], None, "", 0
        if self.salt != self.base_salt:
            self._cut(len(self.script.opening), _EVERYTHING, self.base_salt)

    def begin_with(self, head: Sequence[Message], script: Script) -> None:
        """Another head, which all turns follow."""
        self.head, self.script = tuple(head), script
        self._read_anew()

    def _read_anew(self) -> None:
        self.turns = [turn.read_anew() for turn in self.turns]
        self.salt, self.cut = self.base_salt, None

    def _lose(self, turns: list[Turn]) -> None:
        assert turns == self.turns[: len(turns)]
        self.turns = self.turns[len(turns) :]
        self.forgotten += len(turns)

    def _note_origins(self, block_tokens: int) -> None:
        """Of turns that have none, or were cut since: those that are in whole blocks have one now."""
        tokens, start = self.tokens, len(self.script.opening)
        whole = len(tokens) // block_tokens * block_tokens
        for turn in self.turns:
            stop = start + self._num_tokens(turn)
            if not self._is_at_origin(turn):
                turn.origin = Origin(self.salt, tokens, start, stop) if stop <= whole else None
                turn.origin_slides = turn.slides
            start = stop

    def _is_at_origin(self, turn: Turn) -> bool:
        origin = turn.origin
        return origin is not None and np.array_equal(origin.tokens[origin.start : origin.stop], self.turn_tokens(turn))

    def _placeable(self) -> list[Turn]:
        """The oldest turns as far as their origins are known, up to the last that has slid since it was there."""
        known = list(takewhile(self._is_at_origin, self.turns))
        while known and known[-1].slides <= known[-1].origin_slides:
            known.pop()
        return known

    def _cut(self, start: int, count: int, salt: bytes, anew: tuple[Origin, ...] = ()) -> None:
        """Before the held sequence is used it is cut; a cut that was not made yet becomes a longer one."""
        before = self.cut
        if before is None:
            self.cut = Cut(self.salt, start, start + count, anew)
        else:
            self.cut = Cut(before.salt, start, before.stop + count, anew)
        self.salt = salt
