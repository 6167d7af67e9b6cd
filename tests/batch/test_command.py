"""python -m llama3_raw.batch: its output, killed and resumed runs, errors."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llama3_raw import Model, generate
from llama3_raw.batch import __main__ as batch
from llama3_raw.batch.__main__ import main
from llama3_raw.batch.journal import Journal
from llama3_raw.batch.requests import Line, Task, group_by_length
from llama3_raw.decoding.batch import Row, generate_batch
from llama3_raw.decoding.sampling import Sampling
from llama3_raw.openai_api.requests import Defaults, parse_request
from tests.damage import CHECKPOINT, copy_tiny
from tests.decoding.test_batch import PROMPTS
from tests.paths import ROOT, TINY

LINES: tuple[dict[str, Any], ...] = (
    {"id": "story", "prompt": PROMPTS[0], "max_tokens": 30},
    {"prompt": PROMPTS[1], "max_tokens": 12},
    {"id": 3, "prompt": PROMPTS[2], "temperature": 0.9, "seed": 7},
    {"id": "é", "prompt": PROMPTS[3], "temperature": 1.0},
    {"id": 2.5, "messages": [{"role": "user", "content": "Hi"}], "top_k": 3, "top_p": 0.9, "min_p": 0.01},
    {"prompt": [2048, 300, 301], "repetition_penalty": 1.2, "stop": None},
    {"prompt": PROMPTS[4], "stop": [" was", "zebra"]},
    {"prompt": PROMPTS[5], "stop": "."},
)

SETTINGS = ("--weights", str(TINY), "--device", "cpu", "--batch-size", "3", "--max-new-tokens", "24")


def write_lines(folder: Path, lines: Sequence[dict[str, Any]] = LINES) -> Path:
    file = folder / "prompts.jsonl"
    file.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    return file


def call(capsys: pytest.CaptureFixture[str], prompts: Path, *arguments: str) -> tuple[int, str]:
    """Run the command with out.jsonl, next to the prompts, as output. Return its status and stderr."""
    status = main([str(prompts), "-o", str(prompts.parent / "out.jsonl"), *SETTINGS, *arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    return status, captured.err


def results_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_bytes().splitlines()]


def test_the_output(tmp_path: Path, tiny: Model, capsys: pytest.CaptureFixture[str]) -> None:
    """Results are in the order of the input; each text is that of the main command with the same settings."""
    from llama3_raw.__main__ import main as main_command

    status, err = call(capsys, write_lines(tmp_path), "--temperature", "0", "--seed", "100")
    assert status == 0, err
    results = results_in(tmp_path)
    assert [result["id"] for result in results] == ["story", None, 3, "é", 2.5, None, None, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.run", "prompts.jsonl"]
    common = ["--weights", str(TINY), "--device", "cpu"]
    for number, (line, result) in enumerate(zip(LINES, results, strict=True), start=1):
        arguments = [f"--max-new-tokens={line.get('max_tokens', 24)}", f"--seed={line.get('seed', 100 + number)}"]
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
            if name in line:
                arguments.append(f"--{name.replace('_', '-')}={line[name]}")
        for text in [line["stop"]] if isinstance(line.get("stop"), str) else line.get("stop") or []:
            arguments.append(f"--stop={text}")
        if "messages" in line:
            arguments += ["--chat", line["messages"][0]["content"]]
        elif isinstance(line["prompt"], list):
            arguments += ["--ids", " ".join(map(str, line["prompt"]))]
        else:
            arguments.append(line["prompt"])
        assert main_command([*common, *arguments]) == 0
        captured = capsys.readouterr()
        text = captured.out
        if isinstance(line.get("prompt"), list):
            assert tiny.tokenizer is not None
            text = "".join(tiny.tokenizer.stream([int(word) for word in text.split()]))
        assert result["text"] == text
        is_longest = "the most that --max-new-tokens allows" in captured.err
        assert result["finish_reason"] == ("length" if is_longest else "stop")
    assert results[0]["usage"] == {"prompt_tokens": 5, "completion_tokens": 30}
    assert results[5]["usage"]["prompt_tokens"] == 3


def test_without_a_tokenizer(tmp_path: Path, tiny: Model, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("params.json", "consolidated.00.pth"):
        (model / name).symlink_to(TINY / name)
    lines: list[dict[str, Any]] = [{"prompt": [5, 6, 7], "max_tokens": 4}, {"prompt": [8], "max_tokens": 2}]
    assert call(capsys, write_lines(tmp_path, lines), "--weights", str(model))[0] == 0
    bare = tiny._replace(tokenizer=None)
    expected = [list(generate(bare, line["prompt"], max_new_tokens=line["max_tokens"])) for line in lines]
    assert [result["tokens"] for result in results_in(tmp_path)] == expected
    text = write_lines(tmp_path, [{"prompt": "text"}])
    (tmp_path / "out.jsonl").unlink()
    status, err = call(capsys, text, "--weights", str(model))
    assert (status, "there is no tokenizer.model" in err) == (2, True)


BAD = {
    "not JSON": (b"once upon", "is not JSON: Expecting value"),
    "not an object": (b'["a"]', "should be an object"),
    "too deep": (b"[" * 100_000, "is not JSON"),
    "not UTF-8": (b'{"prompt": "\xff"}', "is not valid UTF-8 at byte 12"),
    "half a character": (b'{"prompt": "\\ud800"}', "holds half a character"),
    "unknown field": (b'{"promt": "a"}', "promt: there is no such field; there are prompt"),
    "nothing": (b"{}", "should have a prompt or messages"),
    "both": (b'{"prompt": "a", "messages": []}', "should have a prompt or messages, not both"),
    "empty prompt": (b'{"prompt": ""}', "prompt should not be empty"),
    "no messages": (b'{"messages": []}', "messages should not be empty"),
    "no tokens": (
        b'{"prompt": [1, "a"]}',
        "prompt should be a string, a list of token ids, or a list of either, holds something else",
    ),
    "token": (b'{"prompt": [99999]}', "token id 99999 is outside"),
    "id": (b'{"prompt": "a", "id": [1]}', "id should be a string or a number, is [1]"),
    "true": (b'{"prompt": "a", "max_tokens": true}', "max_tokens should be an integer, is true"),
    "no new tokens": (b'{"prompt": "a", "max_tokens": 0}', "max_tokens should be 1 or more, is 0"),
    "temperature": (b'{"prompt": "a", "temperature": "hot"}', 'temperature should be a number, is "hot"'),
    "below 0": (b'{"prompt": "a", "temperature": -1}', "temperature should be 0 (greedy) or more, is -1.0"),
    "NaN": (b'{"prompt": "a", "top_p": NaN}', "top_p should be above 0 and at most 1, is nan"),
    "penalty": (b'{"prompt": "a", "repetition_penalty": 0}', "repetition_penalty should be from 0.01 to 100, is 0.0"),
    "a large number": (b'{"prompt": "a", "top_p": 1' + b"0" * 400 + b"}", "top_p is too large a number"),
    "seed": (b'{"prompt": "a", "seed": -9223372036854775809}', "seed should be from -2**63 to 2**63 - 1, is -9"),
    "stop": (b'{"prompt": "a", "stop": ["b", ""]}', "stop should be a string or a list of strings, none of them empty"),
    "role": (
        b'{"messages": [{"role": "bot", "content": "a"}]}',
        'role should be one of system, user, assistant, is "bot',
    ),
    "content": (b'{"messages": [{"role": "user"}]}', 'messages should be a list of {"role": …'),
    "no question": (b'{"messages": [{"role": "assistant", "content": "a"}]}', "messages should end with the user's"),
    "too long": (b'{"prompt": "' + b"a b " * 600 + b'"}', "tokens, the context holds 512; shorten it"),
}


def test_bad_lines_have_an_error_in_their_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error has the line number, and the other lines are computed as if the bad ones were not there."""
    good = b'{"id": "good", "prompt": "Lily", "max_tokens": 3}'
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"\n".join([good, b"", *(line for line, _ in BAD.values()), b"  \r", good]))
    status, err = call(capsys, file)
    assert status == 1
    assert f"{len(BAD)} of {len(BAD) + 2} lines could not be computed; line 3: is not JSON" in err
    first, *bad, last = results_in(tmp_path)
    assert first == last
    assert (first["id"], first["finish_reason"]) == ("good", "length")
    for number, ((_, message), result) in enumerate(zip(BAD.values(), bad, strict=True), start=3):
        assert result.keys() == {"line", "id", "error"}
        assert result["line"] == number
        assert message in result["error"]


def test_prompts_that_fill_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They can be scored, and not continued; a text beside them ends at the context."""
    scored = {"echo": True, "logprobs": 0, "max_tokens": 0}
    lines = [{"prompt": [5] * 40, **scored}, {"prompt": [5] * 40, "max_tokens": 1}, {"prompt": [5] * 38, "top_k": 9}]
    status, err = call(capsys, write_lines(tmp_path, lines), "--context", "40", "--temperature", "1")
    assert (status, "the prompt has 40 tokens, the context holds 40; shorten it" in err) == (1, True)
    full, _, beside = results_in(tmp_path)
    assert {len(values) for values in full["logprobs"].values()} == {40}
    assert None not in full["logprobs"]["token_logprobs"][1:]
    assert beside["usage"]["completion_tokens"] == 2


def test_only_bad_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, write_lines(tmp_path, [{"id": "x", "prompt": ""}]))[0] == 1
    assert results_in(tmp_path) == [{"line": 1, "id": "x", "error": "prompt should not be empty"}]


def test_a_line_that_is_not_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has an error in its place, and the run is finished: the line is not computed again."""
    copy_tiny(tmp_path / "model")
    checkpoint = tmp_path / "model" / CHECKPOINT
    tensors = torch.load(checkpoint, weights_only=True)
    tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    tensors["tok_embeddings.weight"][7] = torch.nan
    torch.save(tensors, checkpoint)
    lines: list[dict[str, Any]] = [{"prompt": [5, 6]}, {"id": "x", "prompt": [5, 7, 9]}, {"prompt": [8, 9]}]
    file = write_lines(tmp_path, lines)
    for _ in range(2):
        status, err = call(capsys, file, "--weights", str(tmp_path / "model"))
        assert status == 1
        assert "1 of 3 lines could not be computed; line 2: the logits are not numbers" in err
        results = results_in(tmp_path)
        assert results[1].keys() == {"line", "id", "error"}
        assert [results[place]["usage"]["completion_tokens"] for place in (0, 2)] == [24, 24]
        monkeypatch.setattr(batch, "load_model", no_model)


def no_model(*_: Any) -> Any:
    raise AssertionError("the model should not be loaded")


def test_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run again does nothing; another one does not touch the output."""
    file, out = write_lines(tmp_path), tmp_path / "out.jsonl"
    assert call(capsys, file)[0] == 0
    before = out.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(batch, "load_model", no_model)
        status, err = call(capsys, file)
        assert (status, "is finished already" in err) == (0, True)
        for arguments, name in ((["--top-k", "3"], "--top-k"), (["--dtype", "float32"], "--dtype")):
            status, err = call(capsys, file, *arguments)
            assert (status, f"is of a run with other {name};" in err) == (2, True)
        file.write_bytes(file.read_bytes() + b'{"prompt": "more"}\n')
        status, err = call(capsys, file)
        assert (status, "is of a run with other prompts;" in err) == (2, True)
        write_lines(tmp_path)
        out.write_bytes(before + b"{}\n")
        status, err = call(capsys, file)
        assert (status, "is there already, and no run wrote it as it is" in err) == (2, True)
    out.unlink()
    assert call(capsys, file)[0] == 0
    assert out.read_bytes() == before


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_lines(tmp_path)
    for arguments, message in (
        ([str(file), "-o", str(file)], "is the file with the prompts"),
        ([str(tmp_path / "none"), "-o", str(tmp_path / "out.jsonl")], "No such file"),
        ([str(file), "-o", str(tmp_path)], "is not a file"),
        ([str(file), "-o", str(tmp_path / "no" / "out")], "there is no folder"),
        ([str(file), "-o", str(tmp_path / "out"), "--context", "9999"], "the model's own context is 512"),
        ([str(file)], "required: -o"),
    ):
        assert main([*arguments, *SETTINGS]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "empty").write_bytes(b"\n \n")
    assert call(capsys, tmp_path / "empty")[0] == 2


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the output of a run that is not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert main([str(write_lines(folder)), "-o", str(folder / "out.jsonl"), *SETTINGS]) == 0
    return (folder / "out.jsonl").read_bytes()


@pytest.mark.slow
def test_a_torn_line(tmp_path: Path, uninterrupted: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """A kill may leave any part of the journal, from nothing to all; the journal of another run is refused."""
    file, part = write_lines(tmp_path), tmp_path / "out.jsonl.part"

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    def journal_of_a_run() -> bytes:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(batch, "atomic_write", stop)
            status, err = call(capsys, file)
        assert (status, "run the same command to continue" in err) == (130, True)
        return part.read_bytes()

    journal = journal_of_a_run()
    header = journal.index(b"\n") + 1
    part.write_bytes(journal[: header + 20])
    assert sorted(journal_of_a_run().splitlines()) == sorted(journal.splitlines())  # nothing of the torn line remains
    for left in (0, 1, header - 1, header, header + 20, len(journal) // 2, len(journal) - 1, len(journal)):
        part.write_bytes(journal[:left])
        assert call(capsys, file)[0] == 0
        assert (tmp_path / "out.jsonl").read_bytes() == uninterrupted
        assert not part.exists()
        (tmp_path / "out.jsonl").unlink()
    part.write_bytes(journal[:-9] + b"\0" * 9)  # as some disks leave it after a power cut
    assert call(capsys, file)[0] == 0
    assert (tmp_path / "out.jsonl").read_bytes() == uninterrupted
    (tmp_path / "out.jsonl").unlink()
    part.write_bytes(journal[: header + 20])
    status, err = call(capsys, file, "--seed", "5")
    assert (status, "out.jsonl.part: is of a run with other --seed; give the same" in err) == (2, True)
    assert part.read_bytes() == journal[: header + 20]


def test_complete_groups_are_not_computed_again(
    tmp_path: Path, uninterrupted: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, part = write_lines(tmp_path), tmp_path / "out.jsonl.part"
    computed: list[int] = []

    def spy(model: Model, rows: Sequence[Row], **settings: Any) -> Any:
        if computed and computed[-1] < 0:
            raise KeyboardInterrupt
        computed.append(len(rows))
        return generate_batch(model, rows, **settings)

    monkeypatch.setattr(batch, "generate_batch", spy)
    with monkeypatch.context() as patched:
        write = Journal.write

        def stop_at_the_fourth(self: Journal, line: int, result: Any) -> None:
            if len(self.results) == 4:
                raise KeyboardInterrupt
            write(self, line, result)

        patched.setattr(Journal, "write", stop_at_the_fourth)
        assert call(capsys, file)[0] == 130
    assert computed == [3, 3]
    assert part.read_bytes().count(b"\n") == 5
    computed.clear()
    status, err = call(capsys, file)
    assert (status, "continuing; 4 texts are done already" in err) == (0, True)
    assert computed == [3, 2]
    assert (tmp_path / "out.jsonl").read_bytes() == uninterrupted


def test_one_run_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from filelock import FileLock

    file = write_lines(tmp_path)
    with FileLock(tmp_path / "out.jsonl.lock"):
        status, err = call(capsys, file)
    assert (status, "another run is writing it; wait for it, or end it first" in err) == (2, True)


# Runs the command many times, each in a forked process that is killed somewhere between its start and its end: at a
# random time, or at one of its calls that change a file.
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
from llama3_raw.batch import __main__ as batch

def run(arguments, seconds=None, at_call=None):
    '''Return the status (-9: killed) and the seconds it took.'''
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        calls = 0
        def counted(function):
            def call(*given, **named):
                nonlocal calls
                calls += 1
                if calls == at_call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*given, **named)
            return call
        os.fsync, Path.replace, Path.unlink = counted(os.fsync), counted(Path.replace), counted(Path.unlink)
        os._exit(batch.main(arguments))
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.perf_counter() - start

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
arguments = lambda name: [str(folder / "prompts.jsonl"), "-o", str(folder / name), *settings]
status, whole = run(arguments("uninterrupted"))
assert status == 0
generator = random.Random(int(sys.argv[3]))
report = []
for number in range(20):
    killed = 0
    seconds = generator.uniform(0, whole)
    while run(arguments(str(number)), seconds)[0] == -9:
        killed += 1
        seconds = generator.uniform(0, whole) if killed == 1 and number % 4 == 0 else None
    report.append([str(number), killed])
at_call = 1
while run(arguments(f"call {at_call}"), at_call=at_call)[0] == -9:
    assert run(arguments(f"call {at_call}"))[0] == 0
    report.append([f"call {at_call}", 1])
    at_call += 1
print(json.dumps(report))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_runs_killed_at_random_points_end_with_the_same_file(tmp_path: Path) -> None:
    write_lines(tmp_path, LINES[:5])
    seed = random.randrange(2**32)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLER,
            str(tmp_path),
            json.dumps([*SETTINGS, "--threads", "1", "--max-new-tokens", "6"]),
            str(seed),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert sum(killed for name, killed in report if not name.startswith("call")) >= 10, f"seed {seed}"
    assert len(report) > 20 + 5  # at least one call for each line
    expected = (tmp_path / "uninterrupted").read_bytes()
    assert expected.count(b'"finish_reason"') == 5
    for name, _ in report:
        assert (tmp_path / name).read_bytes() == expected, f"seed {seed}, run {name}"
        assert not (tmp_path / f"{name}.part").exists()


def test_groups_do_not_depend_on_the_order_of_lines() -> None:
    def task(line: int, length: int, budget: int) -> Task:
        request = parse_request({"prompt": [1]}, "completion", Defaults(budget, Sampling()))
        return Task(Line(line, None, False, request), [[1] * length], budget)

    tasks = [task(1, 5, 10), task(2, 90, 10), task(3, 5, 30), task(4, 7, 1), task(5, 5, 10)]
    expected = [[2, 4], [3, 1], [5]]
    assert [[task.line.number for task in group] for group in group_by_length(tasks, 2)] == expected
    assert [[task.line.number for task in group] for group in group_by_length(tasks[::-1], 2)] == expected


def test_files_that_only_look_like_journals(tmp_path: Path) -> None:
    """A file with a similar name, and the user's own text with that very name, are not touched."""
    similar = tmp_path / "out.jsonl.part.bak"
    similar.write_text("my own\nlines\n")
    assert main([str(write_lines(tmp_path)), "-o", str(tmp_path / "out.jsonl"), *SETTINGS]) == 0
    assert similar.read_text() == "my own\nlines\n"
    journal = tmp_path / "other.jsonl.part"
    journal.write_text("my own\nlines\n")
    assert main([str(write_lines(tmp_path)), "-o", str(tmp_path / "other.jsonl"), *SETTINGS]) == 2
    assert journal.read_text() == "my own\nlines\n"


def test_killed_before_the_last_journal_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is computed again, and the model is not loaded."""
    out = tmp_path / "out.jsonl"
    command = [str(write_lines(tmp_path)), "-o", str(out), *SETTINGS]
    assert main(command) == 0
    (tmp_path / "out.jsonl.part.1").write_bytes((tmp_path / "out.jsonl.run").read_bytes())
    monkeypatch.setattr(batch, "load_model", no_model)
    assert main(command) == 0
    assert "is finished already" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl.part.1").exists()


def test_a_missing_result_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For example, another process wrote it into a different folder."""
    write = Journal.write
    monkeypatch.setattr(Journal, "write", lambda self, line, result: None if line == 1 else write(self, line, result))
    assert main([str(write_lines(tmp_path)), "-o", str(tmp_path / "out.jsonl"), *SETTINGS]) == 2
    assert "the results of 1 lines are not there" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    assert (tmp_path / "out.jsonl.part").exists()


CHAT = {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]}


def wrapped(id: str, url: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"custom_id": id, "method": "POST", "url": f"/v1/{url}", "body": body}


def test_files_of_openai_s_batches(tmp_path: Path, tiny: Model, capsys: pytest.CaptureFixture[str]) -> None:
    """Bodies are those of the API; fields in a flat line mean the same."""
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    prompt = {"prompt": "Once upon a time", "max_tokens": 5}
    chat = {**CHAT, "max_completion_tokens": 4, "model": "tiny", "user": "me", "temperature": 1, "seed": 3}
    scored = {**prompt, "logprobs": 2, "echo": True}
    lines = [
        wrapped("a", "completions", {**scored, "prompt": [prompt["prompt"], [2048, 300]]}),
        wrapped("b", "chat/completions", {**chat, "n": 2, "logprobs": True, "top_logprobs": 1}),
        {"id": 1, **scored},
        {"id": 2, **chat, "n": 3},
        wrapped("c", "chat/completions", {"messages": [{"role": "tool", "content": "x"}]}),
        wrapped("d", "chat/completions", {"messages": [{"role": "developer", "content": "x"}]}),
        wrapped("e", "completions", {**prompt, "logit_bias": {"5": 1}}),
        wrapped("f", "completions", {**prompt, "model": "gpt-9"}),
        {**wrapped("g", "embeddings", {"input": "x"})},
        {"id": 3, **prompt, "stream": True},
    ]
    status, err = call(capsys, write_lines(tmp_path, lines))
    assert (status, "6 of 10 lines could not be computed; line 5: messages: role should be" in err) == (1, True)
    results = results_in(tmp_path)
    assert [result.get("custom_id") for result in results] == ["a", "b", None, None, "c", "d", "e", "f", "g", None]
    kinds: tuple[Any, ...] = (Completion, ChatCompletion)
    for result, kind in zip(results[:2], kinds, strict=True):
        assert (result["response"]["status_code"], result["error"]) == (200, None)
        body = json.loads(json.dumps(result["response"]["body"]))
        for choice in body["choices"] if kind is Completion else ():
            for name in ("token_logprobs", "top_logprobs"):
                assert choice["logprobs"][name].pop(0) is None  # of the first token, which the client's types leave out
        kind.model_validate(body, strict=True)
    texts = results[0]["response"]["body"]["choices"]
    assert {name: texts[0][name] for name in ("text", "finish_reason", "logprobs")} == {
        name: results[2][name] for name in ("text", "finish_reason", "logprobs")
    }
    assert texts[0]["text"] == "Once upon a time, there was a little"
    assert [len(choice["logprobs"]["tokens"]) for choice in texts] == [5 + 5, 2 + 5]
    answers = [choice["message"]["content"] for choice in results[1]["response"]["body"]["choices"]]
    assert [choice["text"] for choice in results[3]["choices"]][:2] == answers
    assert len({choice["text"] for choice in results[3]["choices"]}) > 1  # each text has a seed of its own
    assert results[3]["usage"] == {"prompt_tokens": 17, "completion_tokens": 12}
    reasons = [
        'role should be one of system, user, assistant, is "tool"',
        'role should be one of system, user, assistant, is "developer"',
        "logit_bias is not supported, other than {}",
        'model is "gpt-9", and this run has the model tiny',
        "url should be /v1/completions or /v1/chat/completions",
    ]
    for result, reason in zip(results[4:9], reasons, strict=True):
        assert reason in result["error"]["message"]
        assert result["response"] is None
    assert results[9]["error"] == "stream is for the server; leave it out"
