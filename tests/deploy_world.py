"""A small world for the deploy and rollout tests: a project of its own with the phases before them finished."""
from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from player import play

from pipeline.core.intervals import score
from pipeline.core.run import open_run
from pipeline.data.contract import target_values
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting

ROOT = Path(__file__).resolve().parent.parent
CLASSES = {"binary": ["false", "true"], "multiclass": ["blue", "green", "red"], "regression": []}


def rows(task: str, n: int, seed: int = 1, days: int = 120) -> pl.DataFrame:
    "A table with a number, a whole number, two categories (one unicode), a date, a bool, missing values and a target."
    random = np.random.default_rng(seed)
    at = np.sort(random.integers(0, days * 86_400, n))
    hour = random.uniform(5, 23, n)
    rain = random.random(n) < .2
    level = hour / 6 + rain + random.normal(0, 1, n)
    target: dict[str, Any] = {
        "binary": np.where(level > 3, "true", "false"), "regression": 10 * level,
        "multiclass": np.array(CLASSES["multiclass"])[np.digitize(level, [2, 3.5])],
    }
    frame = pl.DataFrame(
        {
            "hour": hour,
            "seats": random.integers(50, 400, n),
            "carrier": random.choice(["UA", "B6", "日航"], n),
            "tailnum": [f"N{i}" for i in random.integers(0, 600, n)],
            "built": [None if i % 11 == 0 else f"20{i % 20:02d}-0{1 + i % 9}-15" for i in range(n)],
            "rain": rain,
            "late": target[task],
        }
    )
    return frame.with_columns(
        pl.col("built").str.to_date(), pl.when(pl.Series(random.random(n) < .1)).then(None).otherwise(pl.col("hour")).alias("hour"),
        __row=pl.int_range(n, dtype=pl.Int64), __time=pl.datetime(2013, 1, 1) + pl.duration(seconds=pl.Series(at)),
    )


def contract(task: str) -> dict[str, Any]:
    def column(name: str, kind: str, dtype: str, nullable: bool = False, **more: Any) -> dict[str, Any]:
        return {
            "name": name,
            "type": kind,
            "dtype": dtype,
            "nullable": nullable,
            "min": None,
            "max": None,
            "levels": None,
            "n_levels": None,
            "role": "feature",
            "known_at": None,
            "pii": False,
            "why": "",
        } | more
    columns = [
        column("hour", "number", "Float64", True, min=5.0, max=23.0),
        column("seats", "number", "Int64", min=50, max=399),
        column("carrier", "category", "String", levels=["B6", "UA", "日航"], n_levels=3),
        column("tailnum", "category", "String", role="subject", pii=True),
        column("built", "date", "Date", True),
        column("rain", "bool", "Boolean"),
        column(
            "late",
            "number" if task == "regression" else "category",
            "Float64" if task == "regression" else "String",
            role="target",
        ),
    ]
    return {
        "target": "late",
        "task": task,
        "classes": CLASSES[task],
        "positive": "true" if task == "binary" else None,
        "time": None,
        "group": None,
        "subject": "tailnum",
        "features": ["hour", "seats", "carrier", "built", "rain"],
        "columns": columns,
        "left_out": [],
        "cohorts": [],
    }


def problem_text(name: str, task: str, **sections: dict[str, Any]) -> str:
    problem = {
        "problem": {
            "name": name,
            "statement": "Will it arrive late, asked before it leaves?",
            "kpi": {"name": "late", "baseline": 0, "target": 1, "unit": ""},
            "task": task,
            "target": "late",
        },
        "data": {"sources": [{"name": "t", "kind": "csv", "path": "t.csv"}]},
        "deploy": {"latency_p99_ms": 1000, "rss_mb": 4000},
        "rollout": {"subject": "tailnum", "days_per_stage": 4, "worse_by": 0.01, "live": False},
    }
    return json.dumps({k: problem.get(k, {}) | sections.get(k, {}) for k in problem | sections})


@contextmanager
def at(root: Path) -> Iterator[Path]:
    "Work inside a project."
    before = os.getcwd()
    os.chdir(root)
    try:
        yield root
    finally:
        os.chdir(before)


def build(
    root: Path,
    task: str = "binary",
    n: int = 3000,
    family: str = "trees",
    production: bool = True,
    spoilt: bool = False,
    **sections: dict[str, Any],
) -> Path:
    "A project with phases 02 to 05 finished; the run's folder. `spoilt`: what was measured had another preprocessing from row 40 on."
    root.mkdir(parents=True, exist_ok=True)
    (root / "settings.ini").write_text("")
    (root / "tiny.yml").write_text(problem_text("tiny", task, **sections))
    frame, agreed = rows(task, n), contract(task)
    train, holdout, later = frame.head(n // 2), frame.slice(n // 2, n // 6), frame.slice(n // 2 + n // 6)
    with at(root):
        run = open_run("02_data", "tiny.yml", "outputs/tiny/main")
        run.save("data/contract", agreed)
        run.save("data/train", train)
        run.save("data/holdout", holdout, sealed=True)
        if production:
            run.save("data/production", later)
        run.save(
            "data/splits",
            {
                "kind": "time",
                "ordered": True,
                "folds": 3,
                "train": {"n": len(train), "from": "2013-01-01", "to": "2013-02-28"},
                "holdout": {"n": len(holdout), "from": "2013-03-01", "to": "2013-03-20"},
                "production": None,
            },
        )
        run.save("data/version", {"id": "d1", "uri": ""})
        _done(run)
        run = open_run("03_label", "tiny.yml", "outputs/tiny/main")
        run.save("label/version", {"id": "l1", "digest": "", "n": len(train), "parent": None})
        _done(run)
        run = open_run("04_train", "tiny.yml", "outputs/tiny/main")
        about = {"residual": 12.0} if task == "regression" else {}
        model = train_model(
            family,
            train,
            target_values(train, agreed),
            agreed,
            Fitting({"rounds": 30} if family == "trees" else {}),
            about=about,
        )
        default = train_model("trees", train, target_values(train, agreed), agreed, Fitting({"rounds": 10}), about=about)
        for name, trained in (("model", model), ("default", default)):
            run.save(f"train/{name}", trained.save(run.scratch / name))
        answers = model.answers(model.predict(train))
        run.save(
            "train/validation",
            pl.concat(
                [train.select("__row"), pl.DataFrame({"y": target_values(train, agreed)}), answers], how="horizontal"
            ),
        )
        _done(run)
        run = open_run("05_evaluate", "tiny.yml", "outputs/tiny/main")
        seen = holdout.with_columns(hour=pl.when((pl.int_range(pl.len()) >= 40) & spoilt).then(pl.lit(22.0)).otherwise(pl.col("hour")))
        measured = pl.concat(
            [
                holdout.select("__row", "__time"),
                pl.DataFrame({"y": target_values(holdout, agreed)}),
                model.answers(model.predict(seen)),
            ],
            how="horizontal",
        )
        run.save("evaluate/predictions", measured)
        run.save("evaluate/threshold", {"threshold": 0.4 if task == "binary" else None})
        run.save("evaluate/cohorts", pl.DataFrame({"by": ["carrier"], "cohort": ["UA"], "n": [10]}))
        name = "mae" if task == "regression" else "log_loss"
        run.claim(
            name,
            of="evaluate/predictions",
            by=score,
            using={"name": name, "classes": agreed["classes"] or None, "draws": 100, "seed": 7},
            on="holdout",
            better="lower",
            title=name,
        )
        _done(run)
    return root / "outputs" / "tiny" / "main"


def _done(run: Any) -> None:
    run.conclude("done")
    run.finish()


def execute(notebook: str, root: Path) -> dict[str, Any]:
    "Run a phase's cells in order; its names afterwards. A failed gate ends the last cell and is kept as `error`."
    from pipeline.core.errors import PilothouseError

    names: dict[str, Any] = {"error": None, "shown": []}
    with at(root):
        try:
            play(ROOT / "nbs" / "phases" / f"{notebook}.ipynb", names, names["shown"], problem="tiny.yml", run="outputs/tiny/main")
        except PilothouseError as error:
            if not (root / "outputs/tiny/main" / notebook / "receipt.json").exists():
                raise
            names["error"] = error
    return names
