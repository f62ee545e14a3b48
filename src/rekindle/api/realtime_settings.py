"""A realtime session's settings: OpenAI's session object, and what of it a live session knows.

truncation "auto"               the window as the server has it
truncation "disabled"           nothing is forgotten; what does not fit is refused
truncation retention_ratio r    of the tokens behind the instructions, r are left when the oldest turns go; they are
   token_limits.post_instructions N at most, or what the server's window leaves
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rekindle.api.realtime_wire import ResponseIn, RetentionRatio, SessionIn
from rekindle.api.wire import RekindleOptions
from rekindle.serve.request import Sampling
from rekindle.serve.sessions.options import Options
from rekindle.serve.sessions.session import Session

_MOST_KEPT = 0.95  # of a window: more would slide all the time


@dataclass(frozen=True)
class RealtimeSettings:
    """As a client has set them."""

    usual: Options  # of the session, before any client changed them
    max_output_tokens: int | None = None
    truncation: str | RetentionRatio = "auto"
    rekindle: RekindleOptions | None = None  # of answers that don't say

    def changed(self, given: SessionIn) -> RealtimeSettings:
        """With what was given in place of what was."""
        fields, new = given.model_fields_set, self
        if "max_output_tokens" in fields:
            new = replace(new, max_output_tokens=number_of(given.max_output_tokens))
        if "truncation" in fields:
            new = replace(new, truncation=given.truncation or "auto")
        if "rekindle" in fields:
            new = replace(new, rekindle=given.rekindle)
        return replace(new, usual=replace(new.usual, sampling=sampled(new.usual.sampling, given)))

    def options(self, session: Session) -> Options:
        """What the session is to do, with its present head."""
        usual, truncation = self.usual, self.truncation
        if truncation == "disabled":
            return replace(usual, policy="refuse")
        if not isinstance(truncation, RetentionRatio):
            return usual
        head = len(session.context.script.opening)
        limits = truncation.token_limits
        limit = None if limits is None else limits.post_instructions
        window = usual.window if limit is None else head + limit
        size = window or session.window
        kept = head + truncation.retention_ratio * max(0, size - head)
        return replace(usual, window=window, retention=max(0.01, min(_MOST_KEPT, kept / size)))

    def as_dict(self, session: Session, instructions: str) -> dict[str, Any]:
        """OpenAI's session object, but for its names, and what is told of its state in `rekindle`."""
        sampling, truncation = session.options.sampling, self.truncation
        return {
            "type": "realtime",
            "object": "realtime.session",
            "output_modalities": ["text"],
            "instructions": instructions,
            "tools": [],
            "tool_choice": "auto",
            "max_output_tokens": self.max_output_tokens or "inf",
            "truncation": truncation if isinstance(truncation, str) else truncation.model_dump(exclude_none=True),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "prompt": None,
            "tracing": None,
            "audio": None,
            "include": None,
            "rekindle": {} if self.rekindle is None else self.rekindle.as_dict,
        }


def settings_of(session: Session) -> RealtimeSettings:
    """Of a session that may have been opened elsewhere."""
    truncation = "disabled" if session.options.policy == "refuse" else "auto"
    return RealtimeSettings(session.options, truncation=truncation)


def number_of(given: int | str | None) -> int | None:
    """A limit; None if there is none."""
    return given if isinstance(given, int) else None


def sampled(usual: Sampling, given: SessionIn | ResponseIn) -> Sampling:
    """How to sample, with what was given in place of what is usual."""
    names = given.model_fields_set & {"temperature", "top_p", "seed"}
    chosen = {name: getattr(given, name) for name in names}
    return replace(
        usual, **{name: getattr(Sampling(), name) if value is None else value for name, value in chosen.items()}
    )
