"""Steering: a direction of the residual stream that makes a story happy or sad.

The direction is the difference of two means (Turner et al. 2023, "Activation Addition"): the stream after prompts of
one kind minus that after prompts of the other. Added at every token, it changes what the model writes; subtracted, too.
"""

import torch
from torch import Tensor

import llama3_raw
from llama3_raw.ops import Tap

LAYER = "layers.1.residual"
HAPPY = ["He was very happy and he smiled", "She laughed and danced with joy", "They had so much fun and were glad"]
SAD = ["He was very sad and he cried", "She was scared and hurt and alone", "They lost it all and were upset"]
WORDS = {
    "happy": (" happy", " fun", " smiled", " glad", " love"),
    "sad": (" sad", " cried", " scared", " upset", " hurt"),
}
PROMPT = "Once upon a time there was a boy named Tim. One day he"


def stream_after(text: str) -> Tensor:
    """The stream [dim] at the last token of a text."""
    kept = llama3_raw.trace(model, model.tokenizer.encode(text, bos=True), LAYER, last_position=True)
    return kept[LAYER]


def steered(amount: float) -> Tap:
    """A tap that adds the direction, times the amount, to the stream of every token."""
    return llama3_raw.patch({LAYER: lambda x: x + amount * direction})


def log_odds(amount: float) -> float:
    """How much likelier happy words are than sad ones after the prompt and "was", in nats."""
    ids = model.tokenizer.encode(f"{PROMPT} was", bos=True)
    logits = llama3_raw.trace(model, ids, "logits", last_position=True, tap=steered(amount))["logits"]
    happy, sad = (logits[[model.tokenizer.encode(word)[0] for word in WORDS[kind]]].logsumexp(0) for kind in WORDS)
    return (happy - sad).item()


model = llama3_raw.load("tiny", dtype="float32")
direction = torch.stack([*map(stream_after, HAPPY)]).mean(0) - torch.stack([*map(stream_after, SAD)]).mean(0)

print("amount  happy words over sad ones, in nats")
for amount in (-1.0, -0.5, 0.0, 0.5, 1.0):
    print(f"{amount:6.1f}  {log_odds(amount):+.2f}")

ids = model.tokenizer.encode(PROMPT, bos=True)
for amount in (-0.5, 0.0, 0.5):
    tokens = llama3_raw.generate(model, ids, max_new_tokens=40, tap=steered(amount))
    print(f"\n{amount:+.1f}: {PROMPT}{model.tokenizer.decode(list(tokens))}")
