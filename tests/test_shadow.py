"""A new version that fails behind callers' backs: they notice nothing, the log holds it, the rollout goes back because of it."""
from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from polars.exceptions import PanicException

import deploy_world as world
from pipeline.data.contract import target_values
from pipeline.deploy.handler import Service
from pipeline.deploy.inference_log import Recorder, collect, layout_of, read_inferences, read_outcomes
from pipeline.deploy.predict import Predictor
from pipeline.deploy.requests import Refused
from pipeline.deploy.schema import make_schema
from pipeline.deploy.staging import as_rows
from pipeline.deploy.versions import Plan, Served, Traffic
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
