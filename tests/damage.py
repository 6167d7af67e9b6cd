"""Small models in each format, and damage to their files."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama3_raw import Params
from llama3_raw.checkpoint.checkpoint import open_checkpoint
from llama3_raw.checkpoint.loading import to_state_dict
from llama3_raw.checkpoint.writing import save_quantized
from llama3_raw.weights import tensor_specs
from tests.paths import TINY
from tests.references import half_split, random_weights

SMALL = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 32, "norm_eps": 1e-5, "multiple_of": 16}

SMALL_HF = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "rms_norm_eps": 1e-5,
    "intermediate_size": 48,
}

CHECKPOINT = "consolidated.00.pth"

INDEX = "model.safetensors.index.json"

SHARD = "model-00001-of-00002.safetensors"

WQ = "layers.0.attention.wq.weight"

HF_NORM = "model.norm.weight"


def write_small(folder: Path) -> None:
    """Write a model of a few hundred weights in Meta's format."""
    params = Params.from_meta(SMALL)
    (folder / "params.json").write_text(json.dumps(SMALL))
    torch.save(to_state_dict(params, random_weights(params, torch.bfloat16, seed=0)), folder / CHECKPOINT)


def write_two_shards(folder: Path) -> None:
    """Write the small model in two of Meta's shards: matrices split by rows, wo and w2 by columns, norms in both."""
    write_small(folder)
    whole = torch.load(folder / CHECKPOINT, weights_only=True)
    for number in (0, 1):
        shard = {
            name: tensor if tensor.dim() == 1 else tensor.chunk(2, 1 if ".wo." in name or ".w2." in name else 0)[number]
            for name, tensor in whole.items()
        }
        torch.save({name: tensor.clone() for name, tensor in shard.items()}, folder / f"consolidated.{number:02}.pth")


def write_hf(folder: Path) -> None:
    """Write the small model in Hugging Face's format, in two files with an index."""
    params = Params.from_meta(SMALL)
    tensors = to_state_dict(params, random_weights(params, torch.bfloat16, seed=0))
    files: dict[str, dict[str, Tensor]] = {SHARD: {}, SHARD.replace("1-of", "2-of"): {}}
    for spec, file in zip(tensor_specs(params), itertools.cycle(files), strict=False):
        tensor = tensors[spec.meta_name]
        files[file][spec.hf_name] = (
            half_split(tensor, params.head_dim) if spec.field in ("wq", "wk") else tensor.clone()
        )
    for file, content in files.items():
        save_file(content, folder / file)
    weight_map = {name: file for file, content in files.items() for name in content}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(SMALL_HF))


def write_int8(folder: Path) -> None:
    """Write the small model with its matrices in int8."""
    with tempfile.TemporaryDirectory() as original:
        write_small(Path(original))
        save_quantized(Path(original), open_checkpoint(Path(original)), folder)


def copy_tiny(folder: Path) -> None:
    shutil.copytree(TINY, folder, dirs_exist_ok=True)


def unharmed(folder: Path) -> None:
    pass


def remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes | str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(name: str, length: Callable[[int], int]) -> Callable[[Path], Any]:
    """Damage: a file is truncated to length(its length)."""
    return lambda folder: os.truncate(folder / name, length((folder / name).stat().st_size))


def flip(name: str, find: bytes, offset: int) -> Callable[[Path], Any]:
    """Damage: one bit is flipped in the byte at an offset from the last occurrence of `find`."""

    def apply(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[content.rindex(find) + offset] ^= 1
        (folder / name).write_bytes(content)

    return apply


def rezip(change: Callable[[str, bytes], bytes | None]) -> Callable[[Path], Any]:
    """Damage: changed records in the checkpoint's zip file, which itself is intact; None leaves a record out."""

    def apply(folder: Path) -> None:
        content = io.BytesIO()
        with zipfile.ZipFile(folder / CHECKPOINT) as old, zipfile.ZipFile(content, "w") as new:
            for entry in old.infolist():
                record = change(entry.filename.split("/", 1)[1], old.read(entry))
                if record is not None:
                    new.writestr(entry.filename, record)
        (folder / CHECKPOINT).write_bytes(content.getvalue())

    return apply


def as_before_torch_2_6(name: str, record: bytes) -> bytes | None:
    """Like the files that Meta published, which lack the records that let torch compute the offsets itself."""
    return record if name in ("data.pkl", "version") or name.startswith("data/") else None


def swap_records(folder: Path) -> None:
    """Damage: the zip directory has the offsets of two records of equal length, w1 and w3, swapped."""
    rezip(as_before_torch_2_6)(folder)
    content = bytearray((folder / CHECKPOINT).read_bytes())
    one, two = (content.rindex(f"consolidated.00/data/{number}".encode()) - 4 for number in (7, 9))
    content[one : one + 4], content[two : two + 4] = content[two : two + 4], content[one : one + 4]
    (folder / CHECKPOINT).write_bytes(content)


def save(make: Callable[[dict[str, Tensor]], Any], number: int = 0) -> Callable[[Path], Any]:
    """Damage: shard `number` is replaced by make(the checkpoint's tensors)."""

    def apply(folder: Path) -> None:
        tensors = torch.load(folder / CHECKPOINT, weights_only=True)
        torch.save(make(tensors), folder / f"consolidated.{number:02}.pth")

    return apply


def params(**changes: Any) -> Callable[[Path], Any]:
    """Damage: changed values in params.json; None removes a key."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / "params.json").read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / "params.json").write_text(json.dumps(kept))

    return apply


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file, and the bytes after it."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Damage: a shard with a changed header and the same data."""

    def apply(folder: Path) -> None:
        content, data = split(folder / SHARD)
        change(content)
        text = json.dumps(content).encode()
        (folder / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + data)

    return apply


def offsets(begin: int, end: int) -> Callable[[Path], Any]:
    """Damage: in the header, the last norm begins and ends that many bytes later."""

    def change(content: dict[str, Any]) -> None:
        entry = content[HF_NORM]
        entry["data_offsets"] = [entry["data_offsets"][0] + begin, entry["data_offsets"][1] + end]

    return header(change)


def drop_output(folder: Path) -> None:
    """Damage: the embeddings are not tied, and the output matrix is missing."""
    for file in folder.glob("*.safetensors"):
        save_file({name: tensor for name, tensor in load_file(file).items() if name != "lm_head.weight"}, file)
    (folder / "config.json").write_text(json.dumps(SMALL_HF | {"tie_word_embeddings": False}))


class Malicious:
    """Its pickle creates a folder "it ran" when it is loaded."""

    def __init__(self, folder: Path):
        self.trace = folder / "it ran"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.trace),)


def save_code(folder: Path) -> None:
    torch.save({"norm.weight": Malicious(folder)}, folder / CHECKPOINT)


def ranks(change: Callable[[list[bytes]], Any]) -> Callable[[Path], Any]:
    """Damage: changed lines in tokenizer.model."""

    def apply(folder: Path) -> None:
        lines = (folder / "tokenizer.model").read_bytes().splitlines()
        change(lines)
        (folder / "tokenizer.model").write_bytes(b"\n".join(lines))

    return apply


BYTES = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Limit the process to a gigabyte of address space more than it has."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 1_000_000_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
