"""`rekindle serve`: open the model, put it on a socket, say where, and end cleanly on a signal."""

from __future__ import annotations

import signal
import sys
from contextlib import closing
from types import FrameType
from typing import TYPE_CHECKING

import typer

from rekindle.settings import Settings

if TYPE_CHECKING:
    from rekindle.serve.service import Service

# The HTTP thread and the worker share Python's interpreter lock. By default a thread that computes may keep another
# waiting for 5 ms, which is most of the TTFT of a repeated prompt; this is how long it may now.
SWITCH_SECONDS = 0.0005


def run_server(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; both are a normal end, while the model loads too. Raises RekindleError."""
    sys.setswitchinterval(SWITCH_SECONDS)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        from rekindle.api.server import serve  # these take a while; signals are ours already
        from rekindle.serve.service import Service

        typer.echo(f"Loading {settings.model} …", err=True)
        with closing(Service.open(settings)) as service:
            serve(service, settings.host, settings.port, lambda url: _announce(service, url))
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _announce(service: Service, url: str) -> None:
    typer.echo(f"Rekindle is listening on {url} ({describe(service)})")


def describe(service: Service) -> str:
    """Model, engine, cells, threads and KV type, in one line."""
    from rekindle.lab.machine import usable_cores

    threads = service.settings.threads or usable_cores()
    return (
        f"model {service.model_name}, engine {service.health()['engine']}, {service.num_cells} cells, "
        f"{threads} {'thread' if threads == 1 else 'threads'}, {service.settings.kv_type} KV"
    )
