"""A phase notebook played in this process: every code cell, its last expression drawn, no kernel."""
from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any


def play(
    notebook: Path,
    names: dict[str, Any] | None = None,   # filled while the cells run, so that what there was is known after an error
    shown: list[Any] | None = None,        # filled with what each cell would show
    **parameters: Any,                     # instead of the defaults of the cell tagged so
) -> dict[str, Any]:
    "Run the cells of a notebook in order; returns its names."
    names = {} if names is None else names
    names["__name__"] = "__main__"
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, notebook.name, "exec"), names)  # noqa: S102
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), notebook.name, "eval"), names)  # noqa: S307
            if shown is not None:
                shown.append(value)
            if hasattr(value, "_repr_html_"):
                assert value._repr_html_()
        if "parameters" in cell["metadata"].get("tags", []):
            names |= parameters
    return names
