"""Set up this project's environment: locked versions, torch for the hardware that is there. Standard library only.

    python tools/setup.py .venv      # make the environment
    python tools/setup.py browser    # find or install the browser that tests need
    python tools/setup.py lock       # resolve again: requirements.lock and environment.yml
"""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def sh(*command: str | Path, quiet: bool = False, check: bool = True) -> int:
    if not quiet:
        print("  $", " ".join(Path(c).name if isinstance(c, Path) else c for c in command), flush=True)
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=quiet, text=True)
    if check and done.returncode:
        sys.exit(f"setup: {' '.join(map(str, command[:6]))} … failed with exit code {done.returncode}\n{(done.stderr or '')[-2000:]}")
    return done.returncode


def make_environment(venv: Path) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  (a person may start this with an older Python)
        sys.exit(f"setup: Python {sys.version.split()[0]} is too old; 3.11 or newer is needed (make PYTHON=python3.12 …)")
    python = venv / "bin" / "python"
    if not python.exists():
        print(f"Setting up {venv.name} (a few minutes, once)", flush=True)
        sh(sys.executable, "-m", "venv", venv)
    if sh(python, "-m", "uv", "--version", quiet=True, check=False):
        sh(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"uv=={locked('uv')}")
    install_torch(python)
    sh(python, "-m", "uv", "pip", "install", "--quiet", "--compile-bytecode", "--python", python, "-r", LOCK)
    sh(python, "-m", "uv", "pip", "install", "--quiet", "--python", python, "--no-deps", "-e", ".")
    (venv / ".ready").touch()


def install_torch(python: Path) -> None:
    "The pinned torch: a build that lies on this machine first, else the one for the hardware that is there."
    wanted = f"torch=={locked('torch')}"
    installed = subprocess.run([str(python), "-c", "from importlib.metadata import version; print(version('torch'))"], capture_output=True, text=True)
    if installed.returncode == 0 and installed.stdout.split("+")[0].strip() == locked("torch"):
        return
    gpu = shutil.which("nvidia-smi") is not None and sh("nvidia-smi", quiet=True, check=False) == 0
    if not gpu and not sh(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wanted, quiet=True, check=False):
        return
    backend = "auto" if gpu else "cpu"
    if sh(python, "-m", "uv", "pip", "install", "--quiet", "--python", python, "--torch-backend", backend, wanted, check=False):
        sh(python, "-m", "pip", "install", "--quiet", wanted)


def locked(package: str) -> str:
    found = re.search(rf"^{re.escape(package)}==([^\s;\\]+)", LOCK.read_text(), re.MULTILINE)
    if not found:
        sys.exit(f"setup: requirements.lock pins no {package}; run `make lock`")
    return found[1]


def find_browser() -> str | None:
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def provide_browser() -> None:
    "A browser for the tests that look at pages. Without one those tests say so and are skipped."
    if find_browser():
        return
    if shutil.which("apt-get") and os.geteuid() == 0:
        print("Installing Chromium for the browser tests", flush=True)
        sh("apt-get", "update", "-q", quiet=True, check=False)
        sh("apt-get", "install", "-y", "-q", "--no-install-recommends", "chromium", quiet=True, check=False)
    if not find_browser():
        print("No Chromium found: browser tests will be skipped (install `chromium`).", flush=True)


def write_lock() -> None:
    "Resolve pyproject.toml for every platform; torch without hash, because its build depends on the hardware."
    uv = [sys.executable, "-m", "uv"]
    sh(*uv, "pip", "compile", "pyproject.toml", "--all-extras", "--generate-hashes", "--universal", "--python-version", "3.11",
       "--no-header", "--quiet", "-o", LOCK, quiet=True)
    text = re.sub(r"^(torch==\S+) \\\n(?:    --hash=\S+(?: \\)?\n)+", r"\1\n", LOCK.read_text(), flags=re.MULTILINE)
    LOCK.write_text("# Resolved from pyproject.toml by `make lock`. torch carries no hash: its build depends on the hardware.\n" + text)
    write_environment()


def pins(lock: str) -> list[str]:
    "`name==version` (and its marker) of every line of a lock, without hashes."
    return [m[0].strip() for m in re.finditer(r"^[A-Za-z0-9][\w.-]*==[^\s;\\]+(?: ; [^\\\n]+)?", lock, re.MULTILINE)]


def write_environment() -> None:
    "environment.yml: the conda environment that installs the very same versions (pip cannot mix hashed and unhashed)."
    lines = "".join(f"      - {pin}\n" if " ; " not in pin else f'      - "{pin}"\n' for pin in pins(LOCK.read_text()))
    (ROOT / "environment.yml").write_text(
        "# Written by `make lock`; the versions are those of requirements.lock. Without a GPU, give pip a CPU build of torch.\n"
        "name: pilothouse\nchannels: [conda-forge]\ndependencies:\n"
        f"  - python=3.11\n  - pip\n  - pip:\n{lines}      - -e .\n"
    )


if __name__ == "__main__":
    verb = sys.argv[1] if len(sys.argv) > 1 else ".venv"
    {"browser": provide_browser, "lock": write_lock}.get(verb, lambda: make_environment((ROOT / verb).absolute()))()
