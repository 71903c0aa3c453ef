"""A task whose difficulty is known, to see how far a model can follow, and where it thinks.

    python prepare.py --task=hops                      data/hops, in seconds
    python train.py config/hops.py                     two layers that think
    python tasks.py out/hops                           accuracy and latent steps against the number of hops

A document is a permutation, as a table of pairs in random order, and questions "from x, go h hops":

    bf ad hg ec fh db ca ge;1ad2df3dh …      once from a: d; twice from d: b, then f

What is notable here:
* The permutation is one cycle, so that within 4 hops of 8 symbols no answer is the question's own symbol, and
  none is nearer by going backwards. No question is asked twice.
* Of a question only the last symbol can be known; its number and its first symbol are noise, as is most of
  the table: a router that spends steps there mistakes what nobody can predict for what is hard.
"""

from common import answer_help

answer_help(__file__)

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F

import figures
from common import (BadInput, about, check_apart, check_output, configure, load_checkpoint, pick_device, run,
                    table, turn, write_whole)
from prepare import Data
from tokenizer import describe, same_tokens

SYMBOLS = "abcdefgh"
HOPS = 4  # most of a question
QUESTIONS = 12  # of a document


@dataclass
class Tasks:
    run: str = "out/hops"  # a run's folder, or a checkpoint
    data: str = "data/hops"  # folder that prepare.py --task=hops wrote
    documents: int = 500  # of the validation text, or as many as there are
    tau: float | None = None  # threshold of reach; None: as trained
    max_latent: int | None = None  # most latent steps; None: as trained
    device: str = ""  # cpu, cuda, cuda:N or mps; empty: cuda where there is one
    json: str = ""  # also write the table to this file
    plot: str = ""  # and draw it (.png, .svg or .pdf)


def hops(documents: int = 60_000, seed: int = 0) -> Iterator[str]:
    """The documents of the task, each with a permutation of its own."""
    dice = random.Random(seed)
    for _ in range(documents):
        cycle = dice.sample(SYMBOLS, len(SYMBOLS))
        image = dict(zip(cycle, cycle[1:] + cycle[:1]))
        pairs = [x + y for x, y in image.items()]
        questions = []
        for x in SYMBOLS:
            y = x
            for h in range(1, HOPS + 1):
                y = image[y]
                questions.append(f"{h}{x}{y}")
        dice.shuffle(pairs)
        yield f"{' '.join(pairs)};{''.join(dice.sample(questions, QUESTIONS))}"


def answers(model, data, documents: int) -> list[dict]:
    """Accuracy and mean latent steps where h hops answer, h = 1, 2, …, and the steps at all other tokens."""
    length = data.document
    if length > model.config.block_size + 1:
        raise BadInput(f"{length} tokens of a document do not fit block_size {model.config.block_size}: want "
                       f"a run that was trained with --block_size={length - 1} or more")
    tokens = np.asarray(data.tokens["val"][: documents * length], dtype=np.int64)
    idx = torch.from_numpy(tokens).view(-1, length)
    right, steps = [], []
    for some in idx.split(64):
        with torch.no_grad():
            out = model(some[:, :-1].to(model.embed.weight.device))
        right.append(out.logits.argmax(2).cpu() == some[:, 1:])
        steps.append(out.steps.cpu())
        del out  # or its logits and its cache would outlive the next forward
    right, steps = torch.cat(right), torch.cat(steps)  # (documents, length - 1)
    rows, asked = [], torch.zeros_like(right)
    for h in range(1, HOPS + 1):
        here = F.pad(idx[:, :-2] == data.tokenizer.encode(str(h))[0], (1, 0))  # the symbol behind the number
        asked |= here
        if here.any():
            rows.append({"hops": h, "accuracy": right[here].double().mean().item(),
                         "steps": steps[here].double().mean().item()})
    return [*rows, {"hops": None, "accuracy": None, "steps": steps[~asked].double().mean().item()}]


def main() -> None:
    config = configure(Tasks, positional=("run",))
    check_apart(config, "run", "data", "json", "plot")
    if config.json:
        check_output(config.json, "--json")
    if config.plot:
        figures.check_figure(config.plot, "--plot")
    model, tokenizer, _ = load_checkpoint(config.run, pick_device(config.device))
    data = Data(config.data, 1)
    if data.document == 1:  # nor do documents of an older task say how long they are
        raise BadInput(f"--data={config.data} is not of prepare.py --task=hops, or of an older one")
    if not same_tokens(describe(tokenizer), describe(data.tokenizer)):
        raise BadInput(f"{config.run} was trained with another tokenizer than that of --data={config.data}")
    turn(model, config.run, config.tau, config.max_latent)
    config.documents = min(config.documents, len(data.tokens["val"]) // data.document)
    if config.documents == 0:
        raise BadInput(f"{config.data} holds no whole document of validation text: prepare it anew, with the "
                       "default --val_fraction")
    rows = answers(model, data, config.documents)
    shown = [[row["hops"] or "elsewhere", "" if row["accuracy"] is None else f"{row['accuracy']:.1%}",
              f"{row['steps']:.2f}"] for row in rows]
    written = []
    try:
        if config.json:
            content = {"settings": asdict(config), **about(config.device), "rows": rows}
            write_whole(config.json, json.dumps(content, indent=1, allow_nan=False) + "\n")
            written.append(config.json)
        if config.plot:
            figures.save(figures.steps_against_hops(rows), config.plot)
            written.append(config.plot)
    finally:
        print(table(["hops", "accuracy", "mean latent steps"], shown))
        print(f"\n{config.documents} documents of the validation text")
        for path in written:
            print(f"written: {path}")


if __name__ == "__main__":
    run(main)
