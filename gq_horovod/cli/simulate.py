"""`gq-horovod simulate`: the paper's workloads on many ranks, by the model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..advisor import calibrate, gpu_nodes, model
from ..advisor.model import NONE, Cluster
from . import paper
from .output import add_common, new_plot, rich
from .units import bandwidth, listed, named_number, rank_count, workload_compute, written_seconds

WORKERS, RATES = (64, 256, 1024, 4096), (2e8, 1e9, 5e9, 1e10, 2.5e10)
SIMULATED = (
    model.FP16,
    model.STANDARD,
    model.EXPONENTIAL,
    model.TWO_HOP,
    model.STANDARD_MPI,
    model.EXPONENTIAL_MPI,
    model.TWO_HOP_MPI,
)


def add_to(commands: Any) -> None:
    """The command's arguments."""
    sub = commands.add_parser("simulate", help="the paper's workloads on 64 to 4096 ranks")
    sub.set_defaults(run=simulate)
    sub.add_argument(
        "--paper",
        action="store_true",
        help="the paper's table of 64 nodes with a GPU each, and where each input is from",
    )
    sub.add_argument(
        "--gpus-per-node",
        type=listed(rank_count),
        metavar="NUMBERS",
        help="the same inputs for nodes with so many GPUs, such as 1,8, and 64 to 4096 GPUs",
    )
    sub.add_argument(
        "--input",
        type=named_number,
        action="append",
        metavar="NAME=NUMBER",
        help="with --paper or --gpus-per-node: replaces an input of their list",
    )
    sub.add_argument(
        "--workers",
        type=listed(rank_count),
        help="ranks in all, with commas (default 64,256,1024,4096; with --paper alone 64)",
    )
    sub.add_argument(
        "--bandwidth",
        type=listed(bandwidth),
        help="of a host's link, with commas (default 200Mbit,1Gbit,5Gbit,10Gbit,25Gbit; with "
        "--paper or --gpus-per-node 100Gbit,10Gbit,1Gbit)",
    )
    defaults = ", ".join(f"{w.name}={written_seconds(w.compute)}" for w in model.WORKLOADS)
    sub.add_argument(
        "--compute",
        type=workload_compute,
        action="append",
        metavar="NAME=DURATION",
        help=f"compute time of a step (default {defaults})",
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
        for ranks in options.workers or WORKERS:
            for rate in options.bandwidth or RATES:
                cluster = replace(start, ranks=ranks, ranks_per_host=1, bandwidth=rate)
                base = model.step_time(NONE, sizes, cluster, seconds, options.overlap)
                rows.append(
                    {
                        "workload": workload.name,
                        "ranks": ranks,
                        "bandwidth": rate,
                        "step_compute_seconds": seconds,
                        "none_seconds": base,
                        "paper_model": model.paper_step_speed_up(
                            workload.parameters, cluster, seconds
                        ),
                        "speedups": {
                            method.name: base
                            / model.step_time(method, sizes, cluster, seconds, options.overlap)
                            for method in SIMULATED
                        },
                    }
                )
    return rows


def simulate(options: argparse.Namespace) -> None:
    """`gq-horovod simulate`."""
    if options.paper or options.gpus_per_node:
        found = paper.table(options)
        if options.plot is not None:
            direct = [row for row in found["rows"] if row["path"] == gpu_nodes.NCCL]
            kind = max(row["gpus_per_node"] for row in direct)  # one picture, of the largest nodes
            direct = [row for row in direct if row["gpus_per_node"] == kind]
            plot_simulation(direct, options.plot)
        paper.show(found, options.json)
        return
    if options.input:
        raise ValueError(
            "--input: expected --paper or --gpus-per-node beside it, got neither; give one of them."
        )
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
        [
            *("ranks", "Gbit/s", "none"),
            *(method.name.replace(", ", ",\n") for method in SIMULATED),
            "paper",
        ],
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
    print(f"Compute times of a step (--compute): {listing}; docs/advisor.md says where from.")


def plot_simulation(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-ups against bandwidth, a panel for each workload, for fewest and most workers."""
    names = list(dict.fromkeys(row["workload"] for row in rows))
    ranks = sorted({row["ranks"] for row in rows})
    figure, panels = new_plot(len(names))
    methods = dict.fromkeys(name for row in rows for name in row["speedups"] if name != NONE.name)
    for panel, name in zip(panels, names, strict=True):
        for color, method in enumerate(methods):
            for workers, style in {ranks[0]: "-", ranks[-1]: ":"}.items():
                points = [r for r in rows if (r["workload"], r["ranks"]) == (name, workers)]
                points = [r for r in points if method in r["speedups"]]
                panel.semilogx(
                    [row["bandwidth"] / 1e9 for row in points],
                    [row["speedups"][method] for row in points],
                    style,
                    color=f"C{color}",
                    label=f"{method}, {workers} ranks",
                )
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("Gbit/s")
    for what, value in model.PUBLISHED[:1]:
        panels[names.index("DeepLight")].axhline(value, color="gray", linewidth=1, label=what)
    panels[0].set_ylabel("predicted speed-up over none")
    panels[0].legend(fontsize=6)
    figure.savefig(path, dpi=120)
