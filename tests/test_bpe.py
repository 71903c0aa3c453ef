"""A vocabulary of one's own text: lossless, of the size that was asked for, and blind to validation text."""

import hashlib
import sys

import numpy as np
import pytest

from documents import validates
from prepare import Data, Prepare, prepare
from tokenizer import restore_tokenizer

pytest.importorskip("tokenizers")
SIGNS = "".join(map(chr, range(160, 256)))  # all bytes that a second byte of UTF-8 may be
TEXTS = [f"def function_{i}(argument):\n    return argument + {i}  # naïve — 思\n" * 4 for i in range(50)]
TEXTS += [SIGNS + str(i) for i in range(10)]


def write(folder, texts):
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    return folder


def data_of(folder, size=400, **settings):
    settings = dict(tokenizer=f"bpe:{size}", out=str(folder.parent), name=f"{folder.name}-{size}") | settings
    return Data(str(prepare(Prepare([str(folder)], val_fraction=0.3, **settings))), 1)


def test_it_is_lossless_shorter_and_as_large_as_wanted(tmp_path):
    folder = write(tmp_path / "texts", TEXTS)
    data = data_of(folder, 300)
    assert data.tokenizer.n_vocab == 300 and data.meta["tokenizer"]["name"] == "bpe"
    texts = []
    for tokens in data.tokens.values():
        texts += data.tokenizer.decode(tokens.tolist()).split("<|endoftext|>")[:-1]
    assert sorted(texts) == sorted(TEXTS)
    assert sum(len(tokens) for tokens in data.tokens.values()) < sum(len(t.encode()) for t in TEXTS) / 2
    tokens = [data.tokenizer.decode_single_token_bytes(token) for token in range(299)]
    assert tokens[:256] == [bytes([byte]) for byte in range(256)] and len(set(tokens)) == 299
    longest = max(tokens, key=len)
    assert len(longest) > 5 and data.tokenizer.encode_ordinary(longest.decode()) == [tokens.index(longest)]


def test_fewer_tokens_than_were_wanted_are_spoken_of(tmp_path, capsys):
    folder = write(tmp_path / "texts", TEXTS)
    assert data_of(folder, 300).tokenizer.n_vocab == 300 and "only" not in capsys.readouterr().err
    found = data_of(folder, 5000).tokenizer.n_vocab
    assert found < 5000 and f"bpe:5000 has only {found} tokens" in capsys.readouterr().err


def test_validation_text_of_ones_own_stays_unseen(tmp_path):
    """Also where it lies among the other text, or a copy of it does."""
    folder = write(tmp_path / "texts", [*TEXTS, "QUUX " * 90, "QUUX " * 90])
    data = data_of(folder, 5000, val=[str(folder / f"{len(TEXTS)}.txt".zfill(7))])
    tokens = [data.tokenizer.decode_single_token_bytes(i) for i in range(data.tokenizer.n_vocab)]
    assert b"QU" not in b" ".join(tokens) and b"function" in b" ".join(tokens)
    assert data.meta["val"]["documents"] == 1 and data.meta["train"]["documents"] == len(TEXTS)


def test_a_word_without_end_is_learnt_from_in_pieces(tmp_path):
    """A base64 text, or a gene: learning from it whole would take the square of its length."""
    folder = write(tmp_path / "texts", [*TEXTS, "ab" * 20_000])
    data = data_of(folder, 400)
    tokens = [data.tokenizer.decode_single_token_bytes(token) for token in range(399)]
    assert 16 < max(map(len, tokens)) <= 1000
    assert "ab" * 20_000 in data.tokenizer.decode(np.concatenate([*data.tokens.values()]).tolist())


def test_the_same_text_gives_the_same_ranks(tmp_path, capsys):
    folder = write(tmp_path / "texts", TEXTS)
    data_of(folder)
    data_of(folder)
    assert "prepared before" in capsys.readouterr().out


def test_validation_text_is_not_learnt(tmp_path):
    """The same training text beside other validation text gives the same ranks."""
    ours, others = [], []
    for text in TEXTS:
        validation = validates(hashlib.sha256(text.encode()).digest(), 0.3)
        ours.append(text)
        if not validation:
            others.append(text)
    unseen = [text for text in (f"zebra {i} quagga " * 30 for i in range(99))
              if validates(hashlib.sha256(text.encode()).digest(), 0.3)]
    assert unseen and len(others) < len(ours)
    first = data_of(write(tmp_path / "ours", ours)).meta["tokenizer"]
    assert data_of(write(tmp_path / "others", others + unseen)).meta["tokenizer"] == first


@pytest.mark.parametrize("suffix,held_out", [("a", False), ("c", True)])
def test_the_end_of_a_single_document_is_not_learnt(suffix, held_out, tmp_path):
    """On whichever side the document falls: the end of the text becomes validation text."""
    words = "".join(TEXTS[:50]) + suffix
    assert validates(hashlib.sha256(words.encode()).digest(), 0.3) == held_out
    first = data_of(write(tmp_path / "one", [words]))
    cut = len(first.tokenizer.decode(first.tokens["train"].tolist()))
    assert first.tokenizer.n_vocab > 300 and 0.6 < cut / len(words) < 0.8
    other = words[:cut] + "zebra quagga " * ((len(words) - cut) // 13)
    other += "." * (len(words) - len(other))
    assert data_of(write(tmp_path / "two", [other])).meta["tokenizer"] == first.meta["tokenizer"]


def test_half_a_surrogate_is_no_reason_to_stop(tmp_path):
    path = tmp_path / "web.jsonl"
    path.write_text("".join(f'{{"text": "word{i % 7} cut off \\ud83d {i}"}}\n' for i in range(60)))
    data = Data(str(prepare(Prepare([str(path)], tokenizer="bpe:300", out=str(tmp_path)))), 1)
    assert data.tokenizer.n_vocab == 300


def test_it_is_restored_from_what_is_stored(tmp_path):
    data = data_of(write(tmp_path / "texts", TEXTS))
    again = restore_tokenizer(data.meta["tokenizer"], (data.folder / "ranks.tiktoken").read_bytes())
    assert again.encode_ordinary(TEXTS[0]) == data.tokenizer.encode_ordinary(TEXTS[0])


@pytest.mark.parametrize("size", ["", "257", "1e3", "-5", "70000", "many"])
def test_a_size_that_cannot_be_is_refused(size, tmp_path, call):
    folder = write(tmp_path / "texts", TEXTS[:2])
    _, err = call("prepare", "--input", folder, f"--tokenizer=bpe:{size}", f"--out={tmp_path}/out", code=2)
    assert "bpe:1024" in err and not (tmp_path / "out").exists()


def test_a_missing_package_is_named(tmp_path, call, monkeypatch):
    folder = write(tmp_path / "texts", TEXTS[:2])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    _, err = call("prepare", "--input", folder, "--tokenizer=bpe:300", f"--out={tmp_path}/out", code=2)
    assert "pip install tokenizers" in err and not (tmp_path / "out").exists()
