"""`gq-horovod advise`: predict step times and recommend a setting."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from typing import Any

from mpi_ops.chunks import chunk_elements

from ..advisor import calibrate, model
from ..advisor.model import NONE, Cluster, Method, methods_for
from .output import add_common, new_plot, rich
from .units import (
    bandwidth,
    count,
    duration,
    listed,
    rank_count,
    written_rate,
    written_seconds,
    written_share,
)

# Less is within the model's error: a setting is recommended from this speed-up over none, and the
# simplest one that the fastest one does not beat by so much: the default before other settings.
WORTHWHILE = 1.05


def add_to(commands: Any) -> None:
    """The command's arguments."""
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
    sub.add_argument(
        "--ranks-per-host",
        type=rank_count,
        help="ranks on each host (default: the calibration's, or 1)",
    )
    sub.add_argument(
        "--bandwidth",
        type=bandwidth,
        help="of a host's link: 1Gbit, 200Mbit (default: the calibration's)",
    )
    sub.add_argument(
        "--inner-bandwidth",
        type=bandwidth,
        help="at which a rank exchanges with others of its host (default: the calibration's, or "
        "8Gbit; NVLink of an A100 has 2400Gbit)",
    )
    sub.add_argument(
        "--latency", type=duration, help="of a message (default: the calibration's, or 50us)"
    )
    sub.add_argument(
        "--step-compute",
        type=duration,
        required=True,
        help="forward, backward and optimizer of a step without communication: 120ms",
    )
    add_common(sub)


def cluster_of(options: argparse.Namespace) -> Cluster:
    """The calibrated cluster, or the defaults, with what the command line says instead.

    Raises ValueError where neither says how many workers there are, or how fast their network is.
    """
    given = {
        "ranks": options.workers,
        "bandwidth": options.bandwidth,
        "latency": options.latency,
        "ranks_per_host": options.ranks_per_host,
        "inner_bandwidth": options.inner_bandwidth,
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
    complexity: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for method in methods_for(cluster):
        reason = method.why_not(cluster)
        if reason is not None:
            left_out[method.name] = reason
            continue
        cost = model.cost(method, sizes, cluster)
        step = model.step_time(method, sizes, cluster, compute, overlap)

        def below(reference: Method, method: Method = method) -> float | None:
            """None for infinity, which JSON lacks."""
            found = model.break_even(method, reference, sizes, cluster, compute, overlap)
            return None if math.isinf(found) else found

        complexity[method.name] = method.complexity
        rows.append(
            {
                "method": method.name,
                "argument": method.argument,
                "step_seconds": step,
                "speedup": base / step,
                "reduction_seconds": cost.seconds,
                "kernel_seconds": cost.kernels,
                "bytes_per_rank": cost.bytes,
                "inner_bytes_per_rank": cost.inner_bytes,
                "pays_over_none_below": 0.0 if method is NONE else below(NONE),
                "pays_over_fp16_below": 0.0 if method is model.FP16 else below(model.FP16),
                "candidate": method.recommended,
            }
        )
    candidates = [row for row in rows if row["candidate"]]
    fastest = min(row["step_seconds"] for row in candidates)
    near = (row for row in candidates if row["step_seconds"] < WORTHWHILE * fastest)
    best = min(near, key=lambda row: complexity[row["method"]])
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
    inner = []
    if cluster.hierarchical:
        inner = [
            f"hierarchical: ranks of a host exchange floats at "
            f"{written_rate(cluster.inner_bandwidth)} (--inner-bandwidth), and codes are those of "
            f"the {cluster.of_one_place.ranks} hosts; MB per rank are without these floats. "
            "Nothing of that exchange is hidden. It takes HOROVOD_DYNAMIC_PROCESS_SETS=1.",
        ]
    return [
        f"Latency, efficiency, Horovod's overheads and kernels: {source}. A payload reaches "
        f"{written_share(cluster.allreduce_efficiency)} of the bandwidth in Allreduce, "
        f"{written_share(cluster.gather_efficiency)} in Alltoall and Allgather, "
        f"{written_share(cluster.message_efficiency)} in messages.",
        f"{cluster.ranks} ranks, {cluster.ranks_per_host} on each host; the slowest link counts; "
        "nothing else uses the network.",
        *inner,
        f"Communication hides behind {options.overlap:.0%} of the compute time (--overlap); "
        "kernels do not, and neither does what becomes ready last.",
        "One number of parameters: gradients become ready evenly, the last "
        f"{chunk_elements(cluster.ranks) / 1e6:.0f} M elements at the end."
        if tensors == 1
        else f"{tensors} tensors in the order of the model; the first is ready last.",
        "4-bit settings and exponential levels are never recommended: try them for accuracy "
        "first. Standard levels use the default width for this many ranks.",
        f"Of settings within {WORTHWHILE - 1:.0%} of the fastest, the simplest is recommended, "
        "the default before others. What the model leaves out, and its measured error: "
        "docs/advisor.md.",
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
        console.print(f"{name}: cannot hold the sum of all ranks' codes", highlight=False)
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
    for method in methods_for(cluster):
        if method.why_not(cluster) is None:
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
