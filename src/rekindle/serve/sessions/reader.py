"""What of a session's contexts is read, and when; each context has a line of its own to the worker.

What a template writes between a message and its answer is a handful of tokens, and to read those alone takes as long as
decoding two to four. So a draft that rests for a moment is read to the beginning of its answer, as if it were the whole
message, when nobody else is being answered: if it is, the first token needs no model call any more, and if it goes on,
those few tokens were read in vain.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from rekindle.serve.service import Service
from rekindle.serve.sessions.context import Context
from rekindle.serve.sessions.line import Line, Post, Work

Later = Callable[[float, Callable[[], None]], None]  # do this on the sessions' thread, in so many seconds


class Reader:
    """The lines of one session. Belongs to the sessions' thread."""

    def __init__(self, service: Service, post: Post, later: Later, key: str) -> None:
        self._service, self._post, self._later, self._key = service, post, later, key
        self._lines: dict[str, Line] = {}
        self._changes = 0  # of drafts: what is to be done when one rests is not done if it did not

    @property
    def is_busy(self) -> bool:
        """Whether something is being read or answered."""
        return any(line.is_busy for line in self._lines.values())

    @property
    def work(self) -> Work:
        """What was computed, reused and generated, on all lines."""
        return Work.total(line.work for line in self._lines.values())

    def line(self, context: Context) -> Line:
        """That of this context."""
        return self._lines[context.name]

    def adopt(self, context: Context) -> None:
        """Have a line for this context, in place of that of another of this name; what that one has done still counts."""
        work, before = Work(), self._lines.get(context.name)
        if before is not None:
            before.let_go()
            work = before.work
        self._lines[context.name] = Line(self._service, self._post, f"{self._key}/{context.name}", work)

    def read(self, context: Context, most: int) -> None:
        """Have all that is known read, unless it has more than so many tokens: then commit makes room, or says why not."""
        draft = context.draft_tokens if context.open is None else None
        tokens = context.tokens
        if draft is not None and len(draft):
            tokens = np.concatenate([tokens, draft])
        if len(tokens) <= most:
            self.line(context).feed(context, tokens, passing=draft is None or len(draft) > 0)

    def when_it_rests(self, action: Callable[[], None]) -> None:
        """A draft has changed: do this when it has not for a moment."""
        self._changes += 1
        pause, number = self._service.settings.session_pause_seconds, self._changes
        if not math.isinf(pause):
            self._later(pause, lambda: action() if number == self._changes else None)

    def read_to_answer(self, context: Context, most: int) -> None:
        """Have the draft read as the whole message, unless that is too long or somebody else is being answered."""
        others = self._service.metrics
        if not context.draft.strip() or others.num_running + others.num_queued:
            return
        tokens = np.concatenate([context.tokens, context.said(context.draft)])
        if len(tokens) <= most:
            self.line(context).feed(context, tokens, passing=True)

    def let_go(self) -> None:
        """All sequences may leave the engine for the store."""
        self._changes += 1
        for line in self._lines.values():
            line.let_go()
