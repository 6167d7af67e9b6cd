"""10: inside the model: logit lens, attention maps, ablation and steering.

The question: which layer first predicts the answer, and which of the last layer's heads does it need? The idea: every
tensor of the pass has a name and can be kept, decoded as if it were the last one, or replaced during the pass. What to
look at: the first stage whose prediction no longer changes; what each head attends to; which ablation matters most.

    python examples/10_inside.py --picture inside.png
"""

from __future__ import annotations

import functools

import torch
from lesson import open_model, save, show, title
from matplotlib.figure import Figure
from torch import Tensor

from llama3_raw import REFERENCE, Trace, chain, forward, patch, trace
from llama3_raw.model import rms_norm
from llama3_raw.tracing import plots

model, tokenizer, picture = open_model(__doc__, draws=True)
params, weights = model.params, model.weights
prompt = "Lily and Tom went to the park. Lily was happy. Tom was sad because he lost his"
ids = tokenizer.encode(prompt, bos=True)
words = [tokenizer.decode([token]) for token in ids]
seen = trace(model, ids, ops=REFERENCE)
last = len(weights.layers) - 1

title("Every tensor has a name")
print(f"  {len(seen)} tensors; those of the last layer's attention:")
for name in seen:
    if name.startswith(f"layers.{last}.attention."):
        show(name, seen[name])

title("The logit lens: what would the model predict if it ended here? (nostalgebraist 2020)")
predictions = []
for name in ["tok_embeddings", *(f"layers.{i}.residual" for i in range(len(weights.layers)))]:
    x = rms_norm(seen[name][-1], weights.norm, params.norm_eps)  # [dim]: the last token's row
    probs = (weights.output @ x).float().softmax(-1)  # [vocab_size]
    top = probs.topk(4)
    predictions.append(int(top.indices[0]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    most_likely = "  ".join(f"{tokenizer.decode([token])!r} {p:.0%}" for token, p in pairs)
    print(f"  {name:<18} {most_likely}")
answer = int(seen["logits"][-1].argmax())
assert predictions[-1] == answer  # after the last layer the lens is the model itself
settled = next(stage for stage in range(len(predictions)) if set(predictions[stage:]) == {answer})
if weights.output is weights.tok_embeddings:
    print("(the embedding predicts the word itself, because output and tok_embeddings are tied in this model)")
settled_at = "the embedding" if settled == 0 else f"layer {settled - 1}"
print(f"from {settled_at} on, the prediction is {tokenizer.decode([answer])!r}")

title("Attention maps: what does the last token attend to?")
probs = seen[f"layers.{last}.attention.probs"]  # [n_heads, T, T]
assert torch.allclose(probs.float().sum(-1), torch.ones(probs.shape[:2]), atol=0.02)  # rows sum to 1, in 16 bits
for head, row in enumerate(probs[:8, -1].float()):
    top = row.topk(3)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    attended = "  ".join(f"{words[at]!r} {p:.0%}" for at, p in pairs)
    print(f"  layer {last} head {head}: {attended}")

title("Ablation: one head at a time is set to zero, and the probability of the answer changes")
tokens = torch.tensor(ids)
whole = float(seen["logits"][-1].softmax(-1)[answer])
print(f"  all heads: {tokenizer.decode([answer])!r} {whole:.1%}")


def without(head: int) -> float:
    """Return the probability of the answer if this head of the last layer is zero."""

    def ablate(heads: Tensor) -> Tensor:
        heads = heads.clone()  # [T, n_heads, head_dim]
        heads[..., head, :] = 0
        return heads

    tap = patch({f"layers.{last}.attention.heads": ablate})
    return float(forward(weights, params, tokens, logits_at=-1, tap=tap).softmax(-1)[answer])


effects = {head: without(head) - whole for head in range(min(params.n_heads, 8))}
for head, effect in effects.items():
    print(f"  without layer {last} head {head}: {whole + effect:6.1%} ({100 * effect:+.1f} points)")
strongest = max(effects, key=lambda head: abs(effects[head]))
print(f"of these, layer {last} head {strongest} matters most for this answer")
identity = patch({f"layers.{last}.attention.heads": lambda heads: heads})
assert torch.equal(forward(weights, params, tokens, tap=identity), seen["logits"])  # a patch that changes nothing

title("Steering: add a vector to the residual stream")
(sad, happy) = (tokenizer.encode(word)[-1] for word in (" sad", " happy"))
direction = weights.tok_embeddings[happy] - weights.tok_embeddings[sad]  # [dim]
question = torch.tensor(tokenizer.encode("Tom lost his toy. Tom was very", bos=True))
p_happy = {}
for strength in (0.0, 2.0, -2.0):
    kept = Trace("logits", last_position=True)
    added = strength * direction
    steered = chain(patch({"layers.0.residual": functools.partial(torch.add, added)}), kept)
    forward(weights, params, question, tap=steered)
    probs = kept["logits"].softmax(-1)  # [vocab_size]
    p_happy[strength] = float(probs[happy])
    print(f"  {strength:+.0f} × (happy - sad): ' happy' {probs[happy]:6.2%}, ' sad' {probs[sad]:6.2%}")
if weights.output is weights.tok_embeddings:  # otherwise a difference of embeddings is not a direction of the output
    assert p_happy[-2.0] < p_happy[0.0] < p_happy[2.0]


def draw() -> Figure:
    """Return a plot of the attention of the head that matters most."""
    return plots.attention(seen, last, strongest, tokenizer=tokenizer)


if picture:
    save(draw(), picture)
