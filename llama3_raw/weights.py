"""`Weights`: every tensor of a model, by Meta's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import UserError
from .params import Params
from .quantization.matrix import FORMATS, Matrix, tensors_of
from .tokenizer import Tokenizer

# How a `Matrix` and an optional tokenizer are declared where a reader finds them. `X | Any` means: nearly always an X.
# A type checker completes and checks the attributes of X, and asks for no test before each use, as for `X | Y`.
# (typing.python.org, "The Any trick")
MatrixField = Tensor | Any  # a Tensor unless quantized
TokenizerField = Tokenizer | Any  # None if the files have none


class LayerWeights(NamedTuple):
    """The nine tensors of a layer, named as in Meta's checkpoint. A matrix is [out, in], a tensor unless quantized."""

    attention_norm: Tensor  # [dim]
    wq: MatrixField  # [n_heads * head_dim, dim]; the rows of a head in interleaved pairs (0, 1), (2, 3), …
    wk: MatrixField  # [n_kv_heads * head_dim, dim]; likewise
    wv: MatrixField  # [n_kv_heads * head_dim, dim]
    wo: MatrixField  # [dim, n_heads * head_dim]
    ffn_norm: Tensor  # [dim]
    w1: MatrixField  # [hidden_dim, dim]; the gate of SwiGLU
    w2: MatrixField  # [dim, hidden_dim]
    w3: MatrixField  # [hidden_dim, dim]

    def __repr__(self) -> str:
        """The shape, format and device of each tensor: values in their thousands help nobody."""
        return "\n".join(["LayerWeights", *map(_line, self._fields, self)])


class Weights(NamedTuple):
    """All tensors of a model. If embeddings are tied, `output` is the tensor `tok_embeddings` itself."""

    tok_embeddings: MatrixField  # [vocab_size, dim]; in blocks in a GGUF file
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [dim]
    output: MatrixField  # [vocab_size, dim]

    def __repr__(self) -> str:
        """As for a layer; of the layers, only their number."""
        tops = [_line(name, getattr(self, name)) for name in ("tok_embeddings", "norm", "output")]
        tops.insert(1, f"  {'layers':<16}{len(self.layers)} LayerWeights; print one, such as layers[0]")
        return "\n".join(["Weights", *tops])


class Model(NamedTuple):
    """What `load` returns: the tensors, the numbers that define the model, and its tokenizer if there is one.

    stop_ids: the tokens that end a text by the model's files; None if they do not say, so that the tokenizer's do.
    name: of its folder, file or repository.
    """

    weights: Weights
    params: Params
    tokenizer: TokenizerField
    stop_ids: frozenset[int] | None = None
    name: str = "unnamed"

    def __repr__(self) -> str:
        """Ten lines; no weight is read."""
        weights, params, tokenizer = self[:3]
        matrices = matrices_of(weights)
        tied = ", output tied to tok_embeddings" if weights.output is weights.tok_embeddings else ""
        formats = dict.fromkeys(format_name(matrix) for matrix in matrices if len(matrix.shape) == 2)
        rope = "" if params.rope_scaling is None else f", scaled by {params.rope_scaling.factor:g}"
        lines = {
            "parameters": f"{sum(matrix.shape.numel() for matrix in matrices):,}{tied}",
            "layers": f"{len(weights.layers)} of width {params.dim}, feed-forward {params.hidden_dim}",
            "heads": f"{params.n_heads} of {params.head_dim} values, {params.n_kv_heads} kv heads",
            "context": f"{params.max_seq_len:,} tokens, RoPE theta {params.rope_theta:,.0f}{rope}",
            "vocabulary": f"{params.vocab_size:,} tokens",
            "dtype": f"{dtype_name(weights.norm.dtype)}; matrices in {', '.join(formats)}",
            "device": ", ".join(sorted(map(str, devices_of(weights)))),
            "bytes": f"{sum(matrix.nbytes for matrix in matrices):,}",
            "tokenizer": "none" if tokenizer is None else f"{tokenizer.path.name}, {tokenizer.n_words:,} tokens",
        }
        return "\n".join([f"Model {self.name}", *(f"  {key:<12}{value}" for key, value in lines.items())])


def _line(name: str, matrix: Matrix) -> str:
    return f"  {name:<16}{list(matrix.shape)!s:<16}{format_name(matrix)} on {tensors_of(matrix)[0].device}"


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


# dtypes that `load` and `to` convert weights to, by name
COMPUTE_DTYPES = {dtype_name(dtype): dtype for dtype in (*DTYPES.values(), torch.float64)}


def dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    """Return the dtype of a name such as "float32", or the dtype itself. Raises UserError if weights cannot have it."""
    found = dtype if isinstance(dtype, torch.dtype) else COMPUTE_DTYPES.get(dtype)
    if found is None or found not in COMPUTE_DTYPES.values():
        raise UserError(f"{{argument}} {dtype}: should be one of {', '.join(COMPUTE_DTYPES)}", argument="dtype")
    return found


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


def matrices_of(weights: Weights) -> list[Matrix]:
    """Return every tensor and quantized matrix of a model, in the order of the forward pass; a tied one once."""
    tied = weights.output is weights.tok_embeddings
    layers = (matrix for layer in weights.layers for matrix in layer)
    return [weights.tok_embeddings, *layers, weights.norm, *(() if tied else (weights.output,))]


def devices_of(weights: Weights) -> set[torch.device]:
    """Return the devices of the tensors: one, or two with `gpu_layers`."""
    return {tensor.device for matrix in matrices_of(weights) for tensor in tensors_of(matrix)}
