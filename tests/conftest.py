"What several tests share: a project of its own in a temporary folder, and the command run in it."
from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# The same examples in every run, so that a red run is about the change; FUZZ=1 draws new ones.
settings.register_profile("same", derandomize=not os.environ.get("FUZZ"))
settings.load_profile("same")


LONG = ("test_end_to_end", "test_label_studio", "test_cluster", "test_deploy_server", "test_privacy", "test_own_table", "test_runbook", "test_batch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Long files begin first, so that no core is left alone with one of them in the end."
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session", autouse=True)
def parsed_once() -> Iterator[None]:
    "Every new project digests all modules, which takes seconds; the digest follows from the text alone, so each text is parsed once."
    from pipeline.core import receipt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(receipt, "source_digest", functools.cache(receipt.source_digest))
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    "A headless Chromium for a file's tests, which are skipped where there is none."
    from playwright.sync_api import sync_playwright
    from test_browser import CHROMIUM, FLAGS

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


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


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    "Charts are drawn but not printed, for tests that look at what a phase stores: printing is a third of a small phase's time."
    from pipeline.core import charts

    def draft(draw: Callable[..., None], width: int, height: float) -> str:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        with matplotlib.rc_context(charts.RC):
            figure = Figure(figsize=(width / 72, height / 72), dpi=72)
            FigureCanvasSVG(figure)
            draw(figure, figure.add_subplot(), width)
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:g}"></svg>'

    monkeypatch.setattr(charts, "_render", draft)
