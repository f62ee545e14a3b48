"""Traces of requests: files of JSON lines, one request each, in order.

`hash_ids` has an id per block of the prompt: equal ids mean equal blocks after equal beginnings. `input_length` is the
prompt's length in tokens, of which the last block may hold fewer than the others. Mooncake's published traces (FAST'25)
have this form; other fields are ignored. How many tokens a block holds is found from the lines.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekindle.errors import InvalidRequest

_BLOCK_TOKENS = 512  # where the lines don't tell
_BLOCK_SIZES = [2**power for power in range(3, 14)]  # tokens


@dataclass(frozen=True, eq=False)
class Trace:
    """The requests of a file, with blocks numbered in the order in which they appeared."""

    name: str
    chains: list[list[int]]  # per request; a number stands for a block and all before it
    lengths: list[int]  # of the prompts, in tokens
    num_blocks: int  # that are different
    block_tokens: int

    @property
    def num_accesses(self) -> int:
        return sum(map(len, self.chains))


def read_trace(file: Path) -> Trace:
    """Raises InvalidRequest, with file and line, for what is not a trace."""
    requests = []
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    requests.append(_request(line, f"{file}, line {number}"))
    except OSError as error:
        raise InvalidRequest(f"the trace {file} can't be read: {error.strerror}", param="file") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{file} is no trace: JSON lines expected, got no text ({error})", param="file") from None
    if not any(ids for ids, _ in requests):
        raise InvalidRequest(f"{file} has no requests with hash_ids", param="file")
    return make_trace(file.stem, requests)


def make_trace(name: str, requests: list[tuple[list[Any], int | None]]) -> Trace:
    """A trace of requests, given as ids of blocks and length in tokens (None: all blocks are full)."""
    block_tokens = _block_tokens(requests)
    numbers: dict[tuple[int, Any], int] = {}
    chains = []
    for ids, _ in requests:
        chain = []
        parent = -1
        for each in ids:
            parent = numbers.setdefault((parent, each), len(numbers))
            chain.append(parent)
        chains.append(chain)
    lengths = [len(ids) * block_tokens if length is None else length for ids, length in requests]
    return Trace(name, chains, lengths, len(numbers), block_tokens)


def _request(line: str, where: str) -> tuple[list[Any], int | None]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"{where}: expected a JSON object, got {line.strip()[:60]!r} ({error})", param="file"
        ) from None
    if not isinstance(fields, dict):
        raise InvalidRequest(f"{where}: expected a JSON object, got {line.strip()[:60]!r}", param="file")
    ids = fields.get("hash_ids")
    if not isinstance(ids, list) or not all(isinstance(each, int | str) for each in ids):
        raise InvalidRequest(f"{where}: expected hash_ids to be a list of numbers, got {str(ids)[:60]}", param="file")
    length = fields.get("input_length")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 0):
        raise InvalidRequest(f"{where}: expected input_length to be a number of tokens, got {length!r}", param="file")
    return ids, length


def _block_tokens(requests: list[tuple[list[Any], int | None]]) -> int:
    """The block size with which most lengths need just as many blocks as there are; of several, the largest."""
    votes = Counter(
        size
        for ids, length in requests
        if length is not None and len(ids) > 1
        for size in _BLOCK_SIZES
        if len(ids) in (-(-length // size), length // size)
    )
    return max(votes, key=lambda size: (votes[size], size), default=_BLOCK_TOKENS)
