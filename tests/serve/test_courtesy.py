"""A moment for first tokens to leave: before anything more is computed, seldom enough, and where no core is left for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.serve.conftest import Answer, Stage, ids

from rekindle.model.model import Model
from rekindle.serve.assembly import open_courtesy
from rekindle.serve.cores import reachable_cores
from rekindle.serve.courtesy import SECONDS, SHARE, Courtesy
from rekindle.settings import Settings


def test_it_waits_when_a_first_token_is_sent_and_before_the_next_is_computed() -> None:
    answers: list[Answer] = []
    waited: list[tuple[float, int, int]] = []  # with the tokens that had come by then, and those that had been computed
    now = [0.0]

    def wait(seconds: float) -> None:
        run = answers[-1].run
        assert run.seq is not None
        waited.append((seconds, answers[-1].num_tokens, stage.engine.length(run.seq)))

    stage = Stage(observer=Courtesy(lambda: now[0], wait))
    for _ in range(2):  # the second time there is nothing to compute before it
        now[0] += 1.0
        answers.append(stage.submit(ids(1, 40), 4))
        stage.run()
    assert waited == [(SECONDS, 1, 40)] * 2


def test_all_that_is_waited_is_a_small_part_of_the_time() -> None:
    now, waited = [0.0], [0.0]

    def wait(seconds: float) -> None:
        now[0] += seconds
        waited[0] += seconds

    stage = Stage(observer=Courtesy(lambda: now[0], wait))
    for number in range(300):
        now[0] += 0.001
        stage.submit(ids(number, 5), 1)
        stage.run()
    assert 0 < waited[0] <= SHARE * now[0] + SECONDS


@pytest.fixture
def model() -> Iterator[Model]:
    model = Model.open("builtin", vocab_only=True)
    yield model
    model.close()


@pytest.mark.parametrize("option", [{"engine": "toy"}, {"gpu_layers": -1}], ids=["toy", "GPU"])
def test_an_engine_that_leaves_cores_needs_none(model: Model, option: dict[str, object]) -> None:
    threads = reachable_cores()
    assert open_courtesy(Settings.load(threads=threads), model) is not None
    assert open_courtesy(Settings.load(threads=threads, **option), model) is None


def test_a_core_that_is_left_is_enough(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rekindle.serve.assembly.reachable_cores", lambda: 4)
    assert [open_courtesy(Settings(threads=count), model) is not None for count in (3, 4, 8)] == [False, True, True]
