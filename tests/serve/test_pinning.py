"""Pins of a service: through memory pressure, restarts and time, for each tenant apart, and together with answers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.kv.samples import Clock

import rekindle
from rekindle.errors import InvalidRequest, PromptTooLong
from rekindle.kv.pins import Pin
from rekindle.reuse.prompt import Prompt
from rekindle.serve.local import LLM
from rekindle.serve.request import Done, Event, Generation, Sampling
from rekindle.serve.service import Service

STORY = "Vodris paints in orange. This one works as a farmer. Nouraix is based in Viniton. "
PROMPTS = [f"{number}. {STORY * 8}" for number in range(12)]
MEMORY = 600_000  # about three of these prompts

Open = Callable[..., LLM]


@pytest.fixture
def open_llm() -> Iterator[Open]:
    """The built-in model with little memory for its store, and none in the engine."""
    opened: list[LLM] = []

    def call(**settings: object) -> LLM:
        given = {"threads": 1, "context": 2048, "store": "none", "store_memory": MEMORY, "max_residents": 0}
        given |= {"store_flush_seconds": 60} | settings
        opened.append(rekindle.load(**given))  # type: ignore[arg-type]
        return opened[-1]

    yield call
    for llm in opened:
        llm.close()


def computed(llm: LLM, prompt: Prompt | str) -> int:
    """Tokens of a prompt that were computed to answer it."""
    asked = llm.service.text_prompt(prompt) if isinstance(prompt, str) else prompt
    return answer(llm.service, asked).usage.computed_tokens


def answer(service: Service, prompt: Prompt, **options: object) -> Done:
    generation = Generation(prompt=prompt, max_tokens=4, sampling=Sampling(temperature=0), **options)  # type: ignore[arg-type]
    return next(event for event in service.events(generation) if isinstance(event, Done))


def give_up(service: Service, prompt: Prompt) -> None:
    """Ask for a prompt to be pinned, go before it is read, and wait until that is over."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    left = threading.Event()
    service._worker.post(lambda scheduler: left.wait())
    service.submit(Generation(prompt=prompt, pin_seconds=60.0), events.put).cancel()
    left.set()
    ended = events.get()
    assert isinstance(ended, Done) and ended.reason == "cancelled"


def flood(llm: LLM, salt: bytes = b"") -> None:
    """Read so many prompts that nothing stays that is not pinned."""
    for prompt in PROMPTS[2:]:
        answer(llm.service, llm.service.text_prompt(prompt, salt=salt))


def test_a_pinned_prompt_survives_pressure_and_another_does_not(open_llm: Open) -> None:
    llm = open_llm()
    pinned, other = PROMPTS[:2]
    for prompt in (pinned, other):
        assert computed(llm, prompt) > 100
    pin = llm.pin(pinned, ttl="10m", raw=True)
    assert pin.num_bytes > 0 and pin.num_tokens == len(llm.service.text_prompt(pinned))
    flood(llm)
    assert computed(llm, pinned) == 0
    assert computed(llm, other) > 100
    assert llm.unpin(pin.id) and not llm.unpin(pin.id)
    flood(llm)
    assert computed(llm, pinned) > 100


def test_a_prompt_may_be_pinned_before_it_is_read(open_llm: Open) -> None:
    llm = open_llm()
    pin = llm.pin(PROMPTS[0], ttl=600, raw=True)
    assert pin.num_bytes == 0
    assert llm.warm(PROMPTS[0], raw=True)[0].computed == pin.num_tokens
    assert llm.pins()[0].num_bytes > 0
    flood(llm)
    assert computed(llm, PROMPTS[0]) == 0


def test_pins_end(open_llm: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = open_llm()
    clock = Clock()
    monkeypatch.setattr(llm.service._store, "_wall_clock", clock)
    llm.warm(PROMPTS[0], raw=True)
    llm.pin(PROMPTS[0], ttl="10m", raw=True)
    clock.now += 599
    flood(llm)
    assert computed(llm, PROMPTS[0]) == 0
    assert round(llm.pins()[0].expires_in) == 1
    clock.now += 2
    assert llm.pins() == [] and llm.stats().pinned_bytes == 0
    flood(llm)
    assert computed(llm, PROMPTS[0]) > 100


def test_pinned_kv_survives_a_restart_through_the_disk(open_llm: Open, tmp_path: Path) -> None:
    """The folder holds about as much as the memory: what is not pinned has left it too."""
    folder = {"store": str(tmp_path), "store_disk": MEMORY}
    first = open_llm(**folder)
    first.warm(PROMPTS[:2], raw=True)
    first.pin(PROMPTS[0], ttl="10m", raw=True)
    flood(first)
    first.close()
    second = open_llm(**folder)
    assert computed(second, PROMPTS[0]) == 0
    assert computed(second, PROMPTS[1]) > 100


def test_an_answer_is_pinned_with_its_prompt(open_llm: Open) -> None:
    """Both an exact repeat and the next turn cost nothing that was read before."""
    llm = open_llm()
    service = llm.service
    prompt = service.text_prompt(PROMPTS[0])
    done = answer(service, prompt, pin_seconds=600.0)
    assert done.pin is not None and done.pin.num_tokens == len(prompt)
    assert len(llm.pins()) == 2
    flood(llm)
    assert answer(service, prompt).usage.computed_tokens == 0
    following = service.token_prompt([*prompt.tokens.tolist(), *done.tokens, 5])
    assert answer(service, following).usage.computed_tokens <= 2  # the last sampled token, and what was said
    assert llm.unpin(done.pin.id)
    assert llm.pins() == []


def test_nobody_is_left_with_the_pin_of_a_request_that_failed(open_llm: Open) -> None:
    llm = open_llm()
    prompt = llm.service.text_prompt(PROMPTS[0])
    give_up(llm.service, prompt)
    assert llm.pins() == []
    with pytest.raises(PromptTooLong):
        answer(llm.service, llm.service.text_prompt(STORY * 150), pin_seconds=60.0)
    assert llm.pins() == []
    kept = llm.pin(PROMPTS[0], ttl=60, raw=True)
    give_up(llm.service, prompt)
    assert [pin.id for pin in llm.pins()] == [kept.id]  # this one was there before


def test_more_than_may_be_pinned_is_refused_before_anything_is_computed(open_llm: Open) -> None:
    llm = open_llm()
    before = llm.service.num_computed
    with pytest.raises(InvalidRequest, match=r"at most .* may be pinned"):
        for prompt in PROMPTS:
            llm.pin(prompt, ttl="1h", raw=True)
    with pytest.raises(InvalidRequest, match=r"at most .* may be pinned"):
        answer(llm.service, llm.service.text_prompt(PROMPTS[-1]), pin_seconds=60.0)
    assert llm.service.num_computed == before
    with pytest.raises(PromptTooLong):
        llm.pin(STORY * 150, ttl="1h", raw=True)


def test_tenants_see_and_end_their_own_pins_alone(open_llm: Open) -> None:
    service = open_llm(store_memory=1 << 30).service
    ours, theirs = (service.pin(service.text_prompt(PROMPTS[0], salt=salt), 60.0) for salt in (b"ours+1", b"theirs"))
    assert ours.id != theirs.id
    assert [pin.id for pin in service.pins(owner=b"ours")] == [ours.id]
    assert not service.unpin(ours.id, owner=b"theirs")
    assert service.unpin(ours.id, owner=b"ours")
    assert [pin.id for pin in service.pins()] == [theirs.id]


def test_a_pin_that_is_made_while_pins_are_listed_keeps_its_owner(
    open_llm: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = open_llm().service
    store, prompt = service._store, service.text_prompt(PROMPTS[0], salt=b"a")
    pinning = threading.Thread(target=service.pin, args=(prompt, 60))
    pins = store.pins

    def interrupted() -> list[Pin]:
        found = pins()
        pinning.start()
        pinning.join(0.2)  # for as long as others are kept out it does not end
        return found

    with monkeypatch.context() as patch:
        patch.setattr(store, "pins", interrupted)
        assert service.pins(owner=b"a") == []
    pinning.join()
    assert len(service.pins(owner=b"a")) == 1


def test_a_conversation_is_warmed_up_to_what_the_user_says(open_llm: Open) -> None:
    llm = open_llm(store_memory=1 << 30)
    opening = [{"role": "system", "content": PROMPTS[0]}]
    (warmed,) = llm.warm(opening)
    assert (warmed.computed, warmed.reused) == (warmed.tokens, 0) and warmed.stored_bytes > 0
    for said in ("Who paints?", "Where is Nouraix based?"):
        prompt = llm.service.chat_prompt([*opening, {"role": "user", "content": said}])
        assert answer(llm.service, prompt).usage.cached_tokens >= warmed.tokens
    again = llm.warm([opening, PROMPTS[1]], raw=True)
    assert [each.computed for each in again] == [0, again[1].tokens]


def test_messages_that_end_with_the_users_are_a_prompt(open_llm: Open) -> None:
    llm = open_llm(store_memory=1 << 30)
    messages = [{"role": "user", "content": PROMPTS[0]}]
    llm.warm(messages)
    assert computed(llm, llm.service.chat_prompt(messages)) == 0
