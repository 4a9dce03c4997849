"""A step of many gradients: what reducing them costs, for real models' shapes.

    python benchmarks/many_tensors.py                              # 300 and 900 tensors, loopback
    python benchmarks/many_tensors.py --models ResNet-50,BERT-large --rates loopback,1gbit
    python benchmarks/many_tensors.py --framework tensorflow --models 100x16384

One job of two ranks, a core each, for each model and rate, on the hosts of tools/testbed.py where
there are links to shape, else over loopback. Its methods take turns, round after round. There is no
model and no backward pass: every gradient is handed to Horovod's hook, the last layer's first, and
then the optimizer synchronizes. Prints, for each method, the median of a step and its spread, the
ratio to no compression, the CPU time of all threads of rank 0, which spend some of it on waiting,
microseconds in a hook and in synchronize() for each tensor, and operations of Horovod in a step. In
TensorFlow a step is a tf.function with the gradients of a sum, and what is printed beside it is the
time to trace it. Writes many_tensors.json and many_tensors.png.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from allreduce import LOOPBACK, RESULT, rates, result_in
from shapes import PARAMETERS, Shapes, shapes

from tools import ranks as launcher
from tools import testbed

BASELINE = "none"
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "fp16": {},
    "standard": {"levels": "standard"},
    "exponential": {"levels": "exponential"},
    "two-hop": {"levels": "two-hop"},
    "auto": {"levels": "auto"},
    "standard, mpi": {"levels": "standard", "transport": "mpi"},
    "two-hop, mpi": {"levels": "two-hop", "transport": "mpi"},
    "two-hop, 3 bit": {"levels": "two-hop", "bits": 3},
    "two-hop, 3 bit, feedback": {"levels": "two-hop", "bits": 3, "error_feedback": True},
}
# Options that TensorFlow refuses.
PYTORCH_ONLY = {"transport", "error_feedback"}
SYNTHETIC = ("300x16384", "900x16384")
# Horovod's default is 1024 names; all methods share a job here.
CACHE_CAPACITY = 32768


class Torch:
    """Reduces gradients as an optimizer's hooks and its synchronize() do."""

    def __init__(self, own: Shapes, methods: dict[str, dict[str, Any]]) -> None:
        import horovod.torch as hvd
        import torch

        from gq_horovod.torch import GlobalQSGD

        hvd.init()
        torch.set_num_threads(1)
        torch.manual_seed(hvd.rank())
        self._hvd = hvd
        self.parameters = [torch.nn.Parameter(torch.zeros(shape)) for _, shape in own]
        for parameter in self.parameters:
            parameter.grad = torch.randn(parameter.shape)
        self._optimizers = {}
        for method, options in methods.items():
            plain = getattr(hvd.Compression, method, None)
            self._optimizers[method] = hvd.DistributedOptimizer(
                torch.optim.SGD(self.parameters, lr=0.0),
                [
                    (f"{method}.{name}", parameter)
                    for (name, _), parameter in zip(own, self.parameters, strict=True)
                ],
                compression=plain if plain is not None else GlobalQSGD(**options),
            )

    def step(self, method: str) -> dict[str, float]:
        """Seconds of a step and of its hooks, and of all cores for it."""
        optimizer = self._optimizers[method]
        handles, hook = optimizer._handles, optimizer._allreduce_grad_async
        began, before = time.perf_counter(), time.process_time()
        for parameter in reversed(self.parameters):
            handles[parameter] = hook(parameter)
        hooks = time.perf_counter() - began
        optimizer.synchronize()
        taken, cpu = time.perf_counter() - began, time.process_time() - before
        optimizer._synchronized = False
        return {"step": taken, "hooks": hooks, "cpu": cpu}

    def operations(self, method: str) -> int:
        """Operations of Horovod in a step."""
        from gq_horovod.torch import numbering

        library, count = numbering.library(), 0
        if library is None:  # nothing of ours was used
            return len(self.parameters)
        originals = dict(vars(library))

        def counting(function: Callable[..., int]) -> Callable[..., int]:
            def call(*arguments: Any) -> int:
                nonlocal count
                count += 1
                return function(*arguments)

            return call

        for name, function in originals.items():
            if "_async_" in name:
                setattr(library, name, counting(function))
        self.step(method)
        vars(library).update(originals)
        return count

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._hvd.barrier()

    @property
    def rank(self) -> int:
        """Of this process."""
        return int(self._hvd.rank())


class TensorFlow:
    """Reduces the gradients of a sum in a tf.function."""

    def __init__(self, own: Shapes, methods: dict[str, dict[str, Any]]) -> None:
        import horovod.tensorflow as hvd
        import tensorflow as tf

        from gq_horovod.tensorflow import GlobalQSGD

        hvd.init()
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.random.set_seed(hvd.rank())
        self._hvd = hvd
        self.parameters = [tf.Variable(tf.random.normal(shape), name=name) for name, shape in own]
        factors = [tf.random.normal(shape) for _, shape in own]
        self._functions: dict[str, Any] = {}
        self.traced: dict[str, float] = {}
        for method, options in methods.items():
            name, _, groups = method.partition(", groups ")
            plain = getattr(hvd.Compression, name, None)
            compression = plain if plain is not None else GlobalQSGD(**options)
            self._functions[method] = tf.function(
                self._step(hvd, tf, factors, compression, int(groups or 0))
            )

    def _step(
        self, hvd: Any, tf: Any, factors: list[Any], compression: Any, groups: int
    ) -> Callable[[], Any]:
        def step() -> Any:
            with tf.GradientTape() as tape:
                products = zip(self.parameters, factors, strict=True)
                loss = tf.add_n([tf.reduce_sum(one * other) for one, other in products])
            tape = hvd.DistributedGradientTape(tape, compression=compression, groups=groups or None)
            gradients = tape.gradient(loss, self.parameters)
            return tf.add_n([tf.reshape(own, [-1])[0] for own in gradients])

        return step

    def step(self, method: str) -> dict[str, float]:
        """Seconds of a step, and of all cores for it; the first one traces it."""
        began, before = time.perf_counter(), time.process_time()
        float(self._functions[method]())
        taken, cpu = time.perf_counter() - began, time.process_time() - before
        self.traced.setdefault(method, taken)
        return {"step": taken, "hooks": 0.0, "cpu": cpu}

    def operations(self, method: str) -> int:
        """Not counted."""
        return 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        from mpi4py import MPI  # Horovod's TensorFlow has none

        MPI.COMM_WORLD.Barrier()

    @property
    def rank(self) -> int:
        """Of this process."""
        return int(self._hvd.rank())


FRAMEWORKS: dict[str, Any] = {"torch": Torch, "tensorflow": TensorFlow}


def pin() -> None:
    """Keep this rank on a core of its own, where there are enough."""
    cores = sorted(os.sched_getaffinity(0))
    rank, ranks = (int(os.environ[f"OMPI_COMM_WORLD_{own}"]) for own in ("RANK", "SIZE"))
    if ranks <= len(cores):
        os.sched_setaffinity(0, {cores[rank]})


def run_rank(options: argparse.Namespace, model: str) -> None:
    """One rank: rank 0 prints a line of JSON."""
    pin()
    methods = {name: METHODS[name.partition(", groups ")[0]] for name in options.methods}
    job = FRAMEWORKS[options.framework](shapes(model), methods)
    operations: dict[str, int] = {}
    for method in methods:
        # Agree, settle, fill the caches; and what levels="auto" tries, with nothing in between.
        for _ in range(100 if methods[method].get("levels") == "auto" else 3):
            job.step(method)
        operations[method] = job.operations(method)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for number in range(options.rounds):
        for method, own in measured.items():
            job.step(method)  # what the method before has left in caches and queues
            job.barrier()
            own.append(job.step(method))
        if job.rank == 0:
            print(f"{model}: round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    job.barrier()
    if job.rank == 0:
        found = {"tensors": len(job.parameters), "operations": operations, "measured": measured}
        found["traced"] = getattr(job, "traced", {})
        print(RESULT + json.dumps(found), flush=True)


def launch(options: argparse.Namespace, model: str, rate: str) -> dict[str, Any]:
    """Start the ranks and return what rank 0 printed, and where they ran."""
    reason = "asked for" if rate == LOOPBACK else testbed.unavailable()
    with contextlib.ExitStack() as stack:
        bed, where = None, f"loopback of one host ({reason})"
        if reason is None:
            bed = stack.enter_context(testbed.Testbed(options.ranks, rate))
            where = f"{options.ranks} hosts (network namespaces), links of {rate}"
        script = [sys.executable, str(Path(__file__).resolve()), "--job", "--models", model]
        script += ["--rounds", str(options.rounds), "--framework", options.framework]
        script += ["--methods", ";".join(options.methods)]
        output = subprocess.run(
            [*launcher.mpirun(bed, options.ranks), *script],
            env=launcher.environment()
            | {"HOROVOD_CACHE_CAPACITY": str(CACHE_CAPACITY), "TF_CPP_MIN_LOG_LEVEL": "2"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=options.timeout,
        ).stdout
    found = result_in(output)
    return {"model": model, "rate": rate, "where": where, **found, "rows": summarize(found)}


def summarize(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """A row of figures for each method: milliseconds, ratios, microseconds."""
    count, rows = found["tensors"], {}
    baseline = statistics.median(own["step"] for own in found["measured"][BASELINE])
    for method, steps in found["measured"].items():
        taken = sorted(own["step"] for own in steps)
        hooks = statistics.median(own["hooks"] for own in steps)
        median = statistics.median(taken)
        quarters = statistics.quantiles(taken, n=4) if len(taken) > 1 else [median] * 3
        rows[method] = {
            "milliseconds": 1e3 * median,
            "mean": 1e3 * statistics.mean(taken),
            "spread": 1e3 * (quarters[2] - quarters[0]),
            "ratio": median / baseline,
            "cpu": 1e3 * statistics.median(own["cpu"] for own in steps),
            "hook": 1e6 * hooks / count,
            "synchronize": 1e6 * (median - hooks) / count,
            "operations": found["operations"][method],
            "traced": found["traced"].get(method, 0.0),
        }
    return rows


def print_table(job: dict[str, Any], torch: bool) -> None:
    """The figures of one model and rate."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{job['model']}: {job['tensors']} tensors, {job['where']}")
    table.add_column("method", no_wrap=True)
    headings = ["ms", "mean", "spread", "/ none", "CPU, ms"]
    headings += ["hook, µs", "synchronize, µs", "operations"] if torch else ["tracing, s"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for method, row in job["rows"].items():
        cells = [f"{row[key]:.1f}" for key in ("milliseconds", "mean", "spread")]
        cells += [f"{row['ratio']:.2f}", f"{row['cpu']:.1f}"]
        if torch:
            cells += [f"{row['hook']:.0f}", f"{row['synchronize']:.0f}", str(row["operations"])]
        else:
            cells.append(f"{row['traced']:.1f}")
        table.add_row(method, *cells)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def plot(jobs: list[dict[str, Any]], path: Path) -> None:
    """Bars: times of none's step, for each model and method; a panel for each rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_rate: dict[str, list[dict[str, Any]]] = {}
    for job in jobs:
        by_rate.setdefault(job["rate"], []).append(job)
    most = max(len(own) for own in by_rate.values())
    figure, panels = plt.subplots(
        len(by_rate),
        1,
        figsize=(1.6 + 1.7 * most, 3.2 * len(by_rate)),
        squeeze=False,
        layout="constrained",
    )
    for panel, (_, own) in zip(panels[:, 0], by_rate.items(), strict=True):
        methods = [name for name in own[0]["rows"] if name != BASELINE]
        for place, method in enumerate(methods):
            shift = (place - (len(methods) - 1) / 2) * 0.8 / len(methods)
            at = [number + shift for number in range(len(own))]
            ratios = [job["rows"][method]["ratio"] for job in own]
            panel.bar(at, ratios, width=0.8 / len(methods), label=method)
        panel.axhline(1, color="black", lw=0.8)
        labels = [f"{job['model']}\n{job['tensors']} tensors" for job in own]
        panel.set_xticks(range(len(own)), labels, fontsize=8)
        panel.set_title(own[0]["where"], fontsize=9)
        panel.set_ylabel("time of a step / none's")
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Launch the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--models",
        default=",".join(SYNTHETIC),
        help=f"of {', '.join(PARAMETERS)}, or COUNTxELEMENTS; separated by commas",
    )
    parser.add_argument(
        "--methods", help="separated by semicolons (default: all that the framework takes)"
    )
    parser.add_argument("--framework", choices=FRAMEWORKS, default="torch")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--rates", type=rates, default=LOOPBACK, help=f"of every host's link, or {LOOPBACK}"
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for a job")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)  # be a rank of it
    options = parser.parse_args()
    if options.methods is None:
        refused = PYTORCH_ONLY if options.framework == "tensorflow" else set()
        options.methods = [name for name, own in METHODS.items() if not refused & own.keys()]
    else:
        options.methods = options.methods.split(";")
    models = options.models.split(",")
    if options.job:
        run_rank(options, models[0])
        return
    stem, jobs = options.output / "many_tensors", []
    for rate in options.rates:
        for model in models:
            jobs.append(launch(options, model, rate))
            print_table(jobs[-1], options.framework == "torch")
            # After each, so that a run that is interrupted leaves something.
            options.output.mkdir(parents=True, exist_ok=True)
            document = {"ranks": options.ranks, "framework": options.framework, "jobs": jobs}
            stem.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n")
            plot(jobs, stem.with_suffix(".png"))
    print(f"Wrote {stem.with_suffix('.json')} and {stem.with_suffix('.png')}")


if __name__ == "__main__":
    main()
