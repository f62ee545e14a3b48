"""When the window is full: whole old turns go, what follows slides, is read again, or the message is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from tests.serve.sessions.talker import GREEDY, Talker, head, is_as_read_anew, read_anew, settled

from rekindle.errors import SessionError
from rekindle.lab.live import Question, long_talk
from rekindle.serve.request import Done, Generation
from rekindle.serve.service import Service
from rekindle.serve.sessions.context import Exchange
from rekindle.serve.sessions.news import System
from rekindle.serve.sessions.options import Options, WindowPolicy
from rekindle.serve.sessions.sessions import Sessions
from rekindle.settings import Settings

WINDOW = 200
TEXT = "Vodris paints in orange. This one works as a farmer."


def talker_of(sessions: Sessions, policy: str) -> Talker:
    options = {"policy": policy, "window": WINDOW, "answer_tokens": 20}
    return Talker(sessions, policy, head=head("Read."), options=options)


def forgotten(talker: Talker) -> list[System]:
    return [news for news in talker.news if isinstance(news, System) and news.kind == "forgotten"]


def test_a_sliding_window_computes_only_what_is_new(toy: Service, sessions: Sessions) -> None:
    before = toy.num_computed
    talker = talker_of(sessions, "slide")
    new = len(talker.tokens())
    for number in range(60):
        end = talker.ask(f"{number} {TEXT}", 20)
        context = talker.session.context
        turn = context.turns[-1]
        new += len(turn.said) + len(turn.answer) + len(context.script.closing)
        assert end.turn == number + 1 and context.num_tokens <= WINDOW
    assert len(forgotten(talker)) >= 3
    assert settled(toy, talker) - before == new
    assert talker.session.status["forgotten_turns"] == forgotten(talker)[-1].detail["last_turn"]


@pytest.fixture
def keeping(request: pytest.FixtureRequest) -> Iterator[Service]:
    """A service whose sessions place anew what has slid so often."""
    with Service.open(Settings(engine="toy", store="none", block_tokens=16, session_slides=request.param)) as service:
        yield service
        service.check_integrity()


@pytest.mark.parametrize("keeping", [1, 3], indirect=True)
def test_what_has_slid_often_is_placed_anew_and_nothing_is_computed_for_it(keeping: Service) -> None:
    before = keeping.num_computed
    with Sessions(keeping) as sessions:
        options = {"window": 500, "answer_tokens": 20, "retention": 0.95}  # so each turn slides often
        talker = Talker(sessions, head=head("Read."), options=options)
        new = len(talker.tokens())
        most = 0
        for number in range(60):
            talker.ask(f"{number} {TEXT}", 20)
            context = talker.session.context
            turn = context.turns[-1]
            new += len(turn.said) + len(turn.answer) + len(context.script.closing)
            most = max(most, *(turn.slides for turn in context.turns))
        assert settled(keeping, talker) - before == new
        assert most <= keeping.settings.session_slides + 1  # one that went along before it was in whole blocks
    assert keeping.metrics.slid_tokens["placed"] > 0


def test_what_is_placed_anew_is_what_would_have_slid() -> None:
    """The toy's KV bears any rotation without loss, so it must make no difference to any answer."""
    answers = []
    for most in (1, 2, 1000):
        with Service.open(Settings(engine="toy", store="none", block_tokens=16, session_slides=most)) as service:
            with Sessions(service) as sessions:
                options = {"window": 500, "answer_tokens": 20, "retention": 0.9}
                talker = Talker(sessions, head=head("Read."), options=options)
                answers.append([talker.ask(f"{number} {TEXT}", 20).text for number in range(40)])
            assert (service.metrics.slid_tokens["placed"] > 0) == (most < 1000)
            service.check_integrity()
    assert answers[0] == answers[1] == answers[2]


def test_what_was_taken_back_does_not_come_back_with_what_is_placed_anew() -> None:
    """A turn that was read after another must not be placed as it was then, when that other was never said."""
    answers = []
    for most in (1, 1000):
        with Service.open(Settings(engine="toy", store="none", block_tokens=16, session_slides=most)) as service:
            with Sessions(service) as sessions:
                options = {"window": 500, "answer_tokens": 20, "retention": 0.9}
                talker = Talker(sessions, head=head("Read."), options=options)
                heard = [talker.ask(f"{number} {TEXT}", 20).text for number in range(18)]
                turns = talker.call(lambda talker=talker: talker.session.context.turns)  # type: ignore[misc]
                said = [Exchange(turn.user, turn.text, tuple(turn.answer)) for turn in turns]
                talker.do("amend", [said[0], Exchange("Never mind.", "I see."), *said[2:]])
                answers.append(heard + [talker.ask(f"{number} {TEXT}", 20).text for number in range(12)])
            assert (service.metrics.slid_tokens["placed"] > 0) == (most < 1000)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("keeping", [1], indirect=True)
def test_what_the_store_has_lost_slides_once_more(keeping: Service) -> None:
    before = keeping.num_computed
    with Sessions(keeping) as sessions:
        talker = talker_of(sessions, "slide")
        new = len(talker.tokens())
        for _ in range(40):
            talker.ask(TEXT, 20)
            turn = talker.session.context.turns[-1]
            new += len(turn.said) + len(turn.answer) + len(talker.session.context.script.closing)
            settled(keeping, talker)
            keeping._store.clear_memory()
        assert len(forgotten(talker)) >= 3
        assert settled(keeping, talker) - before == new
    assert keeping.metrics.slid_tokens["placed"] == 0


def test_a_slide_goes_down_to_the_retention_so_that_the_next_is_far(sessions: Sessions) -> None:
    talker = talker_of(sessions, "slide")
    while len(forgotten(talker)) < 3:
        talker.ask(TEXT, 20)
    assert all(each.detail["tokens"] > 0.2 * WINDOW for each in forgotten(talker))
    context = talker.call(lambda: talker.session.context)
    assert context.tokens[: len(context.script.opening)].tolist() == context.script.opening.tolist()


def test_a_window_that_is_read_again_is_exact(toy: Service, sessions: Sessions) -> None:
    talker = talker_of(sessions, "rebuild")
    while len(forgotten(talker)) < 3:
        talker.do("commit", TEXT)
        tokens = talker.tokens()
        end = talker.ask(None, 20)
        assert end.done is not None and end.done.tokens == read_anew(toy, tokens, 20).tokens


def test_what_slid_is_shared_with_nobody(toy: Service, sessions: Sessions) -> None:
    talker = talker_of(sessions, "slide")
    while not forgotten(talker):
        talker.ask(TEXT, 20)
    settled(toy, talker)
    prompt = talker.call(talker.session.prompt)
    assert prompt.salt
    context = talker.session.context
    exactly_known = len(context.script.opening) + len(context.turns[0].said)  # as others were before the first slide
    exact = read_anew(toy, prompt.tokens.tolist(), 4)
    asking = Generation(prompt=replace(prompt, salt=b""), max_tokens=4, sampling=GREEDY)
    *_, shared = toy.events(asking)
    assert isinstance(shared, Done)
    assert shared.usage.cached_tokens <= exactly_known and shared.tokens == exact.tokens


def test_after_a_reset_everything_is_exact_again_and_the_head_is_not_read_again(
    toy: Service, sessions: Sessions
) -> None:
    talker = talker_of(sessions, "slide")
    while not forgotten(talker):
        talker.ask(TEXT, 20)
    before = settled(toy, talker)
    talker.do("reset")
    assert settled(toy, talker) - before <= 1  # for its logits
    assert talker.session.context.salt == b""
    talker.do("commit", TEXT)
    tokens = talker.tokens()
    assert talker.ask(None, 8).done.tokens == read_anew(toy, tokens, 8).tokens  # type: ignore[union-attr]


def test_a_slid_session_can_leave_the_engine_and_come_back(toy: Service, sessions: Sessions) -> None:
    talker = talker_of(sessions, "slide")
    while not forgotten(talker):
        talker.ask(TEXT, 20)
    settled(toy, talker)
    talker.call(lambda: sessions.hibernate(talker.session))
    toy.settle()
    toy.evict_residents()
    before = toy.num_computed
    talker.do("commit", TEXT)
    said = len(talker.call(lambda: talker.session.context.open).said)
    assert settled(toy, talker) - before <= said + 1


def test_a_fork_of_a_slid_session_slides_on_by_itself(toy: Service, sessions: Sessions) -> None:
    talker = talker_of(sessions, "slide")
    while not forgotten(talker):
        talker.ask(TEXT, 20)
    fork = Talker(sessions, session=talker.call(lambda: sessions.fork(talker.session, "fork")))
    for each in (talker, fork):
        seen = len(forgotten(each))
        while len(forgotten(each)) == seen:
            each.ask(TEXT, 20)
    assert talker.session.context.salt != fork.session.context.salt


def test_a_window_may_refuse(sessions: Sessions) -> None:
    talker = talker_of(sessions, "refuse")
    with pytest.raises(SessionError, match="rewind or reset"):
        for _ in range(60):
            talker.ask(TEXT, 20)
    before = len(talker.messages)
    assert before > 4
    talker.do("rewind", 1)
    talker.ask(TEXT, 20)


@pytest.mark.parametrize("policy", ["slide", "rebuild", "refuse"])
def test_a_window_narrowed_under_a_waiting_message_makes_room_or_says_what_to_do(
    toy: Service, sessions: Sessions, policy: WindowPolicy
) -> None:
    talker = Talker(sessions, options={"policy": policy})
    for number in range(6):
        talker.ask(f"Tell me number {number}, and then some more of it.")
    talker.do("commit", "And now?")
    tokens = len(talker.tokens())
    narrow = Options(sampling=GREEDY, policy=policy, window=tokens - 10, answer_tokens=8)
    talker.do("configure", narrow)
    if policy == "refuse":
        with pytest.raises(SessionError, match="rewind or reset"):
            talker.do("answer", max_tokens=8)
        talker.do("rewind", 5)
        talker.do("commit", "And now?")
    end = talker.ask(max_tokens=8)
    assert end.done is not None and is_as_read_anew(toy, talker.tokens()[: end.done.plan.total], end.done)
    assert len(talker.tokens()) < tokens


def test_a_message_that_never_fits_is_refused_and_nothing_is_forgotten(sessions: Sessions) -> None:
    talker = talker_of(sessions, "slide")
    talker.ask(TEXT, 20)
    with pytest.raises(SessionError, match="with room for an answer"):
        talker.do("commit", TEXT * 20)
    assert len(talker.messages) == 2 and not forgotten(talker)


@pytest.fixture(scope="module")
def quantised() -> Iterator[Service]:
    with Service.open(Settings(threads=1, store="none", kv_type="q4_0", context=1024)) as service:
        yield service


def test_cells_that_lose_too_much_when_shifted_are_read_again(quantised: Service) -> None:
    with Sessions(quantised) as sessions:
        assert talker_of(sessions, "slide").session.status["policy"] == "rebuild"


def test_the_head_is_known_and_little_is_computed_however_long_the_talk(real: Service) -> None:
    facts = "Vodris paints in orange. Nouraix is based in Viniton."
    questions = [Question("Who paints in orange?", "Vodris paints in orange.")]
    talk = long_talk(real, facts, questions, turns=40, judged=40)
    assert talk.num_right == talk.num_right_alone == 40
    assert talk.computed_tokens == talk.new_tokens
