"""Download a model into weights/ from the Hugging Face hub or a mirror. Downloads are resumable and verified.

A file grows as NAME.part next to its target, and gets its name once its hash is correct. A record of each file (its
source, its hash, when that was last checked) is kept in the folder's .download/.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import get_token

from ..cli.entry_point import ArgumentParser, command_line_tool, not_empty
from ..errors import UserError
from .catalog import describe_models, gguf_files, repository_of, wanted_files
from .fetch import download, is_verified
from .records import CHECKLIST, Record, file_size, mismatch, part_file, read_checklist
from .sources import Hub, RemoteFile, Source, mirror


def verify(folder: Path) -> None:
    """Check every file of a folder against its record and checklist.chk, without a network.

    Raises UserError for the first file that is missing, incomplete or wrong, and if there is nothing to check against.
    """
    for part in folder.glob("*.part"):
        raise UserError(f"{part}: the download is not complete; run it again to continue")
    listed = read_checklist(folder)
    wanted = folder / ".download" / "wanted"
    names = set(listed) | set(wanted.read_text().splitlines() if wanted.exists() else ())
    recorded = (record.name.removesuffix(".json") for record in wanted.parent.glob("*.json"))
    names |= {name for name in recorded if (folder / name).exists()}  # of earlier downloads, such as another GGUF
    if not names:
        raise UserError(f"{folder}: nothing to check against, neither a record of a download nor a {CHECKLIST}")
    for name in sorted(names):
        file, record = folder / name, Record.read(folder, name)
        if not file.exists():
            raise UserError(f"{file}: is missing; download it again")
        digest = record.digest if record else None
        wrong = mismatch(file, digest, listed.get(name))
        if record and file.stat().st_size != record.size:
            wrong = f"has {file.stat().st_size:,} bytes, should have {record.size:,}"
        if wrong:
            if record:
                with contextlib.suppress(OSError):  # nothing may be written there
                    record._replace(verified_at=None).write(folder, name)
            raise UserError(f"{file}: {wrong}; download it again")
        checked = " and ".join(known.algorithm for known in (digest, listed.get(name)) if known) or "length"
        print(f"llama3_raw: {file}: correct ({checked})", file=sys.stderr)


def show_plan(source: Source, files: Sequence[RemoteFile], folder: Path) -> None:
    """Print what `download` would do."""
    for file in files:
        target, part = folder / file.name, part_file(folder, file)
        state = "to fetch"
        if target.exists():
            state = "complete" if is_verified(file, folder) else "exists, to be checked"
        elif part.exists():
            state = f"to fetch from byte {file_size(part):,}"
        elif source.local_copy(file):
            state = "in the Hugging Face cache"
        print(f"{file.size:>15,}  {target}  ({state})")
    print(f"{sum(file.size for file in files):>15,}  bytes in total, from {source}")


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m llama3_raw.download`."""
    parser = ArgumentParser(
        prog="python -m llama3_raw.download",
        description="Fetch the weights, params and tokenizer of a Llama model into weights/. Run it again to resume "
        "an interrupted download. Meta's models need a licence, which you accept on their page, and a token: "
        "`hf auth login`, HF_TOKEN or --token. HF_ENDPOINT, HF_HUB_OFFLINE, HTTPS_PROXY and SSL_CERT_FILE are obeyed.",
    )
    parser.add_argument(
        "--model", type=not_empty, metavar="NAME", help="a short name (see --list) or org/repo (default: 8b)"
    )
    parser.add_argument("--list", action="store_true", help="show the short names and sizes, and exit")
    parser.add_argument(
        "--to",
        type=lambda text: Path(not_empty(text)),
        metavar="FOLDER",
        help="the folder to fill (default: weights/ and the model's name)",
    )
    parser.add_argument(
        "--from",
        dest="mirror",
        metavar="ADDRESS",
        help="fetch from gs://bucket/folder/, az://account/container/folder/ or a local folder",
    )
    parser.add_argument(
        "--revision", type=not_empty, default="main", help="a branch, tag or commit of the repository (default: main)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--format",
        choices=("original", "safetensors"),
        help="Meta's checkpoint, or Hugging Face's (default: original for meta-llama/*, else what there is)",
    )
    which.add_argument("--file", type=not_empty, metavar="NAME.gguf", help="fetch this GGUF file, with all its parts")
    parser.add_argument("--token", help="access token for the hub (default: HF_TOKEN, else the stored login)")
    parser.add_argument("--dry-run", action="store_true", help="show what would be fetched, and exit")
    parser.add_argument("--verify", action="store_true", help="check the files on the disk, without a network")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    options = build_parser().parse_args(arguments)
    if options.list:
        print(describe_models())
        return 0
    repo = repository_of(options.model or "8b")
    name = repo.rpartition("/")[2]
    if options.mirror and not options.model:  # named after the last folder of the mirror
        is_local = "://" not in options.mirror
        name = Path(options.mirror).resolve().name if is_local else options.mirror.rstrip("/").rpartition("/")[2]
    folder = options.to or Path("weights") / name
    if options.verify:
        verify(folder)
        return 0
    try:
        token = (options.token or get_token() or "").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"the stored login cannot be read ({error}); run `hf auth login` again") from error
    if not token.isascii() or not token.isprintable():
        raise UserError("--token: contains characters that no token has; copy it again")
    source: Source = Hub(repo, options.revision, token or None) if options.mirror is None else mirror(options.mirror)
    files = gguf_files(source, options.file) if options.file else wanted_files(source, repo, options.format)
    if options.dry_run:
        show_plan(source, files, folder)
        return 0
    download(source, files, folder)
    model = folder / files[0].name if options.file else folder
    which = "" if model == Path("weights") / "Meta-Llama-3-8B" else f'--weights "{model}" '
    print(f'llama3_raw: {model} is complete; try: python -m llama3_raw {which}"your prompt"', file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
