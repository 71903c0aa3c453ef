"""The log of states: what a batch has executed so far, each state with its address (t, k), and who sees whom.

There is one rule, and it is the paper's two-dimensional causal mask (METHOD.md §2):

    entry j is visible to state i  ⇔  order[j] <= order[i]  and  column[j] <= column[i]

What is notable here:
* Training, evaluation, prefill and decoding append to the same log. A pass of any number of states takes the
  next seats in all rows at once; in decoding that is one seat, so that shapes stand still whatever each row
  is thinking about.
* A halted token is absent from the packed states, and its seat is empty: it costs no matrix product, and
  nobody sees it.
* What attention needs beside the log stands at the end: the masks, the choice of a kernel, RoPE.

Shapes: B rows, N packed states, A seats that a pass takes in each row, as many as the longest row has states
or more, S seats of the log, H heads, G heads of keys and values, hd width of a head.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.utils.rnn import pad_sequence

FAR = 2**30  # the order of an empty seat: later than every real state, so that none sees it
BLOCK = 128  # FlexAttention computes or skips so many queries × so many keys at once
SEATS = {"cuda": BLOCK}  # of passes of some of the tokens A is a multiple of this there: few shapes
WRITTEN_OUT = 2**22  # most entries of a mask that is written out on a GPU; beyond, FlexAttention skips blocks
NARROWEST = 16  # width of a head that FlexAttention takes


@dataclass
class States:
    """The N states of a pass, packed: sorted by row, then by order. Attention lays them out on a (B, A) grid.
    """

    pos: Tensor  # (N,) position: turns RoPE
    order: Tensor  # (N,) causal order: the position, unless a method interleaves
    column: Tensor  # (N,) k: latent step
    row: Tensor  # (N,) row of the batch
    seat: Tensor | None  # (N,) place in the flat grid; None: the grid is full, N = B · A
    B: int
    A: int
    deepest: int = 0  # no column of these is higher
    reach: Tensor | None = None  # (N,) r[t,k]; None: 1, or a method that has none

    @classmethod
    def tick(cls, pos: Tensor, column: Tensor, deepest: int = 0, reach: Tensor | None = None) -> "States":
        """One state for each row, at positions and latent steps (B,), of some reach (B,)."""
        row = torch.arange(len(pos), device=pos.device)
        return cls(pos, pos, column, row, None, len(pos), 1, deepest, reach)

    def select(self, live: Tensor, agree: Callable | None = None) -> "tuple[States, Tensor, bool]":
        """Those where live (N,) is true, their indices (n,), and whether a pass is due. Costs a host sync,
        the only one of a pass.

        A pass is due where there are any; `agree` makes a count (1,) the largest of all processes, for which
        one without live states then runs a pass of none, on a grid of empty seats.
        """
        count = torch.zeros(self.B, dtype=torch.long, device=live.device).index_add_(0, self.row, live.long())
        sizes = torch.stack((count.sum(), count.max().clamp(min=1), count.sum()))
        if agree:
            agree(sizes[2:])
        n, A, most = sizes.tolist()
        if n == len(live):
            return self, torch.arange(n, device=live.device), most > 0
        index = live.nonzero_static(size=n).squeeze(1)
        unit = SEATS.get(live.device.type, 1) if A > 1 else 1  # one state a row is decoding, and stays one
        A = math.ceil(A / unit) * unit
        row = self.row[index]
        rank = torch.arange(n, device=live.device) - (count.cumsum(0) - count)[row]  # among those of its row
        seat = None if n == self.B * A else row * A + rank
        pos, order, column = self.pos[index], self.order[index], self.column[index]
        return States(pos, order, column, row, seat, self.B, A, self.deepest), index, most > 0

    def grid(self, packed: Tensor, fill: int = 0) -> Tensor:
        """(N, H, hd) → (B, A, H, hd), `fill` on empty seats."""
        if self.seat is not None:
            empty = packed.new_full((self.B * self.A, *packed.shape[1:]), fill)
            packed = empty.index_copy_(0, self.seat, packed)
        return packed.view(self.B, self.A, *packed.shape[1:])

    def pack(self, grid: Tensor) -> Tensor:
        """(B, A, H, hd) → (N, H · hd)."""
        flat = grid.reshape(self.B * self.A, -1)
        return flat if self.seat is None else take(flat, self.seat)


class Take(torch.autograd.Function):
    """Selects rows of a matrix, each at most once, so that its backward writes where indexing would add."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.n = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.n, gradient.size(1)).index_copy_(0, index, gradient), None


take = Take.apply


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to a device. On CUDA nothing waits for the copy; elsewhere its memory might be
    freed before the copy is done.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def pad(texts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Lists of tokens of any lengths → idx (B, T), padded on the right, and which of it is text (B, T)."""
    idx = pad_sequence([torch.tensor(text, dtype=torch.long) for text in texts], batch_first=True)
    return send(idx, device), send(filled([len(text) for text in texts]), device)


def filled(lengths: list[int]) -> Tensor:
    """(B, T), T the largest of B lengths: true on the first lengths[i] places of row i."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def spread(packed: Tensor, idx: Tensor, live: Tensor | None) -> Tensor:
    """(N, …) → (B, T, …) as idx, 0 where not live."""
    if live is None:
        return packed.view(*idx.shape, *packed.shape[1:])
    whole = packed.new_zeros(*idx.shape, *packed.shape[1:])
    whole[live] = packed
    return whole


class Entries:
    """One thing that a log holds of every state: its order, its column, its keys or its values in a layer."""

    def __init__(self, held: Tensor | None = None) -> None:
        self.held = held  # (B, capacity, G, hd)

    def append(self, seats: slice, new: Tensor) -> Tensor:
        """new (B, A, G, hd) on the seats of a pass → all that this pass may look at (B, S, G, hd)."""
        if not seats.start:
            self.held = new
        elif torch.is_grad_enabled():
            old = self.held[:, : seats.start]  # later ones are there when checkpointing recomputes
            joined = torch.cat((old.transpose(1, 2), new.transpose(1, 2)), 2)  # by head, as attention reads
            self.held = joined.transpose(1, 2)
        else:
            self.held[:, seats] = new
        return self.held[:, : seats.stop]


class Unchanged:
    """A context in which a log's entries may change; then they are as before. So they keep nothing of a
    block that a backward pass repeats, whose graph would live on with it.
    """

    def __init__(self, entries: dict[str, Entries]) -> None:
        self.entries = entries
        self.held = {}

    def __enter__(self) -> None:
        self.held = {name: entries.held for name, entries in self.entries.items()}

    def __exit__(self, *error) -> None:
        for name, tensor in self.held.items():
            self.entries[name].held = tensor
        self.held = {}


class Log:
    """The addresses, and the keys and values of every layer, of the states of all passes so far.

    A row with fewer states than a pass has seats leaves some empty. With gradients each pass joins the
    entries anew. Without, they lie in buffers, which are squeezed and grow by half when they are full.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entries] = defaultdict(Entries)  # order, column, k0, v0, k1 …
        self.size = 0  # seats taken
        self.last = 0  # the first seat of the last pass
        self.plain = True  # no seat is empty, and none is of a higher column than 0

    def open(self, states: States) -> slice:
        """Takes the next seats and writes down the addresses of a pass; its keys and values follow."""
        if self.size and not torch.is_grad_enabled() and self.size + states.A > self.capacity():
            self.make_room(states.A)
        seats = slice(self.size, self.size + states.A)
        self.last, self.size = seats.start, seats.stop
        self.plain = self.plain and states.seat is None and states.deepest == 0
        order = states.grid(states.order[:, None, None], FAR)  # (B, A, 1, 1)
        column = states.grid(states.column[:, None, None], FAR)
        self.order = self.entries["order"].append(seats, order).flatten(1)  # (B, S)
        self.column = self.entries["column"].append(seats, column).flatten(1)
        return seats

    def recomputed(self) -> tuple:
        """For `checkpoint`: contexts of a forward, and of its repetition in a backward pass."""
        return nullcontext(), Unchanged(self.entries)

    def capacity(self) -> int:
        return self.entries["order"].held.size(1)

    def make_room(self, more: int) -> None:
        """Squeezes out empty seats; makes room for the largest of: `more` states, half of those there, 64.

        Capacities are rounded up, by at most 64 or an eighth, so that they are few: each has its CUDA graph.
        """
        full = self.entries["order"].held[:, : self.size] < FAR
        most = int(full.sum(1).max())
        chosen = full.int().sort(dim=1, descending=True, stable=True).indices[:, :most]  # full seats first
        wanted = most + max(more, most // 2, 64)
        step = max(64, 1 << wanted.bit_length() - 4)
        capacity = -(-wanted // step) * step
        for name, entries in self.entries.items():
            old = entries.held
            kept = old[:, :most] if most == self.size else old.take_along_dim(chosen, 1)
            shape = len(old), capacity, *old.shape[2:]
            by_head = 0, 2, 1, 3  # order of the dimensions in memory
            entries.held = torch.empty_permuted(shape, by_head, dtype=old.dtype, device=old.device)
            entries.held[:, :most] = kept
            entries.held[:, most:] = FAR if name == "order" else 0
        self.size = most

    def forget_last_pass(self) -> None:
        self.size = self.last

    def rows(self, chosen: Tensor) -> "Log":
        """A log whose row i is a copy of row chosen[i] of this one."""
        new = copy.copy(self)
        kept = {name: Entries(entries.held[chosen]) for name, entries in self.entries.items()}
        new.entries = defaultdict(Entries, kept)
        return new

    def replace(self, rows: Tensor, other: "Log", B: int) -> None:
        """Empties some of the B rows and gives them what another log holds, a row each."""
        if not self.entries:  # of a pass that none of these rows has made
            for name, entries in other.entries.items():
                shape = B, *entries.held.shape[1:]
                self.entries[name].held = entries.held.new_full(shape, FAR if name == "order" else 0)
        for name in ("order", "column"):  # passes of the same states share them
            self.entries[name].held = self.entries[name].held.clone()
        if other.size > self.capacity():
            self.make_room(other.size)
        self.entries["order"].held[rows] = FAR
        for name, entries in other.entries.items():
            self.entries[name].held[rows, : other.size] = entries.held[:, : other.size]
        self.size = max(self.size, other.size)
        self.plain = False


class Cache:
    """The logs of a batch: one, or one for each pass of a method whose passes do not see each other."""

    def __init__(self) -> None:
        self.logs: dict[int, Log] = defaultdict(Log)
        self.at: dict[str, Tensor] = {}  # of each row (B, …): "pos", and what `tick` keeps of its thought
        self.length = 0  # tokens that forwards have fed, padding included; those of ticks do not count
        self.exits: list[tuple] = []  # of a forward, if wanted: of each pass h[t,k] (n, d), tokens (n,)
        self.imbalance: Tensor | None = None  # of mor's last forward

    def states(self, idx: Tensor, live: Tensor | None) -> States:
        """The next tokens idx (B, T), or those that are live (B, T), as column 0; advances the positions."""
        B, T = idx.shape
        start = self.at.get("pos", idx.new_zeros(B))
        ahead = torch.arange(T, device=idx.device).expand(B, T) if live is None else live.long().cumsum(1) - 1
        pos = (start[:, None] + ahead).flatten()
        row = torch.arange(B, device=idx.device).repeat_interleave(T, output_size=B * T)
        self.at["pos"] = start + (T if live is None else live.sum(1))
        self.length += T
        states = States(pos, pos, torch.zeros_like(pos), row, None, B, T)
        return states if live is None else states.select(live.flatten())[0]

    def rows(self, chosen: list[int]) -> "Cache":
        """A cache whose row i is a copy of row chosen[i] of this one: one prefill for many continuations."""
        index = torch.tensor(chosen, device=self.at["pos"].device)
        new = Cache()
        new.logs.update((k, log.rows(index)) for k, log in self.logs.items())
        new.at = {name: t[index] for name, t in self.at.items()}
        new.length = self.length
        return new

    def replace(self, chosen: list[int], other: "Cache") -> "Cache":
        """This cache, some rows of which have forgotten what they held and taken over the rows of another
        one.
        """
        index = torch.tensor(chosen, device=self.at["pos"].device)
        for k in {*self.logs, *other.logs}:
            self.logs[k].replace(index, other.logs[k], len(self.at["pos"]))
        self.at["pos"] = self.at["pos"].index_copy(0, index, other.at["pos"])
        return self


def make_mask(states: States, log: Log) -> Tensor | BlockMask | None:
    """The one rule for the states of the last pass, made once for all layers. None: causal attention says the
    same.

    An empty seat sees everything, so that no softmax is over nothing; nobody reads what it computes.
    """
    if log.last == 0 or (states.A == 1 and log.plain):
        return None
    order, column = log.order[:, log.last :], log.column[:, log.last :]  # (B, A)
    large = states.A >= BLOCK and states.B * states.A * log.size > WRITTEN_OUT
    wide = any(entries.held.size(3) >= NARROWEST for entries in log.entries.values())
    if order.is_cuda and large and wide and not broken_compiler(order.device):
        return block_mask(order, column, log.order, log.column)
    return additive_mask(order, column, log.order, log.column)


def additive_mask(order: Tensor, column: Tensor, key_order: Tensor, key_column: Tensor) -> Tensor:
    """The rule as numbers to add to the scores: states (B, A), entries (B, S) → (B, 1, A, S), of the type
    that autocast gives these, so that no layer casts them again.
    """
    kind = order.device.type
    low = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if low else torch.float32
    seen = key_order[:, None] <= order[:, :, None]
    seen = (seen & (key_column[:, None] <= column[:, :, None]))[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)


def block_mask(order: Tensor, column: Tensor, key_order: Tensor, key_column: Tensor) -> BlockMask:
    """The rule for FlexAttention, from the same shapes. Here an empty seat sees nothing. Addresses are int32,
    as the kernel holds many of them in registers.
    """
    order, column, key_order, key_column = (t.int() for t in (order, column, key_order, key_column))

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (key_order[b, k] <= order[b, q]) & (key_column[b, k] <= column[b, q])
        return seen & (order[b, q] < FAR)

    make = compiled(create_block_mask) if order.is_cuda else create_block_mask
    sizes = order.size(0), None, order.size(1), key_order.size(1)
    return make(mask_mod, *sizes, device=order.device, BLOCK_SIZE=BLOCK)


@cache
def broken_compiler(device: torch.device) -> Exception | None:
    """What torch.compile raises on this device, tried once; None where it works."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:
        return error


@cache
def compiled(function: Callable) -> Callable:
    """Compiled for any sizes, when first asked for: the import of the compiler takes seconds."""
    return torch.compile(function, dynamic=True)


FLEX = {"fwd_num_warps": 8, "fwd_BLOCK_N": 64,  # by default a block's addresses and scores spill registers
        "bwd_num_warps": 4, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64}


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
    """q (B, A, H, hd), k and v (B, S, G, hd) → (B, A, H, hd). The one place that chooses a kernel."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = causal = False
    if q.size(1) != k.size(1):  # a branch, as compiled code has symbols for sizes, and wants a bool
        grouped = True
    if mask is None and q.size(2) > 1:
        causal = True
    if isinstance(mask, BlockMask):
        options = FLEX if q.element_size() == 2 and q.size(3) <= 128 else None  # shared memory
        flex = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
        y = flex(q, k, v, block_mask=mask, enable_gqa=grouped, kernel_options=options)
    else:
        mask = None if mask is None else mask.to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
    return y.transpose(1, 2)


def rope_table(config) -> Tensor:
    """What `rotate` needs at every position: (2, block_size, hd), the cosines twice, and the sines, the first
    time negated.

    The angles are pos · θ^(-2i / hd). With rope_scaling [factor] they are divided by the factor. Llama 3's
    [factor, low, high, context] does so to those that turn fewer than `low` times in that context, leaves
    alone those that turn more than `high` times, and blends between (arXiv:2407.21783). Raises ValueError.
    """
    half = config.head_width // 2
    speed = config.rope_theta ** (-torch.arange(half) / half)  # radians per position
    scaling = config.rope_scaling
    if len(scaling) not in (0, 1, 4) or len(scaling) == 4 and scaling[1] >= scaling[2]:
        raise ValueError(f"rope_scaling is {scaling}: want [factor] or [factor, low, high > low, context]")
    if scaling:
        factor, *bounds = scaling
        kept = torch.zeros(half)  # the share of an angle that stays as it is
        if bounds:
            low, high, context = bounds
            kept = ((context * speed / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        speed = speed * (kept + (1 - kept) / factor)
    angle = torch.arange(config.block_size)[:, None] * speed
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """RoPE on the two halves (a, b) of each head, as in Hugging Face's LLaMA: a cos − b sin, b cos + a sin.

    x (N, H, hd); rope (2, N, 1, hd), of the states' positions.
    """
    return torch.addcmul(x * rope[0], x.roll(x.size(-1) // 2, -1), rope[1]).to(x.dtype)
