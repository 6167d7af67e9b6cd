"""Activation patching: which layer, at which token, carries what a story is about?

Two prompts differ in one animal. Each value of the stream from the prompt with the dog is put into the pass over the
one with the cat, one at a time; where the answer turns into "dog", that value carried the animal (Meng et al. 2022,
"Locating and Editing Factual Associations"). What to look at: it moves from the animal's token to the last one, and
which head moves it.

    python examples/research/activation_patching.py [MODEL] [--picture FILE]
"""

import argparse

from torch import Tensor

from llama3_raw import load, plots, sweep, trace

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="tiny", help="a folder, a .gguf file, or a name")
parser.add_argument("--picture", metavar="FILE", help="draw the heat map to FILE")
options = parser.parse_args()

model = load(options.model, dtype="float32")
layers = range(model.params.n_layers)
encode, name = model.tokenizer.encode, model.tokenizer.name
ids = encode("Lily went to the park. She saw a big cat. The big", bos=True)
clean_ids = encode("Lily went to the park. She saw a big dog. The big", bos=True)
dog, cat = encode(" dog")[0], encode(" cat")[0]


def metric(logits: Tensor) -> Tensor:
    """[rows, T, vocab_size] -> [rows]: the logit of the dog minus that of the cat."""
    return logits[:, -1, dog] - logits[:, -1, cat]


clean = trace(model, clean_ids)
low = metric(trace(model, ids, "logits")["logits"][None])
high = metric(clean["logits"][None])
print(
    f"dog - cat: {low.item():+.2f} with the cat, {high.item():+.2f} with the dog; patched, from 0 to 1 between them:\n"
)

stream = (sweep(model, ids, clean, "layers.*.residual", metric) - low) / (high - low)  # [layers, T]
print(f"{'token':>8}" + "".join(f"{f'layer {layer}':>9}" for layer in layers))
for position, token in enumerate(ids):
    if stream[:, position].abs().max() > 0.05:
        print(f"{name(token):>8}" + "".join(f"{effect:9.2f}" for effect in stream[:, position]))

heads = (sweep(model, ids, clean, "layers.*.attention.heads", metric, by="head") - low) / (high - low)
print("\nthe heads that carry most:")
for at in heads.flatten().topk(3).indices.tolist():
    layer, head = divmod(at, model.params.n_heads)
    weights, last = clean[f"layers.{layer}.attention.probs"][head, -1], len(ids) - 1
    looked_at = int(weights.argmax())
    print(
        f"layer {layer}, head {head}: {heads[layer, head]:.2f}; token {last} attends to {name(clean_ids[looked_at])!r}"
    )

if options.picture:
    figure = plots.heat(stream, [f"layer {i}" for i in layers], [name(token) for token in ids], title="dog, patched in")
    figure.savefig(options.picture)
