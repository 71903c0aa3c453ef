"""The documents in text files, .jsonl and .parquet, plain or packed: read_pieces(path).

What is notable here:
* A file is read in blocks and a document passed on in pieces: memory does not grow with the size of either.
* What is not UTF-8 text is reported as None; a file that is broken raises BadInput, with the reason.
"""

import codecs
import gzip
import json
import os
import re
import sys
import sysconfig
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common import BadInput, optional, reason

TEXT = set(
    ".txt .md .rst .py .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .rb .sh .html .css .tex .json .toml "
    ".yaml .yml .csv .tsv .xml .sql .lua .jl .scala .swift .kt".split())
RECORDS = {".jsonl", ".parquet"}  # each record is a document
PIECE = 2**18  # characters of a piece; tiktoken's patterns give up at about a million blanks in a row
SURROGATE = re.compile("[\ud800-\udfff]")  # alone, as JSON may have it, no character
CUT = re.compile(r"(?<=\S\n)(?=\w)|(?<=\S)(?= [^\W\d_])")  # where every tokenizer's pattern begins a new word


class Piece(NamedTuple):
    """The next part of a document."""

    text: str | None  # None: the document is no UTF-8 text
    ends: bool  # whether its document ends with it
    read: int  # bytes of the file that have been read so far


def kind(path: Path) -> str:
    """The suffix that says how a file is read, without that of its compression: .jsonl of a.jsonl.gz."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz").removesuffix(".zst")).suffix


def find_files(inputs: list[str]) -> list[Path]:
    """The files behind the inputs, folders searched for all that we read, but hidden ones, sorted.

    Says what else lies in a folder. Raises BadInput for what is not there.
    """
    files = []
    for path in map(Path, inputs):
        if path.is_dir():
            there = [p for p in _walk(path) if p.is_file()]
            found = sorted(p for p in there if kind(p) in TEXT | RECORDS)
            others = Counter(p.suffix or "no suffix" for p in there if kind(p) not in TEXT | RECORDS)
            if others:
                most = sorted(others, key=lambda suffix: (-others[suffix], suffix))[:5]
                said = ", ".join(f"{others[suffix]} × {suffix}" for suffix in most)
                print(f"left out of {path}, as no text: {said}", file=sys.stderr)
            if not found:
                raise BadInput(f"{path} holds no text: want .txt, .md, source files, .jsonl or .parquet; "
                               "text and .jsonl also as .gz and .zst")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            what = "is no file that can be read twice" if path.exists() else "does not exist"
            raise BadInput(f"{path} {what}; want files or folders of text")
    return files


def _walk(root: Path) -> Iterator[Path]:
    """All files below a folder, each folder once, also one that a link leads to; none that is hidden."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def check_settings(files: list[Path], key: str, separator: str) -> None:
    """Raises BadInput where a key or a separator is given, and none of the files is read by it."""
    if key != "text" and not any(kind(path) in RECORDS for path in files):
        raise BadInput(f"--key={key} is not read here: it is of .jsonl and .parquet, and no file is one")
    if separator and all(kind(path) in RECORDS for path in files):
        raise BadInput(f"--separator={separator} is not read here: it is of text files, and no file is one")


def standard_library() -> list[Path]:
    """Every .py file of the running Python's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))


def read_pieces(path: Path, key: str = "text", separator: str = "") -> Iterator[Piece]:
    """The documents of one file, in order and in pieces. Raises BadInput for a broken file.

    key: the field of a .jsonl record or the column of a .parquet file. separator: what stands between the
    documents of a text file, \\n in it a line's end; empty: the file is one document.
    """
    try:
        if kind(path) == ".parquet":
            yield from _parquet(path, key)
        elif kind(path) == ".jsonl":
            yield from _jsonl(path, key)
        else:
            yield from _text(path, separator.replace("\\n", "\n").replace("\\r", "\r").encode())
    except BadInput:
        raise
    except Exception as error:  # gzip, zstandard and pyarrow have many
        raise BadInput(f"{path} cannot be read: {reason(error)}") from None


def cut(text: str) -> list[str]:
    """Pieces of at most PIECE characters, cut where a tokenizer would cut too if there is such a place."""
    pieces = []
    start = 0
    while len(text) - start > PIECE:
        place = CUT.search(text, start + PIECE - 4096, start + PIECE)
        end = place.start() if place else start + PIECE
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def encode(tokenizer, texts: list[str]) -> list[list[int] | None]:
    """The tokens of each piece of text; None where the tokenizer's pattern gives up on one."""
    try:
        return tokenizer.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # tiktoken's own, which is no Exception
            raise
    return [None] if len(texts) == 1 else [encode(tokenizer, [text])[0] for text in texts]


def _pieces(text: str | None, read: int) -> Iterator[Piece]:
    """A whole document."""
    *first, last = [None] if text is None else cut(text.removeprefix("\ufeff"))
    for piece in first:
        yield Piece(piece, False, read)
    yield Piece(last, True, read)


def _text(path: Path, separator: bytes) -> Iterator[Piece]:
    text = ""  # what has been read of the document, but not yet passed on; None: it is no text
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    for part, ends, read in _parts(path, separator):
        if text is not None:
            try:
                text += decoder.decode(part, ends)
            except UnicodeDecodeError:
                text = None
        if b"\0" in part:
            text = None
        *first, text = [None] if text is None else cut(text)
        for piece in first:
            yield Piece(piece, False, read)
        if ends:
            yield Piece(text, True, read)
            text = ""
            decoder.reset()


def _jsonl(path: Path, key: str) -> Iterator[Piece]:
    line = []
    number = 1
    for part, ends, read in _parts(path, b"\n"):
        line.append(part)
        if not ends:
            continue
        whole = b"".join(line)
        if whole.strip():
            yield from _pieces(_record(whole, key, f"{path}, line {number}"), read)
        line = []
        number += 1


def _record(line: bytes, key: str, where: str) -> str | None:
    try:
        record = json.loads(line.decode("utf-8-sig"))  # of bytes json would guess the encoding, line by line
    except UnicodeDecodeError:
        return None
    except ValueError as error:
        raise BadInput(f"{where}: not JSON ({reason(error)}); want one object on each line") from None
    text = record.get(key, 0) if isinstance(record, dict) else 0
    if not isinstance(text, str | None):
        raise BadInput(f"{where}: no text under {key!r}; --key names the field that holds it")
    return SURROGATE.sub("\ufffd", text or "")  # as tiktoken does


def _parquet(path: Path, key: str) -> Iterator[Piece]:
    file = optional("pyarrow.parquet", str(path)).ParquetFile(path)
    columns = file.schema_arrow.names
    if key not in columns:
        raise BadInput(f"{path}: no column {key!r} among {', '.join(columns)}; --key names the one of text")
    rows = 0
    for batch in file.iter_batches(batch_size=256, columns=[key]):
        rows += len(batch)
        read = path.stat().st_size * rows // file.metadata.num_rows
        for text in batch.column(0).to_pylist():
            if not isinstance(text, str | bytes | None):
                raise BadInput(f"{path}: the column {key!r} holds no text; --key names the column that does")
            yield from _pieces(_decoded(text) if isinstance(text, bytes) else text or "", read)


def _decoded(content: bytes) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _parts(path: Path, separator: bytes) -> Iterator[tuple[bytes, bool, int]]:
    """A file cut at separators: (bytes, whether a separator or the file's end follows, bytes read so far)."""
    held = b""
    read = 0
    for block, read in _blocks(path):
        block = held + block
        *ended, held = block.split(separator) if separator else [block]
        for part in ended:
            yield part, True, read
        safe = len(held) - max(0, len(separator) - 1)  # the last bytes may be the beginning of a separator
        if safe > 0:
            yield held[:safe], False, read
            held = held[safe:]
    yield held, True, read


def _blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """A file, unpacked, in blocks; with each how many bytes of the packed file have been read."""
    name = path.name.lower()
    with open(path, "rb") as file:
        if name.endswith(".zst"):
            yield from _unpack_zst(file)
            return
        stream = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
        while block := stream.read(2**20):
            yield block, file.tell()


def _unpack_zst(file) -> Iterator[tuple[bytes, int]]:
    """Frame by frame: zstandard's own reader ends without a word where a file was cut off."""
    zstandard = optional("zstandard", file.name)
    frame = None
    while packed := file.read(2**16):
        while packed:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            yield frame.decompress(packed), file.tell()
            packed = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise EOFError("it ends before its last frame does")


def validates(digest: bytes, val_fraction: float) -> bool:
    """Whether the document with this SHA-256 is validation text."""
    return int.from_bytes(digest[16:20], "big") < int(val_fraction * 2**32)


class Hashes:
    """A set of numbers below 2**64 in 16 to 32 bytes each; a Python set of digests takes over 100."""

    def __init__(self) -> None:
        self.seats = array("Q", bytes(8 * 1024))  # 0: free
        self.count = 0

    def add(self, number: int) -> bool:
        """Whether the number is new."""
        number = max(1, number)
        seat = number % len(self.seats)
        while self.seats[seat] not in (0, number):
            seat = (seat + 1) % len(self.seats)
        if self.seats[seat] == number:
            return False
        self.seats[seat] = number
        self.count += 1
        if 2 * self.count > len(self.seats):
            numbers = filter(None, self.seats)
            self.seats = array("Q", bytes(16 * len(self.seats)))
            self.count = 0
            for number in numbers:
                self.add(number)
        return True
