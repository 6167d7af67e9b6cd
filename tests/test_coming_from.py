"""docs/coming-from.md: the names that it lists are the same tensors, and its tasks give the same numbers.

The blocks of the page that begin with the name of a library are one script. It runs in a process of its own, because
nnsight changes classes of torch, and writes what is to be compared to a file.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import llama3_raw
from llama3_raw.convert import main as convert
from tests.paths import ROOT, TINY
from tests.test_docs import blocks_of

PAGE = ROOT / "docs" / "coming-from.md"
PACKAGES = {"TransformerLens": "transformer_lens", "nnsight": "nnsight"}
TEXT = "The cat was happy. Lily and the"
TOLERANCE = 1e-4  # of the largest element: fp32

Results = dict[str, dict[str, Any]]  # by task, by variable

ENDING = """
def saved(value):  # tensors, tokens and text
    kinds = {*map(type, value)} if isinstance(value, list) else set()
    if isinstance(value, str) or kinds == {str}:
        return value
    if kinds and all(issubclass(kind, torch.Tensor) for kind in kinds):
        return torch.stack(value).detach()
    if isinstance(value, (int, float, torch.Tensor)) or kinds == {int}:
        return torch.as_tensor(value).detach().clone()

torch.save({task: {name: saved(value) for name, value in kept.items()} for task, kept in results.items()}, "FILE")
"""


def blocks_by_task(library: str) -> list[tuple[str, str]]:
    """The blocks of a library in order, each with the heading above it."""
    lines = PAGE.read_text().splitlines()
    blocks = [block for block in blocks_of(PAGE) if block.code.startswith(f"# {library}\n")]
    return [(next((line for line in lines[b.line :: -1] if line.startswith("##")), ""), b.code) for b in blocks]


def assigned(code: str) -> set[str]:
    """The variables that a block assigns."""
    nodes = ast.walk(ast.parse(code))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def run(library: str, folder: Path, then: str) -> Results:
    """Run the blocks of a library and more code, and return what each leaves in its variables."""
    script, file = folder / f"page_{library}.py", folder / f"{library}.pt"
    parts = ["results = {}\n"]
    for task, code in blocks_by_task(library):
        kept = f"{{n: v for n, v in globals().items() if n in {assigned(code)}}}"
        parts += [code, f"results.setdefault({task!r}, {{}}).update({kept})\n"]
    script.write_text("".join([*parts, then, ENDING.replace("FILE", str(file))]))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    results: Results = torch.load(file)
    return results


def functions_of_the_page() -> SimpleNamespace:
    """The conversions that the page defines."""
    names: dict[str, Any] = {}
    for block in blocks_of(PAGE):
        if block.language == "python" and block.code.startswith("def "):
            exec(block.code, names)
    return SimpleNamespace(**names)


def table(below: str) -> list[list[str]]:
    """The rows of the first table below a line of the page, without their backquotes."""
    body = PAGE.read_text().split(below)[1].split("| --- |", 1)[1].split("\n\n")[0]
    return [[cell.strip().strip("`") for cell in line.strip("| ").split(" | ")] for line in body.splitlines()[1:]]


def names_table(n_layers: int) -> dict[str, dict[str, str]]:
    """Our name -> library -> its name, with the rows of a layer for each layer."""
    rows = [row for row in table("## Names\n") if ".i." in row[0]]
    whole = [row for row in table("## Names\n") if ".i." not in row[0]]
    rows = [[re.sub(r"\bi\b", str(i), cell) for cell in row] for i in range(n_layers) for row in rows]
    return {ours: dict(zip(PACKAGES, theirs, strict=True)) for ours, *theirs in [whole[0], *rows, *whole[1:]]}


def other_hooks() -> dict[str, str]:
    """The hook points of layer 1 that are no tensors of ours -> the expression for them."""
    return {theirs.replace(".i.", ".1."): ours for theirs, ours in table("has hook points that are no")}


def short_forms(column: int) -> str:
    """Code for a column of the table of short forms."""
    forms = "".join(f"    {row[1]!r}: {row[column]},\n" for row in table("## Short forms"))
    return f'text = "{TEXT}"\nresults["short forms"] = {{\n{forms}}}\n'


def code_for_names(library: str, names: dict[str, str]) -> str:
    """Code that puts the tensors of the table of names under `names`, and those with folded norms under `folded`."""
    if library == "nnsight":
        lines = "".join(f"    named[{ours!r}] = {theirs}\n" for ours, theirs in names.items())
        return f"""
with model.trace(clean):
    named = nnsight.save({{}})
    sources = [layer.self_attn.source for layer in layers]
{lines}
results["names"] = named
"""
    return f"""
model.set_use_attn_result(True)
_, cache = model.run_with_cache(clean)
results["names"] = {{ours: cache[name] for ours, name in {names}.items()}}
results["others"] = {{name: cache[name] for name in {[*other_hooks()]}}}
_, cache = folded.run_with_cache(clean)
results["folded"] = {{ours: cache[name] for ours, name in {names}.items()}}
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the built-in model in Hugging Face's format, as the page writes it."""
    folder = tmp_path_factory.mktemp("coming_from")
    assert convert([str(TINY), str(folder / "tiny-hf")]) == 0
    return folder


@pytest.fixture(scope="session")
def model(folder: Path) -> llama3_raw.Model:
    return llama3_raw.load(folder / "tiny-hf", dtype=torch.float32)


@pytest.fixture(scope="session")
def kept(model: llama3_raw.Model) -> llama3_raw.Trace:
    assert model.tokenizer is not None
    return llama3_raw.trace(model, model.tokenizer.encode(TEXT, bos=True))


@pytest.fixture(scope="session")
def ours(folder: Path) -> Results:
    """The results of our blocks, and of our short forms."""
    return run("llama3_raw", folder, short_forms(2))


@pytest.fixture(scope="session")
def results_of(folder: Path, model: llama3_raw.Model) -> Callable[[str], Results]:
    """Run a library's blocks, short forms and names, once."""

    @functools.cache
    def run_once(library: str) -> Results:
        if importlib.util.find_spec(PACKAGES[library]) is None:
            pytest.skip(f"{PACKAGES[library]} is not installed")
        names = {ours: theirs[library] for ours, theirs in names_table(model.params.n_layers).items()}
        forms = short_forms(1) if library == "TransformerLens" else ""
        return run(library, folder, forms + code_for_names(library, names))

    return run_once


def assert_same(name: str, theirs: Tensor, ours: Tensor) -> None:
    """Equal up to rounding and dimensions of 1. What the mask hides is -inf or the most negative number."""
    theirs, ours = theirs.squeeze().float(), ours.squeeze().float()
    assert theirs.shape == ours.shape, name
    masked = ours.isneginf()
    assert (theirs[masked] <= torch.finfo(torch.float32).min).all(), name
    difference, size = float((theirs - ours)[~masked].abs().max()), float(ours[~masked].abs().max())
    assert difference <= TOLERANCE * size, f"{name} differs by {difference:.2g}, where the largest is {size:.2g}"


def test_every_name_is_in_the_table(model: llama3_raw.Model, kept: llama3_raw.Trace) -> None:
    assert [*names_table(model.params.n_layers)] == [*kept]
    assert len(kept) == 71


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_names_of_transformer_lens(
    results_of: Callable[[str], Results], model: llama3_raw.Model, kept: llama3_raw.Trace
) -> None:
    results, page = results_of("TransformerLens"), functions_of_the_page()
    for name in kept:
        assert_same(name, page.from_transformer_lens(name, results["names"][name]), kept[name])
        folded = page.from_folded(name, page.from_transformer_lens(name, results["folded"][name]), model.weights)
        is_logits = name == "logits"
        pair = (folded.log_softmax(-1), kept[name].log_softmax(-1)) if is_logits else (folded, kept[name])
        assert_same(f"folded {name}", *pair)
    known = {"head_results": llama3_raw.head_results, "kept": kept, "model": model, "weights": model.weights, "i": 1}
    for hook, expression in other_hooks().items():
        assert_same(hook, results["others"][hook], eval(expression, known))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_names_of_nnsight(
    results_of: Callable[[str], Results], model: llama3_raw.Model, kept: llama3_raw.Trace
) -> None:
    results, page = results_of("nnsight"), functions_of_the_page()
    for name in kept:
        assert_same(name, page.from_nnsight(name, results["names"][name], model.params), kept[name])


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("library", PACKAGES)
def test_tasks(library: str, results_of: Callable[[str], Results], ours: Results) -> None:
    theirs = results_of(library)
    tasks = [task for task in theirs if task.startswith("###")]
    assert len(tasks) >= 10
    for task in tasks:
        names = theirs[task].keys() & ours[task].keys()
        tensors = [name for name in names if isinstance(ours[task][name], Tensor)]
        assert tensors, f"{task}: nothing to compare"
        for name in tensors:
            assert_same(f"{task}: {name}", theirs[task][name], ours[task][name])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_short_forms(results_of: Callable[[str], Results], ours: Results) -> None:
    theirs = results_of("TransformerLens")["short forms"]
    assert len(theirs) >= 25
    for form, value in theirs.items():
        expected = ours["short forms"][form]
        assert value is not None, form
        if isinstance(expected, Tensor):
            assert_same(form, value, expected)
        else:
            assert value == expected, form
