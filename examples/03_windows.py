"""03: training windows, batches and perplexity.

The question: how does one long text become thousands of training examples? The idea: take windows from it; in each, the
model predicts every token from those before it, so the target is the input shifted by one token. What to look at: how
stride and context length determine the number of windows, and how the same kind of windows measures perplexity.

    python examples/03_windows.py
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from lesson import open_model, show, title
from torch.utils.data import DataLoader, TensorDataset

from llama3_raw import REFERENCE, forward
from llama3_raw.perplexity import perplexity, sliding_windows

model, tokenizer, _ = open_model(__doc__)
STORY = (
    "Once upon a time, there was a little girl named Lily. She had a big red ball. Every day she played with "
    "the ball in the park. One day, the ball rolled into the water. Lily was sad. A kind dog saw her and "
    "jumped into the water. The dog brought the ball back to Lily. She was so happy that she gave the dog a "
    "big hug. They became best friends and played together every day."
)
ids = torch.tensor(tokenizer.encode(STORY, bos=True))  # [length]

title("A window is an input and its target: the same text, shifted by one token")
context_length = 8
window = ids[: context_length + 1]  # [T + 1]: one token more than the input, as the target of its last token
inputs, targets = window[:-1], window[1:]  # each [T]
for i in range(context_length):
    before = tokenizer.decode(inputs[: i + 1].tolist())
    print(f"  {before!r:<52} -> {tokenizer.decode([int(targets[i])])!r}")
print(f"one window of {context_length} tokens has {context_length} examples; one pass of the model covers them all")

title("Windows slide over the text by `stride` tokens")
for stride in (1, 4, 8):
    windows = ids.unfold(0, context_length + 1, stride)  # [windows, T + 1]
    print(f"  stride {stride}: {len(windows):3} windows of {context_length} from {len(ids)} tokens", end="")
    print(
        "; no token is a target twice"
        if stride == context_length
        else f"; each token is a target about {context_length // stride} times"
    )
    assert len(windows) == (len(ids) - context_length - 1) // stride + 1
assert torch.equal(windows[1:, 0], windows[:-1, -1])  # at stride 8 the last target is the next window's first input

title("Hold out some text before making windows, or overlapping windows would leak it into training")
cut = int(0.8 * len(ids))
training, held_out = ids[:cut], ids[cut:]
print(f"  {len(training)} tokens for training, {len(held_out)} held out")
assert len(training) + len(held_out) == len(ids)

title("Batches: several windows at once, in a new order in each epoch")
windows = training.unfold(0, context_length + 1, context_length)
loader = DataLoader(
    TensorDataset(windows[:, :-1], windows[:, 1:]),
    batch_size=2,
    shuffle=True,
    drop_last=True,
    generator=torch.Generator().manual_seed(0),
)
first_epoch, second_epoch = ([inputs[:, 0].tolist() for inputs, _ in loader] for _ in range(2))
print(f"  {len(windows)} windows in {len(loader)} batches, by their first tokens: {first_epoch}, then {second_epoch}")
assert first_epoch != second_epoch
for inputs, targets in loader:  # each [batch_size, T]
    logits = forward(model.weights, model.params, inputs)  # [batch_size, T, vocab_size]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # the mean of -log p over all targets
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
show("inputs", inputs)
show("targets", targets)
show("logits", logits)
show("loss, in nats", loss)
logits = forward(model.weights, model.params, held_out[:-1])  # [T, vocab_size]
show("loss on the held-out tokens", F.cross_entropy(logits, held_out[1:]))
print(f"uniform predictions have a loss of log(vocab_size) = {math.log(model.params.vocab_size):.2f} nats")

title("Perplexity is this loss over a whole text: exp of the mean of -log p")
context = 32
nats: list[float] = []
for begin, _first, end in sliding_windows(len(ids), context, stride=context):
    window = ids[begin:end]  # [T + 1], at most `context` tokens, including the last target
    if len(window) > 1:
        logits = forward(model.weights, model.params, window[:-1])  # [T, vocab_size]
        nats += F.cross_entropy(logits, window[1:], reduction="none").tolist()
by_hand = math.exp(sum(nats) / len(nats))
score = perplexity(model, ids.tolist(), context=context, stride=context, ops=REFERENCE)
print(f"  by hand {by_hand:.6f}, by llama3_raw.perplexity {score.perplexity:.6f}, over {score.tokens} tokens")
assert score.tokens == len(nats)
assert by_hand == score.perplexity
missed = len(ids) - 1 - score.tokens
print(f"({missed} tokens are the first of a window, with nothing before them, and are not scored)")
print(f"as if it chose among {by_hand:.1f} equally likely tokens each time, out of {model.params.vocab_size:,}")

title("With a smaller stride, windows overlap: every token is scored once, with more text before it")
for stride in (32, 16, 8):
    scored = [end - first for _, first, end in sliding_windows(len(ids), context, stride)]
    value = perplexity(model, ids.tolist(), context=context, stride=stride, ops=REFERENCE).perplexity
    print(f"  stride {stride:2}: {len(scored):3} windows score {sum(scored)} tokens, perplexity {value:.3f}")
    assert stride == context or sum(scored) == len(ids) - 1
print("more text before a token mostly helps; for a text as short as this, some of the difference is chance")
