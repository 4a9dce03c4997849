"""The figures in README.md and docs/benchmarks.md that come from one run of the demo.

    python tools/figures.py              # 7 methods, 3 seeds: some 9 minutes on two idle cores
    python tools/figures.py --keep       # and put what was measured into the documents
    python tools/figures.py --results results/figures/results.json --keep      # of an earlier run
    python tools/figures.py --check      # no run: are the documents those of docs/demo.json?

Says which figures differ from those that the documents have: bytes by more than 1 %, AUCs by more
than 0.0005, times by more than a tenth. What is between `<!-- figures: NAME -->` and
`<!-- figures: end -->` in the documents is written by this program, and by nobody else.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
KEPT = ROOT / "docs" / "demo.json"
PLOT = ROOT / "docs" / "demo.png"
SEEDS, HOSTS = 3, 2  # README says how many hosts there are, each with a core
NAMES = {
    "none": "none",
    "fp16": "fp16",
    "powersgd": "PowerSGD, rank 4",
    "qsgd": "QSGD, 8 bit",
    "standard": "Global-QSGD, standard, 8 bit",
    "two-hop": "**Global-QSGD, the default**: two-hop, 8 bit",
    "two-hop-4": "Global-QSGD, two-hop, 4 bit",
}
DEFAULT, FEWEST_BITS = "two-hop", "two-hop-4"
_PART = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- figures: end -->)", re.DOTALL)

Results = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--keep", action="store_true", help="write the documents' figures anew")
    parser.add_argument("--check", action="store_true", help="compare the documents with demo.json")
    parser.add_argument("--results", type=Path, help="results.json of a run of the demo")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "figures")
    arguments = parser.parse_args()
    if arguments.check:
        wrong = [path.name for path in DOCUMENTS if path.read_text() != written(path, kept())]
        for name in wrong:
            print(f"{name}: figures are not those of {KEPT.name}; run tools/figures.py --keep.")
        return 1 if wrong else 0
    found = arguments.results or run(arguments.output)
    results = json.loads(found.read_text())
    if results["ranks"] != HOSTS or not results["network"].startswith(f"{HOSTS} hosts"):
        parser.error(f"{found}: expected {HOSTS} hosts, got {results['network']}")
    if KEPT.exists():
        compare(Console(), kept(), results)
    if arguments.keep:
        shutil.copy(found, KEPT)
        shutil.copy(found.with_name("loss.png"), PLOT)
        for path in DOCUMENTS:
            path.write_text(written(path, results))
    return 0


def kept() -> Results:
    """What was measured when the documents were written."""
    results: Results = json.loads(KEPT.read_text())
    return results


def run(output: Path) -> Path:
    """Run the demo; the path of its results. Ends the program where it fails."""
    demo = ROOT / "examples" / "deeplight" / "demo.py"
    command = [sys.executable, str(demo), "--seeds", str(SEEDS), "--ranks", str(HOSTS)]
    done = subprocess.run([*command, "--output", str(output), "--methods", *NAMES], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return output / "results.json"


# ---------------------------------------------------------------------------------- the documents


def written(path: Path, results: Results) -> str:
    """A document with the figures of these results."""
    parts = {"summary": summary, "table": table}
    return _PART.sub(lambda part: f"{part[1]}{parts[part[2]](results)}{part[3]}", path.read_text())


def summary(results: Results) -> str:
    """What README begins with, as lines of a list."""
    rows = results["methods"]
    none, own, four = (rows[method] for method in ("none", DEFAULT, FEWEST_BITS))

    def times(row: dict[str, Any], key: str) -> str:
        return f"{none[key] / row[key]:.1f}"

    far = max(abs(a - b) for a, b in zip(own["auc_of_seed"], none["auc_of_seed"], strict=True))
    items = [
        f"**{times(own, 'bytes_per_step')} times fewer bytes** of a step, by the network "
        f"interfaces' counters, and {times(four, 'bytes_per_step')} times with 4 bits.",
        f"**{times(own, 'step_seconds')} times shorter steps** at 1 Gbit/s: {ms(none)} ms become "
        f"{ms(own)}, and {ms(four)} with 4 bits.",
        f"**The same result**: AUC {own['auc']:.4f} with and {none['auc']:.4f} without "
        f"compression, at most {far:.4f} apart for a seed.",
    ]
    look = {"width": 100, "initial_indent": "- ", "subsequent_indent": "  "}
    return "".join(f"{textwrap.fill(item, **look)}\n" for item in items)


def table(results: Results) -> str:
    """All methods, as a table in Markdown."""
    rows = results["methods"]
    none = rows["none"]
    lines = [
        "| | median step | mean ± s.d. | speed-up | MB sent per step | change of test loss | AUC |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, row in rows.items():
        mean, spread = 1e3 * row["step_seconds_mean"], 1e3 * row["step_seconds_deviation"]
        cells = [
            NAMES[method],
            f"{ms(row)} ms",
            f"{mean:.0f} ± {spread:.0f}",
            "" if row is none else f"{none['step_seconds'] / row['step_seconds']:.2f}×",
            f"{row['bytes_per_step'] / 1e6:.2f}",
            "" if row is none else difference(row["test_loss_of_seed"], none["test_loss_of_seed"]),
            f"{row['auc']:.4f}",
        ]
        lines.append("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|")
    return "\n".join([*lines, ""])


def ms(row: dict[str, Any]) -> str:
    """The median of the steps in milliseconds."""
    return f"{1e3 * row['step_seconds']:.0f}"


def difference(own: list[float], other: list[float]) -> str:
    """Of the seeds in pairs, in per cent, with the standard error of the mean."""
    each = [100 * (a / b - 1) for a, b in zip(own, other, strict=True)]
    mean = round(statistics.fmean(each), 2) + 0.0  # not -0
    if len(each) < 2:
        return f"{mean:+.2f} %"
    return f"{mean:+.2f} ± {statistics.stdev(each) / math.sqrt(len(each)):.2f} %"


# ------------------------------------------------------------------------------------- comparison


def compare(console: Console, before: Results, now: Results) -> None:
    """Print which figures differ."""
    listed = Table(title="figures that differ from the documents'")
    for heading in ("method", "figure", "in the documents", "now"):
        listed.add_column(heading)
    for method, row in now["methods"].items():
        old = before["methods"].get(method)
        if old is None:
            listed.add_row(method, "all", "", "new")
            continue
        for key, far in (
            ("bytes_per_step", 0.01 * old["bytes_per_step"]),
            ("auc", 0.0005),
            ("step_seconds", 0.1 * old["step_seconds"]),
        ):
            if abs(row[key] - old[key]) > far:
                listed.add_row(method, key, f"{old[key]:.6g}", f"{row[key]:.6g}")
    if listed.row_count:
        console.print(listed)
    else:
        console.print("no figure differs from the documents'")


if __name__ == "__main__":
    sys.exit(main())
