"""The Keras model of examples/deeplight is the PyTorch one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# In a process of its own: TensorFlow and PyTorch together are slow to load.
CODE = """
import numpy as np
import tensorflow as tf
import torch
import keras_model
import model

ROWS, FIELDS = 50, 6
ours = keras_model.DeepFwFM(ROWS, FIELDS, dim=4, hidden=(8, 5))
theirs = model.DeepFwFM(ROWS, FIELDS, dim=4, hidden=(8, 5))
assert sum(np.prod(v.shape) for v in ours.trainable_variables) == sum(
    p.numel() for p in theirs.parameters()
)
with torch.no_grad():
    for parameter in theirs.parameters():
        parameter.normal_()
ours.bias.assign(theirs.bias.detach().numpy())
ours.linear.assign(theirs.linear.weight.detach().numpy())
ours.embedding.assign(theirs.embedding.weight.detach().numpy())
ours.pair_weight.assign(theirs.pair_weight.detach().numpy())
dense = [layer for layer in theirs.deep if isinstance(layer, torch.nn.Linear)]
for layer, other in zip(ours.deep.layers, dense, strict=True):
    layer.kernel.assign(other.weight.detach().numpy().T)
    layer.bias.assign(other.bias.detach().numpy())
fields = np.random.default_rng(0).integers(0, ROWS, size=(7, FIELDS))
expected = theirs(torch.from_numpy(fields)).detach().numpy()
np.testing.assert_allclose(ours(fields), expected, rtol=1e-4, atol=1e-4)
assert np.ptp(expected) > 1
print("equal")
"""


@pytest.mark.parametrize("keras", [2, 3])
def test_the_keras_model_computes_what_the_pytorch_model_computes(keras: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT / "examples" / "deeplight",
        env={"TF_USE_LEGACY_KERAS": str(int(keras == 2)), "TF_CPP_MIN_LOG_LEVEL": "3", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "equal"
