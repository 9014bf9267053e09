"What people agree on holds in the data phase, in training and in the service alike; what changed upstream is said once, by name."
from __future__ import annotations

import datetime as dt
import json
import math
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from room_kit import execute, records
from tables import binary

from pipeline.core.audit import entries
from pipeline.core.errors import InputError, IntegrityError
from pipeline.core.problem import Problem, parse_problem, read_yaml
from pipeline.core.run import open_run
from pipeline.core.settings import load_settings
from pipeline.data.agreement import agreement_text, compare_contracts, open_agreement, parse_agreement, propose_agreement
from pipeline.data.contract import Contract, Rule, enforce, learn, read_as_declared, target_of
from pipeline.data.names import difference, hidden_signs, looks, twins
from pipeline.data.sources import read_table
from pipeline.data.targets import check_target
from pipeline.data.terms import Agreement, Term, breaches, breaks, compare_columns
from pipeline.data.upstream import peek
from pipeline.deploy.frames import check_frame
from pipeline.deploy.rows import check_rows
from pipeline.deploy.schema import Schema, make_schema
from pipeline.engine.verify import write_problem

NOTEBOOK = Path(__file__).resolve().parent.parent / "nbs/phases/02_data.ipynb"
PROBLEM = """
problem: {name: shop, statement: Will they come back?, kpi: {name: x, baseline: 0, target: 1, unit: ''}, task: binary, target: churned, positive: 'yes'}
data:
  sources: [{name: people, kind: csv, path: people.csv, licence: own}]
  split: {kind: random, folds: 2}
MORE
"""


def problem(more: str = "") -> Problem:
    return parse_problem(*read_yaml(PROBLEM.replace("MORE", more)), "shop.yml")


def agreed(table: pl.DataFrame, *terms: Term, **also: Any) -> tuple[Agreement, Contract]:
    "Terms on some columns and none on the others, and the contract that comes of it."
    agreement = Agreement({**{name: Term(name) for name in table.columns}, **{t.name: t for t in terms}}, file="shop.contract.yml")
    rows, kinds, unusable = read_as_declared(table, problem(**also), agreement)
    return agreement, learn(rows, kinds, target_of(rows, problem(**also)), problem(**also), unusable, agreement=agreement)


PEOPLE = binary(np.random.default_rng(3), 400).with_columns(age=pl.col("age").fill_null(40), order=pl.int_range(400).cast(pl.String))


# -- one code in data, training and service

BROKEN: dict[str, tuple[Term, pl.Expr, str]] = {   # what was agreed, what breaks it in row 4, words of the sentence
    "type": (Term("income", "number"), pl.lit("much").alias("income"), "much"),
    "range below": (Term("age", "number", min=0.0), pl.lit(-1).alias("age"), "below 0"),
    "range above": (Term("age", "number", max=120.0), pl.lit(999).alias("age"), "above 120"),
    "category": (Term("region", "category", levels=("north", "south", "east", "west")), pl.lit("nowhere").alias("region"), "none of the 4 values"),
    "nullability": (Term("income", "number", nullable=False), pl.lit(None).alias("income"), "missing"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_breach_is_refused_in_data_training_batch_and_service(kind: str) -> None:
    term, spoil, words = BROKEN[kind]
    table = PEOPLE.drop("order")
    agreement, contract = agreed(table, term)
    wanted = pl.String if kind == "type" else table.schema[term.name]
    spoilt = table.with_columns(pl.when(pl.int_range(pl.len()) == 3).then(spoil.cast(wanted)).otherwise(pl.col(term.name).cast(wanted)).alias(term.name))
    schema = make_schema(contract.to_dict(), table)
    said = []
    for hold in (lambda frame: read_as_declared(frame, problem(), agreement), lambda frame: enforce(frame, contract), lambda frame: check_frame(frame.drop("churned"), schema)):
        hold(table)
        with pytest.raises(InputError) as refusal:
            hold(spoilt)
        said.append(str(refusal.value))
        assert term.name in said[-1] and words in said[-1] and "row 4" in said[-1] and "\n" not in said[-1] and len(said[-1]) < 300
    rows = [spoilt.drop("churned").row(i, named=True) if i == 3 else row for i, row in enumerate(table.drop("churned").to_dicts())]
    found = check_rows(rows, schema).refused
    assert [(f.row, f.field) for f in found] == [(3, term.name)] and (words in found[0].problem or kind == "type")
    assert not check_rows(table.drop("churned").to_dicts(), schema).refused


def test_uniqueness_is_refused_wherever_rows_come_together() -> None:
    agreement, _ = agreed(PEOPLE, Term("order", role="id", unique=True))
    with pytest.raises(InputError, match="column 'order' breaks shop.contract.yml.*2 of 400 rows"):
        read_as_declared(PEOPLE.with_columns(order=pl.col("order").replace("7", "8")), problem(), agreement)
    _, contract = agreed(PEOPLE, Term("order", "category", unique=True))
    with pytest.raises(InputError, match="stands in more than one row"):
        enforce(pl.concat([PEOPLE.head(3), PEOPLE.head(1)]), contract)
    with pytest.raises(InputError, match="stands in more than one row"):
        check_frame(pl.concat([PEOPLE.head(3), PEOPLE.head(1)]).drop("churned"), make_schema(contract.to_dict()))


def test_what_is_forbidden_or_known_too_late_never_reaches_a_model_or_a_request() -> None:
    moments = "  moments: [order, delivery]\n  decided_at: order"
    agreement, contract = agreed(PEOPLE, Term("region", forbidden=True), Term("income", "number", known_at="delivery"), Term("order", role="id"), more=moments)
    left = {row["name"]: row["role"] for row in contract.left_out}
    assert left == {"region": "forbidden", "income": "outcome", "order": "id"} and contract.features == ["age", "member"]
    assert agreement.terms["income"].known_at == "delivery"
    with pytest.raises(InputError, match="'income' is not in the contract; it is left out: known only at delivery"):
        enforce(PEOPLE.select("age", "member", "income"), contract)
    assert {f.field for f in check_rows([{"age": 3, "member": True, "region": "north"}], make_schema(contract.to_dict())).refused} == {"region"}
    with pytest.raises(InputError, match="known_at of column 'income' is 'deliver'.*did you mean 'delivery'"):
        agreed(PEOPLE, Term("income", known_at="deliver"), more=moments)


def test_personal_values_stand_in_no_message() -> None:
    spoilt = PEOPLE.with_columns(order=pl.when(pl.col("order") == "3").then(pl.lit("kanarie@example.org")).otherwise(pl.col("order")))
    agreement, _ = agreed(PEOPLE, Term("order", "category", levels=tuple(map(str, range(400))), pii=True, role="id"))
    with pytest.raises(InputError) as refusal:
        read_as_declared(spoilt, problem(), agreement)
    assert "'order'" in str(refusal.value) and "row 4" in str(refusal.value) and "kanarie" not in str(refusal.value)
    number, _ = agreed(PEOPLE, Term("order", "number", pii=True, role="id"))
    with pytest.raises(InputError) as refusal:
        read_as_declared(spoilt, problem(), number)
    assert "row 4" in str(refusal.value) and "kanarie" not in str(refusal.value)


LIMIT = st.fixed_dictionaries({}, optional={"nullable": st.booleans(), "min": st.integers(-5, 5).map(float), "max": st.integers(-5, 5).map(float)})
DAYS = st.datetimes(dt.datetime(2000, 1, 1), dt.datetime(2000, 1, 9)).map(lambda d: d.replace(microsecond=0))


@given(values=st.lists(st.none() | st.integers(-7, 7).map(float), min_size=1, max_size=8), limits=LIMIT)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_column_and_its_single_values_are_judged_alike(values: list[float | None], limits: dict[str, Any]) -> None:
    found = breaches(pl.DataFrame({"x": pl.Series(values, dtype=pl.Float64)}), {"x": limits})
    alone = [why for value in values if (why := breaks(value, limits))]
    assert (found.height > 0) == bool(alone) and set(alone) <= set(found["breach"].to_list())
    for why, first in found.select("breach", "first").iter_rows():
        assert breaks(values[first - 1], limits) is not None and (breaks(values[first - 1], limits) == why or len(found) > 1)


@given(values=st.lists(st.none() | DAYS, min_size=1, max_size=8), low=DAYS, high=DAYS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_dates_are_judged_alike(values: list[dt.datetime | None], low: dt.datetime, high: dt.datetime) -> None:
    limits = {"min": low.isoformat(), "max": high.isoformat()}
    found = breaches(pl.DataFrame({"x": pl.Series(values, dtype=pl.Datetime("us"))}), {"x": limits})
    assert (found.height > 0) == any(breaks(value, limits) for value in values)


@given(values=st.lists(st.none() | st.sampled_from(["a", "b", "é", "e\u0301", "1", "true"]), min_size=1, max_size=8), levels=st.sets(st.sampled_from(["a", "b", "é", "1", "true"]), min_size=1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_levels_are_judged_alike(values: list[str | None], levels: set[str]) -> None:
    from pipeline.data.types import convert

    found = breaches(pl.DataFrame({"x": convert(pl.Series("x", values, dtype=pl.String), "category")}), {"x": {"levels": sorted(levels)}})
    assert (found.height > 0) == any(breaks(value, {"levels": sorted(levels)}) for value in values)


def test_what_nobody_agreed_on_is_refused_as_before() -> None:
    rows, kinds, unusable = read_as_declared(PEOPLE, problem())
    contract = learn(rows, kinds, target_of(rows, problem()), problem(), unusable)
    assert contract.agreed is None and not contract.limits and all(rule.agreed is None for rule in contract.columns)
    assert enforce(PEOPLE.drop("order").with_columns(age=-500), contract)["age"].to_list() == [-500.0] * 400
    field = next(f for f in make_schema(contract.to_dict()).fields if f.name == "income")
    assert field.least is not None and field.most is not None and field.agreed is None


# -- what is on disk already

def test_contracts_and_schemas_of_older_packages_are_read() -> None:
    old = {"target": "y", "task": "binary", "classes": ["a", "b"], "positive": "b", "time": None, "group": None, "subject": None, "left_out": [], "cohorts": [], "features": ["x"],
           "columns": [{"name": "x", "type": "number", "dtype": "Float64", "role": "feature", "nullable": False, "min": 0.0, "max": 9.0, "levels": None, "n_levels": None, "known_at": None,
                        "pii": False, "why": ""}]}
    contract = Contract.from_dict(old)
    assert contract.rule("x") == Rule("x", "number", "Float64", "feature", False, 0.0, 9.0) and contract.limits == {}
    assert enforce(pl.DataFrame({"x": [1]}), old)["x"].to_list() == [1.0]
    fields = [{k: v for k, v in f.items() if k != "agreed"} for f in make_schema(old).to_dict()["fields"]]
    assert Schema.from_dict({"fields": fields, "ignored": []}).names == ["x"]
    assert Contract.from_dict(json.loads(json.dumps(contract.amended({"x": {"unit": "km", "agreed": {"min": 1.0}}}).to_dict()))).rule("x").agreed == {"min": 1.0}


# -- the file

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)


@given(name=NAMES, level=NAMES, why=NAMES, ends=st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_name_level_and_number_is_read_back_from_the_file(name: str, level: str, why: str, ends: tuple[float, float]) -> None:
    name, level = unicodedata.normalize("NFC", name).strip(), unicodedata.normalize("NFC", level).strip()
    assume(name and level and name != "y" and not hidden_signs(name) and not name.startswith("__"))
    low, high = sorted(ends)
    rules = [Rule(name, "category", "String", "feature", True, levels=[level], n_levels=1), Rule("n", "number", "Float64", "feature", True, low, high),
             Rule("y", "category", "String", "target", True, levels=["a", "b"])]
    contract = Contract("y", "binary", ["a", "b"], "b", None, None, None, rules, [{"name": "z" + name, "role": "drop", "why": why}])
    frame = pl.DataFrame({name: [level] * 20, "n": [low, high] * 10, "y": ["a", "b"] * 10})
    assume(name not in ("n", "z" + name))
    read = parse_agreement(agreement_text(contract, frame, problem()), "shop.contract.yml")
    assert set(read.terms) == {name, "n", "y", "z" + name} and read.terms[name].levels == (level,) and read.terms["z" + name].why == why
    assert float(read.terms["n"].min or -math.inf) <= max(low, 0.0) and float(read.terms["n"].max or math.inf) >= min(high, 0.0)
    assert breaches(frame, {n: t.limits for n, t in read.terms.items()}).is_empty()


def test_a_proposal_binds_nobody_to_less_than_its_own_table() -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(150, 2500))
        table = binary(rng, n).with_columns(tiny=pl.Series(rng.lognormal(-8, 2, n)), year=pl.Series(rng.integers(1990, 2020, n)), day=pl.Series(rng.integers(0, 900, n)).cast(pl.Date),
                                            code=pl.Series(rng.integers(0, n, n)).cast(pl.String), note=pl.Series([f"some long text of many words {i}" for i in range(n)]))
        rows, kinds, unusable = read_as_declared(table, problem())
        contract = learn(rows, kinds, target_of(rows, problem()), problem(), unusable)
        written = parse_agreement(agreement_text(contract, rows, problem()), "shop.contract.yml")
        again, kinds, unusable = read_as_declared(table, problem(), written)
        second = learn(again, kinds, target_of(again, problem()), problem(), unusable, agreement=written)
        assert again.equals(rows) and second.features == contract.features
        enforce(rows.drop([row["name"] for row in second.left_out]), second)


def test_rare_and_personal_values_are_not_proposed() -> None:
    table = PEOPLE.with_columns(town=pl.Series(["kanarie-town" if i == 7 else "Linz" for i in range(400)]), mail=pl.Series([f"kanarie{i}@example.org" for i in range(400)]))
    shown = problem("comply: {pii: [mail]}")
    rows, kinds, unusable = read_as_declared(table, shown)
    text = agreement_text(learn(rows, kinds, target_of(rows, shown), shown, unusable), rows, shown)
    assert "kanarie" not in text and "mail: " in text and "Linz" not in text


def test_ten_thousand_columns_fit_into_a_file() -> None:
    rng = np.random.default_rng(0)
    table = pl.DataFrame(rng.normal(size=(60, 10_000)), schema=[f"x{i}" for i in range(10_000)]).with_columns(churned=pl.Series(["yes", "no"] * 30))
    rows, kinds, unusable = read_as_declared(table, problem())
    contract = learn(rows, kinds, target_of(rows, problem()), problem(), unusable)
    read = parse_agreement(agreement_text(contract, rows, problem()), "wide")
    assert len(read.terms) == 10_001 and set(read.terms["x77"].limits) == {"min", "max"}
    assert len(learn(*read_as_declared(table, problem(), read)[:2], target_of(rows, problem()), problem(), agreement=read).features) == 10_000


def test_a_wider_table_is_proposed_by_types_alone() -> None:
    rules = [Rule(f"x{i}", "number", "Float64", "feature", True, 0.0, 1.0) for i in range(13_000)]
    contract = Contract("y", "regression", [], None, None, None, None, rules)
    read = parse_agreement(agreement_text(contract, pl.DataFrame({f"x{i}": [0.0, 1.0] for i in range(13_000)}), problem()), "wide")
    assert len(read.terms) == 13_000 and read.terms["x77"].type == "number" and read.terms["x77"].limits == {}


def test_the_file_and_the_problem_file_must_not_contradict_each_other() -> None:
    with pytest.raises(InputError, match="says role: feature of column 'income', and data.columns of the problem file says outcome"):
        agreed(PEOPLE, Term("income", role="feature"), more="  columns: {income: {role: outcome}}")


def test_two_contracts_are_compared_by_what_they_ask() -> None:
    _, before = agreed(PEOPLE.drop("order"), Term("age", "number", min=0.0))
    _, after = agreed(PEOPLE, Term("age", "number", min=18.0, nullable=False))
    assert {row[:2] for row in compare_contracts(before, after).rows()} == {("age", "min"), ("age", "nullable"), ("order", "column")} or \
        {row[:2] for row in compare_contracts(before, after).rows()} == {("age", "min"), ("age", "nullable")}


# -- in the phase

def workplace(folder: Path, table: pl.DataFrame, more: str = "") -> Path:
    (folder / "settings.ini").write_text("[engine]\nthreads = 1\n")
    (folder / "params").mkdir(exist_ok=True)
    (folder / "params/shop.yml").write_text(PROBLEM.replace("MORE", more))
    table.write_csv(folder / "people.csv")
    return folder / "params/shop.yml"


def run_data(folder: Path, monkeypatch: pytest.MonkeyPatch, refused: str = "") -> Path:
    "The data phase in this process; `refused`: the sentence with which it must stop."
    monkeypatch.chdir(folder)
    if refused:
        monkeypatch.setenv("PILOTHOUSE_ENGINE", "a refused phase keeps no lock")
        with pytest.raises(InputError, match=refused) as refusal:
            execute(NOTEBOOK, "params/shop.yml", "outputs/shop/main")
        assert "\n" not in str(refusal.value)
        monkeypatch.delenv("PILOTHOUSE_ENGINE")
        return folder / "outputs/shop/main"
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook shows a no-go and does not raise it")
    execute(NOTEBOOK, "params/shop.yml", "outputs/shop/main")
    return folder / "outputs/shop/main"


def test_learned_written_edited_and_enforced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = workplace(tmp_path, PEOPLE)
    run = run_data(tmp_path, monkeypatch)
    assert json.loads((run / "02_data/contract.json").read_text())["agreed"] is None
    assert json.loads((run / "02_data/receipt.json").read_text())["absent"] == ["params/shop.contract.yml"]

    written = propose_agreement(file, load_settings(tmp_path))
    run_data(tmp_path, monkeypatch)
    contract = json.loads((run / "02_data/contract.json").read_text())
    assert contract["agreed"] == "shop.contract.yml" and records(run, "02_data", "answer")["verdict"] == "go"
    assert "params/shop.contract.yml" in json.loads((run / "02_data/receipt.json").read_text())["files"]

    lines = [line if not line.startswith("  age:") else "  age: {type: number, min: 0, max: 65, unit: years}" for line in written.read_text().splitlines()]
    written.write_text("\n".join(lines))
    run_data(tmp_path, monkeypatch, "column 'age' breaks shop.contract.yml: row .* which is above 65")
    assert not (tmp_path / "outputs/shop/main/.work/02_data/train.parquet").exists()      # refused before anything was saved


def test_a_contract_that_appears_makes_the_phase_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = workplace(tmp_path, PEOPLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PILOTHOUSE_ENGINE", "test")
    run = open_run("02_data", file, "outputs/shop/main")
    assert open_agreement(run) is None
    from pipeline.engine.freshness import _changed_files

    facts = type("F", (), {"root": tmp_path, "memory": None})()
    receipt = {"files": {}, "absent": ["params/shop.contract.yml"]}
    assert _changed_files(receipt, facts) == []  # type: ignore[arg-type]
    (tmp_path / "params/shop.contract.yml").write_text("contract: 1\ncolumns: {age: number}\n")
    assert _changed_files(receipt, facts) == ["file params/shop.contract.yml is new"] and open_agreement(run) is not None  # type: ignore[arg-type]


def test_a_reproduced_run_takes_the_contract_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = workplace(tmp_path, PEOPLE)
    written = propose_agreement(file, load_settings(tmp_path))
    run = run_data(tmp_path, monkeypatch)
    manifest = {"problem_text": file.read_text(), "problem_file": "params/shop.yml", "phases": {"02_data": {}}}
    again = run.with_name("again")
    again.mkdir()
    assert write_problem(run, again, manifest, tmp_path) == again / "problem.yml" and (again / written.name).read_bytes() == written.read_bytes()
    written.write_text(written.read_text() + "# changed\n")
    with pytest.raises(IntegrityError, match="params/shop.contract.yml is not what the run read"):
        write_problem(run, again, manifest, tmp_path)


UPSTREAM = {
    "renamed": (lambda f: f.rename({"income": "Income"}), "column 'income' is called 'Income' now"),
    "gone": (lambda f: f.drop("income"), "column 'income' is gone"),
    "new": (lambda f: f.with_columns(postcode=pl.lit("x")), "column 'postcode' is new"),
    "type": (lambda f: f.with_columns(income=pl.lit("high")), "column 'income' held numbers and holds texts now"),
    "twin": (lambda f: f.rename({"age": "аge"}), "looks the same and differs by U+0061 against U+0430"),
}


@pytest.mark.parametrize("kind", UPSTREAM)
def test_a_change_upstream_stops_the_run_and_is_told_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, words = UPSTREAM[kind]
    workplace(tmp_path, PEOPLE)
    run = run_data(tmp_path, monkeypatch)
    before = {path.name: path.read_bytes() for path in (run / "02_data").iterdir() if path.is_file()}
    change(PEOPLE).write_csv(tmp_path / "people.csv")
    for _ in range(3):
        run_data(tmp_path, monkeypatch, f"source 'people' changed.*{re.escape(words)}.*data.waive")
    assert {path.name: path.read_bytes() for path in (run / "02_data").iterdir() if path.is_file()} == before
    assert not list((run / ".work/02_data").glob("*.parquet")) and not list((run / ".work/02_data").glob("*.json"))
    events = [e for e in entries(tmp_path / "outputs/store") if e["event"].startswith("schema.")]
    assert len(events) == 1 and "column '" in events[0]["details"]["changes"]


def test_a_change_with_a_reason_goes_on_and_is_the_new_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace(tmp_path, PEOPLE)
    run_data(tmp_path, monkeypatch)
    workplace(tmp_path, PEOPLE.with_columns(postcode=pl.lit("x")), "  waive: [{check: schema, column: postcode, reason: asked for by the shop}]")
    run_data(tmp_path, monkeypatch)
    workplace(tmp_path, PEOPLE.with_columns(postcode=pl.lit("x")))
    run_data(tmp_path, monkeypatch)
    told = [e for e in entries(tmp_path / "outputs/store") if e["event"].startswith("schema.")]
    assert [e["event"] for e in told] == ["schema.accepted"] and told[0]["details"]["reason"] == "asked for by the shop"


def test_with_a_contract_the_contract_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = workplace(tmp_path, PEOPLE)
    run_data(tmp_path, monkeypatch)
    written = propose_agreement(file, load_settings(tmp_path))
    workplace(tmp_path, PEOPLE.with_columns(postcode=pl.lit("x")))
    run_data(tmp_path, monkeypatch, "source 'people': shop.contract.yml no longer describes the table: column 'postcode' is new")
    written.write_text(written.read_text() + "  postcode: {role: drop, why: not ours}\n")
    run_data(tmp_path, monkeypatch)
    written.write_text(written.read_text().replace("extra: refuse", "extra: ignore"))
    workplace(tmp_path, PEOPLE.with_columns(postcode=pl.lit("x"), another=1))
    run = run_data(tmp_path, monkeypatch)
    assert records(run, "02_data", "answer")["verdict"] == "go"


def test_a_changed_pin_is_told_once_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace(tmp_path, PEOPLE)
    for lock in ("polars==1.0.0\nnumpy==2.0\n", "polars==1.0.0\nnumpy==2.0\n", "polars==1.1.0 \\\n  --hash=sha256:00\nnumpy==2.0\n", "polars==1.1.0\nnumpy==2.0\n"):
        (tmp_path / "requirements.lock").write_text(lock)
        run_data(tmp_path, monkeypatch)
    told = [e["details"]["packages"] for e in entries(tmp_path / "outputs/store") if e["event"] == "packages.changed"]
    assert len(told) == 1 and len(told[0]) == 1 and told[0][0].startswith("polars 1.0.0 → 1.1.0")


# -- names

HOSTILE = {
    "composed and decomposed": ("caf\u00e9", "cafe\u0301", "decomposed"),
    "right to left": ("age", "e\u202ega", "U+202E"),
    "zero width": ("age", "a\u200bge", "U+200B"),
    "homoglyph": ("age", "\u0430ge", "U+0430"),
    "no-break space": ("due date", "due\u00a0date", "U+00A0"),
    "twice": ("age", "age", "2 columns are named 'age'"),
    "a pattern": ("age", "^a.*$", "pattern"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_names_that_no_reader_can_tell_apart_are_refused(kind: str, tmp_path: Path) -> None:
    one, other, words = HOSTILE[kind]
    (tmp_path / "t.csv").write_text(f"{one},{other},churned\n" + "1,2,yes\n3,4,no\n" * 20)
    with pytest.raises(InputError) as refusal:
        read_as_declared(read_table(tmp_path / "t.csv").frame, problem())
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_names_stay_what_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Signs that JSON, SQL and LightGBM's text format use, and letters of any script: the report shows them as they came."
    odd = {"age": 'größe "m"', "income": "c\\d", "region": "e:{f}[g], h", "member": "📦 <b>"}
    table = PEOPLE.drop("order").rename(odd)
    file = workplace(tmp_path, table)
    propose_agreement(file, load_settings(tmp_path))
    run = run_data(tmp_path, monkeypatch)
    contract = Contract.from_dict(json.loads((run / "02_data/contract.json").read_text()))
    assert contract.features == list(odd.values()) and contract.agreed
    train = pl.read_parquet(run / "02_data/train.parquet")
    schema = make_schema(contract.to_dict(), train)
    row = json.loads(json.dumps(table.drop("churned").row(3, named=True)))
    assert not check_rows([row], schema).refused and check_frame(table, schema).columns == contract.features


@given(names=st.lists(NAMES, min_size=2, max_size=5, unique=True))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_twins_look_alike_and_differ(names: list[str]) -> None:
    for one, other in twins(names):
        assert looks(one) == looks(other) and one != other and difference(one, other)
    assert looks(looks(names[0])) == looks(names[0])
    changes = compare_columns(dict.fromkeys(names[:-1], ""), dict.fromkeys(names[1:], ""))
    assert {c.what for c in changes} <= {"renamed", "gone", "new"} and compare_columns(dict.fromkeys(names, ""), dict.fromkeys(names, "")) == []


# -- targets

CELLS = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=4), st.sampled_from(["NaN", "inf", "1e999", "yes", "Yes", "yes ", "no", "é", "e\u0301"]))


@given(cells=st.lists(CELLS, min_size=1, max_size=12), task=st.sampled_from(["binary", "multiclass", "regression"]))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_target_is_sound_or_refused_in_one_sentence(cells: list[Any], task: Any) -> None:
    try:
        values = pl.Series("y", cells, strict=False)
    except (TypeError, pl.exceptions.PolarsError):
        assume(False)
    try:
        target = check_target(values, task)
    except InputError as error:
        assert "\n" not in str(error) and "'y'" in str(error) or "problem.positive" in str(error)
        return
    if task == "regression":
        assert all(math.isfinite(v) for v in target.values.drop_nulls()) and target.values.n_unique() >= 2 and not target.classes
    else:
        assert len(target.classes) >= 2 and set(target.values.drop_nulls()) == set(target.classes) == set(target.counts)
        assert not twins(target.classes) and (task != "binary" or target.positive == target.classes[-1])


@pytest.mark.parametrize("values", [[1.0, float("nan"), 0.0, float("inf")], ["1", "NaN", "0", "1e999"], ["1", "2", "inf", "3"], ["1", "0", "3", "1e999"]], ids=["floats", "texts", "words", "too large"])
def test_an_unreal_target_is_refused_with_its_rows(values: list[Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"target 'y' holds .* in \d of 4 rows \(first rows \d") as refusal:
        check_target(pl.Series("y", values), "regression")
    assert "leave cells without an outcome empty" in str(refusal.value)


def test_one_class_constants_and_empty_columns() -> None:
    table = PEOPLE.drop("order").with_columns(country=pl.lit("AT"), nothing=pl.lit(None, dtype=pl.Float64))
    rows, kinds, unusable = read_as_declared(table, problem())
    contract = learn(rows, kinds, target_of(rows, problem()), problem(), unusable)
    assert {row["name"]: row["role"] for row in contract.left_out} == {"country": "constant", "nothing": "empty"}
    with pytest.raises(InputError, match="one class only, 'yes'"):
        target_of(table.with_columns(churned=pl.lit("yes")), problem())
    assert check_target(pl.Series("y", [1, 2, 2] * 9), "binary").classes == ("2", "1")     # recorded by name; 1 and 2 are no probabilities


# -- heads of files

def test_the_head_of_a_large_file_tells_its_columns(tmp_path: Path) -> None:
    table = pl.concat([PEOPLE] * 60)
    for write, name in ((table.write_csv, "t.csv"), (table.write_parquet, "t.parquet"), (table.write_ndjson, "t.jsonl")):
        write(tmp_path / name)
        assert peek(tmp_path / name) == {"age": "numbers", "income": "numbers", "region": "texts", "member": "truth values", "churned": "texts", "order": "texts" if name == "t.parquet" else "numbers"}
    (tmp_path / "u16.csv").write_bytes("a;b\n1;ü\n".encode("utf-16"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no PAR1")
    assert peek(tmp_path / "u16.csv") == {"a": "numbers", "b": "texts"} and peek(tmp_path / "broken.parquet") == {}


def test_a_damaged_parquet_footer_is_left_to_its_reader(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    pl.DataFrame({"size": [1.0, 2.0], "kind": ["a", "b"]}).write_parquet(file)
    whole = file.read_bytes()
    assert peek(file) == {"size": "numbers", "kind": "texts"}
    told = 0
    for place in range(len(whole) - 4 - int.from_bytes(whole[-8:-4], "little"), len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1:])
        try:
            told += peek(file) == {}
        except InputError:    # a name that no longer is one
            continue
    assert told > 10
