"""`rekindle chat` on a terminal, with the keys that people press."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

CTRL_C, CTRL_D = b"\x03", b"\x04"


class Terminal:
    """One end of a pseudo-terminal."""

    def __init__(self, end: int) -> None:
        self._end = end
        self._seen = b""

    def press(self, keys: bytes) -> None:
        os.write(self._end, keys)

    def press_once(self, key: bytes, text: bytes) -> None:
        """Press a key that is a signal, and then the return key each second, until something is shown.

        Python notices a signal that comes just before it begins to wait for input only with the next line. A second signal
        could come while the first one is dealt with, and empty lines do nothing.
        """
        self.press(key)
        while text not in self._seen:
            if select.select([self._end], [], [], 1.0)[0]:
                self._seen += os.read(self._end, 4096)
            else:
                self.press(b"\n")
        self._seen = self._seen.partition(text)[2]

    def wait_for(self, text: bytes) -> bytes:
        """All that was shown up to and with `text` since the last call."""
        while text not in self._seen:
            self._seen += os.read(self._end, 4096)
        shown, found, self._seen = self._seen.partition(text)
        return shown + found


# Opening it as the leader of a session makes a terminal the controlling one: then Ctrl-C on it is a signal.
# Who starts the tests may ignore SIGINT, as a shell does for what it runs in the background.
TAKE_AND_RUN = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
os.open(os.ttyname(0), os.O_RDWR)
from rekindle.cli import main
sys.argv[0] = "rekindle"
main()
"""


@contextmanager
def on_a_terminal(environment: dict[str, str], *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], Terminal]]:
    """A command, and the other end of its terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", TAKE_AND_RUN, *arguments]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    ) as process:
        os.close(theirs)
        try:
            yield process, Terminal(ours)
        finally:
            process.kill()
            os.close(ours)


def test_a_conversation_with_ctrl_c_at_the_prompt_and_ctrl_d_at_the_end(environment: dict[str, str]) -> None:
    with on_a_terminal(environment, "chat", "--max-tokens", "8") as (process, terminal):
        assert b"Talking with ember." in terminal.wait_for(b"> ")
        terminal.press(b"Hello.\n")
        assert b"tokens reused" in terminal.wait_for(b"tokens/s")
        terminal.wait_for(b"> ")
        terminal.press(b"never mind")
        terminal.wait_for(b"never mind")
        terminal.press_once(CTRL_C, b"> ")
        terminal.press(b"/help\n")
        terminal.wait_for(b"/reset")
        terminal.wait_for(b"> ")
        terminal.press(CTRL_D)
        assert process.wait(60) == 0


def test_ctrl_c_while_the_model_answers_leaves_the_chat_open(environment: dict[str, str]) -> None:
    """The answer may have ended before the key arrives; then the key drops an empty line. Either way the chat goes on."""
    with on_a_terminal(environment, "chat", "--max-tokens", "1000") as (process, terminal):
        terminal.wait_for(b"> ")
        terminal.press(b"Hello.\n")
        terminal.wait_for(b"Hello.")
        terminal.press_once(CTRL_C, b"> ")
        terminal.press(b"/quit\n")
        assert process.wait(60) == 0
