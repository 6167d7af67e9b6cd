"""Baselines: other engines on the same weights, such as Hugging Face's transformers and llama.cpp.

Each is an `Engine`. They run one after the other in the same minute, on the CPU with the number of threads that torch
uses; transformers also runs on a GPU. Each is asked for the next token only.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.checkpoint import first_layers
from ..checkpoint.loading import build_weights
from ..cli.memory_plan import MemoryPlan, RunShape, needed
from ..cli.models import ChosenModel
from ..compare.references import hf_model
from ..errors import UserError, in_short, needed_package
from ..system.machine import free_memory
from ..weights import Model, Weights
from .engines import TWO_PROCESSES, Engine, ThisEngine, bytes_per_token, random_ids, two_processes
from .llama_cpp import LLAMA_CPP, check_types, gguf_files, is_llama_cpp, open_llama_cpp, own_gguf, relative_size
from .roofline import seconds_of
from .synthetic import random_weights

TRANSFORMERS, TRANSFORMERS_COMPILED, STORED = "transformers", "transformers-compiled", "stored"
BASELINES = (TRANSFORMERS, TRANSFORMERS_COMPILED, LLAMA_CPP, f"{LLAMA_CPP}:TYPE", STORED, TWO_PROCESSES)
_ON_GPU = (TRANSFORMERS, TRANSFORMERS_COMPILED, STORED)


class Transformers:
    """LlamaForCausalLM on the model's own tensors, except wq and wk, whose rows it has in another order.

    It uses torch's attention (sdpa) in inference mode, and computes logits at the last position only. Its cache is the
    DynamicCache that its `generate` uses; on the CPU it is a StaticCache of the exact size, which is slightly faster
    there. `decode` fills the cache with random numbers and waits for the last token only.
    """

    name = TRANSFORMERS

    def __init__(self, model: Model, longest: int):
        self._transformers: Any = needed_package(TRANSFORMERS, "--vs transformers")
        self.version = f"transformers {self._transformers.__version__}"
        self.weights_bytes: int | None = bytes_per_token(model.weights)
        self._params, norm = model.params, model.weights.norm
        self._dtype, self._device = norm.dtype, norm.device
        self._ids = random_ids(model, longest)
        self.hf = hf_model(model, "sdpa")

    def prefill(self, length: int) -> float:
        cache = self._cache(length)
        return seconds_of(lambda: self._next(self._row(self._ids[:length]), cache), self._device)

    def decode(self, context: int, count: int) -> float:
        cache = self._cache(context + count)
        shape = (2, 1, self._params.n_kv_heads, context, self._params.head_dim)
        for layer in range(self._params.n_layers):
            keys, values = torch.randn(shape, dtype=self._dtype, device=self._device)
            cache.update(keys, values, layer)
        first = self._row(self._ids[:1])

        def run() -> None:
            token = first
            for _ in range(count):
                token = self._next(token, cache)

        return seconds_of(run, self._device)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """Return the tokens that follow the prompt, to check that it is the same model."""
        cache = self._cache(len(ids) + count)
        tokens = [self._next(self._row(ids), cache)]
        while len(tokens) < count:
            tokens.append(self._next(tokens[-1], cache))
        return [int(token) for token in tokens]

    def _row(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([ids], device=self._device)  # [1, T]

    def _cache(self, length: int) -> Any:
        if self._device.type == "cpu":
            return self._static_cache(length)
        return self._transformers.DynamicCache(config=self.hf.config)

    def _static_cache(self, length: int) -> Any:
        return self._transformers.StaticCache(config=self.hf.config, max_cache_len=length)

    @torch.inference_mode()
    def _next(self, tokens: Tensor, cache: Any) -> Tensor:
        return _next_token(self.hf, tokens, cache)


def _next_token(network: Any, tokens: Tensor, cache: Any) -> Tensor:
    """Return the most likely token, [1, 1], after tokens [1, T] that follow those in the cache."""
    logits = network(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits  # [1, 1, vocab]
    return torch.argmax(logits, dim=-1)


class CompiledTransformers(Transformers):
    """The same, compiled, with a static cache: what transformers recommends for speed and its `generate` supports.

    The pass over one token is compiled by torch.compile in the mode "reduce-overhead" (on a GPU, a CUDA graph); prefill
    is not compiled. A graph is bound to the memory of its cache, which has the exact size and is kept for each length.
    Compiling is not timed.
    """

    name = TRANSFORMERS_COMPILED

    def __init__(self, model: Model, longest: int):
        super().__init__(model, longest)
        self.version += ", compiled, static cache"
        self._caches: dict[int, Any] = {}
        torch._dynamo.config.recompile_limit = 1000  # for the process: each length has its own graph
        self._compiled = torch.compile(_next_token, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def decode(self, context: int, count: int) -> float:
        if context + count not in self._caches:
            for _ in range(3):  # compile, warm up, capture
                super().decode(context, count)
        return super().decode(context, count)

    def _cache(self, length: int) -> Any:
        if length not in self._caches:
            cache = self._static_cache(length)
            cache.early_initialization(1, self._params.n_kv_heads, self._params.head_dim, self._dtype, self._device)
            self._caches[length] = cache
        self._caches[length].reset()
        return self._caches[length]

    @torch.no_grad()  # as in its own generate
    def _next(self, tokens: Tensor, cache: Any) -> Tensor:
        run = self._compiled if tokens.shape[-1] == 1 else _next_token
        try:
            return run(self.hf, tokens, cache).clone()  # a graph writes its result to the same memory each time
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(
                f"--vs {self.name}: torch.compile fails ({in_short(error)}); leave it out, or install what is missing"
            ) from error


def baseline_name(text: str) -> str:
    """Return the name of a baseline; the type of --vs."""
    if is_llama_cpp(text) and re.fullmatch(r":\w+", text.removeprefix(LLAMA_CPP)):
        return LLAMA_CPP + text.removeprefix(LLAMA_CPP).upper()
    if text in BASELINES:
        return text
    raise argparse.ArgumentTypeError(f"there is no baseline {text}; choose from {', '.join(BASELINES)}")


def memory_with_baselines(plan: MemoryPlan, baselines: Sequence[str]) -> int:
    """Return the bytes that this engine and the baselines need together, so that none evicts another's weights."""
    need, params = needed(plan), plan.checkpoint.params
    weights = need.mapped + need.copied
    itemsize = (plan.dtype or plan.checkpoint.dtype).itemsize
    wq_and_wk = params.n_layers * (params.n_heads + params.n_kv_heads) * params.head_dim * params.dim * itemsize
    stored = sum(needed(plan._replace(quantize=None))[:2])
    wo_and_w2 = params.n_layers * (params.n_heads * params.head_dim + params.hidden_dim) * params.dim * itemsize
    copied: dict[str, float] = {TRANSFORMERS: wq_and_wk, TRANSFORMERS_COMPILED: wq_and_wk, STORED: 0}
    copied[TWO_PROCESSES] = wo_and_w2  # each process copies its columns of them
    dtype = plan.dtype or plan.checkpoint.dtype
    copied |= {name: stored * relative_size(name, dtype) for name in baselines if is_llama_cpp(name)}
    if plan.quantize and not all(map(is_llama_cpp, baselines)):
        weights += stored
    return weights + int(sum(copied[name] for name in baselines)) + (1 + len(baselines)) * (need.cache + need.work)


def check_baselines(chosen: ChosenModel, shape: RunShape, names: Sequence[str]) -> None:
    """Raise UserError if the baselines cannot run the model on its device, or do not fit into the memory together."""
    for name in names:
        if chosen.device.type != "cpu" and not (chosen.device.type == "cuda" and name in _ON_GPU):
            raise UserError(f"--vs {name} runs on the CPU only, but the device is {chosen.device}; give --device cpu")
    if names:
        _check_weights(chosen, names)
        check_types(names)
        _check_memory(chosen, shape, list(dict.fromkeys(names)))


def _check_weights(chosen: ChosenModel, names: Sequence[str]) -> None:
    """Raise UserError if the baselines cannot get the weights that they need."""
    checkpoint = chosen.checkpoint
    if checkpoint.blocks and (set(names) != {LLAMA_CPP} or own_gguf(chosen) is None):
        raise UserError(
            f"--vs {' '.join(names)}: a quantized GGUF file is compared with {LLAMA_CPP} on the same file; give --vs "
            f"{LLAMA_CPP} alone, all layers and no adapter"
        )
    if checkpoint.is_quantized and not checkpoint.blocks:
        raise UserError("--vs needs weights that are not quantized yet; give the original folder, and --quantize")
    if chosen.max_ram is not None:
        raise UserError("--vs needs all weights in memory for the other engines; leave --max-ram out")
    if TWO_PROCESSES in names and (chosen.quantize or chosen.random_seed is not None):
        raise UserError(
            f"--vs {TWO_PROCESSES} needs a model in files that is not quantized on loading; leave --quantize out, and "
            "give --weights FOLDER"
        )
    if STORED in names and not chosen.quantize:
        raise UserError(f"--vs {STORED} compares the weights as they are stored with those of --quantize; add it")


def _check_memory(chosen: ChosenModel, shape: RunShape, names: Sequence[str]) -> None:
    """Raise UserError if the engines do not fit into the memory together."""
    checkpoint = chosen.checkpoint
    free = free_memory(chosen.device) * 9 // 10  # the rest is for other programs, or pages would be evicted

    def memory_of(layers: int) -> int:
        fewer = first_layers(checkpoint, layers)
        made = chosen.random_seed is not None
        plan = MemoryPlan(fewer, chosen.device, chosen.dtype, shape, quantize=chosen.quantize, made=made)
        return memory_with_baselines(plan, names)

    n_layers = checkpoint.params.n_layers
    if memory_of(n_layers) <= free:
        return
    fitting = next((layers for layers in range(n_layers, 0, -1) if memory_of(layers) <= free), None)
    way_out = f"--layers {fitting} fits" if fitting else "choose a smaller model"
    evicted = ", and each would evict the other's weights" if chosen.device.type == "cpu" else ""
    raise UserError(
        f"--vs {' '.join(names)}: all engines together need {memory_of(n_layers) / 1e9:.1f} GB of memory, "
        f"{free / 1e9:.1f} GB are free{evicted}; {way_out}"
    )


def _stored(chosen: ChosenModel) -> Weights:
    """Return the weights before they are quantized; random ones are created again."""
    checkpoint, device, dtype = chosen.checkpoint, chosen.device, chosen.dtype
    if chosen.random_seed is None:
        return build_weights(checkpoint, device, dtype)
    return random_weights(checkpoint, device, dtype, chosen.random_seed)


@contextlib.contextmanager
def open_baselines(
    names: Sequence[str], chosen: ChosenModel, model: Model, gguf: str | None, longest: int
) -> Iterator[list[Engine]]:
    """Return the baselines of these names, ready to run the model. If it is quantized, they get the stored weights.

    gguf: as for `gguf_files`. Raises UserError if the package of a baseline is missing, and what `gguf_files` raises.
    """
    names = list(dict.fromkeys(names))
    with contextlib.ExitStack() as stack:
        if names and chosen.quantize:
            model = model._replace(weights=_stored(chosen))
        in_llama_cpp = list(filter(is_llama_cpp, names))
        files = stack.enter_context(gguf_files(in_llama_cpp, chosen, model, gguf)) if in_llama_cpp else {}

        def opened(name: str) -> Engine:
            if name == TRANSFORMERS:
                return Transformers(model, longest)
            if name == TRANSFORMERS_COMPILED:
                return CompiledTransformers(model, longest)
            if name == STORED:
                return ThisEngine(model, longest, name=STORED, version="the weights as they are stored")
            if name == TWO_PROCESSES:
                shared = (chosen.folder.path, model.params.n_layers, chosen.dtype, longest)
                return stack.enter_context(two_processes(*shared))
            return open_llama_cpp(name, model, files[name], longest)

        yield [opened(name) for name in names]
