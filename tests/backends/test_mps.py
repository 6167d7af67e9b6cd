"""An Apple GPU as far as a CPU can show it: torch implements every operation there, in the dtypes that it has.

None of it has run on one. Torch's table of its operations says for which devices each is implemented.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama3_raw.__main__ import main
from llama3_raw.backends.choose import suitable_ops
from llama3_raw.model import REFERENCE
from llama3_raw.perplexity import main as perplexity
from llama3_raw.tracing.__main__ import main as tracing
from tests.backends.pretend_gpu import APPLE_GPU, PretendGpu, generators_on
from tests.paths import TINY

yaml = pytest.importorskip("yaml")
ANYWHERE = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
SETTINGS = ["--temperature=0.8", "--top-k=20", "--top-p=0.9", "--min-p=0.01", "--repetition-penalty=1.2", "--seed=1"]


def devices_by_operation() -> dict[str, set[str]]:
    """Return for which devices torch implements each operation, such as "add.Tensor"."""
    file = Path(torch.__file__).parents[1] / "torchgen" / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = {entry["func"].partition("(")[0]: entry for entry in yaml.safe_load(file.read_text())}

    def devices(entry: dict[str, Any]) -> set[str]:
        if "structured_delegate" in entry:
            return devices(entries[entry["structured_delegate"]])
        keys = entry.get("dispatch", dict.fromkeys(ANYWHERE))
        return {name.strip() for key in keys for name in key.split(",")}

    return {name: devices(entry) for name, entry in entries.items()}


class Recorded(TorchDispatchMode):
    """Keeps the names of the operations on the fake GPU, and the dtypes of its tensors."""

    def __init__(self, gpu: PretendGpu) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._gpu = gpu
        self.operations: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._gpu.computes:
            return out
        self.operations.add(
            func._schema.name.removeprefix("aten::") + f".{func._overloadname}".removesuffix(".default")
        )
        self.dtypes |= {leaf.dtype for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}
        return out


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGpu]:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 1 << 33)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 0)
    monkeypatch.setattr(torch, "Generator", generators_on(APPLE_GPU))
    with PretendGpu(APPLE_GPU) as gpu:
        yield gpu


COMMANDS = {
    "greedy": (main, ["Once upon a time", "--max-new-tokens=5"]),
    "sampled": (main, ["Once upon a time", "--max-new-tokens=5", *SETTINGS]),
    "lookup": (main, ["1 2 3 1 2 3 1 2 3", "--ids", "--max-new-tokens=9", "--lookup=4"]),
    "top": (main, ["Once upon a time", "--max-new-tokens=2", "--top=3"]),
    "tracing": (tracing, ["Once upon a time"]),
    "perplexity": (perplexity, ["-"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_operation_is_implemented(
    name: str, apple: PretendGpu, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So PYTORCH_ENABLE_MPS_FALLBACK is not needed. There are no complex numbers and no float64, which has none."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Once upon a time, there was a girl. " * 20)))
    command, options = COMMANDS[name]
    with Recorded(apple) as recorded:
        assert command([*options, f"--weights={TINY}", "--device=mps"]) == 0, capsys.readouterr().err
    assert "mps" in capsys.readouterr().err
    devices = devices_by_operation()
    missing = {name for name in recorded.operations if not devices[name] & {"MPS", *ANYWHERE}}
    assert missing == set()
    assert {"mm", "_softmax"} <= recorded.operations
    assert recorded.dtypes <= {torch.bfloat16, torch.float32, torch.int64, torch.bool}


def test_the_operations_are_the_exact_ones() -> None:
    assert suitable_ops(torch.device("mps")) is REFERENCE


def test_the_table_knows_what_is_missing() -> None:
    """An operation that torch's issues name as missing; otherwise the test above would show nothing."""
    devices = devices_by_operation()
    assert not devices["geqrf"] & {"MPS", *ANYWHERE}
