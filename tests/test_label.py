"""Labels: planted errors found, versions that never change, queues within the budget, and the phase on every kind of table."""
from __future__ import annotations

import datetime as dt
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.core.errors import InputError
from pipeline.core.run import function_named, open_run, read_checks, read_claims
from pipeline.label.active import build_queue, pick_spread, share_queue
from pipeline.label.consensus import cohen_kappa, dawid_skene, krippendorff_alpha, majority
from pipeline.label.errors import confident_joint, error_rate, find_suspects, probabilities, signal
from pipeline.label.outcomes import comparable, missing_by_column, missing_share
from pipeline.core.intervals import wilson
from pipeline.label.quick import out_of_fold
from pipeline.label.versions import diff_versions, digest_labels, labels_of, list_versions, load_version, save_version
from player import play

ROOT = Path(__file__).resolve().parents[1]
NOON = dt.datetime(2026, 1, 5, 12, tzinfo=dt.UTC)


# -- errors


def table(task: str, rows: int = 900, seed: int = 7) -> tuple[pl.DataFrame, dict[str, Any]]:
    "A small table whose target follows two of its columns, and its contract."
    rng = np.random.default_rng(seed)
    x, shop = rng.standard_normal(rows), rng.choice(["north", "süd", "<b>"], rows)
    score = 2 * x + (shop == "süd") + 0.2 * rng.standard_normal(rows)
    target: Any = {"binary": np.where(score > 0, "yes", "no"), "multiclass": np.array(["a", "b", "c"])[np.digitize(score, [-1, 1])], "regression": score * 10}[task]
    frame = pl.DataFrame({"__row": range(rows), "__time": [dt.datetime(2026, 1, 1) + dt.timedelta(hours=i) for i in range(rows)],
                          "x": np.where(rng.random(rows) < 0.05, np.nan, x), "shop": shop, "who": [f"p{i % 50}" for i in range(rows)], "y": target}).with_columns(pl.col("x").fill_nan(None))
    classes = {"binary": ["no", "yes"], "multiclass": ["a", "b", "c"], "regression": []}[task]
    columns = [{"name": "x", "type": "number", "n_levels": rows}, {"name": "shop", "type": "category", "n_levels": 3}, {"name": "who", "type": "category", "n_levels": 50, "pii": True}]
    return frame, {"target": "y", "task": task, "classes": classes, "positive": "yes" if task == "binary" else None, "features": ["x", "shop", "who"],
                   "columns": columns, "time": "__time", "group": None, "subject": "who"}


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_planted_label_errors_are_found(task: str) -> None:
    frame, contract = table(task, 3000)
    rng = np.random.default_rng(1)
    wrong = rng.random(frame.height) < 0.05
    other = {c: contract["classes"][(i + 1) % len(contract["classes"])] for i, c in enumerate(contract["classes"])}
    spoilt = frame.with_columns(y=pl.when(pl.Series(wrong)).then(pl.col("y").replace(other)).otherwise("y"))
    scores = out_of_fold(spoilt, contract, np.random.default_rng(7))
    found = np.isin(np.arange(frame.height), find_suspects(scores)["__row"].to_numpy())
    assert found[wrong].mean() > 0.85 and wrong[found].mean() > 0.5
    assert error_rate(scores).value == pytest.approx(0.05, abs=0.04)
    clean = out_of_fold(frame, contract, np.random.default_rng(7))
    assert find_suspects(clean).height < found.sum() * 0.75


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(4, 200), k=st.integers(2, 5))
def test_the_joint_adds_up_and_suspects_are_never_the_best_guess(seed: int, n: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(k), n)
    given_ = rng.integers(0, k, n)
    joint = confident_joint(given_, p)
    assert np.allclose(joint.sum(axis=1), np.bincount(given_, minlength=k)) and (joint >= 0).all()
    names = [f"c{i}" for i in range(k)]
    scores = pl.DataFrame({"__row": range(n), "given": [names[i] for i in given_], **{f"p_{c}": p[:, i] for i, c in enumerate(names)}})
    suspects = find_suspects(scores)
    assert suspects["__row"].n_unique() == suspects.height
    best = {r: names[i] for r, i in enumerate(p.argmax(axis=1))}
    assert all(best[row] != label for row, label in suspects.select("__row", "given").iter_rows())
    assert 0 <= error_rate(scores).value <= 1
    assert probabilities(scores)[2] == names


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_mixed_up_labels_do_not_follow_the_columns(task: str) -> None:
    frame, contract = table(task, 900)
    mixed = frame.with_columns(y=frame["y"].shuffle(seed=3))
    chance = 0.0 if task == "regression" else 0.5
    assert signal(out_of_fold(frame, contract, np.random.default_rng(7))).low > chance + 0.2
    found = signal(out_of_fold(mixed, contract, np.random.default_rng(7)))
    assert found.low < chance + 0.05 and abs(found.value - chance) < 0.1


def test_a_group_never_stands_on_both_sides_of_a_fold() -> None:
    frame, contract = table("binary", 600)
    grouped = frame.with_columns(__group=pl.col("who"), x=pl.lit(0.0), shop=pl.lit("north"), y=pl.when(pl.col("__row") % 50 < 25).then(pl.lit("yes")).otherwise(pl.lit("no")))
    scores = out_of_fold(grouped, contract, np.random.default_rng(7))
    assert np.abs(scores["p_yes"] - 0.5).mean() < 0.35      # `who` decides, but nobody who is asked about was learned from


# -- versions


LABELS = st.lists(st.tuples(st.integers(0, 30), st.one_of(st.none(), st.sampled_from(["", "a", "b", "ä\n", "1:2", "-1"]))), max_size=12, unique_by=lambda t: t[0])


def labels(rows: list[tuple[int, str | None]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema={"__row": pl.Int64, "label": pl.String}, orient="row").sort("__row")


@settings(max_examples=200, deadline=None)
@given(before=LABELS, after=LABELS)
@example(before=[(1, None)], after=[(1, "")])
@example(before=[(1, "a\n2:1:b")], after=[(1, "a"), (2, "b")])
def test_equal_names_mean_equal_labels_and_the_difference_is_exact(before: list, after: list) -> None:
    a, b = labels(before), labels(after)
    assert (digest_labels(a) == digest_labels(b)) == a.equals(b)
    one, two = dict(before), dict(after)
    expected = {r for r in one | two if (r in one, one.get(r)) != (r in two, two.get(r))}
    assert set(diff_versions(a, b)["__row"]) == expected


def test_three_changed_labels_make_a_version_that_differs_in_those_three(tmp_path: Path) -> None:
    frame, contract = table("binary")
    first = labels_of(frame, "y")
    one = save_version(tmp_path, "shop", first, NOON)
    mended = first.with_columns(label=pl.when(pl.col("__row").is_in([3, 77, 500])).then(pl.lit("maybe")).otherwise("label"), annotator=pl.lit("ana"), at=pl.lit("2026-01-06"))
    two = save_version(tmp_path, "shop", mended, NOON + dt.timedelta(days=1))
    difference = diff_versions(load_version(tmp_path, "shop", one["id"]), load_version(tmp_path, "shop", two["id"]))
    assert difference["__row"].to_list() == [3, 77, 500] and set(difference["annotator"]) == {"ana"} and set(difference["at"]) == {"2026-01-06"}
    assert two["parent"] == one["id"] and load_version(tmp_path, "shop", one["id"]).equals(first)
    assert [v["id"] for v in list_versions(tmp_path, "shop")] == [one["id"], two["id"]]
    with pytest.raises(InputError, match="is not a name"):
        save_version(tmp_path, "../shop", first, NOON)
    with pytest.raises(InputError, match="not known"):
        save_version(tmp_path, "shop", first.head(5), NOON, parent="0000")


# -- outcomes


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 10_000), share=st.floats(0, 1))
def test_the_interval_of_a_share_holds_it(n: int, share: float) -> None:
    hits = round(share * n)
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n + 1e-12 and hits / n - 1e-12 <= high <= 1


def test_missing_by_chance_raises_no_alarm_in_nineteen_of_twenty_tables() -> None:
    frame, _ = table("binary", 1500)
    alarms = 0
    for seed in range(20):
        gone = pl.Series(np.random.default_rng(seed).random(frame.height) < 0.1)
        alarms += missing_by_column(comparable(frame.filter(~gone), frame.filter(gone)), ["x", "shop", "who"])["tells"].any()
    assert alarms <= 1


def test_a_random_split_is_weighted_back_to_all_labelled_rows() -> None:
    frame, _ = table("binary", 1000)
    share = missing_share(comparable(frame.head(480), frame.tail(400), labelled=600))
    assert share.value == pytest.approx(0.4)


# -- what to ask next


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(0, 60), many=st.integers(0, 80), strata=st.integers(1, 8))
def test_exactly_so_many_rows_are_picked_and_none_twice(seed: int, n: int, many: int, strata: int) -> None:
    rng = np.random.default_rng(seed)
    pool = pl.DataFrame({"__row": range(n), "uncertainty": rng.random(n), "stratum": [f"s{i}" for i in rng.integers(0, strata, n)]},
                        schema={"__row": pl.Int64, "uncertainty": pl.Float64, "stratum": pl.String})
    picked = pick_spread(pool, many)
    assert picked.height == min(n, many) and picked["__row"].n_unique() == picked.height
    if many >= pool["stratum"].n_unique():
        assert picked["stratum"].n_unique() == pool["stratum"].n_unique()


@settings(max_examples=100, deadline=None)
@given(many=st.integers(0, 500), suspects=st.integers(0, 500), unlabelled=st.integers(0, 500), reason=st.booleans())
def test_shares_add_up_and_never_ask_for_rows_that_are_not_there(many: int, suspects: int, unlabelled: int, reason: bool) -> None:
    shares = share_queue(many, suspects, unlabelled, reason)
    assert shares["suspect"] + shares["unlabelled"] + shares["hard"] == many
    assert 0 <= shares["suspect"] <= suspects and 0 <= shares["unlabelled"] <= unlabelled and shares["hard"] >= 0


def test_a_queue_holds_no_row_twice_even_when_everything_is_suspect() -> None:
    rng = np.random.default_rng(7)
    known = pl.DataFrame({"__row": range(100), "given": rng.choice(["a", "b"], 100), "p_a": rng.random(100)}).with_columns(p_b=1 - pl.col("p_a"))
    suspects = find_suspects(known)
    queue = build_queue(share_queue(80, suspects.height, 0, False), suspects, known, None, known.select("__row", stratum=pl.lit("all")))
    assert queue["__row"].n_unique() == queue.height and queue["rank"].to_list() == list(range(1, queue.height + 1))


# -- consensus


def test_consensus_by_hand() -> None:
    votes = pl.DataFrame([{"__row": r, "annotator": a, "label": v} for r, said in enumerate(["aab", "abb", "ab", "bbb"]) for a, v in zip("xyz", said)])
    told = majority(votes)
    assert told["label"].to_list() == ["a", "b", "a", "b"] and told["disputed"].to_list() == [False, False, True, False]
    assert told["share"].to_list() == pytest.approx([2 / 3, 2 / 3, 0.5, 1])
    assert cohen_kappa(["a", "a", "b", "b"], ["a", "b", "b", "b"]) == pytest.approx((0.75 - 0.5) / 0.5)
    # nominal alpha by hand: units aab, abb, ab, bbb; coincidences of unlike values 2·2/2 + 2·2/2 + 2·1/1 = 6 (both orders),
    # values a 4, b 7 of 11: expected 2·4·7/10 = 5.6
    assert krippendorff_alpha(votes) == pytest.approx(1 - 6 / 5.6)


def test_dawid_skene_beats_the_majority_where_people_differ_in_skill() -> None:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 3, 600)
    skill = [0.95, 0.9, 0.4, 0.4, 0.35]
    votes = pl.DataFrame([{"__row": i, "annotator": f"p{w}", "label": str(t if rng.random() < s else rng.integers(0, 3))} for w, s in enumerate(skill) for i, t in enumerate(truth)])
    right = truth.astype(str)
    found, people = dawid_skene(votes)
    assert (found["label"].to_numpy() == right).mean() > (majority(votes)["label"].to_numpy() == right).mean() + 0.02
    assert people["annotator"].to_list()[:2] in (["p0", "p1"], ["p1", "p0"])


# -- the phase, on every kind of table


Project = Callable[..., Path]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    "A project's root of its own, in which an earlier phase has saved a small table."

    def make(task: str, frame: pl.DataFrame, contract: dict[str, Any], unlabelled: pl.DataFrame | None = None, ordered: bool = False, **label: Any) -> Path:
        (tmp_path / "params").mkdir()
        (tmp_path / "nbs").mkdir()
        shutil.copy(ROOT / "settings.ini", tmp_path)
        shutil.copytree(ROOT / "nbs/phases", tmp_path / "nbs/phases")
        problem = {
            "problem": {"name": "small", "statement": "What will this row become?", "task": task, "target": "y", "kpi": {"name": "rows right", "baseline": 0, "target": 1, "unit": "share"}},
            "data": {"sources": [{"name": "rows", "kind": "csv", "path": "rows.csv"}]}, "label": {"queue": 40, **label},
        }
        (tmp_path / "params/small.yml").write_text(yaml.safe_dump(problem))
        monkeypatch.chdir(tmp_path)
        run = open_run("02_data", "params/small.yml", "outputs/small/main")
        run.save("data/train", frame)
        run.save("data/contract", contract)
        run.save("data/splits", {"kind": "time" if ordered else "random", "ordered": ordered, "folds": 3, "train": {"n": frame.height}, "holdout": {"n": 50}, "production": None})
        if unlabelled is not None:
            run.save("data/unlabelled", unlabelled)
        run.conclude("stand-in")
        run.finish()
        return tmp_path

    return make


def run_phase(root: Path) -> Path:
    play(root / "nbs/phases/03_label.ipynb", problem="params/small.yml", run="outputs/small/main")
    return root / "outputs/small/main/03_label"


@pytest.mark.parametrize("task, ordered, gone", [("binary", True, True), ("multiclass", False, True), ("regression", False, False), ("binary", False, False)])
def test_the_phase_answers_for_every_kind_of_table(project: Project, task: str, ordered: bool, gone: bool) -> None:
    frame, contract = table(task, 300)
    if not ordered:
        frame, contract = frame.drop("__time"), contract | {"time": None}
    unlabelled = frame.tail(60).with_columns(y=pl.lit(None, frame["y"].dtype)) if gone else None
    root = project(task, frame.head(240), contract, unlabelled, ordered)
    folder = run_phase(root)
    queue, tasks = pl.read_parquet(folder / "queue.parquet"), json.loads((folder / "tasks.json").read_text())
    assert len(tasks) == queue.height == 40 and all("who" not in t["data"]["row"] for t in tasks)
    assert ("unlabelled" in set(queue["kind"])) == gone
    version = json.loads((folder / "version.json").read_text())
    assert load_version(root / "outputs/store", "small", version["id"]).height == 240
    claims = {c.name: c for c in read_claims(folder)}
    assert {"share_without_outcome", "suspected_label_errors", "label_signal", "queue_cost"} <= set(claims)
    again = function_named(claims["suspected_label_errors"].by)(pl.read_parquet(folder / "scores.parquet"))
    assert again.value == claims["suspected_label_errors"].value
    assert {c.verdict for c in read_checks(folder)} <= {"go", "not applicable"}


def test_without_money_nothing_is_asked_and_the_phase_still_answers(project: Project) -> None:
    frame, contract = table("binary", 60)
    folder = run_phase(project("binary", frame, contract, budget=0.2, annotators=3))
    assert json.loads((folder / "tasks.json").read_text()) == []
    assert json.loads((folder / "decisions.json").read_text())[0]["chose"] == "none"
