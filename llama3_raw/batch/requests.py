"""The lines of a file of prompts, and the results of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..chat.dialog import DialogFormat
from ..cli.models import ChosenModel
from ..decoding.batch import Row
from ..errors import UserError
from ..openai_api import answers
from ..openai_api.answers import Answer
from ..openai_api.fields import Kind, shown
from ..openai_api.requests import Defaults, Request, check_prompts, encoded, parse_request, parsed, rows
from ..tokenizer import Tokenizer

Result = dict[str, Any]
"""A line of the output."""

_KINDS: dict[str, Kind] = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}

_WRAPPED = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True)
class Line:
    """A line of the file.

    number: in the file, from 1. id: its id or custom_id. is_wrapped: whether it is one of OpenAI's batch files, with
    the request as its body; the result is one of theirs, too.
    """

    number: int
    id: Any
    is_wrapped: bool
    request: Request


class Task(NamedTuple):
    """A line that can be computed."""

    line: Line
    prompts: list[list[int]]
    budget: int  # the most new tokens of a text
    stop_ids: frozenset[int] = frozenset()  # tokens that end a text

    @property
    def length(self) -> int:
        """The tokens of the longest prompt."""
        return max(map(len, self.prompts))

    @property
    def n_rows(self) -> int:
        """The number of texts."""
        return len(self.prompts) * self.line.request.n

    def rows(self, tokenizer: Tokenizer | None) -> list[Row]:
        """Return the texts as rows of a batch."""
        return rows(self.line.request, self.prompts, tokenizer, self.stop_ids, self.length + self.budget)


Tasks = list[Task]
"""Tasks that are always computed together, in one batch."""


def read_lines(content: bytes, defaults: Defaults) -> tuple[list[Line], dict[int, Result]]:
    """Parse the lines of a file. Return them, and an error result for each bad line, by line number.

    defaults: for fields that a line leaves out; the default seed is its seed plus the line number. Blank lines are
    skipped.
    """
    lines, bad = [], {}
    for number, text in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not text.strip():
            continue
        fields: Any = None
        try:
            fields = parsed(text)
            lines.append(_line(number, fields, defaults._replace(seed=((defaults.seed or 0) + number) % 2**63)))
        except UserError as error:
            bad[number] = bad_line(number, *_identity(fields), error)
    return lines, bad


def bad_line(number: int, id: Any, is_wrapped: bool, error: UserError) -> Result:
    """Return the result for a line that cannot be computed."""
    if is_wrapped:
        return {"line": number, "custom_id": id, "response": None, "error": {"code": None, "message": str(error)}}
    return {"line": number, "id": id, "error": str(error)}


def _identity(fields: Any) -> tuple[Any, bool]:
    """Return the id of a line, or None if it is none, and whether the line is one of OpenAI's batch files."""
    if not isinstance(fields, dict):
        return None, False
    is_wrapped = "body" in fields or "custom_id" in fields
    id = fields.get("custom_id" if is_wrapped else "id")
    return id if type(id) in (str, int, float) else None, is_wrapped


def _line(number: int, fields: Any, defaults: Defaults) -> Line:
    """Build a line. Raises UserError for fields that are missing, unknown or invalid."""
    if not isinstance(fields, dict):
        raise UserError(f'should be an object, {{"prompt": …}}, is {shown(fields)}')
    id, is_wrapped = _identity(fields)
    if is_wrapped:
        kind, body = _unwrapped(fields)
    else:
        if id is None and fields.get("id") is not None:
            raise UserError(f"id should be a string or a number, is {shown(fields['id'])}")
        body = {name: value for name, value in fields.items() if name != "id" and value is not None}
        if "prompt" in body and "messages" in body:
            raise UserError("should have a prompt or messages, not both")
        kind = "chat" if "messages" in body else "completion"
        if not body:
            raise UserError("should have a prompt or messages")
    request = parse_request(body, kind, defaults)
    if request.stream:
        raise UserError("is for the server; leave it out", argument="stream")
    return Line(number, id, is_wrapped, request)


def _unwrapped(fields: dict[str, Any]) -> tuple[Kind, dict[str, Any]]:
    """Return what a line of OpenAI's batch files asks for."""
    if fields.keys() != _WRAPPED or type(fields["custom_id"]) is not str or type(fields["body"]) is not dict:
        raise UserError('should be {"custom_id": "…", "method": "POST", "url": "/v1/…", "body": {…}}, and no more')
    if fields["method"] != "POST":
        raise UserError(f"method should be POST, is {shown(fields['method'])}")
    if type(fields["url"]) is not str or fields["url"] not in _KINDS:
        raise UserError(f"url should be {' or '.join(_KINDS)}, is {shown(fields['url'])}")
    return _KINDS[fields["url"]], fields["body"]


def make_task(
    line: Line,
    chosen: ChosenModel,
    context: int,
    dialog_format: DialogFormat | None,
    stop_ids: frozenset[int] = frozenset(),
) -> Task:
    """Tokenize a line. Raises UserError if the model cannot compute it.

    dialog_format: needed for messages. stop_ids: tokens that end the text besides the model's own.
    """
    request, name = line.request, model_name(chosen)
    if request.model not in (None, name):
        raise UserError(f"is {shown(request.model)}, and this run has the model {name}; leave it out", argument="model")
    if request.messages:
        assert dialog_format is not None
        stop_ids |= dialog_format.stop_ids
    prompts = encoded(request, chosen.tokenizer, dialog_format)
    check_prompts(request, prompts, chosen.checkpoint.params, context)
    budget = min(request.budget or context, max(context - max(map(len, prompts)), 1))
    return Task(line, prompts, budget, stop_ids | chosen.stop_ids)


def model_name(chosen: ChosenModel) -> str:
    """Return the name that requests and answers have for a model."""
    return chosen.folder.path.resolve().name


def result_of(task: Task, ended: Sequence[Answer], tokenizer: Tokenizer | None, model: str) -> Result:
    """Return the result of a line whose texts have all ended."""
    line, request = task.line, task.line.request
    if tokenizer is None:
        choices = [{"tokens": [*one.new], "finish_reason": answers.finish_reason(one.reason)} for one in ended]
    else:
        choices = [answers.choice(request, number, one, tokenizer) for number, one in enumerate(ended)]
    usage = answers.usage(request, ended)
    if line.is_wrapped:
        # neither a random id nor the time, so that a run that is continued writes the same bytes
        head = answers.head(request, model, number=line.number, created=0)
        body = {**head, "choices": choices, "usage": usage}
        return {"custom_id": line.id, "response": {"status_code": 200, "body": body}, "error": None}
    del usage["total_tokens"]
    texts = [_flat(choice, request) for choice in choices]
    return {"id": line.id, **(texts[0] if len(texts) == 1 else {"choices": texts}), "usage": usage}


def _flat(choice: dict[str, Any], request: Request) -> dict[str, Any]:
    """Return a choice with its text first, and scores only if they were asked for."""
    text = {"text": choice["message"]["content"]} if "message" in choice else {}
    kept = ("text", "tokens", "finish_reason", *(("logprobs",) if request.n_top is not None else ()))
    return {**text, **{name: choice[name] for name in kept if name in choice}}


def group_by_length(tasks: Iterable[Task], size: int) -> list[Tasks]:
    """Group tasks of about the same length, the longest first, with at most `size` texts, or a single task.

    The groups depend only on the input and the settings, so that a group has the same results whichever process
    computes it. The longest come first: a batch that does not fit fails at once, and several processes finish at about
    the same time.
    """
    groups: list[Tasks] = []
    n_rows = size
    for task in sorted(tasks, key=lambda task: (-task.length, -task.budget, task.line.number)):
        if n_rows + task.n_rows > size:
            groups.append([])
            n_rows = 0
        groups[-1].append(task)
        n_rows += task.n_rows
    return groups
