"Run All in a real JupyterLab, in a real browser: a phase opened there finishes and lands in its run."
from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def lab(project: Path, tmp_path_factory):
    shutil.copy(ROOT / "params/flights.yml", project / "params/flights.yml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("jupyter")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=lesson", f"--ServerApp.root_dir={project}",
         "--LabApp.extension_manager=readonly", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
        cwd=project, env={**os.environ, "JUPYTER_CONFIG_DIR": str(home), "JUPYTER_DATA_DIR": str(home / "data"), "JUPYTER_RUNTIME_DIR": str(home / "run"), "IPYTHONDIR": str(home / "ipython")},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/api/status?token=lesson", timeout=2).read()
                break
            except OSError:
                assert server.poll() is None, "JupyterLab did not start"
                time.sleep(0.25)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_run_all_finishes_a_phase(lab: str, project: Path, tmp_path):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"])
        page = browser.new_page()
        page.goto(f"{lab}/lab/tree/nbs/phases/01_scope.ipynb?token=lesson", timeout=120_000)
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
        page.wait_for_selector("text=Python 3 (ipykernel) | Idle", timeout=120_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        select = page.locator(".jp-Dialog").get_by_role("button", name="Select", exact=True)
        page.wait_for_timeout(500)
        if select.count():
            select.click()
        kept = project / "outputs/flights/main/01_scope"
        for _ in range(600):   # cells out of sight are not in the page: the run's folder is what tells
            if (kept / "receipt.json").exists():
                break
            page.wait_for_timeout(200)
        page.screenshot(path=tmp_path / "lab.png")
        assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
        browser.close()
    assert (kept / "receipt.json").exists() and (kept / "claims.json").exists()
