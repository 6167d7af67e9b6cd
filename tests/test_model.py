"""The forward pass compared with Meta's and Hugging Face's code, and with itself, cached, chunked or batched."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llama3_raw import KVCache, Model, Params, Weights, forward, generate
from llama3_raw.backends.choose import suitable_ops
from llama3_raw.model import rope, rope_rotation
from llama3_raw.ops import no_tap
from llama3_raw.params import RopeScaling
from tests.references import cast, converted, flat, hf_model, meta_model, random_weights

GROUPED = Params.from_meta(
    {"dim": 256, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 500, "norm_eps": 1e-5, "multiple_of": 64}
)
TOLERANCE = 5e-6  # of the largest logit, in fp32


def tokens_for(params: Params, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(params.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def assert_equal_to_meta(params: Params, weights: Weights, batch: int | None, seed: int = 0) -> None:
    """Check for the same bits: a prefill, then 1, 5, 1 and 16 tokens with a cache, and all at once without."""
    length = 40
    tokens = tokens_for(params, *([] if batch is None else [batch]), length, seed=seed)
    theirs = meta_model(params, weights, batch or 1, length)
    rows = tokens if batch else tokens[None]
    cache = KVCache.allocate(params, max_seq_len=length, like=weights, batch=() if batch is None else (batch,))
    with torch.inference_mode():
        for begin, end in ((0, 17), (17, 18), (18, 23), (23, 24), (24, length)):
            expected = theirs(rows[:, begin:end], begin)
            logits = forward(weights, params, tokens[..., begin:end], cache=cache, start=begin)
            assert logits.dtype == torch.float32
            assert torch.equal(logits, expected if batch else expected[0]), f"tokens {begin} to {end} differ"
        expected = theirs(rows, 0)
        assert torch.equal(forward(weights, params, tokens), expected if batch else expected[0])


@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain rope", "scaled rope"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("heads", [(256, 8, 2), (288, 6, 6), (96, 3, 1)], ids=["grouped", "multi-head", "one kv head"])
def test_equal_to_meta(heads: tuple[int, int, int], dtype: torch.dtype, scaled: bool, batch: int | None) -> None:
    dim, n_heads, n_kv_heads = heads
    content = {"dim": dim, "n_layers": 2, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "vocab_size": 300}
    params = Params.from_meta({**content, "norm_eps": 1e-5, "multiple_of": 32, "use_scaled_rope": scaled})
    assert_equal_to_meta(params, random_weights(params, dtype, seed=dim), batch)


@pytest.mark.parametrize("seed", range(12))
def test_equal_to_meta_for_random_configurations(seed: int) -> None:
    """head_dim is a multiple of 16, as in every Llama (see `rope`)."""
    rng = random.Random(seed)
    n_kv_heads = rng.choice([1, 2, 3, 4])
    n_heads = n_kv_heads * rng.choice([1, 2, 3, 4])
    params = Params.from_meta(
        {
            "dim": n_heads * rng.choice([16, 32, 48, 64, 128]),
            "n_layers": rng.choice([1, 2, 4]),
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "vocab_size": rng.randrange(50, 800),
            "norm_eps": rng.choice([1e-6, 1e-5]),
            "multiple_of": rng.choice([16, 32, 256]),
            "rope_theta": rng.choice([10000.0, 500000.0]),
            "use_scaled_rope": rng.choice([False, True]),
        }
    )
    dtype = rng.choice([torch.bfloat16, torch.float32])
    weights = random_weights(params, dtype, seed, tied=rng.choice([False, True]))
    assert_equal_to_meta(params, weights, rng.choice([None, 2, 5]), seed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("trained", ["stories15m", "smollm2", "tiny"])
def test_equal_to_meta_for_trained_models(trained: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(trained)
    weights = cast(model.weights, dtype)
    assert_equal_to_meta(model.params, weights, None)
    assert_equal_to_meta(model.params, weights, 2)


CAPITAL_OF_FRANCE = [504, 3575, 282, 4649, 314]  # "The capital of France is" in SmolLM2's tokens


@pytest.fixture(scope="module")
def text(smollm2: Model) -> Tensor:
    """[1, 65]: a sentence and the model's continuation."""
    return torch.tensor([[*CAPITAL_OF_FRANCE, *generate(smollm2, CAPITAL_OF_FRANCE, max_new_tokens=60)]])


@pytest.mark.slow
def test_hf_in_fp32_on_trained_weights(smollm2: Model, text: Tensor) -> None:
    with torch.no_grad():
        expected = hf_model(smollm2.params, smollm2.weights)(text).logits
        logits = forward(smollm2.weights, smollm2.params, text)
    assert (logits - expected).abs().max() <= 1e-4


@pytest.mark.slow
def test_fp32_error_is_that_of_hf(smollm2: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors relative to a forward pass in fp64, root mean square over all logits of four prompts of random tokens.

    The largest difference between the two is around 1e-4 there, above or below it by chance: it is the rounding of
    fp32. The ratio of their errors was 1.06 when measured; other machines add in another order.
    """
    tokens = tokens_for(smollm2.params, 4, 64)
    weights = smollm2.weights
    in_fp64 = cast(weights, torch.float64)
    to_float = Tensor.float
    with torch.no_grad():
        ours = forward(weights, smollm2.params, tokens)
        theirs = hf_model(smollm2.params, weights)(tokens).logits
        monkeypatch.setattr(Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_float(x))
        truth = forward(in_fp64, smollm2.params, tokens)
    assert truth.dtype == torch.float64
    assert (ours - truth).square().mean() <= 1.5**2 * (theirs - truth).square().mean()


@pytest.mark.slow
def test_trained_weights_know_the_capital_of_france(smollm2: Model) -> None:
    with torch.no_grad():
        logits = forward(smollm2.weights, smollm2.params, torch.tensor(CAPITAL_OF_FRANCE), logits_at=-1)
    assert int(logits.argmax()) == 7042  # " Paris"


@pytest.mark.slow
def test_bf16_error_is_no_larger_than_that_of_hf(smollm2: Model) -> None:
    """Errors relative to the fp32 result, root mean square over all logits of four prompts."""
    tokens = tokens_for(smollm2.params, 4, 32)
    weights = cast(smollm2.weights, torch.bfloat16)
    exact = cast(weights, torch.float32)
    with torch.no_grad():
        truth = forward(exact, smollm2.params, tokens)
        ours = (forward(weights, smollm2.params, tokens) - truth).square().mean().sqrt()
        theirs = (hf_model(smollm2.params, weights)(tokens).logits.float() - truth).square().mean().sqrt()
    assert ours <= 1.1 * theirs


def test_hf_with_another_head_dim() -> None:
    """In HF's config head_dim may differ from dim / n_heads; in Meta's it cannot."""
    params = Params.from_hf(
        {
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": 200,
            "intermediate_size": 128,
            "rms_norm_eps": 1e-5,
        }
    )
    weights = random_weights(params, torch.float32, seed=1)
    tokens = tokens_for(params, 20)
    with torch.no_grad():
        expected = hf_model(params, weights)(tokens[None]).logits[0]
        assert_close(forward(weights, params, tokens), expected)


@pytest.fixture(scope="module")
def fp32(tiny: Model) -> Model:
    return tiny._replace(weights=cast(tiny.weights, torch.float32))


@pytest.mark.parametrize("trained", ["fp32", "smollm2"])
@pytest.mark.parametrize("cuts", [[1] * 24, [24], [16, 8], [17, 1, 5, 1], [3, 7, 14]], ids=str)
def test_cached_equals_uncached(trained: str, cuts: list[int], request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(trained)
    tokens = tokens_for(model.params, sum(cuts))
    cache = KVCache.allocate(model.params, max_seq_len=30, like=model.weights)
    pieces, start = [], 0
    with torch.no_grad():
        whole = forward(model.weights, model.params, tokens)
        for cut in cuts:
            new = tokens[start : start + cut]
            pieces.append(forward(model.weights, model.params, new, cache=cache, start=start))
            start += cut
    assert_close(torch.cat(pieces), whole)


def test_a_batch_equals_its_rows(fp32: Model) -> None:
    tokens = tokens_for(fp32.params, 4, 30)
    with torch.no_grad():
        together = forward(fp32.weights, fp32.params, tokens)
        alone = torch.stack([forward(fp32.weights, fp32.params, row) for row in tokens])
        nested = forward(fp32.weights, fp32.params, tokens.view(2, 2, 30))
    assert_close(together, alone)
    assert_close(nested.view_as(alone), alone)


@pytest.mark.parametrize("batch", [(), (3,)], ids=["single", "batch"])
def test_tensor_start_equals_int_start(fp32: Model, batch: tuple[int, ...]) -> None:
    tokens = tokens_for(fp32.params, *batch, 20)
    caches = [KVCache.allocate(fp32.params, max_seq_len=32, like=fp32.weights, batch=batch) for _ in range(2)]
    with torch.no_grad():
        for begin, end in ((0, 12), (12, 13), (13, 18), (18, 20)):
            new = tokens[..., begin:end]
            exact = forward(fp32.weights, fp32.params, new, cache=caches[0], start=begin)
            masked = forward(fp32.weights, fp32.params, new, cache=caches[1], start=torch.full(batch, begin))
            assert_close(masked, exact)


def test_rows_of_unequal_length(fp32: Model) -> None:
    """Right-padded prompts; each row then continues after its own length, as if it were alone."""
    lengths = torch.tensor([5, 12, 9])
    tokens = tokens_for(fp32.params, 3, 16)
    cache = KVCache.allocate(fp32.params, max_seq_len=20, like=fp32.weights, batch=(3,))
    with torch.no_grad():
        prompt = forward(
            fp32.weights,
            fp32.params,
            tokens[:, :12],  # padding after a row's length
            cache=cache,
            start=torch.zeros(3, dtype=torch.long),
            logits_at=lengths - 1,
        )
        new = tokens.gather(1, lengths[:, None] + torch.arange(2))
        after = forward(fp32.weights, fp32.params, new, cache=cache, start=lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = forward(fp32.weights, fp32.params, tokens[row, : length + 2])
            assert_close(prompt[row], alone[length - 1])
            assert_close(after[row], alone[length : length + 2])


def test_logits_at(fp32: Model) -> None:
    tokens = tokens_for(fp32.params, 2, 10)
    with torch.no_grad():
        every = forward(fp32.weights, fp32.params, tokens)
        assert_close(forward(fp32.weights, fp32.params, tokens, logits_at=-1), every[:, -1])
        picked = forward(fp32.weights, fp32.params, tokens, logits_at=torch.tensor([3, 7]))
        assert_close(picked, every[[0, 1], [3, 7]])
        single = forward(fp32.weights, fp32.params, tokens[0], logits_at=torch.tensor(4))
    assert_close(single, every[0, 4])
    for outside in (10, -1):
        with pytest.raises(RuntimeError, match="out of bounds"):
            forward(fp32.weights, fp32.params, tokens[0], logits_at=torch.tensor(outside))


@pytest.mark.parametrize("scaled", [False, True], ids=["plain rope", "scaled rope"])
def test_fp64_weights_compute_in_fp64(scaled: bool) -> None:
    """Every tensor, to the last bits of fp64: numpy computes the same, from the formulas."""
    params = dataclasses.replace(GROUPED, rope_scaling=RopeScaling(8.0) if scaled else None)
    weights = cast(random_weights(params, torch.float32, seed=3), torch.float64)
    tokens = tokens_for(params, 300)
    seen: dict[str, Tensor] = {}
    logits = forward(weights, params, tokens, tap=lambda name, tensor: seen.setdefault(name, tensor))
    assert {tensor.dtype for tensor in seen.values()} == {torch.float64}
    expected = logits_by_numpy(params, weights, tokens)
    assert np.abs(logits.numpy() - expected).max() <= 1e-12 * np.abs(expected).max()
    fast = forward(weights, params, tokens, ops=suitable_ops(torch.device("cpu")))
    assert np.abs(fast.numpy() - expected).max() <= 1e-12 * np.abs(expected).max()


def logits_by_numpy(params: Params, weights: Weights, tokens: Tensor) -> Any:
    """The pass over one prompt in fp64, with complex numbers for RoPE, a head at a time."""

    def norm(x: Any, weight: Tensor) -> Any:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + params.norm_eps) * weight.numpy()

    positions, size, n_rep = np.arange(len(tokens)), params.head_dim, params.n_heads // params.n_kv_heads
    frequencies = params.rope_theta ** -(np.arange(0, size, 2) / size)
    if params.rope_scaling:
        turns = params.rope_scaling.original_max_seq_len * frequencies / (2 * np.pi)  # in the original context
        smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
        frequencies = frequencies * (smooth + (1 - smooth) / params.rope_scaling.factor)
    rotation = np.exp(1j * positions[:, None] * frequencies)

    def rotated(x: Any) -> Any:
        pairs = (x[:, ::2] + 1j * x[:, 1::2]) * rotation
        return np.stack((pairs.real, pairs.imag), axis=-1).reshape(x.shape)

    x = weights.tok_embeddings.numpy()[tokens]
    for layer in weights.layers:
        normed = norm(x, layer.attention_norm)
        q, k, v = (normed @ matrix.numpy().T for matrix in (layer.wq, layer.wk, layer.wv))
        heads = []
        for head in range(params.n_heads):
            own, group = (slice(i * size, (i + 1) * size) for i in (head, head // n_rep))
            scores = rotated(q[:, own]) @ rotated(k[:, group]).T / np.sqrt(size)
            scores[positions > positions[:, None]] = -np.inf
            probs = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(probs / probs.sum(-1, keepdims=True) @ v[:, group])
        x = x + np.concatenate(heads, axis=-1) @ layer.wo.numpy().T
        normed = norm(x, layer.ffn_norm)
        gate, up = normed @ layer.w1.numpy().T, normed @ layer.w3.numpy().T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer.w2.numpy().T
    return norm(x, weights.norm) @ weights.output.numpy().T


def test_invalid_arguments_are_refused(fp32: Model) -> None:
    cache = KVCache.allocate(fp32.params, max_seq_len=8, like=fp32.weights)
    tokens = tokens_for(fp32.params, 5)
    for start in (4, -1):
        with pytest.raises(ValueError, match="overrun the cache of 8"):
            forward(fp32.weights, fp32.params, tokens, cache=cache, start=start)
    for shape, batch in (((5,), (2,)), ((2, 5), ()), ((3, 5), (2,))):
        cache = KVCache.allocate(fp32.params, max_seq_len=8, like=fp32.weights, batch=batch)
        with pytest.raises(ValueError, match="do not match the cache"):
            forward(fp32.weights, fp32.params, tokens_for(fp32.params, *shape), cache=cache)
    for start_alone in (3, torch.tensor(0)):
        with pytest.raises(ValueError, match="start needs a cache"):
            forward(fp32.weights, fp32.params, tokens, start=start_alone)


def test_rope_equals_the_complex_product() -> None:
    params = Params.from_meta(
        {"dim": 256, "n_layers": 1, "n_heads": 4, "vocab_size": 9, "norm_eps": 1e-5, "use_scaled_rope": True}
    )
    x = torch.randn(1000, 4, 64, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_rotation(torch.arange(1000), params)
    rotated = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    assert torch.equal(rope(x, cos, sin), torch.view_as_real(rotated).flatten(-2))


def test_scaled_rope_keeps_high_frequencies_and_lowers_low_ones() -> None:
    content = {"dim": 2048, "n_layers": 16, "n_heads": 32, "vocab_size": 9, "norm_eps": 1e-5}
    plain = Params.from_meta(content)
    scaled = Params.from_meta({**content, "use_scaled_rope": True})
    assert scaled.rope_scaling == RopeScaling(32.0)
    one = torch.tensor([1])
    before, after = (torch.atan2(*reversed(rope_rotation(one, params))).flatten() for params in (plain, scaled))
    assert torch.equal(after[:10], before[:10])
    torch.testing.assert_close(after[-5:], before[-5:] / 32)


def test_names_and_shapes_that_a_tap_sees(tiny: Model) -> None:
    seen: dict[str, tuple[int, ...]] = {}

    def record(name: str, tensor: Tensor) -> Tensor:
        assert name not in seen
        seen[name] = tuple(tensor.shape)
        return tensor

    forward(tiny.weights, tiny.params, tokens_for(tiny.params, 17), tap=record)
    p = tiny.params
    within = {
        "attention_norm": (17, p.dim),
        "attention.q": (17, p.n_heads, p.head_dim),
        "attention.k": (17, p.n_kv_heads, p.head_dim),
        "attention.v": (17, p.n_kv_heads, p.head_dim),
        "attention.q_rope": (17, p.n_heads, p.head_dim),
        "attention.k_rope": (17, p.n_kv_heads, p.head_dim),
        "attention.scores": (p.n_heads, 17, 17),
        "attention.probs": (p.n_heads, 17, 17),
        "attention.heads": (17, p.n_heads, p.head_dim),
        "attention.out": (17, p.dim),
        "attention.residual": (17, p.dim),
        "ffn_norm": (17, p.dim),
        "feed_forward.gate": (17, p.hidden_dim),
        "feed_forward.up": (17, p.hidden_dim),
        "feed_forward.hidden": (17, p.hidden_dim),
        "feed_forward.out": (17, p.dim),
        "residual": (17, p.dim),
    }
    expected: dict[str, tuple[int, ...]] = {"tok_embeddings": (17, p.dim)}
    expected |= {f"layers.{i}.{name}": shape for i in range(p.n_layers) for name, shape in within.items()}
    expected |= {"norm": (17, p.dim), "logits": (17, p.vocab_size)}
    assert list(seen.items()) == list(expected.items())


def test_a_tap_changes_what_follows(tiny: Model) -> None:
    tokens = tokens_for(tiny.params, 9)

    def silence(name: str, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor) if name.endswith(("attention.out", "feed_forward.out")) else tensor

    with torch.no_grad():
        silenced = forward(tiny.weights, tiny.params, tokens, tap=silence)
        without_layers = forward(tiny.weights._replace(layers=()), tiny.params, tokens)
        assert torch.equal(silenced, without_layers)
        assert not torch.equal(silenced, forward(tiny.weights, tiny.params, tokens, tap=no_tap))


@pytest.mark.slow
@pytest.mark.parametrize("start", [5, torch.tensor([5, 2])], ids=["int start", "tensor start"])
def test_it_compiles_as_one_graph(start: int | Tensor) -> None:
    """torch.compile never falls back to Python; the eager backend runs the captured graph unchanged."""
    weights = random_weights(GROUPED, torch.float32, seed=3)
    tokens = tokens_for(GROUPED, 2, 3)
    caches = [KVCache.allocate(GROUPED, max_seq_len=16, like=weights, batch=(2,)) for _ in range(2)]
    compiled = torch.compile(forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = forward(weights, GROUPED, tokens, cache=caches[0], start=start)
        assert torch.equal(compiled(weights, GROUPED, tokens, cache=caches[1], start=start), expected)


def test_it_is_differentiable() -> None:
    """Every weight gets a gradient, and it equals the numerical slope of the loss."""
    weights = random_weights(GROUPED, torch.float32, seed=3)
    every = flat(weights)
    for tensor in every:
        tensor.requires_grad_()
    tokens = tokens_for(GROUPED, 2, 8)
    forward(weights, GROUPED, tokens).square().mean().backward()
    direction = [torch.randn(t.shape, generator=torch.Generator().manual_seed(i)) for i, t in enumerate(every)]
    slope = sum((t.grad * d).sum() for t, d in zip(every, direction, strict=True) if t.grad is not None)
    with torch.no_grad():
        sides = []
        for step in (1e-3, -1e-3):
            for tensor, d in zip(every, direction, strict=True):
                tensor += step * d
            sides.append(forward(weights, GROUPED, tokens).square().mean())
            for tensor, d in zip(every, direction, strict=True):
                tensor -= step * d
    assert all(tensor.grad is not None for tensor in every)
    assert float(slope) == pytest.approx(float(sides[0] - sides[1]) / 2e-3, rel=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")
def test_bf16_error_on_a_gpu_is_no_larger_than_that_of_hf(smollm2: Model) -> None:
    tokens = tokens_for(smollm2.params, 4, 64).cuda()
    weights = cast(smollm2.weights, torch.bfloat16)
    exact = cast(weights, torch.float32)
    with torch.no_grad():
        truth = forward(exact, smollm2.params, tokens.cpu())
        theirs = hf_model(smollm2.params, weights).cuda()(tokens).logits.float().cpu() - truth
        on_gpu = converted(weights, Tensor.cuda)
        ours = forward(on_gpu, smollm2.params, tokens).cpu() - truth
    assert ours.square().mean() <= 1.1**2 * theirs.square().mean()


def test_a_pass_over_no_tokens(tiny: Model) -> None:
    logits = forward(tiny.weights, tiny.params, torch.tensor([], dtype=torch.long))
    assert logits.shape == (0, tiny.params.vocab_size)
