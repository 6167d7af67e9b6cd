"""The table of checkpoints that people have: one row for each kind, saved by the library that makes it.

Every row is loaded as a user would, and its logits are compared with those of the network that was saved.
docs/checkpoints.md has the same rows.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llama3_raw
from llama3_raw import Params
from llama3_raw.__main__ import main
from llama3_raw.checkpoint.gguf import gguf_name
from llama3_raw.quantization.blocks import BLOCK_TYPES
from tests.checkpoint.test_gguf_reading import divisors_of, in_blocks, metadata_of, write
from tests.references import half_split

IDS = [3, 17, 0, 95, 42, 42, 8]
VOCAB = 96

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def network(kind: str = "LlamaForCausalLM", **settings: Any) -> Any:
    """Return a small random model of transformers, in fp32 with eager attention."""
    import transformers

    config_class = transformers.MistralConfig if kind.startswith("Mistral") else transformers.LlamaConfig
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    model: Any = getattr(transformers, kind)(config_class(**{**sizes, **settings, "attn_implementation": "eager"}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model.eval()


def logits_of(model: Any) -> Tensor:
    """Return transformers' logits for IDS, [T, vocab]."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([IDS])).logits[0]
    return logits


def in_meta_names(model: Any) -> dict[str, Tensor]:
    """Return the state dict by Meta's names, as transformers' converter for Meta's weights has them."""
    params = Params.from_hf(json.loads(model.config.to_json_string()))
    state = model.state_dict()
    tensors = {}
    for spec in llama3_raw.weights.tensor_specs(params, tied=model.config.tie_word_embeddings):
        tensor = state[spec.hf_name]
        if spec.field in ("wq", "wk"):  # the inverse of `permute` in convert_llama_weights_to_hf.py
            heads = tensor.view(-1, 2, params.head_dim // 2, params.dim)
            tensor = heads.transpose(1, 2).reshape(tensor.shape)
        tensors[spec.meta_name] = tensor.clone()
    return tensors


def write_meta_params(folder: Path, model: Any) -> None:
    folder.mkdir(exist_ok=True)
    params = Params.from_hf(json.loads(model.config.to_json_string()))
    (folder / "params.json").write_text(json.dumps(params.to_meta()))


def meta(folder: Path, model: Any, save: Callable[[dict[str, Tensor], Path], None]) -> None:
    write_meta_params(folder, model)
    save(in_meta_names(model), folder)


def pth(name: str = "consolidated.00.pth", wrap: Callable[[dict[str, Tensor]], Any] = lambda t: t) -> Any:
    """Return a function that saves tensors in a file of torch.save."""
    return lambda tensors, folder: torch.save(wrap(tensors), folder / name)


WIDE = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}  # blocks have up to 256 values


class Kind(NamedTuple):
    """A kind of checkpoint: the network that is saved, and how."""

    save: Callable[[Path, Any], Any]
    settings: dict[str, Any] = {}  # noqa: RUF012  # never changed
    kind: str = "LlamaForCausalLM"
    line: str = ""  # what is said about it on stderr


def pretrained(folder: Path, model: Any, **settings: Any) -> None:
    model.save_pretrained(folder, **settings)


def with_state(prefix: str = "", extra: dict[str, Tensor] | None = None) -> Callable[[Path, Any], None]:
    """Return a function that saves config.json and the state dict with a prefix and extra buffers."""

    def save(folder: Path, model: Any) -> None:
        model.config.save_pretrained(folder)
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict(prefix=prefix).items()}
        save_file(tensors | (extra or {}), folder / "model.safetensors")

    return save


def compiled(folder: Path, model: Any) -> None:
    model.config.save_pretrained(folder)
    save_file(torch.compile(model).state_dict(), folder / "model.safetensors")  # type: ignore[attr-defined]


def data_parallel(folder: Path, model: Any) -> None:
    model.config.save_pretrained(folder)
    save_file(torch.nn.DataParallel(model).state_dict(), folder / "model.safetensors")


def base_model_only(folder: Path, model: Any) -> None:
    """LlamaModel's own save_pretrained, without the head, which is tied."""
    model.model.save_pretrained(folder)


def bin_files(folder: Path, model: Any, count: int = 1) -> None:
    """pytorch_model.bin and its shards, as transformers wrote them before 5.0."""
    model.config.save_pretrained(folder)
    state = model.state_dict()
    if count == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    files = [f"pytorch_model-{number + 1:05}-of-{count:05}.bin" for number in range(count)]
    weight_map = {name: files[i % count] for i, name in enumerate(state)}
    for file in files:
        torch.save({name: tensor for name, tensor in state.items() if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def beside_a_base(folder: Path, model: Any) -> None:
    """A fine-tune at the root, and the base in original/."""
    model.save_pretrained(folder)
    base = network()
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter)
    meta(folder / "original", base, pth())


def among_others(folder: Path, model: Any) -> None:
    """model.safetensors beside an adapter, a variant in fp16 and an optimizer's state."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.fp16.safetensors")
    save_file({"step": torch.tensor(3)}, folder / "optimizer.safetensors")
    save_file({"x.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")


def beside_a_stale_index(folder: Path, model: Any) -> None:
    """A merge saved in one file into a folder that had several."""
    network(initializer_range=0.3).save_pretrained(folder, max_shard_size="100kB")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")


def resized(n_rows: int, multiple_of: int | None = None) -> Callable[[Path, Any], None]:
    def save(folder: Path, model: Any) -> None:
        model.resize_token_embeddings(n_rows, pad_to_multiple_of=multiple_of)
        model.save_pretrained(folder)

    return save


def in_half_precision(folder: Path, model: Any) -> None:
    """Matrices in bf16 and norms in fp32, with values that bf16 holds."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model.config.save_pretrained(folder)
    state = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def edited(change: dict[str, Any]) -> Callable[[Path, Any], None]:
    """Return a function that saves the model and changes keys of its config.json; None removes one."""

    def save(folder: Path, model: Any) -> None:
        model.save_pretrained(folder)
        content = json.loads((folder / "config.json").read_text()) | change
        for key in [key for key, value in change.items() if value is None and key != "rope_scaling"]:
            del content[key]
        (folder / "config.json").write_text(json.dumps(content))

    return save


def as_gguf(kind: str = "F32", **options: Any) -> Callable[[Path, Any], None]:
    """Return a function that saves a GGUF file by the package gguf; blocks also round the network's own matrices."""

    def save(folder: Path, model: Any) -> None:
        params = Params.from_hf(json.loads(model.config.to_json_string()))
        specs = {spec.meta_name: spec for spec in llama3_raw.weights.tensor_specs(params)}
        state = model.state_dict()
        tensors: dict[str, Any] = {}
        for name, tensor in in_meta_names(model).items():
            spec, stored = specs[name], tensor
            if tensor.dim() == 2 and kind in BLOCK_TYPES:
                ((stored, _),) = in_blocks(BLOCK_TYPES[kind], {name: tensor}).values()
                rounded = torch.from_numpy(gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType[kind]))
                in_order = half_split(rounded, params.head_dim) if spec.field in ("wq", "wk") else rounded
                state[spec.hf_name].copy_(in_order)
            elif tensor.dim() == 2:
                stored = tensor.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])
                state[spec.hf_name].copy_(state[spec.hf_name].to(stored.dtype))
            tensors[gguf_name(spec)] = (stored, kind) if kind in BLOCK_TYPES and tensor.dim() == 2 else stored
        if params.rope_scaling is not None:
            tensors["rope_freqs.weight"] = divisors_of(params, params.rope_scaling)
        write(folder / "model.gguf", tensors, metadata_of(params), **options)

    return save


BUFFERS = {
    **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(8) for i in range(2)},
    "model.rotary_emb.cos_cached": torch.zeros(64, 16),
    "model.position_ids": torch.arange(64),
}

KINDS: dict[str, Kind] = {
    # Meta's format
    "params.json, consolidated.00.pth": Kind(lambda folder, model: meta(folder, model, pth())),
    "params.json, consolidated.safetensors": Kind(
        lambda folder, model: meta(folder, model, lambda t, f: save_file(t, f / "consolidated.safetensors"))
    ),
    "original/": Kind(lambda folder, model: meta(folder / "original", model, pth())),
    "torchtune's meta_model_0.pt": Kind(lambda folder, model: meta(folder, model, pth("meta_model_0.pt"))),
    'a checkpoint {"model": …} of a training program': Kind(
        lambda folder, model: meta(folder, model, pth(wrap=lambda t: {"model": t, "epoch": 3, "optimizer": {}}))
    ),
    'a checkpoint {"model": …} with a tensor beside it': Kind(
        lambda folder, model: meta(folder, model, pth(wrap=lambda t: {"model": t, "step": torch.tensor(3)}))
    ),
    'Lightning\'s {"state_dict": …}, names in "model."': Kind(
        lambda folder, model: meta(
            folder, model, pth(wrap=lambda t: {"state_dict": {f"model.{k}": v for k, v in t.items()}, "callbacks": {}})
        )
    ),
    "Meta's rotary table in the file": Kind(
        lambda folder, model: meta(folder, model, pth(wrap=lambda t: {**t, "rope.freqs": torch.zeros(8)}))
    ),
    "a head_dim of its own": Kind(lambda folder, model: meta(folder, model, pth()), {"head_dim": 32}),
    # Hugging Face's format
    "save_pretrained": Kind(pretrained),
    "save_pretrained, tied": Kind(pretrained, {"tie_word_embeddings": True}),
    "save_pretrained, several files": Kind(lambda folder, model: pretrained(folder, model, max_shard_size="100kB")),
    "save_pretrained, Llama 3.1's RoPE": Kind(pretrained, {"rope_parameters": LLAMA3_ROPE}),
    "save_pretrained, a head_dim of its own": Kind(pretrained, {"head_dim": 32}),
    "save_pretrained, every head its own keys": Kind(pretrained, {"num_key_value_heads": 4}),
    "pytorch_model.bin": Kind(bin_files),
    "pytorch_model.bin, several files": Kind(lambda folder, model: bin_files(folder, model, 3)),
    "a fine-tune, and its base in original/": Kind(
        beside_a_base, line="model.safetensors, not original/consolidated.00.pth"
    ),
    "model.safetensors among other files": Kind(among_others),
    "model.safetensors beside the index of others": Kind(beside_a_stale_index),
    "Mistral without a sliding window": Kind(pretrained, {"sliding_window": None}, "MistralForCausalLM"),
    # what tools add to names
    "names of torch.compile, _orig_mod.": Kind(compiled),
    "names of DataParallel, module.": Kind(data_parallel),
    "names of PEFT, base_model.model.": Kind(with_state("base_model.model.")),
    "names of both, module._orig_mod.": Kind(with_state("module._orig_mod.")),
    "LlamaModel alone, tied": Kind(base_model_only, {"tie_word_embeddings": True}),
    "rotary tables and position ids in the file": Kind(with_state(extra=BUFFERS)),
    # GGUF
    "GGUF, F32": Kind(as_gguf()),
    "GGUF, F32, tied": Kind(as_gguf(), {"tie_word_embeddings": True}),
    "GGUF, F32, Llama 3.1's RoPE": Kind(as_gguf(), {"rope_parameters": LLAMA3_ROPE}),
    "GGUF, F32, in several files": Kind(as_gguf(split_max_tensors=9)),
    "GGUF, F16": Kind(as_gguf("F16")),
    "GGUF, BF16": Kind(as_gguf("BF16")),
    **{f"GGUF, {name}": Kind(as_gguf(name), WIDE) for name in BLOCK_TYPES},
    # vocabularies
    "resize_token_embeddings(+2)": Kind(resized(VOCAB + 2)),
    "resize_token_embeddings, padded to a multiple": Kind(resized(VOCAB + 1, multiple_of=64)),
    # dtypes
    "norms in fp32, matrices in bf16": Kind(
        in_half_precision, line="input_layernorm.weight is in float32; converted to bfloat16 like the rest"
    ),
    # config.json in the wild
    "config.json: floats for integers": Kind(edited({"max_position_embeddings": 64.0, "num_hidden_layers": 2.0})),
    "config.json: no num_key_value_heads": Kind(edited({"num_key_value_heads": None}), {"num_key_value_heads": 4}),
    "config.json: no rms_norm_eps": Kind(edited({"rms_norm_eps": None}), {"rms_norm_eps": 1e-6}),
    "config.json: linear RoPE scaling by 1": Kind(edited({"rope_scaling": {"type": "linear", "factor": 1.0}})),
    "config.json: rope_scaling null beside rope_parameters": Kind(
        edited({"rope_scaling": None}), {"rope_parameters": LLAMA3_ROPE}
    ),
}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", KINDS)
def test_the_logits_of_every_kind(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = KINDS[name]
    model = network(kind.kind, **kind.settings)
    kind.save(tmp_path, model)
    loaded = llama3_raw.load(tmp_path, dtype=torch.float32)
    ours = llama3_raw.forward(loaded.weights, loaded.params, torch.tensor(IDS))
    torch.testing.assert_close(ours, logits_of(model), rtol=0, atol=1e-4)
    assert main(["--weights", str(tmp_path), "--ids", "3 17", "--max-new-tokens", "1"]) == 0
    assert kind.line in capsys.readouterr().err


LORA: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16},
    "every matrix": {"target_modules": "all-linear", "r": 3},
    "q and k, whose rows are reordered": {"target_modules": ["q_proj", "k_proj"], "r": 2},
    "scaled by the root of the rank": {"target_modules": ["o_proj"], "use_rslora": True},
    "ranks and scales of their own": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"layers.1.mlp.down_proj": 32},
    },
    "the embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
    "a replaced output matrix": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def with_lora(model: Any, settings: dict[str, Any]) -> Any:
    """Return PEFT's model with a random adapter."""
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(model, LoraConfig(**{"r": 4, **settings}))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return tuned


@pytest.mark.parametrize("case", LORA)
@pytest.mark.parametrize("base", ["Meta's", "Hugging Face's"])
def test_the_logits_with_an_adapter(case: str, base: str, tmp_path: Path) -> None:
    """PEFT's merge_and_unload is the reference, to 1e-5."""
    model = network(initializer_range=0.1)
    meta(tmp_path / "base", model, pth()) if base == "Meta's" else model.save_pretrained(tmp_path / "base")
    tuned = with_lora(model, LORA[case])
    tuned.save_pretrained(tmp_path / "adapter")
    plain = llama3_raw.load(tmp_path / "base")
    loaded = llama3_raw.load(tmp_path / "base", adapter=tmp_path / "adapter")
    ours = llama3_raw.forward(loaded.weights, loaded.params, torch.tensor(IDS))
    assert (ours - llama3_raw.forward(plain.weights, plain.params, torch.tensor(IDS))).abs().max() > 1e-2
    torch.testing.assert_close(ours, logits_of(tuned.merge_and_unload()), rtol=0, atol=1e-5)


def test_a_shard_of_a_model_with_an_adapter(tmp_path: Path) -> None:
    from llama3_raw.checkpoint.sharding import Shard

    model = network()
    model.save_pretrained(tmp_path / "base")
    with_lora(model, {"target_modules": "all-linear"}).save_pretrained(tmp_path / "adapter")
    whole = llama3_raw.load(tmp_path / "base", adapter=tmp_path / "adapter").weights.layers[1]
    shards = [
        llama3_raw.load(tmp_path / "base", adapter=tmp_path / "adapter", shard=Shard(rank, 2)).weights.layers[1]
        for rank in range(2)
    ]
    for field, dimension in (("wq", 0), ("wk", 0), ("w3", 0), ("wo", 1), ("w2", 1)):
        joined = torch.cat([getattr(shard, field) for shard in shards], dim=dimension)
        torch.testing.assert_close(joined, getattr(whole, field))


def test_an_adapter_of_a_tied_model(tmp_path: Path) -> None:
    """PEFT may save the embeddings, and the output matrix that they are; a change of that alone is refused."""
    model = network(initializer_range=0.1, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    tuned = with_lora(model, {"target_modules": "all-linear"})
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    loaded = llama3_raw.load(tmp_path / "base", adapter=tmp_path / "adapter")
    ours = llama3_raw.forward(loaded.weights, loaded.params, torch.tensor(IDS))
    torch.testing.assert_close(ours, logits_of(tuned.merge_and_unload()), rtol=0, atol=1e-5)
    for settings, message in (
        ({"target_modules": ["lm_head"]}, "a layer that the model ties"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "replaces lm_head, which the model ties"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "replaces model.embed_tokens.weight"),
    ):
        with_lora(network(tie_word_embeddings=True), settings).save_pretrained(tmp_path / "other")
        with pytest.raises(llama3_raw.UserError, match=message):
            llama3_raw.load(tmp_path / "base", adapter=tmp_path / "other")


REFUSED_ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora = True is not supported"),
    "biases": ({"bias": "all"}, "bias = all is not supported"),
    "an initialisation that changes the base": ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa"),
    "another kind": ({"peft_type": "IA3"}, "peft_type = IA3 is not supported"),
}


@pytest.mark.parametrize("case", REFUSED_ADAPTERS)
def test_adapters_that_are_refused_by_name(case: str, tmp_path: Path) -> None:
    model = network()
    model.save_pretrained(tmp_path / "base")
    with_lora(model, {"target_modules": ["q_proj"]}).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    change, message = REFUSED_ADAPTERS[case]
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(llama3_raw.UserError, match=f"adapter_config.json: {message}.* merge_and_unload"):
        llama3_raw.load(tmp_path / "base", adapter=tmp_path / "adapter")


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    network(hidden_size=32).save_pretrained(tmp_path / "base")
    with_lora(network(), {"target_modules": ["q_proj"]}).save_pretrained(tmp_path / "adapter")
    with pytest.raises(llama3_raw.UserError, match=r"does not fit to .* give the adapter's own model"):
        llama3_raw.load(tmp_path / "base", adapter=tmp_path / "adapter")


@pytest.mark.parametrize(
    ("files", "message"),
    {
        "only an adapter": (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter .* --adapter"),
        "weights without config.json": (["model.safetensors"], "holds model.safetensors, but no config.json"),
        "pytorch_model.bin alone": (["pytorch_model.bin"], "holds pytorch_model.bin, but no config.json"),
        "Meta's weights without params.json": (
            ["consolidated.00.pth"],
            "holds consolidated.00.pth, but no params.json",
        ),
        "several GGUF files": (["a.gguf", "b.gguf"], "several models: a.gguf, b.gguf; name one of the files"),
        "nothing": ([], "no model here; it should hold params.json"),
    }.values(),
)
def test_folders_without_a_model(
    files: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    assert main(["--weights", str(tmp_path), "--ids", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err)


def test_the_format_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    beside_a_base(tmp_path, model)
    base = llama3_raw.load(tmp_path / "original")
    assert torch.equal(llama3_raw.load(tmp_path, format="original").weights.norm, base.weights.norm)
    assert torch.equal(llama3_raw.load(tmp_path, format="safetensors").weights.norm, model.model.norm.weight)
    run = ["--ids", "1", "--max-new-tokens", "1", "--weights", str(tmp_path)]
    assert main([*run, "--format", "original"]) == 0
    assert "not " not in capsys.readouterr().err
    assert main([*run[:-1], str(tmp_path / "original"), "--format", "safetensors"]) == 2
    assert "there is no config.json with *.safetensors here; leave --format out" in capsys.readouterr().err


def test_files_of_other_ways_to_save(tmp_path: Path) -> None:
    """The legacy format, and a newer pickle protocol: named, with the line that rewrites the file. The line works."""
    model = network()
    legacy: dict[str, Any] = {"_use_new_zipfile_serialization": False}
    for settings, message in ((legacy, "from before 1.6"), ({"pickle_protocol": 4}, "pickle_protocol=4")):
        meta(tmp_path, model, lambda t, folder, s=settings: torch.save(t, folder / "consolidated.00.pth", **s))  # type: ignore[misc]
        with pytest.raises(llama3_raw.UserError, match=message) as error:
            llama3_raw.load(tmp_path)
        command = str(error.value).partition("its name: ")[2]
        subprocess.run(shlex.split(command.replace("python ", f"{sys.executable} ", 1)), cwd=tmp_path, check=True)
        (tmp_path / "new.pth").replace(tmp_path / "consolidated.00.pth")
        loaded = llama3_raw.load(tmp_path)
        torch.testing.assert_close(
            llama3_raw.forward(loaded.weights, loaded.params, torch.tensor(IDS)), logits_of(model), rtol=0, atol=1e-4
        )


def test_what_is_left_out_is_said_under_debug(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("llama3_raw").setLevel(logging.WARNING)
    with_state(extra=BUFFERS)(tmp_path, network())
    run = ["--weights", str(tmp_path), "--ids", "3", "--max-new-tokens", "1"]
    assert main(run) == 0
    assert "position_ids" not in caplog.text
    assert main([*run, "--debug"]) == 0
    assert "model.position_ids is left out" in caplog.text


ENDS: dict[str, Callable[[int], tuple[Any, Any]]] = {  # eos_token_id of generation_config.json and of config.json
    "an id in generation_config.json": lambda stop: (stop, None),
    "a list in generation_config.json": lambda stop: ([90, stop], None),
    "generation_config.json before config.json": lambda stop: (stop, 3),
    "only in config.json": lambda stop: (None, stop),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_text_ends_where_transformers_ends_it(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    free = model.generate(torch.tensor([IDS]), max_new_tokens=12, do_sample=False)[0, len(IDS) :].tolist()
    stop = free[4]
    in_generation_config, in_config = ENDS[case](stop)
    model.config.eos_token_id, model.generation_config.eos_token_id = in_config, in_generation_config
    model.save_pretrained(tmp_path)
    if in_generation_config is None:
        (tmp_path / "generation_config.json").unlink()
    expected = free[: free.index(stop)]
    loaded = llama3_raw.load(tmp_path)
    assert list(llama3_raw.generate(loaded, IDS, max_new_tokens=12)) == expected
    assert main(["--weights", str(tmp_path), "--ids", " ".join(map(str, IDS)), "--max-new-tokens", "12"]) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == [str(token) for token in expected]
    assert f"the model ended the text after {len(expected)} new tokens" in captured.err


def test_stop_tokens_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.save_pretrained(tmp_path)
    ids = list(llama3_raw.generate(llama3_raw.load(tmp_path), IDS, max_new_tokens=8, stop_ids=()))
    run = ["--weights", str(tmp_path), "--ids", " ".join(map(str, IDS)), "--max-new-tokens", "8"]
    assert main([*run, "--stop-token", "95", "--stop-token", str(ids[3])]) == 0
    assert capsys.readouterr().out.split() == [str(token) for token in ids[: ids.index(ids[3])]]
    for wrong in ("96", "<|im_end|>"):
        assert main([*run, "--stop-token", wrong]) == 2
        assert f"--stop-token {wrong}: the model has no such token" in capsys.readouterr().err
    prompt = ["Once upon a time", "--max-new-tokens", "300", "--temperature", "1", "--seed", "3"]
    assert main([*prompt, "--stop", "<|eot_id|>"]) == 0
    assert main([*prompt, "--stop-token", "<|eot>"]) == 2
    assert "did you mean <|eot_id|>?" in capsys.readouterr().err
