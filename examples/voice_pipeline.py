"""A voice assistant without a microphone: recogniser, live session, voice, on one clock.

    recogniser  --partial transcripts, revised-->  live session  --tokens-->  voice
         ^                                              ^                       |
         '--the user speaks: a turn, or an objection    '--said so far----------'

While the user speaks, the recogniser hears one word after another, and takes some of them back. Each transcript goes to
the session as its draft, and the session reads what is new in it at once. So when the user stops, next to nothing is left
to read, and the first token comes after about one step of the model. When the user objects, the voice stops, and the
session is told how much of its answer was said: only that is kept of it.

The recogniser and the voice are stand-ins with the pace of people. `--listen COMMAND` takes a real recogniser's place for
this one: a program that writes Vosk's JSON lines, {"partial": "…"} and {"text": "…"}. `--speak` says the answers with
espeak-ng. The session is in this process, or with --url on a server, by its simple socket: the messages are the same.
Each turn is also asked of a session that is told nothing before the end, for comparison.
"""

from __future__ import annotations

import json
import queue
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any, Protocol
from urllib.request import Request, urlopen

import typer
from rich.console import Console
from rich.table import Table
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from rekindle.api.live_wire import decode, encode
from rekindle.serve.service import Service
from rekindle.serve.sessions.session import Session
from rekindle.serve.sessions.sessions import Sessions
from rekindle.settings import Settings

WORD_SECONDS = 0.35  # of a person who speaks: about 170 words a minute
PAUSE_SECONDS = 0.4  # of silence, after which a turn is over
CHARACTERS_PER_SECOND = 15.0  # of the voice
POLL_SECONDS = 0.01
WAIT_SECONDS = 60.0  # for an answer that does not come
MISHEARD = {
    "colour": "collar",
    "lives": "leaves",
    "Where": "Wear",
    "paint": "pane",
    "job": "shop",
    "morning.": "mourning",
}

VILLAGE = Path(__file__).parent / "village"
OPENINGS = ("You answer questions about the records below.", "Answer from these passages only.")  # no KV is shared
PASSAGES = ("passage-01.txt", "passage-03.txt", "passage-07.txt")
Message = dict[str, Any]


@dataclass(frozen=True)
class Spoken:
    """What the user says, and how long the answer may last before the user objects."""

    words: str
    objects_after: float | None = None  # seconds of the voice


SCRIPT = (
    Spoken("Good morning.", objects_after=1.5),
    Spoken("What colour does Hudik paint in?"),
    Spoken("What is the job of Grevmar?"),
    Spoken("Where does Bubris live?"),
)


# The recogniser.


@dataclass(frozen=True)
class Heard:
    """One transcript of what was said so far."""

    text: str
    is_whole: bool


class Clock:
    """Time as it passes for the people in this play; `speed` of it to a second of the machine's.

    For patient people it stands still while they do not speak, listen or think: they do not notice how long the machine
    takes.
    """

    def __init__(self, speed: float, *, is_patient: bool) -> None:
        self.is_patient = is_patient
        self._speed, self._began = speed, time.perf_counter()
        self._waited = 0.0

    def now(self) -> float:
        return self._waited if self.is_patient else (time.perf_counter() - self._began) * self._speed

    def wait(self, seconds: float) -> None:
        time.sleep(seconds / self._speed)
        self._waited += seconds


def recognised(spoken: Spoken, clock: Clock, random: Random) -> Iterator[Heard]:
    """Transcripts at the pace of speech: the last word may be wrong at first, and is set right with the next one."""
    words = spoken.words.split()
    for count in range(1, len(words) + 1):
        clock.wait(WORD_SECONDS * random.uniform(0.7, 1.3))
        last = words[count - 1]
        yield Heard(" ".join([*words[: count - 1], MISHEARD.get(last, last)]), is_whole=False)
    clock.wait(PAUSE_SECONDS)
    yield Heard(spoken.words, is_whole=True)


def from_recogniser(command: str) -> Iterator[Heard]:
    """Transcripts of a program that writes Vosk's JSON lines; those without a word say nothing."""
    with subprocess.Popen(shlex.split(command), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found = json.loads(line)
            text = str(found.get("text") or found.get("partial") or "").strip()
            if text:
                yield Heard(text, is_whole=bool(found.get("text")))


# The session.


class Channel(Protocol):
    """A live session: messages of the simple sockets, in and out."""

    def send(self, message: Message) -> None: ...
    def receive(self, timeout: float) -> Message | None: ...
    def status(self) -> Message: ...


class Here:
    """A session in this process."""

    def __init__(self, sessions: Sessions, name: str) -> None:
        self._sessions = sessions
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._session: Session = sessions.call(lambda: sessions.open(name)).result()
        hear = lambda number, news: self._inbox.put(encode(number, news))  # noqa: E731
        sessions.call(lambda: self._session.listen(hear)).result()

    def send(self, message: Message) -> None:
        incoming = decode(message)
        self._sessions.call(lambda: incoming.apply(self._session)).result()

    def receive(self, timeout: float) -> Message | None:
        try:
            return self._inbox.get(timeout=timeout)
        except queue.Empty:
            return None

    def status(self) -> Message:
        return self._sessions.call(lambda: self._session.status).result()


class There:
    """A session on a server."""

    def __init__(self, socket: ClientConnection, name: str, status: Request) -> None:
        self._socket, self._name, self._status = socket, name, status

    def send(self, message: Message) -> None:
        self._socket.send(json.dumps(message))

    def receive(self, timeout: float) -> Message | None:
        try:
            message: Message = json.loads(self._socket.recv(timeout=timeout))
        except TimeoutError:
            return None
        return message

    def status(self) -> Message:
        with urlopen(self._status) as answer:
            sessions: list[Message] = json.load(answer)["sessions"]
        return next(session for session in sessions if session["session"] == self._name)


@contextmanager
def channels(url: str | None, api_key: str | None, model: str, threads: int) -> Iterator[list[Channel]]:
    """Two sessions of their own, on a server or with a model in this process."""
    names = [f"voice-{time.time_ns()}-{number}" for number in range(2)]
    with ExitStack() as stack:
        if url is None:
            service = stack.enter_context(Service.open(Settings(model=model, threads=threads, store="none")))
            sessions = stack.enter_context(Sessions(service))
            yield [Here(sessions, name) for name in names]
            return
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        address, status = (
            url.replace("http", "ws", 1).rstrip("/"),
            Request(f"{url.rstrip('/')}/status", headers=headers),
        )
        try:
            ways = {
                name: connect(f"{address}/ws?session={name}", additional_headers=headers, proxy=None) for name in names
            }
        except (OSError, WebSocketException) as error:
            raise SystemExit(
                f"cannot talk to {url}: {error}; is a server running there, and is the key right?"
            ) from None
        yield [There(stack.enter_context(way), name, status) for name, way in ways.items()]


# The voice.


class Voice:
    """Says an answer at the pace of speech, with a sound if there is espeak-ng."""

    def __init__(self, clock: Clock, *, aloud: bool) -> None:
        self._clock, self._aloud = clock, aloud
        self._began: float | None = None
        self._process: subprocess.Popen[str] | None = None
        self.text = ""

    def more(self, text: str) -> None:
        """Some more of the answer."""
        if self._began is None:
            self._began = self._clock.now()
            if self._aloud:
                self._process = subprocess.Popen(["espeak-ng", "--stdin"], stdin=subprocess.PIPE, text=True)
        self.text += text
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(text)

    @property
    def said(self) -> int:
        """Characters that one can have heard by now."""
        seconds = 0.0 if self._began is None else self._clock.now() - self._began
        return min(len(self.text), round(seconds * CHARACTERS_PER_SECOND))

    @property
    def seconds_left(self) -> float:
        return (len(self.text) - self.said) / CHARACTERS_PER_SECOND

    def finish(self) -> None:
        """All of it has been said."""
        if self._process is not None:
            self._process.communicate()
        else:
            self._clock.wait(self.seconds_left)

    def stop(self) -> None:
        """In the middle of a word."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


# The conversation.


@dataclass(frozen=True)
class Turn:
    """What came of one turn."""

    said: str
    transcripts: int
    answer: str  # as the session keeps it
    was_stopped: bool
    prompt_tokens: int
    computed_tokens: int  # after the user had stopped speaking
    ttft_ms: float  # from there to the first token
    computed_tokens_unread: int  # the same turn, of the session that is told nothing before
    ttft_ms_unread: float


class Conversation:
    """Two sessions: one hears what is being said, and answers aloud; the other one is for comparison."""

    def __init__(
        self, live: Channel, plain: Channel, clock: Clock, console: Console, *, max_tokens: int, aloud: bool
    ) -> None:
        self._live, self._plain, self._clock, self._console = live, plain, clock, console
        self._answered = {"temperature": 0, "max_tokens": max_tokens}
        self._aloud = aloud
        for channel, opening in zip((live, plain), OPENINGS, strict=True):
            head, before = "\n\n".join([opening, *map(_passage, PASSAGES)]), channel.status()["tokens"]
            channel.send({"type": "context", "context": "main", "instructions": head})
            # the head is read once, before anybody speaks
            self._wait_until_read(channel, lambda status, before=before: status["tokens"] != before)  # type: ignore[misc]

    def turn(self, transcripts: Iterable[Heard], objects_after: float | None = None) -> Turn | None:
        """From the first word to the last that is heard of the answer; None if nothing was said."""
        num_transcripts, words = 0, ""
        for heard in transcripts:
            num_transcripts, words = num_transcripts + 1, heard.text
            self._tell("user" if heard.is_whole else "hears", words)
            if heard.is_whole:
                break
            self._live.send({"type": "partial", "data": words})
            if self._clock.is_patient:
                self._wait_until_read(self._live, lambda status, words=words: status["draft"] == words)  # type: ignore[misc]
        if not words:
            return None
        end, answer, was_stopped = self._answer(words, objects_after)
        plain = self._ask_plainly(words, None if not was_stopped else len(answer))
        usage, timings = end["usage"], end["timings"]
        read = f"{usage['computed_tokens']} of {usage['prompt_tokens']} tokens were left to read"
        self._tell("", f"first token after {timings['ttft_ms']:.1f} ms; {read}")
        return Turn(
            said=words,
            transcripts=num_transcripts,
            answer=answer,
            was_stopped=was_stopped,
            prompt_tokens=usage["prompt_tokens"],
            computed_tokens=usage["computed_tokens"],
            ttft_ms=timings["ttft_ms"],
            computed_tokens_unread=plain["usage"]["computed_tokens"],
            ttft_ms_unread=plain["timings"]["ttft_ms"],
        )

    def _answer(self, words: str, objects_after: float | None) -> tuple[Message, str, bool]:
        """Have the words answered and say the answer; its end, what is kept of it, and whether the user objected."""
        self._live.send({"type": "message", "data": words} | self._answered)
        voice, end = Voice(self._clock, aloud=self._aloud), None
        while end is None:
            message = self._next(self._live)
            if message["type"] == "token":
                voice.more(message["data"])
            elif message["type"] == "end":
                end = message
        self._tell("assistant", voice.text.strip())
        if objects_after is None or voice.seconds_left <= objects_after:
            voice.finish()
            return end, end["data"], False
        self._clock.wait(objects_after)
        heard = voice.said
        voice.stop()
        self._live.send({"type": "interrupt", "characters": heard})
        while (message := self._next(self._live)).get("kind") != "truncated":
            pass
        kept = str(message["detail"]["text"])
        self._tell("objects", f"{heard} characters were heard; kept: {kept.strip()!r}")
        return end, kept, True

    def _ask_plainly(self, words: str, cut: int | None) -> Message:
        self._plain.send({"type": "message", "data": words} | self._answered)
        while (message := self._next(self._plain))["type"] != "end":
            pass
        if cut is not None:
            self._plain.send({"type": "interrupt", "characters": cut})
        return message

    def _wait_until_read(self, channel: Channel, is_known: Callable[[Message], bool]) -> None:
        """Until a session has got what it was told and has read it; what it says meanwhile is of no interest."""
        while not is_known(status := channel.status()) or status["reading"]:
            self._check(channel.receive(POLL_SECONDS))

    def _next(self, channel: Channel) -> Message:
        message = self._check(channel.receive(WAIT_SECONDS))
        if message is None:
            raise SystemExit(f"no answer came in {WAIT_SECONDS:g} seconds")
        return message

    def _check(self, message: Message | None) -> Message | None:
        if message is not None and message["type"] == "error":
            raise SystemExit(f"the session refused: {message['error']['message']}")
        return message

    def _tell(self, who: str, what: str) -> None:
        """One line of the timeline."""
        self._console.print(
            f"{self._clock.now():7.2f} s  {who:10}{what}", markup=False, highlight=False, soft_wrap=True
        )


def _passage(name: str) -> str:
    return (VILLAGE / name).read_text("utf-8").strip()


def table_of(turns: Iterable[Turn]) -> Table:
    """For people."""
    table = Table("turn", "prompt", "left", "TTFT", "left *", "TTFT *", show_edge=False)
    for column in table.columns:
        column.no_wrap, column.justify = True, "left" if column is table.columns[0] else "right"
    table.caption = "left: tokens to read when the user has stopped speaking. * without partial transcripts"
    for turn in turns:
        table.add_row(
            turn.said[:26],
            f"{turn.prompt_tokens}",
            f"{turn.computed_tokens}",
            f"{turn.ttft_ms:.1f} ms",
            f"{turn.computed_tokens_unread}",
            f"{turn.ttft_ms_unread:.1f} ms",
        )
    return table


def main(
    url: Annotated[str | None, typer.Option(help="of a running server; default: a model in this process")] = None,
    api_key: Annotated[str | None, typer.Option(help="for that server")] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="in this process: builtin, or the path of a .gguf file")
    ] = ("builtin"),
    max_tokens: Annotated[int, typer.Option(help="longest answer", min=1)] = 100,
    listen: Annotated[str | None, typer.Option(help="a recogniser that writes Vosk's JSON lines")] = None,
    speak: Annotated[bool, typer.Option("--speak", help="say the answers with espeak-ng")] = False,
    speed: Annotated[float, typer.Option(help="how many times faster than people", min=0.1)] = 1.0,
    patient: Annotated[bool, typer.Option("--patient", help="people wait for the machine, however slow it is")] = False,
    threads: Annotated[int, typer.Option(help="compute threads of the model in this process", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="of the pace of speech")] = 0,
) -> None:
    """Talk, and see what was left to read when the user stopped."""
    if speak and shutil.which("espeak-ng") is None:
        raise SystemExit("--speak needs espeak-ng: install it, or leave the option out")
    console, random = Console(), Random(seed)
    with channels(url, api_key, model, threads) as (live, plain):
        clock = Clock(speed, is_patient=patient)
        conversation = Conversation(live, plain, clock, console, max_tokens=max_tokens, aloud=speak)
        turns: list[Turn] = []
        if listen is None:
            for spoken in SCRIPT:
                turn = conversation.turn(recognised(spoken, clock, random), spoken.objects_after)
                turns += [turn] if turn else []
        else:
            transcripts = from_recogniser(listen)
            while (turn := conversation.turn(transcripts)) is not None:
                turns.append(turn)
    console.print()
    console.print(table_of(turns))
    typer.echo(json.dumps(report_of(turns)))


def report_of(turns: Iterable[Turn]) -> Mapping[str, Any]:
    """For machines."""
    return {"turns": [asdict(turn) for turn in turns]}


if __name__ == "__main__":
    typer.run(main)
