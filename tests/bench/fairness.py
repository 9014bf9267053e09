"""What it costs to level groups: deterministic group thresholds against fairlearn's ThresholdOptimizer, at the same gap.

    python -m tests.bench.fairness install     # fairlearn in an environment of its own, .venv-peers/fair
    python -m tests.bench.fairness [show]      # Adult (its fixed split) and COMPAS (random splits: its last fifth by date is another population)

Both get the same scores of one LightGBM and the same rows to make the rule from (30 % of the training rows); both are judged on
the same test rows, over five seeds. Ours is also measured on the scores of a second model of the same rows, trained with Kamiran and
Calders' weights (reweighed): with one threshold for all, which treats no group differently, and with thresholds on top. The peer tosses coins: its numbers are means over twenty seeds of its own, and `flips` is the
share of people whom two of them answer differently. A test set of one draw moves every gap: where none of ours comes down to the peer's
mean gap, the one that comes nearest among those at least as accurate is shown with the difference (paired over seeds, 95 %). Seconds are CPU seconds of making the rule.

Results go to tests/bench/results/fairness.json and are printed as a table.
"""
from __future__ import annotations

import datetime as dt
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

from pipeline.core.bounds import student  # noqa: E402
from pipeline.evaluate.cohorts import decision_gaps  # noqa: E402
from pipeline.evaluate.levelling import KINDS, fit_rule  # noqa: E402
from pipeline.train.reweighing import learn_grouping, reweighing  # noqa: E402

SHARED, PEER = ROOT.parent / "shared/data", ROOT / ".venv-peers/fair/bin/python"
RESULTS = Path(__file__).parent / "results" / "fairness.json"
FEW = 200      # rows under which a group is taken together with others: on six rows every gap is chance, and the peer refuses a group of one class
SEEDS, ASKED, CRITERIA, COLUMNS = 5, (0.0, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05), ("demographic_parity", "equalized_odds"), ("sex", "race")
TABLES = {"adult": ("income", []), "compas": ("two_year_recid", ["compas_screening_date", "decile_score"])}
PEER_CODE = """
import json, sys, time, warnings
warnings.filterwarnings("ignore")
import fairlearn, numpy as np, pandas as pd
from fairlearn.metrics import demographic_parity_difference, equalized_odds_difference
from fairlearn.postprocessing import ThresholdOptimizer
from sklearn.base import BaseEstimator, ClassifierMixin
class Given(ClassifierMixin, BaseEstimator):
    def fit(self, X, y): self.classes_ = np.array([0, 1]); return self
    def predict(self, X): return (np.asarray(X)[:, 0] >= .5) * 1
    def predict_proba(self, X): p = np.asarray(X)[:, 0]; return np.column_stack([1 - p, p])
    def __sklearn_is_fitted__(self): return True
found = {"version": fairlearn.__version__}
gaps = {"demographic_parity": demographic_parity_difference, "equalized_odds": equalized_odds_difference}
for name, path in json.loads(sys.argv[1]).items():
    table = pd.read_parquet(path); made, test = table[table.part == 1], table[table.part == 2]
    for by in ("sex", "race"):
        for criterion, gap in gaps.items():
            start = time.process_time()
            try:
                rule = ThresholdOptimizer(estimator=Given().fit(None, None), constraints=criterion, objective="accuracy_score", prefit=True, predict_method="predict_proba")
                rule.fit(made[["p"]], made.y, sensitive_features=made[by])
            except ValueError as error:
                found[f"{name}|{by}|{criterion}"] = {"error": str(error)}; continue
            spent = time.process_time() - start
            told = [rule.predict(test[["p"]], sensitive_features=test[by], random_state=s) for s in range(20)]
            found[f"{name}|{by}|{criterion}"] = {"accuracy": float(np.mean([(t == test.y).mean() for t in told])), "cpu_s": spent,
                "gap": float(np.mean([gap(test.y, t, sensitive_features=test[by]) for t in told])), "flips": float(np.mean([(told[i] != told[i + 1]).mean() for i in range(0, 20, 2)]))}
print(json.dumps(found))
"""


def install() -> None:
    "The peer, with its bytecode compiled."
    uv = [sys.executable, "-m", "uv"]
    if not PEER.exists():
        subprocess.run([*uv, "venv", "-q", "--python", sys.executable, str(PEER.parents[1])], check=True)
    subprocess.run([*uv, "pip", "install", "-q", "--python", str(PEER), "--compile-bytecode", "fairlearn>=0.15", "aif360>=0.6", "pyarrow"], check=True)


def scored(name: str, seed: int) -> pl.DataFrame:
    "Outcome, score, groups; part 1 makes the rule, part 2 judges it."
    import lightgbm

    target, dropped = TABLES[name]
    table = pl.read_parquet(SHARED / f"{name}.parquet")
    y = (table[target].cast(pl.String) == table[target].cast(pl.String).max()).cast(int).to_numpy()
    coded = table.drop(target, "__split", *dropped).with_columns(pl.col(pl.String).cast(pl.Categorical).to_physical())
    matrix = coded.with_columns(pl.all().cast(pl.Float64)).to_numpy()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    test = np.flatnonzero((table["__split"] == "test").to_numpy()) if name == "adult" else order[: len(y) // 5]
    train = rng.permutation(np.setdiff1d(order, test))
    learn, made = train[: int(0.7 * len(train))], train[int(0.7 * len(train)):]
    categories = [i for i, c in enumerate(coded.columns) if table.schema[c] == pl.String]
    config = {"objective": "binary", "verbose": -1, "num_threads": 1, "seed": seed, "learning_rate": 0.05, "num_leaves": 15}

    def score(weights: np.ndarray | None) -> pl.Series:
        model = lightgbm.train(config, lightgbm.Dataset(matrix[learn], y[learn], weight=weights, categorical_feature=categories), 150)
        return pl.Series(np.asarray(model.predict(matrix)))

    part = np.zeros(len(y), int)
    part[made], part[test] = 1, 2
    table = table.with_columns(pl.when(pl.len().over(c) < FEW).then(pl.lit("all others")).otherwise(pl.col(c)).alias(c) for c in COLUMNS)
    weighed = {f"p_{c}": score(reweighing(y[learn], table[c].to_numpy()[learn].astype(str))) for c in COLUMNS}
    return table.select(*COLUMNS).with_columns(y=pl.Series(y), p=score(None), part=pl.Series(part), **weighed).filter(pl.col("part") > 0)


def level(table: pl.DataFrame, by: str, criterion: str) -> list[dict[str, Any]]:
    "Our rules at every asked gap, on the plain scores and on the reweighed ones; and the reweighed ones with one threshold."
    made, test, found = table.filter(pl.col("part") == 1), table.filter(pl.col("part") == 2), []

    def judge(kind: str, asked: float | None, acted: np.ndarray, spent: float) -> None:
        gap = next(g["value"] for g in decision_gaps(test["y"].to_numpy(), acted, test[by].to_numpy()) if g["gap"] == criterion)
        found.append({"kind": kind, "asked": asked, "accuracy": float((acted == test["y"].to_numpy()).mean()), "gap": float(gap), "cpu_s": spent})

    judge("one threshold", None, test["p"].to_numpy() >= 0.5, 0.0)
    judge("reweighed", None, test[f"p_{by}"].to_numpy() >= 0.5, 0.0)
    for start, score in (("", "p"), ("reweighed, ", f"p_{by}")):
        for kind in KINDS if criterion == "equalized_odds" else KINDS[:1]:
            for asked in ASKED:
                begun = time.process_time()
                rule = fit_rule(made["y"].to_numpy(), made[score].to_numpy(), made[by], learn_grouping(made[by]), criterion, asked, kind=kind)
                spent = time.process_time() - begun
                judge(start + kind, asked, rule.act(test[score].to_numpy(), test[by]), spent)
    return found


def measure() -> dict[str, Any]:
    "All tables, seeds, columns and criteria; means over the seeds that the peer could do."
    told: dict[str, Any] = {"rows": []}
    with tempfile.TemporaryDirectory() as folder:
        paths, tables = {}, {}
        for name in TABLES:
            for seed in range(SEEDS):
                tables[name, seed] = scored(name, seed)
                paths[f"{name}|{seed}"] = f"{folder}/{name}{seed}.parquet"
                tables[name, seed].write_parquet(paths[f"{name}|{seed}"])
        peer = json.loads(subprocess.run([PEER, "-c", PEER_CODE, json.dumps(paths)], capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        told["fairlearn"] = peer.pop("version")
        for name in TABLES:
            for by in COLUMNS:
                for criterion in CRITERIA:
                    theirs = {s: peer[f"{name}|{s}|{by}|{criterion}"] for s in range(SEEDS)}
                    able = [s for s, t in theirs.items() if "error" not in t]
                    ours = {s: level(tables[name, s], by, criterion) for s in range(SEEDS)}
                    row: dict[str, Any] = {"table": name, "by": by, "criterion": criterion, "peer_could": len(able), "seeds": SEEDS}
                    row["peer"] = {k: statistics.mean(theirs[s][k] for s in able) for k in ("accuracy", "gap", "flips", "cpu_s")} if able else None
                    over = [[ours[s][i]["gap"] - theirs[s]["gap"] for s in able] for i in range(len(ours[0]))]
                    row["ours"] = [{"kind": o["kind"], "asked": o["asked"]} | {k: statistics.mean(ours[s][i][k] for s in able or range(SEEDS)) for k in ("accuracy", "gap", "cpu_s")}
                                   | {"gap_over_peer": over_seeds(over[i])}
                                   for i, o in enumerate(ours[0])]
                    told["rows"].append(row)
    return told


def over_seeds(values: list[float]) -> list[float] | None:
    "Mean, low and high of the 95 % interval over seeds, where there are two."
    if len(values) < 2:
        return None
    mean, half = statistics.mean(values), student(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return [mean, mean - half, mean + half]


def ahead(row: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    "Ours with the highest accuracy among those whose gap is at most the peer's; else the smallest gap among those at least as accurate, if chance explains it."
    fits = [o for o in row["ours"] if row["peer"] and o["gap"] <= row["peer"]["gap"]]
    near = [o for o in row["ours"] if o["gap_over_peer"] and o["gap_over_peer"][1] <= 0 and o["accuracy"] >= row["peer"]["accuracy"]]
    best = max(fits, key=lambda o: o["accuracy"]) if fits else min(near, key=lambda o: o["gap"], default=None)
    return best, "" if fits or best is None else ", gap {:+.4f} ({:+.4f} to {:+.4f})".format(*best["gap_over_peer"])


def main(asked: list[str]) -> None:
    if asked == ["install"]:
        return install()
    kept = json.loads(RESULTS.read_text()) if asked == ["show"] else {"at": dt.datetime.now(dt.UTC).isoformat(timespec="minutes"), "cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2), **measure()}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"| table, groups, criterion | fairlearn {kept['fairlearn']}: accuracy, gap | flips | CPU s | ours at that gap: accuracy, gap | gap asked, kind | flips | CPU s | one threshold: accuracy, gap | reweighed |\n|---|---|---:|---:|---|---|---:|---:|---|---|")
    for row in kept["rows"]:
        peer, (found, chance) = row["peer"], ahead(row)
        best = found or min(row["ours"], key=lambda o: o["gap"])
        plain, weighed = row["ours"][0], row["ours"][1]
        could = "" if row["peer_could"] == row["seeds"] else f" ({row['peer_could']} of {row['seeds']} seeds, else refused)"
        print(f"| {row['table']}, {row['by']}, {row['criterion'].replace('_', ' ')} | {peer['accuracy']:.4f}, {peer['gap']:.4f}{could} | {peer['flips']:.1%} | {peer['cpu_s']:.3f} "
              f"| {best['accuracy']:.4f}, {best['gap']:.4f}{chance} | {'–' if best['asked'] is None else format(best['asked'], 'g')}, {best['kind']} | 0 % | {best['cpu_s']:.3f} "
              f"| {plain['accuracy']:.4f}, {plain['gap']:.4f} | {weighed['accuracy']:.4f}, {weighed['gap']:.4f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
