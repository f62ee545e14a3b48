"""Models with sliding windows when cells run out: what is behind a window is given up, and no answer changes."""

from __future__ import annotations

import queue
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig

import rekindle
from rekindle.lab.torch_models import TINY, random_model
from rekindle.model import ember
from rekindle.reuse.blend import Blend
from rekindle.reuse.prompt import Chunk, Prompt
from rekindle.serve.local import LLM
from rekindle.serve.request import Done, Event, Failed, Generation, Sampling
from rekindle.tokens import as_tokens

WINDOW, LENGTH = 32, 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 of one layer that sees all and two that see 32 tokens, with the built-in model's tokenizer."""
    target = tmp_path_factory.mktemp("gemma3")
    config = Gemma3TextConfig(**TINY["gemma3"]().to_dict() | {"vocab_size": 2302, "bos_token_id": 0, "eos_token_id": 2})
    random_model(config, torch.float32).save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ember.hf_path() / name, target / name)
    return target


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    """Cells for two prompts and a half."""
    with rekindle.load(str(folder), threads=1, store="none", context=750, block_tokens=16, max_residents=8) as llm:
        assert llm.service.engine_spec.window == WINDOW
        yield llm
        llm.service.check_integrity()


def ids(seed: int, count: int = LENGTH) -> list[int]:
    return np.random.default_rng(seed).integers(10, 2302, count).tolist()


def generation(llm: LLM, tokens: list[int], *, reuses: bool = True, count: int = 12) -> Generation:
    return Generation(
        prompt=llm.service.token_prompt(tokens),
        max_tokens=count,
        sampling=Sampling(temperature=0),
        ignore_eos=True,
        use_prefix_cache=reuses,
    )


def answer(llm: LLM, tokens: list[int], **options: Any) -> Done:
    *_, done = llm.service.events(generation(llm, tokens, **options))
    assert isinstance(done, Done), done
    return done


def test_more_conversations_stay_in_the_engine_than_have_cells_for_all_layers(llm: LLM) -> None:
    prompts = [ids(seed) for seed in range(4)]
    first = [answer(llm, prompt) for prompt in prompts]
    assert [done.usage.computed_tokens for done in first] == [LENGTH] * 4
    llm.service.check_integrity()  # by the worker, whose step has ended then
    assert llm.stats().residents == 4, "four times 312 tokens, in 750 cells of a full and two windowed layers"
    for prompt, done in zip(prompts, first, strict=True):
        turn = [*prompt, *done.tokens, *ids(9, 5)]
        again = answer(llm, turn)
        assert again.usage.computed_tokens <= 6
        assert again.tokens == answer(llm, turn, reuses=False).tokens


def test_who_turns_off_behind_the_window_gets_stored_blocks(llm: LLM) -> None:
    prompts = [ids(seed) for seed in range(4)]
    for prompt in prompts:
        answer(llm, prompt)
    for start in (100, 200, 290):
        other = [*prompts[0][:start], *ids(7, 20)]
        done = answer(llm, other)
        assert done.usage.cached_tokens >= start // 16 * 16, "what came back is forked from the store's blocks"
        assert done.tokens == answer(llm, other, reuses=False).tokens
    repeated = answer(llm, prompts[1])
    assert repeated.usage.computed_tokens == 0
    assert repeated.tokens == answer(llm, prompts[1], reuses=False).tokens


@pytest.mark.parametrize("reuses", [True, False])
def test_running_requests_give_up_before_one_is_swapped_out(llm: LLM, reuses: bool) -> None:
    """Three that grow to 310 tokens each."""
    inbox: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()

    def submit(_: object) -> None:
        for number in range(3):
            wanted = generation(llm, ids(number, 60), reuses=reuses, count=250)
            llm.service.submit(wanted, lambda event, number=number: inbox.put((number, event)))  # type: ignore[misc]

    llm.service.run_on_engine(submit)  # between two steps, so that they run side by side
    ended: dict[int, tuple[int, ...]] = {}
    while len(ended) < 3:
        number, event = inbox.get(timeout=120)
        assert not isinstance(event, Failed), event
        if isinstance(event, Done):
            ended[number] = event.tokens
    assert llm.service.metrics.registry.get_sample_value("rekindle_swaps_total") == 0
    assert ended == {number: answer(llm, ids(number, 60), reuses=False, count=250).tokens for number in range(3)}


def test_a_chunk_that_a_window_has_passed_is_studied_without_looking_into_it(llm: LLM) -> None:
    prompts = [ids(seed) for seed in range(4)]
    first = [answer(llm, prompt) for prompt in prompts]  # after which the first can't be forked at the chunk's end
    tokens = as_tokens([*prompts[0], *first[0].tokens, *ids(9, 5)])
    prompt = Prompt(tokens, chunks=(Chunk(100, 200),))
    wanted = Generation(prompt=prompt, max_tokens=2, sampling=Sampling(temperature=0), blend=Blend("remembered"))
    *_, done = llm.service.events(wanted)
    assert isinstance(done, Done) and done.usage.computed_tokens <= 6, "from the resident that gave up going back"
    assert llm.service.study(60), "the worker lives on"
    chunk = llm.service.chunk_prompt(tokens[100:200])
    assert answer(llm, chunk.tokens.tolist()).usage.computed_tokens <= 1, "the chunk was warmed all the same"
