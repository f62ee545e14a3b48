"""How far a window that has moved often is from a plain read of what it still holds.

A conversation goes on and on in a window that holds a few dozen turns. Each time it is full, its oldest turns go, and the
others come to new places. There are three ways to get them there, and each is an arm, with the same tokens:

    turned          keys are rotated where they are, each time again: each rotation rounds them once more
    turned, then    the same, but what has been rotated so often is placed anew, as it was first computed, rotated once
    placed          placed anew each time

After some moves each arm is compared with a full prefill of the tokens that it holds: over the following tokens of the
conversation, the Kullback-Leibler divergence of the next token's distribution from the full prefill's, in nats, the largest
difference of any logit, and how often the most probable token is the same. Two things part an arm from a full prefill:
rounding, and that its tokens were read when those before them were still there, which is what a sliding window is. So each
arm is compared with the last one too, which has the second and as little as can be of the first. The limit is what
the full prefill differs from itself when it is read in other pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rekindle.engine.protocol import Engine, Payload, SequenceId, Work
from rekindle.lab.distributions import divergence
from rekindle.model.ember.language import Split, generate_document
from rekindle.serve.service import Service
from rekindle.settings import Settings
from rekindle.tokens import Tokens, as_tokens

WINDOW, HEAD, TURN, PROBE = 1024, 128, 24, 32  # tokens
MOVES = (1, 8, 32)
NEVER = 1 << 30
_PIECE = 64  # of the full prefill that is read in pieces
Logits = npt.NDArray[np.float32]  # [PROBE, vocabulary]


@dataclass(frozen=True)
class Gap:
    """How far two arms' distributions of the next token are apart, over some tokens."""

    divergence: float  # nats, in the mean
    largest: float  # difference of any logit
    same: float  # share of tokens at which the most probable next token is the same


@dataclass(frozen=True)
class Drift:
    """One arm after so many moves."""

    kv_type: str
    retention: float
    arm: str
    moves: int
    most_rotations: int  # of any key that it holds
    from_prefill: Gap
    from_placed: Gap


@dataclass(eq=False)
class _Turn:
    tokens: Tokens
    first: Payload  # as it was first computed
    rotations: int = 0


@dataclass(eq=False)
class _Arm:
    """A window that moves."""

    name: str
    most_rotations: int  # before turns are placed anew
    seq: SequenceId
    turns: list[_Turn] = field(default_factory=list)

    def hear(self, engine: Engine, tokens: Tokens) -> None:
        start = engine.length(self.seq)
        engine.forward([Work(self.seq, tokens, False)])
        self.turns.append(_Turn(tokens, engine.export(self.seq, start, start + len(tokens))))

    def move(self, engine: Engine, count: int) -> None:
        """Lose so many turns."""
        self.turns = self.turns[count:]
        if any(turn.rotations >= self.most_rotations for turn in self.turns):
            engine.truncate(self.seq, HEAD)
            for turn in self.turns:
                engine.place(self.seq, turn.first, engine.length(self.seq))
                turn.rotations = 1
        else:
            engine.drop(self.seq, HEAD, HEAD + count * TURN)
            for turn in self.turns:
                turn.rotations += 1


def measure_drift(
    model: str,
    kv_type: str,
    retention: float,
    *,
    most_rotations: int,
    threads: int | None = None,
    moves: Sequence[int] = MOVES,
    progress: Callable[[int], object] = lambda moves: None,
) -> list[Drift]:
    """Every arm after each number of moves. Raises ModelError, or EngineError if the model's keys can't be rotated."""
    settings = Settings.load(model=model, kv_type=kv_type, threads=threads, store="none", context=6 * WINDOW)
    found: list[Drift] = []
    with Service.open(settings) as service:
        conversation = _conversation(service, 2 + max(moves) * WINDOW // TURN)
        service.run_on_engine(
            lambda engine: found.extend(
                _measure(engine, conversation, kv_type, retention, most_rotations, moves, progress)
            )
        )
    return found


def _conversation(service: Service, turns: int) -> Tokens:
    """A head, and so many turns, of text that the built-in model knows how to go on with."""
    parts: list[Tokens] = []
    while sum(map(len, parts)) < HEAD + turns * TURN:
        document = generate_document(f"drift {len(parts)}", num_people=6, split=Split.HELD_OUT)
        parts.append(service.model.tokenizer.encode(f"{document.text}\n"))
    return np.concatenate(parts)


def _measure(
    engine: Engine,
    conversation: Tokens,
    kv_type: str,
    retention: float,
    most_rotations: int,
    moves: Sequence[int],
    progress: Callable[[int], object],
) -> Iterator[Drift]:
    head = engine.open()
    engine.forward([Work(head, conversation[:HEAD], False)])
    limits = {"turned": NEVER, f"turned, placed after {most_rotations}": most_rotations, "placed": 1}
    arms = [_Arm(name, limit, engine.fork(head, HEAD)) for name, limit in limits.items()]
    position, done, lost = HEAD, 0, max(1, int((1 - retention) * WINDOW) // TURN)
    while done < max(moves):
        turn = conversation[position : position + TURN]
        position += TURN
        for arm in arms:
            arm.hear(engine, turn)
        if engine.length(arms[0].seq) + TURN > WINDOW:
            done += 1
            for arm in arms:
                arm.move(engine, lost)
            progress(done)
            if done in moves:
                yield from _compare(engine, arms, conversation[position : position + PROBE], kv_type, retention, done)
    for seq in [head, *(arm.seq for arm in arms)]:
        engine.close(seq)


def _compare(
    engine: Engine, arms: Sequence[_Arm], probe: Tokens, kv_type: str, retention: float, done: int
) -> Iterator[Drift]:
    held = engine.tokens(arms[0].seq)
    assert all(np.array_equal(engine.tokens(arm.seq), held) for arm in arms)
    whole, pieces = engine.open(), engine.open()
    engine.forward([Work(whole, held, False)])
    for start in range(0, len(held), _PIECE):
        engine.forward([Work(pieces, held[start : start + _PIECE], False)])
    logits = {arm.name: _heard(engine, arm.seq, probe) for arm in arms}
    prefill, limit = _heard(engine, whole, probe), _heard(engine, pieces, probe)
    for arm in arms:
        rotations = max(turn.rotations for turn in arm.turns)
        mine = logits[arm.name]
        yield Drift(kv_type, retention, arm.name, done, rotations, _gap(prefill, mine), _gap(logits["placed"], mine))
    none = _gap(prefill, limit)
    yield Drift(kv_type, retention, "limit: read in pieces", done, 0, none, _gap(logits["placed"], limit))
    for seq in (whole, pieces):
        engine.close(seq)


def _heard(engine: Engine, seq: SequenceId, probe: Tokens) -> Logits:
    """Logits after each token of the probe, which is taken back."""
    fork = engine.fork(seq, engine.length(seq))
    rows = [engine.forward([Work(fork, as_tokens([token]), True)])[fork].copy() for token in probe]
    engine.close(fork)
    return np.stack(rows)


def _gap(one: Logits, other: Logits) -> Gap:
    same = (one.argmax(axis=1) == other.argmax(axis=1)).mean()
    return Gap(float(divergence(one, other).mean()), float(np.abs(one - other).max()), float(same))
