"The runner on trivial phases: what runs, why, side by side, and what is told."
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from engine_project import chain_cells, write_notebook, write_project, write_wave

ROOT = Path(__file__).resolve().parent.parent
Command = Callable[..., subprocess.CompletedProcess[str]]


def call(root: Path, *words: str, timeout: float = 180, **environment: str) -> subprocess.CompletedProcess[str]:
    "The command in a project."
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *words], cwd=root, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def events(done: subprocess.CompletedProcess[str]) -> list[dict]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def ran(told: list[dict]) -> dict[str, list[str]]:
    "Phase -> reasons of those that ran."
    return {e["phase"]: e["reasons"] for e in told if e["event"] == "phase_started"}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Four phases, run once; the last two read train.budget_s."
    root = write_project(tmp_path_factory.mktemp("chain"), phases=4, leaves=(3, 4))
    done = call(root, "run", "tiny", "--json")
    assert done.returncode == 0, done.stderr + done.stdout[-2000:]
    return root


def test_events_are_json_lines_in_order(tmp_path: Path) -> None:
    root = write_project(tmp_path, phases=2)
    told = events(call(root, "run", "tiny", "--json"))
    assert [e["seq"] for e in told] == list(range(1, len(told) + 1))
    times = [e["elapsed_s"] for e in told if "elapsed_s" in e]
    assert times == sorted(times) and len(times) >= len(told) - 1
    last = [e for e in told if e["event"] != "note"][-1]   # the tracker speaks after the run
    assert told[0]["event"] == "run_started" and last["event"] == "run_finished" and last["verdict"] == "go"
    cells = [(e["cell"], e["of"]) for e in told if e["event"] == "cell" and e["phase"] == "01_p1"]
    assert cells == [(i, 8) for i in range(1, 9)]
    finished = next(e for e in told if e["event"] == "phase_finished")
    assert finished["answer"] == "It is 1." and finished["cpu_s"] > 0 and finished["peak_rss_mb"] > 20


def test_nothing_changed_starts_no_kernel(chain: Path) -> None:
    code = """
import subprocess, sys
from pipeline.cli.main import main
def refuse(*a, **k): raise AssertionError(f"a process was started: {a}")
subprocess.Popen.__init__ = refuse
code = main(["run", "tiny"])
heavy = {"pydantic", "polars", "typer", "rich", "papermill", "zmq", "numpy"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""
    call(chain, "run", "tiny")
    done = subprocess.run([sys.executable, "-c", code], cwd=chain, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "nothing changed; all 4 phases are fresh" in done.stdout


def test_one_parameter_runs_the_phases_that_read_it(chain: Path) -> None:
    told = events(call(chain, "run", "tiny", "--set", "train.budget_s=120", "--json"))
    assert ran(told) == {"03_p3": ["train.budget_s 60.0 → 120.0"], "04_p4": ["train.budget_s 60.0 → 120.0"]}
    back = events(call(chain, "run", "tiny", "--json"))
    assert ran(back) == {"03_p3": ["train.budget_s 120.0 → 60.0"], "04_p4": ["train.budget_s 120.0 → 60.0"]}


def test_equal_outputs_stop_the_wave(tmp_path: Path) -> None:
    root = write_project(tmp_path, phases=3, leaves=())
    assert call(root, "run", "tiny").returncode == 0
    first = root / "nbs/phases/01_p1.ipynb"
    write_notebook(first, *chain_cells("01_p1", None, work="x = 1"))
    assert ran(events(call(root, "run", "tiny", "--json"))) == {"01_p1": ["its own code cells changed"]}
    write_notebook(first, *chain_cells("01_p1", None, work="x = 1  # a comment\n"))
    assert ran(events(call(root, "run", "tiny", "--json"))) == {}
    write_notebook(first, *chain_cells("01_p1", None, step=5))
    assert ran(events(call(root, "run", "tiny", "--json"))) == {
        "01_p1": ["its own code cells changed"], "02_p2": ["p1/value changed"], "03_p3": ["p2/value changed"],
    }


def test_why_and_status_run_nothing(chain: Path) -> None:
    call(chain, "run", "tiny")
    assert "04_p4 is fresh" in call(chain, "why", "4").stdout
    done = call(chain, "why", "p4", "--set", "train.budget_s=9", "--json")
    assert json.loads(done.stdout) == {"phase": "04_p4", "stale": True, "reasons": ["train.budget_s 60.0 → 9"]} or "60.0 → 9" in done.stdout
    status = json.loads(call(chain, "status", "tiny/main", "--json").stdout)
    assert status["state"] == "finished" and status["verdict"] == "go" and [p["state"] for p in status["phases"]] == ["fresh"] * 4


def test_from_only_and_refresh(chain: Path) -> None:
    assert list(ran(events(call(chain, "run", "tiny", "--only", "p2", "--json")))) == ["02_p2"]
    assert list(ran(events(call(chain, "run", "tiny", "--from", "3", "--json")))) == ["03_p3"]
    assert list(ran(events(call(chain, "run", "tiny", "--refresh", "--json")))) == ["01_p1", "02_p2", "03_p3", "04_p4"]
    wrong = call(chain, "run", "tiny", "--only", "p9")
    assert wrong.returncode == 2 and wrong.stderr.startswith("pilothouse: no phase 'p9'")


def test_one_number_is_side_by_side(tmp_path: Path) -> None:
    "Each of two phases waits for a sign of the other: one after the other they would never end."
    wait = "import pathlib, time\nhere = pathlib.Path('signs'); here.mkdir(exist_ok=True)\n(here / __import__('os').urandom(8).hex()).touch()\n" \
           "while len(list(here.iterdir())) < 2:\n    time.sleep(.01)"
    root = write_wave(tmp_path, 2, work=wait)
    done = call(root, "run", "tiny", "--jobs", "2", "--json", timeout=90)
    assert done.returncode == 0, done.stderr
    assert sorted(e["phase"] for e in events(done) if e["event"] == "phase_finished") == ["01_w1", "01_w2"]


@pytest.mark.slow
def test_eight_wide(tmp_path: Path) -> None:
    root = write_wave(tmp_path, 8)
    done = call(root, "run", "tiny", "--jobs", "8", "--json")
    assert done.returncode == 0, done.stderr
    assert sum(e["event"] == "phase_finished" for e in events(done)) == 8


def test_verdict_is_the_exit_code(tmp_path: Path) -> None:
    root = write_project(tmp_path, phases=1, leaves=())
    for check, code, verdict in (
        ("run.check('x', .5, at_least=.9)", 1, "no-go"),
        ("run.check('x', float('nan'), at_least=.9)", 1, "no-go"),
        ("from pipeline.core.run import Estimate\nrun.check('x', Estimate(.7, .6, .8), at_least=.65, bound='low')", 5, "inconclusive"),
        ("run.check('x', .95, at_least=.9)", 0, "go"),
    ):
        write_notebook(root / "nbs/phases/01_p1.ipynb", *chain_cells("01_p1", None, work=check))
        done = call(root, "run", "tiny")
        assert done.returncode == code and verdict.upper() in done.stdout, done.stdout + done.stderr
        assert call(root, "run", "tiny").returncode == code   # fresh, and still that verdict


def test_a_failing_cell_is_one_sentence(tmp_path: Path) -> None:
    root = write_project(tmp_path, phases=2, leaves=())
    for work, code, sentence in (
        ("from pipeline.core.errors import IntegrityError\nraise IntegrityError('the seal is broken')", 3, "01_p1: the seal is broken"),
        ("{}['column']", 2, "01_p1: cell 4 of 8 raised KeyError: 'column'; open the notebook there"),
        ("import no_such_library", 4, "01_p1: cell 4 of 8 raised ModuleNotFoundError"),
        ("import os; os._exit(3)", 4, "01_p1 was stopped in cell 4 of 8: its kernel died (exit code 3)"),
    ):
        write_notebook(root / "nbs/phases/01_p1.ipynb", *chain_cells("01_p1", None, work=work))
        done = call(root, "run", "tiny")
        assert done.returncode == code and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
        run = root / "outputs/tiny/main"
        assert (run / "failed/01_p1.ipynb").exists() and not (run / "01_p1").exists() and not (run / ".work/01_p1").exists()
    write_notebook(root / "nbs/phases/01_p1.ipynb", *chain_cells("01_p1", None)[:-1])
    done = call(root, "run", "tiny")
    assert done.returncode == 2 and "ended without run.finish()" in done.stderr
    write_notebook(root / "nbs/phases/01_p1.ipynb", *chain_cells("01_p1", None))
    assert call(root, "run", "tiny").returncode == 0 and not (root / "outputs/tiny/main/failed/01_p1.ipynb").exists()


def test_a_failure_keeps_what_was_there(tmp_path: Path) -> None:
    root = write_project(tmp_path, phases=2, leaves=())
    assert call(root, "run", "tiny").returncode == 0
    before = (root / "outputs/tiny/main/02_p2/receipt.json").read_bytes()
    write_notebook(root / "nbs/phases/02_p2.ipynb", *chain_cells("02_p2", "01_p1", work="raise ValueError('no')"))
    assert call(root, "run", "tiny").returncode == 2
    assert (root / "outputs/tiny/main/02_p2/receipt.json").read_bytes() == before


# -- papermill


def test_bare_papermill_and_our_engine_write_the_same_notebook(tmp_path: Path) -> None:
    root = write_project(tmp_path, phases=1, leaves=())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PILOTHOUSE_NOW": "2026-01-31T12:00:00+00:00"}
    found = {}
    for name, extra in (("bare", []), ("pilothouse", ["--engine", "pilothouse"])):
        code = "import sys, pipeline.engine.execute; from papermill.cli import papermill; sys.argv[0] = 'papermill'; papermill()"
        words = [sys.executable, "-m", "papermill"] if name == "bare" else [sys.executable, "-c", code]
        done = subprocess.run([*words, "nbs/phases/01_p1.ipynb", f"{name}.ipynb", "-p", "run", f"outputs/tiny/{name}", *extra],
                              cwd=root, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert json.loads((root / f"outputs/tiny/{name}/01_p1/value.json").read_text()) == {"value": 1}
        written = json.loads((root / f"{name}.ipynb").read_text())
        found[name] = [(c["cell_type"], "".join(c["source"]).replace(name, "X"), c["metadata"].get("tags"), c["metadata"]["papermill"]["status"],
                        [o["output_type"] for o in c.get("outputs", [])], c.get("execution_count")) for c in written["cells"]]
        assert set(written["metadata"]["papermill"]) >= {"parameters", "start_time", "end_time", "duration", "version"}
    assert found["bare"] == found["pilothouse"]


@pytest.mark.parametrize("first", ["papermill", "pipeline.engine.execute"])
def test_papermill_finds_our_engine_whichever_is_imported_first(first: str) -> None:
    if not [e for e in entry_points(group="papermill.engine") if e.name == "pilothouse"]:
        pytest.skip("pilothouse is not installed here, so papermill finds no entry point of it")
    code = f"import {first}; from papermill.engines import papermill_engines as known; assert known.get_engine('pilothouse').execute_notebook"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_phase_that_ran_elsewhere_counts(tmp_path: Path) -> None:
    "Bare papermill makes a phase's evidence; the runner then only asks for its executed notebook."
    root = write_project(tmp_path, phases=2, leaves=())
    subprocess.run([sys.executable, "-m", "papermill", "nbs/phases/01_p1.ipynb", "out.ipynb"], cwd=root, capture_output=True, check=True,
                   env={**os.environ, "PYTHONPATH": str(ROOT)})
    told = ran(events(call(root, "run", "tiny", "--json")))
    assert told == {"01_p1": ["it ran outside the engine and kept no executed notebook"], "02_p2": ["it never ran"]}


def test_no_machine_path_and_no_secret_in_what_is_kept(tmp_path: Path) -> None:
    root = write_project(tmp_path, phases=2, leaves=())
    assert call(root, "run", "tiny", CANARY_TOKEN="hunter2-canary").returncode == 0
    for path in (root / "outputs").rglob("*"):
        if path.is_file() and ".cache" not in path.parts:
            content = path.read_bytes()
            assert b"hunter2-canary" not in content, path
            assert str(root).encode() not in content, path


def test_phases_that_end_together_share_one_process_that_draws(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from pipeline.cli.pages import DrawnBehind

    pages = DrawnBehind()
    with ThreadPoolExecutor(16) as pool:
        processes = set(pool.map(lambda _: pages.process.pid, range(64)))
        list(pool.map(pages.phase, [tmp_path / str(i) for i in range(32)]))
    assert len(processes) == 1 and pages.asked == 32
    assert pages.finish(tmp_path) == [] and pages.asked == 0   # each order was answered; these folders hold nothing to draw
    pages.stop()


def test_a_killed_run_takes_the_process_that_draws_with_it(tmp_path: Path) -> None:
    "Also in the midst of a page: here of a notebook that never ends, so that nothing else ends the drawing."
    import signal
    from contextlib import suppress

    import psutil
    from serving_kit import until

    os.mkfifo(tmp_path / "notebook.ipynb")
    code = ("import signal, sys; from pathlib import Path; from pipeline.cli.pages import DrawnBehind\n"
            "pages = DrawnBehind(); pages.phase(Path(sys.argv[1])); print(pages.process.pid, flush=True); signal.pause()")
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout
        drawing = psutil.Process(int(run.stdout.readline()))

        held: list[int] = []

        def reads() -> bool:
            with suppress(OSError):     # refused while nobody has it open to read
                held.append(os.open(tmp_path / "notebook.ipynb", os.O_WRONLY | os.O_NONBLOCK))
            return bool(held)

        assert until(reads, 60)
        run.send_signal(signal.SIGKILL)
    assert until(lambda: not drawing.is_running() or drawing.status() == psutil.STATUS_ZOMBIE, 20)
    os.close(held[0])


def test_a_run_that_fails_has_the_pages_of_what_finished(tmp_path: Path) -> None:
    root = write_project(tmp_path, phases=2, leaves=())
    write_notebook(root / "nbs" / "phases" / "02_p2.ipynb", "raise ValueError('no')")
    assert call(root, "run", "tiny").returncode not in (0, 1, 5)
    assert (root / "outputs" / "tiny" / "main" / "01_p1" / "report.html").is_file()


def test_status_tells_whole_answers_and_the_verdict_once(capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.cli.verbs import _show_status

    answer = "Inconclusive: " + "all criteria hold, " * 30 + "see: pilothouse rollout start income --version N\x1b[2J"
    phase = {"phase": "10_report", "state": "fresh", "reasons": [], "verdict": "inconclusive", "answer": answer}
    _show_status({"problem": "tiny", "run": "main", "state": "finished", "pid": None, "phases": [phase], "verdict": "inconclusive"})
    line = capsys.readouterr().out.splitlines()[1]
    assert "inconclusive: all criteria hold" in line and line.lower().count("inconclusive") == 1
    assert "--version N" in line and "\x1b" not in line


def test_a_phase_that_took_more_than_last_time_is_told(tmp_path: Path) -> None:
    "The manifest keeps what the phase took before, also in another run of the problem; the run's page says where it rose."
    from pipeline.report.cost import Prices, phase_costs, risen
    from pipeline.report.evidence import read_run

    root, run = write_project(tmp_path / "p", phases=2, leaves=()), tmp_path / "p" / "outputs" / "tiny"
    assert call(root, "run", "tiny").returncode == 0
    slow = chain_cells("02_p2", "01_p1", work="import time\nend = time.process_time() + 2.5\nwhile time.process_time() < end:\n    pass")
    write_notebook(root / "nbs" / "phases" / "02_p2.ipynb", *slow)
    assert call(root, "run", "tiny").returncode == 0
    phases = json.loads((run / "main" / "manifest.json").read_text())["phases"]
    assert phases["02_p2"]["before"]["run"] == "main" and phases["02_p2"]["cpu_s"] > phases["02_p2"]["before"]["cpu_s"] + 2
    assert "before" not in phases["01_p1"]
    told = risen(phase_costs(read_run(run / "main").phases, Prices(0.04, 350, 10)))
    assert len(told) == 1 and told[0].startswith("02 p2 took ") and told[0].split(" (")[0] in (run / "main" / "index.html").read_text()
    manifest, measured = json.loads((run / "main" / "manifest.json").read_text()), phase_costs(read_run(run / "main").phases, Prices(0.04, 350, 10))
    assert measured["cpu_s"].sum() == pytest.approx(manifest["cpu_s"]) and measured["wall_s"].sum() == pytest.approx(manifest["wall_s"])
    assert measured["peak_rss_mb"].max() == manifest["peak_rss_mb"]
    assert call(root, "run", "tiny", "--run", "second").returncode == 0
    assert json.loads((run / "second" / "manifest.json").read_text())["phases"]["01_p1"]["before"]["run"] == "main"
