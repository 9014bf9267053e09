"Planted leaks: eight kinds in five real tables and three made up, each found and named, and nothing else; waivers and stand-ins."
from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core import audit
from pipeline.core.errors import InputError
from pipeline.core.problem import Problem, parse_problem, read_yaml
from pipeline.data.contract import learn, read_as_declared, target_in, target_of
from pipeline.data.leaks import ROW_ORDER, find_leaks, find_proxies, known_too_late, means_of_target, roles_of, unwaived
from pipeline.data.splits import Parts, take_apart
from pipeline.data.twins import compared, crossing_twins, near_copies, twin_groups
from room_kit import execute, records
from tables import binary, multiclass, regression

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared/data"
REAL = ["adult", "diamonds", "electricity", "loans_rate", "us_accidents"]
MADE = ["shoppers", "plans", "houses"]
ROWS = 12_000


def problem_with(data: str, task: str = "binary", target: str = "y", rest: str = "") -> Problem:
    return parse_problem(*read_yaml(f"""
problem: {{name: toy, statement: A table with a leak planted in it., kpi: {{name: x, baseline: 0, target: 1, unit: ''}}, task: {task}, target: "{target}"}}
data: {{sources: [{{name: t, kind: csv, path: t.csv, licence: own}}], {data}}}
{rest}
"""), "toy.yml")


@dataclass(frozen=True)
class World:
    "A clean table and what is known of it."

    name: str
    frame: pl.DataFrame
    task: str
    target: str
    by: str                  # a column of some levels, for means of the target
    time: str | None = None
    extra: str = ""          # more of data.*

    @property
    def problem(self) -> Problem:
        rule = f"time: {self.time}" if self.time else "split: {kind: random}"
        return problem_with(f"{rule}{', ' if self.extra else ''}{self.extra}", self.task, self.target)

    @property
    def shown(self) -> np.ndarray:
        "The target as a number: itself, or whether it is the rarer of the two most frequent classes."
        if self.task == "regression":
            return self.frame[self.target].to_numpy().astype(float)
        counted = self.frame[self.target].value_counts(sort=True)[self.target]
        return (self.frame[self.target] == counted[1]).to_numpy().astype(float)


@cache
def world(name: str) -> World:
    rng = np.random.default_rng(3)
    if name in MADE:
        frame, task, target = {"shoppers": (binary(rng, 4000), "binary", "churned"), "plans": (multiclass(rng, 4000), "multiclass", "plan"),
                               "houses": (regression(rng, 4000), "regression", "price")}[name]
        frame = frame.with_columns(town=pl.Series(rng.choice([f"town {i}" for i in range(60)], frame.height)), height=pl.Series(rng.normal(170, 9, frame.height)))
        if name == "plans":
            frame = frame.with_columns(asked=pl.Series([dt.datetime(2022, 1, 1) + dt.timedelta(minutes=100 * i) for i in range(frame.height)]))
        return World(name, frame, task, target, "town", "asked" if name == "plans" else None)
    told = json.loads((SHARED / "meta.json").read_text())[name]
    frame = pl.read_parquet(SHARED / f"{name}.parquet").drop("__split")
    if told["time"] is None:     # the files of some are in an order of their own; diamonds, by price
        frame = frame.sample(min(ROWS, frame.height), shuffle=True, seed=3)
    else:
        frame = frame.gather_every(max(frame.height // ROWS, 1))
    by = {"adult": "occupation", "diamonds": "clarity", "electricity": "period", "loans_rate": "state", "us_accidents": "season_acc"}[name]
    return World(name, frame, told["task"], told["target"], by, told["time"])


def tables(*names: str) -> Any:
    "These tables as parameters; real ones are skipped where the data folder is missing."
    return pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.skipif(n not in MADE and not SHARED.is_dir(), reason="../shared/data is not there")) for n in names])


def investigate(frame: pl.DataFrame, problem: Problem) -> tuple[dict[str, str], pl.DataFrame, Parts]:
    "What the data phase finds: column -> verdict, the twins, the parts."
    rows, kinds, unusable = read_as_declared(frame, problem)
    target = target_of(rows, problem)
    parts = take_apart(rows, target, problem, np.random.default_rng(7))
    contract = learn(parts.train, kinds, target, problem, unusable)
    leaks = find_leaks(parts.train, parts.unlabelled, kinds, target_in(parts.train, target), roles_of(contract), problem, [parts.holdout, parts.production])
    twins = crossing_twins(parts.train, parts.holdout, {name: kind for name, (kind, _) in kinds.items()}, problem.problem.target, problem.data.time, None,
                           parts.ordered, np.random.default_rng(7), parts.twins)
    found = {row["column"]: row["verdict"] for part in (leaks, twins) for row in part.iter_rows(named=True) if row["verdict"]}
    return found, twins, parts


# -- the eight kinds: each gives back the spoilt table, the column to be named, and the problem to ask

Spoilt = tuple[pl.DataFrame, str, Problem]


def copy(w: World, rng: np.random.Generator) -> Spoilt:
    values = w.frame[w.target]
    spoilt = values * 3.0 + 2 if w.task == "regression" else pl.Series([f"code {hash_of(v)}" for v in values.cast(pl.String)])
    return w.frame.with_columns(outcome_code=spoilt), "outcome_code", w.problem


def noisy_copy(w: World, rng: np.random.Generator) -> Spoilt:
    values, n = w.frame[w.target], w.frame.height
    if w.task == "regression":
        spoilt = pl.Series(values.to_numpy() + rng.normal(0, 0.07 * float(values.std() or 0), n))  # type: ignore[arg-type]
    else:
        spoilt = pl.Series([f"code {hash_of(v)}" for v in values.cast(pl.String).zip_with(pl.Series(rng.random(n) > 0.04), values.cast(pl.String).sample(n, with_replacement=True, seed=5))])
    return w.frame.with_columns(second_look=spoilt), "second_look", w.problem


def post_outcome(w: World, rng: np.random.Generator) -> Spoilt:
    "A note that is filled in when a case is closed; some cases are open. Half of the notes are missing anyway."
    n = w.frame.height
    open_, noted = pl.Series(rng.random(n) < 0.06), pl.Series(rng.random(n) < 0.5)
    hours = pl.Series(rng.exponential(5, n))
    frame = w.frame.with_columns(pl.when(~open_).then(pl.col(w.target)).alias(w.target), closing_hours=pl.when(noted & ~open_).then(hours))
    return frame, "closing_hours", w.problem


def in_target_order(w: World, rng: np.random.Generator, disorder: float = 0.075) -> np.ndarray:
    "The rows sorted by their target, with some disorder."
    return np.argsort(pl.Series(w.shown).rank("average").to_numpy() / w.frame.height + rng.normal(0, disorder, w.frame.height))


def telling_id(w: World, rng: np.random.Generator) -> Spoilt:
    "Case numbers given out when cases were sorted, with some disorder."
    number = np.empty(w.frame.height, np.int64)
    number[in_target_order(w, rng)] = np.arange(w.frame.height) + 100_000
    return w.frame.with_columns(case=pl.Series([f"K-{i}" for i in number])), "case", w.problem


def row_order(w: World, rng: np.random.Generator) -> Spoilt:
    return w.frame[in_target_order(w, rng)], ROW_ORDER, w.problem


def target_mean(w: World, rng: np.random.Generator) -> Spoilt:
    "The mean of the target for each level, over all rows: plain, smoothed or without the row itself."
    y = pl.Series("y_", w.shown)
    group = pl.col(w.by)
    frame = w.frame.with_columns(y)
    sums, n = pl.col("y_").sum().over(group), pl.len().over(group)
    way = sum(map(ord, w.name)) % 3
    mean = [sums / n, (sums + 20 * float(y.mean() or 0)) / (n + 20), (sums - pl.col("y_")) / (n - 1)][way]  # type: ignore[arg-type]
    return frame.with_columns(level_rate=mean).drop("y_"), "level_rate", w.problem


def future_moment(w: World, rng: np.random.Generator) -> Spoilt:
    "When the case was settled. Tables without a time are given one that says nothing."
    n, time = w.frame.height, w.time
    frame = w.frame
    if time is None:
        order = rng.permutation(n)
        frame, time = frame.with_columns(asked=pl.Series([dt.datetime(2022, 1, 1) + dt.timedelta(minutes=30 * int(i)) for i in order])), "asked"
    if frame.schema[time] == pl.Datetime:
        frame = frame.with_columns(settled=pl.col(time) + pl.duration(hours=pl.Series(rng.integers(1, 200, n))))
    else:
        reach = 40 if frame[time].n_unique() > 100 else 1
        frame = frame.with_columns(settled=pl.col(time) + pl.Series(rng.integers(0, reach + 1, n)))
    return frame, "settled", replace(w, time=time).problem


def near_duplicates(w: World, rng: np.random.Generator) -> Spoilt:
    "A tenth of the rows recorded again, one cell changed; where rows have a time, later."
    again = w.frame.sample(fraction=0.1, seed=11)
    cells = [c for c in w.frame.columns if c not in (w.target, w.time)]
    which = rng.integers(0, len(cells), again.height)
    again = again.with_columns(again[c].zip_with(pl.Series(which != i), w.frame[c].sample(again.height, with_replacement=True, seed=i)) for i, c in enumerate(cells))
    if w.time:
        late = w.frame[w.time].sort()[int(w.frame.height * 0.9):].sample(again.height, with_replacement=True, seed=1)
        again = again.with_columns(late.alias(w.time))
    return pl.concat([w.frame, again]).sample(fraction=1, shuffle=not w.time, seed=2), "(rows)", w.problem


def hash_of(text: str) -> str:
    return {chr(i + 48): c for i, c in enumerate("qwertzuiop")}.get(text, "".join(chr((ord(c) * 7) % 26 + 97) for c in text))


KINDS: dict[str, Callable[[World, np.random.Generator], Spoilt]] = {
    "copy": copy, "noisy copy": noisy_copy, "post-outcome": post_outcome, "id": telling_id, "row order": row_order, "target mean": target_mean,
    "future moment": future_moment, "near duplicates": near_duplicates,
}


@pytest.mark.parametrize("kind", KINDS)
@tables(*REAL, *MADE)
def test_a_planted_leak_is_named_and_nothing_else(name: str, kind: str) -> None:
    frame, column, problem = KINDS[kind](world(name), np.random.default_rng(17))
    found, twins, parts = investigate(frame, problem)
    assert set(found) == {column}, found
    if kind == "near duplicates" and not parts.ordered:     # seen, and kept on one side
        assert parts.twins > 0.05 * frame.height and twins["rows"][0] < 0.02 * parts.holdout.height
    else:
        assert found[column] == ("look" if kind == "row order" else "leak")


@tables(*REAL, "compas", "gss_wages", *MADE)
def test_a_clean_table_raises_no_alarm(name: str) -> None:
    if name in ("compas", "gss_wages"):
        told = json.loads((SHARED / "meta.json").read_text())[name]
        frame = pl.read_parquet(SHARED / f"{name}.parquet").drop("__split")
        if name == "compas":
            frame = frame.with_columns(pl.col("compas_screening_date").str.to_datetime())
        found, _, _ = investigate(frame, problem_with(f"time: {told['time']}", told["task"], told["target"]))
    else:
        found, _, _ = investigate(world(name).frame, world(name).problem)
    assert found == {}


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")
def test_the_file_of_the_diamonds_is_known_to_be_sorted_by_price() -> None:
    frame = pl.read_parquet(SHARED / "diamonds.parquet").drop("__split")
    assert investigate(frame, problem_with("split: {kind: random}", "regression", "price"))[0] == {ROW_ORDER: "look"}


@tables("adult", "loans_rate", "diamonds", "shoppers", "houses")
def test_an_entity_on_both_sides_is_named(name: str) -> None:
    "Three visits a customer, who keeps what he is while one thing changes."
    w, rng = world(name), np.random.default_rng(5)
    changing = [c for c in w.frame.columns if w.frame.schema[c].is_float() and c != w.target][:1] or [w.frame.columns[0]]
    visits = pl.concat([w.frame.head(1500).with_columns(pl.int_range(1500).alias("buyer"), w.frame[changing[0]].sample(1500, seed=i).alias(changing[0])) for i in range(3)])
    visits = visits.with_columns(stamp=pl.Series(rng.normal(size=4500)), weight=pl.Series(rng.normal(size=4500))).sample(fraction=1, shuffle=True, seed=1)
    found, twins, _ = investigate(visits, w.problem)
    assert found.get("buyer") == "leak", found
    grouped = problem_with("group: buyer", w.task, w.target)
    rows, kinds, _ = read_as_declared(visits, grouped)
    parts = take_apart(rows, target_of(rows, grouped), grouped, np.random.default_rng(7))
    plain = {column: kind for column, (kind, _) in kinds.items()}
    assert "buyer" not in crossing_twins(parts.train, parts.holdout, plain, w.target, None, "buyer", False, np.random.default_rng(7))["column"].to_list()


# -- what must not be taken for a mean of the target over these rows

@given(seed=st.integers(0, 2**32 - 1), groups=st.integers(5, 200), rows=st.sampled_from([500, 2000, 8000]), numbers=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_honest_rates_are_no_leak(seed: int, groups: int, rows: int, numbers: bool) -> None:
    rng = np.random.default_rng(seed)
    level, truth = rng.integers(0, groups, rows), rng.random(groups)
    draw = (lambda: rng.normal(truth[level], 0.5)) if numbers else (lambda: (rng.random(rows) < truth[level]).astype(float))
    y, past = draw(), draw()
    fold = rng.integers(0, 5, rows)
    frame = pl.DataFrame({"c": level, "y": y, "past": past, "fold": fold}).with_columns(
        truth=pl.Series(truth[level]), earlier=pl.col("past").mean().over("c"),
        out_of_fold=(pl.col("y").sum().over("c") - pl.col("y").sum().over("c", "fold")) / (pl.len().over("c") - pl.len().over("c", "fold")).clip(1),
        counted=pl.len().over("c").cast(pl.Float64), leaked=pl.col("y").mean().over("c"),
    )
    for honest in ("truth", "earlier", "out_of_fold", "counted"):
        assert means_of_target(frame, honest, y, ["c"]) == "", honest
    if rows / groups >= 20:
        assert means_of_target(frame, "leaked", y, ["c"])


@given(seed=st.integers(0, 2**32 - 1), columns=st.integers(4, 12), n=st.integers(400, 900))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_twins_are_found_wherever_the_cell_differs(seed: int, columns: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame({f"x{i}": rng.normal(size=n) if i % 3 else rng.integers(0, 50, n) for i in range(columns)})
    again = frame.head(5)
    cell = f"x{rng.integers(0, columns)}"
    again = again.with_columns((pl.col(cell) + 77).alias(cell))
    copies, near = near_copies(frame, again, compared(frame))
    groups = twin_groups(pl.concat([frame, again]), compared(frame))
    assert near.all() and not copies.any() and (groups[n:] == np.arange(5)).all() and (groups[:n] != np.arange(n)).mean() < 0.02
    strangers = pl.DataFrame({c: rng.permutation(frame[c].to_numpy()) for c in frame.columns})
    assert near_copies(frame, strangers, compared(frame))[1].mean() < 0.2


# -- known too late

def test_moments_decide_what_is_known_too_late() -> None:
    moments = "moments: [order, payment, delivery], decided_at: payment"
    columns = "columns: {a: {known_at: order}, b: {known_at: payment}, c: {known_at: delivery}, d: {role: outcome, known_at: delivery}}"
    assert known_too_late(problem_with(f"{moments}, {columns}")) == {"c": "delivery"}
    assert known_too_late(problem_with(f"decided_at: payment, {columns}")) == {"a": "order", "c": "delivery"}
    assert known_too_late(problem_with(columns)) == {}
    for wrong in ("moments: [order], decided_at: payment", f"{moments}, columns: {{a: {{known_at: payed}}}}"):
        with pytest.raises(InputError, match="data.moments does not name"):
            known_too_late(problem_with(wrong))


def test_a_column_that_is_known_later_fails_however_little_it_tells() -> None:
    frame = binary(np.random.default_rng(2), 2000).with_columns(weather=pl.Series(np.random.default_rng(3).normal(size=2000)))
    late = "moments: [order, delivery], decided_at: order, columns: {weather: {known_at: delivery}}, split: {kind: random}"
    rows, kinds, _ = read_as_declared(frame, problem_with(late, target="churned"))
    problem = problem_with(late, target="churned")
    target = target_of(rows, problem)
    assert unwaived(find_leaks(rows, rows.clear(), kinds, target, {}, problem)) == ["weather"]


# -- the gate, in a run

FILE = """
problem: {{name: shop, statement: Will this customer leave us?, kpi: {{name: x, baseline: 0, target: 1, unit: ''}}, task: binary, target: churned}}
data:
  sources: [{{name: t, kind: parquet, path: t.parquet, licence: own}}]
{data}
{rest}
"""


def run_phase(folder: Path, frame: pl.DataFrame, data: str, monkeypatch: pytest.MonkeyPatch, rest: str = "") -> dict[str, Any]:
    "The data phase on a table; its checks by title."
    (folder / "settings.ini").write_text("[engine]\nthreads = 1\n")
    (folder / "params").mkdir(exist_ok=True)
    frame.write_parquet(folder / "t.parquet")
    (folder / "params/shop.yml").write_text(FILE.format(data=data, rest=rest))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook shows a no-go and does not raise it")
    execute(ROOT / "nbs/phases/02_data.ipynb", "params/shop.yml", "outputs/shop/main")
    return {check["title"]: check for check in records(folder / "outputs/shop/main", "02_data", "checks")}


def waived(folder: Path) -> list[dict[str, Any]]:
    return [entry["details"] for entry in audit.entries(folder / "outputs/store") if entry["event"] == "finding.waived"]


def test_the_gate_names_twins_and_stand_ins_until_someone_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    frame = binary(rng, 900).with_columns(race=pl.Series(rng.choice(["a", "b"], 900)), height=pl.Series(rng.normal(size=900)))
    frame = frame.with_columns(area=pl.when(pl.col("race") == "a").then(100).otherwise(200) + pl.Series(rng.integers(0, 9, 900)))
    frame = pl.concat([frame.with_columns(pl.int_range(900).alias("buyer"), height=pl.Series(rng.normal(size=900))) for _ in range(3)]).sample(fraction=1, shuffle=True, seed=1)
    rest = "comply: {forbidden: [race]}"
    checks = run_phase(tmp_path, frame, "  split: {kind: random}", monkeypatch, rest)
    assert {title for title, check in checks.items() if check["verdict"] == "no-go"} == {"No twins stand on both sides of the split", "No feature stands in for a forbidden column"}
    assert "area for race" in checks["No feature stands in for a forbidden column"]["why"] and waived(tmp_path) == []
    answers = """  split: {kind: random}
  waive:
    - {check: twins, column: buyer, reason: each visit is decided by itself}
    - {check: proxy, column: area, reason: the law asks for the area}
    - {check: leak, column: age, reason: there is nothing to answer for}"""
    checks = run_phase(tmp_path, frame, answers, monkeypatch, rest)
    assert all(check["verdict"] in ("go", "not applicable") for check in checks.values())
    assert [(w["check"], w["column"], w["reason"]) for w in waived(tmp_path)] == [
        ("twins", "buyer", "each visit is decided by itself"), ("proxy", "area", "the law asks for the area")]


def test_a_waiver_lands_in_the_trail_and_needs_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = binary(np.random.default_rng(2), 900).with_columns(refund=pl.when(pl.col("churned") == "yes").then(1.0).otherwise(0.0))
    assert run_phase(tmp_path, frame, "  split: {kind: random}", monkeypatch)["No feature knows the outcome too early"]["verdict"] == "no-go"
    checks = run_phase(tmp_path, frame, "  split: {kind: random}\n  waive: [{check: leak, column: refund, reason: it is booked before the customer leaves}]", monkeypatch)
    assert checks["No feature knows the outcome too early"]["verdict"] == "go"
    trail = waived(tmp_path)
    assert [(w["check"], w["column"], w["reason"]) for w in trail] == [("leak", "refund", "it is booked before the customer leaves")] and "decides the target" in trail[0]["finding"]
    for reason in ("", "short"):
        with pytest.raises(InputError, match="reason"):
            problem_with(f"waive: [{{check: leak, column: refund, reason: '{reason}'}}]")


# -- stand-ins

@tables("adult", "us_accidents", "shoppers")
def test_a_stand_in_for_a_forbidden_column_is_named(name: str) -> None:
    w, rng = world(name), np.random.default_rng(4)
    hidden = {"adult": "race", "us_accidents": "Nautical_Twilight", "shoppers": "region"}[name]
    levels = w.frame[hidden].unique(maintain_order=True).to_list()
    code = pl.Series([levels.index(v) * 100.0 for v in w.frame[hidden]]) + pl.Series(rng.integers(0, 40, w.frame.height))
    frame = w.frame.with_columns(zip=code)
    problem = problem_with("split: {kind: random}", w.task, w.target, f"comply: {{forbidden: ['{hidden}']}}")
    rows, kinds, _ = read_as_declared(frame, problem)
    proxies = find_proxies(rows, kinds, [c for c in kinds if c != hidden], problem)
    assert proxies.filter(verdict="proxy")["column"].to_list() == ["zip"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")
def test_messages_that_were_sent_again_stay_on_one_side() -> None:
    "Of 5,171 different messages 76 repeat another one but for case, signs and numbers."
    frame = pl.read_parquet(SHARED / "sms_spam.parquet").drop("__split")
    text = next(c for c in frame.columns if c != "label")
    frame = frame.unique(text, maintain_order=True)
    found, twins, parts = investigate(frame, problem_with("split: {kind: random}", target="label"))
    assert parts.twins > 50 and twins["rows"][0] == 0
