"""The invariants of the data: tokens decode to the documents, a split that order cannot change, all formats alike, nothing half written."""

import gzip
import json

import numpy as np
import pytest

import prepare
from prepare import END, Prepare, get_tokenizer, ranks_from_text, ranks_to_text, restore_tokenizer

DOCUMENTS = [f"document {i}: naïve 思考 {'x' * (i % 7)}\n" for i in range(80)]


def read(folder):
    """Every document of both splits, from the tokens alone."""
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = restore_tokenizer(meta["tokenizer"], (folder / "ranks.tiktoken").read_bytes())
    splits = {}
    for split in ("train", "val"):
        tokens = np.fromfile(folder / f"{split}.bin", meta["dtype"])
        assert len(tokens) == meta[split]["tokens"]
        splits[split] = tokenizer.decode(tokens.tolist()).split(END)[:-1]
        assert len(splits[split]) == meta[split]["documents"] and sum(len(d.encode()) for d in splits[split]) == meta[split]["bytes"]
    return splits, meta


@pytest.fixture
def refused(call):
    return lambda *arguments: call("prepare", *arguments, code=2)[1]


def write_jsonl(path, documents, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": d}) + "\n" for d in documents)
    return str(path)


def test_tokens_decode_to_the_documents_and_order_does_not_matter(tmp_path):
    a = prepare.prepare(Prepare([write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)], out=str(tmp_path), name="a", val_fraction=0.2))
    b = prepare.prepare(Prepare([write_jsonl(tmp_path / "b.jsonl", DOCUMENTS[::-1] + DOCUMENTS[:5])], out=str(tmp_path), name="b", val_fraction=0.2))
    (splits, meta), (other, meta_b) = read(a), read(b)
    assert splits["train"] and splits["val"] and sorted(splits["train"] + splits["val"]) == sorted(DOCUMENTS)
    assert all(sorted(splits[s]) == sorted(other[s]) for s in splits)
    assert meta["identical"] == 0 and meta_b["identical"] == 5


def test_all_formats_give_the_same_tokens(tmp_path):
    paths = [write_jsonl(tmp_path / "a.jsonl", DOCUMENTS), write_jsonl(tmp_path / "b.jsonl.gz", DOCUMENTS, gzip.open)]
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, document in enumerate(DOCUMENTS):
        (folder / f"{i:03}.txt").write_text(document)
    paths.append(str(folder))
    try:
        import zstandard
        paths.append(write_jsonl(tmp_path / "c.jsonl.zst", DOCUMENTS, zstandard.open))
    except ImportError:
        pass
    try:
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), tmp_path / "d.parquet")
        paths.append(str(tmp_path / "d.parquet"))
    except ImportError:
        pass
    results = [prepare.prepare(Prepare([path], out=str(tmp_path), name=f"out{i}", val_fraction=0.2)) for i, path in enumerate(paths)]
    for split in ("train.bin", "val.bin"):
        assert len({(folder / split).read_bytes() for folder in results}) == 1


def test_one_document_is_cut_into_both_splits(tmp_path):
    (tmp_path / "book.txt").write_text("word " * 1000)
    splits, meta = read_cut(prepare.prepare(Prepare([str(tmp_path / "book.txt")], out=str(tmp_path), val_fraction=0.1)))
    assert splits["train"] + splits["val"] == "word " * 1000 + END and 450 < meta["val"]["tokens"] < 550
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == 5000


def read_cut(folder):
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = restore_tokenizer(meta["tokenizer"], (folder / "ranks.tiktoken").read_bytes())
    return {s: tokenizer.decode(np.fromfile(folder / f"{s}.bin", meta["dtype"]).tolist()) for s in ("train", "val")}, meta


def test_a_file_of_ranks_is_a_tokenizer(tmp_path):
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" the": 258, b" t": 259}
    text = "".join(f"{__import__('base64').b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()).encode()
    (tmp_path / "my.tiktoken").write_bytes(text)
    tokenizer = get_tokenizer(str(tmp_path / "my.tiktoken"))
    assert tokenizer.n_vocab == 261 and ranks_to_text(tokenizer) == text and ranks_from_text(text) == ranks
    assert tokenizer.encode_ordinary("the") == [257] and tokenizer.decode(tokenizer.encode_ordinary("naïve the 思")) == "naïve the 思"


def test_the_byte_tokenizer_is_utf_8():
    tokenizer = get_tokenizer("bytes")
    text = "def f(x):\n\treturn 'ü思'  # \0"
    assert tokenizer.encode_ordinary(text) == list(text.encode()) and tokenizer.n_vocab == 257


def test_what_is_not_text_is_skipped_and_counted(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(DOCUMENTS[i])
    (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (folder / "binary.md").write_bytes(b"\0\1\2")
    (folder / "empty.txt").write_text(" \n")
    (folder / "image.png").write_bytes(b"\x89PNG")
    splits, meta = read(prepare.prepare(Prepare([str(folder)], out=str(tmp_path / "data"), val_fraction=0.3)))
    assert meta["skipped"] == 3 and len(splits["train"] + splits["val"]) == 30


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    monkeypatch.setattr(prepare, "ranks_to_text", lambda tokenizer: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(Prepare([path], out=str(tmp_path / "data")))
    assert not list((tmp_path / "data").iterdir())


def test_preparing_again_is_harmless_and_never_overwrites(tmp_path, refused):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    folder = prepare.prepare(Prepare([path], out=str(tmp_path / "data")))
    before = (folder / "train.bin").stat().st_mtime_ns
    assert prepare.prepare(Prepare([path], out=str(tmp_path / "data"))) == folder
    assert "--name" in refused(f"--input={path}", f"--out={tmp_path}/data", "--val_fraction=0.5")
    assert (folder / "train.bin").stat().st_mtime_ns == before


@pytest.mark.parametrize("name,content,extra,words", [
    ("missing.txt", None, [], ["missing.txt", "does not exist"]),
    ("latin.txt", "naïve".encode("latin-1"), [], ["UTF-8"]),
    ("bad.jsonl", b'{"text": "x"}\nnot json\n', [], ["bad.jsonl", "line 2"]),
    ("key.jsonl", b'{"body": "x"}\n', [], ["line 1", "--key"]),
    ("cut.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000)[:40], [], ["cut.jsonl.gz"]),
    ("plain.jsonl.gz", b"no gzip", [], ["plain.jsonl.gz"]),
    ("a.txt", b"text", ["--tokenizer=gpt9"], ["gpt9", "gpt2"]),
    ("a.txt", b"text", ["--tokenizer=./no.tiktoken"], ["no.tiktoken"]),
    ("a.txt", b"text", ["--val_fraction=2"], ["val_fraction"]),
    ("a.txt", b"text", ["--tokenzer=bytes"], ["tokenzer", "tokenizer"]),
])
def test_wrong_input(name, content, extra, words, tmp_path, refused):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    line = refused("--input", tmp_path / name, f"--out={tmp_path}/data", *extra)
    assert all(word in line for word in words), line
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_a_file_that_is_not_ranks(tmp_path, refused):
    (tmp_path / "a.txt").write_text("text")
    for content in (b"", b"hello world\n", b"aGk= 7\n"):
        (tmp_path / "bad.tiktoken").write_bytes(content)
        assert "ranks" in refused("--input", tmp_path / "a.txt", f"--tokenizer={tmp_path}/bad.tiktoken", f"--out={tmp_path}/data")
