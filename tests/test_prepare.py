"""The invariants of the data: tokens decode to the documents, order changes no split, folders are whole."""

import base64
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
from common import BadInput
from documents import validates
from prepare import Data, Prepare
from tokenizer import END, get_tokenizer, make_tokenizer, ranks_from_text, ranks_to_text, restore_tokenizer

ROOT = Path(__file__).parent.parent
DOCUMENTS = [f"document {i}: naïve 思考 {'x' * (i % 7)}\n" for i in range(80)]
BYTES = {bytes([i]): i for i in range(256)}
CUT = gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0)[:40]  # mtime: a test has one name at all times


def read(folder):
    """Every document of both splits, from the tokens alone."""
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = restore_tokenizer(meta["tokenizer"], (folder / "ranks.tiktoken").read_bytes())
    splits = {}
    for split in ("train", "val"):
        tokens = np.fromfile(folder / f"{split}.bin", meta["dtype"])
        assert len(tokens) == meta[split]["tokens"]
        splits[split] = tokenizer.decode(tokens.tolist()).split(END)[:-1]
        assert len(splits[split]) == meta[split]["documents"]
        assert sum(len(document.encode()) for document in splits[split]) == meta[split]["bytes"]
    return splits, meta


def read_cut(folder):
    """The text of both splits, where one document was cut into the two."""
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = restore_tokenizer(meta["tokenizer"], (folder / "ranks.tiktoken").read_bytes())
    tokens = [np.fromfile(folder / f"{split}.bin", meta["dtype"]) for split in ("train", "val")]
    return [tokenizer.decode(part.tolist()) for part in tokens], meta


def made(path, out, **settings):
    """The folder that prepare.py makes of one input."""
    return prepare.prepare(Prepare([str(path)], out=str(out), **settings))


def test_validation_text_of_ones_own(tmp_path, capsys):
    """All of it, and nothing else: what stands in both is validation text."""
    for name in ("train", "held"):
        (tmp_path / name).mkdir()
    for i, document in enumerate(DOCUMENTS[:12]):
        (tmp_path / ("held" if i < 5 else "train") / f"{i}.txt").write_text(document)
    (tmp_path / "train" / "again.txt").write_text(DOCUMENTS[0])
    own = {"val": [str(tmp_path / "held")]}
    splits, meta = read(made(tmp_path / "train", tmp_path / "data", **own))
    assert sorted(splits["val"]) == sorted(DOCUMENTS[:5])
    assert sorted(splits["train"]) == sorted(DOCUMENTS[5:12])
    assert meta["identical"] == 1 and "more than half" not in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(BadInput, match="--val=.*empty.txt leaves training or validation no document"):
        made(tmp_path / "train", tmp_path / "data", val=[str(tmp_path / "empty.txt")], name="none")
    with pytest.raises(BadInput, match="--task makes its own text"):
        prepare.prepare(Prepare(task="hops", out=str(tmp_path), **own))


@pytest.fixture
def refused(call):
    return lambda *arguments: call("prepare", *arguments, code=2)[1]


def write_jsonl(path, documents, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": d}) + "\n" for d in documents)
    return str(path)


# -------------------------------------------------------------------------------------------------- documents


def test_tokens_decode_to_the_documents_and_order_does_not_matter(tmp_path):
    forth = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    back = write_jsonl(tmp_path / "b.jsonl", DOCUMENTS[::-1] + DOCUMENTS[:5])
    a = prepare.prepare(Prepare([forth], out=str(tmp_path), name="a", val_fraction=0.2))
    b = prepare.prepare(Prepare([back], out=str(tmp_path), name="b", val_fraction=0.2))
    (splits, meta), (other, meta_b) = read(a), read(b)
    assert splits["train"] and splits["val"] and sorted(splits["train"] + splits["val"]) == sorted(DOCUMENTS)
    assert all(sorted(splits[s]) == sorted(other[s]) for s in splits)
    assert meta["identical"] == 0 and meta_b["identical"] == 5


def test_a_document_is_validation_text_by_its_own_hash(tmp_path):
    """As it always was: data that are prepared again split alike."""
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    splits, _ = read(made(path, tmp_path / "data", val_fraction=0.2))
    for document in DOCUMENTS:
        number = int.from_bytes(hashlib.sha256(document.encode()).digest()[16:20], "big")
        assert document in splits["val" if number < 0.2 * 2**32 else "train"]


def test_all_formats_give_the_same_tokens(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    inputs = [[write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)],
              [write_jsonl(tmp_path / "b.jsonl.gz", DOCUMENTS, gzip.open)],
              [write_jsonl(tmp_path / "c.jsonl.zst", DOCUMENTS, zstandard.open)],
              [str(tmp_path / "d.parquet")],
              [str(tmp_path / "texts")],
              [str(tmp_path / "e.txt"), "--separator=|\\n|"]]
    parquet.write_table(pyarrow.table({"text": DOCUMENTS}), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text("|\n|".join(DOCUMENTS))
    (tmp_path / "texts").mkdir()
    for i, document in enumerate(DOCUMENTS):
        (tmp_path / "texts" / f"{i:03}.txt").write_text(document)
    results = set()
    for i, (path, *flags) in enumerate(inputs):
        flags += ["--input", path, f"--out={tmp_path}", f"--name=out{i}", "--val_fraction=0.2"]
        data = Data(str(prepare.prepare(prepare.configure(Prepare, flags))), 16)
        results.add((data.tokens["train"].tobytes(), data.tokens["val"].tobytes(), data.fingerprint))
    assert len(results) == 1


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("batch", [1, 40, 10**6])
def test_a_document_larger_than_a_batch_is_written_as_a_small_one(where, batch, tmp_path, monkeypatch):
    """Also beside others, twice the same, and with an end that is no text: it then leaves no token behind."""
    big = "".join(f"line {i}\n" for i in range(3000))
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(16):
        (folder / f"{i}.txt").write_text(DOCUMENTS[i])
        (folder / f"{i}-big.txt").write_text(big[: 20_000 + i // 2 * 10])
        (folder / f"{i}-bad.txt").write_bytes((big + str(i)).encode() + b"\xff")
    plain = prepare.prepare(Prepare([str(folder)], out=str(tmp_path), name="plain", val_fraction=0.3))
    monkeypatch.setattr("documents.PIECE", 5000)
    monkeypatch.setattr(prepare, "BATCH", batch)
    if where == "disk":
        spool = tempfile.SpooledTemporaryFile
        monkeypatch.setattr(tempfile, "SpooledTemporaryFile", lambda size, dir: spool(100, dir=dir))
    cut = prepare.prepare(Prepare([str(folder)], out=str(tmp_path), name="cut", val_fraction=0.3))
    splits, meta = read(cut)
    assert meta["identical"] == 8 and meta["skipped"] == 16 and len(splits["train"] + splits["val"]) == 24
    assert min(len(max(splits[s], key=len)) for s in splits) > 20_000, "large documents on both sides"
    assert sorted(p.name for p in cut.iterdir()) == ["meta.json", "ranks.tiktoken", "train.bin", "val.bin"]
    for name in ("train.bin", "val.bin"):
        assert (plain / name).read_bytes() == (cut / name).read_bytes()
    assert Data(str(plain), 8).fingerprint == Data(str(cut), 8).fingerprint


def test_one_document_is_cut_into_both_splits(tmp_path):
    (tmp_path / "book.txt").write_text("word " * 1000)
    (train, val), meta = read_cut(made(tmp_path / "book.txt", tmp_path, val_fraction=0.1))
    assert train + val == "word " * 1000 + END and 450 < meta["val"]["tokens"] < 550
    assert meta["train"]["bytes"] == len(train) and meta["val"]["bytes"] == len(val) - len(END)


@pytest.mark.parametrize("side", ["train", "val"])
def test_a_few_documents_on_one_side_are_cut_too(side, tmp_path):
    fraction = 0.3 if side == "train" else 0.7
    chosen = []
    for document in DOCUMENTS:
        number = int.from_bytes(hashlib.sha256(document.encode()).digest()[16:20], "big")
        if (number < fraction * 2**32) == (side == "val"):
            chosen.append(document)
    path = write_jsonl(tmp_path / "a.jsonl", chosen[:4])
    (train, val), meta = read_cut(prepare.prepare(Prepare([path], out=str(tmp_path), val_fraction=fraction)))
    assert train + val == "".join(document + END for document in chosen[:4])
    assert meta["train"]["documents"] + meta["val"]["documents"] == 4
    tokens = meta["train"]["tokens"] + meta["val"]["tokens"]
    assert meta["val"]["tokens"] == pytest.approx(fraction * tokens, abs=1)


def test_a_document_that_makes_most_of_the_text_validation_text_is_spoken_of(tmp_path, capsys):
    texts = [f"{i} " * 900 for i in range(200)]
    large = next(text for text in texts if validates(hashlib.sha256(text.encode()).digest(), 0.05))
    for name, most in (("a", 1), ("b", 100)):  # of the others, as many letters in all as `most` texts have
        rest = [text[: len(text) // 20] for text in texts[: 20 * most]]
        path = write_jsonl(tmp_path / f"{name}.jsonl", [large, *rest])
        prepare.prepare(Prepare([path], out=str(tmp_path), name=name, val_fraction=0.05))
        assert ("more than half of the text" in capsys.readouterr().err) == (name == "a")


def test_what_is_not_text_is_skipped_counted_and_named(tmp_path, call):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(DOCUMENTS[i])
    (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (folder / "binary.md").write_bytes(b"\0\1\2")
    (folder / "empty.txt").write_text(" \n")
    (folder / "image.png").write_bytes(b"\x89PNG")
    (folder / "null.jsonl").write_text('{"text": null}\n{"text": "one more"}\n')
    out, err = call("prepare", "--input", folder, f"--out={tmp_path}/data", "--val_fraction=0.3")
    splits, meta = read(tmp_path / "data" / "mixed")
    assert meta["skipped"] == 4 and len(splits["train"] + splits["val"]) == 31 and "UTF-8: 4" in out
    named = [line for line in err.splitlines() if "skipped" in line]
    assert len(named) == 2 and all(name in err for name in ("latin.txt", "binary.md"))


def test_a_document_that_tiktoken_cannot_encode_is_named_and_skipped(tmp_path, monkeypatch, call):
    class PanicException(BaseException):
        pass

    def encode(self, texts, num_threads):
        if any("思考 xxxx\n" in text for text in texts):
            raise PanicException("StackOverflow")
        return original(self, texts, num_threads=num_threads)

    original = prepare.tiktoken.Encoding.encode_ordinary_batch
    monkeypatch.setattr(prepare.tiktoken.Encoding, "encode_ordinary_batch", encode)
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    _, err = call("prepare", "--input", path, f"--out={tmp_path}", "--val_fraction=0.3")
    splits, meta = read(tmp_path / "a")
    wanted = [document for document in DOCUMENTS if "思考 xxxx\n" not in document]
    assert sorted(splits["train"] + splits["val"]) == sorted(wanted)
    assert meta["skipped"] == 80 - len(wanted) > 0
    assert err.count("cannot encode") == 1 and "a.jsonl" in err
    monkeypatch.setattr(prepare.tiktoken.Encoding, "encode_ordinary_batch", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare.prepare(Prepare([path], out=str(tmp_path / "data")))


def test_a_separator_that_was_not_given_is_spoken_of(tmp_path, call):
    (tmp_path / "a.txt").write_text(END.join(DOCUMENTS))
    flags = ["--input", tmp_path / "a.txt", f"--out={tmp_path}"]
    _, err = call("prepare", *flags, "--name=one")
    assert len(err.splitlines()) == 1 and "a.txt" in err and "--separator" in err and END in err
    _, err = call("prepare", *flags, "--name=many", f"--separator={END}")
    splits, _ = read(tmp_path / "many")
    assert not err and sorted(splits["train"] + splits["val"]) == sorted(DOCUMENTS)
    _, err = call("prepare", *flags, "--name=none", r"--separator=\r\n")
    assert len(err.splitlines()) == 1 and r"was read as one document: no --separator=\r\n in it" in err
    (tmp_path / "latin.txt").write_bytes("café".encode("latin1"))
    words = ["--input", tmp_path / "a.txt", tmp_path / "latin.txt", f"--out={tmp_path}", f"--separator={END}"]
    _, err = call("prepare", *words, "--name=skips")
    assert len(err.splitlines()) == 1 and "latin.txt holds a document that is no UTF-8 text" in err
    path = write_jsonl(tmp_path / "b.jsonl", [END + "a", "b"])
    _, err = call("prepare", "--input", path, f"--out={tmp_path}")
    assert not err


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH", 2**18)
    peaks = []
    for lines in (100_000, 400_000):
        (tmp_path / f"{lines}.txt").write_bytes(b"some words on a line of text\n" * lines)
        tracemalloc.start()
        prepare.prepare(Prepare([str(tmp_path / f"{lines}.txt")], out=str(tmp_path), name=f"out{lines}"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] + 10e6, peaks


# ------------------------------------------------------------------------------------------------- tokenizers


def test_a_file_of_ranks_is_a_tokenizer(tmp_path):
    ranks = BYTES | {b"th": 256, b"the": 257, b" the": 258, b" t": 259}
    text = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()).encode()
    (tmp_path / "my.tiktoken").write_bytes(text)
    tokenizer = get_tokenizer(str(tmp_path / "my.tiktoken"))
    assert tokenizer.n_vocab == 261 and ranks_to_text(tokenizer) == text and ranks_from_text(text) == ranks
    assert tokenizer.encode_ordinary("the") == [257]
    assert tokenizer.decode(tokenizer.encode_ordinary("naïve the 思")) == "naïve the 思"
    (tmp_path / "a.txt").write_text("the naïve thing " * 100)
    config = Prepare([str(tmp_path / "a.txt")], str(tmp_path / "my.tiktoken"), out=str(tmp_path))
    folder = prepare.prepare(config)
    (train, val), meta = read_cut(folder)
    assert train + val == "the naïve thing " * 100 + END
    assert meta["val"]["bytes"] == len(val.encode()) - len(END)
    (tmp_path / "my.tiktoken").write_bytes(ranks_to_text(get_tokenizer("bytes")))
    with pytest.raises(BadInput, match="other settings"):
        prepare.prepare(config)


def test_many_tokens_take_four_bytes_each(tmp_path):
    words = ["".join(chr(97 + i // 26**k % 26) for k in range(4)) for i in range(66_000)]
    ranks = BYTES | {word.encode(): 256 + i for i, word in enumerate(words)}
    (tmp_path / "my.tiktoken").write_bytes(ranks_to_text(make_tokenizer("x", r"\S+", ranks)))
    (tmp_path / "a.txt").write_text(",".join(words[65_990:]))
    config = Prepare([str(tmp_path / "a.txt")], str(tmp_path / "my.tiktoken"), out=str(tmp_path))
    data = Data(str(prepare.prepare(config)), 1)
    assert data.tokens["train"].dtype == np.uint32 and data.tokens["train"][0] == 256 + 65_990
    assert data.batch(0, 0, 4, slice(0, 4))[0].dtype == torch.int64


@pytest.mark.parametrize("content", [b"", b"hello world\n", b"aGk= 7\n", b"a b c\n", b"\xff\n",
                                     ranks_to_text(get_tokenizer("bytes")).replace(b" 255", b" 100000000"),
                                     ranks_to_text(get_tokenizer("bytes"))[:-9]])
def test_a_file_that_is_not_ranks(content, tmp_path, refused):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "bad.tiktoken").write_bytes(content)
    flags = [f"--tokenizer={tmp_path}/bad.tiktoken", f"--out={tmp_path}/data"]
    line = refused("--input", tmp_path / "a.txt", *flags)
    assert "bad.tiktoken is not a file of ranks: " in line


# ---------------------------------------------------------------------------------------------------- folders


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    for error in (KeyboardInterrupt, SystemExit):
        monkeypatch.setattr(prepare, "ranks_to_text", lambda tokenizer: (_ for _ in ()).throw(error()))
        monkeypatch.setattr(prepare, "describe", lambda tokenizer: {})
        with pytest.raises(error):
            prepare.prepare(Prepare([path], out=str(tmp_path / "data")))
        assert not list((tmp_path / "data").iterdir())


def test_sigterm_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    code = """if True:
        import time, prepare
        def endless(*_):
            while True:
                time.sleep(0.01)
                yield prepare.Piece("text", True, 0)
        prepare.read_pieces = endless
        prepare.run(prepare.main)"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code, "--input=a.txt"], cwd=tmp_path, env=environment)
    while not list((tmp_path / "data").glob(".a-*/a/train.bin")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert not list((tmp_path / "data").iterdir())


def test_what_a_killed_run_left_is_named(tmp_path, capsys):
    """It may be as large as the text; whether another run is at work on it, only the user knows."""
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    (tmp_path / "data" / ".a-x1y2").mkdir(parents=True)
    prepare.prepare(Prepare([path], out=str(tmp_path / "data")))
    assert f"{tmp_path}/data/.a-x1y2 is of a run that is at work, or was killed" in capsys.readouterr().err
    assert (tmp_path / "data" / ".a-x1y2").exists()


@pytest.mark.parametrize("fails", ["write", "meta", "mkdir"])
def test_a_full_disk_is_one_line_and_leaves_nothing(fails, tmp_path, monkeypatch, refused):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if fails == "write":
        monkeypatch.setattr(prepare.shutil, "copyfileobj", full)
    elif fails == "meta":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr(Path, "mkdir", full)
    line = refused("--input", path, f"--out={tmp_path}/data")
    assert "data/a cannot be written: No space left" in line
    monkeypatch.undo()
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_an_output_that_is_no_folder(tmp_path, refused):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    assert "cannot be written: " in refused("--input", path, f"--out={path}")
    assert "cannot be written: " in refused("--input", path, f"--out={path}/x")


def test_preparing_again_is_harmless_and_never_overwrites(tmp_path, refused, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    folder = prepare.prepare(Prepare([path], out=str(tmp_path / "data")))
    before = {p: p.read_bytes() for p in folder.iterdir()}
    assert prepare.prepare(Prepare([path], out=str(tmp_path / "data"))) == folder
    assert "left as it is" in capsys.readouterr().out
    for flags in (["--val_fraction=0.5"], ["--key=body"]):
        line = refused(f"--input={path}", f"--out={tmp_path}/data", *flags)
        assert "other settings" in line and f"remove {folder}," in line and "--name" in line
    assert before == {p: p.read_bytes() for p in folder.iterdir()} and [*folder.parent.iterdir()] == [folder]


def test_input_that_has_changed_since_is_spoken_of(tmp_path, refused):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(9):
        (texts / f"{i}.txt").write_text(DOCUMENTS[i])
    folder = prepare.prepare(Prepare([str(texts)], out=str(tmp_path / "data")))
    again = [f"--input={texts}", f"--out={tmp_path}/data"]
    third = texts / "3.txt"
    for change, what in ((lambda: third.write_text("longer " * 9), "3.txt is not as it was"),
                         (lambda: os.utime(third, (1, 1)), "3.txt is not as it was"),
                         (lambda: third.unlink(), "3.txt is not read any more"),
                         (lambda: (texts / "new.md").write_text("new"), "new.md is new")):
        shutil.copytree(texts, tmp_path / "copy")
        shutil.rmtree(folder)
        prepare.prepare(Prepare([str(texts)], out=str(tmp_path / "data")))
        change()
        line = refused(*again)
        assert what in line and "has changed" in line and f"remove {folder}," in line
        shutil.rmtree(texts)
        os.rename(tmp_path / "copy", texts)


@pytest.mark.parametrize("change,words", [
    (lambda f: (f / "train.bin").unlink(), ["damaged", "train.bin"]),
    (lambda f: (f / "val.bin").write_bytes(b"x"), ["damaged", "val.bin"]),
    (lambda f: (f / "meta.json").unlink(), ["not a folder of"]),
    (lambda f: (f / "meta.json").write_text("[]"), ["not a folder of"])])
def test_a_folder_that_is_not_whole_is_not_left_as_it_is(change, words, tmp_path, refused):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    folder = prepare.prepare(Prepare([path], out=str(tmp_path / "data")))
    change(folder)
    line = refused(f"--input={path}", f"--out={tmp_path}/data")
    assert all(word in line for word in [*words, "--name"]), line
    assert ("remove" in line) == ("damaged" in words), "only what is ours is to be removed"


def test_a_folder_of_before_fingerprints_is_known(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    folder = prepare.prepare(Prepare([path], out=str(tmp_path)))
    meta = json.loads((folder / "meta.json").read_text())
    del meta["inputs"], meta["content"], meta["settings"]["separator"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert prepare.prepare(Prepare([path], out=str(tmp_path))) == folder and Data(str(folder), 8).fingerprint


def test_of_two_runs_at_once_the_second_finds_the_work_done(tmp_path, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    config = Prepare([path], out=str(tmp_path / "data"))
    original = prepare.write

    def slow(*arguments):
        monkeypatch.setattr(prepare, "write", original)
        prepare.prepare(config)  # the other run begins later and ends sooner
        return original(*arguments)

    monkeypatch.setattr(prepare, "write", slow)
    folder = prepare.prepare(config)
    assert "prepared before" in capsys.readouterr().out and [*folder.parent.iterdir()] == [folder]
    shutil.rmtree(folder)

    def other(*arguments):
        monkeypatch.setattr(prepare, "write", original)
        prepare.prepare(Prepare([path], out=str(tmp_path / "data"), val_fraction=0.5))
        return original(*arguments)

    monkeypatch.setattr(prepare, "write", other)
    with pytest.raises(BadInput, match="other settings"):
        prepare.prepare(config)
    assert [*folder.parent.iterdir()] == [folder]


@pytest.mark.parametrize("name", ["..", ".", "a/b", ".hidden", "/etc", "a/"])
def test_a_name_is_that_of_a_folder(name, tmp_path, refused):
    (tmp_path / "a.txt").write_text("text")
    line = refused(f"--input={tmp_path}/a.txt", f"--out={tmp_path}/data", f"--name={name}")
    assert f"--name={name}" in line and "remove" not in line and not (tmp_path / "data").exists()


def test_a_hidden_file_gives_its_name(tmp_path):
    (tmp_path / ".hidden.txt").write_text("text of a hidden file " * 9)
    assert made(tmp_path / ".hidden.txt", tmp_path / "data") == tmp_path / "data" / "hidden"


@pytest.mark.parametrize("name,content,extra,words", [
    ("missing.txt", None, [], ["missing.txt", "does not exist"]),
    ("latin.txt", "naïve".encode("latin-1"), [], ["latin.txt holds a document that is no UTF-8 text"]),
    ("zero.txt", b"a text and \0", [], ["zero.txt holds a document that is no UTF-8 text or has a zero"]),
    ("bad.jsonl", b'{"text": "x"}\nnot json\n', [], ["bad.jsonl", "line 2"]),
    ("wide.jsonl", ('{"text": "x"}\n' * 9).encode("utf-16"), [], ["wide.jsonl", "line 2: not JSON"]),
    ("key.jsonl", b'{"body": "x"}\n', [], ["line 1", "--key"]),
    ("cut.jsonl.gz", CUT, [], ["cut.jsonl.gz", "end-of-stream"]),
    ("plain.jsonl.gz", b"no gzip", [], ["plain.jsonl.gz", "Not a gzipped file"]),
    ("short.txt", b"ab", [], ["too little text"]),
    ("a.txt", b"text", ["--tokenizer=gpt9"], ["gpt9", "gpt2"]),
    ("a.txt", b"text", ["--tokenizer=./no.tiktoken"], ["no.tiktoken", "No such file"]),
    ("a.txt", b"text", ["--tokenizer="], ["--tokenizer", "empty"]),
    ("a.txt", b"text", ["--val_fraction=2"], ["val_fraction", "(0, 1)"]),
    ("a.txt", b"text", ["--val_fraction=nan"], ["val_fraction", "(0, 1)"]),
    ("a.txt", b"text", ["--key=body"], ["--key=body", "not read"]),
    ("a.jsonl", b'{"text": "x"}', ["--separator=|"], ["--separator=|", "not read"]),
    ("a.txt", b"text", ["--tokenzer=bytes"], ["tokenzer", "tokenizer"]),
    ("a.txt", b"text", ["--out="], ["--out", "empty"]),
    ("a.txt", b"text", ["--input="], ["--input", "empty"]),
    ("a.txt", b"text", ["--out", "--key=text"], ["--out", "value"]),
])
def test_wrong_input(name, content, extra, words, tmp_path, refused):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    line = refused("--input", tmp_path / name, f"--out={tmp_path}/data", *extra)
    assert all(word in line for word in words), line
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


# ------------------------------------------------------------------------------------------------------- Data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    path = write_jsonl(folder / "a.jsonl", DOCUMENTS)
    return prepare.prepare(Prepare([path], out=str(folder), val_fraction=0.2))


def test_batches_are_a_function_of_seed_and_step(data):
    d = Data(str(data), 16)
    x, y = d.batch(1, 5, 8, slice(0, 8))
    assert x.shape == y.shape == (8, 16) and torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(torch.cat([d.batch(1, 5, 8, slice(i, i + 2))[0] for i in range(0, 8, 2)]), x)
    assert not torch.equal(d.batch(1, 6, 8, slice(0, 8))[0], x)
    assert not torch.equal(d.batch(2, 5, 8, slice(0, 8))[0], x)


def test_windows_are_spread_over_the_validation_text(data):
    d = Data(str(data), 16)
    x, y = d.windows(5, slice(0, 5))
    assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(x[2:4], d.windows(5, slice(2, 4))[0])
    val = torch.from_numpy(d.tokens["val"].astype(np.int64))
    assert torch.equal(x[0], val[:16]) and torch.equal(y[4], val[-16:])
    most = len(val) - 16
    assert torch.equal(d.windows(most, slice(0, most))[0], val.unfold(0, 16, 1)[:most]), "each once"
    with pytest.raises(BadInput, match=rf"val.bin has {most} windows.*--eval_windows={most + 1}"):
        d.windows(most + 1, slice(0, 1))


def test_data_are_mapped_not_read(data):
    d = Data(str(data), 16)
    assert all(isinstance(tokens, np.memmap) for tokens in d.tokens.values())


def test_every_window_can_be_drawn_and_the_shortest_text_has_one(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij")
    folder = str(made(tmp_path / "a.txt", tmp_path, val_fraction=0.5))
    d = Data(folder, 4)  # 6 tokens, and 5 of which the last ends the document
    starts = {d.batch(0, step, 1, slice(0, 1))[0][0, 0].item() - ord("a") for step in range(50)}
    assert len(d.tokens["train"]) == 6 and starts == {0, 1}
    assert d.windows(1, slice(0, 1))[0].tolist() == [list(b"ghij")]
    with pytest.raises(BadInput, match="val.bin has 5 tokens.*--block_size.*--val_fraction"):
        Data(folder, 5)


@pytest.mark.parametrize("text", ["abc", "思", "abcdefghij" * 9])
@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_the_shortest_texts_have_both_splits(text, fraction, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    d = Data(str(made(tmp_path / "a.txt", tmp_path, val_fraction=fraction)), 0)
    assert bytes([*d.tokens["train"], *d.tokens["val"][:-1]]).decode() == text and d.meta["val"]["bytes"] >= 1


def test_a_fingerprint_is_that_of_the_documents_and_the_tokenizer(data, tmp_path):
    def fingerprint(documents, **settings):
        path = write_jsonl(tmp_path / "a.jsonl", documents)
        name = str(len([*tmp_path.iterdir()]))
        return Data(str(made(path, tmp_path, name=name, **{"val_fraction": 0.2} | settings)), 8).fingerprint

    (tmp_path / "my.tiktoken").write_bytes(ranks_to_text(make_tokenizer("x", r"\S+", BYTES | {b"do": 256})))
    same = [Data(str(data), 8).fingerprint, fingerprint(DOCUMENTS), fingerprint(DOCUMENTS)]
    swapped = [DOCUMENTS[0][::-1], *DOCUMENTS[1:]]
    other = [fingerprint(DOCUMENTS[:-1]), fingerprint(swapped), fingerprint(DOCUMENTS, val_fraction=0.3),
             fingerprint(DOCUMENTS, tokenizer=str(tmp_path / "my.tiktoken"))]
    assert len(set(same)) == 1 and len(set(same + other)) == 5


def write_meta(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("change,words", [
    (lambda f: (f / "train.bin").write_bytes(b""), ["train.bin", "damaged"]),
    (lambda f: (f / "val.bin").write_bytes((f / "val.bin").read_bytes()[:-3]), ["val.bin", "damaged"]),
    (lambda f: (f / "meta.json").write_text("{"), ["damaged"]),
    (lambda f: (f / "meta.json").write_text("[]"), ["damaged"]),
    (lambda f: (f / "meta.json").write_text("[" * 200_000), ["damaged"]),
    (lambda f: (f / "meta.json").unlink(), ["meta.json"]),
    (lambda f: (f / "train.bin").unlink(), ["train.bin"]),
    (lambda f: (f / "ranks.tiktoken").write_bytes((f / "ranks.tiktoken").read_bytes()[:-20]), ["ranks"]),
    (lambda f: write_meta(f, lambda m: m["tokenizer"].update(sha256="0")), ["sha256"]),
    (lambda f: write_meta(f, lambda m: m["tokenizer"]["special"].update({END: 10**8})), ["token"]),
    (lambda f: write_meta(f, lambda m: m.update(dtype="float16")), ["float16", "uint16"]),
    (lambda f: write_meta(f, lambda m: m.update(dtype="O")), ["uint16"]),
    (lambda f: write_meta(f, lambda m: m["val"].update(tokens=10**15)), ["val.bin"]),
    (lambda f: write_meta(f, lambda m: m["val"].update(tokens=None)), ["damaged"]),
    (lambda f: write_meta(f, lambda m: m["val"].update(bytes=0)), ["val.bin"]),
    (lambda f: write_meta(f, lambda m: m.pop("train")), ["train"]),
])
def test_damaged_data(change, words, data, tmp_path):
    shutil.copytree(data, tmp_path / "damaged")
    change(tmp_path / "damaged")
    with pytest.raises(BadInput) as error:
        Data(str(tmp_path / "damaged"), 16)
    line = str(error.value)
    assert all(word in line for word in ["damaged", *words]) and "remove" not in line, line


def test_a_token_beyond_the_vocabulary_is_found(data, tmp_path):
    shutil.copytree(data, tmp_path / "damaged")
    for split in ("train", "val"):
        size = (data / f"{split}.bin").stat().st_size
        (tmp_path / "damaged" / f"{split}.bin").write_bytes(b"\xff" * size)
    d = Data(str(tmp_path / "damaged"), 16)
    for read_some in (lambda: d.batch(0, 0, 2, slice(0, 2)), lambda: d.windows(2, slice(0, 2))):
        with pytest.raises(BadInput, match="65535.*vocabulary 257"):
            read_some()


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="is a file.*prepare.py"):
        Data(str(tmp_path / "file"), 8)
    with pytest.raises(BadInput, match="does not exist.*prepare.py"):
        Data(str(tmp_path / "no"), 8)
