"""A rollout that lives in the database: it climbs, goes back, is killed, is steered by people, and only ever one leads it."""
from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.core import audit
from pipeline.core.errors import InputError, IntegrityError
from pipeline.deploy.package import Contents, release
from pipeline.deploy.registry import Registry
from pipeline.deploy.schema import make_schema
from pipeline.deploy.versions import REFUSED, Plan, point
from pipeline.rollout.canary import Rules
from pipeline.rollout.controller import Controller, Steering, describe
from pipeline.rollout.gather import Reading
from pipeline.rollout.state import EVENT
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting
from tests.servers.postgres import PASSWORD, postgres, programs

CONTRACT = {"target": "late", "task": "binary", "classes": ["no", "yes"], "positive": "yes", "features": ["hour"], "subject": "who", "columns": [
    {"name": "hour", "type": "number", "dtype": "Float64", "nullable": False, "min": 5.0, "max": 23.0},
    {"name": "who", "type": "category", "dtype": "String", "role": "subject"}, {"name": "late", "type": "category", "dtype": "String", "role": "target"}]}
RULES = Rules(stages=(5.0, 25.0, 100.0), windows_per_stage=2, worse_by=.02, outcome_delay=0)
READING = Reading("binary", ("no", "yes"), "yes", 2, 50.0, sticks="subject", paired=True)
CHANCES = np.random.default_rng(3).beta(2, 3, 200_000)


class World:
    "A service in arrays: it routes by the plan, both models score what the old one answers, outcomes come at once."

    def __init__(self, better: float = .1, errors: float = 0.0, outcomes: float = 1.0, lost: float = 0.0):
        self.better, self.errors, self.outcomes, self.lost = better, errors, outcomes, lost
        self.random, self.log, self.asked = np.random.default_rng(1), pl.DataFrame(), 0

    def serve(self, plan: Plan, requests: int = 1500) -> None:
        r, n = self.random, requests
        who = r.integers(0, 4000, n)
        trial = np.array([bool(plan.canary) and point(f"s{w}", plan.salt) * 100 < plan.share for w in who], dtype=bool)
        at = self.asked + np.arange(n)
        chance = CHANCES[at % len(CHANCES)]
        came = r.random(n) < chance
        noise = {1: .3, 2: .3 - self.better}
        kept = ~trial | (r.random(n) >= self.lost)
        parts = []
        for role, version, mask in (("canary", 2, trial & kept), ("live", 1, ~trial), ("shadow", 2, ~trial if plan.shadow else np.zeros(n, dtype=bool))):
            p = np.clip(chance + r.normal(0, noise[version], n), .01, .99)[mask]
            failed = r.random(len(p)) < (self.errors if version == 2 else 0)
            parts.append(pl.DataFrame({"request_id": [f"r{i}" for i in at[mask]], "row": 0, "version": version, "role": role, "status": np.where(failed, 500, 200), "ms": 1 + r.random(len(p)),
                                       "prediction": np.where(p > .4, "yes", "no"), "p_no": 1 - p, "p_yes": p, "subject": [f"s{w}" for w in who[mask]],
                                       "outcome": np.where(came[mask], "yes", "no"), "told": r.random(len(p)) < self.outcomes}))
        self.asked += n
        parts = [part for part in parts if len(part)]
        if not parts:
            return
        frame = pl.concat(parts)
        self.log = pl.concat([self.log, frame.with_columns(number=pl.int_range(len(self.log), len(self.log) + len(frame), dtype=pl.Int64))])

    def read(self, after: int, inputs: bool) -> pl.DataFrame:
        return self.log.filter(pl.col("number") > after)

    def hear(self, after: int) -> pl.DataFrame:
        return self.log.filter("told").with_columns(outcome_number=pl.col("number"), again=pl.lit(False)).filter(pl.col("outcome_number") > after)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A store with three released packages, to be copied."
    root = tmp_path_factory.mktemp("packages")
    hour = np.random.default_rng(5).uniform(5, 23, 200)
    model = train_model("trees", pl.DataFrame({"hour": hour}), (hour > 15).astype(int), CONTRACT, Fitting({"rounds": 3})).save(root / "trained")
    for i in range(3):
        release(root / "store", root / f"c{i}", "late", model, Contents(CONTRACT, make_schema(CONTRACT).to_dict(), {"threshold": 0.4}, [], {"name": "late"}, f"card {i}", {}))
    return root / "store"


def opened(packages: Path, place: Path, url: str = "") -> Registry:
    subprocess.run(["cp", "-r", str(packages), str(place / "store")], check=True)
    registry = Registry(place / "store", url)
    for folder in sorted((place / "store" / "models").iterdir()):
        registry.register(folder, "go", "late/main", by="ci")
    for version, states in ((1, ("staging", "canary", "production")), (2, ("staging",)), (3, ("staging",))):
        for state in states:
            registry.move("late", version, state, "a reason", by="ann")
    return registry


@pytest.fixture
def steering(packages: Path, tmp_path: Path) -> Iterator[Steering]:
    registry = opened(packages, tmp_path)
    yield Steering(registry)
    registry.close()


def begin(steering: Steering, rules: Rules = RULES, reading: Reading = READING, **more) -> None:
    steering.begin("late", reading.version, rules, reading, "better on validation", "ann", subject="who", review_s=0.0, **more)


class Counting(World):
    "How many rows each review was given."

    def __init__(self) -> None:
        super().__init__(better=.0)
        self.given: list[tuple[int, int]] = []

    def read(self, after: int, inputs: bool) -> pl.DataFrame:
        self.given.append((len(found := super().read(after, inputs)), 0))
        return found

    def hear(self, after: int) -> pl.DataFrame:
        found = super().hear(after)
        self.given[-1] = (self.given[-1][0], len(found))
        return found


def test_a_review_reads_what_is_new_and_one_window_back(steering: Steering) -> None:
    world = Counting()
    begin(steering, replace(RULES, worse_by=.001, windows_per_stage=50))       # it stays where it is
    leads = controller(steering, world)
    for _ in range(12):
        world.serve(steering.plans.current("late"), 400)
        leads.step()
    window = len(world.log) / 12
    assert len(world.given) == 12 and all(rows < 2.2 * window and heard < 1.2 * window for rows, heard in world.given[2:]), world.given
    state = steering.rollouts.active("late").state
    whole = world.log.unique("request_id", keep="first")
    assert state.outcomes == (world.log["role"] == "shadow").sum() and state.served == (world.log["role"] == "canary").sum()
    missed = whole["subject"].n_unique() - state.split.new - state.split.old
    assert missed < .5 * whole["subject"].n_unique(), "the split is counted from the review after the share has settled"
    assert len(json.dumps(steering.rollouts.active("late").facts)) < 50_000


def controller(steering: Steering, world: World, holder: str = "one") -> Controller:
    return Controller(steering, "late", world.read, world.hear, holder)


def follow(steering: Steering, world: World, most: int = 20, holder: str = "one") -> list:
    leads, decisions = controller(steering, world, holder), []
    while steering.rollouts.active("late") and len(decisions) < most:
        world.serve(steering.plans.current("late"))
        decisions.append(leads.step())
    return decisions


def live(steering: Steering) -> tuple[int, int | None, float]:
    "Versions that answer, and the share."
    plan, versions = steering.plans.current("late"), {e.digest: e.version for e in steering.registry.entries("late")}
    return versions[plan.live], versions.get(plan.canary), plan.share


@pytest.fixture(params=["sqlite", "postgresql"])
def anywhere(request: pytest.FixtureRequest, packages: Path, tmp_path: Path) -> Iterator[Steering]:
    if request.param == "sqlite":
        registry = opened(packages, tmp_path)
        yield Steering(registry)
        registry.close()
        return
    if programs() is None:
        pytest.skip("PostgreSQL is not installed here")
    os.environ["PGPASS"] = PASSWORD
    with postgres() as running:
        registry = opened(packages, tmp_path, running.url)
        yield Steering(registry)
        registry.close()
    del os.environ["PGPASS"]


def test_a_better_one_climbs_and_every_transition_has_its_numbers(anywhere: Steering) -> None:
    begin(anywhere)
    assert live(anywhere) == (1, 2, 5.0) and anywhere.registry.entry("late", 2).state == "canary"
    decisions = follow(anywhere, World())
    shares = [d.share for d in decisions]
    assert shares == sorted(shares) and set(shares) == {5, 25, 100} and all(shares.count(s) >= RULES.windows_per_stage for s in (5, 25, 100))
    assert anywhere.rollouts.current("late").status == "promoted" and live(anywhere) == (2, None, 0) and anywhere.registry.holder("late").version == 2
    events = anywhere.rollouts.events("late", looks=False)
    assert [e.event for e in events] == ["started", "advanced", "advanced", "promoted"] and [e.share for e in events] == [5, 25, 100, 100]
    for event in events[1:]:
        assert event.numbers["evidence_enough"] >= 1 / RULES.part and event.numbers["outcomes"] > 100 and "at most" in event.reason
    trail = [e["details"] for e in audit.entries(anywhere.registry.store) if e["event"] == EVENT]
    assert [d["event"] for d in trail] == ["started", "advanced", "advanced", "promoted"] and audit.verify(anywhere.registry.store)
    begun = time.monotonic()
    anywhere.back("late", "complaints since noon", "bob")      # from production, too
    assert time.monotonic() - begun < 5 and live(anywhere) == (1, None, 0) and anywhere.registry.holder("late").version == 1
    with pytest.raises(InputError, match="taken back already"):
        anywhere.back("late", "again")


@pytest.mark.parametrize("world, word", [({"better": -.5}, "worse by"), ({"errors": .2}, "errors")])
def test_a_worse_one_goes_back_while_few_see_it(steering: Steering, world: dict[str, float], word: str) -> None:
    begin(steering)
    decisions = follow(steering, World(**world))
    assert decisions[-1].decision == "roll back" and decisions[-1].share == 5 and word in decisions[-1].why
    assert live(steering) == (1, None, 0) and steering.registry.entry("late", 2).state == "staging"
    assert steering.rollouts.events("late")[-1].event == "rolled back" and steering.rollouts.current("late").status == "rolled back"
    begin(steering, reading=replace(READING, version=3))       # another one may be tried
    assert live(steering) == (1, 3, 5.0)


class Repeating(World):
    "All callers send one and the same request id."

    def serve(self, plan: Plan, requests: int = 1500) -> None:
        super().serve(plan, requests)
        self.log = self.log.with_columns(request_id=pl.lit("x"))


def test_callers_who_repeat_a_request_id_hide_no_failure(steering: Steering) -> None:
    begin(steering)
    decisions = follow(steering, Repeating(errors=.2, outcomes=0.0), 3)
    assert decisions[-1].decision == "roll back" and decisions[0].new + decisions[0].old == 1500 and sum(d.new_errors for d in decisions) > 50


def test_without_shadow_subjects_are_compared(steering: Steering) -> None:
    begin(steering, Rules(stages=(50.0, 100.0), windows_per_stage=2, worse_by=.05, outcome_delay=0), replace(READING, paired=False, kpi="outcome"))
    decisions = follow(steering, World(better=-.6), 12)
    assert decisions[-1].decision == "roll back" and decisions[-1].outcomes <= 2000      # as many as there are subjects of either
    assert steering.rollouts.current("late").state.uplift.p > .05                        # the outcome itself is the same


@pytest.mark.parametrize("requests", [0, 12])
def test_little_traffic_is_never_promoted(steering: Steering, requests: int) -> None:
    begin(steering)
    world = World()
    leads = controller(steering, world)
    world.serve(steering.plans.current("late"), 40)
    for _ in range(6):
        world.serve(steering.plans.current("late"), requests)
        assert leads.step().decision == "hold"
    assert live(steering) == (1, 2, 5.0)


def test_a_share_that_nobody_saw_is_not_left(steering: Steering) -> None:
    "What the last share has shown may be enough for the next two: a quiet night is no evidence that it stands them."
    begin(steering)
    world = World()
    leads = controller(steering, world)
    while live(steering)[2] == 5:
        world.serve(steering.plans.current("late"))
        leads.step()
    for _ in range(6):
        night = leads.step()
    assert night.decision == "hold" and night.why == "0 requests at this share are too few to see that it answers them" and live(steering)[2] == 25
    world.serve(steering.plans.current("late"))
    assert leads.step().decision == "promote"


def test_outcomes_that_do_not_come_and_subjects_that_are_lost_hold_it(steering: Steering) -> None:
    begin(steering)
    few = follow(steering, World(outcomes=.3), 4)
    assert "outcomes have come" in few[-1].why and live(steering)[2] == 5
    steering.back("late", "another try")
    begin(steering, replace(RULES, stages=(50.0, 100.0)))
    world = World(lost=.5)
    lost = follow(steering, world, 4)
    assert "subjects were answered by the new model where 50 % were asked for" in lost[-1].why and lost[-1].decision == "hold"
    steering.hold("late", "the router lost them, it is mended", "bob")
    steering.resume("late", "count anew", "bob")
    world.lost = 0.0
    found = follow(steering, world, 3)
    assert not any("subjects" in d.why for d in found) and found[-1].decision == "promote"


def test_nothing_moves_forward_in_maintenance_and_a_clock_that_jumps_stops_nothing(steering: Steering) -> None:
    begin(steering, maintenance=["daily 03:00-04:00"])
    world, night, day = World(), dt.datetime(2030, 1, 2, 3, 30, tzinfo=dt.UTC), dt.datetime(2030, 1, 2, 12, tzinfo=dt.UTC)
    leads = controller(steering, world)
    for _ in range(4):
        world.serve(steering.plans.current("late"))
        last = leads.step(night)
    assert last.why.startswith("maintenance: daily 03:00-04:00") and live(steering)[2] == 5
    world.serve(steering.plans.current("late"))
    assert leads.step(night.astimezone(dt.timezone(dt.timedelta(hours=5, minutes=30)))).why == last.why      # half past nine in Delhi
    world.serve(steering.plans.current("late"))
    assert leads.step(day).decision == "promote"
    yesterday = controller(steering, world)                      # a new process, a clock that was set back, a review an hour
    assert yesterday._due(replace(steering.rollouts.active("late"), facts=steering.rollouts.active("late").facts | {"review_s": 3600.0}), day - dt.timedelta(days=1))


def test_people_hold_resume_and_promote(steering: Steering) -> None:
    begin(steering)
    world = World()
    steering.hold("late", "the fair is on", "bob")
    assert all(d.decision == "hold" and "held by bob: the fair is on" in d.why for d in follow(steering, world, 4)[-2:]) and steering.plans.current("late").hold
    seen = steering.rollouts.active("late")
    with pytest.raises(InputError, match="only a running one can be held"):
        steering.hold("late", "again")
    steering.resume("late", "the fair is over", "bob")
    with pytest.raises(InputError, match="is at revision .*: bob changed it .the fair is over"):
        steering.promote("late", "it looks good", "ann", revision=seen.revision)
    assert steering.promote("late", "it looks good", "ann").share == 25 == live(steering)[2]
    assert describe(steering.rollouts.active("late"))["why"] == "it looks good"
    assert steering.promote("late", "the owner wants it", "ann", whole=True).status == "promoted" and live(steering) == (2, None, 0)
    assert steering.rollouts.events("late")[-1].numbers["outcomes"] > 0


def test_a_failing_one_goes_back_even_while_it_is_held(steering: Steering) -> None:
    begin(steering)
    steering.hold("late", "the fair is on", "bob")
    assert follow(steering, World(errors=.3))[-1].decision == "roll back" and live(steering) == (1, None, 0)


# -- killed, raced, overtaken

class Killed(BaseException):
    "What kill -9 looks like from inside."


@pytest.mark.parametrize("where", ["before the row", "before the traffic", "before it is noted", "on the way back", "at the end"])
def test_killed_anywhere_another_one_ends_it_as_if_nothing_had_happened(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    registry = opened(packages, tmp_path)
    steering, world = Steering(registry), World(errors=.3 if where == "on the way back" else 0)
    begin(steering)
    target, name, after = {"before the row": (steering.rollouts, "change", lambda a, k: a[1] == "advanced"), "before the traffic": (steering.plans, "change", lambda a, k: k.get("share") == 25),
                           "before it is noted": (steering.rollouts, "planned", lambda a, k: live(steering)[2] == 25), "on the way back": (steering.rollouts, "change", lambda a, k: a[1] == "rolled back"),
                           "at the end": (steering.plans, "change", lambda a, k: k.get("live") == steering.rollouts.current("late").digest)}[where]
    real = getattr(target, name)

    def dies(*args, **kwargs):
        if after(args, kwargs):
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(target, name, dies)
    with pytest.raises(Killed):
        follow(steering, world)
    shares = {"before the row": 5, "before the traffic": 5, "before it is noted": 25, "on the way back": 0, "at the end": 100}
    assert live(steering)[2] == shares[where], "what was asked for last, never more"
    registry.close()
    registry = Registry(tmp_path / "store")
    steering = Steering(registry)
    second = controller(steering, world, "one")            # the same name: the lease goes on; another one waits for its end
    decision = second.step()
    if where == "on the way back":
        assert decision is None and steering.rollouts.current("late").status == "rolled back" and live(steering) == (1, None, 0)
    elif where == "at the end":
        assert decision is None and steering.rollouts.current("late").status == "promoted" and live(steering) == (2, None, 0) and registry.holder("late").version == 2
    else:
        assert decision.share == (5 if where == "before the row" else 25)
        follow(steering, world)
        assert steering.rollouts.current("late").status == "promoted"
        windows = [e.numbers["window"] for e in steering.rollouts.events("late") if "window" in e.numbers]
        assert windows == list(range(len(windows))), "no window counts twice, none is left out"
    registry.close()


def test_of_two_controllers_one_acts_and_the_other_takes_over(steering: Steering) -> None:
    begin(steering)
    world = World()
    one, two = controller(steering, world), controller(steering, world, "two")
    now = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
    for i in range(2):
        world.serve(steering.plans.current("late"))
        assert one.step(now + dt.timedelta(seconds=i)) is not None and two.step(now + dt.timedelta(seconds=i)) is None
    assert two.step(now + dt.timedelta(seconds=61 + i)) is not None and one.step(now + dt.timedelta(seconds=62 + i)) is None


def test_many_controllers_at_once_review_every_window_once(steering: Steering) -> None:
    begin(steering, replace(RULES, windows_per_stage=100))
    world = World()
    world.serve(steering.plans.current("late"))
    barrier, faults = threading.Barrier(4), []

    def race(i: int) -> None:
        mine = controller(Steering(steering.registry), world, "same" if i % 2 else f"c{i}")      # two even claim the same name
        barrier.wait()
        try:
            for _ in range(4):
                mine.step()
        except InputError as error:
            faults.append(error)

    threads = [threading.Thread(target=race, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    windows = [e.numbers["window"] for e in steering.rollouts.events("late") if e.event == "looked"]
    assert not faults and windows == list(range(len(windows))) and windows
    seen = steering.rollouts.active("late").state
    assert seen.served == sum(e.numbers["new"] for e in steering.rollouts.events("late") if e.event == "looked") == world.log.filter(pl.col("role") == "canary").height


def test_a_person_who_goes_back_during_a_review_wins(steering: Steering) -> None:
    begin(steering)
    world = World()
    follow(steering, world, 1)
    leads = controller(steering, world)
    read = leads.read

    def slow(after: int, inputs: bool) -> pl.DataFrame:
        steering.back("late", "complaints", "bob")
        return read(after, inputs)

    leads.read = slow
    world.serve(steering.plans.current("late"))
    assert leads.step() is None and live(steering) == (1, None, 0) and steering.rollouts.current("late").by == "bob"


@pytest.mark.parametrize("change, ends, share", [({"share": 1.0}, "held", 5.0), ({"share": 60.0}, "held", 5.0), ({"canary": None, "share": 0.0}, "rolled back", 0.0)])
def test_traffic_that_somebody_else_changed(steering: Steering, change: dict, ends: str, share: float) -> None:
    begin(steering)
    world = World()
    steering.plans.change("late", steering.plans.current("late").revision, "by hand", "eve", **change)
    world.serve(steering.plans.current("late"))
    controller(steering, world).step()
    seen = steering.rollouts.current("late")
    assert seen.status == ends and "by hand" in seen.reason and live(steering)[2] == share


def test_reviews_do_not_stand_in_the_way_of_an_operator(steering: Steering) -> None:
    "A page shows revision 2; while its reader thinks, reviews go on. Going back is not refused for that, but for another person's move it is."
    begin(steering)
    world = World(outcomes=0)      # nothing moves
    follow(steering, world, 1)
    seen = steering.rollouts.active("late").revision
    follow(steering, world, 2)
    assert steering.rollouts.active("late").revision == seen + 2
    assert steering.hold("late", "the fair is on", "bob", revision=seen).status == "held"
    with pytest.raises(InputError, match="bob changed it"):
        steering.back("late", "complaints", "ann", revision=seen)
    assert steering.back("late", "complaints", "ann", revision=steering.rollouts.active("late").revision).status == "rolled back"


def test_a_plan_that_was_written_again_does_not_speak_for_an_operator(steering: Steering) -> None:
    begin(steering)
    plan = steering.plans.current("late")
    steering.plans.change("late", plan.revision, "deployed again", "eve", live=plan.live)
    held = steering.hold("late", "the fair is on", "bob")
    assert (held.status, held.reason, held.by) == ("held", "the fair is on", "bob") and steering.plans.current("late").hold


@pytest.mark.parametrize("to, ends, now", [("production", "promoted", (2, None, 0)), ("retired", "aborted", (1, None, 0))])
def test_a_move_in_the_registry_is_followed(steering: Steering, to: str, ends: str, now: tuple) -> None:
    begin(steering)
    steering.registry.move("late", 2, to, "the owner wants it", "eve")
    assert controller(steering, World()).step() is None
    assert steering.rollouts.current("late").status == ends and live(steering) == now and steering.registry.entry("late", 2).state == to


def test_what_cannot_be_started_is_said(steering: Steering) -> None:
    with pytest.raises(InputError, match="answers everything already|is production"):
        begin(steering, reading=replace(READING, version=1))
    with pytest.raises(InputError, match="needs a reason"):
        steering.begin("late", 2, RULES, READING, " ", "ann")
    with pytest.raises(InputError, match="covers the whole week"):
        begin(steering, maintenance=["daily 06:00-18:00", "daily 18:00-06:00"])
    assert steering.rollouts.current("late") is None and steering.registry.entry("late", 2).state == "staging"
    begin(steering)
    with pytest.raises(InputError, match="v2 is on trial already; promote it or take it back"):
        begin(steering, reading=replace(READING, version=3))
    assert live(steering) == (1, 2, 5.0) and steering.registry.entry("late", 3).state == "staging"
    steering.back("late", "another one first")
    steering.registry.move("late", 3, "canary", "by hand", "eve")
    with pytest.raises(InputError, match="v3 is on trial already"):
        begin(steering)
    assert steering.rollouts.active("late") is None and live(steering) == (1, None, 0)


def test_an_older_version_is_tried_only_by_somebody_who_says_so(steering: Steering) -> None:
    steering.registry.move("late", 3, "canary", "tried", "eve")
    steering.plans.move("late", 3, "production", "better", "eve")
    with pytest.raises(IntegrityError, match="v2 is older than v3, which was in production"):
        begin(steering)
    assert steering.rollouts.current("late") is None and steering.plans.current("late") is None and steering.registry.entry("late", 2).state == "staging"
    steering.registry.move("late", 2, "canary", "v3 is too slow", "eve", downgrade=True)
    begin(steering)
    assert live(steering) == (3, 2, 5.0)


def test_a_start_that_somebody_thwarts_leaves_nothing_behind(steering: Steering, monkeypatch: pytest.MonkeyPatch) -> None:
    def quicker(*args, **kwargs):
        raise InputError("late v3 is on trial already")

    monkeypatch.setattr(steering.registry, "move", quicker)
    with pytest.raises(InputError, match="on trial already"):
        begin(steering)
    monkeypatch.undo()
    assert steering.rollouts.active("late") is None and steering.plans.current("late") is None and steering.rollouts.current("late").status == "aborted"
    begin(steering)
    assert live(steering) == (1, 2, 5.0)


# -- with the real log, a real process and a real kill -9

PROBLEM = {"problem": {"name": "late", "statement": "Will it be late, asked before it leaves?", "kpi": {"name": "late", "baseline": 0, "target": 1, "unit": ""}, "task": "binary", "target": "late"},
           "data": {"sources": [{"name": "t", "kind": "csv", "path": "t.csv"}]}, "monitor": {"outcome_delay_days": 0},
           "rollout": {"stages": [25, 100], "subject": "who", "days_per_stage": .0001, "review_minutes": .005, "worse_by": .02, "maintenance": [f"{dt.datetime.now(dt.UTC) + dt.timedelta(days=day):%a} 00:00-00:00" for day in range(2)]}}


def say(project: Path, *words: str) -> tuple[int, dict]:
    done = subprocess.run([sys.executable, "-m", "pipeline", "rollout", *words, "--json"], cwd=project, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}, timeout=120)
    return done.returncode, json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}


def test_a_question_that_the_database_does_not_answer_ends_no_controller(packages: Path, tmp_path: Path) -> None:
    from sqlalchemy import text

    steering, world, stop, said = Steering(opened(packages, tmp_path)), World(), threading.Event(), []
    begin(steering)
    world.serve(steering.plans.current("late"), 100)

    def renamed(before: str, after: str) -> None:
        with steering.registry.transaction("") as connection:
            connection.execute(text(f"alter table {before} rename to {after}"))

    def failed(why: str) -> None:
        said.append(why)
        renamed("away", "plans")

    renamed("plans", "away")
    controller(steering, world).run(stop, every_s=.01, told=lambda decision: stop.set(), failed=failed)
    assert len(said) == 1 and "the registry's database" in said[0] and "no such table: plans" in said[0]
    assert len(steering.rollouts.active("late").state.shares) == 1, "it reviews as soon as it is answered"


def test_the_way_back_waits_for_no_numerical_library() -> None:
    look = "import sys, pipeline.cli.verbs, pipeline.rollout.controller; print(sorted({'numpy', 'polars', 'pyarrow', 'lightgbm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, timeout=60).stdout.strip() == "[]"


def test_killed_at_25_percent_the_command_resumes_there(packages: Path, tmp_path: Path) -> None:
    from pipeline.deploy.inference_log import Layout, Recorder, note_outcomes

    (tmp_path / "outputs").mkdir()
    registry = opened(packages, tmp_path / "outputs")
    store = registry.store
    (tmp_path / "settings.ini").write_text("[outputs]\npath = outputs\n")
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "late.yml").write_text(json.dumps(PROBLEM))
    card = store / "models" / registry.entry("late", 2).digest / "card.md"
    signed = card.read_bytes()
    card.chmod(0o644)
    card.write_bytes(signed + b"!")
    code, told = say(tmp_path, "start", "late", "--version", "2", "--reason", "better on validation")
    assert code == 3 and "card.md" in told["error"] and Steering(registry).rollouts.current("late") is None, "no trial of a package that nobody would serve"
    card.write_bytes(signed)
    code, told = say(tmp_path, "start", "late", "--version", "2", "--reason", "better on validation")
    assert code == 0 and told["share"] == 25 and told["status"] == "running"
    plan = Steering(registry).plans.current("late")
    status = say(tmp_path, "status", "late")[1]
    assert status["refused"] == "" and status["live"] == 1
    audit.append(store, REFUSED, {"name": "late", "revision": plan.revision, "why": "model.txt differs"})
    assert say(tmp_path, "status", "late")[1]["refused"] == "model.txt differs"
    recorder = Recorder(store, "late", {v: Layout(("hour",), (), "who", ("no", "yes")) for v in (1, 2)}, interval=60, collects=False)
    random, outcomes = np.random.default_rng(0), []
    for i in range(1200):
        who, p = f"s{i % 900}", random.random()
        trial = point(who, plan.salt) * 100 < 25
        for version, role in ([(2, "canary")] if trial else [(1, "live"), (2, "shadow")]):
            answer = float(np.clip(p + random.normal(0, .3 if version == 1 else .05), 0, 1))
            recorder.add(time.time(), f"r{i}", version, role, 200, .5, json.dumps({"rows": [{"hour": 7.0, "who": who}]}).encode(),
                         json.dumps({"predictions": [{"prediction": "yes", "p": {"no": 1 - answer, "yes": answer}}]}).encode())
        outcomes.append({"request_id": f"r{i}", "row": 0, "value": "yes" if random.random() < p else "no"})
    recorder.close()
    note_outcomes(store, "late", outcomes, ["no", "yes"])
    run = [sys.executable, "-m", "pipeline", "rollout", "run", "late", "--json"]
    process = subprocess.Popen(run, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    line = process.stdout.readline()
    process.kill()
    process.wait()
    first = json.loads(line)
    assert first["share"] == 25 and first["decision"] == "hold" and first["new"] + first["old"] == 1200 and first["outcomes"] > 600, "it has learned, and waits for the end of maintenance"
    steering = Steering(registry)
    kept = steering.rollouts.active("late")
    assert kept.state.served == first["new"] and kept.share == 25 == live(steering)[2] and kept.holder
    registry.engine.connect().close()
    with registry.transaction("late") as connection:               # maintenance is over, and the lease of the dead one too
        facts = json.dumps({**kept.facts, "maintenance": []})
        connection.execute(steering.rollouts.rollouts.update().values(facts=facts, until=dt.datetime(2020, 1, 1)))
    process = subprocess.Popen(run, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    second = json.loads(process.stdout.readline())
    process.terminate()
    process.wait()
    assert second["share"] == 25 and second["window"] > first["window"] and second["outcomes"] == first["outcomes"] and second["new"] == 0, "nothing is counted again"
    begun = time.monotonic()
    code, told = say(tmp_path, "back", "late", "--reason", "the drill")
    assert code == 0 and told["status"] == "rolled back" and live(steering) == (1, None, 0) and time.monotonic() - begun < 30
    steering.plans.go_live("late", steering.plans.current("late").revision, registry.entry("late", 3).digest, "deployed in a hurry", "eve")
    (tmp_path / "params" / "late.yml").write_text("problem: {name: late, statment: broken}\n")
    code, told = say(tmp_path, "back", "late", "--reason", "the wrong one")
    assert (code, live(steering)[0]) == (0, 1), "a slip in the problem file stops no rollback"
    assert (told.get("status"), told["version"], told["state"], told["why"]) == (None, 1, "production", "rollback: the wrong one"), "not the old rollout's table"
    registry.close()


def test_somebody_who_is_quicker_with_the_traffic_does_not_end_the_controller(steering: Steering, monkeypatch: pytest.MonkeyPatch) -> None:
    "A killed one had moved the row and not the traffic; while another one catches up, a person changes the traffic."
    begin(steering)
    seen = steering.rollouts.active("late")
    steering.rollouts.change(seen, "advanced", "a killed one", "enough", state=replace(seen.state, stage=1))
    real, quicker = steering.plans.change, ["eve"]

    def change(name: str, revision: int, *told, **changes) -> Plan:
        if quicker:
            real(name, revision, "by hand", quicker.pop(), share=1.0)
        return real(name, revision, *told, **changes)

    monkeypatch.setattr(steering.plans, "change", change)
    world = World()
    world.serve(steering.plans.current("late"), 100)
    controller(steering, world).step()
    held = steering.rollouts.current("late")
    assert held.status == "held" and "by hand" in held.reason and live(steering)[2] == held.share == 5.0
