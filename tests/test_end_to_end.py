"From a person's table to a verdict, a served answer and a verified run, as a new user would do it."
from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import tables

from pipeline.core.run import phase_folders, read_claims, read_receipt
from pipeline.engine.lineage import Receipts

QUICK = ["--set", "train.budget_s=15", "--set", "train.seeds=2", "--set", "evaluate.bootstrap=100"]
BY_NAME = {table.name: table for table in tables.RUNS}


def tell(done) -> str:
    return f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def begin(pilothouse, project: Path, name: str) -> None:
    table = BY_NAME[name]
    file = table.write(project)
    made = pilothouse("new", name, "--data", file, "--target", table.target)
    assert made.returncode == 0, tell(made)


def test_a_binary_table_from_csv_to_verdict_served_verified_and_reproduced(pilothouse, project):
    begin(pilothouse, project, "binary")
    asked = ["run", "params/binary.yml", *QUICK, "--set", "train.distill=true"]
    done = pilothouse(*asked)
    assert done.returncode in (0, 1, 5), tell(done)
    run = project / "outputs/binary/main"
    assert [p.name[:2] for p in phase_folders(run)] == [f"{n:02}" for n in range(1, 11)]
    assert all((p / "report.html").exists() and (p / "notebook.ipynb").exists() for p in phase_folders(run))
    assert (run / "index.html").exists() and (project / "outputs/index.html").exists()
    assert "index.html" in done.stdout + done.stderr
    verdict = json.loads((run / "10_report/answer.json").read_text())["verdict"]
    assert done.returncode == {"go": 0, "no-go": 1, "inconclusive": 5}[verdict]

    again = pilothouse(*asked, "--json")
    assert again.returncode == done.returncode, tell(again)
    assert '"phase_started"' not in again.stdout and again.returncode == done.returncode

    verified = pilothouse("verify", "outputs/binary/main")
    assert verified.returncode == 0, tell(verified)
    receipts = Receipts(run)
    told = [(phase, claim.name) for phase in receipts.phases for claim in read_claims(run / phase)]
    ends = [{step.kind for step in receipts.claim(phase, name).walk()} for phase, name in told if phase != "01_scope"]   # scope reads no rows
    assert len(ends) > 50 and all({"claim", "artifact", "phase", "file"} <= kinds for kinds in ends)

    pl.read_csv(project / "binary.csv").drop("churned").head(50).write_csv(project / "new.csv")
    scored = pilothouse("predict", "outputs/binary/main", "--data", "new.csv", "--out", "scored.csv")
    assert scored.returncode == 0, tell(scored)
    answers = pl.read_csv(project / "scored.csv")
    assert answers.height == 50 and answers.columns[0] == "prediction" and len([c for c in answers.columns if c.startswith("p_")]) == 2

    compared = pilothouse("models", "binary", "--compare", "--json")
    assert compared.returncode == 0 and json.loads(compared.stdout)["candidates"][0]["candidate"] == json.loads(compared.stdout)["best"], tell(compared)

    reproduced = pilothouse("reproduce", "outputs/binary/main")
    assert reproduced.returncode == 0, tell(reproduced)
    assert read_receipt(run / "04_train")["outputs"]["train/students"]["timing"]      # a choice by measured times, and yet the same

    model = next((run / "04_train/model").glob("*.txt"), None) or next((run / "04_train/model").glob("*.json"))
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    broken = pilothouse("verify", "outputs/binary/main")
    assert broken.returncode == 3 and "04_train" in broken.stdout + broken.stderr, tell(broken)


@pytest.mark.parametrize("name", ["multiclass", "regression", "dated"])
def test_other_tables_reach_a_verdict(pilothouse, project, name):
    begin(pilothouse, project, name)
    done = pilothouse("run", f"params/{name}.yml", *QUICK)
    assert done.returncode in (0, 1, 5), tell(done)
    assert "Traceback" not in done.stderr
    assert [p.name[:2] for p in phase_folders(project / f"outputs/{name}/main")] == [f"{n:02}" for n in range(1, 11)]
    verified = pilothouse("verify", f"outputs/{name}/main")
    assert verified.returncode == 0, tell(verified)


def test_one_parameter_runs_exactly_the_phases_that_read_it(pilothouse, project):
    begin(pilothouse, project, "hundred")
    first = pilothouse("run", "params/hundred.yml", *QUICK)
    assert first.returncode in (0, 1, 5), tell(first)
    run = project / "outputs/hundred/main"
    before = {p.name: (p / "receipt.json").stat().st_mtime_ns for p in phase_folders(run)}
    second = pilothouse("run", "params/hundred.yml", *QUICK, "--set", "deploy.rss_mb=900")
    assert second.returncode in (0, 1, 5), tell(second)
    touched = {p.name for p in phase_folders(run) if (p / "receipt.json").stat().st_mtime_ns != before[p.name]}
    wanted = {p.name for p in phase_folders(run) if "deploy.rss_mb" in read_receipt(p)["leaves"]}
    assert wanted <= touched and not touched & {"02_data", "03_label", "04_train", "05_evaluate"}, (touched, wanted)
    assert "deploy.rss_mb" in second.stdout + second.stderr
