"Pages, matrix, score and gate on runs made by hand: what is missing must show, what is hostile must not."
from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_run import make_run, write_phase

from pipeline.core.display import clean, note, number, table
from pipeline.core.errors import IntegrityError
from pipeline.core.problem import load_problem
from pipeline.report.evidence import QUESTIONS, Evidence, Phase, read_run
from pipeline.report.gate import criteria_of, unmet
from pipeline.report.page import ATTRIBUTES, INSIDE, TAGS, from_markdown, sanitise
from pipeline.report.portal import render_portal
from pipeline.report.readiness import RUBRIC, ml_test_score, score_items
from pipeline.report.render import render_phase, render_run
from pipeline.report.scorecard import mean_of, select_balanced, score_sides
from pipeline.report.traceability import requirements, trace

ROOT = Path(__file__).resolve().parent.parent
FLIGHTS = ROOT / "params/flights.yml"


class Seen(HTMLParser):
    "Every tag and attribute of some HTML."

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


pieces = st.sampled_from(["<", ">", "\"", "'", "=", " ", "/", "<!--", "-->", "<svg", "<math", "<script>", "<style>", "</style>", "<img ", "src", "srcset", "data:image/svg+xml;base64,PHN2Zy8+",
                          "http://e.example", "javascript:x", "on", "load", "style", "href", "<a ", "class", "ph", "<p ", "<source ", "<table ", "\x00", "&lt;", "&#60;", "x", "role", "region", "<div ", "tabindex", "0"])


@settings(max_examples=300, deadline=None)
@given(st.lists(pieces, max_size=25).map("".join))
def test_only_the_allow_list_is_left(markup: str) -> None:
    for cleaned in (sanitise(markup), from_markdown(markup)):
        for tag, attributes in Seen(cleaned).tags:
            assert tag in TAGS
            for name, value in attributes.items():
                assert name in ATTRIBUTES["*"] | ATTRIBUTES.get(tag, set()) | ({"rel"} if tag == "a" else set())
                if name in ("src", "srcset"):
                    assert value and INSIDE.fullmatch(value)
                if name == "href":
                    assert value and re.match(r"https?://|mailto:|\.\./\d\d_", value)
        assert sanitise(cleaned) == sanitise(sanitise(cleaned))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40) | st.lists(pieces, max_size=6).map("".join), st.text(max_size=40) | st.lists(pieces, max_size=6).map("".join))
def test_any_text_is_a_cell(name: str, value: str) -> None:
    made = table([{name: value, "n": 1.5}], value).html
    tags = [tag for tag, _ in Seen(made).tags]
    assert set(tags) <= {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "span"}
    assert sanitise(made).count("<t") == made.count("<t")
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e]", clean(value))


@settings(max_examples=200, deadline=None)
@given(st.floats())
def test_numbers_never_read_as_something_else(value: float) -> None:
    shown = number(value).replace("−", "-").replace(",", "")
    if value != value:
        assert shown == "–"
    elif value in (float("inf"), float("-inf")):
        assert "∞" in shown
    else:
        read = Decimal(shown)    # a float would overflow where the largest one is rounded up
        assert abs(read - Decimal(value)) <= max(abs(Decimal(value)) * Decimal("0.06"), Decimal("1e-12")) and (read == 0) == (value == 0)


def test_numbers_stay_numbers_whatever_a_column_holds() -> None:
    for values in ([1, 2.5, None], [True, 3], ["a", 1], [{"x": 1}, [2]], [None, None], [float("nan"), 1], [10**30, 1], [b"\xff", b"x"]):
        assert "<table>" in table([{"v": v} for v in values], "Mixed").html
    assert "<table>" in table(pl.DataFrame({"a": [], "b": []}), "Empty").html


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "outputs")


def test_pages_are_small_equal_and_whole(run: Path) -> None:
    file = run / "05_evaluate/report.html"
    first = file.read_bytes()
    assert len(first) < 3_000_000 and render_phase(run / "05_evaluate/notebook.ipynb", run / "05_evaluate").read_bytes() == first
    text = first.decode()
    assert "secret_call" not in text and "<script" not in text and "http" not in re.sub(r"http-equiv|http://www.w3.org/2000/svg", "", text)
    for heading in ("The evidence", "The criteria", "The decisions", "What is not known", "Where this comes from"):
        assert f"<h2>{heading}</h2>" in text
    assert not [p for p in run.rglob(".*") if p.is_file()], "a temporary file was left behind"


def test_what_does_not_apply_is_said_once(run: Path) -> None:
    folder = run / "07_rollout"
    why = {"output_type": "execute_result", "metadata": {}, "execution_count": 1, "data": {"text/html": note("Not applicable: no rows play production.")._repr_html_()}}
    told = {"output_type": "execute_result", "metadata": {}, "execution_count": 1, "data": {"text/html": note("Each alert has an owner.", "go")._repr_html_()}}
    cells = [{"cell_type": "markdown", "source": "# Is it better?"}]
    for words, output in (("Production is replayed.", why), ("Is traffic divided as asked?", why), ("Can we go back?", why), ("Who acts?", told)):
        cells += [{"cell_type": "markdown", "source": words}, {"cell_type": "code", "source": "look(run)", "metadata": {}, "outputs": [output]}]
    (folder / "notebook.ipynb").write_text(json.dumps({"cells": cells}))
    (folder / "answer.json").write_text(json.dumps({"answer": "No rows play production.", "verdict": "not applicable"}))
    text = render_phase(folder / "notebook.ipynb", folder).read_text()
    assert text.count("no rows play production") == 1 and "Production is replayed." in text and "Who acts?" in text and "Each alert has an owner." in text
    assert "divided as asked" not in text and "Can we go back" not in text       # words that lead to nothing new
    assert "ph-verdict ph-not-applicable" in text and "Not applicable.</span> No rows play production." in text
    page = render_run(run).read_text()
    assert '<li class="ph-not-applicable"><a href="#07_rollout">' in page and "Not applicable" not in render_portal(run.parent.parent).read_text()


def test_a_phase_that_does_not_apply_ends_well_and_is_named_in_the_end(run: Path) -> None:
    from pipeline.report.gate import final_sentence

    records = {"answer": {"answer": "No rows.", "verdict": "not applicable"}, "checks": [{"title": "Rollout", "verdict": "not applicable", "found": "no rows", "limit": "–"}]}
    for name, record in records.items():
        (run / "07_rollout" / f"{name}.json").write_text(json.dumps(record))
    (run / "05_evaluate/checks.json").write_text("[]")
    evidence = read_run(run, before="10_report")
    criteria = criteria_of(evidence).filter(pl.col("verdict") != "inconclusive")
    assert unmet(criteria, "07_rollout").n == 0
    assert final_sentence("go", criteria, criteria.head(0), 3.0, evidence).endswith("Not applicable: 07 rollout.")


def test_a_huge_notebook_makes_a_page_under_three_megabytes(run: Path) -> None:
    folder = run / "05_evaluate"
    output = {"output_type": "stream", "name": "stdout", "text": "x" * 400 + "\n"}
    image = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "iVBORw0KGgo" + "A" * 600_000}}
    cells = [{"cell_type": "code", "metadata": {}, "source": "", "outputs": [image, {**output, "text": output["text"] * 5000}]} for _ in range(12)]
    (folder / "notebook.ipynb").write_text(json.dumps({"cells": cells}))
    made = render_phase(folder / "notebook.ipynb", folder)
    assert made.stat().st_size < 3_000_000 and "MB is left out" in made.read_text()


def test_pages_without_notebook_manifest_or_records(tmp_path: Path) -> None:
    folder = tmp_path / "outputs/p/r/07_rollout"
    folder.mkdir(parents=True)
    (folder / "receipt.json").write_text("{}")
    assert "Is it better on real traffic" in render_phase(folder / "notebook.ipynb", folder).read_text()
    made = render_run(folder.parent).read_text()
    assert "1 of 10 phases are finished" in made and "Inconclusive." in made
    assert "inconclusive" in render_portal(tmp_path / "outputs").read_text()


def test_a_damaged_record_is_named_and_does_not_hide_the_other_runs(run: Path) -> None:
    (run / "04_train/checks.json").write_text("[{")
    with pytest.raises(IntegrityError, match=r"04_train/checks\.json"):
        render_run(run)
    make_run(run.parent.parent, "churn", "first", phases=2)
    portal = render_portal(run.parent.parent).read_text()
    assert "records cannot be read" in portal and "churn" in portal


def test_evidence_that_is_removed_lowers_the_score(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    folder = outputs / "flights/main/02_data"
    write_phase(folder, "contract", [], "go", full=False)
    receipt = json.loads((folder / "receipt.json").read_text())
    receipt["outputs"] = {name: {"file": "version.json", "kind": "json", "sha256": "0", "bytes": 1} for name in {n for item in RUBRIC for n in item.shown}}
    (folder / "receipt.json").write_text(json.dumps(receipt))
    full = score_items(read_run(folder.parent))
    assert ml_test_score(full) > 0 and full.filter(pl.col("item") == "D1")["score"].item() == 1
    (folder / "version.json").unlink()
    emptied = score_items(read_run(folder.parent))
    assert ml_test_score(emptied) == 0 and (emptied["score"] <= full["score"]).all() and emptied["score"].sum() < full["score"].sum()


@pytest.mark.parametrize("verdict", ["go", "no-go", ""])
def test_each_file_that_an_item_rests_on_counts_alone(verdict: str) -> None:
    named = sorted({a for item in RUBRIC for a in item.shown if not a.startswith("run:")})
    rooms = sorted({name.partition("/")[0] for name in named})

    def scores(gone: str) -> dict[str, float]:
        phases = []
        for room in rooms:
            kept = {name: {"file": name} for name in [*named, f"{room}/numbers"] if name.startswith(f"{room}/")}
            first = {item.code: next(a for a in item.shown if not a.startswith("run:")) for item in RUBRIC if any("/" in a for a in item.shown)}
            checks = [{"title": code, "verdict": verdict, "answers": [code], "claim": "counted"} for code, a in first.items() if verdict and a.startswith(f"{room}/")]
            phases.append(Phase(f"05_{room}", Path(), "", "go", {"outputs": kept}, claims=[{"name": "counted", "inputs": {f"{room}/numbers": "ab"}}], checks=checks,
                                artifacts={name: told for name, told in kept.items() if name != gone}))
        items = score_items(Evidence(Path(), phases, {}))
        return dict(zip(items["item"], items["score"]))

    full = scores("")
    for name in named:
        holds = {item.code for item in RUBRIC if name in item.shown}
        assert {code for code, score in scores(name).items() if score < full[code]} == holds, name
    for room in rooms if verdict else []:
        fallen = {code for code, score in scores(f"{room}/numbers").items() if score < full[code]}
        assert fallen == {item.code for item in RUBRIC if item.shown and item.shown[0].startswith(f"{room}/")}, room


def test_one_failed_criterion_among_many_refuses_the_better_model() -> None:
    def card(auc: str, *failed: str) -> pl.DataFrame:
        told = {"auc": "evaluate.acceptance.0", "the same again": "I1", **{f"smoke {i}": "I3" for i in range(9)}, **{f"window {i}": "O2" for i in range(9)}, "the promise is kept": "O7"}
        checks = [{"title": title, "verdict": auc if title == "auc" else "no-go" if title in failed else "go", "answers": [key]} for title, key in told.items()]
        number = {"limit": 0.7, "low": 0.7, "high": 0.8, "by": "x:y", "inputs": {"a": "b"}}
        return score_sides(Evidence(Path(), [Phase("05_evaluate", Path(), "", "go", {}, claims=[number], checks=checks, decisions=[{"options": [1, 2], "because": "x"}])], {}))

    dull, lucky, blind = card("inconclusive"), card("go", "the same again"), card("go", "the promise is kept")
    assert mean_of(lucky) > mean_of(dull) and mean_of(blind) > mean_of(dull)
    chosen = select_balanced({"lucky": lucky, "blind": blind, "dull": dull})
    assert chosen.name == "dull"
    assert dict(chosen.board.select("candidate", "refused").rows()) == {"dull": "", "lucky": "repeatability: the same again", "blind": "monitoring: the promise is kept"}


def test_the_command_scores_what_is_there_now(project: Path, pilothouse: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    folder = make_run(project / "outputs") / "02_data"
    receipt = json.loads((folder / "receipt.json").read_text())
    receipt["outputs"]["data/contract"] = receipt["outputs"]["data/version"]
    (folder / "receipt.json").write_text(json.dumps(receipt))

    def score(item: str) -> float:
        done = pilothouse("readiness", "flights/main", "--json")
        assert done.returncode == 0, done.stderr
        return next(row["score"] for row in json.loads(done.stdout) if row["item"] == item)

    assert score("D1") == 1
    (folder / "version.json").unlink()
    assert score("D1") == 0.5


@settings(max_examples=40, deadline=None)
@given(st.sets(st.sampled_from(list(QUESTIONS))), st.sets(st.sampled_from(list(QUESTIONS))))
def test_more_evidence_never_lowers_the_score(some: set[str], more: set[str]) -> None:
    def scored(names: set[str]) -> float:
        from pipeline.report.evidence import Evidence, Phase

        phases = [Phase(n, Path(), "", "go", {}, checks=[{"title": item.test, "verdict": "go", "answers": [item.code]} for item in RUBRIC],
                        artifacts={a: {} for item in RUBRIC for a in item.shown if a.startswith(n[3:])}) for n in sorted(names)]
        return float(score_items(Evidence(Path(), phases, {}))["score"].sum())

    assert scored(some) <= scored(some | more)


def test_no_row_of_the_matrix_is_empty_and_none_passes_without_evidence(tmp_path: Path) -> None:
    problem = load_problem(FLIGHTS)
    (tmp_path / "outputs/flights/main").mkdir(parents=True)
    matrix = trace(problem, read_run(tmp_path / "outputs/flights/main"))
    assert matrix.height == len(requirements(problem)) > 25 and matrix.null_count().sum_horizontal().item() == 0
    assert set(matrix["verdict"]) == {"inconclusive"} and set(matrix["evidence"]) == {"no evidence"}


def test_a_criterion_answers_what_it_names_and_nothing_that_sounds_like_it(tmp_path: Path) -> None:
    problem = load_problem(FLIGHTS, {"evaluate.cohorts": ["member"]})
    attack = {"title": "member groups do not give away who was learned from", "claim": "membership_auc", "verdict": "go", "found": "0.48", "limit": "≤ 0.6", "answers": ["D5"]}
    few = {"title": "too few to tell", "verdict": "not applicable", "found": "0 of 2 groups are large enough", "limit": "–", "answers": ["evaluate.cohorts.member"]}
    for checks, found in (([attack], "–"), ([attack, few], "0 of 2 groups are large enough")):
        matrix = trace(problem, Evidence(tmp_path, [Phase("09_comply", tmp_path, "", "go", {}, checks=checks)], {}))
        row = matrix.row(by_predicate=pl.col("requirement") == "evaluate.cohorts.member", named=True)
        assert (row["verdict"], row["found"]) == ("inconclusive", found)      # declared, so being skipped is not being met


def test_a_phase_that_did_not_run_leaves_the_verdict_open(run: Path) -> None:
    evidence = read_run(run, before="10_report")
    assert unmet(criteria_of(evidence)).value == 1        # calibration in 05
    import shutil

    shutil.rmtree(run / "08_monitor")
    criteria = criteria_of(read_run(run, before="10_report"))
    assert unmet(criteria, "08_monitor").high == 1 and unmet(criteria, "08_monitor").value == 0


def report_phase(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "papermill", str(project / "nbs/phases/10_report.ipynb"), str(project / "executed.ipynb"), "-k", "python3"],
        cwd=project, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
    )


def test_the_report_phase_answers_from_a_whole_run(project: Path) -> None:
    import shutil

    shutil.copy(FLIGHTS, project / "params/flights.yml")
    folder = make_run(project / "outputs")
    shutil.rmtree(folder / "10_report")
    done = report_phase(project, PYTHONPATH=str(ROOT))
    assert "GateFailed: 10_report is no-go" in done.stderr, done.stderr[-2000:]
    answer = json.loads((folder / "10_report/answer.json").read_text())
    assert answer["verdict"] == "no-go" and "1 failed" in answer["answer"] and "05 evaluate" in answer["answer"]
    receipt = json.loads((folder / "10_report/receipt.json").read_text())
    assert "evaluate/checks.json" in receipt["loaded"] and "evaluate.acceptance" in receipt["leaves"]
    shutil.copy(project / "executed.ipynb", folder / "10_report/notebook.ipynb")
    made = render_phase(folder / "10_report/notebook.ipynb", folder / "10_report").read_text()
    assert "<h1>Go or no-go?</h1>" in made and "no evidence" in made and "ML Test Score" in made and '<a href="../01_scope/report.html"' in made
