"""`Weights`: every tensor of a model, by Meta's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .params import Params
from .quantization.blocks import Blocks
from .quantization.matrix import FORMATS, Matrix, tensors_of
from .tokenizer import Tokenizer


class LayerWeights(NamedTuple):
    """The nine tensors of a layer, named as in Meta's checkpoint. A matrix is [out, in], a tensor unless quantized."""

    attention_norm: Tensor  # [dim]
    wq: Matrix  # [n_heads * head_dim, dim]; the rows of a head in interleaved pairs (0, 1), (2, 3), …
    wk: Matrix  # [n_kv_heads * head_dim, dim]; likewise
    wv: Matrix  # [n_kv_heads * head_dim, dim]
    wo: Matrix  # [dim, n_heads * head_dim]
    ffn_norm: Tensor  # [dim]
    w1: Matrix  # [hidden_dim, dim]; the gate of SwiGLU
    w2: Matrix  # [dim, hidden_dim]
    w3: Matrix  # [hidden_dim, dim]


class Weights(NamedTuple):
    """All tensors of a model. If embeddings are tied, `output` is the tensor `tok_embeddings` itself."""

    tok_embeddings: Tensor | Blocks  # [vocab_size, dim]; in blocks in a GGUF file
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [dim]
    output: Matrix  # [vocab_size, dim]


class Model(NamedTuple):
    """What `load` returns: the tensors, the numbers that define the model, and its tokenizer if there is one.

    stop_ids: the tokens that end a text by the model's files; None if they do not say, so that the tokenizer's do.
    """

    weights: Weights
    params: Params
    tokenizer: Tokenizer | None
    stop_ids: frozenset[int] | None = None


# field -> Meta's name, after "layers.N.", and Hugging Face's, after "model.layers.N."
_LAYER_NAMES = {
    "attention_norm": ("attention_norm.weight", "input_layernorm.weight"),
    "wq": ("attention.wq.weight", "self_attn.q_proj.weight"),
    "wk": ("attention.wk.weight", "self_attn.k_proj.weight"),
    "wv": ("attention.wv.weight", "self_attn.v_proj.weight"),
    "wo": ("attention.wo.weight", "self_attn.o_proj.weight"),
    "ffn_norm": ("ffn_norm.weight", "post_attention_layernorm.weight"),
    "w1": ("feed_forward.w1.weight", "mlp.gate_proj.weight"),
    "w2": ("feed_forward.w2.weight", "mlp.down_proj.weight"),
    "w3": ("feed_forward.w3.weight", "mlp.up_proj.weight"),
}

_TOP_NAMES = {
    "tok_embeddings": ("tok_embeddings.weight", "model.embed_tokens.weight"),
    "norm": ("norm.weight", "model.norm.weight"),
    "output": ("output.weight", "lm_head.weight"),
}

# read whole for each token, and what quantization applies to
MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "output")

# dtypes of stored weights and of the computation, by their names in safetensors
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

# dtypes of the tensors of quantized matrices, besides these
INTEGER_DTYPES = {"I8": torch.int8, "U8": torch.uint8}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name without "torch.", such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def format_name(matrix: Matrix) -> str:
    """Return the name of a matrix's format, such as "bfloat16", "int8" or "Q4_K"."""
    return dtype_name(matrix.dtype) if isinstance(matrix, Tensor) else matrix.format


def format_of(field: str, quantize: str | None) -> str | None:
    """Return the name of the format that `quantize`, the name of one for a model, gives to a field; None: none.

    The output matrix is in int8 in either.
    """
    if quantize is None or field not in MATRICES:
        return None
    return "int8" if field == "output" else quantize


def quantized(tensor: Tensor, field: str, quantize: str | None) -> Matrix:
    """Return a tensor in the format that its field gets in a model in the format `quantize`."""
    name = format_of(field, quantize)
    return tensor if name is None else FORMATS[name].quantize(tensor)


class TensorSpec(NamedTuple):
    """A tensor that a model must have: its field in `Weights`, its names in files and its shape."""

    layer: int | None  # None: a field of Weights itself
    field: str
    meta_name: str
    hf_name: str
    shape: tuple[int, ...]


def tensor_specs(params: Params, tied: bool = False) -> Iterator[TensorSpec]:
    """Yield the spec of every tensor of a model with these params, in the order of the forward pass.

    tied: leave out `output`, which is `tok_embeddings`.
    """
    q_rows, kv_rows = params.n_heads * params.head_dim, params.n_kv_heads * params.head_dim
    dim, hidden_dim, vocab_size = params.dim, params.hidden_dim, params.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("attention_norm", "ffn_norm", "norm"), (dim,)),
        **dict.fromkeys(("tok_embeddings", "output"), (vocab_size, dim)),
        **{"wq": (q_rows, dim), "wk": (kv_rows, dim), "wv": (kv_rows, dim), "wo": (dim, q_rows)},
        **{"w1": (hidden_dim, dim), "w2": (dim, hidden_dim), "w3": (hidden_dim, dim)},
    }
    yield TensorSpec(None, "tok_embeddings", *_TOP_NAMES["tok_embeddings"], shapes["tok_embeddings"])
    for i in range(params.n_layers):
        for field, (meta_name, hf_name) in _LAYER_NAMES.items():
            yield TensorSpec(i, field, f"layers.{i}.{meta_name}", f"model.layers.{i}.{hf_name}", shapes[field])
    for field in ("norm",) if tied else ("norm", "output"):
        yield TensorSpec(None, field, *_TOP_NAMES[field], shapes[field])


def devices_of(weights: Weights) -> set[torch.device]:
    """Return the devices of the tensors: one, or two with `gpu_layers`."""
    matrices = [weights.tok_embeddings, weights.output, *(matrix for layer in weights.layers for matrix in layer)]
    return {tensor.device for matrix in matrices for tensor in tensors_of(matrix)} | {weights.norm.device}
