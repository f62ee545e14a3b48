"""One server on the toy engine for this room's tests, and one on the built-in model for those that need sense."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from rekindle.api.server import running
from rekindle.serve.service import Service
from rekindle.settings import Settings

CONTEXT = 1024  # small, so that a prompt that is too long is quickly made


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """The toy engine behind the real worker, with ember's tokenizer and chat template."""
    with Service.open(Settings(engine="toy", context=CONTEXT)) as service:
        yield service


@pytest.fixture(scope="session")
def url(service: Service) -> Iterator[str]:
    with running(service) as url:
        yield url


@pytest.fixture(scope="session")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="session", params=["llama", "torch"])
def ember_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The built-in model on each of the real engines."""
    settings = Settings(model="builtin", engine=request.param, store="none")
    with Service.open(settings) as service, running(service) as url:
        yield url


@pytest.fixture(scope="session")
def ember(ember_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{ember_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
