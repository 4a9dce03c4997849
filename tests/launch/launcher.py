"""Starts a Horovod job as a user does, with a time limit, and keeps every rank's output apart."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tools.ranks import patience

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# Beside .venv, whose mpiexec is Open MPI's; the one place that names a version of MPICH.
MPICH_PIN = ROOT / "tests" / "launch" / "requirements-mpich.txt"
MPICH = ROOT / "build" / MPICH_PIN.read_text().split()[-1].replace("==", "-")
# From SIGTERM, on which a launcher ends its ranks, to SIGKILL.
_GRACE_SECONDS = 10.0
# Short beside what a message costs where ranks share cores.
_SLEEP_MICROSECONDS = 50
# What only one rank has done for this long is reported in its output.
_STALL_SECONDS = 20


@dataclass(frozen=True)
class Job:
    """How a job ended."""

    status: int  # exit status of the launcher, negative for a signal
    timed_out: bool
    seconds: float
    output: str  # of the launcher itself
    ranks: dict[int, str]  # stdout and stderr of each rank

    def report(self) -> str:
        """Everything that was printed, rank by rank."""
        ending = "hit its time limit" if self.timed_out else f"ended with status {self.status}"
        parts = [f"The job {ending} after {self.seconds:.0f} s."]
        parts += [f"=== rank {rank}\n{text}" for rank, text in self.ranks.items()]
        if not self.ranks:
            parts.append(f"=== launcher\n{self.output}")
        return "\n".join(parts)


def launch(
    transport: str,
    ranks: int,
    command: Sequence[object],
    limit: float,
    directory: Path,
    variables: Mapping[str, str] | None = None,
    fewest: int | None = None,
    patient: bool = True,
) -> Job:
    """Run a Python command in `ranks` ranks on this machine.

    Arguments:
        transport: "mpirun" (Open MPI), "mpich" (its mpiexec), "horovodrun" (Horovod over Gloo),
            "nodes" (the same, half of the ranks on each of two hosts, which are this machine), or
            "elastic" (over Gloo on the hosts that `directory`/hosts.sh lists; all ranks print to
            the launcher's output).
        command: arguments of the Python interpreter.
        limit: seconds after which the whole job is ended.
        directory: an empty one, for the output.
        variables: more environment variables.
        fewest: ranks that an elastic job goes on with; by default one may be lost.
        patient: ranks sleep for moments while they wait. They would take half of the processor time
            of the tests from those that compute.
    """
    output = directory / "ranks"
    log = directory / "launcher.txt"
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [
                *_prefix(transport, ranks, output, fewest),
                sys.executable,
                *(str(part) for part in command),
            ],
            cwd=ROOT,
            env={
                **_environment(transport, directory),
                **(patience(directory, _SLEEP_MICROSECONDS) if patient else {}),
                **(variables or {}),
            },
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(limit)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end(process)
    return Job(
        status=process.returncode,
        timed_out=timed_out,
        seconds=time.monotonic() - started,
        output=log.read_text(errors="replace"),
        ranks=_outputs(output),
    )


def _prefix(transport: str, ranks: int, output: Path, fewest: int | None) -> list[str]:
    if transport == "mpirun":
        # More ranks than cores: let them share, and give their core away while they wait.
        sharing = ["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
        return [_tool("mpirun"), "-np", str(ranks), *sharing, "--output-filename", str(output)]
    if transport == "mpich":
        for rank in range(ranks):
            (output / f"rank.{rank}").mkdir(parents=True)
        files = [f"-{name}file-pattern={output}/rank.%r/std{name}" for name in ("out", "err")]
        return [str(MPICH / "bin" / "mpiexec"), "-n", str(ranks), *files]
    if transport == "elastic":
        found = ["--min-np", str(fewest or ranks - 1), "--max-np", str(ranks)]
        found += ["--host-discovery-script", str(output.parent / "hosts.sh")]
        return [_tool("horovodrun"), "--gloo", "-np", str(ranks), *found, "--cycle-time-ms", "2"]
    # For the same reason Horovod's own threads shall not wake up every millisecond.
    sharing = ["--cycle-time-ms", "2"]
    names = f"localhost:{ranks}"
    if transport == "nodes":  # two names, which Horovod takes for two hosts
        names = f"localhost:{ranks // 2},127.0.0.1:{ranks // 2}"
    hosts = ["-np", str(ranks), "-H", names]
    return [_tool("horovodrun"), "--gloo", *hosts, *sharing, "--output-filename", str(output)]


def _tool(name: str) -> str:
    found = shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}")
    assert found, f"{name} is neither in {BIN} nor on PATH; run `make setup`."
    return found


def _environment(transport: str, directory: Path) -> dict[str, str]:
    environment = dict(os.environ)
    # Where the ranks' own pytests put temporary files. In the common place they would clean up what
    # earlier ones left, all at the same time, and warn when another one was faster.
    environment["PYTEST_DEBUG_TEMPROOT"] = str(directory)
    environment["OMP_NUM_THREADS"] = "1"
    environment["TF_CPP_MIN_LOG_LEVEL"] = "3"  # horovodrun imports TensorFlow, which talks
    # Every test has names of its own, more than the 1024 that Horovod remembers. One of its threads
    # once ended with a segmentation fault in hvd.join() after it had begun to forget some.
    environment["HOROVOD_CACHE_CAPACITY"] = "8192"
    environment["HOROVOD_STALL_CHECK_TIME_SECONDS"] = str(_STALL_SECONDS)
    if transport == "mpich":
        # mpi4py's wheel chooses its MPI at run time, and has a module for each.
        environment["MPI4PY_LIBMPI"] = str(MPICH / "lib" / "libmpi.so.12")
    if os.geteuid() == 0:
        environment["OMPI_ALLOW_RUN_AS_ROOT"] = "1"
        environment["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    return environment


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the launcher and everything that it started, whichever process groups that is in."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for relative in family:
        if relative.is_running():
            relative.kill()
    psutil.wait_procs(family, timeout=_GRACE_SECONDS)


def _outputs(directory: Path) -> dict[int, str]:
    """Both launchers write .../rank.N/stdout and .../rank.N/stderr, one with a tag on each line."""
    texts: dict[int, str] = {}
    for path in sorted(directory.glob("**/rank.*/std*"), reverse=True):  # stdout, then stderr
        match = re.fullmatch(r"rank\.(\d+)", path.parent.name)
        assert match
        rank = int(match[1])
        text = re.sub(
            r"^\[\d+\]<std\w+>:", "", path.read_text(errors="replace"), flags=re.MULTILINE
        )
        texts[rank] = text + texts.get(rank, "")
    return dict(sorted(texts.items()))
