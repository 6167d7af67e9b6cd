"""Where two tokenizers cut a text differently."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..tokenizer import Tokenizer


class Piece(NamedTuple):
    """A piece of the text whose tokens differ, in both tokenizers. The ends are in bytes of UTF-8."""

    begin: int
    end: int
    text: str
    ours: tuple[int, ...]  # token ids
    theirs: tuple[int, ...]

    @property
    def is_cut_differently(self) -> bool:
        """Whether the tokens differ in length; else only their ids do."""
        return len(self.ours) != 1 or len(self.theirs) != 1


class Cuts(NamedTuple):
    """A text in the tokens of two tokenizers, and the pieces that they cut differently or give other ids."""

    ours: tuple[int, ...]
    theirs: tuple[int, ...]
    bos: tuple[int | None, int | None]  # what each begins the text with
    pieces: tuple[Piece, ...]

    @property
    def agree(self) -> bool:
        """Whether both have the same ids."""
        return self.ours == self.theirs

    def verdict(self, ours: Tokenizer, theirs: Tokenizer, other: str) -> str:
        """Return a few lines with the first piece; `other` is the name of the other tokenizer."""
        if self.agree:
            return f"They cut the text alike: {len(self.ours)} tokens with the same ids."
        lines = []
        if self.bos[0] != self.bos[1]:
            names = [
                "nothing" if bos is None else f"{tokenizer.name(bos)!r} ({bos})"
                for bos, tokenizer in zip(self.bos, (ours, theirs), strict=True)
            ]
            lines.append(f"The text begins with {names[0]} here, with {names[1]} in {other}.")
        cut = [piece for piece in self.pieces if piece.is_cut_differently]
        renumbered = [piece for piece in self.pieces if not piece.is_cut_differently]
        for pieces, differ in (
            (cut, "They cut differently first at"),
            (renumbered, "Cut alike, with other ids, first at"),
        ):
            if pieces:
                first = pieces[0]
                lines.append(
                    f"{differ} byte {first.begin}, in {first.text!r}:\n  {_cut(first.ours, ours)} here"
                    f"\n  {_cut(first.theirs, theirs)} in {other}"
                )
        if self.pieces:
            lines.append(
                f"{len(cut)} pieces are cut differently, {len(renumbered)} have other ids; {len(self.ours)} tokens "
                f"here, {len(self.theirs)} there."
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the figures to print as JSON."""
        first = next((piece._asdict() for piece in self.pieces if piece.is_cut_differently), None)
        return {
            "agree": self.agree,
            "first": first,
            "pieces": sum(piece.is_cut_differently for piece in self.pieces),
            "other_ids": sum(not piece.is_cut_differently for piece in self.pieces),
            "bos": list(self.bos),
            "tokens": [len(self.ours), len(self.theirs)],
        }


def _cut(ids: tuple[int, ...], tokenizer: Tokenizer) -> str:
    return " | ".join(f"{tokenizer.name(token)!r} {token}" for token in ids) or "nothing"


def compare_tokenizers(text: str, ours: Tokenizer, theirs: Tokenizer, *, allow_special: bool = False) -> Cuts:
    """Return where two tokenizers cut a text differently.

    A piece is the shortest part of the text at whose ends both cut, so that one difference does not shift what follows.
    """
    both = [tokenizer.encode(text, bos=True, allow_special=allow_special) for tokenizer in (ours, theirs)]
    content = text.encode()
    bos = tuple(_begins_with(ids, tokenizer, content) for ids, tokenizer in zip(both, (ours, theirs), strict=True))
    spans = [
        _spans(ids[bos_id is not None :], tokenizer)
        for ids, tokenizer, bos_id in zip(both, (ours, theirs), bos, strict=True)
    ]
    common = sorted({end for _, end in spans[0]} & {end for _, end in spans[1]})
    pieces, begin, at = [], 0, [0, 0]
    for end in common:
        cut: list[tuple[int, ...]] = []
        for which in (0, 1):
            first = at[which]
            while at[which] < len(spans[which]) and spans[which][at[which]][1] <= end:
                at[which] += 1
            cut.append(tuple(token for token, _ in spans[which][first : at[which]]))
        if cut[0] != cut[1]:
            pieces.append(Piece(begin, end, content[begin:end].decode(errors="backslashreplace"), *cut))
        begin = end
    rest = [tuple(token for token, _ in spans[which][at[which] :]) for which in (0, 1)]
    if any(rest):  # one of them does not keep the bytes of the text, as it normalizes it
        pieces.append(Piece(begin, len(content), content[begin:].decode(errors="backslashreplace"), *rest))
    return Cuts(tuple(both[0]), tuple(both[1]), (bos[0], bos[1]), tuple(pieces))


def _begins_with(ids: list[int], tokenizer: Tokenizer, content: bytes) -> int | None:
    """Return the token that was put before the text, if there is one."""
    bos = tokenizer.bos_id
    has_one = ids[:1] == [bos] and bos is not None and not content.startswith(tokenizer.token_bytes(bos))
    return bos if has_one else None


def _spans(ids: list[int], tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Return each token with the byte that it ends before."""
    ends, end = [], 0
    for token in ids:
        end += len(tokenizer.token_bytes(token))
        ends.append((token, end))
    return ends
