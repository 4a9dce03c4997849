"""Compress and decompress gradients through PyTorch and through TensorFlow, in one run.

    mpirun -np 1 python benchmarks/frameworks.py

On one rank Horovod only copies, so this is the cost of the way from a framework's gradient through
the kernels and back. "one" is a large gradient; "many" are small ones in one step, where the cost
of a call counts and not that of a byte. The frameworks take turns, and the ratio is the median over
the rounds. "kernels" is what the kernels alone take for the same elements, without any framework.
Prints a table, writes frameworks.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import horovod.tensorflow as hvd
import horovod.torch as hvd_torch
import numpy as np
import tensorflow as tf
import torch
from rich.console import Console
from rich.table import Table

import gq_horovod.tensorflow as with_tensorflow
import gq_horovod.torch as with_torch
from mpi_ops import codec
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels.host import Buffer

TARGET_RATIO = 1.5
WORKLOADS = {"one": (1, 1 << 24), "many": (200, 1 << 14)}  # gradients, elements of each


def seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def through_torch(gradients: list[np.ndarray], levels: Any) -> Callable[[], Any]:
    compression = with_torch.GlobalQSGD(levels=levels, min_elements=0)
    tensors = [torch.from_numpy(gradient) for gradient in gradients]
    return lambda: hvd_torch.grouped_allreduce(
        tensors, name=f"torch.{levels}.{len(tensors)}", compression=compression
    )


def through_tensorflow(gradients: list[np.ndarray], levels: Any) -> Callable[[], Any]:
    compression = with_tensorflow.GlobalQSGD(levels=levels, min_elements=0)
    tensors = [tf.constant(gradient) for gradient in gradients]

    @tf.function
    def reduce(tensors: list[Any]) -> list[Any]:
        return [
            hvd.allreduce(tensor, name=f"{levels}.{len(tensors)}.{index}", compression=compression)
            for index, tensor in enumerate(tensors)
        ]

    return lambda: [result.device for result in reduce(tensors)]


def through_kernels(gradients: list[np.ndarray], levels: Any) -> Callable[[], Any]:
    plan = with_torch.GlobalQSGD(levels=levels).config.plan(1)
    buffers = [Buffer.of(gradient) for gradient in gradients]
    out = Buffer.of(np.empty_like(gradients[0]))
    random = dither(0, "kernels", 0, 0, Stage.QUANTIZE)

    def reduce() -> None:
        for x in buffers:
            norms = codec.norms(x, plan)
            payload = codec.quantize(x, norms, plan, random)
            if levels == "exponential":
                payload = codec.reduce([payload], plan, random)
            codec.dequantize(payload, norms, plan, out)

    return reduce


WAYS = {"torch": through_torch, "tensorflow": through_tensorflow, "kernels": through_kernels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="that TensorFlow runs operations in")
    parser.add_argument("--output", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(arguments.threads)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    hvd_torch.init()
    hvd.init()

    rows = []
    for workload, (count, elements) in WORKLOADS.items():
        for levels in ("standard", "exponential"):
            random = np.random.default_rng(0)
            gradients = [random.standard_normal(elements, np.float32) for _ in range(count)]
            runs = {way: prepare(gradients, levels) for way, prepare in WAYS.items()}
            for run in runs.values():
                run()  # builds the graph, agrees, touches the memory
                run()
            times = {way: [0.0] * arguments.rounds for way in runs}
            for index in range(arguments.rounds):
                for way, run in runs.items():
                    times[way][index] = seconds(run)
            pairs = zip(times["tensorflow"], times["torch"], strict=True)
            row = {"workload": workload, "gradients": count, "elements": elements, "levels": levels}
            row |= {f"{way}_ms": 1e3 * statistics.median(each) for way, each in times.items()}
            rows.append({**row, "ratio": statistics.median(ours / other for ours, other in pairs)})

    table = Table(
        *("gradients", "levels", "kernels ms", "torch ms", "tensorflow ms", "tensorflow / torch"),
        title=f"Compress and decompress, one rank (target: at most {TARGET_RATIO})",
    )
    for row in rows:
        table.add_row(
            f"{row['gradients']} x {row['elements']}",
            str(row["levels"]),
            *(f"{row[f'{way}_ms']:.1f}" for way in ("kernels", "torch", "tensorflow")),
            f"{row['ratio']:.2f}",
        )
    Console().print(table)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "frameworks.json").write_text(json.dumps(rows, indent=2) + "\n")
    hvd.shutdown()
    hvd_torch.shutdown()


if __name__ == "__main__":
    main()
