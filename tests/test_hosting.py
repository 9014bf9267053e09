"Where a model should run: golden cases, exclusions that no points undo, and answers that turn the advice."
from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.cli.main import main
from pipeline.core.errors import InputError
from pipeline.scope.hosting import OPTIONS, WEIGHTS, Answers, advise_hosting, rank_options, read_answers, weigh_hosting

# What a person who has done it before would say, with the reason in its name.
GOLDEN: list[tuple[str, str, str]] = [
    ("a young shop, nobody runs servers, bursts", "data_must_stay: anywhere\noperations: none\nload: bursty\nlatency_p99_ms: 2000\nrequests_per_day: 2000", "serverless function"),
    ("a nightly job of fifty questions", "data_must_stay: anywhere\noperations: some\nload: rare\nlatency_p99_ms: 5000\nrequests_per_day: 50", "serverless function"),
    ("steady traffic, quick answers, nobody on call", "data_must_stay: anywhere\noperations: none\nload: steady\nlatency_p99_ms: 100\nrequests_per_day: 500000", "managed endpoint"),
    ("a platform team with a cluster", "data_must_stay: anywhere\noperations: strong\nkubernetes: true\nload: steady\nlatency_p99_ms: 50\nrequests_per_day: 20000000\nlock_in: avoid", "containers on Kubernetes"),
    ("a hospital whose records stay in the house", "data_must_stay: premises\noperations: strong\nload: steady\nmodel_mb: 400", "own servers"),
    ("a ship without a network, secret data", "data_must_stay: premises\noffline: true\noperations: some\nmodel_mb: 20", "on the device"),
    ("a tractor in the field", "data_must_stay: anywhere\noffline: true\noperations: some\nmodel_mb: 5\nlatency_p99_ms: 30", "on the device"),
    ("a bank in the region, certificate needed, no operations", "data_must_stay: region\nprovider_in_region: true\naudited: true\noperations: none\nlatency_p99_ms: 150", "managed endpoint"),
    ("a region without a provider", "data_must_stay: region\nprovider_in_region: false\noperations: strong\naudited: true\ncertificate_held: true\nmodel_mb: 300", "own servers"),
    ("a large language model, no operations", "data_must_stay: anywhere\noperations: none\ngpu: true\nlatency_p99_ms: 300\nmodel_mb: 2000", "managed endpoint"),
    ("a small team that fears lock-in, cheap hours", "data_must_stay: anywhere\noperations: some\nlatency_p99_ms: 100\nlock_in: avoid\nhour_cost: 10\nmodel_mb: 500", "virtual machine"),
    ("a university with students and eighty a month", "data_must_stay: anywhere\noperations: some\nlatency_p99_ms: 100\nhour_cost: 0\nbudget_month: 80\nmodel_mb: 300", "virtual machine"),
    ("a phone's keyboard", "data_must_stay: anywhere\ndevices: true\noperations: some\nlatency_p99_ms: 25\nmodel_mb: 3\nrequests_per_day: 5000000", "on the device"),
]


@pytest.mark.parametrize("case,text,wanted", GOLDEN, ids=[g[0] for g in GOLDEN])
def test_golden_cases(case: str, text: str, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.yml"
    path.write_text(text + "\n")
    advice = weigh_hosting(read_answers(path))
    assert advice.best == wanted, advice.options
    assert wanted in advise_hosting(path).html
    for turn in advice.flips.iter_rows(named=True):
        assert turn["then"] != wanted


def test_data_that_must_stay_excludes_every_violator() -> None:
    "Whatever the other answers are, no cloud is advised for data that may not go there."
    cloud = {o.name for o in OPTIONS if o.cloud}
    for stay, there, skill, load, gpu, offline in itertools.product(("region", "premises"), (True, False), ("none", "some", "strong"), ("rare", "steady"), (True, False), (True, False)):
        answers = Answers(data_must_stay=stay, provider_in_region=there, operations=skill, load=load, gpu=gpu, offline=offline)  # type: ignore[arg-type]
        able = set(rank_options(answers).filter(pl.col("why_not") == "")["option"])
        if stay == "premises" or not there:
            assert not able & cloud, (answers, able)


def test_a_turn_turns() -> None:
    "Each named answer, changed by itself, really gives the other advice."
    answers = Answers(data_must_stay="anywhere", operations="some", load="steady", latency_p99_ms=100)
    advice = weigh_hosting(answers)
    words = advice.flips.filter(pl.col("answer").is_in(["data_must_stay", "operations", "load"]))
    assert words.height >= 1
    for turn in words.iter_rows(named=True):
        assert weigh_hosting(answers.model_copy(update={turn["answer"]: turn["instead"]})).best == (None if turn["then"] == "none is left" else turn["then"])


def test_scores_lie_between_nought_and_one() -> None:
    ranked = rank_options(Answers(data_must_stay="anywhere", operations="strong", devices=True, latency_p99_ms=5000))
    assert ranked["why_not"].to_list() == [""] * len(OPTIONS) and ranked["score"].is_between(0, 1).all() and ranked["score"].is_sorted(descending=True)
    assert all(ranked[key].is_between(0, 1).all() for key in WEIGHTS)


@pytest.mark.parametrize("text,words", [
    ("operations: some\n", "data_must_stay is missing"), ("data_must_stay: here\noperations: some\n", "data_must_stay = 'here'"),
    ("data_must_stay: region\noperations: some\nload: 3\n", "answers.yml:3: load = 3"), ("data_must_stay: region\noperations: some\nbudget_month: -5\n", "budget_month = -5"),
    ("[1]\n", "no mapping"), ("data_must_stay: region\noperations: some\ngpuu: true\n", "did you mean 'gpu'"),
])
def test_a_wrong_answer_is_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.yml"
    path.write_text(text)
    with pytest.raises(InputError) as told:
        advise_hosting(path)
    assert words in str(told.value) and "\n" not in str(told.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    values: Any = tmp_path / "nothing.yml"
    with pytest.raises(InputError, match="write one with at least these lines: .*data_must_stay.*operations"):
        advise_hosting(values)


def test_nothing_left_is_a_failed_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    "The exit code and one sentence: which rule each option breaks, and the answer that would bring one back."
    path = tmp_path / "answers.yml"
    path.write_text("data_must_stay: premises\noperations: strong\nlatency_p99_ms: 10\n")
    assert main(["advise", "hosting", str(path)]) == 1
    told = capsys.readouterr().out.splitlines()[0]
    assert told.startswith("No option keeps to all answers (") and "virtual machine: the data may not leave the premises" in told
    assert told.endswith("one other answer would do: latency_p99_ms: 100 instead of 10 (own servers)")
    path.write_text("data_must_stay: premises\noperations: none\ngpu: true\nlatency_p99_ms: 10\n")
    assert main(["advise", "hosting", str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["told"].endswith("more than one answer has to give")
