"Families, models and the search: one contract for all, nothing by chance, nothing read that was not checked."
from __future__ import annotations

import ast
import datetime as dt
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from player import play
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import InputError, IntegrityError
from pipeline.data.contract import Contract, Rule
from pipeline.train import trees
from pipeline.train.budget import plan_fits
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.contest import score_beside
from pipeline.train.choice import Limits, choose, leaderboard, rows_of
from pipeline.train.features import MAX_LEVELS, learn_encoder
from pipeline.train.final import fit_finally, validation_frame
from pipeline.train.models import Model, load_model, retrain, train_model
from pipeline.train.protocol import Fitting, Shape, fit
from pipeline.train.search import Goal, Rows, run_search

ROOT = Path(__file__).resolve().parent.parent
QUICK = {"dummy": {}, "linear": {}, "trees": {"rounds": 15}, "portfolio": {"rounds": 15, "feature_fraction": 0.7, "num_leaves": 15},
         "nets": {"epochs": 8, "hidden": 24, "batch": 64}}
FAMILIES = tuple(QUICK)   # what every family must do stands in test_families
TASKS = ("binary", "multiclass", "regression")
KINDS = {"größe {\"m\"}": "number", "shop, [kind]: x": "category", "rain": "bool", "opened": "date", "note": "text", "always": "number", "leer": "number"}


def make_table(task: str, n: int = 240, seed: int = 0) -> tuple[pl.DataFrame, np.ndarray, dict[str, Any]]:
    "A table with every type, missing values, a constant, an empty column and names that LightGBM would refuse."
    random = np.random.default_rng(seed)
    size, kind = random.normal(size=n), random.integers(0, 4, n)
    frame = pl.DataFrame({
        "größe {\"m\"}": [None if i % 11 == 3 else float(v) for i, v in enumerate(size)], "shop, [kind]: x": [["a", "b", "日本", "‮x"][k] for k in kind],
        "rain": [None if i % 7 == 0 else bool(i % 2) for i in range(n)], "opened": [dt.datetime(2024, 1 + i % 12, 1 + i % 28, i % 24) for i in range(n)],
        "note": [None if i % 9 == 0 else ["late again", "all fine!", "late 3"][i % 3] for i in range(n)], "always": [1.0] * n, "leer": [None] * n,
    }, schema_overrides={"leer": pl.Float64})
    score = size + 2.0 * (kind == 1) + random.normal(size=n) * 0.3
    classes: dict[str, list[str]] = {"binary": ["no", "yes"], "multiclass": ["x", "y", "z"], "regression": []}
    target = {"binary": (score > 0.5).astype(int), "multiclass": np.digitize(score, [0.0, 1.2]), "regression": 50 + 10 * score}[task]
    rules = [Rule(name, type_, "x", "feature", True) for name, type_ in KINDS.items()]  # type: ignore[arg-type]
    rules.append(Rule("ziel", "number" if task == "regression" else "category", "x", "target", True))
    contract = Contract("ziel", task, classes[task], "yes" if task == "binary" else None, None, None, None, rules).to_dict()  # type: ignore[arg-type]
    return frame, np.asarray(target), contract


def make(family: str, task: str, seed: int = 7, **more: Any) -> tuple[Model, pl.DataFrame, np.ndarray]:
    frame, target, contract = make_table(task)
    return train_model(family, frame, target, contract, Fitting(QUICK[family] | more, seed)), frame, target


def in_child(code: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, **environment})


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_the_contract(family: str, task: str, tmp_path: Path) -> None:
    model, frame, target = make(family, task)
    model.save(tmp_path / "one")
    loaded = load_model(tmp_path / "one")
    answer = loaded.predict(frame)
    assert np.array_equal(answer, model.predict(frame))
    assert np.isfinite(answer).all()
    if task == "regression":
        assert answer.shape == (len(target),)
    else:
        assert answer.shape == (len(target), len(loaded.classes)) and np.allclose(answer.sum(axis=1), 1) and (answer >= 0).all()
    turned = frame.select(reversed(frame.columns)).with_columns(stranger=pl.lit(1))
    assert np.array_equal(loaded.predict(turned), answer)
    for i in (0, 3, 9, 14):
        assert np.allclose(loaded.predict_row(frame.row(i, named=True)), np.atleast_1d(answer[i]), atol=1e-6 if family == "nets" else 1e-12)
    parts = loaded.contributions(frame)
    assert (parts is None) == (family in ("dummy", "nets"))
    if parts is not None:
        assert parts.shape[-1] == len(loaded.features) + 1
        assert np.allclose(parts.sum(axis=-1), loaded.score(frame), atol=1e-6)
    assert loaded.predict(frame.head(0)).shape[0] == 0
    assert {path.suffix for path in (tmp_path / "one").iterdir()} <= {".json", ".txt", ".safetensors"}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_digest(family: str, task: str, tmp_path: Path) -> None:
    for place in ("one", "two"):
        make(family, task)[0].save(tmp_path / place)
    assert load_model(tmp_path / "one").digest == load_model(tmp_path / "two").digest


@pytest.mark.parametrize("family", ["portfolio", "nets"])
def test_another_seed_gives_another_model(family: str) -> None:
    more = {"bagging_fraction": 0.7, "bagging_freq": 1} if family == "portfolio" else {}
    one, frame, _ = make(family, "binary", 7, **more)
    two, _, _ = make(family, "binary", 8, **more)
    assert not np.array_equal(one.predict(frame), two.predict(frame))


def test_one_thread_or_two_make_the_same_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "FEW_CELLS", 0)   # otherwise so small a matrix has one thread anyway
    random = np.random.default_rng(0)
    coded = np.column_stack([random.normal(size=(3000, 5)), random.integers(0, 9, 3000)])
    target = (coded[:, 0] + coded[:, 5] > 4).astype(int)
    texts = [fit("portfolio", Shape("binary", 2, (0,) * 5 + (9,)), coded, target, Fitting(QUICK["portfolio"], 1, threads)).text for threads in (1, 2)]  # type: ignore[attr-defined]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("family", "config"), [("trees", {"rounds": 120}), ("nets", {"epochs": 200, "hidden": 32, "rate": 0.01, "dropout": 0.0})])
def test_ten_rows_can_be_learned_by_heart(family: str, config: dict[str, Any]) -> None:
    random = np.random.default_rng(1)
    coded, target = random.normal(size=(10, 3)), np.array([0, 1] * 5)
    model = fit(family, Shape("binary", 2, (0, 0, 0)), coded, target, Fitting(config, 1))
    assert -np.log(model.predict(coded)[np.arange(10), target]).mean() < 0.15


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_target_that_is_no_number_is_refused_by_name(family: str, bad: float) -> None:
    frame, target, contract = make_table("regression")
    target = target.copy()
    target[17] = bad
    with pytest.raises(InputError, match="column 'ziel': 1 outcomes are NaN or infinite, first in row 17"):
        train_model(family, frame, target, contract, Fitting(QUICK[family]))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_infinite_number_is_refused_by_name(family: str) -> None:
    model, frame, _ = make(family, "binary")
    spoilt = frame.with_columns(pl.when(pl.int_range(pl.len()) == 5).then(float("inf")).otherwise(pl.col("größe {\"m\"}")).alias("größe {\"m\"}"))
    with pytest.raises(InputError, match="größe"):
        model.predict(spoilt)
    with pytest.raises(InputError, match="größe"):
        model.predict_row(spoilt.row(5, named=True))


def test_a_missing_column_is_named() -> None:
    model, frame, _ = make("linear", "binary")
    with pytest.raises(InputError, match="rain"):
        model.predict(frame.drop("rain"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("columns", [["always"], ["leer"], ["rain"]])
def test_one_column_even_an_empty_one_is_enough(family: str, columns: list[str]) -> None:
    frame, target, contract = make_table("binary")
    narrow = contract | {"features": columns}
    assert np.isfinite(train_model(family, frame, target, narrow, Fitting(QUICK[family])).predict(frame)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_thousand_columns(family: str) -> None:
    random = np.random.default_rng(0)
    names = [f"c{i}" for i in range(10_000)]
    frame = pl.DataFrame(random.normal(size=(120, 10_000)), schema=names)
    target = (frame["c3"].to_numpy() > 0).astype(int)
    contract = {"target": "y", "task": "binary", "classes": ["0", "1"], "features": names, "columns": [{"name": n, "type": "number"} for n in names]}
    assert train_model(family, frame, target, contract, Fitting(QUICK[family])).predict(frame).shape == (120, 2)


def test_a_column_of_too_many_levels_is_cut_to_the_commonest() -> None:
    values = [f"v{i}" for i in range(6_000)] + ["common"] * 3
    contract = {"features": ["c"], "columns": [{"name": "c", "type": "category"}]}
    encoder = learn_encoder(pl.DataFrame({"c": values}), contract)
    assert encoder.sizes == [MAX_LEVELS] and encoder.codings[0].levels[0] == "common"


VALUES = st.fixed_dictionaries({
    "größe {\"m\"}": st.none() | st.floats(-1e9, 1e9), "shop, [kind]: x": st.none() | st.text(max_size=5) | st.sampled_from(["a", "b", "日本"]),
    "rain": st.none() | st.booleans(), "opened": st.none() | st.datetimes(dt.datetime(1950, 1, 1), dt.datetime(2100, 1, 1)),
    "note": st.none() | st.text(max_size=30) | st.sampled_from(["late late", "FINE"]), "always": st.just(1.0), "leer": st.none(),
})
ENCODER = learn_encoder(make_table("binary")[0], make_table("binary")[2])


@given(st.lists(VALUES, min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_row_alone_is_coded_as_in_a_frame(rows: list[dict[str, Any]]) -> None:
    schema = {"größe {\"m\"}": pl.Float64, "shop, [kind]: x": pl.String, "rain": pl.Boolean, "opened": pl.Datetime, "note": pl.String, "always": pl.Float64, "leer": pl.Float64}
    matrix = ENCODER.encode(pl.DataFrame(rows, schema=schema))
    for i, row in enumerate(rows):
        assert np.array_equal(ENCODER.encode_row(row), matrix[i], equal_nan=True)


LOAD = """
import sys
from pipeline.core.errors import PilothouseError
from pipeline.train.models import load_model
try:
    load_model(sys.argv[1])
except PilothouseError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("spoil", ["half", "byte", "leaf", "empty", "pickle"])
def test_a_spoilt_model_is_refused_before_lightgbm_sees_it(spoil: str, tmp_path: Path) -> None:
    folder = make("trees", "binary")[0].save(tmp_path / "model")
    path = folder / "model.txt"
    text = path.read_bytes()
    changed = {"half": text[: len(text) // 2], "byte": text[:500] + bytes([text[500] ^ 1]) + text[501:],
               "leaf": text.replace(b"leaf_value=", b"leaf_value=9", 1), "empty": b"", "pickle": b"\x80\x04\x95\x00."}[spoil]
    path.write_bytes(changed)
    child = in_child(LOAD, folder)
    assert child.returncode == 3, child.stderr
    assert "model.txt" in child.stdout


def test_every_flipped_byte_is_seen(tmp_path: Path) -> None:
    folder = make("linear", "binary")[0].save(tmp_path / "model")
    random = np.random.default_rng(0)
    for name in ("model.json", "coefficients.json", "digests.json"):
        content = (folder / name).read_bytes()
        for place in random.integers(0, len(content), 20):
            (folder / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
            try:
                load_model(folder)
            except IntegrityError:
                continue
            finally:
                (folder / name).write_bytes(content)
            # white space and the format's name in digests.json decide nothing; every digest in it does
            assert name == "digests.json", (name, place)
    load_model(folder)


def test_links_and_strangers_are_refused(tmp_path: Path) -> None:
    folder = make("linear", "binary")[0].save(tmp_path / "model")
    digest = load_model(folder).digest
    with pytest.raises(IntegrityError, match="was asked for"):
        load_model(folder, "0" * 64)
    (folder / "more.bin").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"more\.bin"):
        load_model(folder)
    (folder / "more.bin").unlink()
    (folder / "link.json").symlink_to("/etc/hostname")
    with pytest.raises(IntegrityError, match=r"link\.json"):
        load_model(folder)
    (folder / "link.json").unlink()
    assert load_model(folder, digest).digest == digest
    with pytest.raises(IntegrityError, match="no model of ours"):
        load_model(tmp_path)


def test_nothing_in_this_room_unpickles() -> None:
    for path in (ROOT / "pipeline/train").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = node.module if isinstance(node, ast.ImportFrom) else ""
            assert not {"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"} & {*names, module}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                assert getattr(node.func.value, "id", "") not in ("torch", "np", "numpy"), path


def test_a_model_room_imports_nothing_heavy_and_a_net_answers_without_torch(tmp_path: Path) -> None:
    model, frame, _ = make("nets", "multiclass")
    model.save(tmp_path / "net")
    frame.write_parquet(tmp_path / "rows.parquet")
    child = in_child("""
import sys, polars as pl
import pipeline.train.models, pipeline.train.contest
heavy = {'torch', 'lightgbm', 'sklearn', 'pytorch_lightning', 'wandb', 'scipy', 'matplotlib'} & set(sys.modules)
assert not heavy, heavy
from pipeline.train.models import load_model
load_model(sys.argv[1]).predict(pl.read_parquet(sys.argv[2]))
assert 'torch' not in sys.modules
""", tmp_path / "net", tmp_path / "rows.parquet")
    assert child.returncode == 0, child.stderr


TRAIN_NET = """
import os, signal, sys
sys.path.insert(0, 'tests')
from pathlib import Path
from test_train import make_table
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting
folder, die_at = Path(sys.argv[1]), int(sys.argv[2])
steps = iter(range(10**9))
def late():
    if next(steps) == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return False
frame, target, contract = make_table('binary')
cache = {}
config = {'epochs': 12, 'hidden': 24, 'batch': 64}
train_model('nets', frame, target, contract, Fitting(config, 3, checkpoint=folder / 'net.safetensors', late=late, cache=cache)).save(folder / 'model')
print(cache['resumed'])
"""


def test_a_net_that_was_killed_goes_on_and_ends_equal(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    frame, target, contract = make_table("binary")
    train_model("nets", frame, target, contract, Fitting({"epochs": 12, "hidden": 24, "batch": 64}, 3)).save(tmp_path / "whole")
    killed = in_child(TRAIN_NET, broken, 22)   # four steps an epoch: in the sixth
    assert killed.returncode == -signal.SIGKILL and not (broken / "model").exists()
    continued = in_child(TRAIN_NET, broken, -1)
    assert continued.returncode == 0, continued.stderr
    assert continued.stdout.strip() == "5"
    assert load_model(tmp_path / "whole").digest == load_model(broken / "model").digest


SEARCH = """
import os, signal, sys
sys.path.insert(0, 'tests')
from pathlib import Path
from test_train import small_rows
from pipeline.train.budget import plan_fits
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.contest import score_beside
from pipeline.train.search import Goal, run_search
rows, die_at = small_rows('binary'), int(sys.argv[2])
asked = iter(range(10**9))
def clock():
    if next(asked) == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return 0.0
plan = plan_fits(['linear', 'trees', 'portfolio'], [len(t) for t, _ in rows.folds], len(rows.target), rows.shape, 30)
found = run_search(rows, plan, Goal('roc_auc'), 7, 1, Checkpoints(Path(sys.argv[1])), clock)
found.table().write_json(sys.argv[1] + '.json')
print(sum(t.resumed for t in found.trials))
"""


def small_rows(task: str) -> Rows:
    frame, target, contract = make_table(task)
    names = {"binary": ["no", "yes"], "multiclass": ["x", "y", "z"]}.get(task)
    frame = frame.with_columns(
        ziel=pl.Series([names[t] for t in target] if names else target.tolist()), __row=pl.int_range(pl.len()), __time=pl.int_range(pl.len()),
        __fold=(pl.int_range(pl.len()) // 60 - 1).cast(pl.Int8))
    return rows_of(frame, contract, {"folds": 3, "ordered": True}, learn_encoder(frame, contract))


def test_a_search_that_was_killed_goes_on_with_its_trials(tmp_path: Path) -> None:
    assert in_child(SEARCH, tmp_path / "whole", -1).returncode == 0
    assert in_child(SEARCH, tmp_path / "broken", 130).returncode == -signal.SIGKILL
    continued = in_child(SEARCH, tmp_path / "broken", -1)
    assert continued.returncode == 0, continued.stderr
    assert int(continued.stdout) > 3
    assert (tmp_path / "whole.json").read_text() == (tmp_path / "broken.json").read_text()


@pytest.mark.parametrize(("task", "metric"), [("binary", "roc_auc"), ("multiclass", "log_loss"), ("regression", "rmse")])
def test_a_whole_search_gives_the_same_twice(task: str, metric: str, tmp_path: Path) -> None:
    digests = []
    for place in ("one", "two"):
        frame, target, contract = make_table(task)
        rows = small_rows(task)
        plan = plan_fits(["linear", "trees", "portfolio", "nets"], [len(t) for t, _ in rows.folds], len(target), rows.shape, 40, 2)
        plan = type(plan)(tuple(s for s in plan.steps if s.name in ("dummy", "linear", "trees", "portfolio shallow")), plan.refit_rows, plan.refit_price, 1e9)
        found = run_search(rows, plan, Goal(metric), 7, 1)
        board = leaderboard(found, rows, Limits(["linear", "trees", "portfolio"]), 7)
        choice = choose(board, found.goal, 0.0)
        encoder = learn_encoder(frame, contract)
        chosen = found.named(choice.name)
        assert chosen is not None
        final = fit_finally(chosen, found.named("trees") or chosen, rows, contract, encoder, plan, [7, 8], 1, Checkpoints(tmp_path / place))
        final.model.save(tmp_path / place / "model")
        kept = validation_frame(frame.with_columns(__row=pl.int_range(pl.len())), rows, contract, chosen, {})
        told, row = score_beside(kept, metric, classes=contract["classes"] or None, seed=7), board.filter(pl.col("candidate") == choice.name).row(0, named=True)
        assert told is not None and (told.value, told.low, told.high) == (row["metric"], row["low"], row["high"])      # one number on board and page
        digests.append((load_model(tmp_path / place / "model").digest, kept.write_json(), board.write_json()))
        loaded = load_model(tmp_path / place / "model")
        if task == "regression":
            low, high = loaded.predict_interval(frame).T
            assert (low < high).all()
    assert digests[0] == digests[1]


def test_a_failing_candidate_is_a_row_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline.train.linear as linear

    def fail(*_: Any) -> None:
        raise ValueError("no convergence on Tuesdays")

    monkeypatch.setattr(linear, "fit", fail)
    rows = small_rows("binary")
    plan = plan_fits(["linear", "trees"], [len(t) for t, _ in rows.folds], len(rows.target), rows.shape, 30)
    found = run_search(rows, plan, Goal("roc_auc"), 7)
    failed = found.table().filter(pl.col("status") == "failed")
    assert failed["candidate"].to_list() == ["linear"] and "Tuesdays" in failed["error"][0]
    board = leaderboard(found, rows, Limits(["linear", "trees"]), 7)
    assert choose(board, found.goal, 0.0).name == "trees"
    assert "Tuesdays" in board.filter(pl.col("candidate") == "linear")["why_not"][0]


def test_limits_leave_families_out() -> None:
    rows = small_rows("binary")
    plan = plan_fits(["linear", "trees"], [len(t) for t, _ in rows.folds], len(rows.target), rows.shape, 30)
    found = run_search(rows, plan, Goal("roc_auc"), 7)
    assert choose(leaderboard(found, rows, Limits(["linear"]), 7), found.goal, 0.0).name == "linear"
    with pytest.raises(InputError, match="MB are allowed"):
        choose(leaderboard(found, rows, Limits(["linear", "trees"], 1e-6), 7), found.goal, 0.0)


@given(st.integers(50, 2_000_000), st.integers(1, 300), st.floats(1, 2000), st.integers(1, 10), st.sampled_from([0, 2, 7]))
@settings(max_examples=60, deadline=None)
def test_a_plan_keeps_to_its_budget_or_is_the_floor(rows: int, columns: int, budget: float, seeds: int, classes: int) -> None:
    shape = Shape("regression" if not classes else "binary" if classes == 2 else "multiclass", classes, (0,) * columns)
    folds = [rows // 4, rows // 2, 3 * rows // 4]
    plan = plan_fits(["dummy", "linear", "trees", "portfolio", "nets"], folds, rows, shape, budget, seeds)
    assert plan == plan_fits(["dummy", "linear", "trees", "portfolio", "nets"], folds, rows, shape, budget, seeds)
    assert {"dummy", "trees", "linear"} <= {step.family for step in plan.steps}
    floor = all(step.rows <= 300 for step in plan.steps if step.family in ("trees", "linear")) or plan.refit_rows <= 300
    assert plan.price <= budget or floor or budget < 8
    assert 1 <= plan.refit_rows <= rows and all(step.rows <= rows for step in plan.steps)


def test_retraining_follows_the_model() -> None:
    model, frame, target = make("portfolio", "binary")
    again = retrain(model, frame.head(150), target[:150])
    assert (again.family, again.about["config"], again.about["rows"]) == ("portfolio", model.about["config"], 150)


PROBLEM = """
problem: {{name: small, statement: Will it be so and so in this test?, kpi: {{name: k, baseline: 0, target: 1, unit: x}}, task: {task}, target: ziel{positive}}}
data: {{sources: [{{name: s, kind: csv, path: s.csv}}]}}
train: {{budget_s: 60, clock: {clock}, distill: {distill}, seeds: 2, families: [dummy, linear, trees, portfolio]}}
"""


@pytest.mark.parametrize("task", TASKS)
def test_the_phase_runs_for_every_task(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.core.run import open_run
    from pipeline.scope.plan import derive_plan

    frame, target, contract = make_table(task, 240)
    names = {"binary": ["no", "yes"], "multiclass": ["x", "y", "z"]}.get(task)
    frame = frame.with_columns(ziel=pl.Series([names[t] for t in target] if names else target.tolist()), __row=pl.int_range(pl.len(), dtype=pl.Int64),
                               __fold=(pl.int_range(pl.len()) % 3).cast(pl.Int8))
    shutil.copytree(ROOT / "nbs/phases", tmp_path / "nbs/phases")
    (tmp_path / "params").mkdir()
    (tmp_path / "settings.ini").write_text("[engine]\nthreads = 1\n")
    (tmp_path / "params/small.yml").write_text(PROBLEM.format(task=task, positive=", positive: 'yes'" if task == "binary" else "",
                                                                clock="core" if task == "binary" else "wall",
                                                                distill=str(task == "binary").lower()))
    monkeypatch.chdir(tmp_path)
    where = {"problem": "params/small.yml", "run": "outputs/small/main"}
    scope = open_run("01_scope", **where)
    scope.save("scope/plan", derive_plan(scope.problem))
    data = None
    scope.conclude("ok")
    scope.finish()
    data = open_run("02_data", **where)
    data.save("data/train", frame)
    data.save("data/contract", contract)
    data.save("data/splits", {"kind": "random", "ordered": False, "folds": 3, "gap_days": 0.0})
    data.conclude("ok")
    data.finish()
    shown: list[Any] = []
    play(tmp_path / "nbs/phases/04_train.ipynb", shown=shown, **where)
    assert all(hasattr(s, "_repr_html_") or hasattr(s, "_repr_svg_") for s in shown)
    phase = tmp_path / "outputs/small/main/04_train"
    claims = {c["name"]: c for c in json.loads((phase / "claims.json").read_text())}
    assert any(name.startswith("validation_") for name in claims) and "model_mb" in claims
    assert claims["fitted_twice_gap"]["value"] == claims["stored_gap"]["value"] == 0
    checks = {item: c for c in json.loads((phase / "checks.json").read_text()) for item in c["answers"]}
    assert checks["M3"]["verdict"] == checks["I1"]["verdict"] == checks["I2"]["verdict"] == "go"
    assert json.loads((phase / "answer.json").read_text())["verdict"] == "go"
    assert len(list((phase / "seed_models").iterdir())) == 2
    luck, settings_ranked = pl.read_parquet(phase / "optimism.parquet"), pl.read_parquet(phase / "sensitivity.parquet")
    assert luck.height == 1 and luck["candidates"][0] > 3 and 0 <= luck["same_choice"][0] <= 1
    assert settings_ranked.height > 3 and settings_ranked["strength"].is_between(0, 1).all() and settings_ranked["trials"].min() >= 6
    told = " ".join(str(s._repr_html_()) for s in shown if hasattr(s, "_repr_html_"))
    assert "measured on rows left out of the choice" in told and ("60 core-s" in told) == (task == "binary")
    students = (phase / "students.parquet").is_file() and pl.read_parquet(phase / "students.parquet").height > 0
    assert ("Students: " in told) == students == (task == "binary"), "the page shows the saved students, where they were asked for"
    validation = pl.read_parquet(phase / "validation.parquet")
    assert validation.height == 240 and {"__row", "fold", "unit", "y"} <= set(validation.columns)
    assert load_model(phase / "model").predict(frame).shape[0] == 240 and load_model(phase / "default").task == task
