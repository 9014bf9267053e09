"A person's own table: `start_problem` guesses, the data phase runs, and what cannot run is refused in one sentence."
from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import InputError
from pipeline.core.problem import load_problem
from pipeline.core.run import open_run
from pipeline.data.contract import Contract, enforce, target_values
from pipeline.data.sources import read_table
from pipeline.data.splits import each_fold
from pipeline.data.starter import start_problem
from room_kit import execute, records
from tables import REFUSED, RUNS, Refused, Runs

NOTEBOOK = Path(__file__).parents[1] / "nbs/phases/02_data.ipynb"
QUICK = [table for table in RUNS if not table.slow]


def begin(folder: Path, table: Runs | Refused) -> Path:
    "A workplace with the table in it and its problem file written."
    (folder / "settings.ini").write_text("[engine]\nthreads = 1\n")
    (folder / "params").mkdir()
    return start_problem(table.name, table.write(folder), table.target, folder / "params")


def run_data(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    "The data phase on it, in this process; the run's folder."
    monkeypatch.chdir(folder)
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook shows a no-go and does not raise it")
    execute(NOTEBOOK, f"params/{name}.yml", f"outputs/{name}/main")
    return folder / "outputs" / name / "main"


@pytest.mark.parametrize("table", QUICK, ids=lambda t: t.name)
def test_an_own_table_runs(table: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = load_problem(begin(tmp_path, table))
    assert problem.problem.task == table.task and problem.data.split.kind == table.split
    run = run_data(tmp_path, table.name, monkeypatch)
    contract = Contract.from_dict(json.loads((run / "02_data/contract.json").read_text()))
    splits = json.loads((run / "02_data/splits.json").read_text())
    train = pl.read_parquet(run / "02_data/train.parquet")
    assert contract.features and set(contract.features) <= set(train.columns) and splits["train"]["n"] == train.height
    assert train.columns[: len(contract.columns)] == [rule.name for rule in contract.columns]
    assert len(target_values(train, contract)) == train.height
    assert enforce(train, contract).equals(train)
    folds = list(each_fold(train, splits))
    assert len(folds) == splits["folds"] and all(len(a) and len(b) and not set(a) & set(b) for a, b in folds)
    answer = records(run, "02_data", "answer")
    assert answer["verdict"] == "go", records(run, "02_data", "checks")
    assert "Traceback" not in json.dumps(records(run, "02_data", "claims"))


@pytest.mark.parametrize("table", REFUSED, ids=lambda t: t.name)
def test_what_cannot_run_is_refused_in_one_sentence(table: Refused, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        begin(tmp_path, table)
    sentence = str(refusal.value)
    assert all(word in sentence for word in table.words), sentence
    assert "\n" not in sentence and len(sentence) < 400 and not list((tmp_path / "params").iterdir())


@pytest.mark.slow
def test_ten_thousand_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = next(t for t in RUNS if t.name == "wide")
    file = begin(tmp_path, table)
    assert file.stat().st_size < 20_000
    run = run_data(tmp_path, "wide", monkeypatch)
    assert len(json.loads((run / "02_data/contract.json").read_text())["features"]) == 10_000
    assert records(run, "02_data", "answer")["verdict"] == "go"


def test_guesses_are_explained(tmp_path: Path) -> None:
    text = begin(tmp_path, next(t for t in RUNS if t.name == "dated")).read_text()
    for word in ("task: binary   # guessed:", 'time: "ordered_at"   # guessed:', "kind: time   # guessed:", "production_from:", "# guessed: better than guessing"):
        assert word in text, text
    assert "born" not in [line.split("time:")[1] for line in text.splitlines() if line.startswith("  time:")][0]


def test_what_is_left_as_text_is_told_in_the_file(tmp_path: Path) -> None:
    from tables import binary

    def as_people_write(rng: np.random.Generator) -> pl.DataFrame:
        days, ways = [date(2024, 1, 1 + i % 28) for i in range(600)], ("%Y-%m-%d", "%d.%m.%Y", "%m/%d/%Y")
        return binary(rng).with_columns(paid=pl.Series([f"{1000 + i:,}.50 €" for i in range(600)]), day=pl.Series([day.strftime(ways[i % 3]) for i, day in enumerate(days)]))

    file = begin(tmp_path, Runs("written", "churned", "binary", as_people_write))
    told = [line for line in file.read_text().splitlines() if line.startswith("  # note: written.csv: column ")]
    assert len(told) == 2 and "'day' holds dates written in several ways" in told[0] and "('1,000.50 €')" in told[1]


def test_rows_of_one_thing_are_kept_together_from_the_first_run_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tables import binary

    def visits(rng: np.random.Generator) -> pl.DataFrame:
        frame = binary(rng)
        of = pl.Series(rng.integers(0, 120, 600))
        return frame.with_columns(frame.select("age", "income", "churned")[of.to_list()], patient=of.cast(pl.String) + "P")

    file = begin(tmp_path, Runs("visits", "churned", "binary", visits))
    problem = load_problem(file)
    assert (problem.data.group, problem.data.split.kind) == ("patient", "group")
    run = run_data(tmp_path, "visits", monkeypatch)
    assert records(run, "02_data", "answer")["verdict"] == "go"
    train, holdout = (pl.read_parquet(run / f"02_data/{part}.parquet") for part in ("train", "holdout"))
    assert not set(train["__group"]) & set(holdout["__group"])
    file.write_text(file.read_text().replace("kind: group", "kind: random"))
    with pytest.raises(Exception, match="whose rows may not stand on two sides; set kind: group, or name no group"):
        run_data(tmp_path, "visits", monkeypatch)


def test_classes_named_one_and_two_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path, next(t for t in RUNS if t.name == "ones_and_twos"))
    run = run_data(tmp_path, "ones_and_twos", monkeypatch)
    contract = json.loads((run / "02_data/contract.json").read_text())
    assert contract["classes"] == ["1", "2"] and contract["positive"] == "2"
    train = pl.read_parquet(run / "02_data/train.parquet")
    assert set(target_values(train, contract).tolist()) == {0, 1} and ((train["churned"] == "2").to_numpy() == (target_values(train, contract) == 1)).all()


def test_copies_stay_on_one_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path, next(t for t in RUNS if t.name == "doubled"))
    run = run_data(tmp_path, "doubled", monkeypatch)
    findings = pl.read_parquet(run / "02_data/findings.parquet")
    assert json.loads((run / "02_data/splits.json").read_text())["copies"] == 0
    assert findings.filter(pl.col("finding") == "exact copies")["rows"].item() > 10


def test_no_page_names_a_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Names, mails and rare values stay in the rows; nothing that a report is made of repeats them."
    from tables import binary

    def named(rng: np.random.Generator) -> pl.DataFrame:
        frame = binary(rng)
        rare = [f"kanarie-town-{i}" if i % 100 == 0 else "Linz" for i in range(frame.height)]
        frame = frame.with_columns(nick=pl.Series([f"kanarie-nick-{i // 2}" for i in range(600)]))
        return frame.with_columns(customer=pl.Series([f"kanarie-{i:04}" for i in range(600)]), email=pl.Series([f"kanarie{i % 590}@example.org" for i in range(600)]), town=pl.Series(rare))

    begin(tmp_path, Runs("named", "churned", "binary", named))
    run = run_data(tmp_path, "named", monkeypatch) / "02_data"
    rows = {"train.parquet", "holdout.parquet", "unlabelled.parquet"}
    for path in run.iterdir():
        if path.name in rows or path.name == "contract.json":   # levels of few categories are part of the contract
            continue
        content = json.dumps(pl.read_parquet(path).to_dicts(), default=str) if path.suffix == ".parquet" else path.read_text()
        assert "kanarie" not in content, path.name
    assert "kanarie-0" not in (run / "contract.json").read_text() and "@" not in (run / "contract.json").read_text()


@given(names=st.lists(st.text(max_size=12), min_size=2, max_size=5), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_name_is_read_back_or_refused(names: list[str], seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("names")
    rng = np.random.default_rng(seed)
    try:
        frame = pl.DataFrame({name: rng.choice(["a", "b"], 40) if i == 0 else rng.normal(size=40) for i, name in enumerate(names)})
        frame.write_parquet(folder / "t.parquet")
        read = read_table(folder / "t.parquet").frame
    except (InputError, pl.exceptions.PolarsError):
        return
    if read.width < 2:
        return
    target = read.columns[0]
    problem = load_problem(start_problem("t", folder / "t.parquet", target, folder / "params"))
    assert problem.problem.target == target and set(problem.data.columns) <= set(read.columns)


def test_the_holdout_is_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.core.errors import IntegrityError

    begin(tmp_path, next(t for t in RUNS if t.name == "binary"))
    run_data(tmp_path, "binary", monkeypatch)
    run = open_run("04_train", "params/binary.yml", "outputs/binary/main")
    with pytest.raises(IntegrityError, match="sealed"):
        run.load("data/holdout")
    assert run.load("data/unlabelled").height == 0 and not run.has("data/production") and run.looks("data/holdout") == 0


def test_an_undeclared_leak_is_a_no_go_until_someone_answers_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tables import binary

    leaky = Runs("leaky", "churned", "binary", lambda rng: binary(rng).with_columns(refund=pl.when(pl.col("churned") == "yes").then(1.0).otherwise(0.0) + pl.int_range(pl.len()) / 10_000))
    file = begin(tmp_path, leaky)
    run = run_data(tmp_path, "leaky", monkeypatch)
    failed = [check for check in records(run, "02_data", "checks") if check["verdict"] != "go" and check["verdict"] != "not applicable"]
    assert records(run, "02_data", "answer")["answer"].endswith("1 feature leaks; not met: No feature knows the outcome too early.")
    assert len(failed) == 1 and "refund" in failed[0]["why"] and records(run, "02_data", "answer")["verdict"] == "no-go"
    file.write_text(file.read_text().replace("  split:", "  waive: [{check: leak, column: refund, reason: it is booked before the customer leaves}]\n  split:"))
    run_data(tmp_path, "leaky", monkeypatch)
    assert records(run, "02_data", "answer")["verdict"] == "go"


def test_a_source_without_a_licence_is_a_no_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = begin(tmp_path, next(t for t in RUNS if t.name == "binary"))
    file.write_text(file.read_text().replace('licence: "own data (assumed)"', "owner: me"))
    run = run_data(tmp_path, "binary", monkeypatch)
    assert [c["title"] for c in records(run, "02_data", "checks") if c["verdict"] == "no-go"] == ["Every source has a licence"]


def test_a_second_run_of_the_same_table_writes_the_same_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PILOTHOUSE_NOW", "2026-01-01T00:00:00+00:00")
    begin(tmp_path, next(t for t in RUNS if t.name == "binary"))
    digests: list[dict[str, Any]] = []
    for _ in range(2):
        run = run_data(tmp_path, "binary", monkeypatch)
        digests.append({name: out["sha256"] for name, out in records(run, "02_data", "receipt")["outputs"].items()})
    assert digests[0] == digests[1]
