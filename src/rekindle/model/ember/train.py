"""Training: lessons of growing difficulty, four watched attention heads, and checkpoints to go on from.

Time is the budget, not steps: the learning rate warms up, stays, and falls to a twentieth over the last quarter of the
minutes given; the weight of attention supervision falls with it. A stage of the curriculum ends when the accuracy on
the choices in answers (each made once, so never seen before) passes its mark, or when its tokens are spent.

On a CPU each worker process computes with one thread on its own lessons, and the gradients are averaged after each
step: a network this small loses more to threads waiting for one another than it gains from them, above all on a
machine that does other work too (measured on two cores, one of them busy: 426 tokens/s with two threads, 7,800 with
one).

A checkpoint holds weights, optimizer and counters; a run with the same folder goes on from it, also with other minutes.
"""

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn import functional

from rekindle.model.ember.language import Kind
from rekindle.model.ember.lessons import Lesson, Mixture, Teacher
from rekindle.model.ember.network import WATCHED_HEADS, Network, Shape, Watch

SINGLE = ((Kind.DIRECT, 1.0), (Kind.COREFERENCE, 1.0))
ALL = ((Kind.DIRECT, 1.0), (Kind.COREFERENCE, 1.0), (Kind.TWO_HOP, 1.0), (Kind.REVERSE, 1.3), (Kind.UNSTATED, 1.3))


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum."""

    mixture: Mixture
    accuracy: float  # the stage ends when the choices in answers are right this often
    num_tokens: int  # … or after this many tokens


STAGES: tuple[Stage, ...] = (
    Stage(Mixture((2, 4), recap=0.7, kinds=SINGLE), 0.85, 8_000_000),
    Stage(
        Mixture((3, 8), recap=0.6, kinds=(*SINGLE, (Kind.UNSTATED, 0.4), (Kind.REVERSE, 0.5)), variety=0.1),
        0.93,
        10_000_000,
    ),
    Stage(
        Mixture((2, 9), ((600, 0.15),), recap=0.2, kinds=ALL, small_talk=0.03, variety=0.2, num_turns=(3, 12)),
        0.95,
        10_000_000,
    ),
    Stage(
        Mixture(
            (4, 12),
            ((600, 0.2), (1200, 0.15), (2000, 0.15), (3600, 0.06)),
            recap=0.2,
            kinds=ALL,
            small_talk=0.05,
            variety=0.3,
            num_turns=(8, 24),
        ),
        1.1,
        1 << 60,
    ),
)


@dataclass(frozen=True)
class Options:
    """What a training run is asked to do."""

    minutes: float  # of training in all, runs before this one included
    seed: int = 1
    batch_tokens: int = 3000
    learning_rate: float = 2e-3
    attention_weight: float = 0.3
    decay_share: float = 0.25  # the last part of the time, in which both rates fall
    checkpoint_seconds: float = 120.0
    num_workers: int = 1
    stop_after_tokens: int = 1 << 60


@dataclass
class Progress:
    """Counters that a checkpoint keeps."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    stage: int = 0
    stage_tokens: int = 0
    accuracy: float = 0.0  # moving average over lessons, choices in answers
    lessons: int = 0


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # (batch, length)
    rows: Tensor  # places, in the flattened batch, whose next token is predicted
    targets: Tensor
    weights: Tensor
    checked: Tensor  # bool, of the rows: is a value predicted?
    watches: dict[str, Watch]


def _collate(lessons: list[Lesson], rng: random.Random, context_share: float = 0.1) -> Batch:
    """Pad lessons to one length. Of the context only a share is predicted, weighing as much as all of it."""
    length = max(len(lesson.ids) for lesson in lessons)
    ids = torch.zeros((len(lessons), length), dtype=torch.long)
    rows: list[int] = []
    weights: list[float] = []
    checked: list[bool] = []
    pairs: dict[str, list[tuple[int, int, int]]] = {name: [] for name in WATCHED_HEADS}
    for number, lesson in enumerate(lessons):
        ids[number, : len(lesson.ids)] = torch.tensor(lesson.ids)
        values = set(lesson.checked)
        for place in range(1, len(lesson.ids)):
            weight = lesson.weights[place]
            if weight >= 1.0 or (weight > 0 and rng.random() < context_share):
                rows.append(number * length + place - 1)
                weights.append(weight if weight >= 1.0 else weight / context_share)
                checked.append(place in values)
        found = list(zip(lesson.subject_rows, lesson.subject_targets, strict=True))
        found = rng.sample(found, min(len(found), 160 + len(found) // 8))
        pairs["subject"] += [(number, row, target) for row, target in found]
        for name in ("value", "copy", "reverse"):
            watched = zip(getattr(lesson, f"{name}_rows"), getattr(lesson, f"{name}_targets"), strict=True)
            pairs[name] += [(number, row, target) for row, target in watched]
    places = torch.tensor(rows)
    watches = {
        name: Watch(*torch.tensor(found, dtype=torch.long).reshape(-1, 3).unbind(1)) for name, found in pairs.items()
    }
    return Batch(
        ids,
        places,
        ids.flatten()[places + 1],
        torch.tensor(weights),
        torch.tensor(checked),
        watches,
    )


class Batches:
    """Endless batches of a mixture. Workers see the same sequence of document lengths, each with lessons of its own."""

    def __init__(self, teacher: Teacher, mixture: Mixture, options: "Options", worker: int, first: int) -> None:
        self._teacher = teacher
        self._mixture = mixture
        self._options = options
        self._worker = worker
        self._lengths = random.Random(f"lengths:{options.seed}:{first}")
        self._rng = random.Random(f"batches:{options.seed}:{worker}:{first}")
        self._pools: dict[int | None, list[list[Lesson]]] = {}
        self.next_lesson = first

    def __next__(self) -> Batch:
        lengths = self._mixture.lengths
        chances = [1.0 - sum(chance for _, chance in lengths), *(chance for _, chance in lengths)]
        wanted = self._lengths.choices([None, *(length for length, _ in lengths)], chances)[0]
        pool = self._pools.setdefault(wanted, [])
        if not pool:
            self._fill(pool, wanted)
        return _collate(pool.pop(), self._rng)

    def _fill(self, pool: list[list[Lesson]], wanted: int | None) -> None:
        """Lessons of like length stand together, so that little is padding."""
        lessons: list[Lesson] = []
        batch_tokens = self._options.batch_tokens // self._options.num_workers
        budget = 12 * batch_tokens if wanted is None else 6 * max(batch_tokens, wanted)
        while budget > 0:
            length = None if wanted is None else int(wanted * self._rng.uniform(0.75, 1.08))
            lesson = self._teacher.lesson(
                f"{self._options.seed}.{self._worker}.{self.next_lesson}", self._mixture, length
            )
            self.next_lesson += 1
            if len(lesson.ids) <= 4096:
                lessons.append(lesson)
                budget -= len(lesson.ids)
        lessons.sort(key=lambda lesson: len(lesson.ids))
        while lessons:
            count = max(1, batch_tokens // len(lessons[-1].ids))
            pool.append(lessons[-count:])
            del lessons[-count:]
        self._rng.shuffle(pool)


@dataclass(frozen=True)
class Losses:
    """What one step found, over all workers."""

    loss: float  # of the predicted tokens
    subject: float  # −log attention weight on the subject
    value: float  # … on the value
    copy: float  # … on the name to be repeated
    reverse: float  # … on the value given in a reverse question
    right: float  # share of the answers' choices predicted right
    num_tokens: int


class Trainer:
    """A network in training, and how far it has come."""

    def __init__(
        self, shape: Shape, ids: Mapping[str, int], options: Options, stages: tuple[Stage, ...] = STAGES
    ) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.stages = stages
        self.network = Network(shape)
        self.progress = Progress()
        self._teacher = Teacher(ids)
        matrices = [p for p in self.network.parameters() if p.ndim == 2]
        vectors = [p for p in self.network.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98), fused=True)
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        self.device = device
        self.network.to(device)

    def save(self, path: Path) -> None:
        state = {
            "shape": asdict(self.network.shape),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        temporary = path.with_suffix(".new")
        torch.save(state, temporary)
        temporary.replace(path)

    def resume(self, path: Path) -> None:
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])

    def _fade(self) -> float:
        """1 until the last part of the time, then down to 0."""
        left = 1 - self.progress.seconds / (60 * self.options.minutes)
        return max(0.0, min(1.0, left / self.options.decay_share))

    def _set_rate(self) -> None:
        warm = min(1.0, (self.progress.steps + 1) / 200)
        rate = self.options.learning_rate * warm * (0.04 + 0.96 * self._fade())
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def step(self, batch: Batch) -> Losses:
        """One optimizer step, together with the other workers."""
        self.network.train()
        self._set_rate()
        batch = _moved(batch, self.device)
        hidden, watched = self.network(batch.ids, watches=batch.watches)
        logits = self.network.logits(hidden.flatten(0, 1)[batch.rows])
        each = functional.cross_entropy(logits, batch.targets, reduction="none")
        loss = (each * batch.weights).sum() / batch.weights.sum()
        weight = 0.05 + (self.options.attention_weight - 0.05) * self._fade()
        total = loss + weight * torch.stack([*watched.values()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        right = (logits.argmax(-1) == batch.targets)[batch.checked]
        figures = torch.stack(
            [
                loss.detach(),
                *(watched[name].detach() for name in WATCHED_HEADS),
                right.float().sum(),
                loss.new_tensor(len(right)),
                loss.new_tensor(batch.ids.numel()),
            ]
        )
        losses = self._average(figures)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        return losses

    def _average(self, figures: Tensor) -> Losses:
        """Average gradients and figures over the workers."""
        workers = self.options.num_workers
        if workers > 1:
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            flat = torch.cat([*(gradient.flatten() for gradient in gradients), figures])
            dist.all_reduce(flat)
            start = 0
            for gradient in gradients:
                gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient) / workers)
                start += gradient.numel()
            figures = flat[start:]
        loss, subject, value, copy, reverse, right, checked, tokens = figures.tolist()
        return Losses(
            loss / workers,
            subject / workers,
            value / workers,
            copy / workers,
            reverse / workers,
            right / max(1.0, checked),
            int(tokens),
        )

    def run(self, folder: Path, report: Callable[[str], None], worker: int = 0) -> None:
        """Train until the minutes are spent, with a checkpoint now and then and one at the end."""
        progress = self.progress
        path = folder / "checkpoint.pt"
        saved = reported = time.monotonic()
        while not self._finished():
            stage = self.stages[progress.stage]
            source = Batches(self._teacher, stage.mixture, self.options, worker, progress.lessons)
            while not (self._finished() or self._stage_done(stage)):
                started = time.monotonic()
                losses = self.step(next(source))
                now = time.monotonic()
                progress.seconds += self._agree(now - started)
                progress.steps += 1
                progress.tokens += losses.num_tokens
                progress.stage_tokens += losses.num_tokens
                progress.lessons = max(progress.lessons, source.next_lesson)
                progress.accuracy += 0.01 * (losses.right - progress.accuracy)
                if worker == 0 and now - reported > 20:
                    reported = now
                    shown = {name: round(value, 3) for name, value in {**asdict(progress), **asdict(losses)}.items()}
                    report(json.dumps(shown))
                if worker == 0 and now - saved > self.options.checkpoint_seconds:
                    saved = now
                    self.save(path)
            if self._stage_done(stage):
                progress.stage = min(progress.stage + 1, len(self.stages) - 1)
                progress.stage_tokens = 0
                progress.accuracy *= 0.5
            progress.lessons = int(self._agree(float(progress.lessons))) + 1
        if worker == 0:
            self.save(path)

    def _agree(self, value: float) -> float:
        """The first worker's value, on all workers."""
        if self.options.num_workers == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(shared, src=0)
        return float(shared.item())

    def _finished(self) -> bool:
        spent = self.progress.seconds >= 60 * self.options.minutes
        return spent or self.progress.tokens >= self.options.stop_after_tokens

    def _stage_done(self, stage: Stage) -> bool:
        return self.progress.accuracy >= stage.accuracy or self.progress.stage_tokens >= stage.num_tokens


def _moved(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    watches = {
        name: Watch(watch.batch.to(device), watch.row.to(device), watch.target.to(device))
        for name, watch in batch.watches.items()
    }
    return Batch(
        batch.ids.to(device),
        batch.rows.to(device),
        batch.targets.to(device),
        batch.weights.to(device),
        batch.checked.to(device),
        watches,
    )


def _work(worker: int, meeting: str, shape: Shape, ids: Mapping[str, int], options: Options, folder: Path) -> None:
    """One worker process of several."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=worker, world_size=options.num_workers)
    train_alone(shape, ids, options, folder, lambda line: print(line, flush=True), worker=worker)  # noqa: T201
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    # gloo's threads may still run, and abort a process that ends in the ordinary way ("terminate called", seen once)
    os._exit(0)


def train_alone(
    shape: Shape,
    ids: Mapping[str, int],
    options: Options,
    folder: Path,
    report: Callable[[str], None],
    *,
    device: str = "cpu",
    worker: int = 0,
) -> None:
    """Train in this process, going on from the folder's checkpoint if there is one."""
    trainer = Trainer(shape, ids, options)
    trainer.to(torch.device(device))
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        trainer.resume(checkpoint)
    trainer.run(folder, report, worker)


def train_together(shape: Shape, ids: Mapping[str, int], options: Options, folder: Path) -> None:
    """Train on the CPU with `options.num_workers` processes of one thread each."""
    with tempfile.TemporaryDirectory() as place:
        arguments = (f"file://{place}/meeting", shape, dict(ids), options, folder)
        spawn(_work, args=arguments, nprocs=options.num_workers)  # type: ignore[no-untyped-call]
