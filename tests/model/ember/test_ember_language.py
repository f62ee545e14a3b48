"""The language tells what it says it tells, the same everywhere, and its splits are disjoint."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.model.ember.grammar import POOLS, RELATIONS, pieces_of
from rekindle.model.ember.language import (
    Document,
    Kind,
    Questioner,
    Split,
    generate_document,
    generate_questions,
    pair_is_held_out,
    recut,
)
from rekindle.model.ember.village import village, write_village

VILLAGE = Path(__file__).parents[3] / "examples" / "village"
seeds = st.integers(0, 10**9)
splits = st.sampled_from(Split)
NAMES = {name for pool in POOLS.values() for name in pool}


def read(text: str) -> list[tuple[str, str, str]]:
    """An independent reader: (subject, relation, value) of each sentence, "This one" being who was named last."""
    told, named = [], ""
    for sentence in re.findall(r"[^.]+\.", text):
        words = pieces_of(" " + sentence.strip())
        if words[:2] != (" This", " one"):
            named = words[0][1:]
        predicate = words[2:] if words[:2] == (" This", " one") else words[1:]
        for relation in RELATIONS.values():
            after = (*relation.after, ".")
            value = predicate[len(relation.before) : len(predicate) - len(after)]
            if (*relation.before, *value, *after) == predicate and value in relation.values:
                told.append((named, relation.name, "".join(value)))
                break
        else:
            named = ""  # a filler: nobody can be referred to after it
    return told


@given(seeds, splits, st.integers(1, 20), st.sampled_from((0.0, 0.3)))
def test_the_text_alone_tells_every_fact(seed: int, split: Split, num_people: int, filler: float) -> None:
    document = generate_document(seed, num_people=num_people, split=split, filler=filler)
    assert read(document.text) == [(f.subject, f.relation, "".join(f.value)) for f in document.facts]


@given(seeds, splits, st.integers(1, 20))
def test_a_document_holds_pairs_of_its_own_split_only(seed: int, split: Split, num_people: int) -> None:
    for fact in generate_document(seed, num_people=num_people, split=split).facts:
        assert pair_is_held_out(fact.relation, fact.subject, fact.value) is (split is Split.HELD_OUT)


def test_a_document_is_the_same_in_every_process() -> None:
    program = "from rekindle.model.ember.language import *; print(generate_document(7, num_tokens=500).text)"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert other == generate_document(7, num_tokens=500).text + "\n"


def test_the_language_needs_no_tensor_library() -> None:
    program = (
        "import sys, rekindle.model.ember.language, rekindle.model.ember.lessons;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy', 'tokenizers')))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@given(seeds, st.integers(100, 4000))
@settings(max_examples=30)
def test_a_document_of_so_many_tokens_ends_just_before(seed: int, num_tokens: int) -> None:
    document = generate_document(seed, num_tokens=num_tokens)
    assert num_tokens * 0.8 - 20 <= document.num_tokens <= num_tokens


@given(seeds, seeds)
def test_cutting_elsewhere_keeps_the_sentences(seed: int, cut: int) -> None:
    document = generate_document(seed)
    again = recut(document, cut)
    assert again.facts == document.facts
    assert " ".join(again.passages) == " ".join(document.passages)
    assert all(again.passage_sentences)


def _holds(document: Document, subject: str, relation: str) -> bool:
    return any(fact.subject == subject and fact.relation == relation for fact in document.facts)


@given(seeds)
def test_answers_follow_from_the_passages_they_need(seed: int) -> None:
    document = generate_document(seed)
    for question in generate_questions(document, seed, count=3):
        # with the other passages blanked out, the text still tells these facts
        needed = " ".join(document.passages[number] for number in question.passages)
        told = read(needed)
        for fact in question.facts:
            assert (fact.subject, fact.relation, "".join(fact.value)) in told, f"seed {seed}: {question}"
        if question.kind in (Kind.DIRECT, Kind.COREFERENCE, Kind.REVERSE):
            assert question.answer == question.facts[0].text
            refers = document.sentences[question.sentences[0]].refers
            assert question.kind is Kind.REVERSE or refers is (question.kind is Kind.COREFERENCE)
        if question.kind is Kind.TWO_HOP:
            first, second = question.facts
            assert first.value[0][1:] == second.subject
            assert question.answer == f"{first.text} {second.text}"
        if question.kind is Kind.REVERSE:
            (fact,) = question.facts
            assert [f for f in document.facts if (f.relation, f.value) == (fact.relation, fact.value)] == [fact]


@given(seeds)
def test_what_is_called_unstated_is_not_in_the_document(seed: int) -> None:
    document = generate_document(seed)
    questioner = Questioner(document, random.Random(seed))
    for _ in range(20):
        question = questioner.draw(Kind.UNSTATED)
        assert question is not None
        for relation in RELATIONS.values():
            if question.text in {way.format(question.subject) for way in relation.questions}:
                assert not _holds(document, question.subject, relation.name), question
            if relation.reverse and question.text == relation.reverse.format(question.subject):
                assert all(
                    "".join(f.value)[1:] != question.subject for f in document.facts if f.relation == relation.name
                )


def test_names_are_nothing_else() -> None:
    pools = list(POOLS.values())
    assert len(NAMES) == sum(len(pool) for pool in pools)
    words = {piece[1:] for relation in RELATIONS.values() for piece in (*relation.before, *relation.after)}
    assert not NAMES & words


def test_the_village_on_disk_is_the_one_of_its_seed(tmp_path: Path) -> None:
    write_village(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 13
    for name in names:
        assert (VILLAGE / name).read_text() == (tmp_path / name).read_text(), (
            f"{name}: run `… village examples/village`"
        )
    assert sum(passage.startswith("This one") for passage in village().passages) >= 4
    assert {question["kind"] for question in json.loads((VILLAGE / "questions.json").read_text())} == {
        kind.value for kind in Kind
    }
