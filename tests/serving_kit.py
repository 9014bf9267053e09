"""Packages of a small world, and real servers in processes of their own."""
from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import psutil

import deploy_world as world
from pipeline.core import audit
from pipeline.data.contract import target_values
from pipeline.deploy.handler import Service
from pipeline.deploy.package import KEY, Contents, release
from pipeline.deploy.predict import Predictor
from pipeline.deploy.schema import make_schema
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting

CODE = """
import json, sys
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pipeline.core.errors import PilothouseError
from pipeline.deploy.service import serve_package
told = json.loads(sys.argv[1])
try:
    serve_package(told.pop("folder"), Ed25519PublicKey.from_public_bytes(bytes.fromhex(told.pop("key"))), **told)
except PilothouseError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def packages(place: Path, rounds: list[int], rows: int = 600) -> tuple[Path, list[Path]]:
    "A store with a package for each number of rounds, one version after the other."
    frame, contract = world.rows("binary", rows), world.contract("binary")
    found = []
    for i, n in enumerate(rounds):
        model = train_model("trees", frame, target_values(frame, contract), contract, Fitting({"rounds": n})).save(place / f"model{i}")
        contents = Contents(contract, make_schema(contract, frame).to_dict(), {"threshold": .4}, [], {}, "#\n", {})
        found.append(release(place / "store", place / f"work{i}", "tiny", model, contents))
    return place / "store", found


@dataclass
class Running:
    "A server and what it has said."

    process: subprocess.Popen[str]
    host: str
    port: int
    context: ssl.SSLContext | None = None
    lines: list[str] = field(default_factory=list)

    def connect(self, timeout: float = 30.0) -> http.client.HTTPConnection:
        if self.context is None:
            return http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        return http.client.HTTPSConnection(self.host, self.port, timeout=timeout, context=self.context)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        "One request on a connection of its own."
        connection = self.connect()
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        found = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        connection.close()
        return found

    def workers(self) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):      # one that ends in this very moment
                found += [child] if "spawn_main" in " ".join(child.cmdline()) else []
        return found

    def records(self, event: str) -> list[dict[str, Any]]:
        "Log lines of an event."
        found = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
        return [r for r in found if r.get("event") == event]


def until(true: Callable[[], Any], within_s: float = 30.0) -> Any:
    "Wait for it; the value when it came, else the last one."
    deadline = time.monotonic() + within_s
    while not (found := true()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


@contextmanager
def running(
    keys: Path, package: Path, certificate: Path | None = None, environment: dict[str, str] | None = None, **serving: Any,
) -> Iterator[Running]:
    "The package served until the block ends; other arguments as `serve_package` takes them."
    told = {"folder": str(package), "key": audit.public_key(keys, KEY).public_bytes_raw().hex(), "port": 0, **serving}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, json.dumps(told)], cwd=world.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={**os.environ, **(environment or {})},
    )
    assert process.stdout
    lines: list[str] = []

    def read() -> None:
        assert process.stdout
        lines.extend(process.stdout.readline() for _ in range(1))
        for line in process.stdout:
            lines.append(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert until(lambda: lines and lines[0]) and (found := re.search(r" on https?://(.+):(\d+) ", lines[0])), f"the server said {lines}"
        context = ssl.create_default_context(cafile=str(certificate)) if certificate else None
        server = Running(process, found[1].strip("[]"), int(found[2]), context, lines)
        assert until(lambda: is_ready(server)), f"the server was not ready: {lines}"
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        with contextlib.suppress(ProcessLookupError):      # whoever stayed behind
            os.killpg(process.pid, signal.SIGKILL)
        reader.join(10)
        process.stdout.close()


def is_ready(server: Running) -> bool:
    "Whether it answers."
    try:
        return server.ask("GET", "/ready")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


@dataclass
class Load:
    "What clients saw that ask without pause."

    answers: list[tuple[float, int, int, Any]] = field(default_factory=list)   # done at, status, row, document
    faults: list[str] = field(default_factory=list)


@contextmanager
def load(server: Running, bodies: list[bytes], clients: int = 3, pause_s: float = 0.0, **headers: str) -> Iterator[Load]:
    "Clients, each on a connection that stays open, until the block ends."
    seen, ended = Load(), threading.Event()

    def client(number: int) -> None:
        connection, i = server.connect(), number
        while not ended.is_set():
            row = i % len(bodies)
            try:
                connection.request("POST", "/predict", bodies[row], headers)
                response = connection.getresponse()
                document = json.loads(response.read())
                seen.answers.append((time.monotonic(), response.status, row, document))
                if response.headers.get("connection") == "close":
                    connection.close()
            except (OSError, http.client.HTTPException) as error:
                seen.faults.append(f"{type(error).__name__}: {error}")
                connection.close()
                connection = server.connect()
            i += clients
            if pause_s:
                time.sleep(pause_s)
        connection.close()

    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def in_a_table(service: Service, rows: pl.DataFrame, prefer: str) -> tuple[pl.DataFrame, dict[str, str]]:
    "The answer to an Arrow body, and its headers."
    from pipeline.deploy.answers import ARROW, write_arrow

    status, headers, out = service.handle("POST", "/predict", {"content-type": ARROW, "prefer": prefer}, write_arrow(rows.to_dict(as_series=False), {}))
    assert status == 200, out
    return pl.read_ipc_stream(out), dict(headers)


def tensors_of(made: Predictor, rows: list[dict[str, Any]], **more: Any) -> bytes:
    "Rows as an inference request."
    inputs = [{"name": n, "shape": [len(rows)], "datatype": "BYTES", "data": [row[n] for row in rows]} for n in made.schema.names]
    return json.dumps({"inputs": inputs, **more}).encode()


def in_tensors(service: Service, rows: pl.DataFrame, prefer: str) -> tuple[pl.DataFrame, dict[str, str]]:
    "The answer to tensors, and its headers."
    made = service.predictor
    status, headers, out = service.handle("POST", f"/v2/models/{made.name}/infer", {"prefer": prefer}, tensors_of(made, rows.to_dicts()))
    outputs = json.loads(out)["outputs"]
    kinds = {"BYTES": pl.String, "FP64": pl.Float64, "BOOL": pl.Boolean}
    assert status == 200 and all(tensor["shape"] == [rows.height] for tensor in outputs), out
    return pl.DataFrame([pl.Series(t["name"], t["data"], kinds[t["datatype"]]) for t in outputs]), dict(headers)
