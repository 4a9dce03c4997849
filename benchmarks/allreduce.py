"""Allreduce of one large tensor: Horovod, Open MPI and this project, in one run.

    python benchmarks/allreduce.py                     # 4 hosts with 1 Gbit/s links, where root
    python benchmarks/allreduce.py --rate 200mbit --elements 4000000

Starts two jobs under mpirun, one after the other on the same hosts: those of tools/testbed.py where
the machine allows it, else loopback (which says little about a network; the caption tells). One job
is Horovod's; the other is plain MPI, because Horovod's own thread talks every millisecond, which
other programs do not pay for. Every round of a job runs each of its methods once, in turn. Prints a
table of medians with ratios to Horovod's float32 and to the bandwidth bound 2 (n - 1) / n * bytes /
rate; writes allreduce.json and allreduce.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BASELINE = "Horovod float32"


# Name -> (bytes per element, one Allreduce of `count` elements).
Levels = Literal["standard", "exponential", "two-hop"]
Methods = dict[str, tuple[float, Callable[[], object]]]


def horovod_methods(array: Any) -> Methods:
    """Horovod's own, and GlobalQSGD in place of its compression."""
    import horovod.torch as hvd
    import torch

    from gq_horovod.torch import GlobalQSGD, allreduce

    torch.set_num_threads(1)
    hvd.init()
    tensor = torch.from_numpy(array)
    half = tensor.half()

    def compressed(name: str, **options: Any) -> Callable[[], object]:
        compression = GlobalQSGD(**options)
        return lambda: allreduce(tensor, name, compression=compression)

    found: Methods = {
        BASELINE: (4, lambda: hvd.allreduce(tensor, name="float32")),
        "Horovod float16": (2, lambda: hvd.allreduce(half, name="float16")),
    }
    for transport, label in (("horovod", "GlobalQSGD"), ("mpi", "GlobalQSGD over mpi")):
        for levels in ("standard", "exponential", "two-hop"):
            for bits in (8, 4):
                name = f"{label}, {levels} {bits} bit"
                call = compressed(name, levels=levels, bits=bits, transport=transport)
                found[name] = (bits / 8, call)
    return found


def mpi_methods(array: Any) -> Methods:
    """Open MPI's own Allreduce, and ours."""
    from mpi4py import MPI

    from mpi_ops.reduction import allreduce

    comm = MPI.COMM_WORLD
    result = np.empty_like(array)

    def compressed(levels: Levels, bits: int) -> Callable[[], object]:
        return lambda: allreduce(array, comm, levels=levels, bits=bits, out=result)

    return {
        "Open MPI float32": (4, lambda: comm.Allreduce(array, result)),
        "mpi_ops standard 8 bit": (1, compressed("standard", 8)),
        "mpi_ops standard 4 bit": (0.5, compressed("standard", 4)),
        "mpi_ops exponential 8 bit": (1, compressed("exponential", 8)),
        "mpi_ops exponential 4 bit": (0.5, compressed("exponential", 4)),
        "mpi_ops two-hop 8 bit": (1, compressed("two-hop", 8)),
        "mpi_ops two-hop 4 bit": (0.5, compressed("two-hop", 4)),
    }


JOBS = {"horovod": horovod_methods, "mpi": mpi_methods}


def run_rank(job: str, count: int, rounds: int) -> None:
    """One rank: rank 0 prints a line of JSON with the seconds of every method and round."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    array = np.random.default_rng(comm.rank).standard_normal(count, dtype=np.float32)
    everything = JOBS[job](array)
    for _, call in everything.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in everything}
    for number in range(rounds):
        for name, (_, call) in everything.items():
            comm.Barrier()
            begin = time.perf_counter()
            call()
            comm.Barrier()
            seconds[name].append(time.perf_counter() - begin)
        if comm.rank == 0:
            print(f"{job}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    if comm.rank == 0:
        sizes = {name: size for name, (size, _) in everything.items()}
        print("RESULT " + json.dumps({"seconds": seconds, "bytes_per_element": sizes}), flush=True)


def launch(options: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks of both jobs and return what rank 0 printed, and where they ran."""
    sys.path.insert(0, str(ROOT))
    from tools import ranks, testbed

    reason = testbed.unavailable()
    merged: dict[str, Any] = {"seconds": {}, "bytes_per_element": {}, "shaped": reason is None}
    with contextlib.ExitStack() as stack:
        if reason is None:
            bed = stack.enter_context(testbed.Testbed(options.ranks, options.rate))
            merged["where"] = f"{options.ranks} hosts (network namespaces), links of {options.rate}"
        else:
            bed = None
            merged["where"] = f"loopback of one host ({reason})"
        for job in JOBS:
            script = [sys.executable, str(Path(__file__).resolve()), "--job", job]
            script += ["--elements", str(options.elements), "--rounds", str(options.rounds)]
            output = subprocess.run(
                [*ranks.mpirun(bed, options.ranks), *script],
                env=ranks.environment(),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                timeout=options.timeout,
            ).stdout
            line = next(line for line in output.splitlines() if line.startswith("RESULT "))
            for key, value in json.loads(line.removeprefix("RESULT ")).items():
                merged[key] |= value
    return merged


def bits_per_second(rate: str) -> float:
    """A rate as tc writes it, "200mbit" or "1gbit"."""
    match = re.fullmatch(r"([\d.]+)([kmg])bit", rate)
    if match is None:
        raise SystemExit(f"--rate must look like 200mbit or 1gbit, got {rate!r}.")
    return float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]]


def report(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the table and write the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from rich.console import Console
    from rich.table import Table

    share = 2 * (options.ranks - 1) / options.ranks
    table = Table(
        title=f"Allreduce of {options.elements} elements, {result['where']}, "
        f"median of {options.rounds} rounds"
    )
    table.add_column("method", no_wrap=True)
    for heading in ("ms", "spread", "speed-up", "/ bound"):
        table.add_column(heading, justify="right")
    rows = {}
    baseline = statistics.median(result["seconds"][BASELINE])
    for name, seconds in result["seconds"].items():
        median = statistics.median(seconds)
        quarters = statistics.quantiles(seconds, n=4)
        size = result["bytes_per_element"][name] * options.elements
        bound = share * size * 8 / bits_per_second(options.rate)
        rows[name] = {
            "milliseconds": 1e3 * median,
            "spread": 1e3 * (quarters[2] - quarters[0]),
            "speedup": baseline / median,
            "bound": median / bound if result["shaped"] else None,
        }
        table.add_row(
            name,
            f"{rows[name]['milliseconds']:.0f}",
            f"{rows[name]['spread']:.0f}",
            f"{rows[name]['speedup']:.2f}",
            f"{median / bound:.2f}" if result["shaped"] else "",
        )
    Console().print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    document = {
        "elements": options.elements,
        "ranks": options.ranks,
        "where": result["where"],
        "rate": options.rate,
        "results": rows,
        "seconds": result["seconds"],
    }
    (options.output / "allreduce.json").write_text(json.dumps(document, indent=2) + "\n")
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(rows) + 1.2), layout="constrained")
    axes.barh(list(rows), [row["milliseconds"] for row in rows.values()])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_title(f"Allreduce of {options.elements} elements, {result['where']}", fontsize=9)
    figure.savefig(options.output / "allreduce.png", dpi=120)
    print(f"Wrote {options.output / 'allreduce.json'} and {options.output / 'allreduce.png'}")


def main() -> None:
    """Launch the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--elements", type=int, default=16_000_000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rate", default="1gbit", help="of every host's link")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--timeout", type=float, default=900, help="seconds")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)  # be a rank of it
    options = parser.parse_args()
    if options.job:
        run_rank(options.job, options.elements, options.rounds)
    else:
        bits_per_second(options.rate)
        report(launch(options), options)


if __name__ == "__main__":
    main()
