"""What sample.py shows: whole characters, the thinking of each token where it belongs, a page of its own."""

import html
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor

from baselines import build
from common import load_checkpoint, save_checkpoint
from model import Config
from tokenizer import get_tokenizer, make_tokenizer
from sample import Piece, explain, html_page, whole_characters

ROOT = Path(__file__).parent.parent
BYTES = get_tokenizer("bytes")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = build(Config(n_layer=2, n_head=2, n_embd=16, n_ff=24, block_size=32, router_bias=0.5, tau=0.3))
    torch.nn.init.normal_(model.router.weight, std=0.5)
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(folder / "ckpt.pt", model, BYTES)
    return folder


@pytest.fixture
def shown(call):
    return partial(call, "sample")


def test_characters_wait_until_they_are_whole():
    pieces = [Piece(bytes([b]), i, 0.0, 1.0) for i, b in enumerate("aé思".encode())]
    got = list(whole_characters(iter(pieces + [Piece("é".encode()[:1], 6, 0.0, 1.0)])))
    assert [text for text, _ in got] == ["a", "é", "思", "\ufffd"]
    assert [[p.steps for p in group] for _, group in got] == [[0], [1, 2], [3, 4, 5], [6]]


def test_no_byte_of_a_text_is_lost():
    """… wherever tokens cut it: what is shown is the whole text's own decoding."""
    texts = ["a–b — “thé”\n思考".encode(), b"\xe2 \xff\xc3\xc3\xa9 \xf0\x9f", b"\x80\xe2\x80"]
    for text in texts:
        for size in (1, 2, 3, 5, 100):
            pieces = [Piece(text[i : i + size], i, 0.0, 1.0) for i in range(0, len(text), size)]
            groups = list(whole_characters(pieces))
            assert "".join(part for part, _ in groups) == text.decode("utf-8", "replace")
            assert [piece for _, group in groups for piece in group] == pieces


def test_generated_tokens_are_explained_as_a_prefill_would(checkpoint):
    """The steps, reach and probability that generate reports are those of one forward over the whole text."""
    model, tokenizer, _ = load_checkpoint(checkpoint)
    ids, new = list(b"def "), []
    for g in model.generate([ids], 20, seed=3):
        new.append((g.token.item(), g.steps.item(), g.expected_steps.item(), g.prob.item()))
    pieces = explain(model, tokenizer, ids + [token for token, *_ in new])
    for piece, (token, steps, reach, prob) in zip(pieces[4:], new):
        assert piece.text == bytes([token]) and piece.steps == steps
        assert piece.reach == pytest.approx(reach, abs=1e-5) and piece.prob == pytest.approx(prob, abs=1e-5)
    assert len({steps for _, steps, *_ in new}) > 1 and pieces[0].steps is None


def test_page():
    page = html_page("T<1>", "no $te", [[Piece(b"<b>", None, 0.0, 1.0), Piece(b"x", 2, 1.5, 0.25)]])
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert "2 latent steps, expected 1.50, probability 0.2500" in page and "start of the text" in page
    assert "http" not in page and page.count("<pre>") == 1 and "no $te" in page and "T&lt;1&gt;" in page
    assert "&nbsp;2&nbsp;" in page and "&nbsp;3&nbsp;" not in page, "the legend goes as far as the text does"


def text_of(page):
    """The texts of a page, without its tags."""
    return [html.unescape(re.sub("<[^>]*>", "", part.split("</pre>")[0])) for part in page.split("<pre>")[1:]]


def test_sample_prints_the_prompt_goes_on_and_repeats_itself(checkpoint, shown, tmp_path):
    out, err = shown(checkpoint, "def ", "--max_new_tokens=30", f"--html={tmp_path}/page.html")
    again, _ = shown(checkpoint, "def ", "--max_new_tokens=30")
    assert out == again and out.startswith("def ") and "latent steps per token" in err and "\x1b[" not in out
    assert text_of((tmp_path / "page.html").read_text(encoding="utf-8")) == [out]
    other, _ = shown(checkpoint, "def ", "--max_new_tokens=30", "--seed=2")
    assert other != out


def test_several_texts_are_each_as_if_alone(checkpoint, shown, tmp_path):
    """… past the end of the context too, whatever their neighbours say."""
    settings = ("def ", "--max_new_tokens=70", "--temperature=0.7", "--top_p=0.9")
    more = ["--num_samples=3", "--seed=5", f"--html={tmp_path}/page.html"]
    out, err = shown(checkpoint, *settings, *more)
    alone, counts = [], []
    for seed in (5, 6, 7):
        text, said = shown(checkpoint, *settings, f"--seed={seed}")
        alone.append(text)
        counts.append(int(re.search(r"(\d+) tokens", said)[1]))
    assert max(counts) == 70 and len(set(alone)) == 3
    assert re.split(r"(?:\n\n)?--- text \d of 3 ---\n", out)[1:] == alone
    assert text_of((tmp_path / "page.html").read_bytes().decode()) == alone
    assert f"{sum(counts)} tokens" in err


@pytest.fixture(scope="module")
def ender(tmp_path_factory):
    """A run whose model says all tokens with nearly the same probability, <|endoftext|> among them."""
    torch.manual_seed(0)
    model = build(Config(n_layer=1, n_head=2, n_embd=16, n_ff=24, block_size=32, method="vanilla"))
    folder = tmp_path_factory.mktemp("ender")
    save_checkpoint(folder / "ckpt.pt", model, BYTES)
    return folder


def test_a_text_that_ends_by_itself_is_said_to(ender, shown):
    """<|endoftext|> ends a text, is not shown, and the end is not taken for --max_new_tokens'."""
    out, err = shown(ender, "a", "--num_samples=40", "--max_new_tokens=60", "--top_p=None", "--temperature=1")
    texts = re.split(r"(?:\n\n)?--- text \d+ of 40 ---\n", out)[1:]
    model, _, _ = load_checkpoint(ender)
    ended = 0
    for seed, text in enumerate(texts, 1337):
        tokens = [g.token.item() for g in model.generate([[97]], 60, seed=seed, stop=BYTES.eot_token)]
        ended += tokens[-1] == BYTES.eot_token
        said = bytes(token for token in tokens if token != BYTES.eot_token)
        assert text == "a" + said.decode("utf-8", "replace")
    assert 0 < ended < 40 and f"ended by themselves: {ended} of 40 texts" in err
    assert "<|endoftext|>" not in out


@pytest.mark.parametrize("words", [[""], ["--prompt="], ["--prompt_file={empty}"], []])
def test_an_empty_prompt_begins_after_the_end_of_a_text(words, checkpoint, shown, tmp_path, monkeypatch):
    (tmp_path / "empty").write_text("")
    with open(tmp_path / "empty") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        words = [word.format(empty=tmp_path / "empty") for word in words]
        settings = ["--max_new_tokens=9", "--temperature=0", f"--html={tmp_path}/page.html"]
        out, err = shown(checkpoint, *words, *settings)
    model, _, _ = load_checkpoint(checkpoint)
    tokens = [g.token.item() for g in model.generate([[BYTES.eot_token]], 9, temperature=0)]
    assert out == bytes(tokens).decode("utf-8", "replace") and "empty" in err
    assert text_of((tmp_path / "page.html").read_text(encoding="utf-8")) == [out]


def test_top_k_0_is_off(checkpoint, shown):
    off = [shown(checkpoint, "a", "--max_new_tokens=20", f"--top_k={k}")[0] for k in ("0", "None", "257")]
    one = shown(checkpoint, "a", "--max_new_tokens=20", "--top_k=1")[0]
    assert off[0] == off[1] == off[2] != one


def test_prompts_from_a_file_and_from_standard_input(checkpoint, shown, tmp_path):
    (tmp_path / "prompt.txt").write_text("import ")
    out, _ = shown(checkpoint, f"--prompt_file={tmp_path}/prompt.txt", "--max_new_tokens=5")
    script = [sys.executable, ROOT / "sample.py", checkpoint, "--max_new_tokens=5"]
    piped = subprocess.run(script, input="import ", capture_output=True, text=True)
    assert out.startswith("import ") and piped.stdout == out and "waits" not in piped.stderr


def test_it_says_what_it_waits_for(checkpoint):
    """An open standard input that sends nothing: a line on stderr, and the text once it is closed."""
    script = [sys.executable, ROOT / "sample.py", checkpoint, "--max_new_tokens=5"]
    pipe = subprocess.PIPE
    with subprocess.Popen(script, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        too_long = threading.Timer(60, process.kill)
        too_long.start()
        assert "standard input" in process.stderr.readline()
        out, _ = process.communicate("import ")
        too_long.cancel()
    assert process.returncode == 0 and out.startswith("import ")


def test_a_long_prompt_keeps_its_end_and_says_so(checkpoint, shown):
    out, err = shown(checkpoint, "x" * 40 + "END", "--max_new_tokens=3")
    assert "43" in err and "32" in err and out.startswith("x" * 29 + "END")


def test_a_prompt_on_which_the_tokenizer_gives_up_is_one_line(shown, tmp_path, checkpoint):
    """tiktoken's patterns panic on a million equal blanks; encoded in pieces they do not."""
    model, _, _ = load_checkpoint(checkpoint)
    gpt2 = make_tokenizer("gpt2", r"\s+(?!\S)|\s|\S+", {bytes([i]): i for i in range(256)})
    save_checkpoint(tmp_path / "ckpt.pt", model, gpt2)
    (tmp_path / "prompt.txt").write_text(" " * 1_200_000)
    out, err = shown(tmp_path, f"--prompt_file={tmp_path}/prompt.txt", "--max_new_tokens=2")
    assert "1,200,000 tokens" in err and out.startswith(" " * 32)


@pytest.mark.parametrize("arguments,words", [
    (["a", "--prompt_file=b"], ["--prompt_file"]),
    (["--prompt_file=missing.txt"], ["missing.txt"]),
    (["a", "--tau=2"], ["tau"]),
    (["a", "--temperature=-1"], ["temperature"]),
    (["a", "--temperature=1e-300"], ["temperature"]),
    (["a", "--top_p=0"], ["top_p"]),
    (["a", "--num_samples=0"], ["num_samples"]),
    (["a", "--seed=-1"], ["seed"]),
    (["a", "--method=loop"], ["adaptive", "loop"]),
    (["a", "--html=/no/such/folder/x.html"], ["--html"]),
])
def test_wrong_input(arguments, words, checkpoint, shown):
    _, err = shown(checkpoint, *arguments, code=2)
    assert all(word in err for word in words), err


def test_missing_checkpoint(shown):
    assert "does not exist" in shown("nowhere", "a", code=2)[1]


def test_a_model_whose_predictions_are_not_finite_is_one_line(checkpoint, shown, tmp_path):
    model, _, _ = load_checkpoint(checkpoint)
    with torch.no_grad():
        model.head.weight *= 1e38  # finite weights, infinite logits
        model.norm.weight *= 1e4
    save_checkpoint(tmp_path / "ckpt.pt", model, BYTES)
    for prompt in ("a", "abc"):
        assert "not finite" in shown(tmp_path, prompt, code=2)[1]


def test_compiling_without_a_compiler(checkpoint, shown, monkeypatch):
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    assert "--compile=False" in shown(checkpoint, "a", "--compile", code=2)[1]


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_said(checkpoint, shown, tmp_path):
    (tmp_path / "folder").mkdir()
    out, err = shown(checkpoint, "a", f"--html={tmp_path}/folder", code=2)
    assert out == "" and "--html" in err


def test_a_terminal_shows_colours_unless_told_not_to(checkpoint, shown, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    out, _ = shown(checkpoint, "def ", "--max_new_tokens=20")
    plain, _ = shown(checkpoint, "def ", "--max_new_tokens=20", "--plain")
    assert "\x1b[38;5;" in out and "\x1b" not in plain
    assert re.sub("\x1b[^m]*m", "", out).split("\n\n", 1)[1] == plain
