"""tools/gpu_check.sh without a GPU: what it says, its rehearsal, and that it notices faults."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
ALL = argparse.Namespace(rehearse=False, staged="/somewhere")  # on a machine with a GPU

torch = pytest.importorskip("torch")
pytest.importorskip("horovod.torch")
GlobalQSGD = pytest.importorskip("gq_horovod.torch").GlobalQSGD


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("tools.gpu_check")


def run(*arguments: object, limit: float = 600, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable, **env},
        capture_output=True,
        text=True,
        timeout=limit,
    )


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("--output", tmp_path / "report.json")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    for part in ("NVIDIA GPU", torch.__version__, "gq-horovod doctor", "--rehearse"):
        assert part in line
    assert not (tmp_path / "report.json").exists()


def test_without_an_environment_it_says_so() -> None:
    done = run(PYTHON="/nowhere/python")
    assert done.returncode == 2
    assert "make setup" in done.stderr


@pytest.mark.seldom
def test_rehearsal(gpu_check: Any, tmp_path: Path) -> None:
    done = run("--rehearse", "--output", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["seconds"] < 600
    names = {(each["part"], each["name"]) for each in report["checks"]}
    assert {("throughput", name) for name in gpu_check.TARGETS} < names
    for ranks in ("1 rank", "2 ranks", "4 ranks"):
        assert {(f"Horovod, {ranks}", f"{op} uint8") for op in ("allgather", "alltoall")} < names
        assert {(f"gradients, {ranks}", levels) for levels in gpu_check.LEVELS} < names
    assert {("step", f"{levels}, hooks") for levels in gpu_check.LEVELS} < names
    # One line of the table for each, and all of them say that no GPU was there.
    assert len(done.stdout.splitlines()) == len(names) + 1
    assert gpu_check.REHEARSED_ON in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_operations_and_gradients_on_ranks(ranks: int, gpu_check: Any) -> None:
    options = argparse.Namespace(rehearse=True, staged=None)
    names = {f"{what}, {ranks} rank{'s' if ranks > 1 else ''}" for what in ("Horovod", "gradients")}
    parts = [each for each in gpu_check.parts(options) if each.name in names]
    assert len(parts) == 2
    for part in parts:
        checks = gpu_check.run(part)
        assert len(checks) > 5
        assert {check.status for check in checks} == {"passed"}, checks


def test_hooks_run_with_one_rank_too(gpu_check: Any) -> None:
    """Horovod registers them for several ranks only, unless it is told otherwise."""
    options = argparse.Namespace(rehearse=True, staged=None)
    (part,) = (each for each in gpu_check.parts(options) if each.name == "training step")
    checks = gpu_check.run(part)
    hooks = [check.value for check in checks if check.name.endswith("hooks")]
    assert len(hooks) == len(gpu_check.LEVELS) + 1
    steps = [check.name for check in checks if check.part == "step" and check.name != "model"]
    assert steps[0] == gpu_check.LEVELS[0] == GlobalQSGD().config.levels  # the default
    skipped = {check.name for check in checks if check.status == "skipped"}
    assert skipped == {name for name, way in gpu_check.WAYS.items() if way.needs_gpu}
    assert min(hooks) > 0, checks


def test_it_ends_within_ten_minutes(gpu_check: Any) -> None:
    limits = [each.seconds for each in gpu_check.parts(ALL) if isinstance(each, gpu_check.Part)]
    assert len(limits) >= 10
    assert sum(limits) <= 570  # and what a part takes that has to be ended


def test_more_ranks_than_gpus_are_left_out_with_the_reason(
    gpu_check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = argparse.Namespace(rehearse=False, staged=None)
    for gpus, expected in ((1, [2, 4]), (2, [4]), (4, [])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        left_out = [size for size in (2, 4) if "--staged" in gpu_check.why_not(size, options)]
        assert left_out == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpu_check.why_not(4, ALL) == ""


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "import sys; print('a library says this'); sys.exit('it broke')",
            "exit status 1: it broke",
        ),
        ("import os; os.kill(os.getpid(), 11)", "exit status -11"),
        ("import time; print('begun', flush=True); time.sleep(60)", "did not end within 2 s"),
    ],
)
def test_a_part_that_breaks_fails(script: str, said: str, gpu_check: Any) -> None:
    (check,) = gpu_check.run(gpu_check.Part("a part", [sys.executable, "-c", script], 2))
    assert (check.part, check.status) == ("a part", "failed")
    assert said in check.text


def test_what_ended_too_late_keeps_its_results(gpu_check: Any) -> None:
    line = json.dumps({"part": "p", "name": "n", "status": "passed", "text": "t"})
    script = f"import time; print('{gpu_check.RESULT}' + '''{line}''', flush=True); time.sleep(60)"
    first, last = gpu_check.run(gpu_check.Part("a part", [sys.executable, "-c", script], 2))
    assert (first.name, first.status, last.status) == ("n", "passed", "failed")


WRONG_HOROVOD = """
import torch
Sum = Max = None
def init(): pass
shutdown = init
def rank(): return 0
def size(): return 1
def allgather(tensor, name): return tensor + 1  # wrong
def alltoall(tensor, splits, name): return tensor, splits
def broadcast(tensor, root, name): return tensor.flip(0)  # wrong
def allreduce(tensor, op, name): return tensor
def allgather_object(value): return [value]
"""


def test_wrong_operations_are_noticed(gpu_check: Any, tmp_path: Path) -> None:
    package = tmp_path / "horovod"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "torch.py").write_text(WRONG_HOROVOD)
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--rehearse"]
    checks = gpu_check.run(
        gpu_check.Part("operations", [*command, "--part", "operations"], 60, str(tmp_path))
    )
    failed = {check.name for check in checks if check.status == "failed"}
    assert failed == {
        f"{op} {dtype}" for op in ("allgather", "broadcast") for dtype in ("int32", "uint8")
    }


def test_a_part_that_hangs_says_where(gpu_check: Any, tmp_path: Path, capsys: Any) -> None:
    package = tmp_path / "horovod"
    package.mkdir()
    (package / "__init__.py").touch()
    hangs = "import time\ndef init(): time.sleep(600)\n"
    (package / "torch.py").write_text(hangs)
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--rehearse"]
    command += ["--part", "operations"]
    (check,) = gpu_check.run(gpu_check.Part("operations", command, 10, str(tmp_path)))
    assert "did not end within 10 s" in check.text
    assert "torch.py" in capsys.readouterr().err


def test_a_missed_target_is_an_error(
    gpu_check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def checks(options: argparse.Namespace) -> list[Any]:
        return [
            gpu_check.Check("throughput", "copy", "passed", "2000 GB/s", 2000.0),
            gpu_check.Check("throughput", "absmax", status, "0.80 of a copy", 0.8, 0.9),
        ]

    monkeypatch.setattr(gpu_check, "parts", checks)
    report = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--rehearse", "--output", str(report)])
    for status, expected in (("passed", 0), ("missed", 1), ("failed", 1)):
        assert gpu_check.main() == expected
        assert (
            f"{status:8}throughput  absmax  0.80 of a copy (target 0.90)" in capsys.readouterr().out
        )
        assert json.loads(report.read_text())["checks"][1]["status"] == status


def test_every_kernel_is_called_as_a_gpu_wants_it(
    gpu_check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On the CPU, by the emulation of tests/single."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "single"))
    fake_cupy = importlib.import_module("fake_cupy")
    zeros = np.zeros(1 << 12, dtype=np.float32)
    with fake_cupy.installed(tmp_path) as device:
        x, y = fake_cupy.asarray(zeros), fake_cupy.asarray(zeros)
        calls = list(gpu_check._kernel_calls(device, x, y))
        calls += gpu_check._table_calls(device, x, [1000, 96, 3000])
        assert {name for name, _, _ in calls} == set(gpu_check.TARGETS)
        for name, size, run_kernel in calls:
            # The mean of a share, its norms, and its codes.
            launches, passes = (3, 4) if name == gpu_check.REDUCE else (1, 2)
            assert zeros.nbytes <= size <= passes * zeros.nbytes, name
            launched = len(fake_cupy.Module.launches)
            run_kernel()
            assert len(fake_cupy.Module.launches) == launched + launches, name


def test_the_table_is_that_of_wide_resnet(gpu_check: Any) -> None:
    resnet = importlib.import_module("examples.wide_resnet.resnet")
    counts = gpu_check._compressed(resnet.WIDE_RESNET_101_2)
    assert len(counts) == 105
    assert sum(counts) > 120e6


def test_kernels_that_are_too_slow_miss_their_target(gpu_check: Any) -> None:
    for factor, expected in ((1.0, "passed"), (0.5, "missed")):
        for name, target in gpu_check.TARGETS.items():
            assert gpu_check.verdict(name, factor * target + 1e-9) == expected
