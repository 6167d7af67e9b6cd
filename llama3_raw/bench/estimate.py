"""Estimate, without any GPU, what a model needs on GPUs: memory, bytes read and messages per token, tokens/s.

python -m llama3_raw.bench --estimate prints the result. Each layer is split over all GPUs (Shoeybi et al. 2019): rows
of wq, wk, wv, w1, w3, output and tok_embeddings, columns of wo and w2; every GPU has all norms. For a token, every GPU
reads its shard of the weights and of the cache, and each layer has two all-reduces. A real run is slower, because of
what is left out: the time between kernels, less efficient reads of small matrices, scores over a long context.
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
from ..weights import TensorSpec, dtype_name
from .synthetic import SYNTHETIC, synthetic_checkpoint

_NVLINK, _PCIE, _NETWORK = 15e-6, 50e-6, 47e-6
"""Seconds for an all-reduce of a few KB: over NVLink within a node, over PCIe, and over InfiniBand.

For 4 to 32 KB on 8 H100, vLLM's own kernel took 9 to 12 µs (sgl-project/sglang#2904); NCCL is assumed to take 15. 54 µs
by NCCL on 8 RTX 3090 (NVIDIA/nccl#1439). 46 to 48 µs by NCCL on 2 nodes of 8 H20 (NVIDIA/nccl#1244), in total.
"""
_NETWORK_BANDWIDTH = 50e9  # bytes/s from each GPU to another node: a 400 Gbit/s port per GPU, as in NVIDIA's HGX
_BANDWIDTH_SHARE = 0.9  # of the data sheet's bandwidth: an H200 copies 4.3 of 4.8 TB/s
_MULTIPLY_SHARE = 0.7  # of the data sheet's rate; an assumption
_LINK_SHARE = 0.8  # of the data sheet's bandwidth: 365 to 370 of 450 GB/s on 8 H100 (NVIDIA/nccl#1455)
_RESERVED = 2e9  # bytes for CUDA, NCCL and activations; an assumption


class Gpu(NamedTuple):
    """A GPU according to its vendor's data sheet, in powers of 1,000."""

    memory: float  # bytes
    bandwidth: float  # bytes/s of its memory
    multiplications: float  # dense bf16 operations/s (no sparsity)
    link: float  # bytes/s to the other GPUs of its node, in one direction
    latency: float = _NVLINK  # seconds for a small all-reduce within its node


# NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM, DGX B200 (one of its eight), L40S; Ada white paper
GPUS = {
    "a100": Gpu(80e9, 2.039e12, 312e12, 300e9),
    "h100": Gpu(80e9, 3.35e12, 989e12, 450e9),
    "h200": Gpu(141e9, 4.8e12, 989e12, 450e9),
    "b200": Gpu(180e9, 8e12, 2250e12, 900e9),
    "l40s": Gpu(48e9, 0.864e12, 362e12, 32e9, _PCIE),
    "rtx4090": Gpu(24e9, 1.008e12, 165e12, 32e9, _PCIE),
}


class Cluster(NamedTuple):
    """A number of equal GPUs, evenly distributed over nodes."""

    name: str  # a key of GPUS
    gpus: int = 1  # in total
    nodes: int = 1
    bandwidth: float | None = None  # bytes/s that reads reach; None: a share of the data sheet's
    latency: float | None = None  # seconds for a small all-reduce over all GPUs; None: as above

    @property
    def gpu(self) -> Gpu:
        """The data sheet of one GPU."""
        return GPUS[self.name]

    @property
    def read_speed(self) -> float:
        """Bytes/s that each GPU reads from its memory."""
        return self.bandwidth or self.gpu.bandwidth * _BANDWIDTH_SHARE

    def gather_seconds(self, n_bytes: float) -> float:
        """Return the seconds for an all-gather of `n_bytes`, of which each GPU has a shard."""
        return self.message_latency + self._transfer(n_bytes)

    def all_reduce_seconds(self, n_bytes: float) -> float:
        """Return the seconds for an all-reduce of `n_bytes` per GPU, which moves twice as much as a gather."""
        return self.message_latency + 2 * self._transfer(n_bytes)

    @property
    def message_latency(self) -> float:
        """Seconds for the smallest message to all GPUs."""
        if self.gpus == 1:
            return 0.0
        if self.latency is not None:
            return self.latency
        return _NETWORK if self.nodes > 1 else self.gpu.latency

    def _transfer(self, n_bytes: float) -> float:
        """A ring within each node, then one across nodes for each GPU's shard. (nccl-tests, doc/PERFORMANCE.md)"""
        within = self.gpus // self.nodes
        in_node = (within - 1) / within * n_bytes / (self.gpu.link * _LINK_SHARE)
        return in_node + (self.nodes - 1) / self.nodes * n_bytes / within / _NETWORK_BANDWIDTH


@dataclass(frozen=True)
class Step:
    """What each GPU does for one token of each of `batch` texts."""

    batch: int
    bytes_read: int  # weights, and the caches of all texts
    read_seconds: float
    multiply_seconds: float  # at the same time as reading
    all_reduce_bytes: int  # in each all-reduce
    all_reduce_seconds: float  # for all of them
    all_reduce_latency_seconds: float  # part of the above: what the smallest messages need
    gather_seconds: float  # for the logits
    tokens_per_second: float  # over all texts


@dataclass(frozen=True)
class Estimate:
    """A model on a cluster. Bytes are per GPU, except in fields that end in `_in_all`."""

    model: str
    dtype: str
    gpu: str
    gpus: int
    nodes: int
    context: int  # tokens in each text
    weights_bytes_in_all: int
    weights_bytes: int
    weights_bytes_per_token: int  # without the embeddings, of which a token reads one row
    cache_bytes_per_token_in_all: int
    cache_bytes_per_token: int
    free_bytes: int  # for the cache
    cache_tokens: int  # that fit, over all texts
    all_reduces: int  # per token: one for the embedding, two in each layer
    steps: tuple[Step, ...]


def check_split(params: Params, gpus: int) -> None:
    """Raise UserError unless the model can be split evenly over `gpus`; the message lists the numbers that work."""
    obstacle = cannot_split(params, gpus)
    if obstacle:
        possible = ", ".join(map(str, possible_sizes(params)))
        raise UserError(f"--gpus {gpus}: {gpus} GPUs cannot share {obstacle} evenly; possible numbers: {possible}")


def shard_numel(spec: TensorSpec, params: Params, gpus: int) -> int:
    """Return the number of values of a tensor on each GPU."""
    values = torch.Size(spec.shape).numel()
    if spec.field not in SHARDED_DIMENSION:
        return values
    length = spec.shape[SHARDED_DIMENSION[spec.field]]
    return values // length * len(Shard(0, gpus).of_dimension(spec.field, length, params))


def _weights_on(checkpoint: Checkpoint, gpus: int) -> tuple[int, int, int]:
    """Return, per GPU, the bytes of the weights, the bytes a token reads, and the values a token is multiplied by."""
    weights = read = products = 0
    for spec, shards in checkpoint.shards.items():
        values = shard_numel(spec, checkpoint.params, gpus)
        n_bytes = sum(shard.nbytes for shard in shards) * values // torch.Size(spec.shape).numel()
        weights += n_bytes
        if spec.field != "tok_embeddings" or checkpoint.tied:
            read += n_bytes
            products += values
    return weights, read, products


def cache_bytes(checkpoint: Checkpoint, gpus: int) -> int:
    """Return the bytes of a token's keys and values on each GPU."""
    params = Shard(0, gpus).of_params(checkpoint.params)
    return 2 * params.n_layers * params.n_kv_heads * params.head_dim * checkpoint.dtype.itemsize


def estimate(checkpoint: Checkpoint, cluster: Cluster, context: int, batches: Sequence[int]) -> Estimate:
    """Estimate the model on the cluster. context: tokens in each text. batches: numbers of texts at once.

    Raises UserError if the model cannot be split over the GPUs, or if the last of `batches` does not fit.
    """
    params, gpus = checkpoint.params, cluster.gpus
    check_split(params, gpus)
    weights, read, products = _weights_on(checkpoint, gpus)
    cache = cache_bytes(checkpoint, gpus)
    free = int(cluster.gpu.memory - _RESERVED) - weights
    needed = batches[-1] * context * cache
    if needed > free:
        total = in_units(weights + needed + _RESERVED)
        suggestion = _suggestion(checkpoint, cluster, context, free // cache)
        raise UserError(
            f"{checkpoint.source}: {total} are needed on each of {gpus} {cluster.name} (weights {in_units(weights)}, "
            f"cache for {batches[-1]} texts of {context} tokens {in_units(needed)}, activations and CUDA "
            f"{in_units(_RESERVED)}), but it has {in_units(cluster.gpu.memory)}; what fits: {suggestion}"
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
        dtype=checkpoint.format or dtype_name(checkpoint.dtype),
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


def _suggestion(checkpoint: Checkpoint, cluster: Cluster, context: int, cache_tokens: int) -> str:
    """Return options that fit, where the cache has space for `cache_tokens` (below 0: the weights do not fit)."""
    if cache_tokens >= context:
        return f"--batch {cache_tokens // context}"
    if cache_tokens > 0:
        return f"--batch 1 --context {cache_tokens}"
    for gpus in possible_sizes(checkpoint.params):
        if _weights_on(checkpoint, gpus)[0] + context * cache_bytes(checkpoint, gpus) + _RESERVED <= cluster.gpu.memory:
            return f"--gpus {gpus} --batch 1"
    return "no number of them; choose a larger --gpu"


def in_units(n_bytes: float) -> str:
    """Format bytes in powers of 1,000, such as "1.50 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{n_bytes / 1e3:.2f} KB"


def show(result: Estimate, cluster: Cluster) -> None:
    """Print a table, then the same as JSON on the last line."""
    several = result.gpus > 1
    where = f"{result.gpus} {result.gpu}" + (f" in {result.nodes} nodes" if result.nodes > 1 else "")
    print(f"{result.model} in {result.dtype} on {where}: an estimate, not a measurement")
    _line("weights", in_units(result.weights_bytes_in_all))
    if several:
        _line("  on each GPU", in_units(result.weights_bytes))
    _line("cache per token", in_units(result.cache_bytes_per_token_in_all))
    if several:
        _line("  on each GPU", in_units(result.cache_bytes_per_token))
    _line("free for the cache", in_units(result.free_bytes) + (" on each GPU" if several else ""))
    _line("  tokens that fit", f"{result.cache_tokens:,}")
    for step in result.steps:
        print(f"\n{step.batch} text{'s at once' if step.batch > 1 else ''}, at context {result.context}")
        _line("read" + (", on each GPU" if several else ""), in_units(step.bytes_read))
        _line(f"  at {cluster.read_speed / 1e12:.2f} TB/s", f"{step.read_seconds * 1e3:.2f} ms")
        _line("multiply, meanwhile", f"{step.multiply_seconds * 1e3:.2f} ms")
        if several:
            name = f"{result.all_reduces} all-reduces of {in_units(step.all_reduce_bytes)}"
            _line(name, f"{step.all_reduce_seconds * 1e3:.2f} ms")
            _line("  of which latency", f"{step.all_reduce_latency_seconds * 1e3:.2f} ms")
            _line("gather the logits", f"{step.gather_seconds * 1e3:.2f} ms")
        _line("tokens/s", f"{step.tokens_per_second:.1f}")
    print(json.dumps(asdict(result)))


def _line(name: str, value: str) -> None:
    print(f"{name:<30} {value}")


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m llama3_raw.bench --estimate`."""
    parser = ArgumentParser(
        prog="python -m llama3_raw.bench --estimate MODEL",
        description="Estimate what a model needs on GPUs that you do not have; nothing is measured. MODEL is one of "
        f"{', '.join(SYNTHETIC)}, or a folder as for --weights.",
    )
    parser.add_argument("--estimate", required=True, help=argparse.SUPPRESS)
    parser.add_argument(
        "--gpu", type=str.lower, choices=GPUS, default="h200", help="kind of GPU (default: %(default)s)"
    )
    parser.add_argument(
        "--gpus", type=positive_int, default=1, metavar="N", help="number of GPUs (default: %(default)s)"
    )
    parser.add_argument(
        "--nodes",
        type=positive_int,
        default=1,
        metavar="N",
        help="number of nodes that they are in (default: %(default)s)",
    )
    parser.add_argument(
        "--context", type=positive_int, default=2048, metavar="N", help="tokens in each text (default: %(default)s)"
    )
    parser.add_argument(
        "--batch",
        type=positive_int,
        default=16,
        metavar="N",
        help="texts at once, in addition to one (default: %(default)s)",
    )
    parser.add_argument(
        "--bandwidth",
        type=_positive,
        metavar="TB/S",
        help=f"bandwidth that reads reach (default: {_BANDWIDTH_SHARE} of the data sheet's)",
    )
    parser.add_argument(
        "--latency",
        type=_positive,
        metavar="MICROSECONDS",
        help=f"latency of a small all-reduce (default: {_NVLINK * 1e6:.0f} over NVLink, {_PCIE * 1e6:.0f} over PCIe, "
        f"{_NETWORK * 1e6:.0f} across nodes)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"should be a positive number, is {text}")
    return value


def run_estimate(arguments: Sequence[str]) -> int:
    """Run bench --estimate and return the exit status."""
    options = build_parser().parse_args(arguments)
    if options.gpus % options.nodes:
        raise UserError(
            f"--nodes {options.nodes}: {options.gpus} GPUs cannot be divided evenly among them; change --gpus"
        )
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
    # not checked against the model's context, because 8b and 70b stand for Llama 3.1 to 3.3 too
    show(estimate(checkpoint, cluster, options.context, sorted({1, options.batch})), cluster)
    return 0
