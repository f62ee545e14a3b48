"""What is in a store's folder, in plain records for a terminal or the wire: totals, prompts, pins, problems.

Times are Unix seconds, sizes bytes on the disk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ByteSize, TypeAdapter, ValidationError

from rekindle.errors import InvalidRequest
from rekindle.kv.catalog import Catalog, Chain, Check, Entry, Prune, choose, delete, is_pinned, read_catalog
from rekindle.kv.keys import root_key
from rekindle.kv.pins import pin_id
from rekindle.serve.durations import seconds_of
from rekindle.tokens import Tokens

Decode = Callable[
    [bytes, Tokens], str | None
]  # fingerprint, tokens -> their text, if that model's tokenizer is at hand
Sort = Literal["used", "size", "tokens"]
_SECOND = 10**9
_SHOWN_TOKENS = 48  # from which the first words come
_SHOWN_CHARACTERS = 160
_SORTED_BY = {"used": "used_at", "size": "bytes", "tokens": "tokens"}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which rows, and in which order."""

    blocks: bool = False  # single blocks, or else prompts
    sort: Sort = "used"
    limit: int = 50  # 0: all
    fingerprints: Sequence[str] = ()  # as people give them; none: all
    salt: bytes | None = None  # only what was stored under it; None: whatever
    model: str | None = None  # a model to show tokens as text with


def summary(catalog: Catalog, now: float) -> dict[str, Any]:
    """Totals, and of each model."""
    now_ns = int(now * _SECOND)
    chains, orphans = catalog.chains(), catalog.orphans()
    return _totals(catalog.entries, chains, now_ns) | {
        "bytes": catalog.num_bytes,
        "folder": str(catalog.path),
        "state": _state(catalog),
        "pins": len(catalog.pins(now_ns)),
        "orphans": len(orphans),
        "corrupt": len(catalog.strange),
        "set_aside": catalog.num_aside,
        "set_aside_bytes": catalog.aside_bytes,
        "unfinished": len(catalog.unfinished),
        "models": [_of_model(catalog, chains, each, now_ns) for each in catalog.fingerprints()],
    }


def _of_model(catalog: Catalog, chains: Sequence[Chain], fingerprint: bytes, now_ns: int) -> dict[str, Any]:
    entries = [entry for entry in catalog.entries if entry.front.fingerprint == fingerprint]
    own = [chain for chain in chains if chain.fingerprint == fingerprint]
    label = catalog.labels.get(fingerprint, {})
    named = {"model": catalog.name_of(fingerprint), "fingerprint": fingerprint.hex(), "kv_type": label.get("kv_type")}
    return named | _totals(entries, own, now_ns)


def _totals(entries: Sequence[Entry], chains: Sequence[Chain], now_ns: int) -> dict[str, Any]:
    uses = [min(entry.file.used_ns, now_ns) / _SECOND for entry in entries]
    return {
        "blocks": len(entries),
        "prompts": len(chains),
        "bytes": sum(entry.file.num_bytes for entry in entries),
        "pinned_bytes": sum(entry.file.num_bytes for entry in entries if is_pinned(entry, now_ns)),
        "newest_use": max(uses, default=None),
        "oldest_use": min(uses, default=None),
    }


def _state(catalog: Catalog) -> str:
    """ "ok", or what is wrong, in words."""
    wrong = []
    if not catalog.is_writable:
        wrong.append("it can't be written to")
    if catalog.strange:
        wrong.append(f"{len(catalog.strange)} files don't begin like blocks")
    if catalog.other_versions:
        wrong.append(f"another version wrote {', '.join(catalog.other_versions)} beside it")
    return "; ".join(wrong) or "ok"


def listed(catalog: Catalog, wanted: Wanted, decode: Decode, now: float) -> dict[str, Any]:
    """A row for each stored prompt, or for each block, and how many there are. Raises InvalidRequest."""
    now_ns = int(now * _SECOND)
    chosen = named(catalog, wanted.fingerprints)
    rows = [
        (chain, _row(catalog, chain, now_ns))
        for chain in (_blocks(catalog) if wanted.blocks else _prompts(catalog, now_ns))
        if (chosen is None or chain.fingerprint in chosen) and _is_of(chain, wanted.salt)
    ]
    rows.sort(key=lambda each: _rank(each[1], wanted.sort), reverse=True)
    shown = [_with_text(*each, decode) for each in rows[: wanted.limit or None]]
    return {"prompts": shown, "total": len(rows)}


def _blocks(catalog: Catalog) -> list[Chain]:
    return [Chain((entry,)) for entry in catalog.entries]


def _prompts(catalog: Catalog, now_ns: int) -> list[Chain]:
    """All chains, and the pinned prompts that are the beginnings of others."""
    return list({chain.key: chain for chain in [*catalog.chains(), *catalog.pins(now_ns)]}.values())


def _rank(row: dict[str, Any], sort: Sort) -> tuple[float, str]:
    value = row[_SORTED_BY[sort]]
    return (math.inf if value is None else value, row["key"])  # what is pinned counts as in use


def pins(catalog: Catalog, decode: Decode, now: float) -> list[dict[str, Any]]:
    """A row for each pinned prompt; which end first, first."""
    now_ns = int(now * _SECOND)
    rows = ((chain, _row(catalog, chain, now_ns)) for chain in catalog.pins(now_ns))
    return [{"id": pin_id(chain.key)} | _with_text(chain, row, decode) for chain, row in rows]


def _row(catalog: Catalog, chain: Chain, now_ns: int) -> dict[str, Any]:
    pinned = is_pinned(chain.entries[-1], now_ns)
    front = chain.entries[-1].front
    return {
        "key": chain.key.hex(),
        "tokens": chain.length,
        "blocks": len(chain.entries),
        "bytes": chain.num_bytes,
        "used_at": None if pinned else min(chain.used_ns, now_ns) / _SECOND,
        "pinned_until": chain.used_ns / _SECOND if pinned else None,
        "model": catalog.name_of(chain.fingerprint),
        "fingerprint": chain.fingerprint.hex(),
        "position": chain.entries[0].front.position,
        "whole": chain.is_whole,
        "tail": front.tail,
    }


def _with_text(chain: Chain, row: dict[str, Any], decode: Decode) -> dict[str, Any]:
    tokens = chain.tokens(_SHOWN_TOKENS)
    text = decode(chain.fingerprint, tokens)
    shown = None if text is None else re.sub(r"\s+", " ", text).strip()[:_SHOWN_CHARACTERS]
    return row | {"text": shown, "first_tokens": tokens[:12].tolist()}


def _is_of(chain: Chain, salt: bytes | None) -> bool:
    """Whether it was stored under this salt. Of what has lost its beginning nobody knows."""
    return salt is None or chain.entries[0].front.parent == root_key(chain.fingerprint, salt)


def named(catalog: Catalog, names: Iterable[str]) -> frozenset[bytes] | None:
    """The fingerprints that are meant: each by its hex digits, the first of them, or the model's name. None for none.

    Raises InvalidRequest for what means nothing, or several.
    """
    found = frozenset(_named(catalog, name) for name in names)
    return found or None


def _named(catalog: Catalog, name: str) -> bytes:
    known = catalog.fingerprints()
    wanted = name.lower()
    meant = [each for each in known if each.hex().startswith(wanted) or catalog.name_of(each) == name]
    if len(meant) != 1:
        there = ", ".join(f"{catalog.name_of(each)} ({each.hex()[:12]})" for each in known)
        what = "several models" if meant else "no model" if known else "no model, for nothing is stored"
        raise InvalidRequest(f"fingerprint {name!r} means {what}{there and f'; stored: {there}'}", param="fingerprint")
    return meant[0]


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What to delete, as people write it."""

    max_size: str | int | None = None
    older_than: str | float | None = None
    orphans: bool = False
    fingerprints: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.max_size is None and self.older_than is None and not self.orphans and not self.fingerprints:
            raise InvalidRequest(
                "expected what to delete: max_size (5GiB), older_than (7d), orphans or fingerprints; got nothing"
            )
        self.of(None, 0.0)

    def of(self, catalog: Catalog | None, now: float) -> Prune:
        """What that means for a folder. Raises InvalidRequest."""
        age = None if self.older_than is None else seconds_of(self.older_than, param="older_than")
        return Prune(
            fingerprints=None if catalog is None else named(catalog, self.fingerprints),
            unused_since_ns=None if age is None else int((now - age) * _SECOND),
            orphans=self.orphans,
            max_bytes=None if self.max_size is None else _bytes_of(self.max_size),
        )


def _bytes_of(size: str | int) -> int:
    try:
        num_bytes = int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError:
        num_bytes = -1
    if num_bytes < 0:
        raise InvalidRequest(f"max_size: expected a size such as 5GiB, 300MB or 0, got {size!r}", param="max_size")
    return num_bytes


def check_as_dict(check: Check, seconds: float) -> dict[str, Any]:
    """For `--json` and the wire."""
    problems = [{"path": str(each.path), "what": each.what, "orphan": each.is_orphan} for each in check.problems]
    return {
        "ok": not check.problems,
        "blocks": check.num_blocks,
        "bytes": check.num_bytes,
        "seconds": round(seconds, 3),
        "torn": sum(not each.is_orphan for each in check.problems),
        "orphans": sum(each.is_orphan for each in check.problems),
        "set_aside": check.num_set_aside,
        "problems": problems,
    }


def prune(folder: Path, wish: Pruning, now: float, *, dry_run: bool) -> dict[str, int]:
    """Delete part of a folder; what that was and what is left. Raises StoreError, InvalidRequest."""
    catalog = read_catalog(folder)
    chosen = choose(catalog, wish.of(catalog, now), int(now * _SECOND))
    done = chosen if dry_run else delete(folder, chosen)
    num_bytes = sum(entry.file.num_bytes for entry in done)
    return {
        "blocks": len(done),
        "bytes": num_bytes,
        "left_blocks": len(catalog.entries) - len(done),
        "left_bytes": catalog.num_bytes - num_bytes,
    }
