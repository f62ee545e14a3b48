"""What the live clients do with lines, keys and news.

`speak` sends lines and `watch` shows news; `talk` does both. In a terminal it waits for news and looks at the keyboard in
between, and sends what has been typed so far, so that most of it is read before the return key is hit
(`live_terminal.py`). Without a terminal each line is answered before the next is sent.

What is said goes to stdout, all that is said about it to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import typer

from rekindle.cli.live_line import Address, Line, Message
from rekindle.cli.refusals import complain
from rekindle.errors import InvalidRequest, counted

ERROR_SECONDS = 0.2  # for the server to refuse what was sent on a line that hears nothing else
BOTH, IN, OUT = "/ws", "/ws/input", "/ws/output"


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How to answer, and in which contexts."""

    max_tokens: int | None = None  # None: until the end of turn
    temperature: float = 0.0
    contexts: Sequence[str] = ()  # NAME=INSTRUCTIONS

    def messages(self, lines: Iterable[str]) -> Iterator[Message]:
        """What lines ask for, up to quit; empty ones ask for nothing."""
        for line in lines:
            if not line.strip():
                continue
            message = self.message(line)
            if message is None:
                return
            yield message

    def message(self, line: str) -> Message | None:
        """What a line asks for; None for quit."""
        word, _, rest = line.strip().partition(" ")
        if word == "quit" and not rest:
            return None
        if word == "reset" and not rest:
            return {"type": "reset"}
        if word == "swap" and rest and len(rest.split()) == 1:
            return {"type": "swap", "context": rest.strip()}
        said = {"type": "message", "data": line.rstrip("\r\n"), "temperature": self.temperature}
        return said if self.max_tokens is None else said | {"max_tokens": self.max_tokens}

    def missing(self, status: Message) -> Iterator[Message]:
        """The contexts that a session lacks. Raises InvalidRequest."""
        is_new = not status.get("turns") and not status.get("forgotten_turns")
        for given in self.contexts:
            name, equals, instructions = given.partition("=")
            if not (name.strip() and equals and instructions.strip()):
                raise InvalidRequest(f"expected --context NAME=INSTRUCTIONS, got {given!r}", param="context")
            if name.strip() not in status.get("contexts", ()) or (name.strip() == "main" and is_new):
                yield {"type": "context", "context": name.strip(), "instructions": instructions.strip()}


def begin(line: Line, wish: Wish) -> None:
    """Connect, and make the contexts that are not there."""
    for context in wish.missing(line.open()["detail"]):
        line.send(context)


def speak(address: Address, max_retries: int, wish: Wish) -> None:
    """Send what comes on stdin, line by line, until its end or quit; errors that come back are shown."""
    with Line(address, IN, max_retries) as line:
        begin(line, wish)
        for message in wish.messages(sys.stdin):
            line.send(message)
            _show_errors(line)


def _show_errors(line: Line) -> None:
    """Those that come at once: nothing else is heard here, and nothing says that all is well."""
    while (message := line.receive(timeout=ERROR_SECONDS)) is not None:
        if message["type"] == "error":
            complain(message["error"]["message"])


def watch(address: Address, max_retries: int) -> None:
    """Show what happens, until somebody ends it."""
    with Line(address, OUT, max_retries) as line:
        line.open()
        if sys.stderr.isatty():
            typer.echo(f"Listening to session {address.session}; Ctrl-C ends.", err=True)
        while True:
            message = line.receive()
            assert message is not None
            show(message)


def talk(address: Address, max_retries: int, wish: Wish) -> None:
    """Both directions, until quit, Ctrl-D or the end of stdin."""
    with Line(address, BOTH, max_retries) as line:
        begin(line, wish)
        if sys.stdin.isatty():
            from rekindle.cli.live_terminal import Terminal  # here: there are systems without terminals of this kind

            Terminal(line, wish).run()
        else:
            for message in wish.messages(sys.stdin):
                line.send(message)
                _until_done(line, message)


def _until_done(line: Line, asked: Message) -> None:
    """Show what comes up to the end of the answer, or whatever else was asked for; what others say here, too."""
    is_ours = asked["type"] != "message"  # an answer counts once our words were heard
    while True:
        news = line.receive()
        assert news is not None
        if news["type"] == "user_input" and news["data"].endswith(asked.get("data", "\0")):
            is_ours = True
            continue
        show(news)
        is_done = news["type"] == "end" if asked["type"] == "message" else _is_reply(news)
        if (is_done and is_ours) or news["type"] == "error":
            return


def _is_reply(news: Message) -> bool:
    return news["type"] == "system" and news["kind"] in ("reset", "swapped")


def show(news: Message) -> None:
    """One message."""
    kind = news["type"]
    if kind == "user_input":
        typer.echo(f"> {news['data']}")
    elif kind == "token":
        typer.echo(news["data"], nl=False)
    elif kind == "end":
        typer.echo("")
        typer.echo(cost_of(news), err=True)
    elif kind == "error":
        if "turn" in news:  # an answer ends with it, and so does its line
            typer.echo("")
        complain(news["error"]["message"])
    elif kind == "system" and news["kind"] != "connected":
        typer.echo(f"({news['data']})", err=True)


def cost_of(end: Message, seconds: float | None = None) -> str:
    """What an answer cost, and how long its first token took at the server and, where it is known, here."""
    if "timings" not in end:
        return f"({end['reason']})"
    usage: dict[str, Any] = end["usage"]
    here = "" if seconds is None else f", {1000 * seconds:.1f} ms after the return key"
    return (
        f"(prompt: {counted(usage['cached_tokens'], 'token')} reused, {usage['computed_tokens']:,} computed; "
        f"first token after {end['timings']['ttft_ms']:.1f} ms{here})"
    )
