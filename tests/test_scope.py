"""The promise: thresholds against brute force, timelines that never reward worse data, plans that follow mechanically."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import GateFailed, InputError
from pipeline.core.metrics import metric
from pipeline.core.problem import Place, load_problem, parse_problem
from pipeline.core.run import function_named, read_checks, read_claims
from pipeline.scope.criteria import acceptance_table, check_metrics, constraints_table
from pipeline.scope.plan import compare_plans, derive_plan
from pipeline.scope.timeline import SIZES, STAGES, sequential_range, simulate_weeks, timeline_table, weeks_at
from pipeline.scope.value import best_threshold, break_even, value_curve, value_per_1000
from player import play

ROOT = Path(__file__).resolve().parents[1]
MONEY = st.floats(0, 1000, allow_nan=False)


def changed(**changes: object):
    "The flights problem with other values."
    values = load_problem(ROOT / "params/flights.yml").model_dump(mode="python")
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        values[section][key] = value
    return parse_problem(values, Place(), "example.yml")


# -- value


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 80), levels=st.integers(1, 12), false_alarm=MONEY, miss=MONEY, hit=st.floats(0, 500))
def test_no_threshold_beats_the_best_one(seed: int, n: int, levels: int, false_alarm: float, miss: float, hit: float) -> None:
    if miss + hit == 0:
        return
    rng = np.random.default_rng(seed)
    y, p = rng.integers(0, 2, n), rng.integers(0, levels + 1, n) / levels      # ties and the ends 0 and 1 included
    costs = {"false_alarm": false_alarm, "miss": miss, "hit": hit}
    best = value_per_1000(y, p, best_threshold(y, p, costs), costs)
    every = [value_per_1000(y, p, t, costs) for t in [*np.unique(p), 0.0, 0.5, np.nextafter(1, 2)]]
    assert best >= max(every) - 1e-6


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 60))
def test_the_curve_tells_what_each_of_its_thresholds_is_worth(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    y, p = rng.integers(0, 2, n), rng.integers(0, 9, n) / 8
    costs = {"false_alarm": 3, "miss": 7, "hit": 1}
    for threshold, acted, value in value_curve(y, p, costs).iter_rows():
        assert value == pytest.approx(metric("value_per_1000", y, p, threshold=threshold, costs=costs))
        assert acted == pytest.approx((p >= threshold).mean())


def test_calibrated_scores_put_the_best_threshold_at_break_even_and_swapped_costs_mirror_it() -> None:
    rng = np.random.default_rng(3)
    p = rng.random(100_000)
    y = (rng.random(len(p)) < p).astype(int)
    for false_alarm, miss in ((40, 100), (100, 40), (1, 9)):
        costs = {"false_alarm": false_alarm, "miss": miss, "hit": 0}
        assert best_threshold(y, p, costs) == pytest.approx(break_even(costs), abs=0.03)
    assert break_even({"false_alarm": 40, "miss": 100, "hit": 0}) < 0.5 < break_even({"false_alarm": 100, "miss": 40, "hit": 0})


@pytest.mark.parametrize("costs", [{}, {"false_alarm": -1, "miss": 1, "hit": 0}, {"false_alarm": 1, "miss": float("nan"), "hit": 0},
                                   {"false_alarm": 1, "miss": 0, "hit": 0}])
def test_costs_without_a_threshold_are_refused(costs: dict) -> None:
    with pytest.raises(InputError):
        break_even(costs)


# -- timeline


@settings(max_examples=120, deadline=None)
@given(a=st.floats(0, 1), b=st.floats(0, 1), size=st.sampled_from(sorted(SIZES)), seed=st.integers(0, 2**31))
def test_worse_readiness_never_shortens(a: float, b: float, size: str, seed: int) -> None:
    worse, better = sorted((a, b))
    slow, quick = simulate_weeks(size, worse, seed, 200), simulate_weeks(size, better, seed, 200)
    for share in (0.1, 0.5, 0.9):
        assert weeks_at(slow, share) >= weeks_at(quick, share) - 1e-12
    assert (slow["total"].to_numpy() >= quick["total"].to_numpy() - 1e-12).all()


@pytest.mark.parametrize("seed", range(5))
def test_archetypes_and_the_sequential_total_of_the_phase_table(seed: int) -> None:
    assert sequential_range() == (16, 46) and len(STAGES) == 5
    assert [(s.low, s.high) for s in STAGES] == [(4, 8), (4, 12), (4, 12), (2, 8), (2, 6)]
    assert 6 <= weeks_at(simulate_weeks("small", 0.9, seed)) <= 8
    assert 13 <= weeks_at(simulate_weeks("medium", 0.6, seed)) <= 26
    assert weeks_at(simulate_weeks("large", 0.5, seed)) > 26


def test_phases_are_late_together_and_stay_in_their_ranges() -> None:
    draws = simulate_weeks("large", 0.5, 7)
    assert np.corrcoef(draws[STAGES[0].name], draws[STAGES[3].name])[0, 1] > 0.4
    for stage in STAGES:
        weeks = draws[stage.name].to_numpy() / SIZES["large"].work
        assert stage.low <= weeks.min() and weeks.max() <= stage.high
    table = timeline_table(draws, "large")
    assert np.allclose(table["begins"][1:], table["ends"][:-1])      # large projects do not overlap


# -- criteria and plan


@pytest.mark.parametrize("task, metric_name", [("regression", "roc_auc"), ("binary", "mae"), ("multiclass", "value_per_1000")])
def test_a_metric_that_cannot_judge_the_task_is_named(task: str, metric_name: str) -> None:
    better = {"at_least": 0.0} if metric_name != "mae" else {"at_most": 1.0}
    problem = changed(problem__task=task, evaluate__metrics=[], evaluate__acceptance=[{"metric": metric_name, **better}])
    with pytest.raises(InputError, match=rf"evaluate.acceptance\[0\].metric = '{metric_name}'"):
        check_metrics(problem)


def test_every_limit_of_operation_that_is_declared_stands_in_the_table() -> None:
    problem = changed(deploy__rss_mb=123.0, deploy__latency_p99_ms=7.5, monitor__retrain_every_days=11.0)
    limits = dict(zip(constraints_table(problem)["key"], constraints_table(problem)["limit"]))
    assert (limits["deploy.rss_mb"], limits["deploy.latency_p99_ms"], limits["monitor.retrain_every_days"]) == ("≤ 123", "≤ 7.5", "≤ 11")
    declared = {f"deploy.{k}" for k in type(problem.deploy).model_fields} - {"deploy.region"}   # where it is, not where it may be
    assert declared <= set(limits)


def test_from_overnight_to_five_milliseconds_changes_candidates_and_serving() -> None:
    before = derive_plan(changed(problem__mode="batch", deploy__latency_p99_ms=5.0))
    after = derive_plan(changed(problem__mode="online", deploy__latency_p99_ms=5.0))
    differs = compare_plans(before, after)
    assert {"families", "serving"} <= set(differs["key"]) and (differs["because"] != "").all()


def test_a_changed_alert_does_not_change_the_plan() -> None:
    assert derive_plan(changed(monitor__window_days=1.0)) == derive_plan(changed())
    assert acceptance_table(changed(monitor__window_days=1.0)).equals(acceptance_table(changed()))


# -- the phase


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A project's root of its own, with the phase."
    (tmp_path / "params").mkdir()
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs/phases", tmp_path / "nbs/phases")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_phase(root: Path, problem: dict) -> Path:
    "The scope phase on a problem."
    (root / "params/example.yml").write_text(yaml.safe_dump(problem))
    play(root / "nbs/phases/01_scope.ipynb", problem="params/example.yml", run=f"outputs/{problem['problem']['name']}/main")
    return root / "outputs" / problem["problem"]["name"] / "main/01_scope"


def houses() -> dict:
    return {
        "problem": {"name": "houses", "statement": "What will this house sell for?", "task": "regression", "target": "price",
                    "kpi": {"name": "error of the price told", "baseline": 60, "target": 40, "unit": "k"}},
        "data": {"sources": [{"name": "sales", "kind": "csv", "path": "sales.csv"}]},
        "evaluate": {"acceptance": [{"metric": "mae", "at_most": 45.0}]},
    }


def test_a_regression_without_costs_or_accessibility_still_makes_a_promise(project: Path) -> None:
    folder = run_phase(project, houses())
    assert {c.name for c in read_claims(folder)} == {"weeks_to_launch", "training_memory", "training_money", "training_co2e"}
    warning = next(c for c in read_checks(folder) if c.title == "accessibility needs are stated")
    assert warning.verdict == "not applicable" and warning.found.startswith("warning")


def test_every_claim_can_be_computed_again_from_what_was_kept(project: Path) -> None:
    problem = load_problem(ROOT / "params/flights.yml").model_dump(mode="python")
    folder = run_phase(project, problem)
    for claim in read_claims(folder):
        name = claim.of[0].removeprefix("scope/")
        kept = pl.read_parquet(folder / f"{name}.parquet") if (folder / f"{name}.parquet").exists() else json.loads((folder / f"{name}.json").read_text())
        assert function_named(claim.by)(kept, **claim.using).value == claim.value


def test_a_promise_without_acceptance_lines_is_no_go(project: Path) -> None:
    problem = houses() | {"evaluate": {"acceptance": []}}
    with pytest.raises(GateFailed, match="acceptance lines are declared"):
        run_phase(project, problem)


def test_without_a_kpi_the_phase_stops_with_file_and_key(project: Path) -> None:
    problem = houses()
    del problem["problem"]["kpi"]
    with pytest.raises(InputError, match=r"example.yml.*problem.kpi is missing"):
        run_phase(project, problem)
    assert not (project / "outputs/houses/main/01_scope").exists()
