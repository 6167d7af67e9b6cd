"""The fields of a request: which there are, and what becomes of each.

A field is used; or it changes nothing, such as `user`; or it has one value that changes nothing, as a penalty of 0 has;
or it is refused by name. None is ignored that would change the answer. null is as good as leaving a field out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from ..errors import UserError, in_short

Kind = Literal["completion", "chat"]


class Field(NamedTuple):
    """A field that is used: its types in JSON, how errors describe them, and its schema in the API's description."""

    types: tuple[type, ...]
    expected: str
    schema: Mapping[str, Any]


_NUMBER = ((int, float), "a number")
_INTEGER = ((int,), "an integer")
_BOOLEAN = Field((bool,), "true or false", {"type": "boolean"})

SAMPLING = {
    "temperature": Field(*_NUMBER, {"type": "number", "minimum": 0}),
    "top_p": Field(*_NUMBER, {"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    "top_k": Field(*_INTEGER, {"type": "integer", "minimum": 0}),
    "min_p": Field(*_NUMBER, {"type": "number", "minimum": 0, "maximum": 1}),
    "repetition_penalty": Field(*_NUMBER, {"type": "number", "minimum": 0.01, "maximum": 100}),
}

MOST_TEXTS = 128  # of one request: prompts times n
MOST_STOPS = 16
MOST_TOP = 20  # alternatives of a token

_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS = {"type": "string", "minLength": 1}
_COUNT = Field(*_INTEGER, {"type": "integer", "minimum": 1})

_COMMON = {
    "model": Field((str,), "a string", {"type": "string"}),
    **SAMPLING,
    "max_tokens": _COUNT,
    "seed": Field(*_INTEGER, {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}),
    "stop": Field(
        (str, list),
        "a string or a list of strings",
        {"anyOf": [_TEXTS, {"type": "array", "items": _TEXTS, "maxItems": MOST_STOPS}]},
    ),
    "n": Field(*_INTEGER, {"type": "integer", "minimum": 1, "maximum": MOST_TEXTS}),
    "stream": _BOOLEAN,
    "stream_options": Field(
        (dict,),
        'an object, {"include_usage": true}',
        {"type": "object", "properties": {"include_usage": {"type": "boolean"}}, "additionalProperties": False},
    ),
}

_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}

ROLES = ("system", "user", "assistant")

USED: dict[Kind, dict[str, Field]] = {
    "completion": {
        "prompt": Field(
            (str, list),
            "a string, a list of token ids, or a list of either",
            {"anyOf": [_TEXTS, _TOKENS, {"type": "array", "minItems": 1, "items": {"anyOf": [_TEXTS, _TOKENS]}}]},
        ),
        **_COMMON,
        "max_tokens": Field(*_INTEGER, {"type": "integer", "minimum": 0}),
        "logprobs": Field(*_INTEGER, {"type": "integer", "minimum": 0, "maximum": MOST_TOP}),
        "echo": _BOOLEAN,
    },
    "chat": {
        "messages": Field(
            (list,),
            'a list of {"role": …, "content": …}',
            {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "properties": {
                        "role": {"enum": ROLES},
                        "content": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _PART}]},
                    },
                    "required": ["role", "content"],
                    "additionalProperties": False,
                },
            },
        ),
        **_COMMON,
        "max_completion_tokens": _COUNT,
        "logprobs": _BOOLEAN,
        "top_logprobs": Field(*_INTEGER, {"type": "integer", "minimum": 0, "maximum": MOST_TOP}),
    },
}

TOKENIZE = {
    "model": USED["chat"]["model"],
    "prompt": Field((str,), "a string", {"type": "string"}),
    "messages": USED["chat"]["messages"],
    "add_special_tokens": _BOOLEAN,  # begin-of-text
    "allow_special": _BOOLEAN,  # whether names of special tokens in the prompt are these tokens
    "return_token_strs": _BOOLEAN,
}

OF_PROMPT = ("add_special_tokens", "allow_special")  # those of /tokenize that messages do not have

DETOKENIZE = {
    "model": USED["chat"]["model"],
    "tokens": Field((list,), "a list of token ids", {**_TOKENS, "minItems": 0}),
}

# whatever their value is: they say who asks, what OpenAI keeps, or how it schedules
HARMLESS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "parallel_tool_calls",
)

# what may be given with these values only, because with them it changes nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "best_of": (1,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
}

# what is in OpenAI's API, and not in this one
UNSUPPORTED = ("audio", "reasoning_effort", "verbosity", "web_search_options", "moderation")

_OF_MESSAGES: dict[str, tuple[Any, ...]] = {"tool_calls": ([],), "refusal": (), "name": (), "audio": ()}
"""Fields of a message besides role and content, and the values of each that change nothing."""


def given_fields(fields: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """Return the fields of a request that are used and not null. Raises UserError naming one that is wrong."""
    counting = {name: value for name, value in fields.items() if not _changes_nothing(name, value)}
    for name, value in counting.items():
        if name not in USED[kind] and value is not None:
            raise _refused(name, value, kind)
    return check_fields(counting, USED[kind])


def _changes_nothing(name: str, value: Any) -> bool:
    return name in HARMLESS or _is_one_of(value, NEUTRAL.get(name, ()))


def check_fields(fields: Mapping[str, Any], used: Mapping[str, Field]) -> dict[str, Any]:
    """Return the fields that are not null. Raises UserError for one that is not in `used`, or has another type."""
    given = {name: value for name, value in fields.items() if value is not None}
    for name, value in given.items():
        if name not in used:
            raise no_such_field(name, used)
        if type(value) not in used[name].types:
            raise UserError(f"should be {used[name].expected}, is {shown(value)}", argument=name)
    return given


def check_message(entry: Any) -> None:
    """Raise UserError unless a message has a role and a content, and nothing else that would change the answer."""
    if not isinstance(entry, dict) or not {"role", "content"} <= entry.keys():
        raise UserError('should be a list of {"role": …, "content": …}', argument="messages")
    if entry["role"] not in ROLES:
        raise UserError(
            f"{{argument}}: role should be one of {', '.join(ROLES)}, is {shown(entry['role'])}", argument="messages"
        )
    for name, value in entry.items():
        if name in ("role", "content") or value is None or _is_one_of(value, _OF_MESSAGES.get(name, ())):
            continue
        raise UserError(
            f"{{argument}}: {in_short(name)} of a message is not supported; leave it out", argument="messages"
        )


def shown(value: Any) -> str:
    """Return a value as part of an error."""
    return in_short(json.dumps(value, ensure_ascii=False))


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    return any(value == one and type(value) is not bool for one in neutral)


def _refused(name: str, value: Any, kind: Kind) -> UserError:
    if name in NEUTRAL:
        only = " or ".join(map(shown, NEUTRAL[name]))
        return UserError(f"is not supported, other than {only}, is {shown(value)}; leave it out", argument=name)
    others = USED["chat" if kind == "completion" else "completion"]
    if name in UNSUPPORTED:
        return UserError("is not supported; leave it out", argument=name)
    if name in others:
        return UserError(f"is not a field of a {kind}; leave it out", argument=name)
    return no_such_field(name, USED[kind])


def no_such_field(name: str, used: Iterable[str]) -> UserError:
    """Return the error for a field that is not in the table."""
    return UserError(f"{{argument}}: there is no such field; there are {', '.join(used)}", argument=in_short(name))
