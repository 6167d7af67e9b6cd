"""Measure how fast a model runs, compared with what the memory allows and with other engines.

--make-synthetic SIZE measures on random weights of true size, created on the device; with a FOLDER it writes them there
instead. --taps measures the cost of taps and traces. --estimate MODEL computes what a model needs on GPUs that you do
not have.
"""

from __future__ import annotations

from ..cli.entry_point import ArgumentParser, not_empty
from ..cli.options import add_model_options, positive_int, seed
from ..cli.shown import BASELINES, SYNTHETIC, TAP_LENGTH

PLOTTED = (17, 256, 1024, 2048, 4096)


def _baseline(text: str) -> str:
    from .baselines import baseline_name  # not above: it imports torch

    return baseline_name(text)


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m llama3_raw.bench`."""
    parser = ArgumentParser(prog="python -m llama3_raw.bench", description=__doc__)
    parser.add_argument(
        "--make-synthetic",
        nargs="+",
        metavar=("SIZE", "FOLDER"),
        help="measure on random weights of true size, created on the device; with a FOLDER, write them there "
        f"instead of measuring; SIZE is one of {', '.join(SYNTHETIC)}",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the random weights (default: %(default)s)")
    parser.add_argument(
        "--prefill",
        type=positive_int,
        nargs="+",
        metavar="N",
        help="prompts of N tokens; on the CPU, those of more than 1,000 are measured only once (default: 17 256 2048)",
    )
    parser.add_argument(
        "--contexts",
        type=positive_int,
        nargs="+",
        metavar="N",
        help="decode with N tokens in the cache (default: as many as the shortest prompt; with --plot "
        f"{' '.join(map(str, PLOTTED))})",
    )
    parser.add_argument(
        "--new-tokens",
        type=positive_int,
        metavar="N",
        help="tokens decoded per round (default: 4, on a GPU 64)",
    )
    parser.add_argument(
        "--rounds", type=positive_int, default=5, metavar="N", help="rounds to measure (default: %(default)s)"
    )
    parser.add_argument(
        "--vs",
        nargs="+",
        type=_baseline,
        default=[],
        metavar="NAME",
        help="also measure these engines on the same weights, interleaved with this one: "
        f"{', '.join(BASELINES)}; TYPE is one of llama-quantize's, such as Q4_K_M",
    )
    parser.add_argument(
        "--batch",
        type=positive_int,
        metavar="N",
        help="also measure N texts at a time, as python -m llama3_raw.batch computes them, interleaved with one alone",
    )
    parser.add_argument(
        "--gguf",
        type=not_empty,
        metavar="FILE",
        help="for llama.cpp: the weights in its format, written if missing; those of a TYPE are kept beside it "
        "(default: the model's own file, or else temporary files)",
    )
    parser.add_argument(
        "--taps",
        action="store_true",
        help="measure the cost of taps and traces instead: the default tap compared with no taps, for a prompt of "
        f"{TAP_LENGTH} tokens and for one token, and a trace of every tensor",
    )
    parser.add_argument(
        "--estimate",
        metavar="MODEL",
        help="measure nothing: estimate memory and speed on GPUs; --estimate MODEL --help shows its own options",
    )
    parser.add_argument("--plot", type=not_empty, metavar="FILE", help="plot tokens/s against the context (.png, .svg)")
    add_model_options(parser)
    return parser
