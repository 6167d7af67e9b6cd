"""The code of others on the tensors of a model: Hugging Face's LlamaForCausalLM, and Meta's own Transformer.

Neither copies weights, but for the wq and wk that Hugging Face has in another order. What they make on the way is seen
by our names and in our layout: without a batch dimension, heads apart, the pairs of a head side by side.
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
from ..tracing.record import Trace, check_trace, count_layers
from ..tracing.taps import chain
from ..weights import Model, tensor_places


def hf_model(model: Model, attention: str) -> Any:
    """LlamaForCausalLM on the tensors of the model itself, but for wq and wk: it has their rows in another order.

    attention: how it attends, "sdpa" or "eager". Needs the package transformers.
    """
    transformers: Any = importlib.import_module("transformers")
    config = _hf_config(transformers, model, attention)
    with torch.device("meta"):
        network = transformers.LlamaForCausalLM(config).eval()
        rotary = type(network.model.rotary_emb)
    network.load_state_dict(_hf_state_dict(model), assign=True)
    # its table of frequencies belongs to no checkpoint, and is still without content
    network.model.rotary_emb = rotary(config).to(model.weights.norm.device)
    return network


def _hf_config(transformers: Any, model: Model, attention: str) -> Any:
    """The params as a LlamaConfig."""
    tied = model.weights.output is model.weights.tok_embeddings
    return transformers.LlamaConfig(**model.params.to_hf(), tie_word_embeddings=tied, attn_implementation=attention)


def _hf_state_dict(model: Model) -> dict[str, Tensor]:
    """The tensors by Hugging Face's names; copied are only wq and wk (see weights.split_pairs)."""
    params = model.params
    by_meta_name: dict[str, Any] = dict(to_state_dict(params, model.weights))
    tensors = {"lm_head.weight": by_meta_name.get("output.weight", model.weights.tok_embeddings)}
    for place in tensor_places(params, tied="output.weight" not in by_meta_name):
        tensor = by_meta_name[place.meta_name]
        if place.field in ("wq", "wk"):
            tensor = split_pairs(tensor, params.head_dim)
        tensors[place.hf_name] = tensor
    return tensors


@contextlib.contextmanager
def meta_model(model: Model, length: int) -> Iterator[Any]:
    """Meta's Transformer on the tensors of the model itself, for a prompt of so many tokens.

    It is made for several processes: with fairscale, in a group that is this process alone, for as long as the model
    is used. Needs the packages llama-models and fairscale.
    """
    params, weights = model.params, model.weights
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # fairscale prints what it does
        warnings.simplefilter("ignore")
        meta: Any = importlib.import_module("llama_models.llama3.model")
        arguments: Any = importlib.import_module("llama_models.llama3.args")
        parallel: Any = importlib.import_module("fairscale.nn.model_parallel.initialize")
        distributed: Any = torch.distributed
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        parallel.initialize_model_parallel(1)
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(weights.norm.dtype)
        network = meta.Transformer(  # its weights are memory that nothing is written to, and that is let go unused
            arguments.ModelArgs(
                dim=params.dim,
                n_layers=params.n_layers,
                n_heads=params.n_heads,
                n_kv_heads=params.n_kv_heads,
                vocab_size=params.vocab_size,
                multiple_of=params.hidden_dim,
                ffn_dim_multiplier=1 / params.dim,  # so small that the feed-forward is as wide as multiple_of
                norm_eps=params.norm_eps,
                rope_theta=params.rope_theta,
                use_scaled_rope=params.rope_scaling is not None,
                max_batch_size=1,
                max_seq_len=length,
            )
        )
        torch.set_default_dtype(dtype)
        tensors = to_state_dict(params, weights)
        network.load_state_dict({"output.weight": weights.tok_embeddings, **tensors}, assign=True)
        yield network
    finally:
        torch.set_default_dtype(dtype)
        parallel.destroy_model_parallel()
        distributed.destroy_process_group()


_Names = Mapping[str, tuple[str | None, str | None]]  # module -> the names of what goes in and of what comes out


class _Code(NamedTuple):
    """How to see inside an implementation."""

    module: str  # of Python
    rope: str  # its function (q, k, …) -> (q, k) turned
    layers: str  # where the layers are
    of_layer: _Names
    of_model: _Names
    arranged: Callable[[str, Tensor, Params], Tensor]  # (name, tensor [1, …]) -> in our layout


def _arranged_as_meta(name: str, tensor: Tensor, params: Params) -> Tensor:
    tensor = tensor[0]
    if name in ("attention.q", "attention.k", "attention.v", "attention.heads"):
        tensor = tensor.unflatten(-1, (-1, params.head_dim))  # [T, heads, head_dim]
    return tensor


def _arranged_as_hf(name: str, tensor: Tensor, params: Params) -> Tensor:
    tensor = _arranged_as_meta(name, tensor, params)
    if name in ("attention.q_rope", "attention.k_rope"):
        tensor = tensor.transpose(0, 1)  # [heads, T, head_dim] before
    if name in ("attention.q", "attention.k", "attention.q_rope", "attention.k_rope"):
        tensor = tensor.unflatten(-1, (2, -1)).transpose(-2, -1).flatten(-2)  # pairs were half a head apart
    return tensor


_HF = _Code(
    module="transformers.models.llama.modeling_llama",
    rope="apply_rotary_pos_emb",
    layers="model.layers",
    of_layer={
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
    of_model={
        "model.embed_tokens": (None, "tok_embeddings"),
        "model.norm": (None, "norm"),
        "lm_head": (None, "logits"),
    },
    arranged=_arranged_as_hf,
)
_META = _Code(
    module="llama_models.llama3.model",
    rope="apply_rotary_emb",
    layers="layers",
    of_layer={
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
    of_model={"tok_embeddings": (None, "tok_embeddings"), "norm": (None, "norm"), "output": (None, "logits")},
    arranged=_arranged_as_meta,
)


def check_hf(needed_by: str) -> None:
    """Raises UserError where transformers is not installed."""
    needed_package("transformers", needed_by, "compare")


def check_meta(params: Params, needed_by: str) -> None:
    """Raises UserError where Meta's Transformer cannot run such a model, or is not installed."""
    for package in ("llama_models", "fairscale"):
        needed_package(package, needed_by, "compare")
    if params.rope_scaling not in (None, RopeScaling(8.0)):
        raise UserError(
            f"{needed_by}: Meta's code knows no RoPE scaling but that of Llama 3.1, by the factor 8; this model has "
            f"{params.rope_scaling}; compare it with hf"
        )
    if params.head_dim * params.n_heads != params.dim:
        raise UserError(
            f"{needed_by}: Meta's code has heads of {params.dim} // {params.n_heads}, but head_dim is "
            f"{params.head_dim} here; compare it with hf"
        )


def trace_hf(model: Model, ids: Sequence[int], progress: bool = False) -> Trace:
    """What Hugging Face's LlamaForCausalLM (eager attention) makes of a prompt, ids [T], by every name of a tap.

    Where a token must not look, its scores are the most negative number of their dtype, not -inf. progress: a bar on
    stderr. Needs what `check_hf` looks for. Raises UserError where the memory does not hold the tensors.
    """
    check_trace(model.params, model.weights.norm.dtype, len(ids), device="cpu")
    network = hf_model(model, "eager")
    tokens = torch.tensor([ids], device=model.weights.norm.device)
    with _seeing(network, _HF, model.params, progress) as seen:
        network(tokens, use_cache=False)
    return seen


def trace_meta(model: Model, ids: Sequence[int], progress: bool = False) -> Trace:
    """What Meta's Transformer makes of a prompt, ids [T], by every name of a tap.

    progress: a bar on stderr. Needs what `check_meta` looks for. Raises UserError where the memory does not hold the
    tensors.
    """
    check_trace(model.params, model.weights.norm.dtype, len(ids), device="cpu")
    tokens = torch.tensor([ids], device=model.weights.norm.device)
    with meta_model(model, len(ids)) as network, _seeing(network, _META, model.params, progress) as seen:
        network(tokens, 0)
    return seen


class _SeeSoftmax(TorchFunctionMode):
    """Shows scores and probs. Both implementations have them in local variables only, on either side of softmax."""

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
def _seeing(network: Any, code: _Code, params: Params, progress: bool) -> Iterator[Trace]:
    """-> a trace, which gets every tensor of the pass that is made inside."""
    dtype = next(network.parameters()).dtype
    seen = Trace(device="cpu")
    layer = ""  # "layers.N." while that runs
    module = importlib.import_module(code.module)
    rope = getattr(module, code.rope)

    def enter(name: str) -> None:
        nonlocal layer
        layer = name

    with count_layers(params, progress) as count:
        tap = chain(seen, count)

        def see(name: str, tensor: Tensor) -> None:
            tap(layer + name, code.arranged(name, tensor, params).to(dtype))  # softmax is in fp32 on both sides

        def hook(part: nn.Module, names: tuple[str | None, str | None]) -> None:
            before, after = names
            if before:
                part.register_forward_pre_hook(lambda _, inputs: see(before, inputs[0]))
            if after:
                part.register_forward_hook(lambda _, inputs, output: see(after, output))

        def rope_and_see(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            q, k = rope(*args, **kwargs)
            see("attention.q_rope", q)
            see("attention.k_rope", k)
            return q, k

        for i, block in enumerate(network.get_submodule(code.layers)):
            block.register_forward_pre_hook(lambda _, inputs, name=f"layers.{i}.": enter(name))
            for path, names in code.of_layer.items():
                hook(block.get_submodule(path), names)
            block.register_forward_hook(lambda _, inputs, output: enter(""))
        for path, names in code.of_model.items():
            hook(network.get_submodule(path), names)
        with mock.patch.object(module, code.rope, rope_and_see), _SeeSoftmax(see), torch.no_grad():
            yield seen
