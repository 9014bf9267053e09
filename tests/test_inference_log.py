"""The log of answers: nothing is lost but an interval, nothing is there twice, nothing is kept that was not asked for."""
from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deploy_world as world
from pipeline.comply.traces import find_traces
from pipeline.core.errors import EnvironmentFault, IntegrityError
from pipeline.data.contract import target_values
from pipeline.deploy import inference_log as log
from pipeline.deploy.growing import SMALL, Growing
from pipeline.deploy.handler import Service
from pipeline.deploy.inference_log import Layout, Recorder, collect, forget_inferences, inference_tables, layout_of, note_outcomes, read_inferences, read_outcomes
from pipeline.deploy.predict import Predictor
from pipeline.deploy.schema import make_schema
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting

LAYOUT = Layout(("hour",), (), "tail", ("no", "yes"))


def body(i: int = 0, **more: Any) -> bytes:
    return json.dumps({"rows": [{"hour": i, "tail": f"N{i % 50}", **more}]}).encode()


def answer(p: float = 0.25) -> bytes:
    return json.dumps({"predictions": [{"prediction": "yes" if p > 0.5 else "no", "p": {"no": 1 - p, "yes": p}}]}).encode()


@pytest.fixture
def recorder(tmp_path: Path) -> Any:
    made = Recorder(tmp_path, "tiny", {1: LAYOUT}, interval=600, collects=False)
    yield made
    made.close()


def note(recorder: Recorder, start: int, stop: int, role: str = "live") -> None:
    for i in range(start, stop):
        recorder.add(1.7e9 + i, f"r{i}", 1, role, 200, 0.5, body(i), answer(i % 100 / 100))


@pytest.fixture(scope="module", params=["binary", "multiclass", "regression"])
def predictor(request: pytest.FixtureRequest) -> Predictor:
    task = request.param
    frame, contract = world.rows(task, 600), world.contract(task)
    model = train_model("trees", frame, target_values(frame, contract), contract, Fitting({"rounds": 5}), about={"residual": 9.0} if task == "regression" else {})
    return Predictor(model, make_schema(contract, frame), 0.4 if task == "binary" else None, "tiny", 3, "d")


def test_a_thousand_requests_are_a_thousand_lines_joined_to_what_came_true(predictor: Predictor, tmp_path: Path) -> None:
    "What the service says and what the log holds are the same, by row and by column, in every language; what the model does not read is not there."
    task, classes = predictor.model.task, predictor.model.classes
    recorder = Recorder(tmp_path, "tiny", {3: layout_of(predictor)}, interval=600, collects=False)
    service = Service(predictor, recorder=recorder, outcomes=partial(note_outcomes, tmp_path, "tiny", classes=classes))
    asked = world.rows(task, 1000, seed=9).with_columns(hour=pl.col("hour").fill_null(9.0))
    fields = ["hour", "seats", "carrier", "built", "rain"]
    rows = asked.select(*fields, "tailnum").with_columns(pl.col("built").cast(pl.String)).to_dicts()
    said: list[Any] = []
    for i, row in enumerate(rows):
        status, _, out = service.handle("POST", "/predict", {"x-request-id": f"r{i}"}, json.dumps({"rows": [row]}).encode())
        assert status == 200
        said.append(json.loads(out)["predictions"][0])
    tensors = [{"name": n, "shape": [2], "datatype": "FP64", "data": [r[n] for r in rows[:2]]} for n in fields]
    assert service.handle("POST", "/v2/models/tiny/infer", {"x-request-id": "v2"}, json.dumps({"inputs": tensors, "outputs": [{"name": predictor.outputs[-1]}]}).encode())[0] == 200
    sink = io.BytesIO()
    asked.head(2).select(*fields, "tailnum").write_ipc_stream(sink, compat_level=pl.CompatLevel.oldest())
    assert service.handle("POST", "/predict", {"x-request-id": "arrow", "content-type": "application/vnd.apache.arrow.stream"}, sink.getvalue())[0] == 200
    assert service.handle("POST", "/predict", {"x-request-id": "bad"}, b'{"rows": [{"hour": "secret"}]}')[0] == 422
    recorder.close()
    truth = world.rows(task, 1000, seed=9)["late"].to_list()
    told = [{"request_id": f"r{i}", "row": 0, "value": v} for i, v in reversed(list(enumerate(truth)))]
    assert service.handle("POST", "/outcomes", {}, json.dumps({"outcomes": told}).encode())[0] == 200
    assert service.handle("POST", "/outcomes", {}, b'{"outcomes": [{"request_id": "r1", "value": null}]}')[0] == 422
    seen = read_inferences(tmp_path, "tiny", inputs=True)
    first = seen.filter(pl.col("request_id").str.starts_with("r"))
    assert first["request_id"].to_list() == [f"r{i}" for i in range(1000)] and seen["number"].to_list() == list(range(1005)) and recorder.written == 1003
    assert first["prediction"].to_list() == [s["prediction"] for s in said] and first["outcome"].to_list() == truth and first["role"].unique().to_list() == ["live"]
    for name in classes:
        assert first[f"p_{name}"].to_list() == [s["p"][name] for s in said]
    assert first["subject"].n_unique() == asked["tailnum"].n_unique() and not find_traces(tmp_path, "secret")
    for request in ("v2", "arrow"):
        lines = seen.filter(pl.col("request_id") == request)
        assert lines.select("row", "prediction").rows() == [(i, said[i]["prediction"]) for i in (0, 1)]
        assert [set(json.loads(text)) for text in lines["inputs"]] == [set(fields)] * 2
    assert [json.loads(text) for text in first["inputs"]] == [{n: row[n] for n in fields} for row in rows]


def test_what_a_layout_keeps_follows_from_the_package(predictor: Predictor) -> None:
    kept = layout_of(predictor)
    assert kept.fields == tuple(predictor.schema.names) and kept.subject == "tailnum" and kept.classes == tuple(predictor.model.classes) and not kept.personal
    assert layout_of(predictor, "none").fields == () and layout_of(predictor, "none").subject == "tailnum" and layout_of(predictor, subject="carrier", keyed=True).keyed
    columns = [{**c, "pii": c["name"] in ("seats", "carrier")} for c in predictor.model.contract["columns"]]
    private = replace(predictor, model=replace(predictor.model, contract={**predictor.model.contract, "columns": columns, "subject": "carrier"}))
    told = layout_of(private)
    assert told.personal == ("seats",) and "carrier" not in told.fields + told.personal and told.subject == "carrier"


def test_bodies_in_arrow_are_read_too(recorder: Recorder, tmp_path: Path) -> None:
    def stream(frame: pl.DataFrame) -> bytes:
        sink = io.BytesIO()
        frame.write_ipc_stream(sink, compat_level=pl.CompatLevel.oldest())
        return sink.getvalue()

    recorder.add(1.7e9, "a", 1, "live", 200, 0.5, stream(pl.DataFrame({"hour": [1.5, 2.5], "tail": ["N1", None]})), stream(pl.DataFrame({"prediction": ["no", "yes"], "p_no": [0.9, 0.1], "p_yes": [0.1, 0.9]})))
    recorder.flush()
    seen = read_inferences(tmp_path, "tiny", inputs=True)
    assert seen.select("row", "prediction", "p_yes", "inputs").rows() == [(0, "no", 0.1, '{"hour":1.5}'), (1, "yes", 0.9, '{"hour":2.5}')] and seen["subject"].null_count() == 1


def test_what_was_refused_and_who_is_unknown_leave_no_inputs(recorder: Recorder, tmp_path: Path) -> None:
    recorder.add(1.7e9, "bad", 1, "live", 422, 0.1, b'{"rows": [{"hour": "secret"}]}', b"{}")
    recorder.add(1.7e9, "fault", 1, "live", 500, 0.1, b"secret", b"{}")
    recorder.add(1.7e9, "unknown", 7, "live", 200, 0.1, body(3, note="secret"), answer(0.9))
    recorder.add(1.7e9, "odd", 1, "live", 200, 0.1, b"secret", b"\xff not JSON")
    recorder.flush()
    seen = read_inferences(tmp_path, "tiny", inputs=True)
    assert seen["status"].to_list() == [422, 500, 200, 200] and seen["inputs"].null_count() == 4 == seen["subject"].null_count()
    assert seen["prediction"].to_list() == [None, None, "yes", None] and inference_tables(tmp_path, "tiny")[0].told()["about"]["unread"] == 1
    assert not find_traces(tmp_path, "secret")


LOOP = """
import sys, time
from pathlib import Path
from pipeline.deploy.inference_log import Layout, Recorder
recorder = Recorder(Path(sys.argv[1]), "tiny", {1: Layout(("hour",), (), "tail", ("no", "yes"))}, collects=False)
body = b'{"rows": [{"hour": 5, "tail": "N1"}]}'
out = b'{"predictions": [{"prediction": "no", "p": {"no": 0.75, "yes": 0.25}}]}'
i = 0
while True:
    for _ in range(20):
        recorder.add(time.time(), f"r{i}", 1, "live", 200, 0.5, body, out)
        i += 1
    print(i, time.time(), flush=True)
    time.sleep(0.01)
"""


def test_a_killed_worker_loses_one_interval_at_most(tmp_path: Path) -> None:
    "kill -9 in the midst of it: everything that is older than the interval, and the time a write takes, is there, once."
    worker = subprocess.Popen([sys.executable, "-c", LOOP, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout
    spool, told, deadline = tmp_path / "inferences" / "tiny", [], time.monotonic() + 60
    while len(list(spool.glob("*.rows")) if spool.is_dir() else []) < 3 and time.monotonic() < deadline:
        told.append(worker.stdout.readline())
    for _ in range(30):
        told.append(worker.stdout.readline())
    os.kill(worker.pid, signal.SIGKILL)
    ended = time.time()
    told += worker.stdout.readlines()
    worker.wait()
    seen = read_inferences(tmp_path, "tiny")
    assert seen["request_id"].to_list() == [f"r{i}" for i in range(seen.height)]            # whole from the first, none twice
    noted = [int(line.split()[0]) for line in told if len(line.split()) == 2 and float(line.split()[1]) < ended - log.INTERVAL - 2]
    assert seen.height >= max(noted, default=0) and 0 < seen.height <= int(told[-1].split()[0] if len(told[-1].split()) == 2 else told[-2].split()[0]) + 20


def test_a_collector_that_dies_after_its_commit_takes_nothing_twice(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note(recorder, 0, 10)
    recorder.flush()
    note(recorder, 10, 20)
    recorder.flush()
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".rows":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            collect(tmp_path, "tiny")
    assert len(list((tmp_path / "inferences/tiny").glob("*.rows"))) == 2
    note(recorder, 20, 25)
    recorder.flush()
    half = [tmp_path / "inferences/tiny" / f".{int(time.time() - age) * 10**9:020}-1-a.rows.x" for age in (0, 7200)]     # what writers leave who are killed
    for left in half:
        left.write_bytes(b"half")
    assert collect(tmp_path, "tiny") == 5 and [left.exists() for left in half] == [True, False]
    assert read_inferences(tmp_path, "tiny")["request_id"].to_list() == [f"r{i}" for i in range(25)]


def test_a_clock_that_jumps_takes_no_file_from_its_writer(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "To a collector whose clock is two hours ahead each file that is being written looks abandoned."
    note(recorder, 0, 10)
    with recorder._writing:
        recorder._write()
    spool = log.Spool(tmp_path, "tiny", "outcomes", log.spool_key(tmp_path))
    with monkeypatch.context() as patch:
        ahead = time.time() + 7200
        patch.setattr(log.time, "time", lambda: ahead)
        assert collect(tmp_path, "tiny") == 0
    assert spool.held.exists()
    spool.drop()
    recorder.flush()
    assert read_inferences(tmp_path, "tiny").height == 10 and not list((tmp_path / "inferences/tiny").iterdir())


def test_files_that_wait_are_looked_at_once(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "FILES", 150)
    for i in range(400):
        note_outcomes(tmp_path, "tiny", [{"request_id": f"r{i}", "value": "yes"}], ["no", "yes"])
    looked, stat = [], Path.stat

    def counted(path: Path, **how: Any) -> os.stat_result:
        looked.append(path)
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", counted)
    assert collect(tmp_path, "tiny") == 400 and len([path for path in looked if path.suffix == ".outcomes"]) <= 4 * 400
    assert len(inference_tables(tmp_path, "tiny")[1].parts()) == 3 and not list((tmp_path / "inferences/tiny").iterdir())


STARVED = """
import os, signal, sys
from pathlib import Path
from pipeline.deploy import inference_log as log
read = log._read_outcomes
def stands(*given):
    os.kill(os.getpid(), signal.SIGSTOP)
    return read(*given)
log._read_outcomes = stands
log.collect(Path(sys.argv[1]), "tiny", idly=True)
"""


def test_nobody_waits_for_one_who_gets_no_processor(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "The collector behind holds the table and stands still: whoever reads ends it and goes on from there."
    note(recorder, 0, 10)
    recorder.flush()
    note_outcomes(tmp_path, "tiny", [{"request_id": "r1", "value": "yes"}], ["no", "yes"])
    child = subprocess.Popen([sys.executable, "-c", STARVED, str(tmp_path)])
    try:
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        behind = log.Behind(tmp_path / "inferences/.tiny.collector")
        assert collect(tmp_path, "tiny", idly=True) == 0, "one is enough"
        with monkeypatch.context() as patch:
            patch.setattr(log, "_here", lambda: "another machine")
            assert not behind.end()
        assert child.poll() is None
        assert read_outcomes(tmp_path, "tiny")["request_id"].to_list() == ["r1"] and child.wait() == -signal.SIGKILL
    finally:
        child.kill()
        child.wait()
    assert not behind.end() and collect(tmp_path, "tiny", idly=True) == 0
    note(recorder, 10, 12)
    recorder.flush()
    assert collect(tmp_path, "tiny", idly=True) == 2 and read_inferences(tmp_path, "tiny").height == 12


def test_a_file_that_did_not_get_its_name_gets_it_before_others_are_written(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for step, start in (("fsync", 0), ("rename", 10)):
        note(recorder, start, start + 5)
        with monkeypatch.context() as patch:
            patch.setattr(log.os, step, full)
            with pytest.raises(EnvironmentFault, match="No space"):
                recorder.flush()
            with pytest.raises(EnvironmentFault, match="No space"):
                note_outcomes(tmp_path, "tiny", [{"request_id": "r1", "value": "yes"}], ["no", "yes"])
        note(recorder, start + 5, start + 10)
        recorder.flush()
    assert read_inferences(tmp_path, "tiny")["request_id"].to_list() == [f"r{i}" for i in range(20)] and recorder.written == 20
    assert not list((tmp_path / "inferences/tiny").iterdir()) and read_outcomes(tmp_path, "tiny").is_empty()


def test_a_file_that_somebody_took_away_is_counted_and_the_next_ones_are_written(recorder: Recorder, tmp_path: Path) -> None:
    note(recorder, 0, 5)
    with recorder._writing:
        recorder._write()
    for left in (tmp_path / "inferences/tiny").iterdir():
        left.unlink()
    note(recorder, 5, 10)
    recorder.flush()
    assert recorder.dropped == 5 == recorder.written and read_inferences(tmp_path, "tiny")["request_id"].to_list() == [f"r{i}" for i in range(5, 10)]


def test_many_writers_and_collectors_at_once(recorder: Recorder, tmp_path: Path) -> None:
    other = Recorder(tmp_path, "tiny", {1: LAYOUT}, interval=600, collects=False)
    faults: list[BaseException] = []

    def write(into: Recorder, start: int) -> None:
        try:
            for i in range(start, start + 200, 20):
                note(into, i, i + 20)
                into.flush()
        except BaseException as error:
            faults.append(error)

    def take() -> None:
        try:
            for _ in range(4):
                read_inferences(tmp_path, "tiny")
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=write, args=(recorder, 0)), threading.Thread(target=write, args=(other, 200)), *(threading.Thread(target=take) for _ in range(3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert not faults
    seen = read_inferences(tmp_path, "tiny")
    assert sorted(seen["request_id"]) == sorted(f"r{i}" for i in range(400)) and seen["number"].to_list() == list(range(400))


def test_a_full_disk_costs_no_request_and_no_line_until_memory_ends(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise EnvironmentFault("writing x.rows: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(log.Spool, "add", full)
        patch.setattr(log, "MOST_WAITING", 100 * (len(body(10)) + len(answer(0.1)) + 70))
        for start in range(0, 200, 50):
            note(recorder, start, start + 50)
            with pytest.raises(EnvironmentFault, match="No space"):
                recorder.flush()
        assert 50 < recorder.dropped < 150 and recorder.written == 0
    recorder.flush()
    seen = read_inferences(tmp_path, "tiny")
    assert seen.height == recorder.written == 200 - recorder.dropped and seen["request_id"].to_list() == [f"r{i}" for i in range(seen.height)]


CRAMPED = """
import resource, sys
from pathlib import Path
from pipeline.core.errors import EnvironmentFault
from pipeline.deploy.inference_log import FRAME_BYTES, Layout, Recorder, read_inferences
store = Path(sys.argv[1])
recorder = Recorder(store, "tiny", {1: Layout()}, interval=600, collects=False)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for most in (10, FRAME_BYTES, 2 * FRAME_BYTES - 100, 2 * FRAME_BYTES + 9000, hard):     # nothing, in a frame, at its end, in the last one
    for _ in range(1000):
        recorder.add(1.7e9, f"r{recorder._came}", 1, "live", 500, 0.5, b"x" * 60, b"")
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        recorder.flush()
    except EnvironmentFault as error:
        print(error)
assert recorder.written == 5000 == read_inferences(store, "tiny")["request_id"].n_unique()
"""


def test_a_file_that_the_disk_did_not_take_whole_is_gone_on_with(tmp_path: Path) -> None:
    "The system refuses writes beyond a size, as a full disk does, in the midst of a frame and between two."
    done = subprocess.run([sys.executable, "-c", CRAMPED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("too large") >= 3 and "Traceback" not in done.stderr


def test_no_frame_can_be_taken_out_moved_or_doubled(recorder: Recorder, tmp_path: Path) -> None:
    for start in range(0, 1200, 400):
        note(recorder, start, start + 400)
    recorder.flush()
    spooled = next((tmp_path / "inferences/tiny").glob("*.rows"))
    whole, frames, at = spooled.read_bytes(), [], 0
    while at < len(whole):
        end = at + 4 + int.from_bytes(whole[at:at + 4], "big")
        frames.append(whole[at:end])
        at = end
    assert len(frames) >= 4
    first, second, *rest = frames
    for other in ([second, *rest], [first, first, *rest], [second, first, *rest], frames[:-1], [first, frames[-1]], [*frames, frames[-1]], []):
        spooled.write_bytes(b"".join(other))
        with pytest.raises(IntegrityError, match="does not open"):
            collect(tmp_path, "tiny")
    spooled.rename(spooled.with_name("1" + spooled.name[1:]))      # under another name, thus at another place among the others
    spooled.with_name("1" + spooled.name[1:]).write_bytes(whole)
    with pytest.raises(IntegrityError, match="does not open"):
        collect(tmp_path, "tiny")


def test_the_thread_goes_on_after_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken, real = threading.Event(), log.Spool.add
    broken.set()

    def sometimes(*given: Any, **more: Any) -> None:
        if broken.is_set():
            raise EnvironmentFault("writing x.rows: No space left on device")
        real(*given, **more)

    monkeypatch.setattr(log.Spool, "add", sometimes)
    recorder = Recorder(tmp_path, "tiny", {1: LAYOUT}, interval=0.02, collects=False)
    note(recorder, 0, 3)
    _until(lambda: bool(recorder.failed))
    broken.clear()
    _until(lambda: recorder.written == 3 and not recorder.failed)
    recorder.close()
    assert capsys.readouterr().err.count("No space") == 1 and read_inferences(tmp_path, "tiny").height == 3


def _until(done: Any) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_child_takes_what_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "TAKEN_EVERY", 0.0)
    recorder = Recorder(tmp_path, "tiny", {1: LAYOUT}, interval=0.02)
    note(recorder, 0, 5)
    _until(lambda: recorder.written == 5 and not list((tmp_path / "inferences/tiny").glob("*.rows")))
    recorder.collects = False
    recorder.close()
    assert recorder._child is not None and recorder._child.wait(60) == 0
    assert inference_tables(tmp_path, "tiny")[0].read()["request_id"].to_list() == [f"r{i}" for i in range(5)]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(told=st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["no", "yes"])), max_size=12), landed=st.permutations(range(5)), cuts=st.lists(st.integers(0, 12), min_size=2, max_size=4))
def test_outcomes_late_twice_and_before_their_answer(told: list[tuple[int, str]], landed: list[int], cuts: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    "However they come, the last word on a row counts, and whoever reads step by step hears of each change once, in order."
    store = tmp_path_factory.mktemp("log")
    recorder = Recorder(store, "tiny", {1: LAYOUT}, interval=600, collects=False)
    heard: list[tuple[str, str]] = []
    after, edges = -1, sorted({0, *(min(c, len(told)) for c in cuts), len(told)})
    for start, stop in [*zip(edges, edges[1:]), (len(told), len(told))]:
        note_outcomes(store, "tiny", [{"request_id": f"r{i}", "row": 0, "value": v} for i, v in told[start:stop]], ["no", "yes"])
        for i in landed if stop == start else [landed.pop()] if landed else []:
            note(recorder, i, i + 1)
        recorder.flush()
        news = read_outcomes(store, "tiny", after)
        heard += news.select("request_id", "outcome").rows()
        after = int(news["outcome_number"].max()) if news.height else after  # type: ignore[arg-type]
    recorder.close()
    assert dict(read_inferences(store, "tiny").select("request_id", "outcome").rows()) == {f"r{i}": dict(told).get(i) for i in range(5)}
    words: dict[str, list[str]] = {}
    for i, value in told:
        if words.setdefault(f"r{i}", [])[-1:] != [value]:
            words[f"r{i}"].append(value)
    assert {key: [v for k, v in heard if k == key] for key in words} == words


def test_a_forgotten_subject_is_in_no_byte_of_the_store(recorder: Recorder, tmp_path: Path) -> None:
    recorder.describe(2, Layout(("hour", "note"), ("mail",), "tail", ("no", "yes"), keyed=True))
    recorder.describe(1, Layout(("hour", "note"), ("mail",), "tail", ("no", "yes")))
    for i, tail in enumerate(["N14228", "N9", "N14228"]):
        recorder.add(1.7e9 + i, f"r{i}", 1 + i % 2 if tail == "N9" else 1, "live", 200, 0.5, json.dumps({"rows": [{"hour": 1, "note": f"about {tail} only", "mail": f"{tail}@x.org", "tail": tail}]}).encode(), answer())
    recorder.add(1.7e9, "r3", 2, "live", 200, 0.5, json.dumps({"rows": [{"hour": 1, "note": "N14228", "mail": "N14228@x.org", "tail": "N14228"}]}).encode(), answer())
    recorder.flush()
    note_outcomes(tmp_path, "tiny", [{"request_id": "r0", "value": "yes"}, {"request_id": "r1", "value": "yes"}], ["no", "yes"])
    held = read_inferences(tmp_path, "tiny", inputs=True)
    assert held.filter(pl.col("sealed").is_not_null()).height == 4 and find_traces(tmp_path, "N14228") and not any("@" in str(v) for v in held.select("inputs", "sealed").rows())
    assert forget_inferences(tmp_path, "tiny", "N14228", "tail") == 3
    assert not find_traces(tmp_path, "N14228") and read_inferences(tmp_path, "tiny").select("request_id", "outcome").rows() == [("r1", "yes")]
    assert inference_tables(tmp_path, "tiny")[1].read()["request_id"].to_list() == ["r1"]


def test_a_flipped_byte_is_told_wherever_it_is(recorder: Recorder, tmp_path: Path) -> None:
    note(recorder, 0, 5)
    recorder.flush()
    spooled = next((tmp_path / "inferences/tiny").glob("*.rows"))
    whole = spooled.read_bytes()
    for place in (3, 20, len(whole) - 1):
        spooled.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        with pytest.raises(IntegrityError, match="does not open"):
            collect(tmp_path, "tiny")
    spooled.write_bytes(whole)
    assert collect(tmp_path, "tiny") == 5
    part = next((tmp_path / "tables/tiny.inferences").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="sha256"):
        read_inferences(tmp_path, "tiny")


def test_a_reader_outlives_a_merge_and_a_killed_merge_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Growing(tmp_path / "tables/t", {"number": pl.Int64, "x": pl.Float64})
    values = np.arange(SMALL * 3, dtype=float)
    with table.turn():
        for i in range(SMALL):
            table.append(pl.DataFrame({"x": values[3 * i:3 * i + 3]}), {})
    stale = table.parts()
    with monkeypatch.context() as patch:      # killed between writing the merged file and the commit
        patch.setattr(Growing, "_commit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            table.compact()
    assert table.read()["x"].to_list() == values.tolist() and len(list(table.folder.glob("*.parquet"))) == SMALL + 1
    listed = [stale, stale]
    real = Growing.parts

    def late(self: Growing, after: int = -1) -> list[Path]:
        return listed.pop() if listed else real(self, after)

    with table.turn():
        assert table.compact() == SMALL
    monkeypatch.setattr(Growing, "parts", late)
    assert table.read()["x"].to_list() == values.tolist() and not listed and len(list(table.folder.glob("*.parquet"))) == 1


def test_the_age_of_what_is_kept_counts_answers_by_their_time(tmp_path: Path) -> None:
    import datetime as dt

    from pipeline.comply.case import days_kept

    now = dt.datetime.now(dt.UTC)
    assert days_kept(tmp_path, "late", now) == 0
    with closing(Recorder(tmp_path, "late")) as recorder:
        recorder.add((now - dt.timedelta(days=40)).timestamp(), "old", 1, "live", 422, 1.0, b"{}", b"{}")
    read_inferences(tmp_path, "late")
    assert days_kept(tmp_path, "late", now) == 40


def test_late_outcomes_open_no_file_that_they_are_not_about(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A log of months, and an outcome of one answer: of the other files not a byte is read, and the keys of each once."
    from pipeline.deploy import growing

    for start in range(0, 60, 10):
        note(recorder, start, start + 10)
        recorder.flush()
        note_outcomes(tmp_path, "tiny", [{"request_id": f"r{start + i}", "value": "no"} for i in range(3)], ["no", "yes"])
        collect(tmp_path, "tiny")
    answers, outcomes = inference_tables(tmp_path, "tiny")
    known = int(read_outcomes(tmp_path, "tiny")["outcome_number"].max())      # type: ignore[arg-type]
    assert len(answers.parts()) == 6 == len(outcomes.parts()) and known == 17
    read: list[tuple[str, int]] = []
    part = growing._part
    monkeypatch.setattr(growing, "_part", lambda file, table, columns=None: read.append((f"{table} {int(file.name.split('-')[1])}", len(columns or ()))) or part(file, table, columns))
    note_outcomes(tmp_path, "tiny", [{"request_id": "r21", "value": "yes"}, {"request_id": "r22", "value": "no"}, {"request_id": "r47", "value": "yes"}, {"request_id": "nobody", "value": "yes"}], ["no", "yes"])
    news = read_outcomes(tmp_path, "tiny", known)
    assert news.select("request_id", "outcome", "again").rows() == [("r21", "yes", True), ("r47", "yes", False)]      # r22 was said before
    whole = [name for name, columns in read if columns > 2]
    assert sorted(whole) == ["tiny.inferences 20", "tiny.inferences 40", "tiny.outcomes 18", "tiny.outcomes 18", "tiny.outcomes 6"], read
    assert [name for name, columns in read if columns == 2] == ["tiny.outcomes 18"]      # all other keys are known
    assert read_outcomes(tmp_path, "tiny", 21).is_empty() and read_inferences(tmp_path, "tiny").filter(pl.col("outcome").is_not_null()).height == 19
