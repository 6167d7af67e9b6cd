"""A fake model with known answers, which records what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llama3_raw import Model, Params
from llama3_raw.chat.conversation import Conversation
from llama3_raw.chat.dialog import Message, encode_message

VOCAB = 2048 + 256  # of the built-in tokenizer

PARAMS = Params.from_meta(
    {"dim": 2, "n_layers": 1, "n_heads": 1, "vocab_size": VOCAB, "norm_eps": 1e-5, "max_seq_len": 10_000}
)


class Fake:
    """A forward pass that keeps ids in place of keys, and may be interrupted."""

    def __init__(self, eot_id: int) -> None:
        self.eot_id = eot_id
        self.ends_in = 7  # about one token in 7 ends the answer
        self.calls: list[int] = []  # number of tokens in each pass
        self.rows: list[int] = []  # all ids in the cache after the last pass
        self.interrupt_in = -1  # passes; -1: never

    def __call__(self, weights: Any, params: Any, tokens: Tensor, *, cache: Any, start: int, **_: Any) -> Tensor:
        rows = cache.keys[0][:, 0, 0]  # [max_seq_len]
        if self.interrupt_in == 0:
            rows[start:] = -1  # half done
            raise KeyboardInterrupt
        self.interrupt_in -= 1
        rows[start : start + len(tokens)] = tokens
        self.calls.append(len(tokens))
        self.rows = [int(row) for row in rows[: start + len(tokens)]]
        digest = hash(tuple(self.rows))
        token = self.eot_id if digest % self.ends_in == 0 else digest % 2048
        return torch.nn.functional.one_hot(torch.tensor(token), params.vocab_size).float()


def taught(model: Model) -> Model:
    """Return the built-in model as if trained on dialogs: <|eot_id|> has its own embedding. It never ends an answer."""
    assert model.tokenizer is not None
    embeddings = model.weights.tok_embeddings.clone()
    embeddings[list(model.tokenizer.stop_ids)] = 0
    return model._replace(weights=model.weights._replace(tok_embeddings=embeddings, output=embeddings))


def dialog_ids(conversation: Conversation) -> list[int]:
    """Return every token of the dialog, with the answers as they were generated."""
    system = [Message("system", conversation.system)] if conversation.system else []
    ids = conversation.tokenizer.encode("", bos=True)
    for message in system:
        ids += encode_message(conversation.tokenizer, message)
    return ids + [token for exchange in conversation.exchanges for token in exchange.ids]


def ask(conversation: Conversation, question: str = "Why?") -> str:
    return "".join(conversation.answer(question))
