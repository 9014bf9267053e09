"Kills, locks, full disks, limits and attacks on parameters: what must never spoil a run."
from __future__ import annotations

import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_project import PROBLEM, chain_cells, write_notebook, write_project, write_wave

from pipeline.engine.kernels import marked

ROOT = Path(__file__).resolve().parent.parent
SLOW = "import time\ntime.sleep(.15)"   # long enough to be hit by a kill at any moment


def start(root: Path, *words: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", "tiny", *words], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT), "PILOTHOUSE_TRIAL": str(root)}, **options,  # type: ignore[call-overload]
    )


def finish(root: Path, *words: str, **options: object) -> tuple[int, str, str]:
    process = start(root, *words, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def alive(root: Path) -> list[int]:
    "Processes of a trial that still live."
    found = []
    for entry in Path("/proc").iterdir():
        try:
            marks = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if f"PILOTHOUSE_TRIAL={root}".encode() in marks and (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def gone(root: Path, seconds: float = 5) -> bool:
    "True as soon as nothing of a trial lives any more."
    until = time.monotonic() + seconds
    while alive(root):
        if time.monotonic() > until:
            return False
        time.sleep(.02)
    return True


def check_whole(root: Path) -> None:
    "Everything that has a final name is whole: receipts parse, artifacts have their digests, manifests parse."
    from pipeline.core.store import digest

    run = root / "outputs/tiny/main"
    for folder in run.glob("[0-9]*_*"):
        receipt = json.loads((folder / "receipt.json").read_text())
        for facts in receipt["outputs"].values():
            assert digest(folder / facts["file"]) == facts["sha256"], folder
        json.loads((folder / "notebook.ipynb").read_text())
        assert not (folder / "report.html").exists() or (folder / "report.html").read_text().rstrip().endswith("</html>")
    if (run / "manifest.json").exists():
        json.loads((run / "manifest.json").read_text())


def kernels_of(runner: int) -> list[int]:
    "Kernel processes that a runner started."
    found = []
    for pid in marked(""):
        try:
            if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == runner:
                found.append(pid)
        except OSError:
            continue
    return found


def kill_trial(root: Path, victim: str, after: float) -> None:
    "Kill runner or kernels at a moment, look, resume, look."
    process = start(root)
    time.sleep(after)
    for pid in [process.pid] if victim == "runner" else kernels_of(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.communicate(timeout=60)
    assert gone(root), f"{alive(root)} outlived a killed {victim}"
    check_whole(root)
    code, out, err = finish(root)
    assert code == 0 and "✔ GO" in out, out + err
    check_whole(root)


@pytest.mark.slow
def test_kill_at_any_moment(tmp_path: Path) -> None:
    "T21: ten here; fifty in tests/bench."
    chance = random.Random(21)
    for trial in range(10):
        root = write_project(tmp_path / str(trial), phases=3, leaves=(3,), work=SLOW)
        kill_trial(root, ("runner", "kernel")[trial % 2], chance.uniform(.1, 3))


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    root = write_project(tmp_path, phases=2, leaves=(), work="import time, pathlib\npathlib.Path('begun').touch()\ntime.sleep(60)")
    process = start(root)
    while not (root / "begun").exists() and process.poll() is None:
        time.sleep(.02)
    process.kill()
    process.communicate()
    for name, before in (("01_p1", None), ("02_p2", "01_p1")):
        write_notebook(root / f"nbs/phases/{name}.ipynb", *chain_cells(name, before))
    status = subprocess.run([sys.executable, "-m", "pipeline", "status", "tiny/main", "--json"], cwd=root, capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert json.loads(status.stdout)["state"] == "interrupted", status.stdout + status.stderr
    code, out, _ = finish(root)
    assert code == 0 and "01_p1: it was interrupted" in out


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_person_may_stop_it(tmp_path: Path, sign: int) -> None:
    root = write_wave(tmp_path, 2, work="import time, pathlib\npathlib.Path('begun').touch()\ntime.sleep(60)")
    before = signal.signal(sign, signal.default_int_handler)   # tests started in the background ignore SIGINT, and so would their children
    process = start(root, "--jobs", "2")
    signal.signal(sign, before)
    while not (root / "begun").exists() and process.poll() is None:
        time.sleep(.02)
    process.send_signal(sign)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 4 and "stopped; what was finished is kept" in err
    assert gone(root)


# -- locks (T23)


def test_twenty_starts_have_one_owner(tmp_path: Path) -> None:
    root = write_project(tmp_path, phases=1, leaves=(), work="import time, pathlib\nwhile not pathlib.Path('go').exists():\n    time.sleep(.02)")
    processes = [start(root) for _ in range(20)]
    refused = []
    while len(refused) < 19:
        refused = [p for p in processes if p.poll() is not None]
        time.sleep(.05)
    (root / "go").touch()
    codes = sorted(p.wait(60) for p in processes)
    assert codes == [0] + [4] * 19
    for process in refused:
        _, err = process.communicate()
        assert "is being worked on by process" in err and err.count("\n") == 1
    for process in processes:
        process.communicate()
    code, out, _ = finish(root)   # the lock of a dead process stops nobody
    assert code == 0 and "nothing changed" in out


def test_a_phase_that_is_open_elsewhere_is_left_alone(tmp_path: Path) -> None:
    import fcntl

    root = write_project(tmp_path, phases=1, leaves=())
    work = root / "outputs/tiny/main/.work"
    work.mkdir(parents=True)
    with (work / "01_p1.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = finish(root)
        assert code == 4 and "is open in another process" in err


# -- disks (T22)


def test_a_full_disk_leaves_the_earlier_run(tmp_path: Path) -> None:
    root = write_project(tmp_path, phases=2, leaves=())
    assert finish(root)[0] == 0
    before = {p: p.read_bytes() for p in (root / "outputs/tiny/main").rglob("*") if p.is_file() and not p.name.startswith(".") and ".work" not in p.parts}
    write_notebook(root / "nbs/phases/02_p2.ipynb", *chain_cells("02_p2", "01_p1", work="run.save('p2/big', 'x' * 400_000)"))
    code, _, err = finish(root, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)))
    assert code == 4 and err.count("\n") == 1 and "Traceback" not in err, err
    for path, content in before.items():
        assert path.read_bytes() == content, path
    assert not list((root / "outputs").rglob("*big*"))
    assert finish(root)[0] == 0


def test_a_notebook_that_a_full_disk_cut_short_is_not_kept(tmp_path: Path) -> None:
    "What failed/ holds can be opened, and is of the last failure."
    from types import SimpleNamespace

    from pipeline.engine.phases import Phase
    from pipeline.engine.runner import _Work

    run, kept = tmp_path / "main", tmp_path / "kept.ipynb"
    run.mkdir()
    for content, held in ((json.dumps({"cells": []}), ["01_p1.ipynb"]), ('{"cells": [', []), ("", [])):
        kept.write_text(content)
        _Work._keep_failed(SimpleNamespace(run=run), Phase("01_p1", 1, tmp_path), kept)  # type: ignore[arg-type]
        assert [p.name for p in (run / "failed").iterdir()] == held and not kept.exists()


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    root = write_project(tmp_path, phases=1, leaves=())
    (root / "outputs").write_text("a file, not a folder")
    code, _, err = finish(root)
    assert code == 4 and "opening run tiny/main" in err and "Traceback" not in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    root = write_project(tmp_path, phases=1, leaves=())
    (root / "outputs").mkdir(mode=0o500)
    code, _, err = finish(root)
    assert code == 4 and "no permission" in err


# -- limits (T39)


@pytest.mark.parametrize(("limit", "work", "sentence"), [
    ("phase_minutes = 0.03", "while True:\n    pass", "the limit is 2 s"),
    ("phase_memory_gb = 0.3", "x = []\nwhile True:\n    x.append(bytearray(20_000_000))\n    __import__('time').sleep(.02)", "MB, the limit is 307 MB"),
    ("phase_output_mb = 1", "while True:\n    print('x' * 10_000)", "more than 1 MB of output"),
    ("phase_minutes = 0.05", "import subprocess\nfor _ in range(5):\n    subprocess.Popen(['setsid', 'sleep', '300'])\nwhile True:\n    pass", "the limit is 3 s"),
])
def test_limits_end_the_phase_and_all_it_started(tmp_path: Path, limit: str, work: str, sentence: str) -> None:
    root = write_project(tmp_path, phases=1, leaves=(), work=work, settings=f"[engine]\nthreads = 1\n{limit}\n[tracking]\nmode = off\n")
    code, _, err = finish(root)
    assert code == 4 and "01_p1 was stopped in cell" in err and sentence in err, err
    assert gone(root)


def test_too_many_processes(tmp_path: Path) -> None:
    from pipeline.engine.client import Limits, Meter
    from pipeline.engine.kernels import Usage
    from pipeline.core.errors import EnvironmentFault

    with pytest.raises(EnvironmentFault, match="started 513 processes"):
        Meter(Limits(), time.monotonic()).note(Usage(processes=513))


# -- parameters and problem files (T01-T05, T15)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Path]:
    "A project in which nothing may start a kernel."
    root = write_project(tmp_path, phases=1, leaves=())
    yield root
    assert not (root / "outputs/tiny").exists() or not list((root / "outputs/tiny").rglob("*.ipynb"))


@pytest.mark.parametrize("problem", [
    PROBLEM + "x=open('owned','w');alpha: 1\n",
    PROBLEM.replace("budget_s", "bugdet_s"),
    PROBLEM + "evaluate: !!python/object/apply:os.system ['touch owned']\n",
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n",
    PROBLEM + "train: {budget_s: 1}\n",
    PROBLEM.replace("60", ".nan"),
    PROBLEM.replace("name: tiny", "name: ../../tiny"),
    PROBLEM.replace("name: tiny", "name: store"),
])
def test_bad_problem_files_are_one_sentence(watched: Path, problem: str) -> None:
    (watched / "params/tiny.yml").write_text(problem)
    code, out, err = finish(watched)
    assert code == 2 and err.startswith("pilothouse: ") and err.count("\n") == 1 and not out, err
    assert not (watched / "owned").exists()


@pytest.mark.parametrize("words", [
    ("--run", "../x"), ("--run", "/etc"), ("--run", "a\\b"), ("--run", "%2e%2e"), ("--run", ".."), ("--run", "x" * 65), ("--run", "a#b"),
    ("--set", "train.bugdet_s=1"), ("--set", "train.budget_s=lots"), ("--set", "x=open('owned','w')"), ("--only", "../01_p1"), ("--jobs", "-1"),
    ("--engine", "spark"), ("--phases", "/no/such/folder"), ("--rnu", "x"),
])
def test_bad_words_are_one_sentence(watched: Path, words: tuple[str, str]) -> None:
    code, _, err = finish(watched, *words)
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err, err


def test_a_run_that_is_a_link_out_is_refused(watched: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (watched / "outputs/tiny").mkdir(parents=True)
    (watched / "outputs/tiny/main").symlink_to(elsewhere)
    code, _, err = finish(watched)
    assert code == 3 and "is a link out of outputs/" in err
    assert not list(elsewhere.iterdir())


def test_code_in_a_parameter_name_never_runs(tmp_path: Path) -> None:
    "T01, T03 through papermill with our engine."
    root = write_project(tmp_path, phases=1, leaves=())
    code = "import sys, pipeline.engine.execute; from papermill.cli import papermill; papermill()"
    for name, sentence in (("x=open('owned','w');alpha", "is not a plain name; nothing was run"), ("rnu", "did you mean 'run'?"), ("__import__", "plain name")):
        (root / "p.yml").write_text(json.dumps({name: 1}))
        done = subprocess.run([sys.executable, "-c", code, "nbs/phases/01_p1.ipynb", "out.ipynb", "-f", "p.yml", "--engine", "pilothouse"], cwd=root,
                              capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode and sentence in done.stderr, done.stderr
        assert not (root / "owned").exists()


TEMPTING = [
    "'", '"', "\\", "\n", "\r", "\0", "{", "}", "%s", "\u2028", "\\N{BULLET}", "\\x41", "'" * 3, '"' * 3, "#", ";", "__import__('os')",
    "é", "😀", "\u202e", "a", " ",
]


def random_value(chance: random.Random, depth: int = 0) -> object:
    "A value as a parameter file could hold it, with what tempts a writer of code."
    kinds = [
        lambda: chance.choice([None, True, False, 0, -1, 10**30, 1.5, -0.0, 1e-300, 1e300]), lambda: chance.randint(-(2**70), 2**70), chance.random,
        lambda: "".join(chance.choice(TEMPTING) for _ in range(chance.randint(0, 12))),
        lambda: [random_value(chance, depth + 1) for _ in range(chance.randint(0, 3))],
        lambda: {str(random_value(chance, 9)): random_value(chance, depth + 1) for _ in range(chance.randint(0, 3))},
    ]
    return chance.choice(kinds if depth < 3 else kinds[:4])()


def test_values_arrive_as_given() -> None:
    "T02: what papermill writes for ten thousand values is those values, and nothing that runs."
    import ast

    from papermill.translators import PythonTranslator

    chance = random.Random(2)
    for _ in range(10_000):
        value = random_value(chance)
        assert ast.literal_eval(PythonTranslator.translate(value)) == value


# -- files (T20) and clocks (T24)


def test_private_folders_are_private(tmp_path: Path) -> None:
    look = "import os, json, pathlib\np = os.environ['IPYTHONDIR'].rpartition('/')[0]\n" \
           "pathlib.Path('modes').write_text(json.dumps([oct(os.stat(p).st_mode & 0o777), oct(os.stat(run.scratch).st_mode & 0o777), p]))"
    root = write_project(tmp_path, phases=1, leaves=(), work=look)
    assert finish(root, umask=0)[0] == 0
    modes = json.loads((root / "modes").read_text())
    assert modes[:2] == ["0o700", "0o700"] and not Path(modes[2]).exists()
    for path in (root / "outputs").rglob("*"):
        assert not path.is_symlink() and (path.is_dir() or not stat.S_IMODE(path.stat().st_mode) & 0o002), path


def test_clocks_may_jump(tmp_path: Path) -> None:
    "A file from tomorrow, a zone that changed: freshness does not ask the time."
    root = write_project(tmp_path, phases=2, leaves=())
    assert finish(root)[0] == 0
    tomorrow = time.time() + 86_400 * 400
    for path in [*(root / "nbs/phases").iterdir(), root / "params/tiny.yml"]:
        os.utime(path, (tomorrow, tomorrow))
    process = subprocess.run([sys.executable, "-m", "pipeline", "run", "tiny"], cwd=root, capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": str(ROOT), "TZ": "Pacific/Kiritimati", "PILOTHOUSE_NOW": "2041-01-01T00:00:00+00:00"})
    assert process.returncode == 0 and "nothing changed" in process.stdout
    process = subprocess.run([sys.executable, "-m", "pipeline", "audit", "verify"], cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.returncode == 0


# -- notebooks (T33)


def test_frozen_refuses_other_code(tmp_path: Path) -> None:
    root = write_project(tmp_path, phases=1, leaves=())
    assert finish(root)[0] == 0
    write_notebook(root / "nbs/phases/01_p1.ipynb", *chain_cells("01_p1", None, work="import os; os.system('touch owned')"))
    code, _, err = finish(root, "--frozen")
    assert code == 3 and "+import os; os.system('touch owned')" in err and not (root / "owned").exists()
