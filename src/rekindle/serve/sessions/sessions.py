"""All live sessions of a service, and the one thread on which everything happens to them.

Whatever is done to a session is a command in this thread's inbox, the worker's events among them, so sessions need no
locks, and the worker never waits for one. `call` gives a future; async callers wrap it, others ask for its result.

    idle for `session_idle_seconds`   the session hibernates: its KV may leave the engine for the store
    more than `max_sessions`          of the owner who has most, the one that was idle longest is closed; its handle brings
                                      it back if it is in a file
    after each turn, and at the end   it is written to its file, from which `resume` takes it
"""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from rekindle.errors import Overloaded, RekindleError, SessionError, Stopping
from rekindle.serve.request import Sampling
from rekindle.serve.service import Service
from rekindle.serve.sessions.context import Context, Turn
from rekindle.serve.sessions.gate import Gate, Open
from rekindle.serve.sessions.options import Options
from rekindle.serve.sessions.saved import SavedSessions, unreadable
from rekindle.serve.sessions.script import Message, Script
from rekindle.serve.sessions.session import MAIN, Session

T = TypeVar("T")
TICK_SECONDS = 1.0
PRUNE_SECONDS = 3600.0  # between looks for files that are too old
_KEY_BYTES = 16
_log = logging.getLogger(__name__)


class SessionGone(SessionError):
    """A session is no more, and can't be brought back."""


@dataclass(eq=False)
class _Entry:
    """A session and when it was last of use."""

    session: Session
    used: float


class Sessions:
    """See the module's docstring. `call` and `close` may be called from any thread, all else on the sessions' own."""

    def __init__(
        self,
        service: Service,
        *,
        gate: Gate | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`gate` limits the answers of one owner, `wall_clock` tells the age of files."""
        self._service = service
        self._settings = settings = service.settings
        self._gate = gate
        self._clock = clock
        folder = service.folder
        self._saved = SavedSessions(
            None if folder is None else folder / "sessions",
            service.engine_spec.fingerprint,
            max_files=settings.session_files,
            ttl_seconds=settings.session_ttl_seconds,
            clock=wall_clock,
        )
        self._prune_at = clock()
        self._entries: dict[tuple[bytes, str], _Entry] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []  # a heap
        self._numbers = itertools.count()  # so that timers of one moment go in their order
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._ended = False
        service.metrics.watch_sessions(lambda: self.counts)
        self._thread = threading.Thread(target=self._main, name="rekindle-sessions", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, action: Callable[[], T]) -> Future[T]:
        """Do something with sessions. The future fails with what it raises, or with Stopping after the end."""
        future: Future[T] = Future()

        def command() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(action())
                except Exception as error:
                    future.set_exception(error)

        with self._lock:
            if self._ended:
                future.set_exception(Stopping("the server is being stopped"))
            else:
                self._inbox.put(command)
        return future

    def close(self) -> None:
        """Write all sessions to their files and end them. The service must still be open."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def counts(self) -> dict[str, int]:
        """Sessions by state, "hot" and "hibernating"; from any thread."""
        hot = [entry.session.is_hot for entry in list(self._entries.values())]
        return {"hot": sum(hot), "hibernating": len(hot) - sum(hot)}

    @property
    def gate(self) -> Gate:
        """Answers that are given beside a session are counted here, too."""
        return self._gate or Open()

    # On the thread.

    def open(
        self,
        name: str,
        *,
        salt: bytes = b"",
        head: Sequence[Message] = (),
        contexts: dict[str, Sequence[Message]] | None = None,
        options: Options | None = None,
    ) -> Session:
        """The session of this name and owner, whose salt it is; a new one if there is none.

        `head` and further named contexts are those of a new one. Raises Overloaded if there are too many sessions.
        """
        entry = self._entries.get((salt, name))
        if entry is not None:
            return self._use(entry)
        session = self._make(name, salt, secrets.token_hex(_KEY_BYTES), options or Options())
        try:
            for each, messages in {MAIN: head, **(contexts or {})}.items():
                session.add_context(each, messages)
        except RekindleError:
            session.close()  # one context may be read already when the next is refused
            raise
        return self._enter(session)

    def get(self, name: str, *, salt: bytes = b"") -> Session:
        """Raises SessionError if there is none of this name."""
        entry = self._entries.get((salt, name))
        if entry is None:
            raise SessionError(f"there is no session {name!r}")
        return self._use(entry)

    def again(self, session: Session) -> Session:
        """This session, brought back if it made way for another. Raises SessionGone if it can't be, and Overloaded."""
        if not session.is_closed:
            return self.get(session.name, salt=session.salt)
        try:
            return self.resume(session.key, salt=session.salt, name=session.name)
        except SessionError as error:
            raise SessionGone(f"the session {session.name!r} has ended: {error}") from error

    def all(self, *, salt: bytes = b"") -> list[Session]:
        """Of one owner."""
        return [entry.session for (owner, _), entry in self._entries.items() if owner == salt]

    def fork(self, session: Session, name: str) -> Session:
        """A session of this name that goes on from here by itself. Raises SessionError if there is one."""
        self._check_new(session.salt, name)
        new = self._make(name, session.salt, secrets.token_hex(_KEY_BYTES), session.options)
        session.copy_to(new)
        return self._enter(new)

    def pin(self, session: Session, seconds: float) -> None:
        """Keep its KV for so long, and don't let it hibernate meanwhile. Raises InvalidRequest."""
        self._service.pin(session.prompt(), seconds, name=f"session {session.name}")
        session.pinned_until = self._clock() + seconds

    def hibernate(self, session: Session) -> str | None:
        """Let its KV leave the engine; returns the handle to resume it by, None if nothing outlives this process."""
        session.hibernate()
        self._write(session)
        return self.handle(session)

    def handle(self, session: Session) -> str | None:
        """What brings it back after a restart; None where there is no folder to keep it in."""
        return session.key if self._saved.is_kept else None

    def resume(self, handle: str, *, salt: bytes = b"", name: str | None = None) -> Session:
        """A session by its handle: the live one, or as it was written last. Raises SessionError."""
        for (owner, _), entry in self._entries.items():
            if owner == salt and entry.session.key == handle:
                return self._use(entry)
        content = self._saved.read(salt, handle)
        try:
            name, active, options = name or content["name"], content["active"], _options(content["options"])
            contexts = [self._context(each, salt) for each in content["contexts"]]
        except (KeyError, TypeError) as error:  # another build's, which has not said so
            raise unreadable(error) from error
        self._check_new(salt, name)
        session = self._make(name, salt, handle, options)
        for context in contexts:
            session.adopt(context)
        session.active = active
        self._enter(session)
        session.wake()
        return session

    def end(self, session: Session) -> None:
        """Close it and forget its file; what the store has of it goes when its turn comes."""
        session.close()
        self._entries.pop((session.salt, session.name), None)
        try:
            self._saved.delete(session.salt, session.key)
        except OSError as error:  # it goes when it is too old, if it can be deleted then
            _log.warning("the file of session %s could not be deleted: %s", session.name, error)

    def tick(self) -> None:
        """Let those hibernate that nobody has used for a while, and delete files that nobody has for long."""
        now = self._clock()
        if now >= self._prune_at:
            self._prune_at = now + PRUNE_SECONDS
            self._prune()
        for entry in self._entries.values():
            session = entry.session
            if session.state == "answering":
                entry.used = now
            elif (
                session.is_hot
                and now - entry.used >= self._settings.session_idle_seconds
                and now >= session.pinned_until
            ):
                self.hibernate(session)

    # Underneath.

    def _use(self, entry: _Entry) -> Session:
        entry.used = self._clock()
        return entry.session

    def _make(self, name: str, salt: bytes, key: str, options: Options) -> Session:
        """A new one. Raises Overloaded if there will be no room for it, before it reads anything."""
        self._idlest(salt)
        post, gate = self._inbox.put, self._gate
        return Session(self._service, post, self._later, key=key, name=name, salt=salt, options=options, gate=gate)

    def _later(self, seconds: float, command: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), command))

    def _check_new(self, salt: bytes, name: str) -> None:
        if (salt, name) in self._entries:
            raise SessionError(f"there is a session {name!r} already")

    def _enter(self, session: Session) -> Session:
        idlest = self._idlest(session.salt)
        if idlest is not None:
            self._write(idlest)
            idlest.close()
            del self._entries[idlest.salt, idlest.name]
        self._entries[session.salt, session.name] = _Entry(session, self._clock())
        session.changed = lambda: self._write(session)
        self._write(session)
        self._prune(session.salt)
        return session

    def _prune(self, owner: bytes | None = None) -> None:
        """Delete saved sessions that are too old or too many, but none that is open here."""
        self._saved.prune(((entry.session.salt, entry.session.key) for entry in self._entries.values()), owner)

    def _idlest(self, comer: bytes) -> Session | None:
        """The session that makes way for another of this owner; None if there is room. Raises Overloaded.

        It is one of whoever has most, the comer included: so nobody loses one for another who has fewer.
        """
        if len(self._entries) < self._settings.max_sessions:
            return None
        owners = Counter(salt for salt, _ in self._entries) + Counter([comer])
        most = max(owners.values())
        idle = [each for each in self._entries.values() if owners[each.session.salt] == most]
        idle = [each for each in idle if not each.session.num_listeners]
        if not idle:
            limit = self._settings.max_sessions
            raise Overloaded(f"there are {len(self._entries)} sessions, the limit is {limit}; try again later")
        return min(idle, key=lambda entry: (entry.session.salt != comer, entry.used)).session

    def _write(self, session: Session) -> None:
        """A session that can't be written goes on, and is lost with the process."""
        content: dict[str, Any] = {
            "name": session.name,
            "options": asdict(session.options),
            "active": session.active,
            "contexts": [_as_dict(context) for context in session.contexts.values()],
        }
        try:
            self._saved.write(session.salt, session.key, content)
        except OSError as error:
            _log.warning("session %s could not be written: %s", session.name, error)

    def _context(self, content: dict[str, Any], salt: bytes) -> Context:
        model, head = self._service.model, tuple(content["head"])
        assert model.template is not None
        context = Context.new(content["name"], head, Script(model.template, model.tokenizer, head), salt)
        context.salt = salt + bytes.fromhex(content["private_salt"])
        context.turns = [Turn.of(turn) for turn in content["turns"]]
        context.open = None if content["open"] is None else Turn.of(content["open"])
        context.draft, context.forgotten = content["draft"], content["forgotten"]
        return context

    def _main(self) -> None:
        self._tick_again()
        while True:
            while self._timers[0][0] <= time.monotonic():
                self._do(heapq.heappop(self._timers)[-1])
            try:
                command = self._inbox.get(timeout=max(0.0, self._timers[0][0] - time.monotonic()))
            except queue.Empty:
                continue
            if command is None:
                break
            self._do(command)
        self._end()

    def _tick_again(self) -> None:
        self._later(TICK_SECONDS, self._tick_again)  # there is always a timer
        self.tick()

    def _do(self, command: Callable[[], None]) -> None:
        try:
            command()
        except RekindleError as error:  # of what happens by itself; commands tell their caller
            _log.warning("a session could not go on: %s", error)
        except Exception:
            _log.exception("something went wrong in a session")

    def _end(self) -> None:
        for entry in self._entries.values():
            self._do(entry.session.close)
            self._do(lambda session=entry.session: self._write(session))  # type: ignore[misc]
        self._entries.clear()
        with self._lock:
            self._ended = True
        while not self._inbox.empty():
            command = self._inbox.get()
            if command is not None:
                self._do(command)


def _options(content: dict[str, Any]) -> Options:
    sampling = content["sampling"]
    bias = {int(token): value for token, value in sampling["logit_bias"].items()}
    return Options(**content | {"sampling": Sampling(**sampling | {"logit_bias": bias})})


def _as_dict(context: Context) -> dict[str, Any]:
    """An answer under way is not written: its message is, and may be answered again."""
    opened = None if context.open is None else context.open.as_dict | {"answer": [], "text": ""}
    return {
        "name": context.name,
        "head": list(context.head),
        "private_salt": context.salt[len(context.base_salt) :].hex(),
        "turns": [turn.as_dict for turn in context.turns],
        "open": opened,
        "draft": context.draft,
        "forgotten": context.forgotten,
    }
