"""A LLaMA that may think before it says a token: token-level adaptive latent chain-of-thought (arXiv:2602.08220).

Every state has an address (t, k): token t, latent step k. Column k = 0 is the ordinary token. Where a small router finds
it worth while, the last hidden state is fed back in as the next input, and so the token enters column k + 1.
What is notable here (§ are sections of METHOD.md):
* One forward serves training, evaluation, prefill and decoding: each pass appends to one column of the `Cache` and
  attends to that column and those below it. Training starts with an empty cache and throws it away.
* Live tokens are packed: a pass computes N rows, one per live token, and nothing for a token that has halted. Only
  attention sees a (B, A) grid, A the longest row. A halted token leaves no key in the columns that it never reached.
* The vanilla part is Meta's LLaMA: its weights load into Hugging Face's LlamaForCausalLM unchanged.
* Router, reach, exit mass, softmax and losses are fp32, also under bf16 autocast.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

FAR = 2**30  # the order of an empty seat: later than every real token, so no real query sees it
CHUNK = 2**27  # logits that are in memory at once where a loss is wanted: half a gigabyte in fp32


@dataclass
class Config:
    """The shape of a model. Raises ValueError, one line, for a shape that cannot be built."""

    method: str = "adaptive"  # vanilla, adaptive, loop, pause, ponder, ponder2 or mor
    vocab_size: int = 257  # rows of the embedding and of the head
    block_size: int = 256  # context length in tokens
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads
    n_embd: int = 128  # d: width
    n_ff: int = 344  # width of the SwiGLU
    rope_theta: float = 10000.0  # base of the rotary angles
    norm_eps: float = 1e-5  # RMSNorm
    init_std: float = 0.02  # standard deviation of every weight matrix at the start
    max_latent: int = 3  # ℓ_max (adaptive), K (the baselines): most latent steps of a token
    tau: float = 0.1  # τ: a step is executed while its reach is at least this
    lam: float = 0.0  # λ: weight of the adaptive loss
    beta: float = 1.0  # β: exponent of the correctness weight q^β
    router_bias: float = 2.0  # b at the start: reach 0.88, 0.78, 0.68, so that every step is learnt before any is pruned

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd {self.n_embd} does not divide into n_head {self.n_head} heads of an even width (RoPE)")
        if self.max_latent < 0:
            raise ValueError(f"max_latent is {self.max_latent}, but must be 0 or more")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau is {self.tau}, but must lie in [0, 1]")
        if not (self.lam >= 0 and self.beta >= 0):
            raise ValueError(f"lam is {self.lam} and beta is {self.beta}, but neither may be negative")


@dataclass
class Output:
    """What a forward returns. Shapes: logits (B, T, V); steps, expected_steps (B, T), 0 where no token is; scalars else."""

    logits: Tensor | None  # None: too many to keep, the loss was taken chunk by chunk
    loss: Tensor | None  # ce + λ · ada (§4)
    ce: Tensor | None  # mean cross-entropy, nats per token
    ada: Tensor | None  # mean of q^β · Σ_k r[t,k] (§4)
    steps: Tensor  # executed latent steps
    expected_steps: Tensor  # Σ_{k≥1} r[t,k], differentiable
    cache: "Cache | None"


@dataclass
class Generated:
    """One new token of every row, each (B,): 0 where `live` is false, that is, where the row has ended."""

    token: Tensor
    prob: Tensor  # what the model gave it, before temperature, top-k and top-p
    steps: Tensor  # executed latent steps behind it
    expected_steps: Tensor  # Σ_{k≥1} r[t,k]
    live: Tensor


@dataclass
class Tokens:
    """Who the N packed tokens of a pass are. Sorted by row, and within a row by order."""

    pos: Tensor  # (N,) position: turns RoPE
    order: Tensor  # (N,) causal order: makes the mask; the position, unless a method interleaves
    row: Tensor  # (N,) batch row
    seat: Tensor | None  # (N,) seat in the (B, A) grid, flat; None: the grid is full, N = B · A
    B: int  # rows of the grid
    A: int  # tokens of the longest row
    newest: bool  # one token a row came in, so that nothing in the cache is later than these

    def select(self, live: Tensor) -> "tuple[Tokens, Tensor]":
        """The tokens where live (N,) is true, and their indices (n,). Costs a host sync, in training the only one of a pass."""
        count = torch.zeros(self.B, dtype=torch.long, device=live.device).index_add_(0, self.row, live.long())
        n, longest = torch.stack((count.sum(), count.max())).tolist()
        if n == len(live):
            return self, torch.arange(n, device=live.device)
        index = live.nonzero_static(size=n).squeeze(1)
        row = self.row[index]
        rank = torch.arange(n, device=live.device) - (count.cumsum(0) - count)[row]
        seat = None if n == self.B * longest else row * longest + rank
        return Tokens(self.pos[index], self.order[index], row, seat, self.B, longest, self.newest), index

    def grid(self, packed: Tensor) -> Tensor:
        """(N, …) → (B, A, …), zeros on empty seats."""
        if self.seat is not None:
            packed = packed.new_zeros(self.B * self.A, *packed.shape[1:]).index_copy(0, self.seat, packed)
        return packed.view(self.B, self.A, *packed.shape[1:])

    def pack(self, grid: Tensor) -> Tensor:
        """(B, A, H, hd) → (N, H · hd)."""
        flat = grid.reshape(self.B * self.A, -1)
        return flat if self.seat is None else F.embedding(self.seat, flat)  # a gather, with a faster backward than indexing

    def grid_order(self) -> Tensor:
        """(B, A): the order of each seat, FAR where empty."""
        if self.seat is None:
            return self.order.view(self.B, self.A)
        return self.order.new_full((self.B * self.A,), FAR).index_copy_(0, self.seat, self.order).view(self.B, self.A)


class Column:
    """What the tokens that reached one latent step left: their order (B, S), and per layer their keys and values.

    Without gradients a column that already holds tokens grows in place: buffers of (B, H, capacity, hd), doubled when full
    (or as `reserve` is told), each row filled up to its own count. With gradients a column is written once, by the pass that fills it.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple, Tensor] = {}  # whose shapes stand still: they outlive `clear`
        self.clear()

    def clear(self) -> None:
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}  # layer → K, V (B, H, capacity, hd)
        self.order: Tensor | None = None  # (B, capacity), FAR where empty
        self.count: Tensor | None = None  # (B,) tokens of each row; None: size tokens in every row
        self.size = 0  # tokens of the longest row; where shapes stand still, at least that
        self.end: int | None = None  # seats that attention looks at: size; None: all of them, so that shapes stand still

    def reserve(self, tokens: Tokens, capacity: int = 0) -> None:
        """Makes room for the tokens of this pass. capacity > 0: for so many in all, and shapes shall stand still."""
        self.fresh, ragged = self.size == 0, tokens.seat is not None
        if self.fresh:
            self.order, self.size = tokens.grid_order(), tokens.A
            self.count, self.end = (self.order < FAR).sum(1) if ragged else None, self.size
            return
        if (ragged or capacity) and self.count is None:
            self.count = torch.full((tokens.B,), self.size, device=tokens.row.device)
        if capacity and self.end is not None:
            self.count = self.grown(self.count.clone(), "count", 0, tokens.B, 0, True)  # it may be that buffer itself
        if ragged and not capacity:
            self.size = int(self.count.index_add(0, tokens.row, torch.ones_like(tokens.row)).max())
        else:
            self.size += tokens.A
        self.end = None if capacity else self.size
        room = self.order.size(1)
        if capacity > room or self.size > room:
            capacity, still = capacity or 2 * self.size, capacity > 0
            self.order = self.grown(self.order, "order", 1, capacity, FAR, still)
            for layer, (k, v) in self.kv.items():
                self.kv[layer] = self.grown(k, f"k{layer}", 2, capacity, 0, still), self.grown(v, f"v{layer}", 2, capacity, 0, still)

    def grown(self, t: Tensor, name: str, dim: int, size: int, fill: int, still: bool) -> Tensor:
        """A buffer that begins with t. Where shapes stand still, the next text gets the same one: a CUDA graph writes where it lies."""
        shape = (*t.shape[:dim], size, *t.shape[dim + 1 :])
        kind = (name, shape, t.dtype, t.device, torch.is_inference_mode_enabled())
        buffer = self.buffers.get(kind)
        buffer = t.new_full(shape, fill) if buffer is None else buffer.fill_(fill)
        if still:
            self.buffers[kind] = buffer
            torch._dynamo.mark_static_address(buffer, guard=False)
        buffer.narrow(dim, 0, t.size(dim)).copy_(t)
        return buffer

    def seat(self, tokens: Tokens) -> None:
        """Gives each token of this pass its seat, behind those of its row, and writes down its order."""
        if self.fresh:
            return
        if self.count is None:
            self.where = (slice(None), slice(self.size - tokens.A, self.size))
            self.order[self.where] = tokens.grid_order()
            return
        seat = torch.arange(len(tokens.row), device=tokens.row.device) if tokens.seat is None else tokens.seat
        self.where = (tokens.row, self.count[tokens.row] + seat % tokens.A)
        self.count.index_add_(0, tokens.row, torch.ones_like(tokens.row))
        self.order[self.where] = tokens.order

    def put(self, layer: int, tokens: Tokens, k: Tensor, v: Tensor) -> None:
        """Stores keys and values (B, H, A, hd) of the pass, on the seats that `seat` gave."""
        if self.fresh:
            self.kv.setdefault(layer, (k, v))  # activation checkpointing comes by a second time
            return
        for buffer, new in zip(self.kv[layer], (k, v)):
            rows, seats = self.where
            if self.count is None:
                buffer[:, :, seats] = new
            else:
                buffer[rows, :, seats] = tokens.pack(new.transpose(1, 2)).view(len(rows), new.size(1), -1)


class Cache:
    """The columns 0 … ℓ_max of a batch, made as they are reached, and the next position of each row."""

    def __init__(self) -> None:
        self.columns: list[Column] = []
        self.next_pos: Tensor | None = None  # (B,)
        self.length = 0  # tokens fed so far, padding included: no row is longer

    def __getitem__(self, k: int) -> Column:
        while len(self.columns) <= k:
            self.columns.append(Column())
        return self.columns[k]

    def upto(self, k: int) -> list[Column]:
        """Columns 0 … k: all that a query of step k may see (§2)."""
        return [self[j] for j in range(k + 1)]

    def clear(self) -> "Cache":
        """Forgets all tokens, but not the buffers whose shapes stand still."""
        self.next_pos, self.length = None, 0
        for column in self.columns:
            column.clear()
        return self

    def rows(self, chosen: list[int]) -> "Cache":
        """A cache whose row i is a copy of row chosen[i] of this one: one prefill for many continuations."""
        new = copy.copy(self)
        new.next_pos, new.columns = self.next_pos[chosen], [copy.copy(column) for column in self.columns]
        for column in new.columns:
            column.kv = {layer: (k[chosen], v[chosen]) for layer, (k, v) in column.kv.items()}
            column.order, column.count = (None if t is None else t[chosen] for t in (column.order, column.count))
            column.buffers = {}
        return new

    def tokens(self, B: int, T: int, live: Tensor | None, device: torch.device) -> Tokens:
        """The next T tokens of every row, or of those that are live (B, T), as Tokens; advances the positions."""
        if self.next_pos is None:
            self.next_pos = torch.zeros(B, dtype=torch.long, device=device)
        ahead = torch.arange(T, device=device).expand(B, T) if live is None else live.long().cumsum(1) - 1
        pos = (self.next_pos[:, None] + ahead).flatten()
        self.next_pos = self.next_pos + (T if live is None else live.sum(1))
        self.length += T
        row = torch.arange(B, device=device).repeat_interleave(T, output_size=B * T)
        tokens = Tokens(pos, pos.clone(), row, None, B, T, T == 1)  # a copy, as a compiled pass is guarded by which tensors are one
        return tokens if live is None else tokens.select(live.flatten())[0]


# ------------------------------------------------------------------------------------------------ attention


def make_mask(tokens: Tokens, columns: list[Column]) -> Tensor | BlockMask | None:
    """Who sees whom in a pass (§2): key order ≤ query order, over the given columns; made once, used by every layer.

    None means that no mask is needed: a single fresh column is causal, and the newest token of a row sees all that is there.
    An empty seat sees everything, so that no softmax is over nothing; nobody reads what it computes.
    """
    if len(columns) == 1 and columns[0].fresh:
        return None
    if tokens.newest and all(column.count is None for column in columns):
        return None
    query, key = tokens.grid_order(), torch.cat([column.order[:, : column.end] for column in columns], 1)
    if query.is_cuda and torch.is_grad_enabled():
        return block_mask(query, key)
    seen = key[:, None, None, :] <= query[:, None, :, None]  # (B, 1, A, S)
    device = seen.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.get_default_dtype()
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)  # added to scores: SDPA would make this anew in every layer


def block_mask(query: Tensor, key: Tensor) -> BlockMask:
    """The same mask for FlexAttention: query order (B, A), key order (B, S). Here an empty seat sees nothing."""

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (key[b, k] <= query[b, q]) & (query[b, q] < FAR)

    make = _create_block_mask if query.is_cuda else create_block_mask
    return make(mask_mod, query.size(0), None, query.size(1), key.size(1), device=query.device)


_create_block_mask, _flex_attention = (torch.compile(f, dynamic=True) for f in (create_block_mask, flex_attention))


def attend(q: Tensor, k: Tensor, v: Tensor, layer: int, tokens: Tokens, columns: list[Column], mask) -> Tensor:
    """Appends k, v to the last column and attends to all of them. The one place that chooses a kernel.

    q, k, v, result: (B, H, A, hd).
    """
    columns[-1].put(layer, tokens, k, v)
    seen = [tuple(t[:, :, : column.end] for t in column.kv[layer]) for column in columns]
    if len(seen) > 1 and q.size(2) <= 4 and not torch.is_grad_enabled():  # decoding: join the scores, not the keys
        score = torch.cat([q @ k.mT for k, _ in seen], 3).float() / math.sqrt(q.size(-1))
        if mask is not None:
            score = score + mask
        shares = score.softmax(3).to(q.dtype).split([k.size(2) for k, _ in seen], 3)
        return sum(share @ v for share, (_, v) in zip(shares, seen))
    k, v = seen[0] if len(seen) == 1 else (torch.cat([t.transpose(1, 2) for t in ts], 1).transpose(1, 2) for ts in zip(*seen))  # as they lie in memory
    if isinstance(mask, BlockMask):
        return _flex_attention(q, k, v, block_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.to(q.dtype), is_causal=mask is None and q.size(2) > 1)


# ---------------------------------------------------------------------------------------------------- model


class Block(nn.Module):
    """One layer: attention and SwiGLU, each behind an RMSNorm. wq, wk, wv and w1, w3 are fused here, apart in a state dict."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        d, self.n_head, self.layer = config.n_embd, config.n_head, layer
        self.attn_norm = nn.RMSNorm(d, config.norm_eps)
        self.wqkv = nn.Linear(d, 3 * d, bias=False)
        self.wo = nn.Linear(d, d, bias=False)
        self.ffn_norm = nn.RMSNorm(d, config.norm_eps)
        self.w13 = nn.Linear(d, 2 * config.n_ff, bias=False)  # gate, up
        self.w2 = nn.Linear(config.n_ff, d, bias=False)  # down
        self.register_state_dict_post_hook(_split_fused)
        self.register_load_state_dict_pre_hook(_join_fused)

    def forward(self, x: Tensor, rope: Tensor, tokens: Tokens, columns: list[Column], mask) -> Tensor:
        """x (N, d) → (N, d); rope (2, N, 1, hd)."""
        q, k, v = (tokens.grid(t).transpose(1, 2) for t in self.before(x, rope))  # (B, H, A, hd) each
        y = attend(q, k, v, self.layer, tokens, columns, mask)
        return self.after(x, tokens.pack(y.transpose(1, 2)))

    def before(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before attention: x (N, d) → q, k, v (N, H, hd)."""
        q, k, v = (part.view(len(x), self.n_head, -1) for part in products(self.attn_norm(x), self.wqkv.weight, 3))
        return rotate(q, rope), rotate(k, rope), v

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """And after it: the residual x (N, d) and the heads' values y (N, d) → (N, d)."""
        x = x + self.wo(y)
        gate, up = products(self.ffn_norm(x), self.w13.weight, 2)
        return x + self.w2(F.silu(gate) * up)

    def compile(self, **options) -> None:
        """Compiles `before` and `after`, in place: they see tensors alone, so a few graphs serve all layers and lengths."""
        self.before, self.after = (torch.compile(f, dynamic=True, **options) for f in (self.before, self.after))


def products(x: Tensor, weight: Tensor, n: int) -> list[Tensor]:
    """x (N, d) with each of the n parts of a fused weight: one product, but n to train on a CPU uncompiled.

    There each result lies whole in memory, and backward has none to join: 8 to 10 % of a step at 6 layers of width 384.
    """
    if x.is_cuda or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.linear(x, weight).chunk(n, -1)
    return [F.linear(x, part) for part in weight.chunk(n)]


FUSED = {"wqkv.weight": ("wq", "wk", "wv"), "w13.weight": ("w1", "w3")}


def _split_fused(block: Block, state: dict, prefix: str, _) -> None:
    for fused, names in FUSED.items():
        for name, part in zip(names, state.pop(prefix + fused).chunk(len(names))):
            state[f"{prefix}{name}.weight"] = part


def _join_fused(block: Block, state: dict, prefix: str, *_) -> None:
    for fused, names in FUSED.items():
        names = [f"{prefix}{name}.weight" for name in names]
        if all(name in state for name in names):
            state[prefix + fused] = torch.cat([state.pop(name) for name in names])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """RoPE on the two halves (a, b) of each head, as in Hugging Face's LLaMA: a cos − b sin, b cos + a sin. x (N, H, hd).

    rope (2, N, 1, hd): the cosines twice, and the sines, the first time negated.
    """
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin).to(x.dtype)


class LLaMA(nn.Module):
    """Vanilla: one pass. Every other method overrides `think`."""

    scale = 1.0  # s: the embedding is multiplied by this (§1)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.max_latent, self.tau, self.lam = config.max_latent, config.tau, config.lam  # dials: may be turned at any time
        self.checkpointing = False  # recompute each block in the backward pass instead of keeping its activations
        self.fixed_blocks = None  # run_blocks compiled for decoding, its shapes standing still
        self.idle: list[Cache] = []  # what ended generations leave to the next: buffers that CUDA graphs know
        self.matmul_flops = self.attention_flops = 0  # executed in forwards so far: 2 per multiply-add, matrix products only
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        half = config.n_embd // config.n_head // 2
        angle = torch.arange(config.block_size)[:, None] * config.rope_theta ** (-torch.arange(half) / half)
        cos, sin = angle.cos(), angle.sin()
        self.register_buffer("rope", torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1))), persistent=False)  # (2, T, hd)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.init_std)

    def one_pass(self, z: Tensor, tokens: Tokens, columns: list[Column], layers: range | None = None) -> Tensor:
        """The stack of blocks, or some layers of it, on z (N, d): appends to the last column, attends to all given.

        Stops before the final norm.
        """
        blocks = list(self.blocks) if layers is None else [self.blocks[layer] for layer in layers]
        fixed = self.fixed_blocks is not None and tokens.newest and columns[-1].size > 0 and not torch.is_grad_enabled()
        capacity = 0
        if fixed:  # a power of two, and the same for all columns, as none is longer than column 0
            capacity = max(64, 1 << columns[0].size.bit_length()) if len(columns) == 1 else columns[0].order.size(1)
        columns[-1].reserve(tokens, capacity)
        if fixed:
            z = self.fixed_blocks(z, blocks, tokens, columns).clone()  # the next replay of a CUDA graph writes where its output lies
        else:
            z = self.run_blocks(z, blocks, tokens, columns)
        c, keys = self.config, sum(column.order[:, : column.end].size(1) for column in columns)
        self.matmul_flops += 2 * len(z) * len(blocks) * (4 * c.n_embd**2 + 3 * c.n_embd * c.n_ff)
        self.attention_flops += 4 * tokens.B * tokens.A * keys * c.n_embd * len(blocks)
        return z

    def run_blocks(self, z: Tensor, blocks: list[Block], tokens: Tokens, columns: list[Column]) -> Tensor:
        columns[-1].seat(tokens)
        mask, rope = make_mask(tokens, columns), self.rope[:, tokens.pos, None]
        for block in blocks:
            if self.checkpointing and torch.is_grad_enabled():
                z = checkpoint(block, z, rope, tokens, columns, mask, use_reentrant=False)
            else:
                z = block(z, rope, tokens, columns, mask)
        columns[-1].where = None  # or a compiled pass would have to return it
        return z

    def compile_decoding(self, **options) -> None:
        """Compiles a pass of one new token a row, for `generate`: a graph for each number of columns.

        On CUDA it is recorded as a CUDA graph for each capacity and number of live rows.
        """
        torch._dynamo.config.recompile_limit = 64  # 1 … ℓ_max + 1 columns, one row or several, all of them or some
        if self.embed.weight.is_cuda:
            options = {"mode": "reduce-overhead"} | options
        self.fixed_blocks = torch.compile(self.run_blocks, dynamic=True, **options)

    def for_decoding(self, dtype: torch.dtype | None = None) -> None:
        """Stores the matrices of blocks and head as decoding reads them fastest. Not to train on.

        dtype None: bf16 on CUDA, to run under bf16 autocast, which makes that of them at each use: the same numbers from fewer bytes.
        On a CPU fp32, input by input in memory: a product with 4 to 63 rows then takes MKL half the time at small widths, and one row
        no longer.
        """
        for parameter in (*self.blocks.parameters(), self.head.weight):
            if parameter.dim() == 2:
                weight = parameter.data.to(dtype or (torch.bfloat16 if parameter.is_cuda else torch.float32))
                parameter.data = weight if weight.is_cuda else weight.T.contiguous().T

    def think(self, x: Tensor, tokens: Tokens, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, d), scaled embeddings → what the head reads (N, d), executed and expected latent steps (N,)."""
        none = x.new_zeros(len(x), dtype=torch.float32)
        return self.norm(self.one_pass(x, tokens, [cache[0]])), none, none

    def hidden(self, idx: Tensor, cache: Cache, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tokens]:
        """Everything but the head: idx (B, T) → h̄ (N, d), steps (N,), expected steps (N,), and who the N are."""
        if cache.length + idx.size(1) > self.config.block_size:
            raise ValueError(f"{cache.length} + {idx.size(1)} tokens exceed the context, block_size {self.config.block_size}")
        tokens = cache.tokens(*idx.shape, live, idx.device)
        packed = idx.flatten() if live is None else idx[live]
        return *self.think(self.scale * self.embed(packed), tokens, cache), tokens

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None, live: Tensor | None = None) -> Output:
        """idx (B, T) continues the rows of cache (none: starts them); targets (B, T), -1 where there is none.

        live (B, T) is false on padding, which may stand anywhere and costs nothing. Raises ValueError past block_size.
        """
        B, T = idx.shape
        h, steps, expected, tokens = self.hidden(idx, Cache() if cache is None else cache, live)
        self.matmul_flops += 2 * len(h) * self.head.weight.numel()
        logits = loss = ce = ada = None
        if targets is None or len(h) * self.config.vocab_size <= CHUNK:
            logits = self.head(h)
        if targets is not None:
            targets = targets.flatten() if live is None else targets[live]
            loss, ce, ada = self.loss(self.nats(h, logits, targets), targets, expected)

        def spread(packed: Tensor | None) -> Tensor | None:  # (N, …) → (B, T, …)
            if packed is None:
                return None
            if live is not None:
                packed = packed.new_zeros(B * T, *packed.shape[1:]).index_copy(0, live.flatten().nonzero().squeeze(1), packed)
            return packed.view(B, T, *packed.shape[1:])

        return Output(spread(logits), loss, ce, ada, spread(steps), spread(expected), cache)

    def nats(self, h: Tensor, logits: Tensor | None, targets: Tensor) -> Tensor:
        """Cross-entropy (N,) of each target, 0 where it is -1. Without logits: chunk by chunk, and again in the backward pass."""

        def nats_of(logits: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="none")

        if logits is not None:
            return nats_of(logits, targets)
        parts = zip(*(t.split(max(1, CHUNK // self.config.vocab_size)) for t in (h, targets)))
        return torch.cat([checkpoint(lambda h, targets: nats_of(self.head(h), targets), *part, use_reentrant=False) for part in parts])

    def loss(self, nats: Tensor, targets: Tensor, expected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L = CE + λ · mean_t stopgrad(q_t^β) · Σ_k r[t,k] (§4) over the targets (N,) that are not -1; nats (N,)."""
        real = targets != -1
        ce = nats.sum() / real.sum()
        ada = (torch.exp(-self.config.beta * nats.detach()) * expected * real).sum() / real.sum()  # q = exp(-nats)
        return ce + self.lam * ada, ce, ada

    @contextmanager
    def dials(self, tau: float | None = None, max_latent: int | None = None):
        """Runs a trained model with another threshold, or with fewer or more steps than it was trained with."""
        saved = self.tau, self.max_latent
        self.tau, self.max_latent = (old if new is None else new for old, new in zip(saved, (tau, max_latent)))
        try:
            yield self
        finally:
            self.tau, self.max_latent = saved

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor | list[list[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        tau: float | None = None,
        max_latent: int | None = None,
        stop: int | None = None,
    ) -> Iterator[Generated]:
        """Continues prompts token by token: idx (B, T), or B lists of any lengths. Each row halts on its own.

        temperature 0 takes the likeliest token. A row ends with the token `stop`, and costs nothing from then on. A prompt
        longer than the context keeps its end; a context that is full goes on from its last half. Raises ValueError.
        """
        rows = [list(row) for row in (idx.tolist() if isinstance(idx, Tensor) else idx)]
        if not rows or not all(rows):
            raise ValueError("a prompt holds no token, but generation continues at least one")
        if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: want >= 0, >= 1 and in (0, 1]")
        device, context = self.embed.weight.device, self.config.block_size
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        running, window = list(range(len(rows))), context  # running: the rows that have not ended
        cache = self.idle.pop() if self.idle else Cache()
        try:
            for _ in range(max_new_tokens):
                take = 1
                if cache.length == 0 or cache.length == context:
                    take, window, cache = window, max(1, context // 2), cache.clear()
                fed = [[]] * len(rows)
                for i in running:
                    fed[i] = rows[i][-take:]
                lengths = [len(row) for row in fed]
                T = max(lengths)
                tokens = torch.tensor([row + [0] * (T - len(row)) for row in fed], device=device)
                live = None if min(lengths) == T else torch.arange(T, device=device) < torch.tensor(lengths, device=device)[:, None]
                with self.dials(tau, max_latent):
                    h, steps, expected, _ = self.hidden(tokens, cache, live)
                if len(h) > len(running):  # of a prompt, the newest token
                    newest = torch.tensor([length for length in lengths if length], device=device).cumsum(0) - 1
                    h, steps, expected = h[newest], steps[newest], expected[newest]
                logits = self.head(h).float()
                self.matmul_flops += 2 * len(logits) * h.size(1) * logits.size(1)
                token = sample(logits, temperature, top_k, top_p, generator)
                prob = logits.softmax(1).gather(1, token[:, None]).squeeze(1)
                at = torch.tensor(running, device=device)

                def spread(packed: Tensor) -> Tensor:  # (rows that run,) → (B,)
                    return packed if len(at) == len(rows) else packed.new_zeros(len(rows)).index_copy(0, at, packed)

                yield Generated(spread(token), spread(prob), spread(steps), spread(expected), spread(torch.ones_like(at, dtype=torch.bool)))
                for i, new in zip(running, token.tolist()):
                    rows[i].append(new)
                running = [i for i in running if rows[i][-1] != stop]
                if not running:
                    return
        finally:
            self.idle.append(cache.clear())


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None) -> Tensor:
    """One token (B,) from each row of logits (B, V): temperature, then top-k, then nucleus (top-p)."""
    if temperature == 0:
        return logits.argmax(1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None and top_p < 1:
        sorted_logits, order = logits.sort(1, descending=True)
        before = sorted_logits.softmax(1).cumsum(1) - sorted_logits.softmax(1)  # mass of the likelier tokens
        logits = logits.scatter(1, order, sorted_logits.masked_fill(before >= top_p, -math.inf))
    return torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


class AdaptiveLatentCoT(LLaMA):
    """The method: each token thinks for as long as its router wants to (§1 to §4)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scale = math.sqrt(2.5 * config.n_embd) if config.max_latent else 1.0  # about unit RMS, as the final norm's output
        self.router = nn.Linear(config.n_embd, 1)
        nn.init.zeros_(self.router.weight)
        nn.init.constant_(self.router.bias, config.router_bias)

    def think(self, x: Tensor, tokens: Tokens, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        z, index = x, torch.arange(len(x), device=x.device)  # the live tokens' inputs, and which of the N they are
        reach = torch.ones(len(x), device=x.device)  # r[t,k]
        mixture = torch.zeros(x.shape, device=x.device)  # h̄[t]
        steps, expected = torch.zeros_like(reach), torch.zeros_like(reach)
        for k in range(self.max_latent + 1):
            h = self.norm(self.one_pass(z, tokens, cache.upto(k)))  # h[t,k] (n, d)
            with torch.autocast(h.device.type, enabled=False):
                gate = torch.sigmoid(self.router(h.float())).squeeze(1)  # g[t,k]
            self.matmul_flops += 2 * h.numel()
            onward = reach * gate  # r[t,k+1]
            live = (onward >= self.tau) & (k < self.max_latent)
            onward = onward.where(live, 0)  # the last executed step takes all that is left
            mixture.index_add_(0, index, (reach - onward)[:, None] * h.float())  # h̄ += p[t,k] · h[t,k]
            if k == self.max_latent:
                break
            tokens, chosen = tokens.select(live)
            if len(chosen) == 0:
                break
            z, reach, index = F.embedding(chosen, h), onward[chosen], index[chosen]  # z[t,k+1] = h[t,k]
            steps.index_add_(0, index, torch.ones_like(reach))
            expected = expected.index_add(0, index, reach)
        return mixture, steps, expected
