"""gq_horovod.tensorflow: a clear error where something is missing."""

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
        "gq_horovod.tensorflow: TensorFlow is not installed; "
        "`pip install 'gq-horovod[tensorflow]'`, or import GlobalQSGD from the module of the "
        "framework that you use.",
    ]


def test_without_horovod_the_error_says_so() -> None:
    assert blocked("horovod", "tensorflow")[2] == (
        "gq_horovod.tensorflow: Horovod with TensorFlow support is not installed; build it with "
        "HOROVOD_WITH_TENSORFLOW=1 (its `horovodrun --check-build` shows what it has)."
    )


@pytest.mark.parametrize("keras", [2, 3])
def test_one_import_for_both_keras(keras: int) -> None:
    code = "import gq_horovod.tensorflow.keras as k, gq_horovod.tensorflow as t\n"
    code += "print(k.GlobalQSGD is t.GlobalQSGD, k.BroadcastGlobalVariablesCallback.__module__)"
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        cwd=ROOT,
        env={"TF_USE_LEGACY_KERAS": str(int(keras == 2)), "TF_CPP_MIN_LOG_LEVEL": "3", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    module = "horovod.tensorflow.keras.callbacks" if keras == 2 else "gq_horovod.tensorflow.keras3"
    assert done.stdout.split()[-2:] == ["True", module]
