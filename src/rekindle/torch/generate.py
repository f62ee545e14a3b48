"""One prompt answered, step by step: tokenise, look up, split, load, prefill or skip, decode, keep.

    |---------- load ----------|---- prefill ----|  decode …
     blocks with these tokens    what nobody has
     after exactly these         read before

What is kept afterwards is the whole sequence, with the logits after the prompt and after the answer: a repeated prompt
needs no model call before its first token, and the next turn of a conversation finds this one's answer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rekindle.engine.protocol import SequenceId, Work
from rekindle.errors import InvalidRequest, PromptTooLong
from rekindle.reuse.plan import Plan
from rekindle.serve.request import Sampling
from rekindle.serve.sampling import Sampler
from rekindle.serve.text import TextStream
from rekindle.tokens import Tokens, as_tokens
from rekindle.torch.attach import AttachedEngine
from rekindle.torch.cache import Cache, Found, Opened, open_alone

Vector = npt.NDArray[np.float32]
Input = str | Sequence[Mapping[str, Any]] | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Milliseconds of each step, in their order."""

    tokenize_ms: float
    look_up_ms: float  # memory and disk, and the split
    load_ms: float  # stored KV into the engine
    prefill_ms: float  # 0 if everything was at hand
    decode_ms: float  # from the first token to the last
    keep_ms: float  # into the store; on disk at its end

    @property
    def ttft_ms(self) -> float:
        """To the first token."""
        return self.tokenize_ms + self.look_up_ms + self.load_ms + self.prefill_ms

    @property
    def total_ms(self) -> float:
        """To the whole answer, without keeping it."""
        return self.ttft_ms + self.decode_ms


@dataclass(frozen=True, kw_only=True)
class Generated:
    """An answer, and what it took."""

    text: str
    tokens: tuple[int, ...]  # of the answer, the one that ended it included
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    plan: Plan  # what was reused, what was computed, and why
    model_calls: int  # before the first token
    timings: Timings

    @property
    def reused(self) -> int:
        """Prompt tokens whose KV was at hand."""
        return self.plan.reused

    @property
    def computed(self) -> int:
        """Prompt tokens that were computed."""
        return self.plan.computed


def generate(
    model: Any,
    tokenizer: Any,
    prompt: Input,
    *,
    cache: Cache | None = None,
    max_new_tokens: int = 128,
    stop: str | Sequence[str] = (),
    salt: bytes = b"",
    **sampling: Any,
) -> Generated:
    """Answer a prompt with a model that the caller holds, which is left as it was.

    A prompt is text, a list of chat messages, or token ids. `cache` is where KV is looked for and kept; without one,
    everything is computed, and an engine is made for this one call. `salt` keeps tenants apart. Answers are greedy unless
    `temperature` says otherwise; further arguments are those of `Sampling`.

    Raises ModelError if the model can't be served, InvalidRequest, PromptTooLong.
    """
    if max_new_tokens < 1:
        raise InvalidRequest(f"max_new_tokens must be 1 or more, got {max_new_tokens}", param="max_new_tokens")
    sampler = Sampler(Sampling(**{"temperature": 0.0, **sampling}))
    stream = TextStream((stop,) if isinstance(stop, str) else tuple(stop))
    opened = open_alone(model, tokenizer) if cache is None else cache.open(model, tokenizer)
    try:
        return _Answer(opened, sampler, stream, max_new_tokens, salt).run(prompt)
    finally:
        if cache is None:
            opened.close()


class _Answer:
    """One call of `generate`."""

    def __init__(self, opened: Opened, sampler: Sampler, stream: TextStream, max_new_tokens: int, salt: bytes) -> None:
        self._opened = opened
        self._engine = opened.engine
        self._sampler = sampler
        self._stream = stream
        self._max_new_tokens = max_new_tokens
        self._salt = salt
        self._text = ""

    def run(self, prompt: Input) -> Generated:
        engine, clock = self._engine, _Clock()
        tokens = tokenize(engine, prompt)
        self._check_length(tokens)
        clock.mark("tokenize_ms")
        found = self._opened.look_up(tokens, self._salt)
        clock.mark("look_up_ms")
        calls = engine.num_calls
        seq = engine.open()
        try:
            for payload in self._opened.payloads(found):
                engine.place(seq, payload, payload.position)
            clock.mark("load_ms")
            logits = self._prefill(seq, tokens, found)
            clock.mark("prefill_ms")
            calls = engine.num_calls - calls
            answer, last = self._decode(seq, logits)
            clock.mark("decode_ms")
            self._opened.keep(seq, {len(tokens): logits, engine.length(seq): last}, self._salt)
            clock.mark("keep_ms")
        finally:
            engine.close(seq)
        is_over = self._stream.stopped or engine.tokenizer.is_end(answer[-1])
        return Generated(
            text=self._text,
            tokens=tuple(answer),
            finish_reason="stop" if is_over else "length",
            prompt_tokens=len(tokens),
            plan=found.plan,
            model_calls=calls,
            timings=Timings(**clock.marks),
        )

    def _check_length(self, tokens: Tokens) -> None:
        if not len(tokens):
            raise InvalidRequest("the prompt is empty: at least one token is needed", param="prompt")
        wanted = len(tokens) + self._max_new_tokens - 1  # the last token's KV is not needed
        if wanted > self._engine.num_cells:
            raise PromptTooLong(
                f"the prompt has {len(tokens)} tokens and the answer up to {self._max_new_tokens}; the context holds "
                f"{self._engine.num_cells}. Give the cache a larger one: Cache(context=…)",
                param="prompt",
            )

    def _prefill(self, seq: SequenceId, tokens: Tokens, found: Found) -> Vector:
        """The logits after the prompt: computed, or as they were kept."""
        rest = tokens[found.plan.reused :]
        if len(rest):
            return self._engine.forward([Work(seq, rest)])[seq].copy()
        assert found.match.logits is not None
        return found.match.logits

    def _decode(self, seq: SequenceId, logits: Vector) -> tuple[list[int], Vector]:
        """The answer's tokens, and the logits that chose the last of them."""
        answer: list[int] = []
        tokenizer = self._engine.tokenizer
        while True:
            token = self._sampler.choose(logits)
            answer.append(token)
            if tokenizer.is_end(token):
                break
            self._text += self._stream.add(tokenizer.piece(token))
            if self._stream.stopped or len(answer) == self._max_new_tokens:
                break
            logits = self._engine.forward([Work(seq, as_tokens([token]))])[seq]
        self._text += self._stream.flush()
        return answer, logits.copy()


def tokenize(engine: AttachedEngine, prompt: Input) -> Tokens:
    """Ids of text (with BOS), of a conversation (by its chat template), or as they are. Raises InvalidRequest."""
    if isinstance(prompt, str):
        return engine.tokenizer.encode(prompt, bos=True)
    messages = [each for each in prompt if isinstance(each, Mapping)]
    if messages:
        if engine.template is None:
            raise InvalidRequest("the tokenizer has no chat template; give the prompt as text", param="prompt")
        return engine.tokenizer.encode(engine.template.render(messages))
    tokens = as_tokens(prompt)
    size = engine.spec.vocab_size
    if bad := [int(token) for token in tokens if not 0 <= token < size][:1]:
        raise InvalidRequest(f"token ids must be between 0 and {size - 1}, got {bad[0]}", param="prompt")
    return tokens


class _Clock:
    """Times from one mark to the next."""

    def __init__(self) -> None:
        self.marks: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.marks[name] = (now - self._last) * 1000
        self._last = now
