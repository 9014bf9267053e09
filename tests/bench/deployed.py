"""The deployed model: how small and quick it is, and how much of the best one's gain it keeps.

    python -m tests.bench.deployed [20] [--tables adult,diamonds]

On each table of ../shared/data one search of so many core-seconds on one thread. The shipped model (the simplest within the tolerance) is
asked single rows the way a service gets them, from a mapping of their values, and all test rows at once; LightGBM's own Booster is asked
the same coded rows beside it, and for the contributions of 200, where the shipped model is one booster. Times are CPU time, the least of several turns, on one thread. The
gain kept is the shipped model's gain over LightGBM's default on the test rows, as a share of that of the best candidate, the ensemble
where it is that. The model that the run `flights` ships is asked as well, where that run is there. Results: tests/bench/results/deployed.json.
"""
from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "POLARS_MAX_THREADS": "1"}

import numpy as np  # noqa: E402
import polars as pl  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

from pipeline.data.contract import target_values  # noqa: E402
from pipeline.train.fast import prepare  # noqa: E402
from pipeline.train.frontier import least_cpu, measure_model  # noqa: E402
from pipeline.train.models import Model, load_model, train_model  # noqa: E402
from pipeline.train.protocol import Fitting  # noqa: E402
from pipeline.train.search import Goal  # noqa: E402
from pipeline.train.tables import fit_table  # noqa: E402
from pipeline.train.trees import Trees  # noqa: E402
from tests.bench.models import DATA, TABLES, table  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "deployed.json"
METRIC = {"binary": "roc_auc", "multiclass": "log_loss", "regression": "rmse"}
LIMITS = {"size_mb": 5.0, "row_ms": 0.15, "rows_per_core_s": 100_000.0, "gain_kept": 0.95}
DEFAULT_ROUNDS = 100   # of LightGBM's own defaults


def measure(name: str, budget: float) -> dict[str, Any]:
    "One table: search, then ask."
    told = table(DATA, name)
    train, test = pl.read_parquet(told["train"]), pl.read_parquet(told["test"])
    fitted = fit_table(train, told["target"], told["task"].replace("text-", ""), budget, "core", 1, 1, told["time"] if told["time"] in train.columns else None)
    contract, goal = fitted.shipped.contract, Goal(METRIC[fitted.shipped.task])
    y = target_values(test, contract)
    default = train_model("trees", train, target_values(train, contract), contract,
                          Fitting({"learning_rate": 0.1, "num_leaves": 31, "rounds": DEFAULT_ROUNDS}, 1, 1))
    values = {who: float(goal.measure(y, model.predict(test)) or 0.0) for who, model in (("default", default), ("best", fitted.best), ("shipped", fitted.shipped))}
    gain, kept = (goal.sign * (values[who] - values["default"]) for who in ("best", "shipped"))
    costs = {who: measure_model(model, test) for who, model in (("best", fitted.best), ("shipped", fitted.shipped))}
    prepare(fitted.shipped.estimator)
    matrix = fitted.shipped.encode(test)
    cpu = least_cpu(lambda: fitted.shipped.estimator.predict(matrix), 5, 20)
    return {
        "table": name, "metric": goal.metric, **values, "gain_kept": kept / gain if gain > 0 else None, "shipped_is": fitted.shipped.about["candidate"],
        "best_is": fitted.best.about["candidate"], "size_mb": costs["shipped"].size_mb, "best_mb": costs["best"].size_mb, "row_ms": costs["shipped"].row_ms,
        "best_row_ms": costs["best"].row_ms, "rows_per_core_s": test.height / cpu, "rows_per_core_s_from_a_frame": 1000 / costs["shipped"].batch_ms,
        **booster_beside(fitted.shipped, matrix), "spent_core_s": fitted.spent_s,
    }


def measure_run(folder: Path) -> dict[str, Any]:
    "The shipped model of a run, on its holdout rows."
    model, rows = load_model(folder / "04_train/model"), pl.read_parquet(folder / "02_data/holdout.parquet").head(20_000)
    cost = measure_model(model, rows)
    matrix = model.encode(rows)
    parts = [f"{weight:g} × {family}" for family, weight, _ in getattr(model.estimator, "members", ())]
    return {"table": "flights (its run)", "shipped_is": " + ".join(parts) or model.family, "size_mb": cost.size_mb, "row_ms": cost.row_ms,
            "rows_per_core_s": rows.height / least_cpu(lambda: model.estimator.predict(matrix), 5, 20), "rows_per_core_s_from_a_frame": 1000 / cost.batch_ms,
            "booster_row_ms": None, "booster_rows_per_core_s": None, "default": None, "shipped": None, "best": None, "gain_kept": None}


def booster_beside(model: Model, matrix: np.ndarray) -> dict[str, Any]:
    "LightGBM's own time for the same coded rows."
    trees = model.estimator
    if not isinstance(trees, Trees):
        return dict.fromkeys(("booster_row_ms", "booster_rows_per_core_s", "explained_row_ms", "booster_explained_row_ms"))
    shown = trees.view.show(matrix, trees.shape)
    one = least_cpu(lambda: [trees.booster.predict(shown[i:i + 1], num_iteration=trees.steps, num_threads=1) for i in range(50)], 5, 5) / 50
    few = shown[:200]
    told = {"explained_row_ms": 1000 * least_cpu(lambda: model.estimator.contributions(matrix[:200]), 3, 20) / len(few),
            "booster_explained_row_ms": 1000 * least_cpu(lambda: trees.booster.predict(few, num_iteration=trees.steps, num_threads=1, pred_contrib=True), 2, 20) / len(few)}
    return told | {"booster_row_ms": 1000 * one,
            "booster_rows_per_core_s": len(shown) / least_cpu(lambda: trees.booster.predict(shown, num_iteration=trees.steps, num_threads=1), 2, 20)}


def show(rows: list[dict[str, Any]]) -> None:
    "A markdown table."
    print("| table | shipped | MB | one row, ms | rows a core-s | Booster: ms, rows | contributions of a row, ms / Booster | default | shipped | best | gain kept |\n|---|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        beside = "–" if r["booster_row_ms"] is None else f"{r['booster_row_ms']:.3f}, {r['booster_rows_per_core_s']:,.0f}"
        parts = "–" if r.get("explained_row_ms") is None else f"{r['explained_row_ms']:.3f} / {r['booster_explained_row_ms']:.3f}"
        kept = "–" if r["shipped"] is None else "no gain" if r["gain_kept"] is None else f"{r['gain_kept']:.0%}"
        values = " | ".join("–" if r[who] is None else f"{r[who]:.4f}" for who in ("default", "shipped", "best"))
        print(f"| {r['table']} | {r['shipped_is']} | {r['size_mb']:.2f} | {r['row_ms']:.3f} | {r['rows_per_core_s']:,.0f} | {beside} | {parts} | {values} | {kept} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("budget", nargs="?", type=float, default=20.0)
    parser.add_argument("--tables", default=",".join(TABLES))
    told = parser.parse_args()
    import lightgbm
    import numba

    before = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    run = ROOT / "outputs/flights/main"
    for name in [*filter(None, told.tables.split(",")), *(["flights (its run)"] if (run / "04_train/model").is_dir() else [])]:
        row = (measure_run(run) if name.endswith("(its run)") else measure(name, told.budget)) | {"budget_core_s": told.budget, "date": dt.date.today().isoformat()}
        before = [r for r in before if r["table"] != name] + [row]
        content = {"limits": LIMITS, "versions": {"lightgbm": lightgbm.__version__, "numba": numba.__version__, "python": sys.version.split()[0]}, "rows": before}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
        show([row])
    show(before)


if __name__ == "__main__":
    main()
