"""From answers to figures, and from the figures of two servers to ratios."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import numpy as np

from rekindle.lab.load.client import Answer

PERCENTILES = (50, 95, 99)
N = TypeVar("N", int, float)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What a turn measured besides the usual, and what may be expected of it."""

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
    figures: tuple[Figure, ...] = ()  # of all turns, in their order
    cpu_seconds: float | None = None  # processor time of the server, if it was started here
    idle_share: float | None = None  # of a core, that it used while the other server was asked
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
        return total(answer.prompt_tokens for answer in self.whole)

    @property
    def cached_tokens(self) -> int | None:
        return total(answer.cached_tokens for answer in self.whole)

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

    @property
    def measured(self) -> dict[str, list[float]]:
        """The figures by name, one value for each turn that had it."""
        found: dict[str, list[float]] = {}
        for figure in self.figures:
            found.setdefault(figure.name, []).append(figure.value)
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON: times in milliseconds, medians of the turns' figures, null for what is not known."""
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
            "idle_cpu_percent": None if self.idle_share is None else _rounded(100 * self.idle_share),
            "errors": sum(self.errors.values()),
            "skipped": self.skipped,
        }
        return record | {name: _rounded(median(values)) for name, values in self.measured.items()}


NO_RATIO = frozenset({"round", "requests", "errors", "skipped", "idle_cpu_percent"})


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Of one server's figure to another's, over pairs that were measured one right after the other."""

    values: tuple[float, ...]  # of the pairs: of turns, where a figure is a turn's, and else of rounds

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper one."""
        return percentile(self.values, 25), percentile(self.values, 75)


def ratios(runs: Sequence[Run]) -> dict[str, Ratio]:
    """Of the first server's figures to the second's. Empty if there is one server only."""
    servers = list(dict.fromkeys(run.server for run in runs))
    if len(servers) != 2:
        return {}
    ours, theirs = ([_by_pair(run) for run in runs if run.server == server] for server in servers)
    found: dict[str, list[float]] = {}
    for first, second in zip(ours, theirs, strict=False):
        for name, values in first.items():
            pairs = zip(values, second.get(name, ()), strict=False)
            found.setdefault(name, []).extend(a / b for a, b in pairs if b and a == a and b == b)
    return {name: Ratio(values=tuple(values)) for name, values in found.items() if values}


def _by_pair(run: Run) -> dict[str, list[float]]:
    """What makes ratios: one value for the round, or one for each of its turns."""
    numbers = {
        name: [value]
        for name, value in run.as_dict().items()
        if name not in NO_RATIO and isinstance(value, int | float)
    }
    return numbers | run.measured


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between neighbours; nan of nothing."""
    return float(np.percentile(values, share)) if values else float("nan")


def _percentiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    return {f"{name}_p{share}_ms": _rounded(percentile(values, share)) if values else None for share in PERCENTILES}


def total(values: Iterable[N | None]) -> N | None:
    """None if there are none, or if one is not known."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return sum(known[1:], known[0]) if known and len(known) == len(listed) else None


def _rounded(value: float) -> float | None:
    return None if value != value else round(value, 4)  # nan is not JSON
