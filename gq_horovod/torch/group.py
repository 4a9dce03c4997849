"""What belongs to the ranks of one process set, between one hvd.init() and the next."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import log
from ..guards import replicas
from ..path import agreement
from ..path.auto import Trials, Way
from ..path.config import Plan
from ..path.nodes import Nodes
from ..path.pipeline import Exchanges, Pipeline
from . import gpus
from .collectives import Collectives

_NOBODY = object()  # who calls hvd.allreduce, in the place of an optimizer


@dataclass
class Group:
    """State of an instance among the ranks of a process set."""

    function: str  # what errors name
    key_of_ranks: tuple[int, ...]  # of the process set; () for the global one
    session: object  # identifies an hvd.init()
    rank: int
    ranks: int
    plan: Plan  # of what is reduced among ranks, or among nodes
    collectives: Collectives
    pipeline: Pipeline
    loaded: dict[str, str]  # what ranks compare of a checkpoint that was loaded
    # The trials count from here. Not 0 in a session that follows another one, such as after a lost
    # worker: the dither of steps that were is not used again.
    first_step: int
    base: int  # the first step of a tensor that was not reduced since the ranks last agreed
    joins: int = 0  # calls of hvd.join() before the ranks last agreed
    exchanges: Exchanges | None = None  # where codes travel as messages
    nodes: Nodes | None = None  # where gradients are reduced by nodes
    placed: bool = False  # whether that is settled
    resident: bool = False  # whether codes of gradients on a GPU stay there; agreed among ranks
    trials: Trials | None = None  # where levels="auto"
    census: log.Census | None = None  # of its tensors, on the rank that logs them
    steps: dict[str, int] = field(default_factory=dict)  # the next one of each tensor, by its key
    memories: dict[str, dict[str, Any]] = field(default_factory=dict)  # of methods, by tensor key
    # What codes have left out so far of each tensor's gradients on this rank, by its key, where
    # error_feedback=True. They lie where the gradients do, and begin at zero with hvd.init(). There
    # are as many as tensors in use: an optimizer's go with it (`_forget`), and names of
    # hvd.allreduce stay as long as the group.
    residuals: dict[str, torch.Tensor] = field(default_factory=dict)
    # Steps of the optimizers, where their parameters are compared between ranks.
    checked: weakref.WeakKeyDictionary[Any, replicas.Steps] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    checks: list[replicas.Check] = field(default_factory=list)  # of those, under way
    # Who has reduced tensors of a name, in the order in which they came; None: nobody's optimizer.
    _owners: dict[str, list[weakref.ref[Any] | None]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def allreduce_max(self, array: NDArray[np.int32], name: str) -> NDArray[np.int32]:
        """The element-wise maximum over ranks; blocks, with a time limit."""
        return agreement.wait(self.collectives.allreduce_max(array, name), self.function)

    def key(self, name: str, optimizer: Any) -> str:
        """What a tensor is remembered by: its name, told from tensors of that name elsewhere.

        Two models may have the same parameter names. The order in which their optimizers come is
        that of the program, and so the same on every rank.
        """
        with self._lock:
            owners = self._owners.setdefault(name, [])
            wanted = _NOBODY if optimizer is None else optimizer
            for place, owner in enumerate(owners):
                if (_NOBODY if owner is None else owner()) is wanted:
                    return _key(name, place)
            key = _key(name, len(owners))
            known = None if optimizer is None else weakref.ref(optimizer, self._forget(key))
            owners.append(known)
            return key

    def _forget(self, key: str) -> Any:
        """What drops a tensor's memory when its optimizer is gone; its steps are not used again."""
        kept: tuple[dict[str, Any], ...] = self.memories, self.residuals
        return lambda _: [own.pop(key, None) for own in kept]

    def next_step(self, key: str) -> int:
        """Count a reduction of a tensor; how many there were before."""
        with self._lock:
            step = self.steps.get(key, self.base)
            self.steps[key] = step + 1
            return step

    def way_of(self, step: int, elements: int) -> Way:
        """How a tensor is reduced; without a plan where a trial leaves it to Horovod."""
        if self.trials is None:
            return self.fixed_way
        return self.trials.way(step - self.first_step, elements)

    def reduce_by(self, nodes: Nodes | None, plan: Plan) -> None:
        """Reduce by nodes, or among all ranks, from now on."""
        self.nodes, self.plan = nodes, plan
        self.__dict__.pop("fixed_way", None)

    @cached_property
    def fixed_way(self) -> Way:
        """That of tensors without trials."""
        return Way("plan", self.plan)

    @property
    def end_step(self) -> int:
        """A step that no tensor has reached."""
        return max(self.steps.values(), default=self.base)

    def numbers(self) -> list[int]:
        """What the ranks take the largest of where they agree; the same count for every group.

        A rank that has called hvd.join() while others went on has reduced less often than they.
        """
        checksum = agreement.checksum(self.steps)
        trials = (0, 0) if self.trials is None else self.trials.outcome()
        steps = (self.first_step, self.end_step, checksum, agreement.LARGEST - checksum)
        return [*steps, int(not self.resident), *trials]

    def adopt(self, agreed: list[int]) -> None:
        """Go on from the largest numbers() of all ranks."""
        self.first_step, base, checksum, complement, staged, *trials = agreed
        self.resident = not staged
        if checksum + complement != agreement.LARGEST:  # not as many reductions on every rank
            self.steps.clear()
        if not self.steps:
            self.base = base
        if self.trials is not None:
            self.trials.adopt(*trials)

    # ---------------------------------------------------------------------------------- checkpoints

    def state_dict(self, joins: int) -> dict[str, Any]:
        """What TorchFrontend.state_dict() has of this group; `joins` so far."""
        memories = {key: dict(memory) for key, memory in self.memories.items() if memory}
        return {
            "world_size": self.ranks,
            "first_step": self.first_step,
            "base": self.base,
            "steps": dict(self.steps),
            # Whether ranks may have reduced unequally often since they last agreed.
            "joined": self.joins != joins,
            "trials": None if self.trials is None else self.trials.state_dict(),
            # What is not the same on all ranks.
            "rank": self.rank if memories else None,
            "memories": memories,
            # Copies, because the next step writes to them. Other ranks begin with zeros.
            "residuals_of_rank": self.rank if self.residuals else None,
            "residuals": {key: gpus.on_host(own) for key, own in self.residuals.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what state_dict() returned in a group of this size."""
        self.first_step, self.base = state["first_step"], state["base"]
        self.steps = dict(state["steps"])
        # What a method remembers lies in host memory, wherever a file has been loaded to.
        self.memories.update(
            (key, {name: own.cpu() if hasattr(own, "cpu") else own for name, own in memory.items()})
            for key, memory in state["memories"].items()
        )
        if state.get("residuals_of_rank") == self.rank:
            residuals = state["residuals"].items()
            self.residuals.update((key, own.to("cpu", copy=True)) for key, own in residuals)
        if self.trials is not None:
            self.trials.load_state_dict(state["trials"])


def _key(name: str, place: int) -> str:
    return name if place == 0 else f"{name}#{place + 1}"


def describe_loaded(state: dict[str, Any] | None, rank: int, ranks: int) -> dict[str, str]:
    """What ranks compare of a checkpoint: "state loaded", or "error" if it does not belong here.

    Arguments:
        state: of Group.state_dict(); None where nothing was loaded.
        rank, ranks: this rank and the size of the process set.
    """
    if state is None:
        return {"state loaded": "none"}
    if state["world_size"] != ranks or state["rank"] not in (None, rank):
        got = "" if state["rank"] is None else f"rank {state['rank']} of "
        expected = f"rank {rank} of {ranks}" if got else f"{ranks} ranks"
        return {
            "error": f"load_state_dict: expected the state of {expected}, got that of {got}"
            f"{state['world_size']}{'' if got else ' ranks'}; load on each rank what it saved, in "
            "a job of the same size"
        }
    if state["joined"]:
        return {"state loaded": "what was saved after hvd.join()"}
    steps: dict[str, int] = state["steps"]
    count, checksum = sum(steps.values()), agreement.checksum(steps)
    return {"state loaded": f"{count} reductions of {len(steps)} tensors ({checksum:08x})"}
