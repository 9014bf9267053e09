"""A place with a store: what is deployed there is logged, watched, tried on a share of the callers, and brought back."""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_kit import until

import deploy_world as world
from pipeline.core import audit
from pipeline.core.errors import InputError
from pipeline.data.contract import target_values
from pipeline.deploy.deployment import ask, deploy, go_back, history, plain_row, read_live, stop_all, write_serving
from pipeline.deploy.inference_log import read_inferences
from pipeline.deploy.package import KEY, Contents, release
from pipeline.deploy.registry import Registry
from pipeline.deploy.schema import make_schema
from pipeline.deploy.tokens import make_token
from pipeline.deploy.versions import Plan, Plans
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting


class Place:
    "A store with two packages, and a place whose services belong to that store."

    def __init__(self, folder: Path) -> None:
        frame, contract = world.rows("binary", 300), world.contract("binary")
        model = train_model("linear", frame, target_values(frame, contract), contract, Fitting({})).save(folder / "model")
        self.schema, self.store, self.folder = make_schema(contract, frame), folder / "store", folder / "live"
        self.packages = [release(self.store, folder / f"work{n}", "tiny", model, Contents(contract, self.schema.to_dict(), {"threshold": 0.5}, [], {}, f"# {n}\n", {})) for n in range(2)]
        self.registry = Registry(self.store)
        for package in self.packages:
            self.registry.register(package, "go", by="ci")
        self.program = shutil.copytree(world.ROOT / "pipeline", folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
        self.tokens = {who: make_token(folder / "tokens", who, [role]) for who, role in (("shop", "caller"), ("ann", "operator"))}
        self.how = {"store": str(self.store), "tokens": str(folder / "tokens"), "extensions": "pipeline.rollout.desk:extensions", "subject": "tailnum"}

    @property
    def key(self) -> Any:
        return audit.public_key(self.store, KEY)

    def deploy(self, number: int, **how: Any) -> Any:
        return deploy(self.folder, self.packages[number], self.key, 0, self.how | how, by="ann", program=self.program)

    def ask(self, who: str, path: str = "/predict", body: dict[str, Any] | None = None) -> tuple[int, Any]:
        headers = {"authorization": f"Bearer {self.tokens.get(who, '')}", "content-type": "application/json", "prefer": "handling=lenient"}
        status, out = ask(json.loads((self.folder / "door.json").read_text())["port"], "POST" if body else "GET", path, json.dumps(body) if body else None, headers, timeout_s=30)
        return status, json.loads(out)

    def version(self) -> int:
        return int(self.ask("shop", body={"rows": [plain_row(self.schema)]})[1]["version"])

    @property
    def plan(self) -> Plan:
        found = Plans(self.registry).current("tiny")
        assert found
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("place"))
    try:
        yield made
    finally:
        stop_all(made.folder)
        made.registry.close()


def test_what_is_deployed_with_a_store_is_logged_watched_and_follows_its_plans(place: Place) -> None:
    digests = [e.digest for e in sorted(place.registry.entries("tiny"), key=lambda e: e.version)]
    first = place.deploy(0)
    assert first.changed and (place.plan.revision, place.plan.live, place.plan.reason, place.plan.by) == (1, digests[0], "deployed to live", "ann")
    assert place.ask("", body={"rows": [plain_row(place.schema)]})[0] == 401, "the file of tokens guards it"
    assert place.version() == 1 and not place.deploy(0).changed and place.plan.revision == 1, "twice is once: no plan is made again"

    # the log and the operators' page
    def logged() -> list[str]:
        log = read_inferences(place.store, "tiny")
        return [request.split("-")[0] for request in log.filter(log["status"] == 200)["request_id"]] if len(log) else []

    assert until(lambda: len(logged()) == 2) and logged()[0] == "smoke" != logged()[1]
    status, state = place.ask("ann", "/operate/state")
    assert status == 200 and state["plan"]["live"] == 1 and place.ask("shop", "/operate/state")[0] == 403

    # another version is tried on a share, without another release
    plans = Plans(place.registry)
    plans.change("tiny", 1, "a trial", "bob", canary=digests[1], share=100.0, subject="tailnum", salt="t")
    row = {**plain_row(place.schema), "tailnum": "N1"}
    assert until(lambda: place.ask("shop", body={"rows": [row]})[1]["version"] == 2)

    # nothing may cut the trial short
    before = read_live(place.folder)
    with pytest.raises(InputError, match="version 2 of tiny was asked while a trial goes on beside another one.*pilothouse rollout promote tiny"):
        place.deploy(1)
    assert read_live(place.folder) == before and place.plan.revision == 2

    # what the traffic's plan calls live may be released anew, and the trial beside it goes on
    plans.change("tiny", 2, "the other way round", "bob", live=digests[1], canary=digests[0])
    second = place.deploy(1, rate=50.0)
    assert second.changed and second.version == 2 and (place.plan.revision, place.plan.live, place.plan.canary, place.plan.share) == (4, digests[1], digests[0], 100.0)
    assert until(lambda: place.ask("shop", body={"rows": [row]})[1]["version"] == 1), "the new process follows the plan that came with it"
    plans.change("tiny", 4, "the trial went well", "bob", canary=None, share=0.0)
    assert until(lambda: place.version() == 2) and place.version() == 2
    assert {file.name for file in place.folder.glob("serving-*.json")} == {read_live(place.folder)["serving"]}, "what is no longer used is gone"


def test_going_back_takes_the_traffic_along(place: Place) -> None:
    live = read_live(place.folder)
    if live is None or live["version"] != 2:
        pytest.skip("nothing is live: the test before this one says why")
    back = go_back(place.folder, by="bob")
    assert back.version == 1 and until(lambda: place.version() == 1) and place.plan.live == place.registry.entry("tiny", 1).digest
    assert read_live(place.folder)["serving"] == live["serving"], "the same tokens, the same store"
    assert place.ask("", body={"rows": [plain_row(place.schema)]})[0] == 401
    assert [(e["event"], e["version"], e["by"]) for e in history(place.folder)] == [("live", 1, "ann"), ("live", 2, "ann"), ("live", 1, "bob")]
    changed = [e["details"] for e in audit.entries(place.store) if e["event"] == "traffic.changed"]
    assert [(e["reason"], e["by"]) for e in changed][-3:] == [("deployed to live", "ann"), ("the trial went well", "bob"), ("brought back at live", "bob")]


def test_how_a_place_answers_is_read_strictly(tmp_path: Path) -> None:
    from pipeline.deploy.deployment import read_serving

    file = write_serving(tmp_path, {"workers": 2})
    assert read_serving(file) == {"workers": 2} and file.stat().st_mode & 0o777 == 0o600 and write_serving(tmp_path, {"workers": 2}) == file
    with pytest.raises(InputError, match="'worker' is unknown.*workers"):
        write_serving(tmp_path, {"worker": 2})
    with pytest.raises(InputError, match="'folder' is unknown"):
        write_serving(tmp_path, {"folder": "elsewhere"})
    for text in ("[]", "{"):
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(InputError, match="JSON"):
            read_serving(tmp_path / "s.json")
