"""error_feedback: rounding to the nearest level, and the recurrence of the residuals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from reference import DTYPES, Array

from gq_horovod.path.config import Config
from gq_horovod.research.simulation import SimulatedRanks
from mpi_ops import codec
from mpi_ops.dither import NEAREST, Stage, dither
from mpi_ops.kernels import host
from mpi_ops.kernels.host import Buffer
from mpi_ops.scheme import Plan

RANKS, COUNT, BLOCK = 3, 3000, 256
CONFIGS = {
    "standard": Config(levels="standard", bits=4, error_feedback=True),
    "two-hop of 2 bits": Config(levels="two-hop", bits=2, error_feedback=True),
    "two-hop of 3 bits": Config(levels="two-hop", bits=3, error_feedback=True),
    "two-hop of 9 bits": Config(levels="two-hop", bits=9, error_feedback=True),
}
NEAR_TIE = 1e-3  # of the distance of two levels: kernels compare with 16 bits


def gradients(step: int, ranks: int = RANKS, dtype: Any = np.float32) -> list[Array]:
    rng = np.random.default_rng(step)
    x = rng.standard_normal((ranks, COUNT)) * 2.0 ** -(np.arange(COUNT) // 96 % 6)
    x[:, 512:768] = 0  # a block whose norm is zero
    return list(x.astype(dtype))


def nearest(x: Array, norms: Array, plan: Plan) -> tuple[Array, Array]:
    """The nearest levels of x, float64, and where two levels are about as near."""
    levels = np.arange(plan.level_count + 1) / plan.level_count
    levels = levels**2 if plan.square else levels
    y = np.divide(np.abs(x), norms, out=np.zeros(x.shape), where=norms > 0)
    above = np.searchsorted(levels, y).clip(1, plan.level_count)
    low, high = levels[above - 1], levels[above]
    share = (y - low) / (high - low)
    return np.sign(x) * np.where(share > 0.5, high, low) * norms, np.abs(share - 0.5) < NEAR_TIE


def norms_of(x: Array) -> Array:
    """The global norm of each element's block; `x` is (ranks, elements)."""
    padded = np.pad(np.abs(x), [(0, 0), (0, -x.shape[1] % BLOCK)])
    return np.repeat(padded.reshape(len(x), -1, BLOCK).max(axis=(0, 2)), BLOCK)[: x.shape[1]]


@pytest.mark.parametrize("isa", host.INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS)
def test_codes_are_the_nearest(
    config: str, dtype: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if host.INSTRUCTION_SETS.index(isa) > host.INSTRUCTION_SETS.index(host.best_instruction_set()):
        pytest.skip("this CPU has not got it")
    monkeypatch.setattr(host, "_instruction_set", isa)
    plan = CONFIGS[config].plan(1)
    assert plan.strata == NEAREST
    x = gradients(0)[0].astype(DTYPES[dtype])
    own = Buffer(x.ctypes.data, dtype, x.size, x)
    norms = codec.norms(own, plan)
    decoded = np.empty(COUNT, np.float32)
    results = []
    for step, rank in ((0, 0), (1, 0), (0, 7)):  # they make no difference
        random = dither(0, "w", step, rank, Stage.QUANTIZE, plan.strata)
        codes = codec.quantize(own, norms, plan, random)
        codec.dequantize(codes, norms, plan.alone, Buffer.of(decoded))
        results.append(decoded.tobytes())
    assert len(set(results)) == 1
    wide = x.astype(np.float64)
    expected, tie = nearest(wide, norms_of(wide[None, :]), plan)
    np.testing.assert_allclose(decoded[~tie], expected[~tie], rtol=1e-6)
    assert tie.mean() < 0.01 if plan.bits < 9 else tie.mean() < 0.1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_recurrence(config: str, dtype: Any) -> None:
    """e' = (g + e) - decoded, in the gradient's dtype; with standard levels, to the last sum."""
    ranks = SimulatedRanks(CONFIGS[config], RANKS)
    plan = CONFIGS[config].plan(RANKS)
    left = np.zeros((RANKS, COUNT), dtype)
    total, sent = np.zeros(COUNT), np.zeros(COUNT)
    for step in range(5):
        xs = gradients(step, dtype=dtype)
        before = [x.tobytes() for x in xs]
        mean = ranks.average("w", xs)
        assert before == [x.tobytes() for x in xs]
        x = np.stack(xs) + left
        wide = x.astype(np.float64)
        decoded, tie = nearest(wide, norms_of(wide), plan)
        after = np.stack(ranks._left["w"])
        expected = (x - decoded.astype(dtype))[~tie]
        unit = 4 * max(np.finfo(dtype).eps, 2.0**-23) * np.abs(wide).max()
        np.testing.assert_allclose(after[~tie].astype(np.float64), expected, rtol=0, atol=unit)
        sent += (x.astype(np.float64) - after).mean(axis=0)
        total += np.mean(xs, axis=0, dtype=np.float64)
        left = after
        if config == "standard":
            own = (x.astype(np.float64) - after).mean(axis=0)
            np.testing.assert_allclose(mean.astype(np.float64), own, rtol=0, atol=unit)
    # What was sent of all gradients is all but the residuals.
    assert np.abs(left).max() > 0
    np.testing.assert_allclose(
        sent, total - left.mean(axis=0, dtype=np.float64), rtol=0, atol=20 * unit
    )


def test_nothing_is_lost_for_ever() -> None:
    """The same gradients in every step: results follow them; without feedback they never do."""
    config, steps = CONFIGS["standard"], 50
    xs = gradients(0)
    truth = np.mean(xs, axis=0, dtype=np.float64)
    ranks, forgetful = SimulatedRanks(config, RANKS), SimulatedRanks(config, RANKS)
    total = np.zeros(COUNT)
    biased = np.zeros(COUNT)
    for _ in range(steps):
        total += ranks.average("w", xs)
        biased += forgetful.average("w", xs)
        forgetful._left.clear()
    # A residual is at most half of the distance of two levels, of norms that it is part of.
    half = 1 / (2 * config.plan(RANKS).level_count)
    bound = half / (1 - half) * norms_of(np.stack(xs)) + 1e-4
    assert (np.abs(total - steps * truth) <= bound).all()
    assert (np.abs(biased - steps * truth) > 5 * bound).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_leaves_nothing_behind(value: float) -> None:
    ranks = SimulatedRanks(CONFIGS["two-hop of 3 bits"], RANKS)
    ranks.average("w", gradients(0))
    assert any(left.any() for left in ranks._left["w"])
    xs = gradients(1)
    xs[1][1000] = value
    assert np.isnan(ranks.average("w", xs)[768:1024]).all()
    assert not any(left.any() for left in ranks._left["w"])
    mean = ranks.average("w", gradients(2))
    fresh = SimulatedRanks(CONFIGS["two-hop of 3 bits"], RANKS)
    fresh._steps["w"] = 2
    assert mean.tobytes() == fresh.average("w", gradients(2)).tobytes()
