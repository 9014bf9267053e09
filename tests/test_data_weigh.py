"What would spoil the weighing: a gain that is noise, a judge that is made up, an answer carried over, a near-copy that passes."
from __future__ import annotations

import datetime as dt
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import InputError
from pipeline.core.problem import Problem, Source, parse_problem, read_yaml
from pipeline.data.contract import Contract, Rule
from pipeline.data.sources import Table
from pipeline.data.splits import Parts, each_fold, take_apart
from pipeline.data.synthetic import LEAST, hold_made, learning_rows, make_rows, make_up, nearness, prove_unjudging, try_rows
from pipeline.data.targets import check_target
from pipeline.data.weigh import contribution, found_in, gain_of, keep_answers, open_bench, set_apart, source_of_rows, weigh

AGREED = {
    "binary": Contract("y", "binary", ["no", "yes"], "yes", None, None, None, []),
    "multiclass": Contract("y", "multiclass", ["a", "b", "c"], None, None, None, None, []),
    "regression": Contract("y", "regression", [], None, None, None, None, []),
}
FEATURES = [Rule("x0", "number", "Float64", "feature", False), Rule("x1", "number", "Float64", "feature", True), Rule("country", "category", "String", "feature", True),
            Rule("seen", "date", "Datetime", "feature", False), Rule("member", "bool", "Boolean", "feature", False), Rule("told", "text", "String", "feature", False)]


def agreed(task: str) -> Contract:
    c = AGREED[task]
    return Contract(c.target, c.task, c.classes, c.positive, None, None, None, [*FEATURES, Rule("y", "number" if task == "regression" else "category", "x", "target", True)])


def rows(n: int, seed: int, task: str = "binary", first: int = 0, noise: float = 0.0, timed: bool = False) -> pl.DataFrame:
    "A table of every kind of column; with `noise` outcomes of so many rows are thrown at random."
    rng = np.random.default_rng(seed)
    x, country = rng.normal(size=(n, 2)), rng.choice(["AT", "DE", "CH"], n)
    signal = x[:, 0] + (country == "DE") + rng.normal(0, .5, n)
    signal = np.where(rng.random(n) < noise, rng.permutation(signal), signal)
    y = {"binary": np.where(signal > .3, "yes", "no"), "multiclass": np.array(["a", "b", "c"])[np.digitize(signal, [-.3, .9])], "regression": signal}[task]
    frame = pl.DataFrame({
        "x0": x[:, 0], "x1": [None if rng.random() < .1 else float(v) for v in x[:, 1]], "country": country,
        "seen": [dt.datetime(2024, 1, 1) + dt.timedelta(hours=int(h)) for h in rng.integers(0, 9_000, n)], "member": rng.random(n) < .5,
        "told": [f"word {i} and {i * 7}" for i in range(n)], "y": y, "__row": np.arange(first, first + n), "__fold": (rng.integers(0, 3, n)).astype(np.int8),
    })
    return frame.with_columns(__time=pl.Series([dt.datetime(2024, 1, 1) + dt.timedelta(hours=i) for i in range(n)]), __fold=pl.Series((np.arange(n) * 4 // n - 1).astype(np.int8))) if timed else frame


def cut(train: pl.DataFrame, ordered: bool = False, folds: int = 3) -> Parts:
    return Parts(train=train, holdout=train.clear(), production=None, unlabelled=train.clear(), rule="time" if ordered else "random", why="", folds=folds, gap_days=0)


# -- sources

@pytest.mark.parametrize(("task", "metric"), [("binary", "roc_auc"), ("binary", "log_loss"), ("multiclass", "log_loss"), ("regression", "mae")])
def test_a_source_that_tells_helps_and_one_that_lies_hurts(task: str, metric: str) -> None:
    train = pl.concat([rows(400, 1, task), rows(1_200, 2, task, 400), rows(1_600, 3, task, 1_600, noise=1)])
    name = np.repeat(["own", "bought", "thrown"], [400, 1_200, 1_600])
    bench = open_bench(train, agreed(task), cut(train), metric, np.random.default_rng(0), may_judge=name == "own")
    sources = [Source(name=n, kind="csv", path="x.csv", licence=lic, cost=c) for n, lic, c in (("own", "own", 0.0), ("bought", "CC-BY-NC-4.0", 500.0), ("thrown", None, 10.0))]
    weighed, _ = weigh(bench, sources, {n: {"rows": name != n} for n in ("own", "bought", "thrown")}, {"own": 400, "bought": 1_200, "thrown": 1_600})
    found = {row["source"]: row for row in weighed.iter_rows(named=True)}
    assert found["bought"]["finding"] == "helps" and found["bought"]["cost_per_percent"] > 0 and found["bought"]["gain"] > 0 > found["thrown"]["gain"]
    assert found["thrown"]["finding"] == "hurts" and found["thrown"]["cost_per_percent"] is None
    assert not found["bought"]["allowed"] and not found["thrown"]["allowed"] and found["own"]["allowed"]
    assert all(row["low"] <= row["gain"] <= row["high"] for row in found.values()) and len(bench.judged) == 400


def test_a_source_of_copies_shows_no_gain() -> None:
    said = []
    for seed in range(6):
        own = rows(300, seed).with_columns(__row=pl.int_range(300))
        copies = own.sample(60, with_replacement=True, seed=seed).with_columns(__row=pl.int_range(300, 360))
        train = pl.concat([own, copies])
        bench = open_bench(train, agreed("binary"), cut(train), "roc_auc", np.random.default_rng(0), may_judge=(train["__row"] < 300).to_numpy())
        answers = keep_answers(bench, {"all": {}, "0": {"rows": (train["__row"] < 300).to_numpy()}})
        said.append(found_in(gain_of(answers, "roc_auc", ["no", "yes"], "all", "0")))
    assert said.count("no gain shown") >= 5


def test_a_weighing_repeats_itself_whatever_the_threads() -> None:
    train = pl.concat([rows(300, 1), rows(300, 2, first=300)])
    way = {"all": {}, "0": {"rows": (train["__row"] < 300).to_numpy()}}
    first, second = (keep_answers(open_bench(train, agreed("binary"), cut(train), "roc_auc", np.random.default_rng(0), threads), way) for threads in (1, 2))
    assert first.equals(second)


def test_one_class_without_a_source_is_answered_by_shares() -> None:
    train = pl.concat([rows(200, 1), rows(100, 2, first=200).with_columns(y=pl.lit("no"))])
    bench = open_bench(train, agreed("binary"), cut(train), "roc_auc", np.random.default_rng(0))
    answers = bench.answers(rows=(train["__row"] >= 200).to_numpy())
    assert (answers[:, 0] > .9).all() and len(np.unique(answers[:, 0])) <= 3
    with pytest.raises(InputError, match="two classes"):
        one = train.with_columns(y=pl.lit("no"))
        open_bench(one, agreed("binary"), cut(one), "roc_auc", np.random.default_rng(0))


JOINING = """
import polars as pl
from pipeline.core.errors import InputError
from pipeline.data.sources import read_table
def prepare(files):
    base = read_table(files["base"]).frame                                      # insists
    if "extra" in files:                                                        # accepts that it is missing
        base = base.join(read_table(files["extra"]).frame, on="k", how="left", maintain_order="left")
    if "stamps" not in files:
        raise InputError("problem joining needs a source named 'stamps'")
    base = base.join(read_table(files["stamps"]).frame, on="k", how="left", maintain_order="left").with_columns(twice=pl.col("s") * 2)
    return pl.concat([base, read_table(files["more"]).frame], how="diagonal_relaxed") if "more" in files else base
"""


def test_what_a_joined_source_contributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline.problems
    from pipeline.data.sources import prepare

    (tmp_path / "joining_for_a_test.py").write_text(JOINING)
    monkeypatch.setattr(pipeline.problems, "__path__", [*pipeline.problems.__path__, str(tmp_path)])
    k = np.arange(100)
    frames = {"base": pl.DataFrame({"k": k, "a": k * 1.5}), "extra": pl.DataFrame({"k": k[:60], "b": ["x", "y"] * 30}), "stamps": pl.DataFrame({"k": k, "s": k % 7}),
              "more": pl.DataFrame({"k": k[:30], "a": k[:30] * 1.0})}
    files = {}
    for name, frame in frames.items():
        frame.write_csv(tmp_path / f"{name}.csv")
        files[name] = tmp_path / f"{name}.csv"
    full = prepare("joining_for_a_test", files).frame
    assert contribution("joining_for_a_test", files, "extra", full) == {"lost": ["b"]}
    assert contribution("joining_for_a_test", files, "stamps", full) == {"lost": ["s", "twice"]}     # with what is made from it
    assert contribution("joining_for_a_test", {n: files[n] for n in ("base", "stamps")}, "base", prepare("joining_for_a_test", {n: files[n] for n in ("base", "stamps")}).frame) == "it brings the rows themselves"
    more = contribution("joining_for_a_test", files, "more", full)
    assert isinstance(more, dict) and more["rows"].tolist() == [True] * 100 + [False] * 30


# -- made-up rows

PROBLEM = """
problem: {{name: shop, statement: Which baskets will be returned within a month?, kpi: {{name: x, baseline: 0, target: 1, unit: ''}}, task: binary, target: y}}
data:
  sources:
    - {{name: own, kind: csv, path: own.csv, licence: own, cost: 0}}
    - {{name: bought, kind: csv, path: bought.csv, licence: CC-BY-4.0, origin: licensed, cost: 900}}
    - {{name: simulated, kind: csv, path: simulated.csv, licence: own, origin: synthetic, cost: 20}}
{data}
"""


def problem(data: str = "") -> Problem:
    return parse_problem(*read_yaml(PROBLEM.format(data=data)), "shop.yml")


@given(st.integers(0, 2**32 - 1), st.sampled_from(["random", "time", "group"]), st.integers(80, 300), st.integers(1, 80))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_no_made_up_row_ever_judges(seed: int, kind: str, n: int, simulated: int) -> None:
    rng = np.random.default_rng(seed)
    total = n + simulated
    frame = pl.DataFrame({"__row": np.arange(total), "t": np.arange(total) % 97 * 1.0, "g": rng.integers(0, 30, total).astype(str), "x": rng.normal(size=total),
                          "y": rng.choice(["a", "b", None], total, p=[.5, .4, .1]).tolist()})
    asked = problem({"time": "  time: t", "group": "  group: g", "random": ""}[kind])
    table = Table(frame.drop("__row"), origins=(("own", n // 2), ("bought", n - n // 2), ("simulated", simulated)))
    apart = set_apart(table, frame, check_target(frame["y"], "binary"), asked)
    parts = take_apart(apart.rows, apart.target, asked, rng)
    synthetic = set(range(n, total))
    assert not any(synthetic & set(part["__row"]) for part in parts.named().values()) and set(apart.numbers) == synthetic
    contract = Contract("y", "binary", ["a", "b"], "b", "t" if kind == "time" else None, "g" if kind == "group" else None, None,
                        [Rule("x", "number", "Float64", "feature", False), Rule("y", "category", "String", "target", True),
                         *([Rule("t", "number", "Float64", "time", False)] if kind == "time" else []), *([Rule("g", "category", "String", "group", False)] if kind == "group" else [])])
    try:
        made = make_up(parts.train, contract, .5, rng, before=-1 - total)
    except InputError:
        made = parts.train.clear()
    held = hold_made(apart.made["simulated"], parts, contract)
    assert set(-1 - held["__row"]) <= synthetic and (made["__row"] < -total).all()
    both = pl.concat([parts.train, held, made], how="diagonal_relaxed")
    assert both["__row"].is_unique().all() and prove_unjudging(parts, parts.train, pl.concat([held, made], how="diagonal_relaxed"), apart.numbers)["kept"].all()
    for train, valid in each_fold(both, parts.summary()):
        assert (both["__row"][valid] >= 0).all()
        fold = both["__fold"][valid].unique().item()
        assert not ((both["__fold"][train] == fold) & (both["__row"][train] < -total)).any()   # made from rows that judge
        if kind == "time":
            assert both["__time"][train].max() is None or both["__time"][train].max() < both["__time"][valid].min()   # type: ignore[operator]


def test_a_row_smuggled_into_the_holdout_is_counted() -> None:
    train = rows(300, 1)
    made = make_up(train, agreed("binary"), .3, np.random.default_rng(1), before=-300)
    smuggled = Parts(**{**cut(train).__dict__, "holdout": pl.concat([train.head(5), made.head(2)], how="diagonal_relaxed")})
    assert prove_unjudging(smuggled, train, made, np.array([3]))["found"].to_list()[:2] == ["1", "3"]


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
@pytest.mark.parametrize("timed", [False, True])
def test_made_up_rows_look_like_their_fold_and_repeat_nothing_rare(task: str, timed: bool) -> None:
    train = rows(1_200, 5, task, timed=timed).with_columns(
        country=pl.when(pl.int_range(pl.len()) == 7).then(pl.lit("the only one")).otherwise("country"), x0=pl.when(pl.int_range(pl.len()) == 8).then(1e6).otherwise("x0"))
    made = make_up(train, agreed(task), 1.0, np.random.default_rng(2), before=-1_200)
    assert made.height == pytest.approx(1_200, abs=4) and made.schema == train.select(made.columns).schema
    assert made["told"].null_count() == made.height and "the only one" not in made["country"].to_list() and made["x0"].max() < 1e5  # type: ignore[operator]
    assert made["x1"].null_count() / made.height == pytest.approx(.1, abs=.04)
    for fold in train["__fold"].unique():
        real, ours = train.filter(__fold=fold), made.filter(__fold=fold)
        for column in ("x1", "seen"):
            assert ours[column].min() >= real[column].min() and ours[column].max() <= real[column].max()  # type: ignore[operator]
        if timed:
            assert ours["__time"].min() >= real["__time"].min() and ours["__time"].max() <= real["__time"].max()  # type: ignore[operator]
        if task == "regression":
            both = [part.select(pl.corr("x0", "y", method="spearman")).item() for part in (real, ours)]
            assert abs(both[0] - both[1]) < .1
    rare = train["country"].value_counts().filter(pl.col("count") < LEAST)["country"]
    assert not set(rare) & set(made["country"].drop_nulls())


def test_a_table_too_wide_or_too_short_is_refused_in_a_sentence() -> None:
    wide = pl.DataFrame({f"c{i}": np.arange(60.) for i in range(600)}).with_columns(y=pl.lit("no"), __row=pl.int_range(60), __fold=pl.lit(0, pl.Int8))
    contract = Contract("y", "binary", ["no", "yes"], "yes", None, None, None, [*(Rule(f"c{i}", "number", "Float64", "feature", False) for i in range(600)), Rule("y", "category", "String", "target", True)])
    with pytest.raises(InputError, match="600 columns are too many"):
        make_rows(wide, contract, 10, np.random.default_rng(1))
    with pytest.raises(InputError, match="no fold has"):
        make_up(rows(30, 1), agreed("binary"), .5, np.random.default_rng(1))


def test_near_copies_are_told_from_new_rows() -> None:
    train, rng = rows(900, 3), np.random.default_rng(4)
    assert not nearness(rows(400, 4), train, agreed("binary"), rng)["too_near"]
    assert not nearness(make_up(train, agreed("binary"), .5, rng), train, agreed("binary"), rng)["too_near"]
    assert nearness(train.sample(300, seed=1), train, agreed("binary"), rng)["too_near"]
    jittered = train.sample(300, seed=2).with_columns(pl.col("x0") + rng.normal(0, 1e-3, 300))
    assert nearness(jittered, train, agreed("binary"), rng)["too_near"]


@pytest.mark.parametrize("n", [200, 900])
def test_rows_of_which_a_quarter_was_stolen_are_told_from_honest_ones(n: int) -> None:
    for seed in range(5):
        train, rng = rows(n, seed), np.random.default_rng(seed)
        honest = [make_up(train, agreed("binary"), 1.0, rng), rows(n, seed + 100)]
        stolen = pl.concat([train.sample(n // 4, seed=seed).with_columns(pl.col("x0") + rng.normal(0, 1e-3, n // 4)), rows(n - n // 4, seed + 200)])
        assert [nearness(made, train, agreed("binary"), rng)["too_near"] for made in (*honest, stolen)] == [False, False, True]


def test_a_fold_too_short_to_tell_a_moment_without_repeating_one_makes_no_row() -> None:
    short = rows(20, 1, "regression", timed=True).with_columns(__fold=pl.lit(0, pl.Int8))
    with pytest.raises(InputError, match="no fold has"):
        make_up(short, agreed("regression"), 2.0, np.random.default_rng(1))


@pytest.mark.parametrize(("task", "metric"), [("binary", "roc_auc"), ("multiclass", "log_loss"), ("regression", "mae")])
def test_made_up_rows_are_used_only_where_they_help(task: str, metric: str) -> None:
    train = rows(240, 6, task)
    mark = {"__row": -1 - pl.int_range(1_000, 1_000 + pl.len()), "__fold": pl.lit(-1, pl.Int8)}
    good, wrong = rows(1_500, 7, task).with_columns(**mark), rows(1_500, 8, task, noise=1).with_columns(**mark)
    copies = train.with_columns(**mark)
    tried, answers = try_rows(train, {"good": good, "wrong": wrong, "copies": copies, "none": good.clear()}, agreed(task), cut(train), metric, np.random.default_rng(1))
    used = dict(tried.select("rows", "used").iter_rows())
    assert used == {"good": True, "wrong": False, "copies": False, "none": False} and set(answers) == {"good", "wrong", "copies"}
    why = dict(tried.select("rows", "why").iter_rows())
    assert why["wrong"] == "it makes the answers worse" and why["copies"] == "too near to real rows" and "no row is left" in why["none"]
    sign = 1 if metric == "roc_auc" else -1
    by = {row["rows"]: row for row in tried.iter_rows(named=True)}
    assert sign * by["good"]["made_alone"] > sign * by["wrong"]["made_alone"] and by["good"]["low"] > 0 > by["wrong"]["gain"]


def test_a_source_of_made_up_rows_inside_a_join_is_refused() -> None:
    frame = pl.DataFrame({"__row": range(4), "y": ["a", "b", "a", "b"]})
    with pytest.raises(InputError, match="'simulated' is synthetic, but data.prepare"):
        set_apart(Table(frame), frame, check_target(frame["y"], "binary"), problem("  prepare: flights"))
    with pytest.raises(InputError, match="joined by a module"):
        source_of_rows(Table(frame), np.array([0]))


def test_copies_of_judging_rows_and_later_rows_are_left_out() -> None:
    train = rows(200, 1, timed=True)
    holdout = rows(50, 2, first=200).with_columns(__time=pl.lit(dt.datetime(2025, 1, 1)))
    made = pl.concat([rows(40, 3, timed=True), holdout.head(10).with_columns(__time=pl.lit(dt.datetime(2024, 1, 2))), rows(20, 4, timed=True).with_columns(__time=pl.lit(dt.datetime(2025, 6, 1)))],
                     how="vertical_relaxed").with_columns(__row=-1 - pl.int_range(pl.len()))
    held = hold_made(made, Parts(**{**cut(train, ordered=True).__dict__, "holdout": holdout}), agreed("binary"))
    assert held.height == 40


# -- the phase

def test_the_phase_weighs_three_sources_and_made_up_rows(project: Path, pilothouse: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    for name, n, seed, noise in (("own", 200, 1, 0), ("bought", 900, 2, 0), ("simulated", 900, 3, .7)):
        rows(n, seed, noise=noise).select("x0", "x1", "country", "member", "y").write_csv(project / f"{name}.csv")
    (project / "params/shop.yml").write_text(PROBLEM.format(data="  weigh: true\n  price_per_row: 2\n  synthetic: {rows_share: 0.5}\n  target_distribution: {country*member: {AT*true: 0.166, AT*false: 0.167, (other): 0.667}}"))
    done = pilothouse("run", "params/shop.yml", "--only", "data")
    folder = project / "outputs/shop/main/02_data"
    assert done.returncode == 0, done.stdout + done.stderr
    weighed = pl.read_parquet(folder / "weighed.parquet")
    assert set(weighed["source"]) == {"own", "bought", "simulated"} and weighed["gain"].null_count() == 0 and weighed["allowed"].all()
    assert weighed.filter(source="bought")["gain"].item() > 0
    tried = pl.read_parquet(folder / "synthetic_tried.parquet")
    assert set(tried["rows"]) == {"simulated", "generated"} and pl.read_parquet(folder / "synthetic_proof.parquet")["kept"].all()
    claims = {claim["name"] for claim in json.loads((folder / "claims.json").read_text())}
    assert {"gain_of_source_1", "gain_of_source_2", "gain_of_source_3", "made_up_rows_that_judge", "tstr_1", "tstr_2", "gain_of_made_up_rows_1"} <= claims
    decided = {decision["what"]: decision["chose"] for decision in json.loads((folder / "decisions.json").read_text())}
    assert decided["made-up rows"] == (", ".join(tried.filter("used")["rows"]) or "none")
    for part in ("train", "holdout"):
        numbers = pl.read_parquet(folder / f"{part}.parquet")["__row"]
        assert numbers.min() >= 0 and numbers.max() < 1_100  # type: ignore[operator]
    used = folder / "synthetic.parquet"
    assert used.exists() == bool(tried["used"].any()) and (not used.exists() or (pl.read_parquet(used)["__row"] < 0).all())
    checked = pilothouse("verify", "shop/main")
    assert checked.returncode == 0, checked.stdout + checked.stderr


class Kept:
    "As much of a run as learning needs."

    def __init__(self, **kept: Any) -> None:
        self.kept = kept
        self.settings, self.seed, self.problem = SimpleNamespace(threads=1, engine="local"), 7, problem()

    def has(self, name: str) -> bool:
        return name in self.kept

    def load(self, name: str) -> Any:
        return self.kept[name]

    def recorded(self, name: str) -> None:
        "Nothing is repeated here."

    def save(self, *_: Any) -> None: ...

    def require(self, *_: Any, **__: Any) -> None: ...


def test_training_learns_from_what_helped_and_never_validates_on_it() -> None:
    from pipeline.train.contest import open_contest

    train, contract = rows(300, 1), agreed("binary")
    made = make_up(train, contract, .5, np.random.default_rng(1), before=-300)
    kept = {"data/train": train, "data/contract": contract.to_dict(), "data/splits": cut(train).summary(), "scope/plan": {"metric": "roc_auc", "threshold": None, "families": ["dummy", "linear"]}}
    assert learning_rows(Kept(**kept), contract)["__row"].equals(train["__row"])  # type: ignore[arg-type]
    for more, extra in (({}, 0), ({"data/synthetic": made}, made.height)):
        contest = open_contest(Kept(**kept, **more))
        learned = {int(row) for fold, _ in contest.rows.folds for row in contest.frame["__row"].to_numpy()[fold]}
        assert contest.frame.height == 300 + extra and len([row for row in learned if row < 0]) == extra
        assert set(contest.frame["__row"].to_numpy()[contest.rows.valid]) == set(train["__row"])
