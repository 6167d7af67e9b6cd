# mypy: enable-error-code="union-attr"
"""Lines that people write in a notebook, which no type checker should object to; test_notebook.py runs them."""

import torch
import torch.nn.functional as F
from torch import Tensor

import llama3_raw

model = llama3_raw.load("tiny", dtype="float32")
params, weights, tokenizer = model.params, model.weights, model.tokenizer

ids = model.tokenizer.encode("Once upon a time", bos=True)
text: str = tokenizer.decode(ids)
shape: torch.Size = model.weights.layers[0].wq.shape
x: Tensor = model.weights.tok_embeddings[torch.tensor(ids)]
q = x @ model.weights.layers[0].wq.T
by_head: Tensor = weights.layers[0].wq.unflatten(0, (params.n_heads, params.head_dim))
norms = [layer.w2.float().norm().item() for layer in weights.layers]
logits: Tensor = F.linear(x, weights.output)
largest: int = (weights.output @ x[-1]).argmax().item()  # type: ignore[assignment]  # torch's item() is a float, too

kept = llama3_raw.trace(model, ids, "layers.*.residual")
stream: Tensor = kept["layers.3.residual"]
nearest = torch.cosine_similarity(stream[-1], weights.tok_embeddings, dim=-1).topk(5).indices.tolist()
words = [model.tokenizer.decode([token]) for token in nearest]


def without_head_2(heads: Tensor) -> Tensor:
    heads = heads.clone()
    heads[..., 2, :] = 0
    return heads


ablated = llama3_raw.trace(model, ids, "logits", tap=llama3_raw.patch({"layers.1.attention.heads": without_head_2}))
exact = llama3_raw.to(model, "float64")
change: Tensor = exact.weights.layers[0].wk - weights.layers[0].wk
