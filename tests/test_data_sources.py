"Every kind of source, from real servers: SQLite, PostgreSQL, HTTP, HTTPS, S3; and what hostile ones are told."
from __future__ import annotations

import datetime as dt
import gzip
import http.server
import io
import json
import random
import shutil
import ssl
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import EnvironmentFault, InputError, IntegrityError, PilothouseError
from pipeline.core.problem import Source
from pipeline.core.settings import Settings, load_settings
from pipeline.core.store import digest_file
from pipeline.data import remotes as remotes_room
from pipeline.data import sources as sources_room
from pipeline.data.archives import list_members, read_member
from pipeline.data.inventory import take_inventory
from pipeline.data.network import Network, check_address, download, shown_url, split_url
from pipeline.data.sources import gather, prepare, read_table
from room_kit import execute, records
from servers.postgres import PASSWORD, Server, postgres, programs
from tables import binary

NOTEBOOK = Path(__file__).parents[1] / "nbs/phases/02_data.ipynb"
SECRETS = (PASSWORD, "s3cret%2Fp%40ss", "hunter2", "AKIDOFTESTS", "tops3cret")


@pytest.fixture
def place(tmp_path: Path) -> Settings:
    "A workplace that may ask this machine."
    (tmp_path / "settings.ini").write_text("[network]\nhosts = 127.0.0.1, localhost\nprivate = yes\ntimeout_s = 10\nmax_mb = 50\n[engine]\nthreads = 1\n")
    return load_settings(tmp_path)


class Notes:
    "Stands for `run.external`: what was registered, by digest."

    def __init__(self, root: Path) -> None:
        self.root, self.seen = root, {}  # type: dict[str, str] | Any

    def __call__(self, path: Path) -> Path:
        path = path if path.is_absolute() else self.root / path
        if not path.is_file():
            raise InputError(f"no data file {path}")
        self.seen[path.name] = digest_file(path)
        return path


def fetched(source: Source, place: Settings) -> pl.DataFrame:
    return read_table(gather([source], Notes(place.root), place)[source.name]).frame


def one_sentence(call: Callable[[], Any], error: type[PilothouseError], *words: str) -> str:
    with pytest.raises(error) as refusal:
        call()
    text = str(refusal.value)
    assert all(word in text for word in words), text
    assert "\n" not in text and len(text) < 400 and not any(secret in text for secret in SECRETS), text
    assert refusal.value.__cause__ is None or not any(secret in str(refusal.value.__cause__) for secret in SECRETS)
    return text


def rows(n: int = 60) -> pl.DataFrame:
    return pl.DataFrame({"id": range(n), "price": [i / 4 for i in range(n)], "city": [["Köln", "Linz", "São Paulo"][i % 3] for i in range(n)],
                         "bought": [dt.date(2024, 1, 1) + dt.timedelta(days=i) for i in range(n)]})


# -- each kind gives the same rows

@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tar.gz", "zip", "parquet", "jsonl", "excel", "delta", "sqlite", "package"])
def test_every_kind_gives_the_same_rows(kind: str, place: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    frame, root = rows(), place.root
    with (root / "t.csv").open("w") as file:
        file.write(frame.write_csv())
    sources: dict[str, Callable[[], Source]] = {}

    def declare(name: str) -> Callable[[Callable[[], dict[str, Any]]], None]:
        def keep(make: Callable[[], dict[str, Any]]) -> None:
            sources[name] = lambda: Source(name="t", **make())
        return keep

    @declare("csv")
    def _() -> dict[str, Any]:
        return {"kind": "csv", "path": "t.csv"}

    @declare("csv.gz")
    def _() -> dict[str, Any]:
        (root / "t.csv.gz").write_bytes(gzip.compress((root / "t.csv").read_bytes()))
        return {"kind": "csv", "path": "t.csv.gz"}

    @declare("tar.gz")
    def _() -> dict[str, Any]:
        with tarfile.open(root / "t.tar.gz", "w:gz") as archive:
            archive.add(root / "t.csv", "deep/t.csv")
            archive.add(root / "settings.ini", "deep/readme.txt")
        return {"kind": "csv", "path": "t.tar.gz", "member": "deep/t.csv"}

    @declare("zip")
    def _() -> dict[str, Any]:
        with zipfile.ZipFile(root / "t.zip", "w") as archive:
            archive.write(root / "t.csv", "t.csv")
        return {"kind": "csv", "path": "t.zip"}

    @declare("parquet")
    def _() -> dict[str, Any]:
        frame.write_parquet(root / "t.parquet")
        return {"kind": "parquet", "path": "t.parquet"}

    @declare("jsonl")
    def _() -> dict[str, Any]:
        frame.write_ndjson(root / "t.jsonl")
        return {"kind": "jsonl", "path": "t.jsonl"}

    @declare("excel")
    def _() -> dict[str, Any]:
        frame.write_excel(root / "t.xlsx", worksheet="second")
        return {"kind": "excel", "path": "t.xlsx", "sheet": "second"}

    @declare("delta")
    def _() -> dict[str, Any]:
        frame.head(3).write_delta(root / "t.delta")
        frame.write_delta(root / "t.delta", mode="overwrite")
        frame.head(5).write_delta(root / "t.delta", mode="overwrite")
        return {"kind": "delta", "path": "t.delta", "version": 1}

    @declare("sqlite")
    def _() -> dict[str, Any]:
        frame.write_database("t", f"sqlite:///{root}/t.db", engine="sqlalchemy")
        return {"kind": "sql", "url": "sqlite:///t.db", "query": "select id, price, city, bought from t order by id"}

    @declare("package")
    def _() -> dict[str, Any]:
        (root / "somedata").mkdir()
        (root / "somedata/__init__.py").write_text("raise RuntimeError('imported')")
        (root / "somedata/t.csv").write_bytes((root / "t.csv").read_bytes())
        monkeypatch.syspath_prepend(str(root))
        return {"kind": "package", "package": "somedata", "member": "t.csv"}

    source = sources[kind]()
    found = fetched(source, place)
    if kind in ("sqlite",):
        found = found.with_columns(pl.col("bought").str.to_date())
    assert found.equals(frame), found
    files = gather([source], Notes(root), place)
    inventory = take_inventory([source], files)
    assert inventory["rows"].item() == 60 and inventory["sha256"].item() == digest_file(files["t"]) and inventory["columns"].item() == 4
    take_inventory([source.model_copy(update={"rows": 60})], files)
    one_sentence(lambda: take_inventory([source.model_copy(update={"rows": 61})], files), InputError, files["t"].name, "60 rows", "61")


def test_two_sources_of_one_archive_are_joined(place: Settings) -> None:
    with zipfile.ZipFile(place.root / "both.zip", "w") as archive:
        archive.writestr("a.csv", "x,y\n1,2\n")
        archive.writestr("b.csv", "x,y\n3,4\n")
    two = [Source(name=n, kind="csv", path="both.zip", member=f"{n}.csv") for n in "ab"]
    notes = Notes(place.root)
    assert prepare(None, gather(two, notes, place)).frame.rows() == [(1, 2), (3, 4)] and set(notes.seen) == {"both.zip", "a.csv", "b.csv"}


def test_what_the_digest_says_must_come(place: Settings) -> None:
    (place.root / "t.csv").write_text("a,b\n1,2\n")
    told = Source(name="t", kind="csv", path="t.csv", sha256=digest_file(place.root / "t.csv"))
    assert fetched(told, place).height == 1
    (place.root / "t.csv").write_text("a,b\n1,3\n")
    one_sentence(lambda: fetched(told, place), InputError, "t.csv has the sha256", str(told.sha256))


# -- a real PostgreSQL

@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if programs() is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    with postgres() as running:
        yield running


@pytest.fixture
def database(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, Any]]:
    "The server, and an engine that may write, for the test's own use."
    import sqlalchemy as sa

    monkeypatch.setenv("PGPASS", PASSWORD)
    engine = sa.create_engine(sa.make_url(server.url.replace("{env:PGPASS}", "x")).set(password=PASSWORD), poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text("drop schema if exists shop cascade"))
        connection.execute(sa.text("create schema shop"))
        connection.execute(sa.text("create sequence shop.numbers"))
        connection.execute(sa.text("""create table shop.baskets (
            id bigint primary key, price numeric(12, 2), ratio double precision, city text, at timestamptz, day date, kept boolean, tags jsonb, parts integer[],
            who uuid, spent interval, address inet)"""))
        connection.execute(sa.text("""insert into shop.baskets select i, case when i % 7 = 0 then null else i * 1.25 end, i / 3.0, 'größe 100% \\:x ' || i % 3,
            timestamptz '2024-01-01 12:00+02' + i * interval '1 hour', date '2024-01-01' + i % 300, i % 2 = 0, jsonb_build_object('n', i), array[i, i + 1],
            md5(i::text)::uuid, i * interval '1 second', '10.0.0.1' from generate_series(5500, 1, -1) i"""))
    yield server, engine
    engine.dispose()


def test_postgres_gives_a_table_in_the_order_of_its_key(database: tuple[Server, Any], place: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    server, _ = database
    monkeypatch.setattr(remotes_room, "ROWS_AT_ONCE", 1_000)      # six parts
    source = Source(name="baskets", kind="sql", url=server.url, table="shop.baskets", licence="own", rows=5_500)
    notes = Notes(place.root)
    files = gather([source], notes, place)
    frame = read_table(files["baskets"]).frame
    assert frame["id"].to_list() == list(range(1, 5_501)) and frame["price"].null_count() == 5_500 // 7
    assert frame.schema["price"] == pl.Float64 and frame.schema["kept"] == pl.Boolean and frame.schema["day"] == pl.Date
    assert frame["at"][0] == dt.datetime(2024, 1, 1, 11) and frame["tags"][1] == '{"n": 2}' and frame["parts"][0] == "[1, 2]" and frame["city"][0] == "größe 100% :x 1"
    assert files["baskets"] == gather([source], notes, place)["baskets"]                 # the same rows are the same file
    assert files["baskets"].parent.name == notes.seen["baskets.parquet"] and files["baskets"].stat().st_mode & 0o077 == 0
    inventory = take_inventory([source], files)
    assert inventory["place"].item() == f"postgresql+psycopg://127.0.0.1:{server.port}/postgres, table shop.baskets"
    assert not any(secret in json.dumps(inventory.to_dicts(), default=str) for secret in SECRETS)


def test_postgres_answers_a_query_and_cannot_be_written_to(database: tuple[Server, Any], place: Settings) -> None:
    import sqlalchemy as sa

    server, engine = database
    query = "select id, price::float8 as price, city like '%0' as zero, at::time::text = '12:30' as noon from shop.baskets where city like 'gr%' and id <= 5 order by id desc"
    frame = fetched(Source(name="q", kind="sql", url=server.url, query=query), place)
    assert frame["id"].to_list() == [5, 4, 3, 2, 1] and frame["zero"].to_list() == [False, False, True, False, False]
    for query in ("delete from shop.baskets returning id", "with gone as (delete from shop.baskets returning id) select * from gone", "drop table shop.baskets",
                  "select 1; drop table shop.baskets", "create table shop.x as select 1", "select nextval('shop.numbers') as n", "select 1 as a; commit; drop table shop.baskets"):
        one_sentence(lambda query=query: fetched(Source(name="q", kind="sql", url=server.url, query=query), place), InputError, "source 'q'")
    with engine.connect() as connection:
        assert connection.execute(sa.text("select count(*) from shop.baskets")).scalar() == 5_500
    for change, words in (({"query": "selekt 1"}, ("syntax error",)), ({"query": "select 1 as a, 2 as a"}, ("2 columns named 'a'",)),
                          ({"query": "select ''::bytea as photo"}, ("column 'photo' holds bytes",)), ({"query": "select 1 as a where false"}, ("no rows",)),
                          ({"table": "shop.basket"}, ("did you mean 'baskets'",)), ({"query": "select 1/0 as a"}, ("division by zero",))):
        one_sentence(lambda change=change: fetched(Source(name="q", kind="sql", url=server.url, **change), place), InputError, *words)


def test_a_wrong_password_is_never_repeated(database: tuple[Server, Any], place: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    server, _ = database
    source = Source(name="q", kind="sql", url=server.url, table="shop.baskets")
    monkeypatch.setenv("PGPASS", "hunter2")
    one_sentence(lambda: fetched(source, place), EnvironmentFault, "password authentication failed", "source 'q'")
    monkeypatch.delenv("PGPASS")
    one_sentence(lambda: fetched(source, place), EnvironmentFault, "PGPASS is not set")
    clear = source.model_copy(update={"url": server.url.replace("{env:PGPASS}", "hunter2")})
    one_sentence(lambda: fetched(clear, place), InputError, "a password in clear")
    monkeypatch.setenv("PGPASS", PASSWORD)
    down = source.model_copy(update={"url": server.url.replace(str(server.port), "1")})
    one_sentence(lambda: fetched(down, place), EnvironmentFault, "source 'q'")
    (place.root / "settings.ini").write_text("[network]\nhosts = db.example.org\n")
    one_sentence(lambda: fetched(source, load_settings(place.root)), IntegrityError, "'127.0.0.1' is not among")


def test_a_database_goes_through_the_data_phase(database: tuple[Server, Any], place: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    import sqlalchemy as sa

    server, engine = database
    binary(np.random.default_rng(1)).write_database("churn", engine, if_table_exists="replace")
    (place.root / "params").mkdir()
    (place.root / "params/churn.yml").write_text(f"""
problem: {{name: churn, statement: Which customers will leave us soon?, kpi: {{name: x, baseline: 0, target: 1, unit: ''}}, task: binary, target: churned, positive: 'yes'}}
data:
  sources: [{{name: churn, kind: sql, url: '{server.url}', table: churn, licence: own, owner: us, collected: 2024-01-01}}]
  split: {{kind: random}}
""")
    monkeypatch.chdir(place.root)
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook shows a no-go and does not raise it")
    execute(NOTEBOOK, "params/churn.yml", "outputs/churn/main")
    run = place.root / "outputs/churn/main"
    receipt = records(run, "02_data", "receipt")
    kept = [name for name in receipt["files"] if "store/fetched" in name]
    assert len(kept) == 1 and kept[0].endswith("churn.parquet") and receipt["files"][kept[0]]["sha256"] in kept[0]
    assert records(run, "02_data", "answer")["verdict"] == "go", records(run, "02_data", "checks")
    written = b"".join(p.read_bytes() for p in (place.root / "outputs").rglob("*") if p.is_file())
    assert not any(secret.encode() in written for secret in SECRETS)
    with engine.begin() as connection:
        connection.execute(sa.text("drop table churn"))


# -- the net

class Site(http.server.BaseHTTPRequestHandler):
    "Serves files, redirects, and misbehaves."

    asked: list[tuple[str, str | None]] = []
    table = b""

    def do_GET(self) -> None:
        Site.asked.append((self.path, self.headers.get("Authorization")))
        body, moved = b"a,b\n1,2\n3,4\n", {"/metadata": "http://169.254.169.254/latest/", "/passwd": "file:///etc/passwd", "/elsewhere": "http://10.0.0.1/t.csv",
                                         "/gopher": "gopher://127.0.0.1/", "/t": "/t.csv", "/round": "/round", "/named": "http://rebinds.example.org/t.csv", "/nowhere": ""}
        path = self.path.split("?")[0]
        if path == "/zipped":
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w") as archive:
                archive.writestr("inner.csv", body)
            body = out.getvalue()
        if path == "/login.csv":
            body = b"<!DOCTYPE html><title>Sign in</title>"
        if path == "/own.csv":
            body = self.table
        self.send_response(302 if path in moved else 403 if path == "/secret.csv" else 200)
        if path in moved:
            self.send_header("Location", moved[path])
        if path == "/packed.csv":
            self.send_header("Content-Encoding", "gzip")
        if path != "/endless.csv":
            self.send_header("Content-Length", str(len(body) + (5 if path == "/cut.csv" else 0)))
        self.end_headers()
        self.wfile.write(body)
        while path == "/endless.csv":
            try:
                self.wfile.write(b"1,2\n" * 250_000)
            except OSError:
                return

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def web(url: str, **more: Any) -> Source:
    return Source(name="web", kind="url", url=url, **more)


def test_a_file_on_the_net_is_kept_by_its_content(site: str, place: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetched(web(f"{site}/t.csv?x=1"), place).rows() == fetched(web(f"{site}/t"), place).rows() == [(1, 2), (3, 4)]
    assert fetched(web(f"{site}/zipped", member="inner.csv"), place).rows() == fetched(web(f"{site}/zipped"), place).rows() == [(1, 2), (3, 4)]
    shutil.rmtree(place.store)
    digest = gather([web(f"{site}/t.csv")], Notes(place.root), place)["web"].parent.name
    asked = len(Site.asked)
    assert fetched(web(f"{site}/t.csv", sha256=digest), place).height == 2 and len(Site.asked) == asked     # here already
    one_sentence(lambda: fetched(web(f"{site}/t.csv", sha256="0" * 64), place), InputError, "t.csv has the sha256", digest)
    monkeypatch.setenv("TOKEN", "tops3cret")
    assert fetched(web(f"{site}/t.csv?token={{env:TOKEN}}"), place).height == 2 and Site.asked[-1][0] == "/t.csv?token=tops3cret"
    assert fetched(web(site.replace("//", "//me:{env:TOKEN}@") + "/t.csv"), place).height == 2 and Site.asked[-1][1] == "Basic bWU6dG9wczNjcmV0"
    left = list((place.store / "fetched").iterdir())
    assert [folder.name for folder in left] == [digest]


@pytest.mark.parametrize(("path", "error", "words"), [
    ("/metadata", IntegrityError, ("169.254.169.254", "not among")), ("/passwd", InputError, ("'file', which is not allowed",)),
    ("/elsewhere", IntegrityError, ("10.0.0.1", "not among")), ("/gopher", InputError, ("'gopher'",)), ("/round", IntegrityError, ("more than 5 times",)),
    ("/named", IntegrityError, ("rebinds.example.org", "not among")), ("/nowhere", InputError, ("redirects to nowhere",)), ("/secret.csv", InputError, ("answered 403",)),
    ("/cut.csv", EnvironmentFault, ("broke off after 12 of 17 bytes",)), ("/packed.csv", InputError, ("was sent packed",)), ("/login.csv", InputError, ("is a web page",)),
    ("/endless.csv", InputError, ("larger than 50 MB",)),
])
def test_a_misbehaving_server_gets_one_sentence(path: str, error: type[PilothouseError], words: tuple[str, ...], site: str, place: Settings) -> None:
    one_sentence(lambda: fetched(web(site + path), place), error, *words)
    assert not [p for p in (place.store / "fetched").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("url", [
    "http://2130706433/t.csv", "http://0x7f000001/", "http://127.1/", "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://0/", "http://localtest.me.example.org/",
    "http://allowed.example.org@evil.example.org/", "http://evil.example.org#@allowed.example.org/", "http://evil.example.org/?@allowed.example.org/",
    "http://allowed.example.org.evil.example.org/", "file:///etc/passwd", "gopher://127.0.0.1/", "dict://127.0.0.1/", "s3://allowed.example.org/x?endpoint=http://127.0.0.1",
    "ftp://allowed.example.org/x", "http:///x", "http://allowed.example.org\t@evil.example.org/", "http://allowed.example.org\\@evil.example.org/", "http://127.0.0.1/ x",
    "//evil.example.org/x", "http://ⓛocalhost/",
])
def test_no_spelling_gets_past_the_door(url: str, place: Settings) -> None:
    (place.root / "settings.ini").write_text("[network]\nhosts = allowed.example.org\n")
    one_sentence(lambda: fetched(web(url), load_settings(place.root)), PilothouseError)


def test_private_addresses_need_leave(site: str, place: Settings) -> None:
    (place.root / "settings.ini").write_text("[network]\nhosts = 127.0.0.1, localhost\n")
    closed = load_settings(place.root)
    one_sentence(lambda: fetched(web(f"{site}/t.csv"), closed), IntegrityError, "loopback", "private = yes")
    one_sentence(lambda: fetched(web(f"{site.replace('127.0.0.1', 'localhost')}/t.csv"), closed), IntegrityError, "loopback")


def test_a_name_that_changes_its_address_reaches_nothing_new(site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Rebinding: the name is resolved once, and the connection goes to the address that was looked at."
    import socket

    real, answers, port = socket.getaddrinfo, [], int(site.rsplit(":", 1)[1])

    def changing(host: str, *more: Any, **named: Any) -> Any:
        if host != "rebinds.example.org":
            return real(host, *more, **named)
        answers.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1" if len(answers) == 1 else "127.0.0.2", port))]

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    file = download(f"http://rebinds.example.org:{port}/t.csv", Network(("rebinds.example.org",), True, 5), tmp_path)
    assert file.stat().st_size == 12 and answers == ["rebinds.example.org"]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_every_address_that_is_not_public_is_refused(number: int) -> None:
    import ipaddress

    ip = ipaddress.ip_address(number)
    closed = Network()
    forms = [str(ip), f"::ffff:{ip}", f"64:ff9b::{ip}", str(ipaddress.IPv6Address((0x2002 << 112) | (number << 80)))]
    for form in forms:
        try:
            check_address("x", form, closed)
            refused = False
        except IntegrityError:
            refused = True
        assert refused == (not ip.is_global or ip.is_multicast), (form, ip)


@given(st.text(st.characters(codec="ascii"), min_size=1, max_size=20), st.sampled_from(["user:{}@", "user:{}%40@", ":{}@"]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_what_is_shown_of_a_url_has_no_password(password: str, form: str) -> None:
    import urllib.parse

    quoted = "hunter2" + urllib.parse.quote(password, safe="!$&'()*+,;=")
    url = f"https://{form.format(quoted)}example.org/t.csv?token={quoted}"
    assert "hunter2" not in shown_url(url)
    with pytest.raises(InputError) as refusal:
        split_url(url)
    assert "hunter2" not in str(refusal.value)


def test_https_checks_the_certificate(place: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    pem = place.root / "own.pem"
    made = subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(place.root / "own.key"), "-out", str(pem), "-days", "30", "-subj", "/CN=localhost",
                           "-addext", "subjectAltName=DNS:localhost"], capture_output=True)
    if made.returncode:
        pytest.skip("openssl is not installed")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, place.root / "own.key")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as running:
        running.socket = context.wrap_socket(running.socket, server_side=True)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        port = running.server_address[1]
        one_sentence(lambda: fetched(web(f"https://localhost:{port}/t.csv"), place), IntegrityError, "certificate is not valid")
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        assert fetched(web(f"https://localhost:{port}/t.csv"), place).height == 2
        one_sentence(lambda: fetched(web(f"https://127.0.0.1:{port}/t.csv"), place), IntegrityError, "certificate is not valid")
        running.shutdown()


def test_https_never_becomes_http() -> None:
    from pipeline.data.network import _next_url

    with pytest.raises(IntegrityError, match="from https to http"):
        _next_url("https://a.example.org/t.csv", "http://a.example.org/t.csv", "https://a.example.org/t.csv")
    assert _next_url("https://a.example.org/x/t.csv", "../u.csv", "") == "https://a.example.org/u.csv"


# -- object storage

@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'pilothouse[s3]'")
    server = pytest.importorskip("moto.server", reason="moto is not installed")
    import boto3

    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id="AKIDOFTESTS", aws_secret_access_key="tops3cret", region_name="us-east-1")
    client.create_bucket(Bucket="trips")
    out = io.BytesIO()
    rows().write_parquet(out)
    client.put_object(Bucket="trips", Key="june/t.parquet", Body=out.getvalue())
    yield endpoint
    running.stop()


def test_a_bucket_is_read_through_the_same_door(bucket: str, place: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDOFTESTS")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tops3cret")
    url = f"s3://trips/june/t.parquet?endpoint={bucket}"
    assert fetched(web(url), place).equals(rows())
    assert fetched(web(url.replace("127.0.0.1", "localhost")), place).equals(rows())
    assert shown_url(url) == "s3://trips/june/t.parquet"
    one_sentence(lambda: fetched(web(url.replace("t.parquet", "u.parquet")), place), InputError, "does not exist")
    one_sentence(lambda: fetched(web(url.replace("trips", "trip")), place), PilothouseError, "s3://trip/")
    one_sentence(lambda: fetched(web(url.replace("127.0.0.1", "169.254.169.254")), place), IntegrityError, "not among")
    one_sentence(lambda: fetched(web("s3://trips/june/t.parquet"), place), IntegrityError, "trips.s3.us-east-1.amazonaws.com")
    (place.root / "settings.ini").write_text("[network]\nhosts = 127.0.0.1, localhost\n")
    one_sentence(lambda: fetched(web(url), load_settings(place.root)), IntegrityError, "loopback")


def test_a_bucket_behind_a_name_that_changes_is_refused(bucket: str, place: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    "The second look at the name, by the library that connects, goes through the same door."
    import socket

    real, asked, port = socket.getaddrinfo, [], int(bucket.rsplit(":", 1)[1])

    def changing(host: str, *more: Any, **named: Any) -> Any:
        if host != "rebinds.example.org":
            return real(host, *more, **named)
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1" if len(asked) == 1 else "169.254.169.254", port))]

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    (place.root / "settings.ini").write_text("[network]\nhosts = rebinds.example.org\nprivate = yes\ntimeout_s = 5\n")
    one_sentence(lambda: fetched(web(f"s3://trips/june/t.parquet?endpoint=http://rebinds.example.org:{port}"), load_settings(place.root)), IntegrityError, "metadata service")
    assert len(asked) >= 2


# -- archives

def archive(path: Path, *members: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in members:
            out.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../evil.csv", "/etc/cron.d/x", "a/../../x", "..\\..\\evil.csv", "C:\\evil.csv", "C:/evil.csv", "a\x1b[2J.csv"])
def test_slips_are_refused(name: str, tmp_path: Path) -> None:
    one_sentence(lambda: read_table(archive(tmp_path / "slip.zip", (name, b"a\n1\n"))), IntegrityError, "slip.zip", "would leave the folder")
    with tarfile.open(tmp_path / "slip.tar", "w") as out:
        entry = tarfile.TarInfo(name)
        entry.size = 4
        out.addfile(entry, io.BytesIO(b"a\n1\n"))
    one_sentence(lambda: read_table(tmp_path / "slip.tar"), IntegrityError, "slip.tar", "would leave the folder")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(kind: bytes, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz") as out:
        entry = tarfile.TarInfo("t.csv")
        entry.type, entry.linkname = kind, "/etc/passwd"
        out.addfile(entry)
        plain = tarfile.TarInfo("u.csv")
        plain.size = 4
        out.addfile(plain, io.BytesIO(b"a\n1\n"))
    one_sentence(lambda: read_member(tmp_path / "t.tar.gz", "u.csv"), IntegrityError, "link or device")
    link = zipfile.ZipInfo("t.csv")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as zipped:
        zipped.writestr(link, "/etc/passwd")
    one_sentence(lambda: read_table(tmp_path / "t.zip"), IntegrityError, "link or device")


def test_bombs_are_left_packed(tmp_path: Path) -> None:
    zeros = b"0" * 60_000_000
    archive(tmp_path / "bomb.zip", ("t.csv", zeros))
    (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(zeros, 1))
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz", compresslevel=1) as out:
        entry = tarfile.TarInfo("t.csv")
        entry.size = len(zeros)
        out.addfile(entry, io.BytesIO(zeros))
    for name in ("bomb.zip", "bomb.csv.gz", "bomb.tar.gz"):
        one_sentence(lambda name=name: read_table(tmp_path / name), IntegrityError, name, "200 times")
    archive(tmp_path / "bomb.xlsx", ("xl/workbook.xml", zeros))
    one_sentence(lambda: read_table(tmp_path / "bomb.xlsx"), IntegrityError, "bomb.xlsx", "60 MB")
    archive(tmp_path / "many.zip", *((f"{i}.csv", b"") for i in range(10_001)))
    one_sentence(lambda: list_members(tmp_path / "many.zip"), IntegrityError, "more than 10,000 files")


def test_a_header_that_lies_about_sizes_unpacks_no_more_than_it_says(tmp_path: Path) -> None:
    path = archive(tmp_path / "lies.zip", ("t.csv", b"a\n" + b"1\n" * 500_000))
    data = path.read_bytes()
    path.write_bytes(data.replace((1_000_002).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    one_sentence(lambda: read_table(path), InputError, "no whole archive")


def test_a_parquet_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_room, "MOST_CELLS", 1_000_000)      # the real limit is 500 million cells
    pl.select(pl.repeat(1, 3_000_000, dtype=pl.Int8).alias("a")).write_parquet(tmp_path / "bomb.parquet")
    one_sentence(lambda: read_table(tmp_path / "bomb.parquet"), IntegrityError, "3,000,000 rows of 1 columns")
    rows(2000).write_parquet(tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet").frame.height == 2000


@pytest.mark.parametrize("suffix", ["parquet", "xlsx", "jsonl", "csv"])
def test_a_flipped_bit_is_read_or_refused_in_one_sentence(suffix: str, tmp_path: Path) -> None:
    frame, chance, path = rows(200), random.Random(7), tmp_path / f"t.{suffix}"
    {"jsonl": frame.write_ndjson, "parquet": frame.write_parquet, "xlsx": frame.write_excel, "csv": frame.write_csv}[suffix](path)
    content, silent = path.read_bytes(), 0
    for _ in range(150):
        at = chance.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1:])
        try:
            silent += not read_table(path).frame.equals(frame)
        except PilothouseError as error:
            assert path.name in str(error) and "\n" not in str(error)
    assert suffix != "xlsx" or silent == 0      # a workbook keeps checksums; of the others only a declared sha256 tells


def test_broken_archives_are_input_errors(tmp_path: Path) -> None:
    chance = random.Random(3)
    good = archive(tmp_path / "t.zip", ("t.csv", b"a,b\n" + b"1,2\n" * 2000)).read_bytes()
    packed = gzip.compress(b"a,b\n" + bytes(chance.choices(b"0123456789,\n", k=4000)))
    for name, content in (("t.zip", good), ("t.csv.gz", packed)):
        for cut in chance.sample(range(len(content)), 25):
            (tmp_path / name).write_bytes(content[:cut])
            one_sentence(lambda name=name: read_member(tmp_path / name), InputError, name)
        for _ in range(25):
            at = chance.randrange(len(content))
            (tmp_path / name).write_bytes(content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1:])
            try:
                read_member(tmp_path / name)
            except PilothouseError as error:
                assert "\n" not in str(error)


# -- files cut, flipped or of another kind than they say

@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "xlsx"])
def test_a_cut_file_is_refused_by_name(suffix: str, tmp_path: Path) -> None:
    frame, chance = rows(200), random.Random(5)
    path = tmp_path / f"t.{suffix}"
    {"jsonl": frame.write_ndjson, "parquet": frame.write_parquet, "xlsx": frame.write_excel}[suffix](path)
    content = path.read_bytes()
    for cut in [0, 1, len(content) // 2, len(content) - 2, *chance.sample(range(2, len(content)), 20)]:
        path.write_bytes(content[:cut])
        if suffix == "jsonl" and content[:cut].count(b"\n") and content[:cut].endswith((b"\n", b"}")):
            continue
        one_sentence(lambda: read_table(path), InputError, path.name)


@given(st.binary(max_size=400))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_bytes_are_read_or_refused_in_one_sentence(content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name in ("t.csv", "t.jsonl", "t.parquet", "t.xlsx", "t.zip", "t.csv.gz", "t.tar", "t"):
            (Path(folder) / name).write_bytes(content)
            try:
                read_table(Path(folder) / name)
            except PilothouseError as error:
                assert "\n" not in str(error) and len(str(error)) < 500


def test_kind_and_file_must_agree(place: Settings) -> None:
    rows().write_parquet(place.root / "t.parquet")
    one_sentence(lambda: fetched(Source(name="t", kind="csv", path="t.parquet"), place), InputError, "kind csv, but t.parquet is parquet")
    rows().write_parquet(place.root / "t.dat")
    assert fetched(Source(name="t", kind="parquet", path="t.dat"), place).equals(rows())
    one_sentence(lambda: fetched(Source(name="t", kind="csv", path="t.parquet.d"), place), InputError, "no data file")


def test_a_delta_log_that_points_elsewhere_is_refused(place: Settings) -> None:
    outside = place.root / "secret.parquet"
    rows().write_parquet(outside)
    for there in ("../secret.parquet", f"file://{outside}", str(outside), "%2e%2e/secret.parquet"):
        folder = place.root / f"t{abs(hash(there))}"
        rows().write_delta(folder)
        log = next((folder / "_delta_log").glob("*.json"))
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for line in lines:
            if "add" in line:
                line["add"]["path"] = there
        log.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
        kind = IntegrityError if there.endswith("./secret.parquet") or there.startswith("%") else PilothouseError
        one_sentence(lambda folder=folder: fetched(Source(name="t", kind="delta", path=folder.name), place), kind, "source 't'")
    folder = place.root / "linked"
    rows().write_delta(folder)
    part = next(folder.glob("*.parquet"))
    part.unlink()
    part.symlink_to(outside)
    one_sentence(lambda: fetched(Source(name="t", kind="delta", path="linked"), place), IntegrityError, "outside its folder")


def test_our_own_versions_can_be_sources(place: Settings) -> None:
    from pipeline.data.versions import save_version

    frame = rows().with_row_index("__row").with_columns(pl.col("__row").cast(pl.Int64)).rename({"city": "name of (city)"})
    first = save_version(place.store, "trips", frame)
    save_version(place.store, "trips", frame.head(10))
    source = Source(name="t", kind="delta", path="outputs/store/tables/trips", version=first["id"])
    assert fetched(source, place).equals(frame.drop("__row"))
    one_sentence(lambda: fetched(source.model_copy(update={"version": "v0123456789abcdef"}), place), InputError, "no version 'v0123456789abcdef'")


# -- a person's own table, of every kind, from `pilothouse new` to the end of the data phase

@pytest.mark.parametrize("kind", ["jsonl", "excel", "csv.gz", "delta", "sqlite", "url"])
def test_an_own_table_of_any_kind_becomes_a_problem_that_runs(kind: str, site: str, place: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from pipeline.core.problem import load_problem
    from pipeline.data.starter import start_problem

    frame, root = binary(np.random.default_rng(3)), place.root
    monkeypatch.chdir(root)
    if kind == "jsonl":
        frame.write_ndjson(root / "t.jsonl")
    elif kind == "excel":
        frame.write_excel(root / "t.xlsx")
    elif kind == "csv.gz":
        (root / "t.csv.gz").write_bytes(gzip.compress(frame.write_csv().encode()))
    elif kind == "delta":
        frame.write_delta(root / "t.delta")
    elif kind == "sqlite":
        frame.write_database("baskets", f"sqlite:///{root}/t.db", engine="sqlalchemy")
    else:
        monkeypatch.setattr(Site, "table", frame.write_csv().encode())
    data = {"jsonl": "t.jsonl", "excel": "t.xlsx", "csv.gz": "t.csv.gz", "delta": "t.delta", "sqlite": "sqlite:///t.db#baskets", "url": f"{site}/own.csv"}[kind]
    file = start_problem("own", data, "churned", root / "params")
    source = load_problem(file).data.sources[0]
    assert source.kind == {"sqlite": "sql", "csv.gz": "csv"}.get(kind, kind) and source.licence
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook shows a no-go and does not raise it")
    execute(NOTEBOOK, "params/own.yml", "outputs/own/main")
    run = root / "outputs/own/main"
    assert records(run, "02_data", "answer")["verdict"] == "go", records(run, "02_data", "checks")
    read = {Path(name).name for name in records(run, "02_data", "receipt")["files"]}
    assert {"sqlite": {"t.db", "own.parquet"}, "delta": {"own.parquet"}, "url": {"own.csv"}}.get(kind, {data}) <= read


def test_a_licence_that_forbids_the_use_is_a_no_go(place: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from pipeline.data.starter import start_problem

    binary(np.random.default_rng(3)).write_csv(place.root / "t.csv")
    monkeypatch.chdir(place.root)
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook shows a no-go and does not raise it")
    file = start_problem("own", place.root / "t.csv", "churned", place.root / "params")
    file.write_text(file.read_text().replace("own data (assumed)", "CC-BY-NC-4.0"))
    for use, verdict in (("commercial", "no-go"), ("research", "go")):
        file.write_text(file.read_text().replace("data:\n", f"data:\n  use: {use}\n", 1) if "use:" not in file.read_text() else file.read_text().replace("commercial", use))
        execute(NOTEBOOK, "params/own.yml", "outputs/own/main")
        failed = [c["title"] for c in records(place.root / "outputs/own/main", "02_data", "checks") if c["verdict"] == "no-go"]
        assert failed == (["Every licence allows the use"] if verdict == "no-go" else [])
