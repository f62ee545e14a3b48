"""`rekindle lab`: the commands, their arguments and their help. What they show is in `lab.py` and others beside this.

Those modules are imported when their command runs, for they need much.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rekindle.cli.lab_torch import add_torch_commands
from rekindle.cli.refusals import FAILED, guarded, refuse_given
from rekindle.errors import InvalidRequest

lab = typer.Typer(help="Experiments: what the KV cache buys, beside the physical limit.", no_args_is_help=True)

ModelFile = Annotated[str, typer.Argument(help="builtin, a path to a .gguf file, or hf:owner/repo\\[:file]")]
Threads = Annotated[int | None, typer.Option(help="compute threads; default: the machine's cores", min=1)]
Engine = Annotated[str, typer.Option(help="auto, llama or torch")]
_STARTED = ("model", "threads", "context", "parallel")  # what servers get that are started here
_OF_QUALITY = ("data", "documents", "gate", "plot")
_OF_PART = {  # of `lab live`
    "ttft": ("samples", "conversation_tokens", "gap", "peer"),
    "talk": ("turns", "window"),
    "drift": ("kv_type",),
}
_OF_SPEED = ("chunks", "chunk_tokens", "rounds", "peer")
Plot = Annotated[Path | None, typer.Option(help="write a PNG here (needs the lab extra)")]


@lab.command("model")
@guarded
def lab_model(
    shape: Annotated[str, typer.Argument(help="published model whose shape is taken, such as qwen3-0.6b")],
    out: Annotated[Path, typer.Argument(help="the .gguf file, or folder, to write; it must not exist")],
    quant: Annotated[str, typer.Option(help="llama.cpp's name of a file type, such as f16, q8_0, q4_k_m")] = "f16",
    seed: Annotated[int, typer.Option(help="the same seed gives the same weights")] = 0,
    context: Annotated[int | None, typer.Option(help="tokens it claims to read; default: the shape's", min=64)] = None,
    folder: Annotated[
        bool, typer.Option("--folder", help="safetensors for the torch engine, of type f32, bf16 or f16")
    ] = False,
) -> None:
    """Write random weights in the shape of a real model, to measure with: a GGUF, or a folder of safetensors."""
    from rekindle.cli.lab import write_folder, write_model

    (write_folder if folder else write_model)(shape, quant, out, seed, context)


@lab.command("decode")
@guarded
def lab_decode(
    model: ModelFile,
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(help="pairs of runs that count", min=1)] = 5,
    prompt_tokens: Annotated[int, typer.Option(help="tokens read before the clock starts", min=1)] = 128,
    decode_tokens: Annotated[int, typer.Option(help="tokens decoded under the clock", min=1)] = 128,
    context: Annotated[int, typer.Option(help="KV cells", min=64)] = 2048,
) -> None:
    """Decode speed through the worker, beside a bare llama.cpp loop and the memory's limit."""
    from rekindle.lab.decode import print_report, run_decode

    report = run_decode(
        model,
        threads=threads,
        rounds=rounds,
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        context=context,
    )
    print_report(report, Console())


@lab.command("exact")
@guarded
def lab_exact(
    model: ModelFile,
    prompts: Annotated[int, typer.Option(help="random prompts", min=1)] = 200,
    answer_tokens: Annotated[int, typer.Option(help="longest answer", min=1)] = 32,
    kv_type: Annotated[str, typer.Option(help="f16, q8_0 or q4_0; of llama.cpp")] = "f16",
    engine: Engine = "auto",
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="the same seed asks the same prompts")] = 0,
) -> None:
    """Is reuse exact? Answers and logits with and without it, beside what rounding alone does."""
    from rekindle.lab.exact import print_report, run_exact

    report = run_exact(
        model,
        prompts=prompts,
        answer_tokens=answer_tokens,
        kv_type=kv_type,
        engine=engine,
        threads=threads,
        seed=seed,
    )
    print_report(report, Console())


@lab.command("engines")
@guarded
def lab_engines(
    prompts: Annotated[int, typer.Option(help="random prompts", min=1)] = 200,
    answer_tokens: Annotated[int, typer.Option(help="longest answer", min=1)] = 32,
    dtype: Annotated[str, typer.Option(help="the torch engine's: float32, bfloat16 or float16")] = "float32",
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="the same seed asks the same prompts")] = 0,
) -> None:
    """Do llama.cpp and torch give the same answers with the built-in model?"""
    from rekindle.lab.engines import print_report, run_engines

    report = run_engines(prompts=prompts, answer_tokens=answer_tokens, dtype=dtype, threads=threads, seed=seed)
    print_report(report, Console())


@lab.command("trace")
@guarded
def lab_trace(
    file: Annotated[Path, typer.Argument(help="JSON lines as published with Mooncake: hash_ids, input_length …")],
    capacity: Annotated[
        list[int] | None, typer.Option(help="blocks that fit; may be repeated; default: 1000 to 30000", min=1)
    ] = None,
    policy: Annotated[list[str] | None, typer.Option(help="an eviction policy; may be repeated; default: all")] = None,
    plot: Plot = None,
) -> None:
    """What each eviction policy would have reused of a recorded load, beside Belady's optimum."""
    from rekindle.cli.lab import replay_trace

    replay_trace(file, capacity, policy, plot)


@lab.command("store")
@guarded
def lab_store(
    payload: Annotated[
        list[int] | None, typer.Option(help="bytes of a block; may be repeated; default: those of four models", min=1)
    ] = None,
    blocks: Annotated[int, typer.Option(help="of each size", min=1)] = 64,
    tier: Annotated[
        list[str] | None, typer.Option(help="memory, disk or network; may be repeated; default: all")
    ] = None,
    size: Annotated[
        list[int] | None,
        typer.Option(help="blocks in the store, for look-ups, 128 or more; may be repeated; 0: none", min=0),
    ] = None,
    rounds: Annotated[int, typer.Option(help="of all arms of a comparison, in turns", min=1)] = 5,
    folder: Annotated[Path | None, typer.Option(help="where files are written; default: for temporary files")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="also restore its KV from memory into the engine")
    ] = None,
    plot: Plot = None,
) -> None:
    """How fast KV goes in and out of each tier, beside memcpy, dd and redis-py; look-ups as the store grows."""
    from rekindle.cli.lab import measure_store

    measure_store(payload, blocks, tier, size, rounds, folder, model, plot)


@lab.command("restart")
@guarded
def lab_restart(
    model: ModelFile,
    prompt_tokens: Annotated[int, typer.Option(help="of each prompt, about", min=64)] = 2000,
    prompts: Annotated[int, typer.Option(help="that each server is asked", min=1)] = 3,
    threads: Threads = None,
    folder: Annotated[Path | None, typer.Option(help="where KV is written; default: for temporary files")] = None,
) -> None:
    """The first token of a long prompt: cold, after a restart, from another server's folder, from Redis."""
    from rekindle.cli.lab import measure_restart

    measure_restart(model, prompt_tokens, prompts, threads, folder)


@lab.command("live")
@guarded
def lab_live(
    given: typer.Context,
    model: ModelFile = "builtin",
    part: Annotated[list[str] | None, typer.Option(help="ttft, talk or drift; may be repeated; default: all")] = None,
    samples: Annotated[int, typer.Option(help="ttft: messages of each kind", min=1)] = 20,
    conversation_tokens: Annotated[int, typer.Option(help="ttft: before each message, about", min=64)] = 3000,
    gap: Annotated[float, typer.Option(help="ttft: seconds between words, and before a message is sent", min=0)] = 0.4,
    peer: Annotated[
        str | None, typer.Option(help="ttft: also ask llama-server (the xllamacpp wheel), or a path of one")
    ] = None,
    turns: Annotated[int, typer.Option(help="talk: in all", min=1)] = 500,
    window: Annotated[int, typer.Option(help="talk: in tokens", min=1024)] = 2048,
    kv_type: Annotated[
        list[str] | None, typer.Option(help="drift: f16, q8_0 or q4_0; may be repeated; default: f16")
    ] = None,
    threads: Threads = None,
) -> None:
    """How soon a live session answers, what its window costs, how far it drifts from a full prefill."""
    from rekindle.cli.lab import measure_live

    if part and set(part) <= _OF_PART.keys():
        for other in _OF_PART.keys() - set(part):
            refuse_given(given, _OF_PART[other], f"is for the part {other}, which is not run: leave it out")
    sizes = {"samples": samples, "conversation_tokens": conversation_tokens, "gap_seconds": gap, "peer": peer}
    measure_live(model, part, sizes, turns=turns, window=window, kv_types=kv_type, threads=threads)


@lab.command("soak")
@guarded
def lab_soak(
    model: ModelFile = "builtin",
    minutes: Annotated[float, typer.Option(help="of load, of which a quarter is warm-up", min=0.1)] = 20.0,
    seed: Annotated[int, typer.Option(help="the same seed draws the same requests")] = 0,
    threads: Annotated[int, typer.Option(help="compute threads of the server", min=1)] = 1,
) -> None:
    """A server under mixed load, with clients that leave and a store that breaks: does anything leak or get stuck?"""
    from rekindle.cli.soak import soak_server

    if not soak_server(model, minutes, seed, threads):
        raise typer.Exit(FAILED)


@lab.command("load")
@guarded
def lab_load(
    given: typer.Context,
    url: Annotated[
        str | None, typer.Argument(help="any OpenAI-compatible server; default: rekindle is started")
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option("--workload", "-w", help="chat, agent, rag, trace, cold, burst, repeat or stall; default: chat"),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="an open loop: sessions per second, Poisson; default: closed")
    ] = None,
    clients: Annotated[int | None, typer.Option(help="that ask at the same time, in a closed loop")] = None,
    requests: Annotated[int | None, typer.Option(help="of workloads without turns")] = None,
    turns: Annotated[int | None, typer.Option(help="of each conversation")] = None,
    system_tokens: Annotated[int | None, typer.Option(help="of the system prompt, or of the long prompt")] = None,
    message_tokens: Annotated[int | None, typer.Option(help="of a message, a question, a tool's output")] = None,
    answer_tokens: Annotated[int | None, typer.Option(help="of each answer")] = None,
    documents: Annotated[int | None, typer.Option(help="rag: that prompts draw from")] = None,
    document_tokens: Annotated[int | None, typer.Option(help="rag: of each document")] = None,
    trace: Annotated[Path | None, typer.Option(help="trace: JSON lines with hash_ids, input_length …")] = None,
    block_tokens: Annotated[int | None, typer.Option(help="trace: tokens that stand for one of its blocks")] = None,
    answers: Annotated[
        str, typer.Option(help="in transcripts: own (what the server said) or scripted (the same for all servers)")
    ] = "own",
    peer: Annotated[
        str | None,
        typer.Option(
            help="compare with it: llama-server (the xllamacpp wheel), or a path of one. Both are up and asked in turn "
            "by cold, burst, repeat and stall; other workloads run with one up at a time"
        ),
    ] = None,
    peer_option: Annotated[list[str] | None, typer.Option(help="for the peer, name=value; may be repeated")] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="of servers that are started here")] = "builtin",
    threads: Annotated[int | None, typer.Option(help="of these; default: the machine's cores", min=1)] = None,
    context: Annotated[int | None, typer.Option(help="of these, in cells; default: by the workload", min=64)] = None,
    parallel: Annotated[int | None, typer.Option(help="sequences at a time, of these", min=1, max=64)] = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="of all that is asked, each of other texts; default: 2 with a peer, else 1", min=1),
    ] = None,
    seed: Annotated[int, typer.Option(help="the same seed asks the same questions at the same times", min=0)] = 0,
    api_key: Annotated[str | None, typer.Option(help="for the server at the URL")] = None,
    api_model: Annotated[str | None, typer.Option(help="the server's name of its model; default: its first")] = None,
    timeout: Annotated[float, typer.Option(help="seconds that one request may take")] = 600.0,
    plot: Plot = None,
) -> None:
    """How a server bears load, alone or in turn with llama-server: TTFT, ITL, throughput, tokens computed."""
    from rekindle.cli.lab import load_test

    if url is None:
        refuse_given(given, ("api_key", "api_model"), "is for a server at a URL: give one, or leave it out")
    elif peer is None:
        refuse_given(given, _STARTED, "is for servers that are started here, and none is: name a --peer, or no URL")
    sizes = {
        "clients": clients,
        "requests": requests,
        "turns": turns,
        "system_tokens": system_tokens,
        "message_tokens": message_tokens,
        "answer_tokens": answer_tokens,
        "documents": documents,
        "document_tokens": document_tokens,
        "trace": trace,
        "block_tokens": block_tokens,
    }
    was_answered = load_test(
        url,
        workload,
        sizes,
        started={"model": model, "threads": threads, "context": context, "parallel": parallel},
        peer_options=peer_option,
        rounds=rounds,
        plot=plot,
        rate=rate,
        seed=seed,
        answers=answers,
        peer=peer,
        api_key=api_key,
        api_model=api_model,
        timeout_seconds=timeout,
    )
    if not was_answered:
        raise typer.Exit(FAILED)


@lab.command("blend")
@guarded
def lab_blend(
    given: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help="builtin, a path to a .gguf file or a folder of safetensors, or hf:owner/repo\\[:file]"),
    ] = "builtin",
    engine: Engine = "auto",
    data: Annotated[
        Path | None, typer.Option(help="examples in CacheBlend's or LongBench's format; default: ember's documents")
    ] = None,
    documents: Annotated[int, typer.Option(help="that are asked about", min=1)] = 40,
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="share of placed tokens computed anew, repeatable; default: 5 to 30 %", min=0, max=1),
    ] = None,
    gate: Annotated[
        float | None,
        typer.Option(help="fail if no cheap arm keeps so much of full prefill's exact match", min=0, max=1),
    ] = None,
    plot: Plot = None,
    speed: Annotated[bool, typer.Option("--speed", help="measure time alone, on any model")] = False,
    chunks: Annotated[int, typer.Option(help="with --speed", min=2)] = 8,
    chunk_tokens: Annotated[int, typer.Option(help="with --speed", min=16)] = 512,
    rounds: Annotated[int, typer.Option(help="with --speed: of all arms", min=1)] = 3,
    peer: Annotated[
        str | None,
        typer.Option(help="with --speed: also over HTTP beside llama-server (the xllamacpp wheel), or a path of one"),
    ] = None,
    threads: Annotated[int, typer.Option(help="compute threads", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="the same seed makes the same documents", min=0)] = 0,
) -> None:
    """Chunks reused where they have moved to: what it costs in quality, and what it saves before the first token."""
    from rekindle.cli.blend import measure_quality, measure_time

    if speed:
        refuse_given(given, _OF_QUALITY, "is not for --speed, which asks nothing: leave one of them out")
        if ratio is not None and len(ratio) > 1:
            raise InvalidRequest("--ratio: with --speed one is expected, got several", param="ratio")
        measure_time(model, engine, chunks, chunk_tokens, ratio[0] if ratio else 0.15, threads, rounds, seed, peer)
        return
    refuse_given(given, _OF_SPEED, "is for --speed: add that, or leave it out")
    if not measure_quality(model, engine, data, documents, ratio, threads, seed, plot, gate):
        raise typer.Exit(FAILED)


add_torch_commands(lab)
