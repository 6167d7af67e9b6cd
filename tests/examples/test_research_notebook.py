"""examples/research/: the notebook is that of the scripts, and runs."""

from __future__ import annotations

from pathlib import Path

import make_research
import nbformat
import pytest


def test_the_notebook_is_up_to_date() -> None:
    stored = nbformat.read(make_research.NOTEBOOK, as_version=4)
    nbformat.validate(stored)
    expected = make_research.make_notebook()
    assert [(cell.cell_type, cell.source) for cell in stored.cells] == [
        (cell.cell_type, cell.source) for cell in expected.cells
    ], "run examples/make_research.py"
    scripts = {script.name for script in make_research.FOLDER.glob("*.py")} - make_research.HELPERS
    text = "\n".join(cell.source for cell in stored.cells)
    assert all(f"({name})" in text for name in scripts)
    assert make_research.NOTEBOOK.stat().st_size < 500_000


def test_cells_have_no_command_line_and_show_the_figure(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        '"""A title.\n\nAnd text.\n\n    python examples/research/script.py\n"""\n\n'
        "import argparse\n\nfrom llama3_raw import load, plots\n\nN = 2\n\n\n"
        "def twice(x):\n    return N * x\n\n\n"
        "parser = argparse.ArgumentParser(description=__doc__)\n"
        'parser.add_argument("model", nargs="?", default="tiny")\nparser.add_argument("--picture")\n'
        "options = parser.parse_args()\n\nmodel = load(options.model)\n\n# a comment\nx = twice(3)\n\n"
        "if options.picture:\n    titles = [1]\n    plots.heat(x, titles).savefig(options.picture)\n    print(1)\n"
    )
    cells = [cell.source for cell in make_research.cells_of(script)]
    assert cells == [
        "# A title.\n\nAnd text.\n\nAs a script: [`script.py`](script.py)",
        "from llama3_raw import load, plots\n\nN = 2\n\n\ndef twice(x):\n    return N * x",
        'from types import SimpleNamespace\n\noptions = SimpleNamespace(model="tiny")\n\nmodel = load(options.model)',
        "# a comment\nx = twice(3)\n\ntitles = [1]\nplots.heat(x, titles)",
    ]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_notebook_runs_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_research, "NOTEBOOK", tmp_path / "made.ipynb")
    assert make_research.main([]) == 0
    for cell in nbformat.read(tmp_path / "made.ipynb", as_version=4).cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output.text
