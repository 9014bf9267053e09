"""LitServe, as its README writes a LitAPI: `python litserve_app.py PORT`."""
from __future__ import annotations

import sys
from typing import Any

import litserve
from shared import probabilities


class Trees(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.model = probabilities

    def decode_request(self, request):  # type: ignore[no-untyped-def]   # an annotation would be taken for the body's type
        return request["rows"]

    def predict(self, x: list[dict[str, Any]]) -> list[float]:
        return self.model(x)

    def encode_response(self, output: list[float]) -> dict[str, Any]:
        return {"predictions": [{"prediction": "true" if p >= 0.5 else "false", "p": p} for p in output]}


if __name__ == "__main__":
    litserve.LitServer(Trees(), accelerator="cpu", workers_per_device=1).run(port=int(sys.argv[1]), host="127.0.0.1", log_level="warning", generate_client_file=False)
