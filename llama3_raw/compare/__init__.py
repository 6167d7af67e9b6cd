"""Where two runs of a model diverge: `compare`, and the command python -m llama3_raw.compare."""

from .comparison import assert_matches as assert_matches
from .comparison import compare as compare
from .gradients import compare_gradients as compare_gradients
