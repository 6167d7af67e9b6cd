"""09: which token is taken?

The question: the model gives a probability to every token, so which of them is written? The idea: always taking the
likeliest is dull and, in longer texts, often goes in circles (Holtzman et al. 2020), drawing from all of them sooner
or later draws nonsense, and so the distribution is made sharper or cut before it is drawn from. What to look at: one
distribution, changed in four ways.

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
order = logits.softmax(-1).sort(descending=True, stable=True).indices  # [vocab_size], the likeliest first
SHOWN = 10


def show_bars(sampling: Sampling, name: str) -> torch.Tensor:
    """Prints the likeliest tokens as bars; -> all probabilities [vocab_size]."""
    probs = probabilities(logits, sampling)  # [vocab_size]
    kept = int((probs > 0).sum())
    print(f"\n  {name}: {kept:,} of {len(probs):,} tokens can be drawn")
    for token in order[:SHOWN].tolist():
        p = float(probs[token])
        print(f"    {tokenizer.decode([token])!r:<14} {p:6.1%} {'█' * round(60 * p)}")
    return probs


title("The distribution: what comes after the prompt?")
print(f"  {prompt!r}")
plain = show_bars(Sampling(temperature=1.0), "as the model says")
largest_at_0 = logits - logits.max()  # which changes no probability, and nothing overflows
unscaled = largest_at_0.softmax(-1)
assert torch.equal(plain, unscaled / unscaled.sum())

title("Temperature divides the logits: below 1 the likely gain, above 1 the unlikely")
cold = show_bars(Sampling(temperature=0.5), "temperature 0.5")
hot = show_bars(Sampling(temperature=1.5), "temperature 1.5")
scaled = (largest_at_0 / 0.5).softmax(-1)
assert torch.equal(cold, scaled / scaled.sum())
assert cold[order[0]] > plain[order[0]] > hot[order[0]]
greedy = sample(logits, Sampling(temperature=0.0))
assert greedy == order[0]
print("\n  temperature 0 is the limit: always the likeliest (greedy)")

title("Top-k keeps the k likeliest (Fan et al. 2018)")
top_k = show_bars(Sampling(temperature=1.0, top_k=3), "top-k 3")
by_hand = torch.zeros_like(plain)
by_hand[order[:3]] = plain[order[:3]] / plain[order[:3]].sum()  # what is left is shared out anew
assert torch.allclose(top_k, by_hand)

title("Top-p keeps the smallest set of the likeliest that reaches p (Holtzman et al. 2020)")
top_p = show_bars(Sampling(temperature=1.0, top_p=0.9), "top-p 0.9")
kept = plain[top_p > 0].double()  # [tokens kept]
assert kept.sum() > 0.9 - 1e-4  # they reach it
assert kept.sum() - kept.min() < 0.9 + 1e-4  # and without the last of them they would not; both up to rounding
print(f"\n  these {len(kept):,} reach {kept.sum():.1%}; the surer the model is, the fewer")

title("Min-p keeps what has at least a given share of the likeliest's probability (Nguyen et al. 2024)")
min_p = show_bars(Sampling(temperature=1.0, min_p=0.05), "min-p 0.05")
assert torch.equal(min_p > 0, plain >= 0.05 * plain.max())

title("Drawing: the share of the draws comes near the probability, and a seed makes them the same again")


def tokens_drawn(draws: int, seed: int) -> list[int]:
    """That many tokens for the same place, drawn one after the other."""
    generator = torch.Generator().manual_seed(seed)
    return [int(sample(logits, Sampling(temperature=1.0, top_k=3), generator=generator)) for _ in range(draws)]


draws = 500
drawn = tokens_drawn(draws, seed=0)
for token, count in Counter(drawn).most_common():
    print(f"    {tokenizer.decode([token])!r:<14} drawn {count / draws:6.1%}, probability {float(top_k[token]):6.1%}")
    assert abs(count / draws - float(top_k[token])) < 0.1  # more than four standard deviations
assert tokens_drawn(50, seed=0) == drawn[:50]

title("What it does to a story")
for settings in (Sampling(), Sampling(temperature=0.8, min_p=0.05), Sampling(temperature=2.0)):
    told = list(
        generate(
            model,
            ids,
            max_new_tokens=30,
            temperature=settings.temperature,
            min_p=settings.min_p,
            seed=1,
        )
    )
    print(f"  temperature {settings.temperature}, min-p {settings.min_p}: …{tokenizer.decode(told)!r}")
print("  (uncut and hot, even tokens that no text has ever held are drawn)")
print("  (several settings at once: temperature first, then top-k, top-p, min-p)")


def draw() -> Figure:
    """The same distribution as it is, and cut in each way."""
    figure = Picture(figsize=(8, 5), layout="constrained")
    panels = figure.subplots(2, 3, sharey=True, sharex=True).flat
    names = ("as the model says", "temperature 0.5", "temperature 1.5", "top-k 3", "top-p 0.9", "min-p 0.05")
    for axes, name, probs in zip(panels, names, (plain, cold, hot, top_k, top_p, min_p), strict=True):
        axes.bar(range(SHOWN), probs[order[:SHOWN]].numpy())
        axes.set(title=name)
        texts = [tokenizer.decode([token]) for token in order[:SHOWN].tolist()]
        axes.set_xticks(range(SHOWN), texts, rotation=90, parse_math=False)
    figure.supylabel("probability")
    return figure


if picture:
    save(draw(), picture)
