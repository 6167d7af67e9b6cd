"""python -m llama3_raw PROMPT: the prompt's continuation on stdout, everything else on stderr."""

from __future__ import annotations

import argparse
import io
import json
import secrets
import sys
import time
from bdb import BdbQuit
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .chat.dialog import Message, encode_dialog, warn_of_base_model
from .checkpoint.writing import save_quantized
from .cli.entry_point import ArgumentParser, command_line_tool, for_several_processes, not_empty
from .cli.memory_plan import Lengths
from .cli.models import choose_device, choose_model, load_model
from .cli.options import (
    add_compile_option,
    add_lookup_option,
    add_model_options,
    add_sampling_options,
    check_context,
    chosen_sampling,
    parse_ids,
    positive_int,
    read_prompt,
)
from .decoding.loop import StopReason, generate
from .decoding.prompt_lookup import LookupPolicy
from .errors import UserError
from .ops import Tap
from .quantization.int8 import Int8
from .system.machine import peak_memory
from .system.process_groups import Ranks, init
from .tokenizer import Tokenizer
from .tracing.debugger import break_at
from .tracing.taps import chain, check_names
from .weights import Model, in_words


def build_parser() -> ArgumentParser:
    """The options of `python -m llama3_raw`."""
    parser = ArgumentParser(
        prog="python -m llama3_raw",
        description="Continues a text with a Llama 3 model. The continuation goes to stdout, all else to stderr.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            '  python -m llama3_raw "Once upon a time"\n'
            '  python -m llama3_raw "Once upon a time" --temperature 0.8 --top-p 0.9 --seed 1\n'
            '  python -m llama3_raw --weights weights/Meta-Llama-3-8B --stats "The capital of France is"\n'
            '  python -m llama3_raw --ids "128000 1820 4320" --weights weights/Meta-Llama-3-8B\n'
            '  python -m llama3_raw --chat "Why is the sky blue?" --weights weights/Meta-Llama-3-8B-Instruct\n'
            "  cat prompt.txt | python -m llama3_raw -\n"
            '  torchrun --nproc-per-node 2 -m llama3_raw "Once upon a time"'
        ),
    )
    parser.add_argument("prompt", nargs="?", help="the text to continue; - reads it from stdin")
    parser.add_argument("--version", action="version", version=f"llama3_raw {version('llama3_raw')}")
    group = parser.add_argument_group("text")
    group.add_argument(
        "--ids",
        action="store_true",
        help="the prompt is token ids, and so is what is printed; needs no tokenizer (where there is none, no token "
        "ends the text)",
    )
    group.add_argument(
        "--chat", action="store_true", help="the prompt is a question, in the dialog format of an Instruct model"
    )
    group.add_argument("--system", metavar="TEXT", help="with --chat: the system message before it")
    group.add_argument(
        "--special", action="store_true", help="names such as <|eot_id|> in the prompt are special tokens"
    )
    group.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="stop after N tokens (default: %(default)s)"
    )
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop before TEXT (may be repeated)")
    group.add_argument("--context", type=positive_int, metavar="N", help="the most tokens, prompt included")
    add_lookup_option(group)
    add_sampling_options(parser)
    add_model_options(parser)
    parser.add_argument(
        "--save-quantized",
        type=not_empty,
        metavar="FOLDER",
        help="write the model with its matrices in int8 into a new folder, from where it is mapped, and end",
    )
    group = parser.add_argument_group("looking on")
    group.add_argument("--reference", action="store_true", help="the exact operations, bit for bit Meta's, but slower")
    group.add_argument(
        "--break",
        dest="break_at",
        action="append",
        default=[],
        type=not_empty,
        metavar="NAME",
        help="stop in pdb, in model.py, where the tensor of this name was just made: layers.0.attention.scores, say, "
        "or with * ? [0-9] as in a shell (may be repeated; implies --reference). It stops at each pass, thus for each "
        "token: --max-new-tokens 1 has it stop over the prompt only. $PYTHONBREAKPOINT names another debugger",
    )
    add_compile_option(group)
    group.add_argument("--top", type=positive_int, metavar="N", help="show the N likeliest next tokens at each step")
    group.add_argument(
        "--stats", choices=("text", "json"), help="speed and memory on stderr; --stats alone is --stats text"
    )
    return parser


def _with_plain_stats(arguments: Sequence[str]) -> list[str]:
    """A bare --stats becomes --stats=text, since argparse would take the prompt behind it for its value."""
    plain = list(arguments)
    options = plain[: plain.index("--")] if "--" in plain else plain
    for i, argument in enumerate(options):
        if argument == "--stats" and plain[i + 1 : i + 2] not in (["text"], ["json"]):
            plain[i] = "--stats=text"
    return plain


@command_line_tool
@for_several_processes
def main(arguments: Sequence[str]) -> int:
    """Runs the tool; -> exit status."""
    options = build_parser().parse_args(_with_plain_stats(arguments))
    if options.save_quantized:
        return _save_quantized(options)
    with init(lambda: choose_device(options.device)) as ranks:
        return _continue(options, ranks)


def _continue(options: argparse.Namespace, ranks: Ranks | None) -> int:
    """Continue the prompt; with `ranks` as one of several processes, which all do the same with their part."""
    _check_options(options, ranks)
    prompt = _shared_prompt(options, ranks)
    sampling = chosen_sampling(options)  # complains of what is out of range now, not after a long load
    lookup = LookupPolicy(options.lookup)
    load_start = time.perf_counter()
    chosen = choose_model(options, needs_tokenizer=not options.ids)
    longest = chosen.checkpoint.params.max_seq_len
    check_context(options.context, longest)
    if options.break_at:
        check_names(chosen.checkpoint.params, *options.break_at)
    ids = _prompt_ids(options, chosen.tokenizer, prompt)
    text_length = min(options.context or longest, len(ids) + options.max_new_tokens)
    lengths = Lengths(prompt=len(ids), text=text_length, least=len(ids) + 1)
    model, ops, which = load_model(chosen, lengths, options.reference or bool(options.break_at), ranks)
    load_seconds = time.perf_counter() - load_start

    watch = _Watch(options.top, chosen.tokenizer, lookup)
    tokens = generate(
        model,
        ids,
        max_new_tokens=options.max_new_tokens,
        **asdict(sampling),
        seed=options.seed,
        context=options.context,
        lookup=lookup,
        ops=ops._replace(can_capture=ops.can_capture and not options.no_compile),
        tap=_chosen_tap(options, watch),
    )
    print(f"llama3_raw: {which}", file=sys.stderr)
    if options.chat:
        warn_of_base_model(model)
    generated = watch.over(tokens)
    if chosen.tokenizer is None or options.ids:
        pieces: Iterator[str] = (f"{' ' if i else ''}{token}" for i, token in enumerate(generated))
    else:
        pieces = chosen.tokenizer.stream(generated, options.stop)
    stopped_by = _print_text(pieces, options)
    print(f"llama3_raw: {_why_it_stopped(watch, options, stopped_by)}", file=sys.stderr)
    if options.stats:
        stats = _stats(model, len(ids), watch, ranks.size if ranks else 1)
        _print_stats(options.stats, stats | {"load_seconds": round(load_seconds, 3)})
    return 130 if stopped_by else 0


def _check_options(options: argparse.Namespace, ranks: Ranks | None) -> None:
    """Raise UserError for options that contradict each other."""
    for option in ("break_at", "lookup") if ranks else ():
        if getattr(options, option):
            raise UserError(f"--{option.removesuffix('_at')} is for one process; leave it out, or run without torchrun")
    if options.break_at and (options.prompt == "-" or sys.stdin is None):
        raise UserError("--break: stdin is for the debugger; give the prompt as an argument, and leave stdin open")
    if options.ids and options.stop:
        raise UserError("--stop needs text, and --ids has none; leave one of them out")
    if options.chat and (options.ids or options.special):
        raise UserError(f"--chat asks in plain text; leave {'--ids' if options.ids else '--special'} out")
    if options.system and not options.chat:
        raise UserError("--system belongs to a question; give --chat with it")
    if "" in options.stop:
        raise UserError("--stop should not be empty")
    if options.max_new_tokens < 0:
        raise UserError(f"--max-new-tokens should be 0 or more, is {options.max_new_tokens}")


def _shared_prompt(options: argparse.Namespace, ranks: Ranks | None) -> str:
    """The prompt, the same in all processes, which also get the same seed: stdin, and chance, are there once."""
    prompt = read_prompt(options.prompt, "python -m llama3_raw") if ranks is None or ranks.rank == 0 else ""
    if ranks is not None:
        seed = secrets.randbits(63) if options.seed is None else options.seed
        prompt, options.seed = ranks.tensor.broadcast((prompt, seed))
    return prompt


def _prompt_ids(options: argparse.Namespace, tokenizer: Tokenizer | None, prompt: str) -> list[int]:
    """The prompt in tokens: as a question, as ids, or as text."""
    if options.ids:
        return parse_ids(prompt, "--ids")
    assert tokenizer is not None  # choose_model has seen to it
    if options.chat:
        system = [Message("system", options.system)] if options.system else []
        return encode_dialog(tokenizer, [*system, Message("user", prompt)])
    return tokenizer.encode(prompt, bos=True, allow_special=options.special)


def _chosen_tap(options: argparse.Namespace, watch: _Watch) -> Tap | None:
    """What --top and --break want to see; None if nothing does."""
    taps: list[Tap] = [watch.tap] if options.top else []
    if options.break_at:
        taps.append(break_at(*options.break_at))
    return chain(*taps) if taps else None


def _save_quantized(options: argparse.Namespace) -> int:
    if options.prompt or options.max_ram:
        raise UserError("--save-quantized only writes the model; leave the prompt and --max-ram out")
    if options.layers is not None:
        raise UserError("--save-quantized writes the whole model; leave --layers out")
    options.quantize = "int8"
    chosen = choose_model(options, needs_tokenizer=False)
    tokenizer_file = chosen.tokenizer.path if chosen.tokenizer else None
    folder = Path(options.save_quantized)
    save_quantized(chosen.folder.path, chosen.checkpoint, folder, tokenizer_file, chosen.dtype, progress=True)
    print(
        f"llama3_raw: {options.save_quantized} is written; run it with --weights {options.save_quantized}",
        file=sys.stderr,
    )
    return 0


class _Watch:
    """Goes along with the tokens as they are generated: keeps the times and the reason why they end, shows --top."""

    def __init__(self, top: int | None, tokenizer: Tokenizer | None, lookup: LookupPolicy):
        self.top = top
        self.tokenizer = tokenizer
        self.lookup = lookup
        self.start = time.perf_counter()
        self.times: list[float] = []  # seconds from the start to each token
        self.reason: StopReason | None = None  # None: someone else stopped it
        self.passes = 0  # of the model between the first token and the last
        self.rows: Iterator[Tensor] = iter(())  # the logits [vocab] of the tokens to come, as far as they are computed

    def tap(self, name: str, tensor: Tensor) -> Tensor:
        """Keeps the logits; the tap of `forward`."""
        if name == "logits":
            self.rows = iter(tensor.reshape(-1, tensor.shape[-1]))
        return tensor

    def over(self, tokens: Generator[int, None, StopReason]) -> Iterator[int]:
        """The same tokens."""
        while True:
            try:
                token = next(tokens)
            except StopIteration as end:
                self.reason = end.value
                if self.reason is StopReason.END_TOKEN:
                    self._show_top(None)
                return
            self.times.append(time.perf_counter() - self.start)
            self.passes = self.lookup.passes
            self._show_top(token)
            yield token

    def _name(self, token: int) -> str:
        if self.tokenizer is None:
            return str(token)
        return repr(self.tokenizer.token_bytes(token).decode("utf-8", errors="backslashreplace"))

    def _show_top(self, token: int | None) -> None:
        if self.top is None:
            return
        logits = next(self.rows)
        probs, ids = logits.softmax(dim=-1).topk(min(self.top, len(logits)))
        likeliest = "  ".join(f"{self._name(i)} {p:.1%}" for i, p in zip(ids.tolist(), probs.tolist(), strict=True))
        taken = "(end)" if token is None else self._name(token)
        print(f"{len(self.times):4d}  {taken:<16} <- {likeliest}", file=sys.stderr)


def _print_text(pieces: Iterator[str], options: argparse.Namespace) -> str | None:
    """Prints the pieces as they come, or in the end where others would tear them; -> what the user stopped it by."""
    hold = bool(options.top or options.break_at) and sys.stdout.isatty()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character gets a "?"
    held: list[str] = []
    stopped_by = None
    try:
        for piece in pieces:
            held.append(piece)
            if not hold:
                print(held.pop(), end="", flush=True)
    except KeyboardInterrupt:
        stopped_by = "Ctrl-C"
    except BdbQuit:
        if not options.break_at:
            raise  # python -m pdb waits for it
        stopped_by = "q in the debugger"
    print("".join(held), end="\n" if sys.stdout.isatty() else "", flush=True)
    return stopped_by


def _why_it_stopped(watch: _Watch, options: argparse.Namespace, stopped_by: str | None) -> str:
    count = f"{len(watch.times)} new token{'s' if len(watch.times) != 1 else ''}"
    if stopped_by:
        return f"stopped by {stopped_by} after {count}"
    if watch.reason is StopReason.MAX_NEW_TOKENS:
        return f"stopped after {count}, the most that --max-new-tokens allows"
    if watch.reason is StopReason.CONTEXT:
        limit = "--context allows" if options.context else "the model's context holds"
        return f"stopped after {count}: prompt and text together are as long as {limit}"
    if watch.reason is StopReason.END_TOKEN:
        return f"the model ended the text after {count}"
    return f"stopped after {count} at a --stop text"


def _stats(model: Model, prompt_tokens: int, watch: _Watch, processes: int) -> dict[str, Any]:
    """What --stats shows, by name."""
    weights = model.weights
    per_pass = processes * (
        sum(t.nbytes for layer in weights.layers for t in layer) + weights.norm.nbytes + weights.output.nbytes
    )
    times = watch.times
    seconds = times[-1] - times[0] if len(times) > 1 else None
    tokens_per_second = seconds and (len(times) - 1) / seconds
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(times),
        "load_seconds": None,
        "seconds_to_first_token": round(times[0], 3) if times else None,
        "tokens_per_second": tokens_per_second and round(tokens_per_second, 3),
        "passes": watch.passes,
        "tokens_proposed": watch.lookup.proposed,
        "tokens_accepted": watch.lookup.accepted,
        "weights_gb_per_second": seconds and round(watch.passes * per_pass / seconds / 1e9, 3),
        "peak_ram_bytes": peak_memory(),
        "device": str(weights.norm.device),
        "dtype": in_words(weights.norm.dtype),
        "matrices": "int8" if isinstance(weights.output, Int8) else in_words(weights.output.dtype),
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def _print_stats(style: str, stats: dict[str, Any]) -> None:
    if style == "json":
        print(json.dumps(stats), file=sys.stderr)
        return
    for name, value in stats.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        print(f"  {name.replace('_', ' '):<24}{shown}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
