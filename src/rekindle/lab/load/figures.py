"""From answers to figures, and from the figures of two servers to ratios."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from rekindle.lab.load.client import Answer

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What a workload measured besides the usual, and what may be expected of it."""

    name: str  # with its unit at the end
    value: float
    expected: float | None = None  # by physics or by counting
    why: str = ""  # where the expectation comes from


@dataclass(frozen=True, kw_only=True)
class Run:
    """One arm of one round: all requests of a workload on one server."""

    server: str
    round: int  # from 0
    seconds: float
    answers: tuple[Answer, ...]
    skipped: int  # requests never sent, because the one before them failed
    figures: tuple[Figure, ...] = ()
    cpu_seconds: float | None = None  # processor time of the server, if it was started here
    fixes_length: bool = True  # whether the server was told to ignore the end of a turn

    @property
    def whole(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.error is None]

    @property
    def errors(self) -> Counter[str]:
        """How often each."""
        return Counter(answer.error for answer in self.answers if answer.error is not None)

    @property
    def prompt_tokens(self) -> int | None:
        return _sum(answer.prompt_tokens for answer in self.whole)

    @property
    def cached_tokens(self) -> int | None:
        return _sum(answer.cached_tokens for answer in self.whole)

    @property
    def computed_tokens(self) -> int | None:
        """Of prompts; None if the server does not say what it had cached."""
        if self.prompt_tokens is None or self.cached_tokens is None:
            return None
        return self.prompt_tokens - self.cached_tokens

    @property
    def knew_all(self) -> bool:
        """Whether nobody was the first to ask something: the server had read these texts before."""
        shares = [(answer.cached_tokens or 0) / answer.prompt_tokens for answer in self.whole if answer.prompt_tokens]
        return bool(shares) and min(shares) > 0.5

    @property
    def completion_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self.whole)

    @property
    def short_answers(self) -> int:
        """Whole answers that have fewer tokens than were asked for."""
        return sum(answer.num_tokens < answer.asked_tokens for answer in self.whole if answer.completion_tokens)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: times in milliseconds, null for what is not known."""
        ttfts = [1e3 * answer.ttft for answer in self.whole if answer.ttft is not None]
        gaps = [1e3 * gap for answer in self.whole for gap in answer.gaps]
        record: dict[str, Any] = {
            "server": self.server,
            "round": self.round,
            "requests": len(self.answers),
            **_percentiles("ttft", ttfts),
            **_percentiles("itl", gaps),
            "tokens_per_second": _rounded(self.completion_tokens / self.seconds if self.seconds else 0.0),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "computed_tokens": self.computed_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": _rounded(self.seconds),
            "cpu_seconds": None if self.cpu_seconds is None else _rounded(self.cpu_seconds),
            "errors": sum(self.errors.values()),
            "skipped": self.skipped,
        }
        return record | {figure.name: _rounded(figure.value) for figure in self.figures}


COUNTS = frozenset({"round", "requests", "errors", "skipped"})  # that make no ratios


def ratios(runs: Sequence[Run]) -> dict[str, float]:
    """Of the first server's figures to the second's: the median over the rounds. Empty if there is one server only."""
    servers = list(dict.fromkeys(run.server for run in runs))
    if len(servers) != 2:
        return {}
    ours, theirs = ([run.as_dict() for run in runs if run.server == server] for server in servers)
    found = {}
    for name in ours[0]:
        pairs = [(a.get(name), b.get(name)) for a, b in zip(ours, theirs, strict=False)]
        numbers = [a / b for a, b in pairs if isinstance(a, int | float) and isinstance(b, int | float) and b]
        if name not in COUNTS and numbers:
            found[name] = round(median(numbers), 4)
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between neighbours; nan of nothing."""
    return float(np.percentile(values, share)) if values else float("nan")


def _percentiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    return {f"{name}_p{share}_ms": _rounded(percentile(values, share)) if values else None for share in PERCENTILES}


def _sum(values: Iterable[int | None]) -> int | None:
    known = list(values)
    return None if not known or None in known else sum(value or 0 for value in known)


def _rounded(value: float) -> float | None:
    return None if value != value else round(value, 4)  # nan is not JSON
