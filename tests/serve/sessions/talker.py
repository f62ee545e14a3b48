"""A session as a test talks to it: every call waits, and answers are waited for."""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from rekindle.serve.request import Done, Event, Generation, Piece, Sampling
from rekindle.serve.service import Service
from rekindle.serve.sessions.news import End, Failure, News, Token
from rekindle.serve.sessions.options import Options
from rekindle.serve.sessions.script import Message
from rekindle.serve.sessions.session import Session
from rekindle.serve.sessions.sessions import Sessions
from rekindle.tokens import as_tokens, common_length

T = TypeVar("T")
GREEDY = Sampling(temperature=0)
WAIT_SECONDS = 60
TIE = 0.05  # difference of logprobs that rounding may turn around


class Talker:
    """One session and all that its listeners are told."""

    def __init__(
        self, sessions: Sessions, name: str = "one", *, session: Session | None = None, salt: bytes = b"", **how: Any
    ) -> None:
        options = Options(sampling=GREEDY, **how.pop("options", {}))
        self.sessions = sessions
        self.session = session or self.call(lambda: sessions.open(name, salt=salt, options=options, **how))
        self.inbox: queue.SimpleQueue[News] = queue.SimpleQueue()
        self.news: list[News] = []
        self.call(lambda: self.session.listen(lambda number, news: self.inbox.put(news)))

    def call(self, action: Callable[[], T]) -> T:
        return self.sessions.call(action).result(WAIT_SECONDS)

    def do(self, operation: str, /, *arguments: Any, **options: Any) -> Any:
        return self.call(lambda: getattr(self.session, operation)(*arguments, **options))

    def until(self, wanted: Callable[[News], bool]) -> News:
        """The next news that is wanted."""
        while True:
            news = self.inbox.get(timeout=WAIT_SECONDS)
            self.news.append(news)
            if isinstance(news, Failure):
                raise news.error
            if wanted(news):
                return news

    def ask(self, text: str | None = None, max_tokens: int | None = 8) -> End:
        """Say something, or what is in the draft, and wait for the whole answer."""
        if text is not None:
            self.do("commit", text)
        self.do("answer", max_tokens=max_tokens)
        end = self.until(lambda news: isinstance(news, End))
        assert isinstance(end, End)
        self.call(lambda: None)  # room for the next turn is made, and its file written, after the end is told
        return end

    def first_token(self) -> News:
        """Or the end of an answer that has none."""
        return self.until(lambda news: isinstance(news, End) or (isinstance(news, Token) and bool(news.text)))

    @property
    def messages(self) -> list[dict[str, str]]:
        return self.call(lambda: self.session.context.messages)

    def tokens(self) -> list[int]:
        return self.call(lambda: self.session.context.tokens.tolist())


def read_anew(service: Service, tokens: Sequence[int], max_tokens: int) -> Done:
    """The greedy answer to these tokens, all of them computed."""
    return _read_anew(service, tokens, max_tokens)[-1]  # type: ignore[return-value]


def _read_anew(service: Service, tokens: Sequence[int], max_tokens: int, **how: Any) -> list[Event]:
    sampling = replace(GREEDY, top_logprobs=4)
    generation = Generation(
        prompt=service.token_prompt(tokens), max_tokens=max_tokens, sampling=sampling, use_prefix_cache=False, **how
    )
    return list(service.events(generation))


def is_as_read_anew(service: Service, tokens: Sequence[int], answer: Done) -> bool:
    """Whether it is the greedy answer to these tokens; where it goes another way, two tokens must be as probable.

    Batches of other shapes round otherwise, which decides between those.
    """
    is_whole = answer.reason == "stop"  # then the end of the turn is what comes next
    *pieces, anew = _read_anew(service, tokens, len(answer.tokens) + is_whole, ignore_eos=True)
    assert isinstance(anew, Done)
    infos = [token for piece in pieces if isinstance(piece, Piece) for token in piece.tokens]
    length = common_length(as_tokens(answer.tokens), as_tokens([each.id for each in infos]))
    if length == len(answer.tokens) and not is_whole:
        return answer.text == anew.text
    is_end = service.model.tokenizer.is_end
    here = [
        logprob
        for token, _, logprob in infos[length].top
        if (token == answer.tokens[length] if length < len(answer.tokens) else is_end(token))
    ]
    return max(logprob for _, _, logprob in infos[length].top) - max(here, default=-math.inf) < TIE


def head(text: str) -> list[Message]:
    return [{"role": "system", "content": text}]


def settled(service: Service, talker: Talker) -> int:
    """Tokens computed, once everything that was asked to be read has been."""
    busy = [True]
    while busy[-1] or talker.call(lambda: talker.session.status["reading"]):  # what comes next waits with the session
        service._worker.call(lambda scheduler: busy.append(bool(scheduler.waiting or scheduler.running)))
    talker.call(lambda: None)
    return service.num_computed
