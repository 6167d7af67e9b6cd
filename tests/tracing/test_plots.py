"""The plots: the data that matplotlib was given, compared with the trace."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from llama3_raw import Model, Trace, UserError, forward, trace
from llama3_raw.tracing import plots
from llama3_raw.tracing.plots import read_logit_lens, token_text


@pytest.fixture(scope="module")
def kept(tiny: Model) -> Trace:
    assert tiny.tokenizer is not None
    return trace(tiny, tiny.tokenizer.encode("Tom has $3 and a\nball", bos=True))


def test_attention_plots_the_probabilities_of_the_head(tiny: Model, kept: Trace) -> None:
    figure = plots.attention(kept, 2, 5, tokenizer=tiny.tokenizer)
    axes = figure.axes[0]
    assert torch.equal(torch.tensor(axes.images[0].get_array()), kept["layers.2.attention.probs"][5].float())
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == "<|begin_of_text|>"
    assert "".join(names[1:]) == "Tom␣has␣$3␣and␣a↵ball"
    assert axes.get_title() == "layer 2, head 5"


def test_residual_norms_plots_the_rms_of_each_token(tiny: Model, kept: Trace) -> None:
    lines = plots.residual_norms(kept, tokenizer=tiny.tokenizer).axes[0].lines
    assert len(lines) == len(kept["tok_embeddings"])
    for position in (0, 3):
        expected = [kept["tok_embeddings"][position], *(kept[f"layers.{i}.residual"][position] for i in range(4))]
        drawn = torch.tensor(lines[position].get_ydata())
        assert drawn.tolist() == pytest.approx([float(x.float().pow(2).mean() ** 0.5) for x in expected], rel=1e-5)


def test_the_logit_lens_ends_with_the_models_own_prediction(tiny: Model, kept: Trace) -> None:
    lens = read_logit_lens(kept, tiny, top=3)
    probs = kept["logits"].softmax(-1)
    assert torch.equal(lens.probs[-1], probs.topk(3).values)
    assert torch.equal(lens.ids[-1, :, 0], probs.argmax(-1))
    # after layer 1: as if the model had two layers
    assert kept.origin is not None
    short = tiny.weights._replace(layers=tiny.weights.layers[:2])
    with torch.no_grad():
        logits = forward(short, tiny.params, torch.tensor(kept.origin.ids))
    assert lens.stages[2] == "layers.1.residual"
    assert torch.equal(lens.ids[2, :, 0], logits.argmax(-1))
    assert torch.equal(lens.probs[2], logits.softmax(-1).topk(3).values)
    texts = [text.get_text() for text in plots.logit_lens(kept, tiny).axes[0].texts]
    assert texts == [
        token_text(tiny.tokenizer, token) for token in read_logit_lens(kept, tiny, top=1).ids.flatten().tolist()
    ]


def test_ties_go_to_the_first_token() -> None:
    logits = torch.zeros(3, 5000)
    logits[1, [700, 4000]] = 1
    assert plots.most_likely(logits, 3).tolist() == [[0, 1, 2], [700, 4000, 0], [0, 1, 2]]
    assert plots.most_likely(logits, 1)[:, 0].tolist() == logits.argmax(-1).tolist()


def test_the_other_plots_draw(tiny: Model, kept: Trace, tmp_path: Path) -> None:
    turned = plots.rope_turns(kept, tiny.params, 1, 2)
    points = [at[0] for axes in turned.axes for line in axes.lines if len(at := np.asarray(line.get_xydata())) == 1]
    pair = plots.shown_pairs(tiny.params)[1]
    assert points[2].tolist() == pytest.approx(kept["layers.1.attention.q"][-1, 2, 2 * pair : 2 * pair + 2].tolist())
    assert points[3].tolist() == pytest.approx(
        kept["layers.1.attention.q_rope"][-1, 2, 2 * pair : 2 * pair + 2].tolist()
    )
    for figure in (
        turned,
        plots.rope_wavelengths(tiny.params, 10),
        plots.gates(kept, 3),
        plots.vectors({"$a$": torch.zeros(3), "b": torch.ones(3)}),
        plots.next_tokens(["$", "_"], [0.5, 0.25]),
    ):
        figure.savefig(io.BytesIO(), format="png")


def test_a_notebook_shows_a_figure(kept: Trace) -> None:
    image = plots.attention(kept, 0, 0)._repr_png_()  # type: ignore[attr-defined]
    assert image.startswith(b"\x89PNG")


def test_small_values_are_coloured_too() -> None:
    axes = plots.vectors({"row": torch.tensor([-1.0, -0.1, 0.0, 0.1, 1.0])}).axes[0]
    image = axes.images[0]
    alpha = image.to_rgba(np.asarray(image.get_array()))[0, :, 3]
    assert alpha.tolist() == pytest.approx([1, 0.1, 0, 0.1, 1], abs=0.02)


def test_traces_of_other_shapes_are_refused(tiny: Model, kept: Trace) -> None:
    assert kept.origin is not None
    last = trace(tiny, kept.origin.ids, last_position=True)
    batch = Trace()
    forward(tiny.weights, tiny.params, torch.tensor([kept.origin.ids] * 2), tap=batch)
    for odd in (last, batch):
        for draw in (plots.residual_norms, lambda x: plots.attention(x, 0, 0), lambda x: plots.logit_lens(x, tiny)):
            with pytest.raises(UserError, match="use a trace of one prompt"):
                draw(odd)
    ends = trace(tiny, [kept.origin.ids] * 2, last_position=True)  # looks like two positions, or two heads
    for draw in (plots.residual_norms, lambda x: plots.attention(x, 0, 0), lambda x: plots.logit_lens(x, tiny)):
        with pytest.raises(UserError, match="use a trace of one prompt"):
            draw(ends)
    only = Trace("layers.0.attention.*")  # does not know its tokens
    forward(tiny.weights, tiny.params, torch.tensor(kept.origin.ids[:3]), tap=only)
    labels = plots.attention(only, 0, 0, tokenizer=tiny.tokenizer).axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["0", "1", "2"]


def test_missing_tensors_layers_and_heads_are_named(tiny: Model, kept: Trace) -> None:
    for layer in (9, -1):
        with pytest.raises(UserError, match=f"layer {layer}: the model has layers 0 to 3"):
            plots.attention(kept, layer, 0)
    for head in (6, -1):
        with pytest.raises(UserError, match=f"head {head}: the layer has heads 0 to 5"):
            plots.attention(kept, 0, head)
        with pytest.raises(UserError, match=f"head {head}: the layer has heads 0 to 5"):
            plots.rope_turns(kept, tiny.params, 0, head)
    assert kept.origin is not None
    # the next layer must not take the place of a missing one
    some = trace(tiny, kept.origin.ids, "tok_embeddings", "layers.1.residual", "layers.3.residual")
    for draw in (plots.residual_norms, lambda x: plots.logit_lens(x, tiny)):
        with pytest.raises(UserError, match=r"the trace lacks 'layers\.0\.residual'"):
            draw(some)
        with pytest.raises(UserError, match=r"the trace lacks 'layers\.2\.residual'"):
            draw(trace(tiny, kept.origin.ids, "tok_embeddings", "layers.[01].residual"))
    with pytest.raises(UserError, match="the trace lacks 'tok_embeddings'"):
        plots.residual_norms(trace(tiny, kept.origin.ids, "layers.*.residual"))


def test_the_text_of_a_token_is_printable(tiny: Model) -> None:
    assert tiny.tokenizer is not None
    assert token_text(None, 7) == "7"
    shown = [token_text(tiny.tokenizer, token) for token in range(256)]
    assert shown[ord(" ")] == "␣"
    assert shown[0xF0] == "\\xf0"
    assert shown[0] == "\\x00"
    assert all(text.isprintable() for text in shown)


def test_a_heat_map_has_the_values_names_and_signed_colours() -> None:
    values = torch.tensor([[1.0, -2.0, 0.0], [0.5, torch.nan, 1.5]])
    axes, bar = plots.heat(values, ["layer 0", "$1"], ["a", "b", "c"], title="effect").axes
    image = axes.images[0]
    assert torch.equal(torch.tensor(image.get_array().filled(torch.nan)).nan_to_num(9), values.nan_to_num(9))
    assert image.get_clim() == (-2.0, 2.0)  # 0 has no colour
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer 0", "$1"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert axes.get_title() == "effect"
    assert bar is not axes
    numbered = plots.heat(torch.zeros(2, 3)).axes[0]
    assert [label.get_text() for label in numbered.get_xticklabels()] == ["0", "1", "2"]
    for wrong, names, message in (
        (values[0], ["a"], r"values should be \[rows, columns\], is \[3\]"),
        (values, ["a"], "rows has 1 names for 2"),
    ):
        with pytest.raises(UserError, match=message):
            plots.heat(wrong, names)


def test_the_grid_has_the_probabilities_of_all_heads(kept: Trace) -> None:
    length, n_heads = len(kept["tok_embeddings"]), 6
    picture = torch.tensor(plots.heads(kept).axes[0].images[0].get_array().filled(torch.nan))
    assert picture.shape == (4 * (length + 1), n_heads * (length + 1))
    maps = picture.unflatten(0, (4, -1)).unflatten(2, (n_heads, -1)).transpose(1, 2)  # [layers, heads, T + 1, T + 1]
    assert maps[..., -1].isnan().all()  # the gaps between them
    for layer in range(4):
        assert torch.equal(maps[layer, :, :-1, :-1], kept[f"layers.{layer}.attention.probs"].float())


def test_the_grid_of_a_layer_has_eight_heads_in_a_row(tiny: Model) -> None:
    probs = torch.rand(11, 5, 5)
    kept = Trace("layers.1.attention.probs")
    kept("layers.1.attention.probs", probs)
    axes = plots.heads(kept, 1).axes[0]
    picture = torch.tensor(axes.images[0].get_array().filled(torch.nan))
    assert picture.shape == (2 * 6, 8 * 6)
    assert torch.equal(picture[6:11, 12:17], probs[10])
    assert picture[6:, 18:].isnan().all()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["head 0", "head 8"]
    with pytest.raises(UserError, match=r"the trace lacks 'layers\.0\.attention\.probs'"):
        plots.heads(Trace(), None)
