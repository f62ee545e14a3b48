"""What a disk can do to a store: nothing wrong is ever served, and the server goes on."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.kv.samples import FINGERPRINT, Clock, all_facts, facts, make_chain, make_tail, payload_of

from rekindle.errors import TierUnavailable
from rekindle.kv import folder
from rekindle.kv.block import Block
from rekindle.kv.disk import DiskTier
from rekindle.kv.format import decode, encode
from rekindle.kv.tier import place_of
from rekindle.tokens import as_tokens

REPOSITORY = Path(__file__).parents[2]
CHAIN = make_chain(1, 3, tail=2)
PLACES = [place_of(block) for block in CHAIN]
NOBODY = 65534


class Bench:
    def __init__(self, folder: Path, max_bytes: int = 1 << 22) -> None:
        self.folder = folder
        self.clock = Clock()
        self.tier = DiskTier(folder, fingerprint=FINGERPRINT, max_bytes=max_bytes, clock=self.clock)

    def path(self, block: Block) -> Path:
        return self.tier._folder.path_of(place_of(block))

    def damaged(self, damage: Callable[[Path], object], block: Block = CHAIN[1]) -> None:
        """Store the chain, damage the file of one block, and see that just this block is a miss, once, and is set aside."""
        self.tier.put(CHAIN)
        before = self.tier.stats()
        damage(self.path(block))
        expected = [None if each is block else facts(each) for each in CHAIN]
        assert all_facts(self.tier.get(PLACES)) == expected
        assert self.tier.stats().corrupt == before.corrupt + 1
        assert all_facts(self.tier.get(PLACES)) == expected
        assert self.tier.stats().corrupt == before.corrupt + 1, "what is set aside is not met again"
        assert (self.folder / "v1" / "aside" / self.path(block).name).exists()
        self.tier.put(CHAIN)
        assert all_facts(self.tier.get(PLACES)) == all_facts(CHAIN)
        self.tier.scan()
        self.tier.check_integrity()
        assert self.tier.stats().state == "ok"

    def fails(self, operation: Callable[[], object], words: str) -> None:
        with pytest.raises(TierUnavailable, match=words):
            operation()
        assert words in self.tier.stats().state

    def recovers(self) -> None:
        """After its back-off it works again, and says so."""
        self.clock.now += 31
        self.tier.put(CHAIN)
        assert all_facts(self.tier.get(PLACES)) == all_facts(CHAIN)
        assert self.tier.stats().state == "ok"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "store")


def test_a_truncated_file_is_set_aside(bench: Bench) -> None:
    for length in (0, 1, 7, 8, 30, 200, -200, -1):
        bench.damaged(lambda path, length=length: path.write_bytes(path.read_bytes()[:length]))


@pytest.mark.parametrize("block", [CHAIN[1], CHAIN[3]], ids=["block", "tail"])
def test_a_flipped_bit_anywhere_is_noticed(bench: Bench, block: Block) -> None:
    """Length, checksum, facts, offsets, padding, tokens, logits, payload. Every single bit: see test_format."""
    generator = random.Random(1)
    for start in range(0, len(encode(block, FINGERPRINT)), 16):

        def flip(path: Path, start: int = start) -> None:
            data = bytearray(path.read_bytes())
            data[min(start + generator.randrange(16), len(data) - 1)] ^= 1 << generator.randrange(8)
            path.write_bytes(data)

        bench.damaged(flip, block)


def test_a_foreign_file_is_set_aside(bench: Bench) -> None:
    other = make_chain(2, 2)[1]
    strange = {
        "text": b"hello\n" * 1000,
        "another safetensors file": (14).to_bytes(8, "little") + b'{"a":"strange"}',
        "another block under this name": encode(other, FINGERPRINT),
        "this block of another model": encode(CHAIN[1], b"g" * 16),
        "a tail under a block's name": encode(make_tail(CHAIN[1].key, as_tokens([1]), 8), FINGERPRINT),
    }
    for data in strange.values():
        bench.damaged(lambda path, data=data: path.write_bytes(data))


def test_a_file_of_another_version_is_set_aside_and_another_versions_folder_left_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = bench.folder / "v2" / "ab" / "cd" / ("0" * 32 + ".safetensors")
    later.parent.mkdir(parents=True)
    later.write_bytes(b"from the future")
    monkeypatch.setattr("rekindle.kv.format.VERSION", "2")
    newer = encode(CHAIN[1], FINGERPRINT)
    monkeypatch.undo()
    bench.damaged(lambda path: path.write_bytes(newer))
    bench.tier.clear()
    assert later.read_bytes() == b"from the future"


def test_clearing_is_tried_however_often_writing_has_failed(bench: Bench) -> None:
    """What is asked for by a person is not answered from memory of an outage that may be over."""
    bench.tier.put(CHAIN)
    aside = bench.folder.with_name("aside")
    bench.folder.rename(aside)
    bench.folder.write_text("no folder")
    for clear in (bench.tier.clear, bench.tier.clear_model):
        for _ in range(3):
            with pytest.raises(TierUnavailable):
                bench.tier.put(CHAIN)
        bench.folder.unlink()
        aside.rename(bench.folder)
        with pytest.raises(TierUnavailable, match="not asked again"):
            bench.tier.put(CHAIN)
        clear()
        assert bench.tier.stats().blocks == 0 and bench.tier.stats().state == "ok"
        bench.tier.put(CHAIN)
        bench.folder.rename(aside)
        bench.folder.write_text("no folder")


def test_what_is_set_aside_is_bounded(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "store", max_bytes=64 * 4096)
    for seed in range(40):
        (block,) = chain = make_chain(seed, 1)
        bench.tier.put(chain)
        bench.path(block).write_bytes(b"damaged")
        assert list(bench.tier.get([place_of(block)])) == [None]
    assert bench.tier.stats().corrupt == 40
    assert len(list((bench.folder / "v1" / "aside").iterdir())) == 4, "a sixteenth of the budget"
    bench.tier.check_integrity()


def test_files_set_aside_that_another_process_deletes_meanwhile_are_no_fault(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sets one aside deletes the oldest ones there."""
    bench.damaged(lambda path: path.write_bytes(b"damaged"))
    listed = folder._entries

    def then_deleted(path: Path) -> list[os.DirEntry[str]]:
        entries = listed(path)
        if path.name == "aside":
            for entry in entries:
                Path(entry).unlink()
        return entries

    monkeypatch.setattr(folder, "_entries", then_deleted)
    bench.tier.scan()
    assert (bench.tier.stats().faults, bench.tier.stats().state) == (0, "ok")
    bench.tier.check_integrity()


def test_files_removed_under_our_feet_are_misses(bench: Bench) -> None:
    bench.tier.put(CHAIN)
    assert bench.tier.contains(PLACES) == [True] * 4
    blocks = bench.tier.get(PLACES)
    assert facts(next(blocks)) == facts(CHAIN[0])
    bench.path(CHAIN[2]).unlink()
    assert all_facts(blocks) == [facts(block) for block in CHAIN[1:]], "it was open already"
    assert all_facts(bench.tier.get(PLACES)) == [facts(CHAIN[0]), facts(CHAIN[1]), None, facts(CHAIN[3])]
    assert (bench.tier.stats().corrupt, bench.tier.stats().faults) == (0, 0)
    bench.recovers()


def test_a_folder_removed_under_our_feet_is_made_again(bench: Bench) -> None:
    bench.tier.put(CHAIN)
    shutil.rmtree(bench.folder)
    assert list(bench.tier.get(PLACES)) == [None] * 4
    bench.recovers()
    bench.tier.scan()
    bench.tier.check_integrity()


def test_a_folder_that_another_process_deletes_while_we_make_it_is_made_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever deletes the last file of a folder deletes the folder; here when we have just seen that it exists."""
    outer = bench.path(CHAIN[0]).parent.parent
    outer.mkdir(parents=True)
    make, deleted = os.mkdir, list[Path]()

    def then_deleted(path: Path, mode: int = 0o777) -> None:
        try:
            make(path, mode)
        except FileExistsError:
            if Path(path) == outer and not deleted:
                deleted.append(outer)
                outer.rmdir()
            raise

    monkeypatch.setattr(os, "mkdir", then_deleted)
    bench.tier.put(CHAIN)
    assert deleted == [outer]
    assert all_facts(bench.tier.get(PLACES)) == all_facts(CHAIN)
    assert bench.tier.stats().faults == 0


def test_a_file_where_the_folder_should_be(bench: Bench) -> None:
    bench.folder.write_text("not a folder")
    bench.fails(lambda: bench.tier.put(CHAIN), "can't be written: Not a directory")
    bench.clock.now += 31
    bench.fails(lambda: bench.tier.contains(PLACES), "Not a directory")
    bench.fails(lambda: list(bench.tier.get(PLACES)), "Not a directory")
    bench.fails(bench.tier.scan, "Not a directory")
    bench.fails(lambda: bench.tier.probe(writing=False), "Not a directory")
    bench.fails(lambda: bench.tier.probe(writing=True), "Not a directory")
    bench.clock.now += 31
    bench.folder.unlink()
    bench.recovers()


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may do everything, so it becomes nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def common_folder() -> Iterator[Path]:
    """A folder that nobody can reach, unlike pytest's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        path.chmod(0o755)
    shutil.rmtree(folder)


def read_only(folder: Path) -> None:
    """Files and folders of nobody's, if we are root, which may be read and not written."""
    for path in [folder, *folder.rglob("*")]:
        if os.geteuid() == 0:
            os.chown(path, NOBODY, NOBODY)
        path.chmod(0o555 if path.is_dir() else 0o444)


def test_a_read_only_folder_is_read_and_not_written(common_folder: Path) -> None:
    bench = Bench(common_folder / "store")
    bench.tier.put(CHAIN)
    bench.path(CHAIN[2]).write_bytes(b"damaged")
    read_only(common_folder)
    with unprivileged():
        bench.clock.now += 60
        expected = [facts(CHAIN[0]), facts(CHAIN[1]), None, facts(CHAIN[3])]
        assert all_facts(bench.tier.get(PLACES)) == expected
        bench.tier.probe(writing=False)
        bench.fails(lambda: bench.tier.probe(writing=True), "can't be written: Permission denied")
        bench.clock.now += 31
        bench.fails(lambda: bench.tier.put(make_chain(2, 2)), "can't be written: Permission denied")
        assert all_facts(bench.tier.get(PLACES)) == expected, "reading goes on"
        assert bench.tier.stats().corrupt == 2, "it can't be set aside, and is a miss every time"
        assert "Permission denied" in bench.tier.stats().state, "what can be read says nothing about writing"
    for path in common_folder.rglob("*"):
        path.chmod(0o755)
        if os.geteuid() == 0:
            os.chown(path, 0, 0)
    list(bench.tier.get(PLACES))
    assert not bench.path(CHAIN[2]).exists(), "now it is set aside"
    bench.recovers()


def test_files_without_permission_are_a_fault_and_not_corrupt(common_folder: Path) -> None:
    bench = Bench(common_folder / "store")
    bench.tier.put(CHAIN)
    read_only(common_folder)
    bench.path(CHAIN[1]).chmod(0)
    with unprivileged():
        blocks = bench.tier.get(PLACES)
        assert facts(next(blocks)) == facts(CHAIN[0])
        bench.fails(lambda: next(blocks), "can't be read: Permission denied")
    assert (bench.tier.stats().corrupt, bench.tier.stats().faults) == (0, 1)
    for path in common_folder.rglob("*"):
        path.chmod(0o755)
    bench.recovers()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not permitted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_read_and_not_written(small_disk: Path) -> None:
    bench = Bench(small_disk, max_bytes=1 << 30)
    bench.tier.put(CHAIN)
    large = make_chain(2, 30, payload_bytes=60_000)
    bench.fails(lambda: bench.tier.put(large), "can't be written: the disk is full")
    before = bench.tier.stats().faults
    bench.fails(lambda: bench.tier.put(large), "the disk is full")
    assert bench.tier.stats().faults == before, "it was not even tried"
    assert all_facts(bench.tier.get(PLACES)) == all_facts(CHAIN)
    places = [place_of(block) for block in large]
    kept = sum(bench.tier.contains(places))
    assert 10 < kept < 30
    assert all_facts(bench.tier.get(places)) == all_facts(large[:kept]) + [None] * (30 - kept)
    assert not list(small_disk.rglob("*.writing")), "what could not be finished is not left behind"
    bench.tier.check_integrity()
    bench.clock.now += 31
    bench.tier.remove(places)
    bench.recovers()


LIMITED = """
import resource, sys
from pathlib import Path
from tests.kv.samples import FINGERPRINT, all_facts, make_chain
from rekindle.errors import TierUnavailable
from rekindle.kv import folder
from rekindle.kv.disk import DiskTier
from rekindle.kv.tier import place_of

resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
tier = DiskTier(Path(sys.argv[1]), fingerprint=FINGERPRINT, max_bytes=1 << 30)
small, large = make_chain(1, 3), make_chain(2, 1, payload_bytes=80_000)
tier.put(small)
try:
    tier.put(large)
except TierUnavailable as error:
    print(error)
assert all_facts(tier.get([place_of(block) for block in small])) == all_facts(small)
assert tier.contains([place_of(large[0])]) == [False]
tier.check_integrity()
"""


def test_a_write_that_stops_half_way_leaves_nothing(tmp_path: Path) -> None:
    """A limit on a file's size is met in the middle of a write, like a full disk, and by any user."""
    assert resource.RLIMIT_FSIZE is not None
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "can't be written: File too large" in done.stdout
    assert not list(tmp_path.rglob("*.writing"))


# Forks a writer for each seed it is told, so that imports and blocks are made once. There is room for one chain in five.
WRITERS = """
import os, random, sys
from pathlib import Path
from tests.kv.samples import FINGERPRINT, make_chain
from rekindle.kv.disk import DiskTier

chains = [make_chain(seed, 3, payload_bytes=300_000, tail=2) for seed in range(30)]
tier = DiskTier(Path(sys.argv[1]), fingerprint=FINGERPRINT, max_bytes=6 << 20)
for line in sys.stdin:
    writer = os.fork()
    if writer == 0:
        generator = random.Random(int(line))
        while True:
            tier.put(generator.choice(chains))
    print(writer, flush=True)
    os.waitpid(writer, 0)
    print("dead", flush=True)
"""


def test_writers_killed_at_any_moment_leave_no_wrong_block(tmp_path: Path) -> None:
    """kill -9 of fifty writers on one folder, each after some milliseconds; also while it evicts."""
    generator = random.Random(20)
    tier = DiskTier(tmp_path, fingerprint=FINGERPRINT, max_bytes=6 << 20)
    num_read = 0
    command = [sys.executable, "-c", WRITERS, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writers:
        assert writers.stdin is not None and writers.stdout is not None
        for seed in range(50):
            print(seed, file=writers.stdin, flush=True)
            writer = int(writers.stdout.readline())
            time.sleep(generator.uniform(0.0, 0.08))  # the random moment
            os.kill(writer, 9)
            assert writers.stdout.readline() == "dead\n"
            num_read += check_all(tier)
        half_written = len(list(tmp_path.rglob("*.writing")))
        writers.stdin.close()
    assert num_read > 50, f"{num_read} blocks read, {half_written} half-written files found"
    assert not (tmp_path / "v1" / "aside").exists(), "a name is given to whole files only"
    tier._clock = lambda: time.time() + 3600
    tier.scan()
    assert not list(tmp_path.rglob("*.writing"))
    tier.check_integrity()
    assert tier.stats().corrupt == 0


def check_all(tier: DiskTier) -> int:
    """Read every block there is; its payload must be what its key says."""
    places = [place_of(decode(file.path.read_bytes(), None)) for file in tier._folder.walk() if file.block]
    blocks = list(tier.get(places))
    for block in blocks:
        assert block is not None
        assert bytes(block.payload) == payload_of(block.key, block.payload.nbytes)
    return len(blocks)
