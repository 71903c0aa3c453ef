"""A small byte-pair encoding of one's own text: python prepare.py --tokenizer=bpe:1024.

What is notable here:
* The package `tokenizers` learns it. What is kept are ranks, as of every tokenizer, and tiktoken encodes.
* It is learnt from documents that become training text: validation text stays unseen.
"""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from common import BadInput, optional
from documents import read_pieces, validates
from tokenizer import alphabet

MOST = 2**28  # characters that are read
EACH = 2**20  # of each document
LONG = r"\S{1000}|\s{1000}"  # cut before it is learnt from: the time grows as the square of a word's length


def train_bpe(files: list[Path], validation: list[Path], config, pattern: str) -> dict[bytes, int]:
    """The ranks that --tokenizer=bpe:N of config, a Prepare, wants: N tokens, <|endoftext|> among them, none
    across the end of a word of `pattern`. validation: those of the files that --val names. Raises BadInput.
    """
    size = config.tokenizer.removeprefix("bpe:")
    if not size.isdecimal() or not 258 <= int(size) <= 2**16:
        raise BadInput(f"--tokenizer={config.tokenizer}: want the size of the vocabulary, from 258 to 65536, "
                       "as in bpe:1024")
    tokenizers = optional("tokenizers", f"--tokenizer={config.tokenizer}")
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    as_letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    long = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LONG), "isolated")
    learner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([long, words, as_letters])
    letters = {letter: byte for byte, letter in enumerate(alphabet())}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=int(size) - 1, initial_alphabet=list(letters),
                                             show_progress=False)
    learner.train_from_iterator(training_text(files, validation, config), trainer)
    ranks = {bytes([i]): i for i in range(256)}
    vocabulary = learner.get_vocab()
    for token in sorted(vocabulary, key=vocabulary.get):  # in the order in which they were merged
        ranks.setdefault(bytes(letters[letter] for letter in token), len(ranks))
    if len(ranks) + 1 < int(size):
        print(f"prepare.py: {config.tokenizer} has only {len(ranks) + 1} tokens: the text holds no more "
              "pairs", file=sys.stderr)
    return ranks


def training_text(files: list[Path], validation: list[Path], config) -> Iterator[str]:
    """The beginnings of the documents that become training text, as long as MOST allows.

    Where so few documents are there that prepare.py cuts its validation text off the end of all text, what is
    learnt from ends well before that.
    """
    held = {digest for _, _, digest in beginnings(validation, config)}

    def held_out(digest: bytes) -> bool:
        return digest in held if validation else validates(digest, config.val_fraction)

    total = 0  # characters
    sides = set()  # whether some are held out, and some not
    for _, size, digest in beginnings(files, config):
        total += size
        sides.add(held_out(digest))
    cut = len(sides) == 1 and not validation
    room = int(total * (1 - config.val_fraction) ** 2) if cut else total  # of all text, may be learnt from
    left = MOST
    for text, size, digest in beginnings(files, config):
        if min(left, room) <= 0:
            return
        if cut or not held_out(digest):
            yield text[:room]
            left -= len(text)
            room -= size


def beginnings(files: list[Path], config) -> Iterator[tuple[str, int, bytes]]:
    """Of each document: its first characters, how many it has, and the SHA-256 of them all."""
    for path in files:
        text = ""
        size = 0
        digest = hashlib.sha256()
        for piece in read_pieces(path, config.key, config.separator):
            new = piece.text or ""
            digest.update(new.encode())
            text += new[: EACH - len(text)]
            size += len(new)
            if piece.ends:
                yield text, size, digest.digest()
                text = ""
                size = 0
                digest = hashlib.sha256()
