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

from ..backends.choose import ops_for, showing
from ..errors import UserError, in_short
from ..model import REFERENCE, forward
from ..ops import Ops, Rows, Tap, announce, no_tap, score_bytes
from ..params import Params, RopeScaling
from ..system.devices import usable_device
from ..system.files import atomic_write, read_beginning
from ..system.machine import free_memory
from ..weights import Model, dtype_of
from .names import FIRST, LAST, token_dimension
from .padding import Ids, as_index, index_in_texts, read_prompts, select_token
from .padding import tokens_of_one_prompt as tokens_of_one_prompt
from .partial import check_start, ending_after, from_layer, names_of_pass, needed_names
from .passes import JoinedPasses
from .positions import ThisPass
from .taps import PatternTap, chain, dry_run


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
    ids: list[int]  # of the prompt; none of a batch
    weights: str  # a digest of the norms only, which are the same in every dtype and in int8
    batch: list[list[int]] | None = None  # the prompts of a batch

    @staticmethod
    def of(model: Model, ids: Sequence[int] | Sequence[Sequence[int]]) -> Origin:
        """Return the origin of a pass of the model over a prompt, or over a batch of prompts."""
        weights = model.weights
        norms = [norm for layer in weights.layers for norm in (layer.attention_norm, layer.ffn_norm)]
        digest = sha256()
        for norm in (*norms, weights.norm):
            digest.update(norm.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
        one = [token for token in ids if isinstance(token, int)]
        batch = [list(row) for row in ids if not isinstance(row, int)]
        return Origin(model.params, one, digest.hexdigest()[:32], batch or None)

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
        if self.batch is not None:
            raise UserError(f"{source}: is of a batch of {len(self.batch)} prompts; trace this prompt alone")
        if self.ids != own.ids:
            first = next((i for i, pair in enumerate(zip(self.ids, own.ids, strict=False)) if pair[0] != pair[1]), None)
            where = f"{len(self.ids)} tokens, not {len(own.ids)}" if first is None else f"another token {first}"
            raise UserError(f"{source}: is of another prompt, with {where}; give the same prompt, or trace this one")


class Trace(PatternTap, Mapping[str, Tensor]):
    """A tap that keeps a copy of every tensor that matches a pattern; without patterns, of every tensor.

    A mapping from name to tensor, in the order of the forward pass. After several passes (`generate` runs one for each
    token) it has the tensors of the last, or with `every_pass` those of all; after a pass that failed, those computed
    until then. The copies are detached, and nothing that the pass does later changes them. Two traces are equal if they
    have the same names, and under each the same tensor: its dtype, shape and bits, wherever it is stored.

    Args:
        patterns: tap names, with the wildcards of `Patterns`.
        device: where the copies are kept. None: where the tensor is.
        dtype: the dtype of the copies, such as "float32". None: that of the tensor.
        last_position: keep the last token only, without the dimension T: the last of each text in `trace` and other
            loops, which know the lengths. For a padded batch of your own in `forward` give `at`.
        at: keep this token only, without the dimension T: an index into T, with the padding if there is any, or a
            tensor [B] of one for each row.
        every_pass: join the tensors of all passes over a text along T, as one pass over the whole text would return
            them up to rounding. Of several texts (`generate_batch`, `score`, the windows of `perplexity`) tensors are
            [texts, T, …]; what is beyond a text is 0, and -inf in scores. Logits have a row for each next token that
            was chosen from them, and in `perplexity` and `score` for each that was scored.

    Attributes:
        at: as given, by `trace` counted from the first token of each text; for last_position, where that token is in
            the last pass.
        lengths: the lengths [B] of the texts of a padded batch, if known: `trace` and every_pass set it.
        origin: the model and the tokens, if known: `trace` sets it, `save` and `load_trace` keep it.

    Raises:
        UserError: the dtype is not floating point, there is no such device, `at` is no index or given with every_pass,
            or a pattern matched nothing by the end of a pass.
    """

    def __init__(
        self,
        *patterns: str,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        last_position: bool = False,
        at: int | Ids | None = None,
        every_pass: bool = False,
    ):
        if isinstance(dtype, str):
            dtype = dtype_of(dtype)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise UserError(f"dtype should be a floating-point dtype such as torch.float32, is {dtype!r}")
        if device is not None and str(device) != "meta":
            device = usable_device(device)
        if last_position and at is not None:
            raise UserError("and last_position both choose a token; leave one of them out", argument="at")
        if every_pass and (last_position or at is not None):
            raise UserError("keeps all tokens; leave last_position and at out", argument="every_pass")
        super().__init__(patterns or ("*",))
        self._device = device
        self._dtype = dtype
        self.last_position = last_position
        self.at = -1 if last_position else as_index(at)
        self.lengths: Tensor | None = None
        self._dimensions = 0  # of the embeddings, so of any tensor [..., T, n]
        self._kept: dict[str, Tensor] = {}
        self._passes = JoinedPasses() if every_pass else None
        self._has_begun = False  # a loop has announced the pass
        self.origin: Origin | None = None

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Keep a copy of the tensor if a pattern matches its name, and return the tensor itself: a tap."""
        if name == FIRST:
            self._dimensions = tensor.dim()
            if not self._has_begun:
                self._begin(None if self._passes is None else ThisPass.of_caller(name, tensor).rows())
        self._has_begun = False
        if self._patterns.matching(name):
            is_selected = name == LAST and tensor.dim() < self._dimensions  # by logits_at
            if self.at is None or is_selected:
                kept = tensor.detach()
            else:
                kept = select_token(tensor.detach(), token_dimension(name), self.at)
            # exactly one copy, also if device and dtype are the same
            copy = torch.empty_like(
                kept,
                device=self._device or kept.device,
                dtype=self._dtype or kept.dtype,
                memory_format=torch.contiguous_format,
            ).copy_(kept)
            if self._passes is None:
                self._kept[name] = copy
            else:
                self._passes.add(name, copy, is_selected)
                self._kept.clear()
        return tensor

    def begin(self, rows: Rows | None) -> None:
        """Begin a pass over these tokens: forget those of the pass before, or the texts that they do not continue.

        The loops of this package call it.
        """
        if rows is None:
            self._kept.clear()
            self._passes = self._passes and JoinedPasses()
        elif any(rows.lengths) or self._passes is not None:
            self._has_begun = any(rows.lengths)
            self._dimensions = 2 + rows.is_batch
            if self.last_position:
                self.at = torch.tensor(rows.lengths) - 1 if rows.is_batch else -1
            self._begin(rows)

    def _begin(self, rows: Rows | None) -> None:
        self._kept.clear()
        if self._passes is not None and rows is not None:
            self._passes.begin(rows)
            self.lengths = self._passes.lengths

    @property
    def _tensors(self) -> dict[str, Tensor]:
        if self._passes is not None and not self._kept:
            self._kept = self._passes.joined()
        return self._kept

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

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return self.keys() == other.keys() and all(same_bits(tensor, other[name]) for name, tensor in self.items())

    __hash__ = None  # type: ignore[assignment]  # it changes with every pass

    def _ipython_key_completions_(self) -> list[str]:
        """Return what IPython and Jupyter complete after `kept["`."""
        return list(self)

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
        at, lengths = (it.tolist() if isinstance(it, Tensor) else it for it in (self.at, self.lengths))
        about = {"names": list(self), "origin": origin, "last_position": self.last_position, "at": at}
        about["lengths"] = lengths
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
                loaded._kept[name] = opened.get_tensor(name)
            loaded.last_position = bool(about.get("last_position"))
            loaded.at = as_index(about.get("at"))
            loaded.lengths = None if about.get("lengths") is None else torch.tensor(about["lengths"])
        if about.get("origin"):
            params = dict(about["origin"]["params"])
            if params["rope_scaling"]:
                params["rope_scaling"] = RopeScaling(**params["rope_scaling"])
            ids = [int(token) for token in about["origin"]["ids"]]
            batch = about["origin"].get("batch")
            loaded.origin = Origin(Params(**params), ids, str(about["origin"]["weights"]), batch)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as a trace ({in_short(error)}); save it again") from error
    return loaded


def trace(  # noqa: PLR0913  # what a caller may set
    model: Model,
    ids: Ids | Sequence[Ids],
    *patterns: str,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    last_position: bool = False,
    at: int | Ids | None = None,
    lengths: Ids | None = None,
    start_at: str | None = None,
    residual: Tensor | None = None,
    ops: Ops | None = None,
    tap: Tap = no_tap,
    progress: bool = False,
) -> Trace:
    """Run a forward pass over a prompt and return the tensors that match the patterns, as a `Trace`.

    The pass ends after the last tensor that is wanted: by a pattern, or by the tap, which may want every tensor if it
    is a plain function.

    Args:
        model: the model to run.
        ids: the prompt, [T]; a batch of prompts, [B, T]; or a list of prompts of any length, which are padded as `pad`
            does.
        patterns: tap names, with the wildcards of `Patterns`; without any, every tensor.
        device: as in `Trace`.
        dtype: as in `Trace`.
        last_position: as in `Trace`; of a padded batch, the last token of each text.
        at: as in `Trace`; of a padded batch, counted in each text, a negative one from its end.
        lengths: the lengths [B] of prompts that are padded on the right to ids [B, T], as `pad` returns them. Tensors
            keep the dimension T with the padding, unless one token is chosen.
        start_at: begin with this layer, "layers.5", with `residual` as its input: the residual of the layer before, or
            tok_embeddings for "layers.0". Then there are no tensors of the layers before.
        residual: the input of that layer, [..., T, dim].
        ops: the operations; fused attention has no scores and probs. None: the fast ones for the weights, with exact
            attention if scores or probs are wanted.
        tap: sees each tensor first, so that a `patch` shows in the trace.
        progress: show a bar on stderr that counts the layers, if the pass takes longer than a second.

    Raises:
        UserError: before anything is computed, if a pattern matches nothing, an id is not in the vocabulary, a prompt
            is longer than the context, a text has no token `at`, or the tensors do not fit into memory. Also
            whatever `tap` raises.
    """
    prompts = read_prompts(ids, lengths, model.params)
    index = as_index(at)
    if index is not None and prompts.lengths is not None:
        index = index_in_texts(index, prompts.lengths, "at")
    options: dict[str, Any] = {"dtype": dtype, "last_position": last_position, "at": index}
    kept, planned = Trace(*patterns, device=device, **options), Trace(*patterns, device="meta", **options)
    shape, norm = tuple(prompts.tokens.shape), model.weights.norm
    first = check_start(start_at, residual, model, shape)
    ops = ops or showing(ops_for(model.weights), chain(tap, kept), range(first or 0, model.params.n_layers))
    names = needed_names(names_of_pass(model.params, ops, first), chain(tap, kept))
    _check_memory(model.params, norm.dtype, shape, names, planned, norm.device, device)
    kept.origin, kept.lengths = Origin.of(model, prompts.ids), prompts.lengths
    with count_layers(model.params, progress) as count, ending_after(names[-1]) as end, torch.no_grad():
        tap = chain(tap, kept, count, end)
        announce(tap, None)
        announce(tap, prompts.rows)
        weights = model.weights
        if first is not None and residual is not None:
            weights, tap = weights._replace(layers=weights.layers[first:]), from_layer(first, residual, tap)
        forward(weights, model.params, prompts.tokens.to(norm.device), ops=ops, tap=tap)
    return kept


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
    ops: Ops | None = None,
    model_device: torch.device = torch.device("cpu"),
) -> None:
    """Raise UserError if a trace of `length` tokens does not fit into free memory, or a pattern matches nothing.

    No tensor is computed. The arguments are those of `trace`.
    """
    planned = Trace(*patterns, device="meta", dtype=dtype, last_position=last_position)
    ops = ops or showing(REFERENCE._replace(has_scores=False), planned, range(params.n_layers))
    names = needed_names(names_of_pass(params, ops), planned)
    _check_memory(params, compute_dtype, (length,), names, planned, model_device, device)


def _check_memory(
    params: Params,
    compute_dtype: torch.dtype,
    shape: tuple[int, ...],
    names: Sequence[str],
    planned: Trace,
    model_device: torch.device,
    device: str | torch.device | None,
) -> None:
    """Raise UserError if a pass over tokens of this shape, up to the last of these names, does not fit into memory.

    planned: a trace of meta tensors, which this fills. device: where the tensors of the trace will be.
    """
    largest = 0

    def note_size(name: str, tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.nbytes)
        return tensor

    dry_run(params, compute_dtype, shape, names, chain(planned, note_size))
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


def same_bits(first: Tensor, second: object) -> bool:
    """Whether both are tensors of the same dtype, shape and bits, on any device. NaN equals the same NaN."""
    if not isinstance(second, Tensor) or (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if first.is_meta or second.is_meta:  # have no values
        return first.is_meta and second.is_meta
    first, second = (tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in (first, second))
    return torch.equal(first, second)
