"""Memory that reducing gradients takes, at its peak, for real models' shapes.

    python benchmarks/memory.py                        # DeepLight at the paper's size: 12 GB
    python benchmarks/memory.py --model ResNet-50

Two ranks over loopback, a job for each method, because a process knows the peak of its whole life
only. As in many_tensors.py there is no model: gradients lie there, are reduced in two steps, and
are reduced in place. Prints, for each method, what a rank's peak is above what it had before the
first step, and what of that is beyond no compression, as a share of the gradients too. Writes
memory.json and memory.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from allreduce import RESULT, result_in
from many_tensors import BASELINE, CACHE_CAPACITY, METHODS, Torch
from shapes import PARAMETERS, shapes

from tools import ranks as launcher

STEPS = 2


def run_rank(model: str, method: str) -> None:
    """One rank: rank 0 prints a line of JSON with bytes."""
    import workloads  # noqa: F401  # finds examples/common
    from common.loop import peak_memory

    job = Torch(shapes(model), {method: METHODS[method]})
    before = peak_memory()
    for _ in range(STEPS):
        job.step(method)
    job.barrier()
    if job.rank == 0:
        gradients = 4 * sum(parameter.numel() for parameter in job.parameters)
        found = {"gradients": gradients, "before": before, "peak": peak_memory()}
        print(RESULT + json.dumps(found), flush=True)


def launch(model: str, method: str, timeout: float) -> dict[str, Any]:
    """Start two ranks and return what rank 0 printed."""
    script = [sys.executable, str(Path(__file__).resolve()), "--model", model, "--job", method]
    output = subprocess.run(
        [*launcher.mpirun(None, 2), *script],
        env=launcher.environment() | {"HOROVOD_CACHE_CAPACITY": str(CACHE_CAPACITY)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=timeout,
    ).stdout
    return result_in(output)


def summarize(jobs: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """A row of figures for each method: bytes, and the share of the gradients."""
    rows = {}
    plain = jobs[BASELINE]["peak"] - jobs[BASELINE]["before"]
    for method, own in jobs.items():
        taken = own["peak"] - own["before"]
        rows[method] = {
            "taken": taken,
            "beyond none": taken - plain,
            "share": (taken - plain) / own["gradients"],
        }
    return rows


def print_table(model: str, jobs: dict[str, dict[str, Any]]) -> None:
    """The figures of a model."""
    from rich.console import Console
    from rich.table import Table

    size = jobs[BASELINE]["gradients"]
    table = Table(title=f"{model}: gradients of {size / 1e9:.3g} GB, two ranks")
    table.add_column("method", no_wrap=True)
    for heading in ("GB at the peak of a step", "beyond none", "of the gradients"):
        table.add_column(heading, justify="right")
    for method, row in summarize(jobs).items():
        cells = [f"{row['taken'] / 1e9:.2f}", f"{row['beyond none'] / 1e9:.2f}"]
        table.add_row(method, *cells, f"{row['share']:.2f}")
    Console(width=None if sys.stdout.isatty() else 90).print(table)


def plot(model: str, jobs: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars: gigabytes that a step takes, for each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(6, 3), layout="constrained")
    rows = summarize(jobs)
    panel.barh(list(rows), [row["taken"] / 1e9 for row in rows.values()])
    panel.invert_yaxis()
    panel.set_xlabel("GB at the peak of a step, above what was there before")
    panel.set_title(f"{model}, gradients of {jobs[BASELINE]['gradients'] / 1e9:.3g} GB", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Launch the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", default="DeepLight", help=f"of {', '.join(PARAMETERS)}, or COUNTxELEMENTS"
    )
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by semicolons")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a job")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--job", help=argparse.SUPPRESS)  # the method of which to be a rank
    options = parser.parse_args()
    if options.job:
        run_rank(options.model, options.job)
        return
    jobs = {}
    for method in options.methods.split(";"):
        print(f"{options.model}: {method}", file=sys.stderr, flush=True)
        jobs[method] = launch(options.model, method, options.timeout)
    print_table(options.model, jobs)
    options.output.mkdir(parents=True, exist_ok=True)
    document = {"model": options.model, "jobs": jobs, "rows": summarize(jobs)}
    stem = options.output / "memory"
    stem.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n")
    plot(options.model, jobs, stem.with_suffix(".png"))
    print(f"Wrote {stem.with_suffix('.json')} and {stem.with_suffix('.png')}")


if __name__ == "__main__":
    main()
