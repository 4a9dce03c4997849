"""What the package says: nothing unless asked, once, and with the rank in every record."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gq_horovod import log
from gq_horovod.log import Census, Log, Rarely
from gq_horovod.path import agreement, pipeline
from gq_horovod.path.config import Config, ConfigMismatchError
from mpi_ops import codec
from mpi_ops.kernels.host import Buffer

ROOT = Path(__file__).resolve().parents[2]
TAG = f"[rank 3 of 8 on {socket.gethostname()}]"

SAY = """
from gq_horovod import frontend, log
log.identify(3, 8)
own = log.Log("gq_horovod.test")
own.say(logging.DEBUG, "small", "100 % of a debug record")
own.say(logging.INFO, "big", "an info record", bits=8, name="a 'b'", odd=frontend)
own.say(logging.WARNING, "bad", "a warning")
"""


def stderr(code: str, status: int = 0, **env: str) -> str:
    """What Python code prints to stderr in a fresh process."""
    inherited = {key: value for key, value in os.environ.items() if "GQ_HOROVOD" not in key}
    done = subprocess.run(
        [sys.executable, "-c", f"import logging\n{code}"],
        cwd=ROOT,
        env={**inherited, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stderr
    return done.stderr


@pytest.fixture(autouse=True)
def third_of_eight() -> Iterator[None]:
    log.identify(3, 8)
    yield
    log.identify(None, None)


def events(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, Any]]]:
    return [(record.event, record.fields) for record in caplog.records]  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------- who hears what


def test_nothing_is_said_unless_it_is_asked_for() -> None:
    assert stderr(SAY) == ""


def test_a_program_that_configures_logging_itself_sees_the_rank() -> None:
    lines = stderr("logging.basicConfig(level=logging.INFO)\n" + SAY).splitlines()
    assert lines == [
        f"INFO:gq_horovod.test:{TAG} an info record",
        f"WARNING:gq_horovod.test:{TAG} a warning",
    ]


@pytest.mark.parametrize(("level", "count"), [("debug", 3), ("INFO", 2), ("warning", 1), ("", 0)])
def test_the_variable_turns_it_on(level: str, count: int) -> None:
    lines = stderr(SAY, GQ_HOROVOD_LOG=level).splitlines()
    assert len(lines) == count
    assert all(f" gq_horovod.test: {TAG} " in line for line in lines)
    if level == "debug":
        assert lines[0].endswith("100 % of a debug record")


def test_nothing_is_seen_twice_and_the_root_logger_is_left_alone() -> None:
    code = "logging.basicConfig(level=logging.INFO, format='root %(message)s')\n" + SAY
    code += "log.configure()\nown.say(logging.INFO, 'last', 'after a second configure()')\n"
    code += "logging.getLogger('other').info('from the root logger')\n"
    lines = stderr(code, GQ_HOROVOD_LOG="info").splitlines()
    assert [line.rpartition("] ")[2] for line in lines] == [
        *("an info record", "a warning", "after a second configure()"),
        "root from the root logger",
    ]


def test_json_is_one_object_a_line() -> None:
    output = stderr(SAY, GQ_HOROVOD_LOG="info", GQ_HOROVOD_LOG_FORMAT="json")
    first, second = map(json.loads, output.splitlines())
    assert list(first) == [
        *("time", "level", "rank", "size", "host", "logger", "event", "fields", "message")
    ]
    assert first["time"].endswith("+00:00")
    own = {"level": "info", "rank": 3, "size": 8, "host": socket.gethostname()}
    own |= {"logger": "gq_horovod.test", "event": "big", "message": f"{TAG} an info record"}
    assert own.items() <= first.items()
    assert first["fields"].pop("odd").startswith("<module")  # what JSON cannot express, as text
    assert first["fields"] == {"bits": 8, "name": "a 'b'"}
    assert second["fields"] == {}


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("GQ_HOROVOD_LOG", "verbose", "'debug', 'info' or 'warning'"),
        ("GQ_HOROVOD_LOG_FORMAT", "yaml", "'text' or 'json'"),
    ],
)
def test_a_value_that_is_none_is_an_error(variable: str, value: str, expected: str) -> None:
    text = (
        f"gq_horovod: the environment variable {variable} must be {expected}, got {value!r}; unset "
        "it for the default."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        log.configure({variable: value})
    # Already where the module of a framework is imported, before anything is communicated.
    assert text in stderr("import gq_horovod.frontend", status=1, **{variable: value})
    # But not where somebody only asks what is wrong here.
    assert stderr("import gq_horovod.cli", **{variable: value}) == ""


def test_records_have_attributes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gq_horovod"):
        Log("gq_horovod.test").say(logging.INFO, "big", "text", bits=8)
        log.identify(None, None)
        Log("gq_horovod.test").say(logging.INFO, "big", "before the first gradient")
    known, unknown = caplog.records
    assert (known.rank, known.size, known.event, known.fields) == (3, 8, "big", {"bits": 8})  # type: ignore[attr-defined]
    assert known.host == socket.gethostname()  # type: ignore[attr-defined]
    assert (known.filename, known.funcName) == ("test_log.py", "test_records_have_attributes")
    assert (unknown.rank, unknown.size) == (None, None)  # type: ignore[attr-defined]
    assert unknown.getMessage() == f"[on {socket.gethostname()}] before the first gradient"


# --------------------------------------------------------------------------------------- the events


def test_rarely() -> None:
    rarely = Rarely()
    counts = [rarely.count() for _ in range(1500)]
    assert [count for count in counts if count is not None] == [1, 10, 100, 1000]


def first_step(census: Census, **options: Any) -> None:
    few = {"reason": "fewer than min_elements=4096"}
    census.see("weight", 5000, "float32", wire_bytes=5078.7, plain_bytes=20000, **options)
    census.see("bias", 10, "float32", wire_bytes=40, plain_bytes=40, **few, **options)
    census.see("scale", 7, "float32", wire_bytes=28, plain_bytes=28, **few, **options)
    index = {"reason": "the dtype int64", "wire_bytes": 40000, "plain_bytes": 40000}
    census.see("index", 5000, "int64", **index, **options)


SUMMARY = (
    f"{TAG} GlobalQSGD: the first step compressed 1 tensors with 5000 elements, and left 3 to "
    "Horovod: 2 have fewer than min_elements=4096 (17 elements, the first is 'bias'); 1 has the "
    "dtype int64 (5000 elements, the first is 'index'); a rank sends 0.0451 MB a step, and would "
    "send 0.0601 MB without compression"
)


def test_a_step_is_summed_up_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gq_horovod"):
        census = Census(Log("gq_horovod.test"), "GlobalQSGD")
        assert census.wanted
        first_step(census)
        assert not caplog.records
        first_step(census)
        first_step(census)
        assert caplog.messages == [SUMMARY]
    ((event, fields),) = events(caplog)
    assert event == "tensors"
    assert fields["reasons"] == {"fewer than min_elements=4096": 2, "the dtype int64": 1}
    assert (fields["left"], fields["left_elements"]) == (3, 5017)
    assert (fields["wire_bytes"], fields["plain_bytes"]) == (5078.7 + 40068, 60068)


def test_a_pattern_that_no_name_matches_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """As where Horovod knows no names of parameters, or one is misspelt."""
    with caplog.at_level(logging.WARNING, logger="gq_horovod"):
        patterns = ("*.bias", "weight*", "embeding*")
        census = Census(Log("gq_horovod.test"), "GlobalQSGD", patterns)
        assert census.wanted
        census.see("weight", 5000, "float32", expected=2)
        census.see("0", 5000, "float32", expected=2, label="body.bias")
        assert not census.wanted
    ((event, fields),) = events(caplog)
    assert (event, fields["patterns"], fields["first"]) == ("rules", ["embeding*"], "weight")
    assert "embeding*" in caplog.messages[0]


def test_bytes_that_are_not_known_are_not_summed_up(caplog: pytest.LogCaptureFixture) -> None:
    """As with levels="auto", which tries several ways."""
    with caplog.at_level(logging.INFO, logger="gq_horovod"):
        census = Census(Log("gq_horovod.test"), "GlobalQSGD")
        census.see("weight", 5000, "float32", plain_bytes=20000)
        census.see("bias", 5000, "float32", wire_bytes=5000, plain_bytes=20000, expected=2)
    assert "a rank sends" not in caplog.messages[0]
    ((_, fields),) = events(caplog)
    assert (fields["wire_bytes"], fields["plain_bytes"]) == (None, 40000)


def test_a_step_whose_tensors_are_known_ends_with_the_last(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="gq_horovod"):
        first_step(Census(Log("gq_horovod.test"), "GlobalQSGD"), expected=4)
    assert caplog.messages == [SUMMARY]


def test_how_long_steps_take_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 9.0, 18.0, 27.0, *(27 + 0.25 * step for step in range(1, 20))])
    monkeypatch.setattr("gq_horovod.log.time.perf_counter", lambda: next(clock))
    with caplog.at_level(logging.INFO, logger="gq_horovod.test"):
        census = Census(Log("gq_horovod.test"), "GlobalQSGD")
        for step in range(14):
            assert census.wanted
            for name in ("b", "a"):
                census.see(name, 5000, "float32")
            said = [fields for event, fields in events(caplog) if event == "steps"]
            assert len(said) == (step == 13)
        assert not census.wanted  # and costs nothing any more
    assert said[0]["seconds"] == said[0]["fastest"] == said[0]["slowest"] == 0.25
    assert "a step takes 250 ms, the median of 10 after the first 3" in caplog.text


def test_optimizers_with_tensors_of_one_name_are_told_apart(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(0.25 * step for step in range(20))  # asked once a step
    monkeypatch.setattr("gq_horovod.log.time.perf_counter", lambda: next(clock))
    with caplog.at_level(logging.INFO, logger="gq_horovod.test"):
        census = Census(Log("gq_horovod.test"), "GlobalQSGD")
        generator, critic = object(), object()
        for _ in range(14):
            for owner in (generator, critic):
                census.see("weight", 5000, "float32", owner=owner)
    assert [own["seconds"] for event, own in events(caplog) if event == "steps"] == [0.25]


def test_trials_are_not_timed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gq_horovod.test"):
        census = Census(Log("gq_horovod.test"), "GlobalQSGD", timed=False)
        for _ in range(20):
            census.see("weight", 5000, "float32")
        assert not census.wanted
    assert [event for event, _ in events(caplog)] == ["tensors"]


def test_names_that_never_come_again_are_not_timed_for_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="gq_horovod.test"):
        census = Census(Log("gq_horovod.test"), "GlobalQSGD")
        census.see("first", 5000, "float32", expected=1)
        for number in range(100):
            if census.wanted:
                census.see(f"tensor {number}", 5000, "float32")
        assert not census.wanted
    assert [event for event, _ in events(caplog)] == ["tensors"]


def test_each_tensor_is_named_for_debugging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="gq_horovod"):
        census = Census(Log("gq_horovod.test"), "GlobalQSGD")
        for _ in range(3):
            first_step(census)
        census.see("late", None, "float32")
        assert census.wanted
    assert caplog.messages[0] == (
        f"{TAG} GlobalQSGD: tensor 'weight', 5000 elements of float32: compressed, 5079 bytes sent "
        "by a rank"
    )
    assert caplog.messages[1].endswith(
        "'bias', 10 elements of float32: left to Horovod, because it has fewer than "
        "min_elements=4096, 40 bytes sent by a rank"
    )
    assert [event for event, _ in events(caplog)] == [*["tensor"] * 4, "tensors", "tensor"]
    assert caplog.messages[-1].endswith(
        "'late', an unknown number of elements of float32: compressed"
    )


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("norm", ["max", "l2"])
def test_values_that_are_not_finite_are_worth_a_warning(
    value: float, norm: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_not_finite", Rarely())
    plan = Config(norm=norm).plan(1)
    x = np.linspace(-1, 1, 1000, dtype=np.float32)
    with caplog.at_level(logging.WARNING, logger="gq_horovod"):
        pipeline.warn_unless_finite(codec.norms(Buffer.of(x), plan), "layer", 0)
        assert not caplog.records
        x[700] = value
        for step in range(10):
            pipeline.warn_unless_finite(codec.norms(Buffer.of(x), plan), "layer", step)
    assert events(caplog) == [
        ("not-finite", {"tensor": "layer", "step": 0, "count": 1}),
        ("not-finite", {"tensor": "layer", "step": 9, "count": 10}),
    ]
    assert caplog.messages[0].startswith(f"{TAG} tensor 'layer' has a norm that is NaN or Inf")


class Never:
    """An operation that does not complete."""

    def ready(self) -> bool:
        return False

    def wait(self) -> Any:
        raise AssertionError


def test_a_rank_that_waits_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "WARN_SECONDS", 0.05)
    monkeypatch.setattr(agreement, "TIMEOUT_SECONDS", 0.5)
    with (
        caplog.at_level(logging.WARNING, logger="gq_horovod"),
        pytest.raises(ConfigMismatchError, match="not every rank has reported"),
    ):
        agreement.wait(Never())
    # After 0.05, 0.1, 0.2 and 0.4 s, or later on a busy machine.
    assert 1 <= len(caplog.records) <= 4
    assert {event for event, _ in events(caplog)} == {"waiting"}
    assert "GlobalQSGD: has waited 0 s for ranks that have not reported" in caplog.messages[0]
