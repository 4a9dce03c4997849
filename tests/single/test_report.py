"""gq-horovod report: runs from files of metrics, their tables and plots, and damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gq_horovod import cli
from gq_horovod.research import report

pytest.importorskip("rich")
pytest.importorskip("matplotlib")


def events(method: str = "none", seed: int = 0, **changes: Any) -> list[dict[str, Any]]:
    """A complete run of three evaluations, as the examples write it."""
    figures = {"auc": 0.70, "step_seconds": 0.2, "bytes": 8e6, "steps": 6, **changes}
    start = {"workload": "deeplight", "preset": "flights", "compression": method, "seed": seed}
    start |= {"bits": None, "power_rank": None, "transport": "horovod", "batch_size": 512}
    start |= {"ranks": 4, "hosts": 4, "parameters": 3_597_838, "metric": "auc"}
    start |= {"higher_is_better": True, "steps": figures["steps"], "synthetic": False}
    start |= {key: value for key, value in changes.items() if key in start}
    found: list[dict[str, Any]] = [{"event": "start", **start}]
    for step in range(1, figures["steps"] + 1):
        seconds = step * figures["step_seconds"]
        found.append({"event": "step", "step": step, "loss": 1 / step, "seconds": seconds})
        if step % 2 == 0:
            quality = figures["auc"] - 0.01 * (figures["steps"] - step)
            sent = step * figures["bytes"]
            evaluation = {"event": "eval", "step": step, "seconds": seconds, "bytes": sent}
            found.append({**evaluation, "train_losses": [], start["metric"]: quality})
    final = {"event": "final", "steps": figures["steps"], "seconds": seconds}
    final |= {"step_seconds": figures["step_seconds"], "bytes_per_step": figures["bytes"]}
    found.append({**final, start["metric"]: figures["auc"], "replicas_equal": True})
    return found


def write(path: Path, found: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(event) + "\n" for event in found))
    return path


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    runs, _ = report.collect(folder)
    (group,) = report.summarize(runs)
    return {row["method"]: row for row in group["rows"]}


# ------------------------------------------------------------------------------------------ tables


def test_methods_are_compared_with_none_and_fp16(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", events())
    write(tmp_path / "deep" / "b.jsonl", events("fp16", step_seconds=0.1, bytes=4e6, auc=0.69))
    write(tmp_path / "deep" / "c.jsonl", events("standard", step_seconds=0.05, bytes=2e6))
    rows = rows_of(tmp_path)
    assert list(rows) == ["none", "fp16", "standard"]
    standard = rows["standard"]
    assert standard["faster_than_none"] == pytest.approx(4)
    assert standard["faster_than_fp16"] == pytest.approx(2)
    assert standard["fewer_bytes"] == pytest.approx(4)
    assert rows["fp16"]["difference"] == pytest.approx(-0.01)
    assert rows["fp16"]["faster_than_fp16"] is None
    assert rows["none"]["difference"] is rows["none"]["faster_than_none"] is None


def test_seeds_are_averaged_and_other_settings_are_not(tmp_path: Path) -> None:
    for seed, auc in enumerate((0.70, 0.74)):
        write(tmp_path / f"{seed}.jsonl", events("standard", seed, auc=auc))
    write(tmp_path / "4.jsonl", events("standard", bits=4))
    write(tmp_path / "m.jsonl", events("standard", transport="mpi"))
    write(tmp_path / "p.jsonl", events("powersgd", power_rank=2))
    rows = rows_of(tmp_path)
    assert set(rows) == {"standard", "standard 4 bit", "standard mpi", "powersgd rank 2"}
    assert rows["standard"]["runs"] == 2
    assert rows["standard"]["quality"] == pytest.approx(0.72)
    assert rows["standard"]["spread"] == pytest.approx(0.04)


def test_runs_that_do_not_compare_are_apart(tmp_path: Path) -> None:
    for number, change in enumerate(
        (
            *({}, {"ranks": 2}, {"hosts": 1}, {"batch_size": 64}, {"preset": "criteo"}),
            {"synthetic": True},
        )
    ):
        write(tmp_path / f"{number}.jsonl", events(**change))
    runs, remarks = report.collect(tmp_path)
    assert len(report.summarize(runs)) == 6
    assert remarks == []


@pytest.mark.parametrize(
    ("workload", "method", "path", "seconds", "faster"),
    [
        ("deeplight", "standard 8 bit", "by host memory", 124.7, 3.55),
        ("deeplight", "qsgd", "P2P", 46.7, 0.87),
        ("transformer-xl", "standard 4 bit", "by host memory", 0.715, 1.92),
        ("wide-resnet", "exponential 8 bit", "P2P", 0.103, 0.94),
    ],
)
def test_the_authors_logs_stand_beside(
    tmp_path: Path, workload: str, method: str, path: str, seconds: float, faster: float
) -> None:
    write(tmp_path / "a.jsonl", events(workload=workload))
    (group,) = report.summarize(report.collect(tmp_path)[0])
    logs = group["authors_logs"]
    found = logs["rows"][method][path]
    assert found["seconds"] == seconds
    assert found["faster"] == pytest.approx(faster, abs=0.005)
    assert logs["rows"]["none"][path]["faster"] == 1
    assert "13d702f" in logs["source"]


def speed_ups(folder: Path) -> dict[str, dict[str, Any]]:
    (group,) = report.summarize(report.collect(folder)[0])
    return {row["method"]: row for row in group["speed_ups"]["rows"]}


def test_ratios_stand_beside_ratios(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", events())
    write(tmp_path / "b.jsonl", events("standard", step_seconds=0.05, bits=8))
    write(tmp_path / "c.jsonl", events("exponential")[:-1])
    write(tmp_path / "d.jsonl", events("standard", step_seconds=0.1, transport="mpi"))
    rows = speed_ups(tmp_path)
    assert rows["none"]["ours"] == rows["none"]["theirs"]["logs, P2P"] == 1
    # 8 bits are the paper's, whether they were asked for or are the default.
    assert rows["standard"]["ours"] == pytest.approx(4)
    assert rows["standard"]["theirs"]["paper, 4 GPUs"] == 3.58
    assert rows["standard"]["theirs"]["logs, P2P"] == pytest.approx(40.7 / 24.2)
    assert rows["standard mpi"]["ours"] == pytest.approx(2)
    assert rows["standard mpi"]["theirs"] == {}
    assert (rows["exponential"]["ours"], rows["exponential"]["state"]) == (None, "not ended")
    assert (rows["two-hop"]["ours"], rows["two-hop"]["state"]) == (None, "missing")
    assert (rows["L-GreCo"]["ours"], rows["L-GreCo"]["state"]) == (None, "theirs")
    assert rows["their best"]["theirs"] == {"paper, 64 nodes": 3.17, "poster, 64 nodes": 3.16}


def test_without_none_there_is_no_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "b.jsonl", events("standard"))
    rows = speed_ups(tmp_path)
    assert (rows["standard"]["ours"], rows["standard"]["state"]) == (None, "without none")
    assert cli.main(["report", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "no none" in text
    assert "Missing here: none, fp16," in text


@pytest.mark.parametrize(("ranks", "bits", "narrow"), [(4, 8, "missing"), (64, 10, "impossible")])
def test_what_so_many_ranks_can_add(tmp_path: Path, ranks: int, bits: int, narrow: str) -> None:
    """4 bits have no level left for 64 ranks, so nobody is asked for such a run."""
    write(tmp_path / "a.jsonl", events(ranks=ranks))
    (group,) = report.summarize(report.collect(tmp_path)[0])
    rows = {row["method"]: row for row in group["speed_ups"]["rows"]}
    assert rows["standard"]["bits"] == bits
    assert rows["standard 4 bit"]["state"] == narrow
    assert ("standard 4 bit" in group["speed_ups"]["missing"]) == (narrow == "missing")


@pytest.mark.parametrize("both", [True, False])
def test_8_bits_where_they_are_not_the_default(
    tmp_path: Path, both: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 64 ranks standard levels have 10 bits: 8 are another setting, the authors' one."""
    write(tmp_path / "a.jsonl", events(ranks=64))
    write(tmp_path / "b.jsonl", events("standard", ranks=64, bits=8, step_seconds=0.2 / 3))
    write(tmp_path / "c.jsonl", events("exponential", ranks=64, bits=8, step_seconds=0.05))
    if both:
        write(tmp_path / "d.jsonl", events("standard", ranks=64, step_seconds=0.1))
    (group,) = report.summarize(report.collect(tmp_path)[0])
    rows, missing = speed_ups(tmp_path), group["speed_ups"]["missing"]
    assert rows["standard 8 bit"]["ours"] == pytest.approx(3)
    assert rows["standard 8 bit"]["theirs"]["paper, 4 GPUs"] == 3.58
    assert rows["standard 8 bit"]["theirs"]["logs, P2P"] == pytest.approx(40.7 / 24.2)
    assert rows["standard"]["theirs"] == {}
    assert rows["standard"]["bits"] == 10
    assert rows["standard"]["ours"] == (pytest.approx(2) if both else None)
    assert ("standard" in missing) == (not both)
    # Exponential levels have 8 bits with any number of ranks.
    assert rows["exponential"]["ours"] == pytest.approx(4)
    assert rows["exponential"]["theirs"]["paper, 4 GPUs"] == 3.11
    assert "exponential 8 bit" not in rows
    assert cli.main(["report", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    (named,) = (line for line in text.splitlines() if line.startswith("Missing here: "))
    assert ("standard (10 bit)" in named) == (not both)
    lines = [line.split("│") for line in text.splitlines() if "│" in line]
    ours = {line[1].strip(): line[2].strip() for line in lines if "standard" in line[1]}
    (wide,) = (value for name, value in ours.items() if name.startswith("standard (10"))
    assert wide == ("2.00" if both else "missing")
    assert ours["standard 8 bit"] == "3.00"


@pytest.mark.parametrize(("ranks", "bits"), [(4, 8), (64, 10), (300, 16)])
def test_bits_that_are_the_default_anyway(tmp_path: Path, ranks: int, bits: int) -> None:
    write(tmp_path / "a.jsonl", events(ranks=ranks))
    write(tmp_path / "b.jsonl", events("standard", ranks=ranks, bits=bits, step_seconds=0.1))
    rows = speed_ups(tmp_path)
    assert rows["standard"]["ours"] == pytest.approx(2)
    assert f"standard {bits} bit" not in rows
    # Beside a run that left them out, each has its own row.
    write(tmp_path / "c.jsonl", events("standard", ranks=ranks, step_seconds=0.05))
    rows = speed_ups(tmp_path)
    assert rows["standard"]["ours"] == pytest.approx(4)
    assert rows[f"standard {bits} bit"]["ours"] == pytest.approx(2)


def test_the_paper_s_presets_stand_before_auto(tmp_path: Path) -> None:
    order = ["two-hop", "paper-standard", "paper-exponential", "auto", "another"]
    for method in order:
        write(tmp_path / f"{method}.jsonl", events(method))
    assert list(rows_of(tmp_path)) == order


def test_the_paper_s_quality_is_that_of_8_bits(tmp_path: Path) -> None:
    run = {"workload": "wide-resnet", "metric": "accuracy", "ranks": 64}
    write(tmp_path / "a.jsonl", events("standard", **run))
    write(tmp_path / "b.jsonl", events("standard", bits=8, **run))
    write(tmp_path / "c.jsonl", events("exponential", **run))
    write(tmp_path / "d.jsonl", events("qsgd", **run))
    found = {name: row["published_quality"] for name, row in rows_of(tmp_path).items()}
    assert found == {
        "standard": None,
        "standard 8 bit": 0.6929,
        "exponential": 0.6588,
        "qsgd": 0.6966,
    }


def test_what_is_missing_of_the_table_of_64_nodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> str:
        capsys.readouterr()
        assert cli.main(["report", str(tmp_path)]) == 0
        (line,) = [
            line for line in capsys.readouterr().out.splitlines() if "there is no run of" in line
        ] or [""]
        return line

    write(tmp_path / "a.jsonl", events())
    assert "deeplight (there are runs of a smaller model), transformer-xl, wide-resnet" in said()
    large = {"parameters": 607_959_381, "preset": "criteo"}
    write(tmp_path / "b.jsonl", events(**large))
    assert "deeplight (there are runs of it on 4), transformer-xl" in said()
    sizes = {"deeplight": 607_959_381, "transformer-xl": 191_950_298, "wide-resnet": 126_886_696}
    for workload, parameters in sizes.items():
        here = {"workload": workload, "parameters": parameters, "ranks": 64, "hosts": 64}
        assert workload in said()
        write(tmp_path / f"{workload}.jsonl", events(**here))
    assert said() == ""


def test_several_folders_are_one_report(tmp_path: Path) -> None:
    """And a file that two of them have counts once."""
    write(tmp_path / "one" / "a.jsonl", events())
    write(tmp_path / "two" / "b.jsonl", events("fp16"))
    places = [tmp_path / "one", tmp_path / "two", tmp_path / "one" / "a.jsonl", tmp_path]
    runs, _ = report.collect(*places)
    assert [run.setting for run in runs] == ["none", "fp16"]
    (tmp_path / "three").mkdir()
    with pytest.raises(ValueError, match=r"three: expected files that end in .jsonl"):
        report.collect(tmp_path / "one", tmp_path / "three")


def test_quality_on_synthetic_data_does_not_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"workload": "wide-resnet", "metric": "accuracy", "synthetic": True}
    write(tmp_path / "a.jsonl", events("powersgd", **run))
    assert rows_of(tmp_path)["powersgd"]["published_quality"] is None
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "speed compares" not in capsys.readouterr().out  # of another model
    write(tmp_path / "a.jsonl", events("powersgd", parameters=126_886_696, **run))
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "Synthetic data: speed compares with the paper's" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("workload", "metric", "method", "value"),
    [
        ("transformer-xl", "perplexity", "exponential", 24.59),
        ("transformer-xl", "perplexity", "standard", 33.16),
        ("wide-resnet", "accuracy", "powersgd", 0.6814),
    ],
)
def test_the_paper_s_figures_stand_beside(
    tmp_path: Path, workload: str, metric: str, method: str, value: float
) -> None:
    run = {"workload": workload, "metric": metric}
    write(tmp_path / "a.jsonl", events(method, **run))
    write(tmp_path / "b.jsonl", events("two-hop", **run))
    write(tmp_path / "c.jsonl", events(method, bits=4, **run))
    rows = rows_of(tmp_path)
    assert rows[method]["published_quality"] == value
    assert rows["two-hop"]["published_quality"] is None
    assert rows[f"{method} 4 bit"]["published_quality"] is None


def test_the_most_memory_of_a_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all runs of a setting the largest; runs of older versions have none."""
    for seed, peak in enumerate((1_250_000_000, 3_750_000_000)):
        run = events("standard", seed)
        run[-1]["peak_memory"] = peak
        write(tmp_path / f"{seed}.jsonl", run)
    write(tmp_path / "old.jsonl", events())
    rows = rows_of(tmp_path)
    assert (rows["standard"]["peak_memory"], rows["none"]["peak_memory"]) == (3_750_000_000, None)
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "3.75" in capsys.readouterr().out
    run[-1]["peak_memory"] = "much"
    with pytest.raises(report.DamagedRunError, match='a number "peak_memory"'):
        report.read(write(tmp_path / "bad.jsonl", run))


def test_tables_and_plots_are_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "none.jsonl", events())
    write(tmp_path / "fp16.jsonl", events("fp16", bytes=0.0, steps=4))
    write(tmp_path / "killed.jsonl", events("standard")[:-1])
    write(tmp_path / "lm.jsonl", events(workload="transformer-xl", metric="perplexity"))
    (tmp_path / "empty.jsonl").touch()
    assert cli.main(["report", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "deeplight (flights), 3,597,838 parameters" in text
    assert "The paper's model has 607,959,381 parameters" in text
    assert "4 × A100-SXM4-80GB of one host" in text
    for baseline in ("Horovod's float32 Allreduce", "a float32 tree over NCCL's send and receive"):
        assert baseline in text
    assert "Missing here: qsgd, powersgd, standard, standard 4 bit, exponential, two-hop." in text
    assert "23.88" in text
    assert "MB/step is empty where" in text
    assert "different numbers of steps" in text
    assert f"{tmp_path / 'killed.jsonl'}: the run has not ended, after step 6 of 6." in text
    assert f'left out: {tmp_path / "empty.jsonl"}:1: expected an event "start"' in text
    for workload in ("deeplight", "transformer-xl"):
        picture = (tmp_path / f"report-{workload}-flights-4.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
    # The killed run alone has no figures, and a curve.
    assert rows_of(tmp_path / "killed.jsonl")["standard"]["quality"] is None
    capsys.readouterr()
    assert (
        cli.main(["report", str(tmp_path / "killed.jsonl"), "--output", str(tmp_path / "o")]) == 0
    )
    assert "(a) runs that have not ended" in capsys.readouterr().out
    assert [path.suffix for path in (tmp_path / "o").iterdir()] == [".png"]


def test_plain_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.jsonl", events())
    assert cli.main(["report", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["groups"][0]["rows"][0]["quality"] == pytest.approx(0.7)
    assert printed["remarks"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


# -------------------------------------------------------------------------------------------- files


def test_a_resumed_run_is_one_run(tmp_path: Path) -> None:
    """Void is what was written after the checkpoint from which the second part goes on."""
    through = events("standard")
    resumed = [event for event in through[1:] if event.get("step", 6) > 3]
    file = [*through[:6], {**through[0], "resumed_from": 3}, *resumed]
    assert file[5]["step"] == 4
    run = report.read(write(tmp_path / "a.jsonl", file))
    assert run.evals == [event for event in through if event["event"] == "eval"]
    assert run.final == through[-1]
    # A run that starts anew leaves nothing of the one before.
    anew = report.read(write(tmp_path / "b.jsonl", [*through[:5], *through]))
    assert anew.evals == run.evals


def test_a_run_that_another_one_continues(tmp_path: Path) -> None:
    through = events("standard")
    other = {**events("fp16")[0], "resumed_from": 3}
    path = write(tmp_path / "a.jsonl", [*through[:6], other])
    with pytest.raises(
        report.DamagedRunError, match=r"a.jsonl:7: .* compression 'standard' as befo"
    ):
        report.read(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "a.jsonl:4: expected a JSON object in each line, got 'nonsense'"),
        ("[1]", "a.jsonl:4: expected an object with a text \"event\", got '[1]'"),
        ('{"event": 3}', 'expected an object with a text "event"'),
        ('{"event": "step", "step": 4}', 'expected a number "loss" in the event "step", got none'),
        ('{"event": "eval", "step": 4, "seconds": 1, "bytes": 0}', 'expected a number "auc"'),
        ('{"event": "final", "steps": true}', 'expected a number "steps" .* got True'),
        ('{"event": "start", "workload": "x"}', 'expected a number "ranks"'),
    ],
)
def test_damaged_files(
    tmp_path: Path, line: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", events())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], line + "\n", *lines[3:]]))
    with pytest.raises(report.DamagedRunError, match=reason.replace("[1]", r"\[1\]")):
        report.read(path)
    # One line on stderr, and the status of an error; beside a good run it is a remark.
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "expected a run, got none" in capsys.readouterr().err
    write(tmp_path / "b.jsonl", events())
    assert cli.main(["report", str(tmp_path), "--json"]) == 0
    (remark,) = json.loads(capsys.readouterr().out)["remarks"]
    assert remark.startswith(f"left out: {path}:4: expected")


def test_the_beginning_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", events()[1:])
    with pytest.raises(report.DamagedRunError, match=r'jsonl:1: expected an event "start" first'):
        report.read(path)


@given(st.integers(0, 10**4))
def test_a_file_that_is_cut_anywhere(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    """It is the run until then; without a complete first line it is none."""
    folder = tmp_path_factory.getbasetemp() / "cut"
    path = write(folder / "a.jsonl", events())
    text = path.read_text()
    length %= len(text)
    path.write_text(text[:length])
    whole = text[:length].count("\n")
    if whole == 0:
        with pytest.raises(report.DamagedRunError):
            report.read(path)
        return
    run = report.read(path)
    assert run.final is None
    assert run.cut == (text[length - 1] != "\n")
    assert len(run.evals) == sum(event["event"] == "eval" for event in events()[:whole])


def test_what_is_no_folder_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "expected a folder or a file of metrics" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "expected files that end in .jsonl, got none" in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_bytes(bytes(range(128, 256)) * 9 + b"\n")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "expected a JSON object in each line" in capsys.readouterr().err


def test_ranks_that_differ_at_the_end_are_named(tmp_path: Path) -> None:
    found = events()
    found[-1]["replicas_equal"] = False
    write(tmp_path / "a.jsonl", found)
    _, (remark,) = report.collect(tmp_path)
    assert remark.endswith("the ranks ended with different parameters.")
