"""Does a run fit into memory? If not, which options would make it fit?

On the CPU, weights are memory-mapped: the system drops their pages and reads them again as needed, so a model larger
than the memory runs, but slowly. Everything else (copied weights, the cache, activations) must fit, or the system kills
the process. With --gpu-layers both the GPU's memory and the CPU's count.
"""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Callable
from typing import NamedTuple

import psutil
import torch

from ..backends.cpu import QUERIES
from ..checkpoint.checkpoint import Checkpoint, check_quantize, first_layers
from ..checkpoint.loading import goes_to_gpu
from ..errors import UserError
from ..model import REFERENCE
from ..ops import PREFILL_CHUNK, score_bytes
from ..quantization.int8 import ROWS_AT_ONCE
from ..quantization.matrix import DEQUANTIZED_BYTES, FORMATS, nbytes_of
from ..system.machine import free_memory
from ..weights import TensorSpec, dtype_name, format_of

_CPU = torch.device("cpu")

_GPU_LIBRARIES = 500_000_000  # bytes that cuBLAS and other libraries allocate

_CPU_LIBRARIES = 100_000_000  # bytes that torch's libraries allocate (measured: 70e6 with a prompt of 256 tokens)


class RunShape(NamedTuple):
    """The lengths of a run, in tokens."""

    prompt: int  # computed in one prefill
    text: int  # prompt and everything that may be generated
    least: int  # the shortest text that would still be useful, for suggestions
    scored: int = 0  # tokens whose logits are all in memory at once
    rows: int = 1  # texts of this length at a time
    generated: int = 0  # tokens of one text, at most; they decide only whether a copy pays

    @staticmethod
    def of_one_pass(length: int) -> RunShape:
        """Return the shape of one pass over a prompt, with nothing generated."""
        return RunShape(prompt=length, text=length, least=length, scored=length)


class MemoryPlan(NamedTuple):
    """What decides how much memory a run needs."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype | None  # None: as stored
    shape: RunShape
    max_ram: int | None = None  # limit for the whole process, in bytes; None: what is free
    quantize: str | None = None  # round matrices to this format while loading; None: leave them
    gpu_layers: int | None = None  # the first n layers have their matrices on the GPU; None: all
    made: bool = False  # random weights, not mapped from a file
    exact: bool = False  # the exact operations, which need more on a GPU; on the CPU both are counted alike
    repack: bool = False  # copy the matrices in GGML's blocks, interleaved, into allocated memory


class MemoryUse(NamedTuple):
    """The memory that a run needs, in bytes."""

    mapped: int  # memory-mapped weights; only on the CPU
    copied: int  # weights in allocated memory
    cache: int  # the KV cache of the whole text
    work: int  # activations and logits
    in_ram: int = 0  # weights in allocated CPU memory, if the run is on a GPU

    @property
    def allocated(self) -> int:
        """What the system cannot drop and read again, on the device of the run."""
        return self.copied + self.cache + self.work


def needed(plan: MemoryPlan) -> MemoryUse:
    """Return the memory that a run needs."""
    checkpoint, device, dtype, shape, _, quantize, gpu_layers, made, exact, _ = plan
    params = checkpoint.params
    itemsize = (dtype or checkpoint.dtype).itemsize
    mapped = copied = in_ram = 0
    output = format_of("output", quantize)
    if output and checkpoint.tied:  # an output matrix as well as the embeddings
        copied += sum(nbytes_of(output, place.shape) for place in checkpoint.shards if place.field == "tok_embeddings")
    for place in checkpoint.shards:
        n_bytes, changed = _loaded(plan, place)
        home = device if goes_to_gpu(place, checkpoint.tied, gpu_layers) else _CPU
        if home.type != "cpu" or (changed and home == device) or made:
            copied += n_bytes
        elif changed:
            in_ram += n_bytes
        elif place.field != "tok_embeddings" or checkpoint.tied:  # a prompt reads only a few rows of it
            mapped += n_bytes
    per_position = params.head_dim * itemsize
    cache = 2 * params.n_layers * shape.rows * shape.text * params.n_kv_heads * per_position
    chunk = min(REFERENCE.prefill_chunk, shape.prompt)
    rows = shape.rows
    if device.type == "cuda" and not exact:
        n_rep = params.n_heads // params.n_kv_heads  # a block's mask, as bool and in dtype; flash attention has none
        attention = min(QUERIES, shape.prompt) * n_rep * rows * shape.text * (1 + 2 * itemsize)
        longest = max(params.hidden_dim, params.vocab_size)
        is_rounded = quantize or checkpoint.is_quantized
        dequantized = min(DEQUANTIZED_BYTES, longest * params.dim * itemsize) if is_rounded else 0
    else:
        scores = max(chunk * shape.prompt, rows * shape.text) * params.n_heads * score_bytes(itemsize)
        # keys and values repeated for every query head, before and after the transpose
        repeated = 4 * rows * shape.text * params.n_heads * per_position
        attention = scores + repeated
        by_torch = checkpoint.blocks or "int4" in (quantize, checkpoint.format)
        dequantized = ROWS_AT_ONCE * max(params.hidden_dim, params.dim) * (8 + itemsize) if by_torch else 0
    hidden = 3 * min(PREFILL_CHUNK, rows * shape.prompt) * params.hidden_dim * itemsize
    with_logits = rows if rows > 1 else min(chunk, shape.scored)
    logits = with_logits * params.vocab_size * (itemsize + 4 + 4)  # as computed, in fp32, as log-probabilities
    work = attention + dequantized + hidden + logits + (0 if device.type == "cpu" else _GPU_LIBRARIES)
    return MemoryUse(mapped, copied, cache, work, in_ram)


def _loaded(plan: MemoryPlan, place: TensorSpec) -> tuple[int, bool]:
    """Return the bytes of a tensor when it is loaded, and whether they need other memory than the mapped file."""
    checkpoint, parts = plan.checkpoint, plan.checkpoint.shards[place]
    to_format = format_of(place.field, plan.quantize)
    if to_format:
        return nbytes_of(to_format, place.shape), True
    if place in checkpoint.formats or place in checkpoint.blocks:
        rows_only = place.field == "tok_embeddings" and not checkpoint.tied
        is_repacked = plan.repack and place in checkpoint.blocks and not rows_only
        return sum(part.nbytes for part in parts), is_repacked or checkpoint.needs_copy(place)
    dtype = plan.dtype or checkpoint.dtype
    return torch.Size(place.shape).numel() * dtype.itemsize, dtype != parts[0].dtype or checkpoint.needs_copy(place)


def available(plan: MemoryPlan, free: Callable[[torch.device], int] = free_memory) -> int:
    """Return the bytes a run may use beyond what this process has; negative if it is over `max_ram` already."""
    if plan.max_ram is None:
        return free(plan.device)
    page_tables = needed(plan).mapped * 8 // mmap.PAGESIZE  # page tables stay when pages are dropped
    used = int(psutil.Process().memory_info().rss) + page_tables + _CPU_LIBRARIES
    return min(free(plan.device), plan.max_ram - used)


def memory_for_weights(plan: MemoryPlan) -> int:
    """Return how many bytes of mapped weights may be in memory at a time, next to everything that is allocated."""
    return available(plan) - needed(plan).allocated


def check_memory(plan: MemoryPlan, free: Callable[[torch.device], int] = free_memory) -> str | None:
    """Return None if the run fits, or a warning if its mapped weights are larger than the memory.

    Raises UserError with suggestions if it does not fit, or if a run with `max_ram` would copy weights.
    """
    if plan.max_ram is not None:
        _check_mapped(plan)

    def fits(plan: MemoryPlan) -> bool:
        return needed(plan).allocated <= free(plan.device) and needed(plan).in_ram <= free(_CPU)

    def stays(plan: MemoryPlan) -> bool:
        needs, has = _ram(plan, free)
        return fits(plan) and needs <= has

    need = needed(plan)
    source = plan.checkpoint.source
    if not fits(plan):
        dtype = plan.quantize or plan.checkpoint.format or dtype_name(plan.dtype or plan.checkpoint.dtype)
        parts, device = f"weights in {dtype} {_gb(need.copied)}", plan.device
        texts = f"{plan.shape.rows} texts of " if plan.shape.rows > 1 else ""
        parts += f", a cache for {texts}{plan.shape.text} tokens {_gb(need.cache)}, activations {_gb(need.work)}"
        needs = need.allocated
        if needs <= free(device):
            needs, device, parts = need.in_ram, _CPU, f"weights in {dtype} of the layers that are not on {device}"
        suggestions = _suggestions(plan, fits)
        raise UserError(
            f"{source}: {_gb(needs)} are needed on {device} ({parts}), {_gb(free(device))} are free; "
            + (
                f"what fits: {', or '.join(suggestions)}"
                if suggestions
                else "no option makes it fit, choose a smaller model"
            )
        )
    if stays(plan):
        return None
    needs, has = _ram(plan, free)
    suggestions = _suggestions(plan, stays)
    return (
        f"{source}: {_gb(needs)} are needed, {_gb(has)} are free, so each token reads weights from the disk "
        f"again; what fits: {', or '.join(suggestions) or 'a smaller model'}"
    )


def _ram(plan: MemoryPlan, free: Callable[[torch.device], int]) -> tuple[int, int]:
    """Return the bytes of CPU memory that a run needs, mapped weights included, and those it may use."""
    need = needed(plan)
    if plan.device.type == "cpu":
        return need.mapped + need.allocated, available(plan, free)
    return need.mapped + need.in_ram, free(_CPU)


def _check_mapped(plan: MemoryPlan) -> None:
    """Raise UserError if a weight would be copied, because a copy cannot be dropped and read again."""
    checkpoint, device, dtype, _, _, quantize, *_ = plan
    if device.type != "cpu":
        raise UserError(f"--max-ram is for weights on the CPU; leave it out, or give --device cpu, not {device}")
    if plan.repack:
        raise UserError("--max-ram leaves the weights in their file, and --repack copies them; leave one out")
    for place, parts in checkpoint.shards.items():
        if quantize:
            raise UserError(
                f"--max-ram leaves the weights in their file; write them in {quantize} first, with --save-quantized "
                f"FOLDER --quantize {quantize}"
            )
        if dtype not in (None, parts[0].dtype) and place not in checkpoint.formats and place not in checkpoint.blocks:
            raise UserError(f"--max-ram leaves the weights in their file, as {parts[0].dtype}; leave --dtype out")
        if place in checkpoint.adapter:
            raise UserError("--max-ram leaves the weights in their file, and an adapter changes them; leave one out")
        if checkpoint.needs_copy(place):
            name, how = (
                (place.hf_name, "in another order") if checkpoint.hf else (place.meta_name, "joined from shards")
            )
            raise UserError(
                f"{checkpoint.source}: --max-ram leaves the weights in their file, but {name} would be copied, {how}; "
                "write it in Meta's format, in one file: python -m llama3_raw.convert SOURCE FOLDER --shards 1"
            )


def _suggestions(plan: MemoryPlan, fits: Callable[[MemoryPlan], bool]) -> list[str]:
    """Return the options of which each alone makes the run fit."""
    checkpoint, shape = plan.checkpoint, plan.shape
    suggestions = ["--no-repack"] if plan.repack and fits(plan._replace(repack=False)) else []
    quantize = _fitting_format(plan, fits)
    if quantize:
        suggestions.append(f"--quantize {quantize}")
    if plan.dtype and fits(plan._replace(dtype=None)):
        suggestions.append("no --dtype")
    elif fits(plan._replace(dtype=torch.bfloat16)):
        suggestions.append("--dtype bfloat16")
    if plan.device.type == "cuda" and not plan.made and not checkpoint.of_shard:
        numbers = range(checkpoint.params.n_layers, 0, -1)
        gpu_layers = next((number for number in numbers if fits(plan._replace(gpu_layers=number))), None)
        if gpu_layers:
            suggestions.append(f"--gpu-layers {gpu_layers}")
    if fits(plan._replace(device=_CPU, gpu_layers=None)):
        suggestions.append("--device cpu" + (" without --gpu-layers" if plan.gpu_layers else ""))
    fewer = range(1, shape.rows)
    rows = bisect.bisect_left(fewer, True, key=lambda rows: not fits(plan._replace(shape=shape._replace(rows=rows))))
    if rows:
        suggestions.append(f"--batch-size {fewer[rows - 1]}")
    shorter = range(shape.least, shape.text)
    count = bisect.bisect_left(
        shorter,
        True,
        key=lambda text: not fits(plan._replace(shape=shape._replace(prompt=min(shape.prompt, text), text=text))),
    )
    if count:
        suggestions.append(f"--context {shorter[count - 1]}")
    layers = bisect.bisect_left(
        range(1, checkpoint.params.n_layers),
        True,
        key=lambda number: not fits(plan._replace(checkpoint=first_layers(checkpoint, number))),
    )
    if layers and layers >= (plan.gpu_layers or 0):  # no more layers on the GPU than there are
        suggestions.append(f"--layers {layers}")
    return suggestions


def _fitting_format(plan: MemoryPlan, fits: Callable[[MemoryPlan], bool]) -> str | None:
    """Return the format to quantize to that makes the run fit, if there is one."""
    in_bf16 = (plan.dtype or plan.checkpoint.dtype) == torch.bfloat16
    if plan.device.type == "mps" or not in_bf16:
        return None
    names = (name for name in FORMATS if name != plan.quantize and _can_be(plan.checkpoint, name))
    return next((name for name in names if fits(plan._replace(quantize=name))), None)


def _can_be(checkpoint: Checkpoint, quantize: str) -> bool:
    try:
        check_quantize(checkpoint, quantize)
    except UserError:
        return False
    return True


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
