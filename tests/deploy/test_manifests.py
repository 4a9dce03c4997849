"""The Kubernetes manifests: good as they are, and every check rejects a broken copy."""

from __future__ import annotations

import ast
import copy
import shutil
from pathlib import Path

import pytest
import yaml
from checks import (
    K8S,
    OVERLAYS,
    ROOT,
    builtin_complaints,
    complaints_about,
    container_complaints,
    only,
    pods,
    render,
)

LOCAL = "overlays/local-cpu/deeplight/standard"


WORKERS = {"local-cpu": 2, "gke-64xa100": 64}
# Samples, streams or images of a step of all ranks, which the learning rates were chosen for.
GLOBAL_BATCH = {
    ("deeplight", "local-cpu"): 2048,
    ("deeplight", "gke-64xa100"): 2048,
    ("transformer-xl", "local-cpu"): 16,
    ("transformer-xl", "gke-64xa100"): 256,
    ("wide-resnet", "local-cpu"): 64,
    ("wide-resnet", "gke-64xa100"): 2048,
}


def test_there_is_an_overlay_for_every_cluster_workload_and_method() -> None:
    clusters = {path.name for path in (K8S / "clusters").iterdir()}
    workloads = {path.name for path in (K8S / "workloads").iterdir()}
    methods = {path.name for path in (K8S / "methods").iterdir()}
    assert clusters == {"local-cpu", "gke-64xa100"}
    assert workloads == {"deeplight", "transformer-xl", "wide-resnet"}
    assert methods == {"none", "fp16", "standard", "exponential"}
    assert set(OVERLAYS) == {
        f"overlays/{c}/{w}/{m}" for c in clusters for w in workloads for m in methods
    }


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
    assert workers * int(config["BATCH_SIZE"]) == GLOBAL_BATCH[workload, cluster]


@pytest.mark.parametrize("overlay", [overlay for overlay in OVERLAYS if overlay.endswith("/none")])
def test_a_workload_has_the_hyperparameters_of_its_preset(overlay: str) -> None:
    """The manifests name the learning rate and epochs that the preset has anyway."""
    config = only(render(K8S / overlay), "ConfigMap")["data"]
    script = ast.parse((ROOT / "examples" / config["EXAMPLE"] / "train.py").read_text())
    presets = {
        key.value: value
        for node in ast.walk(script)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Dict)
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


def test_methods_differ_in_names_and_compression_only() -> None:
    def without_method(overlay: str) -> str:
        _, _, workload, method = overlay.split("/")
        text = yaml.safe_dump_all(render(K8S / overlay))
        return text.replace(f"{workload}-{method}", "NAME").replace(f"COMPRESSION: {method}", "")

    for workload, cluster in GLOBAL_BATCH:
        overlays = [overlay for overlay in OVERLAYS if f"/{cluster}/{workload}/" in overlay]
        assert len(overlays) == 4
        assert len({without_method(overlay) for overlay in overlays}) == 1


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
