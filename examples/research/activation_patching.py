"""Activation patching and logit attribution: where in the model does "cat" become the answer, and which heads say so?

Two prompts differ in one word. Each run over the one with the dog gets a tensor of the other, at one position of one
layer (Meng et al. 2022): where does that turn the answer? And of what a head writes at the last token, how much is the
answer itself (Elhage et al. 2021)? A head that patching finds and attribution does not acts through later layers.

    python examples/research/activation_patching.py [MODEL] [--picture FILE]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from llama3_raw import attribute, load, plots, sweep, trace

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="tiny", help="a name, a folder or a .gguf file")
parser.add_argument("--picture", metavar="FILE", help="draw the effects of layers and positions to FILE")
options = parser.parse_args()

model = load(options.model, dtype=torch.float32)
tokenizer, n_layers, n_heads = model.tokenizer, model.params.n_layers, model.params.n_heads
assert tokenizer is not None
clean_ids, ids = (tokenizer.encode(f"The {animal} was happy. Lily and the", bos=True) for animal in ("cat", "dog"))
cat, dog = (tokenizer.encode(word)[0] for word in (" cat", " dog"))


def metric(logits: Tensor) -> Tensor:
    """[..., T, vocab_size] -> [...]: the logit of the cat minus that of the dog."""
    return logits[..., -1, cat] - logits[..., -1, dog]


clean = trace(model, clean_ids)
before, after = metric(trace(model, ids, "logits")["logits"]), metric(clean["logits"])
print(f"cat - dog: {after:+.2f}, and {before:+.2f} with the dog")

# the stream, at each layer and position: 1 is the answer of the other prompt, 0 that of this one
stream = ["tok_embeddings", *(f"layers.{i}.residual" for i in range(n_layers))]
restored = (sweep(model, ids, clean, stream, metric) - before) / (after - before)
words = [tokenizer.decode([token]) for token in ids]
for position in (int(restored[0].argmax()), len(ids) - 1):
    print(f"{words[position]!r:9}", " ".join(f"{value:4.0%}" for value in restored[:, position]))

# each head: what its result restores, and what it writes into the logits itself
by_patching = (sweep(model, ids, clean, "layers.*.attention.heads", metric, by="head") - before) / (after - before)
(_, now), (_, then) = (attribute(kept, model, (cat, dog)) for kept in (clean, trace(model, ids)))
written = (now - then) / (after - before)
print("head   restored  written")
for index in by_patching.flatten().topk(4).indices.tolist():
    layer, head = divmod(index, n_heads)
    print(f"{layer}.{head:<5}{by_patching[layer, head]:8.0%} {written[layer, head]:8.0%}")

if options.picture:
    plots.heat(restored, stream, words, title="restored by the stream").savefig(options.picture, dpi=150)
    print(f"wrote {options.picture}")
