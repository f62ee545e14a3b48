"""Training learns, stops, goes on from its checkpoint, and averages over workers as one process would."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from rekindle.model.ember.lessons import Mixture, Teacher  # noqa: E402
from rekindle.model.ember.network import Network, Shape  # noqa: E402
from rekindle.model.ember.train import Batches, Options, Stage, Trainer, train_together  # noqa: E402

EASY = (Stage(Mixture((2, 3), recap=1.0), 1.1, 1 << 60),)


def _shape(ids: Mapping[str, int]) -> Shape:
    return Shape(max(ids.values()) + 1, width=32, num_heads=4, num_kv_heads=2, head_width=8, inner_width=48)


def _options(tokens: int, **more: int) -> Options:
    return Options(minutes=5, batch_tokens=600, stop_after_tokens=tokens, **more)


def test_losses_fall(ids: Mapping[str, int]) -> None:
    torch.set_num_threads(1)
    trainer = Trainer(_shape(ids), ids, _options(0), EASY)
    batches = Batches(Teacher(ids), EASY[0].mixture, trainer.options, 0, 0)
    losses = [trainer.step(next(batches)) for _ in range(40)]
    for name in ("loss", "subject", "value"):
        early, late = (sum(getattr(x, name) for x in part) for part in (losses[:5], losses[-5:]))
        assert late < early, name


def test_a_run_goes_on_from_its_checkpoint(ids: Mapping[str, int], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    first = Trainer(_shape(ids), ids, _options(3000), EASY)
    first.run(tmp_path, lambda line: None)
    second = Trainer(_shape(ids), ids, _options(6000), EASY)
    second.resume(tmp_path / "checkpoint.pt")
    assert second.progress == first.progress
    assert all(torch.equal(a, b) for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True))
    second.run(tmp_path, lambda line: None)
    assert second.progress.tokens >= 6000
    assert second.progress.steps > first.progress.steps
    assert second.progress.lessons > first.progress.lessons


def test_a_stage_ends_when_its_mark_is_passed(ids: Mapping[str, int], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    stages = (Stage(EASY[0].mixture, 1.1, 1500), *EASY)
    trainer = Trainer(_shape(ids), ids, _options(4000), stages)
    lines: list[str] = []
    trainer.run(tmp_path, lines.append)
    assert trainer.progress.stage == 1
    assert all(json.loads(line)["tokens"] for line in lines)


@pytest.mark.slow
def test_two_workers_share_a_checkpoint(ids: Mapping[str, int], tmp_path: Path) -> None:
    train_together(_shape(ids), ids, _options(3000, num_workers=2), tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["progress"]["tokens"] >= 3000
    Network(Shape(**state["shape"])).load_state_dict(state["network"])
