"""python -m llama3_raw.bench: how fast a model runs, against what the memory can do and against other engines.

--make-synthetic SIZE makes random weights of true size on the device and measures on them, with a FOLDER behind it
writes them there instead; --taps measures what seeing inside costs; --estimate MODEL reckons what a model takes on GPUs
that are not there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..backends.choose import suitable_ops
from ..checkpoint.checkpoint import first_layers
from ..cli.entry_point import ArgumentParser, command_line_tool, not_empty
from ..cli.memory_plan import Lengths, Plan, check_memory
from ..cli.models import ChosenModel, ModelFolder, check_int8, choose_device, choose_model, load_model
from ..cli.options import DTYPES_BY_NAME, add_model_options, positive_int, seed
from ..errors import UserError, in_short, needed_package
from ..ops import Ops
from ..system.machine import set_threads
from ..weights import Model, in_words
from .baselines import LLAMA_CPP, PEERS, check_peers, open_peers
from .engines import Batch
from .estimate import run_estimate
from .measure import Figures, longest_text, measure
from .synthetic import SYNTHETIC, make_synthetic, random_weights, synthetic_checkpoint
from .tap_overhead import LENGTH, TapFigures, measure_taps

_PREFILL = (17, 256, 2048)
_PLOTTED = (17, 256, 1024, 2048, 4096)


@dataclass(frozen=True)
class Start:
    """A run of `python -m llama3_raw` with a short prompt, from the start of the process to its first token."""

    start_to_first_token_seconds: float
    load_seconds: float  # of it; all weights are looked at, if there is a GB of them
    first_pass_seconds: float  # of it
    peak_ram_bytes: int | None


def time_start(chosen: ChosenModel, prompt_length: int) -> Start:
    """Runs the main tool once, as a user would, and takes the time until a token is out.

    Its weights should be in the page cache already.
    """
    params = chosen.checkpoint.params
    command = [sys.executable, "-m", "llama3_raw", "--ids", "--max-new-tokens=1", "--stats=json"]
    command += [f"--weights={chosen.folder.path}", f"--device={chosen.device}", f"--layers={params.n_layers}"]
    command += [f"--threads={torch.get_num_threads()}"]
    if chosen.quantized:
        command += ["--quantize=int8"]
    if chosen.gpu_layers is not None:
        command += [f"--gpu-layers={chosen.gpu_layers}"]
    if chosen.max_ram is not None:
        command += [f"--max-ram={chosen.max_ram / 1e9}GB"]
    if chosen.dtype is not None:
        command += [f"--dtype={str(chosen.dtype).removeprefix('torch.')}"]
    ids = " ".join(str(token % params.vocab_size) for token in range(prompt_length))
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as prompt:  # as an argument a long one would be refused
        prompt.write(ids)
        prompt.seek(0)
        with subprocess.Popen(
            [*command, "-"], stdin=prompt, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            seconds = time.perf_counter() - start
            _, said = process.communicate()
    if process.returncode:
        raise UserError(f"a run of python -m llama3_raw fails: {in_short(said[-200:])}")
    stats = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    return Start(seconds, stats["load_seconds"], stats["seconds_to_first_token"], stats["peak_ram_bytes"])


def show(figures: Figures, start: Start | None) -> None:
    """Print a table, and the same as JSON in the last line. start: None if there are no files to start from."""
    for length, speed in figures.prefill_tokens_per_second.items():
        _line(f"prefill {length:>5} tokens", f"{speed:10.1f} tokens/s")
    for context, speed in figures.decode_tokens_per_second_by_context.items():
        _line(f"decode behind {context:>5}", f"{speed:10.2f} tokens/s")
    _line("weights read by decode", f"{figures.decode_gb_per_second:10.1f} GB/s")
    _show_limits(figures)
    if start:
        _line("start to first token", f"{start.start_to_first_token_seconds:10.2f} s")
        _line("  of it loading", f"{start.load_seconds:10.2f} s")
        _line("  of it the first pass", f"{start.first_pass_seconds:10.2f} s")
    if start and start.peak_ram_bytes:
        _line("peak memory", f"{start.peak_ram_bytes / 1e9:10.2f} GB")
    for peer in figures.vs.values():
        print(f"\nbeside {peer.version}; ratio of llama3_raw to it: median (each round)")
        for length, speed in peer.prefill_tokens_per_second.items():
            ratios = _in_words(peer.prefill_ratio[length], peer.prefill_ratios[length])
            _line(f"prefill {length:>5} tokens", f"{speed:10.1f} tokens/s   {ratios}")
        for context, speed in peer.decode_tokens_per_second.items():
            ratios = _in_words(peer.decode_ratio[context], peer.decode_ratios[context])
            _line(f"decode behind {context:>5}", f"{speed:10.2f} tokens/s   {ratios}")
    print(json.dumps(asdict(figures) | (asdict(start) if start else {})))


def _show_limits(figures: Figures) -> None:
    """What the machine can do at most, as far as it was measured, and the share of it."""
    if figures.read_loop_gb_per_second and figures.decode_share_of_read_loop:
        _line("a loop that only reads", f"{figures.read_loop_gb_per_second:10.1f} GB/s")
        _line("share of it", f"{figures.decode_share_of_read_loop:10.1%}")
    if figures.copy_gb_per_second and figures.decode_share_of_copy:
        _line("a copy reads and writes", f"{figures.copy_gb_per_second:10.1f} GB/s")
        _line("share of it", f"{figures.decode_share_of_copy:10.1%}")
    if figures.matmul_tflop_per_second and figures.prefill_share_of_matmul:
        _line("a large matrix product", f"{figures.matmul_tflop_per_second:10.1f} TFLOP/s")
        for length, share in figures.prefill_share_of_matmul.items():
            _line(f"share of it, {length:>5} tokens", f"{share:10.1%}")


def _line(name: str, value: str) -> None:
    print(f"{name:<26}{value}")


def show_taps(figures: TapFigures) -> None:
    """Prints a table, and the same as JSON in the last line."""
    for name, cost in (
        (f"the default tap, {LENGTH} tokens", figures.default_tap_prompt),
        ("the default tap, one token", figures.default_tap_token),
        (f"every tensor of {LENGTH} tokens", figures.trace),
    ):
        each = " ".join(f"{ratio:.3f}" for ratio in cost.ratios)
        print(f"{name:<30}{cost.ratio:.4f} times as long as {cost.plain_seconds:.4f} s without  ({each})")
    print(f"copies of them                {figures.trace_bytes / 1e6:.1f} MB")
    print(
        f"all calls of the default tap  {figures.default_tap_seconds * 1e6:.0f} microseconds in a pass over one token"
    )
    print(json.dumps(asdict(figures)))


def _in_words(median: float, ratios: Sequence[float]) -> str:
    return f"{median:.2f}  ({' '.join(f'{ratio:.2f}' for ratio in ratios)})"


def check_picture(file: Path) -> None:
    """Raises UserError where matplotlib is missing, or where it will not be able to write this file."""
    needed_package("matplotlib", "--plot")
    from matplotlib.figure import Figure

    if file.suffix[1:] not in Figure().canvas.get_supported_filetypes():
        raise UserError(f"--plot {file}: the name should end in .png or .svg")
    if not file.parent.is_dir():
        raise UserError(f"--plot {file}: there is no folder {file.parent}; make it first")


def draw(figures: Figures, file: Path, title: str) -> None:
    """The speed of decoding against the number of tokens before, as a picture; the suffix of the file says which kind.

    The file has passed `check_picture`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    own = figures.decode_tokens_per_second_by_context
    speeds = {"llama3_raw": own, **{name: peer.decode_tokens_per_second for name, peer in figures.vs.items()}}
    contexts = list(own)
    memory_gb_per_second = figures.read_loop_gb_per_second or figures.copy_gb_per_second
    if memory_gb_per_second:
        limits = [
            memory_gb_per_second * 1e9 / (figures.weights_bytes_per_token + context * figures.cache_bytes_per_token)
            for context in contexts
        ]
        axes.plot(contexts, limits, "--", color="0.5", label="limit: reading weights and cache once a token")
    for name, by_context in speeds.items():
        axes.plot(list(by_context), list(by_context.values()), "o-", label=name)
    axes.set(title=title, xlabel="tokens in the context", ylabel="tokens/s", xticks=contexts)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def build_parser() -> ArgumentParser:
    """The options of `python -m llama3_raw.bench`."""
    parser = ArgumentParser(prog="python -m llama3_raw.bench", description=__doc__)
    parser.add_argument(
        "--make-synthetic",
        nargs="+",
        metavar=("SIZE", "FOLDER"),
        help="measure on random weights of true size, made on the device; with a FOLDER write them there instead of "
        f"measuring; SIZE is one of {', '.join(SYNTHETIC)}",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the random weights (default: %(default)s)")
    parser.add_argument(
        "--prefill",
        type=positive_int,
        nargs="+",
        metavar="N",
        help="prompts of so many tokens; on the CPU more than 1,000 once only (default: 17 256 2048)",
    )
    parser.add_argument(
        "--contexts",
        type=positive_int,
        nargs="+",
        metavar="N",
        help="decode behind so many tokens (default: as many as the shortest prompt; with --plot "
        f"{' '.join(map(str, _PLOTTED))})",
    )
    parser.add_argument(
        "--new-tokens",
        type=positive_int,
        metavar="N",
        help="tokens decoded in a round (default: 4, on a GPU 64)",
    )
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--vs",
        nargs="+",
        choices=PEERS,
        default=[],
        metavar="PEER",
        help=f"engines to measure in turn with this one, on the same weights: {', '.join(PEERS)}",
    )
    parser.add_argument(
        "--batch",
        type=positive_int,
        metavar="N",
        help="also measure N texts at a time, as python -m llama3_raw.batch computes them, in turn with one alone",
    )
    parser.add_argument(
        "--gguf",
        type=not_empty,
        metavar="FILE",
        help=f"for {LLAMA_CPP}: the weights in its format, written if they are not there (default: for this run only)",
    )
    parser.add_argument(
        "--taps",
        action="store_true",
        help="measure what seeing inside costs instead: the default tap beside no taps, for a prompt of "
        f"{LENGTH} tokens and for one token, and a trace of every tensor",
    )
    parser.add_argument(
        "--estimate",
        metavar="MODEL",
        help="measure nothing: reckon memory and speed on GPUs; for its own options: --estimate MODEL --help",
    )
    parser.add_argument("--plot", type=not_empty, metavar="FILE", help="draw tokens/s against the context (.png, .svg)")
    add_model_options(parser)
    return parser


def _lengths_within(
    context: int, given: Sequence[int] | None, usual: Sequence[int], option: str, more: int
) -> list[int]:
    """The lengths given, else those of the usual ones that leave room for `more` tokens in the model's context."""
    if given and max(given) + more > context:
        raise UserError(f"{option} {max(given)}: with the new tokens that is beyond the model's context of {context}")
    lengths = sorted(set(given or [length for length in usual if length + more <= context]))
    if not lengths:
        raise UserError(f"the model's context of {context} is short; give {option} and fewer --new-tokens")
    return lengths


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Runs the tool; -> exit status."""
    if any(argument.partition("=")[0] == "--estimate" for argument in arguments):
        return run_estimate(arguments)
    options = build_parser().parse_args(arguments)
    if options.make_synthetic:
        size, *folder = options.make_synthetic
        if size not in SYNTHETIC:
            raise UserError(f"--make-synthetic {size}: there is no such size; choose from {', '.join(SYNTHETIC)}")
        if len(folder) > 1:
            raise UserError(f"--make-synthetic {size} {' '.join(folder)}: these are several folders; name one")
        if folder:
            make_synthetic(size, Path(folder[0]), Path(options.tokenizer) if options.tokenizer else None, options.seed)
            return 0
    if options.taps:
        return _measure_taps(options)
    if options.plot:
        check_picture(Path(options.plot))
    chosen = _choose(options)
    limit = chosen.checkpoint.params.max_seq_len
    new_tokens = options.new_tokens or (4 if chosen.device.type == "cpu" else 64)
    more = new_tokens + 1
    prefill = _lengths_within(limit, options.prefill, _PREFILL, "--prefill", more)
    usual = _PLOTTED if options.plot else prefill[:1]
    contexts = _lengths_within(limit, options.contexts, usual, "--contexts", more)
    longest = longest_text(prefill, contexts, new_tokens)
    lengths = Lengths(prompt=prefill[-1], text=longest, least=longest, rows=options.batch or 1)
    check_peers(chosen, lengths, options.vs)
    model, ops, which = _load(chosen, lengths)
    with open_peers(options.vs, chosen, model, options.gguf, longest) as peers:
        print(f"llama3_raw: {which}", file=sys.stderr)
        if options.batch:
            peers.append(Batch(model, options.batch, longest, ops))
        figures = measure(model, prefill, contexts, new_tokens, options.rounds, peers, ops, options.max_ram is None)
    show(figures, time_start(chosen, prefill[0]) if chosen.random_seed is None else None)
    if options.plot:
        dtype = in_words(model.weights.norm.dtype)
        where = f"{figures.threads} threads" if figures.device == "cpu" else figures.device
        draw(
            figures, Path(options.plot), f"{chosen.folder.path.name}, {model.params.n_layers} layers, {dtype}, {where}"
        )
    return 0


def _choose(options: argparse.Namespace) -> ChosenModel:
    """The model in the folder that the options name, or the one of --make-synthetic, which has no folder."""
    if not options.make_synthetic:
        return choose_model(options, needs_tokenizer=False)
    size = options.make_synthetic[0]
    for option in ("weights", "tokenizer", "gpu_layers", "max_ram", "gguf"):
        if getattr(options, option):
            raise UserError(_needs_files(size, f"--{option.replace('_', '-')}"))
    if LLAMA_CPP in options.vs:
        raise UserError(_needs_files(size, f"--vs {LLAMA_CPP}"))
    set_threads(options.threads)
    checkpoint = synthetic_checkpoint(size)
    if options.layers is not None:
        checkpoint = first_layers(checkpoint, options.layers)
    named = ModelFolder(Path(size), "random weights")  # no folder, but a name for what is printed
    device, dtype = choose_device(options.device), DTYPES_BY_NAME.get(options.dtype)
    quantized = options.quantize is not None
    if quantized:
        check_int8(quantized, device, dtype or checkpoint.dtype)
    return ChosenModel(named, checkpoint, None, device, dtype, None, quantized, random_seed=options.seed)


def _needs_files(size: str, option: str) -> str:
    return (
        f"{option} is about a model in files, and --make-synthetic {size} without a folder makes none; leave it out, "
        f"or write the model first: --make-synthetic {size} FOLDER"
    )


def _load(chosen: ChosenModel, lengths: Lengths) -> tuple[Model, Ops, str]:
    """What `load_model` gives; a model without files is made instead. Raises UserError where it does not fit."""
    checkpoint, device, dtype, quantized = chosen.checkpoint, chosen.device, chosen.dtype, chosen.quantized
    if chosen.random_seed is None:
        return load_model(chosen, lengths)
    check_memory(Plan(checkpoint, device, dtype, lengths, quantized=quantized, made=True))
    weights = random_weights(checkpoint, device, dtype, chosen.random_seed, quantized)
    which = f"{checkpoint.source} ({chosen.folder.why}) on {device}"
    return Model(weights, checkpoint.params, None), suitable_ops(device), which


def _measure_taps(options: argparse.Namespace) -> int:
    for option in ("prefill", "contexts", "vs", "batch", "gguf", "plot", "max_ram", "gpu_layers"):
        if getattr(options, option):
            raise UserError(f"--taps measures something else; leave --{option.replace('_', '-')} out")
    chosen = _choose(options)
    model, ops, which = _load(chosen, Lengths(prompt=LENGTH, text=LENGTH + 1, least=LENGTH + 1, scored=LENGTH))
    print(f"llama3_raw: {which}", file=sys.stderr)
    show_taps(measure_taps(model, ops, options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
