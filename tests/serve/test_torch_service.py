"""The service on the torch engine and the built-in model: what needs settings of its own, and bad combinations of them."""

from __future__ import annotations

import queue
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rekindle
from rekindle.errors import InvalidRequest, ModelError, RekindleError
from rekindle.model import ember
from rekindle.serve.local import LLM
from rekindle.serve.request import Done, Event, Failed, Generation, Sampling

STORY = "Vodris paints in orange. This one works as a farmer. Nouraix is based in Viniton. "
ASK = [{"role": "user", "content": STORY + "What does Vodris work as?"}]


def load(**settings: object) -> LLM:
    given = {"engine": "torch", "threads": 1, "store": "none", "store_flush_seconds": 60} | settings
    return rekindle.load(**given)  # type: ignore[arg-type]


def answered(llm: LLM, salt: bytes = b"") -> Done:
    prompt = llm.service.text_prompt(STORY * 4, salt=salt)
    *_, done = llm.service.events(Generation(prompt=prompt, max_tokens=6, sampling=Sampling(temperature=0)))
    assert isinstance(done, Done)
    return done


def test_a_folder_is_served_by_torch_without_being_asked() -> None:
    with rekindle.load(str(ember.hf_path()), threads=1, store="none") as llm:
        health = llm.service.health()
        assert (health["engine"], health["model"]) == ("torch", "hf")
        assert llm.service.engine_spec.kv_type == "float32"  # its weights are float16, which is none for a CPU
        assert llm.generate(ASK) == " Vodris works as a farmer."


def test_both_engines_say_the_same() -> None:
    with load() as one, load(engine="llama") as other:
        assert one.generate(ASK) == other.generate(ASK)
        assert one.service.engine_spec.fingerprint != other.service.engine_spec.fingerprint


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_type_is_that_of_kv_too(dtype: str) -> None:
    with load(dtype=dtype) as llm:
        assert llm.service.engine_spec.kv_type == dtype
        assert llm.service.engine_spec.kv_bytes_per_token == 1024
        assert llm.generate(ASK) == " Vodris works as a farmer."


def test_after_a_restart_nothing_is_computed_before_the_first_token(tmp_path: Path) -> None:
    with load(store=str(tmp_path)) as llm:
        cold = answered(llm)
    with load(store=str(tmp_path)) as llm:
        warm = answered(llm)
        assert warm.tokens == cold.tokens
        assert (cold.usage.cached_tokens, warm.usage.computed_tokens, warm.timings.prefill_calls) == (0, 0, 0)
    with load(store=str(tmp_path), dtype="bfloat16") as llm:
        assert answered(llm).usage.cached_tokens == 0
    with load(store=str(tmp_path), engine="llama") as llm:
        assert answered(llm).usage.cached_tokens == 0


def test_two_salts_share_nothing(tmp_path: Path) -> None:
    with load(store=str(tmp_path)) as llm:
        assert [answered(llm, salt).usage.cached_tokens for salt in (b"one", b"two")] == [0, 0]
        llm.service.evict_residents()
        assert [answered(llm, salt).usage.computed_tokens for salt in (b"one", b"two")] == [0, 0]
        llm.service.check_integrity()


def test_a_pinned_prompt_survives_pressure() -> None:
    prompts = [f"{number}. {STORY * 8}" for number in range(8)]
    with load(dtype="bfloat16", context=2048, store_memory=600_000, max_residents=0) as llm:
        pin = llm.pin(prompts[0], ttl="10m", raw=True)
        for prompt in prompts:
            llm.generate(prompt, max_tokens=2, raw=True)
        for prompt, known in ((prompts[0], pin.num_tokens), (prompts[1], 0)):
            llm.generate(prompt, max_tokens=2, raw=True)
            assert llm.last is not None and llm.last.usage.cached_tokens == known


def test_requests_that_were_swapped_out_answer_as_if_alone() -> None:
    stories = [f"{number}. {STORY * 2}" for number in range(4)]
    inbox: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    with load(context=320, max_residents=0) as llm:
        service = llm.service

        def submit(number: int) -> None:
            greedy = Sampling(temperature=0)
            prompt = service.text_prompt(stories[number])
            generation = Generation(
                prompt=prompt, max_tokens=60, sampling=greedy, ignore_eos=True, use_prefix_cache=False
            )
            service.submit(generation, lambda event: inbox.put((number, event)))

        def collect(count: int) -> dict[int, tuple[int, ...]]:
            ended: dict[int, tuple[int, ...]] = {}
            while len(ended) < count:
                number, event = inbox.get(timeout=120)
                assert not isinstance(event, Failed), event
                if isinstance(event, Done):
                    ended[number] = tuple(event.tokens)
            return ended

        alone = {}
        for number in range(4):
            submit(number)
            alone |= collect(1)

        def submit_all(_: object) -> None:
            for number in range(4):
                submit(number)

        service.run_on_engine(submit_all)  # between two steps, so that none is over before the others have come
        assert collect(4) == alone
        assert (service.metrics.registry.get_sample_value("rekindle_swaps_total") or 0) >= 1
        service.check_integrity()


REFUSED: list[tuple[dict[str, str | int], type[RekindleError], str]] = [
    ({"kv_type": "q8_0"}, InvalidRequest, "kv_type q8_0 is for llama.cpp"),
    ({"gpu_layers": 3}, InvalidRequest, "gpu_layers is for llama.cpp; the torch engine takes device"),
    ({"engine": "llama", "device": "cuda"}, InvalidRequest, "llama.cpp takes gpu_layers"),
    ({"engine": "llama", "dtype": "bfloat16"}, InvalidRequest, "dtype is for the torch engine"),
    ({"model": str(ember.hf_path()), "engine": "llama"}, ModelError, "is a folder, and llama.cpp reads .gguf files"),
    ({"model": str(ember.weights_path())}, ModelError, "is a file, and the torch engine reads folders"),
    ({"model": "no/where"}, ModelError, "there is no model file at no/where"),
]


@pytest.mark.parametrize(("settings", "kind", "reason"), REFUSED, ids=lambda value: str(value)[:40])
def test_settings_that_do_not_go_together_are_refused(
    settings: dict[str, str | int], kind: type[RekindleError], reason: str
) -> None:
    given = {"engine": "torch", "threads": 1, "store": "none"} | settings
    with pytest.raises(kind, match=reason):
        rekindle.load(str(given.pop("model", "builtin")), **given)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    if {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[device]:
        pytest.skip("it is there")
    with pytest.raises(ModelError, match=f"device {device} was asked for, but PyTorch .* it finds: "):
        load(device=device)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_more_cells_than_there_is_memory_for_are_refused() -> None:
    """So many that the first layer alone has no room: what had room would be filled before."""
    script = """
import resource, torch, transformers, rekindle
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
rekindle.load(engine="torch", threads=1, store="none", context=60_000_000)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stderr.splitlines()[-1]
    assert "ModelError: cannot make an engine of 60,000,000 cells for ember: " in said
    assert "memory" in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_answer_is_the_same() -> None:
    with load(device="cuda") as llm:
        assert llm.generate(ASK) == " Vodris works as a farmer."
        assert llm.service.engine_spec.kv_type == "float16"


def test_without_torch_asking_for_it_says_what_to_install() -> None:
    script = """
import sys, rekindle
for missing in ("torch", "transformers", "tokenizers"):
    sys.modules[missing] = None
    try:
        rekindle.load(engine="torch", store="none")
    except rekindle.ModelError as error:
        print(error)
    del sys.modules[missing]
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    said = run.stdout.splitlines()
    assert len(said) == 3 and all("pip install 'rekindle[torch]'" in each for each in said), run.stdout + run.stderr


def test_other_engines_and_commands_load_no_torch() -> None:
    script = """
import sys
import rekindle, rekindle.serve.service, rekindle.cli.app, rekindle.cli.cache_place
with rekindle.load(threads=1, store="none") as llm:
    llm.generate("Hello", max_tokens=1)
print([name for name in ("torch", "transformers", "tokenizers") if name in sys.modules])
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said == "[]\n"
