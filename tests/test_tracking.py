"Tracking: what W&B holds is what the run claimed, and a run needs no W&B."
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = {"04_train": [("validation_roc_auc", 0.7614, 0.742, 0.777), ("model_mb", 0.49, None, None)],
          "05_evaluate": [("roc_auc", 0.7345, 0.695, 0.766), ("gap, \"carrier\"", -1e-9, -2e-9, 1e-300)]}
SECRET = "canary-5e1f"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    "A finished run in a project of its own, with two phases."
    (tmp_path / "settings.ini").write_text("[tracking]\nmode = offline\nproject = quiet\n")
    folder = tmp_path / "outputs/flights/main"
    for phase, claims in CLAIMS.items():
        place = folder / phase
        place.mkdir(parents=True)
        told = [{"name": name, "value": value, "low": low, "high": high, "n": 100, "title": name, "on": "validation", "unit": "", "better": "higher", "of": ["train/x"],
                 "by": "a:b", "using": {}, "inputs": {}, "cell": "", "limit": None} for name, value, low, high in claims]
        (place / "claims.json").write_text(json.dumps(told))
        artifact = {"file": "model", "kind": "path", "sha256": "ab" * 32, "bytes": 123, "sealed": False, "timing": False}
        (place / "receipt.json").write_text(json.dumps({"verdict": "go", "wall_s": 1.5, "outputs": {f"{phase[3:]}/model": artifact}}))
        (place / "report.html").write_text("<!doctype html><title>report</title><p>ninety-nine")
    board = pl.DataFrame({"candidate": ["trees", "dummy"], "metric": [0.76, None], "may_ship": [True, False]})
    for name in ("leaderboard", "trials", "costs"):
        board.write_parquet(folder / f"04_train/{name}.parquet")
    kept = [("trees", "done", 0.76, ""), ("linear", "failed", None, "no convergence"), ("portfolio slow", "skipped", None, "passed over")]
    pl.DataFrame(kept, schema=["candidate", "status", "metric", "error"], orient="row").write_parquet(folder / "04_train/trials.parquet")
    manifest = {"verdict": "go", "answer": "it is", "leaves": {"train.budget_s": 60.0, "problem.name": "flights", "rollout.stages": [1, 100]}, "threads": 2}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def track(run: Path, mode: str = "offline", **environment: str) -> subprocess.CompletedProcess[str]:
    root = run.parents[2]
    (root / "settings.ini").write_text(f"[tracking]\nmode = {mode}\nproject = quiet\n")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(ROOT)]))
    return subprocess.run([sys.executable, "-m", "pipeline.train.tracking", "outputs/flights/main"], cwd=root, capture_output=True, text=True, timeout=300,
                          env={**clean, "HOME": str(root / "home"), "PYTHONPATH": path, "MY_SECRET": SECRET, **environment})


def offline_runs(run: Path) -> list[Path]:
    return sorted((run.parents[1] / "store/wandb").glob("offline-run-*"))


def read_back(folder: Path) -> dict:  # type: ignore[type-arg]
    done = subprocess.run([sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_offline_run_holds_the_claims(run: Path) -> None:
    pytest.importorskip("wandb")
    done = track(run)
    assert done.returncode == 0 and "tracked" in done.stdout, done.stderr + done.stdout
    [folder] = offline_runs(run)
    held = read_back(folder)
    summary, config = held["summary"], held["config"]
    for phase, claims in CLAIMS.items():
        for name, *numbers in claims:
            for end, value in zip(("", "/low", "/high"), numbers):
                if value is None:
                    assert f"{phase}/{name}{end}" not in summary
                else:
                    assert summary[f"{phase}/{name}{end}"] == value
        assert summary[f"{phase}/verdict"] == "go"
    assert (summary["verdict"], summary["answer"]) == ("go", "it is")
    assert config["train.budget_s"] == 60 and config["rollout.stages"] == [1, 100]
    for table, rows in (("leaderboard", 2), ("trials", 3), ("artifacts", 2)):
        assert summary[f"tables/{table}"]["nrows"] == rows
        stored = json.loads((folder / "files" / summary[f"tables/{table}"]["path"]).read_text())
        assert table != "trials" or [row[1] for row in stored["data"]] == ["done", "failed", "skipped"]
        assert table != "artifacts" or [row[-1] for row in stored["data"]] == ["ab" * 32] * 2
    assert set(held["summary"]) >= {"reports/04_train", "reports/05_evaluate"}


def test_tracking_the_same_run_again_adds_nothing(run: Path) -> None:
    pytest.importorskip("wandb")
    assert track(run).returncode == 0 and track(run).returncode == 0
    assert len(offline_runs(run)) == 1


def test_no_secret_and_no_home_folder_is_touched(run: Path) -> None:
    pytest.importorskip("wandb")
    track(run)
    root = run.parents[2]
    for path in root.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
    assert not (root / "home").exists()


@pytest.mark.parametrize("shim", ["raise ImportError('no wandb here')", "raise RuntimeError('broken on import')"])
def test_without_wandb_the_run_stands(run: Path, tmp_path: Path, shim: str) -> None:
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim/wandb.py").write_text(shim)
    done = track(run, PYTHONPATH=str(tmp_path / "shim"))
    assert done.returncode == 0, done.stderr
    assert "nothing was tracked, the run stands without it" in done.stdout
    assert not offline_runs(run)


def test_switched_off_it_says_so(run: Path) -> None:
    done = track(run, "off")
    assert done.returncode == 0 and "tracking is off" in done.stdout and not offline_runs(run)


@pytest.mark.parametrize(("environment", "said"), [
    ({}, "WANDB_API_KEY is not set"),
    ({"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "127.0.0.1 does not answer"),
])
def test_online_without_the_host_falls_back_in_words(run: Path, environment: dict[str, str], said: str) -> None:
    pytest.importorskip("wandb")
    done = track(run, "online", **environment)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and "kept offline" in done.stdout
    assert len(offline_runs(run)) == 1


def test_a_folder_that_is_no_run_is_refused(run: Path) -> None:
    (run / "manifest.json").unlink()
    done = track(run)
    assert done.returncode == 2 and "no manifest.json" in done.stderr and "Traceback" not in done.stderr
