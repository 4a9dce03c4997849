"""What benchmarks/quality.py makes of its runs, and when it runs again what it has kept."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("horovod.torch")
pytest.importorskip("sklearn")

import quality

ROOT = Path(quality.__file__).resolve().parents[1]
SOURCES = [
    "benchmarks/quality.py",
    "benchmarks/workloads.py",
    "gq_horovod/path/pipeline.py",
    "gq_horovod/research/int_sgd.py",
    "mpi_ops/codec.py",
]


@pytest.mark.parametrize("source", SOURCES)
def test_what_a_run_depends_on_makes_it_another(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, read = quality._version(), Path.read_bytes
    assert quality._version() == before

    def changed(path: Path) -> bytes:
        return read(path) + b"#" * (path.resolve() == ROOT / source)

    monkeypatch.setattr(Path, "read_bytes", changed)
    assert quality._version() != before


def test_other_kernels_make_it_another(monkeypatch: pytest.MonkeyPatch) -> None:
    before = quality._version()
    monkeypatch.setattr(quality.host, "fingerprint", lambda: "of another library")
    assert quality._version() != before


def runs(*curves: list[float]) -> list[dict[str, Any]]:
    """Runs of 100 steps, of which a file has kept the losses."""
    kept = []
    for losses in curves:
        steps = [100 * (place + 1) // len(losses) for place in range(len(losses))]
        by_step = {str(step): loss for step, loss in zip(steps, losses, strict=True)}
        kept.append({"losses": by_step, "metric": 0.5, "sent": 10.0, "parameters": 1})
    return kept


@pytest.mark.parametrize(
    ("curves", "lowest_at", "stopped"),
    [
        ([[5, 4, 3, 2, 1], [6, 5, 4, 3, 2]], 100, False),
        ([[5, 4, 2, 3, 4], [5, 3, 2.5, 3, 5]], 60, True),  # it rises again
        ([[5, 4, 3, 2, 2.1], [5, 4, 3, 2, 1.8]], 100, True),  # as often up as down
        ([[5, 4, 3, 2, 1.9]], 100, False),  # of one seed nobody knows an error
    ],
)
def test_whether_a_loss_has_stopped_falling(
    curves: list[list[float]], lowest_at: int, stopped: bool
) -> None:
    end = quality.end_of(runs(*curves))
    assert (end["lowest_at"], end["stopped"]) == (lowest_at, stopped)


def test_the_last_fifth_is_paired() -> None:
    end = quality.end_of(runs([1.0, 1, 1, 1.0, 1.02], [9, 9, 9, 8.0, 8.0]))
    assert end["last_fifth"] == pytest.approx(1)  # 2 and 0 %
    assert end["error"] == pytest.approx(1)


def test_final_and_lowest_losses_beside_none() -> None:
    own = {
        "none": runs([2.0, 1.0, 4.0], [2.0, 4.0, 4.0]),
        "two-hop": runs([3, 1.1, 4], [2.2, 3, 5]),
    }
    plain, row = quality.compare({4: own})
    assert (plain["changes"], plain["lowest"]["changes"]) == ([0, 0], [0, 0])
    assert row["mean"] == 4.5
    assert row["changes"] == pytest.approx([0, 25])
    assert row["lowest"]["changes"] == pytest.approx([10, 10])
    assert row["lowest"]["error"] == pytest.approx(0)
    assert row["curve"] == pytest.approx({33: 2.6, 66: 2.05, 100: 4.5})


def test_a_model_whose_end_nobody_knows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["quality.py", "denoiser", "--to-the-end"])
    with pytest.raises(SystemExit):
        quality.main()
    error = capsys.readouterr().err
    assert "--to-the-end" in error
    assert "denoiser" in error
    assert "--steps" in error
