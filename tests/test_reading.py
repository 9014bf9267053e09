"""Files in pieces hold what they hold as a whole: any values, any length of a piece; a damaged one is refused, never misread."""
from __future__ import annotations

import bz2
import datetime as dt
import gzip
import io
import json
import lzma
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core.errors import InputError, IntegrityError, PilothouseError
from pipeline.data.export import write_export
from pipeline.data.sources import read_table
from pipeline.data.streams import open_stream
from pipeline.deploy.batch import read_rows, stream_rows
from pipeline.deploy.frames import check_frame
from pipeline.deploy.reading import cut, read_pieces
from pipeline.deploy.schema import Field, Schema

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LETTERS = st.characters(exclude_categories=("Cs", "Cc"), include_characters="\n\t")
CELLS: dict[str, Any] = {
    "text": st.none() | st.text(LETTERS, min_size=1, max_size=8).map(lambda t: f"<{t}&"), "number": st.none() | st.floats(allow_nan=False, allow_infinity=False, width=32),
    "whole": st.none() | st.integers(-10**9, 10**9), "truth": st.none() | st.booleans(), "day": st.none() | st.dates(dt.date(1901, 1, 1), dt.date(2100, 1, 1)),
}


@QUICK
@given(rows=st.lists(st.fixed_dictionaries(CELLS), min_size=1, max_size=30), at_once=st.integers(1, 40))
def test_a_workbook_in_pieces(rows: list[dict[str, Any]], at_once: int, tmp_path: Path) -> None:
    "Against what was written; a row of nothing is no row of a sheet."
    kinds = {"text": pl.String, "number": pl.Float64, "whole": pl.Int64, "truth": pl.Boolean, "day": pl.Date}
    frame = pl.DataFrame(rows, schema=kinds).filter(~pl.all_horizontal(pl.all().is_null()))
    if frame.is_empty():
        return
    write_export(frame, tmp_path / "in.xlsx")
    read = pl.concat(list(cut(read_pieces(tmp_path / "in.xlsx", None, at_once), at_once)))
    assert read["text"].equals(frame["text"]) and read["whole"].cast(pl.Int64).equals(frame["whole"]) and read["truth"].equals(frame["truth"].cast(pl.String))
    assert read["number"].cast(pl.Float64).equals(frame["number"]) and read["day"].str.to_date().equals(frame["day"])


@QUICK
@given(rows=st.lists(st.dictionaries(st.sampled_from(["a", "b", "c d"]), st.none() | st.integers(-10**6, 10**6) | st.floats(-1e6, 1e6) | st.fixed_dictionaries({"x": st.text(max_size=4)}), min_size=1),
                     min_size=1, max_size=40), size=st.integers(1, 400))
def test_json_lines_in_pieces(rows: list[dict[str, Any]], size: int, tmp_path: Path) -> None:
    "As polars reads them as a whole, or refused by both."
    content = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "in.jsonl").write_text(content)
    try:
        whole = pl.read_ndjson(io.BytesIO(content.encode()), infer_schema_length=None)
    except pl.exceptions.PolarsError:
        return
    try:
        pieces = list(read_pieces(tmp_path / "in.jsonl", None, 10, size))
    except InputError as error:
        assert "longer than" in str(error)
        return
    nested = [n for n, kind in whole.schema.items() if isinstance(kind, pl.Struct)]
    read = pl.concat(pieces)
    for name in whole.columns:
        shown = whole[name].struct.field("x") if name in nested else whole[name]
        found = read[f"{name}.x"] if name in nested else read[name]
        assert found.to_list() == shown.to_list(), name


def test_flipped_bytes_of_a_workbook_are_found(tmp_path: Path) -> None:
    "The archive's checksums do it; what is read in spite of a flip is what was written."
    frame = pl.DataFrame({"n": range(400), "who": [f"somebody {i}" for i in range(400)]})
    write_export(frame, tmp_path / "in.xlsx")
    content, rng, refused = (tmp_path / "in.xlsx").read_bytes(), random.Random(1), 0
    known = read_rows(tmp_path / "in.xlsx")
    for _ in range(60):
        at = rng.randrange(len(content))
        (tmp_path / "in.xlsx").write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:])
        try:
            assert read_rows(tmp_path / "in.xlsx").equals(known), at
        except PilothouseError:
            refused += 1
    assert refused > 30


def sheet(rows: str) -> str:
    return f'<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>{rows}</sheetData></worksheet>'


@pytest.fixture
def book(tmp_path: Path) -> Path:
    write_export(pl.DataFrame({"n": [1, 2]}), tmp_path / "plain.xlsx")
    return tmp_path / "plain.xlsx"


def made(book: Path, **parts: str) -> Path:
    "A workbook with other parts: sheet, styles, workbook, sharedStrings."
    with zipfile.ZipFile(book) as source, zipfile.ZipFile(book.with_name("made.xlsx"), "w", zipfile.ZIP_DEFLATED) as target:
        names = {"sheet": "xl/worksheets/sheet1.xml", "styles": "xl/styles.xml", "workbook": "xl/workbook.xml", "shared": "xl/sharedStrings.xml"}
        given = {names[part]: text for part, text in parts.items()}
        for name in {*source.namelist(), *given}:
            target.writestr(name, given.get(name) or source.read(name))
    return book.with_name("made.xlsx")


def test_as_other_programs_write_it(book: Path) -> None:
    "Strict names, a prefix, phonetic readings, rich texts, days since 1904, a header that begins in B2, cells that name no place."
    shared = ('<x:sst xmlns:x="http://purl.oclc.org/ooxml/spreadsheetml/main"><x:si><x:t>day</x:t></x:si><x:si><x:r><x:t>ri</x:t></x:r><x:r><x:t xml:space="preserve">ch </x:t></x:r><x:rPh sb="0" eb="1">'
              '<x:t>reading</x:t></x:rPh></x:si></x:sst>')
    rows = ('<row r="2"><c r="B2" t="s"><v>0</v></c><c r="C2" t="inlineStr"><is><t>who</t></is></c></row>'
            '<row r="3"><c r="B3" s="1"><v>40000.25</v></c><c t="s"><v>1</v></c></row><row r="9"><c r="B9" t="d"><v>2020-05-06</v></c><c r="C9" t="str"><f>"a"</f><v>a</v></c></row>')
    styles = ('<styleSheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><numFmts count="1"><numFmt numFmtId="170" formatCode="[$-407]d/ mmm yy"/></numFmts>'
              '<cellStyleXfs><xf numFmtId="14"/></cellStyleXfs><cellXfs><xf numFmtId="0"/><xf numFmtId="170"/></cellXfs></styleSheet>')
    with zipfile.ZipFile(book) as held:
        workbook = re.sub(r"<workbookPr[^>]*/>", '<workbookPr date1904="1"/>', held.read("xl/workbook.xml").decode())
    read = read_rows(made(book, sheet=sheet(rows), shared=shared, styles=styles, workbook=workbook))
    assert read.to_dicts() == [{"day": "2013-07-07T06:00:00", "who": "rich "}, {"day": "2020-05-06", "who": "a"}]


@pytest.mark.parametrize(("rows", "said"), [
    ('<row><c r="A1" t="str"><v>n</v></c></row><row><c r="ZZZ2"><v>1</v></c></row>', "no sheet has"),
    ('<row><c r="A1" t="str"><v>n</v></c></row><row r="2"><c r="A2"><v>one</v></c></row>', "no whole workbook"),
    ('<row><c r="A1" t="str"><v>n</v></c></row><row r="2"><c r="A2"><v>1</v></c><c r="B2"><v>1</v></c></row>', "row 2 has a cell outside the 1 columns"),
    ('<row><c r="A1" t="str"><v>n</v></c></row><row r="2"><c r="A2" t="str"><v>' + "x" * 1_000_001 + "</v></c></row>", "a cell of more than"),
    ("", "sheet is empty"),
])
def test_what_no_sheet_holds_is_refused(book: Path, rows: str, said: str) -> None:
    with pytest.raises((InputError, IntegrityError), match=said):
        read_rows(made(book, sheet=sheet(rows)))


GROWN = """
import sys
from pathlib import Path
from pipeline.deploy.batch import stream_rows
def kept(): return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")) / 1000
import json
for file in sys.argv[1:]:
    rows = sum(part.rows.height for part in stream_rows(Path(file), ["n"], 1000))
    print(json.dumps([rows, kept()]))
"""


@pytest.mark.parametrize(("kind", "many", "most"), [("jsonl", 180_000, 70), ("xlsx", 60_000, 35)])
def test_many_more_rows_take_little_more_memory(kind: str, many: int, most: float, book: Path, tmp_path: Path) -> None:
    "In a process of its own, by the kernel's high-water mark; other columns are never kept."
    if not Path("/proc/self/status").exists():
        pytest.skip("the kernel does not tell a process its high-water mark here")
    for rows in (6_000, many):
        if kind == "jsonl":
            pl.DataFrame({"n": range(rows), "note": [f"nothing that anybody reads, {i}" * 8 for i in range(rows)]}).write_ndjson(tmp_path / f"{rows}.jsonl")
        else:
            lines = (f'<row r="{i}"><c r="A{i}"><v>{i}</v></c><c r="B{i}" t="inlineStr"><is><t>{f"nothing that anybody reads, {i}" * 8}</t></is></c></row>' for i in range(2, rows + 2))
            head = '<row r="1"><c r="A1" t="str"><v>n</v></c><c r="B1" t="str"><v>note</v></c></row>'
            made(book, sheet=sheet(head + "".join(lines))).rename(tmp_path / f"{rows}.xlsx")
    done = subprocess.run([sys.executable, "-c", GROWN, str(tmp_path / f"6000.{kind}"), str(tmp_path / f"{many}.{kind}")], capture_output=True, text=True, check=True)
    few, large = (json.loads(line) for line in done.stdout.splitlines())
    assert (few[0], large[0]) == (6_000, many)
    assert large[1] - few[1] < most, (few, large)       # read whole, the same files take 157 and 58 MB more


def test_whole_and_parts_are_one_reading(tmp_path: Path) -> None:
    frame = pl.DataFrame({"n": range(50), "who": ["ä", "b"] * 25})
    frame.write_ndjson(tmp_path / "in.jsonl")
    write_export(frame, tmp_path / "in.xlsx")
    for kind in ("jsonl", "xlsx"):
        parts = list(stream_rows(tmp_path / f"in.{kind}", ["who"], 20))
        assert [p.start for p in parts] == [0, 20, 40] and pl.concat([p.rows for p in parts])["who"].equals(read_table(tmp_path / f"in.{kind}").frame["who"])
        assert [p.rows.columns for p in stream_rows(tmp_path / f"in.{kind}", ["nothing"], 20)] == [["n", "who"]] * 3


def packed(place: Path, content: bytes) -> list[Path]:
    for name, pack in (("in.csv.gz", gzip.compress), ("in.csv.bz2", bz2.compress), ("in.csv.xz", lzma.compress)):
        (place / name).write_bytes(pack(content))
    with pa.output_stream(place / "in.csv.zst", compression="zstd") as out:
        out.write(content)
    with zipfile.ZipFile(place / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("in.csv", content)
    return [file for file in sorted(place.iterdir()) if file.name.startswith("in.")]


def test_packed_tables_are_the_tables_in_them(tmp_path: Path) -> None:
    content = b"hour,town\n" + b"".join(b"%d,Ulm\n" % i for i in range(5000))
    files = packed(tmp_path, content)
    assert len(files) == 5
    for file in files:
        rows = pl.concat([part.rows for part in stream_rows(file, ["hour"], 700)])
        assert rows.columns == ["hour"] and rows["hour"].cast(pl.Int64).to_list() == list(range(5000)), file
        assert read_rows(file).equals(pl.read_csv(content, infer_schema=False))
        cut = tmp_path / f"cut{file.name}"
        cut.write_bytes(file.read_bytes()[:-40])
        with pytest.raises(InputError, match="no whole archive"):
            read_rows(cut)
    packed(tmp_path, b"hour\n" + bytes(60_000_000))
    with pytest.raises(IntegrityError, match="zip bomb"):
        read_rows(tmp_path / "in.csv.gz")


def test_nested_columns_have_the_same_names_where_it_is_learned_and_answered(tmp_path: Path) -> None:
    rows = pl.DataFrame({"who": [{"age": 1.5, "body": {"height": 3}}, None, {"age": None, "body": None}], "town": ["Ulm", "Bonn", "Kiel"]})
    rows.write_parquet(tmp_path / "in.parquet")
    flat = pl.DataFrame({"who.age": [1.5, None, None], "who.body.height": [3, None, None], "town": ["Ulm", "Bonn", "Kiel"]})
    learned, stream = read_table(tmp_path / "in.parquet"), open_stream(tmp_path / "in.parquet")
    assert learned.frame.equals(flat) and "outer.inner" in learned.notes[0]
    assert pl.concat(stream.batches()).equals(flat) and stream.schema == dict(flat.schema)
    assert read_rows(tmp_path / "in.parquet").equals(flat)
    assert next(stream_rows(tmp_path / "in.parquet", ["who.body.height"])).rows.equals(flat.select("who.body.height"))
    rows.with_columns(pl.lit(1).alias("who.age")).write_parquet(tmp_path / "twice.parquet")
    with pytest.raises(InputError, match="who.age"):
        read_table(tmp_path / "twice.parquet")


def test_the_order_of_day_and_month_is_settled_as_for_learning(tmp_path: Path) -> None:
    days = [dt.date(2024, 1, 1) + dt.timedelta(days=i) for i in range(300)]
    for way in ("%m/%d/%Y", "%d/%m/%Y"):
        pl.DataFrame({"day": [day.strftime(way) for day in days]}).write_csv(tmp_path / "in.csv")
        (tmp_path / "in.csv.gz").write_bytes(gzip.compress((tmp_path / "in.csv").read_bytes()))
        assert read_table(tmp_path / "in.csv").frame["day"].to_list() == days
        for file in ("in.csv", "in.csv.gz"):
            rows = pl.concat([part.rows for part in stream_rows(tmp_path / file, ["day"], 7, dates=["day"])])
            assert check_frame(rows, Schema((Field("day", "date", "Date", False),)))["day"].to_list() == days
    for open_ in (["01/02/2024", "03/04/2024"], ["13/02/2024", "02/13/2024"]):
        pl.DataFrame({"day": open_}).write_csv(tmp_path / "in.csv")
        with pytest.raises(InputError, match="do not settle whether the day or the month stands first; write dates as 2024-01-31"):
            check_frame(next(stream_rows(tmp_path / "in.csv", ["day"], dates=["day"])).rows, Schema((Field("day", "date", "Date", False),)))
