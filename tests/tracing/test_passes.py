"""A trace of every pass has what one pass over the whole text has, in generate, in batches and elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llama3_raw import (
    REFERENCE,
    KVCache,
    Model,
    Row,
    Trace,
    UserError,
    chain,
    forward,
    generate,
    generate_batch,
    score,
    trace,
)
from llama3_raw.backends.choose import ops_for
from llama3_raw.perplexity import perplexity
from tests.references import cast
from tests.tracing.test_padding import close
from tests.tracing.test_positions import EagerPolicy

NAMES = ["tok_embeddings", "layers.2.*", "norm"]


@pytest.fixture(scope="module")
def fp32(tiny: Model) -> Model:
    return tiny._replace(weights=cast(tiny.weights, torch.float32))


@pytest.fixture(scope="module")
def ids(tiny: Model) -> list[int]:
    assert tiny.tokenizer is not None
    return tiny.tokenizer.encode("Once upon a time, there was a little", bos=True)


@pytest.fixture(scope="module")
def story(fp32: Model, ids: list[int]) -> list[int]:
    """What the model continues the text with."""
    return list(generate(fp32, ids, max_new_tokens=40, stop_ids=()))


def check(kept: Trace, model: Model, text: list[int], row: int | None = None) -> None:
    """Compare with one pass over the text, which is alone or in a row of a batch."""
    whole = trace(model, text, *NAMES, "logits", ops=REFERENCE)
    assert set(kept) == set(whole)
    for name in set(whole) - {"logits"}:
        tensor = kept[name] if row is None else kept[name][row]
        if row is not None:
            beyond = -torch.inf if name.endswith("scores") else 0
            sizes = [slice(size) for size in whole[name].shape]
            rest = tensor.clone()
            rest[tuple(sizes)] = beyond
            assert (rest == beyond).all(), name
            tensor = tensor[tuple(sizes)]
        assert close(tensor, whole[name]), name


@pytest.mark.parametrize("chunk", [4, 7, 256])
@pytest.mark.parametrize("case", ["plain", "lookup", "ends"])
def test_of_generate(fp32: Model, ids: list[int], story: list[int], chunk: int, case: str) -> None:
    kept = Trace(*NAMES, "logits", every_pass=True)
    ops = REFERENCE._replace(prefill_chunk=chunk)
    prompt = [*ids, *story[:8], 44, *story[9:], *ids]  # quoted by the model, but for a token
    plain = list(generate(fp32, prompt, max_new_tokens=24, ops=ops, stop_ids=()))
    settings: dict[str, Any] = {"max_new_tokens": 24, "ops": ops, "tap": kept, "stop_ids": ()}
    policy = EagerPolicy(8 if case != "plain" else 0)
    if case == "ends":
        settings["stop_ids"] = {plain[12]}
    tokens = list(generate(fp32, prompt, lookup=policy, **settings))
    assert case == "plain" or policy.proposed > policy.accepted > 0
    text = [*prompt, *tokens] if case == "ends" else [*prompt, *tokens[:-1]]  # the last token is not computed
    check(kept, fp32, text)
    n_chosen = len(tokens) + (case == "ends")  # the end token was chosen too
    logits = trace(fp32, text, "logits", ops=REFERENCE)["logits"]
    assert close(kept["logits"], logits[-n_chosen:])
    assert kept["logits"].argmax(-1).tolist()[: len(tokens)] == tokens
    assert kept.lengths is None
    list(generate(fp32, ids, max_new_tokens=2, tap=kept, ops=ops))  # another text
    assert len(kept["norm"]) == len(ids) + 1


def test_of_a_text_that_is_continued(fp32: Model, ids: list[int]) -> None:
    kept = Trace(*NAMES, "logits", every_pass=True)
    cache = KVCache.allocate(fp32.params, max_seq_len=40, like=fp32.weights)
    settings: dict[str, Any] = {"max_new_tokens": 5, "cache": cache, "ops": REFERENCE, "stop_ids": ()}
    first = list(generate(fp32, ids, tap=kept, **settings))
    more = [*first[-1:], 44, 371]
    start = len(ids) + 4
    second = list(generate(fp32, more, start=start, tap=kept, **settings))
    check(kept, fp32, [*ids, *first[:-1], *more, *second[:-1]])
    assert len(kept["logits"]) == 10
    # only the rest
    late = Trace("norm", every_pass=True)
    list(generate(fp32, ids[:2], max_new_tokens=1, tap=late))  # a text that the rest does not continue
    list(generate(fp32, more, start=start, tap=late, **settings))
    assert close(late["norm"], kept["norm"][start:])


def test_a_text_that_is_left(fp32: Model, ids: list[int]) -> None:
    kept = Trace(*NAMES, every_pass=True)
    tokens = generate(fp32, ids, max_new_tokens=20, tap=chain(kept), lookup=EagerPolicy(8), ops=REFERENCE)
    new = [next(tokens) for _ in range(4)]
    tokens.close()
    assert close(kept["norm"], trace(fp32, [*ids, *new[:-1]], "norm", ops=REFERENCE)["norm"])


@pytest.mark.parametrize("packed", [1, 20, 10_000])
@pytest.mark.parametrize("shares", [False, True])
def test_of_generate_batch(fp32: Model, ids: list[int], packed: int, shares: bool) -> None:
    """Texts end at different times, so rows move; one has no new token at all."""
    kept = Trace(*NAMES, "logits", every_pass=True)
    ops = REFERENCE._replace(max_packed=packed)
    prompts = [ids[:3], ids, ids[:6], ids[:5], [*ids[:4], 44]]
    budgets = [2, 7, 0, 12, 5]
    rows = [Row(prompt, budget) for prompt, budget in zip(prompts, budgets, strict=True)]
    for _ in range(2):  # the second time like the first
        new: list[list[int]] = [[] for _ in rows]
        for number, event in generate_batch(fp32, rows, ops=ops, tap=kept, stop_ids=(), shares_beginning=shares):
            if isinstance(event, int):
                new[number].append(event)
    numbers = [0, 1, 3, 4]  # without the text that is not computed
    texts = [[*prompts[number], *new[number][:-1]] for number in numbers]
    assert kept.lengths.tolist() == [len(text) for text in texts]
    for row, (number, text) in enumerate(zip(numbers, texts, strict=True)):
        check(kept, fp32, text, row)
        logits = trace(fp32, text, "logits", ops=REFERENCE)["logits"][-budgets[number] :]
        assert close(kept["logits"][row, : budgets[number]], logits)
        assert not kept["logits"][row, budgets[number] :].any()


def test_of_a_batch_of_one(fp32: Model, ids: list[int]) -> None:
    kept = Trace("norm", every_pass=True)
    list(generate_batch(fp32, [Row(ids, 1), Row(ids[:3], 4)], tap=kept))  # no text of an earlier batch is left
    list(generate_batch(fp32, [Row(ids, 1)], tap=kept))
    assert kept["norm"].shape == (1, len(ids), 192)


def test_of_score(fp32: Model, ids: list[int]) -> None:
    kept = Trace(*NAMES, "logits", every_pass=True)
    continuations = [[44, 371, 283], [258], [349, 44], [44, 371, 283, 258, 349]]
    scored = score(fp32, ids, continuations, ops=REFERENCE, tap=kept)
    assert kept.lengths.tolist() == [len(ids) + len(text) - 1 for text in continuations]
    for row, (text, of_text) in enumerate(zip(continuations, scored, strict=True)):
        check(kept, fp32, [*ids, *text[:-1]], row)
        logprobs = kept["logits"][row, : len(text)].log_softmax(-1).gather(-1, torch.tensor(text).unsqueeze(-1))
        assert logprobs.flatten().tolist() == pytest.approx(of_text.logprobs, abs=1e-5)


@pytest.mark.parametrize("chunk", [4, 256])
def test_of_perplexity(fp32: Model, ids: list[int], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama3_raw.perplexity.CHUNK", chunk)
    kept = Trace(*NAMES, "logits", every_pass=True)
    perplexity(fp32, ids, tap=kept, ops=REFERENCE)
    check(kept, fp32, ids[:-1])
    assert close(kept["logits"], trace(fp32, ids[:-1], "logits", ops=REFERENCE)["logits"])
    text = [*ids, *ids, *ids]
    scored = perplexity(fp32, text, tap=kept, ops=REFERENCE, context=12, stride=6, per_token=True)
    windows = [(0, 12), (6, 18), (12, 24), (18, 30)]
    assert kept.lengths.tolist() == [11] * 4
    for row, (begin, end) in enumerate(windows):
        check(kept, fp32, text[begin : end - 1], row)
    assert kept["logits"].shape[:2] == (4, 11)
    assert scored.logprobs is not None
    last = kept["logits"][3, :6].log_softmax(-1).gather(-1, torch.tensor(text[-6:]).unsqueeze(-1)).flatten()
    assert torch.allclose(last, scored.logprobs[-6:], atol=1e-5)


def test_of_forward_itself(fp32: Model, ids: list[int]) -> None:
    kept = Trace(*NAMES, "logits", every_pass=True)
    batch = torch.tensor([ids, ids[::-1]])
    cache = KVCache.allocate(fp32.params, max_seq_len=len(ids), like=fp32.weights, batch=(2,))
    for _ in range(2):
        for start, end in ((0, 4), (4, 7), (5, 10)):  # two tokens again
            forward(fp32.weights, fp32.params, batch[:, start:end], cache=cache, start=start, tap=kept)
    whole = trace(fp32, batch, *NAMES, "logits", ops=REFERENCE)
    assert list(kept) == list(whole)
    assert all(close(kept[name], whole[name]) for name in whole)
    # rows with starts of their own are texts
    rows = Trace("norm", every_pass=True)
    for step in range(2):
        forward(
            fp32.weights,
            fp32.params,
            torch.stack([batch[0, 8 + step], batch[1, 6 + step]]).unsqueeze(-1),
            cache=cache,
            start=torch.tensor([8, 6]) + step,
            tap=rows,
        )
    assert rows.lengths.tolist() == [2, 2]
    assert close(rows["norm"], torch.stack([whole["norm"][0, 8:10], whole["norm"][1, 6:8]]))


def test_in_trace(fp32: Model, ids: list[int]) -> None:
    prompts = [ids, ids[:4]]
    kept = Trace("norm", "logits", every_pass=True)
    whole = trace(fp32, prompts, "logits", tap=kept)
    assert whole.lengths.tolist() == kept.lengths.tolist() == [10, 4]
    assert not kept["norm"][1, 4:].any()  # the padding is not of the text
    residual = trace(fp32, ids, "layers.1.residual")["layers.1.residual"]
    trace(fp32, ids, "logits", start_at="layers.2", residual=residual, tap=kept)
    assert kept["norm"].shape == (10, 192)
    assert kept["logits"].shape == (10, fp32.params.vocab_size)
    forward(fp32.weights, fp32.params, torch.tensor(ids[:3]), tap=kept)  # announced by no loop
    assert kept["norm"].shape == (3, 192)
    plain = Trace("layers.*.residual")
    trace(fp32, ids, "logits", tap=plain)
    trace(fp32, ids, "logits", start_at="layers.2", residual=residual, tap=plain)
    assert list(plain) == ["layers.2.residual", "layers.3.residual"]


def test_what_it_cannot_keep(tiny: Model) -> None:
    for settings in ({"last_position": True}, {"at": 3}):
        with pytest.raises(UserError, match="every_pass keeps all tokens; leave last_position and at out"):
            Trace("norm", every_pass=True, **settings)


def test_scores_are_exact_where_a_tap_wants_them(tiny: Model, ids: list[int]) -> None:
    """The default operations of each loop have no scores, but a tap gets what it names."""

    def uniform(name: str, tensor: Tensor) -> Tensor:
        return torch.ones_like(tensor).tril() / tensor.shape[-1] if name.endswith("attention.probs") else tensor

    fast = ops_for(tiny.weights)
    exact = fast._replace(attend=REFERENCE.attend, has_scores=True)
    assert not fast.has_scores
    for tap in (uniform, chain(Trace("norm"), uniform)):
        expected = list(generate(tiny, ids, max_new_tokens=5, tap=tap, ops=exact))
        assert list(generate(tiny, ids, max_new_tokens=5, tap=tap)) == expected
        assert expected != list(generate(tiny, ids, max_new_tokens=5))
        assert perplexity(tiny, ids, tap=tap) == perplexity(tiny, ids, tap=tap, ops=exact) != perplexity(tiny, ids)
        assert score(tiny, ids, [[44, 5]], tap=tap) == score(tiny, ids, [[44, 5]], tap=tap, ops=exact)
        assert score(tiny, ids, [[44, 5]], tap=tap) != score(tiny, ids, [[44, 5]])
        rows = [Row(ids, 5), Row(ids[:4], 5)]
        assert list(generate_batch(tiny, rows, tap=tap)) == list(generate_batch(tiny, rows, tap=tap, ops=exact))
        assert list(generate_batch(tiny, rows, tap=tap)) != list(generate_batch(tiny, rows))
    # one that does not want them keeps the fast attention
    kept = Trace("layers.0.*residual")
    list(generate(tiny, ids, max_new_tokens=2, tap=kept))
    expected_trace = Trace("layers.0.*residual")
    list(generate(tiny, ids, max_new_tokens=2, tap=expected_trace, ops=fast))
    assert kept == expected_trace


def test_log_probabilities_of_each_token(fp32: Model, ids: list[int]) -> None:
    scored = perplexity(fp32, ids, per_token=True, ops=REFERENCE)
    logits = trace(fp32, ids, "logits", ops=REFERENCE)["logits"]
    expected = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).flatten()
    assert scored.logprobs is not None
    assert scored.logprobs.shape == (len(ids),)
    assert scored.logprobs[0].isnan()
    assert torch.allclose(scored.logprobs[1:], expected, atol=1e-5)
    assert float(-scored.logprobs.nansum()) == pytest.approx(scored.nats)
    assert perplexity(fp32, ids, ops=REFERENCE).logprobs is None
    wide = perplexity(fp32._replace(weights=cast(fp32.weights, torch.float64)), ids, per_token=True).logprobs
    assert wide is not None
    assert wide.dtype == torch.float64
    windows = perplexity(fp32, ids, context=5, stride=5, per_token=True).logprobs
    assert windows is not None
    assert [place for place in range(len(ids)) if windows[place].isnan()] == [0, 5]  # the first of each window
