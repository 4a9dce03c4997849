"""End-to-end training: every method in one job, the step split into what it is spent on.

    python benchmarks/training.py deeplight                  # 4 hosts at 200 Mbit/s and 1 Gbit/s
    python benchmarks/training.py transformer --rates 1gbit,loopback
    python benchmarks/training.py convnet --ranks 2,4,8,16 --rates 1gbit --methods none,standard-8
    python benchmarks/training.py deeplight --rates loopback --rounds 1 --quality 64
    python benchmarks/training.py transformer --rates 1gbit --replay 1
    python benchmarks/training.py deeplight --per-host 2 --methods none,two-hop-8,two-hop-8-nodes

Starts one job for each rate and number of ranks, on the hosts of tools/testbed.py where the machine
allows it, else over loopback. In a job the methods take turns: in every round each trains a few
steps of one model that all share, on the same batches, so what else the machine does hits all
alike. Of each step it measures

    compute      forward, backward and update of the model with no communication at all, in turn
                 with the other methods
    quantize     the kernels of mpi_ops.codec (norms, quantize, reduce, dequantize), or fp16's casts
    wait         what optimizer.synchronize() takes, less the kernels in it
    communicate  what is left of the step: hooks, and what backward loses to communication that
                 goes on beside it on the same cores

and beside it "alone", the reduction of the same gradients without forward, backward and update, and
the bytes that the interface counted. All of it is a mean over the ranks, then a median over the
steps. Ranks share cores here, so waiting for the network includes waiting for slower ranks.

"auto" takes its trial's steps before the rounds, so they show what it decided.

With --replay F the model's computation only takes time, F times what one process alone takes for a
rank's share, and leaves the cores to the reduction, as an accelerator would, which also goes on
while the host is in a hook; with --serial it does not, as where hosts compute. See replay.py.

With --quality N each method then trains N steps from the same initial state, and is evaluated.
Prints tables, writes training-MODEL.json and training-MODEL.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import allreduce  # noqa: E402 - beside this file
from common import methods  # noqa: E402

from tools import ranks as launcher  # noqa: E402 - found by way of allreduce
from tools import testbed  # noqa: E402

MODELS = ("deeplight", "transformer", "convnet")
COMPUTE = "compute alone"  # the name of training without communication
PARTS = ("compute", "quantize", "communicate", "wait")

Phases = dict[str, float]  # seconds of one step; see Contestant.step


# ----------------------------------------------------------------------------------------- methods


AUTO = "auto"
AUTO_STEPS = 100  # in a row, before all rounds: the last one decides

# Name -> what makes the `compression=` of DistributedOptimizer, called once in each rank.
METHODS: dict[str, Callable[[], Any]] = {
    "none": partial(methods.make, "none"),
    "fp16": partial(methods.make, "fp16"),
    "qsgd-8": partial(methods.make, "qsgd", bits=8),
    "qsgd-4-elias": partial(methods.make, "qsgd-elias", bits=4),
    "intsgd-8": partial(methods.make, "intsgd", bits=8),
    "powersgd-4": partial(methods.make, "powersgd", rank=4),
    AUTO: cache(partial(methods.make, AUTO)),  # one instance, which is asked what it decided
} | {
    f"{levels}-{bits}{suffix}": partial(methods.make, levels, bits=bits, transport=transport)
    for transport, suffix in (("horovod", ""), ("mpi", "-mpi"))
    for levels in ("standard", "exponential", "two-hop")
    for bits in (8, 4)
}
# Where hosts have several ranks: exact sums inside a host.
BY_NODES = {
    f"{levels}-8{suffix}-nodes": partial(
        methods.make, levels, bits=8, transport=transport, hierarchical=True
    )
    for transport, suffix in (("horovod", ""), ("mpi", "-mpi"))
    for levels in ("standard", "exponential", "two-hop")
}
METHODS |= BY_NODES


def available(names: list[str]) -> tuple[list[str], list[str]]:
    """Return (those that can be made here, what to say about the others)."""
    usable, remarks = [], []
    for name in names:
        try:
            METHODS[name]()
            usable.append(name)
        except (ImportError, AttributeError) as error:
            remarks.append(f"{name} left out: {error}")
    return usable, remarks


# ------------------------------------------------------------------------------------ in each rank


class Stopwatch:
    """Adds up what watched functions take. One thread; a watched call inside another counts once.

    It replaces attributes of modules and classes from outside, so that the package has no timers.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = False

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Count the calls of `owner.name` under a label."""
        original = getattr(owner, name)

        @wraps(original)
        def timed(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return original(*arguments, **options)
            self._inside = True
            began = time.perf_counter()
            try:
                return original(*arguments, **options)
            finally:
                spent = time.perf_counter() - began
                self.seconds[label] = self.seconds.get(label, 0.0) + spent
                self._inside = False

        setattr(owner, name, staticmethod(timed) if isinstance(owner, type) else timed)

    def take(self) -> dict[str, float]:
        """Return the seconds by label since the last call, and start again."""
        taken, self.seconds = self.seconds, {}
        return taken


class Contestant:
    """One method's optimizer, over parameters and Adam's state that it may share with others."""

    def __init__(
        self,
        name: str,
        workload: Any,
        watch: Stopwatch,
        like: Contestant | None = None,
        groups: int = 0,
    ) -> None:
        import horovod.torch as hvd
        import torch

        self.name = name
        self.steps = 0
        self._workload, self._watch = workload, watch
        torch.manual_seed(0)
        self.model = workload.build()
        inner = workload.optimizer(self.model.parameters())
        self._plain = name == COMPUTE
        if self._plain:
            self.optimizer: Any = inner
            return
        # Each has parameters of its own, since Horovod's hooks belong to a parameter; they share
        # the memory. Names differ, because Horovod remembers shapes by name.
        named = [(f"{name}.{key}", value) for key, value in self.model.named_parameters()]
        compression = METHODS[name]()
        self.optimizer = hvd.DistributedOptimizer(
            inner,
            named,
            compression=compression,
            groups=groups if groups and hvd.size() > 1 else None,  # one rank has no hooks for them
        )
        if like is None:
            hvd.broadcast_parameters(self.model.state_dict(), root_rank=0)
            self._fill_state()
            return
        pairs = zip(self.model.parameters(), like.model.parameters(), strict=True)
        for mine, theirs in pairs:
            mine.data = theirs.data
            self.optimizer.state[mine] = like.optimizer.state[theirs]

    def _fill_state(self) -> None:
        """Make Adam's state, as its first step would."""
        import torch

        for parameter in self.model.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def reset(self, initial: dict[str, Any]) -> None:
        """Go back to initial parameters and to an optimizer that has seen nothing."""
        self.steps = 0
        self.model.load_state_dict(initial)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def step(self, batch: Any) -> Phases:
        """Train on one batch and return what it took, in seconds, as this rank saw it.

        forward, backward, synchronize and update are the whole step; kernel:* are parts of backward
        and synchronize, "kernels in synchronize" of the latter; cpu counts all threads.
        """
        self._watch.take()
        cpu, own_cpu = time.process_time(), time.thread_time()
        times = [time.perf_counter()]
        self.optimizer.zero_grad()
        loss = self._workload.loss(self.model, batch)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        early = self._watch.take()
        if self._plain:
            times.append(time.perf_counter())
            self.optimizer.step()
        else:
            self.optimizer.synchronize()
            times.append(time.perf_counter())
            with self.optimizer.skip_synchronize():
                self.optimizer.step()
        times.append(time.perf_counter())
        late = self._watch.take()
        self.steps += 1
        names = ("forward", "backward", "synchronize", "update")
        phases = {name: times[i + 1] - times[i] for i, name in enumerate(names)}
        for label in early.keys() | late.keys():
            phases[f"kernel:{label}"] = early.get(label, 0.0) + late.get(label, 0.0)
        phases["kernels in synchronize"] = sum(late.values())
        phases["cpu"] = time.process_time() - cpu
        phases["cpu of other threads"] = phases["cpu"] - (time.thread_time() - own_cpu)
        return phases

    def reduce_alone(self) -> float:
        """Reduce the gradients of the last step once more, and return the seconds."""
        import horovod.torch as hvd

        hvd.barrier()
        began = time.perf_counter()
        optimizer = self.optimizer
        groups = list(optimizer._group_counts)
        if groups:
            submit = optimizer._grouped_allreduce_grad_async
        else:
            submit = optimizer._allreduce_grad_async
        # The order of backward, roughly.
        for each in reversed(groups or list(self.model.parameters())):
            optimizer._handles[each] = submit(each)
        optimizer.synchronize()
        seconds = time.perf_counter() - began
        optimizer.zero_grad()
        return seconds


def run_rank(options: argparse.Namespace) -> None:
    """One rank: rank 0 prints a line of JSON with what all of them measured."""
    import horovod.torch as hvd
    import torch

    started = time.monotonic()
    torch.set_num_threads(1)
    hvd.init()
    import replay  # beside this file, as the next
    import workloads
    from common import loop

    from mpi_ops import codec

    workload = workloads.WORKLOADS[options.model](options.cache)
    if options.times:
        workload = replay.Replay(workload, options.times, ahead=not options.serial)
    watch = Stopwatch()
    for stage, name in (
        ("measure", "norms"),
        ("quantize_parcel", "quantize"),
        ("reduce_share", "reduce"),
        ("dequantize_parcel", "dequantize"),
    ):
        watch.watch(codec, stage, name)
    for name in ("compress", "decompress"):
        watch.watch(hvd.Compression.fp16, name, "cast")
    contestants = [Contestant(COMPUTE, workload, watch)]
    shared: Contestant | None = None
    for name in options.methods:
        contestants.append(Contestant(name, workload, watch, shared, options.groups))
        shared = shared or contestants[-1]
    assert shared is not None
    initial = {key: value.clone() for key, value in shared.model.state_dict().items()}

    def say(text: str) -> None:
        if hvd.rank() == 0:
            print(f"{options.model}: {text}", file=sys.stderr, flush=True)

    measured: dict[str, Any] = {
        each.name: {"steps": [], "alone": [], "bytes": [], "busy": []} for each in contestants
    }
    for each in contestants:
        if each.name == AUTO:
            for number in range(AUTO_STEPS):
                each.step(workload.batch(number))
            (decision,) = METHODS[AUTO]().decisions.values()
            say(f"auto decided: {decision}")
    # The first steps set up connections and Horovod's cache of responses.
    for number in range(-options.warm_up, options.rounds):
        for each in contestants:
            own = measured[each.name]
            hvd.barrier()
            sent, idle = testbed.interface_bytes(options.interface)[1], idle_seconds()
            began = time.perf_counter()
            steps = [each.step(workload.batch(each.steps)) for _ in range(options.steps)]
            hvd.barrier()
            seconds = time.perf_counter() - began
            sent = testbed.interface_bytes(options.interface)[1] - sent
            alone = None if each.name == COMPUTE else each.reduce_alone()
            if number < 0:
                continue
            own["steps"] += steps
            own["alone"] += [] if alone is None else [alone]
            own["bytes"].append(sent / hvd.local_size() / options.steps)
            capacity = seconds * (os.cpu_count() or 1)
            own["busy"].append(1 - (idle_seconds() - idle) / capacity)
        say(f"round {number + 1} of {options.rounds}, {time.monotonic() - started:.0f} s")
        late = bool(options.budget) and time.monotonic() - started > options.budget
        if number >= 0 and hvd.broadcast_object(late, root_rank=0, name="late"):
            break
    equal = {}
    quality = {}
    for each in contestants[1:]:
        if options.quality:
            each.reset(initial)
            for number in range(options.quality):
                each.step(workload.batch(number))
            quality[each.name] = workload.evaluate(each.model)
            say(f"{each.name}: {workload.metric} {quality[each.name]:.4f}")
        equal[each.name] = loop.replicas_equal(each.model)
    everyone = hvd.allgather_object(measured, name="measured")
    if hvd.rank() == 0:
        result = {
            "measured": mean_over_ranks(everyone),
            "quality": quality,
            "metric": workload.metric,
            "replicas_equal": equal,
            "parameters": sum(parameter.numel() for parameter in shared.model.parameters()),
            "torch_threads": torch.get_num_threads(),
        }
        print(allreduce.RESULT + json.dumps(result), flush=True)
    hvd.shutdown()


def record(options: argparse.Namespace) -> None:
    """Print what a rank's computation takes for one process that has the machine for itself."""
    import horovod.torch as hvd
    import torch

    torch.set_num_threads(1)
    hvd.init()  # of one rank: the workloads ask it
    import replay  # beside this file, as the next
    import workloads

    workload = workloads.WORKLOADS[options.model](options.cache)
    print(allreduce.RESULT + json.dumps(replay.record(workload, options.record)))
    hvd.shutdown()


def idle_seconds() -> float:
    """Seconds that this machine's cores have idled, added up, as Linux counts them."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


# -------------------------------------------------------------------------------------- arithmetic


def mean_over_ranks(everyone: list[dict[str, Any]]) -> dict[str, Any]:
    """Average what the ranks measured, value by value; all have the same methods and steps."""
    averaged: dict[str, Any] = {}
    for name in everyone[0]:
        each = [measured[name] for measured in everyone]
        steps = []
        for number in range(len(each[0]["steps"])):
            phases = [one["steps"][number] for one in each]
            keys = {key: None for one in phases for key in one}  # a rank may lack a kernel
            steps.append({key: statistics.fmean(p.get(key, 0.0) for p in phases) for key in keys})
        averaged[name] = {"steps": steps}
        for key in ("alone", "bytes", "busy"):
            columns = zip(*(one[key] for one in each), strict=True)
            averaged[name][key] = [statistics.fmean(values) for values in columns]
    return averaged


def total(phases: Phases) -> float:
    """Seconds of a step."""
    return sum(phases[name] for name in ("forward", "backward", "synchronize", "update"))


def split(phases: Phases, compute: float) -> dict[str, float]:
    """Split a step into PARTS, in seconds, which add up to it; `compute` is that of a step alone.

    "communicate" is what is left, and may be negative: while a rank waits, others have its core,
    and compute faster than they do in the step without communication, where nobody waits.
    """
    quantize = sum(seconds for name, seconds in phases.items() if name.startswith("kernel:"))
    wait = phases["synchronize"] - phases["kernels in synchronize"]
    left = total(phases) - compute - quantize - wait
    return {"compute": compute, "quantize": quantize, "communicate": left, "wait": wait}


def spread(values: list[float]) -> tuple[float, float]:
    """Return (median, distance between the quartiles)."""
    if len(values) < 2:
        return values[0], 0.0
    quarters = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), quarters[2] - quarters[0]


def summarize(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a row of figures for each method, in seconds and bytes; COMPUTE is one of them."""
    measured = result["measured"]
    compute = statistics.median(map(total, measured[COMPUTE]["steps"]))
    forward = statistics.median(step["forward"] for step in measured[COMPUTE]["steps"])
    rows: dict[str, dict[str, Any]] = {}
    for name, own in measured.items():
        step, quartiles = spread([total(phases) for phases in own["steps"]])
        keys = {key: None for phases in own["steps"] for key in phases}
        phases = {key: statistics.median(one.get(key, 0.0) for one in own["steps"]) for key in keys}
        parts = [split(one, compute) for one in own["steps"]]
        row = rows[name] = {
            "step": step,
            "spread": quartiles,
            "parts": {part: statistics.median(one[part] for one in parts) for part in PARTS},
            "phases": phases,
            "bytes": statistics.median(own["bytes"]),
            "busy": statistics.median(own["busy"]),
            "alone": statistics.median(own["alone"]) if own["alone"] else None,
            "quality": result["quality"].get(name),
        }
        if row["alone"]:
            row["overlap"] = step / max(compute, row["alone"])
            # There are no gradients to reduce before the forward pass has ended.
            row["to possible"] = step / max(compute, forward + row["alone"])
    for baseline in ("none", "fp16"):
        for name, row in rows.items():
            known = baseline in rows and name != COMPUTE
            row[f"faster than {baseline}"] = rows[baseline]["step"] / row["step"] if known else None
    return rows


# --------------------------------------------------------------------------------- launch and print


@contextlib.contextmanager
def hosts(ranks: int, rate: str, per_host: int) -> Iterator[tuple[Any, str, str]]:
    """Make the hosts of a job; yields (testbed or None, its interface, where that is in words)."""
    reason = "asked for" if rate == allreduce.LOOPBACK else testbed.unavailable()
    if reason is not None:
        yield None, launcher.LOOPBACK, f"{ranks} processes over loopback ({reason})"
        return
    number = ranks // per_host
    with testbed.Testbed(number, rate) as bed:
        several = f" of {per_host} ranks" if per_host > 1 else ""
        where = f"{number} hosts{several} (network namespaces), links of {rate}"
        yield bed, testbed.INTERFACE, where


def launch(options: argparse.Namespace, ranks: int, rate: str) -> dict[str, Any]:
    """Run one job and return what rank 0 printed, with where and when it ran."""
    environment = launcher.environment()
    # A cycle is how often Horovod's own thread looks for work, on cores that the ranks need.
    environment["HOROVOD_CYCLE_TIME"] = str(options.cycle_time)
    environment["HOROVOD_CACHE_CAPACITY"] = "8192"  # names of all methods together
    environment["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"  # for reductions by nodes
    times: dict[str, float] = {}
    if options.replay:
        script = [sys.executable, str(Path(__file__).resolve()), options.model]
        script += ["--cache", str(options.cache), "--record", str(ranks)]
        times = allreduce.result_in(subprocess.check_output(script, env=environment, text=True))
        times = {name: options.replay * seconds for name, seconds in times.items()}
    loads = [os.getloadavg()[0]]
    with hosts(ranks, rate, options.per_host) as (bed, interface, where):
        print(f"{options.model}: {where}", flush=True)
        script = [sys.executable, str(Path(__file__).resolve()), options.model]
        script += ["--methods", ",".join(options.methods), "--interface", interface]
        script += ["--times", json.dumps(times)] + ["--serial"] * options.serial
        for name in ("rounds", "steps", "warm_up", "quality", "budget", "cache", "groups"):
            script += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        start = getattr(launcher, options.launcher)
        if bed and options.launcher == "horovodrun":
            environment |= bed.horovodrun_environment()
        output = subprocess.run(
            [*start(bed, ranks), *script],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=options.timeout,
        ).stdout
    loads.append(os.getloadavg()[0])
    facts = {"where": where, "rate": rate, "ranks": ranks, "load": loads, "replayed": times}
    return allreduce.result_in(output) | facts


def print_tables(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Print what a step takes, and what it is spent on."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 132)
    rows = result["rows"]
    title = f"{options.model}, {result['parameters'] / 1e6:.2f} M parameters, {result['where']}\n"
    title += f"milliseconds of a step, median of {len(result['measured'][COMPUTE]['steps'])}"
    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    headings = ["step", "IQR", "/none", "/fp16", *PARTS, "alone", "overlap", "possible", "MB"]
    headings += [result["metric"]] if result["quality"] else []
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    detail = Table(title="of which; others: cpu of other threads; busy: of all cores")
    detail.add_column("method", no_wrap=True)
    kernels = ["norms", "quantize", "reduce", "dequantize", "cast"]
    phases = ["forward", "backward", "synchronize", "update", "cpu", "cpu of other threads"]
    for heading in (*phases[:-1], "others", *kernels, "busy"):
        detail.add_column(heading, justify="right")
    for name, row in rows.items():

        def times(value: float | None, digits: int = 2) -> str:
            return "" if value is None else f"{value:.{digits}f}"

        def ms(value: float | None) -> str:
            return "" if value is None else f"{1e3 * value:.0f}"

        cells = [ms(row["step"]), ms(row["spread"])]
        cells += [times(row[f"faster than {baseline}"]) for baseline in ("none", "fp16")]
        cells += ["" if name == COMPUTE else ms(row["parts"][part]) for part in PARTS]
        cells += [ms(row["alone"]), times(row.get("overlap")), times(row.get("to possible"))]
        cells += [f"{row['bytes'] / 1e6:.2f}"]
        cells += [times(row["quality"], 4)] if result["quality"] else []
        table.add_row(name, *cells)
        found = row["phases"]
        spent = [ms(found[phase]) for phase in phases]
        spent += [ms(found.get(f"kernel:{kernel}")) for kernel in kernels]
        detail.add_row(name, *spent, f"{row['busy']:.0%}")
    console.print(table)
    console.print(detail)
    console.print(
        "/none, /fp16: times as fast. overlap: step / max(compute alone, alone). possible: step / "
        "max(compute alone, forward + alone), since nothing can be reduced before backward. "
        f"{os.cpu_count()} cores, load average {result['load'][0]:.1f} before and "
        f"{result['load'][1]:.1f} after, {result['torch_threads']} torch thread, Horovod cycle "
        f"{options.cycle_time} ms{f', {options.groups} groups' if options.groups else ''}.",
        highlight=False,
    )
    if options.replay:
        console.print(
            f"Computation replayed at {options.replay:g} times its recorded duration"
            f"{', standing still during hooks' if options.serial else ''}."
        )
    if options.quality:
        console.print(f"{result['metric']}: held out, after {options.quality} steps of each method")
    different = [name for name, equal in result["replicas_equal"].items() if not equal]
    if different:
        raise SystemExit(f"The ranks hold different parameters after {', '.join(different)}.")


def plot(results: list[dict[str, Any]], model: str, path: Path) -> None:
    """Draw stacked bars, a panel for each job."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(PARTS, ("#444444", "#e69f00", "#56b4e9", "#d55e00"), strict=True))
    names = [name for name in results[0]["rows"] if name != COMPUTE]
    figure, panels = plt.subplots(
        1,
        len(results),
        figsize=(1 + 4.5 * len(results), 1.6 + 0.32 * len(names)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, result in zip(panels[0], results, strict=True):
        left = [0.0] * len(names)
        for part in PARTS:
            values = [1e3 * max(result["rows"][name]["parts"][part], 0.0) for name in names]
            panel.barh(names, values, left=left, label=part, color=colours[part])
            left = [sum(pair) for pair in zip(left, values, strict=True)]
        panel.set_title(f"{result['ranks']} ranks, {result['rate']}", fontsize=9)
        panel.set_xlabel("milliseconds of a step")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].invert_yaxis()
    panels[0][-1].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{model}, {results[0]['parameters'] / 1e6:.1f} M parameters", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Launch the jobs, or be a rank of one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument(
        "--rates",
        type=allreduce.rates,
        default="200mbit,1gbit",
        help=f"of the links, or {allreduce.LOOPBACK}",
    )
    parser.add_argument("--ranks", default="4", help="such as 2,4,8,16")
    parser.add_argument("--per-host", type=int, default=1, help="ranks on each host")
    parser.add_argument(
        "--methods",
        help="separated by commas; all but auto and by nodes by default",
        default=",".join(name for name in METHODS if name != AUTO and name not in BY_NODES),
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of a method in a round")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--quality", type=int, default=0, help="steps to the evaluation (0: none)")
    parser.add_argument("--replay", type=float, default=0, help="times its duration (0: compute)")
    parser.add_argument("--serial", action="store_true", help="replay stands still during hooks")
    parser.add_argument("--budget", type=float, default=0, help="seconds to the last round's start")
    parser.add_argument("--cycle-time", type=float, default=1, help="Horovod's, ms (default 1)")
    parser.add_argument("--groups", type=int, default=0, help="Horovod's, of tensors (0: none)")
    parser.add_argument(
        "--launcher",
        choices=("mpirun", "horovodrun"),
        default="mpirun",
        help="the latter over Gloo",
    )
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one job")
    parser.add_argument("--cache", type=Path, default=Path("results"), help="for prepared data")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--record", type=int, help=argparse.SUPPRESS)  # print what replay needs
    parser.add_argument("--times", type=json.loads, help=argparse.SUPPRESS)  # replay them
    parser.add_argument("--interface", help=argparse.SUPPRESS)  # be a rank, that counts its bytes
    options = parser.parse_args()
    options.methods = options.methods.split(",")
    unknown = [name for name in options.methods if name not in METHODS]
    if unknown:
        parser.error(f"--methods: expected some of {', '.join(METHODS)}; got {', '.join(unknown)}")
    if min(options.rounds, options.steps) < 1 or min(options.warm_up, options.quality) < 0:
        parser.error("--rounds and --steps must be at least 1, --warm-up and --quality at least 0")
    if options.serial and not (options.replay or options.times):
        parser.error("--serial says how computation is replayed; add --replay")
    if options.replay < 0 or (options.replay and options.quality):
        parser.error("--replay must not be negative, and trains nothing for --quality to evaluate")
    if options.record:
        record(options)
        return
    if options.interface:
        run_rank(options)
        return
    if options.per_host < 1 or any(
        int(ranks) % options.per_host for ranks in options.ranks.split(",")
    ):
        parser.error("--per-host must be 1 or more, and divide every number of --ranks")
    options.methods, remarks = available(options.methods)
    for remark in remarks:
        print(remark)
    if not options.methods:
        parser.error("--methods: none of them is available here")
    results = []
    for ranks in map(int, options.ranks.split(",")):
        for rate in options.rates:
            result = launch(options, ranks, rate)
            result["rows"] = summarize(result)
            print_tables(result, options)
            results.append(result)
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"training-{options.model}"
    document = {"model": options.model, "cores": os.cpu_count(), "cycle_ms": options.cycle_time}
    document |= {"replay": options.replay, "serial": options.serial, "groups": options.groups}
    stem.with_suffix(".json").write_text(json.dumps({**document, "jobs": results}, indent=2) + "\n")
    plot(results, options.model, stem.with_suffix(".png"))
    print(f"Wrote {stem.with_suffix('.json')} and {stem.with_suffix('.png')}")


if __name__ == "__main__":
    main()
