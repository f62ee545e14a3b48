"""Whatever is done to sessions, in whatever order, their answers are those of somebody who reads the same anew.

A model of what each session should have said and heard stands beside: messages, drafts, contexts.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from tests.serve.sessions.talker import Talker, head, is_as_read_anew

from rekindle.serve.service import Service
from rekindle.serve.sessions.news import End
from rekindle.serve.sessions.sessions import Sessions
from rekindle.settings import Settings

WORDS = ("Vodris", "paints in", "orange.", "Who", " is based", "in Viniton?\n", "Ünd 😀")
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
MOST_SESSIONS = 4
ANSWER = 6


class Expected:
    """What a session should be."""

    def __init__(self) -> None:
        self.turns: dict[str, list[list[str]]] = {"main": [], "other": []}
        self.active = "main"
        self.draft = dict.fromkeys(self.turns, "")

    @property
    def now(self) -> list[list[str]]:
        return self.turns[self.active]


class Histories(RuleBasedStateMachine):
    """Several sessions that come from one another."""

    service: ClassVar[Service]
    folder: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.sessions = Sessions(self.service)
        self.talkers: list[tuple[Talker, Expected]] = []
        contexts = {"other": head("Answer briefly.")}
        self.talkers.append((Talker(self.sessions, "0", head=head("Read."), contexts=contexts), Expected()))
        self.names = 1

    def pick(self, data: st.DataObject) -> tuple[Talker, Expected]:
        return self.talkers[data.draw(st.integers(0, len(self.talkers) - 1))]

    @rule(data=st.data(), text=TEXTS)
    def append(self, data: st.DataObject, text: str) -> None:
        talker, expected = self.pick(data)
        talker.do("append", text)
        expected.draft[expected.active] += text

    @rule(data=st.data(), text=TEXTS)
    def replace(self, data: st.DataObject, text: str) -> None:
        talker, expected = self.pick(data)
        talker.do("replace", text)
        expected.draft[expected.active] = text

    @rule(data=st.data(), text=TEXTS, how=st.sampled_from(["whole", "interrupt", "cut"]))
    def ask(self, data: st.DataObject, text: str, how: str) -> None:
        """The draft if there is one, or this text; the answer is heard whole, or broken off, or cut afterwards."""
        talker, expected = self.pick(data)
        words = expected.draft[expected.active] or text
        talker.do("commit", words)
        tokens = talker.tokens()
        if how == "interrupt":
            talker.do("answer", max_tokens=500)
            is_over = isinstance(talker.first_token(), End)
            answer = talker.do("interrupt")
            if not is_over:
                talker.until(lambda news: isinstance(news, End))
        else:
            end = talker.ask(None, ANSWER)
            assert end.done is not None and is_as_read_anew(self.service, tokens, end.done)
            answer = end.text if how == "whole" else talker.do("interrupt", tokens=2)
        expected.now.append([words, answer])
        expected.draft[expected.active] = ""

    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        talker, expected = self.pick(data)
        turn = data.draw(st.integers(0, len(expected.now)))
        talker.do("rewind", turn)
        del expected.now[turn:]
        expected.draft[expected.active] = ""

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        talker, expected = self.pick(data)
        talker.do("reset")
        expected.now.clear()
        expected.draft[expected.active] = ""

    @rule(data=st.data(), name=st.sampled_from(["main", "other"]))
    def swap(self, data: st.DataObject, name: str) -> None:
        talker, expected = self.pick(data)
        talker.do("swap", name)
        draft, expected.draft[expected.active] = expected.draft[expected.active], ""
        expected.active = name
        expected.draft[name] = draft or expected.draft[name]

    @precondition(lambda self: len(self.talkers) < MOST_SESSIONS)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        talker, expected = self.pick(data)
        name, self.names = str(self.names), self.names + 1
        session = talker.call(lambda: self.sessions.fork(talker.session, name))
        self.talkers.append((Talker(self.sessions, session=session), deepcopy(expected)))

    @rule(data=st.data())
    def hibernate(self, data: st.DataObject) -> None:
        talker, _ = self.pick(data)
        assert talker.call(lambda: self.sessions.hibernate(talker.session)) is not None

    @rule()
    def make_room(self) -> None:
        self.service.evict_residents()

    @rule()
    def start_anew(self) -> None:
        """All sessions end, as at a restart, and are resumed by their handles."""
        handles = [(talker.sessions.handle(talker.session), expected) for talker, expected in self.talkers]
        self.sessions.close()
        self.service.settle()
        self.service.evict_residents()
        self.sessions = Sessions(self.service)
        self.talkers = [(self.resumed(handle), expected) for handle, expected in handles]

    def resumed(self, handle: str | None) -> Talker:
        assert handle is not None
        session = self.sessions.call(lambda: self.sessions.resume(handle)).result(60)
        return Talker(self.sessions, session=session)

    @invariant()
    def it_is_as_expected(self) -> None:
        for talker, expected in self.talkers:
            said = [(turn[0], turn[1]) for turn in expected.now]
            heard = talker.messages
            assert [(one["content"], two["content"]) for one, two in zip(heard[::2], heard[1::2], strict=True)] == said
            status: dict[str, Any] = talker.call(lambda talker=talker: talker.session.status)  # type: ignore[misc]
            assert (status["draft"], status["context"]) == (expected.draft[expected.active], expected.active)

    def teardown(self) -> None:
        self.sessions.close()
        self.service.check_integrity()
        assert not any(each.holder for each in self.service._worker._scheduler.residents._all)


@pytest.fixture(scope="module", params=["toy", "auto"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    folder = tempfile.mkdtemp()
    try:
        with Service.open(Settings(engine=request.param, threads=1, store=folder, session_pause_seconds=0)) as service:
            yield service
    finally:
        shutil.rmtree(folder)


def test_any_history_is_exact(service: Service) -> None:
    Histories.service = service
    how = settings(max_examples=40, stateful_step_count=20)
    run_state_machine_as_test(Histories, settings=how)  # type: ignore[no-untyped-call]
