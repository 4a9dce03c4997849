"""gq-horovod doctor and env: every breakage is named with its remedy, and nothing secret shows."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gq_horovod import cli
from gq_horovod.advisor import doctor
from gq_horovod.advisor.doctor import Facts, Finding, compare, diagnose, merge

GOOD: Facts = {
    "gq-horovod": "0.1.0",
    "kernels": {"sources": "abc", "instruction set": "x86_64_v3"},
    "python": "3.11.7",
    "compiler": "/usr/bin/g++",
    "mpirun": "mpirun (Open MPI) 4.1.8",
    "temporary folder": "/scratch",
    "horovod": {
        "version": "0.28.1",
        "torch": True,
        "tensorflow": True,
        "mpi": True,
        "gloo": True,
        "nccl": False,
        "cuda": False,
    },
    "mpi": {"library": "Open MPI v4.1.8", "threads": "multiple"},
    "gpu": [],
    "driver": {"built for": None, "cuda": None, "mounted": None},
    "gpu kernels": None,
    "cuda-aware MPI": None,
    "variables": {"HOROVOD_CACHE_CAPACITY": "8192"},
    "numpy": "2.0.2",
    "torch": "2.13.0",
    "tensorflow": "2.18.1",
    "keras": "2.15.0",
    "cupy": None,
}
DRIVER = {"built for": "13.0", "cuda": "13.0", "mounted": None}
GPU = {
    "gpu": ["H100"],
    "cupy": "14.2.0",
    "driver": DRIVER,
    "horovod.nccl": True,
    "horovod.cuda": True,
}


def broken(changes: dict[str, Any]) -> Facts:
    """Good facts but for some; "horovod.mpi" is a fact inside another."""
    found = copy.deepcopy(GOOD)
    for key, value in changes.items():
        outer, _, inner = key.partition(".")
        if inner:
            found[outer][inner] = value
        else:
            found[outer] = value
    return found


def test_nothing_is_wrong() -> None:
    for changes in ({}, GPU):
        assert {finding.status for finding in diagnose(broken(changes))} == {"ok"}


ERROR = {"error": "ImportError: no such symbol"}
BREAKAGES = [
    ({"kernels": ERROR}, "kernels", "wrong", "`pip install .` (compiler: /usr/bin/g++)"),
    ({"kernels": ERROR, "compiler": None}, "kernels", "wrong", "install g++ 11 or newer first"),
    (
        {"temporary folder": ERROR, "horovod": ERROR, "mpi": ERROR},
        *("temporary folder", "wrong", "`--tmpfs /tmp`"),
    ),
    ({"horovod": ERROR}, "Horovod", "wrong", "HOROVOD_WITH_PYTORCH=1"),
    (
        {"horovod": ERROR, "torch": None},
        *("Horovod", "wrong", "`HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITH_MPI=1"),
    ),
    ({"horovod.version": "0.27.0"}, "Horovod", "note", "only 0.28.1 was tested"),
    (
        {"horovod.torch": False, "horovod.tensorflow": False},
        *("Horovod's frameworks", "wrong", "HOROVOD_WITH_PYTORCH=1"),
    ),
    (
        {"horovod.mpi": False, "horovod.gloo": False},
        *("Horovod's controllers", "wrong", "HOROVOD_WITH_MPI=1 or HOROVOD_WITH_GLOO=1"),
    ),
    ({"horovod.torch": False}, "Horovod for PyTorch", "note", "HOROVOD_WITH_PYTORCH=1"),
    ({"mpi": ERROR}, "MPI", "note", "pip install 'gq-horovod[mpi]'"),
    ({"mpi.threads": "serialized"}, "threads of MPI", "wrong", "MPI_THREAD_MULTIPLE"),
    (
        {"variables": {"HOROVOD_MPI_THREADS_DISABLE": "1"}},
        *("threads of Horovod", "wrong", "unset HOROVOD_MPI_THREADS_DISABLE"),
    ),
    ({"mpirun": None}, "mpirun", "note", "PATH"),
    ({"variables": {}}, "Horovod's response cache", "note", "HOROVOD_CACHE_CAPACITY=8192"),
    ({"mpirun": "mpirun (Open MPI) 5.0.1"}, "mpirun", "wrong", "put the mpirun of 4.1.8 first"),
    ({"torch": None, "tensorflow": None}, "frameworks", "wrong", "pip install 'gq-horovod[torch]'"),
    ({"keras": "3.5.0"}, "Keras", "note", "TF_USE_LEGACY_KERAS=1"),
    ({"gpu": ERROR}, "GPU", "wrong", "nvidia-smi"),
    ({**GPU, "cupy": None}, "CuPy", "wrong", "pip install 'gq-horovod[cuda13]'"),
    ({"driver": ERROR}, "NVIDIA driver", "wrong", "nvidia-smi"),
    ({"driver": {**DRIVER, "cuda": None}}, "NVIDIA driver", "note", "version 580 or newer"),
    (
        {"driver": {**DRIVER, "cuda": None, "mounted": "/usr/local/nvidia/lib64"}},
        *("NVIDIA driver", "wrong", "LD_LIBRARY_PATH=/usr/local/nvidia/lib64"),
    ),
    ({"driver": {**DRIVER, "cuda": "12.8"}}, "NVIDIA driver", "wrong", "a PyTorch for CUDA 12"),
    ({"driver": DRIVER}, "NVIDIA driver", "note", "CUDA_VISIBLE_DEVICES"),
    ({**GPU, "gpu kernels": "they do not load"}, "CuPy", "wrong", "the driver's CUDA"),
    ({**GPU, "gpu kernels": ERROR}, "CuPy", "wrong", "the driver's CUDA"),
    (
        {**GPU, "horovod.nccl": False, "horovod.cuda": False},
        *("Horovod on GPUs", "wrong", "HOROVOD_GPU_OPERATIONS=NCCL"),
    ),
    ({**GPU, "horovod.nccl": False}, "Horovod on GPUs", "note", "HOROVOD_GPU_OPERATIONS=NCCL"),
]


@pytest.mark.parametrize(("changes", "what", "status", "remedy"), BREAKAGES)
def test_a_breakage(changes: dict[str, Any], what: str, status: str, remedy: str) -> None:
    findings = [finding for finding in diagnose(broken(changes)) if finding.what == what]
    assert [finding.status for finding in findings] == [status]
    assert remedy in findings[0].remedy
    assert findings[0].found


def test_without_a_gpu_the_driver_is_all_that_is_missing() -> None:
    """Where everything is built for CUDA; an older driver of the same major version is enough."""
    found = broken({"driver": {**DRIVER, "cuda": None}, "horovod.nccl": True, "cupy": "14.2.0"})
    assert [each.what for each in diagnose(found) if each.status != "ok"] == ["NVIDIA driver"]
    older = broken({**GPU, "driver": {**DRIVER, "built for": "12.8", "cuda": "12.2"}})
    assert {finding.status for finding in diagnose(older)} == {"ok"}


def test_the_driver_is_asked_where_it_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "driver.cpp"
    source.write_text('extern "C" int cuDriverGetVersion(int* v) { *v = 12080; return 0; }\n')
    compiler = shutil.which("g++") or pytest.skip("no compiler")
    library = tmp_path / "libgq_driver_of_a_test.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setattr(doctor, "_MOUNTED_DRIVERS", (str(tmp_path / "none"), str(tmp_path)))
    monkeypatch.setattr(doctor, "_DRIVER", library.name)
    found = doctor._driver()
    assert (found["cuda"], found["mounted"]) == (None, str(tmp_path))
    monkeypatch.setattr(doctor, "_DRIVER", str(library))
    assert doctor._driver()["cuda"] == "12.8"


def test_whatever_is_not_right_has_a_remedy() -> None:
    for changes, *_ in BREAKAGES:
        for finding in diagnose(broken(changes)):
            assert (finding.status == "ok") == (finding.remedy == ""), finding


def test_ranks_with_other_versions() -> None:
    ranks = [broken({}), broken({"torch": "2.4.0"}), broken({})]
    (finding,) = compare(ranks)
    assert finding.status == "wrong"
    assert finding.found == "'2.13.0' on ranks 0, 2; '2.4.0' on rank 1"
    assert "every host" in finding.remedy


def test_hosts_may_have_different_processors() -> None:
    ranks = [broken({}), broken({"kernels.instruction set": "baseline"})]
    assert [finding.status for finding in compare(ranks)] == ["ok"]
    ranks[1]["kernels"]["sources"] = "other"
    assert [finding.what for finding in compare(ranks)] == ["kernels on all ranks"]


def test_what_one_rank_finds_names_it() -> None:
    good, bad = Finding("CuPy", "ok", "14"), Finding("CuPy", "wrong", "not installed", "install it")
    assert [finding.what for finding in merge([[good], [bad], [good]])] == [
        "CuPy on ranks 0, 2",
        "CuPy on rank 1",
    ]
    assert merge([[good], [good]]) == [good]


def test_status_and_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "world", lambda: None)
    monkeypatch.setitem(sys.modules, "rich.console", None)  # what is missing may be just that
    for changes, status in (({}, 0), ({"kernels": ERROR}, 1)):
        monkeypatch.setattr(doctor, "facts", lambda changes=changes: broken(changes))
        assert cli.main(["doctor", "--json"]) == status
        printed = json.loads(capsys.readouterr().out)
        assert printed["wrong"] == status
        assert printed["facts"] == broken(changes)
        assert cli.main(["doctor"]) == status
        shown = capsys.readouterr().out
        assert ("Nothing is wrong." in shown) == (status == 0)
        assert ("pip install ." in shown) == (status == 1)


def test_secrets_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_SECRET_KEY", "hush")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "hush")
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "10")
    for name in ("_horovod", "_mpi", "_gpus"):  # slow, and starts MPI
        monkeypatch.setattr(doctor, name, dict)
    found = doctor.facts()
    assert found["variables"]["HOROVOD_CYCLE_TIME"] == "10"
    assert "hush" not in json.dumps(found)
    assert found["kernels"]["sources"] != "unknown"


def test_what_cannot_be_looked_at_is_a_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("undefined symbol")

    for name in ("_kernels", "_horovod", "_mpi", "_gpus"):
        monkeypatch.setattr(doctor, name, fail)
    found = doctor.facts()
    assert found["horovod"] == {"error": "OSError: undefined symbol"}
    assert [f.what for f in diagnose(found) if f.status == "wrong"] == ["kernels", "Horovod", "GPU"]


def test_without_a_temporary_folder_mpi_is_not_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It would end the program. No folder can be made in a file, not by root either."""
    (tmp_path / "file").touch()
    monkeypatch.delenv("OMPI_MCA_orte_tmpdir_base", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file" / "folder"))
    monkeypatch.setattr(doctor, "_gpus", list)  # slow
    found = doctor.facts()
    problem = {"error": f"OSError: {tmp_path / 'file' / 'folder'} cannot be written"}
    assert found["temporary folder"] == found["horovod"] == found["mpi"] == problem
    wrong = [finding for finding in diagnose(found) if finding.status == "wrong"]
    assert [finding.what for finding in wrong] == ["temporary folder"]

    # Open MPI makes it where it can.
    monkeypatch.setenv("TMPDIR", str(tmp_path / "made" / "later"))
    assert doctor._temporary_folder() == str(tmp_path / "made" / "later")
