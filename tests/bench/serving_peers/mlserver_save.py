"""MLServer, as its example writes it: a folder with settings for its own LightGBM runtime, then `mlserver start`."""
from __future__ import annotations

import json
import sys
from pathlib import Path

from shared import WORLD

place, port, second, third = Path(sys.argv[1]), *map(int, sys.argv[2:5])
place.mkdir(parents=True, exist_ok=True)
(place / "settings.json").write_text(json.dumps({"host": "127.0.0.1", "http_port": port, "grpc_port": second, "metrics_port": third, "parallel_workers": 0,
                                                 "debug": False}))
(place / "model-settings.json").write_text(json.dumps({"name": "trees", "implementation": "mlserver_lightgbm.LightGBMModel",
                                                       "parameters": {"uri": str(WORLD / "model.txt"), "version": "v1"}}))
