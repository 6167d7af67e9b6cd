"""The reference implementations that the engine is held against: Meta's (llama-models) and Hugging Face's."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import warnings
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from llama3_raw import LayerWeights, Model, Params, Weights, forward
from llama3_raw.checkpoint.loading import from_state_dict, to_state_dict
from llama3_raw.decoding.loop import StopReason
from llama3_raw.params import RopeScaling
from llama3_raw.quantization.int8 import Int8
from llama3_raw.weights import tensor_places


def random_weights(params: Params, dtype: torch.dtype, seed: int, tied: bool = False) -> Weights:
    """Normal matrices that keep the residual stream near one, and norms that are not all one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for place in tensor_places(params, tied):
        values = torch.randn(place.shape, generator=generator)
        tensors[place.meta_name] = (values * place.shape[-1] ** -0.5 if values.dim() > 1 else 1 + 0.2 * values).to(
            dtype
        )
    return from_state_dict(params, tensors)


def flat(weights: Weights) -> list[Any]:
    """All tensors and int8 matrices, the tied one twice."""
    return [weights.tok_embeddings, *(t for layer in weights.layers for t in layer), weights.norm, weights.output]


def dense(weight: Tensor | Int8) -> Tensor:
    """A weight that is a plain tensor."""
    assert isinstance(weight, Tensor)
    return weight


def converted(weights: Weights, convert: Callable[[Any], Any]) -> Weights:
    """The same weights, each tensor made another; tied embeddings stay tied."""
    embeddings = convert(weights.tok_embeddings)
    return Weights(
        embeddings,
        tuple(LayerWeights(*map(convert, layer)) for layer in weights.layers),
        convert(weights.norm),
        embeddings if weights.output is weights.tok_embeddings else convert(weights.output),
    )


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """The same weights in another dtype."""
    return converted(weights, lambda tensor: tensor.to(dtype))


def seen_by_hand(model: Model, ids: list[int]) -> dict[str, Tensor]:
    """What the tap of a pass gets, copied before anything else can happen to it."""
    seen: dict[str, Tensor] = {}

    def tap(name: str, tensor: Tensor) -> Tensor:
        seen[name] = tensor.clone()
        return tensor

    with torch.no_grad():
        forward(model.weights, model.params, torch.tensor(ids), tap=tap)
    return seen


def meta_model(params: Params, weights: Weights, batch: int, length: int) -> Any:
    """Meta's Transformer with these weights, its cache made for `batch` rows of `length` tokens."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import torch.distributed as dist
        from fairscale.nn.model_parallel.initialize import initialize_model_parallel, model_parallel_is_initialized
        from llama_models.llama3.args import ModelArgs
        from llama_models.llama3.model import Transformer, precompute_freqs_cis

        if not model_parallel_is_initialized():
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
            dist.init_process_group("gloo", rank=0, world_size=1)
            initialize_model_parallel(1)
        if params.rope_scaling is not None:
            assert params.rope_scaling == RopeScaling(8.0), "Meta's code knows the factor 8 alone"
        arguments = {
            "dim": params.dim,
            "n_layers": params.n_layers,
            "n_heads": params.n_heads,
            "n_kv_heads": params.n_kv_heads,
            "vocab_size": params.vocab_size,
            "multiple_of": params.hidden_dim,
            "ffn_dim_multiplier": 1 / params.dim,  # so small that the feed-forward is as wide as multiple_of
            "norm_eps": params.norm_eps,
            "rope_theta": params.rope_theta,
            "use_scaled_rope": params.rope_scaling is not None,
            "max_batch_size": batch,
            "max_seq_len": length,
        }
        torch.set_default_dtype(weights.norm.dtype)
        try:
            model = Transformer(ModelArgs(**arguments))
        finally:
            torch.set_default_dtype(torch.float32)
        state_dict = to_state_dict(params, weights)
        state_dict.setdefault("output.weight", weights.tok_embeddings)
        model.load_state_dict(state_dict)
        # Meta's generation code makes this table in fp32, whatever the weights are
        model.freqs_cis = precompute_freqs_cis(
            params.head_dim, 2 * length, params.rope_theta, params.rope_scaling is not None
        )
    return model


def half_split(weight: Tensor, head_dim: int) -> Tensor:
    """wq or wk as Meta stores it -> as Hugging Face does."""
    heads = weight.shape[0] // head_dim
    return weight.view(heads, head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def hf_model(params: Params, weights: Weights) -> Any:
    """Hugging Face's LlamaForCausalLM with these weights, in their dtype, with eager attention."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaConfig, LlamaForCausalLM

        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params.rope_theta}
        if params.rope_scaling:
            rope |= {
                "rope_type": "llama3",
                "factor": params.rope_scaling.factor,
                "low_freq_factor": params.rope_scaling.low_freq_factor,
                "high_freq_factor": params.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": params.rope_scaling.original_max_seq_len,
            }
        config = LlamaConfig(
            hidden_size=params.dim,
            num_hidden_layers=params.n_layers,
            num_attention_heads=params.n_heads,
            num_key_value_heads=params.n_kv_heads,
            head_dim=params.head_dim,
            vocab_size=params.vocab_size,
            intermediate_size=params.hidden_dim,
            rms_norm_eps=params.norm_eps,
            max_position_embeddings=params.max_seq_len,
            tie_word_embeddings=weights.output is weights.tok_embeddings,
            rope_parameters=rope,
            attn_implementation="eager",  # type: ignore[call-arg]  # it has it from its base
            bos_token_id=None,
            eos_token_id=None,
        )
        model: Any = LlamaForCausalLM(config)
        model = model.to(weights.norm.dtype).eval()
    names = {place.meta_name: place for place in tensor_places(params)}
    state_dict = {}
    for name, tensor in to_state_dict(params, weights).items():
        place = names[name]
        state_dict[place.hf_name] = half_split(tensor, params.head_dim) if place.field in ("wq", "wk") else tensor
    state_dict.setdefault("lm_head.weight", dense(weights.output))
    model.load_state_dict(state_dict)
    return model


def run(tokens: Generator[int, None, StopReason]) -> tuple[list[int], StopReason]:
    """All that `generate` yields, and why it ended."""
    got = []
    while True:
        try:
            got.append(next(tokens))
        except StopIteration as end:
            return got, end.value
