"""The manifests, and the Pods that the operator would make of them, before a real API server.

Any server does: KUBECONFIG names its configuration. Nothing stays on it but a namespace while the
tests run, and the definition of MPIJobs if it had none: everything else is a dry run.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
import yaml
from checks import CRD, K8S, OVERLAYS, Document, only, pods, render

LIMIT_SECONDS = 120


def kubectl(*arguments: str, documents: list[Document] | None = None) -> tuple[int, str]:
    """Run kubectl, with documents as its input; returns its status and what it printed."""
    done = subprocess.run(
        ["kubectl", "--request-timeout=60s", *arguments],
        input=None if documents is None else yaml.safe_dump_all(documents),
        stdin=subprocess.DEVNULL if documents is None else None,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """A namespace on the server, which knows MPIJobs."""
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("KUBECONFIG names no API server to check the manifests with")
    status, output = kubectl("version", "-o", "json")
    assert status == 0, output
    if kubectl("get", "crd", "mpijobs.kubeflow.org")[0] != 0:
        if not CRD.is_file():
            pytest.skip("the API server knows no MPIJob, and its definition is not there")
        status, output = kubectl("apply", "--server-side", "-f", str(CRD))
        assert status == 0, output
        # Not `kubectl wait`, which fails as long as the server has not written any condition; and
        # what is misspelt is only noticed once the schema is published.
        end = time.monotonic() + LIMIT_SECONDS
        while "v2beta1.MPIJob" not in kubectl("get", "--raw", "/openapi/v2")[1]:
            assert time.monotonic() < end
            time.sleep(0.2)
    name = f"gq-test-{os.getpid()}"
    status, output = kubectl("create", "namespace", name)
    assert status == 0, output
    yield name
    kubectl("delete", "namespace", name, "--wait=false")


def dry_run(namespace: str, documents: list[Document]) -> tuple[int, str]:
    """Have the server check documents as if they were applied."""
    options = ("--dry-run=server", "--validate=strict", "--namespace", namespace, "-f", "-")
    return kubectl("apply", *options, documents=documents)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_accepted(overlay: str, namespace: str) -> None:
    documents = render(K8S / overlay)
    status, output = dry_run(namespace, documents)
    assert status == 0, output
    assert output.count("(server dry run)") == len(documents), output


@pytest.mark.parametrize("overlay", [overlay for overlay in OVERLAYS if overlay.endswith("/none")])
def test_pods_of_an_overlay_are_accepted(overlay: str, namespace: str) -> None:
    status, output = dry_run(namespace, list(pods(only(render(K8S / overlay), "MPIJob")).values()))
    assert status == 0, output


def test_the_pod_for_results_is_accepted(namespace: str) -> None:
    pod = yaml.safe_load((K8S / "results" / "pod.yaml").read_text())
    status, output = dry_run(namespace, [pod])
    assert status == 0, output


def test_the_job_that_prepares_criteo_s_file_is_accepted(namespace: str) -> None:
    documents = render(K8S / "criteo")
    if '"podReplacementPolicy"' not in kubectl("get", "--raw", "/openapi/v2")[1]:
        del only(documents, "Job")["spec"]["podReplacementPolicy"]  # the server is older than it
    status, output = dry_run(namespace, documents)
    assert status == 0, output


def misspelt(documents: list[Document]) -> None:
    spec = only(documents, "MPIJob")["spec"]
    spec["slotPerWorker"] = spec.pop("slotsPerWorker")


def misspelt_in_a_pod(documents: list[Document]) -> None:
    worker = only(documents, "MPIJob")["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]
    worker["container"] = worker.pop("containers")


def wrong_type(documents: list[Document]) -> None:
    only(documents, "MPIJob")["spec"]["slotsPerWorker"] = "one"


def missing(documents: list[Document]) -> None:
    del only(documents, "MPIJob")["spec"]["mpiReplicaSpecs"]


def misspelt_policy(documents: list[Document]) -> None:
    spec = only(documents, "NetworkPolicy")["spec"]
    spec["podSelektor"] = spec.pop("podSelector")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (misspelt, "slotPerWorker"),
        (misspelt_in_a_pod, "containers"),
        (wrong_type, "slotsPerWorker"),
        (missing, "mpiReplicaSpecs"),
        (misspelt_policy, "podSelektor"),
    ],
)
def test_what_is_broken_is_rejected(
    damage: Callable[[list[Document]], None], named: str, namespace: str
) -> None:
    documents = render(K8S / "overlays/local-cpu/deeplight/standard")
    damage(documents)
    status, output = dry_run(namespace, documents)
    assert status != 0, output
    assert named in output


def test_a_mount_without_its_volume_is_rejected(namespace: str) -> None:
    """The server looks into a job's Pods only when the operator makes them."""
    documents = render(K8S / "overlays/local-cpu/deeplight/standard")
    worker = pods(only(documents, "MPIJob"))["Worker"]
    worker["spec"]["volumes"].pop()
    status, output = dry_run(namespace, [worker])
    assert status != 0, output
    assert "volumeMounts" in output
