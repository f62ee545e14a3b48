"""KV of prompts, kept for models that the caller holds: in memory and, if a folder is named, on disk.

The folder has the format of the server's store, so its commands (`rekindle cache ls`, `verify`, `prune`) read it too.
What is written is on disk when the call returns; there is no thread. KV is shared with whoever computes with the same
weights in the same type: other processes that hold the model, and a server's torch engine that has loaded it from files
(`rekindle serve --model FOLDER --engine torch --store kv`), in both directions.

An engine is made of a model when it is first met, and again when its parameters were changed since, which torch counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from rekindle.engine.protocol import Payload, SequenceId
from rekindle.errors import counted
from rekindle.kv.disk import DiskTier
from rekindle.kv.store import Fetched, Match, Store
from rekindle.reuse.plan import Place, Plan, Stored, make_plan
from rekindle.reuse.prompt import Prompt
from rekindle.tokens import Tokens, as_tokens
from rekindle.torch.attach import AttachedEngine, attach
from rekindle.torch.past import cache_of, payload_of

_NO_DIGEST = bytes(16)  # of an engine whose KV never leaves it


@dataclass(frozen=True, eq=False)
class Past:
    """What was kept of some tokens, for transformers."""

    past_key_values: Any  # DynamicCache of the first `length` tokens
    length: int  # always less than the tokens asked for, because transformers has to compute one


@dataclass(frozen=True, eq=False)
class Found:
    """What was found of a prompt, and what is to be done about the rest."""

    match: Match
    plan: Plan


class Opened:
    """One model's engine and store."""

    def __init__(self, engine: AttachedEngine, store: Store | None, state: list[tuple[int, int]]) -> None:
        self.engine = engine
        self._store = store
        self.state = state  # of the parameters, when the engine was made

    def look_up(self, tokens: Tokens, salt: bytes) -> Found:
        """Search memory and disk, and split the prompt into what is placed and what is computed."""
        store, prompt = self._store, Prompt(tokens, salt=salt)
        if store is None:
            return Found(Match((), 0, None), make_plan(prompt, [], Stored()))
        fetched: Fetched = store.fetch(tokens, salt)
        match = store.match(tokens, salt)
        words = ", ".join(f"{counted(count, 'token')} fetched from {tier}" for tier, count in fetched.tokens.items())
        stored = Stored(match.length, match.logits is not None, store.block_tokens, words)
        store.used(match)
        return Found(match, make_plan(prompt, [], stored))

    def payloads(self, found: Found, most: int | None = None) -> list[Payload]:
        """Of the tokens that the plan places, or so many of them at most, in order."""
        stop = next((step.stop for step in found.plan.steps if isinstance(step, Place)), 0)
        stop = stop if most is None else min(stop, most)
        blocks = [block for block in found.match.blocks if block.position < stop]
        whole = (Payload(b.tokens, b.position, b.payload, self.engine.spec.fingerprint) for b in blocks)
        return [self._first(each, stop - each.position) for each in whole]

    def _first(self, payload: Payload, count: int) -> Payload:
        """The first `count` tokens of a payload."""
        if count >= len(payload):
            return payload
        layout = self.engine.layout
        layers = layout.split(layout.wrap(payload.data, len(payload)), len(payload))
        data = layout.join([(key[:count], value[:count]) for key, value in layers])
        return Payload(payload.tokens[:count], payload.position, data, payload.fingerprint)

    def keep(self, seq: SequenceId, marks: dict[int, npt.NDArray[np.float32]], salt: bytes) -> None:
        """Store a sequence: whole blocks, and at each mark (a length) the tail with the logits after it."""
        store, engine = self._store, self.engine
        if store is None:
            return
        size, tokens = store.block_tokens, engine.tokens(seq)
        payloads = {start: engine.export(seq, start, start + size).data for start in store.missing(tokens, salt)}
        tails = [(end, engine.export(seq, end - end % size, end).data, logits) for end, logits in sorted(marks.items())]
        store.put(tokens, payloads, salt=salt, tails=tails)
        store.behind.drain()

    def close(self) -> None:
        if self._store is not None:
            self._store.behind.drain()
            self._store.close()
        self.engine.shutdown()


class Cache:
    """See the module's docstring. A context manager; for one thread at a time."""

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        max_size_gb: float = 1.0,
        disk_size_gb: float = 20.0,
        context: int | None = None,
        block_tokens: int = 64,
    ) -> None:
        """`max_size_gb` of memory for each model; `disk_size_gb` for the folder. `context` is that of `attach`."""
        self._folder = None if folder is None else Path(folder).expanduser()
        self._max_bytes = int(max_size_gb * (1 << 30))
        self._disk_bytes = int(disk_size_gb * (1 << 30))
        self._context = context
        self._block_tokens = block_tokens
        self._opened: dict[int, Opened] = {}

    def engine(self, model: Any, tokenizer: Any) -> AttachedEngine:
        """The engine that is used for this model. Raises what `attach` does."""
        return self.open(model, tokenizer).engine

    def open(self, model: Any, tokenizer: Any) -> Opened:
        """The model's engine and store, made at the first call. Raises what `attach` does."""
        known, state = self._opened.get(id(model)), _state(model)
        if known is not None and known.state == state:
            return known
        self.forget(model)
        engine = attach(model, tokenizer, context=self._context)
        self._opened[id(model)] = opened = Opened(engine, self._open_store(engine), state)
        return opened

    def forget(self, model: Any) -> None:
        """Free what is kept in memory for a model, its engine too; a folder keeps what it has."""
        known = self._opened.pop(id(model), None)
        if known is not None:
            known.close()

    def past(self, model: Any, tokenizer: Any, tokens: Sequence[int] | Tokens, *, salt: bytes = b"") -> Past:
        """What is kept of the beginning of these tokens, as `past_key_values` for the model's own `generate`."""
        opened, ids = self.open(model, tokenizer), as_tokens(tokens)
        payloads = opened.payloads(opened.look_up(ids, salt), len(ids) - 1) if len(ids) else []
        return Past(cache_of(opened.engine, payloads), sum(map(len, payloads)))

    def keep(
        self, model: Any, tokenizer: Any, tokens: Sequence[int] | Tokens, past_key_values: Any, *, salt: bytes = b""
    ) -> None:
        """Keep what the model itself has computed: `past_key_values` of just these tokens, or of all but the last.

        Only whole blocks are kept, for the logits after the last token are not known here. Raises InvalidRequest if the
        cache is not one of these tokens; see `from_dynamic_cache`.
        """
        opened, ids = self.open(model, tokenizer), as_tokens(tokens)
        length = past_key_values.get_seq_length()
        ids = ids[:-1] if length == len(ids) - 1 else ids
        payload = payload_of(opened.engine, past_key_values, ids)
        seq = opened.engine.open()
        try:
            opened.engine.place(seq, payload, 0)
            opened.keep(seq, {}, salt)
        finally:
            opened.engine.close(seq)

    def close(self) -> None:
        for opened in self._opened.values():
            opened.close()
        self._opened.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_store(self, engine: AttachedEngine) -> Store:
        spec = engine.spec
        label = {"name": spec.name, "kv_type": spec.kv_type, "block_tokens": self._block_tokens}
        tiers = []
        if self._folder is not None:
            disk = DiskTier(self._folder, fingerprint=spec.fingerprint, max_bytes=self._disk_bytes, label=label)
            tiers.append(disk)
        return Store(
            spec.fingerprint,
            max_bytes=self._max_bytes,
            block_tokens=self._block_tokens,
            tiers=tiers,
            bytes_per_token=spec.kv_bytes_per_token,
        )


def open_alone(model: Any, tokenizer: Any, context: int | None = None) -> Opened:
    """An engine without a store."""
    return Opened(attach(model, tokenizer, context=context, weights=_NO_DIGEST), None, [])


def _state(model: Any) -> list[tuple[int, int]]:
    """Where the parameters lie and how often each was written to; torch does not count for inference tensors."""
    return [(each.data_ptr(), 0 if each.is_inference() else each._version) for each in model.parameters()]
