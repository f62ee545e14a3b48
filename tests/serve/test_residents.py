"""Who leaves the engine first."""

from __future__ import annotations

from tests.serve.conftest import Stage, ids


def resident(stage: Stage, seed: int, count: int) -> int:
    """The sequence that a request of so many tokens leaves behind."""
    before = set(stage.scheduler.residents.seqs)
    stage.ask(ids(seed, count), 1)
    (seq,) = set(stage.scheduler.residents.seqs) - before
    return seq


def evict(stage: Stage, *, for_cells: bool = True) -> set[int]:
    """The sequences that stay after one has left."""
    assert stage.scheduler.residents.evict(for_cells=for_cells)
    stage.scheduler.check_integrity()
    return set(stage.scheduler.residents.seqs)


def test_the_one_idle_for_longest_leaves_for_cells_whatever_its_size(stage: Stage) -> None:
    large, small, newest = (resident(stage, seed, count) for seed, count in ((1, 500), (2, 50), (3, 50)))
    assert evict(stage) == {small, newest}
    stage.scheduler.residents.touch(small)
    assert evict(stage) == {small}
    assert large not in stage.scheduler.residents.seqs


def test_a_small_one_leaves_for_a_sequence(stage: Stage) -> None:
    large, small = resident(stage, 1, 500), resident(stage, 2, 50)
    assert evict(stage, for_cells=False) == {large}
    assert small not in stage.scheduler.residents.seqs


def test_one_that_is_saved_already_leaves_before_one_a_little_older(stage: Stage) -> None:
    older, saved, newest = (resident(stage, seed, 100) for seed in (1, 2, 3))
    stage.scheduler.residents.save(saved)
    assert evict(stage) == {older, newest}


def test_one_whose_cells_are_all_shared_stays_until_there_is_no_other(stage: Stage) -> None:
    prompt = ids(1, 100)
    stage.ask(prompt, 1)
    longer = stage.submit([*prompt, *ids(2, 40)], 30)
    stage.run(until=lambda: longer.num_tokens > 0)  # it shares all cells of the resident, and runs
    (shared,) = stage.scheduler.residents.seqs
    other = stage.submit(ids(3, 50), 1)
    stage.run(until=lambda: bool(other.events) and other.run.seq is None)
    assert longer.run.seq is not None
    (newest,) = set(stage.scheduler.residents.seqs) - {shared}
    assert stage.engine.num_own(shared) == 0
    assert evict(stage) == {shared}
    assert newest not in stage.scheduler.residents.seqs
    assert evict(stage) == set()
    stage.run()


def test_what_leaves_is_in_the_store_and_costs_nothing_to_come_back() -> None:
    stage = Stage(num_cells=220)
    prompts = [ids(seed, 100) for seed in range(4)]
    for prompt in prompts * 2:
        stage.ask(prompt, 1)
    assert stage.engine.num_computed == 4 * 100
