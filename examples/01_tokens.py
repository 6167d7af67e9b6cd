"""01: from text to tokens, by byte-pair encoding.

The question: a model computes with numbers, so which numbers does a text become? The idea: byte-pair encoding starts
from single bytes and merges the pairs that occur most often, so common words become a single token and no text is
unknown. What to look at: how `merge_most_frequent` learns merges, and how `encode_by_rank` applies them.

    python examples/01_tokens.py
"""

from __future__ import annotations

import itertools
from collections import Counter

import regex
import tiktoken
from lesson import open_model, title

from llama3_raw.tokenizer import SPLIT_PATTERN

model, tokenizer, _ = open_model(__doc__)

title("Training: repeatedly merge the most frequent pair (Gage 1994; Sennrich et al. 2016)")


def pairs_in(words: list[tuple[str, ...]]) -> Counter[tuple[str, str]]:
    """Return how often each pair of neighbours occurs."""
    return Counter(pair for word in words for pair in itertools.pairwise(word))


def merge(words: list[tuple[str, ...]], pair: tuple[str, str]) -> list[tuple[str, ...]]:
    """Return the words with every occurrence of the pair merged."""
    merged = []
    for word in words:
        parts: list[str] = []
        for part in word:
            if parts and (parts[-1], part) == pair:
                parts[-1] += part
            else:
                parts.append(part)
        merged.append(tuple(parts))
    return merged


def merge_most_frequent(words: list[tuple[str, ...]]) -> list[str]:
    """Merge until no pair is left, and return the new tokens in order. Ties go to the pair seen first."""
    new_tokens = []
    while pairs := pairs_in(words):
        pair, count = pairs.most_common(1)[0]
        words = merge(words, pair)
        new_tokens.append("".join(pair))
        print(f"  {'+'.join(pair):<6} occurs {count} ×, now {'  '.join('·'.join(word) for word in words)}")
    return new_tokens


corpus = [tuple(word) for word in ("ab", "bc", "bcd", "cde")]
print(f"  {'letters':<15}    {'  '.join('·'.join(word) for word in corpus)}")
learned = merge_most_frequent(corpus)
print(f"the vocabulary: a b c d e {' '.join(learned)}")
assert learned == ["bc", "ab", "bcd", "cd", "cde"]

# A well-known article lists both `cd` and `de` for these words. Merging cannot produce both: once bc is merged, c, d
# and e are neighbours only in cde, where d is merged either with c or with e. This holds for every way to break ties:


def every_outcome(words: list[tuple[str, ...]]) -> list[frozenset[str]]:
    """Return the tokens that result from each way to break the ties between equally frequent pairs."""
    pairs = pairs_in(words)
    if not pairs:
        return [frozenset()]
    highest = max(pairs.values())
    return [
        outcome | {"".join(pair)}
        for pair, count in pairs.items()
        if count == highest
        for outcome in every_outcome(merge(words, pair))
    ]


outcomes = every_outcome(corpus)
print(f"of {len(outcomes)} ways to break the ties, {sum('cd' in tokens for tokens in outcomes)} give cd,", end=" ")
print(f"{sum('de' in tokens for tokens in outcomes)} de, {sum({'cd', 'de'} <= tokens for tokens in outcomes)} both")
print("(the article's table has both, because it counts neighbours in the original words, without merging)")
assert not any({"cd", "de"} <= tokens for tokens in outcomes)

title("Encoding: a token's rank is the order in which it was learned; the lowest rank is merged first")


def encode_by_rank(piece: bytes, ranks: dict[bytes, int], verbose: bool = False) -> list[int]:
    """Bytes of one word -> token ids, by byte-pair encoding."""
    parts = [bytes([byte]) for byte in piece]
    while True:
        if verbose:
            print("  " + " · ".join(part.decode(errors="backslashreplace").replace(" ", "␣") for part in parts))
        pair_ranks = [ranks.get(left + right) for left, right in itertools.pairwise(parts)]
        if all(rank is None for rank in pair_ranks):
            return [ranks[part] for part in parts]
        at = min((rank, i) for i, rank in enumerate(pair_ranks) if rank is not None)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


ranks = {tokenizer.token_bytes(rank): rank for rank in range(tokenizer.n_words - len(tokenizer.special_tokens))}
print(f"{tokenizer.path}: {len(ranks):,} ranks; the first 256 are the single bytes")
for word in (" sunshine", " dragonfly"):
    ids = encode_by_rank(word.encode(), ranks, verbose=True)
    print(f"  {word!r} -> {ids}")
    assert ids == tokenizer.encode(word)

title("A word in the vocabulary becomes one token, even if no merges lead to it")
# tiktoken looks up the whole word before it merges. Here merges never reach the token hugging: gg comes first.
made_up = {bytes([byte]): byte for byte in range(256)} | {b"gg": 256, b"in": 257, b"ing": 258, b"hugging": 259}
looked_up = tiktoken.Encoding("made-up", pat_str=SPLIT_PATTERN, mergeable_ranks=made_up, special_tokens={})
by_merging = encode_by_rank(b"hugging", made_up)
print(
    f"  by merging: {[looked_up.decode([token]) for token in by_merging]}; by tiktoken: {looked_up.encode('hugging')}"
)
assert len(by_merging) == 4
assert looked_up.encode("hugging") == [259]
pieces = [tokenizer.decode([token]) for token in tokenizer.encode("hugging")]
print(f"  in this model: {pieces}, because hugging is not in its vocabulary")
print("  (in Llama 3 it is h, ugging; 588 of its other tokens, such as ' việc', are reached only by the lookup)")

title("First a pattern splits the text into words; merges never cross a split")
# copied from tiktoken_ext/openai_public.py
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
TEXTS = (
    "It's 2026, isn't it?",
    "  two spaces,\n\ta tab",
    "1234567 = 1,234,567",
    "HE'LL say: “naïve café”",
    "a \n\n b  ",
)
for text in TEXTS:
    words = regex.findall(SPLIT_PATTERN, text)
    print("  " + " | ".join(words).replace("\n", "↵").replace("\t", "⇥"))
    assert "".join(words) == text
    assert regex.findall(CL100K, text) == words
print("GPT-4's pattern (cl100k) is written differently and gives the same splits: digits in groups of up to three,")
print("a space with the word after it. Llama 3 differs in its vocabulary: 28,000 more tokens, for other languages.")

title("Special tokens are separate: no text becomes one by accident")
name = "<|end_of_text|>"
as_text, as_token = tokenizer.encode(name), tokenizer.encode(name, allow_special=True)
print(f"  {name} as text: {len(as_text)} tokens; with allow_special: {as_token}")
assert as_token == [tokenizer.eos_id]
assert tokenizer.eos_id not in as_text

title("Decoding returns the text")
for text in ("Once upon a time", "Zażółć gęślą jaźń", "🦙 says: 你好"):
    ids = tokenizer.encode(text, bos=True)
    print(f"  {text!r}: {len(text)} characters, {len(text.encode())} bytes, {len(ids)} tokens", end=" ")
    print(f"with BOS: {ids[:8]}{' …' if len(ids) > 8 else ''}")
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids[1:]) == text
