"""`rekindle lab torch`, `windows` and `gpu`: arguments and help of what is measured on the torch engine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from rekindle.cli.refusals import guarded

Shape = Annotated[str, typer.Argument(help="qwen3-0.6b, gemma3-270m, tinyllama-1.1b, …")]
_WIDTH = 120


def add_torch_commands(lab: typer.Typer) -> None:
    """Under `rekindle lab`."""
    lab.command("torch")(lab_torch)
    lab.command("windows")(lab_windows)
    lab.command("gpu")(lab_gpu)


@guarded
def lab_torch(
    shape: Annotated[list[str], typer.Argument(help="qwen3-0.6b, gemma3-270m, …, with random weights")],
    threads: Annotated[int | None, typer.Option(help="compute threads; default: the machine's cores", min=1)] = None,
    prompt_tokens: Annotated[int, typer.Option(help="tokens of each prompt", min=1)] = 512,
    decode_tokens: Annotated[int, typer.Option(help="tokens decoded after the first", min=1)] = 32,
    streams: Annotated[int, typer.Option(help="that decode together in the third arm", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="of all arms that count", min=1)] = 3,
) -> None:
    """The torch engine on the CPU beside transformers' generate and the machine's limits, and how long its start takes."""
    import rekindle.engine.torch  # noqa: F401  which says what to install
    from rekindle.lab.torch_speed import print_report, run_torch_speed

    for name in shape:
        report = run_torch_speed(
            name,
            threads=threads,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            streams=streams,
            rounds=rounds,
        )
        print_report(report, Console(width=_WIDTH))


@guarded
def lab_windows(
    shape: Shape = "gemma3-270m",
    tokens: Annotated[list[int] | None, typer.Option(help="lengths, repeatable; default: 512 to 8192", min=1)] = None,
) -> None:
    """What layers with a sliding window give up when cells are wanted, counted beside what they need."""
    import rekindle.engine.torch  # noqa: F401  which says what to install
    from rekindle.lab.torch_windows import TOKENS, print_report, run_windows

    print_report(run_windows(shape, tokens or TOKENS), Console(width=_WIDTH))


@guarded
def lab_gpu(
    shape: Shape = "tinyllama-1.1b",
    device: Annotated[str, typer.Option(help="cuda, or cpu for a rehearsal")] = "cuda",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    prompt_tokens: Annotated[int, typer.Option(help="tokens of each prompt", min=1)] = 1024,
    decode_tokens: Annotated[int, typer.Option(help="steps", min=1)] = 64,
    batch: Annotated[list[int] | None, typer.Option(help="sequences, repeatable; default: 1 and 32", min=1)] = None,
    restore_tokens: Annotated[int, typer.Option(help="brought back from host memory", min=1)] = 8192,
) -> None:
    """The torch engine on a GPU: decoding beside the memory's limit, restoring beside the bus."""
    import rekindle.engine.torch  # noqa: F401  which says what to install
    from rekindle.lab.torch_gpu import GpuWork, print_report, run_gpu

    work = GpuWork(
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        batches=tuple(batch or GpuWork.batches),
        restore_tokens=restore_tokens,
    )
    print_report(run_gpu(shape, device=device, dtype=dtype, work=work), Console(width=_WIDTH))
