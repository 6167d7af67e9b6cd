"""Requests: the lines of a file of prompts, validated."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ..chat.dialog import DialogFormat, Message
from ..cli.models import ChosenModel
from ..decoding.sampling import Sampling
from ..errors import UserError, in_short

Result = dict[str, Any]
"""A line of the output."""

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

FIELDS: dict[str, tuple[tuple[type, ...], str]] = {  # name -> its types, and how errors describe them
    "id": ((str, int, float), "a string or a number"),
    "prompt": ((str, list), "a string or a list of token ids"),
    "messages": ((list,), 'a list of {"role": …, "content": …}'),
    "max_tokens": ((int,), "an integer"),
    **dict.fromkeys(SAMPLING_FIELDS, ((int, float), "a number")),
    "top_k": ((int,), "an integer"),
    "seed": ((int,), "an integer"),
    "stop": ((str, list), "a string or a list of strings"),
}

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Request:
    """What a line asks for."""

    line: int  # number in the file, from 1
    id: str | float | None
    prompt: str | list[int] | list[Message]
    max_tokens: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]


class Task(NamedTuple):
    """A request that can be computed."""

    request: Request
    ids: list[int]  # of the prompt
    budget: int  # the most new tokens
    stop_ids: frozenset[int] = frozenset()  # tokens that end the text


Tasks = list[Task]
"""Tasks that are always computed together, in one batch."""


def read_requests(content: bytes, defaults: Request) -> tuple[list[Request], dict[int, Result]]:
    """Parse the lines of a file. Return the requests, and an error result for each bad line, by line number.

    defaults: used for fields that a line leaves out; the default seed is its seed plus the line number. Blank lines are
    skipped.
    """
    requests, bad = [], {}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        fields: Any = None
        try:
            fields = _parsed(line)
            requests.append(_request(number, fields, defaults))
        except UserError as error:
            bad[number] = bad_line(number, fields.get("id") if isinstance(fields, dict) else None, error)
    return requests, bad


def bad_line(number: int, id: Any, error: UserError) -> Result:
    """Return the result for a line that cannot be computed."""
    return {"line": number, "id": id if type(id) in FIELDS["id"][0] else None, "error": str(error)}


def _parsed(line: bytes) -> Any:
    """Parse a line. Raises UserError if it is not JSON."""
    try:
        fields = json.loads(line.decode("utf-8"))
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"is not valid UTF-8 at byte {error.start} of the line") from error
    except UnicodeEncodeError as error:  # "\ud800"
        raise UserError("holds half a character (a lone surrogate), which is not text") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON: {in_short(error)}") from error
    return fields


def _request(number: int, fields: Any, defaults: Request) -> Request:
    """Build the request of a line. Raises UserError for fields that are missing, unknown or invalid."""
    given = _given(fields)
    max_tokens = given.get("max_tokens", defaults.max_tokens)
    if max_tokens < 1:
        raise UserError(f"max_tokens should be 1 or more, is {max_tokens}")
    seed = given.get("seed", (defaults.seed + number) % 2**63)
    if not 0 <= seed < 2**63:
        raise UserError(f"seed should be from 0 to 2**63 - 1, is {seed}")
    stop = given.get("stop", list(defaults.stop))
    stop = [stop] if isinstance(stop, str) else stop
    if not all(isinstance(text, str) and text for text in stop):
        raise UserError("stop should be a string or a list of strings, none of them empty")
    try:
        settings = {name: float(given[name]) for name in SAMPLING_FIELDS if name in given and name != "top_k"}
    except OverflowError as error:
        raise UserError(f"a number is too large ({error})") from error
    settings |= {"top_k": given["top_k"]} if "top_k" in given else {}
    sampling = Sampling(**{**asdict(defaults.sampling), **settings})
    return Request(number, given.get("id"), _prompt(given), max_tokens, sampling, seed, tuple(stop))


def _given(fields: Any) -> dict[str, Any]:
    """Return the fields of a line that are not null. Raises UserError for an unknown field or a wrong type."""
    if not isinstance(fields, dict):
        raise UserError(f'should be an object, {{"prompt": …}}, is {in_short(json.dumps(fields))}')
    given = {name: value for name, value in fields.items() if value is not None}
    for name, value in given.items():
        if name not in FIELDS:
            raise UserError(f"{in_short(name)}: there is no such field; there are {', '.join(FIELDS)}")
        types, expected = FIELDS[name]
        if type(value) not in types:
            raise UserError(f"{name} should be {expected}, is {in_short(json.dumps(value, ensure_ascii=False))}")
    return given


def _prompt(given: dict[str, Any]) -> str | list[int] | list[Message]:
    """Return the prompt or the messages. Raises UserError unless a line has exactly one of them."""
    if ("prompt" in given) == ("messages" in given):
        raise UserError("should have a prompt or messages" + (", not both" if "prompt" in given else ""))
    prompt = _messages(given["messages"]) if "messages" in given else given["prompt"]
    if not prompt:
        raise UserError(f"{'messages' if 'messages' in given else 'prompt'} should not be empty")
    if isinstance(given.get("prompt"), list) and any(type(token) is not int for token in prompt):
        raise UserError("prompt should be a string or a list of token ids, holds something else")
    return prompt


def _messages(entries: list[Any]) -> list[Message]:
    """Return the messages. Raises UserError unless they are a dialog that ends with a question."""
    messages = []
    for entry in entries:
        if not isinstance(entry, dict) or entry.keys() != {"role", "content"} or not isinstance(entry["content"], str):
            raise UserError('messages should be a list of {"role": …, "content": …}, with text as content')
        if entry["role"] not in _ROLES:
            raise UserError(f"role should be one of {', '.join(_ROLES)}, is {in_short(json.dumps(entry['role']))}")
        messages.append(Message(**entry))
    if messages and messages[-1].role == "assistant":
        raise UserError("messages should end with the user's, which the model answers")
    return messages


def make_task(
    request: Request,
    chosen: ChosenModel,
    context: int,
    dialog_format: DialogFormat | None,
    stop_ids: frozenset[int] = frozenset(),
) -> Task:
    """Tokenize a request. Raises UserError if the model cannot compute it.

    dialog_format: needed for messages. stop_ids: tokens that end the text besides the model's own.
    """
    tokenizer, prompt = chosen.tokenizer, request.prompt
    if isinstance(prompt, str):
        assert tokenizer is not None  # checked by choose_model
        ids = tokenizer.encode(prompt, bos=True)
    elif isinstance(prompt[0], Message):
        assert dialog_format is not None
        ids = dialog_format.encode(prompt)
        stop_ids |= dialog_format.stop_ids
    else:
        ids = prompt
    chosen.checkpoint.params.check_ids(ids)
    if len(ids) > context:
        raise UserError(f"the prompt has {len(ids)} tokens, the context holds {context}; shorten it")
    return Task(request, ids, min(request.max_tokens, context - len(ids)), stop_ids | chosen.stop_ids)


def group_by_length(tasks: Iterable[Task], size: int) -> list[Tasks]:
    """Group tasks of about the same length, the longest first.

    The groups depend only on the input and the settings, so that a group has the same results whichever process
    computes it. The longest come first: a batch that does not fit fails at once, and several processes finish at about
    the same time.
    """
    ordered = sorted(tasks, key=lambda task: (-len(task.ids), -task.budget, task.request.line))
    return [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]
