"""A tier that fails and works again is logged twice, however many requests meet it."""

from __future__ import annotations

import logging
from threading import Thread

import numpy as np
import pytest
from tests.kv.doubles import DictTier

from rekindle.errors import TierUnavailable
from rekindle.kv.outages import Outages
from rekindle.kv.store import Store

FINGERPRINT = bytes(16)


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(record.levelno, record.getMessage().partition(",")[0]) for record in caplog.records]


def test_each_outage_and_its_end_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    outages = Outages("read from")
    for _ in range(2):
        for _ in range(5):
            outages.failed("disk", TierUnavailable("made to fail"))
        for _ in range(5):
            outages.worked("disk")
    down = (logging.WARNING, "the disk tier cannot be read from")
    assert lines(caplog) == [down, (logging.INFO, "the disk tier can be read from again")] * 2


def test_tiers_are_told_apart_and_threads_are_not(caplog: pytest.LogCaptureFixture) -> None:
    outages = Outages("written to")

    def fail() -> None:
        for number in range(200):
            outages.failed("disk" if number % 2 else "network", TierUnavailable("made to fail"))

    threads = [Thread(target=fail) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(message for _, message in lines(caplog)) == [
        "the disk tier cannot be written to",
        "the network tier cannot be written to",
    ]


def test_a_store_whose_tier_cannot_be_read(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tier = DictTier()
    store = Store(FINGERPRINT, max_bytes=1 << 20, block_tokens=4, tiers=[tier])
    prompts = [np.arange(start, start + 10, dtype=np.int32) for start in range(20)]
    tier.failing = True
    for prompt in prompts:
        assert store.fetch(prompt).tokens == {}
    tier.failing = False
    for prompt in prompts:
        store.fetch(prompt)
    assert [message for _, message in lines(caplog)] == [
        "the disk tier cannot be read from",
        "the disk tier can be read from again",
    ]
