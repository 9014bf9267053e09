"""Those who ask too much and those who never finish: one rate for all workers, and handshakes that end by themselves."""
from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_kit import until

import deploy_world as world
import pipeline.deploy.http as carrier
from pipeline.data.contract import target_values
from pipeline.deploy.handler import Service
from pipeline.deploy.predict import Predictor
from pipeline.deploy.process import listen
from pipeline.deploy.schema import make_schema
from pipeline.deploy.shedding import PLACES, Pool, Shared
from pipeline.deploy.staging import as_rows
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting
from test_deploy_server import certificate

WORKER = """
import sys, time
from pathlib import Path
from pipeline.deploy.shedding import Pool, Shared
bucket, steps = Shared(Pool(Path(sys.argv[1])), "shop", 200.0), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
print(sum(bucket.take(1000 + i / 2000) == 0 for i in range(steps)), flush=True)     # four seconds of 2,000 requests each, as fast as they go
"""


def test_workers_share_one_rate_and_one_that_is_killed_blocks_nobody(tmp_path: Path) -> None:
    "Processes that draw from one bucket at once let in what one process would; one dies with the lock in its hand."
    file = tmp_path / "rates"
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, os, sys, time\nf = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
                               "fcntl.flock(f, fcntl.LOCK_EX)\nprint('held', flush=True)\ntime.sleep(600)", str(file)], stdout=subprocess.PIPE, text=True)
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(file), "8000"], cwd=world.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        for worker in workers:
            assert worker.stdin and worker.stdout and worker.stdout.readline() == "ready\n"
            worker.stdin.write("go\n")
            worker.stdin.flush()
        os.kill(holder.pid, signal.SIGKILL)
        found = [int(worker.communicate(timeout=60)[0]) for worker in workers]
    finally:
        for process in (holder, *workers):
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream:
                    stream.close()
    ahead = Shared(Pool(file), "shop", 200.0).ahead
    assert 1000 - 3 * ahead <= sum(found) <= 200 + 200 * 4 + 3 * ahead, found


def test_a_full_file_forgets_the_bucket_that_was_not_asked_for_longest(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "rates")
    first = Shared(pool, "first", 1.0)
    assert first.take(0.0) == 0 < first.take(0.5)
    others = [Shared(pool, f"other {i}", 1.0) for i in range(PLACES - 1)]
    assert all(other.take(1.0 + i / PLACES) == 0 for i, other in enumerate(others)) and all(other.take(2.1 + i / PLACES) == 0 for i, other in enumerate(others))
    last = Shared(pool, "last", 1.0)
    assert last.take(3.2) == 0 and last.take(3.3) > 0, "it has a place, and its bucket counts"
    assert others[5].take(3.3) == 0 and first.take(3.3) == 0, "who lost his place begins with a full bucket"
    pool.close()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, tuple[Any, ...], Path, bytes]]:
    "A service that speaks TLS, in this process: server, address, certificate, a body to ask with. A handshake may take a second."
    cert, key = certificate(tmp_path_factory.mktemp("tls"))
    frame, contract = world.rows("binary", 200), world.contract("binary")
    model = train_model("linear", frame, target_values(frame, contract), contract, Fitting({}))
    predictor = Predictor(model, make_schema(contract, frame), .4, "tiny", 1)
    body = json.dumps({"rows": as_rows(frame, predictor.schema.names)[:1]}).encode()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    listening, kept = listen("::1", 0), (carrier.HEADERS_S, carrier.CONNECTIONS)
    server = carrier.Server(Service(predictor))
    carrier.HEADERS_S, carrier.CONNECTIONS = 1.0, 40
    thread = threading.Thread(target=asyncio.run, args=(server.run(listening, context, 1.0),))
    thread.start()
    try:
        yield server, listening.getsockname()[:2], cert, body
    finally:
        server.loop.call_soon_threadsafe(server.end)
        thread.join(20)
        carrier.HEADERS_S, carrier.CONNECTIONS = kept
        listening.close()
    assert not thread.is_alive()


def hello(context: ssl.SSLContext) -> tuple[bytes, ssl.SSLObject, ssl.MemoryBIO]:
    "What a client says first."
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    side = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        side.do_handshake()
    return outgoing.read(), side, incoming


def test_a_handshake_that_never_ends_is_ended(tls: tuple[Any, tuple[Any, ...], Path, bytes]) -> None:
    "Silent ones, ones that stop in the middle, one that drips, one that never finishes: all places are taken, and then they are free."
    server, address, cert, body = tls
    context = ssl.create_default_context(cafile=str(cert))
    first = hello(context)[0]
    assert len(first) > 200
    lazy: list[socket.socket] = []
    for number in range(36):
        one = socket.create_connection(address, timeout=20)
        one.sendall([b"", first[:1], first[:100], first][number % 4])
        lazy.append(one)
    drips = socket.create_connection(address, timeout=20)
    ended = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            for byte in first:
                if ended.wait(0.1):
                    return
                drips.sendall(bytes([byte]))

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        honest = http.client.HTTPSConnection(*address, timeout=20, context=context)
        honest.request("POST", "/predict", body, {"host": "localhost"})
        assert (answer := honest.getresponse()).status == 200 and answer.read(), "whoever comes while there is room is answered"
        for one in (*lazy, drips):
            one.settimeout(20)
            with contextlib.suppress(ConnectionResetError):
                while one.recv(65_536):
                    pass
        honest.close()
        assert until(lambda: not server.tasks and not server.connections), "every place is free again"
    finally:
        ended.set()
        thread.join()
        for one in (*lazy, drips):
            one.close()


def test_more_than_there_is_room_for_wait_and_are_answered_when_the_idle_are_gone(tls: tuple[Any, tuple[Any, ...], Path, bytes]) -> None:
    server, address, cert, body = tls
    context = ssl.create_default_context(cafile=str(cert))
    lazy = [socket.create_connection(address, timeout=20) for _ in range(60)]
    assert until(lambda: len(server.tasks) + len(server.connections) >= 40) and not server.listens
    honest = http.client.HTTPSConnection(*address, timeout=30, context=context)
    honest.request("POST", "/predict", body, {"host": "localhost"})
    assert honest.getresponse().status == 200
    honest.close()
    for one in lazy:
        one.close()
