#!/usr/bin/env python3
"""Memory and handles of a long training: does anything grow, do replicas drift?

    mpirun -np 2 python benchmarks/long_run.py --steps 20000 --output build/long_run
    mpirun -np 2 python benchmarks/long_run.py --transport mpi --output build/long_run_mpi
    python benchmarks/long_run.py --draw build/long_run*.json --output build/all    # side by side

Each rank samples its resident memory, its threads and open files, and the handles that Horovod
holds for it. The slope of memory after the warm-up is fitted by least squares. Parameters are
compared between ranks every thousand steps, and at the end. Writes OUTPUT.json and OUTPUT.png, and
ends with status 1 if memory grows by more than 1 MB in 1000 steps or anything else does grow.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import matplotlib.figure
import numpy as np
import psutil
import torch

from gq_horovod.torch import GlobalQSGD

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from common import loop

SAMPLES = 200
WARM_UP = 0.1  # share of the steps: allocators and caches fill
LARGEST_SLOPE = 1.0  # MB in 1000 steps
COUNTS = ("threads", "files", "handles")


def sample(step: int) -> dict[str, float]:
    """What this process holds."""
    process = psutil.Process()
    return {
        "step": step,
        "rss_mb": process.memory_info().rss / 1e6,
        "threads": process.num_threads(),
        "files": process.num_fds(),
        "handles": len(hvd.mpi_ops._handle_map),
    }


def train(options: argparse.Namespace) -> list[dict[str, float]]:
    """The samples of this rank."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    compression = GlobalQSGD(
        levels=options.levels, transport=options.transport, check_replicas=1000, min_elements=1000
    )
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        named_parameters=model.named_parameters(),
        compression=compression,
    )
    random = torch.Generator().manual_seed(hvd.rank())
    every = max(options.steps // SAMPLES, 1)
    samples = []
    for step in range(options.steps):
        optimizer.zero_grad()
        inputs = torch.randn(16, 64, generator=random)
        labels = inputs[:, :10].argmax(dim=1)
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        if step % every == 0:
            samples.append(sample(step))
    if not loop.replicas_equal(model):
        raise RuntimeError("long_run: the replicas differ at the end")
    return samples


def summary(samples: list[dict[str, float]], steps: int) -> dict[str, Any]:
    """Slope of the memory, and what was counted at the beginning and at the end."""
    counted = [each for each in samples if each["step"] >= WARM_UP * steps]
    where = [each["step"] / 1000 for each in counted]
    slope = float(np.polyfit(where, [each["rss_mb"] for each in counted], 1)[0])
    ends = {name: [counted[0][name], counted[-1][name]] for name in COUNTS}
    return {"mb_per_1000_steps": slope, "rss_mb": counted[-1]["rss_mb"], **ends}


def plot(documents: list[dict[str, Any]], path: Path) -> None:
    """One panel for each run."""
    figure = matplotlib.figure.Figure(figsize=(8, 1 + 2.5 * len(documents)), layout="constrained")
    panels = figure.subplots(len(documents), sharex=True, squeeze=False)[:, 0]
    for axes, document in zip(panels, documents, strict=True):
        for rank, samples in enumerate(document["samples"]):
            axes.plot(
                [each["step"] for each in samples],
                [each["rss_mb"] for each in samples],
                label=f"rank {rank}",
            )
        slope = max(result["mb_per_1000_steps"] for result in document["ranks"])
        title = f"{document['steps']} steps, {document['levels']}, "
        title += f"transport {document['transport']}: {slope:+.4f} MB in 1000 steps at most"
        axes.set_title(title, fontsize=10)
        axes.set_ylabel("resident memory, MB")
        axes.set_ylim(0, 1.2 * max(e["rss_mb"] for own in document["samples"] for e in own))
        axes.legend(loc="lower right")
    panels[-1].set_xlabel("step")
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--levels", default="two-hop", choices=GlobalQSGD.LEVELS)
    parser.add_argument("--transport", default="horovod", choices=GlobalQSGD.TRANSPORTS)
    parser.add_argument("--output", type=Path, default=Path("build/long_run"))
    parser.add_argument(
        "--draw", type=Path, nargs="+", metavar="JSON", help="draw runs that were made, and end"
    )
    options = parser.parse_args()
    if options.draw:
        documents = [json.loads(path.read_text()) for path in options.draw]
        plot(documents, options.output.with_suffix(".png"))
        return 0
    torch.set_num_threads(1)
    hvd.init()
    begin = time.monotonic()
    ranks = hvd.allgather_object(train(options), name="samples")
    seconds = time.monotonic() - begin
    results = [summary(samples, options.steps) for samples in ranks]
    grown = [
        f"rank {rank}: {name}"
        for rank, result in enumerate(results)
        for name in COUNTS
        if result[name][1] > result[name][0]
    ]
    slopes = [result["mb_per_1000_steps"] for result in results]
    if hvd.rank() == 0:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "steps": options.steps,
            "levels": options.levels,
            "transport": options.transport,
            "seconds": seconds,
            "replicas": "equal",
            "ranks": results,
            "samples": ranks,
        }
        plot([document], options.output.with_suffix(".png"))
        options.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        for rank, result in enumerate(results):
            print(f"rank {rank}: {result}")
        print(f"{seconds:.0f} s; replicas equal; grown: {', '.join(grown) or 'nothing'}")
    return int(bool(grown) or max(slopes) >= LARGEST_SLOPE)


if __name__ == "__main__":
    sys.exit(main())
