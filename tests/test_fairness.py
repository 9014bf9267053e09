"Groups served alike: fairlearn's and AIF360's numbers, gaps without what chance adds, deterministic thresholds, and who signed."
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from test_evaluate_phase import Place, recompute, verdicts

from pipeline.core.errors import InputError
from pipeline.core.run import commit_phase, judge, read_checks
from pipeline.deploy.packing import _contents
from pipeline.deploy.predict import Predictor
from pipeline.deploy.schema import make_schema
from pipeline.evaluate.cohorts import GAPS, _wins, _won, beyond_chance, check_cohorts, cohort_table, cohorts_by, decision_gaps, draw_by_cohort, spread_of
from pipeline.evaluate.group_thresholds import GroupRule, Reach, level_thresholds, lots
from pipeline.evaluate.holdout import open_holdout
from pipeline.evaluate.levelling import KINDS, Rows, fit_rule, frontier, level_with_band, pick_option
from pipeline.evaluate.measures import measure
from pipeline.evaluate.mitigation import SIGN_OFF, check_mitigation, choose_mitigation
from pipeline.evaluate.threshold import choose_threshold
from pipeline.train.models import load_model
from pipeline.train.reweighing import Grouping, learn_grouping, mitigation_weights, reweighing

GOLDEN = json.loads((Path(__file__).parent / "golden/fairness.json").read_text())
SHARED = Path(__file__).resolve().parents[2] / "shared/data"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def golden() -> pl.DataFrame:
    told = pl.DataFrame(GOLDEN["rows"])
    return told.with_columns(p_no=1 - pl.col("p"), p_yes="p").drop("p")


@pytest.mark.parametrize("by", ["sex", "race", "sex × race"])
def test_groups_and_gaps_equal_fairlearns(by: str) -> None:
    frame, peer = golden(), GOLDEN["frames"][by]
    rows = {row["cohort"]: row for row in cohort_table(frame, by, "brier", threshold=GOLDEN["threshold"], draws=20).to_dicts()}
    assert set(rows) == set(peer)
    for cohort, told in peer.items():
        if told["n"] < 10:
            assert rows[cohort]["selection_rate"] is None and rows[cohort]["small"]      # too few to publish
            continue
        assert rows[cohort]["small"] == (told["n"] < 30)
        for name in ("n", "selection_rate", "tpr", "fpr", "ece"):
            assert math.isclose(rows[cohort][name], told[name], abs_tol=1e-9), (cohort, name)
    acted = frame["p_yes"].to_numpy() >= GOLDEN["threshold"]
    found = {row["gap"]: row["value"] for row in decision_gaps(frame["y"].to_numpy(), acted, cohorts_by(frame, by).to_numpy())}
    for gap, value in GOLDEN["gaps"][by].items():
        assert math.isclose(found[gap], value, abs_tol=1e-9), gap


def test_the_weights_are_aif360s() -> None:
    found = reweighing(np.array(GOLDEN["rows"]["y"]), np.array(GOLDEN["rows"]["sex"]))
    assert np.abs(found - GOLDEN["weights"]["sex"]).max() <= 1e-12
    with pytest.raises(InputError, match="at least one row"):
        reweighing(np.array([]), np.array([]))


def test_weighted_group_and_outcome_are_independent_and_rows_keep_their_number() -> None:
    rng = np.random.default_rng(3)
    y, group = rng.integers(0, 3, 500), rng.choice(list("abcd"), 500)
    weights = reweighing(y, group)
    assert math.isclose(weights.sum(), 500) and (weights > 0).all()
    for g in "abcd":
        for c in range(3):
            assert math.isclose(weights[(group == g) & (y == c)].sum() / 500, (group == g).mean() * (y == c).mean(), rel_tol=1e-9)


def test_draws_of_an_auc_by_blocks_equal_the_ranking_with_ties() -> None:
    rng = np.random.default_rng(6)
    y, p, group, unit = rng.integers(0, 2, 600), rng.random(600).round(1), rng.integers(0, 3, 600), rng.integers(0, 12, 600)
    from pipeline.core.metrics import rankings

    drawn = draw_by_cohort("roc_auc", y, p, group, unit, seed=2, draws=20)
    from pipeline.core.intervals import draws_of

    for row, weights in zip(drawn, draws_of(12, 2, 20)):
        for g in range(3):
            ranked = rankings(y[group == g].astype(float), p[group == g])[0]
            assert math.isclose(row[g], ranked.value("roc_auc", weights[unit[group == g]][ranked.order]), abs_tol=1e-12)
    assert math.isnan(_won(np.ones(1), *_wins(np.ones(3), np.ones(3), np.zeros(3, int), 1)))


@pytest.mark.parametrize("truth", [[0.7] * 12, [0.6] + [0.7] * 11, list(np.linspace(0.65, 0.75, 12))])
def test_the_interval_of_a_gap_holds_the_true_one(truth: list[float]) -> None:
    "Twelve groups of unequal size: the low end is wrong in at most one of twenty, the high end too, and the number is less biased than what is observed."
    rng, real = np.random.default_rng(8), max(truth) - min(truth)
    noise = np.r_[0.045, np.full(11, 0.02)]
    found = []
    for _ in range(120):
        values = np.array(truth) + rng.normal(size=12) * noise
        found.append((np.ptp(values), spread_of(values, values + rng.normal(size=(300, 12)) * noise, 5000, 5000)))
    estimates = [one for _, one in found]
    assert np.mean([one.low > real + 1e-9 for one in estimates]) <= 0.05 and np.mean([one.high < real for one in estimates]) <= 0.06
    assert abs(np.mean([one.value for one in estimates]) - real) < abs(np.mean([observed for observed, _ in found]) - real)
    assert all(one.low <= one.value <= one.high for one in estimates)


def test_holm_names_the_planted_group_and_no_other() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(0.7, 0.01, 30)
    values[4] = 0.6
    rows = pl.DataFrame({"value": values, "low": values - 0.02, "high": values + 0.02, "small": [False] * 30})
    assert np.flatnonzero(beyond_chance(rows, 0.7).to_numpy()).tolist() == [4]


def people(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, pl.Series]:
    "Two groups whose scores tell them apart unequally well."
    rng = np.random.default_rng(seed)
    x, group = rng.normal(size=n), rng.choice(["a", "b"], n)
    y = (rng.random(n) < 1 / (1 + np.exp(-np.where(group == "a", 2.5, 1.2) * x - 0.5 * (group == "a")))).astype(int)
    return y, 1 / (1 + np.exp(-x)), pl.Series("who", group)


@pytest.mark.parametrize("seed", range(6))
def test_plain_thresholds_are_the_best_there_are(seed: int) -> None:
    "On few rows: equal to trying every pair."
    rng = np.random.default_rng(seed)
    groups = [Reach(rng.integers(0, 2, n), rng.random(n).round(1), (2.0, 1.0)) for n in (15, 25)]
    for criterion, rates in (("demographic_parity", ["rate"]), ("equalized_odds", ["tpr", "fpr"])):
        for gap in (0.0, 0.07, 0.2):
            best = max(a + b for i, a in enumerate(groups[0].gain) for j, b in enumerate(groups[1].gain)
                       if all(abs(getattr(groups[0], r)[i] - getattr(groups[1], r)[j]) <= gap + 1e-12 for r in rates))
            found = level_thresholds(groups, criterion, gap)
            assert math.isclose(sum(g.gain[k] for g, k in zip(groups, found)), best), (criterion, gap)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion", ["demographic_parity", "equalized_odds"])
def test_a_rule_closes_the_gap_on_rows_it_did_not_see_and_answers_the_same_twice(kind: str, criterion: str) -> None:
    y, p, who = people(20_000, 1)
    rule = fit_rule(y, p, who, Grouping("who"), criterion, 0.02, kind=kind)
    y2, p2, who2 = people(20_000, 2)
    acted = rule.act(p2, who2)
    order = np.random.default_rng(0).permutation(20_000)
    assert np.array_equal(rule.act(p2[order], who2[pl.Series(order)]), acted[order])                 # nothing hangs on order or on others
    assert GroupRule.from_dict(json.loads(json.dumps(rule.to_dict()))).act(p2, who2).tolist() == acted.tolist()
    gap = next(g for g in decision_gaps(y2, acted, who2.to_numpy()) if g["gap"] == criterion)["value"]
    one = next(g for g in decision_gaps(y2, p2 >= 0.5, who2.to_numpy()) if g["gap"] == criterion)["value"]
    assert gap < 0.05 and (one < 0.02 or gap < one)


def test_a_band_brings_more_than_plain_thresholds_where_odds_must_be_equal() -> None:
    y, p, who = people(20_000, 3)
    groups = [Reach(y[(who == g).to_numpy()], p[(who == g).to_numpy()]) for g in "ab"]
    plain = sum(g.gain[k] for g, k in zip(groups, level_thresholds(groups, "equalized_odds", 0.005)))
    acted = [cut.act(p[(who == g).to_numpy()]) for cut, g in zip(level_with_band(groups, 0.005), "ab")]
    banded = sum(np.where(y[(who == g).to_numpy()] == 1, 1.0, -1.0)[a].sum() for a, g in zip(acted, "ab"))
    assert banded > plain


def test_lots_are_even_and_hang_on_the_score_alone() -> None:
    scores = np.random.default_rng(1).random(50_000)
    found = np.histogram(lots(scores), 20, (0, 1))[0]
    assert found.min() > 2250 and found.max() < 2750 and lots(np.array([0.0]))[0] == lots(np.array([-0.0]))[0]
    assert np.array_equal(lots(scores)[:10], lots(scores[:10]))


def test_tiny_groups_and_single_classes_keep_the_usual_threshold() -> None:
    y, p, who = people(4000, 4)
    who = pl.concat([who[:-12], pl.Series("who", ["tiny"] * 12)])
    rule = fit_rule(y, p, who, Grouping("who"), "equalized_odds", 0.02, threshold=0.4)
    assert rule.cuts["tiny"].high == 0.4 and rule.otherwise.high == 0.4
    assert rule.act(np.array([0.39, 0.41]), pl.Series([None, "never seen"])).tolist() == [False, True]
    with pytest.raises(InputError, match="cannot be levelled"):
        fit_rule(np.ones(100, int), np.linspace(0, 1, 100), pl.Series(["a", "b"] * 50), Grouping("who"), "equalized_odds", 0.02)


def test_options_are_judged_on_rows_they_were_not_made_from() -> None:
    seen, unseen = [], []
    for seed in range(5):
        y, p, who = people(1500, seed)
        options = frontier(Rows(y, p, who, np.zeros(1500, int), Grouping("who")), "demographic_parity", gaps=(0.0, 0.05))
        made = fit_rule(y, p, who, Grouping("who"), "demographic_parity", 0.0)
        seen.append(next(g for g in decision_gaps(y, made.act(p, who), who.to_numpy()) if g["gap"] == "demographic_parity")["value"])
        unseen.append(options["demographic_parity"][1])
    assert max(seen) < 0.005 and np.mean(unseen) > 2 * np.mean(seen)
    assert pick_option(options, "demographic_parity", 1.0)[0]["value"] == options["value"][1:].max()


ASKED = "cohorts: [town], cohort_gap: 0.3, costs: {{false_alarm: 1, miss: 2}}, acceptance: [{{metric: value_per_1000, at_least: 0}}], mitigation: {{method: {method}, by: town, " \
        "criterion: demographic_parity, reason: agreed with the works council{approver}}}"


def judged(place: Place, task: str = "binary", **asked: str) -> Path:
    "The phase without what does not matter here."
    place.prepare(task, n=2400, evaluate=ASKED.format(**{"approver": "", **asked}), family="trees")
    run = place.open("05_evaluate", "main")
    choose_threshold(run)
    place.shown = [choose_mitigation(run)._repr_html_()]
    holdout = open_holdout(run)
    measure(run, holdout)
    place.shown += [check_cohorts(run, holdout)._repr_html_(), check_mitigation(run, holdout)._repr_html_()]
    run.conclude("judged")
    run.finish()
    return commit_phase(run.folder, "05_evaluate")


@pytest.mark.parametrize("approver", ["", ", approver: R. Meier"])
def test_thresholds_by_group_are_measured_signed_packed_and_served(place: Place, approver: str) -> None:
    folder = judged(place, method="thresholds", approver=approver)
    found = verdicts(folder)
    assert found[SIGN_OFF] == ("go" if approver else "inconclusive") and found["thresholds by town can be served"] == "go"
    assert "needs sign-off" in next(c for c in read_checks(folder) if c.title == SIGN_OFF).found or approver
    assert found["value per 1,000 decisions holds with the mitigation"] == "go" and recompute(folder) > 15
    told = json.loads((folder / "mitigation.json").read_text())
    assert len(told["options"]) > 5 and "Civil Rights Act" in told["legal"] and told["chosen"]["demographic_parity"] <= 0.3
    levelled = pl.read_parquet(folder / "levelled.parquet")
    gaps = [{g["gap"]: g["value"] for g in decision_gaps(levelled["y"].to_numpy(), levelled[w].to_numpy(), levelled["group"].to_numpy())} for w in ("before", "after")]
    assert gaps[1]["demographic_parity"] < gaps[0]["demographic_parity"]
    decisions = json.loads((folder / "decisions.json").read_text())
    assert next(d for d in decisions if d["what"] == "mitigation")["by"] == ("R. Meier" if approver else "nobody yet")

    run = place.open("06_deploy", "main")
    model = load_model(run.load("train/model"))
    contents = _contents(run, model.info, "d")
    assert contents.card["mitigation"]["approver"] == ("R. Meier" if approver else "nobody yet: needs sign-off")
    assert "Mitigation" in contents.card_text and "works council" in contents.card_text
    rule = GroupRule.from_dict(contents.threshold["by_group"])
    rows = run.open_sealed("data/holdout", reason="test", look=False)
    served = Predictor(model, make_schema(run.load("data/contract")), contents.threshold["threshold"], rule=rule).predict(rows)
    assert ((served["prediction"] == "yes") == levelled["after"]).all()


def test_reweighing_is_compared_with_the_same_recipe_unweighted(place: Place) -> None:
    folder = judged(place, method="reweigh", approver=", approver: R. Meier")
    claims = {c["name"]: c for c in json.loads((folder / "claims.json").read_text())}
    assert {f"{gap}_{which}" for gap in GAPS for which in ("before", "after")} <= set(claims) and claims["accuracy_change"]["low"] is not None
    assert verdicts(folder)[SIGN_OFF] == "go" and recompute(folder) > 12


def test_without_a_mitigation_its_price_is_told_and_nobody_must_sign(place: Place) -> None:
    folder = judged(place, method="none")
    assert verdicts(folder)[SIGN_OFF] == "not applicable" and "What levelling town would cost" in place.shown[0]
    assert json.loads((folder / "mitigation.json").read_text())["method"] == "none"


@pytest.mark.parametrize("task", ["multiclass", "regression"])
def test_thresholds_are_refused_where_there_is_no_yes_or_no(place: Place, task: str) -> None:
    with pytest.raises(InputError, match="need a yes or no"):
        judged(place, task, method="thresholds")


def test_a_gap_above_the_limit_fails_and_one_that_may_be_is_not_settled() -> None:
    wide = spread_of(np.array([0.6, 0.8]), np.array([0.6, 0.8]) + np.random.default_rng(1).normal(0, 0.01, (200, 2)), 900, 900)
    assert judge(wide, None, 0.1) == "no-go" and judge(wide, None, 0.2) == "inconclusive" and judge(wide, None, 0.3) == "go"


def test_weights_are_asked_by_the_problem_file() -> None:
    from types import SimpleNamespace

    frame = pl.DataFrame({"sex": GOLDEN["rows"]["sex"]})
    found = mitigation_weights(SimpleNamespace(method="reweigh", by="sex"), frame, np.array(GOLDEN["rows"]["y"]))
    assert found is not None and np.abs(found - GOLDEN["weights"]["sex"]).max() <= 1e-12


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
@pytest.mark.parametrize("by", ["sex", "race"])
def test_on_adult_parity_costs_little_and_holds_on_other_rows(by: str) -> None:
    import lightgbm

    table = pl.read_parquet(SHARED / "adult.parquet")
    y = (table["income"].cast(pl.String) == table["income"].cast(pl.String).max()).cast(int).to_numpy()
    coded = table.drop("income", "__split").with_columns(pl.col(pl.String).cast(pl.Categorical).to_physical()).with_columns(pl.all().cast(pl.Float64)).to_numpy()
    train, test = ((table["__split"] == part).to_numpy() for part in ("train", "test"))
    learn = train & (np.arange(len(y)) % 10 < 7)
    model = lightgbm.train({"objective": "binary", "verbose": -1, "num_threads": 1}, lightgbm.Dataset(coded[learn], y[learn]), 60)
    p, made = np.asarray(model.predict(coded)), train & ~learn
    rule = fit_rule(y[made], p[made], table[by].filter(pl.Series(made)), learn_grouping(table[by]), "demographic_parity", 0.01)
    seen = table[by].filter(pl.Series(test))
    acted, one = rule.act(p[test], seen), p[test] >= 0.5
    gaps: list[Any] = [next(g["value"] for g in decision_gaps(y[test], a, seen.to_numpy()) if g["gap"] == "demographic_parity") for a in (one, acted)]
    assert gaps[1] < 0.08 and gaps[1] < gaps[0] / 2 and (acted == y[test]).mean() > (one == y[test]).mean() - 0.03


def test_weights_reach_the_final_fit_but_not_the_default_it_replaces() -> None:
    from dataclasses import replace

    from pipeline.data.contract import Contract, Rule
    from pipeline.train.budget import plan_fits
    from pipeline.train.choice import rows_of
    from pipeline.train.features import learn_encoder
    from pipeline.train.final import fit_finally
    from pipeline.train.search import Goal, run_search

    rng, n = np.random.default_rng(2), 600
    size, sex = rng.normal(size=n), rng.choice(["f", "m"], n)
    granted = np.where(rng.random(n) < 1 / (1 + np.exp(-size - 1.5 * (sex == "m"))), "yes", "no")
    frame = pl.DataFrame({"__row": np.arange(n), "size": size, "sex": sex, "granted": granted}).with_columns(__fold=(pl.col("__row") % 3).cast(pl.Int8))
    rules = [Rule("size", "number", "Float64", "feature", False), Rule("sex", "category", "String", "feature", False), Rule("granted", "category", "String", "target", False)]
    contract = Contract("granted", "binary", ["no", "yes"], "yes", None, None, None, rules).to_dict()
    encoder = learn_encoder(frame, contract)
    rows = rows_of(frame, contract, {"folds": 3, "ordered": False}, encoder)
    plan = plan_fits(["linear", "trees"], [len(t) for t, _ in rows.folds], n, rows.shape, 10)
    found = run_search(rows, plan, Goal("roc_auc"), seed=7)
    weighted = replace(rows, weights=reweighing(rows.target, sex))
    plain, fair = (fit_finally(found.named("linear"), found.named("trees"), r, contract, encoder, plan, [7]) for r in (rows, weighted))

    def gap(model: Any) -> float:
        p = model.predict(frame)[:, 1]
        return float(p[sex == "m"].mean() - p[sex == "f"].mean())

    assert gap(fair.model) < gap(plain.model) / 2 and np.array_equal(fair.default.predict(frame), plain.default.predict(frame))
