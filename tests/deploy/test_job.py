"""A job of two workers, wired as the MPI operator does it, in containers of the built image.

Slow, and in need of root, podman and the image, so it runs only when asked for:

    GQ_TEST_IMAGE=localhost/gq-horovod:0.1.0 python -m pytest tests/deploy/test_job.py -s

Commands, settings and users are those of the rendered local-cpu overlay. What the operator adds is
made here: addresses and names of the workers, the hostfile, the mounted keys, the environment. The
launcher starts some seconds before the workers, so their names have no address at first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from checks import K8S, only, pods, render

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
STEPS = 4
# Of the operator's launcher Pod.
OPERATORS_ENVIRONMENT = {
    "K_MPI_JOB_ROLE": "launcher",
    "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
    "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
    "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
    "OMPI_MCA_orte_set_default_slots": "1",
}


@pytest.fixture
def podman(tmp_path: Path):
    """Run podman; its network and containers are removed afterwards."""
    (tmp_path / "containers.conf").write_text(CONTAINERS_CONF)
    environment = {**os.environ, "CONTAINERS_CONF": str(tmp_path / "containers.conf")}
    network = f"gq-test-{os.getpid()}"
    made: list[str] = []

    def run(*arguments: object, check: bool = True) -> str:
        done = subprocess.run(
            ["podman", *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0 or not check, done.stdout
        return done.stdout

    def start(name: str, *arguments: object) -> None:
        made.append(f"{network}-{name}")
        net = f"{network}:alias={name}.deeplight-standard.default.svc"
        run("run", "--detach", "--name", made[-1], "--hostname", name, "--network", net, *arguments)

    run.start = start  # type: ignore[attr-defined]
    run.full = lambda name: f"{network}-{name}"  # type: ignore[attr-defined]
    run("network", "create", "--internal", "--subnet", "10.213.77.0/24", network)
    yield run
    for name in made:
        run("rm", "--force", "--time", "1", name, check=False)
    run("network", "rm", network, check=False)


@pytest.mark.parametrize("user", [1000, 0], ids=["mpiuser", "root"])
def test_two_workers_train(podman, user: int, tmp_path: Path) -> None:
    documents = render(K8S / "overlays" / "local-cpu" / "deeplight" / "standard")
    job, config = only(documents, "MPIJob"), only(documents, "ConfigMap")["data"]
    (launcher,) = pods(job)["Launcher"]["spec"]["containers"]
    (worker,) = pods(job)["Worker"]["spec"]["containers"]
    command = [
        re.sub(r"\$\((\w+)\)", lambda match: config[match[1]], word)
        for word in [*launcher["command"], *launcher["args"], f"--max-steps={STEPS}"]
    ]
    home = "/home/mpiuser" if user else "/root"
    ssh_server = worker["command"] if user else ["/usr/sbin/sshd", "-De"]

    keys = tmp_path / "ssh"
    keys.mkdir()
    keygen = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-m", "PEM", "-N", ""]
    subprocess.run([*keygen, "-f", str(keys / "id_rsa")], check=True)
    shutil.copy(keys / "id_rsa.pub", keys / "authorized_keys")
    for key in keys.iterdir():
        key.chmod(0o644 if user else 0o600)
    mpi = tmp_path / "mpi"
    mpi.mkdir()
    names = [f"deeplight-standard-worker-{rank}" for rank in range(2)]
    (mpi / "hostfile").write_text(
        "".join(f"{name}.deeplight-standard.default.svc slots=1\n" for name in names)
    )
    for folder in ("results", *names):
        (tmp_path / folder).mkdir()
        os.chown(tmp_path / folder, user, user)

    security = ["--user", f"{user}:{user}", "--volume", f"{keys}:{home}/.ssh:ro"]
    if user:  # as the manifests have it
        security += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    environment = {**config, **OPERATORS_ENVIRONMENT}
    if not user:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    settings = [word for pair in environment.items() for word in ("--env", "=".join(pair))]
    mount = ["--volume", f"{mpi}:/etc/mpi:ro"]

    began = time.monotonic()
    podman.start("launcher", *security, *settings, *mount, IMAGE, *command)
    time.sleep(3)
    early = podman("logs", podman.full("launcher"))
    for name in names:
        volumes = [f"{tmp_path / 'results'}:/results", f"{tmp_path / name}:/data"]
        mounts = [word for volume in volumes for word in ("--volume", volume)]
        podman.start(name, *security, *mounts, IMAGE, *ssh_server)
    status = podman("wait", podman.full("launcher")).strip()
    output = podman("logs", podman.full("launcher"))
    print(f"\n{time.monotonic() - began:.0f} s from the start of the launcher\n{output}")
    assert status == "0", output + podman("logs", podman.full(names[0]), check=False)
    # It waited for the names: without them nothing may have started.
    assert "starting mpirun" not in early
    assert "starting mpirun" in output

    (metrics,) = (tmp_path / "results").glob("*.jsonl")
    assert metrics.name == "deeplight-standard.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    start, final = lines[0], lines[-1]
    assert (start["event"], start["ranks"], start["hosts"]) == ("start", 2, 2)
    assert (final["event"], final["steps"], final["replicas_equal"]) == ("final", STEPS, True)
    # 8-bit codes: a rank sends little more than a byte for each parameter, not four. Counted by the
    # kernel on eth0, so the codes went between the containers.
    assert 0.5 < final["bytes_per_step"] / start["parameters"] < 2.5
