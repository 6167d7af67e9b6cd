"""05: attention, from a weighted mean to grouped-query heads.

The question: "it" alone means nothing, so how does a token's row get information from other tokens?
The idea: each token has a query; every token up to it has a key, and the better the key matches, the more of that
token's value is added. What to look at: four steps, each a few lines longer than the one before.

Before attention, a recurrent encoder compressed a whole sentence into one hidden state, and the decoder had only that;
with attention the decoder can look at every word again (Bahdanau et al. 2014).

    python examples/05_attention.py --picture attention.png
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from lesson import open_model, save, show, title
from matplotlib.figure import Figure

from llama3_raw import REFERENCE, trace
from llama3_raw.model import rms_norm, rope, rope_rotation, token_positions
from llama3_raw.tracing import plots

model, tokenizer, picture = open_model(__doc__, draws=True)
params, layer = model.params, model.weights.layers[0]
ids = tokenizer.encode("The dog saw the cat and it", bos=True)
length, head_dim = len(ids), params.head_dim
words = [tokenizer.decode([token]) for token in ids]
x = model.weights.tok_embeddings[torch.tensor(ids)]  # [T, dim]
x = rms_norm(x, layer.attention_norm, params.norm_eps)  # [T, dim] (lesson 06)
show("x", x)

title("1. Plain attention: each token attends to similar tokens")
scores = x @ x.T  # [T, T]: the dot product of each pair of tokens
show("scores = x @ x.T", scores)
probs = scores.float().softmax(dim=-1)  # [T, T]: each row sums to 1
show("probs = softmax(scores)", probs)
context = probs @ x.float()  # [T, T] @ [T, dim] -> [T, dim]
show("context = probs @ x", context)
by_loop = torch.zeros_like(context)
for i in range(length):
    for j in range(length):
        by_loop[i] += probs[i, j] * x[j].float()
assert torch.allclose(context, by_loop, rtol=1e-4, atol=1e-5)
assert torch.allclose(probs.sum(dim=-1), torch.ones(length))
assert torch.equal(probs.argmax(-1), torch.arange(length))
print("a weighted mean of all rows; but each token is most similar to itself, and nothing here is learned")

title("2. Trainable: one matrix for queries, one for keys, one for values")
seen = trace(model, ids, "layers.0.attention*", ops=REFERENCE)  # llama3_raw's tensors, to compare with
animals = [words.index(" dog"), words.index(" cat")]
# the head of layer 0 in which "it" attends most to the animals, and the kv head that it shares with others (step 4)
chosen = int(seen["layers.0.attention.probs"][:, -1, animals].sum(-1).argmax())
chosen_kv = chosen // (params.n_heads // params.n_kv_heads)
wq = layer.wq.view(-1, head_dim, params.dim)[chosen]  # [head_dim, dim]
wk, wv = (w.view(-1, head_dim, params.dim)[chosen_kv] for w in (layer.wk, layer.wv))  # each [head_dim, dim]
q, k, v = x @ wq.T, x @ wk.T, x @ wv.T  # each [T, head_dim]
for name, tensor in ((f"wq of head {chosen}", wq), ("q = x @ wq.T", q), ("k = x @ wk.T", k), ("v = x @ wv.T", v)):
    show(name, tensor)
# RoPE (lesson 04); unsqueeze(1) adds the dimension of heads
rotation = rope_rotation(token_positions(0, length, x.device), params)
q, k = rope(q.unsqueeze(1), *rotation).squeeze(1), rope(k.unsqueeze(1), *rotation).squeeze(1)
scores = q @ k.T / math.sqrt(head_dim)  # [T, T]
show("scores = q @ k.T / √head_dim", scores)
random_pairs = torch.randn(10_000, 2, head_dim, generator=torch.Generator().manual_seed(0))
spread = (random_pairs[:, 0] * random_pairs[:, 1]).sum(-1).std()
print(f"why √head_dim: dot products of {head_dim} random values have a standard deviation of {spread:.1f}, about")
print(f"√{head_dim} = {head_dim**0.5:.1f}; without the division, softmax would give the largest score nearly all the")
print("weight, and its gradient would be near 0")

title("3. Causal: no token sees later ones, or there would be nothing left to predict")
future = torch.ones(length, length, dtype=torch.bool).triu(1)  # [T, T]: True above the diagonal
masked = scores.masked_fill(future, -torch.inf)
probs = F.softmax(masked.float(), dim=-1).to(q.dtype)  # in fp32 and cast back, as Meta does
for word, row in zip(words, probs.tolist(), strict=True):
    print(f"  {word!r:>20} " + " ".join(f"{p:.2f}" if p else "  · " for p in row))
assert not probs[future].any()
assert torch.equal(probs, seen["layers.0.attention.probs"][chosen])
on_animals = float(probs[-1, animals].sum())
print(f"the last row: 'it' gives {on_animals:.0%} of its attention to the dog and the cat")
alone = F.softmax(masked[:3, :3].float(), dim=-1).to(q.dtype)
assert torch.equal(alone, probs[:3, :3])
print("later tokens do not change the row of an earlier one, so keys and values can be cached (lesson 08)")
torch.manual_seed(0)
dropped = F.dropout(probs.float(), p=0.5, training=True)
left, total = int((dropped > 0).sum()), int((probs > 0).sum())
print(f"in training, dropout can set probabilities to 0: here {left} of {total} remain, doubled to keep the sum the")
print("same on average")
print("(Meta's Llama code has none; dropout helps with small texts that are seen many times)")
assert torch.equal(F.dropout(probs, p=0.5, training=False), probs)

title("4. Several heads: different queries at once; neighbouring query heads share a kv head")
n_heads, n_kv_heads = params.n_heads, params.n_kv_heads
group_size = n_heads // n_kv_heads
print(f"  {n_heads} query heads, {n_kv_heads} kv heads: {group_size} share one (grouped-query; Ainslie et al. 2023)")
heads = []
for head in range(n_heads):
    kv_head = head // group_size
    wq = layer.wq[head * head_dim : (head + 1) * head_dim]  # [head_dim, dim]
    wk = layer.wk[kv_head * head_dim : (kv_head + 1) * head_dim]
    wv = layer.wv[kv_head * head_dim : (kv_head + 1) * head_dim]
    q, k, v = x @ wq.T, x @ wk.T, x @ wv.T  # each [T, head_dim]
    q, k = rope(q.unsqueeze(1), *rotation).squeeze(1), rope(k.unsqueeze(1), *rotation).squeeze(1)
    masked = (q @ k.T / math.sqrt(head_dim)).masked_fill(future, -torch.inf)  # [T, T]
    heads.append(F.softmax(masked.float(), dim=-1).to(q.dtype) @ v)  # [T, head_dim]
joined = torch.cat(heads, dim=-1)  # [T, n_heads * head_dim]
show("one head", heads[0])
show("all heads, joined", joined)
show("wo", layer.wo)
out = joined @ layer.wo.T  # [T, n_heads * head_dim] @ [n_heads * head_dim, dim] -> [T, dim]
show("out = joined @ wo.T", out)
print(f"the KV cache holds, for each token and layer, keys and values of {n_kv_heads} heads, not {n_heads}")

title("Bit-identical to llama3_raw's attention")
assert torch.equal(x, seen["layers.0.attention_norm"])
assert torch.equal(torch.stack(heads, dim=1), seen["layers.0.attention.heads"])
assert torch.equal(out, seen["layers.0.attention.out"])
for name in ("layers.0.attention_norm", "layers.0.attention.heads", "layers.0.attention.out"):
    show(name, seen[name])


def draw() -> Figure:
    """Return a plot of the attention of the head of step 3."""
    return plots.attention(seen, 0, chosen, tokenizer=tokenizer)


if picture:
    save(draw(), picture)
