"""Requests: what a completion or a chat asks for, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple, NoReturn

from ..chat.dialog import DialogFormat, Message
from ..decoding.batch import Row
from ..decoding.sampling import Sampling
from ..errors import UserError, in_short
from ..params import Params
from ..tokenizer import Tokenizer
from .fields import MOST_STOPS, MOST_TEXTS, MOST_TOP, SAMPLING, Kind, check_message, given_fields, shown


class Defaults(NamedTuple):
    """What a request gets for fields that it leaves out."""

    max_tokens: int | None  # None: what the context holds
    sampling: Sampling
    stop: tuple[str, ...] = ()
    seed: int | None = None  # None: a new one


@dataclass(frozen=True)
class Request:
    """What a completion or a chat asks for. A chat has messages, and a completion prompts."""

    kind: Kind
    prompts: tuple[str | list[int], ...]
    messages: tuple[Message, ...]
    max_tokens: int | None
    sampling: Sampling
    seed: int | None
    stop: tuple[str, ...]
    n: int = 1  # texts for each prompt
    n_top: int | None = None  # alternatives of each token, in the scores; None: no scores
    echo: bool = False  # whether the answer begins with the prompt
    model: str | None = None
    stream: bool = False
    include_usage: bool = False  # whether a stream ends with the number of tokens

    @property
    def budget(self) -> int | None:
        """The most tokens to compute for a text; None: what the context holds. Even max_tokens 0 computes one."""
        return None if self.max_tokens is None else max(self.max_tokens, 1)

    @property
    def has_text(self) -> bool:
        """Whether it needs a tokenizer."""
        return bool(self.stop or self.messages) or any(isinstance(prompt, str) for prompt in self.prompts)


def parsed(content: bytes) -> Any:
    """Parse JSON. Raises UserError if it is not JSON, or holds what is not text."""
    try:
        fields = json.loads(content.decode("utf-8"))
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"is not valid UTF-8 at byte {error.start}") from error
    except UnicodeEncodeError as error:  # "\ud800"
        raise UserError("holds half a character (a lone surrogate), which is not text") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON: {in_short(error)}") from error
    return fields


def parse_request(fields: Mapping[str, Any], kind: Kind, defaults: Defaults) -> Request:
    """Return what the fields ask for. Raises UserError naming a field that is missing, unknown or wrong."""
    given = given_fields(fields, kind)
    echo, n, is_chat = given.get("echo", False), given.get("n", 1), kind == "chat"
    prompts = () if is_chat else _prompts(given)
    if len(prompts) > MOST_TEXTS:
        raise UserError(f"should be at most {MOST_TEXTS} texts, are {len(prompts)}", argument="prompt")
    if n < 1 or n * max(len(prompts), 1) > MOST_TEXTS:
        raise UserError(f"should be from 1 to {MOST_TEXTS}, for all prompts together, is {n}", argument="n")
    request = Request(
        kind,
        prompts,
        _messages(given) if is_chat else (),
        _max_tokens(given, defaults, least=0 if echo else 1),
        _sampling(given, defaults.sampling),
        given.get("seed", defaults.seed),
        _stop(given, defaults.stop),
        n,
        _n_top(given, is_chat),
        echo,
        given.get("model"),
        given.get("stream", False),
        _include_usage(given),
    )
    if request.seed is not None and not -(2**63) <= request.seed < 2**63:
        raise UserError(f"should be from -2**63 to 2**63 - 1, is {request.seed}", argument="seed")
    return request


def encoded(request: Request, tokenizer: Tokenizer | None, dialog_format: DialogFormat | None) -> list[list[int]]:
    """Return the token ids of each prompt. dialog_format: needed for a chat. Raises UserError if it is refused."""
    if request.messages:
        assert dialog_format is not None
        return [dialog_format.encode(request.messages)]
    ids = []
    for prompt in request.prompts:
        assert tokenizer is not None or not isinstance(prompt, str)
        ids.append(tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) and tokenizer else [*prompt])
    return ids


def check_prompts(request: Request, prompts: Sequence[Sequence[int]], params: Params, context: int) -> None:
    """Raise UserError unless the encoded prompts are of the vocabulary, and leave the context a new token.

    With max_tokens 0 a prompt may fill the context: the token that is computed is not kept.
    """
    name, has, it = ("messages", "have", "them") if request.messages else ("prompt", "has", "it")
    for ids in prompts:
        try:
            params.check_ids(ids)
        except UserError as error:
            raise UserError(f"{{argument}}: {error}", argument=name) from error
        if len(ids) + (request.max_tokens != 0) > context:
            message = f"the {{argument}} {has} {len(ids)} tokens, the context holds {context}; shorten {it}"
            raise UserError(message, argument=name)


def rows(
    request: Request,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer | None,
    stop_ids: frozenset[int],
    context: int,
) -> list[Row]:
    """Return the rows of a request, `n` for each of its encoded prompts.

    stop_ids: tokens that end a text. context: the most tokens of one, which the prompts leave a place in, unless
    max_tokens is 0.
    """
    stops = [text.encode("utf-8") for text in request.stop]
    longest = max(map(len, stops), default=0)

    def is_over(new: Sequence[int]) -> bool:
        if not stops or tokenizer is None:
            return False
        end = last = tokenizer.token_bytes(new[-1])  # a stop text ends in it
        for token in islice(reversed(new), 1, None):
            if len(end) >= longest + len(last):
                break
            end = tokenizer.token_bytes(token) + end
        return any(stop in end for stop in stops)

    return [
        Row(
            prompt,
            min(request.budget or context, max(context - len(prompt), 1)),
            request.sampling,
            None if request.seed is None else (request.seed + number) % 2**63,
            is_over,
            stop_ids,
        )
        for prompt in prompts
        for number in range(request.n)
    ]


def _prompts(given: dict[str, Any]) -> tuple[str | list[int], ...]:
    if "prompt" not in given:
        _wrong("prompt", "is missing")
    prompt = given["prompt"]
    if not prompt:
        _wrong("prompt", "should not be empty")
    if isinstance(prompt, str) or type(prompt[0]) is int:
        prompt = [prompt]
    for one in prompt:
        if not isinstance(one, (str, list)) or not all(type(token) is int for token in one if isinstance(one, list)):
            _wrong("prompt", "should be a string, a list of token ids, or a list of either, holds something else")
        if not one:
            _wrong("prompt", "should not be empty")
    return tuple(prompt)


def _messages(given: dict[str, Any]) -> tuple[Message, ...]:
    """Return the messages. Raises UserError unless they are a dialog that ends with a question."""
    if not given.get("messages"):
        _wrong("messages", "should not be empty" if "messages" in given else "is missing")
    messages = []
    for entry in given["messages"]:
        check_message(entry)
        messages.append(Message(entry["role"], _content(entry["content"])))
    if messages[-1].role == "assistant":
        _wrong("messages", "should end with the user's, which the model answers")
    return tuple(messages)


def _content(content: Any) -> str:
    """Return a message's text, which may come in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        _wrong("messages", "should have text as content, or a list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            _wrong("messages", f'should have parts such as {{"type": "text", "text": …}}, not of type {shown(kind)}')
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            _wrong("messages", 'should have parts such as {"type": "text", "text": …}, with no other fields')
    return "".join(part["text"] for part in content)


def _max_tokens(given: dict[str, Any], defaults: Defaults, least: int) -> int | None:
    """Return the most new tokens; both names of a chat's mean the same."""
    name = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    value: int | None = given.get(name, defaults.max_tokens)
    if value is not None and value < least:
        _wrong(name, f"should be {least} or more, is {value}")
    if given.get("max_tokens", value) != value:
        _wrong(name, "is not max_tokens; give one of them")
    return value


def _sampling(given: dict[str, Any], default: Sampling) -> Sampling:
    settings = {}
    for name in SAMPLING.keys() & given.keys():
        try:
            settings[name] = given[name] if name == "top_k" else float(given[name])
        except OverflowError as error:
            raise UserError("is too large a number", argument=name) from error
    return Sampling(**{**asdict(default), **settings})


def _stop(given: dict[str, Any], default: tuple[str, ...]) -> tuple[str, ...]:
    stop = given.get("stop", default)
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) and text for text in texts):
        _wrong("stop", "should be a string or a list of strings, none of them empty")
    if len(texts) > MOST_STOPS or any(len(text) > 1000 for text in texts):
        _wrong("stop", f"should be at most {MOST_STOPS} texts of 1,000 characters")
    return texts


def _n_top(given: dict[str, Any], is_chat: bool) -> int | None:
    """Return how many alternatives are asked for; None: no scores."""
    name = "top_logprobs" if is_chat else "logprobs"
    value: int | None = given.get(name)
    if value is not None and not 0 <= value <= MOST_TOP:
        _wrong(name, f"should be from 0 to {MOST_TOP}, is {value}")
    if not is_chat:
        return value
    if value and not given.get("logprobs"):
        _wrong(name, "needs logprobs: true")
    return (value or 0) if given.get("logprobs") else None


def _include_usage(given: dict[str, Any]) -> bool:
    options = given.get("stream_options", {})
    if options and not given.get("stream"):
        _wrong("stream_options", "needs stream: true")
    for name, value in options.items():
        # against a trick of other servers' streams (padding of random length), there is nothing to switch off here
        if (
            name not in ("include_usage", "include_obfuscation")
            or type(value) is not bool
            or (name != "include_usage" and value)
        ):
            _wrong("stream_options", f'should be {{"include_usage": true}}, holds {in_short(name)}: {shown(value)}')
    return bool(options.get("include_usage"))


def _wrong(name: str, what: str) -> NoReturn:
    raise UserError(what, argument=name)
