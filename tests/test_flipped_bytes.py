"One byte changed anywhere in what a run read, wrote or kept: `verify` refuses, and names the file."
from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.core.errors import IntegrityError
from pipeline.core.settings import load_settings
from pipeline.data.lineage import kept_tables
from pipeline.engine.verify import verify_run

DRAWN = {"index.html"}        # pages that are drawn again from the records
SECRET = {"audit.pem"}        # the private key: the public one and every signature are checked
BY_ENTRY = {"audit.jsonl", "audit.head", "audit.pub"}   # told by the entry that is wrong


def test_every_flipped_byte_is_told(project: Path, pilothouse: Callable[..., Any]) -> None:
    rng = random.Random(5)
    rows = {"size": [rng.gauss(0, 1) for _ in range(600)], "kind": [rng.choice("abc") for _ in range(600)]}
    pl.DataFrame({**rows, "late": ["yes" if s + rng.gauss(0, 1) > 0.5 else "no" for s in rows["size"]]}).write_csv(project / "trips.csv")
    assert pilothouse("new", "trips", "--data", "trips.csv", "--target", "late").returncode == 0
    for phase in ("01_scope", "02_data"):
        done = pilothouse("run", "trips", "--only", phase)
        assert done.returncode == 0, done.stderr
    settings = load_settings(project)
    run, store = settings.outputs / "trips/main", settings.store

    def verified() -> None:
        verify_run(run, settings)
        kept_tables(run, store)

    verified()
    files = [p for folder in (run, store / "tables", store / "keys") for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]
    files += [store / "audit.jsonl", store / "audit.head", project / "trips.csv"]
    files = [f for f in files if f.name not in DRAWN | SECRET and not f.name.endswith((".lock", "lock"))]
    assert len(files) > 40 and any(f.suffix == ".parquet" and "tables" in f.parts for f in files) and any("_delta_log" in f.parts for f in files)
    for file in files:
        whole, mode = file.read_bytes(), file.stat().st_mode
        place = rng.randrange(len(whole))
        os.chmod(file, 0o600)
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        shown = file.stem if file.suffix == ".sha256" else file.name
        with pytest.raises(IntegrityError, match=".*" if file.name in BY_ENTRY else shown.replace(".", r"\.")):
            verified()
        file.write_bytes(whole)
        os.chmod(file, mode)
    verified()
