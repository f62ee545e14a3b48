"""Sessions outlive the process, however it ends: each is resumed by its handle, and only the new message is computed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
from tests.serve.sessions.talker import GREEDY, Talker, head, is_as_read_anew, settled

from rekindle.errors import SessionError
from rekindle.kv.speed import Speed
from rekindle.serve.service import Service
from rekindle.serve.sessions import saved
from rekindle.serve.sessions.options import Options
from rekindle.serve.sessions.saved import SavedSessions
from rekindle.serve.sessions.session import Session
from rekindle.serve.sessions.sessions import Sessions
from rekindle.settings import Settings

NUM_SESSIONS = 10
FINGERPRINT = b"f" * 16
FIRST_LIFE = """
import sys, time
from tests.serve.sessions.talker import Talker, head
from rekindle.serve.service import Service
from rekindle.serve.sessions.sessions import Sessions
from rekindle.settings import Settings
import json

service = Service.open(Settings(threads=1, store=sys.argv[1]))
sessions = Sessions(service)
handles = {}
for number in range(int(sys.argv[2])):
    talker = Talker(sessions, str(number), head=head(f"The house has the number {number}. " * 20))
    talker.ask("What number has the house?", 10)
    handles[sessions.handle(talker.session)] = talker.messages
    while talker.call(lambda: talker.session.status["reading"]):
        time.sleep(0.01)
service.settle()
print(json.dumps(handles), flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, list[dict[str, str]]]]]:
    """A store, and what was said by a process that was killed without a chance to do anything about it."""
    folder = tmp_path_factory.mktemp("store")
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", FIRST_LIFE, str(folder), str(NUM_SESSIONS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
    assert process.stdout is not None
    said = json.loads(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    yield folder, said


def test_after_a_kill_all_sessions_go_on_and_compute_only_the_new_message(
    killed: tuple[Path, dict[str, list[dict[str, str]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Speed, "slower_than", lambda *_: None)  # a busy disk would be left alone
    folder, said = killed
    assert len(said) == NUM_SESSIONS
    with Service.open(Settings(threads=1, store=str(folder))) as service, Sessions(service) as sessions:
        for handle, messages in said.items():
            before = service.num_computed
            resumed = resume(sessions, handle)
            talker = Talker(sessions, session=resumed)
            assert talker.messages == messages
            after = settled(service, talker)
            assert after - before <= 1 and len(talker.tokens()) > 100  # a token at most, for its logits
            talker.do("commit", "What number has the house?")
            tokens = talker.tokens()
            turn = talker.call(lambda talker=talker: talker.session.context.open)  # type: ignore[misc]
            assert settled(service, talker) - after == len(turn.said)
            done = talker.ask(None, 10).done
            assert done is not None and done.usage.computed_tokens == 0
            assert is_as_read_anew(service, tokens, done)


def resume(sessions: Sessions, handle: str, salt: bytes = b"") -> Session:
    return sessions.call(lambda: sessions.resume(handle, salt=salt)).result(60)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Service]:
    with Service.open(Settings(engine="toy", store=str(tmp_path))) as service:
        yield service


def test_a_handle_opens_only_its_owners_session(kept: Service) -> None:
    with Sessions(kept) as sessions:
        talker = Talker(sessions, salt=b"owner")
        talker.ask("Hello.")
        handle = talker.call(lambda: sessions.handle(talker.session))
        for salt, given in ((b"other", handle), (b"owner", "unknown")):
            with pytest.raises(SessionError, match="no session of this handle"):
                resume(sessions, given, salt)
        assert talker.call(lambda: sessions.resume(handle, salt=b"owner")) is talker.session
    with Sessions(kept) as later, pytest.raises(SessionError, match="no session of this handle"):
        resume(later, handle, b"other")


def test_options_contexts_drafts_and_an_open_message_come_back(kept: Service) -> None:
    options = {"policy": "rebuild", "window": 300}
    with Sessions(kept) as sessions:
        talker = Talker(sessions, contexts={"other": head("Be brief.")}, options=options)
        talker.do("swap", "other")
        talker.do("commit", "Hello.")
        handle = talker.call(lambda: sessions.handle(talker.session))
    with Sessions(kept) as later:
        resumed = Talker(later, session=resume(later, handle))
        assert resumed.session.options == Options(sampling=GREEDY, policy="rebuild", window=300)
        assert (resumed.session.state, resumed.session.active) == ("committed", "other")
        assert resumed.ask().turn == 1


def test_a_torn_or_foreign_file_is_refused(kept: Service) -> None:
    with Sessions(kept) as sessions:
        talker = Talker(sessions)
        handle = talker.call(lambda: sessions.handle(talker.session))
    assert kept.folder is not None
    (file,) = (kept.folder / "sessions").glob("*/*.json")
    assert file.stat().st_mode & 0o077 == file.parent.stat().st_mode & 0o077 == 0
    whole = file.read_text()
    damaged = (
        (whole[:50], "can't be read"),
        (whole.replace('"version": 1', '"version": 0'), "another model"),
        (whole.replace('"retention"', '"retentive"'), "can't be read"),  # as by a later build of this version
        (whole.replace('"turns"', '"exchanges"'), "can't be read"),
    )
    for text, says in damaged:
        assert text != whole
        file.write_text(text)
        with Sessions(kept) as later, pytest.raises(SessionError, match=says):
            resume(later, handle)


DAY = 24 * 3600.0


@pytest.fixture
def few(tmp_path: Path) -> Iterator[Service]:
    """Keeps two sessions of an owner, for ten days."""
    with Service.open(
        Settings(engine="toy", store=str(tmp_path), session_files=2, session_ttl_seconds=10 * DAY)
    ) as few:
        yield few


def begun(service: Service, salt: bytes, *names: str) -> list[str]:
    """Handles of new sessions, which were ended with their process."""
    with Sessions(service) as sessions:
        talkers = [Talker(sessions, name, salt=salt) for name in names]
        return [str(talker.call(lambda talker=talker: sessions.handle(talker.session))) for talker in talkers]  # type: ignore[misc]


def aged(service: Service, *, days: float) -> None:
    """All files are so much older."""
    assert service.folder is not None
    for file in (service.folder / "sessions").glob("*/*"):
        changed = file.stat().st_mtime - days * DAY
        os.utime(file, (changed, changed))


def still(service: Service, salt: bytes, handles: list[str]) -> list[bool]:
    """Which can be resumed; nothing that is asked is used."""
    found = []
    with Sessions(service) as sessions:
        for handle in handles:
            try:
                sessions.call(lambda handle=handle: sessions._saved.read(salt, handle)).result(60)  # type: ignore[misc]
                found.append(True)
            except SessionError:
                found.append(False)
    return found


def test_an_owners_oldest_sessions_go_when_there_are_too_many_and_no_others(few: Service) -> None:
    theirs = begun(few, b"other", "a", "b")
    aged(few, days=1)
    old = begun(few, b"owner", "a")
    aged(few, days=1)
    new = begun(few, b"owner", "b", "c")
    assert still(few, b"owner", [*old, *new]) == [False, True, True]
    assert still(few, b"other", theirs) == [True, True]


def test_open_sessions_are_not_too_many(few: Service) -> None:
    with Sessions(few) as sessions:
        for name in ("a", "b", "c"):
            Talker(sessions, name, salt=b"owner")
        sessions.call(sessions.tick).result(60)
        assert few.folder is not None
        assert len(list((few.folder / "sessions").glob("*/*.json"))) == 3
    with Sessions(few) as sessions:
        sessions.call(lambda: None).result(60)
        assert len(list((few.folder / "sessions").glob("*/*.json"))) == 2


def test_what_was_not_used_for_long_goes_and_what_a_killed_writer_left(few: Service) -> None:
    handles = begun(few, b"owner", "a", "b")
    assert few.folder is not None
    (owner,) = (few.folder / "sessions").iterdir()
    (owner / "half.tmp").write_text("{")
    aged(few, days=9)
    with Sessions(few) as sessions:
        resume(sessions, handles[1], b"owner")  # is a use
    aged(few, days=2)
    with Sessions(few) as sessions:
        sessions.call(sessions.tick).result(60)
    assert still(few, b"owner", handles) == [False, True]
    assert len(list(owner.iterdir())) == 1


def test_an_ended_session_is_forgotten(kept: Service) -> None:
    with Sessions(kept) as sessions:
        talker = Talker(sessions)
        handle = talker.call(lambda: sessions.handle(talker.session))
        talker.call(lambda: sessions.end(talker.session))
        with pytest.raises(SessionError):
            resume(sessions, handle)


def test_a_session_whose_file_cannot_be_deleted_has_ended_and_the_log_says_why(
    kept: Service, caplog: pytest.LogCaptureFixture
) -> None:
    with Sessions(kept) as sessions:
        talker = Talker(sessions)
        assert kept.folder is not None
        (file,) = (kept.folder / "sessions").glob("*/*.json")
        file.unlink()
        file.mkdir()
        talker.call(lambda: sessions.end(talker.session))
        assert not talker.call(sessions.all)
    assert "the file of session one could not be deleted" in caplog.text


def test_two_processes_that_write_a_session_at_once_leave_one_of_both_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two servers on one folder, if a client has gone from one to the other."""
    one, other = (SavedSessions(tmp_path, FINGERPRINT, max_files=9, ttl_seconds=DAY) for _ in range(2))

    def in_two_parts(content: dict[str, Any], file: TextIO) -> None:
        text = json.dumps(content)
        file.write(text[:50])
        file.flush()
        monkeypatch.undo()
        other.write(b"owner", "key", {"name": "other"})
        file.write(text[50:])

    monkeypatch.setattr(saved, "json", SimpleNamespace(**vars(json) | {"dump": in_two_parts}))
    one.write(b"owner", "key", {"name": "one" * 100})
    assert one.read(b"owner", "key")["name"] == "one" * 100
    assert len(list(tmp_path.glob("*/*"))) == 1


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    files = SavedSessions(tmp_path, FINGERPRINT, max_files=9, ttl_seconds=DAY)
    files.write(b"owner", "key", {"name": "one"})
    with pytest.raises(TypeError):
        files.write(b"owner", "key", {"name": object()})
    assert files.read(b"owner", "key")["name"] == "one"
    assert len(list(tmp_path.glob("*/*"))) == 1
