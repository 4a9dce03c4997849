"""Train DeepFwFM on the flights with Horovod: one rank of it, an ordinary Horovod script.

    mpirun -np 4 python train.py --compression standard

The only lines that know about Global-QSGD are those of `choose_compression`. Rank 0 appends what it
measures to --metrics, one JSON object a line: "start"; "step" after each step, with its own loss;
"eval" after each evaluation, with the loss of every step since the last one, averaged over the
ranks; "final".
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import zlib
from pathlib import Path
from typing import Any

import data
import horovod.torch as hvd
import torch
from model import DeepFwFM
from sklearn.metrics import roc_auc_score
from torch.nn.functional import binary_cross_entropy_with_logits


def choose_compression(name: str, bits: int | None, seed: int, transport: Any) -> Any:
    """Return the `compression=` argument of DistributedOptimizer for a method's name."""
    if name == "none":
        return hvd.Compression.none
    if name == "fp16":
        return hvd.Compression.fp16
    from gq_horovod.torch import GlobalQSGD

    return GlobalQSGD(levels=name, bits=bits, seed=seed, transport=transport)


def bytes_sent(interface: str) -> int:
    """Return the bytes that left this host through `interface`, protocol headers included.

    Linux keeps one such file for each network namespace. On loopback everything that ranks of one
    host send to each other passes here.
    """
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    raise ValueError(f"--interface {interface}: expected one that /proc/net/dev lists")


def evaluate(model: DeepFwFM, fields: torch.Tensor, late: torch.Tensor) -> tuple[float, float]:
    """Return (AUC, mean loss) on the test flights; this rank computes its share of the logits.

    fields (N, F) int32 and late (N,) float32 are this rank's share, with N differing by at most 1.
    """
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(part) for part in fields.split(4096)])
    model.train()
    logits = hvd.allgather(logits, name="test.logits")
    late = hvd.allgather(late, name="test.late")
    return roc_auc_score(late, logits), binary_cross_entropy_with_logits(logits, late).item()


def replicas_equal(model: DeepFwFM) -> bool:
    """Whether all ranks hold the same parameters, bit for bit."""
    checksum = 0
    for parameter in model.parameters():
        checksum = zlib.crc32(parameter.detach().numpy().tobytes(), checksum)
    checksums = hvd.allgather(torch.tensor([checksum], dtype=torch.int64), name="checksums")
    return bool((checksums == checksum).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    methods = ["none", "fp16", "standard", "exponential", "two-hop", "auto"]
    parser.add_argument("--compression", choices=methods, default="none")
    parser.add_argument("--bits", type=int, help="of a code; the default suits the world size")
    parser.add_argument("--transport", choices=["horovod", "mpi"], default="horovod")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=512, help="samples per rank and step")
    parser.add_argument("--lr", type=float, default=2e-3, help="falls linearly to 0")
    parser.add_argument("--eval-every", type=int, default=16, help="steps between evaluations")
    parser.add_argument("--max-steps", type=int, help="stop early, for a quick trial")
    parser.add_argument("--cache", type=Path, default=Path("results"), help="for prepared data")
    parser.add_argument("--metrics", type=Path, help="file to append JSON lines to")
    parser.add_argument("--interface", default="lo", help="network interface that MPI uses")
    arguments = parser.parse_args()

    hvd.init()
    torch.manual_seed(arguments.seed)
    if hvd.rank() == 0:
        data.load(arguments.cache)
    hvd.barrier()
    train, test = data.load(arguments.cache)
    rank, size = hvd.rank(), hvd.size()
    test_fields = torch.from_numpy(test.fields[rank::size].copy())  # Horovod wants it contiguous
    test_late = torch.from_numpy(test.late[rank::size].copy())

    model = DeepFwFM(data.TABLE_ROWS, data.NUM_FIELDS)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.Adam(model.parameters(), lr=arguments.lr),
        named_parameters=model.named_parameters(),
        compression=choose_compression(
            arguments.compression, arguments.bits, arguments.seed, arguments.transport
        ),
    )
    global_batch = arguments.batch_size * size
    steps_per_epoch = len(train.late) // global_batch
    num_steps = steps_per_epoch * arguments.epochs
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.0, total_iters=num_steps
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    def report(event: str, **values: Any) -> None:
        if rank == 0 and arguments.metrics:
            with arguments.metrics.open("a") as file:
                file.write(json.dumps({"event": event, **values}) + "\n")

    report(
        "start",
        steps=min(num_steps, arguments.max_steps or num_steps),
        ranks=size,
        hosts=size // hvd.local_size(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        train_flights=len(train.late),
        test_flights=len(test.late),
    )

    shuffle = torch.Generator().manual_seed(arguments.seed)  # the same order on every rank
    step = 0
    seconds = 0.0  # training only: evaluation and start-up are left out
    sent = 0  # bytes, by this host, likewise
    times: list[float] = []
    losses: list[torch.Tensor] = []  # of this rank, since the last evaluation
    hvd.barrier()
    clock, counter = time.perf_counter(), bytes_sent(arguments.interface)
    for _ in range(arguments.epochs):
        order = torch.randperm(len(train.late), generator=shuffle).numpy()
        for first in range(0, steps_per_epoch * global_batch, global_batch):
            began = time.perf_counter()
            rows = order[first + rank : first + global_batch : size]
            optimizer.zero_grad()
            logits = model(torch.from_numpy(train.fields[rows]))
            loss = binary_cross_entropy_with_logits(logits, torch.from_numpy(train.late[rows]))
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            times.append(time.perf_counter() - began)
            losses.append(loss.detach())
            report(
                "step", step=step, loss=loss.item(), seconds=seconds + time.perf_counter() - clock
            )

            last = step in (num_steps, arguments.max_steps)
            if step % arguments.eval_every and not last:
                continue
            hvd.barrier()
            seconds += time.perf_counter() - clock
            sent += bytes_sent(arguments.interface) - counter
            auc, test_loss = evaluate(model, test_fields, test_late)
            # Ranks on one host share its counter; the mean over all ranks is bytes per rank.
            per_rank = hvd.allreduce(torch.tensor(sent / hvd.local_size()), name="sent").item()
            mean_losses = hvd.allreduce(torch.stack(losses), name="train.losses").tolist()
            losses.clear()
            report(
                "eval",
                step=step,
                seconds=seconds,
                bytes=per_rank,
                train_losses=mean_losses,
                test_loss=test_loss,
                auc=auc,
            )
            if last:
                break
            hvd.barrier()
            clock, counter = time.perf_counter(), bytes_sent(arguments.interface)
        if last:
            break

    # The first steps set up connections and Horovod's cache of responses.
    step_seconds = statistics.median(times[5:] or times)
    report(
        "final",
        steps=step,
        step_seconds=step_seconds,
        bytes_per_step=per_rank / step,
        auc=auc,
        test_loss=test_loss,
        seconds=seconds,
        replicas_equal=replicas_equal(model),
    )
    hvd.shutdown()


if __name__ == "__main__":
    main()
