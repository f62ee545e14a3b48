"""Questions about a folder of documents: passages are looked up, put in order, and blended instead of read again.

    python examples/rag.py                                    # documents in the built-in model's language, made here
    python examples/rag.py FOLDER --question "…" --model m.gguf

Every file of the folder is a passage. All are computed once, each on its own (`llm.warm`). A question then chooses the
passages that share its rarest words, each with the one behind it, and puts them in the order of their names. The prompt is
a list of `rekindle.Chunk`s with the question behind them, and it is answered in two ways: blended, where each chunk's KV is
placed where the chunk now stands and a few of its tokens are computed anew, and then exactly, where only the beginning
that an earlier prompt had is reused.

The limit: what is blended still computes its question and `--ratio` of its passages' tokens.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import rekindle
from rekindle.model.ember.language import Document, Kind, generate_document, generate_questions

PER_FILE = 10  # of the built-in model's passages, which are short


@dataclass(frozen=True)
class Ask:
    """One question."""

    text: str
    expected: str | None = None  # None: nobody knows


@dataclass(frozen=True)
class Way:
    """How a prompt was answered."""

    answer: str
    first_token_ms: float
    computed: int  # tokens of the prompt; the others were reused
    prompt: int


class Library:
    """Passages by the names of their files, and which of them are about something."""

    def __init__(self, folder: Path) -> None:
        files = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".md"))
        self.texts = [text for path in files if (text := path.read_text("utf-8").strip())]
        if not self.texts:
            raise SystemExit(f"{folder} has no .txt or .md files with text in them")
        self._words = [set(_words(text)) for text in self.texts]
        self._spread = Counter(word for words in self._words for word in words)

    def choose(self, question: str, count: int) -> list[int]:
        """The best passages, each with the one behind it, in order."""
        chosen: list[int] = []
        for index in sorted(range(len(self.texts)), key=lambda index: -self._score(question, index)):
            for each in (index, index + 1):
                if each < len(self.texts) and each not in chosen and len(chosen) < count:
                    chosen.append(each)
        return sorted(chosen)

    def _score(self, question: str, index: int) -> float:
        """Rare words count more."""
        shared = set(_words(question)) & self._words[index]
        return sum(math.log(1 + len(self.texts) / self._spread[word]) for word in shared)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def make_documents(folder: Path, tokens: int, seed: int, count: int) -> list[Ask]:
    """Write passages in the built-in model's language; questions whose answers stand in one of them, or across two."""
    made = generate_document(f"rag {seed}", num_tokens=tokens)
    document = Document(made.sentences, made.passage_starts[::PER_FILE])
    for number, text in enumerate(document.passages, 1):
        (folder / f"passage-{number:02d}.txt").write_text(text.strip() + "\n")
    kinds = (Kind.DIRECT, Kind.COREFERENCE)
    found = [generate_questions(document, seed, kinds=(kind,), count=count) for kind in kinds]
    pairs = [each for pair in zip(*found, strict=False) for each in pair]
    return [Ask(each.text, each.answer) for each in pairs[:count]]


def answer(llm: rekindle.LLM, passages: Iterable[str], question: str, blend: Any) -> Way:
    """Ask about these passages, in this order. This is all there is to it."""
    prompt: list[str | rekindle.Chunk] = [*map(rekindle.Chunk, passages), question]
    text = llm.generate(prompt, max_tokens=32, blend=blend)
    done = llm.last
    assert done is not None
    return Way(text.strip(), done.timings.ttft_ms, done.usage.computed_tokens, done.usage.prompt_tokens)


def main(
    folder: Annotated[Path | None, typer.Argument(help="Text files, each a passage; default: they are made.")] = None,
    question: Annotated[list[str] | None, typer.Option(help="What to ask about them; may be repeated.")] = None,
    model: Annotated[str, typer.Option(help="builtin, a .gguf file, or a folder of safetensors.")] = "builtin",
    passages: Annotated[int, typer.Option(min=1, help="How many are put before a question.")] = 6,
    select: Annotated[
        str, typer.Option(help="Which tokens are computed anew: auto, first, remembered, none.")
    ] = "auto",
    ratio: Annotated[float, typer.Option(min=0, max=1, help="How many of them.")] = 0.15,
    questions: Annotated[int, typer.Option(min=1, help="About documents that are made.")] = 6,
    tokens: Annotated[int, typer.Option(min=400, max=20_000, help="Of documents that are made.")] = 6000,
    seed: Annotated[int, typer.Option(help="Of documents that are made.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads; default: all cores.")] = None,
) -> None:
    """Answers from looked-up passages: blended beside exact, with times."""
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as made:
        if folder is None:
            asks = make_documents(Path(made), tokens, seed, questions)
            asks = [Ask(text) for text in question] if question else asks
        elif question:
            asks = [Ask(text) for text in question]
        else:
            raise SystemExit('expected a question about the folder: --question "…"')
        library = Library(folder or Path(made))
    with rekindle.load(model, threads=threads, store="none") as llm:
        warmed = llm.warm([rekindle.Chunk(text) for text in library.texts])
        size = sum(each.tokens for each in warmed)
        seconds = sum(each.seconds for each in warmed)
        console.print(f"{len(warmed)} passages of {size:,} tokens, computed on their own in {seconds:.2f} s.\n")
        answers: list[tuple[Ask, Way, Way]] = []
        plan = None
        for ask in asks:
            chosen = [library.texts[index] for index in library.choose(ask.text, passages)]
            blended = answer(llm, chosen, ask.text, {"select": select, "ratio": ratio})
            plan = llm.last.plan if llm.last is not None and not answers else plan
            exact = answer(llm, chosen, ask.text, False)
            answers.append((ask, exact, blended))
        console.print(table(answers))
        if plan is not None:
            console.print("\nWhat became of the first question's passages:")
            for chunk in plan.chunks:
                words = [f"{chunk.exact} reused exactly"] if chunk.exact else []
                words += [f"{chunk.placed} placed, moved by {chunk.moved:+}"] if chunk.moved is not None else []
                words += [f"{chunk.recomputed} computed anew ({chunk.why})"] if chunk.recomputed else []
                words = words or ["all computed"]
                console.print(f"  {chunk.stop - chunk.start} tokens: {'; '.join(words)}")
    work = {"model": model, "passages": passages, "select": select, "ratio": ratio, "warmed_tokens": size}
    rows = [{"question": asdict(ask), "exact": asdict(one), "blended": asdict(two)} for ask, one, two in answers]
    typer.echo(json.dumps({"example": "rag", "workload": work, "warm_seconds": seconds, "answers": rows}))


def table(answers: Sequence[tuple[Ask, Way, Way]]) -> Table:
    """For people."""
    shown = Table("question and answers", show_edge=False)
    for heading in ("tokens computed", "first token"):
        shown.add_column(heading, justify="right")
    for ask, exact, blended in answers:
        expected = f"  (expected: {ask.expected})" if ask.expected not in (None, exact.answer) else ""
        shown.add_row(f"[bold]{ask.text}[/bold]{expected}")
        for name, way in (("exact", exact), ("blended", blended)):
            first = f"{way.first_token_ms:,.1f} ms"
            shown.add_row(f"  {name}: {way.answer}", f"{way.computed:,} of {way.prompt:,}", first)
    times = sum(blended.first_token_ms / exact.first_token_ms for _, exact, blended in answers) / len(answers)
    same = sum(exact.answer == blended.answer for _, exact, blended in answers)
    shown.caption = f"{same} of {len(answers)} answers the same; first token in {times:.2f} of the time, on average"
    return shown


if __name__ == "__main__":
    typer.run(main)
