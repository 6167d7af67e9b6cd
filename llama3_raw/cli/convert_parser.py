"""The options of `python -m llama3_raw.convert`; without torch, so that --help answers at once."""

from __future__ import annotations

from typing import Literal, get_args

from .entry_point import ArgumentParser, not_empty
from .options import positive_int
from .shown import FILE_FORMATS

AnyFormat = Literal["meta", "hf", "gguf"]


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m llama3_raw.convert`."""
    parser = ArgumentParser(
        prog="python -m llama3_raw.convert",
        description="Convert a model to another format, or another number of Meta's shards, with all values unchanged "
        "(unless --outtype rounds them).",
    )
    parser.add_argument(
        "source",
        type=not_empty,
        metavar="SOURCE",
        help="folder, name in weights/, GGUF file, or org/repo in the Hugging Face cache",
    )
    parser.add_argument("target", type=not_empty, metavar="TARGET", help="the folder to write, or a file NAME.gguf")
    parser.add_argument(
        "--format",
        choices=FILE_FORMATS,
        help="in a SOURCE with both: Meta's files (original) or Hugging Face's (default: those in the folder itself)",
    )
    parser.add_argument(
        "--to",
        choices=get_args(AnyFormat),
        help="Meta's format (params.json, consolidated.*.pth), Hugging Face's (config.json, *.safetensors) or "
        "llama.cpp's, a single file (default: gguf if TARGET ends in .gguf, else the one that SOURCE is not in; with "
        "--shards, Meta's)",
    )
    parser.add_argument(
        "--shards",
        type=positive_int,
        metavar="N",
        help="number of Meta's files (default: 1); Meta's own code supports at most as many as there are kv heads",
    )
    parser.add_argument(
        "--outtype",
        choices=[kind.lower() for kind in ("F32", "F16", "BF16", "Q8_0")],
        help="the type of the matrices in a GGUF file (default: as stored); q8_0 are blocks of 32 int8 with a scale",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the files back and compare each tensor with SOURCE, bit by bit; if TARGET exists, only compare",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
