"""`score`: how probable given continuations of a prompt are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..backends.choose import ops_for
from ..errors import UserError
from ..model import KVCache
from ..ops import Ops, Tap, announce, no_tap
from ..weights import Model
from .runner import BatchRunner
from .sampling import check_sound, is_sound

MAX_ROWS = 16  # continuations in one pass
_LOGITS_AT_ONCE = 256  # tokens whose logits are in memory at once
_SAME_BEGINNING = 32  # tokens from which prompts count as beginning alike


class ContinuationScore(NamedTuple):
    """How probable a continuation is."""

    logprobs: list[float]  # log p of each token, given everything before it; natural logarithm
    is_greedy: bool  # whether each token is the most likely one, so that greedy decoding would give this continuation

    @property
    def total(self) -> float:
        """log p of the whole continuation."""
        return math.fsum(self.logprobs)


class Question(NamedTuple):
    """A prompt and its continuations, as token ids."""

    prompt: Sequence[int]
    continuations: Sequence[Sequence[int]]

    @property
    def length(self) -> int:
        """The tokens of the prompt with its longest continuation."""
        return len(self.prompt) + max(map(len, self.continuations), default=0)


def score(
    model: Model,
    prompt: Sequence[int],
    continuations: Sequence[Sequence[int]],
    *,
    ops: Ops | None = None,
    tap: Tap = no_tap,
) -> list[ContinuationScore]:
    """Return how probable each continuation of the prompt is. The prompt is computed once for all of them.

    Args:
        model: what `load` returned.
        prompt: token ids, at least one: an empty text is the begin-of-text alone.
        continuations: token ids, at least one in each. Encode prompt and continuation as one text and cut the ids, or
            the tokens at the border may differ from those that the model was trained on.
        ops: None chooses the set for the weights, with exact attention if the tap may want scores or probs.
        tap: as in `forward`. It sees the prompt once, and then the continuations after their first tokens as rows of
            a batch, padded on the right. To a `Trace` with every_pass each continuation is a text with the prompt.

    Raises:
        UserError: for an empty prompt or continuation, ids outside the vocabulary, a text longer than the model's
            context, and logits that are not numbers.
    """
    return score_together(model, [Question(prompt, continuations)], ops=ops, tap=tap)[0]


@torch.no_grad()
def score_together(
    model: Model,
    questions: Sequence[Question],
    *,
    ops: Ops | None = None,
    rows: int = MAX_ROWS,
    tap: Tap = no_tap,
) -> list[list[ContinuationScore]]:
    """Return what `score` returns for each question. What all prompts begin with is computed once.

    The cache has a row for each continuation (of a single question: at most `rows`), so group the questions first, as
    `group_questions` does. A result differs by rounding from that of the question alone. Raises UserError as `score`.
    """
    for question in questions:
        _check(model, question)
    ops = ops or ops_for(model.weights, tap=tap)
    # a prompt moves only to later rows, so those with continuations of several tokens come first
    order = sorted(range(len(questions)), key=lambda i: max(map(len, questions[i].continuations), default=0) < 2)
    ordered = [questions[i] for i in order]
    texts = [(row, list(text)) for row, question in enumerate(ordered) for text in question.continuations]
    longer = [(row, number) for number, (row, text) in enumerate(texts) if len(text) > 1]
    n_rows = max(len(ordered), min(len(longer), rows) if len(ordered) == 1 else len(longer))
    longest = cached_tokens(ordered)
    cache = KVCache.allocate(model.params, max_seq_len=longest, like=model.weights, batch=(n_rows,))
    numbers = [tuple(number for number, (row, _) in enumerate(texts) if row == place) for place in range(n_rows)]
    announce(tap, None)
    runner = BatchRunner(model, cache, ops, shares_beginning=True, tap=tap, texts=numbers)
    logits = runner.prefill([question.prompt for question in ordered]).squeeze(1)  # [questions, vocab]
    check_sound(bool(is_sound(logits).all()))
    logprobs, top = logits.log_softmax(dim=-1), logits.argmax(dim=-1).tolist()
    lengths = [len(question.prompt) for question in ordered]
    rest = iter(_score_rest(runner, lengths, longer, [text for _, text in texts], n_rows))
    results: list[list[ContinuationScore]] = [[] for _ in questions]
    for row, text in texts:
        later = next(rest) if len(text) > 1 else ContinuationScore([], True)
        first = float(logprobs[row, text[0]])
        scored = ContinuationScore([first, *later.logprobs], later.is_greedy and top[row] == text[0])
        results[order[row]].append(scored)
    return results


def _check(model: Model, question: Question) -> None:
    if not question.prompt or not all(question.continuations):
        what = "a continuation" if question.prompt else "the prompt"
        raise UserError(f"{what} is empty; give at least one token")
    for ids in (question.prompt, *question.continuations):
        model.params.check_ids(ids)
    if question.length > model.params.max_seq_len + 1:  # the last token is predicted only
        raise UserError(
            f"prompt and continuation have {question.length} tokens, the model's context holds "
            f"{model.params.max_seq_len}; shorten them"
        )


def _score_rest(
    runner: BatchRunner, lengths: Sequence[int], rows: Sequence[tuple[int, int]], texts: list[list[int]], n_rows: int
) -> list[ContinuationScore]:
    """Score the tokens after the first of each continuation.

    lengths: of the prompts, which are in the first rows of the cache. rows: (row of the prompt, number of the
    continuation in `texts`), by row.
    """
    for target in reversed(range(min(n_rows, len(rows)))):  # from the last one on: a row is read before it is written
        source = rows[target][0]
        if source != target:
            runner.move(source, target, lengths[source])
    results = []
    for begin in range(0, len(rows), n_rows):  # later ones of a single prompt overwrite only what came after it
        part = rows[begin : begin + n_rows]
        runner.texts = [(number,) for _, number in part]
        results += _score_rows(runner, [lengths[row] for row, _ in part], [texts[number] for _, number in part])
    return results


def _score_rows(runner: BatchRunner, positions: list[int], texts: list[list[int]]) -> list[ContinuationScore]:
    """Score texts after their first tokens. positions: of the first tokens, one per row of the cache."""
    width = max(map(len, texts))
    padded = torch.tensor([[*text, *[text[-1]] * (width - len(text))] for text in texts], device=runner.device)
    logprobs, greedy = [], []
    step = max(1, _LOGITS_AT_ONCE // len(texts))
    for begin in range(0, width - 1, step):
        end = min(begin + step, width - 1)
        lengths = [max(0, min(end, len(text) - 1) - begin) for text in texts]  # the last token is predicted only
        logits = runner.extend(padded[:, begin:end], [position + begin for position in positions], lengths)
        check_sound(bool(is_sound(logits).all()))
        targets = padded[:, begin + 1 : end + 1]
        logprobs.append(-F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets))
        greedy.append(logits.argmax(dim=-1) == targets)
    return [
        ContinuationScore(values[: len(text) - 1], all(hits[: len(text) - 1]))
        for text, values, hits in zip(
            texts, torch.cat(logprobs, 1).tolist(), torch.cat(greedy, 1).tolist(), strict=True
        )
    ]


def cached_tokens(questions: Sequence[Question]) -> int:
    """Return the positions that a row of the cache needs for any of these questions, padding included."""
    prompt = max(len(question.prompt) for question in questions)
    return prompt + max((len(text) for question in questions for text in question.continuations), default=0)


def group_questions(questions: Sequence[Question], rows: int, tokens: int) -> list[list[int]]:
    """Return groups of question numbers for `score_together`. They depend on nothing but the arguments.

    Questions that begin alike (the same examples before each) are together, and otherwise those of similar length, the
    longest first. A group has at most `rows` continuations and `tokens` tokens in its cache, or a single question.
    """
    beginnings = [tuple(question.prompt[:_SAME_BEGINNING]) for question in questions]
    counts = Counter(beginnings)
    beginnings = [beginning if counts[beginning] > 1 else () for beginning in beginnings]
    groups: list[list[int]] = []
    for i in sorted(range(len(questions)), key=lambda i: (beginnings[i], -questions[i].length, i)):
        group = [questions[j] for j in (*groups[-1], i)] if groups else []
        n_rows = sum(len(question.continuations) for question in group)
        is_alike = bool(groups) and beginnings[groups[-1][0]] == beginnings[i]
        if is_alike and n_rows <= rows and n_rows * cached_tokens(group) <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
