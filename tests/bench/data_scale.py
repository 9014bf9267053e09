"""What a table costs that does not fit: 10⁵ to 2·10⁷ rows of 20 columns, named, kept, split, profiled and checked; and one commit of 10,000 rows.

    python -m tests.bench.data_scale [--rows 100000,1000000,4000000,20000000] [--folder DIR]

Each size runs in a process of its own, whose peak memory the kernel counts. The exponent is the slope of log CPU
seconds over log rows. A commit is compared with writing the same frame with the same checksums as a parquet file.
Results go to tests/bench/results/data_scale.json and are printed as a table.
"""
from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
RESULTS = Path(__file__).parent / "results" / "data_scale.json"
PROBLEM = """
problem: {name: wide_and_long, statement: "Is the parcel late?", kpi: {name: late parcels, baseline: 20, target: 15, unit: "%"}, task: binary, target: late}
data: {sources: [{name: parcels, kind: parquet, path: parcels.parquet, licence: own}], time: sent}
train: {rows_max: 1000000}
"""


def batch(first: int, rows: int) -> pl.DataFrame:
    "Twenty columns as people have them: numbers, a few texts, gaps, a time that rises."
    rng = np.random.default_rng(first + 1)
    numbers = {f"x{i}": rng.normal(size=rows) for i in range(8)} | {f"n{i}": rng.integers(0, 10 ** (i + 1), rows) for i in range(5)}
    texts = {f"c{i}": pl.Series(np.array([f"level {k}" for k in range(levels)])[rng.integers(0, levels, rows)]) for i, levels in enumerate((3, 40, 500, 20_000))}
    sent = np.datetime64("2015-01-01", "us") + ((first + np.arange(rows)) * 7_000_000).astype("timedelta64[us]")
    frame = pl.DataFrame({**numbers, **texts, "sent": sent, "gift": rng.random(rows) < 0.1, "late": np.where(rng.random(rows) < 0.2, "yes", "no")})
    return frame.with_columns(pl.when(pl.col("x1") > 1.2).then(None).otherwise(pl.col("x1")).alias("x1"), pl.when(pl.col("n1") > 90).then(None).otherwise(pl.col("c1")).alias("c1"))


def write(path: Path, rows: int) -> None:
    "A parquet file, batch by batch."
    import pyarrow.parquet as pq

    writer = None
    for first in range(0, rows, 500_000):
        table = batch(first, min(500_000, rows - first)).to_arrow(compat_level=pl.CompatLevel.oldest())
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    assert writer is not None
    writer.close()


def peak_mb() -> float:
    "The most that this process held so far; unlike `ru_maxrss`, which an exec'd child takes over from the process that started it."
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")) / 1024


def stream(path: Path, store: Path) -> dict[str, Any]:
    "The streamed data phase; run in a process of its own."
    from pipeline.core.problem import parse_problem, read_yaml
    from pipeline.data.contract import hold, learn, read_as_declared, target_in, target_of
    from pipeline.data.sources import prepare
    from pipeline.data.splits import take_apart
    from pipeline.data.streams import take_in
    from pipeline.data.survey import check_whole, profile_whole, survey_whole, widen
    from pipeline.data.whole import count_parts, keep_whole, number_rows, prove_whole, share_copied, split_whole

    stages: list[dict[str, Any]] = []
    told: list[tuple[str, int, int]] = []
    problem = parse_problem(*read_yaml(PROBLEM, "bench.yml"), "bench.yml")

    def staged(name: str, since: tuple[float, float]) -> tuple[float, float]:
        now = time.perf_counter(), time.process_time()
        stages.append({"stage": name, "wall_s": round(now[0] - since[0], 2), "cpu_s": round(now[1] - since[1], 2),
                       "peak_mb": round(peak_mb())})
        return now

    def tell(doing: str, done: int, total: int) -> None:
        told.append((doing, done, total))

    mark = begun = time.perf_counter(), time.process_time()
    taken = take_in(problem, {"parcels": path}, np.random.default_rng(1), prepare, 0, tell)
    mark = staged("draw the sample", mark)
    rows, kinds, unusable = read_as_declared(taken.frame, problem)
    target = target_of(rows, problem)
    whole = keep_whole(store, problem, rows.with_columns(target.values), kinds, target, taken, tell=tell)
    mark = staged("convert, hash, keep the version", mark)
    parts, whole = split_whole(take_apart(rows, target, problem, np.random.default_rng(2)), problem, whole)
    mark = staged("split", mark)
    assert prove_whole(parts, problem, whole)["kept"].all() and share_copied(parts, whole) == 0
    mark = staged("prove the split", mark)
    contract = learn(parts.train, kinds, target, problem, unusable)
    survey = survey_whole(store, problem, contract, kinds, whole, tell=tell)
    contract = widen(contract, survey)
    seen = profile_whole(parts.train, kinds, contract.private, survey)
    findings = check_whole(contract, survey)
    mark = staged("profile and check", mark)
    held = hold(number_rows(parts.named(), whole), contract)
    mark = staged("sample of each part", mark)
    assert target_in(parts.train, target).counts and sum(count_parts(whole).values()) == whole.version["rows"]
    return {"rows": whole.version["rows"], "columns": whole.version["columns"] - 1, "sample": sum(p.height for p in held.values()), "version": whole.version["id"],
            "profiled": seen.height, "findings": findings.height, "told": len(told), "wall_s": round(mark[0] - begun[0], 2), "cpu_s": round(mark[1] - begun[1], 2),
            "peak_mb": stages[-1]["peak_mb"], "stages": stages}


def commit(folder: Path, rounds: int = 15) -> dict[str, Any]:
    "10,000 rows of 20 columns: one commit of a version, and the same frame as a parquet file, in turn."
    from pipeline.core.store import write_frame
    from pipeline.data.versions import save_version

    found: dict[str, list[float]] = {"parquet": [], "commit": []}
    for i in range(rounds + 2):
        frame = batch(i * 10_000, 10_000).with_row_index("__row").with_columns(pl.col("__row").cast(pl.Int64))
        begun = time.perf_counter()
        write_frame(folder / "one.parquet", frame)
        written = time.perf_counter()
        save_version(folder / "store", "many", frame)
        found["parquet"].append(written - begun)
        found["commit"].append(time.perf_counter() - written)
    parquet, whole = (statistics.median(found[name][2:]) * 1000 for name in ("parquet", "commit"))
    return {"parquet_ms": round(parquet, 1), "commit_ms": round(whole, 1), "ratio": round(whole / parquet, 2), "commits": rounds + 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="100000,1000000,4000000,20000000")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--one", type=Path, help="internal: stream this file")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(stream(given.one, given.one.parent / "store")))
        return
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        sizes = [measure(folder, int(rows)) for rows in given.rows.split(",")]
        slope = float(np.polyfit(np.log([s["rows"] for s in sizes]), np.log([s["cpu_s"] for s in sizes]), 1)[0]) if len(sizes) > 1 else None
        last = float(np.log(sizes[-1]["cpu_s"] / sizes[-2]["cpu_s"]) / np.log(sizes[-1]["rows"] / sizes[-2]["rows"])) if len(sizes) > 1 else None
        result = {"date": dt.date.today().isoformat(), "python": platform.python_version(), "polars": pl.__version__, "sizes": sizes,
                  "exponent": slope and round(slope, 3), "exponent_of_the_last_step": last and round(last, 3), "commit": commit(folder)}
    finally:
        shutil.rmtree(folder)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


def measure(folder: Path, rows: int) -> dict[str, Any]:
    work = folder / str(rows)
    work.mkdir()
    write(work / "parcels.parquet", rows)
    done = subprocess.run([sys.executable, "-m", "tests.bench.data_scale", "--one", str(work / "parcels.parquet")], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{rows:,} rows: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1]) | {"source_mb": round((work / "parcels.parquet").stat().st_size / 1e6), "kept_mb": round(sum(
        p.stat().st_size for p in (work / "store").rglob("*.parquet")) / 1e6)}
    shutil.rmtree(work)
    print(f"{rows:,} rows: {found['wall_s']} s, {found['cpu_s']} CPU s, {found['peak_mb']:,} MB", file=sys.stderr, flush=True)
    return found


def show(result: dict[str, Any]) -> None:
    print("| rows × columns | wall s | CPU s | peak MB | file MB | kept MB |\n|---|---|---|---|---|---|")
    for s in result["sizes"]:
        print(f"| {s['rows']:,} × {s['columns']} | {s['wall_s']} | {s['cpu_s']} | {s['peak_mb']:,} | {s['source_mb']:,} | {s['kept_mb']:,} |")
    print("\n| stage of the largest | wall s | CPU s | peak MB so far |\n|---|---|---|---|")
    for stage in result["sizes"][-1]["stages"]:
        print(f"| {stage['stage']} | {stage['wall_s']} | {stage['cpu_s']} | {stage['peak_mb']:,} |")
    print(f"\nCPU seconds grow as rows to the power {result['exponent']} (last step {result['exponent_of_the_last_step']}). "
          f"A commit of 10,000 rows takes {result['commit']['commit_ms']} ms, the parquet file alone {result['commit']['parquet_ms']} ms: {result['commit']['ratio']} times.")


if __name__ == "__main__":
    main()
