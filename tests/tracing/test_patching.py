"""Sweeps and path patching, one pass at a time by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llama3_raw import (
    REFERENCE,
    Model,
    Trace,
    UserError,
    ablation,
    chain,
    forward,
    patch,
    path_patch,
    sweep,
    tap_names,
    trace,
)
from llama3_raw.backends.choose import suitable_ops
from llama3_raw.ops import Ops, Tap
from tests.tracing.small import CLEAN, HEADS, IDS, KV_HEADS, LAYERS, close, metric, small_model

LENGTH = len(IDS)


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model()


@pytest.fixture(scope="module")
def clean(model: Model) -> Trace:
    return trace(model, CLEAN)


def replacing(name: str, where: tuple[Any, ...], value: Tensor) -> Tap:
    """A tap that replaces a part of one tensor."""

    def replace(at: str, tensor: Tensor) -> Tensor:
        if at == name:
            tensor = tensor.clone()
            tensor[where] = value[where]
        return tensor

    return replace


def measured(model: Model, tap: Tap, ops: Ops = REFERENCE) -> Tensor:
    """The metric of a pass over IDS."""
    with torch.no_grad():
        return metric(forward(model.weights, model.params, torch.tensor([IDS]), ops=ops, tap=tap))[0]


def by_hand(model: Model, source: Any, names: list[str], wheres: list[tuple[Any, ...]], ops: Ops = REFERENCE) -> Tensor:
    """What a sweep should return: a pass for each name and index, over a prompt without a batch."""
    batch = [(0, *where) for where in wheres]
    values = {name: source[name].unsqueeze(0) for name in names}
    return torch.stack(
        [torch.stack([measured(model, replacing(name, at, values[name]), ops) for at in batch]) for name in names]
    )


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize(
    "names", [["tok_embeddings", "layers.1.feed_forward.hidden", "layers.0.attention.k_rope", "norm"], ["logits"]]
)
def test_by_position(model: Model, clean: Trace, names: list[str], rows: int) -> None:
    found = sweep(model, IDS, clean, names, metric, rows=rows)
    close(found, by_hand(model, clean, names, [(i,) for i in range(LENGTH)]))


@pytest.mark.parametrize("name", ["attention.scores", "attention.probs"])
def test_by_position_of_the_query(model: Model, clean: Trace, name: str) -> None:
    names = [f"layers.{i}.{name}" for i in LAYERS]
    found = sweep(model, torch.tensor(IDS), clean, f"layers.*.{name}", metric)
    close(found, by_hand(model, clean, names, [(slice(None), i) for i in range(LENGTH)]))


@pytest.mark.parametrize("name", ["q", "q_rope", "k", "v", "heads", "scores", "probs"])
def test_by_head(model: Model, clean: Trace, name: str) -> None:
    names = [f"layers.{i}.attention.{name}" for i in (2, 0)]  # in the order that was given
    heads = KV_HEADS if name in ("k", "v") else HEADS
    wheres: list[tuple[Any, ...]] = [(i,) if name in ("scores", "probs") else (slice(None), i) for i in heads]
    close(sweep(model, IDS, clean, names, metric, by="head", rows=3), by_hand(model, clean, names, wheres))


@pytest.mark.parametrize(
    ("name", "by", "where"),
    [
        ("heads", ("position", "head"), lambda i, head: (i, head)),
        ("heads", ["head", "position"], lambda head, i: (i, head)),
        ("k", ("position", "head"), lambda i, head: (i, head)),
        ("probs", ("key",), lambda key: (slice(None), slice(None), key)),
        ("probs", ("head", "position", "key"), lambda *index: index),
    ],
)
def test_by_several_axes(model: Model, clean: Trace, name: str, by: Any, where: Callable[..., tuple[Any, ...]]) -> None:
    names = [f"layers.{i}.attention.{name}" for i in (0, 2)]
    sizes = [len(KV_HEADS if name == "k" else HEADS) if axis == "head" else LENGTH for axis in by]
    found = sweep(model, IDS, clean, names, metric, by=by)
    assert found.shape == (2, *sizes)
    wheres = [where(*index) for index in itertools.product(*map(range, sizes))]
    close(found.flatten(1), by_hand(model, clean, names, wheres))


def test_by_layer(model: Model, clean: Trace) -> None:
    found = sweep(model, IDS, clean, ["layers.*.attention.out", "layers.*.feed_forward.out"], metric, by="layer")
    expected = [by_hand(model, clean, [f"layers.{i}.{part}.out" for i in LAYERS], [()]).T for part in PARTS]
    close(found, torch.cat(expected))
    by: Any
    for by in ("layer", ("layer",), ["layer"]):
        close(sweep(model, IDS, clean, "layers.[12].attention.out", metric, by=by), found[:1, 1:])


PARTS = ("attention", "feed_forward")


def test_all_of_the_stream_gives_the_other_prompt(model: Model, clean: Trace) -> None:
    found = sweep(model, IDS, clean, ["tok_embeddings", "layers.1.residual"], metric)
    assert found.std() > 0
    whole = sweep(model, IDS, clean, "layers.*.residual", metric, by="layer")
    torch.testing.assert_close(whole, metric(clean["logits"][None]).expand(1, len(LAYERS)), rtol=1e-5, atol=0)


def test_a_pass_begins_at_the_first_layer_that_changes(
    model: Model, clean: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []

    def counting(weights: Any, *arguments: Any, **options: Any) -> Tensor:
        computed.append(len(weights.layers))
        return forward(weights, *arguments, **options)

    monkeypatch.setattr("llama3_raw.tracing.patching.forward", counting)
    sweep(model, IDS, clean, ["norm", "layers.*.residual"], metric, rows=LENGTH)
    assert computed == [3, 2, 1, 0]


def test_in_bf16_with_the_fast_operations() -> None:
    """The same as one by one: a slice in fp32 is rounded, and the operations are those of generation."""
    model = small_model(torch.bfloat16)
    clean = trace(model, CLEAN, "layers.*.attention.heads", dtype=torch.float32)
    found = sweep(model, IDS, clean, "layers.*.attention.heads", metric, by="head")
    expected = by_hand(model, clean, list(clean), [(slice(None), i) for i in HEADS], suitable_ops(torch.device("cpu")))
    close(found, expected, tolerance=1e-6)


@pytest.mark.parametrize(
    ("names", "by", "message"),
    [
        ("layers.*.residual", "token", "tuple of these, is 'token'"),
        ([], "position", "names is empty"),
        ("layers.*.residul", "position", r"nearest are layers\.\*\.residual"),
        ("layers.0.residual", "head", r"layers\.0\.residual has no heads"),
        (["layers.0.attention.q", "layers.0.attention.k"], "head", "do not have the same heads"),
        (["layers.[01].ffn_norm", "layers.[12].residual"], "layer", "do not have the same layers"),
        ("norm", "layer", "norm is in no layer"),
        ("layers.*.attention.heads", ("position", "key"), r"layers\.0\.attention\.heads has no keys"),
        ("layers.*.residual", ("position", "layer"), "by should be 'layer', or"),
        ("layers.*.residual", ("position", "position"), "by should be 'layer', or"),
        ("layers.*.residual", [["position"]], "by should be 'layer', or"),
        ("layers.*.residual", [], "by should be 'layer', or"),
        ("layers.*.residual", None, "by should be 'layer', or"),
    ],
)
def test_names_that_cannot_be_swept_are_refused(model: Model, clean: Trace, names: Any, by: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep(model, IDS, clean, names, metric, by=by)


def test_wrong_sources_metrics_and_rows_are_refused(
    model: Model, clean: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"the source lacks 'layers\.1\.residual'"):
        sweep(model, IDS, trace(model, CLEAN, "layers.0.residual"), "layers.*.residual", metric)
    with pytest.raises(UserError, match=r"\[5, 64\], not \[6, 64\]; trace one prompt of as many tokens"):
        sweep(model, IDS, trace(model, CLEAN[1:]), "layers.*.residual", metric)
    wrong: list[Callable[[Tensor], Any]] = [lambda x: x[-1, 3], lambda x: metric(x).mean(), lambda x: 1.0]
    for function in wrong:
        with pytest.raises(UserError, match=r"should be one value a row, \[6\], is"):
            sweep(model, IDS, clean, "norm", function)
    with pytest.raises(UserError, match="rows should be at least 1"):
        sweep(model, IDS, clean, "norm", metric, rows=0)
    monkeypatch.setattr("llama3_raw.tracing.patching.free_memory", lambda device: 10**4)
    with pytest.raises(UserError, match=r"rows: a pass of 6 prompts needs 0\.\d+ GB"):
        sweep(model, IDS, clean, "norm", metric, rows=1000)


SENDERS: list[Any] = [
    ("layers.0.attention.heads", 1),
    "layers.0.feed_forward.out",
    ("layers.1.attention.heads", 3),
    "tok_embeddings",
]
QUERIES = [("layers.2.attention.q", 0), ("layers.2.attention.k", 1)]


@pytest.mark.parametrize("direct", [False, True])
def test_path_patching_is_three_passes(model: Model, clean: Trace, direct: bool) -> None:
    receivers: list[Any] = ["layers.1.attention.v", *QUERIES, QUERIES, "layers.1.ffn_norm", "norm"]
    found = path_patch(model, IDS, clean, SENDERS, receivers, metric, direct=direct, rows=3)
    corrupted = trace(model, IDS)

    def freeze(name: str, tensor: Tensor) -> Tensor:
        frozen = name.endswith("attention.heads") or (direct and name.endswith("feed_forward.out"))
        return corrupted[name] if frozen else tensor

    def one(end: Any, value: Any) -> Tap:
        name, where = (end, ()) if isinstance(end, str) else (end[0], (slice(None), end[1]))
        return replacing(name, (0, *where) if value[name].dim() == batched[name] else where, value[name])

    batched = {name: tensor.dim() + 1 for name, tensor in corrupted.items()}
    for i, sender in enumerate(SENDERS):
        changed = trace(model, IDS, tap=chain(freeze, one(sender, clean)))
        values = {name: tensor.unsqueeze(0) for name, tensor in changed.items()}
        for j, receiver in enumerate(receivers):
            ends = receiver if isinstance(receiver, list) else [receiver]
            expected = measured(model, chain(*(one(end, values) for end in ends)))
            torch.testing.assert_close(found[i, j], expected, rtol=0, atol=1e-5)
    unchanged = measured(model, lambda name, tensor: tensor)
    torch.testing.assert_close(found[2, 0], unchanged, rtol=0, atol=1e-5)  # the receiver comes first
    assert len(set(found[:, 1:].flatten().tolist())) > 15


@pytest.mark.parametrize(
    ("sender", "receiver", "message"),
    [
        ("layers.0.attention.q", "norm", r"'layers\.0\.attention\.q' cannot be a sender; use .*attention\.heads"),
        ("layers.9.attention.heads", "norm", r"'layers\.9\.attention\.heads' cannot be a sender"),
        (("layers.0.attention.heads", 4), "norm", r"layers\.0\.attention\.heads has heads 0 to 3, not 4"),
        (("layers.0.attention.out", 0), "norm", r"layers\.0\.attention\.out has no heads"),
        ("layers.0.attention.out", "logits", "'logits' cannot be a receiver; use .*norm"),
        ("layers.0.attention.out", ("layers.1.attention.k", 2), r"has heads 0 to 1, not 2"),
        ("layers.0.attention.out", [], r"^receivers is empty, or a list in it"),
        (("layers.0.attention.heads", "1"), "norm", r"a sender should be a tap name, or \(name, head\), is \('lay"),
        (("layers.0.attention.heads", 1.0), "norm", r"a sender should be a tap name, or \(name, head\)"),
        (("layers.0.attention.heads", 1, 2), "norm", r"a sender should be a tap name, or \(name, head\)"),
        ((), "norm", r"a sender should be a tap name, or \(name, head\), is \(\)"),
        (3, "norm", r"a sender should be a tap name, or \(name, head\), is 3"),
        ("layers.0.attention.out", (1, "norm"), r"a receiver should be a tap name, or \(name, head\)"),
    ],
)
def test_ends_of_no_path_are_refused(model: Model, clean: Trace, sender: Any, receiver: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        path_patch(model, IDS, clean, [sender], [receiver], metric)


def test_a_path_without_ends_is_refused(model: Model, clean: Trace) -> None:
    with pytest.raises(UserError, match="senders is empty"):
        path_patch(model, IDS, clean, [], ["norm"], metric)
    with pytest.raises(UserError, match="receivers is empty"):
        path_patch(model, IDS, clean, ["tok_embeddings"], [], metric)


def test_ablations(model: Model, clean: Trace) -> None:
    heads, probs = "layers.1.attention.heads", "layers.1.attention.probs"
    zero, mean = ablation(clean, "zero"), ablation(trace(model, CLEAN, heads, "*.residual"), "mean")
    assert list(zero) == list(clean)
    assert all(zero[name].shape == clean[name].shape for name in clean)
    assert not any(zero[name].any() for name in clean if not name.endswith("scores"))
    scores = "layers.1.attention.scores"
    with_zeros = trace(model, CLEAN, probs, tap=patch({scores: zero[scores]}))[probs]  # all keys alike, of the past
    past = torch.ones(LENGTH, LENGTH).tril()
    close(with_zeros, (past / past.sum(-1, keepdim=True)).expand_as(with_zeros))
    close(mean[heads], clean[heads].mean(0, keepdim=True).expand(LENGTH, -1, -1))
    several = Trace(heads, probs, "norm")
    with torch.no_grad():
        forward(model.weights, model.params, torch.tensor([CLEAN, IDS, CLEAN[::-1]]), tap=several)
    padded = ablation(trace(model, [CLEAN[:2], IDS], heads), "mean", length=9)[heads]  # without the padding
    texts = torch.cat([trace(model, CLEAN[:2], heads)[heads], trace(model, IDS, heads)[heads]])
    close(padded, texts.mean(0).expand_as(padded))
    assert len(padded) == 9
    means = ablation({"norm": several["norm"]}, "mean", length=9)
    close(means["norm"], several["norm"].mean((0, 1)).expand(9, -1))
    seen = set()
    for seed in range(9):
        chosen = ablation(several, "resample", generator=torch.Generator().manual_seed(seed))
        (row,) = (row for row in range(3) if torch.equal(chosen[heads], several[heads][row]))
        assert all(torch.equal(chosen[name], several[name][row]) for name in several)
        seen.add(row)
    assert seen == {0, 1, 2}
    close(
        sweep(model, IDS, zero, "layers.*.attention.heads", metric, by="head"),
        by_hand(model, zero, [f"layers.{i}.attention.heads" for i in LAYERS], [(slice(None), i) for i in HEADS]),
    )
    patched = trace(model, IDS, "logits", tap=patch(ablation(trace(model, IDS, heads), "mean")))
    by_layer = sweep(model, IDS, ablation(trace(model, IDS, heads), "mean"), heads, metric, by="layer")
    torch.testing.assert_close(by_layer[0], metric(patched["logits"][None]), rtol=0, atol=1e-5)
    for kept, how, message in (
        (clean, "median", "how should be 'zero', 'mean' or 'resample', is 'median'"),
        (clean, "mean", r"layers\.0\.attention\.scores has no mean over positions"),
        (clean, "resample", "the trace is of one prompt"),
        (trace(model, [CLEAN[:2], IDS]), "resample", "the prompts of the trace have unequal lengths"),
        (trace(model, [CLEAN, IDS], last_position=True), "mean", "the trace is of one position"),
    ):
        with pytest.raises(UserError, match=message):
            ablation(kept, how)  # type: ignore[arg-type]


def test_a_source_of_one_position_is_refused(model: Model) -> None:
    """Of as many prompts as the prompt has tokens, it has the right shape."""
    source = trace(model, [CLEAN] * LENGTH, "norm", last_position=True)
    with pytest.raises(UserError, match="the source is of one position"):
        sweep(model, IDS, source, "norm", metric)


def test_the_length_of_an_ablation(clean: Trace) -> None:
    zeros = ablation(clean, "zero", length=9)
    assert zeros["layers.0.attention.heads"].shape == (9, 4, 16)
    assert zeros["layers.0.attention.probs"].shape == (4, 9, 9)
    for length in (0, -1):
        with pytest.raises(UserError, match=f"length {length}: should be 1 or more"):
            ablation(clean, "zero", length=length)


def test_the_mean_of_float64() -> None:
    tensor = torch.tensor([[1.0], [1.0 + 1e-12]], dtype=torch.float64)
    found = ablation({"norm": tensor}, "mean")["norm"]
    torch.testing.assert_close(found, tensor.mean(0).expand(2, 1), rtol=0, atol=1e-15)


def test_tap_names_are_those_of_a_pass(model: Model, clean: Trace) -> None:
    assert tap_names(model.params) == list(clean)
    assert tap_names(model.params, "layers.[12].residual", "norm") == ["layers.1.residual", "layers.2.residual", "norm"]
    with pytest.raises(UserError, match="nearest"):
        tap_names(model.params, "layers.3.residual")
