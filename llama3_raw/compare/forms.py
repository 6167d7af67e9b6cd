"""The forms in which ports have a tensor of the pass, and how each is read: in the layout of model.py.

A form is recognised by its shape, and where several fit (heads before positions, as many of both) by its values: the
layout of model.py is kept unless another one is much closer. A form only says where values are, and what a mask hides;
no value that takes part in the result is changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import rms_norm, rope, rope_rotation
from ..params import Params
from ..tracing.names import LAST, named_tensors, token_dimension, within_layer
from .difference import measure
from .names import Renamed
from .rounding import eps_of

_MUCH_CLOSER = 0.5  # times the difference of a layout that comes before it
_HIDDEN = 60.0  # below the largest score of its row: softmax makes 1e-26 of it
_NOTHING = 1e-6  # a probability that a sum does not notice
_ROUGHLY = 0.05  # two probabilities in bf16
_OLD_MASK = -1e4  # what is lower is a mask without a word
_PAIRED = ("attention.q", "attention.k", "attention.q_rope", "attention.k_rope")
_CACHED = ("attention.k", "attention.v", "attention.k_rope")

# the dimensions that a tensor may have, by its number of dimensions in model.py; G x R heads are H, in groups
_LAYOUTS = {
    "T N": ("T N", "N"),
    "T H D": ("T H D", "H T D", "T HD", "H D", "HD", "T G R D", "G R T D"),
    "H T S": ("H T S", "T H S", "G R T S", "H S"),
}
_LAYOUT_NOTES = {"H T D": "heads before positions", "T H S": "positions before heads"} | dict.fromkeys(
    ("T G R D", "G R T D", "G R T S"), "heads in groups"
)


class _Form(NamedTuple):
    """A tensor in the layout of model.py, but for the number of positions, and what was understood, as text."""

    tensor: Tensor
    notes: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()  # of these notes, those on which values are a pair, and how far it is rotated

    def then(self, tensor: Tensor, note: str) -> _Form:
        return self._replace(tensor=tensor, notes=(*self.notes, note))


class Reader:
    """Reads the tensors of another run, one by one, as a pass over the same prompt comes to them.

    given: the other run's tensors. others: those by tap name; `read` puts a tensor in the layout of model.py in the
    place of what was given, with all positions or the last one. The output of the last layer is moved to "norm" if that
    is what it is. padding: the side on which the other run's prompt was padded. `notes` are the forms that were
    understood, with the names they are of; `unlike` says why a tensor cannot be read.
    """

    def __init__(
        self,
        given: Renamed,
        params: Params,
        length: int,
        padding: str | None = None,
        of_gradients: bool = False,
    ):
        self.others: dict[str, Tensor] = given.tensors
        self._again = given.again  # the same under further names
        self.notes: dict[str, dict[str, None]] = {}
        self.unlike: dict[str, str] = {}
        self._params, self._length, self._padding, self._n_padding = params, length, padding, 0
        self._of_gradients = of_gradients  # which have no mask
        self._made = named_tensors(params)
        self._last_layer = f"layers.{params.n_layers - 1}.residual"
        self._pairs: dict[bool, tuple[str, ...]] = {}  # before RoPE, after it: as in the first clear case

    def read(self, name: str, ours: Tensor, norm: Tensor) -> None:
        """Read a tensor, with our own from the same input beside it. norm: the weight of the final norm.

        Of several that are given for the same name, the one that differs most is kept.
        """
        self._read(name, ours, norm)
        if name not in self._again:
            return
        worst = self._apart(name, ours), self.others.get(name), self.unlike.pop(name, None)
        for other, theirs in self._again.pop(name).items():
            self.others[name] = theirs
            self._read(name, ours, norm)
            found = self._apart(name, ours), self.others.get(name), self.unlike.pop(name, None)
            if found[0] > worst[0]:
                if worst[1] is not None:
                    self.notes.setdefault(f"{name} is also given as {other}, which differs more and is compared", {})
                worst = found
        _, tensor, why = worst
        if tensor is not None:
            self.others[name] = tensor
        if why is not None:
            self.unlike[name] = why

    def _apart(self, name: str, ours: Tensor) -> float:
        """Return how far a tensor that was read is from ours, beyond what its dtype rounds; -inf if it was moved."""
        theirs = self.others.get(name)
        if theirs is None:
            return -math.inf
        return (
            math.inf if name in self.unlike else measure(part_of(name, ours, theirs), theirs).rms - eps_of(theirs.dtype)
        )

    def _read(self, name: str, ours: Tensor, norm: Tensor) -> None:
        theirs = self.others[name]
        forms = [form for layout in self._layouts(name, theirs) for form in self._of_the_prompt(name, layout, ours)]
        if not forms:
            return
        self.unlike.pop(name, None)  # of a layout that it is not in
        if name == self._last_layer and not self._of_gradients and self._is_after_norm(forms[0].tensor, ours, norm):
            del self.others[name]
            note = f"{name} is after the norm, as transformers' last hidden state, and compared as norm"
            self.notes.setdefault(note, {})
            if "norm" in self.others:
                self._again.setdefault("norm", {})[name] = theirs
            else:
                self.others["norm"] = theirs
            return
        form = self._closest(name, forms, ours)
        if name.endswith("attention.scores") and not self._of_gradients:
            form = self._masked(name, form, ours)
        self.others[name] = form.tensor
        for note in form.notes:
            self.notes.setdefault(note, {})[name] = None

    def understood(self) -> list[str]:
        """Return what was understood of the tensors, as text, each with the names that it is of."""
        lines = []
        for note, names in self.notes.items():
            places = list(dict.fromkeys(map(of_any_layer, names)))
            of = ", ".join(places[:4]) + (", …" if len(places) > 4 else "")
            lines.append(f"{note} ({of})" if of else note)
        return lines

    def _layouts(self, name: str, theirs: Tensor) -> Iterator[_Form]:
        """Yield the tensor in the order of model.py, once for each layout that its shape may be."""
        params = self._params
        made = self._made[name].shape.split()
        kind = "H T S" if made[0] == "n_heads" else "T N" if len(made) == 2 else "T H D"
        n_heads = params.n_kv_heads if made[1] == "n_kv_heads" else params.n_heads
        sizes = {"D": params.head_dim, "G": params.n_kv_heads, "R": params.n_heads // params.n_kv_heads}
        sizes |= {"H": n_heads, "HD": n_heads * params.head_dim}
        if kind == "T N":
            sizes["N"] = getattr(params, made[1])
        understood: tuple[str, ...] = ()
        if name == LAST and theirs.dim() and theirs.shape[-1] > params.vocab_size:
            understood = (f"the first {params.vocab_size} of {theirs.shape[-1]} logits, a padded vocabulary",)
            theirs = theirs[..., : params.vocab_size]
        without_batch = [theirs]
        while without_batch[-1].dim() > 1 and without_batch[-1].shape[0] == 1:
            without_batch.append(without_batch[-1][0])
        per_kv_head = within_layer(name) in _CACHED and sizes["R"] > 1
        for tensor in reversed(without_batch):
            for layout in _LAYOUTS[kind]:
                note = _LAYOUT_NOTES.get(layout)
                notes = (*understood, note) if note else understood
                found = _arranged(tensor, layout, kind, sizes)
                if found is not None and not (per_kv_head and "G" in layout):
                    yield _Form(found, notes)
                if per_kv_head:  # each of its heads may be there once for each query head
                    repeated = {**sizes, "H": params.n_heads, "HD": params.n_heads * params.head_dim}
                    found = _arranged(tensor, layout, kind, repeated)
                    if found is not None:
                        yield from self._without_repeats(name, _Form(found, notes), sizes["R"])

    def _without_repeats(self, name: str, form: _Form, times: int) -> Iterator[_Form]:
        neighbours = form.tensor.unflatten(1, (-1, times))  # [T, n_kv_heads, times, head_dim]
        if torch.equal(neighbours, neighbours[:, :, :1].expand_as(neighbours)):
            yield form.then(neighbours[:, :, 0], "after repeat_kv, a kv head for each query head")
            return
        in_turn = form.tensor.unflatten(1, (times, -1))
        if torch.equal(in_turn, in_turn[:, :1].expand_as(in_turn)):
            self.unlike[name] = "the kv heads are repeated in turn (0 1 0 1), not as neighbours (0 0 1 1)"

    def _of_the_prompt(self, name: str, form: _Form, ours: Tensor) -> Iterator[_Form]:
        """Yield the part of a tensor that is of the prompt's positions, and with each order of pairs if it has some."""
        is_square = self._made[name].shape.startswith("n_heads")
        cut = self._cut(form, token_dimension(name) % form.tensor.dim(), within_layer(name) in _CACHED)
        if cut is not None and is_square:
            cut = self._cut_keys(name, cut)
        if cut is None or _sizes_but_tokens(name, cut.tensor) != _sizes_but_tokens(name, ours):
            return
        if within_layer(name) not in _PAIRED:
            yield cut
            return
        decided = self._pairs.get(name.endswith("_rope"))
        for paired in self._with_pairs(name, cut):
            if decided is None or paired.pairs == decided:
                yield paired._replace(notes=(*paired.notes, *paired.pairs))

    def _cut(self, form: _Form, dim: int, may_be_cache: bool) -> _Form | None:
        """Return the prompt's positions in dimension `dim`, or the last one; None if they cannot be told."""
        there, length = form.tensor.shape[dim], self._length
        if there == length:
            return form
        if there == 1:
            return form.then(form.tensor, "the last position alone")
        if there < length:
            return None
        if self._padding:
            self._n_padding = there - length
            begin = self._n_padding if self._padding == "left" else 0
            note = f"padded on the {self._padding}, by {self._n_padding} positions"
            return form.then(form.tensor.narrow(dim, begin, length), note)
        if may_be_cache:
            note = f"a cache of {there} positions, of which the prompt has the first {length}"
            return form.then(form.tensor.narrow(dim, 0, length), note)
        return None

    def _cut_keys(self, name: str, form: _Form) -> _Form | None:
        """Return scores or probs [n_heads, T, S] over the prompt's keys alone; None if others take part."""
        there, length = form.tensor.shape[-1], self._length
        if there == length:
            return form
        begin = self._n_padding if self._padding == "left" else 0
        if there < begin + length:
            return None
        kept = form.tensor.narrow(-1, begin, length)
        rest = torch.cat((form.tensor[..., :begin], form.tensor[..., begin + length :]), -1)
        if self._of_gradients:  # a probability that is 0 has a gradient all the same
            takes_part = name.endswith("scores") and bool(rest.any())
        elif name.endswith("probs"):
            takes_part = not bool((rest <= _NOTHING).all())  # also if it is NaN
        else:
            largest = kept.masked_fill(_future(kept), -torch.inf).amax(-1, keepdim=True)
            takes_part = bool((rest > largest - _HIDDEN).any()) and not self._is_masked_later(name)
        if takes_part:
            self.unlike[name] = f"of its {there} keys, some that are not among the prompt's {length} take part"
            return None
        note = f"over {there} keys, of which {length} are the prompt's"
        return form._replace(tensor=kept) if self._padding else form.then(kept, note)

    def _masked(self, name: str, form: _Form, ours: Tensor) -> _Form:
        """Return scores with -inf wherever they are masked, or will be."""
        theirs, future = form.tensor, _future(form.tensor)
        if theirs.shape != part_of(name, ours, theirs).shape or not future.any() or theirs.isnan().any():
            return form
        largest = theirs.masked_fill(future, -torch.inf).amax(-1, keepdim=True)
        hidden = (theirs <= largest - _HIDDEN)[future.expand_as(theirs)]
        if hidden.all():
            added = bool((theirs > _OLD_MASK).logical_and(future).any())
            notes = (*form.notes, "masked by a large negative number") if added else form.notes
        elif hidden.float().mean() <= 0.5 and (self._is_masked_later(name) or not self._is_softmax_of(name, theirs)):
            notes = (*form.notes, "saved before the mask")
        else:
            return form
        return _Form(theirs.masked_fill(future, -torch.inf), notes)

    def _is_masked_later(self, name: str) -> bool:
        """Whether the probabilities, if the other run has them, are 0 wherever the mask hides a score."""
        its_probs = name.replace("scores", "probs")
        if its_probs not in self.others:
            return True
        for form in self._layouts(its_probs, self.others[its_probs]):
            begin, probs = self._n_padding if self._padding == "left" else 0, form.tensor
            if probs.shape[-2] >= begin + self._length:
                probs = probs.narrow(-2, begin, self._length)
            is_last = probs.shape[-2] < self._length
            ahead = probs[..., begin + self._length :] if is_last else probs.triu(1 + begin)
            if (ahead <= _NOTHING).all():  # and not NaN
                return True
        return False

    def _is_softmax_of(self, name: str, scores: Tensor) -> bool:
        """Whether the other run's probabilities are the softmax of these scores, unmasked or by some other mask."""
        for form in self._layouts(name.replace("scores", "probs"), self.others[name.replace("scores", "probs")]):
            probs = form.tensor.to(scores)
            if probs.shape == scores.shape:
                expected = scores.masked_fill(probs <= _NOTHING, -torch.inf).float().softmax(-1)
                if (expected - probs).abs().max() < _ROUGHLY:
                    return True
        return False

    def _with_pairs(self, name: str, form: _Form) -> Iterator[_Form]:
        """Yield q or k with each order of pairs, and if it is padded, rotated for each way to count positions."""
        tensor = form.tensor
        halves = tensor.unflatten(-1, (2, -1)).transpose(-2, -1).flatten(-2)
        yield form
        yield form._replace(tensor=halves, pairs=("in Hugging Face's order, pairs half a head apart",))
        if name.endswith("_rope") and self._padding == "left" and self._n_padding:
            back = torch.full((len(tensor),), -self._n_padding, device=tensor.device)
            cos, sin = rope_rotation(back, self._params)
            counted = "positions counted from the padding on, which changes no score"
            for x, pairs in ((tensor, ()), (halves, ("in Hugging Face's order, pairs half a head apart",))):
                yield form._replace(tensor=rope(x, cos, sin), pairs=(*pairs, counted))

    def _closest(self, name: str, forms: list[_Form], ours: Tensor) -> _Form:
        """Return the first form that no later one is much closer than, and decide on the order of pairs if it is."""
        apart = [_apart(name, ours, form.tensor) for form in forms]
        best = 0
        for i, figure in enumerate(apart):
            if figure < _MUCH_CLOSER * apart[best]:
                best = i
        others = [figure for form, figure in zip(forms, apart, strict=True) if form.pairs != forms[best].pairs]
        if within_layer(name) in _PAIRED and others and apart[best] < _MUCH_CLOSER * min(others):
            self._pairs.setdefault(name.endswith("_rope"), forms[best].pairs)
        return forms[best]

    def _is_after_norm(self, theirs: Tensor, ours: Tensor, norm: Tensor) -> bool:
        ours = part_of(self._last_layer, ours, theirs)
        normed = rms_norm(ours, norm, self._params.norm_eps)
        return measure(normed, theirs).rms < _MUCH_CLOSER * measure(ours, theirs).rms


def of_any_layer(name: str) -> str:
    """layers.3.attention.q -> layers.*.attention.q"""
    return re.sub(r"\.\d+\.", ".*.", name)


def part_of(name: str, ours: Tensor, theirs: Tensor) -> Tensor:
    """Return our tensor [..., T, …], or its last position if the other run has only that."""
    dim = token_dimension(name)
    if theirs.dim() < -dim or theirs.shape[dim] != 1:
        return ours
    return ours.narrow(dim, ours.shape[dim] - 1, 1)


def _arranged(tensor: Tensor, layout: str, kind: str, sizes: dict[str, int]) -> Tensor | None:
    """Return a tensor with the dimensions of `layout` in the order of `kind`; None if its sizes are others."""
    there = layout.split()
    if tensor.dim() != len(there) or any(sizes.get(d, n) != n for d, n in zip(there, tensor.shape, strict=True)):
        return None
    if "HD" in there:
        tensor = tensor.unflatten(-1, (sizes["H"], sizes["D"]))
        there[-1:] = ["H", "D"]
    if "G" in there:
        at = there.index("G")
        tensor = tensor.flatten(at, at + 1)
        there[at : at + 2] = ["H"]
    if "T" not in there:
        at = kind.split().index("T")
        tensor = tensor.unsqueeze(at)
        there.insert(at, "T")
    return tensor.permute([there.index(d) for d in kind.split()])


def _future(scores: Tensor) -> Tensor:
    """Return which of the scores [n_heads, T or 1, T] a causal mask hides, [1, T or 1, T]."""
    queries, keys = scores.shape[-2:]
    return torch.ones(1, queries, keys, dtype=torch.bool, device=scores.device).triu(1 + keys - queries)


def _sizes_but_tokens(name: str, tensor: Tensor) -> list[int]:
    dim = token_dimension(name) % tensor.dim()
    return [size for i, size in enumerate(tensor.shape) if i != dim]


def _apart(name: str, ours: Tensor, theirs: Tensor) -> float:
    """Return how far a tensor is from ours, without what a mask hides."""
    ours = part_of(name, ours, theirs)
    if name.endswith("scores"):
        future = _future(theirs)
        ours, theirs = ours.masked_fill(future.to(ours.device), 0.0), theirs.masked_fill(future, 0.0)
    return measure(ours, theirs).rms
