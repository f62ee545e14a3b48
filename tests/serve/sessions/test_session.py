"""What can be done to one session, and what each of it computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.api.steps import steps_of
from tests.serve.sessions.talker import Talker, head, read_anew, settled

from rekindle.errors import InvalidRequest, Overloaded, RekindleError, SessionError, Stopping
from rekindle.serve.request import Generation
from rekindle.serve.service import Service
from rekindle.serve.sessions.news import End, System, Token, UserInput
from rekindle.serve.sessions.options import Options
from rekindle.serve.sessions.sessions import Sessions
from rekindle.settings import Settings

LONG = "Vodris paints in orange. This one works as a farmer. Nouraix is based in Viniton."


def test_tokens_are_those_of_the_whole_conversation(real: Service, real_sessions: Sessions) -> None:
    talker = Talker(real_sessions, head=head("Answer briefly."))
    for text in ("Hello.", "  Who are you?\n And why? ", "Thank you."):
        talker.ask(text, None)
    whole = real.chat_prompt([*head("Answer briefly."), *talker.messages, {"role": "user", "content": "Goodbye."}])
    talker.do("commit", "Goodbye.")
    assert talker.tokens() == whole.tokens.tolist()


def test_nothing_said_is_computed_twice(toy: Service, sessions: Sessions) -> None:
    before = toy.num_computed
    talker = Talker(sessions, head=head(LONG))
    for number in range(5):
        talker.ask(f"{LONG} {number}", 8)
    used = len(talker.tokens())
    assert settled(toy, talker) - before == used


def test_after_increments_the_first_token_needs_no_model_call(real: Service, real_sessions: Sessions) -> None:
    talker = Talker(real_sessions, head=head(LONG))
    for word in ["Who", "paints", "in", "orange?"]:
        talker.do("append", f"{word} ")
    talker.do("commit")
    settled(real, talker)
    end = talker.ask(None, None)
    assert end.done is not None
    assert (end.text.strip(), end.done.timings.prefill_calls, end.done.usage.computed_tokens) == (
        "Vodris paints in orange.",
        0,
        0,
    )


@pytest.fixture
def eager() -> Iterator[Service]:
    """Reads a draft to the beginning of its answer at once."""
    with Service.open(Settings(threads=1, store="none", session_pause_seconds=0)) as service:
        yield service


def test_a_draft_that_rests_is_read_to_its_answer(eager: Service) -> None:
    with Sessions(eager) as sessions:
        talker = Talker(sessions, head=head(LONG))
        talker.do("replace", "Who paints in blue?")
        settled(eager, talker)
        talker.do("replace", "Who paints in orange?")
        before = settled(eager, talker)
        talker.do("commit")
        assert talker.session.status["reading"] is False  # all of it was read
        end = talker.ask(None, None)
        assert end.done is not None and end.text.strip() == "Vodris paints in orange."
        assert (end.done.timings.prefill_calls, end.done.usage.computed_tokens) == (0, 0)
        answered = len(end.done.tokens) + len(talker.session.context.script.closing)
        assert settled(eager, talker) - before == answered


def test_a_draft_that_goes_on_has_read_in_vain_no_more_than_the_end_of_a_message(eager: Service) -> None:
    with Sessions(eager) as sessions:
        talker = Talker(sessions, head=head(LONG))
        before = settled(eager, talker)
        words = ["Who", "paints", "in", "orange?"]
        for word in words:
            talker.do("append", f"{word} ")
            settled(eager, talker)
        context = talker.call(lambda: talker.session.context)
        draft = talker.call(lambda: len(context.draft_tokens))
        asking = talker.call(lambda: len(context.said(context.draft))) - draft
        assert settled(eager, talker) - before <= draft + (len(words) + 1) * (asking + 1)


def test_nothing_is_read_in_vain_while_somebody_else_is_answered() -> None:
    with toy_with(session_pause_seconds=0) as toy, Sessions(toy) as sessions:
        one, two = Talker(sessions, "one"), Talker(sessions, "two")
        settled(toy, one)
        settled(toy, two)
        with steps_of(toy) as steps:  # so that the answer does not end before
            one.do("commit", LONG)
            one.do("answer", max_tokens=3000)
            steps.let(20)
            one.first_token()
            two.do("replace", LONG)
            tokens = two.call(lambda: len(two.session.context.tokens) + len(two.session.context.draft_tokens))
            fed = two.call(lambda: two.session._reader.line(two.session.context)._fed)
            assert one.session.state == "answering" and fed is not None and len(fed) == tokens


def test_a_revised_draft_computes_what_differs(toy: Service, sessions: Sessions) -> None:
    talker = Talker(sessions)
    talker.do("replace", f"{LONG} The man")
    before = settled(toy, talker)
    talker.do("replace", f"{LONG} The woman")
    assert 1 <= settled(toy, talker) - before <= 3


def test_interrupting_keeps_what_was_said(toy: Service, sessions: Sessions) -> None:
    talker = Talker(sessions)
    with steps_of(toy) as steps:  # so that it does not end before
        talker.do("commit", LONG)
        talker.do("answer", max_tokens=2000)
        steps.let(20)
        talker.first_token()
        kept = talker.do("interrupt")
    heard = "".join(news.text for news in talker.news if isinstance(news, Token))
    assert kept.startswith(heard) or heard.startswith(kept)
    end = talker.until(lambda news: isinstance(news, End))
    assert isinstance(end, End) and (end.reason, end.text) == ("interrupted", kept)
    shorter = talker.do("interrupt", characters=2)
    assert len(shorter) <= 2 and kept.startswith(shorter)
    assert talker.messages[-1] == {"role": "assistant", "content": shorter}
    assert talker.do("interrupt", tokens=0) == ""


def test_what_follows_an_interrupt_is_what_a_reader_of_the_same_would_say(toy: Service, sessions: Sessions) -> None:
    talker = Talker(sessions)
    talker.ask(LONG, 20)
    talker.do("interrupt", tokens=7)
    talker.do("commit", "Go on.")
    tokens = talker.tokens()
    assert list(talker.ask(None, 8).done.tokens) == list(read_anew(toy, tokens, 8).tokens)  # type: ignore[union-attr]


def test_what_a_session_has_cost_counts_on_when_a_context_begins_anew(toy: Service, sessions: Sessions) -> None:
    talker = Talker(sessions, head=head(LONG))
    talker.ask("Hello.")
    settled(toy, talker)
    before = talker.call(lambda: talker.session.status)
    assert before["computed_tokens"] and before["generated_tokens"] == 8
    talker.do("add_context", "main", head("Answer briefly."))
    talker.ask("Hello.")
    settled(toy, talker)
    after = talker.call(lambda: talker.session.status)
    assert after["computed_tokens"] > before["computed_tokens"] and after["generated_tokens"] == 16


def test_going_back_switching_and_copying_compute_nothing(toy: Service, sessions: Sessions) -> None:
    talker = Talker(sessions, head=head(LONG), contexts={"other": head("Answer briefly.")})
    for text in ("One.", "Two.", "Three."):
        talker.ask(text)
    before = settled(toy, talker)
    talker.do("rewind", 2)
    talker.do("swap", "other")
    talker.do("swap", "main")
    fork = Talker(sessions, session=talker.call(lambda: sessions.fork(talker.session, "copy")))
    talker.do("reset")
    # where no logits were kept, the last token is computed again for them
    assert settled(toy, talker) - before <= 5
    assert len(fork.messages) == 4 and not talker.messages
    fork.ask("Four.")
    assert len(fork.messages) == 6 and not talker.messages


def test_the_draft_goes_along_into_another_context(sessions: Sessions) -> None:
    talker = Talker(sessions, contexts={"other": head("Answer briefly.")})
    talker.do("append", "What is")
    talker.do("swap", "other")
    assert talker.session.status["draft"] == "What is"
    talker.do("swap", "main")
    assert talker.session.status["draft"] == "What is"


def test_a_draft_grows_while_an_answer_comes(toy: Service, sessions: Sessions) -> None:
    talker = Talker(sessions)
    talker.do("commit", LONG)
    talker.do("answer", max_tokens=40)
    talker.do("append", "And then?")
    talker.until(lambda news: isinstance(news, End))
    assert talker.session.status["draft"] == "And then?"
    end = talker.ask()
    assert end.turn == 2 and talker.messages[2]["content"] == "And then?"


def test_a_message_that_was_not_answered_grows(sessions: Sessions) -> None:
    talker = Talker(sessions)
    talker.do("commit", "One.")
    talker.do("commit", "Two.")
    assert talker.messages == [{"role": "user", "content": "One.\nTwo."}]


def test_a_hibernating_session_is_woken_by_whatever_is_done(toy: Service, sessions: Sessions) -> None:
    talker = Talker(sessions)
    talker.ask(LONG)
    assert talker.call(lambda: sessions.hibernate(talker.session)) is None  # no folder to keep it in
    assert not talker.session.is_hot
    toy.settle()
    toy.evict_residents()
    end = talker.ask("Go on.")
    assert talker.session.is_hot and end.done is not None
    assert end.done.usage.computed_tokens < 20  # the message, what the store has not got of the last, and the logits


def test_news_are_numbered_and_can_be_heard_again(sessions: Sessions) -> None:
    talker = Talker(sessions)
    talker.ask("One.")
    numbered: list[tuple[int, object]] = []
    talker.do("listen", lambda number, news: numbered.append((number, news)), after=0)
    assert [number for number, _ in numbered] == list(range(1, len(numbered) + 1))
    assert isinstance(numbered[0][1], UserInput) and isinstance(numbered[-1][1], End)


def state_of(talker: Talker) -> dict[str, object]:
    """Its status, but for counts of what is just being read."""
    return {name: value for name, value in talker.session.status.items() if not name.endswith(("d_tokens", "reading"))}


@pytest.mark.parametrize(
    ("operation", "arguments", "says"),
    [
        ("interrupt", {}, "no answer"),
        ("interrupt", {"characters": -1}, "0 or more"),
        ("rewind", {"turn": 3}, "expected 0 to 0"),
        ("swap", {"name": "nowhere"}, "known: main"),
        ("commit", {"text": " "}, "empty"),
        ("answer", {}, "empty"),
        ("replace", {"text": "x" * 1_000_000}, "at most"),
        ("add_context", {"name": "big", "head": head("word " * 5000)}, "so that there is room"),
    ],
)
def test_what_the_state_does_not_allow_is_refused_and_changes_nothing(
    sessions: Sessions, operation: str, arguments: dict[str, object], says: str
) -> None:
    talker = Talker(sessions)
    before = state_of(talker)
    with pytest.raises(RekindleError, match=says):
        talker.do(operation, **arguments)
    assert state_of(talker) == before
    talker.ask("Hello.")


@pytest.mark.parametrize(
    "options", [{"policy": "forget"}, {"retention": 1.0}, {"retention": 0.0}, {"window": 0}, {"answer_tokens": 0}]
)
def test_options_that_make_no_sense_are_refused(sessions: Sessions, options: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        Talker(sessions, "new", options=options)


def toy_with(**settings: object) -> Service:
    return Service.open(Settings(engine="toy", store="none", **settings))  # type: ignore[arg-type]


def test_idle_sessions_hibernate_and_pinned_ones_do_not() -> None:
    now = [0.0]
    with toy_with(session_idle_seconds=10) as toy, Sessions(toy, clock=lambda: now[0]) as sessions:
        one, two = Talker(sessions, "one"), Talker(sessions, "two")
        two.ask("Hello.")
        two.call(lambda: sessions.pin(two.session, 100))
        now[0] = 11.0
        one.call(sessions.tick)
        assert (one.session.is_hot, two.session.is_hot) == (False, True)
        assert sessions.counts == {"hot": 1, "hibernating": 1} == levels_of(toy)
        assert any(isinstance(news, System) and news.kind == "hibernated" for news in [one.inbox.get(timeout=10)])


def levels_of(service: Service) -> dict[str, int]:
    samples = (sample for family in service.metrics.registry.collect() for sample in family.samples)
    return {each.labels["state"]: int(each.value) for each in samples if each.name == "rekindle_sessions"}


def test_the_idlest_makes_way_when_there_are_too_many() -> None:
    with toy_with(max_sessions=2) as toy, Sessions(toy) as sessions:
        first = sessions.call(lambda: sessions.open("first")).result(60)
        Talker(sessions, "second")
        sessions.call(lambda: sessions.open("third")).result(60)
        names = sessions.call(lambda: [session.name for session in sessions.all()]).result(60)
        assert names == ["second", "third"] and first.name == "first"


def test_a_session_for_which_there_is_no_room_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with toy_with(max_sessions=1) as toy, Sessions(toy) as sessions:
        one = Talker(sessions, head=head(LONG))  # listens, so it makes way for nobody
        settled(toy, one)
        asked: list[Generation] = []
        monkeypatch.setattr(toy, "submit", lambda generation, sink: asked.append(generation))
        for attempt in (
            lambda: sessions.open("two", head=head("Be brief.")),
            lambda: sessions.fork(one.session, "two"),
        ):
            with pytest.raises(Overloaded):
                one.call(attempt)
        assert not asked and one.call(lambda: [each.name for each in sessions.all()]) == ["one"]


def test_a_session_of_which_a_context_is_refused_holds_nothing(toy: Service, sessions: Sessions) -> None:
    contexts = {"other": head(LONG * 1000)}
    with pytest.raises(SessionError, match="the head has"):
        sessions.call(lambda: sessions.open("one", head=head(LONG), contexts=contexts)).result(60)
    talker = Talker(sessions)
    settled(toy, talker)
    holders: list[str | None] = []
    toy._worker.call(lambda scheduler: holders.extend(each.holder for each in scheduler.residents._all))
    assert {each for each in holders if each is not None} <= {f"{talker.session.key}/main"}


def test_a_head_for_which_there_is_no_room_is_refused(sessions: Sessions) -> None:
    with pytest.raises(SessionError, match="the head has"):
        sessions.call(lambda: sessions.open("one", head=head(LONG * 1000))).result(60)
    assert not sessions.call(sessions.all).result(60)


def test_a_window_that_an_answer_would_take_up_is_refused(sessions: Sessions) -> None:
    options = Options(window=100, answer_tokens=100)
    with pytest.raises(SessionError, match="answer_tokens: expected fewer than the window's 100, got 100"):
        sessions.call(lambda: sessions.open("one", head=head("Read."), options=options)).result(60)
    assert not sessions.call(sessions.all).result(60)


def test_what_is_done_to_a_closed_session_is_neither_read_nor_written(toy: Service) -> None:
    with Sessions(toy) as sessions:
        talker, written = Talker(sessions), []
        talker.ask("Hello.")

        def close_and_go_on() -> None:
            session = talker.session
            session.changed = lambda: written.append("before")
            sessions.end(session)
            session.append("More.")
            session.commit()
            session.rewind(0)
            session.reset()
            session.wake()

        computed = settled(toy, talker)
        talker.call(close_and_go_on)
        assert settled(toy, talker) == computed and not written
        with pytest.raises(SessionError, match="open it again"):
            talker.do("answer")
        with pytest.raises(SessionError, match="has ended"):
            talker.call(lambda: sessions.again(talker.session))


def test_the_end_comes_also_when_a_session_can_not_be_written(
    toy: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sessions = Sessions(toy)
    bad, good = Talker(sessions, "bad"), Talker(sessions, "good")
    bad.call(lambda: bad.session.context.turns.append(None))  # type: ignore[arg-type]
    written: list[str] = []
    monkeypatch.setattr(sessions._saved, "write", lambda salt, key, content: written.append(content["name"]))
    sessions.close()
    assert written == ["good"] and good.session.is_closed and "something went wrong in a session" in caplog.text
    with pytest.raises(Stopping):
        sessions.call(lambda: None).result(60)


def test_nobody_loses_a_session_for_an_owner_who_has_more() -> None:
    with toy_with(max_sessions=3) as toy, Sessions(toy) as sessions:
        for salt, name in ((b"few", "1"), (b"many", "1"), (b"many", "2"), (b"many", "3"), (b"many", "4")):
            sessions.call(lambda salt=salt, name=name: sessions.open(name, salt=salt)).result(60)  # type: ignore[misc]
        kept = {salt: [each.name for each in sessions.all(salt=salt)] for salt in (b"few", b"many")}
        assert kept == {b"few": ["1"], b"many": ["3", "4"]}


class OnlyOne:
    """A gate that lets one answer of an owner through at a time."""

    def __init__(self) -> None:
        self.inside: list[bytes] = []
        self.seconds: list[float | None] = []

    def enter(self, salt: bytes) -> None:
        if salt in self.inside:
            raise Overloaded("one is enough")
        self.inside.append(salt)

    def leave(self, salt: bytes, seconds: float | None) -> None:
        self.inside.remove(salt)
        self.seconds.append(seconds)


def test_an_owners_answers_are_counted_until_they_end_in_whatever_way(toy: Service) -> None:
    gate = OnlyOne()
    with Sessions(toy, gate=gate) as sessions:
        one, two, other = (Talker(sessions, name, salt=salt) for name, salt in (("1", b"a"), ("2", b"a"), ("1", b"b")))
        for end in ("interrupt", "reset", None):

            def answer(end: str | None = end) -> None:  # as one command, so that none ends by itself before
                for talker in (one, other):
                    talker.session.commit("Hello.")
                    talker.session.answer(max_tokens=8)
                with pytest.raises(Overloaded):
                    two.session.answer()
                assert sorted(gate.inside) == [b"a", b"b"]
                if end is not None:
                    getattr(one.session, end)()

            one.call(answer)
            for talker in (one, other):
                talker.until(lambda news: isinstance(news, End))
            assert gate.inside == []
            two.ask("Hello.")
        with pytest.raises(RekindleError):
            one.do("answer")  # nothing was said
        assert gate.inside == []
        assert sum(seconds is not None for seconds in gate.seconds) == 7


def test_what_is_said_where_one_more_answer_is_too_many_was_not_said(toy: Service) -> None:
    with Sessions(toy, gate=OnlyOne()) as sessions:
        one, two = (Talker(sessions, name, salt=b"a") for name in "12")

        def say() -> None:  # as one command, so that the answer can't end before
            one.session.say("Hello.")
            two.session.append("Hel")
            for text in ("Hello?", None):
                with pytest.raises(Overloaded):
                    two.session.say(text)
            assert (two.session.state, two.session.context.draft) == ("idle", "Hel")

        one.call(say)
        one.until(lambda news: isinstance(news, End))
        two.call(lambda: two.session.say("Hello?"))
        two.until(lambda news: isinstance(news, End))
        assert [news.text for news in two.news if isinstance(news, UserInput)] == ["Hello?"]


@pytest.mark.parametrize(
    ("operation", "arguments", "reason"),
    [
        ("interrupt", (), "interrupted"),
        ("reset", (), "interrupted"),
        ("rewind", (0,), "interrupted"),
        ("swap", ("other",), "interrupted"),
        ("add_context", ("main", head(LONG)), "interrupted"),
        ("close", (), "cancelled"),
    ],
)
def test_an_answer_that_is_broken_off_has_one_end_that_all_hear(
    toy: Service, sessions: Sessions, operation: str, arguments: tuple[Any, ...], reason: str
) -> None:
    talker = Talker(sessions, contexts={"other": head("Another.")})

    def break_off() -> None:  # as one command, so that the answer can't end by itself before
        talker.session.commit("Hello.")
        talker.session.answer()
        getattr(talker.session, operation)(*arguments)

    talker.call(break_off)
    if operation != "close":
        talker.ask("And now?")
    settled(toy, talker)
    while not talker.inbox.empty():
        talker.news.append(talker.inbox.get())
    ends = [news.reason for news in talker.news if isinstance(news, End)]
    assert ends == [reason, "length"][: 1 + (operation != "close")]


def test_a_message_whose_answer_was_refused_is_answered_later_as_it_is(toy: Service) -> None:
    gate = OnlyOne()
    with Sessions(toy, gate=gate) as sessions:
        talker = Talker(sessions, salt=b"a")
        gate.enter(b"a")
        talker.do("commit", "Hello.")
        with pytest.raises(Overloaded):
            talker.do("answer")
        gate.leave(b"a", None)
        talker.do("commit")
        talker.ask()
        assert talker.messages[0] == {"role": "user", "content": "Hello."}


def test_owners_do_not_see_each_other(sessions: Sessions) -> None:
    mine, theirs = Talker(sessions, salt=b"a"), Talker(sessions, salt=b"b")
    mine.ask("One.")
    assert mine.messages and not theirs.messages
    assert mine.call(lambda: len(sessions.all(salt=b"a"))) == 1
    with pytest.raises(SessionError):
        mine.call(lambda: sessions.get("one", salt=b"c"))
