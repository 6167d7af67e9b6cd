"""Prompt lookup: the same tokens in fewer passes; what is proposed, and when."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from llama3_raw import KVCache, Model, Params, UserError
from llama3_raw import __main__ as command
from llama3_raw.chat import conversation
from llama3_raw.chat.conversation import Conversation
from llama3_raw.decoding.drafts import MAX_DRAFT_TOKENS
from llama3_raw.decoding.loop import StopReason, generate
from llama3_raw.decoding.prompt_lookup import LONGEST, EarlierText, LookupPolicy, PromptLookup
from llama3_raw.decoding.sampling import Sampling
from tests.paths import TINY
from tests.references import random_weights, run

pytestmark = pytest.mark.usefixtures("cpu_kernels")

PARAMS = Params.from_meta(
    {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 96, "norm_eps": 1e-5, "max_seq_len": 200}
)


class Eager(LookupPolicy):
    """Proposes as many tokens as possible, whatever a pass costs, except in the first pass, as any policy."""

    def how_many(self, match: int, limit: int) -> int:
        return max(0, min(self.most, limit)) if match and self.passes else 0


@pytest.fixture(scope="module")
def small() -> Model:
    return Model(random_weights(PARAMS, torch.bfloat16, seed=1), PARAMS, None)


@example([0, 1, 2] * 20, [])  # more places than are compared
@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 1), max_size=60))
def test_matches_are_those_of_a_linear_scan(first: list[int], second: list[int]) -> None:
    text = EarlierText()
    for token in first + second:
        text.append(token)
        ids, end = text.ids, len(text.ids)
        lengths = {
            place: next(n for n in range(LONGEST + 1) if n == min(LONGEST, place) or ids[place - 1 - n] != ids[-1 - n])
            for place in range(1, end)
        }
        latest = [place for place in lengths if lengths[place] >= 2][-16:]
        best = max(latest, key=lambda place: (lengths[place], place), default=0)
        assert text.longest_match() == ((lengths[best], best) if best else (0, 0))


SAMPLINGS = {
    "greedy": {},
    "greedy, penalized": {"repetition_penalty": 1.3},
    "sampled": {"temperature": 1.0, "seed": 3},
    "sampled, filtered": {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "seed": 4,
    },
}


def corrupted(ids: Sequence[int], every: int) -> list[int]:
    """Return the text with one in `every` tokens replaced."""
    return [token ^ 1 if i % every == every - 1 else token for i, token in enumerate(ids)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("which", ["small", "tiny"])
def test_the_same_tokens(which: str, sampling: str, request: pytest.FixtureRequest) -> None:
    """Proposals are always right, sometimes wrong, or come from the text itself."""
    model = request.getfixturevalue(which)
    settings: dict[str, Any] = {"max_new_tokens": 40, "stop_ids": (), **SAMPLINGS[sampling]}
    prompt = [5, 6, 7, 8, 9, 5, 6, 7]
    whole = prompt + list(generate(model, prompt, **settings))
    for most, earlier in itertools.product((2, MAX_DRAFT_TOKENS), (whole, corrupted(whole, 6), [])):
        policy = Eager(most)
        expected = list(generate(model, prompt, earlier=earlier, **settings))  # a penalty covers `earlier`
        assert list(generate(model, prompt, lookup=policy, earlier=earlier, **settings)) == expected
        if earlier == prompt + expected:
            assert policy.accepted >= 39 - policy.passes > 0
    assert list(generate(model, prompt, lookup=4, earlier=earlier, **settings)) == expected


def test_fewer_passes(small: Model) -> None:
    """If the answer is in the earlier text, 15 of 16 tokens need no separate pass; the tap sees every row."""
    rows = []

    def tap(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "logits":
            rows.append(tensor.numel() // PARAMS.vocab_size)
        return tensor

    prompt = torch.randint(96, (9,), generator=torch.Generator().manual_seed(5)).tolist()
    expected = list(generate(small, prompt, max_new_tokens=80, temperature=1.0, seed=1, tap=tap))
    assert rows == [1] * 80
    rows.clear()
    policy = Eager(MAX_DRAFT_TOKENS)
    earlier = prompt + expected
    settings: dict[str, Any] = {"max_new_tokens": 80, "temperature": 1.0, "seed": 1, "tap": tap}
    assert list(generate(small, prompt, lookup=policy, earlier=earlier, **settings)) == expected
    assert len(rows) <= 8
    assert policy.passes == len(rows) - 1
    assert policy.proposed == sum(rows) - len(rows)
    assert policy.accepted == 80 - len(rows)


def test_end_among_right_proposals(small: Model) -> None:
    """The budget, the context, the cache or a stop token ends the text between right proposals."""
    prompt = [3, 1, 4, 1, 5]
    whole = list(generate(small, prompt, max_new_tokens=60, temperature=1.0, seed=2))
    common: dict[str, Any] = {"temperature": 1.0, "seed": 2, "earlier": prompt + whole}
    for count in range(1, 40, 4):
        expected = whole[:count]
        for settings, reason in (
            ({"max_new_tokens": count}, StopReason.MAX_NEW_TOKENS),
            ({"max_new_tokens": 60, "context": 5 + count}, StopReason.CONTEXT),
            (
                {
                    "max_new_tokens": 60,
                    "cache": KVCache.allocate(PARAMS, max_seq_len=5 + count, like=small.weights),
                },
                StopReason.CONTEXT,
            ),
        ):
            assert run(generate(small, prompt, lookup=Eager(MAX_DRAFT_TOKENS), **settings, **common)) == (
                expected,
                reason,
            )
        end = whole[count]
        before = whole[: whole.index(end)]
        ended = run(generate(small, prompt, max_new_tokens=60, stop_ids=[end], lookup=Eager(7), **common))
        assert ended == (before, StopReason.END_TOKEN)


@pytest.mark.slow
def test_the_cache_continues_after_a_stop(small: Model) -> None:
    """Wherever the caller stops, the cache holds all but the last token, whatever was rejected."""
    prompt = [9, 8, 7]
    whole = list(generate(small, prompt, max_new_tokens=34))
    for earlier, count in itertools.product((whole, corrupted(whole, 5)), range(1, 30, 2)):
        cache = KVCache.allocate(PARAMS, max_seq_len=60, like=small.weights)
        settings: dict[str, Any] = {"max_new_tokens": 34, "cache": cache, "earlier": earlier}
        with closing(generate(small, prompt, lookup=Eager(6), **settings)) as tokens:
            assert list(itertools.islice(tokens, count)) == whole[:count]
        start = len(prompt) + count - 1
        rest = generate(small, whole[count - 1 : count], max_new_tokens=34 - count, cache=cache, start=start)
        assert list(rest) == whole[count:]


def test_a_conversation_is_the_same(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several turns with interrupted answers; proposals come from earlier turns too."""
    monkeypatch.setattr(conversation, "LookupPolicy", Eager)

    def talk(lookup: int) -> tuple[list[str], list[int], LookupPolicy]:
        conversation = Conversation(
            tiny, context=400, max_new_tokens=40, sampling=Sampling(temperature=0.4), seed=1, lookup=lookup
        )
        answers, computed = [], []
        for pieces in (99, 5, 99, 17, 99):
            with closing(conversation.answer("Tell me of Lily and her dog.")) as answer:
                answers.append("".join(itertools.islice(answer, pieces)))
            computed.append(conversation.turn.computed)
        return answers, computed, conversation.lookup

    without, with_lookup = talk(0), talk(5)
    assert with_lookup[:2] == without[:2]
    assert with_lookup[2].accepted > 10
    assert with_lookup[2].passes < without[2].passes


def simulate(
    policy: LookupPolicy, earlier: Sequence[int], text: Sequence[int], seconds: Callable[[int], float]
) -> tuple[float, list[int]]:
    """Simulate a model that generates `text`, with the time `seconds` of each pass.

    Return the speedup over no lookup, and the number of tokens that each pass proposed.
    """
    draft, seconds_alone, generated, time, counts = PromptLookup(policy, earlier), seconds(0), 0, 0.0, []
    while generated < len(text):
        proposed = draft.propose(len(text) - generated - 1)
        pass_seconds = seconds(len(proposed))
        policy.learn_cost(len(proposed), pass_seconds)
        time += pass_seconds
        counts.append(len(proposed))
        for token in [*proposed, None]:
            draft.append(text[generated])
            generated += 1
            if text[generated - 1] != token:
                break
    return len(text) * seconds_alone / time, counts


def noise(length: int, vocabulary: int, seed: int) -> list[int]:
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def cheap(proposed: int) -> float:
    """Return the seconds of a pass, about as on a CPU with 8B."""
    return 0.5 * (1 + 0.1 * proposed)


def test_quotations_are_faster() -> None:
    text = noise(300, 5000, 1)
    speed, counts = simulate(LookupPolicy(MAX_DRAFT_TOKENS), text, text, cheap)
    assert speed > 4
    assert max(counts) == MAX_DRAFT_TOKENS
    assert simulate(LookupPolicy(3), text, text, cheap)[0] > 2.5


@pytest.mark.parametrize("cost", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("vocabulary", [12, 40, 5000])
def test_other_text_is_hardly_slower(vocabulary: int, cost: float) -> None:
    """Pairs of tokens recur but predict nothing, and passes with proposals are expensive."""
    speed, _ = simulate(
        LookupPolicy(MAX_DRAFT_TOKENS), noise(500, vocabulary, 1), noise(1000, vocabulary, 2), lambda n: 1 + cost * n
    )
    assert speed > 0.97


def test_it_turns_off_and_on_again() -> None:
    """Off while matches mislead, on when they are right; off when passes become expensive, on when they are cheap."""
    policy = LookupPolicy(8)
    misleading = [token for other in noise(300, 5000, 1) for token in (1, 2, other)]
    quoted = noise(200, 5000, 2)
    _, counts = simulate(policy, misleading[:40], misleading[40:], cheap)
    assert sum(counts[:100]) > 5
    assert sum(counts[-100:]) < 10
    assert simulate(policy, quoted, quoted, cheap)[0] > 3
    _, counts = simulate(policy, quoted, quoted, lambda n: 0.5 * (1 + 3 * n))
    assert sum(counts[-100:]) < 10
    assert simulate(policy, quoted, quoted * 5, cheap)[0] > 2


def test_a_slower_machine_is_not_the_cost_of_proposals() -> None:
    """All passes take three times as long."""
    policy = LookupPolicy(MAX_DRAFT_TOKENS)
    quoted = noise(400, 5000, 2)
    simulate(policy, quoted, quoted, cheap)
    assert simulate(policy, quoted, quoted, lambda n: 3 * cheap(n))[0] > 4


def test_a_disturbed_pass_does_not_turn_it_off() -> None:
    """Another program sometimes makes a pass take 20 times as long, which is not the cost of proposals either."""
    disturbed = itertools.cycle([1] * 5 + [20])
    quoted = noise(1000, 5000, 2)
    speed, counts = simulate(LookupPolicy(MAX_DRAFT_TOKENS), quoted, quoted, lambda n: cheap(n) * next(disturbed))
    assert speed > 1
    assert sum(counts) > 800


@pytest.mark.parametrize("most", [-1, MAX_DRAFT_TOKENS + 1])
def test_refused(small: Model, most: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=f"^lookup should be from 0 \\(off\\) to 15, is {most}"):
        generate(small, [1], max_new_tokens=1, lookup=most)
    with pytest.raises(UserError, match="token id 96 is outside"):
        generate(small, [1], max_new_tokens=1, earlier=[96])
    assert command.main(["--weights", "no such folder", "--lookup", str(most), "Hello"]) == 2
    assert capsys.readouterr().err == f"llama3_raw: error: --lookup should be from 0 (off) to 15, is {most}\n"


def test_on_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The text and --top are the same, and --stats counts passes and proposals."""
    monkeypatch.setattr(command, "LookupPolicy", Eager)
    prompt = "Once upon a time, there was a little girl named Lily. Once upon a time"  # the model repeats it
    ran = []
    for lookup in ("0", "6"):
        arguments = ["--weights", str(TINY), "--max-new-tokens", "60", "--top", "2", "--stats", "json"]
        assert command.main([*arguments, "--lookup", lookup, prompt]) == 0
        out, err = capsys.readouterr()
        ran.append((out, [line for line in err.splitlines() if "<-" in line], json.loads(err.splitlines()[-1])))
    (*without, before), (*with_lookup, after) = ran
    assert with_lookup == without
    assert before["passes"] == before["new_tokens"] - 1
    assert before["tokens_proposed"] == before["tokens_accepted"] == 0
    assert 0 < after["tokens_accepted"] <= after["tokens_proposed"]
    assert before["passes"] - after["tokens_accepted"] <= after["passes"] < before["passes"]
