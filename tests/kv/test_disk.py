"""The disk tier's budget, its order of eviction, and a folder with several users."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kv.samples import FINGERPRINT, Clock, all_facts, make_chain

from rekindle.kv import folder
from rekindle.kv.block import Block
from rekindle.kv.disk import DiskTier
from rekindle.kv.folder import last_use
from rekindle.kv.keys import root_key
from rekindle.kv.tier import place_of

FILE_BYTES = 4096  # what each of the blocks below takes


class Bench:
    """Tiers on one folder, as of several processes, with one clock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()

    def tier(self, *, files: int = 1000, fingerprint: bytes = FINGERPRINT) -> DiskTier:
        return DiskTier(self.folder, fingerprint=fingerprint, max_bytes=files * FILE_BYTES, clock=self.clock)

    def put(self, tier: DiskTier, *chains: list[Block]) -> None:
        for chain in chains:
            self.clock.now += 60
            tier.put(chain)
            tier.check_integrity()

    def used(self, tier: DiskTier, chain: list[Block]) -> list[object]:
        self.clock.now += 60
        return all_facts(tier.get([place_of(block) for block in chain]))

    def kept(self, tier: DiskTier, chain: list[Block]) -> int:
        """How many of a chain's blocks are there; none may stand behind a hole."""
        there = tier.contains([place_of(block) for block in chain])
        assert sorted(there, reverse=True) == there, f"a block without its predecessor: {there}"
        return sum(there)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "store")


def test_files_lie_where_the_documentation_says(bench: Bench) -> None:
    block, tail = make_chain(1, 1, tail=2)
    bench.put(bench.tier(), [block, tail])
    key, parent = block.key.hex(), tail.parent.hex()
    files = {path.relative_to(bench.folder).as_posix() for path in bench.folder.rglob("*") if path.is_file()}
    assert files == {
        f"v1/{key[:2]}/{key[2:4]}/{key}.safetensors",
        f"v1/{parent[:2]}/{parent[2:4]}/{parent}.{tail.key.hex()}.safetensors",
    }


def test_prompts_are_nobody_elses_business(bench: Bench) -> None:
    bench.put(bench.tier(), make_chain(1, 1))
    modes = {path.stat().st_mode & 0o077 for path in (bench.folder / "v1").rglob("*")}
    assert modes == {0}


def test_opening_touches_nothing(bench: Bench) -> None:
    tier = bench.tier()
    assert tier.stats().blocks == 0
    assert bench.used(tier, make_chain(1, 2)) == [None, None]
    assert not bench.folder.exists()


def test_a_restart_starts_warm(bench: Bench) -> None:
    chain = make_chain(1, 5, tail=3)
    bench.put(bench.tier(), chain)
    fresh = bench.tier()
    assert bench.used(fresh, chain) == all_facts(chain)
    fresh.scan()
    assert (fresh.stats().blocks, fresh.stats().bytes) == (6, 6 * FILE_BYTES)
    fresh.check_integrity()


def test_the_least_recently_used_chain_dies_first_and_from_its_tail(bench: Bench) -> None:
    tier = bench.tier(files=10)
    old, young = make_chain(1, 5), make_chain(2, 5)
    bench.put(tier, old, young)
    bench.used(tier, old)
    bench.put(tier, make_chain(3, 3))
    assert (bench.kept(tier, old), bench.kept(tier, young)) == (5, 2)
    assert tier.stats().evictions == 3


def test_a_use_in_a_faster_tier_counts_when_it_is_told(bench: Bench) -> None:
    tier = bench.tier(files=10)
    old, young = make_chain(1, 5), make_chain(2, 5)
    bench.put(tier, old, young)
    bench.clock.now += 60
    tier.touch([place_of(block) for block in old])
    bench.put(tier, make_chain(3, 3))
    assert (bench.kept(tier, old), bench.kept(tier, young)) == (5, 2)


def test_a_chain_that_goes_on_keeps_its_head(bench: Bench) -> None:
    """The head is marked with each block that is added, though it is not written again."""
    tier = bench.tier(files=8)
    chain = make_chain(1, 6)
    bench.put(tier, chain[:3], make_chain(2, 2), chain, make_chain(3, 2))
    assert bench.kept(tier, chain) == 6
    assert bench.kept(tier, make_chain(2, 2)) == 0


def test_what_cannot_fit_is_left_out_and_costs_nothing(bench: Bench) -> None:
    tier = bench.tier(files=6)
    kept = make_chain(1, 3)
    too_large = make_chain(2, 1, payload_bytes=6 * FILE_BYTES)
    bench.put(tier, kept, too_large)
    assert (bench.kept(tier, kept), bench.kept(tier, too_large)) == (3, 0)
    long = make_chain(3, 9)
    bench.put(tier, long)
    assert bench.kept(tier, long) == 6, "its own head is used more recently than its ninth block"


def test_nothing_fits_into_no_bytes(bench: Bench) -> None:
    tier = bench.tier(files=0)
    bench.put(tier, make_chain(1, 2))
    assert tier.stats().blocks == 0


def test_a_mark_is_renewed_only_now_and_then(bench: Bench) -> None:
    """Writing to every file that is read would be dear."""
    tier = bench.tier()
    (block,) = chain = make_chain(1, 1)
    bench.put(tier, chain)
    path = bench.folder / "v1" / block.key.hex()[:2] / block.key.hex()[2:4] / f"{block.key.hex()}.safetensors"
    first = path.stat().st_mtime_ns
    bench.clock.now += 5
    list(tier.get([place_of(block)]))
    assert path.stat().st_mtime_ns == first
    bench.clock.now += 6
    list(tier.get([place_of(block)]))
    assert path.stat().st_mtime_ns == first + 11 * 10**9


def test_what_another_process_has_used_stays(bench: Bench) -> None:
    """Though this one believes it to be the oldest."""
    ours, theirs = bench.tier(files=10), bench.tier(files=10)
    first, second = make_chain(1, 4), make_chain(2, 4)
    bench.put(ours, first, second, make_chain(3, 3))
    assert bench.kept(ours, first) == 3
    bench.used(theirs, first)
    bench.put(ours, make_chain(4, 2))
    assert (bench.kept(ours, first), bench.kept(ours, second)) == (3, 2)


def test_two_tiers_on_one_folder_use_each_others_blocks_at_once(bench: Bench) -> None:
    ours, theirs = bench.tier(), bench.tier()
    chain = make_chain(1, 4, tail=1)
    ours.put(chain)
    assert bench.used(theirs, chain) == all_facts(chain)
    theirs.remove([place_of(chain[2])])
    assert bench.used(ours, chain)[2] is None


def test_models_share_a_folder_and_no_block(bench: Bench) -> None:
    ours, theirs = bench.tier(), bench.tier(fingerprint=b"g" * 16)
    chain = make_chain(1, 3)
    ours.put(chain)
    assert root_key(FINGERPRINT, b"") != root_key(b"g" * 16, b"")
    theirs.scan()
    assert theirs.stats().blocks == 3, "the budget is the folder's"
    theirs.check_integrity()


def test_other_peoples_files_are_left_alone(bench: Bench) -> None:
    tier = bench.tier()
    strange = [bench.folder / "note.txt", bench.folder / "v1" / "note.txt", bench.folder / "v1" / "ab" / "cd" / "x.txt"]
    for path in strange:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    bench.put(tier, make_chain(1, 3))
    tier.scan()
    assert tier.stats().blocks == 3
    tier.clear()
    assert [path.read_text() for path in strange] == ["mine"] * 3
    assert {path.name for path in (bench.folder / "v1").iterdir()} == {"ab", "note.txt"}


def test_clearing_leaves_no_folders(bench: Bench) -> None:
    tier = bench.tier()
    bench.put(tier, make_chain(1, 3, tail=2))
    tier.clear()
    assert list(bench.folder.iterdir()) == []


def test_clearing_a_model_leaves_the_others(bench: Bench) -> None:
    ours, theirs = bench.tier(), bench.tier(fingerprint=b"o" * 16)
    chains = [make_chain(seed, 3, tail=2) for seed in range(2)]
    ours.put(chains[0])
    theirs.put(chains[1])
    ours.clear_model()
    assert (bench.kept(ours, chains[0]), bench.kept(theirs, chains[1])) == (0, 4)
    assert ours.stats().blocks == 4
    ours.check_integrity()


def test_what_dead_writers_left_counts_and_is_cleared_away(bench: Bench) -> None:
    tier = bench.tier(files=4)
    folder = bench.folder / "v1" / "ab" / "cd"
    folder.mkdir(parents=True)
    left = folder / ".0123456789abcdef.writing"
    left.write_bytes(bytes(FILE_BYTES))
    os.utime(left, (bench.clock.now, bench.clock.now))
    tier.scan()
    assert (tier.stats().blocks, tier.stats().bytes) == (0, FILE_BYTES)
    chain = make_chain(1, 4)
    tier.put(chain)
    assert bench.kept(tier, chain) == 3
    bench.clock.now += 601
    tier.scan()
    assert not left.exists()
    tier.put(chain)
    assert bench.kept(tier, chain) == 4


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_budget_holds_and_no_block_is_without_its_predecessors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    bench = Bench(tmp_path_factory.mktemp("store"))
    tiers = [bench.tier(files=data.draw(st.integers(0, 12))) for _ in range(2)]
    tiers[1].max_bytes = tiers[0].max_bytes
    stems = [make_chain(seed, 8, tail=1) for seed in range(3)]
    for _ in range(data.draw(st.integers(1, 25))):
        bench.clock.now += data.draw(st.sampled_from([0.0, 0.0, 3.0, 30.0]))
        chain = data.draw(st.sampled_from(stems))[: data.draw(st.integers(0, 9))]
        tier = data.draw(st.sampled_from(tiers))
        if data.draw(st.booleans()):
            tier.scan()  # the budget is exact for one writer at a time
            tier.put(chain)
            tier.check_integrity()
        else:
            got = all_facts(tier.get([place_of(block) for block in chain]))
            assert all(found in (None, fact) for found, fact in zip(got, all_facts(chain), strict=True))
        for stem in stems:
            bench.kept(tier, stem[:8])


WRITER = """
import sys
from pathlib import Path
from tests.kv.samples import FINGERPRINT, make_chain
from rekindle.kv.disk import DiskTier

folder, first, max_bytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tier = DiskTier(folder, fingerprint=FINGERPRINT, max_bytes=max_bytes)
for seed in range(first, first + 100):
    tier.put(make_chain(seed, 3))
"""


def test_two_processes_that_write_stay_near_the_budget(bench: Bench) -> None:
    files = 96
    tier = bench.tier(files=files)
    arguments = [[str(bench.folder), str(first), str(tier.max_bytes)] for first in (1000, 2000)]
    repository = Path(__file__).parents[2]
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, *each], cwd=repository) for each in arguments]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    tier.scan()
    assert files // 2 < tier.stats().blocks <= files + 2 * (files // 32 + 3)
    for file in tier._folder.walk():
        assert file.block, "nothing half written is left"
    for seed in (1099, 2099):
        chain = make_chain(seed, 3)
        got = bench.used(tier, chain)
        assert [fact for fact in got if fact is not None] == all_facts(chain)[: sum(fact is not None for fact in got)]


@pytest.mark.parametrize("damaged", [False, True], ids=["removed", "set aside"])
def test_a_file_that_is_gone_when_its_turn_to_be_a_victim_comes_is_counted_once(bench: Bench, damaged: bool) -> None:
    tier = bench.tier(files=96)
    old = make_chain(1, 3)
    bench.put(tier, old, make_chain(2, 93))
    tier.scan()  # which lists the victims
    if damaged:
        tier._folder.path_of(place_of(old[2])).write_bytes(b"damaged")
        assert bench.used(tier, old[2:]) == [None]
    else:
        tier.remove([place_of(old[2])])
    bench.put(tier, make_chain(3, 2))
    assert bench.kept(tier, old) == (0 if damaged else 1), "one for each new block, and one for what lies aside"


@pytest.mark.parametrize(("most", "num_looks"), [(256, 1), (6, 1), (5, 10), (0, 10)])
def test_tails_are_found_by_one_listing_or_where_too_many_lie_beside_them_by_a_look_for_each(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, most: int, num_looks: int
) -> None:
    """Short prompts all hang on the root."""
    tier = bench.tier()
    tails = [make_chain(seed, 0, tail=3)[0] for seed in range(9)]
    for tail in tails[:6]:
        tier.put([tail])
    (block,) = make_chain(9, 1)
    tier.put([block])
    looked: list[Path] = []

    def look(path: Path) -> int | None:
        looked.append(path)
        return last_use(path)

    monkeypatch.setattr(folder, "_MOST_LISTED", most)
    monkeypatch.setattr(folder, "last_use", look)
    assert tier.contains([place_of(each) for each in (*tails, block)]) == [True] * 6 + [False] * 3 + [True]
    assert len(looked) == num_looks, "one for the block"


def test_integrity_is_really_checked(bench: Bench) -> None:
    tier = bench.tier()
    chain = make_chain(1, 3)
    tier.put(chain)
    paths = [tier._folder.path_of(place_of(block)) for block in chain]
    right = paths[1].read_bytes()
    for wrong, words in ((b"damaged" * 100, "begin"), (paths[2].read_bytes(), "filed wrong")):
        paths[1].write_bytes(wrong)
        with pytest.raises(AssertionError, match=words):
            tier.check_integrity()
        assert len(list(tier.complaints())) == 1
    paths[1].write_bytes(right)
    tier.check_integrity()
    paths[2].unlink()
    with pytest.raises(AssertionError, match="3 blocks counted, 2 there"):
        tier.check_integrity()
    tier.scan()
    tier.check_integrity()
