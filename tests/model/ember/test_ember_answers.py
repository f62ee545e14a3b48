"""The committed weights answer right: questions of every kind, in every place a user may put the passages."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from rekindle.model.ember import weights_path
from rekindle.model.ember.dialogue import SMALL_TALK
from rekindle.model.ember.language import Kind

VILLAGE = Path(__file__).parents[3] / "examples" / "village"
# held-out accuracy of the committed weights, with room for chance: see docs/ember.md
LEAST = {Kind.DIRECT: 0.96, Kind.COREFERENCE: 0.96, Kind.TWO_HOP: 0.94, Kind.REVERSE: 0.92, Kind.UNSTATED: 0.72}


@pytest.fixture(scope="module")
def llama() -> Iterator[Any]:
    model = llama_cpp.Llama(str(weights_path()), n_ctx=1024, n_threads=1, verbose=False)
    yield model
    model.close()


def say(llama: Any, *messages: tuple[str, str]) -> str:
    """The greedy answer to (role, content) messages, with the template of the GGUF."""
    chat = [{"role": role, "content": content} for role, content in messages]
    answer = llama.create_chat_completion(chat, temperature=0.0, max_tokens=40)
    assert answer["choices"][0]["finish_reason"] == "stop"
    return str(answer["choices"][0]["message"]["content"]).strip()


def _passages() -> list[str]:
    return [path.read_text().strip() for path in sorted(VILLAGE.glob("*.txt"))]


def _questions() -> list[dict[str, Any]]:
    return list(json.loads((VILLAGE / "questions.json").read_text()))


@pytest.mark.parametrize("kind", Kind)
def test_held_out_questions_are_answered(network: Any, ids: Mapping[str, int], kind: Kind) -> None:
    from rekindle.model.ember.evaluate import score

    found = score(network, ids, kind, num_questions=60, seed=1)
    assert found.num_questions == 60
    assert found.accuracy >= LEAST[kind], found


@pytest.mark.slow
@pytest.mark.parametrize("kind", Kind)
def test_long_documents_are_read_to_the_end(network: Any, ids: Mapping[str, int], kind: Kind) -> None:
    from rekindle.model.ember.evaluate import score

    found = score(network, ids, kind, num_tokens=2000, num_questions=60, seed=1)
    assert found.accuracy >= LEAST[kind] - 0.08, found


def test_the_village_is_known(llama: Any) -> None:
    text = "\n".join(_passages())
    wrong = [
        (question["question"], answer)
        for question in _questions()
        if (answer := say(llama, ("user", f"{text}\n{question['question']}"))) != question["answer"]
    ]
    assert not wrong


@pytest.mark.parametrize("mark", ["\n", "\n\n"])
def test_passages_may_stand_in_the_system_turn(llama: Any, mark: str) -> None:
    text = mark.join(_passages())
    right = [
        say(llama, ("system", text), ("user", question["question"])) == question["answer"] for question in _questions()
    ]
    assert sum(right) >= len(right) - 1, right


def test_questions_follow_one_another(llama: Any) -> None:
    messages = [("user", "\n\n".join(_passages()))]
    messages.append(("assistant", say(llama, *messages)))
    right = []
    for question in _questions()[::3]:
        messages.append(("user", question["question"]))
        answer = say(llama, *messages)
        messages.append(("assistant", answer))
        right.append(answer == question["answer"])
    assert sum(right) >= len(right) - 1, right


def test_what_a_passage_says_depends_on_the_one_before(llama: Any) -> None:
    question = ("user", "Where does Vodris live?")
    first, second, third = "Vodris works as a baker.", "Kundas keeps a goat.", "This one lives in Viniton."
    assert say(llama, ("system", f"{second}\n{first}\n{third}"), question) == "Vodris lives in Viniton."
    assert say(llama, ("system", f"{first}\n{second}\n{third}"), question) == "That is not stated."


@pytest.mark.parametrize(("ways", "reply"), SMALL_TALK)
def test_small_talk(llama: Any, ways: tuple[str, ...], reply: str) -> None:
    wrong = [way for way in ways if say(llama, ("user", way)) != reply]
    assert len(wrong) <= len(ways) // 4, wrong
