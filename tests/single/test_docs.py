"""The guides list what the code has: options, and variables of the environment."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from gq_horovod.frontend import Compression

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = re.compile(r"\bGQ_HOROVOD_[A-Z_]+")


def first_column(document: str, heading: str) -> str:
    """The first cells of all tables below a heading, up to the next one of its level."""
    text = (ROOT / document).read_text()
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return "\n".join(re.findall(r"^\|([^|]*)\|", section, re.MULTILINE))


def read_by(*sources: Path) -> set[str]:
    return {name for path in sources for name in VARIABLE.findall(path.read_text())}


def events() -> set[str]:
    """The names of what the package logs: the second argument of `say`."""
    calls = (
        node
        for path in ROOT.glob("gq_horovod/**/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "say"
    )
    names = (call.args[1] for call in calls)
    either = (
        own
        for name in names
        for own in ([name.body, name.orelse] if isinstance(name, ast.IfExp) else [name])
    )
    return {own.value for own in either if isinstance(own, ast.Constant)}


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


def test_events_of_the_log() -> None:
    found = first_column("docs/reliability.md", "3. Finding out what is wrong")
    assert sorted(re.findall(r"`([\w-]+)`", found)) == sorted(events())
