"""A live session in one terminal: each key is seen at once, and what is typed is sent while it is typed.

The terminal gives keys instead of lines (`keys`), so what the line discipline would do is done here: echo, backspace,
Ctrl-U, Ctrl-D. While an answer is shown, keys are taken without an echo, and appear behind the next prompt. News are waited
for, so they are shown at once; the keyboard is looked at KEY_SECONDS apart, which is faster than anybody types.
"""

from __future__ import annotations

import codecs
import os
import re
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.cells import cell_len

from rekindle.cli.live_line import Line, Message
from rekindle.cli.live_talk import Wish, cost_of, show
from rekindle.cli.refusals import complain

KEY_SECONDS = 0.02
PROMPT = "> "
HELP = "What you type is read while you type. Return sends it; reset, swap NAME and quit are commands."
CTRL_D, CTRL_U = "\x04", "\x15"
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|O.|.)?")  # arrows and function keys


@contextmanager
def keys() -> Iterator[Callable[[], str]]:
    """Gives what was typed since the last look, each key at once, also what was typed before there was anybody to look."""
    number = sys.stdin.fileno()
    before, utf8 = termios.tcgetattr(number), codecs.getincrementaldecoder("utf-8")("replace")

    def typed() -> str:
        if not select.select([number], [], [], 0)[0]:
            return ""
        data = os.read(number, 4096)
        return _ESCAPES.sub("", utf8.decode(data)) if data else CTRL_D  # nothing to read: the terminal is closed

    tty.setcbreak(number, termios.TCSANOW)  # any other moment than now would throw away what is typed already
    try:
        yield typed
    finally:
        termios.tcsetattr(number, termios.TCSANOW, before)


class Terminal:
    """A person at a keyboard, and a session."""

    def __init__(self, line: Line, wish: Wish) -> None:
        self._line, self._wish = line, wish
        line.tell = self._tell
        self._draft = ""
        self._sent = ""  # of the draft, to the session
        self._at_prompt = False  # the last line on the screen is the prompt and the draft
        self._echoed: str | None = None  # a message that is on the screen, and of which the session has not told yet
        self._asked_at: float | None = None  # time.perf_counter() of the return key, until the first token
        self._seconds: float | None = None  # from there to the first token
        self._answering = False

    def run(self) -> None:
        """Until quit or Ctrl-D; Ctrl-C ends it too, but for an answer under way, which it interrupts."""
        typer.echo(f"Session {self._line.welcome['detail']['session']}. {HELP}", err=True)
        with keys() as typed:
            self._prompt()
            while True:
                try:
                    if not self._round(typed()):
                        return
                except KeyboardInterrupt:
                    if not self._answering:
                        typer.echo("")
                        raise
                    self._line.send({"type": "interrupt"})

    def _round(self, typed: str) -> bool:
        """Take keys and show news; false at the end."""
        for key in typed:
            if not self._press(key):
                return False
        if self._draft != self._sent:
            self._line.send({"type": "partial", "data": self._draft})
            self._sent = self._draft
        news = self._line.receive(timeout=KEY_SECONDS)
        while news is not None:
            self._show(news)
            news = self._line.receive(timeout=0)
        return True

    # Keys.

    def _press(self, key: str) -> bool:
        if key == CTRL_D:
            self._echo("\n")
            return False
        if key in "\r\n":
            return self._enter()
        if key in "\x7f\b":
            self._rub_out(1)
        elif key == CTRL_U:
            self._rub_out(len(self._draft))
        elif key.isprintable():
            self._draft += key
            self._echo(key)
        return True

    def _rub_out(self, count: int) -> None:
        gone = self._draft[len(self._draft) - min(count, len(self._draft)) :]
        self._draft = self._draft[: len(self._draft) - len(gone)]
        self._echo("\b \b" * cell_len(gone))

    def _enter(self) -> bool:
        """The return key; false for quit."""
        words, self._draft = self._draft, ""
        if not words.strip():
            return True
        message = self._wish.message(words)
        if self._at_prompt:
            typer.echo("")
            self._at_prompt, self._echoed = False, words
        if message is None:
            return False
        if message["type"] != "message" and self._sent:  # commands are no draft
            self._line.send({"type": "partial", "data": ""})
        self._sent = ""
        if message["type"] == "message":
            self._asked_at, self._seconds = time.perf_counter(), None
        self._line.send(message)
        return True

    def _echo(self, text: str) -> None:
        if self._at_prompt:
            typer.echo(text, nl=False)

    def _tell(self, what: str) -> None:
        """Of the connection."""
        was_at_prompt = self._at_prompt
        self._wipe()
        complain(what)
        if was_at_prompt:
            self._prompt()

    def _wipe(self) -> None:
        """Take the prompt off the screen: somebody else speaks."""
        if self._at_prompt:
            typer.echo("\r" + " " * cell_len(PROMPT + self._draft) + "\r", nl=False)
            self._at_prompt = False

    def _prompt(self) -> None:
        typer.echo(PROMPT + self._draft, nl=False)
        self._at_prompt = True

    # News.

    def _show(self, news: Message) -> None:
        kind = news["type"]
        if kind == "user_input":
            self._answering = True
            if self._echoed is not None and news["data"].endswith(self._echoed):
                self._echoed = None
                return
        if kind == "spent":  # of an answer that is off the screen
            return
        self._wipe()
        if kind == "token" and self._seconds is None and self._asked_at is not None:
            self._seconds = time.perf_counter() - self._asked_at
        if kind == "end":
            typer.echo("")
            typer.echo(cost_of(news, self._seconds), err=True)
            self._asked_at = self._seconds = None
        else:
            show(news)
        if kind in ("end", "error"):
            self._answering, self._echoed = False, None
        if not self._answering and kind != "user_input":
            self._prompt()
