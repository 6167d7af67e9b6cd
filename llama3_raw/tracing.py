"""python -m llama3_raw.tracing: the tensors of one forward pass by name, as a table or a file.

And the taps that do it, for Python: `Trace` keeps copies, `patch` replaces, `break_at` stops in a debugger, `chain` has
several see the same pass.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import pdb
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .command_line import (
    DTYPES_BY_NAME,
    add_model_options,
    add_prompt_options,
    check_output,
    choose_model,
    chosen_ids,
    load_model,
    read_prompt,
)
from .errors import ArgumentParser, UserError, command_line_tool, in_short, not_empty, read_beginning
from .generation import check_ids, suitable_ops
from .machine import free_memory
from .memory import Lengths
from .model import REFERENCE, forward, no_tap
from .ops import Ops, Tap
from .params import Params, RopeScaling
from .weights import LayerWeights, Model, Weights, tensor_places

_UNFUSED = ("scores", "probs")  # those within `attend`
FIRST, LAST = "tok_embeddings", "logits"  # the names with which every pass begins and ends
_BYTES_TO_WORK = 12  # the largest tensor of a pass is made so many times over (as measured for memory.py)
_BY_HEAD = {f"attention.{name}" for name in ("q", "k", "v", "q_rope", "k_rope", "heads")}


class Patterns:
    """Names as a user gives them, in which `*`, `?` and `[0-9]` stand for text as in a shell.

    A `*` at either end of a pattern stands for any text, one in between for text without a dot: "layers.0.*" is all of
    layer 0, "layers.*.residual" the output of each layer, "*.residual" that of its attention too.
    """

    def __init__(self, patterns: Sequence[str]):
        self._regexes = {pattern: re.compile(_regex(pattern)) for pattern in patterns}
        self._unmet = dict.fromkeys(patterns)
        self._seen: dict[str, None] = {}

    def matching(self, name: str) -> list[str]:
        """The patterns that mean this name of a pass, in the order in which they were given.

        Raises UserError at the end of a pass in which one of them meant nothing, with the names nearest to it.
        """
        matching = [pattern for pattern, regex in self._regexes.items() if regex.fullmatch(name)]
        for pattern in matching:
            self._unmet.pop(pattern, None)
        self._seen[name] = None
        if name == LAST and self._unmet:
            raise UserError(_unknown(next(iter(self._unmet)), list(self._seen)))
        return matching


def _regex(pattern: str) -> str:
    parts = re.split(r"(\*+|\?|\[[^\]]+\])", pattern)
    for i, part in enumerate(parts):
        if part.startswith("*"):
            at_an_end = not any(parts[:i]) or not any(parts[i + 1 :])
            parts[i] = ".*" if at_an_end else r"[^.]*"
        elif part == "?":
            parts[i] = r"[^.]"
        elif not (part.startswith("[") and part.endswith("]")):
            parts[i] = re.escape(part)
    return "".join(parts)


def _unknown(pattern: str, names: Sequence[str]) -> str:
    """What to say of a pattern that means none of the names that a pass had."""
    layers = [int(name.split(".")[1]) for name in names if name.startswith("layers.")]
    for hidden in (f"layers.{layer}.attention.{name}" for layer in dict.fromkeys(layers) for name in _UNFUSED):
        if hidden not in names and re.fullmatch(_regex(pattern), hidden):
            return f"{pattern!r}: the fast attention makes no scores; take ops=llama3_raw.REFERENCE (leave --fast out)"
    every_layer = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    near = difflib.get_close_matches(pattern, every_layer if "*" in pattern else names, n=3, cutoff=0)
    return f"no tensor is named {pattern!r} in a pass of layers 0 to {max(layers)}; the nearest are {', '.join(near)}"


def chain(*taps: Tap) -> Tap:
    """One tap out of several: each gets the tensor that the one before it returned."""

    def chained(name: str, tensor: Tensor) -> Tensor:
        for tap in taps:
            tensor = tap(name, tensor)
        return tensor

    return chained


def patch(replacements: Mapping[str, Callable[[Tensor], Tensor]]) -> Tap:
    """A tap that puts function(tensor) in the place of each tensor that a name or pattern means.

    The pass goes on with it: for activation patching, ablating a head, steering. The shapes are those that model.py
    states. Where several patterns mean a name, their functions are applied one after the other.

    The tap raises UserError for a result that is no tensor of the same shape, dtype and device, and at the end of the
    pass for a pattern that means nothing.
    """
    patterns = Patterns(list(replacements))

    def patching(name: str, tensor: Tensor) -> Tensor:
        for pattern in patterns.matching(name):
            result = replacements[pattern](tensor)
            if not isinstance(result, Tensor) or _kind(result) != _kind(tensor):
                got = _kind(result) if isinstance(result, Tensor) else type(result).__name__
                raise UserError(f"the patch of {name} should return a tensor {_kind(tensor)}, returns {got}")
            tensor = result
        return tensor

    return patching


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} in {in_words(tensor.dtype)} on {tensor.device}"


def in_words(dtype: torch.dtype) -> str:
    """bfloat16, say."""
    return str(dtype).removeprefix("torch.")


def break_at(*patterns: str) -> Tap:
    """A tap that stops in pdb where a tensor that one of the patterns means was just made, in the frame of model.py.

    There it is a local, or `__return__` where a function returns it, and its neighbours are locals. Another debugger,
    which $PYTHONBREAKPOINT or sys.breakpointhook names, is called in its place and stops in this tap, whose caller is
    the frame of model.py. Input that is no terminal and ends makes the run go on without a stop.

    The tap raises bdb.BdbQuit, as pdb does, where the user quits, and UserError at the end of a pass in which a pattern
    means nothing.
    """
    wanted = Patterns(patterns)
    debugger = _Debugger()

    def breaking(name: str, tensor: Tensor) -> Tensor:
        if wanted.matching(name):
            if os.environ.get("PYTHONBREAKPOINT") or sys.breakpointhook is not sys.__breakpointhook__:
                sys.breakpointhook()
            else:
                debugger.stop(name, tensor)
        return tensor

    return breaking


class _Debugger(pdb.Pdb):
    """One pdb for all stops of a run, so that what the user sets at one holds at the next."""

    def __init__(self) -> None:
        super().__init__(
            stdout=None if sys.stdout.isatty() else sys.stderr,  # stdout is for the text alone
            nosigint=True,  # Ctrl-C is up to the tool
            skip=("bdb", __name__),  # not to be stepped into: how a stop is set up, and the taps
        )
        self._to_show: tuple[str, Tensor] | None = None
        self._input_ended = False

    def stop(self, name: str, tensor: Tensor) -> None:
        """Has pdb stop in the frame of model.py that called the tap: at its next line, or where it returns."""
        if self._input_ended:
            return
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code.co_filename != forward.__code__.co_filename:
            frame = frame.f_back
        assert frame is not None, "break_at is a tap for model.forward"
        self._to_show = name, tensor
        sys.settrace(None)  # a step that was under way ends here
        self.set_trace(frame)
        self.set_next(frame)  # not in a tap behind this one

    def set_stepinstr(self) -> None:
        """What set_trace calls from Python 3.13 on, to stop at once; but only the next line has the tensor by name."""
        self.set_step()

    def interaction(self, frame: FrameType | None, traceback: TracebackType | None) -> None:
        """Says at a stop which tensor it is for."""
        if self._to_show is not None and frame is not None:
            name, tensor = self._to_show
            self._to_show = None
            bound = next((f", here {local}" for local, value in frame.f_locals.items() if value is tensor), "")
            what = f"{list(tensor.shape)} in {in_words(tensor.dtype)}"
            self.message(f"llama3_raw: {name} {what}{bound}; c goes on, q ends")
        super().interaction(frame, traceback)

    def do_EOF(self, arg: str) -> bool | None:
        """Ends as q does in a terminal (Ctrl-D); at the end of other input the run goes on and stops no more."""
        if sys.stdin.isatty():
            return super().do_EOF(arg)
        self.message("\nllama3_raw: no more commands for pdb; it goes on without it")
        self._input_ended = True
        self.clear_all_breaks()
        return self.do_continue("")


def not_alike(params: Params, others: Params) -> str | None:
    """The first number by which the tensors of a model have other shapes than another's, in words; None: all alike."""
    for field in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"):
        if getattr(params, field) != getattr(others, field):
            return f"{field} {getattr(params, field)}, not {getattr(others, field)}"
    return None


@dataclass(frozen=True)
class Origin:
    """What a trace is of."""

    params: Params
    ids: list[int]
    weights: str  # a digest of the norms, which are the same in every dtype and in int8

    @staticmethod
    def of(model: Model, ids: Sequence[int]) -> Origin:
        """What a pass of the model over these tokens is known by."""
        weights = model.weights
        norms = [norm for layer in weights.layers for norm in (layer.attention_norm, layer.ffn_norm)]
        digest = sha256()
        for norm in (*norms, weights.norm):
            digest.update(norm.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
        return Origin(model.params, list(ids), digest.hexdigest()[:32])

    def check(self, model: Model, ids: Sequence[int], source: str) -> None:
        """Raises UserError where the model has other weights or tokens than the trace in `source` is of.

        How eps and RoPE are set may differ: that is what a comparison is to find.
        """
        own = Origin.of(model, ids)
        if not_alike(self.params, own.params):
            raise UserError(f"{source}: is of another model, with {not_alike(self.params, own.params)}; trace it anew")
        if self.weights != own.weights:
            raise UserError(f"{source}: is of a model of the same shape with other weights; trace it anew")
        if self.ids != own.ids:
            first = next((i for i, pair in enumerate(zip(self.ids, own.ids, strict=False)) if pair[0] != pair[1]), None)
            where = f"{len(self.ids)} tokens, not {len(own.ids)}" if first is None else f"another token {first}"
            raise UserError(f"{source}: is of another prompt, with {where}; give the same prompt, or trace it anew")


class Trace(Mapping[str, Tensor]):
    """A tap that keeps a copy of every tensor that one of the patterns means; without patterns, of every tensor.

    A mapping from name to tensor, in the order of the forward pass. Of several passes (`generate` makes one for each
    token) it has the tensors of the last. What it holds is detached and never changes with what the pass does later.

    device, dtype: where and in what the copies are kept; None as the pass has them. last_position: of the last token
        only, without the dimension T.
    origin: what it is of, if that is known: `trace` says so, and `save` and `load_trace` keep it.

    Raises UserError at the end of a pass in which a pattern means nothing.
    """

    def __init__(
        self,
        *patterns: str,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        last_position: bool = False,
    ):
        self._patterns = Patterns(patterns or ("*",))
        self._device = device
        self._dtype = dtype
        self._last_position = last_position
        self._dimensions = 0  # of the embeddings, thus of a tensor [..., T, something]
        self._tensors: dict[str, Tensor] = {}
        self.origin: Origin | None = None

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Keeps a copy of it, if it is meant; -> the tensor itself. The tap of `forward`."""
        if name == FIRST:
            self._dimensions = tensor.dim()
        if self._patterns.matching(name):
            kept = self._last(name, tensor) if self._last_position else tensor
            # one copy, even where device and dtype are the same
            self._tensors[name] = torch.empty_like(
                kept.detach(),
                device=self._device or kept.device,
                dtype=self._dtype or kept.dtype,
                memory_format=torch.contiguous_format,
            ).copy_(kept.detach())
        return tensor

    def _last(self, name: str, tensor: Tensor) -> Tensor:
        if name == LAST and tensor.dim() < self._dimensions:
            return tensor  # logits_at has chosen one already
        by_head = ".".join(name.split(".")[-2:]) in _BY_HEAD  # [..., T, heads, head_dim]
        return tensor.select(-3 if by_head else -2, -1)

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._tensors, n=3, cutoff=0)
            raise KeyError(
                f"no {name!r} in this trace; the nearest are {', '.join(near) or 'none, it is empty'}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"<Trace of {len(self)} tensors, {self.nbytes:,} bytes>"

    @property
    def nbytes(self) -> int:
        """The memory that its tensors take."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def save(self, file: str | Path) -> None:
        """Writes safetensors, whose metadata hold the order of the names and the origin. A file there is replaced."""
        about = {"names": list(self), "origin": self.origin and asdict(self.origin)}
        partial = Path(f"{file}.part")  # so that what was there stays whole until the end
        try:
            save_file(dict(self), partial, metadata={"llama3_raw": json.dumps(about)})
            partial.replace(file)
        except SafetensorError as error:
            raise UserError(f"{file}: cannot be written ({in_short(error)}); choose another place with -o") from error
        finally:
            partial.unlink(missing_ok=True)


def load_trace(file: str | Path) -> Trace:
    """What `Trace.save` wrote, or any safetensors with tensors by the names of a tap, whose origin is not known.

    Raises UserError where the file is missing, or no safetensors.
    """
    file = Path(file)
    read_beginning(file)
    loaded = Trace()
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {}).get("llama3_raw", "{}"))
            for name in about.get("names") or opened.keys():
                loaded._tensors[name] = opened.get_tensor(name)
        if about.get("origin"):
            params = dict(about["origin"]["params"])
            if params["rope_scaling"]:
                params["rope_scaling"] = RopeScaling(**params["rope_scaling"])
            loaded.origin = Origin(Params(**params), list(about["origin"]["ids"]), str(about["origin"]["weights"]))
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: is no trace that can be read ({in_short(error)}); write it anew") from error
    return loaded


def trace(
    model: Model,
    ids: Sequence[int] | Tensor,
    *patterns: str,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    last_position: bool = False,
    ops: Ops = REFERENCE,
    tap: Tap = no_tap,
    progress: bool = False,
) -> Trace:
    """A forward pass over a prompt, ids [T]; -> the tensors that the patterns mean, as `Trace` keeps them.

    tap: sees each tensor first, so that a `patch` shows in the trace. progress: a bar on stderr, layer by layer.

    Raises UserError, before anything is computed, for patterns that mean nothing, ids outside the vocabulary, and what
    the memory does not hold; and what `tap` raises.
    """
    ids = [int(token) for token in ids]
    if not ids:
        raise UserError("the prompt is empty; give at least one token")
    check_ids(ids, model.params)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "last_position": last_position}
    check_trace(model.params, model.weights.norm.dtype, len(ids), *patterns, **options, ops=ops)
    kept = Trace(*patterns, **options)
    kept.origin = Origin.of(model, ids)
    with count_layers(model.params, progress) as count, torch.no_grad():
        tokens = torch.tensor(ids, device=model.weights.tok_embeddings.device)
        forward(model.weights, model.params, tokens, ops=ops, tap=chain(tap, kept, count))
    return kept


@contextlib.contextmanager
def count_layers(params: Params, progress: bool = True) -> Iterator[Tap]:
    """A bar on stderr that shows how far a pass is, if it takes longer than a second; -> the tap that moves it."""
    with tqdm(total=params.n_layers, desc="layers", leave=False, delay=1, disable=not progress) as bar:

        def count(name: str, tensor: Tensor) -> Tensor:
            bar.update(name.endswith(".ffn_norm"))
            return tensor

        yield count


def check_trace(
    params: Params,
    compute_dtype: torch.dtype,
    length: int,
    *patterns: str,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    last_position: bool = False,
    ops: Ops = REFERENCE,
) -> None:
    """Raises UserError where a trace of `length` tokens does not fit into the free memory, or a pattern means nothing.

    It is found out by a pass without content (on torch's meta device), in a fraction of a second.
    """
    planned = Trace(*patterns, device="meta", dtype=dtype, last_position=last_position)
    largest = 0

    def note_size(name: str, tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.nbytes)
        return tensor

    _pass_without_content(params, compute_dtype, length, ops, chain(planned, note_size))
    free = free_memory(torch.device(device or "cpu"))
    if planned.nbytes + _BYTES_TO_WORK * largest > free:
        raise UserError(
            f"the trace takes {planned.nbytes / 1e9:.2f} GB, and the pass {_BYTES_TO_WORK * largest / 1e9:.2f} GB to "
            f"work in, but {free / 1e9:.2f} GB are free; name fewer tensors, keep the last position only, or shorten "
            "the prompt"
        )


def check_names(params: Params, *patterns: str) -> None:
    """Raises UserError where a pattern means nothing in a pass of such a model by the exact operations."""
    _pass_without_content(params, torch.bfloat16, 1, REFERENCE, Trace(*patterns, device="meta"))


def _pass_without_content(params: Params, dtype: torch.dtype, length: int, ops: Ops, tap: Tap) -> None:
    """Has the tap see what it would see in a pass of `length` tokens: all names, shapes and dtypes, without content."""
    fields = {
        (place.layer, place.field): torch.empty(place.shape, dtype=dtype, device="meta")
        for place in tensor_places(replace(params, n_layers=1))
    }
    layer = LayerWeights(*(fields[0, field] for field in LayerWeights._fields))
    weights = Weights(fields[None, "tok_embeddings"], (layer,), fields[None, "norm"], fields[None, "output"])
    # the kernels that read weights cannot do without; what tensors there are is up to `attend` alone
    ops = ops._replace(embed=REFERENCE.embed, linear=REFERENCE.linear)
    seen: list[tuple[str, Tensor]] = []

    def see(name: str, tensor: Tensor) -> Tensor:
        seen.append((name, tensor))
        return tensor

    forward(weights, params, torch.zeros(length, dtype=torch.long, device="meta"), ops=ops, tap=see)
    first, *in_layer, norm, logits = seen
    tap(*first)
    for i in range(params.n_layers):  # all alike; to compute each takes milliseconds
        for name, tensor in in_layer:
            tap(name.replace("layers.0.", f"layers.{i}."), tensor)
    tap(*norm)
    tap(*logits)


class Statistics(NamedTuple):
    """What a tensor is like; the figures are of its finite values (a mask makes scores -inf)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    mean: float
    std: float
    min: float
    max: float
    non_finite: float  # the share of the others

    @staticmethod
    def of(tensor: Tensor) -> Statistics:
        """The figures, NaN where no value is finite; std is that of the values themselves (divided by n)."""
        finite = tensor[tensor.isfinite()].double()
        share = 1 - finite.numel() / max(1, tensor.numel())
        low, high = finite.aminmax() if finite.numel() else (math.nan, math.nan)
        std = finite.std(correction=0) if finite.numel() else math.nan  # torch would warn
        return Statistics(tuple(tensor.shape), tensor.dtype, *map(float, (finite.mean(), std, low, high, share)))


def show(tensors: Mapping[str, Tensor]) -> None:
    """Prints a line of figures for each tensor."""
    width = max(map(len, tensors))
    print(f"{'name':<{width}}  {'shape':<16} {'dtype':<9}" + "".join(f"{name:>11}" for name in Statistics._fields[2:]))
    for name, tensor in tensors.items():
        shape, dtype, *figures, non_finite = Statistics.of(tensor)
        shown = "".join(f"{figure:11.4g}" for figure in figures)
        print(f"{name:<{width}}  {list(shape)!s:<16} {in_words(dtype):<9}{shown}{non_finite:11.1%}")


def build_parser() -> ArgumentParser:
    """The options of `python -m llama3_raw.tracing`."""
    parser = ArgumentParser(
        prog="python -m llama3_raw.tracing",
        description="Runs a prompt through the model once, and shows or keeps the tensors in between, by name.",
    )
    add_prompt_options(parser)
    group = parser.add_argument_group("tensors")
    group.add_argument(
        "--names",
        action="append",
        type=not_empty,
        metavar="PATTERN",
        help="which, with * ? [0-9] as in a shell (may be repeated; default: all): 'layers.0.*' is all of layer 0, "
        "'layers.*.residual' the output of each layer",
    )
    group.add_argument("-o", "--output", type=not_empty, metavar="FILE", help="write them as safetensors")
    group.add_argument("--stats", action="store_true", help="print what each is like (as without -o)")
    group.add_argument("--last-position", action="store_true", help="of the last token only")
    group.add_argument("--keep-dtype", choices=DTYPES_BY_NAME, help="keep them in this (default: as they are)")
    group.add_argument("--fast", action="store_true", help="by the fast operations, which have no attention.scores")
    add_model_options(parser)
    return parser


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Runs the tool; -> exit status."""
    options = build_parser().parse_args(arguments)
    prompt = read_prompt(options.prompt, "python -m llama3_raw.tracing")
    if options.output:
        check_output("-o", options.output)
    chosen = choose_model(options, needs_tokenizer=not options.ids)
    ids = chosen_ids(chosen, prompt, are_ids=options.ids, special=options.special)
    names = options.names or ["*"]
    how: dict[str, Any] = {"dtype": DTYPES_BY_NAME.get(options.keep_dtype), "last_position": options.last_position}
    ops = suitable_ops(chosen.device) if options.fast else REFERENCE
    # before the weights are read in, which may take a while
    check_trace(chosen.checkpoint.params, chosen.dtype or chosen.checkpoint.dtype, len(ids), *names, **how, ops=ops)
    lengths = Lengths(prompt=len(ids), text=len(ids), least=len(ids), scored=len(ids))
    model, ops, which = load_model(chosen, lengths, reference=not options.fast)
    print(f"llama3_raw: {which}", file=sys.stderr)
    kept = trace(model, ids, *names, **how, ops=ops, device="cpu", progress=True)
    if options.stats or not options.output:
        show(kept)
    if options.output:
        kept.save(options.output)
        print(f"llama3_raw: {options.output}: {len(kept)} tensors, {kept.nbytes / 1e6:,.1f} MB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
