"""A real server in a process of its own, asked over sockets."""
from __future__ import annotations

import datetime as dt
import gzip
import ipaddress
import json
import os
import resource
import signal
import socket
import ssl
import threading
import time
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest
from serving_kit import Running, load, running, until

import deploy_world as world
from pipeline.core import audit
from pipeline.core.errors import EnvironmentFault
from pipeline.data.contract import target_values
from pipeline.deploy.http import CONNECTIONS
from pipeline.deploy.inference_log import read_inferences
from pipeline.deploy.package import KEY, Contents, load_package, release
from pipeline.deploy.registry import Registry
from pipeline.deploy.requests import Limits
from pipeline.deploy.schema import make_schema
from pipeline.deploy.service import free_port
from pipeline.deploy.staging import Staged, as_rows, await_ready, bodies, compare, replay, staged
from pipeline.deploy.tokens import make_token
from pipeline.deploy.versions import Plans
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    "A store, and a package in it."
    place = tmp_path_factory.mktemp("server")
    frame, contract = world.rows("binary", 600), world.contract("binary")
    train_model("trees", frame, target_values(frame, contract), contract, Fitting({"rounds": 20})).save(place / "model")
    contents = Contents(contract, make_schema(contract, frame).to_dict(), {"threshold": .4}, [], {}, "#\n", {})
    return place / "store", release(place / "store", place / "work", "tiny", place / "model", contents)


@pytest.fixture(scope="module")
def server(package: tuple[Path, Path]) -> Iterator[Staged]:
    with staged(package[1], audit.public_key(package[0], KEY)) as running:
        yield running


def status(server: Staged, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = server.connect()
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    found = response.status, response.read()
    connection.close()
    return found


def test_it_answers_as_the_package_does(server: Staged, package: tuple[Path, Path]) -> None:
    predictor = load_package(package[1], audit.public_key(package[0], KEY))
    frame = world.rows("binary", 1000, seed=5)
    rows = as_rows(frame, predictor.schema.names)
    assert compare(predictor.predict(frame), replay(server, rows, 300), 0).equal
    assert compare(predictor.predict(frame.head(50)), replay(server, rows[:50], 1), 0).equal


def test_wide_rows_are_asked_in_bodies_that_the_service_takes(server: Staged, package: tuple[Path, Path]) -> None:
    predictor = load_package(package[1], audit.public_key(package[0], KEY))
    row = as_rows(world.rows("binary", 9, seed=5), predictor.schema.names)[-1]
    wide = [{**row, "carrier": "UA" + " " * 4_900}] * 2_000    # 10 MB in one body
    assert len(replay(server, wide, chunk=len(wide))) == len(wide) == sum(len(json.loads(b)["rows"]) for b in bodies(wide, len(wide)))
    assert max(map(len, bodies(wide, len(wide)))) < Limits().body_bytes


def test_many_at_once_all_get_their_own_answer(server: Staged, package: tuple[Path, Path]) -> None:
    predictor = load_package(package[1], audit.public_key(package[0], KEY))
    frame = world.rows("binary", 240, seed=6)
    rows, expected = as_rows(frame, predictor.schema.names), predictor.predict(frame)["p_true"].to_list()

    def one(number: int) -> bool:
        found, body = status(
            server,
            "POST",
            "/predict",
            json.dumps({"rows": [rows[number]]}).encode(),
            **{"prefer": "handling=lenient", "x-request-id": f"r{number}"},
        )
        answer = json.loads(body)
        return found == 200 and answer["request_id"] == f"r{number}" and answer["predictions"][0]["p"]["true"] == expected[number]

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(one, range(240)))


READY = """
import json, sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pipeline.deploy.handler import Service
from pipeline.deploy.service import load_served
served = load_served(Path(sys.argv[1]), Ed25519PublicKey.from_public_bytes(bytes.fromhex(sys.argv[2])))
known = set(sys.modules)
status, _, out = Service(served.predictor).handle("POST", "/predict", {"prefer": "explain"}, sys.argv[3].encode())
print(json.dumps([status, len(json.loads(out)["explanations"]), sorted(set(sys.modules) - known), sorted({"lightgbm", "pandas", "sklearn"} & set(sys.modules))]))
"""


def test_the_first_explanation_waits_for_no_library(package: tuple[Path, Path]) -> None:
    "What a request may need is read before it comes; and LightGBM's Python package, a second of a core and 130 MB, not at all."
    key = audit.public_key(package[0], KEY)
    body = json.dumps({"rows": as_rows(world.rows("binary", 5, seed=5), load_package(package[1], key).schema.names)[:1]})
    said = subprocess.run([sys.executable, "-c", READY, str(package[1]), key.public_bytes_raw().hex(), body], capture_output=True, text=True, cwd=world.ROOT, timeout=120)
    assert said.returncode == 0 and json.loads(said.stdout) == [200, 1, [], []], said


def test_bodies_that_are_too_large_get_a_readable_answer_in_bounded_memory(server: Staged) -> None:
    before = server.memory_mb()
    found, body = status(server, "POST", "/predict", b'{"rows": [' + b" " * 40_000_000)
    assert found == 413 and "8,000,000 bytes" in json.loads(body)["detail"]
    assert server.memory_mb() < before + 60


def test_a_client_that_stops_in_the_middle_harms_nobody(server: Staged) -> None:
    lazy = [socket.create_connection((server.host, server.port)) for _ in range(20)]
    for connection in lazy:
        connection.sendall(b"POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 1000\r\n\r\n{")
    assert status(server, "GET", "/health")[0] == 200
    for connection in lazy:
        connection.close()
    assert status(server, "GET", "/ready")[0] == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: -5\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
    ],
)
def test_what_is_no_request_is_no_fault(server: Staged, raw: bytes) -> None:
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        connection.sendall(raw)
        connection.settimeout(10)
        answer = connection.recv(200)
    assert not answer.startswith((b"HTTP/1.1 5", b"HTTP/1.1 2"))
    assert status(server, "GET", "/health")[0] == 200


def test_there_are_descriptors_for_as_many_as_there_is_room_for(package: tuple[Path, Path]) -> None:
    "Whatever the shell gives that starts it."
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, most))
    try:
        with running(package[0], package[1]) as server:
            assert server.workers()[0].rlimit(psutil.RLIMIT_NOFILE)[0] == min(CONNECTIONS + 1024, most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))


def test_a_foreign_host_name_gets_nothing(server: Staged) -> None:
    assert status(server, "GET", "/health", host="evil.example")[0] == 421
    assert status(server, "GET", "/health", host="localhost:1234")[0] == 200


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    "`serve` as the command calls it; only for starts that are refused."
    code = ("import sys; from pipeline.core.errors import PilothouseError; from pipeline.deploy.service import serve\n"
            "try: serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])\n"
            "except PilothouseError as error: print(error, file=sys.stderr); sys.exit(error.exit_code)")
    return subprocess.run(
        [sys.executable, "-c", code, str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=world.ROOT,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, package: tuple[Path, Path]) -> Path:
    "A run whose deploy phase kept that package."
    import shutil

    from pipeline.core.store import digest

    outputs = tmp_path_factory.mktemp("run") / "outputs"
    shutil.copytree(package[0], outputs / "store")
    shutil.copytree(package[1], outputs / "tiny" / "main" / "06_deploy" / "package")
    receipt = {"outputs": {"deploy/package": {"file": "package", "sha256": digest(package[1])}}}
    (outputs / "tiny" / "main" / "06_deploy" / "receipt.json").write_text(json.dumps(receipt))
    return outputs / "tiny" / "main"


def test_others_are_not_served_without_a_token(run_folder: Path) -> None:
    refused = start(run_folder, "0.0.0.0", "0")
    assert refused.returncode == 3 and "without a token" in refused.stderr
    assert start(run_folder, "0.0.0.0", "0", "hunter2").returncode == 2
    assert start(run_folder, "0.0.0.0", "0", "env:NO_SUCH_TOKEN").returncode == 4


def test_a_port_in_use_is_said(run_folder: Path, server: Staged) -> None:
    refused = start(run_folder, "127.0.0.1", str(server.port))
    assert refused.returncode == 4 and f":{server.port}" in refused.stderr
    with pytest.raises(EnvironmentFault):
        free_port("127.0.0.1", server.port)


def test_a_tampered_package_is_never_served(run_folder: Path) -> None:
    file = run_folder / "06_deploy" / "package" / "model" / "model.txt"
    file.chmod(0o644)
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"threshold=1", b"threshold=2", 1))
    refused = start(run_folder, "127.0.0.1", "0")
    file.write_bytes(whole)
    assert refused.returncode == 3 and "model/model.txt differs" in refused.stderr


def test_a_served_run_answers_and_stops_by_ctrl_c(run_folder: Path) -> None:
    port = free_port("127.0.0.1", 0)
    code = "import sys; from pipeline.deploy.service import serve; serve(sys.argv[1], '127.0.0.1', int(sys.argv[2]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run_folder), str(port)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=world.ROOT,
        start_new_session=True,
    )
    assert process.stdout
    assert f"tiny version 1 on http://127.0.0.1:{port}" in process.stdout.readline()
    running = Staged("127.0.0.1", port, process)  # type: ignore[arg-type]
    await_ready(running)
    assert status(running, "GET", "/health")[0] == 200
    assert [json.loads(process.stdout.readline())["path"] for _ in range(2)] == ["/ready", "/health"]
    os.killpg(process.pid, signal.SIGINT)      # as a terminal sends it
    assert process.wait(20) == 0
    process.stdout.close()


# A guarded service: TLS, tokens with roles, two workers, on IPv6.

def certificate(place: Path, called: str = "localhost") -> tuple[Path, Path]:
    "A certificate for this machine, and its key."
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, called)])
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("::1"))])
    made = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(7)
            .not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1)).add_extension(names, False)
            .add_extension(x509.BasicConstraints(True, None), True).sign(key, hashes.SHA256()))
    (place / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (place / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return place / "cert.pem", place / "key.pem"


class Guarded:
    "The service, and the tokens of four people."

    def __init__(self, server: Running, store: Path, file: Path, tokens: dict[str, str], body: bytes):
        self.server, self.store, self.file, self.tokens, self.body = server, store, file, tokens, body

    def ask(self, who: str, method: str, path: str, **headers: str) -> int:
        authorization = {"authorization": f"Bearer {self.tokens.get(who, who)}"} if who else {}
        body = self.body if method == "POST" else None
        return self.server.ask(method, path, body, **authorization, **headers)[0]


@pytest.fixture(scope="module")
def guarded(package: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    place = tmp_path_factory.mktemp("guarded")
    cert, key = certificate(place)
    tokens = {who: make_token(place / "tokens", who, [role], rate) for who, role, rate in [
        ("shop", "caller", 0.0), ("grafana", "observer", 0.0), ("ann", "operator", 0.0), ("greedy", "caller", 2.0), ("steady", "caller", 5.0)]}
    predictor = load_package(package[1], audit.public_key(package[0], KEY))
    body = json.dumps({"rows": as_rows(world.rows("binary", 20, seed=5), predictor.schema.names)[:1]}).encode()
    with running(package[0], package[1], cert, host="::1", tls_cert=str(cert), tls_key=str(key), tokens=str(place / "tokens"),
                 workers=2, store=str(package[0]), drain_s=0.4) as server:
        yield Guarded(server, package[0], place / "tokens", tokens, body)


def test_it_speaks_tls_of_today_and_nothing_in_the_clear(guarded: Guarded) -> None:
    def handshake(version: ssl.TLSVersion) -> str | None:
        context = ssl.create_default_context(cafile=str(guarded.file.parent / "cert.pem"))
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = version
        with socket.create_connection((guarded.server.host, guarded.server.port)) as plain, context.wrap_socket(plain, server_hostname="localhost") as wrapped:
            return wrapped.version()

    assert handshake(ssl.TLSVersion.TLSv1_2) == "TLSv1.2" and handshake(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    with pytest.warns(DeprecationWarning), pytest.raises(OSError):
        handshake(ssl.TLSVersion.TLSv1_1)
    with socket.create_connection((guarded.server.host, guarded.server.port), timeout=10) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert not plain.recv(100).startswith(b"HTTP")
    with pytest.raises(ssl.SSLCertVerificationError):    # a client that does not know this certificate
        ssl.create_default_context().wrap_socket(socket.create_connection((guarded.server.host, guarded.server.port)), server_hostname="localhost")


def test_each_role_gets_its_own_routes(guarded: Guarded) -> None:
    asked = [("POST", "/predict"), ("GET", "/openapi.json"), ("GET", "/metrics"), ("POST", "/operate/back"), ("GET", "/health")]
    found = {who: [guarded.ask(who, *what) for what in asked] for who in ("shop", "grafana", "ann", "guess", "")}
    assert found["shop"] == [200, 200, 403, 403, 200] and found["grafana"] == [403, 403, 200, 403, 200]
    assert found["ann"] == [200, 200, 200, 404, 200]    # the page is another room's
    assert found["guess"] == found[""] == [401, 401, 401, 401, 200]


def test_every_route_but_health_is_closed_to_strangers(guarded: Guarded) -> None:
    described = json.loads(guarded.server.ask("GET", "/openapi.json", authorization=f"Bearer {guarded.tokens['ann']}")[2])
    closed = [(method.upper(), path) for path, methods in described["paths"].items() for method in methods if "health" not in path and path != "/ready"]
    assert len(closed) >= 3 and {guarded.ask("", *what) for what in closed} == {401}


def test_a_caller_is_held_to_his_rate_and_told_when_to_come_back(guarded: Guarded) -> None:
    "Two a second, whichever of the two workers his connections reach."
    headers, begun = {"authorization": f"Bearer {guarded.tokens['greedy']}"}, time.monotonic()
    found = [guarded.server.ask("POST", "/predict", guarded.body, **headers) for _ in range(40)]
    refused, let_in = [f for f in found if f[0] == 429], sum(f[0] == 200 for f in found)
    assert 2 <= let_in <= 3 + 2 * (time.monotonic() - begun) and len(refused) + let_in == 40 and all(f[1]["retry-after"].isdecimal() for f in refused)
    connection, steady = guarded.server.connect(), {"authorization": f"Bearer {guarded.tokens['steady']}"}
    for _ in range(5):              # all of it through one connection, and so through one worker
        connection.request("POST", "/predict", guarded.body, steady)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        answer.read()
    connection.close()
    assert 429 in {guarded.server.ask("POST", "/predict", guarded.body, **steady)[0] for _ in range(12)}, "nothing is left for him at the other worker"
    assert guarded.ask("shop", "POST", "/predict") == 200      # others do not pay for it


def test_a_token_that_is_taken_out_stops_working(guarded: Guarded) -> None:
    assert guarded.ask("shop", "POST", "/predict") == 200
    made = make_token(guarded.file, "late", ["caller"])
    assert until(lambda: all(guarded.ask(made, "POST", "/predict") == 200 for _ in range(6)))
    kept = "\n".join(line for line in guarded.file.read_text().splitlines() if '"late"' not in line)
    guarded.file.write_text(kept)
    assert until(lambda: all(guarded.ask(made, "POST", "/predict") == 401 for _ in range(6)))


def test_the_numbers_of_both_workers_are_on_one_page(guarded: Guarded) -> None:
    def rows() -> float:
        page = guarded.server.ask("GET", "/metrics", authorization=f"Bearer {guarded.tokens['grafana']}")[2].decode()
        return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith("pilothouse_rows_total"))

    time.sleep(1.2)      # a page is left once a second
    before = rows()
    assert {guarded.ask("shop", "POST", "/predict") for _ in range(20)} == {200}
    assert until(lambda: rows() == before + 20)


def test_a_killed_worker_takes_only_its_own_requests_along(guarded: Guarded) -> None:
    with load(guarded.server, [guarded.body], 4, 0.01, authorization=f"Bearer {guarded.tokens['shop']}") as seen:
        assert until(lambda: len(seen.answers) > 40)
        victim = guarded.server.workers()[0]
        victim.kill()
        assert until(lambda: len(guarded.server.workers()) == 2 and victim.pid not in [w.pid for w in guarded.server.workers()])
        killed = len(seen.answers)
        assert until(lambda: len(seen.answers) > killed + 40)
    assert len(seen.faults) <= 4 and {a[1] for a in seen.answers} == {200}


def test_it_ends_without_dropping_a_request(guarded: Guarded) -> None:
    "The last one of this service: it is told to stop while clients ask, and while a body is still arriving."
    server, family = guarded.server, [psutil.Process(guarded.server.process.pid), *guarded.server.workers()]
    token = guarded.tokens["shop"]
    slow = ssl.create_default_context(cafile=str(guarded.file.parent / "cert.pem")).wrap_socket(
        socket.create_connection((server.host, server.port), timeout=20), server_hostname="localhost")
    head = f"POST /predict HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {token}\r\ncontent-length: {len(guarded.body)}\r\n\r\n"
    slow.sendall(head.encode() + guarded.body[:20])
    statuses: list[int] = []
    closed = threading.Event()

    def client() -> None:
        connection = server.connect()
        while not closed.is_set():
            connection.request("POST", "/predict", guarded.body, {"authorization": f"Bearer {token}"})
            response = connection.getresponse()
            response.read()
            statuses.append(response.status)
            if response.headers.get("connection") == "close":     # told so: it asks elsewhere from now on
                closed.set()
        connection.close()

    thread = threading.Thread(target=client)
    thread.start()
    assert until(lambda: len(statuses) > 5)
    server.process.send_signal(signal.SIGTERM)
    assert closed.wait(20)
    slow.sendall(guarded.body[20:])
    assert slow.recv(4000).startswith(b"HTTP/1.1 200")
    slow.close()
    thread.join()
    assert set(statuses) == {200} and server.process.wait(20) == 0 and not psutil.wait_procs(family, timeout=10)[1]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((server.host, server.port))
    read = read_inferences(guarded.store, "tiny")
    assert len(read.filter(pl.col("status") == 200)) >= len(statuses) + 1     # the last of them, too, are in the log


def test_who_comes_after_the_end_is_refused_at_once_and_a_successor_takes_the_port(package: tuple[Path, Path], guarded: Guarded) -> None:
    "While a worker still waits for a body; those who knocked before are answered."
    body, seen, ended = guarded.body, list[str](), threading.Event()
    with running(package[0], package[1], workers=2, drain_s=0.1) as server:
        slow = socket.create_connection((server.host, server.port), timeout=20)
        slow.sendall(f"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body[:20])

        def knock() -> None:
            while not ended.wait(0.01):
                try:
                    seen.append(str(server.ask("POST", "/predict", body)[0]))
                except OSError as error:
                    seen.append(type(error).__name__)

        thread = threading.Thread(target=knock)
        thread.start()
        try:
            assert until(lambda: seen.count("200") > 5)
            server.process.send_signal(signal.SIGTERM)
            assert until(lambda: seen[-20:] == ["ConnectionRefusedError"] * 20, 8), seen[-20:]
        finally:
            ended.set()
            thread.join()
        assert set(seen) <= {"200", "ConnectionRefusedError", "ConnectionResetError"} and seen.count("ConnectionResetError") <= 1, seen    # one may come in the very moment
        assert server.process.poll() is None, "the slow one is still waited for"
        with running(package[0], package[1], port=server.port) as successor:
            assert successor.ask("POST", "/predict", body)[0] == 200
            slow.sendall(body[20:])
            told = slow.recv(4000)
            assert told.startswith(b"HTTP/1.1 200") and b"connection: close" in told
            slow.close()
            assert server.process.wait(20) == 0 and successor.ask("POST", "/predict", body)[0] == 200


@pytest.mark.parametrize("stored", [False, True])
def test_tokens_and_certificate_are_read_anew_while_it_runs(package: tuple[Path, Path], guarded: Guarded, tmp_path: Path, stored: bool) -> None:
    "With and without a store; half of a pair and a file that others may write change nothing, and hold up no plan."
    (tmp_path / "next").mkdir()
    store = str(package[0]) if stored else ""
    cert, key = certificate(tmp_path)
    later = certificate(tmp_path / "next", "next")
    file = tmp_path / "tokens"
    first = make_token(file, "first", ["operator"])
    with running(package[0], package[1], cert, host="::1", tls_cert=str(cert), tls_key=str(key), tokens=str(file), store=store, drain_s=0.1) as server:
        def shown() -> str:
            return ssl.get_server_certificate((server.host, server.port))

        def asks(token: str) -> int:
            return server.ask("POST", "/predict", guarded.body, authorization=f"Bearer {token}")[0]

        def faults() -> list[str]:
            return [json.loads(line)["error"] for line in list(server.lines) if "has changed cannot be used" in line]

        before = shown()
        assert server.context
        server.context.load_verify_locations(later[0])
        os.replace(later[0], cert)
        assert until(faults) and "cannot be used for TLS" in faults()[0] and shown() == before and asks(first) == 200
        os.replace(later[1], key)
        assert until(lambda: shown() != before) and until(lambda: server.records("certificate renewed")) and len(faults()) == 1
        second = make_token(file, "second", ["operator"])
        assert until(lambda: asks(second) == 200)
        file.chmod(0o666)
        file.write_text("".join(line for line in file.read_text().splitlines(True) if '"first"' not in line))
        assert until(lambda: len(faults()) == 2) and "can be written by others" in faults()[1] and asks(first) == asks(second) == 200
        if stored:
            plans = Plans(Registry(package[0]))
            known = plans.current("tiny")
            made_plan = plans.change("tiny", known.revision if known else 0, "while a file of tokens is open to all", live=package[1].name)
            assert until(lambda: any(r["revision"] == made_plan.revision for r in server.records("traffic")))
            plans.registry.close()
        file.chmod(0o600)
        assert until(lambda: asks(first) == 401) and asks(second) == 200


class Collector(BaseHTTPRequestHandler):
    "Takes OpenTelemetry's spans."

    spans: list[Any] = []

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/v1/traces":
            told = ExportTraceServiceRequest.FromString(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.spans.extend(s for r in told.resource_spans for scope in r.scope_spans for s in scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_more_than_can_be_answered_is_refused_and_the_rest_is_answered(package: tuple[Path, Path]) -> None:
    predictor = load_package(package[1], audit.public_key(package[0], KEY))
    rows = as_rows(world.rows("binary", 300, seed=5), predictor.schema.names)
    one, body = (json.dumps({"rows": part}).encode() for part in (rows[:1], rows))
    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with running(package[0], package[1], environment=traced, wait_s=0.02, log=False) as server:
        slow = [socket.create_connection((server.host, server.port)) for _ in range(300)]      # of whom nobody is kept out
        for number, lazy in enumerate(slow):
            lazy.sendall(b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n{" % (1000 if number % 2 else 7_900_000))
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        assert server.ask("POST", "/predict", one, traceparent=parent, prefer="handling=lenient")[0] == 200
        assert until(lambda: [s for s in Collector.spans if s.trace_id.hex() == parent[3:35] and s.name == "POST /predict"])
        with load(server, [body], 24, prefer="handling=lenient") as seen:
            assert until(lambda: sum(a[1] == 200 for a in seen.answers) > 60 and any(a[1] == 429 for a in seen.answers))
            assert server.ask("GET", "/health")[0] == 200
        assert {a[1] for a in seen.answers} == {200, 429} and not seen.faults
        page = server.ask("GET", "/metrics")[2].decode()
        assert float(page.partition("\npilothouse_shed_total ")[2].split()[0]) > 0
        for lazy in slow:
            lazy.close()
        family = server.workers()
        os.kill(server.process.pid, signal.SIGKILL)       # its workers do not stay behind
        assert family and not psutil.wait_procs(family, timeout=20)[1]
    collector.shutdown()


def test_others_are_not_served_in_the_clear(run_folder: Path) -> None:
    refused = start(run_folder, "0.0.0.0", "0", "env:A_TOKEN", A_TOKEN="0123456789abcdef")
    assert refused.returncode == 3 and "without TLS" in refused.stderr
