"""The store: KV by prefix key, of every prompt that was read, within a budget.

A prompt is kept as a chain of whole blocks and a tail with the logits after its last token:

    | block 0 | block 1 | … | block n-1 | tail + logits |
      64        64            64          0 to 63 tokens

`match` finds the longest beginning of a prompt that is in memory. Whole blocks must be equal; the tail of another prompt
serves with the tokens it shares. After a key match the tokens themselves are compared, so a collision can't serve other KV.

Slower tiers stand behind the memory, in the order of their speed. Writes reach memory at once and them later (`Behind`);
`fetch` brings what they have of a prompt's beginning into memory (`Fetching`), and is called where waiting does no harm.

A look-up is no use: `used` tells of one, once per request, whoever served it. The memory's policy and slower tiers judge
blocks by their uses.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from rekindle.errors import InvalidRequest, TierUnavailable
from rekindle.kv.answers import Fetched, Match, StoreStats
from rekindle.kv.behind import Behind
from rekindle.kv.block import Block
from rekindle.kv.fetching import Fetching
from rekindle.kv.keys import TOKEN_BYTES, Key, chain_keys, root_key, tail_key, token_bytes
from rekindle.kv.memory import MemoryTier
from rekindle.kv.pins import ExpectedSizes, Held, Pin, Pins, check_seconds, pin_id
from rekindle.kv.policies import DEFAULT
from rekindle.kv.speed import PrefillCost, Speed
from rekindle.kv.tier import Place, Tier, place_of, places_along
from rekindle.tokens import Tokens, common_length

__all__ = ["Fetched", "Match", "Store", "StoreStats"]

_TELL_SECONDS = 60.0  # a chain's use is told to slower tiers at most so often
_MAX_TOLD = 10_000  # chains of which that is remembered
_MAX_ROOTS = 1_000  # salts whose root is remembered
_TOKEN = np.dtype("<i4")
CLEAR_SECONDS = 10.0  # that clearing waits for a block that is being written


class Store:
    """Thread-safe. `put` and `match` never wait for a slower tier."""

    def __init__(
        self,
        fingerprint: bytes,
        *,
        max_bytes: int,
        block_tokens: int = 64,
        tiers: Sequence[Tier] = (),
        max_behind_bytes: int = 256 << 20,
        policy: str = DEFAULT,
        quota: float = 1.0,
        max_pinned_share: float = 0.5,
        bytes_per_token: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`policy` names the memory's victims; `quota` is the part of the memory that one salt may have.

        `max_pinned_share` of the memory may be pinned; `bytes_per_token` is what payloads are expected to have. Raises
        InvalidRequest for an unknown policy.
        """
        self.block_tokens = block_tokens
        self.tiers = tuple(tiers)  # behind the memory, fastest first
        self.behind = Behind(self.tiers, max_bytes=max_behind_bytes)
        self._fetching = Fetching(self.tiers, block_tokens=block_tokens, is_in_memory=self._is_in_memory, clock=clock)
        self.speeds = self._fetching.speeds
        self._clock = clock
        self._fingerprint = fingerprint
        self._wall_clock = wall_clock
        self.prefill_cost = PrefillCost()
        self._sizes = ExpectedSizes(bytes_per_token)
        self._pins = Pins(int(max_bytes * max_pinned_share), max_owner_bytes=int(max_bytes * max_pinned_share * quota))
        self._memory = MemoryTier(
            max_bytes, block_tokens=block_tokens, policy=policy, quota=quota, pins=self._pins, cost=self._cost
        )
        self._roots: dict[bytes, Key] = {}
        self._told: dict[Key, float] = {}  # when slower tiers were told of a use of the chain that ends so
        self._lock = threading.Lock()

    def match(self, tokens: Tokens, salt: bytes = b"") -> Match:
        """What is stored of this prompt's beginning. It may go at any time; the payloads that were found stay whole."""
        root, written = self._root(salt), token_bytes(tokens)
        with self._lock:
            keys, blocks = self._memory.longest(root, written)
            length = len(blocks) * self.block_tokens
            tail, shared = self._best_tail(keys[-1] if keys else root, length, tokens[length:])
            whole = tail is not None and shared == len(tail.tokens) == len(tokens) - length
            if tail is not None and (shared or whole):
                keys.append(tail.key)
            if tail is not None and shared:
                blocks.append(tail)
            logits = tail.logits if tail is not None and whole else None
            return Match(tuple(blocks), length + shared, logits, root, tuple(keys))

    def used(self, match: Match) -> None:
        """A request begins with what was found, or with the same KV from elsewhere. To be told once per request."""
        if match.keys:
            with self._lock:
                self._memory.hit(match.root, match.keys)
                if self.tiers and match.blocks:
                    self._tell_use(match.blocks)

    def _root(self, salt: bytes) -> Key:
        root = self._roots.get(salt)
        if root is None:
            if len(self._roots) >= _MAX_ROOTS:
                self._roots.clear()
            root = self._roots[salt] = root_key(self._fingerprint, salt)
        return root

    def _cost(self, block: Block) -> float:
        """Of computing it; a tail's logits spare one token more."""
        return self.prefill_cost.of(block.position, len(block.tokens) + (block.logits is not None))

    def _tell_use(self, blocks: Sequence[Block]) -> None:
        """Slower tiers can't see what memory serves, and would forget just what is used most."""
        now, end = self._clock(), blocks[-1].key
        if now - self._told.get(end, -math.inf) >= _TELL_SECONDS:
            if len(self._told) >= _MAX_TOLD:
                self._told.clear()
            self._told[end] = now
            self.behind.touch([place_of(block) for block in blocks])

    def _best_tail(self, parent: Key, start: int, rest: Tokens) -> tuple[Block | None, int]:
        """The tail after `parent` that shares most with `rest`; among equals the one that is just that."""
        exact = self._memory.get(tail_key(parent, rest)) if len(rest) < self.block_tokens else None
        if exact is not None and exact.holds(parent, start, rest):
            return exact, len(rest)
        best, best_shared = None, 0
        for tail in self._memory.tails(parent):
            shared = common_length(tail.tokens, rest) if tail.position == start else 0
            if shared > best_shared:
                best, best_shared = tail, shared
        return best, best_shared

    def missing(self, tokens: Tokens, salt: bytes = b"") -> list[int]:
        """Starts of the whole blocks of this sequence that are not stored."""
        size = self.block_tokens
        with self._lock:
            keys, _ = self._memory.longest(self._root(salt), token_bytes(tokens))
        # no block is stored without its predecessors
        return list(range(len(keys) * size, len(tokens) - size + 1, size))

    def put(
        self,
        tokens: Tokens,
        payloads: dict[int, memoryview],
        *,
        salt: bytes = b"",
        tails: Sequence[tuple[int, memoryview, npt.NDArray[np.float32]]] = (),
    ) -> None:
        """Store whole blocks, given as start -> payload, and tails, given as (length, payload, logits), of a sequence.

        A tail of `length` holds the tokens from the last block boundary at or before `length`. A block without all its
        predecessors is worth nothing, so the first one that is neither given nor stored ends the chain: what follows is
        left out.
        """
        root, written, size = self._root(salt), token_bytes(tokens), self.block_tokens
        with self._lock:
            keys, known = self._memory.longest(root, written)
            new = list(_new_blocks(keys[-1] if keys else root, len(keys) * size, written, payloads, size))
            keys += [block.key for block in new]
            for length, payload, logits in tails:
                depth = length // size
                if depth <= len(keys):
                    parent, part = keys[depth - 1] if depth else root, tokens[depth * size : length].copy()
                    new.append(Block(tail_key(parent, part), parent, part, depth * size, payload, logits))
            self._put(root, known, new)
        if self.tiers and (known or new):
            self.behind.offer([*known, *new])
            self._keep_behind([place_of(block) for block in (*known, *new)])

    def _put(self, root: Key, known: Sequence[Block], new: Sequence[Block], *, fetched: bool = False) -> None:
        """Into memory, under the lock."""
        now = self._wall_clock()
        self._pins.expire(now)
        if new:
            self._sizes.see(new[0])
            self._sizes.see(new[-1])
        self._memory.put(root, known, new, now=now, fetched=fetched)

    def fetch(self, tokens: Tokens, salt: bytes = b"", *, compute: Speed | None = None) -> Fetched:
        """Bring what slower tiers have of this prompt's beginning into memory, in order, as far as it goes.

        A tier from which a token takes longer to fetch than to compute is left alone, if both are known; now and then
        it is tried again. Faults of tiers are misses.
        """
        root, written = self._root(salt), token_bytes(tokens)
        places = places_along(root, written, self.block_tokens)
        brought: dict[str, int] = {}
        refused: str | None = None
        for tier in self.tiers:
            known = self._num_in_memory(root, written)
            reason = None if compute is None else self.speeds[tier.name].slower_than(compute, tier.name)
            if reason is not None:
                if refused is None and self._fetching.has_more(tier, places[known:]):
                    refused = reason
                continue
            blocks = self._fetching.read(tier, tokens, places, known, root)
            self._take_in(root, written, known, blocks)
            if blocks:
                brought[tier.name] = sum(len(block.tokens) for block in blocks)
                self._promote(tier, blocks)
        return Fetched(brought, refused)

    def _take_in(self, root: Key, written: bytes, known: int, blocks: Sequence[Block]) -> None:
        """Put fetched blocks into memory where `known` blocks end; meanwhile some may have come, or gone."""
        with self._lock:  # as one chain, so that its head is what stays if not all of it fits
            _, here = self._memory.longest(root, written)
            num_whole = len([block for block in blocks if block.logits is None])
            came = min(len(here) - known, num_whole)
            if came >= 0:
                self._put(root, here[: known + came], blocks[came:], fetched=True)

    def _promote(self, source: Tier, blocks: Sequence[Block]) -> None:
        """Keep what a slow tier had in the faster ones too."""
        faster = self.tiers[: self.tiers.index(source)]
        if faster:
            self.behind.offer(blocks, faster)
            self._keep_behind([place_of(block) for block in blocks])

    def _is_in_memory(self, key: Key) -> bool:
        with self._lock:
            return key in self._memory

    def _num_in_memory(self, root: Key, written: bytes) -> int:
        with self._lock:
            return len(self._memory.longest(root, written)[0])

    def probe(self) -> None:
        """Ask every slower tier once; what is wrong with one is told in the log, and by its state. May wait for it."""
        self._fetching.probe()
        self.behind.probe()

    def prepare(self) -> None:
        """Get ready for the next `fetch`, while nobody waits."""
        for tier in self.tiers:
            tier.prepare()

    # Pins.

    def pin(self, tokens: Tokens, *, salt: bytes = b"", ttl_seconds: float, name: str | None = None) -> Pin:
        """Keep a prompt's blocks and the tail that ends it for so long, whether they are there yet or come later.

        On disk they stay through a restart; in the network tier they live at least as long. The pin itself, which can be
        listed and ended, lives in this store only. Raises InvalidRequest for a time that is none and for too many bytes.
        """
        check_seconds(ttl_seconds)
        if not len(tokens):
            raise InvalidRequest("there is nothing to pin: at least one token is needed", param="prompt")
        root = self._root(salt)
        places = places_along(root, token_bytes(tokens), self.block_tokens)
        parent, rest = places[-1].key if places else root, tokens[len(places) * self.block_tokens :]
        places.append(Place(key=tail_key(parent, rest), parent=parent, tail=True))
        with self._lock:
            now = self._wall_clock()
            self._pins.expire(now)
            held = Held(
                id=pin_id(places[-1].key),
                name=name,
                owner=root,
                places=tuple(places),
                num_tokens=len(tokens),
                expires_at=now + ttl_seconds,
            )
            blocks = (self._memory.get(place.key) for place in places)
            stored = {block.key: block.num_bytes for block in blocks if block is not None}
            lengths = [self.block_tokens] * (len(places) - 1) + [len(rest)]
            sizes = {
                place.key: stored.get(place.key, self._sizes.expected(length, tail=place.tail))
                for place, length in zip(places, lengths, strict=True)
            }
            held = self._pins.add(held, sizes, stored)
            pin = self._pins.view(held, now)
        self.behind.keep(places, held.expires_at)
        return pin

    def unpin(self, pin_id: str) -> bool:
        """End a pin; False if there is none of this id."""
        with self._lock:
            self._pins.expire(self._wall_clock())
            held = self._pins.remove(pin_id)
        if held is not None:
            self.behind.release(held.places)
            self._keep_behind(held.places)
        return held is not None

    def pins(self) -> list[Pin]:
        """Those that have not ended; which end first, first."""
        with self._lock:
            now = self._wall_clock()
            self._pins.expire(now)
            return [self._pins.view(held, now) for held in self._pins.all()]

    def _keep_behind(self, places: Sequence[Place]) -> None:
        """Have slower tiers keep, of these, what pins name."""
        if self.tiers:
            with self._lock:
                ends = self._pins.ends_of(places)
            for end, named in ends.items():
                self.behind.keep(named, end)

    def clear_memory(self) -> None:
        """Forget what is in memory; slower tiers keep what they have."""
        with self._lock:
            self._memory.clear()

    def discard(self, match: Match, index: int = 0) -> None:
        """Forget what was found from this block on, because it can't be used, and in memory what follows it.

        Slower tiers lose it, too, a little later.
        """
        with self._lock:
            self._memory.remove(match.root, match.keys[: index + 1])
        self.behind.remove([place_of(block) for block in match.blocks[index:]])

    def clear(self, *, every_model: bool = False) -> None:
        """Forget everything of this model, or of every model, in every tier. May wait for a slow one.

        Raises TierUnavailable, with all others cleared, if there is one that can't be: what it has may be found again.
        """
        self.clear_memory()
        self.behind.clear()
        self.behind.flush(CLEAR_SECONDS)
        failed: list[str] = []
        for tier in self.tiers:
            try:
                if every_model:
                    tier.clear()
                else:
                    tier.clear_model()
            except TierUnavailable as error:
                failed.append(f"the {tier.name} tier keeps what it has: {error}")
        if failed:
            raise TierUnavailable("not everything is cleared; " + "; ".join(failed))

    def close(self, timeout_seconds: float = 10.0) -> bool:
        """Write what is queued and close the slower tiers; False if some of it was given up."""
        done = self.behind.close(timeout_seconds)
        for tier in self.tiers:
            tier.close()
        return done

    def stats(self) -> StoreStats:
        with self._lock:
            memory = self._memory
            self._pins.expire(self._wall_clock())
            pinned = (len(self._pins), self._pins.num_bytes, self._pins.max_bytes)
            kept = (len(memory), memory.held_bytes, memory.max_bytes, memory.evictions)
            words = (memory.policy, memory.state)
        return StoreStats(*kept, tuple(tier.stats() for tier in self.tiers), self.behind.dropped, *pinned, *words)

    def check_integrity(self) -> None:
        with self._lock:
            self._memory.check_integrity()
        for tier in self.tiers:
            tier.check_integrity()


def _new_blocks(
    parent: Key, start: int, written: bytes, payloads: Mapping[int, memoryview], size: int
) -> Iterator[Block]:
    """Of these payloads those that go on where stored blocks end, with `parent` the last. Their tokens share one copy."""
    stop = start
    while stop in payloads and (stop + size) * TOKEN_BYTES <= len(written):
        stop += size
    part = written[start * TOKEN_BYTES : stop * TOKEN_BYTES]
    for position, key in zip(range(start, stop, size), chain_keys(parent, part, size), strict=True):
        tokens = np.frombuffer(part, _TOKEN, size, (position - start) * TOKEN_BYTES)
        yield Block(key, parent, tokens, position, payloads[position])
        parent = key
