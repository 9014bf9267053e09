"Every side-by-side measurement, one after the other: `make bench`."
from __future__ import annotations

import subprocess
import sys

for bench in (["tests.bench.flights"], ["tests.bench.add_feature"], ["tests.bench.data_scale"], ["tests.bench.quality", "install"], ["tests.bench.quality"], ["tests.bench.orchestration", "install"], ["tests.bench.orchestration", "chain", "imports", "wide", "kills"]):
    subprocess.run([sys.executable, "-m", *bench], check=True)
