"""What short batches cost beside full ones, learned from steps."""

from __future__ import annotations

from rekindle.serve.rows import FEWEST, Rows
from rekindle.tokens import SHORT_REST


def learned(short: float, full: float, *, count: int = 64) -> int:
    """Given milliseconds per row."""
    rows = Rows()
    for number in (8, 20, 63):
        rows.add(number, number * short / 1000)
    rows.add(count, count * full / 1000)
    return rows.slow_from


def test_nothing_is_slow_that_was_not_measured() -> None:
    rows = Rows()
    assert rows.slow_from == SHORT_REST
    rows.add(20, 1.0)
    assert rows.slow_from == SHORT_REST
    rows.add(2, 9.0)  # too few to say anything of a row
    rows.add(512, 512 * 0.05)
    assert rows.slow_from == SHORT_REST


def test_the_fewest_rows_that_take_longer_than_a_full_batch() -> None:
    assert learned(4.5, 3.2) == 51  # gemma3-270m after 4,096 tokens
    assert learned(0.82, 0.08) == FEWEST  # ember after 1,024
    assert learned(1.0, 1.0) == SHORT_REST
    assert learned(4.5, 3.2, count=512) == 51


def test_what_was_measured_of_full_batches_outweighs_longer_ones_and_one_disturbed_step_says_nothing() -> None:
    rows = Rows()
    for _ in range(3):
        rows.add(512, 512 * 0.001)
        rows.add(40, 40 * 0.004)
        rows.add(64, 64 * 0.003)
    rows.add(64, 64.0)
    assert rows.slow_from == 53
