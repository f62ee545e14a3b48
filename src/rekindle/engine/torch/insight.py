"""What can be said of KV without computing any: its layers, how far two lie apart, and one mended with another.

The part of the torch engine that reads its pool and payloads, but neither calls the model nor takes cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rekindle.engine.protocol import KV, Payload, SequenceId
from rekindle.engine.saved import distances
from rekindle.engine.sequences import BookKeeping
from rekindle.engine.torch.cells import Cells, CellTable
from rekindle.engine.torch.payload import PayloadLayout
from rekindle.engine.torch.pool import Pool
from rekindle.engine.torch.rotation import Rotation
from rekindle.engine.verify import check_fingerprint, check_layer, check_probed, check_same
from rekindle.errors import EngineError


@dataclass(frozen=True, eq=False)
class LayerKV:
    """K and V of one layer for some tokens, in the engine's type."""

    key: Tensor  # [kv_heads, tokens, key_dim], turned to the tokens' positions
    value: Tensor  # [kv_heads, tokens, value_dim]


class Insight(BookKeeping):
    """See the module's docstring; the meaning of each method is in `Engine`."""

    layout: PayloadLayout
    rotations: Sequence[Rotation | None]  # of each layer; None where keys can't be turned
    immovable: str | None  # why its keys can't be turned to another position, if so
    _pool: Pool
    _table: CellTable

    def compare(self, one: Payload, other: Payload) -> npt.NDArray[np.float32]:
        check_same(one, other, self.spec)
        pairs = zip(self.look(one), self.look(other), strict=True)
        layers = [[each.value.float().transpose(0, 1).flatten(1).numpy() for each in pair] for pair in pairs]
        if not len(one):
            return np.zeros(0, dtype=np.float32)
        return distances([mine for mine, _ in layers], [yours for _, yours in layers])

    def look(self, payload: Payload, position: int | None = None) -> list[LayerKV]:
        """A payload's K and V, layer by layer, K turned to where its first token would stand at `position`.

        The tensors are on the CPU; without a turn they share the payload's memory and must not be written. Raises
        ForeignPayload, EngineError if the model's keys can't be moved or the payload is not whole.
        """
        by = 0 if position is None else position - payload.position
        if by:
            self._check_movable("a payload can only be read where it was computed")
        check_fingerprint(payload, self.spec)
        if payload.lacks:
            raise EngineError(
                f"only a whole payload can be looked into; of {payload.lacks} of its {len(payload)} tokens the layers "
                "with a sliding window are missing"
            )
        data = self.layout.wrap(memoryview(payload.data), len(payload))
        pairs = enumerate(self.layout.split(data, len(payload)))
        return [
            LayerKV(self._turned(layer, key, by).transpose(0, 1), value.transpose(0, 1))
            for layer, (key, value) in pairs
        ]

    @torch.inference_mode()
    def refreshed(
        self,
        seq: SequenceId,
        payload: Payload,
        position: int,
        layer: int,
        kv: KV,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> tuple[Payload, npt.NDArray[np.float32]]:
        check_layer(layer, self.spec)
        stop = len(payload) if stop is None else stop
        check_probed(self._table, seq, payload, position, (start, stop))
        count, own = stop - start, self.look(payload, position - start)
        data = self.layout.allocate(count)
        scores = torch.zeros(count)
        pool = self._pool.layers(self._cells(seq, position, position + count))
        for index, (target, (keys, values, at)) in enumerate(zip(self.layout.split(data, count), pool, strict=True)):
            stored = [each[:, start:stop].transpose(0, 1) for each in (own[index].key, own[index].value)]
            fresh = (keys[at], values[at]) if index <= layer else stored
            if index == layer:
                which = "KV".index(kv)
                difference = stored[which].float() - fresh[which].cpu().float()
                scores = difference.square().sum(dim=(1, 2)).sqrt()
            for to, source in zip(target, fresh if index < layer else stored, strict=True):
                to.copy_(source)
        mended = Payload(payload.tokens[start:stop], position, memoryview(data.numpy().data), self.spec.fingerprint)
        return mended, np.asarray(scores.numpy(), dtype=np.float32)

    def _cells(self, seq: SequenceId, start: int, stop: int) -> list[Cells]:
        """Of each group, for those of the tokens [start, stop) that it holds."""
        return [keys.cells for keys in self._table.keys(seq, start, stop)]

    def _turned(self, layer: int, keys: Tensor, by: int) -> Tensor:
        rotation = self.rotations[layer]
        if not by:
            return keys
        assert rotation is not None
        return rotation.turn(keys, by)

    def _check_movable(self, consequence: str) -> None:
        if self.immovable is not None:
            raise EngineError(f"{self.spec.architecture} KV cannot be moved ({self.immovable}): {consequence}")
