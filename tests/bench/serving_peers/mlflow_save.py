"""MLflow, as its guide writes it: the booster saved with `mlflow.lightgbm`, then `mlflow models serve`.

With `mlflow_signed`, as its guide to signatures writes it: the columns and their types are kept, and each request is checked against them."""
from __future__ import annotations

import sys

import mlflow.lightgbm
import numpy as np
import pandas as pd
from mlflow.models import infer_signature
from shared import BOOSTER, NAMES

rows = pd.DataFrame(np.zeros((3, len(NAMES))), columns=NAMES)
signature = infer_signature(rows, BOOSTER.predict(rows)) if sys.argv[2] == "mlflow_signed" else None
mlflow.lightgbm.save_model(BOOSTER, sys.argv[1], signature=signature)
