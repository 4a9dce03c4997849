"""Checks of the Kubernetes manifests. Each returns what it complains about; good manifests give [].

The server's own checks are loose where it hurts: a CRD drops misspelt fields silently, and the MPI
operator ignores words that it does not know. So the schema is closed here, and the rules that only
the operator's documentation states are written out.
"""

from __future__ import annotations

import ast
import copy
import re
import shutil
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import tomllib
import yaml

from tools import rehearse
from tools.rehearse import IN_IMAGE

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(
    str(path.parent.relative_to(K8S)) for path in K8S.glob("overlays/*/*/*/kustomization.yaml")
)
CRD = ROOT.parent / "shared" / "data" / "mpijob-crd.yaml"
KUBERNETES = "1.31"  # schemas of the built-in kinds
# Beside what the launcher's command names: Open MPI's session directory, on launcher and workers,
# and Python's temporary files. test_images.py checks that the image's settings name no other place.
WRITTEN_BY_THE_IMAGE = ("/tmp",)
# The operator adds these to the Pods; a manifest may mount neither and need not declare them.
OPERATORS_VOLUMES = {"ssh-auth", "mpi-job-config"}
# A container's own has 64 MiB: Open MPI 4.1 takes 4 for each rank, and NCCL more for each channel.
SHARED_MEMORY = "/dev/shm"
# What the operator knows, and ignores or falls back from when it reads anything else.
WORDS = {
    "launcherCreationPolicy": {"AtStartup", "WaitForWorkersReady"},
    "cleanPodPolicy": {"None", "Running", "All"},
    "restartPolicy": {"Never", "OnFailure"},  # Always and ExitCode make no sense for a batch job
}

Document = dict[str, Any]


@cache
def kustomized(folder: Path) -> str:
    """Return what `kubectl kustomize` makes of a folder."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    return rehearse.kustomized(folder)


def render(folder: Path) -> list[Document]:
    """Return the documents that `kubectl kustomize` makes of a folder, new ones at each call."""
    return list(yaml.safe_load_all(kustomized(folder)))


def only(documents: list[Document], kind: str) -> Document:
    """Return the one document of a kind."""
    (found,) = (document for document in documents if document["kind"] == kind)
    return found


def pods(job: Document) -> dict[str, Document]:
    """Return launcher and worker as the Pods that the operator makes of their templates."""
    made = {}
    for role, replica in job["spec"]["mpiReplicaSpecs"].items():
        template = copy.deepcopy(replica["template"])
        template["metadata"]["name"] = f"{job['metadata']['name']}-{role.lower()}"
        template["spec"]["restartPolicy"] = replica.get("restartPolicy", "Never")
        made[role] = {"apiVersion": "v1", "kind": "Pod", **template}
    return made


# ----------------------------------------------------------------------------------------- schemas


def closed(schema: Any) -> Any:
    """Return the schema with no further field allowed wherever it lists some."""
    if isinstance(schema, list):
        return [closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    result = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties"):
            result[key] = {name: closed(entry) for name, entry in value.items()}
        else:
            result[key] = closed(value)
    if "properties" in schema:
        result.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
    return result


@cache
def mpijob_schema() -> jsonschema.Draft202012Validator:
    """Return the closed schema of an MPIJob, with the operator's words as enumerations."""
    if not CRD.is_file():
        pytest.skip(f"the MPIJob schema is not there: {CRD}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # safe, and fast where it is built
    definition = yaml.load(CRD.read_text(), Loader=loader)  # noqa: S506
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v2beta1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    spec = schema["properties"]["spec"]["properties"]
    replica = spec["mpiReplicaSpecs"].pop("additionalProperties")
    spec["mpiReplicaSpecs"].update(
        properties={"Launcher": replica, "Worker": replica},
        required=["Launcher", "Worker"],
        additionalProperties=False,
    )
    spec["launcherCreationPolicy"]["enum"] = sorted(WORDS["launcherCreationPolicy"])
    run_policy = spec["runPolicy"]["properties"]
    run_policy["cleanPodPolicy"]["enum"] = sorted(WORDS["cleanPodPolicy"])
    replica["properties"]["restartPolicy"]["enum"] = sorted(WORDS["restartPolicy"])
    replica["required"] = ["replicas", "restartPolicy", "template"]
    return jsonschema.Draft202012Validator(schema)


def mpijob_complaints(documents: list[Document]) -> list[str]:
    """Check the MPIJob against its schema."""
    job = only(documents, "MPIJob")
    return [
        f"MPIJob {'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in mpijob_schema().iter_errors(job)
    ]


def builtin_complaints(documents: list[Document]) -> list[str]:
    """Check the built-in kinds, and the Pods that the operator will make, against Kubernetes'."""
    builtin = [document for document in documents if document["kind"] != "MPIJob"]
    for document in documents:
        if document["kind"] == "MPIJob":
            builtin += pods(document).values()
    complaints = []
    for document in builtin:
        try:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(map(str, error.path))
            complaints.append(f"{document['kind']} {path}: {error.message}")
    return complaints


# --------------------------------------------------------------------------------------- agreement


def version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def options_of(script: Path) -> set[str]:
    """Return the options that a script's argument parser knows, read without running it.

    Those of the loop that the examples share are its own.
    """
    loop = script.parents[1] / "common" / "loop.py"
    texts = [script.read_text()]
    if "from common import loop" in texts[0]:
        texts.append(loop.read_text())
    return {
        node.args[0].value
        for text in texts
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add_argument"
        and isinstance(node.args[0], ast.Constant)
    }


def operator_complaints(documents: list[Document]) -> list[str]:
    """Check what the operator wants and no schema says."""
    job = only(documents, "MPIJob")
    name, replicas = job["metadata"]["name"], job["spec"]["mpiReplicaSpecs"]
    complaints = []
    if replicas["Launcher"]["replicas"] != 1:
        complaints.append("Launcher: the operator makes one launcher, whatever `replicas` says")
    last = f"{name}-worker-{replicas['Worker']['replicas'] - 1}"
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", last):
        complaints.append(f"{last}: not a DNS-1035 label of at most 63 characters")
    if job["spec"].get("runPolicy", {}).get("cleanPodPolicy", "None") == "None":
        complaints.append("cleanPodPolicy: workers, and their nodes, would stay after the job")
    if job["spec"]["sshAuthMountPath"] != "/home/mpiuser/.ssh":
        complaints.append("sshAuthMountPath: mpiuser's ssh does not look for keys there")
    return complaints


def slot_complaints(documents: list[Document]) -> list[str]:
    """Check that a worker with several ranks has what each of them needs."""
    job, config = only(documents, "MPIJob"), only(documents, "ConfigMap")["data"]
    slots = job["spec"].get("slotsPerWorker", 1)
    worker = pods(job)["Worker"]
    (container,) = worker["spec"]["containers"]
    limits = container["resources"]["limits"]
    gpus = limits.get("nvidia.com/gpu", "0")
    complaints = []
    if gpus not in ("0", str(slots)):
        complaints.append(f"Worker: {slots} ranks have {gpus} GPUs")
    if slots == 1:
        return complaints
    if int(limits["cpu"]) < slots * int(config["OMP_NUM_THREADS"]):
        complaints.append(f"Worker: the threads of {slots} ranks have {limits['cpu']} cores")
    shared = {
        mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == SHARED_MEMORY
    }
    volumes = [own for own in worker["spec"]["volumes"] if own["name"] in shared]
    if not any(own.get("emptyDir", {}).get("medium") == "Memory" for own in volumes):
        complaints.append(f"Worker: {slots} ranks have no memory at {SHARED_MEMORY}")
    if config.get("HOROVOD_DYNAMIC_PROCESS_SETS") != "1":
        complaints.append("HOROVOD_DYNAMIC_PROCESS_SETS: nodes could get no process sets")
    (launcher,) = pods(job)["Launcher"]["spec"]["containers"]
    if ("--map-by", "slot") not in pairwise(launcher["args"]):
        complaints.append("mpirun: ranks of one worker need not follow each other")
    return complaints


def reference_complaints(documents: list[Document]) -> list[str]:
    """Check that what one document names, another has."""
    job = only(documents, "MPIJob")
    config = only(documents, "ConfigMap")
    claims = {d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"}
    policy = only(documents, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    complaints = []
    for role, pod in pods(job).items():
        spec, labels = pod["spec"], pod["metadata"]["labels"]
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        mounts = {m["name"] for c in spec["containers"] for m in c.get("volumeMounts", [])}
        complaints += [
            f"{role}: the mounted volume {mount} is not declared" for mount in mounts - set(volumes)
        ]
        complaints += [
            f"{role}: the volume {name} is not mounted" for name in set(volumes) - mounts
        ]
        complaints += [
            f"{role}: the volume {name} is the operator's"
            for name in OPERATORS_VOLUMES & {*volumes}
        ]
        claimed = {
            volume["persistentVolumeClaim"]["claimName"]
            for volume in volumes.values()
            if "persistentVolumeClaim" in volume
        }
        complaints += [f"{role}: there is no claim {claim}" for claim in claimed - claims]
        if not policy.items() <= labels.items():
            complaints.append(f"{role}: the NetworkPolicy does not select its Pods")
        for rule in spec.get("topologySpreadConstraints", []):
            if not rule["labelSelector"]["matchLabels"].items() <= labels.items():
                complaints.append(f"{role}: the topology spread does not count its own Pods")
        for container in spec["containers"]:
            for source in container.get("envFrom", []):
                name = source["configMapRef"]["name"]
                if name != config["metadata"]["name"]:
                    complaints.append(f"{role}: there is no ConfigMap {name}")
            ports = {port["name"]: port for port in container.get("ports", [])}
            probe = container.get("readinessProbe")
            if probe and probe["tcpSocket"]["port"] not in ports:
                complaints.append(f"{role}: there is no port {probe['tcpSocket']['port']}")
    if "topologySpreadConstraints" not in pods(job)["Worker"]["spec"]:
        complaints.append("Worker: several may share a node")
    return complaints


def command_complaints(documents: list[Document]) -> list[str]:
    """Check that the launcher's command, the ConfigMap and the program agree."""
    (launcher,) = pods(only(documents, "MPIJob"))["Launcher"]["spec"]["containers"]
    config = only(documents, "ConfigMap")["data"]
    arguments = launcher["args"]
    complaints = []
    expanded = set(re.findall(r"\$\((\w+)\)", " ".join(arguments)))
    exported = {name for flag, name in pairwise(arguments) if flag == "-x"}
    read = expanded | exported
    complaints += [f"no container reads the ConfigMap's key {key}" for key in set(config) - read]
    complaints += [f"the ConfigMap has no key {key}" for key in read - set(config)]
    # As Kubernetes puts the ConfigMap's values into the arguments.
    arguments = [
        re.sub(r"\$\((\w+)\)", lambda key: config.get(key[1], key[0]), argument)
        for argument in arguments
    ]
    scripts = [argument for argument in arguments if argument.endswith(".py")]
    for script in scripts:
        source = ROOT / script.removeprefix(IN_IMAGE)
        if not script.startswith(IN_IMAGE) or not source.is_file():
            complaints.append(f"{script} is not in the image")
            continue
        after = arguments[arguments.index(script) + 1 :]
        after = after[: after.index("--")] if "--" in after else after  # what it runs itself
        given = {argument.partition("=")[0] for argument in after}
        complaints += [f"{script} has no {option}" for option in given - options_of(source)]
    if not scripts:
        complaints.append("the launcher runs no script")
    worker = pods(only(documents, "MPIJob"))["Worker"]
    paths = {
        option: value
        for option, _, value in (argument.partition("=") for argument in arguments)
        if option in ("--cache", "--metrics", "--checkpoint", "--data")
    }
    for option in ("--cache", "--metrics", "--checkpoint"):
        if option not in paths:
            complaints.append(f"{option} is not given")
    for option, value in paths.items():
        if (option, value) == ("--data", "synthetic"):  # made on the fly
            continue
        lasting = option != "--cache"  # which a worker prepares anew
        if not lies_under(value, writable(worker, lasting)):
            kind = "claimed volume" if lasting else "volume"
            complaints.append(f"{option}: no worker has a {kind} at {value}")
    return complaints


def image_complaints(documents: list[Document]) -> list[str]:
    """Check that all containers run one image, with a tag, of this version."""
    images = {
        container["image"]
        for pod in pods(only(documents, "MPIJob")).values()
        for container in pod["spec"]["containers"]
    }
    complaints = [
        # An `images:` entry that matches nothing changes nothing and is no error to kustomize.
        f"image {image}: expected the tag {version()}"
        for image in images
        if image.rpartition(":")[2] != version()
    ]
    if len(images) != 1:
        complaints.append(f"launcher and workers run different images: {sorted(images)}")
    return complaints


def container_complaints(role: str, pod: Document) -> list[str]:
    """Check what the containers of a Pod may do, write and use up, whoever runs in them."""
    spec = pod["spec"]
    complaints = []
    if spec.get("automountServiceAccountToken") is not False:
        complaints.append(f"{role}: has a token of the cluster's API")
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        context = {**spec.get("securityContext", {}), **container.get("securityContext", {})}
        if context.get("readOnlyRootFilesystem") is not True:
            complaints.append(f"{role}: can write to its root file system")
        if context.get("allowPrivilegeEscalation") is not False:
            complaints.append(f"{role}: may escalate privileges")
        if context.get("capabilities", {}).get("drop") != ["ALL"]:
            complaints.append(f"{role}: keeps capabilities")
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            complaints.append(f"{role}: makes system calls without a seccomp profile")
        if not {"cpu", "memory"} <= container.get("resources", {}).get("limits", {}).keys():
            complaints.append(f"{role}: has no limits of cpu and memory")
    return complaints


def writable(pod: Document, lasting: bool = False) -> set[str]:
    """Return where the first container of a Pod can write: the mount paths of its volumes.

    lasting: only of those that outlive the Pod, being claimed.
    """
    claimed = {v["name"] for v in pod["spec"].get("volumes", []) if "persistentVolumeClaim" in v}
    return {
        mount["mountPath"]
        for mount in pod["spec"]["containers"][0].get("volumeMounts", [])
        if not mount.get("readOnly") and (not lasting or mount["name"] in claimed)
    }


def lies_under(path: str, places: set[str]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


def security_complaints(documents: list[Document]) -> list[str]:
    """Check that nothing runs as root, may become root, or lacks a place that it writes to."""
    complaints = []
    for role, pod in pods(only(documents, "MPIJob")).items():
        context = pod["spec"].get("securityContext", {})
        if context.get("runAsNonRoot") is not True or context.get("runAsUser") != 1000:
            complaints.append(f"{role}: does not run as mpiuser, uid 1000")
        complaints += container_complaints(role, pod)
        complaints += [
            f"{role}: no volume at {path}, where the image writes"
            for path in WRITTEN_BY_THE_IMAGE
            if not lies_under(path, writable(pod))
        ]
        complaints += [
            f"{role}: the volume {volume['name']} has no sizeLimit and can fill the node's disk"
            for volume in pod["spec"].get("volumes", [])
            if "sizeLimit" not in volume.get("emptyDir", {"sizeLimit": ""})
        ]
    return complaints


def complaints_about(documents: list[Document]) -> list[str]:
    """Return what the checks complain about: later ones rely on what the schemas require."""
    agreement = (
        operator_complaints,
        slot_complaints,
        reference_complaints,
        command_complaints,
        image_complaints,
        security_complaints,
    )
    return (
        mpijob_complaints(documents)
        or builtin_complaints(documents)
        or [complaint for check in agreement for complaint in check(documents)]
    )
