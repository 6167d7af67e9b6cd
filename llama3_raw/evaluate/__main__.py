"""python -m llama3_raw.evaluate: measure what a model knows, and what a compression costs."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..cli.entry_point import answer_help
from .parser import build_parser

answer_help(__name__, build_parser)

from ..batch.journal import Journal, describe_model, exclusive, open_journal
from ..cli.entry_point import command_line_tool
from ..cli.memory_plan import RunShape
from ..cli.models import choose_model, load_model
from ..cli.options import check_context, check_output, read_text
from ..decoding.scoring import MAX_ROWS, ContinuationScore, score
from ..errors import UserError, in_short, needed_package
from ..ops import Ops
from ..perplexity import CHUNK, check_windows
from ..system.files import atomic_write
from ..tokenizer import Tokenizer
from ..weights import Model
from .divergence import as_json, measure, table

_MODES = ("tasks", "compare_to", "score")

# options that only some modes have
_MODES_OF = {
    "output": ("tasks",),
    "limit": ("tasks",),
    "num_fewshot": ("tasks",),
    "include_path": ("tasks",),
    "chat": ("tasks",),
    "system": ("tasks",),
    "batch_size": ("tasks",),
    "stride": ("compare_to",),
    "windows": ("compare_to",),
    "context": ("tasks", "compare_to"),
}


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    if arguments[:1] == ["lm_eval"]:
        return _lm_eval(arguments[1:])
    parser = build_parser()
    options = parser.parse_args(arguments)
    modes = [name for name in _MODES if getattr(options, name)]
    if len(modes) != 1 or bool(options.text) != (modes == ["compare_to"]):
        raise UserError("give --tasks NAMES, --compare-to WEIGHTS TEXT, or --score FILE; see --help")
    for name, allowed in _MODES_OF.items():
        if modes[0] not in allowed and getattr(options, name) != parser.get_default(name):
            raise UserError(f"{_option(name)} belongs to {' or '.join(map(_option, allowed))}; leave it out")
    {"tasks": _run_tasks, "compare_to": _compare, "score": _score}[modes[0]](options)
    return 0


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _lm_eval(arguments: Sequence[str]) -> int:
    """Run lm-eval's own command line, with this engine registered."""
    _harness()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
    return 0


def _harness() -> ModuleType:
    needed_package("lm_eval", "--tasks", extra="evaluate")
    from . import harness

    return harness


def _run_tasks(options: argparse.Namespace) -> None:
    if options.system is not None and not options.chat:
        raise UserError("--system belongs to --chat; give that with it")
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not names:
        raise UserError(f"--tasks {options.tasks}: names no task; give one, or several with commas between")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise UserError(f"--num-fewshot should be 0 or more, is {options.num_fewshot}")
    if options.output:
        check_output("-o", options.output)
        if Path(options.output).exists():
            raise UserError(f"-o {options.output}: is there already; choose another name, or remove it")
    harness = _harness()
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable, make_table

    if options.include_path and not Path(options.include_path).is_dir():
        raise UserError(f"--include-path {options.include_path}: there is no such folder")
    manager = _task_manager(names, options.include_path)
    chosen = choose_model(options)
    with _resumable(options, describe_model(chosen)) as journal:
        model = harness.Adapter.load(options, chosen, journal)
        results = simple_evaluate(
            model=model,
            tasks=names,
            num_fewshot=options.num_fewshot,
            batch_size=options.batch_size,
            limit=options.limit,
            apply_chat_template=options.chat,
            system_instruction=options.system,
            task_manager=manager,
            log_samples=False,
        )
        results["config"] |= {"model": "llama3_raw", "model_args": {"weights": str(chosen.folder.path)}}
        if options.output:
            with atomic_write(Path(options.output)) as part:
                part.write_text(json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False))
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))


def _task_manager(names: Sequence[str], folder: str | None) -> Any:
    """Return what finds these tasks. Raises UserError for one that neither lm-eval nor the folder has."""
    from lm_eval.tasks import TaskManager

    if folder is not None:  # lm-eval's own 14,000 tasks take seconds to index
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            way_out = f"did you mean {' or '.join(close)}?" if close else "see lm_eval ls tasks, or give --include-path"
            raise UserError(f"--tasks {in_short(name)}: lm-eval has no such task; {way_out}")
    return manager


@contextlib.contextmanager
def _resumable(options: argparse.Namespace, model: dict[str, Any]) -> Iterator[Journal | None]:
    """Open the journal of -o, which keeps the results of each batch until the run is finished."""
    if not options.output:
        yield None
        return
    out = Path(options.output).resolve()
    part = out.with_name(f"{out.name}.part")
    names = ("reference", "batch_size", "context")
    run = model | {_option(name): getattr(options, name) for name in names}
    with exclusive(out, None):
        with open_journal(part, run) as journal:
            if journal.results:
                count = len(journal.results)
                print(f"llama3_raw: continuing; {count} batches are done already", file=sys.stderr)
            yield journal
        part.unlink()


def _compare(options: argparse.Namespace) -> None:
    text = read_text(options.text)
    if not text:
        raise UserError(f"{'stdin' if options.text == '-' else options.text}: is empty; give a text to score")
    base_options = argparse.Namespace(**vars(options))
    base_options.weights, base_options.quantize, base_options.adapter = options.compare_to, None, None
    base_options.layers, base_options.format = None, None
    chosen, base = choose_model(options), choose_model(base_options, needs_tokenizer=False, named_by="--compare-to")
    params = chosen.checkpoint.params
    check_context(options.context, min(params.max_seq_len, base.checkpoint.params.max_seq_len))
    assert chosen.tokenizer is not None  # checked by choose_model
    if base.tokenizer is not None and base.tokenizer.encode(text) != chosen.tokenizer.encode(text):
        raise UserError(
            f"--compare-to {options.compare_to}: its tokenizer gives other tokens; give a model with that of --weights"
        )
    ids = chosen.tokenizer.encode(text, bos=True)
    cut = check_windows(params, ids, options.context, options.stride, options.windows)
    length = min(cut.context, len(ids))
    models: list[tuple[Model, Ops]] = []
    for one in (chosen, base):
        shape = RunShape(prompt=length, text=length, least=2, scored=CHUNK)
        model, ops, which = load_model(one, shape, options.reference)
        print(f"llama3_raw: {'compared to ' if models else ''}{which}", file=sys.stderr)
        models.append((model, ops))
    found = measure(models, ids, context=cut.context, stride=cut.stride, windows=cut.kind, progress=True)
    print(table(found))
    print(json.dumps(as_json(found)))


def _score(options: argparse.Namespace) -> None:
    lines = [line for line in enumerate(read_text(options.score).splitlines(), start=1) if line[1].strip()]
    if not lines:
        raise UserError(f'{options.score}: is empty; give lines of {{"prompt": …, "continuations": [… , …]}}')
    questions = [(number, *_question(options.score, number, line)) for number, line in lines]
    has_text = any(isinstance(text, str) for _, prompt, texts in questions for text in (prompt, *texts))
    chosen = choose_model(options, needs_tokenizer=has_text)
    encoded = [(number, *_encoded(prompt, texts, chosen.tokenizer)) for number, prompt, texts in questions]
    length = max(len(prompt) + max(map(len, texts)) for _, prompt, texts in encoded)
    rows = min(MAX_ROWS, max(len(texts) for _, _, texts in encoded))
    shape = RunShape(prompt=length, text=length, least=2, scored=CHUNK, rows=rows)
    model, ops, which = load_model(chosen, shape, options.reference)
    print(f"llama3_raw: {which}", file=sys.stderr)
    for number, prompt, texts in encoded:
        try:
            scores = score(model, prompt, texts, ops=ops)
        except UserError as error:
            raise UserError(f"{options.score}: line {number}: {error}") from error
        print(json.dumps({"scores": [_as_json(*pair) for pair in zip(texts, scores, strict=True)]}), flush=True)


def _as_json(ids: Sequence[int], scored: ContinuationScore) -> dict[str, Any]:
    return {"logprob": scored.total, "is_greedy": scored.is_greedy, "tokens": list(ids), "logprobs": scored.logprobs}


Written = str | list[int]
"""A text, or token ids."""


def _question(file: str, number: int, line: str) -> tuple[Written, list[Written]]:
    """Return the prompt and the continuations of a line. Raises UserError for anything else."""
    try:
        given = json.loads(line)
    except ValueError as error:
        raise UserError(f"{file}: line {number}: not JSON ({in_short(error)})") from error
    if not isinstance(given, dict) or given.keys() != {"prompt", "continuations"}:
        raise UserError(f'{file}: line {number}: should be {{"prompt": …, "continuations": [… , …]}}')
    prompt, texts = given["prompt"], given["continuations"]
    parts = [prompt, *texts] if isinstance(texts, list) and texts else [None]
    is_text = all(isinstance(part, str) for part in parts)
    is_ids = all(isinstance(part, list) and all(type(token) is int for token in part) for part in parts)
    if not (is_text or is_ids) or not all(parts[1:]):
        raise UserError(
            f"{file}: line {number}: prompt should be a text and continuations a list of texts, or all of them lists "
            "of token ids, and no continuation empty"
        )
    return prompt, texts


def _encoded(prompt: Written, texts: list[Written], tokenizer: Tokenizer | None) -> tuple[list[int], list[list[int]]]:
    """Return token ids. A text is encoded with the prompt before it, and cut where the prompt's own tokens end.

    Space at the end of the prompt goes to the continuations, as the tokens of a word begin with it. (lm-eval) Where a
    token would reach over the cut, the text is encoded alone.
    """
    if not isinstance(prompt, str):
        return prompt, [text for text in texts if not isinstance(text, str)]
    assert tokenizer is not None  # checked by choose_model
    kept = prompt.rstrip()
    space = prompt[len(kept) :]
    ids = tokenizer.encode(kept, bos=True)
    wholes = [(text, tokenizer.encode(f"{kept}{space}{text}", bos=True)) for text in texts]
    return ids, [
        whole[len(ids) :] if whole[: len(ids)] == ids else tokenizer.encode(f"{space}{text}") for text, whole in wholes
    ]


if __name__ == "__main__":
    sys.exit(main())
