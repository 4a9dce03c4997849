"""What ranks of a job log: each under its own number, and once what is the same on all."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from launcher import Job, launch

LIMIT_SECONDS = 180
JSON = {"GQ_HOROVOD_LOG": "debug", "GQ_HOROVOD_LOG_FORMAT": "json", "TF_USE_LEGACY_KERAS": "1"}

TORCH = """
import horovod.torch as hvd, torch
from gq_horovod.torch import GlobalQSGD
hvd.init()
shapes = {"matrix": (80, 100), "bias": (80,)}
weights = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
opt = hvd.DistributedOptimizer(
    torch.optim.SGD(weights.values(), lr=1.0), named_parameters=weights.items(),
    compression=GlobalQSGD(levels="standard", bits=6),
)
for step in range(3):
    opt.zero_grad()
    factor = float("nan") if step == 1 and hvd.rank() == 1 else 1.0
    sum(factor * weight.sum() for weight in weights.values()).backward()
    opt.step()
"""
TENSORFLOW = """
import horovod.tensorflow as hvd, tensorflow as tf
from gq_horovod.tensorflow import GlobalQSGD
hvd.init()
weights = [tf.Variable(tf.zeros((80, 100))), tf.Variable(tf.zeros(80))]
compression = GlobalQSGD(levels="standard", bits=6)

@tf.function
def train(factor):
    with tf.GradientTape() as tape:
        loss = sum(factor * tf.reduce_sum(weight) for weight in weights)
    tape = hvd.DistributedGradientTape(tape, compression=compression)
    for weight, gradient in zip(weights, tape.gradient(loss, weights)):
        weight.assign_sub(gradient)

for step in range(3):
    train(tf.constant(float("nan") if step == 1 and hvd.rank() == 1 else 1.0))
"""


def records(job: Job, rank: int) -> list[dict[str, Any]]:
    """The JSON lines among what a rank printed."""
    lines = [line for line in job.ranks[rank].splitlines() if line.startswith('{"time"')]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("script", "name"), [(TORCH, "matrix"), (TENSORFLOW, "DistributedGradientTape.0")]
)
def test_json_of_two_ranks(script: str, name: str, tmp_path: Path) -> None:
    job = launch("mpirun", 2, ["-c", script], LIMIT_SECONDS, tmp_path, JSON)
    assert (job.status, job.timed_out) == (0, False), job.report()
    first, second = records(job, 0), records(job, 1)
    for rank, own in enumerate((first, second)):
        who = {"rank": rank, "size": 2, "host": socket.gethostname()}
        assert all(who.items() <= record.items() for record in own), job.report()
        tag = f"[rank {rank} of 2 on {socket.gethostname()}] "
        assert all(record["message"].startswith(tag) for record in own)

    begins = ["numbering"] if script == TORCH else []
    assert [record["event"] for record in first] == [*begins, "plan", "tensor", "tensor", "tensors"]
    plan, *tensors, summary = (record["fields"] for record in first[len(begins) :])
    bias, matrix = sorted(tensors, key=lambda fields: fields["elements"])
    assert (plan["world_size"], plan["process_set"]) == (2, 0)
    expected = {"levels": "standard", "bits": 6, "levels_per_side": 15, "block_size": 256}
    assert {**expected, "transport": "horovod"}.items() <= plan["options"].items()
    assert all(plan[key] for key in ("kernels", "version", "instruction_set"))
    assert matrix["tensor"].startswith(name)
    assert (matrix["elements"], matrix["dtype"]) == (8000, "float32")
    # 6 of 8 bits for a code, in lanes of words, and a norm of 4 bytes for 256; of 2 ranks' ring.
    assert 6000 < matrix["wire_bytes"] < 7500
    assert (bias["compressed"], bias["reason"]) == (False, "fewer than min_elements=4096")
    assert (summary["compressed"], summary["left"]) == (1, 1)

    # The rank whose gradient it is says so, and nothing else that the first one has said.
    assert [record["event"] for record in second] == ["not-finite"]
    fields = second[0]["fields"]
    assert fields["tensor"].startswith(name)
    assert (fields["step"], fields["count"]) == (1, 1)


def test_tags_where_the_script_configures_logging(tmp_path: Path) -> None:
    script = "import logging\nlogging.basicConfig(level=logging.INFO)\n" + TORCH
    job = launch("mpirun", 2, ["-c", script], LIMIT_SECONDS, tmp_path)
    assert (job.status, job.timed_out) == (0, False), job.report()
    host = socket.gethostname()
    lines = [line for line in job.ranks[0].splitlines() if ":gq_horovod." in line]
    begin = f"INFO:gq_horovod.frontend:[rank 0 of 2 on {host}] GlobalQSGD: "
    assert lines[0].startswith(
        f"{begin}2 ranks, process set 0, agreed on levels='standard', bits=6,"
    )
    assert lines[1] == (
        f"{begin}the first step compressed 1 tensors with 8000 elements, and left 1 to Horovod: "
        "1 has fewer than min_elements=4096 (80 elements, the first is 'bias'); a rank sends "
        "0.00685 MB a step, and would send 0.0323 MB without compression"
    )
    (other,) = [line for line in job.ranks[1].splitlines() if ":gq_horovod." in line]
    assert other.startswith(
        f"WARNING:gq_horovod.path.pipeline:[rank 1 of 2 on {host}] tensor 'matrix' "
    )


def test_silence_unless_asked(tmp_path: Path) -> None:
    """Of a warning, too; with TensorFlow test_quickstart.py listens."""
    job = launch("mpirun", 2, ["-c", TORCH], LIMIT_SECONDS, tmp_path, {"GQ_HOROVOD_LOG": ""})
    assert (job.status, job.timed_out) == (0, False), job.report()
    assert "gq_horovod" not in job.report()
