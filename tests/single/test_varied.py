"""Widths that vary between blocks: how they are chosen, and the mean that they give."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gq_horovod.path.config import Config
from gq_horovod.research.simulation import SimulatedRanks
from gq_horovod.research.varied import WIDTHS, VariedRanks, allot
from mpi_ops.kernels.host import Buffer
from mpi_ops.wire import wire

RANKS, BLOCK = 4, 256
LEVELS = np.array([1, 4, 7, 19, 41, 127])
BITS = np.array([2.2, 3.4, 4.2, 5.5, 6.6, 8.2])


def total(norms: np.ndarray, chosen: np.ndarray, power: float) -> float:
    return float((norms.astype(np.float64) ** power / LEVELS[chosen] ** 2).sum())


@given(
    norms=st.lists(st.floats(0, 2.0**90, width=32), min_size=1, max_size=50),
    budget=st.floats(2.2, 9.0),
)
def test_the_budget_holds_and_larger_norms_have_no_fewer_bits(
    norms: list[float], budget: float
) -> None:
    own = np.array(norms, np.float32)
    chosen = allot(own, LEVELS, BITS, budget, 2.0)
    assert BITS[chosen].mean() <= budget + 1e-9
    assert (np.diff(chosen[np.argsort(own, kind="stable")]) >= 0).all()


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_no_other_choice_of_its_bits_has_less_error(power: float) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        norms = np.exp(2 * random.standard_normal(5)).astype(np.float32)
        chosen = allot(norms, LEVELS, BITS, 4.5, power)
        bits = BITS[chosen].sum()
        others = (np.array(own) for own in itertools.product(range(len(LEVELS)), repeat=5))
        best = min(total(norms, own, power) for own in others if BITS[own].sum() <= bits + 1e-9)
        assert total(norms, chosen, power) == pytest.approx(best)


def test_blocks_that_are_alike_have_the_width_of_the_budget_or_the_next_below() -> None:
    norms = np.ones(10, np.float32)
    for place, bits in enumerate(BITS):
        assert set(allot(norms, LEVELS, BITS, bits + 0.01, 2.0)) == {place}


@pytest.mark.parametrize("budget", [0.0, 2.0])
def test_the_smallest_width_where_the_budget_has_none(budget: float) -> None:
    assert set(allot(np.array([1, 2, 3], np.float32), LEVELS, BITS, budget, 2.0)) == {0}


def test_norms_that_are_not_finite() -> None:
    norms = np.array([np.inf, 1, np.nan, 1e-3], np.float32)
    finite = allot(np.array([0, 1, 0, 1e-3], np.float32), LEVELS, BITS, 4.2, 1.0)
    np.testing.assert_array_equal(allot(norms, LEVELS, BITS, 4.2, 1.0), finite)


def gradients(blocks: int, seed: int = 0) -> list[np.ndarray]:
    """Of ranks, with blocks of different scales."""
    random = np.random.default_rng(seed)
    scale = np.repeat(np.exp(2 * random.standard_normal(blocks)), BLOCK)
    return [(scale * random.standard_normal(blocks * BLOCK)).astype("f4") for _ in range(RANKS)]


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_less_error_for_the_same_bytes(bits: int) -> None:
    config = Config(levels="two-hop", bits=bits)
    own = gradients(2048)
    exact = np.mean(own, axis=0, dtype=np.float64)
    mean, sent = VariedRanks(config, RANKS, power=2.0).average("own", own)
    error = ((mean - exact) ** 2).sum() / (exact**2).sum()
    fixed = wire(len(own[0]), config.plan(RANKS))
    assert sent <= 1.04 * fixed.sent  # shares of each width are padded
    # 0.007 with 5 bits in every block, 0.05 with 4, and more with 3.
    assert error < {3: 2e-3, 4: 3e-4, 5: 4e-5}[bits]


def test_the_mean_is_unbiased() -> None:
    """Over many calls: the sum of squared z-scores of all elements."""
    own, calls = gradients(4, seed=1), 400
    exact = np.mean(own, axis=0, dtype=np.float64)
    ranks = VariedRanks(Config(levels="two-hop", bits=4), RANKS)
    found = np.array([ranks.average("own", own)[0] for _ in range(calls)], np.float64)
    spread = found.std(axis=0, ddof=1)
    noisy = spread > 0
    z = (found.mean(axis=0) - exact)[noisy] / (spread[noisy] / calls**0.5)
    assert noisy.mean() > 0.9
    assert abs((z**2).mean() - 1) < 6 * (2 / noisy.sum()) ** 0.5
    assert abs(z.mean()) < 5 / noisy.sum() ** 0.5
    np.testing.assert_allclose(found.mean(axis=0)[~noisy], exact[~noisy], rtol=1e-6)


def test_zeros_and_values_that_are_not_finite() -> None:
    own = gradients(6)
    for part in own:
        part[:BLOCK] = 0
    own[2][BLOCK], own[1][2 * BLOCK] = np.nan, np.inf
    mean, _ = VariedRanks(Config(levels="two-hop", bits=4), RANKS).average("own", own)
    blocks = mean.reshape(-1, BLOCK)
    assert (blocks[0] == 0).all()
    assert np.isnan(blocks[1]).any()
    assert not np.isfinite(blocks[2]).all()
    assert np.isfinite(blocks[3:]).all()


def test_two_runs_are_the_same() -> None:
    runs = [
        VariedRanks(Config(levels="two-hop", bits=4), RANKS).average("own", gradients(16))
        for _ in range(2)
    ]
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_power_zero_is_one_width() -> None:
    own, config = gradients(64), Config(levels="two-hop", bits=4)
    mean, sent = VariedRanks(config, RANKS, power=0.0).average("own", own)
    out = np.empty_like(own[0])
    ranks = SimulatedRanks(config, RANKS)
    assert sent == ranks.reduce("own.4", list(map(Buffer.of, own)), Buffer.of(out))
    np.testing.assert_array_equal(mean, out)


def test_widths_ascend_in_levels_and_bytes() -> None:
    ranks = VariedRanks(Config(levels="two-hop", bits=4), RANKS)
    assert len(ranks._levels) == len(WIDTHS)
    assert (np.diff(ranks._levels) > 0).all()
    assert (np.diff(ranks._bits) > 0).all()


@pytest.mark.parametrize("options", [{"levels": "standard"}, {"block_size": None}])
def test_other_levels_and_tensors_of_one_norm_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"VariedRanks: expected two-hop levels and blocks"):
        VariedRanks(Config(**{"levels": "two-hop", **options}), RANKS)  # type: ignore[arg-type]
