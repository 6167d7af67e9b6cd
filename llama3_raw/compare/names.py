"""The names of other implementations' tensors, as tap names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..params import Params
from ..tracing.names import FIRST, LAST, named_tensors

# a module's output, under "layers.N.", by the names of Hugging Face's and of Meta's modules
_OUTPUTS = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.out",
    "self_attn": "attention.out",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.out",
    "mlp": "feed_forward.out",
    "attention.wq": "attention.q",
    "attention.wk": "attention.k",
    "attention.wv": "attention.v",
    "attention.wo": "attention.out",
    "attention": "attention.out",
    "feed_forward.w1": "feed_forward.gate",
    "feed_forward.w3": "feed_forward.up",
    "feed_forward.w2": "feed_forward.out",
    "feed_forward": "feed_forward.out",
    "": "residual",
}
_STREAM = "the residual stream before the layer"
_INPUTS = {
    **dict.fromkeys(("", "input_layernorm", "attention_norm"), _STREAM),
    **dict.fromkeys(("self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attention_norm"),
    **dict.fromkeys(("attention", "attention.wq", "attention.wk", "attention.wv"), "attention_norm"),
    **dict.fromkeys(("self_attn.o_proj", "attention.wo"), "attention.heads"),
    **dict.fromkeys(("post_attention_layernorm", "ffn_norm"), "attention.residual"),
    **dict.fromkeys(("mlp", "mlp.gate_proj", "mlp.up_proj"), "ffn_norm"),
    **dict.fromkeys(("feed_forward", "feed_forward.w1", "feed_forward.w3"), "ffn_norm"),
    **dict.fromkeys(("mlp.down_proj", "feed_forward.w2"), "feed_forward.hidden"),
}
_TOP = {
    "embed_tokens": FIRST,
    "lm_head": LAST,
    "output": LAST,
    "last_hidden_state": "norm",
    "lm_head.input": "norm",
    "output.input": "norm",
}
_WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.|model\.)+")  # torch.compile's, DDP's and Hugging Face's


class Renamed(NamedTuple):
    """Tensors by tap name. `unknown` are the names that no pass has, as they were given."""

    tensors: dict[str, Any]
    again: dict[str, dict[str, Any]]  # those of the same tap name under further names, by these
    unknown: tuple[str, ...]
    notes: tuple[str, ...]  # what was understood, as text


def renamed(given: Mapping[str, Any], params: Params) -> Renamed:
    """Return the tensors by tap name.

    Understood are the names of Hugging Face's and Meta's modules, for their outputs or with .input for their inputs;
    transformers' hidden_states and attentions; / for the dots; layers that are counted from 1; and any names before
    all of that, if they are the same everywhere.
    """
    given = {str(name): value for name, value in given.items()}
    found = _renamed(_unstacked(given), params)
    outer, *others = {re.split("[./]", name, maxsplit=1)[0] for name in given} or {""}
    if found.tensors or others or outer in ("layers", *given) or outer.isdigit():
        return found
    inner = renamed({name[len(outer) + 1 :]: value for name, value in given.items()}, params)
    if not inner.tensors:
        return found
    unknown = tuple(f"{outer}.{name}" for name in inner.unknown)
    return inner._replace(unknown=unknown, notes=(f"names without {outer!r} before them", *inner.notes))


def _renamed(flat: Mapping[str, Any], params: Params) -> Renamed:
    made = named_tensors(params)
    by_plain_name = {name: _plain(name) for name in flat}
    layers = {int(found[1]) for found in map(re.compile(r"layers\.(\d+)\b").match, by_plain_name.values()) if found}
    shift = int(params.n_layers in layers and 0 not in layers)  # counted from 1
    tensors: dict[str, Any] = {}
    again: dict[str, dict[str, Any]] = {}
    unknown, mapped = [], []
    for exact in (True, False):  # a tap name comes before other names of the same tensor
        for name, plain in by_plain_name.items():
            ours = _tap_name(_shifted(plain, shift), params.n_layers)
            if (name == ours) != exact:
                continue
            if ours not in made:
                unknown.append(name)
            elif ours in tensors:
                again.setdefault(ours, {})[name] = flat[name]
            else:
                tensors[ours] = flat[name]
                if not exact and not shift:
                    mapped.append((name, ours))
    notes = []
    if shift:
        notes.append(f"layers counted from 1: layers.1 is layers.0 here, layers.{params.n_layers} the last")
    if mapped:
        notes.append("other names: {} is {} here, and so on".format(*mapped[0]))
    return Renamed(tensors, again, tuple(unknown), tuple(notes))


def _unstacked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors, with those of a stack of all layers, hidden_states or attentions, one by one."""
    flat: dict[str, Any] = {}
    for name, value in given.items():
        stacked = name in ("hidden_states", "attentions") and (
            isinstance(value, (list, tuple)) or len(getattr(value, "shape", ())) >= 3
        )
        flat |= {f"{name}.{i}": one for i, one in enumerate(value)} if stacked else {name: value}
    return flat


def _plain(name: str) -> str:
    """Return a name with dots, without the names of wrappers and .output."""
    plain = _WRAPPERS.sub("", name.replace("/", ".")).removesuffix(".output")
    return plain if plain != "model" else "norm"


def _shifted(name: str, shift: int) -> str:
    return re.sub(r"^layers\.(\d+)", lambda found: f"layers.{int(found[1]) - shift}", name)


def _tap_name(name: str, n_layers: int) -> str:
    """Return the tap name of a plain name; the name itself if there is none."""
    found = re.fullmatch(r"(hidden_states|attentions)\.(\d+)", name)
    if found:
        number = int(found[2])
        if found[1] == "attentions":
            return f"layers.{number}.attention.probs"
        return f"layers.{number - 1}.residual" if number else FIRST  # the last may be after the norm: see forms.py
    found = re.fullmatch(r"layers\.(\d+)(?:\.(.+?))??(\.input)?", name)
    if not found:
        if name == "norm.input":
            return f"layers.{n_layers - 1}.residual"
        return LAST if name == "output" else _TOP.get(name, name)
    number, module, of_input = int(found[1]), found[2] or "", found[3]
    ours = _INPUTS.get(module) if of_input else _OUTPUTS.get(module, module)
    if ours == _STREAM:
        return f"layers.{number - 1}.residual" if number else FIRST
    return f"layers.{number}.{ours}" if ours else name
