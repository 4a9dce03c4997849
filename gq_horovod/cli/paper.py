"""`gq-horovod simulate --paper`: the paper's table of 64 nodes, predicted, and what went in.

`--gpus-per-node`: the same of nodes with several GPUs, and of up to 4096 GPUs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from ..advisor import gpu_nodes, model
from ..advisor.model import NONE
from .output import DEFAULT_OVERLAP, rich
from .units import written_seconds

WORKERS, RATES = (64,), (1e11, 1e10, 1e9)
MANY_WORKERS = (64, 256, 1024, 4096)  # with --gpus-per-node


def table(options: argparse.Namespace) -> dict[str, Any]:
    """Speed-ups over none on nodes with GPUs, and every input, as plain data."""
    if options.calibration is not None:
        raise ValueError(
            f"--calibration {options.calibration}: expected none with --paper or --gpus-per-node, "
            "whose nodes have other kernels; give --input for what you have measured."
        )
    kinds = options.gpus_per_node or [1]
    workers = options.workers or (MANY_WORKERS if options.gpus_per_node else WORKERS)
    for ranks, gpus in itertools.product(workers, kinds):
        if ranks % gpus:
            raise ValueError(
                f"--gpus-per-node {gpus}: expected a divisor of --workers {ranks}, as every GPU "
                "has a worker; give another number."
            )
    given = dict(options.input or [])
    compute = dict(options.compute or [])
    inputs = gpu_nodes.with_given(gpu_nodes.Inputs(), given)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for workload in model.WORKLOADS:
        seconds = compute.get(workload.name, workload.compute)
        places = itertools.product(workers, kinds, options.bandwidth or RATES, gpu_nodes.PATHS)
        for ranks, gpus, rate, path in places:
            cluster = gpu_nodes.cluster_of(inputs, ranks, rate, path, gpus)
            steps, bits = {}, {}
            for method in gpu_nodes.methods(cluster):
                reason = method.why_not(cluster)
                if reason is not None:
                    left_out[f"{method.name}, {ranks} ranks"] = reason
                    continue
                steps[method.name] = gpu_nodes.step_time(
                    method, workload, inputs, cluster, seconds, options.overlap
                )
                if method.config is not None:
                    bits[method.name] = method.config.plan(method.parties(cluster).ranks).bits
            rows.append(
                {
                    "workload": workload.name,
                    "ranks": ranks,
                    "gpus_per_node": gpus,
                    "bandwidth": rate,
                    "path": path,
                    "none_seconds": steps[NONE.name],
                    "speedups": {name: steps[NONE.name] / s for name, s in steps.items()},
                    "bits": bits,
                    "paper_model": model.paper_step_speed_up(workload.parameters, cluster, seconds),
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
    kinds = dict.fromkeys(
        (path, row["ranks"], row["gpus_per_node"])
        for path in gpu_nodes.PATHS
        for row in found["rows"]
    )
    for kind in kinds:
        own = [
            row
            for row in found["rows"]
            if (row["path"], row["ranks"], row["gpus_per_node"]) == kind
        ]
        for way in model.WITHIN:
            _print_paths(own, way, console, table_of)
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


def _print_paths(rows: Sequence[dict[str, Any]], way: str, console: Any, table_of: Any) -> None:
    """The table of one way of the codes and one kind of nodes; none where that has no such way."""
    first = rows[0]
    bits, gpus = first["bits"], first["gpus_per_node"]
    own = [name for name in bits if name.endswith(way) or (gpus == 1 and way == model.WITHIN[0])]
    if not own:
        return
    names = [name for name in first["speedups"] if name in own or name == model.FP16.name]
    headings = [
        f"{re.split('[ ,]', name)[0]}\n{bits[name]} bit" if name in bits else name for name in names
    ]
    nodes = f"{first['ranks']} nodes with a GPU each"
    if gpus > 1:
        nodes = f"{first['ranks'] // gpus} nodes with {gpus} GPUs each, {way}"
    made = table_of(
        f"{nodes}, codes by {first['path']}: predicted step without compression, "
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
