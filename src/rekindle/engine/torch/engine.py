"""The torch engine: the seven verbs over a pool of cells.

All verbs but two are book-keeping and copies: `fork` shares cells by counting references, `export` and `place` copy between
cells and bytes, `drop` and `place` turn keys. `forward` and `recompute` run the model on spans of tokens. To the model a
recomputed range is a span like any other, whose sequence happens to end there: its cells are written anew layer by layer,
and its queries see all that lies before. So ranges far apart are one call, as are tokens between which stored KV is placed.

A span of tokens is the unit of exactness: a key is seen if its position is not after the query's, whatever the order in
which cells were filled.

Sliding-window layers keep all of their cells as long as `fork` and `truncate` may ask for every earlier length, because the
token that follows there sees the window before that length; computing it again would take as many windows of tokens
as the model has such layers. When cells are wanted, `release` ends that promise for a sequence: what has left the window
is given up, and its cells serve any other layer (`groups.py`). A window's queries read no more than the window either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rekindle.engine.protocol import Logits, Payload, Placed, Range, SequenceId, Work
from rekindle.engine.torch.attention import Batch, Span
from rekindle.engine.torch.borrow import Borrowed
from rekindle.engine.torch.cells import Cells, CellTable, Keys
from rekindle.engine.torch.groups import make_groups
from rekindle.engine.torch.identity import identify, weights_digest
from rekindle.engine.torch.insight import Insight
from rekindle.engine.torch.kernels import kernels_for
from rekindle.engine.torch.looks import Probe, Reached, Watched
from rekindle.engine.torch.payload import PayloadLayout
from rekindle.engine.torch.pool import Pool
from rekindle.engine.torch.selfcheck import check_against_model
from rekindle.engine.torch.survey import survey
from rekindle.engine.verify import check_fingerprint, check_layer, check_moves, check_payload, check_work, joined
from rekindle.errors import BadRange, ContextFull, ModelError
from rekindle.model.spec import ModelSpec
from rekindle.tokens import Tokens

BATCH_TOKENS = 2048  # of one model call
MakeBatch = Callable[[Pool, dict[nn.Module, int], Sequence[Span]], Batch]


class TorchEngine(Insight):
    """See the module's docstring; the meaning of each method is in `Engine`."""

    places_between = True

    def __init__(
        self,
        model: Any,
        *,
        num_cells: int,
        max_sequences: int = 64,
        max_length: int | None = None,
        name: str | None = None,
        weights: bytes | None = None,
    ) -> None:
        """An engine on a causal language model of transformers, on the device and in the type that the model has.

        The model may be used by others between calls, but not be changed. `max_length` bounds the length of one sequence,
        which can be more than there are cells where layers have a window and it is released on the way; without it
        the cells do. Models with longrope take their long factors if it goes beyond their short range. `weights` is a
        digest of the weights; without it they are read once, about a second per gigabyte. Raises ModelError if the model
        can't be served, or computes something else here than on its own.
        """
        self._model = model
        self._borrowed = Borrowed(model, num_cells, max_length)
        try:
            found = survey(model, self._borrowed)
        except ModelError as error:
            raise ModelError(f"the torch engine can't serve {type(model).__name__}: {error}") from None
        self._layers = {module: index for index, module in enumerate(found.modules)}
        self.rotations = [layer.rotation for layer in found.layers]  # of each layer; None where keys can't be turned
        self.immovable = found.immovable  # why its keys can't be turned to another position, if so
        self._max_length = found.max_length
        shapes = tuple(layer.shape for layer in found.layers)
        self.groups = make_groups(shapes, [layer.window for layer in found.layers])
        self.layout = PayloadLayout(shapes, found.dtype, self.groups.windowed_layers)
        self._pool = Pool(self.layout, self.groups, num_cells, model.device)
        self._table: CellTable = CellTable(num_cells, range(max_sequences), self.groups)
        self.num_calls = 0
        self.num_computed = 0
        config = model.config.get_text_config()
        self.spec = ModelSpec(
            name=name or getattr(config, "_name_or_path", "") or type(model).__name__,
            architecture=config.model_type,
            vocab_size=config.vocab_size,
            num_layers=len(found.layers),
            train_context=getattr(config, "max_position_embeddings", num_cells),
            kv_bytes_per_token=self.layout.bytes_per_token,
            window=max(layer.window for layer in found.layers),
            kv_type=str(found.dtype).removeprefix("torch."),
            can_shift=found.immovable is None,
            can_look=True,
            fingerprint=identify(model, weights or weights_digest(model), found),
        )
        check_against_model(self, model, self._borrowed)
        self.num_calls = self.num_computed = 0

    # The seven verbs.

    def forward(self, work: Sequence[Work]) -> Logits:
        check_work(self._table, work, self.spec, places_between=True)
        for piece in (piece for item in work for piece in item.placed):
            self.layout.check(memoryview(piece.payload.data), len(piece.payload), 0)
        places = [self._placed(item) for item in work]
        if not work:
            return {}
        rows = self._append(places)
        return dict(zip((item.seq for item in work if item.logits), rows, strict=True))

    def fork(self, seq: SequenceId, length: int) -> SequenceId:
        return self._table.fork(seq, length)

    def truncate(self, seq: SequenceId, length: int) -> None:
        self._table.truncate(seq, length)

    def drop(self, seq: SequenceId, start: int, stop: int) -> None:
        self._table.check_range(seq, start, stop)
        length = self.length(seq)
        if stop == length or start == stop:
            return self.truncate(seq, length - (stop - start))
        self._check_movable("a cut may only be made at the end")
        self._table.check_cut(seq, start, stop)
        before = self._cells(seq, stop, length)
        self._table.cut(seq, start, stop)
        self._table.renew(seq, start, start + length - stop)  # others see the cells that would have to move
        after = self._cells(seq, start, length)
        moved = [one != other for one, other in zip(before, after, strict=True)]
        if any(each.any() for each in moved):
            self._pool.copy(_chosen(before, moved), _chosen(after, moved))
        self._turn(after, start - stop)
        return None

    def export(self, seq: SequenceId, start: int, stop: int) -> Payload:
        self._table.check_range(seq, start, stop)
        data = self._pool.save(self._cells(seq, start, stop), stop - start)
        lacks = min(max(0, self._table.floor(seq) - start), stop - start)
        return Payload(self._table.tokens(seq)[start:stop], start, data, self.spec.fingerprint, lacks)

    def place(
        self,
        seq: SequenceId,
        payload: Payload,
        position: int,
        *,
        start: int = 0,
        stop: int | None = None,
        until: int = 0,
    ) -> None:
        start, stop = check_payload(self._table, seq, payload, position, (start, stop), self.spec)
        end = position + stop - start
        self._check_length(end)
        self.layout.check(memoryview(payload.data), len(payload), payload.lacks)
        unseen = max(payload.lacks - start, until - self.groups.window + 1 - position if self.groups.window else 0)
        lacks = min(max(0, unseen), stop - start)
        self._table.append(seq, payload.tokens[start:stop], lacks)
        cells = self._cells(seq, position, end)
        self._pool.load(memoryview(payload.data), cells, len(payload), lacks=payload.lacks, stop=stop)
        self._turn(cells, position - (payload.position + start))

    def place_all(self, seq: SequenceId, payloads: Iterable[Payload], *, until: int = 0) -> None:
        given = list(payloads)  # looked at first: what a window no longer sees can't be taken back
        self._table.check_room(sum(map(len, given)))
        self._check_length(self.length(seq) + sum(map(len, given)))
        for payload in given:
            check_fingerprint(payload, self.spec)
            self.layout.check(memoryview(payload.data), len(payload), payload.lacks)
        super().place_all(seq, given, until=until)

    def move(self, payloads: Sequence[Payload], positions: Sequence[int]) -> list[Payload]:
        check_moves(self._table, payloads, positions, self.spec)
        return [self._moved(payload, position) for payload, position in zip(payloads, positions, strict=True)]

    def _moved(self, payload: Payload, position: int) -> Payload:
        if position == payload.position or not len(payload):
            return replace(payload, position=position)
        layers = [(layer.key.transpose(0, 1), layer.value.transpose(0, 1)) for layer in self.look(payload, position)]
        return replace(payload, position=position, data=self.layout.join(layers))

    def recompute(self, seq: SequenceId, ranges: Sequence[Range]) -> None:
        self._table.check_ranges(seq, ranges)
        ranges = [(start, stop) for start, stop in ranges if start < stop]
        self._table.check_room(sum(stop - start for start, stop in ranges))
        if not ranges:
            return
        if ranges[0][0] < self._table.reach(seq):
            raise BadRange(
                f"sequence {seq} was released: tokens can be computed anew from {self._table.reach(seq)} on, "
                f"not from {ranges[0][0]}"
            )
        count = sum(stop - start for start, stop in ranges)
        before = [self._cells(seq, start, stop) for start, stop in ranges]
        for start, stop in ranges:
            self._table.renew(seq, start, stop)
        tokens = self.tokens(seq)
        kept = self._pool.save(_joined(before), count)
        try:
            self._compute([Span(tokens[start:stop], start, self._table.keys(seq, 0, stop)) for start, stop in ranges])
        except BaseException:
            after = [self._cells(seq, start, stop) for start, stop in ranges]
            self._pool.load(kept, _joined(after), count, stop=count)  # cells that others shared stay the sequence's own
            raise

    # Looking.

    def probe(self, seq: SequenceId, tokens: Tokens, layer: int) -> None:
        check_layer(layer, self.spec)
        self._append([self._checked(Work(seq, tokens, logits=False))], batch=partial(Probe, last=layer))

    def attention(self, seq: SequenceId, tokens: Tokens) -> npt.NDArray[np.float32]:
        work = self._checked(Work(seq, tokens, logits=False))
        received = torch.zeros(self.length(seq) + len(tokens), device=self.device)
        self._append([work], batch=partial(Watched, received=received))
        return np.asarray(received.cpu().numpy(), dtype=np.float32)

    def compute_blind(self, seq: SequenceId, tokens: Tokens) -> None:
        """Append tokens that see only each other, where they stand: what `place` of a chunk gives, computed.

        Raises as `forward` does.
        """
        self._append([self._checked(Work(seq, tokens, logits=False))], blind=True)

    # Book-keeping.

    @property
    def device(self) -> torch.device:
        """Where the model and the pool are."""
        return self._pool.device

    @property
    def bytes_per_cell(self) -> int:
        """Of the pool, with what fills up groups of layers."""
        return self._pool.bytes_per_cell

    def close(self, seq: SequenceId) -> None:
        self._table.close(seq)

    def release(self, seq: SequenceId, length: int) -> None:
        self._table.check_reach(seq, length)
        self._table.release(seq, length)

    def num_releasable(self, seq: SequenceId, length: int) -> int:
        return self._table.num_releasable(seq, length)

    def reach(self, seq: SequenceId) -> int:
        return self._table.reach(seq)

    def check_integrity(self) -> None:
        self._table.check_integrity()

    def shutdown(self) -> None:
        """Frees the pool; the model stays as it is."""
        self._pool.shutdown()

    # The model underneath.

    def _checked(self, work: Work) -> tuple[Work, int]:
        """One sequence's tokens and where they go."""
        check_work(self._table, [work], self.spec)
        return self._placed(work)

    def _placed(self, work: Work) -> tuple[Work, int]:
        length = self.length(work.seq)
        self._check_length(length + work.num_cells)
        self._table.check_reach(work.seq, length)
        return work, length

    def _append(self, work: Sequence[tuple[Work, int]], *, blind: bool = False, batch: MakeBatch = Batch) -> list[Any]:
        """Take cells for work at the given positions and do it. A failure takes them back."""
        try:
            return self._compute([span for item, start in work for span in self._spans(item, start, blind)], batch)
        except BaseException:
            for item, start in work:
                self._table.truncate(item.seq, start)
            raise

    def _spans(self, work: Work, start: int, blind: bool) -> Iterator[Span]:
        """What is to be computed of a work; what is placed is."""
        tokens, ranges = joined(work, start)
        self._table.append(work.seq, tokens)
        keys = self._table.keys(work.seq, start if blind else 0)
        self._put(work.placed, keys)
        for begin, end in ranges:
            seen = keys if end == start + len(tokens) else tuple(each.between(each.first, end) for each in keys)
            yield Span(tokens[begin - start : end - start], begin, seen, work.logits and end == start + len(tokens))

    def _put(self, pieces: Sequence[Placed], keys: Sequence[Keys]) -> None:
        """Stored KV to the cells of its places; neighbours that are moved alike are turned together."""
        moved: list[tuple[int, int, int]] = []  # start, stop, by
        for piece in pieces:
            start, stop = piece.position, piece.position + len(piece)
            cells = [each.between(start, stop).cells for each in keys]
            self._pool.load(memoryview(piece.payload.data), cells, len(piece.payload), stop=piece.stop)
            if moved and moved[-1][1:] == (start, piece.by):
                start = moved.pop()[0]
            moved.append((start, stop, piece.by))
        for start, stop, by in moved:
            self._turn([each.between(start, stop).cells for each in keys], by)

    @torch.inference_mode()
    def _compute(self, spans: Sequence[Span], batch: MakeBatch = Batch) -> list[Any]:
        """Run the model on spans, in as few calls as allowed. Logits float32[vocab_size] of each span that wants them."""
        rows: list[Any] = []
        for some in _batches(spans, BATCH_TOKENS):
            rows += self._call(some, batch)
        return rows

    def _call(self, spans: Sequence[Span], batch: MakeBatch) -> list[Any]:
        tokens = np.concatenate([span.tokens for span in spans])
        positions = np.concatenate([np.arange(span.position, span.position + len(span.tokens)) for span in spans])
        ends = np.cumsum([len(span.tokens) for span in spans]) - 1
        wanted = ends[[span.logits for span in spans]]
        device = self._pool.device
        made, output = batch(self._pool, self._layers, spans), None
        with self._borrowed.lent(), kernels_for(len(tokens), self.layout.dtype, device), suppress(Reached):
            output = self._model(
                input_ids=torch.from_numpy(tokens.astype(np.int64))[None].to(device),
                position_ids=torch.from_numpy(positions)[None].to(device),
                use_cache=False,
                logits_to_keep=torch.from_numpy(wanted).to(device),
                rekindle=made,
            )
        self.num_calls += 1
        if output is None:
            assert isinstance(made, Probe)
            self.num_probed += len(tokens) * made.last
            return []
        self.num_computed += len(tokens)
        return list(output.logits[0].float().cpu().numpy())

    def _turn(self, cells: Sequence[Cells], by: int) -> None:
        if not by:
            return
        indexes = [self._pool.index(each) for each in cells]
        for layer, keys in enumerate(self._pool.keys):
            index = indexes[self.groups.of[layer]]
            keys[index] = self._turned(layer, keys[index], by)

    def _check_length(self, length: int) -> None:
        if length > self._max_length:
            raise ContextFull(
                f"a sequence of this engine has at most {self._max_length} tokens, {length} would be needed"
            )


def _joined(parts: Sequence[Sequence[Cells]]) -> list[Cells]:
    """Each group's cells of several ranges as one."""
    return [np.concatenate(cells) for cells in zip(*parts, strict=True)]


def _chosen(cells: Sequence[Cells], masks: Sequence[npt.NDArray[np.bool_]]) -> list[Cells]:
    return [each[mask] for each, mask in zip(cells, masks, strict=True)]


def _batches(spans: Sequence[Span], limit: int) -> Iterator[list[Span]]:
    """The same tokens in batches of at most `limit`, order kept."""
    batch: list[Span] = []
    room = limit
    for span in spans:
        start = 0
        while start < len(span.tokens):
            stop = min(len(span.tokens), start + room)
            batch.append(span.part(start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch
