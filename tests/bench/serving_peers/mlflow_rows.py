"""MLflow with rows as FastAPI, LitServe and BentoML get them: a model from code, as its guide writes it, that turns the names of levels into the booster's numbers."""
from __future__ import annotations

import mlflow
import pandas as pd
from mlflow.models import set_model
from shared import BOOSTER, CODES, NAMES


class Trees(mlflow.pyfunc.PythonModel):
    def predict(self, context: object, model_input: pd.DataFrame) -> list[float]:
        coded = model_input.assign(**{name: model_input[name].map(codes) for name, codes in zip(NAMES, CODES) if codes})
        return BOOSTER.predict(coded[NAMES].to_numpy("float64"), num_threads=1).tolist()


set_model(Trees())
