"""Whether a model fits: what a run of it needs, and what would fit instead of one that does not.

On the CPU the weights are windows into their files, whose pages the system drops and reads again as it must: a model
that is larger than the memory runs, only slowly. What a run has of its own (copied weights, the cache, what a layer
makes on its way) has to fit, or the system kills the process. With --gpu-layers there are two memories to fit.
"""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Callable
from typing import NamedTuple

import psutil
import torch

from ..backends.cpu import QUERIES
from ..backends.cuda import WIDENED_BYTES
from ..checkpoint.checkpoint import Checkpoint, first_layers
from ..checkpoint.loading import goes_to_gpu
from ..errors import UserError
from ..model import REFERENCE
from ..ops import PREFILL_CHUNK, score_bytes
from ..system.machine import free_memory
from ..weights import MATRICES, in_words

_CPU = torch.device("cpu")

_GPU_LIBRARIES = 500_000_000  # bytes that cuBLAS and the like take for themselves once they run

_CPU_LIBRARIES = 100_000_000  # bytes that torch's take then (measured: 70e6 with a prompt of 256 tokens)


class Lengths(NamedTuple):
    """How long a text gets, in tokens."""

    prompt: int  # what is computed at once
    text: int  # with all that may be generated
    least: int  # the shortest that would still do
    scored: int = 0  # the most whose logits are all in memory at once, to see how likely each was
    rows: int = 1  # texts at a time, each as long

    @staticmethod
    def of_one_pass(length: int) -> Lengths:
        """A prompt that is looked at as a whole, in one pass, and nothing behind it."""
        return Lengths(prompt=length, text=length, least=length, scored=length)


class Plan(NamedTuple):
    """A run of a model, as far as its memory goes."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype | None  # None: as stored
    lengths: Lengths
    max_ram: int | None = None  # bytes that the process may take in all; None: what is free
    quantized: bool = False  # matrices rounded to int8
    gpu_layers: int | None = None  # whose matrices lie on the GPU, those of the rest on the CPU; None: all of them
    made: bool = False  # random weights, which lie in no file
    exact: bool = False  # by the exact operations, which on a GPU need more; on the CPU all are taken to need as much


class Need(NamedTuple):
    """The memory that a run takes, in bytes."""

    mapped: int  # weights as they lie in their files; only on the CPU
    copied: int  # weights with memory of their own
    cache: int  # keys and values of the whole text
    work: int  # what a layer makes on its way
    in_ram: int = 0  # weights with memory of their own on the CPU, where the run is on a GPU

    @property
    def own(self) -> int:
        """What the system cannot drop and read again, on the device of the run."""
        return self.copied + self.cache + self.work


def needed(plan: Plan) -> Need:
    """What the run of a plan takes."""
    checkpoint, device, dtype, lengths, _, quantized, gpu_layers, made, exact = plan
    params = checkpoint.params
    itemsize = (dtype or checkpoint.dtype).itemsize
    mapped = copied = in_ram = 0
    if quantized and checkpoint.tied:  # output in int8, beside the embeddings
        copied += sum(torch.Size(place.shape).numel() for place in checkpoint.parts if place.field == "tok_embeddings")
    for place, parts in checkpoint.parts.items():
        stored = parts[0].dtype
        to_int8 = quantized and place.field in MATRICES
        is_int8 = to_int8 or place in checkpoint.scales
        n_bytes = torch.Size(place.shape).numel() * (1 if is_int8 else (dtype or stored).itemsize)
        changed = to_int8 or (not is_int8 and dtype not in (None, stored)) or checkpoint.must_change(place)
        home = device if goes_to_gpu(place, checkpoint.tied, gpu_layers) else _CPU
        if home.type != "cpu" or (changed and home == device) or made:
            copied += n_bytes
        elif changed:
            in_ram += n_bytes
        elif place.field != "tok_embeddings" or checkpoint.tied:  # else a prompt uses but a few of its rows
            mapped += n_bytes
    per_position = params.head_dim * itemsize
    cache = 2 * params.n_layers * lengths.rows * lengths.text * params.n_kv_heads * per_position
    chunk = min(REFERENCE.prefill_chunk, lengths.prompt)
    rows = lengths.rows
    if device.type == "cuda" and not exact:
        sharing = params.n_heads // params.n_kv_heads  # a block's mask, once and in the dtype; flash attention has none
        attention = min(QUERIES, lengths.prompt) * sharing * rows * lengths.text * (1 + 2 * itemsize)
        longest = max(params.hidden_dim, params.vocab_size)
        widened = min(WIDENED_BYTES, longest * params.dim * itemsize) if quantized or checkpoint.scales else 0
    else:
        scores = max(chunk * lengths.prompt, rows * lengths.text) * params.n_heads * score_bytes(itemsize)
        repeated = (
            4 * rows * lengths.text * params.n_heads * per_position
        )  # keys and values for every head, in new order
        attention, widened = scores + repeated, 0
    hidden = 3 * min(PREFILL_CHUNK, rows * lengths.prompt) * params.hidden_dim * itemsize
    with_logits = rows if rows > 1 else min(chunk, lengths.scored)
    logits = with_logits * params.vocab_size * (itemsize + 4 + 4)  # as computed, fp32, logarithms of p
    work = attention + widened + hidden + logits + (0 if device.type == "cpu" else _GPU_LIBRARIES)
    return Need(mapped, copied, cache, work, in_ram)


def available(plan: Plan, free: Callable[[torch.device], int] = free_memory) -> int:
    """What a run may take beside what this process has, in bytes; less than 0 where that is more than `max_ram`."""
    if plan.max_ram is None:
        return free(plan.device)
    page_tables = needed(plan).mapped * 8 // mmap.PAGESIZE  # which stay when the pages go
    taken = int(psutil.Process().memory_info().rss) + page_tables + _CPU_LIBRARIES
    return min(free(plan.device), plan.max_ram - taken)


def memory_for_weights(plan: Plan) -> int:
    """How many bytes the mapped weights of a plan may take at a time, beside all that the run has of its own."""
    return available(plan) - needed(plan).own


def check_memory(plan: Plan, free: Callable[[torch.device], int] = free_memory) -> str | None:
    """None where the plan fits; in words what is slow about it where its files are larger than the memory.

    Raises UserError where it does not fit, saying what would, and where a plan with a `max_ram` would copy weights.
    """
    if plan.max_ram is not None:
        _check_mapped(plan)

    def fits(plan: Plan) -> bool:
        return needed(plan).own <= free(plan.device) and needed(plan).in_ram <= free(_CPU)

    def stays(plan: Plan) -> bool:
        takes, has = _ram(plan, free)
        return fits(plan) and takes <= has

    need = needed(plan)
    source = plan.checkpoint.source
    if not fits(plan):
        dtype = "int8" if plan.quantized else in_words(plan.dtype or plan.checkpoint.dtype)
        parts, device = f"weights in {dtype} {_gb(need.copied)}", plan.device
        texts = f"{plan.lengths.rows} texts of " if plan.lengths.rows > 1 else ""
        parts += f", a cache for {texts}{plan.lengths.text} tokens {_gb(need.cache)}, to work in {_gb(need.work)}"
        takes = need.own
        if takes <= free(device):
            takes, device, parts = need.in_ram, _CPU, f"weights in {dtype} of the layers that are not on {device}"
        offers = _offers(plan, fits)
        raise UserError(
            f"{source}: {_gb(takes)} are needed on {device} ({parts}), {_gb(free(device))} are free; "
            + (f"what fits: {', or '.join(offers)}" if offers else "nothing of it fits, take a smaller model")
        )
    if stays(plan):
        return None
    takes, has = _ram(plan, free)
    offers = _offers(plan, stays)
    return (
        f"{source}: {_gb(takes)} are needed, {_gb(has)} are free, so that each token reads weights from the disk "
        f"again; what fits: {', or '.join(offers) or 'a smaller model'}"
    )


def _ram(plan: Plan, free: Callable[[torch.device], int]) -> tuple[int, int]:
    """What a run takes of the CPU's memory with all weights that are mapped in it, and what it may take, in bytes."""
    need = needed(plan)
    if plan.device.type == "cpu":
        return need.mapped + need.own, available(plan, free)
    return need.mapped + need.in_ram, free(_CPU)


def _check_mapped(plan: Plan) -> None:
    """Raises UserError where a weight would have memory of its own, which cannot be let go and read again."""
    checkpoint, device, dtype, _, _, quantized, *_ = plan
    if device.type != "cpu":
        raise UserError(f"--max-ram is for weights on the CPU; leave it out, or give --device cpu, not {device}")
    for place, parts in checkpoint.parts.items():
        if quantized and place.field in MATRICES:
            raise UserError("--max-ram leaves the weights in their file; write them in int8 first, by --save-quantized")
        if dtype not in (None, parts[0].dtype) and place not in checkpoint.scales:
            raise UserError(f"--max-ram leaves the weights in their file, as {parts[0].dtype}; leave --dtype out")
        if checkpoint.must_change(place):
            name, how = (place.hf_name, "in other order") if checkpoint.hf else (place.meta_name, "joined from shards")
            raise UserError(
                f"{checkpoint.source}: --max-ram leaves the weights in their file, but {name} would be copied, {how}; "
                "get the model in Meta's format, in one file: python download.py --model NAME"
            )


def _offers(plan: Plan, fits: Callable[[Plan], bool]) -> list[str]:
    """The options that turn the plan into one that fits, each by itself."""
    checkpoint, lengths = plan.checkpoint, plan.lengths
    offers = []
    in_bf16 = (plan.dtype or checkpoint.dtype) == torch.bfloat16
    is_rounded = plan.quantized or checkpoint.scales
    can_quantize = plan.device.type != "mps" and in_bf16 and not is_rounded
    if can_quantize and fits(plan._replace(quantized=True)):
        offers.append("--quantize int8")
    if plan.dtype and fits(plan._replace(dtype=None)):
        offers.append("no --dtype")
    elif fits(plan._replace(dtype=torch.bfloat16)):
        offers.append("--dtype bfloat16")
    if plan.device.type == "cuda" and not plan.made and not checkpoint.of_shard:
        numbers = range(checkpoint.params.n_layers, 0, -1)
        gpu_layers = next((number for number in numbers if fits(plan._replace(gpu_layers=number))), None)
        if gpu_layers:
            offers.append(f"--gpu-layers {gpu_layers}")
    if fits(plan._replace(device=_CPU, gpu_layers=None)):
        offers.append("--device cpu" + (" without --gpu-layers" if plan.gpu_layers else ""))
    fewer = range(1, lengths.rows)
    rows = bisect.bisect_left(
        fewer, True, key=lambda rows: not fits(plan._replace(lengths=lengths._replace(rows=rows)))
    )
    if rows:
        offers.append(f"--batch-size {fewer[rows - 1]}")
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
    if layers and layers >= (plan.gpu_layers or 0):  # else that would be more than there are
        offers.append(f"--layers {layers}")
    return offers


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
