"""The guides list what the code has: options, and variables of the environment."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from gq_horovod.frontend import Compression

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = re.compile(r"\bGQ_HOROVOD_[A-Z_]+")


def first_column(document: str, heading: str) -> str:
    """The first cells of all tables below a heading, up to the next one."""
    text = (ROOT / document).read_text()
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return "\n".join(re.findall(r"^\|([^|]*)\|", section, re.MULTILINE))


def read_by(*sources: Path) -> set[str]:
    return {name for path in sources for name in VARIABLE.findall(path.read_text())}


def test_options() -> None:
    listed = re.findall(r"`(\w+)`", first_column("docs/tune.md", "Options"))
    assert listed == [*dict.fromkeys(listed)]
    assert {*listed} == {*inspect.signature(Compression).parameters}


def test_variables_of_the_environment() -> None:
    packages = [*ROOT.glob("gq_horovod/**/*.py"), *ROOT.glob("mpi_ops/**/*.py")]
    listed = VARIABLE.findall(first_column("docs/tune.md", "Environment variables"))
    assert sorted(listed) == sorted(read_by(*packages))


def test_variables_of_the_set_up() -> None:
    listed = VARIABLE.findall(first_column("CONTRIBUTING.md", "Set up"))
    own = {"GQ_HOROVOD_REEXEC"}  # what it tells itself
    assert sorted(listed) == sorted(read_by(ROOT / "tools" / "setup_env.py") - own)
