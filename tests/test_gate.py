"The gate: bounds instead of hopes, looks that are counted, runs that must be stable, rivals that are tried."
from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluate_phase import Place, make_table, recompute, verdicts

from pipeline.core import audit
from pipeline.core.bounds import share_interval
from pipeline.core.errors import Inconclusive, InputError
from pipeline.core.run import Estimate, commit_phase, judge, overall, read_checks, read_claims
from pipeline.core.store import read_frame
from pipeline.evaluate.calibration import check_calibration
from pipeline.evaluate.conformal import LEVEL, check_promise, cut_for, cuts_by, holds, honest_cuts, intervals_of, learn_promise, row_cuts, sets_of, strangeness
from pipeline.evaluate.gate import answer_times, check_operations, stable_count, tell_answer
from pipeline.evaluate.holdout import level_for, look_of, looks_at, open_holdout, reason_for
from pipeline.evaluate.measures import measure
from pipeline.evaluate.rivals import check_rivals, gain_between, old_and_new
from pipeline.evaluate.threshold import choose_threshold
from pipeline.train.reweighing import Grouping, learn_grouping


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def only(place: Place, *steps: Callable[..., Any], run: str = "main") -> Path:
    "The phase with these steps after the holdout was opened, and no others; every display is rendered."
    opened = place.open("05_evaluate", run)
    choose_threshold(opened)
    holdout = open_holdout(opened)
    place.shown = [step(opened, holdout)._repr_html_() for step in steps]
    opened.conclude("done")
    opened.finish()
    return commit_phase(opened.folder, "05_evaluate")


# -- bounds

@given(st.floats(-10, 10), st.floats(0, 5), st.floats(0, 5), st.floats(-10, 10), st.booleans())
def test_the_unfavourable_end_decides_and_a_straddling_interval_is_inconclusive(value: float, below: float, above: float, limit: float, least: bool) -> None:
    found = Estimate(value, value - below, value + above)
    verdict = judge(found, limit, None) if least else judge(found, None, limit)
    bad, good = (found.low, found.high) if least else (found.high, found.low)
    assert bad is not None and good is not None
    clears = (lambda end: end >= limit) if least else (lambda end: end <= limit)
    assert verdict == ("go" if clears(bad) else "inconclusive" if clears(good) else "no-go")
    alone = (limit, None) if least else (None, limit)
    assert judge(found, *alone, "value") == judge(Estimate(value), *alone) == ("go" if clears(value) else "no-go")


@pytest.mark.parametrize("found", [None, Estimate(math.nan), Estimate(math.inf), Estimate(0.7, math.nan, 0.8), Estimate(0.7, 0.6, math.inf)])
@pytest.mark.parametrize("limit", [{"at_least": 0.1, "at_most": None}, {"at_least": None, "at_most": 0.9}])
def test_what_was_not_measured_is_never_a_go(found: Estimate | None, limit: dict[str, float | None]) -> None:
    assert judge(found, limit["at_least"], limit["at_most"]) == "no-go"


def test_a_bound_that_was_asked_for_but_not_measured_is_no_go() -> None:
    assert judge(Estimate(0.9), 0.5, None) == "go" and judge(Estimate(0.9), 0.5, None, "low") == "no-go"
    assert overall(["go", "inconclusive"]) == "inconclusive" and overall(["inconclusive", "no-go"]) == "no-go" and Inconclusive.exit_code == 5


def test_a_borderline_model_is_inconclusive_on_its_bound_and_go_only_where_the_line_says_value(place: Place) -> None:
    place.prepare("binary", seeds=1, n=600)
    claim = next(c for c in read_claims(place.judge()) if c.name == "roc_auc")
    assert claim.low is not None and claim.low < claim.value
    limit = round((claim.low + claim.value) / 2, 4)
    for line, wanted in ((f"{{metric: roc_auc, at_least: {limit}}}", "inconclusive"), (f"{{metric: roc_auc, at_least: {limit}, bound: value}}", "go")):
        place.prepare("binary", seeds=1, n=600, evaluate=f"acceptance: [{line}]")
        folder = place.judge()
        assert verdicts(folder)[f"ROC AUC at least {limit:g} on holdout"] == wanted
        assert json.loads((folder / "answer.json").read_text())["verdict"] == wanted


# -- looks

def entry(model: str, why: str = "", event: str = "sealed.opened", rows: str = "r") -> dict[str, Any]:
    return {"event": event, "at": "2024-01-01", "run": "a/b", "details": {"sha256": rows, "reason": reason_for(model * 64, f"{why}; " if why else None)}}


def test_looks_are_counted_by_model_and_rows() -> None:
    trail = [entry(m) for m in "abac"]
    assert [look_of(trail, m * 64, "r") for m in "abcd"] == [1, 2, 3, 0] and look_of(trail, "a" * 64, "other") == 0
    assert [level_for(k) for k in (1, 2, 5)] == [0.95, 0.975, 0.99]


def test_a_reason_spares_one_look_only_and_a_replay_may_bring_it() -> None:
    counted = [one.counted for one in looks_at([entry("a"), entry("b", "wrong labels"), entry("c", "wrong labels"), entry("d", "new law")], "r")]
    assert counted == [1, 1, 2, 2]
    late = [entry("a"), entry("b"), entry("b", "wrong labels in a", "sealed.replayed")]
    assert [one.counted for one in looks_at(late, "r")] == [1, 1] and looks_at(late[:2], "r")[1].counted == 2
    assert looks_at([entry("a", "no reason is needed")], "r")[0].counted == 1


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from(["", "one", "two"])), max_size=15))
def test_counted_looks_never_fall_and_never_exceed_the_models(runs: list[tuple[str, str]]) -> None:
    found = looks_at([entry(model, why) for model, why in runs], "r")
    counted = [one.counted for one in found]
    assert counted == sorted(counted) and all(c <= one.number for c, one in zip(counted, found)) and len(found) == len({m for m, _ in runs})
    assert len({one.reason for one in found if one.reason}) == sum(bool(one.reason) for one in found)


def test_a_second_model_widens_unless_a_reason_is_given_and_the_report_says_so(place: Place) -> None:
    place.prepare("binary", seed=7, seeds=1)
    assert read_claims(place.judge())[0].using["level"] == 0.95
    place.prepare("binary", seed=8, seeds=1, run="second", family="trees")
    second = place.judge("second")
    assert read_claims(second)[0].using["level"] == 0.975 and "reused: 2 models" in json.loads((second / "answer.json").read_text())["answer"]
    said = "look_again: the first two learned from a month without weather"
    place.prepare("binary", seed=9, seeds=1, run="third", family="trees", evaluate=said)
    third = place.judge("third")
    assert read_claims(third)[0].using["level"] == 0.975                      # the second look still counts, this one does not
    assert any("without weather" in s and "reused: 3 models" in s for s in place.shown)
    place.prepare("binary", seed=10, seeds=1, run="fourth", family="trees", evaluate=said)
    assert read_claims(place.judge("fourth"))[0].using["level"] == level_for(3)
    ledger = json.loads((third / "ledger.json").read_text())
    assert [one["number"] for one in ledger] == [1, 2, 3] and audit.verify(place.root / "outputs/store") > 0


# -- stability

@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=12))
def test_stable_runs_never_count_past_a_bad_one_or_a_ground_twice(runs: list[tuple[str, bool]]) -> None:
    count = stable_count([{"ground": g, "verdict": "go" if good else "no-go"} for g, good in runs])
    since = max((i for i, (_, good) in enumerate(runs) if not good), default=-1)
    assert count == len({g for g, _ in runs[since + 1:]})


def test_an_inconclusive_run_is_no_good_run() -> None:
    assert stable_count([{"ground": "a", "verdict": "go"}, {"ground": "b", "verdict": "inconclusive"}, {"ground": "c", "verdict": "go"}]) == 1


# -- rivals and operations

def test_an_older_model_is_worse_where_the_world_moved_and_no_worse_where_it_did_not(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import test_evaluate_phase

    original = test_evaluate_phase.make_table

    def moving(task: str, n: int, seed: int = 3, timed: bool = True) -> tuple[pl.DataFrame, dict[str, Any]]:
        frame, contract = original(task, n, seed, timed)
        flipped = pl.when(pl.int_range(pl.len()) < n // 3).then(-pl.col("size")).otherwise(pl.col("size"))
        return frame.with_columns(flipped.alias("size")), contract

    monkeypatch.setattr(test_evaluate_phase, "make_table", moving)
    place.prepare("binary", family="trees", n=3000, seeds=1)
    folder = only(place, check_rivals)
    claims = {c.name: c for c in read_claims(folder)}
    assert claims["staleness"].low is not None and claims["staleness"].low > 0.1
    assert verdicts(folder)["what age costs is known (staleness)"] == "go" and recompute(folder) == 2
    monkeypatch.setattr(test_evaluate_phase, "make_table", original)
    place.prepare("binary", family="trees", n=3000, seeds=1, run="calm")
    claims = {c.name: c for c in read_claims(only(place, check_rivals, run="calm"))}
    assert claims["staleness"].low is not None and claims["staleness"].low < 0.02
    assert {"old_p", "new_p", "simple_p"} <= set(read_frame(folder / "rivals.parquet").columns)


def test_a_simpler_model_that_is_better_beyond_doubt_is_a_no_go(place: Place) -> None:
    place.prepare("binary", family="trees", n=1500, seeds=1, reverse=True)
    assert verdicts(only(place, check_rivals))["no simpler model is better beyond doubt"] == "no-go"


def test_without_time_age_is_not_applicable_and_gains_have_the_right_sign() -> None:
    assert old_and_new(pl.DataFrame({"x": range(1000)}), 1) is None
    rng = np.random.default_rng(1)
    y = rng.normal(size=400)
    frame = pl.DataFrame({"y": y, "prediction": y + rng.normal(0, .1, 400), "old_prediction": y + rng.normal(0, 1, 400)})
    gain = gain_between(frame, "mae", "", "old_")
    assert gain is not None and gain.low is not None and gain.low > 0


def test_a_model_that_is_too_large_or_too_slow_does_not_pass(place: Place) -> None:
    place.prepare("binary", family="trees", seeds=1)
    (place.root / "tiny.yml").write_text((place.root / "tiny.yml").read_text() + "\ndeploy: {model_mb: 0.001, latency_p99_ms: 0.001}\n")
    found = verdicts(only(place, check_operations))
    assert found["the model is small enough to ship, in MB (deploy.model_mb)"] == "no-go"
    assert found["one answer is quick enough, before any network (deploy.latency_p99_ms)"] == "no-go"
    assert answer_times(lambda row: row, [{"x": 1}] * 5).height == 5


def test_criteria_come_out_the_same_twice_although_times_are_measured(place: Place) -> None:
    place.prepare("regression", family="trees", seeds=1, evaluate="cohorts: [town]")
    steps = (check_rivals, check_calibration, check_promise, check_operations)
    first, again = ([vars(c) for c in read_checks(folder)] + [c.value for c in read_claims(folder)] for folder in (only(place, *steps), only(place, *steps)))
    assert first == again and len(first) >= 6


def test_what_columns_are_called_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Features called y, prediction and low are not taken for the outcome and the answers that are stored beside them."
    def called(names: dict[str, str]) -> Callable[..., tuple[pl.DataFrame, dict[str, Any]]]:
        def make(*asked: Any, **how: Any) -> tuple[pl.DataFrame, dict[str, Any]]:
            frame, contract = make_table(*asked, **how)
            columns = [c | {"name": names[c["name"]]} for c in contract["columns"]]
            return frame.rename(names), contract | {"features": [c["name"] for c in columns], "columns": columns}

        return make

    found = []
    for odd in (("width", "gust", "city"), ("y", "prediction", "low")):
        names = dict(zip(("size", "wind", "town"), odd))
        (root := tmp_path / odd[0]).mkdir()
        place = Place(root, monkeypatch)
        monkeypatch.setattr("test_evaluate_phase.make_table", called(names))
        place.prepare("regression", family="trees", seeds=0, default=False)
        folder = only(place, check_rivals)
        found += [{c.name: c.value for c in read_claims(folder)}, read_frame(folder / "rivals.parquet")["simple_prediction"].to_list()]
    assert found[:2] == found[2:] and found[0]["gain_over_simple"] < 1
    place.prepare("regression", family="trees", seeds=0, default=False, run="again", evaluate="cohorts: [low]")
    with pytest.raises(InputError, match="evaluate.cohorts: column 'low' has the name of a column of the stored answers"):
        only(place, run="again")


# -- promises

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 5))
def test_sets_keep_their_promise_on_exchangeable_rows(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(k), 4000)
    wrong = p ** 2 / (p ** 2).sum(1, keepdims=True)               # probabilities need not be right
    y = np.array([rng.choice(k, p=row) for row in p])
    cut = cut_for(strangeness(y[:2000], wrong[:2000], False))
    sets = sets_of(wrong[2000:], cut)
    assert sets[np.arange(2000), y[2000:]].mean() > LEVEL - 0.04 and sets.any(axis=1).all()


def test_cuts_equal_the_definition_and_a_group_gets_its_own() -> None:
    strange = np.random.default_rng(2).exponential(size=999)
    assert cut_for(strange, 0.9) == np.sort(strange)[899] and math.isinf(cut_for(strange[:8], 0.9))
    group = np.array(["a"] * 910 + ["b"] * 60 + ["c"] * 29)
    own = cuts_by(strange, group)
    assert set(own) == {"a", "b"} and own["a"] == cut_for(strange[:910])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_every_group_of_every_cohort_column_keeps_the_promise(seed: int) -> None:
    "Two columns cross: a row belongs to a group of each, and each group is held to the same word, tables and single rows alike."
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame({"site": rng.choice(["a", "b", "c"], 12_000, p=[0.6, 0.35, 0.05]), "age": rng.integers(20, 80, 12_000)})
    strange = rng.exponential(frame.select(pl.when(pl.col("site") == "c").then(4.0).otherwise(1.0) + (pl.col("age") > 65)).to_series().to_numpy())
    groupings = [learn_grouping(frame["site"]), learn_grouping(frame["age"])]
    promise = json.loads(json.dumps(learn_promise(strange[:6000], frame[:6000], groupings), allow_nan=False))     # as a package holds it
    later, told = frame[6000:], strange[6000:]
    cuts = row_cuts(promise, later)
    for group in [grouping.of(later[grouping.by]).to_numpy() for grouping in groupings]:
        for name in np.unique(group):
            held, n = (told <= cuts)[group == name].mean(), (group == name).sum()
            assert held > LEVEL - 4 * math.sqrt(2 * LEVEL * (1 - LEVEL) / n), (name, held, n)      # about as many rows to learn from
    assert (told[(later["site"] == "c").to_numpy()] <= promise["cut"]).mean() < LEVEL - 0.15
    assert [row_cuts(promise, later[i:i + 1])[0] for i in range(5)] == cuts[:5].tolist()


def test_small_groups_and_those_that_a_request_cannot_name_share_the_cut_of_all_and_are_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_wards(*asked: Any, **how: Any) -> tuple[pl.DataFrame, dict[str, Any]]:
        frame, contract = make_table(*asked, **how)
        town = pl.when(pl.col("__row") % 30 == 0).then(pl.lit("Céret")).otherwise(pl.col("town").replace({"Céret": "Bonn"}))
        return frame.with_columns(town=town, ward=pl.when(pl.col("__row") % 3 == 0).then(pl.lit("east")).otherwise(pl.lit("west"))), contract

    monkeypatch.setattr("test_evaluate_phase.make_table", with_wards)
    place.prepare("regression", family="trees", n=2400, seeds=0, default=False, evaluate="cohorts: [town, ward]")
    folder = only(place, check_promise)
    promise, found = json.loads((folder / "promise.json").read_text()), read_frame(folder / "conformal.parquet")
    assert [one["grouping"]["by"] for one in promise["groups"]] == ["town"] and set(promise["groups"][0]["cuts"]) == {"Aachen", "Bonn"}
    assert found.filter(cohort="Céret")["own_cut"].to_list() == [None] and found.filter(by="ward")["own_cut"].null_count() == 2
    said = place.shown[-1]
    assert "town Céret (" in said and "ward: no input of the model" in said
    stored = read_frame(folder / "predictions.parquet").sort("__time")
    early, late = stored.head(stored.height // 2), stored.tail(stored.height // 2)          # the earlier half draws the line, the later half judges it
    numbers = [half.select("prediction", "low", "high").to_numpy() for half in (early, late)]
    drawn = learn_promise(strangeness(early["y"].to_numpy(), numbers[0], True), early, [Grouping.from_dict(one["grouping"]) for one in promise["groups"]])
    lines = intervals_of(numbers[1], row_cuts(drawn, late))
    inside = (lines[:, 0] <= late["y"].to_numpy()) & (late["y"].to_numpy() <= lines[:, 1])
    claim = next(c for c in read_claims(folder) if c.name == "promise_kept")
    assert claim.value == inside.mean() and claim.n == late.height and recompute(folder) >= 1
    for row in found.to_dicts():
        assert row["covered"] == inside[(late[row["by"]] == row["cohort"]).to_numpy()].mean()


@pytest.mark.parametrize("timed", [True, False])
def test_what_drew_the_line_does_not_judge_it(timed: bool) -> None:
    "Whatever the rows of a day are, the line that judges them stays where it is, and others move."
    day = np.repeat(np.arange(40), 10)
    calm = np.random.default_rng(1).random(400)
    frame = pl.DataFrame({"day": day}).with_columns(**({"__time": pl.col("day")} if timed else {}))
    before = honest_cuts(calm, frame, block=day)[:, 0]
    assert np.isnan(before).tolist() == ((day < 20) & timed).tolist()
    for strange in (7, 33):
        after = honest_cuts(np.where(day == strange, 100.0, calm), frame, block=day)[:, 0]
        np.testing.assert_array_equal(after[day == strange], before[day == strange])
        assert (before[day > 33] < after[day > 33]).any() or timed and strange == 33      # the later half teaches nobody


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("n", [300, 1000, 3000])
def test_near_chance_the_shipped_model_keeps_its_promise(n: int, k: int) -> None:
    "Pure noise, a model that was fitted on all rows: nine of ten new rows, within what so few rows to draw the line from allow."
    held = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(n + 2000, 3)), rng.integers(0, k, n + 2000)
        first = n * 4 // 5
        means = np.array([x[:first][y[:first] == c].mean(0) for c in range(k)])
        score = x[first:] @ means.T - (means**2).sum(1) / 2                     # a discriminant that learnt noise
        p = np.exp(score) / np.exp(score).sum(1, keepdims=True)
        cut = cut_for(strangeness(y[first:n], p[:n - first], False))
        held.append(holds(y[n:], p[n - first:], cut, False).mean())
    spread = math.sqrt(LEVEL * (1 - LEVEL) * (1 / (n - first) + 1 / 2000) / 20)
    assert -3 * spread < np.mean(held) - LEVEL < 3 * spread + 1 / (n - first)


def test_intervals_of_coverage_allow_for_rows_that_come_together() -> None:
    rng = np.random.default_rng(4)
    day = np.repeat(np.arange(30), 50)
    hits = rng.random(1500) < np.clip(0.9 + rng.normal(0, 0.15, 30)[day], 0, 1)
    alone, together = share_interval(hits), share_interval(hits, day)
    assert together[1] - together[0] > 1.5 * (alone[1] - alone[0])


def test_an_acceptance_line_that_was_skipped_is_no_go(place: Place) -> None:
    place.prepare("binary", seeds=1, evaluate="acceptance: [{metric: roc_auc, at_least: 0.5}]")
    opened = place.open("05_evaluate", "main")
    choose_threshold(opened)
    holdout = open_holdout(opened)
    answer = tell_answer(opened, holdout, measure(opened, holdout))
    assert opened.verdict == "no-go" and "acceptance line 1 (roc_auc) is judged" in answer
