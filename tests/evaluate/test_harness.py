"""lm-eval's tasks by this engine and by its own `hf` model on the same weights; resuming; the command lines."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -e '.[evaluate]'")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from llama3_raw import UserError, convert
from llama3_raw.decoding.batch import generate_batch
from llama3_raw.decoding.loop import Event
from llama3_raw.evaluate import harness
from llama3_raw.evaluate.__main__ import main
from llama3_raw.evaluate.harness import Adapter
from tests.paths import ROOT, TINY
from tests.test_perplexity import STORY

pytestmark = pytest.mark.slow

TASKS = {
    "choice": """
task: choice
output_type: multiple_choice
doc_to_text: "{{begin}}"
doc_to_choice: "{{endings}}"
doc_to_target: "{{label}}"
num_fewshot: 2
fewshot_split: test
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "rolling": """
task: rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
""",
    "open": """
task: open
output_type: generate_until
doc_to_text: "{{begin}}"
doc_to_target: "{{endings[label]}}"
generation_kwargs: {until: [".", "!"], max_gen_toks: 30, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}

# a template that is not Llama 3's, with special tokens and with the text of a message stripped
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}: {{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant: {% endif %}"
)


def documents() -> list[dict[str, Any]]:
    """Cuts of the story, each with the true next words, and others of another length."""
    words = STORY.split()
    made = []
    for number in range(20):
        cut, length = 4 + 3 * number, 1 + number % 5
        endings = [" ".join(words[at : at + n]) for at, n in ((cut, length), (5, 3), (30, 1), (50, 6))]
        label = number % 4
        endings[0], endings[label] = endings[label], endings[0]
        page = " ".join(words[number : number + 40]) if number else f"{STORY}\n\n{STORY}".replace("\n", "  ") * 2
        made.append({"begin": " ".join(words[:cut]), "endings": endings, "label": label, "page": page})
    return made


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks whose documents are in a file."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents()))
    for name, text in TASKS.items():
        data = {"data_files": {"test": str(folder / "documents.jsonl")}, "cache_dir": str(folder / "cache")}
        (folder / f"{name}.yaml").write_text(
            f"{text}dataset_path: json\ndataset_kwargs: {json.dumps(data)}\ntest_split: test\n"
        )
    return folder


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model in Hugging Face's format, with a chat template."""
    folder = tmp_path_factory.mktemp("weights") / "hf"
    assert convert.main([str(TINY), str(folder), "--to", "hf"]) == 0
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def adapter(hf_folder: Path) -> Adapter:
    return Adapter.create_from_arg_string(f"weights={hf_folder},dtype=float32,device=cpu,batch_size=16")


@pytest.fixture(scope="module")
def hf(hf_folder: Path) -> Any:
    return HFLM(pretrained=str(hf_folder), dtype="float32", device="cpu", batch_size=4)


def run(model: Any, tasks: Path, **settings: Any) -> dict[str, Any]:
    results: dict[str, Any] = simple_evaluate(
        model=model,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        **settings,
    )
    return results


@pytest.mark.parametrize("chat", [False, True])
def test_the_same_as_hf(adapter: Adapter, hf: Any, tasks: Path, chat: bool) -> None:
    """The same loglikelihoods to 1e-4 (of a whole page: for each of its tokens), accuracies and generated texts."""
    ours, theirs = (run(model, tasks, apply_chat_template=chat) for model in (adapter, hf))
    for name in TASKS:
        for one, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert one["arguments"] == other["arguments"]
            for (found,), (expected,) in zip(one["resps"], other["resps"], strict=True):
                if name == "choice":
                    assert found[0] == pytest.approx(expected[0], abs=1e-4)
                    assert found[1] == expected[1]
                elif name == "rolling":
                    assert found == pytest.approx(expected, abs=1e-4 * len(one["doc"]["page"]) / 4)
                else:
                    assert found == expected
    for name, metric in (("choice", "acc,none"), ("choice", "acc_norm,none"), ("open", "exact_match,none")):
        assert ours["results"][name][metric] == theirs["results"][name][metric]
    if not chat:
        assert ours["results"]["choice"]["acc,none"] > 0.4  # of four: the model does know its stories


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


def test_bos_and_truncation_as_hf(adapter: Adapter, hf: Any) -> None:
    pairs = [
        ("", "Once upon a time"),  # after BOS alone
        ("<|begin_of_text|>One day", " Tom"),  # no second BOS
        ("One day ", "Tom"),  # space goes to the continuation
        ("One day, Lily", "<|eot_id|>"),  # names of special tokens are these tokens
        (STORY * 6, " The end of the story"),  # longer than the context of 512
    ]
    for model_pairs in (pairs, pairs[::-1]):
        asked = requests("loglikelihood", *model_pairs)
        for found, expected in zip(adapter.loglikelihood(asked), hf.loglikelihood(asked), strict=True):
            assert found[0] == pytest.approx(expected[0], abs=1e-4)
            assert found[1] == expected[1]


def test_a_tokenizer_that_adds_no_bos(hf_folder: Path, tmp_path: Path) -> None:
    """As SmolLM2's: it has a BOS, with which only an empty text begins."""
    folder = tmp_path / "hf"
    shutil.copytree(hf_folder, folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**described, "post_processor": None}))
    ours = Adapter.create_from_arg_string(f"weights={folder},dtype=float32,device=cpu")
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu")
    assert ours.tok_encode("One day") == theirs.tok_encode("One day")
    assert ours.tok_encode("One day")[0] != ours.prefix_token_id == theirs.prefix_token_id
    asked = requests("loglikelihood_rolling", (STORY,))
    assert ours.loglikelihood_rolling(asked) == pytest.approx(theirs.loglikelihood_rolling(asked), abs=5e-3)


def test_generation_settings(adapter: Adapter, hf: Any) -> None:
    long, until = STORY * 6, {"until": ["\n"], "max_gen_toks": 20}
    for context in (long, "Once upon a time", "<|begin_of_text|>One day"):
        asked = requests("generate_until", (context, dict(until)))
        assert adapter.generate_until(asked) == hf.generate_until(asked)
    sampled = requests("generate_until", ("Once", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 9}))
    assert adapter.generate_until(sampled) == adapter.generate_until(sampled)
    with pytest.raises(UserError, match="a task sets num_beams for generation"):
        adapter.generate_until(requests("generate_until", ("Once", {"num_beams": 4})))
    with pytest.raises(UserError, match="wants 600 new tokens, and the context holds 512"):
        adapter.generate_until(requests("generate_until", ("Once", {"max_gen_toks": 600})))


def test_a_stop_text_ends_the_passes(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []

    def kept(*arguments: Any, **settings: Any) -> Iterator[Event]:
        for event in generate_batch(*arguments, **settings):
            events.append(event)
            yield event

    monkeypatch.setattr(harness, "generate_batch", kept)
    settings = {"until": ["girl"], "max_gen_toks": 100}
    assert adapter.generate_until(requests("generate_until", ("Once upon a time", settings))) == [
        ", there was a little "
    ]
    assert len(events) == len(adapter.tok_encode(", there was a little girl", add_special_tokens=False)) + 1


def test_a_dialog_that_ends_in_an_answer(adapter: Adapter, hf: Any) -> None:
    dialog = [{"role": "user", "content": " Why? "}, {"role": "assistant", "content": "Because the"}]
    for one in (dialog, dialog[:1]):
        is_question = one[-1]["role"] == "user"
        assert adapter.apply_chat_template(one, is_question) == hf.apply_chat_template(one, is_question)


def command(tasks: Path, *options: str) -> list[str]:
    return [
        "--tasks",
        ",".join(TASKS),
        "--include-path",
        str(tasks),
        "--weights",
        str(TINY),
        "--device",
        "cpu",
        *options,
    ]


def test_a_stopped_run_continues(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the figures of a run that was not stopped, and without computing a batch twice."""
    whole, resumed = tmp_path / "whole.json", tmp_path / "resumed.json"
    batches: list[int] = []

    def stopping_after(n: int) -> Callable[..., Any]:
        def score_together(*arguments: Any, **settings: Any) -> Any:
            if len(batches) == n:
                raise KeyboardInterrupt
            batches.append(len(arguments[1]))
            return score(*arguments, **settings)

        return score_together

    from llama3_raw.decoding.scoring import score_together as score

    monkeypatch.setattr(harness, "score_together", stopping_after(-1))
    assert main(command(tasks, "-o", str(whole))) == 0
    count = len(batches)
    assert count > 4
    batches.clear()
    monkeypatch.setattr(harness, "score_together", stopping_after(3))
    assert main(command(tasks, "-o", str(resumed))) == 130
    assert [file.name for file in tmp_path.iterdir() if "resumed" in file.name] == ["resumed.json.part"]
    monkeypatch.setattr(harness, "score_together", stopping_after(-1))
    assert main(command(tasks, "-o", str(resumed))) == 0
    assert len(batches) == count
    assert json.loads(resumed.read_text())["results"] == json.loads(whole.read_text())["results"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["resumed.json", "whole.json"]


def test_the_command(tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert main(command(tasks, "--limit", "3", "-o", str(out))) == 0
    written = json.loads(out.read_text())
    assert written["config"]["model"] == "llama3_raw"
    assert written["n-samples"]["choice"]["effective"] == 3
    accuracy = written["results"]["choice"]["acc,none"]
    shown = capsys.readouterr().out
    assert f"{accuracy:.4f}" in next(line for line in shown.splitlines() if "choice" in line)
    assert main(command(tasks, "-o", str(out))) == 2
    assert "out.json: is there already" in capsys.readouterr().err
    (tmp_path / "other.json.part").write_text('{"weights": "another"}\n')
    assert main(command(tasks, "-o", str(tmp_path / "other.json"))) == 2
    assert "is of a run with other weights" in capsys.readouterr().err


def test_a_task_that_does_not_exist(
    tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    assert main(["--tasks", "choicee", "--include-path", str(tasks), "--weights", str(TINY)]) == 2
    assert "--tasks choicee: lm-eval has no such task; did you mean choice?" in capsys.readouterr().err


# lm-eval indexes its 14,000 tasks for 8 seconds unless told not to
OWN_TASKS_ONLY = """
import functools, sys
import lm_eval.tasks
from llama3_raw.evaluate.__main__ import main
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
sys.exit(main(sys.argv[1:]))
"""


def test_lm_evals_own_command_line(tasks: Path, tmp_path: Path) -> None:
    arguments = ["--model", "llama3_raw", "--model_args", f"weights={TINY},dtype=float32", "--batch_size", "16"]
    arguments += ["--tasks", "choice", "--include_path", str(tasks), "--limit", "2", "--output_path", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", OWN_TASKS_ONLY, "lm_eval", "run", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "llama3_raw ({'weights':" in done.stdout
    assert "|choice|" in done.stdout
    assert list(tmp_path.rglob("results_*.json"))
