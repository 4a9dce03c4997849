"""IntSGD on a simulated network: its law, its factor, and what it does where that does not suit."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from reference import Array, Law, buffer, check_law, standard_law
from test_pipeline import Job, gradients

from gq_horovod.path import pipeline
from gq_horovod.path.pipeline import InFlight, Task
from gq_horovod.research.int_sgd import IntSGDConfig, int_sgd
from mpi_ops import lanes
from mpi_ops.kernels.host import Tensors


class Ranks:
    """Ranks that reduce one tensor, step after step, and remember what IntSGD does."""

    def __init__(self, world_size: int, **options: Any) -> None:
        self.config = IntSGDConfig(**options)
        self.job = Job(world_size, self.config, method=int_sgd(self.config))
        self.states: list[dict[str, Any]] = [{} for _ in range(world_size)]
        self.step = 0

    def set(self, count: int, **state: Any) -> None:
        """Have every rank remember this, and no more."""
        for own in self.states:
            own.clear()
            own.update(count=count, **state)

    def task(self, rank: int, x: Array) -> Task:
        out = Tensors.of(buffer(np.empty(x.size, dtype=np.float32)))
        task = self.job.task(rank, x, "w", self.step)
        return dataclasses.replace(task, new_output=lambda: out, state=self.states[rank])

    def start(self, xs: list[Array]) -> list[InFlight]:
        """One step on all ranks, up to where means are asked for."""
        started = [self.job.pipelines[rank].submit(self.task(rank, x)) for rank, x in enumerate(xs)]
        self.job.poll_until(lambda: all(own.done for own in started))
        self.step += 1
        return started

    def mean(self, xs: list[Array]) -> Array:
        """The mean of one step; the same bytes, and the same memory, on every rank."""
        started = self.start(xs)
        results = [
            own.finish(reduction).owner
            for own, reduction in zip(self.job.pipelines, started, strict=True)
        ]
        assert len({result.tobytes() for result in results}) == 1
        assert all(state == self.states[0] for state in self.states)
        return results[0]

    def integers(self, mean: Array) -> Array:
        """The sums that a mean of integers stands for."""
        return np.rint(mean.astype(np.float64) * len(self.states) * self.alpha(mean.size))

    def alpha(self, count: int) -> float:
        """The paper's factor, in float64, for the coming step."""
        state, n = self.states[0], len(self.states)
        rate = state.get("rate", 1.0)
        bottom = 2 * n * state["r"] + rate**2 * self.config.epsilon**2
        return rate * math.sqrt(count) / math.sqrt(bottom)


def law_of(xs: list[Array], alpha: float) -> Law:
    """The law of the mean where each rank rounds alpha * x to integers, independently."""
    laws = [standard_law(alpha * x.astype(np.float64), 1) * (1 / alpha) for x in xs]
    total = sum(laws[1:], laws[0]) * (1 / len(xs))
    return Law(*(np.atleast_2d(part) for part in dataclasses.astuple(total)))


def check_unbiased(ranks: Ranks, xs: list[Array], r: float) -> None:
    """The law of 400 steps with one r."""
    ranks.set(xs[0].size, r=r, x=None)  # with x, whoever hands over gradients keeps r
    alpha = ranks.alpha(xs[0].size)
    means = np.stack([ranks.mean(xs) for _ in range(400)])
    norm = ranks.job.plan.level_count / alpha
    check_law(means, law_of(xs, alpha), 2.0**-17 * norm)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("bits", [8, 10, 16])
def test_unbiased_where_nothing_is_clipped(bits: int, world_size: int) -> None:
    ranks = Ranks(world_size, bits=bits)
    xs = [x.clip(-4, 4) for x in gradients(world_size, 300)]
    # alpha = 1 / 0.15: integers up to 27, and with three ranks up to 42 fit eight bits.
    check_unbiased(ranks, xs, r=300 * 0.15**2 / (2 * world_size))
    assert ranks.states[0]["clipped"] == 0
    assert ranks.states[0]["rounded"] == 400 * 300 * world_size


@pytest.mark.parametrize("world_size", [1, 3])
def test_clipping_is_a_bias_that_the_same_check_finds(world_size: int) -> None:
    ranks = Ranks(world_size)
    xs = gradients(world_size, 300)
    with pytest.raises(AssertionError, match="biased"):
        check_unbiased(ranks, xs, r=300 * 0.01**2 / (2 * world_size))
    limit = ranks.job.plan.level_count * 0.01
    beyond = sum(int((np.abs(x) > limit).sum()) for x in xs)
    assert beyond > 0
    assert ranks.states[0]["clipped"] == 400 * beyond


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 63, 127])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_sum_overflows(world_size: int, sign: int) -> None:
    """Every rank holds elements that are clipped, at the same places."""
    ranks = Ranks(world_size)
    xs = [np.full(257, sign * 1e30, dtype=np.float32) for _ in range(world_size)]
    ranks.set(257, r=1.0, x=None)
    top = lanes.levels(8, world_size)
    mean = ranks.mean(xs)
    np.testing.assert_array_equal(ranks.integers(mean), sign * top * world_size)
    assert ranks.states[0]["clipped"] == 257 * world_size


def test_alpha_is_that_of_the_paper_over_steps() -> None:
    """After the first, alpha follows the means, as for plain SGD, by the average of squares."""
    ranks = Ranks(2, beta=0.75, bits=16)
    squares, r = [], 0.0
    for step in range(6):
        xs = gradients(2, 500, seed=step)
        if step > 0:
            r = squares[0] if step == 1 else 0.75 * r + 0.25 * squares[-1]
            assert math.isclose(ranks.states[0]["r"], r, rel_tol=1e-6)
            alpha = math.sqrt(500) / math.sqrt(4 * r + 1e-16)
            assert math.isclose(ranks.alpha(500), alpha, rel_tol=1e-6)
        mean = ranks.mean(xs).astype(np.float64)
        exact = np.mean([x.astype(np.float64) for x in xs], axis=0)
        if step == 0:
            np.testing.assert_array_equal(mean.astype(np.float32), exact.astype(np.float32))
        else:
            scaled = 2 * alpha * mean
            np.testing.assert_allclose(scaled, np.rint(scaled), atol=1e-3)
            assert np.all(np.abs(mean - exact) <= 1 / alpha * 1.001)
        squares.append(float((mean**2).sum()))


def test_the_learning_rate_is_in_alpha() -> None:
    ranks, x = Ranks(1, bits=16), np.full(100, 3.0, dtype=np.float32)
    for rate in (1.0, 0.01):
        ranks.set(100, r=50.0 * 0.25**2 * rate**2, rate=rate, x=None)
        assert math.isclose(ranks.alpha(100), 4.0, rel_tol=1e-6)
        np.testing.assert_array_equal(ranks.integers(ranks.mean([x])), 12)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"r": 0.0},
        {"r": 1.0, "rate": 0.0},
        {"r": 1e300, "rate": 1e-300},
        {"r": 1e-308, "rate": 1e300},
        {"r": 1.0, "count": 77},
    ],
    ids=str,
)
def test_steps_without_an_alpha_are_not_compressed(state: dict[str, Any]) -> None:
    ranks = Ranks(2)
    ranks.set(**{"count": 300, **state})
    xs = [np.full(300, value, dtype=np.float32) for value in (3e38, 3.2e38)]
    np.testing.assert_array_equal(ranks.mean(xs), np.float32(1.5e38) + np.float32(1.6e38))
    assert "rounded" not in ranks.states[0]


def test_what_never_moved_begins_when_it_moves() -> None:
    ranks = Ranks(2)
    zeros, xs = [np.zeros(300, dtype=np.float32)] * 2, gradients(2, 300)
    for _ in range(3):
        assert not ranks.mean(zeros).any()
        assert ranks.states[0]["r"] == 0
    np.testing.assert_array_equal(ranks.mean(xs), np.mean(xs, axis=0))
    ranks.mean(xs)
    assert ranks.states[0]["rounded"] == 600


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_or_inf_on_one_rank_reaches_all_and_is_forgotten(bad: float) -> None:
    ranks, sound = Ranks(3), gradients(3, 1000)
    broken = [x.copy() for x in sound]
    broken[1][999] = bad
    assert np.isnan(ranks.mean(broken)[999])
    assert np.isfinite(ranks.mean(broken)[:999]).all()  # in steps that are not compressed
    ranks.mean(sound)
    before = ranks.states[0]["r"]
    assert np.isnan(ranks.mean(broken)).all()  # a tensor has one alpha, and one flag
    assert ranks.states[0]["r"] == before
    assert np.isfinite(ranks.mean(sound)).all()


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_any_size_gives_the_same_bytes_on_every_rank(world_size: int) -> None:
    for count in (1, 31, 33, 97, 513, 4097):
        ranks = Ranks(world_size)
        for step in range(3):
            alpha = ranks.alpha(count) if step else None
            xs = gradients(world_size, count, seed=step)
            mean = ranks.mean(xs)
            assert mean.shape == (count,)
            if alpha is None:
                np.testing.assert_allclose(mean, np.mean(xs, axis=0), rtol=1e-5, atol=1e-6)
            else:
                sums = mean.astype(np.float64) * world_size * alpha
                np.testing.assert_allclose(sums, np.rint(sums), atol=1e-3)


def test_chunks_change_nothing_but_the_dither(monkeypatch: pytest.MonkeyPatch) -> None:
    xs = gradients(3, 9000)
    whole, pieces = Ranks(3), Ranks(3)
    first = whole.mean(xs)
    second = whole.mean(xs)
    monkeypatch.setattr(pipeline, "chunk_elements", lambda ranks: 1000)
    assert pieces.mean(xs).tobytes() == first.tobytes()
    chunked = pieces.mean(xs)
    assert len({name for _, name in pieces.job.network.log}) > 5
    assert chunked[:1024].tobytes() == second[:1024].tobytes()
    assert chunked.tobytes() != second.tobytes()
    assert pieces.states[0]["rounded"] == whole.states[0]["rounded"] == 27000


@pytest.mark.parametrize(
    ("r", "other"),
    [
        (1.0, {"r": 1.0000001}),
        (1.0, {"rate": 0.5}),
        (1.0, {"digest": [1, 3]}),
        (0.0, {"digest": [1, 3]}),
    ],
    ids=str,
)
def test_ranks_that_differ_are_an_error_on_all(r: float, other: dict[str, Any]) -> None:
    """In whatever alpha follows from; in the parameters even where there is no alpha."""
    ranks = Ranks(3)
    ranks.set(1000, r=r, x=None, digest=[1, 2])
    ranks.states[2].update(other)
    for own, reduction in zip(ranks.job.pipelines, ranks.start(gradients(3, 1000)), strict=True):
        with pytest.raises(
            RuntimeError, match=r"^IntSGD: the ranks must agree on alpha and on the param"
        ):
            own.finish(reduction)


def test_the_bits_have_to_hold_the_sum() -> None:
    assert IntSGDConfig().plan(127).level_count == 1
    with pytest.raises(ValueError, match=r"^IntSGD: bits must be at least 9"):
        IntSGDConfig().plan(128)
    assert IntSGDConfig(bits=None).plan(128).bits == 16
