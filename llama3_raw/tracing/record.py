"""`Trace`, the tap that keeps copies of the tensors of a forward pass, and `trace`, a pass with it."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError, in_short
from ..model import REFERENCE, forward
from ..ops import Ops, Tap, no_tap, score_bytes
from ..params import Params, RopeScaling
from ..system.files import atomic_write, read_beginning
from ..system.machine import free_memory
from ..weights import Model
from .names import FIRST, LAST, token_dimension
from .taps import Patterns, chain, pass_without_content


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
    weights: str  # a digest of the norms, which are the same in every dtype and in int8; matrices are not looked at

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
    token) it has the tensors of the last; of one that broke off, those up to there. What it holds is detached and never
    changes with what the pass does later.

    device, dtype: where and in what the copies are kept; None as the pass has them. last_position: of the last token
        only, without the dimension T.
    origin: what it is of, if that is known: `trace` says so, and `save` and `load_trace` keep it.

    Raises UserError for a dtype that is not of floats, and at the end of a pass in which a pattern means nothing.
    """

    def __init__(
        self,
        *patterns: str,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        last_position: bool = False,
    ):
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise UserError(f"dtype should be one of floats, such as torch.float32, is {dtype!r}")
        self._patterns = Patterns(patterns or ("*",))
        self._device = device
        self._dtype = dtype
        self.last_position = last_position
        self._dimensions = 0  # of the embeddings, thus of a tensor [..., T, something]
        self._tensors: dict[str, Tensor] = {}
        self.origin: Origin | None = None

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Keeps a copy of it, if it is meant; -> the tensor itself. The tap of `forward`."""
        if name == FIRST:
            self._dimensions = tensor.dim()
            self._tensors.clear()  # of an earlier pass
        if self._patterns.matching(name):
            kept = self._last(name, tensor) if self.last_position else tensor
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
        return tensor.select(token_dimension(name), -1)

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            near = difflib.get_close_matches(str(name), self._tensors, n=3, cutoff=0)
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
        """Writes safetensors, whose metadata hold the order of the names and the origin. A file there is replaced.

        Raises UserError where it cannot be written.
        """
        origin = self.origin and asdict(self.origin)
        about = {"names": list(self), "origin": origin, "last_position": self.last_position}
        with atomic_write(file) as part:
            try:
                save_file(dict(self), part, metadata={"llama3_raw": json.dumps(about)})
            except SafetensorError as error:  # all that it says when the system refuses
                raise OSError(in_short(error)) from error


def load_trace(file: str | Path) -> Trace:
    """What `Trace.save` wrote, or any safetensors with tensors by the names of a tap, whose origin is not known.

    Raises UserError where the file is missing, or no safetensors.
    """
    file = Path(file)
    if file.is_dir():
        raise UserError(f"{file}: is a folder; give the file that a trace was saved in")
    read_beginning(file)
    loaded = Trace()
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {}).get("llama3_raw", "{}"))
            for name in about.get("names") or opened.keys():
                loaded._tensors[name] = opened.get_tensor(name)
            loaded.last_position = bool(about.get("last_position"))
        if about.get("origin"):
            params = dict(about["origin"]["params"])
            if params["rope_scaling"]:
                params["rope_scaling"] = RopeScaling(**params["rope_scaling"])
            ids = [int(token) for token in about["origin"]["ids"]]
            loaded.origin = Origin(Params(**params), ids, str(about["origin"]["weights"]))
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
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
    ids = tokens_of_one_prompt(ids, model.params)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "last_position": last_position}
    norm = model.weights.norm
    check_trace(model.params, norm.dtype, len(ids), *patterns, **options, ops=ops, model_device=norm.device)
    kept = Trace(*patterns, **options)
    kept.origin = Origin.of(model, ids)
    with count_layers(model.params, progress) as count, torch.no_grad():
        tokens = torch.tensor(ids, device=norm.device)  # [T]
        forward(model.weights, model.params, tokens, ops=ops, tap=chain(tap, kept, count))
    return kept


def tokens_of_one_prompt(ids: Sequence[int] | Tensor, params: Params) -> list[int]:
    """Ids [T] as a list. Raises UserError where they are no such, there is none, or one is not in the vocabulary."""
    try:
        tokens = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        tokens = torch.zeros(1, 1)
    if tokens.dim() != 1 or (len(tokens) and (tokens.is_floating_point() or tokens.is_complex())):
        raise UserError("ids should be the tokens of one prompt, as tokenizer.encode gives them")
    if not len(tokens):
        raise UserError("the prompt is empty; give at least one token")
    checked: list[int] = tokens.tolist()
    params.check_ids(checked)
    return checked


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
    model_device: torch.device = torch.device("cpu"),
) -> None:
    """Raises UserError where a trace of `length` tokens does not fit into the free memory, or a pattern means nothing.

    No tensor is computed for it.
    """
    planned = Trace(*patterns, device="meta", dtype=dtype, last_position=last_position)
    largest = 0

    def note_size(name: str, tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.nbytes)
        return tensor

    pass_without_content(params, compute_dtype, length, ops, chain(planned, note_size))
    # as if the largest were the scores, which they are in a long prompt
    needed = Counter({model_device: largest * score_bytes(compute_dtype.itemsize) // compute_dtype.itemsize})
    needed[torch.device(device or model_device)] += planned.nbytes
    for place, n_bytes in needed.items():
        free = free_memory(place)
        if n_bytes > free:
            raise UserError(
                f"a trace of {planned.nbytes / 1e9:.2f} GB, and {needed[model_device] / 1e9:.2f} GB in all on "
                f"{model_device}, do not fit: {free / 1e9:.2f} GB are free on {place}; name fewer tensors, keep the "
                "last position only, or shorten the prompt"
            )
