"""Reading Hugging Face's tokenizer.json, where it is byte-level BPE.

With Llama 3's pattern, tiktoken computes the tokens, as for a tokenizer.model. With another pattern, or where tiktoken
could give other tokens, the tokenizers library does, which is imported only then. (github.com/huggingface/tokenizers)
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, in_short
from ..system.files import read_beginning, read_json
from ..tokenizer import SPLIT_PATTERN, Encoding, Tokenizer, Vocabulary, llama3_encoding

_MAX_ID = 2**31  # above it is no id, but damage


def _byte_characters() -> str:
    """Return the character that stands for each byte: the byte's own in Latin-1, or from U+0100 on if that is no mark.

    (bytes_to_unicode in GPT-2's encoder.py)
    """
    marks = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in marks else next(others)) for byte in range(256))


BYTE_CHARACTERS = _byte_characters()
"""The character that stands for each byte in tokenizer.json and in GGUF files."""

# for str.translate; other characters become one that Latin-1 does not have
_TO_LATIN1 = dict.fromkeys(range(256), 0xFFFF) | {
    ord(character): byte for byte, character in enumerate(BYTE_CHARACTERS)
}


class AddedToken(NamedTuple):
    """A token that is found in a text before anything else. (AddedToken in tokenizers)"""

    id: int
    special: bool
    single_word: bool  # not within a word
    lstrip: bool  # takes the space before it
    rstrip: bool  # takes the space after it
    normalized: bool  # found in the text that the normalizer returns


class _Bpe(NamedTuple):
    """What a tokenizer.json says, as far as tokens depend on it."""

    path: Path
    vocab: dict[str, int]  # the ordinary tokens, a character for each byte
    merges: list[tuple[str, str]]  # the first is applied first
    ignore_merges: bool  # whether a piece that is a token is that token, whatever the merges say
    pre_tokenizer: dict[str, Any]
    normalizer: dict[str, Any] | None
    added: dict[str, AddedToken]


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json or a tokenizer.model, whichever it is by its content."""
    beginning = read_beginning(Path(path)).removeprefix(b"\xef\xbb\xbf")
    return read_tokenizer_json(path) if beginning.lstrip().startswith(b"{") else Tokenizer(path)


def read_tokenizer_json(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json, and the names of its bos_token and eos_token from the files beside it.

    Raises UserError if it is damaged or not byte-level BPE, or if it needs the tokenizers library and that is missing.
    """
    path = Path(path)
    return tokenizer_from_json(path, read_json(path), special_names(path.parent))


def special_names(folder: Path) -> dict[str, str]:
    """Return bos_token, eos_token and other names of tokens in the files beside a tokenizer."""
    names = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):  # the second one counts more
        for key, value in read_json(file).items() if file.exists() else ():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                names[key] = text
    return names


def bos_processor(name: str, token: int) -> dict[str, Any]:
    """Return the post-processor of a tokenizer.json that begins each text with a token."""
    text, other = ({"Sequence": {"id": sequence, "type_id": i}} for i, sequence in enumerate("AB"))
    begin, begin_other = ({"SpecialToken": {"id": name, "type_id": i}} for i in range(2))
    return {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, begin_other, other],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }


def tokenizer_from_json(path: Path, content: Mapping[str, Any], names: Mapping[str, str]) -> Tokenizer:
    """Return the tokenizer that the content of a tokenizer.json describes.

    path: what errors name. names: bos_token, eos_token and others, as `special_names` returns them.

    A text begins with the token that the post-processor puts there, as in transformers, which ignores add_bos_token
    beside a tokenizer.json. An end-of-text that it would add is left out: a model shall continue the text.
    """
    bpe = _read_bpe(path, content, {names[key] for key in ("bos_token", "eos_token") if key in names})
    special = {name: token.id for name, token in bpe.added.items() if token.special}
    eos = names.get("eos_token", "<|end_of_text|>")
    if eos not in special and "eos_token" in names:
        raise UserError(f"{path}: has no token {in_short(eos)!r}, the eos_token of the file beside it; get both again")
    ranks = {_token_bytes(text): token for text, token in bpe.vocab.items()}
    vocabulary = Vocabulary(
        encoding=_encoding(bpe, ranks),
        ranks=ranks,
        special_tokens=special,
        added_tokens={name: token.id for name, token in bpe.added.items() if not token.special},
        bos_id=_first_token(path, content, special),
        eos_id=special.get(eos),
        template_variables=dict(names),
    )
    return Tokenizer(path, vocabulary)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}; download it again")


def _field(path: Path, content: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """Return a field of a JSON object. Raises UserError if it has another type, or is missing without a default."""
    value = content.get(name)
    value = default if value is None else value
    if not isinstance(value, kind):
        raise _damaged(path, f"{name} should be a {kind.__name__}, is {in_short(repr(value))}")
    return value


def _read_bpe(path: Path, content: Mapping[str, Any], also_special: AbstractSet[str]) -> _Bpe:
    """Return the content of a tokenizer.json, checked. also_special: the names of tokens that are special anyway."""
    model = _field(path, content, "model", dict)
    kind = model.get("type", "BPE" if "merges" in model else None)
    pre_tokenizer = _field(path, content, "pre_tokenizer", dict, {})
    if kind != "BPE" or model.get("byte_fallback") or "ByteLevel" not in _types(pre_tokenizer, "pretokenizers"):
        what = f"BPE without bytes ({_described(pre_tokenizer)})" if kind == "BPE" else repr(kind)
        raise UserError(
            f"{path}: its model is {in_short(what)}, and only byte-level BPE is supported; give token ids in place of "
            "text"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise UserError(f"{path}: {name} = {in_short(repr(model[name]))} is not supported; give token ids")
    vocab = _field(path, model, "vocab", dict)
    if not vocab or not all(type(token) is int and 0 <= token < _MAX_ID for token in vocab.values()):
        raise _damaged(path, "vocab should give each token an id")
    added = _read_added(path, _field(path, content, "added_tokens", list, []))
    for name in also_special & (vocab.keys() | added.keys()):
        plain = AddedToken(vocab.get(name, -1), True, False, False, False, False)
        added[name] = added.get(name, plain)._replace(special=True)
    merges = _read_merges(path, _field(path, model, "merges", list))
    # an added token is found before any merge; one that is special must not be merged from text
    ordinary = {text: token for text, token in vocab.items() if text and text not in added}
    if len(ordinary) < len(vocab):
        merges = [(left, right) for left, right in merges if added.keys().isdisjoint((left, right, left + right))]
    _check_tokens(path, ordinary, merges, added)
    normalizer = _field(path, content, "normalizer", dict, {})
    return _Bpe(
        path=path,
        vocab=ordinary,
        merges=merges,
        ignore_merges=model.get("ignore_merges") is True,
        pre_tokenizer=pre_tokenizer,
        normalizer=normalizer if any(_flat(normalizer, "normalizers")) else None,
        added=added,
    )


def _read_added(path: Path, entries: Sequence[Any]) -> dict[str, AddedToken]:
    added = {}
    for entry in entries:
        if not isinstance(entry, dict):
            raise _damaged(path, f"added_tokens should be objects, has {in_short(repr(entry))}")
        name = _field(path, entry, "content", str)
        options = (_field(path, entry, key, bool, False) for key in AddedToken._fields[1:])
        token = AddedToken(_field(path, entry, "id", int), *options)
        if not 0 <= token.id < _MAX_ID:
            raise _damaged(path, f"added token {in_short(repr(name))} has id {token.id}")
        if not name or name in added or any("\ud800" <= character <= "\udfff" for character in name):
            raise _damaged(path, f"added token {token.id} has no name, or that of another ({in_short(ascii(name))})")
        added[name] = token
    return added


def _read_merges(path: Path, entries: Sequence[Any]) -> list[tuple[str, str]]:
    """Return merges from "left right" or ["left", "right"]."""
    pairs = (entry.split(" ") if isinstance(entry, str) else entry for entry in entries)
    merges = [tuple(pair) if isinstance(pair, list | tuple) else () for pair in pairs]
    if not all(len(merge) == 2 and type(merge[0]) is type(merge[1]) is str for merge in merges):
        raise _damaged(path, "merges should be pairs of tokens")
    return merges


def _check_tokens(
    path: Path, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Mapping[str, AddedToken]
) -> None:
    """Raise UserError if an id occurs twice, or a merge needs a token that is missing."""
    ids = [*vocab.values(), *(token.id for token in added.values())]
    if len(set(ids)) < len(ids):
        raise _damaged(path, "two tokens have the same id")
    needed = set(itertools.chain(itertools.chain.from_iterable(merges), itertools.starmap(str.__add__, merges)))
    if not vocab.keys() >= needed:
        raise _damaged(path, f"no token {in_short(repr(min(needed - vocab.keys())))}, and a merge needs it")


def _token_bytes(text: str) -> bytes:
    """Return the bytes that a token's characters stand for; of one with other characters, its own in UTF-8."""
    try:
        return text.translate(_TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError:
        return text.encode("utf-8", errors="replace")


def _first_token(path: Path, content: Mapping[str, Any], special: Mapping[str, int]) -> int | None:
    """Return the token that the post-processor puts before a text, or None."""
    names: list[str] = []
    for processor in _flat(_field(path, content, "post_processor", dict, {}), "processors"):
        if processor.get("type") not in ("TemplateProcessing", "ByteLevel", None):
            raise UserError(
                f"{path}: its post-processor {in_short(processor['type'])} is not supported; give token ids"
            )
        pieces = _field(path, processor, "single", list, [])
        if not all(isinstance(piece, dict) for piece in pieces):
            raise _damaged(path, f"single should be objects, is {in_short(repr(pieces))}")
        before = itertools.takewhile(lambda piece: "Sequence" not in piece, pieces)
        names += [_field(path, _field(path, piece, "SpecialToken", dict), "id", str) for piece in before]
    if len(names) > 1:
        raise UserError(f"{path}: begins a text with several tokens ({in_short(names)}), which is not supported")
    if names and names[0] not in special:
        raise _damaged(path, f"a text begins with {in_short(repr(names[0]))}, which is no special token of it")
    return special[names[0]] if names else None


def _flat(step: Mapping[str, Any], key: str) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a pre-tokenizer or post-processor, also those under `key` in a Sequence."""
    if step.get("type") != "Sequence":
        yield step
        return
    steps = step.get(key)
    for inner in steps if isinstance(steps, list) else ():
        if isinstance(inner, dict):
            yield from _flat(inner, key)


def _types(step: Mapping[str, Any], key: str) -> list[str]:
    return [str(inner.get("type")) for inner in _flat(step, key)]


def _described(pre_tokenizer: Mapping[str, Any]) -> str:
    """Return the steps of a pre-tokenizer and their patterns, for a message."""
    steps = (step for step in _flat(pre_tokenizer, "pretokenizers") if step)
    text = ", ".join(f"{step.get('type')} {step.get('pattern') or ''}".strip() for step in steps)
    return in_short(text or "no pre-tokenizer")


def _encoding(bpe: _Bpe, ranks: Mapping[bytes, int]) -> Encoding:
    """Return tiktoken's encoding if it gives the tokens that the file means, or else the tokenizers library's."""
    reason = _needs_tokenizers(bpe)
    if reason is not None:
        return _LibraryEncoding(bpe, ranks, reason)
    return llama3_encoding(bpe.path.name, ranks, {name: token.id for name, token in bpe.added.items()})


def _needs_tokenizers(bpe: _Bpe) -> str | None:
    """Return why tiktoken could give other tokens than the tokenizers library, or None."""
    steps = list(_flat(bpe.pre_tokenizer, "pretokenizers"))
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    is_llama3 = len(steps) == 2 and steps[0] == split and steps[1].get("type") == "ByteLevel"
    if not is_llama3 or any(steps[1].get(option, True) for option in ("add_prefix_space", "use_regex")):
        return f"its pre-tokenizer ({_described(bpe.pre_tokenizer)})"
    if not bpe.vocab.keys() >= set(BYTE_CHARACTERS):
        return "its vocabulary, without some bytes,"
    if bpe.normalizer:
        return f"its normalizer ({bpe.normalizer.get('type')})"
    if any(token.single_word or token.lstrip or token.rstrip for token in bpe.added.values()):
        return "its added tokens, which change the text around them,"
    names = sorted(bpe.added)  # of two that begin alike, tiktoken takes any
    if any(later.startswith(name) for name, later in itertools.pairwise(names)):
        return "its added tokens, one of which begins with another,"
    if not bpe.ignore_merges or not _merges_are_ranks(bpe.vocab, bpe.merges):
        return "its list of merges"
    return None


def _merges_are_ranks(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> bool:
    """Whether to merge by the list is to merge the pair whose concatenation has the lowest id, as tiktoken does.

    So it is if the list has all pairs of tokens whose concatenation is a token, in the order of its id. Pairs with the
    same concatenation may be in any order: a token is always merged in the same way from its bytes, whatever is around
    it, so that of these pairs only one ever occurs.
    """
    ids = [vocab[left + right] for left, right in merges]
    if any(first > second for first, second in itertools.pairwise(ids)) or len(set(merges)) < len(merges):
        return False
    if not set(BYTE_CHARACTERS).issuperset(itertools.chain.from_iterable(vocab)):
        return False
    return len(merges) == sum(text[:i] in vocab and text[i:] in vocab for text in vocab for i in range(1, len(text)))


class _LibraryEncoding:
    """Byte-level BPE by the tokenizers library, with the methods of tiktoken.Encoding that `Tokenizer` uses.

    The library knows only the ordinary tokens; added tokens are found here, so that they have the ids of the file, and
    special ones are found only where they are allowed.
    """

    def __init__(self, bpe: _Bpe, ranks: Mapping[bytes, int], reason: str):
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"{bpe.path}: {reason} needs the package tokenizers ({in_short(error)}); pip install tokenizers"
            ) from error
        if bpe.normalizer and any(token.normalized for token in bpe.added.values()):
            name = next(name for name, token in bpe.added.items() if token.normalized)
            raise UserError(
                f"{bpe.path}: added token {in_short(repr(name))} is to be found after the normalizer "
                f"({bpe.normalizer.get('type')}), which is not supported; give token ids"
            )
        model = {"type": "BPE", "vocab": bpe.vocab, "merges": bpe.merges, "ignore_merges": bpe.ignore_merges}
        content = {"pre_tokenizer": bpe.pre_tokenizer, "normalizer": bpe.normalizer, "model": model}
        try:
            self._library = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], **content}))
        except Exception as error:  # the library has no class of its own for errors
            raise _damaged(bpe.path, f"the tokenizers library cannot read it: {in_short(error)}") from error
        self._path = bpe.path
        self._added = bpe.added
        self._missing = {byte for byte, character in enumerate(BYTE_CHARACTERS) if character not in bpe.vocab}
        self._bytes = {token: content for content, token in ranks.items()}
        self._bytes |= {token.id: name.encode() for name, token in bpe.added.items()}

    def encode(self, text: str, *, allowed_special: AbstractSet[str], disallowed_special: Collection[str]) -> list[int]:
        """Return the token ids of a text. disallowed_special: must be empty, as `Tokenizer` has it.

        Raises UserError for a byte that has no token, which the library would leave out.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as tiktoken does
        ids: list[int] = []
        begin = 0
        for name, start, stop in _find_added(text, {name: self._added[name] for name in allowed_special}):
            ids += self._merged(text[begin:start])
            ids.append(self._added[name].id)
            begin = stop
        return ids + self._merged(text[begin:])

    def _merged(self, text: str) -> list[int]:
        missing = self._missing.intersection(text.encode()) if self._missing else ()
        if missing:
            raise UserError(
                f"{self._path}: has no token for byte 0x{min(missing):02x}, which is in the text; leave it out"
            )
        return list(self._library.encode(text, add_special_tokens=False).ids)

    def decode_single_token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token. Raises KeyError for another id."""
        return self._bytes[token]


def _find_added(text: str, added: Mapping[str, AddedToken]) -> Iterator[tuple[str, int, int]]:
    """Yield each added token in a text, with the part of the text that it takes: the first, and the longest of these.

    (AddedVocabulary.find_matches in tokenizers)
    """
    names = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))
    end = 0
    for match in re.finditer(names, text) if added else ():
        token, (start, stop) = added[match[0]], match.span()
        if start < end:  # the space of the token before it
            continue
        if token.single_word and any(re.match(r"\w", text[at : at + 1]) for at in (start - 1, stop) if at >= 0):
            continue
        if token.lstrip:
            start = end + len(text[end:start].rstrip())
        end = len(text) - len(text[stop:].lstrip()) if token.rstrip else stop
        yield match[0], start, end
