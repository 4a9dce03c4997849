"""`gq-horovod report`: tables and plots of training runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..research import report
from ..research.beside import how_many
from .output import new_plot, rich


def add_to(commands: Any) -> None:
    """The command's arguments."""
    sub = commands.add_parser("report", help="tables and plots of training runs")
    sub.set_defaults(run=run)
    sub.add_argument(
        "results", type=Path, nargs="+", help="folders of files that --metrics wrote, or such files"
    )
    sub.add_argument(
        "--output", type=Path, help="folder for plots (default: that of the first results)"
    )
    sub.add_argument("--json", action="store_true", help="print plain data instead of tables")


def run(options: argparse.Namespace) -> None:
    """Print the tables of the runs below some folders, and draw their curves."""
    runs, remarks = report.collect(*options.results)
    groups = report.summarize(runs)
    if options.json:
        print(json.dumps({"groups": groups, "remarks": remarks}, indent=2))
    else:
        report.print_tables(groups, remarks, *rich())
    folder = options.output
    if folder is None and not options.json:
        place: Path = options.results[0]
        folder = place if place.is_dir() else place.parent
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[str, int] = {}
    for group in groups:
        own = [run for run in runs if run.group == tuple(group[key] for key in report.GROUP)]
        figure, axes = new_plot(3)
        report.plot(own, axes)
        name = f"report-{group['workload']}-{group['preset']}-{group['ranks']}"
        names[name] = names.get(name, 0) + 1  # groups may differ in hosts or batches alone
        number = f"-{names[name]}" if names[name] > 1 else ""
        path = folder / f"{name}{number}.png"
        ranks = how_many(group["ranks"], "rank")
        figure.suptitle(f"{group['workload']} ({group['preset']}), {ranks}")
        figure.savefig(path, dpi=120)
        if not options.json:
            print(f"Plot: {path}")
