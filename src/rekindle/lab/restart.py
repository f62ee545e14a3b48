"""What a long prompt's first token waits for: computing it, or KV that outlived the process.

Every arm is a server process of its own that is asked over HTTP, with an empty engine and an empty memory tier, and every
time is the client's, from sending the request to the first piece of the answer:

- *cold*: nothing is stored, all is computed;
- *second server*: another server has the folder open, and has computed the prompt;
- *restart*: that server has ended, and a new one has the folder; once with its files in the system's page cache, as they
  are after a restart of the server, and once without, as after a restart of the machine;
- *Redis*: a new server without a disk tier, after another one, with a Redis server on the loopback.

**The physics.** To compute a prompt, each weight takes part in a multiplication for each token. To restore it, its KV is
read once and copied once, so it can't take less than reading those files (here: from the page cache into one buffer, as
`dd` does) and a memcpy of the same bytes. The rest is HTTP, and sampling from logits that were stored as well.

Prompts that were stored must be restored whole: a single token that was computed fails the experiment.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from rekindle.errors import RekindleError
from rekindle.lab.load.client import Answer, ServerError, Target
from rekindle.lab.load.servers import Setup, find_model, rekindle_server
from rekindle.lab.load.texts import words
from rekindle.lab.machine import Machine, this_machine, usable_cores
from rekindle.lab.redis_server import RedisServer, redis_server
from rekindle.lab.scratch import scratch_folder
from rekindle.lab.store_tiers import drop_from_page_cache, read_through
from rekindle.settings import Settings

_ANSWER_TOKENS = 4
_STILL_SECONDS = 1.0  # nothing was written for so long: all is written
_LATE_SECONDS = 15.0  # the same where less is there than expected: the server may only be busy
_SETTLE_SECONDS = 60.0
_SPARE_CELLS = 2048

Progress = Callable[[str], None]


class NotRestored(RekindleError):
    """A prompt that was stored was computed again, or answered otherwise."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to the first token."""

    name: str
    ttft_seconds: tuple[float, ...]  # of each prompt
    prompt_tokens: int  # of all prompts
    computed_tokens: int  # of these

    @property
    def ttft(self) -> float:
        """Median."""
        return median(self.ttft_seconds)


@dataclass(frozen=True, kw_only=True)
class RestartReport:
    """What was measured. The first arm is the cold one."""

    machine: Machine
    model: str
    threads: int
    prompts: int
    kv_bytes: int  # of a prompt, as stored
    limit_seconds: float  # to read so much from the page cache and to copy it once
    arms: tuple[Arm, ...]
    skipped: tuple[str, ...]

    def share(self, arm: Arm) -> float:
        """Of the cold time: the median over prompts, each of which took both ways."""
        return median(own / cold for own, cold in zip(arm.ttft_seconds, self.arms[0].ttft_seconds, strict=True))

    def as_json(self) -> str:
        """One line of JSON."""
        arms = [asdict(arm) | {"ttft": round(arm.ttft, 5), "share": round(self.share(arm), 5)} for arm in self.arms]
        return json.dumps({"experiment": "restart"} | asdict(self) | {"arms": arms})


def run_restart(
    model: str,
    *,
    prompt_tokens: int = 2_000,
    prompts: int = 3,
    threads: int | None = None,
    folder: Path | None = None,
    progress: Progress = lambda what: None,
) -> RestartReport:
    """The whole experiment on a model (`builtin`, a path, `hf:…`), with KV in a new folder inside `folder`.

    Raises InvalidRequest, ModelError, ServerError if a server doesn't start or answer, NotRestored if KV was not used.
    """
    setup = Setup(
        model=find_model(model),
        threads=threads or usable_cores(),
        context=prompts * prompt_tokens + _SPARE_CELLS,
        parallel=1,
    )
    with scratch_folder(folder) as scratch, redis_server() as redis:
        bench = _Bench(setup, scratch, redis, prompt_tokens, prompts, progress)
        arms = [*bench.with_folder(), *(bench.with_redis() if redis is not None else ())]
        kv_bytes, limit = bench.limit()
    return RestartReport(
        machine=this_machine(),
        model=setup.model.name,
        threads=setup.threads,
        prompts=prompts,
        kv_bytes=kv_bytes,
        limit_seconds=limit,
        arms=tuple(arms),
        skipped=() if redis is not None else ("Redis: neither redis-server nor valkey-server is installed",),
    )


class _Bench:
    """Servers that come and go, and the prompts that all of them are asked."""

    def __init__(
        self, setup: Setup, scratch: Path, redis: RedisServer | None, tokens: int, count: int, progress: Progress
    ) -> None:
        self._setup = setup
        self._folder = scratch / "store"
        self._redis = redis
        self._tokens = tokens
        self._count = count
        self._progress = progress
        self._texts: list[str] = []
        self._answers: list[str] = []  # that the cold arm gave

    def with_folder(self) -> Iterator[Arm]:
        """Cold, and all arms that find KV in the folder."""
        disk = {"REKINDLE_STORE": str(self._folder)}
        with self._server(disk) as first:
            yield (cold := self._ask(first, "cold", stored=False))
            _until_still(lambda: len(self._files()), _blocks_of(cold))
            with self._server(disk) as second:
                yield self._ask(second, "second server on the folder")
        with self._server(disk) as server:
            yield self._ask(server, "restart, from disk")
        files = self._files()
        with self._server(disk) as server:
            gone = drop_from_page_cache(files)
            yield self._ask(server, f"restart, {gone:.0%} of the files out of the page cache")

    def with_redis(self) -> Iterator[Arm]:
        """A server fills Redis, another one finds it filled."""
        assert self._redis is not None
        network = {"REKINDLE_STORE": "none", "REKINDLE_STORE_URL": self._redis.url}
        with self._redis.client() as client:
            with self._server(network) as server:
                fill = self._ask(server, "fill", stored=False)
                _until_still(lambda: int(client.dbsize()), _blocks_of(fill))
            with self._server(network) as server:
                yield self._ask(server, "restart, from Redis")

    def limit(self) -> tuple[int, float]:
        """A prompt's stored bytes, and seconds to read them from the page cache and to copy them."""
        files = self._files()
        num_bytes = sum(path.stat().st_size for path in files)
        source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
        read_through(files)
        seconds = []
        for _ in range(5):
            began = time.perf_counter()  # clock on
            read_through(files)
            np.copyto(target, source)
            seconds.append(time.perf_counter() - began)  # clock off
        return num_bytes // self._count, median(seconds) / self._count

    def _files(self) -> list[Path]:
        return [path for path in self._folder.rglob("*.safetensors") if path.is_file()]

    @contextmanager
    def _server(self, variables: Mapping[str, str]) -> Iterator[str]:
        with rekindle_server(self._setup, **variables) as server:
            yield server.url

    def _ask(self, url: str, name: str, *, stored: bool = True) -> Arm:
        """All prompts, one after the other. Raises ServerError or NotRestored."""
        self._progress(name)
        answers = asyncio.run(self._answers_of(url))
        if not self._answers:
            self._answers = [answer.text for answer in answers]
        for answer, expected in zip(answers, self._answers, strict=True):
            if stored and answer.computed_tokens != 0:
                raise NotRestored(
                    f"{name}: 0 of {answer.prompt_tokens} prompt tokens should have been computed, "
                    f"{answer.computed_tokens} were"
                )
            if answer.text != expected:
                raise NotRestored(f"{name}: the answer {expected!r} was expected, got {answer.text!r}")
        return Arm(
            name=name,
            ttft_seconds=tuple(answer.ttft or 0.0 for answer in answers),
            prompt_tokens=sum(answer.prompt_tokens or 0 for answer in answers),
            computed_tokens=sum(answer.computed_tokens or 0 for answer in answers),
        )

    async def _answers_of(self, url: str) -> list[Answer]:
        async with Target(url) as target:
            await target.connect()  # a short request, after which everything is set up
            if not self._texts:
                num_words = int(self._tokens / await target.tokens_per_word())
                self._texts = [words(f"restart {number}", num_words) for number in range(self._count)]
            answers = []
            for text in self._texts:
                answer = await target.ask([{"role": "user", "content": text}], _ANSWER_TOKENS)
                if answer.error is not None:
                    raise ServerError(f"{url} did not answer: {answer.error}")
                answers.append(answer)
            return answers


def _blocks_of(arm: Arm) -> int:
    """That a server which was asked this keeps at least, mostly: whole ones, and the tails."""
    return 1 + arm.prompt_tokens // Settings.load().block_tokens


def _until_still(count: Callable[[], int], expected: int) -> None:
    """Until what is written behind is written, as seen from outside: so many blocks or more, and no more come."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    last, since = -1, time.monotonic()
    while time.monotonic() < deadline:
        time.sleep(0.1)
        now = count()
        if now != last:
            last, since = now, time.monotonic()
        if time.monotonic() - since >= (_STILL_SECONDS if now >= expected else _LATE_SECONDS):
            return


def print_report(report: RestartReport, console: Console) -> None:
    """A table for people, then one line of JSON."""
    cold = report.arms[0]
    each = cold.prompt_tokens // report.prompts
    table = Table(title=f"The first token of prompts of {each:,} tokens, {report.model}", title_justify="left")
    table.add_column("")
    for heading in ("TTFT, ms", "of cold", "slowest to fastest, ms", "tokens computed"):
        table.add_column(heading, justify="right")
    for arm in report.arms:
        slowest, fastest = 1e3 * max(arm.ttft_seconds), 1e3 * min(arm.ttft_seconds)
        times = (f"{1e3 * arm.ttft:,.1f}", f"{report.share(arm):.1%}", f"{slowest:,.1f} to {fastest:,.1f}")
        table.add_row(arm.name, *times, f"{arm.computed_tokens:,}")
    limit = report.limit_seconds
    table.add_row("reading and copying the KV alone", f"{1e3 * limit:,.1f}", f"{limit / cold.ttft:.2%}", "", "")
    console.print(table)
    console.print(
        f"{report.prompts} prompts, each asked once of every server; medians. A prompt's KV takes "
        f"{report.kv_bytes / 1e6:,.1f} MB. {report.threads} threads on {report.machine.processor}.",
        highlight=False,
    )
    for text in report.skipped:
        console.print(f"Not measured: {text}.", highlight=False, markup=False)
    console.print(report.as_json(), soft_wrap=True, markup=False, highlight=False)
