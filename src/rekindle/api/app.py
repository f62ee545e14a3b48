"""The app: the door, the refusals and the routes, put together."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import rekindle
from rekindle.api import refusals
from rekindle.api.answers import Runner
from rekindle.api.cache import cache_router
from rekindle.api.chat import chat_router
from rekindle.api.completions import completions_router
from rekindle.api.door import Door
from rekindle.api.folder import folder_router
from rekindle.api.generate import generate_router
from rekindle.api.keys import Keys
from rekindle.api.load import Load
from rekindle.api.metrics import metrics_router
from rekindle.api.openai import models_router
from rekindle.api.origins import is_local
from rekindle.api.realtime import realtime_router
from rekindle.api.requests import Requests
from rekindle.api.responses import responses_router
from rekindle.api.responses_kept import KeptResponses
from rekindle.api.responses_socket import responses_socket_router
from rekindle.api.sockets import LiveSessions, sockets_router
from rekindle.api.status import status_router
from rekindle.api.traces import telemetry
from rekindle.serve.service import Service


def create_app(service: Service) -> FastAPI:
    """The HTTP API of an open service. Who opened the service closes it. Raises InvalidRequest for a bad key file.

    `app.state.runner` ends what still runs, `app.state.load` knows what is under way and lets nothing new in.
    `app.state.live` has the live sessions, to be closed when nothing more comes.

    The schema is at /openapi.json. FastAPI's pages for it are left out: they load scripts from the network.
    """
    app = FastAPI(
        title="Rekindle",
        version=rekindle.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=telemetry(service.traces),
    )
    settings = service.settings
    keys = Keys.load(settings)
    load = app.state.load = Load(settings)
    app.add_middleware(
        Door,
        keys=keys,
        load=load,
        max_body_bytes=settings.max_body_bytes,
        origins=settings.cors_origin,
        hosts=("*",) if keys or not is_local(settings.host) else settings.allowed_host,
    )
    if settings.cors_origin:  # outside of the door: browsers ask for leave without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    app.add_middleware(Requests, metrics=service.metrics)
    refusals.install(app)
    runner = app.state.runner = Runner(service, load)
    live = app.state.live = LiveSessions(service, load)
    kept = KeptResponses(settings.max_responses, settings.response_ttl_seconds)
    routers = [models_router(service), chat_router(runner), completions_router(runner), generate_router(runner)]
    for router in [
        *routers,
        responses_router(runner, kept),
        responses_socket_router(runner, kept),
        cache_router(runner),
        folder_router(service),
        status_router(service, load),
        metrics_router(service),
        sockets_router(service, live, load),
        realtime_router(service, live, load),
    ]:
        app.include_router(router)
    app.add_api_websocket_route("/{path:path}", refusals.no_such_socket)  # the last: what no other route took
    return app
