"""A patch limited to positions of the text, in one pass, with a cache, in a batch and with proposed tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llama3_raw
from llama3_raw import REFERENCE, KVCache, Model, Row, UserError, chain, forward, generate, generate_batch, patch, trace
from llama3_raw.decoding.prompt_lookup import LookupPolicy
from llama3_raw.ops import Tap
from tests.references import cast

NAME = "layers.2.residual"


@pytest.fixture(scope="module")
def fp32(tiny: Model) -> Model:
    return tiny._replace(weights=cast(tiny.weights, torch.float32))


@pytest.fixture(scope="module")
def ids(tiny: Model) -> list[int]:
    assert tiny.tokenizer is not None
    return tiny.tokenizer.encode("Once upon a time, there was a little", bos=True)


def by_hand(positions: range, change: Tensor) -> Tap:
    """A tap that adds to a residual at some positions of a pass over a whole text."""

    def tap(name: str, tensor: Tensor) -> Tensor:
        if name != NAME:
            return tensor
        changed = tensor.clone()
        changed[..., positions.start : positions.stop, :] += change
        return changed

    return tap


@pytest.fixture(scope="module")
def change() -> Tensor:
    return torch.randn(192, generator=torch.Generator().manual_seed(0))


def test_a_function_changes_these_positions_only(fp32: Model, ids: list[int], change: Tensor) -> None:
    expected = trace(fp32, ids, NAME, "logits", tap=by_hand(range(3, 6), change), ops=REFERENCE)
    tap = patch({NAME: lambda x: x + change}, positions=range(3, 6))
    assert trace(fp32, ids, NAME, "logits", tap=tap, ops=REFERENCE) == expected
    for positions in ([3, 4, 5], (5, 4, 3), torch.tensor([3, 4, 5])):
        tap = patch({NAME: lambda x, name: x + change}, positions=positions)
        assert trace(fp32, ids, NAME, "logits", tap=tap, ops=REFERENCE) == expected
    for name, dimension in (
        ("attention.q", 0),
        ("attention.probs", 1),
        ("attention.scores", 1),
        ("attention.heads", 0),
    ):
        name = f"layers.0.{name}"
        kept = trace(fp32, ids, name, tap=patch({name: torch.zeros_like}, positions=4), ops=REFERENCE)[name]
        plain = trace(fp32, ids, name, ops=REFERENCE)[name]
        assert kept.select(dimension, 4).abs().max() == 0
        rest = [i for i in range(len(ids)) if i != 4]
        assert torch.equal(
            kept.index_select(dimension, torch.tensor(rest)), plain.index_select(dimension, torch.tensor(rest))
        )


@pytest.mark.parametrize("name", [NAME, "layers.1.attention.heads", "layers.1.attention.probs", "logits"])
def test_a_tensor_has_rows_for_the_positions_or_for_the_text_or_one(fp32: Model, ids: list[int], name: str) -> None:
    positions = [7, 2, 3]
    at = {"layers.1.attention.heads": -3}.get(name, -2)
    plain = trace(fp32, ids, name, ops=REFERENCE)[name]
    source = torch.rand_like(plain)
    index = torch.tensor(positions)
    expected = plain.clone().index_copy(at, index, source.index_select(at, index))
    for given in (source, source.index_select(at, index)):
        patched = trace(fp32, ids, name, tap=patch({name: given}, positions=positions), ops=REFERENCE)[name]
        assert torch.equal(patched, expected)
    if name.endswith("probs"):
        return  # one row has a dimension of heads too
    row = source.select(at, 0)
    expected = plain.clone().index_copy(at, index, row.unsqueeze(at).expand_as(source.index_select(at, index)))
    for given in (row, row.unsqueeze(at)):
        patched = trace(fp32, ids, name, tap=patch({name: given}, positions=positions), ops=REFERENCE)[name]
        assert torch.equal(patched, expected)


def test_a_function_may_change_the_tensor_in_place(fp32: Model, ids: list[int], change: Tensor) -> None:
    """As other libraries' hooks do: other positions keep their values, and so does the tensor of a patch before."""

    def add(x: Tensor) -> Tensor:
        x += change
        return x

    expected = trace(fp32, ids, "logits", tap=patch({NAME: lambda x: x + change}, positions=[3]), ops=REFERENCE)
    assert trace(fp32, ids, "logits", tap=patch({NAME: add}, positions=[3]), ops=REFERENCE) == expected
    source = trace(fp32, ids, NAME, ops=REFERENCE)[NAME]
    before = source.clone()
    trace(fp32, ids, "logits", tap=chain(patch({NAME: source}), patch({NAME: add})))
    assert torch.equal(source, before)


def test_in_a_batch_of_unequal_prompts(fp32: Model, ids: list[int], change: Tensor) -> None:
    prompts = [ids, ids[:4], ids[:7]]
    tap = patch({NAME: lambda x: x + change}, positions=range(3, 6))
    kept = trace(fp32, prompts, NAME, tap=tap, ops=REFERENCE)[NAME]
    expected = trace(fp32, prompts, NAME, tap=by_hand(range(3, 6), change), ops=REFERENCE)[NAME]
    assert torch.equal(kept, expected)
    given = trace(fp32, prompts, NAME, ops=REFERENCE)[NAME] + change  # a row for each text
    assert torch.equal(
        trace(fp32, prompts, NAME, tap=patch({NAME: given}, positions=[3, 4, 5]), ops=REFERENCE)[NAME], kept
    )


@pytest.mark.parametrize(
    ("name", "at", "batch"),
    [
        (NAME, -2, True),
        ("layers.1.attention.heads", -3, True),
        ("layers.1.attention.probs", -2, True),
        ("layers.1.attention.probs", -2, False),
        ("logits", -2, True),
    ],
)
def test_one_row_may_lack_the_dimension_of_tokens(fp32: Model, ids: list[int], name: str, at: int, batch: bool) -> None:
    """Of a row for each prompt, too, though position 2 is one of 4 tokens that the rows of 4 prompts could be."""
    tokens = torch.tensor([ids, ids[::-1], ids, ids[::-1]] if batch else ids)
    source = torch.rand_like(trace(fp32, tokens, name, ops=REFERENCE)[name])
    row = source.select(at, 0)
    expected = trace(fp32, tokens, name, tap=patch({name: row.unsqueeze(at)}, positions=[2]), ops=REFERENCE)
    assert trace(fp32, tokens, name, tap=patch({name: row}, positions=[2]), ops=REFERENCE) == expected
    if batch:  # one row for all prompts
        one = trace(fp32, tokens, name, tap=patch({name: row[0].unsqueeze(at)}, positions=[2]), ops=REFERENCE)
        assert trace(fp32, tokens, name, tap=patch({name: row[0]}, positions=[2]), ops=REFERENCE) == one


def test_a_row_of_one_number_for_each_dimension_of_a_head(fp32: Model, ids: list[int]) -> None:
    name = "layers.1.attention.heads"
    kept = trace(fp32, ids, name, tap=patch({name: torch.arange(32.0)}, positions=[2]))[name]
    assert torch.equal(kept[2], torch.arange(32.0).expand(6, 32))


@pytest.mark.parametrize(("n_rows", "positions"), [(3, [2, 4, 5]), (10, [1])])
def test_rows_of_prompts_or_of_tokens_are_refused(
    fp32: Model, ids: list[int], n_rows: int, positions: list[int]
) -> None:
    """As many prompts as positions, or as tokens."""
    tap = patch({NAME: torch.zeros(n_rows, 192)}, positions=positions)
    message = rf"may have {n_rows} rows for tokens, or none: give \[1, {n_rows}, 192\] or \[{n_rows}, 1, 192\]"
    with pytest.raises(UserError, match=message):
        trace(fp32, [ids] * n_rows, NAME, tap=tap)
    for given in (torch.zeros(1, n_rows, 192), torch.zeros(n_rows, 1, 192)):
        kept = trace(fp32, [ids] * n_rows, NAME, tap=patch({NAME: given}, positions=positions))[NAME]
        assert not kept[:, positions].any()


def with_cache(model: Model, ids: list[int], cuts: list[int], tap: Tap) -> Tensor:
    """Return the logits of all positions, computed in several passes."""
    cache = KVCache.allocate(model.params, max_seq_len=len(ids), like=model.weights)
    logits = []
    with torch.no_grad():
        for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
            tokens = torch.tensor(ids[start:end])
            logits.append(forward(model.weights, model.params, tokens, cache=cache, start=start, tap=tap))
    return torch.cat(logits)


@pytest.mark.parametrize("cuts", [[], [4], [1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 7]])
@pytest.mark.parametrize("name", [NAME, "logits", "layers.1.attention.k"])
def test_with_a_cache(fp32: Model, ids: list[int], change: Tensor, cuts: list[int], name: str) -> None:
    tap = patch({name: lambda x: x * 2}, positions=range(4, 8))
    whole = trace(fp32, ids, "logits", tap=tap, ops=REFERENCE)["logits"]
    assert not torch.equal(whole, trace(fp32, ids, "logits", ops=REFERENCE)["logits"])
    assert torch.allclose(with_cache(fp32, ids, cuts, tap), whole, rtol=0, atol=5e-6 * float(whole.abs().max()))


def test_rows_with_starts_of_their_own(fp32: Model, ids: list[int], change: Tensor) -> None:
    """The second row of a batch is two tokens behind the first."""
    tap = patch({NAME: change, "logits": torch.zeros_like}, positions=[5, 6])
    cache = KVCache.allocate(fp32.params, max_seq_len=len(ids), like=fp32.weights, batch=(2,))
    with torch.no_grad():
        forward(fp32.weights, fp32.params, torch.tensor([ids[:5], [*ids[:3], 0, 0]]), cache=cache)
        kept = llama3_raw.Trace(NAME)
        logits = forward(
            fp32.weights,
            fp32.params,
            torch.tensor([ids[5:8], ids[3:6]]),
            cache=cache,
            start=torch.tensor([5, 3]),
            tap=chain(tap, kept),
        )
    rows = torch.tensor([[True, True, False], [False, False, True]])  # positions 5 6 7, 3 4 5
    assert torch.equal((kept[NAME] == change).all(dim=-1), rows)
    assert torch.equal((logits == 0).all(dim=-1), rows)


def steer(model: Model, token: int) -> Tensor:
    """A residual after the last layer that makes a token the most likely one."""
    weights = model.weights
    assert isinstance(weights.output, Tensor)
    return 50 * weights.output[token] / weights.norm


LAST = "layers.3.residual"


def places_of(tokens: list[int], wanted: int) -> list[int]:
    return [place for place, token in enumerate(tokens) if token == wanted]


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_in_generate(fp32: Model, ids: list[int], chunk: int) -> None:
    """At two positions the residual is set so that a token follows which would not: the text shows where."""
    token = fp32.tokenizer.encode("zz")[0]
    positions = [len(ids) + 1, len(ids) + 4]
    tap = patch({LAST: steer(fp32, token)}, positions=positions)
    ops = REFERENCE._replace(prefill_chunk=chunk)
    tokens = list(generate(fp32, ids, max_new_tokens=9, tap=tap, ops=ops, stop_ids=()))
    # the new token after position p is number p + 1 - len(ids)
    assert places_of(tokens, token) == [2, 5]
    logits = torch.zeros(fp32.params.vocab_size).index_fill(0, torch.tensor([token]), 9.0)
    forced = patch({"logits": logits}, positions=[len(ids) - 1, len(ids) + 2])
    assert places_of(list(generate(fp32, ids, max_new_tokens=5, tap=forced, ops=ops, stop_ids=())), token) == [0, 3]
    in_prompt = patch({LAST: steer(fp32, token)}, positions=len(ids) - 1)
    assert places_of(list(generate(fp32, ids, max_new_tokens=5, tap=in_prompt, ops=ops)), token) == [0]


class EagerPolicy(LookupPolicy):
    """Proposes four tokens after any match, whatever a pass costs."""

    def how_many(self, match: int, limit: int) -> int:
        return min(limit, 4) if match and self.passes else 0


def test_with_proposed_tokens(fp32: Model, ids: list[int]) -> None:
    token = fp32.tokenizer.encode("zz")[0]
    story = list(generate(fp32, ids, max_new_tokens=40, stop_ids=()))
    prompt = [*ids, *story[:8], 44, *story[9:], *ids]  # quoted by the model, but for a token
    tap = patch({LAST: steer(fp32, token)}, positions=[len(prompt) + 2, len(prompt) + 3, len(prompt) + 9])
    settings: dict[str, Any] = {"max_new_tokens": 20, "tap": tap, "stop_ids": ()}
    expected = list(generate(fp32, prompt, **settings))
    assert places_of(expected, token) == [3, 4, 10]
    policy = EagerPolicy(8)
    assert list(generate(fp32, prompt, lookup=policy, **settings)) == expected
    assert policy.proposed > 4
    assert 0 < policy.accepted < policy.proposed


@pytest.mark.parametrize("together", [1, 10_000])
def test_in_generate_batch(fp32: Model, ids: list[int], together: int) -> None:
    """Rows of unequal length: one position is in the prompt of one text and among the new tokens of another."""
    token = fp32.tokenizer.encode("zz")[0]
    prompts = [ids[:3], ids, ids[:6]]
    logits = torch.zeros(fp32.params.vocab_size).index_fill(0, torch.tensor([token]), 9.0)
    for tap in (
        patch({LAST: steer(fp32, token)}, positions=[7, 11]),
        patch({"logits": logits}, positions=[7, 11]),
    ):
        check_batch(fp32, prompts, tap, token, together)


def check_batch(fp32: Model, prompts: list[list[int]], tap: Tap, token: int, together: int) -> None:
    ops = REFERENCE._replace(max_packed=together)
    rows = [Row(prompt, budget) for prompt, budget in zip(prompts, (12, 3, 9), strict=True)]
    new: list[list[int]] = [[], [], []]
    for number, event in generate_batch(fp32, rows, tap=tap, ops=ops, stop_ids=()):
        if isinstance(event, int):
            new[number].append(event)
    expected = [
        list(generate(fp32, row.ids, max_new_tokens=row.max_new_tokens, tap=tap, ops=ops, stop_ids=())) for row in rows
    ]
    assert new == expected
    assert [places_of(tokens, token) for tokens in new] == [[5, 9], [2], [2, 6]]


@pytest.mark.parametrize("positions", [[-1], [], 1.5, [1.5], "ab", [[1, 2]], None.__class__])
def test_wrong_positions_are_refused(positions: Any) -> None:
    with pytest.raises(UserError, match="positions should be tokens of the text, counted from 0, such as"):
        patch({NAME: torch.clone}, positions=positions)


def test_what_does_not_fit_is_refused(fp32: Model, ids: list[int], change: Tensor) -> None:
    for given, complaint in (
        (
            torch.zeros(2, 192),
            r"has 2 rows: give one for each of the 3 positions, or one for each token up to position 4",
        ),
        (
            torch.zeros(3, 191),
            r"the patch of layers.2.residual should return a tensor \[10, 192\] .* returns \[10, 191\]",
        ),
        (change.double(), r"returns \[10, 192\] in float64"),
        (lambda x: x[2:5], r"returns \[3, 192\]"),
        (lambda x: None, r"returns NoneType"),
    ):
        replacement: Any = given
        with pytest.raises(UserError, match=complaint):
            trace(fp32, ids, tap=patch({NAME: replacement}, positions=[2, 3, 4]))
    with pytest.raises(UserError, match="positions 10: the text has only 10 tokens"):
        trace(fp32, ids, tap=patch({NAME: change}, positions=[2, 10]))
    with pytest.raises(UserError, match="positions 10: the text has only 10 tokens"):
        forward(fp32.weights, fp32.params, torch.tensor(ids), tap=patch({NAME: change}, positions=[2, 10]))


def test_from_a_layer_on(fp32: Model, ids: list[int], change: Tensor) -> None:
    tap = patch({NAME: change}, positions=[4])
    whole = trace(fp32, ids, "layers.1.residual", "logits", tap=tap, ops=REFERENCE)
    residual = whole["layers.1.residual"]
    part = trace(fp32, ids, "logits", start_at="layers.2", residual=residual, tap=tap, ops=REFERENCE)
    assert torch.equal(part["logits"], whole["logits"])
