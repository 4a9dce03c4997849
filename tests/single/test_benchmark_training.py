"""The arithmetic of benchmarks/training.py, on numbers made up by hand."""

from __future__ import annotations

import pytest
import training


def phases(forward, backward, synchronize, update, *, kernels=0.0, late=0.0):
    """A step of one rank whose kernels take `kernels` in all, `late` of it in synchronize."""
    return {
        "forward": forward,
        "backward": backward,
        "synchronize": synchronize,
        "update": update,
        "kernel:norms": kernels / 4,
        "kernel:quantize": 3 * kernels / 4,
        "kernels in synchronize": late,
        "cpu": 1.0,
        "cpu of other threads": 0.25,
    }


def test_parts_add_up_to_the_step():
    step = phases(1.0, 3.0, 4.0, 0.5, kernels=0.8, late=0.6)
    parts = training.split(step, compute=3.5)
    assert tuple(parts) == training.PARTS
    assert sum(parts.values()) == pytest.approx(training.total(step)) == 8.5
    assert parts["compute"] == 3.5
    assert parts["quantize"] == pytest.approx(0.8)
    assert parts["wait"] == pytest.approx(4.0 - 0.6)
    assert parts["communicate"] == pytest.approx(8.5 - 3.5 - 0.8 - 3.4)


def test_a_step_faster_than_compute_alone_is_not_hidden():
    parts = training.split(phases(1.0, 1.0, 0.0, 0.0), compute=2.5)
    assert parts["communicate"] == pytest.approx(-0.5)


def test_spread():
    assert training.spread([3.0]) == (3.0, 0.0)
    assert training.spread([5.0, 1.0, 3.0, 4.0, 2.0]) == (3.0, 2.0)


def test_mean_over_ranks():
    def rank(value, kernel):
        step = {"forward": value} | ({"kernel:norms": kernel} if kernel else {})
        return {"none": {"steps": [step, step], "alone": [value], "bytes": [], "busy": [0.5]}}

    averaged = training.mean_over_ranks([rank(1.0, 0.4), rank(3.0, None)])
    # A rank without a kernel spent no time in it.
    assert averaged["none"]["steps"] == [{"forward": 2.0, "kernel:norms": 0.2}] * 2
    assert averaged["none"]["alone"] == [2.0]
    assert averaged["none"]["bytes"] == []


def measured(*seconds, alone):
    return {
        "steps": [phases(0.25 * value, 0.75 * value, 0.0, 0.0) for value in seconds],
        "alone": [alone] if alone else [],
        "bytes": [10.0, 20.0, 30.0],
        "busy": [0.5],
    }


def test_summary_compares_with_the_baselines_of_the_run():
    result = {
        "quality": {"none": 0.7, "fp16": 0.69},
        "measured": {
            training.COMPUTE: measured(1.0, 1.2, 1.1, alone=None),
            "none": measured(8.0, 9.0, 8.5, alone=7.0),
            "fp16": measured(5.0, 4.0, 4.5, alone=0.6),
        },
    }
    rows = training.summarize(result)
    assert rows["none"]["step"] == 8.5
    assert rows["none"]["faster than none"] == 1.0
    assert rows["fp16"]["faster than none"] == pytest.approx(8.5 / 4.5)
    assert rows["none"]["faster than fp16"] == pytest.approx(4.5 / 8.5)
    assert rows["fp16"]["parts"]["compute"] == pytest.approx(1.1)
    # Against the longer of computing and of reducing.
    assert rows["none"]["overlap"] == pytest.approx(8.5 / 7.0)
    assert rows["fp16"]["overlap"] == pytest.approx(4.5 / 1.1)
    # And of reducing what there is only after the forward pass, a quarter of computing here.
    assert rows["none"]["to possible"] == pytest.approx(8.5 / (0.275 + 7.0))
    assert rows["fp16"]["to possible"] == pytest.approx(4.5 / 1.1)
    assert rows["fp16"]["bytes"] == 20.0
    assert rows["fp16"]["quality"] == 0.69
    compute = rows[training.COMPUTE]
    assert compute["alone"] is compute["quality"] is compute["faster than none"] is None


def test_summary_without_a_baseline():
    result = {
        "quality": {},
        "measured": {
            training.COMPUTE: measured(1.0, alone=None),
            "standard-8": measured(2.0, alone=1.5),
        },
    }
    assert training.summarize(result)["standard-8"]["faster than fp16"] is None


class Functions:
    """A module, as far as the stopwatch knows."""

    @staticmethod
    def inner(value):
        return 2 * value

    @staticmethod
    def outer(value):
        return Functions.inner(value) + 1


def test_stopwatch_counts_a_call_inside_another_once(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(training.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(Functions, "inner", staticmethod(Functions.inner))  # put back at the end
    monkeypatch.setattr(Functions, "outer", staticmethod(Functions.outer))
    watch = training.Stopwatch()
    watch.watch(Functions, "inner", "in")
    watch.watch(Functions, "outer", "out")
    assert Functions.outer(3) == 7
    assert Functions.inner(3) == 6
    assert watch.take() == {"out": 1.0, "in": 1.0}
    assert watch.take() == {}


def test_stopwatch_stops_on_an_exception(monkeypatch):
    monkeypatch.setattr(Functions, "inner", staticmethod(Functions.inner))
    watch = training.Stopwatch()
    watch.watch(Functions, "inner", "in")
    with pytest.raises(TypeError):
        Functions.inner(object())
    assert Functions.inner(1) == 2
    assert list(watch.take()) == ["in"]


def test_methods_that_are_not_installed_are_named(monkeypatch):
    def missing():
        raise ImportError("no such module")

    monkeypatch.setattr(training, "METHODS", {"here": object, "elsewhere": missing})
    usable, remarks = training.available(["here", "elsewhere"])
    assert usable == ["here"]
    assert remarks == ["elsewhere left out: no such module"]


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


def test_a_replayed_accelerator_goes_on_while_its_host_does_something_else(monkeypatch):
    pytest.importorskip("torch")
    import replay

    clock = Clock()
    monkeypatch.setattr(replay, "time", clock)
    accelerator = replay._Accelerator()
    ends = []
    for hook in (0.5, 2.5, 0.0, 0.0):
        accelerator.run(1.0)
        ends.append(clock.now)
        clock.sleep(hook)
    # The third piece was done during the second hook, half of the fourth as well.
    assert ends == [101.0, 102.0, 104.5, 104.5]
    assert clock.now == 104.5
    accelerator.run(1.0)
    assert clock.now == 105.0
