"""A small corpus for the scripts of this folder: stories that the model tells itself, so that nothing is downloaded."""

from __future__ import annotations

from llama3_raw import Model
from llama3_raw.decoding.batch import Row, generate_batch
from llama3_raw.decoding.sampling import Sampling


def tell_stories(model: Model, n_stories: int, max_new_tokens: int = 200) -> list[list[int]]:
    """Return the tokens of sampled stories, each from its begin-of-text on: the same ones every time."""
    start = model.tokenizer.encode("", bos=True)
    sampling = Sampling(temperature=0.8, min_p=0.02)
    stories = [list(start) for _ in range(n_stories)]
    for begin in range(0, n_stories, 64):  # 64 in a batch
        numbers = range(begin, min(begin + 64, n_stories))
        rows = [Row(start, max_new_tokens, sampling, seed=number) for number in numbers]
        for row, event in generate_batch(model, rows):
            if isinstance(event, int):
                stories[begin + row].append(event)
    return stories
