"""How many times as fast as no compression: the runs of a folder, beside the authors' figures.

Ratios stand beside ratios. The two baselines differ, and so does the hardware: seconds do not
compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..path.config import Config
from .published import (
    AUTHORS_BASELINE,
    AUTHORS_HARDWARE,
    AUTHORS_LOGS,
    AUTHORS_SOURCE,
    OUR_BASELINE,
    PUBLISHED_HOSTS,
    PUBLISHED_PARAMETERS,
    PUBLISHED_SPEED_UPS,
    SOURCE,
)

# What a whole comparison has: the methods that the manifests run, and those of the authors' logs.
EXPECTED = (
    *("none", "fp16", "qsgd", "powersgd", "standard", "standard 4 bit", "exponential", "two-hop"),
)


def how_many(number: int, what: str) -> str:
    """A number with its noun: "1 rank", "4 ranks"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def authors_logs(workload: str) -> dict[str, Any] | None:
    """What the authors' logs say of a workload, with ratios to their own baseline."""
    if workload not in AUTHORS_LOGS:
        return None
    what, columns = AUTHORS_LOGS[workload]
    rows = {
        method: {
            path: {"seconds": times[method], "faster": times["none"] / times[method]}
            for path, times in columns.items()
            if method in times
        }
        for times in columns.values()
        for method in times
    }
    return {"what": what, "hardware": AUTHORS_HARDWARE, "source": AUTHORS_SOURCE, "rows": rows}


def published(workload: str, ranks: int) -> dict[str, dict[str, float]]:
    """Where -> setting -> times as fast as the authors' baseline, by the paper and by the logs."""
    columns = {
        where: {short(method, ranks): factor for method, factor in factors.items()}
        for where, factors in PUBLISHED_SPEED_UPS.get(workload, {}).items()
    }
    logs = authors_logs(workload)
    for method, row in (logs["rows"] if logs else {}).items():
        for path, figures in row.items():
            own = columns.setdefault(f"logs, {path}", {})
            own[short(method, ranks)] = figures["faster"]
    return columns


def short(setting: str, ranks: int) -> str:
    """A setting without bits that so many ranks have anyway."""
    method, _, options = setting.partition(" ")
    return method if options == f"{_default_bits(method, ranks) or 8} bit" else setting


def speed_ups(
    workload: str, ranks: int, rows: Sequence[dict[str, Any]], order: Callable[[str], Any]
) -> dict[str, Any]:
    """The rows of a group's runs, what is missing among them, and the authors' factors.

    Arguments:
        workload, ranks: of the group.
        rows: of `report.summarize`.
        order: of settings.
    """
    columns = published(workload, ranks)
    own = {row["method"]: row for row in rows}
    for setting in list(own):  # the same with bits and without them: two rows, as there are two
        if short(setting, ranks) not in own:
            own[short(setting, ranks)] = own.pop(setting)
    theirs = [method for factors in columns.values() for method in factors]
    found = []
    for setting in sorted({*own, *EXPECTED, *theirs}, key=order):
        row = own.get(setting)
        state = "run" if row and row["runs"] else _why_none(setting, ranks, row)
        baseline = "none" in own and own["none"]["runs"] > 0
        if state == "run" and not baseline:
            state = "without none"
        ours = row["faster_than_none"] if row else None
        found.append(
            {
                "method": setting,
                "bits": _default_bits(setting, ranks),
                "state": state,
                "ours": 1.0 if state == "run" and setting == "none" else ours,
                "theirs": {
                    where: own_[setting] for where, own_ in columns.items() if setting in own_
                },
            }
        )
    return {
        "baseline": OUR_BASELINE,
        "their_baseline": AUTHORS_BASELINE,
        "columns": list(columns),
        "rows": found,
        "missing": [row["method"] for row in found if row["state"] in ("missing", "not ended")],
    }


def _why_none(setting: str, ranks: int, row: dict[str, Any] | None) -> str:
    """Why there is no time of a setting."""
    if row is not None:
        return "not ended"
    if setting not in EXPECTED:
        return "theirs"
    levels, _, options = setting.partition(" ")
    if levels in Config.LEVELS and options:
        try:
            Config(levels=levels, bits=int(options.removesuffix(" bit"))).plan(ranks)
        except ValueError:
            return "impossible"
    return "missing"


def _default_bits(setting: str, ranks: int) -> int | None:
    """Bits of a setting that leaves them to the number of ranks; None for all others."""
    if setting not in ("standard", "exponential", "two-hop"):
        return None
    return Config(levels=setting).plan(ranks).bits


CELLS = {"without none": "no none", "theirs": ""}


def print_speed_ups(
    group: dict[str, Any],
    console: Any,
    table_of: Callable[[str, list[str], list[str]], Any],
) -> None:
    """The table of a group, and what has to be known about it."""
    found = group["speed_ups"]
    if not found["columns"]:
        return
    here = f"{how_many(group['ranks'], 'rank')}, {how_many(group['hosts'], 'host')}"
    title = f"{group['workload']} ({group['preset']}): times as fast as float32"
    table = table_of(title, ["method"], [f"here: {here}", *found["columns"]])
    for row in found["rows"]:
        ours = CELLS.get(row["state"], row["state"])
        if row["ours"] is not None:
            ours = f"{row['ours']:.2f}"
        theirs = (row["theirs"].get(where) for where in found["columns"])
        table.add_row(
            _label(row),
            ours,
            *("" if factor is None else f"{factor:.2f}" for factor in theirs),
        )
    console.print(table)
    for line in _remarks(group, found):
        console.print(line, highlight=False, soft_wrap=True)


def _label(row: dict[str, Any]) -> str:
    """A method, and the bits that so many ranks make of its 8."""
    wide = row["bits"] not in (None, 8)
    return f"{row['method']} ({row['bits']} bit)" if wide else str(row["method"])


def _remarks(group: dict[str, Any], found: dict[str, Any]) -> Iterable[str]:
    yield f"here: 1.00 is {found['baseline']}. Elsewhere: {found['their_baseline']}."
    if group["authors_logs"]:
        yield f"logs: {AUTHORS_SOURCE}, {AUTHORS_HARDWARE}."
    if group["workload"] in PUBLISHED_SPEED_UPS:
        yield f"paper, poster: {SOURCE}; for 64 nodes they name no method."
    standard = next(row for row in found["rows"] if row["method"] == "standard")
    if standard["bits"] != 8:
        yield (
            f"standard: {group['ranks']} ranks need {standard['bits']} bits, so that sums do not "
            "overflow; the authors' codes have 8."
        )
    if found["missing"]:
        missing = (_label(row) for row in found["rows"] if row["method"] in found["missing"])
        yield f"Missing here: {', '.join(missing)}."


def missing_workloads(groups: Sequence[dict[str, Any]]) -> str | None:
    """What of the paper's size on 64 hosts no run of a folder is; None if nothing is missing."""
    missing = []
    for workload, parameters in PUBLISHED_PARAMETERS.items():
        sizes = [group for group in groups if group["workload"] == workload]
        own = [group for group in sizes if group["parameters"] == parameters]
        if any(group["hosts"] == PUBLISHED_HOSTS for group in own):
            continue
        hosts = sorted({group["hosts"] for group in own})
        what = f" (there are runs of it on {', '.join(map(str, hosts))})" if own else ""
        if sizes and not own:
            what = " (there are runs of a smaller model)"
        missing.append(workload + what)
    if not missing:
        return None
    return (
        f"At the paper's size on {PUBLISHED_HOSTS} hosts there is no run of: {', '.join(missing)}."
    )
