"""Random programs of verbs: an engine's book-keeping is that of plain lists, and what was refused did nothing."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engine.conftest import Bench

from rekindle.engine.protocol import Payload, SequenceId, Work
from rekindle.errors import EngineError, UnknownSequence
from rekindle.tokens import as_tokens

index = st.integers(0, 300)
step = st.one_of(
    st.tuples(st.just("open")),
    st.tuples(st.just("close"), index),
    st.tuples(st.just("forward"), index, index, st.integers(1, 120)),
    st.tuples(st.just("fork"), index, index),
    st.tuples(st.just("truncate"), index, index),
    st.tuples(st.just("drop"), index, index, index),
    st.tuples(st.just("export"), index, index, index),
    st.tuples(st.just("place"), index, index, index, index),
    st.tuples(st.just("recompute"), index, index, index),
    st.tuples(st.just("release"), index, index),
)


class Program:
    """Runs steps on an engine and on lists beside it; numbers pick among what exists."""

    def __init__(self, bench: Bench) -> None:
        self.engine = bench.engine
        self.lists: dict[SequenceId, list[int]] = {}
        self.payloads: list[Payload] = []
        self.vocab_size = bench.engine.spec.vocab_size

    def run(self, name: str, *numbers: int) -> None:
        if name == "open":
            self.lists[self.engine.open()] = []
        elif self.lists:
            seq = sorted(self.lists)[numbers[0] % len(self.lists)]
            getattr(self, f"do_{name}")(seq, *numbers[1:])

    def do_close(self, seq: SequenceId) -> None:
        self.engine.close(seq)
        del self.lists[seq]

    def do_forward(self, seq: SequenceId, seed: int, count: int) -> None:
        tokens = np.random.default_rng(seed).integers(0, self.vocab_size, count).astype(np.int32)
        logits = self.engine.forward([Work(seq, tokens)])[seq]
        assert np.isfinite(logits).all() and logits.shape == (self.vocab_size,)
        self.lists[seq] += tokens.tolist()

    def do_fork(self, seq: SequenceId, length: int) -> None:
        self.lists[self.engine.fork(seq, length)] = self.lists[seq][:length]

    def do_truncate(self, seq: SequenceId, length: int) -> None:
        self.engine.truncate(seq, length)
        del self.lists[seq][length:]

    def do_drop(self, seq: SequenceId, start: int, stop: int) -> None:
        self.engine.drop(seq, start, stop)
        del self.lists[seq][start:stop]

    def do_export(self, seq: SequenceId, start: int, stop: int) -> None:
        payload = self.engine.export(seq, start, stop)
        assert payload.tokens.tolist() == self.lists[seq][start:stop]
        self.payloads.append(payload)

    def do_place(self, seq: SequenceId, which: int, start: int, stop: int) -> None:
        if self.payloads:
            payload = self.payloads[which % len(self.payloads)]
            self.engine.place(seq, payload, len(self.lists[seq]), start=start, stop=stop)
            self.lists[seq] += payload.tokens.tolist()[start:stop]

    def do_recompute(self, seq: SequenceId, start: int, stop: int) -> None:
        self.engine.recompute(seq, [(start, stop)])

    def do_release(self, seq: SequenceId, length: int) -> None:
        before = self.engine.num_free_cells
        self.engine.release(seq, length)
        assert self.engine.reach(seq) in (0, length) or self.engine.num_free_cells == before


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(st.lists(step, max_size=40))
def test_bookkeeping_is_that_of_lists(bench: Bench, steps: list[tuple[str, *tuple[int, ...]]]) -> None:
    program = Program(bench)
    try:
        for name, *numbers in steps:
            try:
                program.run(name, *numbers)
            except UnknownSequence:
                raise
            except EngineError:
                pass  # refused: the lists did not change, so the engine must not have either
            for seq, tokens in program.lists.items():
                assert bench.engine.tokens(seq).tolist() == tokens
        bench.engine.check_integrity()
    finally:
        for seq in list(program.lists):
            bench.engine.close(seq)
    bench.engine.check_integrity()
    assert bench.engine.num_free_cells == bench.engine.num_cells


@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=8), st.integers(0, 1000))
def test_exact_verbs_never_change_what_is_computed(bench: Bench, moves: list[tuple[int, int]], seed: int) -> None:
    """Append, fork, truncate, export and place at home, in any order, end with the KV of one prefill."""
    seq = bench.read(bench.random(seed, 5))
    try:
        for count, back in moves:
            count = min(count, 150 - bench.engine.length(seq))
            if count > 0:
                bench.engine.forward([Work(seq, bench.random(seed + count, count))])
            fork = bench.engine.fork(seq, max(1, bench.engine.length(seq) - back, bench.engine.reach(seq)))
            start = max(bench.engine.length(fork) // 2, bench.engine.reach(fork))
            payload = bench.engine.export(fork, start, bench.engine.length(fork))
            bench.engine.truncate(fork, start)
            bench.engine.close(seq)
            seq = fork
            if len(payload):
                bench.engine.place(seq, payload, start)
            bench.engine.release(seq, max(bench.engine.reach(seq), bench.engine.length(seq) - back))
        fresh = bench.read(bench.engine.tokens(seq))
        one, other = (bench.engine.forward([Work(each, as_tokens([42]))])[each].copy() for each in (seq, fresh))
        bench.engine.close(fresh)
        assert bench.close(one, other)
    finally:
        bench.engine.close(seq)
