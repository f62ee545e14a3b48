"""A context's line to the worker: one request at a time, and the next takes over where the last one was.

What is typed comes faster than it is read, so while something is being fed only the latest wish waits, here and not in the
worker's queue: its turn comes when the one before has ended, which is at once, for it is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rekindle.errors import Overloaded
from rekindle.reuse.prompt import Prompt
from rekindle.serve.request import Done, Event, Failed, Generation, Hold, Sampling
from rekindle.serve.service import Service, Ticket
from rekindle.serve.sessions.context import Context
from rekindle.tokens import Tokens, common_length

Post = Callable[[Callable[[], None]], None]  # do this on the sessions' thread
Listener = Callable[[Event], None]


@dataclass
class Work:
    """What a line has had done so far, in tokens."""

    computed: int = 0  # of prompts: everything that was said, once
    reused: int = 0
    restored: int = 0  # of those reused, put back from the store
    tier: str | None = None  # from which it was, the last time
    generated: int = 0

    def add(self, done: Done) -> None:
        self.computed += max(0, done.usage.computed_tokens - done.unread)
        self.restored += done.plan.placed
        self.tier = done.plan.tier or self.tier
        self.reused += done.usage.cached_tokens
        self.generated += done.usage.completion_tokens

    @classmethod
    def total(cls, works: Iterable[Work]) -> Work:
        """Of several lines."""
        total = cls()
        for work in works:
            for name in ("computed", "reused", "restored", "generated"):
                setattr(total, name, getattr(total, name) + getattr(work, name))
            total.tier = work.tier or total.tier
        return total


class Line:
    """Feeds and asks for one context. Belongs to the sessions' thread."""

    def __init__(self, service: Service, post: Post, holder: str, work: Work) -> None:
        """What it has done is added to `work`."""
        self.work = work
        self._service = service
        self._post = post
        self._holder = holder
        self._ticket: Ticket | None = None
        self._number = 0  # of the latest request; events of others are of no interest
        self._fed: Prompt | None = None
        self._is_feeding = False
        self._next: Callable[[], None] | None = None  # to be fed when what is being fed has ended

    @property
    def is_busy(self) -> bool:
        """Whether something is being read or answered."""
        return self._ticket is not None

    def feed(self, context: Context, tokens: Tokens, *, passing: bool) -> None:
        """Have these tokens read; what was being read before is given up where it differs.

        If the worker is overloaded it is left undone: whatever is asked next computes what is missing.
        """
        fed = self._fed
        is_same = fed is not None and fed.salt == context.salt and len(fed) == len(tokens)
        if is_same and fed is not None and common_length(fed.tokens, tokens) == len(tokens) and passing:
            return
        if self._ticket is not None and self._is_feeding:
            self._ticket.cancel()
            self._fed, self._next = None, lambda: self._feed(context, tokens, passing)
        else:
            self._feed(context, tokens, passing)

    def _feed(self, context: Context, tokens: Tokens, passing: bool) -> None:
        prompt = Prompt(tokens, salt=context.salt)
        hold = Hold(self._holder, passing=passing, cut=context.cut)
        try:
            self._submit(context, Generation(prompt=prompt, feed=True, hold=hold), lambda event: None)
        except Overloaded:
            self._fed = None
        else:
            self._fed, self._is_feeding = prompt, True

    def ask(
        self, context: Context, max_tokens: int, sampling: Sampling, listener: Listener, spent: Callable[[Done], None]
    ) -> None:
        """Have the open turn answered; the listener hears every event until `hang_up`, and `spent` its end after that.

        Raises what `submit` raises.
        """
        hold = Hold(self._holder, cut=context.cut)
        prompt = Prompt(context.tokens, salt=context.salt)
        generation = Generation(prompt=prompt, max_tokens=max_tokens, sampling=sampling, hold=hold)
        self._submit(context, generation, listener, spent)
        self._fed, self._is_feeding = None, False

    def _submit(
        self,
        context: Context,
        generation: Generation,
        listener: Listener,
        spent: Callable[[Done], None] = lambda done: None,
    ) -> None:
        self.hang_up()
        number = self._number

        def hear(event: Event) -> None:
            if isinstance(event, Done):
                self._ended(context, generation, event)
            if number == self._number:
                if isinstance(event, Failed):
                    self._fed = None
                if isinstance(event, Done | Failed):
                    self._ticket = None
                listener(event)
                if self._ticket is None and self._next is not None:
                    following, self._next = self._next, None
                    following()
            elif isinstance(event, Done):
                spent(event)

        self._ticket = self._service.submit(generation, lambda event: self._post(lambda: hear(event)))

    def _ended(self, context: Context, generation: Generation, done: Done) -> None:
        self.work.add(done)
        hold = generation.hold
        if done.plan.total and hold is not None and hold.cut is context.cut:  # it was admitted, so the cut is made
            context.cut = None

    def hang_up(self) -> None:
        """Give up what is under way; what it has computed stays."""
        self._number += 1
        self._next = None
        if self._ticket is not None:
            self._ticket.cancel()
            self._ticket = None

    def let_go(self) -> None:
        """The sequence may leave the engine for the store."""
        self.hang_up()
        self._fed = None
        self._service.let_go(self._holder)
