"""What a long run wants besides the training itself: Ctrl-C at the right moment, and a picture of how it goes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from llama3_raw.errors import needed_package
from llama3_raw.system.files import atomic_write


@contextlib.contextmanager
def ctrl_c_noted() -> Iterator[list[int]]:
    """Within it Ctrl-C is only noted, in the list, so that a step is never left half done; a second one is as ever."""
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # in the background of a shell it is ignored, and stays so
        signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def draw_losses(training: Sequence[float], held_out: Sequence[tuple[int, float]], file: Path) -> None:
    """The loss curve as a picture: bits per byte against the step.

    training: one for each step. held_out: (step, bits per byte).
    """
    needed_package("matplotlib", "the loss curve", "examples")
    from matplotlib.figure import Figure

    losses = torch.tensor(training)
    width = max(1, len(losses) // 100)  # a single batch tells little: the mean of so many
    means = losses[: len(losses) // width * width].view(-1, width).mean(-1)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    at = width * torch.arange(1, len(means) + 1)
    axes.plot(at.numpy(), means.numpy(), color="#3b7dd8", label=f"training (mean of {width} steps)")
    axes.plot(*zip(*held_out, strict=True), "o-", color="#e8731a", markersize=4, label="held-out")
    axes.set(xlabel="step", ylabel="bits per byte", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(which="both", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_write(file) as part:
        figure.savefig(part, format="png", dpi=120)
