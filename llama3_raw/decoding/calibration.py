"""Calibration: a model is quantized to int4 layer by layer, each for the inputs that the layers before it give.

A layer, the second moments of its inputs and the hidden states of all tokens are in memory at a time. After each layer
they are on the disk as well, so that a run that was stopped continues there.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..backends.choose import suitable_ops
from ..checkpoint.checkpoint import Checkpoint, whole_tensor
from ..checkpoint.loading import build_weights
from ..errors import UserError, in_short
from ..model import Pass, layer, rope_rotation, token_positions
from ..ops import Ops, no_tap
from ..params import Params
from ..quantization.gptq import gptq
from ..quantization.int4 import Int4
from ..quantization.matrix import Matrix
from ..system.files import atomic_write
from ..system.version import VERSION
from ..weights import LayerWeights, Model, tensor_specs
from .batch import Row, generate_batch
from .loop import StopReason
from .sampling import Sampling, check_sound

N_TOKENS = 16384  # to calibrate with; stories15M loses 0.029 nats per token with them, 0.033 with an eighth
_LENGTH = 512  # tokens of a text
_LEAST_TOKENS = 1024
_TEXTS_AT_ONCE = 16  # that are sampled together: the weights are read once for all of them
_TOKENS_AT_ONCE = 2048  # in a pass through a layer

# a matrix of each kind of input, and all that have these inputs
_SAME_INPUTS = {"wq": ("wq", "wk", "wv"), "wo": ("wo",), "w1": ("w1", "w3"), "w2": ("w2",)}


def text_length(params: Params) -> int:
    """Return the number of tokens of a text to calibrate with."""
    return min(_LENGTH, params.max_seq_len)


def sample_texts(model: Model, bos: int | None, seed: int = 0, progress: bool = False) -> Tensor:
    """Return N_TOKENS tokens of texts that the model writes, [texts, length], at temperature 1.

    bos: the token that each begins with; None takes random ones. progress: show a bar on stderr.
    """
    length = text_length(model.params)
    n_texts = N_TOKENS // length
    random = torch.randint(model.params.vocab_size, (n_texts,), generator=torch.Generator().manual_seed(seed))
    texts = [[first if bos is None else bos] for first in random.tolist()]
    with tqdm(
        total=n_texts * (length - 1), desc="writing a text", unit="token", disable=not progress, leave=False
    ) as bar:
        for begin in range(0, n_texts, _TEXTS_AT_ONCE):
            some = texts[begin : begin + _TEXTS_AT_ONCE]
            rows = [Row(text, length - 1, Sampling(temperature=1.0), seed + begin + i) for i, text in enumerate(some)]
            for number, event in generate_batch(model, rows, stop_ids=()):
                check_sound(event is not StopReason.NOT_NUMBERS)
                if isinstance(event, int):
                    some[number].append(event)
                    bar.update()
    return torch.tensor(texts)


def cut_text(ids: Sequence[int], params: Params) -> Tensor:
    """Return the first N_TOKENS of a text, or fewer, cut into texts of equal length, [texts, length].

    Raises UserError for ids outside the vocabulary, and for less than 1,024 tokens.
    """
    params.check_ids(ids)
    if len(ids) < _LEAST_TOKENS:
        raise UserError(
            f"the text to calibrate with has {len(ids):,} tokens; give one of {N_TOKENS:,}, or at least "
            f"{_LEAST_TOKENS:,}"
        )
    length = text_length(params)
    n_tokens = min(N_TOKENS, len(ids)) // length * length
    return torch.tensor(ids[:n_tokens]).view(-1, length)


def pass_over(tokens: Tensor, params: Params, ops: Ops) -> Pass:
    """Return what is the same in every layer of a pass over texts [texts, length]."""
    cos, sin = rope_rotation(token_positions(0, tokens.shape[-1], tokens.device), params)
    return Pass(params, 0, cos, sin, ops)


@torch.no_grad()
def quantize_layer(weights: LayerWeights, hidden: Tensor, at: Pass, progress: str | None = None) -> dict[str, Int4]:
    """Return a layer's matrices in int4, rounded for its input, hidden [texts, length, dim], by their fields.

    `hidden` becomes the output of the quantized layer. progress: the name of a bar on stderr.
    """
    with tqdm(total=2 + 7, desc=progress, unit="step", disable=progress is None, leave=False) as bar:
        moments = input_moments(weights, hidden, at)
        bar.update()
        matrices = {}
        for field, alike in _SAME_INPUTS.items():
            inputs = moments.pop(field)
            for name in alike:
                matrices[name] = gptq(getattr(weights, name), inputs, hidden[..., 0].numel())
                bar.update()
        rounded = {name: matrix.dequantize(hidden.dtype) for name, matrix in matrices.items()}
        for texts in _pieces(hidden):
            texts.copy_(layer(texts, weights._replace(**rounded), None, at, no_tap))
    return matrices


def _pieces(hidden: Tensor) -> Iterator[Tensor]:
    """Yield the texts in pieces for one pass each, as views."""
    yield from hidden.split(max(1, _TOKENS_AT_ONCE // hidden.shape[1]))


def input_moments(weights: LayerWeights, hidden: Tensor, at: Pass) -> dict[str, Tensor]:
    """Return the second moments [in, in] fp32 of the inputs of the matrices that are keys of _SAME_INPUTS."""
    moments = {}
    by_matrix = {}
    for field in _SAME_INPUTS:
        matrix = getattr(weights, field)
        size = matrix.shape[1]
        moments[field] = by_matrix[id(matrix)] = torch.zeros(size, size, device=hidden.device)

    def linear(x: Tensor, matrix: Matrix) -> Tensor:
        if id(matrix) in by_matrix:
            rows = x.flatten(0, -2).float()
            by_matrix[id(matrix)].addmm_(rows.T, rows)
        return at.ops.linear(x, matrix)

    for texts in _pieces(hidden):
        layer(texts, weights, None, at._replace(ops=at.ops._replace(linear=linear)), no_tap)
    return moments


@contextlib.contextmanager
def calibrated_layers(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    text: Sequence[int] | None = None,
    bos: int | None = None,
    seed: int = 0,
    device: torch.device = torch.device("cpu"),
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Iterator[Iterator[dict[str, Int4]]]:
    """Return the matrices of each layer in int4, rounded for the inputs that a text gives them, as an iterator.

    What is complete is kept in FOLDER.calibration, where a run that was stopped continues; it is removed when the
    context ends without an error.

    Args:
        checkpoint: the model, not quantized.
        folder: where the quantized model will be.
        text: token ids; None lets the model write the text, with `sample_texts`.
        bos, seed: for what the model writes, as in `sample_texts`.
        device: where to compute.
        dtype: to compute in; None takes the checkpoint's.
        progress: show bars on stderr.

    Raises:
        UserError: as `cut_text` does, or at the first `next`: FOLDER.calibration is of another model or text, or
            cannot be written, or the weights are damaged.
    """
    dtype = dtype or checkpoint.dtype
    tokens = None if text is None else cut_text(text, checkpoint.params)
    work = folder.with_name(f"{folder.name}.calibration")

    def layers() -> Iterator[dict[str, Int4]]:
        _begin(work, _fingerprint(checkpoint, dtype, (bos, seed) if tokens is None else tokens))
        if tokens is not None:
            _save(work / "tokens", {"tokens": tokens})
        elif not (work / "tokens").exists():
            weights = build_weights(checkpoint, device, dtype, progress)
            sampled = sample_texts(Model(weights, checkpoint.params, None), bos, seed, progress)
            del weights
            _save(work / "tokens", {"tokens": sampled})
        yield from _layers(checkpoint, load_file(work / "tokens")["tokens"], work, device, dtype, progress)

    yield layers()
    shutil.rmtree(work, ignore_errors=True)


def _layers(
    checkpoint: Checkpoint, tokens: Tensor, work: Path, device: torch.device, dtype: torch.dtype, progress: bool
) -> Iterator[dict[str, Int4]]:
    """Yield the matrices of each layer: those in the folder `work`, then new ones, which are saved there."""
    params = checkpoint.params
    at = pass_over(tokens.to(device), params, suitable_ops(device))
    specs = list(tensor_specs(params))
    done = 0
    if (work / "hidden").exists():
        state = load_file(work / "hidden")
        done, hidden = int(state["layers"]), state["hidden"].to(device)
    else:
        hidden = at.ops.embed(tokens, whole_tensor(checkpoint, specs[0])).to(device, dtype)
    for number in range(params.n_layers):
        file = work / f"layer.{number:03}"
        if number < done:
            tensors = load_file(file)
            yield {
                field: Int4(*(tensors[f"{field}.{part}"] for part in Int4._fields))
                for alike in _SAME_INPUTS.values()
                for field in alike
            }
            continue
        weights = LayerWeights(
            **{spec.field: whole_tensor(checkpoint, spec).to(device, dtype) for spec in specs if spec.layer == number}
        )
        name = f"layer {number + 1} of {params.n_layers}" if progress else None
        matrices = {
            field: Int4(*(tensor.cpu() for tensor in matrix))
            for field, matrix in quantize_layer(weights, hidden, at, name).items()
        }
        check_sound(bool(hidden.isfinite().all()))
        _save(
            file, {f"{field}.{part}": tensor for field, m in matrices.items() for part, tensor in m._asdict().items()}
        )
        _save(work / "hidden", {"layers": torch.tensor(number + 1), "hidden": hidden.cpu()})
        yield matrices


def _begin(work: Path, fingerprint: str) -> None:
    """Create the folder of a run. Raises UserError if it is there and of another one."""
    file = work / "run"
    if file.exists() and file.read_text() != fingerprint:
        raise UserError(
            f"{work}: is of a stopped run with another model, text or dtype; remove it, or name another folder"
        )
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{work}: cannot be written: {in_short(error)}; name another folder") from error
    with atomic_write(file) as part:
        part.write_text(fingerprint)


def _fingerprint(checkpoint: Checkpoint, dtype: torch.dtype, text: Tensor | tuple[int | None, int]) -> str:
    """Return a hash of what decides the result: the model, by the first row of each tensor, the dtype, and the text.

    text: the tokens, or the bos and the seed with which the model writes them.
    """
    drawn = None if isinstance(text, Tensor) else (text, N_TOKENS, _LENGTH)
    digest = hashlib.sha256(f"{VERSION} {checkpoint.params} {dtype} {drawn}".encode())
    tensors = [shard[:1] for shards in checkpoint.shards.values() for shard in shards]
    tensors += [change.b for change in checkpoint.adapter.values()]
    for tensor in [*tensors, *([text] if isinstance(text, Tensor) else [])]:
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _save(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file of tensors, whole or not at all."""
    with atomic_write(file) as part:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
        except SafetensorError as error:  # safetensors raises it for errors of the system
            raise OSError(in_short(error)) from error
