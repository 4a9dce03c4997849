"""Run a job of k8s/overlays on this machine: the launcher's command, with ranks over loopback.

    python tools/rehearse.py gke-64xa100/deeplight/all --ranks 4 64 --samples 2048 \
        --set PRESET=criteo-small --methods "none fp16 standard" -- --max-steps=32

The command is the one that `kubectl kustomize` makes of the overlay. Changed are its paths, the
network interface, mpirun's way to this machine's ranks, and what the options below say. Options of
the training script stand behind `--`; an option that the manifest has too is replaced.

Where many ranks share a core, those that wait sleep (tools/patience.cpp): else they would take the
core from those that compute. Then times say nothing.

A single rank reduces nothing with Horovod, unless the job is elastic: a job of one rank gets
HOROVOD_ELASTIC=1, so that gradients are compressed.

Runs go to a folder for each number of ranks. At the end there is a table of losses, bytes and
memory, then `gq-horovod report` on all of them; both are in rehearsal.txt too. Started again with
the same command, a job of all methods leaves out those that have finished.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from gq_horovod.research import report  # noqa: E402
from tools import ranks as launcher  # noqa: E402

OVERLAYS = ROOT / "k8s" / "overlays"
IN_IMAGE = "/opt/gq-horovod/"  # where the Dockerfile puts the repository
MANY = 4  # ranks of a core, beyond which those that wait have to sleep
# What fits this machine in place of the cluster's: several ranks on a core, and no GPU.
HERE = {"OMP_NUM_THREADS": "1", "DEVICE": "cpu"}


def kustomized(folder: Path) -> str:
    """What `kubectl kustomize` makes of a folder.

    Raises FileNotFoundError without kubectl, ValueError for a folder that it cannot render.
    """
    if not shutil.which("kubectl"):
        raise FileNotFoundError(f"{folder}: expected kubectl, which renders it; install kubectl.")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return done.stdout


def job_of(text: str) -> tuple[dict[str, str], list[str]]:
    """The settings of a rendered job, and the words of its launcher's command behind gq-launch."""
    documents = {document["kind"]: document for document in yaml.safe_load_all(text)}
    replicas = documents["MPIJob"]["spec"]["mpiReplicaSpecs"]
    (container,) = replicas["Launcher"]["template"]["spec"]["containers"]
    assert container["command"] == ["gq-launch"], container["command"]
    return dict(documents["ConfigMap"]["data"]), list(container["args"])


def command(
    words: Sequence[str],
    settings: Mapping[str, str],
    ranks: int,
    folder: Path,
    more: Sequence[str] = (),
    checkpoints: bool = True,
) -> list[str]:
    """The command of a job on this machine.

    Arguments:
        words: of the launcher's command, with $(KEY) where a setting belongs.
        settings: the ConfigMap's, changed or not.
        ranks: how many mpirun starts.
        folder: in the place of the volumes.
        more: options of the training script.
        checkpoints: False leaves --checkpoint out.
    """
    replaced = {word.partition("=")[0] for word in more if word.startswith("--")}
    if not checkpoints:
        replaced.add("--checkpoint")
    made: list[str] = []
    for written in words:
        word = re.sub(r"\$\((\w+)\)", lambda key: settings[key[1]], written)
        if word.partition("=")[0] in replaced:
            continue
        word = word.replace(IN_IMAGE, f"{ROOT}/").replace("=/results/", f"={folder}/")
        word = re.sub(r"^(--\w+)=/data$", rf"\1={folder}/data", word)
        word = re.sub("^--interface=.*", f"--interface={launcher.LOOPBACK}", word)
        if word == "python":
            word = sys.executable
        made += launcher.mpirun(None, ranks) if word == "mpirun" else [word]
    return [*made, *more]


def environment(words: Sequence[str], settings: Mapping[str, str], ranks: int) -> dict[str, str]:
    """The variables that a job's command passes to the ranks, with the settings' values.

    But LD_LIBRARY_PATH, which names folders of the image.
    """
    passed = {word for before, word in itertools.pairwise(words) if before == "-x"}
    given = {name: settings[name] for name in passed - {"LD_LIBRARY_PATH"}}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if ranks == 1:
        given["HOROVOD_ELASTIC"] = "1"
    return launcher.environment() | given | {"LD_LIBRARY_PATH": "", "PYTHONPATH": path}


def rows_of(runs: Sequence[report.Run], some: int) -> list[dict[str, Any]]:
    """Figures of the runs that have ended: mean losses of the first and last `some` steps."""
    rows = []
    for run in sorted(runs, key=report.order):
        if run.final is None:
            continue
        losses = [loss for event in run.evals for loss in event["train_losses"]]
        held_out = [value for key, value in run.final.items() if key.endswith("_loss")]
        rows.append(
            {
                "method": run.setting,
                "ranks": run.start["ranks"],
                "samples": run.start["ranks"] * run.start["batch_size"],
                "steps": run.final["steps"],
                "first": statistics.fmean(losses[:some]),
                "last": statistics.fmean(losses[-some:]),
                "held_out": held_out[0] if held_out else None,
                "bytes": run.final["bytes_per_step"],
                "memory": run.final.get("peak_memory"),
                "equal": run.final["replicas_equal"],
            }
        )
    return rows


def print_losses(rows: Sequence[dict[str, Any]], some: int, console: Any, table_of: Any) -> None:
    """Print a row for each method and number of ranks."""
    title = f"Training loss: mean of all ranks and of the first and the last {some} steps"
    headings = ["ranks", "samples a step", "steps", "first", "last", "held-out loss"]
    table = table_of(title, ["method"], [*headings, "MB a step", "GB of a rank", "replicas"])
    for row in rows:
        table.add_row(
            row["method"],
            *(str(row[key]) for key in ("ranks", "samples", "steps")),
            f"{row['first']:.4f}",
            f"{row['last']:.4f}",
            "" if row["held_out"] is None else f"{row['held_out']:.4f}",
            f"{row['bytes'] / 1e6:.2f}",
            "" if row["memory"] is None else f"{row['memory'] / 1e9:.2f}",
            "equal" if row["equal"] else "differ",
        )
    console.print(table)


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return key, value


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 if a job has failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("overlay", help="CLUSTER/WORKLOAD/METHOD, below k8s/overlays")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="a job for each (2)")
    parser.add_argument(
        "--samples", type=int, help="of all ranks and a step, in place of BATCH_SIZE for each rank"
    )
    parser.add_argument("--methods", help="of a job of all methods; in place of its METHODS")
    parser.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of the job's ConfigMap",
    )
    parser.add_argument("--output", type=Path, default=Path("results/rehearsal"))
    parser.add_argument("--some", type=int, default=4, help="steps of which losses are means (4)")
    parser.add_argument("--no-checkpoints", action="store_true", help="for want of disk")
    given = list(sys.argv[1:] if arguments is None else arguments)
    own = given.index("--") if "--" in given else len(given)
    more = given[own + 1 :]  # of the training script
    options = parser.parse_args(given[:own])
    try:
        config, words = job_of(kustomized(OVERLAYS / options.overlay))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    changes = HERE | dict(options.set)
    if options.methods is not None:
        changes["METHODS"] = options.methods
    for key in changes:
        if key not in config:
            parser.error(f"{key}: expected a key of the job's, {', '.join(config)}")
    if options.samples and (bad := [n for n in options.ranks if options.samples % n]):
        parser.error(f"--samples: expected a multiple of --ranks, got {options.samples} and {bad}")
    failed = False
    for ranks in options.ranks:
        settings = config | changes
        if options.samples:
            settings["BATCH_SIZE"] = str(options.samples // ranks)
        folder = options.output.resolve() / f"{ranks}-ranks"
        folder.mkdir(parents=True, exist_ok=True)
        made = command(words, settings, ranks, folder, more, not options.no_checkpoints)
        variables = environment(words, settings, ranks)
        if ranks > MANY * len(os.sched_getaffinity(0)):
            variables |= launcher.patience(folder, 2000)
        print("rehearse:", " ".join(made), file=sys.stderr, flush=True)
        failed |= subprocess.run(made, env=variables).returncode != 0
    return 1 if not summarize(options.output, options.some) or failed else 0


def summarize(folder: Path, some: int) -> bool:
    """Print the table of losses and the report; returns whether there are any runs."""
    from rich.console import Console

    from gq_horovod.cli import output

    try:
        runs, remarks = report.collect(folder)
    except ValueError as error:
        print(f"rehearse: {error}", file=sys.stderr)
        return False
    _, table_of = output.rich()
    rows = rows_of(runs, some)
    with (folder / "rehearsal.txt").open("w") as file:
        for console in (Console(width=140), Console(width=140, file=file)):
            print_losses(rows, some, console, table_of)
            report.print_tables(report.summarize(runs), remarks, console, table_of)
    (folder / "rehearsal.json").write_text(json.dumps(rows, indent=2) + "\n")
    return True


if __name__ == "__main__":
    sys.exit(main())
