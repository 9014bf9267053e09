"Limits decide: fast walks equal LightGBM's to the last bit, latency, size and readability pick the winner, students are cut to size."
from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from player import play

from pipeline.core.errors import InputError, IntegrityError
from pipeline.core.run import open_run
from pipeline.data.contract import Contract, Rule
from pipeline.scope.plan import derive_plan
from pipeline.train import contest, fast, trees
from pipeline.train.budget import plan_fits
from pipeline.train.choice import LATENCY, SIZE, Beside, Cost, Limits, choose, leaderboard, rows_of
from pipeline.train.ensembles import Ensemble
from pipeline.train.fast import NotFast, open_forest, read_forest
from pipeline.train.features import learn_encoder
from pipeline.train.frontier import cut_to_rounds, dominated_by, frontier, measure_costs, measure_model, price_of, shorten, size_of
from pipeline.train.models import load_model, train_model
from pipeline.train.protocol import Fitting, Shape, fit
from pipeline.train.search import Found, Goal, Rows, Trial, run_search
from pipeline.train.students import add_candidates, compare_students

ROOT = Path(__file__).resolve().parent.parent
PRICES = {"core_hour": 0.04, "watts_per_core": 10.0, "gram_co2e_per_kwh": 350.0}
OBJECTIVES = ("binary", "multiclass", "regression", "huber", "quantile", "poisson", "cross_entropy")


def grown(objective: str, seed: int, gaps: bool = True, rows: int = 700, leaves: int = 20, rounds: int = 9, levels: int = 70) -> tuple[lightgbm.Booster, np.ndarray]:
    "A booster on numbers, a coarse number, a category, a constant; and rows that it never saw, with every odd value."
    random = np.random.default_rng(seed)
    matrix = np.column_stack([random.normal(size=rows), random.integers(0, levels, rows), random.normal(size=rows).round(1), np.ones(rows)])
    if gaps:
        matrix[random.random(rows) < 0.2, 0], matrix[random.random(rows) < 0.2, 1] = np.nan, np.nan
    score = np.nan_to_num(matrix[:, 0]) + (np.nan_to_num(matrix[:, 1]) % 5 == 2) + 0.3 * random.normal(size=rows)
    target = {"binary": score > 0.5, "multiclass": np.digitize(score, [0, 1]), "poisson": np.exp(score), "cross_entropy": 1 / (1 + np.exp(-score))}.get(objective, score)
    told = {"objective": objective, "verbosity": -1, "num_threads": 1, "num_leaves": leaves, "min_data_in_leaf": 3, "seed": seed, "cat_smooth": 1.0, "min_data_per_group": 3}
    booster = lightgbm.train(told | ({"num_class": 3} if objective == "multiclass" else {}), lightgbm.Dataset(matrix, target, categorical_feature=[1]), rounds)
    asked = matrix[random.permutation(rows)].copy()
    odd = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-36, -1e-36, 1e300, -1e300, -1, -0.5, 3.9, levels, 1e6, *np.unique(matrix[:20, 0])]
    for column in range(4):
        asked[random.integers(0, rows, len(odd)), column] = odd
    return booster, asked


@settings(max_examples=25, deadline=None)
@given(objective=st.sampled_from(OBJECTIVES), seed=st.integers(0, 10_000), gaps=st.booleans(), count=st.sampled_from([1, 2, 8, 9, 300, 700]), leaves=st.sampled_from([2, 3, 31, 127]))
def test_fast_walks_equal_lightgbm_to_the_last_bit(objective: str, seed: int, gaps: bool, count: int, leaves: int) -> None:
    booster, asked = grown(objective, seed, gaps, leaves=leaves)
    forest = read_forest(booster.model_to_string())
    rows = asked[:count]
    assert np.array_equal(forest.predict(rows), booster.predict(rows, num_threads=1))
    assert np.array_equal(forest.predict(rows, 3), booster.predict(rows, num_iteration=3, num_threads=1))
    assert np.array_equal(forest.score(rows).T.ravel(), booster.predict(rows, raw_score=True, num_threads=1).ravel())


def test_values_at_a_threshold_turn_as_lightgbm_turns_them() -> None:
    booster, _ = grown("regression", 5)
    forest = read_forest(booster.model_to_string())
    edges = forest.edges[np.isfinite(forest.edges)]
    values = np.concatenate([edges, np.nextafter(edges, np.inf), np.nextafter(edges, -np.inf), edges.astype(np.float32).astype(float)])
    rows = np.column_stack([values, np.zeros(len(values)), values, values])
    assert np.array_equal(forest.predict(rows), booster.predict(rows, num_threads=1))


def test_more_rows_than_a_block_and_a_model_without_a_split() -> None:
    booster, asked = grown("multiclass", 1, rows=5_000)
    assert np.array_equal(read_forest(booster.model_to_string()).predict(asked), booster.predict(asked))
    stump = lightgbm.train({"objective": "binary", "verbosity": -1}, lightgbm.Dataset(np.zeros((60, 2)), np.arange(60) % 3 == 0), 3)
    assert np.array_equal(read_forest(stump.model_to_string()).predict(np.ones((60, 2))), stump.predict(np.ones((60, 2))))


def test_what_only_lightgbm_can_answer_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    matrix = random.normal(size=(300, 2)).round(1)
    for more in ({"linear_tree": True}, {"zero_as_missing": True}, {"boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.5}):
        data = lightgbm.Dataset(matrix, matrix[:, 0], params={"verbosity": -1, **more})
        text = lightgbm.train({"objective": "regression", "verbosity": -1, **more}, data, 4).model_to_string()
        assert open_forest(text)[0] is None and open_forest(text)[1].startswith("LightGBM answers: ")
    shape, target = Shape("binary", 2, (0, 0)), (matrix[:, 0] > 0).astype(int)
    model = fit("trees", shape, matrix, target, Fitting({"rounds": 9}))
    assert isinstance(model, trees.Trees)
    assert model.prepare().startswith("compiled")
    answer, without = model.predict(matrix), trees.from_files(shape, model.to_files(), model.steps)
    monkeypatch.setattr(fast, "compiled", lambda: None)
    assert without.prepare() == "LightGBM answers: numba is not installed"
    assert np.array_equal(without.predict(matrix), answer)


def test_a_text_that_points_outside_is_refused_and_never_walked() -> None:
    text = grown("binary", 2)[0].model_to_string()
    random = np.random.default_rng(0)
    lines = text.split("\n")
    fields = [i for i, line in enumerate(lines) if line.split("=")[0] in ("left_child", "right_child", "split_feature", "cat_boundaries", "cat_threshold", "threshold", "leaf_value", "num_leaves", "decision_type")]
    refused = 0
    for _ in range(150):
        i = int(random.choice(fields))
        name, values = lines[i].split("=", 1)
        parts = values.split()
        parts[int(random.integers(len(parts)))] = str(random.choice(["999999", "-999999", "x", "", "7", "-3", "nan"]))
        spoilt = "\n".join([*lines[:i], f"{name}={' '.join(parts)}", *lines[i + 1:]])
        try:
            read_forest(spoilt).predict(np.zeros((30, 4)))
        except (IntegrityError, NotFast):
            refused += 1
    assert refused > 60   # the others stay inside the text: another answer, no way out of the arrays


def table(n: int, seed: int = 0) -> tuple[pl.DataFrame, dict[str, Any]]:
    "Orders that come late along curves, not lines."
    random = np.random.default_rng(seed)
    size, hour, kind = random.normal(size=n), random.uniform(0, 24, n), random.choice(["a", "b", "c"], n)
    score = (1.5 * size if n < 200 else np.sin(hour / 2) + np.abs(size) * 1.5 - 1 + 0.8 * (kind == "b") * (size > 0)) + 0.5 * random.normal(size=n)
    frame = pl.DataFrame({"size": size, "hour": hour, "kind": kind, "late": np.where(score > 0, "yes", "no"), "__row": np.arange(n)})
    rules = [Rule("size", "number", "Float64", "feature", False), Rule("hour", "number", "Float64", "feature", False),
             Rule("kind", "category", "String", "feature", False), Rule("late", "category", "String", "target", False)]
    contract = Contract("late", "binary", ["no", "yes"], "yes", None, None, None, rules).to_dict()
    return frame.with_columns(__fold=(pl.col("__row") % 3).cast(pl.Int8)), contract


@functools.cache
def coded(n: int = 900) -> tuple[Rows, dict[str, Any], Any, pl.DataFrame]:
    frame, contract = table(n)
    encoder = learn_encoder(frame, contract)
    return rows_of(frame, contract, {"folds": 3, "ordered": False}, encoder), contract, encoder, frame


def searched(n: int = 900, ensemble: bool = False) -> tuple[Found, Rows, dict[str, Any], Any, pl.DataFrame]:
    rows, contract, encoder, frame = coded(n)
    plan = plan_fits(["linear", "trees", "portfolio"], [len(t) for t, _ in rows.folds], n, rows.shape, 30)
    return run_search(rows, plan, Goal("roc_auc"), seed=7, ensemble=ensemble), rows, contract, encoder, frame


@pytest.mark.parametrize(("name", "n", "winners"), [("tiny_data", 80, {"linear"}), ("one_millisecond", 1_200, {"trees", "portfolio"}), ("readable", 1_200, {"additive"})])
def test_three_problem_files_have_three_winners_that_keep_their_limit(name: str, n: int, winners: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame, contract = table(n)
    (tmp_path / "params").mkdir()
    shutil.copy(ROOT / f"tests/problems/{name}.yml", tmp_path / "params")
    (tmp_path / "settings.ini").write_text("[engine]\nthreads = 1\n")
    monkeypatch.chdir(tmp_path)
    where = {"problem": f"params/{name}.yml", "run": f"outputs/{name}/main"}
    scope = open_run("01_scope", **where)
    scope.save("scope/plan", derive_plan(scope.problem))
    data = open_run("02_data", **where)
    for thing, value in (("train", frame), ("contract", contract), ("splits", {"kind": "random", "ordered": False, "folds": 3, "gap_days": 0.0})):
        data.save(f"data/{thing}", value)
    for run in (scope, data):
        run.conclude("ok")
        run.finish()
    names = play(ROOT / "nbs/phases/04_train.ipynb", **where)
    phase = tmp_path / f"outputs/{name}/main/04_train"
    model = load_model(phase / "model")
    assert model.family in winners, (names["choice"], names["board"])
    decision = next(d for d in json.loads((phase / "decisions.json").read_text()) if d["what"] == "family")
    assert decision["chose"] == names["choice"].name and decision["because"]
    cost = measure_model(model, frame)
    if name == "one_millisecond":
        checks = {c["title"]: c for c in json.loads((phase / "checks.json").read_text())}
        assert cost.row_ms <= 1 and cost.size_mb <= 0.5
        assert any("train.latency_ms" in check for check in checks)
        repeated_where_nothing_is_in_time(phase, monkeypatch, **where)
    if name == "readable":
        assert "kept out: people could not read it" in decision["because"] or names["board"].row(0, named=True)["may_ship"]
        assert max(tree.count(" ") for tree in [line for line in model.estimator.text.split("\n") if line.startswith("split_feature=")]) == 0   # one column a tree
    kept = pl.read_parquet(phase / "frontier.parquet")
    assert {"metric", "row_ms", "size_mb", "gram_co2e_per_1000", "money_per_1000", "dominated_by"} <= set(kept.columns)


def repeated_where_nothing_is_in_time(phase: Path, monkeypatch: pytest.MonkeyPatch, problem: str, run: str) -> None:
    "`reproduce` on a machine a thousand times slower chooses as the first run did: by what was measured then."
    shutil.copytree(phase.parent, phase.parent.with_name("again"), ignore=shutil.ignore_patterns("04_train"))
    slow = {"asked": 0}

    def measured(found: Found, *about: Any) -> dict[str, Cost]:
        slow["asked"] += 1
        return {name: replace(cost, row_ms=1000 * cost.row_ms) for name, cost in measure_costs(found, *about).items()}

    monkeypatch.setattr(contest, "measure_costs", measured)
    monkeypatch.setenv("PILOTHOUSE_REPEATS", str(phase.parent))
    again = play(ROOT / "nbs/phases/04_train.ipynb", problem=problem, run=run.replace("main", "again"))
    assert slow["asked"] == 0 and load_model(phase.parent.with_name("again") / "04_train/model").digest == load_model(phase / "model").digest
    for kept in ("leaderboard", "trials", "validation"):
        assert (phase.parent.with_name("again") / f"04_train/{kept}.parquet").read_bytes() == (phase / f"{kept}.parquet").read_bytes()
    monkeypatch.delenv("PILOTHOUSE_REPEATS")
    with pytest.raises(InputError, match=r"train\.latency_ms"):   # without the first run's figures this machine would ship nothing
        contest.settle(again["run"], again["contest"], again["found"],
                       leaderboard(again["found"], again["contest"].rows, again["contest"].limits, 7, costs=contest.answer_costs(again["run"], again["contest"], again["found"])))


def test_an_ensemble_is_chosen_only_where_latency_allows_it() -> None:
    found, rows, contract, encoder, frame = searched(ensemble=True)
    joined = found.named("ensemble")
    assert joined is not None and all(isinstance(model, Ensemble) for model in joined.models)
    joined.value = max(float(t.value or 0) for t in found.trials) + 0.05   # as if it had earned its place
    costs = measure_costs(found, contract, encoder, frame)
    single = min(cost.row_ms for name, cost in costs.items() if name not in ("ensemble", "dummy"))
    costs["ensemble"] = replace(costs["ensemble"], row_ms=3 * single)   # as if measured on a machine that does nothing else
    families = ["linear", "trees", "portfolio"]
    loose, tight = Limits(families, latency_ms=1e3), Limits(families, latency_ms=(costs["ensemble"].row_ms + single) / 2)
    assert choose(leaderboard(found, rows, loose, 7, costs=costs), found.goal, 0.0).name == "ensemble"
    choice = choose(leaderboard(found, rows, tight, 7, costs=costs), found.goal, 0.0)
    assert choice.name != "ensemble" and "ensemble" in choice.because and "train.latency_ms" in choice.because
    shown = frontier(found, [], rows, costs, loose, PRICES, False, 7)
    assert shown.filter(pl.col("candidate").is_in(["ensemble", choice.name]))["noise_loss"].null_count() == 0   # robustness of both


def test_fewer_rounds_cost_less_and_a_dominated_model_is_marked() -> None:
    found, rows, contract, encoder, frame = searched()
    costs = measure_costs(found, contract, encoder, frame)
    _, sweep = shorten(found, rows, Limits(["trees", "portfolio"]), costs)
    costs |= measure_costs(replace(found, trials=sweep), contract, encoder, frame)
    shown = frontier(found, sweep, rows, costs, Limits(["trees", "portfolio"]), PRICES, False, 7)
    best = shown.filter(pl.col("candidate") == sweep[0].name.rsplit(",", 1)[0]).row(0, named=True)
    cut = shown.filter(pl.col("candidate").is_in([t.name for t in sweep]))
    assert cut.height == len(sweep) and (cut["size_mb"] < best["size_mb"]).all()
    assert np.allclose(shown["gram_co2e_per_1000"].to_numpy(), [price_of(ms, PRICES)[1] for ms in shown["row_ms"].fill_null(np.nan)], equal_nan=True)
    assert price_of(2.0, PRICES | {"core_hour": 0.08})[0] == 2 * price_of(2.0, PRICES)[0] == 4 * price_of(1.0, PRICES)[0]
    worse = pl.concat([shown, shown.head(1).with_columns(candidate=pl.lit("worse"), metric=pl.col("metric") - 0.1, row_ms=pl.col("row_ms") * 3)])
    assert dominated_by(worse, 1)[-1] == shown["candidate"][0]


def test_whoever_is_too_large_is_cut_to_the_limit_not_the_best_alone() -> None:
    found, rows, contract, encoder, frame = searched()
    boosted = [t for t in found.trials if t.models and all(hasattr(model, "text") for model in t.models) and t.steps > 9]
    tight = Limits(["trees", "portfolio"], model_mb=1.1e-6 * min(size_of(t.models[0], t.steps // 3) for t in boosted))
    everyone, _ = shorten(found, rows, tight, measure_costs(found, contract, encoder, frame))
    cut = [t for t in everyone.trials if t.name not in {o.name for o in found.trials} and 1.1e-6 * t.size_bytes <= tight.model_mb]
    assert len({t.name.rsplit(",", 1)[0] for t in cut}) == len(boosted) > 1
    for whole in boosted:
        fits = max((t for t in cut if t.name.startswith(f"{whole.name}, ")), key=lambda t: t.steps)
        assert 1.1e-6 * max(size_of(model, fits.steps + 1) for model in whole.models) > tight.model_mb
    choice = choose(leaderboard(everyone, rows, tight, 7, costs=measure_costs(everyone, contract, encoder, frame)), found.goal, 0.0)
    assert everyone.named(choice.name).value == max(t.value for t in cut if t.value is not None)


def test_a_shorter_trial_answers_as_if_it_had_been_stopped_then() -> None:
    found, rows, *_ = searched()
    trial = found.named("trees")
    assert trial is not None
    cut = cut_to_rounds(trial, 5, rows, found.goal)
    train, valid = rows.folds[0]
    stopped = fit("trees", rows.shape, rows.matrix[train], rows.target[train], Fitting(trial.config | {"rounds": 5}, 7))
    assert cut.answer is not None and np.array_equal(cut.answer[:len(valid)], stopped.predict(rows.matrix[valid]))


def test_students_are_a_quarter_of_their_teacher_and_ship_only_inside_the_tolerance() -> None:
    _, rows, contract, encoder, frame = searched(1_500)
    teacher = run_teacher(rows)
    found = add_candidates(Found([teacher], Goal("roc_auc"), False), rows, 7, distill=True)
    assert all(t.size_bytes <= SIZE * teacher.size_bytes for t in found.trials[1:])
    costs = measure_costs(found, contract, encoder, frame)
    measured = [cost.beside for name, cost in costs.items() if name.startswith("student")]
    assert costs["teacher"].beside is None and all(b is not None and b.teacher == "teacher" and 0 < b.time_low <= b.time <= b.time_high for b in measured)
    strict, generous = 0.0, 0.2
    quick, unsure, slow = (0.4, 0.38, 0.42), (0.45, 0.38, 0.52), (0.9, 0.8, 1.0)   # shares of the teacher's time, as a busy or a quiet machine may show them
    for tolerance, times, size in [(strict, quick, 0.2), (generous, quick, 0.2), (generous, unsure, 0.2), (generous, slow, 0.2), (generous, quick, 0.3)]:
        beside = Beside("teacher", size, *times)
        planted = {name: replace(cost, beside=beside if name.startswith("student") else None) for name, cost in costs.items()}
        limits = Limits(["portfolio"], tolerance=tolerance)
        board = leaderboard(found, rows, limits, 7, costs=planted)
        choice = choose(board, found.goal, tolerance)
        told = compare_students(found, board, planted, choice.name)
        assert told.height == 2 and told["to_best_low"].null_count() == 0 and told.row(0)[1] == "teacher"
        measured_then = frontier(found, [], rows, planted, limits, PRICES, False, 7)
        again = contest.recorded_costs(measured_then, told)   # a repeated run adopts as this one does
        assert again.keys() == planted.keys() and contest.recorded_costs(None, None) == {}
        assert all((again[name].row_ms, again[name].batch_ms, again[name].beside) == (cost.row_ms, cost.batch_ms, cost.beside) for name, cost in planted.items())
        worth = size <= SIZE and times[2] <= LATENCY
        assert choice.name.startswith("student") == (worth and (tolerance == generous or teacher.value < max(t.value for t in found.trials[1:])))
        assert told["small"].to_list() == [worth] * 2 and told["shipped"].sum() == choice.name.startswith("student")
        refused = board.filter(pl.col("family") == "student")["why_not"].to_list()
        assert all(("" if worth else "% of the" ) in reason and bool(reason) != worth for reason in refused), refused
    assert leaderboard(found, rows, Limits(["portfolio"]), 7).filter(pl.col("family") == "student")["may_ship"].sum() == 0, "unmeasured, it is not shipped"


def run_teacher(rows: Rows) -> Trial:
    from pipeline.train.students import try_candidate

    config = {"rounds": 300, "num_leaves": 31, "learning_rate": 0.03, "patience": 300}
    return try_candidate("teacher", "portfolio", config, rows, Goal("roc_auc"), 7)


def test_a_student_that_lightgbm_refuses_is_kept_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.train import students

    rows = coded()[0]
    monkeypatch.setattr(students, "STUDENT", students.STUDENT | {"num_leaves": 1})
    found = add_candidates(Found([run_teacher(rows)], Goal("roc_auc"), False), rows, 7, distill=True)
    assert [(t.status, t.value) for t in found.trials[1:]] == [("failed", None)] * 2 and all("num_leaves" in t.error for t in found.trials[1:])
    board = leaderboard(found, rows, Limits(["portfolio"]), 7)
    assert choose(board, found.goal, 0.1).name == "teacher" and board["why_not"].str.contains("LightGBM: Check failed").sum() == 2


def test_a_teacher_is_paid_for_before_it_teaches() -> None:
    from pipeline.train.budget import price
    from pipeline.train.students import STUDENT, price_later

    rows = coded()[0]
    teacher = run_teacher(rows)
    told = {"family": "portfolio", "config": teacher.config}
    alone, taught = (price("student", 900, rows.shape, config) for config in (STUDENT, STUDENT | {"teacher": told, "soft": 0.7}))
    assert taught == pytest.approx(alone + price("portfolio", 900, rows.shape, teacher.config))
    poor, rich = (add_candidates(Found([teacher], Goal("roc_auc"), False, left), rows, 7, distill=True) for left in (0.01, 60.0))
    assert [t.status for t in poor.trials[1:]] == ["done", "skipped"] and "its teacher's last fit, 0.0 s of the budget are left" in poor.trials[2].error
    assert [t.status for t in rich.trials[1:]] == ["done", "done"]
    assert 0 < sum(t.planned_s for t in rich.trials[1:]) < price_later(rows, distill=True), "what they take on their folds is kept for them, and a last fit"


def test_the_leaderboard_is_as_unsure_as_its_rarest_class() -> None:
    "300 rows, five of them positive: where all rows were counted as witnesses, 85 % of intervals held the truth and 83 % the true distance."
    from pipeline.core.metrics import metric as measured

    n, positives, random = 300, 5, np.random.default_rng(5)
    z = {True: random.normal(1.1, 1, 40_000), False: random.normal(0, 1, 200_000)}
    noise = {c: random.normal(0, [[0.3], [0.9]], (2, len(v))) for c, v in z.items()}

    def answers(of: bool, at: np.ndarray) -> np.ndarray:
        return np.asarray(1 / (1 + np.exp(4 - 1.2 * (z[of][at] + noise[of][:, at]))))

    some = np.arange(200_000 * positives // (n - positives))
    whole = np.concatenate([answers(True, some), answers(False, np.arange(200_000))], axis=1)
    y = np.repeat([1.0, 0.0], [len(some), 200_000])
    truth = [measured("roc_auc", y, p) for p in whole]
    rows = Rows(Shape("binary", 2, (0,)), np.zeros((n, 1)), np.repeat([1.0, 0.0], [positives, n - positives]), ((np.arange(0), np.arange(n)),), np.arange(n))
    goal, inside, trials = Goal("roc_auc"), np.zeros(2), 120
    for trial in range(trials):
        drawn = np.random.default_rng([trial, 3])
        both = np.concatenate([answers(True, drawn.choice(40_000, positives)), answers(False, drawn.choice(200_000, n - positives))], axis=1)
        tried = [Trial(name, "portfolio", {}, "full", n, answer=p, value=goal.measure(rows.target, p)) for name, p in zip("ab", both)]
        board = {r["candidate"]: r for r in leaderboard(Found(tried, goal, False), rows, Limits(["portfolio"]), trial, 100).iter_rows(named=True)}
        other, sign = ("b", 1) if board["a"]["to_best"] == 0 else ("a", -1)
        inside += [board["a"]["low"] <= truth[0] <= board["a"]["high"],
                   board[other]["to_best_low"] <= sign * (truth[1] - truth[0]) <= board[other]["to_best_high"]]
    assert (inside >= 0.88 * trials).all(), inside / trials


def test_a_student_is_stored_and_trained_again_like_any_model(tmp_path: Path) -> None:
    frame, contract = table(400)
    target = (frame["late"] == "yes").to_numpy().astype(int)
    config = {"rounds": 10, "num_leaves": 6, "soft": 0.7, "teacher": {"family": "trees", "config": {"rounds": 12}}}
    model = train_model("student", frame, target, contract, Fitting(config, 3))
    loaded = load_model(model.save(tmp_path / "student"))
    assert np.array_equal(loaded.predict(frame), model.predict(frame)) and loaded.about["config"] == config
    assert np.array_equal(loaded.predict_row(frame.row(0, named=True)), loaded.predict(frame)[0])


def test_where_nothing_keeps_the_limits_it_is_said() -> None:
    found, rows, contract, encoder, frame = searched()
    costs = measure_costs(found, contract, encoder, frame)
    limits = Limits(["linear", "trees", "portfolio"], latency_ms=1e-5)
    with pytest.raises(InputError, match=r"train\.latency_ms"):
        choose(leaderboard(shorten(found, rows, limits, costs)[0], rows, limits, 7, costs=costs), found.goal, 0.0)
