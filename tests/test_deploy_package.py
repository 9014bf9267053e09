"""A package is whole and signed, or it is refused with the name of the file."""
from __future__ import annotations

import ast
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import deploy_world as world
from pipeline.core import audit
from pipeline.core.errors import InputError, IntegrityError
from pipeline.deploy.package import KEY, MANIFEST, SIGNATURE, Contents, load_package, package_of, release, released, verify_package
from pipeline.deploy.schema import make_schema
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
    with pytest.raises(InputError, match="has no package"):
        package_of(tmp_path / "outputs" / "tiny" / "other")


def test_no_path_that_loads_can_run_code() -> None:
    for path in [*(world.ROOT / "pipeline" / "deploy").glob("*.py"), *(world.ROOT / "pipeline" / "rollout").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not {n.split(".")[0] for n in names} & {"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"}, path
