"""Reading a model from a GGUF file, llama.cpp's format: its params, and its tensors by Meta's names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError, in_short
from ..model import rope_frequencies
from ..params import Params, RopeScaling
from ..quantization.blocks import BlockType
from ..weights import MATRICES, TensorSpec, tensor_specs
from .gguf import gguf_name
from .gguf_header import GgufHeader, TensorInfo, read_header

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

_ROPE_DIVISORS = "rope_freqs.weight"
_POWERS_OF_TWO = tuple(2**exponent for exponent in range(21))

# metadata of llama.cpp's other models that changes the computation, unless it is 0, false or absent
_UNSUPPORTED = (
    *("expert_count", "expert_used_count", "logit_scale", "residual_scale", "embedding_scale", "attention.scale"),
    *("attention.sliding_window", "attention.clamp_kqv", "attention.max_alibi_bias", "use_parallel_residual"),
    *("attn_logit_softcapping", "final_logit_softcapping", "leading_dense_block_count"),
)

_WAY_OUT = "get the model as safetensors, if it is a Llama"


class GgufFile(NamedTuple):
    """A model in a GGUF file, or in several that it was split into: mapped and checked, but not read."""

    file: Path  # the first one
    params: Params
    tensors: dict[str, Tensor]  # by Meta's names; one in blocks is uint8 [out, bytes per row]
    kinds: dict[str, BlockType]  # of the tensors in blocks
    metadata: dict[str, Any]  # of the first file, as in its header; see tokenizer_of_gguf

    @property
    def tied(self) -> bool:
        """Whether `output` is `tok_embeddings`."""
        return "output.weight" not in self.tensors


def is_gguf(path: Path) -> bool:
    """Whether a path looks like a GGUF file: by its name, or by its first bytes."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def read_gguf(file: Path) -> GgufFile:
    """Map a GGUF file of the architecture llama, or all parts of it, given one of them; no weights are read.

    Raises UserError if a part is missing or damaged, if a tensor is missing, unexpected or of a type that is not
    supported, or if the metadata describes a computation that is not Llama's.
    """
    headers = _read_parts(file)
    first = headers[0]
    infos: dict[str, tuple[GgufHeader, TensorInfo]] = {}
    for header in headers:
        for name, info in header.tensors.items():
            if name in infos:
                raise UserError(f"{header.file}: tensor {name} is in {infos[name][0].file} too; download both again")
            infos[name] = header, info
    try:
        fields = _Metadata(first.metadata)
        fields.check_architecture()
        shapes = {name: info.shape for name, (_, info) in infos.items()}
        params = _params(fields, shapes)
        if _ROPE_DIVISORS in infos:
            header, info = infos.pop(_ROPE_DIVISORS)
            if info.kind != torch.float32:
                raise UserError(f"{_ROPE_DIVISORS} should be in fp32; {_WAY_OUT}")
            stated = first.metadata.get("llama.rope.scaling.original_context_length")
            scaling = rope_scaling_of(header.map(_ROPE_DIVISORS), params, stated)
            params = replace(params, rope_scaling=scaling)
        names = _checked_names(params, {name: info for name, (_, info) in infos.items()})
    except UserError as error:
        raise UserError(f"{first.file}: {error}") from error
    tensors = {spec.meta_name: infos[name][0].map(name) for name, spec in names.items()}
    kinds = {spec.meta_name: infos[name][1].kind for name, spec in names.items()}
    in_blocks = {name: kind for name, kind in kinds.items() if isinstance(kind, BlockType)}
    return GgufFile(first.file, params, tensors, in_blocks, first.metadata)


def _read_parts(file: Path) -> list[GgufHeader]:
    """Return the headers of a file, or of all parts that it was split into (gguf-split of llama.cpp)."""
    header = read_header(file)
    count, number = header.metadata.get("split.count", 1), header.metadata.get("split.no", 0)
    if not (isinstance(count, int) and isinstance(number, int)):
        raise UserError(f"{file}: split.count = {in_short(count)} should be a number; download it again")
    if count <= 1:
        return [header]
    named = _PART.fullmatch(file.name)
    if named is None or int(named["count"]) != count:
        name = f"NAME-{number + 1:05}-of-{count:05}.gguf"
        raise UserError(f"{file}: is part {number + 1} of {count} of a model; name it {name}, next to the other parts")
    parts = [file.with_name(f"{named['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise UserError(f"{file}: {in_short(', '.join(missing))} should be next to it; download what is missing")
    headers = [header if part == file else read_header(part) for part in parts]
    for number, part_header in enumerate(headers):
        metadata = part_header.metadata
        if (metadata.get("split.no"), metadata.get("split.count")) != (number, count):
            raise UserError(
                f"{part_header.file}: is part {metadata.get('split.no')} of {metadata.get('split.count')} counted from "
                f"0, not part {number} of {count}; download it again"
            )
    wanted, found = headers[0].metadata.get("split.tensors.count"), sum(len(header.tensors) for header in headers)
    if wanted not in (None, found):
        raise UserError(f"{parts[0]}: the parts should hold {wanted} tensors, they hold {found}; download them again")
    return headers


class _Metadata:
    """Typed access to the metadata of an architecture-llama file. Raises UserError naming the key that is wrong."""

    def __init__(self, metadata: Mapping[str, Any]):
        self._metadata = metadata

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """Return llama.KEY, one positive integer; the default is as in `number`."""
        value = self.number(key, default)
        if not isinstance(value, int):
            raise UserError(f"llama.{key} should be an integer, is {value}; download the file again")
        return value

    def number(self, key: str, default: Any = None) -> Any:
        """Return llama.KEY, one positive number. default: for a missing key; None if there must be one."""
        value = self._metadata.get(f"llama.{key}", default)
        if value is None:
            raise UserError(f"llama.{key} is missing; download the file again")
        if isinstance(value, list):
            raise UserError(f"llama.{key} differs from layer to layer, which is not supported; {_WAY_OUT}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise UserError(f"llama.{key} should be a positive number, is {in_short(value)}; download the file again")
        return value

    def check_architecture(self) -> None:
        """Raise UserError unless the metadata is that of a plain Llama."""
        kind, name = self.get("general.type", "model"), self.get("general.architecture")
        if kind != "model":
            raise UserError(f"holds {in_short(repr(kind))}, not a model; give the model's own file")
        if name != "llama":
            raise UserError(f"its architecture is {in_short(repr(name))}; only 'llama' is supported")
        version = self.get("general.quantization_version", 2)
        if version != 2:
            raise UserError(f"general.quantization_version = {in_short(version)} is not supported; get a newer file")
        for key in _UNSUPPORTED:
            if self.get(f"llama.{key}"):
                value = in_short(self.get(f"llama.{key}"))
                raise UserError(f"llama.{key} = {value} changes the computation and is not supported")
        scaling, factor = self.get("llama.rope.scaling.type", "none"), self.get("llama.rope.scaling.factor", 1)
        factors = [factor or 1, self.get("llama.rope.scale_linear", 1) or 1]
        if factors != [1, 1] or scaling not in ("none", "linear", "yarn"):
            raise UserError(
                f"RoPE scaling {in_short(repr(scaling))} by {in_short(max(factors, key=str))} changes the computation; "
                "supported: Llama 3.1's scaling, in rope_freqs.weight"
            )


def _params(fields: _Metadata, shapes: Mapping[str, Sequence[int]]) -> Params:
    """Return the params, without a RoPE scaling."""
    dim, n_heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", default=dim // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key, default=head_dim) != head_dim:
            raise UserError(f"llama.{key} = {fields.number(key)} is not the head's {head_dim}, which is not supported")
    embeddings = shapes.get("token_embd.weight")
    if embeddings is None:
        raise UserError("tensor token_embd.weight is missing; download the file again")
    return Params.from_hf(
        {
            "hidden_size": dim,
            "num_hidden_layers": fields.integer("block_count"),
            "num_attention_heads": n_heads,
            "num_key_value_heads": fields.integer("attention.head_count_kv", default=n_heads),
            "head_dim": head_dim,
            "vocab_size": embeddings[0],
            "intermediate_size": fields.integer("feed_forward_length"),
            "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
            "rope_theta": fields.number("rope.freq_base", default=10000.0),
            "max_position_embeddings": fields.integer("context_length"),
        }
    )


def rope_scaling_of(divisors: Tensor, params: Params, original: int | None = None) -> RopeScaling | None:
    """Return the scaling that divides the unscaled frequencies by `divisors` [head_dim/2]; None if all are 1.

    GGUF files hold the divisors instead of the four numbers (generate_extra_tensors in llama.cpp's
    convert_hf_to_gguf.py). Llama 3.1's scaling is tried with the original context length that the file states, with
    Llama 3.1's, and with powers of two. Raises UserError if none fits.
    """
    if divisors.shape == (params.head_dim // 2,) and torch.all(divisors > 0):
        if torch.all(divisors == 1):
            return None
        cpu = torch.device("cpu")
        unscaled = rope_frequencies(replace(params, rope_scaling=None), cpu)
        stated = [original] if isinstance(original, int) and original > 0 else []
        is_linear = bool(torch.all(divisors == divisors[0]))
        for length in () if is_linear else (*stated, 8192, *_POWERS_OF_TWO):
            scaling = RopeScaling(_factor(divisors, unscaled, length), original_max_seq_len=length)
            scaled = rope_frequencies(replace(params, rope_scaling=scaling), cpu)
            if torch.allclose(unscaled / scaled, divisors, rtol=1e-5, atol=0):
                return scaling
    raise UserError(f"{_ROPE_DIVISORS} is not Llama 3.1's RoPE scaling, and no other is supported; {_WAY_OUT}")


def _factor(divisors: Tensor, unscaled: Tensor, original: int) -> float:
    """Return the factor of Llama 3.1's scaling that gives the last divisor, that of the lowest frequency.

    1 / divisor = (1 - smooth) / factor + smooth, where smooth is 0 below the middle band (apply_scaling in Meta's
    model.py). In a small model the last frequency may be in the band.
    """
    default = RopeScaling(1.0)
    low, high = default.low_freq_factor, default.high_freq_factor
    smooth = max(0.0, (original * unscaled[-1].item() / (2 * torch.pi) - low) / (high - low))
    rest = 1 / divisors[-1].item() - smooth
    if rest <= 0 or smooth >= 1:
        return 1.0
    factor = (1 - smooth) / rest
    return float(round(factor)) if abs(round(factor) / factor - 1) < 1e-4 else factor


def _checked_names(params: Params, infos: Mapping[str, TensorInfo]) -> dict[str, TensorSpec]:
    """Return the spec of every tensor by its name in the file.

    Raises UserError naming the first tensor that is unexpected, missing, of the wrong shape, or in an impossible type.
    """
    wanted = {gguf_name(spec): spec for spec in tensor_specs(params, tied="output.weight" not in infos)}
    for name in infos:
        if name not in wanted:
            raise UserError(f"unexpected tensor {name}, which changes the computation and is not supported; {_WAY_OUT}")
    for name, spec in wanted.items():
        info = infos.get(name)
        if info is None:
            raise UserError(f"tensor {name} is missing; download the file again")
        if info.shape != spec.shape:
            raise UserError(
                f"tensor {name} is {list(info.shape)}, should be {list(spec.shape)} by the metadata; download it again"
            )
        if isinstance(info.kind, BlockType) and spec.field not in (*MATRICES, "tok_embeddings"):
            raise UserError(f"tensor {name} is in {info.kind.name}, which only matrices can be; download it again")
    return wanted
