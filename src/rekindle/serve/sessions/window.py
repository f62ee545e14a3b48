"""How much a session remembers: its window, and what goes when that is full.

    | head | oldest turns | other turns | message | room for an answer |
           '---- go ------'---- slide down, or are read again

Whole turns go, and so many that it is a while until the next time: what is left, with what is to come, is `retention` of
the window.
"""

from __future__ import annotations

from dataclasses import dataclass

from rekindle.errors import SessionError
from rekindle.serve.service import Service
from rekindle.serve.sessions.context import Context
from rekindle.serve.sessions.options import Options, WindowPolicy

_UNSLIDABLE = ("q4_0",)  # K cells whose rotation loses too much: 0.14 at the largest after one shift
_MOST_ANSWER = 512


@dataclass(frozen=True)
class Move:
    """What a window has lost."""

    first_turn: int
    last_turn: int
    tokens: int
    policy: WindowPolicy


class Window:
    """The window of one session."""

    def __init__(self, service: Service, options: Options) -> None:
        self.size = min(options.window or service.max_tokens, service.max_tokens - 1)  # tokens
        self.answer_tokens = options.answer_tokens or max(1, min(_MOST_ANSWER, self.size // 8))
        self._retention = options.retention or service.settings.session_retention
        self._asked = options.policy or service.settings.session_policy
        self._service = service

    @property
    def policy(self) -> WindowPolicy:
        """As asked, or what this model allows."""
        spec = self._service.engine_spec
        if self._asked == "slide" and (not spec.can_shift or spec.kv_type in _UNSLIDABLE):
            return "rebuild"
        return self._asked

    def fit(self, context: Context, extra: int, *, is_read: bool = True) -> Move | None:
        """Make room for so many more tokens; None if there is. What was never read can't slide.

        Raises SessionError, and then nothing has changed.
        """
        length = context.num_tokens
        if length + extra <= self.size:
            return None
        if self.policy == "refuse":
            raise SessionError(
                f"the window of {self.size} tokens is full: {length} are used and {extra} needed; rewind or reset"
            )
        gone = context.oldest(length + extra - int(self._retention * self.size))
        count = context.length_of(gone)
        if length - count + extra > self.size:
            raise SessionError(
                f"head and message need {length - count + extra} tokens with room for an answer; "
                f"the window has {self.size}; say less, rewind, or widen it"
            )
        policy = self.policy if is_read else "rebuild"
        move = Move(gone[0].number, gone[-1].number, count, policy)
        if policy == "slide":
            settings = self._service.settings
            context.slide(gone, most_slides=settings.session_slides, block_tokens=settings.block_tokens)
        else:
            context.forget(gone)
        return move
