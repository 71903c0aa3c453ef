"""What a checkpoint is worth: perplexity, accuracy on the field's tasks, and where its thinking goes.

    python eval.py out/tiny                                  perplexity on the validation text of its data
    python eval.py out/tiny --text wiki.txt books/ --sweep   of other text, by threshold and length of thought
    python eval.py out/tiny --analyze --html=page.html       which tokens are thought about, and if it helps
    python eval.py out/tiny --tasks paper --num_fewshot 0 5  lm-evaluation-harness: the paper's nine tasks

What is notable here:
* One engine, score.py, is behind all numbers; the batch size changes speed, not results.
* Of a large .bin only the tokens that are evaluated are read, and some windows are in memory at a time.
"""

from common import answer_help

answer_help(__file__)

import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import figures
from analysis import analyze, draw, further_steps, print_numbers
from common import (BadInput, about, autocast, check_apart, check_output, check_read, configure,
                    enough_memory, load_checkpoint, pick_device, precision, run, turn, write_whole)
from documents import check_settings, encode, find_files, read_pieces
from fast import lay_out
from model import LLaMA
from page import dials, explain, html_page
from prepare import Data
from schedule import is_adaptive, most_latent
from score import Tally, score, windows
from tokenizer import describe, dtype_of, same_tokens

TAUS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)  # what --sweep tries; 0 always thinks to the end
MOST = 1_000_000  # tokens of a run's own val.bin that are read, unless --max_tokens says otherwise
READ = {"--text": "key separator", "--tasks": "num_fewshot include_path limit", "--analyze": "plot",
        "--sweep": "plot", "what reads text": "stride max_tokens"}  # settings that only these read


@dataclass
class Eval:
    run: str = "out/tiny"  # folder of a run, or a checkpoint
    text: list[str] = field(default_factory=list)  # files, folders, a .bin; empty: the run's own val.bin
    key: str = "text"  # the field of a .jsonl record or the column of a .parquet file
    separator: str = ""  # between the documents of a text file, \n and \r allowed; empty: a file is one
    max_tokens: int | None = None  # read only so many tokens; None: all of --text, or a million of val.bin
    stride: int | None = None  # tokens that each window after the first counts; None: half the context
    batch_size: int = 8  # windows of text, or requests of a task, in one forward
    tau: float | None = None  # τ at test time: higher halts sooner
    max_latent: int | None = None  # most latent steps at test time
    sweep: bool = False  # perplexity against steps: every τ (or the given one), every ℓ_max up to max_latent
    analyze: bool = False  # which tokens of the text are thought about, and what each further step brings
    tasks: list[str] = field(default_factory=list)  # of lm-evaluation-harness; paper: the nine of the paper
    num_fewshot: list[int] = field(default_factory=lambda: [0])  # solved examples before a question
    include_path: str = ""  # folder of more task files (YAML)
    limit: int | None = None  # only the first so many questions of each task
    html: str = ""  # write the first 2,000 tokens here as a page that shows what was thought about them
    plot: str = ""  # draw what --analyze and --sweep find here (.png, .svg or .pdf)
    json: str = ""  # write all numbers here; empty: they are only printed
    device: str = ""  # cpu, cuda, cuda:N or mps; empty: cuda where there is one
    dtype: str = ""  # bfloat16 or float32; empty: what the device does well

    def __post_init__(self) -> None:
        chosen = [flag for flag in READ if flag.startswith("--") and getattr(self, flag[2:])]
        if self.text or self.sweep or self.analyze or self.html or not self.tasks:
            chosen.append("what reads text")
        check_read(self, READ, chosen, "")
        check_apart(self, "run", "text", "html", "plot", "json")
        self.tasks = [name for word in self.tasks for name in word.split(",") if name]


# ----------------------------------------------------------------------------------------------------- text


def read_text(paths: list[str], tokenizer, key="text", separator="", most: int | None = None) -> np.ndarray:
    """The first `most` tokens of files, folders and .bin files; <|endoftext|> ends every document.

    A single .bin stays a memory map. Raises BadInput for what cannot be read, and for less than two tokens.
    """
    where = " ".join(paths)
    parts = [np.zeros(0, np.uint16)]
    room = most or sys.maxsize
    for part in read_parts(paths, tokenizer, key, separator):
        parts.append(part[:room])
        room -= len(parts[-1])
        if room == 0:
            break
    ids = parts[1] if len(parts) == 2 else np.concatenate(parts)
    if (ids[:MOST] != tokenizer.eot_token).sum() < 2:
        raise BadInput(f"{where}: fewer than two tokens of text, but each is predicted from those before")
    if ids.max() >= tokenizer.n_vocab:
        raise BadInput(f"{where} holds token {ids.max()}, beyond the vocabulary of {tokenizer.n_vocab}")
    return ids


def read_parts(paths: list[str], tokenizer, key: str, separator: str) -> Iterator[np.ndarray]:
    """The tokens of each .bin, and of each piece of a document, in order."""
    found = [(path, [] if path.endswith(".bin") else find_files([path])) for path in paths]
    check_settings(sum((files for _, files in found), []), key, separator)
    for path, files in found:
        if path.endswith(".bin"):
            yield read_bin(Path(path), tokenizer)
        for file in files:
            tokens = []
            blank = True
            broken = False
            for piece in read_pieces(file, key, separator):
                new = None if broken or piece.text is None else encode(tokenizer, [piece.text])[0]
                if new is None and not broken:
                    print(f"eval.py: {file}: left out from where a document is no text", file=sys.stderr)
                    broken = True
                tokens += new or []
                blank = blank and not (piece.text or "").strip()
                if piece.ends:
                    tokens.append(tokenizer.eot_token)
                if not blank:
                    yield np.array(tokens, dtype_of(tokenizer))
                    tokens = []
                if piece.ends:
                    tokens = []
                    blank = True
                    broken = False


def read_bin(path: Path, tokenizer) -> np.ndarray:
    """A train.bin or val.bin of prepare.py, as a memory map. Raises BadInput for another tokenizer's."""
    if path.stem not in ("train", "val") or not path.is_file():
        raise BadInput(f"{path} is not a train.bin or val.bin of prepare.py, or does not exist")
    data = Data(str(path.parent), block_size=1)
    if not same_tokens(describe(data.tokenizer), describe(tokenizer)):
        raise BadInput(f"{path} has another tokenizer, {data.tokenizer.name}, than the run: {tokenizer.name}")
    return data.tokens[path.stem]


# ----------------------------------------------------------------------------------------------- perplexity


def score_text(model: LLaMA, ids: np.ndarray, config: Eval, title: str, keep=False) -> tuple[dict, Tensor]:
    """Perplexity of ids (n,) by sliding windows; if kept, what `score` says of all but the first (3, n−1)."""
    began = time.perf_counter()
    tally = Tally()
    nats = 0.0
    kept = [torch.zeros(3, 0)]
    context = model.config.block_size
    pairs = windows(ids, 1, context, config.stride or max(1, context // 2))
    while some := list(itertools.islice(pairs, 64 * config.batch_size)):
        done = f"{title}, {tally.said / (len(ids) - 1):.0%}"
        said = torch.cat(score(model, some, config.batch_size, tally, done), 1)
        nats += said[0].double().sum().item()
        if keep:
            kept.append(said)
    loss = nats / tally.said
    speed = tally.read / (time.perf_counter() - began)
    summary = {"loss": loss, "perplexity": exp(loss), **tally.summary(), "tokens_per_second": speed}
    return summary, torch.cat(kept, 1)


def exp(x: float) -> float:
    return math.exp(min(x, 700))  # a float ends at e^709


def perplexity(model: LLaMA, tokenizer, ids: np.ndarray, config: Eval) -> tuple[dict, Tensor]:
    """The same, and per word and per byte, of all tokens but the first, which nothing predicts."""
    summary, said = score_text(model, ids, config, "perplexity", config.analyze)
    end = tokenizer.eot_token
    words = 0
    size = 0  # bytes
    for first, last in itertools.pairwise([1, *np.flatnonzero(ids == end).tolist(), len(ids)]):
        text = tokenizer.decode_bytes([i for i in ids[first:last].tolist() if i != end])
        words += len(text.decode("utf-8", "replace").split())
        size += len(text)
    nats = summary["loss"] * (len(ids) - 1)
    return {"tokens": len(ids), "words": words, "bytes": size, **summary,
            "word_perplexity": exp(nats / max(1, words)), "byte_perplexity": exp(nats / size),
            "bits_per_byte": nats / math.log(2) / size}, said


def sweep(model: LLaMA, ids: np.ndarray, config: Eval) -> list[dict]:
    """Perplexity and steps by setting of the dials, fewest steps first; best: no other has less of both."""
    own = model.tau, model.max_latent
    has_tau = is_adaptive(model.config)
    points = []
    for most in range(model.max_latent + 1):
        for tau in sorted({*TAUS, own[0]}) if has_tau and config.tau is None and most else [own[0]]:
            model.tau, model.max_latent = tau, most
            summary, _ = score_text(model, ids, config, f"τ {tau}, ℓ_max {most}")
            points.append({"tau": tau if most and has_tau else None, "max_latent": most, **summary})
    model.tau, model.max_latent = own
    points.sort(key=lambda point: (point["latent_steps"], point["loss"]))
    for i, point in enumerate(points):
        point["best"] = all(point["loss"] < other["loss"] for other in points[:i])
    return points


def with_fewer_steps(model: LLaMA, ids: np.ndarray, said: Tensor, config: Eval) -> list[Tensor]:
    """What is said of the same text with at most 0, 1, 2, … steps; last `said` itself, which took most."""
    own = model.max_latent
    found = []
    for most in range(int(said[2].max())):
        model.max_latent = most
        found.append(score_text(model, ids, config, f"at most {most} steps", keep=True)[1])
    model.max_latent = own
    return [*found, said]


# ------------------------------------------------------------------------------------------------------ main


def check(config: Eval, model: LLaMA) -> None:
    """What would otherwise fail after hours of evaluation. Raises BadInput."""
    if (config.stride or 0) > model.config.block_size:
        raise BadInput(f"--stride={config.stride} is beyond the context of {model.config.block_size} tokens: "
                       "some tokens would not be counted")
    if config.sweep and not most_latent(model.config):
        raise BadInput(f"--sweep turns nothing: {config.run} holds a model without latent steps")
    for flag in [name for name in ("html", "json") if getattr(config, name)]:
        check_output(getattr(config, flag), f"--{flag}")
    if config.plot:
        figures.check_figure(config.plot, "--plot")


def evaluate(config: Eval) -> None:
    device = pick_device(config.device)
    model, tokenizer, checkpoint = load_checkpoint(config.run, device)
    check(config, model)
    turn(model, config.run, config.tau, config.max_latent)
    lay_out(model, precision(device, config.dtype))
    ids = None
    if config.text:
        ids = read_text(config.text, tokenizer, config.key, config.separator, config.max_tokens)
    elif config.sweep or config.analyze or config.html or not config.tasks:
        own = Path(checkpoint.get("train", {}).get("data", "data")) / "val.bin"
        if not own.is_file():
            raise BadInput(f"{own}, the validation text of {config.run}, is not here: name one with --text")
        if checkpoint.get("data") not in (None, Data(str(own.parent), 1).fingerprint):
            raise BadInput(f"{own} is other text than that of {config.run}: name one with --text")
        ids = read_text([str(own)], tokenizer, most=config.max_tokens or MOST)
        if config.max_tokens is None and len(ids) == MOST:
            print(f"the first {MOST:,} tokens of {own}; --max_tokens reads fewer or more")
    method = model.config.method
    found = {"run": config.run, "step": checkpoint.get("step"), "method": method, "device": str(device),
             "tau": model.tau if is_adaptive(model.config) else None, "max_latent": model.max_latent}
    title = f"{config.run}: {method}{dials(model)}"

    # Measure.
    shown = ""
    if config.tasks:
        from harness import accuracy
        found["accuracy"], shown = accuracy(model, tokenizer, config)
    if ids is not None:
        found["perplexity"], said = perplexity(model, tokenizer, ids, config)
    if config.sweep:
        found["sweep"] = sweep(model, ids, config)
    if config.analyze:
        found |= analyze(tokenizer, ids, said)
        found["further_steps"] = further_steps(with_fewer_steps(model, ids, said, config))

    # Write, and only then print, whatever came of it: a disk may be full, and a reader may have gone.
    written = []
    try:
        if config.json:
            content = found | about(config.device)
            write_whole(config.json, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            written.append(config.json)
        if config.plot:
            figures.save(draw(found, title), config.plot)
            written.append(config.plot)
        if config.html:
            beginning = explain(model, tokenizer, ids[:2000].tolist())
            write_whole(config.html, html_page(title, model, tokenizer, [beginning]))
            written.append(config.html)
    finally:
        print(title + shown)
        print_numbers(found)
        for path in written:
            print(f"written: {path}")


def main() -> None:
    config = configure(Eval, positional=("run",))
    with enough_memory(f"give less than --batch_size={config.batch_size}, or a shorter --text"):
        with torch.no_grad(), autocast(pick_device(config.device), config.dtype):
            evaluate(config)


if __name__ == "__main__":
    run(main)
