"""BentoML, as its quickstart writes a service: `bentoml serve bentoml_app:Trees`."""
from __future__ import annotations

from typing import Any

import bentoml
from shared import probabilities


@bentoml.service(workers=1)
class Trees:
    @bentoml.api
    def predict(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"predictions": [{"prediction": "true" if p >= 0.5 else "false", "p": p} for p in probabilities(rows)]}
