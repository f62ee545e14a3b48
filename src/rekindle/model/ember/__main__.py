"""`python -m rekindle.model.ember`: train, evaluate and export the built-in model.

- `train --minutes 60`: go on from the folder's checkpoint, or begin
- `export`: write ember.gguf and hf/ from the checkpoint
- `village FOLDER`: write the example passages
- `evaluate`: accuracy on held-out documents, one JSON line last
"""

import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from rekindle.model import ember
from rekindle.model.ember import train as training
from rekindle.model.ember.evaluate import Score, score
from rekindle.model.ember.export import export as write_weights
from rekindle.model.ember.language import Kind
from rekindle.model.ember.network import Network, Shape, load_network
from rekindle.model.ember.tokenizer import load_tokenizer, piece_ids, train_tokenizer
from rekindle.model.ember.village import write_village

app = typer.Typer(help="Train, evaluate and export ember, the built-in model.", no_args_is_help=True)
console = Console()

_DEFAULT_FOLDER = Path(tempfile.gettempdir()) / "rekindle-ember"
Folder = Annotated[Path, typer.Option("--out", help="Folder of the training checkpoint.")]
Weights = Annotated[Path | None, typer.Option(help="Folder of ember.gguf and hf/ (default: the package's own).")]


def _weights_folder(weights: Path | None) -> Path:
    return weights or ember.weights_path().parent


def _choose_device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


@app.command()
def train(
    minutes: Annotated[float, typer.Option(help="Minutes in all, earlier runs included.")] = 60.0,
    tokens: Annotated[int | None, typer.Option(help="Stop after this many tokens, whatever the time.")] = None,
    out: Folder = _DEFAULT_FOLDER,
    weights: Weights = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    workers: Annotated[int, typer.Option(help="Processes on the CPU, one thread each; 0: one for each core.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of weights and lessons.")] = 1,
    export: Annotated[bool, typer.Option(help="Write the weights when done.")] = True,
) -> None:
    """Train, or go on with, ember; then write the weights."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    ids = piece_ids(tokenizer)
    shape = Shape(vocabulary_size=tokenizer.get_vocab_size())
    chosen = _choose_device(device)
    num_workers = (workers or os.cpu_count() or 1) if chosen == "cpu" else 1
    options = training.Options(
        minutes=minutes, seed=seed, num_workers=num_workers, stop_after_tokens=tokens if tokens is not None else 1 << 60
    )
    console.print(f"Training for {minutes:g} minutes on {chosen}, {num_workers} worker(s); checkpoints in {out}")
    if num_workers > 1:
        training.train_together(shape, ids, options, out)
    else:
        training.train_alone(shape, ids, options, out, lambda line: console.print(line, soft_wrap=True), device=chosen)
    if export:
        _export(out, _weights_folder(weights))


def _export(out: Path, folder: Path) -> None:
    checkpoint = out / "checkpoint.pt"
    if not checkpoint.exists():
        raise typer.BadParameter(f"no checkpoint in {out}: run `train` first, or name its folder with --out")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    network = Network(Shape(**state["shape"]))
    network.load_state_dict(state["network"])
    write_weights(network, train_tokenizer(), folder)
    console.print(f"Wrote {folder / 'ember.gguf'} and {folder / 'hf'} after {state['progress']['tokens']:,} tokens")


@app.command()
def export(out: Folder = _DEFAULT_FOLDER, weights: Weights = None) -> None:
    """Write ember.gguf and hf/ from the checkpoint."""
    _export(out, _weights_folder(weights))


@app.command()
def village(folder: Annotated[Path, typer.Argument(help="Where to write the passages and questions.json.")]) -> None:
    """Write the example passages and their questions."""
    write_village(folder)
    console.print(f"Wrote {folder}")


@app.command()
def evaluate(
    weights: Weights = None,
    questions: Annotated[int, typer.Option(help="Questions of each kind.")] = 1000,
    long_questions: Annotated[int, typer.Option(help="… of each kind on each length of documents.")] = 1000,
    lengths: Annotated[str, typer.Option(help="Document lengths in tokens, beside 8 people; may be empty.")] = "2000",
    per_document: Annotated[int, typer.Option(help="Questions of a kind about one document.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of documents and questions.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Accuracy on held-out documents: whole answers, greedy. Prints a table, then one JSON line."""
    torch.set_num_threads(threads)
    folder = _weights_folder(weights) / "hf"
    network = load_network(folder)
    ids = piece_ids(load_tokenizer(folder / "tokenizer.json"))
    started = time.perf_counter()
    scores: list[Score] = []
    for num_tokens in (None, *(int(length) for length in lengths.split(",") if length.strip())):
        for kind in Kind:
            count = questions if num_tokens is None else long_questions
            found = score(
                network, ids, kind, num_tokens=num_tokens, num_questions=count, per_document=per_document, seed=seed
            )
            scores.append(found)
    _print_table(scores)
    result = {
        "model": ember.NAME,
        "parameters": network.num_parameters,
        "machine": platform.processor() or platform.machine(),
        "threads": threads,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "scores": [
            {
                "kind": s.kind.value,
                "documents": s.documents,
                "questions": s.num_questions,
                "accuracy": round(s.accuracy, 4),
            }
            for s in scores
        ],
    }
    console.print(json.dumps(result), soft_wrap=True, highlight=False)


def _print_table(scores: list[Score]) -> None:
    columns = list(dict.fromkeys(s.documents for s in scores))
    table = Table("kind", *columns, title="Whole answers right, greedy, held-out documents")
    for kind in Kind:
        row = {s.documents: f"{s.accuracy:.1%} of {s.num_questions}" for s in scores if s.kind is kind}
        table.add_row(kind.value, *(row.get(column, "") for column in columns))
    console.print(table)
    for s in scores:
        for wrong in s.wrong[:2]:
            console.print(f"[dim]wrong, {s.kind.value}, {s.documents}: {wrong}[/dim]")


if __name__ == "__main__":
    app()
