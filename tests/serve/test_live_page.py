"""The live page in a real browser: it types, picks, ablates and patches, and each number is that of a trace."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import llama3_raw
from llama3_raw import REFERENCE, Model, Trace
from llama3_raw.decoding.sampling import Sampling, probabilities
from llama3_raw.serve import live
from llama3_raw.tokenizer import Tokenizer
from llama3_raw.tracing import plots
from tests.serve.live_serving import serving
from tests.serve.test_live import slowly

TEXT, OTHER = "Once upon a time, there was a", "Once upon a time, there was the"
FIRST_BAR = "#bars li:first-child data[value]:not([value=''])"
WIDE = {"width": 1366, "height": 900}


@pytest.fixture(scope="module")
def url(tiny: Model) -> Iterator[str]:
    with serving(tiny) as address:
        yield address


class Bar(NamedTuple):
    """A row of the next token, as shown."""

    id: int
    prob: float
    before: float | None


class Live:
    """The page, opened, with its console and requests."""

    def __init__(self, browser: Any, url: str, fragment: str = ""):
        self.context = browser.new_context(viewport=WIDE)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[Any] = []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request))
        self.open(url + fragment)

    def open(self, url: str) -> None:
        """Go to the page, or back to its beginning."""
        self.errors.clear()
        self.requests.clear()
        self.page.goto(url)
        self.page.wait_for_selector(FIRST_BAR)
        self.settle()

    def settle(self) -> None:
        """Wait until no pass runs and nothing is about to be asked."""
        self.page.wait_for_selector("#columns[aria-busy=false]")

    def type(self, text: str, box: str = "#prompt") -> None:
        self.page.fill(box, text)
        self.settle()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
            self.settle()

    def click(self, selector: str, number: int = 0) -> None:
        self.page.locator(selector).nth(number).click()
        self.settle()

    def ids(self) -> list[int]:
        return [int(text) for text in self.page.locator("#tokens .id").all_inner_texts()]

    def numbers(self, selector: str) -> list[float]:
        """Return the numbers of an element; the text shown is the rounded value."""
        found = self.page.locator(selector).evaluate_all("(all) => all.map((data) => [data.value, data.textContent])")
        for value, text in found:
            assert_shown(text, float(value) if value else None)
        return [float(value) for value, _ in found if value]

    def bars(self) -> list[Bar]:
        names = self.page.locator("#bars button").evaluate_all("(all) => all.map((row) => row.ariaLabel)")
        ids = [int(re.findall(r"id (\d+),", name)[-1]) for name in names]
        probs = self.numbers("#bars data:not(.was)")
        before: Sequence[float | None] = self.numbers("#bars data.was") or [None] * len(ids)
        return [Bar(*row) for row in zip(ids, probs, before, strict=True)]

    def python(self, view: str) -> dict[str, Any]:
        """Run the Python that a view shows, and return its names, and what it prints as "printed"."""
        names: dict[str, Any] = {}
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(self.page.text_content(f"#{view}-python"), names)
        return {**names, "printed": printed.getvalue()}

    def assert_compared(self, columns: Sequence[Tensor], tokenizer: Tokenizer) -> None:
        """The table of two prompts has these probabilities [vocab] of the most likely tokens, and so has its Python."""
        titles = self.page.locator("#comparison th[title]").evaluate_all("(all) => all.map((head) => head.title)")
        listed = [int(title.split()[1]) for title in titles]
        top = [token for probs in columns for token in plots.most_likely(probs, 5).tolist()]
        assert listed == list(dict.fromkeys(top))
        expected = torch.stack([probs[listed] for probs in columns], dim=1)
        table = torch.tensor(self.numbers("#comparison data")).view(len(listed), len(columns))
        assert torch.allclose(table, expected, atol=1e-6)
        rows = zip(listed, expected.tolist(), strict=True)
        lines = [" ".join(map(str, (repr(tokenizer.name(token)), *row))) for token, row in rows]
        assert self.python("compare")["printed"].splitlines() == lines


@pytest.fixture(scope="module")
def one_page(browser: Any, url: str) -> Live:
    return Live(browser, url)


@pytest.fixture
def opened(one_page: Live, url: str) -> Iterator[Live]:
    """The page at its beginning."""
    one_page.open(url)
    yield one_page
    assert one_page.errors == []


def assert_shown(text: str, value: float | None) -> None:
    """The text is the probability in percent, with the digits that it has."""
    number = text.removesuffix(" %")
    if value is None or number in ("", "cut off"):
        assert (value or 0) == 0
    elif number.startswith("<"):
        assert 0 < value < float(number[1:]) / 100
    else:
        digits = len(number.partition(".")[2])
        assert float(number) == pytest.approx(100 * value, abs=0.50001 * 10**-digits)


def assert_bars(bars: Sequence[Bar], probs: Tensor, logits: Tensor, before: Tensor | None = None) -> None:
    """The bars are the ten tokens of the largest logits, with these probabilities [vocab]."""
    ids = plots.most_likely(logits, 10)
    assert [bar.id for bar in bars] == ids.tolist()
    assert [bar.prob for bar in bars] == pytest.approx(probs[ids].tolist(), rel=1e-5, abs=1e-12)
    expected: Any = [None] * 10 if before is None else pytest.approx(before[ids].tolist(), rel=1e-5, abs=1e-12)
    assert [bar.before for bar in bars] == expected


def trace(model: Model, ids: Sequence[int], *names: str, **options: Any) -> Trace:
    return llama3_raw.trace(model, ids, *names, ops=REFERENCE, **options)


def last_logits(model: Model, ids: Sequence[int], tap: Any = None) -> Tensor:
    return trace(model, ids, "logits", **({"tap": tap} if tap else {}))["logits"][-1]


def encoded(model: Model, text: str) -> list[int]:
    assert model.tokenizer is not None
    return model.tokenizer.encode(text, bos=True)


def test_typing_shows_the_tokens_and_the_next_one(opened: Live, tiny: Model) -> None:
    text = "Tom had\n🙂 a <b>big</b>"
    opened.type(text)
    ids = encoded(tiny, text)
    assert opened.ids() == ids
    shown = opened.page.locator("#tokens .bytes").all_inner_texts()
    assert shown[0] == "special"
    assert bytes.fromhex("".join(shown[1:])) == text.encode()
    chips = opened.page.locator("#tokens .token").all_inner_texts()
    assert chips[1:4] == ["Tom", "␣had", "↵"]
    logits = last_logits(tiny, ids)
    assert_bars(opened.bars(), logits.softmax(-1), logits)
    names = opened.python("next")
    assert names["ids"] == ids
    assert torch.equal(names["probs"], logits.softmax(-1))


def test_the_next_token_is_taken_picked_and_taken_back(opened: Live, tiny: Model) -> None:
    opened.type(TEXT)
    ids = encoded(tiny, TEXT)
    opened.page.locator("#prompt").focus()
    opened.press("Enter")
    ids.append(int(last_logits(tiny, ids).argmax()))
    assert opened.ids() == ids
    third = opened.bars()[2].id
    opened.click("#bars button", 2)  # another one, to continue from there
    assert opened.ids() == [*ids, third]
    logits = last_logits(tiny, [*ids, third])
    assert_bars(opened.bars(), logits.softmax(-1), logits)
    second = opened.bars()[1].id
    opened.press("2", "n")
    expected = [*ids, third, second]
    expected.append(int(last_logits(tiny, expected).argmax()))
    assert opened.ids() == expected
    assert opened.python("next")["ids"] == expected
    opened.press("Backspace")
    assert opened.ids() == expected[:-1]
    opened.click("#tokens button", 0)
    assert opened.ids() == encoded(tiny, TEXT)
    assert opened.page.locator("#back").is_disabled()
    opened.page.fill("#temperature", "2")
    opened.page.evaluate("Math.random = () => 0.999999")  # the last token of the vocabulary that is not impossible
    opened.click("#sample")
    assert len(opened.ids()) == len(ids)
    assert opened.ids()[-1] > tiny.params.vocab_size - 10
    assert opened.page.locator("#tokens .token").last.inner_text() == plots.token_text(tiny.tokenizer, opened.ids()[-1])
    opened.page.uncheck("#keys")
    opened.press("n")
    assert len(opened.ids()) == len(ids)


def test_quick_keys_are_not_lost(opened: Live, tiny: Model) -> None:
    """Enter right after the typing takes the next token of what was typed, not of what was there before."""
    opened.page.fill("#prompt", "Lily and Tom went to the")
    opened.page.keyboard.press("Enter")
    opened.settle()
    ids = encoded(tiny, "Lily and Tom went to the")
    assert opened.ids() == [*ids, int(last_logits(tiny, ids).argmax())]
    opened.page.fill("#prompt", "Tom")
    opened.click("#switches td.switch")  # ends what runs, which was to read the text
    assert opened.ids() == encoded(tiny, "Tom")
    assert opened.bars()[0].before is not None


def test_each_of_several_quick_keys_counts(opened: Live, tiny: Model) -> None:
    opened.type(TEXT)
    ids = encoded(tiny, TEXT)
    opened.page.locator("h1").click()
    for key in ("n", "n", "3", "n", "Backspace", "n", "n"):
        opened.page.keyboard.press(key)
    opened.settle()
    for rank in (0, 0, 2, 0, 0):
        ids.append(int(plots.most_likely(last_logits(tiny, ids), 3)[rank]))
    assert opened.ids() == ids


def test_a_prompt_that_is_full_takes_no_token(opened: Live, tiny: Model) -> None:
    opened.type(" a" * 126)
    ids = opened.ids()
    assert len(ids) == 127
    opened.page.locator("#prompt").focus()
    opened.press("Enter", "Enter", "Enter")
    assert opened.page.inner_text("#error").startswith("The page takes 128 tokens at most. Take some back, or")
    assert len(opened.ids()) == 128
    opened.click("#back")
    assert opened.ids() == ids
    assert opened.page.inner_text("#error") == ""


SAMPLINGS = [
    Sampling(temperature=0.5),
    Sampling(temperature=2, top_k=3),
    Sampling(temperature=1.5, top_p=0.9),
    Sampling(temperature=2, min_p=0.2),
    Sampling(temperature=1.2, top_k=8, top_p=0.97, min_p=0.05),
]


def test_sampling_reshapes_the_bars(opened: Live, tiny: Model) -> None:
    opened.type(TEXT)
    passes = len(opened.requests)
    logits = last_logits(tiny, encoded(tiny, TEXT))
    for sampling in SAMPLINGS:
        for name in ("temperature", "top_k", "top_p", "min_p"):
            opened.page.fill(f"#{name}", str(getattr(sampling, name)))
        assert_bars(opened.bars(), probabilities(logits, sampling), logits, before=logits.softmax(-1))
        assert torch.equal(opened.python("next")["probs"], probabilities(logits, sampling))
    assert len(opened.requests) == passes  # the page computes it


def test_temperature_0_is_greedy(opened: Live, tiny: Model) -> None:
    opened.page.fill("#temperature", "0")
    bars = opened.bars()
    assert [bar.prob for bar in bars] == [1.0] + [0.0] * 9
    assert opened.python("next")["probs"].nonzero().tolist() == [[bars[0].id]]
    assert opened.page.locator("#bars data").nth(2).inner_text() == "cut off"


def test_the_logit_lens_shows_each_layer_and_position(opened: Live, tiny: Model) -> None:
    opened.type(TEXT)
    ids = encoded(tiny, TEXT)
    lens = plots.read_logit_lens(trace(tiny, ids), tiny)
    texts = [[plots.token_text(tiny.tokenizer, row[0]) for row in stage] for stage in lens.ids.tolist()]
    rows = opened.page.locator("#lens tbody tr").all()
    assert [row.locator("td").all_inner_texts() for row in rows] == texts

    def assert_readout(stage: int, position: int) -> None:
        tokens = opened.page.locator("#lens-readout .token").all_inner_texts()
        assert tokens == [plots.token_text(tiny.tokenizer, token) for token in lens.ids[stage, position].tolist()]
        expected = lens.probs[stage, position].tolist()
        assert opened.numbers("#lens-readout data") == pytest.approx(expected, rel=1e-6)

    opened.page.locator("#lens tbody tr").nth(2).locator("td").nth(5).hover()
    assert_readout(2, 5)
    opened.page.locator("#lens td[tabindex='0']").focus()
    opened.press("ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowRight")
    assert_readout(0, 3)
    names = opened.python("lens")
    assert torch.equal(names["lens"].ids, lens.ids)
    assert torch.equal(names["lens"].probs, lens.probs)


def test_attention_of_any_layer_and_head(opened: Live, tiny: Model) -> None:
    opened.type(TEXT)
    ids = encoded(tiny, TEXT)
    opened.page.select_option("#layer", "2")
    opened.settle()
    opened.click("#thumbnails button", 4)
    assert opened.page.input_value("#head") == "4"
    probs = trace(tiny, ids)["layers.2.attention.probs"][4].float()  # [T, T]
    labels = opened.page.locator("#map td").evaluate_all("(all) => all.map((cell) => cell.ariaLabel)")
    for number, label in enumerate(labels):
        row, column = divmod(number, len(ids))
        assert label.startswith(plots.token_text(tiny.tokenizer, ids[row]) + f" ({row})")
        if column > row:
            assert "it comes later" in label
        else:
            assert float(label.rpartition(": ")[2]) == pytest.approx(float(probs[row, column]), abs=0.00051)
    opened.click("#lines button", 5)  # the lines of another token
    shown = [float(text or 0) for text in opened.page.locator("#lines data").all_inner_texts()]
    assert shown == pytest.approx(probs[5].tolist(), abs=0.0051)
    assert opened.page.locator("#lines path").count() == 6
    assert torch.equal(opened.python("attention")["probs"].float(), probs)


def test_switches_change_the_bars_beside_the_old_ones(opened: Live, tiny: Model) -> None:
    opened.type(TEXT)
    ids = encoded(tiny, TEXT)
    opened.page.locator("#switches td").nth(0).focus()
    opened.press("ArrowRight", "ArrowRight", "Enter")  # layer 0, head 2
    opened.click("#switches tr:nth-child(2) td.switch", 6)  # layer 1, MLP
    opened.page.locator("#switches input").nth(2).fill("1.5")
    opened.settle()

    def by_hand(name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        if name == "layers.0.attention.heads":
            tensor[:, 2] = 0
        elif name == "layers.1.feed_forward.out":
            tensor[:] = 0
        elif name == "layers.2.residual":
            tensor *= 1.5
        return tensor

    logits, clean = last_logits(tiny, ids, by_hand), last_logits(tiny, ids)
    assert not torch.equal(logits, clean)
    assert_bars(opened.bars(), logits.softmax(-1), logits, before=clean.softmax(-1))
    assert opened.page.inner_text("#changes-note") == "1 head off, 1 MLP off, 1 layer scaled"
    assert torch.equal(opened.python("next")["probs"], logits.softmax(-1))
    expected = plots.read_logit_lens(trace(tiny, ids, tap=by_hand), tiny)
    assert torch.equal(opened.python("lens")["lens"].ids, expected.ids)  # with the changes too
    opened.click("#undo-changes")
    assert_bars(opened.bars(), clean.softmax(-1), clean)


def test_one_prompt_is_patched_into_the_other(opened: Live, tiny: Model) -> None:
    opened.type(TEXT)
    opened.click("#compare-view > summary")
    opened.type(OTHER, "#other")
    opened.page.locator("#lens-b tbody tr").nth(2).locator("td").nth(8).click()  # the output of layer 1
    opened.settle()
    ids, other = encoded(tiny, TEXT), encoded(tiny, OTHER)
    source = trace(tiny, other)

    def by_hand(name: str, tensor: Tensor) -> Tensor:
        if name == "layers.1.residual":
            tensor = tensor.clone()
            tensor[8] = source[name][8]
        return tensor

    patched, clean = last_logits(tiny, ids, by_hand), last_logits(tiny, ids)
    assert_bars(opened.bars(), patched.softmax(-1), patched, before=clean.softmax(-1))
    columns = [logits.softmax(-1) for logits in (clean, patched, source["logits"][-1])]
    opened.assert_compared(columns, tiny.tokenizer)
    names = opened.python("compare")
    assert torch.equal(names["changed"], patched.softmax(-1))
    assert torch.equal(names["second"], source["logits"][-1].softmax(-1))
    assert "patched" in opened.page.locator("#lens-a tbody tr").nth(2).locator("td").nth(8).get_attribute("class")
    opened.page.locator("#lens-b td[tabindex='0']").press("Enter")  # once more: no longer
    opened.settle()
    assert_bars(opened.bars(), clean.softmax(-1), clean)
    opened.assert_compared([columns[0], columns[2]], tiny.tokenizer)


def test_prompts_of_different_length_are_aligned_at_either_end(opened: Live, tiny: Model) -> None:
    opened.type(TEXT)
    opened.click("#compare-view > summary")
    opened.type("One day, there was a", "#other")
    ids, other = encoded(tiny, TEXT), encoded(tiny, "One day, there was a")
    opened.page.select_option("#align", "end")
    opened.settle()
    opened.page.locator("#lens-b tbody tr").nth(3).locator("td").last.click()
    opened.settle()
    row = trace(tiny, other)["layers.2.residual"][-1]

    def by_hand(name: str, tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:-1], row[None]]) if name == "layers.2.residual" else tensor

    patched, clean = last_logits(tiny, ids, by_hand), last_logits(tiny, ids)
    assert_bars(opened.bars(), patched.softmax(-1), patched, before=clean.softmax(-1))
    names = opened.python("next")
    assert torch.equal(names["probs"], patched.softmax(-1))


def test_a_prompt_that_is_html_is_text(opened: Live, tiny: Model) -> None:
    text = "</textarea><img src=x onerror=alert(1)><script>alert(2)</script>"
    opened.click("#compare-view > summary")
    opened.type(text)
    opened.type(text, "#other")
    assert opened.page.locator("img").count() == 0
    assert opened.python("next")["ids"] == encoded(tiny, text)
    assert all(request.url.startswith(opened.page.url) for request in opened.requests)  # of no other host


def test_it_fits_each_width_and_colour_scheme(opened: Live) -> None:
    opened.click("#compare-view > summary")
    opened.type(OTHER, "#other")
    page = opened.page
    for width in (1366, 375):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # wide parts scroll on their own
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        red = int(re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0])
        assert (red > 200) == (scheme == "light")
    page.emulate_media(color_scheme=None)
    page.set_viewport_size(WIDE)


def test_the_smallest_probability_fits_beside_its_bar(opened: Live) -> None:
    for width in (1366, 375):
        opened.page.set_viewport_size({"width": width, "height": 800})
        heights = opened.page.evaluate("""() => {
            const data = document.querySelector("#lens-readout data");
            const before = data.getBoundingClientRect().height;
            data.textContent = "<0.001 %";
            return [before, data.getBoundingClientRect().height, data.scrollWidth - data.clientWidth];
        }""")
        assert heights == [heights[0], heights[0], 0]
    opened.page.set_viewport_size(WIDE)


def test_everything_has_a_name_and_the_keyboard_reaches_it(opened: Live) -> None:
    opened.click("#compare-view > summary")
    opened.type(OTHER, "#other")
    nameless = opened.page.evaluate("""() => [...document.querySelectorAll(
        "button, input, select, textarea, progress, table, [role=grid], [role=gridcell], [role=group], pre")]
        .filter((part) => !part.hidden && !(part.ariaLabel || part.textContent || part.labels?.length || part.caption))
        .map((part) => part.outerHTML)""")
    assert nameless == []
    # each grid has one cell that Tab reaches; the arrow keys move on from there
    reached = opened.page.evaluate("""() => [...document.querySelectorAll("[role=grid]")]
        .map((grid) => grid.querySelectorAll("td[tabindex='0']").length)""")
    assert reached == [1] * 5
    headings = opened.page.locator("h1, h2, h3").all_inner_texts()
    assert headings[:3] == ["From a prompt to its next token, live", "Prompt", "Next token"]
    assert opened.page.locator("#status").get_attribute("role") == "status"
    assert "tokens, then" in opened.page.inner_text("#status")


def test_a_slow_pass_shows_how_far_it_is(browser: Any, url: str, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with 8B: the bar moves, what is shown stays until the new numbers are there, and typing ends the pass."""
    live_page = Live(browser, url)
    before = live_page.bars()
    monkeypatch.setattr(live, "run_pass", slowly(0.15))
    live_page.page.fill("#prompt", "Tom")
    seen = set()
    while live_page.page.locator("#columns[aria-busy=true]").count():
        seen.add(live_page.page.evaluate("document.getElementById('progress').value"))
        if len(seen) == 2:
            assert live_page.bars() == before
            assert live_page.page.evaluate("getComputedStyle(document.getElementById('progress')).opacity") == "1"
    assert len(seen) >= 4
    assert live_page.bars() != before
    live_page.context.close()


def test_the_lens_of_a_large_model_is_computed_only_where_it_is_opened(
    browser: Any, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_LARGE", 0)
    with serving(tiny) as url:
        live_page = Live(browser, url)
        assert live_page.page.locator("#lens td").count() == 0
        live_page.page.click("#lens-view > summary")
        live_page.page.wait_for_selector("#lens td")
        live_page.context.close()


def test_errors_are_one_line(browser: Any, tiny: Model) -> None:
    with serving(tiny) as url:
        live_page = Live(browser, url)
        before = live_page.bars()
        live_page.type("word " * 200)
        error = live_page.page.locator("#error")
        assert "tokens, but the page takes 128; shorten the prompt" in error.inner_text()
        assert live_page.page.evaluate("document.getElementById('error').getClientRects().length") == 1
        assert live_page.bars() == before
        live_page.type(TEXT)
        assert error.inner_text() == ""
    ids = live_page.ids()
    live_page.page.locator("#prompt").focus()
    live_page.press("Enter", "Enter")
    assert error.inner_text() == "The server does not answer. Is it still running?"
    assert len(live_page.requests[-1].post_data_json["ids"]) == len(ids) + 1  # the first one was not added
    live_page.type("Tom")
    assert error.inner_text() == "The server does not answer. Is it still running?"
    live_page.context.close()


def test_what_fails_changes_nothing(browser: Any, url: str) -> None:
    """Neither the tokens, the switches and sliders, nor the Python: they stay those of the bars."""
    live_page = Live(browser, url)
    page = live_page.page
    live_page.type(TEXT)
    live_page.click("#take")
    live_page.click("#take")

    def shown() -> tuple[Any, ...]:
        sliders = page.locator("#switches input").evaluate_all("inputs => inputs.map((input) => input.value)")
        off, python = page.locator("#switches td.off").count(), page.text_content("#next-python")
        return live_page.ids(), live_page.bars(), sliders, off, python

    before = shown()
    page.route("**/live/**", lambda route: route.abort())
    live_page.click("#take")
    live_page.click("#switches td.switch", 3)
    page.locator("#switches input").first.fill("0.5")
    live_page.settle()
    page.locator("#temperature").fill("0.5")  # draws the bars and the Python anew, without the server
    page.locator("#temperature").fill("1")
    assert page.locator("#error").inner_text() == "The server does not answer. Is it still running?"
    assert shown() == before
    page.unroute("**/live/**")
    live_page.click("#take")
    assert live_page.ids()[:-1] == before[0]
    assert page.locator("#error").inner_text() == ""
    live_page.context.close()


def test_a_server_that_comes_later_or_with_another_model(browser: Any, url: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.route("**/live/model", lambda route: route.abort(), times=1)
    page.goto(url)
    page.wait_for_selector(FIRST_BAR)
    assert page.locator("#error").inner_text() == ""
    page.route("**/live/pass", lambda route: route.continue_(headers={**route.request.headers, "model-id": "other"}))
    page.fill("#prompt", "Tom")
    page.wait_for_selector("#error:not(:empty)")
    assert page.locator("#error").inner_text() == "the server has another model now; reload the page"
    context.close()


def test_two_pages_do_not_disturb_each_other(browser: Any, url: str, tiny: Model) -> None:
    first, second = Live(browser, url), Live(browser, url)
    first.click("#switches td.switch", 3)
    second.type("Tom had a")
    first.press("Escape")
    logits = last_logits(tiny, encoded(tiny, "Tom had a"))
    assert_bars(second.bars(), logits.softmax(-1), logits)
    assert all(bar.before is not None for bar in first.bars())
    for live_page in (first, second):
        live_page.context.close()


def test_the_key_of_the_address_opens_the_page(browser: Any, tiny: Model) -> None:
    with serving(tiny, api_key="s3cret") as url:
        live_page = Live(browser, url, "/#key=s3cret")
        assert live_page.page.url == url + "/"  # a class may see it
        live_page.open(url)  # in the same tab
        assert live_page.errors == []
        other = live_page.context.new_page()
        other.goto(url)
        other.wait_for_selector("#error:not(:empty)")
        assert other.inner_text("#error").endswith("open the address that it printed, which ends in #key=…")
        other.goto(url + "/#key=s3cret")  # which does not load the page again
        other.wait_for_selector(FIRST_BAR)
        assert other.url == url + "/"
        live_page.context.close()


def test_the_python_can_be_copied(opened: Live) -> None:
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened.click("#next .python summary")
    opened.click("#next .python button")
    assert opened.page.evaluate("navigator.clipboard.readText()") == opened.page.text_content("#next-python")
