"""What the project is tested with, by name: `nox -l` lists it, `nox -s NAME` runs it. After `--`: for pytest.

`python3.10` to `python3.13` should be on the PATH; a session without its Python is skipped. The environments take up to
6 GB each: `nox` removes none of them, so delete `.nox/` when you are done.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "tests-3.11"]
nox.options.error_on_missing_interpreters = False

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
OLDEST = [
    *("torch==2.11.0", "triton==3.6.0", "transformers==5.17.0", "huggingface_hub==1.33.0", "tiktoken==0.14.0"),
    "numpy==2.5.*",
]
TOOLS = ["psutil", "pytest>=8.2", "pytest-xdist>=3.5", "hypothesis>=6.100"]
# what more the tests need, of which none needs other versions of the above
REFERENCES = [
    *("gguf>=0.17", "llama-models==0.3.0", "fairscale>=0.4.13", "peft>=0.17", "playwright>=1.40"),
    *("matplotlib>=3.9", "pygments>=2.17", "nbformat>=5.10", "nbclient>=0.10", "ipykernel>=6.29"),
    *("starlette>=0.45", "uvicorn>=0.34", "prometheus-client>=0.21", "openai>=1.60", "xllamacpp>=2026.10"),
]
EVERYTHING = ["-m", "not full_size and not emulated"]
KERNEL_TESTS = ["tests/backends/test_cpu.py", "tests/backends/test_repacking.py"]


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the whole suite, as README says."""
    session.install("-e", ".[test]")
    _run_suite(session)


@nox.session(python="3.12")
def oldest(session: nox.Session) -> None:
    """Run the whole suite with the oldest libraries, from a checkout that is not installed."""
    session.install(*OLDEST, *TOOLS, *REFERENCES)
    # scripts and notebooks of the tests import the package; the tests of the server ask it with httpx2
    _run_suite(session, "--ignore=tests/serve", env={"PYTHONPATH": str(Path.cwd())})


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """Run the whole suite with the newest libraries that pyproject.toml admits."""
    session.install("--upgrade", "-e", ".[test]")
    _run_suite(session)


@nox.session(python=PYTHONS)
def smoke(session: nox.Session) -> None:
    """Install the package alone, generate the expected text, and run the tests of the model and the kernels."""
    session.install(".", *TOOLS, "filelock")
    _smoke(session)


@nox.session(name="smoke-oldest", python="3.12")
def smoke_oldest(session: nox.Session) -> None:
    """Run the same with the oldest libraries, from a checkout that is not installed."""
    session.install(*OLDEST, *TOOLS)
    _smoke(session)


def _smoke(session: nox.Session) -> None:
    session.run("python", "-m", "pytest", "-q", "tests/test_smoke.py", *session.posargs)


def _run_suite(session: nox.Session, *arguments: str, env: dict[str, str] | None = None) -> None:
    command = ["python", "-m", "pytest", "-n", "auto", "--dist", "worksteal", *EVERYTHING, *arguments]
    session.run(*command, *session.posargs, env=env)


@nox.session(python="3.11")
@nox.parametrize("compiler", ["gcc", "clang"])
def compilers(session: nox.Session, compiler: str) -> None:
    """Run the kernels' tests with this compiler; a warning is an error."""
    _need(session, compiler)
    session.install("-e", ".[test]")
    _test_kernels(session, CC=f"{compiler} -Wall -Wextra -Werror -Wno-ignored-optimization-argument")


@nox.session(python="3.11")
def sanitizers(session: nox.Session) -> None:
    """Run the kernels' tests with gcc's address and undefined-behaviour sanitizers."""
    _need(session, "gcc")
    session.install("-e", ".[test]")
    # Python is not built with them: their libraries come first, and what it keeps until its end is no leak
    libraries = [_library_of_gcc(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
    _test_kernels(
        session,
        CC="gcc -g -fsanitize=address,undefined -fno-sanitize-recover=undefined",
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",
    )


def _test_kernels(session: nox.Session, **environment: str) -> None:
    """Run the kernels' tests in this process, with kernels that are built anew."""
    environment["XDG_CACHE_HOME"] = session.create_tmp()
    session.run("python", "-m", "pytest", "-q", *EVERYTHING, *KERNEL_TESTS, *session.posargs, env=environment)


def _library_of_gcc(name: str) -> str:
    done = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@nox.session(python="3.11")
def neon(session: nox.Session) -> None:
    """Run the kernels' tests with the kernels for ARM, compiled for aarch64 and emulated by qemu."""
    _need(session, "aarch64-linux-gnu-gcc")
    _need(session, "qemu-aarch64")
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "-n", "auto", "-m", "emulated", "tests/backends", *session.posargs)


@nox.session(python="3.11")
def release(session: nox.Session) -> None:
    """Build the sdist and the wheel twice, compare them, and run the tests of the sdist with the wheel installed."""
    session.install("build", "twine")
    folder = Path(session.create_tmp())
    for number in ("1", "2"):
        session.run("python", "-m", "build", "--outdir", str(folder / number), env=_dated())
    sdist, wheel = (next((folder / "1").glob(pattern)) for pattern in ("*.tar.gz", "*.whl"))
    for file in (sdist, wheel):
        if file.read_bytes() != (folder / "2" / file.name).read_bytes():
            session.error(f"{file.name} is not the same when it is built again")
    session.run("twine", "check", "--strict", str(sdist), str(wheel))
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    session.install(f"{wheel}[test]")
    session.chdir(folder / sdist.name.removesuffix(".tar.gz"))
    shutil.rmtree("llama3_raw")  # the tests are for the wheel, which has weights/tiny too
    session.run("llama3-raw", "--version")
    _run_suite(session)


def _dated() -> dict[str, str]:
    """Return the environment in which the files of an archive have the time of the last commit."""
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], capture_output=True, text=True, check=True)
    return {"SOURCE_DATE_EPOCH": done.stdout.strip()}


@nox.session(python="3.11")
def platforms(session: nox.Session) -> None:
    """Check the types as on Windows and on macOS, and import every module without what only POSIX has."""
    session.install("-e", ".[test]")
    for platform in ("win32", "darwin"):  # without the tests, which send the signals of POSIX
        session.run("mypy", "--platform", platform, "llama3_raw", "examples", "download.py")
    session.run("python", "-m", "pytest", "-q", "tests/test_platforms.py", *session.posargs)


@nox.session(python="3.11")
def startup(session: nox.Session) -> None:
    """Show what takes longest to import for the first token, package by package."""
    session.install("-e", ".")
    command = ["-m", "llama3_raw", "Once", "--max-new-tokens", "1"]
    session.run("python", *command)  # builds the kernels
    report = session.run("python", "-X", "importtime", *command, silent=True) or ""
    times = {name: int(own) for own, name in re.findall(r"import time: +(\d+) \| +\d+ \| +(\S+)", report)}  # µs
    packages: dict[str, int] = {}
    for name, own in times.items():
        packages[name.partition(".")[0]] = packages.get(name.partition(".")[0], 0) + own
    for package, own in sorted(packages.items(), key=lambda item: -item[1])[:15]:
        print(f"{own / 1e6:8.3f} s  {package}")
    if packages["llama3_raw"] > 400_000:
        session.error("the package's own modules take more than 0.4 s to import")


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Check style, types, the direction of imports, and spelling; build the site."""
    session.install("-e", ".[test]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports")
    session.run("codespell")
    site = Path(session.create_tmp()) / "site"
    session.run("mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site), env={"NO_MKDOCS_2_WARNING": "1"})


def _need(session: nox.Session, program: str) -> None:
    if shutil.which(program) is None:
        session.skip(f"{program} is not installed")
