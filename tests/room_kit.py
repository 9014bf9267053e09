"""A run whose earlier phases are finished, made without running them: what monitor and comply start from."""
from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from player import play

from pipeline.core.problem import load_problem
from pipeline.core.run import Run, open_run
from pipeline.data.contract import target_values
from pipeline.scope.plan import derive_plan
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting

PROBLEM = """\
problem:
  name: shop
  statement: Which baskets will be returned within a month?
  kpi: {{name: returns announced, baseline: 0, target: 30, unit: '%'}}
  task: {task}
  target: y
data:
  sources: [{{name: shop, kind: csv, path: shop.csv, licence: own}}]
{extra}
"""


def make_project(folder: Path, task: str = "binary", extra: str = "  time: day\n") -> Path:
    "A workplace with one problem file."
    (folder / "settings.ini").write_text("[outputs]\npath = outputs\n[engine]\nthreads = 1\n")
    (folder / "params").mkdir(exist_ok=True)
    (folder / "params/shop.yml").write_text(PROBLEM.format(task=task, extra=extra))
    return folder


def rows(n: int, start: dt.datetime, task: str = "binary", seed: int = 0, first: int = 0, shift: float = 0.0, times: bool = True) -> pl.DataFrame:
    "Baskets of customers; the outcome follows from price and country."
    rng = np.random.default_rng(seed)
    price, country = rng.normal(size=n) + shift, rng.choice(["AT", "DE", "CH"], n)
    signal = price + np.where(country == "DE", 1.0, -0.5)
    target: Any = {
        "binary": lambda: (rng.random(n) < 1 / (1 + np.exp(-signal))).tolist(),
        "multiclass": lambda: np.array(["no", "part", "all"])[np.digitize(signal + rng.normal(size=n), [-0.5, 0.8])].tolist(),
        "regression": lambda: (signal + rng.normal(size=n)).tolist(),
    }[task]()
    frame = pl.DataFrame({
        "price": price, "country": country, "customer": [f"C-{rng.integers(0, 80):04d}" for _ in range(n)], "y": target,
        "__row": np.arange(first, first + n),
    }).with_columns(pl.col("y").cast(pl.String) if task != "regression" else pl.col("y"))
    return frame.with_columns(__time=pl.Series([start + dt.timedelta(minutes=30 * i) for i in range(n)])) if times else frame


def contract_of(frame: pl.DataFrame, task: str, subject: str | None = "customer") -> dict[str, Any]:
    "What the data phase would have learned."
    def column(name: str, kind: str, dtype: str, role: str, pii: bool = False) -> dict[str, Any]:
        levels = frame[name].unique().sort().to_list() if kind == "category" and not pii else None
        return {"name": name, "type": kind, "dtype": dtype, "role": role, "nullable": False, "min": None, "max": None, "levels": levels,
                "n_levels": None if levels is None else len(levels), "known_at": None, "pii": pii, "why": ""}

    kinds = [column("price", "number", "Float64", "feature"), column("country", "category", "String", "feature")]
    kinds += [column(subject, "category", "String", "subject", True)] if subject else []
    kinds += [column("y", "number" if task == "regression" else "category", "Float64" if task == "regression" else "String", "target")]
    classes = [] if task == "regression" else frame["y"].unique().sort().to_list()
    return {"target": "y", "task": task, "classes": classes, "positive": classes[1] if task == "binary" else None, "time": "day", "group": None,
            "subject": subject, "columns": kinds, "left_out": [], "cohorts": ["country"], "features": ["price", "country"]}


def predictions(model: Any, frame: pl.DataFrame, contract: dict[str, Any]) -> pl.DataFrame:
    "What the evaluate phase keeps of a frame."
    answers = model.answers(model.predict(frame)).select(pl.exclude("low", "high"))
    keep = [c for c in ("__row", "__time", "country") if c in frame.columns]
    return frame.select(keep).with_columns(y=pl.Series(target_values(frame, contract))).hstack(answers)


def earlier_phases(project: Path, task: str = "binary", production: pl.DataFrame | None = None, times: bool = True, n: int = 1500,
                   clock: Any = pl.col("__row")) -> Path:
    "Finish 01_scope, 02_data, 04_train and 05_evaluate of `outputs/shop/main` in a few seconds; the caller stands in `project`."
    train = rows(n, dt.datetime(2024, 1, 1), task, seed=1, times=times)
    holdout = rows(n // 3, dt.datetime(2024, 1, 1) + dt.timedelta(minutes=30 * n), task, seed=2, first=n, times=times)
    train, holdout = (frame.with_columns(clock) for frame in (train, holdout))
    contract = contract_of(train, task)

    def phase(name: str) -> Run:
        return open_run(name, "params/shop.yml", "outputs/shop/main")

    scope = phase("01_scope")
    scope.save("scope/plan", derive_plan(load_problem(project / "params/shop.yml")))
    data = phase("02_data")
    fold = np.where(np.arange(n) < n // 2, -1, 0).astype(np.int8)
    data.save("data/train", train.with_columns(__fold=pl.Series(fold)))
    data.save("data/holdout", holdout, sealed=True)
    if production is not None:
        data.save("data/production", production)
    data.save("data/contract", contract)
    data.save("data/splits", {"kind": "time", "ordered": times, "folds": 1})
    fit = phase("04_train")
    model = train_model("trees", train, target_values(train, contract), contract, Fitting(config={"rounds": 20}, seed=1))
    half = train.head(n // 2)
    earlier = train_model("trees", half, target_values(half, contract), contract, Fitting(config={"rounds": 20}, seed=1))
    fit.save("train/model", model.save(fit.scratch / "model"))
    fit.save("train/validation", predictions(earlier, train.tail(n - n // 2), contract).drop("__time", "country", strict=False).with_columns(fold=pl.lit(0)))
    judge = phase("05_evaluate")
    judge.save("evaluate/predictions", predictions(model, holdout, contract))
    judge.save("evaluate/threshold", {"threshold": 0.4})
    judge.save("evaluate/importance", pl.DataFrame({"column": ["price", "country"], "loss": [0.1, 0.05], "low": [0.08, 0.04], "high": [0.12, 0.06]}))
    for one in (scope, data, fit, judge):
        one.conclude("It is so.")
        one.finish()
    return project / "outputs/shop/main"


def records(run: Path, phase: str, kind: str) -> Any:
    "claims, checks, decisions, answer or receipt of a finished phase."
    return json.loads((run / phase / f"{kind}.json").read_text())


def execute(notebook: Path, problem: str = "params/shop.yml", run: str = "outputs/shop/main") -> dict[str, Any]:
    "A phase on this project's problem and run, unless told otherwise; returns its names."
    return play(notebook, problem=problem, run=run)
