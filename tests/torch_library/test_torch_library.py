"""KV reuse as a library, on models that the caller holds: the built-in one, and tiny ones of other architectures."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

import rekindle
from rekindle.engine.protocol import Work
from rekindle.errors import InvalidRequest, ModelError, PromptTooLong
from rekindle.kv.catalog import read_catalog
from rekindle.lab.torch_models import tiny_model
from rekindle.model import ember
from rekindle.serve.local import LLM
from rekindle.serve.request import Done, Generation, Sampling
from rekindle.tokens import as_tokens
from rekindle.torch import Cache, attach, from_dynamic_cache, generate, to_dynamic_cache

STORY = "Vodris paints in orange. This one works as a farmer. Nouraix is based in Viniton. " * 6


def ask(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{STORY}{question}"}]


WORK, TOWN = ask("What does Vodris work as?"), ask("Where is Nouraix based?")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ember.hf_path())


@pytest.fixture(scope="module")
def model() -> Any:
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(ember.hf_path(), dtype=torch.float32).eval()


def own_answer(model: Any, ids: list[int], count: int, **options: Any) -> list[int]:
    """What transformers' own generate says."""
    given = torch.tensor([ids])
    answer = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False, pad_token_id=0, **options
    )
    return answer[0, len(ids) :].tolist()


def served(llm: LLM, messages: list[dict[str, str]]) -> Done:
    generation = Generation(prompt=llm.service.chat_prompt(messages), max_tokens=20, sampling=Sampling(temperature=0))
    *_, done = llm.service.events(generation)
    assert isinstance(done, Done)
    return done


def noise(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(10, 512, count).tolist()


# generate


def test_cold_hit_and_hit_with_suffix(model: Any, tokenizer: Any) -> None:
    with Cache() as cache:
        cold, hit, suffix = (generate(model, tokenizer, prompt, cache=cache) for prompt in (WORK, WORK, TOWN))
        length = cold.prompt_tokens
        assert (cold.reused, cold.computed, cold.model_calls) == (0, length, 1)
        assert (hit.reused, hit.computed, hit.model_calls) == (length, 0, 0)
        assert suffix.reused >= length - 10 and suffix.computed < 10 and suffix.model_calls == 1
        assert cold.text == hit.text == " Vodris works as a farmer." and suffix.text == " Nouraix is based in Viniton."
        assert cold.tokens == hit.tokens and cold.finish_reason == "stop"
        for answer in (cold, hit, suffix):
            times = answer.timings
            assert times.total_ms == pytest.approx(times.ttft_ms + times.decode_ms)
            assert min(vars(times).values()) >= 0
        engine = cache.engine(model, tokenizer)
        engine.check_integrity()
        assert engine.num_free_cells == engine.num_cells  # nothing is left behind


def test_the_answer_is_that_of_transformers(model: Any, tokenizer: Any) -> None:
    ids = tokenizer.apply_chat_template(WORK, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = generate(model, tokenizer, ids, max_new_tokens=20)
    assert list(answer.tokens) == own_answer(model, ids, 20)
    assert generate(model, tokenizer, WORK, max_new_tokens=20).tokens == answer.tokens


def test_the_next_turn_finds_the_answer(model: Any, tokenizer: Any) -> None:
    with Cache() as cache:
        first = generate(model, tokenizer, WORK, cache=cache)
        said = {"role": "assistant", "content": first.text}
        turn = generate(model, tokenizer, [*WORK, said, {"role": "user", "content": "And who?"}], cache=cache)
        assert turn.reused >= first.prompt_tokens + len(first.tokens) - 1


def test_the_model_is_left_as_it_was(model: Any, tokenizer: Any) -> None:
    before, names = own_answer(model, [0, 3, 59, 334], 5), vars(model.config).copy()
    threads = set(threading.enumerate())
    with Cache() as cache:
        generate(model, tokenizer, WORK, cache=cache)
        assert own_answer(model, [0, 3, 59, 334], 5) == before  # between calls too
        with pytest.raises(InvalidRequest):
            generate(model, tokenizer, [5000], cache=cache)
        assert set(threading.enumerate()) <= threads
    assert vars(model.config) == names
    assert own_answer(model, [0, 3, 59, 334], 5) == before


_CHILD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from rekindle.torch import Cache, generate
folder, kv, prompt = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
with Cache(kv) as cache:
    print(generate(model, AutoTokenizer.from_pretrained(folder), prompt, cache=cache, max_new_tokens=8).text)
"""


def test_kv_of_one_process_is_used_by_the_next(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _CHILD, str(ember.hf_path()), str(tmp_path), STORY]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with Cache(tmp_path) as cache:
        again = generate(model, tokenizer, STORY, cache=cache, max_new_tokens=8)
    assert (again.text, again.computed, again.model_calls) == (said.removesuffix("\n"), 0, 0)
    assert "fetched from disk" in again.plan.steps[0].reason
    catalog = read_catalog(tmp_path)
    (fingerprint,) = catalog.fingerprints()
    assert catalog.labels[fingerprint]["kv_type"] == "float32"


def test_a_server_and_the_library_share_a_folder(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """In both directions: what one has computed the other does not compute."""
    with Cache(tmp_path) as cache:
        ours = generate(model, tokenizer, WORK, cache=cache)
        assert (ours.reused, ours.model_calls) == (0, 1)
    with rekindle.load(str(ember.hf_path()), threads=1, store=str(tmp_path), dtype="float32") as llm:
        assert llm.service.engine_spec.fingerprint == attach(model, tokenizer).spec.fingerprint
        theirs = served(llm, WORK)
        assert (theirs.usage.computed_tokens, theirs.text) == (0, ours.text)
        served(llm, TOWN)
    with Cache(tmp_path) as cache:
        again = generate(model, tokenizer, TOWN, cache=cache)
        assert (again.computed, again.model_calls, again.text) == (0, 0, " Nouraix is based in Viniton.")


def test_another_type_or_other_weights_find_nothing(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(ember.hf_path(), dtype=torch.bfloat16)
    with Cache(tmp_path) as cache:
        generate(model, tokenizer, STORY, cache=cache, max_new_tokens=1)
        assert generate(other, tokenizer, STORY, cache=cache, max_new_tokens=1).reused == 0
        assert generate(model, tokenizer, STORY, cache=cache, max_new_tokens=1).computed == 0


def test_weights_that_were_changed_are_noticed(tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(ember.hf_path(), dtype=torch.float32)
    with Cache() as cache:
        generate(model, tokenizer, STORY, cache=cache, max_new_tokens=1)
        engine = cache.engine(model, tokenizer)
        assert cache.engine(model, tokenizer) is engine
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight.mul_(1.01)
        assert generate(model, tokenizer, STORY, cache=cache, max_new_tokens=1).reused == 0
        assert cache.engine(model, tokenizer) is not engine


def test_two_salts_share_nothing(model: Any, tokenizer: Any) -> None:
    with Cache() as cache:
        reused = [generate(model, tokenizer, WORK, cache=cache, salt=salt).reused for salt in (b"a", b"b", b"a")]
        assert reused[:2] == [0, 0] and reused[2] > 100


def test_sampling_stops_and_limits(model: Any, tokenizer: Any) -> None:
    with Cache() as cache:
        assert generate(model, tokenizer, WORK, cache=cache, stop=" as").text == " Vodris works"
        short = generate(model, tokenizer, WORK, cache=cache, max_new_tokens=2)
        assert (len(short.tokens), short.finish_reason) == (2, "length")
        warm = {"temperature": 5.0, "seed": 3, "max_new_tokens": 6}
        one, two = (generate(model, tokenizer, WORK, cache=cache, **warm).tokens for _ in range(2))
        assert one == two != short.tokens


def test_what_cannot_be_answered_is_refused(model: Any, tokenizer: Any) -> None:
    with Cache(context=64) as cache:
        with pytest.raises(PromptTooLong, match=r"the context holds 64\. Give the cache a larger one"):
            generate(model, tokenizer, STORY, cache=cache)
        with pytest.raises(InvalidRequest, match="the prompt is empty"):
            generate(model, tokenizer, [], cache=cache)
        with pytest.raises(InvalidRequest, match="max_new_tokens must be 1 or more, got 0"):
            generate(model, tokenizer, "x", cache=cache, max_new_tokens=0)
        assert cache.engine(model, tokenizer).num_free_cells == 64
    with pytest.raises(ModelError, match=r"call model\.eval\(\) first"):
        generate(tiny_model("llama").train(), tokenizer, "x")


# past_key_values


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt-neox", "qwen3-moe"])
def test_kv_goes_to_transformers_and_back(name: str, tokenizer: Any) -> None:
    model = tiny_model(name)
    engine = attach(model, tokenizer, context=512)
    tokens = noise(1, 120)
    seq = engine.open()
    logits = engine.forward([Work(seq, as_tokens(tokens))])[seq].copy()
    taken = to_dynamic_cache(engine, seq, 119)
    with torch.inference_mode():
        theirs = model(input_ids=torch.tensor([tokens[119:]]), past_key_values=taken).logits[0, -1].numpy()
    assert np.abs(theirs - logits).max() < 1e-3
    full = DynamicCache()
    with torch.inference_mode():
        model(input_ids=torch.tensor([tokens]), past_key_values=full)
    back = from_dynamic_cache(engine, full, tokens)
    probe = [Work(each, as_tokens([42])) for each in (seq, back)]
    after = engine.forward(probe)
    assert np.abs(after[seq] - after[back]).max() < 1e-3
    engine.check_integrity()


def test_research_code_on_transformers_reuses_kv(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    ids = tokenizer(STORY + "And so on.")["input_ids"]
    plain = own_answer(model, ids, 8)
    with Cache(tmp_path) as cache:
        empty = cache.past(model, tokenizer, ids)
        assert empty.length == empty.past_key_values.get_seq_length() == 0
        assert own_answer(model, ids, 8, past_key_values=empty.past_key_values) == plain
        cache.keep(model, tokenizer, [*ids, *plain], empty.past_key_values)
    with Cache(tmp_path) as cache:
        known = cache.past(model, tokenizer, ids)
        assert known.length == known.past_key_values.get_seq_length() == len(ids) // 64 * 64
        assert own_answer(model, ids, 8, past_key_values=known.past_key_values) == plain
        served = generate(model, tokenizer, ids, cache=cache, max_new_tokens=8)
        assert served.reused == known.length and list(served.tokens) == plain
        generate(model, tokenizer, ids, cache=cache, max_new_tokens=1)
        assert cache.past(model, tokenizer, ids).length == len(ids) - 1  # one is left for transformers to compute


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_windows_forget_nothing_on_the_way(name: str, tokenizer: Any) -> None:
    """More tokens than every window, out to transformers, further there, back in, and out again."""
    model, ids = tiny_model(name), noise(5, 150)
    plain = own_answer(model, ids, 20, eos_token_id=None)
    with Cache(context=512) as cache:
        empty = cache.past(model, tokenizer, ids).past_key_values
        assert own_answer(model, ids, 20, past_key_values=empty, eos_token_id=None) == plain
        cache.keep(model, tokenizer, [*ids, *plain], empty)
        known = cache.past(model, tokenizer, ids)
        assert known.length == 128
        assert own_answer(model, ids, 20, past_key_values=known.past_key_values, eos_token_id=None) == plain


def test_a_cache_that_is_not_of_these_tokens_is_refused(model: Any, tokenizer: Any) -> None:
    engine = attach(model, tokenizer, context=256)
    full = DynamicCache()
    with torch.inference_mode():
        model(input_ids=torch.tensor([noise(2, 40)]), past_key_values=full)
    for cache, count, reason in [
        (full, 41, "holds 40 of 41 tokens"),
        (full, 39, r"K of layer 0 is \[1, 2, 40, 32\] in torch.float32, expected \[1, 2, 39, 32\]"),
        (DynamicCache(), 40, "a DynamicCache of 4 layers is expected, got 0 layers"),
        (object(), 40, "got no layers"),
    ]:
        with pytest.raises(InvalidRequest, match=reason):
            from_dynamic_cache(engine, cache, noise(2, count))
    full.layers[1].values = full.layers[1].values.half()
    with pytest.raises(InvalidRequest, match=r"V of layer 1 is .* in torch.float16, expected .* in torch.float32"):
        from_dynamic_cache(engine, full, noise(2, 40))
    assert engine.num_free_sequences == 16 and engine.num_free_cells == 256


def test_a_cache_that_has_forgotten_is_refused(tokenizer: Any) -> None:
    model = tiny_model("mistral")
    engine = attach(model, tokenizer, context=256)
    tokens, cache = noise(3, 100), DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.tensor([tokens]), past_key_values=cache)
    with pytest.raises(
        InvalidRequest, match=r"layer 0 of the cache holds 47 of 100 tokens; if it has a sliding window"
    ):
        from_dynamic_cache(engine, cache, tokens)


def test_the_public_names_are_there_without_an_import() -> None:
    code = """
import sys, rekindle
assert "torch" not in sys.modules
sys.modules["transformers"] = None
try:
    import rekindle.torch
except rekindle.ModelError as error:
    print(error)
del sys.modules["transformers"]
print(rekindle.torch.generate.__name__)
"""
    without, name = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()
    assert "transformers is not installed: pip install 'rekindle[torch]'" in without
    assert name == "generate"
