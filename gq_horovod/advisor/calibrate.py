"""Measure a cluster with real collectives and kernels, for the performance model.

`gq-horovod calibrate` runs this on every rank. MPI, Horovod and PyTorch are imported when a
measurement begins, so calibration files can be read without them.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ops import codec
from mpi_ops.chunks import CHUNKS_IN_FLIGHT, MINIMUM_CHUNKS
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels.host import Buffer

from ..path.config import Config
from .model import (
    STANDARD,
    TWO_HOP,
    TWO_HOP_MPI,
    WAYS,
    Cluster,
    Efficiency,
    Kernels,
    Method,
    cost,
)

if TYPE_CHECKING:
    from mpi4py import MPI

FORMAT = "gq-horovod calibration"
VERSION = 4  # 4: with the bandwidth inside a host

# Payloads whose share of the bandwidth is measured, large enough that latency is a small part.
PAYLOAD_BYTES = {
    # Gradients without compression come in all sizes, and Horovod fuses them. The largest takes
    # some seconds at 200 Mbit/s.
    "allreduce": (1 << 20, 7 << 20, 48 << 20),
    "gather": (1 << 20, 4 << 20),  # codes of a chunk
    "message": (1 << 17, 1 << 20),  # codes of a chunk, which are smaller there
}
FEW_ROUNDS_BYTES = 16 << 20  # from here on less depends on chance, and each round takes long
STREAM_BYTES = 8 << 20
INNER_BYTES = 8 << 20  # of floats that a rank exchanges with others of its host
KERNEL_ELEMENTS = 4 << 20
SMALL_OPERATIONS = 50
# Of a model whose gradients are compressed.
LAYERS, LAYER_ELEMENTS = 8, 3 << 18

Call = Callable[[], object]


class CalibrationError(ValueError):
    """A calibration file that cannot be used, or a job that cannot be measured."""


# ------------------------------------------------------------------------------------------- files


def save(cluster: Cluster, path: Path) -> None:
    """Write what was measured as JSON."""
    document = {"format": FORMAT, "version": VERSION, "cluster": asdict(cluster)}
    path.write_text(json.dumps(document, indent=2) + "\n")


def load(path: Path) -> Cluster:
    """The cluster of a calibration file. Raises CalibrationError if it is not a valid one."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise _unusable(path, f"it cannot be read ({error.strerror})") from error
    except ValueError as error:  # also of bytes that are no text
        raise _unusable(path, f"it is not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _unusable(path, f'expected an object with "format": "{FORMAT}"')
    if document.get("version") != VERSION:
        raise _unusable(path, f"expected version {VERSION}, got {document.get('version')!r}")
    values = _known(path, "cluster", document.get("cluster"), Cluster)
    kernels = _known(path, "kernels", values.pop("kernels", None), Kernels)
    for name in (f"{way}_efficiency" for way in WAYS):
        if isinstance(values[name], list):  # JSON has no tuples
            values[name] = tuple(
                tuple(pair) if isinstance(pair, list) else pair for pair in values[name]
            )
    try:
        return Cluster(**values, kernels=Kernels(**kernels))
    except (TypeError, ValueError) as error:
        raise _unusable(path, str(error)) from error


def _known(path: Path, name: str, found: object, kind: type[Any]) -> dict[str, Any]:
    """The fields of a dataclass in a file: all of them, and no other."""
    if not isinstance(found, dict):
        raise _unusable(path, f"expected an object {name!r}, got {found!r}")
    expected = {field.name for field in fields(kind)}
    if expected != set(found):
        missing, unknown = sorted(expected - set(found)), sorted(set(found) - expected)
        raise _unusable(path, f"{name!r} lacks {missing} and has {unknown} too much")
    return dict(found)


def _unusable(path: Path, why: str) -> CalibrationError:
    return CalibrationError(
        f"calibration file {path}: {why}; write a new one with `mpirun ... gq-horovod calibrate`."
    )


# ------------------------------------------------------------------------------------- measurement


def measure(comm: MPI.Intracomm, rounds: int = 5) -> tuple[Cluster, bool]:
    """Measure the cluster of `comm`; collective. The same result on every rank.

    What GPUs of a host exchange (NCCL, NVLink) is not measured, as kernels on a GPU are not.

    Returns the cluster, and whether Horovod's operations were measured; where it cannot be
    imported, MPI's are, and what Horovod is needed for keeps its default. Ranks of a single host
    count as hosts of their own, and its loopback as their network.

    Raises:
        CalibrationError: with fewer than two ranks.
    """
    if comm.size < 2:
        raise CalibrationError(
            "gq-horovod calibrate: expected at least 2 ranks, got 1; start it with the mpirun of "
            "your training, such as `mpirun -np 4 --host a,b,c,d gq-horovod calibrate`."
        )
    hosts = Counter(comm.allgather(_host()))
    latency = _latency(comm)
    cluster = Cluster(
        ranks=comm.size,
        ranks_per_host=max(hosts.values()) if len(hosts) > 1 else 1,
        latency=latency,
        message_overhead=_message_overhead(comm, latency),
        bandwidth=_bandwidth(comm, latency, rounds),
    )
    if cluster.hierarchical and set(hosts.values()) == {cluster.ranks_per_host}:
        cluster = replace(cluster, inner_bandwidth=_inner_bandwidth(comm, latency, rounds))
    horovod = _horovod(comm)
    cluster = replace(cluster, kernels=_kernels(comm, horovod is not None, rounds))
    if horovod is not None:
        cluster = _horovod_overheads(comm, horovod, cluster, rounds)
    cluster = _efficiencies(comm, horovod, cluster, rounds)
    if horovod is not None:
        cluster = _overlap(comm, horovod, cluster, rounds)
    return cluster, horovod is not None


def network(comm: MPI.Intracomm, rounds: int = 3) -> tuple[float, float]:
    """Latency in seconds and bandwidth in bits/s. Collective; at least two ranks."""
    latency = _latency(comm)
    return latency, _bandwidth(comm, latency, rounds)


def _host() -> str:
    from mpi4py import MPI

    return MPI.Get_processor_name()


def _seconds(comm: MPI.Intracomm, rounds: int, call: Call) -> float:
    """Median over rounds of a call on all ranks together, until the last one is done."""
    return _in_turns(comm, rounds, call)[0]


def _in_turns(comm: MPI.Intracomm, rounds: int, *calls: Call) -> list[float]:
    """The same of several calls that take turns: other work on the machine hits them all."""
    taken: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):  # the first one makes connections
        for call, seconds in zip(calls, taken, strict=True):
            comm.Barrier()
            begin = time.perf_counter()
            call()
            comm.Barrier()
            if number:
                seconds.append(time.perf_counter() - begin)
    medians: list[float] = comm.bcast([statistics.median(seconds) for seconds in taken])
    return medians


def _latency(comm: MPI.Intracomm, trips: int = 200) -> float:
    """α: 8 bytes from every rank to the one half of the ranks further, all at once.

    The mean, not the median: where ranks wait for a core now and then, so will collectives.
    """
    sent, received = np.zeros(1), np.zeros(1)
    half = comm.size // 2
    to, source = (comm.rank + half) % comm.size, (comm.rank - half) % comm.size
    comm.Barrier()
    begin = time.perf_counter()
    for _ in range(trips):
        comm.Sendrecv(sent, to, recvbuf=received, source=source)
    return float(comm.bcast(time.perf_counter() - begin)) / trips


# The pair that is timed is the first and the last rank: on two hosts, if there are two.


def _message_overhead(comm: MPI.Intracomm, latency: float, burst: int = 200) -> float:
    """o: what a small message adds to others that are in flight with it."""
    from mpi4py import MPI

    message, answer = np.zeros(1), np.zeros(1)
    messages = np.zeros((burst, 1))
    last = comm.size - 1
    taken = []
    for _ in range(10):
        comm.Barrier()
        begin = time.perf_counter()
        if comm.rank == 0:
            MPI.Request.Waitall([comm.Isend(message, last) for _ in range(burst)])
            comm.Recv(answer, last)
        elif comm.rank == last:
            MPI.Request.Waitall([comm.Irecv(row, 0) for row in messages])
            comm.Send(answer, 0)
        taken.append(time.perf_counter() - begin)
    return max(float(comm.bcast(statistics.median(taken))) - 2 * latency, 0.0) / burst


def _bandwidth(comm: MPI.Intracomm, latency: float, rounds: int) -> float:
    """β in bits/s: one large message from the first to the last rank, and a short answer."""
    data, answer = np.zeros(STREAM_BYTES, np.uint8), np.zeros(1)
    last = comm.size - 1

    def stream() -> None:
        if comm.rank == 0:
            comm.Send(data, last)
            comm.Recv(answer, last)
        elif comm.rank == last:
            comm.Recv(data, 0)
            comm.Send(answer, 0)

    return 8 * STREAM_BYTES / max(_seconds(comm, rounds, stream) - 2 * latency, 1e-9)


def _inner_bandwidth(comm: MPI.Intracomm, latency: float, rounds: int) -> float:
    """β_i in bits/s: an Alltoall of MPI's among the ranks of every host, on all hosts at once."""
    host = comm.Split(sorted(set(names := comm.allgather(_host()))).index(names[comm.rank]))
    sent = np.zeros((host.size, INNER_BYTES // 4 // host.size), np.float32)
    received = np.empty_like(sent)
    seconds = _seconds(comm, rounds, lambda: host.Alltoall(sent, received))
    host.Free()
    return 8 * sent[1:].nbytes / max(seconds - latency, 1e-9)


def _horovod(comm: MPI.Intracomm) -> Any:
    """horovod.torch, started; None unless every rank has it and counts ranks as MPI does."""
    try:
        import horovod.torch as horovod
    except ImportError:
        horovod = None
    if not all(comm.allgather(horovod is not None)):
        return None
    horovod.init()
    same = (horovod.rank(), horovod.size()) == (comm.rank, comm.size)
    return horovod if all(comm.allgather(same)) else None


def _kernels(comm: MPI.Intracomm, with_torch: bool, rounds: int) -> Kernels:
    """γ: bytes read and written per second, all ranks at once, as in training."""
    count = KERNEL_ELEMENTS
    x = np.random.default_rng(comm.rank).standard_normal(count, dtype=np.float32)
    y = np.zeros_like(x)
    source, target = Buffer.of(x), Buffer.of(y)
    plan = Config(levels="standard").plan(comm.size)
    random = dither(0, "calibrate", 0, comm.rank, Stage.QUANTIZE, plan.strata)
    norms = codec.norms(source, plan)
    payload = codec.quantize(source, norms, plan, random)
    square = Config(levels="two-hop").plan(comm.size)
    squares = codec.quantize(source, norms, square, random)
    exponential = Config(levels="exponential").plan(comm.size)
    codes = codec.quantize(source, codec.norms(source, exponential), exponential, random)
    share = codec.shard_size(count, exponential)
    pieces = [codes[:share].copy() for _ in range(comm.size)]
    reduced = np.empty_like(pieces[0])
    cast: Call = lambda: x.astype(np.float16).astype(np.float32)  # noqa: E731
    if with_torch:  # as hvd.Compression.fp16 does it
        import torch

        torch.set_num_threads(1)
        tensor = torch.from_numpy(x)
        cast = lambda: tensor.half().float()  # noqa: E731

    def rate(size: int, call: Call) -> float:
        """Mean over rounds and ranks: with more ranks than cores, some calls wait for a core."""
        call()
        comm.Barrier()
        begin = time.perf_counter()
        for _ in range(3 * rounds):
            call()
        taken = (time.perf_counter() - begin) / (3 * rounds)
        return size / statistics.mean(comm.allgather(taken))

    moved = x.nbytes + payload.nbytes
    return Kernels(
        norm=rate(x.nbytes, lambda: codec.norms(source, plan)),
        quantize=rate(moved, lambda: codec.quantize(source, norms, plan, random, out=payload)),
        square=rate(
            x.nbytes + squares.nbytes,
            lambda: codec.quantize(source, norms, square, random, out=squares),
        ),
        reduce=rate(
            reduced.nbytes * (comm.size + 1),
            lambda: codec.reduce(pieces, exponential, random, out=reduced),
        ),
        dequantize=rate(moved, lambda: codec.dequantize(payload, norms, plan, target)),
        cast=rate(3 * x.nbytes, cast),
        sum=rate(3 * x.nbytes, lambda: np.add(x, y, out=y)),
    )


def _horovod_overheads(comm: MPI.Intracomm, horovod: Any, cluster: Cluster, rounds: int) -> Cluster:
    """The cycle from a lone small operation, and the overhead from many in flight together."""
    import torch

    tensors = [torch.zeros(1) for _ in range(SMALL_OPERATIONS)]

    def operations(count: int) -> None:
        handles = [
            horovod.allreduce_async_(tensor, name=f"calibrate.{index}")
            for index, tensor in enumerate(tensors[:count])
        ]
        for handle in handles:
            horovod.synchronize(handle)

    def seconds(count: int) -> float:
        """Mean over ranks and rounds until a rank's own are done: no barrier, itself as slow.

        The mean, because now and then an operation waits for a rank that has no core.
        """
        operations(count)
        taken = 0.0
        for _ in range(4 * rounds):
            comm.Barrier()
            begin = time.perf_counter()
            operations(count)
            taken += time.perf_counter() - begin
        return statistics.mean(comm.allgather(taken / (4 * rounds)))

    lone, many = seconds(1), seconds(SMALL_OPERATIONS)
    overhead = max(many - lone, 0.0) / (SMALL_OPERATIONS - 1)
    cycle = max(lone - overhead - cluster.allreduce(4), 0.0)
    return replace(cluster, cycle_time=cycle, operation_overhead=overhead)


def _efficiencies(comm: MPI.Intracomm, horovod: Any, cluster: Cluster, rounds: int) -> Cluster:
    """Shares of the bandwidth that payloads of some sizes reach."""
    started = 0.0 if horovod is None else cluster.cycle_time + cluster.operation_overhead
    for way, sizes in PAYLOAD_BYTES.items():
        shares = []
        for size in sizes:
            call, operations, modelled = _payload(comm, horovod, way, size)
            seconds = _seconds(comm, rounds if size < FEW_ROUNDS_BYTES else 3, call)
            share = _efficiency(cluster, seconds - operations * started, modelled)
            shares.append((float(size), share))
        cluster = _with(cluster, way, efficiency=tuple(shares))
    return cluster


def _payload(
    comm: MPI.Intracomm, horovod: Any, way: str, size: int
) -> tuple[Call, int, Callable[[Cluster], float]]:
    """An exchange of `size` bytes, how many operations of Horovod it has, and its model."""
    if way == "message":
        call = _message_call(comm, size)
        return call, 0, lambda cluster: MINIMUM_CHUNKS * cluster.both_hops(size)
    reduce, gather = (_mpi_calls if horovod is None else _horovod_calls)(comm, size)
    if way == "allreduce":
        return reduce, 1, lambda cluster: cluster.allreduce(size)
    return gather, 2, lambda cluster: cluster.alltoall(size) + cluster.allgather(size)


def _mpi_calls(comm: MPI.Intracomm, size: int) -> tuple[Call, Call]:
    """MPI's Allreduce of `size` bytes of float32, and Alltoall and Allgather of as many bytes."""
    x, result = np.ones(size // 4, np.float32), np.empty(size // 4, np.float32)
    codes = np.zeros((comm.size, size // comm.size), np.uint8)
    gathered = np.empty_like(codes)

    def gather() -> None:
        comm.Alltoall(codes, gathered)
        comm.Allgather(codes[0], gathered)

    return lambda: comm.Allreduce(x, result), gather


def _horovod_calls(comm: MPI.Intracomm, size: int) -> tuple[Call, Call]:
    """The same by Horovod, which has to be started."""
    import horovod.torch as hvd
    import torch

    share = size // comm.size
    x = torch.ones(size // 4)
    codes = torch.zeros(share * comm.size, dtype=torch.uint8)

    def gather() -> None:
        hvd.alltoall(codes, name="calibrate.alltoall")
        hvd.allgather(codes[:share], name="calibrate.allgather")

    # In place, as an optimizer's gradients: no memory that has not been touched.
    return lambda: hvd.allreduce_(x, name="calibrate.allreduce"), gather


def _message_call(comm: MPI.Intracomm, size: int) -> Call:
    """The messages of mpi_ops.exchange for chunks of `size` bytes, and no computation.

    With chunks in flight together, as there: one after the other they reach a smaller share.
    """
    from mpi_ops.exchange import Steps, allgather, alltoall

    shape = (CHUNKS_IN_FLIGHT, comm.size, size // comm.size)
    here, there = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)

    def chunks(place: int) -> Steps:
        for _ in range(MINIMUM_CHUNKS // CHUNKS_IN_FLIGHT):
            yield from alltoall(comm, 2 * place, here[place], there[place])
            yield from allgather(comm, 2 * place + 1, there[place, comm.rank], here[place])

    def exchange() -> None:
        running = [chunks(place) for place in range(CHUNKS_IN_FLIGHT)]
        while running:
            running = [steps for steps in running if next(steps, steps) is not steps]
            os.sched_yield()  # as mpi_ops.reduction does, for ranks that share a core

    return exchange


def _efficiency(cluster: Cluster, seconds: float, modelled: Callable[[Cluster], float]) -> float:
    """The share of the bandwidth with which the model gives the measured seconds."""
    perfect = replace(
        cluster, allreduce_efficiency=1.0, gather_efficiency=1.0, message_efficiency=1.0
    )
    fixed = modelled(replace(perfect, bandwidth=1e18, inner_bandwidth=1e18))
    wire = modelled(perfect) - fixed
    return min(max(wire / max(seconds - fixed, 1e-9), 0.01), 1.0)


def _overlap(comm: MPI.Intracomm, horovod: Any, cluster: Cluster, rounds: int) -> Cluster:
    """What kernels and communication hide of each other, and computation of both."""
    from ..path import mpi

    methods = {"allreduce": STANDARD, "gather": TWO_HOP}
    if mpi.problem(comm.rank, comm.size) is None:
        methods["message"] = TWO_HOP_MPI
    for way, method in methods.items():
        size = LAYERS * LAYER_ELEMENTS
        seconds = _seconds(comm, rounds, _backward(horovod, method, "one", [size]))
        # The model's seconds are linear in the share, but where it is less than that of a chunk.
        some, all_of_it = (
            cost(method, [size], _with(cluster, way, exposed=share)).seconds for share in (0.75, 1)
        )
        exposed = 1 + (seconds - all_of_it) * 0.25 / (all_of_it - some)

        sizes = [LAYER_ELEMENTS] * LAYERS
        # Half of what would be needed, so that what is seen is not what comes last.
        delay = seconds / 2 / (LAYERS - 1)
        alone, beside = _in_turns(
            *(comm, rounds),
            _backward(horovod, method, "alone", sizes),
            _backward(horovod, method, "beside", sizes, delay),
        )
        hidden = (alone - (beside - LAYERS * delay)) / ((LAYERS - 1) * delay)
        # More than taking turns is no matter of overlap: the network was slower than a moment ago.
        shares = {"exposed": exposed, "hidden": hidden}
        shares = {name: min(max(share, 0.0), 1.0) for name, share in shares.items()}
        cluster = _with(cluster, way, **shares)
    return cluster


def _with(cluster: Cluster, way: str, **values: Efficiency) -> Cluster:
    """The cluster with other values of one way in which codes travel."""
    named: dict[str, Any] = {f"{way}_{name}": value for name, value in values.items()}
    return replace(cluster, **named)


def _backward(
    horovod: Any, method: Method, name: str, sizes: Sequence[int], delay: float = 0.0
) -> Call:
    """A backward pass and the reduction of its gradients, each of which takes `delay` seconds."""
    import torch

    from ..torch import GlobalQSGD
    from .replayed import Layer

    assert method.config is not None
    generator = torch.Generator().manual_seed(horovod.rank())
    gradients = [torch.randn(size, generator=generator) for size in sizes]
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    optimizer = horovod.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.0),
        named_parameters=[
            (f"calibrate.{method.name}.{name}.{index}", parameter)
            for index, parameter in enumerate(parameters)
        ],
        compression=GlobalQSGD(**{**method.config.describe(), "hierarchical": False}),
    )

    def step() -> None:
        optimizer.zero_grad()
        scalar = torch.zeros((), requires_grad=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            scalar = Layer.apply(scalar, parameter, gradient, delay)
        scalar.backward()
        optimizer.synchronize()

    return step
