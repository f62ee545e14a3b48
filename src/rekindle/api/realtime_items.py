"""A conversation as OpenAI's list of items, and as what a session knows: a head, turns and a message that waits.

    system, assistant ... | user, user, assistant | user, assistant, assistant | user
    '------ head -------' '------- turn --------' '--------- turn ----------' 'pending'

What stands before the first user message belongs to the head. Messages of one role that follow each other are one message
with a line for each. Chat templates have no place for instructions amid the turns, so those are refused there.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rekindle.errors import InvalidRequest
from rekindle.model.chunks import Chunk, Part, content_of, plain
from rekindle.serve.sessions.context import Context, Exchange, Turn

Role = Literal["system", "user", "assistant"]
Status = Literal["in_progress", "completed", "incomplete"]


@dataclass(eq=False)
class Item:
    """One message."""

    role: Role
    text: str
    id: str = field(default_factory=lambda: f"item_{secrets.token_hex(8)}")
    status: Status = "completed"
    turn: int = 0  # the number of the session's turn that it is part of; 0: of the head
    parts: Sequence[Part] = ()  # as they came, if they did

    def is_same(self, other: Item) -> bool:
        """Whether both show the same message, under whatever ids."""
        return (self.role, self.text, self.turn) == (other.role, other.text, other.turn)

    @property
    def content(self) -> str | list[Part]:
        """For chat templates: the text, or its parts if there is a chunk among them."""
        return content_of(self.parts) if self.is_marked else self.text

    @property
    def is_marked(self) -> bool:
        """Whether a part of it is a chunk, and it was not cut since it came."""
        return any(isinstance(part, Chunk) for part in self.parts) and plain(self.parts) == self.text

    @property
    def as_dict(self) -> dict[str, Any]:
        kind = "output_text" if self.role == "assistant" else "input_text"
        content = [{"type": kind, "text": self.text}] if self.text or self.role != "assistant" else []
        if self.is_marked:
            content = [
                {"type": kind, "text": part}
                if isinstance(part, str)
                else {"type": kind, "text": part.text, "cache": "chunk"}
                for part in self.parts
            ]
        return {
            "id": self.id,
            "object": "realtime.item",
            "type": "message",
            "status": self.status,
            "role": self.role,
            "content": content,
        }


@dataclass(frozen=True)
class Grouped:
    """Items by what they are to the session; together they are all items, in order."""

    head: list[Item]
    turns: list[list[Item]]  # of each, the user's messages and then the assistant's
    pending: list[Item]  # the user's


def group(items: Sequence[Item]) -> Grouped:
    """See the module's docstring. Raises InvalidRequest for instructions amid the turns."""
    first = next((index for index, item in enumerate(items) if item.role == "user"), len(items))
    turns: list[list[Item]] = []
    for item in items[first:]:
        if item.role == "system":
            raise InvalidRequest(
                "a system message can only stand before the first user message; "
                "change the session's instructions, or swap the context",
                param="item.role",
            )
        if not turns or (item.role == "user" and turns[-1][-1].role == "assistant"):
            turns.append([])
        turns[-1].append(item)
    pending = turns.pop() if turns and turns[-1][-1].role == "user" else []
    return Grouped(list(items[:first]), turns, pending)


def words_of(items: Sequence[Item], role: Role) -> str:
    """All that one side says in a turn."""
    return "\n".join(item.text for item in items if item.role == role)


def exchange_of(items: Sequence[Item], turns: Sequence[Turn]) -> Exchange:
    """A turn as a session takes it; with the tokens that were generated, where they are known."""
    text = words_of(items, "assistant")
    known = next((turn for turn in turns if turn.number == items[-1].turn and turn.text == text), None)
    return Exchange(words_of(items, "user"), text, None if known is None else tuple(known.answer))


def items_of(context: Context) -> list[Item]:
    """The items of a conversation that began elsewhere; its instructions are none."""
    head = context.head[1:] if context.head and context.head[0]["role"] == "system" else context.head
    items = [Item(_role(message["role"]), message["content"]) for message in head]
    for turn in context.turns:
        items.append(Item("user", turn.user, turn=turn.number))
        items.append(Item("assistant", turn.text, turn=turn.number))
    if context.open is not None:
        items.append(Item("user", context.open.user, turn=context.open.number))
    return items


def _role(name: str) -> Role:
    return "user" if name == "user" else "assistant" if name == "assistant" else "system"
