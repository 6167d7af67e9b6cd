"""`Trace`, the tap that keeps copies of tensors, and `trace`, a forward pass with it."""

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
from .taps import Patterns, chain, dry_run


def shape_difference(params: Params, others: Params) -> str | None:
    """Return the first param by which the tensors of two models differ in shape, as text; None if there is none."""
    for field in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"):
        if getattr(params, field) != getattr(others, field):
            return f"{field} {getattr(params, field)}, not {getattr(others, field)}"
    return None


@dataclass(frozen=True)
class Origin:
    """The model and the tokens of a trace."""

    params: Params
    ids: list[int]
    weights: str  # a digest of the norms only, which are the same in every dtype and in int8

    @staticmethod
    def of(model: Model, ids: Sequence[int]) -> Origin:
        """Return the origin of a pass of the model over these tokens."""
        weights = model.weights
        norms = [norm for layer in weights.layers for norm in (layer.attention_norm, layer.ffn_norm)]
        digest = sha256()
        for norm in (*norms, weights.norm):
            digest.update(norm.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
        return Origin(model.params, list(ids), digest.hexdigest()[:32])

    def check(self, model: Model, ids: Sequence[int], source: str) -> None:
        """Raise UserError if the trace in `source` is of other weights or tokens than these.

        norm_eps and the settings of RoPE may differ: a comparison should find that.
        """
        own = Origin.of(model, ids)
        unlike = shape_difference(self.params, own.params)
        if unlike:
            raise UserError(f"{source}: is of another model, with {unlike}; trace this model")
        if self.weights != own.weights:
            raise UserError(f"{source}: is of a model of the same shape with other weights; trace this model")
        if self.ids != own.ids:
            first = next((i for i, pair in enumerate(zip(self.ids, own.ids, strict=False)) if pair[0] != pair[1]), None)
            where = f"{len(self.ids)} tokens, not {len(own.ids)}" if first is None else f"another token {first}"
            raise UserError(f"{source}: is of another prompt, with {where}; give the same prompt, or trace this one")


class Trace(Mapping[str, Tensor]):
    """A tap that keeps a copy of every tensor that matches a pattern; without patterns, of every tensor.

    A mapping from name to tensor, in the order of the forward pass. After several passes (`generate` runs one for each
    token) it has the tensors of the last; after a pass that failed, those computed until then. The copies are detached,
    and nothing that the pass does later changes them.

    Args:
        patterns: tap names, with the wildcards of `Patterns`.
        device: where the copies are kept. None: where the tensor is.
        dtype: the dtype of the copies. None: that of the tensor.
        last_position: keep the last token only, without the dimension T.

    Attributes:
        origin: the model and the tokens, if known: `trace` sets it, `save` and `load_trace` keep it.

    Raises:
        UserError: the dtype is not floating point, or a pattern matched nothing by the end of a pass.
    """

    def __init__(
        self,
        *patterns: str,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        last_position: bool = False,
    ):
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise UserError(f"dtype should be a floating-point dtype such as torch.float32, is {dtype!r}")
        self._patterns = Patterns(patterns or ("*",))
        self._device = device
        self._dtype = dtype
        self.last_position = last_position
        self._dimensions = 0  # of the embeddings, so of any tensor [..., T, n]
        self._tensors: dict[str, Tensor] = {}
        self.origin: Origin | None = None

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Keep a copy of the tensor if a pattern matches its name, and return the tensor itself: a tap."""
        if name == FIRST:
            self._dimensions = tensor.dim()
            self._tensors.clear()  # of an earlier pass
        if self._patterns.matching(name):
            kept = self._last(name, tensor) if self.last_position else tensor
            # exactly one copy, also if device and dtype are the same
            self._tensors[name] = torch.empty_like(
                kept.detach(),
                device=self._device or kept.device,
                dtype=self._dtype or kept.dtype,
                memory_format=torch.contiguous_format,
            ).copy_(kept.detach())
        return tensor

    def _last(self, name: str, tensor: Tensor) -> Tensor:
        if name == LAST and tensor.dim() < self._dimensions:
            return tensor  # logits_at has already chosen one
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
        """The size of the tensors in bytes."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def save(self, file: str | Path) -> None:
        """Write the tensors as safetensors, with the order of the names and the origin as metadata.

        Args:
            file: the file to write; an existing one is replaced.

        Raises:
            UserError: the file cannot be written.
        """
        origin = self.origin and asdict(self.origin)
        about = {"names": list(self), "origin": origin, "last_position": self.last_position}
        with atomic_write(file) as part:
            try:
                save_file(dict(self), part, metadata={"llama3_raw": json.dumps(about)})
            except SafetensorError as error:  # what it raises for an OSError
                raise OSError(in_short(error)) from error


def load_trace(file: str | Path) -> Trace:
    """Return the trace that `Trace.save` wrote.

    Args:
        file: a saved trace, or any other safetensors file with tensors by tap name, whose origin is then None.

    Raises:
        UserError: the file is missing or not safetensors.
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
        raise UserError(f"{file}: cannot be read as a trace ({in_short(error)}); save it again") from error
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
    """Run a forward pass over a prompt and return the tensors that match the patterns, as a `Trace`.

    Args:
        model: the model to run.
        ids: the prompt, [T].
        patterns: tap names, with the wildcards of `Patterns`; without any, every tensor.
        device: as in `Trace`.
        dtype: as in `Trace`.
        last_position: as in `Trace`.
        ops: the operations; fused attention has no scores and probs.
        tap: sees each tensor first, so that a `patch` shows in the trace.
        progress: show a bar on stderr that counts the layers, if the pass takes longer than a second.

    Raises:
        UserError: before anything is computed, if a pattern matches nothing, an id is not in the vocabulary, or the
            tensors do not fit into memory. Also whatever `tap` raises.
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
    """Return ids [T] as a list. Raises UserError if they are not integers [T], are empty, or not in the vocabulary."""
    try:
        tokens = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        tokens = torch.zeros(1, 1)
    if tokens.dim() != 1 or (len(tokens) and (tokens.is_floating_point() or tokens.is_complex())):
        raise UserError("ids should be the tokens of one prompt, as tokenizer.encode returns them")
    if not len(tokens):
        raise UserError("the prompt is empty; give at least one token")
    checked: list[int] = tokens.tolist()
    params.check_ids(checked)
    return checked


@contextlib.contextmanager
def count_layers(params: Params, progress: bool = True) -> Iterator[Tap]:
    """Show the progress of a pass as a bar on stderr, if it takes longer than a second; yield the tap that moves it."""
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
    """Raise UserError if a trace of `length` tokens does not fit into free memory, or a pattern matches nothing.

    No tensor is computed.
    """
    planned = Trace(*patterns, device="meta", dtype=dtype, last_position=last_position)
    largest = 0

    def note_size(name: str, tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.nbytes)
        return tensor

    dry_run(params, compute_dtype, length, ops, chain(planned, note_size))
    # as if the scores were the largest, which they are for a long prompt
    needed = Counter({model_device: largest * score_bytes(compute_dtype.itemsize) // compute_dtype.itemsize})
    needed[torch.device(device or model_device)] += planned.nbytes
    for place, n_bytes in needed.items():
        free = free_memory(place)
        if n_bytes > free:
            raise UserError(
                f"a trace of {planned.nbytes / 1e9:.2f} GB, and {needed[model_device] / 1e9:.2f} GB in all on "
                f"{model_device}, do not fit: {free / 1e9:.2f} GB are free on {place}; keep fewer tensors or only the "
                "last position, or shorten the prompt"
            )
