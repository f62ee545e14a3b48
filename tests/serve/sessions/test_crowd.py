"""Many sessions at once, each with facts of its own, in a context that can't hold them all: none hears of another's."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Iterator

import pytest
from tests.serve.sessions.talker import GREEDY, Talker, head, settled

from rekindle.model.ember.language import Document, Kind, Split, generate_document, generate_questions
from rekindle.serve.request import Done, Generation
from rekindle.serve.service import Service
from rekindle.serve.sessions.news import End
from rekindle.serve.sessions.sessions import Sessions
from rekindle.settings import Settings

NUM_SESSIONS = 32
SECONDS = float(os.environ.get("REKINDLE_CROWD_SECONDS", "0"))  # two rounds, and more until then
MAX_ANSWER = 40
SEED = 11
_log = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service.open(Settings(threads=1, store="none", context=4096)) as service:
        yield service


def document_of(number: int) -> Document:
    return generate_document(f"crowd {number}", num_people=3, split=Split.HELD_OUT)


def known(service: Service, document: Document) -> list[tuple[str, str]]:
    """Questions that the model answers right when nobody else is there."""
    questions = generate_questions(document, "crowd", kinds=(Kind.DIRECT,), count=6)
    return [(each.text, each.answer) for each in questions if alone(service, document, each.text) == each.answer]


def alone(service: Service, document: Document, question: str) -> str:
    prompt = service.chat_prompt([*head(document.text), {"role": "user", "content": question}])
    *_, done = service.events(Generation(prompt=prompt, max_tokens=MAX_ANSWER, sampling=GREEDY, use_prefix_cache=False))
    assert isinstance(done, Done)
    return done.text.strip()


class Crowd:
    """Sessions that all talk at once, in rounds."""

    def __init__(self, service: Service, sessions: Sessions) -> None:
        self.pick = random.Random(SEED)
        self.talkers: list[tuple[Talker, list[tuple[str, str]]]] = []
        self.num_right = self.num_asked = self.num_interrupted = 0
        for number in range(NUM_SESSIONS):
            document = document_of(number)
            if questions := known(service, document):
                options = {"window": 400, "answer_tokens": MAX_ANSWER}
                talker = Talker(sessions, str(number), head=head(document.text), options=options)
                self.talkers.append((talker, questions))

    def round(self) -> None:
        asked: list[tuple[Talker, str, bool]] = []
        for talker, questions in self.pick.sample(self.talkers, len(self.talkers)):
            question, answer = self.pick.choice(questions)
            for word in question.split(" "):
                talker.do("append", f"{word} ")
            talker.do("answer", max_tokens=MAX_ANSWER)
            is_heard = self.pick.random() < 0.7
            if not is_heard:
                talker.sessions.call(lambda talker=talker: interrupt(talker))  # type: ignore[misc]
            asked.append((talker, answer, is_heard))
        for talker, answer, is_heard in asked:
            end = talker.until(lambda news: isinstance(news, End))
            assert isinstance(end, End)
            text = end.text.strip()
            is_broken_off = end.reason == "interrupted"
            self.num_asked += 1
            self.num_interrupted += is_broken_off
            self.num_right += answer.startswith(text) if is_broken_off else answer == text
            assert is_heard or is_broken_off or end.reason == "stop"


def interrupt(talker: Talker) -> None:
    if talker.session.state == "answering":
        talker.session.interrupt()


def test_nobody_hears_of_anothers_facts_and_nothing_leaks(service: Service) -> None:
    with Sessions(service) as sessions:
        crowd, until = Crowd(service, sessions), time.monotonic() + SECONDS
        assert len(crowd.talkers) > 0.8 * NUM_SESSIONS
        for number in range(10**6):
            if number >= 2 and time.monotonic() >= until:
                break
            crowd.round()
        _log.info("%d of %d right, %d interrupted", crowd.num_right, crowd.num_asked, crowd.num_interrupted)
        assert crowd.num_right >= 0.95 * crowd.num_asked, (crowd.num_right, crowd.num_asked, SEED)
        assert crowd.num_interrupted > 0
        settled(service, crowd.talkers[0][0])
        service.check_integrity()
    service._worker.call(lambda scheduler: None)
    assert not any(each.holder for each in service._worker._scheduler.residents._all)
    service.evict_residents()
    assert service._engine.num_free_cells == service.num_cells
    service.check_integrity()
