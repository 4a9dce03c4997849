"""`gq-horovod simulate --paper`: the paper's table of 64 nodes, predicted, and what went in."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ..advisor import gpu_nodes, model
from ..advisor.model import NONE
from .output import DEFAULT_OVERLAP, rich
from .units import written_seconds

WORKERS, RATES = (64,), (1e11, 1e10, 1e9)


def table(options: argparse.Namespace) -> dict[str, Any]:
    """Speed-ups over none on nodes with a GPU each, and every input, as plain data."""
    if options.calibration is not None:
        raise ValueError(
            f"--calibration {options.calibration}: expected none with --paper, whose nodes have "
            "other kernels; give --input for what you have measured."
        )
    given = dict(options.input or [])
    compute = dict(options.compute or [])
    inputs = gpu_nodes.with_given(gpu_nodes.Inputs(), given)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for workload in model.WORKLOADS:
        seconds = compute.get(workload.name, workload.compute)
        for ranks in options.workers or WORKERS:
            for rate in options.bandwidth or RATES:
                for path in gpu_nodes.PATHS:
                    cluster = gpu_nodes.cluster_of(inputs, ranks, rate, path)
                    steps = {}
                    for method in gpu_nodes.methods(ranks):
                        reason = method.why_not(ranks)
                        if reason is not None:
                            left_out[f"{method.name}, {ranks} ranks"] = reason
                            continue
                        steps[method.name] = gpu_nodes.step_time(
                            method, workload, inputs, cluster, seconds, options.overlap
                        )
                    rows.append(
                        {
                            "workload": workload.name,
                            "ranks": ranks,
                            "bandwidth": rate,
                            "path": path,
                            "none_seconds": steps[NONE.name],
                            "speedups": {name: steps[NONE.name] / s for name, s in steps.items()},
                            "paper_model": model.paper_step_speed_up(
                                workload.parameters, cluster, seconds
                            ),
                        }
                    )
    listed = _inputs(options, inputs, given, compute)
    return {"rows": rows, "inputs": listed, "left_out": left_out}


def _inputs(
    options: argparse.Namespace,
    inputs: gpu_nodes.Inputs,
    given: dict[str, float],
    compute: dict[str, float],
) -> list[dict[str, Any]]:
    """Every input: value, unit, origin, and where it was measured or why it is assumed."""
    listed = gpu_nodes.described(inputs, given)
    origin, source = gpu_nodes.ASSUMED, "communication hides behind so much of it; backward is 2/3"
    if options.overlap != DEFAULT_OVERLAP:
        origin, source = gpu_nodes.GIVEN, "--overlap"
    listed.append(
        {
            "name": "overlap",
            "value": options.overlap,
            "unit": "of the compute time",
            "origin": origin,
            "source": source,
        }
    )
    for workload in model.WORKLOADS:
        origin = gpu_nodes.MEASURED if workload.measured else gpu_nodes.ASSUMED
        source = workload.source
        if workload.name in compute:
            origin, source = gpu_nodes.GIVEN, "--compute"
        listed.append(
            {
                "name": f"compute, {workload.name}",
                "value": compute.get(workload.name, workload.compute),
                "unit": "s",
                "origin": origin,
                "source": source,
            }
        )
    return listed


def show(found: dict[str, Any], as_json: bool) -> None:
    """Print it: a table for each way of the codes, what the paper says, and every input."""
    if as_json:
        published = [{"what": what, "speedup": value} for what, value in model.PUBLISHED]
        print(json.dumps({**found, "published": published}, indent=2))
        return
    console, table_of = rich()
    for path in gpu_nodes.PATHS:
        for ranks in dict.fromkeys(row["ranks"] for row in found["rows"]):
            own = [row for row in found["rows"] if (row["path"], row["ranks"]) == (path, ranks)]
            _print_paths(own, path, ranks, console, table_of)
    for name in found["left_out"]:
        print(f"{name}: the codes cannot hold the sum")
    print("The paper's model: of its float32 tree and of 8 bits, without overlap.")
    print("Published (arXiv 2305.18627 and its poster), over the authors' own float32 tree and not")
    print("over Horovod; the rate of their network is not known:")
    for what, value in model.PUBLISHED:
        print(f"- {what}: {value:.2f}x")
    made = table_of("What went in", ["input"], ["value"])
    for heading in ("unit", "origin", "where, or why"):
        made.add_column(heading)
    for own in found["inputs"]:
        number = f"{own['value']:.4g}"
        made.add_row(own["name"], number, own["unit"], own["origin"], own["source"])
    console.print(made)
    print("Replace one with --input NAME=NUMBER, --compute or --overlap. No run has been compared.")


def _print_paths(
    rows: Sequence[dict[str, Any]], path: str, ranks: int, console: Any, table_of: Any
) -> None:
    """The table of one way of the codes and one number of nodes."""
    names = [name for name in rows[0]["speedups"] if name != NONE.name]
    bits = {
        method.name: method.config.plan(ranks).bits
        for method in gpu_nodes.METHODS
        if method.config is not None and method.name in names
    }
    headings = [
        f"{name.partition(' ')[0]}\n{bits[name]} bit" if name in bits else name for name in names
    ]
    made = table_of(
        f"{ranks} nodes with a GPU each, codes by {path}: predicted step without compression, "
        "\nand times as fast as that (Horovod's float32 Allreduce)",
        ["workload"],
        ["Gbit/s", "none", *headings, "paper's\nmodel"],
    )
    for row in rows:
        made.add_row(
            row["workload"],
            f"{row['bandwidth'] / 1e9:g}",
            written_seconds(row["none_seconds"]),
            *(f"{row['speedups'][name]:.2f}" for name in names),
            f"{row['paper_model']:.2f}",
        )
    console.print(made)
