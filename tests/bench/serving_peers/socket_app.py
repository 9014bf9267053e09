"""What the machine allows: reads a request, computes nothing, answers the same bytes: `socket_app.py PORT`."""
from __future__ import annotations

import asyncio
import sys

BODY = b'{"model":"bench","version":1,"request_id":"0123456789abcdef0123456789abcdef","predictions":[{"prediction":"true","p":{"false":0.25,"true":0.75}}]}'
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: " + str(len(BODY)).encode() + b"\r\n\r\n" + BODY


class Socket(asyncio.Protocol):
    "One client's connection."

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.read = transport, b""

    def data_received(self, data: bytes) -> None:
        self.read += data
        head, end, body = self.read.partition(b"\r\n\r\n")
        at = head.lower().find(b"content-length:")
        if end and len(body) >= int(head[at + 15:].split(b"\r\n", 1)[0]):
            self.read = b""
            self.transport.write(ANSWER)  # type: ignore[attr-defined]


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Socket, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


asyncio.run(main())
