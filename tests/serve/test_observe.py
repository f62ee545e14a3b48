"""What observers are told, and that they disturb nobody."""

from __future__ import annotations

from typing import Any

import pytest
from tests.serve.conftest import Stage, ids

from rekindle.errors import EngineError
from rekindle.serve.observe import Observer, Observers


class Diary(Observer):
    """Writes down what it is told, but for steps."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, Any]] = []
        self.steps = 0

    def __getattribute__(self, name: str) -> Any:
        if name in vars(Observer) and name != "stepped" and not name.startswith("_"):
            return lambda *told: self.entries.append((name, told[-1]))
        return super().__getattribute__(name)

    def stepped(self, step: object) -> None:
        self.steps += 1

    def words(self) -> list[str]:
        return [name for name, _ in self.entries]


def watched(diary: Observer, **options: int) -> Stage:
    return Stage(observer=Observers([diary]), **options)


def test_a_request_is_told_of_from_the_queue_to_its_end() -> None:
    diary = Diary()
    watched(diary).ask(ids(1, 50), 3)
    assert diary.words() == ["queued", "begun", "admitted", "first_token", "token", "token", "finished"]
    assert diary.entries[-1][1] == "length" and diary.steps > 0


def test_swaps_are_told_in_pairs() -> None:
    diary = Diary()
    stage = watched(diary, num_cells=260)
    for seed in (17, 18, 19):
        stage.submit(ids(seed, 60), 60)
    stage.run()
    assert diary.words().count("swapped") == diary.words().count("resumed") > 0
    assert diary.words().count("finished") == 3


def test_a_failure_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    diary = Diary()
    stage = watched(diary)

    def fail(work: object) -> object:
        raise EngineError("made to fail")

    monkeypatch.setattr(stage.engine, "forward", fail)
    stage.ask(ids(2, 30))
    assert diary.words() == ["queued", "begun", "admitted", "failed"]


def test_what_leaves_the_engine_is_told() -> None:
    diary = Diary()
    stage = watched(diary, max_residents=1)
    for seed in (3, 4):
        stage.ask(ids(seed, 50), 1)
    assert [told for name, told in diary.entries if name == "evicted"] == [50]


def test_an_observer_that_fails_disturbs_neither_requests_nor_other_observers() -> None:
    class Broken(Observer):
        def first_token(self, run: object) -> None:
            raise ValueError("made to fail")

    diary = Diary()
    stage = Stage(observer=Observers([Broken(), diary]))
    assert stage.ask(ids(5, 30), 3).done.reason == "length"
    assert diary.words()[-1] == "finished"
