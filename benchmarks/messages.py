"""Messages and bytes of the exchanges of two-hop codes: counted in a real job, and predicted.

    python benchmarks/messages.py                      # 32 ranks over loopback, some 15 seconds

The advisor's model (gq_horovod/advisor/model.py) says for thousands of ranks how many messages a
rank sends, and how large they are. This counts them among as many ranks as a machine can start.
Messages of `mpi_ops.allreduce`, which are those of transport="mpi", are counted where they are
sent. Of MPI's Alltoallv and Allgatherv, which Horovod calls, the kernel counts what this process
writes: over TCP a message of up to 64 KiB is one write, with a header of 22 bytes. Times are not
measured: ranks share cores. Prints a table and writes messages.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from allreduce import RESULT, result_in

from gq_horovod.advisor.model import TWO_HOP_MPI, Cluster, Pattern
from mpi_ops import wire
from tools import ranks as launcher

# Bytes of a piece, which one rank has for another: Allgatherv takes Bruck's algorithm for the first
# and a ring for the second. Larger than 64 KiB they would be several writes.
PIECES = (1024, 16384)
ELEMENTS = 3_000_000
_QUIET_SECONDS = 0.5  # until messages of a barrier are through

Counts = tuple[int, int]  # messages, bytes


def written() -> Counts:
    """Writes of this process so far, and their bytes."""
    lines = Path("/proc/self/io").read_text().splitlines()
    fields = dict(line.split(": ") for line in lines)
    return int(fields["syscw"]), int(fields["wchar"])


def run_rank(elements: int) -> None:
    """One rank: rank 0 prints what every rank sent."""
    from mpi4py import MPI

    from mpi_ops import allreduce

    class Counted(MPI.Intracomm):
        """A communicator that counts; so do its duplicates."""

        sent: list[int] = []  # noqa: RUF012

        def Isend(self, buf: Any, dest: int, tag: int = 0) -> MPI.Request:
            self.sent.append(buf.nbytes)
            return super().Isend(buf, dest, tag)

    comm = MPI.COMM_WORLD
    found: dict[str, list[Counts]] = {}

    def count(name: str, call: Callable[[], object], counts: Callable[[], Counts]) -> None:
        """What every rank sends in a call; the one before makes connections."""
        call()
        comm.Barrier()
        time.sleep(_QUIET_SECONDS)
        before = counts()
        call()
        after = counts()
        comm.Barrier()
        found[name] = comm.gather((after[0] - before[0], after[1] - before[1])) or []

    gradient = np.random.default_rng(comm.rank).standard_normal(elements, dtype=np.float32)
    counted = Counted(comm.Dup())
    count(
        f"messages of {elements:,} elements",
        lambda: allreduce(gradient, counted, levels="two-hop"),
        lambda: (len(Counted.sent), sum(Counted.sent)),
    )
    for piece in PIECES:
        data = np.zeros((comm.size, piece), np.uint8)
        received, sizes = np.empty_like(data), [piece] * comm.size
        calls: dict[str, Callable[[], object]] = {
            "Alltoallv": lambda: comm.Alltoallv([data, sizes], [received, sizes]),  # noqa: B023
            "Allgatherv": lambda: comm.Allgatherv(data[0], [received, sizes]),  # noqa: B023
        }
        for name, call in calls.items():
            count(f"{name} of {piece:,} bytes", call, written)
    if comm.rank == 0:
        print(RESULT + json.dumps(found), flush=True)


def predictions(ranks: int, elements: int) -> dict[str, dict[str, float]]:
    """The same by the model: messages and bytes that a rank sends, and rounds."""
    cluster = Cluster(ranks, 1e9)
    assert TWO_HOP_MPI.config is not None
    parcels = wire.parcel_bytes((elements,), TWO_HOP_MPI.config.plan(ranks), "mpi")

    def row(pattern: Pattern, size: float, times: int = 1) -> dict[str, float]:
        sent = {"messages": times * pattern.messages, "rounds": times * pattern.rounds}
        return {**sent, "bytes": (ranks - 1) / ranks * size}

    # Each parcel twice: codes to their shares, and shares back.
    found = {
        f"messages of {elements:,} elements": row(
            cluster.to_each, 2 * sum(parcels), 2 * len(parcels)
        )
    }
    for piece in PIECES:
        size = ranks * piece
        found[f"Alltoallv of {piece:,} bytes"] = row(cluster.to_each, size)
        found[f"Allgatherv of {piece:,} bytes"] = row(cluster.to_all(size), size)
    return found


def print_table(ranks: int, rows: list[dict[str, Any]]) -> None:
    """Counted beside predicted."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"What one of {ranks} ranks sends: counted, and predicted")
    table.add_column("exchange", no_wrap=True)
    for heading in ("messages", "predicted", "bytes", "predicted", "rounds, predicted"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["exchange"],
            f"{row['counted']['messages']:,.0f}",
            f"{row['predicted']['messages']:,}",
            f"{row['counted']['bytes']:,.0f}",
            f"{row['predicted']['bytes']:,.0f}",
            f"{row['predicted']['rounds']:,}",
        )
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def main() -> None:
    """Launch the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    parser.add_argument("--timeout", type=float, default=300, help="seconds for the job")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run_rank(options.elements)
        return
    script = [sys.executable, str(Path(__file__).resolve())]
    output = subprocess.run(
        [
            *launcher.mpirun(None, options.ranks),
            *script,
            *("--rank", "--elements", str(options.elements)),
        ],
        env=launcher.environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=options.timeout,
    ).stdout
    counted = result_in(output)
    rows = []
    for exchange, predicted in predictions(options.ranks, options.elements).items():
        messages, sizes = zip(*counted[exchange], strict=True)
        own = {"messages": sum(messages) / len(messages), "bytes": sum(sizes) / len(sizes)}
        rows.append(
            {
                "exchange": exchange,
                "counted": {**own, "of ranks": counted[exchange]},
                "predicted": predicted,
            }
        )
    print_table(options.ranks, rows)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "messages.json"
    path.write_text(json.dumps({"ranks": options.ranks, "rows": rows}, indent=2) + "\n")
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
