"""The inputs and checks of tests/parallel/helpers.py, for TensorFlow's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import helpers
import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
import torch

from gq_horovod.tensorflow import GlobalQSGD

DTYPES = [tf.float16, tf.bfloat16, tf.float32, tf.float64]

_instances: dict[Any, GlobalQSGD] = {}


def compressor(levels: str = "standard", bits: int | None = None, **options: Any) -> GlobalQSGD:
    """One instance per configuration, because the first use of each costs an agreement."""
    options = {"min_elements": 0, **options}
    key = (levels, bits, *sorted(options.items()))
    if key not in _instances:
        _instances[key] = GlobalQSGD(levels=levels, bits=bits, **options)
    return _instances[key]


def to_torch(tensor: Any) -> torch.Tensor:
    if tensor.dtype == tf.bfloat16:  # NumPy has none; float32 holds all of its values
        return torch.from_numpy(tf.cast(tensor, tf.float32).numpy()).bfloat16()
    return torch.from_numpy(np.array(tensor))


def to_tf(tensor: torch.Tensor) -> tf.Tensor:
    if tensor.dtype == torch.bfloat16:
        return tf.cast(tensor.float().numpy(), tf.bfloat16)
    return tf.constant(tensor.numpy())


def gradients(shape: int | Sequence[int], tag: int = 0, dtype: Any = tf.float32) -> list[Any]:
    """The gradients of all ranks."""
    kind = getattr(torch, dtype.name)
    return [to_tf(helpers.gradient(rank, shape, tag, kind)) for rank in range(hvd.size())]


def check_mean(
    result: Any, inputs: Sequence[Any], compression: GlobalQSGD, *, factor: float = 1.0
) -> None:
    """Assert that `result` is a sample of the law: range, mean, and variance from both sides."""
    assert result.dtype == inputs[0].dtype
    both = [to_torch(result), [to_torch(x) for x in inputs]]
    helpers.check_mean(*both, compression, factor=factor)  # type: ignore[arg-type]


# ------------------------------------------------------------------------- gradients of variables

SHAPES = {"matrix": (100, 60), "bias": (10,), "convolution": (3, 3, 25, 20), "vector": (4096,)}


def locals_of(tag: int) -> list[list[Any]]:
    """For each variable of SHAPES, the gradients of all ranks."""
    return [gradients(shape, tag=100 * tag + i) for i, shape in enumerate(SHAPES.values())]


def own(tag: int) -> list[Any]:
    """For each variable of SHAPES, this rank's gradient."""
    return [ranks[hvd.rank()] for ranks in locals_of(tag)]


def check_all(
    results: Any, inputs: Sequence[Sequence[Any]], compression: GlobalQSGD, *, factor: float = 1.0
) -> None:
    """Assert that large gradients follow the law, and small ones are the mean."""
    for result, ranks in zip(results, inputs, strict=True):
        if hvd.size() == 1:  # Horovod reduces nothing then
            np.testing.assert_array_equal(result, ranks[0] * factor)
        elif ranks[0].shape.num_elements() < compression.config.min_elements:
            mean = np.mean(ranks, axis=0) * factor
            np.testing.assert_allclose(result, mean, rtol=1e-5, atol=1e-6)
        else:
            check_mean(result, ranks, compression, factor=factor)
    check_replicas(*results)


# ------------------------------------------------------------------------------------------- Keras

FEATURES, SAMPLES, BATCH = 32, 512, 64


def problem(rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A rank's samples of a linear problem that a network learns quickly."""
    weights = np.random.default_rng(0).normal(size=(FEATURES, 1))
    x = np.random.default_rng(1 + rank).normal(size=(SAMPLES, FEATURES))
    return x.astype(np.float32), (x @ weights).astype(np.float32)


def model_of(seed: int, hidden: int = 1) -> Any:
    """A network for it, of the Keras that TensorFlow has."""
    tf.keras.utils.set_random_seed(seed)
    layers = [tf.keras.layers.Dense(128, activation="relu") for _ in range(hidden)]
    return tf.keras.Sequential([tf.keras.Input((FEATURES,)), *layers, tf.keras.layers.Dense(1)])


# ---------------------------------------------------------------------------------------- replicas


def all_bytes(tensors: Sequence[Any], process_set: Any = hvd.global_process_set) -> np.ndarray:
    """The bytes of some tensors, a row for each rank."""
    flat = [np.frombuffer(np.array(tensor).tobytes(), np.uint8) for tensor in tensors]
    own = tf.constant(np.concatenate(flat)[None, :])
    rows: np.ndarray = hvd.allgather(own, name="test.replicas", process_set=process_set).numpy()
    return rows


def check_replicas(*tensors: Any, process_set: Any = hvd.global_process_set) -> None:
    """Assert that every rank holds the same bytes."""
    rows = all_bytes(tensors, process_set)
    assert len(rows) == process_set.size()
    differing = [rank for rank, row in enumerate(rows) if not np.array_equal(row, rows[0])]
    assert not differing, f"ranks {differing} differ from rank 0"
