"""python -m llama3_raw.bench: measure how fast a model runs, as parser.py says."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..cli.entry_point import answer_help
from .parser import PLOTTED, build_parser

answer_help(__name__, build_parser)

import torch

from ..backends.choose import suitable_ops
from ..checkpoint.checkpoint import first_layers
from ..cli.entry_point import command_line_tool
from ..cli.memory_plan import MemoryPlan, RunShape, check_memory
from ..cli.models import (
    DTYPES_BY_NAME,
    REPACK_FROM,
    ChosenModel,
    ModelFolder,
    check_fast,
    choose_device,
    choose_model,
    load_model,
)
from ..errors import UserError, in_short, needed_package
from ..ops import Ops
from ..system.files import atomic_write
from ..system.machine import set_threads
from ..weights import Model, dtype_name
from .baselines import check_baselines, open_baselines
from .engines import Batch
from .estimate import run_estimate
from .llama_cpp import is_llama_cpp
from .measure import Figures, longest_text, measure
from .synthetic import SYNTHETIC, make_synthetic, random_weights, synthetic_checkpoint
from .tap_overhead import LENGTH, TapFigures, measure_taps

_PREFILL = (17, 256, 2048)


@dataclass(frozen=True)
class Startup:
    """A run of `python -m llama3_raw` with a short prompt, from the start of the process to its first token."""

    start_to_first_token_seconds: float
    load_seconds: float  # part of the total; includes a look at all weights, if there is a GB of them
    first_pass_seconds: float  # part of the total
    peak_ram_bytes: int | None


def time_startup(chosen: ChosenModel, prompt_length: int) -> Startup:
    """Run the main command once, as a user would, and measure the time until it prints a token.

    The weights should be in the page cache already.
    """
    params = chosen.checkpoint.params
    command = [sys.executable, "-m", "llama3_raw", "--ids", "--max-new-tokens=1", "--stats=json"]
    command += [f"--weights={chosen.folder.path}", f"--device={chosen.device}", f"--layers={params.n_layers}"]
    command += [f"--threads={torch.get_num_threads()}"]
    if chosen.quantize is not None:
        command += [f"--quantize={chosen.quantize}"]
    if chosen.gpu_layers is not None:
        command += [f"--gpu-layers={chosen.gpu_layers}"]
    if chosen.max_ram is not None:
        command += [f"--max-ram={chosen.max_ram / 1e9}GB"]
    if chosen.dtype is not None:
        command += [f"--dtype={str(chosen.dtype).removeprefix('torch.')}"]
    return run_to_first_token(command, [token % params.vocab_size for token in range(prompt_length)])


def run_to_first_token(command: Sequence[str], ids: Sequence[int]) -> Startup:
    """Run a command that takes the prompt from stdin, with --ids and --stats=json. Raises UserError if it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as prompt:  # a long prompt would be refused as an argument
        prompt.write(" ".join(map(str, ids)))
        prompt.seek(0)
        with subprocess.Popen(
            [*command, "-"], stdin=prompt, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            seconds = time.perf_counter() - start
            _, stderr = process.communicate()
    if process.returncode:
        raise UserError(f"python -m llama3_raw failed: {in_short(stderr[-200:])}")
    stats = json.loads(next(line for line in stderr.splitlines() if line.startswith("{")))
    return Startup(seconds, stats["load_seconds"], stats["seconds_to_first_token"], stats["peak_ram_bytes"])


def show(figures: Figures, startup: Startup | None) -> None:
    """Print a table, then the same as JSON on the last line. startup: None if there are no files to start from."""
    for length, speed in figures.prefill_tokens_per_second.items():
        _line(f"prefill {length:>5} tokens", f"{speed:10.1f} tokens/s")
    for context, speed in figures.decode_tokens_per_second_by_context.items():
        _line(f"decode at context {context:>5}", f"{speed:10.2f} tokens/s")
    _line("weights read by decode", f"{figures.decode_gb_per_second:10.1f} GB/s")
    _show_roofline(figures)
    if startup:
        _line("start to first token", f"{startup.start_to_first_token_seconds:10.2f} s")
        _line("  of which loading", f"{startup.load_seconds:10.2f} s")
        _line("  of which first pass", f"{startup.first_pass_seconds:10.2f} s")
    if startup and startup.peak_ram_bytes:
        _line("peak memory", f"{startup.peak_ram_bytes / 1e9:10.2f} GB")
    for baseline in figures.vs.values():
        print(f"\ncompared with {baseline.version}; ratio of llama3_raw to it: median (each round)")
        if baseline.weights_bytes_per_token:
            read = f"{baseline.weights_bytes_per_token / 1e9:10.2f} GB a token, llama3_raw"
            _line("weights", f"{read} {figures.weights_bytes_per_token / 1e9:.2f} GB")
        for length, speed in baseline.prefill_tokens_per_second.items():
            ratios = _ratios_text(baseline.prefill_ratio[length], baseline.prefill_ratios[length])
            _line(f"prefill {length:>5} tokens", f"{speed:10.1f} tokens/s   {ratios}")
        for context, speed in baseline.decode_tokens_per_second.items():
            ratios = _ratios_text(baseline.decode_ratio[context], baseline.decode_ratios[context])
            _line(f"decode at context {context:>5}", f"{speed:10.2f} tokens/s   {ratios}")
    print(json.dumps(asdict(figures) | (asdict(startup) if startup else {})))


def _show_roofline(figures: Figures) -> None:
    """Print what the machine can do at most, as far as it was measured, and the share that was reached."""
    if figures.read_loop_gb_per_second and figures.decode_share_of_read_loop:
        _line("loop that only reads", f"{figures.read_loop_gb_per_second:10.1f} GB/s")
        _line("share of it", f"{figures.decode_share_of_read_loop:10.1%}")
    if figures.copy_gb_per_second and figures.decode_share_of_copy:
        _line("copy, reads and writes", f"{figures.copy_gb_per_second:10.1f} GB/s")
        _line("share of it", f"{figures.decode_share_of_copy:10.1%}")
    if figures.matmul_tflop_per_second and figures.prefill_share_of_matmul:
        _line("large matrix product", f"{figures.matmul_tflop_per_second:10.1f} TFLOP/s")
        for length, share in figures.prefill_share_of_matmul.items():
            _line(f"share of it, {length:>5} tokens", f"{share:10.1%}")


def _line(name: str, value: str) -> None:
    print(f"{name:<26}{value}")


def show_taps(figures: TapFigures) -> None:
    """Print a table, then the same as JSON on the last line."""
    for name, cost in (
        (f"default tap, {LENGTH} tokens", figures.default_tap_prompt),
        ("default tap, one token", figures.default_tap_token),
        (f"trace of {LENGTH} tokens", figures.trace),
    ):
        each = " ".join(f"{ratio:.3f}" for ratio in cost.ratios)
        print(f"{name:<30}{cost.ratio:.4f} times as long as {cost.plain_seconds:.4f} s without  ({each})")
    print(f"size of the trace             {figures.trace_bytes / 1e6:.1f} MB")
    microseconds = figures.default_tap_seconds * 1e6
    print(f"all calls of the default tap  {microseconds:.0f} microseconds in a pass over one token")
    print(json.dumps(asdict(figures)))


def _ratios_text(median: float, ratios: Sequence[float]) -> str:
    return f"{median:.2f}  ({' '.join(f'{ratio:.2f}' for ratio in ratios)})"


def check_plot_file(file: Path) -> None:
    """Raise UserError if matplotlib is missing, or cannot write this file."""
    needed_package("matplotlib", "--plot")
    from matplotlib.figure import Figure

    if file.suffix[1:] not in Figure().canvas.get_supported_filetypes():
        raise UserError(f"--plot {file}: the name should end in .png or .svg")
    if not file.parent.is_dir():
        raise UserError(f"--plot {file}: there is no folder {file.parent}; create it first")


def plot(figures: Figures, file: Path, title: str) -> None:
    """Plot the speed of decoding against the context. The suffix of the file selects the format.

    The file must have passed `check_plot_file`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    this_engine = figures.decode_tokens_per_second_by_context
    speeds = {"llama3_raw": this_engine}
    speeds |= {name: baseline.decode_tokens_per_second for name, baseline in figures.vs.items()}
    contexts = list(this_engine)
    memory_gb_per_second = figures.read_loop_gb_per_second or figures.copy_gb_per_second
    if memory_gb_per_second:
        roofline = [
            memory_gb_per_second * 1e9 / (figures.weights_bytes_per_token + context * figures.cache_bytes_per_token)
            for context in contexts
        ]
        axes.plot(contexts, roofline, "--", color="0.5", label="roofline: reading weights and cache once per token")
    for name, by_context in speeds.items():
        axes.plot(list(by_context), list(by_context.values()), "o-", label=name)
    axes.set(title=title, xlabel="tokens in the context", ylabel="tokens/s", xticks=contexts)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_write(file) as part:
        figure.savefig(part, dpi=150)


def _lengths_within(
    context: int, given: Sequence[int] | None, default: Sequence[int], option: str, new_tokens: int
) -> list[int]:
    """Return the given lengths, or those of the default that leave space for the new tokens in the model's context."""
    if given and max(given) + new_tokens > context:
        raise UserError(f"{option} {max(given)}: with the new tokens, that exceeds the model's context of {context}")
    lengths = sorted(set(given or [length for length in default if length + new_tokens <= context]))
    if not lengths:
        raise UserError(
            f"the model's context of {context} is too short for the default lengths; give {option} and fewer "
            "--new-tokens"
        )
    return lengths


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    if any(argument.partition("=")[0] == "--estimate" for argument in arguments):
        return run_estimate(arguments)
    options = build_parser().parse_args(arguments)
    if options.make_synthetic:
        size, *folder = options.make_synthetic
        if size not in SYNTHETIC:
            raise UserError(f"--make-synthetic {size}: there is no such size; choose from {', '.join(SYNTHETIC)}")
        if len(folder) > 1:
            raise UserError(f"--make-synthetic {size} {' '.join(folder)}: these are several folders; give one")
        if folder:
            make_synthetic(size, Path(folder[0]), Path(options.tokenizer) if options.tokenizer else None, options.seed)
            return 0
    if options.taps:
        return _measure_taps(options)
    with _ended_by_sigterm():
        return _measure(options)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM stop the block as Ctrl-C does, so that it shows what it has and removes its files; then end by it."""
    received = False

    def stop(*_: object) -> None:
        nonlocal received
        received = True
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        if received:
            sys.stdout.flush()
            signal.raise_signal(signal.SIGTERM)


def _measure(options: argparse.Namespace) -> int:
    """Measure the model and its baselines. Raises KeyboardInterrupt after showing what a stopped run has measured."""
    if options.plot:
        check_plot_file(Path(options.plot))
    chosen = _choose(options)
    max_context = chosen.checkpoint.params.max_seq_len
    new_tokens = options.new_tokens or (4 if chosen.device.type == "cpu" else 64)
    prefill = _lengths_within(max_context, options.prefill, _PREFILL, "--prefill", new_tokens + 1)
    default = PLOTTED if options.plot else prefill[:1]
    contexts = _lengths_within(max_context, options.contexts, default, "--contexts", new_tokens + 1)
    longest = longest_text(prefill, contexts, new_tokens)
    shape = RunShape(prompt=prefill[-1], text=longest, least=longest, rows=options.batch or 1)
    check_baselines(chosen, shape, options.vs)
    model, ops, description = _load(chosen, shape)
    with open_baselines(options.vs, chosen, model, options.gguf, longest) as baselines:
        print(f"llama3_raw: {description}", file=sys.stderr)
        if options.batch:
            baselines.append(Batch(model, options.batch, longest, ops))
        figures = measure(model, prefill, contexts, new_tokens, options.rounds, baselines, ops, options.max_ram is None)
    stopped = figures.rounds < options.rounds
    if stopped:
        print(f"llama3_raw: stopped; {figures.rounds} of {options.rounds} rounds are complete", file=sys.stderr)
    has_files = chosen.random_seed is None
    show(figures, time_startup(chosen, prefill[0]) if has_files and not stopped else None)
    if options.plot:
        dtype = dtype_name(model.weights.norm.dtype)
        where = f"{figures.threads} threads" if figures.device == "cpu" else figures.device
        plot(
            figures, Path(options.plot), f"{chosen.folder.path.name}, {model.params.n_layers} layers, {dtype}, {where}"
        )
    if stopped:
        raise KeyboardInterrupt
    return 0


def _choose(options: argparse.Namespace) -> ChosenModel:
    """Return the model in the folder that the options name, or that of --make-synthetic, which has no folder."""
    if not options.make_synthetic:
        return choose_model(options, needs_tokenizer=False)
    size = options.make_synthetic[0]
    for option in ("weights", "tokenizer", "gpu_layers", "max_ram", "gguf"):
        if getattr(options, option):
            raise UserError(_needs_files(size, f"--{option.replace('_', '-')}"))
    for name in filter(is_llama_cpp, options.vs):
        raise UserError(_needs_files(size, f"--vs {name}"))
    set_threads(options.threads)
    checkpoint = synthetic_checkpoint(size)
    if options.layers is not None:
        checkpoint = first_layers(checkpoint, options.layers)
    folder = ModelFolder(Path(size), "random weights")  # not a folder, but a name to print
    device, dtype = choose_device(options.device), DTYPES_BY_NAME.get(options.dtype)
    check_fast(checkpoint, options.quantize, device, dtype)
    return ChosenModel(folder, checkpoint, None, device, dtype, None, options.quantize, random_seed=options.seed)


def _needs_files(size: str, option: str) -> str:
    return (
        f"{option} needs a model in files, and --make-synthetic {size} without a FOLDER writes none; leave it out, "
        f"or write the model first: --make-synthetic {size} FOLDER"
    )


def _load(chosen: ChosenModel, shape: RunShape) -> tuple[Model, Ops, str]:
    """Do what `load_model` does; a model without files is created instead. Raises UserError if it does not fit."""
    checkpoint, device, dtype, quantize = chosen.checkpoint, chosen.device, chosen.dtype, chosen.quantize
    if chosen.random_seed is None:
        return load_model(chosen, shape._replace(generated=REPACK_FROM))  # as for a long text: blocks are repacked
    check_memory(MemoryPlan(checkpoint, device, dtype, shape, quantize=quantize, made=True))
    weights = random_weights(checkpoint, device, dtype, chosen.random_seed, quantize)
    description = f"{checkpoint.source} ({chosen.folder.why}) on {device}"
    return Model(weights, checkpoint.params, None), suitable_ops(device), description


def _measure_taps(options: argparse.Namespace) -> int:
    for option in ("prefill", "contexts", "vs", "batch", "gguf", "plot", "max_ram", "gpu_layers"):
        if getattr(options, option):
            raise UserError(f"--taps measures something else; leave --{option.replace('_', '-')} out")
    chosen = _choose(options)
    shape = RunShape(prompt=LENGTH, text=LENGTH + 1, least=LENGTH + 1, scored=LENGTH)
    model, ops, description = _load(chosen, shape)
    print(f"llama3_raw: {description}", file=sys.stderr)
    show_taps(measure_taps(model, ops, options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
