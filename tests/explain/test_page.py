"""The page of llama3_raw.explain: every number compared with a separate pass, and tests in a real browser."""

from __future__ import annotations

import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama3_raw import REFERENCE, Model, Tokenizer, Trace, UserError, generate, trace
from llama3_raw.explain import page
from llama3_raw.explain.__main__ import main
from llama3_raw.explain.page import build_page, merges_of, pieces_of
from llama3_raw.model import rope_frequencies
from llama3_raw.tracing import plots
from tests.paths import TINY
from tests.references import cast, seen_by_hand

PROMPT = "Once upon a time"  # as in the README


class Page(HTMLParser):
    """The elements of a page that the tests check."""

    def __init__(self, html: str):
        super().__init__()
        self.numbers: list[tuple[str, float, str]] = []  # expression, value, text shown
        self.ids: list[str] = []
        self.links: list[str] = []
        self.without_alternative: list[str] = []
        self.text = ""
        self._number: dict[str, str] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        attrs = {name: value or "" for name, value in attributes}
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs[name] for name in ("href", "src", "xlink:href") if name in attrs]
        if tag in ("svg", "img") and not attrs.get("aria-label", attrs.get("alt")):
            self.without_alternative.append(tag)
        if tag == "data":
            self._number = attrs

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._number is not None:
            self.numbers.append((self._number["title"], float(self._number["value"]), data))
            self._number = None


@pytest.fixture(scope="module")
def html(tiny: Model) -> str:
    return build_page(tiny, "tiny", PROMPT)


def expected_lens_probs(model: Model, seen: dict[str, Tensor]) -> Tensor:
    """Return the five largest probabilities after the embedding and each layer, [stages, T, 5]."""
    weights, stages = model.weights, []
    for x in (seen["tok_embeddings"], *(seen[f"layers.{i}.residual"] for i in range(model.params.n_layers))):
        normed = F.rms_norm(x.float(), (model.params.dim,), eps=model.params.norm_eps).to(x.dtype) * weights.norm
        assert isinstance(weights.output, Tensor)
        stages.append(F.linear(normed, weights.output).float().softmax(-1).sort(descending=True).values[:, :5])
    return torch.stack(stages)


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "layer", "head"), [(PROMPT, 0, 0), ("Tom <b>had</b> $3 & a\nred ball 🙂", 2, 4)])
def test_every_number_equals_its_python_expression(tiny: Model, prompt: str, layer: int, head: int) -> None:
    assert tiny.tokenizer is not None
    page = Page(build_page(tiny, "tiny", prompt, layer, head))
    ids = tiny.tokenizer.encode(prompt, bos=True)
    seen = seen_by_hand(tiny, ids)
    names = {
        "trace": seen,
        "params": tiny.params,
        "weights": tiny.weights,
        "lens": SimpleNamespace(probs=expected_lens_probs(tiny, seen)),
        "torch": torch,
        "F": F,
        "rope_frequencies": rope_frequencies,
    }
    assert len(page.numbers) > 200
    for python, value, shown in page.numbers:
        expected = float(eval(python, names))
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-9), python
        number = shown.replace("−", "-")
        percent = number.endswith("%")
        digits = 0.0051 if percent else 0.00051 * abs(expected)  # half a unit of the last digit shown
        assert float(number.rstrip("%")) / (100 if percent else 1) == pytest.approx(expected, rel=0, abs=digits), python
    expressions = {re.sub(r"\d+", "N", python) for python, _, _ in page.numbers}
    for name in ("tok_embeddings", f"layers.{layer}.attention.scores", f"layers.{layer}.feed_forward.hidden", "logits"):
        assert any(re.sub(r"\d+", "N", f'trace["{name}"]') in python for python in expressions), name


@pytest.mark.slow
def test_the_steps_add_up_as_the_page_says(tiny: Model) -> None:
    values = {python: value for python, value, _ in Page(build_page(tiny, "tiny", PROMPT, layer=2, head=4)).numbers}

    def value(name: str, *indices: str) -> float:
        return values[f'trace["{name}"]' + "".join(f"[{index}]" for index in indices)]

    def near(expected: Any) -> Any:
        return pytest.approx(expected, rel=0.02, abs=0.01)  # the values are bfloat16

    x = "layers.1.residual"
    (root,) = (value for python, value in values.items() if python.startswith(f'torch.rsqrt(trace["{x}"]'))
    for i in range(5):
        weight = values[f"weights.layers[2].attention_norm[{i}]"]
        assert value("layers.2.attention_norm", "4", f"{i}") == near(value(x, "4", f"{i}") * root * weight)
        attended = value(x, "4", f"{i}") + value("layers.2.attention.out", "4", f"{i}")
        assert value("layers.2.attention.residual", "4", f"{i}") == near(attended)
        fed = attended + value("layers.2.feed_forward.out", "4", f"{i}")
        assert value("layers.2.residual", "4", f"{i}") == near(fed)
    angle = values['(4 * rope_frequencies(params, torch.device("cpu")))[0]']
    before, after = (
        complex(value(f"layers.2.attention.{name}", "4, 4, 0"), value(f"layers.2.attention.{name}", "4, 4, 1"))
        for name in ("q", "q_rope")
    )
    assert after == near(before * complex(math.cos(angle), math.sin(angle)))
    probs, scores = (
        [value(f"layers.2.attention.{name}", f"4, 4, {i}") for i in range(5)] for name in ("probs", "scores")
    )
    assert probs == near(torch.tensor(scores).softmax(0).tolist())
    v = [value("layers.2.attention.v", f"{i}, 1", "0") for i in range(5)]  # head 4 shares kv head 1
    assert value("layers.2.attention.heads", "4, 4", "0") == near(sum(p * v for p, v in zip(probs, v, strict=True)))
    units = [re.search(r"hidden\"\]\[4, (\d+)\]", python) for python in values]
    for unit in (found[1] for found in units if found):
        gate, up, hidden = (value(f"layers.2.feed_forward.{name}", f"4, {unit}") for name in ("gate", "up", "hidden"))
        assert hidden == near(gate / (1 + math.exp(-gate)) * up)


@pytest.mark.slow
def test_the_page_is_self_contained_and_its_figures_have_alternative_text(html: str) -> None:
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    local = [link for link in page.links if link.startswith(("data:", "#"))]
    assert local == page.links  # no network
    assert not re.findall(r"url\((?!#|data:|\$\{)", html)
    assert {link[1:] for link in local if link.startswith("#")} <= set(page.ids)
    assert page.without_alternative == []
    for function in ("rms_norm", "attention", "rope", "attend", "layer", "feed_forward", "forward", "sample"):
        assert re.search(rf"{function}\s+(model|sampling)\.py, line", page.text), function
    assert len(html.encode()) < 1_000_000


@pytest.mark.slow
def test_the_last_step_shows_the_next_token(tiny: Model) -> None:
    assert tiny.tokenizer is not None
    for prompt in (PROMPT, "Tom had a red ball. He", "\x00"):
        (token,) = generate(tiny, tiny.tokenizer.encode(prompt, bos=True), max_new_tokens=1, ops=REFERENCE, stop_ids=())
        found = re.search(
            r"At temperature 0, the most likely token is chosen: (\S+)\.\n", Page(build_page(tiny, "", prompt)).text
        )
        assert found is not None
        assert found[1] == plots.token_text(tiny.tokenizer, token)


def test_merges_end_in_the_tokens_of_tiktoken(tiny: Model, meta_tokenizer_file: Path) -> None:
    text = "Once upon a time, Tom's 12345 cats said: naïve 🙂 résumé!\n\n  if x == 10:\n\treturn"
    for tokenizer in (tiny.tokenizer, Tokenizer(meta_tokenizer_file)):
        assert tokenizer is not None
        pieces = pieces_of(tokenizer, text)
        assert "".join(piece.text for piece in pieces) == text
        assert [token for piece in pieces for token in piece.ids] == tokenizer.encode(text)
        for piece in pieces:
            last = piece.merges[-1].parts
            assert [tokenizer.token_bytes(token) for token in piece.ids] == last
            assert piece.merges[0].parts == [bytes([byte]) for byte in piece.text.encode()]
            for earlier, later in zip(piece.merges, piece.merges[1:], strict=False):
                assert len(later.parts) == len(earlier.parts) - 1
                assert later.token is not None
                assert tokenizer.token_bytes(later.token) in later.parts


def test_a_whole_piece_that_no_merges_reach_is_a_token(tmp_path: Path) -> None:
    import base64

    ranks = [bytes([byte]) for byte in range(256)] + [b"abc"]  # neither ab nor bc
    file = tmp_path / "tokenizer.model"
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)))
    (piece,) = pieces_of(Tokenizer(file), "abc")
    assert piece.ids == [256]
    assert [merge.parts for merge in piece.merges] == [[b"a", b"b", b"c"]]
    assert len(merges_of(Tokenizer(file), b"<|eot_id|>")) == 1  # a special token written as text is text


@pytest.mark.slow
def test_a_prompt_cannot_inject_html(tiny: Model) -> None:
    page = build_page(tiny, "<b>tiny</b>", "Tom\u202eabc </script><script>alert(1)</script> had")
    assert "\u202e" not in page
    assert page.count("</script>") == 2  # those of the template
    assert "<b>tiny" not in page


@pytest.mark.slow
def test_the_merges_of_a_long_piece_are_left_out(tiny: Model) -> None:
    page = build_page(tiny, "tiny", "=" * 100)
    assert "More than 32 bytes" in Page(page).text
    assert len(page) < 3_000_000


def test_the_error_names_the_tensor_with_damaged_weights(tiny: Model) -> None:
    layer = tiny.weights.layers[1]
    broken = layer._replace(ffn_norm=layer.ffn_norm * torch.nan)
    layers = (tiny.weights.layers[0], broken, *tiny.weights.layers[2:])
    with pytest.raises(UserError, match=r"layers\.1\.ffn_norm: 960 of 960 values are not finite"):
        build_page(tiny._replace(weights=tiny.weights._replace(layers=layers)), "tiny", PROMPT)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "give a prompt"),
        (["Hi", "--layer", "4"], "--layer 4: the model has 4, numbered 0 to 3"),
        (["Hi", "--head", "-1"], "--head -1: the model has 6, numbered 0 to 5"),
        (["Hi", "-o", "/nowhere/page.html"], "there is no folder /nowhere"),
        (["a " * 200], "tokens, but a page shows at most 128"),
    ],
)
def test_wrong_arguments_print_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--weights", str(TINY), *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert complaint in err
    assert list(tmp_path.iterdir()) == []


def test_the_error_names_a_missing_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["--weights", str(TINY), "Hi", "-o", str(tmp_path / "page.html")]) == 2
    assert "needs the package jinja2" in capsys.readouterr().err


# tests in a real browser


@pytest.fixture(scope="module")
def tiny_trace(tiny: Model) -> Trace:
    assert tiny.tokenizer is not None
    return trace(tiny, tiny.tokenizer.encode(PROMPT, bos=True), ops=REFERENCE)


class Opened:
    """A page open in the browser, with its errors and requests."""

    def __init__(self, browser: Any, file: Path, **context: Any):
        self.page = browser.new_context(**context).new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def cells(self) -> Tensor:
        """Return the numbers of the heatmap, [T, T]."""
        rows = self.page.locator("#heatmap tbody tr").all()
        texts = [[cell.inner_text() for cell in row.locator("td").all()] for row in rows]
        # masked: · for a probability, −∞ for a score
        signs = {"·": "0", "−∞": "-inf"}
        numbers = [[float(signs.get(text, text).replace("−", "-")) for text in row] for row in texts]
        return torch.tensor(numbers)


@pytest.fixture(scope="module")
def file(html: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "page.html"
    assert main(["--weights", str(TINY), PROMPT, "-o", str(file)]) == 0
    assert file.read_text(encoding="utf-8") == html  # the command and build_page write the same page
    return file


def test_it_opens_without_errors_or_requests_at_each_width_and_colour_scheme(browser: Any, file: Path) -> None:
    backgrounds = set()
    for width in (1300, 375):
        for scheme in ("light", "dark"):
            opened = Opened(browser, file, viewport={"width": width, "height": 800}, color_scheme=scheme)
            assert opened.errors == []
            assert [url for url in opened.requests if not url.startswith(("file:", "data:"))] == []
            # no horizontal overflow: wide elements have their own scroll bar
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
            backgrounds.add(opened.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2


def test_the_head_picker_shows_the_numbers_of_any_head(browser: Any, file: Path, tiny_trace: Trace) -> None:
    opened = Opened(browser, file)
    page = opened.page
    assert torch.allclose(opened.cells(), tiny_trace["layers.0.attention.probs"][0].float(), atol=0.005)
    page.select_option("#layer", "3")
    page.locator("#thumbnails button").nth(5).click()
    assert page.input_value("#head") == "5"
    assert torch.allclose(opened.cells(), tiny_trace["layers.3.attention.probs"][5].float(), atol=0.005)
    page.get_by_role("radio", name="scores").check()
    scores = tiny_trace["layers.3.attention.scores"][5].float()
    assert torch.equal(opened.cells().isinf(), scores.isinf())
    assert torch.allclose(opened.cells(), scores, atol=0.005)
    assert page.inner_text("#heatmap-python") == 'trace["layers.3.attention.scores"][5]'
    assert page.inner_text("#chosen") == "layer 3, head 5: scores"
    assert opened.errors == []


def test_the_head_picker_works_from_the_keyboard(browser: Any, file: Path, tiny_trace: Trace) -> None:
    opened = Opened(browser, file)
    page = opened.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator("#head").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")  # the radio buttons
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#chosen") == "layer 0, head 1: scores"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")  # the second thumbnail
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.inner_text("#chosen") == "layer 0, head 2: scores"
    # the keyboard can only scroll elements that accept focus
    assert page.evaluate("[...document.querySelectorAll('.scroll, pre')].every((part) => part.tabIndex === 0)")


def test_the_keyboard_reaches_every_number(browser: Any, file: Path, tiny_trace: Trace) -> None:
    page = Opened(browser, file).page

    def shown() -> tuple[str, float]:
        python, value = page.inner_text("#python").split(" = ")
        return python, float(value)

    def python_of(row: int, column: int) -> str:
        cell = page.locator("section[aria-labelledby=values] tbody tr").nth(row).locator("td").nth(column)
        return str(cell.locator("data").get_attribute("title"))

    page.locator("section[aria-labelledby=values] .scroll").focus()
    page.keyboard.press("Tab")  # to the first number of the table; the arrow keys move to the others
    assert shown()[0] == python_of(0, 0)
    for keys, row, column in (("ArrowRight", 0, 1), ("ArrowDown", 1, 1), ("ArrowUp", 0, 1), ("ArrowLeft", 0, 0)):
        page.keyboard.press(keys)
        assert shown()[0] == python_of(row, column)
        assert shown()[1] == float(eval(shown()[0], {"trace": tiny_trace}))
    page.keyboard.press("ArrowUp")  # there is no row above
    assert shown()[0] == python_of(0, 0)
    page.keyboard.press("Tab")
    assert not page.locator("#python").is_visible()
    page.locator("#heatmap").locator("xpath=..").focus()
    page.keyboard.press("Tab")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert shown() == (
        'trace["layers.0.attention.probs"][0, 2, 1]',
        float(tiny_trace["layers.0.attention.probs"][0, 2, 1]),
    )
    # every number is in a group that Tab reaches
    assert page.evaluate("""() => [...document.querySelectorAll(NUMBERS)].every((number) =>
        [...groupOf(number).querySelectorAll(NUMBERS)].filter((other) => other.tabIndex === 0).length >= 1)""")


@pytest.mark.slow
def test_alternative_text_describes_the_values_shown(tiny: Model, html: str, tiny_trace: Trace) -> None:
    """Embeddings have 192 values; the plot shows the first 64."""
    shown = tiny_trace["tok_embeddings"][:, : plots.MAX_COLUMNS].float()
    row, dimension = divmod(int(shown.abs().argmax()), plots.MAX_COLUMNS)
    (alternative,) = re.findall(r'aria-label="The embedding of each token, as colours\. ([^"]*)"', html)
    assert alternative.startswith(f"From {shown.min():.3g} to {shown.max():.3g}; ")
    assert f" at {row} " in alternative
    assert alternative.endswith(f", dimension {dimension}.")


def test_masked_cells_differ_from_small_values(browser: Any, file: Path, tiny_trace: Trace) -> None:
    probs = tiny_trace["layers.0.attention.probs"][0]  # [T, T]
    smallest = int(probs[-1].argmin())
    rows = Opened(browser, file).page.locator("#heatmap tbody tr")
    assert rows.nth(0).locator("td").nth(1).inner_text() == "·"
    assert rows.nth(0).locator("td").nth(1).get_attribute("aria-label") == "masked"
    assert rows.nth(len(probs) - 1).locator("td").nth(smallest).inner_text() == f"{float(probs[-1, smallest]):.2f}"


def test_the_page_prints_dark_on_white_in_dark_mode(browser: Any, file: Path) -> None:
    page = Opened(browser, file, color_scheme="dark").page
    on_screen = page.evaluate("getComputedStyle(document.body).color")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(28, 36, 48)" != on_screen


def test_tapping_a_number_shows_its_python_expression(browser: Any, file: Path, tiny_trace: Trace) -> None:
    page = Opened(browser, file, has_touch=True, viewport={"width": 375, "height": 800}).page
    page.locator("section[aria-labelledby=next] td data").first.tap()
    python, value = page.inner_text("#python").split(" = ")
    assert float(value) == float(eval(python, {"trace": tiny_trace}))
    page.locator("h1").tap()
    assert not page.locator("#python").is_visible()
    page.locator("#heatmap tbody tr").nth(4).locator("td").nth(1).tap()
    python, value = page.inner_text("#python").split(" = ")
    assert python == 'trace["layers.0.attention.probs"][0, 4, 1]'
    assert float(value) == float(tiny_trace["layers.0.attention.probs"][0, 4, 1])


def test_without_javascript_one_head_is_shown(browser: Any, file: Path, tiny_trace: Trace) -> None:
    opened = Opened(browser, file, java_script_enabled=False)
    rows = [row.inner_text().split("\t")[1:] for row in opened.page.locator("#heatmap tbody tr").all()]
    assert rows[0] == ["1.00", "·", "·", "·", "·"]
    assert [float(cell) for cell in rows[4]] == pytest.approx(
        tiny_trace["layers.0.attention.probs"][0, 4].tolist(), abs=0.005
    )
    assert "JavaScript" in opened.page.locator("noscript").inner_text()


def test_layers_beyond_the_size_limit_show_thumbnails_only(
    browser: Any, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "MAX_HEAD_BYTES", 1000)  # a layer needs 480 bytes
    file = tmp_path / "page.html"
    file.write_text(build_page(tiny, "tiny", PROMPT, layer=2), encoding="utf-8")
    opened = Opened(browser, file)
    assert opened.page.locator("#heatmap tbody").is_visible()  # the numbers of layer 2 are always included
    opened.page.select_option("#layer", "0")
    assert not opened.page.locator(".thumbnail.large").is_visible()
    opened.page.select_option("#layer", "1")
    assert opened.page.locator(".thumbnail.large").is_visible()
    assert "thumbnail only" in opened.page.inner_text("#chosen")
    assert not opened.page.locator("#heatmap tbody").is_visible()
    assert opened.errors == []


def test_fp32_numbers_keep_full_precision(browser: Any, tiny: Model, tmp_path: Path) -> None:
    assert tiny.tokenizer is not None
    fp32 = tiny._replace(weights=cast(tiny.weights, torch.float32))
    expected = trace(fp32, tiny.tokenizer.encode(PROMPT, bos=True), ops=REFERENCE)
    file = tmp_path / "page.html"
    file.write_text(build_page(fp32, "tiny", PROMPT), encoding="utf-8")
    opened = Opened(browser, file)
    opened.page.select_option("#layer", "2")
    title = opened.page.locator("#heatmap tbody tr").nth(4).locator("td").nth(1).get_attribute("title")
    assert float(title) == float(expected["layers.2.attention.probs"][0, 4, 1])
