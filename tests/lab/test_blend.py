"""The blend experiment on the built-in model: its tasks cross chunks, its arms do what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rekindle.engine.llama import LlamaEngine
from rekindle.engine.protocol import Engine, Work
from rekindle.errors import InvalidRequest, ModelError
from rekindle.lab.blend import run_blend
from rekindle.lab.blend_peer import measure_peer
from rekindle.lab.blend_run import ChunkKV, met_before, read_after, read_blended, read_fully
from rekindle.lab.blend_show import plot_report, print_report, print_speed
from rekindle.lab.blend_speed import SEPARATOR, Texts, measure_speed, speed_settings
from rekindle.lab.blend_tasks import BlendTask, ember_tasks
from rekindle.lab.load.servers import PEER
from rekindle.model import ember
from rekindle.model.gguf import GgufModel
from rekindle.model.source import BUILTIN, locate
from rekindle.reuse.blend import Blend
from rekindle.reuse.plan import Place
from rekindle.reuse.prompt import Prompt, join
from rekindle.serve.request import Done, Generation, Sampling
from rekindle.serve.service import Service
from rekindle.settings import Settings
from rekindle.tokens import Tokens, as_tokens


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    model = GgufModel(ember.weights_path())
    engine = LlamaEngine(model, num_cells=8192, threads=1, max_sequences=16)
    yield engine
    engine.check_integrity()
    engine.shutdown()
    model.close()


@pytest.fixture(scope="module")
def task() -> BlendTask:
    return min(islice(ember_tasks(1), 4), key=lambda task: len(task.prompt))


def logits_after(engine: Engine, seq: int, tokens: Tokens) -> np.ndarray:
    logits = engine.forward([Work(seq, tokens)])[seq].copy()
    engine.close(seq)
    return logits


def test_tasks_have_chunks_in_another_order_and_questions_that_cross_them() -> None:
    for task in islice(ember_tasks(0), 5):
        assert len(task.chunks) >= 3 and sorted(task.met) == list(range(len(task.chunks)))
        assert task.asked and {asked.kind for asked in task.asked} <= {"coreference", "two-hop"}
        assert len(task.prompt) == len(task.met_prompt) < 4000
        assert [len(chunk) for chunk in task.prompt.chunks] == [len(chunk) for chunk in task.chunks]


def test_tasks_are_made_without_the_torch_extra() -> None:
    missing = dict.fromkeys(("torch", "transformers", "tokenizers", "safetensors"))
    program = f"import sys; sys.modules |= {missing}; from rekindle.lab.blend_tasks import ember_tasks; "
    subprocess.run([sys.executable, "-c", program + "next(ember_tasks())"], check=True)


@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5, 1.0])
def test_what_is_computed_is_what_the_plan_says(engine: Engine, task: BlendTask, ratio: float) -> None:
    kv = ChunkKV(engine, task.before[:1])
    for chunk in task.chunks:
        kv.warm(chunk)
    reading = read_blended(engine, task.prompt, kv, Blend("first", ratio))
    assert reading.computed == reading.plan.computed
    assert engine.length(reading.seq) == len(task.prompt)
    assert (engine.tokens(reading.seq) == task.prompt.tokens).all()
    full = logits_after(engine, read_fully(engine, task.prompt).seq, task.asked[0].tokens)
    blended = logits_after(engine, reading.seq, task.asked[0].tokens)
    difference = float(np.abs(full - blended).max())
    Console().print(f"ratio {ratio}: largest difference of logits {difference:.6f}, their deviation {full.std():.2f}")
    assert (difference < 0.1) == (ratio == 1)


def test_turning_at_once_and_one_by_one_give_the_same(engine: Engine, task: BlendTask) -> None:
    kv = ChunkKV(engine, task.before[:1])
    for chunk in task.chunks:
        kv.warm(chunk)
    calls, results = [], []
    for at_once in (True, False):
        reading = read_blended(engine, task.prompt, kv, Blend("first", 0.15), at_once=at_once)
        calls.append(reading.calls)
        results.append(logits_after(engine, reading.seq, task.asked[0].tokens))
    assert calls[0] == calls[1] == len(task.chunks) + 1, "a gap and the first tokens behind it are one call"
    assert np.abs(results[0] - results[1]).max() < 0.1


def test_remembered_scores_find_the_reference_that_crosses(engine: Engine, task: BlendTask) -> None:
    kv = ChunkKV(engine, task.before[:1])
    engine.close(met_before(engine, task, kv))
    assert len(kv.memory) == len(task.chunks)
    full = logits_after(engine, read_fully(engine, task.prompt).seq, task.asked[0].tokens)
    errors = {}
    for select, ratio in (("none", 0.0), ("remembered", 0.15)):
        reading = read_blended(engine, task.prompt, kv, Blend(select, ratio))  # type: ignore[arg-type]
        errors[select] = float(np.abs(logits_after(engine, reading.seq, task.asked[0].tokens) - full).max())
    assert errors["remembered"] < errors["none"] / 2


def test_same_chunk_twice_empty_missing_and_only_hits(engine: Engine, task: BlendTask) -> None:
    kv, chunk, gap = ChunkKV(engine, task.before[:1]), task.chunks[0], task.mark
    kv.warm(chunk)
    unknown = task.chunks[1]
    empty = as_tokens([])
    twice = join([(task.before, False), (chunk, True), (empty, True), (chunk, True), (unknown, True), (chunk, True)])
    for prompt in (twice, join([(chunk, True)]), join([(task.before, False), (empty, True), (gap, False)])):
        for ratio in (0.0, 0.15, 1.0):
            reading = read_blended(engine, prompt, kv, Blend("first", ratio))
            assert (engine.tokens(reading.seq) == prompt.tokens).all()
            engine.close(reading.seq)
    plan = read(engine, kv, twice)
    assert [step.chunk for step in plan if isinstance(step, Place)] == [0, 2, 4], "a missing chunk stops nothing"


def read(engine: Engine, kv: ChunkKV, prompt: Prompt) -> tuple[object, ...]:
    reading = read_blended(engine, prompt, kv, Blend("none", 0.0))
    engine.close(reading.seq)
    Console().print(json.dumps(reading.plan.as_dict(), indent=1))
    return reading.plan.steps


def test_prefix_arm_shares_what_was_met_before(engine: Engine, task: BlendTask) -> None:
    met = read_fully(engine, task.met_prompt).seq
    again = read_after(engine, task.met_prompt, met)
    assert again.computed == 1
    for seq in (met, again.seq):
        engine.close(seq)


def test_the_report_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_blend(engine="llama", documents=1, ratios=(0.15,))
    arms = {(arm.select, arm.ratio): arm for arm in report.arms}
    assert set(arms) == {("full", 1.0), ("prefix", 0.0), ("none", 0.0)} | {
        (s, 0.15) for s in ("first", "remembered", "auto")
    }
    assert arms["full", 1.0].exact_match_of_full == arms["full", 1.0].ttft_of_full == arms["full", 1.0].budget == 1
    assert arms["none", 0.0].exact_match < arms["full", 1.0].exact_match
    assert arms["none", 0.0].kl > arms["remembered", 0.15].kl >= -1e-9
    assert arms["prefix", 0.0].exact_match == arms["full", 1.0].exact_match
    assert report.best.ratio <= 0.2 and report.largest_difference < 0.1
    print_report(report, Console(width=200))
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {
        "select",
        "ratio",
        "exact_match",
        "exact_match_of_full",
        "f1",
        "kl",
        "ttft_of_full",
        "budget",
        "interval",
    } <= set(told["arms"][0])
    plot_report(report, tmp_path / "blend.png")
    assert (tmp_path / "blend.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_server_answers_what_crosses_chunks_as_full_prefill_does() -> None:
    """Warmed chunks in the tasks' order, through the worker and its store."""
    arms = {"full": None, "none": Blend("none", 0.0), "first": Blend("first", 0.15), "auto": Blend("auto", 0.15)}
    right: dict[str, int] = dict.fromkeys(arms, 0)
    with Service.open(Settings(store="none", threads=1, context=12_000)) as service:
        for task in islice(ember_tasks(7), 1, 3):
            for chunk in task.chunks:
                service.warm(service.chunk_prompt(chunk))
            for asked in task.asked:
                tokens = np.concatenate([task.prompt.tokens, asked.tokens])
                prompt = Prompt(tokens, chunks=task.prompt.chunks)
                for name, blend in arms.items():
                    text = said(service, prompt, asked.max_tokens, blend)
                    right[name] += text.strip() == asked.answers[0]
    assert right["full"] == right["first"] == right["auto"] > right["none"] + 3, right


def said(service: Service, prompt: Prompt, max_tokens: int, blend: Blend | None) -> str:
    greedy = Sampling(temperature=0)
    wish = Generation(prompt=prompt, max_tokens=max_tokens, sampling=greedy, blend=blend, use_prefix_cache=bool(blend))
    (done,) = [event for event in service.events(wish) if isinstance(event, Done)]
    return done.text


@pytest.mark.parametrize("engine", ["llama", "torch"])
def test_speed_counts_the_work_of_each_way(engine: str) -> None:
    with Service.open(speed_settings("builtin", engine, 1, 3, 128, None)) as service:
        report = measure_speed(service, num_chunks=3, chunk_tokens=128, rounds=2)
    full, none, first = report.arms
    assert full.budget == full.ttft_of_full == 1 and full.prompt_tokens > 3 * 110
    assert 0 < none.budget < 0.7 and 0.14 < first.budget < 0.7  # more than asked for, where that takes no longer
    assert report.note == "no folder"


def test_speed_from_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How much of it is fetched, and not computed sooner, depends on the machine."""
    with Service.open(speed_settings("builtin", "llama", 1, 3, 128, tmp_path)) as service:
        report = measure_speed(service, num_chunks=3, chunk_tokens=128, rounds=2)
    assert all(0 < arm.budget <= 1 and arm.ttft_seconds > 0 for arm in report.arms)
    print_speed(report, Console(width=200))
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [arm["name"] for arm in told["arms"]] == ["full", "none", "first", "first, from disk"]
    assert told["note"].endswith("out of the page cache")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs the peer's wheel")
def test_the_peer_is_asked_the_same_and_tells_what_it_reused() -> None:
    with Service.open(Settings.load(engine="toy")) as service:
        texts = Texts.draw(service.model.tokenizer, 3, 300, 0)
    arms, note = measure_peer(locate(BUILTIN), texts, peer=PEER, threads=1, context=4096, ratio=0.15, rounds=2)
    ours_full, ours, theirs_full, theirs = arms
    assert ours_full.budget == theirs_full.budget == 1
    assert abs(ours.prompt_tokens - theirs.prompt_tokens) < 0.02 * ours.prompt_tokens  # one cuts chunks apart
    assert ours.budget < 0.3 and 0 < theirs.computed <= theirs.prompt_tokens
    assert "with --cache-reuse 256 reused" in note


def test_orders_are_new_each_time_and_begin_with_another_chunk() -> None:
    texts = Texts(tuple("abcde"))
    orders = [list(range(5)), *texts.orders(20, 3)]
    for before, after in pairwise(orders):
        assert sorted(after) == list(range(5)) and after[0] != before[0]
    assert orders[1:] == list(texts.orders(20, 3))
    assert texts.prompt([1, 0]) == SEPARATOR.join([texts.begin, "b", "a", texts.question])


def test_a_model_whose_kv_cannot_be_moved_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REKINDLE_KV_TYPE", "q8_0")  # its heads are too narrow for that
    with pytest.raises(InvalidRequest, match=r"ember \(llama, q8_0\) can't be blended: .* or another kv_type"):
        run_blend(engine="llama", documents=1)


def test_other_models_need_examples(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="--data"):
        run_blend(str(ember.weights_path()), documents=1)
    with pytest.raises(ModelError, match="there is no model file"):
        run_blend(str(tmp_path / "none.gguf"), documents=1)
