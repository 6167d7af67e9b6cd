"""Whether a model fits: what a run of it needs, and what would fit instead of one that does not.

On the CPU the weights are windows into their files, whose pages the system drops and reads again as it must: a model
that is larger than the memory runs, only slowly. What a run has of its own (copied weights, the cache, what a layer
makes on its way) has to fit, or the system kills the process.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import NamedTuple

import torch

from .errors import UserError
from .generation import PREFILL_CHUNK
from .machine import free_memory
from .weights import Checkpoint, first_layers

_GPU_LIBRARIES = 500_000_000  # bytes that cuBLAS and the like take for themselves once they run


class Lengths(NamedTuple):
    """How long a text gets, in tokens."""

    prompt: int  # what is computed at once
    text: int  # with all that may be generated
    least: int  # the shortest that would still do
    scored: int = 0  # the most whose logits are all in memory at once, to see how likely each was


class Plan(NamedTuple):
    """A run of a model, as far as its memory goes; dtype None: as stored."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype | None
    lengths: Lengths


class Need(NamedTuple):
    """The memory that a run takes, in bytes."""

    mapped: int  # weights as they lie in their files; only on the CPU
    copied: int  # weights with memory of their own
    cache: int  # keys and values of the whole text
    work: int  # what a layer makes on its way

    @property
    def own(self) -> int:
        """What the system cannot drop and read again."""
        return self.copied + self.cache + self.work


def needed(plan: Plan) -> Need:
    """What the run of a plan takes."""
    checkpoint, device, dtype, lengths = plan
    params = checkpoint.params
    mapped = copied = itemsize = 0
    for place, parts in checkpoint.parts.items():
        itemsize = (dtype or parts[0].dtype).itemsize
        n_bytes = torch.Size(place.shape).numel() * itemsize
        if device.type != "cpu" or dtype not in (None, parts[0].dtype) or checkpoint.must_change(place):
            copied += n_bytes
        elif place.field != "tok_embeddings" or checkpoint.tied:  # else a prompt uses but a few of its rows
            mapped += n_bytes
    per_position = params.head_dim * itemsize
    cache = 2 * params.n_layers * lengths.text * params.n_kv_heads * per_position
    chunk = min(PREFILL_CHUNK, lengths.prompt)
    score_bytes = 12 if itemsize == 4 else 24  # measured; another dtype than fp32 has each score in fp32 as well
    scores = max(chunk * lengths.prompt, lengths.text) * params.n_heads * score_bytes
    repeated = 4 * lengths.text * params.n_heads * per_position  # keys and values for every head, and in other order
    hidden = 3 * chunk * params.hidden_dim * itemsize
    logits = min(chunk, lengths.scored) * params.vocab_size * (itemsize + 4 + 4)  # as computed, fp32, logarithms of p
    work = scores + repeated + hidden + logits + (0 if device.type == "cpu" else _GPU_LIBRARIES)
    return Need(mapped, copied, cache, work)


def check_memory(plan: Plan, free: Callable[[torch.device], int] = free_memory) -> str | None:
    """None where the plan fits; in words what is slow about it where its files are larger than the memory.

    Raises UserError where it does not fit, saying what would.
    """
    has = free(plan.device)
    need = needed(plan)
    source = plan.checkpoint.source
    if need.own > has:
        dtype = str(plan.dtype or next(iter(plan.checkpoint.parts.values()))[0].dtype).removeprefix("torch.")
        offers = _offers(plan, lambda other: needed(other).own <= free(other.device))
        raise UserError(
            f"{source}: {_gb(need.own)} are needed on {plan.device} (weights in {dtype} {_gb(need.copied)}, a cache "
            f"for {plan.lengths.text} tokens {_gb(need.cache)}, to work in {_gb(need.work)}), {_gb(has)} are free; "
            + (f"what fits: {', or '.join(offers)}" if offers else "nothing of it fits, take a smaller model")
        )
    if need.mapped + need.own <= has:
        return None
    offers = _offers(plan, lambda other: needed(other).mapped + needed(other).own <= free(other.device))
    return (
        f"{source}: {_gb(need.mapped + need.own)} are needed, {_gb(has)} are free, so that each token reads weights "
        f"from the disk again; what fits: {', or '.join(offers) or 'a smaller model'}"
    )


def _offers(plan: Plan, fits: Callable[[Plan], bool]) -> list[str]:
    """The options that turn the plan into one that fits, each by itself."""
    checkpoint, lengths = plan.checkpoint, plan.lengths
    offers = []
    if plan.dtype and fits(plan._replace(dtype=None)):
        offers.append("no --dtype")
    elif fits(plan._replace(dtype=torch.bfloat16)):
        offers.append("--dtype bfloat16")
    if fits(plan._replace(device=torch.device("cpu"))):
        offers.append("--device cpu")
    shorter = range(lengths.least, lengths.text)
    count = bisect.bisect_left(
        shorter,
        True,
        key=lambda text: not fits(plan._replace(lengths=lengths._replace(prompt=min(lengths.prompt, text), text=text))),
    )
    if count:
        offers.append(f"--context {shorter[count - 1]}")
    layers = bisect.bisect_left(
        range(1, checkpoint.params.n_layers),
        True,
        key=lambda number: not fits(plan._replace(checkpoint=first_layers(checkpoint, number))),
    )
    if layers:
        offers.append(f"--layers {layers}")
    return offers


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
