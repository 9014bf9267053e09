"""The embedded example from empty outputs to its verdict: wall and CPU seconds, peak memory of all processes together.

    python -m tests.bench.flights
"""
from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).parent / "results" / "flights.json"


def sample(process: psutil.Process) -> float:
    "Megabytes that a process and everything it started hold now, shared pages counted once a process."
    total = 0.0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            continue
    return total


def measure() -> dict[str, object]:
    "One run in a project of its own."
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        for name in ("nbs/phases", "params"):
            shutil.copytree(ROOT / name, project / name)
        for name in ("settings.ini", "requirements.lock"):
            shutil.copy(ROOT / name, project)
        load, began, peak = os.getloadavg()[0], time.monotonic(), 0.0
        runner = subprocess.Popen([sys.executable, "-m", "pipeline", "run", "params/flights.yml"], cwd=project, stdout=subprocess.DEVNULL)
        watched = psutil.Process(runner.pid)
        while runner.poll() is None:
            try:
                peak = max(peak, sample(watched))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.25)
        code, wall = runner.wait(), time.monotonic() - began
        phases = json.loads((project / "outputs/flights/main/manifest.json").read_text())["phases"]
        return {
            "at": dt.datetime.now(dt.UTC).isoformat(timespec="minutes"), "cores": os.cpu_count(), "load_before": round(load, 2), "exit_code": code,
            "wall_s": round(wall, 1), "peak_mb": round(peak), "cpu_s": round(sum(p["cpu_s"] for p in phases.values()), 1),
            "phases": {name: {k: p[k] for k in ("wall_s", "cpu_s", "peak_rss_mb")} for name, p in phases.items()},
        }


if __name__ == "__main__":
    found = measure()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print("| phase | wall s | CPU s | peak MB |\n|---|---:|---:|---:|")
    for name, told in found["phases"].items():  # type: ignore[attr-defined]
        print(f"| {name} | {told['wall_s']:.1f} | {told['cpu_s']:.1f} | {told['peak_rss_mb']:.0f} |")
    print(f"| all, from empty outputs to the verdict | {found['wall_s']} | {found['cpu_s']} | {found['peak_mb']} |")
