"Every side-by-side measurement, one after the other: `make bench`."
from __future__ import annotations

import subprocess
import sys

for bench in (["tests.bench.flights"], ["tests.bench.add_feature"], ["tests.bench.data_scale"], ["tests.bench.quality", "install"], ["tests.bench.quality"], ["tests.bench.orchestration", "install"], ["tests.bench.orchestration", "chain", "imports", "wide", "kills"],
              ["tests.bench.models", "install"], ["tests.bench.models", "peers", "20", "60"], ["tests.bench.models", "ours", "20", "60"], ["tests.bench.models", "score", "20", "60"],
              ["tests.bench.deployed"], ["tests.bench.intervals"], ["tests.bench.curves"], ["tests.bench.texts"],
              ["tests.bench.fairness", "install"], ["tests.bench.fairness"],
              ["tests.bench.serving", "install"], ["tests.bench.serving"], ["tests.bench.serving", "fuzz", "soak"]):
    subprocess.run([sys.executable, "-m", *bench], check=True)
