"""GlobalQSGD with tensors on a GPU, which is emulated: see fake_cupy and fake_gpu."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cupy
import fake_gpu
import horovod.torch as hvd
import pytest
import torch
from fake_gpu import as_numpy, on_gpu, plain
from helpers import TRANSPORT, check_replicas, gradients, ranks_per_node
from horovod.torch import mpi_ops as hvd_ops

from gq_horovod import log
from gq_horovod import torch as plugin
from gq_horovod.path import pipeline
from gq_horovod.path.config import DEFAULT_MIN_ELEMENTS
from gq_horovod.torch import buckets, gpus, numbering, tensors
from gq_horovod.torch.collectives import Written, written

LEVELS = ["standard", "exponential", "two-hop"]
BLOCK_SIZES = [(levels, "auto") for levels in LEVELS]
BLOCK_SIZES += [("standard", "bucket"), ("exponential", "bucket")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture
def gpu(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with fake_gpu.installed(directory, monkeypatch) as device:
        yield device


class _Event:
    """What a GPU still has to do to a tensor: it is done the third time that somebody asks."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._values = plain(tensor), plain(tensor).clone()
        self._asked = 0
        self._tensor.fill_(torch.nan)  # nobody may look at it before

    def query(self) -> bool:
        self._asked += 1
        if self._asked == 3:
            self._tensor.copy_(self._values)
        return self._asked >= 3

    def come(self) -> None:
        """Another stream of the GPU has waited for it."""
        self._asked = 2
        self.query()

    def synchronize(self) -> None:
        assert self._asked >= 3, "a hook waits for the GPU"


@pytest.fixture(params=["staged", "resident"])
def resident(request: pytest.FixtureRequest, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether Horovod has NCCL, so that codes stay on the GPU."""
    if request.param == "resident" and TRANSPORT == "mpi":
        pytest.skip("messages are made in host memory")
    monkeypatch.setattr(hvd, "nccl_built", lambda: int(request.param == "resident"))
    return bool(request.param == "resident")


FLAGS = 64  # bytes, which say what is there; norms and codes are more


def _require_residence(resident: bool) -> None:
    """No norms and no codes have come to the host; or norms, codes and shares have."""
    assert fake_gpu.crossings == []
    large = [size for size in fake_cupy.downloads if size > FLAGS]
    assert bool(large) != resident, large


def by_nodes() -> bool:
    """Whether this job's ranks are on several nodes with several ranks each."""
    return ranks_per_node(plugin.GlobalQSGD(), hvd.size()) > 1


KERNELS = {
    "standard": {"gq_absmax", "gq_quantize_standard_4", "gq_dequantize_standard"},
    "exponential": {
        *("gq_absmax", "gq_quantize_exponential", "gq_dequantize_exponential"),
        "gq_reduce_exponential",
    },
    "two-hop": {
        *("gq_absmax", "gq_quantize_standard_4_square", "gq_dequantize_standard"),
        "gq_mean_standard_4",
    },
}


@pytest.mark.parametrize("levels", LEVELS)
def test_the_same_bytes_as_in_host_memory(
    levels: Any, resident: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = gradients((7, 1003), tag=19)
    own = inputs[hvd.rank()]

    def mean(tensor: torch.Tensor) -> torch.Tensor:
        compression = plugin.GlobalQSGD(levels=levels, transport=TRANSPORT)
        return plugin.allreduce(tensor, name, compression=compression)

    expected = mean(own)
    monkeypatch.setattr(buckets, "written", lambda values: Written(_Event(values)))
    launches = fake_cupy.Module.launches
    launches.clear()
    result = mean(on_gpu(own))
    streams = {stream for *_, stream in launches}
    if TRANSPORT == "horovod":
        nodes = {"gq_pack", "gq_add", "gq_unpack"} if by_nodes() else set()
        assert {kernel for kernel, *_ in launches} == KERNELS[levels] | nodes
    _require_residence(resident)
    assert len(streams) == 1
    assert fake_cupy.DEFAULT_STREAM not in streams
    assert torch.equal(plain(result), expected)
    check_replicas(plain(result))


@pytest.mark.parametrize(("levels", "bits"), [("standard", 4), ("two-hop", 3)])
def test_residuals_lie_where_gradients_do(
    levels: Any, bits: int, resident: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are added and computed there, in order, and never waited for."""
    monkeypatch.setattr(
        buckets, "written", lambda own: Written(_Event(own)) if own.is_cuda else None
    )
    monkeypatch.setattr(pipeline, "chunk_elements", lambda ranks: 2048 * ranks)
    options: dict[str, Any] = {"levels": levels, "bits": bits, "error_feedback": True}
    host, device = (plugin.GlobalQSGD(transport=TRANSPORT, **options) for _ in range(2))
    for step in range(4):
        own = gradients((7, 1003), tag=step)[hvd.rank()]
        if step == 2 and hvd.rank() == 0:
            own[3, 3] = torch.inf
        expected = plugin.allreduce(own, name, compression=host)
        given = on_gpu(own.clone())
        result = plugin.allreduce(given, name, compression=device)
        assert result.is_cuda
        assert torch.equal(plain(result).nan_to_num(), expected.nan_to_num())
        assert torch.equal(plain(given), own)  # not modified
        if step != 2:  # its norms are looked at for the log
            _require_residence(resident)
        kept, there = (_residual(compression, name) for compression in (host, device))
        assert there.is_cuda
        torch.cuda.current_stream().wait_stream(gpus.kernel_stream(fake_gpu.GPU))
        assert torch.equal(plain(there), kept)
        assert bool(kept.any()) == (step != 2)
        if step == 0:  # as files have them, they are in host memory
            state = device.state_dict()
            device.load_state_dict(state)
            (saved,) = (own["residuals"] for own in state["process_sets"].values())
            assert torch.equal(saved[name], kept)
            assert saved[name].is_cpu
        fake_gpu.crossings.clear()
        fake_cupy.downloads.clear()


def _residual(compression: Any, name: str) -> torch.Tensor:
    (group,) = compression._groups.values()
    residual: torch.Tensor = group.residuals[name]
    return residual


@pytest.mark.parametrize(
    ("levels", "block_size"),
    BLOCK_SIZES,
)
def test_buckets_of_several_steps(
    levels: Any, block_size: Any, resident: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several chunks and parcels; memory that is used again; a rank that lacks a gradient."""
    monkeypatch.setattr(pipeline, "chunk_elements", lambda ranks: 8192)
    shapes = [(70, 100), (20_000,), (5000,), (64, 64), (9001,)]

    def train(there: Any) -> list[torch.Tensor]:
        parameters = [torch.nn.Parameter(there(torch.zeros(shape))) for shape in shapes]
        named = [(f"{name}.{number}", one) for number, one in enumerate(parameters)]
        compression = plugin.GlobalQSGD(
            levels=levels, block_size=block_size, bucket_bytes=60_000, transport=TRANSPORT
        )
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(parameters, lr=1.0), named, compression=compression
        )
        results = []
        for step in range(3):
            for place, (parameter, shape) in enumerate(zip(parameters, shapes, strict=True)):
                parameter.grad = there(gradients(shape, tag=10 * step + place)[hvd.rank()])
                if place == 2 and step and hvd.rank() == 0:
                    parameter.grad.zero_()  # handed over by synchronize()
                    continue
                optimizer._handles[parameter] = optimizer._allreduce_grad_async(parameter)
            optimizer.synchronize()
            results += [plain(one.grad).clone() for one in parameters]
        return results

    expected = train(torch.clone)
    # Messages wait for their codes, which the kernels' stream has made soon after the norms came.
    monkeypatch.setattr(fake_cupy.Event, "waits_allowed", TRANSPORT == "mpi")
    got = train(on_gpu)
    _require_residence(resident)
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one, other)
        check_replicas(other)


HOST = torch.device("cpu")
DEVICES = [fake_gpu.GPU, fake_gpu.SECOND]


def trained(
    name: str,
    compression: Any,
    shapes: list[tuple[int, ...]],
    places: list[torch.device],
    dtype: torch.dtype = torch.float32,
    spoilt: float | None = None,
) -> list[torch.Tensor]:
    """Reduced gradients of two steps of an optimizer, whose parameters lie at these places.

    `spoilt` is an element of the last rank's first gradient in the first step.
    """
    options = {place: {} if place == HOST else {"device": place} for place in places}
    move = [(on_gpu if options[place] else torch.clone) for place in places]
    parameters = [
        torch.nn.Parameter(there(torch.zeros(shape, dtype=dtype), **options[place]))
        for there, place, shape in zip(move, places, shapes, strict=True)
    ]
    named = [(f"{name}.{number}", one) for number, one in enumerate(parameters)]
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=1.0), named, compression=compression
    )
    results = []
    for step in range(2):
        for number, (parameter, place) in enumerate(zip(parameters, places, strict=True)):
            own = gradients(parameter.shape, tag=10 * step + number, dtype=dtype)[hvd.rank()]
            if spoilt is not None and (step, number, hvd.rank()) == (0, 0, hvd.size() - 1):
                own.view(-1)[7] = spoilt
            parameter.grad = move[number](own, **options[place])
            optimizer._handles[parameter] = optimizer._allreduce_grad_async(parameter)
        optimizer.synchronize()
        assert [own.grad.device for own in parameters] == places
        results += [plain(own.grad).clone() for own in parameters]
    return results


OPTIONS: dict[str, dict[str, Any]] = {
    "the default": {},
    # Lanes whose radix is no power of two.
    **{f"{bits} bits": {"bits": bits} for bits in (3, 5, 6)},
    "rules": {"rules": {"*.0": {"bits": 4, "block_size": 64}, "*.1": {"levels": "standard"}}},
    "L2 norms": {"norm": "l2", "block_size": 256},
    "small chunks": {"bucket_bytes": 30_000},
    "error feedback": {"bits": 3, "error_feedback": True},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_give_the_same_bytes(
    option: str, resident: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "chunk_elements", lambda ranks: 4096 * ranks)
    shapes = [(70, 100), (5000,), (9001,)]
    host, device = (plugin.GlobalQSGD(transport=TRANSPORT, **OPTIONS[option]) for _ in range(2))
    expected = trained(name, host, shapes, [HOST] * len(shapes))
    got = trained(name, device, shapes, [fake_gpu.GPU] * len(shapes))
    _require_residence(resident)
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one, other)
        check_replicas(other)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float16, torch.inf), (torch.bfloat16, torch.nan), (torch.float64, torch.inf)],
)
def test_an_overflow_of_one_rank_reaches_the_loss_scalers_of_all(
    dtype: torch.dtype, value: float, name: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each looks at its own rank's gradients, and leaves the step out or does not."""
    shapes = [(70, 100), (5000,)]
    host, device = (plugin.GlobalQSGD(transport=TRANSPORT) for _ in range(2))
    expected = trained(name, host, shapes, [HOST] * 2, dtype, spoilt=value)
    kinds = ("float32", str(dtype).removeprefix("torch."))
    with fake_gpu.installed(directory, monkeypatch, kinds):
        got = trained(name, device, shapes, [fake_gpu.GPU] * 2, dtype, spoilt=value)
        assert fake_gpu.crossings == []
    assert [bool(own.isfinite().all()) for own in got] == [False, True, True, True]
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one.nan_to_num(8.0), other.nan_to_num(8.0))
        check_replicas(other)


@pytest.mark.parametrize("levels", ["standard", "two-hop"])
def test_an_optimizer_of_parameters_on_two_gpus(levels: Any, resident: bool, name: str) -> None:
    """Buckets of a device each, whose kernels run there on a stream of their own."""
    shapes = [(70, 100), (5000,), (9001,), (30,)] * 2

    def train(places: list[torch.device]) -> list[torch.Tensor]:
        compression = plugin.GlobalQSGD(levels=levels, transport=TRANSPORT)
        return trained(name, compression, shapes, places)

    expected = train([HOST] * len(shapes))
    fake_cupy.Module.launches.clear()
    got = train([device for device in DEVICES for _ in shapes[::2]])
    _require_residence(resident)
    streams = {stream for *_, stream in fake_cupy.Module.launches}
    assert {stream.device for stream in streams} == {0, 1}
    assert len(streams) == 2
    for one, other in zip(expected, got, strict=True):
        if one.numel() < DEFAULT_MIN_ELEMENTS:
            torch.testing.assert_close(other, one)  # Horovod adds these in any order
        else:
            assert torch.equal(one, other)
        check_replicas(other)


# Kernels that a bucket launches, and how often the host waits for the GPU, where codes pass through
# host memory: for norms, codes, and what of the mean this rank has reduced.
COSTS = {"standard": (3, 2), "exponential": (4, 3), "two-hop": (6, 3)}


@pytest.mark.parametrize(
    ("levels", "block_size", "count", "moving"),
    # Either number of tensors with either kind of addresses, and either kind of norms.
    [
        (levels, block_size, count, place % 2 == (count > 2))
        for place, (levels, block_size) in enumerate(BLOCK_SIZES)
        for count in (2, 105)
    ],
)
def test_what_a_bucket_costs_however_many_tensors_it_has(
    levels: Any,
    block_size: Any,
    count: int,
    moving: bool,
    resident: bool,
    gpu: Any,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Launches, waits, copies and memory; `moving`: gradients have new addresses in every step."""
    if TRANSPORT == "mpi":
        pytest.skip("messages are made in host memory")
    if by_nodes():
        pytest.skip("a bucket has a share, and float32 inside nodes")
    monkeypatch.setattr(fake_cupy.Event, "waits_allowed", False)
    elements = 21_000 // count
    parameters = [torch.nn.Parameter(on_gpu(torch.zeros(elements))) for _ in range(count)]
    named = [(f"{name}.{number}", one) for number, one in enumerate(parameters)]
    compression = plugin.GlobalQSGD(
        levels=levels, block_size=block_size, min_elements=0, transport=TRANSPORT
    )
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=1.0), named, compression=compression
    )
    kept = [on_gpu(torch.zeros(elements)) for _ in parameters]
    for step in range(2):  # the first one agrees
        fake_cupy.clear_counts()
        for place, parameter in enumerate(parameters):
            own = gradients((elements,), tag=10 * step + place)[hvd.rank()]
            parameter.grad = on_gpu(own) if moving else kept[place]
            plain(parameter.grad).copy_(own)
            optimizer._handles[parameter] = optimizer._allreduce_grad_async(parameter)
        optimizer.synchronize()
        kept += [one.grad for one in parameters]  # so that addresses are new ones
    launches, waits = COSTS[levels]
    looks = int(resident)  # at the largest norm, for the log
    looks += block_size == "bucket"  # and for all tensors
    assert len(fake_cupy.Module.launches) == launches + looks
    assert len(fake_cupy.waits) == (1 if resident else waits)
    # Of addresses that are new here: of gradients; of means that are rounded again (a pool would
    # hand out the same memory); of what an Alltoall has given.
    tables = 3 * moving + 2 * (levels == "two-hop") + (resident and levels != "standard")
    # Norms, codes and shares, or the flags that go beside norms.
    assert len(fake_cupy.uploads) == (1 if resident else waits) + tables
    assert len(fake_cupy.downloads) == (2 if resident else waits)
    # A table takes memory on the device and pinned. Two-hop: the means that are rounded again, and
    # the norms of a share that ends behind the tensors, which are copied before zeros.
    means = len(fake_cupy.allocations) - 2 * tables
    assert means in ((1, 2) if levels == "two-hop" else (0,))
    behind = means - 1 if levels == "two-hop" else 0
    spread = 1 + (count - 1).bit_length() if block_size == "bucket" else 0
    assert len(fake_cupy.copies) == spread + behind
    # Norms of blocks of more than a piece, before their largest elements are found; and what of a
    # share of exponential levels lies behind the tensors, if nothing does, too.
    whole = compression.config.plan(hvd.size()).block_size is None
    pieces = int(whole and elements > gpu.PIECE)
    assert len(fake_cupy.memsets) == pieces + behind + (levels == "exponential")


@pytest.mark.parametrize("levels", LEVELS)
def test_what_is_not_finite_reaches_every_rank_and_is_named(
    levels: Any,
    resident: bool,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = gradients((6000,), tag=4)[hvd.rank()]
    if hvd.rank() == hvd.size() - 1:
        own[300] = torch.inf
    compression = plugin.GlobalQSGD(levels=levels, block_size=256, transport=TRANSPORT)
    expected = plugin.allreduce(own, name, compression=compression)
    monkeypatch.setattr(pipeline, "_not_finite", log.Rarely())
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        result = plain(plugin.allreduce(on_gpu(own), f"{name}.gpu", compression=compression))
    assert torch.isnan(result[256:512]).all()
    assert torch.isfinite(result[:256]).all()
    assert torch.equal(result.isnan(), expected.isnan())
    said = [one for one in caplog.records if getattr(one, "event", "") == "not-finite"]
    named = [one.fields["tensor"] for one in said]
    assert set(named) <= {f"{name}.gpu"}
    if by_nodes():  # by the rank of its node that has the share
        total = hvd.allreduce(torch.tensor([float(len(named))]), name=f"{name}.named", op=hvd.Sum)
        assert total.item() == 1
    else:
        assert bool(named) == (hvd.rank() == hvd.size() - 1)


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize(
    ("levels", "unable"), [("standard", 0), ("exponential", 1), ("two-hop", 0)]
)
def test_ranks_agree_whether_codes_stay(
    levels: Any,
    unable: int,
    name: str,
    gpu: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where one rank's cannot, those of all ranks pass through host memory."""
    own = gradients((6000,), tag=4)[hvd.rank()]
    compression = plugin.GlobalQSGD(levels=levels, transport=TRANSPORT)
    expected = plugin.allreduce(own, name, compression=compression)
    if hvd.rank() == unable:
        monkeypatch.setenv(gpus.VARIABLE, "0")
    compression = plugin.GlobalQSGD(levels=levels, transport=TRANSPORT)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        result = plugin.allreduce(on_gpu(own), name, compression=compression)
    _require_residence(resident=False)
    assert torch.equal(plain(result), expected)
    said = [own for own in caplog.records if getattr(own, "event", "") == "gpu"]
    assert len(said) == int(hvd.rank() == 0 != unable and TRANSPORT == "horovod")
    assert all("gq-horovod doctor" in own.getMessage() for own in said)


@pytest.mark.parametrize(
    ("variables", "hosts", "mpi", "stay"),
    [
        ({"HOROVOD_AUTOTUNE": "1"}, 1, True, False),
        ({"HOROVOD_AUTOTUNE": "1"}, 2, False, True),
        ({"HOROVOD_AUTOTUNE": "1", "HOROVOD_HIERARCHICAL_ALLGATHER": "0"}, 2, True, True),
        ({"HOROVOD_HIERARCHICAL_ALLGATHER": "1"}, 2, True, False),
        ({"HOROVOD_HIERARCHICAL_ALLGATHER": "1"}, 1, True, True),
    ],
)
def test_codes_leave_the_gpu_where_horovod_would_read_them_as_host_memory(
    variables: dict[str, str],
    hosts: int,
    mpi: bool,
    stay: bool,
    name: str,
    gpu: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """MPI's hierarchical Allgather comes before NCCL's, and takes tensors of any device."""
    if TRANSPORT == "mpi" and not mpi:
        pytest.skip("messages need it")
    own = gradients((6000,), tag=4)[hvd.rank()]
    compression = plugin.GlobalQSGD(transport=TRANSPORT)
    expected = plugin.allreduce(own, name, compression=compression)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(hvd, "mpi_enabled", lambda: mpi)
    monkeypatch.setattr(hvd, "local_size", lambda: hvd.size() // hosts)
    compression = plugin.GlobalQSGD(transport=TRANSPORT)
    with caplog.at_level(logging.WARNING):
        result = plugin.allreduce(on_gpu(own), name, compression=compression)
    _require_residence(stay and TRANSPORT == "horovod")
    assert torch.equal(plain(result), expected)
    said = [own.getMessage() for own in caplog.records if getattr(own, "event", "") == "gpu"]
    assert len(said) == int(hvd.rank() == 0 and not stay)
    assert all("set HOROVOD_HIERARCHICAL_ALLGATHER=0" in text for text in said)


def test_no_other_gpu_is_looked_at(name: str, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current one may be another rank's, where a program has named its GPU in every call."""
    monkeypatch.setattr(
        gpus, "kernels_problem", lambda index: None if index == 1 else "another process has it"
    )
    own = gradients((6000,), tag=4)[hvd.rank()]
    host, device = (plugin.GlobalQSGD(transport=TRANSPORT) for _ in range(2))
    expected = plugin.allreduce(own, name, compression=host)
    result = plugin.allreduce(on_gpu(own, fake_gpu.SECOND), name, compression=device)
    _require_residence(TRANSPORT == "horovod")
    assert result.device == fake_gpu.SECOND
    assert torch.equal(plain(result), expected)


@pytest.mark.usefixtures("several_ranks", "gpu")
@pytest.mark.parametrize(
    ("device", "count", "shared"),
    [(fake_gpu.GPU, 2, True), (fake_gpu.GPU, 1, False), (fake_gpu.SECOND, 2, False)],
    ids=["the first of two", "the only one", "the second of two"],
)
def test_ranks_that_share_a_gpu_beside_others_are_told(
    device: torch.device,
    count: int,
    shared: bool,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As where nobody calls torch.cuda.set_device; without NCCL nothing else says so."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    own = on_gpu(gradients((6000,))[hvd.rank()], device)
    with caplog.at_level(logging.WARNING):
        plugin.allreduce(own, name, compression=plugin.GlobalQSGD(transport=TRANSPORT))
    said = [own for own in caplog.records if getattr(own, "event", "") == "gpu-shared"]
    assert len(said) == int(shared and hvd.local_rank() == 1)
    assert all("torch.cuda.set_device(hvd.local_rank())" in own.getMessage() for own in said)


def test_statistics_of_a_gpu(resident: bool, name: str) -> None:
    if by_nodes():
        pytest.skip("there are none of codes of means")
    own = gradients((6000,), tag=4)[hvd.rank()]
    found = []
    for there in (torch.clone, on_gpu):
        compression = plugin.GlobalQSGD(stats=1, transport=TRANSPORT)
        plugin.allreduce(there(own), name, compression=compression)
        found.append(compression.stats[name])
    assert found[0] == found[1]


@pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
@pytest.mark.parametrize("count", [1, 3])
def test_what_is_not_finite_on_one_rank(levels: Any, count: int, name: str, resident: bool) -> None:
    """It is looked at for the log, and all ranks go on in the same way."""
    tensors = [own.clone() for own in gradients((6000,), tag=5)[:1] * count]
    if hvd.rank() == hvd.size() - 1:
        tensors[0][7] = float("inf")
    compression = plugin.GlobalQSGD(levels=levels, block_size=None, transport=TRANSPORT)
    handed = [on_gpu(own) for own in tensors]
    results = hvd.grouped_allreduce(handed, name=name, compression=compression)
    for place, result in enumerate(results):
        found = plain(result)
        assert bool(found.isnan().all()) == (place == 0)
        check_replicas(found)


@pytest.mark.usefixtures("several_ranks")
def test_nobody_joins_where_horovod_would_wait_for_ever(
    name: str, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lets a rank that has joined take part in operations on GPUs, or in those of hosts."""
    own = gradients((6000,), tag=4)[hvd.rank()]
    compression = plugin.GlobalQSGD(transport=TRANSPORT)
    plugin.allreduce(on_gpu(own), name, compression=compression)
    if not resident:
        assert hvd.join() >= 0
        plugin.allreduce(on_gpu(own[:30]), f"{name}.host", compression=compression)
        assert hvd.join() >= 0
        monkeypatch.setattr(hvd, "nccl_built", lambda: 1)
        with pytest.raises(ValueError, match=r"got on GPUs.* reduced in host memory\."):
            hvd.join(hvd.local_rank())
        plugin.allreduce(on_gpu(own[:30]), f"{name}.gpu", compression=compression)
    with pytest.raises(ValueError, match=f"{gpus.VARIABLE}=0"):
        hvd.join()


@pytest.mark.usefixtures("several_ranks")
def test_a_rank_that_has_joined_before_is_not_waited_for(name: str, resident: bool) -> None:
    """Where it would be for ever: ranks that agree find out, which they do in host memory."""
    own = gradients((6000,), tag=4)[hvd.rank()]
    compression = plugin.GlobalQSGD(levels="two-hop", transport=TRANSPORT)
    if hvd.rank() == 0:
        assert hvd.join() >= 0
        return
    if resident:
        with pytest.raises(ValueError, match=rf"hvd\.join.*{gpus.VARIABLE}=0"):
            plugin.allreduce(on_gpu(own), name, compression=compression)
    else:
        result = plugin.allreduce(on_gpu(own), name, compression=compression)
        assert torch.isfinite(plain(result)).all()
    hvd.join()


@pytest.mark.parametrize("variable", ["HOROVOD_ENABLE_ASYNC_COMPLETION", "HOROVOD_ENABLE_XLA_OPS"])
@pytest.mark.parametrize("early", ["0", "1", "true"])  # Horovod reads a number
def test_operations_that_are_called_complete_early(
    early: str, variable: str, name: str, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Horovod then has its stream wait for a GPU, and ours has to wait for that."""
    if TRANSPORT == "mpi":
        pytest.skip("no operations of Horovod's on a GPU")
    monkeypatch.setenv(variable, early)
    compression = plugin.GlobalQSGD(levels="two-hop")
    plugin.allreduce(on_gpu(gradients((6000,))[hvd.rank()]), name, compression=compression)
    waited = (gpus.kernel_stream(fake_gpu.GPU), DEFAULT) in fake_gpu.Stream.waits
    assert waited == (early == "1")


# ------------------------------------------------------------------------------ streams of PyTorch


DEFAULT = fake_gpu.Stream.defaults[fake_gpu.GPU]


@pytest.mark.parametrize("early", ["0", "1"])
def test_training_on_a_stream_of_its_own(
    early: str, name: str, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Horovod calls an operation complete early, its default stream waits for that."""
    monkeypatch.setenv("HOROVOD_ENABLE_ASYNC_COMPLETION", early)
    side, waits = torch.cuda.Stream(), fake_gpu.Stream.waits
    small, large = gradients((30,))[hvd.rank()], gradients((6000,))[hvd.rank()]
    compression = plugin.GlobalQSGD(transport=TRANSPORT)
    with torch.cuda.stream(side):
        hvd.allreduce(on_gpu(small).bfloat16(), name=f"{name}.left", compression=compression)
        assert ((side, DEFAULT) in waits) == (early == "1")
        waits.clear()
        # Tokens of a group lie on the GPU.
        hvd.grouped_allreduce([on_gpu(large)] * 2, name=name, compression=compression)
        assert (side, gpus.kernel_stream(fake_gpu.GPU)) in waits
    assert set(fake_gpu.readers) == {DEFAULT if early == "1" else gpus._side_stream(fake_gpu.GPU)}


@pytest.mark.parametrize("levels", LEVELS)
def test_what_waits_for_the_default_stream_is_said_once(
    levels: Any, resident: bool, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    compression = plugin.GlobalQSGD(levels=levels, transport=TRANSPORT)
    gradient = on_gpu(gradients((5000,))[hvd.rank()])
    with caplog.at_level(logging.INFO):
        for stream in (torch.cuda.Stream(), DEFAULT):
            gpus.say_what_waits.cache_clear()
            caplog.clear()
            with torch.cuda.stream(stream):
                for number in range(2):
                    tag = f"{name}.{stream is DEFAULT}.{number}"
                    plugin.allreduce(gradient, tag, compression=compression)
            said = [own for own in caplog.records if getattr(own, "event", "") == "gpu-stream"]
            alltoall = resident and (levels != "standard" or by_nodes())
            assert len(said) == int(alltoall and stream is DEFAULT and hvd.rank() == 0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_is_written_on_the_stream_of_its_hook(device: torch.device, gpu: Any) -> None:
    assert written(torch.zeros(3)) is None
    for stream in (torch.cuda.Stream(device), fake_gpu.Stream.defaults[device]):
        with torch.cuda.stream(stream):
            handle = written(on_gpu(torch.zeros(3), device))
        assert handle is not None
        assert handle.event.stream is stream


@pytest.mark.parametrize("several", [True, False])
def test_a_copy_outlives_all_who_use_it(several: bool, name: str, gpu: Any) -> None:
    """Our kernels, and the stream on which its mean is asked for; its hook may have had another.

    PyTorch warns where it is told of the stream that memory is of (cudaMallocAsync).
    """
    own = gradients((8, 16, 8, 8), tag=3)[hvd.rank()].to(memory_format=torch.channels_last)
    side = torch.cuda.Stream() if several else DEFAULT
    parameter = torch.nn.Parameter(on_gpu(torch.zeros_like(own)))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        [(name, parameter)],
        compression=plugin.GlobalQSGD(transport=TRANSPORT),
    )
    parameter.grad = on_gpu(own)
    with torch.cuda.stream(side):
        optimizer._handles[parameter] = optimizer._allreduce_grad_async(parameter)
    ((copy, stream),) = fake_gpu.recorded
    assert copy != parameter.grad.data_ptr()
    assert stream is gpus.kernel_stream(fake_gpu.GPU)
    optimizer.synchronize()
    assert ((copy, DEFAULT) in fake_gpu.recorded) == several


def test_memory_of_operations_that_are_over_is_given_back(name: str, resident: bool) -> None:
    """Of gradients that are left to Horovod, of tokens, of codes and of what came of them."""
    shapes = [(30,), (9000,)]
    compression = plugin.GlobalQSGD(levels="two-hop", transport=TRANSPORT)
    plugin.allreduce(gradients((9000,))[hvd.rank()], f"{name}.first", compression=compression)
    library = numbering.library()
    assert library is not None
    before = set(library._held)  # of other tests, which have given up operations
    trained(name, compression, shapes, [fake_gpu.GPU] * 2)
    assert set(library._held) == before


def test_kernels_are_waited_for_after_an_error(
    name: str, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever catches it gives memory back that they may still read or write."""
    compression = plugin.GlobalQSGD(transport=TRANSPORT)
    own = gradients((6000,), tag=4)[hvd.rank()]
    plugin.allreduce(on_gpu(own), name, compression=compression)

    def fails(*_: Any) -> Any:
        raise MemoryError

    fake_gpu.Stream.waits.clear()
    with monkeypatch.context() as patch:
        patch.setattr(tensors, "new_output", fails)
        with pytest.raises(MemoryError):
            plugin.allreduce(on_gpu(own), name, compression=compression)
    assert (DEFAULT, gpus.kernel_stream(fake_gpu.GPU)) in fake_gpu.Stream.waits


def test_a_gpu_that_has_failed_is_an_error(
    name: str, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an assertion in a kernel of the model; copies are then never complete."""
    own = on_gpu(gradients((6000,), tag=4)[hvd.rank()])
    compression = plugin.GlobalQSGD(transport=TRANSPORT)
    plugin.allreduce(own, name, compression=compression)
    with monkeypatch.context() as patch:
        patch.setattr(fake_cupy.Event, "failure", 710)
        with pytest.raises(fake_cupy.CUDARuntimeError, match="710"):
            plugin.allreduce(own, name, compression=compression)


@pytest.mark.parametrize("enough", [True, False])
def test_memory_that_pytorch_does_not_use_is_given_back(
    enough: bool, name: str, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps what it has freed, which may be all that is left of a GPU."""
    free, emptied = [False], []
    original = gpu.cupy.empty

    def empty(*arguments: Any, **options: Any) -> Any:
        if not free[0]:
            raise MemoryError("of the GPU")
        return original(*arguments, **options)

    def empty_cache() -> None:
        emptied.append(free[0])
        free[0] = enough

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    own = gradients((6000,), tag=4)[hvd.rank()]
    expected = plugin.allreduce(own, name, compression=plugin.GlobalQSGD(transport=TRANSPORT))
    monkeypatch.setattr(gpu.cupy, "empty", empty)
    compression = plugin.GlobalQSGD(transport=TRANSPORT)
    if enough:
        result = plugin.allreduce(on_gpu(own), name, compression=compression)
        assert torch.equal(plain(result), expected)
        assert emptied == [False]
        return
    with pytest.raises(MemoryError, match="of the GPU"):
        plugin.allreduce(on_gpu(own), name, compression=compression)


@pytest.mark.parametrize("when", ["in a hook", "in step()"])
@pytest.mark.parametrize("elements", [6000, 30])
def test_no_graph_is_captured_meanwhile(
    when: str, elements: int, name: str, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameter = torch.nn.Parameter(on_gpu(torch.zeros(elements)))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        [(name, parameter)],
        compression=plugin.GlobalQSGD(transport=TRANSPORT),
    )
    parameter.grad = on_gpu(gradients((elements,))[hvd.rank()])
    refused = pytest.raises(RuntimeError, match=r"CUDA graph .*make_graphed_callables")
    with monkeypatch.context() as patch:
        if when == "in a hook":
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            with refused:
                optimizer._allreduce_grad_async(parameter)
            return
        optimizer._handles[parameter] = optimizer._allreduce_grad_async(parameter)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with refused:
            optimizer.synchronize()


# ---------------------------------------------------------------------------- what Horovod is given


def _groups(monkeypatch: pytest.MonkeyPatch) -> list[set[torch.device]]:
    """Devices of each group that Horovod gets; it refuses several, as its C++ does."""
    seen: list[set[torch.device]] = []
    original = hvd_ops._grouped_allreduce_async

    def one_device(given: Any, *rest: Any) -> int:
        seen.append({own.device for own in given})
        if len(seen[-1]) > 1:
            raise RuntimeError("Tensors in list must be on same device.")
        return original(given, *rest)

    monkeypatch.setattr(hvd_ops, "_grouped_allreduce_async", one_device)
    return seen


SHAPES = [(70, 100), (30,), (9000,), (4095,)]  # every other one is left to Horovod


@pytest.mark.parametrize("built", [True, False])
def test_groups_with_tensors_that_are_left_to_horovod(
    built: bool, name: str, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a group lie on one device, whether or not Horovod can be given what lies on a GPU."""
    monkeypatch.setattr(gpus, "horovod_takes_them", lambda: built)
    seen = _groups(monkeypatch)
    inputs = [gradients(shape, tag=number) for number, shape in enumerate(SHAPES)]
    own = [every[hvd.rank()] for every in inputs]

    def reduced(there: Any, tag: str) -> list[list[torch.Tensor]]:
        compression = plugin.GlobalQSGD(transport=TRANSPORT)
        results = [
            hvd.grouped_allreduce(
                [there(tensor) for tensor in own], name=f"{name}.{tag}", compression=compression
            )
        ]
        parameters = [torch.nn.Parameter(there(torch.zeros(shape))) for shape in SHAPES]
        named = [(f"{name}.{number}", one) for number, one in enumerate(parameters)]
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(parameters, lr=1.0), named, compression=compression, groups=2
        )
        for _ in range(2):
            for parameter, tensor in zip(parameters, own, strict=True):
                parameter.grad = there(tensor)
            for group in dict.fromkeys(optimizer._p_to_group.values()):
                optimizer._handles[group] = optimizer._grouped_allreduce_grad_async(group)
            optimizer.synchronize()
            results.append([one.grad for one in parameters])
        return results

    expected = reduced(torch.clone, "same")
    seen.clear()
    got = reduced(on_gpu, "same")
    on = fake_gpu.GPU if built else torch.device("cpu")
    assert seen == [{on}] * 5
    for theirs, ours in zip(expected, got, strict=True):
        for one, other in zip(theirs, ours, strict=True):
            assert other.device == fake_gpu.GPU
            # Horovod adds those of three ranks in any order.
            torch.testing.assert_close(plain(other), one)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_mean_is_where_its_gradient_is_and_has_its_strides(
    in_place: bool, name: str, gpu: Any
) -> None:
    own = gradients((8, 16, 8, 8), tag=3)[hvd.rank()].to(memory_format=torch.channels_last)
    compression = plugin.GlobalQSGD(transport=TRANSPORT)
    if not in_place:
        result = plugin.allreduce(on_gpu(own), name, compression=compression)
    else:
        parameter = torch.nn.Parameter(on_gpu(torch.zeros_like(own)))
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([parameter], lr=1.0), [(name, parameter)], compression=compression
        )
        parameter.grad = on_gpu(own)
        optimizer._handles[parameter] = optimizer._allreduce_grad_async(parameter)
        optimizer.synchronize()
        result = parameter.grad
    assert result.device == fake_gpu.GPU
    assert fake_gpu.crossings == []
    assert result.stride() == own.stride() != torch.empty(own.shape).stride()
    error = as_numpy(result) - sum(every.numpy() for every in gradients(own.shape, 3)) / hvd.size()
    assert 0 < abs(error).max() < 0.1


@pytest.mark.parametrize(
    ("takes", "nccl", "kernels", "words"),
    [
        (False, False, None, ["without CUDA"]),
        (True, False, None, ["without NCCL"]),
        (True, True, "CuPy does not import", ["CuPy does not import"]),
        (True, True, None, []),
    ],
)
def test_what_keeps_gradients_from_the_gpu_is_said_once(
    takes: bool,
    nccl: bool,
    kernels: str | None,
    words: list[str],
    name: str,
    gpu: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(gpus, "horovod_takes_them", lambda: takes)
    monkeypatch.setattr(hvd, "nccl_built", lambda: nccl)
    monkeypatch.setattr(gpus, "kernels_problem", lambda _: kernels)
    compression = plugin.GlobalQSGD(transport=TRANSPORT)
    gradient = gradients((5000,))[hvd.rank()]
    with caplog.at_level(logging.WARNING):
        plugin.allreduce(gradient, f"{name}.host", compression=compression)
        assert not [own for own in caplog.records if own.event == "gpu"]
        for number in range(2):
            plugin.allreduce(on_gpu(gradient), f"{name}.{number}", compression=compression)
    said = [own.getMessage() for own in caplog.records if own.event == "gpu"]
    assert len(said) == (len(words) if hvd.rank() == 0 else 0)
    for text, word in zip(said, words, strict=False):
        assert word in text
