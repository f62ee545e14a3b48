"""Floor 6: the `rekindle` command. Parses arguments, calls the floors below, prints for people.

`app.py` lists the commands. Options that are settings are made from `Settings` itself (`options.py`), so help text and
settings can't drift apart. Errors leave by one door (`refusals.py`): one line on stderr and an exit code. `talk.py`
hides whether an answer comes from a model in this process or from a server (`client.py`); `chat.py`, `generate.py` and
`demo.py` are written against it.

Answers go to stdout; all that is said about them goes to stderr, so that stdout can be piped.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Entry point of the `rekindle` command."""
    if sys.argv[1:2] == ["serve"]:  # a signal is the normal way to end it, also before it has begun (`serve.py`)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: os._exit(0))
    try:
        from rekindle.cli.app import app

        app()
    except KeyboardInterrupt:  # pressed before a command began
        sys.exit(130)
