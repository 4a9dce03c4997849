"""What tools/gpu_check.sh runs: see there.

Each part is a process of its own with a limit of time, so one that hangs or crashes costs only
itself. A part prints lines of JSON, a `Check` each; the whole is a table and gpu-check.json.

With one GPU, NCCL takes one rank only. Two and four ranks then need a Horovod whose operations are
not NCCL's: `--staged` names a folder that has one (built by hand, with CUDA but without
HOROVOD_GPU_OPERATIONS), which is put on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULT = "gpu_check result: "  # before a part's lines of JSON, since libraries print others
NO_GPU = 2  # exit status
LIMIT = "GPU_CHECK_SECONDS"  # a part's limit, for the part itself
REHEARSED_ON = "CPU tensors"

BLOCK = 256
LEVELS: tuple[Any, ...] = ("two-hop", "standard", "exponential")  # the default comes first
# What kernels are called with one by one: levels and bits.
KINDS = {"two-hop": 8, "two-hop, 5 bits": 5, "standard": 8, "exponential": 8}
TABLES = ("two-hop", "standard")  # levels whose stages a table has
REDUCE = "reduce two-hop, a table"
# Throughput, in bytes read and written, beside a copy on the device: what this project aims at.
TARGETS = {
    "absmax": 0.9,
    "l2 norm": 0.9,
    **{f"{verb} {own}": 0.85 for own in KINDS for verb in ("quantize", "dequantize")},
    "absmax, a table": 0.9,
    **{f"{verb} {own}, a table": 0.85 for own in TABLES for verb in ("quantize", "dequantize")},
    REDUCE: 0.85,
}


Status = Literal["passed", "failed", "missed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    part: str
    name: str
    status: Status
    text: str
    value: float | None = None
    target: float | None = None


# --------------------------------------------------------------------------------------- throughput


def throughput(rehearse: bool) -> Iterator[Check]:
    """Every kernel of a step beside a copy. The best of ten, as other work only takes time."""
    from examples.wide_resnet.resnet import WIDE_RESNET_101_2

    kernels: Any
    elements = 1 << (20 if rehearse else 26)
    x = np.random.default_rng(0).standard_normal(elements, dtype=np.float32)
    counts = _compressed(_small() if rehearse else WIDE_RESNET_101_2)
    values = np.random.default_rng(1).standard_normal(sum(counts), dtype=np.float32)
    if rehearse:
        from mpi_ops.kernels import host as kernels

        y, seconds = np.empty_like(x), _seconds_on_host
        copy: Callable[[], Any] = functools.partial(np.copyto, y, x)
    else:
        import cupy

        from mpi_ops.kernels import device as kernels

        x, values = cupy.asarray(x), cupy.asarray(values)
        y, seconds = cupy.empty_like(x), seconds_on_device
        # The copy engine's, and not CuPy's kernel for a copy, which would have to be compiled.
        copy = functools.partial(y.data.copy_from_device_async, x.data, x.nbytes)
    copied = 2 * x.nbytes / seconds(copy)
    yield Check("throughput", "copy", "passed", f"{copied / 1e9:.0f} GB/s", copied / 1e9)
    calls = [*_kernel_calls(kernels, x, y), *_table_calls(kernels, values, counts)]
    for name, size, run in calls:
        ratio = size / seconds(run) / copied
        text = f"{ratio * copied / 1e9:.0f} GB/s, {ratio:.2f} of a copy"
        text += f"; {len(counts)} tensors" if name.endswith("table") else ""
        text += "" if rehearse else f", {1e6 * _seconds_on_host(run):.0f} us of the host"
        if rehearse:  # the targets are a GPU's
            yield Check("throughput", name, "passed", text, ratio)
        else:
            yield Check("throughput", name, verdict(name, ratio), text, ratio, TARGETS[name])


def verdict(name: str, ratio: float) -> Status:
    """Whether a kernel is as fast, beside a copy, as it shall be."""
    return "passed" if ratio >= TARGETS[name] else "missed"


def _kernel_calls(kernels: Any, x: Any, y: Any) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Names of TARGETS, the bytes that a kernel reads and writes, and a call of it."""
    from mpi_ops.dither import Stage, dither
    from mpi_ops.kernels.interface import Buffer
    from mpi_ops.scheme import Scheme

    source, target = Buffer.of(x), Buffer.of(y)
    norms = kernels.absmax(source, BLOCK)
    key = dither(0, "gpu_check", 0, 0, Stage.QUANTIZE)
    scratch = kernels.absmax(source, BLOCK)
    partial = functools.partial
    yield "absmax", x.nbytes, partial(kernels.absmax, source, BLOCK, out=scratch)
    yield "l2 norm", x.nbytes, partial(kernels.l2norm, source, BLOCK, out=scratch)
    for name, bits in KINDS.items():
        levels = name.partition(",")[0]
        plan = Scheme(levels=levels, bits=bits).plan(1)
        shared = {"block_size": BLOCK, "bits": bits}
        if levels == "exponential":
            codes = kernels.quantize_exponential(source, norms, dither=key, **shared)
            options = {**shared, "dither": key, "out": codes}
            quantize = partial(kernels.quantize_exponential, source, norms, **options)
            decode = partial(kernels.dequantize_exponential, codes, norms, target, **shared)
        else:
            shared["square"] = plan.square
            options = {**shared, "levels": plan.level_count, "dither": key}
            codes = kernels.quantize_standard(source, norms, **options)
            quantize = partial(kernels.quantize_standard, source, norms, out=codes, **options)
            options = {**shared, "divisor": plan.units}
            decode = partial(kernels.dequantize_standard, codes, norms, target, **options)
        yield f"quantize {name}", x.nbytes + codes.nbytes, quantize
        yield f"dequantize {name}", x.nbytes + codes.nbytes, decode


def _small() -> Any:
    """A Wide-ResNet to rehearse with."""
    from examples.wide_resnet.resnet import Shape

    return Shape(blocks=(1, 1, 1, 1), classes=10, width=8, widening=2)


def _compressed(shape: Any) -> list[int]:
    """Elements of each of a Wide-ResNet's tensors that are compressed."""
    import torch

    from examples.wide_resnet.resnet import WideResNet
    from gq_horovod.path.config import DEFAULT_MIN_ELEMENTS

    with torch.device("meta"):
        counts = [each.numel() for each in WideResNet(shape).parameters()]
    return [count for count in counts if count >= DEFAULT_MIN_ELEMENTS]


def _table_calls(
    kernels: Any, values: Any, counts: Sequence[int]
) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """As `_kernel_calls`: the stages of tensors that lie one after the other.

    One launch each, but for what two-hop levels do with a share.
    """
    from mpi_ops.kernels.interface import Buffer, Tensors
    from mpi_ops.layout import layout
    from mpi_ops.scheme import Scheme
    from mpi_ops.stages import Stages

    names, partial = tuple(map(str, range(len(counts)))), functools.partial
    starts = np.cumsum([0, *counts[:-1]], dtype=np.uint64) * np.uint64(values.dtype.itemsize)
    x = Tensors.of(Buffer.of(values))
    x = x._replace(pointers=x.pointers + starts)
    steps = np.zeros(len(counts), dtype=np.uint32)
    for levels in TABLES:
        plan = Scheme(levels=levels, bits=8, block_size=BLOCK).plan(1)
        stages = Stages(layout(tuple(counts), plan, sum(counts)), names, 0, 0)
        (parcel,) = stages.layout.parcels
        norms = kernels.KERNELS.empty(stages.layout.norm_count, np.int32)
        codes = kernels.KERNELS.empty(parcel.size, np.int32)
        measure = partial(stages.measure, x, norms)
        if levels == TABLES[0]:
            yield "absmax, a table", values.nbytes, measure
        measure()
        size = values.nbytes + codes.nbytes
        quantize = partial(stages.quantize, parcel, x, steps, norms, codes)
        yield f"quantize {levels}, a table", size, quantize
        quantize()
        decoded = codes
        if levels == "two-hop":
            # The mean is written once, and read for its norms and again for its codes.
            decoded = kernels.KERNELS.empty(parcel.reduced_size, np.int32)
            reduce = partial(stages.reduce, parcel, codes, steps, norms, decoded)
            yield REDUCE, 3 * values.nbytes + codes.nbytes + decoded.nbytes, reduce
            reduce()
        # In place: what is quantized later is what this has decoded.
        decode = partial(stages.dequantize, parcel, decoded, norms, x)
        yield f"dequantize {levels}, a table", size, decode


def _seconds_on_host(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(12):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times[2:])


def seconds_on_device(run: Callable[[], Any]) -> float:
    """Time of one call on the GPU: the shortest of ten.

    Without what the host takes to call: the GPU is at something else until it has.
    """
    import cupy

    times, other = [], cupy.empty((2, 1 << 29), dtype=np.uint8)
    for _ in range(12):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        other[0].data.copy_from_device_async(other[1].data, other[1].nbytes)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop) / 1000)
    return min(times[2:])


# ------------------------------------------------------------------------------- Horovod, gradients


def _start(rehearse: bool) -> tuple[Any, str]:
    """Horovod, started, and the device of this rank's tensors."""
    import horovod.torch as hvd
    import torch

    hvd.init()
    os.environ["HOROVOD_ELASTIC"] = "1"  # an optimizer of one rank has hooks only then
    if rehearse:
        torch.set_num_threads(1)
        return hvd, "cpu"
    torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())
    return hvd, "cuda"


def operations(rehearse: bool) -> Iterator[Check]:
    """Every operation of Horovod that codes and norms may travel by, against its closed form."""
    import torch

    hvd, device = _start(rehearse)
    rank, size = hvd.rank(), hvd.size()
    whole = range(size)
    part = f"Horovod, {size} rank{'s' if size > 1 else ''}"
    if not rehearse:
        text = f"built with {'NCCL' if hvd.nccl_built() else 'no NCCL: tensors are staged'}"
        yield Check(part, "backend", "passed", text)

    def equal(got: Any, expected: Any) -> bool:
        return bool(torch.equal(got.cpu(), expected))

    for dtype in (torch.int32, torch.uint8):
        right: dict[str, list[bool]] = {}
        for count in (1, 70_003):  # a few bytes, and more than a block of any kernel
            base = (torch.arange(count) % 50).to(dtype)
            mine = (base + rank).to(device)
            label = f"{dtype}.{count}"
            got = hvd.allgather(mine, name=f"allgather.{label}")
            ok = equal(got, torch.cat([base + own for own in whole]))
            right.setdefault("allgather", []).append(ok)
            pieces = torch.cat([base + rank + own for own in whole])
            splits = torch.full((size,), count, dtype=torch.int32)
            got, received = hvd.alltoall(pieces.to(device), splits, name=f"alltoall.{label}")
            ok = equal(got, pieces) and received.tolist() == splits.tolist()
            right.setdefault("alltoall", []).append(ok)
            got = hvd.broadcast(mine, size - 1, name=f"broadcast.{label}")
            right.setdefault("broadcast", []).append(equal(got, base + (size - 1)))
            if dtype == torch.int32:  # codes in lanes, and norms
                got = hvd.allreduce(mine, op=hvd.Sum, name=f"sum.{label}")
                right.setdefault("sum", []).append(equal(got, size * base + sum(whole)))
                got = hvd.allreduce(mine, op=hvd.Max, name=f"max.{label}")
                right.setdefault("max", []).append(equal(got, base + (size - 1)))
        for name, oks in right.items():
            failed = [own for own, each in enumerate(hvd.allgather_object(all(oks))) if not each]
            status: Status = "failed" if failed else "passed"
            text = f"wrong on ranks {failed}" if failed else f"on {device}"
            yield Check(part, f"{name} {str(dtype).removeprefix('torch.')}", status, text)
    hvd.shutdown()


def gradients(rehearse: bool) -> Iterator[Check]:
    """Bytes of the GPU's path beside the host's, and replicas of a small model."""
    import torch

    from gq_horovod.torch import GlobalQSGD, allreduce

    hvd, device = _start(rehearse)
    rank, size = hvd.rank(), hvd.size()
    part = f"gradients, {size} rank{'s' if size > 1 else ''}"
    for levels in LEVELS:
        different = []
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for count in (5003, (1 << 16 if rehearse else 3 << 20) + 7):
                x = torch.randn(count, generator=torch.Generator().manual_seed(rank)).to(dtype)
                x[count // 2 :: 3001] = torch.nan if count == 5003 else 0
                name = f"{levels}.{dtype}.{count}"
                means = [
                    allreduce(x.to(where), name, compression=GlobalQSGD(levels=levels)).cpu()
                    for where in ("cpu", device)
                ]
                first, second = (mean.view(torch.uint8) for mean in means)
                if not torch.equal(first, second):
                    different.append(name)
        everywhere = sorted({own for each in hvd.allgather_object(different) for own in each})
        wrong = f"other bytes: {', '.join(everywhere)}"
        text = wrong if everywhere else f"the host's bytes, on {device}"
        yield Check(part, levels, "failed" if everywhere else "passed", text)

        torch.manual_seed(rank)  # each rank begins with other weights
        model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.Linear(256, 64)).to(device)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model.named_parameters(),
            compression=GlobalQSGD(levels=levels),
        )
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(32, 128, device=device)).square().mean().backward()
            optimizer.step()
        own = [each.detach().cpu().flatten() for each in model.parameters()]
        replicas = {each.numpy().tobytes() for each in hvd.allgather_object(torch.cat(own))}
        status: Status = "passed" if len(replicas) == 1 else "failed"
        different = f"parameters of {len(replicas)} kinds on {size} ranks"
        text = "the same parameters on all ranks" if len(replicas) == 1 else different
        yield Check(part, f"{levels}, replicas", status, text)
    hvd.shutdown()


# ------------------------------------------------------------------------------------ training step


class Way(NamedTuple):
    """How the gradients of a step are reduced."""

    levels: Any  # None: not compressed
    # Two-hop codes go by Alltoall, for which Horovod waits for PyTorch's default stream. These are
    # the ways around it (docs/design.md, 5.2).
    own_stream: bool = False
    by_host: bool = False

    @property
    def needs_gpu(self) -> bool:
        return self.own_stream or self.by_host


WAYS = {
    LEVELS[0]: Way(LEVELS[0]),
    "not compressed": Way(None),
    f"{LEVELS[0]}, a stream of its own": Way(LEVELS[0], own_stream=True),
    f"{LEVELS[0]}, codes by the host": Way(LEVELS[0], by_host=True),
    **{levels: Way(levels) for levels in LEVELS[1:]},
}


def step(rehearse: bool) -> Iterator[Check]:
    """A training step of Wide-ResNet-101-2, and the time that its hooks keep PyTorch waiting."""
    import torch

    from examples.wide_resnet.resnet import WIDE_RESNET_101_2, WideResNet
    from gq_horovod.torch import GlobalQSGD, gpus

    hvd, device = _start(rehearse)
    shape, batch, pixels = (_small(), 2, 64) if rehearse else (WIDE_RESNET_101_2, 32, 224)
    images = torch.randn(batch, 3, pixels, pixels, device=device)
    labels = torch.randint(shape.classes, (batch,), device=device)
    counts = [each.numel() for each in WideResNet(shape).parameters()]
    text = f"{sum(counts) / 1e6:.1f} M parameters in {len(counts)} tensors, "
    text += f"{batch} images of {pixels} pixels; {GlobalQSGD().config.levels} is the default"
    yield Check("step", "model", "passed", text)
    for name, way in WAYS.items():
        if rehearse and way.needs_gpu:
            yield Check("step", name, "skipped", "needs a GPU")
            continue
        os.environ[gpus.VARIABLE] = str(int(not way.by_host))
        compression = GlobalQSGD(levels=way.levels) if way.levels else hvd.Compression.none
        # A new one, since the hooks of the optimizer before stay on its parameters.
        model = WideResNet(shape).to(device)
        inner = torch.optim.SGD(model.parameters(), lr=1e-4)
        optimizer = hvd.DistributedOptimizer(
            inner, model.named_parameters(), compression=compression
        )
        stream = torch.cuda.stream(torch.cuda.Stream()) if way.own_stream else nullcontext()
        with stream:
            times = _times_of_steps(optimizer, model, images, labels, 3 if rehearse else 8)
        medians = {part: 1000 * statistics.median(each) for part, each in times.items()}
        whole = medians["step"]
        finite = all(bool(torch.isfinite(each).all()) for each in model.parameters())
        text = f"{whole:.1f} ms, in hooks {medians['hooks']:.1f}, "
        text += f"in synchronize {medians['synchronize']:.1f}"
        text += "" if finite else "; parameters are not finite"
        yield Check("step", name, "passed" if finite else "failed", text, whole)
        hooks = medians["hooks"]
        yield Check("step", f"{name}, hooks", "passed", f"{hooks / whole:.0%} of the step", hooks)
        del model, inner, optimizer
        gc.collect()  # each model holds on to its optimizer
    hvd.shutdown()


def _times_of_steps(
    optimizer: Any, model: Any, images: Any, labels: Any, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each step, and of its parts that run between PyTorch's own work."""
    import torch

    spent = dict.fromkeys(("hooks", "synchronize"), 0.0)

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def measured(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - begin

        return measured

    optimizer._allreduce_grad_async = timed("hooks", optimizer._allreduce_grad_async)
    optimizer.synchronize = timed("synchronize", optimizer.synchronize)
    times: dict[str, list[float]] = {"step": [], "hooks": [], "synchronize": []}
    for number in range(-2, rounds):  # kernels are compiled, and memory is found
        if images.is_cuda:
            torch.cuda.synchronize()
        spent.update(dict.fromkeys(spent, 0.0))
        begin = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()
        if number >= 0:
            times["step"].append(time.perf_counter() - begin)
            for part, seconds in spent.items():
                times[part].append(seconds)
    return times


# ---------------------------------------------------------------------------------- parts, in order


@dataclass(frozen=True)
class Part:
    """One process, or one mpirun."""

    name: str
    command: Sequence[str]
    seconds: int  # limit
    path: str = ""  # a folder before others on PYTHONPATH


def parts(options: argparse.Namespace) -> Iterator[Part | Check]:
    """What is to run; a Check for what is not, with the reason."""
    from tools import ranks

    own = [sys.executable, __file__, *(["--rehearse"] if options.rehearse else []), "--part"]
    slack = 3 if options.rehearse else 1  # where no GPU is, cores are often shared
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if options.rehearse:
        few = "test_absmax or test_quantize_standard"
        emulated = [*pytest, "tests/single/test_device_emulated.py", "-k", few]
        yield Part("kernels, bytes of the host (emulated)", emulated, 130 * slack)
    else:
        bytes_of_the_host = [*pytest, "tests/gpu/test_device.py", "-k", "not throughput"]
        yield Part("kernels, bytes of the host", bytes_of_the_host, 130)
    yield Part("throughput", [*own, "throughput"], 50 * slack)
    yield Part("Horovod, 1 rank", [*own, "operations"], 30 * slack)
    yield Part("gradients, 1 rank", [*own, "gradients"], 50 * slack)
    yield Part("training step", [*own, "step"], 90 * slack)
    if options.rehearse:
        text = "on a CPU nothing is left to do when a hook comes"
        yield Check("hooks", "leave the GPU its work", "skipped", text)
    else:
        yield Part("hooks leave the GPU its work", [*pytest, "tests/gpu/test_gradients.py"], 50)
    for size in (2, 4):
        if why := why_not(size, options):
            yield Check(f"{size} ranks", "", "skipped", why)
            continue
        start = [*ranks.mpirun(None, size), "-x", "PYTHONPATH"]
        path = options.staged or ""
        yield Part(f"Horovod, {size} ranks", [*start, *own, "operations"], 30 * slack, path)
        yield Part(f"gradients, {size} ranks", [*start, *own, "gradients"], 50 * slack, path)


def why_not(size: int, options: argparse.Namespace) -> str:
    """Why so many ranks cannot run here; empty where they can."""
    import torch

    if options.rehearse or options.staged or torch.cuda.device_count() >= size:
        return ""
    return (
        f"{torch.cuda.device_count()} GPU: NCCL refuses two ranks on one; --staged names a folder "
        "with a Horovod without GPU operations"
    )


def _run(part: Part, environment: dict[str, str]) -> tuple[str, int | None]:
    """What a part prints, and its exit status; None where its time was up."""
    with subprocess.Popen(
        part.command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
    ) as child:
        try:
            return child.communicate(timeout=part.seconds)[0], child.returncode
        except subprocess.TimeoutExpired:
            child.terminate()  # mpirun ends its ranks then, and kills them if need be
        try:
            return child.communicate(timeout=5)[0], None
        except subprocess.TimeoutExpired:
            child.kill()
            return child.communicate()[0], None


def run(part: Part) -> list[Check]:
    """The checks of a part; one that failed if it did not come to its end."""
    from tools import ranks

    path = os.pathsep.join(filter(None, (part.path, os.environ.get("PYTHONPATH", ""))))
    environment = {**ranks.environment(), "PYTHONPATH": path, LIMIT: str(part.seconds)}
    begin = time.monotonic()
    output, status = _run(part, environment)
    print(output, end="", file=sys.stderr)
    lines = [line.partition(RESULT)[2] for line in output.splitlines() if RESULT in line]
    checks = [Check(**json.loads(line)) for line in lines]
    took = f"{time.monotonic() - begin:.0f} s"
    if status is None:
        checks.append(Check(part.name, "", "failed", f"did not end within {part.seconds} s"))
    elif status:
        last = next(iter(output.strip().splitlines()[-1:]), "no output")
        checks.append(Check(part.name, "", "failed", f"exit status {status}: {last}"))
    elif not checks:
        checks.append(Check(part.name, "", "passed", took))
    return checks


# ---------------------------------------------------------------------------------------- the whole


def missing_gpu() -> str:
    """Why nothing can run here; empty with a GPU."""
    import torch

    if torch.cuda.is_available():
        return ""
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
    return (
        f"gpu_check: an NVIDIA GPU is needed and PyTorch finds none (torch {torch.__version__}, "
        f"{built}); `gq-horovod doctor` says why. `--rehearse` runs the parts on CPU tensors."
    )


def describe(rehearse: bool) -> dict[str, Any]:
    """The machine, for the JSON."""
    import torch

    if rehearse:
        return {"device": REHEARSED_ON, "torch": torch.__version__}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "devices": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def print_table(checks: Sequence[Check]) -> None:
    """Plain text: rich may be missing."""
    widths = [max(len(getattr(each, name)) for each in checks) for name in ("part", "name")]
    for each in checks:
        target = f" (target {each.target:.2f})" if each.target is not None else ""
        print(
            f"{each.status:8}{each.part:{widths[0]}}  {each.name:{widths[1]}}  {each.text}{target}"
        )


def main() -> int:
    """Run all parts, or be one."""
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="CPU tensors in place of a GPU's")
    parser.add_argument("--staged", metavar="FOLDER", help="a Horovod for 2 and 4 ranks on one GPU")
    parser.add_argument("--output", type=Path, default=Path("results/gpu-check.json"))
    parser.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        # One that hangs says where, in every rank, before it is ended.
        faulthandler.dump_traceback_later(0.8 * float(os.environ.get(LIMIT, "60")))
        for check in PARTS[options.part](options.rehearse):
            if int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == 0:
                print(RESULT + json.dumps(asdict(check)), flush=True)
        return 0
    if not options.rehearse and (text := missing_gpu()):
        print(text, file=sys.stderr)
        return NO_GPU
    begin = time.monotonic()
    checks: list[Check] = []
    for part in parts(options):
        if isinstance(part, Part):
            print(f"== {part.name} (at most {part.seconds} s)", file=sys.stderr, flush=True)
            checks += run(part)
        else:
            checks.append(part)
    seconds = round(time.monotonic() - begin)
    report = {**describe(options.rehearse), "seconds": seconds, "checks": [*map(asdict, checks)]}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    print_table(checks)
    wrong = sum(each.status in ("failed", "missed") for each in checks)
    print(
        f"{report['device']}: {wrong} of {len(checks)} checks failed or missed their target; ",
        end="",
    )
    print(f"{seconds} s; wrote {options.output}")
    return int(wrong > 0)


PARTS: dict[str, Callable[[bool], Iterator[Check]]] = {
    "throughput": throughput,
    "operations": operations,
    "gradients": gradients,
    "step": step,
}

if __name__ == "__main__":
    sys.exit(main())
