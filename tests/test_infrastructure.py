"""A package is put live for real: twice is once, nobody is dropped, and what is broken never meets a caller."""
from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deploy_world as world
from pipeline.cli.main import main, plain_run
from pipeline.core import audit
from pipeline.core.errors import EnvironmentFault, InputError, IntegrityError
from pipeline.data.contract import target_values
from pipeline.deploy import deployment
from pipeline.deploy.deployment import Deployed, ask, deploy, go_back, history, plain_row, read_live, smoke, stop_all
from pipeline.deploy.infrastructure import Blueprint, write_infrastructure
from pipeline.deploy.inspection import UNIT, inspect
from pipeline.deploy.package import KEY, Contents, release
from pipeline.deploy.process import listen
from pipeline.deploy.registry import Registry
from pipeline.deploy.sbom import read_lock, serving_lock
from pipeline.deploy.schema import make_schema
from pipeline.deploy.service import free_port
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting


@dataclass
class Site:
    "A store with three packages, the program that answers, and a place where they go live."

    program: Path
    store: Path
    packages: list[Path]
    place: Path

    @property
    def key(self) -> Any:
        return audit.public_key(self.store, KEY)

    def assemble(self, number: int, releases: Path | None = None) -> Path:
        return deployment.assemble(self.packages[number], self.key, releases or self.place / "releases", program=self.program)

    def deploy(self, number: int, port: int = 0) -> Deployed:
        return deploy(self.place, self.packages[number], self.key, port, by="ann", program=self.program)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    frame, contract = world.rows("binary", 300), world.contract("binary")
    model = train_model("linear", frame, target_values(frame, contract), contract, Fitting({})).save(folder / "model")
    packages = [release(folder / "store", folder / f"work{n}", "tiny", model, Contents(contract, make_schema(contract, frame).to_dict(), {"threshold": 0.5}, [], {}, f"# {n}\n", {}))
                for n in range(3)]
    program = shutil.copytree(world.ROOT / "pipeline", folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    made = Site(program, folder / "store", packages, folder / "live")
    try:
        yield made
    finally:
        stop_all(made.place)


def version_at(port: int) -> int:
    status, answer = ask(port, "GET", "/v2/models/tiny", timeout_s=30)
    assert status == 200
    return int(json.loads(answer)["versions"][0])


class Crowd:
    "Requests one after another until told to stop; what came back."

    def __init__(self, port: int) -> None:
        self.port, self.seen, self.ended = port, [], threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        while not self.ended.is_set():
            try:
                self.seen.append(version_at(self.port))
            except (OSError, AssertionError) as error:
                self.seen.append(repr(error))
            time.sleep(.01)

    def __enter__(self) -> Crowd:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def test_a_package_goes_live_twice_once_and_back(site: Site) -> None:
    first = site.deploy(0)
    assert first.changed and first.version == 1 and version_at(first.door) == 1
    again = site.deploy(0)
    assert not again.changed and (again.release, again.pid, again.door) == (first.release, first.pid, first.door), "twice is once: the same bytes, the same process"
    before = os.umask(0o077)
    elsewhere = site.assemble(0, site.place.parent / "clean")
    os.umask(before)
    assert elsewhere.name == first.release, "from a clean place: the same digest"
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (elsewhere, *elsewhere.rglob("*"))), "whoever it runs as can read it"
    with Crowd(first.door) as crowd:
        second = site.deploy(1)
    assert second.changed and second.door == first.door and version_at(second.door) == 2
    assert set(crowd.seen) == {1, 2} and crowd.seen == sorted(crowd.seen), f"nobody was dropped, nobody went back: {crowd.seen}"
    assert not deployment._alive(vars(first) | {"pid": first.pid, "born": first.born}), "the old release ended"

    # what fails never meets a caller
    broken = site.assemble(2)
    model = next(p for p in (broken / "package" / "model").iterdir() if p.name == "model.json")
    model.chmod(0o644)
    whole = model.read_bytes()
    model.write_bytes(whole[:-40])
    with pytest.raises(IntegrityError, match="is not what was assembled"):
        deployment._bring(site.place, broken, 0, None, 60, "ann")
    rename = broken.rename(broken.parent / deployment.digest(broken)[:16])     # whoever names it anew: its package still says no
    with pytest.raises(IntegrityError, match=r"model/model.json has .* bytes"):
        deployment._bring(site.place, rename, 0, None, 60, "ann")
    assert version_at(second.door) == 2 and history(site.place)[-1]["event"] == "refused" and read_live(site.place)["release"] == second.release
    shutil.rmtree(rename)

    back = go_back(site.place, by="bob")
    assert (back.version, back.release, version_at(back.door)) == (1, first.release, 1)
    assert [(e["event"], e["version"], e["by"]) for e in history(site.place)] == [("live", 1, "ann"), ("live", 2, "ann"), ("refused", 3, "ann"), ("back", 1, "bob")]
    with pytest.raises(InputError, match="there is nothing older than release"):      # not to the second, which was left by going back
        go_back(site.place)


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.deploy import deployment
setattr(deployment, sys.argv[1], lambda *words, **more: os.kill(os.getpid(), signal.SIGKILL))
deployment._bring(Path(sys.argv[2]), Path(sys.argv[3]), 0, None, 120, "ann")
"""


@pytest.mark.parametrize("at", ["smoke", "_note"])
def test_what_a_killed_deployment_started_does_not_go_on(site: Site, at: str) -> None:
    "Killed before the switch and right after it: the next one ends whoever nobody is sent to."
    live = site.deploy(0)
    release = site.assemble(1)
    done = subprocess.run([sys.executable, "-c", KILLED, at, str(site.place), str(release)], capture_output=True, env={**os.environ, "PYTHONPATH": str(world.ROOT)})
    assert done.returncode == -9, done.stderr
    aside = json.loads((site.place / deployment.ASIDE).read_text())
    assert len(aside) == 2 and all(map(deployment._alive, aside)) and version_at(live.door) == {"smoke": 1, "_note": 2}[at]
    (site.place / "releases/.partial.1").mkdir()      # of one that was killed while it assembled
    after = site.deploy(0)
    assert not list((site.place / "releases").glob(".partial.*"))
    assert {told["pid"] for told in aside if deployment._alive(told)} == (set() if after.changed else {after.pid})
    assert version_at(after.door) == 1 and not (site.place / deployment.ASIDE).exists()


def test_a_service_that_answers_wrongly_is_not_put_live(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    live = read_live(site.place)
    if live is None:
        pytest.skip("nothing is live: the test before this one says why")
    folder = site.place / "releases" / live["release"]
    other = site.assemble(1)
    with pytest.raises(IntegrityError, match="version 1 answered, 2 was released"):
        deployment.smoke(other, live["port"])
    real = deployment.ask

    def off(*words: Any, **more: Any) -> tuple[int, str]:
        status, answer = real(*words, **more)
        told = json.loads(answer) if words[2] == "/predict" and status == 200 else None
        if told:
            told["predictions"][0]["p"]["true"] += 1e-6
        return status, json.dumps(told) if told else answer

    monkeypatch.setattr(deployment, "ask", off)
    with pytest.raises(IntegrityError, match="p_true is .* over HTTP and .* from the package"):
        deployment.smoke(folder, live["port"])
    monkeypatch.setattr(deployment, "ask", lambda *words, **more: (503, "not yet"))
    with pytest.raises(IntegrityError, match="was answered with 503, not 200"):
        deployment.smoke(folder, live["port"])


def test_places_that_cannot_be_used(site: Site, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing was ever deployed"):
        go_back(tmp_path)
    live = read_live(site.place)
    if live is not None:
        with pytest.raises(InputError, match="port 1 was asked|is at port"):
            site.deploy(0, port=1)
    (tmp_path / "log").mkdir()
    with listen("127.0.0.1", 0) as taken, pytest.raises(EnvironmentFault, match="could not be opened"):
        deployment._open_door(tmp_path, taken.getsockname()[1])
    with listen("127.0.0.1", 0) as taken, pytest.raises(EnvironmentFault, match="cannot listen on"):      # before anything is started
        deploy(tmp_path, site.packages[0], site.key, taken.getsockname()[1], program=site.program)
    with pytest.raises(InputError, match="is no release: it holds no release.json"):
        smoke(tmp_path, 1)
    assert not stop_all(tmp_path) and deployment.standing(tmp_path) is None


def test_every_kind_of_column_has_a_plain_row() -> None:
    for task in ("binary", "regression"):
        frame, contract = world.rows(task, 200), world.contract(task)
        schema = make_schema(contract, frame)
        from pipeline.deploy.rows import check_rows
        assert not check_rows([plain_row(schema)], schema, True).refused


def test_ping(site: Site) -> None:
    live = read_live(site.place)
    if live is None:
        pytest.skip("nothing is live: the first test says why")
    assert [main(["deploy", "ping", "--port", str(port)]) for port in (live["port"], 1)] == [0, 4]
    folder = str(site.place / "releases" / live["release"])
    assert main(["deploy", "smoke", folder, "--port", str(live["port"])]) == 0 and main(["deploy", "smoke", folder, "--port", "1"]) == 4


# -- infrastructure files: each rule is seen to refuse

BASE = "python:3.11-slim@sha256:" + "cd" * 32


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return write_infrastructure(Blueprint("late_flights", 3, "ab" * 32, BASE, throughput_rps=2500, rss_mb=640.5, stages=(1, 25, 100), days_per_stage=.5))


def test_files_follow_from_the_problem(files: dict[str, str]) -> None:
    import yaml

    assert inspect(files) == []
    kubernetes = {name: yaml.safe_load(text) for name, text in files.items() if "/" in name}
    steps = kubernetes["argo/rollout.yml"]["spec"]["strategy"]["canary"]["steps"]
    assert steps == [{"setWeight": 1}, {"pause": {"duration": "12h"}}, {"setWeight": 25}, {"pause": {"duration": "12h"}}, {"setWeight": 100}]
    container = kubernetes["kubernetes/deployment.yml"]["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["memory"] == "641M" and container["image"] == "late-flights:v3-abababababab"
    assert kubernetes["kubernetes/scaling.yml"]["spec"]["maxReplicas"] == 8 and "MemoryMax=641M" in files["late-flights.service"]
    phases = next(step["run"] for step in yaml.safe_load(files["ci.yml"])["jobs"]["phases"]["steps"] if step.get("name") == "phases").split()
    assert plain_run(phases[1:]) == {"problem": "params/problem.yml", "name": "ci", "changes": ["train.budget_s=20"]}, "the command knows these words"
    with pytest.raises(InputError, match="has no digest"):
        write_infrastructure(Blueprint("x", 1, "ab" * 32, "python:3.11-slim"))


BROKEN = [
    ("Dockerfile", "@sha256:" + "cd" * 32 + "\nLABEL", "\nLABEL", "base-digest"), ("Dockerfile", "USER 10001:10001\n", "", "non-root"),
    ("Dockerfile", "USER 10001:10001", "USER 0", "non-root"), ("Dockerfile", "HEALTHCHECK", "# HEALTHCHECK", "healthcheck"),
    ("Dockerfile", "COPY app ", "ADD app ", "no-add"), ("Dockerfile", "COPY app /srv/release/app", "COPY . /srv/release", "copy-named"),
    ("Dockerfile", " --require-hashes", "", "pip-hashes"), ("Dockerfile", 'ENTRYPOINT ["python", ', 'ENTRYPOINT python ["', "exec-form"),
    ("Dockerfile", "ENTRYPOINT", "# ENTRYPOINT", "entrypoint"), ("Dockerfile", "EXPOSE", "RUN curl https://x.example/get | bash\nEXPOSE", "no-piped-shell"),
    ("Dockerfile", "EXPOSE", "RUN chmod -R 777 /srv\nEXPOSE", "no-wide-rights"), ("Dockerfile", "EXPOSE", "ENV API_TOKEN=abc\nEXPOSE", "no-secrets"),
    ("compose.yml", "read_only: true", "read_only: false", "read-only"), ("compose.yml", "user: 10001:10001", "user: root", "non-root"),
    ("compose.yml", "- ALL", "- KILL", "no-capabilities"), ("compose.yml", "no-new-privileges:true", "label:x", "no-new-privileges"),
    ("compose.yml", "init: true", "privileged: true", "not-privileged"), ("compose.yml", "init: true", "network_mode: host", "not-privileged"),
    ("compose.yml", "memory: 641M", "cpus: '2'", "limits"), ("compose.yml", "127.0.0.1:${PORT", "0.0.0.0:${PORT", "loopback"),
    ("compose.yml", "init: true", "volumes: [/var/run/docker.sock:/s]", "no-docker-socket"), ("compose.yml", "${TAG:-v3-abababababab}", "latest", "fixed-image"),
    ("compose.yml", "init: true", "itin: true", "schema"), ("compose.yml", "source: tokens", "source: nothing", "secrets"), ("compose.yml", "name: late", "name: [late", "schema"),
    ("kubernetes/deployment.yml", "replicas: 4", "replicas: four", "schema"), ("kubernetes/deployment.yml", "containers:", "contaners:", "schema"),
    ("kubernetes/deployment.yml", "replicas: 4", "replicas: 1", "replicas"), ("kubernetes/deployment.yml", "maxUnavailable: 0", "maxUnavailable: 2", "no-gap"),
    ("kubernetes/deployment.yml", "automountServiceAccountToken: false", "automountServiceAccountToken: true", "no-cluster-token"),
    ("kubernetes/deployment.yml", "runAsNonRoot: true", "runAsNonRoot: false", "non-root"), ("kubernetes/deployment.yml", "type: RuntimeDefault", "type: Unconfined", "seccomp"),
    ("kubernetes/deployment.yml", "image: late-flights:v3-abababababab", "image: late-flights:latest", "fixed-image"),
    ("kubernetes/deployment.yml", "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "read-only"),
    ("kubernetes/deployment.yml", "allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true", "no-new-privileges"),
    ("kubernetes/deployment.yml", "- ALL", "- KILL", "no-capabilities"), ("kubernetes/deployment.yml", "livenessProbe:", "lifecycle:", "probes"),
    ("kubernetes/deployment.yml", "emptyDir:\n          sizeLimit: 256Mi", "hostPath:\n          path: /", "kept-apart"),
    ("kubernetes/deployment.yml", "            cpu: 500m\n", "", "limits"), ("kubernetes/deployment.yml", "imagePullPolicy: IfNotPresent", "env: [{name: DB_PASSWORD, value: x}]", "no-secrets"),
    ("kubernetes/serviceaccount.yml", "automountServiceAccountToken: false", "automountServiceAccountToken: true", "no-cluster-token"),
    ("kubernetes/network.yml", "  - Egress\n", "", "both-ways"), ("kubernetes/scaling.yml", "minReplicas: 4", "minReplicas: 9", "replicas"),
    ("kubernetes/scaling.yml", "kind: Deployment\n    name: late-flights", "kind: Deployment\n    name: latte", "target-exists"),
    ("kubernetes/service.yml", "targetPort: https", "targetPort: http", "ports-meet"), ("kubernetes/disruption.yml", "minAvailable: 1", "minAvailable: 4", "can-be-drained"),
    ("kubernetes/service.yml", "selector:\n    app.kubernetes.io/name: late-flights", "selector:\n    app.kubernetes.io/name: latte", "selects-the-pods"),
    ("argo/rollout.yml", "setWeight: 25", "setWeight: 250", "schema"), ("argo/rollout.yml", "setWeight: 100", "setWeight: 20", "stages-rise"),
    ("argo/rollout.yml", "templateName: late-flights", "templateName: latte", "analysis-exists"), ("argo/rollout.yml", "kind: Deployment\n    name: late-flights", "kind: Deployment\n    name: x", "target-exists"),
    ("argo/rollout.yml", "analysis:", "analysys:", "schema"), ("argo/analysis.yml", "- name: version\n", "- name: vision\n", "arguments"),
    ("argo/analysis.yml", "failureCondition:", "# failureCondition:", "can-be-undecided"), ("argo/analysis.yml", "address: http:", "address: ftp:", "schema"),
    ("argo/analysis.yml", "pilothouse_answers_total{", "pilothouse_answer_total{", "counted"), ("argo/analysis.yml", 'job="late-flights",', "", "own-numbers"),
    ("prometheus/alerts.yml", "record: pilothouse:up", "record: pilothouse-up", "schema"), ("prometheus/alerts.yml", "pilothouse_answers_total{", "pilothouse_answer_total{", "counted"),
    ("prometheus/alerts.yml", "severity: ticket", "severity: soon", "severity"), ("prometheus/alerts.yml", "runbook: service down", "page: none", "runbook"),
    ("prometheus/scrape.yml", "scheme: https", "scheme: http", "encrypted"), ("prometheus/scrape.yml", "credentials_file: /run", "credentials: abc #", "no-secrets"),
    ("prometheus/scrape.yml", "role: pod", "role: pad", "schema"),
    ("late-flights.service", "NoNewPrivileges=yes", "NoNewPrivileges=no", "hardened"), ("late-flights.service", "DynamicUser=yes", "User=root", "non-root"),
    ("late-flights.service", "MemoryMax=641M", "", "limits"), ("late-flights.service", "Restart=on-failure", "Restart=no", "restarts"),
    ("late-flights.service", "KillMode=mixed", "KillMode=control-group", "drains"),
    ("late-flights.service", "Environment=PYTHON", "Environment=API_TOKEN=x PYTHON", "no-secrets"), ("late-flights.service", "[Service]", "[Servant]", "schema"),
    ("deploy.sh", "set -euo pipefail", "set -e", "stops-at-errors"), ("deploy.sh", "#!/usr/bin/env bash\n", "", "shebang"), ("deploy.sh", "; fi\n", "; f\n", "syntax"),
    ("deploy.sh", 'cd "$(dirname', 'eval "$1"; cd "$(dirname', "no-piped-shell"),
    ("ci.yml", "contents: read", "contents: write", "least-rights"), ("ci.yml", "timeout-minutes: 10", "timeout-minutes: 90", "ten-minutes"),
    ("ci.yml", "pull_request: {}", "pull_request_target: {}", "no-foreign-code"), ("ci.yml", "checkout@11bd71901bbe5b1630ceea73d27597364c9af683", "checkout@v4", "pinned-actions"),
    ("ci.yml", "--to staging", "--to production", "no-promotion"), ("ci.yml", "run: make setup", "run: make setup || true", "fails-loudly"), ("ci.yml", "jobs:", "job:", "schema"),
]


def test_every_rule_is_seen_to_refuse(files: dict[str, str]) -> None:
    for name, old, new, rule in BROKEN:
        assert old in files[name], f"{name} does not hold {old!r}"
        others = ("kubernetes/deployment.yml", "argo/analysis.yml") if rule in TOGETHER else ()
        found = inspect({other: files[other] for other in others} | {name: files[name].replace(old, new, 1)})
        assert rule in {flaw.rule for flaw in found if flaw.file == name}, f"{name}: {old!r} -> {new!r} gave {found}"
    source = (world.ROOT / "pipeline/deploy/inspection.py").read_text()
    rules = set(re.findall(r'yield (?:name, )?"([a-z-]+)"', source)) | {"exposure", "syntax"}
    assert rules - {rule for *_, rule in BROKEN} <= UNSEEN, "a rule that was never seen to refuse is a hope"


TOGETHER = {"target-exists", "analysis-exists", "ports-meet", "can-be-drained", "selects-the-pods"}
UNSEEN = {"exposure", "named-callers", "stages-wait", "judged"}   # shown by the test below


def test_rules_that_need_more_than_a_word(files: dict[str, str]) -> None:
    import yaml

    def rules(name: str, change: Callable[[dict[str, Any]], Any]) -> set[str]:
        told = yaml.safe_load(files[name])
        change(told)
        return {flaw.rule for flaw in inspect({name: yaml.safe_dump(told)})}

    def canary(told: dict[str, Any]) -> dict[str, Any]:
        return told["spec"]["strategy"]["canary"]

    assert rules("kubernetes/network.yml", lambda told: told["spec"]["ingress"][0].pop("from")) == {"named-callers"}
    assert rules("argo/rollout.yml", lambda told: canary(told).update(steps=[step for step in canary(told)["steps"] if "pause" not in step])) == {"stages-wait"}
    assert rules("argo/rollout.yml", lambda told: canary(told).pop("analysis")) == {"judged"}
    if shutil.which("systemd-analyze"):
        bare = "[Service]\nExecStart=/bin/true\nDynamicUser=yes\n" + "".join(f"{k}={v}\n" for k, v in UNIT.items()) + "MemoryMax=1M\nRestart=always\nKillMode=mixed\n"
        assert {flaw.rule for flaw in inspect({"x.service": bare})} == {"exposure"}


def wealth(query: str) -> Callable[..., Any]:
    "A query of the canary's analysis as a function of what each window saw: new requests `n`, bad ones `c`; old requests `m`, bad ones `d`."
    def seen(selector: re.Match[str]) -> str:
        new, bad = 'version="3"' in selector[1], "status=" in selector[1]
        return {(True, True): "c", (False, True): "d", (True, False): "n", (False, False): "m"}[new, bad]

    text = re.sub(r"sum\(increase\(\w+\{([^}]*)\}\[\w+\]\)\)", seen, query.replace("{{args.version}}", "3"))
    text = re.sub(r"\((\w) or 0 \* \w\)", r"\1", text.split(" and (")[0])
    text = re.sub(r"\[\w+:5m\]", "", text.replace("((n + m) > 0)", "(n + m)"))
    assert set(re.findall(r"[a-z_]+", text)) <= {"c", "d", "n", "m", "exp", "ln", "sum_over_time"}, text
    return lambda **windows: eval(text, {"exp": lambda v: np.exp(np.minimum(v, 700)), "ln": np.log, "sum_over_time": lambda values: np.cumsum(values, axis=-1), **windows})  # noqa: S307


def test_argo_judges_the_canary_with_the_tests_of_the_rollout(files: dict[str, str]) -> None:
    "The same wealth as `count_errors` on the same windows; looked at a thousand times, a good canary stays and one that errs more goes."
    import yaml

    from pipeline.deploy import infrastructure
    from pipeline.rollout import sequential

    assert (infrastructure.ODDS, infrastructure.STAKED) == (sequential.ODDS, sequential.STAKED)
    metrics = {m["name"]: m for m in yaml.safe_load(files["argo/analysis.yml"])["spec"]["metrics"]}
    assert set(metrics) == set(infrastructure.TESTS) and {m["failureCondition"] for m in metrics.values()} == {"len(result) > 0 && result[0] >= 100"}
    errors, limit = (wealth(metrics[name]["provider"]["prometheus"]["query"]) for name in ("errors", "errors_max"))
    random, state = np.random.default_rng(1), sequential.Errors(.01)
    n, m = random.integers(1, 90, 40), random.integers(500, 900, 40)
    c, d = random.binomial(n, .02), random.binomial(m, .01)
    for window in zip(c.tolist(), n.tolist(), d.tolist(), m.tolist()):
        state = sequential.count_errors(state, *window)
    assert errors(n=n, m=m, c=c, d=d)[-1] == pytest.approx(sum(part * math.exp(log) for part, log in zip(sequential.STAKED, state.logs)), rel=1e-6)
    looks = (400, 1000)
    n, m, base = random.poisson(20, looks) + 1, random.poisson(400, looks) + 1, random.choice([.001, .005, .02, .2], looks)     # a load and errors that move
    d = random.binomial(m, base)
    assert (errors(n=n, m=m, c=random.binomial(n, base), d=d).max(axis=1) >= 100).mean() <= .02
    assert (errors(n=n, m=m, c=random.binomial(n, np.minimum(3 * base, 1)), d=d).max(axis=1) >= 100).mean() >= .95
    assert (limit(n=n, c=random.binomial(n, .01)).max(axis=1) >= 100).mean() <= .02 and (limit(n=n, c=random.binomial(n, .02)).max(axis=1) >= 100).mean() >= .95


def test_close_stages_and_odd_names_make_files_that_can_be_used() -> None:
    import yaml

    odd = write_infrastructure(Blueprint("2024_churn", 3, "ab" * 32, BASE, problem_file="params/my churn.yml", stages=(.2, .4, 99.8, 100)))
    assert inspect(odd) == []
    steps = yaml.safe_load(odd["argo/rollout.yml"])["spec"]["strategy"]["canary"]["steps"]
    assert [step["setWeight"] for step in steps if "setWeight" in step] == [1, 99, 100]
    assert yaml.safe_load(odd["kubernetes/service.yml"])["metadata"]["name"] == "model-2024-churn", "a service's name starts with a letter"
    assert "run 'params/my churn.yml' --run ci" in odd["ci.yml"].replace("''", "'")
    assert "ci.yml" not in write_infrastructure(Blueprint("churn", 3, "ab" * 32, BASE, problem_file=""))


DOCKER = """#!/bin/bash
echo "$*" >> "$LOG"
case "$*" in
  "info") exit "${ENGINE:-0}" ;;
  "ps "*) echo "$LIVE" ;;
  "image inspect"*) exit 1 ;;
  *"--project-name late-flights-next up"*) exit "${NEXT:-0}" ;;
  *"--project-name late-flights-next exec"*) exit "${SMOKE:-0}" ;;
  *"--project-name late-flights up"*) [ "$TAG" = "${BAD:-none}" ] && exit 1 || exit 0 ;;
esac
"""


@pytest.mark.parametrize(("seen", "code", "last"), [
    ({"LIVE": "late-flights:v3-abababababab"}, 0, "ps "), ({"ENGINE": "1"}, 4, "info"), ({"SMOKE_TOKEN": ""}, 2, "ps "), ({"SECRETS": "/nowhere"}, 2, "ps "),
    ({"LIVE": "late-flights:v2-cdcdcdcdcdcd"}, 0, "--project-name late-flights-next down"),
    ({"LIVE": "late-flights:v2-cdcdcdcdcdcd", "NEXT": "1"}, 3, "--project-name late-flights-next down"),
    ({"LIVE": "late-flights:v2-cdcdcdcdcdcd", "SMOKE": "3"}, 3, "--project-name late-flights-next down"),
    ({"LIVE": "late-flights:v2-cdcdcdcdcdcd", "BAD": "v3-abababababab"}, 3, "--project-name late-flights-next down"),
])
def test_the_script_on_a_recorded_docker(files: dict[str, str], tmp_path: Path, seen: dict[str, str], code: int, last: str) -> None:
    "There is no Docker here: a stand-in writes down what it is asked and fails where it is told to."
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/docker").write_text(DOCKER)
    (tmp_path / "bin/docker").chmod(0o755)
    (tmp_path / "deploy.sh").write_text(files["deploy.sh"])
    for name in ("tokens", "tls.crt", "tls.key"):
        (tmp_path / name).touch()
    log = tmp_path / "log"
    log.touch()
    done = subprocess.run(["bash", str(tmp_path / "deploy.sh")], capture_output=True, text=True, env={**os.environ, "SMOKE_TOKEN": "x", "SECRETS": str(tmp_path), **seen, "LOG": str(log), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
    lines = log.read_text().splitlines()
    assert done.returncode == code, done.stderr
    assert last in lines[-1], lines
    own = [line for line in lines if "--project-name late-flights up" in line]
    assert len(own) == (0 if seen.keys() & {"NEXT", "SMOKE"} or last in ("ps ", "info") else 2 if "BAD" in seen else 1), "what failed beside the old one never touches it; what failed in its place is taken back"
    if "BAD" in seen:
        assert "going back to late-flights:v2-cdcdcdcdcdcd" in done.stderr


def test_continuous_integration_cannot_promote(files: dict[str, str], site: Site, tmp_path: Path) -> None:
    "The workflow's own last step, run on a registry that holds a package of a run judged no-go: refused, and nothing moved."
    import yaml

    step = yaml.safe_load(files["ci.yml"])["jobs"]["phases"]["steps"][-1]["run"].replace("late_flights", "tiny")
    (tmp_path / "settings.ini").write_text("")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name, words in (("pilothouse", "-m pipeline"), ("python", "")):
        (tmp_path / ".venv/bin" / name).write_text(f'#!/bin/bash\nexec {sys.executable} {words} "$@"\n')
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    shutil.copytree(site.store, tmp_path / "outputs/store")
    registry = Registry(tmp_path / "outputs/store")
    registry.register(site.packages[0], "go", "tiny/ci", by="ci")
    for state in ("staging", "canary", "production"):
        registry.move("tiny", 1, state, "measured", by="ann")
    registry.register(site.packages[1], "no-go", "tiny/ci", by="ci")
    registry.register(site.packages[2], "go", "tiny/ci", by="ci")
    before = registry.entries()

    def offer(package: Path) -> subprocess.CompletedProcess[str]:
        shutil.rmtree(tmp_path / "outputs/tiny", ignore_errors=True)
        shutil.copytree(package, tmp_path / "outputs/tiny/ci/06_deploy/package")
        return subprocess.run(["bash", "-e", "-c", step], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(world.ROOT), "GITHUB_SHA": "abc123"})

    done = offer(site.packages[1])       # the run's own, though a newer one of another branch would do
    assert done.returncode == 1 and "comes from a run with the verdict no-go" in done.stderr, done.stderr
    assert registry.entries() == before and registry.holder("tiny").version == 1
    assert offer(site.packages[2]).returncode == 0 and registry.entry("tiny", 3).state == "staging"
    again = offer(site.packages[2])
    assert again.returncode == 0 and "offered before" in again.stdout and registry.entry("tiny", 3).state == "staging"
    registry.close()


HIDE = """
import sys
from importlib.metadata import packages_distributions
NAMES = {names!r} | {{"pip", "setuptools"}}
HIDDEN = {{module for module, owners in packages_distributions().items() if not {{o.lower().replace("_", "-").replace(".", "-") for o in owners}} & NAMES}} - {{"pipeline", "sitecustomize"}}
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def test_the_containers_own_commands(files: dict[str, str], site: Site, tmp_path: Path) -> None:
    "ENTRYPOINT and HEALTHCHECK of the Dockerfile, on the image's content, with the libraries of its lock alone, for other machines: tokens and TLS."
    made = site.assemble(0, tmp_path / "releases")
    names = {one.name for one in serving_lock(read_lock((world.ROOT / "requirements.lock").read_text()))}
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide/sitecustomize.py").write_text(HIDE.format(names=names))
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(secrets / "tls.key"), "-out", str(secrets / "tls.crt"),
                    "-days", "2", "-subj", "/CN=service"], check=True, capture_output=True)
    token = "0123456789abcdef0123456789abcdef"
    (secrets / "tokens").write_text(json.dumps({"sha256": hashlib.sha256(token.encode()).hexdigest(), "roles": ["operator"], "name": "smoke"}) + "\n")
    (secrets / "tokens").chmod(0o600)

    def command(word: str, port: int) -> list[str]:
        line = next(line for line in files["Dockerfile"].splitlines() if line.startswith(word))
        words = [w.replace("/srv/release", str(made)).replace("/run/secrets", str(secrets)).replace("8443", str(port)) for w in json.loads(line[line.index("["):])]
        return [sys.executable if words[0] == "python" else words[0], *words[1:]]

    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'hide'}:{made / 'app'}", "PYTHONDONTWRITEBYTECODE": "1", "SMOKE_TOKEN": token}
    port = free_port("127.0.0.1", 0)
    with (tmp_path / "said").open("wb") as said:
        service = subprocess.Popen(command("ENTRYPOINT", port), cwd=made, env=environment, stdout=subprocess.DEVNULL, stderr=said)
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and service.poll() is None and not healthy(port):
                time.sleep(.1)
            assert service.poll() is None and healthy(port), (tmp_path / "said").read_text()
            check = subprocess.run(command("HEALTHCHECK", port), cwd=made, env=environment, capture_output=True, text=True)
            assert check.returncode == 0, check.stderr
            assert smoke(made, port, token, tls=True)["answers a row"] == 200
            with pytest.raises(IntegrityError, match="GET /metrics was answered with 401"):
                smoke(made, port, None, tls=True)
        finally:
            deployment._stop(service.pid)
            service.wait()
    words = command("ENTRYPOINT", port)
    bare = subprocess.run(words[:words.index("--tokens")], cwd=made, env=environment, capture_output=True, text=True, timeout=120)
    assert bare.returncode == 3 and "without a token would let anyone ask" in bare.stderr, bare.stderr


def healthy(port: int) -> bool:
    try:
        return ask(port, "GET", "/ready", tls=True, timeout_s=20)[0] == 200
    except OSError:
        return False


def test_releases_of_long_ago_are_forgotten(tmp_path: Path) -> None:
    names = [f"{n:016d}" for n in (1, 2, 3, 4, 5, 6, 1)]
    for name in names:
        (tmp_path / "releases" / name).mkdir(parents=True, exist_ok=True)
        deployment._note(tmp_path, "live", {"name": "tiny", "version": 1, "package": ""}, tmp_path / "releases" / name, "ann")
    deployment._forget(tmp_path)
    assert sorted(p.name for p in (tmp_path / "releases").iterdir()) == [names[n] for n in (0, 2, 3, 4, 5)]
