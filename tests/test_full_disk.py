"A disk that is full in the night of a rollback: real blocks of a real file system, and the same command as always."
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_controller import packages  # noqa: F401  (a fixture)

SCRIPT = """
import json, os, subprocess, sys
from pathlib import Path
from pipeline.core.errors import EnvironmentFault
from pipeline.rollout.controller import Steering
from test_controller import PROBLEM, begin, opened

disk, packages = Path(sys.argv[1]), Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
(disk / "outputs").mkdir()
(disk / "params").mkdir()
(disk / "params" / "late.yml").write_text(json.dumps(PROBLEM))
(disk / "settings.ini").write_text("[outputs]\\npath = outputs\\n")
registry = opened(packages, disk / "outputs")
steering = Steering(registry)


def fill():
    with (disk / "filler").open("ab", buffering=0) as file:
        try:
            while file.write(bytes(1 << 12)):
                pass
        except OSError:
            return


def back(*words):
    registry.close()
    done = subprocess.run([sys.executable, "-m", "pipeline", *words, "--reason", "worse", "--json"], cwd=disk, capture_output=True, text=True)
    return [done.returncode, steering.plans.current("late").live == registry.entry("late", 1).digest, steering.plans.current("late").canary]


told = {}
begin(steering)
fill()
told["free"] = os.statvfs(disk).f_bavail
told["trial"] = back("rollout", "back", "late")
fill()
try:
    begin(steering)
except EnvironmentFault as error:
    told["no room"] = str(error)
(disk / "filler").unlink()
begin(steering)
steering.promote("late", "all at once", "ann")
while steering.rollouts.current("late").status == "running":
    steering.promote("late", "all at once", "ann")
fill()
told["production"] = back("rollout", "back", "late")
(disk / "filler").unlink()
steering.plans.go_live("late", steering.plans.current("late").revision, registry.entry("late", 3).digest, "in a hurry", "eve")
fill()
told["by hand"] = back("models", "late", "--back")
print(json.dumps(told))
"""


def test_the_way_back_has_room(packages: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "disk").mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "disk")], capture_output=True).returncode:
        pytest.skip("this user may mount no file system of his own (unshare -rm)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), str(Path(__file__).parent)])}
    done = subprocess.run(["unshare", "-rm", sys.executable, "-c", SCRIPT, str(tmp_path / "disk"), str(packages)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["free"] == 0 and told["trial"] == [0, True, None] and told["production"] == [0, True, None] and told["by hand"] == [0, True, None]
    assert "room" in told["no room"]
