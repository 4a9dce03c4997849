"""`gq-horovod calibrate`: measure this cluster, in every rank of a job."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..advisor import calibrate, doctor, model
from .output import columns
from .units import written_rate


def add_to(commands: Any) -> None:
    """The command's arguments."""
    sub = commands.add_parser("calibrate", help="measure this cluster; run it under mpirun")
    sub.set_defaults(run=run)
    sub.add_argument(
        "--output",
        type=Path,
        default=Path("calibration.json"),
        help="file for what was measured (default calibration.json)",
    )


def run(options: argparse.Namespace) -> None:
    """`gq-horovod calibrate`, in every rank."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ValueError(
            "expected mpi4py, which is not installed or finds no MPI library; "
            "`pip install 'gq-horovod[mpi]'`."
        ) from error
    doctor.start_mpi()
    cluster, with_horovod = calibrate.measure(MPI.COMM_WORLD)
    if MPI.COMM_WORLD.rank:
        return
    calibrate.save(cluster, options.output)
    inner = "default" if not cluster.hierarchical else written_rate(cluster.inner_bandwidth)
    rows = [
        ("ranks", str(cluster.ranks)),
        ("ranks on a host", str(cluster.ranks_per_host)),
        ("bandwidth of a pair", written_rate(cluster.bandwidth)),
        ("exchange inside a host", inner),
        ("latency", f"{1e6 * cluster.latency:.0f} us"),
        ("further message", f"{1e6 * cluster.message_overhead:.1f} us"),
    ]
    for way in model.WAYS:
        for size, share in getattr(cluster, f"{way}_efficiency"):
            rows.append((f"efficiency, {way}, {size / 2**20:g} MiB", f"{share:.2f}"))
        if with_horovod:
            rows.append((f"  exposed, {way}", f"{getattr(cluster, f'{way}_exposed'):.2f}"))
            rows.append((f"  hidden, {way}", f"{getattr(cluster, f'{way}_hidden'):.2f}"))
    if with_horovod:
        rows.append(("Horovod, lone operation", f"{1e3 * cluster.cycle_time:.2f} ms"))
        rows.append(("Horovod, further operation", f"{1e6 * cluster.operation_overhead:.0f} us"))
    else:
        rows.append(("Horovod", "not importable: defaults"))
    for name, rate in asdict(cluster.kernels).items():
        rows.append((f"kernel, {name}", f"{rate / 1e9:.1f} GB/s"))
    print(columns(rows))
    print(f"Wrote {options.output}; use it with `gq-horovod advise --calibration`.")
