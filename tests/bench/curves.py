"""Does the law that was fitted to few rows hold at two and four times as many? `python -m tests.bench.curves [CACHE]`

For real tables and several seeds: a curve up to n rows, its 95 % interval at 2n and 4n, and what is then measured there.
The share of intervals that hold the measured value should be about 95 %; their width is told beside, since a wide interval
holds everything."""
from __future__ import annotations

import datetime as dt
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.evaluate.curves import laws_of, measure_curve
from pipeline.train.features import learn_encoder
from pipeline.train.protocol import Shape
from pipeline.train.search import Goal

DATA = Path(__file__).resolve().parents[3] / "shared/data"
RESULT = Path(__file__).resolve().parent / "results/curves.json"
TABLES = ("adult", "diamonds", "electricity", "gss_wages", "employment_ma", "us_accidents")
SEEN, FAMILIES, SEEDS, ANSWERED = 2_000, ("trees", "linear"), 2, 6_000


def coded(name: str, target: str, most: int = 60_000) -> tuple[np.ndarray, np.ndarray, Shape]:
    "A table as numbers."
    frame = pl.read_parquet(DATA / f"{name}.parquet").filter(pl.col(target).is_not_null())
    frame = frame.drop([c for c in frame.columns if c.startswith("__")]).sample(min(most, frame.height), seed=1)
    kinds = [{"name": c, "type": "number" if t.is_numeric() else "date" if t.is_temporal() else "category"} for c, t in frame.schema.items() if c != target]
    encoder = learn_encoder(frame, {"features": [k["name"] for k in kinds], "columns": kinds})
    values = frame[target]
    if values.dtype.is_numeric() and values.n_unique() > 20:
        return encoder.encode(frame), values.cast(pl.Float64).to_numpy(), Shape("regression", 0, tuple(encoder.sizes))
    codes = (values.cast(pl.String).rank("dense").to_numpy() - 1).astype(int)
    return encoder.encode(frame), codes, Shape("binary" if codes.max() == 1 else "multiclass", int(codes.max()) + 1, tuple(encoder.sizes))


def curves(cache: Path | None = None) -> list[dict[str, Any]]:
    "Measured curves: up to SEEN rows, and at two and four times as many."
    if cache is not None and cache.exists():
        return [{**c, "seen": pl.DataFrame(c["seen"]), "later": pl.DataFrame(c["later"])} for c in json.loads(cache.read_text())]
    meta, found = json.loads((DATA / "meta.json").read_text()), []
    for name in TABLES:
        matrix, y, shape = coded(name, meta[name]["target"])
        goals = {"regression": ["mae"], "binary": ["roc_auc", "log_loss"], "multiclass": ["log_loss"]}[shape.task]
        for seed in range(SEEDS):
            order = np.random.default_rng(seed).permutation(len(y))
            valid, train = order[:ANSWERED], order[ANSWERED:]
            for family in FAMILIES:
                for metric in goals:
                    plan = {family: [(SEEN // 8, 3), (SEEN // 4, 3), (SEEN // 2, 1), (SEEN, 1)]}
                    seen = measure_curve(shape, matrix, y, train, valid, plan, Goal(metric), seed)
                    more = [(SEEN * times, 1) for times in (2, 4) if SEEN * times <= len(train)]
                    later = measure_curve(shape, matrix, y, train, valid, {family: more}, Goal(metric), seed + 100)
                    found.append({"table": name, "family": family, "metric": metric, "seed": seed, "seen": seen, "later": later})
        print(name, flush=True)
    if cache is not None:
        cache.write_text(json.dumps([{**c, "seen": c["seen"].to_dict(as_series=False), "later": c["later"].to_dict(as_series=False)} for c in found]))
    return found


def judge(found: list[dict[str, Any]]) -> pl.DataFrame:
    "A row a curve and distance: the interval, what was measured, whether it is held, width over the gain measured."
    rows = []
    for one in found:
        laws = laws_of(one["seen"], one["family"], one["metric"], one["seed"])
        if laws is None:
            continue
        last = float(laws.measured[-1])
        for later in one["later"].filter(pl.col("draw") == -1).iter_rows(named=True):
            expected = laws.at(later["rows"])
            low, high = np.quantile(expected[1:], [0.025, 0.975])
            low, high = min(low, expected[0]), max(high, expected[0])
            rows.append({"table": one["table"], "family": one["family"], "metric": one["metric"], "seed": one["seed"], "times": later["rows"] // SEEN, "expected": expected[0],
                         "low": low, "high": high, "measured": later["metric"], "held": bool(low <= later["metric"] <= high), "width": (high - low) / max(abs(later["metric"] - last), 1e-9),
                         "miss": abs(expected[0] - later["metric"]), "flat_miss": abs(last - later["metric"])})
    return pl.DataFrame(rows, schema_overrides={"held": pl.Boolean})


def main(cache: str = "") -> None:
    "Measure (or read what was measured, from a file), judge, write and print."
    told = judge(curves(Path(cache) if cache else None))
    summary = told.group_by("family", "times").agg(curves=pl.len(), held=pl.col("held").mean(), median_width=pl.col("width").median(),
                                                  beats_no_change=(pl.col("miss") < pl.col("flat_miss")).mean()).sort("family", "times")
    import lightgbm
    import sklearn

    versions = {"python": platform.python_version(), "lightgbm": lightgbm.__version__, "scikit-learn": sklearn.__version__, "numpy": np.__version__}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"date": dt.date.today().isoformat(), "versions": versions, "summary": summary.to_dicts(), "rows": told.to_dicts()}, indent=1) + "\n")
    print("| family | rows beyond | curves | intervals that hold | width / gain measured | closer than no change |\n|---|---|---|---|---|---|")
    for r in summary.iter_rows(named=True):
        print(f"| {r['family']} | {r['times']}× | {r['curves']} | {r['held']:.0%} | {r['median_width']:.1f} | {r['beats_no_change']:.0%} |")


if __name__ == "__main__":
    main(*sys.argv[1:2])
