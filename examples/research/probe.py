"""A linear probe: where does the residual stream know that a quotation is open?

"mom" is the same token in speech and outside of it. Whether a quotation mark is open depends on all marks before it, so
the embedding cannot know, and attention has to bring it. A logistic regression on each layer shows where it is there.
"""

import tempfile

import torch
import torch.nn.functional as F
from stories import tell_stories
from torch import Tensor

import llama3_raw

CONTEXT = 96  # tokens
N_STORIES = 160


def train_probe(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, dim], y [N] of 0 and 1 -> weight [dim] and bias of a logistic regression, with a little weight decay."""
    weight, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(x @ weight + bias, y) + 1e-3 * weight.square().sum()
        value.backward()
        return value.item()

    optimizer.step(loss)
    return weight.detach(), bias.detach()


torch.manual_seed(0)
model = llama3_raw.load("tiny")
stories = [story[:CONTEXT] for story in tell_stories(model, N_STORIES, CONTEXT) if len(story) >= CONTEXT]
windows = torch.tensor(stories)  # [n, CONTEXT]; each is a window of its own

# the label of a token: whether the number of marks up to it is odd; tokens with a mark would give it away
marks = torch.tensor([[model.tokenizer.name(token).count('"') for token in story] for story in stories])
labels, has_mark = (marks.cumsum(-1) % 2).flatten().float(), marks.flatten() > 0

with tempfile.TemporaryDirectory() as folder:
    kept = llama3_raw.collect(model, windows, "tok_embeddings", "layers.*.residual", to=folder)
    held_out = torch.arange(len(kept.tokens)) // CONTEXT >= 0.8 * len(stories)  # whole stories
    train, test = ~held_out & ~has_mark, held_out & ~has_mark
    always_no = 1 - labels[test].mean()
    print(f"{len(stories)} stories, {int(train.sum())} tokens to train on, {int(test.sum())} to test")
    print(f"{'always the more frequent answer':32} {max(always_no, 1 - always_no):.1%}")
    for name, x in kept.items():
        x = x.float()
        x = (x - x[train].mean(0)) / x[train].std(0)
        weight, bias = train_probe(x[train], labels[train])
        accuracy = ((x[test] @ weight + bias > 0) == labels[test].bool()).float().mean()
        print(f"{name:32} {accuracy:.1%}")
