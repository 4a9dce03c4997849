#!/usr/bin/env python3
"""Write requirements.lock: the pins of requirements*.txt with the hashes of their files.

    .venv/bin/python tools/lock.py

To be run where a pin was moved. pip resolves the pins anew, which also finds what torch's CUDA
wheel needs, and downloads nothing but metadata. The hashes are those that the package index has for
all files of a version that Linux on x86-64 or arm64 can use; nothing is downloaded to make them.
Needs the network; the index is the one that pip is configured for, and there must be no other
(PIP_CONFIG_FILE=/dev/null, no PIP_EXTRA_INDEX_URL, no PIP_FIND_LINKS).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import requests
import setup_env
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version

PYTHON = (3, 11)
MACHINES = ("x86_64", "aarch64")
JSON = "application/vnd.pypi.simple.v1+json"
SECONDS = 120  # for an answer of the index

HEADER = """\
# Made by tools/lock.py from requirements.txt: change that file, and make this one anew.
# `make setup` installs these versions, and refuses files with other hashes than these. They are
# those of all files for CPython 3.11 on Linux, x86-64 and arm64.
"""

# What an interpreter and an ABI may be called; the platform is looked at beside them.
_TAGS = {
    (tag.interpreter, tag.abi)
    for tag in (
        *cpython_tags(PYTHON, platforms=["any"]),
        *compatible_tags(PYTHON, "cp311", platforms=["any"]),
    )
}


def usable(filename: str) -> bool:
    """Whether pip can take a file on one of the machines: its wheels, and source archives."""
    if not filename.endswith(".whl"):
        return filename.endswith((".tar.gz", ".zip"))
    try:
        *_, tags = parse_wheel_filename(filename)
    except InvalidWheelFilename:  # some old releases have such names; pip leaves them out as well
        return False
    return any(
        (tag.interpreter, tag.abi) in _TAGS
        and (
            tag.platform == "any"
            or (tag.platform.startswith(("manylinux", "linux")) and tag.platform.endswith(MACHINES))
        )
        for tag in tags
    )


def is_of(filename: str, name: str, version: str) -> bool:
    """Whether a file of the package is of the version."""
    if filename.endswith(".whl"):
        return parse_wheel_filename(filename)[1] == Version(version)  # 13.0.3 is 13.0.3.0
    stem = filename.removesuffix(".zip").removesuffix(".tar.gz")
    return stem[len(name) + 1 :] == version


def resolve() -> dict[str, str]:
    """Names and versions of all that the pins bring, by pip."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"),
                *("--ignore-installed", "--use-feature=fast-deps", "--report", str(report)),
                *("-r", str(setup_env.REQUIREMENTS), "-r", str(setup_env.CUDA_REQUIREMENTS)),
            ],
            check=True,
        )
        found = json.loads(report.read_text())["install"]
    return {each["metadata"]["name"]: each["metadata"]["version"] for each in found}


def files(index: str, name: str, verify: str | bool) -> list[dict]:
    """What the index has of a package: names and hashes of files."""
    answer = requests.get(
        f"{index.rstrip('/')}/{setup_env.normalized(name)}/",
        headers={"Accept": JSON},
        timeout=SECONDS,
        verify=verify,
    )
    answer.raise_for_status()
    return answer.json()["files"]


def entry(name: str, version: str, found: list[dict]) -> str:
    """The lines of one package. Raises SystemExit where the index has no usable file of it."""
    hashes = sorted(
        file["hashes"]["sha256"]
        for file in found
        if usable(file["filename"]) and is_of(file["filename"], name, version)
    )
    if not hashes:
        raise SystemExit(f"lock: the index has no file of {name} {version} for these machines.")
    lines = [f"{name}=={version}", *(f"    --hash=sha256:{digest}" for digest in hashes)]
    return " \\\n".join(lines) + "\n"


def setting(name: str) -> str:
    """One of pip's, empty where it is not set."""
    found = os.environ.get(f"PIP_{name.upper().replace('-', '_')}", "")
    command = [sys.executable, "-m", "pip", "config", "get", f"global.{name}"]
    return found or setup_env.output_of(command).strip()


def main() -> None:
    """Make the file."""
    others = setup_env.other_sources(sys.executable)
    if others:
        raise SystemExit(
            f"lock: pip must have one index and nothing else to take packages from, got {others}; "
            "set PIP_CONFIG_FILE=/dev/null, and unset PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS."
        )
    from pip._internal.models.index import PyPI  # what pip takes where nothing is set

    index = setting("index-url") or PyPI.simple_url
    pins = setup_env.pins(setup_env.REQUIREMENTS.read_text())
    pins_of_cuda = setup_env.pins(setup_env.CUDA_REQUIREMENTS.read_text())
    resolved = {setup_env.normalized(name): (name, own) for name, own in resolve().items()}
    ours, of_cuda, of_torch = list[str](), list[str](), list[str]()
    for key in sorted(resolved):
        name, version = (pins | pins_of_cuda).get(key, resolved[key])
        part = ours if key in pins else of_cuda if key in pins_of_cuda else of_torch
        part.append(entry(name, version, files(index, name, setting("cert") or True)))
        print(f"{name} {version}", flush=True)
    text = HEADER + "".join(ours)
    text += f"\n{setup_env.OF_TORCH}\n" + "".join(of_torch)
    text += f"\n{setup_env.OF_CUDA}\n" + "".join(of_cuda)
    setup_env.write_atomically(setup_env.LOCK, text)


if __name__ == "__main__":
    main()
