"""A folder seen from outside: its chains, its orphans, what is torn in it, and deleting the right part of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.kv.samples import FINGERPRINT, SIZE, Clock, make_chain, make_tail

from rekindle.errors import StoreError
from rekindle.kv.block import Block
from rekindle.kv.catalog import Prune, choose, delete, delete_everything, read_catalog, unpin, verify
from rekindle.kv.disk import DiskTier
from rekindle.kv.tier import place_of

FILE_BYTES = 4096
OTHER = b"o" * 16
SECOND = 10**9


class Bench:
    """A folder with one writer for each model, and a clock that goes on a minute with each chain."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = Clock()

    def put(self, chain: list[Block], fingerprint: bytes = FINGERPRINT, label: str | None = None) -> None:
        self.clock.now += 60
        facts = None if label is None else {"name": label}
        DiskTier(self.path, fingerprint=fingerprint, max_bytes=1 << 24, label=facts, clock=self.clock).put(chain)

    def path_of(self, block: Block) -> Path:
        return next(path for path in self.path.rglob("*.safetensors") if path.stem.endswith(block.key.hex()))

    @property
    def now_ns(self) -> int:
        return int(self.clock.now * SECOND)

    @property
    def num_files(self) -> int:
        return len(list((self.path / "v1").rglob("??/*.safetensors")))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "store")


def listed(bench: Bench) -> list[tuple[int, int]]:
    """(tokens, blocks) of each chain."""
    return sorted((chain.length, len(chain.entries)) for chain in read_catalog(bench.path).chains())


def test_a_chain_is_a_prompt_as_far_as_it_is_stored(bench: Bench) -> None:
    blocks = make_chain(1, 3, tail=2)
    bench.put(blocks)
    (chain,) = read_catalog(bench.path).chains()
    assert (chain.length, chain.key, chain.num_bytes) == (3 * SIZE + 2, blocks[-1].key, 4 * FILE_BYTES)
    assert chain.tokens(6).tolist() == [*blocks[0].tokens, *blocks[1].tokens[:2]]
    assert chain.tokens(1000).tolist() == [token for block in blocks for token in block.tokens]
    assert chain.is_whole and chain.fingerprint == FINGERPRINT
    assert abs(chain.used_ns - bench.now_ns) < SECOND


def test_what_goes_on_is_listed_once(bench: Bench) -> None:
    """Neither a tail that a longer tail or a block begins with, nor one of no tokens beside others, is a chain."""
    head = make_chain(1, 1)
    more = make_chain(1, 2, tail=3)
    shorter = make_tail(head[0].key, more[1].tokens[:2], SIZE)
    ends_with_block = make_tail(head[0].key, more[1].tokens[:0], SIZE)
    shorter_tail = make_tail(more[1].key, more[2].tokens[:1], 2 * SIZE)
    bench.put([*head, shorter])
    bench.put([*head, ends_with_block])
    bench.put([*more[:2], shorter_tail])
    bench.put(more)
    assert listed(bench) == [(2 * SIZE + 3, 3)]


def test_chains_that_part_are_listed_apart(bench: Bench) -> None:
    head = make_chain(1, 1)
    bench.put([*head, make_tail(head[0].key, make_chain(2, 1)[0].tokens[:2], SIZE)])
    bench.put([*head, make_tail(head[0].key, make_chain(3, 1)[0].tokens[:3], SIZE)])
    bench.put(make_chain(4, 2), OTHER)
    assert listed(bench) == [(SIZE + 2, 2), (SIZE + 3, 2), (2 * SIZE, 2)]


def test_orphans_are_found_with_all_that_follows_them(bench: Bench) -> None:
    blocks = make_chain(1, 4, tail=1)
    bench.put(blocks)
    bench.put(make_chain(2, 2))
    bench.path_of(blocks[1]).unlink()
    catalog = read_catalog(bench.path)
    assert {entry.front.key for entry in catalog.orphans()} == {block.key for block in blocks[2:]}
    broken = next(chain for chain in catalog.chains() if not chain.is_whole)
    assert (broken.length, len(broken.entries)) == (4 * SIZE + 1, 3)


def test_models_have_names(bench: Bench) -> None:
    bench.put(make_chain(1, 1), label="ember")
    bench.put(make_chain(2, 1), OTHER)
    catalog = read_catalog(bench.path)
    assert catalog.name_of(FINGERPRINT) == "ember"
    assert catalog.name_of(OTHER) == OTHER.hex()[:12]
    assert catalog.fingerprints() == sorted([FINGERPRINT, OTHER])


def test_a_sound_folder_has_no_problems(bench: Bench) -> None:
    bench.put(make_chain(1, 5, tail=0))
    bench.put(make_chain(2, 0, tail=3), OTHER)
    seen: list[tuple[int, int]] = []
    check = verify(bench.path, progress=lambda done, total: seen.append((done, total)))
    assert (check.num_blocks, check.num_bytes, check.problems) == (7, 7 * FILE_BYTES, ())
    assert seen == [(count * FILE_BYTES, 7 * FILE_BYTES) for count in range(1, 8)]


@pytest.mark.parametrize("repair", [False, True])
def test_what_is_torn_is_told_and_set_aside_only_if_asked(bench: Bench, repair: bool) -> None:
    chains = [make_chain(seed, 1) for seed in range(4)]
    for chain in chains:
        bench.put(chain)
    flipped, short, foreign, renamed = (bench.path_of(chain[0]) for chain in chains)
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    short.write_bytes(short.read_bytes()[:300])
    foreign.write_bytes(b"not a block")
    moved = renamed.with_name("0" * 32 + ".safetensors")
    renamed.rename(moved)
    check = verify(bench.path, repair=repair)
    assert {problem.path for problem in check.problems} == {flipped, short, foreign, moved}
    assert not any(problem.is_orphan for problem in check.problems)
    assert check.num_set_aside == (4 if repair else 0)
    assert (read_catalog(bench.path).num_aside, bench.num_files) == ((4, 0) if repair else (0, 4))
    assert len(verify(bench.path).problems) == (0 if repair else 4)


def test_keys_that_do_not_follow_from_the_tokens_are_told(bench: Bench) -> None:
    """A checksum says that the bytes are what was written; this was written wrong."""
    block = make_chain(1, 1)[0]
    wrong = Block(block.key, block.parent, make_chain(2, 1)[0].tokens, 0, block.payload)
    bench.put([wrong])
    (problem,) = verify(bench.path).problems
    assert "its tokens make the key" in problem.what


def test_a_hole_is_told_once(bench: Bench) -> None:
    blocks = make_chain(1, 4, tail=1)
    bench.put(blocks)
    bench.path_of(blocks[1]).unlink()
    (problem,) = verify(bench.path).problems
    assert problem.is_orphan and problem.path == bench.path_of(blocks[2])
    assert blocks[1].key.hex() in problem.what


def test_pruning_by_use_takes_the_ends_first(bench: Bench) -> None:
    old, young = make_chain(1, 4), make_chain(2, 2)
    bench.put(old)
    bench.put(young)
    catalog = read_catalog(bench.path)
    chosen = choose(catalog, Prune(max_bytes=3 * FILE_BYTES), bench.now_ns)
    assert [entry.front.key for entry in chosen] == [block.key for block in old[:0:-1]]
    assert delete(bench.path, chosen) == chosen
    assert listed(bench) == [(SIZE, 1), (2 * SIZE, 2)]
    assert not verify(bench.path).problems


def test_pruning_by_age_model_and_holes(bench: Bench) -> None:
    old, young, other = make_chain(1, 3), make_chain(2, 2), make_chain(3, 2)
    bench.put(old)
    bench.put(other, OTHER)
    bench.put(young)
    bench.path_of(young[0]).unlink()
    catalog = read_catalog(bench.path)
    now = bench.now_ns

    def chosen(**wish: object) -> set[bytes]:
        return {entry.front.key for entry in choose(catalog, Prune(**wish), now)}  # type: ignore[arg-type]

    only_other = frozenset([OTHER])
    assert chosen() == set()
    assert chosen(fingerprints=only_other) == {block.key for block in other}
    assert chosen(orphans=True) == {young[1].key}
    assert chosen(unused_since_ns=now - 90 * SECOND) == {block.key for block in old}
    assert chosen(unused_since_ns=now - 90 * SECOND, fingerprints=only_other) == set()
    assert chosen(unused_since_ns=now + SECOND, fingerprints=only_other) == {block.key for block in other}
    assert chosen(max_bytes=FILE_BYTES, fingerprints=only_other) == {other[1].key}
    assert chosen(max_bytes=0, orphans=True) == {block.key for block in [*old, young[1], *other]}


def test_pins_are_listed_kept_and_ended(bench: Bench) -> None:
    """Two pins that share their head: the end of one leaves what the other needs."""
    head = make_chain(1, 2)
    tails = [make_tail(head[1].key, make_chain(seed, 1)[0].tokens[:2], 2 * SIZE) for seed in (2, 3)]
    loose = make_chain(9, 2)
    for chain in ([*head, tails[0]], [*head, tails[1]], loose):
        bench.put(chain)
    tier = DiskTier(bench.path, fingerprint=FINGERPRINT, max_bytes=1 << 24, clock=bench.clock)
    for hours, tail in ((1, tails[0]), (2, tails[1])):
        tier.keep([place_of(block) for block in [*head, tail]], bench.clock.now + hours * 3600)
    catalog = read_catalog(bench.path)
    first, second = catalog.pins(bench.now_ns)
    assert (first.key, second.key) == (tails[0].key, tails[1].key)
    assert round((second.used_ns - bench.now_ns) / SECOND) == 7200
    assert delete(bench.path, choose(catalog, Prune(max_bytes=0), bench.now_ns)) != []
    assert listed(bench) == [(2 * SIZE + 2, 3)] * 2

    unpin(catalog, second, bench.now_ns)
    assert [pin.key for pin in read_catalog(bench.path).pins(bench.now_ns)] == [tails[0].key]
    delete(bench.path, choose(read_catalog(bench.path), Prune(max_bytes=0), bench.now_ns))
    assert listed(bench) == [(2 * SIZE + 2, 3)]

    (last,) = read_catalog(bench.path).pins(bench.now_ns)
    unpin(read_catalog(bench.path), last, bench.now_ns)
    assert read_catalog(bench.path).pins(bench.now_ns) == []
    delete(bench.path, choose(read_catalog(bench.path), Prune(max_bytes=0), bench.now_ns))
    assert listed(bench) == []


def test_what_was_used_since_it_was_listed_stays(bench: Bench) -> None:
    used, gone, left = make_chain(1, 1), make_chain(2, 1), make_chain(3, 1)
    for chain in (used, gone, left):
        bench.put(chain)
    catalog = read_catalog(bench.path)
    bench.clock.now += 60
    tier = DiskTier(bench.path, fingerprint=FINGERPRINT, max_bytes=1 << 24, clock=bench.clock)
    assert all(tier.get([place_of(used[0])]))
    bench.path_of(gone[0]).unlink()
    deleted = delete(bench.path, choose(catalog, Prune(max_bytes=0), bench.now_ns))
    assert [entry.front.key for entry in deleted] == [left[0].key]
    assert tier.contains([place_of(used[0])]) == [True]


def test_deleting_everything_leaves_nothing_of_ours(bench: Bench) -> None:
    bench.put(make_chain(1, 3, tail=1), label="ember")
    bench.put(make_chain(2, 1), OTHER)
    bench.path_of(make_chain(2, 1)[0]).write_bytes(b"torn")
    verify(bench.path, repair=True)
    delete_everything(bench.path)
    assert list(bench.path.iterdir()) == []
    assert read_catalog(bench.path).num_bytes == 0


def test_blocks_of_very_many_tokens_are_listed_too(bench: Bench) -> None:
    tokens = make_chain(1, 500)
    long = make_tail(tokens[0].parent, tokens[0].tokens.repeat(600), 0)
    bench.put([long])
    (chain,) = read_catalog(bench.path).chains()
    assert chain.length == 600 * SIZE


def test_strange_and_unfinished_files_are_counted(bench: Bench) -> None:
    block = make_chain(1, 1)[0]
    bench.put([block])
    path = bench.path_of(block)
    path.with_name("f" * 32 + ".safetensors").write_bytes(b"not a block")
    path.with_name(".x.writing").write_bytes(b"half")
    path.with_name("mine.txt").write_text("somebody's")
    catalog = read_catalog(bench.path)
    assert (len(catalog.entries), len(catalog.strange), len(catalog.unfinished)) == (1, 1, 1)
    assert catalog.num_bytes == 3 * FILE_BYTES


def test_folders_that_are_no_stores_are_told(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no folder"):
        read_catalog(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="got the file"):
        read_catalog(tmp_path / "file")
    other = tmp_path / "other"
    (other / "a").mkdir(parents=True)
    with pytest.raises(StoreError, match="is not a store: expected a folder v1 in it, got a"):
        delete_everything(other)
    (other / "v7").mkdir()
    with pytest.raises(StoreError, match="another version: expected v1, got v7"):
        verify(other)
    bench.put(make_chain(1, 1))
    (bench.path / "v7").mkdir()
    assert read_catalog(bench.path).other_versions == ("v7",)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_may_not_be_read_is_told(bench: Bench) -> None:
    bench.put(make_chain(1, 1))
    (bench.path / "v1").chmod(0)
    try:
        with pytest.raises(StoreError, match="Permission denied"):
            read_catalog(bench.path)
    finally:
        (bench.path / "v1").chmod(0o700)
