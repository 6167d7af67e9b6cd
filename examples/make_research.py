"""Build research/research.ipynb, the scripts of that folder as one notebook with figures, and run it.

    pip install -e '.[examples]' && python examples/make_research.py

A script's docstring becomes text; a cell has its imports, functions and constants; and a further cell begins at each
comment below a blank line. MODEL is the built-in one, other options have their defaults, and the figure of --picture
is shown.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from make_walkthrough import notebook_of, run_notebook, write_notebook
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

from llama3_raw.cli.entry_point import ArgumentParser, command_line_tool

FOLDER = Path(__file__).parent / "research"
NOTEBOOK = FOLDER / "research.ipynb"
HELPERS = {"stories.py"}  # which scripts import
OPENING = """# Research with llama3_raw

The scripts of this folder on the small built-in model. This notebook is generated from them by `make_research.py`."""


def cells_of(script: Path) -> list[NotebookNode]:
    """Return a script as cells: its docstring, its definitions, and the rest in pieces."""
    source = script.read_text(encoding="utf-8")
    tree = ast.parse(source)
    heading, _, about = (ast.get_docstring(tree) or "").partition("\n\n")
    about = about.split("\n\n    python ")[0]  # how to run the script
    text = f"# {heading}\n\n{about}\n\nAs a script: [`{script.name}`]({script.name})"
    return [new_markdown_cell(text), *(new_code_cell(code) for code in pieces_of(source.splitlines(), tree))]


def pieces_of(lines: list[str], tree: ast.Module) -> Iterator[str]:
    """Yield the code of each cell."""
    code: list[str] = []
    end = tree.body[0].end_lineno or 0  # the last line of the docstring
    is_first = True
    for statement in tree.body[1:]:
        first = min(node.lineno for node in [statement, *getattr(statement, "decorator_list", [])])
        between, end = lines[end : first - 1], statement.end_lineno or first  # blank lines and comments
        begins = is_first and not is_definition(statement)
        is_first = is_first and not begins
        if begins or (not is_first and between[:1] == [""] and between[-1:] != [""]):
            yield from cell(code)
            code = []
        code += [*between, *adapted(lines[first - 1 : end], statement, tree)]
    yield from cell(code)


def cell(code: Sequence[str]) -> Iterator[str]:
    """Yield the lines as a cell, unless they are blank."""
    text = "\n".join(code).strip()
    if text:
        yield text


def is_definition(statement: ast.stmt) -> bool:
    """Whether a statement is an import, a function, a class, or a constant."""
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    names = [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    is_constant = bool(names) and all(name.isupper() for name in names)
    return is_constant or isinstance(statement, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))


def adapted(lines: list[str], statement: ast.stmt, tree: ast.Module) -> list[str]:
    """Return the lines of a statement as the notebook has them: without a command line, and with figures shown."""
    text = ast.unparse(statement)
    if text == "options = parser.parse_args()":
        return options_of(tree)
    if text.startswith(("parser", "import argparse", "from __future__")):
        return []
    if isinstance(statement, ast.If) and ast.unparse(statement.test) == "options.picture":
        saves = [node for node in ast.walk(statement) if isinstance(node, ast.Attribute) and node.attr == "savefig"]
        first = statement.body[0].lineno - statement.lineno
        last = max((node.lineno for node in statement.body if any(s in ast.walk(node) for s in saves)), default=0)
        body = textwrap.dedent("\n".join(lines[first : last - statement.lineno + 1]))
        return [f"{body.partition('.savefig(')[0]}"]
    if text == "import sys":
        return []
    return [line.replace("sys.argv[1] if len(sys.argv) > 1 else ", "") for line in lines]


def options_of(tree: ast.Module) -> list[str]:
    """Return a line that sets the options that the code uses, for the built-in model."""
    names: dict[str, object] = {"argparse": argparse, "__doc__": None}
    about = [node for node in tree.body if ast.unparse(node).startswith("parser")]
    exec(compile(ast.Module(about, []), "<options>", "exec"), names)
    parser = names["parser"]
    assert isinstance(parser, argparse.ArgumentParser)
    used = {ast.unparse(node).partition(".")[2] for node in ast.walk(tree) if ast.unparse(node).startswith("options.")}
    defaults = {name: value for name, value in vars(parser.parse_args(["tiny"])).items() if name in used - {"picture"}}
    found = ", ".join(f"{name}={json.dumps(value)}" for name, value in defaults.items())
    return ["from types import SimpleNamespace", "", f"options = SimpleNamespace({found})"]


def make_notebook() -> NotebookNode:
    """Return all scripts as one notebook, not run yet."""
    cells = [new_markdown_cell(OPENING)]
    for script in sorted(FOLDER.glob("*.py")):
        cells += [] if script.name in HELPERS else cells_of(script)
    return notebook_of(cells)


def is_progress(output: NotebookNode) -> bool:
    """Whether an output of a cell is a progress bar, which returns to the beginning of its line."""
    return output.get("name") == "stderr" and "\r" in output.text


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    ArgumentParser(description=__doc__).parse_args(arguments)
    notebook = make_notebook()
    run_notebook(notebook, FOLDER)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if not is_progress(output)]
    write_notebook(notebook, NOTEBOOK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
