"""tools/testbed.py starts jobs with either launcher, and leaves nothing behind however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest
from needs import ROOT, needs_hosts
from seldom import rare

from tools import ranks, testbed

PREFIX = "gqleft"  # beside what else may be running
MARK = "GQ_TESTBED_TEST"  # in the environment of everything that a test starts
LIMIT_SECONDS = 120

LAUNCHERS = ["{mpirun}", "{horovodrun}"]
MOSTLY_MPIRUN = ["{mpirun}", rare("{horovodrun}")]
# Each rank is as if on a machine of its own.
NAME_AND_SUM = """
import socket, torch, horovod.torch as hvd
hvd.init()
total = hvd.allreduce(torch.tensor([hvd.rank() + 1]), op=hvd.Sum, name="total").item()
print(f"RANK {hvd.rank()} of {hvd.size()}, {hvd.local_rank()} here ON {socket.gethostname()}: "
      f"{total}", flush=True)
"""
# Ignores what asks it to end; only SIGKILL helps.
SLEEP = """
import signal, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
print("SLEEPING", flush=True)
time.sleep(600)
"""
FAIL = """
import os, sys, time
if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("HOROVOD_RANK")) == "1":
    sys.exit(3)
time.sleep(600)
"""


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    names = (line.split()[0] for line in listed.splitlines())
    return {name for name in names if name.startswith(PREFIX)}


def files() -> set[str]:
    return {str(path) for path in Path("/run").glob(f"**/{PREFIX}*")}


class Started:
    """A testbed in a process of its own, and all that descends from it."""

    def __init__(self, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        environment = {**ranks.environment(), MARK: self.mark, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "tools" / "testbed.py"), "--prefix", PREFIX]
        with tempfile.TemporaryFile() as file:  # a pipe would have to be read all the time
            self.process = subprocess.Popen(
                [*command, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._output = os.dup(file.fileno())

    def output(self) -> str:
        """What it and its ranks have printed so far."""
        return os.pread(self._output, 1 << 20, 0).decode(errors="replace")

    def processes(self) -> list[int]:
        """Everything that is running and has this testbed's mark, the testbed included."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = path.read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended
            if f"{MARK}={self.mark}".encode() in variables:
                found.append(int(path.parent.name))
        return found

    def wait_for_ranks(self, count: int) -> None:
        """Wait until so many ranks have said that they sleep."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while self.output().count("SLEEPING") < count:
            assert time.monotonic() < deadline, f"the ranks did not start:\n{self.output()}"
            assert self.process.poll() is None, f"the testbed ended:\n{self.output()}"
            time.sleep(0.05)

    def end(self) -> str:
        """Wait for the end of the testbed, and return its output."""
        self.process.wait(LIMIT_SECONDS)
        return self.output()

    def close(self) -> None:
        """End it and all that descends from it."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._output)


@pytest.fixture
def start():
    """Starts testbeds, and cleans up after those that a failed test leaves."""
    started: list[Started] = []

    def start(*arguments: str) -> Started:
        started.append(Started(*arguments))
        return started[-1]

    yield start
    for each in started:
        each.close()
    if namespaces():
        with testbed.Testbed(1, prefix=PREFIX):
            pass


def assert_nothing_left(started: Started, files_before: set[str]) -> None:
    assert namespaces() == set()
    assert started.processes() == []
    assert files() == files_before


@needs_hosts
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_after_success(start, launcher: str) -> None:
    before = files()
    options = ("--hosts", "2", "--slots", "2")
    started = start(*options, "--", launcher, sys.executable, "-c", NAME_AND_SUM)
    output = started.end()
    assert started.process.returncode == 0, output
    found = re.findall(r"RANK (\d) of 4, (\d) here ON (\w+): 10", output)
    expected = [(str(i), str(i % 2), f"{PREFIX}{i // 2}") for i in range(4)]
    assert sorted(found) == expected, output
    assert_nothing_left(started, before)


@needs_hosts
@pytest.mark.parametrize("launcher", MOSTLY_MPIRUN)
def test_after_failure(start, launcher: str) -> None:
    before = files()
    started = start("--hosts", "2", "--", launcher, sys.executable, "-c", FAIL)
    output = started.end()
    assert started.process.returncode not in (0, None), output
    assert_nothing_left(started, before)


@needs_hosts
def test_after_a_command_that_is_not_there(start) -> None:
    before = files()
    started = start("--hosts", "2", "--", "no-such-command")
    assert started.end()
    assert started.process.returncode != 0
    assert_nothing_left(started, before)


@needs_hosts
@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        *(("{mpirun}", number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)),
        ("{horovodrun}", signal.SIGINT),
        rare("{horovodrun}", signal.SIGTERM),
        rare("{horovodrun}", signal.SIGHUP),
    ],
)
def test_after_a_signal(start, launcher: str, number: signal.Signals) -> None:
    """To the testbed alone, as `kill` sends it, with ranks that do not listen."""
    before = files()
    started = start("--hosts", "2", "--", launcher, sys.executable, "-c", SLEEP)
    started.wait_for_ranks(2)
    assert len(namespaces()) == 3  # and the switch
    started.process.send_signal(number)
    started.end()
    assert started.process.returncode == 128 + number
    assert_nothing_left(started, before)


@needs_hosts
def test_after_ctrl_c_twice(start) -> None:
    """To all processes of the terminal, and once more while they are being ended."""
    before = files()
    started = start("--hosts", "2", "--", "{mpirun}", sys.executable, "-c", SLEEP)
    started.wait_for_ranks(2)
    os.killpg(started.process.pid, signal.SIGINT)
    time.sleep(0.5)
    os.killpg(started.process.pid, signal.SIGINT)
    started.end()
    assert started.process.returncode != 0
    assert_nothing_left(started, before)


@needs_hosts
def test_while_hosts_are_being_made(start) -> None:
    before = files()
    started = start("--hosts", "40", "--", "sleep", "600")
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(namespaces()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.process.send_signal(signal.SIGTERM)
    started.end()
    assert started.process.returncode == 128 + signal.SIGTERM
    assert_nothing_left(started, before)


@needs_hosts
@pytest.mark.parametrize("launcher", MOSTLY_MPIRUN)
def test_the_next_one_removes_what_a_killed_one_left(start, launcher: str) -> None:
    before = files()
    killed = start("--hosts", "3", "--", launcher, sys.executable, "-c", SLEEP)
    killed.wait_for_ranks(3)
    killed.process.kill()
    killed.process.wait()
    assert len(namespaces()) == 4
    assert killed.processes()
    following = start("--hosts", "1", "--", "true")
    output = following.end()
    assert following.process.returncode == 0, output
    assert killed.processes() == []
    assert_nothing_left(following, before)


@needs_hosts
def test_a_second_one_waits(start) -> None:
    before = files()
    first = start("--hosts", "1", "--", "sleep", "2")
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(namespaces()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    following = [start("--hosts", "1", "--", "sleep", "0.1") for _ in range(3)]
    for each in (first, *following):
        output = each.end()
        assert each.process.returncode == 0, output
        assert each.processes() == []
    assert "waiting for another testbed" in output
    assert_nothing_left(first, before)


TRANSFER = """
import socket, sys, time
address, count = sys.argv[1], int(sys.argv[2])
if address == "receive":
    with socket.create_server(("", 5000)) as server:
        connection = server.accept()[0]
        while connection.recv(1 << 20):
            pass
else:
    for _ in range(500):
        try:
            connection = socket.create_connection((address, 5000))
            break
        except OSError:
            time.sleep(0.02)
    connection.sendall(bytes(count))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)  # the end: everything has arrived
"""


@needs_hosts
def test_links_have_rates_of_their_own() -> None:
    count = 2_000_000
    with testbed.Testbed(3, ["10mbit/80mbit", "80mbit", "80mbit"], PREFIX) as bed:

        def seconds(sender: int, receiver: int) -> float:
            program = [sys.executable, "-c", TRANSFER]
            receiving = subprocess.Popen(bed.command(receiver, [*program, "receive", "0"]))
            began = time.monotonic()
            address = bed.addresses[receiver]
            sending = bed.command(sender, [*program, address, str(count)])
            subprocess.run(sending, check=True, timeout=LIMIT_SECONDS)
            assert receiving.wait(LIMIT_SECONDS) == 0
            return time.monotonic() - began

        # The bucket goes at once. No link is faster than its rate; that one direction is the slow
        # one is told by the ratio, with much room for a busy machine.
        shaped = 8 * (count - testbed.bucket_bytes("80mbit"))
        slow, fast, other = seconds(0, 1), seconds(1, 0), seconds(1, 2)
        least = shaped / 80e6
    assert slow > shaped / 10e6
    assert least < fast < slow / 1.5
    assert least < other < slow / 1.5


@pytest.mark.parametrize(
    ("hosts", "rate", "message"),
    [
        (3, ["1gbit", "1gbit"], "one for each of 3 hosts, got 2"),
        (2, "fast", "must look like 1gbit, 200mbit or 200mbit/1gbit, got 'fast'"),
        (2, ["1gbit", "1gbit/"], "got '1gbit/'"),
        (0, "1gbit", "expected 1 to 250 hosts, got 0"),
    ],
)
def test_rates_that_cannot_be(hosts: int, rate, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        testbed.Testbed(hosts, rate)


@pytest.mark.parametrize("prefix", ["", "a b", "gq;reboot", "../gq", "$(id)", "gq\n"])
def test_a_prefix_is_nothing_to_a_shell(prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix must be small letters and digits"):
        testbed.Testbed(2, prefix=prefix)


def test_rates_of_all_hosts() -> None:
    assert testbed.link_rates("200mbit", 2) == [("200mbit", "200mbit")] * 2
    rates = ["1.5gbit", "200mbit/1gbit"]
    assert testbed.link_rates(rates, 2) == [("1.5gbit", "1.5gbit"), ("200mbit", "1gbit")]


def test_cpus_of_all_hosts() -> None:
    assert testbed.host_cpus(2, [0, 1]) == [[0], [1]]
    assert testbed.host_cpus(4, [3, 5]) == [[3], [5], [3], [5]]
    assert testbed.host_cpus(2, [0, 1, 2, 3, 4]) == [[0, 1], [2, 3]]
    assert testbed.host_cpus(3, [0, 1]) == [[0, 1]] * 3  # else one host would have twice as much
    assert testbed.host_cpus(1, [7]) == [[7]]


@needs_hosts
def test_a_host_stays_on_its_cpus() -> None:
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("all hosts have the one CPU that there is")
    script = "import os; print(sorted(os.sched_getaffinity(0)))"
    with testbed.Testbed(2, prefix=PREFIX) as bed:
        for host in range(2):
            command = bed.command(host, [sys.executable, "-c", script])
            seen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert seen == f"{bed.cpus[host]}\n"


def test_buckets_hold_as_long_a_time_at_every_rate() -> None:
    assert testbed.bits_per_second("1.5gbit") == 1.5e9
    assert testbed.bucket_bytes("10gbit") == 2_500_000
    assert testbed.bucket_bytes("1gbit") == 250_000
    assert testbed.bucket_bytes("200mbit") == testbed.bucket_bytes("10kbit") > 64 << 10
    with pytest.raises(ValueError, match="must look like 200mbit or 1gbit, got '1 gbit'"):
        testbed.bits_per_second("1 gbit")


def test_without_the_right_it_says_so() -> None:
    """As a user who may make no namespaces, or with a PATH that has no `ip`."""
    done = subprocess.run(
        [sys.executable, "-c", "import tools.testbed as t\n"
         "t.shutil.which = lambda *_, **__: None; print(t.unavailable())"],
        cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert "ip and tc" in done.stdout
    assert "apt-get install iproute2" in done.stdout
