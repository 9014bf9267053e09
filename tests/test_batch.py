"""A file of any length: the same bits as online, a stop costs nothing, two machines do as one, and one of them may die."""
from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from ray_kit import two_nodes

import deploy_world as world
from pipeline.core import audit
from pipeline.core.errors import EnvironmentFault, InputError
from pipeline.data.contract import target_values
from pipeline.data.export import read_export, write_export
from pipeline.deploy import batch, cluster
from pipeline.deploy.batch import predict_file, stream_rows
from pipeline.deploy.handler import Service
from pipeline.deploy.package import KEY, Contents, load_package, release
from pipeline.deploy.predict import Predictor
from pipeline.deploy.schema import make_schema
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting

ROWS = 1000


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    place = tmp_path_factory.mktemp("packed")
    frame, contract = world.rows("binary", 600), world.contract("binary")
    model = train_model("trees", frame, target_values(frame, contract), contract, Fitting({"rounds": 10})).save(place / "model")
    contents = Contents(contract, make_schema(contract, frame).to_dict(), {"threshold": 0.4}, [], {}, "# tiny\n", {})
    return release(place / "store", place / "work", "tiny", model, contents), audit.public_key(place / "store", KEY)


@pytest.fixture(scope="module")
def predictor(packed: tuple[Path, Any]) -> Predictor:
    return load_package(*packed)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A thousand rows as parquet, csv, jsonl and a workbook, with columns that the model does not read."
    place = tmp_path_factory.mktemp("data")
    frame = world.rows("binary", ROWS, seed=4)
    frame.write_parquet(place / "in.parquet", row_group_size=300)
    frame.write_csv(place / "in.csv")
    frame.drop("__time", "__row").write_ndjson(place / "in.jsonl")
    write_export(frame.drop("__time", "__row"), place / "in.xlsx")
    return place


@pytest.fixture(autouse=True)
def of_the_run(packed: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.deploy.package.package_of", lambda run: packed)


@pytest.mark.parametrize(("kind", "out"), [("parquet", "csv"), ("parquet", "parquet"), ("parquet", "xlsx"), ("csv", "csv"), ("jsonl", "csv"), ("xlsx", "csv"), ("xlsx", "parquet")])
def test_in_parts_or_whole_the_answers_are_the_same_bits_as_online(kind: str, out: str, data: Path, predictor: Predictor, tmp_path: Path) -> None:
    whole, parts = tmp_path / f"whole.{out}", tmp_path / f"parts.{out}"
    assert predict_file("run", data / f"in.{kind}", whole) == ROWS == predict_file("run", data / f"in.{kind}", parts, at_once=170)
    schema = {"prediction": pl.String, "p_false": pl.Float64, "p_true": pl.Float64}
    answers = read_export(parts, schema)
    assert answers.equals(read_export(whole, schema)) and (out != "csv" or whole.read_bytes() == parts.read_bytes())
    rows = pl.read_parquet(data / "in.parquet").select(predictor.schema.names).with_columns(pl.col("built").cast(pl.String)).to_dicts()
    status, _, said = Service(predictor).handle("POST", "/predict", {}, json.dumps({"rows": rows}).encode())
    online = json.loads(said)["predictions"]
    assert status == 200 and answers.rows() == [(row["prediction"], row["p"]["false"], row["p"]["true"]) for row in online]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"parts.{out}", f"whole.{out}"]        # no part, no lock is left


def test_no_more_than_two_parts_are_held(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "What is read is answered and put away before the next part but one is read."
    events: list[str] = []

    def seen(*given: Any) -> Iterator[Any]:
        for part in stream_rows(*given):
            events.append(f"read {part.number}")
            yield part

    monkeypatch.setattr(batch, "stream_rows", seen)
    predict_file("run", data / "in.parquet", tmp_path / "out.csv", at_once=200, tell=lambda rows: events.append(f"done {rows // 200 - 1}"))
    assert events == ["read 0", "read 1", "done 0", "done 1", *(word for i in (2, 3, 4) for word in (f"read {i}", f"done {i}"))]


def test_a_stopped_batch_goes_on_and_another_one_begins_anew(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered: list[int] = []
    real = cluster.answer_rows

    def counted(predictor: Predictor, rows: pl.DataFrame, start: int = 0, beside: Sequence[str] = ()) -> pl.DataFrame:
        if len(answered) == 3:
            raise KeyboardInterrupt
        answered.append(start)
        return real(predictor, rows, start)

    copy = tmp_path / "in.parquet"
    copy.write_bytes((data / "in.parquet").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(batch, "answer_rows", counted)
        with pytest.raises(KeyboardInterrupt):
            predict_file("run", copy, tmp_path / "out.csv", at_once=200)
        assert not (tmp_path / "out.csv").exists() and len(list((tmp_path / ".out.csv.parts").glob("*.parquet"))) == 3
        answered[:] = [-1]
        assert predict_file("run", copy, tmp_path / "out.csv", at_once=200) == ROWS
        assert answered == [-1, 600, 800]
        answered.clear()
        with pytest.raises(KeyboardInterrupt):
            predict_file("run", copy, tmp_path / "new.csv", at_once=200)
    pl.read_parquet(copy).reverse().write_parquet(copy)
    assert predict_file("run", copy, tmp_path / "new.csv", at_once=200) == ROWS       # the parts of the other file are not taken
    assert (tmp_path / "new.csv").read_text().splitlines()[1:] == (tmp_path / "out.csv").read_text().splitlines()[:0:-1]
    with monkeypatch.context() as patch:
        patch.setattr(batch, "answer_rows", counted)
        answered.clear()
        with pytest.raises(KeyboardInterrupt):
            predict_file("run", copy, tmp_path / "why.parquet", at_once=200)
    assert predict_file("run", copy, tmp_path / "why.parquet", at_once=200, beside=["explain"]) == ROWS      # nor parts that say less
    assert pl.read_parquet(tmp_path / "why.parquet")["added_hour"].null_count() == 0


KILLED = """
import sys, time
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
import pipeline.deploy.package as package
package.package_of = lambda run: (Path(sys.argv[1]), Ed25519PublicKey.from_public_bytes(bytes.fromhex(sys.argv[2])))
from pipeline.deploy.batch import predict_file
predict_file("run", sys.argv[3], sys.argv[4], at_once=50, tell=lambda rows: (print(rows, flush=True), time.sleep(0.2)))
"""


def test_kill_9_leaves_no_output_and_loses_no_part(packed: tuple[Path, Any], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    worker = subprocess.Popen([sys.executable, "-c", KILLED, str(packed[0]), packed[1].public_bytes_raw().hex(), str(data / "in.csv"), str(out)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout and worker.stdout.readline() == "50\n" and worker.stdout.readline() == "100\n"
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    worker.stdout.close()
    assert not out.exists() and len(list((tmp_path / ".out.csv.parts").glob("*.parquet"))) >= 2
    assert predict_file("run", data / "in.csv", out, at_once=50) == ROWS == predict_file("run", data / "in.csv", tmp_path / "whole.csv")
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_what_is_wrong_is_said_with_its_place(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (data / "in.csv").read_text().splitlines()
    place = lines[0].split(",").index("seats")
    cells = lines[701].split(",")
    (tmp_path / "odd.csv").write_text("\n".join([*lines[:701], ",".join([*cells[:place], "many", *cells[place + 1:]]), *lines[702:]]) + "\n")
    with pytest.raises(InputError, match="after row 600, counted from there: column 'seats', row 101: 'many' is not a number"):
        predict_file("run", tmp_path / "odd.csv", tmp_path / "out.csv", at_once=200)
    (tmp_path / "cut.csv").write_text("\n".join([*lines[:701], lines[701] + ",too,many"]) + "\n")
    with pytest.raises(InputError, match=r"cut\.csv cannot be read as csv"):
        predict_file("run", tmp_path / "cut.csv", tmp_path / "out.csv", at_once=200)
    pl.read_parquet(data / "in.parquet").rename({"seats": "seat"}).write_parquet(tmp_path / "named.parquet")
    with pytest.raises(InputError, match="column 'seats' is not in the data; did you mean 'seat'"):
        predict_file("run", tmp_path / "named.parquet", tmp_path / "out.csv", at_once=200)
    with pytest.raises(InputError, match="--with 'sets': the package of tiny cannot tell this; it can tell explain beside its answers"):
        predict_file("run", data / "in.csv", tmp_path / "out.csv", beside=["sets"])
    with pytest.raises(InputError, match="--with 'explian': the package of tiny cannot tell this; did you mean 'explain'"):
        predict_file("run", data / "in.csv", tmp_path / "out.csv", beside=["explian"])
    with pytest.raises(InputError, match="'dask' is unknown"):
        predict_file("run", data / "in.csv", tmp_path / "out.csv", engine="dask")
    monkeypatch.setattr(batch, "SHEET_ROWS", 500)
    with pytest.raises(InputError, match="1,000 rows are more than a sheet holds"):
        predict_file("run", data / "in.csv", tmp_path / "out.xlsx", at_once=200)
    assert not (tmp_path / "out.csv").exists() and not (tmp_path / "out.xlsx").exists()


def test_without_ray_or_a_cluster_one_sentence(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        with pytest.raises(EnvironmentFault, match="Ray, which is not installed"):
            predict_file("run", data / "in.csv", tmp_path / "out.csv", engine="ray")
    pytest.importorskip("ray")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(EnvironmentFault, match=f"no Ray cluster answers at {address}: .*refused"):
            predict_file("run", data / "in.csv", tmp_path / "out.csv", engine="ray", address=address)


def test_two_nodes_answer_the_same_bits_and_one_may_die(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A real cluster of two nodes; the second one is killed while it works, and what it had is answered by the first."
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    pytest.importorskip("ray")
    nodes, second = two_nodes()
    try:
        told: list[int] = []

        def tell(rows: int) -> None:
            told.append(rows)
            if len(told) == 5:
                nodes.remove_node(second, allow_graceful=False)

        assert predict_file("run", data / "in.parquet", tmp_path / "ray.csv", engine="ray", address=nodes.address, tell=tell, at_once=40, beside=["explain"]) == ROWS
        assert len(told) == 25
        with pytest.raises(InputError, match="after row 40, counted from there: column 'seats', row 1"):     # what a worker says reaches the caller
            broken = pl.read_csv(data / "in.csv", infer_schema=False).with_row_index().with_columns(seats=pl.when(pl.col("index") >= 40).then(pl.lit("many")).otherwise("seats")).head(60)
            broken.drop("index").write_csv(tmp_path / "odd.csv")
            predict_file("run", tmp_path / "odd.csv", tmp_path / "odd-out.csv", engine="ray", address=nodes.address, at_once=40)
    finally:
        nodes.shutdown()
    predict_file("run", data / "in.parquet", tmp_path / "local.csv", beside=["explain"])
    assert (tmp_path / "ray.csv").read_bytes() == (tmp_path / "local.csv").read_bytes()
