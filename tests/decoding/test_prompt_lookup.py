"""Prompt lookup: the same tokens as without, in fewer passes; what is proposed, and when."""

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
from llama3_raw.backends import cpu
from llama3_raw.chat import conversation
from llama3_raw.chat.conversation import Conversation
from llama3_raw.decoding.loop import StopReason, generate
from llama3_raw.decoding.prompt_lookup import LONGEST, MOST, EarlierText, LookupPolicy, PromptLookup
from llama3_raw.decoding.sampling import Sampling
from tests.paths import TINY
from tests.references import random_weights, run

PARAMS = Params.from_meta(
    {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 96, "norm_eps": 1e-5, "max_seq_len": 200}
)


class Eager(LookupPolicy):
    """Proposes all it may, whatever a pass costs here and now; but for the first pass, as any policy."""

    def how_many(self, match: int, room: int) -> int:
        return max(0, min(self.most, room)) if match and self.passes else 0


@pytest.fixture(autouse=True)
def _kernels() -> None:
    try:
        cpu.build_kernels()
    except cpu.CannotBuild as reason:
        pytest.skip(f"without the kernels tokens may differ by rounding: {reason}")


@pytest.fixture(scope="module")
def small() -> Model:
    return Model(random_weights(PARAMS, torch.bfloat16, seed=1), PARAMS, None)


@example([0, 1, 2] * 20, [])  # more places than are looked at
@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 1), max_size=60))
def test_matches_are_those_of_a_plain_scan(first: list[int], second: list[int]) -> None:
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
    "greedy, penalised": {"repetition_penalty": 1.3},
    "drawn": {"temperature": 1.0, "seed": 3},
    "drawn, cut": {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 4},
}


def spoilt(ids: Sequence[int], every: int) -> list[int]:
    """The text with one token in so many replaced."""
    return [token ^ 1 if i % every == every - 1 else token for i, token in enumerate(ids)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("which", ["small", "tiny"])
def test_the_same_tokens(which: str, sampling: str, request: pytest.FixtureRequest) -> None:
    """Proposals are right all along, right and wrong in turn, or come from the text itself."""
    model = request.getfixturevalue(which)
    settings: dict[str, Any] = {"max_new_tokens": 40, "stop_ids": (), **SAMPLINGS[sampling]}
    prompt = [5, 6, 7, 8, 9, 5, 6, 7]
    expected = list(generate(model, prompt, **settings))
    for most, earlier in itertools.product((2, MOST), (prompt + expected, spoilt(prompt + expected, 6), [])):
        policy = Eager(most)
        assert list(generate(model, prompt, lookup=policy, earlier=earlier, **settings)) == expected
        if earlier == prompt + expected:
            assert policy.accepted >= 39 - policy.passes > 0
    assert list(generate(model, prompt, lookup=4, earlier=earlier, **settings)) == expected


def test_fewer_passes(small: Model) -> None:
    """With the answer before it 15 of 16 tokens need no pass of their own; the tap sees what is computed."""
    rows = []

    def tap(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "logits":
            rows.append(tensor.numel() // PARAMS.vocab_size)
        return tensor

    prompt = torch.randint(96, (9,), generator=torch.Generator().manual_seed(5)).tolist()
    expected = list(generate(small, prompt, max_new_tokens=80, temperature=1.0, seed=1, tap=tap))
    assert rows == [1] * 80
    rows.clear()
    policy = Eager(MOST)
    earlier = prompt + expected
    settings: dict[str, Any] = {"max_new_tokens": 80, "temperature": 1.0, "seed": 1, "tap": tap}
    assert list(generate(small, prompt, lookup=policy, earlier=earlier, **settings)) == expected
    assert len(rows) <= 8
    assert policy.passes == len(rows) - 1
    assert policy.proposed == sum(rows) - len(rows)
    assert policy.accepted == 80 - len(rows)


def test_where_it_ends(small: Model) -> None:
    """By the budget, the context, the cache and a token that ends the text, each in the midst of right proposals."""
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
            assert run(generate(small, prompt, lookup=Eager(MOST), **settings, **common)) == (expected, reason)
        end = whole[count]
        before = whole[: whole.index(end)]
        ended = run(generate(small, prompt, max_new_tokens=60, stop_ids=[end], lookup=Eager(7), **common))
        assert ended == (before, StopReason.END_TOKEN)


@pytest.mark.slow
def test_one_who_stops_midway_goes_on_with_the_cache(small: Model) -> None:
    """Wherever it is stopped, the cache holds all but the last token, whatever was proposed in vain."""
    prompt = [9, 8, 7]
    whole = list(generate(small, prompt, max_new_tokens=34))
    for earlier, count in itertools.product((whole, spoilt(whole, 5)), range(1, 30, 2)):
        cache = KVCache.allocate(PARAMS, max_seq_len=60, like=small.weights)
        settings: dict[str, Any] = {"max_new_tokens": 34, "cache": cache, "earlier": earlier}
        with closing(generate(small, prompt, lookup=Eager(6), **settings)) as tokens:
            assert list(itertools.islice(tokens, count)) == whole[:count]
        start = len(prompt) + count - 1
        rest = generate(small, whole[count - 1 : count], max_new_tokens=34 - count, cache=cache, start=start)
        assert list(rest) == whole[count:]


def test_a_conversation_is_the_same(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over turns, with answers that are broken off; proposals come from earlier turns too."""
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
    """A model that says `text`, by a clock of its own; -> how much faster than without, and what each pass proposed."""
    proposer, alone, said, time, counts = PromptLookup(policy, earlier), seconds(0), 0, 0.0, []
    while said < len(text):
        proposed = proposer.propose(len(text) - said - 1)
        took = seconds(len(proposed))
        policy.learn_cost(len(proposed), took)
        time += took
        counts.append(len(proposed))
        for token in [*proposed, None]:
            proposer.append(text[said])
            said += 1
            if text[said - 1] != token:
                break
    return len(text) * alone / time, counts


def noise(length: int, vocabulary: int, seed: int) -> list[int]:
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def cheap(proposed: int) -> float:
    """Seconds of a pass, about as 8B takes on a CPU."""
    return 0.5 * (1 + 0.1 * proposed)


def test_it_pays_on_a_quotation() -> None:
    text = noise(300, 5000, 1)
    speed, counts = simulate(LookupPolicy(MOST), text, text, cheap)
    assert speed > 4
    assert max(counts) == MOST
    assert simulate(LookupPolicy(3), text, text, cheap)[0] > 2.5


@pytest.mark.parametrize("price", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("vocabulary", [12, 40, 5000])
def test_it_costs_next_to_nothing_elsewhere(vocabulary: int, price: float) -> None:
    """Pairs of tokens that are there again and again and never foretell anything; passes that are dear."""
    speed, _ = simulate(
        LookupPolicy(MOST), noise(500, vocabulary, 1), noise(1000, vocabulary, 2), lambda n: 1 + price * n
    )
    assert speed > 0.97


def test_it_is_off_and_on_again() -> None:
    """Off while matches are misleading, on when they are right; off when the passes become dear, on when cheap."""
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


def test_it_notices_that_the_machine_is_slower() -> None:
    """All passes take three times as long: that is not the price of proposals."""
    policy = LookupPolicy(MOST)
    quoted = noise(400, 5000, 2)
    simulate(policy, quoted, quoted, cheap)
    assert simulate(policy, quoted, quoted, lambda n: 3 * cheap(n))[0] > 4


def test_a_disturbed_pass_does_not_turn_it_off() -> None:
    """Now and then something else on the machine makes a pass take 20 times as long, which is no price either."""
    disturbed = itertools.cycle([1] * 5 + [20])
    quoted = noise(1000, 5000, 2)
    speed, counts = simulate(LookupPolicy(MOST), quoted, quoted, lambda n: cheap(n) * next(disturbed))
    assert speed > 1
    assert sum(counts) > 800


@pytest.mark.parametrize("most", [-1, MOST + 1])
def test_what_is_refused(small: Model, most: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=f"^lookup should be from 0 \\(off\\) to 15, is {most}"):
        generate(small, [1], max_new_tokens=1, lookup=most)
    with pytest.raises(UserError, match="token id 96 is outside"):
        generate(small, [1], max_new_tokens=1, earlier=[96])
    assert command.main(["--weights", "no such folder", "--lookup", str(most), "Hello"]) == 2
    assert capsys.readouterr().err == f"llama3_raw: error: --lookup should be from 0 (off) to 15, is {most}\n"


def test_on_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text and --top, and what it took in --stats."""
    monkeypatch.setattr(command, "LookupPolicy", Eager)
    prompt = "Once upon a time, there was a little girl named Lily. Once upon a time"  # and it goes on likewise
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
