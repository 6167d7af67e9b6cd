"""Reading and writing params.json and config.json, and what is refused."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama3_raw import Params, UserError
from llama3_raw.params import RopeScaling

SMALL: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 100, "norm_eps": 1e-5}
SMALL_HF: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "intermediate_size": 128,
}


def test_every_text_model_that_meta_lists() -> None:
    """Widths and context of Llama 3 to 3.3, from llama-models' list; hidden_dim as Meta's FeedForward computes it."""
    from llama_models.sku_list import llama3_1_family, llama3_2_family, llama3_3_family, llama3_family

    hidden = {4096: 14336, 8192: 28672, 16384: 53248, 2048: 8192, 3072: 8192}
    count = 0
    for family in (llama3_family, llama3_1_family, llama3_2_family, llama3_3_family):
        for model in family():
            content = dict(model.arch_args)
            if any(key.startswith("vision_") or key.endswith("_args") for key in content):
                with pytest.raises(UserError, match="changes the computation"):
                    Params.from_meta(content)
                continue
            params = Params.from_meta(content)
            assert params.hidden_dim == hidden[params.dim], model.descriptor()
            if content["use_scaled_rope"]:
                small = model.descriptor().startswith("Llama3.2")
                assert params.rope_scaling == RopeScaling(32.0 if small else 8.0, 1.0, 4.0, 8192)
                assert params.max_seq_len == 131072
            else:
                assert params.rope_scaling is None
                assert params.max_seq_len == 8192
            written = params.to_meta()  # like Meta's own file
            assert written.items() <= content.items()
            assert Params.from_meta(written) == Params.from_hf(params.to_hf()) == params
            count += 1
    assert count >= 18


def test_defaults_are_those_of_meta() -> None:
    from llama_models.llama3.args import ModelArgs

    meta = ModelArgs(**SMALL)
    params = Params.from_meta(SMALL)
    assert params.n_kv_heads == meta.n_kv_heads == 4
    assert params.rope_theta == meta.rope_theta
    assert (params.rope_scaling is not None) == meta.use_scaled_rope
    assert params.hidden_dim == 256  # two thirds of 4 * 64 is 170, rounded up to Meta's multiple_of, 256


def test_given_scaling_factor_and_context() -> None:
    params = Params.from_meta({**SMALL, "use_scaled_rope": True, "rope_scaling_factor": 16, "max_seq_len": 4096})
    assert params.rope_scaling == RopeScaling(16.0)
    assert params.max_seq_len == 4096
    assert Params.from_meta({**SMALL, "n_kv_heads": None, "ffn_dim_multiplier": None}) == Params.from_meta(SMALL)


def test_other_keys_are_ignored() -> None:
    extra = {"model": "x", "max_batch_size": 7, "vision_chunk_size": -1, "quantization_args": None, "lora_args": None}
    assert Params.from_meta({**SMALL, **extra}) == Params.from_meta(SMALL)
    extra = {
        "architectures": ["LlamaForCausalLM"],
        "type": "text",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
    }
    assert Params.from_hf({**SMALL_HF, **extra}) == Params.from_hf(SMALL_HF)


def test_old_and_new_rope_fields_of_hf() -> None:
    llama3 = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = Params.from_hf({**SMALL_HF, "rope_theta": 500000.0, "rope_scaling": llama3})
    new = Params.from_hf({**SMALL_HF, "rope_parameters": {**llama3, "rope_theta": 500000.0}})
    assert old == new
    assert old.rope_scaling == RopeScaling(32.0)
    assert old.rope_theta == 500000.0
    assert old.max_seq_len == 131072
    plain = Params.from_hf({**SMALL_HF, "rope_theta": 500000.0, "rope_scaling": None, "max_position_embeddings": 99})
    assert plain.rope_scaling is None
    assert plain.max_seq_len == 99


def test_floats_for_integers() -> None:
    in_floats = {key: float(value) if type(value) is int else value for key, value in SMALL_HF.items()}
    assert Params.from_hf({**in_floats, "rope_theta": 10000}) == Params.from_hf(SMALL_HF)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# what config.json holds in the wild, each as transformers understands it
AS_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "nothing but the sizes": {"rms_norm_eps": None, "rope_theta": None, "num_key_value_heads": None},
    "rms_norm_eps is missing": {"rms_norm_eps": None},
    "both rope keys, one for Llama 3.1": {
        "rope_theta": 5e5,
        "rope_scaling": LLAMA3_ROPE,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "both rope keys, the older is null": {"rope_scaling": None, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}},
    "theta only beside rope_parameters": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
    "linear scaling by 1": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 1.0}},
    "head_dim": {"head_dim": 32},
    "Mistral without a window": {"model_type": "mistral", "sliding_window": None},
    "Mistral with a window as long as its context": {
        "model_type": "mistral",
        "sliding_window": 4096,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 2,
    },
}


@pytest.mark.parametrize("case", AS_TRANSFORMERS)
def test_config_json_in_the_wild(case: str) -> None:
    from transformers import LlamaConfig, MistralConfig

    change = AS_TRANSFORMERS[case]
    many_heads = {"num_attention_heads": 8} if change.get("model_type") == "mistral" else {}
    content = {key: value for key, value in {**SMALL_HF, **many_heads, **change}.items() if value is not None}
    content |= {key: None for key in ("sliding_window", "rope_scaling") if key in change and change[key] is None}
    kind = MistralConfig if content["model_type"] == "mistral" else LlamaConfig
    theirs = kind.from_dict({"max_position_embeddings": 8192, **content})
    ours = Params.from_hf({"max_position_embeddings": 8192, **content})
    rope: Any = theirs.rope_parameters
    assert ours.rope_theta == rope["rope_theta"]
    assert (ours.rope_scaling is not None) == (rope["rope_type"] == "llama3")
    assert (ours.norm_eps, ours.n_kv_heads) == (theirs.rms_norm_eps, theirs.num_key_value_heads)
    assert (ours.head_dim, ours.max_seq_len) == (theirs.head_dim, theirs.max_position_embeddings)


WRONG_META = [
    *(({key: None}, f"{key} is missing") for key in SMALL),
    ({"dim": "64"}, "dim should be a positive integer, is '64'"),
    ({"dim": 64.5}, "dim should be a positive integer, is 64.5"),
    ({"head_dim": 15}, "head of 15 values"),
    ({"n_layers": True}, "n_layers should be a positive integer, is True"),
    ({"n_layers": 0}, "n_layers should be a positive integer, is 0"),
    ({"vocab_size": -1}, "vocab_size should be a positive integer, is -1"),
    ({"norm_eps": "1e-5"}, "norm_eps should be a positive number"),
    ({"norm_eps": float("nan")}, "norm_eps should be a positive number"),
    ({"norm_eps": 0}, "norm_eps should be a positive number"),
    ({"norm_eps": 10**400}, "norm_eps should be a positive number"),
    ({"ffn_dim_multiplier": 1e300}, "ffn_dim_multiplier = 1e.300 makes the feed-forward impossible"),
    ({"n_layers": 10**9}, "1000000000 layers are impossible"),
    ({"rope_theta": -1.0}, "rope_theta should be a positive number"),
    ({"use_scaled_rope": 1}, "use_scaled_rope should be true or false, is 1"),
    ({"n_heads": 5}, "dim = 64 does not divide into n_heads = 5"),
    ({"n_kv_heads": 3}, "4 heads cannot share 3 kv heads"),
    ({"n_kv_heads": 8}, "4 heads cannot share 8 kv heads"),
    ({"n_heads": 64}, "head of 1 values"),
    ({"hidden_dim": 128, "head_dim": 16}, "a key of Mistral's params.json"),
    ({"vision_chunk_size": 448}, "vision_chunk_size = 448 changes the computation"),
    ({"quantization_args": {"group_size": 256}}, "quantization_args .* changes the computation"),
    ({"lora_args": {"rank": 16, "scale": 2.0}}, "lora_args .* changes the computation"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_META, ids=lambda value: str(value)[:40])
def test_refused_by_name_in_params_json(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Params.from_meta({**SMALL, **change})


WRONG_HF = [
    ({"hidden_size": 64.5}, "hidden_size should be a positive integer, is 64.5"),
    ({"model_type": "qwen2"}, "model_type = 'qwen2'"),
    ({"attention_bias": True}, "attention_bias = True changes the computation"),
    ({"mlp_bias": True}, "mlp_bias = True changes the computation"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu' changes the computation"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized .*gptq.* get the model in bf16"),
    ({"model_type": "mistral"}, "sliding_window = 4096 .*the key is missing"),
    ({"model_type": "mistral", "sliding_window": 64}, "sliding_window = 64 changes the computation"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' changes the computation"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0}}, "rope type 'dynamic'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
    ({"rope_scaling": "llama3"}, "rope_scaling should be an object"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"num_attention_heads": 7}, "hidden_size = 64 does not divide"),
    ({"head_dim": 15}, "head of 15 values"),
    ({"head_dim": None, "num_attention_heads": 5}, "hidden_size = 64 does not divide"),
    ({"rope_parameters": {"rope_theta": 1.0}, "rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn'"),
    ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "differ from layer to layer"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_HF, ids=lambda value: str(value)[:40])
def test_refused_by_name_in_config_json(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Params.from_hf({**SMALL_HF, **change})


sizes = st.integers(1, 500)
any_params = st.builds(
    lambda head_dim, n_kv_heads, n_rep, **rest: Params(
        dim=2 * head_dim * n_kv_heads * n_rep,
        n_heads=n_kv_heads * n_rep,
        n_kv_heads=n_kv_heads,
        head_dim=2 * head_dim,
        **rest,
    ),
    head_dim=sizes,
    n_kv_heads=st.integers(1, 16),
    n_rep=st.integers(1, 8),
    n_layers=sizes,
    vocab_size=sizes,
    hidden_dim=st.integers(2, 2**20),
    norm_eps=st.floats(1e-8, 1e-3),
    rope_theta=st.floats(1.0, 1e7),
    rope_scaling=st.none() | st.builds(RopeScaling, st.sampled_from([8.0, 16.0, 32.0])),
    max_seq_len=st.sampled_from([8192, 131072, 512]),
)


def test_a_head_dim_of_its_own_is_written_too() -> None:
    changes: list[dict[str, Any]] = [{"head_dim": 32}, {"head_dim": 16, "n_heads": 6, "n_kv_heads": 2}]
    for change in changes:
        params = replace(Params.from_meta(SMALL), **change)
        assert params.to_meta()["head_dim"] == params.head_dim
        assert Params.from_meta(params.to_meta()) == params
    assert "head_dim" not in Params.from_meta(SMALL).to_meta()


@given(any_params)
def test_written_and_read_again(params: Params) -> None:
    assert Params.from_meta(params.to_meta()) == Params.from_hf(params.to_hf()) == params


INEXPRESSIBLE = [
    ({"rope_scaling": RopeScaling(8.0, low_freq_factor=2.0)}, "RopeScaling.* is not Llama 3.1's scaling"),
    ({"rope_scaling": RopeScaling(8.0, original_max_seq_len=4096)}, "RopeScaling"),
]


@pytest.mark.parametrize(("change", "message"), INEXPRESSIBLE, ids=lambda value: str(value)[:40])
def test_what_params_json_cannot_express(change: dict[str, Any], message: str) -> None:
    params = replace(Params.from_meta(SMALL), **change)
    assert Params.from_hf(params.to_hf()) == params
    with pytest.raises(UserError, match=message):
        params.to_meta()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
meta_keys = [*SMALL, "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "rope_theta", "use_scaled_rope", "max_seq_len"]
hf_keys = [*SMALL_HF, "num_key_value_heads", "rope_theta", "rope_scaling", "rope_parameters", "head_dim", "hidden_act"]


@given(st.dictionaries(st.sampled_from(meta_keys), anything), st.dictionaries(st.sampled_from(hf_keys), anything))
def test_only_user_errors_are_raised(meta: dict[str, Any], hf: dict[str, Any]) -> None:
    for read, content in ((Params.from_meta, {**SMALL, **meta}), (Params.from_hf, {**SMALL_HF, **hf})):
        with contextlib.suppress(UserError):
            read(content)
