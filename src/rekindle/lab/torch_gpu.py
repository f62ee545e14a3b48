"""The torch engine on a GPU: decoding beside the memory's limit, and restoring from host memory beside the bus.

    rekindle lab gpu tinyllama-1.1b --device cuda

**The physics.** A step of B sequences reads every weight once and the KV of each sequence once (of a layer with a window,
what the window sees), so no program decodes more than

    B x memory bandwidth / (bytes of weights + B x bytes of KV)      tokens per second.

On a GPU that is so little time that starting kernels takes longer than running them, unless the whole step is recorded once
and replayed (CUDA graphs). The engine starts its kernels one by one, because the cells that a step reads are others each
time; the column "busy" says what share of its time the GPU computes, and so what a recorded step could gain. What it would
gain at best is the third arm: transformers' own step over a cache of fixed size, recorded and replayed.

Restoring brings stored blocks into the pool. No program does that faster than one copy of as many bytes from page-locked
memory to the device.

**The arms** have the same model object with random weights and prompts of the same length. KV of prompts is noise, placed:
only its size counts. On a CPU, where this runs as a rehearsal, nothing is recorded and memory is not page-locked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import StaticCache

from rekindle.engine.protocol import Payload, Work
from rekindle.engine.torch.engine import TorchEngine
from rekindle.errors import InvalidRequest
from rekindle.lab.machine import Machine, this_machine
from rekindle.lab.torch_models import real_model
from rekindle.tokens import as_tokens

DTYPES = ("bfloat16", "float16", "float32")
_BLOCK = 64
_ROUNDS = 5
_WARM_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class GpuWork:
    """What the arms do."""

    prompt_tokens: int = 1024
    decode_tokens: int = 64
    batches: tuple[int, ...] = (1, 32)
    restore_tokens: int = 8192

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.decode_tokens, self.restore_tokens, *self.batches) < 1:
            raise InvalidRequest("prompt tokens, decode tokens, restored tokens and batches must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """One batch size."""

    batch: int
    limit: float  # tokens per second
    engine: float
    busy: float | None  # share of the time that the GPU computes; None on a CPU
    step: float | None  # transformers' step over a cache of fixed size, its kernels started one by one
    recorded: float | None  # the same as a CUDA graph
    failure: str | None = None  # why there is no such figure


@dataclass(frozen=True, kw_only=True)
class GpuReport:
    """What was measured."""

    machine: Machine
    device: str
    torch: str
    shape: str
    dtype: str
    work: GpuWork
    weight_bytes: int
    kv_bytes: int  # of one sequence, at the mean length
    bandwidth: float  # bytes per second that the device reads
    decoded: tuple[Decoded, ...]
    restore_bytes: int
    copy_rate: float  # bytes per second of one large copy to the device: the limit
    restore_rates: dict[str, float]  # bytes per second by where the blocks lie

    def as_json(self) -> str:
        """One line of JSON."""
        return json.dumps({"experiment": "gpu"} | asdict(self))


def run_gpu(shape: str, *, device: str, dtype: str = "bfloat16", work: GpuWork | None = None) -> GpuReport:
    """The whole experiment on a shape of `lab/shapes.py`. Raises InvalidRequest."""
    for param, given, known in (("device", device, ("cuda", "cpu")), ("dtype", dtype, DTYPES)):
        if given not in known:
            raise InvalidRequest(f"{param} must be one of {', '.join(known)}, got {given!r}", param=param)
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest(
            "PyTorch finds no CUDA device here; --device cpu rehearses with a small shape", param="device"
        )
    model = real_model(shape, getattr(torch, dtype)).to(device)
    return measure_gpu(model, shape, work or GpuWork())


def measure_gpu(model: Any, name: str, work: GpuWork) -> GpuReport:
    """Measure on a model at hand, on its device."""
    longest = work.prompt_tokens + work.decode_tokens + _WARM_STEPS + 1
    cells = max(max(work.batches) * longest, 2 * work.restore_tokens) + 64
    engine = TorchEngine(model, num_cells=cells, max_sequences=max(work.batches) + 4, weights=bytes(16))
    weights = _weight_bytes(model)
    kv = bytes_seen(engine, work.prompt_tokens + work.decode_tokens // 2)
    bandwidth = device_bandwidth(model.device)
    rates, copy_rate = _restore(engine, work, model.device)
    return GpuReport(
        machine=this_machine(),
        device=torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU (a rehearsal)",
        torch=torch.__version__,
        shape=name,
        dtype=engine.spec.kv_type,
        work=work,
        weight_bytes=weights,
        kv_bytes=kv,
        bandwidth=bandwidth,
        decoded=tuple(
            _decode(engine, model, work, batch, batch * bandwidth / (weights + batch * kv)) for batch in work.batches
        ),
        restore_bytes=work.restore_tokens * engine.spec.kv_bytes_per_token,
        copy_rate=copy_rate,
        restore_rates=rates,
    )


def bytes_seen(engine: TorchEngine, length: int) -> int:
    """KV that the next token of a sequence of `length` tokens sees, in bytes."""
    window, windowed = engine.groups.window, engine.layout.windowed
    shapes = enumerate(engine.layout.layers)
    values = sum(s.values * (min(length, window - 1) if layer in windowed else length) for layer, s in shapes)
    return values * engine.layout.dtype.itemsize


def device_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large sum reads: the best of some runs over 1 GB, or 256 MB on a CPU."""
    size = (1 << 30) if device.type == "cuda" else (1 << 28)
    values = torch.ones(size // 4, dtype=torch.float32, device=device)
    return size / min(_timed(lambda: values.sum(), device) for _ in range(10))


def _decode(engine: TorchEngine, model: Any, work: GpuWork, batch: int, limit: float) -> Decoded:
    seconds, busy = _engine_steps(engine, work, batch)
    step = recorded = failure = None
    try:
        step = batch / _static_step(model, work, batch, record=False)
        if model.device.type == "cuda":
            recorded = batch / _static_step(model, work, batch, record=True)
    except Exception as error:  # what another library can't record is a result too
        failure = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return Decoded(
        batch=batch, limit=limit, engine=batch / seconds, busy=busy, step=step, recorded=recorded, failure=failure
    )


def _engine_steps(engine: TorchEngine, work: GpuWork, batch: int) -> tuple[float, float | None]:
    """Seconds of a step, and the share of them in which the GPU computes."""
    device = engine.device
    prompt = noise_blocks(engine, work.prompt_tokens)
    seqs = [engine.open() for _ in range(batch)]
    for seq in seqs:
        engine.place_all(seq, prompt)

    def step() -> None:
        engine.forward([Work(seq, as_tokens([42])) for seq in seqs])

    for _ in range(_WARM_STEPS):
        step()
    _wait(device)
    began = time.perf_counter()  # clock on: prompts are in the pool
    for _ in range(work.decode_tokens):
        step()
    _wait(device)
    seconds = (time.perf_counter() - began) / work.decode_tokens  # clock off: the last logits are on the host
    busy = _kernel_seconds(step) / seconds if device.type == "cuda" else None
    for seq in seqs:
        engine.close(seq)
    return seconds, busy


def _kernel_seconds(step: Callable[[], None]) -> float:
    """Time that the GPU computes in one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return float(sum(event.self_device_time_total for event in profile.key_averages())) / 1e6


@torch.inference_mode()
def _static_step(model: Any, work: GpuWork, batch: int, *, record: bool) -> float:
    """Seconds of transformers' own step over a cache of fixed size, whether recorded or not."""
    device, config = model.device, model.config.get_text_config()
    cache = StaticCache(config=config, max_cache_len=work.prompt_tokens + 2 * work.decode_tokens + 8)
    ids = torch.full((batch, work.prompt_tokens), 42, device=device)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = torch.full((batch, 1), 42, device=device)
    position = torch.full((batch, 1), work.prompt_tokens, device=device)

    def step() -> None:
        output = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
        token.copy_(output.logits[:, -1:].argmax(-1))
        position.add_(1)

    run: Callable[[], object] = step
    if record:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_STEPS):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    else:
        step()
    _wait(device)
    began = time.perf_counter()  # clock on: the prompt is in the cache
    for _ in range(work.decode_tokens):
        run()
    _wait(device)
    return (time.perf_counter() - began) / work.decode_tokens  # clock off: the last token is known


def _restore(engine: TorchEngine, work: GpuWork, device: torch.device) -> tuple[dict[str, float], float]:
    """Bytes per second of placing blocks, by where they lie; and of one copy of as many bytes."""
    count = work.restore_tokens * engine.spec.kv_bytes_per_token
    pins = [False, True] if device.type == "cuda" else [False]
    rates = {}
    for pinned in pins:
        blocks = noise_blocks(engine, work.restore_tokens, pinned=pinned)
        rates["page-locked" if pinned else "ordinary"] = count / min(_placing(engine, blocks, device))
    source = torch.ones(count, dtype=torch.uint8, pin_memory=pins[-1])
    target = torch.empty(count, dtype=torch.uint8, device=device)
    return rates, count / min(_timed(lambda: target.copy_(source), device) for _ in range(1 + _ROUNDS))


def _placing(engine: TorchEngine, blocks: Sequence[Payload], device: torch.device) -> Iterator[float]:
    for _ in range(1 + _ROUNDS):
        seq = engine.open()
        yield _timed(lambda: engine.place_all(seq, blocks), device)  # noqa: B023
        engine.close(seq)


def noise_blocks(engine: TorchEngine, length: int, *, pinned: bool = False) -> list[Payload]:
    """Blocks that follow each other from position 0, KV of noise; all in one stretch of memory."""
    layout = engine.layout
    values = torch.randn(layout.num_bytes(_BLOCK) // layout.dtype.itemsize).to(layout.dtype).view(torch.uint8)
    room = torch.empty(-(-length // _BLOCK), len(values), dtype=torch.uint8, pin_memory=pinned)
    room.copy_(values)
    blocks = []
    for row, start in zip(room, range(0, length, _BLOCK), strict=True):
        count = min(_BLOCK, length - start)
        data = memoryview(row.numpy().data)[: layout.num_bytes(count)]
        blocks.append(Payload(np.full(count, 9, dtype=np.int32), start, data, engine.spec.fingerprint))
    return blocks


def _timed(act: Callable[[], object], device: torch.device) -> float:
    """Seconds until it is done."""
    _wait(device)
    began = time.perf_counter()
    act()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _weight_bytes(model: Any) -> int:
    """Read for each step: all but the embedding, of which a row is read for each token; tied, it is the output matrix."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return int(total - (0 if embedding is head else embedding.numel() * embedding.element_size()))


def print_report(report: GpuReport, console: Console) -> None:
    """Tables for people, then one line of JSON."""
    work = report.work
    table = Table(title=f"{report.shape}, {report.dtype}, on {report.device}", title_justify="left")
    table.add_column("tokens/s")
    for heading in ("engine", "of the limit", "busy", "transformers", "recorded", "of the limit", "limit"):
        table.add_column(heading, justify="right")
    for each in report.decoded:
        busy = "" if each.busy is None else f"{each.busy:.0%}"
        others = [("" if rate is None else f"{rate:.1f}") for rate in (each.step, each.recorded)]
        best = "" if each.recorded is None else f"{each.recorded / each.limit:.0%}"
        share = f"{each.engine / each.limit:.0%}"
        table.add_row(f"batch {each.batch}", f"{each.engine:.1f}", share, busy, *others, best, f"{each.limit:.1f}")
    console.print(table)
    for each in report.decoded:
        if each.failure:
            console.print(
                f"batch {each.batch}: transformers' step failed: {each.failure}", markup=False, highlight=False
            )
    console.print(
        f"{work.prompt_tokens} tokens of prompt, {work.decode_tokens} steps. A step reads {report.weight_bytes / 1e6:.0f} "
        f"MB of weights and {report.kv_bytes / 1e6:.1f} MB of KV for each sequence; memory gives "
        f"{report.bandwidth / 1e9:.1f} GB/s.",
        highlight=False,
    )
    for where, rate in report.restore_rates.items():
        console.print(
            f"Restoring {report.restore_bytes / 1e6:.0f} MB in blocks of {_BLOCK} tokens from {where} memory: "
            f"{rate / 1e9:.2f} GB/s, {rate / report.copy_rate:.0%} of one copy's {report.copy_rate / 1e9:.2f}.",
            highlight=False,
        )
    console.print(report.as_json(), soft_wrap=True, markup=False, highlight=False)
