"""Eight trivial phases in a chain: this command beside stock papermill, kedro, snakemake, dvc, ploomber and dagstermill.

    python -m tests.bench.orchestration install            # each peer in an environment of its own under .venv-peers/
    python -m tests.bench.orchestration [chain] [imports] [wide] [kills] [--rounds 5]

`chain`    from nothing, nothing changed, and one parameter that only the last two phases read
`imports`  eight phases that import polars, lightgbm, torch, lightning and wandb
`wide`     eight phases side by side, 500 in all
`kills`    fifty kill -9 of runner or kernels at random moments

Every tool does the same work: read a JSON number, add one, write it. Tools take turns, so that a busy minute hits all
of them; medians are shown, CPU seconds (of the tool and every process it waited for) beside wall seconds. Results go
to tests/bench/results/orchestration.json and are printed as a table.
"""
from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from engine_project import SPEC, cell, write_project, write_wave  # noqa: E402

PEERS = ROOT / ".venv-peers"
RESULTS = Path(__file__).parent / "results" / "orchestration.json"
PACKAGES = {
    "papermill": ["papermill==2.7.0", "ipykernel"], "kedro": ["kedro", "papermill", "ipykernel"], "snakemake": ["snakemake", "papermill", "ipykernel"],
    "dvc": ["dvc", "papermill", "ipykernel"], "ploomber": ["ploomber", "papermill", "ipykernel", "nbconvert"],
    "dagstermill": ["dagstermill", "dagster", "papermill", "ipykernel"],
}
NUMBERS = range(1, 9)
HEAVY = ("polars", "lightgbm", "torch", "pytorch_lightning", "wandb")


# -- the same work for every tool


def plain_notebook(path: Path, *imports: str, tagged: bool = True) -> None:
    "Parameters, imports, read, add, write."
    sources = ['source = ""\ntarget = "out.json"\nbudget = 60', *[f"import {name}" for name in imports], "import json",
               'value = json.load(open(source))["value"] if source else 0', "value += 1", 'json.dump({"value": value, "budget": budget}, open(target, "w"))', "value"]
    cells = [cell(sources[0], *(["parameters"] if tagged else []))] + [cell(s, number=i) for i, s in enumerate(sources[1:], 1)]
    path.write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": SPEC}, "nbformat": 4, "nbformat_minor": 5}))


def plain_chain(folder: Path, *imports: str) -> None:
    (folder / "out").mkdir(parents=True)
    for i in NUMBERS:
        plain_notebook(folder / f"p{i}.ipynb", *imports)


def given(i: int, budget: str = "60") -> dict[str, str]:
    "Parameters of one link; only the last two are given the budget."
    return {"source": f"out/{i - 1}.json" if i > 1 else "", "target": f"out/{i}.json", **({"budget": budget} if i > 6 else {})}


# -- tools


@dataclass
class Tool:
    "How a tool is set up, run, and told of a changed parameter."

    name: str
    setup: Callable[[Path], None]
    command: Callable[[Path], list[str]]
    change: Callable[[Path], None] | None = None   # changes what only the last two phases read
    incremental: bool = True
    imports: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def python(peer: str) -> str:
    return str(PEERS / peer / "bin" / "python")


def ours(imports: tuple[str, ...] = ()) -> Tool:
    def setup(folder: Path) -> None:
        write_project(folder, work="\n".join(f"import {name}" for name in imports) or "pass")

    def change(folder: Path) -> None:
        file = folder / "params" / "tiny.yml"
        file.write_text(file.read_text().replace("budget_s: 60", "budget_s: 120"))

    return Tool("pilothouse", setup, lambda f: [sys.executable, "-m", "pipeline", "run", "tiny"], change, imports=imports, environment={"PYTHONPATH": str(ROOT)})


def papermill_api(imports: tuple[str, ...] = ()) -> Tool:
    "One process, eight calls of papermill.execute_notebook: what a script of one's own would do."
    def setup(folder: Path) -> None:
        plain_chain(folder, *imports)
        calls = "\n".join(f"pm.execute_notebook('p{i}.ipynb', 'out/{i}.ipynb', {given(i)!r}, progress_bar=False)" for i in NUMBERS)
        (folder / "chain.py").write_text(f"import papermill as pm\n{calls}\n")

    interpreter = sys.executable if imports else python("papermill")   # the heavy libraries are only here
    return Tool("papermill API", setup, lambda f: [interpreter, "chain.py"], incremental=False, imports=imports)


def papermill_same() -> Tool:
    "Our very notebooks, with their receipts, through papermill's API."
    def setup(folder: Path) -> None:
        write_project(folder)
        calls = "\n".join(f"pm.execute_notebook('nbs/phases/{i:02}_p{i}.ipynb', 'out{i}.ipynb', progress_bar=False)" for i in NUMBERS)
        (folder / "chain.py").write_text(f"import papermill as pm\n{calls}\n")

    return Tool("papermill API, our notebooks", setup, lambda f: [sys.executable, "chain.py"], incremental=False, environment={"PYTHONPATH": str(ROOT)})


def papermill_line(peer: str, i: int, budget: str = "60") -> str:
    words = " ".join(f"-p {k} '{v}'" for k, v in given(i, budget).items())
    return f"{python(peer)} -m papermill p{i}.ipynb out/{i}.ipynb {words} --no-progress-bar"


def papermill_cli() -> Tool:
    def setup(folder: Path) -> None:
        plain_chain(folder)
        (folder / "chain.sh").write_text("set -e\n" + "\n".join(papermill_line("papermill", i) for i in NUMBERS) + "\n")

    return Tool("papermill CLI", setup, lambda f: ["sh", "chain.sh"], incremental=False)


def dvc() -> Tool:
    def write(folder: Path, budget: str) -> None:
        stages = {f"p{i}": {"cmd": papermill_line("dvc", i, "${budget}" if i > 6 else "60"), "deps": [f"p{i}.ipynb", *([f"out/{i - 1}.json"] if i > 1 else [])],
                            **({"params": ["budget"]} if i > 6 else {}), "outs": [f"out/{i}.json"]} for i in NUMBERS}
        (folder / "dvc.yaml").write_text(json.dumps({"stages": stages}))
        (folder / "params.yaml").write_text(f"budget: {budget}\n")

    def setup(folder: Path) -> None:
        plain_chain(folder)
        write(folder, "60")
        subprocess.run([python("dvc"), "-m", "dvc", "init", "--no-scm", "-q"], cwd=folder, check=True, capture_output=True)

    return Tool("dvc repro", setup, lambda f: [python("dvc"), "-m", "dvc", "repro", "-q"],
                lambda f: (f / "params.yaml").write_text("budget: 120\n") and None, environment={"DVC_NO_ANALYTICS": "1"})


def snakemake() -> Tool:
    def write(folder: Path, budget: str) -> None:
        rules = ["rule all:\n    input: 'out/8.json'\n"]
        for i in NUMBERS:
            source = f"        'out/{i - 1}.json',\n" if i > 1 else ""
            params = f"    params: budget={budget}\n" if i > 6 else ""
            line = papermill_line("snakemake", i, "{params.budget}" if i > 6 else "60").replace('"', '\\"')
            rules.append(f"rule p{i}:\n    input:\n        'p{i}.ipynb',\n{source}    output: 'out/{i}.json'\n{params}    shell: \"{line}\"\n")
        (folder / "Snakefile").write_text("\n".join(rules))

    def setup(folder: Path) -> None:
        plain_chain(folder)
        write(folder, "60")

    return Tool("snakemake", setup, lambda f: [python("snakemake"), "-m", "snakemake", "--cores", "1", "-q"], lambda f: write(f, "120"))


def kedro() -> Tool:
    "Nodes that call papermill's API; kedro skips a node only when its output exists."
    def setup(folder: Path) -> None:
        plain_chain(folder)
        package = folder / "src" / "chain"
        package.mkdir(parents=True)
        (folder / "conf" / "base").mkdir(parents=True)
        (folder / "conf" / "local").mkdir(parents=True)
        (folder / "pyproject.toml").write_text('[tool.kedro]\npackage_name = "chain"\nproject_name = "chain"\nkedro_init_version = "KEDRO"\nsource_dir = "src"\n'.replace("KEDRO", version("kedro", "kedro")))
        (package / "__init__.py").write_text("")
        (package / "settings.py").write_text("")
        (folder / "conf" / "base" / "catalog.yml").write_text("")
        links = {i: given(i) for i in NUMBERS}
        (package / "pipeline_registry.py").write_text(
            f"import papermill as pm\nfrom kedro.pipeline import node, pipeline\nLINKS = {links!r}\n"
            "def link(i):\n    def run(*before):\n        pm.execute_notebook(f'p{i}.ipynb', f'out/{i}.ipynb', LINKS[i], progress_bar=False)\n        return i\n    run.__name__ = f'p{i}'\n    return run\n"
            "def register_pipelines():\n    return {'__default__': pipeline([node(link(i), [f'v{i-1}'] if i > 1 else None, f'v{i}', name=f'p{i}') for i in LINKS])}\n")

    return Tool("kedro run", setup, lambda f: [python("kedro"), "-m", "kedro", "run"], incremental=False, environment={"KEDRO_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"})


def ploomber() -> Tool:
    def notebook(folder: Path, i: int) -> None:
        upstream = f"['p{i - 1}']" if i > 1 else "None"
        read = f"json.load(open(upstream['p{i - 1}']['data']))['value']" if i > 1 else "0"
        sources = [f"upstream = {upstream}\nproduct = None" + ("\nbudget = None" if i > 6 else ""), "import json", f"value = {read}", "value += 1",
                   "json.dump({'value': value}, open(product['data'], 'w'))", "value"]
        cells = [cell(sources[0], "parameters")] + [cell(s, number=n) for n, s in enumerate(sources[1:], 1)]
        (folder / f"p{i}.ipynb").write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": SPEC}, "nbformat": 4, "nbformat_minor": 5}))

    def write(folder: Path, budget: int) -> None:
        tasks = [{"source": f"p{i}.ipynb", "name": f"p{i}", "product": {"nb": f"out/{i}.ipynb", "data": f"out/{i}.json"}, **({"params": {"budget": budget}} if i > 6 else {})} for i in NUMBERS]
        (folder / "pipeline.yaml").write_text(json.dumps({"tasks": tasks}))

    def setup(folder: Path) -> None:
        (folder / "out").mkdir(parents=True)
        for i in NUMBERS:
            notebook(folder, i)
        write(folder, 60)

    return Tool("ploomber build", setup, lambda f: [str(PEERS / "ploomber/bin/ploomber"), "build"], lambda f: write(f, 120), environment={"PLOOMBER_STATS_ENABLED": "false"})


def dagstermill() -> Tool:
    def setup(folder: Path) -> None:
        plain_chain(folder)
        (folder / "home").mkdir()
        for i in NUMBERS:   # dagstermill injects its own parameters; the link reads its place from the cell
            plain_notebook(folder / f"p{i}.ipynb")
            content = json.loads((folder / f"p{i}.ipynb").read_text())
            content["cells"][1:1] = [cell("\n".join(f"{k} = {v!r}" for k, v in {"budget": "60", **given(i)}.items()), number=90)]
            (folder / f"p{i}.ipynb").write_text(json.dumps(content))
        (folder / "jobs.py").write_text(
            "from dagster import In, Nothing, Out, fs_io_manager, job\nfrom dagstermill import ConfigurableLocalOutputNotebookIOManager, define_dagstermill_op\n"
            "ops = {i: define_dagstermill_op(f'p{i}', f'p{i}.ipynb', output_notebook_name=f'nb{i}', ins={'after': In(Nothing)} if i > 1 else {}) for i in range(1, 9)}\n"
            "@job(resource_defs={'output_notebook_io_manager': ConfigurableLocalOutputNotebookIOManager(), 'io_manager': fs_io_manager})\n"
            "def chain():\n    before = None\n    for i in range(1, 9):\n        before = ops[i]() if before is None else ops[i](after=before)\n")

    return Tool("dagstermill", setup, lambda f: [python("dagstermill"), "-m", "dagster", "job", "execute", "-f", "jobs.py", "-j", "chain"], incremental=False,
                environment={"DAGSTER_DISABLE_TELEMETRY": "1"})


# -- measuring


@dataclass
class Spent:
    wall_s: float
    cpu_s: float


def run(tool: Tool, folder: Path) -> Spent:
    "One run to its end; raises with the tool's last words when it fails."
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}   # everyone may keep bytecode
    environment = {**environment, **tool.environment, "DAGSTER_HOME": str(folder / "home")}
    if tool.name not in ("pilothouse", "papermill API, our notebooks"):
        environment["PATH"] = f"{PEERS / tool.name.split()[0]}/bin:{environment['PATH']}"
    with (folder / ".said").open("wb") as said:
        began = time.monotonic()
        process = subprocess.Popen(tool.command(folder), cwd=folder, env=environment, stdout=said, stderr=said, stdin=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{tool.name}: exit code {process.returncode}: {(folder / '.said').read_text(errors='replace')[-600:]}")
    return Spent(wall, usage.ru_utime + usage.ru_stime)


def version(peer: str, package: str) -> str:
    interpreter = python(peer) if peer else sys.executable
    done = subprocess.run([interpreter, "-c", f"from importlib.metadata import version; print(version('{package}'))"], capture_output=True, text=True)
    return done.stdout.strip()


def _add(found: dict[str, dict[str, list[Spent]]], tool: Tool, what: str, folder: Path) -> None:
    spent = run(tool, folder)
    found[tool.name].setdefault(what, []).append(spent)


def take_turns(tools: list[Tool], rounds: int) -> dict[str, dict[str, list[Spent]]]:
    "Cold, nothing changed, last two changed; every tool once a round."
    found: dict[str, dict[str, list[Spent]]] = {t.name: {} for t in tools}
    broken: set[str] = set()
    for number in range(rounds):
        for tool in tools:
            if tool.name in broken:
                continue
            folder = Path(tempfile.mkdtemp(prefix="bench-")) / "work"
            try:
                tool.setup(folder)
                _add(found, tool, "cold", folder)
                if tool.incremental:
                    time.sleep(2.1)   # past the age at which digests are remembered; dvc and snakemake look at whole seconds
                    run(tool, folder)
                    _add(found, tool, "nothing changed", folder)
                    if tool.change:
                        tool.change(folder)
                        _add(found, tool, "last two changed", folder)
            except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
                broken.add(tool.name)
                print(f"{tool.name} dropped out: {str(error)[-700:]}", file=sys.stderr)
            finally:
                shutil.rmtree(folder.parent, ignore_errors=True)
            print(f"round {number + 1}: {tool.name} {({k: round(v[-1].wall_s, 2) for k, v in found[tool.name].items() if v})}", file=sys.stderr, flush=True)
    return found


def table(found: dict[str, dict[str, list[Spent]]], base: str = "papermill API") -> str:
    "Medians as a markdown table, with each tool's cold wall time against the base."
    columns = [c for c in ("cold", "nothing changed", "last two changed") if any(c in f for f in found.values())]
    lines = ["| tool | " + " | ".join(f"{c}: wall s (CPU s)" for c in columns) + f" | cold wall against {base} |", "|---" * (len(columns) + 2) + "|"]
    reference = statistics.median(s.wall_s for s in found[base]["cold"]) if found.get(base, {}).get("cold") else None
    for name, parts in found.items():
        shown = [f"{statistics.median(s.wall_s for s in parts[c]):.2f} ({statistics.median(s.cpu_s for s in parts[c]):.2f})" if c in parts else "–" for c in columns]
        ratio = f"{statistics.median(s.wall_s for s in parts['cold']) / reference:.2f}" if reference and parts.get("cold") else "–"
        lines.append(f"| {name} | {' | '.join(shown)} | {ratio} |")
    return "\n".join(lines)


def installed(tools: list[Tool]) -> list[Tool]:
    "Those whose environment exists."
    return [t for t in tools if t.name.startswith("pilothouse") or t.name.endswith("our notebooks") or t.imports or (PEERS / t.name.split()[0] / "bin/python").exists()]


def chain(rounds: int) -> dict[str, dict[str, list[Spent]]]:
    return take_turns(installed([ours(), papermill_api(), papermill_same(), papermill_cli(), kedro(), snakemake(), dvc(), ploomber(), dagstermill()]), rounds)


def imports(rounds: int) -> dict[str, dict[str, list[Spent]]]:
    tools = [ours(HEAVY), papermill_api(HEAVY)]
    for tool in tools:
        tool.incremental = False
    return take_turns(tools, rounds)


def wide(phases: int = 500) -> dict[str, int]:
    "Eight phases of one number, again and again; how many did not finish."
    done = failed = 0
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    write_wave(folder / "work", 8)
    while done + failed < phases:
        said = subprocess.run([sys.executable, "-m", "pipeline", "run", "tiny", "--jobs", "8", "--refresh", "--json"], cwd=folder / "work", capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
        told = [json.loads(line)["event"] for line in said.stdout.splitlines() if line.startswith("{")]
        finished = told.count("phase_finished")
        done, failed = done + finished, failed + (8 - finished)
        print(f"wide: {done} done, {failed} failed", file=sys.stderr, flush=True)
    shutil.rmtree(folder)
    return {"phases": done + failed, "failed": failed}


def kills(trials: int = 50) -> dict[str, int]:
    "As tests/test_faults_engine.py does it, fifty times."
    from test_faults_engine import SLOW, kill_trial

    chance, resumed, faults = random.Random(50), 0, []
    for trial in range(trials):
        folder = Path(tempfile.mkdtemp(prefix="bench-"))
        root = write_project(folder / "work", phases=4, leaves=(4,), work=SLOW)
        try:
            kill_trial(root, ("runner", "kernel")[trial % 2], chance.uniform(.1, 3.5))
            resumed += 1
        except AssertionError as error:
            faults.append(str(error)[:300])
        shutil.rmtree(folder, ignore_errors=True)
        print(f"kills: {resumed} of {trial + 1} resumed", file=sys.stderr, flush=True)
    for fault in faults:
        print(fault, file=sys.stderr)
    return {"trials": trials, "resumed": resumed}


def install() -> None:
    "Each peer in an environment of its own, with bytecode compiled, as this project's setup does for itself."
    for name, packages in PACKAGES.items():
        place = PEERS / name
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "-q", "--python", sys.executable, str(place)], check=True)
        done = subprocess.run([*uv, "pip", "install", "-q", "--python", python(name), "--compile-bytecode", *packages])
        print(f"{name}: {'installed' if done.returncode == 0 else 'does not install'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["chain"], choices=["install", "chain", "imports", "wide", "kills"])
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    if "install" in asked.what:
        install()
        return
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept["machine"] = {"cores": len(os.sched_getaffinity(0)), "python": sys.version.split()[0]}
    kept["versions"] = {p: version(p, p) for p in PACKAGES if (PEERS / p / "bin/python").exists()}
    for what in asked.what:
        found = {"chain": chain, "imports": imports}[what](asked.rounds) if what in ("chain", "imports") else {"wide": wide, "kills": kills}[what]()
        at = dt.datetime.now(dt.UTC).isoformat(timespec="minutes")
        if what in ("chain", "imports"):
            print(f"\n{what}, {at}, medians of {asked.rounds}, load {os.getloadavg()[0]:.1f}\n\n{table(found)}\n")
            kept[what] = {"at": at, "rounds": asked.rounds, "load": os.getloadavg()[0], "tools": {n: {k: [vars(s) for s in v] for k, v in f.items()} for n, f in found.items()}, "table": table(found)}
        else:
            print(f"\n{what}, {at}: {found}\n")
            kept[what] = {"at": at, **found}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
