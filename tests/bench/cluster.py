"""The same search here and on a Ray cluster of one and of two machines with a core each: the same bits, and how much sooner.

    python -m tests.bench.cluster [--rows 20000] [--budget 12] [--rounds 3]

The machines are Ray nodes on this one, so it needs as many free cores as machines; a round does all three in turn, starts and the
first imports of workers left out. Wall seconds are compared as ratios of medians; core-seconds are those that the search books.
Results go to tests/bench/results/cluster.json.
"""
from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
RESULTS = Path(__file__).parent / "results" / "cluster.json"


def made(rows: int) -> Any:
    "Ten numbers and three columns of levels; three rolling folds."
    from pipeline.train.protocol import Shape
    from pipeline.train.search import Rows

    random = np.random.default_rng(0)
    matrix = np.column_stack([random.normal(size=(rows, 10)), random.integers(0, 40, (rows, 3))])
    score = matrix[:, 0] * matrix[:, 1] + (matrix[:, 10] % 7 > 3) + 0.5 * matrix[:, 2] + random.normal(size=rows)
    ends = [rows * part // 10 for part in (4, 6, 8, 10)]
    folds = tuple((np.arange(a), np.arange(a, b)) for a, b in zip(ends, ends[1:]))
    return Rows(Shape("binary", 2, (0,) * 10 + (40,) * 3), matrix, (score > 0.5).astype(int), folds, np.arange(rows), "y")


def searched(rows: Any, budget: float, workers: Any) -> tuple[float, float, str]:
    "Wall seconds, core-seconds, and a digest of all trials and models."
    import hashlib

    from pipeline.train.budget import plan_fits
    from pipeline.train.search import Goal, run_search

    plan = plan_fits(["linear", "trees", "portfolio"], [len(t) for t, _ in rows.folds], len(rows.target), rows.shape, budget)
    begun = time.monotonic()
    found = run_search(rows, plan, Goal("roc_auc"), 1, clock=lambda: 0.0, further=True, ensemble=True, workers=workers)
    wall = time.monotonic() - begun
    bits = hashlib.sha256(found.table().write_json().encode())
    for trial in found.trials:
        for model in trial.models:
            bits.update(b"".join(content for _, content in sorted(model.to_files().items())))
    return wall, sum(t.cpu_s for t in found.trials), bits.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])   # type: ignore[union-attr]
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--budget", type=float, default=12.0, help="seconds that the plan is bought with")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray_kit import two_nodes

    from pipeline.core.cluster import connect
    from pipeline.train.workers import Cluster, Here

    rows, (nodes, _) = made(asked.rows), two_nodes()
    ray = connect(nodes.address)
    took: dict[str, list[tuple[float, float, str]]] = {"here": [], "1 machine": [], "2 machines": []}
    for turn in range(asked.rounds + 1):   # the first warms everybody
        for place, done in took.items():
            workers: Any = Here(rows) if place == "here" else Cluster(rows, address=nodes.address)
            if place == "1 machine":
                workers.room = 1           # one fit at a time: what a cluster of one core would do
            one = searched(rows, asked.budget, workers)
            if turn:
                done.append(one)
    ray.shutdown()
    nodes.shutdown()
    digests = {digest for done in took.values() for _, _, digest in done}
    assert len(digests) == 1, f"not the same bits: {digests}"
    wall = {place: statistics.median(one[0] for one in done) for place, done in took.items()}
    cpu = {place: statistics.median(one[1] for one in done) for place, done in took.items()}
    result = {"when": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), "python": platform.python_version(), "rows": asked.rows, "budget_s": asked.budget,
              "rounds": asked.rounds, "digest": digests.pop(), "load_before": os.getloadavg()[2], "cores": len(os.sched_getaffinity(0)),
              "wall_s": wall, "core_s": cpu, "times_as_fast_as_here": {place: wall["here"] / seconds for place, seconds in wall.items()}}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for place in took:
        print(f"{place:<12} {wall[place]:7.1f} s wall {cpu[place]:7.1f} core-s  {wall['here'] / wall[place]:.2f} times as fast as here, the same bits")


if __name__ == "__main__":
    main()
