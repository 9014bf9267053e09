"""A batch of any length in bounded memory, and what the inference log costs.

    python -m tests.bench.batch [--rows 1000000,10000000] [--kinds parquet,csv,jsonl,xlsx] [--trees 300] [--folder DIR]   # trees at most, see --help

`pilothouse predict`'s way: a file of 13 columns in, ten of them read, answers out, in a process of its own whose peak memory the
kernel counts (with the pages of the file that the kernel keeps anyway), and its own memory; `whole` reads the same file at once. A sheet
holds a million rows, so longer tables are no workbooks. The model has 63 leaves a tree and as many
trees as training kept; results say how many. Log: microseconds of CPU that a request
pays (`add`), that the writing thread pays a request, and that a collector pays a row; bodies of 1 and of 100 rows. Results go to
tests/bench/results/batch.json and are printed as a table.
"""
from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]
RESULTS = Path(__file__).parent / "results" / "batch.json"
NUMBERS = [f"x{i}" for i in range(8)]
SHEET_ROWS = 1_048_576
LEVELS = {"carrier": ["UA", "B6", "AA", "DL", "EV"], "origin": ["JFK", "LGA", "EWR"]}


def made(rows: int, seed: int) -> pl.DataFrame:
    "Ten columns that the model reads, three that it does not."
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {name: rng.normal(size=rows).round(4) for name in NUMBERS} | {name: rng.choice(levels, rows) for name, levels in LEVELS.items()}
    return pl.DataFrame(columns | {"tail": [f"N{i}" for i in rng.integers(0, 4000, rows)], "note": ["nothing that anybody reads"] * rows, "id": np.arange(rows)})


def write(folder: Path, rows: int, kinds: list[str]) -> None:
    "The same rows in each kind of file, piece by piece."
    import pyarrow.parquet as pq

    from pipeline.data.export import write_export

    writer = pq.ParquetWriter(folder / f"{rows}.parquet", made(1, 0).to_arrow(compat_level=pl.CompatLevel.oldest()).schema, compression="zstd")
    with (folder / f"{rows}.csv").open("wb") as csv, (folder / f"{rows}.jsonl").open("wb") as lines:
        for first in range(0, rows, 500_000):
            frame = made(min(500_000, rows - first), first)
            writer.write_table(frame.to_arrow(compat_level=pl.CompatLevel.oldest()))
            frame.write_csv(csv, include_header=first == 0)
            if "jsonl" in kinds:
                frame.write_ndjson(lines)
    writer.close()
    if "xlsx" in kinds and rows < SHEET_ROWS:
        write_export(pl.read_parquet(folder / f"{rows}.parquet"), folder / f"{rows}.xlsx")


def package(folder: Path, trees: int) -> tuple[Path, bytes]:
    "A signed package of a model with 63 leaves a tree."
    from pipeline.core import audit
    from pipeline.deploy.package import KEY, Contents, release
    from pipeline.deploy.schema import make_schema
    from pipeline.train.models import train_model
    from pipeline.train.protocol import Fitting

    frame = made(20_000, 1)
    late = ((frame["x0"] + frame["x1"] * frame["x2"]).to_numpy() + np.random.default_rng(2).normal(size=20_000) > 0.5).astype(int)
    columns: list[dict[str, Any]] = [{"name": n, "type": "number", "dtype": "Float64", "nullable": False, "min": -6.0, "max": 6.0} for n in NUMBERS]
    columns += [{"name": n, "type": "category", "dtype": "String", "nullable": False, "levels": sorted(levels)} for n, levels in LEVELS.items()]
    contract = {"target": "late", "task": "binary", "classes": ["no", "yes"], "features": [*NUMBERS, *LEVELS], "columns": columns}
    model = train_model("trees", frame, late, contract, Fitting({"rounds": trees, "num_leaves": 63})).save(folder / "model")
    kept = release(folder / "store", folder / "work", "bench", model, Contents(contract, make_schema(contract).to_dict(), {"threshold": 0.5}, [], {}, "# bench\n", {}))
    return kept, audit.public_key(folder / "store", KEY).public_bytes_raw()


def one(way: str, folder: str, key: str, data: str, out: str) -> None:
    "A batch in this process; says rows, seconds and peak memory."
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    import pipeline.deploy.package as package_room
    from pipeline.deploy.batch import predict_all, predict_file, read_rows, write_rows

    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
    package_room.package_of = lambda run: (Path(folder), public)
    own: list[float] = []
    started, cpu = time.perf_counter(), time.process_time()
    if way == "parts":
        rows = predict_file("run", data, out, tell=lambda rows: own.append(_kept("RssAnon")))
    else:
        answers = predict_all(package_room.load_package(folder, public), read_rows(data))
        own.append(_kept("RssAnon"))
        write_rows(answers, out)
        rows = answers.height
    print(json.dumps({"rows": rows, "seconds": round(time.perf_counter() - started, 2), "cpu_s": round(time.process_time() - cpu, 2),
                      "peak_mb": round(_kept("VmHWM")), "own_mb": round(max(own))}))


def _kept(name: str) -> float:
    "Memory of this process in MB; unlike `ru_maxrss`, not that of the one that started it."
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)) / 1000


def log_costs(store: Path) -> list[dict[str, Any]]:
    "Microseconds of CPU by body length."
    from pipeline.deploy.inference_log import Layout, Recorder, collect

    found = []
    for rows, requests in ((1, 50_000), (100, 1000)):
        fields = made(rows, 1).to_dicts()
        body = json.dumps({"rows": fields}).encode()
        out = json.dumps({"model": "bench", "version": 1, "request_id": "0" * 32, "predictions": [{"prediction": "no", "p": {"no": 0.3125, "yes": 0.6875}}] * rows}).encode()
        recorder = Recorder(store, f"log{rows}", {1: Layout((*NUMBERS, *LEVELS), (), "tail", ("no", "yes"))}, interval=3600, collects=False)
        spent = []
        for work in (lambda: [recorder.add(1.7e9, "0" * 32, 1, "live", 200, 0.3, body, out) for _ in range(requests)], recorder.flush, lambda: collect(store, f"log{rows}")):  # noqa: B023
            cpu = time.process_time()
            work()
            spent.append(time.process_time() - cpu)
        recorder.close()
        table = sum(p.stat().st_size for p in (store / "tables" / f"log{rows}.inferences").glob("*.parquet"))
        found.append({"rows a request": rows, "add_us": round(spent[0] / requests * 1e6, 2), "written_us": round(spent[1] / requests * 1e6, 2),
                      "collected_us_a_row": round(spent[2] / requests / rows * 1e6, 2), "bytes_a_row": round(table / requests / rows, 1)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="1000000,10000000")
    parser.add_argument("--trees", type=int, default=300, help="at most: training stops where more of them no longer help")
    parser.add_argument("--kinds", default="parquet,csv,jsonl,xlsx")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figures go")
    parser.add_argument("--folder", default="")
    parser.add_argument("--one", nargs=5, default=None)
    asked = parser.parse_args()
    if asked.one:
        one(*asked.one)
        return
    folder = Path(asked.folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    kept, key = package(folder, asked.trees)
    found: list[dict[str, Any]] = []
    sizes, kinds = [int(n) for n in asked.rows.split(",")], asked.kinds.split(",")
    for rows in sizes:
        write(folder, rows, kinds)
        for kind in kinds:
            if kind == "xlsx" and rows >= SHEET_ROWS:
                continue
            for way in ("parts", "whole") if rows == sizes[0] else ("parts",):
                out = folder / f"{way}-{rows}-{kind}.csv"
                done = subprocess.run([sys.executable, "-m", "tests.bench.batch", "--one", way, str(kept), key.hex(), str(folder / f"{rows}.{kind}"), str(out)],
                                      capture_output=True, text=True, cwd=ROOT, check=True)
                told = json.loads(done.stdout.splitlines()[-1])
                found.append({"in": kind, "way": way, **told, "rows_a_second": round(told["rows"] / told["seconds"])})
                print(found[-1], flush=True)
        texts = {name.read_bytes() for name in folder.glob(f"*-{rows}-*.csv")}
        assert len(texts) == 1, "the same rows were answered differently"
        for left in folder.glob(f"*{rows}*"):
            left.unlink()
    import lightgbm

    result = {"date": dt.date.today().isoformat(), "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} when it ended, Python {platform.python_version()}, polars {pl.__version__}, LightGBM {lightgbm.__version__}",
              "trees": sum(file.read_text().count("\nTree=") for file in (kept / "model").rglob("*.txt")), "batch": found, "log": log_costs(folder / "store")}
    asked.results.write_text(json.dumps(result, indent=1) + "\n")
    if not asked.folder:
        shutil.rmtree(folder)
    print("\n| file | way | rows | rows/s | rows a CPU second | peak MB | own MB |\n|---|---|---|---|---|---|---|")
    for row in found:
        print(f"| {row['in']} | {row['way']} | {row['rows']:,} | {row['rows_a_second']:,} | {row['rows'] / row['cpu_s']:,.0f} | {row['peak_mb']:,} | {row['own_mb']:,} |")
    print("\n| rows a request | add, µs | written, µs | collected, µs a row | bytes a row |\n|---|---|---|---|---|")
    for row in result["log"]:  # type: ignore[attr-defined]
        print(f"| {row['rows a request']} | {row['add_us']} | {row['written_us']} | {row['collected_us_a_row']} | {row['bytes_a_row']} |")


if __name__ == "__main__":
    main()
