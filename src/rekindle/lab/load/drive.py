"""Sends sessions to a server: a closed loop of clients, or an open loop of arrivals.

In the closed loop every client takes the next session when it has done with one. In the open loop sessions begin at the
times of a Poisson process, drawn from the seed, and a request's clock starts at that time even if the generator is late.
An error ends its session: what would have followed is counted as skipped, because it would have been another question.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from rekindle.lab.load.client import Answer, Heard, Message, Target
from rekindle.lab.load.workloads import Session

Answers = Literal["own", "scripted"]


@dataclass
class Load:
    """One run on one server: what was asked, and what came."""

    target: Target
    tick: Callable[[int], None]  # so many requests are done
    cpu_seconds: Callable[[], float | None] = lambda: None  # processor time of the server so far
    answers: list[Answer] = field(default_factory=list)
    skipped: int = 0  # requests that were never sent, because one before them failed
    began: float = 0.0
    ended: float = 0.0
    spent: float = 0.0  # seconds of earlier turns

    async def ask(
        self,
        messages: Sequence[Message],
        max_tokens: int,
        *,
        due: float | None = None,
        heard: Heard | None = None,
    ) -> Answer:
        """Ask, and remember the answer."""
        self.began = self.began or time.perf_counter()
        answer = await self.target.ask(list(messages), max_tokens, due=due, heard=heard)
        self.answers.append(answer)
        self.ended = answer.ended
        self.tick(1)
        return answer

    def pause(self) -> None:
        """Another server's turn: until the next request no time counts."""
        self.spent, self.began, self.ended = self.seconds, 0.0, 0.0

    @property
    def seconds(self) -> float:
        """From the first request of a turn to the end of its last, all turns together."""
        return self.spent + self.ended - self.began


async def drive_closed(load: Load, sessions: Sequence[Session], clients: int, answers: Answers = "own") -> None:
    """So many clients, each with one session at a time."""
    waiting = iter(sessions)

    async def client() -> None:
        for session in waiting:  # the clients share the iterator
            await _talk(load, session, None, answers)

    await _all(client() for _ in range(clients))


async def drive_open(load: Load, sessions: Sequence[Session], rate: float, seed: int, answers: Answers = "own") -> None:
    """Sessions that begin at random moments, `rate` of them per second in the mean."""
    draw = Random(f"{seed}/arrivals")
    load.began = due = time.perf_counter()

    async def begin(session: Session, due: float) -> None:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        await _talk(load, session, due, answers)

    dues = []
    for _ in sessions:
        due += draw.expovariate(rate)
        dues.append(due)
    await _all(begin(session, due) for session, due in zip(sessions, dues, strict=True))


async def _all(coroutines: object) -> None:
    async with asyncio.TaskGroup() as group:
        for each in coroutines:  # type: ignore[attr-defined]
            group.create_task(each)


async def _talk(load: Load, session: Session, due: float | None, answers: Answers) -> None:
    """The steps of a session; only the first has a due time, the others follow their answers."""
    messages: list[Message] = []
    for number, step in enumerate(session.steps):
        messages.extend(step.add)
        answer = await load.ask(messages, step.answer_tokens, due=due)
        due = None
        if answer.error is not None:
            rest = len(session.steps) - number - 1
            load.skipped += rest
            load.tick(rest)
            return
        messages.append({"role": "assistant", "content": said(answer, step.add, answers)})


def said(answer: Answer, asked: Sequence[Message], answers: Answers) -> str:
    """What goes into the transcript: what the server said, or a text that is the same for every server."""
    if answers == "own":
        return answer.text
    return " ".join(asked[-1]["content"].split()[::-1][: max(1, answer.asked_tokens)])
