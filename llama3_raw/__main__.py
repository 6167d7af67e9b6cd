"""python -m llama3_raw PROMPT: continue a text. The text goes to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from bdb import BdbQuit
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cli.entry_point import answer_help
from .cli.main_parser import build_parser

answer_help(__name__, build_parser)

import torch
from torch import Tensor

from .chat.dialog import DialogFormat, warn_of_base_model
from .chat.formats import format_of, note_format
from .checkpoint.writing import save_quantized
from .cli.drafts import choose_draft, load_draft
from .cli.entry_point import command_line_tool, for_several_processes
from .cli.memory_plan import RunShape
from .cli.models import ChosenModel, choose_device, choose_model, load_model
from .cli.options import (
    check_context,
    chosen_sampling,
    chosen_stop_ids,
    parse_ids,
    read_prompt,
    read_text,
)
from .decoding.calibration import calibrated_layers
from .decoding.draft_model import DraftModelPolicy
from .decoding.loop import StopReason, generate
from .decoding.prompt_lookup import LookupPolicy
from .errors import UserError
from .ops import Tap
from .quantization.matrix import Quantized
from .system.machine import peak_memory
from .system.process_groups import Ranks, init
from .tokenizer import Tokenizer
from .tracing.debugger import break_at
from .tracing.taps import chain, check_names
from .weights import Model, dtype_name, format_name

FIRST_STEPS = """\
  python -m llama3_raw "Once upon a time"                  continue a text with the built-in model
  python -m llama3_raw.explain "Once upon a time"          follow it to the next token on a page
  python -m llama3_raw.download --list                     the models that can be downloaded"""


def _with_plain_stats(arguments: Sequence[str]) -> list[str]:
    """Turn a bare --stats into --stats=text, because argparse would read the prompt after it as its value."""
    plain = list(arguments)
    options = plain[: plain.index("--")] if "--" in plain else plain
    for i, argument in enumerate(options):
        if argument == "--stats" and plain[i + 1 : i + 2] not in (["text"], ["json"]):
            plain[i] = "--stats=text"
    return plain


@command_line_tool
@for_several_processes
def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    if not arguments:
        print(f"llama3_raw: no prompt. Try one of these, or --help:\n{FIRST_STEPS}", file=sys.stderr)
        return 2
    options = build_parser().parse_args(_with_plain_stats(arguments))
    if options.save_quantized:
        return _save_quantized(options)
    if options.calibrate is not None:
        raise UserError("--calibrate belongs to --save-quantized FOLDER; give that with it")
    with init(lambda: choose_device(options.device)) as ranks:
        status = _continue(options, ranks)
        if status and ranks:
            sys.exit(status)  # after Ctrl-C the others may be in the middle of a pass: do not wait for them
        return status


def _continue(options: argparse.Namespace, ranks: Ranks | None) -> int:
    """Continue the prompt; with `ranks` as one of several processes, each with its shard of the model."""
    _check_options(options, ranks)
    prompt = _shared_prompt(options, ranks)
    sampling = chosen_sampling(options)  # before a long load, so that a wrong value is reported at once
    lookup = LookupPolicy(options.lookup)
    load_start = time.perf_counter()
    chosen = choose_model(options, needs_tokenizer=not options.ids)
    longest = chosen.checkpoint.params.max_seq_len
    check_context(options.context, longest)
    if options.break_at:
        check_names(chosen.checkpoint.params, *options.break_at)
    dialog_format = format_of(chosen.tokenizer, options.template) if options.chat and chosen.tokenizer else None
    ids = _prompt_ids(options, chosen.tokenizer, prompt, dialog_format)
    stop_ids = chosen.stop_ids | chosen_stop_ids(options, chosen.tokenizer, chosen.checkpoint.params.vocab_size)
    text_length = min(options.context or longest, len(ids) + options.max_new_tokens)
    shape = RunShape(len(ids), text_length, least=len(ids) + 1, generated=text_length - len(ids))
    chosen_draft = choose_draft(options, chosen, shape)
    is_exact = options.reference or bool(options.break_at)
    if is_exact and options.repack:
        raise UserError("--repack is for the CPU's kernels; leave it, or --reference and --break, out")
    model, ops, which = load_model(chosen, shape, is_exact, ranks)
    draft = load_draft(chosen_draft, model, shape, captured=not options.no_compile)
    load_seconds = time.perf_counter() - load_start

    watch = _Watch(options.top, chosen.tokenizer, draft.policy if draft else lookup)
    tokens = generate(
        model,
        ids,
        max_new_tokens=options.max_new_tokens,
        **asdict(sampling),
        seed=options.seed,
        stop_ids=stop_ids | (dialog_format.stop_ids if dialog_format else frozenset()),
        context=options.context,
        lookup=lookup,
        draft=draft,
        ops=ops._replace(can_capture=ops.can_capture and not options.no_compile),
        tap=_chosen_tap(options, watch),
    )
    print(f"llama3_raw: {which}", file=sys.stderr)
    if dialog_format is not None:
        note_format(dialog_format)
        warn_of_base_model(model)
    generated = watch.over(tokens)
    if chosen.tokenizer is None or options.ids:
        pieces: Iterator[str] = (f"{' ' if i else ''}{token}" for i, token in enumerate(generated))
    else:
        pieces = chosen.tokenizer.stream(generated, options.stop)
    stopped_by = _print_text(pieces, options)
    print(f"llama3_raw: {_why_it_stopped(watch, options, stopped_by)}", file=sys.stderr)
    if options.stats:
        _print_stats(options.stats, _stats(model, len(ids), load_seconds, watch, ranks.size if ranks else 1))
    return 130 if stopped_by else 0


def _check_options(options: argparse.Namespace, ranks: Ranks | None) -> None:
    """Raise UserError for options that contradict each other."""
    for option in ("break_at", "lookup", "draft") if ranks else ():
        if getattr(options, option):
            raise UserError(f"--{option.removesuffix('_at')} is for one process; leave it out, or run without torchrun")
    if options.break_at and (options.prompt == "-" or sys.stdin is None):
        raise UserError("--break: stdin is for the debugger; give the prompt as an argument, and leave stdin open")
    if options.ids and options.stop:
        raise UserError("--stop needs text, and --ids has none; leave one of them out")
    if options.chat and (options.ids or options.special):
        raise UserError(f"--chat asks in plain text; leave {'--ids' if options.ids else '--special'} out")
    for option in ("system", "template"):
        if getattr(options, option) and not options.chat:
            raise UserError(f"--{option} belongs to a question; give --chat with it")
    if "" in options.stop:
        raise UserError("--stop should not be empty")
    if options.max_new_tokens < 0:
        raise UserError(f"--max-new-tokens should be 0 or more, is {options.max_new_tokens}")


def _shared_prompt(options: argparse.Namespace, ranks: Ranks | None) -> str:
    """Return the prompt on every rank, and set the same seed: only rank 0 reads stdin and picks a seed."""
    prompt = read_prompt(options.prompt, "python -m llama3_raw") if ranks is None or ranks.rank == 0 else ""
    if ranks is not None:
        seed = secrets.randbits(63) if options.seed is None else options.seed
        prompt, options.seed = ranks.tensor.broadcast((prompt, seed))
    return prompt


def _prompt_ids(
    options: argparse.Namespace, tokenizer: Tokenizer | None, prompt: str, dialog_format: DialogFormat | None
) -> list[int]:
    """Return the prompt's token ids, from a question, ids or text."""
    if options.ids:
        return parse_ids(prompt, "--ids")
    assert tokenizer is not None  # checked by choose_model
    if dialog_format is not None:
        return dialog_format.prompt(options.system or "", (), prompt)
    return tokenizer.encode(prompt, bos=True, allow_special=options.special)


def _chosen_tap(options: argparse.Namespace, watch: _Watch) -> Tap | None:
    """Return the tap for --top and --break, or None without them."""
    taps: list[Tap] = [watch.tap] if options.top else []
    if options.break_at:
        taps.append(break_at(*options.break_at))
    return chain(*taps) if taps else None


def _save_quantized(options: argparse.Namespace) -> int:
    if options.prompt or options.max_ram:
        raise UserError("--save-quantized only writes the model; leave the prompt and --max-ram out")
    if options.layers is not None:
        raise UserError("--save-quantized writes the whole model; leave --layers out")
    options.quantize = options.quantize or "int8"
    chosen = choose_model(options, needs_tokenizer=False)
    tokenizer_file = chosen.tokenizer.path if chosen.tokenizer else None
    folder = Path(options.save_quantized)
    with _calibration(options, chosen, folder) as layers:
        save_quantized(
            *(chosen.folder.path, chosen.checkpoint, folder, tokenizer_file, chosen.dtype),
            progress=True,
            quantize=options.quantize,
            layers=layers,
        )
    print(
        f"llama3_raw: wrote {options.save_quantized}; run it with --weights {options.save_quantized}",
        file=sys.stderr,
    )
    return 0


def _calibration(
    options: argparse.Namespace, chosen: ChosenModel, folder: Path
) -> AbstractContextManager[Iterator[Mapping[str, Quantized]]]:
    """Return a context with the layers' matrices, rounded as --calibrate says; without it there are none."""
    if options.calibrate is None:
        return nullcontext(iter(()))
    if options.quantize != "int4":
        raise UserError("--calibrate is for --quantize int4; give that, or leave --calibrate out")
    ids = None
    if options.calibrate:
        if chosen.tokenizer is None:
            raise UserError("--calibrate: the model has no tokenizer for the file; leave FILE out, or give --tokenizer")
        ids = chosen.tokenizer.encode(read_text(options.calibrate), bos=True)
    return calibrated_layers(
        *(chosen.checkpoint, folder),
        text=ids,
        bos=chosen.tokenizer.bos_id if chosen.tokenizer else None,
        seed=options.seed or 0,
        device=chosen.device,
        dtype=chosen.dtype,
        progress=True,
    )


class _Watch:
    """Watches tokens while they are generated: keeps their times and why they end, and shows --top."""

    def __init__(self, top: int | None, tokenizer: Tokenizer | None, policy: LookupPolicy | DraftModelPolicy):
        self.top = top
        self.tokenizer = tokenizer
        self.policy = policy
        self.start = time.perf_counter()
        self.times: list[float] = []  # seconds from the start to each token
        self.reason: StopReason | None = None  # None: not stopped by `generate`
        self.passes = 0  # of the model between the first token and the last
        self.rows: Iterator[Tensor] = iter(())  # logits [vocab] of the next tokens, as far as computed

    def tap(self, name: str, tensor: Tensor) -> Tensor:
        """Keep the logits; a tap for `forward`."""
        if name == "logits":
            self.rows = iter(tensor.reshape(-1, tensor.shape[-1]))
        return tensor

    def over(self, tokens: Generator[int, None, StopReason]) -> Iterator[int]:
        """Yield the same tokens."""
        while True:
            try:
                token = next(tokens)
            except StopIteration as end:
                self.reason = end.value
                if self.reason is StopReason.END_TOKEN:
                    self._show_top(None)
                return
            self.times.append(time.perf_counter() - self.start)
            self.passes = self.policy.passes
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
        candidates = "  ".join(f"{self._name(i)} {p:.1%}" for i, p in zip(ids.tolist(), probs.tolist(), strict=True))
        taken = "(end)" if token is None else self._name(token)
        print(f"{len(self.times):4d}  {taken:<16} <- {candidates}", file=sys.stderr)


def _print_text(pieces: Iterator[str], options: argparse.Namespace) -> str | None:
    """Print the pieces as they come; on a terminal that also shows --top or pdb, at the end.

    Return how the user stopped it ("Ctrl-C"), or None.
    """
    hold = bool(options.top or options.break_at) and sys.stdout.isatty()
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
            raise  # python -m pdb handles it
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


def _stats(model: Model, prompt_tokens: int, load_seconds: float, watch: _Watch, processes: int) -> dict[str, Any]:
    """Return what --stats shows, by name."""
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
        "load_seconds": round(load_seconds, 3),
        "seconds_to_first_token": round(times[0], 3) if times else None,
        "tokens_per_second": tokens_per_second and round(tokens_per_second, 3),
        "passes": watch.passes,
        "tokens_proposed": watch.policy.proposed,
        "tokens_accepted": watch.policy.accepted,
        "weights_gb_per_second": seconds and round(watch.passes * per_pass / seconds / 1e9, 3),
        "peak_ram_bytes": peak_memory(),
        "device": str(weights.norm.device),
        "dtype": dtype_name(weights.norm.dtype),
        "matrices": format_name(weights.layers[0].wq),
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
