"""The task file of the label phase, imported into a real Label Studio server, answered there, and read back."""
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.label.consensus import majority
from pipeline.label.studio import build_tasks, labelling_config, read_answers, validate_tasks
from servers.label_studio import Server, Unavailable, serve

CONTRACT: dict[str, Any] = {
    "target": "late", "task": "binary", "classes": ["false", "true"], "features": ["carrier", "distance", "name", "note"],
    "columns": [{"name": "carrier", "type": "category"}, {"name": "distance", "type": "number"}, {"name": "name", "type": "text", "pii": True},
                {"name": "note", "type": "text"}],
}
NOTES = ["<script>alert(1)</script>", "=HYPERLINK(\"http://x\")", "ü – 東京 🛫", None, "a\nb\t\"c\""]
ROWS = pl.DataFrame({"__row": [11, 4, 7, 900_000_000_001, 2], "carrier": ["UA", None, "B6", "EV", "9E"], "distance": [1400.5, float("nan"), 200.0, 719.0, 0.0],
                     "name": ["Ann", "Bob", "Cem", "Dee", "Eve"], "note": NOTES})
QUEUE = pl.DataFrame({"rank": [1, 2, 3, 4, 5], "__row": [7, 11, 4, 2, 900_000_000_001], "kind": ["suspect", "hard", "unlabelled", "hard", "suspect"],
                      "guess": ["true", "false", "true", "true", "false"], "p_guess": [0.9, 0.6, 0.7, 0.55, 0.8]})


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    try:
        context = serve()
        running = context.__enter__()
    except Unavailable as reason:
        pytest.skip(str(reason))
    try:
        yield running
    finally:
        context.__exit__(None, None, None)


@pytest.fixture(scope="module")
def studio(server: Server) -> Any:
    from label_studio_sdk import LabelStudio

    return LabelStudio(base_url=server.url, api_key=server.token)


def export_of(studio: Any, project: int) -> list[dict[str, Any]]:
    return studio.projects.exports.as_json(project)


@pytest.mark.slow
def test_the_task_file_is_imported_answered_and_read_back(studio: Any) -> None:
    config, tasks = labelling_config(CONTRACT, "Was it late?"), build_tasks(QUEUE, ROWS, CONTRACT, version="0a1b", show_guess=True)
    validate_tasks(config, tasks)
    text = json.dumps(tasks, allow_nan=False)                    # what stands in the file
    project = studio.projects.create(title="late flights", label_config=config)
    ids = studio.projects.import_tasks(id=project.id, request=json.loads(text), return_task_ids=True).task_ids
    assert len(ids) == len(tasks)

    stored = {t.data["__row"]: t for t in (studio.tasks.get(id=i) for i in ids)}
    assert set(stored) == set(QUEUE["__row"])
    for task in tasks:
        there = stored[task["data"]["__row"]]
        assert there.data == task["data"] and there.meta == task["meta"]
        assert "name" not in there.data["row"]
        assert dict(there.predictions[0])["result"][0]["value"] == task["predictions"][0]["result"][0]["value"]

    for row, said in ((7, "false"), (11, "true")):
        studio.annotations.create(id=stored[row].id, result=[{"from_name": "label", "to_name": "row", "type": "choices", "value": {"choices": [said]}}])
    studio.annotations.create(id=stored[4].id, result=[{"from_name": "doubt", "to_name": "row", "type": "choices", "value": {"choices": ["cannot be told from this"]}}])
    answers = read_answers(export_of(studio, project.id))
    assert dict(answers.select("__row", "label").iter_rows()) == {7: "false", 11: "true"}
    assert answers["at"].null_count() == 0 and answers["annotator"].n_unique() == 1
    assert majority(answers)["label"].to_list() == ["false", "true"]


@pytest.mark.slow
def test_numbers_are_asked_for_and_read_back(studio: Any) -> None:
    contract = CONTRACT | {"target": "delay", "task": "regression", "classes": []}
    config, tasks = labelling_config(contract), build_tasks(QUEUE, ROWS, contract)
    project = studio.projects.create(title="delays", label_config=config)
    ids = studio.projects.import_tasks(id=project.id, request=tasks, return_task_ids=True).task_ids
    studio.annotations.create(id=ids[0], result=[{"from_name": "label", "to_name": "row", "type": "number", "value": {"number": 12.5}}])
    assert read_answers(export_of(studio, project.id))["label"].to_list() == ["12.5"]


@pytest.mark.slow
def test_class_names_that_look_like_markup_stay_names(studio: Any) -> None:
    classes = ['a"/><Style>x</Style>', "b & <script>", "ü"]
    config = labelling_config(CONTRACT | {"task": "multiclass", "classes": classes})
    project = studio.projects.create(title="odd names", label_config=config)
    assert studio.projects.get(id=project.id).parsed_label_config["label"]["labels"] == classes


@pytest.mark.slow
def test_nothing_of_the_server_is_left_when_it_is_stopped(server: Server) -> None:
    "A second server over a copy of the same template, stopped: its port is free and its process group gone."
    with serve() as other:
        port = int(other.url.rsplit(":", 1)[1])
        assert other.url != server.url
        os.killpg(other.group, 0)
    with pytest.raises(ProcessLookupError):
        os.killpg(other.group, 0)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_switched_off_it_says_so() -> None:
    code = "from servers.label_studio import install, Unavailable\ntry:\n    install()\nexcept Unavailable as e:\n    print(e)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env=os.environ | {"PILOTHOUSE_LABEL_STUDIO": "0"}, capture_output=True, text=True)
    assert "PILOTHOUSE_LABEL_STUDIO=0" in done.stdout
