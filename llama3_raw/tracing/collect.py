"""`collect`: the tensors of a whole corpus, in mapped files beside its tokens; `load_collection` reads them.

A folder has tokens.npy, a file NAME.npy for each tensor, and collection.json, which says of what they are and how many
tokens are finished. Row i of each file belongs to token i.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..backends.choose import ops_for, showing
from ..errors import UserError, in_short
from ..model import forward
from ..ops import Ops, accumulate_dtype
from ..params import Params
from ..quantization.matrix import tensors_of
from ..system.files import atomic_write, check_disk, read_json
from ..weights import COMPUTE_DTYPES, Model, dtype_name, dtype_of, matrices_of
from .names import LAST, named_tensors, token_dimension
from .partial import ending_after
from .taps import Patterns, chain

_RECORD_EVERY = 5.0  # seconds: what is computed again after a kill
_ABOUT = "collection.json"


@dataclass(frozen=True)
class Collection(Mapping[str, Tensor]):
    """The tensors of a corpus by name, mapped from files: only what is used is read.

    Row i of each tensor, [N, …], belongs to token i. Of scores and probs it has that query, [n_heads, context], masked
    beyond a shorter last window. What is written to a tensor stays in memory.
    """

    tokens: Tensor  # [N] int32
    context: int  # tokens of a window
    tensors: Mapping[str, Tensor]

    @property
    def positions(self) -> Tensor:
        """The position [N] of each token in its window."""
        return torch.arange(len(self.tokens)) % self.context

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        n_bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        return f"<Collection of {len(self)} tensors of {len(self.tokens):,} tokens, {n_bytes:,} bytes>"

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)


class _Stored(NamedTuple):
    """A tensor in a file of rows, one for each token."""

    shape: list[int]  # of a token
    dtype: str  # its name; numpy has no bfloat16, of which a file has the bits in int16

    @property
    def row_bytes(self) -> int:
        """The size of a row."""
        return math.prod(self.shape) * COMPUTE_DTYPES[self.dtype].itemsize

    def map(self, file: Path, n_tokens: int, mode: Literal["w+", "c"]) -> np.memmap[Any, Any]:
        """Map a file of this many rows; "w+" creates it. Raises UserError."""
        return _mapped(file, "int16" if self.dtype == "bfloat16" else self.dtype, (n_tokens, *self.shape), mode)

    def read(self, file: Path, n_tokens: int) -> Tensor:
        """Return a mapped file as a tensor. Raises UserError."""
        return torch.from_numpy(self.map(file, n_tokens, "c")).view(COMPUTE_DTYPES[self.dtype])


def collect(
    model: Model,
    ids: Sequence[int] | Tensor,
    *patterns: str,
    to: str | Path,
    context: int = 128,
    batch: int = 16,
    dtype: torch.dtype | str | None = None,
    ops: Ops | None = None,
    progress: bool = True,
) -> Collection:
    """Run a model over a corpus, in windows that do not overlap, and store the tensors that match the patterns.

    If it is interrupted or killed, the same call continues where it was.

    Args:
        model: the model to run.
        ids: the tokens of the corpus, [N]; or windows that are already cut, [n, T], whose T is then the context.
        patterns: tap names, with the wildcards of `Patterns`; without any, every tensor.
        to: the folder to write: a new one, an empty one, or that of an earlier call with the same model, tokens and
            tensors.
        context: the tokens of a window. The last window may have fewer.
        batch: the windows of a pass.
        dtype: the dtype to store, such as "float16". None: as computed.
        ops: the operations. None: the fast ones for the weights, with exact attention if scores or probs are wanted.
        progress: show a bar on stderr.

    Returns:
        What `load_collection` returns for the folder.

    Raises:
        UserError: before anything is computed, if a pattern matches nothing, a token is not in the vocabulary, the
            folder holds something else, or the disk is too small.
    """
    if batch < 1:
        raise UserError(f"{batch}: should be 1 or more", argument="batch")
    tokens, context = _windows(ids, context, model.params)
    stored = _planned(model, patterns, context, None if dtype is None else dtype_of(dtype))
    of, folder = _contents(model, tokens, context, stored), Path(to).expanduser()
    finished = _finished(folder, of)
    if finished == len(tokens):
        return load_collection(folder)
    if not finished:
        _create_files(folder, of, tokens, stored)
    writer = _Writer(folder, stored, len(tokens))
    ops = showing(ops or ops_for(model.weights), writer, range(model.params.n_layers))
    recorded = time.monotonic()
    settings: dict[str, Any] = {"unit": "token", "leave": False, "disable": not progress}
    with tqdm(total=len(tokens), initial=finished, desc="collecting", **settings) as bar:
        try:
            for rows in _batches(tokens, finished, context, batch):
                _run(model, rows, ops, writer, finished)
                finished += rows.numel()
                bar.update(rows.numel())
                if time.monotonic() > recorded + _RECORD_EVERY:
                    _record(folder, of, finished)
                    recorded = time.monotonic()
        finally:  # also after Ctrl-C
            _record(folder, of, finished)
    return load_collection(folder)


def load_collection(folder: str | Path) -> Collection:
    """Return the tensors that `collect` stored in a folder.

    Raises:
        UserError: the folder holds none, they are damaged, or not all tokens are finished.
    """
    folder = Path(folder).expanduser()
    if not (folder / _ABOUT).exists():
        raise UserError(f"{folder}: there is no {_ABOUT}; give the folder that collect wrote")
    about = read_json(folder / _ABOUT)
    try:
        of = about["of"]
        finished, n_tokens = _checked_finished(folder, about, of), of["n_tokens"]
        if finished == n_tokens:
            return _map_files(folder, of)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / _ABOUT}: is not of a collection ({in_short(error)}); collect again") from error
    raise UserError(f"{folder}: {finished:,} of {n_tokens:,} tokens are finished; run the same collect again")


class _Writer:
    """A tap that writes tensors of a batch [B, T] to the rows of their files from `begin` on."""

    def __init__(self, folder: Path, stored: Mapping[str, _Stored], n_tokens: int):
        self.begin = 0
        self.last = list(stored)[-1]
        self._folder, self._stored, self._n_tokens = folder, stored, n_tokens

    def wants(self, name: str) -> bool:
        """Whether the tensor of this name is stored."""
        return name in self._stored

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        kind = self._stored.get(name)
        if kind is not None:
            rows = tensor.movedim(token_dimension(name), 1).flatten(0, 1)  # [B * T, …]
            missing = kind.shape[-1] - rows.shape[-1]  # keys after a window that is shorter
            if missing:
                rows = F.pad(rows, (0, missing), value=-math.inf if name.endswith("scores") else 0)
            data = rows.to("cpu", COMPUTE_DTYPES[kind.dtype]).contiguous().view(torch.uint8).numpy().data
            with _errors(self._folder), open(self._folder / f"{name}.npy", "r+b") as file:
                # from the end, because the header comes first; not by the map, where a full disk would end the process
                file.seek((self.begin - self._n_tokens) * kind.row_bytes, os.SEEK_END)
                file.write(data)
        return tensor


def _run(model: Model, rows: Tensor, ops: Ops, writer: _Writer, begin: int) -> None:
    """Run the model over windows [B, T], of which the first is that of token `begin`, up to the last stored tensor."""
    writer.begin = begin
    with torch.no_grad(), ending_after(writer.last) as end:
        forward(model.weights, model.params, rows.to(model.weights.norm.device), ops=ops, tap=chain(writer, end))


def _windows(ids: Sequence[int] | Tensor, context: int, params: Params) -> tuple[Tensor, int]:
    """Return the tokens [N] of a corpus and the context. Raises UserError if they are not what `collect` takes."""
    try:
        tokens = torch.as_tensor(ids).cpu()
    except (TypeError, ValueError, RuntimeError):
        tokens = torch.zeros(())
    if tokens.dim() not in (1, 2) or not tokens.numel() or tokens.is_floating_point() or tokens.is_complex():
        raise UserError("should be token ids [N], or windows of them [n, T], at least one", argument="ids")
    context = tokens.shape[1] if tokens.dim() == 2 else context
    if not 1 <= context <= params.max_seq_len:
        raise UserError(f"{context}: should be from 1 to the model's {params.max_seq_len} tokens", argument="context")
    params.check_ids([int(tokens.min()), int(tokens.max())])
    return tokens.flatten().to(torch.int32), context


def _batches(tokens: Tensor, finished: int, context: int, batch: int) -> Iterator[Tensor]:
    """Yield the windows after the finished tokens, `batch` at a time; a shorter last one alone: [B, T]."""
    whole = len(tokens) // context * context
    for begin in range(finished, whole, batch * context):
        yield tokens[begin : min(begin + batch * context, whole)].view(-1, context)
    if len(tokens) > max(finished, whole):
        yield tokens[whole:].unsqueeze(0)


def _planned(model: Model, patterns: Sequence[str], context: int, dtype: torch.dtype | None) -> dict[str, _Stored]:
    """Return what is to be stored, by name. Raises UserError if a pattern matches nothing."""
    params, compute_dtype = model.params, model.weights.norm.dtype
    sizes = {"n_heads": params.n_heads, "n_kv_heads": params.n_kv_heads, "head_dim": params.head_dim, "T": context}
    sizes |= {"dim": params.dim, "hidden_dim": params.hidden_dim, "vocab_size": params.vocab_size}
    wanted, stored = Patterns(patterns or ("*",)), {}
    for name, tensor in named_tensors(params).items():
        if wanted.matching(name):
            dimensions = tensor.shape.split()
            dimensions.remove("T")
            computed = accumulate_dtype(compute_dtype) if name == LAST else compute_dtype
            stored[name] = _Stored([sizes[dimension] for dimension in dimensions], dtype_name(dtype or computed))
    return stored


def _contents(model: Model, tokens: Tensor, context: int, stored: Mapping[str, _Stored]) -> dict[str, Any]:
    """Return what the files hold, as JSON has it: that of a folder has to be the same."""
    return {
        "model": model.name,
        "params": asdict(model.params),
        "weights": _digest(_sample(tensor) for matrix in matrices_of(model.weights) for tensor in tensors_of(matrix)),
        "n_tokens": len(tokens),
        "tokens": _digest([tokens]),
        "context": context,
        "tensors": {name: kind._asdict() for name, kind in stored.items()},
    }


def _sample(tensor: Tensor) -> Tensor:
    """Return a vector whole, and of a matrix 64 rows or more, evenly spread: reading all of an 8B takes too long."""
    return tensor if tensor.dim() < 2 else tensor[:: max(1, len(tensor) // 64)]


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _finished(folder: Path, of: Mapping[str, Any]) -> int:
    """Return the number of tokens that are finished. Raises UserError if the folder holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return 0
    if not (folder / _ABOUT).exists():
        raise UserError(f"{folder}: already exists and is not of a collection; name another folder")
    about = read_json(folder / _ABOUT)
    there = about.get("of")
    for field, what in (
        ("params", "another model"),
        ("weights", "another model"),
        ("tokens", "another text"),
        ("context", "another context"),
        ("tensors", "other tensors"),
    ):
        if not isinstance(there, dict) or there.get(field) != of[field]:
            raise UserError(f"{folder}: is of {what}; name another folder, or remove it first")
    finished = _checked_finished(folder, about, of)
    if finished:  # the files are there, of the right size
        _map_files(folder, of)
    return finished


def _checked_finished(folder: Path, about: Mapping[str, Any], of: Mapping[str, Any]) -> int:
    """Return the number of tokens that are finished: whole windows, or all. Raises UserError if it is none of these."""
    finished, n_tokens = about.get("finished"), of["n_tokens"]
    if type(finished) is int and (finished == n_tokens or finished in range(0, n_tokens, of["context"])):
        return finished
    raise UserError(
        f"{folder / _ABOUT}: {in_short(finished)} of {n_tokens:,} tokens cannot be finished; remove the folder and "
        "collect again"
    )


def _map_files(folder: Path, of: Mapping[str, Any]) -> Collection:
    """Map the files of a collection. Raises UserError if one is missing or damaged."""
    n_tokens = of["n_tokens"]
    tokens = torch.from_numpy(_mapped(folder / "tokens.npy", "int32", (n_tokens,), "c"))
    stored = {name: _Stored(**fields) for name, fields in of["tensors"].items()}
    tensors = {name: kind.read(folder / f"{name}.npy", n_tokens) for name, kind in stored.items()}
    return Collection(tokens, of["context"], tensors)


def _create_files(folder: Path, of: Mapping[str, Any], tokens: Tensor, stored: Mapping[str, _Stored]) -> None:
    """Create the files of a collection, without rows. Raises UserError."""
    with _errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        check_disk(folder, folder, sum(kind.row_bytes for kind in stored.values()) * len(tokens) + tokens.nbytes)
        _record(folder, of, 0)  # first, so that the folder is known to be of a collection
        np.save(folder / "tokens.npy", tokens.numpy())
        for name, kind in stored.items():
            kind.map(folder / f"{name}.npy", len(tokens), "w+")


def _mapped(file: Path, dtype: str, shape: tuple[int, ...], mode: Literal["w+", "c"]) -> np.memmap[Any, Any]:
    """Map a .npy file, which is created in mode "w+". Raises UserError if it is not of this dtype and shape."""
    try:
        mapped = np.lib.format.open_memmap(file, mode, dtype=dtype, shape=shape)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be mapped ({in_short(error)}); remove the folder and collect again") from error
    if mapped.dtype != dtype or mapped.shape != shape:
        what = f"is {mapped.dtype} {mapped.shape}, should be {dtype} {shape}"
        raise UserError(f"{file}: {what}; remove the folder and collect again")
    return mapped


@contextlib.contextmanager
def _errors(folder: Path) -> Iterator[None]:
    """Make UserError of what the system says when it refuses to write."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or in_short(error)
        raise UserError(f"{folder}: cannot be written ({reason}); make room, and run the same collect again") from error


def _record(folder: Path, of: Mapping[str, Any], finished: int) -> None:
    """Write how many tokens are finished, after their rows are on the disk."""
    for name in of["tensors"] if finished else ():
        with _errors(folder), open(folder / f"{name}.npy", "r+b") as file:
            os.fsync(file.fileno())
    with atomic_write(folder / _ABOUT) as part:
        part.write_text(json.dumps({"finished": finished, "of": of}, indent=1))
