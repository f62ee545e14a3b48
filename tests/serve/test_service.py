"""The service as its callers see it: the real engine on the built-in model where it matters, the toy where it doesn't."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import rekindle
from rekindle.engine.protocol import Engine
from rekindle.engine.toy import ToyEngine
from rekindle.errors import EngineError, InvalidRequest, ModelError, Overloaded, PromptTooLong, Stopping
from rekindle.serve import service as service_module
from rekindle.serve.request import Done, Event, Generation, Piece, Sampling
from rekindle.serve.service import Service
from rekindle.settings import Settings

STORY = "Vodris paints in orange. This one works as a farmer. Nouraix is based in Viniton. " * 6


@pytest.fixture(scope="module")
def toy() -> Iterator[Service]:
    with Service.open(Settings(engine="toy")) as service:
        yield service


@pytest.fixture(scope="module")
def llama() -> Iterator[Service]:
    with Service.open(Settings(threads=1, store="none")) as service:
        yield service
        service.check_integrity()


@pytest.fixture(scope="module")
def torch() -> Iterator[Service]:
    with Service.open(Settings(engine="torch", threads=1, store="none")) as service:
        yield service
        service.check_integrity()


@pytest.fixture(params=["llama", "torch"])
def real(request: pytest.FixtureRequest) -> Service:
    service: Service = request.getfixturevalue(request.param)
    return service


@pytest.fixture(params=["toy", "llama", "torch"])
def service(request: pytest.FixtureRequest) -> Service:
    service: Service = request.getfixturevalue(request.param)
    service.clear_cache()
    return service


def generation(service: Service, text: str = STORY, **options: object) -> Generation:
    options.setdefault("sampling", Sampling(temperature=0))
    options.setdefault("max_tokens", 8)
    return Generation(prompt=service.text_prompt(text), **options)  # type: ignore[arg-type]


def answer(service: Service, given: Generation) -> Done:
    *_, done = service.events(given)
    assert isinstance(done, Done)
    return done


def test_a_repeat_computes_nothing_before_its_first_token(service: Service) -> None:
    cold, warm = (answer(service, generation(service)) for _ in range(2))
    assert warm.text == cold.text
    assert (cold.timings.prefill_calls, warm.timings.prefill_calls) == (1, 0)
    assert warm.usage.cached_tokens == warm.usage.prompt_tokens == len(service.text_prompt(STORY))


def test_a_second_turn_computes_only_what_follows_the_answer(service: Service) -> None:
    messages = [{"role": "user", "content": STORY}]
    first = Generation(prompt=service.chat_prompt(messages), max_tokens=12, sampling=Sampling(temperature=0.8, seed=4))
    said = answer(service, first)
    messages += [{"role": "assistant", "content": said.text}, {"role": "user", "content": "Where is Nouraix based?"}]
    prompt = service.chat_prompt(messages)
    shared = len(first.prompt) + len(said.tokens)
    assert prompt.tokens[:shared].tolist() == [*first.prompt.tokens.tolist(), *said.tokens]
    second = answer(service, Generation(prompt=prompt, max_tokens=4, sampling=Sampling(temperature=0)))
    unread = 0 if said.reason == "stop" else 1  # a token that ended the answer was sampled, but never computed
    assert second.usage.computed_tokens == len(prompt) - shared + unread


def test_answers_stay_the_same_when_everything_has_left_the_engine(real: Service) -> None:
    real.clear_cache()
    cold = answer(real, generation(real))
    real.evict_residents()
    warm = answer(real, generation(real))
    assert (warm.text, warm.timings.prefill_calls) == (cold.text, 0)
    assert {step["kind"] for step in warm.plan.as_dict()["steps"]} == {"place"}


def test_without_kv_cache_the_answer_is_the_same(real: Service) -> None:
    cached = answer(real, generation(real))
    calls = real.num_computed
    plain = answer(real, generation(real, use_kv_cache=False, use_prefix_cache=False))
    assert plain.text == cached.text
    length = plain.usage.prompt_tokens
    assert real.num_computed - calls == sum(range(length, length + len(plain.tokens) + (plain.reason == "stop")))


def test_a_json_schema_is_kept_to(service: Service) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    for seed in range(3):
        wanted = Sampling(temperature=1.0, seed=seed)
        done = answer(service, generation(service, json_schema=schema, max_tokens=100, sampling=wanted))
        if done.reason == "stop":
            assert isinstance(json.loads(done.text)["a"], bool)
        else:
            assert done.text.startswith("{")


def test_a_schema_that_cannot_be_followed_is_refused(toy: Service) -> None:
    with pytest.raises(InvalidRequest, match="JSON schema"):
        next(toy.events(generation(toy, json_schema={"type": "no such type"})))


def test_logprobs_are_those_of_the_tokens(service: Service) -> None:
    events = service.events(generation(service, sampling=Sampling(temperature=0, top_logprobs=3)))
    for event in events:
        if isinstance(event, Piece) and event.tokens:
            token = event.tokens[0]
            assert token.top[0][0] == token.id and token.top[0][2] == token.logprob
            assert [t[2] for t in token.top] == sorted((t[2] for t in token.top), reverse=True)


def test_bad_prompts_are_refused(toy: Service) -> None:
    with pytest.raises(PromptTooLong, match="4096"):
        toy.submit(Generation(prompt=toy.token_prompt([5] * 5000)), print)
    for ids in ([], [-1], [10**6]):
        with pytest.raises(InvalidRequest):
            toy.token_prompt(ids)
    for text in ("", "\ud800"):
        with pytest.raises(InvalidRequest):
            toy.text_prompt(text)
    with pytest.raises(InvalidRequest):
        toy.chat_prompt([])
    with pytest.raises(InvalidRequest, match="stop string"):
        generation(toy, stop=("",))
    with pytest.raises(InvalidRequest, match="max_tokens"):
        generation(toy, max_tokens=0)
    with pytest.raises(InvalidRequest, match="logit_bias"):
        next(toy.events(generation(toy, sampling=Sampling(logit_bias={10**6: 1.0}))))


def test_the_queue_has_a_limit() -> None:
    with Service.open(Settings(engine="toy", max_running=1, max_queue=2)) as service:
        gate, entered = threading.Event(), threading.Event()

        def sink(event: Event) -> None:
            entered.set()
            gate.wait(60)

        service.submit(generation(service), sink)
        assert entered.wait(60)  # the worker now stands in this sink
        for _ in range(2):
            service.submit(generation(service), lambda event: None)
        with pytest.raises(Overloaded, match="the limit is 2"):
            service.submit(generation(service), lambda event: None)
        with pytest.raises(Overloaded, match="the limit is 2"):
            service.check_room()
        gate.set()


def test_closing_an_iterator_cancels(service: Service) -> None:
    events = service.events(generation(service, max_tokens=2000, ignore_eos=True))
    next(events)
    events.close()  # type: ignore[attr-defined]
    ended = threading.Event()
    service.submit(generation(service), lambda event: ended.set() if isinstance(event, Done) else None)
    assert ended.wait(60)
    service.check_integrity()
    assert service.health()["running"] == 0


def test_closing_the_service_ends_what_runs() -> None:
    service = Service.open(Settings(engine="toy"))
    got: list[Event] = []
    late = generation(service)

    def sink(event: Event) -> None:
        got.append(event)
        while isinstance(event, Piece) and event.tokens and service._worker._inbox.empty():
            time.sleep(0)  # until it is to stop, or else the answer could be complete by then

    service.submit(generation(service, max_tokens=3000, ignore_eos=True), sink)
    service.close()
    assert isinstance(got[-1], Done) and got[-1].reason == "cancelled"
    with pytest.raises(Stopping, match="being stopped"):
        service.submit(late, got.append)
    with pytest.raises(ModelError, match="closed"):
        service.text_prompt("Good morning!")


def test_a_worker_that_fails_answers_everybody() -> None:
    service = Service.open(Settings(engine="toy"))
    with pytest.raises(ZeroDivisionError):  # a command's own error is its caller's
        service._worker.call(lambda scheduler: 1 // 0)
    assert answer(service, generation(service)).text

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    service._engine.forward = fail  # type: ignore[assignment]
    with pytest.raises(EngineError, match="worker failed"):
        list(service.events(generation(service, text="Something else that was never read before, long enough.")))
    assert service.health()["status"] == "failed"
    with pytest.raises(EngineError, match="worker failed"):
        service.submit(generation(service), print)
    service.close()


def test_nobody_waits_for_studies_of_a_worker_that_has_failed() -> None:
    service = Service.open(Settings(engine="toy", store="none"))

    def fail() -> bool:
        raise ZeroDivisionError

    service._worker.call(lambda scheduler: setattr(scheduler._studies, "go_on", fail))
    with pytest.raises(EngineError, match="worker failed"):
        service.study()
    service.close()


def test_what_fails_late_leaves_no_thread_and_no_engine_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Engine] = []

    def shutdown(engine: ToyEngine, before: Callable[[ToyEngine], None] = ToyEngine.shutdown) -> None:
        ended.append(engine)
        before(engine)

    def fail(*_: object, **__: object) -> None:
        raise EngineError("late")

    monkeypatch.setattr(ToyEngine, "shutdown", shutdown)
    monkeypatch.setattr(service_module, "Levels", fail)  # the last thing that is made
    before = set(threading.enumerate())
    with pytest.raises(EngineError, match="late"):
        Service.open(Settings(engine="toy"))
    assert set(threading.enumerate()) <= before and len(ended) == 1


def test_five_lines_of_python() -> None:
    with rekindle.load(threads=1, store="none") as llm:
        whole = llm.generate(STORY, max_tokens=10)
        assert "".join(llm.stream(STORY, max_tokens=10)) == whole
        assert llm.last is not None and llm.last.timings.prefill_calls == 0
        assert llm.generate([{"role": "user", "content": STORY}], max_tokens=10) == whole
        assert llm.stats().hits == 2
    with pytest.raises(InvalidRequest, match="did you mean 'threads'"):
        rekindle.load(thread=1)
