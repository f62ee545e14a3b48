"""The records that pass between a caller and the worker: what to generate, and what happened.

A caller hands the worker a `Generation` and a sink; the worker calls the sink with zero or more `Piece`s and then exactly
one `Done` or `Failed`. Records are frozen, so they may cross threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from rekindle.errors import InvalidRequest, RekindleError, check_number
from rekindle.kv.pins import Pin
from rekindle.reuse.blend import Blend
from rekindle.reuse.plan import Plan
from rekindle.reuse.prompt import Prompt
from rekindle.tokens import Tokens

FinishReason = Literal["stop", "length", "cancelled"]
MAX_TOP_LOGPROBS = 20

# Of the request that is worked on, for logs.
request_id: ContextVar[str] = ContextVar("rekindle_request_id", default="")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; the other defaults change nothing."""

    temperature: float = 1.0
    top_p: float = 1.0  # nucleus: smallest set of tokens with at least this probability
    top_k: int = 0  # 0: all
    min_p: float = 0.0  # least probability, as a share of the most probable token's
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    top_logprobs: int | None = None  # None: no logprobs; k: the sampled token's and those of the k most probable

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0, 100)
        check_number("top_p", self.top_p, 0, 1)
        check_number("top_k", self.top_k, 0, 1 << 31, whole=True)
        check_number("min_p", self.min_p, 0, 1)
        check_number("presence_penalty", self.presence_penalty, -2, 2)
        check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            check_number("seed", self.seed, 0, (1 << 64) - 1, whole=True)
        if self.top_logprobs is not None:
            check_number("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS, whole=True)
        if not isinstance(self.logit_bias, Mapping):
            got = type(self.logit_bias).__name__
            raise InvalidRequest(f"logit_bias must be a mapping of token ids to numbers, got {got}", param="logit_bias")
        for token, bias in self.logit_bias.items():
            check_number("a token id of logit_bias", token, 0, whole=True, param="logit_bias")
            check_number(f"logit_bias[{token}]", bias, -100, 100, param="logit_bias")


@dataclass(frozen=True, eq=False)
class Origin:
    """Where the KV of some tokens is stored as it was first computed: [start, stop) of this sequence under this salt."""

    salt: bytes
    tokens: Tokens
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Cut:
    """A hole in a held sequence: its tokens [start, stop) go, what follows slides down. Beyond its end is no harm.

    What follows begins with the tokens of `anew`, in this order, which are placed as they were first computed where the
    store still has them, so that their keys are rotated once and not once more.
    """

    salt: bytes  # under which the sequence is held before the cut; afterwards under its request's
    start: int
    stop: int
    anew: tuple[Origin, ...] = ()


@dataclass(frozen=True)
class Hold:
    """Whose sequence it is. It stays in the engine while it can, in the place of the one that was held before."""

    name: str  # no two holders have the same
    passing: bool = False  # about to change, so not worth writing to the store yet
    cut: Cut | None = None  # to be made in the sequence held now, before reuse is looked for


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One answer to generate."""

    prompt: Prompt
    max_tokens: int | None = None  # None: until the end of turn, or the context's end
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()  # generation ends before the first of these strings
    json_schema: Mapping[str, object] | None = None  # the answer must be JSON of this schema; {} for any object
    ignore_eos: bool = False  # go on after the end of turn (for measurements)
    use_kv_cache: bool = (
        True  # False: read the whole sequence again for every token (to show what the KV cache is worth)
    )
    use_prefix_cache: bool = True  # False: neither read nor write KV of other requests
    priority: int = 0  # lower goes earlier, where the policy asks for it
    warm: bool = False  # read the prompt when nobody else has work, store its KV, and answer nothing
    feed: bool = False  # read the prompt before those of others, and answer nothing
    hold: Hold | None = None  # keep the sequence for whoever goes on with it; such requests come before others
    blend: Blend | None = None  # how the prompt's chunks are placed; None: exact reuse only, chunks or not
    pin_seconds: float | None = None  # keep the KV of prompt and answer for so long
    arrived: float | None = None  # time.perf_counter() at which the request came in; default: when it is submitted
    tokenize_ms: float = 0.0  # spent on the prompt before submission, part of TTFT

    @property
    def answers(self) -> bool:
        """Whether anything is sampled."""
        return not (self.warm or self.feed)

    @property
    def reuses(self) -> bool:
        """Whether KV of other requests is used, and this one's kept for others."""
        return self.use_kv_cache and self.use_prefix_cache

    def __post_init__(self) -> None:
        if len(self.prompt) == 0:
            raise InvalidRequest("the prompt is empty: at least one token is needed", param="prompt")
        if self.max_tokens is not None:
            check_number("max_tokens", self.max_tokens, 1, whole=True)
        check_number("priority", self.priority, whole=True)
        if self.pin_seconds is not None:
            check_number("pin_seconds", self.pin_seconds, 0)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InvalidRequest("a stop string must not be empty, nor anything but text", param="stop")
        if self.blend is not None and (not self.answers or self.pin_seconds is not None):
            raise InvalidRequest(
                "what is blended is not kept, so it can't be pinned or warmed, nor fed; pin or warm its chunks instead",
                param="rekindle.blend",
            )
        if not self.reuses and (not self.answers or self.hold is not None or self.pin_seconds is not None):
            raise InvalidRequest(
                "KV that is not kept cannot be pinned or warmed, nor held or fed", param="use_prefix_cache"
            )


@dataclass(frozen=True)
class TokenInfo:
    """One generated token."""

    id: int
    piece: bytes  # its bytes; a character may spread over several tokens
    logprob: float | None = None  # natural log of its probability before temperature; None unless asked for
    top: tuple[tuple[int, bytes, float], ...] = ()  # (id, bytes, logprob) of the most probable tokens, best first


@dataclass(frozen=True)
class Piece:
    """Some more of the answer. Text is whole characters, held back while it may belong to a stop string."""

    text: str
    tokens: tuple[TokenInfo, ...]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts of one request; cached + computed = prompt."""

    prompt_tokens: int
    cached_tokens: int  # prompt tokens whose KV was reused
    completion_tokens: int
    blended_tokens: int = 0  # of the cached ones, those of chunks that were placed: reused, but not exactly

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens whose KV was computed for this request."""
        return self.prompt_tokens - self.cached_tokens


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Where the time went, in milliseconds. TTFT runs from arrival to the first token, tokenising and queueing included."""

    tokenize_ms: float
    queue_ms: float
    lookup_ms: float  # planning: residents and store
    restore_ms: float  # putting stored KV back
    prefill_ms: float  # from the end of restoring to the first token
    ttft_ms: float
    decode_ms: float  # from the first token to the last
    total_ms: float
    prefill_calls: int  # model calls before the first token that computed for this request

    @property
    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class Done:
    """The answer is complete."""

    reason: FinishReason
    usage: Usage
    timings: Timings
    plan: Plan
    text: str  # the whole answer
    tokens: tuple[int, ...]  # its ids, the end-of-turn token not included
    kept: int = 0  # tokens of prompt and answer after which a later request can go on at once
    unread: int = 0  # prompt tokens that were not computed after all, for it was cancelled before
    pin: Pin | None = None  # what keeps its KV, if that was asked for


@dataclass(frozen=True)
class Failed:
    """The request was refused or could not be finished."""

    error: RekindleError


Event = Piece | Done | Failed
Sink = Callable[[Event], None]  # called by the worker thread; must not block
