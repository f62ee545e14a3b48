"""What both examples share: the built-in model through transformers, reading and answering with tensors that one can hold.

KV travels as {layer: (k, v)}, the form that `SimpleKVCache` takes and gives; k and v have the shape
[1, heads, tokens, head width]. This is all there is between transformers' cache and ours: `read` and `_past`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from rekindle.lab.machine import this_machine
from rekindle.model import ember

try:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
    from transformers.utils import logging
except ImportError as error:
    raise SystemExit(f'This example needs PyTorch and transformers: pip install "rekindle[torch]" ({error})') from None

KV = dict[int, tuple[torch.Tensor, torch.Tensor]]
Message = dict[str, str]
Item = TypeVar("Item")
ROUNDING = 1e-3  # logits of the same text read in one call or in two differ by less


@dataclass(frozen=True)
class Answer:
    """Greedy: always the likeliest token."""

    tokens: tuple[int, ...]
    margin: float  # least lead of a chosen token's logit over the next one's
    seconds: float  # from the request's arrival to the last token
    first_seconds: float  # … to the first token

    def agrees_with(self, other: Answer) -> bool:
        """Whether the tokens are equal. Raises SystemExit if they differ for another reason than rounding in a tie."""
        if self.tokens != other.tokens and min(self.margin, other.margin) > ROUNDING:
            raise SystemExit(f"the answers differ: {self} and {other}")
        return self.tokens == other.tokens


class Reader:
    """The built-in model in float32 on the CPU."""

    def __init__(self) -> None:
        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(ember.hf_path(), dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(ember.hf_path())
        self.num_layers: int = self.model.config.num_hidden_layers
        self.answer(self.ids([{"role": "user", "content": "Hello."}]), None, 4, time.perf_counter())  # warms up

    def ids(self, messages: Sequence[Message], *, to_answer: bool = True) -> list[int]:
        """The tokens of a conversation; a longer conversation's begin with those of its beginning."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_answer)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def read(self, ids: Sequence[int], after: KV | None = None) -> KV:
        """KV of the tokens in `after`, if there are any, and of these after them."""
        with torch.inference_mode():
            output = self.model(torch.tensor([ids]), past_key_values=_past(after), use_cache=True, logits_to_keep=1)
        return {layer: (k, v) for layer, (k, v, *_) in enumerate(output.past_key_values)}

    def answer(self, ids: Sequence[int], after: KV | None, max_tokens: int, arrived: float) -> Answer:
        """Read the last tokens of a prompt, with or without KV of the first, and answer."""
        past, tokens, margin, first_seconds = _past(after), list(ids), float("inf"), 0.0
        answer: list[int] = []
        with torch.inference_mode():
            while len(answer) < max_tokens and not (answer and answer[-1] == self.tokenizer.eos_token_id):
                output = self.model(torch.tensor([tokens]), past_key_values=past, use_cache=True, logits_to_keep=1)
                best, second = output.logits[0, -1].topk(2).values.tolist()
                tokens = [int(output.logits[0, -1].argmax())]
                margin = min(margin, best - second)
                answer += tokens
                first_seconds = first_seconds or time.perf_counter() - arrived
        return Answer(tuple(answer), margin, time.perf_counter() - arrived, first_seconds)

    def text(self, answer: Answer) -> str:
        return str(self.tokenizer.decode(answer.tokens, skip_special_tokens=True)).strip()


def _past(kv: KV | None) -> DynamicCache:
    """KV as transformers wants it."""
    past = DynamicCache()
    for layer, (k, v) in (kv or {}).items():
        past.update(k, v, layer)
    return past


@dataclass(frozen=True)
class Times:
    """Latencies of one arm, in milliseconds."""

    average_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    first_token_p50_ms: float
    requests_per_second: float  # one after the other

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Times:
        seconds = np.array([answer.seconds for answer in answers])
        p50, p95, p99 = (1000 * float(each) for each in np.percentile(seconds, (50, 95, 99)))
        first = 1000 * float(np.median([answer.first_seconds for answer in answers]))
        return cls(1000 * float(seconds.mean()), p50, p95, p99, first, len(answers) / float(seconds.sum()))


_ROWS = {
    "average latency": "average_ms",
    "P50": "p50_ms",
    "P95": "p95_ms",
    "P99": "p99_ms",
    "first token, P50": "first_token_p50_ms",
    "requests/s": "requests_per_second",
}


@dataclass(frozen=True)
class Arms:
    """The same requests, served in both ways."""

    without: list[Answer]
    with_cache: list[Answer]

    @classmethod
    def none(cls) -> Arms:
        return cls([], [])

    def serve(self, without: Callable[[], Answer], with_cache: Callable[[], Answer]) -> Answer:
        """One request in both ways. They take turns in going first, so that whatever else the machine does falls on both.

        Raises SystemExit if the answers differ.
        """
        cache_goes_first = len(self.without) % 2 == 1
        early = with_cache() if cache_goes_first else None
        self.without.append(without())
        self.with_cache.append(early or with_cache())
        self.without[-1].agrees_with(self.with_cache[-1])
        return self.with_cache[-1]

    @property
    def num_equal(self) -> int:
        return sum(one.agrees_with(other) for one, other in zip(self.without, self.with_cache, strict=True))

    def table(self) -> Table:
        """For people."""
        table = right_aligned("", "without cache", "with cache", "better by")
        slow, fast = Times.of(self.without), Times.of(self.with_cache)
        for name, key in _ROWS.items():
            old, new = getattr(slow, key), getattr(fast, key)
            unit = " ms" if key.endswith("_ms") else ""
            ratio = old / new if unit else new / old
            table.add_row(name, f"{old:,.1f}{unit}", f"{new:,.1f}{unit}", f"{ratio:.1f} ×")
        return table

    def facts(self) -> dict[str, Any]:
        """For machines."""
        slow, fast = Times.of(self.without), Times.of(self.with_cache)
        return {
            "without_cache": asdict(slow),
            "with_cache": asdict(fast),
            "speed_up": slow.average_ms / fast.average_ms,
            "equal_answers": self.num_equal,
        }


def right_aligned(*headings: str) -> Table:
    """A table whose first column has names, the others figures."""
    table = Table(*headings, show_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def progress(items: Sequence[Item], what: str) -> Iterable[Item]:
    """A progress bar on the error output, so that the standard output has nothing but results."""
    return track(items, description=what, console=Console(stderr=True))


def print_json(facts: dict[str, Any]) -> None:
    """One line for machines."""
    machine = asdict(this_machine()) | {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
    typer.echo(json.dumps(facts | {"machine": machine}))
