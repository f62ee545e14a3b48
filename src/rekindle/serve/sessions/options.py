"""How a session keeps its past and answers. What a session does not say, the settings say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rekindle.errors import InvalidRequest, check_number
from rekindle.serve.request import Sampling

WindowPolicy = Literal["slide", "rebuild", "refuse"]
POLICIES: tuple[WindowPolicy, ...] = ("slide", "rebuild", "refuse")
MAX_RETENTION = 0.95


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much of the past a session keeps, and how it answers. Raises InvalidRequest for what makes no sense."""

    policy: WindowPolicy | None = None  # what happens when the window is full; default: `session_policy`
    window: int | None = None  # tokens in all; default: the model's context
    answer_tokens: int | None = None  # kept free for an answer; default: an eighth of the window, at most 512
    retention: float | None = None  # how much is left when the oldest turns go; default: `session_retention`
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.policy is not None and self.policy not in POLICIES:
            raise InvalidRequest(f"policy: expected slide, rebuild or refuse, got {self.policy!r}", param="policy")
        if self.retention is not None:
            check_number("retention", self.retention, 0, MAX_RETENTION)
            if not self.retention:
                raise InvalidRequest("retention must be more than 0, got 0", param="retention")
        for name in ("window", "answer_tokens"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 1, whole=True)
