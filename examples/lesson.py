"""Helpers for the lessons: open the model named on the command line, print titles and tensors."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from torch import Tensor

from llama3_raw import Tokenizer, UserError
from llama3_raw.cli.entry_point import ArgumentParser, command_line_tool, not_empty
from llama3_raw.cli.memory_plan import RunShape
from llama3_raw.cli.models import choose_model, load_model
from llama3_raw.cli.options import add_model_options, check_output

_SHAPE = RunShape(prompt=64, text=256, least=64)  # tokens; no lesson uses a longer text


class Opened(NamedTuple):
    """The model of a lesson, and the file for its figure."""

    model: Any  # a Model whose matrices are all plain tensors
    tokenizer: Tokenizer
    picture: Path | None  # None: draw nothing


def open_model(about: str | None, draws: bool = False) -> Opened:
    """Open the model named on the command line, by default the built-in one.

    Wrong options end the script with one line on stderr.

    about: the text of --help. draws: whether the lesson has a figure, which --picture FILE writes.
    """
    opened: list[Opened] = []

    @command_line_tool
    def open_it(arguments: Sequence[str]) -> int:
        parser = ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        if draws:
            parser.add_argument(
                "--picture", type=not_empty, metavar="FILE", help="write the figure to FILE: .png, .svg or .pdf"
            )
        add_model_options(parser)
        options = parser.parse_args(arguments)
        picture = options.picture if draws else None
        if picture:
            check_output("--picture", picture)
        chosen = choose_model(options)
        if chosen.quantize or chosen.checkpoint.format:
            raise UserError(
                f"the lessons need the original matrices, not {chosen.quantize or chosen.checkpoint.format}; use the "
                "model without quantization"
            )
        if chosen.gpu_layers is not None:
            raise UserError("the lessons run on one device; leave --gpu-layers out")
        model, _, which = load_model(chosen, _SHAPE, reference=True)
        print(f"llama3_raw: {which}", file=sys.stderr)
        assert model.tokenizer is not None  # choose_model checked it
        opened.append(Opened(model, model.tokenizer, Path(picture) if picture else None))
        return 0

    status = open_it()
    if status:
        sys.exit(status)
    if hasattr(signal, "SIGPIPE"):  # a closed pipe (`| head`) ends the lesson silently
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    return opened[0]


def save(figure: Figure, picture: Path) -> None:
    """Write a figure to the file of --picture."""
    figure.savefig(picture, dpi=150)
    print(f"\nwrote {picture}")


def show(name: str, tensor: Tensor) -> None:
    """Print a tensor's name, shape and first values."""
    values = ", ".join(f"{value:.4g}" for value in tensor.detach().flatten()[:4].tolist())
    print(f"  {name:<28} {list(tensor.shape)!s:<18} {values}{', …' if tensor.numel() > 4 else ''}")


def title(text: str) -> None:
    """Print the title of a step."""
    print(f"\n{text}\n{'─' * len(text)}")
