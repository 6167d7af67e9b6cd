"""`generate_batch`: several texts at once, with the same decoding loop as `generate`.

A pass over one token reads all weights for that token alone. A pass over 16 tokens reads them once for all 16.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from ..backends.choose import ops_for
from ..errors import UserError
from ..model import KVCache
from ..ops import Ops, Tap, announce, no_tap
from ..weights import Model
from .loop import Event, OnLogits, StopReason, Text, decode, seeded_generator, tokens_to_stop_at
from .runner import BatchRunner
from .sampling import Sampling


class Row(NamedTuple):
    """A prompt of a batch and its settings.

    seed, stop_ids: as in `generate`. is_over: called after each token with all new tokens so far; True ends the text.
    tap: sees the passes over the prompt, which is then computed alone. on_logits: called with each next token,
    a stop token too, and the logits [vocab] that it came from.
    """

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    seed: int | None = None
    is_over: Callable[[Sequence[int]], bool] = lambda new: False
    stop_ids: Collection[int] | None = None
    tap: Tap = no_tap
    on_logits: OnLogits | None = None


def generate_batch(
    model: Model,
    rows: Sequence[Row],
    *,
    stop_ids: Collection[int] | None = None,
    context: int | None = None,
    ops: Ops | None = None,
    shares_beginning: bool = False,
    tap: Tap = no_tap,
) -> Iterator[Event]:
    """Yield (row, token) for each new token, and (row, reason) when a row ends. Rows count from 0.

    A row whose logits are not numbers ends with StopReason.NOT_NUMBERS, and the others go on.

    Each row gets the tokens that `generate` yields for it alone with the same settings. With the CPU's fast operations
    in bf16 the bits are the same; elsewhere rounding differs, and may decide between two tokens that are about equally
    likely. The same rows in the same order always give the same tokens.

    Args:
        model: what `load` returned.
        rows: the prompts, each with its settings. Consecutive short prompts are padded on the right and computed
            together, so put prompts of similar length next to each other.
        stop_ids: as in `generate`, for rows that have none of their own; context and ops too.
        shares_beginning: compute the tokens that all prompts begin with once. Rounding then differs in bf16 too.
        tap: as in `forward`. A pass over a prompt alone has no dimension for rows. Prompts that are computed together
            are padded on the right, and in the rows of a pass each text is at a position of its own: `patch` with
            positions and `Trace` with every_pass tell them apart.

    Raises:
        UserError: as `generate` does, at the call.
    """
    limit = model.params.max_seq_len if context is None else context
    for row in rows:
        if not row.ids:
            raise UserError("a prompt is empty; give at least one token")
        model.params.check_ids(row.ids)
        if len(row.ids) > limit:
            raise UserError(f"a prompt needs {len(row.ids)} positions, but the context holds {limit}; shorten it")
    ends = tokens_to_stop_at(model, stop_ids)
    if tap is not no_tap and any(row.tap is not no_tap for row in rows):
        raise UserError("rows have taps of their own, which cannot be combined with {argument}", argument="tap")
    texts = [text_of(model, number, row, limit, ends) for number, row in enumerate(rows)]
    announce(tap, None)
    return _decode(model, texts, ops or ops_for(model.weights, tap=tap), shares_beginning, tap)


def text_of(model: Model, number: int, row: Row, limit: int, ends: Collection[int]) -> Text:
    """Return the text that continues a row within `limit` tokens. ends: its stop tokens if it has none of its own."""
    budget = max(0, min(row.max_new_tokens, limit - len(row.ids)))
    return Text(
        number,
        prompt=list(row.ids),
        budget=budget,
        when_spent=StopReason.MAX_NEW_TOKENS if budget >= row.max_new_tokens else StopReason.CONTEXT,
        sampling=row.sampling,
        generator=seeded_generator(model, row.seed),
        stop_ids=ends if row.stop_ids is None else row.stop_ids,
        is_over=row.is_over,
        tap=row.tap,
        on_logits=row.on_logits,
    )


def _decode(model: Model, texts: Sequence[Text], ops: Ops, shares_beginning: bool, tap: Tap) -> Iterator[Event]:
    """Decode the texts; the cache is allocated at the first `next`, and only for texts with a budget."""
    running = [text for text in texts if text.budget]
    yield from ((text.number, text.when_spent) for text in texts if not text.budget)
    if running:
        longest = max(len(text.prompt) + text.budget for text in running) - 1  # nothing attends to the last token
        cache = KVCache.allocate(model.params, max_seq_len=longest, like=model.weights, batch=(len(running),))
        numbers = [(text.number,) for text in running]
        yield from decode(running, BatchRunner(model, cache, ops, shares_beginning, tap, numbers))
