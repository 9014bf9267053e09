"Every family keeps the same contract: it learns, it is read back, it minds weights, and it never answers with what is no number."
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from pipeline.core.errors import InputError, IntegrityError
from pipeline.train import trees
from pipeline.train.fast import prepare
from pipeline.train.features import Coded, Encoder, learn_encoder
from pipeline.train.models import load_model, retrain, train_model
from pipeline.train.protocol import FAMILIES, Fitting, OutOfTime, Shape, fit, from_files

TASKS = ("binary", "multiclass", "regression")
SEVERAL = {"members": [{"family": "trees", "config": {"rounds": 15}, "weight": 0.6}, {"family": "linear", "config": {}, "weight": 0.4}]}
QUICK: dict[str, dict[str, Any]] = {
    "trees": {"rounds": 15}, "additive": {"rounds": 15}, "student": {"rounds": 15}, "portfolio": {"rounds": 15, "num_leaves": 15},
    "nets": {"epochs": 8}, "ensemble": SEVERAL,
}
HEART: dict[str, dict[str, Any]] = {   # what lets a family learn ten rows by heart
    "linear": {"strength": 1e-4, "iterations": 500}, "text": {"strength": 1e-4, "iterations": 500}, "backbone": {"strength": 1e-4, "iterations": 500},
    "trees": {"rounds": 150}, "additive": {"rounds": 300}, "portfolio": {"rounds": 150}, "student": {"rounds": 150},
    "nets": {"epochs": 150, "dropout": 0.0, "rate": 0.01, "batch": 10},
    "ensemble": {"members": [{"family": "trees", "config": {"rounds": 150}, "weight": 0.5}, {"family": "linear", "config": {"strength": 1e-4}, "weight": 0.5}]},
}
NOTES = {0: ["all fine", "as agreed", "no remarks"], 1: ["came late", "late again", "waited long"]}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    "A folder with a language model of one layer that knows nothing."
    pytest.importorskip("transformers", reason="the extra [backbone] is not installed")
    from pipeline.train.backbone import make_tiny_backbone

    return str(make_tiny_backbone(tmp_path_factory.mktemp("backbone") / "tiny", " ".join(sum(NOTES.values(), [])).split()))


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def quick(family: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"folder": request.getfixturevalue("backbone")} if family == "backbone" else QUICK.get(family, {})


def table(task: str, n: int = 160) -> tuple[pl.DataFrame, np.ndarray, dict[str, Any]]:
    "Numbers with gaps, a category and a text that tells."
    random = np.random.default_rng(4)
    size, kind = random.normal(size=n), random.integers(0, 3, n)
    frame = pl.DataFrame({"size": [None if i % 13 == 5 else float(v) for i, v in enumerate(size)], "kind": [["a", "b", "日本"][k] for k in kind],
                          "note": [None if i % 17 == 2 else str(random.choice(NOTES[int(s > 0)])) for i, s in enumerate(size)]})
    score = size + (kind == 1)
    target = {"binary": (score > 0.3).astype(int), "multiclass": np.digitize(score, [0.0, 1.0]), "regression": 20 + 5 * score}[task]
    classes = {"binary": ["no", "yes"], "multiclass": ["x", "y", "z"], "regression": []}[task]
    columns = [{"name": "size", "type": "number"}, {"name": "kind", "type": "category"}, {"name": "note", "type": "text"}]
    return frame, target, {"target": "late", "task": task, "classes": classes, "features": frame.columns, "columns": columns}


def encoded(task: str, n: int = 160) -> tuple[Encoder, Shape, np.ndarray, np.ndarray]:
    frame, target, contract = table(task, n)
    encoder = learn_encoder(frame, contract)
    return encoder, Shape(task, len(contract["classes"]), tuple(encoder.sizes), encoder.texts), encoder.encode(frame), target


def loss(shape: Shape, answer: np.ndarray, target: np.ndarray) -> float:
    if not shape.classes:
        return float(np.mean((answer - target) ** 2) / np.var(target))
    return float(-np.log(np.clip(answer[np.arange(len(target)), target], 1e-15, 1)).mean())


@pytest.mark.parametrize("task", TASKS)
def test_a_saved_model_answers_the_same_for_a_frame_and_for_one_row(family: str, quick: dict[str, Any], task: str, tmp_path: Path) -> None:
    frame, target, contract = table(task)
    model = train_model(family, frame, target, contract, Fitting(quick, 7))
    loaded = load_model(model.save(tmp_path / "model"))
    answer = loaded.predict(frame)
    assert np.array_equal(answer, model.predict(frame)) and np.isfinite(answer).all()
    assert answer.shape == ((len(target), len(model.classes)) if model.classes else (len(target),))
    for i in (0, 2, 5, 30):
        alone = loaded.predict_row(frame.row(i, named=True))
        assert np.array_equal(alone, np.atleast_1d(answer[i])) if loaded.row_wise else np.allclose(alone, np.atleast_1d(answer[i]), atol=1e-6)
    assert loaded.predict(frame.head(0)).shape[0] == 0
    parts = loaded.contributions(frame)
    if parts is not None:
        assert parts.shape[-1] == len(contract["features"]) + 1 and np.allclose(parts.sum(axis=-1), loaded.score(frame), atol=1e-6)
    again = retrain(loaded, frame.head(100), target[:100])
    assert again.family == family and np.isfinite(again.predict(frame)).all()


@pytest.mark.parametrize("task", TASKS)
def test_a_weighed_net_gives_the_same_bits_ready_or_not_alone_or_among_many(task: str) -> None:
    _, shape, matrix, target = encoded(task)
    members = [{"family": "nets", "config": {"epochs": 3}, "weight": 0.5}, {"family": "linear", "config": {}, "weight": 0.25},
               {"family": "portfolio", "config": {"rounds": 9, "num_leaves": 6, "categories": "both"}, "weight": 0.25}]
    model = fit("ensemble", shape, matrix, target, Fitting({"members": members}, 2))
    odd = np.asarray(matrix).copy()
    odd[0], odd[1], odd[2] = np.nan, 1e300, -1e300
    wanted = model.predict(odd)
    alone = np.concatenate([model.predict(odd[i:i + 1]) for i in range(12)])
    prepare(model)
    assert np.array_equal(wanted[:12], alone) and np.array_equal(model.predict(odd), wanted)
    assert np.array_equal(np.concatenate([model.predict(odd[i:i + 1]) for i in range(len(odd))]), wanted)


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_files(family: str, quick: dict[str, Any], task: str) -> None:
    _, shape, matrix, target = encoded(task)
    one, two = (fit(family, shape, matrix, target, Fitting(quick, 3)).to_files() for _ in range(2))
    assert one == two


@pytest.mark.parametrize("task", TASKS)
def test_ten_rows_are_learned_by_heart(family: str, quick: dict[str, Any], task: str) -> None:
    if family == "dummy":
        pytest.skip("the dummy learns nothing, that is its purpose")
    random = np.random.default_rng(1)
    shape, matrix = Shape(task, {"binary": 2, "multiclass": 3, "regression": 0}[task], (0,) * 12, ((6, 12),)), random.normal(size=(10, 12))
    rows = Coded.of(matrix, np.array([[f"only {word} word"] for word in "abcdefghij"], object))
    target = {"binary": np.array([0, 1] * 5), "multiclass": np.arange(10) % 3, "regression": random.normal(size=10)}[task]
    config = quick | HEART[family] | ({"strength": 1e-4} if task == "regression" and family in ("linear", "text", "backbone") else {})
    model = fit(family, shape, rows, target, Fitting(config, 1))
    constant = fit("dummy", shape, rows, target, Fitting())
    assert loss(shape, model.predict(rows), target) < 0.1 * loss(shape, constant.predict(rows), target)


def test_one_step_goes_down_the_gradient() -> None:
    random = np.random.default_rng(0)
    matrix, shape = random.normal(size=(64, 3)), Shape("binary", 2, (0, 0, 0))
    target = (matrix[:, 0] > 0).astype(int)
    none, one = (fit("nets", shape, matrix, target, Fitting({"epochs": 1, "batch": 64, "rate": rate, "dropout": 0.0}, 1)) for rate in (1e-12, 1e-2))
    assert loss(shape, one.predict(matrix), target) < loss(shape, none.predict(matrix), target)
    few, more = (fit("trees", shape, matrix, target, Fitting({"rounds": rounds}, 1)) for rounds in (1, 2))
    assert loss(shape, more.predict(matrix), target) < loss(shape, few.predict(matrix), target)


@pytest.mark.parametrize("task", TASKS)
def test_rows_at_the_edge_are_answered(family: str, quick: dict[str, Any], task: str) -> None:
    encoder, shape, matrix, target = encoded(task)
    model = from_files(family, shape, fit(family, shape, matrix, target, Fitting(quick, 3)).to_files())
    strange = [{"size": None, "kind": None, "note": None}, {"size": 1e300, "kind": "never seen", "note": "ž" * 50_000}, {"size": -1e300, "kind": "a", "note": ""}]
    answer = model.predict(encoder.encode_rows(strange))
    assert np.isfinite(answer).all()
    if shape.classes:
        assert np.allclose(answer.sum(axis=1), 1) and (answer >= 0).all()


@pytest.mark.parametrize("task", TASKS)
def test_one_class_one_row_and_no_information_do_not_break_it(family: str, quick: dict[str, Any], task: str) -> None:
    _, shape, matrix, target = encoded(task)
    for rows, outcome in ((matrix[:40], np.repeat(target[:1], 40)), (matrix[:1], target[:1])):
        answer = fit(family, shape, rows, outcome, Fitting(quick, 3)).predict(matrix[:5])
        assert np.isfinite(answer).all()
        if family != "ensemble":   # its members' answers are blended, each of them as sure as it may be
            assert (answer[:, int(outcome[0])] > 0.4).all() if shape.classes else np.allclose(answer, outcome[0], rtol=0.2)


def test_weights_count(family: str, quick: dict[str, Any]) -> None:
    "Half of the rows say the opposite of the others; those that count decide."
    random = np.random.default_rng(2)
    matrix = random.normal(size=(600, 8))
    rows = Coded.of(matrix, np.array([[("good day" if v > 0 else "bad day")] for v in matrix[:, 0]], object))
    shape, right = Shape("binary", 2, (0,) * 8, ((2, 8),)), (matrix[:, 0] > 0).astype(int)
    turned = random.random(600) < 0.5
    target = np.where(turned, 1 - right, right)
    for counting in (~turned, turned):
        weights = np.where(counting, 1.0, 0.01)
        p = fit(family, shape, rows, target, Fitting(quick, 3, weights=weights)).predict(rows)[:, 1]
        if family == "dummy":
            assert abs(p[0] - np.average(target, weights=weights)) < 0.01
        else:
            assert ((p > 0.5) == target)[counting].mean() > 0.9


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused_by_name(family: str, quick: dict[str, Any], bad: float) -> None:
    frame, target, contract = table("regression")
    spoilt = target.copy()
    spoilt[17] = bad
    with pytest.raises(InputError, match="column 'late': 1 outcomes are NaN or infinite, first in row 17"):
        train_model(family, frame, spoilt, contract, Fitting(quick))
    if np.isinf(bad):
        with pytest.raises(InputError, match="column 'size' holds an infinite number"):
            train_model(family, frame.with_columns(size=pl.lit(bad)), target, contract, Fitting(quick))


def test_a_spoilt_weight_of_a_net_names_its_layer_and_never_reaches_a_client() -> None:
    from safetensors.numpy import load, save

    _, shape, matrix, target = encoded("binary")
    files = fit("nets", shape, matrix, target, Fitting({"epochs": 2})).to_files()
    weights = load(files["weights.safetensors"])
    name = next(name for name in sorted(weights) if "layer" in name or "weight" in name)
    weights[name] = weights[name].copy()
    weights[name].flat[0] = np.nan
    with pytest.raises(InputError, match=name):
        from_files("nets", shape, files | {"weights.safetensors": save(weights)}).predict(matrix)


@pytest.mark.parametrize(("named", "file", "part"), [("linear", "coefficients.json", "mean"), ("linear", "coefficients.json", "coefficients"), ("nets", "net.json", "scale")])
def test_a_stored_number_that_is_none_names_its_part(named: str, file: str, part: str) -> None:
    "An infinite mean would otherwise silently take the column out of the sum."
    _, shape, matrix, target = encoded("binary")
    files = fit(named, shape, matrix, target, Fitting({"epochs": 1} if named == "nets" else {})).to_files()
    content = json.loads(files[file])
    content[part][0] = [float("inf")] if isinstance(content[part][0], list) else float("inf")
    with pytest.raises(InputError, match=f"{part} of the .* holds 1 numbers that are not finite"):
        from_files(named, shape, files | {file: json.dumps(content).encode()})


@pytest.mark.parametrize(("field", "number"), [("threshold", "nan"), ("threshold", "-inf"), ("leaf_value", "nan"), ("leaf_value", "inf"), ("leaf_value", "1e999")])
def test_a_spoilt_number_of_a_tree_names_tree_and_field(field: str, number: str) -> None:
    "Of the same length, so that the sizes fit: LightGBM loads it and sends every row the same way."
    _, shape, matrix, target = encoded("binary")
    text = fit("trees", shape, matrix, target, Fitting({"rounds": 4})).to_files()["model.txt"].decode()
    before, behind, rest = re.split(rf"(?<=\nTree=2\n)(.*?\n{field}=)", text, maxsplit=1, flags=re.DOTALL)
    old = rest.split(maxsplit=1)[0]
    spoilt = before + behind + number.rjust(len(old)) + rest[len(old):]
    assert len(spoilt) == len(text)
    with pytest.raises(IntegrityError, match=f"{field} of tree 2 in model.txt holds 1 numbers that are not finite"):
        from_files("trees", shape, {"model.txt": spoilt.encode()})


def test_row_weights_that_are_no_numbers_are_refused(family: str, quick: dict[str, Any]) -> None:
    frame, target, contract = table("binary")
    weights = np.ones(len(target))
    weights[2] = np.nan
    with pytest.raises(InputError, match="finite numbers from 0 up"):
        train_model(family, frame, target, contract, Fitting(quick, weights=weights))


def test_a_net_that_flies_off_stops_and_names_where() -> None:
    _, shape, matrix, target = encoded("regression")
    with pytest.raises(InputError, match="layer|loss"):
        fit("nets", shape, matrix, target, Fitting({"epochs": 20, "rate": 1e30}))


def test_a_family_that_reads_texts_refuses_a_table_without() -> None:
    for name in ("text", "backbone"):
        with pytest.raises(InputError, match="no column is of type text"):
            fit(name, Shape("binary", 2, (0,)), np.zeros((4, 1)), np.array([0, 1, 0, 1]), Fitting())


def test_without_a_folder_there_is_no_backbone_and_no_download(tmp_path: Path) -> None:
    _, shape, matrix, target = encoded("binary")
    for folder in (None, str(tmp_path / "nowhere"), str(tmp_path), "sentence-transformers/all-MiniLM-L6-v2"):
        with pytest.raises(InputError, match="nothing is downloaded"):
            fit("backbone", shape, matrix, target, Fitting({"folder": folder}))


def test_the_clock_stops_every_slow_family(family: str, quick: dict[str, Any]) -> None:
    if family in ("dummy",):
        pytest.skip("it takes no time")
    _, shape, matrix, target = encoded("binary")
    with pytest.raises(OutOfTime):
        fit(family, shape, matrix, target, Fitting(quick, late=lambda: True))


def test_one_thread_or_two_is_declared(family: str, quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    "Trees, terms and constants are equal; what a matrix product touches may differ by rounding, at most 1e-6 in an answer."
    monkeypatch.setattr(trees, "FEW_CELLS", 0)   # otherwise so small a matrix has one thread anyway
    _, shape, matrix, target = encoded("binary")
    one, two = (fit(family, shape, matrix, target, Fitting(quick, 3, threads)).predict(matrix) for threads in (1, 2))
    assert np.array_equal(one, two) if family in ("dummy", "trees", "portfolio", "additive") else np.abs(one - two).max() <= 1e-6
