"""01: what is a token?

The question: a model computes with numbers, so which numbers does a text become? The idea: byte-pair encoding starts
from single bytes and joins the pairs that occur most often, so that common words get a number of their own while
nothing is ever unknown. What to look at: how `merge_most_frequent` learns, how `encode_by_rank` uses what was learned.

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

title("Learning: join the most frequent pair, again and again (Gage 1994; Sennrich et al. 2016)")


def pairs_in(words: list[tuple[str, ...]]) -> Counter[tuple[str, str]]:
    """How often each pair of neighbours occurs."""
    return Counter(pair for word in words for pair in itertools.pairwise(word))


def merge(words: list[tuple[str, ...]], pair: tuple[str, str]) -> list[tuple[str, ...]]:
    """The words with every such pair made one."""
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
    """Merges until no pair is left; -> the new tokens in the order in which they were made. Ties: the first seen."""
    made = []
    while pairs := pairs_in(words):
        pair, count = pairs.most_common(1)[0]
        words = merge(words, pair)
        made.append("".join(pair))
        print(f"  {'+'.join(pair):<6} occurs {count} ×, now {'  '.join('·'.join(word) for word in words)}")
    return made


corpus = [tuple(word) for word in ("ab", "bc", "bcd", "cde")]
print(f"  {'letters':<15}    {'  '.join('·'.join(word) for word in corpus)}")
learned = merge_most_frequent(corpus)
print(f"the vocabulary: a b c d e {' '.join(learned)}")
assert learned == ["bc", "ab", "bcd", "cd", "cde"]

# A well-known article lists `cd` and `de` both for these words. Strict merging cannot make both: once bc is joined, c,
# d and e are neighbours in cde alone, where the d goes either to the c or to the e. Whatever pair a tie is given to:


def every_outcome(words: list[tuple[str, ...]]) -> list[frozenset[str]]:
    """The tokens made, for every way to decide between pairs that occur equally often."""
    pairs = pairs_in(words)
    if not pairs:
        return [frozenset()]
    most = max(pairs.values())
    return [
        outcome | {"".join(pair)}
        for pair, count in pairs.items()
        if count == most
        for outcome in every_outcome(merge(words, pair))
    ]


outcomes = every_outcome(corpus)
print(f"of {len(outcomes)} ways to break the ties, cd is made in {sum('cd' in made for made in outcomes)},", end=" ")
print(f"de in {sum('de' in made for made in outcomes)}, both in {sum({'cd', 'de'} <= made for made in outcomes)}")
print("(the well-known article's table has both: it counts neighbours in the words as they were, without merging)")
assert not any({"cd", "de"} <= made for made in outcomes)

title("Using it: the rank of a token is when it was learned; the lowest rank is joined first")


def encode_by_rank(piece: bytes, ranks: dict[bytes, int], shown: bool = False) -> list[int]:
    """Byte-pair encoding of one word by hand: bytes -> token ids."""
    parts = [bytes([byte]) for byte in piece]
    while True:
        if shown:
            print("  " + " · ".join(part.decode(errors="backslashreplace").replace(" ", "␣") for part in parts))
        joined = [ranks.get(left + right) for left, right in itertools.pairwise(parts)]
        if all(rank is None for rank in joined):
            return [ranks[part] for part in parts]
        at = min((rank, i) for i, rank in enumerate(joined) if rank is not None)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


ranks = {tokenizer.token_bytes(rank): rank for rank in range(tokenizer.n_words - len(tokenizer.special_tokens))}
print(f"{tokenizer.path}: {len(ranks):,} ranks, the first 256 of them the single bytes")
for word in (" sunshine", " dragonfly"):
    ids = encode_by_rank(word.encode(), ranks, shown=True)
    print(f"  {word!r} -> {ids}")
    assert ids == tokenizer.encode(word)

title("A word that is in the vocabulary stays whole, whether merges lead to it or not")
# tiktoken looks a piece up before it merges anything. Here hugging is a token that merges never reach: gg comes first.
made_up = {bytes([byte]): byte for byte in range(256)} | {b"gg": 256, b"in": 257, b"ing": 258, b"hugging": 259}
looked_up = tiktoken.Encoding("made-up", pat_str=SPLIT_PATTERN, mergeable_ranks=made_up, special_tokens={})
by_merging = encode_by_rank(b"hugging", made_up)
print(f"  by merging {[looked_up.decode([token]) for token in by_merging]}, by tiktoken {looked_up.encode('hugging')}")
assert len(by_merging) == 4
assert looked_up.encode("hugging") == [259]
pieces = [tokenizer.decode([token]) for token in tokenizer.encode("hugging")]
print(f"  by this model's ranks {pieces}: not whole, since none of them is hugging")
print("  (in Llama 3 it is h, ugging; 588 of its other tokens are reached by the look-up alone, ' việc' among them)")

title("Before that, a pattern cuts the text into words; nothing is merged across a cut")
# as tiktoken_ext/openai_public.py has it
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
    cut = regex.findall(SPLIT_PATTERN, text)
    print("  " + " | ".join(cut).replace("\n", "↵").replace("\t", "⇥"))
    assert "".join(cut) == text
    assert regex.findall(CL100K, text) == cut
print("GPT-4's pattern (cl100k) is written differently and cuts all of these alike: digits in threes, the space goes")
print("with the word behind it. What Llama 3 changed is the vocabulary: 28,000 tokens more, for other languages.")

title("Special tokens stand outside: no text becomes one by accident")
name = "<|end_of_text|>"
as_text, as_token = tokenizer.encode(name), tokenizer.encode(name, allow_special=True)
print(f"  {name} as text: {len(as_text)} tokens; where it is allowed: {as_token}")
assert as_token == [tokenizer.eos_id]
assert tokenizer.eos_id not in as_text

title("There and back")
for text in ("Once upon a time", "Zażółć gęślą jaźń", "🦙 says: 你好"):
    ids = tokenizer.encode(text, bos=True)
    print(f"  {text!r}: {len(text)} characters, {len(text.encode())} bytes, {len(ids)} tokens", end=" ")
    print(f"with begin-of-text: {ids[:8]}{' …' if len(ids) > 8 else ''}")
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids[1:]) == text
