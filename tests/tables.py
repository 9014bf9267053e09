"""Tables that people bring: what must run, and what must be refused in one sentence. Used by the data tests and end to end."""
from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

Frame = Callable[[np.random.Generator], pl.DataFrame]


@dataclass(frozen=True)
class Runs:
    "A table that a problem can be made of."

    name: str
    target: str
    task: str                # what must be guessed
    frame: Frame
    suffix: str = "csv"
    split: str = "random"    # the rule that must be guessed
    slow: bool = False       # too large to train on in a quick test

    def write(self, folder: Path) -> Path:
        frame = self.frame(np.random.default_rng(11))
        path = folder / f"{self.name}.{self.suffix}"
        if self.suffix == "parquet":
            frame.write_parquet(path)
        else:
            frame.write_csv(path)
        return path


@dataclass(frozen=True)
class Refused:
    "A file that no problem can be made of, and words that the sentence must have."

    name: str
    target: str
    content: bytes | Frame
    words: tuple[str, ...]
    suffix: str = "csv"

    def write(self, folder: Path) -> Path:
        path = folder / f"{self.name}.{self.suffix}"
        if isinstance(self.content, bytes):
            path.write_bytes(self.content)
        else:
            frame = self.content(np.random.default_rng(11))
            frame.write_parquet(path) if self.suffix == "parquet" else frame.write_csv(path)
        return path


def people(rng: np.random.Generator, n: int) -> pl.DataFrame:
    "Numbers and categories that tell something, with gaps."
    return pl.DataFrame({
        "age": [None if rng.random() < .1 else int(a) for a in rng.integers(18, 80, n)],
        "income": np.round(rng.lognormal(10, .5, n), 2),
        "region": rng.choice(["north", "south", "east", "west"], n),
        "member": rng.random(n) < .4,
    })


def signal(frame: pl.DataFrame, rng: np.random.Generator) -> np.ndarray:
    "What the target of these tables follows, plus noise."
    income = np.log(frame["income"].to_numpy())
    return (income - income.mean()) * 2 + (frame["region"] == "north").to_numpy() + rng.normal(0, .7, frame.height)


def binary(rng: np.random.Generator, n: int = 600) -> pl.DataFrame:
    frame = people(rng, n)
    return frame.with_columns(churned=pl.Series(np.where(signal(frame, rng) > .5, "yes", "no")))


def multiclass(rng: np.random.Generator, n: int = 700) -> pl.DataFrame:
    frame = people(rng, n)
    return frame.with_columns(plan=pl.Series(np.array(["basic", "plus", "pro"])[np.digitize(signal(frame, rng), [-.3, 1.0])]))


def regression(rng: np.random.Generator, n: int = 600) -> pl.DataFrame:
    frame = people(rng, n)
    return frame.with_columns(price=pl.Series(np.round(100 + 20 * signal(frame, rng), 2)))


def dated(rng: np.random.Generator, n: int = 1_200) -> pl.DataFrame:
    frame = binary(rng, n)
    start = dt.datetime(2021, 1, 1)
    return frame.with_columns(ordered_at=pl.Series([start + dt.timedelta(hours=7 * i) for i in range(n)]),
                              born=pl.Series([dt.date(1950, 1, 1) + dt.timedelta(days=int(d)) for d in rng.integers(0, 18_000, n)]))


def unicode_names(rng: np.random.Generator) -> pl.DataFrame:
    frame = regression(rng)
    return frame.rename({"age": "größe, cm", "income": 'a{"b": [1]}', "region": "地域", "member": "🙂 member", "price": "цена €"}).with_columns(
        pl.Series("地域", rng.choice(["北", "南", "é", "a,b", 'q"q'], frame.height)))


def many_levels(rng: np.random.Generator) -> pl.DataFrame:
    frame = binary(rng, 800)
    return frame.with_columns(town=pl.Series([f"town {i}" for i in rng.integers(0, 500, 800)]), customer_id=pl.int_range(pl.len()) + 1000)


def wide(rng: np.random.Generator, n: int = 300, columns: int = 10_000) -> pl.DataFrame:
    values = rng.normal(size=(n, columns)).astype(np.float32)
    return pl.DataFrame(values, schema=[f"x{i}" for i in range(columns)]).with_columns(y=pl.Series((values[:, 0] + rng.normal(0, .3, n) > 0).astype(int)))


def mixed(rng: np.random.Generator) -> pl.DataFrame:
    frame = binary(rng)
    return frame.with_columns(
        pl.when(pl.int_range(pl.len()) % 50 == 0).then(pl.lit("n/a?")).otherwise(pl.col("income").cast(pl.String)).alias("income"),
        constant=pl.lit("DE"), nothing=pl.lit(None, dtype=pl.String), nearly=pl.when(pl.int_range(pl.len()) == 3).then(pl.lit("x")),
        review=pl.Series([" ".join(rng.choice(["good", "bad", "slow", "quick", "again", "never"], 9)) for _ in range(frame.height)]),
    )


def some_without_outcome(rng: np.random.Generator) -> pl.DataFrame:
    return binary(rng, 900).with_columns(churned=pl.when(pl.int_range(pl.len()) % 9 != 0).then(pl.col("churned")))


def ones_and_twos(rng: np.random.Generator) -> pl.DataFrame:
    return binary(rng).with_columns(churned=pl.when(pl.col("churned") == "yes").then(2).otherwise(1))


def doubled(rng: np.random.Generator) -> pl.DataFrame:
    frame = binary(rng, 600)
    return pl.concat([frame, frame.head(30)])


RUNS = [
    Runs("binary", "churned", "binary", binary),
    Runs("multiclass", "plan", "multiclass", multiclass),
    Runs("regression", "price", "regression", regression, suffix="parquet"),
    Runs("dated", "churned", "binary", dated, split="time"),
    Runs("dated_parquet", "churned", "binary", dated, suffix="parquet", split="time"),
    Runs("hundred", "churned", "binary", lambda rng: binary(rng, 100)),
    Runs("unicode", "цена €", "regression", unicode_names),
    Runs("many_levels", "churned", "binary", many_levels),
    Runs("mixed", "churned", "binary", mixed),
    Runs("without_outcome", "churned", "binary", some_without_outcome),
    Runs("ones_and_twos", "churned", "binary", ones_and_twos),
    Runs("doubled", "churned", "binary", doubled),
    Runs("wide", "y", "binary", wide, suffix="parquet", slow=True),
]

REFUSED = [
    Refused("empty", "y", b"", ("empty.csv is empty",)),
    Refused("blank", "y", b"\n\n  \n", ("blank.csv is empty",)),
    Refused("header_only", "y", b"x,y\n", ("no rows",)),
    Refused("no_target", "y", lambda rng: binary(rng), ("no column 'y'",)),
    Refused("misspelt_target", "churnd", lambda rng: binary(rng), ("did you mean 'churned'",)),
    Refused("twice", "y", b"x,y,x\n1,2,3\n", ("twice.csv:1", "'x'", "columns 1, 3")),
    Refused("cut", "y", b"x,y\n" + b"1,0\n2,1\n" * 40 + b"3", ("cut.csv:82", "1 cells where the header has 2")),
    Refused("ragged", "y", b"x,y\n1,0\n2,1,9\n", ("ragged.csv:3", "3 cells")),
    Refused("single_class", "y", b"x,y\n" + b"1,a\n2,a\n" * 40, ("one class only, 'a'",)),
    Refused("no_outcome", "y", b"x,y\n" + b"1,\n2,\n" * 40, ("missing in all 80 rows",)),
    Refused("nan_target", "y", b"x,y\n" + b"1,1.5\n2,NaN\n3,2.5\n4,0.1\n" * 30, ("NaN in 30 of 120 rows", "first rows 2, 6")),
    Refused("infinite_target", "y", lambda rng: regression(rng).rename({"price": "y"}).with_columns(
        pl.when(pl.int_range(pl.len()) == 4).then(float("inf")).otherwise(pl.col("y")).alias("y")), ("inf in 1 of 600 rows", "rows 5"), suffix="parquet"),
    Refused("all_null", "y", b"x,y\n" + b",0\n,1\n" * 40, ("no feature is left", "x: empty")),
    Refused("only_target", "y", b"y\n" + b"0\n1\n" * 40, ("no column beside the target",)),
    Refused("too_few", "y", b"x,y\n" + b"1,0\n2,1\n" * 5, ("10 rows", "at least 20")),
    Refused("hidden_sign", "y", "x\u202e,y\n1,0\n2,1\n".encode(), ("U+202E",)),
    Refused("twins", "y", "caf\u00e9,cafe\u0301,y\n1,2,0\n2,3,1\n".encode(), ("2 columns are named 'café'",)),
    Refused("zero_byte", "y", b"x,y\n1,0\n\x00,1\n", ("zero_byte.csv:3", "zero byte")),
    Refused("no_parquet", "y", b"PAR1 and then nothing", ("no whole parquet file",), suffix="parquet"),
    Refused("open_quote", "y", b'x,y\n1,0\n"2,1\n3,0\n', ("open_quote.csv:3", "never closed")),
    Refused("titled", "y", b"Sales of 2024;;\nx;y;z\n" + b"1;0;2\n2;1;3\n" * 40, ("names 1 of 3 columns", "a title stands above the table")),
    Refused("names_as_target", "y", b"x,y\n" + b"".join(b"%d,name%d\n" % (i, i) for i in range(80)), ("80 different texts",)),
]
