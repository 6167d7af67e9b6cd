"""Scores of continuations against a pass over the whole text, alone and together."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
import torch

from llama3_raw import Model, UserError, forward, score
from llama3_raw.decoding.scoring import ContinuationScore, Question, cached_tokens, group_questions, score_together
from llama3_raw.model import REFERENCE
from tests.references import cast, converted


@pytest.fixture(scope="module")
def fp32(tiny: Model) -> Model:
    return tiny._replace(weights=cast(tiny.weights, torch.float32))


def expected(model: Model, prompt: Sequence[int], text: Sequence[int]) -> ContinuationScore:
    """Score by one pass over prompt and continuation."""
    with torch.no_grad():
        logits = forward(model.weights, model.params, torch.tensor([*prompt, *text[:-1]]))[len(prompt) - 1 :]
    logprobs = logits.log_softmax(-1)
    values = [float(row[token]) for row, token in zip(logprobs, text, strict=True)]
    return ContinuationScore(values, logits.argmax(-1).tolist() == list(text))


def assert_same(found: Sequence[ContinuationScore], model: Model, question: Question) -> None:
    for scored, text in zip(found, question.continuations, strict=True):
        by_hand = expected(model, question.prompt, text)
        assert scored.logprobs == pytest.approx(by_hand.logprobs, abs=1e-4)
        assert scored.is_greedy == by_hand.is_greedy


def random_texts(seed: int) -> Callable[[int, int], list[int]]:
    chance = random.Random(seed)
    return lambda least, most: [chance.randrange(2000) for _ in range(chance.randint(least, most))]


# more continuations than rows, longer than a chunk of logits, of one token only, and the most likely ones
@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("longest", [1, 9, 300])
def test_the_same_as_a_pass_over_the_whole_text(fp32: Model, count: int, longest: int) -> None:
    text = random_texts(count)
    question = Question(text(1, 60), [text(1, longest) for _ in range(count)])
    assert_same(score(fp32, *question), fp32, question)


def test_greedy_continuations(fp32: Model) -> None:
    assert fp32.tokenizer is not None
    prompt = fp32.tokenizer.encode("Once upon a time", bos=True)
    lily = fp32.tokenizer.encode(", there was a little girl named Lily")
    right, wrong = score(fp32, prompt, [lily, [*lily[:-1], 7]])
    assert right.is_greedy
    assert not wrong.is_greedy
    assert right.total == pytest.approx(sum(right.logprobs))
    assert wrong.logprobs[:-1] == pytest.approx(right.logprobs[:-1], abs=1e-5)


# a question with one-token continuations needs no row of its own, and must not overwrite another's prompt
@pytest.mark.parametrize("shared", [0, 50])
@pytest.mark.parametrize("order", range(6))
def test_together_as_alone(fp32: Model, shared: int, order: int) -> None:
    text = random_texts(shared)
    beginning = text(shared, shared)
    shapes = list(itertools.permutations([(1, 4), (6, 2), (9, 3)]))[order]
    questions = [Question([*beginning, *text(1, 30)], [text(1, n) for _ in range(m)]) for n, m in shapes]
    for ops in (None, REFERENCE):
        for question, found in zip(questions, score_together(fp32, questions, ops=ops), strict=True):
            assert_same(found, fp32, question)


def test_what_prompts_share_is_computed_once(fp32: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    from llama3_raw.decoding import runner

    def counted(weights: object, params: object, tokens: torch.Tensor, **settings: object) -> torch.Tensor:
        passes.append(tokens.numel())
        return forward(weights, params, tokens, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "forward", counted)
    text = random_texts(0)
    beginning = text(100, 100)
    score_together(fp32, [Question([*beginning, token], [[5]]) for token in range(8)])
    assert sum(passes) == 100 + 8
    passes.clear()
    score(fp32, beginning, [[1, 2, 3], [4, 5, 6]])
    assert sum(passes) == 100 + 2 * 2


def test_groups(fp32: Model) -> None:
    text = random_texts(1)
    examples = text(40, 40)
    alike = [Question([*examples, *text(1, 9)], [[1], [2, 3]]) for _ in range(7)]
    others = [Question(text(5, 80), [[1]] * 4) for _ in range(7)]
    questions = [question for pair in zip(alike, others, strict=True) for question in pair]
    groups = group_questions(questions, rows=8, tokens=500)
    assert sorted(i for group in groups for i in group) == list(range(14))
    for group in ([questions[i] for i in numbers] for numbers in groups):
        rows = sum(len(question.continuations) for question in group)
        assert len(group) == 1 or (rows <= 8 and rows * cached_tokens(group) <= 500)
        assert len({question in alike for question in group}) == 1
    assert max(map(len, groups)) > 1
    assert group_questions(questions[:1], rows=1, tokens=1) == [[0]]


@pytest.mark.parametrize(
    ("prompt", "texts", "message"),
    [
        ([], [[1]], "the prompt is empty"),
        ([1], [[2], []], "a continuation is empty"),
        ([1], [[999_999]], "999999"),
        ([1] * 500, [[1] * 14], "514 tokens, the model's context holds 512"),
    ],
)
def test_refused(fp32: Model, prompt: list[int], texts: list[list[int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        score(fp32, prompt, texts)


def test_the_last_token_needs_no_place_in_the_context(fp32: Model) -> None:
    question = Question([1] * 500, [[1] * 13])
    assert_same(score(fp32, *question), fp32, question)


def test_damaged_weights(fp32: Model) -> None:
    damaged = fp32._replace(weights=converted(fp32.weights, lambda tensor: tensor * torch.nan))
    with pytest.raises(UserError, match="the weights are damaged"):
        score(damaged, [1], [[2, 3]])
