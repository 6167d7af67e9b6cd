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
    """Scores in the form of a completion, whose offsets go on from one part of the text to the next.

    The offset of a token is the index of the character that its first byte belongs to.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._length = tokenizer, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def of_prompt(self, answer: Answer) -> Body:
        """Return those of the prompt, which has none for its first token."""
        shown = [*map(self._tokenizer.token_bytes, answer.prompt)]
        if answer.prompt[0] == self._tokenizer.bos_id:
            shown[0] = b""  # as in `echoed`
        lists = self._lists(answer.prompt, shown, [None, *answer.prompt_scores])
        self._length += len(self._decoder.decode(b"", final=True))  # the new text begins with a character of its own
        return lists

    def of_new(self, scores: Sequence[TokenScore]) -> Body:
        """Return those of new tokens."""
        tokens = [score.token for score in scores]
        return self._lists(tokens, [*map(self._tokenizer.token_bytes, tokens)], scores)

    def _lists(self, tokens: Sequence[int], shown: Sequence[bytes], scores: Sequence[TokenScore | None]) -> Body:
        """Return tokens, the log-probability of each, or None, and the offset of the bytes that it shows, as lists."""
        assert len(tokens) == len(scores)
        name = self._tokenizer.name
        return {
            "tokens": [name(token) for token in tokens],
            "token_logprobs": [score and score.logprob for score in scores],
            "top_logprobs": [score and {name(token): value for token, value in score.top} for score in scores],
            "text_offset": [self._offset(content) for content in shown],
        }

    def _offset(self, content: bytes) -> int:
        """Return the offset of the text's next bytes."""
        self._length += len(self._decoder.decode(content[:1]))
        is_pending = bool(self._decoder.getstate()[0])  # the first byte begins or continues a character
        offset = self._length - (1 if content and not is_pending else 0)
        self._length += len(self._decoder.decode(content[1:]))
        return offset


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
