"""The page and the terminal: whole characters, words, and a lens whose numbers are the model's own.

The page is driven in a browser, where one is installed: Chromium, by Playwright.
"""

import copy
import json
import re
import shutil

import pytest
import torch

import reference
from baselines import METHODS
from conftest import uneven
from page import BAR, Piece, bar, bytes_of, contexts, explain, html_page, painted, whole_characters, words
from tokenizer import get_tokenizer, make_tokenizer

BYTES = get_tokenizer("bytes")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TEXT = "def add(a, b):\n    return a + b  # naïve </script><b>\n"


def make(method="adaptive", **settings):
    return uneven(method, **dict(n_head=2, vocab_size=257, block_size=32) | settings)


# --------------------------------------------------------------------------------------- characters and words


def test_characters_wait_until_they_are_whole():
    pieces = [Piece(bytes([b]), i) for i, b in enumerate("aé思".encode())]
    got = list(whole_characters(iter(pieces + [Piece("é".encode()[:1], 6)])))
    assert [text for text, _ in got] == ["a", "é", "思", "\ufffd"]
    assert [[p.steps for p in group] for _, group in got] == [[0], [1, 2], [3, 4, 5], [6]]


def test_a_number_that_is_no_token_has_no_bytes():
    """As cl100k_base has some below n_vocab, and a padded vocabulary beyond it."""
    ranks = {bytes([i]): i for i in range(256)}
    tokenizer = make_tokenizer("holes", r"\S+|\s+", ranks, {"<|endoftext|>": 300})
    assert [bytes_of(tokenizer, i) for i in (65, 256, 300, 301)] == [b"A", b"", b"<|endoftext|>", b""]


def test_no_byte_of_a_text_is_lost():
    """… wherever tokens cut it: what is shown is the whole text's own decoding."""
    texts = ["a–b — “thé”\n思考".encode(), b"\xe2 \xff\xc3\xc3\xa9 \xf0\x9f", b"\x80\xe2\x80"]
    for text in texts:
        for size in (1, 2, 3, 5, 100):
            pieces = [Piece(text[i : i + size], i) for i in range(0, len(text), size)]
            groups = list(whole_characters(pieces))
            assert "".join(part for part, _ in groups) == text.decode("utf-8", "replace")
            assert [piece for _, group in groups for piece in group] == pieces
            assert [part for word in words(pieces) for part in word] == groups


@pytest.mark.parametrize("tokens,wanted", [
    (list(TEXT[:26]), ["def", " ", "add", "(", "a", ",", " ", "b", "):", "\n    ", "return", " "]),
    (["The", " cat", "s", " sat", ".", "\n\n", "  ", " x_", "1", "ö", "+=", " --"],
     ["The", " cats", " sat", ".", "\n\n  ", " x_1ö", "+=", " --"]),
])
def test_bytes_and_longer_tokens_are_joined_to_words(tokens, wanted):
    pieces = [Piece(token.encode()) for token in tokens]
    assert ["".join(text for text, _ in word) for word in words(pieces)] == wanted


# ---------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("context", [1, 2, 5, 32])
def test_contexts_are_those_that_generate_reads(context):
    """Every token is said once, and never after more than the context holds."""
    for n in (1, 2, 5, 6, 33, 34, 100):
        said = []
        for start, first, end in contexts(n, context):
            assert start < first < end <= start + context + 1
            said += range(first, end)
        assert said == list(range(1, n))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "ponder2"])
def test_a_page_tells_what_generate_did(method):
    """Steps and probabilities, past the end of the context too. ponder2 reads otherwise than it decodes."""
    model = make(method)
    ids, new = list(b"def "), []
    for g in model.generate([ids], 80, seed=3):
        new.append((g.token.item(), g.steps.item(), g.prob.item()))
    pieces = explain(model, BYTES, ids + [token for token, *_ in new])
    assert pieces[0].text == b"d" and pieces[0].views == []
    for piece, (token, steps, prob) in zip(pieces[4:], new, strict=True):
        assert piece.text == (bytes([token]) if token < 256 else b"<|endoftext|>") and piece.steps == steps
        assert piece.views[-1].prob == pytest.approx(prob, abs=1e-5) and len(piece.views) == steps + 1
    assert method != "adaptive" or len({piece.steps for piece in pieces[4:]}) > 1


def test_the_lens_shows_the_answer_of_fewer_steps():
    """The k-th view is what the dense reference answers if its mixture ends with step k, and its reach."""
    model = make(block_size=64)
    ids = list(TEXT.encode())[:50]
    shares = []
    for k in range(model.max_latent + 1):
        config = copy.copy(model.config)
        config.max_latent, config.tau = max(k, 1), config.tau if k else 2.0  # beyond 1: no step is taken
        logits, _, reach, _ = reference.adaptive(model.state_dict(), config, torch.tensor([ids[:-1]]))
        shares.append(logits[0].softmax(1))
    reach = torch.cat((torch.ones(49, 1), reach[0]), 1)
    pieces = explain(model, BYTES, ids)
    assert model.max_latent == 3 and {piece.steps for piece in pieces} == {0, 1, 2, 3}
    for i, piece in enumerate(pieces[1:]):
        assert len(piece.views) == piece.steps + 1
        for k, view in enumerate(piece.views):
            best = shares[k][i].topk(5)
            assert view.prob == pytest.approx(shares[k][i, ids[i + 1]].item(), abs=1e-5)
            assert view.reach == pytest.approx(reach[i, k].item(), abs=1e-5)
            assert [token for token, _ in view.likeliest] == best.indices.tolist()
            assert [prob for _, prob in view.likeliest] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_the_dial_is_left_as_it_was_also_after_an_error():
    model = make()
    with pytest.raises((IndexError, RuntimeError)):  # by the last token, which no forward reads
        explain(model, BYTES, [*TEXT.encode()[:20], 300])
    assert model.max_latent == 3


# ----------------------------------------------------------------------------------------------- the terminal


def test_backgrounds_show_on_blanks_too():
    codes = re.compile("\x1b[^m]*m")
    assert painted("ab", 0) == "ab" and painted("\n", 0) == "\n"
    for steps in (1, 2, 3, 50):
        for text in ("ab", " ", "\n", "a\n\n b"):
            shown = painted(text, steps)
            assert codes.sub("", shown).replace(" \n", "\n") == text
            assert "\x1b[38;5;16;48;5;" in shown
            coloured = re.findall("\x1b\\[38[^m]*m(.*?)\x1b\\[0m", shown, re.S)
            assert "\n" not in "".join(coloured), "the colour runs to the end of the line"
    assert painted("ab", 1) != painted("ab", 2) != painted("ab", 3)
    assert painted("ab", 0, dim=True) == "\x1b[2mab\x1b[0m"


def test_a_bar_has_the_shares_of_the_steps():
    assert bar([], False) == "" and bar([0], False) == "0" * BAR
    assert bar([3, 0] * 50 + [1] * 100, False) == "0" * 10 + "1" * 20 + "3" * 10


# ------------------------------------------------------------------------------------------------ the browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not BROWSER:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page of a text, and closes it: nothing may be fetched, and no script may fail."""
    contexts, wrong = [], []
    path = tmp_path / "page.html"

    def opened(model, text, prompt=None, width=1280, scheme="light", anchor=""):
        pieces = explain(model, BYTES, list(text.encode()))
        path.write_text(html_page("a <note>", model, BYTES, [pieces], prompt), encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file:") or wrong.append(request.url))
        page.goto(f"file://{path}{anchor}")
        return page, pieces

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def each(page, what):
    """A JavaScript expression of every token."""
    return page.eval_on_selector_all(".token", f"all => all.map(token => {what})")


def colours(page):
    return each(page, "getComputedStyle(token).backgroundColor")


def is_transparent(colour):
    return colour == "rgba(0, 0, 0, 0)" or colour.endswith("/ 0)")


def test_the_switch_recolours(opened):
    page, pieces = opened(make(block_size=64), TEXT, prompt=4)
    assert page.text_content(".text") == TEXT
    assert page.text_content(".prompt") == "def "
    by_steps = colours(page)
    shades = {}
    for piece, colour in zip(pieces, by_steps, strict=True):
        shades.setdefault(piece.steps, set()).add(colour)
    assert all(len(shade) == 1 for k, shade in shades.items() if k), "one colour for each number of steps"
    assert len(set.union(*(shades[k] for k in (1, 2, 3)))) == 3 and all(map(is_transparent, shades[0]))
    page.check("[value=surprise]", force=True)
    surprise = [-torch.log2(torch.tensor(piece.views[-1].prob)).item() for piece in pieces[1:]]
    by_surprise = colours(page)[1:]
    assert by_surprise != by_steps[1:] and "−log₂" in page.inner_text("#meaning")
    strength = [float(t) for t in each(page, "token.style.getPropertyValue('--t')")[1:]]
    assert strength == pytest.approx([min(1, bits / 8) for bits in surprise], abs=2e-3)
    page.check("[value=gain]", force=True)
    less = each(page, "token.classList.contains('less')")[1:]
    for piece, minus in zip(pieces[1:], less):
        gain = piece.views[-1].prob / piece.views[0].prob
        assert minus == (gain < 1) or abs(gain - 1) < 1e-3
    assert colours(page)[1:] != by_surprise


def percent(x):
    return float(x.removesuffix(" %")) / 100


def test_a_click_opens_the_lens_with_the_numbers_of_the_model(opened):
    """… taken from plain forwards here, with the dial turned down."""
    model = make(block_size=64)
    page, pieces = opened(model, TEXT, prompt=4)
    longest = next(i for i, piece in enumerate(pieces) if i >= 4 and piece.steps == 3)
    idx = torch.tensor([list(TEXT.encode())])
    page.click(f".token >> nth={longest}")
    cards = page.query_selector_all("#lens .step")
    assert len(cards) == 4
    reach, expected = [1.0], 0.0
    for k in range(1, 4):
        model.max_latent = k
        upto = model(idx).expected_steps[0, longest - 1].item()
        reach.append(upto - expected)
        expected = upto
    for k, card in enumerate(cards):
        assert card.query_selector("h3").inner_text() == f"after {k} step{'s' * (k != 1)}"
        shown = re.findall(r"[\d.]+", card.query_selector("small").inner_text())
        exits = reach[k] - (*reach, 0)[k + 1]
        assert [float(x) for x in shown] == pytest.approx([reach[k], exits], abs=0.006)
        model.max_latent = k
        share = model(idx).logits[0, longest - 1].softmax(0)
        lines = [line.query_selector_all("span") for line in card.query_selector_all(".guess")]
        probs = [percent(prob.inner_text()) for _, prob in lines]
        assert probs[:5] == pytest.approx(share.topk(5).values.tolist(), abs=0.0051)
        said = card.query_selector(".guess.said span:last-child").inner_text()
        assert percent(said) == pytest.approx(share[idx[0, longest]].item(), abs=0.0051)
    assert page.inner_text("#lens h2").startswith("It said") and page.url.endswith(f"#{longest}")


def test_the_keyboard_goes_along_the_text(opened):
    page, pieces = opened(make(block_size=64), TEXT)
    page.keyboard.press("Tab")
    page.focus(".token >> nth=0")
    page.keyboard.press("Enter")
    assert "first token" in page.inner_text("#lens")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.dataset.i") == "2" and page.locator(".chosen").count() == 1
    assert page.locator("#lens .step").count() == pieces[2].steps + 1
    page.keyboard.press("Escape")
    assert page.locator("#lens .step").count() == 0 and page.locator(".chosen").count() == 0


@pytest.mark.parametrize("width,scheme", [
    (1280, "light"), (1280, "dark"), (390, "light"), (390, "dark"), (320, "light")])
def test_it_fits_a_screen_light_and_dark(width, scheme, opened):
    """Nothing sticks out, and the lens hides neither itself nor the token that it is about."""
    most = 0 if width == 320 else 3  # a model without thoughts has the widest bars
    page, _ = opened(make(block_size=512, max_latent=most), TEXT * 9, None, width, scheme, "#400")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    lens, token = (page.locator(name).bounding_box() for name in ("#lens", ".chosen"))
    assert lens["x"] >= 0 and lens["x"] + lens["width"] <= width + 1 and lens["y"] + lens["height"] <= 845
    assert 0 <= token["y"] and token["y"] + token["height"] <= 844
    assert token["x"] + token["width"] <= lens["x"] or token["y"] + token["height"] <= lens["y"], "hidden"
    red = int(re.search(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0])
    assert red < 60 if scheme == "dark" else red > 200


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_page(method, opened):
    model = make(method)
    page, pieces = opened(model, TEXT)
    last = max(range(1, len(pieces)), key=lambda i: pieces[i].steps)
    page.click(f".token >> nth={last}")
    assert page.locator("#lens .step").count() == pieces[last].steps + 1
    assert "latent step" in page.inner_text(".lead")
    assert ("reach" in page.inner_text("#lens")) == (method == "adaptive")


def test_tokens_that_are_parts_of_characters_and_foreign_ones(opened, tmp_path):
    page, pieces = opened(make(), "né思 x")
    assert page.text_content(".text") == "né思 x" and page.locator(".token").count() == len(pieces) == 8
    assert page.locator(".token.part").count() == 3


def test_a_long_text_stays_small():
    """2,000 tokens, with a vocabulary of words: under 2 MB, and safe to stand in a script."""
    ranks = {bytes([i]): i for i in range(256)} | {b" w%d" % i: 256 + i for i in range(743)}
    ranks[b"</script>"] = 999
    words_of = make_tokenizer("words", r"\S+|\s+", ranks)
    model = make(vocab_size=1001, block_size=256)
    ids = [*torch.randint(0, 1001, (1999,), generator=torch.Generator().manual_seed(0)).tolist(), 999]
    page = html_page("note", model, words_of, [explain(model, words_of, ids)])
    assert len(page.encode()) < 2e6 and page.count("</script>") == 2
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert sum(len(word) for word in data["texts"][0]["text"]) == 2000
