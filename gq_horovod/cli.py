"""The command `gq-horovod`: predict what compression does for a cluster, and measure the cluster.

    gq-horovod advise --params 607959381 --workers 64 --bandwidth 1Gbit --step-compute 120ms
    mpirun -np 4 --host a,b,c,d gq-horovod calibrate --output calibration.json
    gq-horovod simulate --plot simulation.png
    gq-horovod doctor; mpirun -np 4 --host a,b,c,d gq-horovod doctor
    gq-horovod env
    gq-horovod report results/

Tables need rich, plots matplotlib (`pip install gq-horovod[cli]`); --json needs neither.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from . import __version__
from .advisor import calibrate, doctor, model
from .advisor.model import METHODS, MOST_RANKS, NONE, Cluster, Method
from .research import report

# Less is within the model's error: a setting is recommended from this speed-up over none, and the
# simplest one (the first of METHODS) that the fastest one does not beat by so much.
WORTHWHILE = 1.05


# ------------------------------------------------------------------------------------------- units

_DURATIONS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_BIT_RATES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
_NUMBER = r"((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)"  # as Python writes them
# Beyond these no cluster is meant, and the model would end in infinities, or not at all.
_MOST_PARAMETERS = 2 * 10**11
_MOST_BITS_PER_SECOND = 1e15
_MOST_SECONDS = 1e9


def bandwidth(text: str) -> float:
    """Bits per second of "1Gbit", "200 Mbit/s" or "25Gbps". Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(
        _NUMBER + r"\s*([kmgt]?)(?:bit|bits|bps|b/s)(?:/s|ps)?", text.strip(), re.I
    )
    # A capital B is a byte to most who write it; guessing would be wrong by a factor of 8.
    rate = 0.0
    if match is not None and not re.search("B(?!it)", text):
        rate = float(match[1]) * _BIT_RATES[match[2].lower()]
    if not 1 <= rate <= _MOST_BITS_PER_SECOND:
        raise argparse.ArgumentTypeError(
            "expected a positive rate in bits such as 1Gbit, 200Mbit or 25Gbps, from 1bit to "
            f"1000Tbit, got {text!r}; a rate in bytes times 8 is one in bits"
        )
    return rate


def duration(text: str) -> float:
    """Seconds of "120ms", "1.5s" or "50us". Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(_NUMBER + r"\s*(us|µs|ms|s|min)", text.strip())
    seconds = math.inf if match is None else float(match[1]) * _DURATIONS[match[2]]
    if seconds > _MOST_SECONDS:
        raise argparse.ArgumentTypeError(
            "expected a duration with its unit such as 120ms, 1.5s or 50us, from 0s to "
            f"{_MOST_SECONDS:.0e}s, got {text!r}; append us, ms, s or min"
        )
    return seconds


def count(text: str, most: int = _MOST_PARAMETERS) -> int:
    """An integer such as "64", "607_959_381", "608M" or "6e8". Raises ArgumentTypeError."""
    match = re.fullmatch(_NUMBER + r"\s*([kmgb]?)", text.strip().replace("_", ""), re.I)
    value = Decimal(0)  # exact, as float is not beyond 2**53
    if match is not None:
        value = Decimal(match[1]) * _COUNTS[match[2].lower()]
    if not 1 <= value <= most or value != int(value):
        raise argparse.ArgumentTypeError(
            "expected a positive whole number such as 64, 608M or 6e8, of at most "
            f"{most:,}, got {text!r}"
        )
    return int(value)


def rank_count(text: str) -> int:
    """A number of ranks, see `count`."""
    return count(text, MOST_RANKS)


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of such values with commas between them."""
    return lambda text: [kind(part) for part in text.split(",")]


def share(text: str) -> float:
    """A number from 0 to 1. Raises argparse.ArgumentTypeError."""
    value = float(text) if re.fullmatch(_NUMBER, text.strip()) else math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f"expected a share of the compute time from 0 to 1 such as 0.5, got {text!r}"
        )
    return value


def workload_compute(text: str) -> tuple[str, float]:
    """ "DeepLight=120ms" as name and seconds. Raises argparse.ArgumentTypeError."""
    name, _, value = text.partition("=")
    names = [workload.name for workload in model.WORKLOADS]
    if name not in names or not value:
        raise argparse.ArgumentTypeError(
            f"expected NAME=DURATION with a name of {', '.join(names)}, got {text!r}; "
            f"write {names[0]}=120ms"
        )
    return name, duration(value)


def written_rate(rate: float) -> str:
    """A bandwidth for people."""
    if rate <= 0:
        return "never"
    if math.isinf(rate):
        return f"> {model.BANDWIDTHS[1] / 1e9:.0f} Gbit/s"
    unit, name = next((u, n) for u, n in ((1e9, "Gbit/s"), (1e6, "Mbit/s")) if rate >= u or u < 1e9)
    return f"{rate / unit:.3g} {name}"


def written_share(efficiency: model.Efficiency) -> str:
    """A share of the bandwidth for people, of payloads of growing size."""
    if not isinstance(efficiency, tuple):
        return f"{efficiency:.0%}"
    return ", ".join(f"{share:.0%} ({size / 2**20:.3g} MiB)" for size, share in efficiency)


def written_seconds(seconds: float) -> str:
    """A duration for people."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


# ------------------------------------------------------------------------------------------ advise


def cluster_of(options: argparse.Namespace) -> Cluster:
    """The calibrated cluster, or the defaults, with what the command line says instead.

    Raises ValueError where neither says how many workers there are, or how fast their network is.
    """
    given = {
        "ranks": options.workers,
        "bandwidth": options.bandwidth,
        "latency": options.latency,
        "ranks_per_host": options.ranks_per_host,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if options.calibration is not None:
        return replace(calibrate.load(options.calibration), **given)
    for name, option in (("ranks", "--workers"), ("bandwidth", "--bandwidth")):
        if name not in given:
            raise ValueError(f"expected {option} or --calibration, got neither; give one of them.")
    return Cluster(**given)


def advice(options: argparse.Namespace) -> dict[str, Any]:
    """What `advise` says, as plain data: seconds, bytes and bits per second."""
    cluster = cluster_of(options)
    sizes, compute, overlap = options.params, options.step_compute, options.overlap
    base = model.step_time(NONE, sizes, cluster, compute, overlap)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for method in METHODS:
        reason = method.why_not(cluster.ranks)
        if reason is not None:
            left_out[method.name] = reason
            continue
        cost = model.cost(method, sizes, cluster)
        step = model.step_time(method, sizes, cluster, compute, overlap)

        def below(reference: Method, method: Method = method) -> float | None:
            """None for infinity, which JSON lacks."""
            found = model.break_even(method, reference, sizes, cluster, compute, overlap)
            return None if math.isinf(found) else found

        rows.append(
            {
                "method": method.name,
                "argument": method.argument,
                "step_seconds": step,
                "speedup": base / step,
                "reduction_seconds": cost.seconds,
                "kernel_seconds": cost.kernels,
                "bytes_per_rank": cost.bytes,
                "pays_over_none_below": 0.0 if method is NONE else below(NONE),
                "pays_over_fp16_below": 0.0 if method is model.FP16 else below(model.FP16),
                "candidate": method.recommended,
            }
        )
    candidates = [row for row in rows if row["candidate"]]
    fastest = min(row["step_seconds"] for row in candidates)
    best = next(row for row in candidates if row["step_seconds"] < WORTHWHILE * fastest)
    return {
        "cluster": asdict(cluster),
        "parameters": sum(sizes),
        "step_compute_seconds": compute,
        "overlap": overlap,
        "methods": rows,
        "left_out": left_out,
        "recommended": {key: best[key] for key in ("method", "argument", "speedup")},
        "assumptions": assumptions(options, cluster),
    }


def assumptions(options: argparse.Namespace, cluster: Cluster) -> list[str]:
    """What a prediction takes for granted, in words."""
    source = (
        f"measured ({options.calibration})" if options.calibration else "defaults, not measured"
    )
    tensors = len(options.params)
    return [
        f"Latency, efficiency, Horovod's overheads and kernels: {source}. A payload reaches "
        f"{written_share(cluster.allreduce_efficiency)} of the bandwidth in Allreduce, "
        f"{written_share(cluster.gather_efficiency)} in Alltoall and Allgather, "
        f"{written_share(cluster.message_efficiency)} in messages.",
        f"{cluster.ranks} ranks, {cluster.ranks_per_host} on each host; the slowest link counts; "
        "nothing else uses the network.",
        f"Communication hides behind {options.overlap:.0%} of the compute time (--overlap); "
        "kernels do not, and neither does what becomes ready last.",
        "One number of parameters: gradients become ready evenly, the last 4 M elements at the end."
        if tensors == 1
        else f"{tensors} tensors in the order of the model; the first is ready last.",
        "4-bit settings are never recommended: try them for accuracy first. Standard levels use "
        "the default width for this many ranks.",
        f"Of settings within {WORTHWHILE - 1:.0%} of the fastest, the simplest is recommended. "
        "What the model leaves out, and its measured error: docs/advisor.md.",
    ]


def print_advice(result: dict[str, Any]) -> None:
    """The table, and what follows from it."""
    console, table_of = rich()
    cluster = result["cluster"]
    table = table_of(
        f"{result['parameters']:,} parameters, {cluster['ranks']} ranks, "
        f"{written_rate(cluster['bandwidth'])}, "
        f"{written_seconds(result['step_compute_seconds'])} of compute",
        ["method"],
        ["step", "speed-up", "MB per rank", "beats none below", "beats fp16 below"],
    )
    for row in result["methods"]:
        limits = [row[f"pays_over_{other}_below"] for other in ("none", "fp16")]
        own = (row["method"] == "none", row["method"] in ("none", "fp16"))
        table.add_row(
            row["method"],
            written_seconds(row["step_seconds"]),
            f"{row['speedup']:.2f}",
            f"{row['bytes_per_rank'] / 1e6:.1f}",
            *(
                "" if itself else written_rate(math.inf if limit is None else limit)
                for limit, itself in zip(limits, own, strict=True)
            ),
        )
    console.print(table)
    for name in result["left_out"]:
        console.print(f"{name}: cannot hold the sum of {cluster['ranks']} ranks", highlight=False)
    best = result["recommended"]
    print(f"\nRecommended: {best['argument']}   (predicted {best['speedup']:.2f}x)")
    if "mpi" in best["argument"]:
        print("             which needs mpirun and MPI_THREAD_MULTIPLE")
    print("\nAssumptions:")
    for line in result["assumptions"]:
        print(f"- {line}")


def advise(options: argparse.Namespace) -> None:
    """`gq-horovod advise`."""
    result = advice(options)
    if options.plot is not None:
        plot_advice(options, cluster_of(options))
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_advice(result)


def plot_advice(options: argparse.Namespace, cluster: Cluster) -> None:
    """Step time against bandwidth, with a line where the user's is."""
    rates = [10 ** (8 + step / 20) for step in range(61)]  # 0.1 to 100 Gbit/s
    figure, axes = new_plot()
    for method in METHODS:
        if method.why_not(cluster.ranks) is None:
            steps = [
                model.step_time(
                    method,
                    options.params,
                    replace(cluster, bandwidth=rate),
                    options.step_compute,
                    options.overlap,
                )
                for rate in rates
            ]
            style = "-" if method.recommended else ":"
            axes.loglog([rate / 1e9 for rate in rates], steps, style, label=method.name)
    axes.axvline(cluster.bandwidth / 1e9, color="gray", linestyle="--")
    axes.set_xlabel("bandwidth of a host's link, Gbit/s")
    axes.set_ylabel("predicted step, seconds")
    axes.set_title(f"{sum(options.params):,} parameters, {cluster.ranks} ranks")
    axes.legend(fontsize=8)
    figure.savefig(options.plot, dpi=120)


# --------------------------------------------------------------------------------------- calibrate


def run_calibration(options: argparse.Namespace) -> None:
    """`gq-horovod calibrate`, in every rank."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ValueError(
            "expected mpi4py, which is not installed or finds no MPI library; "
            "`pip install gq-horovod[mpi]`."
        ) from error
    doctor.start_mpi()
    cluster, with_horovod = calibrate.measure(MPI.COMM_WORLD)
    if MPI.COMM_WORLD.rank:
        return
    calibrate.save(cluster, options.output)
    console, table_of = rich()
    table = table_of(f"{cluster.ranks} ranks", ["what"], ["measured"])
    table.add_row("ranks on a host", str(cluster.ranks_per_host))
    table.add_row("bandwidth of a pair", written_rate(cluster.bandwidth))
    table.add_row("latency", f"{1e6 * cluster.latency:.0f} us")
    table.add_row("further message", f"{1e6 * cluster.message_overhead:.1f} us")
    for way in model.WAYS:
        for size, share in getattr(cluster, f"{way}_efficiency"):
            table.add_row(f"efficiency, {way}, {size / 2**20:g} MiB", f"{share:.2f}")
        if with_horovod:
            table.add_row(f"  exposed, {way}", f"{getattr(cluster, f'{way}_exposed'):.2f}")
            table.add_row(f"  hidden, {way}", f"{getattr(cluster, f'{way}_hidden'):.2f}")
    if with_horovod:
        table.add_row("Horovod, lone operation", f"{1e3 * cluster.cycle_time:.2f} ms")
        table.add_row("Horovod, further operation", f"{1e6 * cluster.operation_overhead:.0f} us")
    else:
        table.add_row("Horovod", "not importable: defaults")
    for name, rate in asdict(cluster.kernels).items():
        table.add_row(f"kernel, {name}", f"{rate / 1e9:.1f} GB/s")
    console.print(table)
    print(f"Wrote {options.output}; use it with `gq-horovod advise --calibration`.")


# ---------------------------------------------------------------------------------------- simulate

SIMULATED = (
    model.FP16,
    model.STANDARD,
    model.EXPONENTIAL,
    model.STANDARD_MPI,
    model.EXPONENTIAL_MPI,
)


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
        for ranks in options.workers:
            for rate in options.bandwidth:
                cluster = replace(start, ranks=ranks, ranks_per_host=1, bandwidth=rate)
                base = model.step_time(NONE, sizes, cluster, seconds, options.overlap)
                rows.append(
                    {
                        "workload": workload.name,
                        "ranks": ranks,
                        "bandwidth": rate,
                        "step_compute_seconds": seconds,
                        "none_seconds": base,
                        "paper_model": paper_speedup(workload.parameters, cluster, seconds),
                        "speedups": {
                            method.name: base
                            / model.step_time(method, sizes, cluster, seconds, options.overlap)
                            for method in SIMULATED
                        },
                    }
                )
    return rows


def paper_speedup(parameters: int, cluster: Cluster, compute: float) -> float:
    """Speed-up of a step by the paper's own model: 8 bits, ω = 1, full bandwidth, no overlap."""
    size = model.FLOAT32_BYTES * parameters
    beta, gamma = cluster.bandwidth / 8, cluster.kernels.sum / 3  # a sum moves three bytes for one
    arguments = (cluster.ranks, size, cluster.latency, beta, gamma)
    plain = model.paper_allreduce(*arguments)
    return (compute + plain) / (compute + model.paper_compressed_allreduce(*arguments, omega=1.0))


def simulate(options: argparse.Namespace) -> None:
    """`gq-horovod simulate`."""
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
        ["ranks", "Gbit/s", "none", *(method.name for method in SIMULATED), "paper"],
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
    print(f"Compute times of a step are assumptions (--compute): {listing}.")


def plot_simulation(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-ups against bandwidth, a panel for each workload, for fewest and most workers."""
    names = list(dict.fromkeys(row["workload"] for row in rows))
    ranks = sorted({row["ranks"] for row in rows})
    figure, panels = new_plot(len(names))
    for panel, name in zip(panels, names, strict=True):
        for color, method in enumerate(SIMULATED):
            for workers, style in {ranks[0]: "-", ranks[-1]: ":"}.items():
                points = [r for r in rows if (r["workload"], r["ranks"]) == (name, workers)]
                panel.semilogx(
                    [row["bandwidth"] / 1e9 for row in points],
                    [row["speedups"][method.name] for row in points],
                    style,
                    color=f"C{color}",
                    label=f"{method.name}, {workers} ranks",
                )
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("Gbit/s")
    for what, value in model.PUBLISHED[:1]:
        panels[names.index("DeepLight")].axhline(value, color="gray", linewidth=1, label=what)
    panels[0].set_ylabel("predicted speed-up over none")
    panels[0].legend(fontsize=6)
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------- doctor


def run_doctor(options: argparse.Namespace) -> int:
    """`gq-horovod doctor`, alone or in every rank; 1 if something is wrong."""
    found = doctor.facts()
    findings = doctor.diagnose(found)
    comm = doctor.world()
    if comm is not None:
        findings = doctor.merge(comm.allgather(findings)) + doctor.cluster(comm, found)
    document = doctor.document(found, findings)
    if comm is None or comm.rank == 0:
        if options.json:
            print(json.dumps(document, indent=2))
        else:
            print_findings(findings)
    return int(document["wrong"] > 0)


def print_findings(findings: Sequence[doctor.Finding]) -> None:
    """A table, and below it what to do."""
    console, table_of = rich()
    table = table_of("gq-horovod doctor", ["what", "", "found"], [])
    for finding in findings:
        short = finding.found if len(finding.found) <= 80 else f"{finding.found[:77]}..."
        table.add_row(finding.what, finding.status, short)
    console.print(table, markup=False)
    for finding in findings:
        if finding.remedy:
            print(f"{finding.what} ({finding.status}): {finding.found}")
            print(f"    {finding.remedy}")
    if not any(finding.status == "wrong" for finding in findings):
        print("Nothing is wrong.")


def print_env(options: argparse.Namespace) -> None:
    """`gq-horovod env`: for bug reports."""
    found = doctor.facts()
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        print(f"{name}: {value}")


# ------------------------------------------------------------------------------------------ report


def report_runs(options: argparse.Namespace) -> None:
    """Print the tables of the runs below a folder, and draw their curves."""
    runs, remarks = report.collect(options.results)
    groups = report.summarize(runs)
    if options.json:
        print(json.dumps({"groups": groups, "remarks": remarks}, indent=2))
    else:
        report.print_tables(groups, remarks, *rich())
    folder = options.output
    if folder is None and not options.json:
        place: Path = options.results
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
        figure.suptitle(f"{group['workload']} ({group['preset']}), {group['ranks']} ranks")
        figure.savefig(path, dpi=120)
        if not options.json:
            print(f"Plot: {path}")


# ------------------------------------------------------------------------------------------ output


def rich() -> tuple[Any, Callable[[str, list[str], list[str]], Any]]:
    """A console, and a maker of tables from title, left-aligned and right-aligned headings."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise ValueError(
            "expected rich for the table, which is not installed; "
            "`pip install gq-horovod[cli]`, or pass --json."
        ) from error

    def table_of(title: str, left: list[str], right: list[str]) -> Table:
        table = Table(title=title)
        for heading in left:
            table.add_column(heading, no_wrap=True)
        for heading in right:
            table.add_column(heading, justify="right", no_wrap=True)
        return table

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the program; `main` knows what to do

    # A file or a pipe has no width of its own, and 80 columns are too few.
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return Output(width=None if terminal else 130), table_of


def new_plot(panels: int = 1) -> tuple[Any, Any]:
    """A figure, and its axes; a list of them for several panels."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ValueError(
            "--plot: expected matplotlib, which is not installed; `pip install gq-horovod[cli]`."
        ) from error
    figure = matplotlib.figure.Figure(figsize=(4 + 4 * panels, 4.5), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True)
    return figure, axes


# -------------------------------------------------------------------------------------------- main


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="gq-horovod", description=(__doc__ or "").split("\n")[0])
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)

    sub = commands.add_parser("advise", help="predict step times and recommend a setting")
    sub.set_defaults(run=advise)
    sub.add_argument(
        "--params",
        type=listed(count),
        required=True,
        help="parameters of the model, such as 607959381, 608M or 6e8; or those of each tensor in "
        "the order of model.parameters(), with commas",
    )
    sub.add_argument("--workers", type=rank_count, help="ranks in all (default: the calibration's)")
    sub.add_argument("--ranks-per-host", type=rank_count, help="(default: the calibration's, or 1)")
    sub.add_argument("--bandwidth", type=bandwidth, help="of a host's link: 1Gbit, 200Mbit")
    sub.add_argument("--latency", type=duration, help="of a message: 50us")
    sub.add_argument(
        "--step-compute",
        type=duration,
        required=True,
        help="forward, backward and optimizer of a step without communication: 120ms",
    )
    _add_common(sub)

    sub = commands.add_parser("calibrate", help="measure this cluster; run it under mpirun")
    sub.set_defaults(run=run_calibration)
    sub.add_argument("--output", type=Path, default=Path("calibration.json"))

    sub = commands.add_parser("simulate", help="the paper's workloads on 64 to 4096 ranks")
    sub.set_defaults(run=simulate)
    sub.add_argument("--workers", type=listed(rank_count), default=[64, 256, 1024, 4096])
    sub.add_argument(
        "--bandwidth",
        type=listed(bandwidth),
        default=[2e8, 1e9, 5e9, 1e10, 2.5e10],
        help="with commas (default 200Mbit,1Gbit,5Gbit,10Gbit,25Gbit)",
    )
    defaults = ", ".join(f"{w.name}={written_seconds(w.compute)}" for w in model.WORKLOADS)
    sub.add_argument(
        "--compute",
        type=workload_compute,
        action="append",
        metavar="NAME=DURATION",
        help=f"compute time of a step, assumed: {defaults}",
    )
    _add_common(sub)

    sub = commands.add_parser("doctor", help="what is wrong with this installation or cluster")
    sub.set_defaults(run=run_doctor)
    sub.add_argument("--json", action="store_true", help="print plain data instead of a table")

    sub = commands.add_parser("env", help="what is installed here, for bug reports")
    sub.set_defaults(run=print_env)
    sub.add_argument("--json", action="store_true", help="print plain data")

    sub = commands.add_parser("report", help="tables and plots of training runs")
    sub.set_defaults(run=report_runs)
    sub.add_argument("results", type=Path, help="folder of files that --metrics wrote, or a file")
    sub.add_argument("--output", type=Path, help="folder for plots (default: that of the results)")
    sub.add_argument("--json", action="store_true", help="print plain data instead of tables")
    return top


def _add_common(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--calibration", type=Path, help="file that `gq-horovod calibrate` wrote")
    sub.add_argument(
        "--overlap",
        type=share,
        default=0.5,
        help="share of the compute time behind which communication can hide (default 0.5)",
    )
    sub.add_argument("--plot", type=Path, help="also draw a plot to this file")
    sub.add_argument("--json", action="store_true", help="print plain data instead of a table")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns 0, 1 if the doctor finds something, 2 after an error of one line, and 141 (128 and the
    number of SIGPIPE, as a shell has it) where the reader of the output has gone, as `head` does.
    """
    if sys.stdout is None:  # closed by whoever started this
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        options = parser().parse_args(arguments)
    except SystemExit:  # after --help, --version or an error
        _flush()
        raise
    status = 0
    error: Exception | None = None
    try:
        status = options.run(options) or 0
    except (ValueError, OSError) as raised:  # OSError: a file that cannot be written
        error = raised
    error = _flush() or error
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    if error is not None:
        print(f"gq-horovod {options.command}: error: {error}", file=sys.stderr)
        return 2
    return status


def _flush() -> Exception | None:
    """Write what is still to be written, or say why it cannot be. At exit Python does it as well,
    so what cannot be written is dropped."""
    try:
        sys.stdout.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return error
    return None
