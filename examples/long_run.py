"""Helpers for a long training run: Ctrl-C between steps, and a plot of the loss."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from llama3_raw.errors import needed_package
from llama3_raw.system.files import atomic_write


@contextlib.contextmanager
def deferred_ctrl_c() -> Iterator[list[int]]:
    """Append the first Ctrl-C to the yielded list instead of raising, so that a step always completes.

    A second Ctrl-C raises KeyboardInterrupt as usual.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a shell's background job ignores it, and should keep ignoring it
        signal.signal(signal.SIGINT, handle)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


def draw_losses(training: Sequence[float], held_out: Sequence[tuple[int, float]], file: Path) -> None:
    """Write a plot of the loss to a file: bits per byte against the step.

    training: one value for each step. held_out: pairs (step, bits per byte).
    """
    needed_package("matplotlib", "the loss curve", "examples")
    from matplotlib.figure import Figure

    losses = torch.tensor(training)
    width = max(1, len(losses) // 100)  # the loss of a single batch is noisy, so plot means over `width` steps
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
