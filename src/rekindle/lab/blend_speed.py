"""What blending saves before the first token: 8 chunks of 512 tokens in another order, through the worker and its store.

Weights may be random, then answers mean nothing: what is measured is time. A round draws an order and asks in all ways, one
after the other, so that what else the machine does falls on all: `full` reads the whole prompt and reuses nothing; `none`
places every chunk; `first` computes `ratio` of each chunk anew, its KV in memory; `first, from disk` does so with nothing
in memory and the folder's files out of the page cache, as far as the system lets go of them. The figure is the median over
rounds of an arm's time / full prefill's of that round. The floor is the work itself: of what is computed all must be, and
each of its tokens attends to all before it.

The clock runs from the text to the first token: tokenising, look-up and restoring count. Processor time, which other work
on the machine does not lengthen, is given beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from rekindle.lab.load.texts import words
from rekindle.lab.machine import Machine, this_machine
from rekindle.lab.store_tiers import drop_from_page_cache
from rekindle.model.tokenizer import Tokenizer
from rekindle.reuse.blend import Blend
from rekindle.serve.request import Done, Generation
from rekindle.serve.service import Service
from rekindle.settings import Settings

SEPARATOR = " # # "
_WORDS = 2_000  # to see how many tokens a word has
Tell = Callable[[str], object]


@dataclass(frozen=True)
class Texts:
    """What is asked about, for any server."""

    chunks: tuple[str, ...]
    begin: str = "Answer from these passages."
    question: str = "What is said of the village by the sea, and who says it?"

    @classmethod
    def draw(cls, tokenizer: Tokenizer, num_chunks: int, chunk_tokens: int, seed: int) -> Texts:
        """Chunks of about so many tokens each."""
        per_word = len(tokenizer.encode(words(f"{seed}", _WORDS))) / _WORDS
        count = max(1, round(chunk_tokens / per_word))
        return cls(tuple(words(f"{seed}/{number}", count) for number in range(num_chunks)))

    def prompt(self, order: Sequence[int]) -> str:
        """All chunks in this order, and the question."""
        return SEPARATOR.join([self.begin, *(self.chunks[index] for index in order), self.question])

    def orders(self, rounds: int, seed: int) -> Iterator[list[int]]:
        """A new one for each round, none of which begins like the one before."""
        random, last = np.random.default_rng(seed), 0
        for _ in range(rounds):
            order = [index for index in random.permutation(len(self.chunks)).tolist() if index != last]
            order.insert(int(random.integers(1, len(order) + 1)), last)
            last = order[0]
            yield order


@dataclass(frozen=True, kw_only=True)
class SpeedArm:
    """One way to begin answering."""

    name: str
    ratio: float
    ttft_seconds: float  # median
    ttft_of_full: float  # median over rounds
    cpu_of_full: float | None  # the same of processor time, all threads together; None where it can't be told
    prompt_tokens: int
    computed: int  # of these, median
    calls: float | None = None  # of the model, median; None: not known

    @property
    def budget(self) -> float:
        """Tokens computed, of all."""
        return self.computed / self.prompt_tokens


@dataclass(frozen=True, kw_only=True)
class SpeedReport:
    """All arms."""

    model: str
    engine: str
    threads: int
    chunks: int
    chunk_tokens: int
    rounds: int
    machine: Machine
    note: str  # on the files of the disk arm
    arms: tuple[SpeedArm, ...]
    peer: tuple[SpeedArm, ...] = ()  # both servers over HTTP
    peer_note: str = ""


@dataclass(frozen=True)
class Asked:
    """One prompt until its first token."""

    seconds: float
    prompt_tokens: int
    computed: int
    cpu_seconds: float | None
    calls: float | None = None


def arms_of(asked: dict[tuple[str, float], list[Asked]], full: tuple[str, float]) -> tuple[SpeedArm, ...]:
    """Medians over rounds, each beside the arm that reads all."""
    whole = asked[full]
    return tuple(
        SpeedArm(
            name=name,
            ratio=ratio,
            ttft_seconds=median(each.seconds for each in rounds),
            ttft_of_full=median(one.seconds / other.seconds for one, other in zip(rounds, whole, strict=True)),
            cpu_of_full=_cpu_share(rounds, whole),
            prompt_tokens=round(median(each.prompt_tokens for each in rounds)),
            computed=round(median(each.computed for each in rounds)),
            calls=None if rounds[0].calls is None else median(each.calls or 0 for each in rounds),
        )
        for (name, ratio), rounds in asked.items()
    )


def _cpu_share(rounds: Sequence[Asked], whole: Sequence[Asked]) -> float | None:
    pairs = [(one.cpu_seconds, other.cpu_seconds) for one, other in zip(rounds, whole, strict=True)]
    shares = [one / other for one, other in pairs if one is not None and other]
    return median(shares) if shares else None


def speed_settings(
    model: str, engine: str, threads: int, num_chunks: int, chunk_tokens: int, folder: Path | None
) -> Settings:
    """With cells for the prompt and for the chunks while they are turned."""
    context = 2 * num_chunks * (chunk_tokens + chunk_tokens // 8) + 1024
    chosen: dict[str, Any] = {"model": model, "engine": engine, "threads": threads, "context": context}
    return Settings.load(**chosen, store=str(folder or "none"), chunk_separator=SEPARATOR, prefill_budget=512)


def measure_speed(
    service: Service,
    *,
    num_chunks: int = 8,
    chunk_tokens: int = 512,
    ratio: float = 0.15,
    rounds: int = 3,
    seed: int = 0,
    tell: Tell = lambda what: None,
) -> SpeedReport:
    """All arms on an open service whose settings are `speed_settings`. Raises PromptTooLong if the model is too small."""
    texts = Texts.draw(service.model.tokenizer, num_chunks, chunk_tokens, seed)
    asked: dict[tuple[str, float], list[Asked]] = {}
    gone: list[float] = []
    for number, order in enumerate(texts.orders(rounds, seed)):
        prompt = texts.prompt(order)
        warm(service, texts, tell)  # what the disk arm has found too slow to fetch is in memory again
        for arm, blend in _arms(ratio, has_disk=service.folder is not None):
            tell(f"round {number + 1} of {rounds}: {arm}")
            if "disk" in arm:
                gone.append(_forget(service))
            key = (arm, 1.0 if blend is None else blend.ratio)
            asked.setdefault(key, []).append(ask(service, prompt, blend))
    note = f"{min(gone):.0%} of the files or more were out of the page cache" if gone else "no folder"
    return SpeedReport(
        model=service.model_name,
        engine=str(service.health()["engine"]),
        threads=service.settings.threads or 0,
        chunks=num_chunks,
        chunk_tokens=chunk_tokens,
        rounds=rounds,
        machine=this_machine(),
        note=note,
        arms=arms_of(asked, ("full", 1.0)),
    )


def _arms(ratio: float, *, has_disk: bool) -> Iterator[tuple[str, Blend | None]]:
    yield "full", None
    yield "none", Blend("none", 0.0)
    yield "first", Blend("first", ratio)
    if has_disk:
        yield "first, from disk", Blend("first", ratio)


def warm(service: Service, texts: Texts, tell: Tell) -> None:
    """Each chunk on its own, and everything written."""
    for number, prompt in enumerate(service.chunk_prompts(texts.chunks, chat=False)):
        tell(f"chunk {number + 1} of {len(texts.chunks)} on its own")
        service.warm(prompt)


def ask(service: Service, text: str, blend: Blend | None) -> Asked:
    """The first token of an answer; without blending nothing is reused."""
    calls, processor = service.num_calls, time.process_time()
    began = time.perf_counter()  # clock on: the text is there
    prompt = service.text_prompt(text)
    generation = Generation(prompt=prompt, max_tokens=1, blend=blend, use_prefix_cache=blend is not None)
    for event in service.events(generation):
        if isinstance(event, Done):
            seconds = time.perf_counter() - began  # clock off: the first token is there
            usage = event.usage
    processor = time.process_time() - processor
    return Asked(seconds, usage.prompt_tokens, usage.computed_tokens, processor, service.num_calls - calls)


def _forget(service: Service) -> float:
    """Nothing in memory, and files out of the page cache: their share that is."""
    service.settle()
    service.clear_memory()
    assert service.folder is not None
    return drop_from_page_cache(sorted(service.folder.rglob("*.safetensors")))
