"""hvd.shutdown() and hvd.init() again in one process."""

from __future__ import annotations

import os

import horovod.tensorflow as hvd
import pytest
from rendezvous import restart
from tf_helpers import check_mean, check_replicas, compressor, gradients

from gq_horovod.tensorflow import allreduce


@pytest.mark.skipif(
    os.environ.get("HOROVOD_CONTROLLER") != "gloo", reason="MPI can be started only once"
)
@pytest.mark.parametrize("levels", ["standard", "exponential"])
def test_an_instance_outlives_horovod(levels: str, name: str) -> None:
    compression = compressor(levels)
    inputs = gradients(1000, tag=18)
    for start in range(2):
        if start:
            restart(hvd)
        result = allreduce(inputs[hvd.rank()], name, compression=compression)
        check_mean(result, inputs, compression)
        check_replicas(result)
