"""Keep notebooks and modules one thing: edit as text, sync back, check that nothing drifted.

    python tools/house.py edit nbs/lib/core/00_errors.ipynb   # writes .text/nbs/lib/core/00_errors.py
    python tools/house.py sync                                # every changed text -> notebook -> module
    python tools/house.py check                               # what CI asks
    python tools/house.py readme                              # README.md from nbs/index.ipynb
"""
from __future__ import annotations

import ast
import fcntl
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / ".text"
KERNELSPEC = {"display_name": "python3", "language": "python", "name": "python3"}
GENERATED_BY_NBDEV = {"pipeline/__init__.py", "pipeline/_modidx.py"}


def notebooks() -> list[Path]:
    "Every notebook of the project, in reading order."
    return sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def text_of(notebook: Path) -> Path:
    return TEXT / notebook.resolve().relative_to(ROOT).with_suffix(".py")


def notebook_of(text: Path) -> Path:
    return ROOT / text.resolve().relative_to(TEXT).with_suffix(".ipynb")


def edit(paths: Iterable[Path]) -> None:
    "Write notebooks as percent-format text under .text/."
    from jupytext.cli import jupytext

    for notebook in paths:
        text = text_of(notebook)
        text.parent.mkdir(parents=True, exist_ok=True)
        jupytext(["--quiet", "--to", "py:percent", "--opt", "notebook_metadata_filter=-all", str(notebook), "-o", str(text)])
        print(text.relative_to(ROOT))


def sync(texts: Iterable[Path]) -> None:
    "Text -> notebook (ids kept) -> cleaned -> exported. One at a time, so that two syncs never race."
    from jupytext.cli import jupytext

    TEXT.mkdir(exist_ok=True)
    with (TEXT / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for text in texts:
            compile_text(text)
            notebook = notebook_of(text)
            notebook.parent.mkdir(parents=True, exist_ok=True)
            update = ["--update"] if notebook.exists() else []
            jupytext(["--quiet", "--to", "ipynb", *update, str(text), "-o", str(notebook)])
            normalise(notebook)
            export(notebook)
            print(notebook.relative_to(ROOT))


def compile_text(text: Path) -> None:
    "Refuse a text that is no Python before anything is written; lines that begin with % or ! are the notebook's."
    source = re.sub(r"^(?=[ \t]*[%!])", "# ", text.read_text(encoding="utf-8"), flags=re.MULTILINE)
    try:
        compile(source, str(text), "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    except SyntaxError as error:
        sys.exit(f"{text.resolve().relative_to(ROOT)}:{error.lineno}: {error.msg}; nothing of it was synced")


def normalise(notebook: Path) -> None:
    "Kernelspec set (papermill needs one), everything else as nbdev-clean leaves it."
    from nbdev.clean import nbdev_clean

    content = json.loads(notebook.read_text())
    content["metadata"] = {"kernelspec": KERNELSPEC}
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    nbdev_clean(str(notebook))


def export(notebook: Path) -> None:
    from nbdev.doclinks import _build_modidx  # noqa: PLC2701
    from nbdev.export import nb_export

    if exported_module(notebook) is None:
        return
    nb_export(notebook, lib_path=ROOT / "pipeline")
    (exported_module(notebook).parent / "__init__.py").touch()
    _build_modidx()


def exported_module(notebook: Path) -> Path | None:
    "The module that a notebook exports, from its `#| default_exp` line."
    for cell in json.loads(notebook.read_text())["cells"]:
        found = re.search(r"^#\|\s*default_exp\s+(\S+)", "".join(cell["source"]), re.MULTILINE)
        if found and cell["cell_type"] == "code":
            return ROOT / "pipeline" / (found[1].replace(".", "/") + ".py")
    return None


def readme_text() -> str:
    "README.md as `nbs/index.ipynb` says it: markdown cells, code cells fenced, text outputs quoted."
    parts = ["<!-- Rendered from nbs/index.ipynb by `make sync`: edit that. -->"]
    for cell in json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source and not source.startswith("#| hide"):
            language = "sh" if source.startswith("%%") else "python"
            parts.append(f"```{language}\n{re.sub(r'^%%.*?$', '', source, count=1, flags=re.M).strip()}\n```")
    return "\n\n".join(parts) + "\n"


def check() -> list[str]:
    "Everything that can drift between notebooks and modules; an empty list is a tidy house."
    return [*check_clean(), *check_export(), *check_orphans(), *check_phases(), *check_lessons(), *check_readme()]


def check_clean() -> list[str]:
    from fastcore.nbio import read_nb
    from nbdev.clean import clean_nb

    faults = []
    for path in notebooks():
        before = json.loads(path.read_text())
        notebook = read_nb(path)
        del notebook["path_"]
        clean_nb(notebook, allowed_cell_metadata_keys=["tags"], allowed_metadata_keys=["kernelspec"])
        after = json.loads(json.dumps(notebook))
        if before["metadata"] != after["metadata"] or [c.get("metadata") for c in before["cells"]] != [
            c.get("metadata") for c in after["cells"]
        ] or any(c.get("execution_count") for c in before["cells"]):
            faults.append(f"{path.relative_to(ROOT)}: not clean; run `make sync` (or nbdev-clean)")
    return faults


def check_export() -> list[str]:
    "Export every notebook into a scratch folder and compare it with what is committed."
    import tempfile

    from nbdev.export import nb_export

    faults = []
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".setup-export-") as scratch:
        for path in notebooks():
            module = exported_module(path)
            if module is None:
                continue
            nb_export(path, lib_path=Path(scratch) / "pipeline")
            fresh = Path(scratch) / module.relative_to(ROOT)
            if not module.exists() or _body(module) != _body(fresh):
                faults.append(f"{module.relative_to(ROOT)}: differs from {path.relative_to(ROOT)}; run `make sync`")
    return faults


def _body(module: Path) -> str:
    "Source without nbdev's comments: they hold paths relative to where the export was written."
    return "\n".join(l for l in module.read_text().splitlines() if not l.startswith(("# %%", "# AUTOGENERATED")))


def check_orphans() -> list[str]:
    "Modules without a notebook, and notebooks or modules that git does not track."
    owned = {str(m.relative_to(ROOT)) for n in notebooks() if (m := exported_module(n))}
    present = {str(p.relative_to(ROOT)) for p in (ROOT / "pipeline").rglob("*.py")}
    packages = {p for p in present if p.endswith("/__init__.py") and not (ROOT / p).read_text().strip()}
    orphans = present - owned - packages - GENERATED_BY_NBDEV - {"pipeline/__main__.py"}
    faults = [f"{p}: no notebook exports it; delete it or write its lesson" for p in sorted(orphans)]
    listed = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard", "nbs", "pipeline", "params", "tests", "tools"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()
    return faults + [f"{p}: git does not track it; `git add` or delete it" for p in listed]


def check_phases() -> list[str]:
    faults = []
    for path in sorted((ROOT / "nbs/phases").glob("*.ipynb")):
        content = json.loads(path.read_text())
        tagged = [c for c in content["cells"] if "parameters" in c.get("metadata", {}).get("tags", [])]
        if len(tagged) != 1:
            faults.append(f"{path.name}: {len(tagged)} cells are tagged `parameters`; papermill needs exactly one")
        if content["metadata"].get("kernelspec", {}).get("name") != "python3":
            faults.append(f"{path.name}: no python3 kernelspec; papermill refuses it")
        for cell in content["cells"]:
            if cell["cell_type"] != "code":
                continue
            source = re.sub(r"^\s*[%!].*$", "", "".join(cell["source"]), flags=re.M)
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.For | ast.While | ast.If):
                    faults.append(f"{path.name}: a {type(node).__name__} in a phase; logic belongs into nbs/lib, with a test")
    return faults


def check_lessons() -> list[str]:
    "A library notebook starts with `# Title` and `> subtitle`, and asserts something."
    faults = []
    for path in sorted([*(ROOT / "nbs/lib").rglob("*.ipynb"), *(ROOT / "nbs/problems").glob("*.ipynb")]):
        cells = json.loads(path.read_text())["cells"]
        name = path.relative_to(ROOT)
        if not re.match(r"# .+\n+> .+", "".join(cells[0]["source"])):
            faults.append(f"{name}: begins without `# Title` and `> one line`")
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        if not any(re.search(r"^\s*assert |raises|test_", c, re.M) for c in code if not c.startswith("#| export")):
            faults.append(f"{name}: a lesson without an assertion")
    return faults


def check_readme() -> list[str]:
    readme = ROOT / "README.md"
    stale = not readme.exists() or readme.read_text() != readme_text()
    return ["README.md: differs from nbs/index.ipynb; run `make sync`"] if stale else []


def write_readme() -> None:
    (ROOT / "README.md").write_text(readme_text())


def main(arguments: list[str]) -> int:
    verb, paths = (arguments or ["check"])[0], [Path(a).resolve() for a in arguments[1:]]
    if verb == "edit":
        edit(paths or notebooks())
    elif verb == "sync":
        newer = [t for t in sorted(TEXT.rglob("*.py")) if not (n := notebook_of(t)).exists() or t.stat().st_mtime > n.stat().st_mtime]
        sync(paths or newer)
        if (ROOT / "nbs/index.ipynb").exists():
            write_readme()
    elif verb == "readme":
        write_readme()
    elif verb == "check":
        faults = check()
        print("\n".join(faults) or "notebooks and modules: one thing")
        return 1 if faults else 0
    else:
        print(__doc__)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
