"""How often a 95 % interval holds the truth, for every metric: known worlds, a thousand samples of each.

    python -m tests.bench.intervals [WAY …] [WORLD …] [--trials 1000]     # WAY: "one model" "two models" "3 seeds" "10 seeds"

One model's metric, the difference of two models on the same rows, and the mean over training seeds, on rows that stand alone and on
rows that come in days, with many positives and with eight. Among a thousand samples a method that is exactly right is seen between
93.6 and 96.4 % of the time. What lies outside 93–97 % in the seven larger worlds is measured again on five thousand other samples.

Results go to tests/bench/results/intervals.json and are printed as a table.
"""
from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import fcntl
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import simulated  # noqa: E402
from simulated import WAYS, World, answers, binary, multiclass, of, sample  # noqa: E402

from pipeline.core.errors import InputError  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "intervals.json"
LOW, HIGH = 0.93, 0.97
DRAWS = 200   # phases make 500; fewer leave the ends less sure, and what is counted here a little lower
MAIN = {"10 seeds": ("roc_auc", "log_loss", "mae", "rmse", "ndcg")}   # ten models a sample: the metrics that rank models
rare = functools.partial(binary, spread=2.0, said=(1.2, 0.8))   # a few are positive, and ranked well
FEW = [
    World("8 positives of 300 rows", functools.partial(rare, level=-5.4), of("binary"), 300), World("15 positives of 300 rows", functools.partial(rare, level=-4.3), of("binary"), 300),
    World("15 positives in 60 days of 5 rows", functools.partial(rare, level=-4.3), of("binary"), 300, 5),
    World("four classes, the rarest 8 of 300 rows", functools.partial(multiclass, rarest=-2.5), of("multiclass"), 300),
]
WORLDS = [*simulated.WORLDS, *FEW]


@functools.cache
def truths(world: World, way: str, names: tuple[str, ...]) -> dict[str, float]:
    "The values on very many rows (and, over seeds, very many seeds)."
    rng = np.random.default_rng(2026)
    seeds, times, n = (0, 6, 240_000) if way in WAYS[:2] else (40, 10, 24_000)
    samples = (world.make(rng, n, seeds, world.size) for _ in range(times))
    found = [[answers(way, name, rows) for name in names] for rows in samples]
    return dict(zip(names, np.mean(found, axis=0).tolist()))


def names_of(world: World, way: str) -> tuple[str, ...]:
    "What is measured; the ends of a calibration error are the same with its noise and without."
    wanted = MAIN.get(way, world.metrics)
    return tuple(m for m in world.metrics if m in wanted and (m != "ece_debiased" or way == "one model"))


def measure(world: World, way: str, trials: int, names: tuple[str, ...] = (), draws: int = DRAWS, start: int = 0) -> list[dict[str, Any]]:
    "One line a metric: how often the truth lay inside, below and above the interval, and the median width."
    names = names or names_of(world, way)
    aims = truths(world, way, names_of(world, way))
    ends = np.full((trials, len(names), 2), np.nan)   # stays so where a sample does not define the metric
    for trial in range(trials):
        interval = sample(world, way, start + trial, draws)
        for place, name in enumerate(names):
            with contextlib.suppress(InputError):
                it = interval(name)
                ends[trial, place] = it.low, it.high
    lines = []
    for place, name in enumerate(names):
        low, high = ends[np.isfinite(ends[:, place, 0]), place].T
        below, above = float((aims[name] < low).mean()), float((aims[name] > high).mean())
        lines.append({"way": way, "world": world.name, "metric": name, "truth": aims[name], "trials": len(low), "inside": round(1 - below - above, 6),
                      "truth_below": below, "truth_above": above, "width": float(np.median(high - low))})
    return lines


def again(world: World, lines: list[dict[str, Any]], trials: int) -> list[dict[str, Any]]:
    "With what other samples say of those that a thousand put outside 93–97 %: of 164 counts some lie there by chance alone."
    outside = [line for line in lines if world in simulated.WORLDS and not LOW <= line["inside"] <= HIGH]
    if outside:
        found = measure(world, outside[0]["way"], trials, tuple(line["metric"] for line in outside), start=1_000_000)
        for line, other in zip(outside, found, strict=True):
            line["again"] = other
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*WAYS, *(w.name for w in WORLDS), []], metavar="WAY|WORLD")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--again", type=int, default=5000, help="samples for what lies outside 93–97 %%")
    asked = parser.parse_args()
    ways, worlds, trials = [w for w in WAYS if w in asked.what] or list(WAYS), [w for w in WORLDS if w.name in asked.what] or WORLDS, asked.trials
    lines: list[dict[str, Any]] = []
    for way in ways:
        for world in worlds:
            begun = time.process_time()
            if names_of(world, way):
                lines = keep(again(world, measure(world, way, trials), asked.again), time.process_time() - begun)
    print(told(lines))
    for line in lines:
        if other := line.get("again"):
            print(f"{line['metric']} of {line['way']}, {line['world']}: {100 * other['inside']:.1f} % of {other['trials']:,} other samples")


if __name__ == "__main__":
    main()
