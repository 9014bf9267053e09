"""The quality of a table: how quick a profile is, and how many planted faults are named.

    python -m tests.bench.quality install              # ydata-profiling in an environment of its own, under .venv-peers/
    python -m tests.bench.quality [profile] [planted] [columns]

`profile`  one million rows x 50 columns: this profile, ydata-profiling's minimal one, and the same statistics written straight in
           polars, in turn; medians of wall seconds, CPU seconds beside them
`planted`  every kind of damage planted in whole tables of ../shared/data, at three shares (outliers at a tenth of them) and with
           several seeds, in the column with most values; findings in the clean ones
`columns`  each kind of damage to a column, planted in every column of these tables that it can be done to, one by one

Results go to tests/bench/results/quality.json and are printed as tables.
"""
from __future__ import annotations

import datetime as dt
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pipeline.data.corruption import ADD_ROWS, KINDS, spoil, suitable  # noqa: E402
from pipeline.data.quality import find_faults, profile  # noqa: E402
from pipeline.data.types import Kind  # noqa: E402

PEER = ROOT / ".venv-peers/ydata/bin/python"
PACKAGES = ["ydata-profiling", "setuptools<81", "pyarrow"]
RESULTS = Path(__file__).parent / "results" / "quality.json"
ROWS, ROUNDS, PEER_ROUNDS, SEEDS, SHARES = 1_000_000, 5, 1, 2, (0.02, 0.05, 0.1)
PEER_CODE = """
import sys, time, pandas, ydata_profiling
frame = pandas.read_parquet(sys.argv[1])
wall, cpu = time.perf_counter(), time.process_time()
ydata_profiling.ProfileReport(frame, minimal=True, progress_bar=False).get_description()
print(time.perf_counter() - wall, time.process_time() - cpu, ydata_profiling.__version__)
"""


def install() -> None:
    "The peer, with its bytecode compiled."
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "-q", "--python", sys.executable, str(PEER.parents[1])], check=True)
    subprocess.run([*uv, "pip", "install", "-q", "--python", str(PEER), "--compile-bytecode", *PACKAGES], check=True)


def wide(n: int = ROWS) -> tuple[pl.DataFrame, dict[str, tuple[Kind, str]]]:
    "Fifty columns: measured and counted numbers, codes, flags, gaps."
    rng = np.random.default_rng(1)
    words = [f"level {i:04}" for i in range(1_300)]
    table = pl.DataFrame({
        **{f"measured{i}": rng.normal(size=n) for i in range(20)}, **{f"counted{i}": rng.integers(0, 10 ** (1 + i % 4), n) for i in range(12)},
        **{f"code{i}": pl.Series(rng.integers(0, 5 * 3 ** (i % 6), n)).replace_strict(list(range(1_300)), words, return_dtype=pl.String) for i in range(12)},
        **{f"flag{i}": rng.random(n) < .3 for i in range(3)}, **{f"gaps{i}": pl.Series(np.where(rng.random(n) < .2, np.nan, rng.gamma(2, size=n)), nan_to_null=True) for i in range(3)},
    })
    kinds: dict[str, tuple[Kind, str]] = {name: ("bool" if dtype == pl.Boolean else "category" if dtype == pl.String else "number", "") for name, dtype in table.schema.items()}
    return table, kinds


def straight(table: pl.DataFrame, kinds: dict[str, tuple[Kind, str]]) -> pl.DataFrame:
    "What `profile` tells, in one polars query, and the most frequent value of columns that have few."
    numbers = [name for name, (kind, _) in kinds.items() if kind == "number"]
    told = table.lazy().select(
        [pl.col(name).null_count().alias(f"{name} missing") for name in kinds] + [pl.col(name).drop_nulls().n_unique().alias(f"{name} distinct") for name in kinds]
        + [getattr(pl.col(name), stat)().alias(f"{name} {stat}") for name in numbers for stat in ("min", "median", "max")]
    ).collect()
    few = [name for name in kinds if told[f"{name} distinct"][0] <= (50 if kinds[name][0] == "number" else 1000)]
    return told.with_columns(pl.Series(f"{name} usual", [table[name].drop_nulls().value_counts(sort=True)[name][0]]) for name in few)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    "Wall and CPU seconds."
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure_profile() -> dict[str, Any]:
    "Each in turn, so that a busy minute hits all."
    table, kinds = wide()
    spent: dict[str, list[tuple[float, float]]] = {"pipeline.data.quality.profile": [], "straight polars": [], "find_faults (profile and all checks)": []}
    peer = ""
    with tempfile.TemporaryDirectory() as folder:
        table.write_parquet(f"{folder}/wide.parquet")
        for turn in range(ROUNDS):
            spent["pipeline.data.quality.profile"].append(timed(lambda: profile(table, kinds)))
            spent["straight polars"].append(timed(lambda: straight(table, kinds)))
            if turn < 2:
                spent["find_faults (profile and all checks)"].append(timed(lambda: find_faults(table, table, kinds)))
            if turn < PEER_ROUNDS and PEER.exists():
                done = subprocess.run([PEER, "-c", PEER_CODE, f"{folder}/wide.parquet"], capture_output=True, text=True, check=True).stdout.split()[-3:]
                peer = f"ydata-profiling {done[2]} (minimal)"
                spent.setdefault(peer, []).append((float(done[0]), float(done[1])))
    medians = {name: {"wall_s": round(statistics.median(w for w, _ in times), 2), "cpu_s": round(statistics.median(c for _, c in times), 2), "rounds": len(times)} for name, times in spent.items()}
    own = medians["pipeline.data.quality.profile"]
    ratios = {name: {"wall": round(m["wall_s"] / own["wall_s"], 2), "cpu": round(m["cpu_s"] / own["cpu_s"], 2)} for name, m in medians.items()}
    return {"rows": table.height, "columns": table.width, "medians": medians, "times_ours": ratios}


def measure_planted() -> dict[str, Any]:
    "Per table and share: of how many plants the fault was named on its column; and what is said of the clean table."
    from test_data_quality import CLEAN, SPOILT, TRUE, confirmed, examine, real
    from pipeline.data.types import typed

    told: dict[str, Any] = {"planted": {}, "missed": {}, "clean": {}}
    for name in CLEAN:
        table, target, task = real(name)
        findings, kinds = examine(table, target, task)
        rows = typed(table.drop(target), {})[0].select(list(kinds))
        false = [f"{row['column']}: {row['finding']}" for row in findings.iter_rows(named=True) if (row["column"], row["finding"]) not in TRUE.get(name, {}) and not confirmed(table, rows, target, row)]
        told["clean"][name] = {"findings": findings.height, "false": false}
        if name not in SPOILT:
            continue
        before = {(row["column"], row["finding"]): 0 for row in findings.iter_rows(named=True)}
        for row in findings.iter_rows(named=True):
            before[row["column"], row["finding"]] += row["rows"]
        for share in SHARES:
            named, done = 0, 0
            for seed in range(SEEDS):
                rng = np.random.default_rng(seed)
                for kind, finding in KINDS.items():
                    spoilt = spoil(table, kind, share / 10 if kind == "outliers" else share, kinds, target, rng)
                    if spoilt is None:
                        continue
                    there = examine(spoilt.frame, target, task)[0].filter((pl.col("column") == spoilt.columns[0]) & (pl.col("finding") == finding))
                    found = there["rows"].sum() > 1.15 * before.get((spoilt.columns[0], finding), 0)
                    done, named = done + 1, named + bool(found)
                    if not found:
                        told["missed"].setdefault(f"{name} {share:.0%}", []).append(kind)
            told["planted"][f"{name} {share:.0%}"] = {"kinds": done // SEEDS, "planted": done, "named": named}
            print(name, share, named, "of", done, sorted(set(told["missed"].get(f"{name} {share:.0%}", []))), flush=True)
    return told


def measure_columns() -> dict[str, Any]:
    "Of all columns that a kind of damage can be done to, how many it is named in at a tenth of the cells (outliers: one in a hundred)."
    from test_data_quality import SPOILT, real
    from pipeline.data.types import typed

    told: dict[str, Any] = {}
    for kind, finding in KINDS.items():
        if kind in ADD_ROWS or kind in ("label noise", "class imbalance"):
            continue
        done, missed = 0, []
        for name in SPOILT:
            table, target, _ = real(name)
            kinds = typed(table.drop(target), {})[1]
            for column in suitable(kind, table, kinds):
                spoilt = spoil(table.select(column, target), kind, .01 if kind == "outliers" else .1, kinds, target, np.random.default_rng(1), [column])
                alone = spoilt.frame.select(column)  # type: ignore[union-attr]
                rows, found, _ = typed(alone, {})
                done += 1
                missed += [] if finding in find_faults(alone, rows, found)["finding"] else [f"{name}.{column}"]
        told[kind] = {"columns": done, "named": done - len(missed), "missed": missed}
    return {"kinds": told}


def main(asked: list[str]) -> None:
    if asked == ["install"]:
        return install()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for what, work in (("profile", measure_profile), ("planted", measure_planted), ("columns", measure_columns)):
        if not asked or what in asked:
            kept[what] = {"at": dt.datetime.now(dt.UTC).isoformat(timespec="minutes"), "cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2), "polars": pl.__version__, **work()}
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    if "profile" in kept:
        print("| 1,000,000 rows x 50 columns | wall s | CPU s | times ours, wall | CPU |\n|---|---:|---:|---:|---:|")
        for name, m in kept["profile"]["medians"].items():
            print(f"| {name} | {m['wall_s']} | {m['cpu_s']} | {kept['profile']['times_ours'][name]['wall']} | {kept['profile']['times_ours'][name]['cpu']} |")
    if "planted" in kept:
        print("\n| table, share damaged | planted | named | missed |\n|---|---:|---:|---|")
        for name, m in kept["planted"]["planted"].items():
            missed = kept["planted"]["missed"].get(name, [])
            print(f"| {name} | {m['planted']} | {m['named']} | {', '.join(f'{kind} ({missed.count(kind)})' for kind in sorted(set(missed)))} |")
        print("\n| clean table | findings | false |\n|---|---:|---|")
        for name, m in kept["planted"]["clean"].items():
            print(f"| {name} | {m['findings']} | {'; '.join(m['false'])} |")
    if "columns" in kept:
        print("\n| damage to one column | columns | named | missed |\n|---|---:|---:|---|")
        for name, m in kept["columns"]["kinds"].items():
            print(f"| {name} | {m['columns']} | {m['named']} | {', '.join(m['missed'])} |")


if __name__ == "__main__":
    main(sys.argv[1:])
