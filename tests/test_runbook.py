"The runbook has no gap, and what it says is carried out against a real service under load."
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import deploy_world as world
from pipeline.core import audit
from pipeline.core.errors import InputError
from pipeline.core.problem import Problem
from pipeline.data.contract import target_values
from pipeline.deploy.package import Contents
from pipeline.deploy.schema import make_schema
from pipeline.deploy.staging import as_rows
from pipeline.monitor.alerts import RULES, declare_rules
from pipeline.rollout.exercise import EVENT, EXERCISES, Exercise, Ground, carry_out
from pipeline.rollout.rig import Callers, Stage, served, set_stage
from pipeline.rollout.runbook import INCIDENTS, STEPS, as_text, make_runbook
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.model_validate(json.loads(world.problem_text("tiny", "binary")))


# -- no gaps

def test_each_alert_of_the_monitor_has_an_entry_of_its_severity() -> None:
    assert set(RULES) <= set(INCIDENTS)
    declared = declare_rules(.003, loss=.4, rise=.02, at_least=.6) + declare_rules(.003, at_most=.2)
    assert {r.name for r in declared} == set(RULES)
    for rule in declared:
        assert INCIDENTS[rule.name].severity == rule.severity, rule.name


def test_an_alert_without_an_entry_fails(problem: Problem) -> None:
    with pytest.raises(InputError, match="alert 'loss rizen' has no entry in the runbook; did you mean 'loss risen'"):
        make_runbook(problem, "tiny/main", [*RULES, "loss rizen"])


def test_every_entry_can_be_acted_on(problem: Problem) -> None:
    entries = make_runbook(problem, "tiny/main")
    assert all(e.owner and e.decides and e.within and e.steps and e.exercise in EXERCISES for e in entries)
    assert {e.exercise for e in entries} == set(EXERCISES), "an exercise that no incident needs, or the reverse"
    assert {step for i in INCIDENTS.values() for step in i.steps} == set(STEPS), "a step that no incident names"
    text = as_text(entries, "tiny")
    assert text.count("## ") == len(INCIDENTS) and "@" not in text and "rollout back tiny" in text


def test_every_command_of_the_runbook_exists(problem: Problem) -> None:
    import shlex

    import click
    import typer

    from pipeline.cli.verbs import app

    group = typer.main.get_command(app)
    commands = {s.command for e in make_runbook(problem, "tiny/main") for s in e.steps if s.command}
    for command in sorted(commands):
        words = shlex.split(command)[1:]
        found: click.Command = group
        while isinstance(found, click.Group):
            word = words.pop(0)
            assert word in found.commands, f"{command}: there is no {word!r}"
            found = found.commands[word]
        found.make_context(found.name, words)     # raises where an argument or option does not exist


# -- the drill

@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    "An old version live, a wrong one beside it, callers that keep asking."
    place = tmp_path_factory.mktemp("drill")
    frame, contract = world.rows("binary", 600), world.contract("binary")
    target = target_values(frame, contract)
    models = {"old": target, "wrong": 1 - target}
    folders = {called: train_model("trees", frame, y, contract, Fitting({"rounds": 5})).save(place / called) for called, y in models.items()}
    schema = make_schema(contract, frame)
    stage: Stage = set_stage(place, "tiny", folders, Contents(contract, schema.to_dict(), {"threshold": .4}, [], {}, "# Card", {}))
    bodies = [json.dumps({"rows": [row]}).encode() for row in as_rows(frame.head(200), schema.names)]
    with served(stage) as server, Callers(server, bodies) as callers:
        yield Ground(stage, server, callers, "old", "wrong")
    stage.close()


@pytest.fixture(scope="module")
def done(ground: Ground) -> dict[str, Exercise]:
    return {e.exercise: e for e in carry_out(ground)}


def test_every_exercise_is_passed_in_time(done: dict[str, Exercise]) -> None:
    assert list(done) == list(EXERCISES)
    for name in done:
        assert done[name].failed <= done[name].tolerated and done[name].asked > 5, done[name]
        assert done[name].wrong == 0 or done[name].seconds < 5, done[name]


def test_a_rollback_reaches_every_caller(done: dict[str, Exercise]) -> None:
    "Promised: one second. Machines of tests are slow, so five are asserted; the measured time is printed by the bench."
    for name in ("roll back", "production back"):
        assert 0 < done[name].seconds < 5 and done[name].failed == 0, done[name]


def test_what_is_damaged_or_lost_costs_nobody_else_an_answer(done: dict[str, Exercise], ground: Ground) -> None:
    assert done["bad model"].failed == 0 and "differs" in done["bad model"].told
    assert done["full disk"].failed == 0 and "the same workers" in done["full disk"].told
    assert done["lost worker"].failed <= ground.callers.threads


def test_the_timeline_stands_in_the_trail(done: dict[str, Exercise], ground: Ground) -> None:
    assert audit.verify(ground.stage.store) > 20
    entries = audit.entries(ground.stage.store)
    told: list[dict[str, Any]] = [e["details"] for e in entries if e["event"] == EVENT]
    assert [d["exercise"] for d in told] == list(EXERCISES) and all(d["asked"] for d in told)
    changed = [e["details"] for e in entries if e["event"] == "traffic.changed"]
    assert any(d["reason"] == "drill: roll back" and d["share"] == 0 for d in changed) and all(d["by"] == "drill" for d in changed)


def test_the_stage_is_not_the_projects_store(ground: Ground) -> None:
    assert Path(world.ROOT) not in ground.stage.store.resolve().parents
