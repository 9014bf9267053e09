"""From an edited feature to a tested model on flights: wall and CPU seconds of each step, everything computed anew.

    python -m tests.bench.add_feature

The clock starts when the function and its name in the problem file are written, and stops when the model that learned from it
has been judged on the holdout. No earlier output is reused.
"""
from __future__ import annotations

import datetime as dt
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).parent / "results" / "add_feature.json"
PHASES = ("01_scope", "02_data", "03_label", "04_train", "05_evaluate")
LIMIT_S = 300
FUNCTION = '''

# %% [markdown]
# Late in the day, delays of the morning have added up.

# %%
#| export
@feature(known_at=DUE, examples=[(datetime(2013, 1, 1, 17), 10.0, 120.0), (datetime(2013, 1, 1, 0, 30), 2.0, 0.0), (None, 3.0, None), (datetime(2013, 1, 1, 5), None, None)])
def day_load(scheduled_departure: pl.Expr, departures_due: pl.Expr) -> pl.Expr:
    "Departures due in this hour, times the hours since five o'clock."
    return departures_due * (scheduled_departure.dt.hour() - 5).clip(0)
'''


def edit(project: Path) -> None:
    "What a person does: one function, one word."
    notebook = project / ".text/nbs/problems/flights.py"
    text = notebook.read_text()
    at = text.index("# %% [markdown]\n# ## The schedule")
    notebook.write_text(text[:at] + FUNCTION.strip("\n") + "\n\n\n" + text[at:])
    problem = project / "params/flights.yml"
    text = problem.read_text()
    named = re.search(r"^  features: \[(.*?)\]", text, re.MULTILINE)
    changed = text.replace(named[0], f"  features: [{named[1]}, day_load]") if named else text.replace("\ndata:", "\ndata:\n  features: [day_load]", 1)
    problem.write_text(changed)


def timed(step: str, words: list[str], project: Path) -> dict[str, object]:
    "One step: seconds of wall and CPU, and how it ended."
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([sys.executable, *words], cwd=project, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if "Traceback" in done.stderr or done.returncode not in (0, 1, 5):
        raise SystemExit(f"{step} ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"step": step, "wall_s": round(time.monotonic() - began, 1), "cpu_s": round(cpu, 1), "exit_code": done.returncode}


def measure() -> dict[str, object]:
    "Edit, sync, phases one to five, in a project of its own."
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        for name in ("nbs", "pipeline", "params", "tools"):
            shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        for name in ("settings.ini", "requirements.lock", "pyproject.toml"):
            shutil.copy(ROOT / name, project)
        subprocess.run([sys.executable, "tools/house.py", "edit", "nbs/problems/flights.ipynb"], cwd=project, check=True, capture_output=True)
        load, began = os.getloadavg()[0], time.monotonic()
        edit(project)
        steps = [timed("the notebook becomes a module", ["tools/house.py", "sync", ".text/nbs/problems/flights.py"], project)]
        steps += [timed(phase, ["-m", "pipeline", "run", "params/flights.yml", "--only", phase], project) for phase in PHASES]
        wall, run = time.monotonic() - began, project / "outputs/flights/main"
        tests = {c["title"]: c["found"] for c in json.loads((run / "02_data/checks.json").read_text()) if c["title"].startswith("Feature")}
        contract = json.loads((run / "02_data/contract.json").read_text())
        assert "day_load" in contract["features"]
        claims = {c["name"]: [c["value"], c["low"], c["high"]] for c in json.loads((run / "05_evaluate/claims.json").read_text()) if c["on"] == "holdout"}
        return {"at": dt.datetime.now(dt.UTC).isoformat(timespec="minutes"), "cores": os.cpu_count(), "load_before": round(load, 2), "limit_s": LIMIT_S,
                "wall_s": round(wall, 1), "steps": steps, "checks": tests, "roc_auc": claims.get("roc_auc")}


if __name__ == "__main__":
    found = measure()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print("| step | wall s | CPU s |\n|---|---:|---:|")
    for told in found["steps"]:  # type: ignore[attr-defined]
        print(f"| {told['step']} | {told['wall_s']} | {told['cpu_s']} |")
    print(f"| from the edit to a tested model (limit {LIMIT_S}) | {found['wall_s']} | |")
