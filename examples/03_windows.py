"""03: what does a model learn from, and how is it judged?

The question: how does one long text become thousands of exercises? The idea: cut windows out of it; in each, every
token is to be predicted from those before it, so that the target is the input one token later. What to look at: how
stride and context length decide how many windows there are, and that windows of the same kind measure perplexity.

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

title("A window is an input and its target: the same text, one token later")
context_length = 8
window = ids[: context_length + 1]  # [T + 1]: one more than the input, for the target of its last token
inputs, targets = window[:-1], window[1:]  # each [T]
for i in range(context_length):
    before = tokenizer.decode(inputs[: i + 1].tolist())
    print(f"  {before!r:<52} -> {tokenizer.decode([int(targets[i])])!r}")
print(f"one window of {context_length} tokens is {context_length} exercises, and one pass of the model does them all")

title("Windows slide over the text, `stride` tokens at a time")
for stride in (1, 4, 8):
    windows = ids.unfold(0, context_length + 1, stride)  # [windows, T + 1]
    print(f"  stride {stride}: {len(windows):3} windows of {context_length} out of {len(ids)} tokens", end="")
    print(
        ", no token is a target twice"
        if stride == context_length
        else f", each token a target about {context_length // stride} times"
    )
    assert len(windows) == (len(ids) - context_length - 1) // stride + 1
assert torch.equal(windows[1:, 0], windows[:-1, -1])  # at stride 8 the last target is the first input of the next

title("Some text is held out before windows are cut: windows that overlap would carry it into the training")
cut = int(0.8 * len(ids))
training, held_out = ids[:cut], ids[cut:]
print(f"  {len(training)} tokens to learn from, {len(held_out)} to be judged by")
assert len(training) + len(held_out) == len(ids)

title("Batches: several windows at once, in another order each time round")
windows = training.unfold(0, context_length + 1, context_length)
loader = DataLoader(
    TensorDataset(windows[:, :-1], windows[:, 1:]),
    batch_size=2,
    shuffle=True,
    drop_last=True,
    generator=torch.Generator().manual_seed(0),
)
first_time, second_time = ([inputs[:, 0].tolist() for inputs, _ in loader] for _ in range(2))
print(f"  {len(windows)} windows in {len(loader)} batches, by their first tokens: {first_time}, then {second_time}")
assert first_time != second_time
for inputs, targets in loader:  # each [batch_size, T]
    logits = forward(model.weights, model.params, inputs)  # [batch_size, T, vocab_size]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # the mean of -log p over all targets
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
show("inputs", inputs)
show("targets", targets)
show("logits", logits)
show("loss, in nats", loss)
judged = forward(model.weights, model.params, held_out[:-1])  # [T, vocab_size]
show("loss on the held-out tokens", F.cross_entropy(judged, held_out[1:]))
print(f"a model that knows nothing has log(vocab_size) = {math.log(model.params.vocab_size):.2f} nats")

title("Perplexity is that loss over a whole text: exp of the mean of -log p")
context = 32
nats: list[float] = []
for begin, _first, end in sliding_windows(len(ids), context, stride=context):
    part = ids[begin:end]  # [T + 1], at most context: here the last target is counted too
    if len(part) > 1:
        logits = forward(model.weights, model.params, part[:-1])  # [T, vocab_size]
        nats += F.cross_entropy(logits, part[1:], reduction="none").tolist()
by_hand = math.exp(sum(nats) / len(nats))
score = perplexity(model, ids.tolist(), context=context, stride=context, ops=REFERENCE)
print(f"  by hand {by_hand:.6f}, by llama3_raw.perplexity {score.perplexity:.6f}, over {score.tokens} tokens")
assert score.tokens == len(nats)
assert by_hand == score.perplexity
missed = len(ids) - 1 - score.tokens
print(f"({missed} tokens begin a window, with nothing before them in it, and are not judged)")
print(f"as if it had to choose among {by_hand:.1f} equally likely tokens each time, of {model.params.vocab_size:,}")

title("With a smaller stride, windows overlap: no token is left out, and each is judged once, with more before it")
for stride in (32, 16, 8):
    scored = [end - first for _, first, end in sliding_windows(len(ids), context, stride)]
    value = perplexity(model, ids.tolist(), context=context, stride=stride, ops=REFERENCE).perplexity
    print(f"  stride {stride:2}: {len(scored):3} windows score {sum(scored)} tokens, perplexity {value:.3f}")
    assert stride == context or sum(scored) == len(ids) - 1
print("more text before a token mostly helps; with a text as short as this, some of the difference is chance")
