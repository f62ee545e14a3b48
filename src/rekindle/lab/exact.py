"""Is reuse exact? Answers with and without it, and the logits behind them, beside what rounding alone does.

**The yardstick.** Floating-point sums depend on the order of their terms, and the order depends on how many tokens a batch
holds. So two runs of the same prompt that split it into other batches differ a little, with nothing reused. Reuse is exact
if it differs by no more than that.

**The arms.** Each prompt is read in one piece, in random pieces (three ways), forked from a sequence that holds a random
share of it, and placed from exported blocks of a random share. Two figures come of each pair: the largest difference of
the logits after the prompt. Beside that, each prompt is answered greedily through the service, without reuse and then with
it: after a prompt that shares its beginning, repeated, and after everything has left the engine for the store. The control
is once more without reuse, and without a KV cache, so in other batches: where it differs, two tokens were as good as equal.

The built-in model is asked questions in its own language, any other model gets random tokens, of which it is less sure.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from rekindle.engine.protocol import Engine, Work
from rekindle.errors import InvalidRequest
from rekindle.lab.machine import usable_cores
from rekindle.model.ember.language import generate_document, generate_questions
from rekindle.model.source import BUILTIN
from rekindle.reuse.prompt import Prompt
from rekindle.serve.request import Done, Generation, Sampling
from rekindle.serve.service import Service
from rekindle.settings import Settings
from rekindle.tokens import Tokens

BLOCK = 64
CONTROL = "none, other batches"
NUM_SPLITS = 3  # other ways to split a prompt, to see what rounding does


@dataclass(frozen=True, kw_only=True)
class ExactReport:
    """What was found over all prompts."""

    model: str
    engine: str
    kv_type: str
    prompts: int
    answer_tokens: int  # at most, per answer
    seed: int
    rounding: float  # largest logits difference of two runs without reuse, split otherwise
    forked: float  # of a forked run from the one in one piece
    placed: float  # of a run from stored blocks
    same_text: dict[str, int] = field(default_factory=dict)  # kind of reuse -> answers equal to the one without

    def as_json(self) -> str:
        return json.dumps({"experiment": "exact"} | asdict(self))


def run_exact(
    model: str,
    *,
    prompts: int = 200,
    answer_tokens: int = 32,
    kv_type: str = "f16",
    engine: str = "auto",
    threads: int | None = None,
    seed: int = 0,
) -> ExactReport:
    """The whole experiment on a model. Raises ModelError or InvalidRequest."""
    if min(prompts, answer_tokens) < 1:
        raise InvalidRequest("prompts and answer tokens must be 1 or more")
    settings = Settings.load(
        model=model, engine=engine, kv_type=kv_type, threads=threads or usable_cores(), store="none"
    )
    with Service.open(settings) as service:
        random = np.random.default_rng(seed)
        random_prompt = random_question if model == BUILTIN else _random_tokens
        asked = [random_prompt(random, service).tokens for _ in range(prompts)]
        differences: list[dict[str, float]] = []
        service.run_on_engine(lambda engine: differences.extend(_compare(engine, tokens, random) for tokens in asked))
        return ExactReport(
            model=service.model_name,
            engine=str(service.health()["engine"]),
            kv_type=service.engine_spec.kv_type,
            prompts=prompts,
            answer_tokens=answer_tokens,
            seed=seed,
            same_text=_same_texts(service, asked, answer_tokens, random),
            **{name: max(each[name] for each in differences) for name in ("rounding", "forked", "placed")},
        )


def random_question(random: np.random.Generator, service: Service) -> Prompt:
    """A held-out document of ember's language and a question about it, as a chat."""
    seed = int(random.integers(1 << 30))
    document = generate_document(seed, num_people=int(random.integers(2, 15)))
    question = generate_questions(document, seed)[int(random.integers(3))]
    content = "\n".join([*document.passages, question.text])
    return service.chat_prompt([{"role": "user", "content": content}])


def _random_tokens(random: np.random.Generator, service: Service) -> Prompt:
    """40 to 600 tokens of the vocabulary's first half."""
    length = int(random.integers(40, 600))
    return Prompt(random.integers(8, service.engine_spec.vocab_size // 2, length).astype(np.int32))


def _compare(engine: Engine, tokens: Tokens, random: np.random.Generator) -> dict[str, float]:
    whole = engine.open()
    reference = engine.forward([Work(whole, tokens)])[whole].copy()
    splits = [_split(engine, tokens, np.unique(random.integers(1, len(tokens), 4))) for _ in range(NUM_SPLITS)]
    shared = int(random.integers(1, len(tokens)))
    forked = engine.fork(whole, shared)
    after_fork = engine.forward([Work(forked, tokens[shared:])])[forked].copy()
    placed = engine.open()
    blocks = shared - shared % BLOCK
    for start in range(0, blocks, BLOCK):
        engine.place(placed, engine.export(whole, start, start + BLOCK), start)
    after_place = engine.forward([Work(placed, tokens[blocks:])])[placed].copy()
    for seq in (whole, forked, placed):
        engine.close(seq)
    arms = {"rounding": splits, "forked": [after_fork], "placed": [after_place]}
    return {name: max(float(np.abs(each - reference).max()) for each in logits) for name, logits in arms.items()}


def _split(engine: Engine, tokens: Tokens, cuts: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Logits after the tokens, read in pieces, nothing reused."""
    seq = engine.open()
    for part in np.split(tokens, cuts):
        logits = engine.forward([Work(seq, part)])[seq].copy()
    engine.close(seq)
    return logits


def _same_texts(service: Service, asked: Sequence[Tokens], length: int, random: np.random.Generator) -> dict[str, int]:
    """How many answers with reuse equal the one without, by kind of reuse; every kind must really have reused."""
    same = {CONTROL: 0, "shared beginning": 0, "exact repeat": 0, "from the store": 0}
    for tokens in asked:
        plain = answer_greedily(service, tokens, length, reuse=False)
        service.clear_cache()
        shared = int(random.integers(30, len(tokens)))
        answer_greedily(service, np.concatenate([tokens[:shared], tokens[:5]]), 1)
        answers = {
            "shared beginning": answer_greedily(service, tokens, length),
            "exact repeat": answer_greedily(service, tokens, length),
        }
        service.evict_residents()
        answers["from the store"] = answer_greedily(service, tokens, length)
        same[CONTROL] += answer_greedily(service, tokens, length, reuse=False, kv_cache=False).tokens == plain.tokens
        for kind, done in answers.items():
            assert done.usage.cached_tokens > 0, kind
            same[kind] += done.tokens == plain.tokens
    return same


def answer_greedily(
    service: Service, tokens: Tokens, length: int, *, reuse: bool = True, kv_cache: bool = True
) -> Done:
    """The answer of up to so many tokens to a prompt, and how it came about."""
    generation = Generation(
        prompt=Prompt(tokens),
        max_tokens=length,
        sampling=Sampling(temperature=0),
        use_prefix_cache=reuse,
        use_kv_cache=kv_cache,
    )
    *_, done = service.events(generation)
    assert isinstance(done, Done)
    return done


def print_report(report: ExactReport, console: Console) -> None:
    """Two tables for people, then one line of JSON."""
    logits = Table(
        title=f"Logits after {report.prompts} prompts, {report.model}, {report.engine}, {report.kv_type} KV",
        title_justify="left",
    )
    logits.add_column("against one uncached run")
    logits.add_column("largest difference", justify="right")
    rows: list[tuple[str, Any]] = [
        ("uncached, other batch splits", report.rounding),
        ("forked", report.forked),
        ("placed from stored blocks", report.placed),
    ]
    for name, value in rows:
        logits.add_row(name, f"{value:.6f}")
    texts = Table(title="Greedy answers equal to the uncached one", title_justify="left")
    texts.add_column("reuse")
    texts.add_column("equal", justify="right")
    for name, count in report.same_text.items():
        texts.add_row(name, f"{count} of {report.prompts}")
    console.print(logits, texts)
    console.print(report.as_json(), soft_wrap=True, markup=False, highlight=False)
