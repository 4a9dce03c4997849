"""Cost of the MPI operation that adds exponential codes, on one core, without a network.

    mpirun -np 1 python benchmarks/op.py

A call of `Reduce_local` with it goes from the MPI library into Python, and from there into the
kernel. With small buffers that way is all there is to see: the median of many calls, beside the
library's own MPI.BOR and MPI.SUM on the same bytes and beside the kernel called directly. With
large buffers it is the kernel's bandwidth, counting bytes read and written, beside memcpy of the
same bytes in the same run. Prints two tables, writes op.json and op.png.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
from kernels import aligned, seconds
from mpi4py import MPI
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mpi_ops.dither import Stage, dither
from mpi_ops.kernels import host
from mpi_ops.op import exponential_sum

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SMALL = [32, 256, 1024, 4096]
LARGE = [1 << 20, 16 << 20, 64 << 20]
# What this project aims at: microseconds beyond MPI.BOR, and bandwidth as a ratio to memcpy where
# the buffers are too large for the caches.
TARGET_OVERHEAD = 20.0
TARGET_RATIO = 0.5
BITS = {"exponential 8 bit": 8, "exponential 4 bit": 4}


@dataclass
class Call:
    """Median time of one call on a small buffer."""

    name: str
    bytes: int
    microseconds: float
    overhead: float | None  # beyond MPI.BOR


@dataclass
class Bandwidth:
    """Medians over rounds on a large buffer; `spread` is the interquartile range of the ratio."""

    name: str
    bytes: int
    gigabytes_per_second: float
    ratio: float
    spread: float


def buffers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of both signs, of 32 levels in the middle, so that sums are rounded."""
    rng = np.random.default_rng(size)
    source, target = aligned(size, np.uint8), aligned(size, np.uint8)
    for array in (source, target):
        array[:] = rng.integers(48, 80, size) | rng.integers(0, 2, size) << 7
    return source, target


def reductions(source: np.ndarray, target: np.ndarray) -> dict[str, Callable[[], object]]:
    """Name -> one call that adds `source` to `target`."""

    def local(op: MPI.Op) -> Callable[[], object]:
        return lambda: op.Reduce_local([source, MPI.BYTE], [target, MPI.BYTE])

    random = dither(0, "benchmark", 0, 0, Stage.REDUCE)
    addresses = (source.ctypes.data, target.ctypes.data, source.nbytes)
    unsigned = MPI.UNSIGNED_CHAR
    return {
        "MPI.BOR": local(MPI.BOR),
        "MPI.SUM": lambda: MPI.SUM.Reduce_local([source, unsigned], [target, unsigned]),
        "kernel alone, 8 bit": lambda: host.add_exponential(*addresses, bits=8, dither=random),
        **{name: local(exponential_sum(bits)) for name, bits in BITS.items()},
    }


def measure_calls(repeats: int) -> list[Call]:
    """Median time of every reduction on small buffers, taken in turn."""
    results = []
    for size in track(SMALL, "Small buffers", console=Console(stderr=True)):
        calls = reductions(*buffers(size))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                times[name].append(seconds(call))
        medians = {name: statistics.median(own) * 1e6 for name, own in times.items()}
        for name, own in medians.items():
            overhead = own - medians["MPI.BOR"] if name in BITS else None
            results.append(Call(name, size, own, overhead))
    return results


def measure_bandwidth(rounds: int) -> tuple[float, list[Bandwidth]]:
    """Median bandwidth of memcpy in GB/s, and that of every reduction on large buffers."""
    results, copies = [], []
    for size in track(LARGE, "Large buffers", console=Console(stderr=True)):
        source, target = buffers(size)
        copy = aligned(size, np.uint8)
        calls = reductions(source, target)

        def memcpy(to: int = copy.ctypes.data, of: int = source.ctypes.data, n: int = size) -> None:
            ctypes.memmove(to, of, n)

        # Some calls each, so that short ones are long enough to be timed.
        times = max((16 << 20) // size, 1)
        rates: dict[str, list[float]] = {name: [] for name in calls}
        ratios: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        for _ in range(rounds):
            for name, call in calls.items():
                copied = 2 * size / statistics.median(seconds(memcpy) for _ in range(times))
                # Two buffers are read, one is written.
                rate = 3 * size / statistics.median(seconds(call) for _ in range(times))
                copies.append(copied)
                rates[name].append(rate)
                ratios[name].append(rate / copied)
        for name in calls:
            quarters = statistics.quantiles(ratios[name], n=4)
            median = statistics.median(rates[name]) / 1e9
            spread = quarters[2] - quarters[0]
            results.append(Bandwidth(name, size, median, quarters[1], spread))
    return statistics.median(copies) / 1e9, results


def plot(calls: list[Call], bandwidths: list[Bandwidth], path: Path) -> None:
    """Time of a call, and ratio to memcpy, over the size of the buffer; dotted: the targets."""
    figure, (left, right) = plt.subplots(ncols=2, figsize=(10, 3.6), layout="constrained")
    for name in dict.fromkeys(call.name for call in calls):
        own = [call for call in calls if call.name == name]
        left.plot([c.bytes for c in own], [c.microseconds for c in own], marker="o", label=name)
        wide = [bandwidth for bandwidth in bandwidths if bandwidth.name == name]
        right.plot([b.bytes / 2**20 for b in wide], [b.ratio for b in wide], marker="o")
    left.axhline(TARGET_OVERHEAD, color="gray", linestyle=":")
    right.axhline(TARGET_RATIO, color="gray", linestyle=":")
    left.set(xscale="log", xlabel="bytes", ylabel="microseconds per call", ylim=(0, None))
    right.set(xscale="log", xlabel="MiB", ylabel="bandwidth / memcpy", ylim=(0, None))
    left.legend()
    figure.savefig(path, dpi=120)


def marked(value: float, good: bool, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text if good else f"[red]{text}[/red]"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2000, help="calls on each small buffer")
    parser.add_argument("--rounds", type=int, default=15, help="rounds on each large buffer")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    calls = measure_calls(options.repeats)
    memcpy, bandwidths = measure_bandwidth(options.rounds)

    library = MPI.Get_library_version().split(",")[0].split("\n")[0].strip()
    table = Table(title=f"One Reduce_local on a small buffer, {library}")
    table.add_column("operation")
    for heading in ("bytes", "µs", "µs beyond MPI.BOR", "target"):
        table.add_column(heading, justify="right")
    for call in calls:
        shown = ["", ""]
        if call.overhead is not None:
            good = call.overhead < TARGET_OVERHEAD
            shown = [marked(call.overhead, good, 1), f"< {TARGET_OVERHEAD:.0f}"]
        table.add_row(call.name, str(call.bytes), f"{call.microseconds:.1f}", *shown)
    Console().print(table)

    table = Table(title=f"Large buffers, {host.best_instruction_set()}, memcpy {memcpy:.1f} GB/s")
    table.add_column("operation")
    for heading in ("MiB", "GB/s", "ratio to memcpy", "spread", "target"):
        table.add_column(heading, justify="right")
    for own in bandwidths:
        judged = own.name in BITS and own.bytes == LARGE[-1]
        table.add_row(
            own.name,
            str(own.bytes >> 20),
            f"{own.gigabytes_per_second:.1f}",
            marked(own.ratio, not judged or own.ratio >= TARGET_RATIO, 2),
            f"{own.spread:.2f}",
            f"{TARGET_RATIO}" if judged else "",
        )
    Console().print(table)

    options.output.mkdir(parents=True, exist_ok=True)
    report = {
        "repeats": options.repeats,
        "rounds": options.rounds,
        "machine": platform.processor() or platform.machine(),
        "instruction_set": host.best_instruction_set(),
        "mpi": library,
        "memcpy_gigabytes_per_second": memcpy,
        "calls": [asdict(call) for call in calls],
        "bandwidths": [asdict(own) for own in bandwidths],
    }
    (options.output / "op.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(calls, bandwidths, options.output / "op.png")
    print(f"Wrote {options.output / 'op.json'} and {options.output / 'op.png'}")


if __name__ == "__main__":
    main()
