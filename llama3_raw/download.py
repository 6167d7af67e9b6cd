"""python -m llama3_raw.download: the files of a model into weights/, from the hub or a mirror; resumed and verified.

A file grows as NAME.part beside its target and gets its name once its hash is right. What is known of each file (where
it came from, its hash, when that was last checked) is remembered in the folder's .download/.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from filelock import FileLock, Timeout
from huggingface_hub import constants, get_token
from tqdm import tqdm

from .cli.entry_point import ArgumentParser, command_line_tool, not_empty
from .errors import UserError, in_short
from .sources import ALGORITHMS, BlobStore, Digest, Hub, Interrupted, RemoteFile, Source, Stream
from .system.files import page_or_pointer


class Offer(NamedTuple):
    """A model that has a short name."""

    repo: str
    gigabytes: float  # of all its files, in units of 1e9 bytes


# two bytes a parameter (llama_models.sku_list has the shapes)
MODELS = {
    "8b": Offer("meta-llama/Meta-Llama-3-8B", 16.1),
    "8b-instruct": Offer("meta-llama/Meta-Llama-3-8B-Instruct", 16.1),
    "70b": Offer("meta-llama/Meta-Llama-3-70B", 141.1),
    "70b-instruct": Offer("meta-llama/Meta-Llama-3-70B-Instruct", 141.1),
    "3.1-8b": Offer("meta-llama/Llama-3.1-8B", 16.1),
    "3.1-8b-instruct": Offer("meta-llama/Llama-3.1-8B-Instruct", 16.1),
    "3.1-70b": Offer("meta-llama/Llama-3.1-70B", 141.1),
    "3.1-70b-instruct": Offer("meta-llama/Llama-3.1-70B-Instruct", 141.1),
    "3.2-1b": Offer("meta-llama/Llama-3.2-1B", 2.5),
    "3.2-1b-instruct": Offer("meta-llama/Llama-3.2-1B-Instruct", 2.5),
    "3.2-3b": Offer("meta-llama/Llama-3.2-3B", 6.4),
    "3.2-3b-instruct": Offer("meta-llama/Llama-3.2-3B-Instruct", 6.4),
    "3.3-70b-instruct": Offer("meta-llama/Llama-3.3-70B-Instruct", 141.1),
}

_TRIES = 7  # in a row without a byte; a minute in all
_CHECKLIST = "checklist.chk"  # "MD5  name" a line; Meta's own downloads bring one
_MEBIBYTE = 1 << 20


def wanted_files(source: Source, file_format: str) -> list[RemoteFile]:
    """The files of a model in Meta's format ("original") or Hugging Face's ("safetensors"), the smallest first."""

    def required(place: str) -> RemoteFile:
        file = source.find(place)
        if file is None:
            if constants.is_offline_mode():
                raise UserError(
                    f"{source}: HF_HUB_OFFLINE is set, and {place} is not in the Hugging Face cache; unset it, or "
                    "check what is there with --verify"
                )
            other = "safetensors" if file_format == "original" else "original"
            raise UserError(
                f"{source}: there is no {place}, or no such model at all; check the name, or try --format {other}"
            )
        return file

    tokenizer = "original/tokenizer.model"
    if file_format == "original":
        files = [required(place) for place in ("original/params.json", tokenizer, "original/consolidated.00.pth")]
        for number in range(1, 100):
            shard = source.find(f"original/consolidated.{number:02}.pth")
            if shard is None:
                break
            files.append(shard)
        if constants.is_offline_mode():
            print(
                f"llama3_raw: HF_HUB_OFFLINE is set; taking the {len(files)} files in the cache for all",
                file=sys.stderr,
            )
        return files
    files = [required("config.json"), required(tokenizer)]
    index = source.find("model.safetensors.index.json")
    if index is None:
        return [*files, required("model.safetensors")]
    try:
        content = _content(source, index)
        shards = sorted(set(json.loads(content)["weight_map"].values()))
        if not shards or not all(re.fullmatch(r"[\w.-]+\.safetensors", shard) for shard in shards):
            raise ValueError("it should name *.safetensors")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{source}: {index.name} is not a safetensors index ({in_short(error)}); try --format original"
        ) from error
    return [*files, index, *map(required, shards)]


def _content(source: Source, file: RemoteFile) -> bytes:
    """All of a small file."""
    copy = source.local_copy(file)
    if copy is not None:
        return copy.read_bytes()
    try:
        with source.open(file, 0, None) as stream:
            return b"".join(stream.chunks)
    except Interrupted as interruption:
        raise UserError(f"{file.name}: {interruption}; run the same command again") from interruption


class Record(NamedTuple):
    """What is remembered of a file: of its .part, and of itself once it is complete."""

    source: str
    version: str
    size: int
    digest: Digest | None = None
    validator: str | None = None  # of the bytes in the .part
    verified_at: int | None = None  # the file's time of change, in ns, when its hash was last found right

    @staticmethod
    def read(folder: Path, name: str) -> Record | None:
        """The record of a file; None if there is none that can be read."""
        try:
            content = json.loads(_record_file(folder, name).read_bytes())
            digest = Digest(**content.pop("digest")) if content["digest"] else content.pop("digest")
            record = Record(**content, digest=digest)
            kinds = (str, str, int, Digest | None, str | None, int | None)
            is_sound = all(isinstance(value, kind) for value, kind in zip(record, kinds, strict=True))
            return record if is_sound and (not digest or digest.algorithm in ALGORITHMS) else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def write(self, folder: Path, name: str) -> None:
        """Keeps the record."""
        content = {**self._asdict(), "digest": self.digest and self.digest._asdict()}
        file = _record_file(folder, name)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(file)


def _record_file(folder: Path, name: str) -> Path:
    return folder / ".download" / f"{name}.json"


def download(source: Source, files: Sequence[RemoteFile], folder: Path) -> None:
    """Fetches what of `files` is not in `folder` yet, or not right. Raises UserError; what was fetched stays."""
    if all(_is_known(file, folder) for file in files) and not any(_part(folder, file).exists() for file in files):
        return  # also where nothing may be written
    try:
        (folder / ".download").mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".download" / "lock", timeout=0)
        with lock:
            (folder / ".download" / "wanted").write_text("".join(f"{file.name}\n" for file in files))
            missing = []
            for file in files:
                if _is_there(source, file, folder):
                    _drop_part(folder, file)
                else:
                    missing.append(file)
                    _drop_other_version(file, folder)
            _check_disk(source, missing, folder)
            for file in missing:
                _fetch(source, file, folder)
    except Timeout as error:
        raise UserError(
            f"{folder}: another download is at work in this folder; wait for it, or end it first"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{folder}: the disk is full; free some space and run the same command again, it goes on from there"
            ) from error
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; give another folder with --to"
        ) from error


def _is_known(file: RemoteFile, folder: Path) -> bool:
    """Whether the file is there, and unchanged since it was last found right."""
    target, record = folder / file.name, Record.read(folder, file.name)
    if record is None or record.version != file.version or not target.exists():
        return False
    found = target.stat()
    return record.verified_at == found.st_mtime_ns and file.size == found.st_size


def _is_there(source: Source, file: RemoteFile, folder: Path) -> bool:
    """Whether the file is complete and right; its hash is computed only if it changed since the last time."""
    target = folder / file.name
    if not target.exists():
        return False
    if _is_known(file, folder):
        return True
    listed = read_checklist(folder).get(file.name)
    if target.stat().st_size == file.size and _mismatch(target, file.digest, listed) is None:
        _remember(source, file, folder)
        return True
    print(f"llama3_raw: {target}: is not what {source} has; fetching it again", file=sys.stderr)
    return False


def read_checklist(folder: Path) -> dict[str, Digest]:
    """File name -> MD5, from the folder's checklist.chk if it has one. Raises UserError for a line that is no such."""
    file = folder / _CHECKLIST
    found = {}
    for number, line in enumerate(file.read_text(errors="replace").splitlines() if file.exists() else (), start=1):
        match = re.fullmatch(r"([0-9a-fA-F]{32}) [ *](.+)", line.strip())
        if match:
            found[Path(match[2]).name] = Digest("md5", match[1].lower())
        elif line.strip():
            raise UserError(f"{file}: line {number}: should be an MD5 and a file name, is {line[:60]!r}")
    return found


def _mismatch(file: Path, digest: Digest | None, listed: Digest | None) -> str | None:
    """What is wrong with the content of a file, in words; None if it is as its source and its checklist say.

    Raises UserError if its source calls it right, and only the checklist says otherwise.
    """
    size = file.stat().st_size
    expected = [known for known in (digest, listed) if known]
    hashers = {
        known.algorithm: hashlib.new(known.algorithm.removeprefix("git-"), usedforsecurity=False) for known in expected
    }
    if "git-sha1" in hashers:
        hashers["git-sha1"].update(b"blob %d\0" % size)
    with open(file, "rb") as opened, _bar(size, 0, f"checking {file.name}") as bar:
        while hashers and (chunk := opened.read(4 * _MEBIBYTE)):
            for hasher in hashers.values():
                hasher.update(chunk)
            bar.update(len(chunk))
    for known in expected:
        actual = hashers[known.algorithm].hexdigest()
        if actual != known.value:
            wrong = f"{known.algorithm} is {actual}, should be {known.value}"
            if digest and known is listed:
                raise UserError(f"{file}: {wrong} by {_CHECKLIST}; if that list is of another version, remove it")
            return wrong
    return None


def _remember(source: Source, file: RemoteFile, folder: Path) -> None:
    verified_at = (folder / file.name).stat().st_mtime_ns
    Record(str(source), file.version, file.size, file.digest, None, verified_at).write(folder, file.name)


def _check_disk(source: Source, files: Sequence[RemoteFile], folder: Path) -> None:
    needed = 0
    for file in files:
        copy = source.local_copy(file)
        if copy is None or file.size < _MEBIBYTE or copy.stat().st_dev != folder.stat().st_dev:  # else it is linked
            needed += file.size - _size(_part(folder, file))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free on that disk; free some, "
            "or give a folder on another disk with --to"
        )


def _drop_other_version(file: RemoteFile, folder: Path) -> None:
    """Removes a .part that the bytes of this version cannot be added to."""
    part = _part(folder, file)
    record = Record.read(folder, part.name)
    is_other = file.digest is None if record is None else record.version != file.version
    if part.exists() and (is_other or _size(part) > file.size):
        print(f"llama3_raw: {part}: is of another version; starting again", file=sys.stderr)
        _drop_part(folder, file)


def _drop_part(folder: Path, file: RemoteFile) -> None:
    part = _part(folder, file)
    part.unlink(missing_ok=True)
    _record_file(folder, part.name).unlink(missing_ok=True)


def _fetch(source: Source, file: RemoteFile, folder: Path) -> None:
    """The file into its .part, then, if all is right, under its own name."""
    target, part = folder / file.name, _part(folder, file)
    listed = read_checklist(folder).get(file.name)
    copy = source.local_copy(file)
    if copy is not None and _size(copy) == file.size and _mismatch(copy, file.digest, listed) is None:
        print(f"llama3_raw: {target}: taken from {copy}", file=sys.stderr)
        _drop_part(folder, file)
        try:
            if file.size < _MEBIBYTE:
                raise OSError("small files are edited at times, and a copy in the cache would change with them")
            os.link(copy, part)
        except OSError:  # or another disk, or one without links
            _receive(BlobStore(str(copy.parent)), file._replace(place=str(copy)), part, folder)
    else:
        _receive(source, file, part, folder)
        wrong = _mismatch(part, file.digest, listed)
        if wrong:
            _drop_part(folder, file)
            raise UserError(f"{target}: {wrong}; what came was thrown away, run the same command again")
        if not (file.digest or listed):
            print(f"llama3_raw: {target}: {source} tells no hash; only the length was checked", file=sys.stderr)
        with open(part, "rb+") as opened:
            os.fsync(opened.fileno())  # the name must not outlive a power cut without the bytes
    os.replace(part, target)
    _remember(source, file, folder)
    _drop_part(folder, file)


def _part(folder: Path, file: RemoteFile) -> Path:
    return folder / f"{file.name}.part"


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _receive(source: Source, file: RemoteFile, part: Path, folder: Path) -> None:
    """The bytes of the file into `part`, from where it ends on, over as many connections as it takes."""
    if file.size == 0:
        raise UserError(f"{file.name}: is empty at {source}; take the model from elsewhere")
    record = Record.read(folder, part.name)
    validator = record.validator if record else None
    part.touch()
    failures, most = 0, _size(part)  # in a row; the most bytes there ever were
    with _bar(file.size, most, file.name) as bar:
        while (have := _size(part)) < file.size:
            reason = "the connection ended early"
            try:
                with source.open(file, have, validator) as stream:
                    first = next(stream.chunks, b"")
                    _check_beginning(source, file, stream, first)
                    validator = stream.validator
                    Record(str(source), file.version, file.size, file.digest, validator).write(folder, part.name)
                    with open(part, "ab") as opened:
                        if stream.start != have:
                            opened.truncate(0)
                            bar.reset()
                        for chunk in itertools.chain((first,), stream.chunks):
                            if opened.tell() + len(chunk) > file.size:
                                raise UserError(
                                    f"{part}: more than {file.size:,} bytes come; run the same command again"
                                )
                            opened.write(chunk)  # a kill loses what its buffer holds, some kilobytes
                            bar.update(len(chunk))
            except Interrupted as interruption:
                reason = str(interruption)
            now = _size(part)
            if now == file.size:
                return
            failures = 0 if now >= most + _MEBIBYTE else failures + 1
            most = max(most, now)
            if failures == _TRIES:
                raise UserError(
                    f"{part}: {reason}; {now:,} of {file.size:,} bytes are here, run the same command to go on"
                )
            bar.write(f"llama3_raw: {file.name}: {reason}; trying again", file=sys.stderr)
            time.sleep(2**failures / 2)


def _check_beginning(source: Source, file: RemoteFile, stream: Stream, first: bytes) -> None:
    """Raises UserError for what is not the file, before a byte of it takes the place of one that is."""
    other = page_or_pointer(first) if stream.start == 0 else None
    if other:
        raise UserError(
            f"{file.name}: {source} sent {other}; if it is a login page of this network, open any site in a browser, "
            "then run the same command again"
        )
    if stream.total not in (None, file.size):
        raise UserError(
            f"{file.name}: {stream.total:,} bytes are offered, but {source} says {file.size:,}; try again later"
        )


def _bar(total: int, start: int, what: str) -> tqdm[NoReturn]:
    disable = total < _MEBIBYTE  # done before it could be read
    return tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=what, mininterval=0.5, disable=disable)


def verify(folder: Path) -> None:
    """Checks every file of a folder against what is remembered of it and its checklist.chk, without a network.

    Raises UserError naming the first that is missing, incomplete or wrong, and if there is nothing to check by.
    """
    for part in folder.glob("*.part"):
        raise UserError(f"{part}: the download is not complete; run it again to go on")
    listed = read_checklist(folder)
    wanted = folder / ".download" / "wanted"
    names = set(listed) | set(wanted.read_text().split() if wanted.exists() else ())
    if not names:
        raise UserError(f"{folder}: nothing to check by, neither a download by this tool nor a {_CHECKLIST}")
    for name in sorted(names):
        file, record = folder / name, Record.read(folder, name)
        if not file.exists():
            raise UserError(f"{file}: is missing; download it again")
        digest = record.digest if record else None
        wrong = _mismatch(file, digest, listed.get(name))
        if record and file.stat().st_size != record.size:
            wrong = f"has {file.stat().st_size:,} bytes, should have {record.size:,}"
        if wrong:
            if record:
                with contextlib.suppress(OSError):  # nothing may be written there
                    record._replace(verified_at=None).write(folder, name)
            raise UserError(f"{file}: {wrong}; download it again")
        checked = " and ".join(known.algorithm for known in (digest, listed.get(name)) if known) or "length"
        print(f"llama3_raw: {file}: right ({checked})", file=sys.stderr)


def show_plan(source: Source, files: Sequence[RemoteFile], folder: Path) -> None:
    """Prints what `download` would do."""
    for file in files:
        target, part = folder / file.name, _part(folder, file)
        state = "to fetch"
        if target.exists():
            state = "there" if _is_known(file, folder) else "there, to be checked"
        elif part.exists():
            state = f"to fetch from byte {_size(part):,} on"
        elif source.local_copy(file):
            state = "in the Hugging Face cache"
        print(f"{file.size:>15,}  {target}  ({state})")
    print(f"{sum(file.size for file in files):>15,}  bytes in all, from {source}")


def _model_offers() -> str:
    lines = [f"{name:<20}{offer.gigabytes:>7.1f} GB  {offer.repo}" for name, offer in MODELS.items()]
    return "\n".join([*lines, "or any org/repo with the same files"])


def _repository(model: str) -> str:
    """--model -> org/repo. Raises UserError."""
    if model.lower() in MODELS:
        return MODELS[model.lower()].repo
    if "/" in model:
        return model
    close = difflib.get_close_matches(model.lower(), MODELS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(
        f"--model {model}: there is no such short name; {hint}--list shows them, any org/repo will do as well"
    )


def build_parser() -> ArgumentParser:
    """The options of `python -m llama3_raw.download`."""
    parser = ArgumentParser(
        prog="python -m llama3_raw.download",
        description="Fetches the weights, params and tokenizer of a Llama 3 model into weights/. Run it again to go on "
        "where it stopped. Meta's models need a licence that you accept on their page, and a token: `hf auth login`, "
        "HF_TOKEN or --token. HF_ENDPOINT, HF_HUB_OFFLINE, HTTPS_PROXY and SSL_CERT_FILE are obeyed.",
    )
    parser.add_argument(
        "--model", type=not_empty, metavar="NAME", help="a short name (see --list) or org/repo (default: 8b)"
    )
    parser.add_argument("--list", action="store_true", help="show the short names and the sizes, and end")
    parser.add_argument(
        "--to",
        type=lambda text: Path(not_empty(text)),
        metavar="FOLDER",
        help="the folder to fill (default: weights/<name of the model>)",
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
    parser.add_argument(
        "--format",
        choices=("original", "safetensors"),
        default="original",
        help="Meta's checkpoint, or Hugging Face's (default: original)",
    )
    parser.add_argument("--token", help="access token of the hub (default: HF_TOKEN, or the stored login)")
    parser.add_argument("--dry-run", action="store_true", help="show what would be fetched, and end")
    parser.add_argument("--verify", action="store_true", help="check the files that are there, without a network")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Runs the tool; -> exit status."""
    options = build_parser().parse_args(arguments)
    if options.list:
        print(_model_offers())
        return 0
    repo = _repository(options.model or "8b")
    name = repo.rpartition("/")[2]
    if options.mirror and not options.model:  # named after its own last folder
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
        raise UserError("--token: holds characters that no token has; copy it again")
    source: Source = Hub(repo, options.revision, token or None) if options.mirror is None else BlobStore(options.mirror)
    files = wanted_files(source, options.format)
    if options.dry_run:
        show_plan(source, files, folder)
        return 0
    download(source, files, folder)
    which = "" if folder == Path("weights") / "Meta-Llama-3-8B" else f'--weights "{folder}" '
    print(f'llama3_raw: {folder} is complete; try: python -m llama3_raw {which}"your prompt"', file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
