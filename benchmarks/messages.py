"""Messages and bytes of the exchanges of two-hop codes: counted in a real job, and predicted.

    python benchmarks/messages.py                      # 32 ranks over loopback, some 20 seconds
    python benchmarks/messages.py --ranks 64

The advisor's model (gq_horovod/advisor/model.py) says for thousands of ranks how many messages a
rank sends, and how large they are. This counts them among as many ranks as a machine can start.
Messages of `mpi_ops.allreduce`, which are those of transport="mpi", are counted where they are
sent. Of MPI's Alltoallv and Allgatherv, which Horovod calls, the kernel counts what this process
writes: over TCP a message of up to 64 KiB is one write, with a header of 22 bytes.

Times of these exchanges are not measured, since ranks share cores. In a second job two ranks, with
a core each, send each other as many messages as a rank of 32 to 1024 sends: of pieces that go
straight to their ranks, and of pieces that go through a rank between, as short ones do
(mpi_ops/exchange.py). So it measures what messages cost, over loopback, and no link. Prints tables
and writes messages.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from allreduce import RESULT, result_in

from gq_horovod.advisor.model import TWO_HOP_MPI, Cluster, Pattern
from mpi_ops import chunks, wire
from tools import ranks as launcher

# Bytes of a piece, which one rank has for another: Allgatherv takes Bruck's algorithm for the first
# and a ring for the second. Larger than 64 KiB they would be several writes.
PIECES = (1024, 16384)
ELEMENTS = 3_000_000
SHORT_ELEMENTS = 20_000  # whose pieces go through a rank between
RANKS_TIMED, PIECES_TIMED = (32, 64, 256, 1024), (16, 256, 1024, 4096)
CALLS = 10  # of each round that is timed
_SLEEP_MICROSECONDS = 1000
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

    counted = Counted(comm.Dup())
    for size in (elements, SHORT_ELEMENTS):
        gradient = np.random.default_rng(comm.rank).standard_normal(size, dtype=np.float32)
        count(
            f"messages of {size:,} elements",
            lambda: allreduce(gradient, counted, levels="two-hop"),  # noqa: B023
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


def run_pair(rounds: int) -> None:
    """One of two ranks that send each other what a rank of many sends: rank 0 prints the times."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    other = 1 - comm.rank
    # Bytes of one message: to a row at once what is for all of its column.
    most = max(PIECES_TIMED) * chunks.columns(max(RANKS_TIMED))
    here, there = np.zeros(most, np.uint8), np.zeros((max(RANKS_TIMED), most), np.uint8)

    def swap(count: int, size: int) -> None:
        """Messages at once, as mpi_ops.exchange sends them."""
        requests = [comm.Irecv(there[place, :size], other) for place in range(count)]
        requests += [comm.Isend(here[:size], other) for _ in range(count)]
        while not MPI.Request.Testall(requests):
            pass

    def seconds(swaps: list[tuple[int, int]]) -> list[float]:
        found = []
        for _ in range(rounds):
            comm.Barrier()
            began = time.perf_counter()
            for _ in range(CALLS):
                for count, size in swaps:
                    swap(count, size)
            found.append((time.perf_counter() - began) / CALLS)
        return found

    rows = []
    for ranks in RANKS_TIMED:
        columns = chunks.columns(ranks)
        lines = ranks // columns
        for size in PIECES_TIMED:
            # Codes to a row and along a column, shares along a column and to a row.
            between = [(columns - 1, lines * size), (lines - 1, columns * size)]
            between += [(lines - 1, size), (columns - 1, lines * size)]
            rows.append(
                {
                    "ranks": ranks,
                    "piece": size,
                    "straight": seconds([(ranks - 1, size)] * 2),
                    "forwarded": seconds(between),
                    "messages": [2 * (ranks - 1), sum(count for count, _ in between)],
                }
            )
    if comm.rank == 0:
        print(RESULT + json.dumps(rows), flush=True)


def predictions(ranks: int, elements: int) -> dict[str, dict[str, float]]:
    """The same by the model: messages and bytes that a rank sends, and rounds."""
    cluster = Cluster(ranks, 1e9)
    assert TWO_HOP_MPI.config is not None

    def row(sent: list[tuple[Pattern, int]]) -> dict[str, float]:
        return {
            "messages": sum(pattern.messages for pattern, _ in sent),
            "rounds": sum(pattern.rounds for pattern, _ in sent),
            "bytes": sum(round(pattern.leaving * size) for pattern, size in sent),
        }

    found = {}
    for own in (elements, SHORT_ELEMENTS):
        parcels = wire.parcel_bytes((own,), TWO_HOP_MPI.config.plan(ranks), "mpi")
        # Each parcel twice: codes to their shares, and shares back.
        hops = [(pattern, size) for size in parcels for pattern in cluster.hops(size)]
        found[f"messages of {own:,} elements"] = row(hops)
    for piece in PIECES:
        size = ranks * piece
        found[f"Alltoallv of {piece:,} bytes"] = row([(cluster.to_each, size)])
        found[f"Allgatherv of {piece:,} bytes"] = row([(cluster.to_all(size), size)])
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


def print_times(rows: list[dict[str, Any]]) -> None:
    """Of both hops, straight and forwarded."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Both hops of a rank among so many, sent between two ranks: µs ± spread")
    headings = ("ranks", "bytes of a piece", "messages straight", "µs", "forwarded", "µs", "ratio")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        ways = [row["straight"], row["forwarded"]]
        medians = [1e6 * statistics.median(own) for own in ways]
        cells = [
            f"{median:,.0f} ± {1e6 * statistics.stdev(own):.0f}"
            for median, own in zip(medians, ways, strict=True)
        ]
        straight, forwarded = map(str, row["messages"])
        table.add_row(
            *(f"{row['ranks']}", f"{row['piece']:,}", straight, cells[0], forwarded, cells[1]),
            f"{medians[1] / medians[0]:.2f}",
        )
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def started(ranks: int, arguments: list[str], limit: float, patient: bool) -> Any:
    """The result that ranks of this script print; while they wait, patient ones sleep."""
    words = [*launcher.mpirun(None, ranks), sys.executable, str(Path(__file__).resolve())]
    with tempfile.TemporaryDirectory(prefix="gq-messages-") as folder:
        sleeping = launcher.patience(Path(folder), _SLEEP_MICROSECONDS) if patient else {}
        done = subprocess.run(
            [*words, *arguments],
            env=launcher.environment() | sleeping,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=limit,
        )
    return result_in(done.stdout)


def main() -> None:
    """Launch the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    parser.add_argument("--rounds", type=int, default=20, help="that are timed, 2 or more")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for the job")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    for name in ("--rank", "--pair"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pair:
        run_pair(options.rounds)
        return
    if options.rank:
        run_rank(options.elements)
        return
    arguments = ["--rank", "--elements", str(options.elements)]
    counted = started(options.ranks, arguments, options.timeout, patient=True)
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
    timed = started(2, ["--pair", f"--rounds={options.rounds}"], options.timeout, patient=False)
    print_times(timed)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "messages.json"
    document = {"ranks": options.ranks, "rows": rows, "timed": timed}
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
