"""A package is whole and signed, or it is refused with the name of the file."""
from __future__ import annotations

import ast
import datetime as dt
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import deploy_world as world
from pipeline.core import audit
from pipeline.core.errors import InputError, IntegrityError
from pipeline.core.errors import EnvironmentFault
from pipeline.core.store import digest_bytes
from pipeline.deploy import first_load
from pipeline.deploy.first_load import check_loads, probe_package
from pipeline.deploy.package import KEY, MANIFEST, SIGNATURE, Contents, load_package, package_of, release, released, verify_package
from pipeline.deploy.sbom import SERVING, check_sbom, installed, make_sbom, read_lock, serving_lock
from pipeline.deploy.schema import make_schema
from pipeline.deploy.versions import Plan, Served, Traffic
from pipeline.data.contract import target_values
from pipeline.train.models import train_model
from pipeline.train.protocol import Fitting


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    "A store with one package."
    place = tmp_path_factory.mktemp("package")
    frame, contract = world.rows("binary", 300), world.contract("binary")
    train_model("trees", frame, target_values(frame, contract), contract, Fitting({"rounds": 5})).save(place / "model")
    return place, release(place / "store", place / "work", "tiny", place / "model", contents(contract))


def contents(contract: dict, text: str = "# tiny\n") -> Contents:
    return Contents(
        contract,
        make_schema(contract).to_dict(),
        {"threshold": 0.5},
        [],
        {"name": "tiny"},
        text,
        {"data_version": "d1"},
        "lock",
    )


@pytest.fixture
def copy(made: tuple[Path, Path], tmp_path: Path) -> Path:
    shutil.copytree(made[1], tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return tmp_path / "copy"


def test_a_whole_package_loads(made: tuple[Path, Path]) -> None:
    predictor = load_package(made[1], audit.public_key(made[0] / "store", KEY))
    assert predictor.version == 1 and len(predictor.predict(world.rows("binary", 10))) == 10


def test_any_flipped_byte_is_refused(made: tuple[Path, Path], copy: Path) -> None:
    key, chance = audit.public_key(made[0] / "store", KEY), random.Random(1)
    files = [p for p in copy.rglob("*") if p.is_file()]
    for number in range(60):
        path = files[number % len(files)]
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[chance.randrange(len(whole))] ^= 1 << chance.randrange(7)
        path.write_bytes(bytes(changed))
        with pytest.raises(IntegrityError, match=MANIFEST if path.name in (MANIFEST, SIGNATURE) else path.name):
            verify_package(copy, key)
        path.write_bytes(whole)
    verify_package(copy, key)


@pytest.mark.parametrize("share", [0, .1, .5, .99])
def test_a_truncated_file_is_refused(made: tuple[Path, Path], copy: Path, share: float) -> None:
    for path in [p for p in copy.rglob("*") if p.is_file()]:
        whole = path.read_bytes()
        os.truncate(path, int(len(whole) * share))
        with pytest.raises(IntegrityError):
            load_package(copy, audit.public_key(made[0] / "store", KEY))
        path.write_bytes(whole)


def test_strangers_links_and_other_keys_are_refused(made: tuple[Path, Path], copy: Path, tmp_path: Path) -> None:
    key = audit.public_key(made[0] / "store", KEY)
    (copy / "model" / "x.txt").write_text("x")
    with pytest.raises(IntegrityError, match="model/x.txt is not in the manifest"):
        verify_package(copy, key)
    (copy / "model" / "x.txt").unlink()
    (copy / "card.md").unlink()
    (copy / "card.md").symlink_to("card.json")
    with pytest.raises(IntegrityError, match="card.md is a link"):
        verify_package(copy, key)
    audit.signing_key(tmp_path / "other", KEY)
    with pytest.raises(IntegrityError, match="not signed by this store's key"):
        verify_package(made[1], audit.public_key(tmp_path / "other", KEY))


def test_a_schema_that_is_not_the_models_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    told = contents(world.contract("binary"), "# another\n")
    first, *others = told.schema["fields"]
    folder = release(tmp_path / "store", tmp_path / "work", "tiny", made[0] / "model", replace(told, schema={**told.schema, "fields": others}))
    with pytest.raises(IntegrityError, match=f"schema.json has no column {first['name']}, which the model reads"):
        load_package(folder, audit.public_key(tmp_path / "store", KEY))


def test_an_older_version_is_not_a_new_one(made: tuple[Path, Path]) -> None:
    with pytest.raises(IntegrityError, match="version 2 was live already"):
        load_package(made[1], audit.public_key(made[0] / "store", KEY), newest=2)


def test_releases_at_once_take_different_versions(tmp_path: Path, made: tuple[Path, Path]) -> None:
    code = """
import sys, json
from pathlib import Path
from pipeline.deploy.package import Contents, release
place, number = Path(sys.argv[1]), sys.argv[2]
release(place / "store", place / f"work{number}", "tiny", Path(sys.argv[3]), Contents({}, {}, {}, [], {}, f"# {number}\\n", {}))
"""
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(i), str(made[0] / "model")], cwd=world.ROOT)
        for i in range(4)
    ]
    assert [p.wait() for p in started] == [0] * 4
    assert sorted(m["version"] for m in released(tmp_path / "store").values()) == [1, 2, 3, 4]
    for digest in released(tmp_path / "store"):
        verify_package(tmp_path / "store" / "models" / digest, audit.public_key(tmp_path / "store", KEY))


def test_an_older_signed_package_in_a_runs_place_is_refused(tmp_path: Path, made: tuple[Path, Path]) -> None:
    store, run = tmp_path / "outputs" / "store", tmp_path / "outputs" / "tiny" / "main"
    contract = world.contract("binary")
    old, new = (release(store, tmp_path / name, "tiny", made[0] / "model", contents(contract, name)) for name in ("old", "new"))
    from pipeline.core.store import digest
    shutil.copytree(new, run / "06_deploy" / "package")
    (run / "06_deploy" / "receipt.json").write_text(json.dumps({"outputs": {"deploy/package": {"file": "package", "sha256": digest(new)}}}))
    assert load_package(*package_of(run)).version == 2
    shutil.rmtree(run / "06_deploy" / "package")
    shutil.copytree(old, run / "06_deploy" / "package")
    with pytest.raises(IntegrityError, match="is not what the phase wrote"):
        package_of(run)
    (run / "06_deploy" / "package" / "card.json").unlink()
    (run / "06_deploy" / "package" / "card.json").symlink_to("schema.json")
    with pytest.raises(IntegrityError, match="card.json is a link or a special file; .* restore the package or build it again"):
        package_of(run)
    with pytest.raises(InputError, match="has no package"):
        package_of(tmp_path / "outputs" / "tiny" / "other")


def test_no_path_that_loads_can_run_code() -> None:
    "No module of the house reads a format that can hold code (pickle and its kin, torch.load, numpy's objects) or runs text as code."
    unsafe = {"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal", "_pickle"}
    for path in (world.ROOT / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & unsafe, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "pl.read_pickle", "pd.read_pickle", "yaml.load", "eval"), f"{path}: {called}"
                assert not any(k.arg == "allow_pickle" for k in node.keywords), path
                assert called != "exec" or path.name == "mutants.py", f"{path}: exec"   # mutants: a feature's own text, one place changed


def damaged(made: tuple[Path, Path], place: Path, old: bytes, new: bytes) -> Path:
    "A package whose model was damaged before anybody digested or signed it."
    model = shutil.copytree(made[0] / "model", place / "model")
    text = (model / "model.txt").read_bytes()
    assert old in text and len(old) == len(new)
    (model / "model.txt").write_bytes(text.replace(old, new, 1))
    told = json.loads((model / "digests.json").read_text())
    told["files"]["model.txt"] = digest_bytes((model / "model.txt").read_bytes())
    (model / "digests.json").write_text(json.dumps(told))
    return release(made[0] / "store", place / "work", "tiny", model, contents(world.contract("binary"), f"# {old!r}\n"))


def test_a_model_that_kills_its_reader_kills_a_child(made: tuple[Path, Path], tmp_path: Path) -> None:
    key = audit.public_key(made[0] / "store", KEY)
    package = damaged(made, tmp_path, b"num_leaves=15", b"num_leaves=99")
    verify_package(package, key)

    def load(digest: str) -> Served:
        check_loads(made[0] / "store" / "models" / digest, key)
        return Served(load_package(made[0] / "store" / "models" / digest, key), digest)

    traffic = Traffic(Served(load_package(made[1], key), made[1].name), load)
    before = traffic.routing
    assert not traffic.apply(Plan("tiny", package.name)) and traffic.routing is before, "what is live stays live"
    assert re.search(r"dies with SIG(ABRT|SEGV|BUS).*nothing was loaded here", traffic.refused), traffic.refused


def test_what_has_loaded_once_is_not_tried_again(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    key, tried = audit.public_key(made[0] / "store", KEY), []
    with pytest.raises(EnvironmentFault, match="not loaded within"):
        first_load._tried(made[1], key, 0, .05, 8000)
    monkeypatch.setattr(first_load, "_loads", {})
    monkeypatch.setattr(first_load, "_tried", lambda folder, *more: tried.append(folder) or {"rows": 16})
    assert [check_loads(made[1], key)["version"] for _ in range(3)] == [1, 1, 1] and len(tried) == 1
    with pytest.raises(IntegrityError, match="version 7 was live already"):
        check_loads(made[1], key, newest=7)


def test_a_package_ends_on_its_last_day(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, told = audit.public_key(made[0] / "store", KEY), contents(world.contract("binary"))
    dated = Contents(**{**vars(told), "expires_days": 10})
    monkeypatch.setenv("PILOTHOUSE_NOW", "2026-03-01T23:00:00+00:00")
    first = release(made[0] / "store", tmp_path / "a", "tiny", made[0] / "model", dated)
    monkeypatch.setenv("PILOTHOUSE_NOW", "2026-03-11T23:59:00+00:00")
    assert release(made[0] / "store", tmp_path / "b", "tiny", made[0] / "model", dated) == first, "the same content is the same package to its last day"
    assert load_package(first, key).version > 1
    monkeypatch.setenv("PILOTHOUSE_NOW", "2026-03-12T00:00:00+00:00")
    with pytest.raises(IntegrityError, match="valid until 2026-03-11; nothing was loaded"):
        load_package(first, key)
    with pytest.raises(IntegrityError, match="valid until 2026-03-11"):
        check_loads(first, key)
    again = release(made[0] / "store", tmp_path / "c", "tiny", made[0] / "model", dated)
    assert again != first and verify_package(again, key)["expires"] == "2026-03-22"
    assert verify_package(made[1], key, on=dt.date(2999, 1, 1))["expires"] is None
    edited = shutil.copytree(first, tmp_path / "edited")
    (edited / MANIFEST).chmod(0o644)
    (edited / MANIFEST).write_text((edited / MANIFEST).read_text().replace("2026-03-11", "2036-03-11"))
    with pytest.raises(IntegrityError, match="not signed by this store's key"):
        verify_package(edited, key)


def test_a_service_needs_nothing_beyond_its_lock(made: tuple[Path, Path]) -> None:
    "Every library outside the package's lock is hidden; a service must start and answer all the same."
    locked = serving_lock(read_lock((world.ROOT / "requirements.lock").read_text()))
    names = {one.name for one in locked}
    assert check_sbom(make_sbom("tiny", {"family": "trees", "digest": "ab" * 32}, locked, "cpython 3.11.7", {})) == len(installed(locked, "cpython 3.11.7")) + 1
    assert set(SERVING) <= names and not names & {"jupyterlab", "pytest", "playwright", "torch", "wandb"}
    code = """
import sys
from importlib.metadata import packages_distributions
names = set(sys.argv[3].split(",")) | {"pilothouse", "setuptools"}
hidden = {module for module, owners in packages_distributions().items() if not {o.lower().replace("_", "-").replace(".", "-") for o in owners} & names}
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
from pathlib import Path
from pipeline.core import audit
from pipeline.deploy.package import KEY
from pipeline.deploy.first_load import probe_package
import pipeline.deploy.handler, pipeline.deploy.http, pipeline.deploy.service, pipeline.deploy.versions
pipeline.deploy.versions.Plans(pipeline.deploy.registry.Registry(Path(sys.argv[2])))
print(probe_package(sys.argv[1], audit.public_key(Path(sys.argv[2]), KEY))["rows"], "pandas" in hidden)
"""
    done = subprocess.run([sys.executable, "-c", code, str(made[1]), str(made[0] / "store"), ",".join(names)], capture_output=True, text=True, cwd=world.ROOT)
    assert done.stdout.split() == ["16", "True"], done.stderr


def test_a_model_of_whole_texts_passes_its_first_load(tmp_path: Path) -> None:
    frame = pl.DataFrame({"note": ["win a prize", "see you soon", None, "free prize now"] * 50, "hour": [float(i % 24) for i in range(200)]})
    columns = [{"name": "note", "type": "text", "dtype": "String", "nullable": True}, {"name": "hour", "type": "number", "dtype": "Float64", "nullable": False, "min": 0.0, "max": 23.0}]
    contract = {"target": "spam", "task": "binary", "classes": ["no", "yes"], "features": ["note", "hour"], "columns": columns}
    model = train_model("text", frame, np.tile([1, 0, 0, 1], 50), contract).save(tmp_path / "model")
    contents = Contents(contract, make_schema(contract, frame).to_dict(), {"threshold": 0.5}, [], {}, "# spam\n", {})
    package = release(tmp_path / "store", tmp_path / "work", "spam", model, contents)
    assert probe_package(package, audit.public_key(tmp_path / "store", KEY))["rows"] == 16
