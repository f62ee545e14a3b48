"""`rekindle cache`: the commands, their arguments and their help. What they do is in `cache_*.py` beside this.

Each works on a store's folder, or with `--url` on a running server. A folder may be in use by servers meanwhile.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rekindle.cli.options import SERVER_ONLY, with_settings
from rekindle.cli.refusals import FAILED, guarded
from rekindle.settings import Settings

cache = typer.Typer(
    help="What is stored: look at it, check it, delete from it, pin it, compute it ahead of time.", no_args_is_help=True
)

Store = Annotated[
    str | None,
    typer.Option(help="the store's folder; default: as the settings say, in the user's cache folder", metavar="DIR"),
]
Url = Annotated[str | None, typer.Option(help="ask a running server instead of looking into the folder")]
Key = Annotated[str | None, typer.Option("--api-key", help="for that server; default: REKINDLE_API_KEY")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="a model to show tokens as text with, where its KV is listed")
]
Which = Annotated[
    list[str] | None,
    typer.Option("--fingerprint", help="only of this model: its fingerprint, the beginning of it, or its name"),
]
Files = Annotated[list[Path] | None, typer.Argument(help="text files; each is a prompt")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="a prompt as text; may be repeated")]
AsChat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw",
        help="files as a conversation's documents and prompts as a user's message, or both as plain text; "
        "default: a conversation if the model has a chat template",
        show_default=False,
    ),
]
System = Annotated[str | None, typer.Option(help="instructions before the document or the message")]
Chunks = Annotated[
    list[str] | None,
    typer.Option("--chunk", help="a text that is computed on its own, to be placed anywhere; may be repeated"),
]
ChunkFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--chunks-from",
        help="a file of such chunks: .json or .jsonl of texts or documents, or text, split by --chunk-separator; "
        "may be repeated",
        metavar="FILE",
    ),
]
Salt = Annotated[str | None, typer.Option("--salt", help="the cache_salt of the requests that need it")]


@cache.command()
@guarded
def stats(store: Store = None, url: Url = None, api_key: Key = None, as_json: Json = False) -> None:
    """What is stored, of which models, and whether all is well."""
    from rekindle.cli.cache_look import show_stats

    show_stats(store, url, api_key, as_json=as_json)


@cache.command("ls")
@guarded
def list_(
    store: Store = None,
    url: Url = None,
    api_key: Key = None,
    blocks: Annotated[bool, typer.Option("--blocks", help="single blocks instead of prompts")] = False,
    sort: Annotated[Literal["used", "size", "tokens"], typer.Option(help="the greatest first")] = "used",
    limit: Annotated[int, typer.Option("--limit", "-n", help="list so many at most; 0: all", min=0)] = 50,
    fingerprint: Which = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """List the prompts that are stored: last use, tokens, size, model, pin and first words."""
    from rekindle.cli.cache_look import Wanted, show_list

    wanted = Wanted(blocks=blocks, sort=sort, limit=limit, fingerprints=fingerprint or [], model=model)
    show_list(store, url, api_key, wanted, as_json=as_json)


@cache.command()
@guarded
def verify(
    store: Store = None,
    url: Url = None,
    api_key: Key = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="set aside what is torn, so that it is written anew")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every block and check it. Exit code 1 if something is wrong."""
    from rekindle.cli.cache_care import check_store

    if not check_store(store, url, api_key, repair=repair, as_json=as_json):
        raise typer.Exit(FAILED)


@cache.command()
@guarded
def clear(
    store: Store = None,
    url: Url = None,
    api_key: Key = None,
    every_model: Annotated[
        bool, typer.Option("--all", help="with --url: of all models, not only the one that is served")
    ] = False,
    fingerprint: Which = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="don't ask")] = False,
) -> None:
    """Delete what is stored, pinned or not, in a folder or in all tiers of a server."""
    from rekindle.cli.cache_care import clear_store

    clear_store(store, url, api_key, every_model=every_model, fingerprints=fingerprint or [], yes=yes)


@cache.command()
@guarded
def prune(
    store: Store = None,
    url: Url = None,
    api_key: Key = None,
    max_size: Annotated[
        str | None, typer.Option(help="delete what was used least recently until the rest fits: 5GiB", metavar="SIZE")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(help="delete what was not used for so long: 30d, 12h", metavar="TIME")
    ] = None,
    orphans: Annotated[bool, typer.Option("--orphans", help="delete what has lost a predecessor")] = False,
    fingerprint: Which = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be deleted")] = False,
    as_json: Json = False,
) -> None:
    """Delete part of what is stored. What is pinned, or used meanwhile, stays."""
    from rekindle.cli.cache_care import Pruning, prune_store

    wish = Pruning(max_size=max_size, older_than=older_than, orphans=orphans, fingerprints=fingerprint or [])
    prune_store(store, url, api_key, wish, dry_run=dry_run, as_json=as_json)


@cache.command()
@guarded
@with_settings(leave_out=SERVER_ONLY)
def warm(
    settings: Settings,
    files: Files = None,
    prompt: Prompts = None,
    chunk: Chunks = None,
    chunks_from: ChunkFiles = None,
    chat: AsChat = None,
    system: System = None,
    salt: Salt = None,
    url: Url = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Compute the KV of files, prompts or chunks ahead of time and store it. What is stored is not computed again."""
    from rekindle.cli.cache_warm import Texts, warm_texts

    texts = Texts.read(
        files or [],
        prompt or [],
        chat=chat,
        system=system,
        salt=salt,
        chunks=chunk or [],
        chunks_from=chunks_from or [],
        separator=settings.chunk_separator,
    )
    if not warm_texts(settings, texts, url, api_key, as_json=as_json):
        raise typer.Exit(FAILED)


@cache.command()
@guarded
@with_settings(leave_out=SERVER_ONLY)
def pin(
    settings: Settings,
    ttl: Annotated[str, typer.Option(help="how long it is kept: 30s, 10m, 2h, 1d", metavar="TIME")],
    files: Files = None,
    prompt: Prompts = None,
    chat: AsChat = None,
    system: System = None,
    salt: Salt = None,
    name: Annotated[str | None, typer.Option(help="what a server calls the pin in its list")] = None,
    warm: Annotated[
        bool, typer.Option("--warm/--no-warm", help="compute what is not stored, or keep only what is")
    ] = True,
    url: Url = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Keep the KV of files or prompts for a time, whatever else comes."""
    from rekindle.cli.cache_warm import Texts, pin_texts

    texts = Texts.read(files or [], prompt or [], chat=chat, system=system, salt=salt)
    if not pin_texts(settings, texts, url, api_key, ttl=ttl, name=name, warm=warm, as_json=as_json):
        raise typer.Exit(FAILED)


@cache.command()
@guarded
def pins(store: Store = None, url: Url = None, api_key: Key = None, model: Model = None, as_json: Json = False) -> None:
    """List what is pinned."""
    from rekindle.cli.cache_look import show_pins

    show_pins(store, url, api_key, model, as_json=as_json)


@cache.command()
@guarded
def unpin(
    ids: Annotated[list[str], typer.Argument(help="ids of pins, as `rekindle cache pins` lists them")],
    store: Store = None,
    url: Url = None,
    api_key: Key = None,
) -> None:
    """End pins before their time."""
    from rekindle.cli.cache_care import unpin_all

    if not unpin_all(ids, store, url, api_key):
        raise typer.Exit(FAILED)
