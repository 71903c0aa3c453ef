"""The documents in files: all formats alike, in pieces of bounded size, and nothing lost without a word."""

import gzip
import json
import os
import random
import tracemalloc
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

import documents
from common import BadInput
from documents import Hashes, check_settings, cut, encode, find_files, read_pieces
from tokenizer import GPT2_PATTERN, get_tokenizer, make_tokenizer

DOCUMENTS = [f"document {i}: naïve 思考 {'x' * (i % 7)}\n" for i in range(80)]
BYTES = {bytes([i]): i for i in range(256)}
CUT = gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0)[:40]  # mtime: a test has one name at all times
# GPT-4's and GPT-4o's: a mark takes the line ends, and even a slash, that follow it
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
          r"|\s*[\r\n]|\s+(?!\S)|\s")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\p{N}{1,3}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def jsonl(values):
    return "".join(json.dumps({"text": value}) + "\n" for value in values).encode()


def zst(*frames):
    """Several frames behind each other, as pzstd and `cat` make them."""
    zstandard = pytest.importorskip("zstandard")
    return b"".join(zstandard.ZstdCompressor().compress(frame) for frame in frames)


def documents_of(path, **how):
    """The documents of a file, put together from their pieces; None for one that is no text."""
    found, parts = [], []
    for piece in read_pieces(path, **how):
        parts.append(piece.text)
        if piece.ends:
            found.append(None if None in parts else "".join(parts))
            parts = []
    return found


def read(path, content, **how):
    path.write_bytes(content)
    return documents_of(path, **how)


def test_all_formats_hold_the_same_documents(tmp_path):
    lines = jsonl(DOCUMENTS)
    half = lines.index(b"\n", len(lines) // 2) + 1
    joined = "<|end|>".join(DOCUMENTS).encode()
    assert read(tmp_path / "a.jsonl", lines) == DOCUMENTS
    parts = gzip.compress(lines[:half]) + gzip.compress(lines[half:])
    assert read(tmp_path / "a.jsonl.gz", parts) == DOCUMENTS
    assert read(tmp_path / "a.txt", joined, separator="<|end|>") == DOCUMENTS
    assert read(tmp_path / "a.txt.gz", gzip.compress(joined), separator="<|end|>") == DOCUMENTS
    assert read(tmp_path / "a.md", joined) == [joined.decode()]
    assert read(tmp_path / "A.MD.GZ", gzip.compress(joined)) == [joined.decode()]


def test_zstandard_files(tmp_path):
    lines = jsonl(DOCUMENTS)
    assert read(tmp_path / "a.jsonl.zst", zst(lines)) == DOCUMENTS
    assert read(tmp_path / "b.jsonl.zst", zst(lines[:1000], b"", lines[1000:1001], lines[1001:])) == DOCUMENTS
    assert read(tmp_path / "c.txt.zst", zst(b"na", "ïve".encode())) == ["naïve"]
    big = [f"{i} " * 300 for i in range(3000)]
    assert read(tmp_path / "d.jsonl.zst", zst(jsonl(big[:999]), jsonl(big[999:]))) == big
    whole = zst(lines)
    for broken in (whole[:-3], whole + whole[:40], b"no zstandard", whole[:-10] + b"0123456789"):
        with pytest.raises(BadInput, match=r"e.jsonl.zst cannot be read: \w"):
            read(tmp_path / "e.jsonl.zst", broken)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"text": [*DOCUMENTS, None], "raw": [d.encode() for d in DOCUMENTS] + [b"\xff"],
               "number": list(range(len(DOCUMENTS) + 1))}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    for key, last in (("text", ""), ("raw", None)):  # nothing; no UTF-8
        assert documents_of(tmp_path / "a.parquet", key=key) == [*DOCUMENTS, last]
    pieces = [*read_pieces(tmp_path / "a.parquet")]
    assert pieces[-1].read == (tmp_path / "a.parquet").stat().st_size
    wrong = {"body": "'body' among text, raw, number; --key", "number": "'number' holds no text; --key"}
    for key, words in wrong.items():
        with pytest.raises(BadInput, match=words):
            documents_of(tmp_path / "a.parquet", key=key)
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(BadInput, match=r"a.parquet cannot be read: \w"):
        documents_of(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["zstandard", "pyarrow"])
def test_a_missing_package_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, name, None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(BadInput, match=f"pip install {name}"):
        read(tmp_path / ("a.txt.zst" if name == "zstandard" else "a.parquet"), b"x")


def test_what_is_no_text_is_none_and_the_rest_is_kept(tmp_path):
    lines = [b'{"text": "a"}', b"", b'{"text": null}', b'{"text": "\xff"}\r', b'{"text": "b"}']
    assert read(tmp_path / "a.jsonl", b"\n".join(lines)) == ["a", "", None, "b"]
    assert read(tmp_path / "a.txt", b"a|\xff|b|\0|c", separator="|") == ["a", None, "b", None, "c"]
    assert read(tmp_path / "a.txt", "naïve".encode("latin-1")) == [None]
    assert read(tmp_path / "a.txt", "naïve".encode("utf-16")) == [None]
    assert read(tmp_path / "a.txt", b"") == [""] and read(tmp_path / "a.jsonl", b"") == []


def test_half_a_surrogate_is_what_tiktoken_makes_of_it(tmp_path):
    """So bytes are counted as they are encoded, and bits per byte are right; a whole pair is a character."""
    assert read(tmp_path / "a.jsonl", rb'{"text": "a \ud83d b \ud83d\ude00"}') == ["a \ufffd b \U0001f600"]
    tokenizer = get_tokenizer("bytes")
    assert tokenizer.decode(tokenizer.encode_ordinary("a \ud83d b")) == "a \ufffd b"


@pytest.mark.parametrize("names,settings,words", [
    (["a.txt", "b.md.gz"], {"key": "body"}, "--key=body is not read here"),
    (["a.jsonl", "b.parquet"], {"separator": "|"}, r"--separator=\| is not read here"),
    (["a.txt", "b.jsonl"], {"key": "body", "separator": "|"}, None),
    (["a.jsonl"], {}, None), (["a.txt"], {}, None)])
def test_a_setting_that_reads_none_of_the_files_is_refused(names, settings, words):
    settings = {"key": "text", "separator": ""} | settings
    with pytest.raises(BadInput, match=words) if words else nullcontext():
        check_settings([Path(name) for name in names], **settings)


def test_a_byte_order_mark_is_dropped(tmp_path):
    mark = "\ufeff".encode()
    assert read(tmp_path / "a.txt", mark + b"a|" + mark + b"b", separator="|") == ["a", "b"]
    assert read(tmp_path / "a.jsonl", mark + jsonl(["\ufeffa", "b"])) == ["a", "b"]


@pytest.mark.parametrize("name,content,words", [
    ("a.jsonl", b'{"text": "x"}\nnot json\n', ["line 2", "JSON"]),
    ("a.jsonl", b'{"body": "x"}\n', ["line 1", "--key"]),
    ("a.jsonl", b'{"text": 3}\n', ["line 1", "--key"]),
    ("a.jsonl", b"[" * 100_000, ["a.jsonl"]),
    ("a.jsonl.gz", CUT, ["cannot be read: Compressed file ended"]),
    ("a.txt.gz", b"no gzip", ["cannot be read: Not a gzipped file"]),
    ("a.txt.gz", gzip.compress(b"abc", mtime=0)[:-8] + bytes(8), ["cannot be read: CRC"]),
])
def test_a_broken_file_is_named_with_the_reason(name, content, words, tmp_path):
    with pytest.raises(BadInput) as error:
        read(tmp_path / name, content)
    line = str(error.value)
    assert all(word in line for word in [name, *words]) and "\n" not in line, line


def test_files_are_found_by_what_they_hold(tmp_path, capsys):
    hidden = [".k.txt", "sub/.l.txt", ".git/m.txt"]
    named = "a.txt b.JSONL c.txt.gz d.jsonl.zst e.parquet f.png g.gz h.bin sub/i.md".split()
    for name in [*named, *hidden]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [p.relative_to(tmp_path).as_posix() for p in find_files([str(tmp_path)])]
    assert found == ["a.txt", "b.JSONL", "c.txt.gz", "d.jsonl.zst", "e.parquet", "sub/i.md"]
    assert "as no text: 1 × .bin, 1 × .gz, 1 × .png" in capsys.readouterr().err
    for named in ("h.bin", ".k.txt", ".git"):
        assert [path.name for path in find_files([str(tmp_path / named)])] == [named.replace(".git", "m.txt")]
    with pytest.raises(BadInput, match="does not exist"):
        find_files([str(tmp_path / "no.txt")])


def test_links_to_folders_are_followed_and_each_is_read_once(tmp_path):
    for folder in ("real", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    (tmp_path / "real" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "real")
    found = find_files([str(tmp_path / "real")])
    assert [path.read_text() for path in found] == ["real", "other"]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="pipe is no file"):
        find_files([str(tmp_path / "pipe")])


def test_separators_are_found_wherever_blocks_end(tmp_path, monkeypatch):
    """Whatever the size of the blocks: documents, and the end of what was read, are the same."""
    text = "思<<>a<<>>b<<>>é<<>><<<>>>"
    wanted = text.split("<<>>")
    blocks = documents._blocks
    for size in range(1, 12):
        def small(path):
            for block, read in blocks(path):
                yield from ((block[i: i + size], i + size) for i in range(0, len(block), size))
        monkeypatch.setattr(documents, "_blocks", small)
        assert read(tmp_path / "a.txt", text.encode(), separator="<<>>") == wanted
        assert read(tmp_path / "a.txt", text.encode()) == [text]
        assert read(tmp_path / "a.jsonl", jsonl(DOCUMENTS)) == DOCUMENTS


def prose(characters, seed=0):
    """Lines of words, marks, numbers and blanks of all kinds."""
    rng = random.Random(seed)
    words = ["the", "Naïve", "思考", "don't", "x", "1234567", ");\n", "/*", ",", "é", "_a"]
    blanks = [" ", "  ", "\t", "\n", "\n\n", "\r\n"]
    pairs = [rng.choice(words + blanks) + rng.choice([" ", " ", "\n", ""]) for _ in range(characters // 4)]
    return "".join(pairs)


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, CL100K, O200K, r"\S+|\s+"])
def test_pieces_have_the_tokens_of_the_whole(pattern, monkeypatch):
    """Each pair of bytes of the text may be a token, so that a cut at a wrong place would show."""
    text = prose(60_000)
    raw = text.encode()
    pairs = dict.fromkeys(raw[i: i + 2] for i in range(len(raw) - 1))
    tokenizer = make_tokenizer("pairs", pattern, BYTES | {pair: 256 + i for i, pair in enumerate(pairs)})
    monkeypatch.setattr(documents, "PIECE", 5000)
    pieces = cut(text)
    assert "".join(pieces) == text and max(map(len, pieces)) <= 5000 and len(pieces) >= 12
    assert sum(encode(tokenizer, pieces), []) == tokenizer.encode_ordinary(text)


def test_pieces_do_not_depend_on_how_the_text_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 5000)
    text = prose(50_000) + "x" * 12_000 + " " * 12_000 + prose(9000)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "a.jsonl").write_bytes(jsonl([text]))
    blocks = documents._blocks
    monkeypatch.setattr(documents, "_blocks", lambda path: (
        (block[i: i + 777], read) for block, read in blocks(path) for i in range(0, len(block), 777)))
    for name in ("a.txt", "a.jsonl"):
        pieces = [*read_pieces(tmp_path / name)]
        assert [piece.text for piece in pieces] == cut(text)
        assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_a_million_blanks_are_encoded():
    """With GPT-2's pattern tiktoken panics on them in one piece."""
    tokenizer = make_tokenizer("gpt2", GPT2_PATTERN, BYTES)
    for blanks in (" " * 1_100_000, "\n" * 1_100_000, " \n" * 550_000):
        tokens = encode(tokenizer, cut("a" + blanks + "b"))
        assert sum(map(len, tokens)) == 1_100_002
    assert encode(tokenizer, ["a", "a" + " " * 1_100_000 + "b", "b"]) == [[97], None, [98]]


def test_progress_is_in_bytes_of_the_file(tmp_path):
    noise = random.Random(0).randbytes(10**6).hex().encode()
    files = {"a.txt": noise, "a.txt.gz": gzip.compress(noise), "a.jsonl": jsonl([noise.decode()] * 3)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        read = [piece.read for piece in read_pieces(tmp_path / name)]
        assert read == sorted(read) and read[0] < read[-1] == len(content)


def test_a_large_text_is_never_whole_in_memory(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"some words on a line of text\n" * 2_000_000)
    tracemalloc.start()
    size = sum(len(piece.text) for piece in read_pieces(tmp_path / "a.txt"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == 58_000_000 and peak < 10e6


def test_hashes_are_a_set_of_few_bytes():
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 2**64, 20_000, np.uint64).tolist() + [0, 2**64 - 1, 5, 5 + 1024, 5 + 2048]
    hashes = Hashes()
    assert all(hashes.add(n) for n in numbers) and not any(hashes.add(n) for n in numbers)
    assert hashes.count == len(numbers) and len(hashes.seats) * 8 <= 32 * len(numbers)
