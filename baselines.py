"""The rivals, each as what it changes of LLaMA and nothing else, and `build`, which knows all methods by name.

All are trained, sampled and measured by the same scripts, count FLOPs as they execute, and decode through the same `Cache`.
`max_latent` is their K. `steps` is K for all but MoR. Where a source leaves room, the docstring says what we chose.
"""

import math
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import AdaptiveLatentCoT, Cache, Column, Config, LLaMA, Tokens


def constant(x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Executed and expected latent steps (N,) of a method that gives every token the same."""
    return (torch.full((len(x),), float(steps), device=x.device),) * 2


def interleave(tokens: Tokens, n: int, of: int) -> Tokens:
    """Each token n times in a row, (t, 0) … (t, n - 1), of the `of` that it will have in the causal order."""
    step = torch.arange(n, device=tokens.pos.device)
    order = (tokens.pos[:, None] * of + step).flatten()
    seat = None if tokens.seat is None else (tokens.seat[:, None] * n + step).flatten()
    return Tokens(tokens.pos.repeat_interleave(n), order, tokens.row.repeat_interleave(n), seat, tokens.B, tokens.A * n, False)


class Loop(LLaMA):
    """The stack of blocks K + 1 times on its own output, as ALBERT shares its layers (arXiv:1909.11942).

    Each pass sees the keys of its own pass only; the final norm is applied once, at the end.
    """

    def think(self, x: Tensor, tokens: Tokens, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        for k in range(self.max_latent + 1):
            x = self.one_pass(x, tokens, [cache[k]])
        return self.norm(x), *constant(x, self.max_latent)


class Pause(LLaMA):
    """K pause embeddings after every token, all the same learned vector; the last one predicts (arXiv:2310.02226).

    Causal over the interleaved sequence of (K + 1) · T. Ours: a token and its pauses share a position in RoPE.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.pause = nn.Parameter(torch.randn(config.n_embd) * config.init_std)

    def think(self, x: Tensor, tokens: Tokens, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        n = self.max_latent + 1
        z = torch.cat((x[:, None], self.pause.expand(len(x), n - 1, -1)), 1).flatten(0, 1)  # (N (K + 1), d)
        h = self.norm(self.one_pass(z, interleave(tokens, n, n), [cache[0]]))
        return h.view(len(x), n, -1)[:, -1], *constant(x, self.max_latent)


class Ponder(LLaMA):
    """PonderLM (arXiv:2505.20674): the expected embedding of the next token is added to the first input, K times over.

    Each pass sees the keys of its own pass only. The embedding is scaled by sqrt(d), and so is the table that is averaged.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scale = math.sqrt(config.n_embd)

    def think(self, x: Tensor, tokens: Tokens, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        h = self.norm(self.one_pass(x, tokens, [cache[0]]))
        for k in range(1, self.max_latent + 1):
            thought = self.head(h).float().softmax(1) @ (self.scale * self.embed.weight)
            self.matmul_flops += 4 * len(h) * self.embed.weight.numel()
            h = self.norm(self.one_pass(x + thought, tokens, [cache[k]]))
        return h, *constant(x, self.max_latent)


class Ponder2(LLaMA):
    """PonderLM-2 (arXiv:2509.23184): K latent thoughts after every token; (t, k) sees all latents of earlier tokens.

    That order is sequential, and decoding (one token at a time) follows it exactly. Several tokens at a time approximate it
    by Jacobi iteration: K passes that add one column each, 2 or 3 rounds over all columns (drawn at random in training, 3
    else), and the pass that predicts. As in its code a token and its latents share a position, and the embedding is scaled.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scale = math.sqrt(2.5 * config.n_embd)

    def think(self, x: Tensor, tokens: Tokens, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        N, K = len(x), self.max_latent
        steps = constant(x, K)
        if tokens.newest:  # decoding: exact
            for k in range(K + 1):
                x = self.norm(self.one_pass(x, replace(tokens, order=tokens.order * (K + 1) + k), [cache[0]]))
            return x, *steps

        def jacobi(z: Tensor, column: Column) -> Tensor:  # z (N, n, d) → h of each, from scratch; only what it is told to is kept
            n, seen = z.size(1), [column] if column is cache[0] or not cache[0].size else [cache[0], column]
            return self.norm(self.one_pass(z.flatten(0, 1), interleave(tokens, n, K + 1), seen)).view(N, n, -1)

        z = x[:, None]
        for _ in range(K):  # add one column each
            z = torch.cat((z, jacobi(z, Column())[:, -1:]), 1)
        rounds = int(torch.randint(2, 4, ())) if self.training else 3
        for _ in range(rounds if K else 0):
            z = torch.cat((z[:, :1], jacobi(z, Column())[:, :-1]), 1)
        return jacobi(z, cache[0])[:, -1], *steps


class MoR(LLaMA):
    """Mixture-of-Recursions with a token-choice router (arXiv:2507.10524): each token chooses its depth once, at the start.

    Middle-Cycle: the first and the last block run once, those between them K + 1 times at most, on the tokens whose depth is
    not reached, which see keys of the same recursion only. With g = softmax(θ · H_1) and i = argmax g the state is
    H_{r+1} = g_r · f(H_r), plus H_1 at r = i. Ours: Switch's balancing loss (arXiv:2101.03961) with weight 0.1.
    """

    balancing = 0.1

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.n_layer < 3:
            raise ValueError(f"mor needs a first, a last and a middle block, but n_layer is {config.n_layer}")
        self.router = nn.Linear(config.n_embd, config.max_latent + 1, bias=False)
        nn.init.normal_(self.router.weight, std=config.init_std)

    def think(self, x: Tensor, tokens: Tokens, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        layers = range(self.config.n_layer)
        n = min(self.max_latent, self.config.max_latent) + 1  # the router knows no deeper recursion than it was trained with
        first = self.one_pass(x, tokens, [cache[0]], layers[:1])
        with torch.autocast(x.device.type, enabled=False):
            g = self.router(first.float())[:, :n].softmax(1)  # (N, K + 1)
        self.matmul_flops += 2 * len(x) * self.router.weight.numel()
        depth = g.argmax(1)
        self.imbalance = n * (F.one_hot(depth, n).float().mean(0) * g.mean(0)).sum()
        h, index, who, done = first, torch.arange(len(x), device=x.device), tokens, torch.zeros_like(first)
        for r in range(n):
            h = g[index, r][:, None] * self.one_pass(h, who, [cache[r + 1]], layers[1:-1])
            done = done.index_add(0, index, (h + first[index]) * (depth[index] == r)[:, None])
            if r == n - 1:
                break
            who, chosen = who.select(depth[index] > r)
            if len(chosen) == 0:
                break
            h, index = F.embedding(chosen, h), index[chosen]
        return self.norm(self.one_pass(done, tokens, [cache[n + 1]], layers[-1:])), depth.float(), depth.float()

    def loss(self, nats: Tensor, targets: Tensor, expected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, ce, _ = super().loss(nats, targets, expected)
        return ce + self.balancing * self.imbalance, ce, self.imbalance


METHODS = {"vanilla": LLaMA, "adaptive": AdaptiveLatentCoT, "loop": Loop, "pause": Pause, "ponder": Ponder, "ponder2": Ponder2, "mor": MoR}


def build(config: Config) -> LLaMA:
    """The model that config.method names. Raises ValueError for a name that is not in METHODS, or a shape it cannot have."""
    if config.method not in METHODS:
        raise ValueError(f"method is {config.method!r}, but must be one of {', '.join(METHODS)}")
    return METHODS[config.method](config)
