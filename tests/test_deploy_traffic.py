"""Several versions in a running service: swaps, switches, shares, slices, and packages that must not go live."""
from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from serving_kit import Running, load, packages, running, until

import deploy_world as world
from pipeline.core import audit
from pipeline.core.errors import IntegrityError
from pipeline.core.store import digest_file
from pipeline.deploy.inference_log import read_inferences
from pipeline.deploy.package import KEY, load_package
from pipeline.deploy.registry import Registry
from pipeline.deploy.staging import as_rows
from pipeline.deploy.versions import FOLLOWED, Plan, Plans, Routing, Served, point, refusal


class World:
    "A store of three versions, the server, its plans, and what each version answers."

    def __init__(self, store: Path, folders: list[Path], server: Running):
        self.store, self.folders, self.server = store, folders, server
        self.digests = [f.name for f in folders]
        self.plans = Plans(Registry(store))
        key = audit.public_key(store, KEY)
        predictors = [load_package(folder, key) for folder in folders]
        frame = world.rows("binary", 60, seed=9)
        self.bodies = [json.dumps({"rows": [row]}).encode() for row in as_rows(frame, predictors[0].schema.names)]
        self.expected = {p.version: p.predict(frame)["p_true"].to_list() for p in predictors}

    def change(self, **changes: Any) -> Plan:
        plan = self.plans.current("tiny")
        return self.plans.change("tiny", plan.revision if plan else 0, "a test", **changes)

    def followed(self, plan: Plan) -> bool:
        "Whether the worker said that it follows it."
        return any(r["revision"] == plan.revision for r in self.server.records("traffic"))

    def wrong(self, answers: list[tuple[float, int, int, Any]]) -> list[Any]:
        "Answers that are not, bit for bit, those of the one version that they name."
        return [a for a in answers if a[1] != 200 or a[3]["predictions"][0]["p"]["true"] != self.expected[a[3]["version"]][a[2]]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    store, folders = packages(tmp_path_factory.mktemp("traffic"), [20, 35, 50])
    with running(store, folders[0], store=str(store), drain_s=0.1) as server:
        yield World(store, folders, server)


def test_without_a_plan_the_package_itself_answers(served: World) -> None:
    assert json.loads(served.server.ask("POST", "/predict", served.bodies[0])[2])["version"] == 1


def test_swaps_and_switches_under_load_drop_nothing_and_mix_nothing(served: World) -> None:
    took = []
    with load(served.server, served.bodies, 2, 0.005, prefer="handling=lenient") as seen:
        for live in (1, 0, 1, 0, 1, 0):     # after the first one, back and forth between versions at hand
            plan = served.change(live=served.digests[live])
            start = time.monotonic()
            assert until(lambda version=live + 1: seen.answers and seen.answers[-1][3].get("version") == version)
            took.append(time.monotonic() - start)
            assert served.plans.current("tiny") == plan
    assert not seen.faults and not served.wrong(seen.answers) and {a[3]["version"] for a in seen.answers} == {1, 2}
    assert max(took[-4:]) < 5      # a second, on a machine that does nothing else


def test_a_package_that_kills_its_reader_never_goes_live(served: World, tmp_path: Path) -> None:
    from pipeline.core.store import digest_bytes
    from pipeline.deploy.package import Contents, release

    broken = shutil.copytree(served.folders[1] / "model", tmp_path / "model")
    for file in broken.iterdir():
        file.chmod(0o644)
    text = (broken / "model.txt").read_bytes()
    (broken / "model.txt").write_bytes(text[:len(text) // 2])
    told = json.loads((broken / "digests.json").read_text())
    told["files"]["model.txt"] = digest_bytes((broken / "model.txt").read_bytes())
    (broken / "digests.json").write_text(json.dumps(told))
    contents = {n: json.loads((served.folders[1] / f"{n}.json").read_text()) for n in ("contract", "schema", "threshold", "claims", "card")}
    package = release(served.store, tmp_path / "work", "tiny", broken, Contents(**contents, card_text="# broken\n", origin={}))
    before = [p.pid for p in served.server.workers()]
    good = served.change(live=served.digests[0])
    bad = served.change(canary=package.name, share=50.0)
    assert until(lambda: [r for r in served.server.records("plan refused") if r["revision"] == bad.revision])
    assert [p.pid for p in served.server.workers()] == before and good.revision + 1 == bad.revision
    assert {json.loads(served.server.ask("POST", "/predict", body)[2])["version"] for body in served.bodies[:20]} == {1}
    assert until(lambda: refusal(served.store, "tiny", bad.revision) == served.server.records("plan refused")[-1]["error"])
    after = served.change(canary=None, share=0.0, live=served.digests[1])
    assert until(lambda: served.followed(after))


def test_a_tampered_package_never_goes_live(served: World) -> None:
    file = served.folders[2] / "threshold.json"
    whole = file.read_bytes()
    kept = served.store / "models" / ("f" * 64)
    shutil.copytree(served.folders[2], kept)
    for part in kept.rglob("*.json"):
        part.chmod(0o644)
    (kept / "threshold.json").write_bytes(whole.replace(b"0.4", b"0.1"))
    plan = served.change(live="f" * 64)
    assert until(lambda: [r for r in served.server.records("plan refused") if r["revision"] == plan.revision])
    assert until(lambda: "threshold.json differs" in refusal(served.store, "tiny", plan.revision))
    (kept / "threshold.json").write_bytes(whole)
    served.server.workers()[0].kill()      # who comes after it tries at once
    assert until(lambda: refusal(served.store, "tiny", plan.revision) == "")
    assert [e["event"] for e in audit.entries(served.store) if e["details"].get("revision") == plan.revision][-1] == FOLLOWED
    trail = served.store / "audit.jsonl"
    trail.rename(trail.with_suffix(".away"))
    trail.write_text("no entry\n")        # a trail that nobody can read stops no plan
    with pytest.raises(IntegrityError, match="restore the trail"):
        served.change(live=served.digests[0])
    assert until(lambda: served.followed(served.plans.current("tiny")))
    assert until(lambda: [line for line in list(served.server.lines) if "not in the audit trail" in line])
    trail.with_suffix(".away").replace(trail)
    followed = served.change(live=served.digests[1])
    assert until(lambda: served.followed(followed))
    assert json.loads(served.server.ask("POST", "/predict", served.bodies[0])[2])["version"] == 2


def test_a_worker_that_is_replaced_follows_the_plan_and_not_the_start(served: World) -> None:
    with load(served.server, served.bodies, 2, 0.005, prefer="handling=lenient") as seen:
        assert until(lambda: len(seen.answers) > 20)
        served.server.workers()[0].kill()
        killed = len(seen.answers)
        assert until(lambda: len(seen.answers) > killed + 20)
    assert len(seen.faults) <= 2      # one in flight for each client; whoever came later waited
    assert not served.wrong(seen.answers) and {a[3]["version"] for a in seen.answers} == {2}


# What a routing promises, without a server.

def routing(**plan: Any) -> Routing:
    live, canary = (Served(SimpleNamespace(version=v, expires=None), str(v) * 64) for v in (1, 2))  # type: ignore[arg-type]
    return Routing(live, canary, Plan("tiny", "1" * 64, "2" * 64, **plan))


def test_only_the_slice_meets_the_canary_and_the_share_is_kept() -> None:
    found = routing(share=5.0, slice={"origin": "JFK"}, subject="tailnum", salt="tiny-2")
    inside, leaks = [0, 0], 0
    for i in range(100_000):
        origin = ("JFK", "LGA", "EWR")[i % 3]
        role = found.pick([{"origin": origin, "tailnum": f"N{i}"}], "r")[1]
        leaks += origin != "JFK" and role == "canary"
        inside[0] += origin == "JFK"
        inside[1] += origin == "JFK" and role == "canary"
    assert leaks == 0 and abs(100 * inside[1] / inside[0] - 5) < 1


def test_a_subject_stays_and_more_share_only_adds() -> None:
    rows = [{"tailnum": f"N{i}"} for i in range(3000)]
    before: set[int] = set()
    for share in (0.0, 1.0, 5.0, 25.0, 50.0, 100.0):
        found = routing(share=share, subject="tailnum", salt="tiny-2")
        now = {i for i, row in enumerate(rows) if found.pick([row], f"request {i}")[1] == "canary"}
        assert now == {i for i, row in enumerate(rows) if found.pick([row], "another")[1] == "canary"}
        assert before <= now and abs(len(now) / 30 - share) < 2
        before = now
    assert len(before) == len(rows) and point("N1", "a") != point("N1", "b")


def test_a_request_of_many_rows_is_answered_by_one_version() -> None:
    found = routing(share=50.0, slice={"origin": "JFK"}, subject="tailnum", salt="x")
    on = [{"origin": "JFK", "tailnum": t} for t in map(str, range(50)) if found.pick([{"origin": "JFK", "tailnum": t}], "")[1] == "canary"]
    off = next({"origin": "JFK", "tailnum": t} for t in map(str, range(50)) if found.pick([{"origin": "JFK", "tailnum": t}], "")[1] == "live")
    assert found.pick(on, "")[1] == "canary" and found.pick([*on, off], "")[1] == "live"
    assert found.pick([*on, {"origin": "LGA", "tailnum": on[0]["tailnum"]}], "")[1] == "live"
    assert found.pick([{"origin": "JFK"}], "")[1] == "live"     # nobody to stick to
    assert routing(shadow=True).pick([{}], "")[2] is not None and routing(shadow=True).pick([{}], "")[1] == "live"


def test_every_plan_is_in_the_trail_once(served: World) -> None:
    told = [e["details"]["revision"] for e in audit.entries(served.store) if e["event"] == "traffic.changed"]
    assert told == [p.revision for p in reversed(served.plans.history("tiny"))] and audit.verify(served.store)
    assert digest_file(served.folders[0] / "MANIFEST.json") == served.digests[0]


def asked(served: World, extra: dict[str, Any], n: int, prefix: str) -> list[tuple[int, Any]]:
    "Requests with fields that only the traffic reads."
    found = []
    for i in range(n):
        body = json.loads(served.bodies[i])
        body["rows"][0] |= {k: v.format(i) if isinstance(v, str) else v for k, v in extra.items()}
        status, _, out = served.server.ask("POST", "/predict", json.dumps(body).encode(), **{"prefer": "handling=lenient", "x-request-id": f"{prefix}{i}"})
        found.append((status, json.loads(out)))
    return found


def test_a_shadow_answers_for_the_record_alone(served: World) -> None:
    plan = served.change(live=served.digests[0], canary=served.digests[1], share=0.0, shadow=True, subject="tailnum", slice={})
    assert until(lambda: served.followed(plan))
    found = asked(served, {}, 8, "shadow-")
    assert {(status, answer["version"]) for status, answer in found} == {(200, 1)}

    def kept() -> pl.DataFrame:
        return read_inferences(served.store, "tiny").filter(pl.col("request_id").str.starts_with("shadow-"))

    assert until(lambda: len(kept()) == 16)
    log = kept().sort("request_id", "role")
    assert log["role"].to_list() == ["live", "shadow"] * 8 and log["version"].to_list() == [1, 2] * 8
    told = {(r, v): p for r, v, p in log.select("request_id", "version", "p_true").iter_rows()}
    assert all(told[f"shadow-{i}", v] == served.expected[v][i] for i in range(8) for v in (1, 2))


def test_a_running_service_keeps_to_slice_share_and_subject(served: World) -> None:
    plan = served.change(live=served.digests[0], canary=served.digests[1], share=50.0, shadow=False, subject="tailnum", salt="s", slice={"carrier": "UA"})
    assert until(lambda: served.followed(plan))
    wanted = [2 if point(f"N{i}", "s") * 100 < 50 else 1 for i in range(40)]
    inside = [answer["version"] for _, answer in asked(served, {"tailnum": "N{}", "carrier": "UA"}, 40, "in-")]
    outside = [answer["version"] for _, answer in asked(served, {"tailnum": "N{}", "carrier": "B6"}, 40, "out-")]
    assert inside == wanted and len(set(wanted)) == 2 and set(outside) == {1}
    assert {a["version"] for _, a in asked(served, {"carrier": "UA"}, 10, "nobody-")} == {1}
    page = served.server.ask("GET", "/metrics")[2].decode()
    assert "pilothouse_canary_share 50" in page and 'role="canary"' in page
