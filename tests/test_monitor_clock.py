"""Age, triggers and alarms under a moved clock: no trigger early, none in a storm, none negative."""
from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.monitor.ageing import find_triggers, model_age
from pipeline.monitor.alerts import ALERT_SCHEMA
from pipeline.monitor.retraining import train_again
from room_kit import earlier_phases, execute, make_project, records, rows

NOTEBOOK = Path(__file__).parent.parent / "nbs/phases/08_monitor.ipynb"
LEARNED = dt.datetime(2024, 2, 1)


@pytest.mark.parametrize(("now", "stale"), [("2024-02-06T12:00:00+00:00", False), ("2024-02-10T12:00:00+00:00", True)], ids=["6 days", "10 days"])
def test_the_clock_sets_the_trigger(tmp_path, monkeypatch, now, stale):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JPY_SESSION_NAME", "test")
    monkeypatch.setenv("PILOTHOUSE_NOW", now)
    make_project(tmp_path, extra="  time: day\nmonitor: {retrain_every_days: 7, retrain_on_loss: 9}\n")
    run = earlier_phases(tmp_path, "binary", rows(1500, dt.datetime(2024, 2, 12), seed=3, first=9000))     # learned until 1 Feb
    execute(NOTEBOOK)
    trigger = json.loads((run / "08_monitor/trigger.json").read_text())
    assert trigger["state"] == ("stale" if stale else "fresh")
    aged = [m for m in trigger["moments"] if "age" in m["because"]]
    assert (trigger["retrain"] if stale else True) and trigger["asked_at"].startswith(now[:10])
    assert aged[0]["at"] >= "2024-02-08" if aged else True


@given(st.datetimes(dt.datetime(2000, 1, 1), dt.datetime(2099, 1, 1)), st.timedeltas(dt.timedelta(days=-400), dt.timedelta(days=400)))
def test_age_is_never_negative_in_any_zone(learned, later):
    for zone in (None, dt.UTC, dt.timezone(dt.timedelta(hours=-5))):
        try:
            now = (learned + later).replace(tzinfo=zone)
        except OverflowError:
            return
        age = model_age(learned, now, 90, 365)
        assert age.days >= 0 and (age.state == "fresh") == (age.days <= 90)


def test_no_storm_of_triggers():
    weeks = pl.DataFrame({"window": range(60), "to": [LEARNED + dt.timedelta(days=i) for i in range(60)]})
    alarms = pl.DataFrame([{"window": w, "rule": "loss risen", "severity": "ticket", "what": "loss", "number": 1.0, "limit": 0.5, "opened": True, "until": "", "lag_days": 0.0}
                           for w in range(60)], schema=ALERT_SCHEMA)
    triggers = find_triggers(weeks, alarms, LEARNED, 90, cool_down_days=14)
    assert triggers.height == 5 and triggers["window"].diff().drop_nulls().min() >= 14


def test_a_model_never_learns_from_an_outcome_of_the_future():
    seen: list[dt.datetime] = []

    def fit(known: pl.DataFrame):
        seen.append(known["__time"].max())
        return lambda other: other["y"].to_numpy() * 0.0

    frame = pl.DataFrame({"__time": [LEARNED + dt.timedelta(hours=6 * i) for i in range(400)], "y": [1.0] * 400})
    triangle = train_again(frame.head(100), frame.tail(300), fit, days=7, delay_days=3)
    starts = [part["__time"].min() for part in triangle.rows]
    for start, newest in zip(starts, seen[::2][:1] + seen[1::2], strict=False):
        assert newest <= max(start - dt.timedelta(days=3), frame["__time"][99])


def test_rolled_back_means_the_model_before_is_watched(tmp_path, monkeypatch):
    from pipeline.core.run import open_run
    from pipeline.monitor.watch import served_model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JPY_SESSION_NAME", "test")
    make_project(tmp_path)
    run = earlier_phases(tmp_path, "binary", None, n=300)
    assert served_model(open_run("08_monitor", "params/shop.yml", run))[0] == "train/model"
    fit = open_run("04_train", "params/shop.yml", run)
    for name in ("model", "default"):
        fit.save(f"train/{name}", {"made": name})
    fit.conclude("It is so.")
    fit.finish()
    rollout = open_run("07_rollout", "params/shop.yml", run)
    rollout.decide("what the rollout does", options=[{"option": "roll back"}], chose="roll back", because="worse")
    rollout.conclude("Back.")
    rollout.finish()
    assert served_model(open_run("09_watch", "params/shop.yml", run))[0] == "train/default"
    assert records(run, "07_rollout", "decisions")[0]["chose"] == "roll back"
