"""What a model takes on GPUs that need not be there, by arithmetic: memory, bytes and messages per token, tokens/s.

python -m llama3_raw.bench --estimate prints it. Each layer is split over all GPUs (Shoeybi et al. 2019): rows of wq,
wk, wv, w1, w3, output and tok_embeddings, columns of wo and w2; norms are on each. Every GPU reads its part of the
weights and of the cache for a token, and twice a layer they add up what they have. What is left out makes a real run
slower: the time between kernels, smaller matrices that are read less well, scores over a long context.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from ..checkpoint.checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.sharding import SHARDED_DIMENSION, Shard, cannot_split, possible_sizes
from ..cli.entry_point import ArgumentParser
from ..cli.models import find_model
from ..cli.options import positive_int
from ..errors import UserError
from ..params import Params
from ..weights import TensorPlace, in_words
from .synthetic import SYNTHETIC, synthetic_checkpoint

_NVLINK, _PCIE, _NETWORK = 15e-6, 50e-6, 47e-6
"""Seconds that an all-reduce of a few KB takes: within a node, without NVLink, and over InfiniBand.

For 4 to 32 KB on 8 H100, vLLM's own kernel took 9 to 12 µs (sgl-project/sglang#2904); NCCL is assumed to take 15. 54 µs
by NCCL on 8 RTX 3090 (NVIDIA/nccl#1439). 46 to 48 µs by NCCL on 2 nodes of 8 H20 (NVIDIA/nccl#1244), all of it.
"""
_NETWORK_BANDWIDTH = 50e9  # bytes/s from each GPU to another node: a port of 400 Gbit/s for each, as in NVIDIA's HGX
_BANDWIDTH_SHARE = 0.9  # of the data sheet's: an H200 copies 4.3 of 4.8 TB/s
_MULTIPLY_SHARE = 0.7  # of the data sheet's; an assumption
_LINK_SHARE = 0.8  # of the data sheet's: 365 to 370 of 450 GB/s on 8 H100 (NVIDIA/nccl#1455)
_RESERVED = 2e9  # bytes for CUDA, NCCL and what a layer makes on its way; an assumption


class Gpu(NamedTuple):
    """A GPU as its vendor's data sheet has it, in units of 1e9 bytes and the like."""

    memory: float  # bytes
    bandwidth: float  # bytes/s of its memory
    multiplications: float  # bf16 operations/s, not counting zeros that are skipped (sparsity)
    link: float  # bytes/s to the other GPUs of its node, one way
    latency: float = _NVLINK  # seconds of a small all-reduce within its node


# NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM, DGX B200 (an eighth of it), L40S; Ada white paper
GPUS = {
    "a100": Gpu(80e9, 2.039e12, 312e12, 300e9),
    "h100": Gpu(80e9, 3.35e12, 989e12, 450e9),
    "h200": Gpu(141e9, 4.8e12, 989e12, 450e9),
    "b200": Gpu(180e9, 8e12, 2250e12, 900e9),
    "l40s": Gpu(48e9, 0.864e12, 362e12, 32e9, _PCIE),
    "rtx4090": Gpu(24e9, 1.008e12, 165e12, 32e9, _PCIE),
}


class Cluster(NamedTuple):
    """So many GPUs of a kind, the same number in each node."""

    name: str  # a key of GPUS
    gpus: int = 1  # in all
    nodes: int = 1
    bandwidth: float | None = None  # bytes/s that reading reaches; None: a share of the data sheet's
    latency: float | None = None  # seconds of a small all-reduce over all of them; None: as above

    @property
    def gpu(self) -> Gpu:
        """What the data sheet says."""
        return GPUS[self.name]

    @property
    def read_speed(self) -> float:
        """Bytes/s that a GPU reads from its memory."""
        return self.bandwidth or self.gpu.bandwidth * _BANDWIDTH_SHARE

    def gather_seconds(self, n_bytes: float) -> float:
        """For an all-gather after which each GPU has so many bytes, of which each had its part."""
        return self.message_latency + self._transfer(n_bytes)

    def all_reduce_seconds(self, n_bytes: float) -> float:
        """For the sum of so many bytes of each GPU, after which each has it; it moves twice what a gather does."""
        return self.message_latency + 2 * self._transfer(n_bytes)

    @property
    def message_latency(self) -> float:
        """Seconds of the smallest message to all."""
        if self.gpus == 1:
            return 0.0
        if self.latency is not None:
            return self.latency
        return _NETWORK if self.nodes > 1 else self.gpu.latency

    def _transfer(self, n_bytes: float) -> float:
        """A ring within each node, then one across nodes for each GPU's part. (nccl-tests, doc/PERFORMANCE.md)"""
        within = self.gpus // self.nodes
        in_node = (within - 1) / within * n_bytes / (self.gpu.link * _LINK_SHARE)
        return in_node + (self.nodes - 1) / self.nodes * n_bytes / within / _NETWORK_BANDWIDTH


@dataclass(frozen=True)
class Step:
    """A token for each of `batch` texts: what it takes each GPU."""

    batch: int
    bytes_read: int  # weights, and the cache of every text
    read_seconds: float
    multiply_seconds: float  # goes on while reading does
    all_reduce_bytes: int  # of each all-reduce
    all_reduce_seconds: float  # of all of them
    all_reduce_latency_seconds: float  # which of that there is for the smallest message
    gather_seconds: float  # of the logits
    tokens_per_second: float  # of all texts


@dataclass(frozen=True)
class Estimate:
    """A model on a cluster. Bytes are for each GPU where not said otherwise."""

    model: str
    dtype: str
    gpu: str
    gpus: int
    nodes: int
    context: int  # tokens of each text
    weights_bytes_in_all: int
    weights_bytes: int
    weights_bytes_per_token: int  # all but the embeddings, of which a token is one row
    cache_bytes_per_token_in_all: int
    cache_bytes_per_token: int
    free_bytes: int  # for the cache
    cache_tokens: int  # that fit, of all texts together
    all_reduces: int  # for each token: one for the embedding, two in each layer
    steps: tuple[Step, ...]


def check_split(params: Params, gpus: int) -> None:
    """Raises UserError where the model cannot be split evenly over so many GPUs, naming the numbers that can be."""
    obstacle = cannot_split(params, gpus)
    if obstacle:
        possible = ", ".join(map(str, possible_sizes(params)))
        raise UserError(f"--gpus {gpus}: so many cannot share {obstacle} evenly; what can be: {possible}")


def part_of(place: TensorPlace, params: Params, gpus: int) -> int:
    """How many values of a tensor each GPU has."""
    values = torch.Size(place.shape).numel()
    if place.field not in SHARDED_DIMENSION:
        return values
    length = place.shape[SHARDED_DIMENSION[place.field]]
    return values // length * len(Shard(0, gpus).of_dimension(place.field, length, params))


def _weights_on(checkpoint: Checkpoint, gpus: int) -> tuple[int, int, int]:
    """Of each GPU: the bytes of its weights, those that a token reads, and how many values it is multiplied by."""
    weights = read = products = 0
    for place, parts in checkpoint.parts.items():
        values = part_of(place, checkpoint.params, gpus)
        scales = checkpoint.scales.get(place, ())  # hardly anything, so that they are not split here
        n_bytes = values * parts[0].itemsize + sum(tensor.nbytes for tensor in scales)
        weights += n_bytes
        if place.field != "tok_embeddings" or checkpoint.tied:
            read += n_bytes
            products += values
    return weights, read, products


def cache_bytes(checkpoint: Checkpoint, gpus: int) -> int:
    """Keys and values of a token on each GPU."""
    part = Shard(0, gpus).of_params(checkpoint.params)
    return 2 * part.n_layers * part.n_kv_heads * part.head_dim * checkpoint.dtype.itemsize


def estimate(checkpoint: Checkpoint, cluster: Cluster, context: int, batches: Sequence[int]) -> Estimate:
    """What the model takes on the cluster, with so many tokens in each text, for each number of texts at once.

    Raises UserError where it cannot be split so, or where the last of `batches` does not fit.
    """
    params, gpus = checkpoint.params, cluster.gpus
    check_split(params, gpus)
    weights, read, products = _weights_on(checkpoint, gpus)
    cache = cache_bytes(checkpoint, gpus)
    free = int(cluster.gpu.memory - _RESERVED) - weights
    needed = batches[-1] * context * cache
    if needed > free:
        takes = in_units(weights + needed + _RESERVED)
        offer = _offer(checkpoint, cluster, context, free // cache)
        raise UserError(
            f"{checkpoint.source}: {takes} are needed on each of {gpus} {cluster.name} (weights {in_units(weights)}, a "
            f"cache for {batches[-1]} texts of {context} tokens {in_units(needed)}, {in_units(_RESERVED)} to work in), "
            f"{in_units(cluster.gpu.memory)} are there; what fits: {offer}"
        )
    all_reduces = 2 * params.n_layers + 1

    def step(batch: int) -> Step:
        bytes_read = read + batch * context * cache
        read_seconds = bytes_read / cluster.read_speed
        multiply_seconds = 2 * products * batch / (cluster.gpu.multiplications * _MULTIPLY_SHARE)
        message = batch * params.dim * checkpoint.dtype.itemsize
        all_reduce_seconds = all_reduces * cluster.all_reduce_seconds(message)
        gather_seconds = cluster.gather_seconds(batch * params.vocab_size * checkpoint.dtype.itemsize)
        return Step(
            batch=batch,
            bytes_read=bytes_read,
            read_seconds=read_seconds,
            multiply_seconds=multiply_seconds,
            all_reduce_bytes=message,
            all_reduce_seconds=all_reduce_seconds,
            all_reduce_latency_seconds=all_reduces * cluster.message_latency,
            gather_seconds=gather_seconds,
            tokens_per_second=batch / (max(read_seconds, multiply_seconds) + all_reduce_seconds + gather_seconds),
        )

    return Estimate(
        model=checkpoint.source,
        dtype="int8" if checkpoint.scales else in_words(checkpoint.dtype),
        gpu=cluster.name,
        gpus=gpus,
        nodes=cluster.nodes,
        context=context,
        weights_bytes_in_all=_weights_on(checkpoint, 1)[0],
        weights_bytes=weights,
        weights_bytes_per_token=read,
        cache_bytes_per_token_in_all=cache_bytes(checkpoint, 1),
        cache_bytes_per_token=cache,
        free_bytes=free,
        cache_tokens=free // cache,
        all_reduces=all_reduces,
        steps=tuple(step(batch) for batch in batches),
    )


def _offer(checkpoint: Checkpoint, cluster: Cluster, context: int, cache_tokens: int) -> str:
    """What fits where a batch does not, with room for so many tokens (below 0: not even for the weights)."""
    if cache_tokens >= context:
        return f"--batch {cache_tokens // context}"
    if cache_tokens > 0:
        return f"--batch 1 --context {cache_tokens}"
    for gpus in possible_sizes(checkpoint.params):
        if _weights_on(checkpoint, gpus)[0] + context * cache_bytes(checkpoint, gpus) + _RESERVED <= cluster.gpu.memory:
            return f"--gpus {gpus} --batch 1"
    return "no number of them, take a larger --gpu"


def in_units(n_bytes: float) -> str:
    """1.50 GB, say, in powers of 1,000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{n_bytes / 1e3:.2f} KB"


def show(found: Estimate, cluster: Cluster) -> None:
    """Prints a table, and the same as JSON in the last line."""
    several = found.gpus > 1
    where = f"{found.gpus} {found.gpu}" + (f" in {found.nodes} nodes" if found.nodes > 1 else "")
    print(f"{found.model} in {found.dtype} on {where}: an estimate, nothing is measured")
    _line("weights", in_units(found.weights_bytes_in_all))
    if several:
        _line("  on each GPU", in_units(found.weights_bytes))
    _line("cache of a token", in_units(found.cache_bytes_per_token_in_all))
    if several:
        _line("  on each GPU", in_units(found.cache_bytes_per_token))
    _line("free for the cache", in_units(found.free_bytes) + (" on each GPU" if several else ""))
    _line("  tokens that fit", f"{found.cache_tokens:,}")
    for step in found.steps:
        print(f"\n{step.batch} text{'s at once' if step.batch > 1 else ''}, behind {found.context} tokens")
        _line("read" + (", on each GPU" if several else ""), in_units(step.bytes_read))
        _line(f"  at {cluster.read_speed / 1e12:.2f} TB/s", f"{step.read_seconds * 1e3:.2f} ms")
        _line("multiply meanwhile", f"{step.multiply_seconds * 1e3:.2f} ms")
        if several:
            name = f"{found.all_reduces} all-reduces of {in_units(step.all_reduce_bytes)}"
            _line(name, f"{step.all_reduce_seconds * 1e3:.2f} ms")
            _line("  of it latency", f"{step.all_reduce_latency_seconds * 1e3:.2f} ms")
            _line("gather the logits", f"{step.gather_seconds * 1e3:.2f} ms")
        _line("tokens/s", f"{step.tokens_per_second:.1f}")
    print(json.dumps(asdict(found)))


def _line(name: str, value: str) -> None:
    print(f"{name:<30} {value}")


def build_parser() -> ArgumentParser:
    """The options of `python -m llama3_raw.bench --estimate`."""
    parser = ArgumentParser(
        prog="python -m llama3_raw.bench --estimate MODEL",
        description="What a model takes on GPUs that need not be there, by arithmetic; nothing is measured. MODEL is "
        f"one of {', '.join(SYNTHETIC)}, or a folder as for --weights.",
    )
    parser.add_argument("--estimate", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--gpu", type=str.lower, choices=GPUS, default="h200", help="(default: %(default)s)")
    parser.add_argument("--gpus", type=positive_int, default=1, metavar="N", help="in all (default: %(default)s)")
    parser.add_argument("--nodes", type=positive_int, default=1, metavar="N", help="they are in (default: %(default)s)")
    parser.add_argument(
        "--context", type=positive_int, default=2048, metavar="N", help="tokens of each text (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=positive_int, default=16, metavar="N", help="texts at once, beside one (default: %(default)s)"
    )
    parser.add_argument(
        "--bandwidth",
        type=_positive,
        metavar="TB/S",
        help=f"that reading reaches (default: {_BANDWIDTH_SHARE} of the data sheet's)",
    )
    parser.add_argument(
        "--latency",
        type=_positive,
        metavar="MICROSECONDS",
        help=f"of a small all-reduce (default: {_NVLINK * 1e6:.0f} over NVLink, {_PCIE * 1e6:.0f} over PCIe, "
        f"{_NETWORK * 1e6:.0f} across nodes)",
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback for what cannot be done")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"should be a positive number, is {text}")
    return value


def run_estimate(arguments: Sequence[str]) -> int:
    """What bench does with --estimate among its arguments; -> exit status."""
    options = build_parser().parse_args(arguments)
    if options.gpus % options.nodes:
        raise UserError(f"--nodes {options.nodes}: {options.gpus} GPUs do not divide into so many; change --gpus")
    name = options.estimate
    checkpoint = (
        synthetic_checkpoint(name) if name in SYNTHETIC else open_checkpoint(find_model(name, "--estimate").path)
    )
    cluster = Cluster(
        options.gpu,
        options.gpus,
        options.nodes,
        bandwidth=options.bandwidth and options.bandwidth * 1e12,
        latency=options.latency and options.latency / 1e6,
    )
    # the context is not held against the model's: 8b and 70b stand for Llama 3.1 to 3.3 as well
    show(estimate(checkpoint, cluster, options.context, sorted({1, options.batch})), cluster)
    return 0
