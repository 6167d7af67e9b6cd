"""02: what does a token id become?

The question: an id is a mere name, token 998 is no more than token 3, so what does the model compute with? The idea:
every id owns a row of a table, learned like all other weights; to look a token up is to take its row. What to look at:
the ways to write that, all the same to the last bit, and which rows lie near each other.

    python examples/02_embeddings.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lesson import open_model, show, title

from llama3_raw import trace

model, tokenizer, _ = open_model(__doc__)
table = model.weights.tok_embeddings  # [vocab_size, dim]
tokens = torch.tensor(tokenizer.encode("Once upon a time", bos=True))  # [T]

title("An embedding is a row of a table")
show("tok_embeddings", table)
show("tokens", tokens)

by_index = table[tokens]  # [T] -> [T, dim]
show("table[tokens]", by_index)

one_hot = F.one_hot(tokens, table.shape[0]).to(table.dtype)  # [T, vocab_size]: one 1 in each row
by_product = one_hot @ table  # [T, vocab_size] @ [vocab_size, dim] -> [T, dim]
show("one_hot @ table", by_product)

by_function = F.embedding(tokens, table)  # [T, dim]
show("F.embedding(tokens, table)", by_function)

embedded = trace(model, tokens.tolist(), "tok_embeddings")["tok_embeddings"]  # [T, dim]
show("the engine's tok_embeddings", embedded)
assert torch.equal(by_index, by_product)
assert torch.equal(by_index, by_function)
assert torch.equal(by_index, embedded)
print("the three and the engine's are equal to the last bit; to multiply with one 1 among 0s picks a row too,")
print("at vocab_size times the work")

title("An embedding layer is a linear layer without its arithmetic")
layer = torch.nn.Embedding.from_pretrained(table)
linear = torch.nn.Linear(table.shape[0], table.shape[1], bias=False)
linear.weight = torch.nn.Parameter(table.T)  # Linear keeps its matrix transposed, and multiplies by the transpose
assert torch.equal(layer(tokens), by_index)
assert torch.equal(linear(one_hot), by_index)
print("torch.nn.Embedding on ids and torch.nn.Linear on one-hot rows give the same rows again")

title("The same token has the same row wherever it stands: order comes later (lesson 04)")
twice = torch.tensor(tokenizer.encode(" red red", bos=False))
assert torch.equal(table[twice][0], table[twice][1])
show("' red red'", table[twice])

title("Tokens that are used alike have rows that lie near each other (by the angle between them)")
ranks = table[: tokenizer.n_words - len(tokenizer.special_tokens)]  # most special tokens never came in training
lengths = ranks.norm(dim=-1)  # [ranks]
for word in (" red", " girl", " mom", " happy"):
    (token,) = tokenizer.encode(word)
    likeness = ranks @ ranks[token] / (lengths * lengths[token])  # [ranks]: the cosine of the angle to each row
    nearest = likeness.topk(6).indices.tolist()
    assert nearest[0] == token  # nothing is nearer to it than itself
    print(f"  {word!r:<10} {'  '.join(f'{tokenizer.decode([near])!r} {likeness[near]:.2f}' for near in nearest[1:])}")
