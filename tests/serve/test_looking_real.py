"""Choices that look first, on the torch engine and the built-in model: counts, quality, and the same through HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tests.serve.test_blending_real import ask, distance, first_logprobs, load, prompt_of, story

import rekindle
from rekindle.errors import InvalidRequest, PromptTooLong
from rekindle.reuse.blend import Blend
from rekindle.reuse.prompt import join
from rekindle.serve.local import LLM

ROUNDING = 0.001
LAYERS = 4
WAYS = [Blend("deviation", 0.15), Blend("deviation", 0.15, layer=2, judge="K"), Blend("query", 0.15)]


@pytest.fixture(scope="module")
def torch_llm() -> Iterator[LLM]:
    with load("torch") as llm:
        yield llm


@pytest.fixture
def llm(torch_llm: LLM) -> LLM:
    """It has the story's chunks at hand, on their own, and nothing else."""
    warm(torch_llm)
    return torch_llm


def warm(llm: LLM) -> None:
    llm.clear_cache()
    for chunk in story().chunks:
        llm.service.warm(llm.service.chunk_prompt(chunk))


@pytest.mark.parametrize("blend", WAYS, ids=lambda blend: blend.name(LAYERS))
def test_token_layers_are_those_of_the_report(llm: LLM, blend: Blend) -> None:
    prompt = prompt_of(story().asked[0])
    engine = llm.service._engine
    before = engine.num_token_layers
    done = ask(llm, prompt, blend, max_tokens=1)
    looked = done.plan.looked
    assert looked is not None
    assert engine.num_token_layers - before == done.plan.computed * LAYERS + looked.token_layers
    chunks = prompt.chunks
    if blend.select == "deviation":
        assert (looked.tokens, looked.layers) == (chunks[-1].stop - done.plan.begin, blend.judged_at(LAYERS))
    else:
        assert (looked.tokens, looked.layers) == (len(prompt) - done.plan.begin - sum(map(len, chunks)), LAYERS)
    share = sum(chunk.recomputed for chunk in done.plan.chunks) / sum(map(len, chunks))
    assert 0.149 < share < 0.18
    assert all(looked.reason in chunk.why for chunk in done.plan.chunks if chunk.recomputed and chunk.why)
    llm.service.check_integrity()


def test_deviation_answers_across_chunks_and_the_question_s_attention_does_not(llm: LLM) -> None:
    """As measured over many documents: docs/blending.md."""
    right = {}
    for blend in (*WAYS, Blend("none", 0.0)):
        said = [(ask(llm, prompt_of(asked), blend).text.strip(), asked.answers) for asked in story().asked]
        right[blend.name(LAYERS)] = sum(text in [answer.strip() for answer in answers] for text, answers in said)
    assert right["deviation V1"] == right["deviation K2"] == len(story().asked)
    assert right["none"] <= right["query"] < len(story().asked)


@pytest.mark.parametrize("select", ["deviation", "query"])
def test_ratio_1_is_full_prefill_and_0_is_none(llm: LLM, select: Any) -> None:
    prompt = prompt_of(story().asked[0])

    def read(blend: Blend) -> dict[int, float]:
        warm(llm)  # what was read exactly is gone
        return first_logprobs(llm, prompt, blend)

    full = first_logprobs(llm, prompt, None, use_prefix_cache=False)
    none = read(Blend("none", 0.0))
    assert distance(none, full) > 100 * ROUNDING
    assert distance(full, read(Blend(select, 1.0))) < ROUNDING
    assert distance(none, read(Blend(select, 0.0))) < ROUNDING
    # looked at, and nearly all of it computed
    assert distance(full, read(Blend(select, 0.99))) < distance(full, none) / 10


@pytest.mark.parametrize("select", ["deviation", "query"])
def test_edges(llm: LLM, select: Any) -> None:
    task = story()
    blend, question = Blend(select, 0.15), (task.asked[0].tokens, False)
    one, empty = (task.chunks[0], True), (task.chunks[0][:0], True)
    before, mark = (np.concatenate([task.before, task.mark]), False), (task.mark, False)
    for parts in ([before, one, question], [before, one, mark, one, question], [before, empty, one, empty, question]):
        prompt = join(parts)
        done = ask(llm, prompt, blend, max_tokens=2)
        assert done.plan.looked is not None and 0 < done.plan.blended < len(prompt)
    done = ask(llm, join([before, one]), blend, max_tokens=2)  # all of it at hand
    assert done.plan.looked is not None and done.plan.chunks[0].recomputed < 0.15 * len(task.chunks[0]) + 8
    with pytest.raises(PromptTooLong, match="the context holds"):
        ask(llm, join([before, (np.concatenate([task.chunks[0]] * 40), True), question]), blend)
    llm.service.check_integrity()


def test_layers_that_are_none_are_refused(llm: LLM) -> None:
    for layer in (4, 99):
        with pytest.raises(InvalidRequest, match=f"layer from 1 to 3 of .* 4 layers, .* got {layer}"):
            ask(llm, prompt_of(story().asked[0]), Blend("deviation", 0.15, layer=layer))


def test_python_and_settings_say_it_too() -> None:
    with load("torch", blend_select="deviation", blend_layer=2) as llm:
        passages = [
            rekindle.Chunk(text) for text in ("Vodris belongs to Nouraix. " * 20, "Nouraix is in Viniton. " * 20)
        ]
        for prompt in llm.service.chunk_prompts([passage.text for passage in passages], chat=False):
            llm.service.warm(prompt)
        parts = ["Answer from these passages.", *passages, "Where is Vodris?"]
        for wish, name in (
            (True, "V at layer 2"),
            ({"layer": 3, "judge": "K"}, "K at layer 3"),
            ({"select": "query"}, "question attends"),
        ):
            wished = llm.service.blend_of(wish, llm.service.text_prompt(parts))
            assert wished is not None and wished.looks
            looked = ask(llm, llm.service.text_prompt(parts), wished, max_tokens=1).plan.looked
            assert looked is not None and name in looked.reason
