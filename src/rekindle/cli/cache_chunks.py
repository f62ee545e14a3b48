"""Chunks for `rekindle cache warm`: given as text, or read from files.

A `.json` or `.jsonl` file holds texts or documents, `{"title": …, "text": …}`. Any other file is text: one chunk, or with
a chunk separator what stands between its occurrences, without the white space around it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rekindle.errors import InvalidRequest
from rekindle.model.chunks import Document

_JSON = frozenset({".json", ".jsonl"})


def read_chunks(file: Path, separator: str | None) -> Iterator[tuple[str, Document]]:
    """(name for messages, chunk) of all chunks in a file. Raises InvalidRequest if it has none or can't be read."""
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InvalidRequest(f"cannot read {file}: {reason}", param="chunks_from") from None
    if file.suffix.lower() in _JSON:
        documents = [Document.of(each) for each in _values(file, text)]
    else:
        documents = [Document(part.strip()) for part in (text.split(separator) if separator else [text])]
    documents = [each for each in documents if each.text.strip()]
    if not documents:
        raise InvalidRequest(f"{file} holds no chunk", param="chunks_from")
    for number, document in enumerate(documents, 1):
        yield document.title or (f"{file} ({number})" if len(documents) > 1 else str(file)), document


def _values(file: Path, text: str) -> list[Any]:
    try:
        if file.suffix.lower() == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{file}: {error}", param="chunks_from") from None
    if not isinstance(value, list):
        raise InvalidRequest(f"{file}: an array of texts or documents is expected", param="chunks_from")
    return value
