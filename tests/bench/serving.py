"""The service beside FastAPI, MLServer, LitServe, BentoML and MLflow: the same LightGBM model, server on one core, load on another.

    python -m tests.bench.serving install            # the peers, in .venv-peers/serving
    python -m tests.bench.serving                    # everything but fuzz and soak, at most 15 minutes
    python -m tests.bench.serving [speed] [swaps] [kill] [kill_two_workers] [--rounds 3] [--only pilothouse,FastAPI]
    python -m tests.bench.serving tls                # with and without TLS, in turn
    python -m tests.bench.serving tails              # p99 of ours and of the best peer, in turn
    python -m tests.bench.serving mlflow             # requests a second of ours and of MLflow with named rows, in turn
    python -m tests.bench.serving fuzz
    python -m tests.bench.serving soak --soak 600    # ten minutes at the promised rate, three times kill -9

`speed`  wrk: single rows at 1 and 16 clients, 100 rows at 8; then single rows in open loops at half of what 16 clients got, and at
         half of what the best peer got (arrivals drawn beforehand, latency from when a request was due): the medians of nine
         windows of 3 s for each server, before everything else on its core (SCHED_FIFO) where that is allowed, and how much of the
         cores' time the hypervisor took in each
`swaps`  10,000 requests through 20 hot swaps and 10 blue-green switches; every answer held against its version's
`kill`   kill -9 of the worker under load; `kill_two_workers` of one of two
`tails`  ours, the best peer and a socket that computes nothing stand on one core and are asked in turn, in open loops of .5 s at half of
         what 16 clients get: what a machine adds to a p99 changes within minutes, so only windows side by side can be compared;
         those in which the hypervisor took nothing of any core are told apart. And each twice: as ever, and with server and load before
         everything else on their cores (SCHED_FIFO), since a machine's own housekeeping takes a core for milliseconds several times a
         second, which is the p99 of whoever answers in a tenth of one
`tls`    ours alone, with and without TLS, in turn: single rows at 1 and 16 clients on open connections, and a connection for each request
`fuzz`   schemathesis makes 10,000 bodies from the service's own OpenAPI document
`soak`   the promised rate, every answer held against the model's, three kills

The model has 300 trees of 63 leaves, 7 numbers and 3 categories. Ours runs as a user runs it, `pilothouse serve`, with token, a log
record a request, metrics, inference log and checks; peers run their documented handlers (tests/bench/serving_peers) without any of these.
FastAPI runs twice: with `def`, as its documentation asks for work that blocks, and with `async def`, which is quicker here and answers
nobody else meanwhile. MLflow runs three times: with its LightGBM flavour, where the caller must send the booster's own numbers, the same with a
signature, against which it checks columns as ours does, and with rows as FastAPI, LitServe and BentoML get them. Servers take turns in each round, medians over rounds are shown. Every server's answers are held against the
booster's own first.
Two processors of a virtual machine are often halves of one core: there a generator that works hard slows the server, most of all the one
that answers most. So the open loops come from a small program in C (open_loop.c, compiled with cc).
Results: tests/bench/results/serving.json.
"""
from __future__ import annotations

import argparse
import atexit
import datetime as dt
import json
import os
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "POLARS_MAX_THREADS": "1"}

import numpy as np  # noqa: E402
import polars as pl  # noqa: E402
import psutil  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

from pipeline.deploy.load import OPEN, SAMPLE, Plan, answered_share, arrivals, latency_quantile, request, send_bodies, throughput  # noqa: E402

PEERS = ROOT / ".venv-peers"
HANDLERS = Path(__file__).parent / "serving_peers"
RESULTS = Path(__file__).parent / "results" / "serving.json"
PACKAGES = {
    "serving": ["fastapi==0.115.14", "uvicorn[standard]==0.54.0", "mlserver==1.7.1", "mlserver-lightgbm==1.7.1", "litserve==0.2.19", "bentoml==1.4.39",
                "mlflow==3.17.2", "lightgbm==4.7.0"],
    "schemathesis": ["schemathesis>=4,<5"],
}
SERVER_CORE, LOAD_CORE = 0, 1
TOKEN = "bench-0123456789abcdef"   # noqa: S105
NUMBERS, LEVELS = 7, (12, 60, 100)
WRK = """
local bodies = {}
for line in io.lines(os.getenv("BENCH_BODIES")) do bodies[#bodies + 1] = line end
local n, made = 0, {}
init = function()
  wrk.headers["content-type"] = "application/json"
  if os.getenv("BENCH_CLOSE") == "1" then wrk.headers["connection"] = "close" end
  if os.getenv("BENCH_TOKEN_SENT") ~= "" then wrk.headers["authorization"] = "Bearer " .. os.getenv("BENCH_TOKEN_SENT") end
  for i, body in ipairs(bodies) do made[i] = wrk.format("POST", os.getenv("BENCH_PATH"), nil, body) end
end
request = function() n = n % #made + 1; return made[n] end
done = function(summary, latency)
  local e = summary.errors
  print(string.format('{"requests": %d, "us": %d, "p50_ms": %f, "p99_ms": %f, "errors": %d}', summary.requests, summary.duration,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000, e.connect + e.read + e.write + e.status + e.timeout))
end
"""


# -- the world: one model, twice


def rows(n: int, seed: int) -> pl.DataFrame:
    "Seven numbers, three categories and a binary outcome that depends on all."
    random = np.random.default_rng(seed)
    frame = pl.DataFrame({f"x{i}": random.normal(0, 1, n).round(4) for i in range(NUMBERS)} | {
        f"c{k}": random.choice([f"level {i:02d}" for i in range(k)], n) for k in LEVELS})
    effect = sum(np.sin((1 + i / 3) * frame[f"x{i}"].to_numpy()) for i in range(NUMBERS))
    effect = effect + sum(np.cos(frame[f"c{k}"].str.slice(6).cast(pl.Int64).to_numpy()) for k in LEVELS)
    return frame.with_columns(y=pl.Series(np.where(effect + random.normal(0, 1, n) > 0, "true", "false")))


def build(place: Path) -> Path:
    "A project with a run whose package is version 1, version 2 in its store, and what the peers read."
    from pipeline.core.store import digest
    from pipeline.data.contract import target_values
    from pipeline.deploy.package import Contents, release
    from pipeline.deploy.schema import make_schema
    from pipeline.train.models import train_model
    from pipeline.train.protocol import Fitting

    frame = rows(20_000, 1)
    contract = {"target": "y", "task": "binary", "classes": ["false", "true"], "positive": "true", "time": None, "group": None, "subject": None,
                "features": frame.columns[:-1], "left_out": [], "cohorts": [], "columns": [
                    {"name": n, "type": "number" if n[0] == "x" else "category", "dtype": str(frame.schema[n]), "nullable": False, "pii": False, "why": "",
                     "role": "target" if n == "y" else "feature", "known_at": None, "min": None, "max": None,
                     "levels": None if n[0] == "x" else sorted(frame[n].unique().to_list()), "n_levels": None} for n in frame.columns]}
    (place / "settings.ini").write_text("")
    (place / "params").mkdir()
    (place / "params" / "bench.yml").write_text(json.dumps({
        "problem": {"name": "bench", "statement": "Which outcome will it be, asked while it is open?", "task": "binary", "target": "y",
                    "kpi": {"name": "right answers", "baseline": 0, "target": 1, "unit": ""}},
        "data": {"sources": [{"name": "t", "kind": "csv", "path": "t.csv"}]}}))
    outputs = place / "outputs"
    for version in (1, 2):
        model = train_model("trees", frame, target_values(frame, contract), contract,
                            Fitting({"rounds": 300, "num_leaves": 63, "learning_rate": 0.05, "categories": "native"}, version, 1))
        model.save(place / f"model{version}")
        contents = Contents(contract, make_schema(contract, frame).to_dict(), {"threshold": 0.5}, [], {}, "# bench\n", {})
        package = release(outputs / "store", place / "work", "bench", place / f"model{version}", contents)
        if version == 1:
            run = outputs / "bench" / "main" / "06_deploy"
            shutil.copytree(package, run / "package")
            (run / "receipt.json").write_text(json.dumps({"outputs": {"deploy/package": {"file": "package", "sha256": digest(package)}}}))
            (place / "columns.json").write_text(json.dumps([{"name": c["name"], "type": c["type"], "levels": c["levels"]} for c in model.encoder.to_dict()]))
            trees = model.estimator
            assert trees.view.coder is None and trees.booster.num_trees() == 300
            trees.booster.save_model(str(place / "model.txt"))
        shutil.rmtree(place / "work", ignore_errors=True)
        asked = rows(2_000, 9).drop("y")
        asked.write_parquet(place / "asked.parquet")
        np.save(place / f"p{version}.npy", model.predict(asked)[:, 1])
    return place


# -- servers


def free_ports(n: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


@dataclass(frozen=True)
class Server:
    "How one is started, asked and understood."

    name: str
    command: Callable[[Path, list[int]], list[str]]
    path: str = "/predict"
    body: Callable[[Sequence[dict[str, Any]]], Any] = lambda some: {"rows": list(some)}
    p: Callable[[Any], list[float]] = lambda answer: [a["p"] for a in answer["predictions"]]
    prepare: Callable[[Path, list[int]], list[str]] | None = None
    token: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    keeps: str = ""     # what `prepare` makes in the world, once
    computes: bool = True     # its answers are the model's


@dataclass
class Running:
    "A started server."

    server: Server
    port: int
    process: subprocess.Popen[bytes]
    folder: Path
    start_s: float = 0.0
    sent: dict[str, str] = field(default_factory=dict)
    certificate: str = ""      # of a server that speaks TLS

    @property
    def url(self) -> str:
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.port}"

    def ask(self, path: str, body: bytes | None = None) -> Any:
        request = urllib.request.Request(f"{self.url}{path}", body, self.sent)   # noqa: S310
        context = ssl.create_default_context(cafile=self.certificate) if self.certificate else None
        with urllib.request.urlopen(request, timeout=30, context=context) as response:   # noqa: S310
            return json.loads(response.read())

    def tree(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def memory_mb(self) -> float:
        return sum(p.memory_info().rss for p in self.tree()) / 1e6

    def cpu_s(self) -> float:
        return sum(sum(p.cpu_times()[:2]) for p in self.tree())

    def worker(self) -> psutil.Process:
        "The process that answers: the child that has used most processor time."
        return max(self.tree()[1:], key=lambda p: sum(p.cpu_times()[:2]))


def _peer(name: str) -> str:
    return str(PEERS / "serving" / "bin" / name)


def _code(columns: list[dict[str, Any]], row: dict[str, Any]) -> list[float]:
    return [row[c["name"]] if c["type"] != "category" else float(c["levels"].index(row[c["name"]])) for c in columns]


def coded(world: Path, some: Sequence[dict[str, Any]]) -> list[list[float]]:
    columns = json.loads((world / "columns.json").read_text())
    return [_code(columns, row) for row in some]


def servers(world: Path) -> list[Server]:
    "Ours and the peers."

    def tensors(some: Sequence[dict[str, Any]]) -> dict[str, Any]:
        values = coded(world, some)
        return {"inputs": [{"name": "x", "shape": [len(values), len(values[0])], "datatype": "FP64", "data": values}]}

    def split(some: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"dataframe_split": {"columns": list(some[0]), "data": coded(world, some)}}

    def named(some: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"dataframe_split": {"columns": list(some[0]), "data": [list(row.values()) for row in some]}}

    ours = [str(Path(sys.executable).parent / "pilothouse"), "serve", "bench/main", "--token", "env:BENCH_TOKEN", "--port"]
    return [   # ours after the peers, so that their rate is known when ours is asked at it
        Server("FastAPI", lambda w, p: [_peer("uvicorn"), "fastapi_app:app", "--port", str(p[0]), "--log-level", "warning", "--no-access-log"]),
        Server("FastAPI async", lambda w, p: [_peer("uvicorn"), "fastapi_app:app", "--port", str(p[0]), "--log-level", "warning", "--no-access-log"],
               environment={"BENCH_ASYNC": "1"}),
        Server("MLServer", lambda w, p: [_peer("mlserver"), "start", str(w / "mlserver")], "/v2/models/trees/infer", tensors, lambda a: a["outputs"][0]["data"],
               lambda w, p: [_peer("python"), "mlserver_save.py", str(w / "mlserver"), *map(str, p[:3])]),
        Server("LitServe", lambda w, p: [_peer("python"), "litserve_app.py", str(p[0])]),
        Server("BentoML", lambda w, p: [_peer("bentoml"), "serve", "bentoml_app:Trees", "--port", str(p[0])]),
        *(Server(name, lambda w, p, kept=kept: [_peer("mlflow"), "models", "serve", "-m", str(w / kept), "--port", str(p[0]), "--host", "127.0.0.1", "--env-manager", "local"],
                 "/invocations", body, lambda a: a["predictions"],
                 lambda w, p, kept=kept: [_peer("python"), "mlflow_save.py", str(w / kept), kept], keeps=kept)
          for name, kept, body in (("MLflow", "mlflow", split), ("MLflow signed", "mlflow_signed", split), ("MLflow rows", "mlflow_rows", named))),
        Server("pilothouse", lambda w, p: [*ours, str(p[0])], p=lambda a: [x["p"]["true"] for x in a["predictions"]], token=TOKEN),
    ]


@contextmanager
def running(server: Server, world: Path, *more: str) -> Iterator[Running]:
    "Started on its core, asked until its answers are the model's, stopped afterwards."
    ports = free_ports(3)
    peer = not server.name.startswith("pilothouse")
    place = HANDLERS if peer else world
    environment = {**os.environ, **server.environment, "BENCH_WORLD": str(world), "BENCH_TOKEN": TOKEN, "DO_NOT_TRACK": "1", "BENTOML_DO_NOT_TRACK": "true", "PYTHONDONTWRITEBYTECODE": "1",
                   "MLFLOW_DISABLE_TELEMETRY": "true", "BENTOML_HOME": str(world / "bentoml"), "PYTHONPATH": "" if peer else str(ROOT),
                   "PATH": f"{PEERS / 'serving' / 'bin'}:{os.environ['PATH']}" if peer else os.environ["PATH"]}
    if server.prepare and not (server.keeps and (world / server.keeps).exists()):
        subprocess.run(server.prepare(world, ports), cwd=place, env=environment, check=True, capture_output=True)
    log = open(world / f"{server.name}.log", "wb")   # noqa: SIM115
    begun = time.monotonic()
    process = subprocess.Popen(["taskset", "-c", str(SERVER_CORE), *server.command(world, ports), *more], cwd=place, env=environment, stdout=log, stderr=log,
                               start_new_session=True)
    found = Running(server, ports[0], process, world, sent={"content-type": "application/json"} | ({"authorization": f"Bearer {server.token}"} if server.token else {}),
                    certificate=more[more.index("--tls-cert") + 1] if "--tls-cert" in more else "")
    try:
        asked, wanted = pl.read_parquet(world / "asked.parquet").head(100).to_dicts(), np.load(world / "p1.npy")[:100]
        await_answers(found, json.dumps(server.body(asked)).encode(), wanted if server.computes else None)
        found.start_s = time.monotonic() - begun
        yield found
    finally:
        for p in reversed(found.tree() if process.poll() is None else []):
            try:
                p.send_signal(signal.SIGTERM if p.pid == process.pid else signal.SIGCONT)
            except psutil.NoSuchProcess:
                continue
        try:
            process.wait(8)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        log.close()


def await_answers(server: Running, body: bytes, wanted: np.ndarray | None, within_s: float = 120.0) -> None:
    "Until it answers; its answers must be those that are wanted, where any are."
    deadline, said = time.monotonic() + within_s, ""
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise SystemExit(f"{server.server.name} ended: {(server.folder / f'{server.server.name}.log').read_text()[-2000:]}")
        try:
            answer = server.ask(server.server.path, body)
            break
        except OSError as error:
            said = str(error)
            if isinstance(error, urllib.error.HTTPError) and error.code in (400, 422):
                raise SystemExit(f"{server.server.name} refuses its body: {error.read()[:500]!r}") from error
            time.sleep(0.1)
    else:
        raise SystemExit(f"{server.server.name} was not ready within {within_s:g} s: {said}")
    gap = 0.0 if wanted is None else np.abs(np.array(server.server.p(answer)) - wanted).max()
    if not gap < 1e-9:
        raise SystemExit(f"{server.server.name} answers something else: {gap:g}")


# -- speed


def bodies(world: Path, server: Server, size: int, n: int) -> list[bytes]:
    some = pl.read_parquet(world / "asked.parquet").to_dicts()
    return [json.dumps(server.body([some[(i * size + k) % len(some)] for k in range(size)])).encode() for i in range(n)]


def wrk(server: Running, some: Sequence[bytes], clients: int, seconds: float, close: bool = False) -> dict[str, float]:
    "A closed loop of so many clients."
    script, file = server.folder / "wrk.lua", server.folder / "bodies.txt"
    script.write_text(WRK)
    file.write_bytes(b"\n".join(some) + b"\n")
    environment = {**os.environ, "BENCH_BODIES": str(file), "BENCH_PATH": server.server.path, "BENCH_TOKEN_SENT": server.server.token, "BENCH_CLOSE": str(int(close))}
    spent = server.cpu_s()
    done = subprocess.run(["taskset", "-c", str(LOAD_CORE), "wrk", "-t1", f"-c{clients}", f"-d{max(round(seconds), 1)}s", "--timeout", "10s", "-s", str(script), server.url], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return {"rps": found["requests"] / found["us"] * 1e6, "p50_ms": found["p50_ms"], "p99_ms": found["p99_ms"], "errors": found["errors"],
            "cpu_ms": 1000 * (server.cpu_s() - spent) / max(found["requests"], 1)}


def open_loop(server: Running, some: Sequence[bytes], rate: float, seconds: float, keep: bool = False, seed: int = 7) -> pl.DataFrame:
    "Single requests when they are due; with `keep` from the generator that staging uses, which keeps the answers."
    plan = Plan("127.0.0.1", server.port, rate, max(int(rate * seconds), 20), server.server.path, server.sent, seed, keep=keep)
    if keep:
        return send_bodies(plan, some, LOAD_CORE)
    with tempfile.TemporaryDirectory() as scratch:
        due, sent, found = (Path(scratch) / name for name in ("due", "sent", "found"))
        due.write_bytes(arrivals(plan.rate, plan.requests, plan.seed).tobytes())
        sent.write_bytes(b"".join(struct.pack("<I", len(each)) + each for each in (request(plan, body) for body in some)))
        subprocess.run(["taskset", "-c", str(LOAD_CORE), str(generator()), str(plan.port), str(OPEN), str(plan.timeout_s), due, sent, found], check=True)
        told = np.fromfile(found).reshape(-1, len(SAMPLE))
    return pl.DataFrame(told, schema=list(SAMPLE)).cast(SAMPLE).sort("due_s")


@cache
def generator() -> Path:
    "The open loop as a program."
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("the open loops are made by a program in C and there is no compiler: install one (cc)")
    program = Path(tempfile.mkdtemp(prefix="open-loop-")) / "open_loop"
    atexit.register(shutil.rmtree, program.parent)
    subprocess.run([compiler, "-O2", "-o", str(program), str(ROOT / "tests" / "bench" / "open_loop.c")], check=True)
    return program


def speed(world: Path, only: Sequence[str], rounds: int, seconds: float, most_s: float) -> dict[str, Any]:
    "Rounds in which every server has its turn; no further round where it would not end in time."
    begun = time.monotonic()
    chosen = [s for s in servers(world) if not only or s.name in only]
    found: dict[str, list[dict[str, Any]]] = {s.name: [] for s in chosen}
    failed: list[str] = []
    for number in range(rounds):
        if number and (time.monotonic() - begun) * (number + 1) / number > most_s:
            print(f"{number} of {rounds} rounds: another would not end within {most_s:g} s", file=sys.stderr, flush=True)
            break
        order = [chosen[(i + number) % len(chosen)] for i in range(len(chosen))]
        for server in order:
            try:
                row = one_turn(server, world, seconds, number + 1, found)
            except (SystemExit, subprocess.CalledProcessError, OSError) as error:   # a server that fails must not cost the others
                failed.append(f"round {number + 1}, {server.name}: {type(error).__name__}: {error}")
                print(failed[-1], file=sys.stderr, flush=True)
                continue
            found[server.name].append(row)
            print(f"round {number + 1}, {server.name}: " + json.dumps(row), file=sys.stderr, flush=True)
    return {"rounds": found, "of_rounds": max(map(len, found.values())), "failed": failed, **summary(found)}


def one_turn(server: Server, world: Path, seconds: float, seed: int, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    "One server started, loaded in every way, stopped."
    with running(server, world) as started:
        ones, hundreds = bodies(world, server, 1, 500), bodies(world, server, 100, 20)
        wrk(started, ones, 4, 1)
        one, sixteen = wrk(started, ones, 1, seconds), wrk(started, ones, 16, seconds)
        wrk(started, hundreds, 2, 1)
        hundred = wrk(started, hundreds, 8, seconds)
        own = send_bodies(Plan("127.0.0.1", started.port, 0, int(sixteen["rps"] * seconds / 2), server.path, started.sent, connections=16), ones, LOAD_CORE)
        half = windows(started, ones, sixteen["rps"] / 2, seed)
        row = {"own_rps": throughput(own).value, "one": one, "sixteen": sixteen, "hundred": hundred, "half": half, "half_rate": sixteen["rps"] / 2,
               "start_s": started.start_s, "rss_mb": started.memory_mb()}
        if server.name == "pilothouse":
            best = max((statistics.median(r["sixteen"]["rps"] for r in found[n]) for n in found if n != server.name and found[n]), default=1600.0)
            row |= {"peer_rate": best / 2, "at_peer_rate": windows(started, ones, best / 2, seed)}
        return row


@cache
def allowed() -> bool:
    "Whether server and load may come before everything else on their cores (CAP_SYS_NICE)."
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        print("the open loops run at ordinary priority: another needs CAP_SYS_NICE", file=sys.stderr)
        return False
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return True


@contextmanager
def first(server: Running) -> Iterator[None]:
    "Server and load before everything else that wants their cores (SCHED_FIFO)."
    def order(policy: int, priority: int) -> None:
        for thread in [0, *(thread.id for process in server.tree() for thread in process.threads())]:     # 0: this one, which starts the load
            try:
                if os.sched_getscheduler(thread) != os.SCHED_IDLE:       # it has stepped back behind everybody else, and stays there
                    os.sched_setscheduler(thread, policy, os.sched_param(priority))
            except ProcessLookupError:     # it has ended meanwhile
                continue

    order(os.SCHED_FIFO, 1)
    try:
        yield
    finally:
        order(os.SCHED_OTHER, 0)


def window(server: Running, some: Sequence[bytes], rate: float, seconds: float, seed: int, alone: bool = True) -> dict[str, float]:
    "One short open loop, `first` where it shall be alone, and the share of the cores' time that the hypervisor took meanwhile."
    before = psutil.cpu_times().steal
    with first(server) if alone and allowed() else nullcontext():
        seen = told(open_loop(server, some, rate, seconds, seed=seed))
    return seen | {"stolen": (psutil.cpu_times().steal - before) / (seconds * (os.cpu_count() or 1))}


def windows(server: Running, some: Sequence[bytes], rate: float, seed: int, number: int = 9, seconds: float = 3.0) -> dict[str, Any]:
    "Several short open loops, the medians of what they saw: a virtual machine stands still for milliseconds now and then, and one such moment is the p99 of a long loop."
    found = [window(server, some, rate, seconds, 100 * seed + k) for k in range(number)]
    return {key: statistics.median(one[key] for one in found) for key in found[0] if key != "stolen"} | {
        "windows": number, "alone": allowed(), "windows_p99_ms": [round(one["p99_ms"], 3) for one in found], "windows_stolen": [round(one["stolen"], 4) for one in found]}


def told(sample: pl.DataFrame) -> dict[str, float]:
    "What an open loop saw."
    return {"p50_ms": latency_quantile(sample, 0.5).value, "p99_ms": latency_quantile(sample, 0.99).value, "answered": answered_share(sample),
            "late_p99_ms": float(sample["late_ms"].quantile(0.99) or 0.0), "requests": len(sample)}


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    "Medians of rounds."

    def median(name: str, *keys: str) -> float:
        values = []
        for row in found[name]:
            value: Any = row
            for key in keys:
                value = value[key]
            values.append(value)
        return statistics.median(values)

    table = [{"server": name, "rps_1": median(name, "one", "rps"), "p50_1_ms": median(name, "one", "p50_ms"), "rps_16": median(name, "sixteen", "rps"),
              "p50_16_ms": median(name, "sixteen", "p50_ms"), "p99_16_ms": median(name, "sixteen", "p99_ms"), "rps_100": median(name, "hundred", "rps"),
              "cpu_ms_16": median(name, "sixteen", "cpu_ms"), "cpu_ms_100": median(name, "hundred", "cpu_ms"),
              "own_rps_16": median(name, "own_rps"), "half_rate": median(name, "half_rate"), "half_p50_ms": median(name, "half", "p50_ms"), "half_p99_ms": median(name, "half", "p99_ms"),
              "half_answered": median(name, "half", "answered"), "rss_mb": median(name, "rss_mb"), "start_s": median(name, "start_s"),
              "errors": sum(r[k]["errors"] for r in found[name] for k in ("one", "sixteen", "hundred"))} for name in found if found[name]]
    if found.get("pilothouse"):
        table[[r["server"] for r in table].index("pilothouse")] |= {
            "peer_rate": found["pilothouse"][-1]["peer_rate"], "peer_rate_p99_ms": median("pilothouse", "at_peer_rate", "p99_ms")}
    return {"table": table}


def ratio(mine: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    "Ratio of medians, its interval a bootstrap over windows."
    a, b, rng = np.array(mine), np.array(others), np.random.default_rng(0)
    drawn = np.median(rng.choice(a, (2000, len(a))), axis=1) / np.median(rng.choice(b, (2000, len(b))), axis=1)
    return {"value": float(np.median(a) / np.median(b)), "interval": [float(v) for v in np.quantile(drawn, [0.025, 0.975])], "windows": [len(a), len(b)]}


def beside(world: Path, name: str, turns: int = 8, seconds: float = 4.0) -> dict[str, Any]:
    "Requests a second of ours and of one peer, 16 clients, in turn."
    ours, peer = servers(world)[-1], next(s for s in servers(world) if s.name == name)
    with running(peer, world) as other, running(ours, world) as mine:
        sent = {server.server.name: bodies(world, server.server, 1, 500) for server in (other, mine)}
        found: dict[str, list[float]] = {name: [], "pilothouse": []}
        for turn in range(turns):
            for server in (other, mine)[:: 1 if turn % 2 else -1]:
                found[server.server.name].append(wrk(server, sent[server.server.name], 16, seconds)["rps"])
    return {"of": name, "rps": found, "ratio": ratio(found["pilothouse"], found[name])}


def tails(world: Path, number: int = 50, seconds: float = 0.5) -> dict[str, Any]:
    "p99 in windows that take turns, alone on the cores and as ever: of all of them, and of those in which the hypervisor took nothing."
    ours, peer = servers(world)[-1], next(s for s in servers(world) if s.name == "FastAPI async")
    control = Server("socket", lambda w, p: [_peer("python"), "socket_app.py", str(p[0])], computes=False)
    with running(peer, world) as best, running(ours, world) as mine, running(control, world) as floor:
        sent = {server.server.name: bodies(world, server.server, 1, 500) for server in (best, mine, floor)}
        taken = {server.server.name: [wrk(server, sent[server.server.name], 16, seconds)["rps"] for seconds in (1, 2, 2, 2, 2, 2)][1:] for server in (best, mine)}
        rates = {name: statistics.median(rps) / 2 for name, rps in taken.items()}
        arms = {peer.name: (best, rates[peer.name]), "pilothouse": (mine, rates["pilothouse"]), "pilothouse at that peer's rate": (mine, rates[peer.name]),
                "socket at pilothouse's rate": (floor, rates["pilothouse"]), "socket at that peer's rate": (floor, rates[peer.name])}
        found: dict[tuple[str, bool], list[dict[str, float]]] = {(name, alone): [] for alone in sorted({allowed(), False}, reverse=True) for name in arms}
        for turn in range(number):
            for name, alone in list(found)[:: 1 if turn % 2 else -1]:
                server, rate = arms[name]
                found[name, alone].append(window(server, sent[server.server.name], rate, seconds, turn, alone))
    table, ratios = [], []
    for alone, kept, most in ((alone, *kept) for alone in sorted({allowed(), False}, reverse=True) for kept in (("all", 1.0), ("nothing stolen", 0.0))):
        seen = {name: [row for row in found[name, alone] if row["stolen"] <= most] for name in arms}
        if min(map(len, seen.values())) < 5:
            continue
        p99 = {name: [row["p99_ms"] for row in rows] for name, rows in seen.items()}
        table += [{"arm": name, "alone": alone, "kept": kept, "windows": len(rows), "rate": arms[name][1]} | {key: statistics.median(row[key] for row in rows) for key in rows[0]} | {
            "p99_quartiles_ms": [float(v) for v in np.quantile(p99[name], [0.25, 0.75])]} for name, rows in seen.items()]
        ratios += [{"arm": name, "of": peer.name, "alone": alone, "kept": kept} | ratio(p99[name], p99[peer.name]) for name in ("pilothouse", "pilothouse at that peer's rate")]
    return {"ratios": ratios, "table": table, "seconds": seconds}


def certificate(place: Path) -> list[str]:
    "Options of a server with a certificate of its own (P-256)."
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(place / "key.pem"), "-out", str(place / "cert.pem")], check=True, capture_output=True)
    return ["--tls-cert", str(place / "cert.pem"), "--tls-key", str(place / "key.pem")]


def tls(world: Path, rounds: int, seconds: float) -> dict[str, Any]:
    "Both servers stand on one core and are asked in turn; medians over rounds."
    ours = servers(world)[-1]
    found: dict[str, list[dict[str, Any]]] = {"plain": [], "tls": []}
    with running(ours, world) as plain, running(replace(ours, name="pilothouse TLS"), world, *certificate(world)) as secret:
        some = bodies(world, ours, 1, 500)
        for number in range(rounds):
            for name, server in [("plain", plain), ("tls", secret)][:: 1 if number % 2 else -1]:
                wrk(server, some, 4, 1)
                found[name].append({"one": wrk(server, some, 1, seconds), "sixteen": wrk(server, some, 16, seconds), "anew": wrk(server, some, 16, seconds, close=True)})
    table = {what: {name: {key: statistics.median(r[what][key] for r in rows) for key in ("rps", "p50_ms", "cpu_ms", "errors")} for name, rows in found.items()}
             for what in ("one", "sixteen", "anew")}
    return {"rounds": found, "of_rounds": rounds, "table": table}


# -- what must not fail


def expected(world: Path) -> dict[int, np.ndarray]:
    return {v: np.load(world / f"p{v}.npy") for v in (1, 2)}


def held_against(sample: pl.DataFrame, world: Path, n: int) -> dict[str, Any]:
    "Every answer of an open loop of single rows against the version that it names; the sample is in the order of the bodies."
    wanted, wrong, versions, unlabelled = expected(world), 0, {1: 0, 2: 0}, 0
    for number, (status, body) in enumerate(sample.select("status", "body").iter_rows()):
        if status != 200:
            continue
        answer = json.loads(body)
        if answer.get("version") not in wanted:
            unlabelled += 1
            continue
        versions[answer["version"]] += 1
        wrong += abs(answer["predictions"][0]["p"]["true"] - wanted[answer["version"]][number % n]) > 1e-9
    failed = int((sample["status"] != 200).sum())
    return {"requests": len(sample), "failed": failed, "wrong": int(wrong), "unlabelled": unlabelled, "answered_by": versions,
            "p99_ms": latency_quantile(sample, 0.99).value, "longest_ms": float(sample["latency_ms"].max() or 0)}   # type: ignore[arg-type]


def swaps(world: Path, requests: int = 10_000, hot: int = 20, switches: int = 10) -> dict[str, Any]:
    "Load in the background, plans changed in the registry's database in front. The first change loads a package that no process has loaded yet."
    from pipeline.deploy.registry import Registry
    from pipeline.deploy.versions import Plans

    ours, n = servers(world)[-1], 500
    digests = {}
    for folder in (world / "outputs" / "store" / "models").iterdir():
        digests[json.loads((folder / "MANIFEST.json").read_text())["version"]] = folder.name
    with running(ours, world) as started:
        some, sample = bodies(world, ours, 1, n), []
        plans = Plans(Registry(world / "outputs" / "store"))
        stopped = threading.Event()

        def load() -> None:
            while not stopped.is_set() or sum(map(len, sample)) < requests:
                sample.append(open_loop(started, some, 400, 5, keep=True, seed=len(sample) + 1))

        background = threading.Thread(target=load)
        background.start()
        times: dict[str, list[float]] = {"hot": [], "switch": []}
        live = 1

        def change(kind: str, **changes: Any) -> None:
            plan = plans.current("bench")
            begun = time.perf_counter()
            plans.change("bench", plan.revision if plan else 0, f"bench: {kind}", "bench", **changes)
            while started.ask("/ready")["package"] != changes["live"]:
                if time.perf_counter() - begun > 30:
                    raise SystemExit(f"{kind}: the service did not follow within 30 s")
                time.sleep(0.01)
            if kind in times:
                times[kind].append(time.perf_counter() - begun)
            time.sleep(0.3)

        try:
            for _ in range(hot):
                live = 3 - live
                change("hot", live=digests[live], canary=None)
            change("both at hand", live=digests[live], canary=digests[3 - live])
            time.sleep(3)
            for _ in range(switches):
                live = 3 - live
                change("switch", live=digests[live], canary=digests[3 - live])
        finally:
            stopped.set()
            background.join()
        parts = [held_against(s, world, n) for s in sample]
        total = {k: sum(p[k] for p in parts) for k in ("requests", "failed", "wrong", "unlabelled")}
        return total | {"answered_by": {v: sum(p["answered_by"][v] for p in parts) for v in (1, 2)}, "hot_swaps": len(times["hot"]), "switches": len(times["switch"]),
                        "first_load_s": times["hot"][0], "hot_swap_s": told_times(times["hot"][1:]), "switch_s": told_times(times["switch"]), "longest_request_ms": max(p["longest_ms"] for p in parts),
                        "p99_ms": statistics.median(p["p99_ms"] for p in parts)}


def told_times(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "largest": max(values)}


def kill(world: Path, rate: float, seconds: float = 20.0, kills: Sequence[float] = (5.0,), workers: int = 1) -> dict[str, Any]:
    "kill -9 of the worker while requests arrive; when every request that is due is answered again at once."
    ours, n = servers(world)[-1], 500
    more = ["--workers", str(workers)] if workers > 1 else []
    with running(ours, world, *more) as started:
        some = bodies(world, ours, 1, n)
        at: list[float] = []
        begun = time.time()

        def shoot() -> None:
            for moment in kills:
                time.sleep(max(begun + moment - time.time(), 0))
                started.worker().kill()
                at.append(time.time() - begun)

        shooter = threading.Thread(target=shoot)
        shooter.start()
        sample = open_loop(started, some, rate, seconds, keep=True)
        shooter.join()
        found = held_against(sample, world, n)
        memory = started.memory_mb()
    lost = sample.filter(pl.col("status") != 200)["due_s"]
    spans = [round(s["due_s"].max() - s["due_s"].min(), 3) for s in lost.to_frame().with_columns(stretch=(lost.diff().fill_null(0) > 2).cum_sum()).partition_by("stretch")] if len(lost) else []
    return found | {"failed_spans_s": spans, "rate": rate, "seconds": seconds, "workers": workers, "kills": len(at), "availability": 1 - found["failed"] / found["requests"],
                    "back_s": recovery(sample), "connections": 64, "rss_mb": memory}


def recovery(sample: pl.DataFrame, slow_ms: float = 500.0) -> list[float]:
    "Seconds of each stretch in which requests went unanswered or waited long."
    bad = sample.filter((pl.col("status") != 200) | (pl.col("latency_ms") > slow_ms))["due_s"].to_list()
    stretches: list[list[float]] = []
    for due in bad:
        if stretches and due - stretches[-1][1] < 2:
            stretches[-1][1] = due
        else:
            stretches.append([due, due])
    return [round(b - a, 3) for a, b in stretches]


def fuzz(world: Path, examples: int = 10_000) -> dict[str, Any]:
    "schemathesis from our own OpenAPI document."
    ours = servers(world)[-1]
    with running(ours, world) as started:
        before, begun = started.memory_mb(), time.monotonic()
        worker = started.worker().pid
        done = subprocess.run([str(PEERS / "schemathesis" / "bin" / "schemathesis"), "run", f"http://127.0.0.1:{started.port}/openapi.json", "-H", f"authorization: Bearer {TOKEN}",
                               "--checks", "not_a_server_error", "--phases", "fuzzing", "--include-path", "/predict", "-n", str(examples), "--generation-database", "none",
                               "--continue-on-failure", "--suppress-health-check", "all", "--no-color"], capture_output=True, text=True, cwd=world)
        tail = [line for line in done.stdout.splitlines() if line.strip()][-12:]
        counted = urllib.request.Request(f"http://127.0.0.1:{started.port}/metrics", None, started.sent)
        with urllib.request.urlopen(counted, timeout=30) as response:   # noqa: S310
            metrics = response.read().decode()
        statuses: dict[str, int] = {}
        for line in metrics.splitlines():
            if line.startswith("pilothouse_requests_total") and "/predict" in line:
                code = line.partition('status="')[2][:3]
                statuses[code] = statuses.get(code, 0) + int(float(line.rpartition(" ")[2]))
        records = [json.loads(line) for line in (world / "pilothouse.log").read_text().splitlines() if line.startswith("{")]
        ms = sorted(r["ms"] for r in records if r.get("path") == "/predict")
        return {"rc": done.returncode, "answer_ms": {"median": ms[len(ms) // 2], "p99": ms[int(0.99 * len(ms))], "longest": ms[-1]}, "seconds": time.monotonic() - begun, "statuses": statuses, "same_worker": started.worker().pid == worker, "said": tail,
                "memory_mb": [before, started.memory_mb()], "server_errors": sum(v for k, v in statuses.items() if k.startswith("5"))}


# -- results


def show(found: dict[str, Any]) -> None:
    "Markdown tables."
    if "speed" in found:
        print("| server | 1 client: p50 ms, requests/s | 16 clients: p50/p99 ms, requests/s | 100 rows, 8 clients: requests/s | half of capacity, open loop: rate, p50/p99 ms | CPU ms a request, 1 row / 100 | MB | start s |\n|---|---|---|---|---|---|---|---|")
        for r in found["speed"]["table"]:
            print(f"| {r['server']} | {r['p50_1_ms']:.2f}, {r['rps_1']:,.0f} | {r['p50_16_ms']:.1f}/{r['p99_16_ms']:.1f}, {r['rps_16']:,.0f} | {r['rps_100']:,.0f} | "
                  f"{r['half_rate']:,.0f}, {r['half_p50_ms']:.2f}/{r['half_p99_ms']:.2f} | {r['cpu_ms_16']:.3f} / {r['cpu_ms_100']:.2f} | {r['rss_mb']:.0f} | {r['start_s']:.1f} |")
        named = {r["server"]: r for r in found["speed"]["table"]}
        us = named.pop("pilothouse", None)
        if us and named:
            print("\n| against | single rows, 16 clients | 1 client, p50 | 100 rows | p99 at half of its own capacity |\n|---|---|---|---|---|")
            for name, r in named.items():
                print(f"| {name} | {us['rps_16'] / r['rps_16']:.1f} × | {us['p50_1_ms'] / r['p50_1_ms']:.2f} × | {us['rps_100'] / r['rps_100']:.1f} × | {us['half_p99_ms'] / r['half_p99_ms']:.2f} × |")
            print("\nRequests a second by our own generator instead of wrk, 16 clients: " + ", ".join(f"{r['server']} {r['own_rps_16'] / r['rps_16']:.2f} ×" for r in found["speed"]["table"]))
            print(f"\nAt half of the best peer's capacity ({us['peer_rate']:,.0f} a second): p99 {us['peer_rate_p99_ms']:.2f} ms.")
    if "tails" in found:
        print("| open loop | windows | a second | p50 ms | p99 ms (quartiles of windows) | stolen |\n|---|---|---|---|---|---|")
        for r in found["tails"]["table"]:
            print(f"| {r['arm']}, {r['kept']}{', alone' if r['alone'] else ''} | {r['windows']} | {r['rate']:,.0f} | {r['p50_ms']:.2f} | {r['p99_ms']:.2f} ({r['p99_quartiles_ms'][0]:.2f}–{r['p99_quartiles_ms'][1]:.2f}) | {r['stolen']:.1%} |")
        for r in found["tails"]["ratios"]:
            print(f"\np99 of {r['arm']}, {r['kept']}{', alone on the cores' if r['alone'] else ''}: {r['value']:.2f} × {r['of']} ({r['interval'][0]:.2f}–{r['interval'][1]:.2f})")
    if "mlflow" in found:
        r = found["mlflow"]["ratio"]
        print(f"requests a second, 16 clients, in turn: {r['value']:.0f} × {found['mlflow']['of']} ({r['interval'][0]:.0f}–{r['interval'][1]:.0f}, {r['windows'][0]} windows each)")
    if "tls" in found:
        print("| with and without TLS | requests/s | p50 ms | CPU ms a request |\n|---|---|---|---|")
        for what, said in (("one", "1 client, open connection"), ("sixteen", "16 clients, open connections"), ("anew", "16 clients, a connection for each request")):
            with_it, without = (found["tls"]["table"][what][name] for name in ("tls", "plain"))
            print(f"| {said} | " + " | ".join(f"{with_it[key]:,.{digits}f} / {without[key]:,.{digits}f} ({with_it[key] / without[key]:.2f} ×)" for key, digits in (("rps", 0), ("p50_ms", 2), ("cpu_ms", 3))) + " |")
    for name in ("swaps", "kill", "kill_two_workers", "fuzz", "soak"):
        if name in found:
            print(f"\n{name}: " + json.dumps(found[name], default=str))


def install() -> None:
    for name, packages in PACKAGES.items():
        subprocess.run([sys.executable, "-m", "uv", "venv", "--allow-existing", str(PEERS / name)], check=True)
        subprocess.run([sys.executable, "-m", "uv", "pip", "install", "--python", str(PEERS / name / "bin" / "python"), *packages], check=True)


def versions() -> dict[str, str]:
    import httptools
    import lightgbm

    listed = subprocess.run([sys.executable, "-m", "uv", "pip", "list", "--format", "json", "--python", _peer("python")], capture_output=True, text=True)
    peers = {p["name"]: p["version"] for p in json.loads(listed.stdout or "[]")}
    kept = ("fastapi", "uvicorn", "pydantic", "mlserver", "litserve", "bentoml", "mlflow", "lightgbm")
    return {"python": sys.version.split()[0], "httptools": httptools.__version__, "lightgbm": lightgbm.__version__, **{f"peers: {n}": peers[n] for n in kept if n in peers}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["speed", "swaps", "kill", "kill_two_workers"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each closed loop; open loops take twice as long")
    parser.add_argument("--most", type=float, default=720.0, help="seconds for all rounds")
    parser.add_argument("--only", default="", help="servers, with commas")
    parser.add_argument("--soak", type=float, default=600.0, help="seconds")
    parser.add_argument("--examples", type=int, default=10_000, help="bodies of fuzz")
    parser.add_argument("--rate", type=float, default=500.0, help="the promised requests a second of kill and soak")
    parser.add_argument("--world", default="", help="a folder to keep the model and packages in; built where it is empty")
    parser.add_argument("--out", default=str(RESULTS))
    given = parser.parse_args()
    if given.parts == ["install"]:
        install()
        return
    place = Path(given.world or tempfile.mkdtemp(prefix="serving-")).resolve()
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "p2.npy").exists():
        build(place)
    out = Path(given.out)
    content: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "speed": lambda: speed(place, [n for n in given.only.split(",") if n], given.rounds, given.seconds, given.most),
        "tls": lambda: tls(place, given.rounds, given.seconds),
        "tails": lambda: tails(place),
        "mlflow": lambda: beside(place, "MLflow rows"),
        "swaps": lambda: swaps(place),
        "kill": lambda: kill(place, given.rate),
        "kill_two_workers": lambda: kill(place, given.rate, workers=2),
        "fuzz": lambda: fuzz(place, given.examples),
        "soak": lambda: kill(place, given.rate, given.soak, [given.soak * share for share in (0.2, 0.5, 0.8)], workers=2),
    }
    failed = []
    for part in given.parts:
        begun = time.monotonic()
        try:
            found = work[part]()
        except (SystemExit, subprocess.CalledProcessError, OSError, KeyError) as error:   # one part must not cost the others
            failed.append(f"{part}: {type(error).__name__}: {error}")
            print(failed[-1], file=sys.stderr, flush=True)
            continue
        content |= {part: found | {"date": dt.date.today().isoformat(), "took_s": round(time.monotonic() - begun, 1)}, "versions": versions()}
        out.write_text(json.dumps(content, indent=1) + "\n")
        show({part: found})
    if not given.world:
        shutil.rmtree(place)
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
