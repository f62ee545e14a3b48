"""A scheduler on the toy engine, driven step by step, without a thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from tests.engine.conftest import TOY_SPEC
from tests.kv.doubles import DictTier

from rekindle.engine.toy import ToyEngine
from rekindle.kv.store import Fetched, Store
from rekindle.reuse.prompt import Prompt
from rekindle.serve.blending import Blending, blends
from rekindle.serve.request import Done, Event, Failed, Generation, Piece, Sampling
from rekindle.serve.run import Clock, Run
from rekindle.serve.scheduler import Scheduler
from rekindle.serve.scores import Scores
from rekindle.tokens import as_tokens

END = 3


class Letters:
    """A tokenizer whose token t is the letter number t; token 3 ends a turn."""

    vocab_size = TOY_SPEC.vocab_size
    bos: int | None = None
    eos: int | None = END

    def encode(self, text: str, *, bos: bool = False) -> object:
        return as_tokens([ord(letter) for letter in text])

    def piece(self, token: int) -> bytes:
        return chr(0x4E00 + token).encode()

    def is_end(self, token: int) -> bool:
        return token == END

    def is_special(self, token: int) -> bool:
        return token == END

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.piece(token) for token in tokens).decode()


@dataclass(eq=False)
class Answer:
    """What a request's sink has got."""

    run: Run
    events: list[Event] = field(default_factory=list)

    @property
    def done(self) -> Done:
        assert isinstance(self.events[-1], Done), self.events[-1:]
        assert not any(isinstance(event, Done | Failed) for event in self.events[:-1])
        return self.events[-1]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))

    @property
    def num_tokens(self) -> int:
        return sum(len(event.tokens) for event in self.events if isinstance(event, Piece))


def ids(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(10, 900, count).tolist()


class Stage:
    """Scheduler, engine and store, with short words for tests."""

    def __init__(self, num_cells: int = 2000, tiers: Sequence[DictTier] = (), **options: Any) -> None:
        self.engine = ToyEngine(options.pop("spec", TOY_SPEC), num_cells)
        max_bytes, quota = options.pop("store_bytes", 1 << 30), options.pop("quota", 1.0)
        self.store = Store(TOY_SPEC.fingerprint, max_bytes=max_bytes, block_tokens=16, tiers=tiers, quota=quota)
        head = as_tokens(options.pop("head", []))
        self.scores = options.pop("scores", None) or Scores(TOY_SPEC.fingerprint, head)
        self.blending = Blending(self.store, head, self.scores)
        self.fetches: list[tuple[Run, Future[Fetched]]] = []  # begun, and ended by `end_fetches`
        given = {"max_running": 8, "max_residents": 8, "prefill_budget": 64, "min_tokens": 20, "max_length": num_cells}
        begin = self.begin_fetch if tiers else None
        options = given | {"fetch": begin, "blending": self.blending} | options
        self.scheduler = Scheduler(self.engine, self.store, Letters(), **options)  # type: ignore[arg-type]

    def begin_fetch(self, run: Run) -> Future[Fetched]:
        self.fetches.append((run, Future()))
        return self.fetches[-1][1]

    def end_fetches(self) -> None:
        for run, future in self.fetches:
            prompt, speed = run.generation.prompt, self.scheduler.prefill_speed
            blended = self.blending.fetch(prompt, speed) if blends(run) else None
            future.set_result(blended or self.store.fetch(prompt.tokens, prompt.salt, compute=speed))
        self.fetches.clear()

    def submit(
        self, prompt: Sequence[int] | Prompt, max_tokens: int | None = 5, *, salt: bytes = b"", **options: object
    ) -> Answer:
        options.setdefault("sampling", Sampling(temperature=0))
        options.setdefault("ignore_eos", True)
        prompt = prompt if isinstance(prompt, Prompt) else Prompt(as_tokens(prompt), salt=salt)
        generation = Generation(prompt=prompt, max_tokens=max_tokens, **options)  # type: ignore[arg-type]
        answer = Answer(None)  # type: ignore[arg-type]
        now = time.perf_counter()
        answer.run = Run(generation, answer.events.append, None, Clock(now, now))
        self.scheduler.submit(answer.run)
        return answer

    def run(self, until: Callable[[], bool] | None = None, max_steps: int = 5000) -> int:
        """Step until nothing is left to do, or the condition holds; returns the steps taken."""
        for count in range(max_steps):
            if until is not None and until():
                return count
            step = self.scheduler.step()
            self.scheduler.check_integrity()
            if step.idle and until is None:
                assert not self.scheduler.waiting and not self.scheduler.running, "stuck"
                return count
        raise AssertionError(f"not finished after {max_steps} steps")

    def ask(self, prompt: Sequence[int] | Prompt, max_tokens: int | None = 5, **options: object) -> Answer:
        answer = self.submit(prompt, max_tokens, **options)  # type: ignore[arg-type]
        self.run()
        return answer


@pytest.fixture
def stage() -> Stage:
    return Stage()
