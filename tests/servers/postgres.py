"""A real PostgreSQL of its own, in a temporary folder, on a free port of this machine; its server never runs as root."""
from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PASSWORD = "s3cret/p@ss w:rd"


@dataclass(frozen=True)
class Server:
    "Where it listens; `{env:PGPASS}` stands for the password."

    port: int

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://keeper:{{env:PGPASS}}@127.0.0.1:{self.port}/postgres"


def programs() -> Path | None:
    "The folder of initdb and pg_ctl, the newest; None where PostgreSQL is not installed."
    found = shutil.which("initdb")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name) if p.parent.name.isdigit() else 0)
    return Path(found).resolve().parent if found else next((f for f in reversed(folders) if (f / "initdb").exists()), None)


@contextmanager
def postgres() -> Iterator[Server]:
    "Start, hand out, stop and delete."
    bin_ = programs()
    assert bin_ is not None
    user = {} if os.geteuid() else {"user": _somebody(), "group": _somebody()}
    room = Path(tempfile.mkdtemp(prefix="pg"))
    try:
        (room / "password").write_text(PASSWORD)
        if user:
            for path in (room, room / "password"):
                shutil.chown(path, **user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def call(program: str, *words: str) -> None:
            done = subprocess.run([str(bin_ / program), *words], capture_output=True, text=True, cwd=room, env={"PATH": os.environ["PATH"], "LC_ALL": "C"}, timeout=120, **user)  # type: ignore[call-overload]
            assert done.returncode == 0, done.stderr + done.stdout

        call("initdb", "-D", str(room / "data"), "-U", "keeper", "--pwfile", str(room / "password"), "-A", "scram-sha-256", "-E", "UTF8", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={room} -c fsync=off -c shared_buffers=16MB -c max_connections=10"
        call("pg_ctl", "-D", str(room / "data"), "-o", options, "-l", str(room / "log"), "-w", "-t", "60", "start")
        try:
            yield Server(port)
        finally:
            call("pg_ctl", "-D", str(room / "data"), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _somebody() -> str:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    raise AssertionError("PostgreSQL refuses to run as root, and there is no user to run it as")
