"""Outages of tiers, in the log: one line when a tier fails, one when it works again, nothing for the requests between."""

from __future__ import annotations

import logging
import threading

_log = logging.getLogger(__name__)


class Outages:
    """Of one use of tiers. Thread-safe."""

    def __init__(self, use: str) -> None:
        """`use` says what can't be done meanwhile: "read from", "written to"."""
        self._use = use
        self._failing: set[str] = set()  # names of tiers
        self._lock = threading.Lock()

    def failed(self, tier: str, error: Exception) -> None:
        with self._lock:
            is_new = tier not in self._failing
            self._failing.add(tier)
        if is_new:
            _log.warning("the %s tier cannot be %s, requests go on without it: %s", tier, self._use, error)

    def worked(self, tier: str) -> None:
        if tier not in self._failing:  # as nearly always
            return
        with self._lock:
            was_failing = tier in self._failing
            self._failing.discard(tier)
        if was_failing:
            _log.info("the %s tier can be %s again", tier, self._use)
