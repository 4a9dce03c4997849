"""The Kubernetes manifests: good as they are, and every check rejects a broken copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from checks import (
    K8S,
    OVERLAYS,
    builtin_complaints,
    complaints_about,
    only,
    render,
)

LOCAL = "overlays/local-cpu/standard"


def test_there_is_an_overlay_for_every_cluster_and_method() -> None:
    clusters = {path.name for path in (K8S / "clusters").iterdir()}
    methods = {path.name for path in (K8S / "methods").iterdir()}
    assert clusters == {"local-cpu", "gke-64xa100"}
    assert methods == {"none", "fp16", "standard", "exponential"}
    assert set(OVERLAYS) == {f"overlays/{c}/{m}" for c in clusters for m in methods}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay(overlay: str) -> None:
    documents = render(K8S / overlay)
    assert complaints_about(documents) == []
    _, cluster, method = overlay.split("/")
    config, job = only(documents, "ConfigMap")["data"], only(documents, "MPIJob")
    assert config["COMPRESSION"] == method
    # One name for all that is of one method, or two methods would overwrite each other.
    names = {
        config["RUN"],
        job["metadata"]["name"],
        only(documents, "ConfigMap")["metadata"]["name"],
    }
    assert names == {f"deeplight-{method}"}
    workers = job["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"]
    assert workers == {"local-cpu": 2, "gke-64xa100": 64}[cluster]
    # The learning rate was chosen for this many samples in a step.
    assert workers * int(config["BATCH_SIZE"]) == 2048


def test_methods_differ_in_names_and_compression_only() -> None:
    def without_method(overlay: str) -> str:
        method = overlay.split("/")[-1]
        text = yaml.safe_dump_all(render(K8S / overlay))
        return text.replace(f"deeplight-{method}", "NAME").replace(f"COMPRESSION: {method}", "")

    for cluster in ("local-cpu", "gke-64xa100"):
        overlays = [overlay for overlay in OVERLAYS if f"/{cluster}/" in overlay]
        assert len(overlays) == 4
        assert len({without_method(overlay) for overlay in overlays}) == 1


def test_the_pod_for_results() -> None:
    pod = yaml.safe_load((K8S / "results" / "pod.yaml").read_text())
    assert builtin_complaints([pod]) == []
    claim = pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == only(render(K8S / LOCAL), "PersistentVolumeClaim")["metadata"]["name"]
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
