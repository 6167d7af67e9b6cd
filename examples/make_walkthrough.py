"""Build walkthrough.ipynb, all lessons as one notebook with figures, and run it.

    pip install -e '.[examples]' && python examples/make_walkthrough.py

A lesson's docstring becomes text, each title a heading with a cell of code below it; the figure of --picture is shown.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from tqdm import tqdm

from llama3_raw.cli.entry_point import ArgumentParser, command_line_tool
from llama3_raw.system.files import atomic_write

HERE = Path(__file__).parent
NOTEBOOK = HERE / "walkthrough.ipynb"
OPENING = """# Lessons: how Llama 3 computes the next token

The ten lessons of this folder on the small built-in model. To use a real model, change the first cell. This notebook is
generated from the scripts by `make_walkthrough.py`."""
OPEN_MODEL = """import llama3_raw

model = llama3_raw.load("../weights/tiny")  # or "../weights/Meta-Llama-3-8B"
tokenizer = model.tokenizer"""


def is_call_of(statement: ast.stmt, function: str) -> bool:
    """Whether a statement calls the function, with or without an assignment of the result."""
    value = statement.value if isinstance(statement, (ast.Expr, ast.Assign)) else None
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == function


def title_of(statement: ast.stmt) -> str | None:
    """Return the text of a title("…"); None for other statements, and for a title that is not a constant."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call) and is_call_of(statement, "title"):
        (text,) = statement.value.args
        if isinstance(text, ast.Constant):
            return str(text.value)
    return None


def cells_of(lesson: Path) -> list[NotebookNode]:
    """Return a lesson as cells: its docstring, then each title with the code below it."""
    source = lesson.read_text(encoding="utf-8")
    lines = source.splitlines()
    tree = ast.parse(source)
    heading, _, about = (ast.get_docstring(tree) or "").partition("\n\n")
    cells = [new_markdown_cell(f"# {heading}\n\n{about}")]
    code: list[str] = []

    def end_cell() -> None:
        text = "\n".join(code).strip()
        if text:
            cells.append(new_code_cell(text))
        code.clear()

    end = tree.body[0].end_lineno or 0  # the last line of the docstring
    for statement in tree.body[1:]:
        last = statement.end_lineno or statement.lineno
        code += lines[end : statement.lineno - 1]  # comments and blank lines before the statement
        end = last
        step = title_of(statement)
        if step:
            end_cell()
            cells.append(new_markdown_cell(f"## {step}"))
        elif isinstance(statement, ast.ImportFrom) and statement.module == "lesson":
            replaced = {"open_model", "save"}
            titles = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and is_call_of(node, "title")]
            if all(node in tree.body and title_of(node) for node in titles):
                replaced |= {"title"}
            names = [alias.name for alias in statement.names if alias.name not in replaced]
            code += [f"from lesson import {', '.join(names)}"] if names else []
        elif isinstance(statement, ast.If) and ast.unparse(statement.test) == "picture":
            code.append("draw()")  # shown below the cell; the script saves it to a file
        elif not (
            is_call_of(statement, "open_model")
            or (isinstance(statement, ast.ImportFrom) and statement.module == "__future__")
        ):
            code += lines[statement.lineno - 1 : last]
    end_cell()
    return cells


def make_notebook() -> NotebookNode:
    """Return all lessons as one notebook, not run yet."""
    cells = [new_markdown_cell(OPENING), new_code_cell(OPEN_MODEL)]
    for lesson in sorted(HERE.glob("[0-9][0-9]_*.py")):
        cells += cells_of(lesson)
    return notebook_of(cells)


def notebook_of(cells: Sequence[NotebookNode]) -> NotebookNode:
    """Return the cells as a notebook."""
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # fixed ids keep the diff of a new run small
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook: NotebookNode = new_notebook(cells=cells, metadata=metadata)
    return notebook


def run_notebook(notebook: NotebookNode, folder: Path) -> None:
    """Run the cells in a folder; the notebook then has their outputs."""
    client = NotebookClient(
        notebook,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # otherwise it warns about its port
    )
    with client.setup_kernel():
        for number, cell in enumerate(tqdm(notebook.cells, desc="running the cells", unit="cell")):
            client.execute_cell(cell, number)


def write_notebook(notebook: NotebookNode, file: Path) -> None:
    """Write the notebook to a file."""
    with atomic_write(file) as part:
        nbformat.write(notebook, part)


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    ArgumentParser(description=__doc__).parse_args(arguments)
    notebook = make_notebook()
    run_notebook(notebook, HERE)
    write_notebook(notebook, NOTEBOOK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
