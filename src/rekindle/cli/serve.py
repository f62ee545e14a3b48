"""`rekindle serve`: open the model, put it on a socket, say where, and end cleanly on a signal.

SIGINT and SIGTERM are the normal way to end a server. While it loads, nothing is at stake: it ends at once, with 0.
While it serves, the first one lets running answers end (`rekindle.api.server`), then the store is written, and it ends
with 0. Another one meanwhile ends it at once, with 130 or 143. When the worker fails it ends by itself, with 1, so that
a supervisor can start it anew.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from types import FrameType
from typing import TYPE_CHECKING

import typer
from pydantic import ByteSize

from rekindle import heap
from rekindle.cli.refusals import FAILED, complain
from rekindle.errors import EngineError
from rekindle.settings import Settings

if TYPE_CHECKING:
    from rekindle.serve.service import Service

# The HTTP thread and the worker share Python's interpreter lock. By default a thread that computes may keep another
# waiting for 5 ms, which is most of the TTFT of a repeated prompt; this is how long it may now.
SWITCH_SECONDS = 0.0005
CLOSE_SECONDS = 5.0  # beside writing the store, for closing what a failed worker has left


def run_server(settings: Settings, *, at_end: Callable[[Service], object] | None = None) -> None:
    """Serve until SIGINT or SIGTERM, then do something `at_end`, before the service closes. Raises RekindleError."""
    heap.share_arenas()  # before there are threads
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.disable()  # what is loaded stays: looking through it for garbage takes a tenth of the start
    outside = _Signals()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, outside.handle)
    from rekindle.api.keys import Keys  # these take a while; signals are ours already
    from rekindle.api.origins import is_local
    from rekindle.api.server import serve
    from rekindle.cli.logs import set_up
    from rekindle.serve.service import Service

    set_up(settings.log_format, settings.log_level)

    if not Keys.load(settings) and not is_local(settings.host):
        complain(f"anybody who reaches {settings.host} may use this server: no API key is set")
    typer.echo(f"Loading {settings.model} …", err=True)
    with closing(Service.open(settings)) as service:

        def ready(url: str) -> None:
            outside.served = True
            gc.freeze()  # and later on would stop all streams for tens of milliseconds
            gc.enable()
            typer.echo(f"Rekindle is listening on {url} ({describe(service)})")

        try:
            serve(service, settings.host, settings.port, ready)
        except EngineError as error:
            if service.alarm == "stalled":  # its thread would be waited for in vain
                complain(str(error))
                os._exit(FAILED)
            # Nobody knows what the failure has left: if closing hangs, the process ends with 1 all the same.
            faulthandler.dump_traceback_later(settings.store_flush_seconds + CLOSE_SECONDS, exit=True)
            raise
        if at_end is not None:
            at_end(service)


class _Signals:
    """What a signal does while the server is not serving."""

    def __init__(self) -> None:
        self.served = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Before, nothing is at stake; afterwards the end has been asked for already, and cannot wait."""
        os._exit(128 + number if self.served else 0)


def describe(service: Service) -> str:
    """Model, engine, cells, threads, KV type and the store's memory, in one line."""
    from rekindle.serve.assembly import num_threads

    threads = num_threads(service.settings)
    memory = ByteSize(service.stats().max_bytes).human_readable()
    share = " (a quarter of what was free)" if service.settings.store_memory is None else ""
    return (
        f"model {service.model_name}, engine {service.health()['engine']}, {service.num_cells} cells, "
        f"{threads} {'thread' if threads == 1 else 'threads'}, {service.engine_spec.kv_type} KV, "
        f"{memory} of memory for stored KV{share}"
    )
