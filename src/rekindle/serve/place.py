"""Where the store's disk tier lies, for who only wants to look there: needs no model library."""

from __future__ import annotations

from pathlib import Path

from rekindle.model.fingerprint import cache_folder
from rekindle.settings import Settings


def store_folder(settings: Settings) -> Path:
    """The folder that the disk tier has, or would have."""
    return cache_folder() / "store" if settings.store == "auto" else Path(settings.store).expanduser()
