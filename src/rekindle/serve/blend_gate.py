"""Whether blending was measured to be good enough for the model that is served.

The last line of `rekindle lab blend` says which share of full prefill's right answers each way of choosing keeps, and of
which model, by its fingerprint: other weights, another KV type or another engine is another model. A server that is given
such a file blends only in ways that were measured, with at least the share that was asked for. More computed anew counts
as no worse, so a ratio is as good as the largest that was measured and is not larger. Without a report nothing is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekindle.errors import InvalidRequest
from rekindle.reuse.blend import SELECTS, Blend

_log = logging.getLogger(__name__)


class BlendingRefused(InvalidRequest):
    """Blending in this way was not measured to be good enough here."""

    code = "blending_refused"


@dataclass(frozen=True)
class Measured:
    """One way of blending."""

    select: str
    ratio: float
    share: float  # of full prefill's right answers


@dataclass(frozen=True)
class BlendGate:
    """What was measured of one model."""

    least: float  # share that is good enough
    arms: tuple[Measured, ...]
    fault: str | None = None  # why nothing is known; for clients, so without paths

    @classmethod
    def load(cls, file: Path, fingerprint: bytes, least: float) -> BlendGate:
        """The latest report on the model in a file, and a line about it in the log."""
        try:
            reports = list(_reports(file.expanduser().read_text("utf-8-sig")))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            _log.warning("blending is refused: cannot read %s: %s", file, reason)
            return cls(least, (), "the report on its quality cannot be read")
        fitting = [each for each in reports if each["fingerprint"] == fingerprint.hex()]
        if not fitting:
            measured = ", ".join(sorted({f"{each['model']} ({each['fingerprint']})" for each in reports})) or "none"
            _log.warning(
                "blending is refused: %s has no report on this model (%s), only on: %s",
                file,
                fingerprint.hex(),
                measured,
            )
            return cls(least, (), "its quality was not measured for this model with these settings")
        gate = cls(least, tuple(_arms(fitting[-1])))
        _log.log(
            logging.INFO if gate.passing else logging.WARNING,
            "blending keeps at least %g of full prefill's right answers with: %s",
            least,
            gate.passing or "no way of choosing that was measured, so it is refused",
        )
        return gate

    def check(self, blend: Blend, num_layers: int = 1) -> None:
        """Raises BlendingRefused. `num_layers` of the model, without which it is not known where deviation is judged."""
        if blend.ratio == 1 and blend.select != "none":  # all is computed
            return
        if self.fault is not None:
            raise BlendingRefused(f"this server does not blend: {self.fault}", param="rekindle.blend")
        name = blend.name(num_layers)
        known = [arm for arm in self.arms if arm.select == name and arm.ratio <= blend.ratio]
        if known and (best := max(known, key=lambda arm: arm.ratio)).share >= self.least:
            return
        kept = f"kept {best.share:.3f}" if known else "was not measured to keep enough"
        raise BlendingRefused(
            f"blending with {name} at {blend.ratio:.0%} {kept} of full prefill's right answers; this server asks "
            f"for {self.least:g}. Good enough: {self.passing or 'nothing that was measured'}",
            param="rekindle.blend",
        )

    def tell_of(self, blend: Blend, num_layers: int) -> None:
        """A line in the log if what is done for those who say no more is refused, although other ways are not."""
        if not self.passing:
            return  # which was told
        try:
            self.check(blend, num_layers)
        except BlendingRefused as error:
            _log.warning("by these settings nothing is blended (blend_select, blend_ratio, blend_layer): %s", error)

    @property
    def passing(self) -> str:
        """What is good enough, in words."""
        words = []
        for select in dict.fromkeys(
            [*SELECTS, *(arm.select for arm in self.arms if arm.select.startswith("deviation "))]
        ):
            good = _least_good([arm for arm in self.arms if arm.select == select], self.least)
            if good is not None:
                words.append(f"{select} from {good:.0%}")
        return ", ".join(words)


def _least_good(arms: Sequence[Measured], least: float) -> float | None:
    """The smallest ratio from which on all that was measured is good enough."""
    good = None
    for arm in sorted(arms, key=lambda arm: -arm.ratio):
        if arm.share < least:
            break
        good = arm.ratio
    return good


def _reports(text: str) -> Iterator[dict[str, Any]]:
    """The lines that are reports, the others may be anything."""
    for line in text.splitlines():
        try:
            value = json.loads(line) if line.lstrip().startswith("{") else None
        except (ValueError, RecursionError):
            continue
        if not isinstance(value, dict) or value.get("experiment") != "blend":
            continue
        if isinstance(value.get("fingerprint"), str) and isinstance(value.get("arms"), list):
            yield {"model": "?"} | value


def _arms(report: dict[str, Any]) -> Iterator[Measured]:
    for arm in report["arms"]:
        try:
            yield Measured(str(arm["select"]), float(arm["ratio"]), float(arm["exact_match_of_full"]))
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
