"What a split promises, for any table: classes, labels, groups, time with gaps, twins; the test for time; the sealed holdout."
from __future__ import annotations

import ast
import datetime as dt
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.core import audit
from pipeline.core.errors import InputError, IntegrityError
from pipeline.core.problem import Problem, parse_problem, read_yaml
from pipeline.core.run import open_run
from pipeline.data import splits
from pipeline.data.splits import (
    Parts, each_fold, find_time, fold_rows, folds_by_group, folds_by_labels, folds_by_time, moves_with_time, prove_disjoint, take_apart,
)
from pipeline.data.targets import check_target
from room_kit import execute, records
from tables import binary

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared/data"
seeds = st.integers(0, 2**32 - 1)
many = settings(max_examples=60, deadline=None, derandomize=True)
some = settings(max_examples=25, deadline=None, derandomize=True)


def problem_with(data: str, task: str = "binary", target: str = "y") -> Problem:
    return parse_problem(*read_yaml(f"""
problem: {{name: toy, statement: A table made up for tests of data., kpi: {{name: x, baseline: 0, target: 1, unit: ''}}, task: {task}, target: {target}}}
data: {{sources: [{{name: t, kind: csv, path: t.csv}}], {data}}}
"""), "toy.yml")


def split(frame: pl.DataFrame, data: str, task: str = "binary", seed: int = 7) -> Parts:
    frame = frame if "__row" in frame.columns else frame.with_row_index("__row").with_columns(pl.col("__row").cast(pl.Int64))
    return take_apart(frame, check_target(frame["y"], task), problem_with(data, task), np.random.default_rng(seed))  # type: ignore[arg-type]


def place(parts: Parts) -> dict[int, tuple[str, int]]:
    "Row -> part and fold."
    return {row: (name, fold) for name, part in parts.named().items()
            for row, fold in zip(part["__row"], part["__fold"] if "__fold" in part.columns else [-9] * part.height)}


# -- labels

@given(seeds, st.integers(30, 400), st.integers(2, 6), st.integers(1, 6))
@many
def test_every_label_keeps_its_share(seed: int, n: int, folds: int, kinds: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.random((n, kinds)) < rng.uniform(0.01, 0.6, kinds)
    found = folds_by_labels(labels, [1 / folds] * folds, rng)
    assert set(np.unique(found)) <= set(range(folds)) and len(found) == n
    counts = np.array([labels[found == f].sum(0) for f in range(folds)])
    assert (np.abs(counts - labels.sum(0) / folds) <= kinds + 1).all()
    rarest = int(np.where(labels.sum(0) > 0, labels.sum(0), n + 1).argmin())
    assert abs(counts[:, rarest] - labels[:, rarest].sum() / folds).max() < 1 or not labels.any()    # dealt first, so within a row


@given(seeds, st.integers(30, 300), st.integers(2, 5))
@many
def test_labels_that_exclude_each_other_are_dealt_like_classes(seed: int, n: int, folds: int) -> None:
    rng = np.random.default_rng(seed)
    classes = rng.choice(4, n, p=[.6, .25, .1, .05])
    found = folds_by_labels(np.eye(4, dtype=bool)[classes], [1 / folds] * folds, rng)
    for name in range(4):
        dealt = np.bincount(found[classes == name], minlength=folds)
        assert dealt.max() - dealt.min() <= 1


@given(seeds, st.integers(200, 500), st.integers(2, 4), st.sampled_from([.15, .2, .3]))
@some
def test_a_rare_second_target_keeps_its_share_in_holdout_and_folds(seed: int, n: int, folds: int, share: float) -> None:
    "Problems of several targets: the class of one may be rare, and chance would leave it out of a fold."
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame({"x": rng.normal(size=n), "y": rng.choice(["a", "b"], n), "rare": (np.arange(n) < 2 * folds + 4).tolist(), "ward": rng.choice(["n", "s", "w"], n)})
    frame = frame.sample(fraction=1, shuffle=True, seed=seed).with_row_index("__row").with_columns(pl.col("__row").cast(pl.Int64))
    problem = problem_with(f"split: {{kind: random, holdout_share: {share}, folds: {folds}}}")
    problem = problem.model_copy(update={"problem": problem.problem.model_copy(update={"further_targets": ["rare", "ward"]})})
    parts = take_apart(frame, check_target(frame["y"], "binary"), problem, rng)
    assert abs(parts.holdout.height - share * n) <= 6 and abs(parts.holdout["rare"].sum() - share * (2 * folds + 4)) <= 1
    for column in ("y", "rare", "ward"):
        for value in frame[column].unique():
            counts = [parts.train.filter((pl.col(column) == value) & (pl.col("__fold") == fold)).height for fold in range(folds)]
            assert max(counts) - min(counts) <= (1 if column == "rare" and value else 8), (column, value, counts)


# -- groups

def unevenness(strata: np.ndarray, folds: np.ndarray, k: int) -> float:
    table = np.array([[((strata == s) & (folds == f)).sum() for f in range(k)] for s in np.unique(strata)])
    return float(np.abs(table / table.sum(1, keepdims=True) - 1 / k).mean())


def test_whole_groups_keep_classes_as_well_as_sklearn_does() -> None:
    from sklearn.model_selection import StratifiedGroupKFold

    ours, theirs = [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        n, k = 600, 4
        groups = rng.integers(0, 60, n)
        strata = ((rng.random(n) < .1 + .3 * (groups % 3 == 0)).astype(int) + (rng.random(n) < .05))
        ours.append(unevenness(strata, folds_by_group(pl.Series("g", groups), strata, k, rng), k))
        fold = np.zeros(n, int)
        for i, (_, valid) in enumerate(StratifiedGroupKFold(k, shuffle=True, random_state=seed).split(np.zeros(n), strata, groups)):
            fold[valid] = i
        theirs.append(unevenness(strata, fold, k))
    assert np.mean(ours) <= np.mean(theirs) * 1.1


@given(seeds, st.integers(100, 400), st.integers(8, 40))
@some
def test_no_group_crosses_any_part_or_fold(seed: int, n: int, groups: int) -> None:
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame({"x": rng.normal(size=n), "g": rng.integers(0, groups, n).astype(str), "y": rng.choice(["a", "b"], n)})
    assume(frame["g"].n_unique() >= 8)
    parts = split(frame, "group: g", seed=seed)
    assert not set(parts.train["g"]) & set(parts.holdout["g"])
    for inside, valid in each_fold(parts.train, parts.summary()):
        assert len(inside) and len(valid) and not set(parts.train["g"][inside.tolist()]) & set(parts.train["g"][valid.tolist()])
    assert prove_disjoint(parts.named(), parts.ordered)["kept"].all()


# -- time

@given(seeds, st.integers(200, 500), st.integers(1, 4), st.sampled_from([0.0, 0.5, 3.0, 10.0]), st.booleans())
@some
def test_every_fold_ends_a_gap_before_it_is_tested(seed: int, n: int, folds: int, gap: float, dates: bool) -> None:
    rng = np.random.default_rng(seed)
    days = rng.integers(0, 400, n)
    time = pl.Series([dt.datetime(2020, 1, 1) + dt.timedelta(days=int(d), hours=int(h)) for d, h in zip(days, rng.integers(0, 24, n))]) if dates else pl.Series(days.astype(float))
    frame = pl.DataFrame({"t": time, "x": rng.normal(size=n), "y": rng.choice(["a", "b"], n)}).sample(fraction=1, shuffle=True, seed=1)
    parts = split(frame, f"time: t, split: {{gap_days: {gap}, folds: {max(folds, 2)}}}", seed=seed)
    reach: Any = dt.timedelta(days=gap) if dates else gap
    last: Any = parts.train["__time"].max()
    assert last < parts.holdout["__time"].min() - (reach if gap else type(reach)(0))
    starts = []
    for inside, valid in each_fold(parts.train, parts.summary()):
        start: Any = parts.train["__time"][valid.tolist()].min()
        starts.append(start)
        assert len(valid) and (not len(inside) or parts.train["__time"][inside.tolist()].max() < start - (reach if gap else type(reach)(0)))  # type: ignore[operator]
    assert starts == sorted(set(starts))      # the origin rolls on
    proof = prove_disjoint(parts.named(), True, gap)
    assert proof["kept"].all() and proof["promise"].str.contains("fold").sum() == parts.folds


@given(seeds, st.integers(2, 6))
@some
def test_rolling_origins_train_on_everything_before(seed: int, folds: int) -> None:
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame({"__time": np.sort(rng.integers(0, 200, 300)).astype(float)})
    frame = frame.with_columns(pl.Series("__fold", folds_by_time(frame["__time"], folds), dtype=pl.Int8))
    sizes = [len(fold_rows(frame, f, ordered=True)[0]) for f in range(int(frame["__fold"].max()) + 1)]  # type: ignore[arg-type]
    assert sizes == sorted(sizes) and sizes[0] >= .3 * frame.height
    assert all(len(fold_rows(frame, f, True)[0]) == (frame["__fold"].to_numpy() < f).sum() for f in range(len(sizes)))


@given(seeds, st.integers(30, 80), st.integers(8, 14), st.booleans(), st.sampled_from([0.0, 20.0]))
@some
def test_customers_who_come_every_month_overlap_neither_in_time_nor_as_customers(seed: int, customers: int, months: int, production: bool, gap: float) -> None:
    rng = np.random.default_rng(seed)
    here = rng.random((months, customers)) < .9
    month, who = np.nonzero(here)
    frame = pl.DataFrame({"t": [dt.datetime(2022 + m // 12, m % 12 + 1, 1) for m in month.tolist()], "g": [f"c{w}" for w in who], "y": rng.choice(["a", "b"], len(who))})
    starts = frame["t"].unique().sort()[-2].date()
    data = f"time: t, group: g, split: {{gap_days: {gap}{f', production_from: {starts}' if production else ''}}}"
    parts = split(frame, data, seed=seed)
    assert parts.ordered and parts.given and "came before" in parts.why and parts.aside["a group of another part"] > 0
    assert prove_disjoint(parts.named(), True, gap)["kept"].all()
    sides = [part for part in (parts.train, parts.holdout, parts.production) if part is not None]
    assert len(sides) == 2 + production and all(part.height for part in sides) and sum(part["g"].n_unique() for part in sides) == frame["g"].n_unique()
    assert sum(part.height for part in sides) + sum(parts.aside.values()) == frame.height
    assert .1 < parts.holdout["g"].n_unique() / frame["g"].n_unique() < .4
    assert 2 <= parts.folds <= 3      # few months have few moments to begin a fold at
    for inside, valid in each_fold(parts.train, parts.summary()):
        assert len(inside) >= 10 and len(valid) and not set(parts.train["g"][inside.tolist()]) & set(parts.train["g"][valid.tolist()])
    assert split(frame, data, seed=seed).train.equals(parts.train)


def test_customers_who_seldom_come_again_are_put_aside_and_a_single_one_is_refused() -> None:
    n = 600
    frame = pl.DataFrame({"t": np.arange(n) * 1.0, "g": [f"g{i // 3 if i % 10 else 0}" for i in range(n)], "y": ["a", "b"] * (n // 2)})
    parts = split(frame, "time: t, group: g")
    assert not parts.given and parts.aside == {"a group seen earlier": 12} and "g0" in set(parts.train["g"])
    with pytest.raises(InputError, match="too few groups to keep them apart"):
        split(frame.with_columns(g=pl.Series([f"g{i % 3}" for i in range(n)])), "time: t, group: g")


# -- twins

@given(seeds, st.integers(400, 800), st.integers(1, 6), st.sampled_from(["binary", "regression"]))
@some
def test_no_copy_and_no_near_copy_crosses_a_random_split(seed: int, n: int, again: int, task: str) -> None:
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame({"a": rng.normal(size=n), "b": rng.integers(0, 900, n), "c": rng.normal(size=n), "d": rng.choice(["u", "v"], n), "e": rng.normal(size=n),
                          "y": rng.choice(["p", "q"], n).tolist() if task == "binary" else rng.normal(size=n)})
    twins = [frame.head(again), frame.head(again).with_columns(a=pl.col("a") + 5), frame.head(again).with_columns(d=pl.lit("w"), c=pl.col("c") * (1 + 1e-12))]
    parts = split(pl.concat([frame, *twins]), "split: {kind: random}", task, seed)
    where = place(parts)
    for row in range(again):
        assert len({where[row + k * again if k < 0 else row if k == 0 else n + (k - 1) * again + row] for k in range(4)}) == 1
    assert parts.twins >= 3 * again and parts.summary()["twins"] == parts.twins


# -- the proof notices

def test_each_broken_promise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    n = 400
    frame = pl.DataFrame({"t": np.arange(n) * 1.0, "g": [f"g{i // 4}" for i in range(n)], "x": rng.normal(size=n), "y": rng.choice(["a", "b"], n)})
    parts = split(frame, "time: t, group: g, split: {gap_days: 5}").named()
    whole = prove_disjoint(parts, True, 5)
    assert whole["kept"].all()
    broken: dict[str, dict[str, pl.DataFrame]] = {
        "rows in both train and holdout": {**parts, "holdout": pl.concat([parts["holdout"], parts["train"].head(1).drop("__fold")])},
        "groups in both train and holdout": {**parts, "holdout": parts["holdout"].with_columns(__group=pl.lit(parts["train"]["__group"][0]))},
        "train ends 5 units before holdout begins": {**parts, "holdout": parts["holdout"].with_columns(pl.col("__time") - 6)},
    }
    for words, spoilt in broken.items():
        proof = prove_disjoint(spoilt, True, 5)
        assert any(words in promise for promise in proof.filter(~pl.col("kept"))["promise"]), words
    monkeypatch.setattr(splits, "fold_rows", lambda frame, fold, *_: (np.arange(frame.height), np.flatnonzero(frame["__fold"].to_numpy() == fold)))
    careless = prove_disjoint(parts, True, 5).filter(~pl.col("kept"))["promise"]
    assert any("what fold 1 learns from ends 5 units before" in promise for promise in careless) and any("groups in both fold 1" in promise for promise in careless)


# -- does time matter?

def drifting(rng: np.random.Generator, n: int = 1500, rate: float = 1.0) -> pl.DataFrame:
    at = [dt.datetime(2021, 1, 1) + dt.timedelta(hours=3 * i) for i in range(n)]
    return pl.DataFrame({"when": at, "x": rng.normal(size=n), "y": np.where(rng.random(n) < .2 + .5 * rate * np.arange(n) / n, "yes", "no")})


def test_a_random_split_of_rows_that_move_with_time_is_refused_unless_forced() -> None:
    frame = drifting(np.random.default_rng(1))
    with pytest.raises(InputError, match=r"moves with 'when'.*data\.split\.force"):
        split(frame, "time: when, split: {kind: random}")
    forced = split(frame, "time: when, split: {kind: random, force: we answer for past days only}")
    assert forced.rule == "random" and forced.forced == "we answer for past days only" and "moves with 'when'" in forced.why
    waived = split(frame, "time: when, split: {kind: random}, waive: [{check: split, column: when, reason: we answer for past days only}]")
    assert waived.forced == "we answer for past days only"
    with pytest.raises(InputError, match="force"):
        problem_with("split: {kind: random, force: no}")
    shuffled = frame.with_columns(pl.col("when").shuffle(seed=1))
    assert split(shuffled, "time: when, split: {kind: random}").rule == "random"
    assert split(frame, "time: when").ordered and split(shuffled, "time: when").ordered     # production comes later, either way


def test_a_date_that_nobody_named_is_found() -> None:
    frame = drifting(np.random.default_rng(1)).with_columns(born=pl.col("when"), noise=pl.col("when").shuffle(seed=2))
    parts = split(frame, "columns: {x: {role: feature}}")
    assert parts.ordered and "no time is declared" in parts.why and parts.train["__time"].max() < parts.holdout["__time"].min()  # type: ignore[operator]
    assert split(frame, "split: {kind: random}").unnamed_time == "when"
    assert split(frame, "columns: {when: {role: outcome}}").rule == "random"
    assert find_time(frame.drop("when"), frame["y"]) is None


def test_streaks_are_dependence_even_where_no_trend_is() -> None:
    n = 2000
    streaks = pl.Series("y", ["up" if i // 4 % 2 else "down" for i in range(n)])
    when = pl.Series("when", np.arange(n) * 1.0)
    assert moves_with_time(streaks, when)[0] and not moves_with_time(streaks.shuffle(seed=1), when)[0]
    wave = pl.Series("y", np.sin(np.arange(n)) + np.random.default_rng(1).normal(0, .3, n))
    assert moves_with_time(wave, when)[0] and not moves_with_time(wave.shuffle(seed=1), when)[0]


@pytest.mark.parametrize("task", ["binary", "regression"])
def test_shuffled_time_is_seldom_taken_for_order(task: str) -> None:
    alarms = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        values = pl.Series("y", rng.choice(["a", "b"], 600, p=[.8, .2]).tolist() if task == "binary" else rng.lognormal(size=600))
        alarms += moves_with_time(values, pl.Series("t", rng.permutation(600) * 1.0))[0]
    assert alarms <= 6      # one in a hundred is meant


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")
@pytest.mark.parametrize(("name", "moves"), [("electricity", True), ("gss_wages", True), ("us_accidents", True), ("employment_ma", False)])
def test_real_tables_with_a_time(name: str, moves: bool) -> None:
    "Electricity drifts and runs in streaks; employment in Massachusetts hardly moved in four years."
    told = json.loads((SHARED / "meta.json").read_text())[name]
    frame = pl.read_parquet(SHARED / f"{name}.parquet")
    values = frame[told["target"]].cast(pl.String) if told["task"] != "regression" else frame[told["target"]]
    time = frame[told["time"]].cast(pl.Float64)
    assert moves_with_time(values, time)[0] is moves
    assert not moves_with_time(values, time.shuffle(seed=3))[0]


# -- the seal

FILE = """
problem: {{name: shop, statement: Will this customer leave us?, kpi: {{name: x, baseline: 0, target: 1, unit: ''}}, task: binary, target: churned}}
data:
  sources: [{{name: t, kind: parquet, path: t.parquet, licence: own}}]
{data}
"""


def run_phase(folder: Path, frame: pl.DataFrame, data: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "settings.ini").write_text("[engine]\nthreads = 1\n")
    (folder / "params").mkdir(exist_ok=True)
    frame.write_parquet(folder / "t.parquet")
    (folder / "params/shop.yml").write_text(FILE.format(data=data))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook shows a no-go and does not raise it")
    execute(ROOT / "nbs/phases/02_data.ipynb", "params/shop.yml", "outputs/shop/main")
    return folder / "outputs/shop/main"


def test_the_reason_for_a_forced_split_lands_in_the_trail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = drifting(np.random.default_rng(1)).rename({"y": "churned"})
    run = run_phase(tmp_path, frame, "  time: when\n  split: {kind: random, force: we answer for past days only}", monkeypatch)
    trail = [entry["details"] for entry in audit.entries(tmp_path / "outputs/store") if entry["event"] == "split.forced"]
    assert [entry["reason"] for entry in trail] == ["we answer for past days only"]
    decision = next(d for d in records(run, "02_data", "decisions") if d["what"] == "how rows are split")
    assert "forced: we answer" in decision["because"]
    checks = {c["title"]: c["verdict"] for c in records(run, "02_data", "checks")}
    assert checks["A random split fits these rows"] == "go"


def test_an_unnamed_time_stops_a_random_split_at_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = drifting(np.random.default_rng(1)).rename({"y": "churned"})
    run = run_phase(tmp_path, frame, "  split: {kind: random}", monkeypatch)
    failed = [c for c in records(run, "02_data", "checks") if c["verdict"] == "no-go"]
    assert [c["title"] for c in failed] == ["A random split fits these rows"] and "data.time: when" in failed[0]["why"]


def test_the_holdout_opens_only_through_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.data.measures import count_rows

    folder = run_phase(tmp_path, binary(np.random.default_rng(3), 600), "  split: {kind: random}", monkeypatch)
    run = open_run("05_evaluate", "params/shop.yml", "outputs/shop/main")
    with pytest.raises(IntegrityError, match="sealed"):
        run.load("data/holdout")
    with pytest.raises(InputError, match="sealed"):
        run.claim("rows", of="data/holdout", by=count_rows)
    assert run.looks("data/holdout") == 0 and len(run.digest_of("data/holdout")) == 64
    assert (folder / "02_data/holdout.parquet").stat().st_mode & 0o077 == 0
    opened = run.open_sealed("data/holdout", "final evaluation of model abc")
    assert opened.height > 0 and run.looks("data/holdout") == 1
    entry = [e for e in audit.entries(run.store) if e["event"] == "sealed.opened"][-1]
    assert entry["details"]["reason"] == "final evaluation of model abc" and entry["details"]["artifact"] == "data/holdout"
    pages = [path for path in (folder / "02_data").iterdir() if path.name != "holdout.parquet" and path.suffix == ".parquet"]
    rows = set(opened["__row"])
    for path in pages:
        frame = pl.read_parquet(path)
        assert "__row" not in frame.columns or not set(frame["__row"]) & rows, path.name


OPENERS = {"pipeline/evaluate/holdout.py", "pipeline/deploy/rehearsal.py", "pipeline/comply/case.py"}    # each through run.open_sealed, with a reason
READERS = {"pipeline/core/run.py", "pipeline/core/store.py", "pipeline/engine/verify.py",                # who may read an artifact's file at all:
           "pipeline/engine/lineage.py",                                                                  # lineage leaves out what is sealed
           "pipeline/deploy/trace.py"}                                                                    # explain-row, after the evaluation, with an entry in the trail


def test_no_other_path_of_the_api_reads_the_holdout() -> None:
    "No module opens what is sealed but the three that say why, and none names the holdout's file."
    assert "not artifact.sealed" in (ROOT / "pipeline/engine/lineage.py").read_text() if (ROOT / "pipeline/engine/lineage.py").exists() else True
    assert '"sealed.replayed"' in (ROOT / "pipeline/deploy/trace.py").read_text()
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        name, tree = path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())
        calls = {node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "") for node in ast.walk(tree) if isinstance(node, ast.Call)}
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert "open_sealed" not in calls or name in OPENERS, name
        assert "read_artifact" not in calls or name in READERS, name
        assert not any("holdout.parquet" in text for text in texts if "\n" not in text), name


def test_a_tenth_of_copies_is_kept_on_one_side_though_the_training_rows_hold_less() -> None:
    "Copies are a tenth of all rows and fewer of four fifths of them: the split may not call natural what its check calls a fault."
    from pipeline.data.splits import repeats

    rng = np.random.default_rng(5)
    frame = pl.DataFrame({name: rng.normal(size=900) for name in "abc"} | {"y": rng.choice(["u", "v"], 900)})
    frame = pl.concat([frame, frame.head(110)])
    parts = split(frame, "split: {kind: random}")
    assert repeats(frame) and not parts.train.drop("__row", "__fold", strict=False).join(parts.holdout, on=["a", "b", "c"], how="semi").height
