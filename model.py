"""A LLaMA that may think before it says a token: token-level adaptive latent chain-of-thought.

The method is of arXiv:2602.08220; § are sections of METHOD.md. Every state has an address (t, k): position
and latent step. Column k = 0 is the ordinary token. Where a small router finds it worth while, the last
hidden state is fed back in as the next input: the token enters column k + 1. What is notable here:
* All states go into one log with their addresses (log.py), and one rule says who sees whom: the paper's
  two-dimensional causal mask. Training, evaluation, prefill and decoding are the same passes over that log.
* Live tokens are packed: a pass computes N rows, one per live token, and nothing for a token that has halted.
* Decoding goes in ticks: one state for each row, whatever its column, so that no row waits for another.
* The vanilla part is Meta's LLaMA: its weights load into Hugging Face's LlamaForCausalLM unchanged.
* Router, reach, exit mass, softmax and losses are fp32, also under bf16 autocast, and weights in training.

Shapes: B rows, T tokens of a row, N packed states, d width, H heads, G of keys and values, hd their width.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from configurator import check_range
from log import Cache, Entries, Log, States, attend, make_mask, pad, rope_table, rotate, send, spread, take

CHUNK = 2**27  # most logits kept beside a loss, or made at once for it: half a gigabyte in fp32


@dataclass
class Config:
    """The shape of a model. Raises ValueError for a value out of its range, or heads that do not fit."""

    method: str = "adaptive"  # vanilla, adaptive, loop, pause, ponder, ponder2 or mor
    vocab_size: int = 257  # V: rows of the embedding and of the head
    block_size: int = 256  # context length in tokens
    n_layer: int = 4  # blocks
    n_head: int = 4  # H: attention heads
    n_kv_head: int = 0  # G: heads of keys and values, each serving H / G heads; 0: as many as heads
    n_embd: int = 128  # d: width
    head_dim: int = 0  # hd: width of a head; 0: n_embd / n_head
    n_ff: int = 344  # width of the SwiGLU
    tie_embeddings: bool = False  # the head reads with the embedding's table
    embed_scale: float = 0.0  # s: the embedding is multiplied by this; 0: by the method's own
    qkv_bias: bool = False  # wq, wk and wv add a bias, as in Qwen2
    qk_norm: bool = False  # an RMSNorm on each head of queries and of keys, as in Qwen3
    rope_theta: float = 10000.0  # base of the rotary angles
    rope_scaling: list[float] = field(default_factory=list)  # linear: factor; Llama 3: and low, high, context
    norm_eps: float = 1e-5  # RMSNorm
    init_std: float = 0.02  # standard deviation of every weight matrix at the start
    max_latent: int = 3  # ℓ_max (adaptive), K (the baselines): most latent steps of a token
    tau: float = 0.1  # τ: a step is executed while its reach is at least this; a budget moves it in training
    lam: float = 0.0  # λ: weight of the adaptive loss
    beta: float = 1.0  # β: exponent of the correctness weight q^β
    router_bias: float = 2.0  # b at the start: reach 0.88, 0.78, 0.68: steps are learnt first, then pruned
    exit_loss: float = 0.0  # ε: weight of the cross-entropy of every h[t,k] that is executed in training
    weigh_values: bool = False  # attention reads values times r[t,k]: later losses train the router

    def __post_init__(self) -> None:
        for each in fields(Config):
            check_range(each.name, getattr(self, each.name), each.name)
        if self.vocab_size < 1:  # train.py's 0 stands for that of the data
            raise ValueError(f"vocab_size is {self.vocab_size}, but must be at least 1")
        if not self.head_dim and self.n_embd % self.n_head or self.head_width % 2:
            width = f"head_dim {self.head_dim}, or n_embd {self.n_embd} / n_head {self.n_head}"
            raise ValueError(f"the width of a head, {width}, must be a whole and even number")
        if self.n_head % (self.n_kv_head or 1):
            raise ValueError(f"n_kv_head is {self.n_kv_head}, but must be 0 or divide n_head {self.n_head}")

    @property
    def head_width(self) -> int:
        return self.head_dim or self.n_embd // self.n_head


@dataclass
class Output:
    """What a forward returns; steps, reach and expected_steps are 0 on padding."""

    logits: Tensor | None  # (B, T, V); None: too many to keep beside the loss
    loss: Tensor | None  # ce + λ · ada, and ε · the loss of every exit in training (§4)
    ce: Tensor | None  # mean cross-entropy, nats per token
    ada: Tensor | None  # mean of q^β · Σ_k r[t,k] (§4); of mor its balancing loss
    steps: Tensor  # (B, T) executed latent steps
    reach: Tensor  # (B, T, ℓ_max) r[t,k], k ≥ 1, of steps taken and of the first one refused; 0 beyond
    expected_steps: Tensor  # (B, T) Σ_{k≥1} r[t,k] of the steps taken, differentiable
    cache: Cache


@dataclass
class Generated:
    """The n rows that spoke in one tick, each field (n,)."""

    row: Tensor  # which of the prompts
    token: Tensor
    prob: Tensor  # what the model gave the token, before temperature, top-k and top-p
    steps: Tensor  # executed latent steps behind it
    expected_steps: Tensor  # Σ_{k≥1} r[t,k]


class Block(nn.Module):
    """One layer: attention and SwiGLU, each behind an RMSNorm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d, self.head_dim = config.n_embd, config.head_width
        self.weighs = config.weigh_values
        q, kv = self.head_dim * config.n_head, self.head_dim * (config.n_kv_head or config.n_head)
        head_norm = nn.RMSNorm if config.qk_norm else nn.Identity  # which takes any arguments
        self.attn_norm = nn.RMSNorm(d, config.norm_eps)
        self.wq = nn.Linear(d, q, bias=config.qkv_bias)
        self.wk = nn.Linear(d, kv, bias=config.qkv_bias)
        self.wv = nn.Linear(d, kv, bias=config.qkv_bias)
        self.q_norm = head_norm(self.head_dim, config.norm_eps)
        self.k_norm = head_norm(self.head_dim, config.norm_eps)
        self.wo = nn.Linear(q, d, bias=False)
        self.ffn_norm = nn.RMSNorm(d, config.norm_eps)
        self.w1 = nn.Linear(d, config.n_ff, bias=False)  # gate
        self.w3 = nn.Linear(d, config.n_ff, bias=False)  # up
        self.w2 = nn.Linear(config.n_ff, d, bias=False)  # down

    def forward(self, x: Tensor, rope: Tensor, states: States, keys: Entries, values: Entries, seats, mask):
        """x (N, d) → (N, d); keys and values go to seats: a slice, or in a compiled tick an index (1,)."""
        q, k, v = self.before(x, rope)
        if self.weighs and states.reach is not None:
            v = v * states.reach[:, None, None].to(v.dtype)
        k = keys.append(seats, states.grid(k))  # (B, S, G, hd)
        v = values.append(seats, states.grid(v))
        return self.after(x, states.pack(attend(states.grid(q), k, v, mask)))

    def before(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before attention: x (N, d) → q (N, H, hd), k and v (N, G, hd)."""
        z = self.attn_norm(x)
        q, k, v = (w(z).unflatten(1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        return rotate(self.q_norm(q), rope).to(v.dtype), rotate(self.k_norm(k), rope).to(v.dtype), v

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """And after it: the residual x (N, d) and the heads' values y (N, H · hd) → (N, d)."""
        x = x + self.wo(y)
        z = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(z)) * self.w3(z))


class LLaMA(nn.Module):
    """Vanilla: one pass. Every other method overrides `think`."""

    scale = 1.0  # s: the embedding is multiplied by this (§1)
    agree = None  # where processes must make the same passes (shard.py): see States.select
    chunk = CHUNK  # logits that `nats` makes at once

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.max_latent, self.tau, self.lam = config.max_latent, config.tau, config.lam  # dials; τ, or τ[t,k]
        self.checkpointing = False  # recompute each block in the backward pass: less memory, more time
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.register_buffer("rope", rope_table(config), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.init_std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def one_pass(self, x: Tensor, states: States, log: Log, layers: range | None = None) -> Tensor:
        """The stack of blocks, or some layers of it, on x (N, d). Stops before the final norm."""
        seats = log.open(states)
        mask = make_mask(states, log)
        rope = self.rope[:, states.pos, None]
        for layer in range(len(self.blocks)) if layers is None else layers:
            inputs = x, rope, states, log.entries[f"k{layer}"], log.entries[f"v{layer}"], seats, mask
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.blocks[layer], *inputs, use_reentrant=False, context_fn=log.recomputed)
            else:
                x = self.blocks[layer](*inputs)
        return x

    def think(self, x: Tensor, states: States, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, d), scaled embeddings → what the head reads (N, d), executed steps (N,), reach (N, ℓ_max)."""
        reach = torch.zeros(len(x), 0, device=x.device)
        return self.norm(self.one_pass(x, states, cache.logs[0])), reach.sum(1), reach

    def hidden(self, idx: Tensor, cache: Cache, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """All but the head → h̄ (N, d), steps (N,), reach (N, ℓ_max) of live tokens. Raises as forward."""
        T, context = idx.size(1), self.config.block_size
        if cache.length + T > context:
            raise ValueError(f"{cache.length} + {T} tokens exceed the context, block_size {context}")
        states = cache.states(idx, live)
        packed = idx.flatten() if live is None else idx[live]
        return self.think(self.scale * self.embed(packed), states, cache)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None,
                live: Tensor | None = None) -> Output:
        """idx (B, T) continues the rows of cache (none: starts them); targets (B, T), -1 where there is none;
        live (B, T) is false on padding, which may stand anywhere. Raises ValueError past block_size."""
        cache = Cache() if cache is None else cache
        cache.exits = []
        h, steps, reach = self.hidden(idx, cache, live)
        taken = torch.arange(reach.size(1), device=reach.device) < steps[:, None]
        expected = (reach * taken).sum(1)
        logits = loss = ce = ada = None
        if targets is None or len(h) * self.config.vocab_size <= CHUNK:
            logits = self.head(h)
        if targets is not None:
            targets = targets.flatten() if live is None else targets[live]
            nats = self.nats(h, targets) if logits is None else self.nats_of(logits, targets)
            loss, ce, ada = self.loss(nats, targets, expected)
            share = self.config.exit_loss / (self.max_latent + 1)
            for exit, index in cache.exits:
                loss = loss + share * self.nats(exit, targets[index]).sum() / (targets != -1).sum()
        logits = None if logits is None else spread(logits, idx, live)
        steps, reach, expected = (spread(each, idx, live) for each in (steps, reach, expected))
        return Output(logits, loss, ce, ada, steps, reach, expected, cache)

    def nats(self, h: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy (N,); too many logits are made chunk by chunk, and again in the backward pass."""
        n = max(1, self.chunk // self.config.vocab_size)
        if len(h) <= n:
            return self.nats_of(self.head(h), targets)
        chunks = zip(h.split(n), targets.split(n))
        return torch.cat([checkpoint(self.nats, *chunk, use_reentrant=False) for chunk in chunks])

    @staticmethod
    def nats_of(logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, logits (N, V) and targets (N,) → (N,), 0 where a target is -1."""
        return F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="none")

    def loss(self, nats: Tensor, targets: Tensor, expected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Over targets (N,) that are not -1: L = CE + λ · ada, CE, ada = mean_t q_t^β · Σ_k r[t,k] (§4)."""
        real = targets != -1
        weight = torch.exp(-self.config.beta * nats.detach()) * real  # q^β, as q = exp(-nats): no gradient
        ce = nats.sum() / real.sum()
        ada = (weight * expected).sum() / real.sum()
        return ce + self.lam * ada, ce, ada

    def draw(self, seed: int) -> None:
        """What a step of training draws at random, once for all its micro-batches and processes."""

    def passes(self, steps: Tensor, live: Tensor, fed: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Queries and keys of a row (B,), and layers, of each pass; steps, live, fed (B, T): see costs.py."""
        yield fed.sum(1), live.sum(1), len(self.blocks)

    def further_products(self, steps: Tensor, fed: Tensor) -> Tensor | float:
        """FLOPs of the matrix products outside the blocks, the last head apart."""
        return 0.0

    def prefill(self, texts: list[list[int]]) -> Cache:
        """A cache that holds the given texts, a row each; they may be empty."""
        cache = Cache()
        idx, live = pad(texts, self.embed.weight.device)
        cache.at["pos"] = idx.new_zeros(len(texts))
        if idx.size(1):
            self.hidden(idx, cache, None if live.all() else live)
        return cache

    def tick(self, x: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One state for each row: x (B, d) → which rows speak now (B,), what the head reads (B, d), executed
        and expected steps (B,), and the next x of the rows that think on (B, d). Here all rows speak."""
        states = States.tick(cache.at["pos"], torch.zeros_like(cache.at["pos"]))
        h, steps, reach = self.think(x, states, cache)
        return states.column == 0, h, steps, reach.sum(1), x

    @torch.no_grad()
    def generate(self, prompts: Tensor | list[list[int]], max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None, seed: int | list[int] | None = None,
                 stop: int | None = None) -> Iterator[Generated]:
        """Continues prompts, lists of tokens of any lengths: yields the rows that speak, tick by tick.

        temperature 0 takes the likeliest token; top_k None or 0 and top_p None are off. Row i draws with the
        seed `seed` + i, or seed[i]: its text depends on its prompt and its seed alone, and ends at `stop`.
        Of too long a prompt the end is read; a full context goes on from its last half. Raises ValueError."""
        device, context = self.embed.weight.device, self.config.block_size
        prompts = prompts.tolist() if isinstance(prompts, Tensor) else prompts
        texts = [list(prompt)[-context:] for prompt in prompts]  # what the context of each row holds
        if not texts or not all(texts):
            raise ValueError("want a prompt, and in each at least one token to go on from")
        if not (temperature >= 0 and (top_k or 0) >= 0 and (top_p is None or 0 < top_p <= 1)):
            raise ValueError(f"{temperature=}, {top_k=}, {top_p=}: want >= 0, >= 0 and in (0, 1]")
        first = int(torch.randint(2**31, ())) if seed is None else seed
        seeds = seed if isinstance(seed, list) else range(first, first + len(texts))
        dice = [torch.Generator().manual_seed(own) for own, _ in zip(seeds, texts, strict=True)]
        rows = list(range(len(texts))) if max_new_tokens > 0 else []  # the prompts behind the cache's rows
        left = [max_new_tokens] * len(texts)
        cache = self.prefill([text[:-1] for text in texts])
        x = self.scale * self.embed(torch.tensor([text[-1] for text in texts], device=device))
        while rows:
            speaks, h, steps, expected, x = self.tick(x, cache)
            who = [i for i, says in enumerate(speaks.tolist()) if says]
            if not who:
                continue
            speakers = [rows[i] for i in who]
            index, prompt = send(torch.tensor([who, speakers]), device)
            logits = self.head(h[index]).float()
            token = sample(logits, temperature, top_k or 0, top_p or 1.0, [dice[row] for row in speakers])
            prob = logits.softmax(1).gather(1, token[:, None]).squeeze(1)
            yield Generated(prompt, token, prob, steps[index], expected[index])
            x = x.index_copy(0, index, self.scale * self.embed(token))
            cache.at["pos"] = cache.at["pos"] + speaks
            for row, new in zip(speakers, token.tolist()):
                texts[row].append(new)
                left[row] = 0 if new == stop else left[row] - 1
            kept = [i for i, row in enumerate(rows) if left[row] > 0]
            if 0 < len(kept) < len(rows):
                x, cache = x[kept], cache.rows(kept)
            rows = [rows[i] for i in kept]
            full = [i for i, row in enumerate(rows) if len(texts[row]) > context]
            for i in full:
                texts[rows[i]] = texts[rows[i]][-max(1, context // 2) :]
            if full:
                again = self.prefill([texts[rows[i]][:-1] for i in full])
                cache = cache.replace(full, again) if len(full) < len(rows) else again


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, dice: list) -> Tensor:
    """A token (n,) from logits (n, V) by temperature, top-k and nucleus (top-p); dice: n CPU generators."""
    if temperature == 0:
        return logits.argmax(1)
    logits = (logits - logits.amax(1, keepdim=True)) / max(temperature, 1e-6)
    share, token = logits.softmax(1).topk(min(top_k or logits.size(1), logits.size(1)), 1)  # likeliest first
    before = share.cumsum(1) - share
    mass = share.where(before < top_p * share.sum(1, keepdim=True), 0).cumsum(1)
    draws = send(torch.stack([torch.rand(1, generator=die) for die in dice]), mass.device)
    return token.gather(1, torch.searchsorted(mass, draws * mass[:, -1:])).squeeze(1)


class AdaptiveLatentCoT(LLaMA):
    """The method: a token thinks as long as its router wants to (§1 to §4). τ is a dial, in no state_dict."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scale = math.sqrt(2.5 * config.n_embd) if config.max_latent else 1.0
        self.router = nn.Linear(config.n_embd, 1)
        nn.init.normal_(self.router.weight, std=0.02)  # not zero: tokens must differ for τ to part them
        nn.init.constant_(self.router.bias, config.router_bias)

    def onward(self, h: Tensor, reach: Tensor, states: States) -> tuple[Tensor, Tensor]:
        """h[t,k] (n, d) and r[t,k] (n,) → r[t,k+1] and which tokens go on, both (n,) (§3)."""
        with torch.autocast(h.device.type, enabled=False):
            gate = torch.sigmoid(self.router(h.float())).squeeze(1)  # g[t,k]
        tau = self.tau[states.pos, states.column] if isinstance(self.tau, Tensor) else self.tau
        wanted = reach * gate  # r[t,k+1]
        return wanted, (wanted >= tau) & (states.column < self.max_latent)

    def think(self, x: Tensor, states: States, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        z = x  # z[t,k] (n, d) of the tokens that are live
        index = torch.arange(len(x), device=x.device)  # which of the N they are
        reach = torch.ones(len(x), device=x.device)  # r[t,k]
        mixture = torch.zeros(x.shape, device=x.device)  # h̄[t]
        steps = torch.zeros_like(reach)
        asked = torch.zeros(len(x), self.max_latent, device=x.device)  # r[t,k] of all N tokens, k ≥ 1
        for k in range(self.max_latent + 1):
            h = self.norm(self.one_pass(z, states, cache.logs[0]))  # h[t,k] (n, d)
            if self.config.exit_loss and self.training:
                cache.exits.append((h, index))
            wanted, live = self.onward(h, reach, states)
            onward = wanted.where(live, 0)  # r[t,k+1], but 0 of a token that halts: it keeps all its mass
            mixture.index_add_(0, index, (reach - onward)[:, None] * h.float())  # h̄ += p[t,k] h[t,k]
            if k == self.max_latent:
                break
            asked[index, k] = wanted
            states, chosen, due = states.select(live, self.agree)
            if not due:
                break
            z = take(h, chosen)  # z[t,k+1] = h[t,k]
            reach, index = onward[chosen], index[chosen]
            states = replace(states, column=states.column + 1, deepest=k + 1, reach=reach)
            steps.index_add_(0, index, torch.ones_like(reach))
        return mixture, steps, asked

    def tick(self, x: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        at, zero = cache.at, torch.zeros(len(x), device=x.device)
        column = at.get("column", zero.long())
        reach, expected = at.get("reach", zero + 1), at.get("expected", zero)
        mixture = at.get("mixture", torch.zeros(x.shape, device=x.device))
        states = States.tick(at["pos"], column, self.max_latent, reach)
        h = self.norm(self.one_pass(x, states, cache.logs[0]))
        wanted, live = self.onward(h, reach, states)
        onward = wanted.where(live, 0)
        mixture = mixture + (reach - onward)[:, None] * h.float()
        at["column"] = (column + 1) * live  # a row that speaks begins its next token
        at["reach"] = onward.where(live, 1)
        at["mixture"] = mixture * live[:, None]
        at["expected"] = (expected + onward) * live
        return ~live, mixture, column.float(), expected, h.to(x.dtype)  # embeddings go in beside it

    def passes(self, steps: Tensor, live: Tensor, fed: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
        keys = torch.zeros_like(steps[:, 0])
        for k in range(self.max_latent + 1):
            keys = keys + (live & (steps >= k)).sum(1)
            yield (fed & (steps >= k)).sum(1), keys, len(self.blocks)

    def further_products(self, steps: Tensor, fed: Tensor) -> Tensor:
        exits = [self.head.weight] * bool(self.config.exit_loss and self.training)
        read = sum(w.numel() for w in (*self.router.parameters(), *exits) if w.dim() == 2)
        return 2.0 * read * ((steps + 1) * fed).sum().double()
