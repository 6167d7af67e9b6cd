"""The script that test_tensor_parallel.py runs in each process: python of_ranks.py FOLDER RESULTS, under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import llama3_raw
from llama3_raw import REFERENCE, KVCache, forward
from llama3_raw.backends.choose import suitable_ops
from llama3_raw.backends.tensor_parallel import parallel_ops
from llama3_raw.checkpoint.sharding import Shard
from llama3_raw.system.process_groups import init

PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 23, 84, 62, 64]
CPU = torch.device("cpu")


def logits_of(model: llama3_raw.Model, ops: llama3_raw.ops.Ops) -> dict[str, torch.Tensor]:
    """Return the logits of a prompt, of its last tokens with a cache, and of a batch of unequal lengths with one."""
    results = {"prompt": forward(model.weights, model.params, torch.tensor(PROMPT), ops=ops)}
    cache = KVCache.allocate(model.params, max_seq_len=len(PROMPT), like=model.weights)
    forward(model.weights, model.params, torch.tensor(PROMPT[:-3]), cache=cache, ops=ops)
    for position in range(len(PROMPT) - 3, len(PROMPT)):
        token = torch.tensor(PROMPT[position : position + 1])
        results[f"token {position}"] = forward(
            model.weights, model.params, token, cache=cache, start=position, logits_at=-1, ops=ops
        )
    cache = KVCache.allocate(model.params, max_seq_len=len(PROMPT), like=model.weights, batch=(2,))
    rows = torch.tensor([PROMPT[:6], PROMPT[6:]])
    results["batch"] = forward(
        model.weights,
        model.params,
        rows,
        cache=cache,
        start=torch.tensor([0, 3]),
        logits_at=torch.tensor([5, 2]),
        ops=ops,
    )
    return results


def all_logits(
    folder: Path, shard: Shard | None = None, ranks: llama3_raw.system.process_groups.Ranks | None = None
) -> dict[str, torch.Tensor]:
    """Return the results of `logits_of` in fp32 and bf16, with the exact and the fast operations."""
    results: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = llama3_raw.load(folder, dtype=dtype, shard=shard)
        for name, ops in (("exact", REFERENCE), ("fast", suitable_ops(CPU))):
            if ranks is not None:
                ops = parallel_ops(ops, model.weights, ranks.tensor)
            with torch.no_grad():
                by_case = logits_of(model, ops)
            results |= {f"{dtype} {name} {key}": logits for key, logits in by_case.items()}
    return results


if __name__ == "__main__":
    with init(lambda: CPU) as these:
        assert these is not None
        mine = Shard(these.tensor.rank, these.tensor.size)
        torch.save(all_logits(Path(sys.argv[1]), mine, these), Path(sys.argv[2], f"{these.rank}.pt"))
