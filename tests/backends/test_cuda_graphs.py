"""Captured passes: on a GPU a CUDA graph; here a list of torch operations that are run again on the same tensors."""

from __future__ import annotations

import io
import itertools
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import llama3_raw
import llama3_raw.__main__ as main_module
import llama3_raw.chat.__main__ as chat_module
from llama3_raw import REFERENCE, KVCache, Model, forward, generate
from llama3_raw.backends import cuda
from llama3_raw.backends import cuda_graphs as captured
from llama3_raw.backends.choose import suitable_ops
from llama3_raw.backends.cuda_graphs import CudaGraphs
from llama3_raw.chat.conversation import Conversation
from llama3_raw.decoding import loop
from llama3_raw.decoding.prompt_lookup import LookupPolicy
from llama3_raw.ops import Ops
from tests.paths import TINY
from tests.references import cast, dense

SETTINGS: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.2, "top_p": 0.9}]


class Recorded(TorchDispatchMode):
    """Like a CUDA graph, on the CPU: the operations of one run, repeated on the same memory, without its Python."""

    def __init__(self, function: Callable[[], Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[Any, ...]] = []
        with self:
            self.result = function()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    def __call__(self) -> Tensor:
        for function, args, kwargs, out in self.steps:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self.result


@pytest.fixture(scope="module")
def model(tiny: Model) -> Model:
    """The built-in model in fp32, in which captured and eager passes differ only in the last bits."""
    return tiny._replace(weights=cast(tiny.weights, torch.float32))


@pytest.fixture
def ids(model: Model) -> list[int]:
    return model.tokenizer.encode("Once upon a time", bos=True)


def passes_for(model: Model, length: int, compiled: bool = False) -> CudaGraphs:
    cache = KVCache.allocate(model.params, max_seq_len=length, like=model.weights)
    return CudaGraphs(model, cache, REFERENCE, capture=Recorded, compiled=compiled)


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_same_tokens(model: Model, ids: list[int], settings: dict[str, Any]) -> None:
    """The same as without a graph, with a cache that is filled to its end, and again in a second call."""
    expected = list(generate(model, ids, max_new_tokens=60, ops=REFERENCE, **settings))
    passes = passes_for(model, len(ids) + 60)
    for _ in range(2):
        new = generate(model, ids, max_new_tokens=60, cache=passes.cache, ops=REFERENCE, captured=passes, **settings)
        assert list(new) == expected
    assert passes.are_ready(1)
    assert not passes.are_ready(16)


def test_the_same_tokens_with_lookup(model: Model, ids: list[int]) -> None:
    """Proposed tokens are accepted; at the end of the cache, where MAX_DECODE_ROWS do not fit, passes are eager."""
    expected = list(generate(model, ids, max_new_tokens=60, ops=REFERENCE))
    passes, policy = passes_for(model, len(ids) + 60), LookupPolicy(7)
    policy.learn_cost = lambda *_: None  # type: ignore[method-assign]  # propose at any cost
    policy.how_many = lambda match, limit: min(7, limit) if match else 0  # type: ignore[method-assign]
    common: dict[str, Any] = {"cache": passes.cache, "ops": REFERENCE, "captured": passes}
    new = generate(model, ids, max_new_tokens=60, lookup=policy, earlier=expected, **common)
    assert list(new) == expected
    assert policy.accepted > 10
    assert passes.are_ready(16)


def test_a_failing_compiler_is_not_used(
    model: Model, ids: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: object, **options: object) -> Tensor:
        raise RuntimeError("no space left\non the disk")

    monkeypatch.setattr(captured, "compiled_forward", lambda: fails)
    passes = passes_for(model, len(ids) + 4, compiled=True)
    new = list(generate(model, ids, max_new_tokens=4, cache=passes.cache, ops=REFERENCE, captured=passes))
    assert new == list(generate(model, ids, max_new_tokens=4, ops=REFERENCE))
    assert "torch.compile fails (no space left on the disk); continuing without" in capsys.readouterr().err


def test_the_first_token_does_not_wait_for_the_capture(model: Model, ids: list[int]) -> None:
    passes = passes_for(model, len(ids) + 4)
    tokens = generate(model, ids, max_new_tokens=4, cache=passes.cache, ops=REFERENCE, captured=passes)
    next(tokens)
    assert not passes.are_ready(1)
    next(tokens)
    assert passes.are_ready(1)


def test_it_ends_where_it_should(model: Model, ids: list[int]) -> None:
    """At a stop token, although the next pass has already begun; and with no new tokens at all."""
    expected = list(generate(model, ids, max_new_tokens=30, ops=REFERENCE))
    end = next(i for i, token in enumerate(expected) if i > 2 and token not in expected[:i])
    passes = passes_for(model, len(ids) + 30)
    common: dict[str, Any] = {"cache": passes.cache, "ops": REFERENCE, "captured": passes}
    stopped = generate(model, ids, max_new_tokens=30, stop_ids=(expected[end],), **common)
    assert list(stopped) == expected[:end]
    assert list(generate(model, ids, max_new_tokens=0, **common)) == []
    with pytest.raises(ValueError, match="those of another cache"):
        generate(model, ids, max_new_tokens=1, captured=passes)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_damaged_weights_are_noticed(model: Model, ids: list[int], temperature: float) -> None:
    broken = model._replace(weights=model.weights._replace(norm=model.weights.norm * torch.nan))
    passes = passes_for(broken, len(ids) + 4)
    with pytest.raises(llama3_raw.UserError, match="not numbers"):
        list(
            generate(
                broken,
                ids,
                max_new_tokens=4,
                temperature=temperature,
                cache=passes.cache,
                ops=REFERENCE,
                captured=passes,
            )
        )


def test_a_tap_sees_every_pass(model: Model, ids: list[int]) -> None:
    """A graph would call no tap, so none is used with one."""
    passes, seen = passes_for(model, len(ids) + 4), itertools.count()

    def tap(name: str, tensor: Tensor) -> Tensor:
        if name == "logits":
            next(seen)
        return tensor

    list(generate(model, ids, max_new_tokens=4, cache=passes.cache, ops=REFERENCE, captured=passes, tap=tap))
    assert next(seen) == 4


def test_nothing_is_captured_off_a_gpu(model: Model) -> None:
    cache = KVCache.allocate(model.params, max_seq_len=4, like=model.weights)
    assert CudaGraphs.where_possible(model, cache, suitable_ops(torch.device("cpu"))) is None


def test_a_dialog_keeps_its_graph(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def where_possible(model: Model, cache: KVCache, ops: Any) -> CudaGraphs:
        graphs.append(CudaGraphs(model, cache, REFERENCE, capture=Recorded, compiled=False))
        return graphs[-1]

    def answers() -> list[str]:
        dialog = Conversation(model, context=200, max_new_tokens=20, ops=REFERENCE)
        return ["".join(dialog.answer(question)) for question in ("Hello!", "Why?")]

    expected = answers()
    monkeypatch.setattr(CudaGraphs, "where_possible", where_possible)
    assert answers() == expected
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--no-compile"]])
@pytest.mark.parametrize("tool", [main_module, chat_module], ids=["main", "chat"])
def test_no_compile_captures_nothing(tool: ModuleType, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the operations' can_capture, which `generate` and a conversation respect."""
    seen = []
    load_model = tool.load_model

    def load(*arguments: Any) -> Any:
        model, ops, which = load_model(*arguments)
        return model, ops._replace(can_capture=True), which

    def where_possible(model: Model, cache: KVCache, ops: Ops, compiled: bool = True) -> None:
        seen.append(ops.can_capture)

    monkeypatch.setattr(tool, "load_model", load)
    monkeypatch.setattr(CudaGraphs, "where_possible", where_possible)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert tool.main(["--weights", str(TINY), *options, *(["Once"] if tool is main_module else [])]) == 0
    assert seen == [not options]


@pytest.mark.parametrize(("max_new", "context", "compiled"), [(7, 200, False), (8, 200, True), (100, 12, False)])
def test_only_a_long_text_is_worth_compiling(
    model: Model, ids: list[int], monkeypatch: pytest.MonkeyPatch, max_new: int, context: int, compiled: bool
) -> None:
    """The length that it may reach counts, limited by the context too; capturing is always worth it."""
    asked = []

    def where_possible(*arguments: Any, compiled: bool) -> CudaGraphs:
        asked.append(compiled)
        options: dict[str, Any] = {"capture": Recorded, "compiled": False}
        return CudaGraphs(*arguments, **options)

    monkeypatch.setattr(CudaGraphs, "where_possible", where_possible)
    monkeypatch.setattr(loop, "COMPILED_FROM", 8)
    new = list(generate(model, ids, max_new_tokens=max_new, context=context, ops=REFERENCE))
    assert new == list(generate(model, ids, max_new_tokens=max_new, context=context, ops=REFERENCE, captured=False))
    assert asked == [compiled]


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, marks=pytest.mark.exhaustive, id="exact"),
        pytest.param(torch.float16, id="the GPU's"),
    ],
)
def test_the_pass_compiles_completely_and_once(model: Model, ids: list[int], dtype: torch.dtype) -> None:
    """No graph breaks, no recompilation for another cache length, and no copy of the whole cache."""
    if dtype == torch.float16 and torch.cuda.is_available():
        pytest.skip("the kernels are compiled for the GPU, and cannot be interpreted here")
    torch._dynamo.reset()
    ops = REFERENCE if dtype == torch.float32 else cuda.cuda_ops()
    small = Model(
        # the interpreter needs seconds for a large vocabulary
        cast(model.weights._replace(layers=model.weights.layers[:1], output=dense(model.weights.output)[:256]), dtype),
        llama3_raw.Params(**{**vars(model.params), "n_layers": 1}),
        None,
    )
    for length in (64, 90):
        cache = KVCache.allocate(small.params, max_seq_len=length, like=small.weights)
        passes = CudaGraphs(small, cache, ops, capture=lambda function: function, compiled=True)
        with (
            torch._inductor.config.patch(force_disable_caches=True),  # cached results show no code
            torch.compiler.set_stance("default" if length == 64 else "fail_on_recompile"),
        ):
            logits, code = run_and_get_code(passes, torch.tensor([ids[1]]), 7)
        expected = forward(small.weights, small.params, torch.tensor([ids[1]]), cache=cache, start=7, ops=ops)
        torch.testing.assert_close(logits, expected, atol=1e-4 if dtype == torch.float32 else 0.05, rtol=0)
        assert (len(code) == 1) == (length == 64)
        assert not any(re.search(r"empty_strided_\w+\(\(s", piece) for piece in code)  # s…: the length of the cache
