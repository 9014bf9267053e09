"The house itself: lock files agree, the package is light, the README comes from its notebook."
from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import house  # noqa: E402
import setup  # noqa: E402


def test_conda_and_lock_install_the_same_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert [p for p in conda if not p.startswith("-")] == setup.pins((ROOT / "requirements.lock").read_text())
    assert len(conda) > 100


def test_every_direct_dependency_is_locked():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    locked = {p.split("==")[0].lower().replace("_", "-") for p in setup.pins((ROOT / "requirements.lock").read_text())}
    assert not {re.split(r"[<>=\[ ]", d)[0].lower().replace("_", "-") for d in asked} - locked


def test_every_locked_package_but_torch_has_a_hash():
    lock = (ROOT / "requirements.lock").read_text()
    blocks = re.split(r"\n(?=[A-Za-z0-9])", lock)
    assert [b.split("==")[0] for b in blocks if "==" in b.split("\n")[0] and "--hash" not in b] == ["torch"]


def cpu_seconds(*command: str) -> float:
    code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True);"
            "u = resource.getrusage(resource.RUSAGE_CHILDREN); print(u.ru_utime + u.ru_stime)")
    return float(subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True, cwd=ROOT).stdout)


@pytest.mark.parametrize("command", [
    ["-c", "import pipeline"], ["-c", "import pipeline.core.problem"], ["-m", "pipeline", "--help"],
], ids=["import", "import-problem", "help"])
def test_light_start_imports_nothing_heavy(command):
    loaded = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, cwd=ROOT)
    assert loaded.returncode == 0
    names = {line.split("|")[-1].strip().split(".")[0] for line in loaded.stderr.splitlines() if line.startswith("import time:")}
    assert not names & {"torch", "pytorch_lightning", "wandb", "ray", "polars", "pandas", "lightgbm", "sklearn", "matplotlib", "papermill", "nbclient"}


def test_house_check_sees_a_changed_module_an_orphan_and_an_untagged_phase(tmp_path, monkeypatch):
    import json
    import shutil

    for folder in ("nbs/lib/core", "nbs/phases", "pipeline/core", "params", "tests", "tools"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "nbs/lib/core/00_errors.ipynb", tmp_path / "nbs/lib/core")
    shutil.copy(ROOT / "pipeline/core/errors.py", tmp_path / "pipeline/core")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
    monkeypatch.setattr(house, "ROOT", tmp_path)
    assert house.check_export() == [] and house.check_orphans() == []
    (tmp_path / "pipeline/core/errors.py").open("a").write("changed = True\n")
    assert "differs from" in house.check_export()[0]
    (tmp_path / "pipeline/core/lonely.py").write_text("x = 1\n")
    assert any("no notebook exports it" in fault for fault in house.check_orphans())
    assert any("git does not track it" in fault for fault in house.check_orphans())
    cell = {"cell_type": "code", "source": "for x in []:\n    pass", "metadata": {}, "outputs": [], "execution_count": None, "id": "a"}
    (tmp_path / "nbs/phases/01_x.ipynb").write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    faults = " ".join(house.check_phases())
    assert "0 cells are tagged" in faults and "no python3 kernelspec" in faults and "a For in a phase" in faults


def test_a_text_that_is_no_python_is_refused_with_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(house, "ROOT", tmp_path)
    text = tmp_path / "lesson.py"
    text.write_text("# %% [markdown]\n# # Sums\n\n# %%\n%time 1 + 1\n!ls\nawait x\n")
    house.compile_text(text)
    text.write_text("# %% [markdown]\n# # Sums\nwithout a sign\n")
    with pytest.raises(SystemExit, match="lesson.py:3: invalid syntax; nothing of it was synced"):
        house.compile_text(text)


def test_schema_beside_the_problem_files_is_the_present_one():
    from pipeline.core.problem import json_schema

    assert (ROOT / "params/problem.schema.json").read_text() == json_schema(), "run `make schema`"


def test_every_problem_file_fits_its_schema():
    import json

    import jsonschema

    from pipeline.core.problem import load_problem

    schema = json.loads((ROOT / "params/problem.schema.json").read_text())
    for file in (ROOT / "params").glob("*.yml"):
        jsonschema.validate(load_problem(file).model_dump(mode="json"), schema)


def test_no_secret_or_machine_path_is_committed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    bad = re.compile(r"/(?:root|home|work)/[a-z]|BEGIN (?:RSA |EC )?PRIVATE KEY|pypi\.org|files\.pythonhosted")
    found = [f for f in listed if (ROOT / f).suffix in (".py", ".ipynb", ".yml", ".toml", ".ini", ".md", "") and (ROOT / f).is_file()
             and f != "tests/test_house.py" and bad.search((ROOT / f).read_text(errors="ignore"))]
    assert found == []
