"""Two levels of reduction, by ranks that live in one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reduced import placed, reduce_by_nodes, reduce_together
from reference import DTYPES, Array

from gq_horovod.path import nodes as reduced_by_nodes
from gq_horovod.path import pipeline
from gq_horovod.path.config import Config
from mpi_ops.nodes import ROUNDS_IN_FLIGHT, Placement, placement, rounds, unit

CONFIGS = {
    "standard": Config(levels="standard"),
    "standard of 10 bits": Config(levels="standard", bits=10, block_size=96),
    "exponential of 4 bits": Config(levels="exponential", bits=4, block_size=96),
    "two-hop": Config(levels="two-hop"),
    "two-hop of 4 bits": Config(levels="two-hop", bits=4),
    "two-hop of 10 bits": Config(levels="two-hop", bits=10, block_size=512),
}
COUNTS = (1, 255, 0, 256, 4096, 33, 50000, 257, 31, 1024, 96)
NAMES = [f"tensor {place}" for place in range(len(COUNTS))]
GRIDS = [(2, 2), (3, 2), (2, 4), (4, 3), (1, 3), (2, 1)]  # nodes, ranks of each


def gradients(ranks: int, dtype: str, counts: tuple[int, ...] = COUNTS) -> list[list[Array]]:
    """Of each rank, with sums in a node that float32 has exactly."""
    random = np.random.default_rng(ranks)
    return [
        [(random.integers(-64, 65, count) / 64).astype(dtype) for count in counts]
        for _ in range(ranks)
    ]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_codes_are_those_of_a_flat_reduction_of_the_nodes_means(
    config: Config, grid: tuple[int, int], dtype: str
) -> None:
    nodes, xs = placed(*grid), gradients(grid[0] * grid[1], dtype)
    if grid[1] & (grid[1] - 1):  # a third has no float32
        xs = [[own * np.asarray(grid[1], dtype) for own in rank] for rank in xs]
    means = reduce_by_nodes(config, xs, nodes)
    of_nodes = [
        [np.mean([xs[rank][place] for rank in own], 0, dtype) for place in range(len(COUNTS))]
        for own in nodes.nodes
    ]
    (expected, *_) = reduce_together(config, of_nodes, NAMES)
    for own in means:
        for place in range(len(COUNTS)):
            np.testing.assert_array_equal(own[place], expected[place], err_msg=f"tensor {place}")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_bucket_of_many_rounds(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are under way at one time; chunks of tensors begin and end inside shares."""
    monkeypatch.setattr(reduced_by_nodes, "chunk_elements", lambda ranks: 3072)
    monkeypatch.setattr(pipeline, "chunk_elements", lambda ranks: 3072)
    nodes, xs = placed(2, 2), gradients(4, "float32")
    own = rounds(COUNTS, config.plan(2), 2, 3072)
    assert len(own) > 2 * ROUNDS_IN_FLIGHT
    of_nodes = [
        [(xs[one][place] + xs[other][place]) / 2 for place in range(len(COUNTS))]
        for one, other in nodes.nodes
    ]
    (expected, *_) = reduce_together(config, of_nodes, NAMES)
    for means in reduce_by_nodes(config, xs, nodes):
        for mean, wanted in zip(means, expected, strict=True):
            np.testing.assert_array_equal(mean, wanted)


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5000), min_size=1, max_size=12),
    config=st.sampled_from(sorted(CONFIGS)),
    per_node=st.integers(1, 9),
    limit=st.sampled_from([1, 1024, 3000, 1 << 21]),
)
def test_rounds_have_every_element_once(
    counts: list[int], config: str, per_node: int, limit: int
) -> None:
    plan = CONFIGS[config].plan(2)
    seen = [np.zeros(count, dtype=int) for count in counts]
    for index, own in enumerate(rounds(tuple(counts), plan, per_node, limit)):
        assert own.index == index
        assert len(own.shares) == per_node
        packed = np.zeros(own.size, dtype=int)
        ends = np.cumsum(own.sizes)
        for end, size, parts in zip(ends, own.sizes, own.shares, strict=True):
            assert size == max(sum(part.stop - part.start for part in parts), 1)
            for part in parts:
                assert part.start % unit(plan) == 0
                assert end - size <= part.flat
                assert part.flat + part.stop - part.start <= end
                seen[part.tensor][part.start : part.stop] += 1
                packed[part.flat : part.flat + part.stop - part.start] += 1
        assert packed.max() == 1
        # Shares are about as large as each other, and none much larger than asked for.
        assert max(own.sizes) <= max(limit, unit(plan)) + unit(plan)
        assert max(own.sizes) - min(own.sizes) <= 2 * unit(plan)
    for one in seen:
        np.testing.assert_array_equal(one, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "config",
    [Config(levels="standard"), Config(levels="exponential")],
    ids=["standard", "exponential"],
)
def test_ranks_get_the_same_whatever_the_dtype(config: Config, dtype: str) -> None:
    """And nobody's tensors are modified."""
    xs = gradients(6, dtype)
    before = [[own.copy() for own in rank] for rank in xs]
    first, *others = reduce_by_nodes(config, xs, placed(2, 3))
    for own in others:
        assert [x.tobytes() for x in own] == [x.tobytes() for x in first]
    for own, kept in zip(xs, before, strict=True):
        assert [x.tobytes() for x in own] == [x.tobytes() for x in kept]
    exact = np.mean([own[6].astype(np.float64) for own in xs], 0)
    error = np.abs(first[6].astype(np.float64) - exact)
    assert 0 < error.mean() < 0.1


def test_means_are_unbiased_where_a_share_has_one_norm() -> None:
    """Shares of a tensor then have norms of their own; also what its node has added is rounded."""
    random = np.random.default_rng(1)
    xs = [[random.standard_normal(1000, np.float32)] for _ in range(4)]
    exact = np.mean([own[0] for own in xs], 0, np.float64)
    for levels in ("standard", "exponential", "two-hop"):
        config = Config(levels=levels, block_size=None)
        errors = []
        for seed in range(400):
            own, *_ = reduce_by_nodes(config, xs, placed(2, 2), seed=seed)
            errors.append(own[0] - exact)
        mean, spread = np.mean(errors, 0), np.std(errors, 0, ddof=1)
        z = mean / np.maximum(spread / np.sqrt(len(errors)), 1e-9)
        # Of 1000 independent numbers: their squares add up to about 1000, within 5 deviations.
        assert abs((z**2).mean() - 1) < 5 * np.sqrt(2 / 1000) * 1.2, levels


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_nan_and_inf_of_one_rank_reach_all(config: Config) -> None:
    xs = gradients(4, "float32")
    xs[3][6][1000], xs[1][6][40000], xs[2][9][:] = np.nan, -np.inf, 0
    xs[0][9][:] = xs[1][9][:] = xs[3][9][:] = 0
    for own in reduce_by_nodes(config, xs, placed(2, 2)):
        assert np.isnan(own[6][[1000, 40000]]).all()
        np.testing.assert_array_equal(own[9], 0)
        assert np.isfinite(own[4]).all()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_largest_numbers_do_not_overflow(config: Config) -> None:
    """All ranks have them at the same place, so a sum over ranks would be Inf."""
    largest = np.finfo(np.float32).max
    xs = [[np.full(5000, -largest, np.float32)] for _ in range(8)]
    for own in reduce_by_nodes(config, xs, placed(2, 4)):
        np.testing.assert_array_equal(own[0], -largest)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_tensor_that_a_rank_has_not_is_zeros(config: Config) -> None:
    found: list[list[int]] = []
    absent = ((1, 4), *((rank, 6) for rank in range(4)))
    xs = gradients(4, "float32")
    own = reduce_by_nodes(
        config, xs, placed(2, 2), absent, seen=lambda x: found.append(x.astype(bool).tolist())
    )
    assert found == [[place != 6 for place in range(len(COUNTS))]] * 4
    for place in (4, 6):
        for rank in range(4):
            if (rank, place) in absent:
                xs[rank][place] = np.zeros_like(xs[rank][place])
    expected = reduce_by_nodes(config, xs, placed(2, 2))
    for rank in range(4):
        for place in range(len(COUNTS)):
            if (rank, place) in absent:
                np.testing.assert_array_equal(own[rank][place], 77)  # nobody wrote there
            else:
                np.testing.assert_array_equal(own[rank][place], expected[rank][place])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_while_a_rank_is_away_all_others_reduce_without_nodes(config: Config) -> None:
    xs = gradients(4, "float32")
    means = reduce_by_nodes(config, xs, placed(2, 2), joined=(2,))
    assert len(means) == 3
    for place in range(len(COUNTS)):
        exact = sum(xs[rank][place].astype(np.float64) for rank in (0, 1, 3)) / 4
        for own in means:
            np.testing.assert_array_equal(own[place], means[0][place])
            np.testing.assert_allclose(own[place], exact, atol=1e-3)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([0, 0, 1, 1], ((0, 1), (2, 3))),
        ([0, 1, 0, 1], ((0, 2), (1, 3))),
        ([7, 3, 3, 7, 5, 5], ((0, 3), (1, 2), (4, 5))),
        ([0, 0, 0], ((0, 1, 2),)),
        ([0, 1, 2], ((0,), (1,), (2,))),
        ([0, 0, 1], "nodes have 2, 1 ranks"),
        ([4], ((0,),)),
    ],
)
def test_where_ranks_are(numbers: list[int], expected: Any) -> None:
    found = placement(numbers)
    if isinstance(expected, str):
        assert expected in str(found)
        return
    assert found == Placement(expected)
    assert found.has_levels == (len(expected) > 1 < len(expected[0]))
    for rank, node in enumerate(numbers):
        own = found.inside(rank)
        assert {numbers[one] for one in own} == {node}
        assert own[found.place(rank)] == rank
        # In the order of ranks, as Horovod has them in a process set.
        across = found.across(found.place(rank))
        assert rank in across
        assert list(across) == sorted(across)
