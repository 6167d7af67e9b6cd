"""Drafts by a model: a smaller one proposes the next tokens, and the larger one checks them in one pass.

(Leviathan et al. 2023, Fast Inference from Transformers via Speculative Decoding; here nothing is drawn anew after a
rejection: a proposal is accepted if it is the very token that the larger model takes without a draft)

    draft = DraftModel(int4_copy(model), model)
    tokens = generate(model, ids, max_new_tokens=100, draft=draft)
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from statistics import median_low
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..backends.choose import ops_for
from ..backends.cuda_graphs import CudaGraphs
from ..errors import UserError
from ..model import KVCache
from ..ops import Ops, no_tap
from ..quantization.blocks import Blocks
from ..quantization.matrix import Matrix, embed, tensors_of
from ..tokenizer import Tokenizer
from ..weights import LayerWeights, Model, Weights, devices_of, format_name, quantized
from .drafts import ALONE_EVERY, MAX_DRAFT_TOKENS, best_count
from .runner import SingleRunner
from .sampling import Sampling, sample

_MAX_BITS = 5  # per weight; of matrices with no more, a copy in int4 is hardly smaller
_ASSUMED_CHECK = 0.02  # of a pass without proposals: what a proposed token adds to the pass that checks it
_ASSUMED_RIGHT = 0.8  # how often a proposed token is right, if those before it are
_CATCH_UP_ROWS = 8  # tokens of earlier text that take as long as a proposed one, until measured
# an account in passes without proposals; with 0.015 per pass a draft that is never right costs 1.5 %
_GRANT = 1.5
_EARNED = 0.015
_MOST_SAVED = 4.0


def first_layers(model: Model, number: int) -> Model:
    """Return the model with its first layers only, and with its own norm and output matrix; the tensors are the same.

    Raises UserError unless there are fewer of them than the model has.
    """
    if not 1 <= number < len(model.weights.layers):
        raise UserError(f"should be from 1 to {len(model.weights.layers) - 1}, is {number}", argument="number")
    return model._replace(weights=model.weights._replace(layers=model.weights.layers[:number]))


def int4_copy(model: Model, progress: bool = False) -> Model:
    """Return a copy with the matrices of the layers in int4 and the output matrix in int8; the rest is shared.

    progress: show a bar on stderr. Raises UserError if the matrices have few bits already, if their inputs are no
    multiple of 32, or if the copy does not fit into memory.
    """
    weights = model.weights
    check_bits(weights.layers[0].wq)
    dtype = weights.norm.dtype

    def copied(matrix: Matrix, field: str) -> Any:  # of a norm, a tensor
        dense = matrix if isinstance(matrix, Tensor) else matrix.dequantize(dtype)
        return quantized(dense, field, "int4")

    try:
        layers = [
            LayerWeights(*map(copied, layer, LayerWeights._fields))
            for layer in tqdm(weights.layers, desc="a copy in int4", unit="layer", disable=not progress, leave=False)
        ]
        output = copied(weights.output, "output")
    except RuntimeError as error:  # all that torch raises when the CPU's memory is too small
        raise UserError("a copy of the model in int4 does not fit into memory; draft with its first layers") from error
    return model._replace(weights=Weights(weights.tok_embeddings, tuple(layers), weights.norm, output))


def check_bits(matrix: Matrix) -> None:
    """Raise UserError if a matrix has so few bits that a copy in int4 is no faster."""
    if matrix.nbytes * 8 <= _MAX_BITS * matrix.shape.numel():
        raise UserError(
            f"the model is in {format_name(matrix)} already, and an int4 copy is no faster; "
            "draft with its first layers, or with a smaller model"
        )


class DraftModelPolicy:
    """Decides how many tokens a model proposes: the number with the most expected tokens for the measured cost.

    assumed_cost: of a proposed token, relative to a pass without any. Learned are how often a token is right if those
    before it are, and how much longer drafting and checking take per token. Of the last five times the median counts:
    another program on the machine makes some passes longer.

    A draft that does not pay must show at times that it pays again. That is limited by an account in passes without
    proposals: it holds what drafting saved, at most 4, and grows by 0.015 with every pass. A token is proposed only if
    the account can pay for it. The policy changes the speed, never the tokens. passes, proposed, accepted: as in
    `LookupPolicy`.
    """

    def __init__(self, assumed_cost: float):
        self.passes = self.proposed = self.accepted = 0
        self._right = _ASSUMED_RIGHT
        self._costs = deque([assumed_cost], maxlen=5)
        self._seconds_alone: deque[float] = deque(maxlen=5)
        self._since_alone = 0  # passes since the last one without proposals
        self._account = _GRANT
        self._catch_up = assumed_cost / _CATCH_UP_ROWS  # of a token of earlier text, relative to a pass

    @property
    def seconds_alone(self) -> float:
        """The seconds of a pass without proposals."""
        return median_low(self._seconds_alone)

    def how_many(self, limit: int, missing: int) -> int:
        """Return how many tokens to propose, at most `limit`; 0 if that is fastest.

        missing: tokens of earlier text that the draft must compute first.
        """
        # the first pass may take longer, as what it needs is being set up
        if len(self._seconds_alone) < 2 or self._since_alone >= ALONE_EVERY:
            return 0
        limit, cost = min(limit, MAX_DRAFT_TOKENS), median_low(self._costs)
        best = best_count(itertools.repeat(self._right, limit), cost) or 1  # 1: to see whether drafting pays again
        if self._account == _MOST_SAVED and missing == 0:  # it can pay for no more, whatever the cost
            return min(best, limit)
        affordable = (self._account - missing * self._catch_up) / cost
        return max(0, min(best, limit, int(affordable)))

    def learn_cost(self, proposed: int, seconds: float) -> None:
        """Record how long it took to draft `proposed` tokens and to check them in a pass."""
        self.passes += 1
        self.proposed += proposed
        if proposed == 0:
            self._seconds_alone.append(seconds)
            self._since_alone = 0
        else:
            self._costs.append(max(seconds / self.seconds_alone - 1, 1e-3) / proposed)
            self._since_alone += 1
        self._pay(proposed * median_low(self._costs) - _EARNED)

    def learn_catch_up(self, n_tokens: int, seconds: float) -> None:
        """Record how long the draft took to compute tokens of earlier text."""
        passes = seconds / self.seconds_alone
        self._catch_up = passes / n_tokens
        self._pay(passes)

    def learn_right(self, right: bool) -> None:
        """Record whether a proposed token was the right one, if those before it were."""
        self._right += 0.1 * (right - self._right)
        if right:
            self._pay(-1.0)  # a pass is saved

    def _pay(self, passes: float) -> None:
        self._account = min(self._account - passes, _MOST_SAVED)


class DraftModel:
    """A model that proposes tokens for another one, the target.

    It may be any model with the target's tokens. A copy of the target in fewer bits, and its first layers, use its
    cache: they need no memory for another one, and no time for the prompt. Every other draft has its own, and computes
    the prompt too. It serves one text at a time, keeps what it learned from text to text, and its cache as far as a
    text begins as the one before. policy: decides how many tokens are proposed; its counters can be read.

    Raises UserError if the tokens are not the same, or if the two models are not on one and the same device.
    """

    def __init__(self, model: Model, target: Model, ops: Ops | None = None):
        """ops: None chooses the set for the weights of the draft."""
        _check_tokens(model, target)
        if devices_of(model.weights) != devices_of(target.weights) or len(devices_of(model.weights)) > 1:
            raise UserError("a draft and its model should be on one device; load both without gpu_layers")
        self.model = model
        self.ops = ops or ops_for(model.weights)
        self.policy = DraftModelPolicy(_bytes_of(model) / _bytes_of(target) + _ASSUMED_CHECK)
        self.shares_cache = _is_same(model, target)
        self._cached: list[int] = []  # the tokens in its own cache
        self._cache: KVCache | None = None  # its own, or the target's of the last text
        self._graphs: CudaGraphs | None = None

    def of_text(
        self, ids: Sequence[int], position: int, cache: KVCache, sampling: Sampling, generator: torch.Generator
    ) -> DraftOfText:
        """Return the draft of a text.

        ids: the text so far. position: that of its last token in the target's cache. cache: the target's. sampling,
        generator: with which the target's tokens are sampled.
        """
        if self.shares_cache:
            self._use(cache)
        else:
            length = min(cache.max_seq_len, self.model.params.max_seq_len)
            if self._cache is None or self._cache.max_seq_len < length:
                self._cached = []
                self._use(KVCache.allocate(self.model.params, max_seq_len=length, like=self.model.weights))
        assert self._cache is not None
        return DraftOfText(self, ids, position, self._cache, sampling, generator)

    def _use(self, cache: KVCache) -> None:
        if cache is not self._cache:
            self._cache = cache
            self._graphs = CudaGraphs.where_possible(self.model, cache, self.ops, compiled=False)

    def runner(self, cache: KVCache, start: int) -> SingleRunner:
        """Return what runs its passes, if `cache` holds `start` tokens."""
        graphs = self._graphs if self._graphs is not None and self._graphs.cache is cache else None
        return SingleRunner(self.model, cache, start, self.ops, no_tap, graphs)

    def n_cached(self, ids: Sequence[int]) -> int:
        """Return how many of the first `ids` are in the cache. Its own forgets others, such as rejected ones."""
        if self.shares_cache:
            return len(ids)
        del self._cached[common_length(self._cached, ids) :]
        return len(self._cached)

    def keep_cached(self, ids: Sequence[int]) -> None:
        """Record the tokens in its own cache."""
        self._cached = list(ids)


class DraftOfText:
    """A `Draft` by a model for one text."""

    proposes = True

    def __init__(
        self,
        draft: DraftModel,
        ids: Sequence[int],
        position: int,
        cache: KVCache,
        sampling: Sampling,
        generator: torch.Generator,
    ):
        """See `DraftModel.of_text`."""
        self._draft, self._cache, self._sampling = draft, cache, sampling
        self._generator = generator  # the target's; it is only looked at
        self._ids = list(ids)
        self._offset = position - len(self._ids) + 1 if draft.shares_cache else 0  # of a token's place in the cache
        self._expected: list[int] = []  # proposed tokens that are not yet accepted
        self._has_drafted = False
        self._catch_up_seconds = 0.0

    def append(self, token: int) -> None:
        """Record the next token of the text."""
        self._ids.append(token)
        if self._expected:
            right = token == self._expected.pop(0)
            self._draft.policy.learn_right(right)
            if not right:
                self._expected.clear()

    def accept(self) -> None:
        """Record that a proposed token was the right one."""
        self._draft.policy.accepted += 1

    def observe(self, proposed: int, seconds: float) -> None:
        """Record how long drafting and a pass with `proposed` draft tokens took."""
        self._draft.policy.learn_cost(proposed, seconds - self._catch_up_seconds)
        self._catch_up_seconds = 0.0

    def propose(self, limit: int) -> list[int]:
        """Return at most `limit` next tokens, or none if a pass without them is faster.

        They are sampled with the random numbers that the target will use at the same positions. Where the two models
        have similar probabilities, they then take the same tokens. (Daliri et al. 2025, Coupling without Communication
        and Drafter-Invariant Speculative Decoding)
        """
        draft, last = self._draft, len(self._ids) - 1
        begin = draft.n_cached(self._ids[:last])
        # one may be missing: the last of the proposed tokens, if all were right. The first time it is the prompt,
        # which the target computes too
        missing = last - begin if self._has_drafted and last - begin > 1 else 0
        if not draft.shares_cache:
            limit = min(limit, self._cache.max_seq_len - last - 1)
        count = draft.policy.how_many(limit, missing)
        if count <= 0:
            return []
        if last - begin > 1:
            self._catch_up(begin, last)
            begin = last
        self._expected = self._propose(count, begin)
        self._has_drafted = True
        if not draft.shares_cache:
            draft.keep_cached([*self._ids, *self._expected[:-1]])
        return list(self._expected)

    def _catch_up(self, begin: int, end: int) -> None:
        """Compute the tokens of the text from `begin` to `end`, so that they are in the draft's own cache."""
        started = time.perf_counter()
        logits = self._draft.runner(self._cache, begin).prefill([self._ids[begin:end]])
        logits.sum().item()  # wait for a GPU
        self._catch_up_seconds = time.perf_counter() - started
        if self._has_drafted:
            self._draft.policy.learn_catch_up(end - begin, self._catch_up_seconds)

    def _propose(self, count: int, begin: int) -> list[int]:
        """Return `count` next tokens, or fewer if a pass of the draft takes longer than one of the target.

        begin: how many tokens of the text are in the cache.
        """
        runner = self._draft.runner(self._cache, 0)
        random = torch.Generator(self._generator.device)
        random.set_state(self._generator.get_state())
        computing, position = self._ids[begin:], begin + self._offset
        proposed: list[int] = []
        while len(proposed) < count:
            started = time.perf_counter()
            logits = runner.step(torch.tensor([computing], device=runner.device), [position])[0, -1]
            proposed.append(int(sample(logits, self._sampling, [*self._ids, *proposed], random)))
            position += len(computing)
            computing = proposed[-1:]
            if time.perf_counter() - started > self._draft.policy.seconds_alone:
                break
        return proposed


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)


def _check_tokens(model: Model, target: Model) -> None:
    """Raise UserError unless the two models have the same tokens. Special ones may have other names."""
    sizes = model.params.vocab_size, target.params.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(f"the draft has {sizes[0]} tokens and its model {sizes[1]}; choose a draft of the same family")
    both = model.tokenizer, target.tokenizer
    if isinstance(both[0], Tokenizer) and isinstance(both[1], Tokenizer) and both[0].ranks != both[1].ranks:
        raise UserError("the draft has another tokenizer than its model; choose a draft of the same family")


def _is_same(model: Model, target: Model) -> bool:
    """Whether the draft is the target, or its first layers, perhaps in another format, by the norms and embeddings.

    A fine-tune that changed neither counts as the same, too: it proposes from the target's cache.
    """
    ours, theirs = model.weights, target.weights
    return (
        replace(model.params, n_layers=target.params.n_layers) == target.params
        and len(ours.layers) <= len(theirs.layers)
        and ours.norm.dtype == theirs.norm.dtype
        and _first_rows_equal(ours.tok_embeddings, theirs.tok_embeddings)
        and all(
            torch.equal(a.attention_norm, b.attention_norm) and torch.equal(a.ffn_norm, b.ffn_norm)
            for a, b in zip(ours.layers, theirs.layers, strict=False)
        )
    )


def _first_rows_equal(table: Tensor | Blocks, other: Tensor | Blocks) -> bool:
    tokens = torch.arange(8, device=tensors_of(table)[0].device)
    return torch.equal(embed(tokens, table), embed(tokens, other))


def _bytes_of(model: Model) -> int:
    """Return the bytes of the matrices that are read for each token."""
    matrices = [matrix for layer in model.weights.layers for matrix in layer]
    return sum(matrix.nbytes for matrix in [*matrices, model.weights.output])
