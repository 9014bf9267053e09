"""A place with a store: what is deployed there is logged, watched, tried on a share of the callers, and brought back."""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving_kit import until

import deploy_world as world
from pipeline.core import audit
from pipeline.core.errors import GateFailed, InputError, IntegrityError
from pipeline.data.contract import target_values
from pipeline.deploy import deployment
from pipeline.deploy.deployment import ask, deploy, go_back, history, plain_row, read_live, standing, stop_all, write_serving
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
        self.contents = lambda text: Contents(contract, self.schema.to_dict(), {"threshold": 0.5}, [], {}, f"# {text}\n", {})
        self.packages = [release(self.store, folder / f"work{n}", "tiny", model, self.contents(n)) for n in range(2)]
        self.registry = Registry(self.store)
        for package in self.packages:
            self.registry.register(package, "go", by="ci")
        self.program = shutil.copytree(world.ROOT / "pipeline", folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
        self.tokens = {who: make_token(folder / "tokens", who, [role]) for who, role in (("shop", "caller"), ("ann", "operator"))}
        self.how = {"store": str(self.store), "tokens": str(folder / "tokens"), "extensions": "pipeline.rollout.desk:extensions", "subject": "tailnum"}

    @property
    def key(self) -> Any:
        return audit.public_key(self.store, KEY)

    def deploy(self, number: int, port: int | None = 0, **how: Any) -> Any:
        return deploy(self.folder, self.packages[number], self.key, port, self.how | how, by="ann", program=self.program)

    def ask(self, who: str, path: str = "/predict", body: dict[str, Any] | None = None) -> tuple[int, Any]:
        headers = {"authorization": f"Bearer {self.tokens.get(who, '')}", "content-type": "application/json", "prefer": "handling=lenient"}
        status, out = ask(json.loads((self.folder / "door.json").read_text())["port"], "POST" if body else "GET", path, json.dumps(body) if body else None, headers, timeout_s=30)
        return status, json.loads(out)

    def version(self) -> int:
        return int(self.ask("shop", body={"rows": [plain_row(self.schema)]})[1]["version"])

    def states(self) -> dict[int, str]:
        return {entry.version: entry.state for entry in self.registry.entries("tiny")}

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
    assert place.states() == {1: "production", 2: "candidate"} and standing(place.folder).registered == "production", "one truth about what is live"

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
    now = standing(place.folder)
    assert now and (now.service, now.version, now.answers, now.door) == ("ready", 1, 1, first.door)

    # nothing may cut the trial short
    before = read_live(place.folder)
    with pytest.raises(InputError, match="version 2 of tiny was asked while a trial goes on beside another one.*pilothouse rollout promote tiny"):
        place.deploy(1)
    assert read_live(place.folder) == before and place.plan.revision == 2 and place.states() == {1: "production", 2: "candidate"}

    # what the traffic's plan calls live may be released anew, and the trial beside it goes on
    plans.change("tiny", 2, "the other way round", "bob", live=digests[1], canary=digests[0])
    second = place.deploy(1, rate=50.0)
    assert second.changed and second.version == 2 and (place.plan.revision, place.plan.live, place.plan.canary, place.plan.share) == (4, digests[1], digests[0], 100.0)
    assert until(lambda: place.ask("shop", body={"rows": [row]})[1]["version"] == 1), "the new process follows the plan that came with it"
    assert place.states() == {1: "retired", 2: "production"}
    plans.change("tiny", 4, "the trial went well", "bob", canary=None, share=0.0)
    assert until(lambda: place.version() == 2) and place.version() == 2
    assert {file.name for file in place.folder.glob("serving-*.json")} == {read_live(place.folder)["serving"]}, "what is no longer used is gone"


def test_going_back_takes_the_traffic_along(place: Place) -> None:
    live = read_live(place.folder)
    if live is None or live["version"] != 2:
        pytest.skip("nothing is live: the test before this one says why")
    Plans(place.registry).change("tiny", 5, "by hand", "bob", live=place.registry.entry("tiny", 1).digest)
    assert until(lambda: (now := standing(place.folder)) and (now.version, now.answers) == (2, 1))
    back = go_back(place.folder, by="bob")
    assert back.version == 1 and until(lambda: place.version() == 1) and place.plan.live == place.registry.entry("tiny", 1).digest
    assert read_live(place.folder)["serving"] == live["serving"], "the same tokens, the same store"
    assert place.ask("", body={"rows": [plain_row(place.schema)]})[0] == 401
    assert place.states() == {1: "production", 2: "retired"} and place.registry.entry("tiny", 2).reason == "rollback: brought back at live"
    assert [(e["event"], e["version"], e["by"]) for e in history(place.folder)] == [("live", 1, "ann"), ("live", 2, "ann"), ("back", 1, "bob")]
    changed = [e["details"] for e in audit.entries(place.store) if e["event"] == "traffic.changed"]
    assert [(e["reason"], e["by"]) for e in changed][-4:] == [("deployed to live", "ann"), ("the trial went well", "bob"), ("by hand", "bob"), ("brought back at live", "bob")]


def test_what_the_registry_refuses_never_starts(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "_start", lambda *words: pytest.fail("it was started"))
    before = place.states(), place.plan, read_live(place.folder)
    Registry(place.store).register(release(place.store, place.folder.parent / "work9", "tiny", place.folder.parent / "model", place.contents("another")), "no-go", by="ci")
    third = place.store / "models" / place.registry.entry("tiny", 3).digest
    with pytest.raises(GateFailed, match="tiny v3 comes from a run with the verdict no-go"):
        deploy(place.folder, third, place.key, 0, place.how, program=place.program)
    place.registry.move("tiny", 3, "retired", "it failed")
    older = place.registry.entry("tiny", 1)
    with place.registry.transaction("tiny") as connection:        # as if version 2 had taken its place by a rollout
        place.registry._change(connection, older, "retired", "bob", "v2 took its place")
    with pytest.raises(IntegrityError, match="tiny v1 is older than v2, which was in production"):
        place.deploy(0)
    with place.registry.transaction("tiny") as connection:
        place.registry.put_live(connection, "tiny", older.digest, "as it was", "bob", back=True)
    assert ({**place.states(), 3: ""}, place.plan, read_live(place.folder)) == ({**before[0], 3: ""}, *before[1:])


def test_a_killed_service_is_called_gone_and_taken_over(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    live = read_live(place.folder)
    if live is None:
        pytest.skip("nothing is live: the first test says why")
    # a clock that somebody sets does not make a service look dead
    began = psutil._pslinux.boot_time()
    with monkeypatch.context() as patched:
        patched.setattr(psutil._pslinux, "boot_time", lambda: began + 86_400)
        assert standing(place.folder).service == "ready"

    family = psutil.Process(live["pid"]).children(recursive=True)
    assert family
    psutil.Process(live["pid"]).kill()
    assert until(lambda: standing(place.folder).service == "gone")
    assert not psutil.wait_procs(family, timeout=30)[1], "the workers end when their parent is gone"
    now = standing(place.folder)
    assert (now.service, now.answers, now.registered) == ("gone", 0, "production") and now.door, "the door waits for the next release"
    assert place.ask("shop", body={"rows": [plain_row(place.schema)]})[0] == 503
    again = place.deploy(0)
    assert again.changed and again.version == 1 and again.door == now.door and place.version() == 1 and place.states()[1] == "production"

    # the door too, and nothing of the place is left over afterwards
    door = json.loads((place.folder / "door.json").read_text())
    psutil.Process(door["pid"]).kill()
    assert until(lambda: standing(place.folder).door == 0)
    opened = place.deploy(0, None)
    assert not opened.changed and opened.door == now.door == standing(place.folder).door and place.version() == 1, "it opens where callers know it"
    family = [psutil.Process(told["pid"]) for told in (read_live(place.folder), json.loads((place.folder / "door.json").read_text()))]
    family += family[0].children(recursive=True)
    assert stop_all(place.folder, by="ann") and not psutil.wait_procs(family, timeout=30)[1]
    assert (standing(place.folder).service, standing(place.folder).door) == ("stopped", 0), "which is not the same as gone"
    assert stop_all(place.folder, by="bob") and [(e["event"], e["by"]) for e in history(place.folder)][-2:] == [("live", "ann"), ("stopped", "ann")]


def test_the_log_of_a_place_is_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, kept = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.1"
    deployment.cut_log(file)
    with file.open("ab", buffering=0) as service:
        for number in range(20):
            service.write(b"%09d\n" % number)
            deployment.cut_log(file, 64)
            assert file.stat().st_size <= 64, "a service that appends goes on at the beginning"
        assert (kept.read_bytes() + file.read_bytes()).split() == [b"%09d" % n for n in range(7, 20)], "the newest lines, in their order"
        kept.unlink()
        kept.mkdir()
        service.write(b"x" * 70)
        deployment.cut_log(file, 64)
        assert not file.stat().st_size and "could not be kept" in capsys.readouterr().err
        kept.rmdir()


def test_a_token_that_the_command_made_ends_on_its_day(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.cli.main import main
    from pipeline.deploy.requests import Refused
    from pipeline.deploy.tokens import Tokens

    file, words = tmp_path / "tokens.jsonl", ["serve", "--tokens", str(tmp_path / "tokens.jsonl"), "--json"]
    made = []
    for who, day in (("old", "2026-01-01"), ("new", "2999-01-01")):
        assert main([*words, "--new-token", f"{who}=caller", "--until", day]) == 0
        made.append(json.loads(capsys.readouterr().out)["token"])
    tokens = Tokens(file=file)
    assert tokens.holder(f"Bearer {made[1]}").name == "new"
    with pytest.raises(Refused, match="the token of old ended at 2026-01-01"):
        tokens.holder(f"Bearer {made[0]}")
    before = file.read_bytes()
    assert main([*words, "--new-token", "third=caller", "--until", "tomorrow"]) == 2 and "a date such as" in capsys.readouterr().out
    assert main([*words, "--until", "2999-01-01"]) == 2 and "is about a new token" in capsys.readouterr().out
    assert file.read_bytes() == before


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


def test_the_verb_hands_over_what_the_problem_file_says(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.cli.main import main
    from pipeline.core.store import digest

    (tmp_path / "settings.ini").write_text("")
    (tmp_path / "params").mkdir()
    (tmp_path / "params/tiny.yml").write_text(world.problem_text("tiny", "binary", comply={"subject": "tailnum", "encrypt": True}, deploy={"log_inputs": "none"}))
    shutil.copytree(place.store, tmp_path / "outputs/store")
    phase = tmp_path / "outputs/tiny/main/06_deploy"
    shutil.copytree(place.packages[1], phase / "package")
    (phase / "receipt.json").write_text(json.dumps({"outputs": {"deploy/package": {"file": "package", "sha256": digest(place.packages[1])}}}))
    (phase.parent / "manifest.json").write_text("{}")
    seen: list[Any] = []

    def stand_in(to: Path, folder: Path, key: Any, port: int | None, how: dict[str, Any], files: Path | None, by: str, downgrade: str) -> deployment.Deployed:
        seen.append((to, port, how, downgrade))
        return deployment.Deployed("tiny", 2, "0" * 16, 1, 2, 3, "4", "now", True)

    monkeypatch.setattr(deployment, "deploy", stand_in)
    monkeypatch.chdir(tmp_path)
    assert main(["deploy", "up", "tiny/main", "--to", "live", "--tokens", "t", "--workers", "2", "--rate", "5"]) == 0, capsys.readouterr()
    assert seen.pop() == (Path("live"), None, {"workers": 2, "rate": 5.0, "tokens": str(tmp_path / "t"), "store": str(tmp_path / "outputs/store"), "database": "", "log_inputs": "none",
                                               "subject": "tailnum", "keyed": True, "extensions": "pipeline.rollout.desk:extensions"}, "")
    assert main(["deploy", "up", "tiny/main", "--to", "live", "--alone", "--port", "0", "--downgrade", "why"]) == 0 and seen.pop() == (Path("live"), 0, {"workers": 1, "rate": 0.0}, "why")
    assert [e["details"]["to"] for e in audit.entries(tmp_path / "outputs/store") if e["event"] == "package.deployed"] == ["live", "live"]

    # a place that was never used
    assert [main(["deploy", verb, "--to", "elsewhere"]) for verb in ("stop", "back", "status")] == [2, 2, 2] and not (tmp_path / "elsewhere").exists()
