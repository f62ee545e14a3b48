"""Workloads with a question of their own, and what may be expected of the answer.

cold    how fast prompts are read that nobody has seen, and how fast one stream and eight together decode.
        Decoding one stream is bound by memory: every weight is read for each token, so no server decodes faster than
        bandwidth / bytes of weights.
burst   many requests at once with one beginning that nobody has seen. That beginning has to be computed once; counted
        in tokens, the expectation is the beginning once and every request's own rest.
repeat  a prompt again, to the letter. Nothing has to be computed if the last logits are kept: the first token need not
        take longer than any other token of the answer.
stall   the gaps between a stream's tokens while a long prompt is read beside it, against its gaps alone. Those are of the
        time before, since afterwards the prompt's KV is there; and many, since the p99 of few is about the greatest.

Each is asked in turns, `turns.py` says how: of cold a turn is one prompt, one stream, or all streams together; of the
others it is the whole, since a repeat belongs to its first time, and a burst and a stall to those beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

from rekindle.lab.load.client import Answer, ServerError
from rekindle.lab.load.drive import Load
from rekindle.lab.load.figures import Figure, percentile
from rekindle.lab.load.texts import Texts
from rekindle.lab.load.workloads import Sizes, cells_for, system, user

_SHORT_PROMPT = 64  # tokens
_STREAMS = 8
_SINGLES = 3  # turns of one prompt, and of one stream, in a round
_ALONE = 512  # gaps of a stream before it gets company
STALL_FACTOR = 3.0  # ITL p99 beside a long prompt, of that alone
Piece = Callable[[Load, Sizes, Texts], Awaitable[list[Figure]]]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A workload that is not a list of sessions."""

    name: str
    about: str
    turns: tuple[Piece, ...]  # of a round
    defaults: Sizes
    reads: frozenset[str]  # which of the sizes mean something
    cells: Callable[[Sizes], int]
    parallel: Callable[[Sizes], int]
    requests: Callable[[Sizes], int]  # how many the progress bar is to expect, of all turns


async def read(load: Load, sizes: Sizes, texts: Texts, number: int) -> list[Figure]:
    """Reading what nobody has seen."""
    before = load.cpu_seconds()
    answer = _whole(await load.ask([user(texts.text(f"read {number}", sizes.system_tokens))], 1))
    count = _computed([answer])
    return [
        _rate("prefill_tokens_per_second", count, answer.ttft or 0.0),
        *_per_cpu_second("prefill", count, before, load.cpu_seconds()),
    ]


async def decode(load: Load, sizes: Sizes, texts: Texts, number: int) -> list[Figure]:
    """Decoding, alone."""
    before = load.cpu_seconds()
    answer = _whole(await load.ask([user(texts.text(f"single {number}", _SHORT_PROMPT))], sizes.answer_tokens))
    return [
        _rate("decode_tokens_per_second", answer.num_tokens - 1, answer.arrivals[-1] - answer.arrivals[0]),
        *_per_cpu_second("decode", answer.num_tokens, before, load.cpu_seconds()),
    ]


async def streams(load: Load, sizes: Sizes, texts: Texts) -> list[Figure]:
    """Decoding, together: all tokens, from the first request to the last answer's end."""
    before = load.cpu_seconds()
    prompts = [texts.text(f"stream {i}", _SHORT_PROMPT) for i in range(sizes.clients)]
    together = await asyncio.gather(*(load.ask([user(each)], sizes.answer_tokens) for each in prompts))
    count = sum(_whole(each).num_tokens for each in together)
    return [
        _rate(f"{sizes.clients}_streams_tokens_per_second", count, _seconds(together)),
        *_per_cpu_second(f"{sizes.clients}_streams", count, before, load.cpu_seconds()),
    ]


async def burst(load: Load, sizes: Sizes, texts: Texts) -> list[Figure]:
    """Simultaneous requests with one beginning that nobody has seen."""
    shared = system(texts.text("shared", sizes.system_tokens))
    questions = [user(texts.text(f"question {i}", sizes.message_tokens)) for i in range(sizes.clients)]
    answers = await asyncio.gather(*(load.ask([shared, question], sizes.answer_tokens) for question in questions))
    whole = [answer for answer in answers if answer.error is None and answer.prompt_tokens is not None]
    figures = [Figure(name="total_seconds", value=_seconds(answers))]
    if whole:
        once = _computed_once(whole, len(shared["content"]), sum(len(each["content"]) for each in questions))
        figures.append(
            Figure(
                name="burst_computed_tokens",
                value=_computed(whole),
                expected=once,
                why="what is shared once, and every request's own (by their share of the text)",
            )
        )
    return figures


async def repeat(load: Load, sizes: Sizes, texts: Texts) -> list[Figure]:
    """A prompt again, to the letter."""
    messages = [user(texts.text("again", sizes.system_tokens))]
    first = _whole(await load.ask(messages, sizes.answer_tokens))
    again = [_whole(await load.ask(messages, sizes.answer_tokens)) for _ in range(sizes.requests)]
    token = median(gap for answer in again for gap in answer.gaps or [0.0])
    return [
        Figure(name="first_ttft_ms", value=1e3 * (first.ttft or 0.0)),
        Figure(
            name="repeat_ttft_ms",
            value=1e3 * median(answer.ttft or 0.0 for answer in again),
            expected=1e3 * token,
            why="at most the time of any other token, by its median gap",
        ),
        Figure(
            name="repeat_computed_tokens", value=_computed(again) / len(again), expected=0, why="all of it was read"
        ),
    ]


async def stall(load: Load, sizes: Sizes, texts: Texts) -> list[Figure]:
    """Gaps of a stream while a long prompt is read."""
    gaps = await _gaps_beside(load, sizes, texts)
    p99 = 1e3 * percentile(gaps.alone, 99)
    return [
        Figure(name="alone_itl_p50_ms", value=1e3 * percentile(gaps.alone, 50)),
        Figure(name="alone_itl_p99_ms", value=p99),
        Figure(name="beside_itl_p50_ms", value=1e3 * percentile(gaps.beside, 50)),
        Figure(
            name="beside_itl_p99_ms",
            value=1e3 * percentile(gaps.beside, 99),
            expected=STALL_FACTOR * p99,
            why=f"{STALL_FACTOR:g} times its ITL p99 alone",
        ),
        Figure(name="beside_itl_max_ms", value=1e3 * max(gaps.beside)),
        Figure(name="beside_to_alone", value=1e3 * percentile(gaps.beside, 99) / p99, expected=STALL_FACTOR),
        Figure(name="tokens_while_reading", value=len(gaps.beside)),
        Figure(name="read_seconds", value=gaps.read_seconds),
        Figure(
            name="share_covered",
            value=gaps.covered,
            expected=1.0,
            why="the stream goes on until the prompt is read; with more --answer-tokens it goes on for longer",
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class _Gaps:
    """Between the tokens of a stream, in seconds."""

    alone: list[float]  # before the long prompt came
    beside: list[float]  # while it was read
    read_seconds: float
    covered: float  # the part of the reading for which the stream went on


@dataclass
class _Listener:
    """Notes when the tokens of a stream come."""

    arrivals: list[float] = field(default_factory=list)
    _wanted: int = 0
    _reached: asyncio.Event = field(default_factory=asyncio.Event)

    def heard(self, now: float) -> None:
        self.arrivals.append(now)
        if len(self.arrivals) >= self._wanted:
            self._reached.set()

    async def more(self, count: int, stream: asyncio.Future[Answer]) -> bool:
        """Wait for so many more; False if the stream ends before."""
        self._wanted = len(self.arrivals) + count
        self._reached.clear()
        waiting: asyncio.Future[Any] = asyncio.ensure_future(self._reached.wait())
        either: set[asyncio.Future[Any]] = {stream, waiting}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        return self._reached.is_set()


async def _gaps_beside(load: Load, sizes: Sizes, texts: Texts) -> _Gaps:
    """Gaps of a stream that is alone, and then gets company by a prompt that is read."""
    listener = _Listener()
    prompt = [user(texts.text("stream", _SHORT_PROMPT))]
    stream = asyncio.ensure_future(load.target.ask(prompt, sizes.answer_tokens, heard=listener.heard))
    try:
        if not await listener.more(_ALONE + 1, stream):
            said, why = len(listener.arrivals), (await stream).error
            raise ServerError(f"a stream ended after {said} pieces of text: {why or 'too short'}")
        reader = _whole(await load.ask([user(texts.text("long", sizes.system_tokens))], 1))
        is_over = stream.done()  # it had said all that it was to say
    finally:
        stream.cancel()  # hangs up
        await asyncio.gather(stream, return_exceptions=True)
    begun, done, last = reader.due, reader.arrivals[0], listener.arrivals[-1]
    gaps = list(pairwise(listener.arrivals))
    beside = [after - before for before, after in gaps if after > begun and before < done]
    if not beside or (last < done and not is_over):
        beside.append(done - max(last, begun))  # silent until the prompt was read
    return _Gaps(
        alone=[after - before for before, after in gaps if after <= begun],
        beside=beside,
        read_seconds=done - begun,
        covered=min(1.0, max(0.0, last - begun) / (done - begun)) if is_over else 1.0,
    )


def _whole(answer: Answer) -> Answer:
    """Raises ServerError: these measurements mean nothing if a request failed."""
    if answer.error is not None or not answer.arrivals:
        raise ServerError(f"a request failed that the measurement needs: {answer.error or 'no event came'}")
    return answer


def _computed_once(answers: list[Answer], shared: int, others: int) -> float:
    """Prompt tokens of which a shared text counts once; lengths of it and of all other texts in characters."""
    total = sum(answer.prompt_tokens or 0 for answer in answers)
    return total * (shared + others) / (len(answers) * shared + others)


def _computed(answers: list[Answer]) -> int:
    return sum(answer.computed_tokens or 0 for answer in answers)


def _seconds(answers: Sequence[Answer]) -> float:
    """Of simultaneous requests, until the last has ended."""
    return max(each.ended for each in answers) - min(each.due for each in answers)


def _per_cpu_second(name: str, count: int, before: float | None, after: float | None) -> list[Figure]:
    """Tokens by the processor time that the server used in between, if it is known."""
    if before is None or after is None:
        return []
    return [_rate(f"{name}_tokens_per_cpu_second", count, after - before)]


def _rate(name: str, count: int, seconds: float) -> Figure:
    return Figure(name=name, value=count / seconds if seconds > 0 else float("nan"))


MEASURES: dict[str, Measure] = {
    each.name: each
    for each in (
        Measure(
            name="cold",
            about="Reading what nobody has seen, and decoding, alone and together.",
            turns=(
                *(partial(read, number=number) for number in range(_SINGLES)),
                *(partial(decode, number=number) for number in range(_SINGLES)),
                streams,
            ),
            defaults=Sizes(clients=_STREAMS, system_tokens=1_024, answer_tokens=64),
            reads=frozenset({"clients", "system_tokens", "answer_tokens"}),
            cells=lambda sizes: cells_for(
                sizes.clients * (_SHORT_PROMPT + sizes.answer_tokens + 32) + _SINGLES * sizes.system_tokens
            ),
            parallel=lambda sizes: sizes.clients,
            requests=lambda sizes: 2 * _SINGLES + sizes.clients,
        ),
        Measure(
            name="burst",
            about="Simultaneous requests with one beginning that nobody has seen.",
            turns=(burst,),
            defaults=Sizes(clients=16, system_tokens=1_000, message_tokens=20, answer_tokens=8),
            reads=frozenset({"clients", "system_tokens", "message_tokens", "answer_tokens"}),
            cells=lambda sizes: cells_for(sizes.clients * sizes.conversation_tokens),
            parallel=lambda sizes: sizes.clients,
            requests=lambda sizes: sizes.clients,
        ),
        Measure(
            name="repeat",
            about="A prompt again, to the letter.",
            turns=(repeat,),
            defaults=Sizes(clients=1, requests=8, system_tokens=1_000, answer_tokens=8),
            reads=frozenset({"requests", "system_tokens", "answer_tokens"}),
            cells=lambda sizes: cells_for(2 * sizes.conversation_tokens),
            parallel=lambda sizes: 2,
            requests=lambda sizes: 1 + sizes.requests,
        ),
        Measure(
            name="stall",
            about="Gaps of a stream while a long prompt is read.",
            turns=(stall,),
            defaults=Sizes(clients=1, system_tokens=4_000, answer_tokens=4_608),  # enough for one token a step
            reads=frozenset({"system_tokens", "answer_tokens"}),
            cells=lambda sizes: cells_for(sizes.system_tokens + sizes.answer_tokens + 2 * _SHORT_PROMPT),
            parallel=lambda sizes: 2,
            requests=lambda sizes: 1,
        ),
    )
}
