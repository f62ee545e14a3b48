"""What was said can be changed afterwards: the session is then as if it had been so all along."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.api.steps import steps_of
from tests.serve.sessions.talker import GREEDY, Talker, head, is_as_read_anew, settled

from rekindle.errors import InvalidRequest, SessionError
from rekindle.serve.service import Service
from rekindle.serve.sessions.context import Exchange
from rekindle.serve.sessions.news import End, Spent, System
from rekindle.serve.sessions.session import Session
from rekindle.serve.sessions.sessions import Sessions

WORDS = st.sampled_from(["Vodris paints in orange.", "Who paints?", "Ünd 😀", "Where is it based?\n"])
EXCHANGES = st.lists(st.builds(Exchange, WORDS, WORDS), max_size=4)


def exchanges(session: Session) -> list[Exchange]:
    return [Exchange(turn.user, turn.text, tuple(turn.answer)) for turn in session.context.turns]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    said=EXCHANGES,
    pending=WORDS,
    instructions=st.sampled_from(["", "Read.", "Answer briefly."]),
    keep=st.integers(0, 3),
)
def test_answers_are_those_of_a_whole_prompt(
    real: Service, said: list[Exchange], pending: str, instructions: str, keep: int
) -> None:
    with Sessions(real) as sessions:
        talker = Talker(sessions, head=head("Read."))
        talker.ask("Vodris paints in orange. Who paints in orange?", 6)
        talker.ask("Who are you?", 6)
        kept = talker.call(lambda: exchanges(talker.session))[:keep]
        messages = head(instructions) if instructions else []
        talker.do("amend", [*kept, *said], pending=pending, head=messages)
        tokens = talker.tokens()
        for each in [*kept, *said]:
            messages = [*messages, _as("user", each.user), _as("assistant", each.text)]
        expected = real.chat_prompt([*messages, _as("user", pending)])
        assert tokens == expected.tokens.tolist()
        end = talker.ask(None, 6)
        assert end.done is not None and is_as_read_anew(real, tokens, end.done)


def test_only_what_differs_is_read_again(real: Service, real_sessions: Sessions) -> None:
    talker = Talker(real_sessions, head=head("Vodris paints in orange. " * 10))
    for text in ("Who paints in orange?", "Who are you?", "Who is Vodris?"):
        talker.ask(text)
    before, said = settled(real, talker), talker.call(lambda: exchanges(talker.session))
    talker.do("amend", said[:2])
    assert settled(real, talker) - before <= 1  # what follows the second turn was read already
    talker.do("amend", [said[0], Exchange("Who?", "I.")])
    assert 0 < settled(real, talker) - before <= 24


def test_what_can_not_be_changes_nothing(sessions: Sessions) -> None:
    talker = Talker(sessions, options={"window": 200})
    talker.ask("Who paints in orange?")
    before = talker.tokens()
    refused: list[tuple[type[Exception], Callable[[Session], object]]] = [
        (InvalidRequest, lambda session: session.amend([Exchange(" ", "I.")])),
        (SessionError, lambda session: session.amend([], pending="word " * 300)),
        (SessionError, lambda session: session.amend([], head=head("word " * 300))),
    ]
    for error, action in refused:
        with pytest.raises(error):
            talker.call(lambda action=action: action(talker.session))  # type: ignore[misc]
        assert talker.tokens() == before
    assert talker.ask("And now?").turn == 2


def test_a_history_that_is_too_long_loses_its_oldest_turns(sessions: Sessions) -> None:
    talker = Talker(sessions, options={"window": 200})
    talker.do("amend", [Exchange(f"This is message {number}.", "I see.") for number in range(30)], pending="And?")
    news = talker.until(lambda news: isinstance(news, System) and news.kind == "forgotten")
    assert isinstance(news, System) and news.detail["first_turn"] == 1 and news.detail["last_turn"] < 30
    assert talker.ask(None).turn == 31
    assert talker.messages[-2]["content"] == "And?" and len(talker.tokens()) <= 200


def test_nothing_is_changed_under_an_answer(toy: Service, sessions: Sessions) -> None:
    talker = Talker(sessions)
    with steps_of(toy):  # so that it does not end before
        talker.do("commit", "Go on for long.")
        talker.do("answer", max_tokens=900)
        with pytest.raises(SessionError, match="interrupt"):
            talker.do("amend", [])
        talker.do("interrupt")


def test_what_an_interrupted_answer_has_cost_is_told(toy: Service, sessions: Sessions) -> None:
    talker = Talker(sessions)
    with steps_of(toy) as steps:
        talker.do("commit", "Go on for long.")
        talker.do("answer", max_tokens=900, sampling=GREEDY)
        steps.let(20)
        talker.first_token()
        talker.do("interrupt")
    talker.until(lambda news: isinstance(news, End))
    spent = talker.until(lambda news: isinstance(news, Spent))
    assert isinstance(spent, Spent) and spent.turn == 1
    assert spent.done.reason == "cancelled" and spent.done.usage.prompt_tokens > 0


def test_a_session_can_be_given_other_options(sessions: Sessions) -> None:
    talker = Talker(sessions, head=head("Read."))
    for number in range(8):
        talker.ask(f"This is message number {number}, about nothing.")
    options = talker.session.options
    talker.call(lambda: talker.session.configure(replace(options, window=150)))
    talker.ask("And now?")
    assert len(talker.tokens()) <= 150
    with pytest.raises(SessionError, match="head has"):
        talker.call(lambda: talker.session.configure(replace(options, window=4)))
    assert talker.session.window == 150


def _as(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
