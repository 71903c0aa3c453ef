"""Text → data/<name>/{train,val}.bin, meta.json and ranks.tiktoken.

    python prepare.py                                     the standard library of this Python, as bytes → data/python
    python prepare.py --input pile/*.jsonl.zst --tokenizer gpt2 --name pile

What is notable here:
* It needs no network: the default corpus is on every machine, and a tokenizer can be a file of ranks.
* Every tokenizer is a tiktoken.Encoding, the byte tokenizer too; the ranks lie beside the tokens, and go into checkpoints.
* Whether a document is validation text is decided by its own hash: the same in any order, on any machine. Identical
  documents count once; what is not UTF-8 text is skipped and reported.
* All is written to a temporary folder that is renamed at the end: an interrupted run leaves nothing that looks whole.
"""

import base64
import gzip
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from configurator import BadInput, configure, run

END = "<|endoftext|>"  # ends every document
# GPT-2's pattern, which a file of ranks gets, since it carries none of its own
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
TEXT = {".txt", ".md", ".rst", ".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".rb", ".sh",
        ".html", ".css", ".tex", ".json", ".toml", ".yaml", ".yml", ".csv", ".tsv", ".xml", ".sql", ".lua", ".jl", ".scala", ".swift", ".kt"}
RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@dataclass
class Prepare:
    input: list[str] = field(default_factory=list)  # files or folders; empty: the standard library of this Python
    tokenizer: str = "bytes"  # bytes, any tiktoken name (gpt2, cl100k_base, …) or a path to ranks.tiktoken
    name: str = ""  # folder under data/; empty: python, or the first input's name
    out: str = "data"  # where the folder goes
    val_fraction: float = 0.05  # share of the documents that becomes validation text
    key: str = "text"  # the field of a .jsonl record or the column of a .parquet file

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}, but must lie between 0 and 1")


# ----------------------------------------------------------------------------------------------- tokenizers


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """`bytes`, a path to a file of ranks (.tiktoken), or a name that tiktoken knows. Raises BadInput."""
    if name == "bytes":
        return make_tokenizer("bytes", r"\S+|\s+", {bytes([i]): i for i in range(256)})
    if name.endswith(".tiktoken") or "/" in name:
        try:
            return make_tokenizer(Path(name).stem, GPT2_PATTERN, ranks_from_text(Path(name).read_bytes()))
        except OSError as error:
            raise BadInput(f"--tokenizer {name} cannot be read: {error.strerror}") from None
        except ValueError:
            raise BadInput(f"--tokenizer {name} is not a file of ranks: each line wants a base64 token and its rank") from None
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(tiktoken.list_encoding_names())
        raise BadInput(f"--tokenizer {name} is unknown: want bytes, a path to ranks.tiktoken, or one of {known}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken downloads the ranks: whatever the network did
        reason = str(error).splitlines()[0][:120]
        raise BadInput(f"--tokenizer {name} could not be downloaded ({reason}); give a path to a local ranks.tiktoken instead") from None


def make_tokenizer(name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int] | None = None) -> tiktoken.Encoding:
    """An Encoding from its parts; without special tokens it gets <|endoftext|> as its last. Raises ValueError."""
    if sorted(ranks.values()) != list(range(len(ranks))) and special is None:
        raise ValueError("ranks must count up from 0")
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special or {END: len(ranks)})


def ranks_from_text(text: bytes) -> dict[bytes, int]:
    """The lines `base64-token rank` of a .tiktoken file. Raises ValueError."""
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in (line.split() for line in text.splitlines() if line)}
    if not ranks:
        raise ValueError("no ranks")
    return ranks


def ranks_to_text(tokenizer: tiktoken.Encoding) -> bytes:
    """The inverse of ranks_from_text."""
    ranks = sorted(tokenizer._mergeable_ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)


def describe(tokenizer: tiktoken.Encoding) -> dict:
    """What meta.json and a checkpoint say about a tokenizer, beside its ranks."""
    return {"name": tokenizer.name, "pattern": tokenizer._pat_str, "special": tokenizer._special_tokens,
            "vocab_size": tokenizer.n_vocab, "sha256": hashlib.sha256(ranks_to_text(tokenizer)).hexdigest()}


def restore_tokenizer(description: dict, ranks: bytes) -> tiktoken.Encoding:
    """The inverse of describe and ranks_to_text. Raises ValueError where the two do not belong together."""
    if hashlib.sha256(ranks).hexdigest() != description["sha256"]:
        raise ValueError("the ranks are not those that the sha256 was made of")
    return make_tokenizer(description["name"], description["pattern"], ranks_from_text(ranks), description["special"])


# ------------------------------------------------------------------------------------------------ documents


def find_files(inputs: list[str]) -> list[Path]:
    """The files behind the inputs, folders searched for all that we read, sorted. Raises BadInput for what is not there."""
    files = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and (p.suffix.lower() in TEXT or p.name.endswith(RECORDS)))
            if not found:
                raise BadInput(f"{path} holds no text: want .txt, .md, source files, .jsonl, .jsonl.gz, .jsonl.zst or .parquet")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise BadInput(f"{path} does not exist; want files or folders of text")
    return files


def standard_library() -> list[Path]:
    """Every .py file of the running Python's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))


def read_documents(path: Path, key: str = "text") -> Iterator[str | None]:
    """The documents of one file, in order; None for one that is not UTF-8 text. Raises BadInput for a broken file."""
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            yield from _parquet(path, key)
        elif name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
            with _lines(path) as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _record(line, key, f"{path}, line {number}")
        else:
            data = path.read_bytes()
            try:
                yield None if b"\0" in data else data.decode("utf-8")
            except UnicodeDecodeError:
                yield None
    except (OSError, EOFError) as error:
        raise BadInput(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _lines(path: Path):
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.endswith(".zst"):
        zstandard = _optional("zstandard", path)
        return zstandard.open(path, "rb")
    return open(path, "rb")


def _record(line: bytes, key: str, where: str) -> str | None:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return None
    except ValueError:
        raise BadInput(f"{where}: not JSON; a .jsonl file holds one object a line") from None
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        raise BadInput(f"{where}: no text under {key!r}; --key names the field that holds it")
    return record[key]


def _parquet(path: Path, key: str) -> Iterator[str | None]:
    parquet = _optional("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # pyarrow's own errors are ValueErrors
        raise BadInput(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from None
    if key not in file.schema_arrow.names:
        raise BadInput(f"{path}: no column {key!r} among {', '.join(file.schema_arrow.names)}; --key names the column of text")
    for batch in file.iter_batches(columns=[key]):
        yield from batch.column(0).to_pylist()


def _optional(module: str, path: Path):
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        package = module.split(".")[0]
        raise BadInput(f"{path} needs the package {package}: pip install {package}") from None


# ------------------------------------------------------------------------------------------------------ main


def prepare(config: Prepare) -> Path:
    """Writes the folder and returns it. Raises BadInput; then nothing has been written."""
    files = find_files(config.input) if config.input else standard_library()
    name = config.name or (Path(config.input[0]).resolve().name.split(".")[0] if config.input else "python")
    tokenizer, folder = get_tokenizer(config.tokenizer), Path(config.out) / name
    settings = {"input": config.input, "tokenizer": config.tokenizer, "val_fraction": config.val_fraction, "key": config.key}
    if folder.exists():
        if _read_settings(folder) == settings:
            print(f"{folder} was prepared before with these settings: left as it is")
            return folder
        raise BadInput(f"{folder} exists already, with other settings: remove it, or choose another --name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        meta = {"settings": settings} | _write(files, config, tokenizer, temporary)
        (temporary / "ranks.tiktoken").write_bytes(ranks_to_text(tokenizer))
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        os.chmod(temporary, 0o755)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    return folder


def _read_settings(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "meta.json").read_text())["settings"]
    except (OSError, ValueError, KeyError):
        return None


def _write(files: list[Path], config: Prepare, tokenizer: tiktoken.Encoding, folder: Path) -> dict:
    end, dtype = tokenizer._special_tokens.get(END, tokenizer.eot_token), np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    counts = {split: {"documents": 0, "bytes": 0, "tokens": 0} for split in ("train", "val")}
    seen, same, skipped = set(), 0, 0
    threshold = int(config.val_fraction * 2**32)
    out = {split: open(folder / f"{split}.bin", "wb") for split in counts}
    size = sum(p.stat().st_size for p in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc="tokenizing", disable=not sys.stderr.isatty()) as bar:
        for path in files:
            documents, batch = read_documents(path, config.key), []
            while True:
                document = next(documents, StopIteration)
                if document is not StopIteration:
                    if document is None or not document.strip():
                        skipped += 1
                        continue
                    digest = hashlib.sha256(document.encode("utf-8", "replace")).digest()
                    if digest[:16] in seen:
                        same += 1
                        continue
                    seen.add(digest[:16])
                    batch.append((document, "val" if int.from_bytes(digest[16:20], "big") < threshold else "train"))
                if batch and (document is StopIteration or len(batch) == 256):
                    for (text, split), tokens in zip(batch, tokenizer.encode_ordinary_batch([text for text, _ in batch], num_threads=os.cpu_count() or 1)):
                        np.array([*tokens, end], dtype).tofile(out[split])
                        counts[split]["documents"] += 1
                        counts[split]["bytes"] += len(text.encode("utf-8", "replace"))
                        counts[split]["tokens"] += len(tokens) + 1
                    batch = []
                if document is StopIteration:
                    break
            bar.update(path.stat().st_size)
    for file in out.values():
        file.close()
    if not seen:
        raise BadInput(f"no text in {len(files)} file(s): {skipped} were empty or not UTF-8")
    if not all(counts[split]["tokens"] for split in counts):
        _cut_tail(folder, counts, config.val_fraction, dtype, tokenizer)
    return {"tokenizer": describe(tokenizer), "dtype": np.dtype(dtype).name,
            "train": counts["train"], "val": counts["val"], "identical": same, "skipped": skipped}


def _cut_tail(folder: Path, counts: dict, fraction: float, dtype, tokenizer: tiktoken.Encoding) -> None:
    """So few documents that all fell on one side: the end of the text becomes the validation text instead."""
    full = "train" if counts["train"]["tokens"] else "val"
    tokens, documents = np.fromfile(folder / f"{full}.bin", dtype), counts[full]["documents"]
    cut = max(1, round(len(tokens) * (1 - fraction)))
    for split, part in (("train", tokens[:cut]), ("val", tokens[cut:])):
        part.tofile(folder / f"{split}.bin")
        ends = int((part == tokens[-1]).sum())
        text_bytes = sum(map(len, tokenizer.decode_tokens_bytes(part[part != tokens[-1]].tolist())))
        counts[split] = {"documents": ends or documents, "bytes": text_bytes, "tokens": len(part)}


def main() -> None:
    config = configure(Prepare)
    folder = prepare(config)
    meta = json.loads((folder / "meta.json").read_text())
    for split in ("train", "val"):
        print(f"{folder}/{split}.bin: {meta[split]['tokens']:,} tokens of {meta[split]['documents']:,} documents, {meta[split]['bytes']:,} bytes")
    print(f"tokenizer {meta['tokenizer']['name']}, vocabulary {meta['tokenizer']['vocab_size']:,}; "
          f"identical documents left out: {meta['identical']:,}; empty or not UTF-8: {meta['skipped']:,}")


if __name__ == "__main__":
    run(main)
