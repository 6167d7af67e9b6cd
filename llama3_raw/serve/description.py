"""The description of the API, in OpenAPI, which `/openapi.json` returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..openai_api.fields import DETOKENIZE, HARMLESS, NEUTRAL, TOKENIZE, USED, Field, Kind
from ..system.version import VERSION

Schema = dict[str, Any]

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}

_REFUSALS = {
    "400": "a field is wrong, missing or not supported",
    "401": "the key is missing or wrong",
    "403": "a page of another origin asks",
    "404": "there is no such model",
    "405": "the method is another one",
    "408": "the answer or the body took too long",
    "413": "the body is too large",
    "421": "the Host header names another host",
    "429": "too many texts wait",
}


def describe() -> Schema:
    """Return the description."""
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    completion, chat = (
        _object(USED[kind], ("prompt",) if kind == "completion" else ("messages",), kind) for kind in USED
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "llama3_raw", "version": VERSION},
        "paths": {
            "/v1/models": {"get": _operation("The model.", "object")},
            "/v1/models/{name}": {"get": {**_operation("The model.", "object"), "parameters": [name]}},
            "/v1/completions": {"post": _operation("Continue a text.", "object", completion)},
            "/v1/chat/completions": {"post": _operation("Answer a dialog.", "object", chat)},
            "/tokenize": {"post": _operation("The tokens of a text.", "object", _object(TOKENIZE))},
            "/detokenize": {"post": _operation("The text of tokens.", "object", _object(DETOKENIZE, ("tokens",)))},
            "/tokenizer_info": {"get": _operation("Names of special tokens.", "object")},
            "/health": {"get": _operation("Whether the server is up.", "object")},
        },
    }


def _operation(summary: str, returns: str, body: Schema | None = None) -> Schema:
    content = {"application/json": {"schema": {"type": returns}}}
    if body and "stream" in body["properties"]:
        content["text/event-stream"] = {"schema": {"type": "object"}}  # of an event
    operation: Schema = {
        "summary": summary,
        "responses": {
            "200": {"description": "the answer", "content": content},
            **{
                status: {"description": why, "content": {"application/json": {"schema": _ERROR}}}
                for status, why in _REFUSALS.items()
            },
        },
    }
    if body:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return operation


def _object(used: Mapping[str, Field], required: tuple[str, ...] = (), kind: Kind | None = None) -> Schema:
    properties: Schema = {
        name: {"anyOf": [field.schema, {"type": "null"}]} if name not in required else field.schema
        for name, field in used.items()
    }
    if kind:
        properties |= {name: {} for name in HARMLESS}
        properties |= {name: {"enum": [*values, None]} for name, values in NEUTRAL.items()}
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}
