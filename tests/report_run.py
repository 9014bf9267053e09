"A finished run made by hand: ten phases with notebooks, records and pages, without running a pipeline."
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.core.charts import bars, histogram, lines, points
from pipeline.core.display import facts, headline, note, stack, table
from pipeline.report.evidence import QUESTIONS
from pipeline.report.portal import render_portal
from pipeline.report.render import render_phase, render_run

CARRIERS = ["United", "JetBlue", "Delta", "Envoy", "Hawaiian"]


def make_run(
    outputs: Path,
    problem: str = "flights",
    run: str = "main",
    texts: Sequence[str] = ("late arrivals",),   # put wherever data or people can put text, a phase each, in turn
    extra: Callable[[str], list[dict[str, Any]]] = lambda text: [],   # more outputs for the notebooks
    verdict: str = "no-go",
    phases: int = 10,
) -> Path:                                # the run's folder
    "A run in `outputs`, with its pages and the portal drawn."
    folder = outputs / problem / run
    for i, name in enumerate(list(QUESTIONS)[:phases]):
        text = texts[i % len(texts)]
        write_phase(folder / name, text, extra(text), verdict if name in ("05_evaluate", "10_report") else "go", full=len(texts) > 1 or name == "05_evaluate")
    text = texts[0]
    leaves = {"problem.statement": f"Will it be late? {text}", "problem.kpi.name": text, "problem.kpi.baseline": 0.0, "problem.kpi.target": 40.0,
              "problem.kpi.unit": "%", "problem.currency": "USD", "train.note": text,
              "evaluate.acceptance": [{"metric": "roc_auc", "at_least": 0.65, "on": "holdout"}]}
    (folder / "manifest.json").write_text(json.dumps({"problem": problem, "leaves": leaves, "git": {"commit": "0f3a9b2c44d1", "dirty": True}, "phases": {}}))
    for phase in sorted(folder.glob("[0-9]*_*")):
        render_phase(phase / "notebook.ipynb", phase)
    render_run(folder)
    render_portal(outputs)
    return folder


def write_phase(folder: Path, text: str, extra: list[dict[str, Any]], verdict: str, full: bool) -> None:
    folder.mkdir(parents=True)
    claims = [
        {"name": "roc_auc", "title": f"ranking {text}", "value": 0.712, "low": 0.705, "high": 0.716, "n": 29327, "unit": "", "on": "holdout", "better": "higher",
         "limit": 0.65, "of": ["evaluate/predictions"], "by": "pipeline.core.metrics:metric", "using": {"note": text}, "inputs": {"evaluate/predictions": "ab" * 32}, "cell": "c1"},
        {"name": "ece", "title": "calibration error", "value": 0.091, "low": None, "high": None, "n": 29327, "unit": text[:20], "on": text, "better": "lower",
         "limit": 0.08, "of": [], "by": "pipeline.core.metrics:metric", "using": {}, "inputs": {}, "cell": "c2"},
        {"name": "brier", "title": "Brier score", "value": 0.15, "low": 0.14, "high": 0.16, "n": 9, "unit": "", "on": "holdout", "better": "lower",
         "limit": None, "of": [], "by": "pipeline.core.metrics:metric", "using": {}, "inputs": {}, "cell": "c3"},
    ]
    checks = [
        {"title": f"ranking suffices for {text}", "verdict": "go", "found": "0.712", "limit": "≥ 0.65", "why": "", "claim": "roc_auc", "unit": "",
         "answers": ["evaluate.acceptance.0", "D1", "I4"]},
        {"title": "calibration", "verdict": verdict, "found": text, "limit": "≤ 0.08", "why": text, "claim": "ece", "unit": ""},
        {"title": "rarest class", "verdict": "not applicable", "found": "two classes", "limit": "–", "why": text, "claim": None, "unit": ""},
    ]
    decisions = [{"what": text, "options": [{"family": text, text: 1.0}, {"family": "nets", text: 2.0}], "chose": text, "because": text, "by": text}]
    receipt = {
        "phase": folder.name, "answer": f"Answered: {text}", "verdict": verdict, "leaves": {"train.note": text, text: 1}, "loaded": {text: "ab" * 32},
        "outputs": {"data/version": {"file": "version.json", "kind": "json", "sha256": "ab" * 32, "bytes": 9, "sealed": False, "timing": False}},
        "wall_s": 12.0, "cpu_s": 20.0, "peak_rss_mb": 700.0, "started": "2026-03-02T10:00:00+00:00", "finished": "2026-03-02T10:20:00+00:00",
        "seed": 7, "python": "cpython 3.11.7", "lock": "abcd",
    }
    records = {"claims": claims, "checks": checks, "decisions": decisions, "receipt": receipt, "answer": {"answer": receipt["answer"], "verdict": verdict}, "version": {"id": text}}
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    (folder / "notebook.ipynb").write_text(json.dumps(notebook(folder.name, text, shown(text) if full else [], extra)))


def shown(text: str) -> list[Any]:
    frame = pl.DataFrame({"carrier": [*CARRIERS[:-1], text], text: ["a", "b", "c", "d", text], "n": [500, 400, 300, 200, 4], "late": [0.2, 0.25, 0.3, 0.18, 0.5],
                          "low": [0.18, 0.22, 0.27, 0.15, 0.1], "high": [0.22, 0.28, 0.33, 0.21, 0.9], "verdict": ["go", "go", "no-go", "inconclusive", "inconclusive"]})
    return [
        table(frame, f"Late by carrier {text}", formats={"late": ".1%"}, counts="n", least=10),
        stack(facts({text: text, "rows": 336776}, text), note(text, "warn")),
        headline([(text, text, {"value": 0.7, "low": 0.6, "high": 0.8}, 0.65)]),
        bars(frame, "carrier", "late", f"Bars {text}", low="low", high="high", limit=0.25, spec=".0%", xlabel=text, ylabel=text),
        lines(frame, "carrier", ["late", "high"], f"Lines {text}", xlabel=text, labels={"late": text}, limit=0.3),
        points(frame, "n", "late", f"Points {text}", label="carrier", xlabel=text),
        histogram(frame["n"], f"Histogram {text}", text, {text: 300}),
    ]


def notebook(phase: str, text: str, shown: list[Any], extra: list[dict[str, Any]]) -> dict[str, Any]:
    outputs = [[{"output_type": "execute_result", "metadata": {}, "execution_count": 1, "data": {"text/html": s._repr_html_(), "text/plain": repr(s)}}] for s in shown]
    cells = [{"cell_type": "markdown", "metadata": {}, "source": f"# {QUESTIONS[phase]} {text}\n> Whether to go on. {text}\n\nWords {text} words."},
             {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": f"problem = {text!r}", "outputs": []}]
    for output in [*outputs, *([o] for o in extra)]:
        cells += [{"cell_type": "markdown", "metadata": {}, "source": f"## A step\n{text}"}, {"cell_type": "code", "metadata": {}, "source": "secret_call()", "outputs": output}]
    return {"cells": cells, "metadata": {"title": text, "kernelspec": {"name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}
