"""`gq-horovod simulate`: the paper's workloads on many ranks, by the model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..advisor import calibrate, model
from ..advisor.model import NONE, Cluster
from .output import add_common, new_plot, rich
from .units import bandwidth, listed, rank_count, workload_compute, written_seconds

SIMULATED = (
    model.FP16,
    model.STANDARD,
    model.EXPONENTIAL,
    model.STANDARD_MPI,
    model.EXPONENTIAL_MPI,
)


def add_to(commands: Any) -> None:
    """The command's arguments."""
    sub = commands.add_parser("simulate", help="the paper's workloads on 64 to 4096 ranks")
    sub.set_defaults(run=simulate)
    sub.add_argument("--workers", type=listed(rank_count), default=[64, 256, 1024, 4096])
    sub.add_argument(
        "--bandwidth",
        type=listed(bandwidth),
        default=[2e8, 1e9, 5e9, 1e10, 2.5e10],
        help="with commas (default 200Mbit,1Gbit,5Gbit,10Gbit,25Gbit)",
    )
    defaults = ", ".join(f"{w.name}={written_seconds(w.compute)}" for w in model.WORKLOADS)
    sub.add_argument(
        "--compute",
        type=workload_compute,
        action="append",
        metavar="NAME=DURATION",
        help=f"compute time of a step, assumed: {defaults}",
    )
    add_common(sub)


def simulation(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Speed-ups over none of every workload, number of workers and bandwidth, as plain data."""
    compute = dict(options.compute or [])
    start = Cluster(ranks=2, bandwidth=1e9)
    if options.calibration is not None:
        start = calibrate.load(options.calibration)
    rows = []
    for workload in model.WORKLOADS:
        seconds = compute.get(workload.name, workload.compute)
        sizes = [workload.parameters]
        for ranks in options.workers:
            for rate in options.bandwidth:
                cluster = replace(start, ranks=ranks, ranks_per_host=1, bandwidth=rate)
                base = model.step_time(NONE, sizes, cluster, seconds, options.overlap)
                rows.append(
                    {
                        "workload": workload.name,
                        "ranks": ranks,
                        "bandwidth": rate,
                        "step_compute_seconds": seconds,
                        "none_seconds": base,
                        "paper_model": paper_speedup(workload.parameters, cluster, seconds),
                        "speedups": {
                            method.name: base
                            / model.step_time(method, sizes, cluster, seconds, options.overlap)
                            for method in SIMULATED
                        },
                    }
                )
    return rows


def paper_speedup(parameters: int, cluster: Cluster, compute: float) -> float:
    """Speed-up of a step by the paper's own model: 8 bits, ω = 1, full bandwidth, no overlap."""
    size = model.FLOAT32_BYTES * parameters
    beta, gamma = cluster.bandwidth / 8, cluster.kernels.sum / 3  # a sum moves three bytes for one
    arguments = (cluster.ranks, size, cluster.latency, beta, gamma)
    plain = model.paper_allreduce(*arguments)
    return (compute + plain) / (compute + model.paper_compressed_allreduce(*arguments, omega=1.0))


def simulate(options: argparse.Namespace) -> None:
    """`gq-horovod simulate`."""
    rows = simulation(options)
    if options.plot is not None:
        plot_simulation(rows, options.plot)
    if options.json:
        published = [{"what": what, "speedup": value} for what, value in model.PUBLISHED]
        print(json.dumps({"rows": rows, "published": published}, indent=2))
        return
    console, table_of = rich()
    table = table_of(
        "Predicted speed-up of a step over none",
        ["workload"],
        ["ranks", "Gbit/s", "none", *(method.name for method in SIMULATED), "paper"],
    )
    for row in rows:
        table.add_row(
            row["workload"],
            str(row["ranks"]),
            f"{row['bandwidth'] / 1e9:g}",
            written_seconds(row["none_seconds"]),
            *(f"{value:.2f}" for value in row["speedups"].values()),
            f"{row['paper_model']:.2f}",
        )
    console.print(table)
    print("Published (arXiv 2305.18627 and its poster, over the authors' own float32 tree):")
    for what, value in model.PUBLISHED:
        print(f"- {what}: {value:.2f}x")
    computes = {row["workload"]: row["step_compute_seconds"] for row in rows}
    listing = ", ".join(f"{name} {written_seconds(value)}" for name, value in computes.items())
    print(
        "Column paper: the paper's model, without overlap, at full bandwidth, 8 bits on any scale."
    )
    print(f"Compute times of a step are assumptions (--compute): {listing}.")


def plot_simulation(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-ups against bandwidth, a panel for each workload, for fewest and most workers."""
    names = list(dict.fromkeys(row["workload"] for row in rows))
    ranks = sorted({row["ranks"] for row in rows})
    figure, panels = new_plot(len(names))
    for panel, name in zip(panels, names, strict=True):
        for color, method in enumerate(SIMULATED):
            for workers, style in {ranks[0]: "-", ranks[-1]: ":"}.items():
                points = [r for r in rows if (r["workload"], r["ranks"]) == (name, workers)]
                panel.semilogx(
                    [row["bandwidth"] / 1e9 for row in points],
                    [row["speedups"][method.name] for row in points],
                    style,
                    color=f"C{color}",
                    label=f"{method.name}, {workers} ranks",
                )
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("Gbit/s")
    for what, value in model.PUBLISHED[:1]:
        panels[names.index("DeepLight")].axhline(value, color="gray", linewidth=1, label=what)
    panels[0].set_ylabel("predicted speed-up over none")
    panels[0].legend(fontsize=6)
    figure.savefig(path, dpi=120)
