"""Turning K in saved states, as llama.cpp would, without its turn over all cells of the cache.

llama.cpp turns keys inside the next decode and goes over every cell, in use or not. To turn the saved bytes touches what is
meant and nothing else, when it is placed: of 4,096 tokens of a 270M model 0.19 s of processor time in all, where turning
them together in a cache of 10,241 cells takes 0.33 to 0.53, at once, while everybody waits.

How a model's layers turn is not taken on trust from its metadata, which only gives candidates. The first time llama.cpp
does the turning itself, and what it made of each layer's keys is compared with what each candidate makes, pair by pair of a
head's numbers. A layer that none explains (frequencies stretched in some other way, other types than f16) leaves all
turning to llama.cpp. What was seen at some distance is believed up to `TRUSTED` times that, because a frequency that is
slightly wrong shows only there; farther away is looked at again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import numpy.typing as npt

from rekindle.engine.pieces import PIECE, unpack
from rekindle.engine.protocol import Payload
from rekindle.engine.saved_join import Halves, saved_keys
from rekindle.errors import ForeignPayload
from rekindle.model.gguf import GgufModel

LEAST = 64  # positions: nearer by, candidates look alike
TRUSTED = 16
_TOLERANCE = 4e-3  # of a pair, beside the keys' usual size: f16 rounds to 5e-4
_STANDARD_BASE = 10_000.0  # also of Gemma's layers with a window, which has no key of its own in older files


@dataclass(frozen=True, eq=False)
class _Turn:
    """Pairs of a head's numbers, and how fast each turns."""

    frequencies: npt.NDArray[np.float64]  # [pairs] radians per position
    is_interleaved: bool  # pairs are neighbours instead of halves apart

    def turn(self, keys: Halves, by: int) -> None:
        """Keys [tokens, heads, width], in place."""
        pairs = len(self.frequencies)
        if not pairs:
            return
        angles = self.frequencies * by
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        one = keys[..., : 2 * pairs : 2] if self.is_interleaved else keys[..., :pairs]
        other = keys[..., 1 : 2 * pairs : 2] if self.is_interleaved else keys[..., pairs : 2 * pairs]
        first, second = one.astype(np.float32), other.astype(np.float32)
        one[...] = first * cos - second * sin
        other[...] = second * cos + first * sin


class Turner:
    """An engine's; see the module's docstring."""

    def __init__(self, model: GgufModel, kv_type: str) -> None:
        self._head_size = model.head_size
        self._candidates = list(_candidates(model)) if kv_type == "f16" else []
        self._layers: list[_Turn] = []  # of those that were recognised
        self._reach = 0  # positions for which they are believed

    @property
    def knows(self) -> bool:
        """Whether anything can be turned."""
        return self._reach > 0

    def can_turn(self, payloads: Sequence[Payload], positions: Sequence[int]) -> bool:
        """Whether all that is known which is needed for these moves."""
        return all(
            abs(position - payload.position) <= self._reach
            for payload, position in zip(payloads, positions, strict=True)
        )

    def learn(self, before: Sequence[Payload], after: Sequence[Payload]) -> None:
        """What llama.cpp has made of some payloads."""
        pairs = list(zip(before, after, strict=True))
        one, other = max(pairs, key=lambda pair: abs(pair[1].position - pair[0].position))
        by = other.position - one.position
        if not self._candidates or abs(by) < LEAST or abs(by) * TRUSTED <= self._reach:
            return
        found = [self._recognise(*keys, by) for keys in zip(self._keys(one), self._keys(other), strict=True)]
        known = [turn for turn in found if turn is not None]
        if not known or len(known) < len(found):
            self._candidates, self._reach = [], 0
        else:
            self._layers, self._reach = known, TRUSTED * abs(by)

    def turned(self, payload: Payload, position: int) -> Payload:
        """The same KV for another position. Raises ForeignPayload."""
        by = position - payload.position
        if not by:
            return payload
        room = np.frombuffer(payload.data, np.uint8).copy()
        copy, offset = replace(payload, data=room.data), 0
        for start, count, state in unpack(copy):
            PIECE.pack_into(room.data, offset, position + start, count, len(state))
            offset += PIECE.size + len(state)
            positions, layers = saved_keys(state)
            for each in positions:
                each += by
            if len(layers) != len(self._layers):
                raise ForeignPayload(f"a saved state has {len(layers)} layers, the model {len(self._layers)}")
            for turn, keys in zip(self._layers, layers, strict=True):
                turn.turn(self._heads(keys), by)
        return replace(copy, position=position)

    def _keys(self, payload: Payload) -> list[Halves]:
        """Of each layer, in the first piece: [tokens, heads, width]."""
        _, _, state = unpack(payload)[0]
        return [self._heads(keys) for keys in saved_keys(state)[1]]

    def _heads(self, keys: Halves) -> Halves:
        if keys.shape[1] % self._head_size:
            raise ForeignPayload(f"keys of {keys.shape[1]} numbers in a saved state are no heads of {self._head_size}")
        return keys.reshape(len(keys), -1, self._head_size)

    def _recognise(self, before: Halves, after: Halves, by: int) -> _Turn | None:
        size = float(np.sqrt(np.square(after.astype(np.float32)).mean()))
        for turn in self._candidates:
            made = before.copy()
            turn.turn(made, by)
            error = np.sqrt(np.square(made.astype(np.float32) - after.astype(np.float32)).mean(axis=(0, 1)))
            if float(error.max()) < _TOLERANCE * max(size, 1e-6):
                return turn
        return None


def _candidates(model: GgufModel) -> Iterator[_Turn]:
    """Turns that the model's metadata suggests."""

    def stated(key: str) -> float | None:
        value = model.metadata(f"{model.architecture}.rope.{key}")
        return None if value is None else float(value)

    if model.metadata(f"{model.architecture}.rope.scaling.type") not in (None, "none", "linear"):
        return
    bases = {_STANDARD_BASE, stated("freq_base") or _STANDARD_BASE, stated("freq_base_swa") or _STANDARD_BASE}
    factors = {1.0, stated("scaling.factor") or 1.0}
    sizes = {model.head_size, min(int(stated("dimension_count") or model.head_size), model.head_size)}
    for size, base, factor in product(sorted(sizes), bases, factors):
        frequencies = base ** (-np.arange(0, size, 2) / size) / factor
        yield from (_Turn(frequencies, is_interleaved) for is_interleaved in (False, True))
    yield _Turn(np.empty(0), False)  # a layer that knows no positions
