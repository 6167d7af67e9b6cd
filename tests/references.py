"""The reference implementations, Meta's (llama-models) and Hugging Face's, and other helpers for weights."""

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
from llama3_raw.quantization.matrix import FORMATS, Matrix
from llama3_raw.weights import tensor_specs


def random_weights(params: Params, dtype: torch.dtype, seed: int, tied: bool = False) -> Weights:
    """Return normal matrices that keep the residual stream near one, and norms that are not all one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in tensor_specs(params, tied):
        values = torch.randn(spec.shape, generator=generator)
        tensors[spec.meta_name] = (values * spec.shape[-1] ** -0.5 if values.dim() > 1 else 1 + 0.2 * values).to(dtype)
    return from_state_dict(params, tensors)


def flat(weights: Weights) -> list[Any]:
    """Return all tensors and int8 matrices; a tied tensor occurs twice."""
    return [weights.tok_embeddings, *(t for layer in weights.layers for t in layer), weights.norm, weights.output]


def dense(weight: Matrix) -> Tensor:
    """Return a weight that must be a plain tensor."""
    assert isinstance(weight, Tensor)
    return weight


def converted(weights: Weights, convert: Callable[[Any], Any]) -> Weights:
    """Return the weights with `convert` applied to each tensor; tied embeddings stay tied."""
    embeddings = convert(weights.tok_embeddings)
    return Weights(
        embeddings,
        tuple(LayerWeights(*map(convert, layer)) for layer in weights.layers),
        convert(weights.norm),
        embeddings if weights.output is weights.tok_embeddings else convert(weights.output),
    )


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """Return the weights in another dtype."""
    return converted(weights, lambda tensor: tensor.to(dtype))


def quantized_weights(weights: Weights, quantize: str) -> Weights:
    """Return the weights with the matrices of the layers in the format of this name, and the output in int8."""
    fields = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
    layers = (
        layer._replace(**{field: FORMATS[quantize].quantize(dense(getattr(layer, field))) for field in fields})  # type: ignore[arg-type]
        for layer in weights.layers
    )
    return weights._replace(layers=tuple(layers), output=Int8.quantize(dense(weights.output)))


def dequantized_weights(weights: Weights) -> Weights:
    """Return the dequantized weights, in fp32."""

    def convert(matrix: Matrix) -> Tensor:
        return matrix.float() if isinstance(matrix, Tensor) else matrix.dequantize(torch.float32)

    layers = tuple(LayerWeights(*map(convert, layer)) for layer in weights.layers)
    return Weights(convert(weights.tok_embeddings), layers, convert(weights.norm), convert(weights.output))


def seen_by_hand(model: Model, ids: list[int]) -> dict[str, Tensor]:
    """Return what a tap sees in a pass, copied at once."""
    seen: dict[str, Tensor] = {}

    def tap(name: str, tensor: Tensor) -> Tensor:
        seen[name] = tensor.clone()
        return tensor

    with torch.no_grad():
        forward(model.weights, model.params, torch.tensor(ids), tap=tap)
    return seen


def meta_model(params: Params, weights: Weights, batch: int, length: int) -> Any:
    """Return Meta's Transformer with these weights, and a cache for `batch` rows of `length` tokens."""
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
            assert params.rope_scaling == RopeScaling(8.0), "Meta's code supports only the factor 8"
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
        state_dict.setdefault("output.weight", dense(weights.tok_embeddings))
        model.load_state_dict(state_dict)
        # Meta's generation code builds this table in fp32, for weights of any dtype
        model.freqs_cis = precompute_freqs_cis(
            params.head_dim, 2 * length, params.rope_theta, params.rope_scaling is not None
        )
    return model


def half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Convert wq or wk from Meta's row order to Hugging Face's."""
    heads = weight.shape[0] // head_dim
    return weight.view(heads, head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def hf_model(params: Params, weights: Weights) -> Any:
    """Return Hugging Face's LlamaForCausalLM with these weights, in their dtype, with eager attention."""
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
            attn_implementation="eager",  # type: ignore[call-arg]  # inherited
            bos_token_id=None,
            eos_token_id=None,
        )
        model: Any = LlamaForCausalLM(config)
        model = model.to(weights.norm.dtype).eval()
    specs = {spec.meta_name: spec for spec in tensor_specs(params)}
    state_dict = {}
    for name, tensor in to_state_dict(params, weights).items():
        spec = specs[name]
        state_dict[spec.hf_name] = half_split(tensor, params.head_dim) if spec.field in ("wq", "wk") else tensor
    state_dict.setdefault("lm_head.weight", dense(weights.output))
    model.load_state_dict(state_dict)
    return model


def run(tokens: Generator[int, None, StopReason]) -> tuple[list[int], StopReason]:
    """Return the tokens that `generate` yields, and the reason why it stopped."""
    result = []
    while True:
        try:
            result.append(next(tokens))
        except StopIteration as end:
            return result, end.value
