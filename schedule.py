"""What steers a training: learning rate, optimizer, and the budget of latent steps.

`config` is train.py's Train throughout.
"""

import math

import torch

from model import AdaptiveLatentCoT, LLaMA


def learning_rate(config, step: int) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    rise = max(1, round(config.warmup * config.max_steps))
    if step < rise:
        return config.learning_rate * (step + 1) / rise
    progress = (step - rise) / max(1, config.max_steps - rise)
    return config.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def router_rate(config) -> float:
    """Steady, and slow enough to steer: Adam moves a logit over d features by d times the learning rate."""
    return 40 / (config.n_embd * config.max_steps)


def make_optimizer(model: LLaMA, config) -> torch.optim.AdamW:
    """Groups: matrices, which decay; vectors; the adaptive router, which has a learning rate of its own."""
    named = dict(model.named_parameters())
    names = [name for name in named if name.startswith("router.") and name.endswith("weight")]
    router = [named.pop(name) for name in names] if isinstance(model, AdaptiveLatentCoT) else []
    matrices = [p for p in named.values() if p.dim() >= 2]
    vectors = [p for p in named.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors}]
    if router:
        groups.append({"params": router})
    betas = config.beta1, config.beta2
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, weight_decay=0.0, fused=True)


class BudgetController:
    """Steers λ so that the mean of executed latent steps lands on the budget: proportional, integral, damped.

    The aim falls from ℓ_max to the budget over the first half of training: λ rises from 0, and every step is
    learnt before any is pruned. e = (mean + trend) / aim − 1, within ±1, where mean is a running mean (0.9)
    of executed steps and trend how far it has moved from a slow one; λ = kp · e + I, I += ki · e / max_steps,
    both at least 0. The trend is what damps: a step that was pruned gives its router no more gradient, so
    too much pruning is slow to undo. All times but the running mean's are shares of the training, and so is
    router_rate: the loop is much the same for every length.
    """

    kp = 0.3
    ki = 6.0

    def __init__(self, budget: float, most: int, max_steps: int) -> None:
        self.budget = budget
        self.most = most
        self.max_steps = max_steps
        self.state = (float(most), float(most), 0.0)  # running mean, slow mean, integral

    def update(self, step: int, steps: float) -> float:
        """Mean executed latent steps of optimizer step `step` → λ of the next."""
        mean, slow, integral = self.state
        mean += 0.1 * (steps - mean)
        slow += (mean - slow) / max(10, 0.08 * self.max_steps)
        aim = self.budget + (self.most - self.budget) * max(0.0, 1 - step / (0.5 * self.max_steps))
        error = max(-1.0, min(1.0, (2 * mean - slow) / max(aim, 0.01) - 1))
        integral = max(0.0, integral + self.ki / self.max_steps * error)
        self.state = (mean, slow, integral)
        return max(0.0, self.kp * error + integral)
