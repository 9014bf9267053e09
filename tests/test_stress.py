"What breaks a model: disturbances of every kind, adversaries inside bounds, rules with counter-examples, wrong labels, hidden slices."
from __future__ import annotations

from pathlib import Path
from typing import Any

import datetime as dt
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import InputError
from pipeline.core.run import read_checks, read_claims
from pipeline.evaluate.attack import Aim, Reach, attack, reach_of, share_turned, single_edits, worst_of
from pipeline.evaluate.holdout import open_holdout
from pipeline.evaluate.mislabelled import cost_of_noise, spoil
from pipeline.evaluate.removal import Side
from pipeline.evaluate.rules import answers_over, check_rules, share_broken, try_invariant, try_monotone, values_of
from pipeline.evaluate.slices import find_slices
from pipeline.evaluate.stress import change, disturbances, recall_by_class, recall_disturbed, sent_columns
from pipeline.evaluate.threshold import choose_threshold
from pipeline.train.models import Model, train_model
from pipeline.train.protocol import Fitting, Shape
from test_evaluate_phase import Place

KINDS = {"size": "number", "wind": "number", "town": "category", "note": "text", "wet": "bool", "due": "date"}


def mixed(n: int = 500, seed: int = 3) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return pl.DataFrame({
        "size": rng.normal(0, 1, n), "wind": rng.integers(0, 30, n).astype(float), "town": rng.choice(["Aachen", "Bonn", "Céret"], n),
        "note": rng.choice(["all well", "late again", "crew missing"], n), "wet": rng.random(n) < 0.3,
        "due": [f"2024-{1 + i % 12:02d}-{1 + i % 28:02d}" for i in range(n)],
    }).with_columns(pl.col("due").str.to_datetime())


def contract_of(kinds: dict[str, str], task: str = "binary", classes: tuple[str, ...] = ("no", "yes")) -> dict[str, Any]:
    return {"target": "y", "task": task, "classes": list(classes), "features": list(kinds), "columns": [{"name": c, "type": t} for c, t in kinds.items()]}


def trained(family: str, n: int = 900, **config: Any) -> tuple[Model, pl.DataFrame, dict[str, Any]]:
    rng = np.random.default_rng(11)
    frame = pl.DataFrame({"size": rng.normal(0, 1, n), "wind": rng.normal(0, 1, n), "town": rng.choice(["a", "b"], n)})
    score = 1.5 * frame["size"].to_numpy() - frame["wind"].to_numpy() + (frame["town"] == "b").to_numpy()
    y = (score + rng.logistic(0, 0.5, n) > 0).astype(int)
    contract = contract_of({"size": "number", "wind": "number", "town": "category"})
    return train_model(family, frame, y, contract, Fitting(config, seed=5)), frame, contract


# -- disturbances

@pytest.mark.parametrize("key", sorted(disturbances(KINDS, ["size"])))
def test_every_disturbance_changes_something_keeps_the_shape_and_comes_out_the_same_twice(key: str) -> None:
    frame, (_, disturb) = mixed(), disturbances(KINDS, ["size"])[key]
    once, again = (disturb(frame, np.random.default_rng(7)) for _ in range(2))
    assert once.shape == frame.shape and once.schema == frame.schema and once.equals(again, null_equal=True)
    assert not once.equals(frame, null_equal=True)


def test_disturbances_fit_the_columns_that_there_are() -> None:
    assert set(disturbances({"a": "category"}, [])) == {"lost10", "lost30", "unseen", "wrong"}
    assert "swap" not in disturbances({"a": "number"}, []) and {"clock", "later"} <= set(disturbances({"a": "date"}, []))


def test_a_made_column_follows_what_it_is_made_from() -> None:
    from pipeline.data.features import load_feature
    from pipeline.problems import flights as problem

    contract = {"features": ["hour", "distance"], "columns": [
        {"name": "hour", "type": "number", "derived": problem.hour.source}, {"name": "distance", "type": "number"},
        {"name": load_feature(problem.hour.source).needs[0], "type": "date"}]}
    due = load_feature(problem.hour.source).needs[0]
    times = [dt.datetime(2013, 8, 1) + dt.timedelta(minutes=37 * i) for i in range(50)]
    head = pl.DataFrame({due: times, "distance": [100 + i for i in range(50)]}).with_columns(hour=pl.col(due).dt.hour())
    assert sent_columns(contract, set(head.columns)) == {"distance": "number", due: "date"}
    later = change(head, contract, {due: head[due].dt.offset_by("1h")})
    assert (later["hour"] == (head["hour"] + 1) % 24).all() and later["distance"].equals(head["distance"])


def test_rare_classes_are_shown_with_intervals_and_with_the_disturbance_that_hides_them() -> None:
    rng = np.random.default_rng(5)
    y = (rng.random(6000) < 0.006).astype(int)
    p = np.clip(0.8 * y + rng.random(6000) * 0.3, 0, 1)
    frame = pl.DataFrame({"y": y, "p_common": 1 - p, "p_rare": p, "lost_p": np.full(6000, 0.1), "noise_p": p})
    found = recall_by_class(frame, ["common", "rare"], 0.5).row(0, named=True)
    assert found["class"] == "rare" and found["share"] < 0.01 and found["low"] < found["found"] <= found["high"] + 1e-9 <= 1 + 1e-9
    worst = recall_disturbed(frame, ["common", "rare"], {"lost": "no feed", "noise": "noise"}, 0.5)
    assert worst.filter(pl.col("class") == "rare").row(0) == ("rare", 0.0, "no feed")


# -- adversaries

@pytest.mark.parametrize(("family", "config"), [("trees", {"rounds": 30, "num_leaves": 7}), ("linear", {}), ("nets", {"epochs": 8, "hidden": 16, "batch": 64})])
def test_the_search_finds_what_a_full_grid_finds(family: str, config: dict[str, Any]) -> None:
    model, frame, contract = trained(family, **config)
    rows, bounds = frame.head(120), {"size": 0.4, "wind": 0.4}
    reach = reach_of(frame, ["size", "wind"], bounds)
    found = attack(model.predict, rows, contract, reach, Aim("binary"), np.random.default_rng(1))
    acts, ends = model.predict(rows)[:, 1] >= 0.5, [(a, b) for a in np.linspace(-1, 1, 21) for b in np.linspace(-1, 1, 21)]
    moved = pl.concat([rows.with_columns(size=pl.Series(reach[0].moved(rows["size"].to_numpy(), a)), wind=pl.Series(reach[1].moved(rows["wind"].to_numpy(), b)))
                       for a, b in ends])
    possible = ((model.predict(moved)[:, 1] >= 0.5).reshape(len(ends), 120) != acts).any(axis=0)
    turned = found.after < 0
    assert possible.sum() >= 10 and (turned & possible).sum() >= 0.9 * possible.sum()
    attacked = rows.with_columns(pl.Series(c, v) for c, v in found.values.items())
    assert np.array_equal((model.predict(attacked)[:, 1] >= 0.5) != acts, turned)       # each success is one
    assert all(np.abs(found.values[c] - rows[c].to_numpy()).max() <= bound + 1e-9 for c, bound in bounds.items())
    assert (found.lucky < 0).sum() <= turned.sum()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), st.floats(0.001, 1e5), st.floats(-1, 1), st.booleans())
def test_nothing_moves_out_of_bounds(values: list[float], bound: float, part: float, whole: bool) -> None:
    start = np.round(values) if whole else np.array(values)
    moved = Reach("x", bound, -100.0, 100.0, whole).moved(start, part)
    assert (np.abs(moved - start) <= bound * (1 + 1e-9) + 1e-6).all() and not (whole and (moved != np.round(moved)).any())
    assert ((moved >= np.minimum(start, -100.0)) & (moved <= np.maximum(start, 100.0))).all()


def test_a_regression_and_several_classes_can_be_attacked() -> None:
    rng = np.random.default_rng(2)
    frame = pl.DataFrame({"a": rng.normal(size=200), "b": rng.normal(size=200)})
    contract = contract_of({"a": "number", "b": "number"}, "regression", ())
    reach = reach_of(frame, ["a", "b"], {"a": 0.5, "b": 0.5})
    up, down = (attack(lambda f: f["a"].to_numpy() * 2 - f["b"].to_numpy(), frame, contract, reach, Aim("regression", far=1.2), np.random.default_rng(1), way) for way in (True, False))
    assert (up.after < 0).mean() > 0.9 and (down.after < 0).mean() > 0.9      # 1.5 is possible but at the ends of the range

    def three(rows: pl.DataFrame) -> np.ndarray:
        raw = np.exp(np.column_stack([rows["a"].to_numpy(), rows["b"].to_numpy(), np.zeros(rows.height)]))
        return raw / raw.sum(1, keepdims=True)

    turned = attack(three, frame, contract, reach, Aim("multiclass"), np.random.default_rng(1))
    gap = np.sort(three(frame), axis=1)
    assert 0.2 < (turned.after < 0).mean() < 1 and (turned.after < 0)[(gap[:, 2] - gap[:, 1]) < 0.02].all()


def test_missing_cells_stay_missing_and_unknown_columns_are_named() -> None:
    model, frame, contract = trained("trees", rounds=10)
    holes = frame.head(60).with_columns(size=pl.when(pl.int_range(60) % 3 == 0).then(None).otherwise(pl.col("size")))
    found = attack(model.predict, holes, contract, reach_of(frame, ["size", "wind"], {}), Aim("binary"), np.random.default_rng(1))
    assert np.isnan(found.values["size"][::3]).all()
    with pytest.raises(InputError, match="did you mean 'wind'"):
        reach_of(frame, ["size", "wind"], {"winds": 1.0})


def test_single_edits_turn_what_they_can() -> None:
    def by_note(rows: pl.DataFrame) -> np.ndarray:
        late = (rows["note"].fill_null("") == "late again").to_numpy().astype(float)
        return np.column_stack([1 - late, late])

    frame = mixed(200)
    edits = single_edits(frame, {"note": "text", "town": "category", "size": "number"}, np.random.default_rng(1))
    turned = {said: worst_of(by_note, frame, contract_of(KINDS), listed, Aim("binary")) < 0 for said, listed in edits.items()}
    late = (frame["note"] == "late again").to_numpy()
    assert np.array_equal(turned["one text misspelt"], late) and np.array_equal(turned["one cell empty"], late)
    assert not turned["one category exchanged"].any() and not turned["one number at the end of its range"].any()
    stored = pl.DataFrame({"how": ["x"] * 200, "turned": late})
    assert share_turned(stored, "x").value == late.mean() and share_turned(stored, "x").low < late.mean()


# -- rules

def test_a_monotone_model_keeps_the_rule_and_a_planted_breach_is_found_with_its_two_values() -> None:
    frame = mixed(300)
    contract = contract_of(KINDS)

    def breach(rows: pl.DataFrame) -> np.ndarray:
        wind = rows["wind"].to_numpy()
        p = 0.2 + wind / 60 - np.where((wind > 20) & (rows["town"] == "Bonn").to_numpy(), 0.3, 0.0)
        return np.column_stack([1 - p, p])

    grid = values_of(frame["wind"])
    found = try_monotone(answers_over(breach, frame, contract, "wind", grid)[:, :, 1], up=True, threshold=0.3)
    bonn = (frame["town"] == "Bonn").to_numpy()
    assert (found.size[bonn] > 0.2).all() and (found.size[~bonn] == 0).all()
    assert all(grid[int(a)] <= 20 < grid[int(b)] for a, b in zip(found.lower[bonn], found.upper[bonn]))
    assert (try_invariant(answers_over(breach, frame, contract, "note", values_of(frame["note"]))).size == 0).all()
    by_town = try_invariant(answers_over(breach, frame, contract, "town", values_of(frame["town"])))
    assert np.array_equal(by_town.size > 0.2, (frame["wind"] > 20).to_numpy())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=6))
def test_the_largest_fall_is_that_of_all_pairs(rows: list[list[float]]) -> None:
    answers = np.array(rows)
    found = try_monotone(answers, up=True)
    for row, size in zip(answers, found.size):
        worst = max(row[i] - row[j] for i in range(4) for j in range(i, 4))
        assert size == pytest.approx(worst if worst > 1e-9 else 0.0, abs=1e-12)


def test_rules_in_a_phase_are_criteria_with_counter_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, monkeypatch)
    rules = ("rules: [{kind: monotone, column: size, reason: larger ones are late more often}, "
             "{kind: monotone, column: wind, direction: down, reason: planted the wrong way round}, {kind: invariant, column: town, reason: the town must not matter here}, "
             "{kind: invariant, column: tonw, reason: there is no such column at all}]")
    place.prepare("binary", seeds=1, evaluate=rules)
    run = place.open("05_evaluate", "main")
    choose_threshold(run)
    shown = check_rules(run, open_holdout(run), ["size", "wind", "town"])
    verdicts = {c.title: (c.verdict, c.why) for c in run.made_checks}
    assert verdicts["rule 1: the answer never falls as size rises"][0] == "go"
    state, why = verdicts["rule 2: the answer never rises as wind rises"]
    assert state == "no-go" and "wind" in why and "is answered" in why and "where size" in why
    assert verdicts["rule 3: the answer does not depend on town"][0] == "no-go"
    state, why = verdicts["rule 4: the answer does not depend on tonw"]
    assert state == "no-go" and "2 of 4 rules are broken" in shown.html
    stored = run.load("evaluate/rules")
    assert {c.name: c.value for c in run.made_claims}["rule_1_broken"] == share_broken(stored, 1).value == 1.0


# -- slices, labels

def test_a_trigger_on_one_row_in_fifty_is_among_the_first_three_slices() -> None:
    hits = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        n = 6000
        frame = pl.DataFrame({"a": rng.choice(list("pqrs"), n), "b": rng.choice(list("xyz"), n), "c": rng.normal(size=n), "d": rng.choice(list("uvw"), n)})
        bad = ((frame["a"] == "p") & (frame["b"] == "x")).to_numpy() & (rng.random(n) < 0.25)
        frame = frame.with_columns(d=pl.when(pl.Series(bad)).then(pl.lit("t")).otherwise(pl.col("d")))
        loss = np.where(bad, 5, 1) * rng.gamma(2, 0.2, n)
        assert 0.01 < bad.mean() < 0.03
        hits += any("d is t" in s for s in find_slices(frame, loss, frame.columns)["slice"].head(3))
    assert hits == 8


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.floats(0, 1), st.integers(0, 99))
def test_exactly_the_share_of_labels_is_made_wrong(classes: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    target = rng.integers(0, classes, 200)
    spoilt = spoil(target, classes, share, rng)
    assert (spoilt != target).sum() == round(share * 200) and np.isin(spoilt, np.arange(classes)).all()


def test_labels_that_are_half_wrong_are_worth_nothing_and_all_wrong_are_worse() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(6000, 4))
    y = (x[:, 0] + 0.7 * x[:, 1] + rng.logistic(0, 0.4, 6000) > 0).astype(int)
    side = Side(x[:4000], y[:4000], x[4000:], y[4000:], np.arange(2000))
    costs = cost_of_noise(Shape("binary", 2, (0,) * 4), [side], np.random.default_rng(1), (0.1, 0.5, 1.0))[0]
    assert 0 < costs["of_all"][0] < 0.3 and 0.9 < costs["of_all"][1] < 1.2 and costs["of_all"][2] > 1.5 and (costs["low"] > 0).all()


def test_the_phase_saves_what_it_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, monkeypatch)
    place.prepare("binary", seeds=2, family="trees", evaluate="attack: {size: 0.3}")
    folder = place.evaluate()
    claims = {c.name: c for c in read_claims(folder)}
    assert {"attack_turned", "stress_worst_change", "removal_rise", "mislabelled_rise", "explanations_agree"} <= set(claims)
    stored = pl.read_parquet(folder / "attack.parquet")
    assert claims["attack_turned"].low <= claims["attack_turned"].value <= claims["attack_turned"].high and "a search for the worst move inside the bounds" in stored["how"]
    assert any("An adversary may move size" in page and "as declared" in page for page in place.shown)
    titles = {c.title: c for c in read_checks(folder)}
    assert "D2" in titles["each column was left out and the model trained again"].answers
