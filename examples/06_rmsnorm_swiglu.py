"""06: RMSNorm and SwiGLU, the rest of a layer.

The question: what keeps the numbers in a stack of layers from exploding, and what does a layer do besides attention?
The idea: a norm gives every row the same size before it is used, while layers only add to the residual stream; then
each row passes alone through a wide hidden layer, in which one half gates the other. What to look at: RMSNorm and
LayerNorm, SwiGLU and ReLU.

    python examples/06_rmsnorm_swiglu.py --picture activations.png
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from lesson import open_model, save, show, title
from matplotlib.figure import Figure

from llama3_raw import REFERENCE, trace
from llama3_raw.model import feed_forward, rms_norm
from llama3_raw.ops import no_tap
from llama3_raw.tracing.plots import Picture

model, tokenizer, picture = open_model(__doc__, draws=True)
params, layers = model.params, model.weights.layers
ids = tokenizer.encode("Once upon a time", bos=True)
seen = trace(model, ids, ops=REFERENCE)  # the exact operations, to compare bit for bit

title("Why a norm, and why before each block: the residual stream grows")
x = seen["tok_embeddings"]  # [T, dim]
for name in ("tok_embeddings", "layers.0.residual", f"layers.{len(layers) - 1}.residual"):
    print(f"  {name:<24} root mean square of the last row: {seen[name][-1].float().square().mean().sqrt():8.3f}")
for i in range(len(layers)):
    before = seen["tok_embeddings" if i == 0 else f"layers.{i - 1}.residual"]
    assert torch.equal(seen[f"layers.{i}.attention.residual"], before + seen[f"layers.{i}.attention.out"])
    between = seen[f"layers.{i}.attention.residual"]
    assert torch.equal(seen[f"layers.{i}.residual"], between + seen[f"layers.{i}.feed_forward.out"])
print("every layer only adds to the stream, and reads a normalized copy of it")
# the first Transformer normalized the sum instead; compared here with 32 layers of random matrices
dim, count = 1024, 32
for order in ("after", "before"):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(dim, generator=generator)  # [dim]: in place of an embedding
    stream, one = first, torch.ones(dim)
    for _ in range(count):
        matrix = torch.randn(dim, dim, generator=generator) / math.sqrt(dim)
        if order == "after":
            stream = rms_norm(stream + matrix @ stream, one, 1e-5)
        else:
            stream = stream + matrix @ rms_norm(stream, one, 1e-5)
    similarity = float(torch.cosine_similarity(stream, first, dim=0))
    expected = 2 ** (-count / 2) if order == "after" else 1 / math.sqrt(1 + count)
    print(f"  norm {order} the sum, {count} layers: the cosine of stream and embedding is {similarity:+.3f}", end=" ")
    print(f"(theory: {expected:.5f}; two unrelated rows: ±{1 / math.sqrt(dim):.3f})")
    assert abs(similarity - expected) < 4 / math.sqrt(dim)
print("with the norm after the sum, each of these layers divides the contribution of all earlier ones by √2, and also")
print("the gradient that flows straight back; with the norm before it, each adds the same amount, and training works")
print("even without a warm-up (Xiong et al. 2020)")

title("RMSNorm by hand: each row divided by its root mean square, times a learned weight")
weight = layers[0].attention_norm  # [dim]
mean_square = x.float().square().mean(dim=-1, keepdim=True)  # [T, 1], in fp32
show("mean square", mean_square)
by_hand = (x.float() * torch.rsqrt(mean_square + params.norm_eps)).to(x.dtype) * weight  # [T, dim]
show("normalized", by_hand)
assert torch.equal(by_hand, rms_norm(x, weight, params.norm_eps))
assert torch.equal(by_hand, seen["layers.0.attention_norm"])
print("bit-identical to llama3_raw's")

title("LayerNorm also subtracts the mean and adds a bias; RMSNorm does not (Zhang & Sennrich 2019)")
row = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
one = torch.ones(4)
show("a row", row)
show("LayerNorm", F.layer_norm(row, (4,), eps=0.0))
show("RMSNorm", rms_norm(row, one, 0.0))
centred = row - row.mean()
show("RMSNorm of the centred row", rms_norm(centred, one, 0.0))
assert torch.allclose(F.layer_norm(row, (4,), eps=0.0), rms_norm(centred, one, 0.0))
assert torch.allclose(rms_norm(10 * row, one, 0.0), rms_norm(row, one, 0.0))
assert torch.allclose(F.layer_norm(10 * row, (4,), eps=0.0), F.layer_norm(row, (4,), eps=0.0))
print("for a row with mean 0 they are equal; multiplying a row by ten changes the output of neither")
means = x.float().mean(dim=-1).abs() / mean_square.squeeze(-1).sqrt()  # [T]
chance = 1 / math.sqrt(params.dim)
print(f"the rows' means here are {means.mean():.2f} of their root mean square; random rows would have {chance:.2f}")

title("Activations: ReLU has a kink at 0, GELU and SiLU are smooth")
points = torch.tensor([-3.0, -1.0, -0.1, 0.0, 0.1, 1.0, 3.0])
print(f"  {'x':>6} " + " ".join(f"{value:7.2f}" for value in points.tolist()))
for name, function in (("ReLU", F.relu), ("GELU", F.gelu), ("SiLU", F.silu)):
    print(f"  {name:>6} " + " ".join(f"{value:7.3f}" for value in function(points).tolist()))
assert torch.allclose(F.silu(points), points * torch.sigmoid(points))
gelu = points * 0.5 * (1 + torch.erf(points / math.sqrt(2)))  # x times the normal distribution function of x
assert torch.allclose(F.gelu(points), gelu, atol=1e-6)
print("SiLU is x · sigmoid(x): smooth, and with a gradient for negative x too")

title("SwiGLU: one product gives the values, another gates them (Shazeer 2020)")
block = layers[0]
normed = seen["layers.0.ffn_norm"]  # [T, dim]
gate = normed @ block.w1.T  # [T, hidden_dim]
up = normed @ block.w3.T  # [T, hidden_dim]
hidden = F.silu(gate) * up  # [T, hidden_dim]
out = hidden @ block.w2.T  # [T, dim]
for name, tensor in (("gate = x @ w1.T", gate), ("up = x @ w3.T", up), ("silu(gate) * up", hidden), ("out", out)):
    show(name, tensor)
assert torch.equal(out, feed_forward(normed, block, REFERENCE, no_tap))
assert torch.equal(out, seen["layers.0.feed_forward.out"])
print("bit-identical to llama3_raw's")
active = [((f(gate) * up).abs() > 0.01).float().mean() for f in (F.relu, F.silu)]
print(f"with ReLU as the gate, {active[0]:.0%} of the units would exceed 0.01 in magnitude, with SiLU {active[1]:.0%}")
n_parameters = 3 * params.dim * params.hidden_dim
print(f"three matrices, {n_parameters:,} parameters: with a hidden_dim of 2/3 of the usual 4 × dim they cost as much")
print(f"as ReLU's two; here hidden_dim is {params.hidden_dim / (4 * params.dim):.2f} of 4 × dim (in Llama-3-8B: 0.88)")


def draw() -> Figure:
    """Return plots of the three activations and of silu(gate) · up, with a mark for each gate of the last token."""
    figure = Picture(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    line = torch.linspace(-4, 4, 200)
    for name, function, style in (("ReLU", F.relu, ":"), ("GELU", F.gelu, "--"), ("SiLU", F.silu, "-")):
        left.plot(line.numpy(), function(line).numpy(), style, label=name)
    left.legend(frameon=False)
    left.set(title="activations", xlabel="x")
    for value in (-1.0, 1.0, 2.0):
        right.plot(line.numpy(), (F.silu(line) * value).numpy(), label=f"up = {value:+.0f}")
    gates = gate[-1].float()  # [hidden_dim]
    right.plot(gates.numpy(), [-2.6] * len(gates), "|", color="0.4", alpha=0.3)
    right.legend(frameon=False)
    right.set(title="silu(gate) · up", xlabel="gate (marks: those of the last token)")
    return figure


if picture:
    save(draw(), picture)
