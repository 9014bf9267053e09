"Several targets of one problem: from the problem file through training to the sealed rows."
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from player import play

from pipeline.core.errors import InputError
from pipeline.core.run import function_named, open_run, read_claims
from pipeline.core.store import read_frame
from pipeline.train.protocol import Fitting
from pipeline.train.targets import Asked, Several, asked_of, compare_ways, fit_each, fit_forest, load_several

PHASES = Path(__file__).parents[1] / "nbs/phases"
PROBLEM = """\
problem:
  name: clinic
  statement: Will the patient come back, how long does he stay, and on which ward?
  kpi: {{name: beds planned, baseline: 0, target: 1, unit: '%'}}
  task: binary
  target: returns
  positive: 'yes'
  further_targets: [days, ward]
data: {{sources: [{{name: t, kind: csv, path: t.csv}}]}}
train: {{budget_s: {budget}, seeds: 1, families: [dummy, linear, trees]}}
evaluate: {{bootstrap: 100}}
"""


def patients(n: int, seed: int = 1, shared: bool = True) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    age, pulse, kind = rng.normal(size=n), rng.normal(size=n), rng.choice(["a", "b", "c"], n)
    cause = age + (kind == "b") + 0.3 * pulse
    other = cause if shared else rng.normal(size=n)
    days = np.round(5 + 2 * other + rng.normal(0, 0.8, n), 2)
    return pl.DataFrame({
        "age": age, "pulse": pulse, "kind": kind, "days": [None if i % 9 == 0 else float(d) for i, d in enumerate(days)],
        "ward": np.array(["east", "north", "west"])[np.digitize(cause + rng.normal(0, 0.8, n), [-0.4, 1.0])],
        "returns": np.where(rng.random(n) < 1 / (1 + np.exp(-2 * cause)), "yes", "no"),
    })


@pytest.fixture
def clinic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "settings.ini").write_text("[engine]\nthreads = 1\n")
    (tmp_path / "clinic.yml").write_text(PROBLEM.format(budget=8))
    patients(1500).write_csv(tmp_path / "t.csv")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PILOTHOUSE_ENGINE", "test")
    return tmp_path


def phase(name: str) -> dict[str, Any]:
    from pipeline.core.run import commit_phase

    names = play(PHASES / f"{name}.ipynb", problem="clinic.yml", run="outputs/clinic/main")
    commit_phase(names["run"].folder, name)
    return names


def test_a_problem_with_three_targets_is_trained_both_ways_and_measured_on_the_sealed_rows(clinic: Path, drafts: None) -> None:
    for name in ("01_scope", "02_data", "04_train", "05_evaluate"):
        phase(name)
    run = clinic / "outputs/clinic/main"
    contract = json.loads((run / "02_data/contract.json").read_text())
    assert {"days", "ward", "returns"}.isdisjoint(contract["features"])
    board = read_frame(run / "04_train/targets.parquet")
    assert board["target"].to_list() == ["returns", "days", "ward"] and not board["shared"].is_null().any() and not board["separate"].is_null().any()
    costs = read_frame(run / "04_train/targets_costs.parquet")
    assert set(costs["way"]) == {"shared", "separate"} and (costs["size_mb"] > 0).all() and (costs["row_ms"] > 0).all()
    decision = next(d for d in json.loads((run / "04_train/decisions.json").read_text()) if "all targets" in d["what"])
    assert decision["chose"] in ("shared", "separate") and len(decision["options"]) == 2 and "days" in decision["options"][0]
    model = load_several(run / "04_train/targets_model")
    assert model.kind == decision["chose"] and [a.task for a in model.asked] == ["binary", "regression", "multiclass"]
    for room in ("04_train", "05_evaluate"):
        told = [c for c in read_claims(run / room) if c.name.startswith("target_")]
        assert len(told) == 3 and all(c.low is not None and c.low < c.value < (c.high or 0) for c in told)
    again = open_run("06_deploy", "clinic.yml", "outputs/clinic/main")
    for claim in told:
        found = function_named(claim.by)(*[again.load(a) for a in claim.of], **claim.using)
        assert found.value == claim.value and found.low == claim.low
    served_on_request(again, model)


def served_on_request(run: Any, model: Several) -> None:
    "The package answers all targets, and sets, to those who prefer it; others get the same bytes as ever."
    from serving_kit import in_a_table, in_tensors

    from pipeline.core import audit
    from pipeline.deploy.batch import predict_file
    from pipeline.deploy.handler import Service
    from pipeline.deploy.package import KEY
    from pipeline.deploy.packing import pack

    packed = pack(run)
    predictor = packed.predictor
    assert "targets/targets.json" in packed.manifest["files"] and predictor.further is not None and predictor.further.promise["level"] == 0.9
    service, frame = Service(predictor, log=None), run.load("data/train").select(predictor.schema.names).head(40)
    body = json.dumps({"rows": frame.to_dicts()}).encode()

    def ask(prefer: str) -> tuple[dict[str, Any], dict[str, str]]:
        status, headers, answer = service.handle("POST", "/predict", {"prefer": prefer} if prefer else {}, body)
        assert status == 200
        return json.loads(answer), dict(headers)

    plain, headers = ask("")
    assert set(plain) == {"model", "version", "request_id", "predictions"} and "preference-applied" not in headers
    told, headers = ask("targets, sets; handling=lenient")
    assert headers["preference-applied"] == "handling=lenient, sets, targets" and told["predictions"] == plain["predictions"]
    expected = model.predict(frame)
    assert [row["days"]["prediction"] for row in told["targets"]] == pytest.approx(expected["days"].tolist(), abs=1e-9)
    for row, p in zip(told["targets"], expected["ward"]):
        assert set(row) == {"days", "ward"} and list(row["ward"]["p"].values()) == pytest.approx(p.tolist(), abs=1e-9)
        assert row["ward"]["prediction"] == max(row["ward"]["p"], key=row["ward"]["p"].get)
    promise = run.load("evaluate/promise")
    assert told["sets"]["promised"] == 0.9 and told["sets"]["held"] == promise["covered"]
    for row, left in zip(told["predictions"], told["sets"]["classes"]):
        sure = max(row["p"], key=row["p"].get)
        assert left[0] == sure and set(left) == {c for c, p in row["p"].items() if 1 - p <= promise["cut"]} | {sure}
    # a table, tensors and a batch say the same, as columns
    wanted = [{"prediction": row["prediction"], **{f"p_{c}": p for c, p in row["p"].items()}, **{f"set_{c}": c in left for c in row["p"]},
               **{f"target_{name}{kind}": value for name, one in further.items() for kind, value in {"": one["prediction"], **{f"_p_{c}": p for c, p in one.get("p", {}).items()}}.items()}}
              for row, left, further in zip(told["predictions"], told["sets"]["classes"], told["targets"])]
    for columns, headers in (in_a_table(service, frame, "sets, targets"), in_tensors(service, frame, "targets, sets")):
        assert columns.to_dicts() == wanted and headers["preference-applied"] == "sets, targets"
    frame.write_parquet("in.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.deploy.package.package_of", lambda _: (packed.folder, audit.public_key(Path("outputs/store"), KEY)))
        assert predict_file("main", "in.parquet", "out.parquet", beside=["targets", "sets"]) == 40
        assert predict_file("main", "in.parquet", "parts.parquet", at_once=9, beside=["sets", "targets"]) == 40
    assert pl.read_parquet("out.parquet").to_dicts() == wanted == pl.read_parquet("parts.parquet").to_dicts()
    leaner = Service(replace(predictor, further=None), log=None).handle("POST", "/predict", {"prefer": "targets, sets"}, body)
    assert leaner[0] == 200 and "targets" not in json.loads(leaner[2]) and "preference-applied" not in dict(leaner[1])


def test_a_further_target_never_teaches() -> None:
    with pytest.raises(InputError, match="'age' of problem.further_targets has 3 values"):
        asked_of(pl.DataFrame({"age": [1.0, 2.0, 3.0]}), {"target": "y", "task": "binary", "classes": ["n", "y"], "columns": [{"name": "age", "type": "number", "role": "further"}]})


def test_rows_without_a_target_move_nothing() -> None:
    "The forest of all rows with half of them unknown is the one that the known ones decide."
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(600, 3))
    asked = [Asked("a", "regression"), Asked("b", "regression")]
    one = matrix[:, 0] + rng.normal(0, 0.1, 600)
    gap = np.where(np.arange(600) % 2, np.nan, one)
    forest = fit_forest(matrix, (0, 0, 0), asked, [one, gap], Fitting({"rounds": 60}, seed=1))
    first, second = forest.predict(matrix)
    assert np.corrcoef(second, one)[0, 1] > 0.95 and np.isfinite(second).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_the_rule_follows_the_data(reverse: bool) -> None:
    "A forest that is spoilt for one target loses; one that is not does not."
    frame = patients(2500, seed=4)
    matrix = np.column_stack([frame["age"], frame["pulse"], frame["kind"].rank("dense").to_numpy() - 1])
    asked = [Asked("returns", "binary", ("no", "yes")), Asked("days", "regression")]
    values = [a.values(frame) for a in asked]
    cut = 1700
    on, held = [v[:cut] for v in values], [v[cut:] for v in values]
    learnt = [on[0], -on[1] if reverse else on[1]]
    forest = fit_forest(matrix[:cut], (0, 0, 3), asked, learnt, Fitting({"rounds": 80}, seed=2))
    each = fit_each("trees", matrix[:cut], (0, 0, 3), asked, on, Fitting({"rounds": 40}, seed=2))
    costs = pl.DataFrame({"way": ["shared", "separate"], "size_mb": [0.1, 0.2], "row_ms": [1.0, 1.0]})
    found = compare_ways(asked, held, forest.predict(matrix[cut:]), [e.predict(matrix[cut:]) for e in each], costs)
    assert found.chose == ("separate" if reverse else "shared"), found.board


def test_equal_inputs_give_equal_files() -> None:
    frame = patients(800)
    matrix = frame.select("age", "pulse").to_numpy()
    asked = [Asked("returns", "binary", ("no", "yes")), Asked("ward", "multiclass", ("east", "north", "west"))]
    files = [fit_forest(matrix, (0, 0), asked, [a.values(frame) for a in asked], Fitting({"rounds": 15}, seed=3, threads=threads)).to_files() for threads in (1, 1, 2)]
    assert files[0] == files[1]
    assert files[0]["forest.txt"] == files[2]["forest.txt"]


def test_an_infinite_value_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="column 'a' holds an infinite value in row 1"):
        fit_forest(np.zeros((3, 1)), (0,), [Asked("a", "regression")], [np.array([0.0, np.inf, 1.0])], Fitting())
