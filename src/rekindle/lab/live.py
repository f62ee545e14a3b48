"""A conversation far longer than its window: what the window costs, and whether the head is still known at the end.

A live session has a document as its head and is asked about it, turn after turn, in a context that holds a few dozen turns.
The window forgets whole old turns, again and again.

Counted, not timed: tokens computed by the engine against tokens that are new (the head once, and all that was said and
answered). That is the physical limit: what was never read has to be computed once, and nothing has to be computed twice.
Right answers are compared with those of a fresh prompt of the head and the question alone, by the same model.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from rekindle.errors import RekindleError
from rekindle.serve.request import Done, Generation, Sampling
from rekindle.serve.service import Service
from rekindle.serve.sessions.news import End, Failure, News, System
from rekindle.serve.sessions.options import Options, WindowPolicy
from rekindle.serve.sessions.session import Session
from rekindle.serve.sessions.sessions import Sessions

GREEDY = Sampling(temperature=0)
MAX_ANSWER = 40
_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Question:
    """Something the document tells."""

    text: str
    answer: str


@dataclass(frozen=True)
class Talk:
    """What came of one long conversation."""

    policy: str  # as the model allows it
    turns: int
    window: int  # tokens
    moves: int  # of the window
    forgotten_turns: int
    new_tokens: int  # head, messages, answers and what the template writes around them; the limit
    computed_tokens: int  # by the engine
    turned_tokens: int  # whose keys were rotated once more, as the window moved
    placed_tokens: int  # that were placed anew, as they were first computed
    num_right: int  # answers in the session, in the last `judged` turns
    num_right_alone: int  # answers to the same questions with nothing but the head before them
    judged: int

    @property
    def overhead(self) -> float:
        """Share of tokens computed beyond those that are new."""
        return self.computed_tokens / self.new_tokens - 1


class _Asker:
    """Asks a session one question after another."""

    def __init__(self, sessions: Sessions, session: Session) -> None:
        self._sessions, self._session = sessions, session
        self._inbox: queue.SimpleQueue[News] = queue.SimpleQueue()
        self.moves = 0
        sessions.call(lambda: session.listen(lambda number, news: self._inbox.put(news))).result()

    def ask(self, text: str) -> End:
        """The answer; raises what made it fail."""

        def say() -> None:
            self._session.commit(text)
            self._session.answer(max_tokens=MAX_ANSWER)

        self._sessions.call(say).result()
        while True:
            news = self._inbox.get()
            if isinstance(news, Failure):
                raise news.error
            if isinstance(news, System) and news.kind == "forgotten":
                self.moves += 1
            if isinstance(news, End):
                return news

    def settle(self) -> None:
        """Wait until the end of the last answer has been read."""
        while self._sessions.call(lambda: self._session.status["reading"]).result():
            time.sleep(_POLL_SECONDS)


def long_talk(
    service: Service,
    head: str,
    questions: Sequence[Question],
    *,
    turns: int,
    judged: int,
    policy: WindowPolicy = "slide",
    window: int | None = None,
    retention: float | None = None,
    seed: int = 0,
    progress: Callable[[int], object] = lambda turns: None,
) -> Talk:
    """Ask so many questions, drawn at random, and judge the last of them. Raises RekindleError if nothing can be asked."""
    if not questions or not 0 < judged <= turns:
        raise RekindleError(f"expected questions, and 1 to {turns} turns to judge; got {len(questions)} and {judged}")
    service.clear_cache()  # or the head might have been read before
    before, new, right, asked = service.num_computed, 0, 0, []
    slid = service.metrics.slid_tokens
    choose = Random(seed)
    with Sessions(service) as sessions:
        options = Options(sampling=GREEDY, policy=policy, window=window, retention=retention)
        name = f"long talk, {policy}"
        messages = [{"role": "system", "content": head}]
        session = sessions.call(lambda: sessions.open(name, head=messages, options=options)).result()
        script, asker = session.context.script, _Asker(sessions, session)
        new += len(script.opening)
        for number in range(turns):
            question = choose.choice(questions)
            end = asker.ask(question.text)
            assert end.done is not None
            said = script.said(question.text, is_first=number == 0)
            new += len(said) + len(end.done.tokens) + len(script.closing)
            if number >= turns - judged:
                asked.append(question)
                right += end.text.strip() == question.answer
            progress(number + 1)
        asker.settle()
        forgotten = session.context.forgotten
        computed = service.num_computed - before
    alone = sum(answer_alone(service, head, question.text) == question.answer for question in asked)
    turned, placed = (service.metrics.slid_tokens[how] - slid[how] for how in ("turned", "placed"))
    return Talk(
        policy=session.policy,
        turns=turns,
        window=session.window,
        moves=asker.moves,
        forgotten_turns=forgotten,
        new_tokens=new,
        computed_tokens=computed,
        turned_tokens=turned,
        placed_tokens=placed,
        num_right=right,
        num_right_alone=alone,
        judged=len(asked),
    )


def answer_alone(service: Service, head: str, text: str) -> str:
    """What the model answers when nothing but the head goes before the question."""
    prompt = service.chat_prompt([{"role": "system", "content": head}, {"role": "user", "content": text}])
    *_, done = service.events(Generation(prompt=prompt, max_tokens=MAX_ANSWER, sampling=GREEDY))
    assert isinstance(done, Done)
    return done.text.strip()
