"""Patching, attribution, circuits and gradients give what TransformerLens 4.3 gives, on the same weights."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from llama3_raw import (
    Model,
    Params,
    Trace,
    attribute,
    by_head,
    composition,
    fold_norms,
    head_results,
    path_patch,
    qk_circuits,
    sweep,
    trace,
    trace_gradients,
)
from llama3_raw.tracing.circuits import attention_at
from tests.references import hf_model, random_weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("transformer_lens", reason="pip install 'transformer_lens>=4.3', or the extra test")
    from transformer_lens import patching
    from transformer_lens.head_detector import (
        compute_head_attention_similarity_score,
        get_induction_head_detection_pattern,
    )
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis import direct_logit_attribution

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ANSWER, OTHER = 3, 5
N_LAYERS, N_HEADS, LENGTH = 3, 4, 5
LAYERS = range(N_LAYERS)


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, ANSWER] - logits[:, -1, OTHER]


class Both(NamedTuple):
    """A model here and in TransformerLens, and traces of two prompts in each."""

    model: Model
    lens: Any
    ids: list[int]
    clean: Trace
    corrupted: Trace
    clean_cache: Any
    corrupted_cache: Any

    @property
    def tokens(self) -> Tensor:
        return torch.tensor([self.ids])


def bridge(model: Model) -> Any:
    """Return TransformerLens's model of the same weights, without any change of them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(i): i for i in range(model.params.vocab_size)}, unk_token="0"))
    names: dict[str, Any] = {"bos_token": "0", "eos_token": "1", "pad_token": "1", "unk_token": "0"}
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=words, name_or_path="none", add_bos_token=True, **names)
    hf = hf_model(model.params, model.weights)
    hf.config.architectures = ["LlamaForCausalLM"]
    return TransformerBridge.boot_transformers("random", hf_model=hf, tokenizer=tokenizer)


@pytest.fixture(scope="module", params=[2, 4], ids=["grouped", "multi-head"])
def both(request: pytest.FixtureRequest) -> Both:
    params = Params(
        dim=64,
        n_layers=N_LAYERS,
        n_heads=N_HEADS,
        n_kv_heads=request.param,
        vocab_size=100,
        head_dim=16,
        hidden_dim=96,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        max_seq_len=64,
    )
    model = Model(random_weights(params, torch.float32, seed=0), params, None)
    lens = bridge(model)
    lens.enable_compatibility_mode(no_processing=True)
    generator = torch.Generator().manual_seed(1)
    ids, other = torch.randint(100, (2, LENGTH), generator=generator).tolist()
    caches = [lens.run_with_cache(torch.tensor([prompt]))[1] for prompt in (other, ids)]
    return Both(model, lens, ids, trace(model, other), trace(model, ids), *caches)


@pytest.fixture(scope="module")
def folded_lens(both: Both) -> Any:
    """TransformerLens's model with its norms folded into the matrices."""
    lens = bridge(both.model)
    lens.enable_compatibility_mode(center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    return lens


def close(ours: Tensor, theirs: Any) -> None:
    theirs = torch.as_tensor(theirs).detach()
    assert ours.shape == theirs.shape
    assert theirs.std() > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def of_lens(run: Callable[..., Tensor], both: Both) -> Tensor:
    return run(both.lens, both.tokens, both.clean_cache, lambda logits: metric(logits)[0])


@pytest.mark.parametrize(
    ("names", "theirs"),
    [
        (["tok_embeddings", "layers.0.residual", "layers.1.residual"], "resid_pre"),
        (["layers.*.attention.out"], "attn_out"),
        (["layers.*.feed_forward.out"], "mlp_out"),
    ],
)
def test_sweep_by_position(both: Both, names: list[str], theirs: str) -> None:
    ours = sweep(both.model, both.ids, both.clean, names, metric, rows=5)
    close(ours, of_lens(getattr(patching, f"get_act_patch_{theirs}"), both))


@pytest.mark.parametrize(
    ("name", "theirs"), [("heads", "attn_head_out"), ("probs", "attn_head_pattern"), ("k", "attn_head_k")]
)
def test_sweep_by_head(both: Both, name: str, theirs: str) -> None:
    ours = sweep(both.model, both.ids, both.clean, f"layers.*.attention.{name}", metric, by="head", rows=5)
    close(ours, of_lens(getattr(patching, f"get_act_patch_{theirs}_all_pos"), both))


@pytest.mark.parametrize("read", ["q", "k", "v"])
def test_direct_path_patching(both: Both, read: Any) -> None:
    params = both.model.params
    if read != "q" and params.n_kv_heads != params.n_heads:
        pytest.skip("TransformerLens has it for k and v only in multi-head attention")
    receivers = [(f"layers.{i}.attention.{read}", head) for i in LAYERS for head in range(N_HEADS)]
    sender = ("layers.0.attention.heads", 1)
    ours = path_patch(both.model, both.ids, both.clean, [sender], receivers, metric, direct=True, rows=5)
    caches = (both.clean_cache, both.corrupted_cache)
    theirs = patching.get_act_patch_direct_path(
        both.lens, both.tokens, *caches, lambda logits: metric(logits)[0], 0, 1, read, verbose=False
    )
    close(ours.view(N_LAYERS, N_HEADS)[1:], theirs[1:])


def test_attribution(both: Both, folded_lens: Any) -> None:
    ours = attribute(both.corrupted, both.model, (ANSWER, OTHER))
    labels = ["embed", *(f"{i}_{part}_out" for i in LAYERS for part in ("attn", "mlp"))]
    heads = [[f"L{i}H{head}" for head in range(N_HEADS)] for i in LAYERS]
    theirs: dict[str, float] = {}
    for unit in ("component", "head"):
        answers: dict[str, Any] = {"answer_tokens": torch.tensor([ANSWER]), "incorrect_tokens": torch.tensor([OTHER])}
        found = direct_logit_attribution(folded_lens, both.tokens, unit=unit, **answers)
        theirs |= zip(found.labels, found.attribution.flatten().tolist(), strict=True)
    close(ours.by_part, torch.tensor([theirs[label] for label in labels]))
    close(ours.by_head, torch.tensor([[theirs[label] for label in row] for row in heads]))


def test_results_of_heads(both: Both) -> None:
    theirs = both.corrupted_cache.stack_head_results(layer=N_LAYERS)  # [layers * heads, 1, T, dim]
    ours = torch.stack([head_results(both.corrupted, both.model, i).transpose(0, 1) for i in LAYERS])
    close(ours.flatten(0, 1), theirs.squeeze(1))


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_composition(both: Both, kind: Any) -> None:
    ours = composition(both.model.weights, both.model.params, kind)
    close(ours, both.lens.all_composition_scores(kind).scores)


def test_matrices_of_heads(both: Both) -> None:
    heads = by_head(both.model.weights, both.model.params)
    close(torch.stack([layer.wv.mT for layer in heads]), both.lens.W_V)
    close(torch.stack([layer.wo.mT for layer in heads]), both.lens.W_O)
    n_rep = N_HEADS // both.model.params.n_kv_heads
    theirs = both.lens.W_Q @ both.lens.W_K.repeat_interleave(n_rep, 1).mT  # its rows of a head are in another order
    close(torch.stack([circuit.matrix() for circuit in qk_circuits(both.model.weights, both.model.params)]), theirs)


def test_folded_norms(both: Both, folded_lens: Any) -> None:
    folded = fold_norms(both.model.weights)
    close(torch.stack([layer.wv.mT for layer in by_head(folded, both.model.params)]), folded_lens.W_V)
    assert isinstance(folded.output, Tensor)
    close(folded.output.mT, folded_lens.W_U)


def test_gradients(both: Both) -> None:
    hooks = {f"layers.{i}.{ours}": f"blocks.{i}.{theirs}" for i in LAYERS for ours, theirs in NAMES.items()}
    _, gradients = trace_gradients(both.model, [both.ids], lambda logits: metric(logits).sum(), *hooks)
    seen: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor, hook: Any) -> Tensor:
        seen[name] = tensor
        return tensor

    keeping = [(theirs, functools.partial(keep, ours)) for ours, theirs in hooks.items()]
    logits = both.lens.run_with_hooks(both.tokens, fwd_hooks=keeping)
    theirs = torch.autograd.grad(metric(logits).sum(), [seen[name] for name in hooks])
    for name, gradient in zip(hooks, theirs, strict=True):
        close(gradients[name], gradient)


NAMES = {
    "attention.v": "attn.hook_v",
    "attention.probs": "attn.hook_pattern",
    "attention.heads": "attn.hook_z",
    "attention.out": "hook_attn_out",
    "feed_forward.out": "hook_mlp_out",
    "residual": "hook_resid_post",
}


def test_the_share_of_attention_at_a_distance(both: Both) -> None:
    ids = 2 * [2, 3, 5, 7, 11]
    ours = attention_at(trace(both.model, ids, "*.probs"), 4, start=5)  # the token after the first occurrence
    cache = both.lens.run_with_cache(torch.tensor([ids]))[1]
    pattern = get_induction_head_detection_pattern(torch.tensor([ids]))
    theirs = [
        [
            compute_head_attention_similarity_score(
                head, pattern, exclude_bos=False, exclude_current_token=False, error_measure="mul"
            )
            for head in cache[f"blocks.{i}.attn.hook_pattern"][0]
        ]
        for i in LAYERS
    ]
    close(ours * 5 / 10, torch.tensor(theirs))  # theirs is the share of all rows
