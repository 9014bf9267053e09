"""Quality a core-second: this search, AutoGluon, FLAML and LightGBM's default on the same tables, rows and budgets.

    python -m tests.bench.models install                    # the peers, in an environment of their own under .venv-peers/
    python -m tests.bench.models peers [20] [--seeds 3]     # their answers for the test rows, kept in outputs/bench/models
    python -m tests.bench.models ours [20] [--seeds 3]      # ours
    python -m tests.bench.models score                      # everything that was answered, side by side

Budgets are core-seconds: each system fits in a process of its own on one thread, and the clock that it reads counts the seconds in
which that process worked, so that a busy machine takes nothing away. What is compared are the answers for the test rows of
../shared/data's fixed split (time order where there is time): ROC AUC, log loss, RMSE. A difference is significant when the 95 %
interval of a paired bootstrap over test rows, all seeds together, leaves out zero. Results: tests/bench/results/models.json.
"""
from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]
DATA, KEPT = ROOT.parent / "shared" / "data", ROOT / "outputs" / "bench" / "models"
PEER = ROOT / ".venv-peers" / "automl" / "bin" / "python"
RESULTS = Path(__file__).parent / "results" / "models.json"
TABLES = ("adult", "employment_ma", "diamonds", "us_accidents", "electricity", "gss_wages", "loans_rate", "compas")
PEERS = {12: ("autogluon_medium",), 20: ("lightgbm", "flaml", "autogluon_medium"), 60: ("lightgbm", "flaml", "autogluon_best"), 240: ("lightgbm", "flaml", "autogluon_best")}
PEERS_AT = {12: 20}   # how far 12 core-seconds get beside a peer's 20
METRIC = {"binary": "ROC AUC", "multiclass": "log loss", "regression": "RMSE"}
DRAWS = 1000


def install() -> None:
    "torch first, by pip, which finds the CPU build; torchvision has none, so AutoGluon does without fastai's net."
    uv = [sys.executable, "-m", "uv"]
    if not PEER.exists():
        subprocess.run([*uv, "venv", "-q", "--seed", "--python", sys.executable, str(PEER.parents[1])], check=True)
    subprocess.run([str(PEER), "-m", "pip", "install", "-q", "torch==2.13.0"], check=True)
    install = [*uv, "pip", "install", "-q", "--python", str(PEER)]
    subprocess.run([*install, "torch==2.13.0", "autogluon.tabular[lightgbm,catboost]==1.6.*", "flaml[automl]==2.7.*", "pyarrow"], check=True)
    subprocess.run([*uv, "pip", "uninstall", "-q", "--python", str(PEER), "torchvision", "xgboost", "xgboost-cpu"], check=False)
    subprocess.run([*install, "--reinstall", "--no-deps", "xgboost-cpu==3.2.0"], check=True)


def table(data: Path, name: str) -> dict[str, Any]:
    "Paths of the two parts, what is predicted, and the folder's own facts."
    facts = json.loads((data / "meta.json").read_text())[name]
    rows = pl.read_parquet(data / f"{name}.parquet").drop(facts["drop"])
    KEPT.mkdir(parents=True, exist_ok=True)
    paths = {}
    for part in ("train", "test"):
        paths[part] = KEPT / f"{name}_{part}.parquet"
        if not paths[part].exists():
            rows.filter(pl.col("__split") == part).drop("__split").write_parquet(paths[part])
    return {"name": name, "target": facts["target"], "task": facts["task"], "time": facts["time"], **paths}


def answered(system: str, name: str, budget: float, seed: int) -> Path:
    return KEPT / f"{name}-{system}-{budget:g}-{seed}"


def ask(systems: list[str], data: Path, names: list[str], budget: float, seeds: range, again: bool = False) -> None:
    "Run what has no answer yet, one process each."
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "POLARS_MAX_THREADS": "1"}
    for name in names:
        told = table(data, name)
        for system in systems:
            for seed in seeds[:1] if system == "lightgbm" else seeds:
                out = answered(system, name, 0 if system == "lightgbm" else budget, seed)
                if Path(f"{out}.json").exists() and not again:
                    continue
                command = [str(PEER), str(ROOT / "tests/bench/automl_peer.py"), system] if system != "ours" else [sys.executable, "-m", "tests.bench.models", "one"]
                rest = [told["train"], told["test"], told["target"], told["task"], budget, seed, out]
                done = subprocess.run([*command, *map(str, rest)], cwd=ROOT if system == "ours" else KEPT, env=environment, capture_output=True, text=True)
                if done.returncode:
                    print(f"{system} on {name}: {done.stderr[-600:]}", flush=True)
                    continue
                facts = json.loads(Path(f"{out}.json").read_text())
                print(name, system, seed, round(facts["fit_core_s"], 1), facts.get("model", ""), flush=True)


# --- scores, the same code for all --------------------------------------------------------------------------------------

def weighted(task: str, y: np.ndarray, p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    "(draws,) the metric under each draw's weights (draws, rows), turned so that more is better."
    if task == "regression":
        return -np.sqrt(weights @ (y - p) ** 2 / weights.sum(axis=1))
    if task == "multiclass":
        return weights @ np.log(np.clip(p[np.arange(len(y)), y] / p.sum(axis=1), 1e-15, 1)) / weights.sum(axis=1)
    order = np.argsort(p, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(p[order]) != 0])
    w, hit = weights[:, order], y[order] == 1
    positive = np.add.reduceat(w * hit, starts, axis=1)
    negative = np.add.reduceat(w * ~hit, starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    return (positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))


def load(out: Path, classes: list[str], task: str) -> tuple[np.ndarray, dict[str, Any]]:
    answer, facts = np.load(f"{out}.npy"), json.loads(Path(f"{out}.json").read_text())
    if task == "regression":
        return answer, facts
    answer = answer[:, [facts["classes"].index(c) for c in classes]]
    return (answer[:, 1] if task == "binary" else answer), facts


def score(data: Path, names: list[str], budget: float) -> dict[str, Any]:
    "All systems of a budget on all tables that have answers: metric, rank, and the paired interval against ours."
    out: dict[str, Any] = {}
    for name in names:
        told = table(data, name)
        truth = pl.read_parquet(told["test"], columns=[told["target"]])[told["target"]]
        trained = pl.read_parquet(told["train"], columns=[told["target"]])[told["target"]]
        classes = [] if told["task"] == "regression" else [str(c) for c in sorted(trained.unique().to_list())]
        y = truth.to_numpy().astype(float) if not classes else np.array([classes.index(str(v)) for v in truth.to_list()])
        weights = np.random.default_rng(0).multinomial(len(y), np.full(len(y), 1 / len(y)), DRAWS).astype(np.float32)
        weights = np.vstack([np.ones((1, len(y)), np.float32), weights])
        rows: dict[str, Any] = {}
        for system in ("ours", "ours_shipped", *PEERS[int(budget)]):
            at = 0 if system == "lightgbm" else budget if system.startswith("ours") else PEERS_AT.get(int(budget), budget)
            outs = [answered(system, name, at, seed) for seed in range(1, 11) if Path(f"{answered(system, name, at, seed)}.json").exists()]
            loaded = [load(place, classes, told["task"]) for place in outs]
            if not loaded:
                continue
            drawn = np.stack([weighted(told["task"], y, p.astype(np.float64), weights) for p, _ in loaded])
            rows[system] = {"drawn": drawn.mean(axis=0), "each": drawn[:, 0],
                            "fit_core_s": [f["fit_core_s"] for _, f in loaded], "predict_core_s": float(np.median([f["predict_core_s"] for _, f in loaded])),
                            "mb": float(np.median([f["bytes"] for _, f in loaded])) / 1e6 if loaded[0][1].get("bytes") else None,
                            "version": loaded[0][1].get("version"), "seeds": len(loaded)}
        sign = 1 if told["task"] == "binary" else -1
        ours = rows.get("ours")
        kept = {}
        for system, row in rows.items():
            gap = None if ours is None else ours["drawn"] - row["drawn"]
            kept[system] = {"value": sign * float(row["drawn"][0]), "by_seed": [sign * float(v) for v in row["each"]], "seeds": row["seeds"],
                            "fit_core_s": float(np.median(row["fit_core_s"])), "fit_core_s_most": float(max(row["fit_core_s"])),
                            "predict_core_s": row["predict_core_s"], "mb": row["mb"], "version": row["version"],
                            "ours_ahead_by": None if gap is None else float(gap[0]),
                            "interval": None if gap is None else [float(v) for v in np.quantile(gap[1:], [0.025, 0.975])]}
        out[name] = {"metric": METRIC[told["task"]], "rows": len(y), "systems": kept}
    return out


def ranks(scores: dict[str, Any], systems: tuple[str, ...]) -> dict[str, float]:
    "Average rank over tables, best 1; equal values share a rank."
    from scipy.stats import rankdata

    tables = [t for t in scores.values() if all(s in t["systems"] for s in systems)]
    if not tables:
        return {}
    better = np.array([[(-1 if t["metric"] == "ROC AUC" else 1) * t["systems"][s]["value"] for s in systems] for t in tables])
    return dict(zip(systems, map(float, rankdata(better, axis=1).mean(axis=0))))


def show(budget: float, scores: dict[str, Any]) -> str:
    systems = [s for s in ("ours", "ours_shipped", *PEERS[int(budget)]) if any(s in t["systems"] for t in scores.values())]
    lines = [f"\n{budget:g} core-seconds{f', peers {PEERS_AT[int(budget)]}' if budget in PEERS_AT else ''}", "| table | metric | " + " | ".join(systems) + " |", "|---" * (len(systems) + 2) + "|"]
    for name, found in scores.items():
        cells = []
        for system in systems:
            row = found["systems"].get(system)
            mark = ""
            if row and row["interval"] and system != "ours":
                mark = " ▼" if row["interval"][0] > 0 else " ▲" if row["interval"][1] < 0 else " ="
            cells.append(f"{row['value']:.5g}{mark} ({row['fit_core_s']:.0f} s)" if row else "–")
        lines.append(f"| {name} | {found['metric']} | " + " | ".join(cells) + " |")
    lines.append("| average rank | | " + " | ".join(f"{v:.2f}" for v in ranks(scores, tuple(s for s in systems if s != "ours_shipped")).values()) + " |")
    lines.append("▼ significantly behind ours, ▲ ahead of it, = tied (95 %, paired bootstrap over test rows)")
    return "\n".join(lines)


def one(train: str, test: str, target: str, task: str, budget: str, seed: str, out: str) -> None:
    "Ours on one table, in this process: the weighed best and the model that is shipped."
    from tests.bench.automl_peer import core_seconds
    from pipeline.train.tables import fit_table

    frame, rows = pl.read_parquet(train), pl.read_parquet(test)
    began = core_seconds()
    found = fit_table(frame, target, task, budget_s=float(budget), clock="core", seed=int(seed))
    fitted = core_seconds()
    for name, model in (("", found.best), ("_shipped", found.shipped)):
        asked = core_seconds()
        answer = model.predict(rows)
        took = core_seconds() - asked
        place = out.replace("-ours-", f"-ours{name}-")
        np.save(f"{place}.npy", answer)
        size = sum(len(content) for content in model.estimator.to_files().values())
        told = {"classes": model.classes or None, "fit_core_s": fitted - began, "predict_core_s": took, "bytes": size, "model": model.family,
                "source": hashlib.sha256(b"".join(p.read_bytes() for p in sorted((ROOT / "pipeline/train").glob("*.py")))).hexdigest()[:12]}
        Path(f"{place}.json").write_text(json.dumps(told))


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        return one(*sys.argv[2:])
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("what", choices=["install", "peers", "ours", "score"])
    asked.add_argument("budget", nargs="*", type=int, default=[20])
    asked.add_argument("--seeds", type=int, default=3)
    asked.add_argument("--first", type=int, default=1, help="the first of these seeds")
    asked.add_argument("--systems", nargs="*", help="of the peers, only these")
    asked.add_argument("--tables", nargs="*")
    asked.add_argument("--data", type=Path, default=DATA, help="another folder of parquet tables with a meta.json like that of ../shared/data")
    asked.add_argument("--again", action="store_true")
    told = asked.parse_args()
    if told.what == "install":
        return install()
    if not told.data.is_dir():
        sys.exit(f"the tables of {told.data} are not there; nothing was measured")
    names = told.tables or (list(TABLES) if told.data == DATA else sorted(json.loads((told.data / "meta.json").read_text())))
    for budget in told.budget:
        if told.what in ("peers", "ours"):
            ask(["ours"] if told.what == "ours" else [p for p in PEERS[budget] if p in (told.systems or PEERS[budget])] if budget not in PEERS_AT else [], told.data, names, budget,
                range(told.first, told.first + told.seeds), told.again)
        scores = score(told.data, names, budget)
        print(show(budget, scores))
        if told.what == "score" and told.data == DATA:
            whole = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            whole[str(budget)] = {"date": dt.date.today().isoformat(), "cores": os.cpu_count(), "tables": scores,
                                  "average_rank": ranks(scores, ("ours", *PEERS[budget]))}
            RESULTS.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
