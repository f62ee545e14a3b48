"""A lesson's supervision points where a reader would look."""

from collections.abc import Mapping
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.model.ember import dialogue
from rekindle.model.ember.grammar import POOLS
from rekindle.model.ember.language import Kind
from rekindle.model.ember.lessons import Mixture, Teacher

NAMES = {" " + name for pool in POOLS.values() for name in pool}
MIXTURE = Mixture((2, 9), recap=0.3, kinds=tuple((kind, 1.0) for kind in Kind), small_talk=0.2, variety=0.5)
seeds = st.integers(0, 10**9)


@given(seeds)
@settings(max_examples=60)
def test_values_are_looked_up_where_they_stand(ids: Mapping[str, int], seed: int) -> None:
    lesson = Teacher(ids).lesson(seed, MIXTURE, None)
    assistant = ids[dialogue.ASSISTANT]
    for row, target in zip(lesson.value_rows, lesson.value_targets, strict=True):
        assert target < row
        if target and lesson.ids[row] != assistant:
            assert lesson.ids[target] == lesson.ids[row + 1], f"seed {seed}"


@given(seeds)
@settings(max_examples=60)
def test_subjects_are_names(ids: Mapping[str, int], seed: int) -> None:
    lesson = Teacher(ids).lesson(seed, MIXTURE, None)
    names = {ids[name] for name in NAMES}
    assert lesson.subject_rows
    for row, target in zip(lesson.subject_rows, lesson.subject_targets, strict=True):
        assert target < row
        assert lesson.ids[target] in names, f"seed {seed}"


@given(seeds)
@settings(max_examples=60)
def test_only_what_the_assistant_says_weighs_fully(ids: Mapping[str, int], seed: int) -> None:
    lesson = Teacher(ids).lesson(seed, replace(MIXTURE, recap=0.0), None)
    role = None
    roles = {ids[name] for name in (dialogue.SYSTEM, dialogue.USER, dialogue.ASSISTANT)}
    for token, weight in zip(lesson.ids, lesson.weights, strict=True):
        if token in roles:
            role = token
            assert weight == 0.0
        elif weight >= 1.0:
            assert role == ids[dialogue.ASSISTANT], f"seed {seed}"


def test_the_same_seed_gives_the_same_lesson(ids: Mapping[str, int]) -> None:
    assert Teacher(ids).lesson("a", MIXTURE, 300) == Teacher(ids).lesson("a", MIXTURE, 300)
    assert Teacher(ids).lesson("a", MIXTURE, 300) != Teacher(ids).lesson("b", MIXTURE, 300)
