"""What several commands share: arguments, tables and plots."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .units import share

DEFAULT_OVERLAP = 0.5  # as `model.step_time` has it


def add_common(sub: argparse.ArgumentParser) -> None:
    """The arguments that several commands share."""
    sub.add_argument("--calibration", type=Path, help="file that `gq-horovod calibrate` wrote")
    sub.add_argument(
        "--overlap",
        type=share,
        default=DEFAULT_OVERLAP,
        help="share of the compute time behind which communication can hide "
        f"(default {DEFAULT_OVERLAP})",
    )
    sub.add_argument("--plot", type=Path, help="also draw a plot to this file")
    sub.add_argument("--json", action="store_true", help="print plain data instead of a table")


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of as many cells each as aligned text, which needs nothing that may be missing."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def rich() -> tuple[Any, Callable[[str, list[str], list[str]], Any]]:
    """A console, and a maker of tables from title, left-aligned and right-aligned headings."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise ValueError(
            "expected rich for the table, which is not installed; "
            "`pip install 'gq-horovod[cli]'`, or pass --json."
        ) from error

    def table_of(title: str, left: list[str], right: list[str]) -> Table:
        table = Table(title=title)
        for heading in left:
            table.add_column(heading, no_wrap=True)
        for heading in right:
            table.add_column(heading, justify="right", no_wrap=True)
        return table

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the program; `main` knows what to do

    # A file or a pipe has no width of its own, and 80 columns are too few.
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return Output(width=None if terminal else 140), table_of


def new_plot(panels: int = 1) -> tuple[Any, Any]:
    """A figure, and its axes; a list of them for several panels."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ValueError(
            "expected matplotlib for the plot, which is not installed; "
            "`pip install 'gq-horovod[cli]'`."
        ) from error
    figure = matplotlib.figure.Figure(figsize=(4 + 4 * panels, 4.5), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True)
    return figure, axes
