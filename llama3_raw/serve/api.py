"""OpenAI's API: models, completions, chats; and tokens, as vLLM's server has them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..chat.dialog import DialogFormat
from ..chat.formats import format_of
from ..decoding.batch import Row
from ..decoding.loop import StopReason, tokens_to_stop_at
from ..decoding.sampling import Sampling
from ..errors import UserError, in_short
from ..openai_api import answers
from ..openai_api.answers import Answer, Body
from ..openai_api.fields import DETOKENIZE, OF_PROMPT, TOKENIZE, Kind, check_fields, shown
from ..openai_api.requests import Defaults, Request, check_prompts, encoded, parse_request, parsed, rows
from ..tokenizer import TextPieces, Tokenizer
from .description import describe
from .engine import Asked, Closed, Engine, Job
from .guard import LARGE_BODY, Settings, TimedStream, error_body

Result = TypeVar("Result")

_DEFAULTS: dict[Kind, Defaults] = {  # OpenAI's
    "completion": Defaults(16, Sampling(temperature=1.0)),
    "chat": Defaults(None, Sampling(temperature=1.0)),
}


class NoSuchModel(HTTPException):
    """A request names another model."""

    def __init__(self, message: str):
        super().__init__(404, message)


class TimedOut(HTTPException):
    """An answer took too long."""

    def __init__(self, seconds: float):
        super().__init__(
            408, f"the answer took longer than {seconds:g} s; ask for fewer tokens, or start the server with --timeout"
        )


class Api:
    """The endpoints, by path and method."""

    def __init__(self, engine: Engine, settings: Settings):
        """Raises UserError for a model without a tokenizer, and for a template that cannot be used."""
        if engine.model.tokenizer is None:
            raise UserError("the model has no tokenizer, which the server needs; give {argument}", argument="tokenizer")
        self._engine, self._settings, self._tokenizer = engine, settings, engine.model.tokenizer
        self._started = int(time.time())
        self._stop_ids = frozenset(tokens_to_stop_at(engine.model, None)) | settings.stop_ids
        try:
            self._format: DialogFormat | None = format_of(self._tokenizer, settings.template)
        except UserError:  # a base model of another family: it completes, and has no chat
            if settings.template is not None:
                raise
            self._format = None

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route("/tokenizer_info", self._tokenizer_info),
            Route("/openapi.json", self._openapi),
        ]

    def _model_body(self) -> Body:
        context = self._engine.context
        return {
            "id": self._engine.name,
            "object": "model",
            "created": self._started,
            "owned_by": "llama3_raw",
            "max_model_len": context,
        }

    async def _models(self, request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_body()]})

    async def _model(self, request: HttpRequest) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_body())

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._engine.name:
            raise NoSuchModel(f"there is no model {shown(name)} here; there is {self._engine.name}")

    async def _completions(self, request: HttpRequest) -> Response:
        return await self._complete(request, "completion")

    async def _chat(self, request: HttpRequest) -> Response:
        return await self._complete(request, "chat")

    async def _complete(self, request: HttpRequest, kind: Kind) -> Response:
        """Answer a request, as a whole or as a stream."""
        fields = await self._fields(request)
        asked, texts = await asyncio.to_thread(self._read, fields, kind)
        self._check_model(asked.model)
        running = self._engine.submit(texts, n_top=asked.n_top, with_prompt=asked.echo, streams=asked.stream)
        if asked.stream:
            events = self._events(asked, running)
            return TimedStream(events, "text/event-stream", self._settings.timeout, {"Cache-Control": "no-store"})
        try:
            await self._while_connected(request, running.end())
        finally:
            running.is_gone = True
        return await asyncio.to_thread(self._whole, asked, running)

    def _whole(self, asked: Request, running: Asked) -> Response:
        """Return an answer. It runs in a thread, because the scores of a long prompt take a while."""
        ended = [_answer(job) for job in running.jobs]
        return JSONResponse(answers.whole(asked, ended, self._tokenizer, self._engine.name))

    def _read(self, fields: Body, kind: Kind) -> tuple[Request, list[Row]]:
        """Read a request. It runs in a thread, because a long text takes a while. Raises UserError."""
        asked = parse_request(fields, kind, _DEFAULTS[kind])
        dialog_format = self._dialog_format() if kind == "chat" else None
        stop_ids = self._stop_ids | (dialog_format.stop_ids if dialog_format else frozenset())
        prompts = encoded(asked, self._tokenizer, dialog_format)
        check_prompts(asked, prompts, self._engine.model.params, self._engine.context)
        return asked, rows(asked, prompts, self._tokenizer, stop_ids, self._engine.context)

    def _dialog_format(self) -> DialogFormat:
        if self._format is None:
            raise UserError("the model has no dialog format; start the server with --template, or use /v1/completions")
        return self._format

    async def _fields(self, request: HttpRequest) -> Body:
        """Return the object in the body. Raises UserError if it is none."""
        content = await request.body()
        try:
            fields = await asyncio.to_thread(parsed, content) if len(content) > LARGE_BODY else parsed(content)
        except UserError as error:
            raise UserError(f"the body {error}") from error
        if not isinstance(fields, dict):
            raise UserError(f"the body should be a JSON object, is {shown(fields)}")
        return fields

    async def _while_connected(self, request: HttpRequest, work: Awaitable[Result]) -> Result:
        """Return the result of the work. Raises TimedOut, and HTTPException if the client goes away."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(request.receive())  # after the body, that the client has gone
        try:
            await asyncio.wait({task, gone}, timeout=self._settings.timeout, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise HTTPException(499, "the client went away") if gone.done() else TimedOut(self._settings.timeout)
        finally:
            task.cancel()
            gone.cancel()

    async def _events(self, asked: Request, running: Asked) -> AsyncIterator[str]:
        """Yield server-sent events: chunks of the texts as they grow, the usage if asked for, and [DONE]."""
        head = answers.head(asked, self._engine.name, is_chunk=True)
        if asked.include_usage:
            head["usage"] = None
        texts = [_Streamed(asked, number, job, self._tokenizer) for number, job in enumerate(running.jobs)]

        def grown() -> list[str]:
            return [_event({**head, "choices": [choice]}) for text in texts for choice in text.choices()]

        has_scored_prompt = asked.echo and asked.n_top is not None  # which takes long to write
        progress = running.progress()
        deadline = time.monotonic() + self._settings.timeout
        try:
            while True:
                try:
                    await asyncio.wait_for(anext(progress), deadline - time.monotonic())
                except StopAsyncIteration:
                    break
                except asyncio.TimeoutError:
                    raise TimedOut(self._settings.timeout) from None
                for event in await asyncio.to_thread(grown) if has_scored_prompt else grown():
                    yield event
            if asked.include_usage:
                usage = answers.usage(asked, [_answer(job) for job in running.jobs])
                yield _event({**head, "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield _event(_failure(error))
        finally:
            running.is_gone = True

    async def _tokenize(self, request: HttpRequest) -> Response:
        return await asyncio.to_thread(self._tokens, await self._fields(request))

    def _tokens(self, fields: Body) -> Response:
        """Return the tokens of a text. It runs in a thread, because a long one takes a while."""
        fields = check_fields(fields, TOKENIZE)
        if ("prompt" in fields) == ("messages" in fields):
            raise UserError("should have a prompt or messages" + (", not both" if "prompt" in fields else ""))
        self._check_model(fields.get("model"))
        if "messages" in fields:
            for name in OF_PROMPT:
                if name in fields:
                    raise UserError("is for a prompt, not for messages; leave it out", argument=name)
            asked = parse_request({"messages": fields["messages"]}, "chat", _DEFAULTS["chat"])
            (ids,) = encoded(asked, self._tokenizer, self._dialog_format())
        else:
            begins, allow_special = (fields.get(name, True) for name in OF_PROMPT)
            ids = self._tokenizer.encode(fields["prompt"], bos=begins, allow_special=allow_special)
        names = (
            {"token_strs": [self._tokenizer.name(token) for token in ids]} if fields.get("return_token_strs") else {}
        )
        return JSONResponse({"count": len(ids), "max_model_len": self._engine.context, "tokens": ids, **names})

    async def _detokenize(self, request: HttpRequest) -> Response:
        return await asyncio.to_thread(self._text, await self._fields(request))

    def _text(self, fields: Body) -> Response:
        """Return the text of tokens, in a thread, too."""
        fields = check_fields(fields, DETOKENIZE)
        self._check_model(fields.get("model"))
        ids = fields.get("tokens")
        if ids is None or any(type(token) is not int for token in ids):
            raise UserError("should be a list of token ids", argument="tokens")
        self._engine.model.params.check_ids(ids)
        return JSONResponse({"prompt": self._tokenizer.decode(ids)})

    async def _tokenizer_info(self, request: HttpRequest) -> Response:
        names = {name: self._tokenizer.template_variables.get(name) for name in ("bos_token", "eos_token")}
        return JSONResponse({**names, "chat_template": self._tokenizer.chat_template})

    async def _openapi(self, request: HttpRequest) -> Response:
        return JSONResponse(describe())


class _Streamed:
    """A text of a stream."""

    def __init__(self, asked: Request, number: int, job: Job, tokenizer: Tokenizer):
        self._asked, self._number, self._job, self._tokenizer = asked, number, job, tokenizer
        self._pieces = TextPieces(tokenizer, asked.stop)
        self._scores = answers.CompletionScores(tokenizer)
        self._count = 0  # tokens that were sent
        self._has_begun = self._is_over = False

    def choices(self) -> Iterator[Body]:
        """Yield what is new, as choices of chunks; at the end, the reason."""
        if self._is_over:
            return
        reason = self._job.ended  # asked before the tokens, which are all there then
        new = self._job.new[self._count :]
        if not (new or reason):
            return
        if not self._has_begun:
            self._has_begun = True
            yield from self._beginning()
        if self._asked.max_tokens != 0:
            text = "".join(map(self._pieces.push, new)) + (self._pieces.rest() if reason else "")
            scores = self._new_scores(len(new), is_last=reason is not None)
            self._count += len(new)
            if text or scores:
                yield self._choice(text, scores)
        if reason is not None:
            self._is_over = True
            yield self._choice("", None, answers.finish_reason(_answer(self._job).reason))

    def _beginning(self) -> Iterator[Body]:
        """Yield the role of a chat, or the prompt of a completion with `echo`."""
        if self._asked.kind == "chat":
            delta = {"role": "assistant", "content": ""}
            yield {"index": self._number, "delta": delta, "logprobs": None, "finish_reason": None}
        elif self._asked.echo:
            answer = _answer(self._job, is_over=False)
            scores = self._scores.of_prompt(answer) if self._asked.n_top is not None else None
            yield self._choice(answers.echoed(self._asked, answer.prompt, self._tokenizer), scores)

    def _new_scores(self, count: int, is_last: bool) -> Body | None:
        """Return the scores of `count` new tokens; a completion's last ones have that of a stop token, too."""
        if self._job.scored is None:
            return None
        is_chat = self._asked.kind == "chat"
        end = None if is_last and not is_chat else self._count + count
        scores = self._job.scored.new[self._count : end]
        if not scores:
            return None
        if is_chat:
            return answers.chat_logprobs(scores, self._tokenizer)
        return self._scores.of_new(scores)

    def _choice(self, text: str, scores: Body | None, reason: str | None = None) -> Body:
        ends = {"logprobs": scores, "finish_reason": reason}
        if self._asked.kind == "chat":
            return {"index": self._number, "delta": {"content": text} if text else {}, **ends}
        return {"index": self._number, "text": text, **ends}


def _failure(error: Exception) -> Body:
    """Return an error as the last event of a stream."""
    if isinstance(error, HTTPException):
        return error_body(error.status_code, error.detail)
    if isinstance(error, Closed):
        return error_body(503, str(error))
    return error_body(500, f"the text could not be computed: {in_short(error)}")


def _event(body: Body) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _answer(job: Job, is_over: bool = True) -> Answer:
    """Return a text that has ended, or its prompt. Raises HTTPException if its logits are not numbers."""
    reason = job.ended if is_over else StopReason.END_TOKEN
    assert isinstance(reason, StopReason)
    if reason is StopReason.NOT_NUMBERS:
        raise HTTPException(500, reason.value)
    scored = job.scored
    return Answer(job.row.ids, job.new, reason, scored.prompt if scored else (), scored.new if scored else ())
