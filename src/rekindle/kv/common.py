"""Memory that several blocks have in common: it is free when the last of them has gone, and is counted until then.

    | block | gone  | gone  | block | never used |      what counts beyond the two blocks: the rest

Blocks that were read together lie together, see `slabs`. One that goes frees nothing as long as another one stays there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from rekindle.kv.block import Block

_SLACK_BYTES = 1 << 16  # that one payload may take beyond itself without being looked at


@dataclass(slots=True)
class _Memory:
    num_bytes: int
    blocks: int = 0  # in it
    used: int = 0  # bytes of their payloads


class CommonMemory:
    """Counts what the memory of blocks takes beyond their payloads. Not thread-safe."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._memories: dict[int, _Memory] = {}  # by the id of what owns it, which lives while a block in it does

    def came(self, block: Block) -> None:
        owner, size = _owner(block)
        if not size:
            return
        memory = self._memories.get(owner)
        if memory is None:
            memory = self._memories[owner] = _Memory(size)
            self.num_bytes += size
        memory.blocks += 1
        memory.used += block.payload.nbytes
        self.num_bytes -= block.payload.nbytes

    def went(self, block: Block) -> None:
        owner, size = _owner(block)
        if not size:
            return
        memory = self._memories[owner]
        memory.blocks -= 1
        memory.used -= block.payload.nbytes
        self.num_bytes += block.payload.nbytes
        if not memory.blocks:
            self.num_bytes -= memory.num_bytes
            del self._memories[owner]

    def check_integrity(self, blocks: Iterable[Block]) -> None:
        """Recount. Raises AssertionError."""
        recount = CommonMemory()
        for block in blocks:
            recount.came(block)
        assert recount._memories == self._memories
        assert recount.num_bytes == self.num_bytes >= 0


def _owner(block: Block) -> tuple[int, int]:
    """What owns the memory that the payload lies in, and its bytes; 0 bytes if the payload is about all of it."""
    owner = block.payload.obj
    size = owner.nbytes if isinstance(owner, np.ndarray) else 0
    return id(owner), size if size > block.payload.nbytes + _SLACK_BYTES else 0
