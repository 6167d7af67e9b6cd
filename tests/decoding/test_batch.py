"""A batch of texts gets the same tokens as each text alone, whichever ends first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch

import llama3_raw
from llama3_raw import REFERENCE, KVCache, Model, UserError, forward, generate
from llama3_raw.backends.cpu import fast_ops
from llama3_raw.decoding import runner
from llama3_raw.decoding.batch import Row, generate_batch, text_of
from llama3_raw.decoding.loop import StopReason, Text, decode
from llama3_raw.decoding.runner import BatchRunner
from llama3_raw.decoding.sampling import Sampling
from llama3_raw.ops import Ops
from tests.references import cast, run

PROMPTS = (
    "Once upon a time",
    "One day, a boy named Tom went to the park with his dog. The dog saw a cat and ran",
    "Lily had a red ball.",
    "The",
    "There was a big bear who lived in a cave. He was very hungry, and it was winter",
    "Tom and Lily",
    "A dog",
)


@pytest.fixture(scope="module")
def prompts(tiny: Model) -> list[list[int]]:
    assert tiny.tokenizer is not None
    return [tiny.tokenizer.encode(text, bos=True) for text in PROMPTS]


def run_batch(model: Model, rows: Sequence[Row], **settings: Any) -> list[tuple[list[int], StopReason]]:
    """Return the tokens of each row, and why it ended."""
    tokens: list[list[int]] = [[] for _ in rows]
    reasons: dict[int, StopReason] = {}
    for number, event in generate_batch(model, rows, **settings):
        assert number not in reasons
        if isinstance(event, StopReason):
            reasons[number] = event
        else:
            tokens[number].append(event)
    return [(new, reasons[number]) for number, new in enumerate(tokens)]


def run_each(model: Model, rows: Sequence[Row], **settings: Any) -> list[tuple[list[int], StopReason]]:
    """Return the same from `generate`, one row after the other."""
    return [
        run(
            generate(
                model, row.ids, max_new_tokens=row.max_new_tokens, **asdict(row.sampling), seed=row.seed, **settings
            )
        )
        for row in rows
    ]


needs_kernels = pytest.mark.usefixtures("cpu_kernels")


@pytest.mark.parametrize("pack", [1, 40, 10_000], ids=["one prompt per pass", "some together", "all together"])
@pytest.mark.parametrize("case", ["fp32", "bf16", "reference"])
def test_a_row_gets_the_same_tokens_as_alone(tiny: Model, prompts: list[list[int]], case: str, pack: int) -> None:
    """Rows of different lengths end at different times: at an end token, max_new_tokens or a full context."""
    model = tiny._replace(weights=cast(tiny.weights, torch.bfloat16 if case == "bf16" else torch.float32))
    ops = REFERENCE if case == "reference" else fast_ops()
    ops = ops._replace(max_packed=min(pack, ops.max_packed) if case == "bf16" else pack)
    rows = [Row(ids, budget) for ids, budget in zip(prompts, (50, 7, 40, 30, 1, 30, 50), strict=True)]
    end = list(generate(model, prompts[0], max_new_tokens=16, ops=ops))[-1]
    settings: dict[str, Any] = {"context": 45, "stop_ids": {end}, "ops": ops}
    together = run_batch(model, rows, **settings)
    assert together == run_each(model, rows, **settings)
    assert {reason for _, reason in together} == set(StopReason) - {StopReason.NOT_NUMBERS}


@pytest.mark.slow
def test_sampled_tokens_are_the_same_as_alone(tiny: Model, prompts: list[list[int]]) -> None:
    """Each row has its own settings, history and random numbers, whichever other rows end."""
    model = tiny._replace(weights=cast(tiny.weights, torch.float32))
    settings = (
        Sampling(temperature=1.0),
        Sampling(),
        Sampling(temperature=0.7, top_k=20, top_p=0.9),
        Sampling(repetition_penalty=1.3),
        Sampling(temperature=1.0),
        Sampling(temperature=1.3, min_p=0.05, repetition_penalty=1.1),
        Sampling(temperature=0.9),
    )
    budgets = (30, 12, 60, 60, 5, 44, 60)
    rows = [
        Row(ids, budget, sampling, seed=seed)
        for seed, (ids, budget, sampling) in enumerate(zip(prompts, budgets, settings, strict=True))
    ]
    assert run_batch(model, rows) == run_each(model, rows)


@pytest.mark.parametrize("ops", [REFERENCE, fast_ops()], ids=["reference", "fast"])
@pytest.mark.parametrize("place", ["prompt", "answer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_that_is_not_numbers_ends_alone(
    tiny: Model, prompts: list[list[int]], ops: Ops, place: str, dtype: torch.dtype
) -> None:
    """One row of the embeddings is NaN. It is in one prompt, shorter than the others, or in one text after a while."""
    model = tiny._replace(weights=cast(tiny.weights, dtype))
    some = ([1, 0], *prompts[:4])  # a long prompt, whose padding is in other rows, and at last a short one
    rows = [Row(ids, budget) for ids, budget in zip(some, (9, 5, 30, 20, 40), strict=True)]
    expected = run_batch(model, rows, stop_ids=(), ops=ops)
    harmed, token = 0, 0
    if place == "answer":
        texts = [[*row.ids, *new] for row, (new, _) in zip(rows, expected, strict=True)]
        harmed, token = next(
            (number, token)
            for number, (new, _) in enumerate(expected)
            for token in new[2:-1]
            if [number] == [other for other, text in enumerate(texts) if token in text] and token not in new[:2]
        )
    embeddings = model.weights.tok_embeddings.clone()
    embeddings[token] = torch.nan
    damaged = model._replace(weights=model.weights._replace(tok_embeddings=embeddings))
    new = expected[harmed][0]
    expected[harmed] = ([] if place == "prompt" else new[: new.index(token) + 1], StopReason.NOT_NUMBERS)
    assert run_batch(damaged, rows, stop_ids=(), ops=ops) == expected


def test_a_prompt_in_several_chunks(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiny.tokenizer is not None
    ids = tiny.tokenizer.encode("Once upon a time, there was a little girl named Lily. " * 4, bos=True)
    rows = [Row(ids, 10), Row(ids[:3], 10), Row(ids[:-2], 10)]
    expected = run_each(tiny, rows)
    ops = fast_ops()._replace(prefill_chunk=16, max_packed=8)
    starts = []

    def spy(*arguments: Any, start: Any = 0, **others: Any) -> torch.Tensor:
        starts.append(start)
        return forward(*arguments, start=start, **others)

    monkeypatch.setattr(runner, "forward", spy)
    assert [new for new, _ in run_batch(tiny, rows, ops=ops)] == [new for new, _ in expected]
    assert [start for start in starts if isinstance(start, int)].count(16) == 2


def test_ended_rows_cost_nothing(tiny: Model, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that has ended is not computed any more, and the cache is only as long as the longest row."""
    passes, sizes = [], []

    def spy(weights: Any, params: Any, tokens: torch.Tensor, **others: Any) -> torch.Tensor:
        passes.append((list(tokens.shape), others["cache"].max_seq_len))
        sizes.append(others["cache"].keys[0]._base.shape)
        return forward(weights, params, tokens, **others)

    monkeypatch.setattr(runner, "forward", spy)
    rows = [Row(ids, budget) for ids, budget in zip(([5] * 4, [6] * 6, [7] * 5), (1, 3, 2), strict=True)]
    run_batch(tiny, rows, stop_ids=(), ops=fast_ops()._replace(max_packed=128))
    assert passes == [([3, 6], 6), ([2, 1], 7), ([1, 1], 8)]
    assert {tuple(size[:2]) for size in sizes} == {(3, 8)}


def test_what_prompts_begin_with_is_computed_once(
    tiny: Model, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []

    def counted(weights: object, params: object, tokens: torch.Tensor, **settings: object) -> torch.Tensor:
        passes.append(tokens.numel())
        return forward(weights, params, tokens, **settings)  # type: ignore[arg-type]

    model = tiny._replace(weights=cast(tiny.weights, torch.float32))
    rows = [Row([*prompts[1], *prompt], 9) for prompt in ([], prompts[0], prompts[1])]
    expected = run_batch(model, rows)
    monkeypatch.setattr(runner, "forward", counted)
    assert run_batch(model, [*rows, Row(rows[0].ids, 0)], shares_beginning=True)[:3] == expected
    assert passes[0] == len(prompts[1]) - 1  # the first prompt has a last token of its own


def test_is_over_ends_a_row(tiny: Model, prompts: list[list[int]]) -> None:
    rows = [Row(prompts[0], 20, is_over=lambda new: len(new) == 3), Row(prompts[2], 6)]
    (first, reason), (second, _) = run_batch(tiny, rows)
    assert (len(first), reason) == (3, StopReason.END_TOKEN)
    assert second == run_each(tiny, rows)[1][0]


def test_nothing_to_compute(tiny: Model) -> None:
    rows = [Row([1, 2], 0), Row([1, 2, 3], 5)]
    assert run_batch(tiny, rows, context=3) == [([], StopReason.MAX_NEW_TOKENS), ([], StopReason.CONTEXT)]


def test_errors_are_raised_at_the_call(tiny: Model) -> None:
    for ids, message in (([], "prompt is empty"), ([5000], "token id 5000 is outside"), ([1] * 9, "needs 9 positions")):
        with pytest.raises(UserError, match=message):
            generate_batch(tiny, [Row([1], 1), Row(ids, 1)], context=8)


def test_damaged_weights_are_reported(tiny: Model) -> None:
    damaged = tiny._replace(weights=tiny.weights._replace(norm=torch.full_like(tiny.weights.norm, torch.nan)))
    assert run_batch(damaged, [Row([1], 1), Row([2], 1)]) == [([], StopReason.NOT_NUMBERS)] * 2


@needs_kernels
@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("kind", ["int", "tensor"])
def test_attention_of_a_row_has_the_same_bits_as_alone(n_tokens: int, kind: str) -> None:
    """Cached values after a row's own past have no effect."""
    ops = fast_ops()
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, n_tokens, 8, 64, generator=generator).bfloat16()
    cache = torch.randn(2, 4, 700, 2, 64, generator=generator).bfloat16()
    keys, values = cache[:, :3, :650]  # views of a cache with a fourth row, and more positions in each
    starts = [40, 40, 40] if kind == "int" else [0, 600, 37]
    together = ops.attend(q, keys, values, 40 if kind == "int" else torch.tensor(starts), llama3_raw.ops.no_tap)
    for row, start in enumerate(starts):
        past = slice(start + n_tokens)
        alone = ops.attend(q[row], keys[row, past].clone(), values[row, past].clone(), start, llama3_raw.ops.no_tap)
        assert torch.equal(together[row], alone)


@needs_kernels
def test_a_pass_over_a_batch_has_the_same_bits_as_its_rows_alone(tiny: Model) -> None:
    ops = fast_ops()
    starts, new = [3, 9, 0], torch.tensor([[5], [6], [7]])
    cache = KVCache.allocate(tiny.params, max_seq_len=12, like=tiny.weights, batch=(3,))
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    copies = [KVCache(*(tuple(x[row].clone() for x in tensors) for tensors in cache)) for row in range(3)]
    with torch.no_grad():
        together = forward(tiny.weights, tiny.params, new, cache=cache, start=torch.tensor(starts), ops=ops)
        for row, (start, copy) in enumerate(zip(starts, copies, strict=True)):
            alone = forward(tiny.weights, tiny.params, new[row], cache=copy, start=start, ops=ops)
            assert torch.equal(together[row], alone)


def run_arriving(
    model: Model, rows: Sequence[Row], times: Sequence[int], n_rows: int, ops: Ops
) -> list[tuple[list[int], StopReason]]:
    """Decode rows, each of which arrives before the pass of its time, or when a row of the cache is free."""
    cache = KVCache.allocate(model.params, max_seq_len=64, like=model.weights, batch=(n_rows,))
    texts = [text_of(model, number, row, 64, ()) for number, row in enumerate(rows)]
    waiting = sorted(texts, key=lambda text: times[text.number])
    passes = itertools.count()

    def arrivals(running: int) -> list[Text]:
        now = next(passes) if running else times[waiting[0].number] if waiting else 0
        joining: list[Text] = []
        while waiting and times[waiting[0].number] <= now and running + len(joining) < n_rows:
            joining.append(waiting.pop(0))
        return joining

    tokens: list[list[int]] = [[] for _ in rows]
    reasons = {}
    for number, event in decode([], BatchRunner(model, cache, ops), arrivals):
        if isinstance(event, StopReason):
            reasons[number] = event
        else:
            tokens[number].append(event)
    return [(new, reasons[number]) for number, new in enumerate(tokens)]


@needs_kernels
def test_a_text_that_arrives_later_has_the_same_bits_as_alone(tiny: Model, prompts: list[list[int]]) -> None:
    """Texts join running ones, and take rows that others left. One has its prompt computed alone, for its tap."""
    model = tiny._replace(weights=cast(tiny.weights, torch.bfloat16))
    seen: list[list[torch.Tensor]] = [[] for _ in prompts]
    tapped: list[str] = []
    rows = [
        Row(ids, budget, stop_ids=(), on_logits=lambda row, token, kept=logits: kept.append(row))  # type: ignore[misc]
        for ids, budget, logits in zip(prompts, (20, 7, 12, 9, 1, 16, 11), seen, strict=True)
    ]
    rows[3] = rows[3]._replace(tap=lambda name, tensor: (tapped.append(name), tensor)[1])
    together = run_arriving(model, rows, (0, 0, 3, 3, 5, 30, 60), n_rows=3, ops=fast_ops())
    assert "norm" in tapped
    for row, (new, reason), logits in zip(rows, together, seen, strict=True):
        alone: list[torch.Tensor] = []

        def keep(name: str, tensor: torch.Tensor, alone: list[torch.Tensor] = alone) -> torch.Tensor:
            if name == "logits":
                alone.append(tensor)
            return tensor

        single = generate(model, row.ids, max_new_tokens=row.max_new_tokens, stop_ids=(), ops=fast_ops(), tap=keep)
        assert (new, reason) == run(single)
        assert len(logits) == len(alone)
        assert all(torch.equal(one, other.view(-1)) for one, other in zip(logits, alone, strict=True))


def test_a_text_takes_the_row_of_one_that_was_not_numbers(tiny: Model, prompts: list[list[int]]) -> None:
    """NaN in the cache after a text would reach the next text in its row, as 0 * NaN is NaN."""
    damaged = tiny.weights.tok_embeddings.float()
    token = max(set(range(1000)) - {token for ids in prompts for token in ids})
    damaged[token] = torch.nan
    model = tiny._replace(weights=cast(tiny.weights, torch.float32)._replace(tok_embeddings=damaged))
    rows = [Row([*prompts[0], token], 5), Row(prompts[3], 8, stop_ids=()), Row(prompts[6], 9, stop_ids=())]
    together = run_arriving(model, rows, (0, 1, 1), n_rows=2, ops=REFERENCE)  # reads the whole row, and masks it
    assert together[0] == ([], StopReason.NOT_NUMBERS)
    assert [new for new, _ in together[1:]] == [new for new, _ in run_each(model, rows[1:], stop_ids=(), ops=REFERENCE)]
