"""A model on two devices, one of them fake: the device of each tensor, the same results, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import llama3_raw
from llama3_raw import REFERENCE, KVCache, Model, Params, UserError, forward, perplexity
from llama3_raw.__main__ import main
from llama3_raw.backends.choose import ops_for, suitable_ops
from llama3_raw.backends.offload import mixed_ops
from llama3_raw.bench import __main__ as bench
from llama3_raw.checkpoint.checkpoint import Checkpoint
from llama3_raw.checkpoint.loading import build_weights, from_state_dict, to_state_dict
from llama3_raw.compare import __main__ as compare
from llama3_raw.decoding.loop import generate
from llama3_raw.quantization.matrix import Matrix
from llama3_raw.tracing import __main__ as tracing
from llama3_raw.weights import tensor_specs
from tests.backends.pretend_gpu import GPU, OnGpu, PretendGpu, generators_on, plain_staging
from tests.paths import TINY
from tests.references import flat, random_weights

SMALL = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 96, "norm_eps": 1e-5, "multiple_of": 32}
PARAMS = Params.from_meta(SMALL)
MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fake GPU of 100 GB, with the CPU's random numbers and the exact operations."""
    monkeypatch.setattr("llama3_raw.backends.cuda.cuda_ops", lambda: REFERENCE)
    monkeypatch.setattr(torch, "Generator", generators_on(GPU))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**11, 10**11))
    monkeypatch.setattr("llama3_raw.checkpoint.loading.staging", plain_staging)
    with PretendGpu():
        yield


def checkpoint(tied: bool = False) -> Checkpoint:
    tensors = to_state_dict(PARAMS, random_weights(PARAMS, torch.bfloat16, seed=0, tied=tied))
    shards = {spec: [tensors[spec.meta_name]] for spec in tensor_specs(PARAMS, tied)}
    return Checkpoint("a model", PARAMS, shards, hf=False)


@pytest.mark.usefixtures("_gpu")
def test_a_state_dict_stays_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is; and the system gets no advice about addresses of the GPU's memory."""
    tensors = to_state_dict(PARAMS, random_weights(PARAMS, torch.bfloat16, seed=0))
    advised: list[Tensor] = []
    monkeypatch.setattr("llama3_raw.checkpoint.loading.read_single_pages", advised.append)
    on_gpu = from_state_dict(PARAMS, {name: tensor.to(GPU) for name, tensor in tensors.items()})
    assert {tensor.device for tensor in flat(on_gpu)} == {GPU}
    assert advised == []
    from_state_dict(PARAMS, tensors)
    assert len(advised) == 1


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("gpu_layers", [None, 1, 2, 3])
def test_the_devices_of_the_tensors(gpu_layers: int | None, tied: bool) -> None:
    """With torch's meta device: norms and output on the GPU, matrices by layer, embeddings only if tied."""
    weights = build_weights(checkpoint(tied), torch.device("meta"), gpu_layers=gpu_layers)
    for i, layer in enumerate(weights.layers):
        assert layer.attention_norm.is_meta
        assert layer.ffn_norm.is_meta
        assert {getattr(layer, name).is_meta for name in MATRICES} == {gpu_layers is None or i < gpu_layers}
    assert weights.norm.is_meta
    assert weights.output.is_meta
    assert weights.tok_embeddings.is_meta == (tied or gpu_layers is None)
    cache = KVCache.allocate(PARAMS, max_seq_len=8, like=weights)
    assert all(tensor.is_meta for tensor in (*cache.keys, *cache.values))


def test_the_matrices_on_the_cpu_stay_mapped() -> None:
    stored = checkpoint()
    weights = build_weights(stored, torch.device("meta"), gpu_layers=2)
    address = {(spec.layer, spec.field): shards[0].data_ptr() for spec, shards in stored.shards.items()}
    assert all(getattr(weights.layers[2], name).data_ptr() == address[2, name] for name in MATRICES)
    assert weights.tok_embeddings.data_ptr() == address[None, "tok_embeddings"]


@pytest.mark.slow
@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("gpu_layers", [1, 2, 3])
def test_the_bits_are_those_of_one_device(gpu_layers: int, tied: bool, quantize: str | None) -> None:
    """A prompt, then a token with a cache; everything that a tap sees, which is all on the GPU."""
    on_one = build_weights(checkpoint(tied), quantize=quantize)
    on_two = build_weights(checkpoint(tied), GPU, quantize=quantize, gpu_layers=gpu_layers)
    kept: list[dict[str, Tensor]] = []
    for weights, device in ((on_one, torch.device("cpu")), (on_two, GPU)):
        ops = ops_for(weights, exact=True)
        cache = KVCache.allocate(PARAMS, max_seq_len=6, like=weights)
        seen: dict[str, Tensor] = {}

        def tap(name: str, tensor: Tensor, seen: dict[str, Tensor] = seen) -> Tensor:
            seen[f"{name} {len(seen)}"] = tensor
            return tensor

        for ids, start in (([5, 17, 2, 80, 9], 0), ([33], 5)):
            forward(weights, PARAMS, torch.tensor(ids, device=device), cache=cache, start=start, ops=ops, tap=tap)
        kept.append(seen)
    assert kept[0].keys() == kept[1].keys()
    assert all(isinstance(tensor, OnGpu) for tensor in kept[1].values())
    assert all(torch.equal(kept[0][name], kept[1][name].to("cpu")) for name in kept[0])


@pytest.mark.usefixtures("_gpu")
def test_the_fake_gpu_distinguishes_two_devices() -> None:
    """Otherwise the test before this one would pass with any operations."""
    weights = build_weights(checkpoint(), GPU, gpu_layers=2)
    with pytest.raises(RuntimeError, match="two devices"):
        forward(weights, PARAMS, torch.tensor([1, 2], device=GPU), ops=REFERENCE)


@pytest.mark.usefixtures("_gpu")
def test_each_product_is_computed_where_its_matrix_is() -> None:
    calls: dict[str, list[bool]] = {"gpu": [], "cpu": []}

    def watched(device: str) -> llama3_raw.ops.Ops:
        def linear(x: Tensor, weight: Matrix) -> Tensor:
            calls[device].append(isinstance(x, OnGpu))
            return REFERENCE.linear(x, weight)

        return REFERENCE._replace(linear=linear)

    weights = build_weights(checkpoint(), GPU, gpu_layers=1)
    forward(weights, PARAMS, torch.tensor([1, 2], device=GPU), ops=mixed_ops(watched("gpu"), watched("cpu")))
    assert calls == {"gpu": [True] * (7 + 1), "cpu": [False] * 14}


@pytest.mark.usefixtures("_gpu")
def test_ops_are_mixed_only_for_mixed_weights() -> None:
    assert ops_for(build_weights(checkpoint(), GPU)) is REFERENCE
    assert ops_for(build_weights(checkpoint())) is suitable_ops(torch.device("cpu"))
    assert ops_for(build_weights(checkpoint(), GPU, gpu_layers=3)) is not REFERENCE  # the embeddings are on the CPU
    assert ops_for(build_weights(checkpoint(tied=True), GPU, gpu_layers=3)) is REFERENCE


@pytest.mark.usefixtures("_gpu")
def test_generate_and_perplexity_choose_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama3_raw.backends.choose.fast_ops", lambda: REFERENCE)  # for the same bits
    one = llama3_raw.load(TINY)
    two = llama3_raw.load(TINY, device="cuda", gpu_layers=2)
    assert not isinstance(two.weights.layers[2].wq, OnGpu)
    assert one.tokenizer is not None
    ids = one.tokenizer.encode("Once upon a time", bos=True)
    assert list(generate(two, ids, max_new_tokens=8)) == list(generate(one, ids, max_new_tokens=8))
    assert perplexity.perplexity(two, ids) == perplexity.perplexity(one, ids)


TOOLS: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
    "main": (main, ["Once upon a time", "--max-new-tokens", "8", "--reference"]),
    "trace": (tracing.main, ["Once upon a time"]),
    "compare": (compare.main, ["Once upon a time", "--with", "float32"]),
}


@pytest.mark.slow
@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("tool", TOOLS)
def test_the_tools(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    run, arguments = TOOLS[tool]
    arguments = [*arguments, "--weights", str(TINY)]
    assert run([*arguments, "--device", "cpu"]) == 0
    on_one = capsys.readouterr().out
    assert run([*arguments, "--device", "cuda", "--gpu-layers", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == on_one
    assert "on cuda (the matrices after the first 2 layers on the CPU)" in err


REFUSED = {
    "none": (main, ["x", "--gpu-layers", "0"], "--gpu-layers 0: 4 layers are loaded; give a number from 1 to 4"),
    "too many": (main, ["x", "--gpu-layers", "5"], "--gpu-layers 5: 4 layers are loaded"),
    "more than --layers": (main, ["x", "--gpu-layers", "4", "--layers", "3"], "--gpu-layers 4: 3 layers are loaded"),
    "the CPU": (main, ["x", "--gpu-layers", "2", "--device", "cpu"], "the device is cpu; leave it out, or use"),
    "others' code": (compare.main, ["x", "--with", "hf", "--gpu-layers", "2"], "leave --gpu-layers out"),
    "the cost of taps": (bench.main, ["--taps", "--gpu-layers", "2"], "leave --gpu-layers out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    run, arguments, says = REFUSED[case]
    assert run(["--weights", str(TINY), "--device", "cuda", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert says in err


def test_a_lesson_refuses_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Lessons compute with the tensors directly, without Ops."""
    from lesson import open_model  # from examples/

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["lesson", "--device", "cuda", "--gpu-layers", "2", "--weights", str(TINY)])
    with pytest.raises(SystemExit, match="2"):
        open_model(None)
    assert "leave --gpu-layers out" in capsys.readouterr().err


def test_load_refuses_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"^gpu_layers 2: .* the device is cpu"):
        llama3_raw.load(TINY, gpu_layers=2)
    with pytest.raises(UserError, match=r"^gpu_layers 5: 4 layers are loaded"):
        llama3_raw.load(TINY, device="cuda", gpu_layers=5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")
def test_on_a_real_gpu(tiny: Model) -> None:
    """In fp32, equal to the CPU's logits up to rounding."""
    exact = llama3_raw.load(TINY, dtype=torch.float32)
    ids = [1, 2, 3, 4, 5, 6, 7]
    expected = forward(exact.weights, exact.params, torch.tensor(ids))
    for gpu_layers in (1, 4):
        model = llama3_raw.load(TINY, device="cuda", dtype=torch.float32, gpu_layers=gpu_layers)
        assert not model.weights.layers[-1].wq.is_cuda or gpu_layers == 4
        logits = forward(model.weights, model.params, torch.tensor(ids, device="cuda"), ops=ops_for(model.weights))
        assert logits.is_cuda
        assert (logits.cpu() - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert len(list(generate(model, ids, max_new_tokens=5, stop_ids=()))) == 5
