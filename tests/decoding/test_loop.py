"""The decoding loop with a fake forward pass, and with the built-in model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llama3_raw import REFERENCE, KVCache, Model, Params, UserError, Weights
from llama3_raw.backends.cpu import fast_ops
from llama3_raw.chat.conversation import Conversation
from llama3_raw.decoding import runner
from llama3_raw.decoding.loop import StopReason, generate
from llama3_raw.decoding.sampling import Sampling
from llama3_raw.ops import PREFILL_CHUNK
from tests.references import run

VOCAB = 50
PARAMS = Params.from_meta(
    {"dim": 8, "n_layers": 1, "n_heads": 1, "vocab_size": VOCAB, "norm_eps": 1e-5, "max_seq_len": 5000}
)


class Counter:
    """A forward pass whose next token is always the last one plus one. It records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []  # (start, number of tokens)

    def __call__(self, weights: Any, params: Any, tokens: Tensor, *, start: int, **others: Any) -> Tensor:
        self.calls.append((start, len(tokens)))
        return torch.nn.functional.one_hot((tokens[-1] + 1) % VOCAB, VOCAB).float()


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    fake = Counter()
    monkeypatch.setattr(runner, "forward", fake)
    return fake


@pytest.fixture
def model() -> Model:
    nothing = torch.zeros(1)
    return Model(Weights(nothing, (), nothing, nothing), PARAMS, None)


def test_budget(counter: Counter, model: Model) -> None:
    assert run(generate(model, [1, 2], max_new_tokens=4)) == ([3, 4, 5, 6], StopReason.MAX_NEW_TOKENS)
    assert counter.calls == [(0, 2), (2, 1), (3, 1), (4, 1)]  # the last token needs no pass
    assert run(generate(model, [1], max_new_tokens=0)) == ([], StopReason.MAX_NEW_TOKENS)


def test_the_prompt_may_be_a_tensor(counter: Counter, model: Model) -> None:
    assert list(generate(model, torch.tensor([1, 2]), max_new_tokens=2)) == [3, 4]


def test_end_token(counter: Counter, model: Model) -> None:
    assert run(generate(model, [1], max_new_tokens=9, stop_ids=[4, 8])) == ([2, 3], StopReason.END_TOKEN)


def test_stop_ids_of_the_tokenizer(model: Model, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny.tokenizer
    assert tokenizer is not None
    params = replace(PARAMS, vocab_size=tokenizer.n_words)
    eot = tokenizer.eot_id
    with_tokenizer = Model(model.weights, params, tokenizer)

    def always_eot(*_: Any, **__: Any) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(eot), params.vocab_size).float()

    monkeypatch.setattr("llama3_raw.decoding.runner.forward", always_eot)
    assert run(generate(with_tokenizer, [1], max_new_tokens=3)) == ([], StopReason.END_TOKEN)
    assert run(generate(with_tokenizer, [1], max_new_tokens=2, stop_ids=()))[0] == [eot, eot]


def test_context_end(counter: Counter, model: Model) -> None:
    assert run(generate(model, [1, 2, 3], max_new_tokens=9, context=5)) == ([4, 5], StopReason.CONTEXT)
    short = model._replace(params=replace(PARAMS, max_seq_len=4))
    assert run(generate(short, [1, 2, 3], max_new_tokens=9)) == ([4], StopReason.CONTEXT)
    assert run(generate(model, [1, 2], max_new_tokens=3, context=5)) == ([3, 4, 5], StopReason.MAX_NEW_TOKENS)


def test_streaming(counter: Counter, model: Model) -> None:
    """Each token is yielded before the next one is computed."""
    tokens = generate(model, [7], max_new_tokens=3)
    assert counter.calls == []
    assert next(tokens) == 8
    assert len(counter.calls) == 1
    assert next(tokens) == 9
    assert len(counter.calls) == 2


def test_prefill_in_chunks(counter: Counter, model: Model) -> None:
    length = 2 * PREFILL_CHUNK + 5
    run(generate(model, [1] * length, max_new_tokens=1))
    assert counter.calls == [(0, PREFILL_CHUNK), (PREFILL_CHUNK, PREFILL_CHUNK), (2 * PREFILL_CHUNK, 5)]
    counter.calls.clear()
    run(generate(model, [1] * (REFERENCE.prefill_chunk + 1), max_new_tokens=1, ops=REFERENCE))
    assert counter.calls == [(0, REFERENCE.prefill_chunk), (REFERENCE.prefill_chunk, 1)]


def test_errors_are_raised_before_the_first_token(counter: Counter, model: Model) -> None:
    for ids, settings, message in (
        ([], {}, "prompt is empty"),
        ([VOCAB], {}, f"token id {VOCAB} is outside"),
        ([-1], {}, "token id -1 is outside"),
        ([1] * 6, {"context": 5}, "needs 6 positions, but the context holds 5"),
        ([1], {"context": 0}, "context should be 1 or more"),
        ([1], {"start": -1}, "start should be how many tokens the given cache holds"),
        ([1], {"start": 3}, "start should be how many tokens the given cache holds"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens should be 0 or more"),
        ([1], {"temperature": -1.0}, "temperature should be 0"),
    ):
        with pytest.raises(UserError, match=message):
            generate(model, ids, **{"max_new_tokens": 1, **settings})  # type: ignore[arg-type]
    assert counter.calls == []


def test_the_cache_is_no_larger_than_needed(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    allocate = KVCache.allocate

    def spy(*arguments: Any, **keywords: Any) -> KVCache:
        sizes.append(keywords["max_seq_len"])
        return allocate(*arguments, **keywords)

    monkeypatch.setattr(KVCache, "allocate", spy)
    run(generate(tiny, [1, 2, 3], max_new_tokens=7, stop_ids=()))
    assert sizes == [10]


def test_a_cache_larger_than_the_memory(tiny: Model) -> None:
    endless = tiny._replace(params=replace(tiny.params, max_seq_len=2**40))
    with pytest.raises(UserError, match="a cache for 549755813889 tokens does not fit into memory"):
        generate(endless, [1], max_new_tokens=2**39)


def test_chunks_give_the_same_tokens(tiny: Model) -> None:
    assert tiny.tokenizer is not None
    ids = tiny.tokenizer.encode("Once upon a time, there was a little girl named Lily.", bos=True)
    whole = list(generate(tiny, ids, max_new_tokens=20))
    ops = fast_ops()._replace(prefill_chunk=4)
    assert list(generate(tiny, ids, max_new_tokens=20, ops=ops)) == whole


def test_a_warm_cache_continues(tiny: Model) -> None:
    """Two calls on one cache equal one call; the second starts with the token that is not in the cache yet."""
    assert tiny.tokenizer is not None
    ids = tiny.tokenizer.encode("One day", bos=True)
    whole = list(generate(tiny, ids, max_new_tokens=12, stop_ids=()))
    cache = KVCache.allocate(tiny.params, max_seq_len=64, like=tiny.weights)
    first = list(generate(tiny, ids, max_new_tokens=5, stop_ids=(), cache=cache))
    start = len(ids) + len(first) - 1
    second = list(generate(tiny, first[-1:], max_new_tokens=7, stop_ids=(), cache=cache, start=start))
    assert first + second == whole


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers(tiny: Model, temperature: float) -> None:
    damaged = tiny._replace(weights=tiny.weights._replace(norm=torch.full_like(tiny.weights.norm, torch.nan)))
    with pytest.raises(UserError, match="the logits are not numbers: the weights are damaged"):
        next(generate(damaged, [1, 2], max_new_tokens=1, temperature=temperature))


@pytest.mark.parametrize("lookup", [0, 8])
def test_logits_that_become_no_numbers(tiny: Model, lookup: int) -> None:
    """The tokens before are yielded, drafts or not."""
    whole = list(generate(tiny, [1, 2, 3], max_new_tokens=20, stop_ids=()))
    token = whole[9]
    assert token not in (1, 2, 3)
    embeddings = tiny.weights.tok_embeddings.clone()
    embeddings[token] = torch.nan
    tokens = generate(
        tiny._replace(weights=tiny.weights._replace(tok_embeddings=embeddings)),
        [1, 2, 3],
        max_new_tokens=20,
        stop_ids=(),
        lookup=lookup,
        earlier=whole,
    )
    new: list[int] = []
    with pytest.raises(UserError, match="the logits are not numbers"):
        new += tokens  # keeps what came before the error
    assert new == whole[: whole.index(token) + 1]


def test_the_penalty_covers_the_dialog(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat keeps the first turn in the cache; the second answer is that to the whole dialog."""
    turns: list[tuple[list[int], dict[str, Any], list[int]]] = []

    def spy(model: Model, ids: list[int], **settings: Any) -> Any:
        new: list[int] = []
        turns.append(([*settings["earlier"], *ids], settings, new))
        for token in generate(model, ids, **settings):
            new.append(token)
            yield token

    monkeypatch.setattr("llama3_raw.chat.conversation.generate", spy)
    sampling = Sampling(repetition_penalty=1.5)
    conversation = Conversation(tiny, sampling=sampling, max_new_tokens=12, ops=REFERENCE)
    for question in ("Once upon a time", "The end"):
        assert "".join(conversation.answer(question))
    assert turns[1][1]["start"] > 10
    for dialog, settings, new in turns:
        alone = {
            name: settings[name] for name in ("max_new_tokens", "repetition_penalty", "stop_ids") if name in settings
        }
        assert list(generate(tiny, dialog, ops=REFERENCE, **alone)) == new


def test_seeds_reproduce(tiny: Model) -> None:
    def draw(seed: int) -> list[int]:
        return list(generate(tiny, [1, 2, 3], max_new_tokens=20, temperature=1.0, seed=seed, stop_ids=()))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.slow
def test_greedy_tokens_are_the_same_as_hf(smollm2: Model) -> None:
    from tests.references import hf_model

    ids = [504, 3575, 282, 4649, 314]
    theirs = hf_model(smollm2.params, smollm2.weights).generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=20,
        do_sample=False,
    )
    ours = list(generate(smollm2, ids, max_new_tokens=20))
    assert ours == theirs[0, len(ids) :].tolist()
