"""Do both engines give the same answers? llama.cpp and torch on the same prompts, beside what rounding alone does.

**The yardstick.** Two engines add up the same products in other orders, and keep KV in other types (float16 and float32),
so their logits differ a little; so do one engine's own, when it reads a prompt in other pieces. Greedy answers differ where
two tokens are as good as equal. The control is llama.cpp beside itself, without a KV cache, so in other batches. And for
the count to mean something, answers to different prompts have to differ: the last row compares each answer with that to
the next prompt.

**What is compared.** The ids that both tokenizers make of each prompt's text; the greedy answers; and the logits after the
prompt, by their largest difference beside their spread.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from rekindle.engine.protocol import Engine, Work
from rekindle.errors import InvalidRequest
from rekindle.lab.exact import answer_greedily, random_question
from rekindle.lab.machine import usable_cores
from rekindle.model.source import BUILTIN
from rekindle.serve.service import Service
from rekindle.settings import Settings
from rekindle.tokens import Tokens

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class EnginesReport:
    """What was found over all prompts."""

    model: str
    kv_types: tuple[str, str]  # of llama.cpp, of torch
    prompts: int
    answer_tokens: int  # at most, per answer
    seed: int
    same_ids: int  # prompts that both tokenizers cut alike
    same_text: int  # answers of torch equal to llama.cpp's
    control_text: int  # answers of llama.cpp in other batches equal to its own
    next_text: int  # answers equal to that to the next prompt
    spread: float  # standard deviation of the logits, mean over prompts
    difference: float  # largest, torch from llama.cpp
    control: float  # largest, llama.cpp from itself, read in two pieces
    torch_control: float  # the same of torch

    def as_json(self) -> str:
        return json.dumps({"experiment": "engines"} | asdict(self))


def run_engines(
    *, prompts: int = 200, answer_tokens: int = 32, dtype: str = "float32", threads: int | None = None, seed: int = 0
) -> EnginesReport:
    """The whole experiment on the built-in model, of which there are both formats. Raises ModelError, InvalidRequest."""
    if min(prompts, answer_tokens) < 1:
        raise InvalidRequest("prompts and answer tokens must be 1 or more")
    common: dict[str, Any] = {"model": BUILTIN, "threads": threads or usable_cores(), "store": "none"}
    with (
        Service.open(Settings.load(engine="llama", **common)) as llama,
        Service.open(Settings.load(engine="torch", dtype=dtype, **common)) as torch,
    ):
        random = np.random.default_rng(seed)
        asked = [random_question(random, llama) for _ in range(prompts)]
        same_ids = sum(_same(prompt.tokens, torch.model.tokenizer.encode(prompt.text or "")) for prompt in asked)
        tokens = [prompt.tokens for prompt in asked]
        llama_texts, torch_texts, control_texts = (
            [answer_greedily(service, each, answer_tokens, reuse=False, kv_cache=cached).text for each in tokens]
            for service, cached in ((llama, True), (torch, True), (llama, False))
        )
        llama_logits, llama_split = _logits(llama, tokens)
        torch_logits, torch_split = _logits(torch, tokens)
        return EnginesReport(
            model=llama.model_name,
            kv_types=(llama.engine_spec.kv_type, torch.engine_spec.kv_type),
            prompts=prompts,
            answer_tokens=answer_tokens,
            seed=seed,
            same_ids=same_ids,
            same_text=_num_equal(llama_texts, torch_texts),
            control_text=_num_equal(llama_texts, control_texts),
            next_text=_num_equal(llama_texts, [*llama_texts[1:], llama_texts[0]]),
            spread=float(np.mean([each.std() for each in llama_logits])),
            difference=_largest(llama_logits, torch_logits),
            control=_largest(llama_logits, llama_split),
            torch_control=_largest(torch_logits, torch_split),
        )


def _logits(service: Service, asked: list[Tokens]) -> tuple[list[Vector], list[Vector]]:
    """After each prompt, read in one piece and in two."""
    found: list[tuple[Vector, Vector]] = []
    service.run_on_engine(lambda engine: found.extend(_read(engine, tokens) for tokens in asked))
    return [one for one, _ in found], [two for _, two in found]


def _read(engine: Engine, tokens: Tokens) -> tuple[Vector, Vector]:
    results = []
    for parts in ([tokens], np.array_split(tokens, 2)):
        seq = engine.open()
        for part in parts:
            logits = engine.forward([Work(seq, part)])[seq].copy()
        engine.close(seq)
        results.append(logits)
    return results[0], results[1]


def _same(one: Tokens, other: Tokens) -> bool:
    return bool(np.array_equal(one, other))


def _num_equal(some: list[str], others: list[str]) -> int:
    return sum(one == other for one, other in zip(some, others, strict=True))


def _largest(some: list[Vector], others: list[Vector]) -> float:
    return max(float(np.abs(one - other).max()) for one, other in zip(some, others, strict=True))


def print_report(report: EnginesReport, console: Console) -> None:
    """Two tables for people, then one line of JSON."""
    one, other = report.kv_types
    title = f"{report.prompts} prompts, {report.model}, llama.cpp ({one} KV) and torch ({other} KV)"
    answers = Table(title=title, title_justify="left")
    answers.add_column("")
    answers.add_column("equal", justify="right")
    counts = {
        "ids of the two tokenizers": report.same_ids,
        "greedy answers of the two engines": report.same_text,
        "control: llama.cpp and itself in other batches": report.control_text,
        "control: answers to the next prompt": report.next_text,
    }
    for name, count in counts.items():
        answers.add_row(name, f"{count} of {report.prompts}")
    logits = Table(title=f"Logits after the prompts, standard deviation {report.spread:.2f}", title_justify="left")
    logits.add_column("")
    logits.add_column("largest difference", justify="right")
    differences = {
        "torch from llama.cpp": report.difference,
        "control: llama.cpp from itself, in two pieces": report.control,
        "control: torch from itself, in two pieces": report.torch_control,
    }
    for name, value in differences.items():
        logits.add_row(name, f"{value:.6f}")
    console.print(answers, logits)
    console.print(report.as_json(), soft_wrap=True, markup=False, highlight=False)
