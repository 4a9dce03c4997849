"""A link that is cut for seconds or for ever, and a slow host, between hosts of a testbed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from needs import ROOT, needs_hosts
from seldom import EVERYWHERE, Record, cases

from tools import ranks, testbed

pytestmark = needs_hosts

LIMIT_SECONDS = 240
HOSTS = 2
SCRIPT = ROOT / "tests" / "launch" / "faults.py"
# So that a step is under way whenever the link is cut.
PAUSED = ("--pause", "0.2", "--steps", "25", "--hang", "200")
CUT_AT_STEP = 5
CUT_SECONDS = 3.0
TIMEOUT_SECONDS = 6

# mpirun finds out in this time that a host is gone. By default it takes 8 minutes, and longer, up
# to what the kernel's net.ipv4.tcp_retries2 allows, where it has sent the host something since.
KEEPALIVE = [
    *("--mca", "oob_tcp_keepalive_time", "2"),
    *("--mca", "oob_tcp_keepalive_intvl", "1"),
    *("--mca", "oob_tcp_keepalive_probes", "5"),
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[testbed.Testbed]:
    with testbed.Testbed(HOSTS, ["1gbit", "100mbit"], prefix="gqfault") as bed:
        yield bed


class Job:
    """A training on all hosts whose output can be watched."""

    def __init__(self, hosts: testbed.Testbed, launcher: str, log: Path, *options: object) -> None:
        environment = ranks.environment()
        start = [str(Path(sys.executable).with_name(launcher))]
        if launcher == "mpirun":
            start += [*hosts.mpirun_args(), "--tag-output", *KEEPALIVE]
        else:
            start += hosts.horovodrun_args()
            environment["GQ_TESTBED_AGENT"] = hosts.horovodrun_environment()["GQ_TESTBED_AGENT"]
            environment["PATH"] = f"{testbed.SHIM}{os.pathsep}{environment['PATH']}"
        words = [*start, sys.executable, SCRIPT, "none", "user", *PAUSED, *options]
        self._log = log
        self._deadline = time.monotonic() + LIMIT_SECONDS
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                hosts.command(0, [str(word) for word in words]),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, pattern: str) -> None:
        while not re.search(pattern, self.output):
            assert self._process.poll() is None, self.output
            self._wait()

    def status(self) -> int:
        """Of the launcher, when it has ended."""
        while self._process.poll() is None:
            self._wait()
        assert self._process.returncode is not None
        return self._process.returncode

    def _wait(self) -> None:
        assert time.monotonic() < self._deadline, f"no end in {LIMIT_SECONDS} s:\n{self.output}"
        time.sleep(0.1)

    def end(self) -> None:
        with_children: list[Any] = []
        if self._process.poll() is None:
            process = psutil.Process(self._process.pid)
            with_children = [process, *process.children(recursive=True)]
        for each in with_children:
            each.kill()
        self._process.wait()


@pytest.fixture
def start(hosts: testbed.Testbed, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs = []

    def begin(launcher: str, *options: object) -> Job:
        jobs.append(Job(hosts, launcher, tmp_path / f"{len(jobs)}.txt", *options))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.end()
    hosts.mend(HOSTS - 1)


def result(job: Job) -> str:
    """Digest of the parameters of all ranks."""
    assert job.status() == 0, job.output
    digests = re.findall(r"DONE (\w+)", job.output)
    assert digests == [digests[0]] * HOSTS, job.output
    return str(digests[0])


@pytest.mark.parametrize(("launcher", "transport"), cases({("mpirun", "mpi")}, EVERYWHERE))
def test_a_link_cut_for_seconds_and_a_slow_host(
    launcher: str,
    transport: str,
    hosts: testbed.Testbed,
    start: Callable[..., Job],
    record_property: Record,
) -> None:
    """The last host is slow, in both jobs. The connections outlive the cut."""
    options = ("--transport", transport)
    job = start(launcher, *options)
    job.wait_for(f"STEP {CUT_AT_STEP} ")
    hosts.cut(HOSTS - 1)
    time.sleep(CUT_SECONDS)
    assert "STEP 24 " not in job.output
    hosts.mend(HOSTS - 1)
    mended = time.time()
    parameters = result(job)
    steps = [float(at) for at in re.findall(r"STEP \d+ ([\d.]+)", job.output)]
    after = min(at for at in steps if at > mended) - mended
    assert parameters == result(start(launcher, *options))
    text = f"{launcher}, {transport}, link cut for {CUT_SECONDS:g} s: next step {after:.1f} s after"
    record_property("job", f"{text}, same parameters")


@pytest.mark.parametrize(("launcher", "transport"), cases({("mpirun", "horovod")}, EVERYWHERE))
def test_a_link_cut_for_ever(
    launcher: str,
    transport: str,
    hosts: testbed.Testbed,
    start: Callable[..., Job],
    record_property: Record,
) -> None:
    job = start(launcher, "--transport", transport, f"timeout={TIMEOUT_SECONDS}")
    job.wait_for(f"STEP {CUT_AT_STEP} ")
    hosts.cut(HOSTS - 1)
    cut = time.time()
    status = job.status()
    end = time.time() - cut
    assert status != 0, job.output
    assert "DONE" not in job.output
    # Whoever is first: mpirun, which misses the host's daemon, Gloo's own limit, or the watchdog.
    error = "lost communication with a remote daemon|HorovodInternalError|has not moved for"
    found = re.search(error, job.output)
    assert found, job.output
    text = f"{launcher}, {transport}, link cut for ever, timeout={TIMEOUT_SECONDS}"
    record_property("job", f"{text}: {end:.1f} s to the end ({found[0]!r})")
