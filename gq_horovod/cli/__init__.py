"""The command `gq-horovod`: predict what compression does for a cluster, and measure the cluster.

    gq-horovod advise --params 607959381 --workers 64 --bandwidth 1Gbit --step-compute 120ms
    mpirun -np 4 --host a,b,c,d gq-horovod calibrate --output calibration.json
    gq-horovod simulate --plot simulation.png
    gq-horovod doctor; mpirun -np 4 --host a,b,c,d gq-horovod doctor
    gq-horovod env
    gq-horovod report results/

Tables need rich, plots matplotlib (`pip install 'gq-horovod[cli]'`); --json needs neither.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from .. import __version__
from . import advise, calibrate, doctor, report, simulate


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="gq-horovod", description=(__doc__ or "").split("\n")[0])
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)
    for command in (advise, calibrate, simulate, doctor, report):
        command.add_to(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns 0, 1 if the doctor finds something, 2 after an error of one line, and 141 (128 and the
    number of SIGPIPE, as a shell has it) where the reader of the output has gone, as `head` does.
    """
    if sys.stdout is None:  # closed by whoever started this
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        options = parser().parse_args(arguments)
    except SystemExit:  # after --help, --version or an error
        _flush()
        raise
    status = 0
    error: Exception | None = None
    try:
        status = options.run(options) or 0
    except (ValueError, OSError) as raised:  # OSError: a file that cannot be written
        error = raised
    error = _flush() or error
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    if error is not None:
        print(f"gq-horovod {options.command}: error: {error}", file=sys.stderr)
        return 2
    return status


def _flush() -> Exception | None:
    """Write what is still to be written, or say why it cannot be. At exit Python does it as well,
    so what cannot be written is dropped."""
    try:
        sys.stdout.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return error
    return None
