"A run observes what a phase used, keeps what it made whole, and never lets a missing number pass."
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from pipeline.core import audit
from pipeline.core.errors import EnvironmentFault, GateFailed, Inconclusive, InputError, IntegrityError
from pipeline.core.run import Estimate, judge, open_run, phase_folders, read_claims, read_receipt, run_folder
from pipeline.core.settings import load_settings

PROBLEM = """\
problem: {name: tiny, statement: Does the run keep what it saw?, kpi: {name: x, baseline: 0, target: 1, unit: ''}, task: binary, target: y}
data: {sources: [{name: t, kind: csv, path: t.csv}]}
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    (tmp_path / "settings.ini").write_text("")
    (tmp_path / "tiny.yml").write_text(PROBLEM)
    (tmp_path / "t.csv").write_text("x,y\n1,0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PILOTHOUSE_ENGINE", raising=False)
    return tmp_path


def opened(phase: str, run: str = "outputs/tiny/main"):
    return open_run(phase, "tiny.yml", run)


def finish(run, answer: str = "Done.") -> Path:
    run.conclude(answer)
    run.finish()
    return run.folder / run.phase


def test_a_phase_appears_when_it_is_finished_and_not_before(place):
    run = opened("02_data")
    run.save("data/train", pl.DataFrame({"x": [1, 2]}))
    assert phase_folders(run.folder) == []
    folder = finish(run)
    assert sorted(p.name for p in folder.iterdir()) == ["answer.json", "checks.json", "claims.json", "decisions.json", "receipt.json", "train.parquet"]
    later = opened("04_train")
    assert later.load("data/train").height == 2
    assert later.has("data/train") and not later.has("data/production") and not later.has("train/model")
    receipt = read_receipt(finish(later))
    assert receipt["loaded"] == {"data/train": read_receipt(folder)["outputs"]["data/train"]["sha256"], "data/production": ""}
    assert set(receipt["modules"]) >= {"pipeline.core.run", "pipeline.core.problem"} and receipt["python"].startswith("cpython 3")


def test_only_leaves_that_were_read_are_on_the_receipt(place):
    run = opened("04_train")
    assert run.problem.train.budget_s == 60 and len(run.problem.data.sources) == 1
    assert run.seed == 7
    leaves = read_receipt(finish(run))["leaves"]
    assert set(leaves) == {"train.budget_s", "data.sources", "problem.seed"} and leaves["data.sources"][0]["path"] == "t.csv"
    with pytest.raises(AttributeError, match="read-only"):
        run.problem.train.budget_s = 5


def test_gates_fail_by_exception_outside_the_engine_after_everything_is_kept(place, monkeypatch):
    run = opened("05_evaluate")
    run.check("enough", Estimate(.6, .55, .65), at_least=.7)
    run.conclude("Not enough.")
    with pytest.raises(GateFailed, match="05_evaluate is no-go: enough: 0.6 .* limit ≥ 0.7"):
        run.finish()
    assert json.loads((run.folder / "05_evaluate/answer.json").read_text()) == {"answer": "Not enough.", "verdict": "no-go"}
    run = opened("05_evaluate")
    run.check("enough", Estimate(.7, .65, .75), at_least=.68, bound="low")
    run.conclude("Perhaps.")
    with pytest.raises(Inconclusive):
        run.finish()
    monkeypatch.setenv("JPY_SESSION_NAME", "05_evaluate.ipynb")
    run = opened("05_evaluate")
    run.check("enough", None, at_least=.68)
    run.conclude("Nothing measured.")
    run.finish()
    assert read_receipt(run.folder / "05_evaluate")["verdict"] == "no-go"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), None])
@pytest.mark.parametrize("limit", [{"at_least": 0.0}, {"at_most": 1e9}])
@pytest.mark.parametrize("bound", ["value", "low", "high"])
def test_a_missing_number_is_never_a_go(value, limit, bound):
    estimate = None if value is None else Estimate(value, value, value)
    assert judge(estimate, limit.get("at_least"), limit.get("at_most"), bound) == "no-go"
    assert judge(Estimate(.5), limit.get("at_least"), limit.get("at_most"), bound) == ("go" if bound == "value" else "no-go")


def test_a_seal_opens_only_through_the_ledger(place):
    run = opened("02_data")
    run.save("data/holdout", pl.DataFrame({"x": [1]}), sealed=True)
    folder = finish(run)
    assert (folder / "holdout.parquet").stat().st_mode & 0o777 == 0o600
    run = opened("04_train")
    with pytest.raises(IntegrityError, match="sealed"):
        run.load("data/holdout")
    from pipeline.core.run import as_estimate

    with pytest.raises(InputError, match="sealed"):
        run.claim("x", of="data/holdout", by=as_estimate)
    os.close(run._lock)
    for look in (1, 2):
        run = opened("05_evaluate")
        run.open_sealed("data/holdout", "final evaluation")
        run.open_sealed("data/holdout", "replay", look=False)
        assert run.looks("data/holdout") == look
        os.close(run._lock)
    assert audit.verify(run.store) == 4


def share(frame, column="x"):
    "Not a library function: a claim by it must be refused."
    return float(frame[column].mean())


def test_a_claim_names_a_library_function_and_can_be_recomputed(place):
    from pipeline.core.receipt import source_digest

    run = opened("02_data")
    run.save("data/train", pl.DataFrame({"x": [1.0, 3.0]}))
    with pytest.raises(IntegrityError, match="only functions of this package"):
        run.claim("mean", of="data/train", by=share)
    with pytest.raises(InputError, match="did you mean 'data/train'"):
        run.claim("mean", of="data/trian", by=source_digest)
    from pipeline.core.run import as_estimate

    run.save("data/number", "0.25")
    claim = run.claim("quarter", of="data/number", by=as_estimate, unit="share")
    assert claim.value == .25 and claim.inputs["data/number"] == run._outputs["data/number"].sha256
    with pytest.raises(InputError, match="made twice"):
        run.claim("quarter", of="data/number", by=as_estimate)
    stored = read_claims(finish(run))
    assert stored == [claim] and stored[0].by == "pipeline.core.run:as_estimate"


def test_two_processes_cannot_hold_one_phase(place):
    run = opened("02_data")
    code = "from pipeline.core.run import open_run; open_run('02_data', 'tiny.yml', 'outputs/tiny/main')"
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=place)
    assert second.returncode == 1 and "is open in another process" in second.stderr
    finish(run)
    assert subprocess.run([sys.executable, "-c", code], cwd=place).returncode == 0


@pytest.mark.parametrize("run", ["../x/y", "/tmp/x", "outputs/tiny/../../x", "outputs/a b/main", "outputs/tiny/main/deeper", "outputs/store/x",
                                 "outputs/tiny/%2e%2e", "outputs/tiny/..\\x", "outputs/other/main"])
def test_a_run_stays_in_the_outputs(place, run):
    with pytest.raises((InputError, IntegrityError)):
        opened("02_data", run)
    assert not (place.parent / "x").exists()


def test_a_link_out_of_the_outputs_is_refused(place):
    (place / "outputs/tiny").mkdir(parents=True)
    (place / "elsewhere").mkdir()
    (place / "outputs/tiny/main").symlink_to(place / "elsewhere")
    with pytest.raises(IntegrityError, match="inside outputs/"):
        run_folder(load_settings(place), "outputs/tiny/main")


@pytest.mark.parametrize("wrong, sentence", [
    (lambda run: run.save("train/x", {}), "cannot save 'train/x'"),
    (lambda run: run.save("data/../x", {}), "cannot save"),
    (lambda run: run.save("data/x", {"auc": float("nan")}), "data/x.auc is nan"),
    (lambda run: run.save("data/x", object()), "data/x is a object"),
    (lambda run: run.external("nothing.csv"), "no data file"),
    (lambda run: run.finish(), "has no answer"),
    (lambda run: run.claims("evaluate"), "not finished"),
])
def test_each_slip_is_one_sentence(place, wrong, sentence):
    run = opened("02_data")
    with pytest.raises((InputError, EnvironmentFault), match=sentence):
        wrong(run)


def test_the_clock_can_be_set(place, monkeypatch):
    monkeypatch.setenv("PILOTHOUSE_NOW", "2038-01-20T00:00:00+02:00")
    run = opened("02_data")
    assert run.now().isoformat() == "2038-01-20T00:00:00+02:00"
    run.audit("clock", note="future")
    monkeypatch.setenv("PILOTHOUSE_NOW", "1999-01-01")
    run.audit("clock", note="past")
    assert [e["at"][:10] for e in audit.entries(run.store)] == ["2038-01-19", "1999-01-01"] and audit.verify(run.store) == 2
    monkeypatch.setenv("PILOTHOUSE_NOW", "soon")
    with pytest.raises(InputError, match="ISO 8601"):
        run.now()


def test_random_numbers_depend_on_seed_and_name_alone(place):
    run = opened("02_data")
    assert run.rng("a").random() == run.rng("a").random() != run.rng("b").random()
