"""Engines on the same weights, to measure: this one, Hugging Face's transformers, and llama.cpp.

All of them have one shape, `Engine`. They run one after the other in the same minute, on the CPU with as many threads
as torch has, transformers on a GPU too; each is asked for no more than the one token that comes next.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.checkpoint import first_layers
from ..checkpoint.gguf import is_gguf_of, write_gguf
from ..checkpoint.loading import build_weights
from ..cli.memory_plan import Lengths, Plan, needed
from ..cli.models import ChosenModel
from ..compare.references import hf_model
from ..errors import UserError, in_short, needed_package
from ..system.machine import free_memory
from ..weights import Model, Weights
from .engines import TWO_PROCESSES, Engine, Own, random_ids, two_processes
from .roofline import seconds_of
from .synthetic import random_weights

TRANSFORMERS, TRANSFORMERS_COMPILED, LLAMA_CPP, STORED = "transformers", "transformers-compiled", "llama.cpp", "stored"
PEERS = (TRANSFORMERS, TRANSFORMERS_COMPILED, LLAMA_CPP, STORED, TWO_PROCESSES)
_ON_A_GPU = (TRANSFORMERS, TRANSFORMERS_COMPILED, STORED)


class Transformers:
    """LlamaForCausalLM on the tensors of the model itself, but for wq and wk: it has their rows in another order.

    With its attention by torch (sdpa), in inference mode, logits at the last position only. Its cache is the
    DynamicCache that its own `generate` takes; on the CPU a StaticCache just large enough, which is a little faster in
    this. For `decode` the cache is filled with random numbers, and no token is waited for but the last one.
    """

    name = TRANSFORMERS

    def __init__(self, model: Model, longest: int):
        self._transformers: Any = needed_package(TRANSFORMERS, "--vs transformers")
        self.version = f"transformers {self._transformers.__version__}"
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
        """The tokens that follow the prompt; for checking that it is the same model."""
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
    """tokens [1, T] behind those in the cache -> the likeliest one behind them, [1, 1]."""
    logits = network(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits  # [1, 1, vocab]
    return torch.argmax(logits, dim=-1)


class CompiledTransformers(Transformers):
    """The same, compiled, with a static cache: what transformers advises for speed, and its own `generate` has for it.

    A token is by torch.compile in the mode "reduce-overhead" (on a GPU a CUDA graph), a prompt is not compiled. A graph
    is bound to the memory of its cache, which is just large enough, and kept for each length. No time is that of
    compiling.
    """

    name = TRANSFORMERS_COMPILED

    def __init__(self, model: Model, longest: int):
        super().__init__(model, longest)
        self.version += ", compiled, static cache"
        self._caches: dict[int, Any] = {}
        torch._dynamo.config.recompile_limit = 1000  # of the process: there is a graph for each length
        self._compiled = torch.compile(_next_token, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def decode(self, context: int, count: int) -> float:
        if context + count not in self._caches:
            for _ in range(3):  # it is compiled, then run for a trial, then captured
                super().decode(context, count)
        return super().decode(context, count)

    def _cache(self, length: int) -> Any:
        if length not in self._caches:
            cache = self._static_cache(length)
            cache.early_initialization(1, self._params.n_kv_heads, self._params.head_dim, self._dtype, self._device)
            self._caches[length] = cache
        self._caches[length].reset()
        return self._caches[length]

    @torch.no_grad()  # as its own generate has it
    def _next(self, tokens: Tensor, cache: Any) -> Tensor:
        run = self._compiled if tokens.shape[-1] == 1 else _next_token
        try:
            return run(self.hf, tokens, cache).clone()  # a graph writes its result to the same place each time
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(
                f"--vs {self.name}: torch.compile fails ({in_short(error)}); leave it out, or install what is missing"
            ) from error


class LlamaBench:
    """llama.cpp's own measuring tool, from the PATH: a process each time, whose warm-up and loading do not count.

    As it comes: batches of 2,048 tokens in parts of 512, keys and values in fp16, prompts of its own random tokens;
    `decode` computes the tokens before it first.
    """

    name = LLAMA_CPP

    def __init__(self, program: str, gguf: Path, threads: int):
        self._command = [program, "-m", str(gguf), "-t", str(threads), "-ngl", "0", "-r", "1", "-o", "json"]
        self.version = f"{program} (version unknown before it has run)"

    def prefill(self, length: int) -> float:
        return self._seconds("-p", length, "-n", 0)

    def decode(self, context: int, count: int) -> float:
        return self._seconds("-p", 0, "-n", count, "-d", context)

    def _seconds(self, *arguments: str | int) -> float:
        command = [*self._command, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        try:
            (result,) = json.loads(done.stdout)
            self.version = f"llama-bench, build {result['build_number']} ({result['build_commit']})"
            return float(result["samples_ns"][0]) / 1e9
        except (ValueError, KeyError, TypeError, IndexError) as error:
            said = in_short((done.stderr or done.stdout)[-200:])
            raise UserError(f"{' '.join(command)}: fails with status {done.returncode}: {said}") from error


class Xllamacpp:
    """llama.cpp as the package xllamacpp brings it: its server, asked in token ids, which also takes the time.

    As it comes: batches of 2,048 tokens in parts of 512, keys and values in fp16. `decode` computes the tokens before
    it first.
    """

    name = LLAMA_CPP

    def __init__(self, model: Model, gguf: Path, threads: int, longest: int):
        xllamacpp: Any = needed_package("xllamacpp", "--vs llama.cpp without a llama-bench on the PATH")
        features = re.findall(r"(\w+) = 1", xllamacpp.get_system_info())
        self.version = f"xllamacpp {xllamacpp.__version__} ({' '.join(features)})"
        self._ids = random_ids(model, longest)
        params = xllamacpp.CommonParams()
        params.model.path = str(gguf)
        params.n_ctx = longest + 1
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.fit_params = params.use_jinja = params.enable_chat_template = False
        params.cache_ram_mib = 0  # it would keep copies of old prompts
        params.verbosity = 0
        try:
            self._server = xllamacpp.Server(params)
        except Exception as error:  # whatever its C++ throws
            raise UserError(f"{gguf}: llama.cpp cannot run this model: {in_short(error)}") from error

    def prefill(self, length: int) -> float:
        return float(self._complete(self._ids[:length], 1)["timings"]["prompt_ms"]) / 1e3

    def decode(self, context: int, count: int) -> float:
        # the first token comes out of the prompt, and its time is the prompt's
        return float(self._complete(self._ids[:context], count + 1)["timings"]["predicted_ms"]) / 1e3

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The tokens that follow the prompt; for checking that it is the same model."""
        text = self._complete(ids, count)["choices"][0]["text"]
        return [int(token) for token in re.findall(r"t(\d+)", text)]  # as write_gguf named them

    def _complete(self, ids: Sequence[int], count: int) -> dict[str, Any]:
        request = {"prompt": list(ids), "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer: dict[str, Any] = self._server.handle_completions(request)
        if answer.get("timings", {}).get("predicted_n") != count:
            raise UserError(f"--vs llama.cpp: llama.cpp did not make {count} tokens: {in_short(answer)}")
        return answer


def memory_together(plan: Plan, peers: Sequence[str]) -> int:
    """The bytes that a plan and these peers fill at the same time, so that none pushes another out of the memory."""
    need, params = needed(plan), plan.checkpoint.params
    weights = need.mapped + need.copied
    itemsize = (plan.dtype or plan.checkpoint.dtype).itemsize
    wq_and_wk = params.n_layers * (params.n_heads + params.n_kv_heads) * params.head_dim * params.dim * itemsize
    stored = sum(needed(plan._replace(quantized=False))[:2])
    columns = params.n_layers * (params.n_heads * params.head_dim + params.hidden_dim) * params.dim * itemsize
    weights_of = {TRANSFORMERS: wq_and_wk, TRANSFORMERS_COMPILED: wq_and_wk, LLAMA_CPP: stored, STORED: 0}
    weights_of[TWO_PROCESSES] = columns  # of wo and w2, which each copies its part of
    if plan.quantized and any(peer != LLAMA_CPP for peer in peers):
        weights += stored
    return weights + sum(weights_of[peer] for peer in peers) + (1 + len(peers)) * (need.cache + need.work)


def check_peers(chosen: ChosenModel, lengths: Lengths, names: Sequence[str]) -> None:
    """Raises UserError where the peers cannot run on the device, or do not fit into the memory together."""
    if not names:
        return
    for name in names:
        if chosen.device.type != "cpu" and not (chosen.device.type == "cuda" and name in _ON_A_GPU):
            raise UserError(f"--vs {name} compares on the CPU, but the device is {chosen.device}; give --device cpu")
    checkpoint = chosen.checkpoint
    if checkpoint.scales:
        raise UserError("--vs takes the weights as others have them; give the original folder, with --quantize int8")
    if chosen.max_ram is not None:
        raise UserError("--vs needs all weights in memory for the other engines; leave --max-ram out")
    if TWO_PROCESSES in names and (chosen.quantized or chosen.random_seed is not None):
        raise UserError(
            f"--vs {TWO_PROCESSES} is about a model in files, not rounded as it is loaded; leave --quantize "
            "out, and give --weights FOLDER"
        )
    if STORED in names and not chosen.quantized:
        raise UserError("--vs stored compares --quantize int8 with the weights as they are stored; give that too")
    free = free_memory(chosen.device) * 9 // 10  # the rest is for what else runs, or pages would come and go

    def together(layers: int) -> int:
        fewer = first_layers(checkpoint, layers)
        made = chosen.random_seed is not None
        plan = Plan(fewer, chosen.device, chosen.dtype, lengths, quantized=chosen.quantized, made=made)
        return memory_together(plan, list(dict.fromkeys(names)))

    most = checkpoint.params.n_layers
    if together(most) <= free:
        return
    fitting = next((layers for layers in range(most, 0, -1) if together(layers) <= free), None)
    way_out = f"--layers {fitting} fits" if fitting else "take a smaller model"
    pushed = ", and each would push the other's weights out" if chosen.device.type == "cpu" else ""
    raise UserError(
        f"--vs {' '.join(names)}: all engines together need {together(most) / 1e9:.1f} GB of memory, "
        f"{free / 1e9:.1f} GB are free{pushed}; {way_out}"
    )


def _stored(chosen: ChosenModel) -> Weights:
    """The weights before they are rounded; random ones are made once more."""
    checkpoint, device, dtype = chosen.checkpoint, chosen.device, chosen.dtype
    if chosen.random_seed is None:
        return build_weights(checkpoint, device, dtype)
    return random_weights(checkpoint, device, dtype, chosen.random_seed)


@contextlib.contextmanager
def open_peers(
    names: Sequence[str], chosen: ChosenModel, model: Model, gguf: str | None, longest: int
) -> Iterator[list[Engine]]:
    """The peers of these names, ready to run the model as it is stored, where ours is quantised.

    A GGUF file that has no name given goes in the end.

    Raises UserError where a peer's package is missing, or the GGUF file is of another model or cannot be written.
    """
    with contextlib.ExitStack() as stack:
        engines: list[Engine] = []
        if names and chosen.quantized:
            model = model._replace(weights=_stored(chosen))
        for name in dict.fromkeys(names):
            if name in (TRANSFORMERS, TRANSFORMERS_COMPILED):
                engines.append((Transformers if name == TRANSFORMERS else CompiledTransformers)(model, longest))
                continue
            if name == TWO_PROCESSES:
                shared = (chosen.folder.path, model.params.n_layers, chosen.dtype, longest)
                engines.append(stack.enter_context(two_processes(*shared)))
                continue
            if name == STORED:
                engines.append(Own(model, longest, name=STORED, version="with the weights as they are stored"))
                continue
            folder = None if gguf else stack.enter_context(tempfile.TemporaryDirectory(prefix="llama3_raw-"))
            file = Path(gguf or f"{folder}/model.gguf")
            if not file.exists():
                write_gguf(model, file)
            elif not is_gguf_of(file, model):
                raise UserError(f"--gguf {file}: is another model (or other --layers); name another file, or remove it")
            # one on the PATH may be built for this very processor
            program, threads = shutil.which("llama-bench"), torch.get_num_threads()
            engines.append(LlamaBench(program, file, threads) if program else Xllamacpp(model, file, threads, longest))
        yield engines
