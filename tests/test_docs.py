"""Every fenced block of README and the docs runs on the built-in model, or says why it does not.

A page is run from top to bottom in a folder with links to `weights/` and `examples/`, its Python in one namespace.

    ```bash                     must end with exit status 0; `pip install …` is left to the environment
    ```console                  `$ command`, then what the terminal shows; what follows `(Pdb) ` is typed
    ```python                   a comment after a print or a bare expression begins with what it gives
    ```python title="x.py"      is written to x.py, for a later command
    ```text title="prints"      what the block above it prints on stdout
    <!-- not run: reason -->    before a block that cannot run here; "an excerpt of FILE" has to be one

In what is shown, … stands for any text, and the amount of white space does not count.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "examples" / "README.md", ROOT / "weights" / "README.md", ROOT / "weights" / "tiny" / "README.md"]
SHOWN_ONLY = {"text", "json"}
PACKAGES = {"evaluate.md": "lm_eval", "serve.md": "openai"}  # of extras, which a page needs


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str
    title: str | None
    code: str
    skipped: str | None  # the reason why it does not run


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    fence = re.compile(r"^(?:<!-- not run: *(.*?) *-->\n+)?```(\w*)(?: title=\"(.+?)\")?\n(.*?)^```$", re.M | re.S)
    text = page.read_text()
    for match in fence.finditer(text):
        reason, language, title, code = match.groups()
        yield Block(text.count("\n", 0, match.start(2)) + 1, language, title, code, reason)


def assert_shown(expected: str, actual: str) -> None:
    """The text is what the page shows, where … is any text."""
    pattern = ".*".join(re.escape(" ".join(piece.split())) for piece in expected.split("…"))
    pattern = pattern.replace(r"\ .*", ".*").replace(r".*\ ", ".*")
    assert re.fullmatch(pattern, " ".join(actual.split()), re.S), f"the page shows\n{expected}\nthe run gave\n{actual}"


class Session:
    """A folder and a Python namespace that the blocks of a page share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.printed = ""
        for name in ("weights", "examples", "download.py", "llama3_raw"):
            (folder / name).symlink_to(ROOT / name)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        dropped = {"LLAMA3_RAW_WEIGHTS", "PYTEST_CURRENT_TEST"}
        self.environment = {name: value for name, value in os.environ.items() if name not in dropped}
        self.environment |= {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120", "PYTHONUNBUFFERED": "1"}
        self.environment |= {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}

    def run(self, block: Block) -> None:
        """Run a block, and compare what it shows."""
        if block.language == "json":
            json.loads(block.code) if block.title is None else assert_shown(block.code, self.printed)
        elif block.title == "prints":
            assert_shown(block.code, self.printed)
        elif block.language == "bash":
            commands = re.sub(r"^pip install [^&\n]*(&& )?", "", block.code, flags=re.M)
            self.printed = self.shell(commands).stdout
        elif block.language == "console":
            for command, shown in re.findall(r"^\$ (.*(?:\n> .*)*)\n((?:(?!\$ ).*\n)*)", block.code, re.M):
                self.console(command.replace("\n> ", "\n"), shown)
        elif block.language == "python" and block.title:
            (self.folder / block.title).write_text(block.code)
        elif block.language == "python":
            self.python(block.code)

    def shell(self, commands: str) -> subprocess.CompletedProcess[str]:
        """Run commands that must end well."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=self.folder,
            env=self.environment,
            text=True,
            capture_output=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}{done.stderr}"
        return done

    def console(self, command: str, shown: str) -> None:
        """Run a command as in a terminal, whatever its exit status."""
        typed = "".join(line + "\n" for line in re.findall(r"^\(Pdb\) (.*)$", shown, re.M))
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            text=True,
            input=typed,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
        assert_shown(re.sub(r"^\(Pdb\) .*$", "(Pdb)", shown, flags=re.M), done.stdout)

    def python(self, code: str) -> None:
        """Run statements one by one; a comment after a print or a bare expression begins with what it gives."""
        printed = io.StringIO()
        lines = code.splitlines()
        for node in ast.parse(code).body:
            is_shown = isinstance(node, ast.Expr)
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                program = ast.Interactive([node]) if is_shown else ast.Module([node], [])
                exec(compile(program, "<docs>", "single" if is_shown else "exec"), self.names)
            assert node.end_lineno is not None
            comment = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().partition("#")[2].strip()
            if is_shown and comment and said.getvalue():
                result = " ".join(said.getvalue().split())
                assert comment.startswith((result, result.strip("'"))), f"{lines[node.end_lineno - 1]}\ngave {result}"
            printed.write(said.getvalue())
        self.printed = printed.getvalue()


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return Session(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs(page: Path, session: Session) -> None:
    if page.name in PACKAGES:
        pytest.importorskip(PACKAGES[page.name])
    if page.name == "debugging.md" and sys.version_info[:3] == (3, 13, 0):
        pytest.skip("pdb of Python 3.13.0 takes no options of a module (gh-125115)")
    for block in blocks_of(page):
        assert block.skipped != "", f"{page.name}:{block.line}: a reason is missing"
        if block.skipped:
            whole = block.skipped.removeprefix("an excerpt of ")
            assert whole == block.skipped or block.code in (ROOT / whole).read_text(), f"{page.name}:{block.line}"
            continue
        known = {"bash", "console", "python"} | SHOWN_ONLY
        assert block.language in known, f"{page.name}:{block.line}: unknown language {block.language!r}"
        try:
            session.run(block)
        except Exception as error:
            raise AssertionError(f"{page.name}:{block.line}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", without_code(page)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors_of(file), f"{page.name}: {target}"


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    [
        "```python\nprint(2)  # 3\n```\n",
        '```python\nprint(2)\n```\n\n```text title="prints"\n3\n```\n',
        "```bash\nfalse\n```\n",
        "```console\n$ echo a b\na c\n```\n",
        "```json\n{\n```\n",
        "```ruby\nputs 1\n```\n",
        "<!-- not run: -->\n```bash\nfalse\n```\n",
        "<!-- not run: an excerpt of llama3_raw/model.py -->\n```python\ndef layer(x):\n```\n",
    ],
)
def test_a_page_that_is_wrong_fails(page: str, session: Session) -> None:
    file = session.folder / "page.md"
    file.write_text(page)
    with pytest.raises(AssertionError):
        test_a_page_runs(file, session)


def test_a_page_that_is_right_passes(session: Session) -> None:
    file = session.folder / "page.md"
    file.write_text(
        "```console\n$ echo a b c; echo d >&2\na … c\nd\n$ echo e\ne\n```\n\n"
        '```python\nx = {"a": 1}\nx["a"]  # 1: as it was\n```\n\n'
        "<!-- not run: for a reason -->\n```bash\nfalse\n```\n"
    )
    test_a_page_runs(file, session)


def test_words_that_the_glossary_replaces() -> None:
    """Those of the first table of its last section."""
    glossary = ROOT / "docs" / "glossary.md"
    table = glossary.read_text().split("## Preferred words")[1].split("These depend")[0]
    phrases = re.findall(r"\| ([^|]+) \|$", table, re.M)[2:]
    assert len(phrases) > 10
    replaced = re.compile(rf"\b({'|'.join(map(re.escape, phrases))})\b", re.I)
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    files = [ROOT / name for name in tracked if name.endswith((".py", ".md", ".c", ".html", ".js", ".toml"))]
    if not files:
        pytest.skip("this is no git checkout")
    hits = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        if file != glossary and file.exists()
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if replaced.search(line)
    ]
    assert not hits, "\n".join(hits)
