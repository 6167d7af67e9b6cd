"""`Tokenizer`: text to token ids and back, with tiktoken and Meta's tokenizer.model."""

from __future__ import annotations

import base64
import binascii
import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

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


class Tokenizer:
    """Byte-pair encoding with the ranks of a tokenizer.model, followed by the 256 special tokens.

    n_words: the number of tokens. special_tokens: name -> id. bos_id, eos_id, eot_id, eom_id: the ids of the common
    ones. stop_ids: the ids at which a text or an answer ends. encoding: the underlying tiktoken.Encoding.
    """

    def __init__(self, path: str | Path):
        """Read a tokenizer.model. Raises UserError naming the line that is wrong, or what the file is instead."""
        ranks = _read_ranks(Path(path))
        self.special_tokens = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.path = Path(path)
        self.encoding = tiktoken.Encoding(
            name=Path(path).name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )
        self.n_words = len(ranks) + N_SPECIAL_TOKENS
        self.bos_id = self.special_tokens["<|begin_of_text|>"]
        self.eos_id = self.special_tokens["<|end_of_text|>"]
        self.eom_id = self.special_tokens["<|eom_id|>"]
        self.eot_id = self.special_tokens["<|eot_id|>"]
        self.stop_ids = frozenset((self.eos_id, self.eom_id, self.eot_id))

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, allow_special: bool = False) -> list[int]:
        """Return the token ids of a text, with a begin-of-text before it if `bos`, an end-of-text after it if `eos`.

        The name of a special token in the text, such as "<|eot_id|>", is plain text unless `allow_special`. A text that
        starts with a begin-of-text gets no second one.
        """
        allowed = set(self.special_tokens) if allow_special else set()
        ids = [self.bos_id] if bos else []
        for piece in _split_long_runs(text):
            ids += self.encoding.encode(piece, allowed_special=allowed, disallowed_special=())
        if ids[:2] == [self.bos_id, self.bos_id]:
            del ids[0]  # the text begins with one
        return [*ids, self.eos_id] if eos else ids

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token, or the name of a special one. Raises UserError for an id out of range."""
        if not 0 <= token < self.n_words:
            raise UserError(f"token id {token} is not one of the tokenizer's {self.n_words}")
        return self.encoding.decode_single_token_bytes(token)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def stream(self, ids: Iterable[int], stop: Sequence[str] = ()) -> Iterator[str]:
        """Yield the text of token ids piece by piece as they arrive, up to the first stop text, which is left out.

        The bytes of an incomplete character, and text that may be the beginning of a stop text, are held back. A last
        character that stays incomplete is left out; one that is broken by the bytes after it becomes U+FFFD, as in
        `decode`.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        held = ""
        for token in ids:
            held += decoder.decode(self.token_bytes(token))
            found = [position for position in map(held.find, filter(None, stop)) if position >= 0]
            if found:
                held = held[: min(found)]
                break
            keep = max((_overlap(held, text) for text in stop), default=0)
            ready, held = held[: len(held) - keep], held[len(held) - keep :]
            if ready:
                yield ready
        if held:
            yield held


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


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Return the rank of each token's bytes from the lines "base64 rank" of a tokenizer.model.

    tiktoken's own reader is not used: it keeps a copy in the shared temporary folder, identified by the path alone.
    """
    beginning = read_beginning(path)
    if beginning.lstrip().startswith(b"{"):
        raise UserError(f"{path}: this is a JSON file; use the repository's original/tokenizer.model")
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
