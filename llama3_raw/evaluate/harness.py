"""`Adapter`: this engine as a model of lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness).

Importing this module registers the model as "llama3_raw". Needs lm-eval: pip install -e '.[evaluate]'.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from ..batch.journal import Journal
from ..chat.dialog import DialogFormat, Message
from ..chat.formats import format_of
from ..cli.entry_point import ArgumentParser
from ..cli.models import ChosenModel, choose_model, load_model
from ..cli.options import check_context
from ..decoding.batch import Row, generate_batch
from ..decoding.loop import StopReason
from ..decoding.sampling import Sampling, check_sound
from ..decoding.scoring import Question, cached_tokens, group_questions, score_together
from ..errors import UserError
from ..ops import Ops
from ..tokenizer import Tokenizer
from ..weights import Model, dtype_name
from .options import ROW_TOKENS, add_engine_options, run_shape

MAX_NEW_TOKENS = 256  # if a task does not say, as `hf` has it

_GENERATION_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p"}

Results = list[Any]


@register_model("llama3_raw")
class Adapter(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A model of lm-eval. BOS, truncation, windows and stops are those of lm-eval's `hf`."""

    def __init__(self, model: Model, ops: Ops, context: int, batch_size: int, journal: Journal | None = None):
        """context: the most tokens of a text. journal: keeps the results of each batch, and has those of earlier ones.

        Raises UserError for a model without a tokenizer.
        """
        super().__init__()
        if model.tokenizer is None:
            raise UserError("the model has no tokenizer, and tasks are texts; give --tokenizer FILE")
        self._model, self._tokenizer, self._ops = model, model.tokenizer, ops
        self.max_length, self.batch_size, self.journal = context, batch_size, journal

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> Adapter:
        """Load the model that lm-eval's --model_args describe: the options of the command, with underscores."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if given.get("device") == "cuda:0" and not torch.cuda.is_available():  # lm-eval's default, as `hf` reads it
            del given["device"]
        given = {**given, **arg_dict}
        given.pop("max_batch_size", None)  # for lm-eval's own search of a batch size
        if given.get("batch_size") == "auto":
            del given["batch_size"]
        parser = ArgumentParser(prog="--model_args", add_help=False)
        add_engine_options(parser)
        arguments = [
            option if value is True else f"{option}={value}"
            for option, value in ((f"--{name.replace('_', '-')}", value) for name, value in given.items())
            if value is not False
        ]
        options = parser.parse_args(arguments)
        chosen = choose_model(options)
        return cls.load(options, chosen)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> Adapter:
        """As `create_from_arg_obj`, for "name=value,name=value"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def load(cls, options: argparse.Namespace, chosen: ChosenModel, journal: Journal | None = None) -> Adapter:
        """Load a chosen model. options: those of `add_engine_options`."""
        check_context(options.context, chosen.checkpoint.params.max_seq_len)
        model, ops, which = load_model(chosen, run_shape(options, chosen), options.reference)
        print(f"llama3_raw: {which}", file=sys.stderr)
        return cls(model, ops, options.context or model.params.max_seq_len, options.batch_size, journal)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.prefix_token_id if self._tokenizer.eos_id is None else self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty text begins with: BOS, even if no other text begins with it, or the token that ends a text."""
        tokenizer = self._tokenizer
        named = tokenizer.special_tokens.get(tokenizer.template_variables.get("bos_token", ""))
        ids = [token for token in (tokenizer.bos_id, named, tokenizer.eos_id) if token is not None]
        if not ids:
            raise UserError(f"{self._tokenizer.path}: has neither a BOS nor an end-of-text token to begin a text with")
        return ids[0]

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of requests."""
        return str(self._tokenizer.path.resolve()).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval's results say of the model."""
        return {"model_dtype": dtype_name(self._model.weights.norm.dtype), "model_params": asdict(self._model.params)}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return token ids, after BOS unless the text has one or `add_special_tokens` is false.

        Names of special tokens in the text are these tokens, as in Hugging Face's tokenizers.
        """
        return self._tokenizer.encode(string, bos=add_special_tokens is not False, allow_special=True)

    @functools.cached_property
    def _dialog_format(self) -> DialogFormat:
        return format_of(self._tokenizer)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a dialog as text; without `add_generation_prompt`, one that ends in the middle of the last message."""
        messages = [Message(message["role"], message["content"]) for message in chat_history]
        text = self._tokenizer.decode(self._dialog_format.encode(messages))
        if add_generation_prompt:
            return text
        content = messages[-1].content.strip()
        return text[: text.rindex(content) + len(content)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template's text, for the results."""
        return self._tokenizer.chat_template if chat_template else None

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Score (texts, prompt, continuation), truncated from the left. Those with the same prompt share its pass."""
        numbers: dict[tuple[int, ...], list[int]] = {}  # prompt -> its requests
        for number, (_texts, prompt, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(f"a continuation has {len(continuation)} tokens, --context holds {self.max_length}")
            kept = (*prompt, *continuation)[-self.max_length - 1 :]
            numbers.setdefault(kept[: len(kept) - len(continuation)], []).append(number)
        questions = [Question(prompt, [requests[i][2] for i in asked]) for prompt, asked in numbers.items()]
        asked = list(numbers.values())
        results: Results = [None] * len(requests)
        with tqdm(total=len(requests), desc="loglikelihood", unit="request", disable=disable_tqdm) as bar:
            for group in group_questions(questions, self.batch_size, self.batch_size * ROW_TOKENS):
                scored = self._once("loglikelihood", [questions[i] for i in group], self._score)
                for i, result in zip((i for question in group for i in asked[question]), scored, strict=True):
                    results[i] = (result[0], result[1])
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
                    bar.update()
        return results

    def _score(self, questions: list[Question]) -> Results:
        rows = max(1, min(self.batch_size, self.batch_size * ROW_TOKENS // cached_tokens(questions)))
        scored = score_together(self._model, questions, ops=self._ops, rows=rows)
        return [[score.total, score.is_greedy] for scores in scored for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log p of whole texts, in windows as long as the context."""
        windows = [
            (number, None, *make_disjoint_window(window))
            for number, request in enumerate(requests)
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
        ]
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens([window[1:] for window in windows], disable_tqdm)
        for (number, *_), (logprob, _) in zip(windows, scored, strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model continues each context with, up to the first stop text."""
        eos = self._tokenizer.decode([self.eot_token_id])
        tasks = [
            _Generation(self, number, request.args[0], request.args[1], eos) for number, request in enumerate(requests)
        ]
        results: Results = [None] * len(tasks)
        # as questions, whose answers take a place for each new token
        questions = [Question(task.row.ids, [range(task.row.max_new_tokens)]) for task in tasks]
        with tqdm(total=len(tasks), desc="generate_until", unit="request", disable=disable_tqdm) as bar:
            for group in group_questions(questions, self.batch_size, self.batch_size * ROW_TOKENS):
                texts = self._once("generate_until", [tasks[i] for i in group], self._generate)
                for i, text in zip(group, texts, strict=True):
                    results[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update()
        return results

    def _generate(self, tasks: list[_Generation]) -> Results:
        new: list[list[int]] = [[] for _ in tasks]
        rows = [task.row for task in tasks]
        events = generate_batch(self._model, rows, context=self.max_length, ops=self._ops, shares_beginning=True)
        for row, event in events:
            if isinstance(event, StopReason):
                check_sound(event is not StopReason.NOT_NUMBERS)
            else:
                new[row].append(event)
        return [task.text(tokens) for task, tokens in zip(tasks, new, strict=True)]

    def _once(self, kind: str, tasks: list[Any], compute: Callable[[list[Any]], Results]) -> Results:
        """Return the results of a batch: from the journal, if an earlier run got so far, or computed and saved."""
        if self.journal is None:
            return compute(tasks)
        content = json.dumps([kind, [task.content if isinstance(task, _Generation) else task for task in tasks]])
        key = int(hashlib.sha256(content.encode()).hexdigest()[:15], 16)
        if key not in self.journal.results:
            self.journal.write(key, {"results": compute(tasks)})
        results: Results = self.journal.results[key]["results"]
        return results


class _Generation:
    """A request of generate_until."""

    def __init__(self, lm: Adapter, number: int, context: str, settings: Mapping[str, Any], eos: str):
        """number: the seed, where a task samples. Raises UserError for settings that this engine does not have."""
        self.content = [number, context, dict(settings)]
        given = normalize_gen_kwargs(dict(settings), MAX_NEW_TOKENS)
        unknown = sorted(given.keys() - _GENERATION_SETTINGS)
        if unknown:
            raise UserError(f"a task sets {', '.join(unknown)} for generation, which this engine does not have")
        self._stop = handle_stop_sequences(given["until"], eos=eos)
        self._tokenizer: Tokenizer = lm._tokenizer
        longest = lm.max_length - given["max_gen_toks"]
        if longest < 1:
            raise UserError(
                f"a task wants {given['max_gen_toks']} new tokens, and the context holds {lm.max_length}; give a "
                "smaller max_gen_toks in its generation_kwargs"
            )
        ids = lm.tok_encode(context)[-longest:]
        sampling = Sampling(
            **{name: given[name] for name in ("temperature", "top_p", "top_k", "min_p") if name in given}
        )
        self.row = Row(ids, given["max_gen_toks"], sampling, number, self._is_over)

    def _is_over(self, new: Sequence[int]) -> bool:
        """Whether a stop text has ended: in the newest token, and each token has at least one byte of it."""
        stops = [stop.encode() for stop in self._stop if stop]
        return any(stop in b"".join(map(self._tokenizer.token_bytes, new[-len(stop) :])) for stop in stops)

    def text(self, new: Sequence[int]) -> str:
        """Return the new text before the first stop text, without special tokens."""
        special = set(self._tokenizer.special_tokens.values())
        text = self._tokenizer.decode([token for token in new if token not in special])
        return str(postprocess_generated_text(text, self._stop, None))
