"""08_monitor end to end on made runs: every task, with and without times, with and without production."""
from __future__ import annotations

import datetime as dt
from pathlib import Path

import polars as pl
import pytest

from pipeline.core.run import function_named, open_run
from room_kit import earlier_phases, execute, make_project, records, rows

NOTEBOOK = Path(__file__).parent.parent / "nbs/phases/08_monitor.ipynb"
LATER = dt.datetime(2024, 2, 12)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JPY_SESSION_NAME", "test")   # a failed gate is shown, not raised
    return tmp_path


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_watches_every_task(project, task):
    make_project(project, task)
    run = earlier_phases(project, task, rows(2400, LATER, task, seed=3, first=9000))
    execute(NOTEBOOK)
    claims = {c["name"]: c for c in records(run, "08_monitor", "claims")}
    assert claims["production_metric"]["n"] > 2000 and claims["model_age"]["value"] > 30
    assert records(run, "08_monitor", "decisions")[0]["what"] == "retraining"
    assert records(run, "08_monitor", "answer")["verdict"] == "go"
    outputs = records(run, "08_monitor", "receipt")["outputs"]
    assert {"monitor/windows", "monitor/alerts", "monitor/retraining"} <= set(outputs)
    assert outputs["monitor/latencies"]["timing"] and sum(o["timing"] for o in outputs.values()) == 1


def test_every_claim_is_computed_again(project):
    make_project(project)
    run = earlier_phases(project, "binary", rows(1500, LATER, seed=3, first=9000))
    execute(NOTEBOOK)
    again = open_run("10_report", "params/shop.yml", "outputs/shop/main")
    for claim in again.claims("monitor"):
        found = function_named(claim.by)(*[again.load(a) for a in claim.of], **claim.using)
        assert getattr(found, "value", found) == claim.value, claim.name
    assert records(run, "08_monitor", "claims")


def test_rows_without_times(project):
    make_project(project, extra="")
    run = earlier_phases(project, "binary", rows(2400, LATER, seed=3, first=9000, times=False), times=False)
    execute(NOTEBOOK)
    checks = {c["title"]: c["verdict"] for c in records(run, "08_monitor", "checks")}
    assert checks["The model is not past its withdrawal date"] == "not applicable"
    assert records(run, "08_monitor", "answer")["verdict"] == "go"


@pytest.mark.parametrize("clock", [
    pl.col("__time").cast(pl.Date), pl.col("__time").dt.replace_time_zone("America/New_York", ambiguous="earliest", non_existent="null").forward_fill(),
    pl.col("__time").cast(pl.Datetime("ms")), pl.col("__time").dt.epoch("s"),
], ids=["dates", "zone", "milliseconds", "numbers"])
def test_any_kind_of_time(project, clock):
    make_project(project)
    run = earlier_phases(project, "binary", rows(1500, LATER, seed=3, first=9000).with_columns(clock), clock=clock)
    names = execute(NOTEBOOK)
    assert names["found"].windows.height >= 4 and records(run, "08_monitor", "answer")["verdict"] == "go"


@pytest.mark.parametrize("production", [None, rows(10, LATER).clear()], ids=["absent", "empty"])
def test_without_production_it_says_so(project, production):
    make_project(project)
    run = earlier_phases(project, "binary", production, n=300)
    execute(NOTEBOOK)
    said = records(run, "08_monitor", "answer")
    assert said["verdict"] == "not applicable" and "data.split.production_from" in said["answer"] and "pilothouse monitor shop --url" in said["answer"]
    assert {c["verdict"] for c in records(run, "08_monitor", "checks")} == {"not applicable"}


def test_every_line_that_production_was_promised_is_judged(project):
    make_project(project, extra="  time: day\nevaluate: {acceptance: [{metric: brier, at_most: 0.3, on: production}, {metric: roc_auc, at_least: 0.99, on: production}]}\n")
    run = earlier_phases(project, "binary", rows(2400, LATER, seed=3, first=9000))
    execute(NOTEBOOK)
    judged = {tuple(c["answers"])[0]: c["verdict"] for c in records(run, "08_monitor", "checks") if c["title"].endswith("in production keeps the promise")}
    assert judged == {"evaluate.acceptance.0": "go", "evaluate.acceptance.1": "no-go"}


def test_thirty_production_rows(project):
    make_project(project)
    run = earlier_phases(project, "binary", rows(30, LATER, seed=3, first=9000), n=300)
    execute(NOTEBOOK)
    assert records(run, "08_monitor", "answer")["answer"]


def test_a_changed_world_is_an_alarm_and_a_trigger(project):
    make_project(project)
    calm = rows(1200, LATER, seed=3, first=9000)
    flipped = rows(1200, LATER + dt.timedelta(days=25), seed=4, first=11_000).with_columns(
        y=pl.when(pl.col("y") == "true").then(pl.lit("false")).otherwise(pl.lit("true")))
    run = earlier_phases(project, "binary", pl.concat([calm, flipped]))
    names = execute(NOTEBOOK)
    opened = names["found"].alerts.filter("opened")
    assert opened.filter(rule="loss unusual")["window"].to_list() == [3] and "loss risen" in set(opened["rule"])
    assert records(run, "08_monitor", "trigger")["retrain"]
    assert names["trial"].chosen != "never" and names["trial"].gained.low > 0
    assert records(run, "08_monitor", "decisions")[0]["chose"] == names["trial"].chosen
