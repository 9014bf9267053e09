"""MLflow, as its guide writes it: the booster saved with `mlflow.lightgbm`, then `mlflow models serve`."""
from __future__ import annotations

import sys

import mlflow.lightgbm
from shared import BOOSTER

mlflow.lightgbm.save_model(BOOSTER, sys.argv[1])
