"""What a connection makes of bytes, however they come."""
from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.deploy import http
from pipeline.deploy.http import Connection, Server
from pipeline.deploy.requests import Limits, Refused
from pipeline.deploy.shedding import Queue


class Wire:
    "A transport that notes what it is told."

    def __init__(self) -> None:
        self.said: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *given: self.said.append((name, *given)) or True


def service() -> Any:
    def problem(refused: Refused, request: str) -> Any:
        return refused.status, [], refused.detail.encode()

    return SimpleNamespace(limits=Limits(), routes=[], extensions={}, problem=problem, counts=SimpleNamespace(note=lambda *_: None), route_of=str)


class Counting(Connection):
    "Counts the requests whose heads were known."

    known = 0

    def repeats(self, data: bytes, end: int) -> bool:
        found = super().repeats(data, end)
        Counting.known += found
        return found


def heard(pieces: Sequence[bytes], remember: bool) -> tuple[list[Any], int]:
    "Every request, every state of the connections and everything sent to them; and how many requests were known by their head."
    server, connection, found = Server(service(), Queue(bytes_most=70_000)), None, list[Any]()
    server.hearing, Counting.known = True, 0
    for place, piece in enumerate(pieces):
        server.now = float(place)
        server.queue.held += -10_000 if place % 2 else 10_000      # others' bodies
        if connection is None or connection.closing:
            connection, wire = Counting(server), Wire()
            connection.connection_made(wire)
            found.append(wire.said)
        if not remember:
            server.heads.clear()
        connection.data_received(piece)
        while server.pending:
            request = server.pending.popleft()
            if connection.closing:
                continue
            failed = request.failed and (request.failed.status, request.failed.detail)
            found.append((request.method, request.path, dict(request.headers), request.body, request.keep, failed))
            connection.write(200, [], b"x", request.method, request.keep and (not failed or failed[0] == 429))
        found.append((connection.since, connection.closing, connection.last, connection.asked, connection.awaited, bool(connection.unread), connection.held))
    return found, Counting.known


def message(draw: random.Random) -> bytes:
    "One request, mostly a good one."
    body = bytes(draw.choices(b'{}[]1234567890"\r\n', k=draw.choice([0, 3, 5, 40])))
    body = draw.choices([body, b"\r\n\r\n" + body, b" " * 66_000], [18, 1, 1])[0]
    line, length = draw.choice([b"POST /predict HTTP/1.1\r\n"] * 4 + [b"POST /v2 HTTP/1.1\r\n", b"POST /predict HTTP/1.0\r\n"]) + b"host: a\r\n", b"content-length: %d\r\n" % len(body)
    good = line + length + b"\r\n" + body
    return draw.choices([
        good,
        line + b"transfer-encoding: chunked\r\n\r\n" + (b"%x\r\n%s\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n",
        b"GET /health?x HTTP/1.1\r\nhost: a\r\n\r\n",
        b"HEAD /ready HTTP/1.1\r\nhost: a\r\n\r\n",
        line + b"connection: close\r\n" + length + b"\r\n" + body,
        line + b"connection: keep-alive\r\n" + length + b"\r\n" + body,
        line + b"connection: upgrade\r\nupgrade: h2c\r\n" + length + b"\r\n" + body,
        line + b"expect: 100-continue\r\n" + length + b"\r\n" + body,
        line + b"host: a\r\n" + length + b"\r\n" + body,
        line + length.replace(b": ", b": 0") + b"\r\n" + body,
        line + length + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        line + length + b"x: " + b"y" * draw.choice([10, 3000, 40_000]) + b"\r\n\r\n" + body,
        b"\r\n" * draw.choice([1, 2]) + good,
        good.replace(b"\r\n", b"\n"),
        b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n",
    ], [50, 8, 7, 4] + [3] * 11)[0]


def pieces(draw: random.Random) -> list[bytes]:
    "A few requests again and again, each by itself, or cut anywhere, at their ends, and between head and body."
    few = [message(draw) for _ in range(draw.randint(1, 4))]
    few.append(b"".join(draw.choices(few, k=2)))
    messages = draw.choices(few, k=draw.randint(2, 12))
    way = draw.random()
    if way < .4:
        return messages
    if way < .6:
        return [part for one in messages for part in (one[:one.find(b"\r\n\r\n") + 4], one[one.find(b"\r\n\r\n") + 4:]) if part]
    whole = b"".join(messages)
    ends = [sum(map(len, messages[:i])) for i in range(len(messages))] if way < .8 else []
    cuts = sorted({0, len(whole), *ends, *(draw.randrange(len(whole)) for _ in range(draw.randint(0, 8)))})
    return [whole[a:b] for a, b in zip(cuts, cuts[1:])]


def test_what_is_remembered_of_requests_changes_nothing() -> None:
    used = 0
    for seed in range(800):
        sent = pieces(random.Random(seed))
        (found, known), (expected, none) = heard(sent, True), heard(sent, False)
        assert found == expected, f"seed {seed}: {sent}"
        assert not none
        used += known
    assert used > 800


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEADS", 10)
    server = Server(service())
    server.hearing = True
    connection = Connection(server)
    connection.connection_made(Wire())
    for i in range(50):
        connection.data_received(b"GET /health HTTP/1.1\r\nhost: a\r\nx: %d%s\r\n\r\n" % (i, b"y" * (i % 2 * http.PIECE)))
        connection.write(200, [], server.pending.popleft().body)
    assert 0 < len(server.heads) <= 10 and all(len(head) <= http.PIECE for head in server.heads)
