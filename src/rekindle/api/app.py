"""The app: the door, the refusals and the routes, put together."""

from __future__ import annotations

from fastapi import FastAPI

import rekindle
from rekindle.api import refusals
from rekindle.api.answers import Runner
from rekindle.api.chat import chat_router
from rekindle.api.completions import completions_router
from rekindle.api.door import Door
from rekindle.api.generate import generate_router
from rekindle.api.openai import models_router
from rekindle.api.status import status_router
from rekindle.serve.service import Service


def create_app(service: Service) -> FastAPI:
    """The HTTP API of an open service. Who opened the service closes it. `app.state.runner` ends what still runs.

    The schema is at /openapi.json. FastAPI's pages for it are left out: they load scripts from the network.
    """
    app = FastAPI(title="Rekindle", version=rekindle.__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Door, max_body_bytes=service.settings.max_body_bytes)
    refusals.install(app)
    runner = app.state.runner = Runner(service)
    routers = [models_router(service), chat_router(runner), completions_router(runner), generate_router(runner)]
    for router in [*routers, status_router(service)]:
        app.include_router(router)
    return app
