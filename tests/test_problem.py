"The problem file is exactly understood or refused in one sentence."
from __future__ import annotations

import ast
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from pipeline.core.errors import InputError
from pipeline.core.problem import Problem, check_name, leaves, load_problem, parse_problem, parse_setting, read_yaml

ROOT = Path(__file__).resolve().parent.parent
FLIGHTS = (ROOT / "params/flights.yml").read_text()


def complaint(text: str) -> str:
    with pytest.raises(InputError) as caught:
        parse_problem(*read_yaml(text, "flights.yml"), "flights.yml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def line_of(fragment: str, text: str = FLIGHTS) -> int:
    return text[: text.index(fragment)].count("\n") + 1


@pytest.mark.parametrize("old, new, sentence", [
    ("  budget_s: 60", "  budget: 60", "train.budget is unknown; did you mean 'budget_s'?"),
    ("  budget_s: 60", "  budget_s: '60'", "train.budget_s = '60': input should be a valid number"),
    ("  budget_s: 60", "  budget_s: -1", "train.budget_s = -1: input should be greater than 0"),
    ("  budget_s: 60", "  budget_s: .inf", "train.budget_s = inf: input should be a finite number"),
    ("at_least: 0.65", "at_least: .nan", "evaluate.acceptance.0.at_least = nan: input should be a finite number"),
    ("metric: roc_auc, at_least", "metric: roc_acu, at_least", "did you mean 'roc_auc'?"),
    ("  seeds: 3", "  seeds: yes", "train.seeds = 'yes': input should be a valid integer"),
    ("  seeds: 3", "  seeds: 3\n  seeds: 4", "key 'seeds' stands twice"),
    ("train:\n", "trian:\n", "trian is unknown; did you mean 'train'?"),
    ("  name: flights\n", "  name: ../flights\n", "problem.name = '../flights': string should match pattern"),
    ("holdout_from: 2013-08-01", "holdout_from: 2013-13-01", "2013-13-01 is no date; write YYYY-MM-DD"),
    ("stages: [1, 5, 25, 50, 100]", "stages: [5, 1, 100]", "stages must rise and end at 100"),
])
def test_each_slip_is_one_sentence_with_file_line_and_key(old, new, sentence):
    assert old in FLIGHTS
    text = FLIGHTS.replace(old, new)
    said = complaint(text)
    assert sentence in said
    number = int(said.split(":")[1])
    assert abs(number - line_of(old.split("\n")[0].strip())) <= 1, said


@pytest.mark.parametrize("text", [
    "a: !!python/object/apply:os.system ['touch hacked']\n",
    "a: !!python/name:os.system\n",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "? {a: 1}\n: b\n",
    "- just\n- a list\n",
    "a: [1, 2\n",
    "a: 1\na: 2\n",
    "a: " + "[" * 50 + "]" * 50 + "\n",
    "",
    "\x00",
    "a: \ud800",
], ids=["apply", "name", "aliases", "complex-key", "list", "open", "twice", "deep", "empty", "nul", "surrogate"])
def test_hostile_yaml_is_refused_and_runs_nothing(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        read_yaml(text, "x.yml")
    assert list(tmp_path.iterdir()) == []


def test_an_alias_bomb_is_refused_before_it_grows():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 7))
    before = time.process_time()
    with pytest.raises(InputError, match="anchors and aliases"):
        read_yaml(bomb, "bomb.yml")
    assert time.process_time() - before < 1
    with pytest.raises(InputError, match="larger than"):
        read_yaml("a: " + "x" * 2_000_000, "big.yml")


@given(st.text(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_problem_or_one_sentence(text):
    try:
        parse_problem(*read_yaml(text, "x.yml"), "x.yml")
    except InputError as error:
        assert "\n" not in str(error)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=8), c, max_size=3), max_leaves=8))
@settings(max_examples=300, deadline=None)
def test_any_value_in_any_section_is_read_or_refused(value):
    for section in ("problem", "data", "train", "evaluate", "rollout"):
        values, places = read_yaml(FLIGHTS, "flights.yml")
        values[section] = value
        try:
            parse_problem(values, places, "flights.yml")
        except InputError as error:
            assert str(error).startswith("flights.yml:")


@given(st.text(max_size=80))
@settings(max_examples=500, deadline=None)
def test_an_accepted_name_stays_in_its_folder(name):
    try:
        check_name(name)
    except InputError:
        return
    path = (Path("/outputs") / name)
    assert path.name == name and path.parent == Path("/outputs") and ".." not in path.parts


def test_no_leaf_of_the_embedded_problem_is_nan():
    problem = load_problem(ROOT / "params/flights.yml")
    found = dict(leaves(problem))
    assert len(found) > 60 and not any(isinstance(v, float) and not math.isfinite(v) for v in found.values())
    assert isinstance(problem, Problem) and found["data.split.holdout_from"] == "2013-08-01"


def test_settings_from_the_command_line():
    problem = load_problem(ROOT / "params/flights.yml", dict([parse_setting("train.budget_s=30"), parse_setting("data.split.folds=2")]))
    assert (problem.train.budget_s, problem.data.split.folds) == (30, 2)
    with pytest.raises(InputError, match="not section.key=value"):
        parse_setting("budget 30")
    with pytest.raises(InputError, match="train.budgets is unknown"):
        load_problem(ROOT / "params/flights.yml", {"train.budgets": 1})
    with pytest.raises(InputError, match="no problem file"):
        load_problem(ROOT / "params/flihgts.yml")


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def unsafe_in(source: str) -> list[str]:
    "Imports and calls by which data could run code."
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES]
        if isinstance(node, ast.Call):
            called, words = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in ("eval", "yaml.load", "yaml.unsafe_load", "yaml.full_load") or words.get("allow_pickle") == "True" \
                    or called == "torch.load" and words.get("weights_only") != "True":
                found.append(f"{called}(…)")
    return found


def test_no_unsafe_loader_anywhere():
    attacks = ["import pickle", "from joblib import load", "eval(x)", "yaml.load(x)", "torch.load(p)", "np.load(p, allow_pickle=True)"]
    assert all(unsafe_in(attack) for attack in attacks) and not unsafe_in("model.eval(); torch.load(p, weights_only=True)")
    found = {file.name: unsafe for file in (ROOT / "pipeline").rglob("*.py") if (unsafe := unsafe_in(file.read_text()))}
    assert found == {}


def test_the_command_refuses_in_under_a_second_of_work_and_starts_no_kernel(tmp_path):
    bad = tmp_path / "bad.yml"
    bad.write_text(FLIGHTS.replace("budget_s", "budgets"))
    code = ("import resource,subprocess,sys; r=subprocess.run(sys.argv[1:]); u=resource.getrusage(resource.RUSAGE_CHILDREN);"
            "print(round(u.ru_utime+u.ru_stime,2)); sys.exit(r.returncode)")
    done = subprocess.run([sys.executable, "-c", code, sys.executable, "-m", "pipeline", "run", str(bad)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "did you mean 'budget_s'?" in done.stderr + done.stdout and "Traceback" not in done.stderr
    assert float(done.stdout.split()[-1]) < 1
