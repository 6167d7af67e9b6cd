"""The options that several commands share, and how their values are read."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, in_short
from .entry_point import not_empty
from .shown import DTYPES, FILE_FORMATS, MAX_DRAFT_TOKENS, QUANTIZED

if TYPE_CHECKING:
    from ..decoding.sampling import Sampling
    from ..tokenizer import Tokenizer

DEFAULT_MODEL = "Meta-Llama-3-8B"


def add_model_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the groups "model" (which, in what form) and "hardware" (where, in how much memory); return the second."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--weights",
        type=not_empty,
        metavar="MODEL",
        help="folder, *.gguf, name in weights/, cached org/repo (default: docs/cli.md)",
    )
    group.add_argument(
        "--format",
        choices=FILE_FORMATS,
        metavar="FORMAT",
        help="in a folder with both: original (Meta's files) or safetensors",
    )
    group.add_argument("--adapter", type=not_empty, metavar="FOLDER", help="merge a LoRA adapter of PEFT")
    group.add_argument(
        "--tokenizer",
        type=not_empty,
        metavar="FILE",
        help="tokenizer.model or .json (default: the model's own)",
    )
    group.add_argument("--dtype", choices=DTYPES, metavar="DTYPE", help=f"{', '.join(DTYPES)} (default: as stored)")
    group.add_argument(
        "--quantize",
        choices=QUANTIZED,
        metavar="FORMAT",
        help=f"round matrices to {' or '.join(QUANTIZED)} while loading",
    )
    group.add_argument(
        "--repack",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="copy a GGUF file's blocks for speed (CPU; default: if it pays and fits)",
    )
    group.add_argument("--layers", type=int, metavar="N", help="run only the first N layers")
    group = parser.add_argument_group("hardware")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    group.add_argument(
        "--gpu-layers", type=int, metavar="N", help="put only the first N layers' matrices on the GPU (CUDA)"
    )
    group.add_argument(
        "--max-ram",
        type=byte_size,
        metavar="SIZE",
        help="e.g. 4GB or 3.5GiB: weights that do not fit are read from the disk (CPU)",
    )
    group.add_argument(
        "--threads", type=positive_int, metavar="N", help="CPU threads (default: $OMP_NUM_THREADS, else physical cores)"
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return group


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add the prompt, --ids and --special, for commands that run one pass over a prompt."""
    parser.add_argument("prompt", nargs="?", help="the text; - reads it from stdin")
    group = parser.add_argument_group("prompt")
    group.add_argument("--ids", action="store_true", help="the prompt is token ids; needs no tokenizer")
    add_special_option(group)


def add_special_option(group: argparse._ArgumentGroup) -> None:
    """Add --special."""
    group.add_argument("--special", action="store_true", help="read <|eot_id|> and the like as special tokens")


def read_prompt(prompt: str | None, tool: str) -> str:
    """Return the prompt of a command line; "-" reads it from stdin. Raises UserError if there is none."""
    if prompt is None:
        raise UserError(f'give a prompt: {tool} "Once upon a time", or - to read it from stdin')
    if prompt == "-":
        prompt = read_text("-").removesuffix("\n").removesuffix("\r")  # the line end that echo and editors add
    if not prompt:
        raise UserError("the prompt is empty; give at least one character")
    return prompt


def add_stop_token_option(group: argparse._ArgumentGroup) -> None:
    """Add --stop-token."""
    group.add_argument(
        "--stop-token",
        action="append",
        default=[],
        type=not_empty,
        metavar="NAME|ID",
        help="stop at this token, too (repeatable)",
    )


def add_template_option(group: argparse._ArgumentGroup) -> None:
    """Add --template."""
    group.add_argument(
        "--template",
        type=not_empty,
        metavar="NAME|FILE",
        help="dialog format: llama3, or a chat template (default: the model's own)",
    )


def chosen_stop_ids(options: argparse.Namespace, tokenizer: Tokenizer | None, vocab_size: int) -> frozenset[int]:
    """Return the tokens of --stop-token, and those that a --stop text names. Raises UserError for an unknown one."""
    known = {**tokenizer.special_tokens, **tokenizer.added_tokens} if tokenizer else {}
    ids = {known[text] for text in getattr(options, "stop", ()) if text in known}
    for name in options.stop_token:
        if name in known:
            ids.add(known[name])
        elif re.fullmatch(r"[0-9]{1,9}", name) and int(name) < vocab_size:
            ids.add(int(name))
        else:
            close = difflib.get_close_matches(name, known, n=1)
            way_out = f"did you mean {close[0]}?" if close else f"give a special token, or an id below {vocab_size}"
            raise UserError(f"--stop-token {name}: the model has no such token; {way_out}")
    return frozenset(ids)


def add_lookup_option(group: argparse._ArgumentGroup) -> None:
    """Add --lookup. `LookupPolicy` checks its range."""
    group.add_argument(
        "--lookup",
        type=int,
        default=0,
        metavar="N",
        help=f"draft up to N tokens (at most {MAX_DRAFT_TOKENS}) from earlier text (default: 0, off)",
    )


def add_draft_option(group: argparse._ArgumentGroup) -> None:
    """Add --draft. `cli.drafts` reads it."""
    group.add_argument(
        "--draft",
        type=not_empty,
        metavar="MODEL",
        help="draft with a smaller model, int4 (a copy) or layers:N (the first N)",
    )


def add_compile_option(group: argparse._ArgumentGroup) -> None:
    """Add --no-compile."""
    group.add_argument(
        "--no-compile",
        action="store_true",
        help="on a GPU, run each pass eagerly: no CUDA graph, no torch.compile",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the settings of `Sampling`, and --seed. `Sampling` checks their ranges."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: the most likely token (default: %(default)s)"
    )
    group.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the K most likely tokens (0: all)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens with sum P (default: %(default)s)",
    )
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="drop tokens less than P times as likely as the top one"
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="make earlier tokens less likely (1: off)",
    )
    group.add_argument("--seed", type=seed, metavar="N", help="sample the same tokens each time")


def chosen_sampling(options: argparse.Namespace) -> Sampling:
    """Return the settings that `add_sampling_options` read. Raises UserError for a value out of range."""
    from ..decoding.sampling import Sampling  # not above: it imports torch

    return Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
    )


def seed(text: str) -> int:
    """Return the seed; the type of --seed, in the range of torch's generators."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"should be from 0 to 2**63 - 1, is {value}")
    return value


def positive_int(text: str) -> int:
    """Return the number; the type of options that count something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"should be 1 or more, is {value}")
    return value


def check_output(option: str, name: str) -> None:
    """Raise UserError, before any work is done, if `atomic_write` could not write this file."""
    file = Path(name).resolve()
    if file.exists() and not file.is_file():
        raise UserError(f"{option} {name}: is not a file; choose another name")
    if file.exists() and not os.access(file, os.W_OK):
        raise UserError(f"{option} {name}: is read-only; choose another name, or remove it")
    if not file.parent.is_dir():
        raise UserError(f"{option} {name}: there is no folder {file.parent}; create it first")
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"{option} {name}: you may not write in {file.parent}; choose another place")


def read_text(file: str) -> str:
    """Return the text of a file, without a byte order mark; "-" reads stdin.

    Raises UserError if it cannot be read or is not UTF-8.
    """
    try:
        if file == "-" and sys.stdin is None:
            raise UserError("stdin is closed; redirect a file to it with < FILE")
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        name = "stdin" if file == "-" else file
        raise UserError(f"{name}: not valid UTF-8 at byte {error.start}; convert the text to UTF-8") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; check its name and permissions") from error


def parse_ids(text: str, source: str) -> list[int]:
    """Return token ids separated by spaces, commas or lines. Raises UserError naming `source` for anything else."""
    words = re.split(r"[\s,]+", text.strip(" \t\r\n,[]"))
    for word in words:
        if not re.fullmatch(r"[0-9]{1,18}", word):
            raise UserError(f"{source}: {in_short(repr(word))} is not a token id; give numbers separated by spaces")
    return [int(word) for word in words]


def byte_size(text: str) -> int:
    """Return bytes; the type of options that give an amount of memory, a number with its unit."""
    matched = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT])(i?)B", text, re.IGNORECASE)
    if not matched:
        raise argparse.ArgumentTypeError(f"should be a size such as 4GB, 3500MB or 3.5GiB, is {text!r}")
    number, prefix, binary = matched.groups()
    return int(float(number) * (1024 if binary else 1000) ** (1 + "KMGT".index(prefix.upper())))


def check_context(context: int | None, longest: int) -> None:
    """Raise UserError for a --context beyond the model's own, in tokens."""
    if context and context > longest:
        raise UserError(f"--context {context}: the model's own context is {longest} tokens")
