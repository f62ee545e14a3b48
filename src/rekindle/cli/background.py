"""A server in a process of its own, for as long as a context lasts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rekindle.cli.client import ServerError
from rekindle.cli.options import variable_of

STOP_SECONDS = 20.0
_URL = re.compile(r"https?://[^\s()]+")


@contextmanager
def server_process() -> Iterator[str]:
    """`rekindle serve` on a free port, with the settings of the environment; gives its URL once it listens.

    Unless the environment names one it has no disk tier: what a tour leaves behind is of no use to anybody.
    """
    command = [sys.executable, "-m", "rekindle", "serve", "--host", "127.0.0.1", "--port", "0"]
    environment = {variable_of("store"): "none"} | os.environ
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sys.stderr, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            announced = process.stdout.readline()  # ends without a line if the process does
            found = _URL.search(announced)
            if found is None:
                raise ServerError(f"the server ended before it listened (exit code {process.wait()})")
            yield found.group()
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
