"""What callers send, good and bad: every answer is right or a 4xx that names the field."""
from __future__ import annotations

import dataclasses
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
from serving_kit import in_a_table, in_tensors, tensors_of
from pipeline.core.errors import EnvironmentFault, InputError, IntegrityError
from pipeline.data.contract import target_values
from pipeline.deploy.answers import LARGE, answerer_of
from pipeline.deploy.batch import predict_all, read_rows, write_rows
from pipeline.deploy.predict import Predictor
from pipeline.deploy.frames import check_frame
from pipeline.deploy.schema import Schema, make_schema
from pipeline.deploy.handler import OPEN, Service
from pipeline.deploy.requests import Limits
from pipeline.deploy.service import check_binding, read_secret
from pipeline.deploy.staging import answers_frame, as_rows, compare
from pipeline.deploy.versions import Plan, Served, Traffic
from pipeline.evaluate.group_thresholds import Cut, GroupRule
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting
from pipeline.train.reweighing import Grouping

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


def test_too_many_rows_are_refused_before_they_are_read(service: Service) -> None:
    "A large body that is wrong from its first row on: what is said is that it is too long; a small one's faults are named."
    wrong = {**GOOD, next(iter(GOOD)): ["no", "such", "value"]}
    many = json.dumps({"rows": [wrong] * 10_001}).encode()
    assert len(many) > LARGE
    status, _, out = service.handle("POST", "/predict", {}, many)
    assert status == 413 and "10,001 rows were sent" in json.loads(out)["detail"]
    assert service.handle("POST", "/predict", {}, json.dumps({"rows": [wrong]}).encode())[0] == 422
    assert service.handle("POST", "/predict", {}, many[:-1])[0] == 400 and service.handle("POST", "/predict", {}, json.dumps([wrong] * 10_001).encode())[0] == 422


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
    records: list[Any] = []
    logged = Service(service.predictor, log=records.append)
    ask(logged, json.dumps({"rows": [{**GOOD, "carrier": "secret-carrier"}]}))
    assert len(records) == 1 and records[0].status == 422 and "secret-carrier" not in str(records)


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


@pytest.mark.parametrize("suffix", ["csv", "parquet", "xlsx"])
def test_batch_equals_online_with_texts_and_cuts_by_group(suffix: str, tmp_path: Path) -> None:
    "A lottery between two cuts decides alike, whoever asks, and in whatever company."
    chance = random.Random(4)

    def told(frame: pl.DataFrame) -> pl.DataFrame:
        words = ["late", "fog", "日航", "née", 'a "quoted", one', "line\nbreak"]
        return frame.with_columns(note=pl.Series([" ".join(chance.choices(words, k=chance.randrange(5))) or None for _ in range(frame.height)]))

    frame, contract = told(world.rows("binary", 900)), world.contract("binary")
    contract["columns"] = [*contract["columns"], {**contract["columns"][0], "name": "note", "type": "text", "dtype": "String", "min": None, "max": None}]
    contract |= {"features": [*contract["features"], "note"]} if "features" in contract else {}
    model = train_model("trees", frame, target_values(frame, contract), contract, Fitting({"rounds": 10}))
    rule = GroupRule(Grouping("carrier"), {"UA": Cut(.6, .3, .5), "B6": Cut(.4, .4)}, Cut(.5, .2, .3))
    made = Predictor(model, make_schema(contract, frame), 0.4, "tiny", 3, "d", rule=rule)
    asked = told(world.rows("binary", 300, seed=9))
    rows, batch = as_rows(asked, made.schema.names), made.predict(asked)
    assert "note" in made.schema.names and (batch["prediction"] == "true").to_list() != (batch["p_true"] >= .4).to_list()
    for chunk in (1, 300):
        parts = [ask(Service(made), json.dumps({"rows": rows[i:i + chunk]}))[1]["predictions"] for i in range(0, 300, chunk)]
        assert compare(batch, answers_frame([one for part in parts for one in part]), 0).equal
    write_rows(asked.select(made.schema.names), tmp_path / f"in.{suffix}")
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


# -- the quick way, other formats, several versions


def thorough(made: Predictor) -> Service:
    "A service without the quick way."
    service = Service(dataclasses.replace(made))
    answerer_of(service.predictor)._quick = None
    return service


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_the_quick_way_says_what_the_thorough_way_says(task: str) -> None:
    made = predictor(task)
    quick, slow = Service(made), thorough(made)
    rows = as_rows(world.rows(task, 300, seed=4), made.schema.names)
    chance = random.Random(3)
    odd = [None, True, 0, 1, -1.5, 180, 180.0, "UA", " UA ", "日航", "ZZ", "", "2004-05-06", "2004-05-06T10:00:00+02:00", 1e300, 2**53, 5, 23, 4.999999, "nan"]
    answered = 0
    for number in range(600):
        some = [dict(chance.choice(rows)) for _ in range(chance.choice([1, 1, 1, 2, 40]))]
        if number % 2:
            chance.choice(some)[chance.choice(list(GOOD))] = chance.choice(odd)
        body, headers = json.dumps({"rows": some}), {"x-request-id": "same", "prefer": "handling=lenient" if number % 3 else ""}
        first, second = ask(quick, body, **headers), ask(slow, body, **headers)
        assert first == second, body
        answered += first[0] == 200
    assert 300 < answered < 600


def test_a_table_is_answered_with_a_table(service: Service) -> None:
    import io

    import pyarrow as pa

    from pipeline.deploy.answers import ARROW

    made = service.predictor
    frame = world.rows("binary", 50, seed=5).select(made.schema.names)
    out = io.BytesIO()
    with pa.ipc.new_stream(out, frame.to_arrow().schema) as writer:
        writer.write_table(frame.to_arrow())
    status, headers, body = service.handle("POST", "/predict", {"content-type": ARROW, "prefer": "handling=lenient"}, out.getvalue())
    found = pa.ipc.open_stream(body).read_all()
    assert status == 200 and dict(headers)["content-type"] == ARROW and found.schema.metadata[b"version"] == b"3"
    assert pl.from_arrow(found).equals(made.predict(frame))    # type: ignore[union-attr]
    views = io.BytesIO()
    frame.write_ipc_stream(views)         # as polars writes by itself: texts as views
    assert pa.types.is_string_view(pa.ipc.open_stream(views.getvalue()).schema.field("carrier").type)
    status, _, again = service.handle("POST", "/predict", {"content-type": ARROW, "prefer": "handling=lenient"}, views.getvalue())
    assert status == 200 and pl.from_arrow(pa.ipc.open_stream(again).read_all()).equals(made.predict(frame))    # type: ignore[union-attr]
    bad = frame.to_arrow().set_column(0, "hour", pa.array(["late"] * 50))
    out = io.BytesIO()
    with pa.ipc.new_stream(out, bad.schema) as writer:
        writer.write_table(bad)
    status, _, body = service.handle("POST", "/predict", {"content-type": ARROW}, out.getvalue())
    assert status == 422 and json.loads(body)["errors"][0]["field"] == "hour"


def test_damaged_tables_are_never_a_fault_of_ours(service: Service) -> None:
    import io

    import pyarrow as pa

    from pipeline.deploy.answers import ARROW

    table = world.rows("binary", 5, seed=5).select(service.predictor.schema.names).to_arrow()
    out = io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    chance, whole = random.Random(5), out.getvalue()
    for _ in range(1500):
        body = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        if chance.random() < .2:
            del body[chance.randrange(len(body)):]
        assert service.handle("POST", "/predict", {"content-type": ARROW, "prefer": "handling=lenient"}, bytes(body))[0] in (200, 400, 413, 422)


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_contributions_add_up_to_the_score(task: str) -> None:
    made = predictor(task)
    service = Service(made)
    status, answer = ask(service, json.dumps({"rows": [GOOD, {**GOOD, "hour": 22.0}]}), prefer="explain")
    assert status == 200 and len(answer["explanations"]) == 2
    for told, found in zip(answer["explanations"], answer["predictions"]):
        assert set(told["contributions"]) == set(GOOD) and abs(told["base"] + sum(told["contributions"].values()) - told["score"]) < 1e-9
        if task == "binary":
            assert abs(1 / (1 + np.exp(-told["score"])) - found["p"]["true"]) < 1e-9 and told["of"] == "true"
        elif task == "regression":
            assert abs(told["score"] - found["prediction"]) < 1e-9
        else:
            assert told["of"] == found["prediction"]
    assert ask(service, json.dumps({"rows": [GOOD] * 101}), prefer="explain")[0] == 413
    assert "explanations" not in ask(service, json.dumps({"rows": [GOOD]}))[1]
    wanted = [{"explain_of": e["of"], "explain_score": e["score"], "explain_base": e["base"], **{f"added_{k}": v for k, v in e["contributions"].items()}} for e in answer["explanations"]]
    rows = pl.DataFrame([GOOD, {**GOOD, "hour": 22.0}])
    for columns, headers in (in_a_table(service, rows, "explain"), in_tensors(service, rows, "explain")):     # the same numbers in every form
        assert headers["preference-applied"] == "explain" and columns.drop(made.outputs).to_dicts() == wanted
        assert columns.select(made.outputs).equals(made.predict(rows))
    assert in_a_table(service, rows, "")[0].columns == made.outputs and service.handle("POST", "/v2/models/tiny/infer", {"prefer": "explain"}, tensors_of(made, [GOOD] * 101))[0] == 413


def test_the_documentation_page_needs_nothing_from_outside(service: Service) -> None:
    status, headers, body = service.handle("GET", "/docs", {})
    page = body.decode()
    assert status == 200 and "default-src 'none'" in dict(headers)["content-security-policy"]
    assert "<script" not in page and "http" not in page.replace("http://127.0.0.1:8000/predict", "") and all(name in page for name in GOOD)
    sent = json.loads(page.split("-d '")[1].split("' \\")[0].replace("&quot;", '"'))
    told = json.loads(page.split("It is answered with")[1].split("<code>")[1].split("</code>")[0].replace("&quot;", '"'))
    answered, answer = ask(service, json.dumps(sent))      # the example may be copied as it stands, and is answered so
    assert answered == 200 and told["predictions"] == answer["predictions"] and told.keys() == answer.keys()
    elsewhere = service.handle("GET", "/docs", {"host": "<b>:1"})[2].decode() + service.handle("GET", "/docs", {"host": "localhost:99"})[2].decode()
    assert "http://localhost:99/predict" in elsewhere and "<b>" not in elsewhere


def test_prometheus_reads_latency_and_predictions_by_version(service: Service) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    counted = Service(dataclasses.replace(service.predictor, expires="2027-01-31"))
    for rows in ([GOOD], [GOOD] * 3, [{**GOOD, "carrier": "ZZ"}]):
        ask(counted, json.dumps({"rows": rows}))
    families = {family.name: family for family in text_string_to_metric_families(counted.handle("GET", "/metrics", {})[2].decode())}
    found = {name: {s.name.rpartition("_")[2]: s.value for s in families[name].samples if s.labels.get("le", "+Inf") == "+Inf" and s.labels["version"] == "3"}
             for name in ("pilothouse_predict_seconds", "pilothouse_prediction")}
    assert found["pilothouse_predict_seconds"]["count"] == 3 == found["pilothouse_predict_seconds"]["bucket"] and found["pilothouse_prediction"]["count"] == 4
    assert {s.labels["status"]: s.value for s in families["pilothouse_answers"].samples} == {"200": 2, "422": 1, "500": 0}
    assert families["pilothouse_package_expires_timestamp_seconds"].samples[0].value == 1_801_440_000   # the first second of February


class Notes:
    "A recorder that keeps everything."

    def __init__(self) -> None:
        self.records: list[tuple[Any, ...]] = []

    def add(self, *record: Any) -> None:
        self.records.append(record)


@pytest.fixture(scope="module")
def two() -> tuple[Served, Served]:
    old = predictor("binary")
    return Served(old, "a" * 64), Served(dataclasses.replace(predictor("binary", "linear"), version=4), "b" * 64)


def test_each_request_is_answered_by_one_version(two: tuple[Served, Served]) -> None:
    traffic = Traffic(two[0], {"b" * 64: two[1]}.__getitem__)
    notes = Notes()
    service = Service(traffic, recorder=notes)
    plan = Plan("tiny", "a" * 64, "b" * 64, share=30.0, slice={"carrier": "UA"}, subject="tailnum", salt="t")
    assert traffic.apply(plan)
    expected = {served.version: [ask(Service(served.predictor), json.dumps({"rows": [{**GOOD, "carrier": c}]}))[1]["predictions"] for c in ("UA", "B6")] for served in two}
    seen: dict[str, int] = {}
    for number in range(400):
        tail, place = f"N{number % 80}", number % 2
        status, headers, out = service.handle("POST", "/predict", {}, json.dumps({"rows": [{**GOOD, "carrier": ("UA", "B6")[place], "tailnum": tail}]}).encode())
        answer = json.loads(out)
        assert status == 200 and dict(headers)["x-model-version"] == str(answer["version"]) and "warnings" not in answer
        assert answer["predictions"] == expected[answer["version"]][place]
        assert seen.setdefault(f"{tail}{place}", answer["version"]) == answer["version"]     # sticky
        assert place == 0 or answer["version"] == 3                                          # the slice alone
    share = sum(version == 4 for key, version in seen.items() if key.endswith("0")) / sum(key.endswith("0") for key in seen)
    assert .1 < share < .5
    mixed = json.dumps({"rows": [{**GOOD, "tailnum": t} for t in {k[:-1] for k in seen}]}).encode()
    assert json.loads(service.handle("POST", "/predict", {}, mixed)[2])["version"] == 3       # not every subject is on trial
    assert len(notes.records) == 401 and {(r[2], r[3]) for r in notes.records} == {(3, "live"), (4, "canary")}
    text = service.handle("GET", "/metrics", {})[2].decode()
    assert 'role="canary"' in text and f'pilothouse_rows_total{{version="4",role="canary"}} {sum(r[2] == 4 for r in notes.records)}' in text
    assert ask(service, json.dumps({"rows": [{**GOOD, "tailnum": "N1", "hour": "x"}]}))[0] == 422


def test_the_shadow_answers_behind_the_callers_back(two: tuple[Served, Served]) -> None:
    traffic = Traffic(two[0], {"b" * 64: two[1]}.__getitem__)
    notes = Notes()
    service = Service(traffic, recorder=notes)
    assert traffic.apply(Plan("tiny", "a" * 64, "b" * 64, shadow=True))
    for _ in range(20):
        assert ask(service, json.dumps({"rows": [GOOD]}))[1]["version"] == 3
    service.close()
    told = [json.loads(r[7]) for r in notes.records if r[3] == "shadow"]
    assert len(told) == 20 == sum(r[3] == "live" for r in notes.records) and all(answer["version"] == 4 for answer in told)
    assert {r[1] for r in notes.records if r[3] == "shadow"} == {r[1] for r in notes.records if r[3] == "live"}
    assert told[0]["predictions"] == ask(Service(two[1].predictor), json.dumps({"rows": [GOOD]}))[1]["predictions"]


def test_requests_in_flight_keep_their_version_through_swaps(two: tuple[Served, Served]) -> None:
    import threading

    traffic = Traffic(two[0], {"a" * 64: two[0], "b" * 64: two[1]}.__getitem__)
    service, body = Service(traffic), json.dumps({"rows": [GOOD]}).encode()
    expected = {served.version: json.loads(Service(served.predictor).handle("POST", "/predict", {}, body)[2])["predictions"] for served in two}
    ended, wrong = threading.Event(), []

    def swap() -> None:
        for number in range(200):
            traffic.apply(Plan("tiny", ("a", "b")[number % 2] * 64, revision=number + 1))
        ended.set()

    worker = threading.Thread(target=swap)
    worker.start()
    asked = 0
    while not ended.is_set() or asked < 200:
        answer = json.loads(service.handle("POST", "/predict", {}, body)[2])
        asked += 1
        if answer["predictions"] != expected.get(answer["version"]):
            wrong.append(answer)
    worker.join()
    assert not wrong and asked >= 200


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device", "/srv/store/spool"), EnvironmentFault("database /srv/store/registry.db is away")])
def test_what_cannot_be_kept_now_may_be_sent_again_later(service: Service, fault: Exception) -> None:
    "A full disk is no fault of the program: 503 with Retry-After, nothing of the machine told, the fault in the log."
    def take(_: Any) -> int:
        raise fault
    logged: list[Any] = []
    told = Service(service.predictor, outcomes=take, log=logged.append)
    status, headers, body = told.handle("POST", "/outcomes", {}, b'{"outcomes": [{"request_id": "abc", "row": 0, "value": "true"}]}')
    assert status == 503 and dict(headers)["retry-after"] == "5" and "sent again later" in json.loads(body)["detail"] and b"/srv" not in body
    assert any(type(fault).__name__ in str(one) for one in logged)


def test_late_outcomes_are_handed_over(service: Service) -> None:
    taken: list[Any] = []

    def take(outcomes: Any) -> int:
        if not isinstance(outcomes, list):
            raise InputError("outcomes is no list")
        taken.extend(outcomes)
        return len(outcomes)

    told = Service(service.predictor, outcomes=take)
    sent = {"outcomes": [{"request_id": "abc", "row": 0, "value": "true"}]}
    assert told.handle("POST", "/outcomes", {}, json.dumps(sent).encode())[::2] == (200, b'{"noted":1}') and taken == sent["outcomes"]
    for wrong in (b"[]", b'{"outcomes": 7}', b'{"outcomes": [], "more": 1}', b"{"):
        assert told.handle("POST", "/outcomes", {}, wrong)[0] in (400, 422)
    assert service.handle("POST", "/outcomes", {}, b"{}")[0] == 404


def test_a_client_of_the_inference_protocol_is_understood(service: Service) -> None:
    "Triton's own client, JSON and binary, against the handler behind the standard library's server."
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    httpclient = pytest.importorskip("tritonclient.http")

    class Carrier(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            status, headers, out = service.handle(self.command, self.path.partition("?")[0], {k.lower(): v for k, v in self.headers.items()}, body)
            self.send_response(status)
            for name, value in [*headers, ("content-length", str(len(out)))]:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(out)

        do_GET = do_POST = _any

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Carrier)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        client = httpclient.InferenceServerClient(f"127.0.0.1:{server.server_address[1]}")
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny") and client.get_server_metadata()["name"] == "pilothouse"
        kinds = {tensor["name"]: tensor["datatype"] for tensor in client.get_model_metadata("tiny")["inputs"]}
        rows = [GOOD, {**GOOD, "hour": 21.0, "carrier": "B6"}]
        numpy = {"FP64": np.float64, "INT64": np.int64, "BOOL": np.bool_, "BYTES": np.object_}
        for binary in (False, True):
            inputs = []
            for name, kind in kinds.items():
                values = np.array([row[name] for row in rows], dtype=numpy[kind])
                inputs.append(httpclient.InferInput(name, list(values.shape), kind))
                inputs[-1].set_data_from_numpy(values, binary_data=binary)
            outputs = [httpclient.InferRequestedOutput(name, binary_data=binary) for name in ("prediction", "p_true", "added_hour")]
            answer = client.infer("tiny", inputs, request_id="r-9", outputs=outputs, headers={"prefer": "explain"})
            assert answer.as_numpy("added_hour").shape == (2,)
            expected = service.predictor.predict_rows(rows).frame
            assert expected is not None and answer.as_numpy("p_true").tolist() == expected["p_true"].to_list()
            assert [str(v) for v in answer.as_numpy("prediction")] == expected["prediction"].to_list() and answer.get_response()["id"] == "r-9"
        with pytest.raises(Exception, match="rows refused|not known|hour"):
            client.infer("tiny", inputs[1:])
        with pytest.raises(httpclient.InferenceServerException, match="422. output 'added_hour' is not answered here.*Prefer: explain"):     # as the client's own error
            client.infer("tiny", inputs, outputs=outputs)
    finally:
        server.shutdown()
        server.server_close()


def _odd_json(chance: random.Random, depth: int = 0) -> Any:
    kind = chance.randrange(9 if depth < 4 else 6)
    if kind < 6:
        return [None, True, chance.uniform(-1e9, 1e9), chance.randint(-2**70, 2**70), chance.choice(["UA", "", "\u202e", "x" * 300, "2004-05-06", "NaN"]), chance.random() < .5][kind]
    if kind == 6:
        return [_odd_json(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {chance.choice([*GOOD, "rows", "inputs", "name", "data", "late", "", "\x00", "__row"]): _odd_json(chance, depth + 1) for _ in range(chance.randrange(5))}


def test_ten_thousand_odd_bodies_meet_no_fault_of_ours(service: Service) -> None:
    "JSON of any form, rows with odd values, tensors, and bytes that were hit: each is answered with 200 or a 4xx that explains itself."
    chance, fuzzed = random.Random(11), Service(service.predictor)
    good = json.dumps({"rows": [GOOD, GOOD]}).encode()
    tensors = [{"name": name, "shape": [1], "datatype": "FP64", "data": [value]} for name, value in GOOD.items()]
    statuses: dict[int, int] = {}
    for number in range(10_000):
        path, kind = "/predict", number % 5
        headers = {"prefer": chance.choice(["", "handling=lenient", "explain, sets", "handling=lenient, explain, targets"])} if number % 7 == 0 else {}
        if kind == 0:
            body = json.dumps(_odd_json(chance)).encode()
        elif kind == 1:
            body = json.dumps({"rows": [{**GOOD, chance.choice([*GOOD, "late", "nope"]): _odd_json(chance)} for _ in range(chance.randint(1, 3))]}).encode()
        elif kind == 2:
            hit = bytearray(good)
            for _ in range(chance.randint(1, 5)):
                hit[chance.randrange(len(hit))] = chance.randrange(256)
            body = bytes(hit)
        elif kind == 3:
            path = "/v2/models/tiny/infer"
            body = json.dumps({"inputs": [{**t, **({chance.choice(list(t)): _odd_json(chance)} if chance.random() < .3 else {})} for t in tensors]}).encode()
            headers |= {"inference-header-content-length": chance.choice(["", str(len(body)), "7", "-1", "x", "99999999"])} if chance.random() < .2 else {}
        else:
            body = chance.randbytes(chance.randrange(60)) if number % 2 else good[:chance.randrange(len(good))]
        status, _, out = fuzzed.handle("POST", path, headers, body)
        statuses[status] = statuses.get(status, 0) + 1
        assert status in (200, 400, 413, 422), (path, headers, body, out)
        if status != 200:
            assert json.loads(out)["detail"] and len(out) < 60_000
    assert statuses[200] > 300 and statuses[422] > 1000 and statuses[400] > 1000
