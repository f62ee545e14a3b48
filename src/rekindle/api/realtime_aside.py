"""An answer beside the conversation: to other instructions or another input than the session's.

Its prompt is a whole one, as of a chat completion, so it reuses what is stored of it and disturbs nothing that the session
holds. Only what comes of it may be put into the conversation.

So chunks can be placed in it, which is never done to what a session holds: that goes on and on, and is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rekindle.api.realtime_items import Item
from rekindle.api.realtime_response import Response
from rekindle.errors import RekindleError
from rekindle.model.chunks import Part, content_of
from rekindle.serve.request import Done, Event, Failed, Generation, Piece
from rekindle.serve.service import Service, Ticket
from rekindle.serve.sessions.context import Context
from rekindle.serve.sessions.gate import Gate


def messages_of(instructions: str, items: Sequence[Item]) -> list[dict[str, Any]]:
    """As chat templates know them: messages of one role that follow each other are one."""
    said: list[tuple[str, list[Part]]] = [("system", [instructions])] if instructions.strip() else []
    for item in items:
        content = item.content
        parts = [content] if isinstance(content, str) else content
        if said and said[-1][0] == item.role:
            said[-1][1].extend(parts)
        else:
            said.append((item.role, [*parts]))
    return [{"role": role, "content": content_of(parts)} for role, parts in said]


class Aside:
    """One such answer. Belongs to the sessions' thread."""

    def __init__(
        self,
        response: Response,
        context: Context,
        behind: Item | None,
        gate: Gate,
        owner: bytes,
        *,
        is_adopted: bool,
        ended: Callable[[Aside], str | None],
    ) -> None:
        """`ended` is called before the response is told to be done, and gives the id of the item before it.

        Adopted ones become part of the conversation, if the context is still the same and `behind`, its last item when
        this was asked, is still there. `gate` counts it among the answers of its owner, whose salt it is.
        """
        self.response, self.context, self.behind = response, context, behind
        self._gate, self._owner = gate, owner
        self.is_adopted = is_adopted
        self.text = ""
        self._ended = ended
        self._ticket: Ticket | None = None

    def ask(
        self,
        service: Service,
        generation: Generation,
        post: Callable[[Callable[[], None]], object],  # do this on the sessions' thread
    ) -> None:
        """Raises what `submit` raises, and Overloaded if its owner has too many.

        The worker's events come back by way of `post`.
        """

        def hand_over(event: Event) -> None:
            post(lambda: self._hear(event))

        self._gate.enter(self._owner)
        try:
            self._ticket = service.submit(generation, hand_over)
        except RekindleError:
            self._gate.leave(self._owner, None)
            raise

    def cancel(self) -> None:
        """Its end comes in a moment, with what there is of it."""
        if self._ticket is not None:
            self._ticket.cancel()

    def _hear(self, event: Event) -> None:
        if isinstance(event, Piece):
            self.text += event.text
            self.response.say(event.text)
        elif isinstance(event, Done):
            self.text = event.text
            self._end("interrupted" if event.reason == "cancelled" else event.reason, event, None)
        elif isinstance(event, Failed):
            self._end("", None, event.error)

    def _end(self, reason: str, done: Done | None, error: RekindleError | None) -> None:
        self._gate.leave(self._owner, None if done is None else done.timings.total_ms / 1000)
        previous = self._ended(self)
        self.response.end(reason, self.text, previous=previous, done=done, error=error)
