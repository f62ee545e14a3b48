"""Floor 6: the `rekindle` command. Parses arguments, calls the floors below, prints for people.

`app.py` lists the commands. Options that are settings are made from `Settings` itself (`options.py`), so help text and
settings can't drift apart. Errors leave by one door (`refusals.py`): one line on stderr and an exit code. `talk.py`
hides whether an answer comes from a model in this process or from a server (`client.py`); `chat.py`, `generate.py` and
`demo.py` are written against it.

Answers go to stdout; all that is said about them goes to stderr, so that stdout can be piped.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `rekindle` command."""
    try:
        from rekindle.cli.app import app

        app()
    except KeyboardInterrupt:  # pressed before a command began
        sys.exit(130)
