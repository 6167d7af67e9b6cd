"""python -m llama3_raw.chat: talk to an Instruct model. Answers go to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from ..cli.entry_point import answer_help
from .parser import COMMANDS, build_parser

answer_help(__name__, build_parser)

from ..cli.drafts import choose_draft, load_draft
from ..cli.entry_point import command_line_tool, describe
from ..cli.memory_plan import RunShape
from ..cli.models import choose_model, load_model
from ..cli.options import (
    check_context,
    chosen_sampling,
    chosen_stop_ids,
)
from ..decoding.loop import StopReason
from ..decoding.prompt_lookup import LookupPolicy
from ..errors import UserError
from ..system.machine import peak_memory
from .conversation import DEFAULT_CONTEXT, Conversation
from .dialog import read_dialog, warn_of_base_model, write_dialog
from .formats import format_of, note_format

PROMPT = "> "


def run_command(conversation: Conversation, line: str) -> None:
    """Run a line that begins with /. Raises UserError for an unknown command, and for a file that cannot be used."""
    name, *rest = line.split(maxsplit=1)
    argument = "".join(rest).strip()
    file = Path(os.path.expanduser(argument))
    if name in ("/save", "/load") and not argument:
        raise UserError(f"{name}: give the name of a file after it")
    if name == "/reset":
        conversation.exchanges.clear()
        _note("the conversation is forgotten")
    elif name == "/system":
        previous = f"; it was {conversation.system!r}" if conversation.system else ""
        conversation.system = argument
        _note(f"there is {'a new' if argument else 'no'} system message{previous}")
    elif name == "/save":
        write_dialog(file, conversation.messages)
        _note(f"saved to {file}: {len(conversation.messages)} messages")
    elif name == "/load":
        conversation.restore(read_dialog(file))
        _note(f"loaded from {file}: {len(conversation.messages)} messages")
    elif name == "/stats":
        _print_stats(conversation)
    elif name == "/help":
        for usage, meaning in COMMANDS.items():
            print(f"  {usage:<16}{meaning}", file=sys.stderr)
    else:
        raise UserError(f"{name}: no such command (see /help); put a space before a question that begins with /")


def _print_stats(conversation: Conversation) -> None:
    turn, policy, peak = conversation.turn, conversation.policy, peak_memory()
    seconds = turn.times[-1] - turn.times[0] if turn.times else 0
    for name, value in {
        "tokens in the window": f"{conversation.length():,} of {conversation.context:,}",
        "tokens computed": f"{turn.computed:,}",
        "tokens of the answer": f"{len(turn.new):,}",
        "tokens per second": f"{(len(turn.times) - 1) / seconds:.2f}" if seconds else "-",
        "passes, in all answers": f"{policy.passes:,}",
        "tokens proposed, accepted": f"{policy.proposed:,}, {policy.accepted:,}",
        "peak memory": f"{peak / 1e9:.2f} GB" if peak else "-",
    }.items():
        print(f"  {name:<26}{value}", file=sys.stderr)


def print_answer(conversation: Conversation, question: str) -> bool:
    """Stream the answer to stdout, then note what is unusual about it. Return whether Ctrl-C stopped it."""
    interrupted = False
    try:
        with contextlib.closing(conversation.answer(question)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    print(flush=True)
    turn, window = conversation.turn, f"the window of {conversation.context:,} tokens"
    if turn.dropped:
        oldest = f"{turn.dropped} oldest turns were" if turn.dropped > 1 else "oldest turn was"
        _note(f"{window} is full; the {oldest} dropped")
    if interrupted:
        _note("stopped by Ctrl-C" if turn.new else "stopped by Ctrl-C; the question is taken back")
    elif turn.reason is StopReason.MAX_NEW_TOKENS:
        _note(f"stopped after {len(turn.new)} tokens, the most that --max-new-tokens allows")
    elif turn.reason is StopReason.CONTEXT:
        _note(f"stopped: the question and its answer fill {window}")
    return interrupted


def _note(text: str) -> None:
    print("llama3_raw:", " ".join(text.split()), file=sys.stderr)


def _read_line(screen: TextIO | None) -> str | None:
    """Return the next line of stdin, after showing a prompt on the screen, if any; None at the end.

    Raises UserError if the line is not UTF-8.
    """
    try:
        if screen is sys.stdout:
            return input(PROMPT)  # line editing if there is readline; the prompt is always on stdout
        if screen is not None:
            print(PROMPT, end="", file=screen, flush=True)
        line = sys.stdin.buffer.readline().decode("utf-8")
        return line.removeprefix("\ufeff").rstrip("\r\n") if line else None  # the byte order mark of a file
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise UserError("stdin: the line is not valid UTF-8; convert the text to UTF-8") from error


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Give input() line editing, a persistent history and tab completion; on Windows the console has its own."""
    if sys.platform == "win32":
        yield
        return
    try:
        import readline
    except ImportError:  # Python was built without it
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    history = Path(state, "llama3_raw", "chat_history")
    names = [usage.split()[0] for usage in COMMANDS]
    readline.set_completer_delims(" ")
    readline.set_completer(lambda text, n: [*(name for name in names if text and name.startswith(text)), None][n])
    if "libedit" in (readline.__doc__ or ""):  # macOS, instead of GNU readline
        readline.parse_and_bind("bind ^I rl_complete")
    else:
        readline.parse_and_bind("tab: complete")
        readline.parse_and_bind("set enable-bracketed-paste on")  # several pasted lines are one question
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    try:
        yield
    finally:
        readline.set_history_length(1000)
        with contextlib.suppress(OSError):
            if state != "~/.local/state":  # not expanded: a user without a home, as in some containers
                history.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(history)


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    options = build_parser().parse_args(arguments)
    sampling = chosen_sampling(options)
    if sys.stdin is None:
        raise UserError("stdin is closed; the chat reads questions from it")
    LookupPolicy(options.lookup)  # before a long load, so that a wrong value is reported at once
    chosen = choose_model(options)
    longest = chosen.checkpoint.params.max_seq_len
    check_context(options.context, longest)
    window = options.context or min(DEFAULT_CONTEXT, longest)
    assert chosen.tokenizer is not None  # checked by choose_model
    dialog_format = format_of(chosen.tokenizer, options.template)
    more_stop_ids = chosen_stop_ids(options, chosen.tokenizer, chosen.checkpoint.params.vocab_size)
    # a question may fill the window
    shape = RunShape(prompt=window, text=window, least=1, generated=options.max_new_tokens)
    chosen_draft = choose_draft(options, chosen, shape)
    model, ops, which = load_model(chosen, shape)
    conversation = Conversation(
        model,
        system=options.system,
        context=options.context,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        seed=options.seed,
        lookup=options.lookup,
        draft=load_draft(chosen_draft, model, shape, captured=not options.no_compile),
        ops=ops._replace(can_capture=ops.can_capture and not options.no_compile),
        dialog_format=dialog_format,
        stop_ids=chosen.stop_ids | dialog_format.stop_ids | more_stop_ids,
    )
    _note(which)
    note_format(dialog_format)
    warn_of_base_model(model)
    if not sys.stdin.isatty():
        return _converse(conversation, screen=None)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")  # bytes that are not UTF-8 must not become lone surrogates
    _note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends")
    with _line_editing():
        return _converse(conversation, screen=sys.stdout if sys.stdout.isatty() else sys.stderr)


def _converse(conversation: Conversation, screen: TextIO | None) -> int:
    """Answer line by line, and return the exit status.

    screen: where a user sees the prompt; errors and Ctrl-C then do not end the chat.
    """
    while True:
        try:
            line = _read_line(screen)
            if line is None and screen is not None:
                print(file=screen)  # end the line of the prompt
            if line is None or line.split() == ["/exit"]:
                return 0
            if line.startswith("/"):
                run_command(conversation, line)
            elif line.strip() and print_answer(conversation, line) and screen is None:
                return 130
        except UserError as error:
            if screen is None:
                raise
            _note(f"error: {describe(error)}")
        except KeyboardInterrupt:
            if screen is None:
                raise
            print(file=screen)


if __name__ == "__main__":
    sys.exit(main())
