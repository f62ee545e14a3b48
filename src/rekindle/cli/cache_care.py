"""`rekindle cache verify`, `clear`, `prune` and `unpin`: what changes a store, or tells that it should be changed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from rekindle.cli.cache_place import client_of, folder_of, one_of, understood
from rekindle.cli.cache_show import size
from rekindle.cli.client import ServerError
from rekindle.cli.refusals import complain
from rekindle.errors import InvalidRequest, counted
from rekindle.kv.catalog import Check, delete, delete_everything, read_catalog, unpin, verify
from rekindle.kv.pins import pin_id
from rekindle.serve import listing
from rekindle.serve.listing import Pruning

__all__ = ["Pruning", "check_store", "clear_store", "prune_store", "unpin_all"]

_SECOND = 10**9


def check_store(store: str | None, url: str | None, api_key: str | None, *, repair: bool, as_json: bool) -> bool:
    """Whether nothing is wrong."""
    one_of(store, url)
    if url is not None:
        found = client_of(url, api_key).post("/cache/verify", {"repair": repair})
    else:
        started = time.perf_counter()
        check = _verify(folder_of(store), repair)
        found = listing.check_as_dict(check, time.perf_counter() - started)
    with understood(url):
        is_sound = bool(found["ok"])
        if as_json:
            typer.echo(json.dumps(found))
        else:
            _show_check(found, repair)
        return is_sound


def _verify(folder: Path, repair: bool) -> Check:
    columns = (TextColumn("checking"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        return verify(folder, repair=repair, progress=lambda done, total: bar.update(task, completed=done, total=total))


def _show_check(found: Mapping[str, Any], repair: bool) -> None:
    for problem in found["problems"]:
        typer.echo(f"{problem['path']}: {problem['what']}")
    read = f"{counted(found['blocks'], 'sound block')}, {size(found['bytes'])} read in {found['seconds']:.1f} s"
    typer.echo(f"{read}{'; nothing is wrong' if found['ok'] else ''}")
    if found["torn"]:
        done = f"{counted(found['set_aside'], 'file')} set aside" if repair else "--repair sets them aside"
        typer.echo(f"{counted(found['torn'], 'file')} not what was written; nothing uses them; {done}")
    if found["orphans"]:
        typer.echo(
            f"{counted(found['orphans'], 'chain')} without a predecessor, of no use until it is computed again; "
            "rekindle cache prune --orphans deletes them"
        )


def clear_store(
    store: str | None,
    url: str | None,
    api_key: str | None,
    *,
    every_model: bool,
    fingerprints: Sequence[str],
    yes: bool,
) -> None:
    """Delete, after asking."""
    one_of(store, url)
    if url is not None:
        if fingerprints:
            raise InvalidRequest(
                "--fingerprint is for a folder; a server clears its model, or --all", param="fingerprint"
            )
        client = client_of(url, api_key)
        model = client.get("/health").get("model")
        if _agreed(f"everything that {client.url} keeps of {'every model' if every_model else model}", yes):
            client.post("/cache/clear", {"scope": "all" if every_model else "model"})
            typer.echo("cleared", err=True)
        return
    folder = folder_of(store)
    catalog = read_catalog(folder)
    chosen = listing.named(catalog, fingerprints)
    entries = [each for each in catalog.entries if chosen is None or each.front.fingerprint in chosen]
    num_bytes = catalog.num_bytes if chosen is None else sum(entry.file.num_bytes for entry in entries)
    models = ", ".join(catalog.name_of(each) for each in sorted(chosen or catalog.fingerprints())) or "no model"
    if not entries and not num_bytes:
        typer.echo("Nothing is stored.", err=True)
    elif _agreed(f"{counted(len(entries), 'block')} of {models}, {size(num_bytes)}, in {folder}", yes):
        if chosen is None:
            delete_everything(folder)
        else:
            delete(folder, entries)
        typer.echo(f"{counted(len(entries), 'block')} deleted, {size(num_bytes)}")


def _agreed(what: str, yes: bool) -> bool:
    return yes or typer.confirm(f"Delete {what}?", abort=True, err=True)


def prune_store(
    store: str | None, url: str | None, api_key: str | None, wish: Pruning, *, dry_run: bool, as_json: bool
) -> None:
    """Delete part of a store."""
    one_of(store, url)
    if url is not None:
        body = {
            "max_size": wish.max_size,
            "older_than": wish.older_than,
            "orphans": wish.orphans,
            "fingerprints": list(wish.fingerprints),
            "dry_run": dry_run,
        }
        found = client_of(url, api_key).post("/cache/prune", body)
    else:
        found = listing.prune(folder_of(store), wish, time.time(), dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps(found))
        return
    with understood(url):
        done, left = ("would be deleted", "would be left") if dry_run else ("deleted", "left")
        rest = f"{counted(found['left_blocks'], 'block')}, {size(found['left_bytes'])}, {left}"
        typer.echo(f"{counted(found['blocks'], 'block')}, {size(found['bytes'])}, {done}; {rest}")


def unpin_all(ids: Sequence[str], store: str | None, url: str | None, api_key: str | None) -> bool:
    """Whether all were there."""
    one_of(store, url)
    missing = [each for each in ids if not (_unpin_folder(each, store) if url is None else _unpin(each, url, api_key))]
    for each in missing:
        complain(f"there is no pin {each}; rekindle cache pins lists those there are")
    return not missing


def _unpin(pin: str, url: str, api_key: str | None) -> bool:
    try:
        client_of(url, api_key).delete(f"/cache/pin/{pin}")
    except ServerError as error:
        if error.answered != 404:
            raise
        return False
    return True


def _unpin_folder(pin: str, store: str | None) -> bool:
    catalog, now_ns = read_catalog(folder_of(store)), int(time.time() * _SECOND)
    for chain in catalog.pins(now_ns):
        if pin_id(chain.key) == pin:
            unpin(catalog, chain, now_ns)
            return True
    return False
