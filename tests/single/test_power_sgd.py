"""PowerSGD on a simulated network, against the paper's algorithm in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from reference import Array
from test_pipeline import Job

from gq_horovod.research.baselines import PowerSGDConfig
from gq_horovod.research.power_sgd import _random, power_sgd
from mpi_ops.kernels.host import Buffer, Tensors

NAME = "w"


class Group:
    """Ranks that reduce one tensor, step after step."""

    def __init__(self, world_size: int, **options: Any) -> None:
        self.config = PowerSGDConfig(**options)
        self.job = Job(world_size, self.config)
        self.memories: list[dict[str, Any]] = [{} for _ in range(world_size)]
        self.step = 0

    def mean(self, xs: list[Array]) -> Array:
        """The mean of one step's gradients; the same bytes on every rank."""
        started = []
        for rank, (x, memory) in enumerate(zip(xs, self.memories, strict=True)):
            task = self.job.task(rank, x, NAME, self.step)
            task = dataclasses.replace(
                task,
                x=buffer(torch.from_numpy(x)),
                new_output=lambda x=x: buffer(torch.empty(x.shape)),
                method=power_sgd(self.config),
                state=memory,
            )
            started.append(self.job.pipelines[rank].submit(task))
        self.job.poll_until(lambda: all(reduction.done for reduction in started))
        self.step += 1
        results = [
            self.job.pipelines[rank].finish(reduction).owner.numpy()
            for rank, reduction in enumerate(started)
        ]
        assert len({result.tobytes() for result in results}) == 1
        return results[0]


def buffer(tensor: torch.Tensor) -> Tensors:
    return Tensors.of(Buffer(tensor.data_ptr(), "float32", tensor.numel(), tensor))


def orthogonalize(matrix: Array) -> Array:
    """Gram-Schmidt, as in the paper."""
    columns: list[Array] = []
    for column in matrix.T:
        rest = column - sum(((done @ column) * done for done in columns), np.zeros_like(column))
        columns.append(rest / np.linalg.norm(rest))
    return np.stack(columns, axis=1)


class Plain:
    """Algorithms 1 and 2 of the paper, in float64, with all workers in one place."""

    def __init__(self, right: Array, warm_start: bool, error_feedback: bool) -> None:
        self.right, self.warm_start, self.error_feedback = right, warm_start, error_feedback
        self.errors: list[Any] = []

    def mean(self, xs: list[Array], fresh: Array) -> Array:
        wide = [x.astype(np.float64) for x in xs]
        errors = self.errors or [np.zeros_like(x) for x in wide]
        updates = [x + error for x, error in zip(wide, errors, strict=True)]
        left = np.mean([update @ self.right for update in updates], axis=0)
        left = orthogonalize(left)
        rights = [update.T @ left for update in updates]
        right = np.mean(rights, axis=0)
        if self.error_feedback:
            self.errors = [u - left @ own.T for u, own in zip(updates, rights, strict=True)]
        self.right = right if self.warm_start else fresh
        return left @ right.T


def gradients(world_size: int, shape: tuple[int, ...], seed: int) -> list[Array]:
    """Of quickly falling singular values, as gradients are, and different on every rank."""
    rng = np.random.default_rng(seed)
    rows, columns = shape[0], int(np.prod(shape[1:]))
    scale = 0.7 ** np.arange(columns)
    common = rng.normal(size=(rows, columns)) * scale
    mixing = np.linalg.qr(rng.normal(size=(columns, columns)))[0]
    noise = rng.normal(size=(world_size, rows, columns)) * 0.1
    return list(((common + noise) @ mixing).astype(np.float32).reshape(world_size, *shape))


def start(group: Group, columns: int, step: int) -> Array:
    """The random factor with which a step begins where there is none of the step before."""
    task = group.job.task(0, np.zeros(1, dtype=np.float32), NAME, step)
    return _random(task, (columns, group.config.rank)).double().numpy()


@pytest.mark.parametrize("error_feedback", [True, False])
@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_steps_are_those_of_the_paper(
    world_size: int, warm_start: bool, error_feedback: bool
) -> None:
    options = {"warm_start": warm_start, "error_feedback": error_feedback}
    group = Group(world_size, rank=3, **options)
    plain = Plain(start(group, 30, 0), **options)
    for step in range(6):
        xs = gradients(world_size, (40, 30), seed=step)
        expected = plain.mean(xs, start(group, 30, step + 1))
        np.testing.assert_allclose(
            group.mean(xs), expected, rtol=0, atol=2e-4 * abs(expected).max()
        )
        for memory, error in zip(group.memories, plain.errors, strict=error_feedback):
            got = memory["error"].numpy()
            np.testing.assert_allclose(got, error, rtol=0, atol=2e-4 * abs(error).max())
    assert all(("error" in memory) == error_feedback for memory in group.memories)


def test_a_tensor_of_more_dimensions_is_the_first_by_all_others() -> None:
    xs = gradients(2, (40, 5, 3, 2), seed=0)
    flat = Group(2, rank=2).mean([x.reshape(40, 30) for x in xs])
    np.testing.assert_array_equal(Group(2, rank=2).mean(xs), flat.reshape(40, 5, 3, 2))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_mean_of_that_rank_is_exact(rank: int) -> None:
    """Also where the ranks' own gradients have full rank, and in one step."""
    rng = np.random.default_rng(rank)
    low = rng.normal(size=(50, rank)) @ rng.normal(size=(rank, 30))
    noise = rng.normal(size=(50, 30))
    xs = [(low + noise).astype(np.float32), (low - noise).astype(np.float32)]
    np.testing.assert_allclose(Group(2, rank=rank).mean(xs), low, rtol=0, atol=1e-4)
    # One column fewer is not enough.
    if rank > 1:
        error = Group(2, rank=rank - 1).mean(xs) - low
        assert np.linalg.norm(error) > 0.05 * np.linalg.norm(low)


@pytest.mark.parametrize("error_feedback", [True, False])
def test_nothing_is_lost_but_what_the_errors_hold(error_feedback: bool) -> None:
    """The sum of all results, and the mean of the errors, is the sum of all gradients."""
    group = Group(3, rank=2, error_feedback=error_feedback)
    total = np.zeros((40, 30))
    results = np.zeros((40, 30))
    for step in range(8):
        xs = gradients(3, (40, 30), seed=step)
        total += np.mean(xs, axis=0, dtype=np.float64)
        results += group.mean(xs)
    if error_feedback:
        results += np.mean([memory["error"].numpy() for memory in group.memories], axis=0)
        np.testing.assert_allclose(results, total, rtol=0, atol=1e-4)
    else:
        assert np.linalg.norm(results - total) > 0.1 * np.linalg.norm(total)


def test_warm_start_converges_to_the_best_approximation() -> None:
    """On the same gradients, without error feedback: the best of that rank is by the SVD."""
    group = Group(2, rank=3, error_feedback=False)
    xs = gradients(2, (40, 30), seed=0)
    mean = np.mean(xs, axis=0, dtype=np.float64)
    errors = [np.linalg.norm(group.mean(xs) - mean) for _ in range(30)]
    best = np.sqrt((np.linalg.svd(mean, compute_uv=False)[3:] ** 2).sum())
    assert errors[0] > 1.05 * best
    assert errors[-1] < 1.001 * best


def test_zeros_stay_zeros_and_are_no_dead_end() -> None:
    group = Group(2, rank=2)
    zeros = [np.zeros((40, 30), dtype=np.float32)] * 2
    for _ in range(3):
        np.testing.assert_array_equal(group.mean(zeros), 0)
    xs = gradients(2, (40, 30), seed=1)
    mean = np.mean(xs, axis=0)
    for _ in range(3):
        result = group.mean(xs)
    assert np.linalg.norm(result - mean) < np.linalg.norm(mean)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
def test_what_is_not_finite_is_nan_on_every_rank_and_forgotten(bad: float) -> None:
    """1e38 is finite, but not what the factors are computed with."""
    group, other = Group(3, rank=2), Group(3, rank=2)
    first, second = gradients(3, (40, 30), seed=0), gradients(3, (40, 30), seed=1)
    group.mean(first)
    other.mean(first)
    broken = [x.copy() for x in second]
    broken[1][:, 4] = bad
    assert np.all(np.isnan(group.mean(broken)))
    np.testing.assert_array_equal(group.mean(second), other.mean(second))


def test_random_factors_are_equal_on_all_ranks_and_differ_otherwise() -> None:
    job = Job(3, PowerSGDConfig())
    x = np.zeros(1, dtype=np.float32)

    def draw(rank: int = 0, name: str = "a", step: int = 0) -> bytes:
        return _random(job.task(rank, x, name, step), (100, 4)).numpy().tobytes()

    assert draw() == draw(rank=2)
    assert len({draw(), draw(name="b"), draw(step=1)}) == 3
    numbers = np.frombuffer(draw(), dtype=np.float32)
    assert abs(numbers.mean()) < 6 / 20
    assert abs(numbers.var() - 1) < 6 * np.sqrt(2) / 20


def test_what_is_compressed() -> None:
    shape = PowerSGDConfig(rank=4).shape
    assert shape((64, 128)) == (64, 128)
    assert shape((64, 16, 3, 3)) == (64, 144)
    assert shape((1000,)) is None  # a vector
    assert shape(()) is None
    assert shape((0, 9)) is None
    assert shape((8, 8)) is None  # 4 * 16 numbers in place of 64
    assert shape((9, 9)) == (9, 9)
    assert shape((4, 10_000)) is None
