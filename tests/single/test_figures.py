"""tools/figures.py: README's figures are those of one run, and it says which have changed."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")

from rich.console import Console

from tools import figures


@pytest.fixture
def results() -> dict[str, Any]:
    """Two seeds of three methods."""
    row = {
        "auc": 0.73,
        "test_loss": 0.46,
        "bytes_per_step": 14.4e6,
        "step_seconds": 0.2,
        "step_seconds_mean": 0.21,
        "step_seconds_deviation": 0.02,
        "auc_of_seed": [0.73, 0.74],
        "test_loss_of_seed": [0.5, 0.4],
    }
    two_hop = {**row, "bytes_per_step": 3.6e6, "step_seconds": 0.1, "auc_of_seed": [0.7302, 0.7399]}
    four = {**row, "bytes_per_step": 1.8e6, "test_loss_of_seed": [0.505, 0.408]}
    return {"methods": {"none": row, "two-hop": two_hop, "two-hop-4": four}}


def test_the_documents_have_the_figures_of_one_run() -> None:
    for path in figures.DOCUMENTS:
        assert path.read_text() == figures.written(path, figures.kept()), path.name


def test_what_the_documents_get(results: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- figures: summary -->\nold\n<!-- figures: end -->\nb\n")
    text = figures.written(path, results)
    assert text.startswith("a\n<!-- figures: summary -->\n- **4.0 times fewer bytes** of a step")
    assert text.endswith("<!-- figures: end -->\nb\n")
    assert "**2.0 times shorter steps** at 1 Gbit/s: 200 ms become 100, and 200 with 4" in text
    assert "at most 0.0002 apart for a seed." in " ".join(text.split())
    lines = figures.table(results).splitlines()
    assert lines[2] == "| none | 200 ms | 210 ± 20 | | 14.40 | | 0.7300 |"
    # Of the seeds +1 and +2 per cent.
    assert "| 1.00× | 1.80 | +1.50 ± 0.50 % | 0.7300 |" in lines[4]


def test_what_has_changed_is_said(results: dict[str, Any]) -> None:
    now = copy.deepcopy(results)
    said = io.StringIO()
    figures.compare(Console(file=said, width=100), results, now)
    assert "no figure differs" in said.getvalue()
    now["methods"]["none"]["step_seconds"] *= 1.05  # within what a machine does to it
    now["methods"]["two-hop"]["bytes_per_step"] *= 1.02
    now["methods"]["qsgd"] = now["methods"]["none"]
    figures.compare(Console(file=said, width=100), results, now)
    listed = [line.split("│")[1:3] for line in said.getvalue().splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in listed] == [
        ["two-hop", "bytes_per_step"],
        ["qsgd", "all"],
    ]
