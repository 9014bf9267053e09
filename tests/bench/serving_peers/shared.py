"""What every peer's handler reads: the same LightGBM model, and how a row becomes the numbers that it saw."""
from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np

WORLD = Path(os.environ["BENCH_WORLD"])
COLUMNS: list[dict[str, Any]] = json.loads((WORLD / "columns.json").read_text())
CODES = [{level: float(code) for code, level in enumerate(c["levels"])} if c["type"] == "category" else None for c in COLUMNS]
NAMES = [c["name"] for c in COLUMNS]
BOOSTER = lightgbm.Booster(model_file=str(WORLD / "model.txt"))


def matrix(rows: list[dict[str, Any]]) -> np.ndarray:
    "Rows as the booster's numbers, NaN where missing."
    return np.array([[_code(row[name], codes) for name, codes in zip(NAMES, CODES)] for row in rows])


def _code(value: Any, codes: dict[str, float] | None) -> float:
    if value is None:
        return math.nan
    return float(value) if codes is None else codes[value]


def probabilities(rows: list[dict[str, Any]]) -> list[float]:
    "Of the positive class."
    return BOOSTER.predict(matrix(rows), num_threads=1).tolist()
