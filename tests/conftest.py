"What several tests share: a project of its own in a temporary folder, and the command run in it."
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def project(tmp_path: Path) -> Path:
    "A project with this house's phases and settings, and outputs of its own."
    (tmp_path / "nbs").mkdir()
    shutil.copytree(ROOT / "nbs/phases", tmp_path / "nbs/phases", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (tmp_path / "params").mkdir()
    for name in ("settings.ini", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def pilothouse(project: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    "`pilothouse(verb, …)` in that project; environment variables as keywords."

    def call(*words: str | Path, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipeline", *map(str, words)], cwd=project, capture_output=True, text=True, timeout=timeout,
            env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
        )

    return call
