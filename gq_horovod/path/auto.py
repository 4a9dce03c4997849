"""levels="auto": ways of reducing gradients, tried on the first steps of training, then fixed.

What a step takes is measured whole, because its parts cannot be added up: kernels, Horovod's thread
and the backward pass share cores, and communication hides behind computation, more or less of it
(docs/advisor.md has how far a model of the parts is off). So each setting is used for some steps in
turn, and the times between the steps' first gradients are compared: first of all settings, then,
for longer, of the fastest ones and of no compression. A setting is a way (Horovod alone, standard
levels of 16 bits or of the default width, two-hop levels) and the tensor size from which on it is
used. None of them turns a finite gradient into Inf, as float16 would.

Ranks agree on the slowest rank's times, so all take the same decision. Which setting a tensor has
is a function of its name's number of reductions, so ranks whose hooks fire in different orders
agree on that too. With `Trials` they agree once, at the end of each trial, and have to have reduced
equally often. With `SharedTrials` they agree before every reduction.

It knows no framework.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..log import Log
from .config import Config, Plan

_log = Log(__name__)

WARM_UP_STEPS = 3  # connections and caches are made, by the user's script as well
# Steps of a setting before another has its turn, with all settings and with the finalists. The
# first is not counted: it ends what the setting before began.
STEPS = (3, 6)
ROUNDS = 2  # the second one backwards, so that what drifts meanwhile favours no setting
FINALISTS = 3  # beside the first setting, which is no compression
# A setting later in the list has to be faster than the best before it by this share of its time.
# The first one changes nothing about the gradients, and the differences below are noise.
MARGIN = 0.02
# Of `min_elements`: tensor sizes from which on a quantizing way is tried.
THRESHOLD_FACTORS = (1, 16, 256)


@dataclass(frozen=True)
class Way:
    """How tensors of a step are reduced."""

    name: str
    plan: Plan | None = None  # of the codes; None: Horovod reduces the tensor itself
    min_elements: int = 0  # smaller tensors are left to Horovod as they are

    def __str__(self) -> str:
        return f"{self.name} from {self.min_elements} elements on" if self.plan else self.name


NONE = Way("none")


def quantizing(config: Config) -> dict[str, Config]:
    """What is tried for `config` (whose levels are "auto") beside no compression, by name."""
    return {
        # As many bytes as float16, whose range is too small for the gradients of some models.
        "16 bits": replace(config, levels="standard", bits=16),
        "standard": replace(config, levels="standard"),
        "two-hop": replace(config, levels="two-hop"),
    }


def settings(
    config: Config, world_size: int, factors: Sequence[int] = THRESHOLD_FACTORS
) -> list[Way]:
    """What is tried for `config` (whose levels are "auto"), the gentlest first.

    `factors` are those of `min_elements` from which on a quantizing way is tried.
    """
    least = max(config.min_elements, 1)
    return [
        NONE,
        *(
            Way(name, own.plan(world_size), min_elements=factor * least)
            for name, own in quantizing(config).items()
            for factor in (factors if own.bits is None else (1,))
        ),
    ]


def any_plan(config: Config, world_size: int) -> Plan:
    """The settings; with levels "auto" some of those that are tried."""
    fixed = quantizing(config)["standard"] if config.levels == "auto" else config
    return fixed.plan(world_size)


class _Trial:
    """Settings in turn, from step `begin` on."""

    def __init__(self, begin: int, steps: int, settings: Sequence[Way]) -> None:
        self.begin = begin
        self.settings = settings
        self._steps = steps
        places = range(len(settings))
        self._turns = [*places, *reversed(places)]
        assert len(self._turns) == ROUNDS * len(settings)
        self.end = begin + steps * len(self._turns)

    def place(self, step: int) -> int:
        """Which setting a step has."""
        return self._turns[(step - self.begin) // self._steps]

    def medians(self, began: dict[int, float]) -> list[float]:
        """Seconds of a step of each setting on this rank, from when each step began."""
        taken: list[list[float]] = [[] for _ in self.settings]
        for step in range(self.begin, self.end):
            if (step - self.begin) % self._steps and step in began and step + 1 in began:
                taken[self.place(step)].append(began[step + 1] - began[step])
        return [statistics.median(own) if own else float("inf") for own in taken]


class Trials:
    """The trials of one group of ranks, and their outcome."""

    def __init__(
        self,
        config: Config,
        world_size: int,
        agree: Callable[[NDArray[np.int32], str], NDArray[np.int32]],
        clock: Callable[[], float] = time.perf_counter,
        speaks: bool = True,
    ) -> None:
        """Begin.

        Arguments:
            config: options whose levels are "auto".
            world_size: ranks of the group.
            agree: the element-wise maximum over ranks of an int32 array, under a name; blocks.
            clock: seconds.
            speaks: whether to log what all ranks decide; one of them does.
        """
        self.decision: Way | None = None
        self.seconds: dict[str, float] = {}  # of a step in the last trial, on the slowest rank
        self._agree = agree
        self._clock = clock
        self._speaks = speaks
        self._began: dict[int, float] = {}
        self._latest = -1
        self._trials = [_first(settings(config, world_size))]
        self._lock = threading.RLock()

    def way(self, step: int, size: int) -> Way:
        """How to reduce a tensor of `size` elements, `step` times reduced before.

        Collective where the first tensor of a step that follows a trial comes by.
        """
        with self._lock:
            if step > self._latest:
                self._latest = step
                if self.decision is None:
                    self._began[step] = self._clock()
                    if step == self._trials[-1].end:
                        self._conclude()
            chosen = self._setting(step)
        return chosen if size >= chosen.min_elements else NONE

    def state_dict(self) -> dict[str, Any]:
        """What load_state_dict() of another process goes on from: plain numbers."""
        places = self._places()
        return {
            "began": dict(self._began),
            "finalists": [[places[way] for way in trial.settings] for trial in self._trials[1:]],
            "decision": None if self.decision is None else places[self.decision],
        }

    def _places(self) -> dict[Way, int]:
        """Where each setting is among all that are tried."""
        return {way: place for place, way in enumerate(self._trials[0].settings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what state_dict() returned, with the same options and world size.

        The step at which the process before ended is not counted: its end is not known.
        """
        every = self._trials[0].settings
        for steps, places in zip(STEPS[1:], state["finalists"], strict=False):
            finalists = [every[place] for place in places]
            self._trials.append(_Trial(self._trials[-1].end, steps, finalists))
        last = max(state["began"], default=None)
        self._began = {step: when for step, when in state["began"].items() if step != last}
        self.decision = None if state["decision"] is None else every[state["decision"]]

    def outcome(self) -> tuple[int, int]:
        """What has been settled so far, as numbers that grow with it, for adopt() of another rank.

        The decision's place among all settings from 1 on, 0 for none yet; a bit for each finalist.
        """
        places = self._places()
        decision = 0 if self.decision is None else places[self.decision] + 1
        finalists = [way for trial in self._trials[1:] for way in trial.settings]
        return decision, sum(1 << places[way] for way in finalists)

    def adopt(self, decision: int, finalists: int) -> None:
        """Take over what other ranks have settled while this one had called hvd.join()."""
        every = self._trials[0].settings
        if finalists and len(self._trials) == 1:
            chosen = [way for place, way in enumerate(every) if finalists >> place & 1]
            self._trials.append(_Trial(self._trials[0].end, STEPS[1], chosen))
        if decision and self.decision is None:
            self.decision = every[decision - 1]
            self._began.clear()

    def _setting(self, step: int) -> Way:
        for trial in self._trials:
            if step < trial.begin:
                return NONE
            if step < trial.end:
                return trial.settings[trial.place(step)]
        assert self.decision is not None
        return self.decision

    def _conclude(self) -> None:
        """Settle the trial that has ended: begin the next, or decide."""
        trial = self._trials[-1]
        micros = np.array(_micros(trial.medians(self._began)), dtype=np.int32)
        seconds = _seconds(self._agree(micros, f"gq.auto.{len(self._trials)}").tolist())
        self.seconds = dict(zip(map(str, trial.settings), seconds, strict=True))
        if len(self._trials) < len(STEPS):
            finalists = [trial.settings[place] for place in finalists_of(seconds)]
            self._trials.append(_Trial(trial.end, STEPS[len(self._trials)], finalists))
        else:
            self.decision = trial.settings[first_of_the_fastest(seconds)]
            self._began.clear()
        if self._speaks:
            _say(self.seconds, self.decision)


class SharedTrials:
    """Trials of ranks that share some numbers before each reduction, as graphs of TensorFlow do.

    The maximum over ranks of these numbers alone says how tensors are reduced. So ranks take the
    same way whatever each of them has seen before: one may have been away, have just begun, or have
    loaded a state. What has been decided reaches them with the numbers.
    """

    def __init__(
        self,
        settings: Sequence[Way],
        clock: Callable[[], float] = time.perf_counter,
        speaks: bool = True,
    ) -> None:
        """Begin.

        Arguments:
            settings: what is tried, the gentlest first.
            clock: seconds.
            speaks: whether to log what all ranks decide; one of them does.
        """
        self._settings = settings
        self._first = _first(settings)
        self._clock = clock
        self._speaks = speaks
        self._last: _Trial | None = None  # that of the finalists
        self._decision: int | None = None
        self._steps: dict[str, int] = {}  # how often tensors were reduced before, by their name
        self._began: dict[int, float] = {}
        self._latest = -1
        self._lock = threading.Lock()

    @property
    def decision(self) -> Way | None:
        """What the trials have ended with."""
        return None if self._decision is None else self._settings[self._decision]

    def decide(self, name: str) -> None:
        """End the trials with the setting of this name."""
        with self._lock:
            self._decision = [own.name for own in self._settings].index(name)

    def propose(self, name: str) -> list[int]:
        """What this rank knows before tensors under a name are reduced.

        How often they were reduced before; the decision's place from 1 on, 0 for none yet; a bit
        for each finalist; and for both trials the microseconds of a step of each setting, 0 where
        they are not known.
        """
        with self._lock:
            step = self._steps.get(name, -1) + 1
            if step > self._latest:
                self._latest = step
                if self._decision is None:
                    self._began[step] = self._clock()
            if self._decision is not None:
                return [step, self._decision + 1, 0, *self._micros(None), *self._micros(None)]
            finalists = () if self._last is None else self._last.settings
            bits = sum(1 << self._settings.index(own) for own in finalists)
            return [step, 0, bits, *self._micros(self._first), *self._micros(self._last)]

    def choose(self, name: str, agreed: Sequence[int]) -> int:
        """The place among the settings of how they are reduced, from the maximum over ranks."""
        step, decision, bits, *micros = agreed
        every = self._settings
        first, last = (_seconds(micros[at : at + len(every)]) for at in (0, len(every)))
        trial, place, known = self._first, 0, first
        if decision:
            place = decision - 1
        elif step >= trial.end:
            finalists = [place for place in range(len(every)) if bits >> place & 1]
            finalists = finalists or finalists_of(first)
            trial = _Trial(trial.end, STEPS[1], [every[place] for place in finalists])
            known = [last[place] for place in finalists]
            ended = step >= trial.end
            place = finalists[first_of_the_fastest(known) if ended else trial.place(step)]
            decision = place + 1 if ended else 0
        elif step >= trial.begin:
            place = trial.place(step)
        with self._lock:
            self._steps[name] = step
            self._latest = max(step, self._latest)
            new = self._decision is None and decision > 0
            if decision:  # another one than this rank has loaded, too
                self._decision = decision - 1
                self._began.clear()
            elif trial is not self._first and self._last is None:
                self._last, trial, known, new = trial, self._first, first, True
            if new and self._speaks:
                _say(dict(zip(map(str, trial.settings), known, strict=True)), self.decision)
        return place

    def _micros(self, trial: _Trial | None) -> list[int]:
        """Of a step of each setting on this rank, 0 where it is not known."""
        if trial is None:
            return [0] * len(self._settings)
        own = dict(zip(trial.settings, _micros(trial.medians(self._began)), strict=True))
        return [own.get(setting, 0) for setting in self._settings]


def _first(settings: Sequence[Way]) -> _Trial:
    return _Trial(WARM_UP_STEPS, STEPS[0], settings)


def _micros(seconds: Sequence[float]) -> list[int]:
    """As int32; 0 for what is not known.

    A rank that was away (hvd.join()) has no times of some settings, and says nothing of them.
    """
    longest = np.iinfo(np.int32).max
    return [int(min(1e6 * own, longest)) if own < float("inf") else 0 for own in seconds]


def _seconds(micros: Sequence[int]) -> list[float]:
    return [own / 1e6 if own else float("inf") for own in micros]


def _say(seconds: dict[str, float], decision: Way | None) -> None:
    """Log what a trial measured, and what was decided."""
    listed = ", ".join(f"{name} {1e3 * own:.1f} ms" for name, own in seconds.items())
    outcome = "" if decision is None else f"; decided: {decision}"
    _log.say(
        logging.INFO,
        "trial" if decision is None else "decision",
        f"GlobalQSGD: a step took, with {listed}{outcome}",
        seconds=seconds,
        decision=None if decision is None else str(decision),
    )


def finalists_of(seconds: Sequence[float]) -> list[int]:
    """The places of what is tried for longer: no compression, and the fastest of the others."""
    others = sorted(range(1, len(seconds)), key=seconds.__getitem__)[:FINALISTS]
    return [0, *sorted(others)]


def first_of_the_fastest(seconds: Sequence[float]) -> int:
    """The first place whose successors are not faster than it by more than MARGIN."""
    best = 0
    for place, own in enumerate(seconds):
        if own < (1 - MARGIN) * seconds[best]:
            best = place
    return best
