"""The decoding loop: the prompt in chunks, then a token at a time. An iterator of ids that knows no text."""

from __future__ import annotations

import enum
from collections.abc import Collection, Generator, Sequence

import torch
from torch import Tensor

from .errors import UserError
from .model import REFERENCE, KVCache, forward, no_tap
from .ops import Ops, Tap
from .ops_cpu import fast_ops
from .sampling import Sampling, sample
from .weights import Model

# Tokens of the prompt in one forward pass: enough for matrix products at full speed, few enough that the scores
# [n_heads, chunk, S] of a long prompt stay small.
PREFILL_CHUNK = 256


class StopReason(enum.Enum):
    """Why `generate` ended."""

    END_TOKEN = "the model ended the text"
    MAX_NEW_TOKENS = "max_new_tokens is reached"
    CONTEXT = "the context is full"


def fastest_ops(device: torch.device) -> Ops:
    """The fast operations of a device; the reference ones where it has none."""
    return fast_ops() if device.type == "cpu" else REFERENCE


def generate(
    model: Model,
    ids: Sequence[int] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop_ids: Collection[int] | None = None,
    context: int | None = None,
    cache: KVCache | None = None,
    start: int = 0,
    ops: Ops | None = None,
    tap: Tap | None = None,
) -> Generator[int, None, StopReason]:
    """Yields the tokens that follow the prompt `ids`, one int at a time; returns why it stopped.

    Temperature 0 takes the likeliest token; for the other sampling settings see `Sampling`. seed: the same seed on the
    same machine draws the same tokens; None draws anew.
    stop_ids: the tokens at which it ends (not yielded); None takes the tokenizer's, () never ends there.
    context: the most tokens, prompt included; None takes the model's max_seq_len, and more than that is your own risk.
    cache, start: a cache that already holds `start` tokens, to go on from there; it is written in place, and afterwards
        holds all tokens but the last one yielded. None makes one that is just large enough. The repetition penalty
        sees the tokens of `ids` and new ones, not those that only the cache holds.
    ops: None takes the set that suits the device. tap: as in `forward`.

    Raises UserError for an empty prompt, ids outside the vocabulary, a prompt longer than the context, a cache that the
    memory does not hold, and settings out of range; at the call, not at the first token.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    limit = model.params.max_seq_len if context is None else context
    if cache is not None:
        limit = min(limit, cache.max_seq_len)
    if limit < 1:
        raise UserError(f"the context should be 1 or more, is {limit}")
    if start < 0 or (start > 0 and cache is None):
        raise UserError(f"start should be how many tokens the given cache holds, is {start}")
    prompt = [int(token) for token in ids]
    if not prompt:
        raise UserError("the prompt is empty; give at least one token")
    for token in prompt:
        if not 0 <= token < model.params.vocab_size:
            raise UserError(f"token id {token} is outside the model's vocabulary of {model.params.vocab_size}")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens should be 0 or more, is {max_new_tokens}")
    end = start + len(prompt)
    if end > limit:
        raise UserError(f"the prompt needs {end} positions, but the context holds {limit}; shorten the prompt")
    if stop_ids is None:
        stop_ids = model.tokenizer.stop_ids if model.tokenizer else ()
    budget = min(max_new_tokens, limit - end)
    if cache is None:
        try:
            cache = KVCache.allocate(model.params, max_seq_len=end + budget, like=model.weights)
        except RuntimeError as error:  # torch's only word for memory that the CPU does not have
            raise UserError(
                f"a cache for {end + budget} tokens does not fit into memory; lower --max-new-tokens or --context"
            ) from error
    device = model.weights.tok_embeddings.device
    if ops is None:
        ops = fastest_ops(device)
    generator = torch.Generator(device)
    generator.seed() if seed is None else generator.manual_seed(seed)

    def last_logits(new: Sequence[int], position: int) -> Tensor:
        """The logits [vocab] behind the tokens `new`, which start at `position`."""
        with torch.no_grad():
            return forward(
                model.weights,
                model.params,
                torch.tensor(new, device=device),
                cache=cache,
                start=position,
                logits_at=-1,
                ops=ops,
                tap=tap or no_tap,
            )

    def tokens() -> Generator[int, None, StopReason]:
        seen = list(prompt)
        position = start
        new = prompt
        for _ in range(budget):
            for begin in range(0, len(new), PREFILL_CHUNK):
                chunk = new[begin : begin + PREFILL_CHUNK]
                logits = last_logits(chunk, position)
                position += len(chunk)
            if not logits.amax() < torch.inf:  # nor is NaN
                raise UserError(
                    "the logits are not numbers: the weights are damaged (see download.py --verify), or their dtype is "
                    "too small for them"
                )
            token = int(sample(logits, sampling, seen, generator))
            if token in stop_ids:
                return StopReason.END_TOKEN
            yield token
            seen.append(token)
            new = [token]
        return StopReason.MAX_NEW_TOKENS if budget == max_new_tokens else StopReason.CONTEXT

    return tokens()
