"""Tokenizers: bytes, tiktoken's own, files of ranks, and Hugging Face's tokenizer.json, read and written.

What is notable here:
* Every tokenizer is a tiktoken.Encoding, bytes too: a pattern cuts text into words, and ranks say which two
  neighbouring tokens of a word are joined first.
* A description and the lines of its ranks are all there is to a tokenizer: they lie in checkpoints and beside
  prepared text.
* Of tokenizer.json, byte-level BPE is read: its bytes are written in GPT-2's alphabet, and its tokens must be
  numbered in the order in which they are merged, as a rank is both.
"""

import base64
import hashlib
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import tiktoken

from common import BadInput, load_checkpoint, read_json, reason
from configurator import misfit

END = "<|endoftext|>"  # ends every document
# GPT-2's pattern, which a file of ranks gets, since it carries none of its own
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# The same on what is left when digits are cut out first, so that a word ends where a digit follows
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}%s| ?[^\s\p{L}\p{N}]++|\s+(?![^\s\p{N}])|\s+"
REPEATED = re.compile(r"(\{\d*,?\d*\})\+")  # possessive here; Hugging Face's tokenizers repeat it once more


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """`bytes`, a file of ranks (.tiktoken), a tokenizer.json, a run or checkpoint, or a name of tiktoken's.

    Raises BadInput.
    """
    if name == "bytes":
        return make_tokenizer("bytes", r"\S+|\s+", {bytes([i]): i for i in range(256)})
    if name.endswith(".pt") or Path(name).is_dir():
        return load_checkpoint(name, parts=False)[1]
    if name.endswith(".json"):
        return from_json(Path(name), None)
    if name.endswith(".tiktoken") or "/" in name:
        try:
            return make_tokenizer(Path(name).stem, GPT2_PATTERN, ranks_from_text(Path(name).read_bytes()))
        except (OSError, ValueError) as error:
            raise BadInput(f"--tokenizer {name} is not a file of ranks: {reason(error)}") from None
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(tiktoken.list_encoding_names())
        raise BadInput(f"--tokenizer {name}: want bytes, a path to ranks.tiktoken or tokenizer.json, a run, "
                       f"or one of {known}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken downloads the ranks: whatever the network did
        raise BadInput(f"--tokenizer {name} could not be downloaded ({reason(error)}); "
                       "give a path to a local ranks.tiktoken instead") from None


class Normalizing(tiktoken.Encoding):
    """Two things that Hugging Face's tokenizers also do: text takes Unicode's form NFC first, where `nfc` is
    true, and bytes without a token are left out.
    """

    def __init__(self, name: str, pattern: str, ranks: dict, special: dict, nfc: bool) -> None:
        self.nfc = nfc
        beyond = max(*ranks.values(), *special.values()) + 1
        missing = [byte for byte in map(bytes, zip(range(256))) if byte not in ranks]
        numbers = {byte: beyond + i for i, byte in enumerate(missing)}
        super().__init__(name, pat_str=pattern, mergeable_ranks=ranks | numbers, special_tokens=special)
        self._mergeable_ranks = ranks
        self.max_token_value = beyond - 1

    def encode_ordinary(self, text: str) -> list[int]:
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        return [token for token in super().encode_ordinary(text) if token <= self.max_token_value]


def make_tokenizer(name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int] | None = None,
                   nfc: bool = False) -> tiktoken.Encoding:
    """A tokenizer; without special tokens it gets <|endoftext|> as its last. Raises ValueError."""
    whole = all(bytes([i]) in ranks for i in range(256))
    if special is None and not (whole and sorted(ranks.values()) == list(range(len(ranks)))):
        raise ValueError("ranks must count up from 0, and each of the 256 bytes must have one")
    special = special or {END: len(ranks)}
    ids = [*ranks.values(), *special.values()]
    if not all(type(i) is int and 0 <= i < len(ranks) + 10_000 for i in ids) or len(set(ids)) < len(ids):
        raise ValueError("a token's number must be its own, and not far beyond how many there are")
    if END not in special:
        raise ValueError(f"{END} must be a token")
    if nfc or not whole:
        return Normalizing(name, pattern, ranks, special, nfc)
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def ranks_from_text(text: bytes) -> dict[bytes, int]:
    """The lines `base64-token rank` of a .tiktoken file. Raises ValueError."""
    ranks = {}
    for line in filter(None, text.splitlines()):
        token, rank = line.split()
        ranks[base64.b64decode(token, validate=True)] = int(rank)
    return ranks


def ranks_to_text(tokenizer: tiktoken.Encoding) -> bytes:
    """The inverse of ranks_from_text."""
    ranks = sorted(tokenizer._mergeable_ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)


def describe(tokenizer: tiktoken.Encoding) -> dict:
    """What meta.json and a checkpoint say about a tokenizer, beside its ranks."""
    about = {"name": tokenizer.name, "pattern": tokenizer._pat_str, "special": tokenizer._special_tokens,
             "vocab_size": tokenizer.n_vocab, "sha256": hashlib.sha256(ranks_to_text(tokenizer)).hexdigest()}
    return about | ({"nfc": True} if getattr(tokenizer, "nfc", False) else {})


def restore_tokenizer(description: dict, ranks: bytes) -> tiktoken.Encoding:
    """The inverse of describe and ranks_to_text. Raises ValueError where the two do not belong together."""
    if hashlib.sha256(ranks).hexdigest() != description["sha256"]:
        raise ValueError("the ranks are not those that the sha256 was made of")
    name, pattern, special = (description[key] for key in ("name", "pattern", "special"))
    return make_tokenizer(name, pattern, ranks_from_text(ranks), special, description.get("nfc") is True)


def same_tokens(a: dict, b: dict) -> bool:
    """Whether two descriptions are of the same tokenizer, whatever its name."""
    return a | {"name": ""} == b | {"name": ""}


def dtype_of(tokenizer: tiktoken.Encoding) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32)


# --------------------------------------------------------------------------------------------- tokenizer.json


def alphabet() -> list[str]:
    """GPT-2's character for each of the 256 bytes: itself where it can be seen, else one from U+0100 on."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte if byte in seen else 256 + hidden.index(byte)) for byte in range(256)]


def pattern_of(pre: dict | None) -> str | None:
    """The pattern that cuts text as a pre_tokenizer does; None for one that no single pattern can express."""
    parts = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre or {"type": None}]
    *first, last = parts
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    kinds = [part["type"] for part in first]
    by_gpt2 = last.get("use_regex", True)
    if kinds == [] and by_gpt2:
        return GPT2_PATTERN
    if kinds == ["Digits"] and by_gpt2:
        return DIGITS_PATTERN % ("" if first[0]["individual_digits"] else "++")
    isolated = kinds == ["Split"] and first[0]["behavior"] == "Isolated" and not first[0].get("invert")
    pattern = first[0]["pattern"].get("Regex") if isolated and not by_gpt2 else None
    return None if REPEATED.search(pattern or "") else pattern


def leaves_out(pattern: str) -> str:
    """The characters of Unicode's first plane that a pattern does not match: tiktoken would lose them."""
    text = "".join(chr(i) for i in range(0x10000) if not 0xD800 <= i < 0xE000)
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    try:
        found = bytes(encoding.encode_ordinary(text)).decode("utf-8", "replace")
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # tiktoken's own, which is no Exception
            raise
        raise ValueError(f"the pattern {pattern!r} cannot be used") from None
    return "".join(sorted(set(text) - set(found)))


def from_json(path: Path, end: int | None) -> tiktoken.Encoding:
    """A tokenizer.json of byte-level BPE → the Encoding that gives the same tokens for the same text.

    end: the number of the token that ends a text, which is called <|endoftext|> here if no token is called
    so. Added tokens are special ones: they are not looked for in text. Raises BadInput.
    """
    try:
        spec = read_json(path)
        return _from_spec(spec, path.resolve().parent.name, end)
    except (OSError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{path} cannot be used: {misfit(error)}") from None


def in_front(path: Path) -> list[str]:
    """The special tokens that a tokenizer.json puts in front of a text, which `from_json` leaves out.

    Raises BadInput.
    """
    found = []
    try:
        last = read_json(path).get("post_processor") or {}
        for processor in last.get("processors", [last]):
            for step in processor.get("single", []):
                if "SpecialToken" not in step:
                    break
                found.append(str(step["SpecialToken"]["id"]))
    except (OSError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{path} cannot be used: {misfit(error)}") from None
    return found


def _from_spec(spec: dict, name: str, end: int | None) -> tiktoken.Encoding:
    model = spec["model"]
    vocabulary = model["vocab"]
    kind = model.get("type", "BPE")
    if kind != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece's" if model.get("byte_fallback") else f"a {kind} model"
        raise ValueError(f"it is {kind}, but must be byte-level BPE, as of SmolLM, Llama 3 and Qwen")
    for feature in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(feature):
            raise ValueError(f"{feature} {model[feature]!r} is not supported")
    normalizer = spec.get("normalizer") or {"type": "Sequence", "normalizers": []}
    forms = [form["type"] for form in normalizer.get("normalizers", [normalizer])]
    if not {*forms} <= {"NFC"}:
        raise ValueError(f"the normalizer {' + '.join(forms)} is not supported: want none, or NFC")
    pattern = pattern_of(spec.get("pre_tokenizer"))
    if pattern is None:
        raise ValueError("its pre_tokenizer is not supported: want ByteLevel without add_prefix_space, alone "
                         "or after one isolating Split or Digits")
    if lost := leaves_out(pattern):
        raise ValueError(f"the pattern {pattern} does not match {len(lost)} characters, as {lost[0]!r}")

    # Special tokens; a blank one that is not special would be looked for in text.
    special = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    for token in spec.get("added_tokens", []):
        if not token["special"] and not token["content"].strip():
            raise ValueError(f"the added token {token['content']!r} cuts text, which is not supported")

    # Ranks: bytes, and what merges make, in the order of the merges.
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    made = [vocabulary[left + right] for left, right in merges]
    if made != sorted(made):
        raise ValueError("its tokens are not numbered in the order of its merges, as ranks are")
    reached = {left + right for left, right in merges}
    byte_of = {character: byte for byte, character in enumerate(alphabet())}
    if model.get("unk_token") and not byte_of.keys() <= vocabulary.keys():
        raise ValueError(f"unk_token {model['unk_token']!r} for bytes without a token is not supported")
    ranks = {}
    for token, number in vocabulary.items():
        if token not in special and (len(token) == 1 or token in reached or model.get("ignore_merges")):
            ranks[bytes(byte_of[character] for character in token)] = number

    if not ranks:
        raise ValueError("its vocab holds no token")

    # Every number up to the last is a token's; one of them ends a text.
    taken = {*ranks.values(), *special.values()}
    special |= {f"<|unused {i}|>": i for i in range(min(max(taken), len(ranks) + 10_000)) if i not in taken}
    if END not in special:
        names = {number: name for name, number in special.items()}
        if end not in names:
            raise ValueError(f"no token ends a text: want {END}, or eos_token_id in config.json")
        del special[names[end]]
        special[END] = end
    return make_tokenizer(name, pattern, ranks, special, "NFC" in forms)


def to_json(tokenizer: tiktoken.Encoding) -> str:
    """The tokenizer.json of a tokenizer, from which Hugging Face's `tokenizers` makes the same tokens.

    At the end of an alternative {1,3} says what tiktoken's possessive {1,3}+ does; elsewhere ValueError.
    """
    letters = alphabet()
    pattern = re.sub(REPEATED.pattern + r"(?=[|)]|$)", r"\1", tokenizer._pat_str)
    if REPEATED.search(pattern):
        raise ValueError(f"the pattern {pattern} means something else in Hugging Face's tokenizers")
    ranks = tokenizer._mergeable_ranks
    vocabulary = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = halves(token, ranks)
        if len(parts) == 2:
            merges.append(["".join(letters[byte] for byte in part) for part in parts])
    added = []
    for content, number in sorted(tokenizer._special_tokens.items(), key=lambda item: item[1]):
        about = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added.append({"id": number, "content": content} | about)
        vocabulary[content] = number  # or else it would be numbered behind all others
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": True,  # tiktoken takes a word that is a token as it stands, too
             "vocab": vocabulary, "merges": merges}
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"} if getattr(tokenizer, "nfc", False) else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, level]},
        "post_processor": None, "decoder": level | {"use_regex": True}, "model": model}, ensure_ascii=False)


def halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that a token is merged from; other than two where merging does not lead to it."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(left + right, ranks[token]) for left, right in zip(parts, parts[1:])]
        first = min(range(len(joined)), key=joined.__getitem__)
        if joined[first] >= ranks[token]:
            break
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts
