"""What a checkpoint is worth: perplexity, accuracy on the field's tasks, and where its thinking goes.

    python eval.py out/tiny                                    perplexity on the validation text of its data
    python eval.py out/tiny --text wiki.txt books/ --sweep     on other text, over a range of thresholds and thought lengths
    python eval.py out/tiny --analyze --html=thoughts.html     which tokens are thought about, and whether it helps
    python eval.py out/tiny --tasks paper --num_fewshot 0 5    lm-evaluation-harness: the nine tasks of the paper

What is notable here:
* One engine, `score`, is behind all numbers: it takes pairs (context, continuation), and a long text is cut into such pairs.
  Pairs that share a context, as the choices of a question do, have it read once: the rows of its cache are copied.
* A row never changes its neighbours, and padding costs nothing: the batch size changes speed, not results.
* Accuracy is the harness's own: its tasks, its metrics, its table. This file only gives it the log-likelihoods.
* A thought belongs to the token that is said after it: the steps of a token are those of the state that predicts it.
"""

import difflib
import itertools
import json
import logging
import math
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from configurator import BadInput, configure, run
from model import Cache, LLaMA
from prepare import describe, find_files, read_documents
from sample import explain, html_page
from train import Data, autocast, load_checkpoint, pick_device

PAPER_TASKS = ("lambada_openai", "lambada_standard", "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "sciq", "race")
NORMALIZED = ("arc_challenge", "hellaswag")  # acc_norm enters the average, acc elsewhere: the field's custom, the paper does not say
TAUS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)  # what --sweep tries; 0 always thinks to the end
SHARED = 64  # tokens of a context from which on reading it once pays: measured on a CPU, 0.9 times as fast at 40, 1.2 at 64, 1.8 at 150
ENOUGH = 20  # a token that occurs less often is not ranked by its mean steps
CLASSES = {  # of a token: the first that its bytes match, spaces before them apart
    "newline": rb"\s*\n\s*$", "space": rb"\s*$", "name": rb"[A-Za-z_]", "digit": rb"\d", "quote": rb"[\"'`]", "bracket": rb"[()\[\]{}]",
    "operator": rb"[-+*/%=<>!&|^~@]", "punctuation": rb"[.,:;?#$\\]", "not ASCII": rb"[\x80-\xff]", "control": rb""}


@dataclass
class Eval:
    run: str = "out/tiny"  # folder of a run, or a checkpoint
    text: list[str] = field(default_factory=list)  # files or folders that prepare.py reads, or a .bin of it; empty: the run's own val.bin
    key: str = "text"  # the field of a .jsonl record or the column of a .parquet file
    max_tokens: int | None = None  # read only the first so many tokens of the text
    stride: int | None = None  # tokens that each window after the first counts; None: half the context
    batch_size: int = 8  # windows of text, or requests of a task, in one forward
    tau: float | None = None  # τ at test time: higher halts sooner
    max_latent: int | None = None  # most latent steps at test time
    sweep: bool = False  # perplexity against mean latent steps: every τ (or the given one) with every ℓ_max up to max_latent
    analyze: bool = False  # which tokens of the text are thought about, and what each further step brings
    tasks: list[str] = field(default_factory=list)  # of lm-evaluation-harness, by comma or space; paper: the nine of the paper
    num_fewshot: list[int] = field(default_factory=lambda: [0])  # solved examples before each question, none unless given; several numbers: one run each
    include_path: str = ""  # folder of more task files (YAML)
    limit: int | None = None  # only the first so many questions of each task
    html: str = ""  # write the beginning of the text here as a page, coloured by latent steps
    plot: str = ""  # draw what --analyze and --sweep find here (.png, .svg or .pdf)
    json: str = ""  # write all numbers here; empty: they are only printed
    device: str = ""  # cpu, cuda or cuda:N; empty: cuda where there is one

    def __post_init__(self) -> None:
        for name, least in {"max_tokens": 2, "stride": 1, "batch_size": 1, "max_latent": 0, "limit": 1}.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {least}")
        if self.tau is not None and not 0 <= self.tau <= 1:
            raise ValueError(f"tau is {self.tau}, but must lie in [0, 1]")
        if min(self.num_fewshot) < 0:
            raise ValueError(f"num_fewshot is {min(self.num_fewshot)}, but must be at least 0")
        if self.plot and not ((self.analyze or self.sweep) and self.plot.endswith((".png", ".svg", ".pdf"))):
            raise ValueError("--plot wants --analyze or --sweep beside it, and a name that ends in .png, .svg or .pdf")
        names = [name for word in self.tasks for name in word.split(",") if name]
        self.tasks = [task for name in names for task in (PAPER_TASKS if name == "paper" else [name])]


# ----------------------------------------------------------------------------------------------------- text


def read_text(paths: list[str], tokenizer, key: str = "text", most: int | None = None) -> np.ndarray:
    """The tokens of files, folders and .bin files, one after another; <|endoftext|> ends every document, as in prepare.py.

    Raises BadInput for what cannot be read, for a .bin of another tokenizer, and for fewer than two tokens of text.
    """
    parts, end = [np.zeros(0, np.uint32)], tokenizer.eot_token
    for path in paths:
        if not Path(path).exists():
            raise BadInput(f"--text {path} does not exist")
        if path.endswith(".bin"):
            parts.append(read_bin(Path(path), tokenizer))
            continue
        for file in find_files([path]):
            for document in read_documents(file, key):
                if document is None:
                    print(f"eval.py: {file} holds a document that is not UTF-8 text, left out", file=sys.stderr)
                elif document.strip():
                    parts.append(np.array([*tokenizer.encode_ordinary(document), end], np.uint32))
    ids = np.concatenate(parts)[:most]
    if (ids != end).sum() < 2:
        raise BadInput(f"{' '.join(paths)}: fewer than two tokens of text, but perplexity predicts each token from those before it")
    return ids


def read_bin(path: Path, tokenizer) -> np.ndarray:
    """The tokens of a train.bin or val.bin of prepare.py. Raises BadInput where its folder is not whole, or is of another tokenizer."""
    data = Data(str(path.parent), block_size=1)
    if path.stem not in data.tokens:
        raise BadInput(f"{path} is not a train.bin or val.bin of prepare.py")
    ids, theirs = data.tokens[path.stem].astype(np.uint32), data.tokenizer
    if describe(theirs) != describe(tokenizer):
        raise BadInput(f"{path} was made with another tokenizer ({theirs.name}, vocabulary {theirs.n_vocab}) "
                       f"than the model's ({tokenizer.name}, vocabulary {tokenizer.n_vocab})")
    if ids.max() >= tokenizer.n_vocab:
        raise BadInput(f"{path} holds token {ids.max()}, beyond its vocabulary of {tokenizer.n_vocab}")
    return ids


def windows(ids: np.ndarray, first: int, context: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts ids into pairs (tokens before, tokens to predict): every token from `first` on is predicted exactly once.

    A pair feeds at most `context` tokens. The first predicts up to `context` tokens, each other one up to `stride`, with
    at least context − stride tokens before each. With stride = context this is the harness's rolling log-likelihood.
    """
    end = first
    while end < len(ids):
        start, end = end, min(len(ids), end + (context if end == first else stride))
        yield ids[max(0, end - 1 - context) : start], ids[start:end]


# --------------------------------------------------------------------------------------------------- scores


@dataclass
class Tally:
    """What evaluation cost: tokens fed, FLOPs of the stack on them; tokens said (predicted), latent steps behind them."""

    fed: int = 0
    flops: int = 0
    said: int = 0
    steps: float = 0.0

    def summary(self, model: LLaMA) -> dict:
        """Mean latent steps behind a token that was said, and forward FLOPs of one token: the stack's share, and the head once."""
        return {"latent_steps": self.steps / max(1, self.said), "flops_per_token": round(self.flops / max(1, self.fed)) + head_flops(model)}


def head_flops(model: LLaMA) -> int:
    return 2 * model.config.n_embd * model.config.vocab_size


@torch.no_grad()
def score(model: LLaMA, pairs: list, batch_size: int, tally: Tally, bar: str = "") -> list[Tensor]:
    """What the model says of each pair (context, continuation) of token arrays: for each a tensor (3, length of the continuation).

    Its rows: −log q of each token in nats, whether it was the likeliest, and the latent steps of the state that predicts it.
    A context holds one token at least; a pair feeds at most block_size. Longest first: what does not fit in memory fails at once.
    """
    groups, found = defaultdict(list), [torch.zeros(3, 0)] * len(pairs)
    for i, (context, _) in enumerate(pairs):
        groups[context.tobytes()].append(i)
    jobs = [members[i : i + batch_size] for members in groups.values() for i in range(0, len(members), batch_size)]

    def shared(job: list[int]) -> int:  # tokens that are read once for all pairs of a job: all but the last of the context, which predicts
        context = len(pairs[job[0]][0])
        return context - 1 if len(job) > 1 and context >= SHARED and model.config.method != "ponder2" else 0  # its pieces do not equal the whole

    def longest(job: list[int]) -> int:
        return max(sum(map(len, pairs[i])) for i in job) - 1

    def fits(batch: list[list[int]]) -> bool:  # a cache is as long as its longest shared part and its longest rest together
        return (sum(map(len, batch)) <= batch_size and len({shared(job) > 0 for job in batch}) == 1
                and max(map(shared, batch)) + max(longest(job) - shared(job) for job in batch) <= model.config.block_size)

    jobs.sort(key=lambda job: (shared(job) > 0, longest(job)))
    progress = tqdm(total=len(pairs), desc=bar, dynamic_ncols=True, disable=not (bar and sys.stderr.isatty()))
    while jobs:
        batch = [jobs.pop()]
        while jobs and fits([*batch, jobs[-1]]):
            batch.append(jobs.pop())
        cache, members = Cache(), [i for job in batch for i in job]
        if shared(batch[0]):
            feed(model, [pairs[job[0]][0][: shared(job)] for job in batch], cache, tally)
            cache = cache.rows([j for j, job in enumerate(batch) for _ in job])
        rest = [np.concatenate(pairs[i])[shared(job) : -1] for job in batch for i in job]
        h, steps, live = feed(model, rest, cache, tally)
        lengths = torch.tensor([len(pairs[i][1]) for i in members])
        said = live & (torch.arange(live.size(1)) >= (live.sum(1) - lengths)[:, None])  # (B, T): the states that predict a continuation
        said = said[live].to(h.device)
        targets = torch.from_numpy(np.concatenate([pairs[i][1] for i in members]).astype(np.int64)).to(h.device)
        numbers = torch.stack((*read_out(model, h[said], targets), steps[said])).cpu()
        tally.said, tally.steps = tally.said + len(targets), tally.steps + numbers[2].sum().item()
        for i, part in zip(members, numbers.split(lengths.tolist(), 1)):
            found[i] = part
        progress.update(len(members))
    progress.close()
    return found


def feed(model: LLaMA, rows: list[np.ndarray], cache: Cache, tally: Tally) -> tuple[Tensor, Tensor, Tensor]:
    """Token arrays of any lengths, right-padded → h̄ (N, d) and steps (N,) of the N real tokens, and which those are (B, T)."""
    device, lengths = model.embed.weight.device, torch.tensor([len(row) for row in rows])
    live = torch.arange(int(lengths.max())) < lengths[:, None]
    idx = torch.zeros(live.shape, dtype=torch.long)
    idx[live] = torch.from_numpy(np.concatenate(rows).astype(np.int64))
    before = model.matmul_flops + model.attention_flops
    with autocast(device):
        h, steps, _, _ = model.hidden(idx.to(device), cache, None if live.all() else live.to(device))
    tally.fed, tally.flops = tally.fed + len(h), tally.flops + model.matmul_flops + model.attention_flops - before
    return h, steps, live


def read_out(model: LLaMA, h: Tensor, targets: Tensor, rows: int = 2048) -> tuple[Tensor, Tensor]:
    """h (N, d), targets (N,) → −log q in nats and whether q was the largest, each (N,). Some rows at a time: logits are large."""
    nats, right = [], []
    for h, y in zip(h.split(rows), targets.split(rows)):
        with autocast(h.device):
            logits = model.head(h).float()
        nats.append(F.cross_entropy(logits, y, reduction="none"))
        right.append((logits.argmax(1) == y).float())
    return torch.cat(nats), torch.cat(right)


def score_text(model: LLaMA, ids: np.ndarray, config: Eval, bar: str) -> tuple[Tensor, dict]:
    """What `score` says of every token of ids (n,) but the first, by sliding windows, (3, n − 1); and the summary of it."""
    tally, began, context = Tally(), time.perf_counter(), model.config.block_size
    pairs = list(windows(ids, 1, context, config.stride or max(1, context // 2)))
    said = torch.cat(score(model, pairs, config.batch_size, tally, bar), 1)
    loss = said[0].double().mean().item()
    return said, {"loss": loss, "perplexity": exp(loss), **tally.summary(model), "tokens_per_second": tally.fed / (time.perf_counter() - began)}


def perplexity(model: LLaMA, tokenizer, ids: np.ndarray, config: Eval) -> tuple[Tensor, dict]:
    """The same with perplexity per whitespace-separated word and per byte: the nats of all tokens over the words and bytes of the text."""
    said, summary = score_text(model, ids, config, "perplexity")
    nats, end = said[0].double().sum().item(), tokenizer.eot_token
    documents = [tokenizer.decode_bytes(part[part != end].tolist()) for part in np.split(ids, np.flatnonzero(ids == end))]
    words, size = sum(len(text.decode("utf-8", "replace").split()) for text in documents), sum(map(len, documents))
    return said, {"tokens": len(ids), "words": words, "bytes": size, **summary, "word_perplexity": exp(nats / max(1, words)),
                  "byte_perplexity": exp(nats / size), "bits_per_byte": nats / math.log(2) / size}


def exp(x: float) -> float:
    return math.exp(min(x, 700))  # a float ends at e^709


def sweep(model: LLaMA, ids: np.ndarray, config: Eval) -> list[dict]:
    """Perplexity and mean latent steps at every setting of the dials, fewest steps first; `best`: no other has less of both."""
    taus = [model.tau] if model.config.method != "adaptive" or config.tau is not None else sorted({*TAUS, model.tau})
    points = []
    for most in range(model.max_latent + 1):
        for tau in taus if most else taus[:1]:
            with model.dials(tau, most):
                points.append({"tau": tau if most else None, "max_latent": most, **score_text(model, ids, config, f"τ {tau}, ℓ_max {most}")[1]})
    points.sort(key=lambda point: (point["latent_steps"], point["loss"]))
    for i, point in enumerate(points):
        point["best"] = all(point["loss"] < other["loss"] for other in points[:i])
    return points


# ------------------------------------------------------------------------------------------------- analysis


def ranks(x: Tensor) -> Tensor:
    """The rank of each value (n,), from 1; equal values share the mean of their ranks."""
    _, which, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1).double() / 2)[which]


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Spearman's rank correlation of x and y (n,); None where either is constant."""
    both = torch.stack((ranks(x), ranks(y))).double()
    return torch.corrcoef(both)[0, 1].item() if (both.amax(1) > both.amin(1)).all() else None


def token_class(token: bytes) -> str:
    """The first of CLASSES that the token matches."""
    return next(name for name, pattern in CLASSES.items() if re.match(pattern, token.lstrip(b" ")))


def word_positions(texts: list[bytes], which: np.ndarray) -> np.ndarray:
    """For tokens given as texts[which]: which of its word each one is, from 1; 0 for none. A word is a run of letters, digits, _, non-ASCII."""
    letter = re.compile(rb"[\w\x80-\xff]")
    begins = np.array([bool(letter.match(text.lstrip(b" "))) for text in texts])[which]  # in a word
    joined = np.array([not text.startswith(b" ") for text in texts])[which]  # " the" does not go on with the word before it
    ends = np.array([bool(letter.match(text[-1:])) for text in texts])[which]
    number = np.arange(len(which))
    starts = begins & ~(joined & np.concatenate(([False], ends[:-1])))
    return np.where(begins, number - np.maximum.accumulate(np.where(starts, number, 0)) + 1, 0)


def analyze(model: LLaMA, tokenizer, ids: np.ndarray, said: Tensor, config: Eval) -> dict:
    """Where the thinking goes, by what score_text said (3, n − 1) of ids (n,): tables of plain numbers, and one correlation.

    `further_steps`: of the tokens that executed k steps or more, what k steps gave, and what k − 1 would have given.
    """
    nats, _, steps = said
    vocabulary, which, count = np.unique(ids[1:], return_inverse=True, return_counts=True)
    texts = [tokenizer.decode_single_token_bytes(int(i)) for i in vocabulary]
    kinds = np.array(["end of text" if i == tokenizer.eot_token else token_class(text) for i, text in zip(vocabulary, texts)])[which]
    place = word_positions([b"" if i == tokenizer.eot_token else text for i, text in zip(vocabulary, texts)], which).clip(max=8)

    def mean(rows, **label) -> dict:
        rows = torch.as_tensor(rows)
        loss, thought = (t[rows].double().mean().item() for t in (nats, steps))
        return {**label, "tokens": len(nats[rows]), "loss": loss, "latent_steps": thought}

    deciles = [part for part in nats.argsort(descending=True).tensor_split(10) if len(part)]
    average = np.bincount(which, steps.numpy()) / count
    often = sorted(np.flatnonzero(count >= ENOUGH), key=lambda i: -average[i])
    tokens = [{"token": repr(texts[i])[1:], "tokens": int(count[i]), "latent_steps": float(average[i])} for i in often]
    further, before, deepest = [], None, int(steps.max())
    for k in range(deepest + 1 if deepest else 0):
        with model.dials(max_latent=k):
            now = said if k == deepest else score_text(model, ids, config, f"at most {k} steps")[0]
        if k:
            (loss, right), (loss_now, right_now) = ((t[0, steps >= k].double().mean().item(), t[1, steps >= k].double()) for t in (before, now))
            further.append({"step": k, "tokens": len(right), "loss_without": loss, "loss_with": loss_now,
                            "right_without": right.mean().item(), "right_with": right_now.mean().item(),
                            "only_with": (right_now > right).double().mean().item(), "only_without": (right_now < right).double().mean().item()})
        before = now
    return {
        "rank_correlation": spearman(nats, steps),
        "deciles": [mean(part, q_from=math.exp(-nats[part[0]]), q_to=math.exp(-nats[part[-1]])) for part in deciles],
        "word_positions": [mean(place == p, place={0: "none", 8: "8 or later"}.get(p, str(p))) for p in np.unique(place).tolist()],
        "classes": sorted((mean(kinds == kind, kind=str(kind)) for kind in np.unique(kinds)), key=lambda row: -row["latent_steps"]),
        "longest": tokens[:20],
        "shortest": tokens[::-1][:20],
        "further_steps": further,
    }


# ------------------------------------------------------------------------------------------------- accuracy


def harness_model(model: LLaMA, tokenizer, batch_size: int):
    """The model as an lm_eval.api.model.LM, with `tallies`: what each task cost. Raises BadInput where lm-eval is not installed."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    except ImportError:
        raise BadInput("--tasks needs lm-evaluation-harness: pip install lm-eval") from None
    context, end = model.config.block_size, tokenizer.eot_token

    class Harness(TemplateLM):
        eot_token_id = end  # also what an empty context becomes

        def __init__(self) -> None:
            super().__init__()
            self.tallies = defaultdict(Tally)

        def tok_encode(self, string: str, **_) -> list[int]:
            return tokenizer.encode_ordinary(string)

        def by_task(self, requests: list, answer) -> list:
            """answer(requests), task by task as the harness sends them, so that each task has its own tally."""
            answers = []
            for self.task, part in itertools.groupby(requests, lambda request: request.task_name):
                self.tally = self.tallies[self.task]
                answers += answer(list(part))
            return answers

        def loglikelihood(self, requests: list, **_) -> list[tuple[float, bool]]:
            encode_and_answer = super().loglikelihood  # ends in _loglikelihood_tokens
            return self.by_task(requests, lambda part: encode_and_answer(part, disable_tqdm=True))

        def loglikelihood_rolling(self, requests: list, **_) -> list[float]:
            def answer(part: list) -> list[tuple[float, bool]]:
                return self._loglikelihood_tokens([(None, [end], self.tok_encode(request.args[0])) for request in part])

            return [total for total, _ in self.by_task(requests, answer)]

        def _loglikelihood_tokens(self, requests: list, **_) -> list[tuple[float, bool]]:
            """(log p, would greedy decoding say it) of each (_, context, continuation). What is too long loses its left end."""
            cut = [list(windows(np.array([*before, *after], np.uint32), len(before), context, context)) for _, before, after in requests]
            scores = iter(score(model, [pair for pairs in cut for pair in pairs], batch_size, self.tally, self.task))
            joined = [torch.cat([torch.zeros(3, 0), *(next(scores) for _ in pairs)], 1) for pairs in cut]
            return [(-nats.double().sum().item(), bool(right.all())) for nats, right, _ in joined]

        def generate_until(self, requests: list, **_) -> list[str]:
            return self.by_task(requests, self._generate)

        def _generate(self, requests: list) -> list[str]:
            """Continues each (prompt, settings) until one of its stop strings. Equal settings go together, long prompts first."""
            prompts, kinds, answers = [self.tok_encode(request.args[0]) or [end] for request in requests], defaultdict(list), {}
            for i in sorted(range(len(requests)), key=lambda i: -len(prompts[i])):
                kinds[repr(requests[i].args[1])].append(i)
            for i, members in ((i, members) for members in kinds.values() for i in range(0, len(members), batch_size)):
                part = members[i : i + batch_size]
                settings = normalize_gen_kwargs(requests[part[0]].args[1])
                until, most = handle_stop_sequences(settings["until"], eos=tokenizer.decode([end])), settings["max_gen_toks"]
                room = context - most if most < context else context  # for a prompt, as the harness has it where the answer fits at all
                texts = self._continue([prompts[i][-room:] for i in part], most, settings, [stop.encode() for stop in until if stop])
                answers |= {i: postprocess_generated_text(text, until, None) for i, text in zip(part, texts)}
            return [answers[i] for i in range(len(requests))]

        def _continue(self, prompts: list[list[int]], most: int, settings: dict, until: list[bytes]) -> list[str]:
            texts, done, said, before = [b""] * len(prompts), set(), 0, model.matmul_flops + model.attention_flops
            dials = settings.get("temperature", 0.0), settings.get("top_k"), settings.get("top_p")
            with autocast(model.embed.weight.device):
                for new in model.generate(prompts, most, *dials, seed=0, stop=end):
                    said, self.tally.steps = said + int(new.live.sum()), self.tally.steps + new.steps.sum().item()
                    for i, (token, live) in enumerate(zip(new.token.tolist(), new.live.tolist())):
                        if live and token < tokenizer.n_vocab:  # a vocabulary may be padded
                            texts[i] += tokenizer.decode_single_token_bytes(token)
                        if not live or any(stop in texts[i] for stop in until):
                            done.add(i)
                    if len(done) == len(prompts):
                        break
            self.tally.said, self.tally.fed = self.tally.said + said, self.tally.fed + sum(map(len, prompts)) + said - len(prompts)
            self.tally.flops += model.matmul_flops + model.attention_flops - before - said * head_flops(model)
            return [text.decode("utf-8", "replace") for text in texts]

    return Harness()


def find_tasks(names: list[str], include_path: str):
    """The harness's TaskManager that knows the names. Raises BadInput, with the closest name, where none does."""
    from lm_eval.tasks import TaskManager

    if include_path and not Path(include_path).is_dir():
        raise BadInput(f"--include_path {include_path} is not a folder; it wants one that holds task files (.yaml)")
    for defaults in (False, True) if include_path else (True,):  # the harness's own tasks are thousands: indexing them takes ten seconds
        manager = TaskManager(include_path=include_path or None, include_defaults=defaults)
        unknown = [name for name in names if name not in manager.all_tasks]
        if not unknown:
            return manager
    close = difflib.get_close_matches(unknown[0], manager.all_tasks, 1, 0)
    raise BadInput(f"--tasks: there is no task {unknown[0]!r}; did you mean {close[0]!r}? --include_path names a folder of more")


def accuracy(model: LLaMA, tokenizer, config: Eval) -> dict:
    """The tasks by lm-evaluation-harness, once for each num_fewshot: prints its table, returns its results. Raises BadInput."""
    harness = harness_model(model, tokenizer, config.batch_size)
    from lm_eval import evaluate
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.utils import make_table

    for name in ("lm_eval", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    manager, found = find_tasks(config.tasks, config.include_path), {}
    for shots in config.num_fewshot:
        random.seed(DEFAULT_RANDOM_SEED)  # all seeds as the harness's own command sets them
        np.random.seed(DEFAULT_OTHER_SEED)
        loaded = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in config.tasks:
            try:
                one = manager.load([name])
            except Exception as error:  # whatever the hub, the network or the task's own file did
                raise BadInput(f"--tasks: {name} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:160]}); without network "
                               "its data must be in the cache of datasets, or --include_path must hold a task over local files") from None
            loaded = {part: loaded[part] | one[part] for part in loaded}
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") != 0:  # a task whose file says 0 is never given examples
                task.set_config("num_fewshot", shots)
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        harness.tallies.clear()
        results = evaluate(harness, loaded, limit=config.limit, log_samples=False)
        for task, tally in harness.tallies.items():  # as rows of the harness's table
            results["results"][task] |= {f"{name},none": value for name, value in tally.summary(model).items()}
        total = Tally(*map(sum, zip(*map(astuple, harness.tallies.values())))).summary(model)
        found[shots] = {key: results[key] for key in ("results", "groups", "versions", "n-shot", "n-samples") if key in results} | total
        print(f"\n{shots}-shot\n{make_table(results)}{make_table(results, 'groups') if results.get('groups') else ''}")
        print(f"all tasks: {total['latent_steps']:.3f} latent steps per scored token, {total['flops_per_token']:.4e} forward FLOPs per token")
        if set(PAPER_TASKS) <= set(results["results"]):
            scores = [results["results"][task]["acc_norm,none" if task in NORMALIZED else "acc,none"] for task in PAPER_TASKS]
            found[shots]["average"] = sum(scores) / len(scores)
            print(f"average accuracy of the paper's nine: {100 * found[shots]['average']:.2f} % (acc_norm for {' and '.join(NORMALIZED)})")
    return found


TITLES = {
    "sweep": "perplexity against mean latent steps; best: no other setting has less of both",
    "deciles": "by decile of the probability q that the token was given, least likely first",
    "word_positions": "by the token's place in its word",
    "classes": "by class of the token",
    "longest": f"tokens thought about longest, of those that occur {ENOUGH} times or more",
    "shortest": f"tokens thought about shortest, of those that occur {ENOUGH} times or more",
    "further_steps": "what step k brings to the tokens that took it: loss, and share that is right, without it and with it",
}


def print_tables(found: dict) -> None:
    """The tables of found that TITLES knows: keys as heads, floats to four digits."""
    for name, title in TITLES.items():
        if found.get(name):
            lines = [[key.replace("_", " ") for key in found[name][0]]]
            lines += [["" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()] for row in found[name]]
            width = [max(map(len, column)) for column in zip(*lines)]
            print(f"\n{title}", *("  ".join(cell.rjust(w) for cell, w in zip(line, width)) for line in lines), sep="\n")


def draw(path: str, found: dict, title: str) -> None:
    """The sweep and the analysis, as far as they were made, side by side in one figure."""
    from matplotlib.figure import Figure

    names = [name for name in ("sweep", "deciles", "word_positions", "classes", "further_steps") if found.get(name)]
    figure = Figure(figsize=(4.5 * len(names), 4), layout="constrained")
    figure.suptitle(title)
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        rows = found[name]
        if name == "sweep":
            for most in sorted({row["max_latent"] for row in rows}):
                axis.plot(*zip(*((row["latent_steps"], row["perplexity"]) for row in rows if row["max_latent"] == most)), "o-", label=f"ℓ_max {most}")
            axis.set(xlabel="mean latent steps", ylabel="perplexity")
        elif name == "further_steps":
            for key in ("loss_without", "loss_with"):
                axis.plot([str(row["step"]) for row in rows], [row[key] for row in rows], "o-", label=key.replace("_", " "))
            axis.set(xlabel="step", ylabel="loss of the tokens that took it")
        else:
            labels = [str(i) for i in range(1, 11)] if name == "deciles" else [next(iter(row.values())) for row in rows]
            axis.bar(labels[: len(rows)], [row["latent_steps"] for row in rows])
            axis.tick_params("x", rotation=60)
            axis.set(xlabel="deciles of q, least likely first" if name == "deciles" else name.replace("_", " "), ylabel="mean latent steps")
        if axis.get_lines():
            axis.legend()
    figure.savefig(path, dpi=150)


# ------------------------------------------------------------------------------------------------------ main


def check(config: Eval, model: LLaMA) -> None:
    """What would otherwise fail after hours of evaluation. Raises BadInput."""
    if (config.stride or 0) > model.config.block_size:
        raise BadInput(f"--stride={config.stride} is beyond the context of {model.config.block_size} tokens: some tokens would not be counted")
    if model.config.method == "vanilla" and (config.sweep or config.tau is not None or config.max_latent is not None):
        raise BadInput(f"{config.run} holds a vanilla model, which takes no latent steps: --sweep, --tau and --max_latent turn nothing")
    for name in ("html", "plot", "json"):
        if getattr(config, name) and not Path(getattr(config, name)).resolve().parent.is_dir():
            raise BadInput(f"--{name}={getattr(config, name)}: its folder does not exist")
    if config.plot:
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError:
            raise BadInput("--plot needs the package matplotlib: pip install matplotlib") from None


def main() -> None:
    config = configure(Eval, positional=("run",))
    device = pick_device(config.device)
    model, tokenizer, checkpoint = load_checkpoint(config.run, device)
    check(config, model)
    ids = None
    if config.text or config.sweep or config.analyze or config.html or not config.tasks:
        own = Path(checkpoint.get("train", {}).get("data", "data")) / "val.bin"
        if not config.text and not own.is_file():
            raise BadInput(f"{own}, the validation text of {config.run}, is not here: name a text with --text")
        ids = read_text(config.text or [str(own)], tokenizer, config.key, config.max_tokens)
    with model.dials(config.tau, config.max_latent):
        found = {"run": config.run, "step": checkpoint.get("step"), "method": model.config.method,
                 "tau": model.tau, "max_latent": model.max_latent, "device": str(device)}
        title = f"{config.run}: {model.config.method}" + (f", τ {model.tau}, ℓ_max {model.max_latent}" if model.config.method != "vanilla" else "")
        print(title)
        if config.tasks:
            found["accuracy"] = accuracy(model, tokenizer, config)
        if ids is not None:
            said, p = perplexity(model, tokenizer, ids, config)
            found["perplexity"] = p
            print(f"{p['tokens']:,} tokens, {p['words']:,} words, {p['bytes']:,} bytes\n"
                  f"loss {p['loss']:.4f} nats per token, {p['bits_per_byte']:.4f} bits per byte\n"
                  f"perplexity {p['perplexity']:.4f} per token, {p['word_perplexity']:.6g} per word, {p['byte_perplexity']:.4f} per byte\n"
                  f"{p['latent_steps']:.3f} latent steps and {p['flops_per_token']:.4e} forward FLOPs per token; {p['tokens_per_second']:,.0f} tokens/s")
            if config.sweep:
                found["sweep"] = sweep(model, ids, config)
            if config.analyze:
                found |= analyze(model, tokenizer, ids, said, config)
                correlation = "none, as all tokens took as many" if found["rank_correlation"] is None else f"{found['rank_correlation']:.3f}"
                print(f"\nrank correlation (Spearman) of −log q and latent steps: {correlation}")
            print_tables(found)
            if config.html:
                page = html_page("What the model thought about", title, explain(model, tokenizer, ids[: model.config.block_size].tolist()))
                Path(config.html).write_text(page, encoding="utf-8")
    if config.plot:
        draw(config.plot, found, title)
    if config.json:
        Path(config.json).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in filter(None, (config.html, config.plot, config.json)):
        print(f"written: {path}")


if __name__ == "__main__":
    run(main)
