"""`pilothouse forget`: nothing is left wherever a subject lay, nobody else loses anything, a crash is made good, and what cannot be changed is named."""
from __future__ import annotations

import datetime as dt
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from room_kit import contract_of, make_project, rows
from sqlalchemy import text

from pipeline.cli.main import main
from pipeline.comply import forgetting
from pipeline.comply.erasure import is_signed
from pipeline.comply.forgetting import Subject, find_held, forget_subject
from pipeline.comply.traces import find_traces
from pipeline.core import audit
from pipeline.core.crypto import known_key, named, pseudonym_key, seal, subject_keys, token
from pipeline.core.errors import InputError, IntegrityError
from pipeline.core.run import open_run
from pipeline.data.privacy import hide_columns, seal_columns
from pipeline.data.versions import list_versions, read_version, save_version
from pipeline.deploy.inference_log import Layout, Recorder, note_outcomes, read_inferences
from pipeline.deploy.package import Contents, release
from pipeline.deploy.registry import Registry
from pipeline.engine.lock import holding
from pipeline.label import versions as labels

WHO, LIKE = "C-0012", "C-00123"          # the second name begins with the first
NOW = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)
START = dt.datetime(2024, 1, 1)


def answered(store: Path, customers: list[str], keyed: bool = False) -> None:
    log = Recorder(store, "shop", {1: Layout(("price",), ("home",), "customer", ("no", "yes"), keyed)}, interval=60, collects=False)
    for i, who in enumerate(customers):
        body = {"rows": [{"price": i, "customer": who, "home": f"street of {who}"}]}
        log.add(1.7e9 + i, f"r{i}", 1, "live", 200, 0.4, json.dumps(body).encode(), b'{"predictions": [{"prediction": "no", "p": {"no": 0.9, "yes": 0.1}}]}')
    log.close()
    note_outcomes(store, "shop", [{"request_id": f"r{i}", "value": "yes"} for i in range(len(customers))], ["no", "yes"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A workplace with two runs (one hides the subject), three versions, labels, a log, a tracker, pages and another problem."
    place = tmp_path_factory.mktemp("made")
    make_project(place, extra="  time: day\ncomply: {subject: customer, retention_days: 30}\n")
    frame = rows(300, START, seed=3).with_columns(
        customer=pl.when(pl.col("__row") % 60 == 7).then(pl.lit(WHO)).when(pl.col("__row") % 60 == 8).then(pl.lit(LIKE)).when(pl.col("customer") == WHO).then(pl.lit("C-9999")).otherwise("customer"))
    store = place / "outputs/store"
    here = Path.cwd()
    os.chdir(place)
    try:
        for name, seen in (("main", frame), ("hidden", hide_columns(frame, store, ["customer"]))):
            data = open_run("02_data", "params/shop.yml", f"outputs/shop/{name}")
            data.save("data/train", seen.head(200))
            data.save("data/holdout", seen.tail(100), sealed=True)
            data.save("data/contract", contract_of(frame, "binary"))
            data.conclude("It is so.")
            data.finish()
            run = place / "outputs/shop" / name
            frame.select("__row", p=pl.col("price")).write_parquet(run / "02_data/scores.parquet")
            (run / "manifest.json").write_text('{"phases": {}}')
    finally:
        os.chdir(here)
    page = place / "outputs/shop/main/02_data/report.html"
    page.write_text(f"<td>{WHO}</td><td>{LIKE}</td><script>x={json.dumps(named(pseudonym_key(store), f'customer{chr(0)}{WHO}'))}</script>")
    for more in range(3):
        save_version(store, "shop", frame.with_columns(pl.col("price") + more))
    save_version(store, "other", frame)
    first = labels.save_version(store, "shop", labels.labels_of(frame, "y"), START.replace(tzinfo=dt.UTC), why="bought")
    turned = frame.with_columns(y=pl.when(pl.col("__row") == 3).then(pl.lit("true")).otherwise(pl.lit("false")))
    labels.save_version(store, "shop", labels.labels_of(turned, "y"), START.replace(tzinfo=dt.UTC, day=2), parent=first["id"], why="corrected")
    answered(store, [WHO, LIKE, "C-1", WHO])
    tracker = store / "wandb/offline-run-1"
    tracker.mkdir(parents=True)
    (tracker / "run.wandb").write_bytes(b"\x00\xff\x00" + WHO.encode() + b"\x00\xfe")
    (tracker / "table.json").write_text(json.dumps({"data": [[WHO, 1], [LIKE, 2]]}))
    (store / "wandb/latest-run").symlink_to(tracker)
    with zipfile.ZipFile(place / "outputs/index.html.zip", "w") as archive:
        archive.writestr("nothing", "about nobody")
    (place / "outputs/index.html").write_text(f"<p>{WHO.lower()}</p>")
    shutil.copytree(place / "outputs/shop/main/02_data", place / "outputs/other/main/02_data")
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "place", symlinks=True)
    (tmp_path / "place/outputs/store/wandb/latest-run").unlink()
    (tmp_path / "place/outputs/store/wandb/latest-run").symlink_to(tmp_path / "place/outputs/store/wandb/offline-run-1")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def subject(place: Path, who: str = WHO) -> Subject:
    return Subject(place / "outputs", "shop", "customer", who)


def command(*words: str) -> tuple[int, str]:
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        code = main(list(words))
    return code, out.getvalue()


def test_nothing_is_left_and_nobody_else_loses_anything(place: Path) -> None:
    store, run = place / "outputs/store", place / "outputs/shop/main"
    stand = named(pseudonym_key(store), f"customer\0{WHO}")
    before = pl.read_parquet(run / "02_data/train.parquet")
    others = {p: p.read_bytes() for folder in ("outputs/other", "outputs/store/tables/other") for p in (place / folder).rglob("*") if p.is_file()}
    held = {row["place"]: row["rows"] for row in find_held(subject(place)).to_dicts() if row["rows"]}
    assert held == {"shop/main": 5, "shop/hidden": 5, "table and its versions": 5, "inference log": 2, "label versions": 5}
    told = forget_subject(subject(place), "letter 12", "clerk", NOW, sources=("shop",))
    assert told["open"] == [] and is_signed(store, told) and told["rows_removed"] == {"runs": 20, "table": 5, "inference log": 2, "labels": 5}
    for value in (WHO, stand):
        assert not find_traces(place / "outputs/shop", value) and not find_traces(place / "outputs/index.html", value)
        assert not [t for t in find_traces(store, value) if not t.path.startswith("tables/other")]
    assert all(p.read_bytes() == content for p, content in others.items())                     # another problem is another request
    train = pl.read_parquet(run / "02_data/train.parquet")
    assert train.equals(before.filter(pl.col("customer") != WHO)) and LIKE in train["customer"].to_list()
    assert pl.read_parquet(run / "02_data/scores.parquet").height == 295                        # by row number: no name stands there
    assert (run / "02_data/holdout.parquet").stat().st_mode & 0o777 == 0o600
    assert f"<td>erased</td><td>{LIKE}</td>" in (run / "02_data/report.html").read_text()
    assert read_version(store, "shop", list_versions(store, "shop")[-1]["id"]).height == 295
    kept = read_inferences(store, "shop")
    assert kept["request_id"].to_list() == ["r1", "r2"] and kept["outcome"].to_list() == ["yes", "yes"]
    first, second = labels.list_versions(store, "shop")
    assert second["parent"] == first["id"] and first["why"] == "bought" and labels.load_version(store, "shop", second["id"]).height == 295
    assert not (store / "wandb/offline-run-1/run.wandb").exists() and LIKE in (store / "wandb/offline-run-1/table.json").read_text()
    trail = (store / "audit.jsonl").read_text()
    assert audit.verify(store) and "subject.forgotten" in trail and WHO not in trail
    assert [m["learned_from"] for m in told["models"]] == [] and told["runs_to_run_again"] == ["shop/hidden", "shop/main"]
    assert forget_subject(subject(place), "letter 12", "clerk", NOW)["files_changed"] == 0        # twice is once
    assert find_held(subject(place, LIKE))["rows"].sum() > 0


def test_with_keys_the_key_goes_last_and_with_it_every_copy(place: Path) -> None:
    store = place / "outputs/store"
    keys = subject_keys(store, [WHO, LIKE])
    shutil.rmtree(store / "tables/shop")
    save_version(store, "shop", seal_columns(rows(300, START, seed=3).with_columns(customer=pl.when(pl.col("__row") < 5).then(pl.lit(WHO)).otherwise(pl.lit(LIKE))), store, "shop", ["customer", "country"], "customer"))
    answered(store, [WHO, LIKE], keyed=True)
    copy = seal(keys[WHO], "Elm St 7", "elsewhere")
    before = read_inferences(store, "shop", inputs=True)["subject"].to_list()
    assert before.count(token(keys[WHO])) == 1
    told = forget_subject(subject(place), "letter 12", "clerk", NOW)
    assert told["open"] == [] and told["rows_removed"]["table"] == 5 and told["rows_removed"]["inference log"] == 3
    assert known_key(store, WHO) is None and known_key(store, LIKE) == keys[LIKE] and copy.startswith("sealed:")
    assert token(keys[WHO]) not in read_inferences(store, "shop")["subject"].to_list() and not find_traces(store / "tables/shop", token(keys[WHO]))
    answered(store, [WHO], keyed=True)               # asked about once more: the log keeps no new trace
    line = read_inferences(store, "shop", inputs=True).row(-1, named=True)
    assert (line["subject"], line["inputs"], line["sealed"]) == (None, None, None)


@pytest.mark.parametrize("step", ["_forget_labels", "_forget_in_tables", "_certificate"])
def test_a_crash_anywhere_is_made_good_by_the_same_request(place: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*given: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(forgetting, step, crash)
        with pytest.raises(KeyboardInterrupt):
            forget_subject(subject(place), "letter 12", "clerk", NOW)
    assert not (place / "outputs/store/certificates").exists()
    told = forget_subject(subject(place), "letter 12", "clerk", NOW)
    assert told["open"] == [] and find_held(subject(place)).is_empty() and labels.load_version(place / "outputs/store", "shop", labels.list_versions(place / "outputs/store", "shop")[-1]["id"]).height == 295


def test_a_number_goes_by_its_rows_and_copies_of_sources_go_whole(place: Path) -> None:
    "4711 stands in every file for something; rows are found by the column, and what was fetched is fetched again without them."
    store, run = place / "outputs/store", place / "outputs/shop/main"
    frame = pl.DataFrame({"__row": range(6), "customer": [4711, 4712, 4711, 4713, 4712, 4711], "price": [4711.0] * 6})
    frame.write_parquet(run / "02_data/train.parquet")
    shutil.rmtree(store / "tables/shop")
    save_version(store, "shop", frame)
    for name in ("a" * 64, "b" * 64):
        (store / "fetched" / name).mkdir(parents=True)
        (store / "fetched" / name / "shop.csv").write_text("customer\n4711\n")
    receipt = json.loads((run / "02_data/receipt.json").read_text())
    receipt["files"][f"outputs/store/fetched/{'a' * 64}/shop.csv"] = {"sha256": "a" * 64, "bytes": 1, "mtime_ns": 1}
    (run / "02_data/receipt.json").write_text(json.dumps(receipt))
    told = forget_subject(subject(place, "4711"), "letter 12", "clerk", NOW)
    assert told["open"] == [] and told["rows_removed"]["table"] == 3 and told["searched_by"].startswith("rows alone")
    assert pl.read_parquet(run / "02_data/train.parquet").to_dicts() == [row for row in frame.to_dicts() if row["customer"] != 4711]
    assert not (store / f"fetched/{'a' * 64}/shop.csv").exists() and (store / f"fetched/{'b' * 64}/shop.csv").exists()


def test_what_is_no_subject_changes_nothing(place: Path) -> None:
    (place / "outputs/shop/main/02_data/report.html").write_text("somebody said nobody")
    before = {p: p.read_bytes() for p in (place / "outputs").rglob("*") if p.is_file() and "inferences" not in p.parts}      # looking takes these in
    for who, reason, said in (("nobody", "letter", "no row of shop is about this subject"), ("C-001", "letter", "no row of shop"), (WHO, "", "needs a reason"),
                              (WHO, f"asked by {WHO.lower()}", "names the subject")):
        with pytest.raises(InputError, match=said):
            forget_subject(subject(place, who), reason, "clerk", NOW)
    (place / "outputs/shop/main/02_data/link").symlink_to(place / "settings.ini")
    with pytest.raises(IntegrityError, match="nothing was changed"):
        forget_subject(subject(place), "letter", "clerk", NOW)
    assert all(p.read_bytes() == content for p, content in before.items()) and not (place / "outputs/store/audit.jsonl").exists()


def test_packages_and_typed_texts_that_name_the_subject_are_left_to_people(place: Path) -> None:
    "A signed package stays as it is while it may answer; retired, it goes. What a model learned from is remembered."
    store = place / "outputs/store"
    (place / "model").mkdir()
    (place / "model/model.json").write_text(json.dumps({"family": "table", "levels": [WHO]}))
    registry = Registry(store)
    try:
        package = release(store, place / "work", "shop", place / "model", Contents({}, {}, {}, [], {}, "# tiny\n", {}))
        registry.register(package, "go", "shop/main", "ada")
        for state in ("staging", "canary", "production"):
            registry.move("shop", 1, state, f"as agreed with {WHO}" if state == "canary" else "as agreed", "ada")
        # the trail keeps what was typed there, too
        told = forget_subject(subject(place), "letter 12", "clerk", NOW, registry)
        assert len(told["open"]) == 3 and "shop v1 (production) names the subject" in told["open"][0] and "trail" in told["open"][1] and "database" in told["open"][2]
        assert [(m["model"], m["learned_from"], m["todo"]) for m in told["models"]] == [("v1", 4, "train again, roll out, retire v1")]
        with registry.engine.begin() as connection:
            for table in ("moves", "packages"):
                connection.execute(text(f"update {registry.tables.moves.name if table == 'moves' else registry.tables.packages.name} set reason = 'as agreed'"))  # noqa: S608
        registry.move("shop", 1, "retired", "its subject was forgotten", "ada")
        again = forget_subject(subject(place), "letter 12", "clerk", NOW, registry)
        assert len(again["open"]) == 1 and "trail" in again["open"][0] and not package.exists()
        assert [(m["learned_from"], m["todo"]) for m in again["models"]] == [(4, "nothing: it is retired")]
    finally:
        registry.close()


def test_the_command(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*words: str) -> tuple[int, str]:
        return command("forget", *words)

    code, said = asked(WHO, "--problem", "shop", "--dry-run", "--json")
    assert code == 0 and {row["place"] for row in json.loads(said)} >= {"shop/main", "inference log", "outputs/index.html".removeprefix("outputs/")}
    assert asked()[0] == asked(WHO, "--expired")[0] == 2 and "--problem" in asked(WHO)[1] or asked(WHO, "--problem", "shop")[0] == 2
    with holding(place / "outputs/shop/main"):
        code, said = asked(WHO, "--problem", "shop", "--reason", "letter 12")
        assert code == 4 and "is being worked on by process" in said
    code, said = asked("C-7777", "--problem", "shop", "--reason", "letter 12")
    assert code == 2 and "C-7777" not in said
    file = place / "params/shop.yml"
    file.write_text(file.read_text().replace("retention_days: 30", "retention_days: 30, roles: {clerk: [forget], viewer: [report]}"))
    for role in ("", "viewer"):
        code, said = asked(WHO, "--problem", "shop", "--reason", "letter 12", *(["--role", role] if role else []))
        assert (code, "role 'viewer' may not answer and erase a subject; ask clerk" in said, "give your role with --role" in said) == ((3, True, False) if role else (2, False, True))
    assert [e["event"] for e in audit.entries(place / "outputs/store")] == ["access.refused"]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{WHO}\n"))
    code, said = asked("-", "--problem", "shop", "--reason", "letter 12", "--role", "clerk")
    assert code == 0 and "5 in table" in said and "shop/main lost rows and is stale: pilothouse run shop" in said and "pilothouse run shop --run hidden" in said and WHO not in said
    code, said = command("verify", "shop/main")
    assert code == 3 and "a subject was forgotten in this run" in said and "pilothouse run shop)" in said
    certificate = next((place / "outputs/store/certificates").glob("*.json"))
    told = json.loads(certificate.read_text())
    assert is_signed(place / "outputs/store", told) and told["sources_of_owners"] == ["shop"] and certificate.stat().st_mode & 0o777 == 0o600
    assert not is_signed(place / "outputs/store", told | {"rows_removed": {}})


def test_what_has_expired_goes_and_the_newest_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.comply.case import days_kept

    store = place / "outputs/store"
    now = dt.datetime.now(dt.UTC)
    known = [v["id"] for v in list_versions(store, "shop")]
    sets = [v["id"] for v in labels.list_versions(store, "shop")]
    aged: Callable[[Path], None] = lambda p: os.utime(p, (now.timestamp() - 40 * 86_400,) * 2)  # noqa: E731
    for version in known[:2]:
        aged(next((store / "tables/shop").glob(f"{version}-*")))
    for version in sets:
        aged(store / f"labels/shop/{version}.parquet")
    assert days_kept(store, "shop", now) >= 40
    before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file() and "inferences" not in str(p) and "outcomes" not in str(p)}
    code, said = command("forget", "--expired", "--problem", "shop", "--dry-run", "--json")
    assert code == 5 and json.loads(said)["log_lines"] == 4 and all(p.read_bytes() == held for p, held in before.items())
    assert command("forget", "--expired", "--problem", "shop")[0] == 2                         # without a reason
    code, said = command("forget", "--expired", "--problem", "shop", "--reason", "monthly")
    assert code == 5 and f"label version {sets[-1]} is older than promised and the newest" in said and "2 table and 1 label versions" in said
    assert read_inferences(store, "shop").is_empty() and [v["id"] for v in labels.list_versions(store, "shop")] == sets[-1:]
    assert read_version(store, "shop", known[-1]).height == 300 and not any((store / "tables/shop").glob(f"{known[0]}-*"))
    os.utime(store / f"labels/shop/{sets[-1]}.parquet")
    assert command("forget", "--expired", "--problem", "shop", "--reason", "monthly")[0] == 0 and days_kept(store, "shop", now) == 0
    assert [e["event"] for e in audit.entries(store)] == ["expired.removed"] * 2
