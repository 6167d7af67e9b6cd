"""`Tokenizer`: text to token ids and back, with tiktoken and Meta's tokenizer.model."""

from __future__ import annotations

import base64
import binascii
import codecs
import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import NamedTuple, Protocol

import tiktoken

from .errors import UserError
from .system.files import read_beginning, read_small_file

# Meta's pattern: text is first split into these pieces; only bytes within a piece are merged
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word, with the space or symbol before it
    r"|\p{N}{1,3}"  # up to three digits
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # symbols, with the space before and the line ends after them
    r"|\s*[\r\n]+"  # line ends, with the space before them
    r"|\s+(?!\S)|\s+"  # other space; the last character before a word belongs to the word
)

N_SPECIAL_TOKENS = 256
# the names of Llama 3.1 and later; in Llama 3 those from finetune_right_pad_id on were numbered reserved tokens, except
# the two header ids and eot_id
_NAMED_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
SPECIAL_TOKENS = _NAMED_SPECIAL_TOKENS + tuple(
    f"<|reserved_special_token_{number}|>" for number in range(2, 2 + N_SPECIAL_TOKENS - len(_NAMED_SPECIAL_TOKENS))
)

# tiktoken overflows its stack on longer runs (github.com/openai/tiktoken/issues/195); Meta splits them at this length
_MAX_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")


class Encoding(Protocol):
    """What `Tokenizer` needs of a tiktoken.Encoding, or of another library in its place."""

    def encode(
        self, text: str, *, allowed_special: AbstractSet[str], disallowed_special: Collection[str]
    ) -> list[int]: ...

    def decode_single_token_bytes(self, token: int) -> bytes: ...


class Vocabulary(NamedTuple):
    """What a tokenizer is made of, whichever file it comes from."""

    encoding: Encoding  # splits and merges; knows every token
    ranks: Mapping[bytes, int]  # the ids of the ordinary tokens
    special_tokens: dict[str, int]  # name -> id; in a text, their names are text unless they are allowed
    added_tokens: dict[str, int]  # name -> id; one token wherever the name occurs in a text
    bos_id: int | None  # what a text begins with; None: with nothing
    eos_id: int | None
    template_variables: Mapping[str, str]  # bos_token, eos_token and others, for a chat template


class Tokenizer:
    """Byte-pair encoding with the ranks of a tokenizer.model, followed by the 256 special tokens; or of another file.

    n_words: the highest id + 1. bos_id, eos_id, eot_id, eom_id: the ids of the common special tokens, or None where
    there is none. stop_ids: the ids at which a text or an answer ends. chat_templates: by name, in Jinja. The other
    attributes: see `Vocabulary`.
    """

    def __init__(self, path: str | Path, vocabulary: Vocabulary | None = None):
        """Take a vocabulary that was read from a file, or read a tokenizer.model.

        Raises UserError naming the line that is wrong, or what the file is instead.
        """
        self.path = Path(path)
        vocabulary = vocabulary or _read_vocabulary(self.path)
        self.encoding, self.ranks, self.special_tokens, self.added_tokens = vocabulary[:4]
        self.bos_id, self.eos_id, self.template_variables = vocabulary[4:]
        names = {**self.added_tokens, **self.special_tokens}
        self.eot_id, self.eom_id = names.get("<|eot_id|>"), names.get("<|eom_id|>")
        self.stop_ids = frozenset(token for token in (self.eos_id, self.eot_id, self.eom_id) if token is not None)
        self.n_words = max([*self.ranks.values(), *names.values()]) + 1
        self.chat_templates: Mapping[str, str] = {}

    @property
    def chat_template(self) -> str | None:
        """The chat template called "default", if there is one."""
        return self.chat_templates.get("default")

    def padded(self, vocab_size: int) -> Tokenizer:
        """Return the same tokenizer for a model of `vocab_size` rows; ids without a token are never encoded."""
        if vocab_size < self.n_words:
            raise UserError(f"{vocab_size} is less than the tokenizer's {self.n_words}", argument="vocab_size")
        tokenizer = copy.copy(self)
        tokenizer.n_words = vocab_size
        return tokenizer

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, allow_special: bool = False) -> list[int]:
        """Return the token ids of a text, with a begin-of-text before it if `bos`, an end-of-text after it if `eos`.

        The name of a special token in the text, such as "<|eot_id|>", is plain text unless `allow_special`. A text that
        starts with a begin-of-text gets no second one, and none if bos_id is None. Raises UserError for `eos` if eos_id
        is None.
        """
        allowed = {*self.added_tokens, *(self.special_tokens if allow_special else ())}
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        for piece in _split_long_runs(text) if isinstance(self.encoding, tiktoken.Encoding) else [text]:
            ids += self.encoding.encode(piece, allowed_special=allowed, disallowed_special=())
        if ids[:2] == [self.bos_id, self.bos_id]:
            del ids[0]  # the text begins with one
        if eos and self.eos_id is None:
            raise UserError(f"{{argument}}: {self.path} has no end-of-text token; leave it out", argument="eos")
        return [*ids, self.eos_id] if eos and self.eos_id is not None else ids

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token, the name of a special one, or b"" if no token has this id.

        Raises UserError for an id out of range.
        """
        if not 0 <= token < self.n_words:
            raise UserError(f"token id {token} is not one of the tokenizer's {self.n_words}")
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:
            return b""

    def name(self, token: int) -> str:
        """Return a token as text: bytes that are not UTF-8 as \\xNN, an id without a token as <|unused_N|>."""
        return self.token_bytes(token).decode("utf-8", errors="backslashreplace") or f"<|unused_{token}|>"

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def stream(self, ids: Iterable[int], stop: Sequence[str] = ()) -> Iterator[str]:
        """Yield the text of token ids piece by piece as they arrive, up to the first stop text, which is left out.

        The bytes of an incomplete character, and text that may be the beginning of a stop text, are held back. A last
        character that stays incomplete is left out; one that is broken by the bytes after it becomes U+FFFD, as in
        `decode`.
        """
        pieces = TextPieces(self, stop)
        for token in ids:
            yield from filter(None, [pieces.push(token)])
            if pieces.is_over:
                break
        yield from filter(None, [pieces.rest()])


class TextPieces:
    """The text of tokens that are pushed one by one, as `Tokenizer.stream` yields it.

    is_over: whether there was a stop text; what is pushed after it does not count.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.is_over = False
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token: int) -> str:
        """Return the text that is certain now."""
        if self.is_over:
            return ""
        self._held += self._decoder.decode(self._tokenizer.token_bytes(token))
        found = [position for position in map(self._held.find, self._stop) if position >= 0]
        if found:
            self._held, self.is_over = self._held[: min(found)], True
            return self.rest()
        keep = max((_overlap(self._held, text) for text in self._stop), default=0)
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready

    def rest(self) -> str:
        """Return the text that was held back, at the end."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the number of characters at the end of text that are the beginning of stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _split_long_runs(text: str) -> Iterator[str]:
    """Yield pieces with at most 25,000 characters of space or of non-space in a row, split as Meta's code does."""
    start = 0
    for run in _RUN.finditer(text):
        for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _read_vocabulary(path: Path) -> Vocabulary:
    """Return the vocabulary of a tokenizer.model, with Llama 3's special tokens."""
    ranks = _read_ranks(path)
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    bos_id, eos_id = (special[name] for name in names.values())
    return Vocabulary(llama3_encoding(path.name, ranks, special), ranks, special, {}, bos_id, eos_id, names)


def llama3_encoding(name: str, ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]) -> tiktoken.Encoding:
    """Return the encoding that splits a text as Llama 3's tokenizer does, and merges by these ranks."""
    return tiktoken.Encoding(
        name=name, pat_str=SPLIT_PATTERN, mergeable_ranks=dict(ranks), special_tokens=dict(special_tokens)
    )


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Return the rank of each token's bytes from the lines "base64 rank" of a tokenizer.model.

    tiktoken's own reader is not used: it keeps a copy in the shared temporary folder, identified by the path alone.
    """
    beginning = read_beginning(path)
    if beginning.lstrip().startswith(b"{"):
        raise UserError(
            f"{path}: this is a JSON file, which checkpoint.tokenizer_json.read_tokenizer reads; or use the "
            "repository's original/tokenizer.model"
        )
    if b"<unk>" in beginning:
        raise UserError(f"{path}: this is a SentencePiece model, as of Llama 1 or 2; use Llama 3's tokenizer.model")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_small_file(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            token_bytes = base64.b64decode(token, validate=True)
            expected = len(ranks)
            if int(rank) != expected:
                raise UserError(
                    f"{path}: line {number}: the rank is {int(rank)}, should be {expected}; download it again"
                )
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{path}: line {number}: should be base64 and a rank, is {line[:60]!r}; download it again"
            ) from error
        if token_bytes in ranks:
            raise UserError(f"{path}: line {number}: the token {token_bytes[:60]!r} is a duplicate; download it again")
        ranks[token_bytes] = expected
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{path}: no token for byte {missing[0]}, and every byte needs one; download it again")
    return ranks
