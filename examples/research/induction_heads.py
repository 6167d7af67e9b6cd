"""Induction heads: which heads find the earlier copy of a token, and copy what came after it?

On random tokens that come twice, nothing but copying predicts the second half. The scores say how much a head attends
to the token after the earlier copy (Olsson et al. 2022); the loss without these heads, whether the model needs them;
and the composition of weights (Elhage et al. 2021), which previous-token head they read. The built-in model has none:
its stories hardly repeat. SmolLM2-135M has several, the first at layer 17.

    python examples/research/induction_heads.py [MODEL] [--picture FILE]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from llama3_raw import (
    attention_at,
    composition,
    fold_norms,
    induction_scores,
    load,
    patch,
    plots,
    repeated_tokens,
    trace,
)
from llama3_raw.ops import Tap, no_tap
from llama3_raw.perplexity import perplexity

LENGTH = 64  # random tokens, before they are repeated
N_HEADS = 5  # how many heads to show, and to ablate

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="tiny", help="a name, a folder or a .gguf file")
parser.add_argument("--picture", metavar="FILE", help="draw the scores of all heads to FILE")
options = parser.parse_args()

model = load(options.model, dtype=torch.float32)
params = model.params
ids = repeated_tokens(model, LENGTH)


def top_heads(scores: Tensor, n: int) -> list[tuple[int, int]]:
    """[layers, heads] -> the n heads with the largest, as (layer, head)."""
    return [divmod(int(index), params.n_heads) for index in scores.flatten().topk(n).indices]


def loss(tap: Tap = no_tap) -> tuple[float, float]:
    """The mean loss in the first and in the second half, in nats per token."""
    logprobs = perplexity(model, ids, per_token=True, tap=tap).logprobs
    assert logprobs is not None
    second = len(ids) - LENGTH + 1  # its first token follows nothing that was seen
    return -logprobs[1 : second - 1].mean().item(), -logprobs[second:].mean().item()


def without(heads: list[tuple[int, int]]) -> Tap:
    """A tap that sets the results of heads to zero."""

    def silence(tensor: Tensor, name: str) -> Tensor:  # [..., T, n_heads, head_dim]
        tensor = tensor.clone()
        tensor[..., [head for layer, head in heads if name.startswith(f"layers.{layer}.")], :] = 0
        return tensor

    return patch({f"layers.{layer}.attention.heads": silence for layer in {layer for layer, _ in heads}})


# which heads attend to the token after the earlier copy?
induction = induction_scores(model, length=LENGTH)
previous = attention_at(trace(model, ids, "*.probs"), 1)
found = top_heads(induction, N_HEADS)
print("induction heads:     ", ", ".join(f"{layer}.{head} {induction[layer, head]:.0%}" for layer, head in found))
before = top_heads(previous, N_HEADS)
print("previous-token heads:", ", ".join(f"{layer}.{head} {previous[layer, head]:.0%}" for layer, head in before))

# does the model need them?
first, second = loss()
print(f"loss: {first:.2f} nats per token, and {second:.2f} where the tokens repeat")
print(f"  without these induction heads: {loss(without(found))[1]:.2f}")
layers = sorted({layer for layer, _ in found})
others = [(i, j) for i in layers for j in range(params.n_heads) if (i, j) not in found][:N_HEADS]
print(f"  without as many others of their layers: {loss(without(others))[1]:.2f}")

# whose outputs do the keys of the strongest read?
layer, head = found[0]
read = composition(fold_norms(model.weights), params, "K")[:, :, layer, head]
print(
    f"what the keys of {layer}.{head} read most: "
    + ", ".join(f"{i}.{j} {read[i, j]:.3f}" for i, j in top_heads(read, 3))
)

if options.picture:
    rows = [f"layer {i}" for i in range(params.n_layers)]
    plots.heat(induction, rows, title="induction scores").savefig(options.picture, dpi=150)
    print(f"wrote {options.picture}")
