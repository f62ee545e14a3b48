"""Questions about a folder of documents: passages are looked up, put in order, and blended instead of read again.

    python examples/rag.py                                    # documents in the built-in model's language, made here
    python examples/rag.py FOLDER --question "…" --model m.gguf

Every text file of the folder is a passage, or several if it is long. All are computed once, each on its own (`llm.warm`).
A question then chooses the passages that share its rarest words, each with the one behind it, and puts them in the order of
their names. The prompt is a list of `rekindle.Chunk`s with the question behind them, and it is answered in two ways:
blended, where each chunk's KV is placed where the chunk now stands and a few of its tokens are computed anew, and then
exactly, where only the beginning that an earlier prompt had is reused.

The limit: what is blended still computes its question and `--ratio` of its passages' tokens.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import rekindle
from rekindle.model.ember.language import Document, Kind, generate_document, generate_questions
from rekindle.reuse.blend import SELECTS

PER_FILE = 10  # of the built-in model's passages, which are short
LONGEST = 4_000  # characters of a passage, about 1,000 tokens; longer files are cut at paragraphs
_PROBLEMS = Console(stderr=True, highlight=False, soft_wrap=True)


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
        if not folder.is_dir():
            raise SystemExit(f"there is no folder {folder}")
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".txt", ".md") and path.is_file())
        self.texts = [passage for path in files for passage in cut(read(path))]
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

    def knows(self, question: str) -> bool:
        """Whether any passage shares a word with it."""
        return any(word in self._spread for word in _words(question))

    def _score(self, question: str, index: int) -> float:
        """Rare words count more."""
        shared = set(_words(question)) & self._words[index]
        return sum(math.log(1 + len(self.texts) / self._spread[word]) for word in shared)


def read(path: Path) -> str:
    """A file's text; empty, and the user is told, if it is none."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        text, reason = "", getattr(error, "strerror", None) or "it is not UTF-8 text"
        _PROBLEMS.print(f"left out: {path.name}: {reason}", markup=False)
    if "\0" in text:
        _PROBLEMS.print(f"left out: {path.name}: it is not text", markup=False)
        return ""
    return text.strip()


def cut(text: str) -> list[str]:
    """Passages of whole paragraphs, or, where one is very long, of whole words."""
    parts = [text] if len(text) <= LONGEST else [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    short = [piece for part in parts for piece in textwrap.wrap(part, LONGEST, **_AS_IT_IS) or [""]]
    passages: list[str] = []
    for piece in short:
        if passages and len(passages[-1]) + len(piece) + 2 <= LONGEST:
            passages[-1] += f"\n\n{piece}"
        elif piece:
            passages.append(piece)
    return passages


_AS_IT_IS: Any = {"replace_whitespace": False, "expand_tabs": False, "break_on_hyphens": False}


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
    select: Annotated[str, typer.Option(help=f"Which tokens are computed anew: {', '.join(SELECTS)}.")] = "auto",
    ratio: Annotated[float, typer.Option(min=0, max=1, help="How many of them.")] = 0.15,
    questions: Annotated[int, typer.Option(min=1, help="About documents that are made.")] = 6,
    tokens: Annotated[int, typer.Option(min=400, max=20_000, help="Of documents that are made.")] = 6000,
    seed: Annotated[int, typer.Option(help="Of documents that are made.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads; default: all cores.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="All figures, as one line of JSON instead of a table.")
    ] = False,
) -> None:
    """Answers from looked-up passages: blended beside exact, with times."""
    if select not in SELECTS:
        raise SystemExit(f"rag: --select is one of {', '.join(SELECTS)}, got {select}")
    console = Console(highlight=False, soft_wrap=True, quiet=as_json)
    with tempfile.TemporaryDirectory() as made:
        if folder is None:
            asks = make_documents(Path(made), tokens, seed, questions)
            asks = [Ask(text) for text in question] if question else asks
        elif question and all(map(str.strip, question)):
            asks = [Ask(text) for text in question]
        else:
            raise SystemExit('expected a question about the folder: --question "…"')
        library = Library(folder or Path(made))
    try:
        report = compare(console, library, asks, model, threads, passages, {"select": select, "ratio": ratio})
    except rekindle.PromptTooLong as error:
        raise SystemExit(f"rag: {error}; put fewer before a question: --passages") from None
    except rekindle.RekindleError as error:
        raise SystemExit(f"rag: {error}") from None
    if as_json:
        typer.echo(json.dumps(report))


def compare(
    console: Console,
    library: Library,
    asks: Sequence[Ask],
    model: str,
    threads: int | None,
    passages: int,
    blend: dict[str, Any],
) -> dict[str, Any]:
    """Ask in both ways, show both answers, and return the figures. Raises RekindleError."""
    with rekindle.load(model, threads=threads, store="none") as llm:
        with _PROBLEMS.status(f"computing {len(library.texts)} passages on their own …"):
            warmed = llm.warm([rekindle.Chunk(text) for text in library.texts])
        size = sum(each.tokens for each in warmed)
        seconds = sum(each.seconds for each in warmed)
        console.print(f"{len(warmed)} passages of {size:,} tokens, computed on their own in {seconds:.2f} s.\n")
        chosen: list[list[str]] = []
        for ask in asks:
            if not library.knows(ask.text):
                _PROBLEMS.print(f"no passage shares a word with this question: {ask.text}", markup=False)
            chosen.append([library.texts[index] for index in library.choose(ask.text, passages)])
        blended, plans = [], []
        for ask, texts in zip(asks, chosen, strict=True):
            blended.append(answer(llm, texts, ask.text, blend))
            plans.append(llm.last.plan if llm.last is not None else None)
        llm.clear_cache()  # neither way finds what the other has read
        exact = [answer(llm, texts, ask.text, False) for ask, texts in zip(asks, chosen, strict=True)]
        answers = list(zip(asks, exact, blended, strict=True))
        if (plan := plans[0]) is not None:
            console.print("What became of the first question's passages:")
            for chunk in plan.chunks:
                words = [f"{chunk.exact} reused exactly"] if chunk.exact else []
                words += [f"{chunk.placed} placed, moved by {chunk.moved:+}"] if chunk.moved is not None else []
                words += [f"{chunk.recomputed} computed anew ({chunk.why})"] if chunk.recomputed else []
                words = words or [f"all computed ({chunk.why})"]
                console.print(f"  {chunk.stop - chunk.start} tokens: {'; '.join(words)}")
        console.print()
        console.print(table(answers))
    work = {"model": model, "passages": passages, **blend, "warmed_tokens": size}
    rows = [{"question": asdict(ask), "exact": asdict(one), "blended": asdict(two)} for ask, one, two in answers]
    return {"example": "rag", "workload": work, "warm_seconds": seconds, "answers": rows}


def table(answers: Sequence[tuple[Ask, Way, Way]]) -> Table:
    """For people."""
    shown = Table("question and answers", show_edge=False)
    for heading in ("tokens computed", "first token"):
        shown.add_column(heading, justify="right")
    for ask, exact, blended in answers:
        expected = f"  (expected: {ask.expected})" if ask.expected not in (None, exact.answer) else ""
        shown.add_row(Text(ask.text, style="bold").append(expected, style="not bold"))
        for name, way in (("exact", exact), ("blended", blended)):
            first = f"{way.first_token_ms:,.1f} ms"
            shown.add_row(Text(f"  {name}: {way.answer}"), f"{way.computed:,} of {way.prompt:,}", first)
    times = sum(way.first_token_ms for _, _, way in answers) / sum(way.first_token_ms for _, way, _ in answers)
    same = sum(exact.answer == blended.answer for _, exact, blended in answers)
    shown.caption = f"{same} of {len(answers)} answers the same; blended, first tokens took {times:.2f} of the time"
    shown.caption_justify = "left"
    return shown


if __name__ == "__main__":
    typer.run(main)
