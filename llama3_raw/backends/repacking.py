"""GGML's blocks in the order that the CPU's kernels read fastest: a copy in memory, made when a model is loaded."""

from __future__ import annotations

import itertools
from typing import Any, TypeGuard

from tqdm import tqdm

from ..quantization.blocks import Blocks
from ..quantization.int4 import OUTPUTS
from ..quantization.matrix import Matrix
from ..system.madvise import drop_pages
from ..weights import LayerWeights, Weights
from .cpu import compiled_kernels, interleaved


def repack(weights: Weights, *, are_mapped: bool = False, progress: bool = False) -> Weights:
    """Return the weights with the matrices in blocks interleaved, for tokens one by one; the products keep their bits.

    Matrices whose number of outputs is no multiple of 16 stay as they are, and so do `tok_embeddings`, of which a token
    reads one row. Without a C compiler, or for weights that are not on the CPU in blocks, nothing changes.

    The result is for running: with tied embeddings `output` is a copy, and would be written as a second tensor.

    Args:
        are_mapped: the blocks are mapped from a file and nobody has changed them: drop their pages from the memory.
        progress: show a bar on stderr.
    """
    matrices = itertools.chain(*weights.layers, (weights.output,))
    total = sum(matrix.nbytes for matrix in matrices if _can_be_repacked(matrix))
    kernels = compiled_kernels() if total else None
    if kernels is None:
        return weights
    with tqdm(total=total, unit="B", unit_scale=True, desc="repacking", disable=not progress, leave=False) as bar:

        def repacked(matrix: Matrix) -> Any:  # of a norm, a tensor
            if not _can_be_repacked(matrix):
                return matrix
            copy = interleaved(kernels, matrix)
            if are_mapped:
                drop_pages(matrix.data)
            bar.update(copy.nbytes)
            return copy

        layers = tuple(LayerWeights(*map(repacked, layer)) for layer in weights.layers)
        return weights._replace(layers=layers, output=repacked(weights.output))


def _can_be_repacked(matrix: Matrix) -> TypeGuard[Blocks]:
    if not isinstance(matrix, Blocks) or matrix.is_interleaved or matrix.data.device.type != "cpu":
        return False
    return matrix.shape[0] % OUTPUTS == 0 and matrix.data.is_contiguous()
