"""What a method costs at a mean of latent steps: FLOPs by formula and as executed, bytes that decoding reads.

What is notable here:
* A method says beside its `think` what a forward costs, as a function of the executed steps (`model.flops`).
  `counted` asks torch's counter what such a forward and its backward execute, where halted tokens are absent.
* `make` forces adaptive to a mean number of latent steps: nothing needs to be trained. `made_up_steps` is for
  models that are too big to execute.
"""

import math
import random

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from baselines import build
from common import BadInput
from model import AdaptiveLatentCoT, Config, LLaMA, training_flops


def going_on(mean: float, most: int) -> float:
    """q with q + q² + … + q^most = mean: each step is gone on from with this probability."""
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
    K = 0 if config.method == "vanilla" else config.max_latent
    if config.method == "mor":
        return (rank * (K + 1)).floor()
    q = going_on(mean_latent, K) if config.method == "adaptive" else 1.0
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


def costs(model: LLaMA, steps: Tensor) -> dict[str, float]:
    """By formula, at these steps (B, T): FLOPs per token of training, prefill and decoding; and mean passes.

    Decoding: one token at a full context. Its query meets all keys, as each does in the count of a prefill.
    """
    prefill = decode = float(sum(model.eval().flops(steps))) / steps.numel()
    if model.config.method == "ponder2":  # whose prefill is another computation
        last = torch.arange(steps.size(1)).expand_as(steps) == steps.size(1) - 1
        decode = float(sum(model.flops(steps, fed=last))) / len(steps)
    drawn = []
    model.train()
    for rounds in (2, 3):  # ponder2 draws them in training
        model.rounds = rounds
        drawn.append(torch.stack(model.flops(steps)))
    products, attention = (torch.stack(drawn).mean(0) / steps.numel()).tolist()
    blocks = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    passes = (products / 2 - model.head.weight.numel()) / blocks
    training = training_flops(products, attention)
    return {"training": training, "prefill": prefill, "passes": passes, "decode": decode}


def bytes_read(model: LLaMA, steps: Tensor) -> float:
    """Bytes of weights, keys and values that it takes to decode the last token of steps (1, T)."""
    live = torch.ones_like(steps, dtype=torch.bool)
    last = torch.arange(steps.size(1)) == steps.size(1) - 1
    block = model.blocks[0]
    weights = sum(p.numel() for p in block.parameters() if p.dim() == 2)
    read = model.head.weight.numel() + float(model.further_products(steps, live & last)) / 2
    for queries, keys, layers in model.passes(steps, live, live & last):
        if queries.any():
            read += layers * (weights + int(keys) * (block.wk.out_features + block.wv.out_features))
    return read * model.head.weight.itemsize
