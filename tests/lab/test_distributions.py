"""The divergence of distributions, against its definition on probabilities."""

from __future__ import annotations

import numpy as np

from rekindle.lab.distributions import divergence


def test_it_is_the_sum_over_tokens_of_their_chances_and_of_how_these_differ() -> None:
    left, right = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    logits = [(np.log(each) + 300).astype(np.float32) for each in (left, right)]  # a constant changes nothing
    assert np.isclose(divergence(*logits), 0.25 * np.log(2), rtol=1e-4)


def test_rows_are_judged_one_by_one() -> None:
    rows = np.random.default_rng(1).normal(size=(2, 3, 5)).astype(np.float32)
    apart = divergence(rows[0], rows[1])
    assert apart.shape == (3,) and (apart > 0).all()
    assert np.allclose(apart, [float(divergence(one, other)) for one, other in zip(*rows, strict=True)])
    assert np.allclose(divergence(rows[0], rows[0]), 0)
