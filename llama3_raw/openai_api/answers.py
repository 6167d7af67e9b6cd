"""Answers: bodies in the form of OpenAI's API."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..decoding.logprobs import TokenScore
from ..decoding.loop import StopReason
from ..tokenizer import Tokenizer
from .requests import Request

Body = dict[str, Any]


class Answer(NamedTuple):
    """A text that has ended. prompt_scores and scores: empty if not asked for."""

    prompt: Sequence[int]
    new: Sequence[int]
    reason: StopReason
    prompt_scores: Sequence[TokenScore] = ()
    scores: Sequence[TokenScore] = ()


def head(
    request: Request,
    model: str,
    *,
    number: int | str | None = None,
    created: float | None = None,
    is_chunk: bool = False,
) -> Body:
    """Return what every body and every chunk of one answer begin with. number: part of its id; None: a random one."""
    is_chat = request.kind == "chat"
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex if number is None else number}",
        "object": ("chat.completion" + (".chunk" if is_chunk else "")) if is_chat else "text_completion",
        "created": int(time.time() if created is None else created),
        "model": model,
    }


def whole(request: Request, answers: Sequence[Answer], tokenizer: Tokenizer, model: str) -> Body:
    """Return the body of a request whose texts have all ended."""
    choices = [choice(request, number, answer, tokenizer) for number, answer in enumerate(answers)]
    return {**head(request, model), "choices": choices, "usage": usage(request, answers)}


def choice(request: Request, number: int, answer: Answer, tokenizer: Tokenizer) -> Body:
    """Return one text of a body."""
    text = "".join(tokenizer.stream(kept(request, answer.new), request.stop))
    ends = {"index": number, "finish_reason": finish_reason(answer.reason)}
    if request.kind == "chat":
        scores = None
        if request.n_top is not None:
            scores = chat_logprobs(answer.scores[: len(answer.new)], tokenizer)
        return {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": scores, **ends}
    shown = echoed(request, answer.prompt, tokenizer) + text
    return {"text": shown, "logprobs": _completion_logprobs(request, answer, tokenizer), **ends}


def echoed(request: Request, prompt: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the prompt as part of the answer, without a begin-of-text that it does not show."""
    if not request.echo:
        return ""
    return tokenizer.decode(prompt[1:] if prompt[:1] == [tokenizer.bos_id] else prompt)


def finish_reason(reason: StopReason) -> str:
    """Return "stop" if the model or a stop text ended it, or "length"."""
    return "stop" if reason is StopReason.END_TOKEN else "length"


def usage(request: Request, answers: Sequence[Answer]) -> Body:
    """Count the tokens. A prompt counts once, whatever n is."""
    prompt = sum(len(answer.prompt) for answer in answers[:: request.n])
    new = sum(len(kept(request, answer.new)) for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def kept(request: Request, new: Sequence[int]) -> Sequence[int]:
    """Return the new tokens: none for max_tokens 0, where one was computed."""
    return [] if request.max_tokens == 0 else new


def chat_logprobs(scores: Iterable[TokenScore], tokenizer: Tokenizer) -> Body:
    """Return scores in the form of a chat."""

    def entry(token: int, logprob: float) -> Body:
        return {"token": tokenizer.name(token), "logprob": logprob, "bytes": [*tokenizer.token_bytes(token)]}

    content = [
        {**entry(score.token, score.logprob), "top_logprobs": [entry(*one) for one in score.top]} for score in scores
    ]
    return {"content": content, "refusal": None}


class CompletionScores:
    """Scores in the form of a completion, whose offsets go on from one part of the text to the next."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._offset = tokenizer, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def lists(self, tokens: Sequence[int], scores: Sequence[TokenScore | None]) -> Body:
        """Return tokens and the log-probability of each, or None, as lists."""
        name, offsets = self._tokenizer.name, []
        for token, _ in zip(tokens, scores, strict=True):
            offsets.append(self._offset)
            shown = b"" if token == self._tokenizer.bos_id else self._tokenizer.token_bytes(token)
            self._offset += len(self._decoder.decode(shown))
        return {
            "tokens": [name(token) for token in tokens],
            "token_logprobs": [score and score.logprob for score in scores],
            "top_logprobs": [score and {name(token): value for token, value in score.top} for score in scores],
            "text_offset": offsets,
        }

    def of_prompt(self, answer: Answer) -> Body:
        """Return those of the prompt, which has none for its first token."""
        return self.lists(answer.prompt, [None, *answer.prompt_scores])

    def of_new(self, scores: Sequence[TokenScore]) -> Body:
        """Return those of new tokens."""
        return self.lists([score.token for score in scores], scores)


def joined(parts: Iterable[Body]) -> Body:
    """Return lists one after the other."""
    whole: Body = {}
    for part in parts:
        for name, values in part.items():
            whole.setdefault(name, []).extend(values)
    return whole


def _completion_logprobs(request: Request, answer: Answer, tokenizer: Tokenizer) -> Body | None:
    """Return the scores of a completion: those of the prompt first, with `echo`; last, of a token that ended it."""
    if request.n_top is None:
        return None
    scores = CompletionScores(tokenizer)
    prompt = [scores.of_prompt(answer)] if request.echo else []
    return joined([*prompt, scores.of_new(answer.scores if request.max_tokens != 0 else [])])
