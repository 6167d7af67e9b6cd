"""Where two runs of a model diverge: `compare`, and the command python -m llama3_raw.compare."""

from .comparison import compare as compare
