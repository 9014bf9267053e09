"""The registry of packages: the same promises on SQLite and on a real PostgreSQL, with several writers and a crash in between."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.core import audit
from pipeline.core.errors import EnvironmentFault, GateFailed, InputError, IntegrityError
from pipeline.core.run import Check
from pipeline.deploy.package import KEY, Contents, release
from pipeline.deploy.registry import EVENT, Registry
from pipeline.deploy.schema import make_schema
from pipeline.deploy.service import serve
from pipeline.deploy.versions import Plans
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting
from tests.servers.postgres import PASSWORD, postgres, programs

CONTRACT = {"target": "late", "task": "binary", "classes": ["False", "True"], "features": ["hour"], "columns": [
    {"name": "hour", "type": "number", "dtype": "Float64", "nullable": False, "min": 5.0, "max": 23.0}]}


@pytest.fixture(scope="module")
def server():
    if programs() is None:
        pytest.skip("PostgreSQL is not installed here")
    os.environ["PGPASS"] = PASSWORD
    with postgres() as running:
        yield running
    del os.environ["PGPASS"]


@pytest.fixture(params=["sqlite", "postgresql"])
def world(request, tmp_path):
    "A store with three released packages and an empty registry."
    url = ""
    if request.param == "postgresql":
        running = request.getfixturevalue("server")
        import sqlalchemy

        from pipeline.data.network import fill_secrets

        admin = sqlalchemy.create_engine(fill_secrets(running.url)[0], isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(sqlalchemy.text("DROP TABLE IF EXISTS packages, moves, failures, plans"))
        admin.dispose()
        url = running.url
    hour = np.random.default_rng(5).uniform(5, 23, 200)
    model = train_model("trees", pl.DataFrame({"hour": hour}), (hour > 15).astype(int), CONTRACT, Fitting({"rounds": 3})).save(tmp_path / "trained")

    def packed(card: str) -> Path:
        told = Contents(CONTRACT, make_schema(CONTRACT).to_dict(), {"threshold": 0.4}, [], {"name": "late"}, card, {})
        return release(tmp_path / "store", tmp_path / card, "late", model, told)

    registry = Registry(tmp_path / "store", url)
    packages = [packed(f"card{i}") for i in range(3)]
    for package in packages:
        registry.register(package, "go", "late/main", by="ci")
    yield registry, url, packages
    registry.close()


def up(registry: Registry, version: int, *states: str) -> None:
    for state in states:
        registry.move("late", version, state, "a reason", by="ann")


def test_one_in_production_whatever_comes(world):
    registry, _, packages = world
    up(registry, 1, "staging", "canary", "production")
    up(registry, 2, "staging", "canary", "production")
    assert {e.version: e.state for e in registry.entries("late")} == {3: "candidate", 2: "production", 1: "retired"}
    assert registry.register(packages[1], "no-go", "late/main").state == "production", "what is live is not judged anew by a run"
    assert registry.entry("late", 2).verdict == "go"
    back = registry.rollback("late", "errors", by="bob")
    assert (back.version, back.state, registry.entry("late", 2).state) == (1, "production", "retired")
    with pytest.raises(InputError, match="nothing older"):
        registry.rollback("late", "further")
    up(registry, 3, "staging", "canary", "production")
    assert registry.rollback("late", "again", by="bob").version == 1, "a package that was rolled back does not come back by a rollback"
    assert audit.verify(registry.store) == len(registry.moves())


def test_a_failed_gate_cannot_be_promoted(world):
    registry, _, packages = world
    registry.register(packages[2], "no-go", "late/main")
    before = registry.entries()
    with pytest.raises(GateFailed, match="verdict no-go"):
        registry.move("late", 3, "staging", "please")
    assert registry.entries() == before


def test_what_fails_after_the_package_was_made_bars_it_too(world):
    registry, _, packages = world
    digest = registry.entry("late", 3).digest
    assert registry.judge(packages[2], "no-go", "late/main", by="ci").verdict == "no-go"
    with pytest.raises(GateFailed, match=r"verdict no-go \(late/main\) and cannot become staging"):
        registry.move("late", 3, "staging", "please")
    assert registry.register(packages[2], "go", "late/main").verdict == "no-go", "the deploy phase alone does not lift what the whole run has said"
    assert registry.judge(packages[2], "go", "late/main").verdict == "go"
    up(registry, 3, "staging")
    registry.judge(packages[2], "no-go", "late/stricter")
    with pytest.raises(GateFailed, match=r"no-go \(late/stricter\) and cannot become canary"):
        registry.move("late", 3, "canary", "please")
    with pytest.raises(GateFailed, match="verdict no-go"):
        Plans(registry).go_live("late", 0, digest, "straight to the callers")
    registry.judge(packages[2], "inconclusive", "late/main")
    up(registry, 3, "canary", "production")
    assert registry.judge(packages[2], "no-go", "late/main").verdict == "inconclusive" and registry.judge(packages[2], "no-go", "late/main", by="ci").state == "production"
    told = [e["details"]["reason"] for e in audit.entries(registry.store) if e["details"].get("from") == e["details"].get("to")]
    assert told == ["judged no-go by the run late/main; before: go, by late/main", "judged go by the run late/main; before: no-go, by late/main",
                    "judged no-go by the run late/stricter; before: go, by late/main", "judged inconclusive by the run late/main; before: no-go, by late/stricter"]


def test_a_looser_limit_lifts_nothing(world):
    registry, _, packages = world

    def judged(number: int, verdict: str, limit: str):
        return registry.judge(packages[number], verdict, f"late/{limit}", by="ci", checks=[Check("ROC AUC", verdict, "0.71", limit)])

    assert judged(2, "no-go", "≥ 0.8").verdict == "no-go"
    assert judged(2, "go", "≥ 0.6").verdict == "no-go" and judged(2, "go", "≥ 0.6").verdict == "no-go"
    with pytest.raises(GateFailed, match=r"failed: ROC AUC, limit ≥ 0.8\); mend what failed and run again, or answer for it by name: .* --waive --reason"):
        registry.move("late", 3, "staging", "it says go")
    with pytest.raises(InputError, match="needs a reason"):
        registry.move("late", 3, "staging", " ", waive=True)
    assert judged(2, "inconclusive", "≥ 0.8").verdict == "inconclusive", "measured again at the same limit"
    assert judged(2, "no-go", "≥ 0.8").verdict == "no-go"
    assert Plans(registry).move("late", 3, "staging", "the owner asks for 0.6", by="ann", waive=True).verdict == "waived"
    told = audit.entries(registry.store)[-1]["details"]
    assert (told["to"], told["by"], told["reason"]) == ("staging", "ann", "waived (ROC AUC, limit ≥ 0.8): the owner asks for 0.6")
    up(registry, 3, "canary", "production")
    with pytest.raises(InputError, match="nothing bars it from becoming staging; leave --waive out"):
        registry.move("late", 1, "staging", "please", waive=True)


def test_what_a_service_starts_with(world, monkeypatch):
    "A no-go answers nobody but who tries it here; whichever run is named, the traffic's plan says which package answers."
    registry, url, packages = world
    started: list[Path] = []
    monkeypatch.setattr("pipeline.deploy.service.serve_package", lambda folder, *given, **more: started.append(folder) or folders.append(more["store"]))
    monkeypatch.setattr("pipeline.deploy.package.package_of", lambda run: (packages[int(run.name)], audit.public_key(registry.store, KEY)))
    folders: list[str] = []

    def start(number: int, **more) -> Path:
        serve(registry.store.parent / "late" / str(number), port=0, database=url, **more)
        return started[-1]

    registry.judge(packages[2], "no-go", "late/main", by="ci")
    with pytest.raises(GateFailed, match=r"v3 comes from a run with the verdict no-go \(late/main\) and answers nobody .* --trial"):
        start(2)
    assert start(2, trial=True) == packages[2] and folders[-1] == "" and audit.entries(registry.store)[-1]["event"] == "package.tried"
    with pytest.raises(InputError, match="a trial answers on this machine alone and 0.0.0.0 was asked"):
        start(2, trial=True, host="0.0.0.0", token_ref=None)
    assert start(0) == packages[0] and folders[-1] == str(registry.store)
    up(registry, 1, "staging", "canary", "production")
    plans = Plans(registry)
    plans.go_live("late", 0, registry.entry("late", 1).digest, "the first")
    plans.go_live("late", 1, registry.entry("late", 2).digest, "the trial went well")
    assert start(0) == registry.store / "models" / registry.entry("late", 2).digest == start(1)
    assert start(0, downgrade="a drill") == packages[0]


def test_an_older_package_is_not_a_new_one(world):
    registry, _, _ = world
    up(registry, 2, "staging", "canary", "production")
    up(registry, 1, "staging")
    before = registry.entries()
    with pytest.raises(IntegrityError, match="older than v2, which was in production"):
        registry.move("late", 1, "canary", "it is new, believe me")
    assert registry.entries() == before and registry.newest("late") == 2
    registry.move("late", 1, "canary", "the auditors ask for it", by="bob", downgrade=True)
    told = audit.entries(registry.store)[-1]["details"]
    assert (told["to"], told["by"], told["reason"]) == ("canary", "bob", "downgrade below v2: the auditors ask for it")


def test_going_back_goes_further_back_and_never_forth(world):
    registry, _, _ = world
    for version in (1, 2, 3):
        up(registry, version, "staging", "canary", "production")
    assert [registry.rollback("late", "worse").version for _ in range(2)] == [2, 1]
    with pytest.raises(InputError, match="nothing older to go back to"):
        registry.rollback("late", "worse still")
    assert registry.before("late") is None and registry.holder("late").version == 1


def test_a_changed_package_is_not_registered(world):
    registry, _, packages = world
    model = packages[0] / "model" / "model.txt"
    model.chmod(0o644)
    model.write_bytes(model.read_bytes().replace(b"threshold=1", b"threshold=2", 1))
    before = registry.entries()
    with pytest.raises(IntegrityError, match="model/model.txt differs"):
        registry.register(packages[0], "go")
    assert registry.entries() == before


RIVAL = """
import sys
from pathlib import Path
from pipeline.core.errors import InputError
from pipeline.deploy.registry import Registry
store, url, version, to, expected = sys.argv[1:]
registry = Registry(Path(store), url)
sys.stdin.readline()
try:
    registry.move("late", int(version), to, "I was first", by=f"process {version}", expected=expected)
    print("moved")
except InputError as error:
    print(error)
"""


def rivals(registry: Registry, url: str, wishes: list[tuple[int, str, str]]) -> list[str]:
    "Each wish from a process of its own, all let go at the same moment."
    started = [subprocess.Popen([sys.executable, "-c", RIVAL, str(registry.store), url, str(v), to, seen], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
               for v, to, seen in wishes]
    for process in started:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate(timeout=120)[0].strip() for process in started]


def test_only_one_of_many_wins(world):
    registry, url, _ = world
    up(registry, 1, "staging")
    answers = rivals(registry, url, [(1, "canary", "staging")] * 6)
    assert answers.count("moved") == 1 and sum("is canary, not staging" in a for a in answers) == 5, answers
    assert audit.verify(registry.store) == len(registry.moves()) == 5


def test_two_packages_cannot_both_be_on_trial(world):
    registry, url, _ = world
    for version in (1, 2, 3):
        up(registry, version, "staging")
    answers = rivals(registry, url, [(v, "canary", "staging") for v in (1, 2, 3)])
    assert answers.count("moved") == 1 and sum("is on trial already" in a for a in answers) == 2, answers
    assert len([e for e in registry.entries() if e.state == "canary"]) == 1


def test_the_database_itself_keeps_a_second_production_out(world):
    import sqlalchemy

    registry, _, _ = world
    up(registry, 1, "staging", "canary", "production")
    table = registry.tables.packages
    with pytest.raises(sqlalchemy.exc.IntegrityError), registry.engine.begin() as connection:
        connection.execute(table.update().where(table.c.version == 2).values(state="production"))
    assert registry.holder("late").version == 1


def test_a_crash_before_the_trail_is_made_good(world, monkeypatch):
    registry, url, _ = world

    def lost(*words, **more):
        raise KeyboardInterrupt

    told = len(audit.entries(registry.store))
    with monkeypatch.context() as patched:
        patched.setattr(audit, "append", lost)
        with pytest.raises(KeyboardInterrupt):
            registry.move("late", 1, "staging", "a reason", by="ann")
    assert registry.entry("late", 1).state == "staging" and len(audit.entries(registry.store)) == told
    Registry(registry.store, url).close()
    last = audit.entries(registry.store)[-1]
    assert last["event"] == EVENT and last["details"]["to"] == "staging" and len(audit.entries(registry.store)) == told + 1


def test_another_database_has_numbers_of_its_own(world, tmp_path):
    "A registry that moved to another database, or came back from a backup, counts its moves anew: each is in the trail all the same."
    registry, _, packages = world
    told = len(audit.entries(registry.store))
    other = Registry(registry.store, f"sqlite:///{tmp_path / 'other.db'}")
    for package in packages:
        other.register(package, "go", "late/main", by="ci")
    other.move("late", 1, "staging", "a reason", by="ann")
    moves = [e["details"] for e in audit.entries(registry.store)][told:]
    assert [(m["move"], m["version"], m["to"]) for m in moves] == [(1, 1, "candidate"), (2, 2, "candidate"), (3, 3, "candidate"), (4, 1, "staging")]
    other.close()


@pytest.mark.parametrize("world", ["sqlite"], indirect=True)
def test_a_database_that_is_gone_is_not_begun_anew(world, tmp_path):
    "An empty one would say that nothing was ever live."
    registry, _, _ = world
    registry.close()
    store, place = registry.store, registry.store / "pilothouse.db"
    kept = place.rename(tmp_path / "moved.db")
    with pytest.raises(EnvironmentFault, match=r"pilothouse\.db is not there, although the audit trail tells of 3 moves"):
        Registry(store)
    assert not place.exists()
    kept.rename(place)
    again = Registry(store)
    assert len(again.entries("late")) == 3
    again.close()


def test_long_words_are_kept_by_every_database(world):
    registry, _, packages = world
    licences = ", ".join(f"Apache Software License {n}" for n in range(40))
    many = [Check(f"a criterion with the number {n} and a long name", "no-go", "0.1", licences) for n in range(30)]
    assert registry.judge(packages[0], "no-go", "late/main", checks=[*many, Check("y" * 400, "no-go", "0.1", "≤ 0")]).verdict == "no-go"
    lifted = registry.move("late", 1, "staging", "x" * 1500, by="ann " * 100, waive=True)
    assert lifted.verdict == "waived" and lifted.reason.endswith("x" * 1500) and len(lifted.by) == 200
    assert registry.judge(packages[1], "no-go", "late/main", checks=many).verdict == "no-go"
    assert registry.judge(packages[1], "go", "late/main", checks=[Check(c.title, "go", "0.9", c.limit) for c in many]).verdict == "go", "the same limits, met"
    for reason, why in (("x" * 1501, "at most 1,500 are kept"), ("x\0", "bytes that are no text"), ("caf\udce9", "bytes that are no text")):
        with pytest.raises(InputError, match=why):
            registry.move("late", 3, "staging", reason)
        with pytest.raises(InputError, match=why):
            Plans(registry).change("late", 0, reason, live=registry.entry("late", 3).digest)


def test_a_server_that_only_reads_and_a_user_without_rights_are_no_damage(server):
    import sqlalchemy

    from pipeline.data.network import fill_secrets

    admin = sqlalchemy.create_engine(fill_secrets(server.url)[0], isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sqlalchemy.text("DROP TABLE IF EXISTS packages, moves, failures, plans"))
        connection.execute(sqlalchemy.text("CREATE ROLE reader LOGIN PASSWORD 'reader'"))
    reader, standby = server.url.replace("keeper:{env:PGPASS}", "reader:reader"), f"{server.url}?options=-cdefault_transaction_read_only%3Don"
    for url, why in ((reader, "permission denied"), (standby, "read-only")):
        with pytest.raises(EnvironmentFault, match=f"refuses .*{why}.*see to its disk and to the rights of its user"):
            Registry(Path("unused"), url)
    admin.dispose()


def test_what_answers_and_what_is_called_production_move_together(world, monkeypatch):
    registry, _, _ = world
    plans, digests = Plans(registry), {e.version: e.digest for e in registry.entries("late")}

    def both() -> tuple[dict[int, str], int, int]:
        plan = plans.current("late")
        return {e.version: e.state for e in registry.entries("late")}, plan.revision, next(v for v, d in digests.items() if d == plan.live)

    plans.go_live("late", 0, digests[1], "deployed to the shop", "ann")
    plans.go_live("late", 1, digests[2], "deployed to the shop", "ann")
    before = both()
    assert before == ({1: "retired", 2: "production", 3: "candidate"}, 2, 2)
    with pytest.raises(InputError, match="revision 2 and not 1; look again"):      # somebody was quicker with the traffic
        plans.go_live("late", 1, digests[3], "deployed to the shop")
    with pytest.raises(IntegrityError, match="v1 is older than v2"):               # the registry says no
        plans.go_live("late", 2, digests[1], "deployed to the shop")
    with pytest.raises(InputError, match="is not registered"):
        plans.go_live("late", 2, "0" * 64, "deployed to the shop")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):       # killed between the two
        patched.setattr(plans, "_next", lambda *words: (_ for _ in ()).throw(KeyboardInterrupt()))
        plans.go_live("late", 2, digests[3], "deployed to the shop")
    assert both() == before
    assert plans.roll_back("late", "errors since noon", "bob").version == 1 and both() == ({1: "production", 2: "retired", 3: "candidate"}, 3, 1)
    for state in ("staging", "canary"):
        plans.move("late", 3, state, "better on validation", "ann")
    assert both()[1:] == (3, 1), "a trial is the rollout's business"
    plans.move("late", 3, "production", "the owner has decided", "ann")
    assert both() == ({1: "retired", 2: "retired", 3: "production"}, 4, 3)
    with pytest.raises(InputError, match="v3 of late answers requests now; bring another version into production before it is retired"):
        plans.move("late", 3, "retired", "old", "ann")
    assert both() == ({1: "retired", 2: "retired", 3: "production"}, 4, 3)
    assert audit.verify(registry.store) == len(registry.moves()) + len(plans.history("late"))


def test_a_database_that_is_not_there(tmp_path):
    os.environ["PGNOWHERE"] = "x"
    with pytest.raises(EnvironmentFault, match="does not answer") as told:
        Registry(tmp_path, "postgresql+psycopg://ann:{env:PGNOWHERE}@127.0.0.1:1/db")
    assert "ann" not in str(told.value).split("(")[0]


def test_a_full_database_takes_nothing_and_goes_on_afterwards(world):
    registry, url, _ = world
    if url:
        pytest.skip("the disk of a server is not ours to fill")
    with registry.engine.connect() as connection:      # the same answer as a full disk's
        raw = connection.connection.driver_connection
        raw.execute("CREATE TABLE filler (x)")
        raw.execute(f"PRAGMA max_page_count = {raw.execute('PRAGMA page_count').fetchone()[0]}")
        raw.execute("INSERT INTO filler VALUES (zeroblob(1000))")
    with pytest.raises(EnvironmentFault, match=r"refuses \(database or disk is full\)"):
        for _ in range(200):
            registry.move("late", 1, "staging", "x" * 1500, by="ann")
            registry.move("late", 1, "candidate", "x" * 1500, by="ann")
    registry.close()      # whoever comes next has no such limit
    assert [m for m in registry.moves("late") if m.version == 1][-1].went_to == registry.entry("late", 1).state
    registry.move("late", 2, "staging", "there is room again")


def test_a_database_file_that_is_none(tmp_path):
    (tmp_path / "pilothouse.db").write_bytes(b"not a database, sorry" * 100)
    with pytest.raises(IntegrityError, match="cannot be read"):
        Registry(tmp_path)


def test_the_command(project, pilothouse):
    "Verb `models` on an empty registry of a project: nothing yet, and slips are told in one sentence."
    done = pilothouse("models", "--json")
    assert done.returncode == 0 and json.loads(done.stdout) == []
    assert "needs the problem's name" in pilothouse("models", "--move", "3", "--to", "staging").stderr
    wrong = pilothouse("models", "late", "--move", "3", "--to", "staging", "--reason", "why not")
    assert wrong.returncode == 2 and "late v3 is not registered" in wrong.stderr
