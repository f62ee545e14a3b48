"""`rekindle chat`: a conversation in the terminal.

What is typed goes in, the answer streams out, and a dim line says what it cost. The conversation is a list of messages
that only ever grows at its end, so everything up to the new message is reused. With stdin piped, each line is one
message.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rekindle.cli.client import first_key
from rekindle.cli.talk import Answer, Message, Remote, Talker, Wish
from rekindle.errors import InvalidRequest, RekindleError
from rekindle.settings import Settings

COMMANDS = {
    "/reset": "forget the conversation (not the system message and the documents)",
    "/stats": "what the cache did so far",
    "/help": "these commands",
    "/quit": "end, as Ctrl-D does",
}
HINT = "Ctrl-C interrupts an answer, Ctrl-D or /quit ends, /help lists commands."


def run_chat(
    settings: Settings,
    wish: Wish,
    *,
    url: str | None,
    system: str | None,
    files: Sequence[Path],
    key: str | None = None,
) -> int:
    """Chat with a server, or with a model opened here; returns how many messages could not be answered.

    `key`: for the server, instead of the one in the settings.
    """
    beginning = opening(system, files)
    if url is not None:
        remote = Remote(url, key=key or first_key(settings))
        return _talk(remote, beginning, wish, str(remote.client.get("/health").get("model")))
    from rekindle.cli.talk_local import Local  # here: a chat with a server needs no model library
    from rekindle.serve.service import Service

    with closing(Service.open(settings)) as service:
        return _talk(Local(service), beginning, wish, service.model_name)


def _talk(talker: Talker, beginning: Sequence[Message], wish: Wish, model: str) -> int:
    out, err = Console(), Console(stderr=True)
    typed = sys.stdin.isatty()
    if typed:
        err.print(f"Talking with {model}. {HINT}", style="dim", markup=False, highlight=False)
    chat = Chat(talker, beginning, wish, out=out, err=err)
    return chat.run(typed_lines(out) if typed else piped_lines())


def opening(system: str | None, files: Sequence[Path]) -> list[Message]:
    """The first message: instructions, then the documents. Raises InvalidRequest for a file that can't be read."""
    parts = ([system] if system else []) + [_read(file) for file in files]
    return [{"role": "system", "content": "\n\n".join(parts)}] if parts else []


def _read(file: Path) -> str:
    try:
        text = file.read_text("utf-8").strip()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{file} is not a UTF-8 text file", param="file") from None
    except OSError as error:
        raise InvalidRequest(f"cannot read {file}: {error.strerror}", param="file") from None
    if not text:
        raise InvalidRequest(f"{file} is empty", param="file")
    return text


class Chat:
    """One conversation on a terminal or a pipe."""

    def __init__(self, talker: Talker, opening: Sequence[Message], wish: Wish, *, out: Console, err: Console) -> None:
        self._talker = talker
        self._opening = list(opening)
        self._messages = list(opening)
        self._wish = wish
        self._out = out  # answers
        self._err = err  # all else

    def run(self, lines: Iterator[str]) -> int:
        """Answer until the lines end; returns how many could not be answered."""
        failures = 0
        for line in lines:
            try:
                said = line.strip()
                if said == "/quit":
                    break
                if said.startswith("/"):
                    self._obey(said)
                elif said:
                    failures += not self._answer(said)
            except KeyboardInterrupt:  # just before an answer, or just behind it
                self._note("Interrupted.")
        return failures

    def _obey(self, command: str) -> None:
        if command == "/reset":
            self._messages = list(self._opening)
            self._note("The conversation is forgotten.")
        elif command == "/stats":
            self._err.print(_as_table(self._talker.stats()))
        else:
            if command != "/help":
                self._note(f"There is no command {command}.")
            for name, meaning in COMMANDS.items():
                self._note(f"{name:8}{meaning}")

    def _answer(self, said: str) -> bool:
        """Say something and print the answer; what was said is forgotten if nothing came."""
        asked: list[Message] = [*self._messages, {"role": "user", "content": said}]
        heard = ""
        try:
            with closing(self._talker.chat(asked, self._wish)) as answering:
                for part in answering:
                    if isinstance(part, Answer):
                        self._end_line(heard)
                        self._note(part.summary)
                    else:
                        self._show(part if heard.strip() else part.lstrip())
                        heard += part
        except KeyboardInterrupt:
            self._end_line(heard)
            self._note("Interrupted.")
        except RekindleError as error:
            self._end_line(heard)
            self._err.print(f"rekindle: {error}", markup=False, highlight=False, soft_wrap=True)
            return False
        if heard:
            self._messages = [*asked, {"role": "assistant", "content": heard}]
        return True

    def _show(self, piece: str) -> None:
        self._out.print(piece, end="", markup=False, highlight=False, emoji=False, soft_wrap=True)
        self._out.file.flush()

    def _end_line(self, heard: str) -> None:
        if heard and not heard.endswith("\n"):
            self._out.print()

    def _note(self, text: str) -> None:
        self._err.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def typed_lines(console: Console, prompt: str = "> ") -> Iterator[str]:
    """Lines from a terminal, with history; Ctrl-C at the prompt drops the line, Ctrl-D ends."""
    with suppress(ImportError):  # where there is one, importing it gives input() a history and line editing
        import readline  # noqa: F401
    while True:
        try:
            yield input(prompt)
        except KeyboardInterrupt:
            console.print()
        except EOFError:
            console.print()
            return


def piped_lines() -> Iterator[str]:
    """Lines from a pipe or a file."""
    yield from sys.stdin


def _as_table(stats: dict[str, object]) -> Table:
    table = Table(show_header=False, box=None)
    for name, value in stats.items():
        if isinstance(value, list | tuple):  # of the tiers: `rekindle cache stats` shows them
            continue
        table.add_row(name.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else str(value))
    return table
