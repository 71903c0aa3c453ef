"""What sample.py shows: whole characters, the thinking of each token where it belongs, a page of its own."""

import json
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
from conftest import unread
from log import broken_compiler
from model import Config
from sample import Sample, read_prompt
from tokenizer import get_tokenizer, make_tokenizer

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


def text_of(page):
    """The texts of a page, from the data in it."""
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    texts = [text["prompt"] + text["text"] for text in data["texts"]]
    return ["".join(token[0] for word in words for token in word) for words in texts]


def test_sample_prints_the_prompt_goes_on_and_repeats_itself(checkpoint, shown, tmp_path):
    out, err = shown(checkpoint, "def ", "--max_new_tokens=30", f"--html={tmp_path}/page.html")
    again, _ = shown(checkpoint, "def ", "--max_new_tokens=30")
    assert out == again and out.startswith("def ") and "latent steps per token" in err and "\x1b[" not in out
    assert text_of((tmp_path / "page.html").read_text(encoding="utf-8")) == [out]
    other, _ = shown(checkpoint, "def ", "--max_new_tokens=30", "--seed=2")
    assert other != out


def test_the_page_is_whole_though_nobody_reads_what_is_printed(checkpoint, shown, tmp_path):
    words = ["def ", "--max_new_tokens=30", "--num_samples=2", "--seed=5", "--device=cpu"]
    shown(checkpoint, *words, f"--html={tmp_path}/read.html")
    command = [sys.executable, ROOT / "sample.py", checkpoint, *words, f"--html={tmp_path}/page.html"]
    done = unread(command)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    pages = [text_of((tmp_path / name).read_text(encoding="utf-8")) for name in ("read.html", "page.html")]
    assert pages[0] == pages[1]


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


def test_none_is_a_prompt_like_others(checkpoint, shown):
    for words in (["None"], ["--prompt=none"]):
        said = shown(checkpoint, *words, "--max_new_tokens=1", "--plain")[0]
        assert said.lower().startswith("none")


def test_prompts_from_a_file_and_from_standard_input(checkpoint, shown, tmp_path):
    (tmp_path / "prompt.txt").write_text("import ")
    out, _ = shown(checkpoint, f"--prompt_file={tmp_path}/prompt.txt", "--max_new_tokens=5")
    script = [sys.executable, ROOT / "sample.py", checkpoint, "--max_new_tokens=5"]
    piped = subprocess.run(script, input="import ", capture_output=True, text=True)
    assert out.startswith("import ") and piped.stdout == out and "waits" not in piped.stderr


def test_a_prompt_keeps_its_ends_of_lines_wherever_it_comes_from(tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\n")
    monkeypatch.setattr(sys, "stdin", open(tmp_path / "prompt.txt"))
    for settings in (Sample(prompt_file=f"{tmp_path}/prompt.txt"), Sample()):
        assert read_prompt(settings) == "a\r\nb\n"


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
    (["a", "--temperature=0", "--top_k=3"], ["top_k is not read", "--temperature above 0"]),
    (["a", "--temperature=0", "--top_p=0.95"], ["top_p is not read", "--temperature above 0"]),
    (["a", "--temperature=0", "--seed=3"], ["seed is not read"]),
    (["--a prompt"], ["a prompt", "--prompt="]),
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
    broken_compiler.cache_clear()
    assert "--compile=False" in shown(checkpoint, "a", "--compile", code=2)[1]
    broken_compiler.cache_clear()


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_said(checkpoint, shown, tmp_path):
    (tmp_path / "folder").mkdir()
    out, err = shown(checkpoint, "a", f"--html={tmp_path}/folder", code=2)
    assert out == "" and "--html" in err


def test_a_terminal_shows_colours_unless_told_not_to(checkpoint, shown, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    piped, _ = shown(checkpoint, "def ", "--max_new_tokens=20")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    out, err = shown(checkpoint, "def ", "--max_new_tokens=20")
    legend, text = out.split("\n\n", 1)
    assert "latent steps" in legend and "48;5;" in legend and "dim: the prompt" in legend
    assert "\x1b[38;5;16;48;5;" in text and "\x1b[2m" in text
    assert re.sub("\x1b[^m]*m", "", text).replace(" \n", "\n") == piped.replace(" \n", "\n")
    assert "\x1b[" in err and "\x1b" not in piped
    plain, err = shown(checkpoint, "def ", "--max_new_tokens=20", "--plain")
    monkeypatch.setenv("NO_COLOR", "1")
    unpainted, _ = shown(checkpoint, "def ", "--max_new_tokens=20")
    assert plain == unpainted == piped and "\x1b" not in err


def test_the_last_line_sums_the_steps_up(checkpoint, shown):
    model, _, _ = load_checkpoint(checkpoint)

    def steps_of(seed):
        said = model.generate([list(b"def ")], 40, 0.8, top_p=0.95, seed=seed, stop=BYTES.eot_token)
        return [int(g.steps) for g in said]

    seed = next(seed for seed in range(20) if len(steps_of(seed)) == 40)  # one whose text does not end before
    steps = steps_of(seed)
    _, err = shown(checkpoint, "def ", "--max_new_tokens=40", f"--seed={seed}")
    said = re.search(r"40 tokens, [\d.]+ tokens/s, ([\d.]+) latent steps per token (\d+);", err)
    assert float(said[1]) == pytest.approx(sum(steps) / 40, abs=0.006)
    assert said[2] == "".join(map(str, sorted(steps))), "a digit for each of 40 tokens"
