"""Decode speed through Rekindle's worker, beside a bare llama.cpp loop and beside what memory allows.

**The physics.** To decode one token every weight is read once, and the sequence's KV once. On a CPU the arithmetic
hides behind that reading, so no program decodes faster than

    memory bandwidth / (bytes of weights + bytes of KV)      tokens per second.

The embedding table counts only where it is also the output matrix; otherwise one row of it is read. Of a mixture of
experts only the active ones count. A model of a few megabytes lies in the processor's cache and is bound by other things.

**The comparison.** Both arms have the same file, threads, context length and prompt, make the same number of decode
calls of one token, and choose each token greedily from its logits. The bare arm is a loop of `llama_decode` and argmax.
The worker's arm is a request like any other: scheduled, sampled, detokenised and delivered to the caller's thread. The
arms alternate (A B A B …) in one process, so that what else the machine does falls on both, and the ratio is the median
over the pairs.
"""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import gguf
from rich.console import Console
from rich.table import Table

from rekindle.errors import InvalidRequest, ModelError
from rekindle.lab.bare import BareModel
from rekindle.lab.machine import Machine, read_bandwidth, this_machine, usable_cores
from rekindle.model.source import locate
from rekindle.serve.request import Done, Event, Failed, Generation, Piece, Sampling
from rekindle.serve.service import Service
from rekindle.settings import Settings

DecodeArm = Callable[[int], float]  # number of tokens -> seconds that decoding them took

_TEXT = "The miller of Viniton keeps nine hens, and each of them has a name that begins with the letter of its month. "


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What both arms do in each round."""

    prompt_tokens: int = 128  # read before the clock starts
    decode_tokens: int = 128  # decode calls of one token under the clock
    rounds: int = 5  # pairs of arms that count; one more pair goes before as a warm-up
    threads: int
    context: int = 2_048  # cells of the KV cache

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.decode_tokens, self.rounds, self.threads) < 1:
            raise InvalidRequest("prompt tokens, decode tokens, rounds and threads must be 1 or more")
        if self.prompt_tokens + self.decode_tokens + 1 > self.context:
            raise InvalidRequest(
                f"{self.prompt_tokens} tokens of prompt and {self.decode_tokens} decoded do not fit in a context of "
                f"{self.context}",
                param="context",
            )


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model that was measured."""

    name: str
    description: str  # architecture, size and file type as llama.cpp names them
    parameters: int
    weight_bytes: int  # read for each token
    kv_bytes: int  # read for each token, at the mean length of the decoded stretch


@dataclass(frozen=True, kw_only=True)
class DecodeReport:
    """What was measured. Rates are tokens per second, medians over the rounds."""

    machine: Machine
    model: ModelFacts
    workload: Workload
    bandwidth: float  # bytes per second that this machine reads with as many threads
    bare_seconds: tuple[float, ...]  # per round
    worker_seconds: tuple[float, ...]  # per round

    @property
    def bare_rate(self) -> float:
        return self.workload.decode_tokens / median(self.bare_seconds)

    @property
    def worker_rate(self) -> float:
        return self.workload.decode_tokens / median(self.worker_seconds)

    @property
    def ratio(self) -> float:
        """Worker's speed over the bare loop's: the median over the pairs that ran one after the other."""
        return median(bare / worker for bare, worker in zip(self.bare_seconds, self.worker_seconds, strict=True))

    @property
    def limit_rate(self) -> float:
        """Tokens per second at which reading the model and the KV would take all of the memory's bandwidth."""
        return self.bandwidth / (self.model.weight_bytes + self.model.kv_bytes)

    def as_json(self) -> str:
        """One line of JSON."""
        summary: dict[str, Any] = {
            "experiment": "decode",
            "ratio": round(self.ratio, 4),
            "worker_tokens_per_second": round(self.worker_rate, 2),
            "bare_tokens_per_second": round(self.bare_rate, 2),
            "limit_tokens_per_second": round(self.limit_rate, 2),
            "worker_share_of_limit": round(self.worker_rate / self.limit_rate, 4),
            "bare_share_of_limit": round(self.bare_rate / self.limit_rate, 4),
        }
        return json.dumps(summary | asdict(self))


def run_decode(
    model: str,
    *,
    threads: int | None = None,
    prompt_tokens: int = 128,
    decode_tokens: int = 128,
    rounds: int = 5,
    context: int = 2_048,
) -> DecodeReport:
    """The whole experiment on a model (`builtin`, a path, `hf:…`). Raises ModelError or InvalidRequest."""
    workload = Workload(
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        rounds=rounds,
        threads=threads or usable_cores(),
        context=context,
    )
    path = locate(model)
    if path.is_dir():  # told before anything is loaded
        raise ModelError(f"{path} is a folder; a .gguf file is expected, which llama.cpp reads alone beside the worker")
    settings = Settings.load(model=model, threads=workload.threads, context=context, store="none")
    with Service.open(settings) as service:
        return measure_decode(path, workload, lambda prompt: worker_arm(service, prompt))


def measure_decode(path: Path, workload: Workload, open_worker: Callable[[Sequence[int]], DecodeArm]) -> DecodeReport:
    """Measure the bare loop and a worker's arm in turns; `open_worker` makes that arm for a prompt of token ids."""
    with BareModel(path, threads=workload.threads, context=workload.context) as model:
        prompt = _prompt(model, workload.prompt_tokens)
        bare, worker = bare_arm(model, prompt), open_worker(prompt)
        bandwidth = read_bandwidth(workload.threads)
        seconds = [(bare(workload.decode_tokens), worker(workload.decode_tokens)) for _ in range(1 + workload.rounds)]
        counted = seconds[1:]  # the first pair warmed caches and clocks up
        return DecodeReport(
            machine=this_machine(),
            model=_facts(path, model, prompt, workload.decode_tokens),
            workload=workload,
            bandwidth=max(bandwidth, read_bandwidth(workload.threads)),
            bare_seconds=tuple(pair[0] for pair in counted),
            worker_seconds=tuple(pair[1] for pair in counted),
        )


def bare_arm(model: BareModel, prompt: Sequence[int]) -> DecodeArm:
    """The yardstick: llama.cpp's decode call and an argmax, in a loop."""

    def decode(num_tokens: int) -> float:
        model.clear()
        token = int(model.append(prompt).argmax())
        began = time.perf_counter()  # clock on: the first token is known
        for _ in range(num_tokens):
            token = int(model.append((token,)).argmax())
        return time.perf_counter() - began  # clock off: the last token is known

    return decode


def worker_arm(service: Service, prompt: Sequence[int], clock: Callable[[], float] = time.perf_counter) -> DecodeArm:
    """The same work through the worker, until the caller who waits for the tokens has the last.

    The clock goes on where the worker hands the first token out, not where the caller takes it: a caller who is late would
    find more tokens waiting, or all, and the time that these took would not count. Tokens come in pieces of whole
    characters, so the first piece may hold several; the time is scaled to the number asked for. Reuse is off: both arms
    read the prompt, and no other sequence lies in the cache.
    """

    def decode(num_tokens: int) -> float:
        generation = Generation(
            prompt=service.token_prompt(prompt),
            max_tokens=1 + num_tokens,
            sampling=Sampling(temperature=0),
            ignore_eos=True,
            use_prefix_cache=False,
        )
        inbox: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
        ticket = service.submit(generation, lambda event: inbox.put((clock(), event)))
        began = ended = 0.0
        before = after = 0  # tokens that had come when the clock went on, and in all
        try:
            while True:
                handed_out, event = inbox.get()
                if isinstance(event, Done):
                    break
                if isinstance(event, Failed):
                    raise event.error
                if not isinstance(event, Piece) or not event.tokens:
                    continue
                ended = clock()  # clock off, so far: the last token has come
                after += len(event.tokens)
                if not before:
                    began, before = handed_out, after  # clock on: the first token is given out
        finally:
            ticket.cancel()
        if after != 1 + num_tokens:
            raise ModelError(f"the worker gave {after} tokens where {1 + num_tokens} were asked for")
        return (ended - began) * num_tokens / (after - before)

    return decode


def weight_bytes_per_token(path: Path) -> int:
    """Bytes of weights that decoding one token reads."""
    reader = gguf.GGUFReader(path)
    names = {tensor.name for tensor in reader.tensors}
    arch = reader.fields["general.architecture"].contents()
    experts, active = (reader.fields.get(f"{arch}.{name}") for name in ("expert_count", "expert_used_count"))
    active_share = active.contents() / experts.contents() if experts and active and experts.contents() else 1.0
    total = 0.0
    for tensor in reader.tensors:
        if tensor.name == "token_embd.weight" and "output.weight" in names:
            continue
        total += int(tensor.n_bytes) * (active_share if "_exps." in tensor.name else 1.0)
    return round(total)


def print_report(report: DecodeReport, console: Console) -> None:
    """A table for people, then one line of JSON."""
    model, work = report.model, report.workload
    table = Table(title=f"Decoding with {model.description}: {model.name}", title_justify="left")
    table.add_column("")
    for heading in ("tokens/s", "of the bare loop", "of the limit", "slowest to fastest round, tokens/s"):
        table.add_column(heading, justify="right")
    arms = (
        ("bare llama.cpp loop", report.bare_rate, 1.0, report.bare_seconds),
        ("through the worker", report.worker_rate, report.ratio, report.worker_seconds),
    )
    for name, rate, ratio, seconds in arms:
        spread = f"{work.decode_tokens / max(seconds):.1f} to {work.decode_tokens / min(seconds):.1f}"
        table.add_row(name, f"{rate:.1f}", f"{ratio:.3f}", f"{rate / report.limit_rate:.0%}", spread)
    table.add_row("what memory allows", f"{report.limit_rate:.1f}", "", "100%", "")
    console.print(table)
    console.print(
        f"{work.prompt_tokens} tokens of prompt, {work.decode_tokens} decode calls, {work.rounds} rounds of both arms "
        f"in turns, {work.threads} threads on {report.machine.processor}.\nEach token reads "
        f"{model.weight_bytes / 1e6:.1f} MB of weights and {model.kv_bytes / 1e6:.2f} MB of KV; memory gives "
        f"{report.bandwidth / 1e9:.1f} GB/s to as many threads.",
        highlight=False,
    )
    console.print(report.as_json(), soft_wrap=True, markup=False, highlight=False)


def _prompt(model: BareModel, length: int) -> list[int]:
    tokens = model.tokenize(_TEXT * (1 + length // 8))
    while len(tokens) < length:
        tokens += tokens[1:]
    return tokens[:length]


def _facts(path: Path, model: BareModel, prompt: Sequence[int], decoded: int) -> ModelFacts:
    """Sizes of what a token reads; the model still holds the sequence of the last round."""
    at_end = model.state_bytes()
    model.clear()
    model.append(prompt)
    return ModelFacts(
        name=path.name,
        description=model.file.description,
        parameters=model.file.num_parameters,
        weight_bytes=weight_bytes_per_token(path),
        kv_bytes=(model.state_bytes() + at_end) // 2,
    )
