"""Tensors that are reduced together get what each would get by itself, bit for bit."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reduced import reduce_together
from reference import DTYPES, Array

from gq_horovod.path import pipeline
from gq_horovod.path.buckets import cut, name_of
from gq_horovod.path.config import Config
from mpi_ops import chunks, lanes, sizes, wire
from mpi_ops.kernels import host
from mpi_ops.layout import layout

CONFIGS = {
    "standard": Config(levels="standard"),
    "standard of 10 bits": Config(levels="standard", bits=10, block_size=96),
    "standard of 5 bits, one norm": Config(levels="standard", bits=5, block_size=None),
    "standard with l2 norms": Config(norm="l2", bits=16),
    "exponential": Config(levels="exponential"),
    "exponential of 4 bits": Config(levels="exponential", bits=4, block_size=96),
    "two-hop": Config(levels="two-hop"),
    "two-hop of 4 bits": Config(levels="two-hop", bits=4),
    "two-hop of 10 bits": Config(levels="two-hop", bits=10),
    "two-hop of 2 bits, small blocks": Config(levels="two-hop", bits=2, block_size=32),
}
COUNTS = (1, 255, 0, 256, 4096, 33, 5000, 257, 31, 1024, 96)


def inputs(ranks: int, counts: Any, dtype: str = "float32", seed: int = 0) -> list[list[Array]]:
    rng = np.random.default_rng(seed)
    return [
        [
            (rng.normal(size=count) * 10.0 ** rng.integers(-3, 3)).astype(DTYPES[dtype])
            for count in counts
        ]
        for _ in range(ranks)
    ]


def check_as_alone(config: Config, xs: list[list[Array]], together: list[list[Array]]) -> None:
    """Compare with what each tensor gets by itself, with the same names and steps."""
    for place in range(len(xs[0])):
        alone = reduce_alone(config, [own[place] for own in xs], f"w{place}", place)
        for rank, own in enumerate(together):
            assert own[place].tobytes() == alone.tobytes(), (place, rank)


def reduce_alone(config: Config, xs: list[Array], name: str, step: int) -> Array:
    """One tensor by itself, in its step."""
    padded = [[np.empty(0, x.dtype)] * step + [x] for x in xs]
    return reduce_together(config, padded, [f"none{own}" for own in range(step)] + [name])[0][-1]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_a_bucket_gives_what_its_tensors_get_alone(config: str, ranks: int) -> None:
    xs = inputs(ranks, COUNTS)
    names = [f"w{place}" for place in range(len(COUNTS))]
    check_as_alone(CONFIGS[config], xs, reduce_together(CONFIGS[config], xs, names))


@pytest.mark.parametrize("levels", ["standard", "exponential"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_one_norm_for_a_bucket(levels: str, dtype: str, ranks: int) -> None:
    """Means lie on the levels of the bucket's norm, and those of a tensor on no others."""
    config = Config(levels=levels, bits=8, block_size="bucket")
    xs = inputs(ranks, COUNTS, dtype)
    names = [f"w{place}" for place in range(len(COUNTS))]
    norm = np.float32(max(np.abs(x).max(initial=0) for own in xs for x in own)).astype(float)
    together = reduce_together(config, xs, names)
    for own in together[1:]:
        assert [x.tobytes() for x in own] == [x.tobytes() for x in together[0]]
    for mean in together[0]:
        places = mean.astype(float) / norm
        if levels == "standard":
            places = places * ranks * (127 // ranks)
        else:
            places = np.log2(np.abs(places[places != 0]))
        np.testing.assert_allclose(places, np.rint(places), atol=1e-4)
    # A tensor by itself is a bucket of its own; with the largest one, its norm is the same.
    largest = max(
        range(len(COUNTS)), key=lambda place: max(np.abs(o[place]).max(initial=0) for o in xs)
    )
    for place in range(len(COUNTS)):
        alone = reduce_alone(config, [own[place] for own in xs], names[place], place)
        if place == largest:
            assert alone.tobytes() == together[0][place].tobytes()


def test_one_norm_for_a_bucket_without_some_of_its_tensors() -> None:
    """What a rank does not have is zeros, whose codes are zeros by any norm."""
    config = Config(levels="standard", bits=8, block_size="bucket")
    xs = inputs(3, (300, 5000, 64))
    names = ["a", "b", "c"]
    absent = ((0, 1), (2, 1), (2, 2))
    found = reduce_together(config, xs, names, absent)
    zeros = [
        [x * ((rank, place) not in absent) for place, x in enumerate(own)]
        for rank, own in enumerate(xs)
    ]
    expected = reduce_together(config, zeros, names)
    for rank, own in enumerate(found):
        for place, x in enumerate(own):
            if (rank, place) not in absent:
                assert x.tobytes() == expected[rank][place].tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_norm_for_a_bucket_that_is_not_finite(bad: float) -> None:
    xs = inputs(2, (300, 64))
    xs[1][1][5] = bad
    for own in reduce_together(Config(levels="standard", block_size="bucket"), xs, ["a", "b"]):
        assert all(np.isnan(x).all() for x in own)


@pytest.mark.parametrize("config", ["standard", "exponential", "two-hop"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", host.INSTRUCTION_SETS)
def test_of_every_dtype_and_instruction_set(
    config: str, dtype: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if host.INSTRUCTION_SETS.index(isa) > host.INSTRUCTION_SETS.index(host.best_instruction_set()):
        pytest.skip(f"this CPU has no {isa}")
    xs = inputs(2, COUNTS, dtype)
    names = [f"w{place}" for place in range(len(COUNTS))]
    best = reduce_together(CONFIGS[config], xs, names)
    monkeypatch.setattr(host, "_instruction_set", isa)
    own = reduce_together(CONFIGS[config], xs, names)
    assert [x.tobytes() for x in own[0]] == [x.tobytes() for x in best[1]]
    check_as_alone(CONFIGS[config], xs, own)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 3000), min_size=1, max_size=12),
    config=st.sampled_from(sorted(CONFIGS)),
    ranks=st.integers(1, 4),
    limit=st.sampled_from([1024, 3072, 1 << 21]),
)
def test_any_sizes_and_chunks(counts: list[int], config: str, ranks: int, limit: int) -> None:
    xs = inputs(ranks, counts, seed=sum(counts))
    names = [f"w{place}" for place in range(len(counts))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "chunk_elements", lambda ranks: limit)
        check_as_alone(CONFIGS[config], xs, reduce_together(CONFIGS[config], xs, names))


@pytest.mark.parametrize("config", CONFIGS)
def test_nan_and_zeros_stay_with_their_tensor(config: str) -> None:
    """A NaN in the last block of one tensor, beside zeros in the first of the next."""
    xs = inputs(3, [300, 300, 300])
    for own in xs:
        own[1][:] = 0
    xs[1][0][-1] = np.nan
    xs[2][2][0] = np.inf
    (first, zeros, last), *others = reduce_together(CONFIGS[config], xs, ["a", "b", "c"])
    assert np.isnan(first[-1])
    np.testing.assert_array_equal(zeros, 0)
    assert np.isnan(last[0])
    for own in others:
        assert [x.tobytes() for x in own] == [first.tobytes(), zeros.tobytes(), last.tobytes()]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_tensor_that_a_rank_has_not_is_zeros(config: str) -> None:
    xs = inputs(3, [700, 300, 4096])
    seen: list[list[int]] = []

    def observe(found: Array) -> None:
        seen.append(found.tolist())

    names = ["w0", "w1", "w2"]
    absent = ((1, 0), (0, 1), (1, 1), (2, 1))
    own = reduce_together(CONFIGS[config], xs, names, absent, observe)
    assert seen == [[1, 0, 1]] * 3
    filled = [
        [x if (rank, place) not in absent else np.zeros_like(x) for place, x in enumerate(them)]
        for rank, them in enumerate(xs)
    ]
    expected = reduce_together(CONFIGS[config], filled, names)[0]
    for rank, place in itertools.product(range(3), range(3)):
        if (rank, place) in absent:
            np.testing.assert_array_equal(own[rank][place], 77)  # nobody wrote there
        else:
            assert own[rank][place].tobytes() == expected[place].tobytes()


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(0, 10_000), min_size=1, max_size=20),
    config=st.sampled_from(sorted(CONFIGS)),
    ranks=st.sampled_from([1, 2, 3, 64]),
    limit=st.sampled_from([None, 1024, 1 << 20]),
)
def test_places_of_a_layout(counts: list[int], config: str, ranks: int, limit: int | None) -> None:
    """Everything is somewhere, once, and nothing overlaps."""
    try:
        plan = CONFIGS[config].plan(ranks)
    except ValueError:
        return  # lanes too narrow for so many ranks
    own = layout(tuple(counts), plan, limit)
    elements = np.zeros(sum(counts), dtype=int)
    starts = np.cumsum([0, *counts])
    norms = np.zeros(own.norm_count, dtype=int)
    for parcel in own.parcels:
        payload = np.zeros(parcel.size, dtype=int)
        for piece in parcel.pieces:
            elements[starts[piece.tensor] + piece.start : starts[piece.tensor] + piece.stop] += 1
            payload[piece.payload :][: sizes.payload_size(piece.elements, plan)] += 1
            if piece.chunk == 0 or plan.block_size is not None:
                norms[piece.norms :][: piece.norm_count] += 1
        assert payload.max() == 1
        if parcel.shares:
            assert parcel.size == parcel.share_size * ranks
            parts = sum(int(parcel.share(rank)[1]["elements"].sum()) for rank in range(ranks))
            assert parts == parcel.padded
    assert np.all(elements == 1)
    assert norms.max(initial=0) <= 1
    measured = sum(lanes.blocks(count, plan.block_for(count)) for count in counts)
    assert norms.sum() == measured


def test_where_buckets_are_cut() -> None:
    assert cut([], 10, 10) == []
    assert cut([5, 5, 5, 5], 5, 10) == [range(1), range(1, 3), range(3, 4)]
    assert cut([100, 1, 1, 100], 5, 10) == [range(1), range(1, 3), range(3, 4)]
    assert cut([5, 5, 5], 10, 0) == [range(1), range(1, 2), range(2, 3)]
    assert cut([5, 5, 5], 100, 10) == [range(2), range(2, 3)]  # the first is no larger


def test_names_tell_buckets_apart() -> None:
    assert name_of(["a"], None) == "a"
    names = {
        name_of(["a", "b"], [(1,), (2,)]),
        name_of(["a", "c"], [(1,), (2,)]),
        name_of(["a", "b"], [(1,), (3,)]),
        name_of(["b", "a"], [(1,), (2,)]),
        name_of(["a", "b", "c"], [(1,), (2,)]),
    }
    assert len(names) == 5
    assert all(name[:3] in ("a+1", "a+2", "b+1") for name in names)


def test_messages_do_not_shrink_with_more_ranks() -> None:
    """What one rank has for another in a chunk of a large tensor is as large as among 64 ranks."""
    for ranks in (64, 100, 1024, 4096):
        assert chunks.message_elements(1 << 40, ranks) // ranks == 1 << 14
    for ranks, share in ((64, 1 << 11), (128, 1 << 12), (512, 1 << 14), (4096, 1 << 14)):
        assert chunks.message_elements(1, ranks) // ranks == share
    for ranks in (2, 63):
        assert chunks.message_elements(1 << 40, ranks) == chunks.MAXIMUM_CHUNK
        assert chunks.message_elements(1, ranks) == chunks.MINIMUM_CHUNK


@pytest.mark.parametrize("transport", ["horovod", "mpi"])
@pytest.mark.parametrize("ranks", [2, 3, 13, 130])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bytes_of_a_tensor_of_many_chunks(config: Config, ranks: int, transport: str) -> None:
    """Counted without looking at every chunk: those of the layout by which it is reduced."""
    if config.bits == 5 and ranks > 15:
        config = replace(config, bits=None)  # 5 bits cannot hold their sum
    plan = config.plan(ranks)
    item = sizes.payload_dtype(plan).itemsize
    limit = None if transport == "mpi" else chunks.chunk_elements(ranks)
    whole = chunks.chunk_elements(ranks) if limit else chunks.message_elements(1 << 40, ranks)
    for count in (0, 1, 300, 15 * whole, 16 * whole + 1, 20 * whole - 1, 40 * whole + 333):
        parcels = layout((count,), plan, limit).parcels
        expected = [
            (own.share_size + own.reduced_size) * ranks * item // 2
            if own.shares
            else own.size * item
            for own in parcels
        ]
        assert list(wire.parcel_bytes((count,), plan, transport)) == expected
