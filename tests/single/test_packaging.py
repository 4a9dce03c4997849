"""What users install: the sdist, the wheel, the pins, and the messages of the set-up script."""

from __future__ import annotations

import email
import hashlib
import importlib.util
import os
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
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = (".git", ".venv", "build", "dist", ".*_cache", "__pycache__", "*.egg-info", "*.so")
PACKAGES = ("gq_horovod", "mpi_ops")
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
    assert {"requirements.txt", "requirements.lock"} <= names
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


def test_wheel_works_with_nothing_but_numpy(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", "--quiet", wheel)
    # numpy is borrowed through links, and with it nothing else of this environment.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for entry in Path(sysconfig.get_path("platlib")).glob("numpy*"):
        (site / entry.name).symlink_to(entry)
    loaded = run(python, "-P", "-c", PRINT_HEAVY, cwd=tmp_path).split()
    assert loaded == [str(site / "gq_horovod" / "__init__.py")]
    load = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).gq_best_isa)"
    run(python, "-c", load, site / "mpi_ops" / "kernels" / "libgq_kernels.so")


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
    ours, line, of_torch = LOCK.partition(f"{setup_env.OF_TORCH}\n")
    assert line
    assert setup_env.pins(ours) == setup_env.pins((ROOT / "requirements.txt").read_text())
    extra = setup_env.pins(of_torch)
    assert {"triton", "nvidia-nccl-cu13"} <= set(extra)
    assert not extra.keys() & setup_env.pins(ours).keys()
    entries = re.split(r"^(?=\w)", re.sub("^#.*\n", "", ours + of_torch, flags=re.M), flags=re.M)[
        1:
    ]
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
    everything = setup_env.hashed_pins((ROOT / "requirements.txt").read_text(), LOCK, torch=True)
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


@pytest.fixture
def bare_checkout(tmp_path: Path) -> Path:
    """A checkout without .venv, just enough for the set-up script to start."""
    for name in ("tools/setup_env.py", "requirements.txt", "requirements.lock", "pyproject.toml"):
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

    def build_horovod(scratch: Path, compiler: str) -> Path:
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
