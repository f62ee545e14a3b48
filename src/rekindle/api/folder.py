"""A server's folder, seen and cared for from outside: `/cache/list`, `/cache/verify`, `/cache/prune`.

What `rekindle cache` does with a folder on its own machine. With API keys, a list has only what was stored for the caller's
key without a `cache_salt`: the salt of anything else is not known from a file.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request

from rekindle.api.cache_wire import PruneRequest, VerifyRequest
from rekindle.api.keys import ANYBODY, caller_of
from rekindle.api.refusals import Json
from rekindle.errors import InvalidRequest
from rekindle.kv.catalog import read_catalog, verify
from rekindle.serve import listing
from rekindle.serve.listing import Pruning, Sort, Wanted
from rekindle.serve.service import Service

MAX_LISTED = 10_000


class NoFolder(InvalidRequest):
    """This server has no disk tier, or nothing was written yet."""

    status = 409
    code = "no_folder"


def folder_router(service: Service) -> APIRouter:
    """These endpoints."""
    router = APIRouter(prefix="/cache", tags=["cache"])

    @router.get("/list")
    async def list_(
        request: Request,
        blocks: bool = False,
        sort: Sort = "used",
        limit: Annotated[int, Query(ge=0, le=MAX_LISTED)] = 50,
        fingerprint: Annotated[list[str] | None, Query()] = None,
    ) -> Json:
        """The prompts in this server's folder: last use, tokens, size, model, pin and first words."""
        caller = caller_of(request)
        salt = None if caller == ANYBODY else caller.salt()
        names = fingerprint or []
        wanted = Wanted(blocks=blocks, sort=sort, limit=limit or MAX_LISTED, fingerprints=names, salt=salt)
        return Json(await asyncio.to_thread(_list, service, wanted))

    @router.post("/verify")
    async def verify_(body: VerifyRequest | None = None) -> Json:
        """Read every block of this server's folder and check it."""
        return Json(await asyncio.to_thread(_verify, service, body is not None and body.repair))

    @router.post("/prune")
    async def prune(body: PruneRequest) -> Json:
        """Delete part of this server's folder. What is pinned, or used meanwhile, stays."""
        wish = Pruning(
            max_size=body.max_size,
            older_than=body.older_than,
            orphans=body.orphans,
            fingerprints=body.fingerprints,
        )
        return Json(await asyncio.to_thread(listing.prune, _folder(service), wish, time.time(), dry_run=body.dry_run))

    return router


def _folder(service: Service) -> Path:
    if service.folder is None:
        raise NoFolder("this server's store has no folder: it was started with --store none")
    if not service.folder.exists():
        raise NoFolder("this server has written nothing to its folder yet")
    return service.folder


def _list(service: Service, wanted: Wanted) -> dict[str, Any]:
    catalog = read_catalog(_folder(service))
    return listing.listed(catalog, wanted, service.decode_own, time.time())


def _verify(service: Service, repair: bool) -> dict[str, Any]:
    started = time.perf_counter()
    check = verify(_folder(service), repair=repair)
    found = listing.check_as_dict(check, time.perf_counter() - started)
    names = [{"path": Path(each["path"]).name} for each in found["problems"]]  # no path of this machine leaves it
    return found | {"problems": [each | name for each, name in zip(found["problems"], names, strict=True)]}
