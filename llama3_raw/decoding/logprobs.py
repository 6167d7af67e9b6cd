"""How probable the tokens of a text are, collected while it is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..ops import Ops
from ..weights import Model
from .batch import Row

_LEAST = -9999.0  # JSON has no infinity; OpenAI's API has this number instead
_POSITIONS = 64  # of a prompt, whose logits are in memory at once


class TokenScore(NamedTuple):
    """How probable a token is, given everything before it; natural logarithms, before the temperature."""

    token: int
    logprob: float
    top: list[tuple[int, float]]  # the most likely tokens in its place, and log p of each


def token_scores(logits: Tensor, tokens: Sequence[int], n_top: int) -> list[TokenScore]:
    """Logits [T, vocab], the T tokens that follow -> their scores, with the `n_top` most likely tokens of each."""
    logprobs = logits.float().log_softmax(dim=-1).clamp_min(_LEAST)
    top = logprobs.topk(min(n_top, logprobs.shape[-1]), dim=-1)
    chosen = [float(row[token]) for row, token in zip(logprobs, tokens, strict=True)]
    alternatives = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        TokenScore(token, logprob, list(zip(ids, values, strict=True)))
        for token, logprob, (ids, values) in zip(tokens, chosen, alternatives, strict=True)
    ]


class ScoredRow:
    """A row of a batch that collects scores while it is decoded: decode `row`.

    prompt: scores of the prompt's tokens after the first, if asked for. new: of the new ones, and then of the stop
    token, if one ended the text.
    """

    def __init__(self, row: Row, n_top: int, prompt_of: tuple[Model, Ops] | None = None):
        """prompt_of: what computes the row, to score the prompt too, which is then computed alone."""
        self.prompt: list[TokenScore] = []
        self.new: list[TokenScore] = []
        self._n_top, self._ids, self._prompt_of = n_top, row.ids, prompt_of
        self._position = 0  # of the next token of the prompt
        self.row = row._replace(on_logits=self._score_new, tap=self._score_prompt if prompt_of else row.tap)

    def _score_new(self, logits: Tensor, token: int) -> None:
        self.new += token_scores(logits.unsqueeze(0), [token], self._n_top)

    def _score_prompt(self, name: str, tensor: Tensor) -> Tensor:
        """The tap that sees the last norm of each pass over the prompt, [T, dim]; a pass has one row of logits."""
        if name == "norm" and self._prompt_of is not None:
            model, ops = self._prompt_of
            for part in tensor.split(_POSITIONS):
                targets = self._ids[self._position + 1 : self._position + 1 + len(part)]
                logits = ops.linear(part[: len(targets)], model.weights.output)
                self.prompt += token_scores(logits, targets, self._n_top)
                self._position += len(part)
        return tensor
