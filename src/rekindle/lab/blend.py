"""What blending costs in quality and saves in time: `rekindle lab blend`.

**Arms.** `full` is a prefill of the whole prompt: the yardstick of quality and of time. `prefix` reuses what a prefix cache
has of the order in which the chunks were met before. `none` places every chunk and mends nothing. The others compute a
share (`ratio`) of the placed tokens anew: `first` (EPIC's rule), `remembered` (what differed most in the earlier order),
`auto` (what blending does if nothing is said), and on the torch engine those that look first: `query`, and `deviation`
at each layer, so that "deviation K2" judges K at layer 2 (from 0). Those choose ranges, as the server does; "cacheblend K2"
chooses single tokens, as CacheBlend does. All arms answer the same questions, greedily, on one engine.

**Figures.** Exact match and F1 of the whole answer (normalised as for SQuAD), exact match beside full prefill's with a
bootstrap interval over documents, mean KL of the first answer token from full prefill's, TTFT as the sum of all readings
with a first question beside the same sum of full prefill, and budget: token-layers computed beside those of the prompt.
At ratio 1 the blended logits must be full prefill's; the largest difference found is reported beside their spread.

**The gate** holds if the best arm of at most GATE_BUDGET keeps so much of full prefill's exact match.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rekindle.engine.protocol import Engine, Work
from rekindle.errors import InvalidRequest, counted
from rekindle.lab.blend_files import file_tasks, writer
from rekindle.lab.blend_run import (
    ChunkKV,
    Reading,
    Reply,
    answer,
    first_token_seconds,
    met_before,
    read_after,
    read_blended,
    read_fully,
    read_singly,
)
from rekindle.lab.blend_tasks import Asked, BlendTask, ember_tasks
from rekindle.lab.distributions import divergence
from rekindle.lab.load.servers import find_model
from rekindle.model.model import Model
from rekindle.model.source import BUILTIN
from rekindle.model.tokenizer import Tokenizer
from rekindle.reuse.blend import Blend
from rekindle.reuse.blend_select import LOOKING, Select
from rekindle.serve.assembly import engine_name
from rekindle.serve.blending import check_movable
from rekindle.serve.prompting import Prompting
from rekindle.serve.service import Service
from rekindle.settings import Settings

RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3)
SELECTS: tuple[Select, ...] = ("first", "remembered", "auto")
SINGLY = "cacheblend"  # arms that choose single tokens
GATE_BUDGET = 0.2  # ratio, of the arms that may pass the gate
CELLS = 16_384
_SEQUENCES = 4  # of one document in the engine at a time, at most
_RESAMPLES = 1_000
Name = tuple[str, float]  # select and ratio


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of reading, over all questions."""

    select: str
    ratio: float
    exact_match: float
    exact_match_of_full: float
    f1: float
    kl: float  # nats
    ttft_of_full: float
    budget: float  # token-layers computed, of those of the prompts
    interval: tuple[float, float]  # 95 % of exact_match_of_full
    by_kind: dict[str, float]  # exact match


@dataclass(frozen=True, kw_only=True)
class BlendReport:
    """The whole table."""

    engine: str
    model: str
    fingerprint: str  # of what KV depends on: another model, KV type or engine is another
    data: str
    seed: int
    documents: int
    questions: int
    chunks: float  # of a document, on average
    prompt_tokens: float
    arms: tuple[Arm, ...]
    largest_difference: float  # of logits at ratio 1 from full prefill's
    spread: float  # of these logits
    left_out: int = 0  # examples that are longer than the model's context

    def as_json(self) -> str:
        return json.dumps({"experiment": "blend"} | asdict(self))

    @property
    def best(self) -> Arm:
        """Of the arms that compute at most GATE_BUDGET of what they place."""
        served = [arm for arm in self.arms if arm.select.split()[0] in (*SELECTS, "none", *LOOKING)]
        cheap = [arm for arm in served if arm.ratio <= GATE_BUDGET]
        return max(cheap, key=lambda arm: (arm.exact_match_of_full, -arm.budget))


@dataclass
class _Tally:
    """What is counted of one arm."""

    right: list[list[bool]] = field(default_factory=list)  # of each document's questions
    kinds: list[str] = field(default_factory=list)
    f1: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    seconds: float = 0.0
    computed: int = 0


def run_blend(
    model: str = BUILTIN,
    *,
    engine: str = "auto",
    data: Path | None = None,
    documents: int = 40,
    ratios: Sequence[float] = RATIOS,
    selects: Sequence[Select] = SELECTS,
    looking: bool = True,
    threads: int = 1,
    context: int = CELLS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> BlendReport:
    """Ask about so many documents in all ways. Raises InvalidRequest, ModelError.

    `looking`: on the torch engine also arms that look into KV before they choose. Without `data` the built-in model is
    asked about documents in its own language.
    """
    if documents < 1 or not all(0 < ratio <= 1 for ratio in ratios):
        raise InvalidRequest("at least one document, and ratios above 0 and up to 1, are expected")
    if data is None and model != BUILTIN:
        find_model(model)  # what can't be opened speaks no language
        raise InvalidRequest(f"{model} does not speak the built-in model's language; name a file of examples: --data")
    arms: list[Name] = [("full", 1.0), ("prefix", 0.0), ("none", 0.0)]
    settings = Settings.load(model=model, engine=engine, threads=threads, store="none", context=context)
    if data is None:
        tasks, num_left_out = list(islice(ember_tasks(seed), documents)), 0
    else:
        tasks, num_left_out = _of_file(data, settings, documents, seed)
        context = max(context, _SEQUENCES * max(map(_size, tasks)))
        settings = settings.model_copy(update={"context": context})
    with Service.open(settings) as service:
        check_movable(service.engine_spec, "model", "measure another model, or another kv_type")
        found: list[str] = [*selects]
        if looking:
            service.run_on_engine(lambda each: found.extend(_looking(each)))
        study = _Study([*arms, *((select, ratio) for select in found for ratio in ratios)], service.model.tokenizer)
        for number, task in enumerate(tasks):
            service.run_on_engine(lambda each, task=task: study.add(each, task))  # type: ignore[misc]
            if progress is not None:
                progress(number + 1, len(tasks))
        return study.report(
            engine=engine_name(settings, service.model),
            model=service.model_name,
            fingerprint=service.engine_spec.fingerprint.hex(),
            data="ember" if data is None else data.name,
            seed=seed,
            left_out=num_left_out,
        )


def _of_file(data: Path, settings: Settings, documents: int, seed: int) -> tuple[list[BlendTask], int]:
    """Examples that fit into what the model was trained to see, and how many do not. Raises InvalidRequest."""
    model = Model.open(settings.model, engine=settings.engine, vocab_only=True)
    try:
        tasks, most = list(islice(file_tasks(data, writer(Prompting(model)), seed), documents)), model.train_context
    finally:
        model.close()
    fitting = [task for task in tasks if _size(task) <= most]
    if not fitting:
        shortest = counted(min(map(_size, tasks)), "token")
        raise InvalidRequest(f"{data}: the shortest example has {shortest}; {model.name} holds {most:,}", param="data")
    return fitting, len(tasks) - len(fitting)


def _size(task: BlendTask) -> int:
    """Tokens of its prompt and its longest answer."""
    return len(task.prompt) + max(len(asked.tokens) + asked.max_tokens for asked in task.asked)


class _Study:
    """Adds documents to all arms."""

    def __init__(self, arms: Sequence[Name], tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tallies = {arm: _Tally() for arm in arms}
        self._sizes: list[tuple[int, int]] = []  # chunks and tokens of each prompt
        self._difference, self._spreads = 0.0, list[float]()

    def add(self, engine: Engine, task: BlendTask) -> None:
        """Read one task's prompt in every way and ask its questions."""
        prompt, kv = task.prompt, ChunkKV(engine, task.before[:1])
        met = met_before(engine, task, kv)
        full = read_fully(engine, prompt)
        expected = answer(engine, full.seq, task.asked, self._tokenizer.is_end)
        for (select, ratio), tally in self._tallies.items():
            if select == "full":
                reading = read_fully(engine, prompt)
            elif select == "prefix":
                reading = read_after(engine, prompt, met)
            elif select.startswith(SINGLY):
                reading = read_singly(engine, prompt, kv, _blend(select.replace(SINGLY, "deviation"), ratio))
            else:
                reading = read_blended(engine, prompt, kv, _blend(select, ratio), question=task.asked[0].tokens)
            self._count(engine, tally, task, reading, expected)
            engine.close(reading.seq)
        self._compare_at_one(engine, task, kv, expected)
        for seq in (met, full.seq):
            engine.close(seq)
        self._sizes.append((len(task.chunks), len(prompt) + len(task.asked[0].tokens)))

    def _count(
        self, engine: Engine, tally: _Tally, task: BlendTask, reading: Reading, expected: Sequence[Reply]
    ) -> None:
        tally.seconds += reading.seconds + first_token_seconds(engine, reading.seq, task.asked[0])
        tally.computed += reading.computed + len(task.asked[0].tokens)
        replies = answer(engine, reading.seq, task.asked, self._tokenizer.is_end)
        said = [self._tokenizer.decode(reply.tokens) for reply in replies]
        tally.right.append([_is_right(text, asked) for text, asked in zip(said, task.asked, strict=True)])
        tally.kinds += [asked.kind for asked in task.asked]
        tally.f1 += [
            max(_f1(text, each) for each in asked.answers) for text, asked in zip(said, task.asked, strict=True)
        ]
        tally.kl += [float(divergence(one.logits, other.logits)) for one, other in zip(expected, replies, strict=True)]

    def _compare_at_one(self, engine: Engine, task: BlendTask, kv: ChunkKV, expected: Sequence[Reply]) -> None:
        """At ratio 1 all is computed, whatever is at hand."""
        reading = read_blended(engine, task.prompt, kv, Blend("first", 1.0))
        logits = engine.forward([Work(reading.seq, task.asked[0].tokens)])[reading.seq]
        self._difference = max(self._difference, float(np.abs(logits - expected[0].logits).max()))
        self._spreads.append(float(expected[0].logits.std()))
        engine.close(reading.seq)

    def report(self, **facts: Any) -> BlendReport:
        full = self._tallies["full", 1.0]
        tokens = sum(size for _, size in self._sizes)
        return BlendReport(
            documents=len(self._sizes),
            questions=sum(map(len, full.right)),
            chunks=float(np.mean([count for count, _ in self._sizes])),
            prompt_tokens=tokens / len(self._sizes),
            arms=tuple(_arm(name, tally, full, tokens) for name, tally in self._tallies.items()),
            largest_difference=self._difference,
            spread=float(np.mean(self._spreads)),
            **facts,
        )


def _looking(engine: Engine) -> list[str]:
    """Arms that look before they choose, if this engine can."""
    if not engine.spec.can_look:
        return []
    layers = range(1, engine.spec.num_layers)
    deviation = [f"deviation {part}{layer}" for layer in layers for part in "KV"]
    return ["query", *deviation, *(f"{SINGLY} K{layer}" for layer in layers)]


def _blend(select: str, ratio: float) -> Blend:
    """What an arm's name says."""
    name, _, at = select.partition(" ")
    blend = Blend(name, ratio)  # type: ignore[arg-type]
    return replace(blend, judge=at[0], layer=int(at[1:])) if at else blend  # type: ignore[arg-type]


def _arm(name: Name, tally: _Tally, full: _Tally, tokens: int) -> Arm:
    flat = [right for each in tally.right for right in each]
    kinds = {
        kind: float(np.mean([right for right, one in zip(flat, tally.kinds, strict=True) if one == kind]))
        for kind in dict.fromkeys(tally.kinds)
    }
    return Arm(
        select=name[0],
        ratio=name[1],
        exact_match=float(np.mean(flat)),
        exact_match_of_full=_share(sum(flat), sum(map(sum, full.right))),
        f1=float(np.mean(tally.f1)),
        kl=float(np.mean(tally.kl)),
        ttft_of_full=tally.seconds / full.seconds,
        budget=tally.computed / tokens,
        interval=_interval([(sum(one), sum(other)) for one, other in zip(tally.right, full.right, strict=True)]),
        by_kind=kinds,
    )


def _interval(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """95 % of right answers beside full prefill's, documents drawn again."""
    pairs, random = np.array(counts), np.random.default_rng(0)
    draws = pairs[random.integers(0, len(pairs), (_RESAMPLES, len(pairs)))].sum(axis=1)
    shares = draws[:, 0] / np.maximum(draws[:, 1], 1)
    low, high = np.quantile(shares, (0.025, 0.975))
    return float(low), float(high)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _normal(text: str) -> list[str]:
    """Words as SQuAD's script compares them: lower case, no punctuation, no articles."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _is_right(text: str, asked: Asked) -> bool:
    first = text.strip().split("\n")[0]  # a base model goes on after its answer
    return any(_normal(first) == _normal(each) for each in asked.answers)


def _f1(text: str, expected: str) -> float:
    said, wanted = _normal(text.strip().split("\n")[0]), _normal(expected)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if said or wanted else 1.0


def by_select(report: BlendReport) -> Iterator[tuple[str, Mapping[float, Arm]]]:
    """Arms of each kind, by ratio."""
    for select in dict.fromkeys(arm.select for arm in report.arms):
        yield select, {arm.ratio: arm for arm in report.arms if arm.select == select}
