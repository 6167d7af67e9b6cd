"""A sparse autoencoder: the residual stream as a sum of a few directions out of many, each of which may mean something.

Of 1,536 features only the 16 largest of a token may be active (Gao et al. 2024, "Scaling and evaluating sparse
autoencoders"). The figures: how much of the variance they explain, and what the model loses if it has to continue with
the reconstruction.
"""

import tempfile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from stories import tell_stories
from torch import Tensor

import llama3_raw
from llama3_raw.ops import Tap, no_tap

LAYER = "layers.2.residual"
CONTEXT = 96  # tokens
N_STORIES = 160
N_FEATURES, N_ACTIVE = 1536, 16
STEPS, ROWS = 600, 512  # of training, and tokens in each


class Autoencoder(NamedTuple):
    """decode(encode(x)) is near x; its tensors are trained in place."""

    encoder: Tensor  # [dim, N_FEATURES]
    decoder: Tensor  # [N_FEATURES, dim], rows of length 1
    bias: Tensor  # [dim]
    scale: float  # of the stream, so that the autoencoder sees values near 1

    def encode(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., N_FEATURES], of which N_ACTIVE are not zero."""
        activations = (x / self.scale - self.bias) @ self.encoder
        top = activations.topk(N_ACTIVE, dim=-1)
        return torch.zeros_like(activations).scatter(-1, top.indices, F.relu(top.values))

    def decode(self, features: Tensor) -> Tensor:
        """[..., N_FEATURES] -> [..., dim]"""
        return (features @ self.decoder + self.bias) * self.scale


def train_autoencoder(x: Tensor) -> Autoencoder:
    """x [N, dim] -> an autoencoder trained on random rows of it."""
    scale = float(x.std())
    decoder = F.normalize(torch.randn(N_FEATURES, x.shape[1]), dim=-1)
    sae = Autoencoder(decoder.T.clone(), decoder, x.mean(0) / scale, scale)
    parameters = [tensor.requires_grad_() for tensor in sae[:3]]
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    for _ in range(STEPS):
        rows = x[torch.randint(len(x), (ROWS,))]
        loss = ((sae.decode(sae.encode(rows)) - rows) / scale).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            decoder.copy_(F.normalize(decoder, dim=-1))
    for tensor in parameters:
        tensor.requires_grad_(False)
    return sae


@torch.no_grad()
def loss_of(model: llama3_raw.Model, windows: Tensor, tap: Tap = no_tap) -> float:
    """The mean of -log p over the tokens of windows [n, T]."""
    logits = llama3_raw.forward(model.weights, model.params, windows, tap=tap)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).item()


torch.manual_seed(0)
model = llama3_raw.load("tiny", dtype="float32")
stories = [story[:CONTEXT] for story in tell_stories(model, N_STORIES, CONTEXT) if len(story) >= CONTEXT]
windows = torch.tensor(stories)  # [n, CONTEXT]
n_train = int(0.8 * len(stories))

with tempfile.TemporaryDirectory() as folder:
    kept = llama3_raw.collect(model, windows, LAYER, to=folder)
    x = kept[LAYER][kept.positions > 0]  # the first token's stream is unlike all others
    train, test = x.split([n_train * (CONTEXT - 1), len(x) - n_train * (CONTEXT - 1)])
    sae = train_autoencoder(train)
    features = sae.encode(test)
    explained = 1 - (sae.decode(features) - test).square().sum() / (test - test.mean(0)).square().sum()
    alive = (sae.encode(train) > 0).any(0)
    print(
        f"{len(train)} tokens to train on, {len(test)} to test; {N_FEATURES} features, {int(alive.sum())} of them alive"
    )
    print(f"variance explained by {N_ACTIVE} features a token: {explained:.1%}")

    def reconstruct(stream: Tensor) -> Tensor:
        """The stream [n, T, dim], from the second token on as the autoencoder has it."""
        return torch.cat((stream[:, :1], sae.decode(sae.encode(stream[:, 1:]))), dim=1)

    def forget(stream: Tensor) -> Tensor:
        """The same with the mean in its place."""
        return torch.cat((stream[:, :1], train.mean(0).expand_as(stream[:, 1:])), dim=1)

    held_out = windows[n_train:]
    clean = loss_of(model, held_out)
    reconstructed = loss_of(model, held_out, llama3_raw.patch({LAYER: reconstruct}))
    without = loss_of(model, held_out, llama3_raw.patch({LAYER: forget}))
    recovered = (without - reconstructed) / (without - clean)
    print(f"nats per token: {clean:.3f}; with the reconstruction {reconstructed:.3f}, with the mean {without:.3f}")
    print(f"loss recovered: {recovered:.1%}")

    # what a feature means: the tokens where it is largest
    tokens = kept.tokens[kept.positions > 0][len(train) :]
    share = (features > 0).float().mean(0)
    for feature in ((share > 0.002) & (share < 0.02)).nonzero().flatten()[:8].tolist():
        top = tokens[features[:, feature].topk(8).indices].tolist()
        words = ", ".join(dict.fromkeys(repr(model.tokenizer.name(token)) for token in top))
        print(f"feature {feature:4}, active on {share[feature]:.1%} of the tokens: {words}")
