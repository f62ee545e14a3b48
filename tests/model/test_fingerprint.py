"""The weights' digest: computed once for each state of a file, and never that of another state."""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rekindle.errors import ModelError
from rekindle.model import fingerprint as module
from rekindle.model.fingerprint import FileStates, fingerprint, weights_digest

Reads = Callable[[], list[str]]


def plain(*contents: bytes) -> bytes:
    return hashlib.blake2b(b"".join(contents), digest_size=16).digest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "digests"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Names of the models whose content has been read so far."""
    names: list[str] = []
    real = Path.open

    def counting(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if self.suffix == ".gguf":
            names.append(self.name)
        return real(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", counting)
    return lambda: names


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour has passed since the files were written."""
    real = time.time_ns
    monkeypatch.setattr("time.time_ns", lambda: real() + 3600 * 10**9)


@pytest.fixture
def just_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the moment at which the file was written, however long the test takes."""
    written = file.stat().st_mtime_ns
    monkeypatch.setattr("time.time_ns", lambda: written)


@pytest.mark.usefixtures("settled")
def test_a_digest_is_computed_once(file: Path, notes: Path, reads: Reads) -> None:
    assert weights_digest(file, notes) == weights_digest(file, notes) == plain(b"weights")
    assert reads() == ["model.gguf"]
    assert len(list(notes.iterdir())) == 1


@pytest.mark.usefixtures("just_written")
def test_a_file_that_has_just_changed_is_not_trusted_yet(file: Path, notes: Path, reads: Reads) -> None:
    """It could change again within the resolution of file times."""
    assert weights_digest(file, notes) == weights_digest(file, notes) == plain(b"weights")
    assert len(reads()) == 2
    file.write_bytes(b"WEIGHTS")
    assert weights_digest(file, notes) == plain(b"WEIGHTS")


@pytest.mark.usefixtures("settled")
def test_new_content_of_the_same_size_has_another_digest(file: Path, notes: Path) -> None:
    os.utime(file, ns=(0, 10**9))
    assert weights_digest(file, notes) == plain(b"weights")
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(0, 2 * 10**9))
    assert weights_digest(file, notes) == plain(b"WEIGHTS")


@pytest.mark.usefixtures("settled")
def test_a_modification_time_set_back_hides_nothing(file: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `cp -p` and `rsync -t` do. The change time can't be set, so it is played here."""
    changed = 1
    real = Path.stat

    def stat(self: Path, **options: Any) -> Any:
        found = real(self, **options)
        values = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
        return type("Stat", (), values | {"st_ctime_ns": changed, "st_mtime_ns": 1})() if self == file else found

    monkeypatch.setattr(Path, "stat", stat)
    assert weights_digest(file, notes) == plain(b"weights")
    file.write_bytes(b"WEIGHTS")
    changed = 2
    assert weights_digest(file, notes) == plain(b"WEIGHTS")


@pytest.mark.usefixtures("settled")
def test_the_same_content_elsewhere_has_the_same_digest(file: Path, notes: Path) -> None:
    copy = file.with_name("copy.gguf")
    copy.write_bytes(file.read_bytes())
    link = file.with_name("link.gguf")
    link.symlink_to(file)
    assert weights_digest(copy, notes) == weights_digest(link, notes) == weights_digest(file, notes)
    assert len(list(notes.iterdir())) == 2


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"identity": [], "digest": "00"}', "\xff"])
def test_a_damaged_note_is_written_again(file: Path, notes: Path, reads: Reads, damage: str) -> None:
    weights_digest(file, notes)
    (note,) = notes.iterdir()
    whole = note.read_text("utf-8")
    note.write_text(damage, "latin-1")
    assert weights_digest(file, notes) == plain(b"weights")
    assert note.read_text("utf-8") == whole
    note.write_text(whole.replace(plain(b"weights").hex(), "abcd"), "utf-8")
    assert weights_digest(file, notes) == plain(b"weights")
    assert len(reads()) == 3


@pytest.mark.usefixtures("settled")
def test_without_a_cache_folder_it_works_all_the_same(file: Path, tmp_path: Path, reads: Reads) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    assert weights_digest(file, tmp_path / "taken" / "digests") == plain(b"weights")
    assert weights_digest(file, tmp_path / "taken" / "digests") == plain(b"weights")
    assert len(reads()) == 2


@pytest.mark.usefixtures("settled")
def test_the_default_folder_is_the_users_cache(
    file: Path, tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "users")
    weights_digest(file)
    weights_digest(file)
    assert len(reads()) == 1 and (tmp_path / "users" / "digests").is_dir()


@pytest.mark.usefixtures("settled")
def test_all_parts_of_a_split_model_count(tmp_path: Path, notes: Path) -> None:
    first, second = (tmp_path / f"big-0000{number}-of-00002.gguf" for number in (1, 2))
    first.write_bytes(b"one")
    second.write_bytes(b"two")
    before = weights_digest(first, notes)
    assert before not in (plain(b"one"), plain(b"two"))
    second.write_bytes(b"three")
    assert weights_digest(first, notes) != before
    second.unlink()
    with pytest.raises(ModelError, match=r"cannot read .*00002-of-00002"):
        weights_digest(first, notes)


@pytest.mark.usefixtures("settled")
def test_what_files_became_is_remembered_for_their_state_and_how_they_were_loaded(file: Path, notes: Path) -> None:
    made: list[bytes] = []

    def make() -> bytes:
        made.append(bytes([len(made)]) * 16)
        return made[-1]

    coarse, fine = {"dtype": "bfloat16"}, {"dtype": "float32"}
    before = FileStates([file], notes)
    assert before.digest(coarse, make) == FileStates([file], notes).digest(coarse, make) == made[0]
    assert before.digest(fine, make) == made[1]
    assert FileStates([file, file], notes).digest(fine, make) == made[2]
    os.utime(file, ns=(0, 10**9))
    assert FileStates([file], notes).digest(coarse, make) == made[3]
    assert before.digest(coarse, make) == made[4]  # who knows which state was loaded
    assert FileStates([file], notes).digest(coarse, make) == made[3]
    assert weights_digest(file, notes) == plain(b"weights")
    with pytest.raises(ModelError, match="cannot read"):
        FileStates([file, file.with_name("none")], notes)


@pytest.mark.usefixtures("settled")
def test_files_that_have_changed_since_they_were_loaded_are_not_what_was_loaded(file: Path, notes: Path) -> None:
    states = FileStates([file], notes)
    assert states.weights_digest() == weights_digest(file, notes) == plain(b"weights")
    other = file.with_name("other")
    other.write_bytes(b"WEIGHTS")
    other.replace(file)
    with pytest.raises(ModelError, match="has changed since it was loaded; load it again"):
        states.weights_digest()
    assert FileStates([file], notes).weights_digest() == plain(b"WEIGHTS")


@pytest.mark.usefixtures("just_written")
def test_what_files_became_just_now_is_not_remembered(file: Path, notes: Path) -> None:
    states = FileStates([file], notes)
    assert [states.digest({}, lambda each=each: each * 16) for each in (b"a", b"b")] == [b"a" * 16, b"b" * 16]


def test_a_missing_file_is_the_models_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        weights_digest(tmp_path / "none.gguf", tmp_path)
    with pytest.raises(ModelError, match="cannot read"):
        weights_digest(tmp_path, tmp_path)


def test_a_fingerprint_depends_on_every_fact_and_on_no_order() -> None:
    facts: dict[str, object] = {"weights": "ab", "kv_type": "f16", "rotated": False}
    assert fingerprint(facts) == fingerprint(dict(reversed(facts.items())))
    assert len(fingerprint(facts)) == 16
    others: list[dict[str, object]] = [
        facts | {"kv_type": "q8_0"},
        facts | {"rotated": True},
        facts | {"more": 1},
        {"weights": "ab"},
    ]
    assert len({fingerprint(other) for other in [facts, *others]}) == 5
    assert fingerprint(facts).hex() == "033b7b83dfa09f18871cd11b0c3e182f"  # KV on disk is found by it


def test_large_files_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.gguf"
    path.write_bytes(bytes(5_000_000))

    def no_reading_at_once(self: io.BufferedReader, size: int | None = -1) -> bytes:
        raise AssertionError("a model must not be read at once")

    monkeypatch.setattr(Path, "read_bytes", no_reading_at_once)
    assert weights_digest(path, tmp_path / "notes") == plain(bytes(5_000_000))
