"""Examples of others as tasks: CacheBlend's, and LongBench's rows.

CacheBlend's examples are `[{"ctxs": [{"title", "text"}], "question", "answers"}]`, LongBench's rows
`{"context", "input", "answers"}`, one per line, whose context is cut at its "Passage N:" marks or else at paragraphs.

They are put to the model as a server would: by its chat template, as one message of passages and question, or, where there
is none, as text that an answer continues.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rekindle.errors import InvalidRequest
from rekindle.lab.blend_tasks import Asked, BlendTask
from rekindle.model.chunks import Chunk
from rekindle.serve.prompting import Prompting
from rekindle.tokens import Tokens, as_tokens, common_length

_ASKED = "Answer from these passages, in a few words."
_PASSAGE = re.compile(r"^(?=Passage \d+:)", re.MULTILINE)
_FILE_CHUNK = 2_000  # characters of a chunk of a context without marks, about
_ANSWER_TOKENS = 32
_FORMS = '{"ctxs": [{"title", "text"}], "question", "answers"} or {"context", "input", "answers"}'


@dataclass(frozen=True, eq=False)
class Written:
    """Passages and a question as tokens."""

    before: Tokens
    chunks: tuple[Tokens, ...]
    mark: Tokens  # behind each chunk
    question: Tokens  # up to where the answer begins


Write = Callable[[Sequence[str], str], Written]


def writer(prompting: Prompting) -> Write:
    """How questions are put to this model."""
    return _as_text(prompting) if prompting.model.template is None else _as_chat(prompting)


def _as_text(prompting: Prompting) -> Write:
    tokenizer = prompting.model.tokenizer

    def write(texts: Sequence[str], question: str) -> Written:
        before = tokenizer.encode(f"{_ASKED}\n\n", bos=True)
        chunks = tuple(tokenizer.encode(text) for text in texts)
        return Written(before, chunks, tokenizer.encode("\n\n"), tokenizer.encode(f"Question: {question}\nAnswer:"))

    return write


def _as_chat(prompting: Prompting) -> Write:
    def write(texts: Sequence[str], question: str) -> Written:
        content = [_ASKED, *map(Chunk, texts), question]
        prompt = prompting.chat_prompt([{"role": "user", "content": content}])
        spans, tokens = prompt.chunks, prompt.tokens
        mark = tokens[spans[0].stop : spans[1].start] if len(spans) > 1 else as_tokens([])
        behind = tokens[spans[-1].stop :]
        question_tokens = behind[len(mark) :] if common_length(mark, behind) == len(mark) else behind
        chunks = tuple(tokens[span.start : span.stop] for span in spans)
        return Written(tokens[: spans[0].start], chunks, mark, question_tokens)

    return write


def file_tasks(path: Path, write: Write, seed: int = 0) -> Iterator[BlendTask]:
    """Tasks of a file in one of the formats above. Raises InvalidRequest for any other."""
    for number, row in enumerate(_rows(path), 1):
        texts, question, answers = _parse(f"{path}: example {number}", row)
        written = write(texts, question)
        rng = random.Random(f"{seed}.{number - 1}")
        met = list(range(len(texts)))
        rng.shuffle(met)
        yield BlendTask(
            before=written.before,
            mark=written.mark,
            chunks=written.chunks,
            met=tuple(met),
            asked=(Asked(written.question, answers, "file", _ANSWER_TOKENS),),
        )


def _rows(path: Path) -> list[Any]:
    try:
        text = path.read_text("utf-8-sig")  # some editors begin a file with a mark of its encoding
        lines = [line for line in text.split("\n") if line.strip()]  # other ends of lines may stand within texts
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    except OSError as error:
        raise InvalidRequest(f"the examples in {path} can't be read: {error.strerror}", param="data") from None
    except UnicodeDecodeError:
        raise InvalidRequest(f"the examples in {path} can't be read: it is not UTF-8 text", param="data") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path}: a JSON list or JSON lines expected; {error}", param="data") from None
    if not rows:
        raise InvalidRequest(f"{path}: a list of examples expected, got none", param="data")
    return list(rows)


def _parse(where: str, row: Any) -> tuple[list[str], str, tuple[str, ...]]:
    """Passages, question and answers. Raises InvalidRequest."""
    if not isinstance(row, dict) or not ({"ctxs", "context"} & set(row)):
        raise InvalidRequest(f"{where}: {_FORMS} expected", param="data")
    question = row.get("question" if "ctxs" in row else "input")
    if not isinstance(question, str) or not question.strip():
        raise InvalidRequest(f"{where} has no question; {_FORMS} expected", param="data")
    answers = list(_texts(row.get("answers")))
    if not answers or not all(isinstance(each, str) for each in answers):
        raise InvalidRequest(f"{where}: answers: a list of texts expected, at least one", param="data")
    texts = _ctxs(where, row["ctxs"]) if "ctxs" in row else _context(where, row["context"])
    if not texts:
        raise InvalidRequest(f"{where} has no passage with text in it; {_FORMS} expected", param="data")
    return texts, question, tuple(answers)


def _texts(answers: Any) -> Iterator[Any]:
    """Each answer; alone, in a list, or in lists of spellings in one, as in CacheBlend's examples of 2WikiMQA."""
    for each in answers if isinstance(answers, list) else [answers]:
        yield from each if isinstance(each, list) else [each]


def _ctxs(where: str, ctxs: Any) -> list[str]:
    texts = []
    for each in ctxs if isinstance(ctxs, list) else [None]:
        text, title = (each.get("text"), each.get("title") or "") if isinstance(each, dict) else (None, "")
        if not isinstance(text, str) or not isinstance(title, str):
            raise InvalidRequest(f'{where}: ctxs: a list of {{"title", "text"}} expected', param="data")
        if text.strip():
            texts.append(f"{title}\n{text}".strip())
    return texts


def _context(where: str, context: Any) -> list[str]:
    if not isinstance(context, str):
        raise InvalidRequest(f"{where}: context: a text expected", param="data")
    return list(_passages(context))


def _passages(context: str) -> Iterator[str]:
    parts = [part.strip() for part in _PASSAGE.split(context) if part.strip()]
    if len(parts) > 1:
        yield from parts
        return
    paragraphs = [paragraph for paragraph in context.split("\n") if paragraph.strip()]
    sizes = np.cumsum([len(paragraph) for paragraph in paragraphs])
    edges = np.flatnonzero(np.diff(sizes // _FILE_CHUNK, prepend=-1)).tolist()
    for start, stop in pairwise([*edges, len(paragraphs)]):
        yield "\n".join(paragraphs[start:stop])
