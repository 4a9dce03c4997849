"""The performance model against measurement, on hosts with shaped links.

    python benchmarks/predictions.py                 # as root: 1 Gbit/s, then 200 Mbit/s
    python benchmarks/predictions.py --rates 1gbit --models embedding

For each rate and model, on the hosts of tools/testbed.py: `gq-horovod calibrate`, then training
steps of every method that the advisor knows, in turn, and the predictions of
gq_horovod.advisor.model from the calibration and the step's computation, which is measured in the
same job without communication.
Computation only takes time here (replay.py), so that ranks which share cores can reduce beside it.
Prints relative errors, (predicted - measured) / measured, with the machine's load; writes
predictions.json and predictions.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import allreduce  # beside this file, as is training
import matplotlib
import training
from rich.console import Console
from rich.table import Table

from gq_horovod.advisor import calibrate, model
from tools import ranks, testbed

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
FORWARD = 1 / 3  # of the computation; the rest is backward, and the update takes none


@dataclass(frozen=True)
class Model:
    """Tensors whose gradients come one after the other, at equal distances, in backward."""

    tensors: int
    elements: int  # of each
    compute: float  # seconds
    overlap: float  # what `gq-horovod advise --overlap` is told


MODELS = {
    # One gradient that comes last: nothing of it can hide.
    "embedding": Model(1, 16_000_000, 0.1, overlap=0),
    # The advisor's default: of a backward pass of two thirds of a step, half a step.
    "layers": Model(12, 1_000_000, 0.3, overlap=0.5),
    "small": Model(4, 250_000, 0.1, overlap=0.5),
}


# ------------------------------------------------------------------------------------ in each rank


def run_rank(name: str, rounds: int) -> None:
    """Be a rank: rank 0 prints a line of JSON with the seconds of every method's steps."""
    import horovod.torch as hvd
    import replay  # beside this file
    import torch

    torch.set_num_threads(1)
    hvd.init()
    shape = MODELS[name]

    class Tensors:
        """What Replay replays; each rank has gradients of its own."""

        metric = ""

        def build(self) -> Any:
            return torch.nn.ParameterList(torch.zeros(shape.elements) for _ in range(shape.tensors))

        def batch(self, step: int) -> Any:
            generator = torch.Generator().manual_seed(hvd.rank())
            return torch.randn(shape.elements, generator=generator), torch.empty(0)

        def loss(self, net: Any, batch: Any) -> Any:
            return sum((parameter * batch[0]).sum() for parameter in net)

    delay = (1 - FORWARD) * shape.compute / shape.tensors
    times = {f"{index}": delay for index in reversed(range(shape.tensors))}
    times |= {"forward": FORWARD * shape.compute, "rest": 0.0, "update": 0.0}
    workload = replay.Replay(Tensors(), times, ahead=False)  # the model's hosts compute themselves
    watch = training.Stopwatch()
    contestants = [training.Contestant(training.COMPUTE, workload, watch)]
    for method in model.METHODS:
        if method.why_not(model.Cluster(hvd.size(), 1e9)) is None:
            training.METHODS[method.name] = partial(compression, method)
            like = contestants[1] if len(contestants) > 1 else None
            contestants.append(training.Contestant(method.name, workload, watch, like))
    seconds: dict[str, list[float]] = {each.name: [] for each in contestants}
    for number in range(-1, rounds):  # the first one makes connections
        for each in contestants:
            hvd.barrier()
            taken = training.total(each.step(workload.batch(0)))
            slowest = hvd.allreduce(torch.tensor(taken), name="seconds", op=hvd.Max)
            if number >= 0:
                seconds[each.name].append(float(slowest))
        if hvd.rank() == 0:
            print(f"{name}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    if hvd.rank() == 0:
        print(allreduce.RESULT + json.dumps({"seconds": seconds}), flush=True)
    hvd.shutdown()


def compression(method: model.Method) -> Any:
    """What DistributedOptimizer is given."""
    import horovod.torch as hvd

    from gq_horovod.torch import GlobalQSGD

    if method.config is None:
        return hvd.Compression.fp16 if method is model.FP16 else hvd.Compression.none
    return GlobalQSGD(**method.config.describe())


# -------------------------------------------------------------------------------------- comparison


def run_on_hosts(options: argparse.Namespace, rate: str) -> Iterator[list[dict[str, Any]]]:
    """Calibrate and measure at one rate; for each model, a row for each method."""
    reason = testbed.unavailable() or (None if os.geteuid() == 0 else "not root")
    if reason is not None:
        raise SystemExit(f"benchmarks/predictions.py needs hosts with shaped links: {reason}.")
    with testbed.Testbed(options.ranks, rate) as bed, tempfile.TemporaryDirectory() as scratch:

        def run(*command: str) -> str:
            return subprocess.run(
                [*ranks.mpirun(bed, options.ranks), sys.executable, *command],
                cwd=ROOT,
                env=ranks.environment() | {"HOROVOD_CACHE_CAPACITY": "8192"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                timeout=options.timeout,
            ).stdout

        path = Path(scratch) / "calibration.json"
        for name in options.models:
            # Anew for each: other work on the machine comes and goes.
            loads = [os.getloadavg()[0]]
            print(run("-m", "gq_horovod", "calibrate", "--output", str(path)))
            cluster = calibrate.load(path)
            script = [str(Path(__file__).resolve()), "--measure", name]
            output = run(*script, "--rounds", str(options.rounds))
            loads.append(os.getloadavg()[0])
            seconds = allreduce.result_in(output)["seconds"]
            shape = MODELS[name]
            sizes = [shape.elements] * shape.tensors
            compute = statistics.median(seconds[training.COMPUTE])
            rows = []
            for method in model.METHODS:
                if method.name not in seconds:
                    continue
                measured = statistics.median(seconds[method.name])
                predicted = model.step_time(method, sizes, cluster, compute, shape.overlap)
                rows.append(
                    {
                        "rate": rate,
                        "model": name,
                        "method": method.name,
                        "compute_seconds": compute,
                        "predicted_seconds": predicted,
                        "measured_seconds": measured,
                        "fastest_seconds": min(seconds[method.name]),
                        "slowest_seconds": max(seconds[method.name]),
                        "error": predicted / measured - 1,
                        "load": loads,
                        "cluster": asdict(cluster),
                    }
                )
            yield rows


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the table and write the files, of what has been measured so far."""
    table = Table(title=f"Steps predicted and measured, {options.ranks} hosts")
    for heading in ("rate", "model", "method"):
        table.add_column(heading, no_wrap=True)
    for heading in ("predicted ms", "measured ms", "range", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["rate"],
            row["model"],
            row["method"],
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
    (options.output / "predictions.json").write_text(json.dumps(document, indent=2) + "\n")
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
    figure.savefig(options.output / "predictions.png", dpi=120)
    plt.close(figure)
    print(f"Wrote {options.output / 'predictions.json'} and {options.output / 'predictions.png'}")


def main() -> None:
    """Launch the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rates", type=allreduce.rates, default="1gbit,200mbit", help="of every host's link"
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one job")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--measure", choices=MODELS, help=argparse.SUPPRESS)  # be a rank
    options = parser.parse_args()
    if options.measure:
        run_rank(options.measure, options.rounds)
        return
    options.models = options.models.split(",")
    if unknown := sorted(set(options.models) - set(MODELS)):
        parser.error(f"--models: expected some of {', '.join(MODELS)}; got {', '.join(unknown)}")
    if allreduce.LOOPBACK in options.rates:
        parser.error("--rates: expected those of a link, such as 1gbit, got loopback")
    rows = []
    for rate in options.rates:
        for more in run_on_hosts(options, rate):
            rows += more
            report(rows, options)


if __name__ == "__main__":
    main()
