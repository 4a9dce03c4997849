"""The command gq-horovod: units, tables, errors, calibration files."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from test_report import events, write

from gq_horovod import cli
from gq_horovod.advisor import calibrate
from gq_horovod.advisor.calibrate import CalibrationError
from gq_horovod.advisor.model import METHODS, Cluster, Kernels
from gq_horovod.cli import units

ROOT = Path(__file__).resolve().parents[2]
ADVISE = ["advise", "--params", "607959381", "--step-compute", "120ms"]
NETWORK = ["--workers", "64", "--bandwidth", "1Gbit"]
MEASURED = Cluster(
    ranks=8,
    bandwidth=9.3e8,
    latency=3e-5,
    allreduce_efficiency=((2.0**20, 0.7), (2.0**25, 0.4)),
    kernels=Kernels(cast=1e9),
)


# -------------------------------------------------------------------------------------------- units


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1Gbit", 1e9),
        ("1gbit", 1e9),
        ("200 Mbit/s", 2e8),
        ("25Gbps", 2.5e10),
        ("0.2Gbit/s", 2e8),
        ("100kbit", 1e5),
        ("10Gb/s", 1e10),
        ("1 GBit", 1e9),
        ("1e3Mbit", 1e9),
        ("2.5E9bit", 2.5e9),
    ],
)
def test_bandwidths(text: str, value: float) -> None:
    assert units.bandwidth(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("120ms", 0.12), ("1.5s", 1.5), ("50 us", 5e-5), ("5e1us", 5e-5), ("1e-3s", 1e-3), ("0s", 0)],
)
def test_durations(text: str, value: float) -> None:
    assert units.duration(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("608M", 608_000_000), ("1_000", 1000), ("1.5k", 1500), ("6e8", 600_000_000)),
        *(("6.08E+8", 608_000_000), ("15e-1k", 1500), ("199999999999", 199_999_999_999)),
    ],
)
def test_counts(text: str, value: int) -> None:
    assert units.count(text) == value


@pytest.mark.parametrize(
    "text", ["1", "1GB", "1GB/s", "0Gbit", "-1Gbit", "fast", "", "1Gbitten", "1e9", "eGbit"]
)
def test_what_is_no_bandwidth(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"rate in bits such as 1Gbit.*got"):
        units.bandwidth(text)


@pytest.mark.parametrize("text", ["120", "0.12", "-1s", "1h", "", "ms", "1e3", "1_0s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"with its unit such as 120ms.*got"):
        units.duration(text)


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "0.12", "6e-8", "many", "", "1e", "0x10"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"positive whole number.*got"):
        units.count(text)


# What is no number, or one that no cluster has; each with every unit of an option.
NO_NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "-1",
    "+-1",
    "1e400",
    "1e99999999999999999999",
    "9" * 400,
    "1,,2",
]
UNITS = {
    "--params": ["", "k", "b"],
    "--workers": ["", "M"],
    "--ranks-per-host": [""],
    "--overlap": ["", "%"],
    "--step-compute": ["", "us", "min"],
    "--latency": ["", "s"],
    "--bandwidth": ["", "bit", "Tbit"],
    "--inner-bandwidth": ["", "bit", "Tbit"],
}


@pytest.mark.parametrize("option", UNITS)
@pytest.mark.parametrize("number", NO_NUMBERS, ids=lambda number: number[:8])
def test_every_option_refuses_what_is_no_number_of_it(
    option: str, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By one line of argparse that names the option and a value that works; no traceback."""
    assert set(UNITS) == numeric_options("advise")
    for unit in UNITS[option]:
        with pytest.raises(SystemExit) as raised:
            cli.main([*ADVISE, *NETWORK, f"{option}={number}{unit}"])
        assert raised.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.match(rf"gq-horovod advise: error: argument {option}: expected .* such as", error)
        assert "got" in error


def numeric_options(command: str) -> set[str]:
    """The options of a command that take neither a path nor nothing."""
    (commands,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    actions = commands.choices[command]._actions
    return {a.option_strings[0] for a in actions if a.type not in (None, Path)}


def test_options_of_numbers_of_other_commands_are_the_same() -> None:
    others = {"calibrate", "doctor", "env", "report"}
    assert not set().union(*map(numeric_options, others))
    # With names before their numbers.
    assert numeric_options("simulate") - set(UNITS) == {"--compute", "--input", "--gpus-per-node"}


@pytest.mark.parametrize(
    "options",
    [
        {"--params": "1"},
        {"--params": "200b"},
        {"--params": "6e8,1,4096"},
        {"--workers": "2"},
        {"--workers": "16777216"},
        {"--workers": "16777216", "--ranks-per-host": "16777216"},
        {"--bandwidth": "1bit"},
        {"--bandwidth": "1000Tbit"},
        {"--ranks-per-host": "8", "--inner-bandwidth": "1bit"},
        {"--ranks-per-host": "8", "--inner-bandwidth": "1000Tbit"},
        {"--latency": "0s"},
        {"--latency": "1e9s"},
        {"--step-compute": "0s"},
        {"--step-compute": "1e9s"},
        {"--overlap": "0"},
        {"--overlap": "1"},
    ],
    ids=str,
)
def test_the_first_and_last_values_of_every_option_give_finite_times(
    options: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli.advise.model, "break_even", lambda *arguments: 0.0)  # slow, and no time
    arguments = [f"{option}={value}" for option, value in options.items()]
    assert cli.main([*ADVISE, *NETWORK, *arguments, "--json"]) == 0
    output = capsys.readouterr().out
    assert not re.search("NaN|Infinity", output)
    assert all(row["step_seconds"] > 0 for row in json.loads(output)["methods"])


# ------------------------------------------------------------------------------------------- advise


def test_advise_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ADVISE, *NETWORK]) == 0
    output = capsys.readouterr().out
    for method in METHODS:
        assert method.name in output
    assert "Recommended: compression=GlobalQSGD   (" in output
    assert "Assumptions:" in output
    assert "defaults, not measured" in output


def test_advise_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ADVISE, *NETWORK, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in result["methods"]}
    assert rows["none"]["speedup"] == 1
    assert rows["none"]["bytes_per_rank"] == pytest.approx(2 * 63 / 64 * 4 * 607_959_381)
    assert set(result["left_out"]) == {"standard 4 bit", "standard 4 bit, mpi"}
    candidates = [row for row in rows.values() if row["candidate"]]
    fastest = min(row["step_seconds"] for row in candidates)
    limit = cli.advise.WORTHWHILE * fastest
    near = [row["method"] for row in candidates if row["step_seconds"] < limit]
    assert result["recommended"]["method"] == ("two-hop" if "two-hop" in near else near[0])


def test_the_default_comes_before_others_that_are_as_fast(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four ranks: standard levels are a little faster, and have more error."""
    four = ["advise", "--params", "13.4M", "--workers", "4", "--step-compute", "50ms"]
    assert cli.main([*four, "--bandwidth", "1Gbit", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row["step_seconds"] for row in result["methods"]}
    assert rows["standard"] < rows["two-hop"] < cli.advise.WORTHWHILE * rows["standard"]
    assert result["recommended"]["method"] == "two-hop"


def test_hosts_with_several_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    """Fast inside: codes of the hosts' means. Slow inside: those of all ranks."""
    several = [*ADVISE, *NETWORK, "--ranks-per-host", "8"]
    for inner, within, written in (("2400Gbit", "hierarchical", True), ("1Gbit", "flat", False)):
        assert cli.main([*several, "--inner-bandwidth", inner, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["recommended"]["method"].endswith(f", {within}")
        assert f"hierarchical={written}" in result["recommended"]["argument"]
        rows = {row["method"]: row for row in result["methods"]}
        assert rows["standard, hierarchical"]["inner_bytes_per_rank"] == pytest.approx(
            2 * 7 / 8 * 4 * 607_959_381
        )
        assert rows["standard, flat"]["inner_bytes_per_rank"] == 0
        assert any("HOROVOD_DYNAMIC_PROCESS_SETS=1" in own for own in result["assumptions"])
    # 60 ranks are not as many on each host, and flat is all that there is.
    uneven = [*ADVISE, *NETWORK, "--ranks-per-host", "8", "--workers", "60"]
    assert cli.main([*uneven, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in result["methods"]][2] == "standard"
    assert "hierarchical" not in result["recommended"]["argument"]


def test_nothing_is_recommended_where_nothing_pays(capsys: pytest.CaptureFixture[str]) -> None:
    """A small model behind a long computation."""
    command = ["advise", "--params", "100k", "--step-compute", "1s", "--workers", "4"]
    assert cli.main([*command, "--bandwidth", "100Gbit"]) == 0
    assert "Recommended: compression=hvd.Compression.none" in capsys.readouterr().out


def test_a_list_of_tensors(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["advise", "--params", "1M,4096,100", "--step-compute", "1ms", *NETWORK, "--json"]
    assert cli.main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["parameters"] == 1_004_196


def test_plots(tmp_path: Path) -> None:
    path = tmp_path / "advice.png"
    assert cli.main([*ADVISE, *NETWORK, "--json", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (ADVISE, "expected --workers or --calibration, got neither"),
        ([*ADVISE, "--workers", "4"], "expected --bandwidth or --calibration, got neither"),
        ([*ADVISE, "--workers", "1", "--bandwidth", "1Gbit"], "ranks must be an integer of at"),
        ([*ADVISE, *NETWORK, "--ranks-per-host", "65"], "ranks_per_host must be at most ranks"),
    ],
)
def test_errors_of_one_line(
    command: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("gq-horovod advise: error: ")
    assert text in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        (["--bandwidth", "1GB"], "argument --bandwidth: expected a positive rate in bits"),
        (["--overlap", "2"], "argument --overlap: expected a share of the compute time"),
        (["--step-compute", "5"], "argument --step-compute: expected a duration with its unit"),
        (["--params", "1M,x"], "argument --params: expected a positive whole number"),
    ],
)
def test_errors_of_arguments(
    extra: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main([*ADVISE, *NETWORK, *extra])
    assert raised.value.code == 2
    assert text in capsys.readouterr().err


# -------------------------------------------------------------------------------- calibration files


def test_calibration_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    calibrate.save(MEASURED, path)
    assert calibrate.load(path) == MEASURED


def test_advise_takes_a_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "calibration.json"
    calibrate.save(MEASURED, path)
    assert cli.main([*ADVISE, "--calibration", str(path), "--workers", "16", "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)
    assert advice["cluster"] == json.loads(json.dumps({**asdict(MEASURED), "ranks": 16}))
    assert (
        "70% (1 MiB), 40% (32 MiB) of the bandwidth in Allreduce, 60%" in advice["assumptions"][0]
    )


def corrupt(**changes: object) -> str:
    document = {
        "format": calibrate.FORMAT,
        "version": calibrate.VERSION,
        "cluster": asdict(MEASURED),
    }
    document.update(changes)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is not JSON"),
        (corrupt()[:-30], "it is not JSON"),
        ("[]", 'expected an object with "format"'),
        ('{"alpha": 1}', 'expected an object with "format"'),
        (corrupt(version=99), f"expected version {calibrate.VERSION}, got 99"),
        (corrupt(cluster=None), "expected an object 'cluster', got None"),
        (corrupt(cluster={"ranks": 4}), "'cluster' lacks"),
        (corrupt(cluster={**asdict(MEASURED), "bandwidth": "1Gbit"}), "bandwidth must be"),
        (corrupt(cluster={**asdict(MEASURED), "kernels": {}}), "'kernels' lacks"),
        (corrupt(cluster={**asdict(MEASURED), "gather_efficiency": [1]}), "gather_efficiency must"),
        (corrupt(cluster={**asdict(MEASURED), "ranks": 1.5}), "ranks must be an integer"),
        (corrupt(cluster={**asdict(MEASURED), "ranks": 10**400}), "ranks must be at most"),
        (corrupt(cluster={**asdict(MEASURED), "latency": 10**400}), "latency must be a number"),
        (corrupt(cluster={**asdict(MEASURED), "latency": float("nan")}), "latency must be a num"),
        (corrupt(cluster={**asdict(MEASURED), "bandwidth": 10**400}), "bandwidth must be"),
    ],
)
def test_corrupt_calibrations(
    text: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(CalibrationError):
        calibrate.load(path)
    assert cli.main([*ADVISE, "--calibration", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"calibration file {path}: " in error
    assert why in error
    assert "write a new one with `mpirun ... gq-horovod calibrate`" in error


def test_binary_and_missing_calibrations(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    with pytest.raises(CalibrationError, match="cannot be read"):
        calibrate.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="not JSON"):
        calibrate.load(path)


# ----------------------------------------------------------------------------------------- simulate


def test_simulate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "simulation.png"
    command = ["simulate", "--workers", "64,4096", "--bandwidth", "1Gbit,25Gbit"]
    assert cli.main([*command, "--plot", str(path)]) == 0
    output = capsys.readouterr().out
    assert "DeepLight" in output
    assert "3.17x" in output
    assert path.read_bytes().startswith(b"\x89PNG")
    assert cli.main([*command, "--compute", "DeepLight=1s", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 3 * 2 * 2
    assert {row["step_compute_seconds"] for row in rows if row["workload"] == "DeepLight"} == {1.0}


def test_simulate_refuses_unknown_workloads(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["simulate", "--compute", "BERT=1s"])
    assert "expected NAME=DURATION with a name of DeepLight" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- processes

PRINTING = [
    *([*ADVISE, *NETWORK], [*ADVISE, *NETWORK, "--json"]),
    *(["simulate"], ["simulate", "--json"], ["report", "RESULTS"], ["report", "RESULTS", "--json"]),
    # Each way of printing once: both commands import every framework.
    *(["env", "--json"], ["doctor"]),
    *(["--help"], ["--version"], ["advise", "--help"]),
]
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
UNBUFFERED = {**BUFFERED, "PYTHONUNBUFFERED": "1"}


def write_to(output: int, command: list[str], variables: dict[str, str], results: Path) -> Any:
    write(results / "run.jsonl", events())
    arguments = [str(results) if word == "RESULTS" else word for word in command]
    return subprocess.run(
        [sys.executable, "-m", "gq_horovod", *arguments],
        cwd=ROOT,
        env=variables,
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("command", PRINTING, ids=" ".join)
def test_a_reader_that_has_gone_is_no_error(command: list[str], tmp_path: Path) -> None:
    """As in `gq-horovod advise ... | head -1`: nothing is said, and the status is SIGPIPE's."""
    slow = command[0] in ("doctor", "env")  # they import every framework
    for variables in (BUFFERED,) if slow else (BUFFERED, UNBUFFERED):
        reader, writer = os.pipe()
        os.close(reader)
        try:
            done = write_to(writer, command, variables, tmp_path)
        finally:
            os.close(writer)
        assert done.stderr == ""
        # argparse keeps what happens to its own texts to itself.
        own = {"--help", "--version"} & set(command)
        assert done.returncode == 141 or (own and done.returncode == 0)


@pytest.mark.parametrize("command", PRINTING[:2], ids=" ".join)
def test_output_that_cannot_be_written_is_an_error_of_one_line(
    command: list[str], tmp_path: Path
) -> None:
    for variables in (BUFFERED, UNBUFFERED):
        with open("/dev/full", "w") as full:
            done = write_to(full.fileno(), command, variables, tmp_path)
        assert done.returncode == 2
        assert re.fullmatch("gq-horovod.*: error: .*No space left on device\n", done.stderr)


def test_without_an_output_there_is_no_error() -> None:
    command = shlex.join([sys.executable, "-m", "gq_horovod", *ADVISE, *NETWORK])
    done = subprocess.run(["sh", "-c", f"{command} >&-"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_module_runs_without_heavy_imports() -> None:
    """Also without matplotlib and rich, where neither a plot nor a table is asked for."""
    code = (
        "import sys\n"
        "from gq_horovod import cli\n"
        f"assert cli.main({[*ADVISE, *NETWORK, '--json']!r}) == 0\n"
        "heavy = ('torch', 'tensorflow', 'horovod', 'mpi4py', 'matplotlib', 'rich', 'cupy')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gq_horovod", *ADVISE, *NETWORK],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Recommended:" in done.stdout


def test_missing_rich_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main([*ADVISE, *NETWORK]) == 2
    assert "expected rich for the table" in capsys.readouterr().err


def test_calibrate_with_one_rank_says_how_to_start_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gq_horovod", "calibrate"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "expected at least 2 ranks, got 1; start it with the mpirun" in done.stderr
