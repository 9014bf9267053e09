"The edge file: the model as C, the same answers for every type of column, under a limit of memory, and in the gate."
from __future__ import annotations

import datetime as dt
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import deploy_world as world
import numpy as np
import polars as pl
import pytest

from pipeline.core.errors import InputError
from pipeline.core.run import open_run
from pipeline.deploy.edge import DIFFERENCE, claim_edge, compile_c, rows_as_lines, try_c, write_c
from pipeline.deploy.packing import pack
from pipeline.train.fast import read_forest
from pipeline.train.models import Model, train_model
from pipeline.train.protocol import Fitting
from pipeline.train.repairs import REPAIRS_OF_MORE, fit_repair

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is installed to try an edge file")
MEMBERS = [{"family": "trees", "config": {"rounds": 15}, "weight": 0.5}, {"family": "linear", "config": {}, "weight": 0.2},
           {"family": "portfolio", "config": {"rounds": 12, "categories": "target", "feature_fraction": 0.7}, "weight": 0.3}]


def make(task: str, family: str, config: dict[str, Any], n: int = 900) -> tuple[Model, pl.DataFrame]:
    frame, contract = world.rows(task, n), world.contract(task)
    from pipeline.data.contract import target_values

    return train_model(family, frame, target_values(frame, contract), contract, Fitting(config, 3)), frame


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
@pytest.mark.parametrize(("family", "config"), [("trees", {"rounds": 20}), ("portfolio", {"rounds": 20, "categories": "both"}), ("linear", {}), ("ensemble", {"members": MEMBERS})])
def test_the_file_answers_as_the_model(task: str, family: str, config: dict[str, Any], tmp_path: Path) -> None:
    model, frame = make(task, family, config)
    trial = try_c(model, frame, tmp_path)
    assert trial.rows == 900 and trial.largest_difference <= (1e-9 if task != "regression" else 1e-7)
    assert trial.program_mb < 1 and trial.row_ms < 5


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e10])
def test_numbers_of_any_size_are_held_to_what_their_size_allows(scale: float, tmp_path: Path) -> None:
    "Numbers of billions differ in their last bits alone; among tiny ones a file that always answers nought would not pass."
    frame = said(600, 4)
    target, contract = outcome(frame, "regression")
    model = train_model("text", frame, scale * target, contract, Fitting({}, 3))
    trial = try_c(model, frame, tmp_path)
    assert trial.largest_difference <= trial.tolerated <= 1.001e-5 * float(np.abs(model.predict(frame)).max())


@pytest.mark.parametrize("kind", ["temperature", "line", "isotonic", "venn_abers"])
def test_a_repair_of_the_calibration_goes_with_it(kind: str, tmp_path: Path) -> None:
    model, frame = make("binary", "trees", {"rounds": 20})
    p = model.predict(frame)[:, 1]
    y = (np.random.default_rng(0).random(len(p)) < p**2).astype(int)
    mended = replace(model, about=model.about | {"repair": fit_repair(kind, y, p)})
    assert np.abs(mended.predict(frame) - model.predict(frame)).max() > 0.01
    assert try_c(mended, frame, tmp_path).largest_difference <= 1e-9


@pytest.mark.parametrize("kind", REPAIRS_OF_MORE)
def test_a_repair_of_three_classes_goes_with_it(kind: str, tmp_path: Path) -> None:
    model, frame = make("multiclass", "trees", {"rounds": 12})
    p = model.predict(frame) ** 2 * [1.0, 3.0, 0.5]
    y = (np.random.default_rng(0).random(len(p))[:, None] > np.cumsum(p / p.sum(1, keepdims=True), axis=1)).sum(1).clip(0, 2)
    mended = replace(model, about=model.about | {"repair": fit_repair(kind, y, model.predict(frame))})
    assert np.abs(mended.predict(frame) - model.predict(frame)).max() > 0.01
    assert try_c(mended, frame, tmp_path).largest_difference <= 1e-9


def test_values_at_a_threshold_do_not_turn_the_other_way(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    frame = pl.DataFrame({"x": random.normal(size=2_000).astype(np.float32).astype(float) + 1e-9})
    contract = {"target": "y", "task": "regression", "classes": [], "features": ["x"], "columns": [{"name": "x", "type": "number"}]}
    model = train_model("trees", frame, np.sin(9 * frame["x"].to_numpy()), contract, Fitting({"rounds": 60, "min_data_in_leaf": 2}))
    edges = read_forest(model.estimator.text).edges  # type: ignore[attr-defined]
    asked = pl.DataFrame({"x": np.concatenate([edges, np.nextafter(edges, np.inf), np.nextafter(edges, -np.inf)])})
    assert try_c(model, asked, tmp_path).largest_difference <= 1e-12
    rounded = asked.with_columns(pl.col("x").cast(pl.Float32).cast(pl.Float64))
    assert np.abs(model.predict(rounded) - model.predict(asked)).max() > DIFFERENCE   # what 32 bits would have done


def test_odd_values_are_read_or_refused(tmp_path: Path) -> None:
    import subprocess

    model, frame = make("binary", "trees", {"rounds": 5})
    (tmp_path / "model.c").write_text(write_c(model))
    program = compile_c(tmp_path / "model.c")

    def ask(text: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(program)], input=text, capture_output=True, text=True)

    line = rows_as_lines(model, frame.head(1)).rstrip("\n").split("\t")
    strange = [*line]
    strange[model.encoder.columns.index("carrier")] = "no such carrier"
    assert ask("\t".join(strange) + "\n").returncode == 0
    strange[model.encoder.columns.index("hour")] = "noon"
    assert ask("\t".join(strange) + "\n").returncode == 2 and "column hour cannot be read" in ask("\t".join(strange) + "\n").stderr
    assert "values" in ask("1\t2\n").stderr and ask("1\t2\n").returncode == 2
    long = [*line]
    long[model.encoder.columns.index("carrier")] = "x" * 300_000
    assert ask("\t".join(long) + "\n").returncode == 0
    assert ask("").stdout == ""
    ended = frame.head(3).with_columns(carrier=pl.Series(["UA\0", "UA", "nobody"]))
    answers = ask(rows_as_lines(model, ended)).stdout.splitlines()
    assert len(answers) == 3 and ask(rows_as_lines(model, ended.with_columns(carrier=pl.lit("UA")))).stdout.splitlines()[0] == answers[0], "a text ends at its NUL"


def test_weekdays_of_a_century() -> None:
    days = [dt.datetime(1950, 1, 1) + dt.timedelta(days=37 * i, hours=i % 24) for i in range(1_000)]
    frame = pl.DataFrame({"at": days})
    contract = {"target": "y", "task": "regression", "classes": [], "features": ["at"], "columns": [{"name": "at", "type": "date"}]}
    target = np.array([day.isoweekday() * 10 + day.hour for day in days], float)
    model = train_model("trees", frame, target, contract, Fitting({"rounds": 40}))
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        assert try_c(model, frame, Path(folder)).largest_difference <= 1e-9


def test_a_backbone_is_refused_in_a_sentence() -> None:
    model, _ = make("binary", "linear", {}, 200)
    model = replace(model, family="backbone", estimator=object())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="family 'backbone' cannot be written as an edge file"):
        write_c(model)


ALPHABET = "aAbZzß ẞİıΣσς'’̈­_09½²٣ǅ日本é\u0301𐐀𐐨😀.,!-\u2003\x0b\x1f\x85\u200b"


def said(n: int, seed: int = 5) -> pl.DataFrame:
    "Texts of any script beside a number, a category and a date, all with gaps."
    random = np.random.default_rng(seed)
    words = ["Free", "ENTRY", "ΟΔΟΣ", "Straße", "日本", "İzmir", "don’t", "x"]
    texts: list[str | None] = [" ".join(random.choice(words, 5)) + "".join(random.choice(list(ALPHABET), 12)) for _ in range(n)]
    texts[:4] = [None, "", " \t\n\r\\N", "word " * 9_000]
    return pl.DataFrame({"hour": [None if i % 13 == 0 else float(v) for i, v in enumerate(random.uniform(0, 24, n))], "note": texts,
                         "kind": random.choice(["a", "b", None], n).tolist(), "memo": random.choice(["one two", "two three three", None], n).tolist()})


def outcome(frame: pl.DataFrame, task: str) -> tuple[np.ndarray, dict[str, Any]]:
    random = np.random.default_rng(1)
    score = frame["hour"].fill_null(12).to_numpy() / 6 + frame["note"].fill_null("").str.contains("ΟΔΟΣ").to_numpy() * 2 + random.normal(size=frame.height)
    kinds = {"hour": "number", "note": "text", "kind": "category", "memo": "text"}
    classes = {"binary": ["no", "yes"], "multiclass": ["x", "y", "z"], "regression": []}[task]
    target = {"binary": (score > 3).astype(int), "multiclass": np.digitize(score, [2, 4]), "regression": 10 * score}[task]
    return target, {"target": "t", "task": task, "classes": classes, "features": list(kinds), "columns": [{"name": k, "type": v} for k, v in kinds.items()]}


@pytest.mark.parametrize(("task", "family"), [("binary", "text"), ("multiclass", "text"), ("regression", "text"), ("binary", "trees"), ("multiclass", "linear")])
def test_texts_of_any_script_are_read_as_python_reads_them(task: str, family: str, tmp_path: Path) -> None:
    frame = said(500)
    target, contract = outcome(frame, task)
    model = train_model(family, frame, target, contract, Fitting({"rounds": 12} if family == "trees" else {}, 3))
    asked = pl.concat([frame, said(1_500, 6)])
    trial = try_c(model, asked, tmp_path)
    assert trial.largest_difference <= 1e-9 and trial.rows == 2_000
    assert np.abs(model.predict(frame[3:4]) - model.predict(frame[4:5])).max() > 1e-3       # and they matter


def planted_net(task: str, contract: dict[str, Any], encoder: Any, waves: bool, seed: int) -> Model:
    "A net with weights as training leaves them, in 32 bits."
    from pipeline.train.linear import Design
    from pipeline.train.models import shape_of
    from pipeline.train.nets import Net

    random, shape = np.random.default_rng(seed), shape_of(contract, encoder)
    numbers = np.array([i for i, size in enumerate(shape.sizes) if not size])
    sizes = [shape.sizes[i] + 1 for i in shape.categories]
    inputs = len(numbers) + 1 + 3 * len(sizes) + (3 * len(numbers) if waves else 0)
    ends = [inputs, 12, 9, len(contract["classes"]) if task == "multiclass" else 1]
    weights = {f"embed.{i}": random.normal(size=(size, 3)) for i, size in enumerate(sizes)}
    for i, (a, b) in enumerate(zip(ends, ends[1:])):
        weights |= {f"layer.{i}.weight": random.normal(size=(b, a)), f"layer.{i}.bias": random.normal(size=b)}
    if waves:
        weights |= {"wave.frequency": random.normal(size=(len(numbers), 5)), "wave.phase": random.normal(size=(len(numbers), 5)),
                    "wave.mix": random.normal(size=(len(numbers), 5, 3)), "wave.offset": random.normal(size=(len(numbers), 3))}
    design = Design(len(shape.sizes), numbers, random.normal(size=len(numbers)), random.uniform(1, 9, len(numbers)), numbers[:1], np.empty((0, 2), int))
    net = Net(shape, design, {name: value.astype(np.float32) for name, value in weights.items()}, 50.0, 9.0, 1)
    return Model("nets", contract, encoder, net)


@pytest.mark.parametrize(("task", "waves"), [("binary", True), ("multiclass", False), ("regression", True)])
def test_a_net_answers_from_c_as_from_numpy(task: str, waves: bool, tmp_path: Path) -> None:
    from pipeline.train.features import learn_encoder

    frame, contract = world.rows(task, 900), world.contract(task)
    model = planted_net(task, contract, learn_encoder(frame, contract), waves, 4)
    odd = frame.head(4).with_columns(hour=pl.Series([1e300, -1e300, None, 0.0]), carrier=pl.Series(["nobody", None, "UA", "B6"]))
    trial = try_c(model, pl.concat([frame, odd]), tmp_path)
    assert trial.largest_difference <= 1e-9 and trial.program_mb < 0.1
    assert np.ptp(model.predict(frame).ravel()) > 0.1


def test_a_trained_net_words_and_trees_weighed_together_go_into_one_file(tmp_path: Path) -> None:
    frame = said(400)
    target, contract = outcome(frame, "binary")
    members = [{"family": "nets", "config": {"epochs": 2, "hidden": 16, "batch": 128}, "weight": 0.4}, {"family": "text", "config": {}, "weight": 0.4},
               {"family": "trees", "config": {"rounds": 9}, "weight": 0.2}]
    model = train_model("ensemble", frame, target, contract, Fitting({"members": members}, 3))
    trial = try_c(model, said(800, 8), tmp_path)
    assert trial.largest_difference <= 1e-9 and 2 <= trial.memory_mb <= 32, "the least of 256, 128, … in which it answered"
    program = compile_c(tmp_path / "model.c")
    import subprocess

    broken = subprocess.run([program], input=b"1\tnot \xff utf-8\ta\tb\n", capture_output=True)
    assert broken.returncode == 2 and b"column note cannot be read" in broken.stderr


def test_the_gate_checks_an_edge_model_and_says_where_there_is_none(tmp_path: Path) -> None:
    for target in ("edge", "server"):
        root = tmp_path / target
        world.build(root, deploy={"target": target})
        with world.at(root):
            run = open_run("06_deploy", "tiny.yml", "outputs/tiny/main")
            packed = pack(run)
            shown = claim_edge(run, packed)
            run.conclude("done")
            run.finish()
            assert shown._repr_html_()
            checks = {c["title"]: c for c in json.loads((root / "outputs/tiny/main/06_deploy/checks.json").read_text())}
            edge = [c for name, c in checks.items() if "edge" in name.lower()]
            if target == "edge":
                assert len(edge) == 4 and all(c["verdict"] == "go" for c in edge), edge
                assert sorted(path.name for path in (root / "outputs/tiny/main/06_deploy/edge").iterdir()) == ["model.c"]
            else:
                assert not edge and "no edge file" in shown._repr_html_()
