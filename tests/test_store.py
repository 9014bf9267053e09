"Files are whole or absent, and no flipped byte is read in silence."
from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.core import audit
from pipeline.core.errors import EnvironmentFault, IntegrityError
from pipeline.core.store import digest, read_artifact, read_frame, swap_folder, write_artifact, write_frame, write_whole


@pytest.fixture
def frame() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    return pl.DataFrame({"x": rng.normal(size=5000), "name": [f"n{i % 7}" for i in range(5000)], "n": rng.integers(0, 9, 5000)})


def test_of_200_byte_flips_none_is_read_silently(tmp_path, frame):
    file = tmp_path / "t.parquet"
    write_frame(file, frame)
    whole, rng = file.read_bytes(), random.Random(1)
    silent = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(4, len(whole) - 4)] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            silent += not read_frame(file).equals(frame)
        except IntegrityError:
            continue
    saved = write_artifact(tmp_path / "02_data", "data/t", frame)
    path = tmp_path / "02_data" / saved.file
    for _ in range(200):
        damaged = bytearray(whole := path.read_bytes())
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError):
            read_artifact(tmp_path / "02_data", saved)
        path.write_bytes(whole)
    assert silent == 0


def test_equal_frames_have_equal_bytes(tmp_path, frame):
    write_frame(tmp_path / "a.parquet", frame)
    write_frame(tmp_path / "b.parquet", frame)
    assert digest(tmp_path / "a.parquet") == digest(tmp_path / "b.parquet")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    code = ("import resource, signal, sys; from pathlib import Path; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
            "from pipeline.core.store import write_whole, write_frame\nfrom pipeline.core.errors import EnvironmentFault\nimport polars as pl, os\n"
            "p = Path(sys.argv[1])\n"
            "for act in (lambda: write_whole(p / 'x.txt', 'y' * 50_000), lambda: write_frame(p / 'f.parquet', pl.DataFrame({'x': [os.urandom(64) for _ in range(5000)]}))):\n"
            "    try: act()\n"
            "    except EnvironmentFault as e: print(e)\n"
            "    else: sys.exit(9)\n")
    (tmp_path / "x.txt").write_text("old")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.txt").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["x.txt"]
    assert done.stdout.count("nothing was half-written") == 2


def test_kill_during_writes_leaves_only_whole_files(tmp_path):
    code = ("import sys; from pathlib import Path; from pipeline.core.store import write_whole, swap_folder\n"
            "p = Path(sys.argv[1]); i = 0; print('ready', flush=True)\n"
            "while True:\n"
            "    i += 1; new = p / '.new'; new.mkdir(exist_ok=True)\n"
            "    [write_whole(new / f'{k}.txt', str(i) * 20_000) for k in range(3)]; swap_folder(new, p / 'final')\n")
    for trial in range(6):
        place = tmp_path / str(trial)
        place.mkdir()
        worker = subprocess.Popen([sys.executable, "-c", code, str(place)], stdout=subprocess.PIPE)
        worker.stdout.readline()
        time.sleep(0.05 + 0.03 * trial)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        if (place / "final").exists():
            texts = {f.read_text() for f in (place / "final").iterdir() if not f.name.startswith(".")}
            assert len(texts) == 1 and len(list((place / "final").glob("*.txt"))) == 3
            assert len(set(next(iter(texts)))) <= 10


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(IntegrityError, match="is a link"):
        digest(tmp_path / "folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(EnvironmentFault, match="no permission"):
        write_whole(tmp_path / "x", "y")
    tmp_path.chmod(0o700)


def test_many_writers_of_the_audit_trail_lose_no_entry(tmp_path):
    code = "import sys; from pathlib import Path; from pipeline.core import audit\nfor i in range(10): audit.append(Path(sys.argv[1]), 'x', {'i': i})"
    workers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [w.wait() for w in workers] == [0] * 4
    assert audit.verify(tmp_path) == 40
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700 and (tmp_path / "keys/audit.pem").stat().st_mode & 0o777 == 0o600


def test_an_entry_of_another_store_does_not_fit(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for store in (ours, theirs):
        audit.append(store, "model.promoted", {"model": store.name}, run="flights/main")
    (ours / "audit.jsonl").write_text((theirs / "audit.jsonl").read_text())
    with pytest.raises(IntegrityError, match="not signed by this store's key"):
        audit.verify(ours)


def test_a_crash_between_entry_and_head_heals(tmp_path):
    audit.append(tmp_path, "a", {})
    head = (tmp_path / "audit.head").read_text()
    audit.append(tmp_path, "b", {})
    (tmp_path / "audit.head").write_text(head)
    assert audit.verify(tmp_path) == 2
    with (tmp_path / "audit.jsonl").open("a") as file:
        file.write('{"seq": 3, "cut')
    assert audit.verify(tmp_path) == 2 and [e["event"] for e in audit.entries(tmp_path)] == ["a", "b"]     # it was never acknowledged
    audit.append(tmp_path, "c", {})
    assert audit.verify(tmp_path) == 3


def test_a_full_disk_leaves_no_half_entry(tmp_path):
    audit.append(tmp_path, "a", {})
    before = (tmp_path / "audit.jsonl").read_bytes()
    code = "import resource, signal, sys; from pathlib import Path; from pipeline.core import audit\n" \
           f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 100}, {len(before) + 100}))\n" \
           "audit.append(Path(sys.argv[1]), 'b', {'note': 'x' * 500})"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "EnvironmentFault: writing the audit trail: File too large" in done.stderr, done.stderr
    assert (tmp_path / "audit.jsonl").read_bytes() == before and audit.verify(tmp_path) == 1


def test_a_damaged_entry_is_named_by_whoever_reads_or_appends(tmp_path):
    for event in "ab":
        audit.append(tmp_path, event, {})
    log = tmp_path / "audit.jsonl"
    whole = log.read_bytes()
    for damaged in (whole[:-40] + b"\xff" + whole[-39:-2] + b"\n", whole.rsplit(b"\n", 2)[0] + b"\n[]\n"):
        log.write_bytes(damaged)
        for reads in (audit.verify, audit.entries, lambda store: audit.append(store, "c", {})):
            with pytest.raises(IntegrityError, match="audit trail: entry 2 is not an entry; restore the trail"):
                reads(tmp_path)


def test_control_characters_cannot_forge_a_line(tmp_path):
    audit.append(tmp_path, "x", {"note": 'a\n{"seq":2}\r\x1b[31m\u202e'})
    assert len((tmp_path / "audit.jsonl").read_text().splitlines()) == 1 and "\x1b" not in (tmp_path / "audit.jsonl").read_text()


def test_a_folder_that_does_not_fit_is_one_sentence_without_paths(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("a", "b"):
        (tmp_path / "model" / name).write_bytes(b"x" * 20_000)
    code = "import resource, signal, sys; from pathlib import Path; from pipeline.core.store import write_artifact\n" \
           "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n" \
           "write_artifact(Path(sys.argv[1]) / 'work', 'train/model', Path(sys.argv[1]) / 'model')"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith("EnvironmentFault: copying model: File too large; free space or choose another outputs folder; nothing was half-written"), done.stderr


def test_an_old_folder_gives_way_to_the_new(tmp_path):
    for text in ("one", "two"):
        (tmp_path / "new").mkdir()
        write_whole(tmp_path / "new" / "x", text)
        swap_folder(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "final/x").read_text() == "two" and [p.name for p in Path(tmp_path).iterdir()] == ["final"]
