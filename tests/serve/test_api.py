"""OpenAI's API, asked by the clients that people use."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import threading
from dataclasses import asdict
from typing import Any

import httpx2 as httpx
import openai
import pytest

from llama3_raw import Model, generate
from llama3_raw.decoding.sampling import Sampling
from llama3_raw.openai_api.answers import Answer, CompletionScores
from tests.decoding.test_batch import PROMPTS

from .live_serving import serving
from .servers import Server

pytestmark = pytest.mark.usefixtures("cpu_kernels")


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def alone(model: Model, prompt: str | list[int], count: int, seed: int | None = None, **sampling: float) -> str:
    """Return what the engine continues a prompt with, with nothing else in its batch."""
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else prompt
    settings = asdict(Sampling(**sampling))  # type: ignore[arg-type]
    return model.tokenizer.decode([*generate(model, ids, max_new_tokens=count, seed=seed, **settings)])


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "llama3_raw"
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.models.retrieve("gpt-9")


def test_completions_are_those_of_a_text_alone(client: openai.OpenAI, tiny: Model) -> None:
    greedy = client.completions.create(model="tiny", prompt=[*PROMPTS], max_tokens=20, temperature=0)
    assert [choice.text for choice in greedy.choices] == [alone(tiny, prompt, 20) for prompt in PROMPTS]
    assert greedy.usage.completion_tokens == 20 * len(PROMPTS)
    sampled = client.completions.create(
        model="tiny", prompt=[2048, 300], max_tokens=20, n=3, seed=7, top_p=0.9, extra_body={"top_k": 50, "min_p": 0.01}
    )
    settings = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "min_p": 0.01}
    assert [choice.text for choice in sampled.choices] == [
        alone(tiny, [2048, 300], 20, seed, **settings) for seed in (7, 8, 9)
    ]


def test_a_stream_is_the_same_text(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": [PROMPTS[0], "é"], "max_tokens": 24, "temperature": 0, "n": 2}
    asked |= {"logprobs": 2, "echo": True, "stop": [" play", "zebra"]}
    whole = client.completions.create(**asked)
    texts = [""] * 4
    scores: list[dict[str, list[Any]]] = [{"tokens": [], "token_logprobs": [], "text_offset": []} for _ in range(4)]
    reasons, usage = {}, None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            for name, values in scores[choice.index].items():
                values += getattr(choice.logprobs, name) if choice.logprobs else []
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert usage == whole.usage
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert reasons[choice.index] == choice.finish_reason
        assert scores[choice.index] == {name: getattr(choice.logprobs, name) for name in scores[0]}
    assert whole.choices[0].text == "Once upon a time, there was a little girl named Lily. She loved to"
    assert whole.choices[0].finish_reason == "stop"


def test_chats(client: openai.OpenAI, tiny: Model) -> None:
    parts = [{"type": "text", "text": "Who is "}, {"type": "text", "text": "Lily?"}]
    asked: dict[str, Any] = {"model": "tiny", "max_completion_tokens": 12, "temperature": 0, "logprobs": True}
    asked |= {"messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": parts}]}
    chat = client.chat.completions.create(**asked, top_logprobs=3)
    (choice,) = chat.choices
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
    assert "".join(bytes(entry.bytes).decode() for entry in choice.logprobs.content) == choice.message.content
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in choice.logprobs.content)  # greedy
    assert {len(entry.top_logprobs) for entry in choice.logprobs.content} == {3}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == choice.message.content
    assert chunks[-2].choices[0].finish_reason == choice.finish_reason
    assert chunks[-1].usage == chat.usage
    streamed = [
        entry for chunk in chunks[:-1] if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.logprob for entry in streamed] == [entry.logprob for entry in choice.logprobs.content]


def test_async_clients_together(server: Server, tiny: Model) -> None:
    """More than there are rows, of unequal length, and none gets another one's text."""

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(number: int) -> str:
                asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPTS[number % 7], "max_tokens": 5 + 3 * number}
                if number % 2:
                    stream = await client.completions.create(**asked, temperature=0, stream=True)
                    return "".join([chunk.choices[0].text async for chunk in stream])
                return str((await client.completions.create(**asked, temperature=0)).choices[0].text)

            return await asyncio.gather(*map(one, range(14)))

    expected = [alone(tiny, PROMPTS[number % 7], 5 + 3 * number) for number in range(14)]
    assert asyncio.run(ask()) == expected


def test_scores_are_those_of_the_engine(client: openai.OpenAI, tiny: Model) -> None:
    """max_tokens 0 scores a prompt; a stop token that ended a text has a score, as lm-eval needs it."""
    from llama3_raw.decoding.scoring import score

    assert tiny.tokenizer is not None
    ids = tiny.tokenizer.encode(PROMPTS[1], bos=True)
    asked: dict[str, Any] = {"model": "tiny", "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
    (choice,) = client.completions.create(**asked).choices
    (expected,) = score(tiny, ids[:3], [ids[3:]])
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[3:] == pytest.approx(expected.logprobs, abs=1e-6)
    assert choice.text == PROMPTS[1]
    assert choice.finish_reason == "length"
    asked = {"model": "tiny", "prompt": "The end.", "max_tokens": 400, "temperature": 0, "logprobs": 0}
    ended = client.completions.create(**asked)
    assert ended.choices[0].finish_reason == "stop"
    assert len(ended.choices[0].logprobs.tokens) == ended.usage.completion_tokens + 1
    assert ended.choices[0].logprobs.tokens[-1] == "<|end_of_text|>"


def test_a_prompt_that_fills_the_context_can_be_scored(client: openai.OpenAI, tiny: Model) -> None:
    from llama3_raw.decoding.scoring import score

    ids = [2048, *range(300, 811)]
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 0, "echo": True, "logprobs": 0}
    (choice,) = client.completions.create(**asked, prompt=ids).choices
    (expected,) = score(tiny, ids[:1], [ids[1:]])
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected.logprobs, abs=0.1)  # other chunks, in bf16
    assert len(choice.logprobs.tokens) == 512


def test_long_scores_keep_no_other_client_waiting(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are written in threads other than that of the event loop."""
    threads = []
    original = CompletionScores.of_prompt

    def seen(self: CompletionScores, answer: Answer) -> Any:
        threads.append(threading.current_thread().name)
        return original(self, answer)

    monkeypatch.setattr(CompletionScores, "of_prompt", seen)
    asked = {"prompt": "Once upon a time", "max_tokens": 0, "echo": True, "logprobs": 20}
    with serving(tiny) as url:
        for stream in (False, True):
            assert httpx.post(f"{url}/v1/completions", json={**asked, "stream": stream}, timeout=60).status_code == 200
    assert [name.partition("_")[0] for name in threads] == ["asyncio"] * 2


def test_curl(server: Server) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("there is no curl here")

    def call(path: str, body: str, *options: str) -> str:
        command = [curl, "-sS", "--no-buffer", *options, f"{server.url}{path}", "-d", body]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    answer = json.loads(call("/v1/completions", '{"prompt": "Once upon a time", "temperature": 0, "max_tokens": 4}'))
    assert answer["choices"][0]["text"] == ", there was a"
    events = call("/v1/completions", '{"prompt": "Once", "stream": true, "max_tokens": 2}').split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events[:-2])
    tokens = json.loads(call("/tokenize", '{"prompt": "Hi<|eot_id|>", "return_token_strs": true}'))
    assert tokens["token_strs"][0] == "<|begin_of_text|>"
    assert tokens["token_strs"][-1] == "<|eot_id|>"
    plain = json.loads(
        call("/tokenize", '{"prompt": "Hi<|eot_id|>", "allow_special": false, "add_special_tokens": false}')
    )
    assert plain["count"] > 2
    assert json.loads(call("/detokenize", json.dumps({"tokens": plain["tokens"]})))["prompt"] == "Hi<|eot_id|>"
    dialog = json.loads(call("/tokenize", '{"messages": [{"role": "user", "content": "Hi"}]}'))
    assert dialog["count"] == 17
    for name in ("add_special_tokens", "allow_special"):
        refused = json.loads(
            call("/tokenize", json.dumps({"messages": [{"role": "user", "content": "a"}], name: False}))
        )
        assert refused["error"]["message"] == f"{name} is for a prompt, not for messages; leave it out"
        assert refused["error"]["param"] == name


REFUSED: dict[str, tuple[str, str, str | None, str]] = {
    "not JSON": ("completions", "{", None, "the body is not JSON: Expecting property name"),
    "HTML": ("completions", "<html><script>alert(1)</script>", None, "the body is not JSON"),
    "not an object": ("completions", "[1]", None, "the body should be a JSON object, is [1]"),
    "too deep": ("completions", "[" * 100_000, None, "the body is not JSON"),
    "a surrogate": ("completions", r'{"prompt": "\ud800"}', None, "the body holds half a character"),
    "no prompt": ("completions", "{}", "prompt", "prompt is missing"),
    "empty": ("completions", '{"prompt": []}', "prompt", "prompt should not be empty"),
    "an empty one": ("completions", '{"prompt": ["a", ""]}', "prompt", "prompt should not be empty"),
    "mixed": ("completions", '{"prompt": [1, "a"]}', "prompt", "prompt should be a string, a list of token ids, or"),
    "a token": ("completions", '{"prompt": [99999]}', "prompt", "prompt: token id 99999 is outside"),
    "too long": ("completions", json.dumps({"prompt": "a b " * 600}), "prompt", "the context holds 512; shorten it"),
    "a full context": (
        "completions",
        json.dumps({"prompt": [1] * 512, "max_tokens": 1}),
        "prompt",
        "the prompt has 512 tokens, the context holds 512; shorten it",
    ),
    "a long dialog": (
        "chat/completions",
        json.dumps({"messages": [{"role": "user", "content": "a b " * 600}]}),
        "messages",
        "tokens, the context holds 512; shorten them",
    ),
    "suffix": ("completions", '{"prompt": "a", "suffix": "b"}', "suffix", 'suffix is not supported, other than ""'),
    "best_of": ("completions", '{"prompt": "a", "best_of": 2}', "best_of", "best_of is not supported, other than 1"),
    "a penalty": (
        "completions",
        '{"prompt": "a", "presence_penalty": 0.5}',
        "presence_penalty",
        "presence_penalty is not supported, other than 0, is 0.5",
    ),
    "many prompts": (
        "completions",
        json.dumps({"prompt": ["a"] * 20_000}),
        "prompt",
        "prompt should be at most 128 texts, are 20000",
    ),
    "many texts": ("completions", '{"prompt": ["a", "b"], "n": 65}', "n", "n should be from 1 to 128"),
    "messages": (
        "completions",
        '{"prompt": "a", "messages": []}',
        "messages",
        "messages is not a field of a completion",
    ),
    "many scores": ("completions", '{"prompt": "a", "logprobs": 21}', "logprobs", "logprobs should be from 0 to 20"),
    "true": ("completions", '{"prompt": "a", "logprobs": true}', "logprobs", "logprobs should be an integer, is true"),
    "unknown": (
        "completions",
        '{"prompt": "a", "promt": 1}',
        "promt",
        "promt: there is no such field; there are prompt",
    ),
    "cold": ("completions", '{"prompt": "a", "temperature": -1}', "temperature", "temperature should be 0 (greedy) or"),
    "huge": ("completions", '{"prompt": "a", "top_p": 1' + "0" * 400 + "}", "top_p", "top_p is too large a number"),
    "seed": ("completions", '{"prompt": "a", "seed": 9223372036854775808}', "seed", "seed should be from -2**63 to 2*"),
    "stops": ("completions", json.dumps({"prompt": "a", "stop": ["b"] * 17}), "stop", "stop should be at most 16"),
    "usage": (
        "completions",
        '{"prompt": "a", "stream_options": {"include_usage": true}}',
        "stream_options",
        "needs stream",
    ),
    "model": (
        "completions",
        '{"prompt": "a", "model": "gpt-9"}',
        "model",
        'there is no model "gpt-9" here; there is tiny',
    ),
    "prompt": ("chat/completions", '{"messages": [], "prompt": "a"}', "prompt", "prompt is not a field of a chat"),
    "no messages": ("chat/completions", '{"messages": []}', "messages", "messages should not be empty"),
    "tool": (
        "chat/completions",
        '{"messages": [{"role": "tool", "content": "a"}]}',
        "messages",
        "role should be one of",
    ),
    "developer": (
        "chat/completions",
        '{"messages": [{"role": "developer", "content": "a"}]}',
        "messages",
        'messages: role should be one of system, user, assistant, is "developer"',
    ),
    "an image": (
        "chat/completions",
        '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
        "messages",
        'messages should have parts such as {"type": "text", "text": …}, not of type "image_url"',
    ),
    "a name": (
        "chat/completions",
        '{"messages": [{"role": "user", "content": "a", "name": "b"}]}',
        "messages",
        "messages: name of a message is not supported; leave it out",
    ),
    "tools": ("chat/completions", '{"messages": [], "tools": [{}]}', "tools", "tools is not supported, other than []"),
    "JSON mode": (
        "chat/completions",
        '{"messages": [], "response_format": {"type": "json_object"}}',
        "response_format",
        "response_format is not supported, other than",
    ),
    "effort": (
        "chat/completions",
        '{"messages": [], "reasoning_effort": "low"}',
        "reasoning_effort",
        "is not supported",
    ),
    "top without scores": (
        "chat/completions",
        '{"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}',
        "top_logprobs",
        "top_logprobs needs logprobs: true",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(server: Server, case: str) -> None:
    path, body, param, message = REFUSED[case]
    answer = httpx.post(f"{server.url}/v1/{path}", content=body, timeout=60)
    assert answer.status_code == (404 if case == "model" else 400)
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["code"] == ("model_not_found" if case == "model" else None)
    assert message in error["message"]
    assert len(error["message"]) < 700
    assert error["message"].isprintable()


def test_fields_that_change_nothing(server: Server) -> None:
    asked = {"prompt": "Once upon a time", "max_tokens": 3, "temperature": 0}
    more = {"user": "me", "metadata": {"a": "b"}, "store": True, "suffix": None, "best_of": 1, "frequency_penalty": 0.0}
    more |= {"logit_bias": {}, "presence_penalty": 0, "service_tier": "auto", "n": None, "stop": None, "top_p": 1}
    texts = [httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"] for body in (asked, asked | more)]
    assert texts[0] == texts[1]
    dialog = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    dialog |= {"logprobs": False, "top_logprobs": 0}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=dialog).status_code == 200


def test_a_negative_seed_is_one_like_any_other(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 8}
    texts = [choice.text for choice in client.completions.create(**asked, seed=-2, n=3).choices]
    alone = [client.completions.create(**asked, seed=seed).choices[0].text for seed in (-2, -1, 0)]
    assert texts == alone
    assert len(set(texts)) > 1


@pytest.mark.filterwarnings("ignore")
def test_lm_eval(server: Server, tiny: Model) -> None:
    """lm-eval's own client of such servers gets the log-likelihoods of this engine, and its texts.

    It takes tokens from the server, and gives no text a begin-of-text, so here the texts have one.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from llama3_raw.backends.choose import ops_for
    from llama3_raw.evaluate.harness import Adapter

    there = LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model="tiny", max_length=512, num_concurrent=1)
    here = Adapter(tiny, ops_for(tiny.weights), 512, 4)
    begin = "<|begin_of_text|>"
    pairs = [
        (begin + " ".join(words[:3]), " " + " ".join(words[3:7])) for words in map(str.split, PROMPTS) if len(words) > 4
    ]
    assert len(pairs) >= 3

    def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
        return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]

    asked = instances("loglikelihood", pairs)
    theirs, ours = there.loglikelihood(asked), here.loglikelihood(asked)
    assert [greedy for _, greedy in theirs] == [greedy for _, greedy in ours]
    assert [value for value, _ in theirs] == pytest.approx([value for value, _ in ours], abs=1e-4)
    settings = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    asked = instances("generate_until", [(prompt, settings) for prompt, _ in pairs])
    assert there.generate_until(asked) == here.generate_until(asked)
