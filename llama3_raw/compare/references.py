"""Other implementations on the tensors of a model: Hugging Face's LlamaForCausalLM, and Meta's Transformer.

Neither copies weights, except wq and wk, whose rows Hugging Face has in another order. Their intermediate tensors are
traced by tap name, in the layout of model.py: no batch dimension, separate heads, interleaved pairs.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..checkpoint.checkpoint import split_pairs
from ..checkpoint.loading import to_state_dict
from ..errors import UserError, needed_package
from ..params import Params, RopeScaling
from ..quantization.matrix import embed, linear
from ..tracing.names import FIRST
from ..tracing.record import Trace, check_trace, count_layers
from ..tracing.taps import chain
from ..weights import Model, tensor_specs
from .gradients import next_token_loss


def hf_model(model: Model, attention: str) -> Any:
    """Return LlamaForCausalLM on the tensors of the model itself, except wq and wk, whose rows are reordered.

    attention: its attention, "sdpa" or "eager". Needs the package transformers.
    """
    transformers: Any = importlib.import_module("transformers")
    config = _hf_config(transformers, model, attention)
    with torch.device("meta"):
        network = transformers.LlamaForCausalLM(config).eval()
        rotary = type(network.model.rotary_emb)
    network.load_state_dict(_hf_state_dict(model), assign=True)
    # its table of frequencies is in no checkpoint, so it is still on the meta device
    network.model.rotary_emb = rotary(config).to(model.weights.norm.device)
    return network


def _hf_layer_by_layer(model: Model, dtype: torch.dtype) -> Any:
    """Return `hf_model` with eager attention, computing in `dtype`, that has one layer in memory besides the model.

    A layer gets its tensors when it begins, with wq and wk reordered and all converted, and loses them when it ends.
    """
    transformers: Any = importlib.import_module("transformers")
    params, weights = model.params, model.weights
    config = _hf_config(transformers, model, "eager")
    with torch.device("meta"):
        network = transformers.LlamaForCausalLM(config).eval()
        rotary = type(network.model.rotary_emb)
    network.model.rotary_emb = rotary(config).to(weights.norm.device)
    network.model.norm.weight = nn.Parameter(weights.norm.to(dtype))
    network.model.embed_tokens.forward = lambda tokens: embed(tokens, weights.tok_embeddings).to(dtype)
    network.lm_head.forward = lambda x: linear(x, weights.output)  # which converts it piece by piece

    def fill(block: nn.Module, i: int) -> None:
        tensors: dict[str, Tensor] = {}
        prefix = f"model.layers.{i}."
        for spec in (spec for spec in tensor_specs(params) if spec.layer == i):
            matrix = getattr(weights.layers[i], spec.field)
            tensor = matrix if isinstance(matrix, Tensor) else matrix.dequantize(dtype)
            split = split_pairs(tensor, params.head_dim) if spec.field in ("wq", "wk") else tensor
            tensors[spec.hf_name.removeprefix(prefix)] = split.to(dtype)
        block.load_state_dict(tensors, assign=True)

    def drop(block: nn.Module) -> None:
        nothing = {name: torch.empty_like(tensor, device="meta") for name, tensor in block.state_dict().items()}
        block.load_state_dict(nothing, assign=True)

    for i, block in enumerate(network.model.layers):
        block.register_forward_pre_hook(lambda block, inputs, i=i: fill(block, i))
        block.register_forward_hook(lambda block, inputs, output: drop(block))
    return network


def _hf_config(transformers: Any, model: Model, attention: str) -> Any:
    """Return the params as a LlamaConfig."""
    tied = model.weights.output is model.weights.tok_embeddings
    return transformers.LlamaConfig(**model.params.to_hf(), tie_word_embeddings=tied, attn_implementation=attention)


def _hf_state_dict(model: Model) -> dict[str, Tensor]:
    """Return the tensors by Hugging Face's names; only wq and wk are copied (see `split_pairs`)."""
    params = model.params
    by_meta_name: dict[str, Any] = dict(to_state_dict(params, model.weights))
    tensors = {"lm_head.weight": by_meta_name.get("output.weight", by_meta_name["tok_embeddings.weight"])}
    for spec in tensor_specs(params, tied="output.weight" not in by_meta_name):
        tensor = by_meta_name[spec.meta_name]
        if spec.field in ("wq", "wk"):
            tensor = split_pairs(tensor, params.head_dim)
        tensors[spec.hf_name] = tensor
    return tensors


@contextlib.contextmanager
def meta_model(model: Model, length: int) -> Iterator[Any]:
    """Yield Meta's Transformer on the tensors of the model itself, for a prompt of `length` tokens.

    It needs a process group (fairscale): one that is there, or this process alone, until the block ends. Needs the packages
    llama-models and fairscale.
    """
    params, weights = model.params, model.weights
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # fairscale prints its progress
        warnings.simplefilter("ignore")
        meta: Any = importlib.import_module("llama_models.llama3.model")
        arguments: Any = importlib.import_module("llama_models.llama3.args")
        parallel: Any = importlib.import_module("fairscale.nn.model_parallel.initialize")
        distributed: Any = torch.distributed
        is_ours = not parallel.model_parallel_is_initialized()  # else the process runs Meta's code itself
        if is_ours:
            distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
            parallel.initialize_model_parallel(1)
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(weights.norm.dtype)
        network = meta.Transformer(  # its own weights are never written, so their memory is never used
            arguments.ModelArgs(
                dim=params.dim,
                n_layers=params.n_layers,
                n_heads=params.n_heads,
                n_kv_heads=params.n_kv_heads,
                vocab_size=params.vocab_size,
                multiple_of=params.hidden_dim,
                ffn_dim_multiplier=1 / params.dim,  # so small that hidden_dim is rounded up to multiple_of
                norm_eps=params.norm_eps,
                rope_theta=params.rope_theta,
                use_scaled_rope=params.rope_scaling is not None,
                max_batch_size=1,
                max_seq_len=length,
            )
        )
        torch.set_default_dtype(dtype)
        tensors = to_state_dict(params, weights)
        network.load_state_dict({"output.weight": tensors["tok_embeddings.weight"], **tensors}, assign=True)
        yield network
    finally:
        torch.set_default_dtype(dtype)
        if is_ours:
            parallel.destroy_model_parallel()
            distributed.destroy_process_group()


_Names = Mapping[str, tuple[str | None, str | None]]  # module -> the names of its input and its output


class _Implementation(NamedTuple):
    """Where the tensors of an implementation are."""

    module: str  # the Python module
    rope: str  # its function (q, k, …) -> (q, k), rotated
    layers: str  # the path of the layers
    norm: str  # that of the last norm
    layer_names: _Names
    model_names: _Names
    to_our_layout: Callable[[str, Tensor, Params], Tensor]  # (name, tensor [1, …]) -> in the layout of model.py


def _from_meta_layout(name: str, tensor: Tensor, params: Params) -> Tensor:
    tensor = tensor[0]
    if name in ("attention.q", "attention.k", "attention.v", "attention.heads"):
        tensor = tensor.unflatten(-1, (-1, params.head_dim))  # [T, heads, head_dim]
    return tensor


def _from_hf_layout(name: str, tensor: Tensor, params: Params) -> Tensor:
    tensor = _from_meta_layout(name, tensor, params)
    if name in ("attention.q_rope", "attention.k_rope"):
        tensor = tensor.transpose(0, 1)  # [heads, T, head_dim] before
    if name in ("attention.q", "attention.k", "attention.q_rope", "attention.k_rope"):
        tensor = tensor.unflatten(-1, (2, -1)).transpose(-2, -1).flatten(-2)  # its pairs are half a head apart
    return tensor


_HF = _Implementation(
    module="transformers.models.llama.modeling_llama",
    rope="apply_rotary_pos_emb",
    layers="model.layers",
    norm="model.norm",
    layer_names={
        "input_layernorm": (None, "attention_norm"),
        "self_attn.q_proj": (None, "attention.q"),
        "self_attn.k_proj": (None, "attention.k"),
        "self_attn.v_proj": (None, "attention.v"),
        "self_attn.o_proj": ("attention.heads", "attention.out"),
        "post_attention_layernorm": ("attention.residual", "ffn_norm"),
        "mlp.gate_proj": (None, "feed_forward.gate"),
        "mlp.up_proj": (None, "feed_forward.up"),
        "mlp.down_proj": ("feed_forward.hidden", "feed_forward.out"),
        "": (None, "residual"),
    },
    model_names={
        "model.embed_tokens": (None, "tok_embeddings"),
        "model.norm": (None, "norm"),
        "lm_head": (None, "logits"),
    },
    to_our_layout=_from_hf_layout,
)
_META = _Implementation(
    module="llama_models.llama3.model",
    rope="apply_rotary_emb",
    layers="layers",
    norm="norm",
    layer_names={
        "attention_norm": (None, "attention_norm"),
        "attention.wq": (None, "attention.q"),
        "attention.wk": (None, "attention.k"),
        "attention.wv": (None, "attention.v"),
        "attention.wo": ("attention.heads", "attention.out"),
        "ffn_norm": ("attention.residual", "ffn_norm"),
        "feed_forward.w1": (None, "feed_forward.gate"),
        "feed_forward.w3": (None, "feed_forward.up"),
        "feed_forward.w2": ("feed_forward.hidden", "feed_forward.out"),
        "": (None, "residual"),
    },
    model_names={"tok_embeddings": (None, "tok_embeddings"), "norm": (None, "norm"), "output": (None, "logits")},
    to_our_layout=_from_meta_layout,
)


def check_hf(needed_by: str) -> None:
    """Raise UserError if transformers is not installed."""
    needed_package("transformers", needed_by, "compare")


def check_meta(params: Params, needed_by: str) -> None:
    """Raise UserError if Meta's Transformer cannot run such a model, or is not installed."""
    for package in ("llama_models", "fairscale"):
        needed_package(package, needed_by, "compare")
    if params.rope_scaling not in (None, RopeScaling(8.0)):
        raise UserError(
            f"{needed_by}: Meta's code supports only the RoPE scaling of Llama 3.1, by the factor 8; this model has "
            f"{params.rope_scaling}; compare it with hf"
        )
    if params.head_dim * params.n_heads != params.dim:
        raise UserError(
            f"{needed_by}: Meta's code needs a head_dim of {params.dim} // {params.n_heads}; this model has "
            f"{params.head_dim}; compare it with hf"
        )


def trace_hf(model: Model, ids: Sequence[int], progress: bool = False, dtype: torch.dtype | None = None) -> Trace:
    """Return a trace of Hugging Face's LlamaForCausalLM (eager attention) over a prompt, ids [T].

    Masked scores are the most negative number of their dtype, not -inf. progress: show a bar on stderr. dtype: compute
    in this one. None: in that of the weights. Needs what `check_hf` checks. Raises UserError if the tensors do not fit
    into memory.
    """
    dtype = dtype or model.weights.norm.dtype
    check_trace(model.params, dtype, len(ids), device="cpu")
    network = _hf_layer_by_layer(model, dtype)
    tokens = torch.tensor([ids], device=model.weights.norm.device)
    with _traced(network, _HF, model.params, progress) as seen:
        network(tokens, use_cache=False)
    return seen


def trace_meta(model: Model, ids: Sequence[int], progress: bool = False) -> Trace:
    """Return a trace of Meta's Transformer over a prompt, ids [T].

    progress: show a bar on stderr. Needs what `check_meta` checks. Raises UserError if the tensors do not fit into
    memory.
    """
    check_trace(model.params, model.weights.norm.dtype, len(ids), device="cpu")
    tokens = torch.tensor([ids], device=model.weights.norm.device)
    with meta_model(model, len(ids)) as network, _traced(network, _META, model.params, progress) as seen:
        network(tokens, 0)
    return seen


def gradients_hf(model: Model, ids: Sequence[int]) -> dict[str, Tensor]:
    """Return the gradients of the mean next-token loss in Hugging Face's code, by tap name."""
    network = hf_model(model, "eager")
    tokens = torch.tensor([ids], device=model.weights.norm.device)
    with _gradients(network, _HF, model.params) as gradients:
        next_token_loss(network(tokens, use_cache=False).logits.float(), tokens).backward()
    return gradients


def gradients_meta(model: Model, ids: Sequence[int]) -> dict[str, Tensor]:
    """Return the gradients of the mean next-token loss in Meta's code, by tap name."""
    tokens = torch.tensor([ids], device=model.weights.norm.device)
    with meta_model(model, len(ids)) as network, _gradients(network, _META, model.params) as gradients:
        # its forward is in inference mode, whose tensors have no gradients
        next_token_loss(type(network).forward.__wrapped__(network, tokens, 0), tokens).backward()
    return gradients


@contextlib.contextmanager
def _gradients(network: Any, code: _Implementation, params: Params) -> Iterator[dict[str, Tensor]]:
    """Yield what gets the gradient of every tensor of the pass in the block, when that goes back."""
    gradients: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor, in_layout: Callable[[Tensor], Tensor]) -> None:
        tensor.register_hook(lambda gradient: gradients.update({name: in_layout(gradient).clone()}))

    network.requires_grad_(False)
    first = next(path for path, names in code.model_names.items() if FIRST in names)
    network.get_submodule(first).register_forward_hook(lambda _, inputs, x: x.requires_grad_())
    with _watched(network, code, params, keep), torch.enable_grad():
        yield gradients


def continue_hf(model: Model, ids: Sequence[int], n: int) -> Iterator[tuple[int, Trace]]:
    """Yield the next n tokens of a greedy text by Hugging Face's code, with its cache, and the tensors of each pass."""
    network = hf_model(model, "eager")
    cache = importlib.import_module("transformers").DynamicCache(config=network.config)
    with _traced(network, _HF, model.params, progress=False) as seen:
        yield from _greedily(ids, n, seen, lambda tokens, start: network(tokens, None, None, cache))


def continue_meta(model: Model, ids: Sequence[int], n: int) -> Iterator[tuple[int, Trace]]:
    """Yield the next n tokens of a greedy text by Meta's code, with its cache, and the tensors of each pass."""
    length = len(ids) + n
    with meta_model(model, length) as network, _traced(network, _META, model.params, progress=False) as seen:
        yield from _greedily(ids, n, seen, network)


def _greedily(
    ids: Sequence[int], n: int, seen: Trace, run: Callable[[Tensor, int], Any]
) -> Iterator[tuple[int, Trace]]:
    """Run over the prompt, then over one token at a time, the most likely one; yield it and what was seen."""
    new, start = list(ids), 0
    for _ in range(n):
        run(torch.tensor([new]), start)
        start += len(new)
        new = [int(seen["logits"][-1].argmax())]
        yield new[0], seen


class _SeeSoftmax(TorchFunctionMode):
    """Passes scores and probs to `see`: in both implementations they are only the input and output of softmax."""

    def __init__(self, see: Callable[[str, Tensor], None]):
        super().__init__()
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.softmax:
            self._see("attention.scores", args[0])
            self._see("attention.probs", result)
        return result


@contextlib.contextmanager
def _traced(network: Any, code: _Implementation, params: Params, progress: bool) -> Iterator[Trace]:
    """Yield a trace that keeps every tensor of the pass made in the block."""
    seen = Trace(device="cpu")
    with count_layers(params, progress) as count:
        tap = chain(seen, count)

        def keep(name: str, tensor: Tensor, in_layout: Callable[[Tensor], Tensor]) -> None:
            tap(name, in_layout(tensor))

        with _watched(network, code, params, keep), torch.no_grad():
            yield seen


_Keep = Callable[[str, Tensor, Callable[[Tensor], Tensor]], None]  # (name, tensor, to the layout of model.py)


@contextlib.contextmanager
def _watched(network: Any, code: _Implementation, params: Params, keep: _Keep) -> Iterator[None]:
    """Call `keep` with every tensor of the passes made in the block."""
    dtype = network.get_submodule(code.norm).weight.dtype
    layer = ""  # "layers.N." while that layer runs
    module = importlib.import_module(code.module)
    rope = getattr(module, code.rope)

    def enter(name: str) -> None:
        nonlocal layer
        layer = name

    def see(name: str, tensor: Tensor) -> None:
        # softmax: fp32 in and out
        keep(layer + name, tensor, lambda seen: code.to_our_layout(name, seen.detach(), params).to(dtype))

    def hook(module: nn.Module, names: tuple[str | None, str | None]) -> None:
        before, after = names
        if before:
            module.register_forward_pre_hook(lambda _, inputs: see(before, inputs[0]))
        if after:
            module.register_forward_hook(lambda _, inputs, output: see(after, output))

    def rope_and_see(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k = rope(*args, **kwargs)
        see("attention.q_rope", q)
        see("attention.k_rope", k)
        return q, k

    for i, block in enumerate(network.get_submodule(code.layers)):
        block.register_forward_pre_hook(lambda _, inputs, name=f"layers.{i}.": enter(name))
        for path, names in code.layer_names.items():
            hook(block.get_submodule(path), names)
        block.register_forward_hook(lambda _, inputs, output: enter(""))
    for path, names in code.model_names.items():
        hook(network.get_submodule(path), names)
    with mock.patch.object(module, code.rope, rope_and_see), _SeeSoftmax(see):
        yield
