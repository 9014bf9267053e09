"What would spoil the gap map: false alarms on a sample that matches, a thin stratum that is not first, rows that do not close the gap."
from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import InputError
from pipeline.data.gaps import ALPHA, OTHER, declared_gaps, strata_names

CARRIERS = {"UA": .3, "B6": .25, "EV": .2, "DL": .15, "AA": .08, "HA": .02}
ORIGINS = {"EWR": .4, "JFK": .35, "LGA": .25}
JOINT = {f"{c}*{o}": p * q for c, p in CARRIERS.items() for o, q in ORIGINS.items()}
WANTED = {"carrier": CARRIERS, "origin": ORIGINS, "carrier*origin": JOINT}


def sample(rng: np.random.Generator, n: int) -> pl.DataFrame:
    "Rows drawn from exactly the declared distribution."
    drawn = rng.choice(list(JOINT), n, p=np.array(list(JOINT.values())) / sum(JOINT.values()))
    return pl.DataFrame({"both": drawn}).select(pl.col("both").str.split("*").list.to_struct(fields=["carrier", "origin"])).unnest("both")


@pytest.mark.parametrize("n", [150, 1_000, 20_000])
def test_a_matched_sample_shows_no_gap_over_two_hundred_draws(n: int) -> None:
    alarms = sum((declared_gaps(sample(np.random.default_rng([n, i]), n), WANTED)["finding"] != "").any() for i in range(200))
    assert alarms <= 200 * ALPHA   # the error of all 27 strata of three maps together


@pytest.mark.parametrize("stratum", list(CARRIERS))
def test_a_stratum_that_lost_nine_tenths_stands_first(stratum: str) -> None:
    frame = sample(np.random.default_rng(5), 20_000)
    thin = frame.filter((pl.col("carrier") != stratum) | (pl.int_range(pl.len()) % 10 == 0))
    gaps = declared_gaps(thin, {"carrier": CARRIERS, "origin": ORIGINS})
    first = gaps.row(0, named=True)
    assert first["stratum"] == stratum and first["finding"] == "too few"
    assert (first["rows"] + first["extra_rows"]) / (thin.height + first["extra_rows"]) == pytest.approx(CARRIERS[stratum], abs=1e-3)
    assert (gaps.filter(column="origin")["finding"] == "").all()


@pytest.mark.parametrize("cell", ["UA*EWR", "DL*LGA", "AA*JFK"])
def test_a_thin_combination_is_named_though_others_are_full(cell: str) -> None:
    carrier, origin = cell.split("*")
    frame = sample(np.random.default_rng(6), 20_000)
    thin = frame.filter((pl.col("carrier") != carrier) | (pl.col("origin") != origin) | (pl.int_range(pl.len()) % 10 == 0))
    first = declared_gaps(thin, WANTED, price=1.5).row(0, named=True)
    assert (first["column"], first["stratum"], first["finding"]) == ("carrier*origin", cell, "too few") and first["cost"] == 1.5 * first["extra_rows"] > 0


@given(st.integers(0, 2**32 - 1), st.integers(200, 3_000), st.lists(st.sampled_from(list(CARRIERS)), min_size=1, max_size=4, unique=True))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_rows_asked_for_close_every_gap_of_a_column_at_once(seed: int, n: int, lost: list[str]) -> None:
    frame = sample(np.random.default_rng(seed), n)
    thin = frame.filter(~pl.col("carrier").is_in(lost) | (pl.int_range(pl.len()) % 10 == 0))
    if thin.is_empty():
        return
    gaps = declared_gaps(thin, {"carrier": CARRIERS})
    few = gaps.filter(finding="too few")
    after = thin.height + int(few["extra_rows"].sum())
    for row in few.iter_rows(named=True):
        assert (row["rows"] + row["extra_rows"]) / after == pytest.approx(row["wanted"], abs=2 / after * few.height)
    assert (gaps.filter(pl.col("finding") != "too few")["extra_rows"] == 0).all()
    filled = pl.concat([thin.select("carrier"), *(pl.DataFrame({"carrier": [r["stratum"]] * r["extra_rows"]}) for r in few.iter_rows(named=True))])
    assert (declared_gaps(filled, {"carrier": CARRIERS}).filter(pl.col("stratum").is_in(few["stratum"].implode()))["finding"] == "").all()


def test_what_production_never_sees_is_named_and_asks_for_no_rows() -> None:
    frame = pl.DataFrame({"c": ["a"] * 60 + ["b"] * 40 + ["z"] * 30})
    gaps = declared_gaps(frame, {"c": {"a": .6, "b": .4}})
    assert gaps.filter(stratum="z")["finding"].item() == "not in production" and gaps["extra_rows"].sum() == 0
    assert (declared_gaps(frame, {"c": {"a": .46, "b": .31, OTHER: .23}})["finding"] == "").all()


def test_ranges_of_numbers_hold_each_number_once() -> None:
    frame = pl.DataFrame({"x": [-1.0, 0.0, 9.99, 10.0, 25.0, None, 1e9]})
    assert strata_names(frame, "x", ["..0", "0..10", "10..1e3"]).to_list() == ["..0", "0..10", "0..10", "10..1e3", "10..1e3", None, "outside all ranges"]
    gaps = declared_gaps(pl.DataFrame({"x": np.linspace(0, 9, 500)}), {"x": {"..5": .5, "5..": .5}})
    assert gaps.filter(stratum="5..")["finding"].item() == "too few"


def test_a_column_whose_name_has_a_star_is_itself() -> None:
    assert strata_names(pl.DataFrame({"a*b": ["x"], "a": ["q"], "b": ["r"]}), "a*b", ["x"]).to_list() == ["x"]


@pytest.mark.parametrize(("wanted", "words"), [
    ({"carier": {"UA": 1.0}}, "carrier"), ({"carrier*orign": {"UA*EWR": 1.0}}, "orign"), ({"carrier": {"UA": .5}}, "add up to 0.5"),
    ({"carrier*origin": {"UA": 1.0}}, "does not name 2 values"), ({"carrier": {}}, "add up to 0"),
])
def test_a_declaration_that_cannot_be_is_refused_in_a_sentence(wanted: dict[str, dict[str, float]], words: str) -> None:
    with pytest.raises(InputError, match="data.target_distribution") as refusal:
        declared_gaps(sample(np.random.default_rng(1), 100), wanted)
    assert words in str(refusal.value)


def test_missing_values_and_a_sample_without_any_known_value() -> None:
    gaps = declared_gaps(pl.DataFrame({"c": pl.Series([None] * 50, dtype=pl.String)}), {"c": {"a": .5, "b": .5}})
    assert (gaps["rows"] == 0).all() and (gaps["finding"] == "").all()
