"""What every lesson begins with: a model chosen on the command line; and how it shows a tensor."""

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
from llama3_raw.cli.memory_plan import Lengths
from llama3_raw.cli.models import choose_model, load_model
from llama3_raw.cli.options import add_model_options, check_output

_LENGTHS = Lengths(prompt=64, text=256, least=64)  # tokens; no lesson takes a longer text


class Opened(NamedTuple):
    """What a lesson works on."""

    model: Any  # a Model, whose matrices are all plain tensors
    tokenizer: Tokenizer
    picture: Path | None  # where to draw; None: nowhere


def open_model(about: str | None, draws: bool = False) -> Opened:
    """The model that the command line names, the built-in one by default; on bad options the script ends in one line.

    about: the text of --help. draws: the lesson has a picture, which --picture FILE writes.
    """
    opened: list[Opened] = []

    @command_line_tool
    def open_it(arguments: Sequence[str]) -> int:
        parser = ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        if draws:
            parser.add_argument("--picture", type=not_empty, metavar="FILE", help="draw it too, as .png, .svg or .pdf")
        add_model_options(parser)
        options = parser.parse_args(arguments)
        picture = options.picture if draws else None
        if picture:
            check_output("--picture", picture)
        chosen = choose_model(options)
        if chosen.quantized or chosen.checkpoint.scales:
            raise UserError("the lessons compute with the matrices themselves, not with int8; take the model as it was")
        if chosen.gpu_layers is not None:
            raise UserError("the lessons compute on one device; leave --gpu-layers out")
        model, _, which = load_model(chosen, _LENGTHS, reference=True)
        print(f"llama3_raw: {which}", file=sys.stderr)
        assert model.tokenizer is not None  # choose_model has seen to it
        opened.append(Opened(model, model.tokenizer, Path(picture) if picture else None))
        return 0

    status = open_it()
    if status:
        sys.exit(status)
    if hasattr(signal, "SIGPIPE"):  # a reader that has seen enough (`| head`) ends the lesson without a word
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    return opened[0]


def save(figure: Figure, picture: Path) -> None:
    """Writes a figure where --picture says."""
    figure.savefig(picture, dpi=150)
    print(f"\n{picture}: drawn")


def show(name: str, tensor: Tensor) -> None:
    """Prints a tensor's name, shape and first few values."""
    values = ", ".join(f"{value:.4g}" for value in tensor.detach().flatten()[:4].tolist())
    print(f"  {name:<28} {list(tensor.shape)!s:<18} {values}{', …' if tensor.numel() > 4 else ''}")


def title(text: str) -> None:
    """Prints the title of a step."""
    print(f"\n{text}\n{'─' * len(text)}")
