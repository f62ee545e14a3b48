"""A service for the sessions of this room: the toy engine for states, the real one for sense."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from rekindle.serve.service import Service
from rekindle.serve.sessions.sessions import Sessions
from rekindle.settings import Settings


@pytest.fixture(scope="module")
def toy() -> Iterator[Service]:
    with Service.open(Settings(engine="toy", store="none", session_pause_seconds=math.inf)) as service:
        yield service
        service.check_integrity()


@pytest.fixture(scope="module")
def real() -> Iterator[Service]:
    with Service.open(Settings(threads=1, store="none", session_pause_seconds=math.inf)) as service:
        yield service
        service.check_integrity()


@pytest.fixture
def sessions(toy: Service) -> Iterator[Sessions]:
    toy.clear_cache()
    with Sessions(toy) as sessions:
        yield sessions


@pytest.fixture
def real_sessions(real: Service) -> Iterator[Sessions]:
    real.clear_cache()
    with Sessions(real) as sessions:
        yield sessions
