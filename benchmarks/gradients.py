"""Error of the mean of gradients of models in training, early and late.

    python benchmarks/gradients.py                         # 4 ranks, four models, a minute or two
    python benchmarks/gradients.py transformer --ranks 4,64 --seeds 1

Models, data and settings are those of benchmarks/quality.py. They train without compression. In
some steps each method reduces the same gradients of the ranks, as a job would: each parameter with
blocks, norms and dithers of its own, and small ones uncompressed.

Error: the sum over all parameters of ‖result - mean‖², over that of ‖mean‖². It is what others call
the vNMSE of the mean. Bytes are those that a rank sends in a step, beside float32's, if the ranks
form a ring. Prints a table, and writes gradients.json and gradients.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import quality  # beside this file
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

MODELS = "transformer,deeplight,convnet,denoiser"
METHODS = (
    "standard,exponential-4,two-hop-3,two-hop-4,two-hop-5,two-hop-6,two-hop,qsgd-4,qsgd-8,"
    "two-hop-4-varied,two-hop-5-varied,two-hop-4-least-square,two-hop-5-least-square"
)
# Shares of a run after which gradients are looked at; until a tenth the learning rate rises.
MOMENTS = {"early": 0.05, "middle": 0.5, "late": 1.0}
# At each of them, of so many steps one after the other: of one alone it depends on the batch.
STEPS = 3


class Watched(quality.Reducer):
    """Averages exactly; in some steps methods average the same gradients, and are compared."""

    def __init__(self, methods: list[str], ranks: int, moments: dict[int, str]) -> None:
        super().__init__("none", ranks)
        self._moments = moments  # by step
        self._others = {name: quality.reducer(name, ranks) for name in methods}
        self._step = 0
        # By moment and method: squared error, and squared mean, over parameters and steps.
        self._sums: dict[tuple[str, str], list[float]] = {}

    def means(self, gradients: dict[str, list[torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        moment = self._moments.get(self._step)
        self._step += 1
        if moment is not None:
            exact = {name: torch.stack(own).double().mean(dim=0) for name, own in gradients.items()}
            for method, reducer in self._others.items():
                sums = self._sums.setdefault((moment, method), [0.0, 0.0])
                for name, result in reducer.means(dict(gradients)):
                    sums[0] += float(((result.double() - exact[name]) ** 2).sum())
                    sums[1] += float((exact[name] ** 2).sum())
        return super().means(gradients)

    def errors(self) -> dict[str, dict[str, float]]:
        """Of each method, by moment."""
        found: dict[str, dict[str, float]] = {}
        for (moment, method), (off, size) in self._sums.items():
            found.setdefault(method, {})[moment] = off / size
        return found

    def share(self, method: str) -> float:
        """Bytes that a rank sends, as a share of float32's."""
        return self._others[method].sent / self.sent


def measure(
    workload: Any, methods: list[str], ranks: int, seeds: int, steps: int, description: str
) -> list[dict[str, Any]]:
    """A row for each method: its errors by moment and seed, and its bytes."""
    ends = {moment: max(round(share * steps), STEPS) for moment, share in MOMENTS.items()}
    moments = {step: moment for moment, end in ends.items() for step in range(end - STEPS, end)}
    errors: dict[str, dict[str, list[float]]] = {name: {} for name in methods}
    watched = None
    for seed in track(range(seeds), description, console=Console(stderr=True)):
        watched = Watched(methods, ranks, moments)
        quality.train(workload, watched, seed, steps, 1, None, lambda: None)
        for name, found in watched.errors().items():
            for moment, error in found.items():
                errors[name].setdefault(moment, []).append(error)
    assert watched is not None
    return [
        {"method": name, "ranks": ranks, "share": watched.share(name), "errors": errors[name]}
        for name in methods
    ]


def print_table(model: str, rows: list[dict[str, Any]], steps: int) -> None:
    """Means over seeds, and their spread."""
    table = Table(title=f"{model}, {steps} steps: error of the mean ± spread of seeds")
    for heading in ("ranks", "method", "bytes", *MOMENTS):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in rows:
        cells = [
            f"{statistics.fmean(own):.2g} ± {statistics.pstdev(own):.1g}"
            for own in row["errors"].values()
        ]
        table.add_row(f"{row['ranks']}", row["method"], f"1/{1 / row['share']:.2f}", *cells)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw errors by the moment, a panel for each model and number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (model, ranks, [row for row in rows if row["ranks"] == ranks])
        for model, rows in results.items()
        for ranks in dict.fromkeys(row["ranks"] for row in rows)
    ]
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(3.4 * len(panels), 3.8),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (model, ranks, rows) in zip(axes[0], panels, strict=True):
        for row in rows:
            means = [statistics.fmean(own) for own in row["errors"].values()]
            label = f"{row['method']} (1/{1 / row['share']:.1f})"
            axis.plot(list(row["errors"]), means, marker="o", lw=1.2, label=label)
        axis.set_yscale("log")
        axis.set_title(f"{model}, {ranks} ranks", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("‖result - mean‖² / ‖mean‖²")
    axes[0][-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Train the models, and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="?", default=MODELS, help="with commas")
    parser.add_argument("--ranks", default="4", help="numbers of simulated ranks, with commas")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of a run (default: the workload's)")
    parser.add_argument("--cache", type=Path, default=Path("results"), help="for prepared data")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    options = parser.parse_args()
    chosen = {
        "models": (options.models.split(","), quality.WORKLOADS),
        "--methods": (options.methods.split(","), quality.METHODS),
    }
    for name, (wanted, known) in chosen.items():
        if unknown := [own for own in wanted if own not in known]:
            parser.error(f"{name}: expected some of {', '.join(known)}; got {', '.join(unknown)}")
    hvd.init()
    torch.set_num_threads(1)
    results: dict[str, list[dict[str, Any]]] = {}
    for model in chosen["models"][0]:
        workload = quality.WORKLOADS[model](options.cache)
        steps = options.steps or workload.steps
        rows = results[model] = []
        for ranks in map(int, options.ranks.split(",")):
            usable = [name for name in chosen["--methods"][0] if quality.fits(name, ranks)]
            rows += measure(
                workload, usable, ranks, options.seeds, steps, f"{model}, {ranks} ranks"
            )
        print_table(model, rows, steps)
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / "gradients"
    Path(f"{stem}.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, Path(f"{stem}.png"))
    print(f"Wrote {stem}.json and {stem}.png")


if __name__ == "__main__":
    main()
