"""From options to a loaded model: which one, on which device, with which operations."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from ..backends.choose import ops_for
from ..backends.cpu import compiled_kernels
from ..backends.repacking import repack
from ..backends.streaming import least_memory, read_ahead
from ..backends.tensor_parallel import parallel_ops
from ..checkpoint.checkpoint import (
    Checkpoint,
    check_quantize,
    first_layers,
    open_checkpoint,
    shard_of,
    with_adapter,
)
from ..checkpoint.loading import build_weights, check_gpu_layers
from ..checkpoint.locate import BUILT_IN_MODEL, built_in_folder, find_named, local_models, name_of
from ..checkpoint.sharding import Shard
from ..checkpoint.text import end_tokens, find_tokenizer
from ..errors import UserError
from ..ops import Ops
from ..system.devices import usable_device
from ..system.machine import set_threads
from ..system.process_groups import Ranks
from ..system.processes import local_rank, world_size
from ..tokenizer import SPECIAL_TOKENS, Tokenizer
from ..weights import DTYPES, Model, Weights, dtype_name
from .memory_plan import MemoryPlan, RunShape, available, check_memory, memory_for_weights, needed
from .options import DEFAULT_MODEL, parse_ids

DTYPES_BY_NAME = {dtype_name(dtype): dtype for dtype in DTYPES.values()}

REPACK_FROM = 64  # tokens to generate, for which the copy pays (docs/benchmarks.md, "GGUF")

PROGRESS_BAR_FROM = 1_000_000_000  # bytes of weights; smaller models load too fast for a bar


class ModelFolder(NamedTuple):
    """A folder with a model, and why it was chosen, as text."""

    path: Path
    why: str


class ChosenModel(NamedTuple):
    """A model to load, and how."""

    folder: ModelFolder
    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    device: torch.device
    dtype: torch.dtype | None  # None: as stored
    max_ram: int | None  # bytes; None: what is free
    quantize: str | None  # round matrices to this format while loading; None: leave them
    gpu_layers: int | None = None  # the first n layers have their matrices on the GPU; None: all
    random_seed: int | None = None  # make random weights; None: the folder's
    repack: bool | None = None  # copy GGML's blocks for speed; None: if it pays

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        return end_tokens(self.checkpoint, self.tokenizer)


def chosen_ids(chosen: ChosenModel, prompt: str, *, are_ids: bool = False, special: bool = False) -> list[int]:
    """Return the token ids of a prompt, for a command that runs one pass over it.

    are_ids, special: the options of `add_prompt_options`. Raises UserError for ids that the model does not have.
    """
    if are_ids:
        ids = parse_ids(prompt, "--ids")
    else:
        assert chosen.tokenizer is not None  # checked by choose_model
        ids = chosen.tokenizer.encode(prompt, bos=True, allow_special=special)
    params = chosen.checkpoint.params
    params.check_ids(ids)
    if len(ids) > params.max_seq_len:
        raise UserError(f"the prompt has {len(ids)} tokens, the model's context is {params.max_seq_len}; shorten it")
    return ids


def choose_model(options: argparse.Namespace, needs_tokenizer: bool = True, named_by: str = "--weights") -> ChosenModel:
    """Return the model named by the options of `add_model_options`, checked, with its weights not yet read.

    needs_tokenizer: raise if the folder has no tokenizer that fits. named_by: the option that options.weights came
    from. Raises UserError.
    """
    set_threads(options.threads)
    if options.debug:
        logging.basicConfig(format="llama3_raw: %(message)s")
        logging.getLogger("llama3_raw").setLevel(logging.DEBUG)
    device = choose_device(options.device)
    folder = find_model(options.weights, named_by)
    checkpoint = open_checkpoint(folder.path, options.format)
    if checkpoint.choice and not options.format:
        folder = folder._replace(why=f"{folder.why}; {checkpoint.choice}")
    if options.adapter:
        checkpoint = with_adapter(checkpoint, Path(options.adapter))
        folder = folder._replace(why=f"{folder.why}; with the adapter {options.adapter}")
    check_quantize(checkpoint, options.quantize)
    dtype = DTYPES_BY_NAME.get(options.dtype)
    check_fast(checkpoint, options.quantize, device, dtype)
    # of another model than --weights it was not said, and that may have no blocks
    wants_copy = None if options.repack and named_by != "--weights" else options.repack
    if wants_copy:
        _check_repack(checkpoint, device, dtype)
    if options.layers is not None:
        checkpoint = first_layers(checkpoint, options.layers)
    check_gpu_layers(options.gpu_layers, device, checkpoint.params)
    try:
        tokenizer = find_tokenizer(checkpoint, options.tokenizer)
    except UserError:
        if needs_tokenizer or options.tokenizer:
            raise
        tokenizer = None
    if tokenizer is None and needs_tokenizer:
        raise UserError(
            f"{folder.path}: there is no tokenizer.model or tokenizer.json; give --tokenizer FILE, or the text as "
            "token ids"
        )
    return ChosenModel(
        folder,
        checkpoint,
        tokenizer,
        device,
        dtype,
        options.max_ram,
        options.quantize,
        options.gpu_layers,
        repack=wants_copy,
    )


def check_fast(checkpoint: Checkpoint, quantize: str | None, device: torch.device, dtype: torch.dtype | None) -> None:
    """Raise UserError where matrices in int8 or int4, by --quantize or by the folder, would be slow."""
    name, dtype = quantize or checkpoint.format, dtype or checkpoint.dtype
    if quantize and device.type == "mps":
        raise UserError(
            f"--quantize {quantize} is for CPUs and NVIDIA GPUs; leave it out, or give --device cpu, not {device}"
        )
    if name and dtype != torch.bfloat16:
        raise UserError(f"{name} matrices are fast in bfloat16 only, not in {dtype_name(dtype)}; give --dtype bfloat16")


def load_model(
    chosen: ChosenModel, shape: RunShape, reference: bool = False, ranks: Ranks | None = None
) -> tuple[Model, Ops, str]:
    """Load the model for a run of this shape; return it, its operations, and a line of text that names it.

    reference: use the exact operations instead of the fastest ones. ranks: the processes that share the model; this
    one loads its shard. The command prints the line after all checks, so that an error stays one line. Prints a
    warning if the model is larger than the memory. Raises UserError if the run does not fit.
    """
    folder, checkpoint, tokenizer, device, dtype, max_ram, quantize, gpu_layers, *_ = chosen
    if ranks is not None:
        checkpoint = _own_shard(chosen, ranks)
    plan = MemoryPlan(checkpoint, device, dtype, shape, max_ram, quantize, gpu_layers, exact=reference)
    wanted = _repacks(plan) if chosen.repack is None else chosen.repack and not reference
    plan = plan._replace(repack=wanted and compiled_kernels() is not None)
    warning = check_memory(plan)
    if ranks is not None:
        ranks.everyone.barrier()  # loading takes memory: every rank must have checked what is free
    if warning and max_ram is None:
        print(f"llama3_raw: warning: {warning}", file=sys.stderr)
    weight_bytes = memory_for_weights(plan)  # asked before they are read
    size = sum(part.nbytes for parts in checkpoint.shards.values() for part in parts)
    # weights larger than the memory are not read in advance: they would not stay
    with_bar = size >= PROGRESS_BAR_FROM and (quantize is not None or not warning)
    weights = build_weights(checkpoint, device, dtype, with_bar, quantize, gpu_layers)
    if plan.repack:
        weights = repack(weights, are_mapped=True, progress=with_bar)
    ops = ops_for(weights, exact=reference)
    if ranks is not None and ranks.tensor.size > 1:
        ops = parallel_ops(ops, weights, ranks.tensor)
    if max_ram is not None:
        ops = _limited(ops, weights, weight_bytes, max_ram, checkpoint.source)
    which = f"{folder.path} ({folder.why}) on {_where(chosen, ranks)}"
    begin_of_text = SPECIAL_TOKENS[0]
    if tokenizer is not None and tokenizer.bos_id is None and begin_of_text in tokenizer.special_tokens:
        which += f"; its tokenizer begins no text with {begin_of_text}"
    model = Model(weights, chosen.checkpoint.params, tokenizer, chosen.stop_ids, name_of(folder.path))
    return model, ops, which


def _check_repack(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None) -> None:
    """Raise UserError where --repack would do nothing."""
    if not checkpoint.blocks:
        raise UserError("--repack is for a GGUF file in blocks, such as Q4_K_M; leave it out")
    if not _is_for_kernels(checkpoint, device, dtype):
        raise UserError("--repack is for the CPU's kernels in bfloat16; leave it out, or --device and --dtype")


def _is_for_kernels(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None) -> bool:
    return device.type == "cpu" and (dtype or checkpoint.dtype) == torch.bfloat16


def _repacks(plan: MemoryPlan) -> bool:
    """Whether to repack without being asked: a text is generated from blocks on the CPU, and the copy fits."""
    checkpoint, shape = plan.checkpoint, plan.shape
    is_fast = _is_for_kernels(checkpoint, plan.device, plan.dtype)
    if not checkpoint.blocks or not is_fast or plan.exact or plan.max_ram is not None or shape.generated < REPACK_FROM:
        return False
    return needed(plan._replace(repack=True)).allocated <= 0.9 * available(plan)  # which other programs may change


def _own_shard(chosen: ChosenModel, ranks: Ranks) -> Checkpoint:
    """Return this process's shard of the checkpoint. Raises UserError for options of a single process."""
    for option, value in (("max-ram", chosen.max_ram), ("gpu-layers", chosen.gpu_layers)):
        if value is not None:
            raise UserError(f"--{option} is for a model in one process; leave it out, or run it without torchrun")
    return shard_of(chosen.checkpoint, Shard(ranks.tensor.rank, ranks.tensor.size))


def _limited(ops: Ops, weights: Weights, weight_bytes: int, max_ram: int, source: str) -> Ops:
    """Return operations that keep `weight_bytes` of the weights in memory. Raises UserError with the least max_ram."""
    missing = least_memory(weights) - weight_bytes
    if missing > 0:
        least = math.ceil((max_ram + missing + 5_000_000) / 1e7) / 100  # GB; the next run may start slightly larger
        raise UserError(
            f"{source}: --max-ram is too small; it needs --max-ram {least:.2f}GB, or less for a shorter text"
        )
    return read_ahead(ops, weights, weight_bytes)


def _where(chosen: ChosenModel, ranks: Ranks | None) -> str:
    """Return where a model runs, as text."""
    where = str(chosen.device)
    if chosen.gpu_layers is not None:
        where += f" (the matrices after the first {chosen.gpu_layers} layers on the CPU)"
    if ranks is not None:
        where += f", shared by {ranks.tensor.size} processes" if ranks.tensor.size > 1 else ""
        where += f", {ranks.data.size} times" if ranks.data.size > 1 else ""
    return where


def choose_device(name: str) -> torch.device:
    """Return the device that --device names, or the best one for "auto". Raises UserError if it is not available."""
    if name == "auto":
        has_mps = torch.backends.mps.is_available() and world_size() == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name == "cuda" and world_size() > 1:
        name = f"cuda:{local_rank()}"  # a GPU for each process
    device = usable_device(name)
    if device.type == "mps" and world_size() > 1:
        raise UserError("--device mps: is for one process; give --device cpu, or run it without torchrun")
    return device


def find_model(weights: str | None = None, named_by: str = "--weights") -> ModelFolder:
    """Return the folder that --weights names; for None, the default. Raises UserError listing what is available."""
    if weights:
        return ModelFolder(find_named(weights, named_by), named_by)
    from_environment = os.environ.get("LLAMA3_RAW_WEIGHTS")
    if from_environment:
        return ModelFolder(find_named(from_environment, "$LLAMA3_RAW_WEIGHTS"), "$LLAMA3_RAW_WEIGHTS")
    there = local_models()
    if DEFAULT_MODEL in there:
        return ModelFolder(there[DEFAULT_MODEL], "the default")
    others = [name for name in there if name != BUILT_IN_MODEL]
    if len(others) > 1:
        raise UserError(f"several models in weights/: {', '.join(others)}; choose one with --weights NAME")
    if others:
        return ModelFolder(there[others[0]], "the only model in weights/")
    return ModelFolder(built_in_folder(), "the small built-in model; choose another with --weights")
