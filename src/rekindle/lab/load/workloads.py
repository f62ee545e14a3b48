"""What is asked of a server: sessions of steps, made from a seed.

A step adds messages to a conversation and asks for an answer of fixed length; the answer is put behind it before the next
step. What is shared between sessions, and what grows, makes the character of a workload:

    chat    clients that talk for some turns, all behind one system prompt
    agent   transcripts that grow by the long outputs of tools
    rag     single questions, each over documents that all prompts draw from, in an order of its own
    trace   prompts made of blocks, where a recorded load says which blocks are the same

`cells` says how large a context the workload is meant for: for a chat, four of the conversations, whoever many there
are; elsewhere whatever runs at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random
from typing import Any

from rekindle.errors import InvalidRequest
from rekindle.lab.load.client import Message
from rekindle.lab.load.texts import Texts
from rekindle.lab.trace_file import read_trace

_MESSAGE_EXTRA = 12  # tokens that a chat template puts around a message, at most
_SPARE = 1.06  # texts are a little longer or shorter than asked
_ROUND_TO = 256  # cells


@dataclass(frozen=True, kw_only=True)
class Step:
    """One request of a session."""

    add: tuple[Message, ...]  # what comes before the answer
    answer_tokens: int


@dataclass(frozen=True, kw_only=True)
class Session:
    """A conversation."""

    steps: tuple[Step, ...]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large a workload is. A workload looks at those that it `reads`."""

    clients: int = 4  # that ask at the same time, in a closed loop
    requests: int = 24  # of workloads that have no turns
    turns: int = 1  # of a conversation
    system_tokens: int = 200  # of the system prompt, or of what is shared or long in another way
    message_tokens: int = 40  # of a user's message, a question, a tool's output
    answer_tokens: int = 32
    documents: int = 12  # of rag
    documents_per_prompt: int = 4
    document_tokens: int = 200
    block_tokens: int = 32  # of trace: tokens that stand for one block of the trace
    trace: Path | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, int) and value < 1:
                raise InvalidRequest(f"{each.name}: expected 1 or more, got {value}", param=each.name)
        if self.documents_per_prompt > self.documents:
            raise InvalidRequest(
                f"{self.documents_per_prompt} documents per prompt, but only {self.documents} documents",
                param="documents",
            )

    @property
    def turn_tokens(self) -> int:
        """By which a conversation grows with each turn."""
        return self.message_tokens + self.answer_tokens + 2 * _MESSAGE_EXTRA

    @property
    def conversation_tokens(self) -> int:
        """Of a whole conversation, its last answer included."""
        return self.system_tokens + _MESSAGE_EXTRA + self.turns * self.turn_tokens

    def with_(self, **given: Any) -> Sizes:
        """These sizes but for what is given and not None."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def cells_for(num_tokens: float) -> int:
    """A context for so many tokens, with something to spare, in round figures."""
    return -(-round(num_tokens * _SPARE) // _ROUND_TO) * _ROUND_TO


def chat(sizes: Sizes, texts: Texts) -> list[Session]:
    """Clients that talk for some turns, all behind one system prompt."""
    opening = system(texts.text("system", sizes.system_tokens))
    return [
        _conversation(
            opening,
            [texts.text(f"client {client}, turn {turn}", sizes.message_tokens) for turn in range(sizes.turns)],
            sizes,
        )
        for client in range(sizes.clients)
    ]


def agent(sizes: Sizes, texts: Texts) -> list[Session]:
    """Transcripts that grow by the long outputs of tools."""
    opening = system(texts.text("instructions", sizes.system_tokens))
    sessions = []
    for number in range(sizes.clients):
        task = f"Your task: {texts.text(f'task {number}', 30)}"
        outputs = [
            f"The tool's output:\n{texts.text(f'agent {number}, output {turn}', sizes.message_tokens)}"
            for turn in range(1, sizes.turns)
        ]
        sessions.append(_conversation(opening, [task, *outputs], sizes))
    return sessions


def _conversation(opening: Message, said: list[str], sizes: Sizes) -> Session:
    first, *others = (Step(add=(user(text),), answer_tokens=sizes.answer_tokens) for text in said)
    return Session(steps=(replace(first, add=(opening, *first.add)), *others))


def rag(sizes: Sizes, texts: Texts) -> list[Session]:
    """Single questions, each over documents that all prompts draw from, in an order of its own."""
    opening = system(texts.text("instructions", sizes.system_tokens))
    documents = [
        f"[{number}] {texts.text(f'document {number}', sizes.document_tokens)}" for number in range(sizes.documents)
    ]
    draw = Random(f"{texts.seed}/rag")
    sessions = []
    for number in range(sizes.requests):
        chosen = draw.sample(documents, sizes.documents_per_prompt)
        question = f"Question: {texts.text(f'question {number}', sizes.message_tokens)}"
        sessions.append(_single((opening, user("\n\n".join([*chosen, question]))), sizes))
    return sessions


def trace(sizes: Sizes, texts: Texts) -> list[Session]:
    """Prompts made of blocks, where a recorded load says which blocks are the same."""
    if sizes.trace is None:
        raise InvalidRequest("the workload trace needs a file: --trace FILE", param="trace")
    recorded = read_trace(sizes.trace)
    sessions = []
    for chain, length in zip(recorded.chains, recorded.lengths, strict=True):
        if not chain:
            continue
        blocks = [texts.text(f"block {block}", sizes.block_tokens) for block in chain]
        last = (length - 1) % recorded.block_tokens + 1  # tokens of the last block, which may be shorter
        blocks[-1] = texts.text(f"block {chain[-1]}", max(1, last * sizes.block_tokens // recorded.block_tokens))
        sessions.append(_single((user(" ".join(blocks)),), sizes))
        if len(sessions) == sizes.requests:
            break
    return sessions


def _single(messages: tuple[Message, ...], sizes: Sizes) -> Session:
    return Session(steps=(Step(add=messages, answer_tokens=sizes.answer_tokens),))


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sessions, and what they are meant for."""

    name: str
    sessions: Callable[[Sizes, Texts], list[Session]]
    defaults: Sizes
    reads: frozenset[str]  # which of the sizes mean something
    cells: Callable[[Sizes], int]  # of the context
    parallel: Callable[[Sizes], int]  # sequences that the servers run at the same time

    @property
    def about(self) -> str:
        return (self.sessions.__doc__ or "").strip()


_CONVERSATIONS_THAT_FIT = 4
_TALK = frozenset({"clients", "turns", "system_tokens", "message_tokens", "answer_tokens"})


def _trace_cells(sizes: Sizes) -> int:
    recorded = read_trace(sizes.trace) if sizes.trace is not None else None
    longest = max(map(len, recorded.chains[: sizes.requests])) if recorded else 1
    return cells_for(sizes.clients * (longest * sizes.block_tokens + sizes.answer_tokens + _MESSAGE_EXTRA))


SESSIONS: dict[str, Workload] = {
    each.name: each
    for each in (
        Workload(
            name="chat",
            sessions=chat,
            defaults=Sizes(clients=8, turns=6, system_tokens=1_000, message_tokens=40, answer_tokens=32),
            reads=_TALK,
            cells=lambda sizes: cells_for(_CONVERSATIONS_THAT_FIT * sizes.conversation_tokens),
            parallel=lambda sizes: _CONVERSATIONS_THAT_FIT,
        ),
        Workload(
            name="agent",
            sessions=agent,
            defaults=Sizes(clients=4, turns=8, system_tokens=500, message_tokens=200, answer_tokens=32),
            reads=_TALK,
            cells=lambda sizes: cells_for(sizes.clients * sizes.conversation_tokens),
            parallel=lambda sizes: sizes.clients,
        ),
        Workload(
            name="rag",
            sessions=rag,
            defaults=Sizes(clients=2, requests=24),
            reads=_TALK - {"turns"} | {"requests", "documents", "documents_per_prompt", "document_tokens"},
            cells=lambda sizes: cells_for(
                sizes.clients
                * (sizes.conversation_tokens + sizes.documents_per_prompt * (sizes.document_tokens + _MESSAGE_EXTRA))
            ),
            parallel=lambda sizes: sizes.clients,
        ),
        Workload(
            name="trace",
            sessions=trace,
            defaults=Sizes(clients=4, requests=64, answer_tokens=16),
            reads=frozenset({"clients", "requests", "answer_tokens", "trace", "block_tokens"}),
            cells=_trace_cells,
            parallel=lambda sizes: sizes.clients,
        ),
    )
}
