"""`Params`: the content of params.json (Meta's) or config.json (Hugging Face's), checked and frozen."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError, in_short
from .system.files import read_json

# more than any model has; a file with larger numbers is damaged
_MAX_VALUE = 2**31
_MAX_LAYERS = 10_000

# dim -> ffn_dim_multiplier and multiple_of in Meta's models of that width (llama_models.sku_list)
_META_FEED_FORWARD = {
    2048: (1.5, 256),
    3072: (1.0, 256),
    4096: (1.3, 1024),
    8192: (1.3, 4096),
    16384: (1.2, 4096),
}


@dataclass(frozen=True)
class RopeScaling:
    """The RoPE scaling of Llama 3.1 and later, for a longer context. (apply_scaling in Meta's model.py)"""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class Params:
    """The numbers that define a Llama 3 model, named as in Meta's ModelArgs.

    `head_dim` and `hidden_dim` are the widths of one attention head and of the SwiGLU layer; `max_seq_len` is the
    context the model was trained for, in tokens.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    head_dim: int
    hidden_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_seq_len: int

    @staticmethod
    def from_file(path: str | Path) -> Params:
        """Read params.json or config.json. Raises UserError naming the file and the key that is wrong."""
        path = Path(path)
        content = read_json(path)
        try:
            return Params.from_hf(content) if "hidden_size" in content else Params.from_meta(content)
        except UserError as error:
            raise UserError(f"{path}: {in_short(error.naming('{argument}'))}", argument=error.argument) from error

    @staticmethod
    def from_meta(content: Mapping[str, Any]) -> Params:
        """Return the params for the content of a params.json. (ModelArgs in llama_models/llama3/args.py)"""
        for key, value in content.items():
            if (key.startswith("vision_") or key in ("quantization_args", "lora_args")) and not _is_off(value):
                raise UserError(f"{key} = {value!r} changes the computation and is not supported")
        if "hidden_dim" in content:  # with other defaults than Meta's
            raise UserError(
                "hidden_dim is a key of Mistral's params.json, which is not supported; with the model's config.json, "
                "give {argument} safetensors",
                argument="format",
            )
        fields = _Fields(content)
        dim = fields.integer("dim")
        n_layers = fields.integer("n_layers")
        n_heads = fields.integer("n_heads")
        if content.get("head_dim") is None and dim % n_heads:
            raise UserError(f"dim = {dim} does not divide into n_heads = {n_heads} heads")

        multiplier = fields.number("ffn_dim_multiplier", default=None)
        if multiplier is not None and not 1 <= multiplier * _hidden_dim(dim) < _MAX_VALUE:
            raise UserError(f"ffn_dim_multiplier = {multiplier} makes the feed-forward impossible")
        hidden_dim = _hidden_dim(dim, multiplier, fields.integer("multiple_of", default=256))

        use_scaled_rope = fields.boolean("use_scaled_rope", default=False)
        scaling_factor = fields.number("rope_scaling_factor", default=None)
        if scaling_factor is None:  # Llama 3.2 1B and 3B were trained with 32, but their params.json does not say so
            scaling_factor = 32.0 if (dim, n_layers) in ((2048, 16), (3072, 28)) else 8.0
        return _checked(
            Params(
                dim=dim,
                n_layers=n_layers,
                n_heads=n_heads,
                n_kv_heads=fields.integer("n_kv_heads", default=n_heads),
                vocab_size=fields.integer("vocab_size"),
                head_dim=fields.integer("head_dim", default=dim // n_heads),  # not one of Meta's keys; see to_meta
                hidden_dim=hidden_dim,
                norm_eps=fields.number("norm_eps"),
                rope_theta=fields.number("rope_theta", default=500000.0),
                rope_scaling=RopeScaling(scaling_factor) if use_scaled_rope else None,
                max_seq_len=fields.integer("max_seq_len", default=131072 if use_scaled_rope else 8192),
            )
        )

    @staticmethod
    def from_hf(content: Mapping[str, Any]) -> Params:
        """Return the params for the content of a config.json. (LlamaConfig in transformers, before and since 5.0)

        A Mistral model without a sliding window is the same computation, with other defaults. (MistralConfig)
        """
        fields = _Fields(content)
        kind = content.get("model_type", "llama")
        if kind not in ("llama", "mistral"):
            raise UserError(f"model_type = {kind!r}: only 'llama' is supported, and 'mistral' without a sliding window")
        if not _is_off(content.get("quantization_config")):
            raise UserError(
                f"{_quantization(content['quantization_config'])}; get the model in bf16, or a GGUF file of it"
            )
        for key in ("attention_bias", "mlp_bias"):
            if not _is_off(content.get(key)):
                raise UserError(f"{key} = {content[key]!r} changes the computation and is not supported")
        if content.get("hidden_act", "silu") != "silu":
            raise UserError(f"hidden_act = {content['hidden_act']!r} changes the computation; only 'silu' is supported")
        dim = fields.integer("hidden_size")
        n_heads = fields.integer("num_attention_heads")
        if content.get("head_dim") is None and dim % n_heads:
            raise UserError(f"hidden_size = {dim} does not divide into num_attention_heads = {n_heads} heads")

        rope_theta, scaling = _hf_rope(content, fields)
        max_seq_len = fields.integer("max_position_embeddings", default=131072 if scaling else 8192)
        if kind == "mistral" and content.get("sliding_window", 4096) is not None:
            window = fields.integer("sliding_window", default=4096)
            if window < max_seq_len:
                missing = "" if "sliding_window" in content else " (which MistralConfig takes, as the key is missing)"
                raise UserError(f"sliding_window = {window}{missing} changes the computation; only null is supported")
        return _checked(
            Params(
                dim=dim,
                n_layers=fields.integer("num_hidden_layers"),
                n_heads=n_heads,
                n_kv_heads=fields.integer("num_key_value_heads", default=8 if kind == "mistral" else n_heads),
                vocab_size=fields.integer("vocab_size"),
                head_dim=fields.integer("head_dim", default=dim // n_heads),
                hidden_dim=fields.integer("intermediate_size"),
                norm_eps=fields.number("rms_norm_eps", default=1e-6),
                rope_theta=rope_theta,
                rope_scaling=scaling,
                max_seq_len=max_seq_len,
            )
        )

    def check_ids(self, ids: Iterable[int]) -> None:
        """Raise UserError for a token id outside the vocabulary."""
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise UserError(f"token id {token} is outside the model's vocabulary of {self.vocab_size}")

    def to_meta(self) -> dict[str, Any]:
        """Return the content of a params.json from which `from_meta` builds the same params; only needed keys.

        A head_dim that is not dim / n_heads gets a key of its own, which Meta's code does not know. Raises UserError if
        params.json cannot express the RoPE scaling.
        """
        scaling = self.rope_scaling
        if scaling and scaling != RopeScaling(scaling.factor):
            raise UserError(f"{scaling} is not Llama 3.1's scaling; params.json can express only the factor")
        multiplier, multiple_of = _META_FEED_FORWARD.get(self.dim, (1.0, 256))
        if _hidden_dim(self.dim, multiplier, multiple_of) != self.hidden_dim:
            multiplier, multiple_of = self.hidden_dim / _hidden_dim(self.dim), self.hidden_dim
        content = {
            "dim": self.dim,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "vocab_size": self.vocab_size,
            "ffn_dim_multiplier": multiplier,
            "multiple_of": multiple_of,
            "norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "use_scaled_rope": scaling is not None,
            "rope_scaling_factor": scaling.factor if scaling else None,
            "max_seq_len": self.max_seq_len,
            "head_dim": self.head_dim,
        }
        for key in ("use_scaled_rope", "rope_scaling_factor", "max_seq_len", "head_dim"):
            shorter = {other: value for other, value in content.items() if other != key}
            with contextlib.suppress(UserError):  # dim / n_heads may not be an integer
                if Params.from_meta(shorter) == self:
                    content = shorter
        assert Params.from_meta(content) == self
        return content

    def to_hf(self) -> dict[str, Any]:
        """Return the keys of a config.json from which `from_hf` builds the same params.

        The RoPE keys are those of transformers before version 5, which later versions read too.
        """
        scaling = self.rope_scaling
        return {
            "hidden_size": self.dim,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "intermediate_size": self.hidden_dim,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling
            and {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            },
            "max_position_embeddings": self.max_seq_len,
        }


def _hidden_dim(dim: int, multiplier: float | None = None, multiple_of: int = 1) -> int:
    """Meta's FeedForward: two thirds of 4 * dim, times the multiplier, rounded up to multiple_of."""
    hidden_dim = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden_dim = int(multiplier * hidden_dim)
    return -(-hidden_dim // multiple_of) * multiple_of


def _hf_rope(content: Mapping[str, Any], fields: _Fields) -> tuple[float, RopeScaling | None]:
    """Return rope_theta and the scaling of a config.json. Raises UserError for a RoPE that is not Llama's."""
    # transformers 5 has all in rope_parameters; before, rope_theta was a separate key next to rope_scaling, which still
    # wins where both are there (convert_rope_params_to_dict in modeling_rope_utils.py)
    new, old = fields.mapping("rope_parameters"), fields.mapping("rope_scaling")
    for source in (content, new, old):
        if source.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(f"partial_rotary_factor = {source['partial_rotary_factor']!r} is not supported")
    rope = old or new
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError("rope_parameters that differ from layer to layer are not supported")
    rope_theta = _first_number("rope_theta", rope, content, new) or 10000.0
    rope_fields, kind = _Fields(rope), rope.get("rope_type", rope.get("type", "default"))  # "type" is the older key
    if kind == "linear" and rope_fields.number("factor") == 1:
        kind = "default"
    if kind == "default":
        return rope_theta, None
    if kind != "llama3":
        raise UserError(f"rope type {kind!r} changes the computation; supported: default, llama3")
    scaling = RopeScaling(
        factor=rope_fields.number("factor"),
        low_freq_factor=rope_fields.number("low_freq_factor"),
        high_freq_factor=rope_fields.number("high_freq_factor"),
        original_max_seq_len=rope_fields.integer("original_max_position_embeddings"),
    )
    return rope_theta, scaling


def _first_number(key: str, *sources: Mapping[str, Any]) -> float | None:
    """Return the first value of a key that is not missing, or None."""
    return next((value for source in sources if (value := _Fields(source).number(key, default=None))), None)


def _quantization(config: Any) -> str:
    """Return what a quantization_config says, as text."""
    method = config.get("quant_method") if isinstance(config, dict) else None
    return f"the weights are quantized (quantization_config: {in_short(method or config)}), which is not supported"


def _is_off(value: Any) -> bool:
    """Whether a value says that a feature is absent: null, false, -1, an empty object."""
    return value is None or value is False or value == -1 or value == {}


class _Fields:
    """Typed access to a JSON object. A missing key has its default; a value of the wrong type raises UserError."""

    REQUIRED: Any = object()

    def __init__(self, content: Mapping[str, Any]):
        self.content = content

    def _get(self, key: str, default: Any, kinds: tuple[type, ...], expected: str) -> Any:
        value = self.content.get(key)
        if value is None:
            if default is self.REQUIRED:
                raise UserError(f"{key} is missing; download the file again")
            return default
        if isinstance(value, bool) is not (bool in kinds) or not isinstance(value, kinds):
            raise UserError(f"{key} should be {expected}, is {value!r}")
        return value

    def integer(self, key: str, default: Any = REQUIRED) -> int:
        value = self._get(key, default, (int, float), "a positive integer")
        if not 1 <= value < _MAX_VALUE or value != int(value):  # some tools write 8192.0
            raise UserError(f"{key} should be a positive integer, is {value!r}")
        return int(value)

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        value = self._get(key, default, (int, float), "a positive number")
        if value is not None and not 0 < value <= sys.float_info.max:
            raise UserError(f"{key} should be a positive number, is {value!r}")
        return value if value is None else float(value)

    def boolean(self, key: str, default: bool) -> bool:
        return bool(self._get(key, default, (bool,), "true or false"))

    def mapping(self, key: str) -> Mapping[str, Any]:
        value: Mapping[str, Any] = self._get(key, {}, (dict,), "an object")
        return value


def _checked(params: Params) -> Params:
    """Return the params. Raises UserError if their layers, heads or RoPE are impossible."""
    if params.n_layers > _MAX_LAYERS:
        raise UserError(f"{params.n_layers} layers are impossible; the largest Llama has 126")
    if params.n_heads % params.n_kv_heads:
        raise UserError(f"{params.n_heads} heads cannot share {params.n_kv_heads} kv heads evenly")
    if params.head_dim % 2:
        raise UserError(f"a head of {params.head_dim} values cannot be rotated in pairs; head_dim must be even")
    scaling = params.rope_scaling
    if scaling and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise UserError(
            f"low_freq_factor = {scaling.low_freq_factor} should be below high_freq_factor = {scaling.high_freq_factor}"
        )
    return params
