"""What every engine promises. Each test runs on the toy, on real llama.cpp contexts and on real transformers models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from tests.engine.conftest import Bench

from rekindle.engine.protocol import Payload, Placed, SequenceId, Work
from rekindle.errors import BadRange, ContextFull, EngineError, ForeignPayload, UnknownSequence
from rekindle.tokens import as_tokens


@pytest.fixture(autouse=True)
def leave_clean(bench: Bench) -> Iterator[None]:
    yield
    for seq in range(128):
        try:
            bench.engine.close(seq)
        except UnknownSequence:
            continue
    bench.engine.check_integrity()
    assert bench.engine.num_free_cells == bench.engine.num_cells


def next_logits(bench: Bench, seq: SequenceId, token: int = 42) -> np.ndarray:
    """Logits after one more token, which is then taken back: a probe of everything the sequence holds."""
    logits = bench.engine.forward([Work(seq, as_tokens([token]))])[seq].copy()
    bench.engine.truncate(seq, bench.engine.length(seq) - 1)
    return logits


def test_one_piece_or_many_gives_the_same(bench: Bench) -> None:
    tokens = bench.random(1, 100)
    whole, parts = bench.read(tokens), bench.engine.open()
    for start, stop in [(0, 1), (1, 33), (33, 64), (64, 100)]:
        last = bench.engine.forward([Work(parts, tokens[start:stop])])[parts].copy()
    assert bench.close(last, bench.engine.forward([Work(bench.read(tokens[:-1]), tokens[-1:])]).popitem()[1])
    assert bench.close(next_logits(bench, whole), next_logits(bench, parts))
    assert (bench.engine.tokens(parts) == tokens).all()


def test_sequences_in_one_batch_do_not_see_each_other(bench: Bench) -> None:
    one, other = bench.random(2, 40), bench.random(3, 25)
    alone = next_logits(bench, bench.read(one))
    a, b = bench.engine.open(), bench.engine.open()
    logits = bench.engine.forward([Work(a, one), Work(b, other, logits=False)])
    assert set(logits) == {a}
    assert bench.close(next_logits(bench, a), alone)


def test_fork_shares_cells_and_leaves_the_parent_alone(bench: Bench) -> None:
    tokens = bench.random(4, 80)
    parent = bench.read(tokens)
    before, free = next_logits(bench, parent), bench.engine.num_free_cells
    child = bench.engine.fork(parent, 50)
    assert bench.engine.num_free_cells == free
    bench.engine.forward([Work(child, bench.random(5, 20))])
    assert bench.close(next_logits(bench, parent), before)
    fresh = bench.read(np.concatenate([tokens[:50], bench.random(5, 20)]))
    assert bench.close(next_logits(bench, child), next_logits(bench, fresh))
    bench.engine.close(parent)
    assert bench.close(next_logits(bench, child), next_logits(bench, fresh))


def test_truncate_forgets_the_tail(bench: Bench) -> None:
    tokens = bench.random(6, 90)
    seq = bench.read(tokens)
    bench.engine.truncate(seq, 37)
    assert (bench.engine.tokens(seq) == tokens[:37]).all()
    assert bench.close(next_logits(bench, seq), next_logits(bench, bench.read(tokens[:37])))


def test_export_and_place_round_trip(bench: Bench) -> None:
    tokens = bench.random(7, 150)
    seq = bench.read(tokens)
    before = next_logits(bench, seq)
    pieces = [bench.engine.export(seq, start, min(start + 64, 150)) for start in range(0, 150, 64)]
    again = bench.engine.open()
    calls = bench.engine.num_calls
    for piece in pieces:
        bench.engine.place(again, piece, piece.position)
    assert bench.engine.num_calls == calls
    assert (bench.engine.tokens(again) == tokens).all()
    assert bench.close(next_logits(bench, again), before)
    assert bytes(bench.engine.export(again, 64, 128).data) == bytes(pieces[1].data)


@pytest.mark.parametrize("size", [16, 64])
def test_placing_all_is_placing_each(bench: Bench, size: int) -> None:
    tokens = bench.random(14, 150)
    seq = bench.read(tokens)
    before = next_logits(bench, seq)
    pieces = [bench.engine.export(seq, start, min(start + size, 150)) for start in range(0, 150, size)]
    again, later = bench.engine.open(), bench.engine.fork(seq, size)
    calls = bench.engine.num_calls
    bench.engine.place_all(again, pieces)
    bench.engine.place_all(later, pieces[1:])
    bench.engine.place_all(later, [])
    assert bench.engine.num_calls == calls
    for each in (again, later):
        assert (bench.engine.tokens(each) == tokens).all()
        assert bench.close(next_logits(bench, each), before)
        for piece in pieces:
            start, stop = piece.position, piece.position + len(piece)
            assert bytes(bench.engine.export(each, start, stop).data) == bytes(piece.data)


def test_placing_all_elsewhere_is_placing_each_elsewhere(bench: Bench) -> None:
    chunk, before = bench.random(12, 50), bench.random(13, 75)
    alone = bench.read(chunk)
    pieces = [bench.engine.export(alone, start, min(start + 16, 50)) for start in range(0, 50, 16)]
    one, other = bench.read(before), bench.read(before)
    bench.engine.place_all(one, pieces)
    for piece in pieces:
        bench.engine.place(other, piece, bench.engine.length(other))
    assert (bench.engine.tokens(one) == bench.engine.tokens(other)).all()
    assert bench.close(next_logits(bench, one), next_logits(bench, other), rotated=True)


def test_all_are_placed_or_none(bench: Bench) -> None:
    tokens = bench.random(15, 96)
    seq = bench.read(tokens)
    pieces = [bench.engine.export(seq, start, start + 16) for start in range(16, 96, 16)]
    torn = Payload(pieces[3].tokens, pieces[3].position, pieces[3].data[:-8], pieces[3].fingerprint)
    foreign = Payload(pieces[3].tokens, pieces[3].position, pieces[3].data, b"somebody else's!")
    bench.engine.truncate(seq, 16)
    before = next_logits(bench, seq)
    for bad in (torn, foreign):
        with pytest.raises(ForeignPayload):
            bench.engine.place_all(seq, [*pieces[:3], bad, pieces[4]])
        assert (bench.engine.tokens(seq) == tokens[:16]).all()
        bench.engine.check_integrity()
        assert bench.close(next_logits(bench, seq), before)


def test_a_long_payload_keeps_what_a_later_truncate_needs(bench: Bench) -> None:
    tokens = bench.random(8, 150)
    whole = bench.engine.export(bench.read(tokens), 0, 150)
    seq = bench.engine.open()
    bench.engine.place(seq, whole, 0)
    bench.engine.truncate(seq, 70)
    assert bench.close(next_logits(bench, seq), next_logits(bench, bench.read(tokens[:70])))


def test_long_sequences_survive_each_other(bench: Bench) -> None:
    """Cells outside a sliding window must not be given away while a sequence may still go back to them."""
    tokens = bench.random(9, 200)
    first = bench.read(tokens)
    bench.engine.close(bench.read(bench.random(10, 250)))
    second = bench.read(bench.random(11, 260))
    bench.engine.truncate(first, 90)
    bench.engine.close(second)
    assert bench.close(next_logits(bench, first), next_logits(bench, bench.read(tokens[:90])))


def test_place_elsewhere_equals_computing_there_with_neighbours_hidden(bench: Bench) -> None:
    chunk, before = bench.random(12, 48), bench.random(13, 75)
    payload = bench.engine.export(bench.read(chunk), 0, 48)
    placed, hidden = bench.read(before), bench.read(before)
    bench.engine.place(placed, payload, 75)
    bench.append_blind(hidden, chunk)
    logits = next_logits(bench, placed)
    assert bench.close(logits, next_logits(bench, hidden), rotated=True)
    seeing = bench.read(np.concatenate([before, chunk]))  # which is something else
    assert np.abs(logits - next_logits(bench, seeing)).max() > 2 * np.abs(logits - next_logits(bench, hidden)).max()


def test_a_part_of_a_payload_is_placed_as_if_it_were_a_payload(bench: Bench) -> None:
    """Of a payload longer than a sliding window too, which is kept in pieces."""
    chunk, before = bench.random(12, 80), bench.random(13, 75)
    alone = bench.read(chunk)
    payload = bench.engine.export(alone, 0, 80)
    for start, stop in [(0, 80), (7, 80), (0, 33), (35, 61), (79, 80), (20, 20)]:
        expected = bench.engine.export(alone, start, stop)
        part, same = bench.read(before), bench.read(before)
        calls = bench.engine.num_calls
        bench.engine.place(part, payload, 75, start=start, stop=stop)
        bench.engine.place(same, expected, 75)
        assert bench.engine.num_calls == calls
        assert (bench.engine.tokens(part) == np.concatenate([before, chunk[start:stop]])).all()
        assert bench.close(next_logits(bench, part), next_logits(bench, same))
        bench.engine.close(part)
        bench.engine.close(same)


def test_parts_placed_with_gaps_computed_between_them(bench: Bench) -> None:
    """Left to right: what is computed sees what was placed before it, as `recompute` behind it would."""
    chunk, before = bench.random(12, 60), bench.random(13, 40)
    payload = bench.engine.export(bench.read(chunk), 0, 60)
    alternating, mended = bench.engine.open(), bench.read(before)
    bench.engine.forward([Work(alternating, np.concatenate([before, chunk[:10]]))])
    bench.engine.place(alternating, payload, 50, start=10, stop=30)
    bench.engine.forward([Work(alternating, chunk[30:37])])
    bench.engine.place(alternating, payload, 77, start=37)
    bench.engine.place(mended, payload, 40)
    bench.engine.recompute(mended, [(40, 50), (70, 77)])
    assert (bench.engine.tokens(alternating) == bench.engine.tokens(mended)).all()
    assert bench.close(next_logits(bench, alternating), next_logits(bench, mended), rotated=True)


def test_recompute_of_everything_equals_a_full_prefill(bench: Bench) -> None:
    head, chunks = bench.random(14, 20), [bench.random(seed, 40) for seed in (15, 16)]
    payloads = [bench.engine.export(bench.read(chunk), 0, 40) for chunk in chunks]
    seq = bench.read(head)
    for index, payload in enumerate(payloads):
        bench.engine.place(seq, payload, 20 + 40 * index)
    full = bench.read(np.concatenate([head, *chunks]))
    calls = bench.engine.num_calls
    bench.engine.recompute(seq, [(20, 60), (60, 100)])
    assert bench.engine.num_calls > calls
    assert bench.close(next_logits(bench, seq), next_logits(bench, full))


def test_recompute_of_a_part_leaves_forks_alone(bench: Bench) -> None:
    tokens = bench.random(17, 90)
    seq = bench.read(tokens)
    fork = bench.engine.fork(seq, 90)
    before = next_logits(bench, fork)
    bench.engine.recompute(seq, [(30, 45), (60, 61)])
    assert bench.close(next_logits(bench, fork), before)
    assert bench.close(next_logits(bench, seq), before)


@pytest.mark.parametrize("forked", [False, True])
def test_drop_slides_what_follows(bench: Bench, forked: bool) -> None:
    tokens = bench.random(18, 120)
    seq = bench.read(tokens)
    fork = bench.engine.fork(seq, 120) if forked else None
    before = next_logits(bench, seq)
    tail = bench.engine.export(seq, 50, 120)
    bench.engine.drop(seq, 20, 50)
    assert (bench.engine.tokens(seq) == np.concatenate([tokens[:20], tokens[50:]])).all()
    same = bench.engine.open()
    bench.engine.place(same, bench.engine.export(bench.read(tokens[:20]), 0, 20), 0)
    bench.engine.place(same, tail, 20)
    assert bench.close(next_logits(bench, seq), next_logits(bench, same), rotated=True)
    bench.engine.truncate(seq, 20)
    assert bench.close(next_logits(bench, seq), next_logits(bench, bench.read(tokens[:20])))
    if fork is not None:
        assert bench.close(next_logits(bench, fork), before)


def test_export_after_a_shift_saves_rotated_keys(bench: Bench) -> None:
    chunk = bench.random(19, 32)
    payload = bench.engine.export(bench.read(chunk), 0, 32)
    seq = bench.read(bench.random(20, 40))
    bench.engine.place(seq, payload, 40)
    moved = bench.engine.export(seq, 40, 72)  # no decode in between
    again = bench.engine.open()
    bench.engine.place(again, moved, 0)
    assert bench.close(next_logits(bench, again), next_logits(bench, bench.read(chunk)), rotated=True)


def test_what_was_moved_before_is_placed_without_a_shift(bench: Bench) -> None:
    """Many chunks, placed with computing in between: they are turned by one model call at most."""
    before, gap = bench.random(13, 30), bench.random(14, 3)
    chunks = [bench.random(seed, 50) for seed in (15, 16, 17)]
    alone = [bench.read(chunk) for chunk in chunks]
    payloads = [bench.engine.export(seq, 0, 50) for seq in alone]
    for seq in alone:
        bench.engine.close(seq)
    positions = [136, 30, 83]
    calls, free = bench.engine.num_calls, bench.engine.num_free_cells
    moved = bench.engine.move(payloads, positions)
    assert bench.engine.num_calls <= calls + 1 and bench.engine.num_free_cells == free
    bench.engine.check_integrity()
    assert [(payload.position, len(payload)) for payload in moved] == [(position, 50) for position in positions]
    one, other = bench.read(before), bench.read(before)
    for index in (1, 2, 0):
        for seq, payload in ((one, moved[index]), (other, payloads[index])):
            bench.engine.place(seq, payload, positions[index])
            bench.engine.forward([Work(seq, gap)])
    assert (bench.engine.tokens(one) == bench.engine.tokens(other)).all()
    assert bench.close(next_logits(bench, one), next_logits(bench, other), rotated=True)
    with pytest.raises(BadRange):
        bench.engine.move(payloads, [0, 49, 200])


def test_compare_tells_which_tokens_depend_on_what_stood_before(bench: Bench) -> None:
    chunk, before = bench.random(12, 60), bench.random(13, 40)
    alone, moved = bench.read(chunk), bench.read(before)
    own = bench.engine.export(alone, 0, 60)
    in_place = bench.engine.export(bench.read(np.concatenate([before, chunk])), 40, 100)
    bench.engine.place(moved, own, 40)
    placed = bench.engine.export(moved, 40, 100)
    differences = bench.engine.compare(in_place, own)
    assert differences.shape == (60,) and (differences > 0).all()
    assert bench.engine.compare(own, own).max() == 0
    assert bench.engine.compare(placed, own).max() == 0, "placing moves K alone"
    bench.engine.recompute(moved, [(50, 60)])
    mended = bench.engine.compare(bench.engine.export(moved, 40, 100), own)
    assert (mended[:10] == 0).all() and (mended[10:20] > 0).all() and (mended[20:] == 0).all()
    with pytest.raises(BadRange):
        bench.engine.compare(own, bench.engine.export(alone, 0, 59))


# Giving up going back. Where no layer has a window it changes nothing, and all of this holds as well.


def released(bench: Bench, seed: int, count: int, length: int) -> tuple[SequenceId, np.ndarray]:
    """A sequence that was released, with its tokens."""
    tokens = bench.random(seed, count)
    seq = bench.read(tokens)
    bench.engine.release(seq, length)
    return seq, tokens


def test_what_was_released_goes_on_as_before(bench: Bench) -> None:
    tokens = bench.random(24, 220)
    seq = bench.read(tokens)
    before, free = next_logits(bench, seq), bench.engine.num_free_cells
    gain = bench.engine.num_releasable(seq, 210)
    bench.engine.release(seq, 210)
    bench.engine.check_integrity()
    assert bench.engine.num_free_cells == free + gain
    assert bench.engine.num_releasable(seq, 210) == 0
    reach = bench.engine.reach(seq)
    assert reach in (0, 210)
    assert (bench.engine.num_free_cells > free) == (reach > 0)
    assert (bench.engine.tokens(seq) == tokens).all()
    assert bench.close(next_logits(bench, seq), before)
    more, same = bench.random(25, 30), bench.read(tokens)
    for each in (seq, same):
        bench.engine.forward([Work(each, more)])
    assert bench.close(next_logits(bench, seq), next_logits(bench, same))


def test_what_was_released_goes_back_as_far_as_it_says(bench: Bench) -> None:
    seq, tokens = released(bench, 26, 230, 190)
    reach = bench.engine.reach(seq)
    for length in (190, 191, 229):
        fork = bench.engine.fork(seq, length)
        fresh = bench.read(tokens[:length])
        assert bench.close(next_logits(bench, fork), next_logits(bench, fresh))
        bench.engine.close(fork)
        bench.engine.close(fresh)
    free = bench.engine.num_free_cells
    if reach:
        for act in (bench.engine.fork, bench.engine.truncate, bench.engine.release):
            with pytest.raises(BadRange, match=f"can go on from token {reach}"):
                act(seq, reach - 1)
        with pytest.raises(BadRange, match=f"from {reach} on"):
            bench.engine.recompute(seq, [(reach - 1, reach)])
    assert bench.engine.num_free_cells == free
    bench.engine.truncate(seq, 190)
    assert bench.close(next_logits(bench, seq), next_logits(bench, bench.read(tokens[:190])))
    bench.engine.truncate(seq, 0)  # the beginning is always there
    assert bench.engine.reach(seq) == 0
    bench.engine.forward([Work(seq, tokens[:90])])
    assert bench.close(next_logits(bench, seq), next_logits(bench, bench.read(tokens[:90])))


def test_releasing_leaves_forks_alone(bench: Bench) -> None:
    tokens = bench.random(27, 200)
    seq = bench.read(tokens)
    fork = bench.engine.fork(seq, 150)
    assert bench.engine.num_releasable(seq, 150) == 0, "another sequence holds them too"
    bench.engine.release(seq, 200)
    bench.engine.release(seq, 200)
    assert bench.engine.reach(fork) == 0
    bench.engine.truncate(fork, 60)
    assert bench.close(next_logits(bench, fork), next_logits(bench, bench.read(tokens[:60])))
    late = bench.engine.fork(seq, 200)
    assert bench.engine.reach(late) == bench.engine.reach(seq)
    bench.engine.close(seq)
    assert bench.close(next_logits(bench, late), next_logits(bench, bench.read(tokens)))


def test_a_released_sequence_leaves_and_comes_back(bench: Bench) -> None:
    """As one that is swapped out: its payloads say what they lack and have no bytes for it."""
    seq, tokens = released(bench, 28, 240, 220)
    before, reach = next_logits(bench, seq), bench.engine.reach(seq)
    pieces = [bench.engine.export(seq, start, min(start + 50, 240)) for start in range(0, 240, 50)]
    other = bench.read(tokens[:50])
    whole = bench.engine.export(other, 0, 50)
    bench.engine.close(other)
    assert whole.lacks == 0
    if reach:
        assert pieces[0].lacks == 50 and len(pieces[0].data) < len(whole.data)
        assert sum(piece.lacks for piece in pieces) == 1 + reach - bench.engine.spec.window
    else:
        assert all(piece.lacks == 0 for piece in pieces)
    again = bench.engine.open()
    for piece in pieces:
        if reach and len(bench.engine.tokens(again)):
            with pytest.raises(BadRange, match="can go on from token"):
                bench.engine.forward([Work(again, as_tokens([42]))])
        bench.engine.place(again, piece, piece.position)
        bench.engine.check_integrity()
    assert bench.engine.reach(again) == reach
    assert bench.close(next_logits(bench, again), before)
    assert bytes(bench.engine.export(again, 150, 240).data) == bytes(bench.engine.export(seq, 150, 240).data)


def test_what_nobody_will_see_is_not_placed(bench: Bench) -> None:
    tokens = bench.random(29, 240)
    seq = bench.read(tokens)
    before = next_logits(bench, seq)
    pieces = [bench.engine.export(seq, start, start + 60) for start in range(0, 240, 60)]
    bench.engine.close(seq)
    lean, wide = bench.engine.open(), bench.engine.open()
    bench.engine.place_all(lean, pieces[:3], until=200)
    bench.engine.place(lean, pieces[3], 180, stop=25, until=200)
    reach, held = bench.engine.reach(lean), bench.engine.num_held([lean])
    assert reach in (0, 200)
    for piece in pieces[:3]:
        bench.engine.place(wide, piece, piece.position)
    bench.engine.place(wide, pieces[3], 180, stop=25)
    assert (held < bench.engine.num_held([wide])) == (reach > 0)
    assert bench.close(next_logits(bench, lean), next_logits(bench, wide))
    bench.engine.place(lean, pieces[3], 205, start=25)
    assert bench.close(next_logits(bench, lean), before)


def test_released_sequences_are_cut_and_mended(bench: Bench) -> None:
    """Where what is left shows all that a window needs; else the cut is refused."""
    seq, tokens = released(bench, 30, 240, 200)
    reach, same = bench.engine.reach(seq), bench.read(tokens)
    if reach:
        with pytest.raises(EngineError, match="cannot be cut out"):
            bench.engine.drop(seq, 100, 230)
    for each in (seq, same):
        bench.engine.recompute(each, [(210, 220)])
        bench.engine.drop(each, 20, 100)
        bench.engine.check_integrity()
    assert (bench.engine.tokens(seq) == bench.engine.tokens(same)).all()
    assert bench.close(next_logits(bench, seq), next_logits(bench, same))


REFUSALS: list[tuple[str, type[EngineError], Callable[[Bench, SequenceId], object]]] = [
    (
        "prompt larger than the cache",
        ContextFull,
        lambda b, s: b.engine.forward([Work(s, b.random(1, b.engine.num_cells))]),
    ),
    ("no tokens", BadRange, lambda b, s: b.engine.forward([Work(s, as_tokens([]))])),
    ("a sequence twice", BadRange, lambda b, s: b.engine.forward([Work(s, as_tokens([20]))] * 2)),
    ("token too large", EngineError, lambda b, s: b.engine.forward([Work(s, as_tokens([b.engine.spec.vocab_size]))])),
    ("token negative", EngineError, lambda b, s: b.engine.forward([Work(s, as_tokens([-1]))])),
    ("unknown sequence", UnknownSequence, lambda b, s: b.engine.forward([Work(99, as_tokens([20]))])),
    ("close twice", UnknownSequence, lambda b, s: b.engine.close(99)),
    ("fork too long", BadRange, lambda b, s: b.engine.fork(s, 61)),
    ("fork of unknown", UnknownSequence, lambda b, s: b.engine.fork(99, 1)),
    ("truncate beyond the end", BadRange, lambda b, s: b.engine.truncate(s, 61)),
    ("truncate below zero", BadRange, lambda b, s: b.engine.truncate(s, -1)),
    ("drop backwards", BadRange, lambda b, s: b.engine.drop(s, 30, 20)),
    ("drop beyond the end", BadRange, lambda b, s: b.engine.drop(s, 30, 61)),
    ("export beyond the end", BadRange, lambda b, s: b.engine.export(s, 0, 61)),
    ("place with a gap", BadRange, lambda b, s: b.engine.place(s, b.engine.export(s, 0, 8), 70)),
    ("release beyond the end", BadRange, lambda b, s: b.engine.release(s, 61)),
    ("release of unknown", UnknownSequence, lambda b, s: b.engine.release(99, 5)),
    ("releasable of unknown", UnknownSequence, lambda b, s: b.engine.num_releasable(99, 0)),
    ("reach of unknown", UnknownSequence, lambda b, s: b.engine.reach(99)),
    ("place inside", BadRange, lambda b, s: b.engine.place(s, b.engine.export(s, 0, 8), 0)),
    ("place a part beyond", BadRange, lambda b, s: b.engine.place(s, b.engine.export(s, 0, 8), 60, start=3, stop=9)),
    ("place a part backwards", BadRange, lambda b, s: b.engine.place(s, b.engine.export(s, 0, 8), 60, start=5, stop=3)),
    ("recompute beyond the end", BadRange, lambda b, s: b.engine.recompute(s, [(50, 61)])),
    ("recompute overlapping", BadRange, lambda b, s: b.engine.recompute(s, [(10, 20), (15, 30)])),
    (
        "payload of another model",
        ForeignPayload,
        lambda b, s: b.engine.place(s, altered(b, s, fingerprint=b"x" * 16), 60),
    ),
    ("payload cut short", ForeignPayload, lambda b, s: b.engine.place(s, altered(b, s, keep=-5), 60)),
    ("payload without content", ForeignPayload, lambda b, s: b.engine.place(s, altered(b, s, keep=0), 60)),
    ("payload of fewer tokens", ForeignPayload, lambda b, s: b.engine.place(s, altered(b, s, tokens=5), 60)),
]


def altered(
    bench: Bench, seq: SequenceId, *, fingerprint: bytes | None = None, keep: int | None = None, tokens: int = 8
) -> Payload:
    payload = bench.engine.export(seq, 0, 8)
    return Payload(payload.tokens[:tokens], 0, payload.data[:keep], fingerprint or payload.fingerprint)


@pytest.mark.parametrize(("error", "act"), [pytest.param(e, a, id=name) for name, e, a in REFUSALS])
def test_a_refusal_changes_nothing(
    bench: Bench, error: type[EngineError], act: Callable[[Bench, SequenceId], object]
) -> None:
    tokens = bench.random(21, 60)
    seq = bench.read(tokens)
    before, free = next_logits(bench, seq), bench.engine.num_free_cells
    with pytest.raises(error) as refusal:
        act(bench, seq)
    assert type(refusal.value) is error
    assert (bench.engine.tokens(seq) == tokens).all()
    assert bench.engine.num_free_cells == free
    bench.engine.check_integrity()
    assert bench.close(next_logits(bench, seq), before)


def pieces_between(bench: Bench, seq: SequenceId) -> tuple[Placed, ...]:
    """For a sequence of 60 tokens: two that are neighbours and moved alike, one whose neighbour is moved by less, all from
    a text on its own.
    """
    alone = bench.read(bench.random(25, 70))
    one, other = bench.engine.export(alone, 0, 40), bench.engine.export(alone, 40, 70)
    bench.engine.close(alone)
    return Placed(one, 5, 40, 65), Placed(other, 0, 20, 100), Placed(other, 4, 30, 120), Placed(one, 1, 12, 163)


def test_kv_placed_between_tokens_is_as_placed_in_turn(bench: Bench) -> None:
    engine, tokens, asked = bench.engine, bench.random(21, 60), bench.random(24, 40)
    seq, turn = bench.read(tokens), bench.read(tokens)
    pieces = pieces_between(bench, seq)
    work = Work(seq, asked, placed=pieces)
    if not engine.places_between:
        with pytest.raises(EngineError, match="at a sequence's end only"):
            engine.forward([work])
        assert (engine.tokens(seq) == tokens).all()
        return
    calls, computed, free = engine.num_calls, engine.num_computed, engine.num_free_cells
    logits = engine.forward([Work(bench.read(bench.random(2, 30)), bench.random(3, 1), logits=False), work])
    assert list(logits) == [seq]
    assert (engine.num_calls - calls, engine.num_computed - computed) == (2, 31 + len(asked))
    assert free - engine.num_free_cells == 31 + work.num_cells
    after, done = logits[seq].copy(), 0
    for piece in pieces:
        if count := piece.position - engine.length(turn):
            engine.forward([Work(turn, asked[done : done + count], logits=False)])
        done += count
        engine.place(turn, piece.payload, piece.position, start=piece.start, stop=piece.stop)
    assert 0 < done < len(asked)
    assert bench.close(engine.forward([Work(turn, asked[done:])])[turn], after)
    assert (engine.tokens(turn) == engine.tokens(seq)).all()
    assert bench.close(next_logits(bench, seq), next_logits(bench, turn))


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda p: replace(p, position=59), id="before the end"),
        pytest.param(lambda p: replace(p, position=74), id="no token behind it"),
        pytest.param(lambda p: replace(p, start=9, stop=8), id="part backwards"),
        pytest.param(lambda p: replace(p, stop=len(p.payload) + 1), id="part beyond"),
        pytest.param(lambda p: replace(p, payload=replace(p.payload, fingerprint=b"x" * 16)), id="of another model"),
        pytest.param(lambda p: replace(p, payload=replace(p.payload, data=p.payload.data[:-5])), id="cut short"),
        pytest.param(lambda p: replace(p, payload=replace(p.payload, lacks=3)), id="lacking"),
        pytest.param(lambda p: replace(p, payload=replace(p.payload, tokens=p.payload.tokens[:-1])), id="of fewer"),
    ],
)
def test_a_refusal_to_place_between_changes_nothing(bench: Bench, spoil: Callable[[Placed], Placed]) -> None:
    engine, tokens = bench.engine, bench.random(21, 60)
    seq, other = bench.read(tokens), bench.read(tokens[:20])
    before, free = next_logits(bench, seq), engine.num_free_cells
    piece = spoil(pieces_between(bench, seq)[0])
    with pytest.raises(EngineError):
        engine.forward([Work(other, tokens[20:25]), Work(seq, bench.random(24, 14), placed=(piece,))])
    with pytest.raises(EngineError):  # and one that does not fit in
        piece = pieces_between(bench, seq)[0]
        engine.forward([Work(seq, bench.random(24, free - 30), placed=(piece,))])
    assert (engine.tokens(seq) == tokens).all() and engine.length(other) == 20
    assert engine.num_free_cells == free
    assert bench.close(next_logits(bench, seq), before)


def test_too_many_sequences(bench: Bench) -> None:
    with pytest.raises(ContextFull, match="sequences of the engine are open"):
        for _ in range(1000):
            bench.engine.open()


def test_the_cache_can_be_filled_to_the_last_cell(bench: Bench) -> None:
    tokens = bench.random(22, bench.engine.num_cells)
    seq = bench.read(tokens)
    assert bench.engine.num_free_cells == 0
    bench.engine.drop(seq, 100, 200)
    bench.engine.export(seq, 0, bench.engine.length(seq))
    assert bench.engine.num_free_cells == 100


def test_counts(bench: Bench) -> None:
    computed = bench.engine.num_computed
    seq = bench.read(bench.random(23, 77))
    bench.engine.recompute(seq, [(10, 20)])
    bench.engine.export(bench.engine.fork(seq, 30), 0, 30)
    assert bench.engine.num_computed == computed + 87
