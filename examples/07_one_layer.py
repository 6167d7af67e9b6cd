"""07: a whole layer by hand.

The question: what does layer 0 compute, number by number, from the tensors of the checkpoint? The idea: only what
lessons 04 to 06 showed, one head at a time, in the order of the well-known notebook. What to look at: every shape (the
comments have those of Llama-3-8B), and that every step is bit-identical to llama3_raw's.

    python examples/07_one_layer.py
"""

from __future__ import annotations

import torch
from lesson import open_model, show, title

from llama3_raw import REFERENCE, trace

model, tokenizer, _ = open_model(__doc__)
params = model.params
# layer 0's nine tensors: wq is layers.0.attention.wq.weight in consolidated.00.pth, w1 layers.0.feed_forward.w1.weight
weights = model.weights.layers[0]
prompt = "the answer to the ultimate question of life, the universe, and everything is "
tokens = tokenizer.encode(prompt, bos=True)
# llama3_raw's tensors by the exact operations, to compare with
seen = trace(model, tokens, "tok_embeddings", "layers.0.*", ops=REFERENCE)

title("The prompt")
print(f"  {len(tokens)} tokens: {[tokenizer.decode([token]) for token in tokens]}")
token_embeddings = model.weights.tok_embeddings[torch.tensor(tokens)]  # [17, 4096]: [T, dim]
show("token_embeddings", token_embeddings)
print(f"  T = {len(tokens)}, dim = {params.dim}, head_dim = {params.head_dim}")
print(f"  {params.n_heads} heads, {params.n_kv_heads} kv heads")
print("  (the comments in the code have the shapes of Llama-3-8B with its tokenizer)")


def rms_norm(tensor: torch.Tensor, norm_weights: torch.Tensor) -> torch.Tensor:
    """[T, dim] -> [T, dim] (lesson 06)"""
    tensor32 = tensor.float()
    scale = torch.rsqrt(tensor32.square().mean(-1, keepdim=True) + params.norm_eps)  # [T, 1]
    return (tensor32 * scale).to(tensor.dtype) * norm_weights


normed = rms_norm(token_embeddings, weights.attention_norm)
show("normed", normed)
assert torch.equal(normed, seen["layers.0.attention_norm"])

title("Queries: wq contains all heads, one above the other")
q_layer0 = weights.wq.view(params.n_heads, params.head_dim, params.dim)  # [32, 128, 4096]
show("q_layer0", q_layer0)
q_layer0_head0 = q_layer0[0]  # [128, 4096]
show("q_layer0_head0", q_layer0_head0)
q_per_token = normed @ q_layer0_head0.T  # [17, 128]
show("q_per_token", q_per_token)
assert torch.equal(q_per_token, seen["layers.0.attention.q"][:, 0])

title("RoPE: each pair of neighbouring values is a complex number, which is rotated")
q_in_pairs = q_per_token.float().view(len(tokens), -1, 2)  # [17, 64, 2]
show("q_in_pairs", q_in_pairs)
exponents = torch.arange(0, params.head_dim, 2).float() / params.head_dim  # [64], from 0 to nearly 1
freqs = 1.0 / params.rope_theta**exponents  # [64]
if params.rope_scaling is not None:  # Llama 3.1 and later reduce some of them; computed by llama3_raw here
    from llama3_raw.model import rope_frequencies

    freqs = rope_frequencies(params, freqs.device)
show("freqs", freqs)
freqs_for_each_token = torch.outer(torch.arange(len(tokens)).float(), freqs)  # [17, 64]
freqs_cis = torch.polar(torch.ones_like(freqs_for_each_token), freqs_for_each_token)  # [17, 64] complex
show("angles of freqs_cis", freqs_cis.angle())


def rotate(per_token: torch.Tensor) -> torch.Tensor:
    """[T, head_dim] -> [T, head_dim] (lesson 04)"""
    as_complex = torch.view_as_complex(per_token.float().view(len(tokens), -1, 2))  # [17, 64] complex
    rotated = torch.view_as_real(as_complex * freqs_cis)  # [17, 64, 2]
    return rotated.view(per_token.shape).to(per_token.dtype)


q_rotated = rotate(q_per_token)
show("q_rotated", q_rotated)
assert torch.equal(q_rotated, seen["layers.0.attention.q_rope"][:, 0])

title("Keys: fewer heads, each shared by several query heads")
k_layer0 = weights.wk.view(params.n_kv_heads, params.head_dim, params.dim)  # [8, 128, 4096]
show("k_layer0", k_layer0)
k_rotated = rotate(normed @ k_layer0[0].T)  # [17, 128]
show("k_rotated", k_rotated)
assert torch.equal(k_rotated, seen["layers.0.attention.k_rope"][:, 0])

title("Scores: every query times every key, later tokens masked, softmax")
qk_per_token = q_rotated @ k_rotated.T / params.head_dim**0.5  # [17, 17]
show("qk_per_token", qk_per_token)
mask = torch.full((len(tokens), len(tokens)), float("-inf")).triu(1)  # [17, 17]: -inf above the diagonal
qk_masked = qk_per_token + mask.to(qk_per_token.dtype)
assert torch.equal(qk_masked, seen["layers.0.attention.scores"][0])
qk_after_softmax = qk_masked.float().softmax(dim=-1).to(normed.dtype)  # [17, 17]
show("qk_after_softmax", qk_after_softmax)
assert torch.equal(qk_after_softmax, seen["layers.0.attention.probs"][0])

title("Values: summed, weighted by the probabilities")
v_layer0 = weights.wv.view(params.n_kv_heads, params.head_dim, params.dim)  # [8, 128, 4096]
show("v_layer0", v_layer0)
v_per_token = normed @ v_layer0[0].T  # [17, 128]
assert torch.equal(v_per_token, seen["layers.0.attention.v"][:, 0])
qkv_attention = qk_after_softmax @ v_per_token  # [17, 128]
show("qkv_attention", qkv_attention)
assert torch.equal(qkv_attention, seen["layers.0.attention.heads"][:, 0])

title("The same for every head, and the heads concatenated")
qkv_attention_store = []
for head in range(params.n_heads):
    kv_head = head // (params.n_heads // params.n_kv_heads)
    q = rotate(normed @ q_layer0[head].T)  # [17, 128]
    k = rotate(normed @ k_layer0[kv_head].T)
    v = normed @ v_layer0[kv_head].T
    masked = q @ k.T / params.head_dim**0.5 + mask.to(q.dtype)  # [17, 17]
    qkv_attention_store.append(masked.float().softmax(dim=-1).to(v.dtype) @ v)  # [17, 128]
stacked_qkv_attention = torch.cat(qkv_attention_store, dim=-1)  # [17, 4096]
show("stacked_qkv_attention", stacked_qkv_attention)
assert torch.equal(stacked_qkv_attention, seen["layers.0.attention.heads"].flatten(-2))

title("wo combines the heads; the result is added to the input")
embedding_delta = stacked_qkv_attention @ weights.wo.T  # [17, 4096]
show("embedding_delta", embedding_delta)
assert torch.equal(embedding_delta, seen["layers.0.attention.out"])
embedding_after_attention = token_embeddings + embedding_delta  # [17, 4096]
show("embedding_after_attention", embedding_after_attention)
assert torch.equal(embedding_after_attention, seen["layers.0.attention.residual"])

title("SwiGLU; its result is added as well")
normed = rms_norm(embedding_after_attention, weights.ffn_norm)  # [17, 4096]
hidden = torch.nn.functional.silu(normed @ weights.w1.T) * (normed @ weights.w3.T)  # [17, 14336]
show("hidden", hidden)
assert torch.equal(normed, seen["layers.0.ffn_norm"])
assert torch.equal(hidden, seen["layers.0.feed_forward.hidden"])
layer_0_embedding = embedding_after_attention + hidden @ weights.w2.T  # [17, 4096]
show("layer_0_embedding", layer_0_embedding)
assert torch.equal(layer_0_embedding, seen["layers.0.residual"])
print("\nevery step is bit-identical to llama3_raw's layer 0")
