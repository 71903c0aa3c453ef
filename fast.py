"""Fast paths for training and for decoding. Without a call to them only speed and rounding change.

The model knows nothing of them: they are put on it from outside, on one model at a time.
"""

import warnings
import weakref
from functools import cache, partial

import torch

from common import BadInput, precision, reason
from log import additive_mask, broken_compiler

PACKED = 2**16  # elements from which on a matrix is packed for decoding on a CPU
COMPILED_CHUNK = 2**31  # logits at once where the loss is compiled, which then copies none in fp32
ALONE = 384  # height and width from which on a packed matrix is also faster with a single row


def compiles(wanted: bool | None, device) -> bool:
    """What a --compile flag means on a device; None: on CUDA only. Raises BadInput where nothing compiles."""
    wanted = device.type == "cuda" if wanted is None else wanted
    if wanted:
        warnings.filterwarnings("ignore", "TensorFloat32")  # TF32 stays off: the router needs exact float32
        error = broken_compiler(device)
        if error:
            raise BadInput(f"torch.compile fails here, so give --compile=False: {reason(error)}")
    return wanted


def compile_training(model) -> None:
    """Compiles a block for all layers and any number of tokens, and the loss.

    With gradients that is one graph: less for the CPU to launch. Without, it is what a block does before and
    after its attention: such passes are of more kinds, and must write into a log's buffers where they lie.
    The compiler's settings are those of the process.
    """
    import torch.fx.experimental._config as shapes
    if "nats_of" in vars(model):
        return  # that has been done
    shapes.use_duck_shape = False  # that two sizes are equal now means nothing
    torch._dynamo.config.specialize_float = True  # that of a norm never changes
    torch._dynamo.config.optimize_ddp = False  # it would cut blocks apart
    torch._dynamo.config.recompile_limit = 64  # first pass or later, all live or some, many or few
    once = cache(partial(torch.compile, dynamic=True))
    for block in model.blocks:  # partial, as a copy of the model takes that with it, its own block within
        whole, before, after = (partial(once(method.__func__), block)
                                for method in (block.forward, block.before, block.after))
        block.forward = partial(whole_or_parts, whole, block.forward)
        block.before = before
        block.after = after
    model.nats_of = torch.compile(model.nats_of)
    if model.embed.weight.is_cuda and not model.config.exit_loss:  # or each exit would keep so many
        model.chunk = COMPILED_CHUNK


def whole_or_parts(whole, parts, *inputs):
    """A block's forward: compiled whole where gradients are wanted, else part by part."""
    return whole(*inputs) if torch.is_grad_enabled() else parts(*inputs)


class Norm(torch.autograd.Function):
    """y = n · w with n = x / rms, x (…, d): dx = (g w − n · mean(g w n)) / rms, and dw = Σ g n."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = (norm.square() / x.size(-1) + eps).rsqrt()
        n = x * scale
        ctx.save_for_backward(n, scale, weight)
        return n * weight

    @staticmethod
    def backward(ctx, g):
        n, scale, weight = ctx.saved_tensors
        gn = g * n
        mean = (gn @ weight) / n.size(-1)
        dx = (g * weight).addcmul_(n, mean[..., None], value=-1).mul_(scale)
        return dx, gn.flatten(0, -2).sum(0), None


def fused_norm(module, x):
    """The forward of an RMSNorm, with that backward."""
    return Norm.apply(x, module.weight, module.eps)


def fuse_norms(model) -> None:
    """Gives RMSNorm, of which a CPU has no fused kernel, a backward of its own: fewer walks through
    memory.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.forward = partial(fused_norm, module)


def quick_norm(module, eps, x):
    """The forward of an RMSNorm in fewer calls. eps is a tensor: for a row a number costs more than a sum."""
    if torch.compiler.is_compiling() or not x.is_cpu:
        return torch.nn.RMSNorm.forward(module, x)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.addcmul(eps, norm, norm, value=1 / x.size(-1)).rsqrt() * module.weight


def lay_out(model, dtype=None) -> None:
    """Stores the matrices of blocks and head as decoding reads them fastest. Not to train on.

    On CUDA that is bfloat16 unless dtype says otherwise: autocast makes it of them at each use, so that
    the numbers are the same and the bytes fewer. On a CPU it is float32, input by input in memory: a
    product with 4 to 63 rows then takes MKL half the time at small widths, one with a single row takes
    as long as before. Large ones are kept a second time, in the packed form of oneDNN (see `pack`); not those
    of a model of a billion weights, as there may be no room. Weights of bfloat16 on a CPU stay as they are:
    oneDNN multiplies with them. On a CPU in float32 norms are those of `quick_norm`.
    """
    if model.head.weight is model.embed.weight:  # the embedding is read row by row, and stays as it is
        model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())
    dtype = dtype or precision(model.head.weight.device)
    by_input = model.head.weight.is_cpu and dtype == torch.float32
    for parameter in (*model.blocks.parameters(), model.head.weight):
        if parameter.dim() == 2:
            weight = parameter.data.to(dtype)
            parameter.data = weight.T.contiguous().T if by_input else weight.contiguous()
    total = sum(parameter.numel() for parameter in model.parameters())
    for module in (*model.blocks.modules(), model.norm, model.head):
        if isinstance(module, (torch.nn.RMSNorm, torch.nn.Linear)):
            vars(module).pop("forward", None)  # of an earlier layout
        if type(module) is torch.nn.RMSNorm and by_input:
            module.forward = partial(quick_norm, module, torch.tensor(module.eps))
        if isinstance(module, torch.nn.Linear) and module.weight.numel() >= PACKED and total < 10**9:
            pack(module)


def pack(linear) -> None:
    """Lets a Linear of float32 on a CPU multiply several rows at once by oneDNN, with weights that it packs
    once: in half to nine tenths of MKL's time; a single row, too, where both sides are ALONE or more. Left as
    it is where this PyTorch cannot.
    """
    weight = linear.weight
    fit = weight.device.type == "cpu" and weight.dtype == torch.float32
    if not (fit and torch.backends.mkldnn.is_available()):
        return
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 16)  # rows, about
        multiply = torch.ops.mkldnn._linear_pointwise
    except (AttributeError, RuntimeError):
        return

    small = min(weight.shape) < ALONE
    of_packed = version(weight)

    def forward(own, plain, x):
        costly = small and x.numel() == x.size(-1)  # what oneDNN spends on a call is more than it gains
        if costly or torch.compiler.is_compiling():  # which packs what is constant by itself, or not at all
            return plain(x)
        if own.weight is not weight or version(weight) != of_packed:  # a copy's, or others by now
            return plain(x)
        return multiply(x, packed, own.bias, "none", [], "")

    linear.forward = partial(forward, linear, linear.forward)  # with itself, as a copy has its own


def version(tensor) -> tuple:
    """Another one where a tensor has been changed since; not where .data was, in place."""
    return tensor.data_ptr(), tensor.dtype, tensor.is_inference() or tensor._version


class Still:
    """Entries as a compiled tick sees them: attention looks at all seats that are there, empty ones too."""

    def __init__(self, held) -> None:
        self.held = held

    def append(self, seat, new):
        """new (B, 1, G, hd) on the seat (1,)."""
        return self.held.index_copy_(1, seat, new)


class Ticks:
    """A tick's pass over all layers as one compiled graph for all columns; on CUDA, as a CUDA graph.

    Everything else goes to the model's own `one_pass`. On CUDA only the parts of a block are compiled, once
    for all layers, as the launches of a graph cost nothing. CUDA graphs are recorded for each number of rows
    and each capacity, over buffers of their own: a log moves into them when it comes for the first time, and
    they are used again when it has gone. A few that nobody uses are kept.
    """

    def __init__(self, model, **options) -> None:
        self.model = model
        self.plain = model.one_pass
        torch._dynamo.config.recompile_limit = 64  # one row or several, all layers or some
        self.run = self.blocks
        if not model.embed.weight.is_cuda:
            self.run = partial(torch.compile(Ticks.blocks, dynamic=True, **options), self)
        self.tapes: list[Tape] = []

    def __call__(self, x, states, log, layers=None):
        layers = range(len(self.model.blocks)) if layers is None else layers
        if states.A > 1 or states.seat is not None or log.size == 0 or torch.is_grad_enabled():
            return self.plain(x, states, log, layers)
        log.open(states)
        layers = tuple(map(str, layers))  # numbers would be taken for sizes
        seat = torch.full((1,), log.last, device=x.device)  # written there: nothing waits for a copy
        if not x.is_cuda:  # where sizes may change: only the seats that are taken
            held = {name: entries.held[:, : log.size] for name, entries in log.entries.items()}
            return self.run(x, states, held, seat, layers)
        tape = next((tape for tape in self.tapes if tape.fits(x, log, layers)), None)
        if tape is None:
            idle = [tape for tape in self.tapes if tape.idle()]
            self.tapes = [tape for tape in self.tapes if tape not in idle[:-3]]
            tape = Tape(self.run, x, states, log, seat, layers)
            self.tapes.append(tape)
        return tape.play(x, states, log, seat)

    def blocks(self, x, states, held: dict, seat, layers: tuple):
        order, column = held["order"][:, :, 0, 0], held["column"][:, :, 0, 0]  # (B, S)
        mask = additive_mask(order.index_select(1, seat), column.index_select(1, seat), order, column)
        rope = self.model.rope[:, states.pos, None]
        for layer in layers:
            keys, values = Still(held["k" + layer]), Still(held["v" + layer])
            x = self.model.blocks[int(layer)](x, rope, states, keys, values, seat, mask)
        return x


class Tape:
    """A CUDA graph of one tick, with the buffers that it reads and writes."""

    def __init__(self, run, x, states, log, seat, layers: tuple) -> None:
        self.layers = layers
        self.owner = None  # a weak reference to the log that lies in the buffers
        self.held = {name: entries.held.clone() for name, entries in log.entries.items()}
        self.x, self.pos, self.seat = x.clone(), states.pos.clone(), seat.clone()
        self.reach = None if states.reach is None else states.reach.clone()
        still = type(states).tick(self.pos, states.column.clone(), reach=self.reach)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compile and warm up: what it writes is written again by `play`
            for _ in range(2):
                run(self.x, still, self.held, self.seat, layers)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = run(self.x, still, self.held, self.seat, layers)

    def idle(self) -> bool:
        """Whether no log that still lives has a part in the buffers."""
        log = self.owner and self.owner()
        return log is None or all(log.entries[name].held is not held for name, held in self.held.items())

    def fits(self, x, log, layers: tuple) -> bool:
        """Whether this graph is of these shapes, and its buffers belong to this log or to none that still
        lives.
        """
        shapes = {name: held.shape for name, held in self.held.items()}
        same = shapes == {name: entries.held.shape for name, entries in log.entries.items()}
        mine = self.idle() or self.owner() is log
        return same and mine and layers == self.layers and x.dtype == self.x.dtype

    def play(self, x, states, log, seat):
        if log.entries["order"].held is not self.held["order"]:
            for name, entries in log.entries.items():
                self.held[name].copy_(entries.held)
                entries.held = self.held[name]
            self.owner = weakref.ref(log)
        self.x.copy_(x)
        self.pos.copy_(states.pos)
        if self.reach is not None:
            self.reach.copy_(states.reach)
        self.seat.copy_(seat)
        self.graph.replay()
        return self.result.clone()


def compile_ticks(model, **options) -> None:
    """Compiles the decoding of one token a row; the first tick waits for it. options: those of torch.compile,
    on a CPU.
    """
    if model.embed.weight.is_cuda:
        compile_training(model)
    model.one_pass = Ticks(model, **options)
