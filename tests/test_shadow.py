"""A new version that fails behind callers' backs: they notice nothing, the log holds it, the rollout goes back because of it."""
from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.exceptions import PanicException

import deploy_world as world
from pipeline.comply.traces import find_traces
from pipeline.data.contract import target_values
from pipeline.deploy.handler import Service
from pipeline.deploy.inference_log import Recorder, collect, layout_of, note_outcomes, read_inferences, read_outcomes
from pipeline.deploy.predict import Predictor
from pipeline.deploy.requests import Refused
from pipeline.deploy.schema import make_schema
from pipeline.deploy.staging import as_rows
from pipeline.deploy.versions import Plan, Served, Traffic, point
from pipeline.rollout.canary import Rules, consider, start
from pipeline.rollout.gather import Reading, gather
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting


@dataclass
class Shop:
    "A service whose second version answers in shadow, and its log."

    store: Path
    service: Service
    recorder: Recorder
    rows: list[dict[str, Any]]


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    frame, contract = world.rows("binary", 300), world.contract("binary")
    model = train_model("linear", frame, target_values(frame, contract), contract, Fitting({}))
    served = [Served(Predictor(model, make_schema(contract, frame), .4, "tiny", version, digest=f"{version}" * 64), f"{version}" * 64) for version in (1, 2)]
    traffic = Traffic(served[0], {s.digest: s for s in served}.__getitem__)
    store = tmp_path / "store"
    recorder = Recorder(store, "tiny", {s.version: layout_of(s.predictor, "minimised", "tailnum", False) for s in served}, collects=False)
    service = Service(traffic, recorder=recorder)
    assert traffic.apply(Plan("tiny", served[0].digest, served[1].digest, 0.0, shadow=True, subject="tailnum", revision=1))
    return Shop(store, service, recorder, as_rows(frame, served[0].predictor.schema.names))


def fault(kind: type[BaseException]) -> Any:
    def answer(*_: Any, **__: Any) -> Any:
        raise Refused(422, "rows do not fit", "a category that only the old version knows") if kind is Refused else kind("the second version's own fault")
    return answer


@pytest.mark.parametrize("kind", [ValueError, PanicException, Refused])
def test_what_fails_in_shadow_is_an_error_of_the_version_on_trial(shop: Shop, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    service, traffic = shop.service, shop.service.traffic
    second = service._answerers(traffic.routing)[id(traffic.routing.canary)]
    whole = type(second).json

    def every_fifth(answerer: Any, *words: Any, **more: Any) -> Any:
        calls.append(answerer is second)
        return fault(kind)() if answerer is second and sum(calls) % 5 == 0 else whole(answerer, *words, **more)

    calls: list[bool] = []
    monkeypatch.setattr(type(second), "json", every_fifth)
    for row in shop.rows[:200]:
        status, _, out = service.handle("POST", "/predict", {"prefer": "handling=lenient"}, json.dumps({"rows": [row]}).encode())
        assert status == 200 and json.loads(out)["version"] == 1, "callers notice nothing"
    service.close()
    shop.recorder.close()
    collect(shop.store, "tiny")
    log, outcomes = read_inferences(shop.store, "tiny"), read_outcomes(shop.store, "tiny")
    reading = Reading("binary", ("false", "true"), "true", 2, 50.0, sticks="subject", paired=True)
    look, _, why = gather(log, outcomes, reading, Rules())
    assert not why and len(look.failed) == len(look.old_failed) == 200 and (look.failed.sum(), look.old_failed.sum()) == (40, 0)
    state, decided = consider(start(Rules()), look, Rules())
    assert state.status == "rolled back" and decided.new_errors == 40, decided.why

    # without a fault nothing is held against it
    fine, _ = consider(start(Rules()), replace(look, failed=np.zeros(200, dtype=bool)), Rules())
    assert fine.status == "running"


def asked(shop: Shop, rows: list[dict[str, Any]], name: str = "r") -> None:
    for i, row in enumerate(rows):
        shop.service.handle("POST", "/predict", {"x-request-id": f"{name}{i}", "prefer": "handling=lenient"}, json.dumps({"rows": [row]}).encode())


def split(shop: Shop, **plan: Any) -> None:
    traffic = shop.service.traffic
    assert traffic.apply(Plan("tiny", "1" * 64, "2" * 64, subject="tailnum", salt="trial", revision=2, **plan))


@pytest.mark.parametrize("slice_", [{}, {"carrier": "UA"}])
def test_what_a_version_refuses_in_its_own_share_is_held_against_it(shop: Shop, slice_: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    "Without a shadow nothing else shows it; what callers do wrong with both, and what nobody could assign, does not count."
    split(shop, share=30.0, slice=slice_)
    first, second = (shop.service._answerers(shop.service.traffic.routing)[id(served)] for served in shop.service.traffic.routing.served)
    whole = type(second).json

    def strict(answerer: Any, body: bytes, *words: Any, **more: Any) -> Any:
        return fault(Refused)() if b"N1" in body and (answerer is second or b"N11" in body) else whole(answerer, body, *words, **more)

    monkeypatch.setattr(type(second), "json", strict)
    assert first is not second
    rows = [{**row, "tailnum": f"N{i % 230}", "carrier": "UA" if i % 2 else "B6"} for i, row in enumerate(shop.rows * 3)]
    asked(shop, rows)
    asked(shop, [{**row, "seats": "secret"} for row in shop.rows[:50]], "nobody")         # no subject: always the old one's
    for i in range(50):
        shop.service.handle("POST", "/predict", {}, b'{"rows": "secret"}')
        shop.service.handle("POST", "/predict", {}, json.dumps({"rows": rows[i:i + 2]}).encode())      # two subjects: hardly ever the new one's
    shop.service.close()
    shop.recorder.close()
    log = read_inferences(shop.store, "tiny", inputs=True)
    reading = Reading("binary", ("false", "true"), "true", 2, 50.0, sticks="subject", slice=tuple(slice_.items()))
    look, after, why = gather(log, log.clear(), reading, Rules())
    inside = [f"N{i}" for i in range(230) if not slice_ or i % 2]                         # 230 is even: a subject stays in its slice
    trial = {n for n in inside if point(n, "trial") * 100 < 30}
    wanted = (sum("N1" in n for n in trial), len(trial), sum("N11" in n for n in set(inside) - trial), len(set(inside) - trial))
    assert not why and look.refusals == wanted and wanted[0] > 10
    state, decided = consider(start(Rules()), look, Rules())
    assert state.status == "rolled back" and f"{wanted[0]} subjects refused (4xx)" in decided.why and decided.old_refused == wanted[2]
    again, _, _ = gather(log.with_columns(number=pl.col("number") + 10_000), log.clear(), after, Rules())
    assert again.refusals[0] == again.refusals[2] == 0, "a mistake that is repeated is one"
    refused = log.filter(pl.col("status") >= 400)
    assert set(refused["inputs"].drop_nulls()) == ({'{"carrier":"UA"}'} if slice_ else set()) and not find_traces(shop.store, "secret")


def test_a_pilot_on_a_slice_hears_its_outcomes_and_the_faults_of_both(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    split(shop, share=30.0, slice={"carrier": "UA"}, shadow=True)
    answerer = type(shop.service._answerers(shop.service.traffic.routing)[id(shop.service.traffic.routing.live)])
    whole = answerer.json

    def failing(one: Any, body: bytes, *words: Any, **more: Any) -> Any:
        return fault(ValueError)() if b"N1" in body else whole(one, body, *words, **more)

    monkeypatch.setattr(answerer, "json", failing)
    rows = [{**row, "tailnum": f"N{i % 230}", "carrier": "UA" if i % 2 else "B6"} for i, row in enumerate(shop.rows * 2)]
    asked(shop, rows)
    note_outcomes(shop.store, "tiny", [{"request_id": f"r{i}", "value": "true"} for i in range(len(rows))], ["false", "true"])
    shop.service.close()
    shop.recorder.close()
    reading = Reading("binary", ("false", "true"), "true", 2, 50.0, sticks="subject", paired=True, slice=(("carrier", "UA"),))
    look, _, why = gather(read_inferences(shop.store, "tiny", inputs=True), read_outcomes(shop.store, "tiny", inputs=True), reading, Rules())
    old = [row for row in rows if row["carrier"] == "UA" and point(row["tailnum"], "trial") * 100 >= 30]
    assert not why and len(look.old_failed) == len(old) and look.old_failed.sum() == sum("N1" in row["tailnum"] for row in old) > 10
    assert len(look.differences) == sum("N1" not in row["tailnum"] for row in old), "outcomes of the slice, beside both answers"


@pytest.mark.parametrize("subject", [b'"\\ud800"', b"123456789012345678901234567890", b"1e400", b'{"a": [1]}', b"[]", b"true", b'""', b"null"])
def test_whatever_stands_for_the_subject_of_a_refused_request_is_noted_or_not_and_stops_nothing(shop: Shop, subject: bytes) -> None:
    split(shop, share=50.0)
    status, _, out = shop.service.handle("POST", "/predict", {}, b'{"rows": [{"seats": "many", "tailnum": ' + subject + b"}]}")
    assert status in (400, 422) and b"request_id" in out
    shop.service.close()
    shop.recorder.close()
    kept = read_inferences(shop.store, "tiny", inputs=True)
    assert kept.height == 1 and kept["inputs"].null_count() == 1
