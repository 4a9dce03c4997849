"""tools/prose.py finds what is too long, and README and the guides have nothing of that kind."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("prose", ROOT / "tools" / "prose.py")
assert _spec
assert _spec.loader
prose = importlib.util.module_from_spec(_spec)
sys.modules["prose"] = prose
_spec.loader.exec_module(prose)

LONG = " ".join(["w"] * 31) + "."
WIDE = "w" * 60 + " " + "w" * 60


@pytest.mark.parametrize("name", [str(path.relative_to(ROOT)) for path in prose.DOCUMENTS])
def test_documents_stay_readable(name: str) -> None:
    found = prose.check((ROOT / name).read_text())
    assert not found, "\n".join(f"{name}:{each.line}: {each.what}: {each.text}" for each in found)


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    assert len(text.splitlines()) <= 120


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (LONG, ["31 words"]),
        (LONG.replace("w w", "w\nw", 5), ["31 words"]),
        (f"First. W{LONG[1:]} Last.", ["31 words"]),
        (f"- an item\n- {LONG}", ["31 words"]),
        (f"- an item\n\n    {LONG}", ["31 words"]),
        (f"> {WIDE}", ["123 characters"]),
        (LONG.replace(" w", " w. W", 1), []),
        (LONG.replace("w w", "[w](a.md) e.g. 1.5", 2), ["33 words"]),
        (f"    {LONG}", []),
        (f"```\n{LONG} {WIDE}\n```", []),
        (f"| {LONG} | {WIDE} |", []),
        (f"# {LONG}", []),
        (f"- an item\n\n# title\n\n    {LONG} {WIDE}", []),
    ],
)
def test_what_is_found(text: str, what: list[str]) -> None:
    assert [each.what for each in prose.check(text)] == what


def test_wrapping_keeps_what_a_document_says() -> None:
    text = f"- {'a ' * 60}- b 1. c # d {'e ' * 60}\n\n```\n{WIDE}\n```\n\n| {WIDE} |\n"
    wrapped = prose.wrapped(text)
    assert wrapped.split() == text.split()
    assert prose.wrapped(wrapped) == wrapped
    assert f"```\n{WIDE}\n```\n\n| {WIDE} |\n" in wrapped
    starts = [line.split()[0] for line in wrapped.splitlines() if line.strip()]
    assert starts.count("-") == 1
    assert not {"1.", "#"} & set(starts)
    assert max(map(len, wrapped.splitlines()[:4])) <= prose.MOST_CHARACTERS
