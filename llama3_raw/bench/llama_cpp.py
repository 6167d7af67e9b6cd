"""llama.cpp as a baseline: the GGUF files that it runs, and the programs that make and run them.

`llama.cpp` runs the weights as they are stored, `llama.cpp:TYPE` what its program llama-quantize makes of them.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.gguf import is_gguf_of, write_gguf
from ..checkpoint.gguf_header import read_header
from ..cli.models import ChosenModel
from ..errors import UserError, in_short, needed_package
from ..system.files import atomic_write, check_disk
from ..weights import Model
from .engines import Engine, random_ids

LLAMA_CPP = "llama.cpp"
_QUANTIZE = "llama-quantize"


class LlamaBench:
    """llama-bench, llama.cpp's own benchmark, from the PATH.

    Each measurement starts a process, whose loading and warm-up are not timed. Its defaults are kept: batches of 2,048
    tokens in micro-batches of 512, keys and values in fp16, prompts of random tokens. `decode` computes the context
    first.
    """

    def __init__(self, program: str, gguf: Path, threads: int, name: str = LLAMA_CPP):
        self.name = name
        self.version = f"{program} (version unknown before it has run)"
        self.weights_bytes = weights_bytes(gguf)
        self._command = [program, "-m", str(gguf), "-t", str(threads), "-ngl", "0", "-r", "1", "-o", "json"]

    def prefill(self, length: int) -> float:
        return self._seconds("-p", length, "-n", 0)

    def decode(self, context: int, count: int) -> float:
        return self._seconds("-p", 0, "-n", count, "-d", context)

    def _seconds(self, *arguments: str | int) -> float:
        command = [*self._command, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        try:
            (result,) = json.loads(done.stdout)
            self.version = f"{self.name} (llama-bench, build {result['build_number']}, {result['build_commit']})"
            return float(result["samples_ns"][0]) / 1e9
        except (ValueError, KeyError, TypeError, IndexError) as error:
            output = in_short((done.stderr or done.stdout)[-200:])
            raise UserError(f"{' '.join(command)}: failed with status {done.returncode}: {output}") from error


class Xllamacpp:
    """llama.cpp from the package xllamacpp: its server, which accepts token ids and reports the time.

    Its defaults are kept: batches of 2,048 tokens in micro-batches of 512, keys and values in fp16. `decode` computes
    the context first.
    """

    def __init__(self, model: Model, gguf: Path, threads: int, longest: int, name: str = LLAMA_CPP):
        xllamacpp: Any = needed_package("xllamacpp", "--vs llama.cpp without a llama-bench on the PATH")
        features = re.findall(r"(\w+) = 1", xllamacpp.get_system_info())
        self.name = name
        self.version = f"{name} (xllamacpp {xllamacpp.__version__}: {' '.join(features)})"
        self.weights_bytes = weights_bytes(gguf)
        self._ids = random_ids(model, longest)
        params = xllamacpp.CommonParams()
        params.model.path = str(gguf)
        params.n_ctx = longest + 1
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.fit_params = params.use_jinja = params.enable_chat_template = False
        params.cache_ram_mib = 0  # otherwise it keeps copies of old prompts
        params.verbosity = 0
        try:
            self._server = xllamacpp.Server(params)
        except Exception as error:  # its C++ may throw anything
            raise UserError(f"{gguf}: llama.cpp cannot run this model: {in_short(error)}") from error

    def prefill(self, length: int) -> float:
        return float(self._complete(self._ids[:length], 1)["timings"]["prompt_ms"]) / 1e3

    def decode(self, context: int, count: int) -> float:
        # the first token comes from prefill, and so does its time
        return float(self._complete(self._ids[:context], count + 1)["timings"]["predicted_ms"]) / 1e3

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """Return the tokens that follow the prompt, to check that it is the same model."""
        text = self._complete(ids, count)["choices"][0]["text"]
        return [int(token) for token in re.findall(r"t(\d+)", text)]  # as write_gguf named them

    def _complete(self, ids: Sequence[int], count: int) -> dict[str, Any]:
        request = {"prompt": list(ids), "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer: dict[str, Any] = self._server.handle_completions(request)
        if answer.get("timings", {}).get("predicted_n") != count:
            raise UserError(f"--vs llama.cpp: llama.cpp did not generate {count} tokens: {in_short(answer)}")
        return answer


def open_llama_cpp(name: str, model: Model, gguf: Path, longest: int) -> Engine:
    """Return a llama-bench on the PATH, which may be built for this processor; without one, the package xllamacpp."""
    program, threads = shutil.which("llama-bench"), torch.get_num_threads()
    return LlamaBench(program, gguf, threads, name) if program else Xllamacpp(model, gguf, threads, longest, name)


def weights_bytes(gguf: Path) -> int | None:
    """Return the bytes of the matrices that every token is multiplied by; None if the file has types unknown here."""
    try:
        tensors = read_header(gguf).tensors
    except UserError:
        return None
    embeddings = "token_embd.weight" if "output.weight" in tensors else None
    return sum(info.n_bytes for name, info in tensors.items() if len(info.shape) == 2 and name != embeddings)


def is_llama_cpp(name: str) -> bool:
    """Whether a baseline is `llama.cpp` or `llama.cpp:TYPE`."""
    return name.partition(":")[0] == LLAMA_CPP


def type_of(name: str) -> str | None:
    """Return TYPE of `llama.cpp:TYPE`; None for `llama.cpp`."""
    return name.partition(":")[2] or None


def relative_size(name: str, dtype: torch.dtype) -> float:
    """Return about how large the file of `llama.cpp:TYPE` is, compared with one in this dtype.

    A type is named by its bits; its scales, and the matrices for which it keeps more, are counted as one more.
    """
    bits = re.search(r"\d+", type_of(name) or "")
    return (int(bits.group()) + 1) / (8 * dtype.itemsize) if bits else 1.0


def check_types(names: Sequence[str]) -> None:
    """Raise UserError if llama-quantize is missing, or does not know the TYPE of a `llama.cpp:TYPE`."""
    kinds = [kind for kind in map(type_of, filter(is_llama_cpp, names)) if kind]
    if not kinds:
        return
    program = shutil.which(_QUANTIZE)
    if program is None:
        raise UserError(
            f"--vs {LLAMA_CPP}:{kinds[0]} needs llama.cpp's program {_QUANTIZE} on the PATH; its source is in "
            "llama-cpp-python (pip download --no-deps --no-binary :all: llama-cpp-python), in vendor/llama.cpp: "
            "cmake -B build && cmake --build build --target llama-quantize llama-bench"
        )
    done = subprocess.run([program, "--help"], capture_output=True, text=True)
    known = re.findall(r"^ *\d+ +or +(\w+)", done.stdout + done.stderr, re.MULTILINE)
    for kind in kinds:
        if known and kind not in known:
            raise UserError(f"--vs {LLAMA_CPP}:{kind}: {program} has no such type; it has {', '.join(known)}")


def own_gguf(chosen: ChosenModel) -> Path | None:
    """Return the model's own file if it is a GGUF that holds just what is measured; otherwise None."""
    checkpoint = chosen.checkpoint
    n_layers = checkpoint.metadata.get(f"{checkpoint.metadata.get('general.architecture')}.block_count")
    if checkpoint.adapter or n_layers != checkpoint.params.n_layers:
        return None
    as_stored = bool(checkpoint.blocks) or chosen.dtype in (None, checkpoint.dtype)
    return checkpoint.params_file if as_stored else None


@contextlib.contextmanager
def gguf_files(names: Sequence[str], chosen: ChosenModel, model: Model, gguf: str | None) -> Iterator[dict[str, Path]]:
    """Return the file for each of these baselines, all in llama.cpp; missing ones are written.

    model: with the weights as they are stored. gguf: the file for those; the ones of llama-quantize are kept beside it.
    None takes the model's own GGUF file, or else writes temporary files, removed at the end of the block. Raises
    UserError if the GGUF file is of another model, or if a file cannot be written.
    """
    if chosen.checkpoint.blocks and gguf:
        raise UserError(f"--gguf {gguf}: the model's own GGUF file is compared as it is; leave --gguf out")
    dtype = chosen.dtype or chosen.checkpoint.dtype
    with contextlib.ExitStack() as stack:
        folder = None if gguf else stack.enter_context(tempfile.TemporaryDirectory(prefix="llama3_raw-"))
        written = Path(gguf or f"{folder}/model.gguf")
        own = None if gguf else own_gguf(chosen)
        if own is None and not written.exists():
            write_gguf(model, written)
        elif own is None and not is_gguf_of(written, model):
            raise UserError(
                f"--gguf {written}: is of another model (or other --layers); name another file, or remove it"
            )
        files = {}
        for name in names:
            source, kind = own or written, type_of(name)
            target = written.with_name(f"{written.stem}.{kind}{written.suffix}")
            files[name] = source if kind is None else _quantized(source, target, kind, dtype)
        if folder and LLAMA_CPP not in names:
            written.unlink(missing_ok=True)  # the disk may be needed
        yield files


def _quantized(source: Path, target: Path, kind: str, dtype: torch.dtype) -> Path:
    """Return the file that llama-quantize makes of a GGUF file in this dtype; one that exists is used again.

    Raises UserError if it is older than its source, or cannot be written.
    """
    if target.exists():
        if target.stat().st_mtime < source.stat().st_mtime:
            raise UserError(f"{target}: is older than {source}, and may be of another model; remove it")
        return target
    program = shutil.which(_QUANTIZE) or _QUANTIZE
    print(f"llama3_raw: writing {target} with {program}", file=sys.stderr)
    with atomic_write(target) as part:
        check_disk(target, part.parent, int(source.stat().st_size * relative_size(f"{LLAMA_CPP}:{kind}", dtype)))
        command = [program, str(source), str(part), kind, str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            output = in_short((done.stderr or done.stdout)[-200:])
            raise UserError(f"{' '.join(command)}: failed with status {done.returncode}: {output}")
    fallback = re.search(r"\d+ of \d+ tensor\(s\) required fallback", done.stdout + done.stderr)
    if fallback:
        print(f"llama3_raw: warning: {target}: {fallback.group()} to another type than {kind}", file=sys.stderr)
    return target
