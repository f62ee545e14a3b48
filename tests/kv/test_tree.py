"""The tree of runs finds what a plain search over all chains finds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kv.samples import chain

from rekindle.kv.block import Block
from rekindle.kv.keys import Key, digest, token_bytes
from rekindle.kv.tree import Tree
from rekindle.tokens import as_tokens

SIZE = 2
ROOTS = [digest(b"root", name) for name in (b"one", b"other")]
PATHS = st.lists(st.integers(0, 2), max_size=8)


def chain_of(root: Key, path: list[int]) -> list[Block]:
    links = chain(root, as_tokens([each for each in path for _ in range(SIZE)]), SIZE)
    return [Block(key, parent, part, SIZE * at, memoryview(b"")) for at, (parent, key, part) in enumerate(links)]


def add(tree: Tree, root: Key, path: list[int]) -> None:
    blocks = chain_of(root, path)
    new = [block for block in blocks if block.key not in tree]
    if new:
        tree.add(root, new[0].parent, new)


def longest(tree: Tree, root: Key, path: list[int], *, extra: int = 0) -> int:
    """In blocks; the prompt goes on for some tokens that are no whole block."""
    blocks = chain_of(root, path)
    written = token_bytes(as_tokens([each for each in path for _ in range(SIZE)] + [9] * extra))
    keys, found = tree.longest(root, written)
    assert keys == [block.key for block in found] == [block.key for block in blocks[: len(found)]]
    return len(found)


@settings(max_examples=300, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["add", "add", "remove"]), st.integers(0, 1), PATHS), max_size=25),
    asked=st.lists(st.tuples(st.integers(0, 1), PATHS, st.integers(0, 1)), min_size=1, max_size=5),
)
def test_it_finds_what_a_set_of_all_beginnings_finds(
    steps: list[tuple[str, int, list[int]]], asked: list[tuple[int, list[int], int]]
) -> None:
    tree, naive = Tree(SIZE), set[tuple[int, tuple[int, ...]]]()
    for verb, root, path in steps:
        if verb == "add":
            add(tree, ROOTS[root], path)
            naive |= {(root, tuple(path[:length])) for length in range(1, len(path) + 1)}
        else:  # the deepest block under the longest known beginning of this path
            under = [each for each in naive if each[0] == root and each[1][: len(path)] == tuple(path)]
            if under:
                victim = max(under, key=lambda each: (len(each[1]), each))
                block = chain_of(ROOTS[root], list(victim[1]))[-1]
                assert tree.remove(block.key).key == block.key
                naive.remove(victim)
        tree.check_integrity()
        assert len(tree) == len(naive) == len(list(tree))
    for root, path, extra in [*asked, *((root, path, 1) for _, root, path in steps)]:
        beginnings = (length for length in range(len(path), 0, -1) if (root, tuple(path[:length])) in naive)
        assert longest(tree, ROOTS[root], path, extra=extra) == next(beginnings, 0)
        for block in chain_of(ROOTS[root], path):
            known = tree.get(block.key)
            assert (known is not None) == (block.key in tree)
            assert known is None or known.key == block.key


def test_what_others_follow_cannot_be_removed() -> None:
    tree = Tree(SIZE)
    add(tree, ROOTS[0], [0, 1])
    with pytest.raises(AssertionError, match="others follow"):
        tree.remove(chain_of(ROOTS[0], [0])[0].key)


def test_nothing_is_held_when_all_is_removed() -> None:
    tree = Tree(SIZE)
    for path in ([0, 1, 2], [0, 1, 1], [2]):
        add(tree, ROOTS[0], path)
    for path in ([0, 1, 2], [0, 1, 1], [0, 1], [0], [2]):
        tree.remove(chain_of(ROOTS[0], path)[-1].key)
        tree.check_integrity()
    assert tree._roots == tree._runs == {}


def test_blocks_that_share_their_tokens_bytes_share_them_with_the_tree() -> None:
    """A block's tokens lie in memory once."""
    written = token_bytes(as_tokens(range(3 * SIZE)))
    blocks = []
    for at, (parent, key, _) in enumerate(chain(ROOTS[0], as_tokens(range(3 * SIZE)), SIZE)):
        part = np.frombuffer(written, "<i4", SIZE, 4 * SIZE * at)
        blocks.append(Block(key, parent, part, SIZE * at, memoryview(b"")))
    tree = Tree(SIZE)
    tree.add(ROOTS[0], ROOTS[0], blocks)
    assert tree._runs[blocks[0].key].written is written
    tree.check_integrity()
