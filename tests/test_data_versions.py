"Versions and streams: one name for one content however it comes, nothing lost between writers, no flipped byte read in silence, tables too large for memory."
from __future__ import annotations

import datetime as dt
import json
import multiprocessing
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from room_kit import execute
from tables import REFUSED, RUNS, Refused, Runs

from pipeline.core.errors import EnvironmentFault, InputError, IntegrityError
from pipeline.core.problem import parse_problem, read_yaml
from pipeline.core.store import read_frame
from pipeline.data import streams
from pipeline.data.contract import read_as_declared, target_of
from pipeline.data.sources import prepare, read_table
from pipeline.data.splits import take_apart
from pipeline.data.streams import join_streams, open_stream, require_memory, sample_of, stream_frame, take_in
from pipeline.data.survey import Tally
from pipeline.data.versions import Fingerprint, diff_frames, diff_versions, forget_rows, list_versions, read_version, save_version, stream_version, version_id
from pipeline.data.whole import count_parts, keep_whole, prove_whole, split_whole

ROOT = Path(__file__).parents[1]
seeds = st.integers(0, 2**32 - 1)


def some_rows(seed: int, n: int) -> pl.DataFrame:
    "Every kind that a version keeps, with gaps."
    rng = np.random.default_rng(seed)
    at = pl.Series("at", [dt.datetime(2020, 1, 1) + dt.timedelta(seconds=int(s)) for s in rng.integers(0, 10**8, n)], dtype=pl.Datetime("us"))
    frame = pl.DataFrame({
        "__row": np.arange(n), "x": rng.normal(size=n), "n": rng.integers(-5, 5, n), "u": rng.integers(0, 2**63, n).astype(np.uint64) * 2,
        "small": rng.integers(0, 255, n).astype(np.uint8), "word": rng.choice(["", "a", "ä\x00b", "long " * 9, "🙂"], n), "yes": rng.random(n) < 0.5, "at": at,
        "day": at.dt.date(), "fine": at.cast(pl.Datetime("ns")), "zoned": at.dt.replace_time_zone("UTC"), "span": (at.cast(pl.Int64) % 86_400_000_000).cast(pl.Duration("us")), "hour": at.dt.time(),
        "cat": pl.Series(rng.choice(["u", "v"], n), dtype=pl.Categorical), "level": pl.Series(rng.choice(["lo", "hi"], n), dtype=pl.Enum(["lo", "hi"])),
        "raw": [rng.bytes(3) for _ in range(n)], "money": pl.Series(rng.integers(0, 999, n)).cast(pl.Decimal(12, 2)), "half": rng.normal(size=n).astype(np.float32),
    })
    gaps = pl.Series(rng.random(n) < 0.2)
    return frame.with_columns(pl.when(~gaps).then(pl.all().exclude("__row", "n")), nothing=pl.lit(None))


# -- one name for one content

@given(seeds, st.integers(0, 60), st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_name_does_not_depend_on_how_the_rows_are_cut(seed: int, n: int, data: st.DataObject) -> None:
    frame = some_rows(seed, n)
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=6))})
    pieces = Fingerprint()
    for start, end in zip(cuts, cuts[1:]) if n else [(0, 0)]:
        pieces.add(frame.slice(start, end - start))
    assert pieces.name() == version_id(frame) == version_id(pl.concat([frame.head(n // 2), frame.tail(n - n // 2)]))


@given(seeds, st.integers(2, 40), st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_other_cell_name_kind_or_order_is_another_name(seed: int, n: int, data: st.DataObject) -> None:
    frame = some_rows(seed, n)
    column = data.draw(st.sampled_from([c for c in frame.columns if c != "nothing"]))
    row = data.draw(st.integers(0, n - 1))
    swapped = frame[column].gather([row, *[i for i in range(n) if i != row]])
    emptied = frame.with_columns(pl.when(pl.int_range(pl.len()) != row).then(pl.col(column)).alias(column))
    others = [frame.with_columns(swapped), emptied, frame.rename({column: "other"}), frame.select(reversed(frame.columns)), frame.head(n - 1)]
    for other in others:
        same = other.columns == frame.columns and other.height == n and other.equals(frame, null_equal=True)
        assert (version_id(other) == version_id(frame)) == same


def test_zero_and_minus_zero_are_two_contents() -> None:
    assert version_id(pl.DataFrame({"x": [0.0]})) != version_id(pl.DataFrame({"x": [-0.0]})) != version_id(pl.DataFrame({"x": [None]}, schema={"x": pl.Float64}))
    assert version_id(pl.DataFrame({"a": ["x", None]})) != version_id(pl.DataFrame({"a": ["x", ""]}))


@given(seeds, st.integers(1, 50), st.integers(1, 20))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_a_version_is_bit_equal_after_three_more(tmp_path_factory: pytest.TempPathFactory, seed: int, n: int, size: int) -> None:
    store, frame = tmp_path_factory.mktemp("store"), some_rows(seed, n)
    first = save_version(store, "t", frame.iter_slices(size))
    for i in range(3):
        save_version(store, "t", frame.with_columns(pl.col("n") + i + 1).drop("day" if i == 1 else "hour"))
    back = read_version(store, "t", first["id"])
    assert back.schema == frame.schema and back.equals(frame, null_equal=True) and first["rows"] == n
    assert save_version(store, "t", frame)["id"] == first["id"] and len(list_versions(store, "t")) == 4
    assert pl.concat(stream_version(store, "t", first["id"], batch_rows=7)).equals(frame, null_equal=True)


# -- several writers

def _write(store: str, writer: int) -> None:
    for i in range(4):
        rows = pl.DataFrame({"__row": range(500), "x": np.random.default_rng(i if i < 2 else 100 * writer + i).normal(size=500)})   # two that all write, two of its own
        save_version(Path(store), "busy", rows if i % 2 else rows.iter_slices(90))


@pytest.mark.parametrize("writers", [2, 4])
def test_writers_at_once_lose_nothing(tmp_path: Path, writers: int) -> None:
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_write, args=(str(tmp_path), i)) for i in range(writers)]
    for process in started:
        process.start()
    for process in started:
        process.join(240)
    assert [process.exitcode for process in started] == [0] * writers
    kept = [version["id"] for version in list_versions(tmp_path, "busy")]
    assert len(kept) == len(set(kept)) == 2 + 2 * writers == len(list((tmp_path / "tables/busy").glob("*.parquet")))
    for version in kept:
        assert read_version(tmp_path, "busy", version).height == 500


def test_a_writer_from_elsewhere_is_met_by_deltas_own_check(tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake")
    first = save_version(tmp_path, "t", some_rows(1, 9).select("__row", "x"))
    deltalake.write_deltalake(tmp_path / "tables/t", pl.DataFrame({"__row": [9], "x": [1.5]}), mode="append")
    second = save_version(tmp_path, "t", some_rows(2, 9))
    assert read_version(tmp_path, "t", first["id"]).height == 9 and read_version(tmp_path, "t", second["id"]).equals(some_rows(2, 9), null_equal=True)
    assert pl.read_delta(str(tmp_path / "tables/t")).height == 9      # other tools read the newest as it is


def test_a_killed_writer_leaves_whole_versions(tmp_path: Path) -> None:
    code = ("import sys, polars as pl; from pathlib import Path; from pipeline.data import versions; versions.GROUP_CELLS = 1\n"
            "def batches():\n    yield pl.DataFrame({'__row': range(1000)})\n    print('half', flush=True); sys.stdin.read()\n"
            "versions.save_version(Path(sys.argv[1]), 't', batches())")
    kept = save_version(tmp_path, "t", some_rows(3, 20))
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, cwd=ROOT)
    assert writer.stdout is not None and writer.stdout.readline() == b"half\n"
    writer.kill()
    writer.wait()
    assert any(p.name.startswith(".writing-") for p in (tmp_path / "tables/t").iterdir())
    save_version(tmp_path, "t", some_rows(4, 20))
    assert len(list_versions(tmp_path, "t")) == 2 and read_version(tmp_path, "t", kept["id"]).height == 20
    assert not any(p.name.startswith(".writing-") for p in (tmp_path / "tables/t").iterdir())


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    kept = save_version(tmp_path, "t", some_rows(3, 20))
    code = ("import resource, signal, sys, numpy as np, polars as pl; from pathlib import Path\n"
            "from pipeline.core.errors import EnvironmentFault; from pipeline.data.versions import save_version\n"
            "import pyarrow.parquet, deltalake\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
            "try: save_version(Path(sys.argv[1]), 't', pl.DataFrame({'__row': range(90_000), 'x': np.random.default_rng(0).normal(size=90_000)}))\n"
            "except EnvironmentFault as error: print(error)\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "writing table t" in done.stdout and "free space" in done.stdout, done.stderr[-500:]
    assert [v["id"] for v in list_versions(tmp_path, "t")] == [kept["id"]] and read_version(tmp_path, "t", kept["id"]).height == 20


# -- flipped bytes

def test_of_200_flipped_bytes_of_a_version_none_is_read_silently(tmp_path: Path) -> None:
    frame, rng = some_rows(5, 3_000), random.Random(2)
    saved = save_version(tmp_path, "t", frame.iter_slices(1_000))
    file = next((tmp_path / "tables/t").glob("*.parquet"))
    whole, silent, without_digest = file.read_bytes(), 0, 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(IntegrityError, match=file.name):
            read_version(tmp_path, "t", saved["id"])
        with pytest.raises(IntegrityError, match=file.name):
            next(stream_version(tmp_path, "t", saved["id"], ["x"]))
    clean = save_version(tmp_path / "plain", "t", frame.select("__row", "x", "word", "yes", "at"))
    file = next((tmp_path / "plain/tables/t").glob("*.parquet"))
    whole, kept = file.read_bytes(), read_version(tmp_path / "plain", "t", clean["id"])
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    for _ in range(200):     # the pages' own checksums, which any reader can compare, find them, too
        damaged = bytearray(whole)
        damaged[rng.randrange(4, len(whole) - footer)] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            silent += not read_frame(file).equals(kept)
        except IntegrityError:
            without_digest += 1
    assert silent == 0 and without_digest > 150


def test_of_200_flipped_bytes_of_the_log_none_gives_other_rows(tmp_path: Path) -> None:
    frame, rng = some_rows(6, 50), random.Random(3)
    saved = save_version(tmp_path, "t", frame)
    save_version(tmp_path, "t", frame.head(9))
    logs = sorted((tmp_path / "tables/t/_delta_log").glob("*.json"))
    for _ in range(200):
        log = rng.choice(logs)
        whole = log.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        log.write_bytes(damaged)
        try:
            assert read_version(tmp_path, "t", saved["id"]).equals(frame, null_equal=True)
        except (IntegrityError, InputError) as refusal:
            assert "t" in str(refusal)
        log.write_bytes(whole)


# -- differences

@given(seeds, st.integers(5, 40), st.integers(0, 5), st.integers(0, 5), st.integers(0, 12))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_difference_is_what_was_changed(seed: int, n: int, gone: int, new: int, edits: int) -> None:
    rng = np.random.default_rng(seed)
    old = some_rows(seed, n).drop("raw")
    removed = set(rng.permutation(n)[: min(gone, n - 1)].tolist())
    cells = {(int(row), str(column)) for row, column in zip(rng.integers(0, n, edits), rng.choice(["x", "word", "yes", "cat"], edits)) if int(row) not in removed}
    fresh = some_rows(seed + 1, new).drop("raw").with_columns(pl.col("__row") + n)
    changed = old.with_columns(_edited(old, column, {row for row, c in cells if c == column}) for column in ("x", "word", "yes", "cat"))
    newer = pl.concat([changed.filter(~pl.col("__row").is_in(list(removed))), fresh]).sample(fraction=1, shuffle=True, seed=seed % 1000)
    found = diff_frames(old, newer)
    assert set(found.removed["__row"]) == removed and set(found.added["__row"]) == set(fresh["__row"])
    assert set(found.changed["__row"]) == {row for row, _ in cells} and set(found.cells.select("__row", "column").iter_rows()) == cells
    assert found.unchanged == n - len(removed) - found.changed.height


def _edited(frame: pl.DataFrame, column: str, rows: set[int]) -> pl.Series:
    values = frame[column].cast(pl.String).to_list()
    for row in rows:
        values[row] = {"x": "99.5", "yes": "true" if values[row] != "true" else "false", "cat": "w", "word": "another"}[column]
    texts = pl.Series(column, values)
    return texts == "true" if column == "yes" else texts.cast(frame.schema[column])


def test_versions_are_compared_by_any_key(tmp_path: Path) -> None:
    old = pl.DataFrame({"__row": [0, 1, 2], "who": ["a", "b", None], "day": [1, 1, 2], "x": [1.0, None, 3.0]})
    new = pl.DataFrame({"__row": [5, 6, 7], "who": [None, "a", "c"], "day": [2, 1, 1], "x": [3.0, 1.5, 0.0]})
    versions = [save_version(tmp_path, "t", frame)["id"] for frame in (old, new)]
    found = diff_versions(tmp_path, "t", *versions, key=["who", "day"])
    assert found.added.rows() == [("c", 1)] and found.removed.rows() == [("b", 1)] and found.changed["who"].to_list() == ["a", None]
    assert ("a", 1, "x", "1.0", "1.5") in found.cells.rows() and "1 rows added, 1 removed, 2 changed" in found._repr_html_()
    with pytest.raises(InputError, match="no column 'whom'; did you mean 'who'"):
        diff_versions(tmp_path, "t", *versions, key=["whom"])
    with pytest.raises(InputError, match="more than once"):
        diff_versions(tmp_path, "t", *versions, key=["day"])


# -- forgetting

def test_what_was_forgotten_may_be_kept_again(tmp_path: Path) -> None:
    frame = pl.DataFrame({"__row": range(40), "who": [f"canary-{i:03}" for i in range(40)]})
    first = save_version(tmp_path, "people", frame)
    left = forget_rows(tmp_path, "people", [7])
    assert left["erased"] == 1
    with pytest.raises(IntegrityError, match="no longer whole"):
        read_version(tmp_path, "people", first["id"])
    assert save_version(tmp_path, "people", frame)["id"] == first["id"] and read_version(tmp_path, "people", first["id"]).equals(frame)
    again = forget_rows(tmp_path, "people", [7])
    assert again["id"] == left["id"] and read_version(tmp_path, "people", left["id"]).height == 39
    assert not any(b"canary-007" in p.read_bytes() for p in (tmp_path / "tables").rglob("*") if p.is_file())


# -- streams

@pytest.mark.parametrize("case", [case for case in RUNS if not case.slow], ids=lambda case: case.name)
def test_a_stream_reads_what_a_reader_reads(case: Runs, tmp_path: Path) -> None:
    path = case.write(tmp_path)
    whole = read_table(path)
    for size in (997, 20_000, 10**7):
        stream = open_stream(path, batch_rows=137, block_bytes=size)
        rows = pl.concat(stream.batches())
        assert stream.rows == rows.height and dict(rows.schema) == stream.schema
        assert rows.equals(whole.frame, null_equal=True), (case.name, size)


@pytest.mark.parametrize("case", [c for c in REFUSED if c.suffix == "csv" and isinstance(c.content, bytes)], ids=lambda case: case.name)
def test_a_stream_refuses_what_a_reader_refuses(case: Refused, tmp_path: Path) -> None:
    path = case.write(tmp_path)
    try:
        read_table(path)
    except InputError:
        with pytest.raises(InputError) as refusal:
            list(open_stream(path, block_bytes=64).batches())
        assert path.name in str(refusal.value) and str(refusal.value).count("\n") == 0
    else:
        assert pl.concat(open_stream(path, block_bytes=64).batches()).equals(read_table(path).frame)


@given(st.lists(st.lists(st.text(st.sampled_from('ab1,"\n é'), max_size=5), min_size=2, max_size=2), min_size=1, max_size=30), st.integers(3, 60))
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_of_a_csv_end_where_records_end(tmp_path: Path, cells: list[list[str]], size: int) -> None:
    quoted = ['"' + "\",\"".join(cell.replace('"', '""') or "x" for cell in row) + '"' for row in cells]
    (tmp_path / "t.csv").write_bytes(("first,second\n" + "\n".join(quoted) + "\n").encode())
    given_rows = [tuple(cell or "x" for cell in row) for row in cells]
    rows = pl.concat(open_stream(tmp_path / "t.csv", block_bytes=size).batches()).rows()
    assert [tuple(str(c) for c in row) for row in rows] == [tuple(str(c) for c in row) for row in read_table(tmp_path / "t.csv").frame.rows()] and len(rows) == len(given_rows)


def test_kinds_are_settled_by_all_rows(tmp_path: Path) -> None:
    lines = [f"{i},2020-01-{i % 28 + 1:02},,{i}" for i in range(3_000)]
    lines[2_900] = "2.5,not a date,7,"
    (tmp_path / "t.csv").write_text("n,day,late,m\n" + "\n".join(lines) + "\n")
    stream = open_stream(tmp_path / "t.csv", block_bytes=5_000)
    assert stream.schema == {"n": pl.Float64, "day": pl.String, "late": pl.Int64, "m": pl.Int64}
    assert pl.concat(stream.batches())["n"][2_900] == 2.5


def test_large_files_that_differ_are_refused(tmp_path: Path) -> None:
    frame = pl.DataFrame({"a": [1], "b": ["x"]})
    with pytest.raises(InputError, match="differ in column 'b'"):
        join_streams([stream_frame(frame, name="one"), stream_frame(frame.with_columns(b=pl.lit(1)), name="two")])
    (tmp_path / "latin.csv").write_bytes(b"stadt,n\n" + "Köln,1\n".encode("latin-1"))
    with pytest.raises(InputError, match="latin.csv:2: byte 0xf6 is not UTF-8"):
        open_stream(tmp_path / "latin.csv")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match="no whole parquet file"):
        open_stream(tmp_path / "cut.parquet")
    with pytest.raises(InputError, match="leave the file alone"):
        sample_of(streams.Stream("t", dict(frame.schema), 9, lambda: iter([frame])), 3, np.random.default_rng(0))


@given(seeds, st.integers(1, 2_000), st.integers(1, 500))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_tally_counts_like_the_whole(seed: int, n: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    values = pl.Series("v", rng.integers(0, rng.integers(1, 60), n), dtype=pl.Int64).set(pl.Series(rng.random(n) < 0.1), None)
    tally = Tally(50)
    for start in range(0, n, size):
        tally.add(values[start : start + size])
    known = values.drop_nulls()
    assert (tally.rows, tally.nulls, tally.distinct, tally.low, tally.high) == (n, values.null_count(), known.n_unique(), known.min(), known.max())
    assert tally.counts == (dict(known.value_counts().iter_rows()) if known.n_unique() <= 50 else None)


# -- sizes that nobody expects (T30)

def test_ten_thousand_columns_one_column_and_a_huge_cell_are_versions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wide = pl.DataFrame(rng.normal(size=(60, 10_000)), schema=[f"x{i}" for i in range(10_000)])
    one, huge = pl.DataFrame({"x": rng.normal(size=200_000)}), pl.DataFrame({"__row": [0, 1], "text": ["é" * 5_000_000, None]})
    for name, frame, size in (("wide", wide, 25), ("one", one, 70_000), ("huge", huge, 1)):
        saved = save_version(tmp_path, name, frame.iter_slices(size))
        assert saved["id"] == version_id(frame) and read_version(tmp_path, name, saved["id"]).equals(frame)
    huge.drop("__row").write_csv(tmp_path / "huge.csv", quote_style="always")
    assert pl.concat(open_stream(tmp_path / "huge.csv", block_bytes=1_000_000).batches())["text"].equals(huge["text"])


def test_a_million_rows_and_as_many_levels_stay_below_the_memory_cap(tmp_path: Path) -> None:
    code = """
import resource, sys, numpy as np, polars as pl
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from tests.bench.data_scale import stream, write
from pipeline.data.streams import stream_frame
from pipeline.data.survey import Tally
folder = Path(sys.argv[1])
tally = Tally(1000)
for i in range(20):
    tally.add(pl.Series([f"name {k}" for k in range(i * 50_000, (i + 1) * 50_000)]))
assert abs(tally.distinct / 1e6 - 1) < 0.03 and tally.counts is None
write(folder / "parcels.parquet", 300_000)
import tests.bench.data_scale as bench
bench.PROBLEM = bench.PROBLEM.replace("1000000", "20000")
found = stream(folder / "parcels.parquet", folder / "store")
assert found["rows"] == 300_000 and found["sample"] == 20_000 and found["told"] > 3, found
print(found["peak_mb"])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(ROOT)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < 1_500   # MB, libraries and allocator included; half of what a table of 20 million rows may take


def test_a_table_that_would_not_come_through_is_told_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pl.DataFrame({"x": np.arange(100_000), "y": np.arange(100_000) % 2}).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(EnvironmentFault, match="1.6 GB needs about 6.4 GB of memory on its way, and 2 GB may be taken"):
        require_memory(1_600_000_000, free=2_000_000_000)
    monkeypatch.setattr(streams, "free_bytes", lambda: 1_000_000)
    problem: Any = type("P", (), {"data": type("D", (), {"prepare": None, "sources": []})()})()
    with pytest.raises(EnvironmentFault, match="0.001 GB may be taken"):
        take_in(problem, {"t": tmp_path / "t.parquet"}, np.random.default_rng(0), prepare)


# -- the split of all rows

@pytest.mark.parametrize("asked", ["", ", time: sent, split: {gap_days: 5}", ", time: sent, group: g, split: {kind: time}", ", time: sent, split: {kind: random, force: rows are drawn anew}"],
                         ids=["found time", "gap", "time and group", "forced"])
def test_all_rows_are_split_as_the_sample_is(tmp_path: Path, asked: str) -> None:
    rng, n = np.random.default_rng(0), 8_000
    pl.DataFrame({
        "sent": [None if i % 83 == 7 else dt.datetime(2020, 1, 1) + dt.timedelta(hours=i) for i in range(n)], "x": rng.normal(size=n),
        "g": [None if i % 97 == 0 else str(i // 300 + int(rng.integers(0, 6))) for i in range(n)], "y": np.where(rng.random(n) < np.linspace(0.1, 0.8, n), "a", "b"),
    }).write_parquet(tmp_path / "t.parquet")
    problem = parse_problem(*read_yaml(f"""
problem: {{name: t, statement: "Which orders come back?", kpi: {{name: x, baseline: 0, target: 1, unit: ""}}, task: binary, target: y}}
data: {{sources: [{{name: t, kind: parquet, path: t.parquet}}]{asked}}}
train: {{rows_max: 2000}}
""", "t.yml"), "t.yml")
    taken = take_in(problem, {"t": tmp_path / "t.parquet"}, np.random.default_rng(1), prepare, large=0)
    rows, kinds, _ = read_as_declared(taken.frame, problem)
    target = target_of(rows, problem)
    whole = keep_whole(tmp_path, problem, rows.with_columns(target.values), kinds, target, taken)
    parts, whole = split_whole(take_apart(rows, target, problem, np.random.default_rng(2)), problem, whole)
    proof, counts = prove_whole(parts, problem, whole), count_parts(whole)
    assert proof["kept"].all() and proof.height and sum(counts.values()) == n and counts["holdout"] > 400
    codes, times = whole.codes, read_version(tmp_path, "t", whole.version["id"], ["sent"])["sent"]
    if parts.rule == "time":
        latest, first = times.filter(pl.Series(codes == 0)).max(), times.filter(pl.Series(codes == 1)).min()
        assert latest + dt.timedelta(days=parts.gap_days) < first + dt.timedelta(hours=1)  # type: ignore[operator]
        folds = [times.filter(pl.Series(whole.folds == fold)) for fold in range(-1, parts.folds)]
        assert all(a.max() < b.min() for a, b in zip(folds[1:], folds[2:]))


# -- the phase

def project(folder: Path, extra: str, n: int = 6_000) -> Path:
    rng = np.random.default_rng(4)
    price = rng.lognormal(3, 1, n).round(2)
    late = np.where(rng.random(n) < 1 / (1 + np.exp(-(np.log(price) - 3))), "yes", "no")
    frame = pl.DataFrame({
        "sent": [dt.datetime(2021, 1, 1) + dt.timedelta(minutes=20 * i) for i in range(n)], "price": price, "items": rng.integers(1, 9, n),
        "town": rng.choice(["Bern", "Köln", "Wien", None], n).tolist(), "client": [f"client-{i:04}" for i in rng.integers(0, 900, n)], "late": late.tolist(),
    }).with_columns(pl.when(pl.int_range(pl.len()) % 50 != 3).then(pl.col("late")), pl.when(pl.int_range(pl.len()) == 17).then(1e6).otherwise(pl.col("price")).alias("price"))
    frame.write_parquet(folder / "parcels.parquet")
    (folder / "settings.ini").write_text("[outputs]\npath = outputs\n[engine]\nthreads = 1\n")
    (folder / "params").mkdir()
    (folder / "params/parcels.yml").write_text(f"""
problem: {{name: parcels, statement: "Will the parcel be late?", kpi: {{name: late parcels, baseline: 30, target: 20, unit: "%"}}, task: binary, target: late}}
data: {{sources: [{{name: parcels, kind: parquet, path: parcels.parquet, licence: own, owner: us}}], {extra}}}
train: {{rows_max: 2000}}
comply: {{subject: client, pii: [client], encrypt: true}}
""")
    return folder


@pytest.mark.parametrize("extra", [
    "time: sent, split: {holdout_from: 2021-03-01, production_from: 2021-03-15}",
    "columns: {sent: {role: drop}}, group: client, split: {kind: group}",
    "columns: {sent: {role: drop}}, split: {kind: random}",
], ids=["time", "group", "random"])
def test_a_phase_streams_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: str) -> None:
    monkeypatch.chdir(project(tmp_path, extra))
    names = {}
    for run, large in (("whole", 10**9), ("streamed", 0)):
        monkeypatch.setattr(streams, "LARGE_BYTES", large)
        names[run] = execute(ROOT / "nbs/phases/02_data.ipynb", "params/parcels.yml", f"outputs/parcels/{run}")
    saved = {run: {p.name for p in (tmp_path / f"outputs/parcels/{run}/02_data").iterdir()} for run in names}
    assert saved["streamed"] - saved["whole"] == {"parts.parquet"} and not saved["whole"] - saved["streamed"]
    version = names["streamed"]["whole"].version
    assert version == names["whole"]["whole"].version and version["rows"] == 6_000 and len(list_versions(tmp_path / "outputs/store", "parcels")) == 1
    folder = tmp_path / "outputs/parcels/streamed/02_data"
    parts, splits = pl.read_parquet(folder / "parts.parquet"), json.loads((folder / "splits.json").read_text())
    assert parts.height == 6_000 and sum(splits["of_all_rows"].values()) == 6_000 and sum(splits[p]["n"] for p in ("train", "holdout", "unlabelled")) <= 2_000
    assert json.loads((folder / "answer.json").read_text())["verdict"] in ("go", "no-go")
    whole = {p: pl.read_parquet(tmp_path / f"outputs/parcels/whole/02_data/{p}.parquet") for p in ("train", "holdout")}
    kept = read_version(tmp_path / "outputs/store", "parcels", version["id"])
    for code, name in enumerate(("train", "holdout")):
        seen = pl.read_parquet(folder / f"{name}.parquet")
        assert (parts["part"][seen["__row"]] == code).all() and seen["price"].equals(kept["price"][seen["__row"]])
        if "time:" in extra:
            assert set(parts.with_row_index().filter(pl.col("part") == code)["index"]) == set(whole[name]["__row"])
    if "group:" in extra:
        sides = parts.with_columns(client=kept["client"])
        assert not set(sides.filter(pl.col("part") == 0)["client"]) & set(sides.filter(pl.col("part") == 1)["client"])
    contract = {rule["name"]: rule for rule in json.loads((folder / "contract.json").read_text())["columns"]}
    trained = kept.filter(parts["part"] == 0)
    assert contract["price"]["max"] == trained["price"].max() and contract["town"]["nullable"]
    profile = pl.read_parquet(folder / "profile.parquet").filter(pl.col("column") == "price")
    assert profile["high"][0] == trained["price"].max() and profile["distinct"][0] == trained["price"].n_unique()
    assert pl.read_parquet(folder / "proof.parquet")["kept"].all()
    assert not any(b"client-0" in p.read_bytes() for p in (tmp_path / "outputs").rglob("*") if p.is_file())


def test_versions_are_listed_and_compared_on_the_command_line(project: Path, pilothouse: Any) -> None:
    store = project / "outputs/store"
    slip = pilothouse("versions", "trips")
    assert slip.returncode == 2 and "trips" in slip.stderr and not slip.stdout
    (project / "outputs/trips").mkdir(parents=True)     # it has run, and kept no table
    assert pilothouse("versions", "trips").stdout.strip() == "no version of trips is kept yet"
    before = pl.DataFrame({"__row": [0, 1, 2], "wind": [1.0, 2.0, 3.0]})
    old = save_version(store, "trips", before)["id"]
    new = save_version(store, "trips", pl.DataFrame({"__row": [1, 2, 3], "wind": [2.0, 9.0, 4.0]}))["id"]
    listed = json.loads(pilothouse("versions", "trips", "--json").stdout)
    assert [v["id"] for v in listed] == [old, new] and old in pilothouse("versions", "trips").stdout
    found = pilothouse("diff", "trips", old, new, "--json")
    assert json.loads(found.stdout) == {"old": old, "new": new, "added": 1, "removed": 1, "changed": 1}
    assert "1 rows added, 1 removed, 1 changed, 1 unchanged" in pilothouse("diff", "trips", old, new).stdout
    wrong = pilothouse("diff", "trips", old, "v0000000000000000")
    assert wrong.returncode == 2 and "no version v0000000000000000" in wrong.stderr
    assert pilothouse("diff", "trips", old, new, "--key", "wnd").returncode == 2


def test_a_contract_is_proposed_on_the_command_line(project: Path, pilothouse: Any) -> None:
    pl.DataFrame({"wind": [float(i % 9) for i in range(200)], "late": ["yes", "no"] * 100}).write_csv(project / "trips.csv")
    assert pilothouse("new", "trips", "--data", "trips.csv", "--target", "late").returncode == 0
    told = pilothouse("contract", "trips", "--json")
    assert json.loads(told.stdout) == {"contract": "params/trips.contract.yml"}, told.stderr
    text = (project / "params/trips.contract.yml").read_text()
    assert "wind: {type: number" in text and "late: {levels: [\"no\", \"yes\"]}" in text
    again = pilothouse("contract", "trips")
    assert again.returncode == 2 and "exists and may hold what people agreed on" in again.stderr
    assert pilothouse("contract", "trips", "--force").returncode == 0
