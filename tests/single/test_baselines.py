"""The baselines' quantizers on a simulated network: their laws, their bytes, their order."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from reference import (
    INF_BITS,
    NAN_BITS,
    Array,
    Law,
    buffer,
    check_law,
    exponential_law,
    float_bits,
    standard_law,
    unpack_lanes,
)
from test_pipeline import Job, gradients

from gq_horovod.path import pipeline
from gq_horovod.path.config import Config
from gq_horovod.path.pipeline import Method, Task
from gq_horovod.research import baselines
from gq_horovod.research.baselines import (
    GATHER,
    GATHER_ELIAS,
    GATHER_POWERS_OF_TWO,
    NEAREST,
    NaturalConfig,
    NearestConfig,
    PowerSGDConfig,
    QSGDConfig,
    TernGradConfig,
)
from gq_horovod.research.int_sgd import IntSGDConfig
from mpi_ops.kernels.host import Tensors

METHODS: dict[str, tuple[Config, Method]] = {
    "QSGD": (QSGDConfig(), GATHER),
    "QSGD of 4 bits, l2": (QSGDConfig(bits=4, block_size=96, norm="l2"), GATHER),
    "QSGD of 10 bits": (QSGDConfig(bits=10, block_size=64), GATHER),
    "QSGD in Elias codes": (QSGDConfig(coding="elias"), GATHER_ELIAS),
    "QSGD of 16 bits, l2, in Elias codes": (
        QSGDConfig(bits=16, block_size=None, norm="l2", coding="elias"),
        GATHER_ELIAS,
    ),
    "TernGrad": (TernGradConfig(), GATHER),
    "natural compression": (NaturalConfig(), GATHER_POWERS_OF_TWO),
    "nearest": (NearestConfig(), NEAREST),
    "nearest of 16 bits": (NearestConfig(bits=16, block_size=None), NEAREST),
}
UNBIASED = [name for name in METHODS if "nearest" not in name]


class BaselineJob(Job):
    """Ranks that reduce by a baseline."""

    def __init__(self, world_size: int, name: str) -> None:
        config, method = METHODS[name]
        super().__init__(world_size, config, method=method)

    def task(self, *arguments: Any, **options: Any) -> Task:
        task = super().task(*arguments, **options)
        out = Tensors.of(buffer(np.empty(task.tensor.size, dtype=np.float32)))
        return dataclasses.replace(task, new_output=lambda: out)


def norms_of(x: Array, job: Job) -> Array:
    """The norm of each element's block on one rank, in float64."""
    size = job.plan.block_for(len(x))
    padded = np.pad(x.astype(np.float64), (0, -len(x) % size)).reshape(-1, size)
    norms = np.linalg.norm(padded, axis=1) if job.plan.norm == "l2" else np.abs(padded).max(axis=1)
    return np.repeat(norms, size)[: len(x)]


def law_of(xs: list[Array], job: Job) -> Law:
    """The law of the mean when each rank rounds without bias by its own norms."""
    laws = []
    for x in xs:
        norms = norms_of(x, job)
        if job.plan.levels == "exponential":
            norms = 2.0 ** np.ceil(np.log2(norms))
            law = exponential_law(x / norms, job.plan.bits)
        else:
            law = standard_law(x / norms, job.plan.level_count)
        laws.append(
            Law(law.mean * norms, law.variance * norms**2, law.fourth * norms**4, law.width * norms)
        )
    total = sum(laws[1:], laws[0]) * (1 / len(xs))
    # One row: the norms differ, so the columns are compared one by one.
    return Law(*(np.atleast_2d(part) for part in dataclasses.astuple(total)))


def check_unbiased(name: str, world_size: int) -> None:
    count, steps = 300, 400
    job = BaselineJob(world_size, name)
    xs = gradients(world_size, count)
    means = np.stack([job.mean(xs, step) for step in range(steps)])
    # The codes are exact to 2**-17 of a level, and the arithmetic to some roundings of float32.
    largest = max(float(norms_of(x, job).max()) for x in xs)
    check_law(means, law_of(xs, job), 2.0**-17 * largest)


@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize("world_size", [1, 3])
def test_means_have_the_law_of_independent_roundings_by_local_norms(
    name: str, world_size: int
) -> None:
    check_unbiased(name, world_size)


@pytest.mark.parametrize("world_size", [1, 3])
def test_rounding_to_nearest_fails_the_same_check(world_size: int) -> None:
    with pytest.raises(AssertionError, match="biased: mean is off"):
        check_unbiased("nearest", world_size)


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("name", METHODS)
def test_any_size_gives_the_same_bytes_on_every_rank(name: str, world_size: int) -> None:
    job = BaselineJob(world_size, name)
    counts = (1, 31, 33, 95, 97, 513, 4097)
    inputs = [
        {str(count): x for count, x in zip(counts, own, strict=True)}
        for own in zip(*(gradients(world_size, n, seed=n) for n in counts), strict=True)
    ]
    results = job.reduce(inputs)
    for count in counts:
        assert len({own[str(count)].tobytes() for own in results}) == 1
        mean = np.mean([own[str(count)].astype(np.float64) for own in inputs], axis=0)
        error = np.abs(results[0][str(count)] - mean)
        norms = [norms_of(own[str(count)], job) for own in inputs]
        if job.plan.levels == "exponential":
            bound = np.mean([np.abs(own[str(count)]) for own in inputs], axis=0)
        elif name in UNBIASED:
            bound = np.mean(norms, axis=0) / job.plan.level_count
        else:  # half a level of the shared norm
            bound = np.max(norms, axis=0) / job.plan.level_count / 2
        rounding = 2.0**-21 * np.max(norms, axis=0)  # of float32
        assert np.all(error <= bound * 1.0001 + rounding)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", UNBIASED)
def test_other_dtypes_are_decoded_to_float32(name: str, dtype: str) -> None:
    xs = gradients(2, 1000, dtype)
    mean = BaselineJob(2, name).mean(xs)
    assert mean.dtype == np.float32
    truth = np.mean([x.astype(np.float64) for x in xs], axis=0)
    assert 0 < np.linalg.norm(mean - truth) < 3 * np.linalg.norm(truth)


@pytest.mark.parametrize("name", METHODS)
def test_pieces_and_chunks_change_nothing_but_the_dither(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    xs = gradients(3, 9000)
    whole = BaselineJob(3, name).mean(xs)
    monkeypatch.setattr(baselines, "_PIECE_ELEMENTS", 500)
    assert BaselineJob(3, name).mean(xs).tobytes() == whole.tobytes()
    monkeypatch.setattr(pipeline, "chunk_elements", lambda ranks: 1000)
    job = BaselineJob(3, name)
    chunked = job.mean(xs)
    assert len({operation for _, operation in job.network.log if "codes" in operation}) > 1
    if name in UNBIASED:
        # One dither for each chunk, and the first chunk's is that of the whole.
        assert chunked[:1024].tobytes() == whole[:1024].tobytes()
        assert chunked.tobytes() != whole.tobytes()
    else:
        assert chunked.tobytes() == whole.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", METHODS)
def test_nan_or_inf_on_one_rank_reaches_all(name: str, bad: float) -> None:
    job = BaselineJob(3, name)
    xs = gradients(3, 1000)
    xs[1][999] = bad
    block = job.plan.block_for(1000)
    hit = np.arange(1000) // block == 999 // block
    mean = job.mean(xs)
    assert np.all(np.isnan(mean[hit]))
    assert np.all(np.isfinite(mean[~hit]))


@pytest.mark.parametrize("name", METHODS)
def test_zeros_stay_zeros(name: str) -> None:
    x = np.zeros(1000, dtype=np.float32)
    np.testing.assert_array_equal(BaselineJob(3, name).mean([x, -x, x]), 0)


@pytest.mark.parametrize("name", METHODS)
def test_where_all_ranks_hold_their_norm_it_is_exact(name: str) -> None:
    """No lane and no sum overflows."""
    x = np.full(1000, 4.0, dtype=np.float32)
    x[::2] *= -1
    if METHODS[name][0].norm == "max":
        np.testing.assert_array_equal(BaselineJob(4, name).mean([x] * 4), x)


def test_qsgd_needs_one_operation_with_norms_and_codes() -> None:
    job = BaselineJob(2, "QSGD")
    sizes = []
    submit = job.network.submit

    def record(rank: int, kind: str, array: Array, name: str) -> Any:
        sizes.append((kind, array.nbytes))
        return submit(rank, kind, array, name)

    job.network.submit = record  # type: ignore[method-assign]
    job.mean(gradients(2, 1024))
    assert sizes == [("allgather", 1024 + 2 * 4)] * 2


# -------------------------------------------------------------------------------------------- parts


def test_norms_are_rounded_up_to_powers_of_two() -> None:
    largest = float(np.finfo(np.float32).max)
    pairs = [
        *((0.0, 0.0), (1.0, 1.0), (1.0000001, 2.0), (3.0, 4.0), (2.0**127, 2.0**127)),
        *((2.0**-149, 2.0**-126), (2.0**-126, 2.0**-126), (2.0**-130, 2.0**-126)),
        (largest, largest),
    ]
    for norm, expected in pairs:
        task = Job(1, NaturalConfig()).task(0, np.array([norm], dtype=np.float32))
        assert baselines.powers_of_two(task) == float_bits(expected)
    for bad, bits in ((np.inf, INF_BITS), (np.nan, NAN_BITS)):
        task = Job(1, NaturalConfig()).task(0, np.array([bad], dtype=np.float32))
        assert baselines.powers_of_two(task) == bits


@pytest.mark.parametrize("bits", range(2, 17))
def test_nearest_codes_are_those_of_numpy(bits: int) -> None:
    """Whatever the dither: the kernel that packs them has nothing left to round."""
    config = NearestConfig(bits=bits, block_size=64)
    (x,) = gradients(1, 1000)
    job = Job(1, config)
    norms = np.array([np.abs(x[i : i + 64]).max() for i in range(0, 1000, 64)])
    task = job.task(0, x)
    (parcel,) = task.stages.layout.parcels
    payload = baselines.nearest(task, task.stages, parcel, float_bits(norms), "codes.0")
    levels = job.plan.level_count
    expected = np.rint(x.astype(np.float64) * (levels / np.repeat(norms, 64)[:1000].astype(float)))
    np.testing.assert_array_equal(unpack_lanes(payload, bits, 1000), expected)
    np.testing.assert_array_equal(np.abs(expected).max(), levels)


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("config", "options", "kind", "text"),
    [
        (QSGDConfig, {"bits": 17}, ValueError, "QSGD: bits must be between 2 and 16"),
        (QSGDConfig, {"bits": None}, TypeError, "QSGD: bits must be an integer, got None"),
        (QSGDConfig, {"block_size": 33}, ValueError, "QSGD: block_size must be a positive"),
        (QSGDConfig, {"coding": "omega"}, ValueError, "QSGD: coding must be 'fixed' or 'elias'"),
        (QSGDConfig, {"norm": "l1"}, ValueError, "QSGD: norm must be 'max' or 'l2'"),
        (TernGradConfig, {"seed": 1.5}, TypeError, "TernGrad: seed must be an integer"),
        (NaturalConfig, {"min_elements": -1}, ValueError, "NaturalCompression: min_elements must"),
        (NearestConfig, {"bits": 1}, ValueError, "NearestRounding: bits must be between 2 and"),
        (IntSGDConfig, {"scale": "norm"}, ValueError, "IntSGD: scale must be 'update' or 'gradi"),
        (IntSGDConfig, {"beta": 1.0}, ValueError, "IntSGD: beta must be 0 or more and below 1"),
        (IntSGDConfig, {"beta": "0.9"}, TypeError, "IntSGD: beta must be a number, got '0.9'"),
        (IntSGDConfig, {"epsilon": 0}, ValueError, "IntSGD: epsilon must be more than 0, and fin"),
        (PowerSGDConfig, {"rank": 0}, ValueError, "PowerSGD: rank must be 1 or more, got 0; the"),
        (PowerSGDConfig, {"rank": 2.0}, TypeError, "PowerSGD: rank must be an integer, got 2.0"),
        (PowerSGDConfig, {"warm_start": 1}, TypeError, "PowerSGD: warm_start must be True or"),
    ],
)
def test_options_that_cannot_work(
    config: type[Config], options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind) as error:
        config(**options)
    assert str(error.value).startswith(text)


def test_levels_do_not_depend_on_the_number_of_ranks() -> None:
    """Nothing is added in the lanes, so they need no headroom."""
    for world_size in (1, 4, 1000):
        assert QSGDConfig(bits=8).plan(world_size).level_count == 127
        assert QSGDConfig(bits=2).plan(world_size).level_count == 1
        assert TernGradConfig().plan(world_size).level_count == 1
    assert NearestConfig(bits=8).plan(4).level_count == 31


def test_repr_shows_the_options_that_users_choose() -> None:
    from gq_horovod.research import torch_baselines

    for name in torch_baselines.__all__:
        kind = getattr(torch_baselines, name)
        own = kind(min_elements=7)
        assert eval(repr(own), {name: kind}).config == own.config
        assert repr(own).startswith(f"{name}(")
        assert kind.compress.__self__.config == kind.CONFIG()
        assert name == kind.CONFIG.FUNCTION
