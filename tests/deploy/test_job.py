"""Jobs of two workers, wired as the MPI operator does it, in containers of the built image.

Slow, and in need of root, podman and the image, so it runs only when asked for:

    GQ_TEST_IMAGE=localhost/gq-horovod:0.1.0 python -m pytest tests/deploy/test_job.py -s

Commands, users, volumes and what a container may do are those of the rendered local-cpu overlays:
`as_podman_says_it` translates a Pod, so the root file system is read-only here as it is there, and
nothing can be written but where the manifests mount a volume. What the operator adds is made here:
addresses and names of the workers, the hostfile, the mounted keys, the environment. The launcher
starts some seconds before the workers, so their names have no address at first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from checks import K8S, ROOT, Document, only, pods, render

IMAGE = os.environ.get("GQ_TEST_IMAGE", "")
pytestmark = [
    pytest.mark.skipif(not IMAGE, reason="GQ_TEST_IMAGE names no image to run a job in"),
    pytest.mark.skipif(os.geteuid() != 0, reason="containers with addresses need root"),
    pytest.mark.skipif(not shutil.which("podman"), reason="podman is not installed"),
]
# Plain files and runc: no systemd is needed to run containers.
CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=30000:30000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
# Seconds; on two cores that other work kept busy, a job took up to 215.
JOB_LIMIT = 1200
# Of the operator's launcher Pod.
OPERATORS_ENVIRONMENT = {
    "K_MPI_JOB_ROLE": "launcher",
    "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
    "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
    "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
    "OMPI_MCA_orte_set_default_slots": "1",
}


# ---------------------------------------------------------------------------------- a Pod in podman


def in_bytes(quantity: str) -> int:
    """The bytes that a quantity in the manifests means, such as 3Gi."""
    number, unit = quantity[:-2], quantity[-2:]
    return int(number) * {"Mi": 2**20, "Gi": 2**30}[unit]


def as_podman_says_it(pod: Document, volumes: dict[str, Path]) -> list[str]:
    """Translate what a Pod lets its container do into options of `podman run`.

    volumes: the folder on this machine behind each of the Pod's volumes.
    """
    spec = pod["spec"]
    (container,) = spec["containers"]
    context = {**spec.get("securityContext", {}), **container.get("securityContext", {})}
    # podman's own seccomp profile is what RuntimeDefault means; it applies unless switched off.
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    user, group = context["runAsUser"], context.get("runAsGroup", 0)
    options = ["--user", f"{user}:{group}"]
    if "fsGroup" in context:
        options += ["--group-add", str(context["fsGroup"])]
    if context.get("readOnlyRootFilesystem"):
        # podman would mount a /tmp, /run and /var/tmp of its own.
        options += ["--read-only", "--read-only-tmpfs=false"]
    if context.get("allowPrivilegeEscalation") is False:
        options += ["--security-opt", "no-new-privileges"]
    for verb in ("drop", "add"):
        for capability in context.get("capabilities", {}).get(verb, []):
            options += [f"--cap-{verb}", capability]
    options += ["--memory", str(in_bytes(container["resources"]["limits"]["memory"]))]
    for mount in container.get("volumeMounts", []):
        mode = "ro" if mount.get("readOnly") else "rw"
        options += ["--volume", f"{volumes[mount['name']]}:{mount['mountPath']}:{mode}"]
    return options


def command_of(pod: Document, config: dict[str, str]) -> list[str]:
    """Return what the container of a Pod runs, with the ConfigMap's values put in."""
    (container,) = pod["spec"]["containers"]
    return [
        re.sub(r"\$\((\w+)\)", lambda match: config[match[1]], word)
        for word in [*container["command"], *container.get("args", [])]
    ]


class Job:
    """The containers of one MPIJob, started one by one.

    user: None for the manifests' own; 0 for root, whose sshd needs capabilities.
    """

    def __init__(self, overlay: str, folder: Path, network: str, user: int | None = None) -> None:
        documents = render(K8S / "overlays" / "local-cpu" / overlay)
        self.name = only(documents, "MPIJob")["metadata"]["name"]
        self.config = only(documents, "ConfigMap")["data"]
        self.pods = pods(only(documents, "MPIJob"))
        self.results = folder / "results"  # the claimed volume, as k8s/results/pod.yaml leaves it
        self._folder, self._network, self._made = folder, network, list[str]()
        self._environment = {**self.config, **OPERATORS_ENVIRONMENT}
        # The workers have a machine together here: a rank that waits must not take a core.
        self._environment["OMPI_MCA_mpi_yield_when_idle"] = "1"
        home = "/home/mpiuser"
        if user == 0:
            home = "/root"
            self._environment |= {
                "OMPI_ALLOW_RUN_AS_ROOT": "1",
                "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            }
            for pod in self.pods.values():
                pod["spec"]["securityContext"] |= {"runAsUser": 0, "runAsGroup": 0}
                context = pod["spec"]["containers"][0]["securityContext"]
                del context["allowPrivilegeEscalation"], context["capabilities"]
            self.pods["Worker"]["spec"]["containers"][0]["command"] = ["/usr/sbin/sshd", "-De"]
        self.workers = [f"{self.name}-worker-{rank}" for rank in range(2)]
        self._mounts = ["--volume", f"{self._keys(user == 0)}:{home}/.ssh:ro"]
        (folder / "mpi").mkdir()
        hosts = "".join(f"{name}.{self.name}.default.svc slots=1\n" for name in self.workers)
        (folder / "mpi" / "hostfile").write_text(hosts)
        self.results.mkdir()
        os.chown(self.results, 1000 if user is None else user, 1000 if user is None else user)

    def _keys(self, of_root: bool) -> Path:
        keys = self._folder / "ssh"
        keys.mkdir()
        keygen = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-m", "PEM", "-N", ""]
        subprocess.run([*keygen, "-f", str(keys / "id_rsa")], check=True)
        shutil.copy(keys / "id_rsa.pub", keys / "authorized_keys")
        for key in keys.iterdir():
            key.chmod(0o600 if of_root else 0o644)
        return keys

    def _volumes(self, pod: Document, name: str) -> dict[str, Path]:
        """A folder for each volume of a Pod: one that all may write to, or the claim's."""
        volumes = {}
        for volume in pod["spec"].get("volumes", []):
            if "emptyDir" in volume:
                folder = self._folder / f"{name}-{volume['name']}"
                folder.mkdir(exist_ok=True)
                folder.chmod(0o777)  # as the kubelet makes it
            else:
                assert volume["persistentVolumeClaim"]["claimName"] == "gq-results"
                folder = self.results
            volumes[volume["name"]] = folder
        return volumes

    def start(self, role: str, name: str, *more: str, command: list[str] | None = None) -> str:
        """Start a Pod's container; `more` words follow its command. Returns its name.

        For a second time, if it was started before: with the files in the Pod's own volumes.
        """
        pod = self.pods[role]
        full = f"{self._network}-{name}"
        podman("rm", "--force", "--ignore", "--time", "1", full)
        options = as_podman_says_it(pod, self._volumes(pod, name)) + self._mounts
        if role == "Launcher":
            options += ["--volume", f"{self._folder / 'mpi'}:/etc/mpi:ro"]
            for pair in self._environment.items():
                options += ["--env", "=".join(pair)]
        options += ["--network", f"{self._network}:alias={name}.{self.name}.default.svc"]
        self._made.append(full)
        command = [*(command or command_of(pod, self.config)), *more]
        podman("run", "--detach", "--name", full, "--hostname", name, *options, IMAGE, *command)
        return full

    def wait(self, container: str) -> tuple[int, str]:
        """Wait for the end of a container; returns its exit status and its output."""
        status = podman("wait", container, limit=JOB_LIMIT)
        return int(status), podman("logs", container)

    def metrics(self) -> list[dict[str, Any]]:
        """The events of the run."""
        text = (self.results / f"{self.config['RUN']}.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def used(self) -> dict[str, tuple[int, int]]:
        """Bytes in the volumes of each Pod's own, and how many there may be."""
        names = {"launcher": "Launcher", **dict.fromkeys(self.workers, "Worker")}
        used = {}
        for name, role in names.items():
            for volume in self.pods[role]["spec"]["volumes"]:
                if "emptyDir" in volume:
                    folder = self._folder / f"{name}-{volume['name']}"
                    sizes = [path.lstat().st_size for path in folder.rglob("*")]
                    limit = in_bytes(volume["emptyDir"]["sizeLimit"])
                    used[f"{name}-{volume['name']}"] = sum(sizes), limit
        return used

    def remove(self) -> None:
        for container in dict.fromkeys(self._made):
            podman("rm", "--force", "--time", "1", container, check=False)


def podman(*arguments: object, check: bool = True, limit: float = 120) -> str:
    done = subprocess.run(
        ["podman", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
    )
    assert done.returncode == 0 or not check, done.stdout
    return done.stdout


@pytest.fixture
def make_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Job]]:
    """Make Jobs with a network of their own; all is removed afterwards."""
    (tmp_path / "containers.conf").write_text(CONTAINERS_CONF)
    monkeypatch.setenv("CONTAINERS_CONF", str(tmp_path / "containers.conf"))
    network = f"gq-test-{os.getpid()}"
    jobs: list[Job] = []

    def make(overlay: str, user: int | None = None) -> Job:
        jobs.append(Job(overlay, tmp_path, network, user))
        return jobs[-1]

    podman("network", "create", "--internal", network)
    yield make
    for job in jobs:
        job.remove()
    podman("network", "rm", network, check=False)


# -------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(
    ("overlay", "steps", "user"),
    [
        ("deeplight/standard", 4, None),
        ("deeplight/standard", 4, 0),
        ("transformer-xl/exponential", 2, None),
        ("wide-resnet/standard", 2, None),
    ],
    ids=["deeplight", "deeplight-as-root", "transformer-xl", "wide-resnet"],
)
def test_two_workers_train(make_job, overlay: str, steps: int, user: int | None) -> None:
    job = make_job(overlay, user)
    began = time.monotonic()
    launcher = job.start("Launcher", "launcher", f"--max-steps={steps}")
    time.sleep(3)
    early = podman("logs", launcher)
    workers = [job.start("Worker", name) for name in job.workers]
    status, output = job.wait(launcher)
    print(f"\n{time.monotonic() - began:.0f} s from the start of the launcher\n{output}")
    assert status == 0, output + podman("logs", workers[0], check=False)
    # It waited for the names: without them nothing may have started.
    assert "starting mpirun" not in early
    assert "starting mpirun" in output
    assert "Read-only file system" not in output

    events = job.metrics()
    start, final = events[0], events[-1]
    assert (start["event"], start["ranks"], start["hosts"]) == ("start", 2, 2)
    assert (final["event"], final["steps"], final["replicas_equal"]) == ("final", steps, True)
    # 8-bit codes: a rank sends little more than a byte for each parameter, not four. Counted by the
    # kernel on eth0, so the codes went between the containers.
    assert 0.5 < final["bytes_per_step"] / start["parameters"] < 2.5
    checkpoints = job.results / "checkpoints" / job.config["RUN"]
    assert (checkpoints / "latest").read_text().strip() == f"step-{steps:08d}"
    assert len(list((checkpoints / f"step-{steps:08d}").iterdir())) == 3  # shared, two ranks

    print(job.used())
    assert all(used < limit for used, limit in job.used().values())

    # The report, where nothing but the volumes can be written, the plot's caches included.
    report = job.start("Worker", "report", command=["gq-horovod", "report", "/results"])
    status, output = job.wait(report)
    print(output)
    assert status == 0, output
    assert start["workload"] in output
    assert "not a writable" not in output  # matplotlib's warning
    assert list(job.results.glob("report-*.png"))


def test_a_job_resumes_after_a_worker_is_killed(make_job, tmp_path: Path) -> None:
    """What happens then: the operator makes the worker anew, and the launcher starts once more.

    Its Pod, and that of the other worker, keep what is in their /tmp.
    """
    job = make_job("deeplight/standard")
    job.config["CHECKPOINT_EVERY"] = "2"
    workers = [job.start("Worker", name) for name in job.workers]
    launcher = job.start("Launcher", "launcher")
    latest = job.results / "checkpoints" / job.config["RUN"] / "latest"
    end = time.monotonic() + JOB_LIMIT
    while not latest.exists():
        running = podman("inspect", "--format", "{{.State.Running}}", launcher).strip()
        assert running == "true", podman("logs", launcher)
        assert time.monotonic() < end
        time.sleep(0.2)
    began = time.monotonic()
    podman("kill", workers[1])
    status, output = job.wait(launcher)
    print(f"\nthe launcher ended {time.monotonic() - began:.0f} s after the worker\n{output}")
    assert status != 0

    shutil.rmtree(tmp_path / f"{job.workers[1]}-tmp")  # a new Pod has new volumes
    shutil.rmtree(tmp_path / f"{job.workers[1]}-data")
    job.start("Worker", job.workers[1])
    saved = int(latest.read_text().strip().removeprefix("step-"))
    launcher = job.start("Launcher", "launcher", f"--max-steps={saved + 2}")
    status, output = job.wait(launcher)
    print(output)
    assert status == 0, output
    starts = [event for event in job.metrics() if event["event"] == "start"]
    assert [start.get("resumed_from") for start in starts] == [None, saved]
    final = job.metrics()[-1]
    assert (final["event"], final["steps"], final["replicas_equal"]) == ("final", saved + 2, True)


def test_a_killed_launcher_is_followed_by_another(make_job, tmp_path: Path) -> None:
    """Its ranks end, and what Open MPI left in /tmp of three Pods does not stop the next."""
    job = make_job("deeplight/standard")
    mpirun = ["gq-launch", "mpirun", "--bind-to", "none"]
    workers = [job.start("Worker", name) for name in job.workers]
    launcher = job.start("Launcher", "launcher", command=[*mpirun, "sleep", "1000"])

    def sleeping() -> list[bool]:
        return ["sleep 1000" in podman("top", worker, "args") for worker in workers]

    def wait_until(expected: list[bool]) -> None:
        end = time.monotonic() + 120
        while sleeping() != expected:
            assert time.monotonic() < end, podman("logs", launcher)
            time.sleep(0.2)

    wait_until([True, True])
    podman("kill", launcher)
    began = time.monotonic()
    # Ranks that went on without a launcher would write into the next one's checkpoints.
    wait_until([False, False])
    print(f"\nthe ranks had ended {time.monotonic() - began:.1f} s after the launcher")
    assert list((tmp_path / "launcher-tmp").iterdir())  # it had no time to remove them
    launcher = job.start("Launcher", "launcher", command=[*mpirun, "hostname"])
    status, output = job.wait(launcher)
    assert status == 0, output
    assert set(job.workers) <= set(output.split())


def test_without_a_place_to_write_a_job_does_not_start(make_job) -> None:
    """The containers are read-only indeed: the job fails when its launcher lacks /tmp."""
    job = make_job("deeplight/standard")
    job.pods["Launcher"]["spec"]["containers"][0]["volumeMounts"].clear()
    for name in job.workers:
        job.start("Worker", name)
    status, output = job.wait(job.start("Launcher", "launcher", "--max-steps=1"))
    assert status != 0, output
    assert not list(job.results.glob("*.jsonl"))


def test_the_pod_for_results_does_what_the_runbook_wants_of_it(
    make_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each `kubectl exec` of docs/cloud.md, in its order, with podman in the place of kubectl."""
    make_job("deeplight/standard")  # for podman's settings only
    pod = yaml.safe_load((K8S / "results" / "pod.yaml").read_text())
    volume, here = tmp_path / "volume", tmp_path / "here"
    for folder in (volume / "checkpoints", here / "wikitext-103", here / "results" / "cloud"):
        folder.mkdir(parents=True)
    # A job wrote these as mpiuser; the data are of a user whom nobody knows in the Pod.
    for path in (volume / "run.jsonl", volume / "checkpoints" / "latest"):
        path.write_text("step-1\n")
        path.chmod(0o600)
        os.chown(path, 1000, 1000)
    os.chown(volume / "checkpoints", 1000, 1000)
    data = here / "wikitext-103" / "wiki.valid.tokens"
    data.write_text("a b\n")
    for path, mode in ((data, 0o640), (data.parent, 0o750)):
        path.chmod(mode)
        os.chown(path, 4321, 4321)

    name = f"gq-test-{os.getpid()}-volume"
    (tmp_path / "bin").mkdir()
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.write_text(
        f"#!/bin/sh -e\nshift\nif [ $1 = -i ]; then i=-i; shift; fi\n"
        f'[ "$1 $2" = "gq-results --" ]\nshift 2\nexec podman exec $i {name} "$@"\n'
    )
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{kubectl.parent}{os.pathsep}{os.environ['PATH']}")
    options = as_podman_says_it(pod, {"results": volume})
    command = pod["spec"]["containers"][0]["command"]
    # The job's image is the same Debian, with the same tar and chown, as the Pod's own.
    podman("run", "--detach", "--name", name, "--network", "none", *options, IMAGE, *command)
    try:
        end = time.monotonic() + 60
        while volume.stat().st_uid != 1000:
            assert time.monotonic() < end, podman("logs", name)
            time.sleep(0.1)
        runbook = (ROOT / "docs" / "cloud.md").read_text()
        lines = re.findall(r"(?m)^    (.*kubectl exec (?:-i )?gq-results .*)$", runbook)
        assert len(lines) == 6
        for line in lines:
            done = subprocess.run(
                ["bash", "-e", "-o", "pipefail", "-c", line],
                cwd=here,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=60,
            )
            assert (done.returncode, done.stdout) == (0, ""), line
        assert "Read-only" in podman("exec", name, "touch", "/file", check=False)
    finally:
        podman("rm", "--force", "--time", "1", name, check=False)
    assert [path.name for path in (here / "results" / "cloud").iterdir()] == ["run.jsonl"]
    assert not (volume / "checkpoints").exists()
    copied = volume / "data" / "wikitext-103" / "wiki.valid.tokens"
    assert copied.read_text() == "a b\n"
    # mpiuser can read it.
    assert copied.stat().st_mode & 0o004
    assert copied.parent.stat().st_mode & 0o005 == 0o005
