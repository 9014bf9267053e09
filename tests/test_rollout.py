"""Routing that sticks, evidence that may be looked at, a controller that goes back and never jumps."""
from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deploy_world as world
from pipeline.core.errors import InputError
from pipeline.rollout.canary import TESTS, Look, Requests, Rules, State, consider, follow, from_frame, review, standing, start, to_frame
from pipeline.rollout.gather import Reading, gather
from pipeline.rollout.sequential import (
    Bet,
    Errors,
    Mean,
    Shift,
    Split,
    as_ratio,
    budget,
    confidence_sequence,
    count_answers,
    count_errors,
    count_kpi,
    count_subjects,
    matched,
    new_uplift,
    observe,
    place,
)
from pipeline.deploy.versions import Plan, Routing, point
from pipeline.rollout.traffic import in_slice, points, routed, split_table, subjects_of
from test_deploy_phase import checks, recomputed

STAGES = (1.0, 5.0, 25.0, 50.0, 100.0)


# -- traffic

@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30), st.text(min_size=1, max_size=80), st.floats(0, 100), st.floats(0, 100))
def test_a_subject_never_goes_back_while_the_share_grows(subject: str, salt: str, one: float, other: float) -> None:
    small, large = sorted([one, other])
    assert 0 <= point(subject, salt) < 1 and (not routed(subject, small, salt) or routed(subject, large, salt))


def test_shares_are_within_a_point_and_salts_differ() -> None:
    subjects = pl.Series([f"s{i % 30_000}" for i in range(100_000)])
    split = split_table(subjects, "flights-1", STAGES)
    assert split["off by"].abs().max() < 1 and not split["mismatch"].any()
    one, other = points(subjects.unique(), "flights-1"), points(subjects.unique(), "flights-2")
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.03


def test_a_broken_split_is_seen() -> None:
    uneven = pl.Series([f"s{i}" for i in range(20_000) if point(f"s{i}", "x") * 100 >= 5 or i % 3 == 0])
    assert split_table(uneven, "x", STAGES).filter(pl.col("stage") == 5)["mismatch"].item()


def test_nothing_outside_the_slice_takes_part() -> None:
    random = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "origin": [("JFK", "EWR", None)[i] for i in random.integers(0, 3, 100_000)],
            "who": [f"s{i}" for i in range(100_000)],
        }
    )
    inside = in_slice(frame, {"origin": "JFK"})
    assert set(frame.filter(pl.Series(inside))["origin"]) == {"JFK"} and (~inside).sum() == (frame["origin"].fill_null("") != "JFK").sum()
    with pytest.raises(InputError, match="did you mean 'origin'"):
        in_slice(frame, {"orgin": "JFK"})
    with pytest.raises(InputError, match="rollout.subject"):
        subjects_of(frame, "whom")


def test_the_service_itself_leaks_nobody_out_of_the_slice_and_keeps_each_subject() -> None:
    live, canary = object(), object()
    plan = Plan("late", "a" * 64, "b" * 64, share=25.0, slice={"origin": "JFK"}, subject="who", salt="late-2-1")
    on = {share: Routing(live, canary, replace(plan, share=share)) for share in STAGES}    # type: ignore[arg-type]
    answered: dict[float, set[int]] = {share: set() for share in STAGES}
    for i in range(100_000):
        home, away = {"who": f"id-{i}", "origin": "JFK"}, {"who": f"id-{i}", "origin": None if i % 2 else "EWR"}
        assert on[100.0].pick([away], f"r{i}")[0] is live, "a leak"
        if on[25.0].pick([home], f"r{i}")[0] is canary:
            answered[25.0].add(i)
            assert on[25.0].pick([home, away], f"r{i}")[0] is live, "a request with a row from outside"
            assert on[25.0].pick([{**home, "fare": i}], f"another {i}")[0] is canary, "a subject changed its version"
    for share in (s for s in STAGES if s != 25):
        answered[share] = {i for i in range(100_000) if on[share].pick([{"who": f"id-{i}", "origin": "JFK"}], "")[0] is canary} if share < 100 else set(range(100_000))
    assert all(answered[a] <= answered[b] for a, b in zip(STAGES, STAGES[1:]))
    assert all(abs(len(answered[share]) / 1000 - share) < 1 for share in STAGES)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["true", "True", "false", "5", "5.0", "05", "0", "1", "JFK", "None", "nan", ""]),
       st.one_of(st.lists(st.booleans() | st.none(), min_size=1), st.lists(st.integers(-2, 6) | st.none(), min_size=1),
                 st.lists(st.sampled_from([0.0, 1.0, 5.0, 5.5]) | st.none(), min_size=1), st.lists(st.sampled_from(["JFK", "True", "5", "None", ""]) | st.none(), min_size=1)))
def test_service_and_replay_see_the_same_slice(wanted: str, values: list) -> None:
    plan = Plan("late", "a" * 64, "b" * 64, share=100.0, slice={"field": wanted}, salt="x")
    routing = Routing("live", "canary", plan)    # type: ignore[arg-type]
    served = [routing.pick([{"field": value}], "r")[0] == "canary" for value in values]
    assert served == in_slice(pl.DataFrame({"field": values}), {"field": wanted}).tolist()
    assert not any(there for there, value in zip(served, values) if value is None)


# -- tests that may be looked at

def test_peeking_costs_nothing_at_the_worst_point_of_the_hypothesis() -> None:
    "Mean exactly at the bound, looked at after each of 600 values: the bet pays out in at most alpha; a naive z-test does not hold."
    bets, naive = 0, 0
    for seed in range(300):
        values = np.random.default_rng(seed).binomial(1, .3, 600).astype(float)
        bets += place(Bet(.3, False, .05), values).rejected
        n = np.arange(1, 601)
        z = (np.cumsum(values) / n - .3) / np.sqrt(.3 * .7 / n)
        naive += bool((z[30:] > 1.645).any())
    assert bets / 300 <= .05 and naive / 300 > .15


def test_the_confidence_sequence_covers_and_narrows() -> None:
    missed, widths = 0, []
    for seed in range(60):
        values = np.random.default_rng(seed).beta(2, 6, 800)
        for n in (30, 200, 800):
            low, high = confidence_sequence(values[:n], .05)
            missed += not low <= .25 <= high
            widths.append((n, high - low))
    assert missed <= 3
    assert np.mean([w for n, w in widths if n == 800]) < .06 < np.mean([w for n, w in widths if n == 30])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(.01, .99), st.booleans(), st.integers(0, 60))
def test_a_bet_stays_positive_and_resumes(values: list[float], m: float, below: bool, cut: int) -> None:
    array = np.array(values)
    whole = place(Bet(m, below, .05), array)
    parts = place(place(Bet(m, below, .05), array[:cut]), array[cut:])
    assert np.isfinite(whole.log_wealth) and whole.n == len(values)
    assert abs(whole.log_wealth - parts.log_wealth) < 1e-6 and abs(whole.best - parts.best) < 1e-6


@pytest.mark.parametrize("rate", [.001, .005, .02])
def test_equal_error_rates_alarm_within_the_budget(rate: float) -> None:
    alarms = 0
    for seed in range(300):
        random, state = np.random.default_rng(seed), Errors(.05)
        for _ in range(60):
            load = int(random.integers(200, 4000))       # a moving load alarms nobody
            state = count_errors(state, int(random.binomial(100, rate)), 100, int(random.binomial(load, rate)), load)
        alarms += state.rejected
    assert alarms / 300 <= .05


def test_four_times_the_errors_are_found_soon() -> None:
    looks = []
    for seed in range(100):
        random, state, look = np.random.default_rng(seed), Errors(.05), 0
        while not state.rejected and look < 100:
            look, state = look + 1, count_errors(state, int(random.binomial(100, .02)), 100, int(random.binomial(1900, .005)), 1900)
        looks.append(look)
    assert np.median(looks) <= 8 and max(looks) < 100


def test_a_running_mean_covers_at_every_look_and_resumes() -> None:
    missed = 0
    for seed in range(150):
        values, state = np.random.default_rng(seed).beta(2, 6, 600), Mean(.05)
        for part in np.array_split(values, 20):
            state = observe(state, part)
        missed += not state.low <= .25 <= state.high
        assert abs(observe(Mean(.05), values).low - state.low) < 1e-9
    assert missed / 150 <= .05 and state.high - state.low < .1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_matched_groups_use_everything_once(n: int, m: int) -> None:
    random = np.random.default_rng(n * 100 + m)
    new, old = random.random(n), random.random(m)
    found = matched(new, old)
    assert len(found) == min(n, m) and (np.abs(found) <= 1).all()
    if 0 < n <= m:
        assert found.mean() == pytest.approx(new.mean() - np.mean([g.mean() for g in np.array_split(old, n)]), abs=.2)
    assert len(matched(new, np.zeros(0))) == 0


def test_speed_that_moves_for_both_alarms_nobody_and_one_that_moves_for_one_does() -> None:
    "The speed rises threefold within each window; a third of the windows have hardly any traffic of the new model."
    alarms, found = 0, 0
    for seed in range(60):
        random, same, slow = np.random.default_rng(seed), Mean(.005), Mean(.005)
        for look in range(30):
            n, m = int(random.choice([3, 60, 300])), 900
            new, old = (np.linspace(0, np.log(3), k) + np.sin(look) + random.normal(0, .5, k) for k in (n, m))
            same, slow = observe(same, as_ratio(matched(new, old))), observe(slow, as_ratio(matched(new + np.log(1.6), old)))
        alarms += not same.low <= .5 <= same.high
        found += slow.low > as_ratio(np.array([np.log(1.25)]))[0]
    assert alarms <= 1 and found >= 57


def test_answers_that_move_within_what_is_tolerated_alarm_within_the_budget() -> None:
    alarms = 0
    for seed in range(40):
        random, state = np.random.default_rng(seed), Shift(.05, .2)
        for look in range(20):
            busy = int(random.integers(200, 1500))
            old = random.beta(2 + np.sin(look), 5, busy)                                # they change with the hour, for both
            new = np.where(random.random(60) < .2, .5, random.beta(2 + np.sin(look), 5, 60))   # one answer is given a fifth more often: the edge
            state = count_answers(state, new, old)
        alarms += state.rejected
    assert alarms / 40 <= .05


def test_lost_subjects_are_seen_and_none_where_none_are() -> None:
    held = 0
    for seed in range(200):
        random, fine, lossy = np.random.default_rng(seed), Split(.01, 10.0), Split(.01, 10.0)
        for _ in range(40):
            came = int(random.binomial(600, .1))
            fine, lossy = count_subjects(fine, came, 600 - came), count_subjects(lossy, int(random.binomial(came, .75)), 600 - came)
        held += fine.rejected
        assert lossy.rejected
    assert held / 200 <= .01


def refusals(seed: int, more: float = 0.0) -> tuple[Errors, Errors]:
    "Refusals of a rollout as `gather` counts them, and request by request; the new model refuses `more` of its requests than the old one would."
    r, salt, reading = np.random.default_rng(seed), f"salt{seed}", Reading("binary", ("no", "yes"), "yes", 2, sticks="subject")
    fair, naive, first, n, subjects = Errors(.05), Errors(.05), 0, 600, 400
    weight = 1 / np.arange(1, subjects + 1)
    for share in (5.0, 5.0, 5.0, 25.0, 25.0, 25.0, 50.0, 50.0):
        who = r.choice(subjects, n, p=weight / weight.sum())                    # few callers ask most
        stray = r.random(n) < .3                                                # whose they are nobody knows: always the old one's, and hardly ever wrong
        wrong = np.where(stray, r.random(n) < .002, (who * 7919 % 25 == 0) | (r.random(n) < .01))      # some callers are wrong every time
        trial = np.array([routed(f"s{w}", share, salt) for w in who]) & ~stray
        refused = wrong | (trial & (r.random(n) < more))
        log = pl.DataFrame({"number": first + np.arange(n), "request_id": [f"{first + i}" for i in range(n)], "row": 0, "version": np.where(trial, 2, 1),
                            "role": np.where(trial, "canary", "live"), "status": np.where(refused, 422, 200), "ms": 1.0, "prediction": "no", "p_no": .9, "p_yes": .1,
                            "subject": [None if s else f"s{w}" for s, w in zip(stray, who)]})
        look, reading, _ = gather(log, pl.DataFrame(), reading, RULES)
        fair = count_errors(fair, *look.refusals)
        naive = count_errors(naive, int(refused[trial].sum()), int(trial.sum()), int(refused[~trial].sum()), int((~trial).sum()))
        first += n
    return fair, naive


def test_callers_who_are_wrong_again_and_again_take_no_model_back() -> None:
    found = [refusals(seed) for seed in range(100)]
    assert sum(fair.rejected for fair, _ in found) <= 5 and sum(naive.rejected for _, naive in found) >= 30, "counted by requests most rollouts would go back for nothing"
    assert sum(refusals(seed, .2)[0].rejected for seed in range(20)) >= 18


def test_a_kpi_without_a_difference_is_significant_in_at_most_a_twentieth() -> None:
    wrong = 0
    for seed in range(120):
        random, state = np.random.default_rng(seed), new_uplift(.05, 1.0)
        for look in range(20):
            rate = .1 + .05 * np.sin(look)
            state = count_kpi(state, matched((random.random(80) < rate).astype(float), (random.random(300) < rate).astype(float)))
        wrong += state.p < .05 or not state.interval[0] <= 0 <= state.interval[1]
    assert wrong / 120 <= .05


def test_the_parts_of_the_budget_are_the_budget() -> None:
    assert sum(budget(RULES.alpha, TESTS).values()) == pytest.approx(RULES.alpha)
    state = start(RULES)
    used = [state.worse.alpha, state.errors.alpha, state.limit.alpha, state.latency.alpha, state.slower.alpha / 2, state.shift.alpha, state.refused.alpha]
    assert sum(used) == pytest.approx(RULES.alpha)
    shown = {row["test"]: row for row in standing(state, RULES)}
    assert sum(1 / row["boundary"] for row in shown.values() if row["does"] == "roll back" and row["boundary"]) == pytest.approx(RULES.alpha - state.slower.alpha / 2)


def test_errors_that_both_have_do_not_accuse_the_new_one() -> None:
    "An outage of what both need: a fifth of all requests fail, far more than the absolute limit."
    random, state, none = np.random.default_rng(0), start(RULES), np.zeros(0)
    for _ in range(20):
        failed, old = random.random(100) < .2, random.random(900) < .2
        state, decision = consider(state, Look(failed, old, none, none), RULES)
    assert decision.decision == "hold" and state.errors.new > 300
    alone, decision = consider(start(RULES), Look(random.random(400) < .2, np.zeros(0, dtype=bool), none, none), RULES)
    assert decision.decision == "roll back" and "are tolerated" in decision.why        # nobody to compare with: the absolute limit holds


def test_other_answers_go_back_only_while_no_outcome_says_that_they_are_right() -> None:
    random, none, ok = np.random.default_rng(0), np.zeros(0), np.zeros(200, dtype=bool)

    def looks(differences: np.ndarray) -> tuple[State, str]:
        state, rules = start(RULES), Rules(windows_per_stage=100, worse_by=.01)
        for _ in range(12):
            state, decision = consider(state, Look(ok[:50], ok, differences, none, answers=np.full(50, .9), old_answers=random.random(200)), rules)
            if decision.decision == "roll back":
                break
        return state, decision.why

    state, why = looks(none)
    assert state.status == "rolled back" and "some answers are given 50% of all requests more often" in why
    state, _ = looks(np.full(100, -.05))
    assert state.status == "running" and state.shift.rejected


# -- the controller

def traffic(
    mean: float,
    seed: int = 0,
    days: int = 30,
    daily: int = 1000,
    errors: float = 0.0,
    old_errors: float = 0.0,
    slow: float = 0.0,
    spread: float = 0.1,
) -> Requests:
    random = np.random.default_rng(seed)
    n = days * daily
    return Requests(np.repeat(np.arange(days), daily), random.random(n) * 100, np.clip(random.normal(mean, spread, n), -1, 1),
                    random.random(n) < errors, random.random(n) < old_errors, (random.random(n) < slow).astype(float))


RULES = Rules(windows_per_stage=4, worse_by=.01)


def test_an_equal_model_is_almost_never_rolled_back() -> None:
    outcomes = [follow(traffic(0, seed, daily=400, errors=.003, old_errors=.003), RULES).outcome for seed in range(200)]
    assert outcomes.count("roll back") / 200 <= RULES.alpha


def test_a_model_at_the_edge_of_what_is_tolerated_is_rolled_back_within_the_budget() -> None:
    outcomes = [follow(traffic(.01, seed, daily=400), RULES).outcome for seed in range(200)]
    assert outcomes.count("roll back") / 200 <= RULES.alpha and outcomes.count("promote") / 200 <= RULES.alpha


@pytest.mark.parametrize(
    "fault, word",
    [
        ({"mean": 0.06}, "worse by"),
        ({"mean": 0, "errors": 0.1}, "errors"),
        ({"mean": 0, "slow": 0.3}, "longer than the limit"),
    ],
)
def test_each_fault_is_rolled_back_and_named(fault: dict[str, float], word: str) -> None:
    for seed in range(20):
        course = follow(traffic(**fault, seed=seed), RULES)
        assert course.outcome == "roll back" and word in course.decisions[-1].why and course.state.served < 0.2 * 30_000
        assert course.state.stage == 0


def test_stages_are_climbed_one_by_one_and_last_their_time() -> None:
    course = follow(traffic(-.02), RULES)
    shares = [d.share for d in course.decisions]
    assert course.outcome == "promote" and list(dict.fromkeys(shares)) == list(STAGES)
    assert all(shares.count(s) >= RULES.windows_per_stage for s in STAGES)


@pytest.mark.parametrize("daily", [1, 5, 20])
def test_little_traffic_is_held_never_promoted(daily: int) -> None:
    assert follow(traffic(-.02, daily=daily), RULES).outcome == "hold"


def test_no_outcomes_no_promotion() -> None:
    silent = traffic(-.02)
    course = follow(
        Requests(
            silent.window,
            silent.place,
            np.full(len(silent.window), np.nan),
            silent.new_error,
            silent.old_error,
            silent.slow,
        ),
        RULES,
    )
    assert course.outcome == "hold" and course.state.stage == 0 and course.state.mean is None


@pytest.mark.parametrize("stop", [1, 5, 9, 13, 18])
def test_killed_at_any_stage_it_resumes_there(stop: int) -> None:
    whole = follow(traffic(-.02), RULES)
    first = follow(traffic(-.02), RULES, until=stop)
    kept = to_frame(first.state)
    second = follow(traffic(-.02), RULES, from_frame(kept))
    assert second.decisions[0].share == RULES.stages[first.state.stage] <= whole.decisions[stop].share
    assert first.decisions + second.decisions == whole.decisions


def test_a_finished_rollout_is_finished() -> None:
    course = follow(traffic(.2), RULES)
    with pytest.raises(InputError, match="rolled back"):
        review(course.state, traffic(.2), RULES)
    with pytest.raises(InputError, match="no rollout's state"):
        from_frame(pl.DataFrame({"state": ["{}"]}))
    assert from_frame(to_frame(State(**{**start(RULES).__dict__}))) == start(RULES)


# -- the phase

@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("busy")
    world.build(root, "binary", 60_000)
    return root


def test_a_better_model_gets_all_traffic(busy: Path) -> None:
    names = world.execute("07_rollout", busy)
    run = busy / "outputs" / "tiny" / "main"
    assert names["error"] is None and "Promoted to all traffic" in json.loads((run / "07_rollout" / "answer.json").read_text())["answer"]
    recomputed(run, "07_rollout")
    stages = pl.read_parquet(run / "07_rollout" / "stages.parquet")
    assert stages["share"].to_list() == list(STAGES) and set(stages["decision"]) == {"promote"} and stages["why"].str.len_chars().min() > 10
    assert pl.read_parquet(run / "07_rollout" / "false_alarms.parquet").height == 200
    drill = pl.read_parquet(run / "07_rollout" / "drill.parquet")
    assert drill.filter(pl.col("fault").str.contains("other requests|fails in"))["outcome"].to_list() == ["roll back"] * 2
    assert "tailnum" not in pl.read_parquet(run / "07_rollout" / "requests.parquet").columns


def test_a_worse_model_is_rolled_back(tmp_path: Path) -> None:
    from pipeline.core.run import open_run
    from pipeline.data.contract import target_values
    from pipeline.train.models import train_model
    from pipeline.train.protocol import Fitting

    run_folder = world.build(tmp_path, "binary", 40_000)
    with world.at(tmp_path):
        run = open_run("04_train", "tiny.yml", "outputs/tiny/main")
        train, contract = run.load("data/train"), run.load("data/contract")
        wrong = train_model("trees", train, 1 - target_values(train, contract), contract, Fitting({"rounds": 30}))
        right = train_model("trees", train, target_values(train, contract), contract, Fitting({"rounds": 30}))
        run.save("train/model", wrong.save(run.scratch / "a"))
        run.save("train/default", right.save(run.scratch / "b"))
        run.conclude("turned round")
        run.finish()
    names = world.execute("07_rollout", tmp_path)
    found = checks(run_folder, "07_rollout")
    assert names["error"].exit_code == 1 and found["No guardrail was hit"]["verdict"] == "no-go"
    answer = json.loads((run_folder / "07_rollout" / "answer.json").read_text())["answer"]
    assert answer.startswith("Rolled back at ") and "worse than the live model" in answer
    log = [json.loads(line) for line in (tmp_path / "outputs" / "store" / "audit.jsonl").read_text().splitlines()]
    assert log[-1]["event"] == "rollout.roll_back" and log[-1]["details"]["why"].startswith("worse by")


def test_without_production_nothing_is_rolled_out(tmp_path: Path) -> None:
    run = world.build(tmp_path, "multiclass", 300, production=False)
    assert world.execute("07_rollout", tmp_path)["error"] is None
    found = {name: c["verdict"] for name, c in checks(run, "07_rollout").items()}
    drilled = {name for name in found if name.startswith(("Drill", "Each alert"))}       # the service can be drilled without a rollout
    assert {v for name, v in found.items() if name not in drilled} == {"not applicable"} and all(found[name] == "go" for name in drilled)
    said = json.loads((run / "07_rollout/answer.json").read_text())       # a runbook that is written is no rollout
    assert drilled and said["verdict"] == "not applicable" and "data.split.production_from" in said["answer"] and "pilothouse rollout start" in said["answer"]


def test_a_handful_of_requests_is_inconclusive(tmp_path: Path) -> None:
    run = world.build(tmp_path, "regression", 300)
    names = world.execute("07_rollout", tmp_path)
    assert names["error"].exit_code == 5 and "no-go" not in {c["verdict"] for c in checks(run, "07_rollout").values()}


def test_rules_survive_a_claims_record() -> None:
    from pipeline.rollout.canary import rules_of

    assert rules_of(json.loads(json.dumps(asdict(RULES)))) == RULES
