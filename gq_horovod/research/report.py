"""Tables and plots of training runs, beside what the paper published: `gq-horovod report RESULTS`.

A run is a file of JSON lines, as the examples write them with --metrics (examples/common/loop.py
describes the events). Runs of one workload, preset, number of ranks and hosts, and batch size are
compared with each other; runs that differ in the seed alone are averaged.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .beside import (
    authors_logs,
    how_many,
    missing_workloads,
    print_speed_ups,
    short,
    speed_ups,
)
from .published import PUBLISHED_PARAMETERS, PUBLISHED_QUALITY, SOURCE

# --------------------------------------------------------------------------------------------- runs


class DamagedRunError(ValueError):
    """A file is not a run's; the message says which line, and why."""


@dataclass
class Run:
    """What a file of metrics says."""

    path: Path
    start: dict[str, Any]
    evals: list[dict[str, Any]] = field(default_factory=list)
    final: dict[str, Any] | None = None  # None: the run has not ended, or was ended
    step: int = 0  # the last that was written
    cut: bool = False  # whether the last line is incomplete

    @property
    def metric(self) -> str:
        return str(self.start["metric"])

    @property
    def setting(self) -> str:
        """The method, with the options that are not its defaults."""
        start = self.start
        parts = [str(start["compression"])]
        parts += [f"{start['bits']} bit"] if start.get("bits") else []
        parts += [f"rank {start['power_rank']}"] if start.get("power_rank") else []
        parts += ["mpi"] if start.get("transport") == "mpi" else []
        return " ".join(parts)

    @property
    def group(self) -> tuple[Any, ...]:
        """What runs that are compared have in common."""
        return tuple(self.start[key] for key in GROUP)


GROUP = ("workload", "preset", "ranks", "hosts", "batch_size", "synthetic")

# What the events must have, beside "event" and the workload's metric. Numbers, but for the texts of
# "start"; true or false is no number.
_NUMBERS = {
    "start": ("ranks", "hosts", "batch_size", "parameters", "seed"),
    "step": ("step", "loss", "seconds"),
    "eval": ("step", "seconds", "bytes"),
    "final": ("steps", "step_seconds", "bytes_per_step", "seconds"),
}
_OPTIONAL = ("peak_memory",)  # of "final": runs of older versions lack it
_TEXTS = ("workload", "preset", "compression", "metric")


def read(path: Path) -> Run:
    """Return the run of a file; its last line may be incomplete, as that of a run that was killed.

    Raises DamagedRunError for what is not a run, OSError for a file that cannot be read.
    """
    run: Run | None = None
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                if run is not None:
                    run.cut = True
                break
            event = _event(path, number, line)
            kind = event["event"]
            if kind == "start":
                run = _started(path, number, event, run)
                continue
            if run is None:
                raise DamagedRunError(
                    f'{path}:{number}: expected an event "start" first, got {kind!r}; the '
                    "beginning of the file is missing."
                )
            if kind == "step":
                run.step = int(event["step"])
            elif kind == "eval":
                _require_numbers(path, number, event, (run.metric,))
                run.evals.append(event)
            elif kind == "final":
                also = [key for key in _OPTIONAL if key in event]
                _require_numbers(path, number, event, (run.metric, *also))
                run.final = event
    if run is None:
        raise DamagedRunError(f'{path}:1: expected an event "start", got no complete line.')
    return run


def _event(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError as error:
        raise DamagedRunError(
            f"{path}:{number}: expected a JSON object in each line, got {line[:40].strip()!r} "
            f"({error}); the file is damaged, or none of a run."
        ) from error
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise DamagedRunError(
            f'{path}:{number}: expected an object with a text "event", got '
            f"{line[:40].strip()!r}; the file is none of a run."
        )
    _require_numbers(path, number, event, _NUMBERS.get(event["event"], ()))
    return event


def _require_numbers(
    path: Path, number: int, event: dict[str, Any], keys: Sequence[str], kind: Any = (int, float)
) -> None:
    for key in keys:
        value = event.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            what = "a text" if kind is str else "a number"
            got = "none" if value is None else repr(value)
            raise DamagedRunError(
                f'{path}:{number}: expected {what} "{key}" in the event "{event["event"]}", got '
                f"{got}; train with the examples of this version."
            )


def _started(path: Path, number: int, event: dict[str, Any], before: Run | None) -> Run:
    """The run that a "start" event begins, or goes on with."""
    _require_numbers(path, number, event, _TEXTS, str)
    event.setdefault("synthetic", False)  # whether samples were made on the fly
    step = event.get("resumed_from", 0)
    if before is None or step == 0:
        return Run(path, event, step=step)
    run = Run(path, event, step=step)
    keys = (*GROUP, "seed", "compression", "bits", "power_rank", "transport")
    for key in keys:
        if before.start.get(key) != event.get(key):
            raise DamagedRunError(
                f"{path}:{number}: expected a run that is resumed to have {key} "
                f"{before.start.get(key)!r} as before, got {event.get(key)!r}; give each run a "
                "file of its own."
            )
    run.evals = [each for each in before.evals if each["step"] <= step]
    return run


def collect(*places: Path) -> tuple[list[Run], list[str]]:
    """Return (runs, what to say about files that were left out or are incomplete).

    Arguments:
        places: files of JSON lines, or folders; all files of a folder that end in .jsonl are read,
            those in folders below it too. A file that is named twice is read once.

    Raises ValueError if there is no run at all, or no file at one of the places.
    """
    paths: dict[Path, Path] = {}
    for place in places:
        if not place.exists():
            raise ValueError(f"{place}: expected a folder or a file of metrics, got nothing there.")
        found = sorted(place.rglob("*.jsonl")) if place.is_dir() else [place]
        if not found:
            raise ValueError(
                f"{place}: expected files that end in .jsonl, got none; train with --metrics."
            )
        for path in found:
            paths.setdefault(path.resolve(), path)
    runs, remarks = [], []
    for path in paths.values():
        try:
            run = read(path)
        except (DamagedRunError, OSError) as error:
            remarks.append(f"left out: {error}")
            continue
        runs.append(run)
        if run.final is None:
            of = f" of {run.start['steps']}" if run.start.get("steps") else ""
            state = "has been cut off in its last line" if run.cut else "has not ended"
            remarks.append(f"{path}: the run {state}, after step {run.step}{of}.")
        elif run.final.get("replicas_equal") is False:
            remarks.append(f"{path}: the ranks ended with different parameters.")
    if not runs:
        named = ", ".join(map(str, places))
        raise ValueError(f"{named}: expected a run, got none. " + " ".join(remarks))
    return runs, remarks


# ------------------------------------------------------------------------------------------- tables


def summarize(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return one group for each set of comparable runs, with a row for each setting.

    A row has means over the complete runs of a setting, which differ in their seeds; None where
    there is no complete run, or nothing to compare with. Speed-ups are ratios of such means.
    """
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return [_group(own) for _, own in sorted(groups.items(), key=lambda item: repr(item[0]))]


def _group(runs: list[Run]) -> dict[str, Any]:
    first = runs[0]
    workload = first.start["workload"]
    by_setting: dict[str, list[Run]] = {}
    for run in sorted(runs, key=order):
        by_setting.setdefault(run.setting, []).append(run)
    rows = {name: _row(name, own) for name, own in by_setting.items()}
    none = rows.get("none")
    for row in rows.values():
        other = none if row is not none else None
        row["difference"] = _minus(row["quality"], other["quality"]) if other else None
        row["fewer_bytes"] = _ratio(other, row, "bytes_per_step")
        for baseline in ("none", "fp16"):
            other = rows.get(baseline) if row is not rows.get(baseline) else None
            row[f"faster_than_{baseline}"] = _ratio(other, row, "step_seconds")
    _, published = PUBLISHED_QUALITY.get(workload, ("", {}))
    ranks = first.start["ranks"]
    for name, row in rows.items():
        method = name.partition(" ")[0]
        comparable = short(name, ranks) == short(f"{method} 8 bit", ranks)
        comparable &= not first.start["synthetic"]
        row["published_quality"] = published.get(method) if comparable else None
    return {
        **{key: first.start[key] for key in GROUP},
        "parameters": first.start["parameters"],
        "published_parameters": PUBLISHED_PARAMETERS.get(workload),
        "metric": first.metric,
        "higher_is_better": bool(first.start.get("higher_is_better", True)),
        "rows": list(rows.values()),
        "speed_ups": speed_ups(workload, ranks, list(rows.values()), _place),
        "authors_logs": authors_logs(workload),
    }


METHOD_ORDER = (
    *("none", "fp16", "qsgd", "qsgd-elias", "intsgd", "powersgd"),
    *("standard", "exponential", "two-hop", "paper-standard", "paper-exponential", "auto"),
)


def _place(setting: str) -> tuple[int, str]:
    """Where a setting stands in a table: with those of its method."""
    method = setting.partition(" ")[0]
    place = METHOD_ORDER.index(method) if method in METHOD_ORDER else len(METHOD_ORDER)
    return place, setting


def order(run: Run) -> tuple[Any, ...]:
    """Where a run stands among others: by method, settings, and seed."""
    return *_place(run.setting), run.start["seed"]


def _row(name: str, runs: list[Run]) -> dict[str, Any]:
    finals = [run.final for run in runs if run.final is not None]
    metric = runs[0].metric
    qualities = [final[metric] for final in finals]
    row: dict[str, Any] = {
        "method": name,
        "runs": len(finals),
        "incomplete": len(runs) - len(finals),
        "steps": max(run.final["steps"] if run.final else run.step for run in runs),
        "steps_of_runs": [final["steps"] for final in finals],
        "quality": _mean(qualities),
        "spread": max(qualities) - min(qualities) if len(qualities) > 1 else None,
    }
    for key in ("step_seconds", "bytes_per_step", "seconds"):
        row[key] = _mean([final[key] for final in finals])
    peaks = [final["peak_memory"] for final in finals if "peak_memory" in final]
    row["peak_memory"] = max(peaks, default=None)
    return row


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _ratio(one: dict[str, Any] | None, other: dict[str, Any], key: str) -> float | None:
    """How many times as large a figure of `one` is as that of `other`."""
    if one is None or not one[key] or not other[key]:
        return None
    if key == "bytes_per_step" and not (_counted(one) and _counted(other)):
        return None
    return float(one[key] / other[key])


# Bytes of a step below which they did not pass the interface: ranks of one host use its memory.
LEAST_BYTES = 1000


def _counted(row: dict[str, Any]) -> bool:
    return (row["bytes_per_step"] or 0) >= LEAST_BYTES


def print_tables(
    groups: Sequence[dict[str, Any]],
    remarks: Sequence[str],
    console: Any,
    table_of: Callable[[str, list[str], list[str]], Any],
) -> None:
    """Print a table for each group, what the paper has beside it, and the remarks."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for group in groups:
        ranks, hosts = how_many(group["ranks"], "rank"), how_many(group["hosts"], "host")
        title = f"{group['workload']} ({group['preset']}), {group['parameters']:,} parameters\n"
        title += f"{ranks} on {hosts}, {group['batch_size']} samples each"
        headings = ["runs", "steps", group["metric"], "vs none", "paper", "ms/step"]
        headings += ["× none", "× fp16", "MB/step", "less", "GB"]
        table = table_of(title, ["method"], headings)
        for row in group["rows"]:
            quality = cell(row["quality"], ".4f")
            quality += f" ±{row['spread'] / 2:.4f}" if row["spread"] is not None else ""
            table.add_row(
                row["method"],
                f"{row['runs']}" + (f" + {row['incomplete']} (a)" if row["incomplete"] else ""),
                str(row["steps"]),
                quality,
                cell(row["difference"], "+z.4f"),
                cell(row["published_quality"], "g"),
                cell(row["step_seconds"] and 1e3 * row["step_seconds"], ".1f"),
                cell(row["faster_than_none"], ".2f"),
                cell(row["faster_than_fp16"], ".2f"),
                f"{row['bytes_per_step'] / 1e6:.2f}" if _counted(row) else "",
                cell(row["fewer_bytes"], ".2f"),
                cell(row["peak_memory"] and row["peak_memory"] / 1e9, ".2f"),
            )
        console.print(table)
        for remark in _remarks_on(group):
            console.print(remark, highlight=False, soft_wrap=True)
        print_speed_ups(group, console, table_of)
    missing = missing_workloads(groups)
    for remark in (*remarks, *([missing] if missing else [])):
        console.print(remark, highlight=False, markup=False, soft_wrap=True)


def _remarks_on(group: dict[str, Any]) -> Iterator[str]:
    """What has to be known about a group's table."""
    better = "higher" if group["higher_is_better"] else "lower"
    text = f"{group['metric']}: {better} is better; of held-out samples, mean of the runs"
    yield text + (", ± half of their range." if any(r["spread"] for r in group["rows"]) else ".")
    if any(row["incomplete"] for row in group["rows"]):
        yield "(a) runs that have not ended; they count in nothing."
    if len({steps for row in group["rows"] for steps in row["steps_of_runs"]}) > 1:
        yield "The runs have different numbers of steps: their qualities do not compare."
    if any(row["runs"] and not _counted(row) for row in group["rows"]):
        yield (
            "MB/step is empty where the ranks sent nothing through the interface (--interface): "
            "on one host they use its memory."
        )
    if any(row["peak_memory"] for row in group["rows"]):
        yield "GB: most memory of its host that a rank had, Python and libraries included."
    parameters = group["published_parameters"]
    if group["synthetic"]:
        speed = "speed compares with the paper's, quality does not"
        same = parameters == group["parameters"]
        yield f"Synthetic data: {speed if same else 'quality does not compare'}."
    if any(row["published_quality"] is not None for row in group["rows"]):
        yield f"paper: {SOURCE}, full runs, 8 bits."
    if parameters and parameters != group["parameters"]:
        yield (
            f"The paper's model has {parameters:,} parameters; this one is another, on other data: "
            "its figures are no reproduction of the paper's."
        )


# -------------------------------------------------------------------------------------------- plots


def plot(runs: Sequence[Run], axes: Sequence[Any]) -> None:
    """Draw the metric of one group's runs against steps, seconds and bytes, on three axes.

    One line for each setting, of its first seed.
    """
    drawn: set[str] = set()
    any_counted = False
    for run in sorted(runs, key=order):
        if run.setting in drawn or not run.evals:
            continue
        look = f"C{len(drawn) % 10}"
        drawn.add(run.setting)
        values = [event[run.metric] for event in run.evals]
        bytes_sent = [event["bytes"] for event in run.evals]
        counted = bytes_sent[-1] >= LEAST_BYTES * run.evals[-1]["step"]
        any_counted |= counted
        places = [[event["step"] for event in run.evals], [event["seconds"] for event in run.evals]]
        if counted:
            places.append([sent / 1e6 for sent in bytes_sent])
        for axis, place in zip(axes, places, strict=False):
            axis.plot(place, values, ".-", color=look, label=run.setting, linewidth=1)
    for axis, what in zip(axes, ("steps", "seconds of training", "MB sent by a rank"), strict=True):
        axis.set_xlabel(what)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if not any_counted:
        axes[2].set_xlabel("MB sent by a rank (not counted: one host)")
    axes[0].set_ylabel(runs[0].metric)
    axes[0].legend(fontsize=7, frameon=False)
