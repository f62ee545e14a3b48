"""Plans reuse the most, cover the prompt exactly, and say why."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rekindle.reuse.plan import Compute, Fork, Place, Resident, Stored, make_plan
from rekindle.reuse.prompt import Prompt
from rekindle.tokens import as_tokens, common_length

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=30)


def prompt(*ids: int) -> Prompt:
    return Prompt(as_tokens(ids))


def test_nothing_known_is_computed() -> None:
    plan = make_plan(prompt(1, 2, 3), [], Stored())
    assert plan.steps == (Compute(0, 3, "not read before"),)
    assert plan.miss == "no resident sequence and no stored block begins like this prompt"


def test_a_whole_prompt_with_its_logits_computes_nothing() -> None:
    plan = make_plan(prompt(1, 2, 3), [Resident(7, as_tokens([1, 2, 3, 4]), frozenset({3}))], Stored())
    assert [type(step) for step in plan.steps] == [Fork]
    assert (plan.computed, plan.miss) == (0, None)


def test_a_whole_prompt_without_logits_computes_its_last_token() -> None:
    plan = make_plan(prompt(1, 2, 3), [Resident(7, as_tokens([1, 2, 3, 4]))], Stored())
    assert [(type(s), s.start, s.stop) for s in plan.steps] == [(Fork, 0, 2), (Compute, 2, 3)]
    assert plan.miss == "the logits after the prompt's last token are not kept"


def test_blocks_go_on_where_a_fork_ends_at_a_block() -> None:
    stored = Stored(length=12, block_tokens=4)
    plan = make_plan(prompt(*range(14)), [Resident(7, as_tokens([0, 1, 2, 3, 4, 5, 9]))], stored)
    assert [(type(s), s.start, s.stop) for s in plan.steps] == [(Fork, 0, 4), (Place, 4, 12), (Compute, 12, 14)]


def test_among_equal_residents_the_one_with_the_logits_is_forked() -> None:
    residents = [Resident(1, as_tokens([1, 2])), Resident(2, as_tokens([1, 2]), frozenset({2}))]
    assert make_plan(prompt(1, 2), residents, Stored()).computed == 0


def test_a_first_difference_is_named() -> None:
    plan = make_plan(prompt(1, 2, 3, 4), [Resident(7, as_tokens([1, 2, 9, 9]))], Stored())
    assert plan.miss == "token 2 differs from the nearest sequence's"


@given(tokens, st.lists(st.tuples(tokens, st.sets(st.integers(1, 30))), max_size=4), st.integers(0, 7), st.booleans())
def test_every_plan_covers_the_prompt_and_reuses_all_it_can(
    ids: list[int], known: list[tuple[list[int], set[int]]], num_blocks: int, whole: bool
) -> None:
    wanted = Prompt(as_tokens(ids))
    residents = [Resident(i, as_tokens(each), frozenset(marks)) for i, (each, marks) in enumerate(known)]
    length = len(ids) if whole else min(4 * num_blocks, len(ids))
    stored = Stored(length, has_logits=whole, block_tokens=4)
    plan = make_plan(wanted, residents, stored)  # covers 0 to the end without gap: checked by Plan itself
    shared = [common_length(wanted.tokens, r.tokens) for r in residents]
    free = whole or any(s == len(ids) in r.logits_at for s, r in zip(shared, residents, strict=True))
    assert plan.reused == min(max([length, *shared]), len(ids) if free else len(ids) - 1)
    for step in plan.steps:
        if isinstance(step, Fork):
            assert step.stop <= shared[step.seq]
        if isinstance(step, Place):
            assert step.start % 4 == 0 and step.stop <= length
    assert (plan.miss is None) == (plan.computed == 0)
    assert plan.as_dict()["reused"] + plan.as_dict()["computed"] == len(ids)
