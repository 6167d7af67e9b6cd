"""Direct logit attribution: which part of the model writes the answer into the stream?

The logits are linear in what embedding, heads and feed-forward layers add to the stream, if the scale of the final norm
is frozen; so the difference of two logits is a sum over the parts (Elhage et al. 2021). What to look at: the parts sum
to the whole, a few write nearly all, and some write against the answer.

    python examples/research/direct_attribution.py [MODEL]
"""

import sys

from llama3_raw import attribute, load, trace

model = load(sys.argv[1] if len(sys.argv) > 1 else "tiny", dtype="float32")
ids = model.tokenizer.encode("Lily went to the park. She saw a big dog. The big", bos=True)
dog, cat = (model.tokenizer.encode(word)[0] for word in (" dog", " cat"))

kept = trace(model, ids, "tok_embeddings", "*.attention.heads", "*.out", "logits")
attribution = attribute(kept, model, (dog, cat))
by_part, by_head = attribution
difference = (kept["logits"][-1, dog] - kept["logits"][-1, cat]).item()
print(f"dog - cat: {difference:.3f}; the sum of {len(by_part)} parts: {by_part.sum().item():.3f}\n")
for part, value in sorted(zip(attribution.names, by_part.tolist(), strict=True), key=lambda pair: -abs(pair[1]))[:8]:
    print(f"{part:28} {value:+.2f}")
print("\nof the heads:")
for at in by_head.flatten().abs().topk(5).indices.tolist():
    layer, head = divmod(at, model.params.n_heads)
    print(f"layer {layer}, head {head:<15} {by_head[layer, head]:+.2f}")
