"""`to`: a model in another dtype, or on another device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError, in_short
from ..quantization.blocks import Blocks
from ..quantization.matrix import Matrix
from ..system.devices import KINDS, usable_device
from ..weights import COMPUTE_DTYPES, LayerWeights, MatrixField, Model, Weights, dtype_of


def to(model: Model, dtype_or_device: torch.dtype | torch.device | str) -> Model:
    """Return the model in another dtype, or on another device.

    Args:
        model: stays as it is. Tensors that already are as wanted are shared with it, also those mapped from files.
        dtype_or_device: a dtype or a device as in `load`, such as "float32" or "cuda". Quantized matrices keep their
            format; their products are then computed in the dtype.

    Raises:
        UserError: there is no such dtype or device, or the tensors do not fit into its memory; or blocks that were
            interleaved for the CPU's kernels should go elsewhere.
    """
    dtype, device = None, None
    if isinstance(dtype_or_device, torch.dtype) or dtype_or_device in [*COMPUTE_DTYPES]:  # a list: it may have no hash
        dtype = dtype_of(dtype_or_device)
    elif str(dtype_or_device).partition(":")[0] in KINDS:
        device = usable_device(dtype_or_device)
    else:
        known = ", ".join((*COMPUTE_DTYPES, *KINDS))
        raise UserError(f"{{argument}} {dtype_or_device}: should be one of {known}", argument="dtype_or_device")

    def move(matrix: MatrixField) -> MatrixField:
        return _moved(matrix, dtype, device)

    tok_embeddings, layers, norm, output = model.weights
    try:
        moved = move(tok_embeddings)
        weights = Weights(
            moved,
            tuple(LayerWeights(*map(move, layer)) for layer in layers),
            move(norm),
            moved if output is tok_embeddings else move(output),
        )
    except (RuntimeError, TypeError) as error:  # too little memory; a dtype that the device does not have
        raise UserError(f"the weights cannot be converted to {dtype_or_device}: {in_short(error)}") from error
    return model._replace(weights=weights)


def _moved(matrix: Matrix, dtype: torch.dtype | None, device: torch.device | None) -> Matrix:
    """Return a tensor or a quantized matrix in the dtype, or on the device, that is not None."""
    if isinstance(matrix, Tensor):
        return matrix.to(device=device, dtype=dtype)
    if not isinstance(matrix, Blocks):
        return type(matrix)(*(tensor.to(device=device) for tensor in matrix))
    if matrix.is_interleaved and device and device.type != "cpu":
        raise UserError(f"the blocks are interleaved for the CPU's kernels; load the model on {device} instead")
    return matrix._replace(data=matrix.data.to(device=device), dtype=dtype or matrix.dtype)
