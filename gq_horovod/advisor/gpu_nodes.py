"""What a step costs on nodes with GPUs: the model of a cluster, with the node's own figures.

For the table of the paper's 64 nodes, before anybody pays for them: `gq-horovod simulate --paper`;
and for nodes with several GPUs, `gq-horovod simulate --gpus-per-node 1,8`.
Every input says whether it was measured, and where, or is assumed, and why. Nothing here has been
compared with a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..path.config import Config
from . import model
from .model import Cluster, Kernels, Method, Workload

MEASURED, ASSUMED, GIVEN = "measured", "assumed", "given"


def _input(value: float, unit: str, origin: str, source: str) -> Any:
    return field(default=value, metadata={"unit": unit, "origin": origin, "source": source})


@dataclass(frozen=True)
class Inputs:
    """A node a2-highgpu-1g (one A100 of 40 GB) or 8g (eight), and its network. Raises ValueError.

    The metadata of a field have its unit, its origin and the source.
    """

    gpu_memory: float = _input(
        1555e9, "bytes/s", ASSUMED, "data sheet of the A100 SXM of 40 GB; no GPU of this kind here"
    )
    kernel_share: float = _input(
        0.5,
        "of gpu_memory",
        ASSUMED,
        "no CUDA kernel of ours was timed on an A100; hosts reach 0.4 up",
    )
    pcie: float = _input(
        25e9,
        "bytes/s",
        ASSUMED,
        "PCIe 4.0 x16 has 31.5 GB/s a direction; pinned copies reach some 0.8",
    )
    nvlink: float = _input(
        300e9,
        "bytes/s",
        ASSUMED,
        "data sheet of the A100 SXM: NVLink has 600 GB/s, both directions together",
    )
    nvlink_share: float = _input(
        0.65, "of nvlink", ASSUMED, "a guess; no exchange over NVLink was timed here"
    )
    host_exchange: float = _input(
        1e9,
        "bytes/s",
        MEASURED,
        "Alltoall of 8 and 32 MiB, MPI, two ranks on two shared cores (docs/advisor.md)",
    )
    host_sum: float = _input(
        10e9,
        "bytes/s",
        MEASURED,
        "a sum on one core of a Xeon, rounded down (docs/benchmarks.md)",
    )
    allreduce_efficiency: float = _input(
        0.55,
        "of the rate",
        MEASURED,
        "0.49 to 0.59 at 48 MB, 4 hosts, MPI over TCP (docs/advisor.md)",
    )
    gather_efficiency: float = _input(
        0.6, "of the rate", MEASURED, "0.55 to 0.69 at 4 MB, the same hosts (docs/advisor.md)"
    )
    latency: float = _input(
        50e-6, "s", ASSUMED, "a message over TCP between cloud hosts; not measured in a cloud"
    )
    message_overhead: float = _input(
        5e-6, "s", ASSUMED, "processor's time of a further message in flight; not measured"
    )
    cycle_time: float = _input(
        1e-3,
        "s",
        ASSUMED,
        "HOROVOD_CYCLE_TIME of k8s/base, as long as a lone operation waits at most",
    )
    operation_overhead: float = _input(
        50e-6, "s", ASSUMED, "of a further operation of Horovod in flight; `calibrate` measures it"
    )
    hook: float = _input(
        35e-6,
        "s",
        MEASURED,
        "Python of a gradient with codes, 30 to 40 µs on a Xeon (docs/benchmarks.md)",
    )
    plain_hook: float = _input(
        10e-6, "s", MEASURED, "the same without codes: 9 to 11 µs (docs/benchmarks.md)"
    )

    def __post_init__(self) -> None:
        for own in fields(self):
            value = getattr(self, own.name)
            if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(
                    f"Inputs: {own.name} must be a finite number, 0 or more, got {value!r}."
                )
        for name in (
            *("gpu_memory", "kernel_share", "pcie", "host_sum"),
            *("nvlink", "nvlink_share", "host_exchange"),
        ):
            if getattr(self, name) == 0:
                raise ValueError(f"Inputs: {name} must be more than 0, got 0.")


# The paper's widths beside ours: standard levels of 8 bits have a single level with 64 ranks.
METHODS = (
    model.NONE,
    model.FP16,
    model.STANDARD,
    model.global_qsgd("standard 8 bit", Config(levels="standard", bits=8)),
    *(
        method
        for method in model.METHODS
        if method.name
        in ("standard 4 bit", "exponential", "exponential 4 bit", "two-hop", "two-hop 4 bit")
    ),
)


def methods(cluster: Cluster) -> list[Method]:
    """Those of METHODS that differ on a cluster; with codes hierarchical and flat, if it can be."""
    found: dict[object, Method] = {}
    for method in model.methods_for(cluster, METHODS):
        same: object = method.name
        if method.config is not None and method.why_not(cluster) is None:
            same = method.config.plan(method.parties(cluster).ranks), method.hierarchical
        found.setdefault(same, method)
    return list(found.values())


# Where codes lie: in the GPU's memory, or staged through the host's.
NCCL, STAGED = "NCCL", "host memory"
PATHS = (NCCL, STAGED)


@dataclass(frozen=True)
class GpuCluster(Cluster):
    """A cluster of nodes with GPUs, a rank for each, whose kernels are the GPU's."""

    pcie: float | None = None  # bytes/s of what passes through host memory; None: nothing does
    host_sum: float | None = None  # bytes/s of Allreduce's sums on the host; None: on the GPU

    @property
    def sums(self) -> float:
        return self.kernels.sum if self.host_sum is None else self.host_sum

    def crossing(self, size: float) -> float:
        return 0.0 if self.pcie is None else size / self.pcie


def cluster_of(
    inputs: Inputs, ranks: int, bandwidth: float, path: str, gpus: int = 1
) -> GpuCluster:
    """The cluster of so many GPUs.

    Arguments:
        inputs: of a node.
        ranks: in all, one for each GPU.
        bandwidth: of a node's link in each direction, bits/s.
        path: one of PATHS.
        gpus: of a node.
    """
    speed = inputs.kernel_share * inputs.gpu_memory
    staged = path == STAGED
    inner = inputs.host_exchange if staged else inputs.nvlink * inputs.nvlink_share
    return GpuCluster(
        ranks=ranks,
        ranks_per_host=gpus,
        inner_bandwidth=8 * inner,
        bandwidth=bandwidth,
        latency=inputs.latency,
        message_overhead=inputs.message_overhead,
        allreduce_efficiency=inputs.allreduce_efficiency,
        gather_efficiency=inputs.gather_efficiency,
        cycle_time=inputs.cycle_time,
        operation_overhead=inputs.operation_overhead,
        kernels=Kernels(**{own.name: speed for own in fields(Kernels)}),
        pcie=inputs.pcie if staged else None,
        host_sum=inputs.host_sum if staged else None,
    )


def step_time(
    method: Method,
    workload: Workload,
    inputs: Inputs,
    cluster: GpuCluster,
    compute: float,
    overlap: float,
) -> float:
    """Seconds of a step: that of `model.step_time`, and the Python of the hooks.

    The hooks are not hidden: the thread that runs them launches the work of the backward pass.
    """
    hook = inputs.plain_hook if method.config is None else inputs.hook
    step = model.step_time(method, [workload.parameters], cluster, compute, overlap)
    return step + workload.tensors * hook


def with_given(inputs: Inputs, given: Mapping[str, float]) -> Inputs:
    """The inputs with some replaced. Raises ValueError for a name that is none."""
    known = {own.name for own in fields(inputs)}
    for name in given:
        if name not in known:
            raise ValueError(f"--input {name}: expected one of {', '.join(sorted(known))}.")
    return replace(inputs, **given)


def described(inputs: Inputs, given: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every input as plain data: name, value, unit, origin, source."""
    rows = []
    for own in fields(inputs):
        row = {"name": own.name, "value": getattr(inputs, own.name), **own.metadata}
        if own.name in given:
            row |= {"origin": GIVEN, "source": "--input"}
        rows.append(row)
    return rows
