"A search on a real cluster of two machines: the same trials and the same models as here, also where one of them is killed."
from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from player import play
from ray_kit import two_nodes
from test_train import ROOT, make_table
from test_train_search import a_plan, some_rows

from pipeline.core import cluster
from pipeline.core.errors import ClusterFault, EnvironmentFault
from pipeline.train.budget import CoreClock, Plan, Step
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.features import Encoder
from pipeline.train.final import Final, fit_finally
from pipeline.train.protocol import OutOfTime
from pipeline.train.search import Found, Goal, Rows, run_search
from pipeline.train.workers import Cluster, Here, Order, Workers

ROWS = some_rows(500)
LINEAR = Step("linear", "linear", {}, "full", 300, 0.1)
GOAL = Goal("roc_auc")


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Any, Any]]:
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        both = two_nodes()
        yield both
        import ray

        ray.shutdown()
        both[0].shutdown()


@pytest.fixture(scope="module")
def machines(nodes: tuple[Any, Any]) -> Iterator[str]:
    "The address; this process stays connected."
    cluster.connect(nodes[0].address)
    yield nodes[0].address


def the_plan(rows: Rows, budget: float = 4.0) -> Plan:
    plan = a_plan(rows, budget)
    return replace(plan, steps=(*plan.steps[:2], LINEAR, *plan.steps[2:5]))


def searched(who: Workers | None, seeds: tuple[int, ...] = (3, 4)) -> tuple[Found, Final]:
    found = run_search(ROWS, the_plan(ROWS), GOAL, 3, clock=lambda: 0.0, further=True, ensemble=True, workers=who)
    chosen = next(t for t in found.trials if t.name == "portfolio regular")
    final = fit_finally(chosen, found.named("trees") or chosen, ROWS, {}, Encoder(()), the_plan(ROWS), seeds, workers=who)
    return found, final


def same(one: tuple[Found, Final], two: tuple[Found, Final]) -> None:
    assert one[0].table().equals(two[0].table())
    for a, b in zip(one[0].trials, two[0].trials):
        assert a.answer is None and b.answer is None or np.array_equal(a.answer, b.answer)  # type: ignore[arg-type]
        assert [(m.steps, m.to_files()) for m in a.models] == [(m.steps, m.to_files()) for m in b.models]
    for model, other in zip((*one[1].seeds, one[1].default), (*two[1].seeds, two[1].default), strict=True):
        assert model.estimator.to_files() == other.estimator.to_files() and model.about == other.about


@pytest.fixture(scope="module")
def local() -> tuple[Found, Final]:
    return searched(None)


def test_two_machines_find_what_one_does_and_their_seconds_are_counted(local: tuple[Found, Final], machines: str) -> None:
    clock = CoreClock()
    who = Cluster(ROWS, address=machines, clock="core", book=clock.book)
    assert str(who) == "a Ray cluster, 2 machines and 2 cores, 2 fits at a time"
    there = searched(who)
    same(local, there)
    assert {"proposal 1", "ensemble", "linear"} <= {t.name for t in there[0].trials}
    spent = sum(t.cpu_s for t in there[0].trials) + there[1].costs["cpu_s"].sum()
    assert 0 < who.cpu_s < clock() and 0 < spent < clock()
    assert all(t.cpu_s > 0 for t in there[0].trials if t.status == "done")


def test_a_budget_that_ends_stops_candidates_and_keeps_the_floor(machines: str) -> None:
    who = Cluster(ROWS, address=machines, clock="core")
    spent = [0.0]

    def clock() -> float:
        return spent[0]

    who.book = lambda seconds: spent.__setitem__(0, spent[0] + 1.0)      # each fit takes a second
    found = run_search(ROWS, the_plan(ROWS, 7.0), GOAL, 3, clock=clock, further=True, workers=who)
    assert found.stopped_early and {found.named(name) is not None for name in ("dummy", "trees")} == {True}
    with pytest.raises(OutOfTime):     # the worker's own clock: no seconds are left
        who.fit(Order("trees", {"rounds": 50}, 1, 0, 300, 1), lambda: -1.0)


def test_what_a_candidate_raises_is_its_failure_and_what_the_cluster_raises_ends_the_search(machines: str) -> None:
    broken = Step("portfolio broken", "portfolio", {"num_leaves": 1}, "full", 300, 0.1)
    plan = replace(the_plan(ROWS), steps=(*the_plan(ROWS).steps[:2], broken))
    here, there = (run_search(ROWS, plan, GOAL, 3, clock=lambda: 0.0, workers=who) for who in (None, Cluster(ROWS, address=machines)))
    assert here.table().equals(there.table()) and there.trials[-1].status == "failed" and "LightGBM" in there.trials[-1].error
    other = Cluster(ROWS, address=machines)
    other._told = (other._told[0], "0" * 16)
    with pytest.raises(ClusterFault, match="another version of this project.*install the same on every machine"):
        run_search(ROWS, plan, GOAL, 3, clock=lambda: 0.0, workers=other)


def test_a_search_that_goes_on_orders_only_what_is_missing(local: tuple[Found, Final], machines: str, tmp_path: Any) -> None:
    kept = Checkpoints(tmp_path)
    half = replace(the_plan(ROWS), steps=the_plan(ROWS).steps[:4])
    run_search(ROWS, half, GOAL, 3, checkpoints=kept, clock=lambda: 0.0)
    asked: list[str] = []
    who = Cluster(ROWS, address=machines)
    begin = who._begin
    who._begin = lambda order, left: (asked.append(order.key), begin(order, left))[1]  # type: ignore[method-assign, func-returns-value]
    found = run_search(ROWS, the_plan(ROWS), GOAL, 3, checkpoints=kept, clock=lambda: 0.0, workers=who)
    assert len(asked) == 2 * 3 and sum(t.resumed for t in found.trials) == 4 * 3
    assert found.table().equals(local[0].table().head(found.table().height))


PROBLEM = """
problem: {name: small, statement: Will it be so and so in this test?, kpi: {name: k, baseline: 0, target: 1, unit: x}, task: regression, target: ziel}
data: {sources: [{name: s, kind: csv, path: s.csv}]}
train: {budget_s: 60, clock: core, seeds: 2, families: [dummy, linear, trees, portfolio]}
"""


def test_the_phase_on_a_cluster_saves_what_it_saves_here(machines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.core.run import open_run
    from pipeline.scope.plan import derive_plan

    frame, target, contract = make_table("regression", 200)
    frame = frame.with_columns(ziel=pl.Series(target.tolist()), __row=pl.int_range(pl.len(), dtype=pl.Int64), __fold=(pl.int_range(pl.len()) % 3).cast(pl.Int8))
    shutil.copytree(ROOT / "nbs/phases", tmp_path / "nbs/phases")
    (tmp_path / "params").mkdir()
    (tmp_path / "params/small.yml").write_text(PROBLEM)
    (tmp_path / "settings.ini").write_text("[engine]\nthreads = 1\n")
    monkeypatch.chdir(tmp_path)
    where = {"problem": "params/small.yml", "run": "outputs/small/main"}
    for room, saved in (("01_scope", {"scope/plan": None}), ("02_data", {"data/train": frame, "data/contract": contract, "data/splits": {"kind": "random", "ordered": False, "folds": 3, "gap_days": 0.0}})):
        phase = open_run(room, **where)
        for name, value in saved.items():
            phase.save(name, derive_plan(phase.problem) if value is None else value)
        phase.conclude("ok")
        phase.finish()
    shutil.copytree(tmp_path / "outputs/small/main", tmp_path / "outputs/small/ray")
    play(tmp_path / "nbs/phases/04_train.ipynb", **where)
    (tmp_path / "settings.ini").write_text(f"[engine]\nname = ray\naddress = {machines}\nthreads = 1\n")
    shown: list[Any] = []
    play(tmp_path / "nbs/phases/04_train.ipynb", shown=shown, **(where | {"run": "outputs/small/ray"}))
    assert "a Ray cluster, 2 machines and 2 cores" in " ".join(str(s._repr_html_()) for s in shown if hasattr(s, "_repr_html_"))
    assert not cluster.is_connected(), "the phase leaves the cluster when its models are fitted"
    receipts = [json.loads((tmp_path / f"outputs/small/{run}/04_train/receipt.json").read_text()) for run in ("main", "ray")]
    assert [r["engine"] for r in receipts] == ["local", "ray"] and receipts[0]["elsewhere_s"] == 0 < receipts[1]["elsewhere_s"] < receipts[1]["cpu_s"]
    here, there = (receipt["outputs"] for receipt in receipts)
    assert {"train/model", "train/trials", "train/seed_models", "train/validation"} <= set(here) == set(there)
    assert [name for name in here if here[name]["sha256"] != there[name]["sha256"] and not here[name]["timing"]] == []


def test_a_machine_that_dies_costs_time_and_nothing_else(local: tuple[Found, Final], nodes: tuple[Any, Any], machines: str) -> None:
    ray, who = cluster.connect(machines), Cluster(ROWS, address=machines)
    long = [Order("trees", {"rounds": 4000, "patience": 4000}, 1, fold, 300, 1) for fold in (0, 1)]
    taken: list[str] = []
    tasks: list[Any] = []

    class Killing:
        "Kills the second machine when five answers are taken and both machines are at work."

        cpu_s = 0.0
        ahead, close = staticmethod(who.ahead), staticmethod(who.close)

        @staticmethod
        def fit(order: Order, left: Any, checkpoint: Any = None) -> Any:
            taken.append(order.key)
            if len(taken) == 5:
                tasks.extend(who._work.remote(who._there, one, 1, "wall", math.inf, *who._told) for one in long)
                until = time.monotonic() + 60
                while ray.available_resources().get("CPU", 0) and time.monotonic() < until:
                    time.sleep(0.02)
                assert not ray.wait(tasks, num_returns=1, timeout=0)[0], "the long fits ended before the machine was killed"
                nodes[0].remove_node(nodes[1], allow_graceful=False)
            return who.fit(order, left, checkpoint)

    same(local, searched(Killing()))
    assert len(taken) > 10
    for one, task in zip(long, tasks, strict=True):
        assert cluster.fetch(ray, task, "a long fit").files == Here(ROWS).fit(one, lambda: math.inf)[0].to_files()


def test_without_an_address_ray_starts_on_this_machine_and_ends_with_the_search(nodes: tuple[Any, Any]) -> None:
    import ray

    ray.shutdown()
    try:
        who = Cluster(ROWS)
    except EnvironmentFault as error:
        if "timed out during startup" not in str(error):
            raise
        pytest.skip("this machine is too busy: Ray did not start within its own limit of 30 s, tried three times")
    order = Order("trees", {"rounds": 20}, 1, 0, 300, 1)
    try:
        assert str(who).startswith("a Ray cluster, 1 machine and ")
        assert who.fit(order, lambda: math.inf)[0].to_files() == Here(ROWS).fit(order, lambda: math.inf)[0].to_files()
    finally:
        who.close()
    assert not cluster.is_connected()


def test_an_engine_that_is_not_to_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(EnvironmentFault, match="without a token; unset it"):
        cluster.check_cluster()
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(EnvironmentFault, match="Ray, which is not installed"):
        cluster.connect("127.0.0.1:1")


def test_a_start_that_took_too_long_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    tried: list[dict[str, Any]] = []

    def slow(**given: Any) -> None:
        tried.append(given)
        if len(tried) < cluster.STARTS:
            raise RuntimeError("The current node timed out during startup. This could happen")

    monkeypatch.setattr(ray, "init", slow)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert cluster.connect() is ray and len(tried) == cluster.STARTS and tried[0]["address"] == "local"
    monkeypatch.setattr(cluster, "STARTS", 2)
    monkeypatch.setattr(ray, "init", lambda **given: (_ for _ in ()).throw(RuntimeError("The current node timed out during startup.")))
    with pytest.raises(EnvironmentFault, match="no Ray cluster answers at this machine: The current node timed out"):
        cluster.connect()
