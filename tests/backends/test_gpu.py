"""Tests on an NVIDIA GPU that need only this checkout; skipped if there is none. (The kernels are tested everywhere.)

With LLAMA3_RAW_REHEARSAL=1 they run on a CPU, as a fake GPU whose tensors cannot be mixed with those of the CPU: in
Triton's interpreter in fp16, on narrow models, without capturing.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import llama3_raw
from llama3_raw import REFERENCE, KVCache, Model, Params, Weights, forward, generate
from llama3_raw.__main__ import main
from llama3_raw.backends.choose import ops_for
from llama3_raw.backends.cuda import cuda_ops
from llama3_raw.backends.cuda_graphs import CudaGraphs, capture_graph
from llama3_raw.bench.gpu_report.phases import REHEARSAL
from llama3_raw.bench.gpu_report.variants import GreedyGraph, fused_layers
from llama3_raw.checkpoint.loading import from_state_dict
from llama3_raw.decoding.prompt_lookup import LookupPolicy
from llama3_raw.ops import Ops
from llama3_raw.weights import MATRICES, quantized, tensor_specs
from tests.backends.pretend_gpu import PretendGpu, generators_on, plain_staging
from tests.paths import TINY
from tests.references import cast, converted, flat

HAS_GPU = torch.cuda.is_available()
IS_REHEARSAL = not HAS_GPU and bool(os.environ.get(REHEARSAL))
ON = torch.device("cuda", 0)
DTYPE = torch.bfloat16 if HAS_GPU else torch.float16
pytestmark = pytest.mark.skipif(not (HAS_GPU or IS_REHEARSAL), reason="there is no NVIDIA GPU here")
on_a_gpu = pytest.mark.skipif(not HAS_GPU, reason="a rehearsal has no stand-in for this")

SETTINGS: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.2, "top_p": 0.9}]
COMMON: dict[str, Any] = {"norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": None}
SHAPES: dict[str, dict[str, Any]] = {  # two layers each; the last is what one of eight GPUs has of 70B
    "8b": {"dim": 4096, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "hidden_dim": 14336},
    "1b": {"dim": 2048, "n_heads": 32, "n_kv_heads": 8, "head_dim": 64, "hidden_dim": 8192},
    "70b-of-8": {"dim": 8192, "n_heads": 8, "n_kv_heads": 1, "head_dim": 128, "hidden_dim": 3584},
}
if not HAS_GPU:  # Triton's interpreter takes a millisecond for each program
    narrow = {"dim": 64, "n_kv_heads": 1, "head_dim": 32, "hidden_dim": 64}
    SHAPES = {"8:1": {"n_heads": 8, **narrow}}
N_LAYERS, N_WORDS = (2, 4096) if HAS_GPU else (1, 40)
TOKENS, COUNT = (310, 100) if HAS_GPU else (26, 3)  # of a text; of new ones
SIZES = [[300], [100, 150, 16, 9], [280, 1, 7]] if HAS_GPU else [[18, 1, 3]]


@pytest.fixture(scope="module", autouse=True)
def _fake_gpu() -> Iterator[None]:
    """In a rehearsal, let the CPU take the place of the GPU."""
    if not IS_REHEARSAL:
        yield
        return
    with pytest.MonkeyPatch.context() as patched, PretendGpu():
        patched.setattr(torch, "Generator", generators_on(ON))
        patched.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
        patched.setattr("llama3_raw.decoding.loop.copy_to_host_async", lambda values: values.tolist)
        patched.setattr("llama3_raw.checkpoint.loading.staging", plain_staging)
        patched.setattr("llama3_raw.checkpoint.loading.usable_device", torch.device)
        yield


def random_model(params: Params) -> Model:
    """Return a model of normal matrices that keep the residual stream near one, made on the device."""
    generator = torch.Generator(ON).manual_seed(0)
    tensors = {}
    for spec in tensor_specs(params):
        values = torch.randn(spec.shape, generator=generator, device=ON)
        values = values * spec.shape[-1] ** -0.5 if values.dim() > 1 else 1 + 0.2 * values
        tensors[spec.meta_name] = values.to(DTYPE)
    return Model(from_state_dict(params, tensors), params, None)


@pytest.fixture(scope="module", params=[*["built-in"] * HAS_GPU, *SHAPES])
def model(request: pytest.FixtureRequest) -> Model:
    """The built-in model, or a random one with the heads of a larger one; in bf16, on the GPU."""
    if request.param == "built-in":
        built_in: Model = request.getfixturevalue("tiny")
        return built_in._replace(weights=converted(built_in.weights, lambda tensor: tensor.to(ON, DTYPE)))
    shape = SHAPES[request.param]
    return random_model(Params(**shape, **COMMON, n_layers=N_LAYERS, vocab_size=N_WORDS, max_seq_len=8192))


@pytest.fixture(scope="module")
def exact(model: Model) -> Model:
    """The same weights in fp32."""
    return model._replace(weights=cast(model.weights, torch.float32))


@pytest.fixture(scope="module")
def text(model: Model) -> list[int]:
    """A text in the model's tokens."""
    if model.tokenizer:
        story = "Once upon a time, there was a little girl who liked to play in the park with her red ball. "
        return model.tokenizer.encode(story * 40, bos=True)[:TOKENS]
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.params.vocab_size, (TOKENS,), generator=generator).tolist()


def in_pieces(model: Model, ids: Tensor, sizes: list[int], ops: Any) -> Tensor:
    """Return the logits of a text that is computed in pieces of these sizes, and then token by token."""
    cache = KVCache.allocate(model.params, max_seq_len=len(ids), like=model.weights)
    logits, start = [], 0
    with torch.no_grad():
        for piece in ids.split([*sizes, *[1] * (len(ids) - sum(sizes))]):
            logits.append(forward(model.weights, model.params, piece, cache=cache, start=start, ops=ops))
            start += len(piece)
    return torch.cat(logits)


def rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def capture(function: Any) -> Any:
    return capture_graph(function) if HAS_GPU else function


@contextlib.contextmanager
def graphs(model: Model, cache: KVCache, ops: Ops, compiled: bool) -> Iterator[CudaGraphs]:
    """Yield graphs, and fail if one could not be compiled or captured; the passes go on without it."""
    assert CudaGraphs.where_possible(model, cache, ops, compiled) is not None
    passes = CudaGraphs(model, cache, ops, capture, compiled and HAS_GPU)
    yield passes
    assert passes.failures == []


def test_the_kernels_are_compiled() -> None:
    assert cuda_ops().can_capture


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_fast_operations_are_nearly_as_accurate(model: Model, exact: Model, text: list[int], sizes: list[int]) -> None:
    """The error relative to fp32 is at most 1.5 times that of the exact operations in the same dtype."""
    ids = torch.tensor(text, device=ON)[: sum(sizes) + 10]
    truth = in_pieces(exact, ids, [len(ids)], REFERENCE)
    fast = rms(in_pieces(model, ids, sizes, cuda_ops()) - truth)
    assert fast <= 1.5 * rms(in_pieces(model, ids, sizes, REFERENCE) - truth)


def test_graphs_give_the_bits_of_steps(model: Model, text: list[int]) -> None:
    """Of one token, and nearly of few, at two places: a replay reads its tokens and its start anew."""
    cache = KVCache.allocate(model.params, max_seq_len=TOKENS, like=model.weights)
    ids = torch.tensor(text, device=ON)
    common: dict[str, Any] = {"cache": cache, "ops": cuda_ops()}
    with graphs(model, cache, cuda_ops(), compiled=False) as passes, torch.no_grad():
        forward(model.weights, model.params, ids[:4], **common)
        for start, count in ((4, 1), (5, 1), (6, 3), (8, 3)):
            tokens = ids[start : start + count]
            by_step = forward(model.weights, model.params, tokens, start=start, **common)
            by_graph = passes(tokens, start)
            if count == 1:
                assert torch.equal(by_graph, by_step)
            else:  # a graph of few tokens computes 16, whose attention may be added up in another order
                assert rms(by_graph - by_step) <= 0.02 * rms(by_step)


def by_graph_and_by_step(model: Model, ids: list[int], count: int, compiled: bool, **settings: Any) -> int:
    """Return the number of tokens that are equal; see `same_tokens`."""
    cache = KVCache.allocate(model.params, max_seq_len=len(ids) + count, like=model.weights)
    common: dict[str, Any] = {"max_new_tokens": count, "ops": cuda_ops(), "stop_ids": (), **settings}
    with graphs(model, cache, cuda_ops(), compiled) as passes:
        by_graph = list(generate(model, ids, cache=cache, captured=passes, **common))
    by_step = list(generate(model, ids, captured=False, **common))
    return same_tokens(model, ids, by_graph, by_step, is_greedy=not settings.get("temperature"))


def same_tokens(model: Model, ids: list[int], ours: list[int], theirs: list[int], is_greedy: bool = True) -> int:
    """Return the number of equal tokens. Where greedy ones diverge, the two most likely must be nearly equal."""
    same = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(ours))
    if same < len(ours) and is_greedy:
        tokens = torch.tensor([*ids, *ours[:same]], device=ON)
        with torch.no_grad():
            first, second = forward(model.weights, model.params, tokens, logits_at=-1).topk(2).values.tolist()
        assert first - second < 0.25  # twice the rounding of such logits in bf16
    return same


@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "sampled"])
def test_the_graph_gives_the_same_tokens(model: Model, text: list[int], settings: dict[str, Any]) -> None:
    by_graph_and_by_step(model, text[:20], COUNT, compiled=False, **settings)


@on_a_gpu
def test_the_compiled_graph_gives_the_same_tokens(model: Model, text: list[int]) -> None:
    if model.params.head_dim != 128 or model.params.n_kv_heads != 8:
        pytest.skip("compiling one model takes long enough")
    by_graph_and_by_step(model, text[:20], COUNT, compiled=True)


def test_lookup_gives_the_same_tokens(model: Model, text: list[int]) -> None:
    """Up to the rounding of attention, which is not the same for one token and for several."""
    ids = text[:8] * 2 + text[:4]
    count = min(COUNT, 40)
    common: dict[str, Any] = {"max_new_tokens": count, "ops": cuda_ops(), "stop_ids": ()}
    policy = LookupPolicy(15)
    cache = KVCache.allocate(model.params, max_seq_len=len(ids) + count, like=model.weights)
    with graphs(model, cache, cuda_ops(), compiled=False) as passes:
        with_lookup = list(generate(model, ids, lookup=policy, cache=cache, captured=passes, **common))
    without = list(generate(model, ids, **common))
    same_tokens(model, ids, with_lookup, without)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantized(model: Model, exact: Model, text: list[int], name: str) -> None:
    """The kernel and torch's product with the dequantized matrix are equal, up to rounding; by steps and by graph."""
    of_few_bits = model._replace(weights=all_quantized(model.weights, name))
    ids = torch.tensor(text[:60] if HAS_GPU else text[:22], device=ON)
    sizes = [40, 10] if HAS_GPU else [18, 3]
    truth = in_pieces(exact._replace(weights=all_quantized(exact.weights, name)), ids, [len(ids)], REFERENCE)
    fast = rms(in_pieces(of_few_bits, ids, sizes, cuda_ops()) - truth)
    assert fast <= 1.5 * rms(in_pieces(of_few_bits, ids, sizes, REFERENCE) - truth)
    by_graph_and_by_step(of_few_bits, text[:20], min(COUNT, 40), compiled=False)


def all_quantized(weights: Weights, name: str) -> Weights:
    def of(matrices: Any, field: str) -> Any:
        return quantized(getattr(matrices, field), field, name)

    fields = [field for field in MATRICES if field != "output"]
    layers = tuple(layer._replace(**{field: of(layer, field) for field in fields}) for layer in weights.layers)
    return weights._replace(layers=layers, output=of(weights, "output"))


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_fused_layers_are_nearly_as_accurate(model: Model, exact: Model, text: list[int], name: str) -> None:
    """The variant that gpu_report measures: after a prompt, one token and then few."""
    if name == "int8":
        model = model._replace(weights=all_quantized(model.weights, name))
        exact = exact._replace(weights=all_quantized(exact.weights, name))
    ids, ends = torch.tensor(text[:26], device=ON), (20, 21, 26)
    truth = in_pieces(exact, ids, [len(ids)], REFERENCE)[20:]

    def logits(ops: Ops) -> Tensor:
        cache = KVCache.allocate(model.params, max_seq_len=26, like=model.weights)
        common: dict[str, Any] = {"cache": cache, "ops": ops}
        forward(model.weights, model.params, ids[:20], **common)
        pieces = []
        with torch.no_grad(), fused_layers() if ops is not REFERENCE else torch.no_grad():
            for start, end in itertools.pairwise(ends):
                at = torch.tensor(start, device=ON) if ops is not REFERENCE else start
                pieces.append(forward(model.weights, model.params, ids[start:end], start=at, **common))
        return torch.cat(pieces)

    assert rms(logits(cuda_ops()) - truth) <= 1.7 * rms(logits(REFERENCE) - truth)  # over 6 tokens only


def test_greedy_decoding_in_the_graph(model: Model, text: list[int]) -> None:
    """The tokens of `generate`, by replays alone, and again in a second call."""
    expected = list(generate(model, text[:20], max_new_tokens=COUNT, ops=cuda_ops(), stop_ids=(), captured=False))
    cache = KVCache.allocate(model.params, max_seq_len=20 + COUNT, like=model.weights)
    graph = GreedyGraph(model, cache, cuda_ops(), capture)
    for _ in range(2):
        with torch.no_grad():
            forward(model.weights, model.params, torch.tensor(text[:20], device=ON), cache=cache, ops=cuda_ops())
        assert graph(expected[0], 20, COUNT - 1).tolist() == expected[1:]


def test_rows_of_a_batch(model: Model, exact: Model, text: list[int]) -> None:
    """Rows of unequal length, each with its own start, are as accurate as alone."""
    starts = (3, 9)
    end = torch.tensor(starts, device=ON)
    ids = torch.tensor([text[:10], text[10:20]], device=ON)

    def logits(model: Model, ops: Ops) -> Tensor:
        cache = KVCache.allocate(model.params, max_seq_len=12, like=model.weights, batch=(2,))
        with torch.no_grad():
            forward(model.weights, model.params, ids, cache=cache, ops=ops)
            return forward(model.weights, model.params, ids[:, :1], cache=cache, start=end, ops=ops)

    truth = logits(exact, REFERENCE)
    assert rms(logits(model, cuda_ops()) - truth) <= 2 * rms(logits(model, REFERENCE) - truth)  # over 2 tokens only


@on_a_gpu
def test_exact_operations_are_those_of_the_cpu(exact: Model, text: list[int]) -> None:
    """In fp32, up to the order of sums; torch must not round products to fewer bits."""
    ids = torch.tensor(text[:40], device=ON)
    on_cpu = exact._replace(weights=converted(exact.weights, lambda tensor: tensor.cpu()))
    expected = forward(on_cpu.weights, on_cpu.params, ids.cpu())
    difference = (forward(exact.weights, exact.params, ids).cpu() - expected).abs().max()
    assert difference <= 2e-5 * expected.abs().max()


@on_a_gpu
def test_a_long_prompt(model: Model, exact: Model, text: list[int]) -> None:
    """8,192 tokens in chunks of 1,024: still close to fp32, and never with all scores in memory."""
    longer = model._replace(params=Params(**{**vars(model.params), "max_seq_len": 8192}))
    ids = torch.tensor((text * 30)[:8192], device=ON)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cache = KVCache.allocate(longer.params, max_seq_len=8192, like=longer.weights)
    held = torch.cuda.memory_allocated() - before
    last: dict[str, Tensor] = {}
    peak = 0
    with torch.no_grad():
        for name, ops in (("fast", cuda_ops()), ("reference", REFERENCE)):
            for start in range(0, 8192, 1024):
                piece = ids[start : start + 1024]
                last[name] = forward(
                    longer.weights, longer.params, piece, cache=cache, start=start, logits_at=-1, ops=ops
                )
            if name == "fast":
                peak = torch.cuda.max_memory_allocated() - before - held
        truth = forward(exact.weights, longer.params, ids, logits_at=-1, ops=cuda_ops())
    assert rms(last["fast"] - truth) <= 1.5 * rms(last["reference"] - truth)
    width = max(model.params.hidden_dim, model.params.dim)
    scores = model.params.n_heads * 1024 * 8192 * 2
    assert peak < max(scores / 2, 8 * 1024 * width * 4)  # bytes: half of a chunk's scores in bf16, or its activations


@on_a_gpu
def test_memory_is_constant_over_many_tokens(model: Model, text: list[int]) -> None:
    cache = KVCache.allocate(model.params, max_seq_len=520, like=model.weights)
    used = []
    with graphs(model, cache, cuda_ops(), compiled=False) as passes:
        for _ in range(7):  # 3,500 tokens; gpu_report has a phase with 10,000
            tokens = generate(model, text[:20], max_new_tokens=500, stop_ids=(), cache=cache, captured=passes)
            assert sum(1 for _ in tokens) == 500
            used.append(torch.cuda.memory_allocated())
    assert used[-1] <= used[1]


def test_loading(tiny: Model) -> None:
    """Through pinned memory, bit for bit."""
    loaded = llama3_raw.load(TINY, device=ON)
    for tensor, expected in zip(flat(loaded.weights), flat(tiny.weights), strict=True):
        assert torch.equal(tensor.cpu(), expected)
        assert tensor.device.type == ON.type


@on_a_gpu
def test_a_model_in_two_places(tiny: Model) -> None:
    """With a layer's matrices on the GPU and the others in RAM, as accurate as in one place."""
    divided = llama3_raw.load(TINY, device=ON, gpu_layers=1)
    ids = torch.arange(300, 340)
    truth = forward(cast(tiny.weights, torch.float32), tiny.params, ids)
    with torch.no_grad():
        logits = forward(divided.weights, divided.params, ids.to(ON), ops=ops_for(divided.weights)).cpu()
    plain = forward(tiny.weights, tiny.params, ids)
    assert rms(logits - truth) <= 1.5 * rms(plain - truth)


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A few tokens of the built-in model are the same as on the CPU."""
    texts = []
    for device in (ON.type, "cpu") if HAS_GPU else ("cpu", "cpu"):
        assert main(["Once upon a time", f"--weights={TINY}", f"--device={device}", "--max-new-tokens=6"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
