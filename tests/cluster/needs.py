"""What the tests of this folder need: hosts in network namespaces, which root can make."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tools import ranks, testbed

ROOT = Path(__file__).resolve().parents[2]

LIMIT_SECONDS = 300  # of a command

REASON = testbed.unavailable() or (None if os.geteuid() == 0 else "not root")
needs_hosts = pytest.mark.skipif(REASON is not None, reason=f"no hosts can be made here: {REASON}")


def run(*command: str) -> str:
    """Run a command that has to succeed, such as one with mpirun; returns what it printed."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=ranks.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
        pytest.fail(f"no end after {LIMIT_SECONDS} s; every rank's output:\n{output}")
    assert done.returncode == 0, f"status {done.returncode}; every rank's output:\n{done.stdout}"
    return done.stdout
