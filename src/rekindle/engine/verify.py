"""Checks of arguments that every engine makes before it changes anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rekindle.engine.protocol import Payload, Range, SequenceId, Work
from rekindle.engine.sequences import SequenceTable
from rekindle.errors import BadRange, EngineError, ForeignPayload
from rekindle.model.spec import ModelSpec
from rekindle.tokens import Tokens


def check_work(table: SequenceTable, work: Sequence[Work], spec: ModelSpec, *, places_between: bool = False) -> None:
    """Raises BadRange, UnknownSequence, EngineError, ContextFull, ForeignPayload."""
    seen: set[SequenceId] = set()
    for item in work:
        table.row(item.seq)
        if item.seq in seen:
            raise BadRange(f"sequence {item.seq} stands twice in one batch")
        seen.add(item.seq)
        if len(item.tokens) == 0:
            raise BadRange(f"no tokens to append to sequence {item.seq}")
        single = len(item.tokens) == 1  # an answer's next token, mostly
        low, high = (int(item.tokens[0]),) * 2 if single else (int(item.tokens.min()), int(item.tokens.max()))
        if low < 0 or high >= spec.vocab_size:
            raise EngineError(f"token {low if low < 0 else high} is outside the vocabulary of {spec.vocab_size}")
        if item.placed:
            _check_placed(table.length(item.seq), item, spec, places_between)
    table.check_room(sum(item.num_cells for item in work))


def _check_placed(position: int, work: Work, spec: ModelSpec, places_between: bool) -> None:
    """What is to be placed between tokens behind `position`."""
    if not places_between:
        raise EngineError("this engine places KV at a sequence's end only, not between tokens that it computes")
    left = len(work.tokens)
    for piece in work.placed:
        left -= piece.position - position
        if piece.position < position or left < 1:
            raise BadRange(
                f"KV placed between tokens goes behind those before it and has a token behind it: for position "
                f"{piece.position} there are {left} after it, and what comes before ends at {position}"
            )
        check_part(piece.payload, piece.start, piece.stop, piece.position, spec)
        if piece.payload.lacks:
            raise BadRange(
                f"a payload that lacks a part of {piece.payload.lacks} tokens can't be placed between others"
            )
        position = piece.position + len(piece)


def check_payload(
    table: SequenceTable,
    seq: SequenceId,
    payload: Payload,
    position: int,
    part: tuple[int, int | None],
    spec: ModelSpec,
) -> Range:
    """The part of the payload to place, as [start, stop) of its tokens.

    Raises UnknownSequence, BadRange, ForeignPayload, EngineError, ContextFull.
    """
    length = table.length(seq)
    if position != length:
        raise BadRange(f"a payload goes at the end of its sequence: position {length} expected, got {position}")
    start, stop = part[0], len(payload) if part[1] is None else part[1]
    check_part(payload, start, stop, position, spec)
    table.check_room(len(payload))
    return start, stop


def check_part(payload: Payload, start: int, stop: int, position: int, spec: ModelSpec) -> None:
    """Whether tokens [start, stop) of a payload can go to `position`. Raises BadRange, ForeignPayload, EngineError."""
    if not 0 <= start <= stop <= len(payload):
        raise BadRange(f"[{start}, {stop}) is not a part of a payload of {len(payload)} tokens")
    check_fingerprint(payload, spec)
    source = payload.position + start
    if position != source and start < stop and not spec.can_shift:
        raise EngineError(f"{spec.architecture} KV cannot be moved from position {source} to {position}")


def joined(work: Work, position: int) -> tuple[Tokens, list[Range]]:
    """All tokens that a work appends at `position`, and the ranges of positions of those that are computed."""
    tokens, ranges, done = [], [], 0
    for piece in work.placed:
        count = piece.position - position
        tokens += [work.tokens[done : done + count], piece.payload.tokens[piece.start : piece.stop]]
        ranges.append((position, piece.position))
        done, position = done + count, piece.position + len(piece)
    ranges.append((position, position + len(work.tokens) - done))
    return np.concatenate([*tokens, work.tokens[done:]]), [(start, stop) for start, stop in ranges if start < stop]


def check_moves(table: SequenceTable, payloads: Sequence[Payload], positions: Sequence[int], spec: ModelSpec) -> None:
    """Raises BadRange, ForeignPayload, EngineError, ContextFull."""
    end = 0
    for position, payload in sorted(zip(positions, payloads, strict=True), key=lambda pair: pair[0]):
        if position < end:
            raise BadRange(f"payloads must not overlap: one would end at {end}, another begin at {position}")
        end = position + len(payload)
        check_fingerprint(payload, spec)
        if position != payload.position and not spec.can_shift:
            raise EngineError(f"{spec.architecture} KV cannot be moved from position {payload.position} to {position}")
    table.check_room(sum(map(len, payloads)))


def check_same(one: Payload, other: Payload, spec: ModelSpec) -> None:
    """Raises BadRange, ForeignPayload."""
    if not np.array_equal(one.tokens, other.tokens):
        raise BadRange(f"payloads of the same tokens expected, got {len(one)} and {len(other)} that are not the same")
    for payload in (one, other):
        check_fingerprint(payload, spec)


def check_fingerprint(payload: Payload, spec: ModelSpec) -> None:
    """Raises ForeignPayload."""
    if payload.fingerprint != spec.fingerprint:
        raise ForeignPayload(
            f"the payload's fingerprint is {payload.fingerprint.hex()}, this engine's is {spec.fingerprint.hex()}: "
            "it was made with another model, KV type or build"
        )


def check_layer(layer: int, spec: ModelSpec) -> None:
    """Raises BadRange for a layer at which nothing can differ yet, or that is none."""
    if not 0 < layer < spec.num_layers:
        raise BadRange(f"{spec.name} can be probed at a layer from 1 to {spec.num_layers - 1}, not at {layer}")


def check_probed(table: SequenceTable, seq: SequenceId, payload: Payload, position: int, part: Range) -> None:
    """Raises UnknownSequence, BadRange if the sequence has not the payload's tokens [start, stop) at `position`."""
    start, stop = part
    if not 0 <= start <= stop <= len(payload):
        raise BadRange(f"[{start}, {stop}) is not a part of a payload of {len(payload)} tokens")
    table.check_range(seq, position, position + stop - start)
    if not np.array_equal(table.tokens(seq)[position : position + stop - start], payload.tokens[start:stop]):
        raise BadRange(f"sequence {seq} has other tokens at {position} than the payload")
