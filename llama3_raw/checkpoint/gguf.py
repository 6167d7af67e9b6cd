"""Writing a model as a GGUF file, llama.cpp's format. (github.com/ggml-org/ggml, docs/gguf.md)"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import needed_package
from ..model import rope_frequencies
from ..params import Params
from ..system.files import atomic_write, check_disk
from ..weights import Model, tensor_specs

_GGUF_NAMES = {
    **{"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"},
    **{"attention_norm": "attn_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output"},
    **{"ffn_norm": "ffn_norm", "w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"},
}
_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def gguf_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and content of every tensor. Matrices are unchanged: llama.cpp uses Meta's row order of wq and wk.

    llama.cpp expects norms in fp32, and the RoPE scaling as divisors [head_dim/2] of the unscaled frequencies.
    """
    params, weights = model.params, model.weights
    for spec in tensor_specs(params, weights.output is weights.tok_embeddings):
        tensor: Tensor = getattr(weights if spec.layer is None else weights.layers[spec.layer], spec.field)
        layer = "" if spec.layer is None else f"blk.{spec.layer}."
        yield f"{layer}{_GGUF_NAMES[spec.field]}.weight", tensor.float() if tensor.dim() == 1 else tensor
    if params.rope_scaling is not None:
        cpu = torch.device("cpu")
        unscaled = rope_frequencies(replace(params, rope_scaling=None), cpu)
        yield "rope_freqs.weight", unscaled / rope_frequencies(params, cpu)


def write_gguf(model: Model, file: Path) -> None:
    """Write the weights of a model on the CPU, in their dtype, tensor by tensor.

    The vocabulary is a placeholder, with token N called "tN"; use the file with token ids. Raises UserError if the disk
    is too small or cannot be written.
    """
    gguf: Any = needed_package("gguf", "a GGUF file")
    tensors = list(gguf_tensors(model))
    n_bytes = sum(tensor.nbytes for _, tensor in tensors)
    with atomic_write(file) as part:
        check_disk(file, part.parent, n_bytes + 100_000_000)
        writer = gguf.GGUFWriter(part, "llama")
        _add_metadata(writer, model.params)
        arrays = [(name, _array(tensor), gguf.GGMLQuantizationType[_TYPES[tensor.dtype]]) for name, tensor in tensors]
        for name, array, kind in arrays:
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with tqdm(total=n_bytes, unit="B", unit_scale=True, desc=f"writing {file}", leave=False) as bar:
            for _, array, _ in arrays:
                writer.write_tensor_data(array)
                bar.update(array.nbytes)
        writer.close()


def _add_metadata(writer: Any, params: Params) -> None:
    """Add the metadata that llama.cpp requires."""
    writer.add_vocab_size(params.vocab_size)
    writer.add_context_length(params.max_seq_len)
    writer.add_embedding_length(params.dim)
    writer.add_block_count(params.n_layers)
    writer.add_feed_forward_length(params.hidden_dim)
    writer.add_head_count(params.n_heads)
    writer.add_head_count_kv(params.n_kv_heads)
    writer.add_key_length(params.head_dim)
    writer.add_value_length(params.head_dim)
    writer.add_rope_dimension_count(params.head_dim)
    writer.add_rope_freq_base(params.rope_theta)
    writer.add_layer_norm_rms_eps(params.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([f"t{token}" for token in range(params.vocab_size)])
    writer.add_token_types([1] * params.vocab_size)  # gguf.TokenType.NORMAL
    writer.add_token_merges(["t 0"])  # llama.cpp requires at least one


def is_gguf_of(file: Path, model: Model) -> bool:
    """Whether a GGUF file holds this model; only the first and last row of each tensor are compared."""
    gguf: Any = needed_package("gguf", "a GGUF file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            entries = {entry.name: entry for entry in gguf.GGUFReader(file).tensors}
    except (OSError, ValueError, KeyError, IndexError):
        return False
    tensors = dict(gguf_tensors(model))
    return entries.keys() == tensors.keys() and all(
        entry.data[row].tobytes() == _array(tensors[name])[row].tobytes()
        for name, entry in entries.items()
        for row in (0, -1)
    )


def _array(tensor: Tensor) -> Any:
    """Return the same memory as a NumPy array; bf16, which NumPy lacks, as int16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
