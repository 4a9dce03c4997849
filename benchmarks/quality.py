"""Held-out loss against steps and bytes, with ranks that live in one process.

    python benchmarks/quality.py transformer                 # 4 and 64 ranks, 3 seeds
    python benchmarks/quality.py convnet --ranks 16 --methods none,standard,two-hop
    python benchmarks/quality.py deeplight --seeds 1
    python benchmarks/quality.py convnet --sgd 0.05          # with momentum, in place of Adam
    python benchmarks/quality.py deeplight --to-the-end      # until the loss no longer falls

Each step splits one global batch among the ranks, computes each rank's gradient, and reduces each
parameter's with gq_horovod.research.simulation: kernels, lanes, shares and random numbers are those
of a job of that size. The global batch is the same for all numbers of ranks. Methods of a row share
seeds, initial parameters and the order of samples; "none" too is run for each number of ranks,
where it differs by rounding alone, which shows how far apart two runs of the same method end.

A run is kept in a file as soon as it has ended, so an interrupted benchmark goes on where it was.
Prints a table, writes quality-MODEL.json and quality-MODEL.png. With --to-the-end they are called
quality-MODEL-to-the-end, and it says for each number of ranks whether the loss of `none` has
stopped falling: its lowest mean over seeds comes before the end, or the last fifth of the steps
changes the mean by less than its standard error.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
import workloads  # beside this file; it finds examples/common
from common.schedules import warm_linear
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import gq_horovod.path
import gq_horovod.research
import mpi_ops
from gq_horovod.research.simulation import SimulatedRanks
from gq_horovod.research.torch_baselines import QSGD, IntSGD, PowerSGD
from gq_horovod.research.varied import VariedRanks
from gq_horovod.torch import GlobalQSGD, TorchFrontend
from mpi_ops import wire
from mpi_ops.kernels import host
from mpi_ops.kernels.host import Buffer

EVALUATIONS = 12  # in a run
EVALUATIONS_TO_THE_END = 20
METHODS_TO_THE_END = "none,two-hop,two-hop-4"
FLOAT_BYTES = 4


# Small enough for 64 ranks on one core: a run takes a minute or two.
class DeepLight(workloads.DeepLight):
    """DeepFwFM with 0.5 M parameters."""

    DIM, ROWS = 6, 2**16
    steps = 64
    steps_to_the_end = 200  # its loss is lowest within an epoch of 128


class Transformer(workloads.Transformer):
    """A Transformer with 0.3 M parameters."""

    CONTEXT, WIDTH, LAYERS = 32, 96, 2
    GLOBAL_BATCH, HELD_OUT = 64, 256
    learning_rate = 1e-3
    steps = 100


class Language(workloads.Language):
    """As there: half a second a step, for up to 16 ranks."""

    steps = 300


class ConvNet(workloads.ConvNet):
    """A convolutional network with 0.7 M parameters."""

    HIDDEN = 256
    steps = 77  # seven epochs


class Denoiser(workloads.Denoiser):
    """As there: small enough."""

    steps = 200


class Clothes(workloads.Clothes):
    """As there: small enough."""

    steps = 468  # two epochs


WORKLOADS: dict[str, Any] = {
    "deeplight": DeepLight,
    "transformer": Transformer,
    "language": Language,
    "convnet": ConvNet,
    "denoiser": Denoiser,
    "clothes": Clothes,
}


# Name -> what makes the `compression=` of a real job. None: float32 gradients, averaged exactly but
# for rounding.
METHODS: dict[str, Callable[[], TorchFrontend] | None] = {
    "none": None,
    "standard": lambda: GlobalQSGD(levels="standard"),
    "exponential": lambda: GlobalQSGD(levels="exponential"),
    "two-hop": GlobalQSGD,
    "standard-4": lambda: GlobalQSGD(levels="standard", bits=4),
    "exponential-4": lambda: GlobalQSGD(levels="exponential", bits=4),
    "two-hop-4": lambda: GlobalQSGD(levels="two-hop", bits=4),
    "two-hop-4-block-64": lambda: GlobalQSGD(levels="two-hop", bits=4, block_size=64),
    "two-hop-5": lambda: GlobalQSGD(levels="two-hop", bits=5),
    "two-hop-6": lambda: GlobalQSGD(levels="two-hop", bits=6),
    "two-hop-3": lambda: GlobalQSGD(levels="two-hop", bits=3),
    "two-hop-2": lambda: GlobalQSGD(levels="two-hop", bits=2),
    "standard-4-feedback": lambda: GlobalQSGD(levels="standard", bits=4, error_feedback=True),
    "two-hop-4-feedback": lambda: GlobalQSGD(levels="two-hop", bits=4, error_feedback=True),
    "two-hop-3-feedback": lambda: GlobalQSGD(levels="two-hop", bits=3, error_feedback=True),
    "two-hop-2-feedback": lambda: GlobalQSGD(levels="two-hop", bits=2, error_feedback=True),
    "paper-standard": lambda: GlobalQSGD.paper_standard,
    "paper-exponential": lambda: GlobalQSGD.paper_exponential,
    "qsgd-8": QSGD,
    "qsgd-8-l2-elias": lambda: QSGD(norm="l2", coding="elias"),
    "qsgd-4": lambda: QSGD(bits=4),
    "qsgd-4-elias": lambda: QSGD(bits=4, coding="elias"),
    "intsgd-8": lambda: IntSGD(scale="gradient"),  # Adam's updates are not as large as gradients
    "powersgd-4": lambda: PowerSGD(rank=4),
    # The options of a budget, and below the power of norms: gq_horovod.research.varied, which no
    # job can have yet.
    "two-hop-3-varied": lambda: GlobalQSGD(levels="two-hop", bits=3),
    "two-hop-4-varied": lambda: GlobalQSGD(levels="two-hop", bits=4),
    "two-hop-5-varied": lambda: GlobalQSGD(levels="two-hop", bits=5),
    "two-hop-4-least-square": lambda: GlobalQSGD(levels="two-hop", bits=4),
    "two-hop-5-least-square": lambda: GlobalQSGD(levels="two-hop", bits=5),
}

# How the names of those end whose widths vary -> the power.
VARIED = {"-varied": 1.0, "-least-square": 2.0}


# --------------------------------------------------------------------------------------- reduction


class Reducer:
    """Averages the gradients of simulated ranks, parameter by parameter."""

    def __init__(self, name: str, ranks: int) -> None:
        make = METHODS[name]
        self.ranks = ranks
        self._sent: dict[str, list[float]] = {}  # of each parameter, in each step
        self._own = None if make is None else make()
        if self._own is not None:
            self._simulated = SimulatedRanks(self._own.config, ranks, self._own._method())

    def means(self, gradients: dict[str, list[torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The mean over ranks of each parameter's gradients, which are dropped on the way."""
        for name in list(gradients):
            yield name, self.mean(name, gradients.pop(name))

    def mean(self, name: str, gradients: list[torch.Tensor]) -> torch.Tensor:
        """The mean over ranks of one parameter's gradients."""
        if self._own is None or not self._own._eligible(name, gradients[0]):
            size = FLOAT_BYTES * gradients[0].numel()
            self._sent.setdefault(name, []).append(wire.sent_bytes(size, self.ranks))
            return torch.stack(gradients).mean(dim=0)
        out = torch.empty_like(gradients[0])
        own = [_buffer(gradient) for gradient in gradients]
        self._sent.setdefault(name, []).append(self._simulated.reduce(name, own, _buffer(out)))
        return out

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in a step, in the mean over steps."""
        return sum(map(statistics.fmean, self._sent.values()))


class VariedReducer(Reducer):
    """Averages all gradients of a step at once, with widths that vary between their blocks."""

    def __init__(self, name: str, ranks: int, power: float) -> None:
        super().__init__(name, ranks)
        assert self._own is not None
        self._varied = VariedRanks(self._own.config, ranks, power)

    def means(self, gradients: dict[str, list[torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        assert self._own is not None
        together = [name for name, own in gradients.items() if self._own._eligible(name, own[0])]
        # Every tensor begins with a block.
        parts = [[self._padded(own) for own in gradients[name]] for name in together]
        mean, sent = self._varied.average(
            "step", [np.concatenate(part) for part in zip(*parts, strict=True)]
        )
        self._sent.setdefault("step", []).append(sent)
        first = 0
        for name, part in zip(together, parts, strict=True):
            like = gradients.pop(name)[0]
            flat = torch.from_numpy(mean[first : first + like.numel()])
            yield name, flat.reshape(like.shape)
            first += len(part[0])
        yield from super().means(gradients)

    def _padded(self, tensor: torch.Tensor) -> np.ndarray:
        return np.pad(tensor.numpy().ravel(), (0, -tensor.numel() % self._varied.block_size))


def reducer(name: str, ranks: int) -> Reducer:
    """That of a method."""
    for end, power in VARIED.items():
        if name.endswith(end):
            return VariedReducer(name, ranks, power)
    return Reducer(name, ranks)


def _buffer(tensor: torch.Tensor) -> Buffer:
    return Buffer(tensor.data_ptr(), "float32", tensor.numel(), tensor)


# ------------------------------------------------------------------------------------------- a run


def train(
    workload: Any,
    reducer: Reducer,
    seed: int,
    steps: int,
    evaluations: int,
    sgd: float | None,
    tick: Callable[[], None],
) -> dict[str, Any]:
    """Train once; returns the held-out loss by step, and what a rank sends in a step.

    With Adam, or with SGD at the learning rate `sgd` and a momentum of 0.9.
    """
    torch.manual_seed(seed)
    workload.seed = seed
    net = workload.build()
    optimizer: torch.optim.Optimizer
    if sgd is None:
        optimizer = torch.optim.Adam(net.parameters(), lr=workload.learning_rate)
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=sgd, momentum=0.9)
    # Without the rise, runs of the same method end far apart; without the fall, a run's end is one
    # of many noisy steps.
    schedule = warm_linear(optimizer, max(steps // 10, 1), steps)
    ranks = reducer.ranks
    named = dict(net.named_parameters())
    losses = {}
    for step in range(steps):
        gradients: dict[str, list[torch.Tensor]] = {name: [] for name in named}
        for rank in range(ranks):
            optimizer.zero_grad(set_to_none=True)
            workload.loss(net, workload.batch(step, (rank, ranks))).backward()
            for name, parameter in named.items():
                assert parameter.grad is not None
                gradients[name].append(parameter.grad)
        for name, mean in reducer.means(gradients):
            named[name].grad = mean
        optimizer.step()
        schedule.step()
        if (step + 1) % max(steps // evaluations, 1) == 0 or step + 1 == steps:
            losses[step + 1] = workload.held_out_loss(net)
        tick()
    return {
        "losses": losses,
        "metric": workload.evaluate(net),
        "sent": reducer.sent,
        "parameters": sum(parameter.numel() for parameter in named.values()),
    }


# ------------------------------------------------------------------------------------------ report


Runs = dict[int, dict[str, list[dict[str, Any]]]]  # of the seeds, by ranks and by method


def curve(run: dict[str, Any]) -> dict[int, float]:
    """The held-out loss by step."""
    return {int(step): float(loss) for step, loss in run["losses"].items()}


def final(run: dict[str, Any]) -> float:
    """The held-out loss at the end of a run."""
    return list(curve(run).values())[-1]


def lowest(run: dict[str, Any]) -> float:
    """The lowest held-out loss of a run."""
    return min(curve(run).values())


def mean_curve(runs: list[dict[str, Any]]) -> dict[int, float]:
    """The mean over runs of the held-out loss, by step."""
    curves = [curve(run) for run in runs]
    return {step: statistics.fmean(own[step] for own in curves) for step in curves[0]}


def standard_error(values: list[float]) -> float | None:
    """Of their mean; None of a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def beside(losses: list[float], baseline: list[float]) -> dict[str, Any]:
    """The losses' change from the baseline's in per cent. It is paired: seeds share all else."""
    changes = [100 * (own / other - 1) for own, other in zip(losses, baseline, strict=False)]
    return {
        "mean": statistics.fmean(losses),
        "change": statistics.fmean(changes) if changes else None,
        "changes": changes,
        "error": standard_error(changes),
    }


def compare(runs: Runs) -> list[dict[str, Any]]:
    """A row for each number of ranks and method: losses of the seeds, and beside those of none."""
    rows = []
    for ranks, methods in runs.items():
        baseline = methods.get("none", [])
        for method, own in methods.items():
            losses = list(map(final, own))
            row = {
                "ranks": ranks,
                "method": method,
                "losses": losses,
                "spread": statistics.stdev(losses) if len(losses) > 1 else 0.0,
                "metric": statistics.fmean(run["metric"] for run in own),
                "sent": own[0]["sent"],
                **beside(losses, list(map(final, baseline))),
                "lowest": beside(list(map(lowest, own)), list(map(lowest, baseline))),
                "curve": mean_curve(own),
            }
            rows.append(row)
    return rows


def end_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether the held-out loss of a method's runs has stopped falling."""
    mean = mean_curve(runs)
    last = max(mean)
    lowest_at = min(mean, key=mean.__getitem__)
    before = max((step for step in mean if step <= 0.8 * last), default=last)
    fifth = beside(list(map(final, runs)), [curve(run)[before] for run in runs])
    settled = fifth["error"] is not None and abs(fifth["change"]) < fifth["error"]
    return {
        "lowest_at": lowest_at,
        "last_fifth": fifth["change"],
        "error": fifth["error"],
        "stopped": lowest_at < last or settled,
    }


def print_table(rows: list[dict[str, Any]], title: str, metric: str, to_the_end: bool) -> None:
    """Print `compare`'s rows; with the lowest loss of each run, too, where it goes to the end."""
    table = Table(title=title)
    columns = ["ranks", "method", "kB sent", "/none", "held-out loss", "± seeds", "to none", "±"]
    columns += ["lowest", "to none", "±"] if to_the_end else []
    columns += [] if metric == "loss" else [metric]
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    plain = {row["ranks"]: row["sent"] for row in rows if row["method"] == "none"}
    for row in rows:
        ratio = plain[row["ranks"]] / row["sent"] if row["ranks"] in plain else None
        cells = [f"{row['ranks']}", row["method"], f"{row['sent'] / 1e3:.0f}"]
        cells += ["" if ratio is None else f"{ratio:.2f}"]
        cells += [f"{row['mean']:.4f}", f"{row['spread']:.4f}", *_change(row)]
        cells += [f"{row['lowest']['mean']:.4f}", *_change(row["lowest"])] if to_the_end else []
        cells += [] if metric == "loss" else [f"{row['metric']:.4f}"]
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def print_end(ranks: int, end: dict[str, Any], steps: int) -> None:
    """Say what `end_of` found of none."""
    error = "" if end["error"] is None else f" ± {end['error']:.2f}"
    print(
        f"{ranks} ranks, none {'has stopped falling' if end['stopped'] else 'STILL FALLS'}: lowest "
        f"mean at step {end['lowest_at']} of {steps}, and the last fifth changes it by "
        f"{end['last_fifth']:+.2f}{error} %"
    )


def _change(own: dict[str, Any]) -> list[str]:
    """Two cells: a change to none in per cent, and its standard error."""
    return [
        "" if own["change"] is None else f"{own['change']:+.2f} %",
        "" if own["error"] is None else f"{own['error']:.2f}",
    ]


def plot(runs: Runs, title: str, path: Path) -> None:
    """Draw the mean loss of the seeds: by steps, and by what a rank has sent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        len(runs), 2, figsize=(10, 3.6 * len(runs)), squeeze=False, layout="constrained"
    )
    colours = _colours(runs, plt.get_cmap("tab20").colors)
    for (by_steps, by_bytes), (ranks, methods) in zip(panels, runs.items(), strict=True):
        for name, own in methods.items():
            mean = mean_curve(own)
            style = {"color": colours[name], "lw": 1.4, "ls": "--" if name == "none" else "-"}
            by_steps.plot(list(mean), list(mean.values()), label=name, **style)
            sent = [step * own[0]["sent"] for step in mean]
            by_bytes.plot(sent, list(mean.values()), label=name, **style)
        by_steps.set_xlabel("steps")
        by_bytes.set_xlabel("bytes that a rank has sent")
        by_bytes.set_xscale("log")
        seconds = by_bytes.secondary_xaxis(
            "top", functions=(lambda b: 8e-9 * b, lambda s: s / 8e-9)
        )
        seconds.set_xlabel("seconds of it on a link of 1 Gbit/s", fontsize=8)
        by_steps.set_ylabel(f"held-out loss, {ranks} ranks")
        best = min(final(run) for own in methods.values() for run in own)
        first = max(next(iter(run["losses"].values())) for run in methods.get("none", [own[0]]))
        for panel in (by_steps, by_bytes):
            panel.set_ylim(best - 0.05 * (first - best), best + 1.05 * (first - best))
            panel.spines[["right"]].set_visible(False)
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_to_the_end(runs: Runs, title: str, path: Path) -> None:
    """Draw the mean loss of the seeds by steps, and its change from none's, for all settings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    colours = _colours(runs, plt.get_cmap("tab10").colors)
    kinds = itertools.cycle(("-", "--", ":", "-."))
    for (ranks, methods), dashes in zip(runs.items(), kinds, strict=False):
        for name, own in methods.items():
            mean = mean_curve(own)
            style = {"color": colours[name], "lw": 1.4, "ls": dashes}
            label = f"{name}, {ranks} ranks"
            left.plot(list(mean), list(mean.values()), label=label, **style)
            if name == "none" or "none" not in methods:
                continue
            curves, plain = [list(map(curve, part)) for part in (own, methods["none"])]
            points = [  # by step
                beside([one[step] for one in curves], [one[step] for one in plain]) for step in mean
            ]
            right.plot(list(mean), [own["change"] for own in points], label=label, **style)
            low, high = (
                [own["change"] + sign * (own["error"] or 0) for own in points] for sign in (-1, 1)
            )
            right.fill_between(list(mean), low, high, color=colours[name], alpha=0.12, lw=0)
    right.axhline(0, color="black", lw=0.8)
    left.set_ylabel("held-out loss")
    right.set_ylabel("beside none, in per cent")
    for panel in (left, right):
        panel.set_xlabel("steps")
        panel.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _colours(runs: Runs, colours: Sequence[Any]) -> dict[str, Any]:
    """Of each method; from the first one again, where there are more methods."""
    names = dict.fromkeys(name for methods in runs.values() for name in methods)
    return dict(zip(names, itertools.cycle(colours), strict=False))


# -------------------------------------------------------------------------------------------- main


def main() -> None:
    """Run what has not been run yet, and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=sorted(WORKLOADS))
    parser.add_argument("--ranks", default="4,64", help="numbers of simulated ranks")
    parser.add_argument("--methods", help=f"default: all; with --to-the-end {METHODS_TO_THE_END}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of a run (default: the workload's)")
    parser.add_argument(
        "--to-the-end",
        action="store_true",
        help="train until the held-out loss of none no longer falls, and say whether it has",
    )
    parser.add_argument("--sgd", type=float, help="learning rate of SGD with a momentum of 0.9")
    parser.add_argument("--cache", type=Path, default=Path("results"), help="for prepared data")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    options = parser.parse_args()
    default = METHODS_TO_THE_END if options.to_the_end else ",".join(METHODS)
    names = (options.methods or default).split(",")
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        parser.error(f"--methods: expected some of {', '.join(METHODS)}; got {', '.join(unknown)}")
    own = WORKLOADS[options.model]
    steps = options.steps or getattr(own, "steps_to_the_end" if options.to_the_end else "steps", 0)
    if not steps:
        parser.error(
            f"--to-the-end: expected a model whose steps to the end are known, or --steps; got "
            f"{options.model}. Add --steps, more than its held-out loss falls for."
        )
    evaluations = EVALUATIONS_TO_THE_END if options.to_the_end else EVALUATIONS
    hvd.init()
    torch.set_num_threads(1)
    workload = own(options.cache)
    trained = options.model + ("" if options.sgd is None else f"-sgd-{options.sgd:g}")
    trained += "-to-the-end" if options.to_the_end else ""
    kept = options.output / "quality-runs"
    kept.mkdir(parents=True, exist_ok=True)
    version = _version()

    runs: Runs = {}
    jobs = []
    for ranks in map(int, options.ranks.split(",")):
        usable = [name for name in names if fits(name, ranks)]
        runs[ranks] = {name: [] for name in usable}
        jobs += [(ranks, name, seed) for seed in range(options.seeds) for name in usable]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        bar = progress.add_task("", total=len(jobs) * steps)
        for ranks, name, seed in jobs:
            path = kept / f"{trained}-{ranks}-{name}-{seed}-{steps}-{version}.json"
            if path.exists():
                progress.advance(bar, steps)
            else:
                progress.update(bar, description=f"{ranks} ranks, {name}, seed {seed}")
                run = train(
                    *(workload, reducer(name, ranks), seed, steps, evaluations, options.sgd),
                    lambda: progress.advance(bar),
                )
                path.write_text(json.dumps(run))
            run = json.loads(path.read_text())
            runs[ranks][name].append(run)
            if progress.disable:
                print(f"{ranks} ranks, {name}, seed {seed}: {final(run):.4f}", flush=True)
            progress.update(
                bar, completed=steps * sum(len(o) for m in runs.values() for o in m.values())
            )

    rows = compare(runs)
    parameters = next(iter(runs[ranks].values()))[0]["parameters"]
    title = f"{trained}, {parameters / 1e6:.2f} M parameters, {steps} steps, "
    title += f"{options.seeds} seeds"
    print_table(rows, title, workload.metric, options.to_the_end)
    stem = options.output / f"quality-{trained}"
    document = {"model": options.model, "steps": steps, "parameters": parameters, "rows": rows}
    if options.to_the_end:
        document["ends"] = ends = {
            ranks: end_of(own["none"]) for ranks, own in runs.items() if "none" in own
        }
        for ranks, end in ends.items():
            print_end(ranks, end, steps)
    Path(f"{stem}.json").write_text(json.dumps(document, indent=2) + "\n")
    (plot_to_the_end if options.to_the_end else plot)(runs, title, Path(f"{stem}.png"))
    print(f"Wrote {stem}.json and {stem}.png")


def _version() -> str:
    """Digest of what a run's losses and bytes depend on; with another one it has to be run again.

    Of the benchmark, of the methods in Python, and of the kernels' sources.
    """
    sources = [Path(__file__), Path(workloads.__file__)]
    for package in (gq_horovod.path, gq_horovod.research, mpi_ops):
        sources += sorted(Path(package.__path__[0]).rglob("*.py"))
    parts = [*(path.read_bytes() for path in sources), host.fingerprint().encode()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:8]


def fits(name: str, ranks: int) -> bool:
    """Whether a method's codes can be summed over so many ranks."""
    make = METHODS[name]
    try:
        if make is not None:
            make().config.plan(ranks)
    except ValueError as error:
        print(f"{name} left out for {ranks} ranks: {error}")
        return False
    return True


if __name__ == "__main__":
    main()
