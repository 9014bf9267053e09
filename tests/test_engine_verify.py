"`verify` names what was changed, whatever it is; `reproduce` comes out equal."
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_project import chain_cells, write_notebook, write_project

from pipeline.engine.lock import holding

ROOT = Path(__file__).resolve().parent.parent


def call(root: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipeline", *words], cwd=root, capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


def claiming(name: str, before: str | None, step: int = 1) -> list[str]:
    "A link of the chain that claims a number of its artifact and keeps a measured time."
    cells = chain_cells(name, before, step=step)
    room = name.split("_", 1)[1]
    saved = f'run.save("{room}/number", [2.5])\nrun.save("{room}/took", {{"s": __import__("time").time()}}, timing=True)'
    claim = f'from operator import itemgetter\nfrom pipeline.core.run import as_estimate\n' \
            f'run.save("{room}/text", "4.25")\nrun.claim("quarter", of="{room}/text", by=as_estimate, on="lesson")'
    return [*cells[:3], 'run.external("t.csv")', cells[3], saved, claim, *cells[4:]]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_project(tmp_path_factory.mktemp("verify"), phases=2, leaves=())
    (root / "t.csv").write_text("y\n1\n")
    for name, before in (("01_p1", None), ("02_p2", "01_p1")):
        write_notebook(root / f"nbs/phases/{name}.ipynb", *claiming(name, before))
    ended = call(root, "run", "tiny")
    assert ended.returncode == 0, ended.stderr
    return root


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "copy"))


def test_an_untouched_run_stands(done: Path) -> None:
    found = call(done, "verify", "tiny/main", "--json")
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["sources"] == 1 and told["absent"] == []
    assert told["claims"] == 2 and told["artifacts"] == 8 and told["entries"] == 1 and told["files"] >= 12


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    return change


@pytest.mark.parametrize(("file", "change", "named"), [
    ("01_p1/value.json", flip, "tiny/main/01_p1/value.json is not what the run wrote"),
    ("02_p2/text.txt", edit("4.25", "9.25"), "tiny/main/02_p2/text.txt is not what the run wrote"),
    ("01_p1/claims.json", edit("4.25", "4.26"), "tiny/main/01_p1/claims.json is not what the run wrote"),
    ("01_p1/receipt.json", edit('"go"', '"no-go"'), "tiny/main/01_p1/receipt.json is not"),
    ("02_p2/notebook.ipynb", flip, "tiny/main/02_p2/notebook.ipynb is not"),
    ("02_p2/took.json", lambda p: p.unlink(), "tiny/main/02_p2/took.json is missing"),
    ("manifest.json", edit('"verdict": "go"', '"verdict": "no-go"'), "manifest.json is not the one that the audit trail recorded"),
    ("../../../t.csv", flip, "t.csv is not what the run read"),
    ("manifest.json", lambda p: p.unlink(), "tiny/main has no manifest.json"),
    ("../../store/audit.jsonl", edit('"ran"', '"rna"'), "audit trail: entry 1 (run.finished) was changed"),
    ("../../store/audit.jsonl", lambda p: p.write_text(""), "audit trail: entry 1 is missing"),
])
def test_what_was_changed_is_named(copy: Path, file: str, change: Callable[[Path], None], named: str) -> None:
    change(copy / "outputs/tiny/main" / file)
    found = call(copy, "verify", "tiny/main")
    assert found.returncode == 3 and named in found.stderr and found.stderr.count("\n") == 1, found.stderr


def test_a_claim_that_does_not_come_out_again_is_named(copy: Path) -> None:
    "Even where every digest was made to fit: the number itself is computed again."
    from pipeline.core.settings import load_settings
    from pipeline.core.store import digest_file
    from pipeline.core import audit
    from pipeline.core.errors import IntegrityError
    from pipeline.engine.verify import verify_run

    run = copy / "outputs/tiny/main"
    edit("4.25", "4.5")(run / "01_p1/claims.json")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["phases"]["01_p1"]["files"]["claims.json"] = digest_file(run / "01_p1/claims.json")
    (run / "manifest.json").write_text(json.dumps(manifest))
    audit.append(copy / "outputs/store", "run.finished", {"manifest": digest_file(run / "manifest.json")}, run="tiny/main")
    with pytest.raises(IntegrityError, match="01_p1: claim quarter: value says 4.5, computed again it is 4.25; the number does not stand"):
        verify_run(run, load_settings(copy))


def test_pages_drawn_again_stand_and_launder_nothing(copy: Path) -> None:
    run = copy / "outputs/tiny/main"
    edit("</main>", "<p>99 % accurate</p></main>")(run / "01_p1/report.html")
    found = call(copy, "verify", "tiny/main")
    assert found.returncode == 3 and "01_p1/report.html is not what the run wrote (its sha256 differs); draw it again with `pilothouse report`" in found.stderr
    edit("4.25", "9.25")(run / "02_p2/claims.json")
    assert call(copy, "report", "tiny/main").returncode == 0 and "99 %" not in (run / "01_p1/report.html").read_text()
    assert "02_p2/claims.json is not what the run wrote" in call(copy, "verify", "tiny/main").stderr
    edit("9.25", "4.25")(run / "02_p2/claims.json")
    assert "02_p2/report.html is not what the run wrote" in call(copy, "verify", "tiny/main").stderr      # it still shows 9.25
    assert call(copy, "report", "tiny/main").returncode == 0 and call(copy, "verify", "tiny/main").returncode == 0
    edit('"verdict": "go"', '"verdict": "no-go"')(run / "manifest.json")
    assert call(copy, "report", "tiny/main").returncode == 0
    assert "manifest.json is not the one that the audit trail recorded" in call(copy, "verify", "tiny/main").stderr


def test_reproduce_compares_all_but_times(copy: Path) -> None:
    found = call(copy, "reproduce", "tiny/main")
    assert found.returncode == 0, found.stderr
    assert "6 artifacts equal bit by bit, 2 that hold times not compared" in found.stdout
    assert call(copy, "verify", "tiny/main-again").returncode == 0
    write_notebook(copy / "nbs/phases/01_p1.ipynb", *claiming("01_p1", None, step=7))
    again = call(copy, "reproduce", "tiny/main", "--as", "third")
    assert again.returncode == 3 and "01_p1: p1/value came out differently" in again.stderr


def test_a_run_of_some_phases_is_done_again_with_these(copy: Path) -> None:
    "And with the notebooks that it used, though the house has others."
    some = copy / "some"
    some.mkdir()
    write_notebook(some / "01_p1.ipynb", *claiming("01_p1", None, step=5))
    assert call(copy, "run", "tiny", "--run", "part", "--phases", "some").returncode == 0
    assert call(copy, "run", "tiny", "--run", "first", "--only", "p1").returncode == 0
    for run, value in (("part", 5), ("first", 1)):
        again = call(copy, "reproduce", f"tiny/{run}")
        assert again.returncode == 0 and "3 artifacts equal bit by bit" in again.stdout, again.stdout + again.stderr
        done_again = copy / f"outputs/tiny/{run}-again"
        assert not (done_again / "02_p2").exists() and json.loads((done_again / "01_p1/value.json").read_text())["value"] == value


def test_a_phase_left_behind_says_so_and_has_not_the_last_word(copy: Path) -> None:
    write_notebook(copy / "nbs/phases/01_p1.ipynb", *claiming("01_p1", None, step=7)[:-2], 'run.require("x", False, "no")', 'run.conclude("It is not.")', "run.finish()")
    page = copy / "outputs/tiny/main/02_p2/report.html"
    early = call(copy, "run", "tiny", "--only", "p1")
    assert early.returncode == 1 and "NO-GO  It is not." in early.stdout, early.stdout     # not the go that 02_p2 had said of another 01_p1
    assert "note: 02_p2 is older than what it rests on: p1/value changed" in early.stdout
    assert "This page is out of date: p1/value changed since it was made." in page.read_text()
    assert "out of date" in (copy / "outputs/tiny/main/index.html").read_text() and call(copy, "verify", "tiny/main").returncode == 0
    assert call(copy, "run", "tiny").returncode == 0 and "out of date" not in page.read_text()


def test_reproduce_replaces_no_other_run(copy: Path) -> None:
    "Every refusal comes before anything is run or written."
    from pipeline.core.errors import EnvironmentFault, InputError, IntegrityError
    from pipeline.core.settings import load_settings
    from pipeline.engine.verify import reproduce_run

    run = copy / "outputs/tiny/main"
    shutil.copytree(run, run.with_name("other"))
    run.with_name("link").symlink_to(copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with holding(run.with_name("third")):
        for name, kind, words in [("..", InputError, "is not a name"), ("../x", InputError, "is not a name"), ("a\\b", InputError, "is not a name"),
                                  ("main", InputError, "into itself"), ("link", IntegrityError, "tiny/link is a link; remove it, or choose"),
                                  ("other", InputError, "tiny/other is a run of its own, and reproducing into it would replace it; choose another name"),
                                  ("third", EnvironmentFault, f"run tiny/third is being worked on by process {os.getpid()}")]:
            with pytest.raises(kind, match=words):
                reproduce_run(run, name, load_settings(copy), lambda file, overrides: pytest.fail("it ran"))
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != ".lock" or path in before}


def test_a_changed_artifact_makes_its_phase_run_again(copy: Path) -> None:
    flip(copy / "outputs/tiny/main/01_p1/value.json")
    assert "01_p1: its p1/value was changed on disk" in call(copy, "run", "tiny").stdout
    assert call(copy, "verify", "tiny/main").returncode == 0


def test_a_source_that_is_gone_is_said_and_everything_else_compared(copy: Path) -> None:
    (copy / "t.csv").unlink()
    found = call(copy, "verify", "tiny/main")
    assert found.returncode == 0 and "0 sources and 0 tables compared" in found.stdout and "no longer here, so not compared: t.csv" in found.stdout


def test_lineage_walks_from_a_claim_to_the_file(done: Path) -> None:
    found = call(done, "lineage", "quarter", "--run", "tiny/main", "--json")
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    artifact = told["from"][0]
    phase = artifact["from"][0]
    assert (told["kind"], told["name"], told["value"]) == ("claim", "02_p2/quarter", 4.25)
    assert (artifact["name"], phase["name"], phase["seed"]) == ("p2/text", "02_p2", 7)
    assert [(s["kind"], s["name"]) for s in phase["from"]] == [("artifact", "p1/value"), ("file", "t.csv")]
    text = call(done, "lineage", "p2/text").stdout
    assert text.splitlines()[0].startswith("tiny/main: commit") and "file t.csv" in text
    unknown = call(done, "lineage", "quartre")
    assert unknown.returncode == 2 and "did you mean 'quarter'?" in unknown.stderr
