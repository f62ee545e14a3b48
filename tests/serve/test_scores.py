"""What was learned of chunks outlives the process, in files that may be damaged, foreign or too many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.engine.conftest import TOY_SPEC
from tests.serve.blending import HEAD, A, learned

from rekindle.kv.folder import Folder
from rekindle.serve import scores as scores_module
from rekindle.serve.scores import Scores
from rekindle.serve.service import Service
from rekindle.settings import Settings
from rekindle.tokens import as_tokens


def test_scores_live_on_in_files_and_bad_files_are_none(tmp_path: Path) -> None:
    head = as_tokens(HEAD)
    learned(A, scores=Scores(TOY_SPEC.fingerprint, head, tmp_path))
    again = Scores(TOY_SPEC.fingerprint, head, tmp_path)
    key = again.key(as_tokens(A), b"")
    (file,) = tmp_path.rglob(key.hex())
    assert again.get(key) is None
    again.fetch(key, len(A) - 1)
    assert again.get(key) is None
    again.fetch(key, len(A))
    scores = again.get(key)
    assert scores is not None and scores.tolist() == [1.0] * len(A)
    good = file.read_bytes()
    for bad in (b"", b"foreign", good[:-1], bytes([good[0] ^ 1]) + good[1:], good[:-1] + bytes([good[-1] ^ 1])):
        file.write_bytes(bad)
        damaged = Scores(TOY_SPEC.fingerprint, head, tmp_path)
        damaged.fetch(key, len(A))
        assert damaged.get(key) is None
    for other in (Scores(b"other model", head, tmp_path), Scores(TOY_SPEC.fingerprint, as_tokens([1, 2]), tmp_path)):
        assert other.key(as_tokens(A), b"") != key
    assert again.key(as_tokens(A), b"salt") != key
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    again.clear()
    assert not any(path.is_file() for path in tmp_path.rglob("*")) and again.get(key) is None


def test_a_cleared_folder_has_no_scores(tmp_path: Path) -> None:
    learned(A, scores=Scores(TOY_SPEC.fingerprint, as_tokens(HEAD), tmp_path))
    assert any(path.is_file() for path in tmp_path.rglob("*"))
    Folder(tmp_path).clear()
    assert not list(tmp_path.iterdir())


def test_to_clear_every_model_takes_the_scores_of_all_and_to_clear_one_leaves_the_others(tmp_path: Path) -> None:
    with Service.open(Settings(engine="toy", store=str(tmp_path))) as service:
        service._probed.result(60)  # which puts a file into the folder for a moment
        for fingerprint in (service.engine_spec.fingerprint, b"other model"):
            learned(A, scores=Scores(fingerprint, service.head, tmp_path))
        service.clear_cache()
        assert {path.parent.name for path in tmp_path.rglob("*") if path.is_file()} == {b"other model".hex()}
        service.clear_cache(every_model=True)
        assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_files_of_scores_stay_as_few_as_they_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores_module, "MAX_FILES", 20)
    scores = Scores(TOY_SPEC.fingerprint, as_tokens(HEAD), tmp_path)
    keys = [scores.key(as_tokens([number]), b"") for number in range(60)]
    for key in keys:
        scores.add(key, np.ones(1, np.float32))
        assert sum(path.is_file() for path in tmp_path.rglob("*")) <= 22
    again = Scores(TOY_SPEC.fingerprint, as_tokens(HEAD), tmp_path)
    again.fetch(keys[-1], 1)
    again.fetch(keys[0], 1)
    assert again.get(keys[-1]) is not None and again.get(keys[0]) is None, "the oldest went"
