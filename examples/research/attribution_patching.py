"""Attribution patching and integrated gradients: how well do gradients predict what patching does?

The question: a sweep runs the model once for every head or position that it patches. Can one backward pass tell the
same? The idea: to first order, patching a value changes the metric by (new value - old value) x gradient (Nanda 2023);
the mean of the gradients on the way between the values (Sundararajan et al. 2017) corrects for the curve. What to look
at: the correlation with real patching, for small changes (one head) and for large ones (the stream at one position).

    python examples/research/attribution_patching.py [MODEL] [--picture FILE]
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from llama3_raw import estimate_sweep, load, plots, sweep, trace
from llama3_raw.tracing.patching import By

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="weights/tiny", help="a folder or a .gguf file")
parser.add_argument("--picture", metavar="FILE", help="draw the effects of heads, patched and estimated, to FILE")
options = parser.parse_args()

model = load(options.model, dtype=torch.float32)
tokenizer = model.tokenizer
assert tokenizer is not None
texts = [f"Lily went to the park. She saw a big {animal}. The big" for animal in ("cat", "dog")]
ids, clean_ids = (tokenizer.encode(text, bos=True) for text in texts)
cat, dog = (tokenizer.encode(word)[0] for word in (" cat", " dog"))


def metric(logits: Tensor) -> Tensor:
    """[rows, T, vocab_size] -> [rows]: the logit of the dog minus that of the cat."""
    return logits[:, -1, dog] - logits[:, -1, cat]


clean = trace(model, clean_ids)
before, after = (metric(trace(model, it, "logits")["logits"][None]) for it in (ids, clean_ids))  # each [1]
for text, value in zip(texts, (before, after), strict=True):
    print(f"{text!r}: dog - cat = {float(value):+.2f}")

n_layers = model.params.n_layers
layers = range(0, n_layers, -(-n_layers // 10))  # at most ten: two minutes for any model


def compare(part: str, by: By) -> tuple[Tensor, Tensor]:
    """Print how well gradients estimate a sweep; return the effects [layers, n], patched and estimated in one pass."""
    names = [f"layers.{i}.{part}" for i in layers]
    start = time.perf_counter()
    patched = sweep(model, ids, clean, names, metric, by=by) - before
    print(f"\n{part} by {by}: {patched.numel()} patches, {time.perf_counter() - start:.1f} s")
    found = []
    for title, steps in (("attribution patching", None), ("integrated gradients, 5 steps", 5)):
        start = time.perf_counter()
        found.append(estimate_sweep(model, ids, clean, names, metric, by=by, steps=steps) - before)
        r = torch.corrcoef(torch.stack([found[-1].flatten(), patched.flatten()]))[0, 1]
        print(f"  {title:<30} correlation {float(r):.3f}, {time.perf_counter() - start:.1f} s")
    return patched, found[0]


heads = compare("attention.heads", "head")
row, head = divmod(int(heads[0].abs().argmax()), heads[0].shape[1])
print(f"  the head that matters most: layer {layers[row]}, head {head} ({float(heads[0][row, head]):+.2f})")
compare("residual", "position")

if options.picture:
    titles = [f"{how} {i}" for how in ("patched", "estimated") for i in range(model.params.n_heads)]
    plots.heat(torch.cat(heads, dim=1), [f"layer {i}" for i in layers], titles).savefig(options.picture, dpi=150)
    print(f"\nwrote {options.picture}")
