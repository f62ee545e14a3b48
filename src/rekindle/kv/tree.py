"""Where whole blocks are found in memory: a tree of runs, walked by the tokens themselves.

A run is some blocks that came together, one after the other. A chain that begins alike and goes on differently splits it:

    chain A   |a0 a1 a2 a3 a4 a5|          after A:   root ── [a0 a1 a2 a3 a4 a5]
    chain B   |a0 a1 a2 b3 b4|             after B:   root ── [a0 a1 a2] ── [a3 a4 a5]
                                                                 └──── [b3 b4]

So a look-up compares a prompt's bytes with those of a few runs, and neither hashes anything nor touches every block: the
keys and blocks that it returns are slices of lists. Comparing tokens, it can't find the KV of other ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rekindle.kv.block import Block
from rekindle.kv.keys import TOKEN_BYTES, Key


class Run:
    """Blocks one after another. Those at the end may have gone: their tokens stay until the run does."""

    __slots__ = ("blocks", "following", "keys", "parent", "written")

    def __init__(self, parent: Run | None, written: bytes, keys: list[Key], blocks: list[Block]) -> None:
        self.parent = parent
        self.written = written  # bytes of the tokens of all blocks that it had at first; of a root its key
        self.keys = keys
        self.blocks = blocks
        self.following: dict[bytes, Run] = {}  # by the bytes of their first block


class Tree:
    """The whole blocks of all roots. Not thread-safe."""

    def __init__(self, block_tokens: int) -> None:
        self._width = block_tokens * TOKEN_BYTES  # bytes of a block's tokens
        self._roots: dict[Key, Run] = {}  # without blocks of their own
        self._runs: dict[Key, Run] = {}  # by the key of each of their blocks

    def __len__(self) -> int:
        return len(self._runs)

    def __contains__(self, key: object) -> bool:
        return key in self._runs

    def __iter__(self) -> Iterator[Block]:
        return (block for run in self._all() for block in run.blocks)

    def get(self, key: Key) -> Block | None:
        run = self._runs.get(key)
        return None if run is None else run.blocks[run.keys.index(key)]

    def after(self, key: Key) -> Key | None:
        """One of the blocks that follow this one; None if there is none."""
        run = self._runs[key]
        index = run.keys.index(key) + 1
        if index < len(run.keys):
            return run.keys[index]
        return next((following.keys[0] for following in run.following.values()), None)

    def longest(self, root: Key, written: bytes) -> tuple[list[Key], list[Block]]:
        """Keys and blocks of the longest known beginning of a prompt, given as bytes."""
        keys: list[Key] = []
        blocks: list[Block] = []
        run = self._roots.get(root)
        start, width = 0, self._width
        while run is not None:
            run = run.following.get(written[start : start + width])
            if run is None:
                break
            if len(run.written) == len(run.keys) * width and written.startswith(run.written, start):
                keys += run.keys
                blocks += run.blocks
                start += len(run.written)
                continue
            count = self._common(run, written[start : start + len(run.keys) * width])
            keys += run.keys[:count]
            blocks += run.blocks[:count]
            if count < len(run.keys):
                break
            start += count * width
        return keys, blocks

    def _common(self, run: Run, written: bytes) -> int:
        """How many of a run's blocks these bytes begin with."""
        if run.written.startswith(written):
            return len(written) // self._width
        ours = np.frombuffer(run.written, np.uint8, len(written))
        return int((ours != np.frombuffer(written, np.uint8)).argmax()) // self._width

    def add(self, root: Key, parent: Key, blocks: Sequence[Block]) -> None:
        """Blocks that follow a known one, or the root, and are not known yet."""
        run = self._runs.get(parent)
        if run is None:
            assert parent == root, "a block without its predecessor"
            run = self._roots.setdefault(root, Run(None, root, [], []))
        elif run.keys[-1] != parent or len(run.keys) * self._width < len(run.written):
            run = self._split(run, run.keys.index(parent) + 1)
        written = _written(blocks, len(blocks) * self._width)
        new = Run(run, written, [block.key for block in blocks], list(blocks))
        run.following[written[: self._width]] = new
        for key in new.keys:
            self._runs[key] = new

    def _split(self, run: Run, length: int) -> Run:
        """Cut a run in two and return the new head of `length` blocks; the run is what is left, which may be nothing."""
        assert run.parent is not None
        cut = length * self._width
        head = Run(run.parent, run.written[:cut], run.keys[:length], run.blocks[:length])
        for key in head.keys:
            self._runs[key] = head
        run.parent.following[run.written[: self._width]] = head
        run.written = run.written[cut : len(run.keys) * self._width]
        del run.keys[:length], run.blocks[:length]
        if run.keys:
            head.following[run.written[: self._width]] = run
            run.parent = head
        return head

    def remove(self, key: Key) -> Block:
        """A block that nothing follows; returns it."""
        run = self._runs.pop(key)
        assert run.keys[-1] == key and not run.following, "a block that others follow"
        run.keys.pop()
        block = run.blocks.pop()
        if not run.keys:
            before = run.parent
            assert before is not None
            del before.following[run.written[: self._width]]
            if before.parent is None and not before.following:
                del self._roots[before.written]
        return block

    def _all(self) -> Iterator[Run]:
        runs = list(self._roots.values())
        for run in runs:
            yield run
            runs.extend(run.following.values())

    def check_integrity(self) -> None:
        """Recount. Raises AssertionError."""
        seen: set[Key] = set()
        for root, run in self._roots.items():
            assert run.following and not run.keys and run.written == root
        for run in self._all():
            assert len(run.keys) == len(run.blocks)
            for index, (key, block) in enumerate(zip(run.keys, run.blocks, strict=True)):
                assert key == block.key and self._runs[key] is run and key not in seen
                assert block.tokens.tobytes() == run.written[index * self._width : (index + 1) * self._width]
                seen.add(key)
            for first, after in run.following.items():
                before = run.blocks[-1] if run.blocks else None
                position = 0 if before is None else before.position + len(before.tokens)
                assert after.parent is run and after.keys, "a run of no blocks"
                assert first == after.written[: self._width] and after.blocks[0].position == position, "a hole"
            for one, other in zip(run.blocks, run.blocks[1:], strict=False):
                assert other.parent == one.key and other.position == one.position + len(one.tokens), "a hole"
        assert len(seen) == len(self._runs)


def _written(blocks: Sequence[Block], num_bytes: int) -> bytes:
    """The bytes of their tokens; not copied where all of them are views of just these bytes."""
    base = blocks[0].tokens.base
    if isinstance(base, bytes) and len(base) == num_bytes and all(block.tokens.base is base for block in blocks):
        return base
    return b"".join([block.tokens.data for block in blocks])
