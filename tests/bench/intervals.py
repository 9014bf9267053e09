"""How often a 95 % interval holds the truth, for every metric: known worlds, a thousand samples of each.

    python -m tests.bench.intervals [WAY …] [WORLD …] [--trials 1000]     # WAY: "one model" "two models" "3 seeds" "10 seeds"

One model's metric, the difference of two models on the same rows, and the mean over training seeds, on rows that stand alone and on
rows that come in days. Among a thousand samples a method that is exactly right is seen between 93.6 and 96.4 % of the time.

Results go to tests/bench/results/intervals.json and are printed as a table.
"""
from __future__ import annotations

import datetime as dt
import fcntl
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from simulated import WAYS, WORLDS, World, held, truth  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "intervals.json"
DRAWS = 200   # phases make 500; fewer leave the ends less sure, and what is counted here a little lower
MAIN = {"10 seeds": ("roc_auc", "log_loss", "mae", "rmse", "ndcg")}   # ten models a sample: the metrics that rank models


def measure(world: World, way: str, trials: int) -> list[dict[str, Any]]:
    "One line a metric."
    lines = []
    for name in world.metrics:
        if name in MAIN.get(way, world.metrics):
            inside, below, above, width = held(world, way, name, trials, DRAWS)
            lines.append({"way": way, "world": world.name, "metric": name, "truth": truth(world, way, name), "trials": trials,
                          "inside": inside, "truth_below": below, "truth_above": above, "width": width})
    return lines


def keep(lines: list[dict[str, Any]], cpu_s: float) -> list[dict[str, Any]]:
    "Into the results file, in place of earlier lines of the same kind."
    with RESULTS.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = json.loads(RESULTS.read_text())["lines"] if RESULTS.exists() else []
        fresh = {(line["way"], line["world"]) for line in lines}
        kept = [line for line in kept if (line["way"], line["world"]) not in fresh] + lines
        kept.sort(key=lambda line: (WAYS.index(line["way"]), [w.name for w in WORLDS].index(line["world"])))
        RESULTS.write_text(json.dumps({"at": dt.datetime.now(dt.UTC).isoformat(timespec="minutes"), "cores": os.cpu_count(), "numpy": np.__version__,
                                       "draws": DRAWS, "level": 0.95, "last_cpu_s": round(cpu_s, 1), "lines": kept}, indent=1) + "\n")
    RESULTS.with_suffix(".lock").unlink(missing_ok=True)
    return kept


def told(lines: list[dict[str, Any]]) -> str:
    "A table: metrics down, worlds across, the share of intervals that hold the truth."
    rows = []
    for way in [w for w in WAYS if any(line["way"] == w for line in lines)]:
        mine = [line for line in lines if line["way"] == way]
        worlds = list(dict.fromkeys(line["world"] for line in mine))
        rows += [f"\n{way}\n", "| metric | " + " | ".join(worlds) + " |", "|---" * (len(worlds) + 1) + "|"]
        for name in dict.fromkeys(line["metric"] for line in mine):
            found = {line["world"]: line["inside"] for line in mine if line["metric"] == name}
            rows.append(f"| {name} | " + " | ".join(f"{100 * found[w]:.1f}" if w in found else "" for w in worlds) + " |")
    return "\n".join(rows)


def main() -> None:
    trials = int(sys.argv[sys.argv.index("--trials") + 1]) if "--trials" in sys.argv else 1000
    ways = [a for a in sys.argv[1:] if a in WAYS] or list(WAYS)
    worlds = [w for w in WORLDS if w.name in sys.argv[1:]] or WORLDS
    lines: list[dict[str, Any]] = []
    for way in ways:
        for world in worlds:
            begun = time.process_time()
            if found := measure(world, way, trials):
                lines = keep(found, time.process_time() - begun)
    print(told(lines))


if __name__ == "__main__":
    main()
