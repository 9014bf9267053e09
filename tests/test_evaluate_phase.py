"The evaluate phase on small tables of every kind: it finishes, says what does not apply, and its claims can be recomputed."
from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from player import play
import pytest

from pipeline.core import audit
from pipeline.core.problem import load_problem
from pipeline.core.run import commit_phase, function_named, open_run, read_checks, read_claims
from pipeline.core.store import read_frame
from pipeline.evaluate.gate import check_acceptance, tell_answer
from pipeline.evaluate.holdout import open_holdout
from pipeline.evaluate.measures import measure, measure_over_seeds
from pipeline.evaluate.threshold import choose_threshold
from pipeline.report.evidence import read_run
from pipeline.report.gate import criteria_of, unmet
from pipeline.report.traceability import trace
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting

NOTEBOOK = Path(__file__).parents[1] / "nbs/phases/05_evaluate.ipynb"
SECTIONS = """
problem: {{name: tiny, statement: Does the evaluate phase hold on any table?, task: {task}, target: outcome, seed: {seed},
  kpi: {{name: k, baseline: 0, target: 1, unit: '%'}}}}
data: {{sources: [{{name: t, kind: csv, path: t.csv}}]}}
train: {{seeds: 3}}
evaluate: {{bootstrap: 100, {evaluate}}}
"""


def make_table(task: str, n: int, seed: int = 3, timed: bool = True) -> tuple[pl.DataFrame, dict[str, Any]]:
    rng = np.random.default_rng(seed)
    size, wind = rng.normal(0, 1, n), rng.normal(0, 1, n)
    town = rng.choice(["Aachen", "Bonn", "Céret"], n)
    score = 1.4 * size + (town == "Bonn") * 0.8 + 0.5 * wind
    if task == "regression":
        outcome: Any = 10 + 2 * score + rng.normal(0, 1, n)
    elif task == "binary":
        outcome = np.where(rng.random(n) < 1 / (1 + np.exp(-score)), "yes", "no")
    else:
        outcome = np.array(["low", "mid", "top"])[np.digitize(score + rng.logistic(0, 0.7, n), [-0.8, 0.8])]
    frame = pl.DataFrame({"size": size, "wind": wind, "town": town, "outcome": outcome, "__row": np.arange(n)})
    if timed:
        start = pl.datetime(2024, 1, 1)
        frame = frame.with_columns(__time=start + pl.duration(hours=pl.int_range(n) * 6))
    classes = {"binary": ["no", "yes"], "multiclass": ["low", "mid", "top"], "regression": []}[task]
    columns = [("size", "number"), ("wind", "number"), ("town", "category")]
    contract = {
        "target": "outcome", "task": task, "classes": classes, "positive": "yes" if task == "binary" else None, "time": None,
        "group": None, "subject": None, "features": [c for c, _ in columns],
        "columns": [{"name": c, "type": t, "dtype": str(frame.schema[c]), "nullable": True, "min": None, "max": None, "levels": None,
                     "n_levels": None, "role": "feature", "known_at": None, "pii": False, "why": ""} for c, t in columns],
    }
    return frame, contract


def indexed(frame: pl.DataFrame, contract: dict[str, Any]) -> np.ndarray:
    if contract["task"] == "regression":
        return frame["outcome"].to_numpy()
    return np.array([contract["classes"].index(v) for v in frame["outcome"]])


class Place:
    "A project in a temporary folder, with the phases before evaluate done by hand."

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        (root / "settings.ini").write_text("")
        (root / "t.csv").write_text("x\n1\n")
        monkeypatch.chdir(root)
        monkeypatch.setenv("PILOTHOUSE_ENGINE", "test")

    def prepare(self, task: str, n: int = 900, evaluate: str = "", timed: bool = True, seeds: int = 2, default: bool = True,
                family: str = "linear", seed: int = 7, run: str = "main", reverse: bool = False, hold: int | None = None,
                one_class: bool = False) -> None:
        (self.root / "tiny.yml").write_text(SECTIONS.format(task=task, evaluate=evaluate, seed=seed))
        frame, contract = make_table(task, n, timed=timed)
        cut = n - (hold or n // 3)
        train, held = frame[:cut], frame[cut:]
        held = held.filter(pl.col("outcome") == "yes") if one_class else held
        y = indexed(train, contract)
        learnt = 1 - y if reverse else y
        data = self.open("02_data", run)
        data.save("data/train", train.with_columns(__fold=pl.Series(np.arange(cut) * 4 // cut - 1, dtype=pl.Int8)))
        data.save("data/holdout", held, sealed=True)
        data.save("data/contract", contract)
        data.save("data/splits", {"kind": "time" if timed else "random", "ordered": timed, "folds": 3})
        self.close(data)
        about = {"residual": float(np.quantile(np.abs(y - y.mean()), 0.9))} if task == "regression" else {}
        models = [train_model(family, train, learnt, contract, Fitting({}, seed=seed + k), about=about) for k in range(max(seeds, 1))]
        trained = self.open("04_train", run)
        trained.save("train/model", models[0].save(self.root / f"m{run}"))
        if default:
            trained.save("train/default", train_model("dummy", train, y, contract, Fitting({})).save(self.root / f"d{run}"))
        if seeds:
            for k, model in enumerate(models):
                model.save(self.root / f"s{run}" / str(k))
            trained.save("train/seed_models", self.root / f"s{run}")
        answers = models[0].answers(models[0].predict(train))
        trained.save("train/validation", pl.concat([
            train.select("__row"), pl.DataFrame({"fold": np.arange(cut) % 3, "y": y}), answers], how="horizontal"))
        self.close(trained)

    def evaluate(self, run: str = "main") -> Path:
        "Run the notebook's cells; every display is rendered, as a report would."
        shown: list[Any] = []
        names = play(NOTEBOOK, shown=shown, problem="tiny.yml", run=f"outputs/tiny/{run}")
        self.shown: list[str] = [value._repr_html_() for value in shown if hasattr(value, "_repr_html_")]
        return commit_phase(names["run"].folder, "05_evaluate")

    def judge(self, run: str = "main") -> Path:
        "The phase without its displays: threshold, holdout, measures, acceptance."
        opened = self.open("05_evaluate", run)
        choose_threshold(opened)
        holdout = open_holdout(opened)
        self.shown = [holdout._repr_html_()]
        measured = measure(opened, holdout)
        check_acceptance(opened, holdout, measured)
        opened.conclude(tell_answer(opened, holdout, measured))
        opened.finish()
        return commit_phase(opened.folder, "05_evaluate")

    def open(self, phase: str, run: str) -> Any:
        return open_run(phase, "tiny.yml", f"outputs/tiny/{run}")

    def close(self, run: Any) -> None:
        run.conclude("done")
        run.finish()
        commit_phase(run.folder, run.phase)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def verdicts(folder: Path) -> dict[str, str]:
    return {c.title: c.verdict for c in read_checks(folder)}


def recompute(folder: Path) -> int:
    "Every claim again from stored artifacts, equal to the last bit."
    claims = read_claims(folder)
    for claim in claims:
        rooms = {"evaluate": folder, "train": folder.parent / "04_train"}
        frames = [read_frame(rooms[a.split("/")[0]] / f"{a.split('/')[1]}.parquet") for a in claim.of]
        found = function_named(claim.by)(*frames, **claim.using)
        assert (found.value, found.low, found.high) == (claim.value, claim.low, claim.high), claim.name
    return len(claims)


def test_binary_with_time_cohorts_seeds_and_acceptance(place: Place) -> None:
    place.prepare("binary", n=1500, evaluate="cohorts: [town, size], cohort_gap: 0.5, costs: {false_alarm: 1, miss: 3}, acceptance: "
                  "[{metric: roc_auc, at_least: 0.6, bound: low}, {metric: ece, at_most: 0.9}, {metric: log_loss, at_most: 2.0, on: validation}]")
    folder = place.evaluate()
    found = verdicts(folder)
    assert found["ROC AUC at least 0.6 on holdout"] == "go" and found["better than one answer for all rows"] == "go"
    assert found["log loss at most 2 on validation"] == "go"
    assert recompute(folder) >= 12
    predictions = read_frame(folder / "predictions.parquet")
    assert {"__row", "__time", "y", "p_no", "p_yes", "s0_p", "s1_p", "current_p", "town", "size"} <= set(predictions.columns)
    threshold = json.loads((folder / "threshold.json").read_text())
    assert math.isclose(threshold["break_even"], 0.25)
    cohorts = read_frame(folder / "cohorts.parquet")
    assert set(cohorts["by"]) == {"town", "size", "town × size"}
    assert json.loads((folder / "answer.json").read_text())["verdict"] == "go"
    assert "<script" not in "".join(place.shown) and all("nan" not in s.lower().split(">") for s in place.shown)


def test_multiclass(place: Place) -> None:
    place.prepare("multiclass", evaluate="cohorts: [town], acceptance: [{metric: log_loss, at_most: 1.0, bound: high}]", seeds=3)
    folder = place.evaluate()
    assert verdicts(folder)["log loss at most 1 on holdout"] == "go" and recompute(folder) >= 8
    assert {"p_low", "s2_p_top", "current_p_mid"} <= set(read_frame(folder / "predictions.parquet").columns)
    assert json.loads((folder / "threshold.json").read_text())["threshold"] is None


def test_regression_without_time_or_seeds(place: Place) -> None:
    place.prepare("regression", evaluate="cohorts: [town], acceptance: [{metric: mae, at_most: 3.0, bound: high}, {metric: coverage_90, at_least: 0.5}]",
                  n=1500, timed=False, seeds=0, default=False)
    folder = place.evaluate()
    names = {c.name for c in read_claims(folder)}
    assert {"mae", "rmse", "r2", "coverage_90", "gap_town"} <= names and recompute(folder) == len(names)
    assert verdicts(folder)["mean absolute error at most 3 on holdout"] == "go"
    predictions = read_frame(folder / "predictions.parquet")
    mae = next(c.value for c in read_claims(folder) if c.name == "mae")
    assert math.isclose(mae, float((predictions["y"] - predictions["prediction"]).abs().mean()), abs_tol=1e-12)


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_seeds_that_make_one_model_have_its_interval(place: Place, task: str) -> None:
    place.prepare(task, n=300, seeds=3)
    opened = place.open("05_evaluate", "main")
    choose_threshold(opened)
    holdout = open_holdout(opened)
    own, shown = measure(opened, holdout).claims[holdout.main], measure_over_seeds(opened, holdout).html
    mean = next(c for c in opened.made_claims if c.name == f"{holdout.main}_over_seeds")
    assert (mean.value, mean.low, mean.high) == (own.value, own.low, own.high)
    assert "All 3 seeds give the same answers" in shown


@pytest.mark.parametrize(("made", "said"), [(1, "3 were asked for (train.seeds) and the budget paid for one"), (2, "the budget paid for 2 of them")])
def test_seeds_that_the_budget_did_not_pay_are_told(place: Place, made: int, said: str) -> None:
    place.prepare("binary", n=300, seeds=made, family="nets")
    opened = place.open("05_evaluate", "main")
    choose_threshold(opened)
    assert said in measure_over_seeds(opened, open_holdout(opened)).html


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_a_hundred_rows_without_time_cohorts_or_acceptance(place: Place, task: str) -> None:
    place.prepare(task, n=100, timed=False, seeds=1, hold=20)
    folder = place.evaluate()
    assert recompute(folder) >= 3 and verdicts(folder)["gap between cohorts"] == "not applicable"


def test_a_model_that_learnt_nothing_and_explains_nothing(place: Place, drafts: None) -> None:
    place.prepare("binary", family="dummy", seeds=1)
    folder = place.evaluate()
    found = verdicts(folder)
    assert found["contributions add up to the raw score"] == "not applicable"
    assert found["better than one answer for all rows"] == "no-go"


def test_a_model_that_learnt_the_opposite_does_not_pass(place: Place, drafts: None) -> None:
    place.prepare("binary", reverse=True, seeds=1, evaluate="acceptance: [{metric: roc_auc, at_least: 0.6, bound: low}]")
    folder = place.evaluate()
    assert verdicts(folder)["ROC AUC at least 0.6 on holdout"] == "no-go"
    assert json.loads((folder / "answer.json").read_text())["verdict"] == "no-go"


def test_a_holdout_of_one_class_is_no_go_and_says_why(place: Place) -> None:
    place.prepare("binary", evaluate="acceptance: [{metric: roc_auc, at_least: 0.6}, {metric: log_loss, at_most: 5.0}]", one_class=True)
    folder = place.evaluate()
    assert verdicts(folder)["ROC AUC at least 0.6 on holdout"] == "no-go"
    assert "roc_auc" not in {c.name for c in read_claims(folder)}
    json.loads((folder / "checks.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} in JSON"))


def test_the_holdout_is_looked_at_once_a_model_and_a_second_model_widens_intervals(place: Place) -> None:
    place.prepare("binary", seed=7)
    first = place.judge()
    entries = audit.entries(place.root / "outputs/store")
    assert [e["event"] for e in entries].count("sealed.opened") == 1
    again = place.judge()
    entries = audit.entries(place.root / "outputs/store")
    assert [e["event"] for e in entries].count("sealed.opened") == 1 and [e["event"] for e in entries].count("sealed.replayed") == 1
    assert read_claims(first)[0] == read_claims(again)[0]
    place.prepare("binary", seed=8, run="other", family="trees")
    other = place.judge("other")
    assert any("reused: 2 models" in s for s in place.shown)
    levels = {folder.parent.name: read_claims(folder)[0].using["level"] for folder in (again, other)}
    assert levels == {"main": 0.95, "other": 0.975}
    assert audit.verify(place.root / "outputs/store") > 0


def test_stable_runs_need_other_seeds_and_survive_a_restart(place: Place) -> None:
    said = "stable_runs: 2, acceptance: [{metric: roc_auc, at_least: 0.55}]"
    place.prepare("binary", evaluate=said, seed=7)
    assert verdicts(place.judge())["good in 2 runs in a row"] == "no-go"
    assert verdicts(place.judge())["good in 2 runs in a row"] == "no-go"        # the same seed and data
    place.prepare("binary", evaluate=said, seed=8, run="second")
    assert verdicts(place.judge("second"))["good in 2 runs in a row"] == "go"
    place.prepare("binary", evaluate=said, seed=9, run="third", reverse=True)
    assert verdicts(place.judge("third"))["good in 2 runs in a row"] == "no-go"
    place.prepare("binary", evaluate=said, seed=10, run="fourth")
    assert verdicts(place.judge("fourth"))["good in 2 runs in a row"] == "no-go"   # the count began anew


def test_a_declared_cohort_with_too_few_rows_leaves_verdict_and_requirement_open(place: Place) -> None:
    place.prepare("binary", evaluate="cohorts: [town], acceptance: [{metric: roc_auc, at_least: 0.6, bound: low}]", seeds=1, hold=120)
    folder = place.evaluate()
    told = json.loads((folder / "answer.json").read_text())
    check = next(c for c in read_checks(folder) if "evaluate.cohorts.town" in c.answers)
    assert told["verdict"] == check.verdict == "inconclusive" and "not settled: town groups are served alike" in told["answer"]
    assert re.fullmatch(r"0 of 3 groups are large enough to compare; \w+ has \d\d of 100 rows, \d\d of 30 rows of its rarest class", check.found)
    assert check.limit == "two groups with 100 rows, 10 days or other blocks, 30 rows of its rarest class each" and "times as many holdout rows" in check.why
    evidence = read_run(folder.parent)
    assert trace(load_problem(place.root / "tiny.yml"), evidence).row(by_predicate=pl.col("requirement") == "evaluate.cohorts.town", named=True)["verdict"] == "inconclusive"
    assert unmet(criteria_of(evidence), "05_evaluate").high == 1


def test_an_undeclared_cohort_column_is_a_criterion_not_met(place: Place, drafts: None) -> None:
    place.prepare("binary", evaluate="cohorts: [planet]", seeds=1)
    assert verdicts(place.evaluate())["cohorts by planet are measured"] == "no-go"


def test_the_phase_has_the_same_claims_twice(place: Place, drafts: None) -> None:
    place.prepare("multiclass", evaluate="cohorts: [town]")
    once = (place.evaluate() / "claims.json").read_bytes()
    assert (place.evaluate() / "claims.json").read_bytes() == once
