"""A real server: granian in a process of its own, asked over sockets."""
from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import deploy_world as world
from pipeline.core import audit
from pipeline.core.errors import EnvironmentFault
from pipeline.data.contract import target_values
from pipeline.deploy.package import KEY, Contents, load_package, release
from pipeline.deploy.requests import Limits
from pipeline.deploy.schema import make_schema
from pipeline.deploy.service import free_port
from pipeline.deploy.staging import Staged, as_rows, await_ready, bodies, compare, replay, staged
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


def test_a_foreign_host_name_gets_nothing(server: Staged) -> None:
    assert status(server, "GET", "/health", host="evil.example")[0] == 421
    assert status(server, "GET", "/health", host="localhost:1234")[0] == 200


def test_a_killed_worker_is_replaced(package: tuple[Path, Path]) -> None:
    with staged(package[1], audit.public_key(package[0], KEY)) as running:
        workers = [p for p in psutil.Process(running.process.pid).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
        assert len(workers) == 1
        workers[0].kill()
        workers[0].wait(10)
        await_ready(running)
        assert running.process.poll() is None


def test_it_stops_when_told_and_leaves_nothing_behind(package: tuple[Path, Path]) -> None:
    with staged(package[1], audit.public_key(package[0], KEY)) as running:
        family = [psutil.Process(running.process.pid), *psutil.Process(running.process.pid).children(recursive=True)]
    assert running.process.returncode == 0
    assert not psutil.wait_procs(family, timeout=10)[1]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((running.host, running.port))


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
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    process.stdout.close()
