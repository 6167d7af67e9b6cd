"""Writing a model as a GGUF file, llama.cpp's format. (github.com/ggml-org/ggml, docs/gguf.md)"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..model import rope_frequencies
from ..params import Params
from ..quantization.blocks import BLOCK_TYPES
from ..system.files import atomic_write, check_disk
from ..weights import DTYPES, Model, TensorSpec, tensor_specs
from .gguf_header import read_header
from .gguf_vocabulary import NORMAL, GgufVocabulary

_GGUF_NAMES = {
    **{"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"},
    **{"attention_norm": "attn_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output"},
    **{"ffn_norm": "ffn_norm", "w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"},
}
Q8_0 = "Q8_0"
_BLOCK, _BLOCK_BYTES = BLOCK_TYPES[Q8_0].n_values, BLOCK_TYPES[Q8_0].n_bytes
TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", Q8_0: "MOSTLY_Q8_0"}


class GgufTensor(NamedTuple):
    """A tensor of a GGUF file: its name, shape [out, in] or [dim], and type in the file, and its values, row by row."""

    name: str
    shape: tuple[int, ...]
    kind: str  # F32, F16, BF16 or Q8_0
    rows: Callable[[], Iterable[Tensor]]  # yields [some rows, in]; a norm may be one column

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        n_values = torch.Size(self.shape).numel()
        return n_values // _BLOCK * _BLOCK_BYTES if self.kind == Q8_0 else n_values * DTYPES[self.kind].itemsize

    def encoded(self) -> Iterator[Tensor]:
        """Yield the values as they are in the file: in a dtype, or in Q8_0 as uint8 [rows, bytes per row].

        Raises UserError for a value that is too large for fp16.
        """
        for rows in self.rows():
            yield _in_q8_0(rows) if self.kind == Q8_0 else self._converted(rows)

    def _converted(self, rows: Tensor) -> Tensor:
        converted = rows.to(DTYPES[self.kind])
        if self.kind == "F16" and bool((converted.isinf() & rows.isfinite()).any()):
            raise UserError(f"{self.name}: has values beyond 65,504, the largest of fp16; write another type")
        return converted


def _in_q8_0(rows: Tensor) -> Tensor:
    """Return rows in blocks of 32 values, each with its scale. (quantize_row_q8_0_ref in ggml-quants.c)"""
    import gguf

    return torch.from_numpy(gguf.quantize(rows.float().numpy(), gguf.GGMLQuantizationType.Q8_0))


def gguf_name(spec: TensorSpec) -> str:
    """Return the name of a tensor in a GGUF file."""
    layer = "" if spec.layer is None else f"blk.{spec.layer}."
    return f"{layer}{_GGUF_NAMES[spec.field]}.weight"


def gguf_tensor(spec: TensorSpec, kind: str, rows: Callable[[], Iterable[Tensor]]) -> GgufTensor:
    """Return a tensor of a GGUF file. rows: as in `GgufTensor`, in Meta's order, which llama.cpp uses too.

    llama.cpp expects norms in fp32. Raises UserError for rows that Q8_0 cannot divide into its blocks.
    """
    if len(spec.shape) == 1:
        kind = "F32"
    if kind == Q8_0 and spec.shape[-1] % _BLOCK:
        raise UserError(
            f"{spec.meta_name}: its rows of {spec.shape[-1]} values do not divide into blocks of {_BLOCK}, which q8_0 "
            "needs; write another type"
        )
    return GgufTensor(gguf_name(spec), spec.shape, kind, rows)


def rope_divisors(params: Params) -> list[GgufTensor]:
    """Return the RoPE scaling as llama.cpp expects it: divisors [head_dim/2] of the unscaled frequencies; if any."""
    if params.rope_scaling is None:
        return []
    cpu = torch.device("cpu")
    divisors = rope_frequencies(replace(params, rope_scaling=None), cpu) / rope_frequencies(params, cpu)
    return [GgufTensor("rope_freqs.weight", tuple(divisors.shape), "F32", _whole(divisors))]


def _tensors_of(model: Model) -> list[GgufTensor]:
    """Return the tensors of a model on the CPU that is not quantized, in their dtypes."""
    tensors = []
    for spec in tensor_specs(model.params, model.weights.output is model.weights.tok_embeddings):
        tensor: Tensor = getattr(model.weights if spec.layer is None else model.weights.layers[spec.layer], spec.field)
        tensors.append(gguf_tensor(spec, TYPE_NAMES[tensor.dtype], _whole(tensor)))
    return tensors + rope_divisors(model.params)


def _whole(tensor: Tensor) -> Callable[[], list[Tensor]]:
    return lambda: [tensor]


def _placeholder(n_tokens: int) -> GgufVocabulary:
    """Return a vocabulary with token N called "tN", for a file that is used with token ids."""
    tokens, types = [f"t{token}" for token in range(n_tokens)], [NORMAL] * n_tokens
    merges = ["t 0"]  # llama.cpp requires at least one
    return GgufVocabulary("gpt2", "llama-bpe", tokens, types, merges, *[None] * 6)


def write_gguf(model: Model, file: Path) -> None:
    """Write the weights of a model on the CPU, in their dtype, for use with token ids.

    The vocabulary is a placeholder, with token N called "tN". Raises UserError if the disk is too small or cannot be
    written.
    """
    write_gguf_file(file, model.params, _tensors_of(model), _placeholder(model.params.vocab_size))


def write_gguf_file(
    file: Path,
    params: Params,
    tensors: Sequence[GgufTensor],
    vocabulary: GgufVocabulary,
    name: str | None = None,
    progress: bool = True,
) -> None:
    """Write a GGUF file, some rows of a tensor at a time.

    name: of the model. progress: show a bar on stderr, if that is a terminal. Raises UserError if the disk is too
    small or cannot be written, and what the tensors raise.
    """
    import gguf

    n_bytes = sum(tensor.nbytes for tensor in tensors)
    with atomic_write(file) as part, contextlib.ExitStack() as stack:
        check_disk(file, part.parent, n_bytes + 100_000_000)
        writer: Any = stack.enter_context(contextlib.closing(gguf.GGUFWriter(part, "llama")))
        _add_params(writer, params)
        _add_vocabulary(writer, vocabulary)
        if name is not None:
            writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[tensors[0].kind]])  # the embeddings'
        if any(tensor.kind == Q8_0 for tensor in tensors):
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        out = writer.fout[0]  # its write_tensor_data wants a whole tensor
        hidden = None if progress else True  # None: where stderr is no terminal
        bar = stack.enter_context(
            tqdm(total=n_bytes, unit="B", unit_scale=True, desc=f"writing {file}", disable=hidden, leave=False)
        )
        for tensor in tensors:
            writer.write_padding(out, out.tell())
            for rows in tensor.encoded():
                out.write(rows.contiguous().view(-1).view(torch.uint8).numpy().data)
                bar.update(rows.nbytes)
        writer.write_padding(out, out.tell())


def _add_params(writer: Any, params: Params) -> None:
    """Add the metadata that llama.cpp requires of a Llama."""
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


def _add_vocabulary(writer: Any, vocabulary: GgufVocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for add, value in (
        (writer.add_bos_token_id, vocabulary.bos_id),
        (writer.add_eos_token_id, vocabulary.eos_id),
        (writer.add_eot_token_id, vocabulary.eot_id),
        (writer.add_eom_token_id, vocabulary.eom_id),
        (writer.add_add_bos_token, vocabulary.add_bos),
        (writer.add_chat_template, vocabulary.chat_template),
    ):
        if value is not None:
            add(value)


def is_gguf_of(file: Path, model: Model) -> bool:
    """Whether a GGUF file holds this model; only the first and last row of each tensor are compared."""
    try:
        header = read_header(file)
    except UserError:
        return False
    tensors = {tensor.name: tensor for tensor in _tensors_of(model)}
    return header.tensors.keys() == tensors.keys() and all(
        has_rows(header.map(name), [0, -1], next(tensor.encoded())[[0, -1]]) for name, tensor in tensors.items()
    )


def has_rows(mapped: Tensor, wanted: list[int] | slice, rows: Tensor) -> bool:
    """Whether the wanted rows of a tensor in a GGUF file are `rows`, as `encoded` yields them, bit by bit."""
    stored = mapped[wanted]
    return (
        stored.dtype == rows.dtype
        and stored.numel() == rows.numel()
        and torch.equal(stored.contiguous().view(-1).view(torch.uint8), rows.contiguous().view(-1).view(torch.uint8))
    )
