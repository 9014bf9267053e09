"Rows of one day, one group or one class of three are few witnesses, however many rows they are: nothing is called sure on their word."
from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from pipeline.core.intervals import bootstrap, paired
from pipeline.evaluate.cohorts import cohort_gap, cohort_table, comparable
from pipeline.evaluate.conformal import coverage_of, cut_for, learn_promise, sets_of, strangeness
from pipeline.evaluate.slices import find_slices
from pipeline.evaluate.threshold import gain_of_tuning

DAYS, A_DAY = 40, 50


def windy(seed: int, spread: float = 0.15) -> tuple[np.random.Generator, pl.DataFrame]:
    "Forty days on which everything happens more often, or more rarely; the model states three in ten every day."
    rng = np.random.default_rng(seed)
    day = np.repeat(np.arange(DAYS), A_DAY)
    y = (rng.random(len(day)) < np.clip(0.3 + rng.normal(0, spread, DAYS)[day], 0, 1)).astype(int)
    return rng, pl.DataFrame({"day": day, "y": y, "p_no": 0.7, "p_yes": 0.3})


@pytest.mark.parametrize("by_day", [False, True])
def test_halves_of_the_rows_are_no_weak_spot(by_day: bool) -> None:
    "A slice of half of the rows is held against the other half, which is as unsure as it is."
    listed = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        day = np.repeat(np.arange(30), 40)
        halves = pl.DataFrame({c: (rng.choice(["a", "b"], 30)[day] if by_day else rng.choice(["a", "b"], len(day))) for c in "uvwx"})
        loss = rng.normal(size=len(day)) + (rng.normal(size=30)[day] if by_day else 0.0)
        listed += find_slices(halves, loss, halves.columns, unit=day if by_day else None).height > 0
    assert listed <= 13     # of 120, where five in a hundred are allowed; 97 % of all honest searches stay below


def test_a_day_counts_the_same_whether_its_rows_are_in_one_slice_or_in_many() -> None:
    "The sums by slice and day, as they are made fast, against every row's pull on the difference, added up by hand."
    from pipeline.evaluate.slices import _weigh

    rng = np.random.default_rng(5)
    day, code, loss = rng.integers(0, 25, 900), rng.integers(0, 4, 900), rng.gamma(2, 0.3, 900)
    for row in _weigh(["c"], list("wxyz"), code, loss, 30, day):
        here = code == "wxyz".index(row["parts"]["c"])
        pull = np.where(here, (loss - loss[here].mean()) / here.sum(), -(loss - loss[~here].mean()) / (~here).sum())
        error = np.sqrt((np.bincount(day, pull) ** 2).sum() * 25 / 24)
        assert row["error"] == pytest.approx(error, rel=1e-9) and row["t"] == pytest.approx((loss[here].mean() - loss[~here].mean()) / error, rel=1e-9)


def test_a_group_of_three_days_has_three_witnesses() -> None:
    held, widths = 0, []
    for seed in range(60):
        rng, frame = windy(seed)
        frame = frame.with_columns(group=pl.Series(np.where((frame["day"].to_numpy() < 3) & (rng.random(len(frame)) < 0.6), "few", "rest")))
        row = cohort_table(frame, "group", "brier", ["no", "yes"], "day", 100, seed).filter(pl.col("cohort") == "few").row(0, named=True)
        held += row["low"] <= 0.3 * 0.49 + 0.7 * 0.09 <= row["high"]
        widths.append(row["high"] - row["low"])
    assert held >= 51, held


def test_groups_of_a_few_days_have_no_part_in_a_gap() -> None:
    rng, frame = windy(3)
    frame = frame.with_columns(group=pl.Series(np.where(frame["day"].to_numpy() < 3, "three days", rng.choice(["b", "c"], len(frame)))))
    y, p, named = frame["y"].to_numpy(), frame.select("p_no", "p_yes").to_numpy(), frame["group"].to_numpy()
    assert comparable(named, y, p, "brier") == ["b", "c", "three days"] and comparable(named, y, p, "brier", frame["day"].to_numpy()) == ["b", "c"]
    assert cohort_gap(frame, "group", "brier", ["no", "yes"], "day", 100).low == 0      # type: ignore[union-attr]
    assert cohort_gap(frame.filter(pl.col("group") != "b"), "group", "brier", ["no", "yes"], "day", 100) is None


def test_a_threshold_is_not_tuned_on_the_weather_of_a_few_days() -> None:
    costs, gains = {"false_alarm": 1.0, "miss": 4.0, "hit": 0.0}, []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        day, p = np.repeat(np.arange(30), 60), rng.random(1800)
        y = (rng.random(1800) < np.clip(p + rng.normal(0, 0.25, 30)[day], 0, 1)).astype(int)
        found = gain_of_tuning(pl.DataFrame({"y": y, "p_no": 1 - p, "p_yes": p, "fold": day // 10, "unit": day}), costs, draws=100)
        gains.append((found.value, found.low, found.high))                               # type: ignore[union-attr]
    value, low, high = np.array(gains).T
    assert 0.6 < ((high - low) / 3.92).mean() / value.std() < 1.8      # as wide as the gain moves from world to world; by rows it would be a third of it


def test_three_positives_are_no_evidence_for_a_ranking() -> None:
    rng = np.random.default_rng(1)
    y, p = np.zeros(500, int), rng.random(500)
    y[:3], p[:3] = 1, [0.97, 0.9, 0.95]
    alone, beside = bootstrap("roc_auc", y, p), paired("roc_auc", y, p, np.full(500, 0.5))
    assert (alone.low, alone.high) == (0, 1) and beside.value > 0.4 and (beside.low, beside.high) == (-1, 1)


def test_what_is_told_of_a_promise_is_what_the_served_sets_hold() -> None:
    "A sure model's sets hold one class at least, so they hold the truth more often than its cut says."
    rng = np.random.default_rng(2)
    chance = np.where(rng.random(4000) < 0.9, rng.choice([0.01, 0.99], 4000), rng.uniform(0.4, 0.6, 4000))
    y, p = (rng.random(4000) < chance).astype(int), np.column_stack([1 - chance, chance])
    frame = pl.DataFrame({"y": y, "p_no": p[:, 0], "p_yes": p[:, 1]})
    promise = learn_promise(strangeness(y[:2000], p[:2000], False), frame[:2000])
    served = sets_of(p[2000:], cut_for(strangeness(y[:2000], p[:2000], False)))
    told = coverage_of(frame[2000:], promise, ["no", "yes"])
    assert told.value == served[np.arange(2000), y[2000:]].mean() > 0.92 and served.any(axis=1).all()


def test_three_positives_are_three_witnesses() -> None:
    "300 rows, three of them positive on average: where every row counted, 56, 44 and 75 % of these intervals held the truth."
    truth = {"balanced": 0.654, "balanced difference": 0.071, "brier difference": -0.0002}
    held = dict.fromkeys(truth, 0)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        y = (rng.random(300) < 0.01).astype(int)
        if not y.any():
            continue
        p, q = (1 / (1 + np.exp(4.595 - strength * (rng.normal(size=300) + strength * y) + strength**2 / 2)) for strength in (1.2, 0.9))
        found = {"balanced": bootstrap("balanced_accuracy", y, p, draws=150, threshold=0.03),
                 "balanced difference": paired("balanced_accuracy", y, p, q, draws=150, threshold=0.03), "brier difference": paired("brier", y, p, q, draws=150)}
        for name, e in found.items():
            assert e.low is not None and e.high is not None
            held[name] += e.low <= truth[name] <= e.high
    assert min(held.values()) >= 88, held     # of about 95
