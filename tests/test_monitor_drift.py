"""How often the drift watch cries wolf, and what it finds; on made weeks, with fixed seeds."""
from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from pipeline.monitor.drift import JOINT, calibrate, measure_drift, window_budget

CHANCE = window_budget(0.05, 4.35)
ROWS, REFERENCE = 300, 26


def weeks(rng: np.random.Generator, count: int, weather: float = 0.0, columns: int = 8, rows: int = ROWS) -> tuple[pl.DataFrame, np.ndarray]:
    "Correlated numbers whose means move together from week to week, and categories."
    n, week = count * rows, np.repeat(np.arange(count), rows)
    mean = np.zeros((count, 3))
    for i in range(1, count):
        mean[i] = 0.5 * mean[i - 1] + weather * rng.normal(size=3)
    common = rng.normal(size=n)
    frame = {f"x{j}": 0.5 * common + 0.87 * rng.normal(size=n) + mean[week, j % 3] for j in range(columns)}
    for j in range(3):
        frame[f"c{j}"] = rng.choice(np.array(list("ABCDE")), n, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    return pl.DataFrame(frame), week


@pytest.mark.parametrize("weather", [0.0, 0.15], ids=["rows for themselves", "weather comes in weeks"])
def test_false_alarms_of_a_month(weather):
    rng, months, alarmed = np.random.default_rng(11), 150, 0
    for _ in range(months):
        frame, week = weeks(rng, REFERENCE + 4, weather)
        old = pl.Series(week < REFERENCE)
        yardstick = calibrate(frame.filter(old), week[week < REFERENCE], frame.columns)
        alarmed += measure_drift(frame.filter(~old), week[week >= REFERENCE], yardstick, CHANCE)["drifted"].any()
    assert alarmed / months <= 0.05 + 2 * (0.05 * 0.95 / months) ** 0.5


def test_fixed_threshold_cries_wolf_where_weather_comes_in_weeks():
    "The reason for the yardstick: chi-square tests on the same months alarm nearly always."
    from scipy import stats

    rng, alarmed = np.random.default_rng(12), 0
    for _ in range(20):
        frame, week = weeks(rng, REFERENCE + 4, 0.15)
        old, new = frame.filter(pl.Series(week < REFERENCE)), frame.filter(pl.Series(week >= REFERENCE))
        alarmed += any(stats.ks_2samp(old[c], new[c].slice(ROWS * w, ROWS)).pvalue < 0.05 / 32 for c in frame.columns if c[0] == "x" for w in range(4))
    assert alarmed >= 15


PLANTED = {
    "mean": lambda f, rng: f.with_columns(x0=pl.col("x0") + 0.4),
    "spread": lambda f, rng: f.with_columns(x1=pl.col("x1") * 1.5),
    "heavy tail": lambda f, rng: f.with_columns(x2=pl.col("x2") + pl.Series(rng.standard_t(1.5, f.height) * 0.6)),
    "missing": lambda f, rng: f.with_columns(x3=pl.when(pl.Series(rng.random(f.height) < 0.06)).then(None).otherwise(pl.col("x3"))),
    "constant": lambda f, rng: f.with_columns(x4=pl.lit(0.0)),
    "unit": lambda f, rng: f.with_columns(x5=pl.col("x5") * 1.8 + 32),
    "sign": lambda f, rng: f.with_columns(x6=-pl.col("x6")),
    "not a number": lambda f, rng: f.with_columns(x7=pl.when(pl.Series(rng.random(f.height) < 0.06)).then(float("nan")).otherwise(pl.col("x7"))),
    "new level": lambda f, rng: f.with_columns(c0=pl.when(pl.Series(rng.random(f.height) < 0.06)).then(pl.lit("Z")).otherwise(pl.col("c0"))),
    "level gone": lambda f, rng: f.with_columns(c1=pl.col("c1").replace({"C": "A"})),
    "shares": lambda f, rng: f.with_columns(c2=pl.Series(rng.choice(np.array(list("ABCDE")), f.height, p=[0.25, 0.3, 0.2, 0.15, 0.1]))),
    "dependence": lambda f, rng: f.with_columns(x0=pl.Series(rng.permutation(f["x0"].to_numpy())), x1=pl.Series(rng.permutation(f["x1"].to_numpy()))),
}


def test_planted_drifts_are_found():
    rng, found = np.random.default_rng(13), {}
    frame, week = weeks(rng, REFERENCE)
    yardstick = calibrate(frame, week, frame.columns)
    for name, plant in PLANTED.items():
        fresh, _ = weeks(rng, 1)
        changed = measure_drift(plant(fresh, rng), np.zeros(ROWS, dtype=np.int64), yardstick, CHANCE)
        found[name] = changed.filter("drifted")["column"].to_list()
    missed = [name for name, columns in found.items() if not columns]
    assert len(missed) <= 1, missed
    assert found["dependence"] == [JOINT] and found["new level"][0] == "c0" and found["constant"][0] == "x4"


def test_a_tenth_of_a_deviation_at_ten_thousand_rows():
    rng = np.random.default_rng(14)
    scores = pl.DataFrame({"score": rng.normal(size=26 * 10_000)})
    yardstick = calibrate(scores, np.repeat(np.arange(26), 10_000), ["score"])
    moved = pl.DataFrame({"score": rng.normal(0.1, 1, 10_000)})
    assert measure_drift(moved, np.zeros(10_000, dtype=np.int64), yardstick, CHANCE).filter(column="score")["drifted"].all()


@pytest.mark.parametrize("dtype", [pl.String, pl.Float64, pl.Int64, pl.Boolean, pl.Datetime, pl.Date, pl.Categorical])
def test_any_column_even_an_empty_one(dtype):
    reference = pl.DataFrame({"v": pl.Series([None] * 400, dtype=pl.Int64).cast(pl.String if dtype == pl.Categorical else dtype).cast(dtype)})
    yardstick = calibrate(reference, np.repeat(np.arange(10), 40), ["v"])
    assert not measure_drift(reference.head(40), np.zeros(40, dtype=np.int64), yardstick, CHANCE)["drifted"].any()


def test_no_windows_no_lines():
    frame, week = weeks(np.random.default_rng(0), 10)
    yardstick = calibrate(frame, week, frame.columns)
    assert measure_drift(frame.clear(), np.zeros(0, dtype=np.int64), yardstick, CHANCE).is_empty()
