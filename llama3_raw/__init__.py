"""llama3_raw: Llama 3 as plain functions over plain tensors."""

from .errors import UserError
from .generation import StopReason, generate
from .model import REFERENCE, KVCache, forward
from .params import Params
from .tokenizer import Tokenizer
from .weights import LayerWeights, Model, Weights, load

__all__ = [
    "REFERENCE",
    "KVCache",
    "LayerWeights",
    "Model",
    "Params",
    "StopReason",
    "Tokenizer",
    "UserError",
    "Weights",
    "forward",
    "generate",
    "load",
]
