"""02: token embeddings, rows of a learned table.

The question: an id is only a name (token 998 is not more than token 3), so what does the model compute with? The idea:
every id has a row in a table, which is learned like all other weights; an embedding is a lookup of that row. What to
look at: several ways to write the lookup, all bit-identical, and which rows are similar.

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
show("llama3_raw's tok_embeddings", embedded)
assert torch.equal(by_index, by_product)
assert torch.equal(by_index, by_function)
assert torch.equal(by_index, embedded)
print("all three are bit-identical to llama3_raw's; multiplying by a one-hot row also selects a row,")
print("with vocab_size times the work")

title("An embedding layer is a linear layer on one-hot rows, without the arithmetic")
layer = torch.nn.Embedding.from_pretrained(table)
linear = torch.nn.Linear(table.shape[0], table.shape[1], bias=False)
linear.weight = torch.nn.Parameter(table.T)  # Linear stores [out, in] and multiplies by the transpose
assert torch.equal(layer(tokens), by_index)
assert torch.equal(linear(one_hot), by_index)
print("torch.nn.Embedding on ids and torch.nn.Linear on one-hot rows give the same rows")

title("A token has the same row at every position: positions come later (lesson 04)")
twice = torch.tensor(tokenizer.encode(" red red", bos=False))
assert torch.equal(table[twice][0], table[twice][1])
show("' red red'", table[twice])

title("Tokens used in similar ways have similar rows (by cosine similarity)")
rows = table[: tokenizer.n_words - len(tokenizer.special_tokens)]  # most special tokens never occur in training
norms = rows.norm(dim=-1)  # [n]
for word in (" red", " girl", " mom", " happy"):
    (token,) = tokenizer.encode(word)
    similarity = rows @ rows[token] / (norms * norms[token])  # [n]: the cosine of the angle to each row
    nearest = similarity.topk(6).indices.tolist()
    assert nearest[0] == token  # no row is nearer than its own
    print(f"  {word!r:<10} {'  '.join(f'{tokenizer.decode([near])!r} {similarity[near]:.2f}' for near in nearest[1:])}")
