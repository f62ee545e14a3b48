"""Limits: the queue, answers per key, time; each refusal in the API's format, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.api.steps import Steps, post, read_until

from rekindle.api.answers import Answers
from rekindle.api.keys import Caller
from rekindle.api.load import LONGEST_RETRY, Load, retry_after
from rekindle.api.server import running
from rekindle.errors import InvalidRequest, Overloaded, RekindleError
from rekindle.serve.request import Done
from rekindle.serve.service import Service
from rekindle.settings import Settings

PLAIN = ("/generate", {"prompt": "Vodris paints in orange. " * 20, "max_new_tokens": 400, "ignore_eos": True})
STREAM = ("/generate_stream", PLAIN[1])
CHAT_BODY = {"messages": [{"role": "user", "content": "Vodris paints in orange. " * 20}], "ignore_eos": True}
CHAT = ("/v1/chat/completions", CHAT_BODY)
CHAT_STREAM = ("/v1/chat/completions", CHAT_BODY | {"stream": True})
ALL = {"plain": PLAIN, "plain, stream": STREAM, "chat": CHAT, "chat, stream": CHAT_STREAM}


@contextmanager
def stepping(**settings: Any) -> Iterator[tuple[str, Steps]]:
    with Service.open(Settings(**{"engine": "toy", "context": 2048, "store": "none"} | settings)) as service:
        steps = Steps(service)
        with running(service) as url:
            yield url, steps
            steps.let_all()


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# Time.

LIMIT_SECONDS = 300.0


class Limit:
    """The time limit of requests, which is over when the test says so: until then as much may be done as it needs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._timers: list[Callable[[], object]] = []
        begin = Answers.fail_after

        def fail_after(answers: Answers, seconds: float, error: RekindleError) -> None:
            assert 0 < seconds <= LIMIT_SECONDS
            self._timers.append(lambda: answers._loop.call_soon_threadsafe(begin, answers, 0.0, error))

        patch.setattr(Answers, "fail_after", fail_after)

    def run_out(self) -> None:
        """That of the latest request."""
        self._timers[-1]()


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Limit:
    return Limit(monkeypatch)


@pytest.mark.parametrize(("path", "body"), ALL.values(), ids=ALL)
@pytest.mark.parametrize("num_steps", [1, 3], ids=["reading", "decoding"])
def test_a_request_that_takes_too_long_is_given_up(
    path: str, body: dict[str, Any], num_steps: int, limit: Limit
) -> None:
    """The step that is being taken outlasts the limit, which those before it do not: the client is answered meanwhile."""
    with stepping(request_timeout=LIMIT_SECONDS) as (url, steps):
        steps.let(num_steps - 1)
        with post(url, path, body) as connection:
            steps.wait_until_begun(num_steps)
            limit.run_out()
            is_late = num_steps > 1 and (body.get("stream") or path == "/generate_stream")  # events have been sent
            received = read_until(connection, b"\r\n0\r\n\r\n" if is_late else b'"}}')
        assert b"longer than the 300 second" in received and b'"code":"request_timeout"' in received
        assert b"[DONE]" not in received
        assert received.startswith(b"HTTP/1.1 200 " if is_late else b"HTTP/1.1 504 ")
        (late,) = steps.generations
        assert late.cancelled and late.end is None
        steps.let(1)
        steps.wait(lambda: isinstance(late.end, Done))
        steps.check_nothing_is_left()
        assert steps.begun == num_steps


def test_time_in_the_queue_counts(limit: Limit) -> None:
    with stepping(request_timeout=LIMIT_SECONDS, max_running=1) as (url, steps), post(url, *STREAM):
        steps.wait_until_begun(1)
        with post(url, *PLAIN) as connection:
            steps.wait(lambda: len(steps.generations) == 2)
            limit.run_out()
            assert read_until(connection, b'"}}').startswith(b"HTTP/1.1 504 ")
        steps.let_all()
        steps.check_nothing_is_left()


def test_a_limit_of_the_clock() -> None:
    with stepping(request_timeout=0.1) as (url, steps):
        assert httpx.post(url + PLAIN[0], json=PLAIN[1]).status_code == 504
        steps.let_all()
        steps.check_nothing_is_left()


def test_a_request_that_is_quick_enough_hears_nothing_of_the_limit() -> None:
    with stepping(request_timeout=60) as (url, steps):
        steps.let_all()
        answer = httpx.post(f"{url}/generate", json={"prompt": "Vodris paints", "max_new_tokens": 3})
        assert answer.status_code == 200
        steps.check_nothing_is_left()


def test_a_second_attempt_goes_on_where_the_first_was_given_up(limit: Limit) -> None:
    with stepping(request_timeout=LIMIT_SECONDS) as (url, steps):
        steps.let(2)
        with post(url, *PLAIN) as late:
            steps.wait_until_begun(3)
            limit.run_out()
            assert read_until(late, b'"}}').startswith(b"HTTP/1.1 504 ")
        steps.let_all()
        answer = httpx.post(url + PLAIN[0], json=PLAIN[1] | {"max_new_tokens": 2}, timeout=60).json()
        assert answer["timings"]["suffix_tokens_processed"] == 0
        assert answer["timings"]["cached_tokens"] == answer["timings"]["total_prompt_tokens"] > 50
        steps.check_nothing_is_left()


# Answers per key.


def test_a_key_has_no_more_answers_under_way_than_it_may() -> None:
    with stepping(max_per_key=2, api_key=("one", "two")) as (url, steps):
        with post(url, *STREAM, **bearer("one")), post(url, *PLAIN, **bearer("one")):
            steps.wait(lambda: len(steps.generations) == 2)
            for path, body in ALL.values():
                answer = httpx.post(url + path, json=body, headers=bearer("one"))
                assert answer.status_code == 429 and answer.headers["retry-after"].isdigit()
                error = error_of(answer)
                assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
                assert "has 2 answers under way, the limit is 2" in error["message"]
            assert len(steps.generations) == 2
            with post(url, *PLAIN, **bearer("two")):  # another key has its own
                steps.wait(lambda: len(steps.generations) == 3)
        steps.wait(lambda: all(each.cancelled for each in steps.generations))  # those clients count no more
        steps.let_all()
        steps.check_nothing_is_left()
        small = {"prompt": "Vodris paints", "max_new_tokens": 2}
        for _ in range(3):
            assert httpx.post(f"{url}/generate", json=small, headers=bearer("one")).status_code == 200


def test_each_choice_counts_and_more_than_may_ever_run_are_a_bad_request() -> None:
    with stepping(max_per_key=2, api_key=("one",)) as (url, steps):
        steps.let_all()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="one", max_retries=0) as client:
            messages: Any = [{"role": "user", "content": "Hello"}]
            with pytest.raises(openai.BadRequestError, match="at most 2 choices fit into one request, got 3"):
                client.chat.completions.create(model="ember", messages=messages, max_tokens=2, n=3)
            assert len(client.chat.completions.create(model="ember", messages=messages, max_tokens=2, n=2).choices) == 2
            steps.hold()
            with post(url, *PLAIN, **bearer("one")):
                steps.wait(lambda: len(steps.generations) == 3)
                with pytest.raises(openai.RateLimitError):
                    client.chat.completions.create(model="ember", messages=messages, max_tokens=2, n=2)
        steps.let_all()
        steps.check_nothing_is_left()


def test_refused_submissions_do_not_count() -> None:
    with stepping(max_per_key=1, api_key=("one",)) as (url, steps):
        steps.let_all()
        for _ in range(3):
            answer = httpx.post(f"{url}/generate", json={"prompt": "long " * 4000}, headers=bearer("one"))
            assert answer.status_code == 400 and error_of(answer)["code"] == "context_length_exceeded"
        assert httpx.post(f"{url}/generate", json={"prompt": "short"}, headers=bearer("one")).status_code == 200
        steps.check_nothing_is_left()


def test_a_limit_per_key_needs_keys() -> None:
    with (
        Service.open(Settings(engine="toy", context=512, max_per_key=1)) as service,
        pytest.raises(InvalidRequest, match="max_per_key: expected API keys"),
        running(service),
    ):
        pass


# The queue.


def test_a_full_queue_says_when_to_come_again_and_is_not_ready() -> None:
    with stepping(max_running=1, max_queue=1) as (url, steps), post(url, *STREAM), httpx.Client(base_url=url) as client:
        steps.wait_until_begun(1)
        assert client.get("/ready").json() == {"status": "ready"}
        with post(url, *PLAIN):
            steps.wait(lambda: len(steps.generations) == 2)
            steps.let(2)
            steps.wait_until_begun(3)
            for path, body in ALL.values():
                answer = client.post(path, json=body)
                assert answer.status_code == 429 and answer.headers["retry-after"].isdigit()
                assert error_of(answer)["code"] == "overloaded"
            ready = client.get("/ready")
            assert (ready.status_code, ready.json()) == (503, {"status": "queue full"})
            assert ready.headers["retry-after"].isdigit()
            assert client.get("/health").status_code == 200
        steps.let_all()


# What is told.


def load_of(**settings: Any) -> Load:
    return Load(Settings(**settings))


def test_the_estimate_follows_the_latest_durations() -> None:
    load, caller = load_of(max_running=4, max_queue=8, max_per_key=2), Caller("a", b"a")
    assert load.until_room() == 0.0
    for seconds in (1.0, 3.0, None):  # one that was broken off tells nothing
        load.take(caller, 1)
        load.give_back(caller, 1, seconds)
    assert load.until_room() == pytest.approx(2.0 * 8 / 4)
    load.take(caller, 2)
    with pytest.raises(Overloaded) as refused:
        load.take(caller, 1)
    assert refused.value.retry_seconds == pytest.approx(1.0)
    for _ in range(100):
        load.take(Caller("b", b"b"), 1)
        load.give_back(Caller("b", b"b"), 1, 0.5)
    assert load.until_room() == pytest.approx(1.0)


@given(st.none() | st.floats(min_value=0, max_value=1e9))
def test_retry_after_is_whole_seconds_that_clients_accept(seconds: float | None) -> None:
    value = int(retry_after(seconds)["Retry-After"])
    assert 1 <= value <= LONGEST_RETRY
    assert seconds is None or value >= min(seconds, LONGEST_RETRY)


def test_the_official_client_waits_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Retry-After` is read by OpenAI's client: it comes again, and is answered when there is room."""
    waited: list[float] = []
    with stepping(max_running=1, max_queue=1) as (url, steps), post(url, *STREAM):
        steps.wait_until_begun(1)
        with post(url, *PLAIN), openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5) as client:
            steps.wait(lambda: len(steps.generations) == 2)

            def wait(seconds: float) -> None:
                waited.append(seconds)
                steps.let_all()
                steps.wait(lambda: all(each.end is not None for each in steps.generations))

            monkeypatch.setattr("time.sleep", wait)
            assert client.completions.create(model="ember", prompt="Vodris", max_tokens=2).choices
        monkeypatch.undo()
    assert waited == [1.0]


def test_an_error_event_is_json() -> None:
    with stepping(request_timeout=0.3) as (url, steps):
        steps.let(3)
        answer = httpx.post(url + STREAM[0], json=STREAM[1])
        last = answer.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"
        steps.let_all()


def test_live_answers_count_with_all_others_of_a_key() -> None:
    load, caller = load_of(max_per_key=1), Caller("a", b"a" * 16)
    load.enter(caller.salt("a tenant of it"))
    with pytest.raises(Overloaded):
        load.take(caller, 1)
    load.take(Caller("b", b"b" * 16), 1)
    load.leave(caller.salt("a tenant of it"), 1.0)
    load.take(caller, 1)
    with pytest.raises(Overloaded):
        load.enter(caller.salt())
