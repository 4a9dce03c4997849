"""The training loop of the example workloads: an ordinary Horovod script around a `Workload`.

    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/
    from common import loop

    class MyWorkload(loop.Workload): ...

    if __name__ == "__main__":
        loop.main(MyWorkload)

A workload says what is trained on what; the loop has the rest: options, compression, distributed
optimizer, evaluation, metrics, checkpoints. It calls the workload in this order:

1. `add_arguments(parser)`: the workload's own options. The defaults of all options, the loop's own
   too, are those of the preset: `PRESETS` has one dictionary of defaults for each name.
2. `MyWorkload(options)`, after hvd.init(): opens the data. `first_rank_first` makes what all ranks
   of a job share.
3. `model()`, after torch.manual_seed(--seed) on every rank; then `optimizer(model)` and
   `schedule(optimizer, steps)`.
4. For each step `loss(model, batch)` with the next of `batches(epoch, skip)`, moved to the model's
   device; backward; the optimizer's step; the schedule's step.
   Then `after_step(model, epoch)`.
5. `evaluate(model)` every --eval-every steps and after the last, in eval mode, without gradients.

What a workload has to keep to, so that a resumed run continues the same curve bit for bit:

- `batches(epoch, skip)` depends on nothing but its arguments, the options, rank and size, and has
  the same number of batches on every rank.
- Random numbers while training come from torch's global generator (dropout) or are a function of
  seed and epoch. `evaluate` draws none.
- What else it carries from step to step (hidden states of the segment before) is in its own
  `state_dict()`. Buffers of the model (running means of a batch norm) are saved for each rank.

Rank 0 appends what it measures to --metrics, one JSON object a line: "start"; "step" after each
step, with its own loss; "eval" after each evaluation, with the loss of every step since the last
one, averaged over the ranks; "final", whose `peak_memory` is the most that a rank had of its
host's memory, in bytes. Seconds and bytes are those of training: evaluation,
checkpoints and start-up are left out. A run that was resumed has a second "start" line, whose
`resumed_from` is the step after which it goes on; what was written of later steps before is void.

Checkpoints (--checkpoint DIR, which every rank has to see): DIR/step-N has "shared.pt" (parameters,
optimizer, schedule; by rank 0) and "rank-R.pt" (buffers, generators, what the compression
remembers, what was measured; by rank R); DIR/latest names the complete one. All are plain tensors,
numbers and texts. If DIR/latest is there, the run resumes; with other options it refuses to.

With more than two ranks, Horovod's own sums of floats depend on which tensors it happened to fuse.
Any two runs whose gradients go that way (none, fp16, powersgd, the first step of intsgd, and
tensors below `min_elements`) may then differ in the last bits, resumed or not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, TypeVar

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from gq_horovod.path import agreement

from . import methods

T = TypeVar("T")


class Workload:
    """A model, its data, and what tells how well it has learned. See the module's docstring."""

    NAME: ClassVar[str]  # in file names and tables
    METRIC: ClassVar[str]  # the key of evaluate()'s result that runs are compared by
    HIGHER_IS_BETTER: ClassVar[bool]
    # Name -> defaults of options (by their names in `options`); the first one is the default.
    # Of the loop's own, a preset has to give batch_size, lr, epochs and eval_every.
    PRESETS: ClassVar[dict[str, dict[str, Any]]]

    clip_norm: float | None = None  # largest norm of the reduced gradient; None: as it is
    steps_per_epoch: int | None = None  # None: not known before the data ends

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the workload's own options."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    def model(self) -> nn.Module:
        """A new model; its parameters come from torch's generator."""
        raise NotImplementedError

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer, with learning rate `options.lr`."""
        raise NotImplementedError

    def schedule(
        self, optimizer: torch.optim.Optimizer, steps: int | None
    ) -> torch.optim.lr_scheduler.LRScheduler | None:
        """What changes the learning rate after each of `steps` steps, if anything does."""
        return None

    def batches(self, epoch: int, skip: int) -> Iterator[Any]:
        """This rank's batches of an epoch but the first `skip`: tensors, or tuples of them."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of this rank's samples, with a graph behind it."""
        raise NotImplementedError

    def after_step(self, model: nn.Module, epoch: int) -> None:
        """Change the parameters after a step, alike on all ranks; epochs count from 0."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metrics of held-out samples, the same on every rank; every rank calls it."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What else the "start" line says, such as the number of samples."""
        return {}

    def counters(self) -> dict[str, int]:
        """What this rank has counted, such as rejected rows; "final" has the sums."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What this rank carries from step to step: tensors, numbers, texts, lists and dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what state_dict() returned."""


# ----------------------------------------------------------------------------------------- options

# In place of a path in --data: samples of the preset's shapes, made from the seed.
SYNTHETIC = "synthetic"

# What may differ between a run and the one that resumes it.
FREE = {"metrics", "tensorboard", "interface", "cache", "max_steps", "eval_every"}
FREE |= {"checkpoint", "checkpoint_every", "device"}


def parser(workload: type[Workload], preset: str) -> argparse.ArgumentParser:
    """The command line of a workload, with the defaults of one of its presets."""
    parser = argparse.ArgumentParser(description=(workload.__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", choices=list(workload.PRESETS), default=preset)
    parser.add_argument("--compression", choices=list(methods.METHODS), default="none")
    parser.add_argument("--bits", type=int, help="of a code; the default suits the world size")
    parser.add_argument("--power-rank", type=int, help="columns of PowerSGD's factors (default 4)")
    parser.add_argument("--transport", choices=["horovod", "mpi"], default="horovod")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int, help="samples per rank and step")
    parser.add_argument("--lr", type=float, help="learning rate at the start")
    parser.add_argument("--eval-every", type=int, help="steps between evaluations")
    parser.add_argument("--max-steps", type=int, help="stop early, for a quick trial")
    parser.add_argument("--cache", type=Path, default=Path("results"), help="for prepared data")
    parser.add_argument("--metrics", type=Path, help="file to append JSON lines to")
    parser.add_argument("--tensorboard", type=Path, help="directory for TensorBoard")
    parser.add_argument("--checkpoint", type=Path, help="directory; resumes from what is there")
    parser.add_argument("--checkpoint-every", type=int, default=1000, help="steps (default 1000)")
    parser.add_argument("--interface", default="lo", help="network interface that MPI uses")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the model")
    workload.add_arguments(parser)
    defaults = workload.PRESETS[preset]
    known = {action.dest for action in parser._actions}
    assert set(defaults) <= known, f"preset {preset}: no options {set(defaults) - known}"
    parser.set_defaults(**defaults)
    return parser


def parse(workload: type[Workload], arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ends the program for those that cannot work, as argparse does."""
    first = argparse.ArgumentParser(add_help=False)
    default = next(iter(workload.PRESETS))
    first.add_argument("--preset", choices=list(workload.PRESETS), default=default)
    preset = first.parse_known_args(arguments)[0].preset
    full = parser(workload, preset)
    options = full.parse_args(arguments)
    for name in ("epochs", "batch_size", "eval_every", "max_steps", "checkpoint_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            full.error(f"--{name.replace('_', '-')}: expected 1 or more, got {value}")
    return options


def compression_of(options: argparse.Namespace) -> Any:
    """The `compression=` that the options ask for."""
    return methods.make(
        options.compression,
        bits=options.bits,
        rank=options.power_rank,
        seed=options.seed,
        transport=None if options.transport == "horovod" else options.transport,
    )


# ----------------------------------------------------------------------------- what workloads share


def first_rank_first(function: Callable[[], T]) -> T:
    """Call `function` on rank 0, which may leave a file for the others, and then on them."""
    result = function() if hvd.rank() == 0 else None
    hvd.barrier()
    return function() if result is None else result


def shuffled(samples: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's samples, the same on every rank; int64."""
    generator = torch.Generator().manual_seed(seed + 2**32 * epoch)
    return torch.randperm(samples, generator=generator)


def to_device(batch: Any, device: torch.device) -> Any:
    """A tensor, or a tuple, list or dictionary of them, on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def mean_over_ranks(total: float, count: float, name: str) -> float:
    """The mean of what all ranks have seen: sums and counts are added up. float64."""
    both = torch.tensor([total, count], dtype=torch.float64)
    both = hvd.allreduce(both, op=hvd.Sum, name=f"mean.{name}")
    return float(both[0] / both[1])


def replicas_equal(model: nn.Module) -> bool:
    """Whether all ranks hold the same parameters, bit for bit."""
    checksum = 0
    for parameter in model.parameters():
        values = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        checksum = zlib.crc32(values.numpy(), checksum)
    checksums = hvd.allgather(torch.tensor([checksum], dtype=torch.int64), name="checksums")
    return bool((checksums == checksum).all())


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


def peak_memory() -> int:
    """Bytes of this host's memory that this process had at most so far.

    The `resource` module has that of the process that started this one, too, if it had more.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return 1024 * int(value.split()[0])  # in kB
    raise OSError("/proc/self/status: expected a line VmHWM, as Linux has it, got none.")


# ------------------------------------------------------------------------------------- measurements


class Measured:
    """What a run has measured so far on this rank; part of its checkpoints."""

    def __init__(self, interface: str) -> None:
        self._interface = interface
        self._seconds = 0.0  # training only
        self._sent = 0  # bytes, by this host, likewise
        self.times: list[float] = []  # of the steps
        self.losses: list[Tensor] = []  # of this rank, since the last evaluation

    def resume(self) -> None:
        """Begin to count, on all ranks at once."""
        hvd.barrier()
        self._clock, self._counter = time.perf_counter(), bytes_sent(self._interface)

    def pause(self) -> None:
        """Stop counting."""
        hvd.barrier()
        self._seconds += time.perf_counter() - self._clock
        self._sent += bytes_sent(self._interface) - self._counter

    def seconds(self, running: bool = False) -> float:
        """Seconds of training; `running` between resume() and pause()."""
        return self._seconds + (time.perf_counter() - self._clock if running else 0.0)

    def bytes_per_rank(self) -> float:
        """Bytes that a rank has sent, the mean over all: ranks of one host share its counter."""
        sent = torch.tensor(self._sent / hvd.local_size(), dtype=torch.float64)
        return hvd.allreduce(sent, name="sent").item()

    def state_dict(self) -> dict[str, Any]:
        losses = torch.stack(self.losses).cpu() if self.losses else torch.empty(0)
        times = torch.tensor(self.times, dtype=torch.float64)
        return {"seconds": self._seconds, "sent": self._sent, "times": times, "losses": losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seconds, self._sent = state["seconds"], state["sent"]
        self.times, self.losses = state["times"].tolist(), list(state["losses"])


class Reporter:
    """Writes rank 0's events as JSON lines and for TensorBoard."""

    def __init__(self, options: argparse.Namespace, resumed_from: int) -> None:
        self._file: Any = None
        self._board: Any = None
        if hvd.rank() != 0:
            return
        if options.metrics:
            options.metrics.parent.mkdir(parents=True, exist_ok=True)
            _drop_incomplete_line(options.metrics)
            self._file = options.metrics.open("a")
        if options.tensorboard:
            self._board = summary_writer(options.tensorboard, resumed_from)

    def __call__(self, event: str, **values: Any) -> None:
        if self._file:
            self._file.write(json.dumps({"event": event, **values}) + "\n")
            self._file.flush()
        if self._board and event in ("step", "eval"):
            for key, value in values.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{event}/{key}", value, values["step"])

    def close(self) -> None:
        for output in (self._file, self._board):
            if output:
                output.close()


def _drop_incomplete_line(path: Path) -> None:
    """Remove what a run that was killed had begun to write."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def summary_writer(directory: Path, resumed_from: int) -> Any:
    """TensorBoard's writer; what it has of steps after `resumed_from` is hidden."""
    # TensorBoard imports TensorFlow where it is installed, which takes seconds, unless there is a
    # module of this name; it then uses its own writer.
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"--tensorboard {directory}: expected the package tensorboard, which does not import "
            f"({error}); `pip install tensorboard`, or leave the option out."
        ) from error
    return SummaryWriter(str(directory), purge_step=resumed_from + 1)


# ------------------------------------------------------------------------------------- checkpoints


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or belongs to another run. Raised on every rank."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a name beside `path`, then give the finished file its own."""
    partial = path.with_name(f"{path.name}.partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


class Checkpoints:
    """The checkpoints in one directory, of which the newest complete one is kept."""

    def __init__(self, directory: Path, options: argparse.Namespace) -> None:
        self._directory = directory
        described = {
            key: value if isinstance(value, int | float | str | None) else str(value)
            for key, value in sorted(vars(options).items())
            if key not in FREE
        }
        self._run = {**described, "ranks": hvd.size()}

    def save(self, step: int, shared: dict[str, Any], own: dict[str, Any]) -> None:
        """Save a step. Collective; a run that is ended meanwhile leaves the one before."""
        folder = self._directory / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        own = {"step": step, **own}
        write_atomically(folder / f"rank-{hvd.rank()}.pt", lambda path: torch.save(own, path))
        if hvd.rank() == 0:
            shared = {"step": step, "run": self._run, **shared}
            write_atomically(folder / "shared.pt", lambda path: torch.save(shared, path))
        hvd.barrier()  # all files are there
        if hvd.rank() == 0:
            latest = self._directory / "latest"
            write_atomically(latest, lambda path: path.write_text(folder.name + "\n"))
            for other in self._directory.glob("step-*"):
                if other.name != folder.name:
                    shutil.rmtree(other, ignore_errors=True)

    def load(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return (shared, own) of the newest checkpoint, None where there is none. Collective.

        Raises CheckpointError on every rank if it cannot be used on one.
        """
        latest = self._directory / "latest"
        name = latest.read_text().strip() if hvd.rank() == 0 and latest.exists() else None
        name = hvd.broadcast_object(name, root_rank=0, name="checkpoint.latest")
        if name is None:
            return None
        folder = self._directory / name
        problem, shared, own = None, {}, {}
        try:
            shared = _read(folder / "shared.pt")
            self._require_same_run(shared["run"], folder)
            own = _read(folder / f"rank-{hvd.rank()}.pt")
        except CheckpointError as error:
            problem = str(error)
        problems = hvd.allgather_object(problem, name="checkpoint.problems")
        for rank, found in enumerate(problems):
            if found is not None:
                raise CheckpointError(f"rank {rank}: {found}")
        return shared, own

    def _require_same_run(self, run: dict[str, Any], folder: Path) -> None:
        for key in sorted({*run, *self._run}):
            before, now = run.get(key), self._run.get(key)
            if before != now:
                raise CheckpointError(
                    f"--checkpoint {self._directory}: expected {key} to be {before!r} as in the "
                    f"run that wrote {folder.name}, got {now!r}; give it the same value, or give "
                    "a new run another directory."
                )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a damaged file provokes
        raise CheckpointError(
            f"--checkpoint: expected a complete file {path} on a disk that every rank sees, got "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; remove "
            f"{path.parents[1] / 'latest'} to start anew."
        ) from error
    assert isinstance(content, dict)
    return content


def generators() -> dict[str, Any]:
    """The state of torch's generators on this rank."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_generators(state: dict[str, Any]) -> None:
    """Go on from what generators() returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def remembered(thing: Any) -> dict[str, Any]:
    """The state of a schedule or a compression; {} if it has none, as Horovod's own."""
    return thing.state_dict() if hasattr(thing, "state_dict") else {}


# ------------------------------------------------------------------------------------------- train


def main(workload: type[Workload], arguments: Sequence[str] | None = None) -> None:
    """Be one rank of a run."""
    options = parse(workload, arguments)
    hvd.init()
    train(workload(options))
    hvd.shutdown()


def device_of(options: argparse.Namespace) -> torch.device:
    """Where the model of this rank is to lie."""
    if options.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a GPU that torch sees, got none; use cpu.")
    torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def train(workload: Workload) -> None:
    """Train as the workload's options say, from the newest checkpoint if there is one."""
    options = workload.options
    device = device_of(options)
    compression = compression_of(options)
    if hvd.size() == 1 and not agreement.elastic():
        warnings.warn(
            f"--compression {options.compression}: one rank, for which Horovod reduces and "
            "compresses nothing; start more, or set HOROVOD_ELASTIC=1.",
            stacklevel=1,
        )
    torch.manual_seed(options.seed)
    model = workload.model().to(device)
    optimizer = hvd.DistributedOptimizer(
        workload.optimizer(model),
        named_parameters=model.named_parameters(),
        compression=compression,
    )
    epoch_steps = workload.steps_per_epoch
    num_steps = None if epoch_steps is None else epoch_steps * options.epochs
    schedule = workload.schedule(optimizer, num_steps)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    torch.manual_seed(options.seed + 2**32 * (1 + hvd.rank()))  # other dropout on every rank

    measured = Measured(options.interface)
    step = epoch = done = 0  # steps in all; epochs; batches of this epoch
    checkpoints = Checkpoints(options.checkpoint, options) if options.checkpoint else None
    if checkpoints and (found := checkpoints.load()):
        shared, own = found
        step, epoch, done = shared["step"], shared["epoch"], shared["done"]
        model.load_state_dict({**shared["parameters"], **own["buffers"]}, strict=False)
        optimizer.load_state_dict(shared["optimizer"])
        if schedule:
            schedule.load_state_dict(shared["schedule"])
        if own["compression"]:
            compression.load_state_dict(own["compression"])
        workload.load_state_dict(own["workload"])
        measured.load_state_dict(own["measured"])
        set_generators(own["generators"])
    buffers = {name for name, _ in model.named_buffers()}

    def save() -> None:
        state = model.state_dict()
        shared = {
            "epoch": epoch,
            "done": done,
            "parameters": {key: value for key, value in state.items() if key not in buffers},
            "optimizer": optimizer.state_dict(),
            "schedule": remembered(schedule),
        }
        own = {
            "buffers": {key: value for key, value in state.items() if key in buffers},
            "compression": remembered(compression),
            "workload": workload.state_dict(),
            "measured": measured.state_dict(),
            "generators": generators(),
        }
        checkpoints.save(step, shared, own)

    def evaluate() -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            metrics = workload.evaluate(model)
        model.train()
        return metrics

    last_step = min((n for n in (num_steps, options.max_steps) if n is not None), default=None)
    report = Reporter(options, step)
    report(
        "start",
        workload=workload.NAME,
        preset=options.preset,
        compression=options.compression,
        bits=options.bits,
        power_rank=options.power_rank,
        transport=options.transport,
        seed=options.seed,
        batch_size=options.batch_size,
        metric=workload.METRIC,
        higher_is_better=workload.HIGHER_IS_BETTER,
        steps=last_step,
        ranks=hvd.size(),
        hosts=hvd.size() // hvd.local_size(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        **({"resumed_from": step} if step else {}),
        **workload.describe(),
    )

    def one_step(batch: Any) -> None:
        nonlocal step, done
        began = time.perf_counter()
        optimizer.zero_grad()
        loss = workload.loss(model, to_device(batch, device))
        loss.backward()
        if workload.clip_norm is None:
            optimizer.step()
        else:
            optimizer.synchronize()
            nn.utils.clip_grad_norm_(model.parameters(), workload.clip_norm)
            with optimizer.skip_synchronize():
                optimizer.step()
        if schedule:
            schedule.step()
        workload.after_step(model, epoch)
        step += 1
        done += 1
        measured.losses.append(loss.detach())
        value = loss.item()
        measured.times.append(time.perf_counter() - began)
        report("step", step=step, loss=value, seconds=measured.seconds(running=True))

    def evaluation() -> dict[str, float]:
        metrics = evaluate()
        losses: list[float] = []
        if measured.losses:
            losses = hvd.allreduce(torch.stack(measured.losses), name="train.losses").tolist()
        measured.losses.clear()
        report(
            "eval",
            step=step,
            seconds=measured.seconds(),
            bytes=measured.bytes_per_rank(),
            train_losses=losses,
            **metrics,
        )
        return metrics

    metrics: dict[str, float] | None = None
    model.train()
    measured.resume()
    while epoch < options.epochs and (last_step is None or step < last_step):
        for batch in workload.batches(epoch, done):
            one_step(batch)
            metrics = None
            evaluating = step % options.eval_every == 0 or step == last_step
            saving = checkpoints and (step % options.checkpoint_every == 0 or step == last_step)
            if evaluating or saving:
                measured.pause()
                if evaluating:
                    metrics = evaluation()
                if saving:
                    save()
                measured.resume()
            if step == last_step:
                break
        else:
            epoch, done = epoch + 1, 0
    measured.pause()
    if step == 0:
        raise ValueError(
            f"{workload.NAME}: expected data for one step at least, {options.batch_size} samples "
            f"on each of {hvd.size()} ranks, got less; give a smaller --batch-size, or more data."
        )
    if metrics is None:  # the data ended between two evaluations, or before this run began
        metrics = evaluation()

    # The first steps set up connections and Horovod's cache of responses.
    times = measured.times[5:] or measured.times
    counted = hvd.allgather_object(workload.counters(), name="counters")
    peaks = hvd.allgather(torch.tensor([peak_memory()]), name="peaks")
    report(
        "final",
        steps=step,
        step_seconds=statistics.median(times),
        step_seconds_mean=statistics.fmean(times),
        step_seconds_deviation=statistics.pstdev(times),
        bytes_per_step=measured.bytes_per_rank() / step,
        seconds=measured.seconds(),
        peak_memory=int(peaks.max()),
        replicas_equal=replicas_equal(model),
        **{key: sum(one[key] for one in counted) for key in counted[0]},
        **metrics,
    )
    report.close()
