"""Allreduce of one tensor: Horovod, Open MPI and this project, in one run.

    python benchmarks/allreduce.py                     # 4 hosts with 1 Gbit/s links, where root
    python benchmarks/allreduce.py --rates 200mbit --elements 4000000
    python benchmarks/allreduce.py --rates 200mbit,1gbit,10gbit,loopback \\
        --elements 256,4096,65536,1048576,16777216,67108864          # 1 kB to 256 MB

For each rate, starts two jobs under mpirun, one after the other on the same hosts: those of
tools/testbed.py where the machine allows it, else loopback (which says little about a network; the
caption tells). One job is Horovod's; the other is plain MPI, because Horovod's own thread talks
every millisecond, which other programs do not pay for. Every round of a job runs each of its
methods once, in turn. Horovod's reduce the gradient of an optimizer, in place; the others write to
memory that is there. Prints tables of medians with ratios to Horovod's float32, and for one size to
the bandwidth bound 2 (n - 1) / n * bytes / rate; writes allreduce.json and allreduce.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import ranks as launcher  # noqa: E402
from tools import testbed  # noqa: E402

BASELINE = "Horovod float32"
LOOPBACK = "loopback"
RESULT = "RESULT "  # begins the line that a process prints for the one that started it


# Name -> (bytes per element, one Allreduce of `count` elements).
Levels = Literal["standard", "exponential", "two-hop"]
Methods = dict[str, tuple[float, Callable[[], object]]]


def horovod_methods(array: Any) -> Methods:
    """Horovod's own, and others in place of its compression; names carry the size."""
    import horovod.torch as hvd
    import torch

    from gq_horovod.research.baselines import QSGDConfig
    from gq_horovod.research.code_length import qsgd_code_length
    from gq_horovod.research.torch_baselines import QSGD, IntSGD
    from gq_horovod.torch import GlobalQSGD

    torch.set_num_threads(1)
    hvd.init()
    tensor = torch.from_numpy(array)
    parameter = torch.nn.Parameter(torch.empty_like(tensor))
    parameter.grad = tensor

    def compressed(name: str, compression: Any) -> Callable[[], object]:
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([parameter], lr=0.0),
            named_parameters=[(f"{name}.{array.size}", parameter)],
            compression=compression,
        )
        synchronize: Callable[[], object] = optimizer.synchronize
        return synchronize

    found: Methods = {
        BASELINE: (4, compressed("float32", hvd.Compression.none)),
        "Horovod float16": (2, compressed("float16", hvd.Compression.fp16)),
        "QSGD, 8 bit": (1, compressed("qsgd", QSGD(bits=8, min_elements=0))),
        "QSGD, 4 bit": (0.5, compressed("qsgd 4", QSGD(bits=4, min_elements=0))),
        "IntSGD, 8 bit": (
            1,
            compressed("intsgd", IntSGD(bits=8, scale="gradient", min_elements=0)),
        ),
    }
    elias = {
        "QSGD, 8 bit, l2, Elias": QSGDConfig(norm="l2", coding="elias", min_elements=0),
        "QSGD, 4 bit, Elias": QSGDConfig(bits=4, coding="elias", min_elements=0),
    }
    for name, config in elias.items():
        size = qsgd_code_length(array, config).elias_gamma / 8
        found[name] = (size, compressed(name, QSGD(**config.describe())))
    for transport, label in (("horovod", "GlobalQSGD"), ("mpi", "GlobalQSGD over mpi")):
        for levels in ("standard", "exponential", "two-hop"):
            for bits in (8, 4):
                name = f"{label}, {levels} {bits} bit"
                compression = GlobalQSGD(
                    levels=levels,  # type: ignore[arg-type]
                    bits=bits,
                    transport=transport,  # type: ignore[arg-type]
                    min_elements=0,
                )
                found[name] = (bits / 8, compressed(name, compression))
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


def run_rank(job: str, counts: list[int], rounds: int, budget: float) -> None:
    """One rank: rank 0 prints a line of JSON with the seconds of every size, method and round."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    sizes: dict[str, float] = {}
    seconds: dict[int, dict[str, list[float]]] = {}
    for count in counts:
        source = np.random.default_rng(comm.rank).standard_normal(count, dtype=np.float32)
        array = source.copy()
        everything = JOBS[job](array)
        sizes = {name: size for name, (size, _) in everything.items()}
        for _, call in everything.values():
            call()
        own = seconds[count] = {name: [] for name in everything}
        started = time.perf_counter()
        for number in range(rounds):
            for name, (_, call) in everything.items():
                np.copyto(array, source)  # means are where the gradient was
                comm.Barrier()
                begin = time.perf_counter()
                call()
                comm.Barrier()
                own[name].append(time.perf_counter() - begin)
            late = bool(budget) and time.perf_counter() - started > budget
            if comm.rank == 0:
                text = f"{job}: {count} elements, round {number + 1} of {rounds}"
                print(text, file=sys.stderr, flush=True)
            if number >= 1 and comm.bcast(late):
                break
    if comm.rank == 0:
        print(RESULT + json.dumps({"seconds": seconds, "bytes_per_element": sizes}), flush=True)


def result_in(output: str) -> dict[str, Any]:
    """What a process of ours printed for the one that started it, behind a launcher's prefix."""
    line = next(line for line in output.splitlines() if RESULT in line)
    found: dict[str, Any] = json.loads(line.partition(RESULT)[2])
    return found


def launch(options: argparse.Namespace, rate: str) -> dict[str, Any]:
    """Start the ranks of both jobs and return what rank 0 printed, and where they ran."""
    reason = "asked for" if rate == LOOPBACK else testbed.unavailable()
    merged: dict[str, Any] = {
        "rate": rate,
        "shaped": reason is None,
        "bytes_per_element": {},
        "seconds": {count: {} for count in options.elements},
    }
    with contextlib.ExitStack() as stack:
        if reason is None:
            bed = stack.enter_context(testbed.Testbed(options.ranks, rate))
            merged["where"] = f"{options.ranks} hosts (network namespaces), links of {rate}"
        else:
            bed = None
            merged["where"] = f"loopback of one host ({reason})"
        for job in JOBS:
            script = [sys.executable, str(Path(__file__).resolve()), "--job", job]
            script += ["--elements", ",".join(map(str, options.elements))]
            script += ["--rounds", str(options.rounds), "--budget", str(options.budget)]
            output = subprocess.run(
                [*launcher.mpirun(bed, options.ranks), *script],
                env=launcher.environment() | {"HOROVOD_CYCLE_TIME": str(options.cycle_time)},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                timeout=options.timeout,
            ).stdout
            found = result_in(output)
            merged["bytes_per_element"] |= found["bytes_per_element"]
            for count in options.elements:
                merged["seconds"][count] |= found["seconds"][str(count)]
    return merged


def rates(text: str) -> list[str]:
    """Those of --rates, separated by commas, for argparse."""
    found = text.split(",")
    for rate in found:
        try:
            if rate != LOOPBACK:
                testbed.bits_per_second(rate)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return found


def summarize(result: dict[str, Any], count: int, ranks: int) -> dict[str, dict[str, Any]]:
    """A row of figures for each method."""
    seconds = result["seconds"][count]
    baseline = statistics.median(seconds[BASELINE])
    rows = {}
    for name, own in seconds.items():
        median = statistics.median(own)
        quarters = statistics.quantiles(own, n=4) if len(own) > 1 else [median] * 3
        bound = None
        if result["shaped"]:
            sent = 2 * (ranks - 1) / ranks * result["bytes_per_element"][name] * count
            bound = median / (8 * sent / testbed.bits_per_second(result["rate"]))
        rows[name] = {
            "milliseconds": 1e3 * median,
            "spread": 1e3 * (quarters[2] - quarters[0]),
            "rounds": len(own),
            "speedup": baseline / median,
            "bound": bound,
        }
    return rows


def print_size(rows: dict[str, dict[str, Any]], title: str) -> None:
    """The table of one size."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    for heading in ("ms", "spread", "rounds", "speed-up", "/ bound"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        cells = [
            f"{row['milliseconds']:.3g}"
            if row["milliseconds"] < 100
            else f"{row['milliseconds']:.0f}"
        ]
        cells += [f"{row['spread']:.3g}", str(row["rounds"]), f"{row['speedup']:.2f}"]
        table.add_row(name, *cells, "" if row["bound"] is None else f"{row['bound']:.2f}")
    Console().print(table)


def print_sizes(by_size: dict[int, dict[str, dict[str, Any]]], title: str) -> None:
    """The table of several sizes: times as fast as Horovod's float32, whose milliseconds it has."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    for count in by_size:
        table.add_column(size_in_words(4 * count), justify="right", no_wrap=True)
    baseline = [rows[BASELINE]["milliseconds"] for rows in by_size.values()]
    table.add_row(f"{BASELINE}, ms", *(f"{value:.4g}" for value in baseline), end_section=True)
    for name in next(iter(by_size.values())):
        if name != BASELINE:
            table.add_row(name, *(f"{rows[name]['speedup']:.2f}" for rows in by_size.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def size_in_words(size: int) -> str:
    """Bytes, as people say them."""
    for unit, number in (("MB", 1 << 20), ("kB", 1 << 10)):
        if size >= number:
            return f"{size / number:.3g} {unit}"
    return f"{size} B"


def style(name: str) -> dict[str, str]:
    """How a method is drawn: colour for the levels, dashes for 4 bits, a marker for what carries.

    Horovod's and Open MPI's own are black and grey.
    """
    colours = {"standard": "C0", "exponential": "C1", "two-hop": "C2", "Int": "C4", "QSGD,": "C3"}
    markers = {"GlobalQSGD,": "o", "GlobalQSGD over mpi": "^", "mpi_ops": "s"}
    plain = {BASELINE: "black", "Horovod float16": "black", "Open MPI float32": "grey"}
    return {
        "color": plain.get(name) or next(c for levels, c in colours.items() if levels in name),
        "marker": next((m for path, m in markers.items() if name.startswith(path)), "."),
        "ls": "--" if "4 bit" in name or "16" in name else "-",
    }


def plot(jobs: list[dict[str, Any]], path: Path) -> None:
    """Bars for one size; for several, times as fast as Horovod's float32 against the size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(next(iter(jobs[0]["results"].values())))
    several = len(jobs[0]["results"]) > 1
    wide, high = (4.6, 4.4) if several else (6.5, 0.4 * len(names) + 1.2)
    figure, panels = plt.subplots(
        1,
        len(jobs),
        figsize=(wide * len(jobs) + 1.5, high),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for panel, job in zip(panels[0], jobs, strict=True):
        panel.set_title(job["where"], fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
        if not several:
            (rows,) = job["results"].values()
            panel.barh(names, [row["milliseconds"] for row in rows.values()])
            panel.set_xlabel("milliseconds")
            continue
        sizes = [4 * count for count in job["results"]]
        for name in names:
            speedups = [rows[name]["speedup"] for rows in job["results"].values()]
            panel.plot(sizes, speedups, label=name, lw=1.2, ms=4, **style(name))
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xlabel("bytes of the tensor")
        panel.set_xticks(sizes, [size_in_words(size) for size in sizes], fontsize=7, rotation=45)
    if several:
        panels[0][0].set_ylabel("times as fast as Horovod's float32")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right", fontsize=7)
    else:
        panels[0][0].invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Launch the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--elements", default="16000000", help="sizes, separated by commas")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument(
        "--rates", type=rates, default="1gbit", help=f"of every host's link, or {LOOPBACK}"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=0, help="seconds for a size (0: no limit)")
    parser.add_argument("--cycle-time", type=float, default=1, help="Horovod's, ms (default 1)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for a job")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)  # be a rank of it
    options = parser.parse_args()
    options.elements = [int(count) for count in options.elements.split(",")]
    if options.job:
        run_rank(options.job, options.elements, options.rounds, options.budget)
        return
    jobs = []
    for rate in options.rates:
        result = launch(options, rate)
        result["results"] = {
            count: summarize(result, count, options.ranks) for count in options.elements
        }
        if len(options.elements) == 1:
            title = f"Allreduce of {options.elements[0]} elements, {result['where']}"
            print_size(result["results"][options.elements[0]], title)
        else:
            print_sizes(result["results"], f"times as fast as {BASELINE}, {result['where']}")
        jobs.append(result)
        # After each rate, so that a run that is interrupted leaves something.
        options.output.mkdir(parents=True, exist_ok=True)
        document = {"ranks": options.ranks, "cycle_ms": options.cycle_time, "jobs": jobs}
        stem = options.output / "allreduce"
        stem.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n")
        plot(jobs, stem.with_suffix(".png"))
    print(f"Wrote {stem.with_suffix('.json')} and {stem.with_suffix('.png')}")


if __name__ == "__main__":
    main()
