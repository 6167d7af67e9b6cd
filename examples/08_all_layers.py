"""08: all layers, generation and the KV cache.

The question: how does the whole model run, and why is the second token cheaper than the first? The idea: apply the same
layer again and again with different weights, then a norm and the output matrix; a token never sees later ones, so the
keys and values of earlier tokens never change and can be cached. What to look at: the loop over the layers, and the
two generation loops.

    python examples/08_all_layers.py
"""

from __future__ import annotations

import time

import torch
from lesson import open_model, show, title

from llama3_raw import REFERENCE, KVCache, forward
from llama3_raw.model import Pass, layer, rms_norm, rope_rotation, token_positions
from llama3_raw.ops import no_tap

model, tokenizer, _ = open_model(__doc__)
weights, params = model.weights, model.params
PROMPTS = (
    "the answer to the ultimate question of life, the universe, and everything is ",
    "the color of the sun is?",
    "Once upon a time",
)

for prompt in PROMPTS:
    title(f"{prompt!r}, layer by layer")
    tokens = torch.tensor(tokenizer.encode(prompt, bos=True))  # [T]
    show("tokens", tokens)
    cos, sin = rope_rotation(token_positions(0, len(tokens), tokens.device), params)
    at = Pass(params, 0, cos, sin, REFERENCE)  # the same in every layer
    x = weights.tok_embeddings[tokens]  # [T, dim]
    show("embedded", x)
    for i, layer_weights in enumerate(weights.layers):
        x = layer(x, layer_weights, None, at, no_tap)  # [T, dim]
        if i in (0, 1, len(weights.layers) - 1):
            show(f"after layer {i}, last row", x[-1])
    x = rms_norm(x, weights.norm, params.norm_eps)  # [T, dim]
    logits = (x @ weights.output.T).float()  # [T, dim] @ [dim, vocab_size] -> [T, vocab_size]
    show("logits of the last row", logits[-1])
    assert torch.equal(logits, forward(weights, params, tokens))
    next_token = int(logits[-1].argmax())  # the last row predicts the token after the whole prompt
    probability = float(logits[-1].softmax(-1)[next_token])
    print(f"  the next token: {next_token}, {tokenizer.decode([next_token])!r}, with probability {probability:.0%}")
    if prompt == PROMPTS[0] and len(weights.layers) < 32:
        print("  (Llama-3-8B says 42; this model of two million parameters was trained on children's stories only)")

title("The generation loop: each new token becomes input")
start = tokenizer.encode("Once upon a time", bos=True)
COUNT = 24


def without_cache() -> list[int]:
    """Return the text with COUNT new tokens; each costs a pass over the whole text."""
    ids = list(start)
    for _ in range(COUNT):
        logits = forward(weights, params, torch.tensor(ids), logits_at=-1)  # [vocab_size]
        ids.append(int(logits.argmax()))
    return ids


def with_cache() -> list[int]:
    """Return the text with COUNT new tokens; each but the first costs a pass over a single token."""
    ids = list(start)
    cache = KVCache.allocate(params, max_seq_len=len(start) + COUNT, like=weights)
    new, at = ids, 0
    for _ in range(COUNT):
        logits = forward(weights, params, torch.tensor(new), cache=cache, start=at, logits_at=-1)
        at += len(new)
        new = [int(logits.argmax())]
        ids += new
    return ids


texts, seconds = [], []
for name, loop in (("without a cache", without_cache), ("with a cache", with_cache)):
    loop()  # warm-up
    begin = time.perf_counter()
    texts.append(loop())
    seconds.append(time.perf_counter() - begin)
    print(f"  {name:<16} {1000 * seconds[-1] / COUNT:7.1f} ms per token")
print(f"  {tokenizer.decode(texts[1][1:])!r}")
# In 16 bits the two round differently, because a product over many rows adds in a different order than one over a
# single row. If two tokens are nearly equally likely, the texts may diverge.
same = next((i for i, pair in enumerate(zip(*texts, strict=True)) if pair[0] != pair[1]), len(texts[0]))
print(f"the same text for {same - len(start)} of {COUNT} tokens; {seconds[0] / seconds[1]:.1f} times as fast")
assert same > len(start)

title("The size of the cache")
cache = KVCache.allocate(params, max_seq_len=1, like=weights)
show("keys of a token, one layer", cache.keys[0])
per_token = sum(tensor.nbytes for tensors in cache for tensor in tensors)
whole = per_token * params.max_seq_len / 1e6
print(f"{per_token:,} bytes per token; {whole:,.1f} MB for the whole context of {params.max_seq_len:,} tokens")
assert per_token == 2 * len(weights.layers) * params.n_kv_heads * params.head_dim * weights.norm.itemsize
