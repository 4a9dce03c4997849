"""Throughput of the host kernels on one core or several, beside memcpy in the same run.

Counts bytes read plus bytes written by the algorithm, for the kernels and for memcpy alike. Each
round times memcpy before every kernel, so that both see the same machine; the ratio is the median
over rounds. memcpy has one thread, however many the kernels have. Prints a table, writes
kernels.json and kernels.png.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mpi_ops import lanes
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels import host
from mpi_ops.kernels.host import Buffer
from mpi_ops.kernels.threads import set_threads
from mpi_ops.scheme import Scheme

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLOCK_SIZE = 256
# What this project aims at, as a ratio to memcpy.
TARGETS = {
    "absmax": 1.2,
    "quantize standard 8 bit": 0.9,
    "dequantize standard 8 bit": 1.0,
    "quantize exponential 8 bit": 0.9,
    "dequantize exponential 8 bit": 1.0,
    "reduce exponential 8 bit, 2 inputs": 0.5,
    "reduce exponential 8 bit, 4 inputs": 0.5,
}


@dataclass
class Case:
    """A kernel call and the bytes that it reads and writes."""

    name: str
    bytes: int
    call: Callable[[], object]


@dataclass
class Result:
    """Medians over rounds; `spread` is the interquartile range of the ratio."""

    name: str
    gigabytes_per_second: float
    ratio: float
    spread: float
    target: float | None


def aligned(count: int, dtype: type) -> np.ndarray:
    """Zeros at a multiple of 64 bytes, as the allocators of torch and TensorFlow give."""
    item = np.dtype(dtype).itemsize
    raw = np.zeros(count * item + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * item].view(dtype)


def cases(count: int) -> list[Case]:
    """Every kernel on `count` float32 elements."""
    x = aligned(count, np.float32)
    x[:] = np.random.default_rng(0).standard_normal(count, dtype=np.float32)
    y = aligned(count, np.float32)
    source, target = Buffer.of(x), Buffer.of(y)
    norms = host.absmax(source, BLOCK_SIZE)
    random = dither(0, "benchmark", 0, 0, Stage.QUANTIZE)
    scratch = np.zeros_like(norms)
    found = [
        # What no kernel that only reads can exceed: NumPy's vectorized reduction, no arithmetic.
        Case("plain read", x.nbytes, lambda: np.bitwise_or.reduce(x.view(np.uint64))),
        Case("absmax", x.nbytes, lambda: host.absmax(source, BLOCK_SIZE, scratch)),
        Case("l2 norm", x.nbytes, lambda: host.l2norm(source, BLOCK_SIZE, scratch)),
    ]
    plans = [Scheme(levels="standard", bits=bits).plan(1) for bits in (8, 4, 10, 16)]
    plans += [Scheme(levels="two-hop", bits=bits).plan(1) for bits in (8, 6, 5, 4)]
    for plan in plans:
        payload = aligned(lanes.standard_words(count, plan.bits), np.int32)
        shared = {"block_size": BLOCK_SIZE, "bits": plan.bits, "square": plan.square}
        quantize = {**shared, "levels": plan.level_count, "dither": random}
        decode = {**shared, "divisor": plan.units}
        found += [
            Case(
                f"quantize {plan.levels} {plan.bits} bit",
                x.nbytes + payload.nbytes,
                lambda p=payload, o=quantize: host.quantize_standard(source, norms, out=p, **o),
            ),
            Case(
                f"dequantize {plan.levels} {plan.bits} bit",
                x.nbytes + payload.nbytes,
                lambda p=payload, o=decode: host.dequantize_standard(p, norms, target, **o),
            ),
        ]
    for bits in (8, 4):
        levels = lanes.levels(bits, 1)
        payload = host.quantize_standard(
            source, norms, block_size=BLOCK_SIZE, bits=bits, levels=levels, dither=random
        )
        room = aligned(host.elias_words(count, bits), np.int64)
        decoded = np.zeros_like(payload)
        stream = room[: host.encode_elias(payload, count, bits=bits, out=room)]
        found += [
            Case(
                f"encode Elias {bits} bit",
                payload.nbytes + stream.nbytes,
                lambda p=payload, b=bits, r=room: host.encode_elias(p, count, bits=b, out=r),
            ),
            Case(
                f"decode Elias {bits} bit",
                payload.nbytes + stream.nbytes,
                lambda d=decoded, b=bits, s=stream: host.decode_elias(s, count, bits=b, out=d),
            ),
        ]
    for bits in (8, 4):
        codes = aligned(lanes.exponential_bytes(count, bits), np.uint8)
        quantize = {"block_size": BLOCK_SIZE, "bits": bits, "dither": random}
        decode = {"block_size": BLOCK_SIZE, "bits": bits}
        found += [
            Case(
                f"quantize exponential {bits} bit",
                x.nbytes + codes.nbytes,
                lambda c=codes, o=quantize: host.quantize_exponential(source, norms, out=c, **o),
            ),
            Case(
                f"dequantize exponential {bits} bit",
                x.nbytes + codes.nbytes,
                lambda c=codes, o=decode: host.dequantize_exponential(c, norms, target, **o),
            ),
        ]
        result = np.zeros_like(codes)
        for inputs in (2, 4, 8):
            pieces = [codes.copy() for _ in range(inputs)]
            found.append(
                Case(
                    f"reduce exponential {bits} bit, {inputs} inputs",
                    codes.nbytes * (inputs + 1),
                    lambda p=pieces, r=result, b=bits: host.reduce_exponential(
                        p, bits=b, dither=random, factor=1 / len(p), out=r
                    ),
                )
            )
    return found


def seconds(call: Callable[[], object]) -> float:
    """Duration of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(count: int, rounds: int) -> tuple[float, list[Result]]:
    """Median throughput of memcpy in GB/s, and the results of all kernels."""
    everything = cases(count)
    source, target = aligned(count, np.float32), aligned(count, np.float32)
    source[:] = 1.0
    copied = 2 * source.nbytes

    def memcpy() -> None:
        ctypes.memmove(target.ctypes.data, source.ctypes.data, source.nbytes)

    for case in everything:
        case.call()
    rates: dict[str, list[float]] = {case.name: [] for case in everything}
    ratios: dict[str, list[float]] = {case.name: [] for case in everything}
    copies = []
    for _ in track(range(rounds), "Measuring", console=Console(stderr=True)):
        for case in everything:
            copy_rate = copied / seconds(memcpy)
            rate = case.bytes / seconds(case.call)
            copies.append(copy_rate)
            rates[case.name].append(rate)
            ratios[case.name].append(rate / copy_rate)
    results = []
    for case in everything:
        quarters = statistics.quantiles(ratios[case.name], n=4)
        results.append(
            Result(
                case.name,
                statistics.median(rates[case.name]) / 1e9,
                statistics.median(ratios[case.name]),
                quarters[2] - quarters[0],
                TARGETS.get(case.name),
            )
        )
    return statistics.median(copies) / 1e9, results


def plot(results: list[Result], memcpy: float, path: Path) -> None:
    """Bars of the ratios, with memcpy as the line at 1."""
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(results) + 1.4), layout="constrained")
    names = [result.name for result in results]
    axes.barh(names, [result.ratio for result in results], xerr=[r.spread / 2 for r in results])
    for row, result in enumerate(results):
        if result.target is not None:
            axes.plot([result.target] * 2, [row - 0.4, row + 0.4], color="black")
    axes.axvline(1.0, color="gray", linestyle=":")
    axes.invert_yaxis()
    axes.set_xlabel(f"throughput / memcpy ({memcpy:.1f} GB/s); black marks: targets")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=32 << 20, help="float32 elements")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--threads", type=int, default=1, help="of a kernel call; a core for each")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= options.threads <= len(cores):
        parser.error(f"--threads must be between 1 and {len(cores)}, got {options.threads}")
    os.sched_setaffinity(0, cores[-options.threads :])
    set_threads(options.threads)
    memcpy, results = measure(options.elements, options.rounds)

    table = Table(
        title=f"Host kernels, {options.threads} threads, {options.elements} elements, "
        f"{host.best_instruction_set()}"
    )
    table.add_column("kernel")
    for heading in ("GB/s", "ratio to memcpy", "spread", "target"):
        table.add_column(heading, justify="right")
    table.add_row("memcpy", f"{memcpy:.1f}", "1.00", "", "")
    for result in results:
        missed = result.target is not None and result.ratio < result.target
        table.add_row(
            result.name,
            f"{result.gigabytes_per_second:.1f}",
            f"[red]{result.ratio:.2f}[/red]" if missed else f"{result.ratio:.2f}",
            f"{result.spread:.2f}",
            "" if result.target is None else f"{result.target:.1f}",
        )
    Console().print(table)

    options.output.mkdir(parents=True, exist_ok=True)
    report = {
        "elements": options.elements,
        "rounds": options.rounds,
        "machine": platform.processor() or platform.machine(),
        "instruction_set": host.best_instruction_set(),
        "threads": options.threads,
        "memcpy_gigabytes_per_second": memcpy,
        "results": [asdict(result) for result in results],
    }
    (options.output / "kernels.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(results, memcpy, options.output / "kernels.png")
    print(f"Wrote {options.output / 'kernels.json'} and {options.output / 'kernels.png'}")


if __name__ == "__main__":
    main()
