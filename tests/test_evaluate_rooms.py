"What the evaluate room promises: groups by hand, gates that hold, repairs that repair, slices that are found."
from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import InputError
from pipeline.core.metrics import metric
from pipeline.core.run import judge
from pipeline.core.intervals import wilson
from pipeline.evaluate.cohorts import cohort_gap, cohort_of, cohort_table, comparable
from pipeline.evaluate.slices import find_slices, row_surprise
from pipeline.evaluate.stress import disturbances, lose_cells, recall_by_class, rename_levels
from pipeline.evaluate.threshold import pick_threshold
from pipeline.scope.value import break_even, value_per_1000

COSTS = {"false_alarm": 40.0, "miss": 100.0, "hit": 0.0}


def scored(n: int = 4000, seed: int = 7, sharp: float = 1.0) -> pl.DataFrame:
    "Calibrated scores, or over-confident ones where sharp > 1."
    rng = np.random.default_rng(seed)
    chance = rng.beta(2, 5, n)
    stated = 1 / (1 + ((1 - chance) / chance) ** sharp)
    return pl.DataFrame({
        "y": (rng.random(n) < chance).astype(int), "fold": np.arange(n) % 3, "p_no": 1 - stated, "p_yes": stated,
        "carrier": rng.choice(["UA", "B6", "DL"], n, p=[0.5, 0.3, 0.2]), "origin": rng.choice(["EWR", "JFK"], n),
    })


@pytest.mark.parametrize("by", ["carrier", "origin", "carrier × origin"])
def test_groups_equal_the_same_numbers_by_hand(by: str) -> None:
    frame = scored()
    table = cohort_table(frame, by, "roc_auc", threshold=0.3, draws=50)
    columns = by.split(" × ")
    assert table["n"].sum() == frame.height and table.height == frame.select(columns).n_unique()
    for row in table.to_dicts():
        here = frame.filter(pl.concat_str(columns, separator=" × ") == row["cohort"])
        y, act = here["y"].to_numpy() == 1, here["p_yes"].to_numpy() >= 0.3
        by_hand = {"n": len(y), "base_rate": y.mean(), "selection_rate": act.mean(), "tpr": act[y].mean(), "fpr": act[~y].mean(),
                   "value": metric("roc_auc", y, here["p_yes"]), "ece": metric("ece", y, here["p_yes"])}
        for name, value in by_hand.items():
            assert math.isclose(row[name], value, abs_tol=1e-12), (row["cohort"], name)
        assert row["low"] <= row["value"] <= row["high"] and row["tpr_low"] <= row["tpr"] <= row["tpr_high"]


def test_the_gap_is_best_minus_worst_and_a_large_one_fails_the_gate() -> None:
    frame = scored()
    rng = np.random.default_rng(1)
    spoilt = frame.with_columns(p_yes=pl.when(pl.col("carrier") == "DL").then(pl.Series(rng.random(frame.height))).otherwise(pl.col("p_yes")))
    table = cohort_table(spoilt, "carrier", "roc_auc", draws=20)
    gap = cohort_gap(spoilt, "carrier", "roc_auc", draws=200)
    assert gap is not None and abs(gap.value - (table["value"].max() - table["value"].min())) < 0.02
    assert judge(gap, None, 0.05, "high") == "no-go" and judge(gap, None, 0.5, "high") == "go"
    level = cohort_gap(frame, "carrier", "roc_auc", draws=200)
    assert level is not None and judge(level, None, 0.1, "high") == "go" and level.low < 0.01


def test_gaps_between_equal_groups_reach_down_to_nothing() -> None:
    "With twenty equal groups the range is wide by chance; its interval must know."
    reached = []
    for seed in range(20):
        frame = scored(4000, seed).with_columns(group=pl.int_range(4000) % 20)
        gap = cohort_gap(frame.with_columns(pl.col("group").cast(pl.String)), "group", "brier", draws=300, seed=seed)
        assert gap is not None
        reached.append(gap.low == 0)
    assert np.mean(reached) >= 0.9


def test_small_groups_are_flagged_tiny_ones_withheld_and_neither_decides() -> None:
    frame = scored(2000).with_columns(town=pl.when(pl.int_range(2000) < 6).then(pl.lit("tiny")).when(pl.int_range(2000) < 28)
                                      .then(pl.lit("small")).otherwise(pl.lit("large")))
    rows = {r["cohort"]: r for r in cohort_table(frame, "town", "roc_auc", draws=20).to_dicts()}
    assert rows["small"]["small"] and not rows["large"]["small"]
    assert {k for k, v in rows["tiny"].items() if v is not None} == {"by", "cohort", "small", "metric"}
    assert comparable(frame["town"].to_numpy(), frame["y"].to_numpy(), frame["p_yes"].to_numpy(), "roc_auc") == ["large"]
    assert cohort_gap(frame, "town", "roc_auc", draws=20) is None


def test_an_unknown_cohort_column_is_named() -> None:
    with pytest.raises(InputError, match="planet"):
        cohort_table(scored(100), "planet", "roc_auc")


@pytest.mark.parametrize("column", [
    pl.Series([None, None, None], dtype=pl.Float64), pl.Series([True, None, False]), pl.Series(["é", "日本", None]),
    pl.Series(np.arange(500) / 7), pl.Series([1.0, math.inf, 2.0] * 20), pl.Series([1, 2, 3]),
    pl.Series(["2024-01-02"]).str.to_date(), pl.Series([f"id{i}" for i in range(900)]),
])
def test_any_column_can_be_a_cohort(column: pl.Series) -> None:
    groups = cohort_of(column)
    assert len(groups) == len(column) and groups.null_count() == 0 and groups.n_unique() <= 26 and groups.dtype == pl.String


@given(st.integers(0, 50), st.integers(1, 50))
def test_wilson_holds_the_share_and_stays_a_share(hits: int, more: int) -> None:
    low, high = wilson(hits, hits + more)
    assert 0 <= low <= hits / (hits + more) <= high <= 1


@settings(max_examples=15, deadline=None)
@given(st.floats(1, 200), st.floats(1, 200))
def test_the_threshold_follows_the_costs(false_alarm: float, miss: float) -> None:
    frame = scored(900).select("y", "fold", "p_no", "p_yes")
    costs = {"false_alarm": false_alarm, "miss": miss, "hit": 0.0}
    found = pick_threshold(frame, costs, draws=100)
    assert found["threshold"] in (found["break_even"], found["tuned"]) and math.isclose(found["break_even"], break_even(costs))
    best = max(value_per_1000(frame["y"], frame["p_yes"], t, costs) for t in np.linspace(0, 1, 101))
    assert value_per_1000(frame["y"], frame["p_yes"], found["tuned"], costs) >= best - 1e-9


def test_a_planted_slice_is_among_the_first_three() -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        n = 5000
        frame = pl.DataFrame({"a": rng.choice(list("wxyz"), n), "b": rng.choice(list("klmno"), n), "c": rng.normal(0, 1, n),
                              "d": rng.choice(["on", "off"], n)})
        bad = ((frame["a"] == "w") & (frame["b"] == "k")).to_numpy() & (rng.random(n) < 0.4)      # 2 % of rows
        loss = rng.gamma(2, 0.2, n) * np.where(bad, 5, 1)
        found = find_slices(frame, loss, frame.columns)
        assert any("a is w" in s and "b is k" in s for s in found["slice"].head(3)), (seed, found)


def test_no_slice_is_found_where_none_is_planted() -> None:
    listed = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        frame = pl.DataFrame({c: rng.choice(list("wxyz"), 2000) for c in "abcdef"})
        listed += find_slices(frame, rng.normal(1, 0.3, 2000), frame.columns).height > 0
    assert listed <= 5


def test_surprise_is_loss_beyond_what_the_model_expects() -> None:
    frame = scored(40_000)
    y, p = frame["y"].to_numpy(), frame.select("p_no", "p_yes").to_numpy()
    assert abs(row_surprise(y, p, "binary").mean()) < 0.01                  # true probabilities: none on average
    assert np.allclose(row_surprise(y, p, "binary"), row_surprise(y, p[:, 1], "binary"))
    three = np.array([[0.2, 0.3, 0.5]])
    assert row_surprise(np.array([2]), three, "multiclass")[0] == pytest.approx(-math.log(0.5) + (three * np.log(three)).sum())
    assert row_surprise(np.array([3.0]), np.array([[5.0, 4.0, 6.0]]), "regression")[0] == 2.0


def test_the_recall_of_a_class_under_one_percent_has_an_interval() -> None:
    y = np.r_[np.zeros(1990), np.ones(10)].astype(int)
    p = np.r_[np.full(1990, 0.1), np.full(6, 0.9), np.full(4, 0.1)]
    rare = recall_by_class(pl.DataFrame({"y": y, "p_no": 1 - p, "p_yes": p}), ["no", "yes"]).row(0, named=True)
    assert rare["class"] == "yes" and rare["found"] == 0.6 and rare["low"] < 0.35 and rare["high"] > 0.8


def test_disturbances_leave_rows_order_and_outcome_alone() -> None:
    frame = pl.DataFrame({"x": [1.0, None, 3.0] * 50, "who": ["a", "b", None] * 50, "y": [0, 1, 1] * 50})
    kinds = {"x": "number", "who": "category"}
    for key, (_, disturb) in disturbances(kinds, ["x"]).items():
        found = disturb(frame, np.random.default_rng(1))
        assert found["y"].equals(frame["y"]) and found.schema == frame.schema, key
    once, again = (lose_cells(frame, kinds, np.random.default_rng(5)) for _ in range(2))
    assert once.equals(again)
    assert rename_levels(frame, kinds, np.random.default_rng(5))["who"].null_count() <= 50
