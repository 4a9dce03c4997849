"""The path of a gradient, with many ranks in one process and a network that delivers at random."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
from reference import DTYPES, Array, Z, allowance, buffer, check_law, exponential_law, standard_law

from gq_horovod.path import pipeline
from gq_horovod.path.config import PAPER_EXPONENTIAL, PAPER_STANDARD, Config
from gq_horovod.path.pipeline import InFlight, Method, Pipeline, Reduced, Task
from gq_horovod.research import theory
from gq_horovod.research.simulation import combine
from mpi_ops.kernels.host import Tensors
from mpi_ops.layout import Parcel

CONFIGS = {
    "standard": Config(levels="standard"),
    "standard of 5 bits": Config(levels="standard", bits=5, block_size=64),
    "standard of the paper": PAPER_STANDARD,
    "standard with l2 norms": Config(norm="l2", bits=16),
    "exponential": PAPER_EXPONENTIAL,
    "exponential of 4 bits": Config(levels="exponential", bits=4, block_size=96),
}


class NetworkError(RuntimeError):
    """What an operation raises after a rank was lost."""


class Network:
    """Matches the operations of `world_size` ranks by name, and completes them in random order.

    An operation is done once every rank has submitted it. Each rank then sees it complete at a
    random one of its polls, independently of the others.
    """

    def __init__(self, world_size: int, seed: int = 0) -> None:
        self.world_size = world_size
        self.failing: set[str] = set()  # names of operations that fail
        self.slow: set[str] = set()  # names of operations that never complete
        self.log: list[tuple[int, str]] = []  # (rank, name) as submitted
        self._waiting: dict[str, dict[int, Operation]] = {}
        self._unfinished: set[tuple[int, str]] = set()
        self._random = np.random.default_rng(seed)
        self._lock = threading.RLock()

    def of(self, rank: int) -> Collectives:
        return Collectives(self, rank)

    def submit(self, rank: int, kind: str, array: Array, name: str) -> Operation:
        with self._lock:
            operation = Operation(self, rank, kind, array, name)
            # Horovod refuses this, too.
            assert (rank, name) not in self._unfinished, f"{name} twice in flight on rank {rank}"
            self._unfinished.add((rank, name))
            self.log.append((rank, name))
            waiting = self._waiting.setdefault(name, {})
            waiting[rank] = operation
            if len(waiting) == self.world_size:
                del self._waiting[name]
                self._run([waiting[rank] for rank in range(self.world_size)])
            return operation

    def _run(self, operations: list[Operation]) -> None:
        kinds = {operation.kind for operation in operations}
        assert len(kinds) == 1, kinds
        (kind,) = kinds
        # As Horovod's, an Allgather takes arrays of several lengths.
        shapes = {
            (operation.array.dtype, operation.array.shape[kind == "allgather" :])
            for operation in operations
        }
        assert len(shapes) == 1, shapes
        results = combine(kind, [operation.array for operation in operations])
        for operation, result in zip(operations, results, strict=True):
            if kind in ("max", "sum"):
                operation.array[...] = result  # in place, as Horovod's allreduce_async_ does
                result = operation.array
            operation.result = result

    def delivered(self, operation: Operation) -> bool:
        with self._lock:
            there = operation.result is not None and operation.name not in self.slow
            return there and self._random.random() < 0.4

    def finish(self, operation: Operation) -> Array:
        with self._lock:
            self._unfinished.remove((operation.rank, operation.name))
            if operation.name in self.failing:
                raise NetworkError(operation.name)
            assert operation.result is not None
            return operation.result


class Operation:
    """A handle: one rank's part in an operation."""

    def __init__(self, network: Network, rank: int, kind: str, array: Array, name: str) -> None:
        self.network, self.rank, self.kind, self.array, self.name = network, rank, kind, array, name
        self.result: Array | None = None
        self._seen = False

    def ready(self) -> bool:
        self._seen = self._seen or self.network.delivered(self)
        return self._seen

    def wait(self) -> Array:
        assert self._seen, "waits for an operation that is not complete"
        return self.network.finish(self)


class Collectives:
    """What the pipeline knows of the network."""

    def __init__(self, network: Network, rank: int) -> None:
        self._submit = lambda *args: network.submit(rank, *args)

    def allreduce_max(self, array: Array, name: str) -> Operation:
        assert array.dtype == np.int32
        return self._submit("max", array, name)

    def allreduce_sum(self, array: Array, name: str) -> Operation:
        return self._submit("sum", array, name)

    def alltoall(self, array: Array, name: str) -> Operation:
        return self._submit("alltoall", array, name)

    def allgather(self, array: Array, name: str) -> Operation:
        return self._submit("allgather", array, name)


class Job:
    """`world_size` ranks with a pipeline each, on one network."""

    def __init__(
        self,
        world_size: int,
        config: Config = CONFIGS["standard"],
        seed: int = 0,
        method: Method | None = None,
    ) -> None:
        self.world_size, self.seed, self.method = world_size, seed, method
        self.network = Network(world_size, seed)
        self.plan = config.plan(world_size)
        self.pipelines = [Pipeline() for _ in range(world_size)]

    def task(self, rank: int, x: Array, name: str = "w", step: int = 0) -> Task:
        return Task(
            name=name,
            keys=(name,),
            counts=(x.size,),
            x=Tensors.of(buffer(x)),
            new_output=lambda: Tensors.of(buffer(np.empty(x.shape, dtype=x.dtype))),
            plan=self.plan,
            collectives=self.network.of(rank),
            rank=rank,
            seed=self.seed,
            steps=np.array([step], dtype=np.uint32),
            method=self.method,
        )

    def submit(self, rank: int, x: Array, name: str = "w", step: int = 0) -> InFlight:
        return self.pipelines[rank].submit(self.task(rank, x, name, step))

    def poll_until(self, done: Callable[[], bool]) -> None:
        """Let all ranks advance in turns."""
        for _ in range(1000):
            if done():
                return
            for own in self.pipelines:
                own.poll()
        raise AssertionError("the pipelines make no progress")

    def reduce(self, inputs: list[dict[str, Array]], step: int = 0) -> list[dict[str, Array]]:
        """The means of named tensors on each rank, submitted in another order by every rank."""
        before = [{name: x.tobytes() for name, x in own.items()} for own in inputs]
        order = np.random.default_rng(self.seed)
        started = [
            {name: self.submit(rank, own[name], name, step) for name in order.permutation([*own])}
            for rank, own in enumerate(inputs)
        ]
        every = [reduction for own in started for reduction in own.values()]
        self.poll_until(lambda: all(reduction.done for reduction in every))
        results = [
            {name: self.pipelines[rank].finish(own[name]).owner for name in inputs[rank]}
            for rank, own in enumerate(started)
        ]
        assert before == [{name: x.tobytes() for name, x in own.items()} for own in inputs]
        assert not any(own._in_flight for own in self.pipelines)
        return results

    def mean(self, xs: list[Array], step: int = 0) -> Array:
        """The mean of one tensor, which has to be the same on every rank."""
        results = [own["w"] for own in self.reduce([{"w": x} for x in xs], step)]
        assert len({result.tobytes() for result in results}) == 1
        return results[0]


def gradients(world_size: int, count: int, dtype: str = "float32", seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=count).astype(DTYPES[dtype]) for _ in range(world_size)]


def global_norms(xs: list[Array], config: Config) -> Array:
    """The global norm of each element's block."""
    count = len(xs[0])
    size = config.plan(len(xs)).block_for(count)
    wide = np.abs(np.stack(xs).astype(np.float64))
    norms = []
    for begin in range(0, count, size):
        block = wide[:, begin : begin + size]
        own = np.sqrt((block**2).sum(axis=1)) if config.norm == "l2" else block.max(axis=1)
        norms.append(own.max())
    return np.repeat(norms, size)[:count]


# ------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("config", CONFIGS)
def test_every_rank_gets_the_same_mean_of_every_tensor(config: str, world_size: int) -> None:
    counts = {"a": 1, "b": 31, "c": 33, "d": 257, "e": 1000, "f": 4097, "empty": 0}
    rng = np.random.default_rng(world_size)
    inputs = [
        {name: rng.normal(size=count).astype(np.float32) for name, count in counts.items()}
        for _ in range(world_size)
    ]
    job = Job(world_size, CONFIGS[config])
    results = job.reduce(inputs)
    if world_size > 1:
        orders = {tuple(name for rank, name in job.network.log if rank == own) for own in (0, 1)}
        assert len(orders) == 2  # the ranks did submit in different orders
    for name in counts:
        assert len({own[name].tobytes() for own in results}) == 1
        mean = np.mean([own[name].astype(np.float64) for own in inputs], axis=0)
        assert results[0][name].shape == mean.shape
        # Wherever rounding takes them, codes of n ranks are each within a level of the truth.
        norm = global_norms([own[name] for own in inputs], CONFIGS[config])
        if job.plan.levels == "standard":
            bound = norm / job.plan.level_count * 1.0001
        else:
            largest = np.mean([np.abs(own[name]) for own in inputs], axis=0)
            bound = 3 * largest + norm * 2.0 ** (3 - 2 ** (job.plan.bits - 1))
        assert np.all(np.abs(results[0][name] - mean) <= bound)


@pytest.mark.parametrize("config", ["standard", "standard of 5 bits", "standard of the paper"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_standard_means_have_the_law_of_theory(config: str, world_size: int) -> None:
    count, steps = 600, 600
    job = Job(world_size, CONFIGS[config])
    xs = gradients(world_size, count)
    norm = global_norms(xs, CONFIGS[config])
    means = np.stack([job.mean(xs, step) for step in range(steps)]) / norm
    laws = [standard_law(x[None] / norm, job.plan.level_count) for x in xs]
    law = sum(laws[1:], laws[0]) * (1 / world_size)
    # Ranks repel each other; the spread of squares is at most that of independent ones.
    shares = theory.standard_share(np.stack(xs) / norm * job.plan.level_count)
    gain = theory.repelled_covariance(shares, job.plan.strata)
    variance = law.variance + gain / (job.plan.level_count * world_size) ** 2
    fourth = law.variance_of_square - 2 * variance**2
    law = dataclasses.replace(law, variance=variance, fourth=fourth)
    check_law(means, law, 2.0**-17 / job.plan.level_count + 5 * 2.0**-24)
    check_total(means, law.mean, law.variance.sum())


def check_total(means: Array, truth: Array, variance: float) -> None:
    """The squared error of a whole step, two-sided; steps are independent."""
    total = ((means - truth) ** 2).sum(axis=1)
    assert abs(total.mean() - variance) <= Z * np.sqrt(total.var() / len(total))


@pytest.mark.parametrize("config", ["exponential", "exponential of 4 bits"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_exponential_means_are_unbiased_with_two_roundings(config: str, world_size: int) -> None:
    """The first on each rank, the second of the mean of all: at most 9/8 of it and 1/8 mean**2."""
    count, steps = 500, 800
    job = Job(world_size, CONFIGS[config])
    xs = gradients(world_size, count)
    norm = global_norms(xs, CONFIGS[config])
    means = np.stack([job.mean(xs, step) for step in range(steps)]) / norm
    laws = [exponential_law(x / norm, job.plan.bits) for x in xs]
    first = sum(laws[1:], laws[0]) * (1 / world_size)
    # Below the smallest level a second rounding adds up to smallest * |mean|.
    smallest = 2.0 ** (2 - 2 ** (job.plan.bits - 1))
    second = (first.variance + first.mean**2) / 8 + smallest * np.abs(first.mean) + smallest**2 / 4
    off = np.abs(means.mean(axis=0) - first.mean)
    width = 2.0 * first.width + np.abs(first.mean) + smallest
    assert np.all(off <= allowance(first.variance + second, width, steps) + 2.0**-20)
    total = ((means - first.mean) ** 2).sum(axis=1)
    spread = Z * np.sqrt(total.var() / steps)
    assert first.variance.sum() - spread <= total.mean() <= (first.variance + second).sum() + spread
    assert total.mean() > 0  # compression loses something


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("count", [3072, 3073, 5000])
def test_a_large_tensor_travels_in_chunks(
    config: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "chunk_elements", lambda ranks: 1000)
    job = Job(3, CONFIGS[config])
    xs = gradients(3, count)
    mean = job.mean(xs)
    size = math.lcm(1024, job.plan.block_size or 1)
    wanted = {f"w.codes.{index}" for index in range(-(-count // size))}
    assert {name for _, name in job.network.log if "codes" in name} == wanted
    # Each chunk is the mean of its part: as if it were a tensor of its own, but for the dither.
    norm = global_norms(xs, CONFIGS[config])
    truth = np.mean([x.astype(np.float64) for x in xs], axis=0)
    if job.plan.levels == "standard":
        assert np.all(np.abs(mean - truth) <= norm / job.plan.level_count * 1.0001)
    for start in range(0, count, size):
        error, part = (mean - truth)[start : start + size], truth[start : start + size]
        assert 0 < np.linalg.norm(error) < np.linalg.norm(part)
    errors = [(mean - truth)[start : start + 1024] for start in (0, size)]
    assert not np.array_equal(*errors)


def test_the_mean_is_not_written_before_it_is_asked_for() -> None:
    """By then the memory may belong to the next step."""
    job = Job(1)
    x = np.ones(100, dtype=np.float32)
    task = dataclasses.replace(job.task(0, x), new_output=lambda: Tensors.of(buffer(x)))
    reduction = job.pipelines[0].submit(task)
    job.poll_until(lambda: reduction.done)
    x[:] = 7
    job.pipelines[0].poll()
    np.testing.assert_array_equal(x, 7)
    assert job.pipelines[0].finish(reduction).owner is x
    np.testing.assert_array_equal(x, 1)


def test_reductions_are_reproducible_and_keyed() -> None:
    """Same seed, step and name: same bytes, whatever the network does. Any other: other dither."""
    xs = gradients(2, 3000)

    def mean(seed: int, step: int, network_seed: int = 0, name: str = "w") -> bytes:
        job = Job(2, seed=seed)
        job.network = Network(2, network_seed)
        results = job.reduce([{name: x} for x in xs], step)
        return bytes(results[0][name].tobytes())

    same = {mean(1, 5, network_seed) for network_seed in range(4)}
    assert len(same) == 1
    assert len({*same, mean(2, 5), mean(1, 6), mean(1, 5, name="v")}) == 4


def test_ranks_quantize_with_different_dither() -> None:
    """Equal gradients half way between two levels: of four ranks always two round up."""
    job = Job(4, Config(levels="standard", bits=5))
    x = np.full(10000, 0.5 / job.plan.level_count, dtype=np.float32)
    x[::256] = 1
    sums = np.unique(np.round(job.mean([x] * 4) * job.plan.level_count * 4))
    assert sums.tolist() == [2, 4 * job.plan.level_count]


def test_ranks_reduce_their_shards_with_different_dither() -> None:
    """Shards have the same positions; their errors must be independent all the same."""
    half = 1 << 15
    x = np.full(2 * half, 0.75, dtype=np.float32)
    x[0] = 1
    mean = Job(2, PAPER_EXPONENTIAL).mean([x, x])
    first, second = (mean - 0.75).reshape(2, half).astype(np.float64)
    variance = np.mean(first**2) * np.mean(second**2)
    assert abs(np.mean(first * second)) <= allowance(variance, 1.0, half)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", ["standard", "exponential"])
def test_every_dtype(config: str, dtype: str) -> None:
    xs = gradients(2, 1000, dtype)
    mean = Job(2, CONFIGS[config]).mean(xs)
    assert mean.dtype == DTYPES[dtype]
    truth = np.mean([x.astype(np.float64) for x in xs], axis=0)
    assert 0 < np.linalg.norm(mean.astype(np.float64) - truth) < np.linalg.norm(truth)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("config", CONFIGS)
def test_nan_or_inf_on_one_rank_reaches_all(config: str, bad: float) -> None:
    count = 1000
    job = Job(3, CONFIGS[config])
    block = job.plan.block_for(count)
    for rank, place in ((0, 0), (2, 999)):
        xs = gradients(3, count)
        xs[rank][place] = bad
        results = job.reduce([{"w": x, "other": gradients(1, 100)[0]} for x in xs])
        hit = np.arange(count) // block == place // block
        for own in results:
            assert np.all(np.isnan(own["w"][hit]))
            assert np.all(np.isfinite(own["w"][~hit]))
            assert np.all(np.isfinite(own["other"]))


def test_zeros_stay_zeros() -> None:
    for config in CONFIGS.values():
        x = np.zeros(1000, dtype=np.float32)
        np.testing.assert_array_equal(Job(3, config).mean([x, -x, x]), 0)


def test_a_method_without_rounding_passes_exactly() -> None:
    """Whatever differs from the plain mean is the quantizers' doing, not the path's."""

    def values(task: Task, tensors: Tensors) -> Array:
        own = task.buffer(tensors)
        return np.ctypeslib.as_array((ctypes.c_float * own.size).from_address(own.pointer))

    def quantize(task: Task, *_: Any) -> Array:
        return values(task, task.x).astype(np.int32)

    def decode(task: Task, _: Parcel, reduced: Reduced, out: Tensors) -> None:
        values(task, out)[...] = reduced.payload / task.plan.world_size

    exact = Method(partial(pipeline.standard, quantize=quantize), decode)
    for world_size in (1, 2, 8):
        rng = np.random.default_rng(world_size)
        inputs = [
            {name: rng.integers(-100, 100, 500).astype(np.float32) for name in "abcde"}
            for _ in range(world_size)
        ]
        for own in Job(world_size, method=exact).reduce(inputs):
            for name in "abcde":
                truth = np.mean([x[name] for x in inputs], axis=0, dtype=np.float64)
                np.testing.assert_array_equal(own[name], truth.astype(np.float32))


# ---------------------------------------------------------------------------------------- in flight


def test_submitting_waits_for_nothing() -> None:
    """With the other rank silent every tensor's norms go out, and nothing else does."""
    job = Job(2)
    names = [f"layer{index}" for index in range(20)]
    x = np.ones(100, dtype=np.float32)
    for name in names:
        assert not job.submit(0, x, name).done
    assert job.network.log == [(0, f"{name}.norm") for name in names]
    # Once the other rank has arrived, later submissions advance the earlier tensors.
    for name in names:
        job.submit(1, x, name)
    for index in range(40):
        job.submit(0, x, f"more{index}")
    sent = {name for rank, name in job.network.log if rank == 0}
    assert {f"{name}.codes.0" for name in names} <= sent


class Writing:
    """An accelerator that computes a tensor."""

    def __init__(self, x: Array) -> None:
        self.x, self._values = x, x.copy()
        self.done = False
        self.x[:] = np.nan  # nobody may look at it before

    def complete(self) -> None:
        self.x[:] = self._values
        self.done = True

    def ready(self) -> bool:
        return self.done

    def wait(self) -> None:
        assert self.done


@pytest.mark.parametrize("config", CONFIGS)
def test_nobody_reads_or_waits_for_a_tensor_that_is_being_written(config: str) -> None:
    xs = gradients(2, 1000)
    expected = Job(2, CONFIGS[config]).mean(xs)
    job = Job(2, CONFIGS[config])
    writing = [Writing(x) for x in xs]
    writing[0].complete()  # this rank's accelerator was done when it was asked for
    started = []
    for rank, own in enumerate(writing):
        task = dataclasses.replace(job.task(rank, own.x), written=own)
        started.append(job.pipelines[rank].submit(task))
    assert job.network.log == [(0, "w.norm")]
    others = [job.submit(rank, x, "other") for rank, x in enumerate(gradients(2, 1000))]
    job.poll_until(lambda: all(other.done for other in others))  # they pass it
    assert [name for _, name in job.network.log if name.startswith("w.")] == ["w.norm"]
    writing[1].complete()
    job.poll_until(lambda: all(reduction.done for reduction in started))
    for rank, reduction in enumerate(started):
        assert job.pipelines[rank].finish(reduction).owner.tobytes() == expected.tobytes()


def test_tensors_that_are_being_written_are_in_nobodys_way() -> None:
    """A host is many layers ahead of its GPU: norms that have arrived are used all the same."""
    job = Job(1)
    job.network.slow = {"first.norm"}  # until the others are there
    first = job.submit(0, gradients(1, 100)[0], "first")
    writing = [Writing(x) for x in gradients(10, 100)]
    for index, own in enumerate(writing):
        task = dataclasses.replace(job.task(0, own.x, f"late.{index}"), written=own)
        job.pipelines[0].submit(task)
    job.network.slow.clear()
    for _ in range(100):
        job.pipelines[0].poll(pipeline._PATIENCE)
    assert first.done
    assert not any("late" in name for _, name in job.network.log)
    # They begin in order, and some that are written wait for one before them that is not.
    for index in (0, 1, 3):
        writing[index].complete()
    job.pipelines[0].poll(pipeline._PATIENCE)
    begun = {name for _, name in job.network.log if "late" in name and name.endswith("norm")}
    assert begun == {"late.0.norm", "late.1.norm"}
    job.pipelines[0].poll()  # everything
    assert "late.3.norm" in {name for _, name in job.network.log}


def test_one_device_does_not_hold_back_the_tensors_of_another() -> None:
    """A process may have a model on several GPUs; each writes its own in order."""
    job = Job(1)
    writing = [Writing(x) for x in gradients(4, 100)]
    for index, own in enumerate(writing):
        task = job.task(0, own.x, f"late.{index}")
        there = task.x._replace(stream=f"of device {index % 2}")
        job.pipelines[0].submit(dataclasses.replace(task, x=there, written=own))
    for index in (1, 2):
        writing[index].complete()
    job.pipelines[0].poll(pipeline._PATIENCE)
    # The second device's first one; that of the first device is not written yet.
    assert [name for _, name in job.network.log] == ["late.1.norm"]


def test_finishing_one_tensor_advances_the_others() -> None:
    job = Job(1)
    x = np.ones(100, dtype=np.float32)
    first, last = job.submit(0, x, "first"), job.submit(0, x, "last")
    for index in range(20):
        job.submit(0, x, f"other{index}")
    np.testing.assert_array_equal(job.pipelines[0].finish(last).owner, 1)
    assert len([name for _, name in job.network.log if name.endswith(".codes.0")]) > 1
    np.testing.assert_array_equal(job.pipelines[0].finish(first).owner, 1)
    assert len(job.pipelines[0]._in_flight) == 20


def test_a_hook_asks_about_few_of_many_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of tensors whose hooks ask about each other would take a millisecond each."""
    job = Job(2)  # of which the other rank never comes
    x = np.ones(100, dtype=np.float32)
    for index in range(100):
        job.submit(0, x, f"layer{index}")
    asked = []
    monkeypatch.setattr(Operation, "ready", lambda self: asked.append(self.name))
    job.submit(0, x, "last")
    assert 0 < len(asked) <= pipeline._PATIENCE


def test_those_behind_many_that_never_complete_go_on() -> None:
    """Each rank waits for another one of two tensors, and has to advance the other one for that."""
    job = Job(2)
    x = np.ones(100, dtype=np.float32)
    stuck = [f"layer{index}" for index in range(50)]
    job.network.slow = {f"{name}.norm" for name in stuck}
    started = [{name: job.submit(rank, x, name) for name in [*stuck, "a", "b"]} for rank in (0, 1)]

    def rank_main(rank: int) -> None:
        for name in ("ab", "ba")[rank]:
            np.testing.assert_array_equal(job.pipelines[rank].finish(started[rank][name]).owner, 1)

    on_threads(2, rank_main)


def on_threads(world_size: int, rank_main: Callable[[int], Any]) -> list[Any]:
    """Run the ranks at the same time, each blocking where it wants."""
    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(rank_main, rank) for rank in range(world_size)]
        return [future.result(30) for future in futures]


@pytest.mark.parametrize("config", ["standard", "exponential"])
def test_finish_blocks_until_every_rank_is_there(config: str) -> None:
    job = Job(3, CONFIGS[config])
    xs = gradients(3, 500)

    def rank_main(rank: int) -> list[bytes]:
        names = [f"layer{index}" for index in range(6)]
        order = np.random.default_rng(rank).permutation(names)
        started = {name: job.submit(rank, xs[rank], name) for name in order}
        return [job.pipelines[rank].finish(started[name]).owner.tobytes() for name in names]

    results = on_threads(3, rank_main)
    assert results[0] == results[1] == results[2]
    assert len(set(results[0])) == 6  # each tensor has its own dither


@pytest.mark.parametrize("config", ["standard", "exponential"])
def test_a_reduction_that_nobody_asked_for_is_finished_first(config: str) -> None:
    """Two operations of one name cannot be in flight; every rank finishes the old one."""
    job = Job(3, CONFIGS[config])
    old, new = gradients(3, 500, seed=1), gradients(3, 500, seed=2)

    def rank_main(rank: int) -> tuple[bytes, bytes]:
        abandoned = job.submit(rank, old[rank], step=0)
        started = job.submit(rank, new[rank], step=1)
        assert abandoned.done
        finished = job.pipelines[rank].finish(started)
        assert not job.pipelines[rank]._in_flight
        return abandoned.decode().owner.tobytes(), finished.owner.tobytes()

    (result,) = set(on_threads(3, rank_main))
    again = Job(3, CONFIGS[config])
    assert result == (again.mean(old, 0).tobytes(), again.mean(new, 1).tobytes())


@pytest.mark.parametrize("stage", ["norm", "codes.0", "mean.0"])
def test_a_failed_operation_fails_its_own_tensor(stage: str) -> None:
    """Whichever is asked for first; another one is not to blame."""
    job = Job(1, CONFIGS["exponential"])
    x = np.ones(100, dtype=np.float32)
    job.network.failing.add(f"failing.{stage}")
    started = {name: job.submit(0, x, name) for name in ("before", "failing", "after", "last")}
    for index in range(50):  # submitting does not meet the error
        job.submit(0, x, f"other{index}")
    np.testing.assert_array_equal(job.pipelines[0].finish(started["before"]).owner, 1)
    np.testing.assert_array_equal(job.pipelines[0].finish(started["after"]).owner, 1)
    with pytest.raises(NetworkError, match=f"^failing.{stage}$"):
        job.pipelines[0].finish(started["failing"])
    assert not job.pipelines[0]._in_flight
    # The next job, on a new network, starts from nothing.
    job.network = Network(1)
    np.testing.assert_array_equal(job.mean([x]), 1)


def test_a_failed_reduction_that_nobody_asked_for_is_forgotten() -> None:
    job = Job(1)
    x = np.ones(100, dtype=np.float32)
    job.network.failing.add("layer.norm")
    job.submit(0, x, "layer")
    job.network = Network(1)
    np.testing.assert_array_equal(job.pipelines[0].finish(job.submit(0, x, "layer")).owner, 1)


def test_what_was_given_up_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Horovod's optimizer may ask for the other tensors of a failed step later."""
    job = Job(1)
    x = np.ones(100, dtype=np.float32)
    failing, other = job.submit(0, x, "failing"), job.submit(0, x, "other")
    job.network.failing.add("failing.norm")
    job.network.slow.add("other.norm")
    with pytest.raises(NetworkError):
        job.pipelines[0].finish(failing)

    class WaitsForEver(BaseException):
        """Instead of sleeping: nothing is in flight that could wake it."""

    def sleep(seconds: float) -> None:
        raise WaitsForEver

    monkeypatch.setattr(pipeline.time, "sleep", sleep)
    with pytest.raises(Exception, match="other"):
        job.pipelines[0].finish(other)


def test_a_pipeline_that_is_closed_takes_nothing_more() -> None:
    """What is done already can be had; all others name the reason."""
    job = Job(1)
    x = np.ones(100, dtype=np.float32)
    done, other = job.submit(0, x, "done"), job.submit(0, x, "other")
    job.network.slow.add("other.norm")
    job.poll_until(lambda: done.done)
    job.pipelines[0].close("the set was removed")
    np.testing.assert_array_equal(job.pipelines[0].finish(done).owner, 1)
    with pytest.raises(RuntimeError, match=r"other.*because the set was removed"):
        job.pipelines[0].finish(other)
    with pytest.raises(RuntimeError, match=r"next.*because the set was removed"):
        job.submit(0, x, "next")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_stops_a_reduction_on_one_rank_alone(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for its codes, so that nothing after it would ever be complete."""
    job = Job(2)
    xs = gradients(2, 500)
    started = [job.submit(rank, x) for rank, x in enumerate(xs)]

    def stop(*arguments: Any, **options: Any) -> Any:
        raise kind("of a test")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline.codec, "quantize_parcel", stop)
        with pytest.raises(kind, match="of a test"):
            job.pipelines[0].finish(started[0])
    text = f"stopped on this rank by {kind.__name__}: of a test"
    for name in ("w", "another"):
        with pytest.raises(RuntimeError, match=f"'{name}' cannot be reduced.*{text}"):
            job.submit(0, xs[0], name)
    if kind is not MemoryError:
        with pytest.raises(RuntimeError, match=text):
            job.pipelines[0].finish(started[0])


def test_an_output_that_cannot_be_allocated_is_an_error() -> None:
    """What is in flight with it is given up."""
    job = Job(1)
    task = job.task(0, np.ones(100, dtype=np.float32))

    def no_memory() -> Any:
        raise MemoryError("no memory for the mean")

    failed = job.pipelines[0].submit(dataclasses.replace(task, new_output=no_memory))
    with pytest.raises(MemoryError, match="no memory for the mean"):
        job.pipelines[0].finish(failed)
    assert not job.pipelines[0]._in_flight
