"""A real Label Studio in an environment of its own, started on a free port over a copy of a migrated folder.

Run by itself it installs and prepares: `python tests/servers/label_studio.py`.
"""
from __future__ import annotations

import fcntl
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".venv-label-studio"
VERSION = "1.23.2"
START_S = 300      # the first start migrates a database: a minute and a half on a quiet machine


class Unavailable(Exception):
    "The server cannot be had here; the text says why."


@dataclass(frozen=True)
class Server:
    "Where it listens, the token of its only user, and its process group."

    url: str
    token: str
    group: int


def executable() -> Path:
    return HOME / "bin" / "label-studio"


def install() -> Path:
    "Make the environment once, also when several processes ask at the same time; raises `Unavailable`."
    if os.environ.get("PILOTHOUSE_LABEL_STUDIO") == "0":
        raise Unavailable("PILOTHOUSE_LABEL_STUDIO=0 switches it off")
    with (ROOT / ".setup-label-studio.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = HOME / f"installed-{VERSION}"
        if not done.exists():
            if shutil.disk_usage(ROOT).free < 3e9:
                raise Unavailable("less than 3 GB of disk are free; Label Studio needs 0.8 GB and its caches")
            shutil.rmtree(HOME, ignore_errors=True)
            for command in _commands():
                result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
                if result.returncode:
                    tail = (result.stderr.strip().splitlines() or ["no message"])[-1]
                    raise Unavailable(f"label-studio=={VERSION} could not be installed: {tail[:300]}")
            done.touch()
    return executable()


def _commands() -> list[list[str]]:
    python = str(HOME / "bin" / "python")
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv:
        return [[uv, "venv", "--quiet", "--python", sys.executable, str(HOME)],
                [uv, "pip", "install", "--quiet", "--python", python, f"label-studio=={VERSION}"]]
    if importlib.util.find_spec("ensurepip") is None:
        raise Unavailable("neither uv nor ensurepip is here to make an environment with")
    return [[sys.executable, "-m", "venv", str(HOME)], [python, "-m", "pip", "install", "--quiet", f"label-studio=={VERSION}"]]


@contextmanager
def serve() -> Iterator[Server]:
    "A server with an empty database, stopped with all its processes afterwards; raises `Unavailable`."
    program = install()
    template = HOME / "template"
    with (ROOT / ".setup-label-studio.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (template / "token").exists():
            _prepare(program, template)
    with tempfile.TemporaryDirectory(prefix="label-studio-") as folder:
        shutil.copytree(template, folder, dirs_exist_ok=True)
        token = (template / "token").read_text()
        with _running(program, Path(folder), token) as server:
            yield server


def _prepare(program: Path, template: Path) -> None:
    "One migrated folder that every test copies: its first start costs what all later ones save."
    partial = template.with_name("template.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    token = secrets.token_hex(20)
    with _running(program, partial, token):
        pass
    (partial / "token").write_text(token)
    shutil.rmtree(template, ignore_errors=True)
    partial.rename(template)


@contextmanager
def _running(program: Path, folder: Path, token: str) -> Iterator[Server]:
    port = _free_port()
    log = folder / "server.log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            [str(program), "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)],
            stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder,
            env=_environment(folder, token), start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, log)
        yield Server(url, token, process.pid)
    finally:
        _stop(process)


def _environment(folder: Path, token: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "LC_ALL", "TMPDIR", "TZ")}
    return kept | {
        "HOME": str(folder), "LABEL_STUDIO_BASE_DATA_DIR": str(folder), "LABEL_STUDIO_USERNAME": "tests@example.org",
        "LABEL_STUDIO_PASSWORD": token, "LABEL_STUDIO_USER_TOKEN": token, "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "COLLECT_ANALYTICS": "false", "LATEST_VERSION_CHECK": "false", "SENTRY_DSN": "", "FRONTEND_SENTRY_DSN": "",
        "SSRF_PROTECTION_ENABLED": "false", "ML_BLOCK_LOCAL_IP": "false",
    }


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise Unavailable(f"the server ended with {process.returncode}: {log.read_text()[-300:]!r}")
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
    raise Unavailable(f"the server did not answer /health within {START_S} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    "End the whole group: the server starts helpers of its own."
    for sign, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    with serve() as server:
        print(server.url, "answers")
