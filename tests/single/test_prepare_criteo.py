"""What prepare_criteo.py makes of a file: the same samples, once, whatever stopped it meanwhile."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("pandas")

import criteo  # noqa: E402
import prepare_criteo  # noqa: E402
from test_criteo import everything, line, reader, write  # noqa: E402

LINES = [line(number) for number in range(1000)]


def prepare(source: Path, folder: Path, *options: str) -> int:
    return prepare_criteo.main([str(source), f"--output={folder}", *options])


def samples(path: Path, keep: Any, count: int) -> tuple[bytes, bytes]:
    fields, clicked = reader(path).samples(keep, count)
    return bytes(fields), bytes(clicked)


def held_out(number: int) -> bool:
    return number % criteo.HELD_OUT_EVERY == 0


@pytest.mark.parametrize("name", ["train.txt", "train.txt.gz"])
@pytest.mark.parametrize("options", [["--samples=300", "--eval-rows=40"], ["--preset=whole"]])
def test_samples_are_those_of_the_file_itself(
    tmp_path: Path, name: str, options: list[str]
) -> None:
    source = write(tmp_path / name, LINES)
    content = source.read_bytes()
    assert prepare(source, tmp_path / "folder", *options) == 0
    train, test = prepare_criteo.files_of(tmp_path / "folder")
    counts = (300, 40) if "--samples=300" in options else (900, 100)
    assert [len(path.read_bytes().splitlines()) for path in (train, test)] == list(counts)
    assert samples(train, everything, 10**6) == samples(
        source, lambda number: not held_out(number), counts[0]
    )
    assert samples(test, everything, 10**6) == samples(source, held_out, counts[1])
    assert source.read_bytes() == content
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        *("prepare.lock", "prepared.json", "test.txt", "train.txt")
    ]


def test_the_paper_s_sample_is_a_preset(tmp_path: Path) -> None:
    """32,768 lines, which are repeated by train.py and not on the disk."""
    lines = [line(number % 5000) for number in range(100_000)]
    source = write(tmp_path / "train.txt", lines)
    assert prepare(source, tmp_path / "folder", "--eval-rows=5000") == 0
    train, test = prepare_criteo.files_of(tmp_path / "folder")
    assert len(train.read_bytes().splitlines()) == 32_768
    assert len(test.read_bytes().splitlines()) == 5000
    # Nothing is read beyond what is wanted.
    counted = json.loads((tmp_path / "folder" / "prepared.json").read_text())["progress"]
    assert counted["line"] == 5000 * 10 - 9
    assert prepare_criteo.PRESETS["paper"][0] == 32_768


class Stopped(BaseException):
    """In the place of a signal that ends the process."""


@pytest.mark.parametrize("name", ["train.txt", "train.txt.gz"])
@pytest.mark.parametrize("stop", [1, 99, 100, 101, 555, 999])
def test_one_that_was_stopped_goes_on(
    tmp_path: Path,
    name: str,
    stop: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever line it had reached; with the same bytes in the end, and no line read twice."""
    monkeypatch.setattr(prepare_criteo, "EVERY", 100)
    lines = [*LINES[:500], b"nonsense", *LINES[500:-1]]
    source = write(tmp_path / name, lines)
    assert prepare(source, tmp_path / "through", "--preset=whole") == 0
    complaint = criteo.complaint
    read: list[bytes] = []

    def counting(text: bytes) -> str | None:
        read.append(text)
        if len(read) == stop:
            raise Stopped
        return complaint(text)

    monkeypatch.setattr(criteo, "complaint", counting)
    folder = tmp_path / "stopped"
    with pytest.raises(Stopped):
        prepare(source, folder, "--preset=whole")
    with pytest.raises(ValueError, match=r"expected a folder with prepared\.json"):
        prepare_criteo.files_of(folder)
    capsys.readouterr()
    assert prepare(source, folder, "--preset=whole") == 0
    saved = (stop - 1) // 100 * 100
    assert ("goes on after line" in capsys.readouterr().out) == (saved > 0)
    assert len(read) == stop + len(lines) - saved
    for path in (tmp_path / "through").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_one_that_was_stopped_between_its_last_steps(tmp_path: Path) -> None:
    """A file has its name already, but the folder is not ready."""
    source = write(tmp_path / "train.txt", LINES)
    folder = tmp_path / "folder"
    assert prepare(source, folder, "--preset=whole") == 0
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "prepared.json").rename(folder / "progress.json")
    (folder / "test.txt").rename(folder / "test.txt.partial")
    assert prepare(source, folder, "--preset=whole") == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected


def test_one_that_is_ready_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "train.txt", LINES)
    assert prepare(source, tmp_path / "folder", "--preset=whole") == 0
    (tmp_path / "folder" / "train.txt").write_text("as it was")
    assert prepare(source, tmp_path / "folder", "--preset=whole") == 0
    assert "is ready: 900 lines" in capsys.readouterr().out
    assert (tmp_path / "folder" / "train.txt").read_text() == "as it was"


@pytest.mark.parametrize("how", ["options", "file", "shorter"])
def test_a_folder_of_something_else(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "train.txt", LINES)
    folder = tmp_path / "folder"
    assert prepare(source, folder, "--preset=whole") == 0
    capsys.readouterr()
    if how == "options":
        assert prepare(source, folder, "--samples=10", "--eval-rows=2") == 2
        assert "expected samples 0 as in prepared.json, got 10" in capsys.readouterr().err
    elif how == "file":
        write(source, LINES[:-1])
        assert prepare(source, folder, "--preset=whole") == 2
        assert "expected source_bytes" in capsys.readouterr().err
    else:
        (folder / "prepared.json").rename(folder / "progress.json")
        (folder / "train.txt").write_text("cut")
        assert prepare(source, folder, "--preset=whole") == 2
        assert "bytes or more, as progress.json has it, got 3" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train.txt", "test.txt"])
def test_lines_of_another_run_among_its_own(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a Pod that was to end, and has not yet: the folder does not become ready."""
    source = write(tmp_path / "train.txt", LINES)
    folder = tmp_path / "folder"
    complaint = criteo.complaint

    def disturbed(text: bytes) -> str | None:
        if text == LINES[500]:
            with (folder / f"{name}.partial").open("ab") as file:
                file.write(LINES[0] + b"\n")
        return complaint(text)

    monkeypatch.setattr(criteo, "complaint", disturbed)
    assert prepare(source, folder, "--preset=whole") == 2
    assert f"{name}.partial: expected the " in capsys.readouterr().err
    assert not (folder / "prepared.json").exists()
    assert not (folder / "train.txt").exists()


def test_one_run_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "train.txt", LINES)
    folder = tmp_path / "folder"
    folder.mkdir()
    with (folder / "prepare.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert prepare(source, folder, "--preset=whole") == 2
        assert "expected no other prepare_criteo.py that writes there" in capsys.readouterr().err
        assert [path.name for path in folder.iterdir()] == ["prepare.lock"]
    assert prepare(source, folder, "--preset=whole") == 0


def test_a_signal_that_a_first_process_would_ignore(tmp_path: Path) -> None:
    """It ends by a handler: without one the kernel drops it where the program is process 1."""
    os.mkfifo(tmp_path / "train.txt")  # nobody writes: it waits
    folder = tmp_path / "folder"
    process = subprocess.Popen(
        [
            *(sys.executable, "examples/deeplight/prepare_criteo.py", str(tmp_path / "train.txt")),
            f"--output={folder}",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 60
        while not (folder / "prepare.lock").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        process.terminate()
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by signal 15; started again, it goes on" in said


def columns(count: int) -> list[bytes]:
    return [b"\t".join(text.split(b"\t")[:count]) for text in LINES]


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (columns(39), "1: expected 40 fields separated by tabs, got 39; expected Criteo's train"),
        ([text + b"\t1" for text in LINES], "1: expected 40 fields separated by tabs, got 41"),
        ([text.replace(b"\t", b",") for text in LINES], "1: expected 40 fields"),
        ([*LINES[:50], *columns(39)], "records cannot be read, and 100 may be left out"),
        (LINES[:1], "expected some lines for training and some held-out ones, got 0 and 1"),
        ([], "got 0 and 0"),
    ],
    ids=["without labels", "a column more", "commas", "later", "short", "empty"],
)
def test_files_that_are_refused(
    tmp_path: Path, lines: list[bytes], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "train.txt", lines)
    assert prepare(source, tmp_path / "folder", "--preset=whole") == 2
    error = capsys.readouterr().err
    assert why in error
    assert error.startswith(f"prepare_criteo: error: {source}")
    assert not (tmp_path / "folder" / "prepared.json").exists()


def test_too_few_lines_for_the_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "train.txt", LINES)
    assert prepare(source, tmp_path / "folder") == 2
    assert "expected 32768 lines for training and some held-out ones, got 900 and 100" in (
        capsys.readouterr().err
    )


def test_malformed_lines_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [*LINES]
    lines[3], lines[10] = b"1\t2", lines[10].replace(b"\t", b" ")
    source = write(tmp_path / "train.txt", lines)
    assert prepare(source, tmp_path / "folder", "--preset=whole") == 0
    assert "899 for training, 99 held out, 2 malformed" in capsys.readouterr().out
    train, test = prepare_criteo.files_of(tmp_path / "folder")
    assert train.read_bytes().splitlines() == [
        text for number, text in enumerate(lines) if not held_out(number) and number != 3
    ]
    assert test.read_bytes().splitlines() == [
        text for number, text in enumerate(lines) if held_out(number) and number != 10
    ]


@pytest.mark.parametrize("name", ["train.txt", "train.txt.gz"])
def test_progress_is_printed(
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(prepare_criteo, "EVERY", 250)
    source = write(tmp_path / name, LINES)
    assert prepare(source, tmp_path / "folder", "--preset=whole") == 0
    said = [text for text in capsys.readouterr().out.splitlines() if "lines read" in text]
    assert [text.split()[2] for text in said] == ["250", "500", "750", "1,000", "1,000"]
    assert "100% of the file: 900 for training, 100 held out, 0 malformed" in said[-1]


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in (tmp_path / "nothing", tmp_path):
        assert prepare(source, tmp_path / "folder") == 2
        assert f"{source}: expected a file of Criteo's" in capsys.readouterr().err


def test_as_a_program(tmp_path: Path) -> None:
    """As in the image, where nothing but the standard library, numpy and pandas is needed."""
    source = write(tmp_path / "train.txt.gz", LINES)
    command = [sys.executable, "examples/deeplight/prepare_criteo.py", str(source)]
    done = subprocess.run(
        [*command, f"--output={tmp_path / 'folder'}", "--preset=whole"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "is ready" in done.stdout


def test_training_reads_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same samples, in the same order, and the held-out lines of the folder."""
    torch = pytest.importorskip("torch")
    train = pytest.importorskip("train", reason="needs Horovod", exc_type=ImportError)
    for name, value in (("rank", 0), ("size", 1)):
        monkeypatch.setattr(train.hvd, name, lambda value=value: value)
    monkeypatch.setattr(train.hvd, "allreduce", lambda tensor, op, name: tensor)
    # Of held-out lines, too, every second is a click.
    source = write(tmp_path / "train.txt", [line(number + number // 10) for number in range(1000)])
    assert prepare(source, tmp_path / "folder", "--samples=256", "--eval-rows=50") == 0

    def data(path: Path) -> Any:
        options = ["--preset=criteo", f"--data={path}", "--samples=256", "--repeat=2"]
        options += ["--eval-rows=50", "--batch-size=32", "--shrink=100000"]
        return train.clicks(train.loop.parse(train.DeepLight, options))

    one, other = data(source), data(tmp_path / "folder")
    for mine, its in zip(one.held_out, other.held_out, strict=True):
        assert torch.equal(mine, its)
    batches = list(zip(one.batches(0, 0), other.batches(0, 0), strict=True))
    assert len(batches) == 2 * 8
    for (fields, clicked), (its_fields, its_clicked) in batches:
        assert torch.equal(fields, its_fields)
        assert torch.equal(clicked, its_clicked)
    with pytest.raises(ValueError, match=r"expected a folder with prepared\.json"):
        data(tmp_path)
    assert one.sizes == other.sizes
