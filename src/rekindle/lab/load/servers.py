"""Starts servers for the time of a context: rekindle, and llama.cpp's own.

Each is a process on 127.0.0.1 with a port that the system chose, and is ended in every case. A server that does not start
is an error that holds the last lines of what it wrote.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import llama_cpp

from rekindle.errors import InvalidRequest, nearest
from rekindle.lab.load.client import ServerError
from rekindle.model.model import Model

START_SECONDS = 300.0
STOP_SECONDS = 20.0
PEER = "llama-server"
_LISTENS = re.compile(r"listening on (http://\S+)\s")
_ABOUT = re.compile(r'^(\{"url".*\})$', re.MULTILINE)
_POLL_SECONDS = 0.05
_LEASH = (sys.executable, "-m", "rekindle.lab.load.leash") if hasattr(os, "fork") else ()
_KERNEL = re.compile(r"\b([A-Z][A-Z0-9_]+) = 1\b")


class DidNotStart(ServerError):
    """A server that was started here did not come to listen."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What both servers get."""

    model: Path
    threads: int
    context: int  # cells, shared by all sequences
    parallel: int  # sequences that run at the same time
    options: Mapping[str, Any] = field(default_factory=dict)  # for the peer: fields of common_params, or long flags


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that answers."""

    name: str
    url: str
    build: str = ""
    kernels: frozenset[str] = frozenset()  # instruction sets it was built for, as llama.cpp names them
    pid: int | None = None  # of a server that was started here

    def cpu_seconds(self) -> float | None:
        """Processor time that it has used so far, all threads together; None where that can't be told.

        By the process's own clock, clock_getcpuclockid(3): in /proc it is counted in hundredths of a second, too coarse for
        one answer of a small model.
        """
        clock = ctypes.c_int()
        if self.pid is None or sys.platform != "linux":
            return None
        if ctypes.CDLL(None).clock_getcpuclockid(self.pid, ctypes.byref(clock)) != 0:  # it has ended
            return None
        try:
            return time.clock_gettime(clock.value)
        except OSError:  # just now
            return None


Start = Callable[[], AbstractContextManager[Server]]
T = TypeVar("T")


@contextmanager
def rekindle_server(setup: Setup, **variables: str) -> Iterator[Server]:
    """`rekindle serve`, with these environment variables; without a disk tier, unless one is named. Raises ServerError."""
    command = [sys.executable, "-m", "rekindle", "serve", "--host", "127.0.0.1", "--port", "0"]
    command += ["--model", str(setup.model), "--threads", str(setup.threads), "--context", str(setup.context)]
    command += ["--max-running", str(setup.parallel)]
    environment = {"REKINDLE_STORE": "none"} | os.environ | variables
    with _process(command, environment) as started:
        url = started.first(_LISTENS)
        kernels = kernels_of(llama_cpp.llama_print_system_info().decode())
        yield Server(
            name="rekindle",
            url=url,
            build=f"llama-cpp-python {llama_cpp.__version__}",
            kernels=kernels,
            pid=started.process.pid,
        )


@contextmanager
def wheel_server(setup: Setup) -> Iterator[Server]:
    """llama-server out of the xllamacpp wheel. Raises InvalidRequest if it is not installed, ServerError."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise InvalidRequest(
            f"the peer {PEER} needs xllamacpp: pip install 'rekindle[lab-peer]', or give the path of a {PEER}",
            param="peer",
        )
    wish = {
        "model": str(setup.model),
        "threads": setup.threads,
        "context": setup.context,
        "parallel": setup.parallel,
        "options": dict(setup.options),
    }
    command = [sys.executable, "-m", "rekindle.lab.load.peer_process", json.dumps(wish)]
    with _process(command, os.environ) as started:
        about = json.loads(started.first(_ABOUT))
        started.wait_until_ready(about["url"])
        kernels, pid = kernels_of(about["kernels"]), started.process.pid
        yield Server(name=PEER, url=about["url"], build=about["build"], kernels=kernels, pid=pid)


@contextmanager
def binary_server(setup: Setup, binary: Path) -> Iterator[Server]:
    """A llama-server that was built elsewhere. Raises ServerError."""
    command = [str(binary), "--host", "127.0.0.1", "--port", "0", "--model", str(setup.model), "--gpu-layers", "0"]
    command += ["--threads", str(setup.threads), "--threads-batch", str(setup.threads)]
    command += ["--ctx-size", str(setup.context), "--parallel", str(setup.parallel), "--kv-unified"]
    for name, value in setup.options.items():
        command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    with _process(command, os.environ) as started:
        url = started.first(_LISTENS)
        started.wait_until_ready(url)
        kernels, pid = kernels_of(started.said), started.process.pid
        yield Server(name=PEER, url=url, build=str(binary), kernels=kernels, pid=pid)


def find_model(name: str) -> Path:
    """Where a model lies. Raises ModelError as a server would that is to serve it, before there is one."""
    with closing(Model.open(name, vocab_only=True)) as model:
        return model.path


def peer_starter(peer: str, setup: Setup) -> Start:
    """How to start the peer of this name, or at this path. Raises InvalidRequest if there is none."""
    if peer == PEER:
        return lambda: wheel_server(setup)
    found = shutil.which(peer)
    if found is not None and (os.sep in peer or Path(peer).name.startswith(PEER)):
        return lambda: binary_server(setup, Path(found))
    hint = nearest(peer, [PEER]) if os.sep not in peer else ""
    raise InvalidRequest(f"no peer is called {peer!r}{hint}; a path of a {PEER} program will do too", param="peer")


def kernels_of(system_info: str) -> frozenset[str]:
    """Instruction sets named as present in llama.cpp's description of the system."""
    return frozenset(_KERNEL.findall(system_info))


@contextmanager
def _process(command: list[str], environment: Mapping[str, str]) -> Iterator[_Started]:
    """A process of a session of its own, so that Ctrl-C here does not end it before its answers were counted."""
    with (
        tempfile.TemporaryFile() as log,  # not a pipe, which would be full one day
        subprocess.Popen(
            [*_LEASH, *command],  # ends with us, even if we are killed
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        ) as process,
    ):
        started = _Started(process, " ".join(Path(part).name for part in command[:3]), log.fileno())
        try:
            yield started
            started.check()
        except DidNotStart:
            raise
        except ServerError:
            started.check()  # a better reason than that requests failed
            raise
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


@dataclass(frozen=True)
class _Started:
    """A process that may become a server."""

    process: subprocess.Popen[bytes]
    name: str
    log: int  # descriptor of the file that holds what it wrote

    @property
    def said(self) -> str:
        """All that it wrote so far; its own place in the file does not move."""
        return os.pread(self.log, os.fstat(self.log).st_size, 0).decode("utf-8", "replace")

    def check(self) -> None:
        """Raises ServerError if the process has ended although nobody asked it to: what was measured means nothing."""
        code = self.process.poll()
        if code is not None:
            raise ServerError(f"{self.name} ended while it was measured (exit code {code}): {self._last}")

    @property
    def _last(self) -> str:
        lines = self.said.strip().split("\n")[-3:]
        return " | ".join(line.strip() for line in lines).strip() or "it gave no reason"

    def first(self, pattern: re.Pattern[str]) -> str:
        """The first group of the pattern, once it was written. Raises DidNotStart if it never is."""

        def found() -> str | None:
            match = pattern.search(self.said)
            return match[1] if match else None

        return self._wait_for(found)

    def wait_until_ready(self, url: str) -> None:
        """Until `/health` says 200: a server may listen while it still loads. Raises DidNotStart if it never does."""
        with httpx.Client(trust_env=False, timeout=START_SECONDS) as http:

            def healthy() -> bool | None:
                try:
                    return http.get(f"{url}/health").status_code == httpx.codes.OK or None
                except httpx.TransportError:
                    return None

            self._wait_for(healthy)

    def _wait_for(self, found: Callable[[], T | None]) -> T:
        deadline = time.monotonic() + START_SECONDS
        state = f"did not start within {START_SECONDS:g} s"
        while time.monotonic() < deadline:
            code = self.process.poll()  # before looking: what it wrote last is seen
            value = found()
            if value is not None:
                return value
            if code is not None:
                state = f"ended before it listened (exit code {code})"
                break
            time.sleep(_POLL_SECONDS)
        raise DidNotStart(f"{self.name} {state}: {self._last}")
