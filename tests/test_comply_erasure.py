"""Erasure leaves nothing: any value, any file, twice, interrupted by nothing but a link."""
from __future__ import annotations

import base64
import gzip
import io
import json
import random
import zipfile
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.comply.erasure import can_be_sought, certify, erase_folder, pseudonym, rows_left
from pipeline.comply.traces import find_traces, forms_of, in_parquet
from pipeline.core.errors import IntegrityError
from pipeline.core.store import read_frame, write_frame
from pipeline.data.versions import list_versions, read_version, save_version

NAME = "Ångström & Söhne-4711"


def plant(folder: Path, value: str) -> set[int]:
    "A run that holds a subject in every way that its parts write; returns the subject's rows."
    frame = pl.DataFrame({
        "__row": range(200), "who": [value if i % 50 == 7 else f"somebody-{i}" for i in range(200)],
        "note": [f"seen with {value}!" if i == 3 else "alone" for i in range(200)], "amount": [float(i) for i in range(200)],
        "friends": [[f"somebody-{i}", value] if i == 5 else ["x"] for i in range(200)],
    })
    rows = set(frame.filter(who=value)["__row"])
    (folder / "02_data").mkdir(parents=True)
    write_frame(folder / "02_data/train.parquet", frame.with_columns(kind=pl.col("who").cast(pl.Enum(sorted(set(frame["who"]))))), 0o600)
    write_frame(folder / "02_data/predictions.parquet", frame.select("__row", p=pl.col("amount") / 200))
    pq.write_table(frame.select("who").to_arrow(), folder / "02_data/plain.parquet", compression="none", use_dictionary=False)
    frame.select("who", "amount").write_csv(folder / "02_data/export.csv")
    (folder / "02_data/encoder.json").write_text(json.dumps({"levels": sorted(set(frame["who"])), "tasks": [{"__row": 7, "x": 1}, {"__row": 8, "x": 2}], value: 1}))
    (folder / "02_data/notebook.ipynb").write_text(json.dumps({"cells": [{"outputs": [{"text": [f"<td>{value}</td>"]}]}]}))
    (folder / "02_data/events.jsonl").write_text(json.dumps({"about": value}) + "\n" + json.dumps({"about": "nobody"}, ensure_ascii=True) + "\n")
    (folder / "02_data/report.html").write_text("".join(f"<p>{form.decode('utf-8', 'ignore')}</p>" for n, form in forms_of(value).items() if n != "utf-16"))
    (folder / "02_data/model.txt").write_text(f"tree\npandas_categorical:[[\"{value}\"]]\n")
    with zipfile.ZipFile(folder / "02_data/old.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b.gz", gzip.compress(value.encode() * 9))
    (folder / "02_data/wide.bin").write_bytes(b"\x00" + value.encode("utf-16-le"))
    (folder / "02_data" / f"card of {value.replace('/', '')}.txt").write_text("hello")
    save_version(folder / "store", "people", frame.drop("friends"))
    save_version(folder / "store", "people", frame.drop("friends").with_columns(amount=pl.col("amount") + 1))
    return rows


def test_nothing_is_left_anywhere(tmp_path):
    rows = plant(tmp_path, NAME)
    before = find_traces(tmp_path, NAME)
    assert len({t.path for t in before}) >= 12
    done = erase_folder(tmp_path, "who", NAME, rows)
    assert find_traces(tmp_path, NAME) == [] and rows_left(tmp_path, "who", NAME, rows) == {}
    kept = read_frame(tmp_path / "02_data/train.parquet")
    assert kept.height == 196 and kept.filter(pl.col("__row") == 3)["note"][0] == "seen with erased!"
    assert (tmp_path / "02_data/train.parquet").stat().st_mode & 0o777 == 0o600
    assert read_frame(tmp_path / "02_data/predictions.parquet").height == 196          # by row number: the name was not there
    encoder = json.loads((tmp_path / "02_data/encoder.json").read_text())
    assert len(encoder["levels"]) == 197 and encoder["tasks"] == [{"__row": 8, "x": 2}]
    assert pl.read_delta(str(tmp_path / "store/tables/people")).height == 196
    assert done.filter(kind="table")["rows_removed"].to_list() == [4]
    assert erase_folder(tmp_path, "who", NAME, rows).filter(pl.col("kind") != "table").is_empty()


@pytest.mark.parametrize("mentioned", [True, False], ids=["also in a note", "only in its rows"])
def test_old_versions_of_a_table_hold_nobody(tmp_path, mentioned):
    from deltalake import DeltaTable

    frame = pl.DataFrame({"__row": range(9), "who": [NAME if i == 7 else "x" for i in range(9)], "note": [NAME if i == 3 and mentioned else "" for i in range(9)]})
    for more in range(3):
        save_version(tmp_path, "people", frame.with_columns(amount=pl.lit(more)))
    erase_folder(tmp_path, "who", NAME, {7})
    assert not find_traces(tmp_path, NAME)
    kept = list_versions(tmp_path, "people")
    assert read_version(tmp_path, "people", kept[-1]["id"]).height == 8
    for version in range(DeltaTable(str(tmp_path / "tables/people")).version() + 1):
        try:
            old = pl.read_delta(str(tmp_path / "tables/people"), version=version)
        except Exception:  # noqa: BLE001, S112
            continue
        assert NAME not in old["who"].to_list() and NAME not in old["note"].to_list()


def test_a_table_of_another_writer_is_begun_anew(tmp_path):
    from deltalake import write_deltalake

    table = tmp_path / "tables/foreign"
    frame = pl.DataFrame({"who": ["N14228", "N99999"], "x": [1, 2]})
    write_deltalake(table, frame)                                   # statistics of `who` stand in the log
    write_deltalake(table, frame, mode="append")
    assert find_traces(table, "N14228")
    erase_folder(tmp_path, "who", "N14228", set())
    assert not find_traces(tmp_path, "N14228") and pl.read_delta(str(table))["who"].to_list() == ["N99999"] * 2


def test_dictionary_page_statistics_and_schema(tmp_path):
    unused = pa.DictionaryArray.from_arrays(pa.array([0, 0], pa.int8()), pa.array(["a", "N14228"]))
    for name, how in {"dictionary": {"store_schema": False, "write_statistics": False}, "schema": {}}.items():
        pq.write_table(pa.table({"t": unused}), tmp_path / f"{name}.parquet", compression="zstd", **how)
        assert "N14228" not in pq.read_table(tmp_path / f"{name}.parquet")["t"].to_pylist()
        assert in_parquet(tmp_path / f"{name}.parquet", "N14228")
    pl.DataFrame({"t": pl.Series(["a"], dtype=pl.Enum(["a", "N14228"]))}).write_parquet(tmp_path / "enum.parquet", statistics=False)
    assert in_parquet(tmp_path / "enum.parquet", "N14228")          # polars keeps levels in the schema's metadata
    erase_folder(tmp_path, "t", "N14228", set())
    assert not find_traces(tmp_path, "N14228")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=4, max_size=24).map(str.strip).filter(lambda v: len(v) >= 4 and can_be_sought(v)),
       others=st.lists(st.text(max_size=12), max_size=4), seed=st.integers(0, 10**6))
def test_any_value_in_json_and_frames(tmp_path_factory, value, others, seed):
    if any(value.casefold() in o.casefold() for o in others):
        return
    folder = tmp_path_factory.mktemp("any")
    names = [value, *others, "plain"]
    random.Random(seed).shuffle(names)
    write_frame(folder / "a.parquet", pl.DataFrame({"who": names, "__row": range(len(names))}))
    (folder / "b.json").write_text(json.dumps({"levels": names}, ensure_ascii=bool(seed % 2)))
    erase_folder(folder, "who", value, {names.index(value)})
    assert not find_traces(folder, value)
    assert read_frame(folder / "a.parquet")["who"].to_list() == [n for n in names if n != value]
    assert len(json.loads((folder / "b.json").read_text())["levels"]) == len(names)


def test_numbers_and_short_names_go_by_rows(tmp_path):
    write_frame(tmp_path / "a.parquet", pl.DataFrame({"who": [4711, 4712, 4711], "__row": [0, 1, 2], "price": [4711, 1, 2]}))
    (tmp_path / "b.json").write_text('{"price": 4711}')
    assert not can_be_sought("4711")
    erase_folder(tmp_path, "who", "4711", {0, 2})
    assert read_frame(tmp_path / "a.parquet").to_dicts() == [{"who": 4712, "__row": 1, "price": 1}]
    assert (tmp_path / "b.json").read_text() == '{"price": 4711}'                      # another thing of the same number stays


def test_similar_names_stay(tmp_path):
    (tmp_path / "a.html").write_text("N10 N100 xN10 N10.")
    write_frame(tmp_path / "a.parquet", pl.DataFrame({"who": ["N1001", "N1001X", "xN1001"]}))
    erase_folder(tmp_path, "who", "N1001", set())
    assert read_frame(tmp_path / "a.parquet")["who"].to_list() == ["N1001X", "xN1001"]
    assert (tmp_path / "a.html").read_text() == "N10 N100 xN10 N10."


def test_base64_at_every_offset():
    for shift in range(9):
        coded = base64.b64encode(b"q" * shift + b"N14228 was here")
        file = io.BytesIO(coded)
        assert any(form in file.getvalue() for name, form in forms_of("N14228").items() if name.startswith("base64")), shift


def test_certificate_names_nobody(tmp_path):
    store, folder = tmp_path / "store", tmp_path / "run"
    rows = plant(folder, NAME)
    models = pl.DataFrame({"model": ["04_train/model"], "learned_from": [4]})
    with pytest.raises(IntegrityError, match="still found"):
        certify(store, NAME, folder, pl.DataFrame(), 9, models, "2026-01-01", "who", rows)
    done = erase_folder(folder, "who", NAME, rows)
    told = certify(store, NAME, folder, done, 9, models, "2026-01-01", "who", rows)
    (tmp_path / "certificate.json").write_text(json.dumps(told, ensure_ascii=False))
    assert not find_traces(tmp_path / "certificate.json", NAME) and told["subject"] == pseudonym(store, NAME)
