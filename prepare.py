"""Text → data/<name>/{train,val}.bin, meta.json and ranks.tiktoken; and `Data`, which reads such a folder.

    python prepare.py                              the standard library of this Python, as bytes → data/python
    python prepare.py --input pile/*.jsonl.zst --tokenizer gpt2 --name pile
    python prepare.py --input stories.txt --separator="<|endoftext|>"
    python prepare.py --task=hops                  a task of known difficulty → data/hops

What is notable here:
* It needs no network: the default corpus is on every machine, and a tokenizer can be a file of ranks.
* Every tokenizer is a tiktoken.Encoding, bytes too; its ranks lie beside the tokens, and in checkpoints.
* Without --val a document's own hash decides whether it is validation text: the same in any order, anywhere.
  Identical documents count once.
* Text is read, encoded and written in pieces: memory does not grow with the size of a file or a document.
* All is written to a temporary folder, renamed at the end: an interrupted run leaves none that looks whole.
"""

from common import answer_help

answer_help(__file__)

import hashlib
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from bpe import train_bpe
from common import BadInput, check_typed, configure, read_json, reason, run, unusable
from configurator import misfit
from documents import (RECORDS, Hashes, Piece, check_settings, encode, find_files, kind, read_pieces,
                       standard_library, validates)
from tokenizer import (END, GPT2_PATTERN, describe, dtype_of, get_tokenizer, make_tokenizer, ranks_to_text,
                       restore_tokenizer)

BATCH = 2**22  # characters that are encoded at once


@dataclass
class Prepare:
    input: list[str] = field(default_factory=list)  # files or folders; empty: Python's standard library
    tokenizer: str = "bytes"  # bytes, bpe:1024 (made here), a tiktoken name, ranks, tokenizer.json, a run
    name: str = ""  # folder under out; empty: python, or the first input's name
    out: str = "data"  # where the folder goes
    val_fraction: float = 0.05  # share of the documents that becomes validation text
    val: list[str] = field(default_factory=list)  # files or folders that are the validation text instead
    key: str = "text"  # the field of a .jsonl record or the column of a .parquet file
    task: str = ""  # hops: makes the text of a task of known difficulty (tasks.py) instead of reading any
    separator: str = ""  # between the documents of a text file, \n and \r allowed; empty: a file is one


# ---------------------------------------------------------------------------------------------------- writing


class Document:
    """A document on its way into train.bin or val.bin."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self.tokens = tempfile.SpooledTemporaryFile(2**23, dir=folder)  # in memory; on disk if they are many
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.blank = True
        self.split = ""  # train, val, or none where it is left out; empty until all of it has been read


class Writer:
    """Encodes documents, batch by batch, and writes each to train.bin or val.bin."""

    def __init__(self, folder: Path, tokenizer: tiktoken.Encoding, val_fraction: float,
                 validation: list[Path]) -> None:
        self.folder = folder
        self.validation = {*validation}  # files whose documents become validation text, and no others
        self.tokenizer = tokenizer
        self.dtype = dtype_of(tokenizer)
        self.val_fraction = val_fraction
        self.files = {split: open(folder / f"{split}.bin", "wb") for split in ("train", "val")}
        self.counts = {split: {"documents": 0, "bytes": 0, "tokens": 0} for split in self.files}
        self.counts |= {"identical": 0, "skipped": 0}
        self.content = hashlib.sha256()  # of all documents: what the data are known by
        self.seen = Hashes()
        self.notes = {}  # file → what there is to say about it
        self.document = None  # the one whose pieces come in
        self.batch = []  # (document, text, whether the document ends with it)
        self.size = 0  # its characters

    def add(self, path: Path, piece: Piece) -> None:
        """Takes the next piece of a document."""
        document = self.document = self.document or Document(path, self.folder)
        text = piece.text or ""
        content = text.encode()
        document.digest.update(content)
        document.bytes += len(content)
        document.blank = document.blank and not text.strip()
        if piece.text is None:
            self.skip(document, "is no UTF-8 text or has a zero byte")
        self.batch.append((document, text, piece.ends))
        self.size += len(text)
        if piece.ends:
            document.split = document.split or self.split(document)
            self.document = None
        if self.size >= BATCH or len(self.batch) >= 4096:
            self.flush()

    def split(self, document: Document) -> str:
        """Where a document belongs, all of which has been read."""
        if document.blank:
            self.counts["skipped"] += 1
            return "none"
        digest = document.digest.digest()
        if not self.seen.add(int.from_bytes(digest[:8], "big")):
            self.counts["identical"] += 1
            return "none"
        if self.validation:
            return "val" if document.path in self.validation else "train"
        return "val" if validates(digest, self.val_fraction) else "train"

    def skip(self, document: Document, why: str) -> None:
        document.split = "none"
        self.counts["skipped"] += 1
        self.notes[document.path] = f"holds a document that {why}, which was skipped"

    def flush(self) -> None:
        """Encodes the batch, and writes the documents that it completes."""
        texts = ["" if document.split == "none" else text for document, text, _ in self.batch]
        for (document, _, ends), tokens in zip(self.batch, encode(self.tokenizer, texts)):
            if tokens is None and document.split != "none":
                self.skip(document, "the tokenizer cannot encode")
            if document.split == "none":
                continue
            document.tokens.write(np.array(tokens, self.dtype).tobytes())
            if ends:
                self.write(document)
        self.batch = []
        self.size = 0

    def write(self, document: Document) -> None:
        document.tokens.write(np.array([self.tokenizer.eot_token], self.dtype).tobytes())
        counts = self.counts[document.split]
        counts["documents"] += 1
        counts["bytes"] += document.bytes
        counts["tokens"] += document.tokens.tell() // self.dtype.itemsize
        self.content.update(document.split.encode() + document.digest.digest())
        document.tokens.seek(0)
        shutil.copyfileobj(document.tokens, self.files[document.split])


def write(files: list[Path], validation: list[Path], config: Prepare, tokenizer: tiktoken.Encoding,
          folder: Path) -> dict:
    """Writes train.bin and val.bin; returns what meta.json says about them. validation: of the files those
    that --val names, which come first, so that a document of both is validation text.
    """
    writer = Writer(folder, tokenizer, config.val_fraction, validation)
    size = sum(path.stat().st_size for path in files)
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="tokenizing", disable=None)
    with bar, writer.files["train"], writer.files["val"]:  # Windows removes no file that is open
        before = 0  # bytes of the files before this one
        for path in files:
            single = kind(path) not in RECORDS
            ends = 0
            for piece in read_pieces(path, config.key, config.separator):
                writer.add(path, piece)
                bar.update(before + piece.read - bar.n)
                ends += piece.ends
                if single and not config.separator and END in (piece.text or ""):
                    note = f"was read as one document, but holds {END}: see --separator"
                    writer.notes.setdefault(path, note)  # what was skipped matters more
            if single and config.separator and ends < 2:
                note = f"was read as one document: no --separator={config.separator} in it"
                writer.notes.setdefault(path, note)
            before += path.stat().st_size
        writer.flush()
    counts = writer.counts
    if counts["train"]["tokens"] + counts["val"]["tokens"] < 4:
        why = "".join(f"; {path} {note}" for path, note in [*writer.notes.items()][:1])
        skipped = f"{counts['skipped']} empty or not UTF-8{why}"
        raise BadInput(f"too little text in {len(files)} file(s), want four tokens at least: {skipped}")
    if not (counts["train"]["tokens"] and counts["val"]["tokens"]):
        if config.task or config.val:  # whose documents stay whole
            given = f"val={' '.join(config.val)}" if config.val else f"val_fraction={config.val_fraction}"
            raise BadInput(f"--{given} leaves training or validation no document")
        cut_tail(folder, counts, config.val_fraction, tokenizer)
    elif counts["val"]["tokens"] > counts["train"]["tokens"] and config.val_fraction < 0.5 and not config.val:
        print("prepare.py: more than half of the text has become validation text, in spite of "
              f"--val_fraction={config.val_fraction}, as a few long documents hold most of it: cut them into "
              "shorter ones, or try another --val_fraction", file=sys.stderr)
    for path, note in list(writer.notes.items())[:20]:
        print(f"prepare.py: {path} {note}", file=sys.stderr)
    return {"dtype": writer.dtype.name, "content": writer.content.hexdigest(), **counts}


def cut_tail(folder: Path, counts: dict, fraction: float, tokenizer: tiktoken.Encoding) -> None:
    """So few documents that all fell on one side: the end of the text becomes the validation text instead."""
    if not counts["train"]["tokens"]:
        os.replace(folder / "val.bin", folder / "train.bin")
        counts["train"], counts["val"] = counts["val"], counts["train"]
    train, val = counts["train"], counts["val"]
    tokens = np.memmap(folder / "train.bin", dtype_of(tokenizer), "r")
    first = min(max(1, round(len(tokens) * (1 - fraction))), len(tokens) - 2)
    with open(folder / "val.bin", "wb") as file:
        for start in range(first, len(tokens), 2**20):
            part = tokens[start: start + 2**20]
            file.write(part.tobytes())
            text = part[part != tokenizer.eot_token]
            val["documents"] += len(part) - len(text)
            val["bytes"] += len(tokenizer.decode_bytes(text.tolist()))
    val["tokens"] = len(tokens) - first
    train["tokens"] = first
    train["bytes"] -= val["bytes"]
    train["documents"] = max(1, train["documents"] - val["documents"])
    size = first * tokens.itemsize
    del tokens, part, text  # Windows cuts no file that is mapped
    os.truncate(folder / "train.bin", size)


def prepare(config: Prepare) -> Path:
    """Writes the folder and returns it. Raises BadInput; then nothing has been written."""
    if config.task not in ("", "hops"):
        raise BadInput(f"--task={config.task} is not known; want hops")
    others = config.input or config.val or config.separator
    if config.task and (others or config.key != "text" or config.tokenizer != "bytes"):
        raise BadInput("--task makes its own text, of bytes: leave out what others are read with (--input, "
                       "--val, --key, --separator, --tokenizer)")
    if config.val:
        check_typed({"val_fraction": "a run without --val, which names the validation text"})
    files, validation = [], find_files(config.val)  # none of a task, which makes its own text
    if not config.task:
        files = find_files(config.input) if config.input else standard_library()
        check_settings([*validation, *files], config.key, config.separator)
    source = Path([*config.input, config.task or "python"][0]).resolve().name
    name = config.name or source.lstrip(".").split(".")[0]
    if not name or name.startswith(".") or Path(name).name != name:
        raise BadInput(f"--name={name} must be the name of a folder in {config.out}, such as --name=books")
    folder = Path(config.out) / name
    if config.tokenizer.startswith("bpe:"):
        ranks = train_bpe(files, validation, config, GPT2_PATTERN)
        tokenizer = make_tokenizer("bpe", GPT2_PATTERN, ranks)
    else:
        tokenizer = get_tokenizer(config.tokenizer)
    files = [*validation, *files]
    settings = {key: value for key, value in asdict(config).items() if key not in ("name", "out")}
    inputs = {str(path): f"{path.stat().st_size} bytes, {path.stat().st_mtime_ns}" for path in files}
    meta = {"settings": settings, "inputs": inputs, "tokenizer": describe(tokenizer)}
    if is_prepared(folder, meta):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for other in [path for path in folder.parent.iterdir() if path.name.startswith(f".{name}-")]:
            print(f"prepare.py: {other} is of a run that is at work, or was killed: if so, remove it",
                  file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as temporary:
            new = Path(temporary) / name
            new.mkdir()
            if config.task:
                from tasks import hops  # which imports torch
                files = [Path(temporary) / "task.txt"]
                files[0].write_bytes("\n".join(hops()).encode())
                config = replace(config, separator="\n")
            meta |= write(files, validation, config, tokenizer, new)
            if config.task:
                meta["document"] = meta["train"]["tokens"] // meta["train"]["documents"]  # all are as long
            (new / "ranks.tiktoken").write_bytes(ranks_to_text(tokenizer))
            (new / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
            try:
                os.rename(new, folder)
            except OSError:  # perhaps another run was quicker
                if not is_prepared(folder, meta):
                    raise
    except OSError as error:
        raise BadInput(f"{folder} cannot be written: {reason(error)}") from None
    return folder


def is_prepared(folder: Path, wanted: dict) -> bool:
    """Whether the folder is there as wanted. Raises BadInput where it is there, but otherwise."""
    if not os.path.lexists(folder):
        return False
    try:
        meta = read_json(folder / "meta.json")
        settings = {"separator": "", "task": "", "val": []} | meta["settings"]  # a folder of old has none
        same = settings == wanted["settings"] and meta["tokenizer"] == wanted["tokenizer"]
        inputs = meta.get("inputs", wanted["inputs"])
        changed = sorted(path for path, _ in inputs.items() ^ wanted["inputs"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{folder} exists, and is not a folder of prepare.py: choose another --name") from None
    problem = "with other settings"
    if same:
        problem = ""
        if changed:
            new, gone = changed[0] not in inputs, changed[0] not in wanted["inputs"]
            what = "is new" if new else "is not read any more" if gone else "is not as it was"
            problem = f"and its input has changed since: {changed[0]} {what}"
    try:
        Data(str(folder), 0)
    except BadInput as error:
        problem = f"but is damaged ({error})"
    if problem:
        raise BadInput(f"{folder} was prepared before {problem}: remove {folder}, or choose another --name")
    print(f"{folder} was prepared before with these settings: left as it is")
    return True


# ---------------------------------------------------------------------------------------------------- reading


class Data:
    """The tokens of a prepared folder, mapped into memory. Raises BadInput where it is damaged or too short.

    tokens: those of "train", or the first train_tokens of them, and of "val". fingerprint: another text or
    tokenizer has another. document: the tokens of each document of a task, else 1.
    """

    def __init__(self, folder: str, block_size: int, train_tokens: int = 0) -> None:
        self.folder = Path(folder)
        self.block_size = block_size
        if not self.folder.is_dir():
            found = "is a file" if self.folder.exists() else "does not exist"
            raise BadInput(f"{folder} {found}: run python prepare.py first, or name its folder with --data")
        try:
            self.meta = read_json(self.folder / "meta.json")
            ranks = (self.folder / "ranks.tiktoken").read_bytes()
            self.tokenizer = restore_tokenizer(self.meta["tokenizer"], ranks)
            self.tokens = {split: self._open(split) for split in ("train", "val")}
            self.document = self.meta.get("document", 1)
            if type(self.document) is not int or self.document < 1:
                raise ValueError(f"document is {self.document!r}, but must be a number of tokens")
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            what = unusable(error, "is damaged, or not a folder of prepare.py")
            why = error if isinstance(error, OSError) else misfit(error)  # it names the file
            raise BadInput(f"{folder} {what} ({why})") from None
        if train_tokens > len(self.tokens["train"]):
            raise BadInput(f"{folder}/train.bin has {len(self.tokens['train'])} tokens, fewer than "
                           f"--train_tokens={train_tokens}")
        if train_tokens:
            self.tokens["train"] = self.tokens["train"][:train_tokens]
        if 0 < train_tokens <= block_size:
            raise BadInput(f"--train_tokens={train_tokens} is less than a window of {block_size + 1} tokens: "
                           "want more, or a lower --block_size")
        for split, tokens in self.tokens.items():
            if len(tokens) <= block_size:
                raise BadInput(f"{folder}/{split}.bin has {len(tokens)} tokens, a window {block_size + 1}: a "
                               "lower --block_size, or prepare.py with another --val_fraction, --val or text")
        known = {name: value for name, value in self.meta.items() if name not in ("settings", "inputs")}
        self.fingerprint = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def _open(self, split: str) -> np.ndarray:
        path = self.folder / f"{split}.bin"
        dtype = dtype_of(self.tokenizer)
        counts = self.meta[split]
        size = path.stat().st_size
        if self.meta["dtype"] != dtype.name:
            raise ValueError(f"its dtype is {self.meta['dtype']}, but must be {dtype.name}")
        if size != counts["tokens"] * dtype.itemsize or counts["bytes"] < 1:
            raise ValueError(f"{path} has {size:,} bytes, but meta.json speaks of {counts}")
        return np.memmap(path, dtype, "r")

    def _cut(self, split: str, starts: np.ndarray) -> tuple:
        import torch
        starts = starts - starts % self.document  # of a task, a window begins where a document does
        window = self.tokens[split][starts[:, None] + np.arange(self.block_size + 1)].astype(np.int64)
        if window.max(initial=0) >= self.tokenizer.n_vocab:
            raise BadInput(f"{self.folder}/{split}.bin holds token {window.max()}, beyond the vocabulary "
                           f"{self.tokenizer.n_vocab} of meta.json")
        window = torch.from_numpy(window)
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def batch(self, seed: int, step: int, size: int, part: slice) -> tuple:
        """Inputs and targets (part, block_size), int64: that part of the `size` windows of this step."""
        count = len(self.tokens["train"]) - self.block_size
        return self._cut("train", np.random.default_rng((seed, step)).integers(0, count, size)[part])

    def windows(self, count: int, part: slice) -> tuple:
        """Inputs and targets of `count` evenly spaced windows of the validation text, or a part of them."""
        last = len(self.tokens["val"]) - self.block_size - 1
        if count > last + 1:
            raise BadInput(f"{self.folder}/val.bin has {last + 1} windows, fewer than --eval_windows={count}")
        return self._cut("val", np.linspace(0, last, count).astype(np.int64)[part])


def main() -> None:
    config = configure(Prepare)
    folder = prepare(config)
    meta = read_json(folder / "meta.json")
    for split in ("train", "val"):
        counts = meta[split]
        print(f"{folder}/{split}.bin: {counts['tokens']:,} tokens of {counts['documents']:,} documents, "
              f"{counts['bytes']:,} bytes")
    print(f"tokenizer {meta['tokenizer']['name']}, vocabulary {meta['tokenizer']['vocab_size']:,}; "
          f"identical documents left out: {meta['identical']:,}; empty or not UTF-8: {meta['skipped']:,}")


if __name__ == "__main__":
    run(main)
