"""A project of trivial phases for the engine's tests and benchmarks: a chain in which each adds one to what it loads."""
from __future__ import annotations

import json
from pathlib import Path

SPEC = {"display_name": "python3", "language": "python", "name": "python3"}
PROBLEM = """\
problem: {name: tiny, statement: Does the engine keep its word?, kpi: {name: x, baseline: 0, target: 1, unit: ''}, task: binary, target: y}
data: {sources: [{name: t, kind: csv, path: t.csv}]}
train: {budget_s: 60}
"""


def cell(source: str, *tags: str, number: int = 0) -> dict:
    return {"cell_type": "code", "id": f"c{number}", "execution_count": None, "outputs": [], "source": source, "metadata": {"tags": list(tags)} if tags else {}}


def write_notebook(path: Path, *sources: str) -> None:
    "A phase notebook: the parameters cell and then these cells."
    parameters = 'problem: str = "params/tiny.yml"\nrun: str = "outputs/tiny/main"'
    cells = [{"cell_type": "markdown", "id": "title", "metadata": {}, "source": f"# {path.stem}?\n> A trivial phase."},
             cell(parameters, "parameters")] + [cell(s, number=i) for i, s in enumerate(sources, 1)]
    path.write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": SPEC}, "nbformat": 4, "nbformat_minor": 5}))


def chain_cells(name: str, before: str | None, leaf: bool = False, work: str = "pass", step: int = 1) -> list[str]:
    "The cells of one link: load, add, save."
    room = name.split("_", 1)[1]
    load = f'value = run.load("{before.split("_", 1)[1]}/value")["value"]' if before else "value = 0"
    return [
        f'from pipeline.core.run import open_run\n\nrun = open_run("{name}", problem, run)',
        work, load + ("\nbudget = run.problem.train.budget_s" if leaf else ""),
        f'run.save("{room}/value", {{"value": value + {step}}})', 'run.conclude(f"It is {value + 1}.")', "run.finish()",
    ]


def write_project(root: Path, phases: int = 8, leaves: tuple[int, ...] = (7, 8), work: str = "pass", settings: str = "") -> Path:
    "settings.ini, params/tiny.yml and a chain of phases under nbs/phases."
    (root / "params").mkdir(parents=True)
    folder = root / "nbs" / "phases"
    folder.mkdir(parents=True)
    (root / "settings.ini").write_text(settings or "[engine]\nthreads = 1\n[tracking]\nmode = off\n")
    (root / "params" / "tiny.yml").write_text(PROBLEM)
    names = [f"{i:02}_p{i}" for i in range(1, phases + 1)]
    for number, (name, before) in enumerate(zip(names, [None, *names]), 1):
        write_notebook(folder / f"{name}.ipynb", *chain_cells(name, before, number in leaves, work))
    return root


def write_wave(root: Path, width: int, work: str = "pass") -> Path:
    "A project whose phases all have number 1."
    write_project(root, phases=1, leaves=())
    (root / "nbs" / "phases" / "01_p1.ipynb").unlink()
    for i in range(1, width + 1):
        write_notebook(root / "nbs" / "phases" / f"01_w{i}.ipynb", *chain_cells(f"01_w{i}", None, work=work))
    return root
