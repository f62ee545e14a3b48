"""Where experiments put files, for their time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rekindle.errors import InvalidRequest


@contextmanager
def scratch_folder(parent: Path | None) -> Iterator[Path]:
    """A new folder in this one, or where temporary files go, that is deleted in the end. Raises InvalidRequest."""
    try:
        folder = tempfile.TemporaryDirectory(dir=parent, prefix="rekindle-lab-")
    except OSError as error:
        raise InvalidRequest(f"no files can be written in {parent}: {error.strerror}", param="folder") from None
    with folder as path:
        yield Path(path)
