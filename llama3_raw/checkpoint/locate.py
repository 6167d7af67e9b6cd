"""Where a model is that was given by name: a path, a folder in weights/, or a repository in the Hugging Face cache."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from ..errors import UserError
from .gguf_reading import is_gguf

PACKAGE = Path(__file__).parents[1]
BUILT_IN_MODEL = "tiny"

_PARAMS_FILES = ("params.json", "config.json", "original/params.json")


def local_models() -> dict[str, Path]:
    """Return {name: folder} of the models in weights/ of the current folder, then of the source tree."""
    found: dict[str, Path] = {}
    for root in (Path("weights"), PACKAGE.parent / "weights"):
        with contextlib.suppress(OSError):  # there is none, or it is another user's
            for folder in sorted(root.iterdir()):
                if _holds_model(folder):
                    found.setdefault(folder.name, folder)
    return found


def _holds_model(folder: Path) -> bool:
    try:
        return any((folder / file).exists() for file in _PARAMS_FILES) or any(folder.glob("*.gguf"))
    except OSError:
        return False


def built_in_folder() -> Path:
    """Return weights/tiny of the source tree, or its copy in the installed package."""
    installed = PACKAGE / "built_in"
    return installed if installed.is_dir() else PACKAGE.parent / "weights" / BUILT_IN_MODEL


def find_named(name: str, named_by: str = "") -> Path:
    """Return the folder or the GGUF file that a name means, which may be a path.

    Otherwise it is that of a model in weights/, or org/repo[@revision] of one in the Hugging Face cache. named_by: the
    option that the name came from, for the message. Raises UserError listing what is available.
    """
    path = Path(os.path.expanduser(name))  # of a variable no shell has expanded ~
    what = f"{named_by} {name}".lstrip()
    try:
        if path.is_dir() or is_gguf(path):
            return path
        if path.exists():
            raise UserError(f"{what}: is a file, but no GGUF; give the folder it is in")
    except PermissionError:  # of the current folder: it may still be the name of a model
        if name not in {*local_models(), BUILT_IN_MODEL}:
            raise
    there = local_models()
    if name in there:
        return there[name]
    if name == BUILT_IN_MODEL:
        return built_in_folder()
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[^@]+)?", name) and not path.parent.is_dir():
        return _find_in_cache(name, what)
    kind = "file" if name.endswith(".gguf") else "folder"
    raise UserError(f"{what}: there is no such {kind}, and weights/ holds {', '.join(there) or 'nothing'}")


def _find_in_cache(name: str, what: str) -> Path:
    """Return the snapshot of org/repo or org/repo@revision in the Hugging Face cache.

    Without a revision it is that of main, or else the only one: a download pinned by commit leaves no refs/main.
    what: the name as the message of a UserError shows it.
    """
    from huggingface_hub import constants, snapshot_download  # slow to import, and seldom needed
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repo, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    snapshots = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "snapshots")
    found = [folder for folder in sorted(snapshots.glob("*")) if folder.name.startswith(revision)]
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(folder.name[:12] for folder in found)
        raise UserError(f"{what}: the Hugging Face cache has several revisions; give {repo}@ and one of {several}")
    raise UserError(
        f"{what}: neither a folder here nor in the Hugging Face cache; "
        f"fetch it with python -m llama3_raw.download --model {repo}{f' --revision {revision}' if revision else ''}"
    )


def name_of(path: Path) -> str:
    """Return a name for the model in a folder or file: its repository, if that is a snapshot in a cache, or its own."""
    in_cache = path.parent.name == "snapshots" and path.parents[1].name.startswith("models--")
    return path.parents[1].name.removeprefix("models--").replace("--", "/") if in_cache else path.resolve().name
