"""Keys name KV: equal for equal beginnings, in every process, and for nothing else."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tests.kv.samples import chain

from rekindle.kv.keys import KEY_BYTES, block_key, chain_keys, digest, root_key, tail_key, token_bytes
from rekindle.tokens import as_tokens

ROOT = root_key(b"fingerprint", b"salt")
PARTS = st.lists(st.binary(max_size=12), max_size=4)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=20)


def keys_of(ids: list[int], block_tokens: int = 4, root: bytes = ROOT) -> list[bytes]:
    return list(chain_keys(root, token_bytes(as_tokens(ids)), block_tokens))


def test_keys_are_these_for_ever() -> None:
    """Blocks on disk outlive this version: a change of these values throws every user's store away."""
    assert ROOT.hex() == "d043bca5b30c46d8a63f28057384b4c2"
    assert block_key(ROOT, as_tokens([1, 2, 3])).hex() == "e2d323f41398320be0cbece18afce52b"
    assert tail_key(ROOT, as_tokens([1, 2, 3])).hex() == "e1b0f292f8bfe20f597910c04c8482c1"
    assert tail_key(ROOT, as_tokens([])).hex() == "2ea459c7e16713346453b1bc583f700b"


def test_another_process_makes_the_same_keys() -> None:
    program = (
        "from rekindle.kv.keys import *; from rekindle.tokens import as_tokens\n"
        "root = root_key(b'fingerprint', b'salt')\n"
        "keys = chain_keys(root, token_bytes(as_tokens(range(1000))), 64)\n"
        "print(*(key.hex() for key in [*keys, tail_key(root, as_tokens([7]))]))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    here = [*keys_of(list(range(1000)), 64), tail_key(ROOT, as_tokens([7]))]
    assert run.stdout.split() == [key.hex() for key in here]


@given(PARTS, PARTS)
def test_inputs_do_not_run_together(one: list[bytes], other: list[bytes]) -> None:
    assert (digest(*one) == digest(*other)) == (one == other)
    assert len(digest(*one)) == KEY_BYTES


@given(st.binary(max_size=8), st.binary(max_size=8), st.binary(max_size=8), st.binary(max_size=8))
def test_fingerprints_and_salts_have_roots_of_their_own(f1: bytes, s1: bytes, f2: bytes, s2: bytes) -> None:
    assert (root_key(f1, s1) == root_key(f2, s2)) == ((f1, s1) == (f2, s2))


@given(IDS, IDS)
def test_equal_keys_mean_equal_beginnings(one: list[int], other: list[int]) -> None:
    for index, (left, right) in enumerate(zip(keys_of(one), keys_of(other), strict=False)):
        stop = 4 * (index + 1)
        assert (left == right) == (one[:stop] == other[:stop])


@given(IDS)
def test_a_block_is_never_a_tail(ids: list[int]) -> None:
    tokens = as_tokens(ids)
    assert block_key(ROOT, tokens) != tail_key(ROOT, tokens)
    assert block_key(ROOT, tokens) != root_key(ROOT, tokens.tobytes())


def test_the_integers_type_and_layout_do_not_matter() -> None:
    """A key must not depend on how an array of ids came to be."""
    expected = block_key(ROOT, as_tokens([5, 6, 7]))
    for made in (np.array([5, 6, 7]), np.array([5, 6, 7], dtype=">i4"), np.array([5, 0, 6, 0, 7, 0], np.int32)[::2]):
        assert block_key(ROOT, made) == expected


@given(IDS, st.integers(1, 6))
def test_a_chains_keys_are_those_of_its_whole_blocks_each_after_the_one_before(ids: list[int], size: int) -> None:
    links = list(chain(ROOT, as_tokens(ids), size))
    assert len(links) == len(ids) // size
    assert keys_of(ids, size) == [key for _, key, _ in links]
