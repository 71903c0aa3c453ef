"""The baselines, each as what it changes of LLaMA and nothing else, and `build`, which knows all methods.

`max_latent` is their K, and `steps` is K for all but MoR. What a source leaves open, the docstring settles.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from log import Cache, States, take
from model import AdaptiveLatentCoT, Config, LLaMA, Output


def constant(x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Executed steps (N,) and reach (N, steps) where each of the N tokens takes so many steps."""
    reach = torch.ones(len(x), steps, device=x.device)
    return reach.sum(1), reach


def interleave(states: States, n: int, columns: int) -> States:
    """Each token n times in a row, (t, 0) … (t, n - 1); its causal order has room for `columns`."""
    step = torch.arange(n, device=states.pos.device)
    order = (states.pos[:, None] * columns + step).flatten()
    seat = None if states.seat is None else (states.seat[:, None] * n + step).flatten()
    pos, column, row = (t.repeat_interleave(n) for t in (states.pos, states.column, states.row))
    return States(pos, order, column, row, seat, states.B, states.A * n)


class Loop(LLaMA):
    """The stack of blocks K + 1 times on its own output, as ALBERT shares its layers (arXiv:1909.11942).

    Each pass sees the keys of its own pass only; the final norm is applied once, at the end."""

    def think(self, x: Tensor, states: States, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        for k in range(self.max_latent + 1):
            x = self.one_pass(x, states, cache.logs[k])
        return self.norm(x), *constant(x, self.max_latent)

    def passes(self, steps: Tensor, live: Tensor, fed: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
        yield from [(fed.sum(1), live.sum(1), len(self.blocks))] * (self.max_latent + 1)


class Pause(LLaMA):
    """K pauses after every token, all the same learned embedding; the last one predicts (arXiv:2310.02226).

    Causal over the interleaved sequence of (K + 1) · T. Ours: a token and its pauses share a position."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.pause = nn.Parameter(torch.randn(config.n_embd) * config.init_std)

    def think(self, x: Tensor, states: States, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        K = self.max_latent
        z = torch.cat((x[:, None], self.pause.expand(len(x), K, -1)), 1).flatten(0, 1)  # (N (K + 1), d)
        h = self.norm(self.one_pass(z, interleave(states, K + 1, K + 1), cache.logs[0]))
        return h[K :: K + 1], *constant(x, K)

    def passes(self, steps: Tensor, live: Tensor, fed: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
        yield (self.max_latent + 1) * fed.sum(1), (self.max_latent + 1) * live.sum(1), len(self.blocks)


class Ponder(LLaMA):
    """PonderLM (arXiv:2505.20674): K times over, the first input gains the next token's expected embedding.

    Each pass sees the keys of its own pass only. Embedding and averaged table are scaled by sqrt(d)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scale = math.sqrt(config.n_embd)

    def think(self, x: Tensor, states: States, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        h = self.norm(self.one_pass(x, states, cache.logs[0]))
        for k in range(1, self.max_latent + 1):
            thought = self.head(h).float().softmax(1) @ (self.scale * self.embed.weight)
            h = self.norm(self.one_pass(x + thought, states, cache.logs[k]))
        return h, *constant(x, self.max_latent)

    passes = Loop.passes

    def further_products(self, steps: Tensor, fed: Tensor) -> Tensor:
        return 4.0 * self.max_latent * self.head.weight.numel() * fed.sum().double()  # a head, and the table


class Ponder2(LLaMA):
    """PonderLM-2 (arXiv:2509.23184): K thoughts after every token; (t, k) sees all latents of earlier tokens.

    Decoding, one token at a time, follows that order. Several tokens at a time approximate it by Jacobi
    iteration: K passes that add a column each, `rounds` over all (2 or 3, drawn for each step of training,
    else 3), and the pass that predicts. A token and its latents share a position, as in its code."""

    rounds = 3

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scale = math.sqrt(2.5 * config.n_embd)

    def draw(self, seed: int) -> None:
        self.rounds = int(torch.randint(2, 4, (), generator=torch.Generator().manual_seed(seed)))

    def think(self, x: Tensor, states: States, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        K, log, steps = self.max_latent, cache.logs[0], constant(x, self.max_latent)
        if states.A == 1:  # decoding: exact
            for k in range(K + 1):
                x = self.norm(self.one_pass(x, replace(states, order=states.pos * (K + 1) + k), log))
            return x, *steps
        z = x[:, None]  # (N, columns, d)
        for _ in range(K):  # one column more each
            z = torch.cat((z, self.jacobi(z, states, cache)[:, -1:]), 1)
            log.forget_last_pass()
        for _ in range((self.rounds if self.training else 3) if K else 0):
            z = torch.cat((z[:, :1], self.jacobi(z, states, cache)[:, :-1]), 1)
            log.forget_last_pass()
        return self.jacobi(z, states, cache)[:, -1], *steps

    def jacobi(self, z: Tensor, states: States, cache: Cache) -> Tensor:
        """z (N, n, d), the inputs of n columns → their states (N, n, d)."""
        states = interleave(states, z.size(1), self.max_latent + 1)
        return self.norm(self.one_pass(z.flatten(0, 1), states, cache.logs[0])).view(z.shape)

    def passes(self, steps: Tensor, live: Tensor, fed: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
        K, tokens = self.max_latent, fed.sum(1)
        rounds = (self.rounds if self.training else 3) if K else 0
        alone = int(tokens.max()) == 1  # decoding: one column after the other
        for n in range(1, K + 2) if alone else (*range(1, K + 1), *[K + 1] * rounds, K + 1):
            keys = (K + 1) * (live & ~fed).sum(1) + n * tokens
            yield tokens if alone else n * tokens, keys, len(self.blocks)


class MoR(LLaMA):
    """Mixture-of-Recursions, token-choice routing (arXiv:2507.10524): a token chooses its depth at the start.

    Middle-Cycle: the first and the last block run once, those between at most K + 1 times, on the tokens
    whose depth is not reached, which see keys of the same recursion. With g = softmax(θ · H_1), i = argmax g
    the state is H_{r+1} = g_r · f(H_r), plus H_1 at r = i. Ours: 0.1 of Switch's balancing loss
    (arXiv:2101.03961)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.n_layer < 3:
            raise ValueError(f"mor needs a first, a last and a middle block, but n_layer is {config.n_layer}")
        self.router = nn.Linear(config.n_embd, config.max_latent + 1, bias=False)
        nn.init.normal_(self.router.weight, std=config.init_std)

    def depths(self) -> int:
        """Recursions to choose from: the router knows no deeper one than it was trained with."""
        return min(self.max_latent, self.config.max_latent) + 1

    def think(self, x: Tensor, states: States, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        layers, n = range(len(self.blocks)), self.depths()
        first = self.one_pass(x, states, cache.logs[0], layers[:1])
        with torch.autocast(x.device.type, enabled=False):
            g = self.router(first.float())[:, :n].softmax(1)  # (N, K + 1)
        depth = g.argmax(1)
        cache.imbalance = n * (F.one_hot(depth, n).float().mean(0) * g.mean(0)).sum()
        h, who, done, index = first, states, torch.zeros_like(first), torch.arange(len(x), device=x.device)
        for r in range(n):
            h = g[index, r][:, None] * self.one_pass(h, who, cache.logs[r + 1], layers[1:-1])
            done = done.index_add(0, index, (h + first[index]) * (depth[index] == r)[:, None])
            if r == n - 1:
                break
            who, chosen, due = who.select(depth[index] > r, self.agree)
            if not due:
                break
            h, index = take(h, chosen), index[chosen]
        last = self.one_pass(done, states, cache.logs[n + 1], layers[-1:])
        reach = torch.arange(n - 1, device=x.device) < depth[:, None]
        return self.norm(last), depth.float(), reach.float()

    def forward(self, *inputs, **named) -> Output:
        o = super().forward(*inputs, **named)
        if o.loss is not None:
            o.ada = o.cache.imbalance
            o.loss = o.ce + 0.1 * o.ada
        return o

    def passes(self, steps: Tensor, live: Tensor, fed: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
        yield fed.sum(1), live.sum(1), 2
        for r in range(self.depths()):
            yield (fed & (steps >= r)).sum(1), (live & (steps >= r)).sum(1), len(self.blocks) - 2

    def further_products(self, steps: Tensor, fed: Tensor) -> Tensor:
        return 2.0 * self.router.weight.numel() * fed.sum().double()


METHODS = {"vanilla": LLaMA, "adaptive": AdaptiveLatentCoT, "loop": Loop, "pause": Pause, "ponder": Ponder,
           "ponder2": Ponder2, "mor": MoR}


def build(config: Config) -> LLaMA:
    """The model that config.method names. Raises ValueError for an unknown name, or an impossible shape."""
    if config.method not in METHODS:
        raise ValueError(f"method is {config.method!r}, but must be one of {', '.join(METHODS)}")
    model = METHODS[config.method](config)
    model.scale = config.embed_scale or model.scale
    return model
