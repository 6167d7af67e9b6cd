"""python -m llama3_raw.batch: complete a file of prompts, as parser.py says."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..cli.entry_point import answer_help
from .parser import build_parser

answer_help(__name__, build_parser)

from tqdm import tqdm

from ..chat.dialog import warn_of_base_model
from ..chat.formats import format_of, note_format
from ..cli.entry_point import command_line_tool, for_several_processes
from ..cli.memory_plan import RunShape
from ..cli.models import ChosenModel, choose_device, choose_model, load_model
from ..cli.options import (
    check_context,
    check_output,
    chosen_sampling,
    chosen_stop_ids,
)
from ..decoding.batch import Row, generate_batch
from ..decoding.logprobs import ScoredRow
from ..decoding.loop import StopReason
from ..errors import UserError
from ..openai_api.answers import Answer
from ..openai_api.fields import SAMPLING
from ..openai_api.requests import Defaults
from ..ops import Ops
from ..system.files import atomic_write
from ..system.process_groups import Ranks, init
from ..tokenizer import Tokenizer
from ..weights import Model
from .journal import (
    Journal,
    describe_model,
    exclusive,
    journal_files,
    json_line,
    process_journal,
    read_results,
    saved_results,
)
from .requests import Result, Task, Tasks, bad_line, group_by_length, make_task, model_name, read_lines, result_of

_COUNTERS = ("texts ended", "new tokens", "steps of the bar")  # in the store, by which other ranks report to rank 0


def compute(
    model: Model,
    name: str,
    groups: Sequence[Tasks],
    journal: Journal,
    context: int,
    ops: Ops,
    ranks: Ranks | None = None,
) -> None:
    """Compute the groups one after the other, and save each result when its texts have ended.

    name: of the model, for the results. ranks: as one of several processes; those that share a model take the next
    group that no others have taken.
    """
    with _Progress(groups, ranks) as progress:
        for group in groups if ranks is None else _claimed(groups, ranks):
            texts = [_Text(task, row, model, ops) for task in group for row in task.rows(model.tokenizer)]
            rows = [text.row for text in texts]
            # rows know their budget; the last token of a text, such as the only one after a full context, has no place
            for place, event in generate_batch(model, rows, context=context + 1, ops=ops):
                text = texts[place]
                if isinstance(event, StopReason):
                    text.ended = event
                    progress.end(text)
                    _save(text.task, [one for one in texts if one.task is text.task], model.tokenizer, name, journal)
                else:
                    text.new.append(event)
                    progress.step(text)


class _Text:
    """A text of a task."""

    def __init__(self, task: Task, row: Row, model: Model, ops: Ops):
        request = task.line.request
        self.task, self.new = task, list[int]()
        self.ended: StopReason | None = None
        self.n_prompt, self.budget = len(row.ids), task.budget
        self.scored = None
        if request.n_top is not None:
            self.scored = ScoredRow(row, request.n_top, (model, ops) if request.echo else None)
        self.row = self.scored.row if self.scored else row

    @property
    def answer(self) -> Answer:
        """The text, when it has ended."""
        assert self.ended is not None
        scored = self.scored
        return Answer(self.row.ids, self.new, self.ended, scored.prompt if scored else (), scored.new if scored else ())


def _save(task: Task, texts: Sequence[_Text], tokenizer: Tokenizer | None, model: str, journal: Journal) -> None:
    """Save the result of a line if all its texts have ended."""
    if any(text.ended is None for text in texts):
        return
    line = task.line
    if any(text.ended is StopReason.NOT_NUMBERS for text in texts):
        result = bad_line(line.number, line.id, line.is_wrapped, UserError(StopReason.NOT_NUMBERS.value))
    else:
        result = result_of(task, [text.answer for text in texts], tokenizer, model)
    journal.write(line.number, result)


def _claimed(groups: Sequence[Tasks], ranks: Ranks) -> Iterator[Tasks]:
    """Yield the groups that this process computes together with those that share its model."""
    while True:
        number = ranks.add("groups taken", 1) - 1 if ranks.tensor.rank == 0 else None
        number = ranks.tensor.broadcast(number)
        if number >= len(groups):
            return
        yield groups[number]


class _Progress:
    """A progress bar over the most tokens that there may be; when a text ends early, the rest counts as done.

    Rank 0 of several processes shows it. The others report to it when a text ends.
    """

    def __init__(self, groups: Sequence[Tasks], ranks: Ranks | None):
        tasks = [task for group in groups for task in group]
        self._ended, self._all, self._new = 0, sum(task.n_rows for task in tasks), 0
        self._ranks = ranks if ranks is not None and ranks.data.size > 1 else None
        self._is_first = ranks is None or ranks.rank == 0
        self._reports = ranks is not None and ranks.tensor.rank == 0 and ranks.rank > 0
        self._counts = [0, 0, 0]  # _COUNTERS, as last read
        self._last_read = self._start = time.perf_counter()
        total = sum(sum(map(len, task.prompts)) * task.line.request.n + task.budget * task.n_rows for task in tasks)
        bar_format = "{desc}: {percentage:3.0f}%|{bar}| {postfix}{remaining} left"
        self._bar = tqdm(total=total, desc="prompts", bar_format=bar_format, leave=False, smoothing=0.1)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, text: _Text) -> None:
        """Count the newest token of a text."""
        self._new += 1
        now = time.perf_counter()
        steps = 1 + (text.n_prompt if len(text.new) == 1 else 0)
        if self._ranks is not None and self._is_first and now > self._last_read + 1:
            previous, self._last_read = self._counts, now
            self._counts = [self._ranks.add(name, 0) for name in _COUNTERS]
            ended, new, others_steps = (after - before for before, after in zip(previous, self._counts, strict=True))
            self._ended += ended
            self._new += new
            steps += others_steps
        speed = self._new / (now - self._start)
        self._bar.set_postfix_str(f"{self._ended}/{self._all} ended, {speed:.1f} tok/s, ", refresh=False)
        self._bar.update(steps)

    def end(self, text: _Text) -> None:
        """Count the end of a text."""
        self._ended += 1
        count = len(text.new)
        self._bar.update(text.budget - count + (0 if count else text.n_prompt))
        if self._ranks is not None and self._reports:
            for name, number in zip(_COUNTERS, (1, count, text.n_prompt + text.budget), strict=True):
                self._ranks.add(name, number)


def _digest_of_file(name: str | None) -> str | None:
    """Return a name, with a hash of the file's content if there is such a file."""
    if name is None or not Path(name).is_file():
        return name
    return f"{name} {hashlib.sha256(Path(name).read_bytes()).hexdigest()}"


def describe_run(
    options: argparse.Namespace, content: bytes, chosen: ChosenModel, ranks: Ranks | None
) -> dict[str, Any]:
    """Return everything that the results depend on, by name. A run may be continued if all of it is the same."""
    return {
        "prompts": hashlib.sha256(content).hexdigest(),
        **describe_model(chosen),
        "--stop-token": options.stop_token,
        "--template": _digest_of_file(options.template),
        "--tp": ranks.tensor.size if ranks else 1,
        "--reference": options.reference,
        "--batch-size": options.batch_size,
        "--context": options.context,
        "--max-new-tokens": options.max_new_tokens,
        "--stop": options.stop,
        **{f"--{name.replace('_', '-')}": getattr(options, name) for name in SAMPLING},
        "--seed": options.seed,
    }


@command_line_tool
@for_several_processes
def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status: 1 if a single process could not compute a line."""
    options = build_parser().parse_args(arguments)
    try:
        with init(lambda: choose_device(options.device), options.tp) as ranks:
            n_bad = _batch(options, ranks)
    except KeyboardInterrupt:
        print("\nllama3_raw: stopped by Ctrl-C; run the same command to continue", file=sys.stderr)
        return 130
    return 1 if n_bad and ranks is None else 0  # torchrun would take 1 for a crash


def _batch(options: argparse.Namespace, ranks: Ranks | None) -> int:
    """Compute the prompts that the options name, and return how many lines could not be computed."""
    sampling = chosen_sampling(options)
    check_output("-o", options.output)
    out = Path(options.output).resolve()
    content = Path(options.prompts).read_bytes()
    if out == Path(options.prompts).resolve():
        raise UserError(f"-o {options.output}: is the file with the prompts; choose another name")
    defaults = Defaults(options.max_new_tokens, sampling, tuple(options.stop), options.seed or 0)
    lines, bad = read_lines(content, defaults)
    if not lines and not bad:
        raise UserError(f'{options.prompts}: is empty; give lines such as {{"prompt": "Once upon a time"}}')
    # OpenAI's files have answers in text
    chosen = choose_model(options, needs_tokenizer=any(line.request.has_text or line.is_wrapped for line in lines))
    longest = chosen.checkpoint.params.max_seq_len
    check_context(options.context, longest)
    context = options.context or longest
    has_dialogs = any(line.request.messages for line in lines)
    dialog_format = format_of(chosen.tokenizer, options.template) if has_dialogs and chosen.tokenizer else None
    more_stop_ids = chosen_stop_ids(options, chosen.tokenizer, chosen.checkpoint.params.vocab_size)
    tasks = []
    for line in lines:
        try:
            tasks.append(make_task(line, chosen, context, dialog_format, more_stop_ids))
        except UserError as error:
            bad[line.number] = bad_line(line.number, line.id, line.is_wrapped, error)
    run = describe_run(options, content, chosen, ranks)
    if ranks is not None and ranks.everyone.broadcast(run) != run:
        raise UserError(
            f"{options.prompts}: not all processes read the same prompts and weights; give all of them the same files"
        )
    if dialog_format is not None and (ranks is None or ranks.rank == 0):
        note_format(dialog_format)
    with exclusive(out, ranks):
        _run(options, chosen, group_by_length(tasks, options.batch_size), bad, run, context, out, ranks)
    if ranks is not None and ranks.rank > 0:
        return 0  # the output may be on another machine
    results = [json.loads(line) for line in out.read_bytes().split(b"\n") if line]
    failed = [result for result in results if result.get("error")]
    if failed:
        reason = failed[0]["error"]
        print(
            f"llama3_raw: {len(failed)} of {len(results)} lines could not be computed; line {failed[0]['line']}: "
            f"{reason if isinstance(reason, str) else reason['message']}",
            file=sys.stderr,
        )
    return len(failed)


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
    """Compute the missing results, and write the output."""
    record = out.with_name(f"{out.name}.run")
    is_first = ranks is None or ranks.rank == 0
    done = saved_results(out, record, run) if is_first else None
    if ranks is not None:
        done = ranks.everyone.broadcast(done)
    if done is None:
        print(f"llama3_raw: {options.output} is finished already; remove it to compute it again", file=sys.stderr)
        return
    # a group with a missing row is computed again as a whole, because its rows depend on each other by rounding
    missing = [group for group in groups if any(task.line.number not in done for task in group)]
    if missing:
        if done:
            print(f"llama3_raw: continuing; {len(done)} texts are done already", file=sys.stderr)
        model, ops, which = load_model(chosen, run_shape(missing), options.reference, ranks)
        print(f"llama3_raw: {which}", file=sys.stderr)
        if any(task.line.request.messages for group in missing for task in group):
            warn_of_base_model(model)
        with process_journal(out, run, done, ranks) as journal:
            compute(model, model_name(chosen), missing, journal, context, ops, ranks)
    if ranks is not None:
        ranks.everyone.barrier()
    if is_first:
        results = read_results(out, run)
        lacking = sum(task.line.number not in results for group in groups for task in group)
        if lacking:
            raise UserError(
                f"{out}: the results of {lacking} lines are not there; let all processes write into one folder, shared "
                "by the machines, and run the same command again"
            )
        content = b"".join(json_line({**bad, **results}[line]) for line in sorted({**bad, **results}))
        with atomic_write(out) as part:
            part.write_bytes(content)
        with atomic_write(record) as part:
            part.write_bytes(json_line({**run, "output": hashlib.sha256(content).hexdigest()}))
        for file in journal_files(out):
            file.unlink()
        count = sum(not result.get("error") for result in results.values())
        print(f"llama3_raw: wrote {options.output}: {count} texts", file=sys.stderr)


def run_shape(groups: Sequence[Tasks]) -> RunShape:
    """Return the shape of the run, with the rows of the group that needs the largest cache."""

    def text_length(group: Tasks) -> int:
        return max(task.length + task.budget for task in group)

    def n_rows(group: Tasks) -> int:
        return sum(task.n_rows for task in group)

    largest = max(groups, key=lambda group: n_rows(group) * text_length(group))
    prompt = max(task.length for group in groups for task in group)
    text, generated = max(text_length(largest), prompt), max(task.budget for group in groups for task in group)
    return RunShape(prompt, text, least=prompt + 1, rows=n_rows(largest), generated=generated)


if __name__ == "__main__":
    sys.exit(main())
