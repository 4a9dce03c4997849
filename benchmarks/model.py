"""The performance model against measurement, on hosts with shaped links.

    python benchmarks/model.py                                  # as root: 1 Gbit/s, then 200 Mbit/s
    python benchmarks/model.py --rates 1gbit --elements 1000000

For each rate, on the hosts of tools/testbed.py: `gq-horovod calibrate`, then rounds of one
Allreduce of every method that the advisor knows (those of benchmarks/allreduce.py, with the casts
of fp16), and the model's predictions from the calibration alone. Prints relative errors,
(predicted - measured) / measured, with the machine's load; writes model.json and model.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import allreduce  # beside this file
import matplotlib
from rich.console import Console
from rich.table import Table

from gq_horovod import calibrate, model

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]


def methods(array: Any) -> allreduce.Methods:
    """The methods of the model, under its names."""
    import horovod.torch as hvd
    import torch

    found: allreduce.Methods = {}
    for name, (size, call) in allreduce.horovod_methods(array).items():
        if name == allreduce.BASELINE:
            found[model.NONE.name] = (size, call)
        elif name.startswith("GlobalQSGD"):
            transport, setting = name.split(", ")
            setting = setting.replace(" 8 bit", "")
            found[setting + (", mpi" if transport.endswith("mpi") else "")] = (size, call)
    tensor = torch.from_numpy(array)
    half: Callable[[], object] = lambda: hvd.allreduce(  # noqa: E731
        tensor, name="fp16", compression=hvd.Compression.fp16
    )
    found[model.FP16.name] = (2, half)
    expected = {method.name for method in model.METHODS if method.why_not(hvd.size()) is None}
    if expected != set(found):
        raise SystemExit(f"The model's methods and those measured differ: {expected ^ set(found)}.")
    return found


def run_on_hosts(options: argparse.Namespace, rate: str) -> list[dict[str, Any]]:
    """Calibrate and measure at one rate; a row for each method and size."""
    sys.path.insert(0, str(ROOT))
    from tools import ranks, testbed

    reason = testbed.unavailable() or (None if os.geteuid() == 0 else "not root")
    if reason is not None:
        raise SystemExit(f"benchmarks/model.py needs hosts with shaped links: {reason}.")
    rows = []
    with testbed.Testbed(options.ranks, rate) as bed, tempfile.TemporaryDirectory() as scratch:

        def run(*command: str) -> str:
            return subprocess.run(
                [*ranks.mpirun(bed, options.ranks), sys.executable, *command],
                cwd=ROOT,
                env=ranks.environment(),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                timeout=options.timeout,
            ).stdout

        path = Path(scratch) / "calibration.json"
        for elements in options.elements:
            # Anew for each size: other work on the machine comes and goes.
            loads = [os.getloadavg()[0]]
            print(run("-m", "gq_horovod", "calibrate", "--output", str(path)))
            cluster = calibrate.load(path)
            script = [str(Path(__file__).resolve()), "--measure", str(elements)]
            output = run(*script, "--rounds", str(options.rounds))
            loads.append(os.getloadavg()[0])
            seconds = allreduce.result_in(output)["seconds"][str(elements)]
            for method in model.METHODS:
                if method.name not in seconds:
                    continue
                measured = statistics.median(seconds[method.name])
                predicted = model.allreduce_seconds(method, elements, cluster)
                rows.append(
                    {
                        "rate": rate,
                        "elements": elements,
                        "method": method.name,
                        "predicted_seconds": predicted,
                        "measured_seconds": measured,
                        "fastest_seconds": min(seconds[method.name]),
                        "slowest_seconds": max(seconds[method.name]),
                        "error": predicted / measured - 1,
                        "load": loads,
                    }
                )
    return rows


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the table and write the files."""
    table = Table(title=f"Prediction and measurement, {options.ranks} hosts")
    for heading in ("rate", "method"):
        table.add_column(heading, no_wrap=True)
    for heading in ("elements", "predicted ms", "measured ms", "range", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["rate"],
            row["method"],
            f"{row['elements'] / 1e6:g} M",
            f"{1e3 * row['predicted_seconds']:.0f}",
            f"{1e3 * row['measured_seconds']:.0f}",
            f"{1e3 * row['fastest_seconds']:.0f}-{1e3 * row['slowest_seconds']:.0f}",
            f"{row['error']:+.0%}",
        )
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    errors = [abs(row["error"]) for row in rows]
    for limit in (0.15, 0.3):
        within = sum(error <= limit for error in errors)
        print(f"within {limit:.0%}: {within} of {len(errors)}")
    print(f"median of the absolute errors: {statistics.median(errors):.0%}")
    loads = [load for row in rows for load in row["load"]]
    print(f"load average (1 minute) {min(loads):.1f} to {max(loads):.1f}, {os.cpu_count()} cores")

    options.output.mkdir(parents=True, exist_ok=True)
    document = {"ranks": options.ranks, "cores": os.cpu_count(), "results": rows}
    (options.output / "model.json").write_text(json.dumps(document, indent=2) + "\n")
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    for rate in dict.fromkeys(row["rate"] for row in rows):
        points = [row for row in rows if row["rate"] == rate]
        measured = [row["measured_seconds"] for row in points]
        axes.loglog(measured, [row["predicted_seconds"] for row in points], "o", label=rate)
    ends = [f(row["measured_seconds"] for row in rows) for f in (min, max)]
    axes.plot(ends, ends, color="gray", linewidth=1)
    for factor in (0.85, 1.15):
        axes.plot(ends, [factor * end for end in ends], ":", color="gray", linewidth=1)
    axes.set_xlabel("measured seconds")
    axes.set_ylabel("predicted seconds; dotted: 15 %")
    axes.legend()
    figure.savefig(options.output / "model.png", dpi=120)
    print(f"Wrote {options.output / 'model.json'} and {options.output / 'model.png'}")


def main() -> None:
    """Launch the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rates", default="1gbit,200mbit", help="of every host's link")
    parser.add_argument("--elements", default="1000000,16000000")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one job")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)  # be a rank
    options = parser.parse_args()
    if options.measure:
        allreduce.JOBS["model"] = methods
        allreduce.run_rank("model", [options.measure], options.rounds, budget=0)
        return
    options.elements = [int(part) for part in options.elements.split(",")]
    rows = []
    for rate in options.rates.split(","):
        rows += run_on_hosts(options, rate)
    report(rows, options)


if __name__ == "__main__":
    main()
