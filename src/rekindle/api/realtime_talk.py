"""A session's conversation as the realtime API shows it.

Whatever happens to the session is heard from the session itself and told as OpenAI's events, whoever caused it: clients of
the simple sockets and of the realtime API may take part in one conversation.

Events are numbered, and the latest are remembered: who comes back with the id of its last one is told what it has missed.
While nobody listens the session is let alone, and caught up with from its own news later. Where either does not reach back
far enough, the conversation is begun anew from what the session knows, under other ids, and the client is told that too.

Belongs to the sessions' thread.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from rekindle.api.realtime_items import Item, exchange_of, group, items_of, words_of
from rekindle.api.realtime_response import Cost, Response
from rekindle.api.realtime_settings import RealtimeSettings, settings_of
from rekindle.errors import RekindleError
from rekindle.serve.request import Done
from rekindle.serve.sessions.context import Context
from rekindle.serve.sessions.news import End, Failure, News, Spent, System, Token, UserInput
from rekindle.serve.sessions.session import Session

Event = dict[str, Any]
Sink = Callable[[Event], None]  # must not block
REMEMBERED_EVENTS = 1024


@dataclass(eq=False)
class _Shown:
    """One context as items."""

    context: Context
    items: list[Item]
    instructions: str
    id: str = field(default_factory=lambda: f"conv_{secrets.token_hex(8)}")

    @classmethod
    def of(cls, context: Context) -> Self:
        """As it is now."""
        first = context.head[0] if context.head else {"role": "", "content": ""}
        return cls(context, items_of(context), first["content"] if first["role"] == "system" else "")


class Conversation:
    """See the module's docstring."""

    def __init__(self, session: Session, answered: Callable[[], None]) -> None:
        """`answered` is called whenever an answer is over, while the session is still busy with it."""
        self.session = session
        self.settings: RealtimeSettings = settings_of(session)
        self.left_at = time.monotonic()  # when the last client went
        self.beside: Response | None = None  # under way beside the session, to be part of the conversation
        self._answered = answered
        self._sinks: list[Sink] = []
        self._is_listening = False
        self._begin()

    def _begin(self) -> None:
        """From what the session knows now."""
        session = self.session
        self._epoch = secrets.token_hex(4)
        self._num_events = 0
        self._events: deque[tuple[int, Event]] = deque(maxlen=REMEMBERED_EVENTS)
        self._shown = {session.active: _Shown.of(session.context)}  # by the context's name
        self.coming: Item | None = None  # what is being committed, if it is a client's own
        self.is_buffer_coming = False
        self.cut_ms: int | None = None  # what a client that cuts an answer has said of it
        self.response: Response | None = None  # under way
        self._interrupted: dict[int, Response] = {}  # whose cost is not known yet, by turn
        self._work = session.work
        self._dropped = 0
        self._is_amending = False
        self._heard_meanwhile: list[News] = []
        self._heard = int(session.status["last_event"])
        if session.state == "answering" and session.context.open is not None:
            self._answer_elsewhere(session.context.open.number, session.context.open.text)

    # What it is.

    @property
    def _active(self) -> _Shown:
        context = self.session.context
        shown = self._shown.get(context.name)
        if shown is None or shown.context is not context:  # there was none, or another in its place
            shown = self._shown[context.name] = _Shown.of(context)
        return shown

    @property
    def items(self) -> list[Item]:
        """Of the active context."""
        return self._active.items

    @property
    def id(self) -> str:
        return self._active.id

    @property
    def instructions(self) -> str:
        """Of the active context."""
        return self._active.instructions

    @property
    def last_event_id(self) -> str:
        return f"event_{self._epoch}_{self._num_events}"

    @property
    def is_heard(self) -> bool:
        """Whether anybody is here."""
        return bool(self._sinks)

    def before(self, item: Item | None) -> str | None:
        """The id of the item that stands before this one, or of the last."""
        items = self.items
        index = len(items) if item is None or item not in items else items.index(item)
        return items[index - 1].id if index else None

    # Clients.

    def wake(self) -> None:
        """Know what has happened while nobody was here."""
        if not self._is_listening:
            self._catch_up()
            self.session.listen(self._hear)
            self._is_listening = True

    def attach(self, sink: Sink) -> None:
        """Tell this client what happens from now on. It is awake."""
        self._sinks.append(sink)

    def detach(self, sink: Sink) -> None:
        """It has gone."""
        if sink in self._sinks:
            self._sinks.remove(sink)
        if not self._sinks:
            self.left_at = time.monotonic()
            if self.session.state != "answering":
                self._stop_listening()

    def missed(self, last_event_id: str) -> list[Event] | None:
        """What has happened after this event; None if that is not known any more."""
        head, _, number = last_event_id.rpartition("_")
        if head != f"event_{self._epoch}" or not number.isdecimal() or len(number) > 15:
            return None
        last, oldest = int(number), self._events[0][0] if self._events else self._num_events + 1
        if last > self._num_events or (last + 1 < oldest and len(self._events) == REMEMBERED_EVENTS):
            return None
        return [event for number, event in self._events if number > last]

    def emit(self, event: Event) -> None:
        """Tell everybody, and remember it."""
        event = self.stamped(event)
        self._events.append((self._num_events, event))
        for sink in list(self._sinks):
            sink(event)

    def stamped(self, event: Event) -> Event:
        """An event with its id."""
        self._num_events += 1
        return {"type": event["type"], "event_id": self.last_event_id} | event

    def _stop_listening(self) -> None:
        if self._is_listening:
            self.session.leave(self._hear)
            self._is_listening = False

    def _catch_up(self) -> None:
        """Hear what has happened while nobody was here, or begin anew."""
        missed: list[tuple[int, News]] = []

        def listener(number: int, news: News) -> None:
            missed.append((number, news))

        self.session.listen(listener, after=self._heard)
        self.session.leave(listener)
        shown, context = self._shown.get(self.session.active), self.session.context
        is_same = shown is not None and shown.context is context
        is_whole = not missed or missed[0][0] == self._heard + 1
        if is_same and is_whole and not any(_is_elsewhere(news) for _, news in missed):
            for number, news in missed:
                self._hear(number, news)
        else:
            self._begin()

    # Changes.

    @contextmanager
    def amended(self, items: Sequence[Item], instructions: str | None = None) -> Iterator[None]:
        """The conversation was this all along. What the body emits comes before the news of it. Raises RekindleError."""
        grouped, context, before = group(items), self.session.context, list(self.items)
        numbers = [(item, item.turn) for item in {*before, *items}]
        turns = [exchange_of(turn, context.turns) for turn in grouped.turns]
        pending = words_of(grouped.pending, "user") if grouped.pending else None
        words = self.instructions if instructions is None else instructions
        head = [{"role": "system", "content": words}] if words.strip() else []
        head += [{"role": item.role, "content": item.text} for item in grouped.head]
        for number, turn in enumerate([*grouped.turns, grouped.pending], context.forgotten + 1):
            for item in turn:
                item.turn = number
        self._is_amending = True
        try:
            self.session.amend(turns, pending=pending, head=head)
        except RekindleError:
            for item, number in numbers:
                item.turn = number
            raise
        finally:
            self._is_amending = False
            heard = [news for news in self._heard_meanwhile if not _is_amendment(news)]
            self._heard_meanwhile = []
        for item in grouped.head:
            item.turn = 0
        self._active.instructions, self.items[:] = words, items
        yield
        for news in heard:
            self._take(news)

    def answer(self, response: Response, turn: int) -> None:
        """The session was asked for this one."""
        self.response = response
        response.item.turn = turn
        previous = self.before(None)
        self.items.append(response.item)
        response.begin(previous)

    def _answer_elsewhere(self, turn: int, text: str) -> Response:
        """Somebody else has asked for an answer; so much of it is there already."""
        response = Response(self.emit, conversation_id=self.id)
        self.answer(response, turn)
        response.say(text)
        return response

    # News.

    def _hear(self, number: int, news: News) -> None:
        self._heard = number
        if self._is_amending:
            self._heard_meanwhile.append(news)
        else:
            self._take(news)

    def _take(self, news: News) -> None:
        match news:
            case UserInput():
                self._heard_user(news)
            case Token():
                response = self.response or self._answer_elsewhere(news.turn, "")
                response.say(news.text)
            case End():
                self._heard_end(news)
            case Failure():
                self._heard_failure(news)
            case Spent():
                if (interrupted := self._interrupted.pop(news.turn, None)) is not None:
                    interrupted.tell_cost(news.done, self._cost(None))
            case System():
                self._heard_system(news)

    def _heard_user(self, news: UserInput) -> None:
        known = words_of([item for item in self.items if item.turn == news.turn], "user")
        item = self.coming or Item("user", "")
        item.turn, item.text = news.turn, news.text.removeprefix(f"{known}\n") if known else news.text
        previous = self.before(None)
        if self.coming is not None and self.is_buffer_coming:
            self.emit({"type": "input_text_buffer.committed", "previous_item_id": previous, "item_id": item.id})
        self.items.append(item)
        self.tell_item(item)

    def tell_item(self, item: Item) -> None:
        """It is part of the conversation now."""
        event = {"previous_item_id": self.before(item), "item": item.as_dict}
        self.emit({"type": "conversation.item.added"} | event)
        self.emit({"type": "conversation.item.done"} | event)

    def _heard_end(self, news: End) -> None:
        response = self.response or self._answer_elsewhere(news.turn, news.text)
        self.response = None
        cost = self._cost(news.done) if news.done is not None else None
        response.end(news.reason, news.text, previous=self.before(response.item), done=news.done, cost=cost)
        if news.done is None:
            self._interrupted[news.turn] = response
        self._is_over()

    def _heard_failure(self, news: Failure) -> None:
        response, self.response = self.response, None
        if response is not None:
            response.end("", response.item.text, previous=self.before(response.item), error=news.error)
            self.remove([response.item])
        self._is_over()

    def _is_over(self) -> None:
        if not self._sinks:
            self._stop_listening()
        self._answered()

    def _cost(self, own: Done | None) -> Cost:
        """What was done for the session since this was asked last."""
        now = self.session.work
        cost = Cost.between(self._work, now, own, self._dropped)
        self._work, self._dropped = now, 0
        return cost

    def remove(self, gone: Sequence[Item]) -> None:
        """These items are no more."""
        self.items[:] = [item for item in self.items if item not in gone]
        self._tell_gone(gone)

    def _tell_gone(self, gone: Sequence[Item]) -> None:
        for item in gone:
            self.emit({"type": "conversation.item.deleted", "item_id": item.id})

    def _heard_system(self, news: System) -> None:
        match news.kind:
            case "forgotten":
                self._heard_forgotten(news)
            case "reset" | "rewound":
                last_turn = news.detail.get("turn", 0)
                self.remove([item for item in self.items if item.turn > last_turn])
            case "truncated":
                self._heard_cut(news)
            case "swapped" | "replaced":
                self.emit({"type": "rekindle.context.swapped"} | self.shown())
            case "amended":  # by somebody who has no items
                gone, self.items[:] = list(self.items), items_of(self.session.context)
                self._tell_gone(gone)
                for item in list(self.items):
                    self.tell_item(item)
            case _:
                detail = {"kind": news.kind, "message": news.message, "detail": news.detail}
                self.emit({"type": "rekindle.session.notice"} | detail)

    def _heard_forgotten(self, news: System) -> None:
        gone = [item for item in self.items if 1 <= item.turn <= news.detail["last_turn"]]
        self.items[:] = [item for item in self.items if item not in gone]
        self._dropped += news.detail["tokens"]
        self.emit(
            {
                "type": "rekindle.conversation.forgotten",
                "message": news.message,
                "item_ids": [item.id for item in gone],
                "tokens": news.detail["tokens"],
                "policy": news.detail["policy"],
            }
        )

    def _heard_cut(self, news: System) -> None:
        turn, text = news.detail["turn"], news.detail["text"]
        item = next((each for each in reversed(self.items) if each.turn == turn and each.role == "assistant"), None)
        if item is not None:
            item.text = text
            self.tell_cut(item)

    def tell_cut(self, item: Item) -> None:
        """An answer was cut to what was heard of it."""
        cut = {"item_id": item.id, "content_index": 0, "audio_end_ms": self.cut_ms or 0, "text": item.text}
        self.emit({"type": "conversation.item.truncated"} | cut)

    def shown(self) -> Event:
        """The whole conversation, as it is."""
        response = self.response or self.beside
        return {
            "context": self.session.active,
            "conversation_id": self.id,
            "items": [item.as_dict for item in self.items],
            "response": None if response is None else response.as_dict,
        }


def _is_elsewhere(news: News) -> bool:
    """Whether what it is about can only be seen when it happens."""
    return isinstance(news, System) and news.kind in ("swapped", "replaced", "amended")


def _is_amendment(news: News) -> bool:
    return isinstance(news, System) and news.kind == "amended"
