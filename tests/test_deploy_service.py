"""What callers send, good and bad: every answer is right or a 4xx that names the field."""
from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deploy_world as world
from pipeline.core.errors import InputError, IntegrityError
from pipeline.data.contract import target_values
from pipeline.deploy.batch import predict_all, read_rows, write_rows
from pipeline.deploy.predict import Predictor
from pipeline.deploy.frames import check_frame
from pipeline.deploy.schema import Schema, make_schema
from pipeline.deploy.handler import OPEN, Service
from pipeline.deploy.requests import Limits
from pipeline.deploy.service import check_binding, read_secret
from pipeline.deploy.staging import answers_frame, as_rows, compare
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting

GOOD = {"hour": 9.5, "seats": 180, "carrier": "UA", "built": "2004-05-06", "rain": False}


def predictor(task: str, family: str = "trees") -> Predictor:
    frame, contract = world.rows(task, 1500), world.contract(task)
    about = {"residual": 9.0} if task == "regression" else {}
    model = train_model(
        family,
        frame,
        target_values(frame, contract),
        contract,
        Fitting({"rounds": 20} if family == "trees" else {}),
        about=about,
    )
    return Predictor(model, make_schema(contract, frame), 0.4 if task == "binary" else None, "tiny", 3, "d")


@pytest.fixture(scope="module")
def service() -> Service:
    return Service(predictor("binary"))


def ask(service: Service, body: bytes | str, **headers: str) -> tuple[int, dict[str, Any]]:
    status, _, out = service.handle("POST", "/predict", headers, body.encode() if isinstance(body, str) else body)
    return status, json.loads(out)


def test_a_good_row_is_answered(service: Service) -> None:
    status, answer = ask(service, json.dumps({"rows": [GOOD]}), **{"x-request-id": "abc-1"})
    assert status == 200 and set(answer) == {"model", "version", "request_id", "predictions"}
    assert (answer["model"], answer["version"], answer["request_id"]) == ("tiny", 3, "abc-1")
    found = answer["predictions"][0]
    assert found["prediction"] in ("false", "true") and abs(sum(found["p"].values()) - 1) < 1e-12 and set(found["p"]) == {"false", "true"}


@pytest.mark.parametrize(
    "change, field",
    [
        ({"hour": "NaN"}, "hour"),
        ({"hour": "9"}, "hour"),
        ({"hour": True}, "hour"),
        ({"hour": []}, "hour"),
        ({"hour": {}}, "hour"),
        ({"hour": 1e9}, "hour"),
        ({"hour": -4.0}, "hour"),
        ({"seats": 180.5}, "seats"),
        ({"seats": 10**30}, "seats"),
        ({"seats": None}, "seats"),
        ({"seats": "many"}, "seats"),
        ({"carrier": "ZZ"}, "carrier"),
        ({"carrier": 7}, "carrier"),
        ({"carrier": ["UA"]}, "carrier"),
        ({"carrier": None}, "carrier"),
        ({"carrier": "ua"}, "carrier"),
        ({"carrier": "U" * 200_000}, "carrier"),
        ({"built": "yesterday"}, "built"),
        ({"built": 20040506}, "built"),
        ({"built": "2004-13-01"}, "built"),
        ({"rain": "no"}, "rain"),
        ({"rain": 2}, "rain"),
        ({"colour": 1}, "colour"),
        ({"": 1}, ""),
        ({"Hour": 9.5}, "Hour"),
    ],
)
def test_a_bad_value_is_refused_by_name(service: Service, change: dict[str, Any], field: str) -> None:
    status, problem = ask(service, json.dumps({"rows": [GOOD, {**GOOD, **change}]}))
    assert status == 422 and problem["status"] == 422 and problem["type"].startswith("urn:pilothouse:problem:")
    assert [(e["row"], e["field"]) for e in problem["errors"]] == [(1, field)]
    assert len(json.dumps(problem)) < 3000


@pytest.mark.parametrize("name", list(GOOD))
def test_a_missing_column_is_refused_by_name(service: Service, name: str) -> None:
    status, problem = ask(service, json.dumps({"rows": [{k: v for k, v in GOOD.items() if k != name}]}))
    assert status == 422 and problem["errors"] == [e for e in problem["errors"] if e["field"] == name] and len(problem["errors"]) == 1


@pytest.mark.parametrize(
    "body, status",
    [
        (b"", 400),
        (b"{", 400),
        (b"null", 422),
        (b"[]", 422),
        (b'"x"', 422),
        (b'{"rows": 3}', 422),
        (b'{"rows": []}', 422),
        (b'{"rows": [[1]]}', 422),
        (b'{"rows": [null]}', 422),
        (b"[" * 1_000_000, 400),
        (b'{"rows": [' * 1000, 400),
        (b'{"a":' * 100_000, 400),
        (b"\xff\xfe\x00", 400),
        (b'{"rows": [{"hour": 1e999}]}', 400),
        (b'{"rows": [{"hour": "\\ud800"}]}', 400),
        (b'{"rows": [{}], "more": 1}', 422),
        (b'{"rows": [{"hour": NaN}]}', 422),
        (b'{"rows": [{"hour": -Infinity}]}', 422),
    ],
)
def test_a_bad_body_is_refused(service: Service, body: bytes, status: int) -> None:
    found, problem = ask(service, body)
    assert found in ({400, 422} if status == 400 else {status}) and problem["detail"]


def test_nan_is_named_where_it_stands(service: Service) -> None:
    body = json.dumps({"rows": [GOOD, {**GOOD, "hour": float("nan")}]})
    assert [(e["row"], e["field"], e["value"]) for e in ask(service, body)[1]["errors"]] == [(1, "hour", "NaN")]


def test_size_and_rows_are_limited(service: Service) -> None:
    small = Service(service.predictor, limits=Limits(body_bytes=1000, rows=3))
    assert ask(small, json.dumps({"rows": [GOOD] * 4}))[0] == 413 and ask(small, b" " * 1001)[0] == 413
    assert "1,000 bytes" in ask(small, b" " * 1001)[1]["detail"]


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=20),
    st.sampled_from(["UA", "B6", "日航", "2004-05-06", "NaN", "1e5", "' OR 1=1", "=cmd()", "\x00", "\u202e"]),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.sampled_from([*GOOD, "late", "__row", "nope"]), values, max_size=7), max_size=3), st.booleans())
def test_no_body_is_ever_a_fault_of_ours(service: Service, rows: list[dict[str, Any]], lenient: bool) -> None:
    full = [{**GOOD, **row} for row in rows]
    status, answer = ask(service, json.dumps({"rows": full}), prefer="handling=lenient" if lenient else "")
    assert status in (200, 422), answer
    if status == 200:
        assert len(answer["predictions"]) == len(full)
    elif full:
        assert answer["errors"] and all(e["field"] in full[e["row"]] for e in answer["errors"])


def test_mutated_bytes_are_never_a_fault_of_ours(service: Service) -> None:
    chance = random.Random(7)
    for _ in range(300):
        body = bytearray(json.dumps({"rows": [GOOD]}, ensure_ascii=False).encode())
        for _ in range(chance.randint(1, 6)):
            place = chance.randrange(len(body))
            body[place : place + chance.randint(0, 3)] = chance.choice(
                [b"", bytes([chance.randrange(256)]), chance.choice(string.printable).encode()]
            )
        assert ask(service, bytes(body))[0] in (200, 400, 422)


def test_columns_are_read_by_name(service: Service) -> None:
    turned = dict(reversed(GOOD.items()))
    assert ask(service, json.dumps({"rows": [turned]}))[1]["predictions"] == ask(service, json.dumps({"rows": [GOOD]}))[1]["predictions"]


def test_what_training_never_saw_is_answered_leniently_and_named(service: Service) -> None:
    status, answer = ask(service, json.dumps({"rows": [{**GOOD, "carrier": "ZZ", "late": "true", "nope": 1}]}), prefer="handling=lenient")
    assert status == 200 and {w["field"] for w in answer["warnings"]} == {"carrier", "late", "nope"}
    assert b'pilothouse_warnings_total{field="carrier"}' in service.handle("GET", "/metrics", {})[2]


def test_every_route_but_health_asks_for_the_token(service: Service) -> None:
    guarded = Service(service.predictor, token="0123456789abcdef")
    for method, path in guarded.routes:
        assert (guarded.handle(method, path, {})[0] == 401) == (path not in OPEN)
        assert guarded.handle(method, path, {"authorization": "Bearer 0123456789abcdeX"})[0] == (200 if path in OPEN else 401)
        assert guarded.handle(method, path, {"authorization": "Bearer 0123456789abcdef"})[0] != 401


def test_it_listens_to_others_only_with_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(IntegrityError, match="without a token"):
            check_binding(host, None)
    with pytest.raises(IntegrityError, match="at least 16"):
        check_binding("0.0.0.0", "short")
    monkeypatch.setenv("SERVICE_TOKEN", "0123456789abcdef")
    assert read_secret("env:SERVICE_TOKEN") == "0123456789abcdef"
    with pytest.raises(InputError, match="env:NAME"):
        read_secret("0123456789abcdef")


def test_the_request_log_holds_no_inputs(service: Service) -> None:
    records: list[dict[str, Any]] = []
    logged = Service(service.predictor, log=records.append)
    ask(logged, json.dumps({"rows": [{**GOOD, "carrier": "secret-carrier"}]}))
    assert len(records) == 1 and records[0]["status"] == 422 and "secret-carrier" not in json.dumps(records)


def test_openapi_describes_what_is_accepted(service: Service) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    document = json.loads(service.handle("GET", "/openapi.json", {})[2])
    schema = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    jsonschema.validate({"rows": [GOOD]}, schema)
    for bad in ({"hour": "9"}, {"carrier": "ZZ"}, {"seats": 1.5}, {"nope": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"rows": [{**GOOD, **bad}]}, schema)
        assert ask(service, json.dumps({"rows": [{**GOOD, **bad}]}))[0] == 422


@pytest.mark.parametrize(
    "task, family",
    [
        ("binary", "trees"),
        ("multiclass", "trees"),
        ("regression", "trees"),
        ("binary", "linear"),
        ("multiclass", "linear"),
        ("regression", "linear"),
    ],
)
def test_batch_equals_online_bit_for_bit(task: str, family: str, tmp_path: Path) -> None:
    made = predictor(task, family)
    frame, service = world.rows(task, 1000, seed=9), Service(made)
    rows = as_rows(frame, made.schema.names)
    batch = made.predict(frame)
    for chunk in (1, 7, 1000):
        part = rows if chunk > 1 else rows[:100]
        answers = [
            a
            for i in range(0, len(part), chunk)
            for a in ask(service, json.dumps({"rows": part[i : i + chunk]}), prefer="handling=lenient")[1][
                "predictions"
            ]
        ]
        assert compare(batch.head(len(part)), answers_frame(answers), 0).equal
    for suffix in ("csv", "parquet"):
        write_rows(frame.drop("late"), tmp_path / f"in.{suffix}")
        assert predict_all(made, read_rows(tmp_path / f"in.{suffix}")).equals(batch)


def test_a_batch_names_the_column_and_the_row_at_fault() -> None:
    made = predictor("binary")
    frame = world.rows("binary", 20).with_columns(pl.col("seats").cast(pl.String))
    with pytest.raises(InputError, match=r"'seats', row 4: 'lots' is not a number"):
        made.predict(frame.with_columns(seats=frame["seats"].scatter(3, "lots")))
    with pytest.raises(InputError, match="'hour' is not in the data; did you mean 'hours'"):
        made.predict(frame.rename({"hour": "hours"}))
    assert len(made.predict(frame.with_columns(carrier=pl.lit("ZZ"), hour=pl.lit(1e6)))) == 20


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False, width=64)), min_size=1, max_size=20))
def test_numbers_survive_csv_and_json(numbers: list[float | None]) -> None:
    schema = Schema.from_dict(
        make_schema(
            {
                "target": "y",
                "features": ["x"],
                "columns": [{"name": "x", "type": "number", "dtype": "Float64", "nullable": True}],
            }
        ).to_dict()
    )
    frame = pl.DataFrame({"x": pl.Series(numbers, dtype=pl.Float64)})
    assert [row["x"] for row in json.loads(json.dumps(as_rows(frame, ["x"])))] == numbers
    text = frame.select(pl.col("x").map_elements(repr, return_dtype=pl.String))
    assert np.array_equal(check_frame(text, schema)["x"].fill_null(0).to_numpy(), frame["x"].fill_null(0).to_numpy())
