"""From what is known of a prompt to what will be done about it.

A `Plan` is an ordered list of steps that covers the prompt's tokens from 0 to its end without gap or overlap:

    0        fork            place                 compute      length
    |--------------------|------------------|----------------------|
      a sequence in the     blocks from the    what nobody has
      engine shares these   store              read before

At least one token has to be computed to know what comes next, unless the logits after the prompt's last token are at
hand too: then the plan computes nothing, and the first token costs no model call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rekindle.reuse.prompt import Prompt
from rekindle.tokens import Tokens, common_length


@dataclass(frozen=True)
class Fork:
    """Share the first tokens of a sequence that is in the engine."""

    seq: int
    start: int  # always 0
    stop: int
    reason: str
    exact: int | None = None  # of its tokens, the first so many have the KV that reading gives; None: all of them
    blended: int = 0  # of the others, those that were placed


@dataclass(frozen=True)
class Place:
    """Put stored KV at the sequence's end: back where it was computed, or a part of a chunk wherever it stands now."""

    start: int
    stop: int
    reason: str
    source: int | None = None  # of a chunk's part: its position in the prompt [head, chunk]
    chunk: int | None = None  # index among the prompt's chunks
    tier: str = "memory"  # the slowest that it came from


@dataclass(frozen=True)
class Compute:
    """Read these tokens (prefill)."""

    start: int
    stop: int
    reason: str


Step = Fork | Place | Compute


@dataclass(frozen=True, eq=False)
class Resident:
    """A sequence in the engine, as the plan sees it."""

    seq: int
    tokens: Tokens
    logits_at: frozenset[int] = frozenset()  # lengths after which the logits are kept
    reach: int = 0  # the least length at which it can be forked


@dataclass(frozen=True)
class Stored:
    """What the store holds of a prompt: KV of its first `length` tokens, in blocks that begin at multiples of a size."""

    length: int = 0
    has_logits: bool = False  # the logits after the prompt's last token too
    block_tokens: int = 64
    fetched: str = ""  # what was brought from slower tiers for this prompt, in words
    tier: str = "memory"  # the slowest of them, if any
    refused: str | None = None  # why a slower tier's blocks are computed instead of fetched


@dataclass(frozen=True)
class ChunkPlan:
    """What becomes of one chunk. What is none of exact, placed and recomputed is computed because it is not at hand."""

    index: int
    start: int
    stop: int
    exact: int  # tokens within the prompt's exactly reused beginning
    placed: int
    recomputed: int  # could have been placed, but are computed anew
    moved: int | None  # tokens, to the right; None if nothing of it is placed
    why: str | None  # why those are recomputed


@dataclass(frozen=True)
class Looked:
    """What was computed only to choose what to compute."""

    reason: str  # why what was chosen was
    tokens: int
    layers: int  # that each of them went through
    num_layers: int  # of the model

    @property
    def token_layers(self) -> int:
        return self.tokens * self.layers


@dataclass(frozen=True)
class Plan:
    """What is done for one prompt, and why. Reused <= total; nothing is both reused and computed."""

    steps: tuple[Step, ...]
    total: int  # tokens in the prompt
    miss: str | None  # why reuse ended where it did; None if nothing was missing
    chunks: tuple[ChunkPlan, ...] = ()
    looked: Looked | None = None

    def __post_init__(self) -> None:
        position = 0
        for step in self.steps:
            assert step.start == position < step.stop, self.steps
            position = step.stop
        assert position == self.total

    @property
    def computed(self) -> int:
        return sum(step.stop - step.start for step in self.steps if isinstance(step, Compute))

    @property
    def budget(self) -> float:
        """Token-layers computed, to choose and to read, of those of the prompt."""
        looked = 0.0 if self.looked is None else self.looked.token_layers / self.looked.num_layers
        return (self.computed + looked) / self.total if self.total else 0.0

    @property
    def reused(self) -> int:
        return self.total - self.computed

    @property
    def placed(self) -> int:
        """Of those reused, tokens put back from the store."""
        return sum(step.stop - step.start for step in self.steps if isinstance(step, Place))

    @property
    def tier(self) -> str | None:
        """The slowest tier that anything was put back from; None if nothing was."""
        return next((step.tier for step in reversed(self.steps) if isinstance(step, Place)), None)

    @property
    def ready(self) -> int:
        """Tokens that are in the engine before anything is computed."""
        return next((step.start for step in self.steps if isinstance(step, Compute)), self.total)

    @property
    def exact(self) -> int:
        """Tokens whose KV is what a prefill of the prompt gives: all before the first chunk that is placed."""
        for step in self.steps:
            if isinstance(step, Place) and step.chunk is not None:
                return step.start
            if isinstance(step, Fork) and step.exact is not None:
                return step.exact
        return self.total

    @property
    def begin(self) -> int:
        """Tokens that are reused as an exact beginning, before the first that is computed or placed as part of a chunk."""
        return min(self.ready, self.exact)

    @property
    def blended(self) -> int:
        """Tokens of chunks that are placed: reused, but not exactly."""
        places = (step for step in self.steps if isinstance(step, Place) and step.chunk is not None)
        shared = sum(step.blended for step in self.steps if isinstance(step, Fork))
        return shared + sum(step.stop - step.start for step in places)

    def as_dict(self) -> dict[str, Any]:
        """For the wire: steps with their kind, span and reason; and chunks, if there are any."""
        kinds: dict[type, Literal["fork", "place", "compute"]] = {Fork: "fork", Place: "place", Compute: "compute"}
        steps: list[dict[str, Any]] = [
            {"kind": kinds[type(step)], "start": step.start, "stop": step.stop, "reason": step.reason}
            | ({"chunk": step.chunk, "from": step.source} if isinstance(step, Place) and step.chunk is not None else {})
            for step in self.steps
        ]
        chunks: dict[str, Any] = {}
        if self.chunks:
            chunks = {"chunks": [asdict(chunk) for chunk in self.chunks], "budget": round(self.budget, 4)}
        if self.looked is not None:
            chunks["looked"] = asdict(self.looked) | {"token_layers": self.looked.token_layers}
        return chunks | {
            "steps": steps,
            "total": self.total,
            "reused": self.reused,
            "computed": self.computed,
            "miss": self.miss,
        }


def make_plan(prompt: Prompt, residents: Sequence[Resident], stored: Stored) -> Plan:
    """Reuse the most tokens: the longest shared beginning in the engine first, then what the store has beyond it."""
    total = len(prompt)
    best, shared = _longest(prompt, residents)
    in_engine = best is not None and shared == total and total in best.logits_at
    in_store = stored.length == total and stored.has_logits
    usable = total if in_engine or in_store else total - 1  # the last token is computed for its logits
    forked = 0 if best is None else min(shared, usable)
    placed = min(stored.length, usable)
    if placed > forked and forked % stored.block_tokens:
        forked -= forked % stored.block_tokens  # blocks can only follow at a block's beginning
    if best is not None and forked < best.reach:
        best, shared, forked = None, 0, 0
    steps: list[Step] = []
    if best is not None and forked:
        steps.append(Fork(best.seq, 0, forked, f"sequence {best.seq} is resident and begins with these tokens"))
    if placed > forked:
        reason = "stored blocks with these tokens after exactly the tokens before them"
        words = f"{reason}; {stored.fetched}" if stored.fetched else reason
        steps.append(Place(forked, placed, words, tier=stored.tier))
    reused = max(forked, placed)
    if reused < total:
        steps.append(Compute(reused, total, _why(reused, total, usable, shared, stored)))
    return Plan(tuple(steps), total, None if reused == total else _miss(reused, best, shared, stored))


def _longest(prompt: Prompt, residents: Sequence[Resident]) -> tuple[Resident | None, int]:
    """The resident that shares the longest beginning; among equals one that also keeps the prompt's last logits."""
    best, best_rank = None, (0, False)
    for resident in residents:
        shared = common_length(prompt.tokens, resident.tokens)
        if shared < resident.reach:
            continue
        rank = (shared, shared == len(prompt) and shared in resident.logits_at)
        if rank > best_rank:
            best, best_rank = resident, rank
    return best, best_rank[0]


def _why(reused: int, total: int, usable: int, shared: int, stored: Stored) -> str:
    if reused == usable == total - 1 and max(shared, stored.length) >= total:
        return "all KV is at hand, the last token is computed again for its logits"
    if stored.refused is not None:
        return stored.refused
    return "not read before" if reused == 0 else "not read before after this beginning"


def _miss(reused: int, best: Resident | None, shared: int, stored: Stored) -> str:
    if best is None and stored.length == 0:
        return "no resident sequence and no stored block begins like this prompt"
    if max(shared, stored.length) > reused:
        return "the logits after the prompt's last token are not kept"
    if best is not None and shared == reused and shared < len(best.tokens):
        return f"token {reused} differs from the nearest sequence's"
    return f"nothing that begins like this prompt goes on after token {reused}"
