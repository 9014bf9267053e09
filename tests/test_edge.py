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
from pipeline.train.repairs import fit_repair

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


@pytest.mark.parametrize("kind", ["temperature", "line", "isotonic", "venn_abers"])
def test_a_repair_of_the_calibration_goes_with_it(kind: str, tmp_path: Path) -> None:
    model, frame = make("binary", "trees", {"rounds": 20})
    p = model.predict(frame)[:, 1]
    y = (np.random.default_rng(0).random(len(p)) < p**2).astype(int)
    mended = replace(model, about=model.about | {"repair": fit_repair(kind, y, p)})
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


def test_weekdays_of_a_century() -> None:
    days = [dt.datetime(1950, 1, 1) + dt.timedelta(days=37 * i, hours=i % 24) for i in range(1_000)]
    frame = pl.DataFrame({"at": days})
    contract = {"target": "y", "task": "regression", "classes": [], "features": ["at"], "columns": [{"name": "at", "type": "date"}]}
    target = np.array([day.isoweekday() * 10 + day.hour for day in days], float)
    model = train_model("trees", frame, target, contract, Fitting({"rounds": 40}))
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        assert try_c(model, frame, Path(folder)).largest_difference <= 1e-9


def test_a_net_is_refused_in_a_sentence() -> None:
    model, _ = make("binary", "linear", {}, 200)
    model = replace(model, family="nets", estimator=object())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="family 'nets' cannot be written as an edge file"):
        write_c(model)


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
