"""When benchmarks/quality.py runs again what it has kept."""

from __future__ import annotations

from pathlib import Path

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
