"""python -m llama3_raw.batch PROMPTS -o OUT: many prompts at once, a line of JSON each, and as many lines of results.

What is done is written down as it comes. After whatever ended a run, the same command goes on where it stopped, and the
file in the end is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from .backends.cpu import FEW
from .cli.entry_point import ArgumentParser, command_line_tool, for_several_processes, not_empty
from .cli.memory_plan import Lengths
from .cli.models import ChosenModel, choose_device, choose_model, load_model
from .cli.options import add_model_options, add_sampling_options, check_context, chosen_sampling, positive_int
from .decoding.batch import Row, generate_batch
from .decoding.loop import StopReason, check_ids
from .decoding.sampling import Sampling
from .dialog import Message, encode_dialog, warn_of_base_model
from .errors import UserError, in_short
from .ops import Ops
from .system.files import check_output
from .system.process_groups import Ranks, started
from .tokenizer import Tokenizer
from .weights import Model, in_words

Result = dict[str, Any]
"""A line of the output."""

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_FIELDS: dict[str, tuple[tuple[type, ...], str]] = {  # what a line may say, and as what
    "id": ((str, int, float), "a string or a number"),
    "prompt": ((str, list), "a string or a list of token ids"),
    "messages": ((list,), 'a list of {"role": …, "content": …}'),
    "max_tokens": ((int,), "a whole number"),
    **dict.fromkeys(_SAMPLING, ((int, float), "a number")),
    "top_k": ((int,), "a whole number"),
    "seed": ((int,), "a whole number"),
    "stop": ((str, list), "a string or a list of strings"),
}
_TOLD = ("texts ended", "new tokens", "steps of the bar")  # what processes tell the first one, by these names
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Request:
    """What a line asks for. ids: the tokens of the prompt, once a tokenizer has made them."""

    line: int  # its number in the file, from 1
    id: str | float | None
    prompt: str | list[int] | list[Message]
    max_tokens: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]


class Task(NamedTuple):
    """A request that can be computed."""

    request: Request
    ids: list[int]  # of the prompt
    budget: int  # new tokens at most


Tasks = list[Task]
"""Tasks that are computed together, from the first to the last, wherever and whenever that is."""


def read_requests(content: bytes, defaults: Request) -> tuple[list[Request], dict[int, Result]]:
    """The lines of a file -> the requests, and by the number of the line what is wrong with the others.

    defaults: what counts where a line does not say; its seed is that of line 0, and each line has the next one. Blank
    lines are left out.
    """
    requests, bad = [], {}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        fields: Any = None
        try:
            fields = _parsed(line)
            requests.append(_request(number, fields, defaults))
        except UserError as error:
            bad[number] = bad_line(number, fields.get("id") if isinstance(fields, dict) else None, error)
    return requests, bad


def bad_line(number: int, id: Any, error: UserError) -> Result:
    """What stands in the output for a line that cannot be computed."""
    message = re.sub(r"^--([a-z-]+)", lambda option: option[1].replace("-", "_"), str(error))  # fields, not options
    return {"line": number, "id": id if type(id) in _FIELDS["id"][0] else None, "error": message}


def _parsed(line: bytes) -> Any:
    """Raises UserError for what is no JSON."""
    try:
        fields = json.loads(line.decode("utf-8"))
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"is not valid UTF-8 at byte {error.start} of the line") from error
    except UnicodeEncodeError as error:  # "\ud800"
        raise UserError("holds half a character, which is no text") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON: {in_short(error)}") from error
    return fields


def _request(number: int, fields: Any, defaults: Request) -> Request:
    """Raises UserError for a line that says too little, too much or something else."""
    if not isinstance(fields, dict):
        raise UserError(f'should be an object, {{"prompt": …}}, is {in_short(json.dumps(fields))}')
    given = {name: value for name, value in fields.items() if value is not None}
    for name, value in given.items():
        if name not in _FIELDS:
            raise UserError(f"{in_short(name)}: there is no such field; there are {', '.join(_FIELDS)}")
        types, expected = _FIELDS[name]
        if type(value) not in types:
            raise UserError(f"{name} should be {expected}, is {in_short(json.dumps(value, ensure_ascii=False))}")
    if ("prompt" in given) == ("messages" in given):
        raise UserError("should have a prompt or messages" + (", not both" if "prompt" in given else ""))
    prompt = _messages(given["messages"]) if "messages" in given else given["prompt"]
    if not prompt:
        raise UserError(f"{'messages' if 'messages' in given else 'prompt'} should not be empty")
    if isinstance(given.get("prompt"), list) and any(type(token) is not int for token in prompt):
        raise UserError("prompt should be a string or a list of token ids, holds something else")
    max_tokens = given.get("max_tokens", defaults.max_tokens)
    if max_tokens < 1:
        raise UserError(f"max_tokens should be 1 or more, is {max_tokens}")
    own_seed = given.get("seed", (defaults.seed + number) % 2**63)
    if not 0 <= own_seed < 2**63:
        raise UserError(f"seed should be from 0 to 2**63 - 1, is {own_seed}")
    stop = given.get("stop", list(defaults.stop))
    stop = [stop] if isinstance(stop, str) else stop
    if not all(isinstance(text, str) and text for text in stop):
        raise UserError("stop should be a string or a list of strings, none of them empty")
    try:
        settings = {name: float(given[name]) for name in _SAMPLING if name in given and name != "top_k"}
    except OverflowError as error:
        raise UserError(f"a number is too large ({error})") from error
    settings |= {"top_k": given["top_k"]} if "top_k" in given else {}
    sampling = Sampling(**{**asdict(defaults.sampling), **settings})
    return Request(number, given.get("id"), prompt, max_tokens, sampling, own_seed, tuple(stop))


def _messages(entries: list[Any]) -> list[Message]:
    """Raises UserError for what is no dialog to which an answer is due."""
    messages = []
    for entry in entries:
        if not isinstance(entry, dict) or entry.keys() != {"role", "content"} or not isinstance(entry["content"], str):
            raise UserError('messages should be a list of {"role": …, "content": …}, with text as content')
        if entry["role"] not in _ROLES:
            raise UserError(f"role should be one of {', '.join(_ROLES)}, is {in_short(json.dumps(entry['role']))}")
        messages.append(Message(**entry))
    if messages and messages[-1].role == "assistant":
        raise UserError("messages should end with the user's, which is to be answered")
    return messages


def task_of(request: Request, chosen: ChosenModel, context: int) -> Task:
    """The request in tokens. Raises UserError for those that the model cannot take."""
    tokenizer, prompt = chosen.tokenizer, request.prompt
    if isinstance(prompt, str):
        assert tokenizer is not None  # main has seen to it
        ids = tokenizer.encode(prompt, bos=True)
    elif isinstance(prompt[0], Message):
        assert tokenizer is not None
        ids = encode_dialog(tokenizer, prompt)
    else:
        ids = prompt
    check_ids(ids, chosen.checkpoint.params)
    if len(ids) > context:
        raise UserError(f"the prompt has {len(ids)} tokens, the context holds {context}; shorten it")
    return Task(request, ids, min(request.max_tokens, context - len(ids)))


def grouped(tasks: Iterable[Task], size: int) -> list[Tasks]:
    """Cuts the tasks into groups of about the same length, the longest first.

    Which go together depends on the input and the settings alone, so that a group comes to the same whoever computes it
    and how often. The longest first: what does not fit shows at once, and several workers end at about the same time.
    """
    ordered = sorted(tasks, key=lambda task: (-len(task.ids), -task.budget, task.request.line))
    return [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]


def compute(
    model: Model, groups: Sequence[Tasks], journal: Journal, context: int, ops: Ops, ranks: Ranks | None = None
) -> None:
    """Computes the groups, each whole, and writes each result down when its text has ended.

    ranks: as one of several processes; each row of them takes the next group that none has taken.
    """
    with _Progress(groups, ranks) as progress:
        for group in groups if ranks is None else _shared_out(groups, ranks):
            rows = [_row(task, model.tokenizer) for task in group]
            new: list[list[int]] = [[] for _ in group]
            for place, event in generate_batch(model, rows, context=context, ops=ops):
                if isinstance(event, StopReason):
                    journal.write(group[place].request.line, _result(group[place], new[place], event, model.tokenizer))
                    progress.end(group[place], len(new[place]))
                else:
                    new[place].append(event)
                    progress.step(group[place], len(new[place]))


def _shared_out(groups: Sequence[Tasks], ranks: Ranks) -> Iterator[Tasks]:
    """The groups that this process computes, with those that it shares the model with."""
    while True:
        number = ranks.add("groups taken", 1) - 1 if ranks.tensor.rank == 0 else None
        number = ranks.tensor.from_first(number)
        if number >= len(groups):
            return
        yield groups[number]


def _row(task: Task, tokenizer: Tokenizer | None) -> Row:
    request = task.request
    stops = [text.encode("utf-8") for text in request.stop]

    def is_over(new: Sequence[int]) -> bool:
        """A stop text ends in the newest token, and each token has a byte of it at least."""
        return any(stop in b"".join(map(tokenizer.token_bytes, new[-len(stop) :])) for stop in stops if tokenizer)

    return Row(task.ids, request.max_tokens, request.sampling, request.seed, is_over)


def _result(task: Task, new: Sequence[int], reason: StopReason, tokenizer: Tokenizer | None) -> Result:
    request = task.request
    return {
        "id": request.id,
        **({"text": "".join(tokenizer.stream(new, request.stop))} if tokenizer else {"tokens": list(new)}),
        "finish_reason": "stop" if reason is StopReason.END_TOKEN else "length",
        "usage": {"prompt_tokens": len(task.ids), "completion_tokens": len(new)},
    }


class _Progress:
    """A bar over all tokens that there may be; what is left when a text ends early is counted as done.

    The first of several processes shows it, the others tell it what they have done when a text has ended.
    """

    def __init__(self, groups: Sequence[Tasks], ranks: Ranks | None):
        tasks = [task for group in groups for task in group]
        self._ended, self._all, self._new = 0, len(tasks), 0
        self._ranks = ranks if ranks is not None and ranks.data.size > 1 else None
        self._is_first = ranks is None or ranks.rank == 0
        self._tells = ranks is not None and ranks.tensor.rank == 0 and ranks.rank > 0
        self._told = [0, 0, 0]  # by the others: texts that ended, new tokens, what they are in the bar
        self._asked = self._begun = time.perf_counter()
        total = sum(len(task.ids) + task.budget for task in tasks)
        form = "{desc}: {percentage:3.0f}%|{bar}| {postfix}{remaining} left"
        self._bar = tqdm(total=total, desc="prompts", bar_format=form, leave=False, smoothing=0.1)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, task: Task, count: int) -> None:
        """The text has got its token number `count`."""
        self._new += 1
        now = time.perf_counter()
        steps = 1 + (len(task.ids) if count == 1 else 0)
        if self._ranks is not None and self._is_first and now > self._asked + 1:
            told, self._told, self._asked = self._told, [self._ranks.add(name, 0) for name in _TOLD], now
            ended, new, others_steps = (after - before for before, after in zip(told, self._told, strict=True))
            self._ended += ended
            self._new += new
            steps += others_steps
        speed = self._new / (now - self._begun)
        self._bar.set_postfix_str(f"{self._ended}/{self._all} ended, {speed:.1f} tok/s, ", refresh=False)
        self._bar.update(steps)

    def end(self, task: Task, count: int) -> None:
        """The text has ended with so many tokens."""
        self._ended += 1
        self._bar.update(task.budget - count + (0 if count else len(task.ids)))
        if self._ranks is not None and self._tells:
            for name, number in zip(_TOLD, (1, count, len(task.ids) + task.budget), strict=True):
                self._ranks.add(name, number)


class Journal:
    """The results of a run as they come, in a file that any kill leaves readable: its first line says of which run.

    results: those that are written, by the number of the line.
    """

    def __init__(self, opened: BinaryIO | None, results: dict[int, Result]):
        """For `open_journal`, which knows what the file holds. opened: None writes nothing."""
        self._opened = opened
        self.results = results

    def write(self, line: int, result: Result) -> None:
        """A result that was there before stays as it is."""
        if line not in self.results:
            self.results[line] = result
            self.append({"line": line, "result": result})

    def append(self, entry: Mapping[str, Any]) -> None:
        """Writes a line, and returns when the disk has it."""
        if self._opened is not None:
            content = as_line(entry)
            if self._opened.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._opened.name)
            os.fsync(self._opened.fileno())


@contextlib.contextmanager
def open_journal(file: Path, run: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal in a file, to go on with, or a new one. Raises UserError where it is of another run, or none."""
    with open(file, "a+b", buffering=0) as opened:
        opened.seek(0)
        entries = []
        whole = 0  # bytes; a line that a kill has torn, and what stands behind it, is written anew
        for line in opened.readlines():
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            entries.append(entry)
            whole += len(line)
        opened.seek(0)
        if entries or b"\n" in opened.read():  # else a kill has torn the first line
            check_same_run(entries[0] if entries else None, run, file)
        opened.truncate(whole)
        journal = Journal(opened, {entry["line"]: entry["result"] for entry in entries[1:]})
        if not entries:
            journal.append(run)
        yield journal


def as_line(entry: Mapping[str, Any]) -> bytes:
    """A line of JSON."""
    return json.dumps(entry, ensure_ascii=False).encode("utf-8") + b"\n"


def check_same_run(found: Any, run: Mapping[str, Any], file: Path) -> None:
    """Raises UserError, naming what differs, where what a file says of its run is not what this run is."""
    different = [name for name, value in run.items() if not isinstance(found, dict) or found.get(name) != value]
    if different:
        raise UserError(
            f"{file}: is of a run with other {', '.join(different)}; give the same again to go on with it, choose "
            "another -o, or remove it"
        )


def describe_run(
    options: argparse.Namespace, content: bytes, chosen: ChosenModel, ranks: Ranks | None
) -> dict[str, Any]:
    """What the results depend on, by what it is called: a run in which all of it is the same may be gone on with."""
    checkpoint, tokenizer = chosen.checkpoint, chosen.tokenizer
    model = hashlib.sha256(repr(checkpoint.params).encode())
    for place, parts in checkpoint.parts.items():  # the beginning of each tensor: not all is read, and yet all counts
        for part in parts:
            beginning = part.reshape(-1)[:1024].contiguous().view(torch.uint8).numpy().tobytes()
            model.update(f"{place.meta_name} {list(part.shape)} {part.dtype}".encode() + beginning)
    return {
        "prompts": hashlib.sha256(content).hexdigest(),
        "weights": model.hexdigest(),
        "tokenizer": hashlib.sha256(tokenizer.path.read_bytes()).hexdigest() if tokenizer else None,
        "--device": chosen.device.type,
        "--tp": ranks.tensor.size if ranks else 1,
        "--gpu-layers": chosen.gpu_layers,
        "--dtype": in_words(chosen.dtype or checkpoint.dtype),
        "--quantize": chosen.quantized,
        "--reference": options.reference,
        "--batch-size": options.batch_size,
        "--context": options.context,
        "--max-new-tokens": options.max_new_tokens,
        "--stop": options.stop,
        **{f"--{name.replace('_', '-')}": getattr(options, name) for name in _SAMPLING},
        "--seed": options.seed,
    }


def is_finished(out: Path, record: Path, run: Mapping[str, Any]) -> bool:
    """Whether the output is there, whole, and of this run. Raises UserError where it is something else."""
    if not out.exists():
        return False
    found = json.loads(record.read_bytes()) if record.exists() else {}
    if found.get("output") != hashlib.sha256(out.read_bytes()).hexdigest():
        raise UserError(f"{out}: is there already, and no run wrote it as it is; choose another -o, or remove it")
    check_same_run(found, run, out)
    return True


def replace_whole(file: Path, content: bytes) -> None:
    """Writes a file such that it is there as a whole or as it was, whenever the process ends."""
    part = file.with_name(f"{file.name}.new")
    with open(part, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    part.replace(file)


def build_parser() -> ArgumentParser:
    """The options of `python -m llama3_raw.batch`."""
    parser = ArgumentParser(prog="python -m llama3_raw.batch", description=__doc__)
    parser.add_argument(
        "prompts", metavar="PROMPTS", help=f"a file with an object of JSON in each line; fields: {', '.join(_FIELDS)}"
    )
    parser.add_argument("-o", "--output", required=True, type=not_empty, metavar="OUT", help="the file to write")
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=FEW,
        metavar="N",
        help="texts at a time (default: %(default)s; a CPU computes up to so many tokens for the price of few)",
    )
    group = parser.add_argument_group("text, where a line does not say")
    group.add_argument(
        "--max-new-tokens", type=positive_int, default=256, metavar="N", help="max_tokens (default: %(default)s)"
    )
    group.add_argument(
        "--stop", action="append", default=[], type=not_empty, metavar="TEXT", help="stop before TEXT (may be repeated)"
    )
    parser.add_argument(
        "--tp",
        type=positive_int,
        metavar="N",
        help="under torchrun: N processes share a model, the next N have another copy and take other prompts (default: "
        "all share one)",
    )
    parser.add_argument("--context", type=positive_int, metavar="N", help="the most tokens of a text, prompt included")
    add_sampling_options(parser)
    add_model_options(parser)
    parser.add_argument("--reference", action="store_true", help="the exact operations, bit for bit Meta's, but slower")
    return parser


@command_line_tool
@for_several_processes
def main(arguments: Sequence[str]) -> int:
    """Runs the tool; -> exit status: 1 where a line could not be computed, but for several processes."""
    options = build_parser().parse_args(arguments)
    try:
        with started(lambda: choose_device(options.device), options.tp) as ranks:
            n_bad = _batch(options, ranks)
    except KeyboardInterrupt:
        print("\nllama3_raw: stopped by Ctrl-C; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 1 if n_bad and ranks is None else 0  # torchrun would take it for a crash


def _batch(options: argparse.Namespace, ranks: Ranks | None) -> int:
    """Computes the prompts that the options name; -> how many lines could not be computed."""
    sampling = chosen_sampling(options)
    check_output("-o", options.output)
    out = Path(options.output).resolve()
    content = Path(options.prompts).read_bytes()
    if out == Path(options.prompts).resolve():
        raise UserError(f"-o {options.output}: is the file with the prompts; choose another name")
    defaults = Request(0, None, "", options.max_new_tokens, sampling, options.seed or 0, tuple(options.stop))
    requests, bad = read_requests(content, defaults)
    if not requests and not bad:
        raise UserError(f'{options.prompts}: is empty; give lines such as {{"prompt": "Once upon a time"}}')
    has_text = any(request.stop or not isinstance(request.prompt[0], int) for request in requests)
    chosen = choose_model(options, needs_tokenizer=has_text)
    longest = chosen.checkpoint.params.max_seq_len
    check_context(options.context, longest)
    context = options.context or longest
    tasks = []
    for request in requests:
        try:
            tasks.append(task_of(request, chosen, context))
        except UserError as error:
            bad[request.line] = bad_line(request.line, request.id, error)
    run = describe_run(options, content, chosen, ranks)
    if ranks is not None and ranks.everyone.from_first(run) != run:
        raise UserError(
            f"{options.prompts}: not all processes read the same prompts and weights; give all the same files"
        )
    with _alone(out, ranks):
        _run(options, chosen, grouped(tasks, options.batch_size), bad, run, context, out, ranks)
    if bad:
        first = min(bad)
        print(
            f"llama3_raw: {len(bad)} of {len(bad) + len(tasks)} lines could not be computed; line {first}: "
            f"{bad[first]['error']}",
            file=sys.stderr,
        )
    return len(bad)


@contextlib.contextmanager
def _alone(out: Path, ranks: Ranks | None) -> Iterator[None]:
    """Keeps other runs from writing the same output. Raises UserError where one does."""
    if ranks is not None and ranks.rank > 0:
        yield
        return
    try:
        with FileLock(f"{out}.lock", timeout=0) as lock:
            try:
                yield
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout as error:
        raise UserError(f"{out}: another run is writing it; wait for it, or end it first") from error


def _run(
    options: argparse.Namespace,
    chosen: ChosenModel,
    groups: list[Tasks],
    bad: Mapping[int, Result],
    run: Mapping[str, Any],
    context: int,
    out: Path,
    ranks: Ranks | None,
) -> None:
    """Computes what is not there yet, and writes the output."""
    record = out.with_name(f"{out.name}.run")
    is_first = ranks is None or ranks.rank == 0
    done = _done(out, record, run) if is_first else None
    if ranks is not None:
        done = ranks.everyone.from_first(done)
    if done is None:
        print(f"llama3_raw: {options.output} is finished already; to compute it anew, remove it", file=sys.stderr)
        return
    # a group of which a row is missing is computed as a whole again: its rows depend on each other by rounding
    missing = [group for group in groups if any(task.request.line not in done for task in group)]
    if missing:
        if done:
            print(f"llama3_raw: going on; {len(done)} texts are there already", file=sys.stderr)
        model, ops, which = load_model(chosen, lengths_of(missing), options.reference, ranks)
        print(f"llama3_raw: {which}", file=sys.stderr)
        if any(isinstance(task.request.prompt[0], Message) for group in missing for task in group):
            warn_of_base_model(model)
        with _own_journal(out, run, done, ranks) as journal:
            compute(model, missing, journal, context, ops, ranks)
    if ranks is not None:
        ranks.everyone.wait()
    if is_first:
        results = _written(out, run)
        lacking = sum(task.request.line not in results for group in groups for task in group)
        if lacking:
            raise UserError(
                f"{out}: the results of {lacking} lines are not there; all processes have to write into one folder, "
                "which machines share; mend that, and give the same command again"
            )
        content = b"".join(as_line({**bad, **results}[line]) for line in sorted({**bad, **results}))
        replace_whole(out, content)
        replace_whole(record, as_line({**run, "output": hashlib.sha256(content).hexdigest()}))
        for file in _journals(out):
            file.unlink()
        print(f"llama3_raw: {options.output} is written: {len(results)} texts", file=sys.stderr)


def _done(out: Path, record: Path, run: Mapping[str, Any]) -> dict[int, Result] | None:
    """The results that an earlier run has left; None where it is finished."""
    journals = _journals(out)
    try:
        finished = is_finished(out, record, run)
    except UserError:
        if not journals:
            raise
        finished = False  # a kill came before the record was there
    if not finished:
        return _written(out, run)
    for file in journals:  # or before these were gone
        file.unlink()
    return None


def _journals(out: Path) -> list[Path]:
    """Of a run of one process, or of each of several."""
    name = re.compile(re.escape(f"{out.name}.part") + r"(\.\d+)?")
    return sorted(file for file in out.parent.iterdir() if name.fullmatch(file.name))


def _written(out: Path, run: Mapping[str, Any]) -> dict[int, Result]:
    """What all journals hold. Raises UserError where one is of another run."""
    results: dict[int, Result] = {}
    for file in _journals(out):
        with open_journal(file, run) as journal:
            results |= {line: result for line, result in journal.results.items() if line not in results}
    return results


@contextlib.contextmanager
def _own_journal(out: Path, run: Mapping[str, Any], done: dict[int, Result], ranks: Ranks | None) -> Iterator[Journal]:
    """The journal that this process writes: of those that share a model, the first one does."""
    if ranks is not None and ranks.tensor.rank > 0:
        yield Journal(None, done)
        return
    number = f".{ranks.data.rank}" if ranks is not None and ranks.data.rank > 0 else ""
    with open_journal(out.with_name(f"{out.name}.part{number}"), run) as journal:
        journal.results = done
        yield journal


def lengths_of(groups: Sequence[Tasks]) -> Lengths:
    """What the group that takes the most memory takes."""

    def text(group: Tasks) -> int:
        return max(len(task.ids) + task.budget for task in group)

    largest = max(groups, key=lambda group: len(group) * text(group))
    prompt = max(len(task.ids) for group in groups for task in group)
    return Lengths(prompt=prompt, text=max(text(largest), prompt), least=prompt + 1, rows=len(largest))


if __name__ == "__main__":
    sys.exit(main())
