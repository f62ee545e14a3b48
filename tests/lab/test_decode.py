"""The decode experiment: both arms do the same work, and the report's arithmetic is right. No speed is asserted."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rekindle.errors import InvalidRequest, ModelError
from rekindle.lab import machine
from rekindle.lab.bare import BareModel
from rekindle.lab.decode import (
    DecodeReport,
    Workload,
    bare_arm,
    measure_decode,
    print_report,
    run_decode,
    weight_bytes_per_token,
    worker_arm,
)
from rekindle.lab.machine import read_bandwidth, this_machine
from rekindle.lab.models import make_model
from rekindle.lab.shapes import SHAPES
from rekindle.serve.request import Done, Generation, Piece, Sink, TokenInfo


@pytest.fixture(autouse=True)
def small_bandwidth_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_BUFFER_BYTES", 8 << 20)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    return make_model("tiny-qwen3", "f16", tmp_path_factory.mktemp("model") / "m.gguf", tokenizer=tokenizer).path


class CountingModel(BareModel):
    """Remembers how many tokens each decode call had."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, threads=1, context=256)
        self.calls: list[int] = []

    def append(self, tokens: Any) -> Any:
        self.calls.append(len(tokens))
        return super().append(tokens)


def test_the_bare_arm_makes_one_call_for_each_token(model_file: Path) -> None:
    with CountingModel(model_file) as model:
        arm = bare_arm(model, [1, 2, 3])
        assert arm(5) > 0
        assert arm(5) > 0
        assert model.calls == [3, 1, 1, 1, 1, 1] * 2


class FakeService:
    """Gives the pieces it was given, one a second, as a worker would to a caller who sleeps; a test double."""

    def __init__(self, pieces: list[int]) -> None:
        self.pieces = pieces
        self.now = 0.0
        self.generations: list[Generation] = []
        self.cancelled = 0

    def token_prompt(self, ids: Any) -> Any:
        return list(ids)

    def submit(self, generation: Generation, sink: Sink) -> FakeService:
        self.generations.append(generation)
        for count in self.pieces:
            self.now += 1.0
            sink(Piece("x", tuple(TokenInfo(0, b"x") for _ in range(count))))
        unasked: Any = None
        sink(Done(reason="length", usage=unasked, timings=unasked, plan=unasked, text="", tokens=()))
        return self

    def cancel(self) -> None:
        self.cancelled += 1


def test_the_worker_arm_asks_for_one_token_more_than_it_times() -> None:
    service: Any = FakeService([2, 1, 0, 3])
    assert worker_arm(service, [1, 2, 3], clock=lambda: service.now)(5) > 0
    generation = service.generations[0]
    assert (generation.max_tokens, generation.ignore_eos, generation.use_prefix_cache) == (6, True, False)
    assert generation.sampling.temperature == 0


def test_a_caller_who_comes_late_does_not_make_the_worker_fast() -> None:
    service: Any = FakeService([1, 1, 1, 1, 1])
    assert worker_arm(service, [1, 2, 3], clock=lambda: service.now)(4) == 4.0
    assert service.cancelled == 1, "a request that ended in any way is given back"


def test_the_worker_arm_notices_missing_tokens() -> None:
    service: Any = FakeService([1, 1])
    with pytest.raises(ModelError, match="2 tokens where 6"):
        worker_arm(service, [1, 2, 3])(5)


def test_arms_alternate_and_the_first_pair_does_not_count(model_file: Path) -> None:
    workload = Workload(prompt_tokens=20, decode_tokens=8, rounds=3, threads=1, context=256)
    prompts: list[int] = []
    asked: list[int] = []

    def open_worker(prompt: Any) -> Any:
        prompts.extend(prompt)

        def decode(num_tokens: int) -> float:
            asked.append(num_tokens)
            return 100.0 if len(asked) == 1 else 0.5

        return decode

    report = measure_decode(model_file, workload, open_worker)
    assert len(prompts) == 20
    assert asked == [8] * 4
    assert report.worker_seconds == (0.5, 0.5, 0.5)
    assert len(report.bare_seconds) == 3
    assert report.worker_rate == 16.0


def test_the_report_knows_what_a_token_reads(model_file: Path) -> None:
    workload = Workload(prompt_tokens=64, decode_tokens=64, rounds=1, threads=1, context=256)
    report = measure_decode(model_file, workload, lambda prompt: lambda num_tokens: 1.0)
    shape = SHAPES["tiny-qwen3"]
    kv_per_token = shape.layers * shape.kv_heads * shape.head_dim * 2 * 2
    assert report.model.kv_bytes == pytest.approx(96 * kv_per_token, rel=0.1)  # mean length of the decoded stretch
    assert report.model.parameters * 2 < report.model.weight_bytes < report.model.parameters * 2.1  # vectors are f32


def test_ratio_is_the_median_of_pairs_and_the_limit_is_bandwidth_over_bytes(model_file: Path) -> None:
    workload = Workload(prompt_tokens=16, decode_tokens=10, rounds=1, threads=1, context=256)
    measured = measure_decode(model_file, workload, lambda prompt: lambda num_tokens: 1.0)
    report = replace(
        measured,
        bandwidth=1e9,
        model=replace(measured.model, weight_bytes=900_000, kv_bytes=100_000),
        bare_seconds=(1.0, 2.0, 3.0),
        worker_seconds=(2.0, 2.0, 1.0),
    )
    assert report.ratio == 1.0
    assert report.limit_rate == 1000.0
    assert report.bare_rate == 5.0


def test_the_whole_experiment_runs_on_a_real_worker(model_file: Path) -> None:
    report = run_decode(str(model_file), threads=1, prompt_tokens=16, decode_tokens=16, rounds=2, context=256)
    assert len(report.worker_seconds) == len(report.bare_seconds) == 2
    assert min(report.worker_seconds) > 0


def test_an_embedding_table_counts_only_if_it_is_the_output_matrix(tmp_path: Path, tokenizer: Path) -> None:
    tied = replace(SHAPES["tiny-llama"], tied=True)
    both = [
        make_model(shape, "f16", tmp_path / f"{i}.gguf", tokenizer=tokenizer).path
        for i, shape in enumerate((tied, SHAPES["tiny-llama"]))
    ]
    assert weight_bytes_per_token(both[0]) == weight_bytes_per_token(both[1])


def printed(report: DecodeReport) -> list[str]:
    out = io.StringIO()
    print_report(report, Console(file=out, width=120))
    return out.getvalue().splitlines()


def test_the_last_printed_line_is_json(model_file: Path) -> None:
    workload = Workload(prompt_tokens=16, decode_tokens=4, rounds=2, threads=1, context=256)
    lines = printed(measure_decode(model_file, workload, lambda prompt: lambda num_tokens: 1.0))
    record = json.loads(lines[-1])
    assert record["workload"]["decode_tokens"] == 4
    assert record["model"]["name"] == "m.gguf"
    assert record["machine"]["cores"] >= 1
    assert any("through the worker" in line for line in lines)


def test_a_workload_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="do not fit"):
        Workload(prompt_tokens=200, decode_tokens=100, threads=1, context=256)
    with pytest.raises(InvalidRequest, match="1 or more"):
        Workload(rounds=0, threads=1)


def test_the_machine_is_described() -> None:
    here = this_machine()
    assert here.processor and here.cores >= 1
    assert 1e8 < read_bandwidth(1) < 1e13


def test_a_full_context_is_an_error_and_not_a_crash(model_file: Path) -> None:
    with BareModel(model_file, threads=1, context=256) as model:
        with pytest.raises(ModelError, match="refused"):
            for _ in range(300):
                model.append([5])
        model.clear()
        assert np.isfinite(model.append([5])).all()
