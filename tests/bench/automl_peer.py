"""One peer on one table, in the peer's own environment; its clock counts core-seconds, so that a busy machine does not cheat it.

    .venv-peers/automl/bin/python tests/bench/automl_peer.py SYSTEM TRAIN TEST TARGET TASK BUDGET SEED OUT

Writes OUT.npy (answers for the test rows) and OUT.json (seconds, versions, size). Imports nothing of this project.
"""
from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
    os.environ[name] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
warnings.filterwarnings("ignore")

METRICS = {"autogluon": {"binary": "roc_auc", "multiclass": "log_loss", "regression": "root_mean_squared_error"},
           "flaml": {"binary": "roc_auc", "multiclass": "log_loss", "regression": "rmse"}}


def core_seconds() -> float:
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def charge_core_seconds() -> None:
    "From here on the clocks that Python code reads move with this process's work."
    began, now, base = core_seconds(), time.time(), time.monotonic()
    time.time = lambda: now + core_seconds() - began
    time.monotonic = time.perf_counter = lambda: base + core_seconds() - began


def folder_bytes(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def autogluon(preset, train, test, target, task, budget, seed):
    from autogluon.tabular import TabularPredictor, __version__

    charge_core_seconds()
    folder = tempfile.mkdtemp()
    began = core_seconds()
    predictor = TabularPredictor(target, problem_type=task, eval_metric=METRICS["autogluon"][task], path=folder, verbosity=0,
                                 learner_kwargs={"random_state": seed})
    told = {"dynamic_stacking": False, "ag_args_ensemble": {"fold_fitting_strategy": "sequential_local"}} if preset == "best_quality" else {}
    predictor.fit(train, presets=preset, time_limit=budget, num_cpus=1, num_gpus=0, **told)
    fitted = core_seconds()
    answer = predictor.predict(test) if task == "regression" else predictor.predict_proba(test)
    classes = None if task == "regression" else [str(c) for c in answer.columns]
    asked = core_seconds()
    size = folder_bytes(folder)
    facts = {"version": __version__, "model": str(predictor.model_best), "models": len(predictor.model_names())}
    shutil.rmtree(folder)
    return answer.to_numpy(), classes, fitted - began, asked - fitted, size, facts


def flaml(train, test, target, task, budget, seed):
    import flaml
    from flaml import AutoML

    charge_core_seconds()
    began = core_seconds()
    found = AutoML()
    found.fit(train.drop(columns=target), train[target], task="regression" if task == "regression" else "classification",
              metric=METRICS["flaml"][task], time_budget=budget, n_jobs=1, seed=seed, verbose=0, log_file_name="")
    fitted = core_seconds()
    rows = test.drop(columns=target)
    answer = found.predict(rows) if task == "regression" else found.predict_proba(rows)
    classes = None if task == "regression" else [str(c) for c in found.classes_]
    return answer, classes, fitted - began, core_seconds() - fitted, None, {"version": flaml.__version__, "model": str(found.best_estimator)}


def lightgbm_default(train, test, target, task, seed):
    import lightgbm
    import pandas

    began = core_seconds()
    levels = {c: sorted(train[c].dropna().unique()) for c in train.columns if c != target and not pandas.api.types.is_numeric_dtype(train[c])}
    coded = [f.drop(columns=target).assign(**{c: pandas.Categorical(f[c], values) for c, values in levels.items()}) for f in (train, test)]
    coded = [f.set_axis([f"f{i}" for i in range(f.shape[1])], axis=1) for f in coded]
    kind = lightgbm.LGBMRegressor if task == "regression" else lightgbm.LGBMClassifier
    model = kind(n_jobs=1, random_state=seed, verbosity=-1).fit(coded[0], train[target])
    fitted = core_seconds()
    answer = model.predict(coded[1]) if task == "regression" else model.predict_proba(coded[1])
    classes = None if task == "regression" else [str(c) for c in model.classes_]
    size = len(model.booster_.model_to_string())
    return answer, classes, fitted - began, core_seconds() - fitted, size, {"version": lightgbm.__version__}


def main() -> None:
    system, train_path, test_path, target, task, budget, seed, out = sys.argv[1:]
    import pandas

    train, test = pandas.read_parquet(train_path), pandas.read_parquet(test_path)
    told = (train, test, target, task, float(budget), int(seed))
    if system == "flaml":
        result = flaml(*told)
    elif system == "lightgbm":
        result = lightgbm_default(*told[:4], int(seed))
    else:
        result = autogluon({"autogluon_medium": "medium_quality", "autogluon_best": "best_quality"}[system], *told)
    answer, classes, fit_s, predict_s, size, facts = result
    import numpy

    numpy.save(out + ".npy", numpy.asarray(answer, float))
    Path(out + ".json").write_text(json.dumps({"classes": classes, "fit_core_s": fit_s, "predict_core_s": predict_s, "bytes": size, **facts}))


if __name__ == "__main__":
    main()
