"""The options that several commands have, and what their values mean."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from ..decoding.prompt_lookup import MOST
from ..decoding.sampling import Sampling
from ..errors import UserError, in_short
from ..weights import DTYPES, in_words
from .entry_point import not_empty

DEFAULT_MODEL = "Meta-Llama-3-8B"

DTYPES_BY_NAME = {in_words(dtype): dtype for dtype in DTYPES.values()}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the group "model": which one, where and in what it computes, with how much memory and how many threads."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--weights",
        type=not_empty,
        metavar="MODEL",
        help="a folder, a name in weights/, or org/repo in the Hugging Face cache "
        f"(default: $LLAMA3_RAW_WEIGHTS, else weights/{DEFAULT_MODEL}, else the only model in weights/, else the "
        "small built-in one)",
    )
    group.add_argument(
        "--tokenizer", type=not_empty, metavar="FILE", help="a tokenizer.model (default: the one beside the weights)"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    group.add_argument("--dtype", choices=DTYPES_BY_NAME, help="compute in this (default: as the weights are stored)")
    group.add_argument("--layers", type=int, metavar="N", help="run only the first N layers")
    group.add_argument(
        "--gpu-layers",
        type=int,
        metavar="N",
        help="for a model that does not fit on the GPU: only the matrices of the first N layers go there, those of the "
        "others stay on the CPU and are computed with there (CUDA; default: all go there)",
    )
    group.add_argument(
        "--quantize", choices=("int8",), help="round the matrices to int8 as they are loaded: half the memory and time"
    )
    group.add_argument(
        "--max-ram",
        type=byte_size,
        metavar="SIZE",
        help="run in this much memory, all included (4GB, 3500MB, 3.5GiB): weights that do not fit are read from the "
        "disk for each token (CPU; default: what is free)",
    )
    group.add_argument(
        "--threads",
        type=positive_int,
        metavar="N",
        help="CPU threads (default: $OMP_NUM_THREADS, else the physical cores that this process may use, by its "
        "affinity and its container's quota)",
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Adds the prompt, --ids and --special, for tools that look at one pass over it."""
    parser.add_argument("prompt", nargs="?", help="the text; - reads it from stdin")
    group = parser.add_argument_group("text")
    group.add_argument("--ids", action="store_true", help="the prompt is token ids; needs no tokenizer")
    group.add_argument(
        "--special", action="store_true", help="names such as <|eot_id|> in the prompt are special tokens"
    )


def read_prompt(prompt: str | None, tool: str) -> str:
    """The prompt of a tool's command line; "-" reads it from stdin. Raises UserError where there is none."""
    if prompt is None:
        raise UserError(f'give a prompt: {tool} "Once upon a time", or - to read it from stdin')
    if prompt == "-":
        prompt = read_text("-").removesuffix("\n").removesuffix("\r")  # the line end that echo and editors add
    if not prompt:
        raise UserError("the prompt is empty; give at least one character")
    return prompt


def add_lookup_option(group: argparse._ArgumentGroup) -> None:
    """Adds --lookup. Its range is checked by `LookupPolicy` itself."""
    group.add_argument(
        "--lookup",
        type=int,
        default=0,
        metavar="N",
        help=f"propose up to N tokens, at most {MOST}, from earlier text and check them at once, where that is faster; "
        "the same tokens on a CPU in bfloat16, elsewhere up to rounding (default: 0, off)",
    )


def add_compile_option(group: argparse._ArgumentGroup) -> None:
    """Adds --no-compile."""
    group.add_argument(
        "--no-compile",
        action="store_true",
        help="on a GPU, run each pass step by step, so that a debugger can stop in it: slower, but for the first token",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Adds the settings of `Sampling`, and --seed. Their ranges are checked by `Sampling` itself."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest token (default: %(default)s)"
    )
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens (0: all)")
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="only the likeliest, up to P in sum (default: %(default)s)",
    )
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="only tokens P times as likely as the top")
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="make tokens seen before less likely (1: off)",
    )
    group.add_argument("--seed", type=seed, help="draw the same tokens each time")


def chosen_sampling(options: argparse.Namespace) -> Sampling:
    """What the options of `add_sampling_options` say. Raises UserError for what is out of range."""
    return Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
    )


def seed(text: str) -> int:
    """The type of --seed: what torch's generators take."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"should be from 0 to 2**63 - 1, is {value}")
    return value


def positive_int(text: str) -> int:
    """The type of options that count something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"should be 1 or more, is {value}")
    return value


def check_output(option: str, name: str) -> None:
    """Raises UserError, before the work is done, if `atomic_write` could not write a file of this name."""
    file = Path(name).resolve()
    if file.exists() and not file.is_file():
        raise UserError(f"{option} {name}: is not a file; choose another name")
    if file.exists() and not os.access(file, os.W_OK):
        raise UserError(f"{option} {name}: is read-only; choose another name, or remove it")
    if not file.parent.is_dir():
        raise UserError(f"{option} {name}: there is no folder {file.parent}; make it first")
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"{option} {name}: you may not write in {file.parent}; choose another place")


def read_text(file: str) -> str:
    """The text in a file; "-" reads it from stdin. Raises UserError where it cannot be read or is not UTF-8."""
    try:
        if file != "-":
            return Path(file).read_bytes().decode("utf-8")
        if sys.stdin is None:
            raise UserError("stdin is closed; give it a file by < FILE")
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        name = "stdin" if file == "-" else file
        raise UserError(f"{name}: not valid UTF-8 at byte {error.start}; convert the text to UTF-8") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; check its name and your rights to it") from error


def parse_ids(text: str, source: str) -> list[int]:
    """Token ids separated by spaces, commas or lines. Raises UserError naming the source for what is no such number."""
    words = re.split(r"[\s,]+", text.strip(" \t\r\n,[]"))
    for word in words:
        if not re.fullmatch(r"[0-9]{1,18}", word):
            raise UserError(f"{source}: {in_short(repr(word))} is not a token id; give numbers separated by spaces")
    return [int(word) for word in words]


def byte_size(text: str) -> int:
    """The type of options that give an amount of memory, in bytes: a number with its unit."""
    matched = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT])(i?)B", text, re.IGNORECASE)
    if not matched:
        raise argparse.ArgumentTypeError(f"should be a size such as 4GB, 3500MB or 3.5GiB, is {text!r}")
    number, prefix, binary = matched.groups()
    return int(float(number) * (1024 if binary else 1000) ** (1 + "KMGT".index(prefix.upper())))


def check_context(context: int | None, longest: int) -> None:
    """Raises UserError for a --context beyond the model's own, in tokens."""
    if context and context > longest:
        raise UserError(f"--context {context}: the model's own context is {longest} tokens")
