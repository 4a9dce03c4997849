"""Compiled device code on disk: found again, whole, by any number of processes, or done without."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from mpi_ops.kernels import code_cache
from mpi_ops.kernels.code_cache import VARIABLE, cached


class Compiler:
    """Counts what it compiles."""

    def __init__(self, code: bytes = b"code") -> None:
        self.code, self.runs = code, 0

    def __call__(self) -> bytes:
        self.runs += 1
        return self.code


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    own = tmp_path / "not" / "there yet"
    monkeypatch.setenv(VARIABLE, str(own))
    return own


def test_code_is_compiled_once(folder: Path) -> None:
    compiler = Compiler()
    assert [cached(["a", "b"], compiler) for _ in range(3)] == [b"code"] * 3
    assert compiler.runs == 1
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o077 == folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("other", [["ab"], ["a", "c"], ["b", "a"], ["a", "b", ""], ["a\0b"]])
def test_other_parts_are_other_code(other: list[str], folder: Path) -> None:
    cached(["a", "b"], Compiler())
    assert cached(other, Compiler(b"other")) == b"other"


@pytest.mark.parametrize("keep", [0, 10, 32, -1])
def test_a_file_that_is_not_whole_is_made_anew(keep: int, folder: Path) -> None:
    cached(["a"], Compiler())
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    again = Compiler()
    assert cached(["a"], again) == b"code"
    assert again.runs == 1
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_used_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file in its place stops root, too."""
    (tmp_path / "file").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "folder"))
    with caplog.at_level(logging.INFO):
        assert cached(["a"], Compiler()) == b"code"
    assert VARIABLE in caplog.text


def test_a_disk_that_is_full_leaves_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(code_cache.os, "replace", full)
    assert cached(["a"], Compiler()) == b"code"
    assert list(folder.iterdir()) == []


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/own")
    assert code_cache.folder() == Path("/own")
    monkeypatch.setenv(VARIABLE, "")
    assert code_cache.folder() is None
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert code_cache.folder() == Path("/cache/gq-horovod/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert code_cache.folder() == Path("/home/me/.cache/gq-horovod/kernels")


def test_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    compiler = Compiler()
    assert [cached(["a"], compiler) for _ in range(2)] == [b"code"] * 2
    assert compiler.runs == 2


def test_several_processes_at_once(folder: Path) -> None:
    """Each gets the whole code, whoever was first; nothing else is left."""
    code = (
        "from mpi_ops.kernels.code_cache import cached\n"
        "for number in range(200):\n"
        "    own = cached([str(number % 7)], lambda: bytes([number % 7]) * 100_000)\n"
        "    assert own == bytes([number % 7]) * 100_000\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait(60) for process in running] == [0] * 4
    assert len(list(folder.iterdir())) == 7
