"What fairlearn and AIF360 say of 800 rows: .venv-peers/fair/bin/python tests/bench/fairness_golden.py tests/golden/fairness.json"
import datetime
import json
import sys
import warnings
from pathlib import Path
warnings.filterwarnings("ignore")
import numpy as np
import pandas as pd
import fairlearn
from fairlearn.metrics import MetricFrame, count, selection_rate, true_positive_rate, false_positive_rate, demographic_parity_difference, equalized_odds_difference, equal_opportunity_difference
from sklearn.metrics import accuracy_score, precision_score
from aif360.algorithms.preprocessing import Reweighing
from aif360.datasets import BinaryLabelDataset
rng = np.random.default_rng(20261121)
n = 800
sex, race = rng.choice(["f", "m"], n, p=[.4, .6]), rng.choice(["a", "b", "c", "d"], n, p=[.5, .3, .17, .03])
score = np.round(np.clip(rng.beta(2, 4, n) + .12 * (sex == "m") + .1 * (race == "b"), 0, 1), 3)
y = (rng.random(n) < score).astype(int)
act = (score >= .4).astype(int)
def ece(t, p):
    p, t = np.asarray(p), np.asarray(t)
    b = np.clip((p * 15).astype(int), 0, 14)
    return float(sum(abs((p[b == k] - t[b == k]).sum()) for k in range(15)) / len(p))
out = {"made": datetime.date.today().isoformat(), "fairlearn": fairlearn.__version__, "aif360": "0.6.1", "threshold": .4,
       "rows": {"y": y.tolist(), "p": score.tolist(), "sex": sex.tolist(), "race": race.tolist()}, "frames": {}, "gaps": {}, "weights": {}}
features = {"sex": pd.DataFrame({"sex": sex}), "race": pd.DataFrame({"race": race}), "sex × race": pd.DataFrame({"sex": sex, "race": race})}
for by, f in features.items():
    hard = MetricFrame(metrics={"n": count, "selection_rate": selection_rate, "tpr": true_positive_rate, "fpr": false_positive_rate, "accuracy": accuracy_score}, y_true=y, y_pred=act, sensitive_features=f)
    soft = MetricFrame(metrics={"ece": ece}, y_true=y, y_pred=score, sensitive_features=f)
    table = hard.by_group.join(soft.by_group)
    out["frames"][by] = {(" × ".join(k) if isinstance(k, tuple) else k): {c: float(v) for c, v in r.items()} for k, r in table.iterrows()}
    pr = MetricFrame(metrics=precision_score, y_true=y, y_pred=act, sensitive_features=f)
    out["gaps"][by] = {"demographic_parity": demographic_parity_difference(y, act, sensitive_features=f), "equalized_odds": equalized_odds_difference(y, act, sensitive_features=f),
                       "equal_opportunity": equal_opportunity_difference(y, act, sensitive_features=f), "predictive_parity": pr.difference()}
d = pd.DataFrame({"y": y, "sex": (sex == "m").astype(float), "x": score})
ds = BinaryLabelDataset(df=d, label_names=["y"], protected_attribute_names=["sex"], favorable_label=1, unfavorable_label=0)
out["weights"]["sex"] = Reweighing([{"sex": 0}], [{"sex": 1}]).fit_transform(ds).instance_weights.tolist()
out["gaps"] = {k: {a: float(b) for a, b in v.items()} for k, v in out["gaps"].items()}
Path(sys.argv[1]).write_text(json.dumps(out, separators=(",", ":")))
