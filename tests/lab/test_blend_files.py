"""Examples of others: read, put to the model as a server would, asked about, refused in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rekindle.cli.blend import measure_quality
from rekindle.errors import InvalidRequest
from rekindle.lab.blend import run_blend
from rekindle.lab.blend_files import Write, file_tasks, writer
from rekindle.model.ember.dialogue import ASSISTANT, USER
from rekindle.model.model import Model
from rekindle.serve.prompting import Prompting

CTXS = {
    "ctxs": [{"title": "A", "text": "Vodris paints in orange."}, {"title": None, "text": "Nouraix likes the sea."}],
    "question": "Which?",
    "answers": ["one"],
}
ROW = {
    "context": "Passage 1:\nfirst text\nPassage 2:\nsecond text",
    "input": "Which?",
    "answers": ["first"],
    "length": 4,
}


@pytest.fixture(scope="module")
def ember() -> Iterator[Prompting]:
    model = Model.open("builtin", vocab_only=True)
    yield Prompting(model)
    model.close()


@pytest.fixture(params=["chat", "text"])
def prompting(request: pytest.FixtureRequest, ember: Prompting) -> Prompting:
    """A model with a chat template, and one without."""
    return ember if request.param == "chat" else Prompting(replace(ember.model, template=None))


@pytest.fixture
def write(prompting: Prompting) -> Write:
    return writer(prompting)


def saved(folder: Path, content: str) -> Path:
    (folder / "rows.json").write_text(content)
    return folder / "rows.json"


@pytest.mark.parametrize("row", [CTXS, ROW], ids=["cacheblend", "longbench"])
def test_files_of_examples(tmp_path: Path, write: Write, row: dict[str, Any]) -> None:
    for content, count in ((json.dumps([row]), 1), (f"\n{json.dumps(row)}\n\n{json.dumps(row)}\n", 2)):
        tasks = list(file_tasks(saved(tmp_path, content), write))
        assert len(tasks) == count and len(tasks[0].chunks) == 2
        assert tasks[0].asked[0].answers == tuple(row["answers"])


@pytest.mark.parametrize(
    ("given", "answers"),
    [("one", ("one",)), (["one", "1"], ("one", "1")), ([["one", "1"], ["two"]], ("one", "1", "two"))],
)
def test_answers_come_alone_in_a_list_and_in_lists_of_spellings(
    tmp_path: Path, write: Write, given: Any, answers: tuple[str, ...]
) -> None:
    (task,) = file_tasks(saved(tmp_path, json.dumps([CTXS | {"answers": given}])), write)
    assert task.asked[0].answers == answers


def test_a_mark_of_the_encoding_is_no_part_of_the_examples(tmp_path: Path, write: Write) -> None:
    for content in (json.dumps([CTXS]), f"{json.dumps(CTXS)}\n{json.dumps(CTXS)}"):
        assert list(file_tasks(saved(tmp_path, f"\ufeff{content}"), write))


def test_lines_end_with_newlines_and_nothing_else(tmp_path: Path, write: Write) -> None:
    row = ROW | {"context": "one\u2028two\x85three"}
    lines = [json.dumps(row, ensure_ascii=False)] * 2
    assert len(list(file_tasks(saved(tmp_path, "\r\n".join(lines)), write))) == 2


def test_a_task_is_the_prompt_of_a_server(tmp_path: Path, ember: Prompting) -> None:
    (task,) = file_tasks(saved(tmp_path, json.dumps([CTXS])), writer(ember))
    decode = ember.model.tokenizer.decode
    whole = [*task.prompt.tokens, *task.asked[0].tokens]
    content = [
        "Answer from these passages, in a few words.",
        "A\nVodris paints in orange.",
        "Nouraix likes the sea.",
        "Which?",
    ]
    sent = ember.chat_prompt([{"role": "user", "content": "\n".join(content)}])
    assert whole == sent.tokens.tolist()
    assert [decode(chunk.tolist()).strip() for chunk in task.chunks] == ["A\n Vodris paints in orange.", content[2]]
    assert {USER, ASSISTANT} <= {ember.model.tokenizer.special_text(token) for token in whole}


def test_text_for_a_model_without_a_template(tmp_path: Path, ember: Prompting) -> None:
    prompting = Prompting(replace(ember.model, template=None))
    (task,) = file_tasks(saved(tmp_path, json.dumps([CTXS])), writer(prompting))
    tokenizer = ember.model.tokenizer
    assert task.prompt.tokens[0] == tokenizer.bos
    assert tokenizer.decode(task.asked[0].tokens.tolist()).strip() == "Question: Which?\nAnswer:"


def test_paragraphs_are_chunks_where_there_are_no_marks(tmp_path: Path, write: Write) -> None:
    text = "\n".join("x" * 700 for _ in range(9))
    row = {"context": text, "input": "Which?", "answers": "x"}
    (task,) = file_tasks(saved(tmp_path, json.dumps(row)), write)
    assert len(task.chunks) == 4 and task.asked[0].answers == ("x",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "a list of examples expected, got none"),
        ("[]", "a list of examples expected, got none"),
        ("{", "a JSON list or JSON lines expected"),
        ("[" * 10_000, "a JSON list or JSON lines expected"),
        ("[1]", "example 1: {"),
        ([{"question": "Which?"}], "example 1: {"),
        ([CTXS, CTXS | {"question": None}], "example 2 has no question"),
        ([CTXS | {"question": " "}], "example 1 has no question"),
        ([CTXS | {"answers": []}], "answers: a list of texts expected"),
        ([CTXS | {"answers": [1]}], "answers: a list of texts expected"),
        ([CTXS | {"answers": [[]]}], "answers: a list of texts expected"),
        ([CTXS | {"answers": [["one"], [["two"]]]}], "answers: a list of texts expected"),
        ([CTXS | {"answers": None}], "answers: a list of texts expected"),
        ([CTXS | {"ctxs": []}], "has no passage with text"),
        ([CTXS | {"ctxs": [{"text": " "}]}], "has no passage with text"),
        ([CTXS | {"ctxs": "text"}], "ctxs: a list of"),
        ([CTXS | {"ctxs": ["text"]}], "ctxs: a list of"),
        ([CTXS | {"ctxs": [{"title": "A"}]}], "ctxs: a list of"),
        ([ROW | {"context": ["a"]}], "context: a text expected"),
        ([ROW | {"context": " "}], "has no passage with text"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, write: Write, content: Any, words: str) -> None:
    path = saved(tmp_path, content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InvalidRequest) as refused:
        list(file_tasks(path, write))
    assert words in str(refused.value) and "rows.json" in str(refused.value)


def test_what_is_no_text_is_refused(tmp_path: Path, write: Write) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\x00")
    for name, words in (("bytes", "not UTF-8"), ("nothing.json", "No such file"), ("", "Is a directory")):
        with pytest.raises(InvalidRequest, match=words):
            list(file_tasks(tmp_path / name, write))


def test_long_examples_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = CTXS | {"ctxs": [{"text": "Vodris paints in orange. " * 2000}]}
    path = saved(tmp_path, json.dumps([CTXS, long, ROW]))
    report = run_blend(engine="llama", data=path, ratios=(0.15,), context=256)  # three sequences of one need more
    assert (report.documents, report.left_out) == (2, 1)
    with pytest.raises(InvalidRequest, match=r"the shortest example has [\d,]+ tokens; ember holds 4,096"):
        run_blend(engine="llama", data=saved(tmp_path, json.dumps([long])), ratios=(0.15,))
    path = saved(tmp_path, json.dumps([CTXS]))
    assert not measure_quality("builtin", "llama", path, 1, [0.15], 1, 0, None, 0.9)
    told = capsys.readouterr()
    assert "full prefill answers none of the 1 questions right" in told.err
    assert "…" not in told.out and json.loads(told.out.strip().splitlines()[-1])["documents"] == 1
