"""Speed of the torch engine on the CPU beside transformers' own `generate`: `rekindle lab torch SHAPE`.

**The physics.** Decoding one token reads every weight once, and the sequence's KV once, so no program decodes faster than

    memory bandwidth / (bytes of weights + bytes of KV)      tokens per second.

Streams that are decoded together share one reading of the weights. That is why eight streams give several times one
stream's tokens, and what they cannot exceed is eight times the limit above. Prefill shares it among all tokens of the
prompt and is bound by arithmetic instead: two operations per token and weight of a layer, so

    rate of products / (2 x weights of the layers)      tokens per second, and less by what attention takes.

**The comparison.** Both arms have the same model object in bfloat16 with random weights, the same threads, prompt and
number of tokens, and choose greedily. The first is `generate` with its dynamic cache, its clock read by a streamer, which
transformers calls with each token. The second is the engine: one call for the prompt, one for each token. They alternate in
one process, and ratios are medians over the pairs. The third, eight streams with prompts of their own, decodes as many
tokens for each.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from rekindle.engine.protocol import Work
from rekindle.engine.torch.engine import TorchEngine
from rekindle.engine.torch.identity import weights_digest
from rekindle.errors import InvalidRequest
from rekindle.lab.machine import Machine, read_bandwidth, this_machine, usable_cores
from rekindle.lab.torch_models import real_model
from rekindle.tokens import Tokens, as_tokens


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the arms do in each round."""

    prompt_tokens: int = 512
    decode_tokens: int = 32  # after the first, which the prompt's logits give
    streams: int = 8  # of the third arm
    rounds: int = 3  # that count; one more goes before as a warm-up
    threads: int

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.decode_tokens, self.streams, self.rounds, self.threads) < 1:
            raise InvalidRequest("prompt tokens, decode tokens, streams, rounds and threads must be 1 or more")


@dataclass(frozen=True)
class Seconds:
    """One arm's round."""

    prefill: float
    decode: float


@dataclass(frozen=True, kw_only=True)
class TorchSpeedReport:
    """What was measured."""

    machine: Machine
    torch: str  # version
    transformers: str
    shape: str
    layer_weights: int  # without embedding and output matrix
    weight_bytes: int  # read for each decoded token
    kv_bytes: int  # read for each decoded token, at the mean length
    workload: Workload
    start_seconds: float  # from a model to an engine: survey, check against the model, pool
    digest_seconds: float  # reading all weights for the fingerprint, which a server remembers
    bandwidth: float  # bytes per second
    products: float  # multiplications and additions per second, bfloat16
    load: tuple[float, float]  # of the machine over the last minute, before and after
    transformers_rounds: tuple[Seconds, ...]
    engine_rounds: tuple[Seconds, ...]
    stream_rounds: tuple[Seconds, ...]

    @property
    def prefill_ratio(self) -> float:
        pairs = zip(self.transformers_rounds, self.engine_rounds, strict=True)
        return median(one.prefill / other.prefill for one, other in pairs)

    @property
    def decode_ratio(self) -> float:
        pairs = zip(self.transformers_rounds, self.engine_rounds, strict=True)
        return median(one.decode / other.decode for one, other in pairs)

    @property
    def streams_ratio(self) -> float:
        """Tokens per second of all streams together over one stream's."""
        pairs = zip(self.engine_rounds, self.stream_rounds, strict=True)
        return self.workload.streams * median(one.decode / all_of_them.decode for one, all_of_them in pairs)

    @property
    def decode_limit(self) -> float:
        return self.bandwidth / (self.weight_bytes + self.kv_bytes)

    @property
    def prefill_limit(self) -> float:
        return self.products / (2 * self.layer_weights)

    def as_json(self) -> str:
        """One line of JSON."""
        summary = {
            "experiment": "torch",
            "prefill_ratio": round(self.prefill_ratio, 3),
            "decode_ratio": round(self.decode_ratio, 3),
            "streams_ratio": round(self.streams_ratio, 3),
            "decode_limit": round(self.decode_limit, 1),
            "prefill_limit": round(self.prefill_limit, 1),
        }
        return json.dumps(summary | asdict(self))


def run_torch_speed(
    shape: str,
    *,
    threads: int | None = None,
    prompt_tokens: int = 512,
    decode_tokens: int = 32,
    streams: int = 8,
    rounds: int = 3,
) -> TorchSpeedReport:
    """The whole experiment on a shape of `lab/shapes.py`. Raises InvalidRequest."""
    workload = Workload(
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        streams=streams,
        rounds=rounds,
        threads=threads or usable_cores(),
    )
    with _threads(workload.threads):
        return measure_torch_speed(real_model(shape, torch.bfloat16), shape, workload)


def measure_torch_speed(model: Any, name: str, workload: Workload) -> TorchSpeedReport:
    """Measure on a model at hand, in bfloat16."""
    load = os.getloadavg()[0]
    began = time.perf_counter()
    weights = weights_digest(model)
    digest_seconds = time.perf_counter() - began
    cells = (workload.prompt_tokens + workload.decode_tokens) * workload.streams + 64
    began = time.perf_counter()  # clock on: the model is loaded
    engine = TorchEngine(model, num_cells=cells, max_sequences=max(4, workload.streams), weights=weights)
    start_seconds = time.perf_counter() - began  # clock off: the engine serves
    bandwidth = read_bandwidth(workload.threads)
    rounds = [
        (
            transformers_arm(model, workload),
            engine_arm(engine, workload, 1),
            engine_arm(engine, workload, workload.streams),
        )
        for _ in range(1 + workload.rounds)
    ][1:]  # the first one warmed up
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    ends = {id(embedding), id(head)}
    layer_weights = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in ends)
    return TorchSpeedReport(
        machine=this_machine(),
        torch=torch.__version__,
        transformers=version("transformers"),
        shape=name,
        layer_weights=layer_weights,
        weight_bytes=(layer_weights + head.numel()) * head.element_size(),  # of the embedding one row is read
        kv_bytes=engine.spec.kv_bytes_per_token * (workload.prompt_tokens + workload.decode_tokens // 2),
        workload=workload,
        start_seconds=start_seconds,
        digest_seconds=digest_seconds,
        bandwidth=max(bandwidth, read_bandwidth(workload.threads)),
        products=product_rate(),
        load=(load, os.getloadavg()[0]),
        transformers_rounds=tuple(each[0] for each in rounds),
        engine_rounds=tuple(each[1] for each in rounds),
        stream_rounds=tuple(each[2] for each in rounds),
    )


def transformers_arm(model: Any, workload: Workload) -> Seconds:
    """`generate` with its dynamic cache."""
    clock = _Clock()
    ids = torch.from_numpy(_prompt(0, workload, model.config.vocab_size)).long()[None]
    clock.put(None)  # clock on: the prompt is known
    model.generate(
        ids,
        max_new_tokens=1 + workload.decode_tokens,
        do_sample=False,
        eos_token_id=None,
        streamer=clock,
        use_cache=True,
    )
    began, _, *tokens = clock.times  # the second is transformers' echo of the prompt
    assert len(tokens) == 1 + workload.decode_tokens
    return Seconds(tokens[0] - began, tokens[-1] - tokens[0])  # clocks off: the first and the last token are known


def engine_arm(engine: TorchEngine, workload: Workload, streams: int) -> Seconds:
    """The engine, decoding some streams together."""
    prompts = [_prompt(index, workload, engine.spec.vocab_size) for index in range(streams)]
    seqs = [engine.open() for _ in prompts]
    began = time.perf_counter()  # clock on: the prompts are known
    tokens = {}
    for seq, prompt in zip(seqs, prompts, strict=True):
        tokens[seq] = int(engine.forward([Work(seq, prompt)])[seq].argmax())
    read = time.perf_counter()  # clock off, and on: the first tokens are known
    for _ in range(workload.decode_tokens):
        logits = engine.forward([Work(seq, as_tokens([tokens[seq]])) for seq in seqs])
        tokens = {seq: int(logits[seq].argmax()) for seq in seqs}
    ended = time.perf_counter()  # clock off: the last tokens are known
    for seq in seqs:
        engine.close(seq)
    return Seconds(read - began, ended - read)


def product_rate() -> float:
    """Operations per second of a large bfloat16 product with torch's current number of threads: the best of some."""
    rows, weights = torch.randn(512, 2048).bfloat16(), torch.randn(4096, 2048).bfloat16()
    best = 0.0
    with torch.inference_mode():
        for _ in range(10):
            began = time.perf_counter()
            torch.nn.functional.linear(rows, weights)
            best = max(best, 2 * 512 * 2048 * 4096 / (time.perf_counter() - began))
    return best


def print_report(report: TorchSpeedReport, console: Console) -> None:
    """A table for people, then one line of JSON."""
    work = report.workload
    table = Table(title=f"{report.shape}, bfloat16, {work.threads} threads", title_justify="left")
    table.add_column("tokens/s")
    for heading in ("prefill", "of transformers", "of the limit", "decode", "of transformers", "of the limit"):
        table.add_column(heading, justify="right")
    ratios = (f"{report.prefill_ratio:.2f}", f"{report.decode_ratio:.2f}")
    arms = (
        ("transformers generate", report.transformers_rounds, 1, ("1.00", "1.00")),
        ("engine", report.engine_rounds, 1, ratios),
        (f"engine, {work.streams} streams", report.stream_rounds, work.streams, ("", "")),
    )
    for name, rounds, streams, (prefill_ratio, decode_ratio) in arms:
        prefill = streams * work.prompt_tokens / median(each.prefill for each in rounds)
        decode = streams * work.decode_tokens / median(each.decode for each in rounds)
        shares = (f"{prefill / report.prefill_limit:.0%}", f"{decode / report.decode_limit:.0%}")
        table.add_row(name, f"{prefill:.0f}", prefill_ratio, shares[0], f"{decode:.1f}", decode_ratio, shares[1])
    table.add_row("limit", f"{report.prefill_limit:.0f}", "", "100%", f"{report.decode_limit:.1f}", "", "100%")
    console.print(table)
    console.print(
        f"{work.streams} streams decode {report.streams_ratio:.2f} times as many tokens as one.\n"
        f"{work.prompt_tokens} tokens of prompt, {work.decode_tokens} decoded, {work.rounds} rounds of the arms in turns "
        f"on {report.machine.processor}; load {report.load[0]:.1f} before, {report.load[1]:.1f} after.\nEach token reads "
        f"{report.weight_bytes / 1e6:.0f} MB of weights and {report.kv_bytes / 1e6:.1f} MB of KV; memory gives "
        f"{report.bandwidth / 1e9:.1f} GB/s, products {report.products / 1e9:.0f} GFLOP/s.\nThe engine starts in "
        f"{report.start_seconds:.2f} s on a loaded model; the digest of the weights takes {report.digest_seconds:.2f} s.",
        highlight=False,
    )
    console.print(report.as_json(), soft_wrap=True, markup=False, highlight=False)


class _Clock:
    """A streamer of transformers that notes when it was called."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is kept back."""


def _prompt(seed: int, workload: Workload, vocab_size: int) -> Tokens:
    return np.random.default_rng(seed).integers(10, vocab_size, workload.prompt_tokens).astype(np.int32)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
