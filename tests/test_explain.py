"Explanations that hold: contributions add up for every family, a planted rule is recovered, idle columns are flagged, one row is followed to the served answer."
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deploy_world as world
import numpy as np
import polars as pl
import pytest

from pipeline.cli.main import main
from pipeline.core import audit
from pipeline.core.errors import InputError, IntegrityError
from pipeline.deploy.handler import Service
from pipeline.deploy.package import load_package, package_of
from pipeline.deploy.predict import Predictor
from pipeline.deploy.schema import make_schema
from pipeline.deploy.trace import Step, Trace, row_of, trace_row
from pipeline.evaluate.explain import explain_row, global_contributions, rank_agreement, sampled_contributions
from pipeline.evaluate.removal import mean_over_blocks, removable, sides, without_each
from pipeline.train.features import learn_encoder
from pipeline.train.models import Model, shape_of, train_model
from pipeline.train.protocol import Fitting
from pipeline.train.repairs import fit_repair

SEVERAL = {"members": [{"family": "trees", "config": {"rounds": 12}, "weight": 0.6}, {"family": "linear", "config": {}, "weight": 0.4}]}
QUICK: dict[str, dict[str, Any]] = {"linear": {}, "text": {}, "trees": {"rounds": 20}, "portfolio": {"rounds": 20, "categories": "target"}, "additive": {"rounds": 20},
                                    "nets": {"epochs": 6, "hidden": 16, "batch": 64}, "ensemble": SEVERAL}
TASKS = ("binary", "multiclass", "regression")
KINDS = {"hour": ("number", "Float64"), "wind": ("number", "Float64"), "carrier": ("category", "String"), "rain": ("bool", "Boolean"), "note": ("text", "String")}


def table(task: str, n: int = 400, seed: int = 3) -> tuple[pl.DataFrame, np.ndarray, dict[str, Any]]:
    rng = np.random.default_rng(seed)
    hour, wind, carrier = rng.uniform(5, 23, n), rng.gamma(2, 5, n), rng.choice(["UA", "B6", "日航"], n)
    frame = pl.DataFrame({"hour": hour, "wind": [None if i % 13 == 0 else float(w) for i, w in enumerate(wind)], "carrier": carrier, "rain": rng.random(n) < 0.2,
                          "note": rng.choice(["crew late again", "all well today", "late crew and rain"], n)})
    score = 0.3 * (hour - 14) + (carrier == "B6") + 0.5 * frame["rain"].to_numpy()
    classes = {"binary": ["no", "yes"], "multiclass": ["x", "y", "z"], "regression": []}[task]
    target = {"binary": (score + rng.logistic(0, 0.5, n) > 0).astype(int), "multiclass": np.digitize(score, [-1.0, 1.0]), "regression": 50 + 10 * score}[task]
    columns = [{"name": c, "type": t, "dtype": d, "nullable": True, "min": None, "max": None, "levels": None, "n_levels": None, "role": "feature", "known_at": None, "pii": False, "why": ""}
               for c, (t, d) in KINDS.items()]
    return frame, target, {"target": "late", "task": task, "classes": classes, "features": list(KINDS), "columns": columns}


def make(family: str, task: str, **about: Any) -> tuple[Model, pl.DataFrame, dict[str, Any]]:
    frame, target, contract = table(task)
    return train_model(family, frame, target, contract, Fitting(QUICK[family], seed=5), about=about), frame, contract


# -- contributions

@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", QUICK)
def test_contributions_add_up_for_every_family(family: str, task: str) -> None:
    model, frame, contract = make(family, task)
    found = global_contributions(model, frame.head(60), frame.tail(8))
    assert found is not None and found[1] <= 1e-6
    told = explain_row(model, frame[5:6], contract, frame.tail(8))
    assert told["contribution"][:-1].null_count() == 0 and told["column"].to_list()[-1] == "answer"
    assert told["contribution"][:-1].sum() == pytest.approx(told["score_so_far"][-1], abs=1e-6)


@pytest.mark.parametrize("family", ["trees", "linear", "nets", "ensemble"])
def test_a_planted_rule_is_recovered(family: str) -> None:
    rng = np.random.default_rng(1)
    frame = pl.DataFrame({c: rng.normal(size=3000) for c in "abcdef"})
    y = (2 * frame["b"].to_numpy() - 1.2 * frame["e"].to_numpy() + rng.logistic(0, 0.4, 3000) > 0).astype(int)
    contract = {"target": "y", "task": "binary", "classes": ["0", "1"], "features": list("abcdef"), "columns": [{"name": c, "type": "number"} for c in "abcdef"]}
    model = train_model(family, frame, y, contract, Fitting(QUICK[family] | ({"epochs": 20} if family == "nets" else {}), seed=2))
    found = global_contributions(model, frame.head(150), frame.tail(8))
    assert found is not None and found[0]["column"].head(2).to_list() == ["b", "e"] and found[0]["share"].head(2).sum() > 0.7


def test_sampled_contributions_are_shapley_values_where_these_are_known() -> None:
    model, frame, _ = make("linear", "binary")
    plain, reference = frame.with_columns(wind=pl.col("wind").fill_null(9.0)), frame.tail(1).with_columns(wind=pl.lit(9.0))
    sampled = sampled_contributions(model, plain.head(40), reference, np.random.default_rng(1), turns=2)
    exact = model.contributions(plain.head(40)) - model.contributions(reference)      # additive: the order does not matter
    assert np.allclose(sampled[:, :-1], exact[:, :-1], atol=1e-9)


def test_explanations_are_alike_over_seeds_and_their_agreement_is_a_rank_correlation() -> None:
    frame, target, contract = table("binary", 1500)
    sizes = [global_contributions(train_model("trees", frame, target, contract, Fitting({"rounds": 40, "bagging_fraction": 0.7, "bagging_freq": 1}, seed=s)), frame.head(500)) for s in range(3)]
    stored = pl.DataFrame({"column": list(KINDS)})
    for k, found in enumerate(sizes):
        assert found is not None
        stored = stored.join(found[0].select("column", pl.col("mean_size").alias(f"s{k}")), on="column", maintain_order="left")
    agreed = rank_agreement(stored)
    assert agreed is not None and agreed.value > 0.8
    from scipy.stats import spearmanr

    two = pl.DataFrame({"column": list("abcde"), "s0": [5.0, 4, 3, 2, 2], "s1": [1.0, 4, 3, 5, 2]})
    by_hand = rank_agreement(two)
    assert by_hand is not None and by_hand.value == pytest.approx(spearmanr(two["s0"], two["s1"]).statistic)
    assert rank_agreement(two.drop("s1")) is None and rank_agreement(two.head(2)) is None


# -- removal

@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(2))
def test_at_least_four_of_five_planted_noise_columns_are_flagged_and_can_go(task: str, seed: int) -> None:
    rng, n = np.random.default_rng(seed), 9000
    columns: dict[str, Any] = {"a": rng.normal(size=n), "b": rng.normal(size=n), "c": rng.choice(list("uvwxyz"), n), "d": rng.normal(size=n)}
    columns |= {f"noise{i}": rng.normal(size=n) for i in range(3)} | {"noise3": rng.choice([f"l{k}" for k in range(30)], n), "noise4": rng.integers(0, 5, n).astype(float)}
    score = columns["a"] + 0.5 * columns["b"] * columns["a"] + 0.7 * (columns["c"] == "u") + 0.3 * columns["d"]
    y = {"binary": lambda: (rng.random(n) < 1 / (1 + np.exp(-score))).astype(int), "multiclass": lambda: np.digitize(score + rng.logistic(0, 1, n), [-0.8, 0.8]),
         "regression": lambda: score + rng.normal(size=n)}[task]()
    frame = pl.DataFrame(columns).with_columns(__row=pl.int_range(n), __fold=pl.Series(np.arange(n) % 3))
    classes = {"binary": 2, "multiclass": 3, "regression": 0}[task]
    contract = {"target": "y", "task": task, "classes": [str(k) for k in range(classes)], "features": list(columns),
                "columns": [{"name": c, "type": "category" if frame[c].dtype == pl.String else "number"} for c in columns]}
    encoder = learn_encoder(frame, contract)
    shape = shape_of(contract, encoder)
    parts = sides(frame, y, classes, {"folds": 3, "ordered": False}, encoder, None, rng)
    found, base = without_each(shape, encoder.owners, encoder.columns, parts)
    idle = found.filter("idle")["column"].to_list()
    assert sum(c.startswith("noise") for c in idle) >= 4 and {"a", "b"} & set(idle) == set()
    going, rise, spare = removable(shape, encoder.owners, encoder.columns, parts, base, idle)
    assert sum(c.startswith("noise") for c in going) >= 4 and not {"a", "b", "c"} & set(going) and rise is not None and rise.high <= spare


def test_the_mean_over_blocks_covers() -> None:
    rng, held = np.random.default_rng(9), 0
    for _ in range(300):
        day = np.repeat(np.arange(20), 15)
        value = rng.normal(0.2, 1, 20)[day] + rng.normal(0, 1, 300)
        found = mean_over_blocks([value], [day])
        held += bool(found.low <= 0.2 <= found.high)
    assert 0.91 <= held / 300 <= 0.985


# -- one row

@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", QUICK)
def test_a_row_is_followed_to_the_served_answer(family: str, task: str) -> None:
    model, frame, contract = make(family, task, **({"residual": 9.0} if task == "regression" else {}))
    predictor = Predictor(model, make_schema(contract), 0.3 if task == "binary" else None, "lesson", 2)
    for i in (0, 7, 13, 26):
        trace = trace_row(predictor, frame.row(i, named=True))
        assert trace.equal, (trace.answer, trace.served)
        value = {(s.stage, s.what): s.value for s in trace.steps}
        sent = {s.what: s.value for s in trace.steps if s.stage == "sent"}
        assert sent == frame.row(i, named=True)
        coded = [np.nan if s.value is None else s.value for s in trace.steps if s.stage == "coded"]
        assert np.array_equal(coded, model.encode(frame[i:i + 1])[0], equal_nan=True)
        inside = [s for s in trace.steps if s.stage == "inside"]
        assert inside, family
        if family in ("trees", "additive"):
            score = next(s.value for s in trace.steps if s.stage == "score" and s.what.startswith("score"))
            assert value["inside", "sum over trees"] == pytest.approx(score, abs=1e-9)
        if family == "linear":
            assert sum(s.value for s in inside) == pytest.approx(next(s.value for s in trace.steps if s.stage == "score" and s.what.startswith("score")), abs=1e-9)
        assert "equal to the served answer" in trace.to_text() and json.loads(json.dumps(trace.to_dict(), allow_nan=True))["equal"]


def test_a_repaired_model_shows_both_probabilities() -> None:
    frame, target, contract = table("binary")
    model = train_model("trees", frame, target, contract, Fitting({"rounds": 20}))
    repair = fit_repair("temperature", target, np.clip(model.predict(frame) ** 3, 1e-6, 1) / (model.predict(frame) ** 3).sum(1, keepdims=True))
    mended = train_model("trees", frame, target, contract, Fitting({"rounds": 20}), about={"repair": repair})
    trace = trace_row(Predictor(mended, make_schema(contract), 0.4), frame.row(3, named=True))
    value = {(s.stage, s.what): s.value for s in trace.steps}
    assert trace.equal and value["probability", "p yes"] != value["probability", "p yes, repaired"] == trace.answer["p"]["yes"]


def test_another_answer_is_told() -> None:
    model, frame, contract = make("trees", "binary")
    trace = trace_row(Predictor(model, make_schema(contract), 0.4), frame.row(3, named=True))
    other = Trace(trace.model, trace.family, trace.steps, trace.answer, trace.served | {"prediction": "nobody"})
    assert not other.equal and "NOT equal" in other.to_text()
    assert Step("sent", "hour", 1.0) in (Step("sent", "hour", 1.0), *trace.steps)
    with pytest.raises(InputError, match="hour is not a number"):
        trace_row(Predictor(model, make_schema(contract), 0.4), frame.row(3, named=True) | {"hour": "noon"})


def test_personal_columns_are_shown_to_those_alone_who_may_read_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.deploy.package import KEY, Contents, release

    roles = {"viewer": ["report"], "engineer": ["report", "data", "run"], "officer": ["report", "data", "personal"]}
    (tmp_path / "settings.ini").write_text("")
    (tmp_path / "params").mkdir()
    (tmp_path / "params/tiny.yml").write_text(world.problem_text("tiny", "binary", comply={"pii": ["carrier"], "roles": roles}))
    frame, agreed = world.rows("binary", 400), world.contract("binary")
    told = agreed | {"columns": [c | {"pii": c["name"] == "carrier"} for c in agreed["columns"]]}
    target = (frame["late"] == "true").to_numpy().astype(int)
    model = train_model("linear", frame, target, told)
    run = tmp_path / "outputs/tiny/main"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text("{}")
    contents, store = Contents(told, make_schema(told, frame).to_dict(), {"threshold": 0.4}, [], {}, "# tiny\n", {}), tmp_path / "outputs/store"
    folder = release(store, tmp_path / "work", "tiny", model.save(tmp_path / "model"), contents)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.deploy.package.package_of", lambda asked: (folder, audit.public_key(store, KEY)))
    row = json.dumps({"hour": 21.5, "seats": 120, "carrier": "日航", "built": "2009-03-15", "rain": True})

    def ask(role: str, code: int) -> tuple[dict[str, set[Any]], str]:
        capsys.readouterr()
        assert main(["explain-row", "tiny", row, "--json", *(["--role", role] if role else [])]) == code
        said = capsys.readouterr()
        steps = json.loads(said.out)["steps"] if code == 0 else []
        return {stage: {s["value"] for s in steps if s["stage"] == stage and s["what"].startswith("carrier")} for stage in {s["stage"] for s in steps}}, said.out + said.err

    for role in ("", "engineer"):
        steps, text = ask(role, 0)
        assert "日航" not in text and "\\u65e5" not in text
        assert [steps[stage] for stage in ("sent", "coded", "inside", "contribution")] == [{"withheld"}] * 4
    steps, text = ask("officer", 0)
    assert steps["sent"] == {"日航"} and "withheld" not in text
    assert "role 'viewer' may not read rows and labels; ask engineer or officer" in ask("viewer", 3)[1]
    assert "did you mean 'engineer'" in ask("enginer", 2)[1]
    trail = [(e["event"], e["details"].get("role"), e["details"].get("personal")) for e in audit.entries(tmp_path / "outputs/store")]
    assert trail == [("row.explained", "", False), ("row.explained", "engineer", False), ("row.explained", "officer", True), ("access.refused", "viewer", None)]


def test_the_verb_follows_a_row_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = world.build(tmp_path, n=900)
    names = world.execute("06_deploy", tmp_path)
    assert names["error"] is None
    monkeypatch.chdir(tmp_path)
    held = pl.read_parquet(run / "02_data/holdout.parquet")
    asked = int(held["__row"][11])
    capsys.readouterr()
    assert main(["explain-row", "tiny", str(asked), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["equal"] and told["from"] == "data/holdout" and told["answer"] == told["served"]
    measured = pl.read_parquet(run / "05_evaluate/predictions.parquet").filter(pl.col("__row") == asked)
    assert told["answer"]["p"]["true"] == pytest.approx(measured["p_true"][0], abs=1e-12)
    folder, key = package_of(run)
    row = {k: v.isoformat() if hasattr(v, "isoformat") else v for k, v in held.row(11, named=True).items() if k in ("hour", "seats", "carrier", "built", "rain")}
    status, _, body = Service(load_package(folder, key), log=None).handle("POST", "/predict", {}, json.dumps({"rows": [row]}).encode())
    assert status == 200 and json.loads(body)["predictions"][0] == told["served"]
    assert main(["explain-row", "tiny", json.dumps(row)]) == 0
    page = capsys.readouterr().out
    assert "from the command line" in page and "equal to the served answer, bit by bit" in page and "sum over trees" in page
    entries = [e for e in audit.entries(tmp_path / "outputs/store") if e["event"] == "row.explained"]
    assert [e["details"]["row"] for e in entries] == [str(asked), "given"]
    assert [(e["details"]["role"], e["details"]["personal"]) for e in entries] == [("", False)] * 2
    looks = [e["details"]["reason"] for e in audit.entries(tmp_path / "outputs/store") if e["event"] == "sealed.replayed"]
    assert f"row {asked} is explained; decides nothing" in looks, "a sealed row is read only with an entry in the trail"
    assert main(["explain-row", "tiny", "999999"]) == 2 and main(["explain-row", "tiny", "[1]"]) == 2 and main(["explain-row", "tniy", "1"]) == 2
    said = capsys.readouterr().err
    assert "has no row 999999" in said and "no row number" in said
    with pytest.raises(InputError, match="no row 5000000"):
        row_of(run, "5000000")
    model = folder / "model/model.txt"
    model.chmod(0o644)
    model.write_text(model.read_text().replace("threshold=1", "threshold=2", 1))
    with pytest.raises(IntegrityError):
        package_of(run)
    assert main(["explain-row", "tiny", str(asked)]) == 3
