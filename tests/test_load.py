"""The load generator against servers that stall, drop, and go away; and the numbers that are made of what it saw."""
from __future__ import annotations

import json
import select
import socket
import threading
import time
from dataclasses import asdict
from pathlib import Path

import polars as pl
import pytest

import deploy_world as world
from pipeline.core import audit
from pipeline.deploy.batch import predict_all
from pipeline.deploy.load import Plan, answered_share, latency_quantile, per_1000, send, send_bodies, throughput, uptime
from pipeline.deploy.package import KEY, load_package
from serving_kit import packages

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Away(threading.Thread):
    "A server on a port of its own that answers at once, but for the stretches in which it is away or stalls."

    def __init__(self, away: tuple[float, float] = (0, 0), stall: tuple[float, float] = (0, 0), answer: bytes = ANSWER, first: float = 0.0) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self.listener.getsockname()[1]
        self.away, self.stall, self.answer, self.ended = away, stall, answer, threading.Event()
        self.down_s = 0.0

    def run(self) -> None:
        held: dict[socket.socket, bytes] = {}
        begun: float | None = None
        gone = stalled = False
        while not self.ended.is_set():
            now = 0.0 if begun is None else time.perf_counter() - begun
            if self.away[1] and not gone and now > self.away[0]:
                gone = True
                since = time.perf_counter()
                for one in [self.listener, *held]:
                    one.close()
                held = {}
                time.sleep(self.away[1] - self.away[0])
                self.listener = socket.create_server(("127.0.0.1", self.port), backlog=256)
                self.down_s = time.perf_counter() - since
            if self.stall[1] and not stalled and now > self.stall[0]:
                stalled = True
                time.sleep(self.stall[1] - self.stall[0])
            for ready in select.select([self.listener, *held], [], [], 0.05)[0]:
                if ready is self.listener:
                    one = self.listener.accept()[0]
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    held[one] = b""
                    continue
                try:
                    got = ready.recv(65536)
                    begun = begun or time.perf_counter()
                    if not got:
                        raise OSError
                    ready.sendall(self.answer)
                except OSError:
                    ready.close()
                    held.pop(ready, None)
        for one in [self.listener, *held]:
            one.close()

    def __enter__(self) -> Away:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join(10)


def send_here(plan: Plan, place: Path) -> pl.DataFrame:
    "What the second process does, in this one."
    (place / "plan.json").write_text(json.dumps(asdict(plan)))
    pl.DataFrame({"body": [b"{}"]}).write_parquet(place / "bodies.parquet")
    send(str(place))
    return pl.read_parquet(place / "found.parquet")


def test_a_service_that_was_away_says_for_how_long() -> None:
    with Away(away=(1.0, 1.8)) as server:
        found = send_bodies(Plan("127.0.0.1", server.port, 400, 1600), [b"{}"])
    whole = float(found["due_s"].max() or 0)  # type: ignore[arg-type]
    assert len(found) == 1600 and abs(uptime(found).value - (1 - server.down_s / whole)) < 0.005
    assert answered_share(found) < 0.9 and found["late_ms"].median() < 50  # type: ignore[operator]


def test_a_stall_is_seen_by_everyone_who_was_due(tmp_path: Path) -> None:
    with Away(stall=(0.5, 0.9)) as server:
        found = send_here(Plan("127.0.0.1", server.port, 300, 600), tmp_path)
    with Away(stall=(0.02, 0.42)) as server:
        closed = send_here(Plan("127.0.0.1", server.port, 0, 3000, connections=1), tmp_path)
    assert (found["status"] == 200).all() and latency_quantile(found, 0.9).value > 50     # a fifth of the requests fell into the stall
    assert (closed.filter(pl.col("latency_ms") > 300)).height == 1                        # a client that waits sees one slow answer
    assert throughput(closed).value > 0


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
                                    b"HTTP/1.1 503 Away\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"])
def test_chunks_and_closed_connections_are_read(answer: bytes, tmp_path: Path) -> None:
    with Away(answer=answer) as server:
        found = send_here(Plan("127.0.0.1", server.port, 0, 50, keep=True), tmp_path)
    assert len(found) == 50 and set(found["status"]) == {int(answer[9:12])}


def test_nobody_there_is_no_answer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    found = send_here(Plan("127.0.0.1", port, 500, 50), tmp_path)
    assert set(found["status"]) == {0} and uptime(found).value == 0 and answered_share(found) == 0


def test_an_answer_that_never_comes_counts_as_none(tmp_path: Path) -> None:
    with Away(answer=b"") as server:
        found = send_here(Plan("127.0.0.1", server.port, 100, 10, timeout_s=0.5), tmp_path)
    assert set(found["status"]) == {0}


def test_what_answers_cost_follows_the_price_and_the_trees(tmp_path: Path) -> None:
    "Processor time as it was spent, not as it was estimated: half of the trees cost less, and the money follows time and price."
    store, folders = packages(tmp_path, [800, 400], rows=3000)
    predictors = [load_package(folder, audit.public_key(store, KEY)) for folder in folders]
    frame, spent = world.rows("binary", 20_000, seed=4), [float("inf")] * 2
    for predictor in predictors:
        predict_all(predictor, frame.head(100))
    for _ in range(6):                      # in turn; the least of several is what the work itself takes
        for i, predictor in enumerate(predictors):
            begun = time.process_time()
            predict_all(predictor, frame)
            spent[i] = min(spent[i], time.process_time() - begun)
    assert 0.3 < spent[1] / spent[0] < 0.8, f"400 trees took {spent[1]:.3f} CPU s, 800 took {spent[0]:.3f}"
    place = {"core_hour": 0.04, "watts_per_core": 10.0, "gram_co2e_per_kwh": 350.0}
    whole, half = ({"cpu_ms_per_1000": 1e6 * s / len(frame), **place} for s in spent)
    for what, price in (("money", "core_hour"), ("joules", "watts_per_core"), ("co2e_g", "gram_co2e_per_kwh")):
        assert per_1000(half, what) < 0.8 * per_1000(whole, what)
        assert per_1000(whole | {price: 2 * whole[price]}, what) == pytest.approx(2 * per_1000(whole, what), rel=1e-12), "twice the price is twice the cost"
    assert per_1000(whole, "money") == pytest.approx(1000 * spent[0] / len(frame) / 3600 * 0.04)
