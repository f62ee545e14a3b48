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
        text = file.read_text("utf-8-sig")  # a mark of the encoding is no part of a chunk
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InvalidRequest(f"cannot read {file}: {reason}", param="chunks_from") from None
    if file.suffix.lower() in _JSON:
        documents = _documents(file, text)
    else:
        documents = [Document(part.strip()) for part in (text.split(separator) if separator else [text])]
    documents = [each for each in documents if each.text.strip()]
    if not documents:
        raise InvalidRequest(f"{file} holds no chunk", param="chunks_from")
    for number, document in enumerate(documents, 1):
        yield document.title or (f"{file} ({number})" if len(documents) > 1 else str(file)), document


def _documents(file: Path, text: str) -> list[Document]:
    """Those of a `.json` or `.jsonl` file. Raises InvalidRequest, which says where in the file."""
    if file.suffix.lower() == ".jsonl":
        lines = [(f"{file}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [_document(where, _value(where, line)) for where, line in lines]
    value = _value(str(file), text)
    if not isinstance(value, list):
        raise InvalidRequest(f"{file}: an array of texts or documents is expected", param="chunks_from")
    return [_document(f"{file}, element {number}", each) for number, each in enumerate(value, 1)]


def _value(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where}: no JSON: {error}", param="chunks_from") from None


def _document(where: str, value: Any) -> Document:
    try:
        return Document.of(value)
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error}", param="chunks_from") from None
