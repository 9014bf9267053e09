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

from pipeline.deploy.load import Plan, answered_share, latency_quantile, send, send_bodies, throughput, uptime

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
