"""The same gradient, name and seed in both frameworks: the same payloads, the same result."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import horovod.tensorflow as hvd
import horovod.torch as hvd_torch
import numpy as np
import pytest
import torch
from helpers import CONFIGURATIONS, gradient
from horovod.common import process_sets
from tf_helpers import to_tf, to_torch

import gq_horovod.tensorflow as with_tensorflow
import gq_horovod.torch as with_torch
from gq_horovod.path import pipeline
from mpi_ops import codec

pytestmark = pytest.mark.skipif(
    os.environ.get("HOROVOD_CONTROLLER") == "gloo",
    reason="two Horovods in one process meet under one name in Gloo's store",
)


@pytest.fixture(scope="module", autouse=True)
def both() -> Iterator[None]:
    """A second Horovod in the same ranks, that of PyTorch."""
    hvd_torch.init()
    yield
    hvd_torch.shutdown()
    process_sets._setup(hvd.mpi_ops._basics)


@pytest.mark.parametrize(
    ("levels", "bits", "dtype"),
    [
        *((*options, torch.float32) for options in CONFIGURATIONS),
        # Codes are made of float32, whatever the gradient is.
        ("standard", 4, torch.float16),
        ("exponential", 8, torch.bfloat16),
        ("two-hop", 8, torch.float16),
        ("two-hop", 4, torch.bfloat16),
    ],
    ids=str,
)
def test_both_send_the_same_bytes(
    levels: Any, bits: int | None, dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "chunk_elements", lambda ranks: 20_000)  # three chunks
    sent: list[bytes] = []

    def recorded(function: Any, out: int) -> Any:
        def stage(*arguments: Any) -> Any:
            result = function(*arguments)
            sent.append(arguments[out].tobytes())
            return result

        return stage

    for stage, place in (("measure", 3), ("quantize_parcel", 4), ("reduce_share", 3)):
        monkeypatch.setattr(codec, stage, recorded(getattr(codec, stage), place))
    options: dict[str, Any] = {"levels": levels, "bits": bits, "seed": 7, "min_elements": 0}
    ours = with_tensorflow.GlobalQSGD(**options)
    theirs = with_torch.GlobalQSGD(**options)
    for step in range(2):
        x = gradient(hvd.rank(), 50_001, tag=30 + step, dtype=dtype)
        result = with_tensorflow.allreduce(to_tf(x), name, op=hvd.Sum, compression=ours)
        by_tensorflow = sorted(sent)
        sent.clear()
        expected = with_torch.allreduce(x, name, op=hvd_torch.Sum, compression=theirs)
        assert len(sent) == (4 if levels == "standard" else 7)
        assert by_tensorflow == sorted(sent)
        sent.clear()
        assert np.array_equal(
            to_torch(result).view(torch.uint8).numpy(), expected.view(torch.uint8).numpy()
        )


@pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
def test_both_have_the_same_statistics(levels: Any, name: str) -> None:
    options: dict[str, Any] = {"levels": levels, "seed": 7, "min_elements": 0, "stats": 1}
    ours = with_tensorflow.GlobalQSGD(**options)
    theirs = with_torch.GlobalQSGD(**options)
    for step in range(2):
        x = gradient(hvd.rank(), 50_001, tag=40 + step)
        with_tensorflow.allreduce(to_tf(x), name, compression=ours)
        with_torch.allreduce(x, name, compression=theirs)
        (found,), (expected,) = ours.stats.values(), theirs.stats.values()
        assert found == expected
        assert found.step == step
