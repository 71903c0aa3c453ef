"""What a checkpoint is worth: perplexity, accuracy on the field's tasks, and where its thinking goes.

    python eval.py out/tiny                                  perplexity on the validation text of its data
    python eval.py out/tiny --text wiki.txt books/ --sweep   of other text, by threshold and length of thought
    python eval.py out/tiny --analyze --html=page.html       which tokens are thought about, and if it helps
    python eval.py out/tiny --tasks paper --num_fewshot 0 5  lm-evaluation-harness: the paper's nine tasks

What is notable here:
* One engine, `score`, is behind all numbers: it takes pairs (context, continuation), and a long text is cut
  into such pairs. A context that several pairs share, as the choices of a question do, is read once.
* A row never changes its neighbours: the batch size changes speed, not results.
* A thought belongs to the token that is said after it: its steps are those of the state that predicts it.
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
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import figures
from analysis import analyze, draw, further_steps, print_numbers
from common import (BadInput, about, autocast, check_apart, check_output, check_predictions, check_read,
                    configure, enough_memory, load_checkpoint, pick_device, precision, run, turn, write_whole)
from configurator import PREPARED
from costs import forward_flops
from documents import check_settings, encode, find_files, read_pieces
from fast import lay_out
from log import Cache, pad
from model import LLaMA
from page import dials, explain, html_page
from prepare import Data
from tokenizer import describe, dtype_of, same_tokens

TAUS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)  # what --sweep tries; 0 always thinks to the end
MOST = 1_000_000  # tokens of a run's own val.bin that are read, unless --max_tokens says otherwise
READ = {"--text": "key separator", "--tasks": "num_fewshot include_path limit", "--analyze": "plot",
        "--sweep": "plot", "what reads text": "stride max_tokens"}  # settings that only these read
SHARED = 32  # tokens that reading a context once must spare each row to be worth a second forward


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
            tokens, blank, broken = [], True, False
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
                    tokens, blank, broken = [], True, False


def read_bin(path: Path, tokenizer) -> np.ndarray:
    """A train.bin or val.bin of prepare.py, as a memory map. Raises BadInput for another tokenizer's."""
    if path.stem not in ("train", "val") or not path.is_file():
        raise BadInput(f"{path} is not a train.bin or val.bin of prepare.py, or does not exist")
    data = Data(str(path.parent), block_size=1)
    if not same_tokens(describe(data.tokenizer), describe(tokenizer)):
        raise BadInput(f"{path} has another tokenizer, {data.tokenizer.name}, than the run: {tokenizer.name}")
    return data.tokens[path.stem]


def windows(ids: np.ndarray, first: int, context: int, stride: int) -> Iterator[tuple]:
    """Cuts ids into pairs (tokens before, tokens to predict): each token from `first` on is predicted once.

    A pair feeds at most `context` tokens. The first predicts up to `context`, each other one up to `stride`,
    with at least context − stride before each. stride = context is the harness's rolling log-likelihood.
    """
    end = first
    while end < len(ids):
        start, end = end, min(len(ids), end + (context if end == first else stride))
        yield ids[max(0, end - 1 - context) : start], ids[start:end]


# --------------------------------------------------------------------------------------------------- scores


@dataclass
class Tally:
    """What was read, each pair as if by itself, and said, i.e. predicted."""

    read: int = 0  # tokens
    flops: float = 0.0  # of the forward over them
    said: int = 0  # tokens
    steps: float = 0.0  # executed latent steps behind them

    def summary(self) -> dict:
        flops = round(self.flops / max(1, self.read))
        return {"latent_steps": self.steps / max(1, self.said), "flops_per_token": flops}


@torch.no_grad()
def score(model: LLaMA, pairs: list, batch_size: int, tally: Tally, title: str = "") -> list[Tensor]:
    """What the model says of each pair (context, continuation) of token arrays: (3, length of continuation).

    Its rows: −log q of each token in nats, whether it was the likeliest, and the latent steps of the state
    that predicts it. A context holds at least a token; a pair feeds at most block_size. BadInput on NaN."""
    found = [torch.zeros(3, 0)] * len(pairs)
    keys = [context.tobytes() for context, _ in pairs]
    order = sorted(range(len(pairs)), key=lambda i: (-len(keys[i]), keys[i]))  # long first, equal together
    bar = tqdm(total=len(pairs), desc=title, dynamic_ncols=True, leave=False, disable=None if title else True)
    for start in range(0, len(pairs), batch_size):
        members = order[start : start + batch_size]
        contexts = [pairs[i][0][:-1] for i in members]
        rests = [np.concatenate((pairs[i][0][-1:], pairs[i][1][:-1])) for i in members]  # each predicts
        h, steps, live = read(model, contexts, rests)
        targets = torch.tensor(np.concatenate([pairs[i][1] for i in members]).tolist(), device=h.device)
        nats, right = [], []
        for states, y in zip(h.split(2048), targets.split(2048)):  # some at a time, as logits are large
            logits = model.head(states).float()
            nats.append(F.cross_entropy(logits, y, reduction="none").cpu())
            right.append((logits.argmax(1) == y).float().cpu())
        check_predictions(torch.cat(nats))
        after = torch.arange(live.size(1)) >= torch.tensor([len(context) for context in contexts])[:, None]
        thought = steps[live & after]
        whole = torch.stack((torch.cat(nats), torch.cat(right), thought))
        for i, part in zip(members, whole.split([len(rest) for rest in rests], 1)):
            found[i] = part
        tally.read += int(live.sum())
        tally.flops += sum(forward_flops(model, steps, live)).item()
        tally.said += len(targets)
        tally.steps += thought.sum().item()
        bar.update(len(members))
    bar.close()
    return found


def read(model: LLaMA, contexts: list[np.ndarray], rests: list[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in two parts → h̄ of the second parts (N, d); executed steps and which are tokens, both (B, T)."""
    keys = [context.tobytes() for context in contexts]
    owner = [keys.index(key) for key in keys]  # the first row with the same context
    distinct = sorted(set(owner))
    spared = sum(map(len, contexts)) - sum(len(contexts[i]) for i in distinct)
    length = max(map(len, contexts)) + max(map(len, rests))  # of the cache, which is padded
    pays = spared >= SHARED * len(rests) and length <= model.config.block_size
    cache, before = Cache(), [torch.zeros(0)] * len(rests)
    if pays and model.config.method != "ponder2":  # which reads a text in pieces otherwise than whole
        _, steps = feed(model, [contexts[i] for i in distinct], cache)
        before = [steps[distinct.index(i)] for i in owner]
        h, steps = feed(model, rests, cache.rows([distinct.index(i) for i in owner]))
    else:
        h, steps = feed(model, [np.concatenate(row) for row in zip(contexts, rests)], cache)
        second = [torch.arange(len(row)) >= len(context) for row, context in zip(steps, contexts)]
        h = h[torch.cat(second).to(h.device)]
    rows = [torch.cat(parts) for parts in zip(before, steps)]
    steps = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return h, steps, torch.arange(steps.size(1)) < torch.tensor([len(row) for row in rows])[:, None]


def feed(model: LLaMA, rows: list[np.ndarray], cache: Cache) -> tuple[Tensor, list[Tensor]]:
    """Token arrays of any lengths → h̄ (N, d) of their N tokens, row after row, and the steps of each row."""
    idx, live = pad([row.tolist() for row in rows], model.embed.weight.device)
    h, steps, _ = model.hidden(idx, cache, None if live.all() else live)
    return h, list(steps.float().cpu().split([len(row) for row in rows]))


def score_text(model: LLaMA, ids: np.ndarray, config: Eval, title: str, keep=False) -> tuple[dict, Tensor]:
    """Perplexity of ids (n,) by sliding windows; if kept, what `score` says of all but the first (3, n−1)."""
    began = time.perf_counter()
    tally, nats, kept = Tally(), 0.0, [torch.zeros(3, 0)]
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
    end, words, size = tokenizer.eot_token, 0, 0
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
    has_tau = model.config.method == "adaptive"
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
    own, found = model.max_latent, []
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
    if config.sweep and (model.config.method == "vanilla" or model.config.max_latent == 0):
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
        config.text = [str(own.with_name(name)) for name in PREPARED]  # nothing is written over them
        check_apart(config, "text", "html", "plot", "json")
        ids = read_text([str(own)], tokenizer, most=config.max_tokens or MOST)
        if config.max_tokens is None and len(ids) == MOST:
            print(f"the first {MOST:,} tokens of {own}; --max_tokens reads fewer or more")
    method = model.config.method
    found = {"run": config.run, "step": checkpoint.get("step"), "method": method, "device": str(device),
             "tau": model.tau if method == "adaptive" else None, "max_latent": model.max_latent}
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

    # Write, and only then print: who reads what is printed may stop.
    if config.html:
        beginning = explain(model, tokenizer, ids[:2000].tolist())
        write_whole(config.html, html_page(title, model, tokenizer, [beginning]))
    if config.json:
        write_whole(config.json, json.dumps(found | about(), indent=1, ensure_ascii=False) + "\n")
    print(title + shown)
    print_numbers(found)
    for path in filter(None, (config.html, config.json)):
        print(f"written: {path}")
    if config.plot:
        figures.save(draw(found, title), config.plot)


def main() -> None:
    config = configure(Eval, positional=("run",))
    with enough_memory(f"give less than --batch_size={config.batch_size}, or a shorter --text"):
        with torch.no_grad(), autocast(pick_device(config.device), config.dtype):
            evaluate(config)


if __name__ == "__main__":
    run(main)
