"""`rekindle cache stats`, `ls` and `pins`: looking, without changing anything."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import typer
from rich.markup import escape
from rich.table import Table

from rekindle.cli.cache_place import client_of, decoder, folder_of, one_of, understood
from rekindle.cli.cache_show import ago, console, facts, rows, size, until, words
from rekindle.errors import counted
from rekindle.kv.catalog import read_catalog
from rekindle.serve import listing
from rekindle.serve.listing import Wanted

__all__ = ["Wanted", "show_list", "show_pins", "show_stats"]


def show_stats(store: str | None, url: str | None, api_key: str | None, *, as_json: bool) -> None:
    """Of a folder, or what a server says."""
    one_of(store, url)
    if url is not None:
        found = client_of(url, api_key).get("/cache/stats")
    else:
        found = listing.summary(read_catalog(folder_of(store)), time.time())
    if as_json:
        typer.echo(json.dumps(found))
        return
    with understood(url):
        _show_folder(found) if url is None else _show_server(found)


def _show_folder(found: Mapping[str, Any]) -> None:
    out = console()
    pairs = [
        ("folder", escape(found["folder"])),
        ("state", escape(found["state"])),
        (
            "stored",
            f"{counted(found['blocks'], 'block')} of {counted(found['prompts'], 'prompt')}, {size(found['bytes'])}",
        ),
        ("used", f"last {ago(found['newest_use'])}, least recently {ago(found['oldest_use'])}"),
        ("pinned", f"{counted(found['pins'], 'prompt')}, {size(found['pinned_bytes'])}"),
        ("orphans", f"{counted(found['orphans'], 'block')} without a predecessor"),
        ("set aside", f"{counted(found['set_aside'], 'torn file')}, {size(found['set_aside_bytes'])}"),
        ("being written", counted(found["unfinished"], "file")),
    ]
    dull = {"used": not found["blocks"], "pinned": not found["pins"], "orphans": not found["orphans"]}
    dull |= {"set aside": not found["set_aside"], "being written": not found["unfinished"]}
    out.print(facts([pair for pair in pairs if not dull.get(pair[0])]))
    if found["models"]:
        table = Table("model", "KV", "fingerprint", box=None)
        for name in ("blocks", "prompts", "size", "last used"):
            table.add_column(name, justify="right")
        for each in found["models"]:
            table.add_row(
                escape(each["model"]),
                each["kv_type"] or "?",
                each["fingerprint"][:12],
                f"{each['blocks']:,}",
                f"{each['prompts']:,}",
                size(each["bytes"]),
                ago(each["newest_use"]),
            )
        out.print()
        rows(table, out)


def _show_server(found: Mapping[str, Any]) -> None:
    out = console()
    dropped = found.get("dropped", 0)
    reused = f"{found['cached_tokens']:,} of {found['prompt_tokens']:,} prompt tokens ({found['token_hit_rate']:.1%})"
    out.print(
        facts(
            [
                ("requests", f"{found['total_requests']:,}, of which {found['hits']:,} reused something"),
                ("reused", reused),
                (
                    "in the engine",
                    f"{counted(found['residents'], 'idle sequence')}, {counted(found['resident_tokens'], 'token')}",
                ),
                ("pinned", f"{counted(found.get('pins', 0), 'prompt')}, {size(found.get('pinned_bytes', 0))}"),
                *([("never written", f"{counted(dropped, 'block')}, as the queue was full")] if dropped else []),
            ]
        )
    )
    table = Table("tier", box=None)
    for name in ("blocks", "size", "of at most", "hits", "misses", "evictions", "faults", "torn"):
        table.add_column(name, justify="right")
    table.add_column("state")
    for tier in found.get("tiers", ()):
        most = "" if tier["max_bytes"] is None else size(tier["max_bytes"])
        numbers = [tier[name] for name in ("hits", "misses", "evictions", "faults", "corrupt")]
        cells = [
            f"{tier['blocks']:,}",
            size(tier["bytes"]),
            most,
            *("" if number is None else f"{number:,}" for number in numbers),
        ]
        table.add_row(tier["name"], *cells, escape(tier["state"]))
    out.print()
    rows(table, out)


def show_list(store: str | None, url: str | None, api_key: str | None, wanted: Wanted, *, as_json: bool) -> None:
    """A folder's prompts, or those of a server's folder."""
    one_of(store, url)
    if url is not None:
        query = {"blocks": str(wanted.blocks).lower(), "sort": wanted.sort, "limit": wanted.limit}
        found = client_of(url, api_key).get(
            f"/cache/list?{urlencode(query | {'fingerprint': wanted.fingerprints}, True)}"
        )
    else:
        catalog = read_catalog(folder_of(store))
        with decoder(catalog, wanted.model) as decode:
            found = listing.listed(catalog, wanted, decode, time.time())
    if as_json:
        typer.echo(json.dumps(found))
        return
    with understood(url):
        _show_list(found["prompts"], found["total"], wanted)


def _show_list(listed: Sequence[Mapping[str, Any]], total: int, wanted: Wanted) -> None:
    out = console()
    if not listed:
        typer.echo("Nothing is stored.", err=True)
        return
    table = Table("used", box=None)
    for name in ("tokens", "size"):
        table.add_column(name, justify="right")
    any_pinned = any(row["pinned_until"] for row in listed)
    more = [*(["pinned until"] if any_pinned else []), *(["block"] if wanted.blocks else [])]
    for name in ("model", *more, "begins with"):
        table.add_column(name)
    for row in listed:
        tokens = f"{row['position']:,} to {row['tokens']:,}" if wanted.blocks else f"{row['tokens']:,}"
        key = [f"{row['key'][:12]}{' tail' if row['tail'] else ''}"] if wanted.blocks else []
        table.add_row(
            ago(row["used_at"]),
            tokens,
            size(row["bytes"]),
            escape(row["model"]),
            *([until(row["pinned_until"])] if any_pinned else []),
            *key,
            escape(words(row)),
        )
    rows(table, out)
    left = total - len(listed)
    if left > 0:
        typer.echo(f"and {left:,} more; --limit 0 lists all", err=True)


def show_pins(store: str | None, url: str | None, api_key: str | None, model: str | None, *, as_json: bool) -> None:
    """A folder's pins, or a server's."""
    one_of(store, url)
    if url is not None:
        found = client_of(url, api_key).get("/cache/pins")
    else:
        catalog = read_catalog(folder_of(store))
        with decoder(catalog, model) as decode:
            found = {"pins": listing.pins(catalog, decode, time.time())}
    if as_json:
        typer.echo(json.dumps(found))
        return
    with understood(url):
        _show_pins(found["pins"])


def _show_pins(listed: Sequence[Mapping[str, Any]]) -> None:
    """A server knows their names, a folder how they begin."""
    if not listed:
        typer.echo("Nothing is pinned.", err=True)
        return
    table = Table("id", box=None)
    for name in ("tokens", "size", "ends in"):
        table.add_column(name, justify="right")
    table.add_column("begins with" if "text" in listed[0] else "name")
    now = time.time()
    for row in listed:
        end = row["pinned_until"] if "text" in row else now + row["expires_in_seconds"] + 0.5
        about = words(row) if "text" in row else row["name"] or ""
        table.add_row(row["id"], f"{row['tokens']:,}", size(row["bytes"]), ago(end).removeprefix("in "), escape(about))
    rows(table, console())
