"""gq_horovod.tensorflow: a clear error or warning where something is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest
from test_imports import BLOCKED, ROOT, python


def blocked(name: str, *present: str) -> list[str]:
    code = BLOCKED.format(blocked=name, present=present)
    return python(code.replace("gq_horovod.torch", "gq_horovod.tensorflow")).strip().split("\n")


def test_without_tensorflow_the_error_says_so() -> None:
    assert blocked("tensorflow") == [
        "ImportError",
        "ModuleNotFoundError",
        "gq_horovod.tensorflow: TensorFlow is not installed; `pip install gq-horovod[tensorflow]`, "
        "or import GlobalQSGD from the module of the framework that you use.",
    ]


def test_without_horovod_the_error_says_so() -> None:
    assert blocked("horovod", "tensorflow")[2] == (
        "gq_horovod.tensorflow: Horovod with TensorFlow support is not installed; build it with "
        "HOROVOD_WITH_TENSORFLOW=1 (its `horovodrun --check-build` shows what it has)."
    )


@pytest.mark.parametrize(("keras", "warned"), [(2, False), (3, True)])
def test_keras_3_is_warned_about(keras: int, warned: bool) -> None:
    """Horovod's optimizer reduces nothing there, and says nothing."""
    code = "import gq_horovod.tensorflow.keras as k, gq_horovod.tensorflow as t\n"
    code += "print(k.GlobalQSGD is t.GlobalQSGD)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"TF_USE_LEGACY_KERAS": str(int(keras == 2)), "TF_CPP_MIN_LOG_LEVEL": "3", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "True"
    assert ("RuntimeWarning: gq_horovod.tensorflow.keras: tf.keras is Keras 3" in done.stderr) is (
        warned
    )
