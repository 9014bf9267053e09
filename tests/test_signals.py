"""An outage is measured and heard, slow answers are heard within one window, and a quiet hour is quiet: simulated, on a real service, and by Prometheus itself."""
from __future__ import annotations

import datetime as dt
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

import deploy_world as world
from pipeline.core import audit
from pipeline.core.problem import Problem
from pipeline.deploy.handler import Service
from pipeline.deploy.inference_log import Recorder, layout_of, read_inferences
from pipeline.deploy.load import Plan, send_bodies
from pipeline.deploy.objectives import BURNS, Objectives, rules_file, scrape_file
from pipeline.deploy.package import KEY, load_package
from pipeline.deploy.staging import as_rows
from pipeline.monitor.follow import follow
from pipeline.monitor.signals import Tail, Watch, play_hours, signals
from serving_kit import Running, packages, running, until

FIELDS = ["hour", "seats", "carrier", "built", "rain"]
PROMISE = Objectives(0.99, 25)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    store, (folder,) = packages(tmp_path_factory.mktemp("signals"), [20])
    return store, folder


@pytest.fixture(scope="module")
def asked() -> list[bytes]:
    frame = world.rows("binary", 300, seed=9).with_columns(pl.col("hour").fill_null(9.0)).select(FIELDS)
    return [json.dumps({"rows": [row]}).encode() for row in as_rows(frame, FIELDS)]


def hour(seed: int, n: int = 60_000) -> pl.DataFrame:
    "An hour of answers whose load moves, with a tail."
    random = np.random.default_rng(seed)
    due = np.sort(random.random(n)) * 3600
    busy = 1 + 0.4 * np.sin(due / 400 + seed)
    return pl.DataFrame({"due_s": due, "latency_ms": np.exp(random.normal(0, 0.8, n)) * busy, "status": 200})


def test_thirty_quiet_hours_are_quiet_and_a_sleep_in_two_percent_is_heard_within_a_window() -> None:
    for seed in range(30):
        quiet = hour(seed)
        assert signals(quiet, PROMISE).raised.is_empty(), seed
        if seed % 3:
            continue
        asleep = (np.random.default_rng(100 + seed).random(len(quiet)) < 0.02) & (quiet["due_s"].to_numpy() > 1800)
        for sleep_ms, rules in ((200, {"latency over the limit", "latency spike"}), (40, {"latency spike"})):      # over the promise, and below it
            limit = PROMISE if sleep_ms == 200 else Objectives(0.99, 250)
            slept = signals(quiet.with_columns(latency_ms=pl.col("latency_ms") + pl.Series(sleep_ms * asleep)), limit).raised
            assert set(slept["rule"]) == rules, (seed, sleep_ms)
            first = slept["opened_s"].min()
            assert 1800 < first <= 1800 + limit.window_s, (seed, sleep_ms, first)
            assert slept["closed_s"].null_count() == len(rules), "it goes on for as long as the sleeps do, and does not flicker"


def test_a_service_at_the_very_edge_of_its_promise_is_not_called_slow() -> None:
    random, rang = np.random.default_rng(1), 0
    for _ in range(40):
        watch = Watch(PROMISE)
        n = 20_000
        watch.add(np.sort(random.random(n)) * 1000, np.ones(n), np.where(random.random(n) < 0.01, 30.0, 20.0))      # exactly 1 %
        watch.judge(1000)
        rang += len(watch.raised)
    assert rang == 0


def test_uptime_is_what_was_left_and_burns_ring_by_length() -> None:
    for share in (0.01, 0.05, 0.2, 0.5):
        found = signals(hour(3).with_columns(status=pl.when(pl.col("due_s").is_between(1000, 1000 + 3600 * share)).then(0).otherwise(200)), PROMISE)
        assert abs(found.uptime.value - (1 - share)) < 0.005
        burns = set(found.raised.filter(rule="error budget burning")["window"])
        assert burns == {b_window for b_window, limit in (("1h", 0.144), ("6h", 0.36)) if share > limit}, (share, burns)
    slow = signals(hour(3).with_columns(latency_ms=pl.when(pl.col("due_s").is_between(1000, 1360)).then(3000.0).otherwise(pl.col("latency_ms"))), PROMISE)
    assert abs(slow.uptime.value - 0.9) < 0.005, "an answer that comes after three seconds is none"


def test_a_watch_in_pieces_is_the_same_watch() -> None:
    whole = hour(5, 20_000).with_columns(status=pl.when(pl.col("due_s").is_between(900, 1900)).then(0).otherwise(200))
    at, good, ms = whole["due_s"].to_numpy(), (whole["status"] == 200).to_numpy(), whole["latency_ms"].to_numpy()
    one, many, begun = Watch(PROMISE), Watch(PROMISE), 0
    one.add(at, good, ms)
    one.judge(3600)
    for end in (*np.sort(np.random.default_rng(2).random(40) * 3600), 3600):
        stop = int(np.searchsorted(at, end))
        many.add(at[begun:stop], good[begun:stop], ms[begun:stop])
        many.judge(end)
        begun = stop
    assert one.steps == many.steps and one.raised == many.raised and many.late == 0 and one.raised


def test_a_killed_service_is_down_for_as_long_as_it_was(place: tuple[Path, Path], asked: list[bytes]) -> None:
    "kill -9 of every process, another start at the same port: the uptime that a prober reports, and how long callers of another process really found nobody."
    store, folder = place
    alarms: list[dict[str, Any]] = []
    seconds, patience = 20.0, 0.5
    problem = Problem.model_validate_json(world.problem_text("tiny", "binary"))
    with running(store, folder, log=False) as first, ThreadPoolExecutor(3) as pool:
        prober, callers = (pool.submit(send_bodies, Plan("127.0.0.1", first.port, rate, int(rate * seconds), seed=seed, timeout_s=patience), asked) for rate, seed in ((100.0, 7), (150.0, 8)))
        watcher = pool.submit(follow, problem, store, f"http://127.0.0.1:{first.port}", seconds, alarms.append, 0.1, 300.0)      # a minute in a fifth of a second
        assert until(lambda: served(first) > 300), "both are at work"
        os.killpg(first.process.pid, signal.SIGKILL)
        first.process.wait()
        with running(store, folder, log=False, port=first.port):
            sample, others, _ = prober.result(90), callers.result(90), watcher.result(90)
    heard = next(a for a in alarms if a["rule"] == "service down")
    assert heard["severity"] == "page" and heard["do"] == "pilothouse serve tiny/main" and not [a for a in alarms if a["rule"] in ("latency over the limit", "rows missing")]
    length, patient = float(sample["due_s"].max()), 1000 * patience     # type: ignore[arg-type]
    due, good = others["due_s"].to_numpy(), ((others["status"] == 200) & (others["latency_ms"] <= patient)).to_numpy()
    ends = np.append(due[good], due.max())              # on a busy machine nobody may be back before the callers end
    nobody = np.flatnonzero(np.diff(ends) > 0.1)        # for longer than chance leaves between two callers
    probes = sample["due_s"].to_numpy()
    down = float(np.mean([any(ends[i] < at < ends[i + 1] for i in nobody) for at in probes]))     # probes sent while callers found nobody
    promise = Objectives(0.999, 25)
    seen = signals(sample, promise, 3600 / length, in_time_ms=patient)
    assert down > 2 * promise.failing(BURNS[0]), "another process needs more than half a second to start"
    starved = sum(float((one["late_ms"] > 20).mean()) for one in (sample, others))     # type: ignore[arg-type]  # senders that a busy machine kept waiting miss each other's outage
    assert abs(seen.uptime.value - (1 - down)) < 0.02 + starved, f"{seen.uptime.value:.4f} was reported, {1 - down:.4f} is true; senders waited in {starved:.4f} of the time"
    assert seen.raised.filter(rule="error budget burning", window="1h").height >= 1


def test_a_share_of_slow_answers_that_is_always_there_is_no_spike() -> None:
    "Just under one in a hundred takes six times as long, hour after hour: the usual 99th percentile lies below the gap."
    ms = np.where(np.arange(5000) < 48, 60.0, 10.0)
    rang = [play_hours(ms, Objectives(0.99, 250), 20, np.random.default_rng(s)).to_dicts()[0]["rang"] for s in range(8)]
    assert sum(map(bool, rang)) <= 2, rang


def served(server: Running) -> float:
    "Answers so far."
    found = re.search(rb'pilothouse_answers_total\{version="1",role="live",status="200"\} (\d+)', server.ask("GET", "/metrics")[2])
    return float(found[1]) if found else 0.0


def test_an_hour_of_traffic_through_the_real_log_rings_nothing_and_loses_nothing(place: tuple[Path, Path], asked: list[bytes]) -> None:
    "An hour in twelve seconds: service, spool, table and watch run beside each other."
    store, folder = place
    pace, seconds, rate = 300.0, 12.0, 120.0
    promise, found, lags = Objectives(0.99, 500), [], []
    with running(store, folder, log=False, store=str(store), flush_s=0.05) as server:
        begun = dt.datetime.now(dt.UTC)
        tail = Tail(Watch(promise, pace, outside=False), lambda after: read_inferences(store, "tiny", after), begun, settles_s=0.4)
        load = threading.Thread(target=lambda: found.append(send_bodies(Plan(server.host, server.port, rate, int(rate * seconds)), asked)))
        load.start()
        while load.is_alive():
            tail.look(dt.datetime.now(dt.UTC))
            lags.append(tail.lag_s(dt.datetime.now(dt.UTC)))
            time.sleep(0.1)
        load.join()
        sent = int((found[0]["status"] == 200).sum())
        assert until(lambda: (tail.look(dt.datetime.now(dt.UTC)), tail.rows >= sent)[1]), f"{tail.rows} of {sent} answers are in the log"
    assert (tail.rows, tail.lost) == (sent, 0) and sent == len(found[0])
    assert not tail.watch.late or max(lags) > 0.4 * pace, f"{tail.watch.late} answers came after their step was judged, though the log was at most {max(lags):.0f} s behind"
    assert not [a for a in tail.watch.raised if a["severity"] == "page" and a["opened_s"] <= 3600], tail.watch.raised
    assert sorted(lags)[int(0.9 * len(lags))] < promise.window_s, f"the watch was behind by {sorted(lags)[-5:]} s of an hour, a window has {promise.window_s:g}"


def test_sleeps_inside_the_service_are_heard_through_its_own_log(place: tuple[Path, Path], asked: list[bytes], tmp_path: Path) -> None:
    store, folder = place
    predictor = load_package(folder, audit.public_key(store, KEY))
    recorder = Recorder(tmp_path, "tiny", {predictor.version: layout_of(predictor, "none")}, interval=600, collects=False)
    service = Service(predictor, recorder=recorder)
    method, route, answer = service._routes["/predict"]
    random, sleeping = np.random.default_rng(3), threading.Event()

    def sometimes(call: Any) -> Any:
        if sleeping.is_set() and random.random() < 0.02:
            time.sleep(0.03)
        return answer(call)

    service._routes["/predict"] = (method, route, sometimes)
    begun, rows = dt.datetime.now(dt.UTC), 0
    tail = Tail(Watch(Objectives(0.99, 20), pace=600, outside=False), lambda after: read_inferences(tmp_path, "tiny", after), begun, settles_s=0.0)

    def ask(n: int) -> dt.datetime:
        nonlocal rows
        for i in range(n):
            assert service.handle("POST", "/predict", {"prefer": "handling=lenient"}, asked[i % len(asked)])[0] == 200
        rows += n
        recorder.flush()
        now = dt.datetime.now(dt.UTC)
        tail.look(now)
        return now

    ask(4000)
    assert not [a for a in tail.watch.raised if a["rule"] == "latency over the limit"]
    onset = (dt.datetime.now(dt.UTC) - begun).total_seconds() * tail.watch.pace
    sleeping.set()
    ask(9000)
    recorder.close()
    rang = [a for a in tail.watch.raised if a["rule"] == "latency over the limit"]
    assert rang and rang[0]["opened_s"] > onset and (tail.rows, tail.lost) == (rows, 0)
    heard = (rang[0]["opened_s"] - onset) / tail.watch.pace
    assert heard <= 8_148 * (dt.datetime.now(dt.UTC) - begun).total_seconds() / 9000, "in as many requests as a window needs"


PROMTOOL = shutil.which("promtool")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool (Prometheus) is not installed here")
def test_prometheus_rings_when_the_monitor_does(tmp_path: Path) -> None:
    "The rule file, read and run by Prometheus' own engine: two quiet hours, an outage of ten minutes, a sleep in 2 % of the requests."
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules_file(PROMISE, "tiny"), sort_keys=False, width=4000))
    scrape = scrape_file("tiny", 8443, {"app.kubernetes.io/name": "tiny"})
    assert scrape["rule_files"] == ["alerts.yml"]

    def series(slow_from: int = 10**9, down: tuple[int, int] = (0, 0)) -> list[dict[str, str]]:
        steps = np.arange(480)                                # 15 s each, 100 requests a second
        count = np.cumsum(np.full(480, 1500.0))
        fast = np.cumsum(np.where(steps >= slow_from, 1470.0, 1497.0))
        labels = 'job="tiny",role="live",version="1"'
        told = {'up{job="tiny"}': 1 - ((steps >= down[0]) & (steps < down[1])), f'pilothouse_answers_total{{{labels},status="200"}}': count,
                f'pilothouse_predict_seconds_count{{{labels}}}': count, f'pilothouse_predict_seconds_bucket{{{labels},le="0.025"}}': fast}
        return [{"series": name, "values": " ".join(f"{v:g}" for v in values)} for name, values in told.items()]

    def rings(at: str, alert: str, expected: list[dict[str, str]], **fault: Any) -> dict[str, Any]:
        alerts = [r for r in rules_file(PROMISE, "tiny")["groups"][0]["rules"] if r.get("alert") == alert]
        wanted = [{"exp_labels": a["labels"], "exp_annotations": a["annotations"]} for a in alerts if any(a["labels"].items() >= e.items() for e in expected)]
        return {"interval": "15s", "input_series": series(**fault), "alert_rule_test": [{"eval_time": at, "alertname": alert, "exp_alerts": wanted}]}

    told = [rings("119m", alert, []) for alert in ("ErrorBudgetBurning", "LatencyOverTheLimit", "ServiceDown")]
    told += [rings("69m15s", "ErrorBudgetBurning", [{"window": w} for w in ("1h", "6h", "3d")], down=(240, 280)), rings("62m", "ServiceDown", [{"severity": "page"}], down=(240, 280)),
             rings("77m", "ErrorBudgetBurning", [{"window": w} for w in ("6h", "3d")], down=(240, 280)), rings("65m", "LatencyOverTheLimit", [{"severity": "page"}], slow_from=240)]
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": ["alerts.yml"], "evaluation_interval": "15s", "tests": told}, width=100_000))
    done = subprocess.run([str(PROMTOOL), "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_rules_and_the_monitor_know_the_same_numbers() -> None:
    rules = rules_file(PROMISE, "tiny")["groups"][0]["rules"]
    said = [r["expr"] for r in rules if r.get("alert") == "ErrorBudgetBurning"]
    assert len(said) == len(BURNS) and all(f"> {PROMISE.failing(b):.6g}" in s for b, s in zip(BURNS, said))
    latency = next(r["expr"] for r in rules if r.get("alert") == "LatencyOverTheLimit")
    assert f"{(PROMISE.too_slow(10_000) - 0.01) * 100:.6g} / sqrt(" in latency


def test_a_service_that_never_answers_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.cli.main import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("[outputs]\npath = outputs\n")
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "tiny.yml").write_text(json.dumps({
        "problem": {"name": "tiny", "statement": "Will it be late, asked before it leaves?", "kpi": {"name": "late", "baseline": 0, "target": 1, "unit": ""}, "task": "binary", "target": "late"},
        "data": {"sources": [{"name": "t", "kind": "csv", "path": "t.csv"}]}}))
    assert main(["monitor", "tiny", "--url", "http://127.0.0.1:1", "--minutes", "0.01"]) == 4
    told = capsys.readouterr()
    assert told.err.splitlines()[0] == "pilothouse: nobody answers in time at http://127.0.0.1:1; trying again" and told.err.count("nobody answered at http://127.0.0.1:1") == 1
