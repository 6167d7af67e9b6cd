"""Reading GGUF files, which the package gguf writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from torch import Tensor

from llama3_raw import LayerWeights, Params, Weights, forward
from llama3_raw.checkpoint.gguf_header import StringArray, read_header
from llama3_raw.checkpoint.gguf_reading import GgufFile, read_gguf, rope_scaling_of
from llama3_raw.checkpoint.gguf_vocabulary import CONTROL, NORMAL, USER_DEFINED, read_vocabulary, tokenizer_of_gguf
from llama3_raw.errors import UserError
from llama3_raw.model import REFERENCE
from llama3_raw.params import RopeScaling
from llama3_raw.quantization.blocks import BLOCK_TYPES, Blocks, BlockType
from llama3_raw.quantization.matrix import embed
from llama3_raw.tokenizer import SPLIT_PATTERN
from llama3_raw.weights import tensor_specs
from tests.blocks import random_blocks
from tests.checkpoint.files import assert_same, file_of
from tests.references import random_weights

PARAMS = Params(
    dim=256,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=96,
    head_dim=64,
    hidden_dim=512,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=None,
    max_seq_len=8192,
)
NAMES = {
    **{"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"},
    **{"attention_norm": "attn_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output"},
    **{"ffn_norm": "ffn_norm", "w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"},
}
IDS = torch.tensor([5, 90, 17, 3])


def by_gguf_name(params: Params, weights: Weights) -> dict[str, Tensor]:
    """Return the tensors of a model by their names in GGUF, norms in fp32."""
    tensors = {}
    for spec in tensor_specs(params, tied=weights.output is weights.tok_embeddings):
        tensor = getattr(weights if spec.layer is None else weights.layers[spec.layer], spec.field)
        layer = "" if spec.layer is None else f"blk.{spec.layer}."
        tensors[f"{layer}{NAMES[spec.field]}.weight"] = tensor.float() if tensor.dim() == 1 else tensor
    return tensors


def metadata_of(params: Params) -> dict[str, Any]:
    return {
        "llama.embedding_length": params.dim,
        "llama.block_count": params.n_layers,
        "llama.feed_forward_length": params.hidden_dim,
        "llama.attention.head_count": params.n_heads,
        "llama.attention.head_count_kv": params.n_kv_heads,
        "llama.attention.key_length": params.head_dim,
        "llama.rope.dimension_count": params.head_dim,
        "llama.rope.freq_base": params.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": params.norm_eps,
        "llama.context_length": params.max_seq_len,
    }


def add_metadata(writer: gguf.GGUFWriter, metadata: Mapping[str, Any]) -> None:
    """Add metadata: integers as UINT32, floats as FLOAT32, lists as arrays; None is left out."""
    add: dict[type, Any] = {int: writer.add_uint32, float: writer.add_float32}
    add |= {bool: writer.add_bool, str: writer.add_string}
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            add[type(value)](key, value)


def write(
    file: Path,
    tensors: Mapping[str, Tensor | tuple[Tensor, str]],
    metadata: Mapping[str, Any] | None = None,
    architecture: str = "llama",
    **options: Any,
) -> Path:
    """Write a GGUF file with the package gguf. A tensor in blocks is given with the name of its type."""
    writer = gguf.GGUFWriter(file, architecture, **options)
    add_metadata(writer, metadata_of(PARAMS) if metadata is None else metadata)
    for name, tensor in tensors.items():
        values, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        if kind is None and values.dtype == torch.bfloat16:
            values, kind = values.view(torch.uint8), "BF16"
        writer.add_tensor(name, values.numpy(), raw_dtype=gguf.GGMLQuantizationType[kind] if kind else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def weights_of(model: GgufFile, dtype: torch.dtype = torch.float32) -> Weights:
    """Return the tensors of a file as `Weights`, those in blocks as Blocks."""
    top: dict[str, Any] = {}
    layers: list[dict[str, Any]] = [{} for _ in range(model.params.n_layers)]
    for spec in tensor_specs(model.params, model.tied):
        name = spec.meta_name
        tensor: Any = model.tensors[name]
        matrix = Blocks(tensor, model.kinds[name], dtype) if name in model.kinds else tensor.to(dtype)
        (top if spec.layer is None else layers[spec.layer])[spec.field] = matrix
    top.setdefault("output", top["tok_embeddings"])
    return Weights(layers=tuple(LayerWeights(**fields) for fields in layers), **top)


def logits_of(params: Params, weights: Weights) -> Tensor:
    return forward(weights, params, IDS, ops=REFERENCE._replace(embed=embed))


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(PARAMS, torch.float32, seed=0)


@pytest.fixture(scope="module")
def tensors(weights: Weights) -> dict[str, Tensor]:
    return by_gguf_name(PARAMS, weights)


def divisors_of(params: Params, scaling: RopeScaling) -> Tensor:
    """Return rope_freqs.weight as llama.cpp's convert_hf_to_gguf.py computes it."""
    divisors = []
    for pair in range(params.head_dim // 2):
        frequency = 1 / params.rope_theta ** (2 * pair / params.head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < scaling.original_max_seq_len / scaling.high_freq_factor:
            divisors.append(1.0)
        elif wavelength > scaling.original_max_seq_len / scaling.low_freq_factor:
            divisors.append(scaling.factor)
        else:
            smooth = (scaling.original_max_seq_len / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            divisors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return torch.tensor(divisors)


@pytest.mark.parametrize("scaling", [None, RopeScaling(8.0), RopeScaling(32.0)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_params_and_weights_are_those_that_were_written(
    tmp_path: Path, dtype: torch.dtype, tied: bool, scaling: RopeScaling | None
) -> None:
    params = replace(PARAMS, rope_scaling=scaling)
    original = random_weights(params, dtype, seed=0, tied=tied)
    tensors = by_gguf_name(params, original)
    if scaling:
        tensors["rope_freqs.weight"] = divisors_of(params, scaling)
    model = read_gguf(write(tmp_path / "model.gguf", tensors))
    assert (model.params, model.tied, model.kinds) == (params, tied, {})
    loaded = weights_of(model, dtype)
    assert_same(loaded, original)
    assert torch.equal(logits_of(model.params, loaded), logits_of(params, original))


def in_blocks(kind: BlockType, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, str]]:
    """Return the matrices in blocks: as gguf quantizes them, or with random bytes if it cannot."""
    blocks = {}
    for seed, (name, tensor) in enumerate(tensors.items()):
        if tensor.dim() == 1:
            continue
        if kind.name.endswith("_K"):
            n_blocks = tensor.shape[1] // kind.n_values
            data = random_blocks(kind, len(tensor), n_blocks, seed, largest=1e-4)
        else:
            data = torch.from_numpy(gguf.quantize(tensor.numpy(), gguf.GGMLQuantizationType[kind.name]))
        blocks[name] = data, kind.name
    return blocks


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=BLOCK_TYPES)
def test_logits_of_blocks_are_those_of_the_matrices_that_gguf_dequantizes(
    tmp_path: Path, tensors: dict[str, Tensor], kind: BlockType
) -> None:
    blocks = in_blocks(kind, tensors)
    model = read_gguf(write(tmp_path / "blocks.gguf", {**tensors, **blocks}))
    dequantized = {
        name: torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind.name]))
        for name, (data, _) in blocks.items()
    }
    dense = read_gguf(write(tmp_path / "dense.gguf", {**tensors, **dequantized}))
    assert set(model.kinds.values()) == {kind}
    assert len(model.kinds) == 2 * 7 + 2
    logits = logits_of(model.params, weights_of(model))
    assert logits.std() > 0.01
    assert torch.equal(logits, logits_of(dense.params, weights_of(dense)))


def test_tensors_are_views_of_the_file_and_writing_to_them_does_not_change_it(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    file = write(tmp_path / "model.gguf", {**tensors, **in_blocks(BLOCK_TYPES["Q8_0"], tensors)})
    content = file.read_bytes()
    model = read_gguf(file)
    assert {file_of(tensor) for tensor in model.tensors.values()} == {str(file)}
    for tensor in model.tensors.values():
        tensor.zero_()
    assert file.read_bytes() == content


def test_the_header_is_what_gguf_reads(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_custom_alignment(64)
    for kind, value in {"uint8": 255, "int8": -1, "uint16": 65535, "int16": -2, "int32": -3, "uint64": 2**63}.items():
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    writer.add_int64("a.int64", -(2**62))
    writer.add_float64("a.float64", 0.1)
    writer.add_float32("a.float32", 1e-5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "ä\0\n")
    arrays: list[list[Any]] = [[1, -2], [0.5, 2.0], [True, False], ["one", "", "drei €"]]
    for number, array in enumerate(arrays):
        writer.add_array(f"a.array.{number}", array)
    for number in range(5):
        writer.add_tensor(f"t{number}", np.full((number + 1, 3), number, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header, theirs = read_header(tmp_path / "model.gguf"), gguf.GGUFReader(tmp_path / "model.gguf")
    ours = {key: value.read() if isinstance(value, StringArray) else value for key, value in header.metadata.items()}
    assert ours.pop("a.float32") == 1e-5
    assert ours == {key: field.contents() for key, field in theirs.fields.items() if key in ours}
    assert len(ours) == len(theirs.fields) - 4  # version and the two counts, and a.float32
    assert [info.begin for info in header.tensors.values()] == [tensor.data_offset for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        assert torch.equal(header.map(tensor.name), torch.from_numpy(np.array(tensor.data)))


def split(folder: Path, tensors: Mapping[str, Tensor]) -> list[Path]:
    """Write the model in several files."""
    write(folder / "model.gguf", tensors, split_max_tensors=6)
    return sorted(folder.glob("*.gguf"))


def test_a_split_model_is_read_from_any_of_its_files(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    files = split(tmp_path, tensors)
    assert [file.name for file in files] == [f"model-0000{number}-of-00004.gguf" for number in range(1, 5)]
    whole = read_gguf(write(tmp_path / "whole.gguf", tensors))
    for file in files:
        model = read_gguf(file)
        assert (model.params, model.file) == (whole.params, files[0])
        assert list(model.tensors) == list(whole.tensors)
        assert_same(weights_of(model), weights_of(whole))
    assert {file_of(tensor) for tensor in model.tensors.values()} == set(map(str, files))


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as refused:
        read_gguf(file)
    message = str(refused.value)
    assert "\n" not in message
    assert str(file.parent) in message
    return message


def test_a_split_model_that_is_not_complete_is_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    files = split(tmp_path, tensors)
    first, second, third, _ = files
    aside = tmp_path / "aside"
    second.rename(aside)
    third.write_bytes(files[3].read_bytes())
    message = refusal(first)
    assert "model-00002-of-00004.gguf should be next to it" in message
    assert "00003" not in message
    aside.rename(second)
    assert "model-00003-of-00004.gguf: is part 3 of 4 counted from 0, not part 2 of 4" in refusal(first)
    lone = first.rename(tmp_path / "lone.gguf")
    assert "is part 1 of 4 of a model; name it NAME-00001-of-00004.gguf" in refusal(lone)


def test_parts_of_two_models_are_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    files = split(tmp_path, tensors)
    (tmp_path / "other").mkdir()
    more = {**tensors, "extra": torch.zeros(32)}
    other = split(tmp_path / "other", more)
    files[3].write_bytes(other[3].read_bytes())
    assert "the parts should hold 21 tensors, they hold 22" in refusal(files[0])
    files[3].write_bytes(files[0].read_bytes())
    assert "is part 0 of 4 counted from 0, not part 3 of 4" in refusal(files[0])


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"general.type": "adapter"}, "holds 'adapter', not a model"),
        ({"general.quantization_version": 1}, "general.quantization_version = 1 is not supported"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count should be a positive number, is 0"),
        ({"llama.attention.head_count_kv": 3}, "4 heads cannot share 3 kv heads"),
        ({"llama.context_length": "long"}, "llama.context_length should be a positive number, is long"),
        ({"llama.block_count": 2.5}, "llama.block_count should be an integer, is 2.5"),
        ({"llama.feed_forward_length": [512, 256]}, "llama.feed_forward_length differs from layer to layer"),
        ({"llama.attention.head_count_kv": [2, 1]}, "llama.attention.head_count_kv differs from layer to layer"),
        ({"llama.attention.value_length": 32}, "llama.attention.value_length = 32 is not the head's 64"),
        ({"llama.rope.dimension_count": 32}, "llama.rope.dimension_count = 32 is not the head's 64"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8 changes the computation"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale = 0.5 changes the computation"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, "RoPE scaling 'linear' by 4.0"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}, "RoPE scaling 'yarn' by 2.0"),
        ({"llama.rope.scaling.type": "longrope"}, "RoPE scaling 'longrope'"),
        ({"llama.rope.scale_linear": 2.0}, "RoPE scaling 'none' by 2.0"),
        ({"llama.rope.scaling.factor": [2.0, 1.0]}, "RoPE scaling 'none' by [2.0, 1.0]"),
        ({"split.count": "two"}, "split.count = two should be a number"),
        ({"llama.embedding_length": 512}, "tensor token_embd.weight is [96, 256], should be [96, 512] by the metadata"),
    ],
)
def test_metadata_of_another_computation_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], changed: dict[str, Any], expected: str
) -> None:
    assert expected in refusal(write(tmp_path / "model.gguf", tensors, {**metadata_of(PARAMS), **changed}))


@pytest.mark.parametrize(
    "harmless",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0},
        {"llama.rope.scaling.type": "none", "llama.expert_count": 0},
        {"llama.vocab_size": 96, "llama.attention.value_length": 64, "general.quantization_version": 2},
        {"llama.attention.key_length": None, "llama.rope.dimension_count": None},
    ],
)
def test_metadata_that_changes_nothing_is_accepted(
    tmp_path: Path, tensors: dict[str, Tensor], harmless: dict[str, Any]
) -> None:
    assert read_gguf(write(tmp_path / "model.gguf", tensors, {**metadata_of(PARAMS), **harmless})).params == PARAMS


def test_the_defaults_are_those_of_llama_cpp(tmp_path: Path) -> None:
    params = replace(PARAMS, n_kv_heads=4, rope_theta=10000.0)
    tensors = by_gguf_name(params, random_weights(params, torch.float32, seed=0))
    metadata = metadata_of(params) | {"llama.attention.head_count_kv": None, "llama.rope.freq_base": None}
    assert read_gguf(write(tmp_path / "model.gguf", tensors, metadata)).params == params


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"blk.1.attn_q.bias": torch.zeros(256)}, "unexpected tensor blk.1.attn_q.bias"),
        ({"blk.0.attn_q_norm.weight": torch.zeros(64)}, "unexpected tensor blk.0.attn_q_norm.weight"),
        ({"blk.2.attn_norm.weight": torch.zeros(256)}, "unexpected tensor blk.2.attn_norm.weight"),
        ({"blk.1.ffn_up.weight": None}, "tensor blk.1.ffn_up.weight is missing"),
        ({"token_embd.weight": None}, "tensor token_embd.weight is missing"),
        ({"blk.1.attn_k.weight": torch.zeros(64, 256)}, "blk.1.attn_k.weight is [64, 256], should be [128, 256]"),
        ({"output_norm.weight": (torch.zeros(272, dtype=torch.uint8), "Q8_0")}, "output_norm.weight is in Q8_0"),
        ({"output.weight": (torch.zeros(96, 84, dtype=torch.uint8), "Q2_K")}, "is in Q2_K, which is not supported"),
        (
            {"output.weight": (torch.zeros(96, 136, dtype=torch.uint8), "IQ4_XS")},
            "is in IQ4_XS, which is not supported",
        ),
        ({"output.weight": (torch.zeros(96, 136, dtype=torch.uint8), "MXFP4")}, "get the model as Q4_K_M or Q8_0"),
        ({"output.weight": torch.zeros(96, 256, dtype=torch.int32)}, "is in I32, which is not supported"),
        ({"rope_freqs.weight": torch.ones(32).half()}, "rope_freqs.weight should be in fp32"),
    ],
)
def test_tensors_of_another_model_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], changed: dict[str, Any], expected: str
) -> None:
    kept = {name: tensor for name, tensor in {**tensors, **changed}.items() if tensor is not None}
    assert expected in refusal(write(tmp_path / "model.gguf", kept))


@pytest.mark.parametrize("architecture", ["qwen2", "gemma", "phi3", "mistral3", "clip"])
def test_other_architectures_are_refused(tmp_path: Path, tensors: dict[str, Tensor], architecture: str) -> None:
    file = write(tmp_path / "model.gguf", tensors, architecture=architecture)
    assert f"its architecture is '{architecture}'; only 'llama' is supported" in refusal(file)


@pytest.mark.parametrize("original", [8192, 4096, 65536])
@pytest.mark.parametrize("factor", [2.0, 8.0, 32.0, 3.7])
@pytest.mark.parametrize(("head_dim", "theta"), [(128, 500000.0), (64, 500000.0), (64, 10000.0), (16, 500000.0)])
def test_the_rope_scaling_is_found_from_its_divisors(head_dim: int, theta: float, factor: float, original: int) -> None:
    params = replace(PARAMS, head_dim=head_dim, rope_theta=theta)
    scaling = RopeScaling(factor, original_max_seq_len=original)
    divisors = divisors_of(params, scaling)
    found = rope_scaling_of(divisors, params)
    if torch.all(divisors == 1):  # no wavelength is as long as the middle band
        assert found is None
        return
    assert found is not None
    assert torch.allclose(divisors_of(params, found), divisors, rtol=1e-5)
    in_band = ((divisors > 1) & (divisors < factor * (1 - 1e-6))).sum()
    if in_band:  # otherwise several lengths have the same divisors
        assert found.original_max_seq_len == original
        assert found.factor == pytest.approx(factor, rel=1e-4)


def test_a_stated_original_length_is_used(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    scaling = RopeScaling(8.0, original_max_seq_len=6000)
    scaled = {**tensors, "rope_freqs.weight": divisors_of(PARAMS, scaling)}
    stated = metadata_of(PARAMS) | {"llama.rope.scaling.original_context_length": 6000}
    assert read_gguf(write(tmp_path / "model.gguf", scaled, stated)).params.rope_scaling == scaling
    assert "rope_freqs.weight is not Llama 3.1's RoPE scaling" in refusal(write(tmp_path / "bare.gguf", scaled))


WRONG_DIVISORS = {
    "linear": torch.full((32,), 4.0),
    "growing": torch.linspace(1, 8, 32),
    "another band": divisors_of(PARAMS, RopeScaling(8.0, high_freq_factor=3.99)),
    "zero": torch.zeros(32),
    "infinite": torch.full((32,), torch.inf),
    "too few": torch.ones(16),
}


@pytest.mark.parametrize("divisors", WRONG_DIVISORS.values(), ids=WRONG_DIVISORS)
def test_divisors_of_another_scaling_are_refused(divisors: Tensor) -> None:
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not Llama 3\.1's RoPE scaling"):
        rope_scaling_of(divisors, PARAMS)


def test_divisors_of_one_are_no_scaling(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    file = write(tmp_path / "model.gguf", {**tensors, "rope_freqs.weight": torch.ones(32)})
    assert read_gguf(file).params == PARAMS


def small_file(folder: Path) -> tuple[Path, int]:
    """Write a small model, and return it with the size of its header."""
    params = replace(PARAMS, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, hidden_dim=32, vocab_size=8)
    tensors = by_gguf_name(params, random_weights(params, torch.float32, seed=0))
    vocabulary = {"tokenizer.ggml.tokens": list("abcdefgh"), "tokenizer.ggml.token_type": [1] * 8}
    file = write(folder / "small.gguf", tensors, metadata_of(params) | vocabulary)
    return file, gguf.GGUFReader(file).data_offset


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    file, header = small_file(tmp_path)
    content = file.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(1, header, 37), header, (header + len(content)) // 2, len(content) - 32]:
        cut.write_bytes(content[:length])
        assert ("cut short" if length >= 4 else "not a GGUF file") in refusal(cut)


def test_a_wrong_bit_in_the_header_never_exchanges_weights(tmp_path: Path) -> None:
    file, header = small_file(tmp_path)
    content, whole = file.read_bytes(), read_gguf(file)
    damaged = tmp_path / "damaged.gguf"
    flips = [divmod(bit, 8) for bit in range(0, 8 * header, 5)]
    refused = 0
    for byte, bit in flips:
        changed = bytearray(content)
        changed[byte] ^= 1 << bit
        damaged.write_bytes(changed)
        try:
            model = read_gguf(damaged)
        except UserError:
            refused += 1
            continue
        assert model.tensors.keys() == whole.tensors.keys()
        assert all(torch.equal(model.tensors[name], whole.tensors[name]) for name in whole.tensors)
    assert refused > len(flips) / 2


def changed_file(folder: Path, at: int, new: bytes) -> Path:
    file, _ = small_file(folder)
    content = bytearray(file.read_bytes())
    content[at : at + len(new)] = new
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("at", "new", "expected"),
    [
        (0, b"GGML", "not a GGUF file"),
        (0, b"PK\3\4", "not a GGUF file"),
        (4, b"\1\0\0\0", "is version 1 of GGUF"),
        (4, b"\0\0\0\3", "is a big-endian GGUF file"),
        (8, b"\xff" * 8, "small.gguf: "),  # the number of tensors
        (16, b"\xff" * 8, "small.gguf: "),  # the number of keys
        (24, b"\xff" * 8, "cut short in its header"),  # the length of the first key
    ],
)
def test_files_that_are_not_gguf_or_damaged_are_refused(tmp_path: Path, at: int, new: bytes, expected: str) -> None:
    assert expected in refusal(changed_file(tmp_path, at, new))


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "big.gguf", {"a": torch.zeros(32)}, {}, endianess=gguf.GGUFEndian.BIG)
    assert "is a big-endian GGUF file; get the little-endian one" in refusal(file)


@pytest.mark.parametrize(("alignment", "accepted"), [(8, True), (64, True), (4, False), (0, False)])
def test_the_alignment_of_the_file_is_used(
    tmp_path: Path, tensors: dict[str, Tensor], weights: Weights, alignment: int, accepted: bool
) -> None:
    # an fp16 tensor of 10 bytes would move all after it
    small = {"rope_freqs.weight": torch.ones(32), **tensors}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    add_metadata(writer, metadata_of(PARAMS))
    writer.add_custom_alignment(alignment or 32)
    for name, tensor in small.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = tmp_path / "model.gguf"
    if not alignment:
        file.write_bytes(file.read_bytes().replace(b"general.alignment\4\0\0\0\x20", b"general.alignment\4\0\0\0\0", 1))
    if accepted:
        assert_same(weights_of(read_gguf(file)), weights)
    else:
        assert f"general.alignment = {alignment} is not a multiple of 8" in refusal(file)


VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<|eot_id|>", "<|begin_of_text|>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 4,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ messages }}",
}


def vocabulary_in(file: Path, metadata: Mapping[str, Any]) -> Any:
    return read_vocabulary(file, read_header(write(file, {"a": torch.zeros(32)}, metadata)).metadata)


def test_the_vocabulary_is_what_was_written(tmp_path: Path) -> None:
    vocabulary = vocabulary_in(tmp_path / "model.gguf", VOCABULARY)
    assert tuple(vocabulary) == (
        *("gpt2", "llama-bpe", ["a", "b", "ab", "<|eot_id|>", "<|begin_of_text|>"], [1, 1, 1, 3, 3], ["a b"]),
        *(4, 2, None, None, True, "{{ messages }}"),
    )
    assert vocabulary.stop_ids == {2, 3}


def test_a_file_without_a_vocabulary_or_with_a_placeholder_has_none(tmp_path: Path) -> None:
    assert vocabulary_in(tmp_path / "none.gguf", {}) is None
    placeholder = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["t0", "t1", "t2"]}
    assert vocabulary_in(tmp_path / "placeholder.gguf", placeholder) is None


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"tokenizer.ggml.token_type": [1, 1]}, "tokenizer.ggml.token_type should be 5 numbers"),
        ({"tokenizer.ggml.tokens": [1, 2, 3]}, "tokenizer.ggml.tokens should be texts"),
        ({"tokenizer.ggml.eos_token_id": 5}, "tokenizer.ggml.eos_token_id = 5 is not one of 5 tokens"),
    ],
)
def test_a_damaged_vocabulary_is_refused(tmp_path: Path, changed: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        vocabulary_in(tmp_path / "model.gguf", VOCABULARY | changed)


TEXTS = ("The year 2024, isn't it?\n\n  Ça coûte 1234567 €!", "def f(x):\n\treturn x  # 1\r\n", "日本語 ḓ😀", "   ", "")
TRAINING = "The year it is, the price of this and that: 12 345 euro; def return the text in the other year. " * 5


def trained(pre: str) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Return a tokenizer of the package tokenizers, and what a GGUF file says about it."""
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated")
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    steps: dict[str, list[Any]] = {"llama-bpe": [split], "gpt-2": [], "smollm": [digits]}
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre != "llama-bpe")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=pre == "llama-bpe"))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*steps[pre], byte_level])
    theirs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|begin|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator([TRAINING], trainer)
    theirs.add_tokens(["euro;"])
    content = json.loads(theirs.to_str())
    by_id = {token: text for text, token in theirs.get_vocab(with_added_tokens=True).items()}
    kinds = {entry["id"]: CONTROL if entry["special"] else USER_DEFINED for entry in content["added_tokens"]}
    return theirs, {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [by_id[token] for token in range(len(by_id))],
        "tokenizer.ggml.token_type": [kinds.get(token, NORMAL) for token in range(len(by_id))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": pre == "llama-bpe",
    }


@pytest.mark.parametrize("pre", ["llama-bpe", "gpt-2", "smollm"])
def test_the_tokenizer_is_that_of_the_package_tokenizers(tmp_path: Path, pre: str) -> None:
    theirs, metadata = trained(pre)
    file = write(tmp_path / "model.gguf", {"a": torch.zeros(32)}, metadata)
    tokenizer = tokenizer_of_gguf(file, read_header(file).metadata)
    assert tokenizer is not None
    for text in (*TEXTS, TRAINING, "euro; and euro;"):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    special = theirs.encode("a<|im_end|>b").ids
    assert 1 in special
    assert tokenizer.encode("a<|im_end|>b", allow_special=True) == special
    assert 1 not in tokenizer.encode("a<|im_end|>b")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0 if pre == "llama-bpe" else None, 1)
    assert tokenizer.stop_ids == {1}
    assert tokenizer.path == file


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"tokenizer.ggml.model": "llama"}, r"model.gguf: tokenizer\.ggml\.model = 'llama' \(SentencePiece\) is not"),
        ({"tokenizer.ggml.pre": None}, r"model.gguf: tokenizer\.ggml\.pre = 'default' \(an unknown pattern\) is not"),
        (
            {"tokenizer.ggml.pre": "qwen2"},
            r"model.gguf: tokenizer\.ggml\.pre = 'qwen2' is not supported; use token ids",
        ),
    ],
)
def test_other_tokenizers_are_refused_only_when_one_is_needed(
    tmp_path: Path, tensors: dict[str, Tensor], changed: dict[str, Any], expected: str
) -> None:
    metadata = metadata_of(PARAMS) | VOCABULARY | changed
    model = read_gguf(write(tmp_path / "model.gguf", tensors, metadata))
    with pytest.raises(UserError, match=expected):
        tokenizer_of_gguf(model.file, model.metadata)
