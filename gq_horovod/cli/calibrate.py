"""`gq-horovod calibrate`: measure this cluster, in every rank of a job."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..advisor import calibrate, doctor, model
from .output import rich
from .units import written_rate


def add_to(commands: Any) -> None:
    """The command's arguments."""
    sub = commands.add_parser("calibrate", help="measure this cluster; run it under mpirun")
    sub.set_defaults(run=run)
    sub.add_argument("--output", type=Path, default=Path("calibration.json"))


def run(options: argparse.Namespace) -> None:
    """`gq-horovod calibrate`, in every rank."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ValueError(
            "expected mpi4py, which is not installed or finds no MPI library; "
            "`pip install gq-horovod[mpi]`."
        ) from error
    doctor.start_mpi()
    cluster, with_horovod = calibrate.measure(MPI.COMM_WORLD)
    if MPI.COMM_WORLD.rank:
        return
    calibrate.save(cluster, options.output)
    console, table_of = rich()
    table = table_of(f"{cluster.ranks} ranks", ["what"], ["measured"])
    table.add_row("ranks on a host", str(cluster.ranks_per_host))
    table.add_row("bandwidth of a pair", written_rate(cluster.bandwidth))
    inner = "default" if not cluster.hierarchical else written_rate(cluster.inner_bandwidth)
    table.add_row("exchange inside a host", inner)
    table.add_row("latency", f"{1e6 * cluster.latency:.0f} us")
    table.add_row("further message", f"{1e6 * cluster.message_overhead:.1f} us")
    for way in model.WAYS:
        for size, share in getattr(cluster, f"{way}_efficiency"):
            table.add_row(f"efficiency, {way}, {size / 2**20:g} MiB", f"{share:.2f}")
        if with_horovod:
            table.add_row(f"  exposed, {way}", f"{getattr(cluster, f'{way}_exposed'):.2f}")
            table.add_row(f"  hidden, {way}", f"{getattr(cluster, f'{way}_hidden'):.2f}")
    if with_horovod:
        table.add_row("Horovod, lone operation", f"{1e3 * cluster.cycle_time:.2f} ms")
        table.add_row("Horovod, further operation", f"{1e6 * cluster.operation_overhead:.0f} us")
    else:
        table.add_row("Horovod", "not importable: defaults")
    for name, rate in asdict(cluster.kernels).items():
        table.add_row(f"kernel, {name}", f"{rate / 1e9:.1f} GB/s")
    console.print(table)
    print(f"Wrote {options.output}; use it with `gq-horovod advise --calibration`.")
