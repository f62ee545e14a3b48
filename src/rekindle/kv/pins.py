"""Pins: prompts whose blocks stay, until a time.

A pin names the keys of one prompt's chain: its whole blocks and the tail that ends it. It doesn't matter whether they are
stored yet: what arrives later under such a key stays too. Pinned bytes are bounded twice. A pin is refused if what it
names would take more than the bound, where a block that isn't stored counts with its expected size. Should blocks turn out
larger than expected, those that come when the bound is reached are kept as if they weren't pinned.

Pins end by themselves. Pinning a prompt again renews its pin: the later end counts, and the newer name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rekindle.errors import InvalidRequest
from rekindle.kv.block import RECORD_BYTES, Block
from rekindle.kv.keys import TOKEN_BYTES, Key, digest
from rekindle.kv.tier import Place

MAX_SECONDS = 10 * 366 * 24 * 3600.0  # that a pin may last
_ID_LENGTH = 16  # hex digits


@dataclass(frozen=True, kw_only=True)
class Pin:
    """A pinned prompt, as it is at this moment."""

    id: str  # hex digits; the same for the same prompt and salt, in every process
    name: str | None
    num_tokens: int  # of the prompt
    num_bytes: int  # of it in memory and kept there
    expires_at: float  # Unix time
    expires_in: float  # seconds


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a pin holds."""

    id: str
    name: str | None
    owner: Key  # root of its chain
    places: tuple[Place, ...]  # head first
    num_tokens: int
    expires_at: float


@dataclass(slots=True)
class _Named:
    """A key that pins name."""

    parent: Key  # its predecessor, or the root
    num_pins: int
    num_bytes: int  # its block's, or what that is expected to have


class Pins:
    """Which keys must stay, and how much that is. Not thread-safe; the store guards it. `key in pins`: it may not go."""

    def __init__(self, max_bytes: int, *, max_owner_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.max_owner_bytes = max_bytes if max_owner_bytes is None else max_owner_bytes
        self.num_bytes = 0  # of stored blocks that are kept
        self._promised = 0  # bytes of all that is named, stored or expected
        self._held: dict[str, Held] = {}
        self._named: dict[Key, _Named] = {}
        self._kept: dict[Key, int] = {}  # stored -> bytes
        self._next_end = math.inf  # no pin ends before

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._kept

    def all(self) -> list[Held]:
        """Those that end first, first."""
        return sorted(self._held.values(), key=lambda held: held.expires_at)

    def view(self, held: Held, now: float) -> Pin:
        """A pin for whoever asks."""
        return Pin(
            id=held.id,
            name=held.name,
            num_tokens=held.num_tokens,
            num_bytes=sum(self._kept.get(place.key, 0) for place in held.places),
            expires_at=held.expires_at,
            expires_in=held.expires_at - now,
        )

    def add(self, held: Held, sizes: Mapping[Key, int], stored: Mapping[Key, int]) -> Held:
        """Pin, or renew. `sizes` is what each key's block has or may have, `stored` of those that are there, head first.

        Raises InvalidRequest if that would be too much; nothing has changed then.
        """
        old = self._held.get(held.id)
        if old is not None:
            held = replace(held, expires_at=max(held.expires_at, old.expires_at), name=held.name or old.name)
            self._held[held.id] = held  # it may end later than `_next_end`, never earlier
            return held
        new = sum(size for key, size in sizes.items() if key not in self._named)
        mine = self._promised_to(held.owner)
        for promised, most in ((self._promised, self.max_bytes), (mine, self.max_owner_bytes)):
            if promised + new > most:
                raise InvalidRequest(
                    f"this pin needs {_size(new)} of memory beside the {_size(promised)} pinned already, and at most "
                    f"{_size(most)} may be pinned: end other pins, or give the store more memory",
                    param="pin",
                )
        self._held[held.id] = held
        self._next_end = min(self._next_end, held.expires_at)
        for place in held.places:
            size = sizes[place.key]
            named = self._named.setdefault(place.key, _Named(place.parent, 0, size))
            if not named.num_pins:
                self._promised += size
            named.num_pins += 1
        for key, size in stored.items():
            self.came(key, size)
        return held

    def _promised_to(self, owner: Key) -> int:
        if self.max_owner_bytes >= self.max_bytes:
            return 0
        places = (place for held in self._held.values() if held.owner == owner for place in held.places)
        return sum(self._named[key].num_bytes for key in {place.key for place in places})

    def remove(self, pin_id: str) -> Held | None:
        held = self._held.pop(pin_id, None)
        if held is not None:
            for place in held.places:
                named = self._named[place.key]
                named.num_pins -= 1
                if not named.num_pins:
                    del self._named[place.key]
                    self._promised -= named.num_bytes
                    self.num_bytes -= self._kept.pop(place.key, 0)
        return held

    def expire(self, now: float) -> None:
        """End those whose time is over."""
        if now >= self._next_end:
            for held in list(self._held.values()):
                if held.expires_at <= now:
                    self.remove(held.id)
            self._next_end = min((held.expires_at for held in self._held.values()), default=math.inf)

    def ends_of(self, places: Sequence[Place]) -> dict[float, list[Place]]:
        """Ends of the pins that name some of these places -> those places, the earliest end first."""
        keys = {place.key for place in places}
        ends: dict[float, list[Place]] = {}
        if self._named.keys() & keys:
            for held in self.all():
                named = [place for place in held.places if place.key in keys]
                if named:
                    ends[held.expires_at] = named
        return ends

    def came(self, key: Key, num_bytes: int) -> None:
        """A block is stored now, or has another size."""
        named = self._named.get(key)
        if named is None:
            return
        self._promised += num_bytes - named.num_bytes
        named.num_bytes = num_bytes
        self.num_bytes -= self._kept.pop(key, 0)
        follows = named.parent in self._kept or named.parent not in self._named  # so what it needs is counted too
        if follows and self.num_bytes + num_bytes <= self.max_bytes:
            self._kept[key] = num_bytes
            self.num_bytes += num_bytes

    def went(self, key: Key) -> None:
        """A block is not stored any more."""
        self.num_bytes -= self._kept.pop(key, 0)

    def check_integrity(self, stored: Mapping[Key, int]) -> None:
        """Recount, given the sizes of all stored blocks. Raises AssertionError."""
        counts: dict[Key, int] = {}
        for held in self._held.values():
            assert len({place.key for place in held.places}) == len(held.places)
            for place in held.places:
                counts[place.key] = counts.get(place.key, 0) + 1
        assert counts == {key: named.num_pins for key, named in self._named.items()}
        assert self._promised == sum(named.num_bytes for named in self._named.values())
        assert self._kept == {key: stored[key] for key in self._kept}, "a pin keeps what is not stored"
        assert self._kept.keys() <= self._named.keys(), "kept without a pin"
        assert self.num_bytes == sum(self._kept.values()) <= self.max_bytes


class ExpectedSizes:
    """What a block takes that was not seen yet, judged by those that were."""

    def __init__(self, bytes_per_token: float) -> None:
        self._per_token = bytes_per_token
        self._logits = 0

    def see(self, block: Block) -> None:
        if len(block.tokens):
            self._per_token = block.payload.nbytes / len(block.tokens)
        if block.logits is not None:
            self._logits = block.logits.nbytes

    def expected(self, num_tokens: int, *, tail: bool) -> int:
        return RECORD_BYTES + int(num_tokens * (self._per_token + TOKEN_BYTES)) + (self._logits if tail else 0)


def pin_id(last: Key) -> str:
    """Of the pin of the prompt whose chain ends with this key."""
    return digest(b"pin", last).hex()[:_ID_LENGTH]


def check_seconds(ttl_seconds: float) -> None:
    """Raises InvalidRequest."""
    if not (math.isfinite(ttl_seconds) and 0 < ttl_seconds <= MAX_SECONDS):
        raise InvalidRequest(
            f"a pin's time must be more than 0 and at most {MAX_SECONDS:.0f} seconds, got {ttl_seconds}", param="ttl"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes:,} bytes"
