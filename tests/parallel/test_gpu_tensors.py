"""gq_horovod.torch.allreduce of tensors on a GPU, which is emulated: see tests/single/fake_cupy.py.

PyTorch has no part in that, so what looks at a tensor's device is replaced.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from helpers import TRANSPORT, check_replicas, gradients

sys.path.append(str(Path(__file__).resolve().parents[1] / "single"))
import fake_cupy

from gq_horovod import torch as plugin
from gq_horovod.torch import buckets, tensors
from gq_horovod.torch.collectives import Written


def _on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    memory = fake_cupy.empty(tuple(tensor.shape), np.float32)._values
    return torch.from_numpy(memory).copy_(tensor)


def _memory(tensor: torch.Tensor) -> tuple[str, Any]:
    from mpi_ops.kernels import device

    return "device", device.own_stream(0)


class _Event:
    """What a GPU still has to do to a tensor: it is done the third time that somebody asks."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._values = tensor, tensor.clone()
        self._asked = 0
        tensor.fill_(torch.nan)  # nobody may look at it before

    def query(self) -> bool:
        self._asked += 1
        if self._asked == 3:
            self._tensor.copy_(self._values)
        return self._asked >= 3

    def synchronize(self) -> None:
        assert self._asked >= 3, "a hook waits for the GPU"


@pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
def test_the_same_bytes_as_in_host_memory(
    levels: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = gradients((7, 1003), tag=19)
    own = inputs[hvd.rank()]

    def mean() -> torch.Tensor:
        compression = plugin.GlobalQSGD(levels=levels, transport=TRANSPORT)
        return plugin.allreduce(own, name, compression=compression)

    expected = mean()
    with fake_cupy.installed(tmp_path / "emulation", ["float32"]):
        monkeypatch.setattr(tensors, "readable", _on_gpu)
        monkeypatch.setattr(tensors, "memory_of", _memory)
        monkeypatch.setattr(buckets, "written", lambda values: Written(_Event(values)))
        launches = fake_cupy.Module.launches
        result = mean()
        kernels = {kernel for kernel, *_ in launches}
        streams = {stream for *_, stream in launches}
    assert len(kernels) == 3, kernels  # norms, quantize, dequantize; codes are reduced on the host
    assert len(streams) == 1
    assert fake_cupy.DEFAULT_STREAM not in streams
    assert torch.equal(result, expected)
    check_replicas(result)
