"""Benchmarks from end to end, small; messages.py with as many ranks as it has by default.

Those whose steps and bytes depend on what else runs are in test_benchmarks_on_ranks.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 240

pytest.importorskip("sklearn")
pytest.importorskip("horovod")


def run(script: str, *arguments: str, output: Path) -> str:
    """Run a benchmark; returns what it printed."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *arguments, "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_quality(tmp_path: Path) -> None:
    methods = "none,standard,two-hop-4,qsgd-8,qsgd-4-elias,intsgd-8,powersgd-4,standard-4"
    options = ["--ranks", "2,8", "--seeds", "1", "--steps", "2", "--methods", methods]
    printed = run("quality.py", "convnet", *options, output=tmp_path)
    assert "standard-4 left out for 8 ranks" in printed  # their sum does not fit
    rows = json.loads((tmp_path / "quality-convnet.json").read_text())["rows"]
    assert (tmp_path / "quality-convnet.png").stat().st_size > 0
    assert [row["method"] for row in rows if row["ranks"] == 2] == methods.split(",")
    by_name = {(row["ranks"], row["method"]): row for row in rows}
    plain = by_name[2, "none"]
    assert plain["changes"] == [0]
    # Two steps of one seed differ by rounding alone, whatever the number of ranks is.
    assert by_name[8, "none"]["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    for (ranks, name), row in by_name.items():
        assert len(row["losses"]) == 1
        assert all(1 < loss < 3 for loss in row["losses"])
        # With many ranks each of them receives everybody's codes.
        gathers = name.startswith("qsgd") and ranks == 8 and "4" not in name
        assert (row["sent"] < by_name[ranks, "none"]["sent"]) == (name != "none" and not gathers)
    # A second call finds everything that has been run.
    assert run("quality.py", "convnet", *options, output=tmp_path) == printed


def test_quality_to_the_end(tmp_path: Path) -> None:
    options = ["--to-the-end", "--ranks", "2,3", "--seeds", "2", "--steps", "5"]
    printed = run("quality.py", "convnet", *options, output=tmp_path)
    document = json.loads((tmp_path / "quality-convnet-to-the-end.json").read_text())
    assert document["ends"]["2"]["stopped"] is False  # five steps are not the end
    assert printed.count("STILL FALLS") == 2
    assert [row["method"] for row in document["rows"]] == ["none", "two-hop", "two-hop-4"] * 2
    assert all(list(row["curve"]) == ["1", "2", "3", "4", "5"] for row in document["rows"])
    assert (tmp_path / "quality-convnet-to-the-end.png").stat().st_size > 0


def test_gradients(tmp_path: Path) -> None:
    methods = ["standard", "two-hop-4", "two-hop-6", "two-hop"]
    options = ["--seeds", "2", "--steps", "9", "--methods", ",".join(methods)]
    printed = run("gradients.py", "convnet", *options, output=tmp_path)
    rows = json.loads((tmp_path / "gradients.json").read_text())["convnet"]
    assert (tmp_path / "gradients.png").stat().st_size > 0
    assert [row["method"] for row in rows] == methods
    by_name = {row["method"]: row for row in rows}
    for name, row in by_name.items():
        assert name in printed
        assert list(row["errors"]) == ["early", "middle", "late"]
        assert all(len(own) == 2 for own in row["errors"].values())
    for moment in ("early", "middle", "late"):
        four, six, eight = (by_name[name]["errors"][moment] for name in methods[1:])
        for seed in range(2):
            assert four[seed] > 10 * six[seed] > 20 * eight[seed] > 0
    shares = [by_name[name]["share"] for name in methods[1:]]
    assert shares == sorted(shares)


def test_memory(tmp_path: Path) -> None:
    options = ["--model", "3x4000000", "--methods", "none;standard"]
    printed = run("memory.py", *options, output=tmp_path)
    assert "gradients of 0.048 GB" in printed
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    # Codes are a quarter of the gradients; what Python loads meanwhile is in it, too.
    assert 0 < rows["standard"]["taken"] < 2 * 48_000_000
    assert rows["none"]["beyond none"] == 0
    assert (tmp_path / "memory.png").stat().st_size > 0


def test_messages(tmp_path: Path) -> None:
    """The model's messages and bytes are those of 32 ranks."""
    printed = run("messages.py", "--ranks", "32", "--rounds", "2", output=tmp_path)
    document = json.loads((tmp_path / "messages.json").read_text())
    assert document["ranks"] == 32
    for row in document["rows"]:
        counted, predicted = row["counted"], row["predicted"]
        assert row["exchange"] in printed
        assert len(counted["of ranks"]) == 32
        if row["exchange"].startswith("messages"):
            assert counted["messages"] == predicted["messages"]
            # Short pieces: codes go twice, and shares, which have norms besides, once. The model
            # takes both for equally large.
            off = 0.003 if "20,000" in row["exchange"] else 0
            assert counted["bytes"] == pytest.approx(predicted["bytes"], rel=off, abs=0)
        else:  # a write for each, or two where a socket was full; a header of 22 bytes
            assert predicted["messages"] <= counted["messages"] < 1.2 * predicted["messages"]
            headers = 22 * predicted["messages"]
            assert counted["bytes"] == pytest.approx(predicted["bytes"] + headers, rel=0.01)
    for row in document["timed"]:
        assert row["messages"][0] == 2 * (row["ranks"] - 1)
        assert row["messages"][1] < row["messages"][0]
        assert min(row["straight"] + row["forwarded"]) > 0
        assert f"{row['messages'][1]}" in printed
