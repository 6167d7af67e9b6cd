"""Gradients by name, beside finite differences and autograd by hand; estimates of sweeps, beside the sweeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llama3_raw import (
    REFERENCE,
    Model,
    Trace,
    UserError,
    estimate_sweep,
    forward,
    pad,
    patch,
    sweep,
    trace,
    trace_gradients,
)
from tests.references import cast, quantized_weights
from tests.tracing.small import ANSWER, CLEAN, IDS, OTHER, close, metric, small_model


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model()


@pytest.fixture(scope="module")
def clean(model: Model) -> Trace:
    return trace(model, CLEAN)


def of(logits: Tensor) -> Tensor:
    return logits[..., -1, ANSWER].sum() - logits[..., -1, OTHER].sum()


def test_the_tensors_are_those_of_a_trace(model: Model) -> None:
    tensors, gradients = trace_gradients(model, IDS, of)
    kept = trace(model, IDS)
    assert list(tensors) == list(gradients) == list(kept)
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)
    assert all(gradients[name].shape == kept[name].shape and not gradients[name].requires_grad for name in kept)
    assert tensors.origin == kept.origin
    assert not any(weight.requires_grad for layer in model.weights.layers for weight in layer)


@pytest.mark.parametrize(
    "name",
    [
        "tok_embeddings",
        "layers.0.attention.q",
        "layers.1.attention.k_rope",
        "layers.1.attention.probs",
        "layers.2.feed_forward.gate",
        "layers.1.residual",
        "norm",
        "logits",
    ],
)
def test_a_small_step_changes_the_scalar_by_the_gradient(model: Model, name: str) -> None:
    model = model._replace(weights=cast(model.weights, torch.float64))
    _, gradients = trace_gradients(model, IDS, of, name)
    step = torch.randn(gradients[name].shape, generator=torch.Generator().manual_seed(2)).double() * 1e-5
    there, back = (
        of(trace(model, IDS, "logits", ops=REFERENCE, tap=patch({name: move}))["logits"])
        for move in (lambda x: x + step, lambda x: x - step)
    )
    expected = float(there - back) / 2
    assert abs(expected) > 1e-7
    assert float((gradients[name] * step).sum()) == pytest.approx(expected, rel=1e-5)


def test_a_batch_has_the_gradients_of_each_prompt(model: Model) -> None:
    _, gradients = trace_gradients(model, torch.tensor([IDS, CLEAN]), of, "layers.*.attention.scores", "layers.1.*")
    for row, prompt in enumerate((IDS, CLEAN)):
        _, one = trace_gradients(model, prompt, of, *gradients)
        for name in one:
            assert one[name].abs().max() > 0
            torch.testing.assert_close(
                gradients[name][row], one[name], rtol=0, atol=1e-5 * float(one[name].abs().max())
            )


def test_prompts_of_unequal_length(model: Model) -> None:
    """`of` picks the last position of each; the padding has no gradient."""
    last = torch.tensor([3, len(IDS)]) - 1
    _, gradients = trace_gradients(
        model, [CLEAN[:3], IDS], lambda logits: logits[torch.arange(2), last, ANSWER].sum(), "layers.1.residual"
    )
    for row, prompt in enumerate((CLEAN[:3], IDS)):
        _, one = trace_gradients(model, prompt, lambda logits: logits[-1, ANSWER], "layers.1.residual")
        close(gradients["layers.1.residual"][row, : len(prompt)], one["layers.1.residual"])
    assert not gradients["layers.1.residual"][0, 3:].any()
    assert gradients.lengths is not None
    assert gradients.lengths.tolist() == [3, len(IDS)]


def test_in_bf16_and_int8(model: Model) -> None:
    names = ("layers.*.residual", "layers.1.attention.heads")
    _, exact = trace_gradients(model, IDS, of, *names)
    _, rounded = trace_gradients(small_model(torch.bfloat16), IDS, of, *names)
    int8 = model._replace(weights=quantized_weights(model.weights, "int8"))
    _, quantized = trace_gradients(int8, IDS, of, *names)
    for name in exact:
        assert rounded[name].dtype == torch.bfloat16
        close(rounded[name].float(), exact[name], tolerance=0.1)
        close(quantized[name], exact[name], tolerance=0.05)


def test_a_patch_shows_in_the_gradients(model: Model, clean: Trace) -> None:
    """The gradients are those of the patched pass; what comes before a patch with constants has none."""
    replaced = clean["layers.1.residual"]
    tensors, gradients = trace_gradients(
        model, IDS, of, "layers.[012].residual", tap=patch({"layers.1.residual": lambda _: replaced})
    )
    assert torch.equal(tensors["layers.1.residual"], replaced)
    assert not gradients["layers.0.residual"].any()
    _, expected = trace_gradients(model, CLEAN, of, "layers.2.residual")
    close(gradients["layers.2.residual"][-1], expected["layers.2.residual"][-1])


def test_gradients_in_a_no_grad_block_and_of_trained_weights(model: Model) -> None:
    _, expected = trace_gradients(model, IDS, of, "layers.1.residual")
    with torch.no_grad():
        _, gradients = trace_gradients(model, IDS, of, "layers.1.residual")
    assert torch.equal(gradients["layers.1.residual"], expected["layers.1.residual"])
    trained = model._replace(weights=model.weights._replace(norm=model.weights.norm.clone().requires_grad_()))
    _, gradients = trace_gradients(trained, IDS, of, "layers.1.residual")
    assert torch.equal(gradients["layers.1.residual"], expected["layers.1.residual"])
    assert trained.weights.norm.grad is None


def test_padded_prompts_are_those_of_a_list(model: Model) -> None:
    tokens, lengths = pad([CLEAN[:3], IDS])

    def last(logits: Tensor) -> Tensor:
        return logits[torch.arange(2), lengths - 1, ANSWER].sum()

    found = trace_gradients(model, tokens, last, "layers.1.residual", lengths=lengths)
    expected = trace_gradients(model, [CLEAN[:3], IDS], last, "layers.1.residual")
    assert found == expected
    assert found[1].origin == expected[1].origin
    assert str(found[1].lengths) == str(lengths)
    with pytest.raises(UserError, match=r"lengths should be one length for each row"):
        trace_gradients(model, IDS, of, lengths=lengths)


@pytest.mark.parametrize("steps", [None, 2])
def test_in_inference_mode(model: Model, clean: Trace, steps: int | None) -> None:
    expected = trace_gradients(model, IDS, of, "layers.1.residual")
    estimates = estimate_sweep(model, IDS, clean, "layers.1.residual", metric, steps=steps)
    with torch.inference_mode():
        assert trace_gradients(model, IDS, of, "layers.1.residual") == expected
        source = trace(model, CLEAN)
        assert torch.equal(estimate_sweep(model, IDS, source, "layers.1.residual", metric, steps=steps), estimates)
        made_there = model._replace(weights=cast(model.weights, torch.float64))
    for gradients in (
        lambda: trace_gradients(made_there, IDS, of),
        lambda: estimate_sweep(made_there, IDS, clean, "norm", metric),
    ):
        with pytest.raises(UserError, match=r"the model was made in torch\.inference_mode\(\), .*; load it outside"):
            gradients()


def test_wrong_scalars_names_and_prompts_are_refused(model: Model) -> None:
    wrong: list[Any] = [lambda x: x[-1], lambda x: 1.0, lambda x: x.detach().sum()]
    for function, got in zip(wrong, (r"\[100\]", "float", r"\[\]"), strict=True):
        with pytest.raises(UserError, match=rf"of should return a scalar that .* from the logits, returns {got}"):
            trace_gradients(model, IDS, function)
    with pytest.raises(UserError, match="nearest"):
        trace_gradients(model, IDS, of, "layers.3.residual")
    for ids in ([], [100], [[1, 2], [3, 100]], "Once"):
        with pytest.raises(UserError):
            trace_gradients(model, ids, of)  # type: ignore[arg-type]


def test_attribution_patching_is_exact_where_the_rest_is_linear(model: Model, clean: Trace) -> None:
    names = ["norm", "logits"]
    close(estimate_sweep(model, IDS, clean, names, metric), sweep(model, IDS, clean, names, metric))


@pytest.mark.parametrize(("names", "by"), [("layers.*.attention.heads", "head"), ("layers.*.residual", "position")])
def test_attribution_patching_is_the_change_times_the_gradient(model: Model, clean: Trace, names: str, by: Any) -> None:
    tensors, gradients = trace_gradients(model, IDS, of, names)
    products = torch.stack([(clean[name] - tensors[name]) * gradients[name] for name in tensors])
    expected = products.sum((1, 3) if by == "head" else 2)
    base = metric(trace(model, IDS, "logits")["logits"][None])
    close(estimate_sweep(model, IDS, clean, names, metric, by=by) - base, expected)


def test_small_changes_are_estimated_well(model: Model, clean: Trace) -> None:
    """Of all kinds of tensors, of scores with their -inf too."""
    names = ["layers.*.attention.q", "layers.*.attention.scores", "layers.*.feed_forward.up"]
    own = trace(model, IDS)
    nearby = {name: own[name] + 0.01 * (clean[name] - own[name]).nan_to_num(0.0) for name in own}
    base = metric(own["logits"][None])
    for pattern in names:
        found = estimate_sweep(model, IDS, nearby, pattern, metric) - base
        close(found, sweep(model, IDS, nearby, pattern, metric) - base, tolerance=0.05)


def test_integrated_gradients_sum_to_the_whole_effect(model: Model, clean: Trace) -> None:
    names = ["tok_embeddings", "layers.0.attention.probs", "layers.1.residual", "layers.2.attention.v"]
    base = metric(trace(model, IDS, "logits")["logits"][None])
    for name in names:
        estimates = estimate_sweep(model, IDS, clean, name, metric, steps=64)
        with torch.no_grad():
            logits = forward(
                model.weights,
                model.params,
                torch.tensor(IDS),
                tap=patch({name: lambda _, name=name: clean[name]}),
            )
        whole = metric(logits[None]) - base
        assert abs(float(whole)) > 0.1
        assert float((estimates - base).sum()) == pytest.approx(float(whole), abs=2e-3)
        one_step = estimate_sweep(model, IDS, clean, name, metric) - base
        assert float(one_step.sum()) != pytest.approx(float(whole), abs=2e-2)


def test_an_estimate_in_float64_is_exact_where_the_rest_is_linear(model: Model) -> None:
    wide = model._replace(weights=cast(model.weights, torch.float64))
    source = trace(wide, CLEAN)
    for steps in (None, 3):
        found = estimate_sweep(wide, IDS, source, "norm", metric, steps=steps)
        torch.testing.assert_close(found, sweep(wide, IDS, source, "norm", metric), rtol=0, atol=1e-13)


@pytest.mark.parametrize("steps", [None, 4])
def test_no_estimate_of_an_infinite_change(model: Model, clean: Trace, steps: int | None) -> None:
    """As where attention is knocked out; scores that are masked in both do not change."""
    name = "layers.1.attention.scores"
    knocked_out = {name: torch.full_like(clean[name], -torch.inf)}
    with pytest.raises(UserError, match=rf"{name} is or becomes infinite or NaN, so there is no estimate; use sweep"):
        estimate_sweep(model, IDS, knocked_out, name, metric, by="head", steps=steps)
    assert estimate_sweep(model, IDS, clean, name, metric, by="head", steps=steps).isfinite().all()


def test_a_wrong_metric_of_an_estimate_is_refused(model: Model, clean: Trace) -> None:
    """One value for all rows would be the sum, or the mean, over the steps."""
    wrong: list[Any] = [lambda x: x[:, -1], lambda x: metric(x).mean(), lambda x: metric(x).sum(), lambda x: 1.0]
    for function in wrong:
        for steps in (None, 4):
            with pytest.raises(UserError, match=r"should be one value a row, \[1\], is"):
                estimate_sweep(model, IDS, clean, "norm", function, steps=steps)
    with pytest.raises(UserError, match=r"should be one value a row, \[4\], is \[1\]"):
        estimate_sweep(model, IDS, clean, "norm", lambda x: metric(x)[:1], steps=4)
    with pytest.raises(UserError, match="metric should return a scalar that is computed from the logits"):
        estimate_sweep(model, IDS, clean, "norm", lambda x: metric(x.detach()))
    few: list[Any] = [0, -1, 2.5]
    for steps in few:
        with pytest.raises(UserError, match=f"steps {steps}: should be a number from 1 on, or None"):
            estimate_sweep(model, IDS, clean, "norm", metric, steps=steps)
