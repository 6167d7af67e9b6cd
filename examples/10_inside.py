"""10: what goes on inside?

The question: which layer knows the answer first, and which of the last layer's heads does it need? The idea: every
tensor of the pass has a name and can be kept, read as if it were the last one, or replaced on the way. What to look
at: the first stage whose guess stays; where each head looks; which head is missed most.

    python examples/10_inside.py --picture inside.png
"""

from __future__ import annotations

import functools

import torch
from lesson import open_model, save, show, title
from matplotlib.figure import Figure
from torch import Tensor

from llama3_raw import Trace, chain, forward, patch, trace
from llama3_raw.model import rms_norm
from llama3_raw.tracing import plots

model, tokenizer, picture = open_model(__doc__, draws=True)
params, weights = model.params, model.weights
prompt = "Lily and Tom went to the park. Lily was happy. Tom was sad because he lost his"
ids = tokenizer.encode(prompt, bos=True)
words = [tokenizer.decode([token]) for token in ids]
seen = trace(model, ids)
last = len(weights.layers) - 1

title("Every tensor has a name")
print(f"  {len(seen)} tensors; those of the last layer's attention:")
for name in seen:
    if name.startswith(f"layers.{last}.attention."):
        show(name, seen[name])

title("The logit lens: what would be said if the model ended here? (nostalgebraist 2020)")
guesses = []
for name in ["tok_embeddings", *(f"layers.{i}.residual" for i in range(len(weights.layers)))]:
    x = rms_norm(seen[name][-1], weights.norm, params.norm_eps)  # [dim]: the last token's row
    probs = (weights.output @ x).float().softmax(-1)  # [vocab_size]
    top = probs.topk(4)
    guesses.append(int(top.indices[0]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    shares = "  ".join(f"{tokenizer.decode([token])!r} {p:.0%}" for token, p in pairs)
    print(f"  {name:<18} {shares}")
answer = int(seen["logits"][-1].argmax())
assert guesses[-1] == answer  # behind the last layer the lens is the model itself
settled = next(stage for stage in range(len(guesses)) if set(guesses[stage:]) == {answer})
if weights.output is weights.tok_embeddings:
    print("(the embedding says the word itself: this model reads words out by the table that it reads them in by)")
print(f"from {'the embedding' if settled == 0 else f'layer {settled - 1}'} on it is {tokenizer.decode([answer])!r}")

title("Attention maps: where does the last token look?")
probs = seen[f"layers.{last}.attention.probs"]  # [n_heads, T, T]
assert torch.allclose(probs.float().sum(-1), torch.ones(probs.shape[:2]), atol=0.02)  # rows sum to 1, in 16 bits
for head, row in enumerate(probs[:8, -1].float()):
    top = row.topk(3)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    looks = "  ".join(f"{words[at]!r} {p:.0%}" for at, p in pairs)
    print(f"  layer {last} head {head}: {looks}")

title("Ablation: one head at a time is silenced, and the answer's probability seen to change")
tokens = torch.tensor(ids)
whole = float(seen["logits"][-1].softmax(-1)[answer])
print(f"  whole: {tokenizer.decode([answer])!r} {whole:.1%}")


def without(head: int) -> float:
    """The answer's probability where the last layer's head adds nothing."""

    def silence(heads: Tensor) -> Tensor:
        heads = heads.clone()  # [T, n_heads, head_dim]
        heads[:, head] = 0
        return heads

    tap = patch({f"layers.{last}.attention.heads": silence})
    return float(forward(weights, params, tokens, logits_at=-1, tap=tap).softmax(-1)[answer])


effects = {head: without(head) - whole for head in range(min(params.n_heads, 8))}
for head, effect in effects.items():
    print(f"  without layer {last} head {head}: {whole + effect:6.1%} ({100 * effect:+.1f} points)")
most = max(effects, key=lambda head: abs(effects[head]))
print(f"of these, layer {last} head {most} matters most for this answer")
itself = patch({f"layers.{last}.attention.heads": lambda heads: heads})
assert torch.equal(forward(weights, params, tokens, tap=itself), seen["logits"])  # a patch that changes nothing

title("Steering: something is added to the stream on its way")
(sad, happy) = (tokenizer.encode(word)[-1] for word in (" sad", " happy"))
direction = weights.tok_embeddings[happy] - weights.tok_embeddings[sad]  # [dim]
question = torch.tensor(tokenizer.encode("Tom lost his toy. Tom was very", bos=True))
happy_shares = {}
for strength in (0.0, 2.0, -2.0):
    kept = Trace("logits", last_position=True)
    added = strength * direction
    steered = chain(patch({"layers.0.residual": functools.partial(torch.add, added)}), kept)
    forward(weights, params, question, tap=steered)
    said = kept["logits"].softmax(-1)  # [vocab_size]
    happy_shares[strength] = float(said[happy])
    print(f"  {strength:+.0f} × (happy - sad): ' happy' {said[happy]:6.2%}, ' sad' {said[sad]:6.2%}")
if weights.output is weights.tok_embeddings:  # else a difference of embeddings is no direction of the output
    assert happy_shares[-2.0] < happy_shares[0.0] < happy_shares[2.0]


def draw() -> Figure:
    """Where the head that matters most looks."""
    return plots.attention(seen, last, most, tokenizer=tokenizer)


if picture:
    save(draw(), picture)
