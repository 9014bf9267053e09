"""A phase notebook played in this process: every code cell, its last expression drawn, no kernel."""
from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any


def play(notebook: Path, **parameters: Any) -> dict[str, Any]:
    "Run the cells of a notebook with parameters; returns its names."
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, notebook.name, "exec"), names)
        if isinstance(last, ast.Expr):
            shown = eval(compile(ast.Expression(last.value), notebook.name, "eval"), names)  # noqa: S307
            if hasattr(shown, "_repr_html_"):
                assert shown._repr_html_()
        if "parameters" in cell.get("metadata", {}).get("tags", []):
            names |= parameters
    return names
