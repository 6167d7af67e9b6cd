"""LoRA adapters as PEFT saves them, merged into the weights of a model while they are loaded. (Hu et al. 2021)"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError, in_short
from ..quantization.int8 import ROWS_AT_ONCE
from ..system.files import read_json
from ..weights import TensorSpec
from .mapping import map_checkpoint, map_safetensors

_LOW_RANK = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")

# settings of LoraConfig that make another computation, and the values with which they do not
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base as well
    **dict.fromkeys(("use_dora", "lora_bias", "fan_in_fan_out", "use_qalora"), (False,)),
    **dict.fromkeys(("layer_replication", "alora_invocation_tokens", "trainable_token_indices"), (None, [])),
}


class LowRank(NamedTuple):
    """The change of a matrix [out, in]: scale * b @ a."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r], in the order of the rows that `Weights` has
    scale: float

    def part(self, dimension: int, wanted: range) -> LowRank:
        """Return the change of some rows (dimension 0) or columns (1)."""
        if dimension == 0:
            return self._replace(b=self.b[wanted.start : wanted.stop])
        return self._replace(a=self.a[:, wanted.start : wanted.stop])


def merged(matrix: Tensor, change: LowRank) -> Tensor:
    """Return the changed matrix [out, in] in its dtype. The sum is computed in fp32 and rounded once."""
    result = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    a = change.a.float()
    for rows, b, out in zip(*(t.split(ROWS_AT_ONCE) for t in (matrix, change.b, result)), strict=True):
        out.copy_(rows.float() + change.scale * (b.float() @ a))
    return result


class Adapter(NamedTuple):
    """What an adapter changes."""

    changes: dict[TensorSpec, LowRank]  # with the rows of `b` in Hugging Face's order
    replaced: dict[TensorSpec, Tensor]  # whole tensors (modules_to_save, save_embedding_layers)
    output: Tensor | None  # lm_head.weight for a model that ties it
    replaces_modules: bool  # whether some of them were trained (modules_to_save)


def read_adapter(folder: Path, specs: Mapping[str, TensorSpec]) -> Adapter:
    """Read adapter_config.json and adapter_model.safetensors, or .bin.

    specs: the tensors of the model by Hugging Face's names. Raises UserError for another kind of adapter, and for a
    tensor that the model does not have.
    """
    config = _checked_config(folder)
    names = ("adapter_model.safetensors", "adapter_model.bin")
    file = next((folder / name for name in names if (folder / name).exists()), None)
    if file is None:
        raise UserError(f"{folder}: there is no adapter_model.safetensors; download it")
    tensors = (map_safetensors if file.suffix == ".safetensors" else map_checkpoint)(file)
    pairs: dict[TensorSpec, dict[str, Tensor]] = {}
    replaced: dict[TensorSpec, Tensor] = {}
    output = None
    for name, tensor in tensors.items():
        low_rank = _LOW_RANK.fullmatch(name)
        whole_name = low_rank[1] + ".weight" if low_rank else name.replace(".base_layer.", ".")
        spec = _spec_of(whole_name, specs)
        if spec is None and not low_rank and whole_name.endswith("lm_head.weight"):
            output = tensor
            continue
        if spec is None or (low_rank and tensor.dim() != 2):
            reason = (
                "is of a layer that the model ties to another" if "lm_head" in name else "is not one of the model's"
            )
            raise UserError(
                f"{file}: tensor {in_short(name)} {reason}, or of a kind that is not supported; give the adapter's own "
                "model, or merge it with PEFT's merge_and_unload"
            )
        if low_rank is None:
            replaced[spec] = tensor
        else:  # an embedding's are transposed: its rows are looked up
            side, matrix = (("A", "B")[low_rank[3] == "A"], tensor.T) if low_rank[2] else (low_rank[3], tensor)
            pairs.setdefault(spec, {})[side] = matrix
    changes = {spec: _low_rank(file, spec, pair, config) for spec, pair in pairs.items()}
    for spec, tensor in replaced.items():
        if tuple(tensor.shape) != spec.shape:
            raise UserError(
                f"{file}: {spec.hf_name} is {list(tensor.shape)}, the model's is {list(spec.shape)}; give the model "
                "that the adapter was trained on, or merge it with PEFT's merge_and_unload"
            )
    return Adapter(changes, replaced, output, bool(config.get("modules_to_save")))


def _checked_config(folder: Path) -> dict[str, Any]:
    """Return the content of adapter_config.json. Raises UserError for another kind of adapter than LoRA."""
    file = folder / "adapter_config.json"
    if not file.exists():
        raise UserError(
            f"{folder}: {'there is no adapter_config.json' if folder.is_dir() else 'is no folder'}; {{argument}} "
            "should be what PEFT's save_pretrained wrote",
            argument="adapter",
        )
    config = read_json(file)
    for key, allowed in _SETTINGS.items():
        value = config.get(key, allowed[0])
        if not any(value == other and type(value) is type(other) for other in (*allowed, None)):
            raise UserError(
                f"{file}: {key} = {in_short(value)} is not supported, only LoRA that is added to the weights; "
                "merge it with PEFT's merge_and_unload"
            )
    return config


def _spec_of(name: str, specs: Mapping[str, TensorSpec]) -> TensorSpec | None:
    """Return the tensor of the model that an adapter's name means; LlamaModel's names have one "model." less."""
    name = name.removeprefix("base_model.model.")
    return specs.get(name) or specs.get(f"model.{name}")


def _low_rank(file: Path, spec: TensorSpec, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRank:
    """Return the change of a matrix. Raises UserError unless its two matrices fit together and to the model's."""
    a, b = pair.get("A"), pair.get("B")
    if a is None or b is None or (b.shape[0], a.shape[1]) != spec.shape or a.shape[0] != b.shape[1]:
        shapes = " and ".join(f"{side} {list(matrix.shape)}" for side, matrix in sorted(pair.items()))
        raise UserError(
            f"{file}: the LoRA of {spec.hf_name} has {shapes}, which does not fit to {list(spec.shape)}; give the "
            "adapter's own model"
        )
    rank, module = a.shape[0], spec.hf_name.removesuffix(".weight")
    patterns = config.get("alpha_pattern") or {}
    matching = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))  # get_pattern_key in PEFT
    key = next(matching, None)
    alpha = config.get("lora_alpha", 8) if key is None else patterns[key]
    if not isinstance(alpha, (int, float)):
        raise UserError(f"{file.with_name('adapter_config.json')}: lora_alpha should be a number, is {in_short(alpha)}")
    return LowRank(a, b, alpha / (rank**0.5 if config.get("use_rslora") else rank))
