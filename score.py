"""What a model says of given text: the one engine behind eval.py's perplexity and the harness's tasks.

    for said in score(model, [(context, continuation), …], batch_size=8, tally=Tally()): …

What is notable here:
* It takes pairs (context, continuation) of tokens, and `windows` cuts a long text into such pairs. A context
  that several pairs share, as the choices of a question do, is read once.
* A row never changes its neighbours: the batch size changes speed, not results.
* A thought belongs to the token that is said after it: its steps are those of the state that predicts it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common import check_predictions
from costs import forward_flops
from log import Cache, filled, pad
from model import LLaMA

SHARED = 32  # tokens that reading a context once must spare each row to be worth a second forward


def windows(ids: np.ndarray, first: int, context: int, stride: int) -> Iterator[tuple]:
    """Cuts ids into pairs (tokens before, tokens to predict): each token from `first` on is predicted once.

    A pair feeds at most `context` tokens. The first predicts up to `context`, each other one up to `stride`,
    with more than context − stride before each. stride = context is the harness's rolling log-likelihood.
    """
    end = first
    while end < len(ids):
        start, end = end, min(len(ids), end + (context if end == first else stride))
        yield ids[max(0, end - 1 - context) : start], ids[start:end]


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
        thought = torch.cat([row[len(a) : len(a) + len(b)] for row, a, b in zip(steps, contexts, rests)])
        whole = torch.stack((torch.cat(nats), torch.cat(right), thought))
        for i, part in zip(members, whole.split([len(rest) for rest in rests], 1)):
            found[i] = part
        tally.read += int(live.sum())
        alone = live.sum(1) == 1  # a single token, which ponder2 decodes where it would iterate over more
        for rows in filter(torch.any, (alone, ~alone)):
            tally.flops += sum(forward_flops(model, steps[rows], live[rows])).item()
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
    return h, pad_sequence(rows, batch_first=True), filled([len(row) for row in rows])


def feed(model: LLaMA, rows: list[np.ndarray], cache: Cache) -> tuple[Tensor, list[Tensor]]:
    """Token arrays of any lengths → h̄ (N, d) of their N tokens, row after row, and the steps of each row."""
    idx, live = pad([row.tolist() for row in rows], model.embed.weight.device)
    h, steps, _ = model.hidden(idx, cache, None if live.all() else live)
    return h, list(steps.float().cpu().split([len(row) for row in rows]))
