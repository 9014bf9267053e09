"""MLflow, as its guides write it, then `mlflow models serve`.

    mlflow          the booster saved with `mlflow.lightgbm`; a caller must send its numbers
    mlflow_signed   the same with a signature: the columns and their types are kept, and each request is checked against them
    mlflow_rows     rows as FastAPI, LitServe and BentoML get them, categories by name, with a signature (mlflow_rows.py)
"""
from __future__ import annotations

import sys
from pathlib import Path

import mlflow.lightgbm
import numpy as np
import pandas as pd
from mlflow.models import infer_signature
from shared import BOOSTER, CODES, NAMES

place, kind = sys.argv[1:3]
if kind == "mlflow_rows":
    rows = pd.DataFrame({name: ["", "", ""] if codes else np.zeros(3) for name, codes in zip(NAMES, CODES)})
    here = Path(__file__).parent
    mlflow.pyfunc.save_model(place, python_model=str(here / "mlflow_rows.py"), code_paths=[str(here / "shared.py")], signature=infer_signature(rows, [0.5] * 3))
else:
    rows = pd.DataFrame(np.zeros((3, len(NAMES))), columns=NAMES)
    mlflow.lightgbm.save_model(BOOSTER, place, signature=infer_signature(rows, BOOSTER.predict(rows)) if kind == "mlflow_signed" else None)
