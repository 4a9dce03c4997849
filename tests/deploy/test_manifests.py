"""The Kubernetes manifests: good as they are, and every check rejects a broken copy."""

from __future__ import annotations

import ast
import copy
import re
import shutil
from pathlib import Path
from typing import Any

import each_method
import pytest
import yaml
from checks import (
    IN_IMAGE,
    K8S,
    OVERLAYS,
    ROOT,
    builtin_complaints,
    complaints_about,
    container_complaints,
    lies_under,
    only,
    options_of,
    pods,
    render,
    version,
    writable,
)

LOCAL = "overlays/local-cpu/deeplight/standard"


METHODS = {"none", "fp16", "standard", "exponential", "two-hop", "auto"}
ALL = "all"  # of them, in one job
WORKERS = {"local-cpu": 2, "gke-64xa100": 64, "gke-8x8a100": 8, "gke-64-cpu": 64}
SLOTS = {"gke-8x8a100": 8}  # ranks of a worker, where not one
# Samples, streams or images of a step of all ranks, which the learning rates were chosen for.
GLOBAL_BATCH = {
    ("deeplight", "local-cpu"): 2048,
    ("deeplight", "gke-64xa100"): 64 * 512,  # the paper's
    ("deeplight", "gke-8x8a100"): 64 * 512,
    ("deeplight", "gke-64-cpu"): 2048,
    ("transformer-xl", "local-cpu"): 16,
    ("transformer-xl", "gke-64xa100"): 256,
    ("transformer-xl", "gke-8x8a100"): 256,
    ("wide-resnet", "local-cpu"): 64,
    ("wide-resnet", "gke-64xa100"): 64 * 16,  # the authors'
    ("wide-resnet", "gke-8x8a100"): 64 * 16,
}


def test_there_is_an_overlay_for_every_cluster_workload_and_method() -> None:
    clusters = {path.name for path in (K8S / "clusters").iterdir()}
    workloads = {path.name for path in (K8S / "workloads").iterdir()}
    methods = {path.name for path in (K8S / "methods").iterdir()}
    assert clusters == set(WORKERS)
    assert workloads == {workload for workload, _ in GLOBAL_BATCH}
    assert methods == {*METHODS, ALL}
    assert set(OVERLAYS) == {f"overlays/{c}/{w}/{m}" for w, c in GLOBAL_BATCH for m in methods}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay(overlay: str) -> None:
    documents = render(K8S / overlay)
    assert complaints_about(documents) == []
    _, cluster, workload, method = overlay.split("/")
    config, job = only(documents, "ConfigMap")["data"], only(documents, "MPIJob")
    assert config["COMPRESSION"] == method
    # One name for all that is of one run, or two runs would overwrite each other.
    names = {
        config["RUN"],
        job["metadata"]["name"],
        only(documents, "ConfigMap")["metadata"]["name"],
    }
    assert names == {f"{workload}-{method}"}
    labelled = [job, only(documents, "ConfigMap"), *pods(job).values()]
    assert {d["metadata"]["labels"]["app.kubernetes.io/name"] for d in labelled} == {workload}
    workers = job["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"]
    assert workers == WORKERS[cluster]
    slots = job["spec"]["slotsPerWorker"]
    assert slots == SLOTS.get(cluster, 1)
    assert workers * slots * int(config["BATCH_SIZE"]) == GLOBAL_BATCH[workload, cluster]


@pytest.mark.parametrize("overlay", [overlay for overlay in OVERLAYS if overlay.endswith("/none")])
def test_a_workload_has_the_hyperparameters_of_its_preset(overlay: str) -> None:
    """The manifests name the learning rate and epochs that the preset has anyway."""
    config = only(render(K8S / overlay), "ConfigMap")["data"]
    script = ast.parse((ROOT / "examples" / config["EXAMPLE"] / "train.py").read_text())
    named = {
        node.targets[0].id: node.value
        for node in script.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    presets = {
        key.value: found
        for node in ast.walk(script)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(found := named.get(getattr(value, "id", ""), value), ast.Dict)
        and isinstance(key, ast.Constant)
    }
    preset = {
        key.value: value.value
        for key, value in zip(
            presets[config["PRESET"]].keys, presets[config["PRESET"]].values, strict=True
        )
        if isinstance(value, ast.Constant)
    }
    assert float(config["LEARNING_RATE"]) == preset["lr"]
    assert int(config["EPOCHS"]) == preset["epochs"]


# Of the models of the clusters with A100: as their tests count them.
PARAMETERS = {
    "deeplight": 607_959_381,
    "transformer-xl": 191_950_298,
    "wide-resnet": 126_886_696,
}
GIB = 1 << 30
A100_BYTES = 40 * 10**9
STATE_BYTES = 12  # of a parameter, in a checkpoint: weights and two moments of Adam in float32


@pytest.mark.parametrize("overlay", [own for own in OVERLAYS if "a100/" in own])
def test_a_node_with_a_gpu_trains_on_it_and_holds_the_model(overlay: str) -> None:
    assert gpu_complaints(render(K8S / overlay), overlay.split("/")[2]) == []


def gpu_complaints(documents: list[dict[str, Any]], workload: str) -> list[str]:
    """What keeps a workload from training on its node's GPU, or its state from fitting."""
    config, job = only(documents, "ConfigMap")["data"], only(documents, "MPIJob")
    (worker,) = pods(job)["Worker"]["spec"]["containers"]
    limits, volumes = worker["resources"]["limits"], only(documents, "PersistentVolumeClaim")
    state = PARAMETERS[workload] * STATE_BYTES
    found = []
    slots = job["spec"]["slotsPerWorker"]
    if config["DEVICE"] != "cuda" or limits.get("nvidia.com/gpu") != str(slots):
        found.append("the model is not on the GPU")
    # On the GPU a gradient beside it, and as much again for what is reduced and for activations.
    if state + 2 * 4 * PARAMETERS[workload] > A100_BYTES:
        found.append("the model does not fit on the GPU")
    # A rank that resumes reads the whole state into host memory.
    if int(limits["memory"].removesuffix("Gi")) * GIB < slots * (2 * state + 8 * GIB):
        found.append("the state does not fit into host memory")
    # A new checkpoint is whole before the one before it goes; six methods, each with its own.
    storage = volumes["spec"]["resources"]["requests"]["storage"]
    if int(storage.removesuffix("Ti")) << 40 < 2 * len(METHODS) * state:
        found.append("the checkpoints of all methods do not fit into the volume")
    return found


def test_a_node_with_a_gpu_that_does_not_use_it() -> None:
    documents = render(K8S / "overlays/gke-64xa100/deeplight/none")
    only(documents, "ConfigMap")["data"]["DEVICE"] = "cpu"
    spec = only(documents, "MPIJob")["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]
    spec["containers"][0]["resources"]["limits"]["memory"] = "16Gi"
    assert gpu_complaints(documents, "deeplight") == [
        "the model is not on the GPU",
        "the state does not fit into host memory",
    ]


def test_methods_differ_in_names_and_compression_only() -> None:
    def without_method(overlay: str) -> str:
        _, _, workload, method = overlay.split("/")
        text = yaml.safe_dump_all(render(K8S / overlay))
        return text.replace(f"{workload}-{method}", "NAME").replace(f"COMPRESSION: {method}", "")

    for workload, cluster in GLOBAL_BATCH:
        overlays = [f"overlays/{cluster}/{workload}/{method}" for method in METHODS]
        assert len({without_method(overlay) for overlay in overlays}) == 1


@pytest.mark.parametrize("overlay", [own for own in OVERLAYS if own.endswith(f"/{ALL}")])
def test_a_job_of_all_methods_is_each_of_them(overlay: str) -> None:
    """What it runs for a method is the command of that method's own overlay."""
    documents = render(K8S / overlay)
    config = only(documents, "ConfigMap")["data"]
    assert set(config["METHODS"].split()) == METHODS

    def words(documents: list[dict[str, Any]]) -> list[str]:
        (launcher,) = pods(only(documents, "MPIJob"))["Launcher"]["spec"]["containers"]
        own = only(documents, "ConfigMap")["data"]
        return [re.sub(r"\$\((\w+)\)", lambda key: own[key[1]], a) for a in launcher["args"]]

    begin = ["python", f"{IN_IMAGE}examples/each_method.py", f"--methods={config['METHODS']}", "--"]
    assert words(documents)[: len(begin)] == begin
    for method in config["METHODS"].split():
        its_own = words(render(K8S / overlay.removesuffix(ALL) / method))
        assert each_method.command_for(method, words(documents)[len(begin) :]) == its_own
    # Its time is that of all of them.
    alone = render(K8S / overlay.removesuffix(ALL) / "none")
    limits = [
        only(found, "MPIJob")["spec"]["runPolicy"]["activeDeadlineSeconds"]
        for found in (documents, alone)
    ]
    assert limits[0] == len(METHODS) * limits[1]
    # The launcher looks there for what has finished.
    launcher = pods(only(documents, "MPIJob"))["Launcher"]
    assert "/results" in writable(launcher, lasting=True)


def test_the_pod_for_results() -> None:
    pod = yaml.safe_load((K8S / "results" / "pod.yaml").read_text())
    assert builtin_complaints([pod]) == []
    claim = pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == only(render(K8S / LOCAL), "PersistentVolumeClaim")["metadata"]["name"]
    # It runs as root, to give the volume away; all else is as in the Pods of a job.
    assert container_complaints("results", pod) == []
    (container,) = pod["spec"]["containers"]
    assert set(container["securityContext"]["capabilities"]["add"]) == {"CHOWN", "DAC_OVERRIDE"}
    for setting in ("readOnlyRootFilesystem", "allowPrivilegeEscalation", "capabilities"):
        broken = copy.deepcopy(pod)
        del broken["spec"]["containers"][0]["securityContext"][setting]
        assert len(container_complaints("results", broken)) == 1
    pod["spec"]["activeDeadlineSecond"] = pod["spec"].pop("activeDeadlineSeconds")
    assert "activeDeadlineSecond" in str(builtin_complaints([pod]))


def criteo_complaints(documents: list[dict[str, Any]]) -> list[str]:
    """What keeps the Job that prepares Criteo's file from doing so in the runs' volume."""
    job = only(documents, "Job")
    pod = {"apiVersion": "v1", "kind": "Pod", **job["spec"]["template"]}
    pod["metadata"]["name"] = job["metadata"]["name"]
    found = builtin_complaints(documents) + container_complaints("criteo", pod)
    (container,) = pod["spec"]["containers"]
    script, *_ = [word for word in container["command"] if word.endswith(".py")]
    source = ROOT / script.removeprefix(IN_IMAGE)
    if not source.is_file():
        return [*found, f"{script} is not in the image"]
    options = dict(word.partition("=")[::2] for word in container["args"] if word.startswith("--"))
    found += [f"{script} has no {name}" for name in set(options) - options_of(source)]
    paths = [options["--output"], *(w for w in container["args"] if not w.startswith("--"))]
    found += [
        f"no claimed volume at {path}"
        for path in paths
        if not lies_under(path, writable(pod, lasting=True))
    ]
    claims = {v["persistentVolumeClaim"]["claimName"] for v in pod["spec"]["volumes"][1:]}
    if claims != {only(render(K8S / LOCAL), "PersistentVolumeClaim")["metadata"]["name"]}:
        found.append(f"{claims}: not the volume of the runs")
    if pod["spec"]["securityContext"]["runAsUser"] != 1000:
        found.append("the files would not be mpiuser's")
    spec = job["spec"]
    if spec.get("parallelism", 1) != 1 or spec.get("podReplacementPolicy") != "Failed":
        found.append("two Pods may write at the same time")
    return found


def test_the_job_that_prepares_criteo_s_file() -> None:
    documents = render(K8S / "criteo")
    assert criteo_complaints(documents) == []
    (container,) = only(documents, "Job")["spec"]["template"]["spec"]["containers"]
    # The image of the other manifests.
    assert container["image"] == f"localhost/gq-horovod:{version()}"
    # The folder is the one that docs/cloud.md has training read.
    assert "DATA: /results/data/criteo" in (ROOT / "docs" / "cloud.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("prepare_criteo.py", "prepare.py", "is not in the image"),
        ("--preset=paper", "--sample=paper", "has no --sample"),
        ("--output=/results/", "--output=/data/", "no claimed volume at /data/data/criteo"),
        ("claimName: gq-results", "claimName: results", "not the volume of the runs"),
        ("runAsUser: 1000", "runAsUser: 1001", "the files would not be mpiuser's"),
        ("readOnlyRootFilesystem: true", "privileged: false", "can write to its root"),
        ("backoffLimit", "backOffLimit", "backOffLimit"),
        ("podReplacementPolicy: Failed", "suspend: false", "two Pods may write at the same time"),
        ("backoffLimit: 3", "parallelism: 2", "two Pods may write at the same time"),
    ],
)
def test_a_broken_job_for_criteo_is_rejected(
    old: str, new: str, complaint: str, tmp_path: Path
) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    file = tmp_path / "k8s" / "criteo" / "job.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    assert complaint in "\n".join(criteo_complaints(render(tmp_path / "k8s" / "criteo")))


BROKEN = yaml.safe_load((Path(__file__).parent / "broken.yaml").read_text())


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken["case"].replace(" ", "-"))
def test_broken_copy_is_rejected(broken: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    file = tmp_path / "k8s" / broken["file"]
    text = file.read_text()
    assert broken["old"] in text
    file.write_text(text.replace(broken["old"], broken["new"], 1))
    complaints = complaints_about(render(tmp_path / "k8s" / broken.get("overlay", LOCAL)))
    assert broken["complaint"] in "\n".join(complaints)


def test_broken_copies_are_of_every_kind() -> None:
    """Each file, and each check, is broken at least once."""
    files = {str(p.relative_to(K8S)) for p in (K8S / "base").glob("*.yaml")}
    assert files - {"base/kustomization.yaml"} <= {broken["file"] for broken in BROKEN}
    assert len({broken["case"] for broken in BROKEN}) == len(BROKEN)
