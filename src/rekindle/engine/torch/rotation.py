"""How keys turn with their position, and turning them on to another one.

RoPE (Su et al., https://arxiv.org/abs/2104.09864) turns pairs of a key's numbers by position x frequency. A key computed at
position p is that of position q after one more turn by q - p; everything that stretches RoPE to longer contexts (linear,
llama3, yarn, longrope) changes the frequencies, or multiplies all keys by one factor, which a turn leaves as it is.

Which layers turn, with which of the model's frequencies, which of a head's numbers make a pair (halves of the head, as in
NeoX, or neighbours, as in GPT-J) and how much of the head takes part is not read from a table of architectures. The same
tokens are run at several positions, each on its own, and the rotation that carries the keys of position 0 to all the others
is the layer's. If none does, the keys can't be moved, and the engine says so instead of guessing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Largest relative error of a turned key: what rounding to the type makes, several times over.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}


@dataclass(frozen=True, eq=False)
class Rotation:
    """Pairs of a head's numbers and how fast each turns. No pairs: the layer knows no positions."""

    frequencies: Tensor  # [pairs] float64 on the CPU, radians per position
    start: int  # index of the first number that turns
    interleaved: bool  # pairs are neighbours instead of halves apart

    def turn(self, keys: Tensor, by: int) -> Tensor:
        """Keys [..., key_dim] as they would be `by` positions further on; computed in float32, same type and shape."""
        pairs = len(self.frequencies)
        if not pairs or not by:
            return keys
        angles = self.frequencies * by
        cos, sin = (f(angles).to(keys.device, torch.float32) for f in (torch.cos, torch.sin))
        moving = keys[..., self.start : self.start + 2 * pairs].to(torch.float32)
        first, second = _split(moving, self.interleaved)
        turned = (first * cos - second * sin, second * cos + first * sin)
        result = keys.clone()
        result[..., self.start : self.start + 2 * pairs] = _join(*turned, self.interleaved).to(keys.dtype)
        return result

    def describe(self) -> list[object]:
        """What distinguishes it, for a fingerprint."""
        return [self.start, self.interleaved, [round(value, 12) for value in self.frequencies.tolist()]]


STILL = Rotation(torch.empty(0, dtype=torch.float64), 0, False)


def frequency_sets(model: nn.Module) -> list[Tensor]:
    """Every set of inverse frequencies that the model's rotary embeddings hold, float64 on the CPU, without doubles."""
    found: list[Tensor] = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq"):
                values = buffer.detach().to("cpu", torch.float64)
                if not any(values.shape == other.shape and torch.equal(values, other) for other in found):
                    found.append(values)
    return found


def find_rotation(keys: Mapping[int, Tensor], sets: Iterable[Tensor]) -> Rotation | None:
    """The rotation that explains the keys [tokens, heads, key_dim] of the same tokens at several positions, of which 0 is
    one; None if there is no such.
    """
    at_zero = keys[0]
    best: Rotation | None = None
    least = TOLERANCE[at_zero.dtype]
    for rotation in _candidates(at_zero.shape[-1], sets):
        error = max(_difference(rotation.turn(at_zero, by), there) for by, there in keys.items())
        if error < least:
            best, least = rotation, error
    return best


def _candidates(key_dim: int, sets: Iterable[Tensor]) -> Iterator[Rotation]:
    yield STILL
    for frequencies in sets:
        width = 2 * len(frequencies)
        if width <= key_dim:
            for start in {0, key_dim - width}:
                for interleaved in (False, True):
                    yield Rotation(frequencies, start, interleaved)


def _difference(one: Tensor, other: Tensor) -> float:
    """Size of the difference beside the size of the tensor."""
    one, other = one.to(torch.float32), other.to(torch.float32)
    return float((one - other).norm() / other.norm().clamp_min(1e-30))


def _split(values: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return values[..., 0::2], values[..., 1::2]
    half = values.shape[-1] // 2
    return values[..., :half], values[..., half:]


def _join(first: Tensor, second: Tensor, interleaved: bool) -> Tensor:
    return torch.stack((first, second), dim=-1).flatten(-2) if interleaved else torch.cat((first, second), dim=-1)
