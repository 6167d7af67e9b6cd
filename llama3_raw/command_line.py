"""What the command lines of all tools share: the options that choose and load a model, and what a run has used."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from .backends.choose import ops_for
from .backends.streaming import least_memory, read_ahead
from .backends.tensor_parallel import parallel_ops
from .checkpoint.checkpoint import Checkpoint, first_layers, open_checkpoint, shard_of
from .checkpoint.files import find_tokenizer
from .checkpoint.loading import build_weights, check_gpu_layers
from .checkpoint.sharding import Shard
from .cli.entry_point import not_empty
from .decoding.loop import check_ids
from .decoding.prompt_lookup import MOST
from .decoding.sampling import Sampling
from .dialog import is_base_model
from .errors import UserError, in_short
from .memory import Lengths, Plan, check_memory, memory_for_weights
from .ops import Ops
from .system.machine import set_threads
from .system.process_groups import Ranks
from .system.processes import local_rank, number_of_processes
from .tokenizer import Tokenizer
from .weights import DTYPES, Model, in_words

DEFAULT_MODEL = "Meta-Llama-3-8B"

BUILT_IN_MODEL = "tiny"

_PROGRESS_BAR_FROM = 1_000_000_000  # bytes of weights; smaller models load before a bar could be read

DTYPES_BY_NAME = {in_words(dtype): dtype for dtype in DTYPES.values()}


class ModelFolder(NamedTuple):
    """A folder with a model in it, and in words why it was chosen."""

    path: Path
    why: str


class ChosenModel(NamedTuple):
    """A model to load, and how."""

    folder: ModelFolder
    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    device: torch.device
    dtype: torch.dtype | None  # None: as stored
    max_ram: int | None  # bytes; None: what is free
    quantized: bool  # round the matrices to int8
    gpu_layers: int | None = None  # whose matrices lie on the GPU, those of the rest on the CPU; None: all of them
    random_seed: int | None = None  # of random weights, which lie in no file; None: those of the folder


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the group "model": which one, where and in what it computes, with how much memory and how many threads."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--weights",
        type=not_empty,
        metavar="MODEL",
        help="a folder, a name in weights/, or org/repo in the Hugging Face cache "
        f"(default: $LLAMA3_RAW_WEIGHTS, else weights/{DEFAULT_MODEL}, else the only model in weights/, else the "
        "small built-in one)",
    )
    group.add_argument(
        "--tokenizer", type=not_empty, metavar="FILE", help="a tokenizer.model (default: the one beside the weights)"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    group.add_argument("--dtype", choices=DTYPES_BY_NAME, help="compute in this (default: as the weights are stored)")
    group.add_argument("--layers", type=int, metavar="N", help="run only the first N layers")
    group.add_argument(
        "--gpu-layers",
        type=int,
        metavar="N",
        help="for a model that does not fit on the GPU: only the matrices of the first N layers go there, those of the "
        "others stay on the CPU and are computed with there (CUDA; default: all go there)",
    )
    group.add_argument(
        "--quantize", choices=("int8",), help="round the matrices to int8 as they are loaded: half the memory and time"
    )
    group.add_argument(
        "--max-ram",
        type=byte_size,
        metavar="SIZE",
        help="run in this much memory, all included (4GB, 3500MB, 3.5GiB): weights that do not fit are read from the "
        "disk for each token (CPU; default: what is free)",
    )
    group.add_argument(
        "--threads",
        type=positive_int,
        metavar="N",
        help="CPU threads (default: $OMP_NUM_THREADS, else the physical cores that this process may use, by its "
        "affinity and its container's quota)",
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Adds the prompt, --ids and --special, for tools that look at one pass over it."""
    parser.add_argument("prompt", nargs="?", help="the text; - reads it from stdin")
    group = parser.add_argument_group("text")
    group.add_argument("--ids", action="store_true", help="the prompt is token ids; needs no tokenizer")
    group.add_argument(
        "--special", action="store_true", help="names such as <|eot_id|> in the prompt are special tokens"
    )


def read_prompt(prompt: str | None, tool: str) -> str:
    """The prompt of a tool's command line; "-" reads it from stdin. Raises UserError where there is none."""
    if prompt is None:
        raise UserError(f'give a prompt: {tool} "Once upon a time", or - to read it from stdin')
    if prompt == "-":
        prompt = read_text("-").removesuffix("\n").removesuffix("\r")  # the line end that echo and editors add
    if not prompt:
        raise UserError("the prompt is empty; give at least one character")
    return prompt


def chosen_ids(chosen: ChosenModel, prompt: str, *, are_ids: bool = False, special: bool = False) -> list[int]:
    """The tokens of a prompt, for a tool that looks at one pass over it.

    are_ids, special: the options of `add_prompt_options`. Raises UserError for tokens that the model cannot take.
    """
    if are_ids:
        ids = parse_ids(prompt, "--ids")
    else:
        assert chosen.tokenizer is not None  # choose_model has seen to it
        ids = chosen.tokenizer.encode(prompt, bos=True, allow_special=special)
    params = chosen.checkpoint.params
    check_ids(ids, params)
    if len(ids) > params.max_seq_len:
        raise UserError(f"the prompt has {len(ids)} tokens, the model's context is {params.max_seq_len}; shorten it")
    return ids


def add_lookup_option(group: argparse._ArgumentGroup) -> None:
    """Adds --lookup. Its range is checked by `LookupPolicy` itself."""
    group.add_argument(
        "--lookup",
        type=int,
        default=0,
        metavar="N",
        help=f"propose up to N tokens, at most {MOST}, from earlier text and check them at once, where that is faster; "
        "the same tokens on a CPU in bfloat16, elsewhere up to rounding (default: 0, off)",
    )


def add_compile_option(group: argparse._ArgumentGroup) -> None:
    """Adds --no-compile."""
    group.add_argument(
        "--no-compile",
        action="store_true",
        help="on a GPU, run each pass step by step, so that a debugger can stop in it: slower, but for the first token",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Adds the settings of `Sampling`, and --seed. Their ranges are checked by `Sampling` itself."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest token (default: %(default)s)"
    )
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens (0: all)")
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="only the likeliest, up to P in sum (default: %(default)s)",
    )
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="only tokens P times as likely as the top")
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="make tokens seen before less likely (1: off)",
    )
    group.add_argument("--seed", type=seed, help="draw the same tokens each time")


def chosen_sampling(options: argparse.Namespace) -> Sampling:
    """What the options of `add_sampling_options` say. Raises UserError for what is out of range."""
    return Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
    )


def seed(text: str) -> int:
    """The type of --seed: what torch's generators take."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"should be from 0 to 2**63 - 1, is {value}")
    return value


def positive_int(text: str) -> int:
    """The type of options that count something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"should be 1 or more, is {value}")
    return value


def read_text(file: str) -> str:
    """The text in a file; "-" reads it from stdin. Raises UserError where it cannot be read or is not UTF-8."""
    try:
        if file != "-":
            return Path(file).read_bytes().decode("utf-8")
        if sys.stdin is None:
            raise UserError("stdin is closed; give it a file by < FILE")
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        name = "stdin" if file == "-" else file
        raise UserError(f"{name}: not valid UTF-8 at byte {error.start}; convert the text to UTF-8") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; check its name and your rights to it") from error


def parse_ids(text: str, source: str) -> list[int]:
    """Token ids separated by spaces, commas or lines. Raises UserError naming the source for what is no such number."""
    words = re.split(r"[\s,]+", text.strip(" \t\r\n,[]"))
    for word in words:
        if not re.fullmatch(r"[0-9]{1,18}", word):
            raise UserError(f"{source}: {in_short(repr(word))} is not a token id; give numbers separated by spaces")
    return [int(word) for word in words]


def byte_size(text: str) -> int:
    """The type of options that give an amount of memory, in bytes: a number with its unit."""
    matched = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT])(i?)B", text, re.IGNORECASE)
    if not matched:
        raise argparse.ArgumentTypeError(f"should be a size such as 4GB, 3500MB or 3.5GiB, is {text!r}")
    number, prefix, binary = matched.groups()
    return int(float(number) * (1024 if binary else 1000) ** (1 + "KMGT".index(prefix.upper())))


def choose_model(options: argparse.Namespace, needs_tokenizer: bool = True, named_by: str = "--weights") -> ChosenModel:
    """The model that the options of `add_model_options` name, checked, but for its weights, which are not read yet.

    Unless the tool `needs_tokenizer`, one in the folder that is missing or does not fit is no obstacle. named_by: the
    option that options.weights came from. Raises UserError.
    """
    set_threads(options.threads)
    device = choose_device(options.device)
    quantized = options.quantize is not None
    folder = find_model(options.weights, named_by)
    checkpoint = open_checkpoint(folder.path)
    if quantized and checkpoint.scales:
        raise UserError(f"--quantize int8: {folder.path} is in int8 already; leave it out")
    dtype = DTYPES_BY_NAME.get(options.dtype)
    if quantized or checkpoint.scales:
        check_int8(quantized, device, dtype or checkpoint.dtype)
    if options.layers is not None:
        checkpoint = first_layers(checkpoint, options.layers)
    check_gpu_layers(options.gpu_layers, device, checkpoint.params)
    try:
        tokenizer = find_tokenizer(folder.path, options.tokenizer, checkpoint.params)
    except UserError:
        if needs_tokenizer or options.tokenizer:
            raise
        tokenizer = None
    if tokenizer is None and needs_tokenizer:
        raise UserError(f"{folder.path}: there is no tokenizer.model; give --tokenizer FILE, or the text as token ids")
    return ChosenModel(folder, checkpoint, tokenizer, device, dtype, options.max_ram, quantized, options.gpu_layers)


def check_int8(quantized: bool, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError where int8 matrices would be slow. quantized: by an option, that can be left out."""
    if quantized and device.type == "mps":
        raise UserError(
            f"--quantize int8 is for CPUs and NVIDIA GPUs; leave it out, or give --device cpu, not {device}"
        )
    if dtype != torch.bfloat16:
        raise UserError(f"int8 matrices are fast in bfloat16 only, not in {in_words(dtype)}; give --dtype bfloat16")


def check_context(context: int | None, longest: int) -> None:
    """Raises UserError for a --context beyond the model's own, in tokens."""
    if context and context > longest:
        raise UserError(f"--context {context}: the model's own context is {longest} tokens")


def load_model(
    chosen: ChosenModel, lengths: Lengths, reference: bool = False, ranks: Ranks | None = None
) -> tuple[Model, Ops, str]:
    """Loads the model for texts of these lengths; -> the model, the operations for it, a line that says which it is.

    reference: take the exact operations, not the fastest ones. The tool prints the line once nothing can be wrong with
    the input any more, so that an error stays one line. A warning is printed where the model is larger than the memory.
    ranks: the processes that share the model; this one loads its part. Raises UserError where the run does not fit.
    """
    folder, checkpoint, tokenizer, device, dtype, max_ram, quantized, gpu_layers, _ = chosen
    if ranks is not None:
        for option, value in (("max-ram", max_ram), ("gpu-layers", gpu_layers)):
            if value is not None:
                raise UserError(f"--{option} is for a model in one process; leave it out, or run it without torchrun")
        checkpoint = shard_of(checkpoint, Shard(ranks.tensor.rank, ranks.tensor.size))
    plan = Plan(checkpoint, device, dtype, lengths, max_ram, quantized, gpu_layers, exact=reference)
    warning = check_memory(plan)
    if ranks is not None:
        ranks.everyone.wait()  # until the others have looked at the memory too, which loading takes
    if warning and max_ram is None:
        print(f"llama3_raw: warning: {warning}", file=sys.stderr)
    room = memory_for_weights(plan)  # asked before they are read in
    size = sum(part.nbytes for parts in checkpoint.parts.values() for part in parts)
    # what is larger than the memory is not read in beforehand: it would not stay
    with_bar = size >= _PROGRESS_BAR_FROM and not warning
    weights = build_weights(checkpoint, device, dtype, with_bar, quantized, gpu_layers)
    ops = ops_for(weights, exact=reference)
    if ranks is not None and ranks.tensor.size > 1:
        ops = parallel_ops(ops, weights, ranks.tensor)
    if max_ram is not None:
        lacking = least_memory(weights) - room
        if lacking > 0:
            least = math.ceil((max_ram + lacking + 5_000_000) / 1e7) / 100  # GB; the next run may begin a bit larger
            raise UserError(
                f"{checkpoint.source}: --max-ram is too little; the least is --max-ram {least:.2f}GB, or less for a "
                "shorter text"
            )
        ops = read_ahead(ops, weights, room)
    where = str(device)
    if gpu_layers is not None:
        where += f" (the matrices behind the first {gpu_layers} layers on the CPU)"
    if ranks is not None:
        where += f", shared by {ranks.tensor.size} processes" if ranks.tensor.size > 1 else ""
        where += f", {ranks.data.size} times" if ranks.data.size > 1 else ""
    return Model(chosen.checkpoint.params, weights, tokenizer), ops, f"{folder.path} ({folder.why}) on {where}"


def warn_of_base_model(model: Model) -> None:
    """Prints a line on stderr if the model, of which a chat is asked, is a base model."""
    if is_base_model(model):
        print(
            "llama3_raw: warning: a base model, it seems, not trained to answer; choose an Instruct model for a chat",
            file=sys.stderr,
        )


def choose_device(name: str) -> torch.device:
    """--device -> the device, once it is sure to be there. Raises UserError."""
    if name == "auto":
        has_mps = torch.backends.mps.is_available() and number_of_processes() == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name == "cuda" and number_of_processes() > 1:
        name = f"cuda:{local_rank()}"  # a GPU for each process
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: there is no such device; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA GPUs here; use --device cpu")
    if device.type == "mps" and number_of_processes() > 1:
        raise UserError("--device mps: is for one process; give --device cpu, or run it without torchrun")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no Apple GPU here; use --device cpu")
    return device


def find_model(weights: str | None = None, named_by: str = "--weights") -> ModelFolder:
    """--weights -> the folder it means; None -> the default. Raises UserError naming what there is."""
    if weights:
        return ModelFolder(_find_named(weights, named_by), named_by)
    from_environment = os.environ.get("LLAMA3_RAW_WEIGHTS")
    if from_environment:
        return ModelFolder(_find_named(from_environment, "$LLAMA3_RAW_WEIGHTS"), "$LLAMA3_RAW_WEIGHTS")
    there = local_models()
    if DEFAULT_MODEL in there:
        return ModelFolder(there[DEFAULT_MODEL], "the default")
    others = [name for name in there if name != BUILT_IN_MODEL]
    if len(others) > 1:
        raise UserError(f"several models in weights/: {', '.join(others)}; choose one with --weights NAME")
    if others:
        return ModelFolder(there[others[0]], "the only model in weights/")
    return ModelFolder(_built_in_folder(), "the small built-in model; --weights takes another")


def local_models() -> dict[str, Path]:
    """Name -> folder of every model in weights/ of the current folder, then in that of the source tree."""
    found: dict[str, Path] = {}
    for root in (Path("weights"), Path(__file__).parent.parent / "weights"):
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            if any((folder / file).exists() for file in ("params.json", "config.json", "original/params.json")):
                found.setdefault(folder.name, folder)
    return found


def _built_in_folder() -> Path:
    """weights/tiny of the source tree, or its copy inside the installed package."""
    installed = Path(__file__).parent / "built_in"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "weights" / BUILT_IN_MODEL


def _find_named(name: str, option: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise UserError(f"{option} {name}: is a file; give the folder it is in")
    there = local_models()
    if name in there:
        return there[name]
    if name == BUILT_IN_MODEL:
        return _built_in_folder()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        from huggingface_hub import snapshot_download  # slow to import, and seldom needed
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(name, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            raise UserError(f"{option} {name}: neither a folder here nor in the Hugging Face cache") from None
    known = ", ".join(there) or "nothing"
    raise UserError(f"{option} {name}: there is no such folder, and weights/ holds {known}")
