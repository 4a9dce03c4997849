#!/usr/bin/env python3
"""Several hosts with a slow network, on one Linux machine.

Every host is a network namespace with an address of its own; the hosts meet at a bridge in one more
namespace, and a token bucket filter limits each link in both directions. MPI programs start on the
hosts as on real ones and see a network of, say, 1 Gbit/s instead of loopback. Nothing outside these
namespaces changes: no interface or address is added to the machine, and no packet leaves it.

    python tools/testbed.py --hosts 4 --rate 1gbit -- COMMAND ...
    python tools/testbed.py --rates 1gbit,1gbit,200mbit,1gbit -- COMMAND ...     # one slow host
    python tools/testbed.py --hosts 4 --rate 200mbit/1gbit -- COMMAND ...        # sends/receives

runs COMMAND on host 0. `{mpirun}` in COMMAND stands for mpirun with the options that start one
rank on each host, so `-- '{mpirun}' python train.py` trains on all of them; `{horovodrun}` does the
same with Horovod's launcher, over Gloo.

Needs `ip` and `tc` (Debian: iproute2), and root or a kernel that lets users make user namespaces.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

INTERFACE = "eth0"  # each host's only link, inside its namespace
SUBNET = "10.213.77"  # addresses that exist only inside the namespaces; host i has .(i+1)
RATE = r"\d+(\.\d+)?[kmg]bit"  # of those that tc understands, the plain ones
BURST_SECONDS = 2e-3  # of a link's rate, which may pass at once after a pause
LARGEST_PACKET = 72 << 10  # bytes that the kernel hands over in one piece, with their headers
SHIM = Path(__file__).resolve().parent / "shim"  # holds what horovodrun finds in place of ssh


def unavailable() -> str | None:
    """Return why hosts cannot be made here, or None if they can (as root, or after `as_root`)."""
    needed = ("ip", "tc", "nsenter", "unshare", "taskset", "hostname", "mount")
    missing = [tool for tool in needed if not shutil.which(tool, path=_path())]
    if missing:
        return (
            f"{' and '.join(missing)} not found "
            "(Debian: apt-get install iproute2 util-linux hostname)"
        )
    if os.geteuid() == 0:
        probe = ["unshare", "--net", "ip", "link", "add", "probe", "type", "bridge"]
        reason = "this container may not create network namespaces (it lacks CAP_SYS_ADMIN)"
    else:
        probe = ["unshare", "--user", "--map-root-user", "--net", "--mount", *_COVER_RUN, "true"]
        reason = "not root, and this system gives users no user namespaces of their own"
    try:
        _run(probe)
    except (OSError, subprocess.CalledProcessError):
        return reason
    return None


def bits_per_second(rate: str) -> float:
    """A rate as tc writes it, such as "200mbit" or "1gbit". Raises ValueError for any other."""
    if re.fullmatch(RATE, rate) is None:
        raise ValueError(f"A rate must look like 200mbit or 1gbit, got {rate!r}.")
    return float(rate[:-4]) * {"k": 1e3, "m": 1e6, "g": 1e9}[rate[-4]]


def bucket_bytes(rate: str) -> int:
    """Bytes that a link of this rate lets pass at once after a pause: its token bucket."""
    return max(int(bits_per_second(rate) / 8 * BURST_SECONDS), LARGEST_PACKET)


# `ip netns` keeps its names under /run, which a user may not write to: a private one covers it.
_COVER_RUN = ("sh", "-c", 'mount -t tmpfs tmpfs /run && exec "$@"', "sh")


def as_root() -> None:
    """If this process is not root, start it again as root of a user namespace of its own.

    Does not return in that case. Call it first thing, when `unavailable()` is None.
    """
    if os.geteuid() == 0:
        return
    command = ["unshare", "--user", "--map-root-user", "--net", "--mount", *_COVER_RUN]
    os.execvp(command[0], [*command, *sys.orig_argv])


def _path() -> str:
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"  # where users lack ip and tc


def _run(command: Sequence[str]) -> str:
    """Run a tool to its end and return its output; raises CalledProcessError with its message."""
    done = subprocess.run(
        command, text=True, capture_output=True, env={**os.environ, "PATH": _path()}
    )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout


def host_cpus(hosts: int, cpus: Sequence[int]) -> list[list[int]]:
    """Return the CPUs that each host is kept to.

    They are its own where there are enough; else as many hosts share each of them, or, where that
    does not come out even, all hosts all of them.
    """
    if hosts > len(cpus) and hosts % len(cpus):
        return [list(cpus)] * hosts
    each = max(len(cpus) // hosts, 1)
    return [[cpus[(i * each + j) % len(cpus)] for j in range(each)] for i in range(hosts)]


def _enter(host: str, table: Path, cpus: Sequence[int]) -> list[str]:
    """Return the words that make the command after them run on a host.

    table is its /etc/hosts.
    """
    # With a name of its own. Open MPI's daemons keep their files in a directory named after the
    # host, and those of hosts that share name and disk take it from under each other: one start in
    # ten hangs. Gloo looks up the address of its own host's name.
    name = f'hostname {host} && mount --bind {table} /etc/hosts && exec "$@"'
    named = ("unshare", "--uts", "--mount", "sh", "-c", name, "sh")
    # Kept to its CPUs: processes that may use all of them take them from hosts that compute, even
    # where they only ask whether a message has come.
    placed = ("taskset", "--cpu-list", ",".join(map(str, cpus)))
    return ["nsenter", f"--net=/run/netns/{host}", "--", *placed, *named]


def interface_bytes(interface: str = INTERFACE) -> tuple[int, int]:
    """Return (received, sent) bytes of an interface of the network namespace of this process.

    A packet counts with its headers, once for each interface it passes.
    """
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            fields = counters.split()
            return int(fields[0]), int(fields[8])
    raise ValueError(
        f"interface_bytes: expected an interface listed in /proc/net/dev, got {interface!r}"
    )


def link_rates(rate: str | Sequence[str], hosts: int) -> list[tuple[str, str]]:
    """Return the rates at which each host sends and receives: one rate for all, or one for each.

    A rate is "1gbit", or "200mbit/1gbit" for a host that sends at 200 Mbit/s and receives at 1
    Gbit/s. Raises ValueError for another form, or another number of them than hosts.
    """
    rates = [rate] * hosts if isinstance(rate, str) else list(rate)
    if len(rates) != hosts:
        raise ValueError(
            f"Testbed: expected one rate, or one for each of {hosts} hosts, got {len(rates)}"
        )
    pairs = []
    for each in rates:
        if not re.fullmatch(f"{RATE}(/{RATE})?", each):
            raise ValueError(
                f"Testbed: rate must look like 1gbit, 200mbit or 200mbit/1gbit, got {each!r}"
            )
        sends, _, receives = each.partition("/")
        pairs.append((sends, receives or sends))
    return pairs


class Testbed:
    """`hosts` hosts, each on a link of its own to one switch; a context manager.

    Each is kept to CPUs of its own if there are enough, see `host_cpus`.

    Args:
        hosts: number of hosts, 1 to 250. Host i is the namespace `{prefix}{i}`.
        rate: speed of the links, or a sequence with that of each (`link_rates`).
        prefix: start of the namespaces' names. One testbed of a prefix exists at a time; a second
            one waits, so that they neither collide nor measure each other's load.

    The hosts are removed, with every process that still runs on them, on leaving the context: at
    its end, on an exception, on SIGINT, SIGTERM or SIGHUP, and when the interpreter exits. After a
    SIGKILL the next testbed of that prefix removes them.
    """

    __test__ = False  # not a test class, whatever pytest makes of its name

    def __init__(
        self, hosts: int = 4, rate: str | Sequence[str] = "1gbit", prefix: str = "gq"
    ) -> None:
        if not 1 <= hosts <= 250:
            raise ValueError(f"Testbed: expected 1 to 250 hosts, got {hosts}")
        if not re.fullmatch("[a-z][a-z0-9]*", prefix):  # it becomes part of shell scripts and paths
            raise ValueError(
                f"Testbed: prefix must be small letters and digits that begin with a letter, got "
                f"{prefix!r}"
            )
        self.hosts = hosts
        self.rates = link_rates(rate, hosts)
        self.names = [f"{prefix}{i}" for i in range(hosts)]
        self.addresses = [f"{SUBNET}.{i + 1}" for i in range(hosts)]
        self.cpus = host_cpus(hosts, sorted(os.sched_getaffinity(0)))
        self._prefix = prefix
        self._switch = f"{prefix}switch"
        self._lock: IO[str] | None = None
        self._agent = Path(f"/run/{prefix}-testbed-agent.sh")
        self._table = Path(f"/run/{prefix}-testbed-hosts")
        self._lock_path = Path(f"/run/{prefix}-testbed.lock")
        self._old_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Testbed:
        self._acquire()
        atexit.register(self.close)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                self._old_handlers[number] = signal.signal(number, _exit_on_signal)
        try:
            self._remove()  # what a killed predecessor left behind
            self._create()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hosts and everything that runs on them. Does nothing the second time."""
        if self._lock is None:
            return
        with _no_interrupts():
            self._remove()
            for path in (self._agent, self._table, self._lock_path):
                path.unlink(missing_ok=True)
            self._lock.close()  # gives the lock back
            self._lock = None
            atexit.unregister(self.close)
        while self._old_handlers:
            signal.signal(*self._old_handlers.popitem())

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` on a host."""
        return [*_enter(self.names[host], self._table, self.cpus[host]), *command]

    def mpirun_args(self, slots: int = 1) -> list[str]:
        """Return the options with which Open MPI's mpirun, run on host 0, uses all hosts.

        `slots` ranks are placed on each host, in blocks: ranks 0 to slots - 1 on host 0, and so on.
        MPI talks TCP over the shaped links between hosts, and shared memory inside a host.
        """
        network = f"{SUBNET}.0/24"
        shared = "vader," if slots > 1 else ""
        return [
            *("--host", ",".join(f"{address}:{slots}" for address in self.addresses)),
            *("-np", str(slots * self.hosts), "--map-by", "slot", "--bind-to", "none"),
            *("--mca", "plm_rsh_agent", f"sh {self._agent}", "--mca", "plm_rsh_no_tree_spawn", "1"),
            *("--mca", "oob_tcp_if_include", network),
            *("--mca", "pml", "ob1", "--mca", "btl", f"{shared}tcp,self"),
            *("--mca", "btl_tcp_if_include", network),
            # The hosts may share this machine's cores: whoever waits for the network gives its own
            # away, instead of taking it from a host that computes.
            *("--mca", "mpi_yield_when_idle", "1"),
        ]

    def horovodrun_args(self, slots: int = 1) -> list[str]:
        """Return the options with which horovodrun, run on host 0, uses all hosts over Gloo.

        Ranks are placed as by `mpirun_args`. horovodrun reaches other hosts through the ssh that it
        finds on PATH: run it with `horovodrun_environment()`.
        """
        return [
            *("--gloo", "--network-interfaces", INTERFACE),
            *("-np", str(slots * self.hosts)),
            *("-H", ",".join(f"{address}:{slots}" for address in self.addresses)),
            "--disable-cache",  # kept in the home directory, of hosts that will not be there again
        ]

    def horovodrun_environment(self) -> dict[str, str]:
        """Return the variables with which horovodrun finds the hosts of this testbed."""
        path = f"{SHIM}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        return {"PATH": path, "GQ_TESTBED_AGENT": str(self._agent)}

    def host_bytes(self, host: int) -> tuple[int, int]:
        """Return (received, sent) bytes of a host's link since it was made."""
        shown = _run(["ip", "-n", self.names[host], "-s", "-j", "link", "show", INTERFACE])
        statistics = json.loads(shown)[0]["stats64"]
        return statistics["rx"]["bytes"], statistics["tx"]["bytes"]

    def cut(self, host: int) -> None:
        """Pull the host's cable: packets are lost in both directions, connections stay open."""
        _run(["ip", "-n", self._switch, "link", "set", f"port{host}", "down"])

    def mend(self, host: int) -> None:
        """Put it back."""
        _run(["ip", "-n", self._switch, "link", "set", f"port{host}", "up"])

    def _acquire(self) -> None:
        """Take the lock that says who owns the namespaces of this prefix."""
        path = self._lock_path
        while True:
            lock = path.open("a")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("testbed: waiting for another testbed to finish", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            # Whoever held it has removed the file: the lock that counts is that of the file there.
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                    self._lock = lock
                    return
            lock.close()

    def _create(self) -> None:
        switch = self._switch
        _run(["ip", "netns", "add", switch])
        _run(["ip", "-n", switch, "link", "add", "bridge", "type", "bridge"])
        _run(["ip", "-n", switch, "link", "set", "bridge", "up"])
        hosts = zip(self.names, self.addresses, self.rates, strict=True)
        for i, (name, address, (sends, receives)) in enumerate(hosts):
            port = f"port{i}"
            _run(["ip", "netns", "add", name])
            _run(
                f"ip -n {switch} link add {port} type veth "
                f"peer name {INTERFACE} netns {name}".split()
            )
            _run(["ip", "-n", switch, "link", "set", port, "master", "bridge", "up"])
            _run(["ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE])
            _run(["ip", "-n", name, "link", "set", "lo", "up"])
            _run(["ip", "-n", name, "link", "set", INTERFACE, "up"])
            # A queue limits what leaves through an interface: one at the host for what it sends,
            # one at the switch for what it receives.
            for namespace, device, rate in (
                (name, INTERFACE, sends),
                (switch, port, receives),
            ):
                _run(
                    f"tc -n {namespace} qdisc add dev {device} root "
                    f"tbf rate {rate} burst {bucket_bytes(rate)} latency 50ms".split()
                )
        self._write_files()

    def _write_files(self) -> None:
        """Write the /etc/hosts of the hosts, and the agent: `sh AGENT ADDRESS COMMAND ...`."""
        pairs = zip(self.addresses, self.names, strict=True)
        lines = "".join(f"{address} {name}\n" for address, name in pairs)
        self._table.write_text(f"127.0.0.1 localhost\n{lines}")
        # As ssh does, give the words to a shell: mpirun sends one line of shell script.
        cases = "".join(
            f'{address}) exec {shlex.join(self.command(host, []))} sh -c "$*" ;;\n'
            for host, address in enumerate(self.addresses)
        )
        self._agent.write_text(
            f'address=$1\nshift\ncase "$address" in\n{cases}esac\n'
            'echo "testbed: no host has the address $address" >&2\nexit 1\n'
        )

    def _remove(self) -> None:
        """Remove this prefix's namespaces. Never raises: it runs while other errors are handled."""
        existing = []
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            listed = [line.split()[0] for line in _run(["ip", "netns", "list"]).splitlines()]
            existing = [name for name in listed if self._owns(name)]
        for wanted in (signal.SIGTERM, signal.SIGKILL):
            signalled = [self._signal(name, wanted) for name in existing]  # all of them, not
            if not any(signalled):  # only up to the first that has processes
                break
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline and any(map(self._processes, existing)):
                time.sleep(0.05)
        for name in existing:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                _run(["ip", "netns", "delete", name])

    def _owns(self, name: str) -> bool:
        return re.fullmatch(rf"{re.escape(self._prefix)}(switch|[0-9]+)", name) is not None

    def _processes(self, name: str) -> list[int]:
        try:
            return [int(pid) for pid in _run(["ip", "netns", "pids", name]).split()]
        except (OSError, subprocess.CalledProcessError):
            return []

    def _signal(self, name: str, number: signal.Signals) -> bool:
        processes = self._processes(name)
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return bool(processes)


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Let a second Ctrl-C wait until the hosts are gone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    held = signal.pthread_sigmask(signal.SIG_BLOCK, interrupts)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def run(command: Sequence[str], variables: Mapping[str, str] | None = None) -> int:
    """Run a command to its end and return its status; ends it if this process is interrupted."""
    process = subprocess.Popen(command, env={**os.environ, **(variables or {})})
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            # Politely first: launchers end their ranks and remove their own files.
            with _no_interrupts():
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hosts", type=int, help="number of hosts (default 4, or that of --rates)")
    parser.add_argument(
        "--rate", default="1gbit", help="speed of the links, or SENDING/RECEIVING (default 1gbit)"
    )
    parser.add_argument("--rates", help="one for each host, separated by commas")
    parser.add_argument("--slots", type=int, default=1, help="ranks on each host (default 1)")
    parser.add_argument("--prefix", default="gq", help="of the hosts' names (default gq)")
    parser.add_argument("command", nargs="+", help="what to run on host 0, after --")
    arguments = parser.parse_args()
    rates = arguments.rates.split(",") if arguments.rates else arguments.rate
    hosts = arguments.hosts or (len(rates) if arguments.rates else 4)
    try:
        testbed = Testbed(hosts, rates, arguments.prefix)
    except ValueError as error:
        parser.error(str(error))
    if reason := unavailable():
        print(f"testbed: {reason}", file=sys.stderr)
        return 1
    as_root()
    with testbed:
        launchers = {
            "{mpirun}": ["mpirun", *testbed.mpirun_args(arguments.slots)],
            "{horovodrun}": ["horovodrun", *testbed.horovodrun_args(arguments.slots)],
        }
        command: list[str] = []
        for word in arguments.command:
            command += launchers.get(word, [word])
        variables = testbed.horovodrun_environment() if "{horovodrun}" in arguments.command else {}
        try:
            return run(testbed.command(0, command), variables)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
