"""What is installed here, `gq-horovod env`, and what is wrong with it, `gq-horovod doctor`.

`facts()` looks, `diagnose()` judges what was found, so tests can break anything by changing a fact.
Frameworks, MPI and Horovod are imported when they are looked at.
"""

from __future__ import annotations

import atexit
import ctypes
import glob
import importlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpi_ops.agreement import by_value, in_words

from .. import __version__
from ..path.buckets import REMEDY_CAPACITY
from . import calibrate

if TYPE_CHECKING:
    from mpi4py import MPI

Facts = dict[str, Any]

HOROVOD_VERSION = "0.28.1"
# Variables that say how a job runs. Values of others, and of these, may be secrets.
_VARIABLES = re.compile(
    r"((GQ_)?HOROVOD|OMPI_MCA|NCCL|UCX|MPIR_CVAR)_\w+|OMP_NUM_THREADS|TF_USE_\w+"
)
_SECRETS = re.compile(r"SECRET|KEY|TOKEN|PASS|CREDENTIAL", re.IGNORECASE)
# What has to be the same on all ranks.
COMPARED = ("gq-horovod", "kernels", "python", "numpy", "horovod", "torch", "tensorflow", "mpi")
_TOOL_SECONDS = 20
_DRIVER = "libcuda.so.1"
# Folders that a container gets the NVIDIA driver's libraries in, where no ld.so.cache names them.
_MOUNTED_DRIVERS = ("/usr/local/nvidia/lib64",)  # GKE
# The first version of the driver for a major version of CUDA (NVIDIA's CUDA Compatibility guide).
_OLDEST_DRIVERS = {"11": 450, "12": 525, "13": 580}
_REBUILD = f"pip install --no-cache-dir --force-reinstall --no-deps horovod=={HOROVOD_VERSION}"
_CUPY = ("cupy-cuda12x", "cupy-cuda13x")
# What Horovod may have been built with.
_PARTS = ("mpi", "gloo", "nccl", "cuda")


@dataclass(frozen=True)
class Finding:
    """What was found about one thing."""

    what: str
    status: Literal["ok", "note", "wrong"]
    found: str
    remedy: str = ""


# -------------------------------------------------------------------------------------------- facts


def facts() -> Facts:
    """What is installed here, as plain data. Raises nothing: errors are facts."""
    found: Facts = {
        "gq-horovod": __version__,
        "kernels": _attempt(_kernels),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "compiler": next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None),
        "mpirun": _first_line("mpirun", "--version"),
        "temporary folder": _attempt(_temporary_folder),
        "horovod": _attempt(_horovod),  # first, as in training: it starts MPI with threads
        "mpi": _attempt(_mpi),
        "gpu": _attempt(_gpus),
        "driver": _attempt(_driver),
        "gpu kernels": _attempt(_gpu_kernels),
        "cuda-aware MPI": _cuda_aware(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if _VARIABLES.fullmatch(name) and not _SECRETS.search(name)
        },
    }
    for package in ("numpy", "torch", "tensorflow", "keras", "tf-keras", "mpi4py", "rich"):
        found[package] = _version(package)
    found["cupy"] = next(filter(None, map(_version, _CUPY)), None)
    return found


def _attempt(look: Any) -> Any:
    try:
        return look()
    except Exception as error:  # a broken installation raises anything
        return {"error": f"{type(error).__name__}: {error}"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    """What a tool prints first; None where it is missing or fails."""
    path = shutil.which(command[0])
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, *command[1:]], capture_output=True, text=True, timeout=_TOOL_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def _kernels() -> dict[str, str]:
    from mpi_ops.kernels import host

    return {"sources": host.fingerprint(), "instruction set": host.best_instruction_set()}


def _temporary_folder() -> str:
    """Where Open MPI keeps the files of a session. Raises OSError where it cannot: MPI would end
    this program in place of raising anything."""
    names = ("OMPI_MCA_orte_tmpdir_base", "TMPDIR", "TEMP", "TMP")
    chosen = next(filter(None, map(os.environ.get, names)), "/tmp")  # noqa: S108, Open MPI's own
    folder = Path(chosen).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"{folder} cannot be written")
    return str(folder)


def _horovod() -> dict[str, Any]:
    _temporary_folder()
    package = Path(str(importlib.import_module("horovod").__file__)).parent
    built = {
        framework: bool(glob.glob(str(package / framework / "mpi_lib*.so")))
        for framework in ("torch", "tensorflow")
    }
    found: dict[str, Any] = {"version": _version("horovod"), **built}
    if built["torch"]:
        hvd: Any = importlib.import_module("horovod.torch")
        found |= {part: bool(getattr(hvd, f"{part}_built")()) for part in _PARTS}
    return found


def _mpi() -> dict[str, Any]:
    _temporary_folder()
    from mpi4py import MPI

    start_mpi()
    names = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    library = MPI.Get_library_version().partition("\n")[0].partition(", package")[0].strip("\0 ")
    return {"library": library, "threads": names[MPI.Query_thread()]}


def _gpus() -> list[str]:
    if _version("torch") is None:
        return []
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _driver() -> dict[str, str | None]:
    """The CUDA that PyTorch is built for, the newest one that the NVIDIA driver can run, and a
    folder with the driver's library where the loader does not look. None for what is not there."""
    built_for = None
    if _version("torch") is not None:
        import torch

        built_for = torch.version.cuda
    mounted = [folder for folder in _MOUNTED_DRIVERS if Path(folder, _DRIVER).exists()]
    found = {"built for": built_for, "cuda": None, "mounted": next(iter(mounted), None)}
    try:
        library = ctypes.CDLL(_DRIVER)
    except OSError:
        return found
    number = ctypes.c_int()
    if status := library.cuDriverGetVersion(ctypes.byref(number)):
        raise RuntimeError(f"cuDriverGetVersion returned {status}")
    found["cuda"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
    return found


def _gpu_kernels() -> str | None:
    """Why our kernels cannot run on the first GPU; None if they can, or if there is none."""
    if not _gpus() or not any(map(_version, _CUPY)):
        return None
    from mpi_ops.kernels import device

    return device.problem(0)


def _cuda_aware() -> bool | None:
    """Whether Open MPI takes pointers to device memory; None where it does not say."""
    path = shutil.which("ompi_info")
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, "--parsable", "--all"], capture_output=True, text=True, timeout=_TOOL_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    said = re.search(r"mpi_built_with_cuda_support:value:(\w+)", done.stdout)
    return None if said is None else said[1] == "true"


# ---------------------------------------------------------------------------------------- judgement


def diagnose(found: Facts) -> list[Finding]:
    """What is right and what is wrong on one machine, in words."""
    return [
        _of_kernels(found),
        *(_of_the_temporary_folder(found) or [*_of_horovod(found), *_of_mpi(found)]),
        *_of_frameworks(found),
        *_of_gpus(found),
        *_of_the_driver(found),
    ]


def _error(value: Any) -> str | None:
    return value.get("error") if isinstance(value, dict) else None


def _of_kernels(found: Facts) -> Finding:
    kernels = found["kernels"]
    if problem := _error(kernels):
        compiler = found["compiler"] or "none was found, so install g++ 11 or newer first"
        remedy = f"install the package again: `pip install .` (compiler: {compiler})"
        return Finding("kernels", "wrong", problem, remedy)
    text = f"{kernels['instruction set']}, sources {kernels['sources']}"
    return Finding("kernels", "ok", text)


def _of_the_temporary_folder(found: Facts) -> list[Finding]:
    """Nothing, unless it cannot be written: Horovod and MPI could not be looked at then."""
    problem = _error(found["temporary folder"])
    if not problem:
        return []
    remedy = "set TMPDIR to a folder on this host that may be written, or in a container mount one "
    remedy += "at /tmp (docker: `--tmpfs /tmp`); MPI does not start without, nor does Horovod"
    return [Finding("temporary folder", "wrong", problem, remedy)]


def _of_horovod(found: Facts) -> list[Finding]:
    horovod = found["horovod"]
    if problem := _error(horovod):
        names = {"torch": "PYTORCH", "tensorflow": "TENSORFLOW"}
        chosen = [name for package, name in names.items() if found[package]] or ["PYTORCH"]
        switches = " ".join(f"HOROVOD_WITH_{name}=1" for name in (*chosen, "MPI", "GLOO"))
        remedy = (
            f"build Horovod against what is installed now: `{switches} {_REBUILD}`; for a PyTorch "
            "or TensorFlow whose headers need C++17, its sources have to be changed, as `make "
            "setup` in a clone does"
        )
        return [Finding("Horovod", "wrong", problem, remedy)]
    having = [part for part in ("torch", "tensorflow", *_PARTS) if horovod.get(part)]
    findings = []
    if horovod["version"] != HOROVOD_VERSION:
        text = f"version {horovod['version']}"
        findings.append(
            Finding("Horovod", "note", text, f"only {HOROVOD_VERSION} was tested with gq-horovod")
        )
    else:
        findings.append(Finding("Horovod", "ok", f"{horovod['version']} with {', '.join(having)}"))
    if not (horovod["torch"] or horovod["tensorflow"]):
        remedy = "build it with HOROVOD_WITH_PYTORCH=1 or HOROVOD_WITH_TENSORFLOW=1"
        findings.append(Finding("Horovod's frameworks", "wrong", "none", remedy))
    if horovod["torch"] and not (horovod["mpi"] or horovod["gloo"]):
        remedy = "build it with HOROVOD_WITH_MPI=1 or HOROVOD_WITH_GLOO=1"
        findings.append(Finding("Horovod's controllers", "wrong", "neither MPI nor Gloo", remedy))
    return [*findings, _of_the_cache(found)]


def _of_the_cache(found: Facts) -> Finding:
    what = "Horovod's response cache"
    text = found["variables"].get("HOROVOD_CACHE_CAPACITY", "1024")
    names = f"room for {text} names of operations (HOROVOD_CACHE_CAPACITY)"
    if text.isdecimal() and int(text) >= REMEDY_CAPACITY:
        return Finding(what, "ok", names)
    if text == "0":
        names = "off (HOROVOD_CACHE_CAPACITY=0)"
    remedy = (
        f"for models of more than some hundred parameters set HOROVOD_CACHE_CAPACITY="
        f"{REMEDY_CAPACITY} on all ranks: a step has a name for each parameter and three for each "
        "bucket, and what does not fit is negotiated anew in every step"
    )
    return Finding(what, "note", names, remedy)


def _of_mpi(found: Facts) -> list[Finding]:
    mpi = found["mpi"]
    needed = "for transport='mpi', mpi_ops and `gq-horovod calibrate`"
    if problem := _error(mpi):
        remedy = f"`pip install 'gq-horovod[mpi]'`, and an MPI library; needed {needed} only"
        return [Finding("MPI", "note", problem, remedy)]
    findings = [Finding("MPI", "ok", mpi["library"])]
    if mpi["threads"] != "multiple":
        remedy = f"use an MPI library with MPI_THREAD_MULTIPLE; needed {needed}"
        findings.append(Finding("threads of MPI", "wrong", mpi["threads"], remedy))
    if found["variables"].get("HOROVOD_MPI_THREADS_DISABLE", "0") not in ("", "0"):
        remedy = "unset HOROVOD_MPI_THREADS_DISABLE; transport='mpi' cannot be used with it"
        findings.append(Finding("threads of Horovod", "wrong", "disabled", remedy))
    if found["mpirun"] is None:
        remedy = "add the bin directory of your MPI to PATH, or start jobs with horovodrun --gloo"
        findings.append(Finding("mpirun", "note", "not on PATH", remedy))
    else:
        own = re.search(r"\d+\.\d+\.\d+", mpi["library"])
        others = re.search(r"\d+\.\d+\.\d+", found["mpirun"])
        if own and others and own[0] != others[0]:
            remedy = f"put the mpirun of {own[0]} first on PATH: ranks may not find each other"
            findings.append(Finding("mpirun", "wrong", found["mpirun"], remedy))
        else:
            findings.append(Finding("mpirun", "ok", found["mpirun"]))
    return findings


def _of_frameworks(found: Facts) -> list[Finding]:
    if not (found["torch"] or found["tensorflow"]):
        remedy = "`pip install 'gq-horovod[torch]'` or `'gq-horovod[tensorflow]'`"
        return [Finding("frameworks", "wrong", "neither PyTorch nor TensorFlow", remedy)]
    findings = []
    for package, name in (("torch", "PyTorch"), ("tensorflow", "TensorFlow")):
        if not found[package]:
            continue
        findings.append(Finding(name, "ok", found[package]))
        horovod = found["horovod"]
        if not _error(horovod) and not horovod[package]:
            flag = f"HOROVOD_WITH_{name.upper()}=1"
            remedy = f"build Horovod again with {flag} if you train with {name}"
            findings.append(Finding(f"Horovod for {name}", "note", "not built", remedy))
    legacy = found["variables"].get("TF_USE_LEGACY_KERAS") in ("1", "True", "true")
    if found["tensorflow"] and (found["keras"] or "").startswith("3") and not legacy:
        remedy = (
            "use DistributedOptimizer of gq_horovod.tensorflow.keras, or set TF_USE_LEGACY_KERAS=1 "
            "(with tf-keras installed): Horovod's reduces nothing with optimizers of Keras 3"
        )
        findings.append(Finding("Keras", "note", found["keras"], remedy))
    return findings


def _of_gpus(found: Facts) -> list[Finding]:
    gpus = found["gpu"]
    if problem := _error(gpus):
        return [Finding("GPU", "wrong", problem, "check the driver with nvidia-smi")]
    if not gpus:
        return [Finding("GPU", "ok", "none")]
    findings = [Finding("GPU", "ok", ", ".join(gpus))]
    if found["cupy"] is None:
        remedy = (
            "`pip install 'gq-horovod[cuda13]'` (or cuda12, for an older driver); without it "
            "gradients are quantized on the CPU"
        )
        findings.append(Finding("CuPy", "wrong", "not installed", remedy))
    elif problem := _error(found["gpu kernels"]) or found["gpu kernels"]:
        remedy = "install CuPy and NVRTC of the driver's CUDA: gq-horovod[cuda12] or [cuda13]"
        findings.append(Finding("CuPy", "wrong", f"{found['cupy']}: {problem}", remedy))
    else:
        findings.append(Finding("CuPy", "ok", found["cupy"]))
    findings += _of_horovod_on_gpus(found)
    said = {True: "yes", False: "no", None: "unknown"}[found["cuda-aware MPI"]]
    findings.append(
        Finding("CUDA-aware MPI", "ok", f"{said} (not needed: MPI is given host memory)")
    )
    return findings


def _of_the_driver(found: Facts) -> list[Finding]:
    """Nothing, unless PyTorch is built for CUDA and cannot use a GPU: why it cannot."""
    what = "NVIDIA driver"
    driver = found["driver"]
    if problem := _error(driver):
        return [Finding(what, "wrong", problem, "check the driver with nvidia-smi")]
    needed, has = driver["built for"], driver["cuda"]
    if needed is None or _error(found["gpu"]):
        return []
    major = needed.partition(".")[0]
    oldest = f"version {_OLDEST_DRIVERS[major]} or newer" if major in _OLDEST_DRIVERS else "newer"
    if has is None and driver["mounted"]:
        text = f"{_DRIVER} is in {driver['mounted']}, where the loader does not look"
        remedy = (
            f"set LD_LIBRARY_PATH={driver['mounted']} before the program starts, for ranks on "
            "other hosts with mpirun's -x LD_LIBRARY_PATH or sshd's SetEnv"
        )
        return [Finding(what, "wrong", text, remedy)]
    if has is None:
        remedy = (
            f"for GPUs install the driver, {oldest}, or start the container with it (docker: "
            "`--gpus all`; Kubernetes: a limit of nvidia.com/gpu); without, tensors on the CPU work"
        )
        text = f"none (no {_DRIVER}), while PyTorch is built for CUDA {needed}"
        return [Finding(what, "note", text, remedy)]
    if int(has.partition(".")[0]) < int(major):
        text = f"runs CUDA up to {has}, while PyTorch is built for CUDA {needed}"
        remedy = f"install a driver of {oldest}, or a PyTorch for CUDA {has.partition('.')[0]}"
        return [Finding(what, "wrong", text, remedy)]
    if not found["gpu"]:
        remedy = (
            "check with nvidia-smi that there is one, and that CUDA_VISIBLE_DEVICES does not hide "
            "it; without, tensors on the CPU work"
        )
        return [Finding(what, "note", f"for CUDA up to {has}, but no GPU is visible", remedy)]
    return [Finding(what, "ok", f"for CUDA up to {has}")]


def _of_horovod_on_gpus(found: Facts) -> list[Finding]:
    """Whether Horovod can use the GPUs that are there; only its PyTorch module says so."""
    horovod = found["horovod"]
    if _error(horovod) or "cuda" not in horovod:
        return []
    what = "Horovod on GPUs"
    build = f"`HOROVOD_GPU_OPERATIONS=NCCL {_REBUILD}`"
    if not horovod["cuda"]:
        remedy = f"build it again with {build}: it takes no tensors on a GPU, and "
        remedy += "hooks copy gradients that are not compressed to the host"
        return [Finding(what, "wrong", "built without CUDA", remedy)]
    if not horovod["nccl"]:
        remedy = f"build it again with {build}: it copies tensors on a GPU to the host"
        return [Finding(what, "note", "built without NCCL", remedy)]
    return [Finding(what, "ok", "built with NCCL")]


# -------------------------------------------------------------------------------------- the cluster


def compare(every_rank: Sequence[Facts]) -> list[Finding]:
    """What differs between ranks and must not."""
    findings = []
    for key in COMPARED:
        values = {rank: repr(_comparable(key, own[key])) for rank, own in enumerate(every_rank)}
        having = by_value(values)
        if len(having) > 1:
            listed = "; ".join(f"{value} on {ranks}" for value, ranks in having.items())
            remedy = "install the same on every host, best from one image"
            findings.append(Finding(f"{key} on all ranks", "wrong", listed, remedy))
    if not findings:
        findings.append(Finding("versions on all ranks", "ok", f"the same on {len(every_rank)}"))
    return findings


def _comparable(key: str, value: Any) -> Any:
    """Hosts may have different processors, and so instruction sets: the bytes are the same."""
    if key == "kernels" and not _error(value):
        return value["sources"]
    return value


def merge(every_rank: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Findings of all ranks: each once, with the ranks that have it where not all do."""
    having: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(every_rank):
        for finding in findings:
            having.setdefault(finding, []).append(rank)
    merged = []
    for finding, ranks in having.items():
        what = finding.what
        if len(ranks) < len(every_rank):
            what += f" on {in_words(ranks)}"
        merged.append(replace(finding, what=what))
    return merged


def cluster(comm: MPI.Intracomm, own: Facts) -> list[Finding]:
    """Compare all ranks, and measure the network. Collective; the same result on every rank."""
    findings = compare(comm.allgather(own))
    hosts = comm.allgather(platform.node())
    latency, bandwidth = calibrate.network(comm)
    where = f"{len(set(hosts))} hosts" if len(set(hosts)) > 1 else "one host (loopback)"
    text = f"{1e6 * latency:.0f} us, {bandwidth / 1e9:.2f} Gbit/s between ranks 0 and "
    text += f"{comm.size - 1}; {where}"
    findings.append(Finding("network", "ok", text))
    return findings


def world() -> MPI.Intracomm | None:
    """MPI's ranks, where this is one of several."""
    started = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"} & set(os.environ)
    if not any(os.environ[name] not in ("", "1") for name in started):
        return None
    from mpi4py import MPI

    start_mpi()
    return MPI.COMM_WORLD


def start_mpi() -> None:
    """Start MPI where MPI4PY_RC_INITIALIZE=0 has kept the import of mpi4py.MPI from it.

    For our own commands: a library leaves that to the program. Then MPI is ended at exit, too.
    """
    from mpi4py import MPI

    if not MPI.Is_initialized():
        MPI.Init_thread()
        atexit.register(_end_mpi)


def _end_mpi() -> None:
    from mpi4py import MPI

    if not MPI.Is_finalized():
        MPI.Finalize()


def document(found: Facts, findings: Sequence[Finding]) -> dict[str, Any]:
    """Both as plain data, for --json."""
    wrong = sum(finding.status == "wrong" for finding in findings)
    return {"facts": found, "findings": [asdict(each) for each in findings], "wrong": wrong}
