"""What clients of the realtime API want done to a conversation.

What changes it waits while an answer is under way, and is done, in order, at its end; the draft grows meanwhile, and an
answer can be cancelled or cut at any time. A client hears of what went wrong with its own events, by their ids.

Belongs to the sessions' thread.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from rekindle.api import realtime_wire as wire
from rekindle.api.live_wire import head_of
from rekindle.api.openai import check_model
from rekindle.api.realtime_aside import Aside, messages_of
from rekindle.api.realtime_items import Item
from rekindle.api.realtime_response import Response
from rekindle.api.realtime_settings import number_of, sampled
from rekindle.api.realtime_talk import Conversation, Event, Sink
from rekindle.api.refusals import refusal_of
from rekindle.errors import InvalidRequest, Overloaded, RekindleError, SessionError
from rekindle.reuse.prompt import Prompt
from rekindle.serve.marked import Wish
from rekindle.serve.request import Generation
from rekindle.serve.service import Service
from rekindle.serve.sessions.session import Session
from rekindle.serve.sessions.sessions import Sessions

MAX_WAITING = 64  # events of clients
_DRAFTING = (wire.BufferAppend, wire.BufferReplace, wire.BufferClear)
MAX_ASIDES = 8  # answers beside the conversation at a time
ROOT = "root"


class ActiveResponse(SessionError):
    """An answer is being generated already."""

    code = "conversation_already_has_active_response"


class NoActiveResponse(SessionError):
    """There is nothing to cancel."""

    code = "response_cancel_not_active"


class UnknownItem(InvalidRequest):
    """The conversation has no such item."""

    code = "item_not_found"

    def __init__(self, item_id: str, param: str = "item_id") -> None:
        super().__init__(f"there is no item {item_id[:80]!r} in this conversation; it may be forgotten", param=param)


class Commands:
    """What can be done to one conversation."""

    def __init__(self, service: Service, sessions: Sessions, session: Session, *, is_private: bool) -> None:
        """Private ones are nobody's but the client's for whom they were opened, and can be let go when it has gone."""
        self.conversation = Conversation(session, self._kick)
        self.is_private = is_private
        self.is_new = False  # nobody has heard of it yet
        self._service, self._sessions, self._session = service, sessions, session
        self._waiting: deque[tuple[wire.Incoming, Sink]] = deque()
        self._asides: dict[str, Aside] = {}

    @property
    def settings(self) -> Event:
        """OpenAI's session object."""
        conversation, session = self.conversation, self._session
        ours = {
            "session": session.name,
            "handle": self._sessions.handle(session),
            "context": session.active,
            "contexts": list(session.contexts),
            "conversation_id": conversation.id,
            "state": session.state,
            "tokens": session.context.num_tokens,
            "window": session.window,
            "policy": session.policy,
            "last_event_id": conversation.last_event_id,
        }
        shown = conversation.settings.as_dict(session, conversation.instructions)
        ours |= shown["rekindle"]
        return shown | {"id": session.name, "model": self._service.model_name, "rekindle": ours}

    def obey(self, event: wire.Incoming, sink: Sink) -> None:
        """Do this now, or at the end of the answer. Raises RekindleError."""
        self._do_waiting()
        if not self._must_wait(event):
            self._do(event, sink)
        elif (joined := self._joined(event)) is not None:
            self._waiting[-1] = (joined, sink)
        elif len(self._waiting) < MAX_WAITING:
            self._waiting.append((event, sink))
        else:
            raise Overloaded(f"{MAX_WAITING} events wait for the end of the answer; cancel it, or wait")

    def _must_wait(self, event: wire.Incoming) -> bool:
        if isinstance(event, _DRAFTING):  # what is committed is what was in the buffer when that was said
            return any(isinstance(each, wire.BufferCommit) for each, _ in self._waiting)
        return event.waits and (self._is_busy or bool(self._waiting))

    def _joined(self, event: wire.Incoming) -> wire.Incoming | None:
        """One event that does what the last that waits and this would: words that come one by one are many."""
        last = self._waiting[-1][0] if self._waiting else None
        if not isinstance(last, wire.BufferAppend | wire.BufferReplace):
            return None
        if isinstance(event, wire.BufferAppend):
            return last.model_copy(update={"text": last.text + event.text, "event_id": event.event_id})
        return event if isinstance(event, wire.BufferReplace) else None

    def close(self) -> None:
        """Nobody waits for what is under way."""
        for aside in list(self._asides.values()):
            aside.cancel()

    @property
    def is_needed(self) -> bool:
        """Whether an answer is under way, or something waits for its end."""
        return self._session.state == "answering" or bool(self._asides or self._waiting)

    @property
    def _is_busy(self) -> bool:
        return self._session.state == "answering" or any(aside.is_adopted for aside in self._asides.values())

    def _kick(self) -> None:
        if self._waiting:
            self._sessions.call(self._do_waiting)

    def _do_waiting(self) -> None:
        while self._waiting and not self._is_busy:
            event, sink = self._waiting.popleft()
            try:
                if self._session.is_closed:
                    raise SessionError("the session has ended; connect again")
                self._do(event, sink)
            except RekindleError as error:
                sink(self.conversation.stamped(error_event(error, event.event_id)))

    def _do(self, event: wire.Incoming, sink: Sink) -> None:
        session = self._session
        match event:
            case wire.SessionUpdate():
                self._update(event.session)
            case wire.ItemCreate():
                self._create(event)
            case wire.ItemDelete():
                item = self._item(event.item_id)
                with self.conversation.amended([each for each in self.conversation.items if each is not item]):
                    self.conversation.emit({"type": "conversation.item.deleted", "item_id": item.id})
            case wire.ItemTruncate():
                self._truncate(event)
            case wire.ItemRetrieve():
                item = self._item(event.item_id)
                sink(self.conversation.stamped({"type": "conversation.item.retrieved", "item": item.as_dict}))
            case wire.ResponseCreate():
                self._respond(event.response)
            case wire.ResponseCancel():
                self._cancel(event.response_id)
            case wire.BufferAppend():
                session.append(event.text)
            case wire.BufferReplace():
                session.replace(event.text)
            case wire.BufferCommit():
                self._commit_buffer(event)
            case wire.BufferClear():
                session.replace("")
                self.conversation.emit({"type": "input_text_buffer.cleared"})
            case _:
                self._do_ours(event, sink)

    def _do_ours(self, event: wire.Incoming, sink: Sink) -> None:
        session = self._session
        match event:
            case wire.ContextCreate():
                session.add_context(event.context, head_of(event.instructions))
                created = {"context": event.context, "contexts": list(session.contexts)}
                self.conversation.emit({"type": "rekindle.context.created"} | created)
            case wire.ContextSwap():
                if event.instructions is not None and event.context not in session.contexts:
                    session.add_context(event.context, head_of(event.instructions))
                session.swap(event.context)
            case wire.SessionFork():
                name = event.session or f"{session.name[:40]}-{Item('user', '').id.removeprefix('item_')}"
                fork = self._sessions.fork(session, name)
                told = {"session": fork.name, "handle": self._sessions.handle(fork)}
                sink(self.conversation.stamped({"type": "rekindle.session.forked"} | told))
            case wire.SessionPin():
                self._sessions.pin(session, event.ttl)
                self.conversation.emit({"type": "rekindle.session.pinned", "expires_in_seconds": event.ttl})

    # Settings.

    def _update(self, given: wire.SessionIn) -> None:
        check_model(self._service, given.model)
        self._check_blend(None if given.rekindle is None else given.rekindle.blend_wish)
        conversation = self.conversation
        before, words = conversation.settings, conversation.instructions
        conversation.settings = before.changed(given)
        try:
            self._apply(given.instructions or "" if "instructions" in given.model_fields_set else words)
        except RekindleError:
            conversation.settings = before
            self._apply(words)
            raise
        conversation.emit({"type": "session.updated", "session": self.settings})

    def _apply(self, instructions: str) -> None:
        """Instructions first, in the widest window: how wide it is to be may depend on them."""
        conversation, session = self.conversation, self._session
        if instructions != conversation.instructions:
            session.configure(conversation.settings.usual)
            with conversation.amended(list(conversation.items), instructions):
                pass
        session.configure(conversation.settings.options(session))

    # Items.

    def _item(self, item_id: str, param: str = "item_id") -> Item:
        found = next((item for item in self.conversation.items if item.id == item_id), None)
        if found is None:
            raise UnknownItem(item_id, param)
        return found

    def _new(self, given: wire.ItemIn) -> Item:
        item = _item_of(given)
        if given.id is not None:
            self._check_new(given.id)
            item.id = given.id
        return item

    def _check_new(self, item_id: str) -> None:
        if any(item.id == item_id for item in self.conversation.items):
            raise InvalidRequest(f"there is an item {item_id[:80]!r} already", param="item.id")

    def _create(self, event: wire.ItemCreate) -> None:
        items, item, previous = self.conversation.items, self._new(event.item), event.previous_item_id
        index = len(items)
        if previous is not None:
            index = 0 if previous == ROOT else items.index(self._item(previous, "previous_item_id")) + 1
        if item.role == "user" and index == len(items):
            draft = self._session.context.draft
            self._commit(item, item.text)
            if draft:
                self._session.replace(draft)
            return
        with self.conversation.amended([*items[:index], item, *items[index:]]):
            self.conversation.tell_item(item)

    def _commit_buffer(self, event: wire.BufferCommit) -> None:
        if not self._session.context.draft.strip():  # also where a message waits that would take it as a part of itself
            raise InvalidRequest("the buffer is empty: append text before it is committed", param="text")
        item = Item("user", "")
        if event.item_id is not None:
            self._check_new(event.item_id)
            item.id = event.item_id
        self.conversation.is_buffer_coming = True
        try:
            self._commit(item, None)
        finally:
            self.conversation.is_buffer_coming = False

    def _commit(self, item: Item, text: str | None) -> None:
        """The item is told when the session tells of it."""
        self.conversation.coming = item
        try:
            self._session.commit(text, ahead=not item.is_marked)
        finally:
            self.conversation.coming = None

    def _truncate(self, event: wire.ItemTruncate) -> None:
        conversation, session = self.conversation, self._session
        item = self._item(event.item_id)
        if item.role != "assistant":
            raise InvalidRequest("only an assistant's message can be cut", param="item_id")
        characters = 0 if event.characters is None and event.tokens is None else event.characters
        conversation.cut_ms = event.audio_end_ms
        try:
            if self._is_last_answer(item):
                is_answering = session.state == "answering"
                session.interrupt(characters=characters, tokens=event.tokens)
                if is_answering:
                    conversation.tell_cut(item)
            elif self._is_busy:
                raise ActiveResponse("an earlier message can't be cut while an answer is generated; cancel it, or wait")
            elif event.tokens is not None:
                raise InvalidRequest(
                    "tokens: only the last answer can be cut by tokens; use characters", param="tokens"
                )
            else:
                self._cut_earlier(item, characters or 0)
        finally:
            conversation.cut_ms = None

    def _is_last_answer(self, item: Item) -> bool:
        """Whether it is the answer that the session would cut, and all of it."""
        session = self._session
        if session.state == "answering":
            return self.conversation.response is not None and self.conversation.response.item is item
        turns = session.context.turns
        return (
            session.context.open is None
            and bool(turns)
            and (turns[-1].number, turns[-1].text) == (item.turn, item.text)
        )

    def _cut_earlier(self, item: Item, characters: int) -> None:
        before = item.text
        item.text = before[:characters]
        try:
            with self.conversation.amended(list(self.conversation.items)):
                self.conversation.tell_cut(item)
        except RekindleError:
            item.text = before
            raise

    # Answers.

    def _respond(self, given: wire.ResponseIn) -> None:
        check_model(self._service, given.model)
        conversation, session = self.conversation, self._session
        given = given.or_else(conversation.settings.rekindle)
        is_adopted = given.conversation != "none"
        if is_adopted and self._is_busy:
            raise ActiveResponse("an answer is being generated; cancel it, or wait for its end")
        limit = given.max_output_tokens
        max_tokens = conversation.settings.max_output_tokens if limit is None else number_of(limit)
        response = Response(
            conversation.emit,
            conversation_id=conversation.id if is_adopted else None,
            max_output_tokens=max_tokens,
            metadata=given.metadata,
            options=given.rekindle,
        )
        self._check_blend(given.blend_wish)
        is_other = given.instructions not in (None, conversation.instructions)
        is_beside = not is_adopted or given.input is not None or is_other
        if not is_beside and session.context.open is None:
            raise SessionError("there is no user message to answer; create one, or commit the buffer")
        beside = self._beside(given, max_tokens) if is_beside or self._may_blend(given) else None
        if beside is not None and (is_beside or beside.blend is not None):
            self._ask_aside(beside, response, is_adopted)
        else:
            turn = session.answer(max_tokens=max_tokens, sampling=sampled(session.options.sampling, given))
            conversation.answer(response, turn)

    def _ask_aside(self, generation: Generation, response: Response, is_adopted: bool) -> None:
        if len(self._asides) >= MAX_ASIDES:
            raise Overloaded(f"{MAX_ASIDES} answers beside the conversation are under way; wait for one to end")
        gate, owner = self._sessions.gate, self._session.salt
        context = self._session.context
        behind = self.conversation.items[-1] if self.conversation.items else None
        aside = Aside(response, context, behind, gate, owner, is_adopted=is_adopted, ended=self._aside_ended)
        aside.ask(self._service, generation, self._sessions.call)
        self._asides[response.id] = aside
        if is_adopted:
            self.conversation.beside = response
        response.begin(self.conversation.before(None))

    def _check_blend(self, wish: Wish) -> None:
        """What is wrong with it is told whether there are chunks or not. Raises InvalidRequest."""
        if wish not in (None, False):
            self._service.blend_of(wish, self._session.prompt())

    def _may_blend(self, given: wire.ResponseIn) -> bool:
        """Whether chunks are to be placed, if there are any: only beside the session, which is exact."""
        is_wanted = self._service.settings.blend == "marked" if given.blend_wish is None else given.blend_wish
        return is_wanted is not False and any(item.is_marked for item in self.conversation.items)

    def _beside(self, given: wire.ResponseIn, max_tokens: int | None) -> Generation:
        """An answer beside the conversation; if it is asked for nothing else, the conversation's own."""
        conversation, context = self.conversation, self._session.context
        items = [item for item in conversation.items if item.status != "in_progress"]
        if given.input is not None:
            items = [
                self._item(each.id, "input") if isinstance(each, wire.ReferenceIn) else _item_of(each)
                for each in given.input
            ]
        messages = messages_of(conversation.instructions if given.instructions is None else given.instructions, items)
        if not messages:
            raise InvalidRequest("there is nothing to answer: give input or instructions", param="response.input")
        sampling, blend = sampled(self._session.options.sampling, given), None
        is_own = given.input is None and given.instructions is None and context.open is not None
        if is_own and not self._may_blend(given):
            assert context.open is not None
            num_read = context.num_tokens - len(context.open.answer)
            prompt = Prompt(context.tokens[:num_read], salt=context.salt)
        else:
            prompt = self._service.chat_prompt(messages, salt=self._session.salt)
            blend = self._service.blend_of(given.blend_wish, prompt)
        return Generation(prompt=prompt, max_tokens=max_tokens, sampling=sampling, blend=blend)

    def _aside_ended(self, aside: Aside) -> str | None:
        self._asides.pop(aside.response.id, None)
        if aside.is_adopted:
            self.conversation.beside = None
        if not aside.is_adopted or self._session.is_closed:
            return None
        item, conversation = aside.response.item, self.conversation
        item.text = aside.text
        try:
            if aside.context is not self._session.context:
                raise SessionError("the context has been swapped: what was answered in the one before is no part of it")
            if aside.behind is not None and not any(aside.behind.is_same(each) for each in conversation.items):
                raise SessionError("the conversation went back meanwhile: what was answered is no part of it")
            with conversation.amended([*conversation.items, item]):
                pass
        except RekindleError as error:
            conversation.emit(error_event(error, None))
            conversation.remove([item])
            aside.response.leave()
        self._kick()
        return conversation.before(item)

    def _cancel(self, response_id: str | None) -> None:
        current = self.conversation.response
        if response_id is not None and response_id in self._asides:
            self._asides[response_id].cancel()
        elif current is not None and response_id in (None, current.id):
            self._session.interrupt()
        elif response_id is None and (adopted := [each for each in self._asides.values() if each.is_adopted]):
            adopted[0].cancel()
        else:
            raise NoActiveResponse("there is no such answer under way")


def _item_of(given: wire.ItemIn) -> Item:
    return Item(given.role, given.text, parts=given.parts)


def error_event(error: Exception, event_id: str | None) -> dict[str, Any]:
    """OpenAI's event for an error, and whose it was."""
    return {"type": "error", "error": refusal_of(error)[1]["error"] | {"event_id": event_id}}
