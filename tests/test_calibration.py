"Calibration: repairs that repair, are chosen only where they do, and answer in the service as they were measured."
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.metrics import metric
from pipeline.core.run import judge
from pipeline.evaluate.calibration import check_calibration, choose_repair, noise_floor, repair_model, try_repairs
from pipeline.train.repairs import MOST_CLASSES, REPAIRS, REPAIRS_OF_MORE, apply_repair, fit_repair, repairs_for


def scored(n: int = 4000, seed: int = 7, sharp: float = 1.0) -> pl.DataFrame:
    "Calibrated scores, or over-confident ones where sharp > 1."
    rng = np.random.default_rng(seed)
    chance = rng.beta(2, 5, n)
    stated = 1 / (1 + ((1 - chance) / chance) ** sharp)
    return pl.DataFrame({"y": (rng.random(n) < chance).astype(int), "fold": np.arange(n) % 3, "p_no": 1 - stated, "p_yes": stated})


@pytest.mark.parametrize("kind", REPAIRS)
def test_overconfident_scores_fail_the_limit_and_a_repair_halves_the_error(kind: str) -> None:
    train, test = scored(6000, 1, sharp=2.5), scored(6000, 2, sharp=2.5)
    before = metric("ece", test["y"], test["p_yes"])
    mended = apply_repair(fit_repair(kind, train["y"].to_numpy(), train["p_yes"].to_numpy()), test["p_yes"].to_numpy())
    assert judge_value(before) == "no-go" and judge_value(metric("ece", test["y"], mended)) == "go"
    assert metric("ece", test["y"], mended) <= before / 2
    near = 1e-12 if kind in ("temperature", "line") else 1e-3
    assert abs(metric("roc_auc", test["y"], mended) - metric("roc_auc", test["y"], test["p_yes"])) < near


def judge_value(ece: float) -> str:
    from pipeline.core.run import Estimate

    return judge(Estimate(ece), None, 0.08)


def test_a_repair_is_chosen_only_where_it_repairs() -> None:
    kind, why = choose_repair(try_repairs(scored(6000, 3, sharp=2.5)))
    assert kind in REPAIRS and "falls from" in why
    assert choose_repair(try_repairs(scored(6000, 3)))[0] is None
    chosen = [choose_repair(try_repairs(scored(1500, seed)))[0] for seed in range(16)]
    assert sum(kind is not None for kind in chosen) <= 1          # true probabilities are hardly ever "repaired"


def test_a_limit_that_is_broken_asks_for_less_proof_but_never_for_harm() -> None:
    tried = pl.DataFrame([
        {"repair": "none", "ece": 0.09, "by_chance": 0.02, "log_loss": 0.500, "gain": 0.0, "gain_low": 0.0, "gain_high": 0.0},
        {"repair": "line", "ece": 0.03, "by_chance": 0.02, "log_loss": 0.499, "gain": 0.001, "gain_low": -0.001, "gain_high": 0.003},
        {"repair": "isotonic", "ece": 0.02, "by_chance": 0.02, "log_loss": 0.510, "gain": -0.01, "gain_low": -0.02, "gain_high": -0.005},
    ]).with_columns(by_class=pl.lit(None, pl.Float64))
    assert choose_repair(tried)[0] is None and choose_repair(tried, limit=0.1)[0] is None
    assert choose_repair(tried, limit=0.08)[0] == "line"


def test_temperature_and_isotonic_equal_their_library_counterparts() -> None:
    from sklearn.isotonic import IsotonicRegression
    from sklearn.linear_model import LogisticRegression

    frame = scored(3000, 5, sharp=2.0)
    y, p = frame["y"].to_numpy(), frame["p_yes"].to_numpy()
    odds = np.log(p / (1 - p))[:, None]
    platt = LogisticRegression(C=1e6, tol=1e-10).fit(odds, y)
    found = fit_repair("line", y, p)
    assert math.isclose(found["slope"], platt.coef_[0, 0], rel_tol=1e-3) and math.isclose(found["shift"], platt.intercept_[0], abs_tol=1e-3)
    steps = IsotonicRegression(y_min=0, y_max=1).fit(p, y)
    centred = fit_repair("isotonic", y, p)
    inner = slice(1, -1)
    assert np.allclose(steps.predict(np.array(centred["x"][inner])), np.clip(centred["y"][inner], 0, 1), atol=1e-3)    # same steps at their middles


def test_venn_abers_equals_isotonic_with_one_more_row() -> None:
    from sklearn.isotonic import IsotonicRegression

    rng = np.random.default_rng(3)
    p = np.round(rng.random(400), 2)                       # a hundred levels: no grouping takes place
    y = (rng.random(400) < p).astype(int)
    found = fit_repair("venn_abers", y, p)
    for place in range(0, len(found["at"]), 9):
        s = found["at"][place]
        for end, label in (("low", 0), ("high", 1)):
            more = IsotonicRegression().fit(np.append(p, s), np.append(y, label))
            assert abs(float(more.predict([s])[0]) - found[end][place]) < 0.03
    assert all(a <= b for a, b in zip(found["low"], found["high"]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60), st.sampled_from(REPAIRS), st.booleans())
def test_repairs_of_any_scores_are_probabilities_in_the_same_order(seed: int, n: int, kind: str, coarse: bool) -> None:
    rng = np.random.default_rng(seed)
    p = np.round(rng.random(n), 1) if coarse else rng.random(n) ** 4
    y = (rng.random(n) < rng.random()).astype(int)
    y[0], y[-1] = 0, 1
    grid = np.linspace(0, 1, 101)
    mended = apply_repair(fit_repair(kind, y, p), grid)
    assert np.isfinite(mended).all() and mended.min() >= 0 and mended.max() <= 1 and (np.diff(mended) >= -1e-12).all()
    one_by_one = np.concatenate([apply_repair(fit_repair(kind, y, p), grid[i:i + 1]) for i in range(0, 101, 7)])
    assert np.array_equal(one_by_one, mended[::7])


def of_classes(k: int, n: int, seed: int, tilt: float = 1.0, power: float = 1.0) -> pl.DataFrame:
    "Probabilities of k classes whose stated ones are tilted towards the first and sharpened."
    rng = np.random.default_rng(seed)
    true = rng.dirichlet(np.linspace(1, 2, k), n)
    y = (rng.random(n)[:, None] > np.cumsum(true, axis=1)).sum(1).clip(0, k - 1)
    stated = true**power * np.geomspace(tilt, 1 / tilt, k)
    stated /= stated.sum(1, keepdims=True)
    return pl.DataFrame({"y": y, "fold": np.arange(n) % 3} | {f"p_{c}": stated[:, c] for c in range(k)})


def test_classes_that_are_off_in_different_ways_need_more_than_a_temperature() -> None:
    tried = try_repairs(of_classes(4, 2000, 3, tilt=2.0), draws=40)
    assert tried["repair"].to_list() == ["none", *REPAIRS_OF_MORE]
    kind, why = choose_repair(tried)
    rows = {row["repair"]: row for row in tried.to_dicts()}
    assert kind in ("vector", "dirichlet") and "by class from" in why
    assert rows[kind]["by_class"] <= 0.5 * rows["temperature"]["by_class"] and rows[kind]["log_loss"] < rows["temperature"]["log_loss"]
    chosen = [choose_repair(try_repairs(of_classes(3, 600, seed), draws=40))[0] for seed in range(4)]
    assert chosen == [None] * 4, "true probabilities are hardly ever repaired"
    assert choose_repair(try_repairs(of_classes(4, 1500, 4, power=2.0), draws=40))[0] == "temperature", "where that is all that is wrong, more numbers only add noise"
    assert repairs_for(2) == REPAIRS and repairs_for(MOST_CLASSES + 1) == ("temperature", "vector", "isotonic")


def test_vector_scaling_equals_a_library_with_the_same_hold() -> None:
    from sklearn.linear_model import LogisticRegression

    frame = of_classes(3, 2000, 5, tilt=1.5)
    y, logs = frame["y"].to_numpy(), np.log(frame.select("p_0", "p_1", "p_2").to_numpy())
    free = LogisticRegression(C=1e6, tol=1e-10, max_iter=2000).fit(logs, y)
    found = apply_repair(fit_repair("dirichlet", y, np.exp(logs)), np.exp(logs))
    assert np.abs(found - free.predict_proba(logs)).max() < 0.02            # held by one row in two thousand


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 40), st.sampled_from(REPAIRS_OF_MORE), st.booleans())
def test_repairs_of_many_classes_are_probabilities_alone_and_together(seed: int, n: int, kind: str, extreme: bool) -> None:
    rng = np.random.default_rng(seed)
    p = np.eye(4)[rng.integers(0, 4, n)] if extreme else rng.dirichlet(np.full(4, 0.3), n)
    y = rng.integers(0, 3, n)                                               # a class that never happens
    repair = json.loads(json.dumps(fit_repair(kind, y, p)))
    mended = apply_repair(repair, p)
    assert np.isfinite(mended).all() and mended.min() >= 0 and np.allclose(mended.sum(1), 1)
    assert np.array_equal(np.vstack([apply_repair(repair, row[None]) for row in p]), mended)


def test_calibration_by_chance_is_what_true_forecasts_show() -> None:
    found = [(metric("ece", f["y"], f["p_yes"]), noise_floor(f["y"].to_numpy(), f["p_yes"].to_numpy())) for f in (scored(3000, s) for s in range(20))]
    assert 0.8 < np.mean([a for a, _ in found]) / np.mean([b for _, b in found]) < 1.25


def overconfident(place: Any) -> tuple[pl.DataFrame, dict[str, Any]]:
    "The phases before evaluate, with trees that learned their rows by heart."
    from test_evaluate_phase import SECTIONS, indexed, make_table

    from pipeline.train.models import train_model
    from pipeline.train.protocol import Fitting

    said = "costs: {false_alarm: 1, miss: 2}, acceptance: [{metric: ece, at_most: 0.06}]"
    (place.root / "tiny.yml").write_text(SECTIONS.format(task="binary", evaluate=said, seed=7))
    frame, contract = make_table("binary", 6000)
    learn, valid, held = frame[:2000], frame[2000:4000], frame[4000:]
    model = train_model("trees", learn, indexed(learn, contract), contract, Fitting({"rounds": 150, "num_leaves": 31, "min_data_in_leaf": 5}))
    data = place.open("02_data", "main")
    data.save("data/train", frame[:4000])
    data.save("data/holdout", held, sealed=True)
    data.save("data/contract", contract)
    data.save("data/splits", {"kind": "time", "ordered": True, "folds": 1})
    place.close(data)
    trained = place.open("04_train", "main")
    trained.save("train/model", model.save(place.root / "m"))
    for k in range(2):
        model.save(place.root / "seeds" / str(k))
    trained.save("train/seed_models", place.root / "seeds")
    answers = model.answers(model.predict(valid))
    told = pl.DataFrame({"fold": np.arange(2000) * 3 // 2000, "y": indexed(valid, contract)})
    trained.save("train/validation", pl.concat([valid.select("__row"), told, answers], how="horizontal"))
    place.close(trained)
    return held, contract


def test_a_repaired_model_is_what_is_measured_packed_and_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_evaluate_phase import Place, recompute

    from pipeline.core import audit
    from pipeline.core.run import read_checks, read_claims
    from pipeline.core.store import read_frame
    from pipeline.deploy.package import KEY, Contents, load_package, release
    from pipeline.deploy.schema import make_schema
    from pipeline.evaluate.conformal import check_promise
    from pipeline.evaluate.gate import check_acceptance
    from pipeline.evaluate.holdout import open_holdout
    from pipeline.evaluate.measures import measure
    from pipeline.evaluate.threshold import choose_threshold
    from pipeline.train.models import load_model

    place = Place(tmp_path, monkeypatch)
    held, contract = overconfident(place)
    opened = place.open("05_evaluate", "main")
    shown = [repair_model(opened)._repr_html_()]
    choose_threshold(opened)
    holdout = open_holdout(opened)
    measured = measure(opened, holdout)
    shown += [step._repr_html_() for step in (check_calibration(opened, holdout), check_promise(opened, holdout), check_acceptance(opened, holdout, measured))]
    place.close(opened)
    folder = opened.folder / "05_evaluate"
    assert "Repaired by" in shown[0] and "Without the repair" in shown[1]
    assert recompute(folder) > 5
    claims = {c.name: c for c in read_claims(folder)}
    assert claims["ece_unrepaired"].value > 0.06 and claims["ece"].value <= 0.5 * claims["ece_unrepaired"].value
    checks = {c.title: c.verdict for c in read_checks(folder)}
    assert checks["calibration error at most 0.06 on holdout"] == "go"
    stored = read_frame(folder / "predictions.parquet")
    assert abs(metric("roc_auc", stored["y"], stored["raw_p"]) - claims["roc_auc"].value) < 1e-3
    assert stored["s0_p"].equals(stored["p_yes"].rename("s0_p"))                 # other seeds are repaired alike
    model = load_model(folder / "model")
    contents = Contents(contract, make_schema(contract, held).to_dict(), {"threshold": 0.4}, [], {}, "# card\n", {})
    package = release(place.root / "store", place.root / "work", "tiny", folder / "model", contents)
    served = load_package(package, audit.public_key(place.root / "store", KEY))
    assert np.array_equal(served.predict(held)["p_yes"].to_numpy(), stored["p_yes"].to_numpy())
    one = served.predict_rows([held.select(model.features).row(5, named=True)]).frame
    assert one is not None and one["p_yes"][0] == stored["p_yes"][5]


def test_a_calibrated_model_ships_as_it_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_evaluate_phase import Place

    place = Place(tmp_path, monkeypatch)
    place.prepare("binary", family="linear", n=3000, seeds=1)
    folder = place.judge()
    assert not (folder / "model").exists() and not (folder / "validation.parquet").exists()


def test_widths_that_follow_the_prediction_are_chosen_where_outcomes_are_wilder_for_large_ones_and_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dataclasses import replace

    from test_evaluate_phase import Place, indexed

    from pipeline.core.store import read_frame
    from pipeline.deploy.predict import Predictor
    from pipeline.deploy.schema import make_schema
    from pipeline.evaluate.holdout import open_holdout
    from pipeline.evaluate.threshold import choose_threshold
    from pipeline.train.models import load_model

    place = Place(tmp_path, monkeypatch)
    place.prepare("regression", n=3000, seeds=1)
    trained = tmp_path / "outputs/tiny/main/04_train"
    model, contract = load_model(trained / "model"), json.loads((trained.parent / "02_data/contract.json").read_text())
    frame = read_frame(trained.parent / "02_data/train.parquet")
    p = model.predict(frame)
    rng = np.random.default_rng(5)
    y = p + rng.normal(0, np.exp(p - p.mean()) / 8)                        # outcomes that are wilder for large predictions
    low, high = model.intervals(p).T
    stored = frame.select("__row").with_columns(fold=np.arange(len(y)) % 3, y=y, prediction=p, low=low, high=high)
    assert len(indexed(frame, contract)) == len(y)

    class Loaded:
        "The run, with these validation rows."

        def __init__(self, run: Any) -> None:
            self.run = run

        def load(self, name: str) -> Any:
            return stored if name == "train/validation" else self.run.load(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.run, name)

    opened = place.open("05_evaluate", "main")
    shown = repair_model(Loaded(opened))._repr_html_()                     # type: ignore[arg-type]
    assert "follow the size of the prediction" in shown
    choose_threshold(opened)
    holdout = open_holdout(opened)
    check_calibration(opened, holdout)
    told = holdout.predictions
    width = (told["high"] - told["low"]).to_numpy()
    assert width.max() > 2 * width.min()
    served = Predictor(holdout.model, make_schema(contract, frame)).predict(holdout.frame)
    assert all(np.allclose(served[c].to_numpy(), told[c].to_numpy(), rtol=0, atol=1e-9) for c in ("prediction", "low", "high"))
    plain = replace(model, about={k: v for k, v in model.about.items() if k != "widths"})
    assert np.ptp(np.diff(plain.intervals(p))) < 1e-9
