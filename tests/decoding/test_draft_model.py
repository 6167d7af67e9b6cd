"""Drafts by a model: the same tokens in fewer passes, whatever is proposed; and what a draft may cost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import llama3_raw
from llama3_raw import REFERENCE, KVCache, Model, Params, UserError, forward
from llama3_raw import __main__ as command
from llama3_raw.backends import cpu
from llama3_raw.backends.cuda_graphs import CudaGraphs
from llama3_raw.chat.conversation import Conversation
from llama3_raw.decoding import draft_model, loop, runner
from llama3_raw.decoding.draft_model import DraftModel, DraftModelPolicy, first_layers, int4_copy
from llama3_raw.decoding.drafts import MAX_DRAFT_TOKENS
from llama3_raw.decoding.loop import generate
from llama3_raw.decoding.sampling import Sampling
from llama3_raw.ops import Ops
from llama3_raw.tokenizer import Tokenizer
from tests.paths import TINY
from tests.references import cast, converted, random_weights

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 3},
    "sampled, filtered": {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 4},
}
PROMPT = "Once upon a time, there was a little girl named Lily."


class Eager(DraftModelPolicy):
    """Proposes as many tokens as allowed, whatever they cost; nothing in every fourth pass."""

    def __init__(self, most: int):
        super().__init__(0.5)
        self.most = most

    @property
    def seconds_alone(self) -> float:
        return float("inf")

    def how_many(self, limit: int, missing: int) -> int:
        return 0 if self.passes % 4 == 3 else min(self.most, limit)


def eager(model: Model, target: Model, most: int = 5) -> DraftModel:
    draft = DraftModel(model, target)
    draft.policy = Eager(most)
    return draft


@pytest.fixture(scope="module")
def ids(tiny: Model) -> list[int]:
    assert tiny.tokenizer is not None
    return tiny.tokenizer.encode(PROMPT, bos=True)


@pytest.fixture(scope="module")
def similar(tiny: Model) -> Model:
    """The built-in model with noise on all its weights: it is often right, and has a cache of its own."""
    generator = torch.Generator().manual_seed(1)

    def disturbed(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
        return (tensor.float() + 0.15 * noise).to(tensor.dtype)

    return tiny._replace(weights=converted(tiny.weights, disturbed))


@pytest.fixture(scope="module")
def drafts(tiny: Model, similar: Model) -> dict[str, Model]:
    other = random_weights(tiny.params, torch.bfloat16, seed=5, tied=True)
    return {
        "int4": int4_copy(tiny),
        "layers": first_layers(tiny, 3),
        "similar": similar,
        "wrong": tiny._replace(weights=other),
        "itself": tiny,
    }


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", ["int4", "layers", "similar", "wrong"])
def test_the_same_tokens(tiny: Model, ids: list[int], drafts: dict[str, Model], name: str, sampling: str) -> None:
    settings = {"max_new_tokens": 30, "stop_ids": (), **SAMPLINGS[sampling]}
    expected = list(generate(tiny, ids, **settings))
    draft = DraftModel(drafts[name], tiny)
    # one draft for two texts; of the second, the cache holds the beginning
    for most, start in ((MAX_DRAFT_TOKENS, 0), (3, 9)):
        draft.policy = Eager(most)
        cache = KVCache.allocate(tiny.params, max_seq_len=80, like=tiny.weights)
        if start:
            list(generate(tiny, ids[:start], max_new_tokens=1, cache=cache))
        common = {"cache": cache, "start": start, "earlier": ids[:start], **settings}
        assert list(generate(tiny, ids[start:], draft=draft, **common)) == expected
        policy = draft.policy
        assert policy.passes + policy.accepted == 29
        assert name == "wrong" or policy.accepted > 8
        assert name == "int4" or policy.accepted < policy.proposed  # so that there were rejections


@pytest.mark.usefixtures("cpu_kernels")
def test_a_cache_of_unknown_text(tiny: Model, ids: list[int], drafts: dict[str, Model]) -> None:
    """What the cache holds is known to the draft only if it uses the same one, and is not overwritten."""
    cache = KVCache.allocate(tiny.params, max_seq_len=80, like=tiny.weights)
    list(generate(tiny, ids[:9], max_new_tokens=1, cache=cache))
    settings: dict[str, Any] = {"max_new_tokens": 30, "cache": cache, "start": 9, "stop_ids": ()}
    expected = list(generate(tiny, ids[9:], **settings))
    for name in ("layers", "similar"):
        draft = eager(drafts[name], tiny)
        assert list(generate(tiny, ids[9:], draft=draft, **settings)) == expected
        assert draft.policy.accepted > 5


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_the_same_tokens_of_a_quantized_model(ids: list[int], quantize: str) -> None:
    model = llama3_raw.load(TINY, quantize=quantize)
    settings: dict[str, Any] = {"max_new_tokens": 30, "temperature": 1.0, "seed": 1, "stop_ids": ()}
    draft = eager(first_layers(model, 3), model)
    assert list(generate(model, ids, draft=draft, **settings)) == list(generate(model, ids, **settings))
    assert draft.policy.accepted > 5


def continued(model: Model, ids: list[int], count: int) -> list[int]:
    """Return the next tokens, computed at most 16 at a time: more may be rounded otherwise."""
    cache = KVCache.allocate(model.params, max_seq_len=len(ids) + count, like=model.weights)
    ids, start = list(ids), 0
    for _ in range(count):
        while start < len(ids):
            piece = torch.tensor(ids[start : start + 16])
            logits = forward(model.weights, model.params, piece, cache=cache, start=start, ops=cpu.fast_ops())
            start += len(piece)
        ids.append(int(logits[-1].argmax()))
    return ids[-count:]


def test_proposals_are_those_of_the_draft_alone(
    tiny: Model, ids: list[int], drafts: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After rejections, passes without proposals and another text, its cache holds this text and nothing else."""
    made: list[tuple[list[int], list[int]]] = []
    propose = draft_model.DraftOfText.propose

    def recorded(self: draft_model.DraftOfText, limit: int) -> list[int]:
        proposed = propose(self, limit)
        if proposed:
            made.append((list(self._ids), proposed))
        return proposed

    monkeypatch.setattr(draft_model.DraftOfText, "propose", recorded)
    # the first layers use the cache of the whole model, with the same bits
    for name, text in itertools.product(("layers", "similar"), (ids, [*ids[:5], 70, 71])):
        if text is ids:
            draft = eager(drafts[name], tiny, 4)
        made.clear()
        list(generate(tiny, text, max_new_tokens=40, draft=draft, stop_ids=()))
        for before, proposed in made:
            assert continued(drafts[name], before, len(proposed)) == proposed
        assert len(made) > 5


def test_random_numbers_in_common(tiny: Model, ids: list[int], drafts: dict[str, Model]) -> None:
    """With the target's own random numbers, a draft with its probabilities is always right."""
    settings: dict[str, Any] = {"max_new_tokens": 50, "temperature": 1.0, "seed": 5, "stop_ids": ()}
    counts = {}
    for name in ("itself", "int4"):
        draft = eager(drafts[name], tiny)
        list(generate(tiny, ids, draft=draft, **settings))
        counts[name] = draft.policy.accepted / draft.policy.proposed
    assert counts["itself"] == 1
    assert counts["int4"] > 0.7  # its most likely tokens: 0.4


def test_which_drafts_share_the_cache(tiny: Model, drafts: dict[str, Model]) -> None:
    sharing = {name for name, model in drafts.items() if DraftModel(model, tiny).shares_cache}
    assert sharing == {"int4", "layers", "itself"}
    assert DraftModel(llama3_raw.load(TINY, layers=2), tiny).shares_cache
    longer = tiny._replace(params=replace(tiny.params, rope_theta=5e5))
    assert not DraftModel(longer, tiny).shares_cache


def test_a_copy_in_int4(tiny: Model, drafts: dict[str, Model]) -> None:
    copy = drafts["int4"].weights
    assert {matrix.format for layer in copy.layers for matrix in layer if not isinstance(matrix, Tensor)} == {"int4"}
    assert not isinstance(copy.output, Tensor)
    assert copy.output.format == "int8"
    assert copy.tok_embeddings is tiny.weights.tok_embeddings
    with pytest.raises(UserError, match=r"^the model is in int4 already, and an int4 copy is no faster"):
        int4_copy(drafts["int4"])


def test_graphs(tiny: Model, ids: list[int], drafts: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the passes of a draft are captured too."""
    in_fp32 = tiny._replace(weights=cast(tiny.weights, torch.float32))  # a graph differs only in the last bits

    def where_possible(model: Model, cache: KVCache, ops: Ops, compiled: bool = True) -> CudaGraphs:
        return CudaGraphs(model, cache, REFERENCE, capture=lambda function: function, compiled=False)

    monkeypatch.setattr(CudaGraphs, "where_possible", where_possible)
    settings: dict[str, Any] = {"max_new_tokens": 30, "temperature": 1.0, "seed": 1, "stop_ids": ()}
    expected = list(generate(in_fp32, ids, captured=None, **settings))
    for model in (first_layers(in_fp32, 3), drafts["similar"]._replace(tokenizer=None)):
        draft = eager(model, in_fp32)
        assert list(generate(in_fp32, ids, draft=draft, **settings)) == expected
        assert draft.policy.accepted > 5


def test_a_draft_with_a_shorter_context(tiny: Model, ids: list[int], similar: Model) -> None:
    """It proposes as long as the text fits."""
    short = similar._replace(params=replace(similar.params, max_seq_len=len(ids) + 10))
    draft = eager(short, tiny)
    tokens = generate(tiny, ids, max_new_tokens=40, draft=draft, stop_ids=())
    assert len(list(tokens)) == 40
    assert 0 < draft.policy.accepted <= 10


@pytest.mark.usefixtures("cpu_kernels")
def test_a_conversation_is_the_same(tiny: Model, drafts: dict[str, Model]) -> None:
    """Over several turns with interrupted answers."""

    def talk(draft: DraftModel | None) -> list[str]:
        settings: dict[str, Any] = {"context": 400, "max_new_tokens": 30, "sampling": Sampling(temperature=0.4)}
        conversation = Conversation(tiny, seed=1, draft=draft, **settings)
        answers = []
        for pieces in (99, 5, 99):
            with closing(conversation.answer("Tell me of Lily and her dog.")) as answer:
                answers.append("".join(itertools.islice(answer, pieces)))
        return answers

    without = talk(None)
    for name in ("int4", "similar"):
        draft = eager(drafts[name], tiny)
        assert talk(draft) == without
        assert draft.policy.accepted > 10


# the policy

Seconds = Callable[[int], float]


def simulate(policy: DraftModelPolicy, right: list[bool], seconds: Seconds) -> tuple[float, list[int]]:
    """Simulate a text whose token i the draft gets right if right[i]. Return the speed relative to no draft, counts."""
    place, time, counts = 0, 0.0, []
    while place < len(right):
        count = policy.how_many(len(right) - place - 1, 0)
        counts.append(count)
        time += seconds(count)
        policy.learn_cost(count, seconds(count))
        for _ in range(count):
            policy.learn_right(right[place])
            place += 1
            if not right[place - 1]:
                break
        else:
            place += 1  # the token after the proposed ones
    return len(right) * seconds(0) / time, counts


def chances(length: int, chance: float, seed: int = 1) -> list[bool]:
    return (torch.rand(length, generator=torch.Generator().manual_seed(seed)) < chance).tolist()


def linear(cost: float) -> Seconds:
    return lambda count: 0.2 * (1 + count * (cost + 0.0125))


@pytest.mark.parametrize("cost", [0.05, 0.28, 0.6, 1.0])
@pytest.mark.parametrize("length", [120, 300, 2000])
def test_a_draft_that_is_never_right(cost: float, length: int) -> None:
    speed, _ = simulate(DraftModelPolicy(cost), [False] * length, linear(cost))
    assert speed >= 0.97


def test_a_draft_of_unexpected_cost() -> None:
    """Its pass takes three times as long as one of the target, where a third was assumed."""
    speed, counts = simulate(DraftModelPolicy(0.3), chances(1000, 0.9), linear(3.0))
    assert speed >= 0.97
    assert sum(counts[100:]) <= 10


@pytest.mark.parametrize("chance", [0.05, 0.2, 0.3])
def test_a_draft_that_is_seldom_right(chance: float) -> None:
    assert simulate(DraftModelPolicy(0.3), chances(1000, chance), linear(0.28))[0] >= 0.97


@pytest.mark.parametrize(("chance", "cost"), [(0.7, 0.28), (0.8, 0.28), (0.9, 0.28), (0.7, 0.1), (0.97, 0.1)])
def test_a_draft_that_pays(chance: float, cost: float) -> None:
    """The speed is close to that of the best constant number of tokens, computed beforehand."""
    best = max(sum(chance**i for i in range(k + 1)) / (1 + k * (cost + 0.0125)) for k in range(16))
    speeds = [simulate(DraftModelPolicy(cost), chances(1000, chance, seed), linear(cost))[0] for seed in range(5)]
    assert sum(speeds) / 5 > 0.9 * best


def test_it_stops_and_starts_again() -> None:
    """The draft becomes useless, and useful again; its pass becomes slower, and fast again."""
    policy = DraftModelPolicy(0.3)
    assert simulate(policy, chances(500, 0.9), linear(0.28))[0] > 1.6
    assert simulate(policy, [False] * 500, linear(0.28))[0] > 0.97
    assert simulate(policy, chances(500, 0.9), linear(0.28))[0] > 1.4
    assert simulate(policy, chances(500, 0.9), linear(0.9))[0] > 0.95
    assert simulate(policy, chances(2000, 0.9), linear(0.28))[0] > 1.3
    assert simulate(policy, chances(500, 0.9), linear(6.0))[0] < 1
    assert simulate(policy, chances(5000, 0.9), linear(0.28))[0] > 1.2


def test_a_disturbed_pass_does_not_stop_it() -> None:
    """Another program sometimes makes a pass take 20 times as long."""
    disturbed: Iterator[int] = itertools.cycle([1] * 7 + [20])
    cost = linear(0.28)
    policy = DraftModelPolicy(0.3)
    _, counts = simulate(policy, chances(2000, 0.85), lambda count: cost(count) * next(disturbed))
    assert policy.accepted == 0  # counted by the draft of a text
    assert sum(count > 0 for count in counts) > 0.6 * len(counts)


def test_catching_up_is_paid_too() -> None:
    policy = DraftModelPolicy(0.3)
    simulate(policy, [False] * 200, linear(0.28))
    assert any(policy.how_many(15, 0) or policy.learn_cost(0, 0.2) for _ in range(50))
    assert not any(policy.how_many(15, 200) or policy.learn_cost(0, 0.2) for _ in range(50))
    assert policy.how_many(15, 0)
    policy.learn_catch_up(100, 0.2 * 5)
    assert not policy.how_many(15, 0)


class Clock:
    """A clock that only passes over the model move: by the rows of the pass, and less for a draft."""

    def __init__(self, target: Model, cost: float, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0

        def timed(weights: Any, params: Params, tokens: Tensor, **others: Any) -> Tensor:
            of_draft = weights is not target.weights
            self.now += cost * (1 if len(tokens) <= 2 else len(tokens) / 8) if of_draft else 1 + 0.0125 * len(tokens)
            return forward(weights, params, tokens, **others)

        monkeypatch.setattr(runner, "forward", timed)
        for module in (loop, draft_model):
            monkeypatch.setattr(f"{module.__name__}.time.perf_counter", lambda: self.now)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize(("name", "cost", "least"), [("int4", 0.28, 1.2), ("wrong", 0.28, 0.97), ("int4", 3, 0.95)])
def test_speed_with_stand_in_costs(
    tiny: Model,
    ids: list[int],
    drafts: dict[str, Model],
    name: str,
    cost: float,
    least: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(tiny, cost, monkeypatch)
    settings: dict[str, Any] = {"max_new_tokens": 160, "temperature": 0.8, "seed": 2, "stop_ids": ()}
    expected, before = list(generate(tiny, ids, **settings)), clock.now
    draft = DraftModel(drafts[name], tiny)
    assert list(generate(tiny, ids, draft=draft, **settings)) == expected
    assert before / (clock.now - before) >= least


# what is refused


def test_refused(tiny: Model, drafts: dict[str, Model], llama3: Tokenizer) -> None:
    fewer = Params.from_meta({"dim": 64, "n_layers": 1, "n_heads": 2, "vocab_size": 96, "norm_eps": 1e-5})
    with pytest.raises(UserError, match=r"^the draft has 96 tokens and its model 2304; choose"):
        DraftModel(Model(random_weights(fewer, torch.bfloat16, seed=1), fewer, None), tiny)
    with pytest.raises(UserError, match=r"^the draft has another tokenizer than its model; choose a draft"):
        DraftModel(tiny._replace(tokenizer=llama3), tiny)
    for number in (0, 4):
        with pytest.raises(UserError, match=rf"^number should be from 1 to 3, is {number}$"):
            first_layers(tiny, number)
    with pytest.raises(UserError, match=r"^lookup and draft both propose tokens; leave one of them out$"):
        generate(tiny, [1], max_new_tokens=1, lookup=3, draft=DraftModel(drafts["layers"], tiny))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draft", "layers:4"], "--draft layers:4: the model has 4 layers; give layers:N with N below that"),
        (["--draft", "layers:x"], "--draft layers:x: the model has 4 layers; give layers:N with N below that"),
        (["--draft", "int4", "--quantize", "int4"], "--draft int4: the model is in int4 already; leave it out, or"),
        (["--draft", "int4", "--lookup", "3"], "--draft does not go with --lookup; leave one of them out"),
        (["--draft", "int4", "--max-ram", "4GB"], "--draft does not go with --max-ram; leave one of them out"),
        (["--draft", "no-such-model"], "--draft no-such-model: there is no such folder"),
    ],
)
def test_refused_on_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--weights", str(TINY), *arguments, "Hello"]) == 2
    assert capsys.readouterr().err.startswith(f"llama3_raw: error: {message}")


def test_memory_beside_the_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("llama3_raw.cli.drafts.free_memory", lambda device: 1000)
    assert command.main(["--weights", str(TINY), "--draft", "int4", "Hello"]) == 2
    assert "--draft int4: 0.00 GB are needed beside the model's" in capsys.readouterr().err


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("draft", ["int4", "layers:3", str(TINY)])
def test_on_the_command_line(draft: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The text and --top are the same, and --stats counts passes and proposals."""
    monkeypatch.setattr(draft_model, "DraftModelPolicy", lambda cost: Eager(4))
    ran = []
    for options in ([], ["--draft", draft]):
        arguments = ["--weights", str(TINY), "--max-new-tokens", "40", "--top", "2", "--stats", "json", *options]
        assert command.main([*arguments, PROMPT]) == 0
        out, err = capsys.readouterr()
        ran.append((out, [line for line in err.splitlines() if "<-" in line], json.loads(err.splitlines()[-1])))
    (*without, before), (*with_draft, after) = ran
    assert with_draft == without
    assert 0 < after["tokens_accepted"] <= after["tokens_proposed"]
    assert after["passes"] + after["tokens_accepted"] == before["passes"]
