"""What the live page asks the server for: each number compared with a trace, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
import torch
from torch import Tensor

import llama3_raw
from llama3_raw import Model, forward, trace
from llama3_raw.cli.models import choose_model
from llama3_raw.params import Params
from llama3_raw.serve import live, live_pass
from llama3_raw.serve.__main__ import load_python
from llama3_raw.serve.engine import Busy, Engine
from llama3_raw.serve.live_pass import PassRequest, Report, run_pass
from llama3_raw.serve.parser import build_parser
from llama3_raw.tracing import plots
from tests.paths import TINY
from tests.serve.live_serving import serving

TEXT, OTHER = "Once upon a time, there was a", "Once upon a time, there was the"


@pytest.fixture(scope="module")
def url(tiny: Model) -> Iterator[str]:
    with serving(tiny) as address:
        yield address


def ids_of(model: Model, text: str = TEXT) -> list[int]:
    assert model.tokenizer is not None
    return model.tokenizer.encode(text, bos=True)


def ask(url: str, **request: Any) -> list[dict[str, Any]]:
    """Return the lines of the answer to a pass."""
    return [json.loads(line) for line in httpx2.post(f"{url}/live/pass", json=request, timeout=60).iter_lines()]


def result_of(url: str, **request: Any) -> dict[str, Any]:
    result: dict[str, Any] = ask(url, **request)[-1]["result"]
    return result


def floats(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)


def test_the_logits_are_those_of_forward(tiny: Model, url: str) -> None:
    ids = ids_of(tiny)
    result = result_of(url, ids=ids)
    with torch.no_grad():
        logits = forward(tiny.weights, tiny.params, torch.tensor(ids))[-1]
    assert torch.equal(floats(result["logits"]), logits)
    assert [token["id"] for token in result["top"]] == plots.most_likely(logits, 10).tolist()
    assert set(result) == {"logits", "tokens", "top"}  # only what was asked for


def test_the_lens_and_the_attention_are_those_of_a_trace(tiny: Model, url: str) -> None:
    ids = ids_of(tiny)
    result = result_of(url, ids=ids, lens=True, attention=2)
    kept = trace(tiny, ids)
    lens = plots.read_logit_lens(kept, tiny)
    assert result["lens"]["ids"] == lens.ids.tolist()
    assert torch.equal(torch.tensor(result["lens"]["probs"]), lens.probs)
    assert {token["id"] for token in result["lens"]["tokens"]} == set(lens.ids.flatten().tolist())
    rows, columns = torch.tril_indices(len(ids), len(ids))
    probs = kept["layers.2.attention.probs"][:, rows, columns].float()
    assert torch.equal(floats(result["attention"]).view_as(probs), probs)


def test_changes_do_what_a_tap_by_hand_does(tiny: Model, url: str) -> None:
    """Two heads and an MLP off, two layers scaled, and two rows patched, one of them into a scaled layer."""
    ids, other = ids_of(tiny), ids_of(tiny, OTHER)
    source = trace(tiny, other)

    def by_hand(name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        if name == "layers.1.attention.heads":
            tensor[:, 2], tensor[:, 5] = 0, 0
        elif name == "layers.0.feed_forward.out":
            tensor[:] = 0
        elif name == "layers.1.residual":
            tensor *= 0.5
        elif name == "layers.2.residual":
            tensor *= 1.5
            tensor[4] = source[name][3]
        elif name == "tok_embeddings":
            tensor[8] = source[name][8]
        return tensor

    changes = {"heads": [[1, 5], [1, 2]], "feed_forward": [0], "scales": [[1, 0.5], [2, 1.5]], "other": other}
    changes["patches"] = [[3, 3, 4], [0, 8, 8]]
    expected = trace(tiny, ids, tap=by_hand)
    result = result_of(url, ids=ids, changes=changes, lens=True, attention=3)
    assert torch.equal(floats(result["logits"]), expected["logits"][-1])
    assert result["lens"]["ids"] == plots.read_logit_lens(expected, tiny).ids.tolist()
    assert not torch.equal(expected["logits"], trace(tiny, ids, "logits")["logits"])


def test_a_pass_leaves_nothing_behind(tiny: Model, url: str) -> None:
    """Each request has the answer that it gets alone, whatever was asked before or is asked at the same time."""
    prompts = [ids_of(tiny, f"Once upon a time there were {number} cats and a") for number in range(20)]
    requests = [{"ids": ids, "changes": {"heads": [[i % 4, i % 6]]} if i % 2 else {}} for i, ids in enumerate(prompts)]
    alone = [result_of(url, **request) for request in requests]

    async def together() -> list[dict[str, Any]]:
        async with httpx2.AsyncClient(timeout=60) as client:
            answers = await asyncio.gather(*(client.post(f"{url}/live/pass", json=it) for it in requests))
        return [json.loads(answer.text.splitlines()[-1])["result"] for answer in answers]

    assert asyncio.run(together()) == alone
    assert len({result["logits"] for result in alone}) == 20


def test_tokens_have_ids_text_and_bytes(tiny: Model, url: str) -> None:
    tokenizer = tiny.tokenizer
    assert tokenizer is not None
    text = "Tom <b>had</b>\n🙂 <|end_of_text|>"
    tokens = httpx2.post(f"{url}/live/tokens", json={"text": text}).json()["tokens"]
    assert [token["id"] for token in tokens] == tokenizer.encode(text, bos=True)
    assert tokens[0] == {"id": tokenizer.bos_id, "text": "<|begin_of_text|>", "bytes": ""}
    assert b"".join(bytes.fromhex(token["bytes"]) for token in tokens) == text.encode()
    assert {"\\xf0", "\\x9f"} <= {token["text"] for token in tokens}  # bytes of a character in several tokens


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("[]", "the body should be a JSON object"),
        ("{", "the body should be a JSON object"),
        ('{"ids": "1"}', "ids should be a list of token ids"),
        ('{"ids": []}', "the prompt is empty; give at least one token"),
        ('{"ids": [2304]}', "ids should hold integers from 0 to 2303, holds 2304"),
        ('{"ids": [true]}', "ids should hold integers"),
        ('{"ids": [1], "temperature": 1}', "'temperature' is not one of ids, changes, lens, attention"),
        ('{"ids": [1], "lens": 1}', "lens should be true or false"),
        ('{"ids": [1], "attention": 4}', "attention should hold integers from 0 to 3, holds 4"),
        ('{"ids": [1], "changes": []}', "changes should be a JSON object"),
        ('{"ids": [1], "changes": {"head": []}}', "'head' is not one of heads,"),
        ('{"ids": [1], "changes": {"heads": [[0]]}}', "heads should be a list of lists of 2 numbers"),
        ('{"ids": [1], "changes": {"heads": [[0, 6]]}}', "heads should hold integers from 0 to 5, holds 6"),
        ('{"ids": [1], "changes": {"feed_forward": [-1]}}', "feed_forward should hold integers from 0 to 3"),
        ('{"ids": [1], "changes": {"scales": [[0, NaN]]}}', "scales should hold factors from -10.0 to 10.0"),
        ('{"ids": [1], "changes": {"patches": [[0, 0, 0]]}}', "patches need `other`"),
        *(
            (
                json.dumps({"ids": [1], "changes": {name: [entry] * (most + 1), "other": [1]}}),
                f"{name} should have at most {most} entries, has {most + 1}",
            )
            for name, entry, most in (
                ("heads", [0, 0], 4 * 6),
                ("feed_forward", 0, 4),
                ("scales", [0, 1], 4),
                ("patches", [0, 0, 0], 5 * 128),
            )
        ),
        ('{"ids": [1], "changes": {"patches": [[0, 0, 1]], "other": [1]}}', "patches should hold integers from 0"),
    ],
)
def test_a_wrong_request_gets_one_line(url: str, body: str, complaint: str) -> None:
    answer = httpx2.post(f"{url}/live/pass", content=body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith(complaint)
    assert "\n" not in message


def test_a_prompt_that_is_too_long_is_refused(tiny: Model, url: str) -> None:
    (line,) = ask(url, ids=[1] * 129)
    assert line["error"]["message"] == "ids has 129 tokens, but the page takes 128; shorten the prompt"
    assert "result" in ask(url, ids=[1] * 128)[-1]
    answer = httpx2.post(f"{url}/live/tokens", json={"text": "a" * 100_000})
    assert answer.status_code == 400


def test_of_several_patches_of_a_row_the_last_one_counts(tiny: Model, url: str) -> None:
    ids, other = ids_of(tiny), ids_of(tiny, OTHER)
    rows = [[1, source, 8] for source in (0, 3, 5)]
    changes = live_pass.read_request({"ids": ids, "changes": {"patches": rows, "other": other}}, tiny.params).changes
    assert changes.patches == (live_pass.Patch(1, 5, 8),)


def test_what_takes_too_long_ends(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that does not arrive, and a pass."""
    with serving(tiny, timeout=0.5) as url:
        host, port = url.removeprefix("http://").split(":")
        for path in ("tokens", "pass"):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                head = f"POST /live/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{{"
                connection.sendall(head.encode())
                assert connection.recv(10_000).startswith(b"HTTP/1.1 408 ")
        monkeypatch.setattr(live, "run_pass", slowly(0.3))
        error = ask(url, ids=ids_of(tiny))[-1]["error"]["message"]
        assert error == "the pass took longer than 0.5 s; close views, or ask again later"


def test_a_large_body_is_read_in_a_thread(tiny: Model, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are answered meanwhile."""
    threads = []

    def seen(body: Any, params: Params) -> PassRequest:
        threads.append(threading.current_thread().name)
        return live_pass.read_request(body, params)

    monkeypatch.setattr(live, "read_request", seen)
    for spaces in (0, 20_000):
        answer = httpx2.post(f"{url}/live/pass", content=b'{"ids": [1]}' + b" " * spaces)
        assert answer.status_code == 200
    assert threads[0] != threads[1]


def test_a_full_queue_has_a_status(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(engine: Engine, count: int = 1) -> None:
        raise Busy

    with serving(tiny) as url:
        monkeypatch.setattr(Engine, "check_open", busy)
        answer = httpx2.post(f"{url}/live/pass", json={"ids": [1]})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")


def test_damaged_weights_are_an_error(tiny: Model) -> None:
    broken = tiny._replace(weights=tiny.weights._replace(norm=tiny.weights.norm * torch.nan))
    with serving(broken) as url:
        assert "the logits are not numbers" in ask(url, ids=[1, 2])[-1]["error"]["message"]


def slowly(seconds: float) -> Callable[[Model, PassRequest, Report], dict[str, Any]]:
    """Return a `run_pass` that takes so long for each layer."""

    def run_slowly(model: Model, request: PassRequest, report: Report) -> dict[str, Any]:
        def wait(done: int, total: int) -> None:
            time.sleep(seconds)
            report(done, total)

        return run_pass(model, request, wait)

    return run_slowly


def test_a_slow_pass_reports_its_layers(tiny: Model, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "run_pass", slowly(0.11))
    *progress, last = ask(url, ids=ids_of(tiny), lens=True)
    assert "result" in last
    counted = [line["progress"] for line in progress]
    assert {total for _, total in counted} == {tiny.params.n_layers * 2 + 1}  # layers, and stages of the lens
    assert [done for done, _ in counted] == sorted({done for done, _ in counted})
    assert len(counted) >= 5


def test_a_page_that_goes_away_ends_its_pass(tiny: Model, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    layers = 0

    def watched(model: Model, request: PassRequest, report: Report) -> dict[str, Any]:
        def count(done: int, total: int) -> None:
            nonlocal layers
            layers = done
            report(done, total)

        try:
            return slowly(0.3)(model, request, count)
        finally:
            ended.set()

    monkeypatch.setattr(live, "run_pass", watched)
    with httpx2.stream("POST", f"{url}/live/pass", json={"ids": ids_of(tiny), "lens": True}) as answer:
        next(answer.iter_lines())
    assert ended.wait(timeout=20)
    assert layers < 9


def test_a_step_takes_less_than_100_ms(tiny: Model) -> None:
    """Of processor time: everything that the page shows of a sentence, with changes."""
    ids, other = ids_of(tiny, f"{TEXT} little girl named Lily. She"), ids_of(tiny, OTHER)
    changes = live_pass.Changes(heads=((1, 2),), patches=(live_pass.Patch(2, 5, 5),), other=tuple(other))
    request = PassRequest(tuple(ids), changes, lens=True, attention=1)
    seconds = []
    for _ in range(10):
        begin = time.process_time()
        json.dumps(run_pass(tiny, request, lambda done, total: None))
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.1


def test_the_python_loads_the_model_as_it_is_served() -> None:
    options = build_parser().parse_args(["--weights", str(TINY), "--dtype", "float32", "--layers", "2"])
    loaded = eval(load_python(options, choose_model(options)), {"llama3_raw": llama3_raw, "torch": torch})
    assert loaded.params.n_layers == 2
    assert loaded.weights.norm.dtype == torch.float32
    options = build_parser().parse_args(["--weights", str(TINY)])
    assert load_python(options, choose_model(options)) == f'llama3_raw.load("{TINY}")'


def test_the_facts_of_the_model(tiny: Model, url: str) -> None:
    about = httpx2.get(f"{url}/live/model").json()
    matrices = (matrix for layer in tiny.weights.layers for matrix in layer)
    parts: list[Any] = [tiny.weights.tok_embeddings, tiny.weights.norm, *matrices]  # the output is the embedding
    assert about["n_weights"] == sum(tensor.numel() for tensor in parts)


def test_the_page_may_load_nothing_from_elsewhere(url: str) -> None:
    answer = httpx2.get(url)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert httpx2.get(f"{url}/page/main.js").headers["content-type"].startswith("text/javascript")
    assert httpx2.get(f"{url}/page/..%2Flive.py").status_code == 404
