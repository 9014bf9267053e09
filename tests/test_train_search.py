"The search: what it spends, what it keeps, what it weighs together, and what a table without a run gets."
from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import InputError, IntegrityError
from pipeline.train.budget import Plan, Step, plan_fits, price
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.ensembles import blend, weigh_greedily
from pipeline.train.features import Encoder
from pipeline.train.hindsight import optimism, sensitivity
from pipeline.train.models import load_model, retrain, train_model
from pipeline.train.proposals import propose
from pipeline.train.protocol import Fitting, Shape, fit
from pipeline.train.search import Found, Goal, Rows, Trial, run_search
from pipeline.train.tables import _Last, contract_of, fit_table, order_matters
from pipeline.train.target_encoding import learn_codes
from pipeline.train.trees import DEFAULT, PORTFOLIO

ROOT = Path(__file__).resolve().parent.parent


def a_table(task: str, n: int = 500, seed: int = 0) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    frame = pl.DataFrame({"size": random.normal(size=n), "shop": random.choice([f"s{i}" for i in range(30)], n), "noise": random.normal(size=n)})
    score = frame["size"].to_numpy() + 1.5 * (frame["shop"].to_numpy() > "s5") + random.normal(size=n)
    target = {"binary": score > 1, "multiclass": np.array(list("xyz"))[np.digitize(score, [0, 1.5])], "regression": np.exp(score)}[task]
    return frame.with_columns(y=pl.Series(target))


def some_rows(n: int = 600, seed: int = 0) -> Rows:
    random = np.random.default_rng(seed)
    matrix = np.column_stack([random.normal(size=(n, 3)), random.integers(0, 12, n)])
    target = ((matrix[:, 0] + (matrix[:, 3] > 6) + random.normal(size=n)) > 0.7).astype(int)
    place = np.arange(n) % 3
    folds = tuple((np.flatnonzero(place != i), np.flatnonzero(place == i)) for i in range(3))
    return Rows(Shape("binary", 2, (0, 0, 0, 12)), matrix, target, folds, np.arange(n), "y")


def a_plan(rows: Rows, budget: float) -> Plan:
    steps = [Step("dummy", "dummy", {}, "full", 400, 0.0), Step("trees", "trees", DEFAULT, "full", 400, 3 * price("trees", 400, rows.shape, DEFAULT))]
    steps += [Step(f"portfolio {name}", "portfolio", config, "full", 400, 3 * price("portfolio", 400, rows.shape, config), True) for name, config in PORTFOLIO.items()]
    return Plan(tuple(steps), len(rows.target), 0.0, budget)


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_a_table_and_a_budget_are_enough(task: str, tmp_path: Path) -> None:
    frame = a_table(task)
    found = fit_table(frame, "y", budget_s=2, clock="core", seed=1)
    answer = found.best.predict(frame)
    assert np.isfinite(answer).all() and len(answer) == frame.height
    assert found.best.task == task
    for name, model in (("best", found.best), ("shipped", found.shipped)):
        model.save(tmp_path / name)
        loaded = load_model(tmp_path / name)
        assert np.array_equal(loaded.predict(frame), model.predict(frame))
        assert np.allclose(loaded.predict_row(frame.row(3, named=True)), model.predict(frame)[3])
    best = max(found.found.goal.sign * t.value for t in found.found.trials if t.value is not None and t.family != "dummy" and t.name != "ensemble")
    default = found.found.named("trees")
    assert default is not None and best >= found.found.goal.sign * default.value  # type: ignore[operator]


def test_a_skewed_outcome_is_tried_as_its_logarithm() -> None:
    found = fit_table(a_table("regression", 700), "y", budget_s=3, clock="core")
    logged = [t for t in found.found.trials if t.config.get("target") == "log"]
    assert logged and np.isfinite(found.best.predict(a_table("regression", 50))).all()


def test_the_order_of_rows_is_asked_of_the_data() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(6_000, 3))
    shape = Shape("regression", 0, (0, 0, 0))
    drift = np.linspace(0, 12, 6_000) ** 1.5
    assert order_matters(shape, np.column_stack([x[:, :2], np.arange(6_000)]), x[:, 0] + drift, 0)
    assert not order_matters(shape, x, x[:, 0] + random.normal(size=6_000), 0)


def test_equal_rows_give_an_equal_search() -> None:
    rows = some_rows()
    one, two = (run_search(rows, a_plan(rows, 8), Goal("roc_auc"), 3, clock=lambda: 0.0, further=True, ensemble=True) for _ in range(2))
    assert one.table().equals(two.table())
    joined = one.named("ensemble")
    assert joined is not None and joined.value is not None
    in_sample = blend([one.named(m["name"]).answer for m in joined.config["members"]], [m["weight"] for m in joined.config["members"]])  # type: ignore[union-attr]
    told = Goal("roc_auc").measure(rows.target[rows.valid], in_sample)
    assert told is not None and all(told >= t.value for t in one.trials if t.value is not None and t.family != "ensemble")
    assert joined.value < told, "on few rows it is measured by weights that other folds asked for"


def test_a_last_fit_that_cannot_be_paid_keeps_the_last_folds_model() -> None:
    rows = some_rows()
    found = run_search(rows, a_plan(rows, 3), Goal("roc_auc"), 3, clock=lambda: 0.0, ensemble=True)
    joined = found.named("ensemble")
    assert joined is not None
    told: dict[str, Any] = {"task": "binary", "classes": ["0", "1"]}
    spent = _Last(found, rows, told, Encoder(()), 1, 1, lambda: 0.0, lambda trial: 1.0)
    model = spent.fit(joined)
    names = [member["name"] for member in joined.config["members"]]
    assert sorted(model.about["from_the_last_fold"]) == sorted(names) and model.about["rows"] == 400
    for name, (_, _, kept) in zip(names, model.estimator.members):  # type: ignore[attr-defined]
        trial = found.named(name)
        assert trial is not None and np.array_equal(kept.predict(rows.matrix), trial.models[-1].predict(rows.matrix, trial.steps or None))
    dearest = max(names, key=lambda name: spent.need(found.named(name)))  # type: ignore[arg-type]
    all_but_one = sum(spent.need(t) for t in spent.parts(joined)) - 0.01
    assert replace(spent, left=lambda: all_but_one).fit(joined).about["from_the_last_fold"] == [dearest]
    assert "from_the_last_fold" not in replace(spent, left=lambda: 1e9).fit(joined).about


def test_what_cannot_be_paid_is_passed_over_and_kept_as_a_row() -> None:
    rows = some_rows()
    table = run_search(rows, a_plan(rows, 1.3), Goal("roc_auc"), 3, clock=lambda: 0.0, further=True).table()
    assert table.filter(pl.col("candidate") == "trees")["status"].to_list() == ["done"]
    passed = table.filter(pl.col("status") == "skipped")
    assert passed.height and passed["error"].str.contains("are left for candidates").all()


def test_a_proposal_that_is_too_dear_leaves_no_hole_in_the_table() -> None:
    rows, passed = some_rows(), 0
    for budget in (3, 4, 5, 6):
        table = run_search(rows, a_plan(rows, budget), Goal("roc_auc"), 3, clock=lambda: 0.0, further=True).table()
        proposals = table.filter(pl.col("candidate").str.starts_with("proposal"))
        assert proposals["candidate"].to_list() == [f"proposal {n + 1}" for n in range(proposals.height)]
        skipped = proposals.filter(pl.col("status") == "skipped")
        assert skipped["error"].str.contains("passed over").all() and proposals["status"].tail(1).to_list() != ["skipped"]
        passed += skipped.height
    assert passed


def test_a_slow_clock_ends_the_search_and_leaves_the_default() -> None:
    rows = some_rows()
    ticks = iter(range(0, 1_000_000, 40))
    found = run_search(rows, a_plan(rows, 8), Goal("roc_auc"), 3, clock=lambda: float(next(ticks)), further=True, ensemble=True)
    assert found.stopped_early and found.named("trees") is not None


KILLED = """
import os, signal, sys
sys.path.insert(0, 'tests')
from pathlib import Path
from test_train_search import a_plan, some_rows
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.search import Goal, run_search
rows, die_at = some_rows(), int(sys.argv[2])
asked = iter(range(10**9))
def clock():
    if next(asked) == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return 0.0
found = run_search(rows, a_plan(rows, 5), Goal('roc_auc'), 7, 1, Checkpoints(Path(sys.argv[1])), clock, further=True, ensemble=True)
found.table().write_json(sys.argv[1] + '.json')
print(sum(t.resumed for t in found.trials))
"""


def test_a_killed_search_with_proposals_ends_equal(tmp_path: Path) -> None:
    def run(place: str, die_at: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / place), str(die_at)], cwd=ROOT, capture_output=True, text=True,
                              timeout=300, env=dict(os.environ))

    assert run("whole", -1).returncode == 0
    assert run("broken", 900).returncode == -signal.SIGKILL
    again = run("broken", -1)
    assert again.returncode == 0, again.stderr
    assert int(again.stdout) >= 3
    assert (tmp_path / "whole.json").read_text() == (tmp_path / "broken.json").read_text()


@given(st.integers(2, 6), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_weights_are_few_and_never_worse_than_the_best(candidates: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    truth = random.normal(size=200)
    answers = {str(i): truth + random.normal(size=200) * random.uniform(0.2, 2) for i in range(candidates)}

    def loss(answer: np.ndarray) -> float:
        return float(np.mean((answer - truth) ** 2))

    weights = weigh_greedily(answers, loss, -1, most=3)
    assert len(weights) <= 3 and abs(sum(weights.values()) - 1) < 1e-9 and min(weights.values()) > 0
    together = blend([answers[name] for name in weights], list(weights.values()))
    assert loss(together) <= min(map(loss, answers.values())) + 1e-12


def test_nothing_to_weigh_is_refused() -> None:
    with pytest.raises(InputError, match="no candidate has an answer"):
        weigh_greedily({"a": np.zeros(3)}, lambda _: None, 1)


def test_an_ensemble_is_fitted_again_and_refused_when_a_member_is_cut(tmp_path: Path) -> None:
    frame = a_table("binary")
    told = contract_of(frame, "y").to_dict()
    told["features"] = ["size", "shop", "noise"]
    target = frame["y"].cast(pl.Int64).to_numpy()
    members = [{"family": "trees", "config": {"rounds": 20}, "weight": 0.75}, {"family": "linear", "config": {}, "weight": 0.25}]
    model = train_model("ensemble", frame, target, told, Fitting({"members": members}, seed=1))
    assert retrain(model, frame.head(300), target[:300]).family == "ensemble"
    parts = model.contributions(frame)
    assert parts is not None and np.allclose(parts.sum(axis=-1), model.score(frame), atol=1e-6)
    folder = model.save(tmp_path / "model")
    assert np.array_equal(load_model(folder).predict(frame), model.predict(frame))
    (folder / next(p.name for p in folder.iterdir() if p.name.startswith("member0-"))).unlink()
    with pytest.raises(IntegrityError):
        load_model(folder)


@pytest.mark.parametrize("kind", ["native", "target", "both"])
def test_weights_stand_for_repeated_rows(kind: str) -> None:
    rows = some_rows(400)
    config = DEFAULT | {"rounds": 20, "categories": kind, "min_data_in_leaf": 1, "min_sum_hessian_in_leaf": 5.0}
    weights = 1.0 + (np.arange(400) % 4 == 0)
    weighed = fit("portfolio", rows.shape, rows.matrix, rows.target, Fitting(config, weights=weights)).predict(rows.matrix)
    plain = fit("portfolio", rows.shape, rows.matrix, rows.target, Fitting(config)).predict(rows.matrix)
    assert np.isfinite(weighed).all() and not np.array_equal(weighed, plain)


def test_no_training_row_of_a_rare_level_sees_its_own_outcome() -> None:
    "Levels that say nothing: codes of training rows must not tell the outcome."
    random = np.random.default_rng(0)
    matrix, target = random.integers(0, 500, (2_000, 1)).astype(float), random.integers(0, 2, 2_000)
    coder, codes = learn_codes(Shape("binary", 2, (500,)), matrix, target)
    naive = coder.encode(matrix)[:, 0]
    assert abs(np.corrcoef(codes[:, 0], target)[0, 1]) < 0.15 < np.corrcoef(naive, target)[0, 1]


def test_proposals_are_within_their_ranges_and_depend_on_the_seed() -> None:
    several = [propose([], i, 5) for i in range(30)]
    assert several == [propose([], i, 5) for i in range(30)] != [propose([], i, 6) for i in range(30)]
    assert all(6 <= c["num_leaves"] <= 160 and 0.025 <= c["learning_rate"] <= 0.12 for c in several)


def test_a_plan_of_a_run_still_keeps_its_promise_with_proposals() -> None:
    rows = some_rows()
    plan = plan_fits(["linear", "trees", "portfolio"], [len(t) for t, _ in rows.folds], len(rows.target), rows.shape, 20)
    found = run_search(rows, plan, Goal("log_loss"), 1, checkpoints=Checkpoints(), clock=lambda: 0.0, further=True, ensemble=True)
    assert not found.stopped_early and {"dummy", "trees", "linear"} <= {t.name for t in found.trials}


def coins(count: int, rows: int, seed: int) -> tuple[Found, Rows]:
    "Candidates without skill, on rows of two classes."
    random = np.random.default_rng(seed)
    y = random.integers(0, 2, rows)
    trials = []
    for i in range(count):
        score = random.random(rows)
        trials.append(Trial(f"coin {i}", "trees", {}, "full", rows, answer=np.column_stack([1 - score, score]), value=Goal("roc_auc").measure(y, score)))
    return Found(trials, Goal("roc_auc"), False), Rows(Shape("binary", 2, (0,)), np.zeros((rows, 1)), y, ((np.arange(0), np.arange(rows)),), np.arange(rows))


@pytest.mark.parametrize("count", [3, 20])
def test_the_luck_of_the_best_is_told_to_its_size(count: int) -> None:
    "The true value of every coin is 0.5, so what the best shows beyond it is luck: told and true luck agree over repetitions."
    told, true = [], []
    for seed in range(24):
        found, rows = coins(count, 300, seed)
        told.append(optimism(found, rows, [t.name for t in found.trials], draws=40)["optimism"][0])
        true.append(max(t.value or 0.0 for t in found.trials) - 0.5)
    assert abs(np.mean(told) - np.mean(true)) < 0.35 * np.mean(true)


def test_luck_is_told_for_losses_too_and_for_the_rule_with_its_tolerance() -> None:
    found, rows = coins(12, 300, 0)
    losses = Found(found.trials, Goal("log_loss"), False)
    for t in losses.trials:
        t.value = losses.goal.measure(rows.target, t.answer)
    names = [t.name for t in losses.trials]
    strict, wide = optimism(losses, rows, names), optimism(losses, rows, names, tolerance=10.0)
    assert strict["optimism"][0] > 0 and strict["left_out"][0] > strict["selected"][0]
    assert wide["same_choice"][0] == 1 and abs(wide["optimism"][0]) < 0.05   # always the simplest: nothing is chosen, so nothing is luck


def test_few_blocks_are_no_ground_for_a_replay() -> None:
    found, rows = coins(5, 300, 0)
    few = Rows(rows.shape, rows.matrix, rows.target, rows.folds, np.arange(300) % 5)
    assert optimism(found, few, [t.name for t in found.trials]).is_empty()


def test_the_settings_that_matter_are_named_and_noise_is_not() -> None:
    random = np.random.default_rng(0)
    configs = [propose([], i, 3) for i in range(30)]
    trials = [Trial(f"proposal {i}", "portfolio", c, "full", 400, value=0.7 + 0.05 * (c.get("categories") == "both") + 0.01 * random.normal()) for i, c in enumerate(configs)]
    trials.append(Trial("proposal 30", "portfolio", {"num_leaves": 9}, "full", 400, "failed", "no"))
    ranked = sensitivity(Found(trials, Goal("roc_auc"), False))
    assert ranked.row(0, named=True)["parameter"] == "categories" and ranked["better"][0] == "both" and ranked["chance"][0] < 0.01
    assert ranked["trials"].unique().to_list() == [30]
    assert sensitivity(Found(trials[:5], Goal("roc_auc"), False)).is_empty()
    turned = sensitivity(Found(trials, Goal("log_loss"), False))
    assert turned["better"][0] != "both"
