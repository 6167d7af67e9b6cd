"""Measure how well a model predicts a text."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

from .cli.entry_point import answer_help
from .cli.perplexity_parser import build_parser

answer_help(__name__, build_parser)

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .backends.choose import ops_for
from .cli.entry_point import command_line_tool
from .cli.memory_plan import RunShape
from .cli.models import choose_model, load_model
from .cli.options import check_context, parse_ids, read_text
from .decoding.sampling import check_sound, is_sound
from .errors import UserError
from .model import KVCache, forward
from .ops import Ops, Rows, Tap, accumulate_dtype, announce, no_tap
from .params import Params
from .weights import Model

DEFAULT_CONTEXT = 2048  # tokens; a longer window costs more per token and gains little
LLAMA_CPP_CONTEXT = 512  # tokens; the default of llama.cpp's windows

Kind = Literal["sliding", "llama.cpp"]
"""Which windows a text is scored in."""

CHUNK = 256  # positions whose logits are in memory at once


class Score(NamedTuple):
    """How well a text was predicted."""

    tokens: int  # number of scored tokens
    nats: float  # the sum of -log p over them, where p is the model's probability of the token
    logprobs: Tensor | None = None  # [length], with per_token: log p of each token of the text, NaN if it is not scored

    @property
    def nats_per_token(self) -> float:
        """The mean of -log p."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean: the number of equally likely tokens that would be as hard to predict."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf  # math.exp would overflow

    def bits_per_byte(self, n_bytes: int) -> float:
        """Return bits per byte, which do not depend on the tokenizer. n_bytes: UTF-8 length of the scored tokens."""
        return self.nats / math.log(2) / n_bytes


class Window(NamedTuple):
    """The tokens [begin, end), of which [first, end) are scored."""

    begin: int
    first: int
    end: int


def sliding_windows(length: int, context: int, stride: int) -> Iterator[Window]:
    """Yield windows of `context` tokens, `stride` apart, over a text of `length` tokens, to score each token once.

    A token is scored in the first window that contains it. Tokens with no earlier token in that window are not scored:
    the first of the text, or the first of every window if stride equals context.
    (huggingface.co/docs/transformers/perplexity)
    """
    scored = 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        yield Window(begin, max(scored, begin + 1), end)
        scored = end
        if end == length:
            return


class Windows(NamedTuple):
    """How a text is cut into windows; sizes in tokens."""

    context: int
    stride: int
    kind: Kind = "sliding"

    def over(self, length: int) -> Iterator[Window]:
        """Yield the windows of a text of `length` tokens.

        llama.cpp's do not overlap, the second half of each is scored, and tokens after the last whole one are left out.
        (tools/perplexity/perplexity.cpp)
        """
        if self.kind == "sliding":
            yield from sliding_windows(length, self.context, self.stride)
            return
        for begin in range(0, length - self.context + 1, self.context):
            yield Window(begin, begin + self.context // 2 + 1, begin + self.context)

    def tokens(self, ids: Sequence[int], window: Window, bos: int | None) -> list[int]:
        """Return the tokens of a window. In llama.cpp's, BOS takes the place of the first, if the text has one."""
        tokens = list(ids[window.begin : window.end])
        if self.kind == "llama.cpp" and bos is not None and bos == ids[0]:
            tokens[0] = bos
        return tokens


def check_windows(
    params: Params, ids: Sequence[int], context: int | None, stride: int | None, kind: Kind = "sliding"
) -> Windows:
    """Return the windows, with the default for a size that is None.

    Raises UserError if there is nothing to score, for ids outside the vocabulary, and for sizes out of range.
    """
    params.check_ids(ids)
    if kind not in get_args(Kind):
        raise UserError(f"{kind}: should be {' or '.join(get_args(Kind))}", argument="windows")
    if len(ids) < 2:
        raise UserError("there is nothing to score: a token is predicted from those before it; give at least two")
    if context is None:
        context = min(params.max_seq_len, DEFAULT_CONTEXT if kind == "sliding" else LLAMA_CPP_CONTEXT)
    if context < 2:
        raise UserError(f"{context}: should be 2 or more, a token and one before it", argument="context")
    if kind == "llama.cpp":
        if stride not in (None, context) or context < 3 or len(ids) < context:
            raise UserError(
                f"llama.cpp needs a context of 3 or more, a text as long as it, and no stride; here the context is "
                f"{context}, the text has {len(ids)} tokens, and the stride is {stride or 'left out'}",
                argument="windows",
            )
        return Windows(context, context, kind)
    if stride is None:
        stride = context // 2
    if not 1 <= stride <= context:
        raise UserError(
            f"{stride}: should be from 1 to the context of {context}, or tokens are left out", argument="stride"
        )
    return Windows(context, stride)


def perplexity(  # noqa: PLR0913  # what a caller may set
    model: Model,
    ids: Sequence[int],
    *,
    context: int | None = None,
    stride: int | None = None,
    windows: Kind = "sliding",
    ops: Ops | None = None,
    tap: Tap = no_tap,
    per_token: bool = False,
    progress: bool = False,
) -> Score:
    """Score how well the model predicts each of the tokens `ids` from those before it, in windows.

    Args:
        model: what `load` returned.
        ids: the text, [length].
        context: tokens in a window; None takes the model's max_seq_len, at most 2,048.
        stride: how far apart windows begin. None takes half of the context, so that every token has at least that many
            before it (except at the start of the text).
        windows: "llama.cpp" scores the second half of windows that do not overlap, each after BOS, by default of 512
            tokens, as llama.cpp's llama-perplexity does.
        ops: None chooses the set for the weights, with exact attention if the tap may want scores or probs.
        tap: as in `forward`. Positions count from the beginning of a window, whose last token is not computed. To a
            `Trace` with every_pass each window is a text of its own.
        per_token: return the log-probability of each token, too: `Score.logprobs`.
        progress: show a bar on stderr.

    Raises:
        UserError: as `check_windows` does, and if the weights are damaged.
    """
    cut = check_windows(model.params, ids, context, stride, windows)
    ops = ops or ops_for(model.weights, tap=tap)
    device, bos = model.weights.norm.device, model.tokenizer.bos_id if model.tokenizer else None
    cache = KVCache.allocate(model.params, max_seq_len=min(cut.context, len(ids)), like=model.weights)
    count, nats = 0, 0.0
    dtype = accumulate_dtype(model.weights.norm.dtype)
    logprobs = torch.full((len(ids),), torch.nan, dtype=dtype) if per_token else None
    placed = list(cut.over(len(ids)))
    total = sum(window.end - window.first for window in placed)
    with tqdm(total=total, desc="scoring", unit="token", leave=False, disable=not progress) as bar:
        announce(tap, None)
        for number, window in enumerate(placed):
            tokens = torch.tensor(cut.tokens(ids, window, bos), device=device)
            first, texts = window.first - window.begin, ((number,),) if len(placed) > 1 else None
            for start, logits in scored_logits(model, tokens, first, cache, ops, tap, texts):
                targets = tokens[start + 1 : start + 1 + len(logits)]
                losses = F.cross_entropy(logits, targets, reduction="none")
                if logprobs is not None:
                    logprobs[window.begin + start + 1 :][: len(losses)] = -losses
                count += len(losses)
                nats += sum(losses.tolist())
                bar.set_postfix(perplexity=f"{Score(count, nats).perplexity:.3f}", refresh=False)
                bar.update(len(losses))
    return Score(count, nats, logprobs)


@torch.no_grad()
def scored_logits(
    model: Model,
    window: Tensor,
    first: int,
    cache: KVCache,
    ops: Ops,
    tap: Tap = no_tap,
    texts: tuple[tuple[int, ...], ...] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield logits [n, vocab] that predict the tokens window[first:], in chunks, so that few are in memory at once.

    With each chunk comes the position of its first row, which predicts the token after it. window: [T] ids. texts:
    for the tap, as in `Rows`. Raises UserError for logits that are not numbers.
    """
    last = len(window) - 1  # the last token predicts nothing
    cuts = [*range(0, first - 1, CHUNK), *range(first - 1, last, CHUNK), last]
    for start, end in itertools.pairwise(cuts):
        is_scored = start >= first - 1
        announce(tap, Rows((start,), (end - start,), texts, prompt_goes_on=not is_scored))
        logits = forward(
            model.weights,
            model.params,
            window[start:end],
            cache=cache,
            start=start,
            logits_at=None if is_scored else -1,
            ops=ops,
            tap=tap,
        )  # [end - start, vocab] if scored
        if is_scored:
            check_sound(bool(is_sound(logits).all()))
            yield start, logits


def show(score: Score, n_bytes: int | None, cut: Windows) -> None:
    """Print a table, and the same as JSON in the last line. n_bytes: as in `Score.bits_per_byte`; None: unknown."""
    bits_per_byte = None if n_bytes is None else score.bits_per_byte(n_bytes)
    print(f"tokens scored   {score.tokens:12,}  in windows of {cut.context:,}, {cut.stride:,} apart")
    print(f"nats            {score.nats:15,.2f}")
    print(f"nats per token  {score.nats_per_token:17.4f}")
    print(f"perplexity      {score.perplexity:17,.4f}")
    if bits_per_byte is not None:
        print(f"bits per byte   {bits_per_byte:17.4f}")
    figures = {
        "tokens": score.tokens,
        "nats": score.nats,
        "nats_per_token": score.nats_per_token,
        "perplexity": score.perplexity,
        "bits_per_byte": bits_per_byte,
        "context": cut.context,
        "stride": cut.stride,
        **({} if cut.kind == "sliding" else {"windows": cut.kind}),
    }
    print(json.dumps(figures))


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    options = build_parser().parse_args(arguments)
    name = "stdin" if options.file == "-" else options.file
    text = read_text(options.file)
    if not text:
        raise UserError(f"{name}: is empty; give a text to score")
    chosen = choose_model(options, needs_tokenizer=not options.ids)
    params, tokenizer = chosen.checkpoint.params, None if options.ids else chosen.tokenizer
    check_context(options.context, params.max_seq_len)
    ids = parse_ids(text, name) if tokenizer is None else tokenizer.encode(text, bos=True)
    cut = check_windows(params, ids, options.context, options.stride, options.windows)
    length = min(cut.context, len(ids))
    shape = RunShape(prompt=length, text=length, least=2, scored=CHUNK)
    model, ops, which = load_model(chosen, shape, options.reference)
    print(f"llama3_raw: {which}", file=sys.stderr)
    score = perplexity(model, ids, context=cut.context, stride=cut.stride, windows=cut.kind, ops=ops, progress=True)
    n_bytes = None
    if tokenizer is not None:
        scored = (ids[first:end] for _, first, end in cut.over(len(ids)))
        n_bytes = sum(len(tokenizer.token_bytes(token)) for window in scored for token in window)
    show(score, n_bytes, cut)
    return 0


if __name__ == "__main__":
    sys.exit(main())
