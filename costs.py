"""What a method costs at a mean of latent steps: FLOPs by formula and as executed, bytes read and kept.

What is notable here:
* A method says beside its `think` what a forward costs, as a function of the executed steps (`passes`).
  `counted` asks torch's counter what such a forward and its backward execute, where halted tokens are absent.
* `make` forces adaptive to a mean number of latent steps: nothing needs to be trained. `made_up_steps` is for
  models that are too big to execute.
"""

import math
import random
from bisect import bisect_left

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from baselines import build
from common import BadInput
from fast import COMPILED_CHUNK
from model import CHUNK, AdaptiveLatentCoT, Config, LLaMA
from schedule import is_adaptive, most_latent


def matrices(module: nn.Module) -> int:
    """Elements of all its matrices."""
    return sum(p.numel() for p in module.parameters() if p.dim() == 2)


def forward_flops(model: LLaMA, steps: Tensor, live: Tensor | None = None,
                  fed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of the states that `steps` (B, T) says were executed: FLOPs of matrix products, and of attention.

    live (B, T): which are tokens; fed (B, T): which of them this forward computed, the others being in
    the cache. Attention counts queries × keys of each row and pass; a causal kernel skips half."""
    live = torch.ones_like(steps, dtype=torch.bool) if live is None else live
    fed = live if fed is None else fed & live
    kind = type(model)
    if kind.think is not LLaMA.think and kind.passes is LLaMA.passes:
        raise NotImplementedError(f"{kind.__name__} has its own think, but no passes to say what it costs")
    weights = matrices(model.blocks[0])
    heads = model.config.n_head * model.config.head_width
    products = 2 * model.head.weight.numel() * fed.sum().double() + model.further_products(steps, fed)
    attention = torch.zeros_like(products)
    for queries, keys, layers in model.passes(steps, live, fed):
        products += 2 * weights * layers * queries.sum()
        attention += 4 * heads * layers * (queries.double() * keys).sum()
    return products, attention


def training_flops(products: float, attention: float) -> float:
    """Forward and backward: a matrix product's backward is two of its kind, fused attention's is 2.5."""
    return 3 * products + 3.5 * attention


def going_on(mean: float, most: int) -> float:
    """q with q + q² + … + q^most = mean: the probability of going on after each step."""
    low, high = 0.0, 1.0
    for _ in range(60):
        q = (low + high) / 2
        if sum(q**k for k in range(1, most + 1)) < mean:
            low = q
        else:
            high = q
    return high


class ForcedRouter(nn.Module):
    """Lets a share q of the tokens of each pass go on, drawn at random, whatever they are."""

    def __init__(self, router: nn.Linear, q: float) -> None:
        super().__init__()
        self.router = router
        self.q = q

    def forward(self, h: Tensor) -> Tensor:
        count = math.floor(self.q * len(h) + random.random())  # right on average, also for one token
        chosen = torch.randperm(len(h), device=h.device) < count
        return (60.0 * chosen - 30.0)[:, None].add(self.router(h), alpha=0)  # the router costs what it costs


def make(config: Config, device: torch.device | str, mean_latent: float = 0.0) -> LLaMA:
    """A model of config.method, adaptive forced to a mean of latent steps. Raises BadInput."""
    torch.manual_seed(0)
    random.seed(0)
    try:
        with torch.device(device):
            model = build(config)
    except ValueError as error:
        raise BadInput(f"{config.method}: {error}") from None
    if isinstance(model, AdaptiveLatentCoT):
        model.router = ForcedRouter(model.router, going_on(mean_latent, config.max_latent))
        model.tau = 0.5
    return model


def made_up_steps(config: Config, B: int, T: int, mean_latent: float) -> Tensor:
    """Steps (B, T) as they would be at a mean of latent steps, each row having its share. mor: balanced."""
    generator = torch.Generator().manual_seed(0)
    rank = torch.rand(B, T, generator=generator).argsort(1) / T  # 0, 1 / T, … in any order
    K = most_latent(config)
    if config.method == "mor":
        return (rank * (K + 1)).floor()
    q = going_on(mean_latent, K) if is_adaptive(config) else 1.0
    steps = torch.zeros(B, T)
    for k in range(1, K + 1):
        steps += rank < q**k
    return steps


CPU_ATTENTION = {  # FLOPs from shapes; torch's counter does not know these. Backward makes the scores again
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, *_, **__: 4 * math.prod(q) * k[2],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda gradient, q, k, *_, **__: 10 * math.prod(q) * k[2],
}


def counted(model: LLaMA, idx: Tensor, targets: Tensor) -> tuple[int, Tensor]:
    """FLOPs of forward and backward as torch's counter sees them executed, and the steps (B, T) behind them.

    Row by row: in a batch the grid of attention has empty seats, which are executed but not wanted.
    """
    total = 0
    steps = []
    for row in range(len(idx)):
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            output = model(idx[row : row + 1], targets[row : row + 1])
            output.loss.backward()
        total += counter.get_total_flops()
        steps.append(output.steps)
    model.zero_grad(set_to_none=True)
    return total, torch.cat(steps)


def kept_bytes(model: LLaMA, idx: Tensor, targets: Tensor) -> int:
    """Bytes that a forward keeps for its backward, weights included: most of the peak of memory."""
    storages = {}

    def note(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()  # t itself would hold the graph that holds it, for ever

    with torch.autograd.graph.saved_tensors_hooks(note, nn.Identity()):
        loss = model(idx, targets).loss
    total = sum(storages.values())
    del loss  # until here it kept them all alive, so that no address came twice
    return total


def costs(model: LLaMA, steps: Tensor) -> dict[str, float]:
    """By formula, at these steps (B, T): FLOPs per token of training, prefill and decoding; and mean passes.

    Decoding: one token at a full context. Its query meets all keys, as each does in the count of a prefill.
    The model is in training mode afterwards.
    """
    prefill = decode = float(sum(forward_flops(model.eval(), steps))) / steps.numel()
    if model.config.method == "ponder2":  # whose prefill is another computation
        last = torch.arange(steps.size(1)).expand_as(steps) == steps.size(1) - 1
        decode = float(sum(forward_flops(model, steps, fed=last))) / len(steps)
    drawn = []
    model.train()
    for rounds in (2, 3):  # ponder2 draws them in training
        model.rounds = rounds
        drawn.append(torch.stack(forward_flops(model, steps)))
    products, attention = (torch.stack(drawn).mean(0) / steps.numel()).tolist()
    blocks = matrices(model.blocks)
    everywhere = torch.ones_like(steps, dtype=torch.bool)
    outside = float(model.further_products(steps, everywhere)) / steps.numel()  # blocks and the last head
    passes = ((products - outside) / 2 - model.head.weight.numel()) / blocks
    training = training_flops(products, attention)
    return {"training": training, "prefill": prefill, "passes": passes, "decode": decode}


def bytes_read(model: LLaMA, steps: Tensor) -> float:
    """Bytes of weights, keys and values that it takes to decode the last token of steps (1, T)."""
    live = torch.ones_like(steps, dtype=torch.bool)
    last = torch.arange(steps.size(1)) == steps.size(1) - 1
    block = model.blocks[0]
    weights = matrices(block)
    read = model.head.weight.numel() + float(model.further_products(steps, live & last)) / 2
    for queries, keys, layers in model.passes(steps, live, live & last):
        if queries.any():
            read += layers * (weights + int(keys) * (block.wk.out_features + block.wv.out_features))
    return read * model.head.weight.itemsize


def memory(model: LLaMA, batch: int, world: int, checkpointing: bool, low: bool = True,
           masks: bool = False) -> dict[str, float]:
    """Bytes that each of `world` sharded processes holds at the peak of a training step, part by part.

    Of an adaptive model (on the meta device: nothing is allocated) and a micro-batch of `batch` full
    contexts, where every token takes every step: the most that can be. low: products in bfloat16, else all in
    float32. masks: attention reads additive masks, as on a CPU. Counted from what blocks keep that are not
    compiled, and for a loss that is or is not; gradients of earlier micro-batches are there.
    """
    config = model.config
    d, f, V, L, K = config.n_embd, config.n_ff, config.vocab_size, config.n_layer, config.max_latent
    c = 2 if low else 4  # bytes of an operand
    kv = model.blocks[0].wk.out_features + model.blocks[0].wv.out_features
    block = sum(p.numel() for p in model.blocks[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    n = batch * config.block_size  # tokens, and states of a pass
    states = n * (K + 1)
    norms = 30 * d if low else 24 * d  # per state: inputs of two norms, of seven products, and of attention
    kept = norms + 4 * c * f + 4 * config.n_head
    head = min(n * V, CHUNK)  # logits at once
    outside = states * ((12 if low else 8) * d + 8 * d // config.n_head) + 4 * n * d  # norm, RoPE, mixture
    columns = K + 1 if checkpointing else (K + 1) * (K + 2) // 2  # each pass keeps the keys that it joined
    activations = L * states * (4 * d if checkpointing else kept)
    whole = n * V <= CHUNK  # logits are not made in chunks
    if config.exit_loss and whole:
        outside += 4 * states * V
    if masks:
        outside += c * n * config.block_size * (K + 1) * (K + 2) // 2
    logits = head * c * whole
    works = 3 * c * block + 4 * block * (1 + 1 / world)  # gathered, the next, gradient; its reduction in fp32
    works += 4 * V * d + logits + c * n * (3 * f + 2 * d)  # gradients of the head and inside a block
    if checkpointing:
        works += n * kept + c * n * kv * (K + 1)
    later = works + L * K * c * n * kv - activations / (K + 1)  # after one pass: gradients of older keys
    compiled = 0 if config.exit_loss else 2 * c * min(n * V, COMPILED_CHUNK)
    loss = max((18 if low else 16) * head, compiled) + 2 * c * block
    return {
        "weights": 4 * total / world, "gradients": 4 * total / world, "AdamW's moments": 8 * total / world,
        "gathered: embedding, head": 4 * (total - L * block) + c * V * d * low,
        "activations": activations + outside, "keys and values": L * c * n * kv * columns,
        "at work: a block, or the loss": max(works, later, loss)}


def fitting(size: float, **settings) -> int:
    """The largest micro-batch whose peak stays below `size` bytes; settings: what memory takes but batch."""
    def peak(batch: int) -> float:
        return sum(memory(batch=batch, **settings).values())

    return bisect_left(range(1, 2**40), size, key=peak)
