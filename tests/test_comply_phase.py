"""09_comply end to end on made runs: with and without a subject, forbidden columns, gaps, leaks, a broken trail."""
from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.comply.traces import find_traces
from pipeline.core.run import function_named, open_run, read_saved
from pipeline.data.versions import save_version
from pipeline.deploy.inference_log import Layout, Recorder, read_inferences
from room_kit import contract_of, earlier_phases, execute, make_project, records, rows

NOTEBOOK = Path(__file__).parent.parent / "nbs/phases/09_comply.ipynb"
LATER = dt.datetime(2024, 2, 12)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JPY_SESSION_NAME", "test")
    return tmp_path


def checks(run: Path) -> dict[str, str]:
    return {c["title"]: c["verdict"] for c in records(run, "09_comply", "checks")}


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_every_task(project, task):
    make_project(project, task)
    run = earlier_phases(project, task, rows(300, LATER, task, seed=3, first=9000))
    names = execute(NOTEBOOK)
    assert checks(run)["An erased subject leaves no trace"] == "go" and checks(run)["A forgotten subject leaves the inference log"] == "not applicable"
    assert {"comply/columns", "comply/gaps", "comply/erasure"} <= set(records(run, "09_comply", "receipt")["outputs"])
    assert names["drill"].certificate["traces_after"] == 0 < names["drill"].certificate["traces_before"]
    again = open_run("10_report", "params/shop.yml", "outputs/shop/main")
    for claim in again.claims("comply"):
        found = function_named(claim.by)(*[again.load(a) for a in claim.of], **claim.using)
        assert getattr(found, "value", found) == claim.value, claim.name


def test_the_drill_touches_nothing_and_names_nobody(project):
    make_project(project)
    run = earlier_phases(project, "binary", rows(300, LATER, seed=3, first=9000))
    save_version(project / "outputs/store", "shop", pl.read_parquet(run / "02_data/train.parquet"))
    log = Recorder(project / "outputs/store", "shop", {1: Layout(("price",), (), "customer", ("false", "true"))}, interval=60, collects=False)
    for i in range(60):
        log.add(1.7e9 + i, f"r{i}", 1, "live", 200, 0.4, json.dumps({"rows": [{"price": i, "customer": f"C-{i % 9:04d}"}]}).encode(), b'{"predictions": [{"prediction": "true", "p": {"false": 0.1, "true": 0.9}}]}')
    log.close()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and ".work" not in p.parts}
    names = execute(NOTEBOOK)
    answers, _ = records_of_log = read_saved(run, "comply/log").to_dicts()
    assert checks(run)["A forgotten subject leaves the inference log"] == "go" and [r["left"] for r in records_of_log] == [0, 0]
    assert answers["before"] - answers["after"] == answers["of_the_subject"] > 0 and read_inferences(project / "outputs/store", "shop").height == 60
    assert all(p.read_bytes() == content for p, content in before.items())
    assert not (run / "09_comply/.scratch").exists()
    assert names["drill"].done.filter(kind="table")["rows_removed"][0] > 0
    customers = pl.read_parquet(run / "02_data/train.parquet")["customer"].unique()
    for name in customers:
        assert not find_traces(run / "09_comply", name)
    trail = (project / "outputs/store/audit.jsonl").read_text()
    assert "erasure.drilled" in trail and "C-00" not in trail
    assert [json.loads(line)["event"] for line in trail.splitlines()][0] == "sealed.replayed"      # the holdout was opened for no decision


def test_the_same_rows_give_the_same_drill(project):
    make_project(project)
    run = earlier_phases(project, "binary", None)
    execute(NOTEBOOK)
    first = records(run, "09_comply", "receipt")["outputs"]
    execute(NOTEBOOK)
    second = records(run, "09_comply", "receipt")["outputs"]
    assert {n: o["sha256"] for n, o in first.items() if not o["timing"]} == {n: o["sha256"] for n, o in second.items() if not o["timing"]}
    assert "train/model" in records(run, "09_comply", "receipt")["loaded"] and "train/validation" in records(run, "09_comply", "receipt")["loaded"]


def test_without_a_subject_there_is_nothing_to_erase(project, monkeypatch):
    make_project(project)
    monkeypatch.setattr("room_kit.contract_of", lambda frame, task: contract_of(frame, task, subject=None))
    run = earlier_phases(project, "binary", None)
    names = execute(NOTEBOOK)
    assert checks(run)["An erased subject leaves no trace"] == "not applicable"
    assert names["drill"].why_not == "No subject column is declared: nothing to erase."
    assert records(run, "09_comply", "answer")["verdict"] == "go"


def test_a_forbidden_column_and_its_proxy_are_named(project, monkeypatch):
    make_project(project, extra="  time: day\ncomply: {forbidden: [country]}\n")
    run = earlier_phases(project, "binary", None)
    execute(NOTEBOOK)
    found = {c["title"]: c for c in records(run, "09_comply", "checks")}["No forbidden column and no proxy is an input"]
    assert found["verdict"] == "no-go" and "country" in found["why"]


def test_a_spare_input_is_proposed_only_when_it_costs_nothing(project, monkeypatch):
    make_project(project)
    run = earlier_phases(project, "binary", None)
    judge = open_run("05_evaluate", "params/shop.yml", run)
    judge.save("evaluate/importance", pl.DataFrame({"column": ["price", "country"], "loss": [0.1, 0.0], "low": [0.08, -0.01], "high": [0.12, 0.01]}))
    judge.save("evaluate/predictions", pl.read_parquet(run / "05_evaluate/predictions.parquet"))
    judge.conclude("It is so.")
    judge.finish()
    execute(NOTEBOOK)
    decision = records(run, "09_comply", "decisions")[0]
    assert decision["what"] == "inputs to propose" and decision["chose"] == "all"       # the country is needed, whatever was said
    assert {c["name"]: c for c in records(run, "09_comply", "claims")}["cost_of_fewer"]["high"] > 0.01


def test_a_wide_gap_is_no_go(project):
    make_project(project, extra="  time: day\nevaluate: {cohorts: [country], cohort_gap: 0.05}\n")
    run = earlier_phases(project, "binary", None)
    from pipeline.evaluate.cohorts import cohort_gap

    judge = open_run("05_evaluate", "params/shop.yml", "outputs/shop/main")
    rng = np.random.default_rng(0)
    country = np.repeat(["AT", "DE"], 1000)
    y = rng.integers(0, 2, 2000)
    p = np.where(country == "AT", np.clip(0.5 + 0.4 * (y - 0.5) + rng.normal(0, 0.1, 2000), 0, 1), rng.random(2000))
    judge.save("evaluate/predictions", pl.DataFrame({"__row": range(1500, 3500), "country": country, "y": y, "p_false": 1 - p, "p_true": p}))
    judge.claim("gap_country", of="evaluate/predictions", by=cohort_gap, using={"by": "country", "name": "roc_auc", "classes": ["false", "true"], "draws": 100}, on="holdout")
    judge.conclude("It is so.")
    judge.finish()
    execute(NOTEBOOK)
    assert checks(run)["country groups are served alike (gap of ROC AUC)"] == "no-go"
    assert pl.read_parquet(run / "09_comply/gaps.parquet")["low"][0] > 0.05


def test_declared_cohorts_with_few_rows_are_said_to_be_few(project):
    make_project(project, extra="  time: day\nevaluate: {cohorts: [country, channel]}\n")
    run = earlier_phases(project, "binary", None)
    judge = open_run("05_evaluate", "params/shop.yml", "outputs/shop/main")
    judge.conclude("It is so.")
    judge.finish()
    execute(NOTEBOOK)
    told = "cohorts country and channel are declared; too few rows to compare"
    assert told in records(run, "09_comply", "answer")["answer"]
    assert told in [c["found"] for c in records(run, "09_comply", "checks") if c["title"] == "Cohorts are served alike"]


def test_loose_files_and_a_broken_trail_are_no_go(project):
    make_project(project)
    run = earlier_phases(project, "binary", None)
    execute(NOTEBOOK)
    assert checks(run)["Keys and sealed data are readable by their owner alone"] == "go"
    assert checks(run)["The audit trail is whole"] == "go"
    (project / "outputs/store/keys/subjects.keys").write_text("{}")      # every subject's key, where comply.encrypt is on
    (project / "outputs/store/keys/subjects.keys").chmod(0o644)
    log = project / "outputs/store/audit.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[1:]))
    execute(NOTEBOOK)
    found = checks(run)
    assert found["Keys and sealed data are readable by their owner alone"] == "no-go" and found["The audit trail is whole"] == "no-go"
    assert records(run, "09_comply", "answer")["verdict"] == "no-go"


def test_tampering_is_tried_once_there_are_entries(project):
    make_project(project)
    run = earlier_phases(project, "binary", None)
    execute(NOTEBOOK)
    execute(NOTEBOOK)
    assert checks(run)["Tampering with the trail is noticed"] == "go"
    assert not (run / "09_comply/.scratch").exists()
