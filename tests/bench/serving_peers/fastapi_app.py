"""FastAPI with pydantic models, as its tutorial writes a POST endpoint: `uvicorn fastapi_app:app`."""
from __future__ import annotations

import os
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, create_model
from shared import COLUMNS, probabilities


def _type(column: dict[str, Any]) -> Any:
    return Literal[tuple(column["levels"])] | None if column["type"] == "category" else float | None  # type: ignore[valid-type]


Row = create_model("Row", **{c["name"]: (_type(c), ...) for c in COLUMNS})  # type: ignore[call-overload]


class Asked(BaseModel):
    rows: list[Row]  # type: ignore[valid-type]


class Prediction(BaseModel):
    prediction: str
    p: float


class Answer(BaseModel):
    predictions: list[Prediction]


app = FastAPI()


def predict(asked: Asked) -> Answer:
    found = probabilities([row.model_dump() for row in asked.rows])  # type: ignore[attr-defined]
    return Answer(predictions=[Prediction(prediction="true" if p >= 0.5 else "false", p=p) for p in found])


async def predict_at_once(asked: Asked) -> Answer:
    return predict(asked)


app.post("/predict")(predict_at_once if os.environ.get("BENCH_ASYNC") else predict)
