"""python -m llama3_raw.bench: how fast a model runs, against what the memory can do; and models to measure on.

--make-synthetic writes a checkpoint of true size with random weights.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from . import ops_cpu
from .command_line import add_model_options, choose_model, load_model, peak_memory, positive_int, seed
from .errors import ArgumentParser, UserError, command_line_tool, in_short
from .generation import generate
from .memory import Lengths
from .model import KVCache
from .ops import Ops
from .params import Params
from .tokenizer import Tokenizer
from .weights import Model, tensor_places

_LLAMA_3: dict[str, Any] = {"n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-05, "rope_theta": 500000.0}
# params.json of the models (llama_models.sku_list), and whether their embeddings are tied
SYNTHETIC: dict[str, tuple[dict[str, Any], bool]] = {
    "8b": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "ffn_dim_multiplier": 1.3, "multiple_of": 1024, **_LLAMA_3},
        False,
    ),
    "1b": (
        {"dim": 2048, "n_layers": 16, "n_heads": 32, "ffn_dim_multiplier": 1.5, "multiple_of": 256, **_LLAMA_3}
        | {"use_scaled_rope": True},
        True,
    ),
    "3b": (
        {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0, "multiple_of": 256, **_LLAMA_3}
        | {"use_scaled_rope": True},
        True,
    ),
    "70b-1layer": (
        {"dim": 8192, "n_layers": 1, "n_heads": 64, "ffn_dim_multiplier": 1.3, "multiple_of": 4096, **_LLAMA_3},
        False,
    ),
}
_CHUNK = 1 << 26  # values made at once


def make_synthetic(size: str, folder: Path, tokenizer: Path | None = None, random_seed: int = 0) -> None:
    """Writes a model of Meta's format and true size with random weights in bf16, in little memory.

    Matrices are normal with a standard deviation of 0.02, norms are one. Raises UserError where the folder already
    holds a model or the disk is too small.
    """
    content, tied = SYNTHETIC[size]
    params = Params.from_meta(content)
    if tokenizer is not None and Tokenizer(tokenizer).n_words != params.vocab_size:
        raise UserError(f"--tokenizer {tokenizer}: does not have the {params.vocab_size} tokens of Llama 3")
    places = list(tensor_places(params, tied))
    n_bytes = sum(2 * torch.Size(place.shape).numel() for place in places)
    checkpoint = folder / "consolidated.00.pth"
    for file in (checkpoint, folder / "params.json", folder / "tokenizer.model"):
        if file.exists() and not (tokenizer is not None and file.samefile(tokenizer)):
            raise UserError(f"{file}: is there already; name another folder, or remove it first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}; name a folder you may write to") from error
    if free < n_bytes + 10_000_000:
        raise UserError(f"{folder}: {n_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free on that disk")

    part = checkpoint.with_suffix(".part")
    try:
        # Save the structure alone (memory that is never touched costs nothing), then fill in the bytes where they go.
        empty = {place.meta_name: torch.empty(place.shape, dtype=torch.bfloat16) for place in places}
        with torch.serialization.skip_data():
            torch.save(empty, part)
        del empty
        _fill(part, random_seed, n_bytes)
        if tokenizer is not None and tokenizer.resolve() != (folder / "tokenizer.model").resolve():
            shutil.copyfile(tokenizer, folder / "tokenizer.model")
        (folder / "params.json").write_text(json.dumps(content) + "\n")
        part.rename(checkpoint)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for what the system refuses
        raise UserError(f"{folder}: cannot be written: {in_short(error)}") from error
    finally:
        part.unlink(missing_ok=True)


def _fill(file: Path, random_seed: int, n_bytes: int) -> None:
    """Puts random values into the place of every tensor of a checkpoint that has only its structure yet."""
    structure = torch.load(file, map_location="meta", weights_only=True)
    generator = torch.Generator().manual_seed(random_seed)
    with open(file, "r+b") as opened, tqdm(total=n_bytes, unit="B", unit_scale=True, desc=str(file.parent)) as bar:
        for tensor in structure.values():
            opened.seek(tensor.untyped_storage()._checkpoint_offset)
            for begin in range(0, tensor.numel(), _CHUNK):
                count = min(_CHUNK, tensor.numel() - begin)
                if tensor.dim() == 1:
                    values = torch.ones(count, dtype=torch.bfloat16)
                else:
                    values = torch.empty(count).normal_(0, 0.02, generator=generator).bfloat16()
                opened.write((ctypes.c_char * values.nbytes).from_address(values.data_ptr()))
                bar.update(values.nbytes)


class Figures(NamedTuple):
    """What `measure` found. Rates are medians over rounds; ratios are medians of the ratios within a round."""

    decode_tokens_per_second: float
    decode_gb_per_second: float  # of weights read, in units of 1e9 bytes
    read_loop_gb_per_second: float | None  # of the same weights by a plain loop; None without a compiler
    decode_share_of_read_loop: float | None
    prefill_tokens_per_second: dict[int, float]  # by the number of tokens
    peak_ram_bytes: int | None


def measure(
    model: Model,
    prefill: Sequence[int] = (17, 256),
    new_tokens: int = 4,
    rounds: int = 5,
    ops: Ops | None = None,
    read_loop: bool = True,
) -> Figures:
    """Measures the model where it is, each round a bit of everything in turn, so that a disturbance hits all alike.

    prefill: how many tokens at once; decoding goes on behind the fewest. ops: those of `generate`. read_loop: whether
        to measure the limit on the CPU as well, for which all weights have to be in memory.
    """
    weights, vocab_size = model.weights, model.params.vocab_size
    matrices = [tensor for layer in weights.layers for tensor in layer if tensor.dim() == 2] + [weights.output]
    n_bytes = sum(matrix.nbytes for matrix in matrices)
    kernels = None
    if read_loop and weights.norm.device.type == "cpu":
        with contextlib.suppress(ops_cpu.CannotBuild):
            kernels = ops_cpu.build_kernels()
    ids = torch.randint(vocab_size, (max(prefill),), generator=torch.Generator().manual_seed(0)).tolist()
    cache = KVCache.allocate(model.params, max_seq_len=max(prefill) + new_tokens + 1, like=weights)
    decode: list[float] = []
    read: list[float] = []
    by_length: dict[int, list[float]] = {length: [] for length in prefill}
    for round_number in tqdm(range(rounds + 1), desc="measuring", unit="round", leave=False):
        if kernels is not None:
            start = time.perf_counter()
            for matrix in matrices:
                ops_cpu.read_loop(kernels, matrix)
            read.append(n_bytes / (time.perf_counter() - start) / 1e9)
        for length in reversed(prefill):
            tokens = generate(model, ids[:length], max_new_tokens=new_tokens + 1, stop_ids=(), cache=cache, ops=ops)
            start = time.perf_counter()
            next(tokens)
            by_length[length].append(length / (time.perf_counter() - start))
        start = time.perf_counter()
        count = sum(1 for _ in tokens)
        decode.append(count / (time.perf_counter() - start))
        if round_number == 0:  # pages come in, threads start
            for times in (decode, read, *by_length.values()):
                times.clear()
    speed = statistics.median(decode)
    shares = [each * n_bytes / 1e9 / limit for each, limit in zip(decode, read, strict=False)]
    return Figures(
        decode_tokens_per_second=speed,
        decode_gb_per_second=speed * n_bytes / 1e9,
        read_loop_gb_per_second=statistics.median(read) if read else None,
        decode_share_of_read_loop=statistics.median(shares) if shares else None,
        prefill_tokens_per_second={length: statistics.median(speeds) for length, speeds in by_length.items()},
        peak_ram_bytes=peak_memory(),
    )


def show(figures: Figures) -> None:
    """Prints a table, and the same as JSON in the last line."""
    for length, speed in figures.prefill_tokens_per_second.items():
        print(f"prefill {length:>5} tokens      {speed:10.1f} tokens/s")
    print(f"decode                    {figures.decode_tokens_per_second:10.2f} tokens/s")
    print(f"weights read by decode    {figures.decode_gb_per_second:10.1f} GB/s")
    if figures.read_loop_gb_per_second and figures.decode_share_of_read_loop:
        print(f"a loop that only reads    {figures.read_loop_gb_per_second:10.1f} GB/s")
        print(f"share of it               {figures.decode_share_of_read_loop:10.1%}")
    if figures.peak_ram_bytes:
        print(f"peak memory               {figures.peak_ram_bytes / 1e9:10.2f} GB")
    print(json.dumps(figures._asdict()))


def build_parser() -> ArgumentParser:
    """The options of `python -m llama3_raw.bench`."""
    parser = ArgumentParser(prog="python -m llama3_raw.bench", description=__doc__)
    parser.add_argument(
        "--make-synthetic",
        nargs=2,
        metavar=("SIZE", "FOLDER"),
        help=f"write random weights of true size instead of measuring; SIZE is one of {', '.join(SYNTHETIC)}",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the random weights (default: %(default)s)")
    parser.add_argument(
        "--prefill", type=positive_int, nargs="+", default=[17, 256], metavar="N", help="prompts of so many tokens"
    )
    parser.add_argument("--new-tokens", type=positive_int, default=4, metavar="N", help="tokens decoded in a round")
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="(default: %(default)s)")
    add_model_options(parser)
    return parser


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Runs the tool; -> exit status."""
    options = build_parser().parse_args(arguments)
    if options.make_synthetic:
        size, folder = options.make_synthetic
        if size not in SYNTHETIC:
            raise UserError(f"--make-synthetic {size}: there is no such size; choose from {', '.join(SYNTHETIC)}")
        make_synthetic(size, Path(folder), Path(options.tokenizer) if options.tokenizer else None, options.seed)
        return 0
    chosen = choose_model(options, needs_tokenizer=False)
    prefill = sorted(set(options.prefill))
    longest = prefill[-1] + options.new_tokens + 1
    context = chosen.checkpoint.params.max_seq_len
    if longest > context:
        raise UserError(f"--prefill {prefill[-1]}: with the new tokens that is beyond the model's context of {context}")
    model, ops, which = load_model(chosen, Lengths(prompt=prefill[-1], text=longest, least=2))
    print(f"llama3_raw: {which}", file=sys.stderr)
    show(measure(model, prefill, options.new_tokens, options.rounds, ops, read_loop=options.max_ram is None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
