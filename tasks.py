"""A task whose difficulty is known, to see whether a model thinks longer where more steps are needed.

    python prepare.py --task=hops                      data/hops, in seconds
    python train.py config/hops.py                     two layers that may think
    python tasks.py out/hops                           accuracy and latent steps against the number of hops

A document is a permutation, as a table of pairs in random order, and questions "apply it h times to x":

    bf ad ec fe db ca;a1d d2f f4d …      a, once: d; d, twice: d → b → f

What is notable here:
* Every question that a table allows is asked once, in random order: no answer stands there already.
* Only the last symbol of a question can be known. The rest is noise of known entropy: steps spent there
  take what nobody can predict for what is hard.
"""

from common import answer_help

answer_help(__file__)

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch

from common import (BadInput, about, check_output, configure, load_checkpoint, pick_device, run, table,
                    turn, write_whole)
from prepare import Data
from tokenizer import describe, same_tokens

SYMBOLS = "abcdef"
HOPS = 4  # most of a question


@dataclass
class Tasks:
    run: str = "out/hops"  # a run's folder, or a checkpoint
    data: str = "data/hops"  # folder that prepare.py --task=hops wrote
    documents: int = 500  # of the validation text
    tau: float | None = None  # threshold of reach; None: as trained
    max_latent: int | None = None  # most latent steps; None: as trained
    device: str = ""  # cpu, cuda or mps; empty: cuda where there is one
    json: str = ""  # also write the table to this file


def hops(documents: int = 60_000, seed: int = 0) -> Iterator[str]:
    """The documents of the task, each with a permutation of its own, a line each."""
    dice = random.Random(seed)
    for _ in range(documents):
        image = dict(zip(SYMBOLS, dice.sample(SYMBOLS, len(SYMBOLS))))
        pairs = [x + y for x, y in image.items()]
        questions = []
        for x in SYMBOLS:
            y = x
            for h in range(1, HOPS + 1):
                y = image[y]
                questions.append(f"{x}{h}{y}")
        dice.shuffle(pairs)
        dice.shuffle(questions)
        yield f"{' '.join(pairs)};{' '.join(questions)}\n"


def answers(model, data, documents: int) -> list[dict]:
    """Accuracy and mean latent steps where h hops answer, h = 1, 2, …, and the steps at all other tokens."""
    tokens = np.asarray(data.tokens["val"], dtype=np.int64)
    end = data.tokenizer.eot_token
    texts = np.split(tokens, np.flatnonzero(tokens == end) + 1)[:documents]
    length = max(map(len, texts))
    whole = [text for text in texts if len(text) == length and text[-1] == end]  # all but a cut one
    if not whole or length > model.config.block_size:
        raise BadInput(f"{length} tokens of a document do not fit block_size {model.config.block_size}")
    idx = torch.from_numpy(np.stack(whole)).to(model.embed.weight.device)
    with torch.no_grad():
        parts = [model(rows[:, :-1]) for rows in idx.split(64)]
    right = torch.cat([part.logits.argmax(2) for part in parts]) == idx[:, 1:]  # (documents, length - 1)
    steps = torch.cat([part.steps for part in parts])
    rows, asked = [], torch.zeros_like(right)
    for h in range(1, HOPS + 1):
        here = idx[:, :-1] == data.tokenizer.encode(str(h))[0]
        asked |= here
        rows.append({"hops": h, "accuracy": right[here].double().mean().item(),
                     "steps": steps[here].double().mean().item()})
    return [*rows, {"hops": None, "accuracy": None, "steps": steps[~asked].double().mean().item()}]


def main() -> None:
    config = configure(Tasks, positional=("run",))
    if config.json:
        check_output(config.json, "--json")
    model, tokenizer, _ = load_checkpoint(config.run, pick_device(config.device))
    data = Data(config.data, 1)
    if data.meta["settings"].get("task") != "hops":
        raise BadInput(f"--data={config.data} is not of prepare.py --task=hops")
    if not same_tokens(describe(tokenizer), describe(data.tokenizer)):
        raise BadInput(f"{config.run} was trained with another tokenizer than that of --data={config.data}")
    turn(model, config.run, config.tau, config.max_latent)
    rows = answers(model, data, config.documents)
    shown = [[row["hops"] or "elsewhere", "" if row["accuracy"] is None else f"{row['accuracy']:.1%}",
              f"{row['steps']:.2f}"] for row in rows]
    print(table(["hops", "accuracy", "mean latent steps"], shown))
    if config.json:
        content = {"settings": asdict(config), **about(), "rows": rows}
        write_whole(config.json, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
