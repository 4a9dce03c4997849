"""What the watchdog counts, and the end that it makes."""

from __future__ import annotations

import subprocess
import sys

from gq_horovod.guards.watchdog import Watchdog

TIMEOUT = 10.0
PAUSE = TIMEOUT / 20


def test_what_waits_for_too_long_is_named() -> None:
    watchdog = Watchdog(TIMEOUT)
    assert watchdog.pause == PAUSE
    waiting = {1: "a", 2: "b"}
    looks = 0
    while (late := watchdog.look(waiting, PAUSE)) is None:
        looks += 1
        waiting = {1 + looks: "a", 2: "b"}  # the first one moves on
    assert late == "b"
    assert looks == 20


def test_what_is_done_is_forgotten() -> None:
    watchdog = Watchdog(TIMEOUT)
    for look in range(100):
        assert watchdog.look({} if look % 15 == 0 else {1: "a"}, PAUSE) is None


def test_time_in_which_the_whole_job_was_suspended_does_not_count() -> None:
    watchdog = Watchdog(TIMEOUT)
    watchdog.look({1: "a"}, PAUSE)
    assert watchdog.look({1: "a"}, 1e6) is None
    for _ in range(17):
        assert watchdog.look({1: "a"}, PAUSE) is None
    assert watchdog.look({1: "a"}, PAUSE) == "a"


def test_a_long_timeout_is_looked_at_more_often_than_twenty_times() -> None:
    assert Watchdog(1800).pause == 5


STUCK = """
import threading, time
from gq_horovod.guards import watchdog
watchdog.start(0.2, lambda: 3, "GlobalQSGD", lambda: {1: "weight"})
threading.Event().wait()
"""
CHANGING = """
import time
from gq_horovod.guards import watchdog
looks = []
def waiting():
    looks.append(None)
    if len(looks) < 3:
        raise RuntimeError("dictionary changed size during iteration")
    return {}
thread = watchdog.start(0.2, lambda: 3, "GlobalQSGD", waiting)
while len(looks) < 5:
    time.sleep(0.01)
print(thread.is_alive())
"""
GONE = """
from gq_horovod.guards import watchdog
thread = watchdog.start(0.2, lambda: 3, "GlobalQSGD", lambda: None)
thread.join(30)
print(thread.is_alive())
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_the_process_ends_with_an_error_and_a_traceback() -> None:
    done = python(STUCK)
    assert done.returncode == 1
    assert "GlobalQSGD: rank 3 on " in done.stderr
    assert "the operation 'weight' has not moved for 0.2 s" in done.stderr
    assert "pass a larger GlobalQSGD(timeout=), or None." in done.stderr
    assert "threading.py" in done.stderr  # where the main thread waits


def test_it_ends_with_what_it_watches() -> None:
    assert python(GONE).stdout.strip() == "False"


def test_it_looks_again_where_the_main_thread_was_faster() -> None:
    assert python(CHANGING).stdout.strip() == "True"
