"""One live session: what it is doing, and what can be done to it.

    idle --commit--> committed --answer--> answering --its end, interrupt--> idle
     draft may grow    all is read           draft may grow, unread

A draft grows and changes while a user types or speaks; what of it is new is read at once. Commit makes it the user's
message, and answer has it answered: both compute only what has not been read yet. Whatever comes while an answer is
generated waits as a draft; interrupt ends the answer and keeps what the user has heard of it.

The window is made to fit before something is read, and after each answer for the next turn, when nobody waits for it.

All methods belong to the sessions' thread; none of them waits for the worker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from rekindle.errors import InvalidRequest, SessionError
from rekindle.reuse.prompt import Prompt
from rekindle.serve.request import Done, Event, Failed, Piece, Sampling
from rekindle.serve.service import Service
from rekindle.serve.sessions.context import Context, Exchange, Turn
from rekindle.serve.sessions.gate import Gate, Open
from rekindle.serve.sessions.line import Post, Work
from rekindle.serve.sessions.news import Audience, End, Failure, Listener, News, Spent, System, Token, UserInput
from rekindle.serve.sessions.options import Options, WindowPolicy
from rekindle.serve.sessions.reader import Later, Reader
from rekindle.serve.sessions.script import Message, Script
from rekindle.serve.sessions.window import Window

MAIN = "main"  # the context that a session begins with
MAX_CONTEXTS = 16
_AMENDED = ("head", "script", "salt", "cut", "turns", "open", "forgotten")  # of a context


class Session:
    """See the module's docstring. Raises SessionError for what its state does not allow."""

    def __init__(
        self,
        service: Service,
        post: Post,
        later: Later,
        *,
        key: str,
        name: str,
        salt: bytes,
        options: Options,
        gate: Gate | None = None,
    ) -> None:
        """`key` names it to the scheduler and in files: no two sessions have the same, and nobody can guess it.

        `gate` says how many answers its owner may have; without one, any number.
        """
        self.key, self.name, self.salt = key, name, salt
        self._service = service
        self.contexts: dict[str, Context] = {}
        self.configure(options)
        self.pinned_until = 0.0  # on the sessions' clock
        self.is_hot = True  # not hibernating
        self.is_closed = False
        self._reader = Reader(service, post, later, key)
        self._audience = Audience()
        self._gate = gate or Open()
        self._answering = False
        self.active = MAIN
        self.changed: Callable[[], None] = lambda: None  # called when there is something new to be kept in a file

    # What it is.

    @property
    def state(self) -> str:
        """idle, committed or answering."""
        return "answering" if self._answering else "idle" if self.context.open is None else "committed"

    def _check_quiet(self) -> None:
        if self._answering:
            raise SessionError("an answer is being generated; interrupt it, or wait for its end")

    @property
    def context(self) -> Context:
        return self.contexts[self.active]

    @property
    def policy(self) -> WindowPolicy:
        """As asked, or what this model allows."""
        return self._window.policy

    @property
    def window(self) -> int:
        """Tokens in all."""
        return self._window.size

    @property
    def answer_tokens(self) -> int:
        """Kept free for an answer."""
        return self._window.answer_tokens

    @property
    def work(self) -> Work:
        """What was computed, reused and generated for it, in all its contexts."""
        return self._reader.work

    @property
    def status(self) -> dict[str, Any]:
        """For people and programs that look in."""
        context, work = self.context, self.work
        return {
            "session": self.name,
            "state": self.state,
            "hot": self.is_hot,
            "reading": self._reader.is_busy,
            "context": self.active,
            "contexts": list(self.contexts),
            "turns": len(context.turns),
            "forgotten_turns": context.forgotten,
            "tokens": context.num_tokens,
            "window": self.window,
            "policy": self.policy,
            "draft": context.draft,
            "computed_tokens": work.computed,
            "reused_tokens": work.reused,
            "generated_tokens": work.generated,
            "listeners": len(self._audience),
            "last_event": self._audience.num_told,
        }

    def configure(self, options: Options) -> None:
        """From now on keep and answer like this; what was said stays until room is needed. Raises SessionError."""
        window = Window(self._service, options)
        for context in self.contexts.values():
            _check_head(context.script, window)
        self.options, self._window = options, window

    # Listening.

    def listen(self, listener: Listener, *, after: int | None = None) -> None:
        """Be told what happens from now on, or after the news of this number, as far as they are remembered."""
        self._audience.add(listener, after=after)

    def leave(self, listener: Listener) -> None:
        """Be told nothing more."""
        self._audience.remove(listener)

    @property
    def num_listeners(self) -> int:
        return len(self._audience)

    def _tell(self, news: News) -> None:
        self._audience.tell(news)

    # Contexts.

    def add_context(self, name: str, head: Sequence[Message]) -> None:
        """A context of this name with this head, in place of one that there may be; its head is read at once."""
        if name not in self.contexts and len(self.contexts) >= MAX_CONTEXTS:
            raise SessionError(f"a session has at most {MAX_CONTEXTS} contexts, and all are used")
        script = self._script(head)
        if name == self.active and self._answering:
            self.interrupt()
        is_replaced = name == self.active and name in self.contexts
        self.adopt(Context.new(name, tuple(dict(message) for message in head), script, self.salt))
        if is_replaced:
            self._tell(System("replaced", f"the context {name} begins anew", {"context": name}))
        if not script.is_faithful:
            self._warn("the model's template would write earlier turns differently; they are kept as they were read")
        self._read(self.contexts[name])

    def _script(self, head: Sequence[Message]) -> Script:
        """How a context with this head is written. Raises InvalidRequest, SessionError."""
        template = self._service.model.template
        if template is None:
            raise SessionError(f"{self._service.model_name} has no chat template, so there are no turns to be had")
        script = Script(template, self._service.model.tokenizer, head)
        _check_head(script, self._window)
        return script

    def adopt(self, context: Context) -> None:
        """Take a context over as it is."""
        self.contexts[context.name] = context
        self._reader.adopt(context)

    def swap(self, name: str) -> None:
        """Go on in another context; the draft comes along. An answer under way is interrupted."""
        if name not in self.contexts:
            raise SessionError(f"there is no context {name!r}; known: {', '.join(sorted(self.contexts))}")
        if self._answering:
            self.interrupt()
        draft, self.context.draft = self.context.draft, ""
        self.active = name
        self.context.draft = draft or self.context.draft
        self._read(self.context)
        self._tell(System("swapped", f"the context is {name}", {"context": name}))
        self.changed()

    # Input.

    def append(self, text: str) -> None:
        """The draft goes on."""
        self.replace(self.context.draft + text)

    def replace(self, text: str) -> None:
        """The draft is this now. What it begins with as before is not read again."""
        if len(text) > self._most_characters:
            raise SessionError(f"the draft has {len(text)} characters; expected at most {self._most_characters}")
        self.context.draft = text
        self._read(self.context)
        self._reader.when_it_rests(self._read_to_answer)

    @property
    def _most_characters(self) -> int:
        return 64 * self.window  # no text of so many fits, and tokenising more would keep others waiting

    def commit(self, text: str | None = None, *, ahead: bool = True) -> Turn:
        """The draft, or this text in its place, is the user's message. A message that was not answered yet grows.

        It is read at once, or, unless `ahead`, when it is answered.
        """
        self._check_quiet()
        context, words = self.context, self.context.draft if text is None else text
        if len(words) > self._most_characters:
            raise SessionError(f"the message has {len(words)} characters; expected at most {self._most_characters}")
        pending = context.open
        if pending is not None and not words.strip():
            return pending
        if pending is not None:
            words = f"{pending.user}\n{words}"
            context.open = None
        try:
            said = context.said(words)
            self._fit(context, len(said) + self.answer_tokens)
        except (InvalidRequest, SessionError):
            context.open = pending
            raise
        turn = context.begin(words, said)
        self._tell(UserInput(turn.number, words))
        if ahead:
            self._read(context)
        return turn

    # Answers.

    def answer(self, *, max_tokens: int | None = None, sampling: Sampling | None = None) -> int:
        """Have the message answered, the draft if none is committed; returns the turn's number. Listeners hear it.

        Raises Overloaded, SessionError, InvalidRequest.
        """
        return self._enter(lambda: self.context.open or self.commit(ahead=False), max_tokens, sampling)

    def say(self, text: str | None, *, max_tokens: int | None = None, sampling: Sampling | None = None) -> int:
        """Commit this, or the draft, and have it answered; where one more answer is too many, neither is done."""
        return self._enter(lambda: self.commit(text, ahead=False), max_tokens, sampling)

    def _enter(self, begin: Callable[[], Turn], max_tokens: int | None, sampling: Sampling | None) -> int:
        if self.is_closed:
            raise SessionError("the session has ended; open it again")
        self._check_quiet()
        self._gate.enter(self.salt)
        try:
            self._service.check_room()
            return self._ask(begin(), max_tokens, sampling or self.options.sampling)
        except Exception:
            self._gate.leave(self.salt, None)
            raise

    def _ask(self, turn: Turn, max_tokens: int | None, sampling: Sampling) -> int:
        context = self.context
        if context.num_tokens >= self.window:  # it was narrowed while the message waited, which may be unread
            self._fit(context, self.answer_tokens, is_read=False)
        room = self.window - context.num_tokens
        self.is_hot = True
        self._reader.line(context).ask(
            context,
            min(max_tokens or room, room),
            sampling,
            self._hear,
            lambda done: self._tell(Spent(turn.number, done)),
        )
        self._answering = True
        return turn.number

    def _hear(self, event: Event) -> None:
        turn = self.context.open
        assert turn is not None and self._answering
        if isinstance(event, Piece):
            turn.answer += [token.id for token in event.tokens]
            turn.text += event.text
            self._tell(Token(turn.number, event.text, tuple(token.id for token in event.tokens)))
        elif isinstance(event, Done):
            turn.answer, turn.text = list(event.tokens), event.text
            self._settle(turn, event.reason, event)
        elif isinstance(event, Failed):
            self._stop_answering(None)
            turn.answer, turn.text = [], ""
            self._tell(Failure(turn.number, event.error))

    def interrupt(self, *, characters: int | None = None, tokens: int | None = None) -> str:
        """End the answer, or cut the last one, to what was heard of it: so many characters or tokens, or what came.

        Whole tokens are kept, so the rest may be shorter by a part of a word; it is returned.
        """
        for name, value in (("characters", characters), ("tokens", tokens)):
            if value is not None and value < 0:
                raise InvalidRequest(f"{name}: expected 0 or more, got {value}", param=name)
        turn = self.context.open if self._answering else self.context.turns[-1] if self.context.turns else None
        if turn is None or (not self._answering and self.context.open is not None):
            raise SessionError("there is no answer to interrupt")
        turn.shorten(len(turn.text) if characters is None else characters, tokens, self._service.model.tokenizer.piece)
        if self._answering:
            self._reader.line(self.context).hang_up()
            self._settle(turn, "interrupted", None)
        else:
            self._tell(System("truncated", "the answer was cut", {"turn": turn.number, "text": turn.text}))
            self._read(self.context)
            self.changed()
        return turn.text

    def _settle(self, turn: Turn, reason: str, done: Done | None) -> None:
        """The answer is over: its end is read, and room is made for the next turn."""
        self._stop_answering(done)
        self.context.end()
        self._tell(End(turn.number, reason, turn.text, done))
        if self.policy != "refuse":
            with suppress(SessionError):  # what can't be made to fit now may be a shorter message
                self._fit(self.context, 2 * self.answer_tokens)
        self._read(self.context)
        self.changed()

    # Going back.

    def rewind(self, turn: int) -> None:
        """Go back to the end of this turn, 0 for the beginning; later ones, an answer and the draft are dropped."""
        context = self.context
        last = context.forgotten + len(context.turns)
        if not context.forgotten <= turn <= last:
            raise SessionError(f"turn: expected {context.forgotten} to {last}, which are remembered, got {turn}")
        self._drop_answer("interrupted")
        context.turns, context.open, context.draft = context.turns[: turn - context.forgotten], None, ""
        self._read(context)
        self._tell(System("rewound", f"back at turn {turn}", {"turn": turn}))
        self.changed()

    def reset(self) -> None:
        """Forget all turns of the context; its head stays."""
        self._drop_answer("interrupted")
        self.context.clear()
        self._read(self.context)
        self._tell(System("reset", "the conversation begins anew"))
        self.changed()

    def amend(
        self, exchanges: Sequence[Exchange], *, pending: str | None = None, head: Sequence[Message] | None = None
    ) -> None:
        """The active context was this all along: a head (None: as it is), answered messages, and one to be answered.

        The draft stays, what begins as before is not read again. Turns for which there is no room are forgotten, oldest
        first. Raises SessionError, InvalidRequest, and then nothing has changed.
        """
        self._check_quiet()
        context = self.context
        before = {name: getattr(context, name) for name in _AMENDED}
        try:
            if head is not None and list(head) != list(context.head):
                context.begin_with(head, self._script(head))
            context.amend(exchanges, pending)
            self._fit(context, self.answer_tokens, is_read=False)
        except (InvalidRequest, SessionError):
            for name, value in before.items():
                setattr(context, name, value)
            raise
        self._read(context)
        self._tell(System("amended", "what was said has been changed"))
        self.changed()

    def _drop_answer(self, reason: str) -> None:
        """An answer under way ends, and nothing is kept of it."""
        if self._answering:  # or else there may be no context yet
            turn = self.context.open
            assert turn is not None
            self._reader.line(self.context).hang_up()
            self._stop_answering(None)
            self._tell(End(turn.number, reason, turn.text, None))

    def _stop_answering(self, done: Done | None) -> None:
        self._answering = False
        self._gate.leave(self.salt, None if done is None else done.timings.total_ms / 1000)

    # Elsewhere, and later.

    def copy_to(self, other: Session) -> None:
        """Let another session go on from here; it computes nothing, and an answer under way is this one's alone."""
        for context in self.contexts.values():
            turns = [replace(turn, answer=list(turn.answer)) for turn in context.turns]
            opened = context.open
            if opened is not None:
                opened = replace(opened, answer=[], text="")
            other.adopt(replace(context, turns=turns, open=opened, cut=None))
        other.active = self.active
        other.wake()

    def wake(self) -> None:
        """Have the active context read, from wherever its KV is."""
        self.is_hot = True
        self._read(self.context)

    def hibernate(self) -> None:
        """Let the engine have the room; KV goes to the store, and whatever is done next brings it back."""
        self._check_quiet()
        if self.is_hot:
            self._reader.let_go()
            for context in self.contexts.values():
                context.cut = None  # if never made, what would be cut leaves: it is computed where needed
            self.is_hot = False
            self._tell(System("hibernated", "the session sleeps; anything wakes it"))

    def close(self) -> None:
        """Nobody goes on with it: whatever is done to it from now on is neither read nor written."""
        self.is_closed, self.changed = True, lambda: None
        self._drop_answer("cancelled")
        self._reader.let_go()
        self._audience.clear()

    def prompt(self) -> Prompt:
        """All that the active context has read, or will have: for pins and comparisons."""
        return Prompt(self.context.tokens, salt=self.context.salt)

    # Reading ahead.

    def _read(self, context: Context) -> None:
        """Have all that is known read, unless an answer is under way: then it is read at its end."""
        if self.is_closed or (self._answering and context is self.context):
            return
        self.is_hot = True
        self._reader.read(context, self.window)

    def _read_to_answer(self) -> None:
        if self.state == "idle" and not self.is_closed:
            self._reader.read_to_answer(self.context, self.window - self.answer_tokens)

    def _fit(self, context: Context, extra: int, *, is_read: bool = True) -> None:
        """Make room for so many more tokens. Raises SessionError."""
        move = self._window.fit(context, extra, is_read=is_read)
        if move is None:
            return
        self._service.metrics.window_moved(move.tokens)
        how = "what follows slid down" if move.policy == "slide" else "what follows is read again"
        self._tell(System("forgotten", f"turns {move.first_turn} to {move.last_turn} are forgotten; {how}", vars(move)))

    def _warn(self, message: str) -> None:
        self._tell(System("warning", message))


def _check_head(script: Script, window: Window) -> None:
    room = window.size - window.answer_tokens
    if room <= 0:
        raise SessionError(f"answer_tokens: expected fewer than the window's {window.size}, got {window.answer_tokens}")
    if len(script.opening) >= room:
        raise SessionError(
            f"the head has {len(script.opening)} tokens; expected fewer than {room}, so that there is room for turns"
        )
