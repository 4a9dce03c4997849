"""The command of the job of all methods, run on this machine: two ranks, a small model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checks import K8S, ROOT, kustomized

pytest.importorskip("horovod")
pytest.importorskip("sklearn")
LIMIT_SECONDS = 300
OVERLAY = "local-cpu/wide-resnet/all"
STEPS = 3


def run(folder: Path, methods: str) -> subprocess.CompletedProcess[str]:
    """Rehearse the job of local-cpu with two ranks."""
    kustomized(K8S / "overlays" / OVERLAY)  # skips without kubectl
    words = [sys.executable, "tools/rehearse.py", OVERLAY, f"--methods={methods}"]
    words += [f"--output={folder}", "--some=1", "--", f"--max-steps={STEPS}"]
    return subprocess.run(
        words,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
    )


def test_all_methods_of_a_job(tmp_path: Path) -> None:
    folder = tmp_path / "2-ranks"
    done = run(tmp_path, "none nonsense two-hop-4")
    assert done.returncode == 1, done.stdout
    assert "invalid choice: 'nonsense'" in done.stdout
    assert re.search(r"(?m)^each_method: nonsense failed: status \d+$", done.stdout)
    runs = {}
    for method in ("none", "two-hop-4"):
        lines = (folder / f"wide-resnet-{method}.jsonl").read_text().splitlines()
        runs[method] = [json.loads(line) for line in lines]
        final = runs[method][-1]
        assert (final["event"], final["steps"]) == ("final", STEPS)
        assert final["replicas_equal"]
        assert (folder / "checkpoints" / f"wide-resnet-{method}" / "latest").exists()
    assert (runs["two-hop-4"][0]["compression"], runs["two-hop-4"][0]["bits"]) == ("two-hop", 4)
    report = (folder / "report.txt").read_text()
    assert report in done.stdout
    assert re.search(r"(?m)^│ two-hop 4 bit +│ +1 │", report)

    # The launcher is started again: what has finished stays as it is.
    again = run(tmp_path, "none two-hop-4")
    assert again.returncode == 0, again.stdout
    for method in ("none", "two-hop-4"):
        assert f"each_method: {method}: has finished before" in again.stdout
        assert len((folder / f"wide-resnet-{method}.jsonl").read_text().splitlines()) == len(
            runs[method]
        )
