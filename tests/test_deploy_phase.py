"""The deploy phase from first to last cell, on problems of every task."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import deploy_world as world
from pipeline.core.errors import InputError
from pipeline.core.run import function_named, read_claims, read_receipt
from pipeline.core.store import Artifact, read_artifact
from pipeline.deploy.batch import predict_file


def checks(run: Path, phase: str) -> dict[str, dict[str, Any]]:
    return {c["title"]: c for c in json.loads((run / phase / "checks.json").read_text())}


def recomputed(run: Path, phase: str) -> None:
    "Every claim of a phase comes out again from what is stored."
    outputs = read_receipt(run / phase)["outputs"]
    for claim in read_claims(run / phase):
        found = function_named(claim.by)(*[read_artifact(run / phase, Artifact(name=n, **outputs[n])) for n in claim.of], **claim.using)
        assert getattr(found, "value", found) == claim.value, claim.name


def test_a_good_package_goes(tmp_path: Path) -> None:
    run = world.build(tmp_path, deploy={"latency_p99_ms": 1000, "rss_mb": 4000, "soak_s": 6, "uptime": 0.5, "cost_per_1000": 1.0,
                                        "cpu_ms_per_1000": 1e9, "offline": True, "region": "eu-central-1", "regions": ["eu-central-1"]})
    names = world.execute("06_deploy", tmp_path)
    assert names["error"] is None
    found = checks(run, "06_deploy")
    assert {c["verdict"] for c in found.values()} <= {"go", "not applicable"} and {c["verdict"] for title, c in found.items() if title.startswith("Soak")} == {"go"}
    for limit in ("latency_p99_ms", "throughput_rps", "model_mb", "rss_mb", "uptime", "cost_per_1000", "cpu_ms_per_1000", "offline", "regions"):
        assert any(f"deploy.{limit}" in title for title in found)
    assert found["Works without a network (deploy.offline)"]["found"].startswith("8 of 8 rows answered ")
    recomputed(run, "06_deploy")
    claims = {c.name: c.value for c in read_claims(run / "06_deploy")}
    soak = pl.read_parquet(run / "06_deploy/soak.parquet")
    assert soak["killed"][0] == 3 and claims["soak_wrong"] == 0 and claims["soak_failed_share"] < 0.5 and len(soak) == 600
    assert claims["served_minus_trained"] <= 1e-9 and pl.read_parquet(run / "06_deploy/replay_validation.parquet").height == 1500
    assert claims["money_per_1000"] == pytest.approx(claims["cpu_ms_per_1000"] / 3.6e6 * 0.04) and claims["joules_per_1000"] == pytest.approx(claims["cpu_ms_per_1000"] / 100)
    assert claims["model_mb"] * 1e6 == sum(p.stat().st_size for p in (run / "06_deploy/package/model").iterdir())
    outputs = read_receipt(run / "06_deploy")["outputs"]
    assert [n for n, o in outputs.items() if o["timing"]] == ["deploy/latencies", "deploy/resources", "deploy/soak", "deploy/throughput"]
    assert (run / "06_deploy/package/card.md").read_text().startswith("# tiny")

    frame = world.rows("binary", 50, seed=4)
    frame.write_parquet(tmp_path / "in.parquet")
    frame.write_csv(tmp_path / "in.csv")
    assert (
        predict_file(run, tmp_path / "in.parquet", tmp_path / "a.csv")
        == predict_file(run, tmp_path / "in.csv", tmp_path / "b.csv")
        == 50
    )
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()
    assert (tmp_path / "a.csv").read_text().startswith("prediction,p_false,p_true\n")


def test_the_same_content_is_the_same_package(tmp_path: Path) -> None:
    from pipeline.core.run import open_run
    from pipeline.deploy.packing import pack

    world.build(tmp_path, "multiclass", 400, "linear")
    with world.at(tmp_path):
        first, again = (pack(open_run(phase, "tiny.yml", "outputs/tiny/main")) for phase in ("06_deploy", "16_deploy"))
    assert (
        first.manifest == again.manifest
        and first.manifest["version"] == 1
        and len(list((tmp_path / "outputs/store/models").iterdir())) == 1
    )


def test_many_classes_and_a_linear_model_go(tmp_path: Path) -> None:
    run = world.build(tmp_path, "multiclass", 400, "linear")
    assert world.execute("06_deploy", tmp_path)["error"] is None
    found = checks(run, "06_deploy")
    assert {c["verdict"] for c in found.values()} == {"go", "not applicable"} and found["Soak (deploy.soak_s)"]["verdict"] == "not applicable"


def test_another_preprocessing_and_a_missed_limit_are_named(tmp_path: Path) -> None:
    run = world.build(tmp_path, "regression", 400, spoilt=True, deploy={"latency_p99_ms": 0.01, "model_mb": 0.001, "rss_mb": 1.0,
                                                                        "cpu_ms_per_1000": 0.01, "regions": ["eu-central-1"], "licences": ["MIT"]})
    names = world.execute("06_deploy", tmp_path)
    assert names["error"].exit_code == 1
    found = checks(run, "06_deploy")
    assert found["Served equals measured, to 1e-9"]["verdict"] == "no-go" and found["Served equals measured, to 1e-9"][
        "why"
    ].startswith("row 40, column ")
    assert found["Batch equals online, bit for bit"]["verdict"] == "go"
    for title, limit in (
        ("Latency, 99th percentile (deploy.latency_p99_ms)", "≤ 0.01 (high end of the interval)"),
        ("Model on disk (deploy.model_mb)", "≤ 0.001"),
        ("Memory of the service (deploy.rss_mb)", "≤ 1"),
        ("Processor time of 1,000 answers (deploy.cpu_ms_per_1000)", "≤ 0.01"),
    ):
        assert (found[title]["verdict"], found[title]["limit"]) == ("no-go", limit) and float(found[title]["found"].split(" ")[0]) > 0
    region, licences = found["Hosted where it may be (deploy.regions)"], found["Libraries come under allowed licences (deploy.licences)"]
    assert (region["verdict"], region["found"], region["limit"]) == ("no-go", "no region is declared", "eu-central-1")
    assert (licences["verdict"], licences["found"]) == ("no-go", "0 of 0 libraries"), "what cannot be shown is not met"
    failed = [title for title, check in found.items() if check["verdict"] == "no-go"]
    assert json.loads((run / "06_deploy/answer.json").read_text())["answer"].endswith(f"; not met: {failed[0]} and {len(failed) - 1} more.")


def test_the_price_of_a_core_hour_is_the_price_of_answers(tmp_path: Path) -> None:
    from pipeline.core.problem import load_problem
    from pipeline.core.settings import load_settings
    from pipeline.deploy.load import per_1000

    costs = []
    for price in ("0.04", "0.08"):
        (tmp_path / "settings.ini").write_text(f"[prices]\ncore_hour = {price}\n")
        settings = load_settings(tmp_path)
        measured = {"cpu_ms_per_1000": 250.0} | {n: getattr(settings, n) for n in ("core_hour", "watts_per_core", "gram_co2e_per_kwh")}
        costs.append([per_1000(measured, what) for what in ("money", "joules", "co2e_g")])
    assert costs[1][0] == 2 * costs[0][0] > 0 and costs[0][1:] == costs[1][1:]
    (tmp_path / "wrong.yml").write_text(world.problem_text("tiny", "binary", deploy={"memory_mb": 5}))
    with pytest.raises(InputError, match="memory_mb"):
        load_problem(tmp_path / "wrong.yml")


def test_another_model_behind_the_service_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.deploy import rehearsal

    run = world.build(tmp_path, "binary", 400, production=False, deploy={"uptime": 0.01})
    original = rehearsal.validation_rows

    def spoilt(run_: Any) -> Any:
        frame, told = original(run_)  # type: ignore[misc]
        return frame, told.with_columns(p_true=pl.when(pl.int_range(pl.len()) >= 7).then(pl.col("p_true") + 1e-6).otherwise("p_true"))

    monkeypatch.setattr(rehearsal, "validation_rows", spoilt)
    assert world.execute("06_deploy", tmp_path)["error"].exit_code == 1
    found = checks(run, "06_deploy")["Served equals the trained model on the validation set, to 1e-9"]
    assert found["verdict"] == "no-go" and found["why"].startswith("row 7, column p_true: ")


def test_a_batch_problem_needs_no_latency(tmp_path: Path) -> None:
    run = world.build(tmp_path, "binary", 400, production=False, problem={"mode": "batch"}, deploy={"latency_p99_ms": 0.01})
    assert world.execute("06_deploy", tmp_path)["error"] is None
    assert checks(run, "06_deploy")["Latency, 99th percentile (deploy.latency_p99_ms)"]["verdict"] == "not applicable"


@pytest.mark.parametrize("missing", ["--data", "--out"])
def test_a_batch_says_what_it_needs(tmp_path: Path, missing: str) -> None:
    data, out = (tmp_path / "nothing.csv", tmp_path / "out.csv") if missing == "--data" else (tmp_path / "in.csv", tmp_path / "out.xlsx")
    with pytest.raises(InputError):
        predict_file(tmp_path / "outputs" / "tiny" / "main", data, out)
