"""Blended requests on real engines and the built-in model: counts, quality, isolation, and what a restart remembers."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rekindle
from rekindle.errors import InvalidRequest, PromptTooLong
from rekindle.lab.blend_tasks import Asked, BlendTask, ember_tasks
from rekindle.reuse.blend import Blend
from rekindle.reuse.prompt import Prompt, join
from rekindle.serve.local import LLM
from rekindle.serve.lull import Lull
from rekindle.serve.request import Done, Event, Failed, Generation, Piece, Sampling
from rekindle.tokens import SHORT_REST, Tokens

TOP = 8  # logprobs that are compared
ROUNDING = {"llama": 0.05, "torch": 0.001}  # of logprobs, that depend on how a prompt was cut into batches


@cache
def story() -> BlendTask:
    """Four chunks of some 100 to 500 tokens, with questions that cross them."""
    return next(task for task in ember_tasks(7) if len(task.chunks) == 4 and len(task.asked) > 1)


def prompt_of(asked: Asked, *, met: bool = False, salt: bytes = b"") -> Prompt:
    task = story()
    parts: list[tuple[Tokens, bool]] = [(task.before, False)]
    for index in task.met if met else range(len(task.chunks)):
        parts += [(task.chunks[index], True), (task.mark, False)]
    return join([*parts, (asked.tokens, False)], salt=salt)


def load(engine: str, **settings: object) -> LLM:
    given = {"engine": engine, "threads": 1, "store": "none", "store_flush_seconds": 60}
    return rekindle.load(**(given | settings))  # type: ignore[arg-type]


def wish(prompt: Prompt, blend: Blend | None = None, *, max_tokens: int = 12, **options: Any) -> Generation:
    return Generation(prompt=prompt, max_tokens=max_tokens, sampling=Sampling(temperature=0), blend=blend, **options)


def ask(llm: LLM, prompt: Prompt, blend: Blend | None = None, **options: Any) -> Done:
    return ask_for(llm, wish(prompt, blend, **options))


def ask_for(llm: LLM, generation: Generation) -> Done:
    *_, done = llm.service.events(generation)
    assert isinstance(done, Done)
    return done


def first_logprobs(llm: LLM, prompt: Prompt, blend: Blend | None, **options: object) -> dict[int, float]:
    """Of the most probable first tokens."""
    generation = Generation(
        prompt=prompt,
        max_tokens=1,
        sampling=Sampling(temperature=0, top_logprobs=TOP),
        blend=blend,
        **options,  # type: ignore[arg-type]
    )
    (info,) = next(
        event.tokens for event in llm.service.events(generation) if isinstance(event, Piece) and event.tokens
    )
    return {token: logprob for token, _, logprob in info.top}


def distance(one: dict[int, float], other: dict[int, float]) -> float:
    shared = set(one) & set(other)
    assert len(shared) >= TOP // 2
    return max(abs(one[token] - other[token]) for token in shared)


@pytest.fixture(scope="module", params=["llama", "torch"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with load(request.param) as llm:
        yield llm


@pytest.fixture
def learned(llm: LLM) -> LLM:
    """It has met the story's chunks in another order, and nothing else."""
    llm.clear_cache()
    met = ask(llm, prompt_of(story().asked[0], met=True), Blend())
    assert met.usage.cached_tokens == 0 and met.plan.chunks and not met.plan.blended
    assert llm.service.study(60)
    return llm


def test_moved_chunks_are_placed_and_the_rest_is_computed(learned: LLM) -> None:
    prompt = prompt_of(story().asked[0])
    before = learned.service.num_computed
    done = ask(learned, prompt, Blend("first", 0.15), max_tokens=1)
    assert learned.service.num_computed - before == done.usage.computed_tokens == done.plan.computed
    assert done.usage.blended_tokens > 0.4 * len(prompt)
    assert all(chunk.placed or chunk.exact for chunk in done.plan.chunks)
    for chunk in done.plan.chunks:
        share = chunk.recomputed / (chunk.placed + chunk.recomputed) if chunk.placed else 0.15
        filled_up = chunk.recomputed < SHORT_REST + 1 and "takes no longer" in (chunk.why or "")
        assert share == pytest.approx(0.15, abs=0.01) or (filled_up and share > 0.15)
    remembered = ask(learned, prompt, Blend("auto", 0.15), max_tokens=1)
    assert any("differed most" in (chunk.why or "") for chunk in remembered.plan.chunks)
    learned.service.check_integrity()


def test_questions_across_chunks_are_answered_as_by_full_prefill(learned: LLM) -> None:
    for asked in story().asked:
        prompt = prompt_of(asked)
        blended = ask(learned, prompt, Blend("remembered", 0.15))
        assert blended.text.strip() in [answer.strip() for answer in asked.answers]
        assert blended.tokens == ask(learned, prompt, use_prefix_cache=False).tokens


def test_chunks_that_were_warmed_ahead_are_learned_when_they_are_placed(llm: LLM) -> None:
    llm.clear_cache()
    for chunk in story().chunks:
        assert llm.service.warm(llm.service.chunk_prompt(chunk)).stored_bytes
    prompt = prompt_of(story().asked[0], met=True)
    assert ask(llm, prompt, Blend("auto", 0.15), max_tokens=1).usage.blended_tokens > 0.4 * len(prompt)
    assert llm.service.study(60)
    for asked in story().asked:
        done = ask(llm, prompt_of(asked), Blend("auto", 0.1))
        assert done.text.strip() in [answer.strip() for answer in asked.answers]
        assert sum("differed most" in (chunk.why or "") for chunk in done.plan.chunks) >= 2
    llm.service.check_integrity()


def test_at_ratio_1_all_is_full_prefill_and_without_recomputing_it_is_not(
    learned: LLM, request: pytest.FixtureRequest
) -> None:
    rounding = ROUNDING[request.node.callspec.params["llm"]]
    prompt = prompt_of(story().asked[0])
    full = first_logprobs(learned, prompt, None, use_prefix_cache=False)
    harmed = first_logprobs(learned, prompt, Blend("none", 0))
    assert distance(full, harmed) > 10 * rounding
    assert distance(full, first_logprobs(learned, prompt, Blend("auto", 1.0))) < rounding


def test_a_blended_tail_never_reaches_an_exact_request(learned: LLM, request: pytest.FixtureRequest) -> None:
    rounding = ROUNDING[request.node.callspec.params["llm"]]
    prompt = prompt_of(story().asked[0])
    full = first_logprobs(learned, prompt, None, use_prefix_cache=False)
    blended = ask(learned, prompt, Blend("none", 0), max_tokens=4)
    exact = blended.plan.exact
    assert exact < 0.6 * len(prompt) and blended.kept == 0
    assert learned.service.settle(60)
    learned.service.evict_residents()
    done = ask(learned, prompt, max_tokens=1)
    assert done.usage.cached_tokens <= exact and done.usage.blended_tokens == 0
    assert distance(full, first_logprobs(learned, prompt, None)) < rounding
    learned.service.check_integrity()


def test_several_answers_read_their_blended_prompt_once(learned: LLM, request: pytest.FixtureRequest) -> None:
    rounding = ROUNDING[request.node.callspec.params["llm"]]
    prompt, events = prompt_of(story().asked[0]), [queue.SimpleQueue[Event]() for _ in range(3)]
    several = replace(
        wish(prompt, Blend("none", 0), ignore_eos=True), sampling=Sampling(temperature=0, top_logprobs=TOP)
    )

    def submit(_: object) -> None:
        for each in events:
            learned.service.submit(several, each.put)

    learned.service.run_on_engine(submit)  # between two steps, so that none is over before the others have come
    answers = [_until_done(each) for each in events]
    dones = [answer[-1] for answer in answers]
    infos = [[info for event in answer if isinstance(event, Piece) for info in event.tokens] for answer in answers]
    assert isinstance(dones[0], Done) and dones[0].usage.computed_tokens > 0
    for done, info in zip(dones[1:], infos[1:], strict=True):
        assert isinstance(done, Done) and done.usage.computed_tokens == 0 and done.kept == 0
        assert done.usage.blended_tokens == dones[0].usage.blended_tokens > 0
        assert info[0] == infos[0][0], "from the same logits"
        second, expected = ({token: logprob for token, _, logprob in each[1].top} for each in (info, infos[0]))
        assert distance(second, expected) < rounding, "on the same KV"
    full = first_logprobs(learned, prompt, None, use_prefix_cache=False)
    assert distance(full, first_logprobs(learned, prompt, None)) < rounding, "which nobody else has"
    learned.service.check_integrity()


def _until_done(events: queue.SimpleQueue[Event]) -> list[Event]:
    found = [events.get()]
    while not isinstance(found[-1], Done | Failed):
        found.append(events.get())
    return found


def test_another_salt_has_no_chunk(learned: LLM) -> None:
    done = ask(learned, prompt_of(story().asked[0], salt=b"other"), Blend(), max_tokens=1)
    assert done.usage.cached_tokens == 0 and not done.plan.blended


@pytest.mark.parametrize("engine", ["llama", "torch"])
def test_a_restart_knows_chunks_and_what_was_learned_of_them(engine: str, tmp_path: Path) -> None:
    asked = story().asked[0]
    with load(engine, store=str(tmp_path)) as llm:
        ask(llm, prompt_of(asked, met=True), Blend(), max_tokens=1)
        assert llm.service.study(60)
        before = ask(llm, prompt_of(asked), Blend("auto", 0.15))
    with load(engine, store=str(tmp_path)) as llm:
        after = ask(llm, prompt_of(asked), Blend("auto", 0.15))
        assert after.tokens == before.tokens
        assert after.usage.blended_tokens >= before.usage.blended_tokens > 0
        places = [step.reason for step in after.plan.steps if "moved by" in step.reason]
        assert all("fetched from disk" in reason for reason in places)
        assert any("differed most" in (chunk.why or "") for chunk in after.plan.chunks)
        llm.service._probed.result(60)  # what is in the folder is counted then
        llm.service.check_integrity()


@pytest.mark.parametrize("engine", ["llama", "torch"])
def test_blended_requests_are_swapped_and_go_on(engine: str) -> None:
    """Three at once, in cells for less than two with their answers, say what each says alone."""
    prompts = [prompt_of(story().asked[number]) for number in (0, 1, 0)]
    prompts[2] = replace(prompts[2], tokens=np.append(prompts[2].tokens, prompts[2].tokens[-2:]))
    longest = max(map(len, prompts))
    with load(engine, context=2 * longest + 30) as llm:
        ask(llm, prompt_of(story().asked[0], met=True), Blend(), max_tokens=1)
        assert llm.service.study(60)
        wishes = [wish(prompt, Blend("first", 0.15), max_tokens=120, ignore_eos=True) for prompt in prompts]
        alone = [ask_for(llm, each) for each in wishes]
        llm.service.evict_residents()
        inbox: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()

        def submit(_: object) -> None:
            for number, each in enumerate(wishes):
                llm.service.submit(each, partial(lambda number, event: inbox.put((number, event)), number))

        llm.service.run_on_engine(submit)  # between two steps, so that none is over before the others have come
        together: dict[int, Done] = {}
        while len(together) < len(wishes):
            number, event = inbox.get(timeout=300)
            assert not isinstance(event, Failed)
            if isinstance(event, Done):
                together[number] = event
        assert llm.service.metrics.registry.get_sample_value("rekindle_swaps_total")
        for number, one in enumerate(alone):
            assert together[number].usage.blended_tokens > 0.4 * len(prompts[number])
            assert together[number].tokens[:12] == one.tokens[:12]
        llm.service.check_integrity()


def test_a_service_closes_with_chunks_still_to_be_studied(llm: LLM) -> None:
    engine = "torch" if llm.service.health()["engine"] == "torch" else "llama"
    with load(engine) as hurried:
        hurried.service._worker._lull = Lull(1000.0, 1000.0)  # so that nothing is studied before it is closed
        ask(hurried, prompt_of(story().asked[0]), Blend(), max_tokens=1)
        assert not hurried.service.study(0)


def test_chunks_that_are_longer_than_the_context_are_refused(llm: LLM) -> None:
    chunk = np.concatenate([story().chunks[0]] * 40)
    with pytest.raises(PromptTooLong, match="the context holds"):
        ask(llm, join([(story().before, False), (chunk, True), (story().mark, False)]), Blend())


def test_selections_that_have_to_look_are_refused_where_the_engine_cannot(llm: LLM) -> None:
    if llm.service.engine_spec.can_look:
        return
    for select in ("deviation", "query"):
        with pytest.raises(InvalidRequest, match=r"one of none, first, remembered, auto, got .* the torch engine can"):
            ask(llm, prompt_of(story().asked[0]), Blend(select, 0.15))  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match=r"one of none, first, remembered, auto, got .* the torch engine can"):
            llm.generate(["Read.", rekindle.Chunk("one"), "?"], blend={"select": select})
    with pytest.raises(InvalidRequest, match="auto, got 'frist'; did you mean 'first'"):
        llm.generate(["Read.", rekindle.Chunk("one"), "?"], blend={"select": "frist"})
