"""A server in a process of its own, for as long as a context lasts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rekindle.cli.client import ServerError
from rekindle.cli.options import variable_of

STOP_SECONDS = 20.0
_ANNOUNCED = re.compile(r"listening on (\S+) \((.*)\)")


@dataclass(frozen=True)
class Running:
    """A server that listens."""

    url: str
    setup: str  # model, engine, cells, threads and KV type, as it announced them


@contextmanager
def server_process() -> Iterator[Running]:
    """`rekindle serve` on a free port, with the settings of the environment, once it listens.

    Unless the environment says otherwise it has no disk tier, for what a tour leaves behind is of no use to anybody, and
    logs only what is wrong.
    """
    command = [sys.executable, "-m", "rekindle", "serve", "--host", "127.0.0.1", "--port", "0"]
    environment = {variable_of("store"): "none", variable_of("log_level"): "warning"} | os.environ
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            announced = process.stdout.readline()  # ends without a line if the process does
            found = _ANNOUNCED.search(announced)
            if found is None:
                raise ServerError(f"the server ended before it listened (exit code {process.wait()})")
            yield Running(found[1], found[2])
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
