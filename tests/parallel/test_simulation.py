"""gq_horovod.research.simulation gives the bytes that a job of real ranks gives."""

from __future__ import annotations

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from helpers import CONFIGURATIONS, gradients

from gq_horovod.research.baselines import GATHER, GATHER_ELIAS
from gq_horovod.research.simulation import SimulatedRanks
from gq_horovod.research.torch_baselines import QSGD
from gq_horovod.torch import GlobalQSGD, TorchFrontend, allreduce


@pytest.mark.parametrize(
    ("levels", "bits"), [*CONFIGURATIONS, ("two-hop", 5), ("qsgd", 8), ("qsgd-elias", 4)]
)
def test_the_same_bytes(levels: str, bits: int | None, name: str) -> None:
    # Not in place with transport="mpi", whose chunks are others.
    compression: TorchFrontend
    if levels == "qsgd":
        compression, method = QSGD(min_elements=0, seed=5), GATHER
    elif levels == "qsgd-elias":
        compression, method = QSGD(bits=4, coding="elias", min_elements=0, seed=5), GATHER_ELIAS
    else:
        compression, method = GlobalQSGD(levels=levels, bits=bits, min_elements=0, seed=5), None
    simulated = SimulatedRanks(compression.config, hvd.size(), method)
    for step in range(2):
        inputs = gradients(4097, tag=step)
        real = allreduce(inputs[hvd.rank()], name, compression=compression)
        mean = simulated.average(name, [own.numpy() for own in inputs])
        assert torch.equal(real, torch.from_numpy(mean)), np.abs(real.numpy() - mean).max()
