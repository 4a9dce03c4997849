"""`gq-horovod doctor` and `gq-horovod env`: what is wrong here, and what is installed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ..advisor import doctor
from .output import columns


def add_to(commands: Any) -> None:
    """The command's arguments."""
    sub = commands.add_parser("doctor", help="what is wrong with this installation or cluster")
    sub.set_defaults(run=run_doctor)
    sub.add_argument("--json", action="store_true", help="print plain data")

    sub = commands.add_parser("env", help="what is installed here, for bug reports")
    sub.set_defaults(run=print_env)
    sub.add_argument("--json", action="store_true", help="print plain data")


def run_doctor(options: argparse.Namespace) -> int:
    """`gq-horovod doctor`, alone or in every rank; 1 if something is wrong."""
    found = doctor.facts()
    findings = doctor.diagnose(found)
    comm = doctor.world()
    if comm is not None:
        findings = doctor.merge(comm.allgather(findings)) + doctor.cluster(comm, found)
    document = doctor.document(found, findings)
    if comm is None or comm.rank == 0:
        if options.json:
            print(json.dumps(document, indent=2))
        else:
            print_findings(findings)
    return int(document["wrong"] > 0)


def print_findings(findings: Sequence[doctor.Finding]) -> None:
    """A line for each, and below them what to do."""
    rows = []
    for finding in findings:
        short = finding.found if len(finding.found) <= 80 else f"{finding.found[:77]}..."
        rows.append((finding.what, finding.status, short))
    print(columns(rows), end="\n\n")
    for finding in findings:
        if finding.remedy:
            print(f"{finding.what} ({finding.status}): {finding.found}")
            print(f"    {finding.remedy}")
    if not any(finding.status == "wrong" for finding in findings):
        print("Nothing is wrong.")


def print_env(options: argparse.Namespace) -> None:
    """`gq-horovod env`: for bug reports."""
    found = doctor.facts()
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        print(f"{name}: {value}")
