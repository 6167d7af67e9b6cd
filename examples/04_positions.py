"""04: positions: learned, sinusoidal, relative, and RoPE.

The question: attention computes a sum, which does not depend on order, so how can it distinguish "dog bites man" from
"man bites dog"? The idea: encode the position of every token; Llama rotates queries and keys by an angle that grows
with the position. What to look at: four ways to do this, and how a score depends only on the distance after the
rotation.

    python examples/04_positions.py --picture positions.png
"""

from __future__ import annotations

import torch
from lesson import open_model, save, show, title
from matplotlib.figure import Figure

from llama3_raw import trace
from llama3_raw.model import attend, rms_norm, rope, rope_frequencies, rope_rotation, token_positions
from llama3_raw.ops import no_tap
from llama3_raw.tracing import plots

model, tokenizer, picture = open_model(__doc__, draws=True)
params, layer = model.params, model.weights.layers[0]
generator = torch.Generator().manual_seed(0)
by_head = (-1, params.head_dim)

title("Without positions, the attention of a layer does not depend on the order")
one_order = tokenizer.encode("The dog saw the cat", bos=True)
other_order = [*reversed(one_order[:-1]), one_order[-1]]  # the same tokens before the same last one
print(f"  {tokenizer.decode(one_order)!r}")
print(f"  {tokenizer.decode(other_order)!r}")


def embed(ids: list[int]) -> torch.Tensor:
    """[T] -> [T, dim] fp32, so that rounding is small compared with the differences shown."""
    rows: torch.Tensor = model.weights.tok_embeddings[torch.tensor(ids)]
    return rows.float()


def last_row_of_attention(x: torch.Tensor, rotated: bool = False) -> torch.Tensor:
    """[T, dim] -> [n_heads, head_dim]: the output of layer 0's heads for the last token, with or without RoPE."""
    normed = rms_norm(x, layer.attention_norm.float(), params.norm_eps)
    q, k, v = ((normed @ w.float().T).unflatten(-1, by_head) for w in (layer.wq, layer.wk, layer.wv))  # [T, heads, …]
    if rotated:
        rotation = rope_rotation(token_positions(0, len(x), x.device), params)
        q, k = rope(q, *rotation), rope(k, *rotation)
    return attend(q, k, v, 0, no_tap)[-1]


def difference(add: torch.Tensor | None = None, rotated: bool = False) -> float:
    """Return the relative difference in the last token's attention between the two orders. add: [T, dim]."""
    added = 0 if add is None else add
    one, other = (last_row_of_attention(embed(ids) + added, rotated) for ids in (one_order, other_order))
    return float((one - other).norm() / one.norm())


without = difference()
print(f"the last token's attention differs by {without:.1e}, which is rounding")
print("(a second layer can see some of the order: with the causal mask, its input rows depend on different")
print("beginnings; Haviv et al. 2022)")
assert without < 1e-5

title("1. Learned absolute positions: a second table, one row per position (GPT-2)")
max_seq_len = 64
size = embed(one_order).std()  # makes the positions as large as the embeddings
learned = torch.randn(max_seq_len, params.dim, generator=generator) * size  # untrained here
show("position table", learned)
show("tokens + positions", embed(one_order) + learned[: len(one_order)])
with_learned = difference(add=learned[: len(one_order)])
print(f"now the two orders differ by {with_learned:.2f}; but the table has no row {max_seq_len}")
assert with_learned > 0.01

title("2. Sinusoidal positions: the table is computed, for any position (Vaswani et al. 2017, section 3.5)")
positions = torch.arange(max_seq_len)  # [max_seq_len]
frequencies = 10000.0 ** (-torch.arange(0, params.dim, 2) / params.dim)  # [dim/2]
angles = positions[:, None] * frequencies  # [max_seq_len, dim/2]
sinusoidal = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)  # [max_seq_len, dim]
show("sinusoidal", sinusoidal)
scaled = sinusoidal[: len(one_order)] * size
print(f"the two orders differ by {difference(add=scaled):.2f}")
assert difference(add=scaled) > 0.01

title("3. Relative positions: a number for each distance, added to the scores (T5; Raffel et al. 2020)")
# Shaw et al. (2018), who came first, add a learned vector per distance to the keys; T5 has one number per head
length = len(one_order)
distance = torch.arange(length)[:, None] - torch.arange(length)  # [T, T]: how far back each key is
by_distance = torch.randn(max_seq_len, generator=generator)  # learned in a real model
bias = by_distance[distance.clamp(min=0)]  # [T, T]
show("distance", distance)
show("bias of the last token", bias[-1])
assert torch.equal(bias.diagonal(-1), by_distance[1].expand(length - 1))  # all adjacent tokens share one number
print("the same number along each diagonal: only the distance between two tokens matters, not their positions")


def head_output(ids: list[int]) -> torch.Tensor:
    """[T] -> [head_dim]: the output of head 0 for the last token, with the bias added to its scores."""
    normed = rms_norm(embed(ids), layer.attention_norm.float(), params.norm_eps)
    q, k, v = (normed @ w[: params.head_dim].float().T for w in (layer.wq, layer.wk, layer.wv))  # [T, head_dim]
    probs = (q[-1] @ k.T / params.head_dim**0.5 + bias[-1]).softmax(-1)  # [T]
    return torch.matmul(probs, v)


one, other = head_output(one_order), head_output(other_order)
print(f"the two orders differ by {(one - other).norm() / one.norm():.2f}")
assert (one - other).norm() > 0.01 * one.norm()

title("4. RoPE: each pair of values is a point in the plane, rotated by position × frequency (Su et al. 2021)")
pair_frequencies = rope_frequencies(params, torch.device("cpu"))  # [head_dim/2], in radians per position
show("frequencies", pair_frequencies)
full_turn = 2 * torch.pi / pair_frequencies  # [head_dim/2], in positions
print(f"a full turn of the first pair takes {full_turn[0]:.1f} tokens, of the last {full_turn[-1]:,.0f}")

positions = token_positions(0, length, torch.device("cpu"))  # [T]
angles = positions[:, None] * pair_frequencies  # [T, head_dim/2]
normed = rms_norm(embed(one_order), layer.attention_norm.float(), params.norm_eps)
q = (normed @ layer.wq.float().T).unflatten(-1, by_head)  # [T, n_heads, head_dim]
show("q", q)
pairs = q.unflatten(-1, (-1, 2))  # [T, n_heads, head_dim/2, 2]
show("q in pairs", pairs)

rotations = torch.polar(torch.ones_like(angles), angles)  # [T, head_dim/2] complex: points on the unit circle
show("rotations, as angles", rotations.angle())
rotated_pairs = torch.view_as_complex(pairs) * rotations[:, None]  # [T, n_heads, head_dim/2] complex
complex_form = torch.view_as_real(rotated_pairs).flatten(-2)  # [T, n_heads, head_dim]
real_form = rope(q, *rope_rotation(positions, params))  # llama3_raw's, from cos and sin
show("rotated q", real_form)
if params.head_dim % 16 == 0:  # true for every Llama; see rope()
    assert torch.equal(complex_form, real_form)
    print("Meta's complex product and llama3_raw's cos and sin give the same bits; RoPE has no parameters")
assert torch.equal(real_form[0], q[0])  # position 0 is not rotated
assert torch.allclose(real_form.norm(dim=-1), q.norm(dim=-1))  # a rotation preserves lengths

title("After RoPE, a score depends only on the distance")
query, key = torch.randn(2, 1, 1, params.head_dim, generator=generator)  # each [T = 1, heads = 1, head_dim]
print(f"  {'query at':>10} {'key at':>8}   score")
scores = []
for query_at, key_at in ((3, 0), (13, 10), (203, 200), (13, 3)):
    rotated_query = rope(query, *rope_rotation(torch.tensor([query_at]), params))
    rotated_key = rope(key, *rope_rotation(torch.tensor([key_at]), params))
    scores.append(float((rotated_query * rotated_key).sum()))
    print(f"  {query_at:10} {key_at:8}   {scores[-1]:.5f}")
assert max(abs(scores[0] - score) for score in scores[1:3]) < 1e-3  # fp32 has about 5 decimals near 200 radians
assert abs(scores[0] - scores[3]) > 0.01

title("With RoPE, llama3_raw's attention distinguishes the two orders")
print(f"the last token's attention differs by {difference(rotated=True):.2f}")
assert difference(rotated=True) > 0.01


def draw() -> Figure:
    """Return a plot of four pairs of the last token's query, before and after their rotation."""
    return plots.rope_turns(trace(model, one_order, "layers.0.attention.q*"), params, layer=0, head=0)


if picture:
    save(draw(), picture)
