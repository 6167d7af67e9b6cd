"""09: sampling with temperature, top-k, top-p and min-p.

The question: the model gives a probability to every token, so which one comes next? The idea: always choosing the most
likely is dull and, in longer texts, often repeats itself (Holtzman et al. 2020); sampling from all of them sooner or
later gives nonsense; so the distribution is sharpened or truncated before sampling. What to look at: one distribution,
changed in four ways.

    python examples/09_sampling.py --picture sampling.png
"""

from __future__ import annotations

from collections import Counter

import torch
from lesson import open_model, save, title
from matplotlib.figure import Figure

from llama3_raw import forward, generate
from llama3_raw.decoding.sampling import Sampling, probabilities, sample
from llama3_raw.tracing.plots import Picture

model, tokenizer, picture = open_model(__doc__, draws=True)
prompt = "She opened the box and saw a"
ids = tokenizer.encode(prompt, bos=True)
logits = forward(model.weights, model.params, torch.tensor(ids), logits_at=-1)  # [vocab_size]
order = logits.softmax(-1).sort(descending=True, stable=True).indices  # [vocab_size], the most likely first
SHOWN = 10


def show_bars(sampling: Sampling, name: str) -> torch.Tensor:
    """Print the most likely tokens as bars, and return all probabilities [vocab_size]."""
    probs = probabilities(logits, sampling)  # [vocab_size]
    kept = int((probs > 0).sum())
    print(f"\n  {name}: {kept:,} of {len(probs):,} tokens can be sampled")
    for token in order[:SHOWN].tolist():
        p = float(probs[token])
        print(f"    {tokenizer.decode([token])!r:<14} {p:6.1%} {'█' * round(60 * p)}")
    return probs


title("The distribution: which tokens may follow the prompt?")
print(f"  {prompt!r}")
plain = show_bars(Sampling(temperature=1.0), "unchanged")
shifted = logits - logits.max()  # avoids overflow; the probabilities stay the same
unscaled = shifted.softmax(-1)
assert torch.equal(plain, unscaled / unscaled.sum())

title("Temperature divides the logits: below 1 favours likely tokens, above 1 unlikely ones")
cold = show_bars(Sampling(temperature=0.5), "temperature 0.5")
hot = show_bars(Sampling(temperature=1.5), "temperature 1.5")
scaled = (shifted / 0.5).softmax(-1)
assert torch.equal(cold, scaled / scaled.sum())
assert cold[order[0]] > plain[order[0]] > hot[order[0]]
greedy = sample(logits, Sampling(temperature=0.0))
assert greedy == order[0]
print("\n  temperature 0 is the limit: always the most likely token (greedy)")

title("Top-k keeps the k most likely tokens (Fan et al. 2018)")
top_k = show_bars(Sampling(temperature=1.0, top_k=3), "top-k 3")
by_hand = torch.zeros_like(plain)
by_hand[order[:3]] = plain[order[:3]] / plain[order[:3]].sum()  # renormalized
assert torch.allclose(top_k, by_hand)

title("Top-p keeps the smallest set of most likely tokens whose sum reaches p (Holtzman et al. 2020)")
top_p = show_bars(Sampling(temperature=1.0, top_p=0.9), "top-p 0.9")
kept = plain[top_p > 0].double()  # [tokens kept]
assert kept.sum() > 0.9 - 1e-4  # they reach p, up to rounding
assert kept.sum() - kept.min() < 0.9 + 1e-4  # without the last one they would not
print(f"\n  these {len(kept):,} reach {kept.sum():.1%}; the more certain the model is, the fewer")

title("Min-p keeps tokens with at least a given fraction of the largest probability (Nguyen et al. 2024)")
min_p = show_bars(Sampling(temperature=1.0, min_p=0.05), "min-p 0.05")
assert torch.equal(min_p > 0, plain >= 0.05 * plain.max())

title("Sampling: frequencies approach the probabilities, and a seed makes them reproducible")


def sampled_tokens(count: int, seed: int) -> list[int]:
    """Return `count` tokens sampled from the same distribution."""
    generator = torch.Generator().manual_seed(seed)
    return [int(sample(logits, Sampling(temperature=1.0, top_k=3), generator=generator)) for _ in range(count)]


n_samples = 500
samples = sampled_tokens(n_samples, seed=0)
for token, count in Counter(samples).most_common():
    frequency, probability = count / n_samples, float(top_k[token])
    print(f"    {tokenizer.decode([token])!r:<14} frequency {frequency:6.1%}, probability {probability:6.1%}")
    assert abs(frequency - probability) < 0.1  # more than four standard deviations
assert sampled_tokens(50, seed=0) == samples[:50]

title("The effect on a story")
for settings in (Sampling(), Sampling(temperature=0.8, min_p=0.05), Sampling(temperature=2.0)):
    story = list(
        generate(
            model,
            ids,
            max_new_tokens=30,
            temperature=settings.temperature,
            min_p=settings.min_p,
            seed=1,
        )
    )
    print(f"  temperature {settings.temperature}, min-p {settings.min_p}: …{tokenizer.decode(story)!r}")
print("  (at a high temperature without truncation, even tokens that never occur in any text are sampled)")
print("  (several settings apply in this order: temperature, top-k, top-p, min-p)")


def draw() -> Figure:
    """Return bar plots of the distribution, unchanged and changed in each way."""
    figure = Picture(figsize=(8, 5), layout="constrained")
    panels = figure.subplots(2, 3, sharey=True, sharex=True).flat
    names = ("unchanged", "temperature 0.5", "temperature 1.5", "top-k 3", "top-p 0.9", "min-p 0.05")
    for axes, name, probs in zip(panels, names, (plain, cold, hot, top_k, top_p, min_p), strict=True):
        axes.bar(range(SHOWN), probs[order[:SHOWN]].numpy())
        axes.set(title=name)
        texts = [tokenizer.decode([token]) for token in order[:SHOWN].tolist()]
        axes.set_xticks(range(SHOWN), texts, rotation=90, parse_math=False)
    figure.supylabel("probability")
    return figure


if picture:
    save(draw(), picture)
