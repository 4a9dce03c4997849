"""levels="auto": what is tried, for how long, and what is decided from the times."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gq_horovod.path import auto
from gq_horovod.path.auto import NONE, SharedTrials, Trials, Way
from gq_horovod.path.config import AUTO, Config

SIZES = (10, 5_000, 100_000, 2_000_000)  # elements of the tensors of a model
Seconds = Callable[[list[Way]], float]  # of a step, from the ways of its tensors


class Rank:
    """A training loop on a clock of its own."""

    def __init__(self, seconds: Seconds, config: Config = AUTO, world_size: int = 4) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.steps: list[list[Way]] = []
        self.agreed: list[tuple[str, NDArray[np.int32]]] = []
        self.trials = Trials(config, world_size, self.agree, lambda: self.now)

    def agree(self, own: NDArray[np.int32], name: str) -> NDArray[np.int32]:
        self.agreed.append((name, own))
        return own

    def train(self, steps: int) -> Way | None:
        for step in range(len(self.steps), len(self.steps) + steps):
            ways = [self.trials.way(step, size) for size in SIZES]
            self.steps.append(ways)
            self.now += self.seconds(ways)
        return self.trials.decision


def name_of_largest(ways: list[Way]) -> str:
    return ways[-1].name


def constant(**seconds: float) -> Seconds:
    return lambda ways: seconds[name_of_largest(ways)]


ALL = {"none": 1.0, "16 bits": 1.0, "standard": 1.0, "two-hop": 1.0}
LAST = 99  # step before which a decision is there, as the documentation says


@pytest.mark.parametrize("fastest", ["16 bits", "standard", "two-hop"])
def test_the_fastest_way_is_taken(fastest: str) -> None:
    rank = Rank(constant(**{**ALL, fastest: 0.5}))
    decision = rank.train(LAST + 1)
    assert decision is not None
    assert decision.name == fastest
    assert {name_of_largest(ways) for ways in rank.steps[LAST:]} == {fastest}


def test_no_compression_is_taken_unless_another_way_is_clearly_faster() -> None:
    barely = 1 - auto.MARGIN / 2
    rank = Rank(constant(**{**dict.fromkeys(ALL, barely), "none": 1.0}))
    assert rank.train(LAST + 1) == NONE


@pytest.mark.parametrize("fastest", ["none", "standard"])
def test_a_decision_takes_as_long_as_the_documentation_says(fastest: str) -> None:
    rank = Rank(constant(**{**ALL, fastest: 0.5}))
    assert rank.train(LAST) is None
    decision = rank.train(1)
    assert decision is not None
    assert decision.name == fastest


@pytest.mark.parametrize("factor", auto.THRESHOLD_FACTORS)
def test_the_size_from_which_to_quantize_is_tried(factor: int) -> None:
    """Each tensor costs what its way costs; small ones are cheaper without."""
    best = factor * AUTO.min_elements

    def seconds(ways: list[Way]) -> float:
        wrong = sum(
            (size >= best) != (way.plan is not None) for size, way in zip(SIZES, ways, strict=True)
        )
        return 1.0 + wrong

    rank = Rank(seconds)
    decision = rank.train(LAST + 1)
    assert decision is not None
    assert seconds([decision if s >= decision.min_elements else NONE for s in SIZES]) == 1.0
    small = rank.steps[-1][0]
    assert small == NONE


def test_drift_favours_nothing() -> None:
    """A machine that becomes slower all the time: the ways are equal, and none is kept."""
    rank = Rank(lambda ways: 1.0)
    clock = itertools.count()
    rank.seconds = lambda ways: 1.0 + 0.002 * next(clock)
    assert rank.train(LAST + 1) == NONE


def test_the_first_step_of_a_turn_does_not_count() -> None:
    """It ends what the setting before began."""
    previous: list[str] = []

    def seconds(ways: list[Way]) -> float:
        name = name_of_largest(ways)
        changed = bool(previous) and previous[-1] != name
        previous.append(name)
        return {**ALL, "standard": 0.5}[name] + 100 * changed

    decision = Rank(seconds).train(LAST + 1)
    assert decision is not None
    assert decision.name == "standard"


def test_the_decision_follows_the_agreed_times_and_not_the_own() -> None:
    rank = Rank(constant(**{**ALL, "two-hop": 0.1}))
    # The finalists: none, and the three fastest.
    others = {"gq.auto.1": [9, 9, 4, 3, 2, 9, 9, 9], "gq.auto.2": [9, 4, 1, 4]}

    def agree(own: NDArray[np.int32], name: str) -> NDArray[np.int32]:
        return np.maximum(own, np.array(others[name], dtype=np.int32) * 10**6)

    rank.trials._agree = agree
    decision = rank.train(LAST + 1)
    assert decision is not None
    assert (decision.name, decision.min_elements) == ("standard", 16 * AUTO.min_elements)


def test_ranks_that_meet_tensors_in_another_order_use_the_same_ways() -> None:
    """A way depends on how often this tensor was reduced, not on what came before it."""
    first, second = (Rank(constant(**{**ALL, "standard": 0.5})).trials for _ in range(2))
    for step in range(120):
        sizes = SIZES if step % 2 else SIZES[::-1]
        here = {size: first.way(step, size) for size in sizes}
        there = {size: second.way(step, size) for size in reversed(sizes)}
        # The largest comes late: from the step before.
        assert here == there
        if step:
            assert first.way(step - 1, SIZES[-1]) == second.way(step - 1, SIZES[-1])


def test_a_step_too_long_for_the_exchange_of_times() -> None:
    rank = Rank(constant(**{**dict.fromkeys(ALL, 3600.0), "standard": 1.0}))
    decision = rank.train(LAST + 1)
    assert decision is not None
    assert decision.name == "standard"


def test_what_was_decided_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gq_horovod"):
        Rank(constant(**{**ALL, "16 bits": 0.5})).train(100)
    assert "with none 1000.0 ms, 16 bits from 4096 elements on 500.0 ms, standard" in caplog.text
    assert "decided: 16 bits from" in caplog.text


def test_ways_have_the_widths_of_the_world_size() -> None:
    for world_size, bits in ((4, 8), (64, 10)):
        *_, standard, _, _, exponential = auto.settings(AUTO, world_size)
        assert standard.plan is not None
        assert exponential.plan is not None
        assert (standard.plan.bits, exponential.plan.bits) == (bits, 8)


@pytest.mark.parametrize("pause", [1, 20, 51, 60, 98, 99, 150])
def test_trials_go_on_in_another_process(pause: int) -> None:
    """The same ways and the same decision, though the clock starts anew."""
    seconds = constant(**{**ALL, "two-hop": 0.5})
    through = Rank(seconds)
    through.train(200)
    before, after = Rank(seconds), Rank(seconds)
    before.train(pause)
    after.trials.load_state_dict(
        json.loads(json.dumps(before.trials.state_dict()), object_hook=_numbers)
    )
    after.steps, after.now = list(before.steps), -1000.0
    after.train(200 - pause)
    assert after.steps == through.steps
    assert after.trials.decision == through.trials.decision
    # A pair of clocks would have made the step at the pause take a negative time.
    assert all((own >= 0).all() for _, own in after.agreed)


def _numbers(values: dict[str, Any]) -> dict[Any, Any]:
    return {int(key) if key.isdigit() else key: value for key, value in values.items()}


def test_levels_have_to_be_chosen_for_a_plan() -> None:
    with pytest.raises(ValueError, match="or 'two-hop' for a plan"):
        AUTO.plan(4)


# ------------------------------------------------------- ranks that share numbers before each step


class Cluster:
    """Ranks whose steps are one step: before each, they take the maximum of what they propose."""

    def __init__(self, seconds: dict[str, float], ranks: int = 2) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.settings = auto.settings(AUTO, ranks, factors=(1,))
        self.ranks = [self.newcomer() for _ in range(ranks)]

    def newcomer(self) -> SharedTrials:
        return SharedTrials(self.settings, clock=lambda: self.now)

    def step(self, *absent: int, name: str = "x") -> str:
        """The way that all ranks which are there take."""
        there = [own for rank, own in enumerate(self.ranks) if rank not in absent]
        agreed = np.max([own.propose(name) for own in there], axis=0).tolist()
        (place,) = {own.choose(name, agreed) for own in there}
        way = self.settings[place].name
        self.now += self.seconds[way]
        return way


SHARED_LAST = 75  # step before which a decision is there, as the documentation says


@pytest.mark.parametrize("fastest", ALL)
def test_ranks_that_share_numbers_decide(fastest: str) -> None:
    cluster = Cluster({**ALL, fastest: 0.5})
    seen = [cluster.step() for _ in range(SHARED_LAST)]
    assert set(seen) == set(ALL)
    assert all(own.decision is None for own in cluster.ranks)
    assert {cluster.step() for _ in range(5)} == {fastest}
    assert [own.decision.name for own in cluster.ranks if own.decision] == [fastest] * 2


@pytest.mark.parametrize("begin", [1, 10, 40, SHARED_LAST - 1, SHARED_LAST + 5])
def test_who_comes_later_takes_over_what_is_known(begin: int) -> None:
    cluster = Cluster({**ALL, "standard": 0.5})
    for _ in range(begin):
        cluster.step()
    cluster.ranks[1] = cluster.newcomer()
    for _ in range(begin, SHARED_LAST + 8):
        cluster.step()
    assert [own.decision.name for own in cluster.ranks if own.decision] == ["standard"] * 2


@pytest.mark.parametrize("away", [range(5), range(5, 30), range(20, 60), range(70, 80)], ids=str)
def test_who_was_away_takes_over_what_is_known(away: range) -> None:
    cluster = Cluster({**ALL, "two-hop": 0.5}, ranks=3)
    for step in range(SHARED_LAST + 10):
        cluster.step(*([2] if step in away else []))
    assert [own.decision.name for own in cluster.ranks if own.decision] == ["two-hop"] * 3


def test_numbers_alone_say_which_way() -> None:
    """A rank that already knows more takes the way of the others for what is behind."""
    cluster = Cluster({**ALL, "two-hop": 0.5})
    proposed = [own.propose("late") for own in cluster.ranks]
    for _ in range(SHARED_LAST + 1):
        cluster.step()
    first, second = cluster.ranks
    assert first.decision is not None
    agreed = np.max(proposed, axis=0).tolist()
    newcomer = cluster.newcomer()
    assert {own.choose("late", agreed) for own in (first, second, newcomer)} == {0}
    assert newcomer.decision is None


def test_a_decision_that_one_rank_has_loaded() -> None:
    cluster = Cluster(dict(ALL), ranks=3)
    cluster.ranks[1].decide("two-hop")
    assert {cluster.step() for _ in range(3)} == {"two-hop"}
    assert [own.decision.name for own in cluster.ranks if own.decision] == ["two-hop"] * 3


def test_decisions_that_ranks_have_loaded_differ() -> None:
    """They take one of them, and all know which."""
    cluster = Cluster(dict(ALL))
    for rank, way in enumerate(("standard", "two-hop")):
        cluster.ranks[rank].decide(way)
    way = cluster.step()
    assert [own.decision.name for own in cluster.ranks if own.decision] == [way] * 2


def test_numbers_fit_their_messages() -> None:
    """They travel as int32, however long a step takes."""
    cluster = Cluster({**dict.fromkeys(ALL, 1e7), "standard": 5e6})
    for _ in range(SHARED_LAST + 1):
        proposed = cluster.ranks[0].propose("x")
        assert all(0 <= number < 2**31 for number in proposed)
        cluster.step()
