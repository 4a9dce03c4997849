"""Horovod elastic over Gloo: a worker is killed, and training goes on from the last commit.

Horovod never uses the host of a failed worker again, so that one has a host of its own, and one
that replaces it comes from another. All of them are names of this machine.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from elastic_job import ASK_AT, COMMIT_EVERY, KILL_AT, STEPS, undisturbed
from launcher import Job, launch
from seldom import Record, cases, rarely

# Some twenty seconds on idle cores, and thirty more where a worker that is not the lost one's
# neighbour finds out by Gloo's time limit. The script itself ends a hang after 250.
LIMIT_SECONDS = 360
SCRIPTS = {
    "torch": Path(__file__).with_name("elastic.py"),
    "tensorflow": Path(__file__).with_name("elastic_tf.py"),
}
KERAS_2 = {"TF_USE_LEGACY_KERAS": "1"}  # the one that Horovod's states know
COMMITTED = KILL_AT // COMMIT_EVERY * COMMIT_EVERY
JOINED = (ASK_AT // COMMIT_EVERY + 1) * COMMIT_EVERY  # the commit after the news
OTHER_HOST = "127.1"  # a third name of the same address


def let_it_find_hosts(directory: Path, condition: str = "false") -> None:
    """Write the script that discovers two hosts, and a third one if a command of sh succeeds."""
    let_it_list(
        directory,
        *("echo localhost:2", "echo 127.0.0.1:1"),
        f"if {condition}; then echo {OTHER_HOST}:1; fi",
    )


def let_it_list(directory: Path, *lines: str) -> None:
    """Write the script that discovers hosts."""
    discovery = directory / "hosts.sh"
    discovery.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    discovery.chmod(0o755)


def run(
    directory: Path,
    *options: object,
    framework: str = "torch",
    condition: str = "false",
    fewest: int | None = None,
) -> Job:
    """Train on two hosts, of which one is lost; a third one is there on a condition."""
    let_it_find_hosts(directory, condition)
    command = [SCRIPTS[framework], *options]
    job = launch("elastic", 3, command, LIMIT_SECONDS, directory, KERAS_2, fewest=fewest)
    assert not job.timed_out, job.report()
    assert job.status == 0, job.report()
    assert re.search(rf"KILLED {KILL_AT}\b", job.output), job.report()
    return job


def steps_of(job: Job) -> list[tuple[str, int, int, int]]:
    """Host, step, world size and levels of every step of every worker."""
    found = re.findall(r"STEP (\S+) (\d+) (\d+) (\d+) ", job.output)
    return [(host, int(step), int(size), int(levels)) for host, step, size, levels in found]


def final_loss(job: Job, workers: int, framework: str = "torch") -> float:
    """The same on all workers, which have nothing of the sessions before (as PyTorch's say)."""
    left = re.findall(r"LEFT (.*)", job.output)
    assert left == ["0 0 0 1 0"] * workers * (framework == "torch"), job.report()
    done = re.findall(r"DONE ([\d.e+-]+) (\w+)", job.output)
    assert done == [done[0]] * workers, job.report()  # replicas equal bit for bit
    return float(done[0][0])


@rarely
def test_a_killed_worker(tmp_path: Path, record_property: Record) -> None:
    job = run(tmp_path)
    steps = steps_of(job)
    # Eight bits: floor(127 / 3) levels, and then floor(127 / 2).
    assert {(size, levels) for *_, size, levels in steps} == {(3, 42), (2, 63)}
    assert {step for _, step, size, _ in steps if size == 3} >= set(range(KILL_AT))
    assert {step for _, step, size, _ in steps if size == 2} == set(range(COMMITTED, STEPS))
    ratio = final_loss(job, 2) / undisturbed()
    assert ratio == pytest.approx(1, rel=0.05)
    record_property("job", f"elastic: from 3 workers to 2, final loss {ratio:.4f} of exact steps'")


# With "auto" long enough for all its trials after the newcomer has joined.
LENGTHS = {"standard": STEPS, "two-hop": STEPS, "exponential": STEPS, "auto": 140}


JOBS = [
    *(("torch", "levels", levels) for levels in LENGTHS),
    *(("tensorflow", "way", way) for way in ("tape", "eager", "keras")),
    *(("tensorflow", "levels", levels) for levels in ("two-hop", "exponential", "auto")),
]


@pytest.mark.parametrize(("framework", "option", "value"), cases({JOBS[0], JOBS[4]}, JOBS))
def test_a_killed_worker_is_replaced(
    framework: str, option: str, value: str, tmp_path: Path, record_property: Record
) -> None:
    """By one on another host, which joins at a commit: three workers, two, three."""
    wanted = tmp_path / "wanted"
    last = LENGTHS.get(value, STEPS)
    options = (f"--{option}", value, "--steps", last, "--ask", wanted)
    job = run(tmp_path, *options, framework=framework, condition=f"[ -e {wanted} ]")
    steps = steps_of(job)
    if option == "way" or value == "standard":
        # The headroom is that of the workers who are there.
        assert {(size, levels) for *_, size, levels in steps} == {(3, 42), (2, 63)}
    before = {step for _, step, size, _ in steps if size == 3 and step < JOINED}
    assert before >= set(range(KILL_AT))
    assert {step for _, step, size, _ in steps if size == 2} == set(range(COMMITTED, JOINED))
    after = sorted((step, host) for host, step, size, _ in steps if size == 3 and step >= JOINED)
    hosts = [OTHER_HOST, "localhost", "localhost"]
    assert after == [(step, host) for step in range(JOINED, last) for host in hosts], job.report()
    check_starts(job, [(0, 3), (COMMITTED, 2), (JOINED, 3)])
    ratio = final_loss(job, 3, framework) / undisturbed(last)
    assert ratio == pytest.approx(1, rel=0.05)
    (decided,) = set(re.findall(r"DONE \S+ \w+ (.*)", job.output))
    assert (value == "auto") == (decided != "None"), job.report()
    text = f"from 3 workers to 2 to 3, final loss {ratio:.4f} of exact steps'"
    record_property("job", f"elastic, {framework}, {value}: {text}")


def check_starts(job: Job, expected: list[tuple[int, int]]) -> None:
    """Assert that workers began to train at these steps, so many of them.

    All begin with the same state, newcomers too, and with dither that was not used before.
    """
    found = re.findall(r"START \S+ (\d+) (\d+) (\d+) (\w+)", job.output)
    starts = {(int(step), int(size), int(first), digest) for step, size, first, digest in found}
    assert len(found) == sum(size for _, size in expected), job.report()
    assert sorted((step, size) for step, size, *_ in starts) == expected, job.report()
    firsts = sorted((step, first) for step, _, first, _ in starts)
    assert firsts[0] == (0, 0), job.report()
    assert firsts[1][1] >= KILL_AT, job.report()  # it may have begun this one
    for (step, first), (later, then) in pairwise(firsts[1:]):
        assert then - first == later - step, job.report()


@rarely
@pytest.mark.parametrize("levels", ["standard", "two-hop"])
def test_by_nodes_of_which_one_leaves(levels: str, tmp_path: Path, record_property: Record) -> None:
    """Two nodes of two workers, then one, with the process sets of that.

    No worker is killed: Horovod 0.28.1 then ends all others where there are process sets.
    """
    left = tmp_path / "left"
    second = f"if [ ! -e {left} ]; then echo {OTHER_HOST}:2; fi"
    let_it_list(tmp_path, "echo localhost:2", second)
    command = [SCRIPTS["torch"], "--by-nodes", "--levels", levels, "--ask", left]
    variables = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"}
    job = launch("elastic", 4, command, LIMIT_SECONDS, tmp_path, variables, fewest=2)
    assert (job.status, job.timed_out) == (0, False), job.report()
    steps = steps_of(job)
    if levels == "standard":  # of eight bits, for as many as there are nodes
        assert {(size, count) for *_, size, count in steps} == {(4, 63), (2, 127)}
    assert {step for _, step, size, _ in steps if size == 4} == set(range(JOINED))
    assert {step for _, step, size, _ in steps if size == 2} == set(range(JOINED, STEPS))
    check_starts(job, [(0, 4), (JOINED, 2)])
    ratio = final_loss(job, 2) / undisturbed()
    assert ratio == pytest.approx(1, rel=0.05)
    text = f"2 nodes of 2 workers, then 1; final loss {ratio:.4f} of exact steps'"
    record_property("job", f"elastic, by nodes, {levels}: {text}")


WATCHDOG_SECONDS = 40  # Gloo gives up first, after 30
AFTER_MINUTES = 1.2


@rarely
def test_waiting_for_a_replacement(tmp_path: Path, record_property: Record) -> None:
    """A job that goes on with three only. To wait for a host is nothing that the watchdog ends."""
    lost = tmp_path / "lost"
    options = ("--timeout", WATCHDOG_SECONDS, "--last-word", lost)
    condition = f'[ -n "$(find {lost} -mmin +{AFTER_MINUTES} 2>/dev/null)" ]'
    job = run(tmp_path, *options, condition=condition, fewest=3)
    steps = steps_of(job)
    assert {size for _, _, size, _ in steps} == {3}
    assert {step for host, step, *_ in steps if host == OTHER_HOST} == set(range(COMMITTED, STEPS))
    check_starts(job, [(0, 3), (COMMITTED, 3)])
    ratio = final_loss(job, 3) / undisturbed()
    assert ratio == pytest.approx(1, rel=0.05)
    record_property(
        "job", f"elastic: 3 workers, a pause, 3; final loss {ratio:.4f} of exact steps'"
    )
