"""What sample.py shows: whole characters, the thinking of each token where it belongs, a page that stands alone."""

import html
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor

from baselines import build
from model import Config
from prepare import get_tokenizer
from sample import Piece, explain, html_page, whole_characters
from train import save_checkpoint

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = build(Config(n_layer=2, n_head=2, n_embd=16, n_ff=24, block_size=32, router_bias=0.5, tau=0.3))
    torch.nn.init.normal_(model.router.weight, std=0.5)
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(folder / "ckpt.pt", model, get_tokenizer("bytes"))
    return folder


@pytest.fixture
def shown(call):
    return partial(call, "sample")


def test_characters_wait_until_they_are_whole():
    pieces = [Piece(bytes([b]), i, 0.0, 1.0) for i, b in enumerate("aé思".encode())]
    got = list(whole_characters(iter(pieces + [Piece("é".encode()[:1], 6, 0.0, 1.0)])))
    assert [text for text, _ in got] == ["a", "é", "思", "\ufffd"]
    assert [[p.steps for p in group] for _, group in got] == [[0], [1, 2], [3, 4, 5], [6]]


def test_generated_tokens_are_explained_as_a_prefill_would(checkpoint):
    """The steps, reach and probability that generate reports are those of one parallel forward over the whole text."""
    from train import load_checkpoint
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
    page = html_page("T<1>", "note", [Piece(b"<b>", None, 0.0, 1.0), Piece(b"x", 2, 1.5, 0.25)])
    assert "&lt;b&gt;" in page and "<b>" not in page and "2 latent steps, expected 1.50, probability 0.2500" in page
    assert "http" not in page and page.count("<pre>") == 1


def test_sample_prints_the_prompt_goes_on_and_repeats_itself(checkpoint, shown, tmp_path):
    out, err = shown(checkpoint, "def ", "--max_new_tokens=30", f"--html={tmp_path}/page.html")
    again, _ = shown(checkpoint, "def ", "--max_new_tokens=30")
    assert out == again and out.startswith("def ") and "latent steps per token" in err and "\x1b" not in out
    page = html.unescape(re.sub("<[^>]*>", "", (tmp_path / "page.html").read_text().split("<pre>")[1]))
    assert page.strip() == out.strip()
    other, _ = shown(checkpoint, "def ", "--max_new_tokens=30", "--seed=2")
    assert other != out


def test_prompts_from_a_file_and_from_standard_input(checkpoint, shown, tmp_path):
    (tmp_path / "prompt.txt").write_text("import ")
    out, _ = shown(checkpoint, f"--prompt_file={tmp_path}/prompt.txt", "--max_new_tokens=5")
    piped = subprocess.run([sys.executable, ROOT / "sample.py", checkpoint, "--max_new_tokens=5"], input="import ", capture_output=True, text=True)
    assert out.startswith("import ") and piped.stdout == out


def test_a_long_prompt_keeps_its_end_and_says_so(checkpoint, shown):
    out, err = shown(checkpoint, "x" * 40 + "END", "--max_new_tokens=3")
    assert "43" in err and "32" in err and out.startswith("x" * 29 + "END")


@pytest.mark.parametrize("arguments,words", [
    (["", "--max_new_tokens=3"], ["prompt", "no token"]),
    (["a", "--prompt_file=b"], ["--prompt_file"]),
    (["--prompt_file=missing.txt"], ["missing.txt"]),
    (["a", "--tau=2"], ["tau"]),
    (["a", "--temperature=-1"], ["temperature"]),
    (["a", "--method=loop"], ["adaptive", "loop"]),
    (["a", "--html=/no/such/folder/x.html"], ["--html"]),
])
def test_wrong_input(arguments, words, checkpoint, shown):
    _, err = shown(checkpoint, *arguments, code=2)
    assert all(word in err for word in words), err


def test_missing_checkpoint(shown):
    assert "does not exist" in shown("nowhere", "a", code=2)[1]


def test_compiling_without_a_compiler(checkpoint, shown, monkeypatch):
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    assert "C++ compiler" in shown(checkpoint, "a", "--compile", code=2)[1]
