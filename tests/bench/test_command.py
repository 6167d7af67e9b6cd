"""The command bench: its output, the baselines, the ratios, the plot, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import llama3_raw
from llama3_raw import Model, Params, UserError
from llama3_raw.bench import __main__ as bench
from llama3_raw.bench import baselines, engines, llama_cpp, roofline
from llama3_raw.bench import measure as measuring
from llama3_raw.bench.__main__ import main
from llama3_raw.bench.baselines import CompiledTransformers, Transformers, check_baselines, open_baselines
from llama3_raw.bench.engines import ThisEngine, bytes_per_token
from llama3_raw.bench.llama_cpp import LlamaBench, Xllamacpp
from llama3_raw.bench.measure import Probes, Task, compare, measure, probes_of, ratios_by_round
from llama3_raw.bench.parser import build_parser
from llama3_raw.bench.roofline import copy_speed, multiply_speed, seconds_of
from llama3_raw.checkpoint.gguf import is_gguf_of, write_gguf
from llama3_raw.cli import memory_plan, models
from llama3_raw.cli.memory_plan import MemoryPlan, RunShape
from llama3_raw.cli.models import choose_model
from llama3_raw.convert import main as convert
from llama3_raw.params import RopeScaling
from llama3_raw.system.machine import processors
from tests.paths import TINY
from tests.references import dense, random_weights

QUICK = ("--weights", str(TINY), "--prefill", "20", "5", "--rounds", "2")
needs_xllamacpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp has no wheel for this system"
)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")


class CompileCounter:
    """Count the graphs that torch.compile creates from now on."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()

    def number(self) -> int:
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


class Clock:
    """An engine with fixed times, one second for prefill and two for decode, that records its calls."""

    def __init__(self, name: str = "clock", done: list[tuple[str, str, int]] | None = None):
        self.name = self.version = name
        self.weights_bytes: int | None = None
        self.done = [] if done is None else done

    def prefill(self, length: int) -> float:
        self.done.append((self.name, "prefill", length))
        return 1.0

    def decode(self, context: int, count: int) -> float:
        self.done.append((self.name, "decode", context))
        return 2.0


@pytest.fixture
def no_llama_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide any llama-bench on the PATH."""
    monkeypatch.setattr(llama_cpp, "shutil", SimpleNamespace(which=lambda _: None))


def output_of(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    """Return the table, and the JSON from the last line."""
    table, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    return table, json.loads(last)


@pytest.mark.slow
def test_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(QUICK) == 0
    table, figures = output_of(capsys)
    assert list(figures["prefill_tokens_per_second"]) == ["5", "20"]
    assert all(speed > 0 for speed in figures["prefill_tokens_per_second"].values())
    assert figures["decode_tokens_per_second_by_context"] == {"5": figures["decode_tokens_per_second"]}
    assert f"{figures['decode_tokens_per_second']:.2f} tokens/s" in table
    assert f"{figures['decode_share_of_read_loop']:.1%}" in table
    assert 0 < figures["load_seconds"] + figures["first_pass_seconds"] < figures["start_to_first_token_seconds"]
    assert f"{figures['start_to_first_token_seconds']:.2f} s" in table
    assert figures["peak_ram_bytes"] > 10e6
    assert figures["threads"] == torch.get_num_threads()
    assert re.search(r"^decode at context +5 ", table, re.MULTILINE)
    assert figures["vs"] == {}


@pytest.mark.slow
def test_batch_as_baseline(tiny: Model, capsys: pytest.CaptureFixture[str]) -> None:
    """All tokens of a batch count, but only those that are timed: the ones after the first of each text."""
    assert main(["--weights", str(TINY), "--prefill", "5", "--rounds", "1", "--batch", "3"]) == 0
    table, figures = output_of(capsys)
    assert "compared with 3 texts at a time, counting the tokens of all" in table
    assert figures["vs"]["batch of 3"]["decode_tokens_per_second"].keys() == {"5"}
    passes = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engines, "seconds_of", lambda work, device: float(len(work())))
        batch = engines.Batch(tiny, 3, 9)
        passes = [batch.prefill(5), batch.decode(5, 4)]
    # one token (or four) and the end of each text, divided by three texts
    assert passes == [1 + 1, 4 + 1]


@pytest.mark.slow
@needs_xllamacpp
@pytest.mark.usefixtures("no_llama_bench")
@pytest.mark.skipif(processors() < 2, reason="two processes share two threads")
def test_two_processes_as_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--weights", str(TINY), "--prefill", "5", "--rounds", "1", "--vs", "two-processes"]
    assert main([*options, "--threads", "2"]) == 0
    table, figures = output_of(capsys)
    assert "compared with 2 processes with 1 thread each" in table
    assert figures["vs"]["two-processes"]["decode_tokens_per_second"]["5"] > 0
    assert main([*options, "--threads", "1"]) == 2
    assert "needs a thread for each process, but there is one" in capsys.readouterr().err
    assert main([*options, "--quantize", "int8"]) == 2
    assert "--vs two-processes needs a model in files" in capsys.readouterr().err


@pytest.mark.slow
def test_transformers_and_llama_cpp_as_baselines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf, picture = tmp_path / "tiny.gguf", tmp_path / "speed.png"
    vs = ("--vs", "transformers", "llama.cpp", "--gguf", str(gguf), "--plot", str(picture), "--contexts", "5", "30")
    assert main([*QUICK, *vs]) == 0
    table, figures = output_of(capsys)
    assert is_gguf_of(gguf, llama3_raw.load(TINY))
    assert list(figures["vs"]) == ["transformers", "llama.cpp"]
    for baseline in figures["vs"].values():
        assert baseline["version"] in table
        for kind, lengths in {"prefill": ["5", "20"], "decode": ["5", "30"]}.items():
            assert list(baseline[f"{kind}_tokens_per_second"]) == lengths
            for length in lengths:
                assert len(baseline[f"{kind}_ratios"][length]) == 2
                assert f"{baseline[f'{kind}_ratio'][length]:.2f}  (" in table
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


def test_ratios_compare_within_a_round() -> None:
    assert ratios_by_round({(1, 0): 10.0, (2, 1): 6.0, (2, 0): 9.0}, {(2, 1): 3.0, (1, 0): 20.0}) == [0.5, 2.0]
    prefill, decode = Task("prefill", 17), Task("decode", 17)
    ours = {prefill: {(1, 0): 10.0, (2, 0): 20.0, (3, 0): 80.0}, decode: {(1, 0): 1.0, (2, 0): 2.0, (3, 0): 6.0}}
    theirs = {prefill: {(1, 0): 20.0, (2, 0): 10.0, (3, 0): 20.0}, decode: {(3, 0): 2.0}}
    figures = compare(Clock(), ours, theirs)
    assert figures.prefill_ratios == {17: [0.5, 2.0, 4.0]}
    assert figures.prefill_ratio == {17: 2.0}  # the ratio of the medians is 1
    assert figures.prefill_tokens_per_second == {17: 20.0}
    assert figures.decode_ratios == {17: [3.0]}


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Make this engine a clock called "us", and return the list that all clocks record their calls in."""
    done: list[tuple[str, str, int]] = []
    monkeypatch.setattr(ThisEngine, "prefill", lambda self, length: Clock("us", done).prefill(length))
    monkeypatch.setattr(ThisEngine, "decode", lambda self, *numbers: Clock("us", done).decode(*numbers))
    return done


@pytest.mark.parametrize(
    ("names", "orders"),
    [
        ("", ["us"]),
        ("a", ["a us", "us a"]),
        ("ab", ["a us b", "b us a"]),
        ("abc", ["a us b c us", "us c b us a"]),
    ],
)
def test_this_engine_is_next_to_each_baseline(
    tiny: Model, turns: list[tuple[str, str, int]], names: str, orders: list[str]
) -> None:
    baselines = [Clock(name, turns) for name in names]
    figures = measure(tiny, prefill=(3, 5), contexts=(3, 8), new_tokens=4, rounds=2, baselines=baselines)
    a_round = [("prefill", 5), ("prefill", 3), ("decode", 3), ("decode", 8)]
    assert turns == [
        (name, *task) for number in range(3) for task in a_round for name in orders[number % len(orders)].split()
    ]
    assert figures.decode_tokens_per_second_by_context == {3: 2.0, 8: 2.0}
    assert figures.prefill_tokens_per_second == {3: 3.0, 5: 5.0}
    for baseline in figures.vs.values():
        assert baseline.prefill_tokens_per_second == {3: 3.0, 5: 5.0}
        assert baseline.decode_ratios == {3: [1.0, 1.0], 8: [1.0, 1.0]}  # one in each round, however often we run


def test_ratios_are_those_of_neighbours(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine gets slower all the time. Our speed is the median over all turns."""
    seconds = iter(range(1, 1000))
    monkeypatch.setattr(ThisEngine, "prefill", lambda *_: 1.0)
    monkeypatch.setattr(ThisEngine, "decode", lambda *_: float(next(seconds)))
    clocks = [Clock(name) for name in "abc"]
    for clock in clocks:
        monkeypatch.setattr(clock, "decode", lambda *_: float(next(seconds)))
    figures = measure(tiny, prefill=(3,), contexts=(3,), new_tokens=1, rounds=2, baselines=clocks)
    # the warm-up takes 1 to 5; then us 6, c 7, b 8, us 9, a 10, and a 11, us 12, b 13, c 14, us 15
    assert figures.vs["a"].decode_ratios[3] == pytest.approx([10 / 9, 11 / 12])
    assert figures.vs["b"].decode_ratios[3] == pytest.approx([8 / 9, 13 / 12])
    assert figures.vs["c"].decode_ratios[3] == pytest.approx([7 / 6, 14 / 15])
    assert figures.decode_tokens_per_second == pytest.approx((1 / 9 + 1 / 12) / 2)


def test_long_tasks_run_once(tiny: Model, turns: list[tuple[str, str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "LONG", 4)
    figures = measure(tiny, (3, 5), contexts=(3, 8), new_tokens=4, rounds=2, baselines=[Clock("a", turns)])
    assert turns.count(("a", "prefill", 5)) == turns.count(("a", "decode", 8)) == 1
    assert turns.count(("us", "prefill", 5)) == 1
    assert turns.count(("us", "decode", 8)) == 3  # on its cache of random numbers
    assert len(figures.vs["a"].decode_ratios[8]) == 1


def test_ctrl_c_keeps_the_complete_rounds(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What only the last round measures is missing. Nothing is kept of the warm-up and of the round that it stops."""
    monkeypatch.setattr(measuring, "LONG", 4)
    clock = Clock("a")
    calls = 0

    def decode(context: int, count: int) -> float:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        return float(calls)

    monkeypatch.setattr(clock, "decode", decode)
    stop_at = 4
    figures = measure(tiny, prefill=(3, 5), contexts=(3, 8), new_tokens=1, rounds=5, baselines=[clock])
    assert figures.rounds == 2
    assert figures.vs["a"].decode_tokens_per_second == {3: (1 / 2 + 1 / 3) / 2}
    assert len(figures.vs["a"].prefill_ratios[3]) == len(figures.vs["a"].decode_ratios[3]) == 2
    assert list(figures.prefill_tokens_per_second) == list(figures.vs["a"].prefill_ratio) == [3]
    rounds = re.findall("llama3_raw: (.*) took", capsys.readouterr().err)
    assert rounds == ["warm-up", "round 1 of 5", "round 2 of 5"]
    calls = 0
    stop_at = 2  # in the first round
    with pytest.raises(KeyboardInterrupt):
        measure(tiny, prefill=(3,), contexts=(3,), new_tokens=1, rounds=5, baselines=[clock])


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_stopped_run_shows_what_it_has(sent: signal.Signals, status: int, tmp_path: Path) -> None:
    """Its temporary files are removed, and it ends as a program that is stopped should."""
    command = [sys.executable, "-m", "llama3_raw.bench", "--weights", str(TINY), "--prefill", "5", "--vs", "llama.cpp"]
    program = tmp_path / "bin" / "llama-bench"
    imitate_llama_bench(program)
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PATH": f"{program.parent}:{os.environ['PATH']}"}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it ignored
    running = subprocess.Popen(
        [*command, "--rounds", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert running.stderr is not None
        assert any("round 1 of" in line for line in running.stderr)
        assert [file.name for file in tmp_path.glob("llama3_raw-*/*")] == ["model.gguf"]
        running.send_signal(sent)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == status
    complete = json.loads(out.splitlines()[-1])["rounds"]
    assert complete >= 1
    assert f"llama3_raw: stopped; {complete} of 100000 rounds are complete\n" in err
    assert err.endswith("stopped by Ctrl-C\n") == (sent == signal.SIGINT)
    assert "decode at context     5" in out
    assert list(tmp_path.iterdir()) == [program.parent]


@pytest.fixture(params=["tiny", "scaled"])
def same_model(request: pytest.FixtureRequest, tiny: Model) -> tuple[Model, list[int]]:
    """Return a model and a prompt: trained, in bf16, with tied embeddings; or random, in fp32, with scaled RoPE."""
    if request.param == "tiny":
        assert tiny.tokenizer is not None
        return tiny, tiny.tokenizer.encode("Once upon a time, there was a little girl named", bos=True)
    scaling = RopeScaling(factor=8.0, original_max_seq_len=16)  # shorter than the prompt
    params = Params(128, 2, 4, 2, 64, 32, 256, 1e-5, 10000.0, scaling, 512)
    return Model(random_weights(params, torch.float32, seed=0), params, None), torch.arange(60).tolist()


def test_transformers_gives_the_same_tokens(same_model: tuple[Model, list[int]]) -> None:
    model, ids = same_model
    ours = list(llama3_raw.generate(model, ids, max_new_tokens=8, stop_ids=()))
    assert Transformers(model, longest=64).greedy(ids, 8) == ours


@pytest.mark.slow
@pytest.mark.exhaustive
@needs_compiler
def test_compiled_transformers_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a cache is used again. No measured time includes compiling."""
    compiled = CompileCounter()
    model = llama3_raw.load(TINY, dtype=torch.float32, layers=1)
    baseline = CompiledTransformers(model, longest=64)
    ours = list(llama3_raw.generate(model, [1, 2, 3, 4], max_new_tokens=3, stop_ids=()))
    for _ in range(2):
        assert baseline.greedy([1, 2, 3, 4], 3) == ours
    assert compiled.number() == 1
    during: list[int] = []

    def timed(work: Callable[[], object], device: torch.device) -> float:
        before = compiled.number()
        work()
        during.append(compiled.number() - before)
        return float(len(during))

    monkeypatch.setattr(baselines, "seconds_of", timed)
    assert baseline.decode(5, 1) == 4.0  # after three untimed calls
    assert during == [1, 0, 0, 0]
    assert baseline.prefill(5) == 5.0
    assert during[-1] == 0


@pytest.mark.slow
def test_missing_compiler(capsys: pytest.CaptureFixture[str]) -> None:
    import torch._inductor.config

    CompileCounter()
    # monkeypatch would not restore them
    with torch._inductor.config.patch({"cpp.cxx": ("nonexistent",), "force_disable_caches": True}):
        assert main([*QUICK, "--layers", "1", "--vs", "transformers-compiled"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: --vs transformers-compiled: torch.compile fails (InvalidCxxCompiler: No working C++" in last


@needs_xllamacpp
def test_llama_cpp_gives_the_same_tokens(same_model: tuple[Model, list[int]], tmp_path: Path) -> None:
    model, ids = same_model
    write_gguf(model, tmp_path / "model.gguf")
    ours = list(llama3_raw.generate(model, ids, max_new_tokens=8, stop_ids=()))
    assert Xllamacpp(model, tmp_path / "model.gguf", threads=2, longest=128).greedy(ids, 8) == ours


@needs_xllamacpp
def test_llama_cpp_that_stops_early_is_not_measured(tiny: Model, tmp_path: Path) -> None:
    write_gguf(tiny, tmp_path / "model.gguf")
    with pytest.raises(UserError, match="did not generate 600 tokens"):
        Xllamacpp(tiny, tmp_path / "model.gguf", threads=2, longest=64).greedy([1, 2, 3], 600)


def test_transformers_shares_the_weights(tiny: Model) -> None:
    hf = Transformers(tiny, longest=8).hf
    assert hf.model.layers[1].mlp.up_proj.weight.data_ptr() == tiny.weights.layers[1].w3.data_ptr()
    assert hf.lm_head.weight.data_ptr() == tiny.weights.output.data_ptr()


def imitate_llama_bench(program: Path) -> None:
    """Write a program that answers like llama-bench, always with two seconds, and keeps its arguments in `asked`."""
    answer = [{"build_number": 7, "build_commit": "abc", "samples_ns": [2_000_000_000]}]
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\necho \"$@\" >> {program.parent}/asked\necho '{json.dumps(answer)}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_llama_bench_on_the_path_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Model) -> None:
    program = tmp_path / "llama-bench"
    imitate_llama_bench(program)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    chosen = choose_model(build_parser().parse_args(QUICK), needs_tokenizer=False)
    with open_baselines(["llama.cpp"], chosen, tiny, None, longest=64) as (engine,):
        assert isinstance(engine, LlamaBench)
        assert engine.decode(30, 4) == 2.0
        assert engine.version == "llama.cpp (llama-bench, build 7, abc)"
        assert engine.weights_bytes == bytes_per_token(tiny.weights)
        asked = (tmp_path / "asked").read_text()
        file = Path(asked.split()[1])
        assert is_gguf_of(file, tiny)
        assert asked.split()[2:] == f"-t {torch.get_num_threads()} -ngl 0 -r 1 -o json -p 0 -n 4 -d 30".split()
    assert not file.exists()
    program.write_text("#!/bin/sh\necho no such model >&2\nexit 1\n")
    with pytest.raises(UserError, match="status 1: no such model"):
        LlamaBench(str(program), file, threads=2).prefill(17)


needs_llama_quantize = pytest.mark.skipif(
    shutil.which("llama-quantize") is None, reason="there is no llama-quantize on the PATH; build llama.cpp"
)


@needs_llama_quantize
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_types_of_llama_quantize(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quantize: str | None
) -> None:
    """They are made from the weights as they are stored, and kept beside --gguf."""
    monkeypatch.setattr(bench, "time_startup", lambda *_: None)
    file = tmp_path / "tiny.gguf"
    extra = ["--quantize", quantize] if quantize else []
    arguments = ["--weights", str(TINY), "--prefill", "5", "--rounds", "1", "--gguf", str(file), *extra]
    assert main([*arguments, "--vs", "llama.cpp:q4_0", "llama.cpp:Q8_0", "llama.cpp:Q8_0"]) == 0
    out, err = capsys.readouterr()
    vs = json.loads(out.splitlines()[-1])["vs"]
    assert list(vs) == ["llama.cpp:Q4_0", "llama.cpp:Q8_0"]
    assert all(baseline["decode_ratio"]["5"] > 0 for baseline in vs.values())
    # 2,015,232 values: blocks of 18 bytes, apart from the output matrix, and of 34 bytes
    assert vs["llama.cpp:Q8_0"]["weights_bytes_per_token"] == 2_015_232 // 32 * 34
    assert "Q4_0.gguf: 1 of 38 tensor(s) required fallback to another type than Q4_0" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.Q4_0.gguf", "tiny.Q8_0.gguf", "tiny.gguf"]
    q4_0 = tmp_path / "tiny.Q4_0.gguf"
    before = q4_0.stat().st_mtime_ns
    assert main([*arguments, "--vs", "llama.cpp:Q4_0"]) == 0
    assert q4_0.stat().st_mtime_ns == before
    os.utime(q4_0, (0, 0))
    assert main([*arguments, "--vs", "llama.cpp:Q4_0"]) == 2
    assert f"{q4_0}: is older than {file}, and may be of another model; remove it" in capsys.readouterr().err


@needs_llama_quantize
def test_unknown_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--vs", "llama.cpp:Q9_K"]) == 2
    assert "--vs llama.cpp:Q9_K: " in (err := capsys.readouterr().err)
    assert "llama-quantize has no such type; it has Q" in err


@pytest.fixture
def quantize_by_copying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a program called llama-quantize on the PATH that copies the file, and no llama-bench. Return its folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "llama-quantize"
    program.write_text(
        f"#!{sys.executable}\nimport shutil, sys\n"
        "if sys.argv[1] == '--help': print('   2  or  Q4_0 :  4.34G'); sys.exit()\n"
        "source, target, kind, threads = sys.argv[1:]\n"
        "assert kind == 'Q4_0' and int(threads) > 0\n"
        "shutil.copyfile(source, target)\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))
    return folder


@needs_xllamacpp
def test_files_of_types_are_removed(
    quantize_by_copying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Model
) -> None:
    """Without --gguf all files are temporary; the stored weights are removed as soon as they are not needed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    chosen = choose_model(build_parser().parse_args(QUICK), needs_tokenizer=False)
    check_baselines(chosen, RunShape(17, 22, 22), ["llama.cpp:Q4_0"])
    for names, files in (
        (["llama.cpp:Q4_0"], ["model.Q4_0.gguf"]),
        (["llama.cpp", "llama.cpp:Q4_0"], ["model.Q4_0.gguf", "model.gguf"]),
    ):
        with open_baselines(names, chosen, tiny, None, longest=64) as opened:
            assert [engine.name for engine in opened] == names
            assert all(isinstance(engine, Xllamacpp) for engine in opened)
            assert sorted(path.name for path in tmp_path.glob("llama3_raw-*/*")) == files
        assert list(tmp_path.iterdir()) == [quantize_by_copying]


def test_failing_llama_quantize(quantize_by_copying: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is left of the file."""
    program = quantize_by_copying / "llama-quantize"
    program.write_text("#!/bin/sh\necho cannot quantize >&2\n[ $1 = --help ]\n")
    file = tmp_path / "model.gguf"
    assert main([*QUICK, "--vs", "llama.cpp:Q4_0", "--gguf", str(file)]) == 2
    assert "Q4_0 " in (err := capsys.readouterr().err)
    assert "failed with status 1: cannot quantize" in err
    assert sorted(tmp_path.iterdir()) == [quantize_by_copying, file]


@pytest.mark.usefixtures("no_llama_bench")
def test_missing_llama_quantize(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--vs", "llama.cpp:Q4_0"]) == 2
    assert "--vs llama.cpp:Q4_0 needs llama.cpp's program llama-quantize on the PATH" in capsys.readouterr().err


@pytest.fixture(scope="session")
def gguf_in_q8_0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the built-in model as a GGUF file in Q8_0."""
    file = tmp_path_factory.mktemp("gguf") / "tiny-Q8_0.gguf"
    assert convert([str(TINY), str(file), "--outtype", "q8_0"]) == 0
    return file


@needs_xllamacpp
@pytest.mark.usefixtures("no_llama_bench")
def test_a_quantized_gguf_file_runs_in_both(
    gguf_in_q8_0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp runs the same file; nothing is written."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(llama_cpp, "write_gguf", None)
    monkeypatch.setattr(bench, "time_startup", lambda *_: None)
    assert main(["--weights", str(gguf_in_q8_0), "--prefill", "5", "--rounds", "1", "--vs", "llama.cpp"]) == 0
    _, figures = output_of(capsys)
    assert figures["vs"]["llama.cpp"]["weights_bytes_per_token"] == figures["weights_bytes_per_token"]
    assert figures["vs"]["llama.cpp"]["decode_ratio"]["5"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--vs", "llama.cpp", "transformers"), "--vs llama.cpp transformers: a quantized GGUF file is compared with"),
        (("--vs", "llama.cpp:Q4_0"), "--vs llama.cpp:Q4_0: a quantized GGUF file is compared with llama.cpp on the"),
        (("--vs", "llama.cpp", "--layers", "2"), "give --vs llama.cpp alone, all layers and no adapter"),
        (("--vs", "llama.cpp", "--gguf", "other.gguf"), "--gguf other.gguf: the model's own GGUF file is compared"),
    ],
)
def test_what_a_quantized_gguf_file_is_not_compared_with(
    gguf_in_q8_0: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--weights", str(gguf_in_q8_0), "--prefill", "5", *arguments]) == 2
    assert message in capsys.readouterr().err


@needs_xllamacpp
@pytest.mark.usefixtures("no_llama_bench")
def test_own_gguf_file_of_stored_weights(
    tmp_path: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp runs it, unless fewer layers or another dtype are measured: those are written."""
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny, file)
    written: list[Path] = []
    monkeypatch.setattr(llama_cpp, "write_gguf", lambda model, path: written.append(path) or write_gguf(model, path))
    for extra, n_written in (((), 0), (("--layers", "2"), 1), (("--dtype", "float32"), 2)):
        options = build_parser().parse_args(["--weights", str(file), *extra])
        chosen = choose_model(options, needs_tokenizer=False)
        model = llama3_raw.load(file, layers=options.layers, dtype=chosen.dtype)
        with open_baselines(["llama.cpp"], chosen, model, None, longest=64) as (engine,):
            assert engine.weights_bytes == bytes_per_token(model.weights)
        assert len(written) == n_written


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "int4", None])
def test_quantized_compared_with_the_stored_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quantize: str | None
) -> None:
    """The baseline gets the weights as they are stored. Without --quantize there is nothing to compare."""
    weights = []
    monkeypatch.setattr(
        baselines, "ThisEngine", lambda model, longest, name, version: weights.append(model.weights) or Clock(name)
    )
    extra = ["--quantize", quantize] if quantize else []
    assert main([*QUICK, "--vs", "stored", *extra]) == (0 if quantize else 2)
    out, err = capsys.readouterr()
    if quantize:
        assert isinstance(weights[0].layers[0].wq, torch.Tensor)
        assert json.loads(out.splitlines()[-1])
    else:
        assert "--vs stored compares the weights as they are stored with those of --quantize; add it" in err


def test_gguf_file_of_another_model(tmp_path: Path, tiny: Model, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(tiny, file)
    assert main([*QUICK, "--layers", "2", "--vs", "llama.cpp", "--gguf", str(file)]) == 2
    assert f"--gguf {file}: is of another model" in capsys.readouterr().err
    layers = list(tiny.weights.layers)
    layers[1] = layers[1]._replace(w2=torch.zeros_like(dense(layers[1].w2)))
    assert not is_gguf_of(file, tiny._replace(weights=tiny.weights._replace(layers=tuple(layers))))
    file.write_text("no GGUF")
    assert not is_gguf_of(file, tiny)


def test_disk_too_small_for_a_gguf_file(tmp_path: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        UserError, match=r"model\.gguf: 0\.1 GB are needed, 0\.0 GB are free on that disk; .* choose another place"
    ):
        write_gguf(tiny, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prefill", "600"), "--prefill 600: with the new tokens, that exceeds the model's context of 512"),
        (("--contexts", "510"), "--contexts 510: with the new tokens, that exceeds the model's context of 512"),
        (("--vs", "vllm"), "argument --vs: there is no baseline vllm; choose from transformers, "),
        (("--vs", "llama.cpp:"), "argument --vs: there is no baseline llama.cpp:; choose from transformers, "),
        (("--plot", "speed.docx"), "--plot speed.docx: the name should end in .png or .svg"),
        (("--plot", "nowhere/speed.png"), "there is no folder nowhere"),
    ],
)
def test_options_that_are_refused(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("no_llama_bench")
@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("transformers", ("--vs", "transformers")),
        ("xllamacpp", ("--vs", "llama.cpp")),
        ("matplotlib", ("--plot", "speed.png")),
    ],
)
def test_missing_package(
    package: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # makes its import fail
    assert main([*QUICK, *arguments]) == 2
    assert f"pip install {package}" in capsys.readouterr().err


def test_baselines_that_do_not_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choose_model(build_parser().parse_args(QUICK), needs_tokenizer=False)
    shape = RunShape(prompt=17, text=22, least=2)
    plan = MemoryPlan(chosen.checkpoint, chosen.device, None, shape)
    enough = baselines.memory_with_baselines(plan, ["llama.cpp"])
    monkeypatch.setattr(baselines, "free_memory", lambda _: enough * 10 // 9 + 2)
    baselines.check_baselines(chosen, shape, ["llama.cpp"])
    monkeypatch.setattr(baselines, "free_memory", lambda _: enough)
    with pytest.raises(UserError, match=r"--vs llama.cpp: .* evict the other's weights; --layers 3 fits"):
        baselines.check_baselines(chosen, shape, ["llama.cpp"])


def test_suggestions_are_options_of_this_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """bench has no --context, which other commands suggest for a shorter text."""
    monkeypatch.setattr(models, "check_memory", lambda plan: memory_plan.check_memory(plan, lambda _: needs - 1))
    arguments = [*QUICK, "--dtype", "float32"]  # needs a copy of the weights
    chosen = choose_model(build_parser().parse_args(arguments), needs_tokenizer=False)
    needs = memory_plan.needed(
        MemoryPlan(chosen.checkpoint, chosen.device, chosen.dtype, RunShape(20, 21, 2))
    ).allocated
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "what fits: no --dtype, or --layers 3" in err


def test_shares_of_the_roofline_on_a_gpu(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Medians leave out the first round. Decode reads every matrix, prefill multiplies by it."""
    speeds = {"copy": iter([1.0, 9e9, 5e9, 7e9]), "multiply": iter([1.0, 3e12, 1e12, 2e12])}
    probes = {name: lambda values=values: next(values) for name, values in speeds.items()}
    monkeypatch.setattr(measuring, "probes_of", lambda weights, read_loop: Probes(**probes))
    monkeypatch.setattr(engines, "seconds_of", lambda work, device: 2.0)  # a prompt
    monkeypatch.setattr(ThisEngine, "decode", lambda *_: 4.0)
    monkeypatch.setattr(bench, "time_startup", lambda *_: None)
    arguments = ["--rounds", "3", "--new-tokens", "8", "--plot", str(tmp_path / "speed.png")]
    assert main([*QUICK, *arguments]) == 0
    table, figures = output_of(capsys)
    in_a_layer = 192 * (192 + 2 * 64 + 192 + 3 * 512)
    in_all = 4 * in_a_layer + 2304 * 192
    assert figures["copy_gb_per_second"] == 7.0
    assert figures["decode_share_of_copy"] == pytest.approx(2 * (2 * in_all) / 7e9)  # 2 tokens a second, in bf16
    assert figures["matmul_tflop_per_second"] == 2.0
    operations = {length: 2 * (length * 4 * in_a_layer + 2304 * 192) for length in (5, 20)}
    shares = {str(length): pytest.approx(number / 2.0 / 2e12) for length, number in operations.items()}
    assert figures["prefill_share_of_matmul"] == shares
    assert figures["read_loop_gb_per_second"] is figures["decode_share_of_read_loop"] is None
    for shown in ("copy, reads and writes           7.0 GB/s", "large matrix product             2.0 TFLOP/s"):
        assert shown in table
    assert f"share of it,    20 tokens {figures['prefill_share_of_matmul']['20']:10.1%}" in table


def test_probes_of_the_cpu_and_of_a_gpu(tiny: Model) -> None:
    """A long prompt is no long task on a GPU."""
    on_gpu: Any = SimpleNamespace(norm=SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16))
    assert [name for name, probe in probes_of(on_gpu, True)._asdict().items() if probe] == ["copy", "multiply"]
    assert [name for name, probe in probes_of(tiny.weights, True)._asdict().items() if probe] == ["read"]
    assert not any(probes_of(tiny.weights, read_loop=False))
    prompt = Task("prefill", 2048)
    assert prompt.is_long(torch.device("cpu"))
    assert not prompt.is_long(torch.device("cuda"))


def test_probes_count_the_work_that_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes read and written, and a multiplication and an addition per pair of numbers, all of it ten times."""
    copied, multiplied = [], []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.copy_.default:
                copied.append(args[0].nbytes + args[1].nbytes)
            elif func is torch.ops.aten.mm.default:
                multiplied.append(2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1])
            return func(*args, **(kwargs or {}))

    def timed(work: Callable[[], object], device: torch.device) -> float:
        with Counting():  # type: ignore[no-untyped-call]
            work()
        return 2.0

    monkeypatch.setattr(roofline, "seconds_of", timed)
    cpu = torch.device("cpu")
    assert copy_speed(cpu, 1000) == sum(copied) / 2.0 > 0
    assert multiply_speed(cpu, torch.bfloat16, 16) == sum(multiplied) / 2.0 > 0
    assert len(copied) == len(multiplied) == 10


@needs_gpu
def test_roofline_of_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """It is faster than any CPU and within what is possible. A run reports its share of it."""
    gpu = torch.device("cuda")
    assert 50e9 < copy_speed(gpu) < 50e12
    assert 1e12 < multiply_speed(gpu, torch.bfloat16) < 20e15
    assert main([*QUICK, "--device", "cuda"]) == 0
    _, figures = output_of(capsys)
    assert 0 < figures["decode_share_of_copy"] < 1
    assert 0 < figures["prefill_share_of_matmul"]["20"] < 1
    assert figures["device"] == torch.cuda.get_device_name()


def test_timing_on_a_gpu_waits_for_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier work is not timed, and unfinished work is."""
    happened: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append(f"wait for {device}"))
    monkeypatch.setattr(time, "perf_counter", lambda: happened.append("clock") or float(len(happened)))
    assert seconds_of(lambda: happened.append("work"), torch.device("cuda:1")) == 3.0
    assert happened == ["wait for cuda:1", "clock", "work", "wait for cuda:1", "clock"]


@pytest.mark.parametrize(("kind", "context", "first"), [("cpu", 5, 5), ("cuda", 5, 3), ("cuda", 1, 0)])
def test_decode_on_a_gpu_is_timed_from_the_third_pass_on(
    kind: str, context: int, first: int, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pass is a prefill and the second one is captured. On the CPU they are like the others."""
    passes: list[int] = []
    starts: list[int] = []

    def generate(model: Model, ids: Sequence[int], *, max_new_tokens: int, start: int, **_: object) -> Iterator[int]:
        starts.append(start)
        for _number in range(max_new_tokens):
            passes.append(0)
            yield 0

    engine = ThisEngine(tiny, longest=10)
    engine.device = torch.device(kind)
    monkeypatch.setattr(engines, "wait_for", lambda device: None)
    monkeypatch.setattr(engines, "generate", generate)
    monkeypatch.setattr(time, "perf_counter", lambda: float(len(passes)))
    assert engine.decode(context, 4) == 4.0  # whatever the context
    assert starts == [first]
    assert len(passes) == context - first + 4


def test_baselines_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers, plain and compiled, and this engine on the stored weights; no others."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(baselines, "free_memory", lambda device: 10**10)
    arguments = [*QUICK, "--device", "cuda"]
    chosen = choose_model(build_parser().parse_args(arguments), needs_tokenizer=False)
    check_baselines(chosen, RunShape(17, 22, 22), ["transformers", "transformers-compiled"])
    check_baselines(chosen._replace(quantize="int8"), RunShape(17, 22, 22), ["stored"])
    assert main([*arguments, "--vs", "transformers", "llama.cpp"]) == 2
    err = capsys.readouterr().err
    assert err == "llama3_raw: error: --vs llama.cpp runs on the CPU only, but the device is cuda; give --device cpu\n"


@needs_gpu
@pytest.mark.parametrize("kind", [Transformers, CompiledTransformers])
def test_transformers_on_a_gpu_gives_the_same_tokens(kind: type[Transformers]) -> None:
    """It runs on the same tensors on the GPU, and its tokens are those of the exact operations."""
    model = llama3_raw.load(TINY, device="cuda", dtype=torch.float32)
    ids = torch.arange(20).tolist()
    ours = list(llama3_raw.generate(model, ids, max_new_tokens=8, stop_ids=(), ops=llama3_raw.REFERENCE))
    baseline = kind(model, longest=64)
    assert baseline.hf.model.layers[1].mlp.up_proj.weight.data_ptr() == model.weights.layers[1].w3.data_ptr()
    for _ in range(4):  # compile, warm up, capture, replay
        assert baseline.greedy(ids, 8) == ours
    assert baseline.prefill(20) > 0
    assert baseline.decode(20, 4) > 0
